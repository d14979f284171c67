"""Checks of the whole project: each returns what is wrong, one complaint per line, and nothing if all is well

`tools/test.py` runs them beside the notebooks. Every function whose name begins with `check_` is a check, and
the first line of its docstring is its name in the output.
"""
import ast
import configparser
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import packages_distributions
from pathlib import Path
import yaml
from nbdev.doclinks import nbglob

root = Path(__file__).resolve().parent.parent
library = root/'cmus_fastai'
scripts = Path(sys.executable).parent  # nbdev's commands are here
# The order of the folders: a module imports from folders above its own, and from smaller numbers in its own.
ROOMS = ['core', 'data', 'models', 'training', 'evaluation', 'explain', 'app', 'cli']
COPIED = ['nbs', 'cmus_fastai', 'tools', 'pyproject.toml', 'settings.ini', '_quarto.yml', 'README.md']
NOT_COPIED = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'nbdev.yml', 'models_', '*_files')


def output_of(*command, cwd=root, **kwargs):
    "Run a command; its exit code and what it printed."
    done = subprocess.run([str(part) for part in command], cwd=cwd, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors='replace', **kwargs)
    return done.returncode, done.stdout


# --- notebooks and what is made from them

def copy_project(target):
    "Copy what the checks below may change."
    for name in COPIED:
        if (root/name).is_dir():
            shutil.copytree(root/name, target/name, ignore=NOT_COPIED)
        else:
            shutil.copy(root/name, target/name)


def contents(folder):
    "Content of every file of the project under a folder."
    made = {'__pycache__', '_proc', '_docs'}
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob('*')) if path.is_file() and not made & set(path.parts)}


def unchanged(*command, remove=()):
    "What a command changes in a copy of the project from which the files matching `remove` were taken."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/'copy'
        copy.mkdir()
        copy_project(copy)
        before = contents(copy)
        for path in (path for pattern in remove for path in copy.glob(pattern)):
            if path.name != 'all.py':  # written by hand, as in fastai: it only imports the others
                path.unlink()
        code, printed = output_of(*command, cwd=copy, env={**os.environ, 'PYTHONPATH': str(copy)})
        after = contents(copy)
    differing = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return (printed if code else '') + ''.join(f'out of step: {name}\n' for name in differing)


def check_export():
    "Exporting the notebooks gives exactly the library, and no module is without a notebook."
    return unchanged(scripts/'nbdev-export', remove=['cmus_fastai/**/[!_]*.py', 'cmus_fastai/_modidx.py'])


def check_clean():
    "The notebooks are as nbdev-clean leaves them."
    return unchanged(scripts/'nbdev-clean')


def check_readme():
    "README.md and its pictures are made from nbs/index.ipynb."
    return unchanged(sys.executable, 'tools/readme.py')


def check_pages():
    "Documentation pages can be made, and each entry documents its own function."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/'copy'
        copy.mkdir()
        copy_project(copy)
        env = {**os.environ, 'PYTHONPATH': str(copy)}
        code, printed = output_of(sys.executable, 'tools/pages.py', cwd=copy, env=env)
        pages = [*(copy/'_proc').rglob('*.ipynb')]
        wrong = [page.name for page in pages if 'Show signature and docstring for' in page.read_text()]
    complaint = printed if code else ''
    if not pages:
        complaint += 'no page was made\n'
    return complaint + ''.join(f'{name} documents show_doc instead of a function\n' for name in wrong)


