"Write README.md and its pictures from nbs/index.ipynb: `python tools/readme.py`, in the development environment."

import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
images = 'nbs/images'  # the pictures that the index notebook draws are kept here as readme_*.png or .jpg


def visible(nb):
    "Drop hidden cells, hide the code of `echo: false` cells, and strip the `#|` lines that only nbdev and Quarto read."
    kept = []
    for cell in nb.cells:
        directives = set(re.findall(r'^#\|\s*(.+?)\s*$', cell.source, re.M))
        if directives & {'hide', 'include: false', 'include:false'}:
            continue
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if directives & {'hide_input', 'echo: false', 'echo:false'}:
            cell.metadata['transient'] = {'remove_source': True}
        if cell.source or cell.get('outputs'):
            kept.append(cell)
    nb.cells = kept
    nb.metadata['language_info'] = {
        'name': 'python'
    }  # nbdev-clean takes it out; it names the code blocks' language
    return nb


def write_readme():
    "Write README.md, and the pictures among the notebook's outputs."
    nb = visible(nbformat.read(root / 'nbs' / 'index.ipynb', as_version=4))
    text, resources = MarkdownExporter().from_notebook_node(
        nb, {'output_files_dir': images, 'unique_key': 'readme'}
    )
    # the notebook stands in nbs/, the README beside it: links to files move one folder up
    text = re.sub(r'(!?\[[^\]]*\]\()(?!nbs/|https?:|mailto:|#|/)([^)\s]+)', r'\1nbs/\2', text)
    text = re.sub(r'\n\s*\n', '\n\n', text).strip() + '\n'
    for old in (root / images).glob('readme_*'):
        old.unlink()
    for name, content in resources['outputs'].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / 'README.md').write_text(text, encoding='utf-8', newline='\n')


if __name__ == '__main__':
    write_readme()
