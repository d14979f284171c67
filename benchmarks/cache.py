"""An epoch end to end, with frozen encoders, and with frozen encoders whose answers are kept.

Simulated patients, a fifth of them for validation, through `cohort.dataloaders` and `cmus_learner`; an
epoch includes its validation:
  end to end  all encoders trained
  frozen      `learn.freeze()`: the encoders read every image in every epoch, but have no backward pass
  disk        frozen, `cache=FeatureCache(folder)`: maps are read from files
  disk, 16    likewise, sixteen patients in a batch of maps, as `cmus demo` and `cmus train` take them
  memory      frozen, `cache=FeatureCache()`: maps are in memory
The first two are timed on a share of the epoch's images (--share; column "timed") and scaled, first batch
and starting workers apart. "fill" is
what encoding every image once costs, "start" what every later call of fit spends before its first epoch
(fingerprints, looking up), and
"pays after" how many epochs it takes until filling and cached epochs together are faster than frozen
epochs on images.
At the end, whether keeping maps changes anything: images as they are, one view, float32, the same seed;
three epochs each on a small
cohort, and the largest difference in any recorded number, relative to its size.

    python benchmarks/cache.py --json cmus_fastai/results/cache.json
"""

import tempfile
import time
from pathlib import Path
from common import BACKBONE, Table, arguments, machine, median, ratio, write
import torch
from fastai.callback.all import Callback
from fastai.callback.core import CancelTrainException, CancelValidException
import cmus_fastai.data.bag  # noqa: F401 (gives a Cohort its dataloaders)
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.training.learner import cmus_learner
from cmus_fastai.data.phantom import make_phantom

COLUMNS = dict(
    way=('way', '<12'),
    timed=('timed', '>8.0%'),
    epoch=('epoch s', '>10.2f'),
    to_end=('/end to end', '>13.4f'),
    to_frozen=('/frozen', '>10.4f'),
    fill=('fill s', '>9.1f'),
    start=('start s', '>9.2f'),
    pays_after=('pays after', '>12.1f'),
)


def n_images(cohort):
    return int(cohort.df[['OM', 'IM']].notna().to_numpy().sum() + cohort.df.TEM.map(len).sum())


class Part(Callback):
    "End training and validation after a share of their images, and say how long a whole epoch would take."

    order = 90

    def __init__(self, share=1.0):
        self.share = share

    def before_epoch(self):
        self.whole = 0.0

    def _now(self):
        if torch.device(self.dls.device).type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self):
        self.marks, self.total = [(self._now(), 0)], n_images(self.learn.cohorts[not self.training])

    def after_batch(self):
        self.marks.append((self._now(), self.marks[-1][1] + sum(int(m.sum()) for _, m in self.xb)))
        if self.share < 1 and self.marks[-1][1] >= self.share * self.total:
            raise CancelTrainException if self.training else CancelValidException

    def _end(self):
        (t0, _), (t1, n1), (t, n) = self.marks[0], self.marks[1], self.marks[-1]
        if self.share == 1:
            self.whole += self._now() - t0
        elif n == n1:
            self.whole += (t - t0) * self.total / n
        else:
            self.whole += (
                t1 - t0 + (t - t1) * (self.total - n1) / (n - n1)
            )  # the first batch waits for the workers to start, once

    before_train, before_validate, after_train, after_validate = _begin, _begin, _end, _end


def learner(a, train, valid, cache, frozen=True, model=None, share=1.0, **kw):
    dls = train.dataloaders(
        valid=valid,
        size=a.size,
        bs=a.bs,
        cache=cache,
        device=torch.device(a.device),
        num_workers=None if a.num_workers < 0 else a.num_workers,
        **kw,
    )
    learn = cmus_learner(
        dls, a.backbone, None if a.weights == 'none' else a.weights, model=model, seed=0, cbs=Part(share)
    )
    learn.cohorts = dls.cohorts
    if frozen:
        learn.freeze()
    return learn


