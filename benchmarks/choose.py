"""Choose a configuration on training patients alone, and compare it with the baseline on test patients.

For training patients who share images, as in a composed cohort: a plain validation part is no help there,
since the network has seen most of its images.
So the candidates are judged in cross-validation inside the training patients, in which every image of a
validation patient is taken away from the
patients trained on ("purged"). The winner, by accuracy and then by log loss, is trained anew with the
package's defaults from --seeds seeds and reads the
test patients; so does logistic regression on the same frozen features, averaged. Printed are the means
over the seeds and the ensemble of the seeds
(the mean of their probabilities), with paired differences to logistic regression.

    python benchmarks/choose.py --data real_micrographs/train --test real_micrographs/test --cache maps \\
        --json cmus_fastai/results/real_best.json
"""

import argparse
import json
import warnings
from dataclasses import asdict
from datetime import date
from pathlib import Path
import numpy as np
import pandas as pd
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.check import CohortWarning
from cmus_fastai.evaluation.crossval import join_cohorts, make_folds
from cmus_fastai.evaluation.metrics import compare, evaluate
from cmus_fastai.training.config import TrainConfig
from cmus_fastai.training.fit import predict_outputs, train_model
from cmus_fastai.training.predictions import predictions
from cmus_fastai.training.features import FeatureCache, image_digests
from cmus_fastai.evaluation.study import baseline_folds
from common import machine

CANDIDATES = {f: dict(fusion=f) for f in ('cmsa', 'concat', 'self', 'gated', 'lowrank', 'vote', 'mean')} | {
    f'mean, TEM by {a}': dict(fusion='mean', aggregator=a)
    for a in ('mean', 'max', 'attention', 'gated', 'topk', 'entmax')
}


def purged(train, valid):
    "The training patients without any image that a validation patient has."
    digests = image_digests(train)
    theirs = {g for ms in image_digests(valid).values() for images in ms.values() for _, g in images}
    mine = {p for ms in digests.values() for images in ms.values() for p, g in images if g not in theirs}
    df = train.df.copy()
    for m in ('OM', 'IM'):
        df[m] = [p if p in mine else None for p in df[m]]
    df['TEM'] = pd.Series([[p for p in bag if p in mine] for bag in df.TEM], index=df.index, dtype=object)
    some = df[['OM', 'IM']].notna().any(axis=1) | (df.TEM.map(len) > 0)
    return Cohort(df[some], train.classes, digests=train.digests, name='purged')


def judge(config, cohort, cache, k, seed):
    "Accuracy and log loss of a configuration in purged cross-validation inside the training patients."
    read = []
    for train, valid in cohort.kfold(k, seed):
        read.append(
            predict_outputs(train_model(config, purged(train, valid), valid, seed, cache), valid).fusion
        )
    t = pd.concat(read)
    return float((t.pred == t.label).mean()), float(
        -np.mean(np.log([max(r[f'p_{r.label}'], 1e-7) for _, r in t.iterrows()]))
    )


def ensemble(tables):
    p = np.mean([t.filter(like='p_').to_numpy(float) for t in tables], 0)
    t = tables[0]
    return predictions(t.index, t.label, p, [c[2:] for c in t.filter(like='p_').columns], t.group)


def figure_text(metrics):
    "Accuracy with its interval, and AUC."
    accuracy, auc = metrics['accuracy'], metrics['macro_auc']
    interval = f"{accuracy['low']:.3f} to {accuracy['high']:.3f}"
    return f"accuracy {accuracy['estimate']:.3f} ({interval}), AUC {auc['estimate']:.3f}"


def difference_text(metrics):
    "Paired differences of accuracy and AUC with intervals and p values."
    def one(row):
        return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), p {row['p']:.3f}"
    return f"{one(metrics['accuracy'])}; AUC {one(metrics['macro_auc'])}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True)
    p.add_argument('--test', required=True)
    p.add_argument('--cache', help='folder for the maps; default: memory')
    p.add_argument('--json')
    p.add_argument('--k', type=int, default=5)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=15, help='while choosing')
    p.add_argument('--only', nargs='+', choices=CANDIDATES, default=list(CANDIDATES))
    a = p.parse_args()
    warnings.simplefilter('ignore', CohortWarning)
    warnings.simplefilter('ignore', FutureWarning)
    print(machine())
    train, test = Cohort.read(a.data, progress=False), Cohort.read(a.test, progress=False)
    cohort, fold = join_cohorts(train, test)
    cohort.leaky = train.leaky = True  # said above; folds inside the training patients are purged
    cache, tried = FeatureCache(a.cache, n_views=2, progress=False), {}
    for name in a.only:
        tried[name] = judge(TrainConfig(epochs=a.epochs, head=CANDIDATES[name]), train, cache, a.k, 0)
        print(
            f'{name:<24} accuracy {tried[name][0]:.3f}, log loss {tried[name][1]:.3f} on purged validation '
            f'patients',
            flush=True,
        )
    best = max(tried, key=lambda n: (tried[n][0], -tried[n][1]))
    config = TrainConfig(head=CANDIDATES[best])
    learners = (train_model(config, train, seed=s, cache=cache) for s in range(a.seeds))
    reads = [predict_outputs(learn, test).fusion for learn in learners]
    lr = baseline_folds(cohort, make_folds(cohort, given=fold), config, cache)
    rows = {'mean of seeds': reads, 'ensemble of seeds': [ensemble(reads)], 'logistic regression': lr}
    table = {k: {m: dict(r) for m, r in evaluate(v).iterrows()} for k, v in rows.items()}
    against = {k: {m: dict(r) for m, r in compare(rows[k], lr).iterrows()} for k in list(rows)[:2]}
    print(f'chosen: {best}')
    for k, t in table.items():
        d = against.get(k)
        note = f'; minus the baseline {difference_text(d)}' if d else ''
        print(f'{k:<20} {figure_text(t)}{note}')
    if a.json:
        Path(a.json).write_text(
            json.dumps(
                dict(
                    date=str(date.today()),
                    machine=machine(),
                    config=asdict(config),
                    tried=tried,
                    best=best,
                    seeds=a.seeds,
                    each=[float((t.pred == t.label).mean()) for t in reads],
                    table=table,
                    against=against,
                ),
                indent=1,
            )
            + '\n',
            encoding='utf-8',
        )


if __name__ == '__main__':
    main()
