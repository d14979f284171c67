"What the benchmarks share: command line, machine, timing in turns, memory, operations, tables and JSON."

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

# --- command line

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


def arguments(
    doc,  # Description of the script
    repeats=5,  # Default of `--repeats`
    **options,  # Name → (default, help), or name → keyword arguments of `add_argument`
) -> Namespace:
    "Parse the command line. A child process, see `fresh`, gets the arguments of its parent."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options['device'] = ('cpu', 'cpu or cuda')
    options['repeats'] = (repeats, 'of each measurement; printed are medians')
    for name, option in options.items():
        if not isinstance(option, dict):
            default, text = option
            option = dict(default=default, help=f'{text} (default: {default})', type=type(default))
        parser.add_argument(f'--{name}', **option)
    parser.add_argument('--json', metavar='FILE', help='write the tables there too')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    return Namespace(**json.loads(parsed.child), child=True) if parsed.child else parsed


def own_arguments(args) -> dict:
    "The arguments without those that concern only this process."
    return {name: value for name, value in vars(args).items() if name not in ('json', 'child')}


# --- network and input


def network(
    args,  # Command line, with `BACKBONE`
    backbone=None,  # Another backbone than the command line's
    weights=None,  # Source of its weights, see `Encoder`
    **kwargs,  # Further parameters of `CMUSNet`
):
    "A CMUSNet for three classes. Transformers with windows or positions need to know the size of the images."
    from cmus_fastai.models.cmusnet import CMUSNet

    backbone = backbone or args.backbone
    if args.size != 224 and backbone.startswith(('swin', 'vit')):
        kwargs['encoder_kw'] = dict(img_size=args.size)
    if args.proj:
        kwargs['proj'] = args.proj
    return CMUSNet(3, backbone, weights, **kwargs).to(args.device)


def batch(
    sizes,  # Number of TEM images of each patient
    size,  # Side of the images, px
    device='cpu',
) -> tuple:  # OM, IM, (padded bags, mask), labels
    "Random images."
    B, N = len(sizes), max(sizes)
    mask = torch.arange(N)[None] < torch.tensor(sizes)[:, None]
    om, im, bags = (torch.rand(*shape, 3, size, size, device=device) for shape in ((B,), (B,), (B, N)))
    return om, im, (bags, mask.to(device)), torch.arange(B, device=device) % 3


def autocast(args):
    "Autocast to bfloat16 if the command line asks for it."
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == 'bf16')


def step(forward, net, train=True):
    "Forward and backward pass, or forward pass alone."
    if train:
        forward().backward()
        net.zero_grad(set_to_none=True)
    else:
        with torch.inference_mode():
            forward()


# --- machine


def has_bf16(device) -> bool:
    "Whether the device has instructions for bfloat16."
    if device == 'cuda':
        return torch.cuda.is_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _processor() -> str:
    "Name of the processor."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return next(iter(names), '') or platform.processor()


def machine(device='cpu') -> str:
    "Processor, cores, threads and versions; with CUDA also the card."
    cores = f'{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}'
    versions = f'Python {platform.python_version()}, torch {torch.__version__}'
    card = f', {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}' if device == 'cuda' else ''
    return f'{_processor()}, {cores}, {versions}{card}'


def peak_mib(device='cpu') -> float:
    "Peak memory of this process, MiB; with CUDA that of its tensors on the card."
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path('/proc/self/status')
    # getrusage would count the parent's memory at the moment of the fork as the child's own
    if status.exists():
        return int(re.search(r'VmHWM:\s*(\d+)', status.read_text())[1]) / 2**10
    import resource

    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- measurements in a process of their own


def fresh(
    script,  # Its `__file__`
    args,  # Command line of the parent
    **more,  # Arguments for the child alone
):
    "What `script` answers as a child: a new process with the same arguments and `more`."
    spec = json.dumps(own_arguments(args) | more)
    child = subprocess.run([sys.executable, script, '--child', spec], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f'a child of {Path(script).name} failed with {more}:\n{child.stderr[-3000:]}')
    return json.loads(child.stdout.splitlines()[-1])


def answer(value):
    "Print the answer of a child, see `fresh`."
    print(json.dumps(value), flush=True)


# --- timing


def seconds(run, device='cpu') -> float:
    "Time of one call of `run`, with all work on the device."
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    ways,  # Name → function without arguments
    repeats,
    device='cpu',
    warm=True,  # Call each once before
) -> dict:  # Name → list of seconds
    "Seconds of each way. They take turns, so that a noisy machine affects them alike."
    if warm:
        for run in ways.values():
            run()
    times = {name: [] for name in ways}
    for repeat in range(repeats):
        order = list(ways) if repeat % 2 == 0 else list(reversed(ways))
        for name in order:
            times[name].append(seconds(ways[name], device))
    return times


median = statistics.median


def ratio(a, b) -> float:
    "Median of the ratios, repeat by repeat."
    return median(x / y for x, y in zip(a, b))


def flops(run) -> int:
    "Floating-point operations of `run()`; a multiplication and an addition count as two."
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --- tables


class Table:
    "A table that is printed row by row and kept for JSON."

    def __init__(
        self,
        title,
        columns,  # Key → (heading, format such as '>8.2f')
        hide=(),  # Keys of columns that are kept but not printed
    ):
        self.title = title
        self.columns = columns
        self.rows = []
        self.shown = {key: column for key, column in columns.items() if key not in hide}

    def _line(self, cells) -> str:
        "Cells in columns of the right width."
        widths = [re.match('[<>][0-9]+', form)[0] for _, form in self.shown.values()]
        return ' '.join(f'{cell:{width}}' for cell, width in zip(cells, widths)).rstrip()

    def add(self, **row):
        "Keep and print a row; values that are missing or None are printed as a dash."
        unknown = set(row) - set(self.columns)
        if unknown:
            raise KeyError(f'{self.title}: no such columns: {unknown}')
        if not self.rows:
            headings = [heading for heading, _ in self.shown.values()]
            print(f'\n{self.title}\n' + self._line(headings))
        self.rows.append({key: row.get(key) for key in self.columns})
        cells = []
        for key, (_, form) in self.shown.items():
            cells.append('-' if row.get(key) is None else f'{row[key]:{form}}')
        print(self._line(cells), flush=True)

    def json(self) -> dict:
        "The table for a JSON file."
        headings = {key: heading for key, (heading, _) in self.columns.items()}
        return dict(title=self.title, columns=headings, rows=self.rows)


def write(
    args,
    tables,  # Name → `Table`
    **more,  # Further entries of the file
):
    "Write tables, arguments and machine as JSON, if a file was asked for."
    if not args.json:
        return
    content = dict(
        arguments=own_arguments(args),
        machine=machine(args.device),
        tables={name: table.json() for name, table in tables.items()},
        **more,
    )
    file = Path(args.json)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
