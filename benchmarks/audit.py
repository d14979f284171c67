"""Audit of the explanations of a trained model, on a phantom or on real micrographs with annotations.

The model is one that `cmus demo` has trained (--model); its test patients are those of its table of
predictions (--tested). The same network is trained from other seeds, and with other aggregators, on the other
patients. Attention, Grad-CAM and everything about bags is computed for all test patients. Methods that run
the network many times are computed for --n_slow of them, in turn from each class, and their stability and
sanity for --n_again. Deletion and insertion are measured for the --n_slow patients, for all methods.
Integrated gradients take 16 steps here and gradient SHAP 8 samples; for the --n_ig of these patients with the
fewest images, the map is compared with that of the default settings, which add steps until the error is below
1 %.

Finished parts are kept in --work. The same command resumes after an interruption, and continues if more
patients are asked for.

    cmus demo --preset small --out demo
    OMP_NUM_THREADS=1 python benchmarks/audit.py --truth demo/phantom --model demo/model \\
        --tested demo/predictions.csv --json cmus_fastai/results/audit_phantom.json
    cmus train --preset small --data real_micrographs/train --test real_micrographs/test --out real
    OMP_NUM_THREADS=1 python benchmarks/audit.py --truth real_micrographs --train real_micrographs/train \\
        --data real_micrographs/test --model real/model --tested real/predictions.csv \\
        --json cmus_fastai/results/audit_real.json
"""

import argparse
import base64
import io
import json
import pickle
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from PIL import Image
from cmus_fastai.core import MODALITIES, write_file
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.check import CohortWarning
from cmus_fastai.data.settings import settings_from_json
from cmus_fastai.training.config import ComputeConfig, TrainConfig
from cmus_fastai.training.fit import predict_outputs, train_model
from cmus_fastai.evaluation.metrics import evaluate
from cmus_fastai.explain.attribution import CasePredictor, attention, attribute, encoders, picture
from cmus_fastai.explain.audit import (
    SLOW_METHODS,
    Auditor,
    GroundTruth,
    attention_effect,
    audit_case,
    audit_table,
    bag_scores,
    compare_with,
    rank_similarity,
    select_patients,
)
from cmus_fastai.training.artifact import load_model, save_model, temperatures_of
from cmus_fastai.training.features import FeatureCache
from common import machine

QUICK = ('attention', 'gradcam')
AGGREGATORS = ('attention', 'gated', 'entmax', 'dsmil', 'clam', 'transmil', 'topk', 'max', 'mean')
READING = ('resize', 'remove_strip', 'nm_per_px')
OPTIONS = dict(ig=dict(n_steps=16), gradient_shap=dict(n_samples=8))
COMPARED_WITH_EDGES = ('pointing', 'mass', 'deletion', 'insertion')


def log(text):
    print(time.strftime('%H:%M:%S'), text, flush=True)


def plain(records):
    "Records with numbers of Python instead of numpy, for JSON."
    return [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in record.items()}
        for record in records
    ]


def rounded(records, digits=5):
    return [
        {key: round(value, digits) if isinstance(value, float) else value for key, value in record.items()}
        for record in records
    ]


class Store:
    "Records of finished parts, one line each, and attributions of slow methods."

    def __init__(self, work):
        self.file = work / 'parts.jsonl'
        self.maps = work / 'maps'
        self.maps.mkdir(parents=True, exist_ok=True)
        self.parts = {}
        if self.file.exists():
            for line in map(json.loads, self.file.read_text().splitlines()):
                self.parts[line['patient'], line['part']] = line['records']

    def add(self, patient, part, records):
        self.parts[patient, part] = records
        with self.file.open('a') as file:
            file.write(json.dumps(dict(patient=patient, part=part, records=records)) + '\n')

    def records(self, part):
        return [record for (_, name), records in self.parts.items() if name == part for record in records]

    def load_maps(self, patients):
        files = [self.maps / f'{patient}.pkl' for patient in patients]
        maps = {}
        for file in files:
            if file.exists():
                maps.update(pickle.loads(file.read_bytes()))
        return maps

    def save_maps(self, maps):
        for patient in {patient for patient, _ in maps}:
            slow = {key: a for key, a in maps.items() if key[0] == patient and key[1] in SLOW_METHODS}
            (self.maps / f'{patient}.pkl').write_bytes(pickle.dumps(slow))


