"""How fast images reach the network.

Images per second, for 224 px, of
  plain   PIL alone: Image.open(path).convert('RGB').resize((224, 224), BICUBIC), as most loaders do
  read    `read_image`
  copy    `read_image` on the copies that `Cohort.resized` wrote
for JPEGs of 224, 1024 and 2048 px (simulated micrographs with grain, quality 92) and grey 16-bit TIFFs of
2048 px; and of a whole pass of
the training DataLoader over the originals and over the copies, with 0 and 2 worker processes, which are
started within the time.
Printed are medians and ratios. The ways take turns within each repeat, so that a noisy machine disturbs
them alike. In plain PIL a 16-bit
picture has lost its grey values (all above 255 are white); its time is shown nevertheless. `diff` is the
mean difference of `read` from the
whole picture decoded (16 bit: turned into 8 bits), then resized, in grey levels.

    python benchmarks/loader.py --json cmus_fastai/results/loader.json
"""

import tempfile
from pathlib import Path
from common import Table, arguments, interleaved, machine, median, ratio, seconds, write
import numpy as np
from PIL import Image
import cmus_fastai.data.bag  # noqa: F401 (gives a Cohort its dataloaders)
from cmus_fastai.data.images import read_image
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.phantom import draw_im, draw_om, draw_tem

SIZE = 224
KINDS = {
    'JPEG 224': (224, 'jpg'),
    'JPEG 1024': (1024, 'jpg'),
    'JPEG 2048': (2048, 'jpg'),
    'TIFF16 2048': (2048, 'tif'),
}
COLUMNS = dict(
    files=dict(
        what=('files', '<12'),
        plain=('plain', '>8.0f'),
        read=('read', '>8.0f'),
        copy=('copy', '>8.0f'),
        read_to_plain=('read/plain', '>11.2f'),
        copy_to_plain=('copy/plain', '>11.2f'),
        diff=('diff', '>7.2f'),
    ),
    loader=dict(
        source=('source', '<10'),
        workers=('workers', '>8'),
        rate=('images/s', '>9.0f'),
        to_first=('/originals, 0', '>14.2f'),
    ),
)


def plain(path):
    return np.asarray(Image.open(path).convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def read(path):
    return read_image(path, SIZE)


def whole(path):
    "Every pixel decoded, then resized."
    return np.asarray(
        Image.fromarray(read_image(path)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    ).astype(float)


def pictures(n, rng):
    "Simulated micrographs, drawn at 512 px: OM, IM, and then TEM in grey."
    draw = [lambda: draw_om('LN', rng, 512), lambda: draw_im('LN', rng, 512)] + [
        lambda: draw_tem('LN', rng, 512)
    ] * (n - 2)
    return [Image.fromarray(d()[0]) for d in draw[:n]]


def save(im, path, px, rng):
    "The picture at another size, with grain of its own as a camera adds it."
    a = np.asarray(im.resize((px, px), Image.Resampling.BICUBIC)).astype(np.float32)
    a += rng.normal(0, 5, a.shape[:2]).astype(np.float32)[(...,) + (None,) * (a.ndim - 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.tif':
        Image.fromarray(((a if a.ndim == 2 else a.mean(-1)) * 16).clip(0, 4095).astype(np.uint16)).save(path)
    else:
        Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return path


def cohort_of(images, folder, px, suffix, rng, patients=2):
    "A cohort of two classes whose patients share out the pictures: OM, IM and the others as bag."
    names = ['OM_1', 'IM_1'] + [f'TEM_{k}' for k in range(len(images) - 2)]
    for p in range(patients):
        for im, name in zip(images, names):
            save(im, folder / ('MN', 'LN')[p % 2] / f'P{p:03}' / f'{name}.{suffix}', px, rng)
    return Cohort.from_folder(folder, check='fast')


def paths(cohort):
    return [p for row in cohort for p in (row.OM, row.IM, *row.TEM)]


def each(f, files):
    def all_of_them():
        for p in files:
            f(p)

    return all_of_them


def epoch(dls):
    def run():
        for _ in dls.train:
            pass

    return run


def main():
    a = arguments(
        __doc__,
        7,
        images=(8, 'images of a patient'),
        patients=(24, 'in the DataLoader pass'),
        px=(1024, 'side of its JPEGs'),
    )
    rng = np.random.default_rng(0)
    images = pictures(a.images, rng)
    print(f'{machine(a.device)}, Pillow {Image.__version__}')
    with tempfile.TemporaryDirectory() as tmp:
        tmp, t = (
            Path(tmp),
            Table(f'to {SIZE} px, medians of {a.repeats}, images per second', COLUMNS['files']),
        )
        for kind, (px, suffix) in KINDS.items():
            cohort = cohort_of(images, tmp / kind / 'originals', px, suffix, rng)
            files, copies = paths(cohort), paths(cohort.resized(tmp / kind / 'copies', SIZE, progress=False))
            s = interleaved(
                dict(plain=each(plain, files), read=each(read, files), copy=each(read, copies)), a.repeats
            )
            t.add(
                what=kind,
                **{k: len(files) / median(v) for k, v in s.items()},
                read_to_plain=ratio(s['plain'], s['read']),
                copy_to_plain=ratio(s['plain'], s['copy']),
                diff=float(np.mean([abs(read(f) - whole(f)).mean() for f in files])),
            )
        cohort = cohort_of(images, tmp / 'all' / 'originals', a.px, 'jpg', rng, a.patients)
        small = []
        made = len(paths(cohort)) / seconds(
            lambda: small.append(cohort.resized(tmp / 'all' / 'copies', SIZE, progress=False))
        )
        print(f'\n{len(paths(cohort))} JPEGs of {a.px} px; writing the copies: {made:.0f} images per second')
        loaders = {
            (c, w): src.dataloaders(size=SIZE, num_workers=w, device=a.device)
            for c, src in (('originals', cohort), ('copies', small[0]))
            for w in (0, 2)
        }
        n, s = (
            len(paths(loaders['copies', 0].cohorts[0])),
            interleaved({k: epoch(d) for k, d in loaders.items()}, max(3, a.repeats // 2), a.device),
        )
        u = Table('the training part through the DataLoader', COLUMNS['loader'])
        for (c, w), v in s.items():
            u.add(source=c, workers=w, rate=n / median(v), to_first=ratio(s['originals', 0], v))
    write(a, dict(files=t, loader=u), copies_per_second=made, pillow=Image.__version__)


if __name__ == '__main__':
    main()
