"""Do the explanations hold? The audit of a trained model on a phantom, or on real micrographs with annotations.

The model is one that `cmus_demo` has trained (--model), its test patients are those of its table of predictions (--tested). The same network is trained anew
from other seeds, and with other aggregators, on the other patients. Quick methods (attention, Grad-CAM) and everything about bags and attention are asked about
all test patients; the methods that call the network many times about --n_slow of them, in turn from each class, and their stability and sanity about --n_again.
Deletion and insertion are measured for the --n_slow patients, for all methods. Integrated gradients take 16 steps here and gradient SHAP 8 samples;
for the --n_ig of these patients with the fewest images the map is set beside the one that the default settings give, which keep on until the account is settled within 1 %.

What is done is kept in --work; with more patients asked for, or after an interruption, the same command goes on.

    cmus_demo --out demo
    OMP_NUM_THREADS=1 python benchmarks/audit.py --truth demo/phantom --model demo/model --tested demo/predictions.csv --json cmus_fastai/results/audit_phantom.json
    cmus_demo --data real_micrographs/train --test real_micrographs/test --out real
    OMP_NUM_THREADS=1 python benchmarks/audit.py --truth real_micrographs --train real_micrographs/train --data real_micrographs/test --model real/model --tested real/predictions.csv --json cmus_fastai/results/audit_real.json
"""

import argparse, base64, io, json, pickle, time, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
from cmus_fastai.training.artifact import load_model, save_model
from cmus_fastai.explain.audit import (
    SLOW,
    Auditor,
    Truth,
    against,
    audit_case,
    audit_table,
    bag_scores,
    gaze,
    likeness,
    pick,
)
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.check import CohortWarning
from cmus_fastai.evaluation.crossval import Config, read_out, train_config
from cmus_fastai.evaluation.metrics import evaluate
from cmus_fastai.core import MODALITIES
from cmus_fastai.explain.attribution import CasePredictor, attention, attribute, picture
from cmus_fastai.training.features import FeatureCache
from common import machine

QUICK = 'attention', 'gradcam'
AGGREGATORS = 'attention', 'gated', 'entmax', 'dsmil', 'clam', 'transmil', 'topk', 'max', 'mean'
OPTIONS = dict(ig=dict(n_steps=16), gradient_shap=dict(n_samples=8))


def say(t):
    print(time.strftime('%H:%M:%S'), t, flush=True)


def trained(name, seed, head, train, test, config, work, cache):
    "A network of its own, trained once and kept; its reader and its accuracy on the test patients."
    folder = work / f'model_{name}'
    if not folder.exists():
        learn = train_config(
            Config(size=config['size'], head=head), train, seed=seed, cache=cache, num_workers=0
        )
        t = evaluate(read_out(learn, test)[0]['fusion'])
        save_model(
            learn.model, folder, list(learn.dls.vocab), config['size'], accuracy=t.loc['accuracy'].to_dict()
        )
        say(f'trained {name}')
    model, c = load_model(folder)
    return CasePredictor(model, c['classes'], c['size'], c['resample']), c['info']['accuracy']


def share_encoders(reader, main):
    "Use the audited model's encoders where they are the same."
    for e in ('om', 'im', 'tem'):
        a, b = getattr(reader.model, e), getattr(main.model, e)
        if not all(
            torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        ):
            raise ValueError(f'encoder {e} differs from that of the audited model')
        setattr(reader.model, e, b)
    return reader


class Kept:
    "Records of parts that are done, one line each, and attributions of slow methods."

    def __init__(self, work):
        self.file, self.maps = work / 'parts.jsonl', work / 'maps'
        self.maps.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.parts = {(d['patient'], d['part']): d['records'] for d in map(json.loads, lines)}

    def add(self, patient, part, records):
        self.parts[patient, part] = records
        with self.file.open('a') as f:
            f.write(json.dumps(dict(patient=patient, part=part, records=records)) + '\n')

    def load(self, patients):
        return {
            k: v
            for p in patients
            if (f := self.maps / f'{p}.pkl').exists()
            for k, v in pickle.loads(f.read_bytes()).items()
        }

    def store(self, maps):
        for p in {p for p, _ in maps}:
            (self.maps / f'{p}.pkl').write_bytes(
                pickle.dumps({k: v for k, v in maps.items() if k[0] == p and k[1] in SLOW})
            )

    def of(self, part):
        return [r for (_, q), rs in self.parts.items() if q == part for r in rs]


def rounded(rows, d=5):
    return [{k: (round(v, d) if isinstance(v, float) else v) for k, v in r.items()} for r in rows]


def jpeg(image, **kw):
    f = io.BytesIO()
    Image.fromarray(image).save(f, **kw)
    return base64.b64encode(f.getvalue()).decode()


