"""Print figures of style: `python tools/measure.py`

Lines over 110 columns, semicolons, lines per exported cell, time of import and help. No test depends on it.
"""
import io
import json
import re
import statistics
import subprocess
import sys
import time
import tokenize
from pathlib import Path

root = Path(__file__).resolve().parent.parent
EXPORT = re.compile(r'^#\|\s*exporti?\b', re.M)


def code_cells():
    "Source of every code cell of every notebook."
    for notebook in sorted((root/'nbs').rglob('*.ipynb')):
        for cell in json.loads(notebook.read_text())['cells']:
            if cell['cell_type'] == 'code':
                yield ''.join(cell['source'])


def count_semicolons(source):
    "Semicolons that separate or end statements."
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return 0
    return sum(token.type == tokenize.OP and token.string == ';' for token in tokens)


def cell_lines(source):
    "Lines of a cell, without blank lines and directives."
    return sum(bool(line.strip()) and not line.startswith('#|') for line in source.splitlines())


def seconds(*command):
    "The fastest of three runs of a command."
    def once():
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=root)
        return time.perf_counter() - start
    return min(once() for _ in range(3))


def main():
    "Measure and print."
    library = [path for path in (root/'cmus_fastai').rglob('*.py') if path.name != '_modidx.py']
    lines = [line for path in library for line in path.read_text().splitlines()]
    cells = list(code_cells())
    lengths = sorted(cell_lines(cell) for cell in cells if EXPORT.search(cell))
    print(f'library: {len(lines)} lines, {sum(len(line) > 110 for line in lines)} over 110 columns, '
          f'{sum(count_semicolons(path.read_text()) for path in library)} semicolons')
    code = [line for cell in cells for line in cell.splitlines()]
    print(f'notebooks: {sum(count_semicolons(cell) for cell in cells)} semicolons, '
          f'{sum(len(line) > 110 for line in code)} code lines over 110 columns')
    print(f'exported cells: {len(lengths)}, lines: median {statistics.median(lengths)}, '
          f'90 % have at most {lengths[int(.9*len(lengths))]}, longest {lengths[-1]}')
    print(f'import cmus_fastai: {seconds(sys.executable, "-c", "import cmus_fastai"):.2f} s')
    print(f'cmus --help: {seconds(sys.executable, "-m", "cmus_fastai.cli", "--help"):.2f} s')


if __name__ == '__main__':
    main()