@dataclass
class Networks:
    "Trains the networks that the audited one is compared with."

    train: Cohort
    test: Cohort
    config: dict  # Of the audited model
    work: Path
    cache: FeatureCache

    def get(self, name, seed, **head):
        "A network that is trained once and kept: predictor, and accuracy on the test patients."
        folder = self.work / f'model_{name}'
        if not folder.exists():
            self._train(name, folder, seed, head)
        model, config = load_model(folder)
        predictor = CasePredictor(model, config['classes'], settings=settings_from_json(config['images']))
        return predictor, config['info']['accuracy']

    def _train(self, name, folder, seed, head):
        size, settings = self.config['size'], settings_from_json(self.config['images'])
        options = {name: {m: getattr(settings[m], name) for m in MODALITIES} for name in READING}
        config = TrainConfig(size=size, head=head, images=options)
        compute = ComputeConfig(num_workers=0, progress=False)
        learn = train_model(config, self.train, seed=seed, cache=self.cache, compute=compute)
        accuracy = evaluate(predict_outputs(learn, self.test).fusion).loc['accuracy'].to_dict()
        classes, settings = list(learn.dls.vocab), learn.dls.image_settings
        save_model(learn.model, folder, classes, size, settings, accuracy=accuracy)
        log(f'trained {name}')


