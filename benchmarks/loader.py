"""How fast images reach the network.

Images per second, for 224 px, of
  plain   PIL alone: Image.open(path).convert('RGB').resize((224, 224), BICUBIC), as most loaders do
  read    `read_image`
  copy    `read_image` on the copies that `Cohort.resized` wrote
for JPEGs of 224, 1024 and 2048 px (simulated micrographs with grain, quality 92) and grey 16-bit TIFFs of 2048 px; and of a whole pass of
the training DataLoader over the originals and over the copies, with 0 and 2 worker processes, which are started within the time.
Printed are medians and ratios. The ways take turns within each repeat, so that a noisy machine disturbs them alike. In plain PIL a 16-bit
picture has lost its grey values (all above 255 are white); its time is shown nevertheless. `diff` is the mean difference of `read` from `plain`
in grey levels (16 bit: from the whole picture turned into 8 bits, then resized).

    python benchmarks/loader.py [--images 8] [--repeats 7] [--patients 24] [--json out.json]
"""
import argparse, json, os, platform, statistics, tempfile, time
import warnings
from pathlib import Path
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
import numpy as np, torch
from PIL import Image
from cmus_fastai.bag import read_image
from cmus_fastai.cohort import Cohort
from cmus_fastai.phantom import draw_im, draw_om, draw_tem

SIZE = 224
KINDS = {'JPEG 224': (224, 'jpg'), 'JPEG 1024': (1024, 'jpg'), 'JPEG 2048': (2048, 'jpg'), 'TIFF16 2048': (2048, 'tif')}

def plain(path): return np.asarray(Image.open(path).convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC))

def read(path): return read_image(path, SIZE)

def whole(path):
    "Every pixel decoded, then resized."
    return np.asarray(Image.fromarray(read_image(path)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(float)

def pictures(n, rng):
    "Simulated micrographs, drawn at 512 px: OM, IM, and then TEM in grey."
    draw = [lambda: draw_om('LN', rng, 512), lambda: draw_im('LN', rng, 512)] + [lambda: draw_tem('LN', rng, 512)]*(n - 2)
    return [Image.fromarray(d()[0]) for d in draw[:n]]

def write(im, path, px, rng):
    "The picture at another size, with grain of its own as a camera adds it."
    a = np.asarray(im.resize((px, px), Image.Resampling.BICUBIC)).astype(np.float32)
    a += rng.normal(0, 5, a.shape[:2]).astype(np.float32)[(...,) + (None,)*(a.ndim - 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.tif': Image.fromarray(((a if a.ndim == 2 else a.mean(-1))*16).clip(0, 4095).astype(np.uint16)).save(path)
    else: Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return path

def cohort_of(images, folder, px, suffix, rng, patients=2):
    "A cohort of two classes whose patients share out the pictures: OM, IM and the others as bag."
    names = ['OM_1', 'IM_1'] + [f'TEM_{k}' for k in range(len(images) - 2)]
    for p in range(patients):
        for im, name in zip(images, names): write(im, folder/('MN', 'LN')[p % 2]/f'P{p:03}'/f'{name}.{suffix}', px, rng)
    return Cohort.from_folder(folder, check='fast')

def paths(cohort): return [p for row in cohort for p in (row.OM, row.IM, *row.TEM)]

def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start

def rates(ways, n, repeats):
    "Images per second of each way, one list each; the ways take turns."
    out = {k: [] for k in ways}
    for f in ways.values(): f()                                     # warm up
    for r in range(repeats):
        for k in (list(ways) if r % 2 == 0 else list(ways)[::-1]): out[k].append(n/seconds(ways[k]))
    return out

def over(a, b): return statistics.median(x/y for x, y in zip(a, b))

def each(f, files):
    def all_of_them():
        for p in files: f(p)
    return all_of_them

def epoch(dls):
    def run():
        for _ in dls.train: pass
    return run

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=8, help='images of a patient'); p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--patients', type=int, default=24, help='in the DataLoader pass'); p.add_argument('--px', type=int, default=1024, help='of its JPEGs'); p.add_argument('--json')
    a = p.parse_args()
    rng, rows = np.random.default_rng(0), []
    images = pictures(a.images, rng)
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    machine = f'{cpu}, {os.cpu_count()} cores, {platform.machine()}, Pillow {Image.__version__}, torch {torch.__version__}'
    print(f'{machine}; to {SIZE} px, medians of {a.repeats}, images per second')
    print(f"{'':>14}{'plain':>9}{'read':>9}{'copy':>9}{'read/plain':>12}{'copy/plain':>12}{'diff':>8}")
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for kind, (px, suffix) in KINDS.items():
            cohort = cohort_of(images, tmp/kind/'originals', px, suffix, rng)
            files, copies = paths(cohort), paths(cohort.resized(tmp/kind/'copies', SIZE, progress=False))
            diff = statistics.mean(abs(read(f) - whole(f)).mean() for f in files)
            t = rates(dict(plain=each(plain, files), read=each(read, files), copy=each(read, copies)), len(files), a.repeats)
            r = dict(what=kind, **{k: statistics.median(v) for k, v in t.items()}, read_to_plain=over(t['read'], t['plain']), copy_to_plain=over(t['copy'], t['plain']), diff=diff)
            rows.append(r)
            print(f"{kind:>14}{r['plain']:>9.0f}{r['read']:>9.0f}{r['copy']:>9.0f}{r['read_to_plain']:>12.2f}{r['copy_to_plain']:>12.2f}{diff:>8.2f}", flush=True)
        cohort = cohort_of(images, tmp/'all'/'originals', a.px, 'jpg', rng, a.patients)
        n = len(paths(cohort))
        start = time.perf_counter(); small = cohort.resized(tmp/'all'/'copies', SIZE, progress=False); made = n/(time.perf_counter() - start)
        print(f'\n{n} JPEGs of {a.px} px; writing the copies: {made:.0f} images per second\nthe training part through the DataLoader, images per second')
        loaders = {(c, w): src.dataloaders(size=SIZE, num_workers=w) for c, src in (('originals', cohort), ('copies', small)) for w in (0, 2)}
        t = rates({k: epoch(d) for k, d in loaders.items()}, len(paths(loaders['copies', 0].cohorts[0])), max(3, a.repeats//2))
        for (c, w), v in t.items():
            rows.append(dict(what=f'DataLoader, {c}, {w} workers', rate=statistics.median(v), to_first=over(v, t['originals', 0])))
            print(f"{c:>14}{w:>3} workers{rows[-1]['rate']:>9.0f}{rows[-1]['to_first']:>8.2f} of originals, 0 workers", flush=True)
    if a.json:
        with open(a.json, 'w') as f: json.dump(dict(arguments=vars(a), machine=machine, size=SIZE, rows=rows, copies_per_second=made), f, indent=1)

if __name__ == '__main__': main()
