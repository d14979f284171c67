"""Is it noticed what training never saw: another disease, stain, magnification, or image in the wrong place?

python benchmarks/unknown.py phantom FOLDER --json unknown.json
python benchmarks/unknown.py real TRAIN --test TEST --json unknown.json

Each class in turn is left out of training. Test patients of that class are told from the other test
patients by four scores: the distance of their images' features from those of the training patients, in
units of the threshold of `cmus predict`; one minus the confidence; the energy of the logits (Liu et al.
2020); and distance and confidence together, as `cmus predict` combines them. Given are the AUROC with its
interval over patients, and the shares of both kinds for which `cmus predict` would warn and whom it would
refer. With all classes in training, test patients are told from copies of themselves whose images were
changed, by distance alone. The JSON file keeps what it has on other data.
"""
import argparse
import json
import tempfile
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
import numpy as np
import torch
from common import machine
from PIL import Image
from sklearn.metrics import roc_auc_score
from cmus_fastai.core import MODALITIES
from cmus_fastai.data.check import CohortWarning
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.evaluation.calibration import apply_temperature
from cmus_fastai.evaluation.holdout import training_profile
from cmus_fastai.evaluation.profile import distance_ratio, image_vectors, make_decision
from cmus_fastai.evaluation.profile import referral_reasons, together_score
from cmus_fastai.training.config import ComputeConfig, TrainConfig
from cmus_fastai.training.features import FeatureCases
from cmus_fastai.training.fit import cohort_batches, held_out_outputs, new_cache, predict_outputs, train_model

QUIET = ComputeConfig(progress=False)
CONFIG = TrainConfig(preset='recommended')


@dataclass
class Trained:
    "A network that has not seen a class, and what it needs to say when to ask."
    learn: object
    profile: dict
    tensors: dict
    decision: dict


def train_without(cohort, name, cache):
    "Train on all patients but those of one class."
    classes = [each for each in cohort.classes if each != name]
    known = changed(cohort, cohort.df[cohort.df.label != name], classes)
    learn = train_model(CONFIG, known, seed=0, cache=cache, compute=QUIET)
    held_out = held_out_outputs(learn)
    decision = make_decision(held_out.fusion, held_out.branches)
    return Trained(learn, *training_profile(learn, known, cache), decision)


def distance_ratios(trained, test, cache):
    "For each test patient the largest distance of an image, in units of its modality's threshold."
    maps = cache.fill(trained.learn.model, test, settings=trained.learn.dls.image_settings)
    cases, profile = FeatureCases(cache, maps, test), {**trained.profile, 'tensors': trained.tensors}
    bags = {modality: image_vectors(cases, modality) for modality in MODALITIES}
    patients = ({modality: bag[i] for modality, bag in bags.items()} for i in range(len(test)))
    return np.array([distance_ratio(profile, vectors) for vectors in patients])


def is_warned(trained, ratios, confidence):
    "Which patients `cmus predict` would warn of: for their images, or for distance and confidence together."
    known = trained.profile['together']
    return (ratios > 1) | (together_score(known, ratios, confidence) > known['threshold'])


def confidences(trained, fusion):
    "The calibrated confidence of each patient."
    calibrated = apply_temperature(fusion, trained.decision['temperatures']['fusion'])
    return calibrated.filter(like='p_').max(axis=1).to_numpy()


@torch.no_grad()
def energies(trained, test):
    "The energy of each test patient: minus the logarithm of the sum of the exponentials of the logits."
    model = trained.learn.model.eval()
    logits = torch.cat([model(*batch[:3]).fusion for batch in cohort_batches(trained.learn, test)])
    return -logits.logsumexp(1).double().cpu().numpy()


def referred(trained, fusion, warned):
    "Which test patients `cmus predict` would refer."
    calibrated = apply_temperature(fusion, trained.decision['temperatures']['fusion'])
    reasons = []
    for flag, (_, row) in zip(warned, calibrated.iterrows()):
        probs = {key.removeprefix('p_'): row[key] for key in calibrated if key.startswith('p_')}
        reasons.append(referral_reasons(probs, trained.decision, ['unlike training'] if flag else []))
    return np.array([bool(each) for each in reasons])


def auroc(unknown, score, n_boot=2000):
    "AUROC with its interval over patients."
    rng, boots = np.random.default_rng(0), []
    sides = [np.flatnonzero(unknown == side) for side in (0, 1)]
    for _ in range(n_boot):
        rows = np.concatenate([rng.choice(side, len(side)) for side in sides])
        boots.append(roc_auc_score(unknown[rows], score[rows]))
    low, high = np.quantile(boots, [.025, .975])
    return dict(estimate=float(roc_auc_score(unknown, score)), low=float(low), high=float(high))


