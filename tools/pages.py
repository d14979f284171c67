"""Process the notebooks for the documentation as nbdev-docs does, but without Quarto

Then `smalldocs render _proc` (`pip install smalldocs`, pure Python) shows nearly the site that Quarto makes.
"""
import sys
import warnings
from pathlib import Path
from nbdev.doclinks import nbglob
from nbdev.serve import proc_nbs

# nbdev warns of every cell with an import; cells that fail are reported below
warnings.simplefilter('ignore', UserWarning)
failed = False
for nb in nbglob(as_path=True):  # one after the other, so that the error of every notebook is shown
    try:
        proc_nbs(file_glob=Path(nb).name, n_workers=0)
    except Exception as error:  # nbdev wraps whatever the notebook raised in a plain Exception
        failed = True
        print(f'{nb}\n{error}\nnbdev runs cells with an import when it makes the pages: '
              'keep imports in cells of their own.\n')
sys.exit(failed)
