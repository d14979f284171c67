"""How fast images reach the network.

Images per second, for 224 px, of
  plain   PIL alone: Image.open(path).convert('RGB').resize((224, 224), BICUBIC), as most loaders do
  read    `read_image`
  copy    `read_image` on the copies that `Cohort.resized` wrote
for JPEGs of 224, 1024 and 2048 px (simulated micrographs with grain, quality 92) and grey 16-bit TIFFs of
2048 px. Then a whole pass of the training DataLoader over the originals and over the copies, with 0 and 2
worker processes; the time to start them is included. Printed are medians and ratios. The ways take turns
within each repeat, so that a noisy machine affects them equally. Plain PIL loses the grey values of a
16-bit image (all above 255 are white); its time is shown nevertheless. `diff` is the mean difference, in
grey levels, of `read` from the whole image decoded (16 bit: converted to 8 bits) and then resized.

    python benchmarks/loader.py --json cmus_fastai/results/loader.json
"""

import tempfile
from pathlib import Path
from common import Table, arguments, interleaved, machine, median, ratio, seconds, write
import numpy as np
from PIL import Image
import cmus_fastai.data.bag  # noqa: F401 (gives a Cohort its dataloaders)
from cmus_fastai.data.cohort import Cohort, images_of
from cmus_fastai.data.images import read_image
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


def resized(image, side=SIZE):
    "An image at another size, as an array."
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def read_plain(path):
    "Read an image with PIL alone."
    return resized(Image.open(path).convert('RGB'))


def read(path):
    "Read an image with the library."
    return read_image(path, SIZE)


def read_whole(path):
    "Decode every pixel, then resize."
    return resized(Image.fromarray(read_image(path))).astype(float)


def draw_images(n, rng):
    "Simulated micrographs, drawn at 512 px: OM, IM, and then TEM in grey."
    draw = [draw_om, draw_im, *[draw_tem] * (n - 2)]
    return [Image.fromarray(f('LN', rng, 512)[0]) for f in draw[:n]]


def save(image, path, side, rng):
    "Save an image at another size, with grain as a camera adds it."
    pixels = resized(image, side).astype(np.float32)
    grain = rng.normal(0, 5, pixels.shape[:2]).astype(np.float32)
    pixels += grain if pixels.ndim == 2 else grain[..., None]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.tif':
        grey = pixels if pixels.ndim == 2 else pixels.mean(-1)
        Image.fromarray((grey * 16).clip(0, 4095).astype(np.uint16)).save(path)
    else:
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def new_cohort(images, folder, side, suffix, rng, n_patients=2):
    "A cohort of two classes; each patient has all images: OM, IM and the others as bag."
    names = ['OM_1', 'IM_1', *(f'TEM_{k}' for k in range(len(images) - 2))]
    for p in range(n_patients):
        patient = folder / ('MN', 'LN')[p % 2] / f'P{p:03}'
        for image, name in zip(images, names):
            save(image, patient / f'{name}.{suffix}', side, rng)
    return Cohort.from_folder(folder, check='fast')


def paths(cohort):
    "All image files of a cohort."
    return [path for row in cohort for path in images_of(row)]


def for_each(f, files):
    "A function that applies `f` to every file."

    def run():
        for path in files:
            f(path)

    return run


def one_pass(dls):
    "A function that goes through the training part once."

    def run():
        for _ in dls.train:
            pass

    return run


def measure_files(a, images, folder, rng):
    "The table of reading single files."
    table = Table(f'to {SIZE} px, medians of {a.repeats}, images per second', COLUMNS['files'])
    for kind, (side, suffix) in KINDS.items():
        cohort = new_cohort(images, folder / kind / 'originals', side, suffix, rng)
        files = paths(cohort)
        copies = paths(cohort.resized(folder / kind / 'copies', SIZE, progress=False))
        ways = {
            'plain': for_each(read_plain, files),
            'read': for_each(read, files),
            'copy': for_each(read, copies),
        }
        times = interleaved(ways, a.repeats)
        differences = [abs(read(file) - read_whole(file)).mean() for file in files]
        table.add(
            what=kind,
            **{way: len(files) / median(values) for way, values in times.items()},
            read_to_plain=ratio(times['plain'], times['read']),
            copy_to_plain=ratio(times['plain'], times['copy']),
            diff=float(np.mean(differences)),
        )
    return table


def write_copies(cohort, folder):
    "The cohort of resized copies, and how many were written per second."
    made = []
    duration = seconds(lambda: made.append(cohort.resized(folder, SIZE, progress=False)))
    return made[0], len(paths(cohort)) / duration


def measure_loaders(a, originals, copies):
    "The table of whole passes of the training DataLoader."
    loaders = {}
    for source, cohort in (('originals', originals), ('copies', copies)):
        for workers in (0, 2):
            dls = cohort.dataloaders(size=SIZE, num_workers=workers, device=a.device)
            loaders[source, workers] = dls
    n = len(paths(loaders['copies', 0].cohorts[0]))
    passes = {key: one_pass(dls) for key, dls in loaders.items()}
    times = interleaved(passes, max(3, a.repeats // 2), a.device)
    table = Table('the training part through the DataLoader', COLUMNS['loader'])
    for (source, workers), values in times.items():
        to_first = ratio(times['originals', 0], values)
        table.add(source=source, workers=workers, rate=n / median(values), to_first=to_first)
    return table


def main():
    a = arguments(
        __doc__,
        7,
        images=(8, 'images of a patient'),
        patients=(24, 'in the DataLoader pass'),
        px=(1024, 'side of its JPEGs'),
    )
    rng = np.random.default_rng(0)
    images = draw_images(a.images, rng)
    print(f'{machine(a.device)}, Pillow {Image.__version__}')
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        files = measure_files(a, images, folder, rng)
        originals = new_cohort(images, folder / 'all' / 'originals', a.px, 'jpg', rng, a.patients)
        copies, rate = write_copies(originals, folder / 'all' / 'copies')
        n_files = len(paths(originals))
        print(f'\n{n_files} JPEGs of {a.px} px; writing the copies: {rate:.0f} images per second')
        loader = measure_loaders(a, originals, copies)
    write(a, dict(files=files, loader=loader), copies_per_second=rate, pillow=Image.__version__)


if __name__ == '__main__':
    main()