def measure(cohort, test, name, cache):
    "Everything about one class left out."
    trained = train_without(cohort, name, cache)
    blind = changed(test, test.df.assign(label=None), trained.learn.dls.vocab)
    fusion = predict_outputs(trained.learn, blind).fusion
    ratios, energy = distance_ratios(trained, blind, cache), energies(trained, blind)
    unknown = (test.df.label == name).to_numpy().astype(int)
    confidence = confidences(trained, fusion)
    together = together_score(trained.profile['together'], ratios, confidence)
    scores = {'distance': ratios, 'one minus confidence': 1 - confidence, 'energy': energy,
              'distance and confidence': together}
    warned = is_warned(trained, ratios, confidence)
    asked = referred(trained, fusion, warned)
    right = (fusion.pred == test.df.label)[(unknown == 0) & ~asked]
    return dict(
        patients=dict(known=int((unknown == 0).sum()), unknown=int(unknown.sum())),
        auroc={key: auroc(unknown, score) for key, score in scores.items()},
        warned=by_kind(warned, unknown),
        referred=by_kind(asked, unknown),
        accuracy_of_known_not_referred=float(right.mean()) if len(right) else None,
    )


# --- changed images


def turn_hue(image):
    "Another stain: the hue moved by a sixth of the circle."
    hue, saturation, value = image.convert('HSV').split()
    return Image.merge('HSV', (hue.point(lambda x: (x + 43) % 256), saturation, value)).convert('RGB')


def enlarge(image):
    "Twice the magnification: the middle, enlarged."
    w, h = image.size
    return image.crop((w // 4, h // 4, 3 * w // 4, 3 * h // 4)).resize((w, h), Image.Resampling.BICUBIC)


CHANGES = {  # name → function, modalities, and modality → where its images are put
    'OM in another stain': (turn_hue, ['OM'], {}),
    'OM at twice the magnification': (enlarge, ['OM'], {}),
    'TEM at twice the magnification': (enlarge, ['TEM'], {}),
    'OM and IM exchanged': (None, [], dict(OM='IM', IM='OM')),
    'TEM and OM exchanged': (None, [], dict(OM='TEM', TEM='OM')),
}


def write_changed(test, folder, change, modalities, places):
    "Copies of the test patients with changed images."
    for patient in test:
        target = Path(folder)/str(patient.label)/patient.name
        target.mkdir(parents=True)
        for modality in MODALITIES:
            for number, path in enumerate(patient[modality]):
                with Image.open(path) as image:
                    image = image.convert('RGB')
                    shown = change(image) if modality in modalities else image
                    shown.save(target/f'{places.get(modality, modality)}_{modality}{number}.png')
    return Cohort.read(folder, progress=False)


def measure_changes(cohort, test, cache):
    "How well changed copies of test patients are told from the originals."
    learn = train_model(CONFIG, cohort, seed=0, cache=cache, compute=QUIET)
    held_out = held_out_outputs(learn)
    decision = make_decision(held_out.fusion, held_out.branches)
    trained = Trained(learn, *training_profile(learn, cohort, cache), decision)
    usual = distance_ratios(trained, test, cache)
    found = {}
    for name, how in CHANGES.items():
        with tempfile.TemporaryDirectory() as folder:
            other = distance_ratios(trained, write_changed(test, folder, *how), cache)
        unknown = np.repeat([0, 1], [len(usual), len(other)])
        ratios = np.concatenate([usual, other])
        found[name] = dict(auroc=auroc(unknown, ratios), warned=by_kind(ratios > 1, unknown))
        print(name, json.dumps(found[name]), flush=True)
    return found


def by_kind(flags, unknown):
    "Share of flagged patients among those of known and of unknown classes."
    return {kind: float(flags[unknown == i].mean()) for i, kind in enumerate(('known', 'unknown'))}


def changed(cohort, df, classes):
    "A cohort with another table and other classes."
    same = {name: getattr(cohort, name) for name in ('name', 'digests', 'leaky', 'tags', 'scales')}
    return Cohort(df, list(classes), cohort.findings, **same)


def parse():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument('name', help='of the data set, in the JSON file')
    parser.add_argument('data', help='folder or table of patients')
    parser.add_argument('--test', help='folder or table of test patients (default: a third of the patients)')
    parser.add_argument('--json', help='file for the results')
    return parser.parse_args()


def main():
    a = parse()
    warnings.simplefilter('ignore', CohortWarning)
    cohort = Cohort.read(a.data, progress=False)
    cohort, test = (cohort, Cohort.read(a.test, progress=False)) if a.test else cohort.split(test=1/3, seed=0)
    cache = new_cache(CONFIG, QUIET)
    result = {}
    for name in cohort.classes:
        result[name] = measure(cohort, test, name, cache)
        print(name, json.dumps(result[name], indent=1), flush=True)
    changes = measure_changes(cohort, test, cache)
    if a.json:
        path = Path(a.json)
        known = json.loads(path.read_text('utf-8')) if path.exists() else {}
        about = dict(date=str(date.today()), machine=machine(), classes=result, changes=changes)
        path.write_text(json.dumps(known | {a.name: about}, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
