"Run the notebooks as tests, and check the project as a whole: `python3 run.py test [notebooks or folders]`."
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells
from checks import all_checks, root, scripts

config = get_config(root)
limit = 900  # seconds for one notebook; they are written to take well under a minute
# One thread per notebook, as several run at once; children import this checkout, whatever else is installed
env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': str(root), 'PYTHONUTF8': '1'}


def call(*command):
    "Run a command; whether it succeeded, and what it printed."
    # A file and not a pipe: a worker process left behind by a notebook would hold a pipe open for ever
    with tempfile.TemporaryFile() as out:
        try:
            done = subprocess.run([str(part) for part in command], cwd=root, env=env, timeout=limit,
                                  stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
            ok, note = done.returncode == 0, ''
        except subprocess.TimeoutExpired:
            ok, note = False, f'stopped after {limit} s\n'
        out.seek(0)
        return ok, out.read().decode(errors='replace') + note


def run_notebook(path):
    "Run the test cells of one notebook in a process of its own."
    if not nb_test_cells(path, config.tst_flags.split()):
        return False, 'no cell of this notebook is run as a test\n'
    return call(scripts/'nbdev-test', path)


def run_check(check):
    "Run one check of the project."
    complaint = check()
    return not complaint, complaint


def report(name, test, argument):
    "Run one test, print its line and, if it failed or left something out, what it said; returns the word."
    start = time.time()
    ok, printed = test(argument)
    skipped = [line for line in printed.splitlines() if line.startswith('SKIPPED:')]
    word = 'FAIL' if not ok else 'SKIP' if skipped else 'PASS'
    details = printed if not ok else ''.join(f'{line}\n' for line in skipped)
    print(f"{word}  {time.time() - start:5.1f} s  {name}\n{details}", end='', flush=True)
    return word


def find_notebooks(paths):
    "The notebooks that the arguments name, or all."
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        sys.exit(f'no such notebook or folder: {", ".join(missing)}')
    named = [Path(path).resolve() for path in paths] or [config.nbs_path]
    found = [nb for path in named for nb in (sorted(nbglob(path, as_path=True)) if path.is_dir() else [path])]
    if not found:
        sys.exit('no notebook was found: nothing was tested')
    return found


def main(paths):
    "Test the notebooks, and without arguments the project; returns whether anything failed."
    notebooks = find_notebooks(paths)
    checks = [] if paths else all_checks
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tests = [pool.submit(report, check.__doc__.splitlines()[0], run_check, check) for check in checks]
        tests += [pool.submit(report, os.path.relpath(nb, root), run_notebook, nb) for nb in notebooks]
    words = [test.result() for test in tests]
    skipped = f', {words.count("SKIP")} skipped' if 'SKIP' in words else ''
    print(f'{words.count("PASS")} passed, {words.count("FAIL")} failed{skipped}')
    return 'FAIL' in words


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
