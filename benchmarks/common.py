"What the benchmarks share: machine, timing in turns, tables, JSON, memory, floating-point operations."

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

warnings.filterwarnings('ignore', message='.*torch.jit.script.*', category=FutureWarning)


def arguments(doc, repeats=5, **options):
    "Parse the command line. An option is name → (default, help), or name → arguments of `add_argument`."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def new(name, default, help, **kwargs):
        text = f'{help} (default: {default})' if help else None
        p.add_argument(f'--{name}', default=default, help=text, **kwargs)

    for k, v in options.items():
        if isinstance(v, dict):
            p.add_argument(f'--{k}', **v)
        else:
            new(k, *v, type=type(v[0]))
    new('device', 'cpu', 'cpu or cuda')
    new('repeats', repeats, 'of each measurement; printed are medians', type=int)
    p.add_argument('--json', metavar='FILE', help='write the tables there too')
    p.add_argument('--child', help=argparse.SUPPRESS)
    a = p.parse_args()
    return Namespace(**json.loads(a.child), child=True) if a.child else a


# what several scripts ask alike
BACKBONE = dict(
    backbone=('tf_efficientnet_lite0', 'timm backbone'),
    size=(224, 'side of the images, px'),
    proj=(256, "channels after the head's projection, as in the small preset; 0: none, as published"),
)
PRECISION = dict(
    precision=dict(
        choices=('fp32', 'bf16'), default='fp32', help='bf16: autocast, for every way alike (default: fp32)'
    )
)
PEAK = dict(
    peak_tflops=(
        0.0,
        "the device's peak in TFLOP/s at this precision, e.g. 989 for bf16 on an H100; with it, the share of "
        "that peak is shown",
    )
)


def network(a, backbone=None, weights=None, **kw):
    "A CMUSNet for three classes as the arguments ask for; windowed transformers are told the size."
    from cmus_fastai.models.cmusnet import CMUSNet

    backbone = backbone or a.backbone
    if a.size != 224 and backbone.startswith(('swin', 'vit')):
        kw['encoder_kw'] = dict(img_size=a.size)
    return CMUSNet(3, backbone, weights, **(dict(proj=a.proj) if a.proj else {}), **kw).to(a.device)


def batch(sizes, size, device='cpu'):
    "Random images, one patient per bag size: OM, IM, padded bags with their mask, and labels."
    B, N = len(sizes), max(sizes)
    mask = torch.arange(N)[None] < torch.tensor(sizes)[:, None]

    def new(*shape):
        return torch.rand(*shape, 3, size, size, device=device)

    return new(B), new(B), (new(B, N), mask.to(device)), torch.arange(B, device=device) % 3


def autocast(a):
    return torch.autocast(a.device, torch.bfloat16, enabled=a.precision == 'bf16')


def has_bf16(device):
    return (
        torch.cuda.is_bf16_supported() if device == 'cuda' else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


# --- the machine


def machine(device='cpu'):
    "Processor, cores, threads and versions; with CUDA also the card."
    info = Path('/proc/cpuinfo')
    cpu = (
        next(
            (l.split(':')[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')), ''
        )
        if info.exists()
        else ''
    )
    card = f', {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}' if device == 'cuda' else ''
    cores = f'{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}'
    versions = f'Python {platform.python_version()}, torch {torch.__version__}'
    return f'{cpu or platform.processor()}, {cores}, {versions}{card}'


def peak_mib(device='cpu'):
    "Peak memory of this process, MiB; with CUDA that of its tensors on the card."
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path('/proc/self/status')
    # getrusage would count the parent's memory at the moment of the fork as the child's own
    if status.exists():
        return int(re.search(r'VmHWM:\s*(\d+)', status.read_text())[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def fresh(script, a, **more):
    "What `script` answers as a child: a process of its own, with the same arguments and `more`."
    spec = {k: v for k, v in vars(a).items() if k not in ('json', 'child')} | more
    p = subprocess.run([sys.executable, script, '--child', json.dumps(spec)], capture_output=True, text=True)
    if p.returncode:
        raise RuntimeError(f'a child of {Path(script).name} failed with {more}:\n{p.stderr[-3000:]}')
    return json.loads(p.stdout.splitlines()[-1])


def answer(value):
    print(json.dumps(value), flush=True)


# --- timing


def seconds(f, device='cpu'):
    sync = torch.cuda.synchronize if device == 'cuda' else (lambda: None)
    sync()
    start = time.perf_counter()
    f()
    sync()
    return time.perf_counter() - start


def interleaved(ways, repeats, device='cpu', warm=True):
    "Seconds of each way. They take turns, so that a noisy machine affects them alike."
    out = {k: [] for k in ways}
    for f in ways.values() if warm else ():
        f()
    for r in range(repeats):
        for k in list(ways)[:: 1 if r % 2 == 0 else -1]:
            out[k].append(seconds(ways[k], device))
    return out


median = statistics.median


def ratio(a, b):
    "Median of the ratios, repeat by repeat"
    return median(x / y for x, y in zip(a, b))


def flops(f):
    "Floating-point operations of `f()`; a multiplication and an addition count as two."
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def step(f, net, train=True):
    "Forward and backward, or forward alone."
    if train:
        f().backward()
        net.zero_grad(set_to_none=True)
    else:
        with torch.inference_mode():
            f()


# --- tables


class Table:
    "A table that is printed row by row and kept for JSON."

    def __init__(self, title, columns, hide=()):  # columns: key → (heading, format such as '>8.2f')
        self.title, self.columns, self.rows = title, columns, []
        self.shown = {k: v for k, v in columns.items() if k not in hide}

    def _line(self, cells):
        return ' '.join(
            f'{c:{re.match("[<>][0-9]+", fmt)[0]}}' for c, (_, fmt) in zip(cells, self.shown.values())
        ).rstrip()

    def add(self, **row):
        unknown = set(row) - set(self.columns)
        if unknown:
            raise KeyError(f'{self.title}: no such columns: {unknown}')
        if not self.rows:
            print(f'\n{self.title}\n' + self._line([h for h, _ in self.shown.values()]))
        self.rows.append({k: row.get(k) for k in self.columns})
        print(
            self._line(
                ['-' if row.get(k) is None else f'{row[k]:{fmt}}' for k, (_, fmt) in self.shown.items()]
            ),
            flush=True,
        )

    def json(self):
        return dict(title=self.title, columns={k: h for k, (h, _) in self.columns.items()}, rows=self.rows)


def write(a, tables, **more):
    "The tables (name → `Table`) as JSON, with arguments and machine, if a file was asked for."
    if not a.json:
        return
    args = {k: v for k, v in vars(a).items() if k not in ('json', 'child')}
    Path(a.json).parent.mkdir(parents=True, exist_ok=True)
    Path(a.json).write_text(
        json.dumps(
            dict(
                arguments=args,
                machine=machine(a.device),
                tables={k: t.json() for k, t in tables.items()},
                **more,
            ),
            indent=1,
        )
        + '\n',
        encoding='utf-8',
    )
