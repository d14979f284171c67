"""What do habits of the published code and its loss weights change? Each is switched on alone.

python benchmarks/published.py --json published.json

The habits are emulated from their description; no code of the authors is used. Simulated biopsies with 4 to
16 TEM images of 96 px, since bags of up to ten would not be cut. Every patient is tested once, in five folds.
Differences from CMUS-Net as it is in this package are paired over patients.
"""
import argparse
import json
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from unittest import mock
import pandas as pd
import torch
from common import machine
from cmus_fastai.data.check import CohortWarning
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.phantom import make_phantom
from cmus_fastai.evaluation.metrics import compare, evaluate
from cmus_fastai.training.config import ComputeConfig, TrainConfig
from cmus_fastai.training.fit import config_dataloaders, config_learner, new_cache
from cmus_fastai.training.fit import predict_outputs, train_model
from cmus_fastai.training.learner import presets

QUIET = ComputeConfig(progress=False)
LOSS_WEIGHTS = {  # of OM, IM and TEM → published accuracy, AUC and F1 in percent
    (.3, .5, .2): (95.37, 99.05, 95.32),
    (.5, .3, .2): (94.44, 98.83, 94.41),
    (.2, .5, .3): (94.07, 98.75, 94.11),
    (.3, .2, .5): (93.89, 98.59, 93.79),
    (.5, .2, .3): (93.70, 98.35, 93.63),
    (.2, .3, .5): (92.78, 98.86, 92.71),
}
HABITS = {
    'medoid': "the medoid's place in the whole bag is looked up among the kept images",
    'bags': 'bags are cut after ten images',
    'batch': 'the last incomplete test batch of four is dropped',
    'last': 'no validation patients: the last epoch is reported',
    'threshold': "SMIL's threshold is chosen on the test fold",
    'relu': 'ReLU on the logits of the branches',
}
THRESHOLDS = (.5, 1., 1.5, 2., 2.5)
TEST_BATCH = 4
LONGEST_BAG = 10


def displaced_weights(D, mask, t=1.5, eps=1e-8):
    "SMIL's weights with the habit 'medoid'."
    weights = torch.zeros_like(D[:, 0])
    for bag, real in enumerate(mask):
        places = real.nonzero().flatten()
        if len(places):
            distances = D[bag][places][:, places]
            weights[bag, places] = displaced_bag(distances, t, eps)
    return weights


def displaced_bag(distances, t, eps):
    "Weights of one bag: the rest is as published, see `smil_weights`."
    n = len(distances)
    medoid = int(distances.sum(1).argmin())
    limit = t * distances.sum() / max(n * (n - 1), 1)
    near = distances[medoid] <= limit
    near[medoid] = True
    kept = near.nonzero().flatten()
    centre = int(kept[min(medoid, len(kept) - 1)])  # right only if no image before the medoid was removed
    others = kept[kept != centre]
    closeness = 1 / (distances[centre, others] + eps)
    weights = distances.new_zeros(n)
    weights[centre] = 1
    if len(others):
        low, high = closeness.min(), closeness.max()
        equal = high - low <= 1e-5 * high
        weights[others] = torch.ones_like(closeness) if equal else (closeness - low) / (high - low)
    return weights


def cut_bags(cohort):
    "A cohort with the first ten TEM images of each patient."
    same = {name: getattr(cohort, name) for name in ('name', 'digests', 'leaky', 'tags', 'scales')}
    table = cohort.df.assign(TEM=[bag[:LONGEST_BAG] for bag in cohort.df.TEM])
    return Cohort(table, cohort.classes, cohort.findings, **same)


def train_to_the_end(config, train, test, seed, cache):
    "A network that learns from all training patients; its last epoch is kept."
    dls = config_dataloaders(config, train, test, seed, cache, QUIET, config.batch_size)
    learn = config_learner(config, dls, seed, QUIET, last=True)
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_preset(config.epochs)
    return learn


