"""An epoch end to end, with frozen encoders, and with frozen encoders whose feature maps are kept.

Simulated patients, a fifth of them for validation, through `cohort.dataloaders` and `cmus_learner`. An epoch
includes its validation:
  end to end  all encoders are trained
  frozen      `learn.freeze()`: the encoders encode every image in every epoch, but have no backward pass
  disk        frozen, `cache=FeatureCache(folder)`: maps are read from files
  disk, 16    the same with sixteen patients in a batch of maps, as `cmus demo` and `cmus train` use
  memory      frozen, `cache=FeatureCache()`: maps are in memory
The first two are timed on a share of the epoch's images (--share; column "timed") and scaled; the first
batch, which waits for the workers, is not scaled. "fill" is the time to encode every image once, "start"
the time of every later call of fit before its first epoch (fingerprints, look-ups), and "pays after" the
number of epochs after which filling and cached epochs together are faster than frozen epochs on images.
At the end the benchmark measures whether kept maps change any number: images without augmentation, one view,
float32, the same seed, three epochs on a small cohort, and the largest relative difference of any recorded
number.

    python benchmarks/cache.py --json cmus_fastai/results/cache.json
"""

import tempfile
import time
from pathlib import Path
from common import BACKBONE, Table, arguments, machine, median, ratio, write
import torch
from fastai.callback.all import Callback
from fastai.callback.core import CancelTrainException, CancelValidException
from cmus_fastai.core import MODALITIES
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.phantom import make_phantom
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.training.learner import cmus_learner


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
    "Number of images of a cohort."
    return int(sum(cohort.df[modality].map(len).sum() for modality in MODALITIES))


class PartialEpoch(Callback):
    "End training and validation after a share of their images, and estimate the seconds of a whole epoch."

    order = 90

    def __init__(self, share=1.0):
        self.share = share

    def before_epoch(self):
        self.seconds = 0.0

    def now(self):
        if torch.device(self.dls.device).type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self):
        self.marks = [(self.now(), 0)]  # time, images so far
        self.total = n_images(self.learn.cohorts[not self.training])

    def after_batch(self):
        n_so_far = self.marks[-1][1] + sum(int(mask.sum()) for _, mask, *_ in self.xb)
        self.marks.append((self.now(), n_so_far))
        if self.share < 1 and n_so_far >= self.share * self.total:
            raise CancelTrainException if self.training else CancelValidException

    def end(self):
        self.seconds += self.now() - self.marks[0][0] if self.share == 1 else self.scaled()

    def scaled(self):
        "Seconds for all images; the first batch waits for the workers to start, once."
        (start, _), (first, n_first), (last, n_last) = self.marks[0], self.marks[1], self.marks[-1]
        if n_last == n_first:
            return (last - start) * self.total / n_last
        return first - start + (last - first) * (self.total - n_first) / (n_last - n_first)

    before_train, before_validate, after_train, after_validate = start, start, end, end


def new_learner(a, train, valid, cache, frozen=True, model=None, share=1.0, **kwargs):
    "A Learner as the arguments say."
    dls = train.dataloaders(
        valid=valid,
        size=a.size,
        bs=a.bs,
        cache=cache,
        device=torch.device(a.device),
        num_workers=None if a.num_workers < 0 else a.num_workers,
        **kwargs,
    )
    weights = None if a.weights == 'none' else a.weights
    learn = cmus_learner(dls, a.backbone, weights, model=model, seed=0, cbs=PartialEpoch(share))
    learn.cohorts = dls.cohorts
    if frozen:
        learn.freeze()
    return learn


def timed_epoch(learn):
    "Seconds of an epoch, and of `fit` before and after it."
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    epoch = learn.partial_epoch.seconds
    return epoch, time.perf_counter() - start - epoch


def interleaved_epochs(learners, repeats):
    "Epochs and starts of each way, in seconds; the ways take turns, forwards and backwards."
    epochs = {way: [] for way in learners}
    starts = {way: [] for way in learners}
    for repeat in range(repeats):
        for way in list(learners)[:: 1 if repeat % 2 == 0 else -1]:
            epoch, start = timed_epoch(learners[way])
            epochs[way].append(epoch)
            starts[way].append(start)
    return epochs, {way: median(seconds) for way, seconds in starts.items()}


