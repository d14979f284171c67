"Run the notebooks as tests, and check that notebooks, library, README and sidebar agree: `python3 run.py test [notebooks]`."

import os, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells

root = Path(__file__).resolve().parent.parent
cfg = get_config(root)
scripts = Path(
    sys.executable
).parent  # where nbdev's commands are, whether or not the environment is activated
limit = 900  # seconds for one notebook; they are written to take well under a minute
# One thread a notebook, as several run at once; children import this checkout, whatever else is installed
env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': str(root), 'PYTHONUTF8': '1'}


def call(*cmd, cwd):
    "Run `cmd`; whether it succeeded, and what it printed."
    # A file and not a pipe: a worker process left behind by a notebook would hold a pipe open for ever
    with tempfile.TemporaryFile() as out:
        try:
            ok = (
                subprocess.run(
                    [str(c) for c in cmd],
                    cwd=cwd,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                ).returncode
                == 0
            )
            note = ''
        except subprocess.TimeoutExpired:
            ok, note = False, f'stopped after {limit} s\n'
        out.seek(0)
        return ok, out.read().decode(errors='replace') + note


def notebook(path):
    "Run the test cells of one notebook in a process of its own."
    if not nb_test_cells(path, cfg.tst_flags.split()):
        return False, 'no cell of this notebook is run as a test'
    return call(scripts / 'nbdev-test', path, cwd=root)


def files(folder):
    "Content of every file under `folder` that belongs to the project."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob('*'))
        if p.is_file() and not {'__pycache__', '_proc'} & set(p.parts)
    }


def unchanged(*cmd, remove=()):
    "Whether `cmd`, run in a copy of the project without the files matching `remove`, leaves it as it is here."
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'nbdev.yml', 'models')
    with tempfile.TemporaryDirectory() as tmp:
        here, copy = Path(tmp) / 'here', Path(tmp) / 'copy'
        for d in (here, copy):
            for name in ('nbs', 'cmus_fastai', 'tools'):
                shutil.copytree(root / name, d / name, ignore=skip)
            for name in ('pyproject.toml', 'settings.ini', '_quarto.yml', 'README.md'):
                shutil.copy(root / name, d / name)
        for pattern in remove:
            for p in copy.glob(pattern):
                p.unlink()
        ok, out = call(*cmd, cwd=copy)
        a, b = files(here), files(copy)
    differ = [f for f in sorted({*a, *b}) if a.get(f) != b.get(f)]
    return ok and not differ, out + ''.join(f'out of step: {f}\n' for f in differ)


def exported():
    "Exporting the notebooks gives exactly the library that is here, and no module is without a notebook."
    return unchanged(scripts / 'nbdev-export', remove=['cmus_fastai/**/[!_]*.py', 'cmus_fastai/_modidx.py'])


def cleaned():
    "The notebooks are as nbdev-clean leaves them."
    return unchanged(scripts / 'nbdev-clean')


def documented():
    "Documentation pages can be made from the notebooks."
    return unchanged(sys.executable, 'tools/pages.py')


def readme():
    "README.md and its pictures are made from nbs/index.ipynb."
    return unchanged(sys.executable, 'tools/readme.py')


def sidebar():
    "The documentation's sidebar names every notebook, and nothing else."

    def pages(items):
        for o in items:
            yield from pages(o['contents']) if 'contents' in o else [o['href']]

    listed = set(
        pages(yaml.safe_load((cfg.nbs_path / 'sidebar.yml').read_text())['website']['sidebar']['contents'])
    )
    there = {p.relative_to(cfg.nbs_path).as_posix() for p in nbglob(cfg.nbs_path, as_path=True)}
    return listed == there, ''.join(
        f'not in nbs/sidebar.yml: {p}\n' for p in sorted(there - listed)
    ) + ''.join(f'in nbs/sidebar.yml, but not in nbs/: {p}\n' for p in sorted(listed - there))


def report(name, test, *args):
    "Run one test, print its line and, if it failed or left something out, what it said; returns PASS, FAIL or SKIP."
    start = time.time()
    ok, out = test(*args)
    skipped = [
        l for l in out.splitlines() if l.startswith('SKIPPED:')
    ]  # a notebook says so on the real standard output
    word = 'FAIL' if not ok else 'SKIP' if skipped else 'PASS'
    print(
        f"{word}  {time.time() - start:5.1f} s  {name}\n{'' if ok else out}"
        + ''.join(f'{l}\n' for l in skipped if ok),
        end='',
        flush=True,
    )
    return word


def main(paths):
    nbs = [Path(p).resolve() for p in paths] or sorted(nbglob(cfg.nbs_path, as_path=True))
    if missing := [str(p) for p in nbs if not p.is_file()]:
        sys.exit(f'no such notebook: {", ".join(missing)}')
    if not nbs:
        sys.exit(f'no notebook in {cfg.nbs_path}: nothing was tested')
    checks = [] if paths else [exported, cleaned, documented, readme, sidebar]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tests = [pool.submit(report, t.__doc__, t) for t in checks] + [
            pool.submit(report, os.path.relpath(nb, root), notebook, nb) for nb in nbs
        ]
    passed, failed, skipped = ([t.result() for t in tests].count(w) for w in ('PASS', 'FAIL', 'SKIP'))
    print(f'{passed} passed, {failed} failed' + f', {skipped} skipped' * (skipped > 0))
    return failed > 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