def check_sidebar():
    "The sidebar names every notebook in the order of its folder, and nothing else."
    def pages(items):
        for item in items:
            yield from pages(item['contents']) if 'contents' in item else [item['href']]
    sidebar = yaml.safe_load((root/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']
    listed = list(pages(sidebar))
    present = {path.relative_to(root/'nbs').as_posix() for path in nbglob(root/'nbs', as_path=True)}
    complaints = [f'not in nbs/sidebar.yml: {page}' for page in sorted(present - set(listed))]
    complaints += [f'in nbs/sidebar.yml, but not in nbs/: {page}' for page in sorted(set(listed) - present)]
    for folder in {Path(page).parent for page in listed}:
        inside = [page for page in listed if Path(page).parent == folder]
        if inside != sorted(inside):
            complaints.append(f'nbs/sidebar.yml: {folder} is not in the order of its numbers')
    return ''.join(f'{line}\n' for line in complaints)


# --- the library

def modules():
    "Every module of the library, by name."
    return {'.'.join(path.relative_to(root).with_suffix('').parts): path
            for path in sorted(library.rglob('[!_]*.py')) if '__pycache__' not in path.parts}


def place(name):
    "Where a module stands: the number of its folder, and the number of its notebook in it."
    head = modules()[name].read_text()
    notebook = re.search(r'File to edit: \S*?nbs/(\S+)\.ipynb', head)[1]
    folder, _, stem = notebook.partition('/')
    return ROOMS.index(folder), int(stem[:2])


def imports_of(path):
    "The modules and names that a file imports from this package, with the line."
    package = path.relative_to(root).with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:-node.level]) if node.level else ''
            module = '.'.join(filter(None, [base, node.module]))
            if module.startswith('cmus_fastai'):
                yield from ((module, alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith('cmus_fastai')]
            yield from ((name, '', node.lineno) for name in names)


def check_imports():
    "Modules import from folders above their own, and no private name of another module."
    known, complaints = modules(), []
    for name, path in known.items():
        if name == 'cmus_fastai.all':
            continue
        for module, imported, line in imports_of(path):
            where = f'{path.relative_to(root)}:{line}'
            if module in known and module != name and place(module) >= place(name):
                complaints.append(f'{where}: {module} stands below it')
            if imported.startswith('_') and imported != '__version__':
                complaints.append(f'{where}: {imported} is private in {module}')
    return ''.join(f'{line}\n' for line in complaints)


def check_names():
    "Every name in every __all__ is a real object, and the index knows every function and method."
    index = importlib.import_module('cmus_fastai._modidx').d['syms']
    complaints = []
    for name, path in modules().items():
        module = importlib.import_module(name)
        for public in getattr(module, '__all__', []):
            if getattr(module, public, None) is None:
                complaints.append(f'{name}.{public} is in __all__ and is nothing')
        if name != 'cmus_fastai.all':
            missing = undocumented(path, index[name], name)
            complaints += [f'{name_} is not in the index' for name_ in missing]
    return ''.join(f'{line}\n' for line in complaints)


def undocumented(path, index, name):
    "Public functions, classes and patched methods of a file that nbdev's index does not know."
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_'):
            decorators = [ast.unparse(d) for d in getattr(node, 'decorator_list', [])]
            patched = any(d.split('(')[0] == 'patch' for d in decorators)
            first = node.args.args[0].annotation if patched else None
            full = f'{name}.{ast.unparse(first)}.{node.name}' if patched else f'{name}.{node.name}'
            if full not in index and not any(d.startswith('dispatch') for d in decorators):
                yield full


BLOCK = """
import importlib, importlib.abc, sys
blocked = set(sys.argv[1].split(','))

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in blocked:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Blocker())
for name in sys.argv[2].split(','):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f'{name} cannot be imported without the packages of the extras: {error}')
"""


def optional_packages():
    "The packages of all extras, by the name of their module."
    settings = configparser.ConfigParser(delimiters=['='], comment_prefixes=['#'])
    settings.read(root/'settings.ini', encoding='utf-8')
    extras = [text for key, text in settings.defaults().items() if key.endswith('_requirements')]
    names = re.findall(r'^[\w-]+', '\n'.join(extras), re.M)
    # packages of others import hypothesis if they find it, and do not need it
    return {name.replace('-', '_') for name in names} - {'hypothesis'}


def check_optional():
    "Every module can be imported without the packages of the extras."
    blocked = ','.join(sorted(optional_packages()))
    code, printed = output_of(sys.executable, '-W', 'ignore', '-c', BLOCK, blocked, ','.join(modules()))
    return printed if code or 'cannot be imported' in printed else ''


def declared():
    "The packages in settings.ini, with and without the extras, as they name themselves."
    settings = configparser.ConfigParser(delimiters=['='], comment_prefixes=['#'])
    settings.read(root/'settings.ini', encoding='utf-8')
    lines = [settings['DEFAULT'][key] for key in settings.defaults() if key.endswith('requirements')]
    return {name.lower().replace('_', '-') for text in lines for name in re.findall(r'^[\w-]+', text, re.M)}


def check_declared():
    "Every package that the library imports is declared in settings.ini."
    owners, known = packages_distributions(), declared()
    complaints = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split('.')[0] for name in names} - sys.stdlib_module_names - {'cmus_fastai'}:
                found = {owner.lower().replace('_', '-') for owner in owners.get(name, [name])}
                if not found & known:
                    complaints.append(f'{path.relative_to(root)}:{node.lineno}: {name} is not declared\n')
    return ''.join(complaints)


