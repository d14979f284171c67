"""Process the notebooks for the documentation as nbdev-docs does, but without Quarto.

Afterwards `smalldocs render _proc` (`pip install smalldocs`, pure Python) shows nearly the site that Quarto makes."""

import sys, warnings
from pathlib import Path
from nbdev.doclinks import nbglob
from nbdev.serve import proc_nbs

warnings.simplefilter(
    'ignore', UserWarning
)  # nbdev warns of every cell with an import; those that fail are told below
failed = False
for nb in nbglob(
    as_path=True
):  # one after the other, so that every notebook's trouble is shown and not only the first's
    try:
        proc_nbs(file_glob=Path(nb).name, n_workers=0)
    except Exception as error:  # nbdev wraps whatever the notebook raised in a plain Exception
        failed = True
        print(
            f'{nb}\n{error}\nnbdev runs cells with an import when it makes the pages: keep imports in cells of their own.\n'
        )
sys.exit(failed)