def predict_fold(config, habits, train, test, seed, cache):
    "Predictions of the test patients of a fold with some habits."
    if 'threshold' in habits:
        tables = [predict_fold(replace(config, head={**config.head, 't': t}), habits - {'threshold'},
                               train, test, seed, cache) for t in THRESHOLDS]
        return max(tables, key=lambda table: (table.pred == table.label).mean())
    if 'relu' in habits:
        config = replace(config, head={**config.head, 'branch_relu': True})
    if 'bags' in habits:
        train, test = cut_bags(train), cut_bags(test)
    if 'batch' in habits:
        test = test.subset(test.df.index[:len(test) // TEST_BATCH * TEST_BATCH])
    with ExitStack() as stack:
        if 'medoid' in habits:
            stack.enter_context(mock.patch('cmus_fastai.models.smil.smil_weights', displaced_weights))
        if 'last' in habits:
            learn = train_to_the_end(config, train, test, seed, cache)
        else:
            learn = train_model(config, train, seed=seed, cache=cache, compute=QUIET)
        return predict_outputs(learn, test).fusion


def cross_validate(config, cohort, folds, cache, habits=()):
    "Predictions of all test patients."
    tables = [predict_fold(config, set(habits), train, test, fold, cache)
              for fold, (train, test) in enumerate(folds)]
    return pd.concat(tables)


def with_loss_weights(weights):
    "Replace the weights of the branch losses of the preset."
    om, im, tem = weights
    loss = {**presets['small'].loss, 'om': om, 'im': im, 'tem': tem}
    return mock.patch.dict(presets, small=replace(presets['small'], loss=loss))


def figures(table, usual):
    "Estimates for JSON, and the paired difference from the usual network."
    rows = {name: {key: float(row[key]) for key in ('estimate', 'low', 'high')}
            for name, row in evaluate(table).iterrows()}
    shared = usual.loc[usual.index.intersection(table.index)]
    difference = compare(table, shared).loc['accuracy', ['difference', 'low', 'high']]
    return dict(rows, patients=len(table), difference=difference.astype(float).to_dict())


def measure(config, cohort, k):
    "Every habit alone, all together, and every setting of the loss weights."
    folds, cache = cohort.kfold(k, 0), new_cache(config, QUIET)
    usual = cross_validate(config, cohort, folds, cache)
    result = dict(usual=figures(usual, usual), habits={}, weights={})
    for name in [*HABITS, 'all']:
        habits = HABITS if name == 'all' else [name]
        table = cross_validate(config, cohort, folds, cache, habits)
        text = 'all together' if name == 'all' else HABITS[name]
        result['habits'][text] = figures(table, usual)
        print(text, result['habits'][text], flush=True)
    for weights, published in LOSS_WEIGHTS.items():
        with with_loss_weights(weights):
            table = cross_validate(config, cohort, folds, cache)
        name = ' / '.join(map(str, weights))
        result['weights'][name] = dict(figures(table, usual), published=published)
        print(name, result['weights'][name], flush=True)
    return result


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument('--patients', type=int, default=225, help='simulated patients (default: 225)')
    parser.add_argument('--size', type=int, default=96, help='side of the images, px (default: 96)')
    parser.add_argument('--k', type=int, default=5, help='folds (default: 5)')
    parser.add_argument('--epochs', type=int, default=25, help='epochs (default: 25)')
    parser.add_argument('--json', help='file for the results')
    return parser.parse_args()


def main():
    a = parse()
    warnings.simplefilter('ignore', CohortWarning)
    with tempfile.TemporaryDirectory() as folder:
        make_phantom(Path(folder)/'biopsies', a.patients, size=a.size, bag=(4, 16), progress=False)
        cohort = Cohort.read(Path(folder)/'biopsies', progress=False)
        result = measure(TrainConfig(size=a.size, epochs=a.epochs), cohort, a.k)
    result.update(date=str(date.today()), machine=machine(), patients=a.patients, size=a.size, k=a.k)
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