# --- behaviour

def check_hostile():
    "Of 120 hostile inputs, none is lost, hangs, ends in a traceback or runs code."
    code, printed = output_of(sys.executable, root/'tools'/'fuzz.py', '--inputs', 120, '--seconds', 60)
    return printed if code else ''


# --- style

def check_style():
    "ruff finds nothing in notebooks, tools and benchmarks."
    checked = ('nbs', 'tools', 'benchmarks', 'run.py', 'setup.py')
    code, printed = output_of(scripts/'ruff', 'check', '--no-cache', *checked)
    return printed if code else ''


def check_columns():
    "No exported line is longer than 110 columns; URLs and the __all__ that nbdev writes apart."
    complaints = []
    for path in modules().values():
        written = re.sub(r'^__all__ = \[.*?\]$', '', path.read_text(), count=1, flags=re.M | re.S)
        long = [line for line in written.splitlines() if len(line) > 110 and 'http' not in line]
        where = path.relative_to(root)
        complaints += [f"{where}: {line[:60]} …\n" for line in long if not line.startswith("# %% ")]
    return ''.join(complaints)


def check_types():
    "mypy finds nothing in the library."
    with contextlib.suppress(FileNotFoundError), tempfile.TemporaryDirectory() as cache:
        code, printed = output_of(scripts/'mypy', '--cache-dir', cache, '-p', 'cmus_fastai')
        return printed if code else ''
    return 'mypy is not installed\n'


def check_outputs():
    "The outputs of every notebook take less than 300 kB."
    complaints = []
    for path in nbglob(root/'nbs', as_path=True):
        cells = json.loads(path.read_text())['cells']
        size = sum(len(json.dumps(cell.get('outputs', []))) for cell in cells)
        if size > 300_000:
            complaints.append(f'{path.relative_to(root)}: {size/1000:.0f} kB\n')
    return ''.join(complaints)


def check_machine():
    "No notebook and no result holds a path of the machine that made it."
    pattern = re.compile(r'(?<![\w.])/(?:root|home|work|tmp|Users)/[\w.]+')
    texts = {}
    for path in nbglob(root/'nbs', as_path=True):
        for cell in json.loads(path.read_text())['cells']:
            place = f'{path.relative_to(root)}, cell {cell.get("id")}'
            texts[place] = json.dumps(cell.get('outputs', [])) + ''.join(cell['source'])
    for path in sorted((root/'cmus_fastai'/'results').iterdir()):
        texts[path.relative_to(root)] = path.read_text()
    found = {place: pattern.search(text) for place, text in texts.items()}
    return ''.join(f'{place}: {match[0]}\n' for place, match in found.items() if match)


all_checks = [value for name, value in list(globals().items()) if name.startswith('check_')]
