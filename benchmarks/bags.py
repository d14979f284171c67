"""Bags of OM and IM images: evidence in one of eight glomeruli, and a panel of antibodies.

python benchmarks/bags.py evidence TABLE [--aggregator smil]   # a table with a column key_instance
python benchmarks/bags.py panel FOLDER                         # simulated panels, written to FOLDER
"""
import argparse
from pathlib import Path
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from cmus_fastai.data.biopsy import ANTIBODIES, BiopsyOptions, best_accuracy, make_biopsies
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.evaluation.metrics import compare, evaluate
from cmus_fastai.explain.attribution import as_predictor
from cmus_fastai.training.config import ComputeConfig, TrainConfig
from cmus_fastai.training.fit import new_cache, predict_outputs, train_model

QUIET = ComputeConfig(progress=False)


def find_evidence(table, aggregator, repeats=3, k=5):
    "AUC over and within folds by group, and the share of bags whose largest weight is on a key image."
    config = TrainConfig(head=dict(om_aggregator=aggregator))
    cohort, cache = Cohort.from_table(table), new_cache(config, QUIET)
    rows = pd.read_csv(table)
    keys = {Path(table).absolute().parent / path for path in rows[rows.key_instance == 1].path}
    positive, found, tests = cohort.classes[-1], [], []
    for repeat in range(repeats):
        for fold, (train, test) in enumerate(cohort.kfold(k, repeat)):
            learn = train_model(config, train, seed=100 * repeat + fold, cache=cache, compute=QUIET)
            outputs = predict_outputs(learn, test)
            p, y = outputs.fusion[f'p_{positive}'].to_numpy(), (test.df.label == positive).to_numpy()
            tests.append(pd.DataFrame(dict(repeat=repeat, fold=fold, p=p, y=y)))
            for case, weights, is_positive in zip(test, outputs.weights, y):
                if is_positive:
                    found.append(case.OM[int(weights['OM'].argmax())] in keys)
    tests = pd.concat(tests)
    over = [roc_auc_score(own.y, own.p) for _, own in tests.groupby('repeat')]
    within = [roc_auc_score(own.y, own.p) for _, own in tests.groupby(['repeat', 'fold'])]
    return dict(auc=np.mean(over), auc_within_folds=np.mean(within), largest_weight_on_key=np.mean(found))


def with_antibodies(cohort, chosen):
    "The cohort with the IM images of some antibodies only."
    bags = [[path for path in bag if cohort.tags[path] in chosen] for bag in cohort.df.IM]
    df = cohort.df.assign(IM=pd.Series(bags, cohort.df.index, dtype=object))
    return Cohort(df, cohort.classes, digests=cohort.digests, tags=cohort.tags)


TYPICAL = {'IgAN': 'IgA', 'MN': 'IgG', 'LN': 'C1q'}


def hide_typical_antibody(learn, test):
    "What hiding the antibody that is typical of the patient's disease changes, by disease."
    predictor, rows = as_predictor(learn), []
    for row in test:
        case, tag = predictor.open(row), TYPICAL[row.label]
        before, after = (predictor.probs(c).loc['fusion'] for c in (case, case.drop_tags(tag)))
        loss = before[row.label] - after[row.label]
        changed = before.idxmax() != after.idxmax()
        rows.append(dict(disease=row.label, loss=loss, moved=abs(loss), changed=changed))
    return pd.DataFrame(rows).groupby('disease').mean()


def compare_antibodies(folder, patients=300, epochs=40):
    "Test accuracy of the whole panel and of single antibodies, on the same 100 patients."
    options = BiopsyOptions(modalities=('IM',), size=128)
    make_biopsies(folder, patients, 0, options, progress=False)
    train, test = Cohort.from_folder(folder).split(1 / 3, seed=0)
    config = TrainConfig(size=128, epochs=epochs)
    cache, tables = new_cache(config, QUIET), {}
    for name in ('panel', *ANTIBODIES):
        chosen = ANTIBODIES if name == 'panel' else [name]
        learn = train_model(config, with_antibodies(train, chosen), cache=cache, compute=QUIET)
        tables[name] = predict_outputs(learn, with_antibodies(test, chosen)).fusion
        accuracy = evaluate(tables[name]).loc['accuracy'].to_dict()
        print(name, accuracy, 'best', best_accuracy(options, chosen), flush=True)
        if name == 'panel':
            print(hide_typical_antibody(learn, test).round(3), flush=True)
    for name in ANTIBODIES:
        difference = compare(tables['panel'], tables[name]).loc['accuracy'].to_dict()
        print('panel minus', name, difference, flush=True)


if __name__ == '__main__':
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument('what', choices=['evidence', 'panel'])
    parser.add_argument('path', help='table with key_instance, or a folder to make')
    parser.add_argument('--aggregator', default='gated', help="OM's aggregator")
    arguments = parser.parse_args()
    if arguments.what == 'evidence':
        print(find_evidence(arguments.path, arguments.aggregator))
    else:
        compare_antibodies(arguments.path)
