"""Stages of membranous nephropathy, with and without their order.

Simulated patients with MN, labelled by stage (`stage_cohort`), cross-validated by patient. In each fold
CMUS-Net is trained with frozen
encoders whose maps are kept, the same seed and no label smoothing, with three kinds of heads:
  ce          softmax: knows nothing of the order
  corn        conditional questions (Shi, Cao and Raschka 2021)
  cumulative  one score and thresholds (McCullagh 1980)
Training runs for a fixed number of epochs; test patients decide nothing. Each repeat has folds and seeds
of its own; printed are medians
over repeats. Each figure is computed from the same probabilities with the
reading that serves it best (`choose_stages`): accuracy from the most probable stage, kappa (quadratic-
weighted) and MAE (mean absolute stage
error) from their own. Intervals, 95 %, are by bootstrap over patients, all folds together. The last row
is the best that any reader of all
three modalities can reach on average over patients (`stage_limits`).

    python benchmarks/staging.py --json cmus_fastai/results/staging.json
"""

import tempfile
from common import BACKBONE, Table, arguments, machine, median, write
import numpy as np
import pandas as pd
import torch
from cmus_fastai.training.predictions import predictions
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.training.learner import cmus_learner
from cmus_fastai.training.losses import MultiLoss
from cmus_fastai.training.heads import HEADS, ordinal_heads
from cmus_fastai.evaluation.ordinal import choose_stages, stage_cohort, stage_limits, stage_metrics
from cmus_fastai.data.phantom import make_phantom

GOALS = dict(accuracy='accuracy', kappa='kappa', mae='MAE')
COLUMNS = dict(
    heads=('heads', '<14'),
    **{
        f'{g}{k}': (h if not k else k[1:], '>8.3f' if not k else '>6.3f')
        for g, h in GOALS.items()
        for k in ('', '_low', '_high')
    },
    log_loss=('log loss', '>9.3f'),
)


def fold_predictions(a, kind, seed, train, test, cache):
    "Train on one side, read the other."
    dls = train.dataloaders(valid=test, size=a.size, bs=a.bs, cache=cache, device=torch.device(a.device))
    learn = cmus_learner(
        dls, a.backbone, None if a.weights == 'none' else a.weights, seed=seed, loss_func=MultiLoss()
    )
    if kind != 'ce':
        ordinal_heads(learn.model, kind)
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_preset(a.epochs)
    model = learn.model.eval()
    with torch.inference_mode():
        probs = (
            torch.cat([model(*b[:3]).fusion for b in cache.loader(model, test, **dls.reading)])
            .float()
            .softmax(1)
            .cpu()
        )
    return predictions(test.df.index, test.df.label, probs, test.classes, test.df.group)


def figures(preds):
    "Each figure with its interval, from the reading that serves it, and the log loss."
    out = {}
    for g in GOALS:
        e = stage_metrics(choose_stages(preds, g)).loc[g]
        out |= {g: e.estimate, f'{g}_low': e.low, f'{g}_high': e.high}
    return out | dict(
        log_loss=float(-np.mean(np.log([max(r[f'p_{r.label}'], 1e-12) for _, r in preds.iterrows()])))
    )


def main():
    a = arguments(
        __doc__,
        1,
        **{k: BACKBONE[k] for k in ('backbone', 'size')},
        weights=('imagenet', "the encoders' weights; none: random"),
        patients=(200, 'simulated patients with MN'),
        folds=(5, 'of the cross-validation'),
        epochs=(15, 'of each training'),
        bs=(4, 'patients in a batch'),
        views=(2, 'kept views of each training image'),
        cache=('', 'folder for the maps; none: memory'),
        seed=(0, 'of the phantom, and of the first repeat'),
    )
    print(machine(a.device))
    runs = {k: [] for k in ('ce', *HEADS)}
    with tempfile.TemporaryDirectory() as tmp:
        make_phantom(
            f'{tmp}/phantom', 3 * a.patients, seed=a.seed, size=a.size, progress=False
        )  # a third of a phantom's patients have MN
        cohort, cache = (
            stage_cohort(f'{tmp}/phantom', check='fast', progress=False),
            FeatureCache(a.cache or None, a.views, bs=a.bs, progress=False),
        )
        for seed in range(a.seed, a.seed + a.repeats):
            preds = {k: [] for k in runs}
            for i, (train, test) in enumerate(cohort.kfold(a.folds, seed)):
                for k in runs:
                    preds[k].append(fold_predictions(a, k, seed, train, test, cache))
                print(
                    f'seed {seed}, fold {i + 1} of {a.folds}: {len(train)} patients to train on, {len(test)} '
                    f'to read',
                    flush=True,
                )
            for k, v in preds.items():
                runs[k].append(figures(pd.concat(v)))
    t = Table(
        f'{len(cohort)} patients with MN, {a.folds} folds, {a.backbone}, {a.size} px, {a.epochs} epochs in '
        f'batches of {a.bs}, {a.device}; medians of {a.repeats}',
        COLUMNS,
    )
    for k, v in runs.items():
        t.add(heads=k, **{c: median(f[c] for f in v) for c in v[0]})
    t.add(heads='best possible', **stage_limits().loc['OM + IM + TEM'])
    write(a, dict(staging=t))


if __name__ == '__main__':
    main()
