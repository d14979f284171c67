"""Write README.md and its pictures from nbs/index.ipynb: `python tools/readme.py`"""
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
images = 'nbs/images'  # the pictures that the index notebook draws are kept here as readme_*.png or .jpg
HIDDEN = {'hide', 'include: false', 'include:false'}
FOLDED = {'hide_input', 'echo: false', 'echo:false'}
# a link of the notebook that is neither absolute nor in nbs/ already
LINK = re.compile(r'(!?\[[^\]]*\]\()(?!nbs/|https?:|mailto:|#|/)([^)\s]+)')


def visible(notebook):
    "Drop hidden cells, hide the code of folded ones, and remove directives."
    kept = []
    for cell in notebook.cells:
        directives = set(re.findall(r'^#\|\s*(.+?)\s*$', cell.source, re.M))
        if directives & HIDDEN:
            continue
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if directives & FOLDED:
            cell.metadata['transient'] = {'remove_source': True}
        if cell.source or cell.get('outputs'):
            kept.append(cell)
    notebook.cells = kept
    notebook.metadata['language_info'] = {'name': 'python'}  # names the code blocks; nbdev-clean removes it
    return notebook


def write_readme():
    "Write README.md, and the pictures among the notebook's outputs."
    notebook = visible(nbformat.read(root/'nbs'/'index.ipynb', as_version=4))
    options = {'output_files_dir': images, 'unique_key': 'readme'}
    text, resources = MarkdownExporter().from_notebook_node(notebook, options)
    text = LINK.sub(r'\1nbs/\2', text)  # the notebook is in nbs/, the README beside that folder
    text = re.sub(r'\n\s*\n', '\n\n', text).strip() + '\n'
    for old in (root/images).glob('readme_*'):
        old.unlink()
    for name, content in resources['outputs'].items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(content)
    (root/'README.md').write_text(text, encoding='utf-8', newline='\n')


if __name__ == '__main__':
    write_readme()
