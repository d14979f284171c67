#!/usr/bin/env python3
"""Commands that need nothing but Python 3.10 or newer:

    python3 run.py demo [options of cmus_demo]    simulate biopsies, train, evaluate, write report.html
    python3 run.py test [notebooks]               run every notebook, and check that notebooks and library agree
    python3 run.py explore MODEL FOLDER           read cases in the browser, with a model that demo wrote

Each first makes, or brings up to date, the virtual environment it needs: `.venv` here, or the folder named in CMUS_VENV.
"""

import hashlib, importlib.util, json, os, subprocess, sys, urllib.request, venv
from pathlib import Path

root = Path(__file__).resolve().parent
env = Path(os.environ.get('CMUS_VENV') or root / '.venv').expanduser().absolute()
bin_dir = env / ('Scripts' if os.name == 'nt' else 'bin')
python = bin_dir / ('python.exe' if os.name == 'nt' else 'python')
stamp = env / 'cmus_fastai.json'  # what is installed; written last, so an interrupted install leaves none
extras = {'demo': {'weights'}, 'test': {'weights', 'dev'}, 'explore': {'weights', 'app'}}
no_pip = """This Python comes without ensurepip, so it cannot put pip into a new environment, and fetching pip failed: {error}
Do one of these, then run the command again:
  - Debian, Ubuntu:      sudo apt install python3-venv
  - without root rights: use a Python from python.org, conda, pyenv or uv
  - or make a virtual environment with pip yourself and name its folder in CMUS_VENV"""
bad_torch = """torch and torchvision were installed but do not load together (see the error above).
Delete {env} and run the command again; if it stays, a package index or a pip setting on this
machine hands out builds that do not belong together."""


def run(*cmd, **kwargs):
    "Run `cmd` to its end and return its exit code."
    return subprocess.run([str(c) for c in cmd], **kwargs).returncode


def has_pip():
    "Is there a working environment with pip?"
    return (
        python.exists()
        and run(python, '-m', 'pip', '--version', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    )


def make_env():
    "Make a virtual environment with pip; never touch a folder that is something else."
    if env.exists() and any(env.iterdir()) and not (env / 'pyvenv.cfg').exists():
        sys.exit(f'{env} is not empty and not a virtual environment; name another folder in CMUS_VENV.')
    print(f'Making a virtual environment in {env}', flush=True)
    bundled = importlib.util.find_spec('ensurepip') is not None
    # an environment whose Python is gone is made anew; one that only lacks pip keeps what it has
    venv.create(env, clear=not python.exists(), symlinks=os.name != 'nt', with_pip=bundled)
    if bundled:
        return
    # Debian and Ubuntu ship Python without ensurepip; PyPA's own script brings pip without root rights
    try:
        urllib.request.urlretrieve('https://bootstrap.pypa.io/get-pip.py', env / 'get-pip.py')
    except OSError as error:
        sys.exit(no_pip.format(error=error))
    if run(python, env / 'get-pip.py'):
        sys.exit('pip could not be installed; its messages are above.')


def fingerprint():
    "Changes when the requirements, this checkout's place or the Python do."
    parts = [(root / f).read_bytes() for f in ('settings.ini', 'setup.py', 'pyproject.toml')]
    return hashlib.sha256(b'\0'.join([*parts, str(root).encode(), sys.version.encode()])).hexdigest()


def ensure_env(wanted):
    "Bring the environment to `wanted` extras; what it already had stays and is brought up to date too."
    try:
        have = json.loads(stamp.read_text())
    except (OSError, ValueError):
        have = {'fingerprint': None, 'extras': []}
    if python.exists() and have['fingerprint'] == fingerprint() and wanted <= set(have['extras']):
        return
    if not has_pip():
        make_env()
    stamp.unlink(missing_ok=True)
    wanted = sorted(wanted | set(have['extras']))
    target = f'{root}[{",".join(wanted)}]'
    print(f'Installing {target}: a few minutes and about 6 GB the first time', flush=True)
    # uv is several times faster than pip; where it has no build or cannot reach the index, pip does the same
    uv = (
        run(python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', 'uv') == 0
        and run(
            python,
            '-m',
            'uv',
            'pip',
            'install',
            '--python',
            python,
            '--compile-bytecode',
            '-e',
            target,
            env={'UV_SYSTEM_CERTS': '1', **os.environ},
        )
        == 0
    )  # like pip, trust the certificates that this machine trusts
    if not uv and run(python, '-m', 'pip', 'install', '-e', target):
        sys.exit('The installation failed; the messages are above.')
    if run(python, '-c', 'import torchvision'):
        sys.exit(bad_torch.format(env=env))
    stamp.write_text(json.dumps({'fingerprint': fingerprint(), 'extras': wanted}))


def main(args):
    if sys.version_info < (3, 10):
        sys.exit(f'Python 3.10 or newer is needed; this is {sys.version.split()[0]}.')
    if not args or args[0] not in extras:
        sys.exit(__doc__)
    ensure_env(extras[args[0]])
    if args[0] == 'test':
        return run(python, root / 'tools' / 'test.py', *args[1:])
    return run(bin_dir / f"cmus_{args[0]}{'.exe' if os.name == 'nt' else ''}", *args[1:])


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
