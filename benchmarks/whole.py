"""The whole job: where the time of `cmus demo` goes, beside its limits, and against another version.

The first table is one run of the demo in this process. A part is timed by its function. The limit
of encoding is the longer of two times: decoding all images in threads, and the bare loop of the engine over
as many batches. Parts run one after the other, except that modules are imported while processes simulate.

With --other FOLDER, a checkout of another version, both demos are run as processes of their own, in turns.
The network is CMUS-Net alone, as in the first version.

    python benchmarks/whole.py --other ../earlier --json cmus_fastai/results/whole.json
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from unittest import mock
import torch
from common import Table, arguments, machine, median, write
from engine import bare_loop
from cmus_fastai import cli
from cmus_fastai.data import phantom
from cmus_fastai.data.cohort import Cohort, images_of
from cmus_fastai.data.settings import image_settings, read_square
from cmus_fastai.evaluation import holdout
from cmus_fastai.models.encoder import Encoder
from cmus_fastai.training.engine import BATCH, OpenVINOEngine
from cmus_fastai.training.features import FeatureCache, read_ahead

PARTS = dict(
    part=('part', '<12'), seconds=('seconds', '>9.1f'), limit=('limit', '>9.1f'), share=('of all', '>8.0%')
)
VERSIONS = dict(version=('version', '<10'), seconds=('seconds', '>9.1f'), ratio=('to other', '>9.2f'))
COLUMNS = dict(parts=PARTS, versions=VERSIONS)
TIMED = dict(  # part → the function that does it
    simulate=(phantom, 'make_phantom'),
    read=(holdout, 'read_holdout'),
    encode=(FeatureCache, 'fill'),
    train=(holdout, 'train_model'),
    baseline=(holdout, 'baseline_predictions'),
    predict=(holdout, 'predict_outputs'),
    report=(holdout, 'write_experiment'),
)
SAME_NETWORK = ['--preset', 'small', '--compare', 'None']
OLD = 'import sys; from cmus_fastai.cli import cmus_demo; cmus_demo()'
NEW = 'import sys; from cmus_fastai.cli import main; sys.exit(main(["demo", *sys.argv[1:]]))'


class Clock:
    "Seconds of each part, without the parts inside it."

    def __init__(self):
        self.seconds = defaultdict(float)
        self.inside = []  # seconds of the parts inside each part that runs now

    def timed(self, part, function):
        "The function, timed."

        @wraps(function)
        def run(*args, **kwargs):
            start = time.perf_counter()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[part] += spent - self.inside.pop()
                if self.inside:
                    self.inside[-1] += spent

        return run


def run_parts(args, folder):
    "Run the demo in this process; returns the seconds of each part and of all."
    clock = Clock()
    with mock.patch.multiple(cli, keep_freed_memory=cli.keep_freed_memory):
        patches = [
            mock.patch.object(o, n, clock.timed(part, getattr(o, n))) for part, (o, n) in TIMED.items()
        ]
        for patch in patches:
            patch.start()
        start = time.perf_counter()
        cli.main(
            [
                'demo',
                '--out',
                str(folder),
                '--patients',
                str(args.patients),
                '--size',
                str(args.size),
                '--no-progress',
                *SAME_NETWORK,
            ]
        )
        whole = time.perf_counter() - start
        for patch in patches:
            patch.stop()
    return clock.seconds, whole


def encoding_limit(args, folder):
    "Seconds to decode all images once, and of the engine's bare loop over all views."
    cohort = Cohort.read(folder / 'phantom', check='fast', progress=False)
    paths = [path for row in cohort for path in images_of(row)]
    settings = image_settings(args.size)['OM']
    start = time.perf_counter()
    for _ in read_ahead(lambda path: read_square(path, settings), paths, torch.get_num_threads()):
        pass
    decode = time.perf_counter() - start
    n_views = len(paths) + sum(len(images_of(row)) for row in cohort.split(1 / 3)[0])
    engine = OpenVINOEngine(Encoder('tf_efficientnet_lite0').eval(), args.size)
    loop = bare_loop(engine, torch.rand(BATCH * 16, 3, args.size, args.size))
    loop()
    start = time.perf_counter()
    loop()
    return decode, (time.perf_counter() - start) / (BATCH * 16) * n_views


def demo_seconds(checkout, script, options):
    "Wall time of the demo of a checkout, with the import."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-W', 'ignore', '-c', script, '--out', f'{folder}/demo', *options]
        start = time.perf_counter()
        env = {**os.environ, 'PYTHONPATH': str(checkout)}
        subprocess.run(command, check=True, capture_output=True, cwd=checkout, env=env)
        return time.perf_counter() - start


def commit_of(checkout) -> str:
    "The commit of a checkout; its folder is nobody's business."
    command = ['git', '-C', checkout, 'rev-parse', '--short', 'HEAD']
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def compare_versions(args, table):
    "The demos of two versions, in turns."
    here, other = Path(__file__).parents[1], Path(args.other).resolve()
    is_old = 'cmus_demo' in (other / 'cmus_fastai' / 'cli.py').read_text()
    ways = {'other': (other, OLD if is_old else NEW, '--no_progress' if is_old else '--no-progress')}
    ways['this'] = (here, NEW, '--no-progress', *SAME_NETWORK)
    times = defaultdict(list)
    for _ in range(args.repeats):
        for name, (checkout, script, *options) in ways.items():
            times[name].append(demo_seconds(checkout, script, options))
    reference = median(times['other'])
    for name, seconds in times.items():
        table.add(version=name, seconds=median(seconds), ratio=median(seconds) / reference)


def main():
    args = arguments(
        __doc__,
        repeats=3,
        patients=(225, 'simulated patients'),
        size=(224, 'side of the images, px'),
        other=('', 'checkout of another version'),
    )
    print(machine())
    parts = Table('cmus demo: seconds of each part in one run, modules imported before', PARTS)
    versions = Table(f'cmus demo: wall time with import, medians of {args.repeats}', VERSIONS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / 'demo'
        seconds, whole = run_parts(args, folder)
        decode, loop = encoding_limit(args, folder)
        limits = dict(encode=max(decode, loop))
        for part in TIMED:
            parts.add(part=part, seconds=seconds[part], limit=limits.get(part), share=seconds[part] / whole)
        parts.add(
            part='other', seconds=whole - sum(seconds.values()), share=1 - sum(seconds.values()) / whole
        )
        parts.add(part='all', seconds=whole, share=1.0)
    print(f'decoding alone {decode:.1f} s, bare loop of the engine {loop:.1f} s')
    if args.other:
        compare_versions(args, versions)
        args.other = commit_of(args.other)
    write(args, dict(parts=parts, versions=versions), decode=decode, bare_loop=loop)


if __name__ == '__main__':
    main()
