"""Choose a configuration on training patients alone, and compare it with logistic regression.

For training patients who share images, as in a composed cohort. An ordinary validation set favours
memorisation there, because the network has seen most of its images. The candidates are therefore compared
by cross-validation within the training patients, in which every image of a validation patient is removed
from the patients used for training ("purged"). The best one, by accuracy and then by log loss, is trained
again with the package's defaults from --seeds seeds and predicts the test patients. The baseline is
logistic regression on the same frozen features, averaged. The means over the seeds and the ensemble of the
seeds (the mean of their probabilities) are printed, with paired differences from logistic regression.

    python benchmarks/choose.py --data real_micrographs/train --test real_micrographs/test \\
        --cache maps --json cmus_fastai/results/real_best.json
"""

import argparse
import json
import warnings
from dataclasses import asdict
from datetime import date
from pathlib import Path
from common import machine
import numpy as np
import pandas as pd
from cmus_fastai.core import MODALITIES
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.check import CohortWarning
from cmus_fastai.evaluation.crossval import join_cohorts, make_folds
from cmus_fastai.evaluation.metrics import compare, evaluate
from cmus_fastai.evaluation.study import baseline_folds
from cmus_fastai.training.features import FeatureCache, image_digests
from cmus_fastai.training.config import TrainConfig
from cmus_fastai.training.fit import predict_outputs, train_model
from cmus_fastai.training.predictions import classes_of, predictions

FUSIONS = ('cmsa', 'concat', 'self', 'gated', 'lowrank', 'vote', 'mean')
AGGREGATORS = ('mean', 'max', 'attention', 'gated', 'topk', 'entmax')
CANDIDATES = {name: dict(fusion=name) for name in FUSIONS}
CANDIDATES |= {f'mean, TEM by {name}': dict(fusion='mean', aggregator=name) for name in AGGREGATORS}


def images_with_digest(cohort):
    "Every image with its path and digest."
    for modalities in image_digests(cohort).values():
        for images in modalities.values():
            yield from images


def purged(train, valid):
    "The training patients without any image that a validation patient has."
    in_validation = {image.digest for image in images_with_digest(valid)}
    allowed = {image.path for image in images_with_digest(train) if image.digest not in in_validation}
    df = train.df.copy()
    for m in MODALITIES:
        bags = [[path for path in bag if path in allowed] for bag in df[m]]
        df[m] = pd.Series(bags, index=df.index, dtype=object)
    has_image = pd.concat([df[m].map(len) for m in MODALITIES], axis=1).sum(axis=1) > 0
    known = dict(digests=train.digests, tags=train.tags, scales=train.scales, checks=train.checks)
    return Cohort(df[has_image], train.classes, name='purged', **known)


def train_and_predict(config, train, valid, seed, cache, test):
    "Predictions of the fusion for the test patients."
    trained = train_model(config, train, valid, seed, cache)
    return predict_outputs(trained, test).fusion


def judge(config, cohort, cache, k, seed):
    "Accuracy and log loss of a configuration in purged cross-validation within the training patients."
    tables = []
    for train, valid in cohort.kfold(k, seed):
        tables.append(train_and_predict(config, purged(train, valid), valid, seed, cache, valid))
    preds = pd.concat(tables)
    of_truth = [max(row[f'p_{row.label}'], 1e-7) for _, row in preds.iterrows()]
    return float((preds.pred == preds.label).mean()), float(-np.mean(np.log(of_truth)))


def ensemble(tables):
    "Predictions with the mean probabilities of several tables."
    first = tables[0]
    probs = np.mean([table.filter(like='p_').to_numpy(float) for table in tables], 0)
    return predictions(first.index, first.label, probs, classes_of(first), first.group)


def choose(a, train, cache):
    "The best candidate, and accuracy and log loss of all of them."
    tried = {}
    for name in a.only:
        config = TrainConfig(epochs=a.epochs, head=CANDIDATES[name])
        accuracy, log_loss = tried[name] = judge(config, train, cache, a.k, 0)
        text = f'accuracy {accuracy:.3f}, log loss {log_loss:.3f} on purged validation patients'
        print(f'{name:<24} {text}', flush=True)
    return max(tried, key=lambda name: (tried[name][0], -tried[name][1])), tried


def figures(table):
    "A table of `evaluate` or `compare` for JSON."
    return {name: dict(row) for name, row in table.iterrows()}


def difference_text(row):
    interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
    return f"{row['difference']:+.3f} ({interval}), p {row['p']:.3f}"


def print_row(name, metrics, differences):
    "Print the figures of a model, and its differences from logistic regression if there are any."
    accuracy, auc = metrics['accuracy'], metrics['macro_auc']
    interval = f"{accuracy['low']:.3f} to {accuracy['high']:.3f}"
    text = f"accuracy {accuracy['estimate']:.3f} ({interval}), AUC {auc['estimate']:.3f}"
    if differences:
        d = {metric: difference_text(differences[metric]) for metric in ('accuracy', 'macro_auc')}
        text += f"; minus logistic regression {d['accuracy']}; AUC {d['macro_auc']}"
    print(f'{name:<20} {text}')


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, help='folder of the training patients')
    p.add_argument('--test', required=True, help='folder of the test patients')
    p.add_argument('--cache', help='folder for the feature maps; default: memory')
    p.add_argument('--json', help='file for the results')
    p.add_argument('--k', type=int, default=5, help='folds of the cross-validation (default: 5)')
    p.add_argument('--seeds', type=int, default=5, help='trainings of the best candidate (default: 5)')
    p.add_argument('--epochs', type=int, default=15, help='of each training while choosing (default: 15)')
    p.add_argument('--only', nargs='+', choices=CANDIDATES, default=list(CANDIDATES), help='candidates')
    return p.parse_args()


def main():
    a = parse()
    warnings.simplefilter('ignore', CohortWarning)
    warnings.simplefilter('ignore', FutureWarning)
    print(machine())
    train = Cohort.read(a.data, progress=False)
    test = Cohort.read(a.test, progress=False)
    cohort, fold = join_cohorts(train, test)
    cohort.leaky = train.leaky = (
        True  # shared images are accepted: folds within the training patients are purged
    )
    cache = FeatureCache(a.cache, n_views=2, progress=False)
    best, tried = choose(a, train, cache)
    config = TrainConfig(head=CANDIDATES[best])
    seeds = [train_and_predict(config, train, None, seed, cache, test) for seed in range(a.seeds)]
    baseline = baseline_folds(cohort, make_folds(cohort, given=fold), config, cache)
    models = {'mean of seeds': seeds, 'ensemble of seeds': [ensemble(seeds)]}
    against = {name: figures(compare(tables, baseline)) for name, tables in models.items()}
    table = {name: figures(evaluate(t)) for name, t in (models | {'logistic regression': baseline}).items()}
    print(f'chosen: {best}')
    for name, metrics in table.items():
        print_row(name, metrics, against.get(name))
    if a.json:
        result = dict(
            date=str(date.today()), machine=machine(), config=asdict(config), tried=tried, best=best
        )
        result['seeds'] = a.seeds
        result['each'] = [float((t.pred == t.label).mean()) for t in seeds]
        result |= dict(table=table, against=against)
        Path(a.json).write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
