"""What grows, and how: the head with the bag, and a cohort's handling with the number of patients.

bags      inference on one patient with 1 to 256 TEM images: the head (SMIL, CMSA, classifiers) on ready
          maps, and the encoders on the images,
          in turn; medians in milliseconds an image (TEM, OM and IM), and head/encoders
patients  reading a table of 100 to 10,000 patients (check='fast' and 'full'), a split, five folds,
          filling a cache, and a pass of the cached
          DataLoader of the training part (averaged maps, batches of 16); medians in milliseconds a
          patient, and the ratio to the
          smallest cohort, which is about 1 where the work grows as the number of patients does. Every
          patient has --images small JPEGs: one
          picture a class and modality, mixed with a random pattern of each file's own so that no two are the
          same to the cohort. Caches are
          filled with a small random backbone, only up to the size for which that is foreseen to take
          --limit seconds.

    python benchmarks/scaling.py --json cmus_fastai/results/scaling.json
"""

import tempfile
from functools import partial
from pathlib import Path
from common import (
    BACKBONE,
    Namespace,
    Table,
    arguments,
    batch,
    interleaved,
    machine,
    median,
    network,
    ratio,
    seconds,
    write,
)
import numpy as np
import pandas as pd
import torch
from PIL import Image
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.data.phantom import DISEASES, draw_im, draw_om, draw_tem

COLUMNS = dict(
    bags=dict(
        bag=('bag', '>6'),
        head=('head ms', '>10.3f'),
        encoders=('encoders ms', '>13.2f'),
        head_to_encoders=('head/encoders', '>15.3f'),
    ),
    patients=dict(
        patients=('patients', '>9'),
        images=('images', '>9'),
        what=('what', '<14'),
        ms=('ms/patient', '>12.3f'),
        to_first=('/smallest', '>11.2f'),
    ),
)


def bags(a):
    t = Table(
        f'inference on one patient, {a.backbone}, {a.size} px, {a.device}; medians of {a.repeats}, ms an '
        f'image',
        COLUMNS['bags'],
    )
    net = network(a).eval()
    for n in a.bags:
        x = batch([n], a.size, a.device)[:3]
        with torch.inference_mode():
            maps = net.encode(*x)
            s = interleaved(
                dict(head=partial(net.head, *maps), encoders=partial(net.encode, *x)),
                a.repeats,
                a.device,
                warm=n == a.bags[0],
            )
        t.add(
            bag=n,
            **{k: median(v) / (n + 2) * 1000 for k, v in s.items()},
            head_to_encoders=ratio(s['head'], s['encoders']),
        )
    return t


def files(folder, n, images):
    "A table of n patients; every picture is half one of its class and modality, half a random pattern."
    looks = dict(IgAN=('IgAN',) * 3, MN=('MN-spiky', 'MN-fine', 'MN-II'), LN=('LN',) * 3)
    draws = dict(OM=draw_om, IM=draw_im, TEM=draw_tem)
    drawn = {}
    for disease in DISEASES:
        for (modality, draw), look in zip(draws.items(), looks[disease]):
            drawn[disease, modality] = draw(look, np.random.default_rng(0), 96)[0]
    rng = np.random.default_rng(0)

    def write_one(label, modality, name):
        "Write a picture that no other patient has."
        pattern = np.kron(rng.integers(0, 256, (12, 12)), np.ones((8, 8)))
        picture = drawn[label, modality]
        mixed = picture / 2 + (pattern if picture.ndim == 2 else pattern[..., None]) / 2
        Image.fromarray(mixed.astype(np.uint8)).save(folder / name, quality=80)
        return name

    counts = dict(OM=1, IM=1, TEM=images - 2)
    rows = []
    for p in range(n):
        row = dict(patient=f'P{p:06}', label=DISEASES[p % 3])
        for modality, count in counts.items():
            names = [write_one(row['label'], modality, f'{modality}_{p:06}_{k}.jpg') for k in range(count)]
            row[modality] = '|'.join(names)
        rows.append(row)
    return pd.DataFrame(rows)


def cached_pass(cohort, net, a):
    "Fill a cache, and go through its training DataLoader: seconds of filling and of a pass."
    cache, parts = FeatureCache(pooled=True, n_views=1, progress=False), cohort.split(0.2)
    options = dict(bs=16, size=64, resample='bilinear')
    make = partial(cache.dataloaders, net, *parts, cohort.classes, **options)
    fill, dls = seconds(make, a.device), make()
    return fill, seconds(lambda: [None for _ in dls.train], a.device) * len(cohort) / len(parts[0])


def patients(a):
    t = Table(
        f'handling a cohort, {a.images} images of 96 px a patient; medians of {a.repeats}, ms a patient',
        COLUMNS['patients'],
    )
    net = network(Namespace(size=64, proj=0, device=a.device), 'resnet10t').eval()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        table = files(tmp, max(a.patients), a.images)
        cohorts, times = {}, {}
        for n in a.patients:
            table[:n].to_csv(tmp / f'{n}.csv', index=False)

        def read(n, check):
            cohorts[n] = Cohort.from_table(tmp / f'{n}.csv', check=check, progress=False)

        steps = {
            'read, fast': lambda n: read(n, 'fast'),
            'read, full': lambda n: read(n, 'full'),
            'split': lambda n: cohorts[n].split(0.2),
            'five folds': lambda n: cohorts[n].kfold(5),
        }
        for what, f in steps.items():
            timed = {n: partial(f, n) for n in a.patients}
            for n, s in interleaved(timed, a.repeats, warm=what == 'read, fast').items():
                times[what, n] = s
        per_patient = 0.0
        for n in a.patients:
            if per_patient * n > a.limit:
                continue
            s = [
                cached_pass(cohorts[n], net, a)
                for _ in range(a.repeats if per_patient * n * a.repeats < a.limit else 1)
            ]
            per_patient = s[-1][0] / n
            times['fill a cache', n], times['cached pass', n] = [list(x) for x in zip(*s)]
    for (what, n), s in times.items():
        first = times[what, a.patients[0]]
        t.add(
            patients=n,
            images=n * a.images,
            what=what,
            ms=median(s) / n * 1000,
            to_first=median(s) / n / (median(first) / a.patients[0]),
        )
    return t


def main():
    a = arguments(
        __doc__,
        3,
        **BACKBONE,
        bags=dict(
            type=int, nargs='+', default=[1, 4, 16, 64, 256], help='bag sizes (default: 1 4 16 64 256)'
        ),
        patients=dict(
            type=int,
            nargs='+',
            default=[100, 1000, 10000],
            help='sizes of cohorts, smallest first (default: 100 1000 10000)',
        ),
        images=(6, 'images of a patient'),
        limit=(60.0, 'seconds for filling a cache'),
    )
    torch.manual_seed(0)
    print(machine(a.device))
    write(a, dict(bags=bags(a), patients=patients(a)))


if __name__ == '__main__':
    main()
