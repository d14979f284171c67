"""The recommended network, CMUS-Net and logistic regression on the same patients, side by side.

python benchmarks/presets.py phantom FOLDER --evidence FOLDER/manifest.csv --json presets.json
python benchmarks/presets.py real TRAIN --test TEST --evidence MANIFEST --json presets.json
python benchmarks/presets.py bags TABLE --evidence TABLE --json presets.json

Without --test every patient is tested once in each repeat, in five folds that keep groups together.
With it, each repeat is another seed. Differences are paired over patients or groups. --evidence is a table
with the columns path, and key_instance or informative: do the weights find the images with the evidence?
The JSON file keeps what it has on other data sets.
"""
import argparse
import json
import warnings
from datetime import date
from pathlib import Path
import numpy as np
import pandas as pd
from common import machine
from sklearn.metrics import roc_auc_score
from cmus_fastai.core import MODALITIES
from cmus_fastai.data.check import CohortWarning
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.evaluation.holdout import baseline_predictions
from cmus_fastai.evaluation.metrics import compare, evaluate
from cmus_fastai.training.config import ComputeConfig, TrainConfig
from cmus_fastai.training.fit import new_cache, predict_outputs, train_model

QUIET = ComputeConfig(progress=False)
CONFIGS = {'recommended': TrainConfig(preset='recommended'), 'CMUS-Net': TrainConfig(preset='small')}
BASELINES = {  # and the network whose features they use
    'logistic regression, the same features': 'recommended',
    'logistic regression, last level': 'CMUS-Net',
}


def divisions(cohort, test, repeats, k):
    "For each repeat its pairs of training and test patients."
    if test is not None:
        return [[(cohort, test)] for _ in range(repeats)]
    return [cohort.kfold(k, repeat) for repeat in range(repeats)]


def evidence_paths(table):
    "The absolute paths of the images that show the evidence."
    rows = pd.read_csv(table)
    column = 'key_instance' if 'key_instance' in rows else 'informative'
    shown = rows[rows[column].astype(str).isin(['1', '1.0', 'True'])]
    return {str((Path(table).parent / path).resolve()) for path in shown.path}


def weights_on_evidence(test, outputs, keys):
    "For each bag with and without evidence: the AUC of its weights, and whether the largest is on evidence."
    found = []
    for case, weights in zip(test, outputs.weights):
        for modality in MODALITIES:
            is_key = np.array([str(Path(path).resolve()) in keys for path in case[modality]], bool)
            if is_key.any() and not is_key.all():
                top = is_key[weights[modality].argmax()]
                found.append((case.name, roc_auc_score(is_key, weights[modality]), float(top)))
    return found


def within_folds(tables):
    "Mean AUC within the folds of two classes, in which probabilities of several networks are not mixed."
    classes = [name.removeprefix('p_') for name in tables[0].columns if name.startswith('p_')]
    if len(classes) != 2:
        return None
    aucs = [roc_auc_score(fold.label == classes[1], fold[f'p_{classes[1]}'])
            for table in tables for _, fold in table.groupby('fold') if fold.label.nunique() == 2]
    return float(np.mean(aucs))


def mean_with_interval(found, n_boot=2000):
    "Mean over bags, and its interval over patients."
    table = pd.DataFrame(found, columns=['patient', 'auc', 'top']).groupby('patient')[['auc', 'top']].mean()
    rows = np.random.default_rng(0).integers(len(table), size=(n_boot, len(table)))
    low, high = np.quantile(table.to_numpy()[rows].mean(1), [.025, .975], axis=0)
    return dict(n=len(table), **{name: dict(estimate=table[name].mean(), low=low[i], high=high[i])
                                 for i, name in enumerate(table)})


def run(cohort, test, repeats, k, keys):
    "Predictions of every model, one table for each repeat, and what the networks' weights found."
    caches = {name: new_cache(config, QUIET) for name, config in CONFIGS.items()}
    tables = {name: [] for name in (*CONFIGS, *BASELINES)}
    found = {name: [] for name in CONFIGS}
    for repeat, pairs in enumerate(divisions(cohort, test, repeats, k)):
        parts = {name: [] for name in tables}
        for fold, (train, tested) in enumerate(pairs):
            seed = 100 * repeat + fold
            for name, config in CONFIGS.items():
                learn = train_model(config, train, seed=seed, cache=caches[name], compute=QUIET)
                outputs = predict_outputs(learn, tested)
                parts[name].append(outputs.fusion.assign(fold=fold))
                found[name] += weights_on_evidence(tested, outputs, keys)
            for name, features in BASELINES.items():
                table = baseline_predictions(train, tested, CONFIGS[features], caches[features])
                parts[name].append(table.assign(fold=fold))
        for name, folds in parts.items():
            tables[name].append(pd.concat(folds))
        print(f'repeat {repeat + 1} of {repeats}', flush=True)
    return tables, found


def figures(table):
    "A table for JSON."
    return {name: {key: float(value) for key, value in row.items()} for name, row in table.iterrows()}


def summarise(tables, found):
    "Every figure for JSON."
    models = {}
    for name, own in tables.items():
        models[name] = dict(figures(evaluate(own)), auc_within_folds=within_folds(own),
                            each=[float((table.pred == table.label).mean()) for table in own])
    ours = tables['recommended']
    differences = {name: figures(compare(ours, own)) for name, own in tables.items() if own is not ours}
    evidence = {name: mean_with_interval(rows) for name, rows in found.items() if rows}
    return dict(models=models, recommended_minus=differences, evidence=evidence)


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument('name', help='of the data set, in the JSON file')
    parser.add_argument('data', help='folder or table of patients')
    parser.add_argument('--test', help='folder or table of test patients')
    parser.add_argument('--evidence', help='table that says which images show the evidence')
    parser.add_argument('--repeats', type=int, default=3, help='divisions, or seeds with --test (default: 3)')
    parser.add_argument('--k', type=int, default=5, help='folds (default: 5)')
    parser.add_argument('--json', help='file for the results')
    return parser.parse_args()


def main():
    a = parse()
    warnings.simplefilter('ignore', CohortWarning)
    cohort = Cohort.read(a.data, progress=False)
    test = Cohort.read(a.test, progress=False) if a.test else None
    keys = evidence_paths(a.evidence) if a.evidence else set()
    result = summarise(*run(cohort, test, a.repeats, a.k, keys))
    result.update(date=str(date.today()), machine=machine(), repeats=a.repeats, k=None if test else a.k)
    result['patients'] = dict(train=len(cohort), test=len(test)) if test else len(cohort)
    print(json.dumps(result, indent=1))
    if a.json:
        path = Path(a.json)
        known = json.loads(path.read_text('utf-8')) if path.exists() else {}
        path.write_text(json.dumps(known | {a.name: result}, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
