"""Stages of membranous nephropathy, with and without their order.

Simulated patients with MN, labelled by stage (`stage_cohort`), are cross-validated by patient. In each fold
CMUS-Net is trained with frozen encoders, whose feature maps are cached, with the same seed, no label
smoothing and three kinds of heads:
  ce          softmax, which does not use the order
  corn        conditional questions (Shi, Cao and Raschka 2021)
  cumulative  one score and thresholds (McCullagh 1980)
Training has a fixed number of epochs; no choice depends on test patients. Each repeat has its own folds and
seeds, and medians over repeats are printed. Each metric has the predictions that are best for it
(`choose_stages`), all from the same probabilities: the most probable stage for the accuracy, others for
kappa (quadratic-weighted) and MAE (mean absolute stage error). Intervals (95 %) are by bootstrap over
patients, all folds together. The last row is the best that any model of all three modalities can reach on
average over patients (`stage_limits`).

    python benchmarks/staging.py --json cmus_fastai/results/staging.json
"""

import tempfile
from common import BACKBONE, Table, arguments, machine, median, write
import numpy as np
import pandas as pd
import torch
from cmus_fastai.data.phantom import make_phantom
from cmus_fastai.evaluation.ordinal import choose_stages, stage_cohort, stage_limits, stage_metrics
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.training.heads import HEADS, ordinal_heads
from cmus_fastai.training.learner import cmus_learner
from cmus_fastai.training.losses import MultiLoss
from cmus_fastai.training.predictions import predictions

GOALS = dict(accuracy='accuracy', kappa='kappa', mae='MAE')


def table_columns():
    "Heading and format of each column."
    columns = dict(heads=('heads', '<14'))
    for goal, heading in GOALS.items():
        columns[goal] = heading, '>8.3f'
        columns[f'{goal}_low'] = 'low', '>6.3f'
        columns[f'{goal}_high'] = 'high', '>6.3f'
    return columns | dict(log_loss=('log loss', '>9.3f'))


def train_fold(a, kind, seed, train, test, cache):
    "Train a model with one kind of heads on the training patients of a fold; the model and its data loaders."
    dls = train.dataloaders(valid=test, size=a.size, bs=a.bs, cache=cache, device=torch.device(a.device))
    weights = None if a.weights == 'none' else a.weights
    learn = cmus_learner(dls, a.backbone, weights, seed=seed, loss_func=MultiLoss())
    if kind != 'ce':
        ordinal_heads(learn.model, kind)
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_preset(a.epochs)
    return learn.model.eval(), dls


def fold_predictions(a, kind, seed, train, test, cache):
    "Predictions for the test patients of a fold."
    model, dls = train_fold(a, kind, seed, train, test, cache)
    with torch.inference_mode():
        reading = dict(settings=dls.image_settings, num_workers=dls.num_workers)
        logits = [model(*batch[:3]).fusion for batch in cache.loader(model, test, **reading)]
    probs = torch.cat(logits).float().softmax(1).cpu()
    return predictions(test.df.index, test.df.label, probs, test.classes, test.df.group)


def figures(preds):
    "Each metric with its interval, from the predictions that are best for it, and the log loss."
    out = {}
    for goal in GOALS:
        row = stage_metrics(choose_stages(preds, goal)).loc[goal]
        out |= {goal: row.estimate, f'{goal}_low': row.low, f'{goal}_high': row.high}
    of_truth = [max(row[f'p_{row.label}'], 1e-12) for _, row in preds.iterrows()]
    return out | dict(log_loss=float(-np.mean(np.log(of_truth))))


def cross_validate(a, cohort, cache, seed):
    "Predictions for all patients with each kind of heads, in one repeat."
    preds = {kind: [] for kind in ('ce', *HEADS)}
    for i, (train, test) in enumerate(cohort.kfold(a.folds, seed)):
        for kind in preds:
            preds[kind].append(fold_predictions(a, kind, seed, train, test, cache))
        sizes = f'{len(train)} training patients, {len(test)} test patients'
        print(f'seed {seed}, fold {i + 1} of {a.folds}: {sizes}', flush=True)
    return {kind: pd.concat(tables) for kind, tables in preds.items()}


def parse():
    return arguments(
        __doc__,
        1,
        **{k: BACKBONE[k] for k in ('backbone', 'size')},
        weights=('imagenet', 'weights of the encoders; none: random'),
        patients=(200, 'simulated patients with MN'),
        folds=(5, 'of the cross-validation'),
        epochs=(15, 'of each training'),
        bs=(4, 'patients in a batch'),
        views=(2, 'cached views of each training image'),
        cache=('', 'folder for the feature maps; none: memory'),
        seed=(0, 'of the phantom, and of the first repeat'),
    )


def main():
    a = parse()
    print(machine(a.device))
    runs = {kind: [] for kind in ('ce', *HEADS)}
    with tempfile.TemporaryDirectory() as tmp:
        # a third of a phantom's patients have MN
        make_phantom(f'{tmp}/phantom', 3 * a.patients, seed=a.seed, size=a.size, progress=False)
        cohort = stage_cohort(f'{tmp}/phantom', check='fast', progress=False)
        cache = FeatureCache(a.cache or None, a.views, bs=a.bs, progress=False)
        for seed in range(a.seed, a.seed + a.repeats):
            for kind, preds in cross_validate(a, cohort, cache, seed).items():
                runs[kind].append(figures(preds))
    data = f'{len(cohort)} patients with MN, {a.folds} folds, {a.backbone}, {a.size} px'
    training = f'{a.epochs} epochs in batches of {a.bs}, {a.device}; medians of {a.repeats}'
    table = Table(f'{data}, {training}', table_columns())
    for kind, repeats in runs.items():
        table.add(heads=kind, **{c: median(r[c] for r in repeats) for c in repeats[0]})
    table.add(heads='best possible', **stage_limits().loc['OM + IM + TEM'])
    write(a, dict(staging=table))


if __name__ == '__main__':
    main()
