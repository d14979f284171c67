"""How long it takes to begin: imports, and the way from starting Python to a first diagnosis.

Every measurement is a process of its own, all of them in turn within each repeat; files are in the
system's cache, as after a first use.
  imports          seconds that the import takes, and that the process lives, Python's own start included;
                   ratios of the latter are to
                   `import fastai.vision.all`, on which the learner is built
  first diagnosis  one simulated patient, a saved model: importing, reading and checking the patient,
  loading the model, predicting
Also listed is which heavy modules `import cmus_fastai` loads: it must be none.

    python benchmarks/cold.py --json cmus_fastai/results/cold.json
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from common import BACKBONE, Table, answer, arguments, machine, median, network, ratio, write

PACKAGE = ['cmus_fastai', 'cmus_fastai.data.cohort', 'cmus_fastai.training.learner']
IMPORTS = [*PACKAGE, 'torch', 'fastai.vision.all']
HEAVY = ['torch', 'fastai', 'timm', 'pandas', 'matplotlib', 'numpy', 'PIL', 'sklearn', 'skimage']
COLUMNS = dict(
    imports=dict(
        what=('import', '<22'),
        seconds=('seconds', '>9.2f'),
        process=('process s', '>11.2f'),
        to_fastai=('/fastai.vision.all', '>20.2f'),
    ),
    first=dict(what=('what', '<22'), seconds=('seconds', '>9.2f'), share=('share', '>9.0%')),
)

TIMED = 'import sys, time; t = time.perf_counter(); import {0}; print(time.perf_counter() - t)'
FIRST = """
import sys, time, warnings
warnings.filterwarnings('ignore')
marks = [float(sys.argv[1]), time.time()]
from cmus_fastai.training.artifact import load_model, predict_cohort
from cmus_fastai.data.cohort import Cohort
marks.append(time.time())
cohort = Cohort.from_folder(sys.argv[2], progress=False)
marks.append(time.time())
model, config = load_model(sys.argv[3], sys.argv[4])
marks.append(time.time())
predictions, _ = predict_cohort(model, config, cohort)
assert len(predictions) == 1
marks.append(time.time())
print([b - a for a, b in zip(marks, marks[1:])])
"""
PARTS = ["Python's start", 'import', 'read the patient', 'load the model', 'predict']


def python(code, *args):
    "What a process prints, as JSON, and how long it lives."
    start = time.time()
    p = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, *[str(x) for x in (start, *args)]],
        capture_output=True,
        text=True,
    )
    if p.returncode:
        raise RuntimeError(p.stderr[-3000:])
    return json.loads(p.stdout.splitlines()[-1]), time.time() - start


def child(a):
    "Make a patient and a model, so that this process stays light."
    from cmus_fastai.training.artifact import save_model
    from cmus_fastai.data.phantom import make_phantom

    root = Path(a.folder)
    make_phantom(root / 'phantom', 3, size=a.size, n_workers=1, progress=False)
    a.device = 'cpu'
    save_model(network(a), root / 'model', ['IgAN', 'LN', 'MN'], a.size)
    answer(
        str(
            next(p for p in sorted((root / 'phantom').glob('*/*')) if p.is_dir() and p.parent.name != 'masks')
        )
    )


def main():
    a = arguments(__doc__, **BACKBONE)
    if a.child:
        child(a)
        return
    from common import fresh

    print(machine(a.device))
    with tempfile.TemporaryDirectory() as tmp:
        patient, model = fresh(__file__, a, folder=tmp), Path(tmp) / 'model'
        codes = {k: (TIMED.format(k),) for k in IMPORTS} | {'first': (FIRST, patient, model, a.device)}
        runs = {k: [] for k in codes}
        for r in range(a.repeats + 1):  # the first warms up
            for k in list(codes)[:: 1 if r % 2 else -1]:
                runs[k].append(python(*codes[k]))
    runs = {k: v[1:] for k, v in runs.items()}
    life = {k: [x for _, x in v] for k, v in runs.items()}
    t = Table(f'imports, each in a process of its own; medians of {a.repeats}', COLUMNS['imports'])
    for k in IMPORTS:
        t.add(
            what=k,
            seconds=median(x for x, _ in runs[k]),
            process=median(life[k]),
            to_fastai=ratio(life[k], life['fastai.vision.all']),
        )
    u = Table(
        f'from starting Python to a first diagnosis, {a.backbone}, {a.size} px, {a.device}; medians of '
        f'{a.repeats}',
        COLUMNS['first'],
    )
    whole = [sum(x) for x, _ in runs['first']]
    for i, part in enumerate(PARTS):
        u.add(
            what=part,
            seconds=median(x[i] for x, _ in runs['first']),
            share=median(x[i] / w for (x, _), w in zip(runs['first'], whole)),
        )
    u.add(what='all', seconds=median(whole), share=1.0)
    heavy, _ = python(
        f'import cmus_fastai, json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))'
    )
    print(f'\nheavy modules that `import cmus_fastai` loads: {", ".join(heavy) or "none"}')
    write(a, dict(imports=t, first=u), heavy=heavy)


if __name__ == '__main__':
    main()