def examples(auditor, reader, test, kept, modality='OM'):
    "Attention over three patients: the worst tenth, the middle and the best tenth by its mass in the evidence as a multiple of chance."
    rows = sorted(
        (r['value'] / r['chance'], r['patient'])
        for r in kept.of('quick')
        if (r['check'], r['method'], r['modality']) == ('mass', 'attention', modality)
    )
    out = []
    for q in (0.1, 0.5, 0.9) if rows else ():
        ratio, i = rows[round(q * (len(rows) - 1))]
        case = reader.open(test[i])
        out.append(
            dict(
                patient=i,
                label=case.label,
                modality=modality,
                quantile=q,
                ratio=ratio,
                image=jpeg(picture(case.images[MODALITIES.index(modality)][0]), format='JPEG', quality=80),
                mask=jpeg(
                    (auditor.truth.masks(case)[modality][0] * 255).astype(np.uint8),
                    format='PNG',
                    optimize=True,
                ),
                attention=np.round(attention(reader, case)[modality], 5).tolist(),
            )
        )
    return out


def write(a, kept, accuracy, cohort, seconds, size, shown):
    "Everything that is done so far, as JSON."
    records = kept.of('quick') + kept.of('slow') + kept.of('again')
    t = audit_table(records)
    curves = pd.DataFrame([r for r in records if 'curve' in r])
    curves = (
        []
        if not len(curves)
        else [
            dict(
                check=c,
                method=m,
                modality=x,
                n=len(g),
                curve=np.mean(g.curve.tolist(), 0).round(4).tolist(),
                chance=np.mean(g.blind.tolist(), 0).round(4).tolist(),
            )
            for (c, m, x), g in curves.groupby(['check', 'method', 'modality'], sort=False)
        ]
    )
    args = {
        k: v
        for k, v in vars(a).items()
        if k in ('n_slow', 'n_again', 'n_ig', 'seeds', 'seed', 'steps', 'draws')
    }
    out = dict(
        command=f'OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/audit.py '
        + ' '.join(f'--{k} {v}' for k, v in args.items())
        + f' --json cmus_fastai/results/{Path(a.json).name}',
        machine=machine(),
        data=a.name,
        patients=len(cohort),
        classes=list(cohort.classes),
        settings=dict(
            args, options=OPTIONS, tolerance=15, noise=0.02, target='the predicted class', size=size
        ),
        seconds=round(seconds),
        table=rounded(t.reset_index().to_dict('records')),
        edges=rounded(
            audit_table(
                against([r for r in records if r['check'] in ('pointing', 'mass', 'deletion', 'insertion')])
            )
            .reset_index()
            .to_dict('records')
        ),
        ig_miss=np.median([abs(r['delta'] / r['difference']) for r in kept.of('ig')])
        if kept.of('ig')
        else None,
        ig_converged=kept.of('ig_converged'),
        curves=curves,
        accuracy=accuracy,
        examples=shown,
        instances=rounded(kept.of('instances')),
        gaze=rounded(kept.of('gaze')),
    )
    tmp = Path(f'{a.json}.part')
    tmp.write_text(
        json.dumps(out, indent=None, default=float).replace('}, {', '},\n{') + '\n', encoding='utf-8'
    )
    tmp.replace(a.json)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--truth', required=True, help='folder with manifest.csv')
    p.add_argument('--data', help='folder of the test patients; default: --truth')
    p.add_argument(
        '--train', help='folder of the training patients; default: those of --data who were not tested'
    )
    p.add_argument('--model', required=True)
    p.add_argument('--tested', required=True, help='predictions.csv')
    p.add_argument('--name', help='of the data; default: that of the folder')
    p.add_argument('--cache', help='folder for the maps; default: memory')
    p.add_argument('--work', help='folder for what is done; default: beside --json')
    p.add_argument('--json', required=True)
    p.add_argument('--n_slow', type=int, default=18)
    p.add_argument('--n_again', type=int, default=6)
    p.add_argument('--n_ig', type=int, default=3)
    p.add_argument('--seeds', type=int, default=2, help='other trainings')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--steps', type=int, default=6)
    p.add_argument('--draws', type=int, default=2)
    a = p.parse_args()
    warnings.simplefilter('ignore', CohortWarning)
    warnings.simplefilter('ignore', FutureWarning)
    a.name, work = a.name or Path(a.truth).name, Path(a.work or f'{a.json}.work')
    work.mkdir(parents=True, exist_ok=True)
    whole, ids = (
        Cohort.read(a.data or a.truth, progress=False),
        list(pd.read_csv(a.tested, dtype={'patient': str}).patient),
    )
    test = whole.subset(ids)
    train = (
        Cohort.read(a.train, progress=False)
        if a.train
        else whole.subset([i for i in whole.df.index if i not in set(ids)])
    )
    model, config = load_model(a.model)
    reader, truth = (
        CasePredictor(
            model,
            config['classes'],
            config['size'],
            config['resample'],
            config['info'].get('temperature', 1.0),
        ),
        Truth.read(a.truth),
    )
    cache, kept, start = FeatureCache(a.cache, n_views=2, progress=False), Kept(work), time.time()
    new = lambda name, seed, **head: trained(name, seed, head, train, test, config, work, cache)
    readers = {f'seed {s}': new(f'seed{s}', s) for s in range(1, a.seeds + 1)} | {
        g: new(g, 0, aggregator=g) for g in AGGREGATORS
    }
    accuracy = {
        'audited': evaluate(
            pd.read_csv(
                a.tested,
                dtype={'patient': str},
                usecols=lambda c: c in ('patient', 'group', 'label', 'pred') or c.startswith('p_'),
            )
        )
        .loc['accuracy']
        .to_dict()
    } | {k: v for k, (_, v) in readers.items()}
    readers = {k: share_encoders(r, reader) for k, (r, _) in readers.items()}
    auditor = Auditor(
        reader,
        truth,
        tuple(readers[f'seed {s}'] for s in range(1, a.seeds + 1)),
        options=OPTIONS,
        steps=a.steps,
        draws=a.draws,
        seed=a.seed,
    )
    order = pick(test, None, a.seed)
    auditor.randoms(reader.open(test[order[0]]))
    group = lambda i: str(test[i].group)
    tidy = lambda rs: [{k: (v.item() if isinstance(v, np.generic) else v) for k, v in r.items()} for r in rs]
    shown = []
    finish = lambda: write(a, kept, accuracy, test, time.time() - start, reader.size, shown)

    partner = None
    for n, i in enumerate(order):  # quick methods, bags, gaze: all patients
        if (i, 'quick') in kept.parts:
            continue
        case = reader.open(test[i])
        partner = partner or reader.open(test[order[n - 1]])
        records = audit_case(auditor, case, partner, group(i), QUICK, QUICK, ())
        for g in AGGREGATORS:
            records += [
                dict(r, patient=i, group=group(i), method=f'{r["method"]} ({g})')
                for r in bag_scores(readers[g], case, truth)
                if (g, r['method']) != ('mean', 'weight')
            ]
        t = auditor.instance_table(case)
        kept.add(
            i,
            'instances',
            tidy(t.assign(label=case.label, pred=reader.classes[reader.target(case)]).to_dict('records')),
        )
        kept.add(i, 'gaze', [gaze(reader, case)])
        kept.add(i, 'quick', tidy(records))
        auditor.maps, partner = {k: v for k, v in auditor.maps.items() if k[0] == i}, case
        if n % 10 == 9:
            say(f'quick: {n + 1} of {len(order)}')
            finish()
    shown = examples(auditor, reader, test, kept)
    finish()
    for n, i in enumerate(order[: max(a.n_slow, a.n_again)]):
        todo = [
            x for x, m in (('slow', a.n_slow), ('again', a.n_again)) if n < m and (i, x) not in kept.parts
        ]
        if not todo:
            continue
        other, case = order[n - 1 if n else 1], reader.open(test[i])
        auditor.maps = kept.load([i, other])
        say(f'{n + 1}: {i}, {case.n} TEM images, {", ".join(todo)}')
        if 'slow' in todo:
            kept.add(
                i, 'slow', tidy(audit_case(auditor, case, None, group(i), SLOW, (), (*QUICK, *SLOW, 'edges')))
            )
        if 'again' in todo:
            partner = reader.open(test[other])
            kept.add(
                i,
                'again',
                tidy(
                    [
                        dict(patient=i, group=group(i), **r)
                        for r in auditor.stability(case, partner, SLOW) + auditor.sanity(case, SLOW)
                    ]
                ),
            )
        if 'slow' in todo:
            kept.add(i, 'ig', [{k: auditor.maps[i, 'ig'].info[k] for k in ('delta', 'difference')}])
        kept.store(auditor.maps)
        finish()
    for i in sorted(order[: a.n_slow], key=lambda i: len(test[i].TEM))[: a.n_ig]:
        if (i, 'ig_converged') in kept.parts:
            continue
        case, auditor.maps = reader.open(test[i]), kept.load([i])
        full, quick = attribute(reader, case, 'ig'), auditor.map(case, 'ig')
        kept.add(
            i,
            'ig_converged',
            tidy(
                [
                    dict(
                        patient=i,
                        modality=m,
                        likeness=likeness(full, quick, m),
                        steps=full.info['steps'],
                        miss=abs(full.info['delta'] / full.info['difference']),
                    )
                    for m in case.present
                ]
            ),
        )
    finish()
    say(f'done in {(time.time() - start) / 60:.1f} minutes')


if __name__ == '__main__':
    main()