def share_encoders(predictor, audited):
    "Use the audited model's encoders, which must be equal."
    for name, own, shared in zip(MODALITIES, encoders(predictor.model), encoders(audited.model)):
        pairs = zip(own.state_dict().values(), shared.state_dict().values(), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ValueError(f'the encoder of {name} differs from that of the audited model')
        setattr(predictor.model, name.lower(), shared)
    return predictor


def encode_image(image, **options):
    "An image as base64 text."
    file = io.BytesIO()
    Image.fromarray(image).save(file, **options)
    return base64.b64encode(file.getvalue()).decode()


def examples(auditor, test, store, modality='OM'):
    "Attention of the patients at the 0.1, 0.5 and 0.9 quantiles of its mass in the evidence over chance."
    wanted = ('mass', 'attention', modality)
    rows = sorted(
        (record['value'] / record['chance'], record['patient'])
        for record in store.records('quick')
        if (record['check'], record['method'], record['modality']) == wanted
    )
    result = []
    for quantile in (0.1, 0.5, 0.9) if rows else ():
        ratio, patient = rows[round(quantile * (len(rows) - 1))]
        case = auditor.predictor.open(test[patient])
        masks = auditor.truth.masks(case, auditor.predictor.settings)[modality]
        place = next(i for i, mask in enumerate(masks) if mask is not None)
        image = picture(case.images[MODALITIES.index(modality)][0, place])
        mask = (masks[place] * 255).astype(np.uint8)
        result.append(
            dict(
                patient=patient,
                label=case.label,
                modality=modality,
                quantile=quantile,
                ratio=ratio,
                image=encode_image(image, format='JPEG', quality=80),
                mask=encode_image(mask, format='PNG', optimize=True),
                attention=np.round(attention(auditor.predictor, case)[modality], 5).tolist(),
            )
        )
    return result


def mean_curves(records):
    "Mean curves of deletion and insertion."
    curves = pd.DataFrame([record for record in records if 'curve' in record])
    if not len(curves):
        return []
    rows = []
    for (check, method, modality), group in curves.groupby(['check', 'method', 'modality'], sort=False):
        row = dict(check=check, method=method, modality=modality, n=len(group))
        row['curve'] = np.mean(group.curve.tolist(), 0).round(4).tolist()
        row['chance'] = np.mean(group.blind.tolist(), 0).round(4).tolist()
        rows.append(row)
    return rows


@dataclass
class Audit:
    "One audit with all that it needs."

    args: argparse.Namespace
    auditor: Auditor
    test: Cohort
    store: Store
    aggregators: dict  # Name → predictor
    accuracy: dict  # Name of a network → accuracy with interval
    start: float
    examples: list

    def open(self, patient):
        return self.auditor.predictor.open(self.test[patient])

    def group(self, patient):
        return str(self.test[patient].group)

    def run(self):
        args = self.args
        order = select_patients(self.test, None, args.seed)
        self.auditor.random_predictors(self.open(order[0]))
        self.quick(order)
        self.examples = examples(self.auditor, self.test, self.store)
        self.write()
        self.slow(order[: max(args.n_slow, args.n_again)], order)
        by_size = sorted(order[: args.n_slow], key=lambda patient: len(self.test[patient].TEM))
        for patient in by_size[: args.n_ig]:
            if (patient, 'ig_converged') not in self.store.parts:
                self.converge(patient)
        self.write()
        log(f'done in {(time.time() - self.start) / 60:.1f} minutes')

    def quick(self, order):
        "Quick methods, bags and attention, for all patients."
        partner = None
        for n, patient in enumerate(order):
            if (patient, 'quick') in self.store.parts:
                continue
            case = self.open(patient)
            partner = partner or self.open(order[n - 1])
            self.quick_case(patient, case, partner)
            self.auditor.keep_patients([patient])
            partner = case
            if n % 10 == 9:
                log(f'quick: {n + 1} of {len(order)}')
                self.write()

    def quick_case(self, patient, case, partner):
        predictor, group = self.auditor.predictor, self.group(patient)
        records = audit_case(self.auditor, case, partner, group, QUICK, QUICK, ())
        for name in AGGREGATORS:
            # only TEM's aggregator differs from that of the audited network
            for record in bag_scores(self.aggregators[name], case, self.auditor.truth, 'TEM'):
                if (name, record['method']) == ('mean', 'weight'):
                    continue  # all weights are equal
                method = f'{record["method"]} ({name})'
                records.append(dict(record, patient=patient, group=group, method=method))
        table = self.auditor.instance_table(case)
        table = table.assign(label=case.label, pred=predictor.classes[predictor.target(case)])
        self.store.add(patient, 'instances', plain(table.to_dict('records')))
        self.store.add(patient, 'gaze', [attention_effect(predictor, case)])
        self.store.add(patient, 'quick', plain(records))

    def slow(self, patients, order):
        "Slow methods, deletion and insertion, stability and sanity."
        limits = dict(slow=self.args.n_slow, again=self.args.n_again)
        for n, patient in enumerate(patients):
            todo = [part for part, m in limits.items() if n < m and (patient, part) not in self.store.parts]
            if not todo:
                continue
            other, case = order[n - 1 if n else 1], self.open(patient)
            self.auditor.attributions = self.store.load_maps([patient, other])
            log(f'{n + 1}: {patient}, {case.n} TEM images, {", ".join(todo)}')
            if 'slow' in todo:
                self.slow_case(patient, case)
            if 'again' in todo:
                self.repeat_case(patient, case, self.open(other))
            if 'slow' in todo:
                info = self.auditor.attributions[patient, 'ig'].info
                self.store.add(patient, 'ig', [{key: info[key] for key in ('delta', 'difference')}])
            self.store.save_maps(self.auditor.attributions)
            self.write()

    def slow_case(self, patient, case):
        removal = (*QUICK, *SLOW_METHODS, 'edges')
        records = audit_case(self.auditor, case, None, self.group(patient), SLOW_METHODS, (), removal)
        self.store.add(patient, 'slow', plain(records))

    def repeat_case(self, patient, case, partner):
        records = self.auditor.check_stability(case, partner, SLOW_METHODS)
        records += self.auditor.check_sanity(case, SLOW_METHODS)
        known = dict(patient=patient, group=self.group(patient))
        self.store.add(patient, 'again', plain([dict(known, **record) for record in records]))

    def converge(self, patient):
        "Compare integrated gradients of 16 steps with those of the default settings."
        case = self.open(patient)
        self.auditor.attributions = self.store.load_maps([patient])
        full, quick = attribute(self.auditor.predictor, case, 'ig'), self.auditor.attribution(case, 'ig')
        records = []
        for m in case.present:
            record = dict(patient=patient, modality=m, likeness=rank_similarity(full, quick, m))
            record['steps'] = full.info['steps']
            record['miss'] = abs(full.info['delta'] / full.info['difference'])
            records.append(record)
        self.store.add(patient, 'ig_converged', plain(records))

    def arguments(self):
        "The arguments that set how much is measured."
        names = ('n_slow', 'n_again', 'n_ig', 'seeds', 'seed', 'steps', 'draws')
        return {key: value for key, value in vars(self.args).items() if key in names}

    def command(self):
        options = ' '.join(f'--{key} {value}' for key, value in self.arguments().items())
        name = Path(self.args.json).name
        threads = torch.get_num_threads()
        script = f'OMP_NUM_THREADS={threads} python benchmarks/audit.py'
        return f'{script} {options} --json cmus_fastai/results/{name}'

    def settings(self):
        fixed = dict(options=OPTIONS, tolerance=15, noise=0.02, target='the predicted class')
        return self.arguments() | fixed | dict(size=self.auditor.predictor.size)

    def write(self):
        "Write everything that is finished."
        store = self.store
        records = store.records('quick') + store.records('slow') + store.records('again')
        vs_edges = compare_with([record for record in records if record['check'] in COMPARED_WITH_EDGES])
        errors = [abs(record['delta'] / record['difference']) for record in store.records('ig')]
        result = dict(
            command=self.command(),
            machine=machine(),
            data=self.args.name,
            patients=len(self.test),
            classes=list(self.test.classes),
            settings=self.settings(),
            seconds=round(time.time() - self.start),
            table=rounded(audit_table(records).reset_index().to_dict('records')),
            edges=rounded(audit_table(vs_edges).reset_index().to_dict('records')),
            ig_miss=np.median(errors) if errors else None,
            ig_converged=store.records('ig_converged'),
            curves=mean_curves(records),
            accuracy=self.accuracy,
            examples=self.examples,
            instances=rounded(store.records('instances')),
            gaze=rounded(store.records('gaze')),
        )
        write_file(self.args.json, json.dumps(result, default=float).replace('}, {', '},\n{') + '\n')


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--truth', required=True, help='folder with manifest.csv')
    p.add_argument('--data', help='folder of the test patients (default: --truth)')
    p.add_argument(
        '--train', help='folder of the training patients (default: patients of --data not in --tested)'
    )
    p.add_argument('--model', required=True, help='folder of the audited model')
    p.add_argument('--tested', required=True, help='predictions.csv of the audited model')
    p.add_argument('--name', help='name of the data (default: name of the folder)')
    p.add_argument('--cache', help='folder for feature maps (default: memory)')
    p.add_argument('--work', help='folder for finished parts (default: beside --json)')
    p.add_argument('--json', required=True, help='file to write')
    p.add_argument('--n_slow', type=int, default=18, help='patients for slow methods (default: 18)')
    p.add_argument('--n_again', type=int, default=6, help='patients for their stability (default: 6)')
    p.add_argument('--n_ig', type=int, default=3, help='patients for exact integrated gradients (default: 3)')
    p.add_argument('--seeds', type=int, default=2, help='networks from other seeds (default: 2)')
    p.add_argument('--seed', type=int, default=0, help='of the selection and of all noise (default: 0)')
    p.add_argument('--steps', type=int, default=6, help='of deletion and insertion (default: 6)')
    p.add_argument('--draws', type=int, default=2, help='random orders for their chance level (default: 2)')
    return p.parse_args()


def accuracy_of(file):
    "Accuracy with interval of a table of predictions."

    def is_needed(column):
        return column in ('patient', 'group', 'label', 'pred') or column.startswith('p_')

    table = pd.read_csv(file, dtype={'patient': str}, usecols=is_needed)
    return evaluate(table).loc['accuracy'].to_dict()


def read_cohorts(args):
    "Training and test patients."
    whole = Cohort.read(args.data or args.truth, progress=False)
    tested = list(pd.read_csv(args.tested, dtype={'patient': str}).patient)
    if args.train:
        train = Cohort.read(args.train, progress=False)
    else:
        train = whole.subset([patient for patient in whole.df.index if patient not in set(tested)])
    return train, whole.subset(tested)


def main():
    args = parse()
    warnings.simplefilter('ignore', CohortWarning)
    warnings.simplefilter('ignore', FutureWarning)
    args.name = args.name or Path(args.truth).name
    work = Path(args.work or f'{args.json}.work')
    work.mkdir(parents=True, exist_ok=True)
    train, test = read_cohorts(args)
    model, config = load_model(args.model)
    temperature = temperatures_of(config) or 1.0
    settings = settings_from_json(config['images'])
    audited = CasePredictor(model, config['classes'], temperature=temperature, settings=settings)
    start = time.time()
    networks = Networks(train, test, config, work, FeatureCache(args.cache, n_views=2, progress=False))
    trained = {f'seed {s}': networks.get(f'seed{s}', s) for s in range(1, args.seeds + 1)}
    trained |= {name: networks.get(name, 0, aggregator=name) for name in AGGREGATORS}
    accuracy = {'audited': accuracy_of(args.tested)} | {name: value for name, (_, value) in trained.items()}
    predictors = {name: share_encoders(predictor, audited) for name, (predictor, _) in trained.items()}
    auditor = Auditor(
        audited,
        GroundTruth.read(args.truth),
        tuple(predictors[f'seed {s}'] for s in range(1, args.seeds + 1)),
        options=OPTIONS,
        steps=args.steps,
        draws=args.draws,
        seed=args.seed,
    )
    Audit(args, auditor, test, Store(work), predictors, accuracy, start, []).run()


if __name__ == '__main__':
    main()
