"""New patients: memory and time of `predict_patients` for few and for many, and an interrupted run.

A small network is trained on simulated patients. Its new patients are copies of further simulated ones, each
file with a comment of its own. One in a hundred gets a damaged file, one in a hundred only damaged files.
Each number of patients is predicted by a process of its own, whose peak memory is measured. The largest
run is killed three times and resumed, and its table is compared with that of the uninterrupted run.

    python benchmarks/predict.py --json cmus_fastai/results/predict.json
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from common import Table, answer, arguments, fresh, machine, peak_mib, write
from cmus_fastai.data.phantom import make_phantom
from cmus_fastai.evaluation.holdout import Experiment, read_holdout, run_holdout, write_experiment
from cmus_fastai.evaluation.predict import predict_patients
from cmus_fastai.training.config import ComputeConfig, TrainConfig

COLUMNS = dict(
    patients=('patients', '>8'),
    seconds=('seconds', '>9.1f'),
    memory=('peak MiB', '>9.0f'),
    ratio=('to first', '>9.2f'),
    errors=('errors', '>7'),
    left_out=('images left out', '>16'),
)
QUIET = ComputeConfig(progress=False)


def make_model(folder, size):
    "Train a small network and save it."
    make_phantom(folder / 'biopsies', 60, seed=1, size=size, bag=(1, 2), progress=False)
    cohorts = read_holdout(folder / 'biopsies')
    config = TrainConfig(size=size, views=1, epochs=5)
    result = run_holdout(cohorts.train, cohorts.test, config, QUIET)
    (folder / 'results').mkdir()
    write_experiment(folder / 'results', Experiment('small', cohorts, config, result, simulated=True))


def make_patients(folder, n, size):
    "Copies of 50 simulated patients under new names; some are damaged."
    make_phantom(folder / 'originals', 50, seed=2, size=size, bag=(1, 2), progress=False)
    originals = sorted((folder / 'originals').glob('*/P*'))
    for i in range(n):
        source, target = originals[i % len(originals)], folder / 'new' / f'N{i:05d}'
        target.mkdir(parents=True)
        for file in source.iterdir():
            content = file.read_bytes() + f'copy {i}'.encode()
            is_damaged = i % 100 == 99 or (i % 100 == 49 and file.name.startswith('TEM'))
            (target / file.name).write_bytes(b'damaged' if is_damaged else content)


def first_patients(folder, n):
    "A folder with links to the first n patients."
    part = folder / f'new_{n}'
    part.mkdir(exist_ok=True)
    for patient in sorted((folder / 'new').iterdir())[:n]:
        (part / patient.name).symlink_to(patient)
    return part


def child(args):
    "Predict, and answer with time, memory and counts."
    start = time.perf_counter()
    out = Path(args.folder) / f'{args.n}.csv'
    run = predict_patients(
        Path(args.folder) / 'results' / 'model', args.source, out, QUIET, layout='patient'
    )
    left_out = int(run.table.warnings.str.contains('left out', na=False).sum())
    seconds = time.perf_counter() - start
    answer(
        dict(
            patients=len(run.table),
            seconds=seconds,
            memory=peak_mib(),
            errors=len(run.errors),
            left_out=left_out,
        )
    )


def kill_and_resume(folder, source, seconds):
    "Kill the command three times, resume it, and compare the bytes."
    out = folder / 'killed.csv'
    command = [sys.executable, '-m', 'cmus_fastai.cli', 'predict', folder / 'results' / 'model', source]
    command = [*map(str, command), '-o', str(out), '--layout', 'patient', '--no-progress']
    for share in (0.3, 0.5, 0.4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(share * seconds + 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout.splitlines()[:2], 'exit code', done.returncode)
    return out.read_bytes()


def main():
    args = arguments(
        __doc__,
        patients=dict(
            nargs='+', type=int, default=[200, 2000], help='numbers of patients (default: 200 2000)'
        ),
        size=(64, 'side of the images, px'),
    )
    if hasattr(args, 'source'):
        child(args)
        return
    print(machine())
    table = Table('predict_patients, one process for each number', COLUMNS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder, args.size)
        make_patients(folder, max(args.patients), args.size)
        first = None
        for n in args.patients:
            source = first_patients(folder, n)
            row = fresh(__file__, args, folder=str(folder), source=str(source), n=n)
            first = first or row['memory']
            table.add(**row, ratio=row['memory'] / first)
        resumed = kill_and_resume(folder, source, row['seconds'])
        same = resumed == (folder / f'{n}.csv').read_bytes()
        print('killed three times and resumed: the same bytes' if same else 'THE RESUMED TABLE DIFFERS')
        shutil.rmtree(folder / 'new')
    write(args, dict(predict=table), same_bytes=same)


if __name__ == '__main__':
    main()