def new_caches(a, folder):
    "The caches to compare; the two on disk share a folder, which the first one fills."
    return {
        'disk': FeatureCache(folder, a.views, progress=False),
        'disk, 16': FeatureCache(folder, a.views, bs=16, progress=False),
        'memory': FeatureCache(None, a.views, progress=False),
    }


def new_learners(a, train, valid, caches):
    "A Learner for each way; those with frozen encoders share one network."
    end_to_end = new_learner(a, train, valid, None, frozen=False, share=a.share)
    frozen = new_learner(a, train, valid, None, share=a.share)
    learners = {'end to end': end_to_end, 'frozen': frozen}
    for way, cache in caches.items():
        learners[way] = new_learner(a, train, valid, cache, model=frozen.model)
    return learners


def measure(a, train, valid, folder):
    "The table of all ways."
    caches = new_caches(a, folder)
    learners = new_learners(a, train, valid, caches)
    first = {way: timed_epoch(learn)[1] for way, learn in learners.items()}  # warms up, and fills the caches
    epochs, starts = interleaved_epochs(learners, a.repeats)
    table = Table(title_of(a, train, valid), COLUMNS)
    for way, seconds in epochs.items():
        row = dict(
            way=way,
            timed=a.share,
            epoch=median(seconds),
            to_end=ratio(seconds, epochs['end to end']),
            to_frozen=ratio(seconds, epochs['frozen']),
        )
        if way in caches:
            gain = median(epochs['frozen']) - median(seconds)
            row.update(timed=1.0, start=starts[way], **cost_of_filling(first[way] - starts[way], gain))
        table.add(**row)
    return table


def cost_of_filling(seconds, gain):
    "Columns for the seconds to fill a cache and those that an epoch gains; none if it was full already."
    if seconds <= 1:
        return {}
    return dict(fill=seconds, pays_after=seconds / gain if gain > 0 else None)


def title_of(a, train, valid):
    "The title of the table."
    patients = (
        f'{len(train)} patients to train on ({n_images(train)} images), '
        f'{len(valid)} to validate ({n_images(valid)} images)'
    )
    settings = f'{a.backbone}, {a.size} px, batches of {a.bs}, {a.device}'
    return f'one epoch: {patients}, {settings}; medians of {a.repeats}'


def recorded(a, train, valid, cache):
    "All numbers that three epochs without augmentation record."
    learn = new_learner(a, train, valid, cache, augment=False)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
    return torch.tensor(learn.history().drop(columns='epoch').to_numpy(float))


def largest_differences(a, folder):
    "Largest relative difference of recorded numbers from images: with a filled cache, and while filling it."
    train, valid = new_cohort(a, folder / 'few', 15, seed=1)
    cache = FeatureCache(folder / 'exact', n_views=1, dtype='float32', progress=False)
    images = recorded(a, train, valid, None)
    filling = recorded(a, train, valid, cache)
    filled = recorded(a, train, valid, cache)
    return [((images - maps).abs() / images.abs().clamp(min=1e-3)).max().item() for maps in (filled, filling)]


def new_cohort(a, folder, n_patients, **kwargs):
    "Simulated patients, split into training and validation."
    make_phantom(folder, n_patients, size=a.size, progress=False, **kwargs)
    return Cohort.from_folder(folder, check='fast', progress=False).split(0.2)


def main():
    a = arguments(
        __doc__,
        3,
        **{name: BACKBONE[name] for name in ('backbone', 'size')},
        weights=('imagenet', "the encoders' weights; none: random"),
        patients=(150, 'simulated patients'),
        bs=(4, 'patients in a batch'),
        share=(0.1, 'of an epoch that is timed where the encoders run'),
        views=(2, 'kept views of each training image'),
        num_workers=(-1, 'processes that read images; -1: as many as the library finds worth starting'),
    )
    print(machine(a.device))
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        train, valid = new_cohort(a, folder / 'phantom', a.patients)
        table = measure(a, train, valid, folder / 'features')
        filled, filling = largest_differences(a, folder)
        counts = dict(train=n_images(train), valid=n_images(valid))
    print(
        '\nkept maps against images, the same seed, no augmentation, float32: largest relative difference '
        f'of any recorded number {filled:.1e}; if this training fills the cache {filling:.1e}'
    )
    write(a, dict(cache=table), difference=filled, difference_filling=filling, images=counts)


if __name__ == '__main__':
    main()
