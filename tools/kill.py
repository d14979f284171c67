"""Kill `cmus train` and `cmus cv` at random moments, resume them, and compare with uninterrupted runs.

    python tools/kill.py --kills 20 --seed 0

A small cohort is simulated. Each command runs once without interruption. Then it is started again and
again and ended at a random moment, by SIGKILL or SIGTERM in turn, until it was ended often enough. When a run
finishes it is compared with the uninterrupted one, byte by byte, and nothing half-written and no process may
be left. Then it begins anew.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = ['--size', '96', '--views', '2', '--epochs', '40', '--no-progress', '--num-workers', '1']
TABLES = dict(train=('predictions.csv', 'history.csv'), cv=('predictions.csv', 'validation.csv'))


def start(arguments, **kwargs):
    "Start a command of cmus in a process group of its own."
    command = [sys.executable, '-m', 'cmus_fastai.cli', *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **kwargs
    )


def finish(arguments):
    "Run a command to its end; returns the seconds it took."
    begin = time.time()
    process = start(arguments)
    printed = process.communicate()[0]
    if process.returncode:
        sys.exit(f'{arguments} failed:\n{printed[-2000:]}')
    return time.time() - begin


def processes_of(group):
    "The processes of a group that are still alive."
    found = []
    for entry in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = entry.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != 'Z':
            found.append(int(entry.parent.name))
    return found


def end_at(arguments, seconds, number):
    "Start a command and end its first process after some time; returns whether it was still running."
    process = start(arguments)
    try:
        printed = process.communicate(timeout=seconds)[0]
        if process.returncode:
            sys.exit(f'{arguments} failed:\n{printed[-2000:]}')
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    process.communicate()
    deadline = time.time() + 30
    while processes_of(process.pid) and time.time() < deadline:
        time.sleep(0.1)
    left = processes_of(process.pid)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
        sys.exit(f'{len(left)} processes survived the end of the command by {signal.Signals(number).name}')
    return True


def is_complete(folder):
    "Whether the results of `cmus train` were in place already when it was ended."
    marker = folder / 'cmus_fastai.json'
    return marker.is_file() and json.loads(marker.read_text()).get('complete', True)


def metrics_of(folder):
    "The metrics of a run without its times."
    metrics = json.loads((folder / 'metrics.json').read_text())
    metrics.get('settings', {}).pop('minutes', None)
    return json.dumps({name: value for name, value in metrics.items() if 'second' not in name})


def check(name, folder, whole):
    "Compare a resumed run with an uninterrupted one."
    for table in TABLES[name]:
        if (folder / table).read_bytes() != (whole / table).read_bytes():
            sys.exit(f'{name}: {table} differs from that of the uninterrupted run')
    if name == 'train' and metrics_of(folder) != metrics_of(whole):
        sys.exit(f'{name}: metrics.json differs from that of the uninterrupted run')
    hidden = [
        path for path in folder.parent.rglob('.*') if folder in path.parents or path.parent == folder.parent
    ]
    if hidden:
        sys.exit(f'{name}: left behind: {", ".join(map(str, hidden))}')


def test_command(name, root, kills, rng):
    "End a command many times; returns the number of finished runs that were compared."
    options = ['--data', root / 'biopsies', *SMALL] + (['--k', 3] if name == 'cv' else [])
    whole, folder = root / f'whole_{name}', root / f'{name}'
    seconds = finish([name, *options, '--out', whole])
    done = compared = 0
    while done < kills:
        number = (signal.SIGKILL, signal.SIGTERM)[done % 2]
        if end_at([name, *options, '--out', folder], rng.uniform(0.05, 1) * seconds, number):
            done += 1
            if not is_complete(folder):
                continue
        check(name, folder, whole)
        compared += 1
        shutil.rmtree(folder)
    finish([name, *options, '--out', folder])
    check(name, folder, whole)
    return compared + 1, seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=20, help='of each command (default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: 0)')
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        finish(['phantom', '--out', root / 'biopsies', '--patients', 24, '--size', 96, '--no-progress'])
        for name in TABLES:
            compared, seconds = test_command(name, root, args.kills, rng)
            print(
                f'cmus {name}: ended {args.kills} times ({seconds:.0f} s a run), {compared} finished runs '
                'equal to the uninterrupted one, nothing half-written, no process left',
                flush=True,
            )


if __name__ == '__main__':
    main()
