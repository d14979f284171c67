#!/usr/bin/env python3
"""Run a command of cmus_fastai with nothing but Python 3.10 or newer:

    python3 run.py demo                simulate biopsies, train, evaluate, write a report
    python3 run.py test [notebooks]    run the notebooks as tests, and check the project
    python3 run.py lab                 open the notebooks in JupyterLab
    python3 run.py COMMAND [options]   any other command of `cmus`: train, cv, study, explore, phantom

Each first makes, or updates, the virtual environment that it needs: `.venv` here, or the folder in CMUS_VENV.
"""
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

root = Path(__file__).resolve().parent
env = Path(os.environ.get('CMUS_VENV') or root/'.venv').expanduser().absolute()
bin_dir = env/('Scripts' if os.name == 'nt' else 'bin')
suffix = '.exe' if os.name == 'nt' else ''
python = bin_dir/f'python{suffix}'
stamp = env/'cmus_fastai.json'  # what is installed; written last, so an interrupted run leaves none
default_extras = {'weights', 'fast'}
extras = {'test': {'dev'}, 'lab': {'app', 'lab'}, 'explore': {'app'}}  # in addition
no_pip = """This Python comes without ensurepip, so it cannot put pip into a new environment, and fetching pip
failed: {error}
Do one of these, then run the command again:
  - Debian, Ubuntu:      sudo apt install python3-venv
  - without root rights: use a Python from python.org, conda, pyenv or uv
  - or make a virtual environment with pip yourself and name its folder in CMUS_VENV"""
bad_torch = """torch and torchvision were installed but do not load together (see the error above).
Delete {env} and run the command again. If the error stays, a package index or a pip setting on this
machine provides builds that do not belong together."""


def run(*command, **kwargs):
    "Run a command to its end and return its exit code."
    return subprocess.run([str(part) for part in command], **kwargs).returncode


def has_pip():
    "Whether there is a working environment with pip."
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return python.exists() and run(python, '-m', 'pip', '--version', **silent) == 0


def make_env():
    "Make a virtual environment with pip; never touch a folder that is something else."
    if env.exists() and any(env.iterdir()) and not (env/'pyvenv.cfg').exists():
        sys.exit(f'{env} is not empty and not a virtual environment. Name another folder in CMUS_VENV.')
    print(f'Making a virtual environment in {env}', flush=True)
    bundled = importlib.util.find_spec('ensurepip') is not None
    # an environment whose Python is gone is made anew; one that only lacks pip keeps what it has
    venv.create(env, clear=not python.exists(), symlinks=os.name != 'nt', with_pip=bundled)
    if not bundled:
        fetch_pip()


def fetch_pip():
    "Install pip where Python has no ensurepip, as on Debian and Ubuntu, without root rights."
    try:
        urllib.request.urlretrieve('https://bootstrap.pypa.io/get-pip.py', env/'get-pip.py')
    except OSError as error:
        sys.exit(no_pip.format(error=error))
    if run(python, env/'get-pip.py'):
        sys.exit('pip could not be installed. Its messages are above.')


def fingerprint():
    "Changes when the requirements, the place of this checkout or the Python do."
    parts = [(root/name).read_bytes() for name in ('settings.ini', 'setup.py', 'pyproject.toml')]
    return hashlib.sha256(b'\0'.join([*parts, str(root).encode(), sys.version.encode()])).hexdigest()


def installed():
    "The extras that the environment has for these requirements; none if it must be updated."
    try:
        known = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return set(), False
    return set(known['extras']), known['fingerprint'] == fingerprint()


def install(target):
    "Install the package with uv, several times faster than pip, or with pip where uv does not work."
    quiet = ('--quiet', '--disable-pip-version-check')
    uv_env = {'UV_SYSTEM_CERTS': '1', **os.environ}  # like pip, trust the certificates of this machine
    with_uv = (python, '-m', 'uv', 'pip', 'install', '--python', python, '--compile-bytecode', '-e', target)
    if run(python, '-m', 'pip', 'install', *quiet, 'uv') == 0 and run(*with_uv, env=uv_env) == 0:
        return
    if run(python, '-m', 'pip', 'install', '-e', target):
        sys.exit('The installation failed. The messages are above.')


def ensure_env(wanted):
    "Bring the environment to the wanted extras; what it already had stays and is updated too."
    have, current = installed()
    if python.exists() and current and wanted <= have:
        return
    if not has_pip():
        make_env()
    stamp.unlink(missing_ok=True)
    wanted = sorted(wanted | have)
    target = f'{root}[{",".join(wanted)}]'
    print(f'Installing {target}: a few minutes and about 6 GB the first time', flush=True)
    install(target)
    if run(python, '-c', 'import torchvision'):
        sys.exit(bad_torch.format(env=env))
    stamp.write_text(json.dumps({'fingerprint': fingerprint(), 'extras': wanted}))


def main(arguments):
    "Make the environment and run the command in it; returns its exit code."
    if sys.version_info < (3, 10):  # noqa: UP036 (an older Python reads this file too)
        sys.exit(f'Python 3.10 or newer is needed. This is {sys.version.split()[0]}.')
    if not arguments or arguments[0] in ('-h', '--help', 'help'):
        print(__doc__)
        return 0 if arguments else 2
    name, options = arguments[0], arguments[1:]
    ensure_env(default_extras | extras.get(name, set()))
    if name == 'test':
        return run(python, root/'tools'/'test.py', *options)
    if name == 'lab':
        return run(python, '-m', 'jupyterlab', root/'nbs', *options)
    return run(bin_dir/f'cmus{suffix}', *arguments)


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