def epoch(learn):
    "Seconds of an epoch, and of `fit` before and after it."
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    return learn.part.whole, time.perf_counter() - start - learn.part.whole


def largest_difference(a, folder):
    "Largest relative difference of recorded numbers between images and kept maps."
    make_phantom(folder / 'few', 15, seed=1, size=a.size, progress=False)
    train, valid = Cohort.from_folder(folder / 'few', check='fast', progress=False).split(0.2)

    def history(cache):
        learn = learner(a, train, valid, cache, augment=False)
        with learn.no_bar(), learn.no_logging():
            learn.fit(3)
        return torch.tensor(learn.history().drop(columns='epoch').to_numpy(float))

    cache = FeatureCache(folder / 'exact', n_views=1, dtype='float32', progress=False)
    images, filling, filled = history(None), history(cache), history(cache)
    return [((images - h).abs() / images.abs().clamp(min=1e-3)).max().item() for h in (filled, filling)]


def main():
    a = arguments(
        __doc__,
        3,
        **{k: BACKBONE[k] for k in ('backbone', 'size')},
        weights=('imagenet', "the encoders' weights; none: random"),
        patients=(150, 'simulated patients'),
        bs=(4, 'patients in a batch'),
        share=(0.1, 'of an epoch that is timed where the encoders run'),
        views=(2, 'kept views of each training image'),
        num_workers=(-1, 'processes that read images; -1: as many as the library finds worth starting'),
    )
    print(machine(a.device))
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        make_phantom(tmp / 'phantom', a.patients, size=a.size, progress=False)
        train, valid = Cohort.from_folder(tmp / 'phantom', check='fast', progress=False).split(0.2)
        caches = {
            'disk': FeatureCache(tmp / 'features', a.views, progress=False),
            'disk, 16': FeatureCache(tmp / 'features', a.views, bs=16, progress=False),
        }
        caches |= dict(memory=FeatureCache(None, a.views, progress=False))
        learners = {
            'end to end': learner(a, train, valid, None, False, share=a.share),
            'frozen': learner(a, train, valid, None, share=a.share),
        }
        learners |= {
            k: learner(a, train, valid, c, model=learners['frozen'].model) for k, c in caches.items()
        }  # one network for all, as its encoders stand still
        first = {k: epoch(l)[1] for k, l in learners.items()}  # warms up, and fills
        s = {k: [] for k in learners}
        for r in range(a.repeats):
            for k in list(s)[:: 1 if r % 2 == 0 else -1]:
                s[k].append(epoch(learners[k]))
        e, start = (
            {k: [x for x, _ in v] for k, v in s.items()},
            {k: median(x for _, x in v) for k, v in s.items()},
        )
        t = Table(
            f'one epoch: {len(train)} patients to train on ({n_images(train)} images), {len(valid)} to '
            f'validate ({n_images(valid)} images), {a.backbone}, {a.size} px, batches of {a.bs}, {a.device}; '
            f'medians of {a.repeats}',
            COLUMNS,
        )
        for k in learners:
            cached = k in caches
            fill, gain = first[k] - start[k], median(e['frozen']) - median(e[k])
            t.add(
                way=k,
                timed=1.0 if cached else a.share,
                epoch=median(e[k]),
                to_end=ratio(e[k], e['end to end']),
                to_frozen=ratio(e[k], e['frozen']),
                fill=fill if cached and fill > 1 else None,
                start=start[k] if cached else None,
                pays_after=fill / gain if cached and fill > 1 and gain > 0 else None,
            )
        filled, filling = largest_difference(a, tmp)
        print(
            f'\nkept maps against images, the same seed, no augmentation, float32: largest relative '
            f'difference of any recorded number {filled:.1e}; if the cache is filled by this very training '
            f'{filling:.1e}'
        )
    write(
        a,
        dict(cache=t),
        difference=filled,
        difference_filling=filling,
        images=dict(train=n_images(train), valid=n_images(valid)),
    )


if __name__ == '__main__':
    main()
