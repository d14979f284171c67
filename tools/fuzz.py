"""Hostile inputs: random names, tables, images, caches, models and results, each read as a user would

    python tools/fuzz.py                              10,000 inputs, about 8 minutes on one core
    python tools/fuzz.py --inputs 200 --seconds 60    a short run
    python tools/fuzz.py --kinds table --seed 7 --only 123    one input again, with its traceback

For every input, the outcome is success or one clean error: a `ValueError` or an `OSError` whose text is
short and names what is wrong. Anything else is a fault: another exception, an input that takes too long or
too much memory, a patient who is neither in the cohort nor in a finding, changed numbers that are taken for
the original ones, a name that becomes markup, code that is run. The exit code is the number of faults, at
most 100.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from PIL import Image
from cmus_fastai.app.casebook import CaseBook
from cmus_fastai.core import MODALITIES
from cmus_fastai.data.check import printable
from cmus_fastai.data.cohort import Cohort, images_of
from cmus_fastai.data.doctor import check_cohort, render_diagnosis
from cmus_fastai.data.settings import ImageSettings, read_square
from cmus_fastai.data.sources import is_image, slot_of
from cmus_fastai.evaluation.crossval import CrossValidation, cross_validate, measure_run
from cmus_fastai.evaluation.predict import load_predictions, predict_patients, write_prediction_pages
from cmus_fastai.evaluation.report import write_report
from cmus_fastai.explain.attribution import CasePredictor
from cmus_fastai.models.cmusnet import CMUSNet
from cmus_fastai.training.artifact import load_model, save_model
from cmus_fastai.training.config import ComputeConfig, TrainConfig
from cmus_fastai.training.features import FeatureCache, FeatureCases
from cmus_fastai.training.predictions import predictions

LIMIT = 20  # seconds for one input
MEMORY = 3 * 2**30  # bytes that one input may take beyond what the process has after its imports
LONGEST_ERROR = 600  # characters of the first line of an error
CLASSES = ['IgAN', 'LN', 'MN']
BACKBONE = 'test_efficientnet'  # a tiny model of timm


class Fault(Exception):
    "What must not happen."


class Slow(BaseException):
    "An input takes too long; no `except Exception` stops it."


class Canary:
    "Unpickled, it makes a file: code was run."

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), 'w')


# --- random pieces

NAMES = [
    '=1+1',
    "=cmd|' /C calc'!A0",
    '+1',
    '-2+3',
    '@SUM(A1)',
    '<script>alert(1)<script>',
    '<img src=x onerror=alert(1)>',
    '"><svg onload=alert(1)>',
    "it's",
    'a"b',
    '"',
    'a,b',
    'a;b',
    'a|b',
    'line\nbreak',
    'line\rbreak',
    'tab\there',
    '\x01\x07\x1b[31m',
    '\u202egnp',
    '\u200b',
    ' lead',
    'trail ',
    'dot.',
    '...',
    'CON',
    'nul.txt',
    'COM1',
    'é' * 60,
    'x' * 240,
    '😀',
    'NA',
    'nan',
    'null',
    'None',
    'True',
    '1e999',
    '007',
    '1.0',
    'a#page=1',
    'a#b',
    '%s%n%d',
    '{0}',
    '{{7*7}}',
    '{% raw %}',
    '${x}',
    '\\',
    'C:\\x',
    '~',
    '~root',
    '-rf',
    '$(touch canary)',
    '`id`',
    '\udcff\udcfe',
    'A\u0301',
    'Á',
    'masks',
    'OM',
    'TEM_1',
    'IM_IgA',
    'label',
    'P 1',
    'P1',
    '&amp;',
    "' onclick='x",
    '\u2028',
    '\x85',
]
STEMS = [
    'OM_1',
    'OM_2',
    'IM_1',
    'IM_IgA',
    'TEM_1',
    'TEM 2',
    'OM-ori_1',
    'OM_HE',
    'IF3',
    'IMG_1',
    'x',
    'TEM_<b>',
    'OM_=1',
]
SUFFIXES = [
    '.jpg',
    '.png',
    '.tif',
    '.bmp',
    '.gif',
    '.JPG',
    '.npy',
    '.dcm',
    '.txt',
    '.csv',
    '.pdf',
    '',
    '.jpg.png',
]


def any_name(rng, in_path=True):
    "A hostile name; `in_path`: one that a file can have."
    name = rng.choice(NAMES)
    if rng.random() < 0.2:
        name += rng.choice(NAMES)
    if rng.random() < 0.1:
        name = ''.join(chr(rng.choice([rng.randrange(1, 128), rng.randrange(160, 0x2500)])) for _ in range(6))
    if in_path:
        name = os.fsdecode(os.fsencode(name.replace('/', '_').replace('\0', '_'))[:240])
        name = name if name.strip('.') else 'dots' + name
    return name or 'x'


def mutate(rng, data):
    "Bytes, damaged."
    data, how = bytearray(data), rng.randrange(9)
    place = rng.randrange(len(data) or 1)
    if how == 0:
        return bytes(data[:place])
    if how == 1:
        return b''
    if how == 2:
        return bytes(len(data))
    if how == 3:
        return bytes(data[:place]) + rng.randbytes(rng.randrange(1, 40)) + bytes(data[place:])
    if how == 4:
        return bytes(data) + rng.randbytes(rng.randrange(1, 2000))
    if how == 5 and data:
        length = rng.randrange(1, 400)
        data[place : place + length] = bytes([rng.choice([0, 255, 127])]) * len(data[place : place + length])
    elif how == 6 and len(data) > 4:
        place = rng.randrange(min(len(data) - 4, 200))
        data[place : place + 4] = rng.choice(
            [b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f', bytes(4)]
        )
    else:
        for _ in range(rng.choice([1, 1, 3, 20])):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def picture(rng, side=24, mode='RGB'):
    "A random picture that is not blank."
    shape = (side, side, 3) if mode == 'RGB' else (side, side)
    values = np.frombuffer(rng.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)
    return Image.fromarray(values)


def encoded(image, kind, **options):
    "A picture as bytes."
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def valid_images(rng):
    "One small file of every format that needs no optional package, by suffix."
    grey = np.frombuffer(rng.randbytes(24 * 24 * 2), np.uint16).reshape(24, 24)
    files = {
        '.jpg': encoded(picture(rng), 'JPEG'),
        '.png': encoded(picture(rng), 'PNG'),
        '.bmp': encoded(picture(rng), 'BMP'),
        '.gif': encoded(picture(rng, mode='L'), 'GIF', save_all=True, append_images=[picture(rng, mode='L')]),
        '.webp': encoded(picture(rng), 'WEBP'),
        '.tif': encoded(Image.fromarray(grey), 'TIFF', compression='tiff_lzw'),
    }
    array = io.BytesIO()
    np.save(array, grey)
    return {**files, '.npy': array.getvalue()}


def bombs(canary):
    "Files that are small and want much, or want to run code."
    header = struct.pack('>II', 2**31 - 1, 2**31 - 1) + b'\x08\x02\0\0\0'
    png = b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + b'IHDR' + header + bytes(4)
    array = io.BytesIO()
    np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    head = "{'descr': '<f8', 'fortran_order': False, 'shape': (%d, %d), }"
    huge = b'\x93NUMPY\x01\0' + struct.pack('<H', 128) + (head % (2**40, 2**20)).ljust(127).encode() + b'\n'
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('archive/data.pkl', pickle.dumps(Canary(canary)))
        file.writestr('../../outside', bytes(10**6))
    large = encoded(Image.new('L', (30_000, 30_000)), 'PNG')
    bmp = (
        b'BM'
        + struct.pack('<IHHI', 100, 0, 0, 54)
        + struct.pack('<IiiHH', 40, 2**30, 2**30, 1, 24)
        + bytes(24)
    )
    tiff = (
        b'II*\0\x08\0\0\0\x01\0' + struct.pack('<HHII', 256, 4, 1, 2**31) + struct.pack('<I', 8)
    )  # its own next page
    svg = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>'
    found = [
        png,
        array.getvalue(),
        huge,
        archive.getvalue(),
        pickle.dumps(Canary(canary)),
        large,
        bmp,
        tiff,
        svg,
    ]
    return [*found, b'%!PS\n(canary) (w) file', b'GIF89a\xff\xff\xff\xff\x80\0\0' + bytes(6) + b';']


# --- what is checked after an input was read


class Markup(HTMLParser):
    "Collects what a page must not have."

    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed  # number of script elements
        self.found = []

    def handle_starttag(self, tag, attributes):
        if tag in ('script', 'iframe', 'object', 'embed', 'base'):
            self.found.append(f'<{tag}>')
        for name, value in attributes:
            if name.startswith('on') or (value or '').strip().lower().startswith('javascript:'):
                self.found.append(f'<{tag} {name}={value!r}>')
            is_link = name in ('src', 'href', 'action', 'srcset', 'poster', 'data', 'xlink:href')
            if is_link and re.match(r'\s*(?:https?:)?//', value or ''):
                self.found.append(f'<{tag} {name}={value!r}>')


def check_page(html):
    "A page must have no script, no handler, nothing from elsewhere, and be text that can be written."
    html = str(html)
    html.encode('utf-8')
    parser = Markup(0)
    parser.feed(html)
    if parser.found:
        raise Fault(f'markup in a page: {parser.found[:3]}')
    if re.search(r'url\(\s*["\']?(?:https?:)?//', html) or '@import' in html:
        raise Fault('a style sheet loads something from elsewhere')


def check_nothing_lost(cohort, files):
    "Every image file with a modality's name is in the cohort or in a finding: itself, its folder, patient."
    used = {str(path) for row in cohort for path in images_of(row)}
    reported = {str(cohort.root / problem.file) for problem in cohort.findings if problem.file}
    patients = {problem.patient for problem in cohort.findings if problem.patient}
    for file in files:
        known = str(file) in used or any(str(place) in reported for place in (file, *file.parents))
        in_name = any(patient.replace('/', '_') in file.name for patient in patients)  # of a flat folder
        if not known and not in_name and not patients & {*file.parts, '/'.join(file.parts[-3:-1])}:
            raise Fault(f'lost: {str(file)!r}')


def check_cohort_output(rng, cohort, folder):
    "What is made of a cohort can be written, read back, and shows names as text."
    str(cohort.report()).encode('utf-8')
    check_page(cohort._repr_html_())
    table = folder / 'written.csv'
    try:
        cohort.to_table(table)
    except ValueError as error:
        check_error(error, folder, [f(str(name)) for name in cohort.df.index for f in (str, printable)])
        return
    again = read_cohort(table, check=False)
    if set(again.df.index) != set(cohort.df.index):
        raise Fault(f'other patients after writing: {sorted(set(again.df.index) ^ set(cohort.df.index))[:3]}')
    if [images_of(row) for row in again] != [images_of(row) for row in cohort]:
        raise Fault('other images after writing')
    if rng.random() < 0.05:
        check_page(render_diagnosis(check_cohort(cohort)))


def check_error(error, folder, names=()):
    "An error must be clean: one of two types, short, and with the name of what is wrong."
    if not isinstance(error, (ValueError, OSError)):
        raise Fault(f'{type(error).__name__}: {error}') from error
    text = str(error)
    text.encode('utf-8')  # it can be printed
    first = text.splitlines()[0] if text.strip() else ''
    if not first or len(first) > LONGEST_ERROR:
        raise Fault(f'{type(error).__name__} of {len(first)} characters: {first[:200]}') from error
    known = {folder.name, *names}
    for path in folder.rglob('*'):
        known |= {
            os.fsencode(name).decode('utf-8', 'replace') for name in (path.name, path.stem) if len(name) > 2
        }
    if not any(name in text or repr(name)[1:-1] in text for name in known):
        raise Fault(f'{type(error).__name__} names no file: {first[:300]}') from error


def read_cohort(source, **options):
    "Read a cohort without its warnings."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Cohort.read(source, **options)


# --- the kinds of input: each returns a function that reads what was made


class Shared:
    "What all inputs need: valid images, a model, a cohort, a cache and a cross-validation."

    def __init__(self, folder, kinds):
        self.folder = folder
        self.canary = folder / 'canary'
        rng = random.Random(0)
        self.images = valid_images(rng)
        self.bombs = bombs(self.canary)
        self.pictures = [encoded(picture(rng), 'PNG') for _ in range(64)]
        if {'cache', 'model', 'run', 'predictions', 'evidence'} & {*kinds}:
            self.make_model()
        if 'run' in kinds:
            self.make_run()

    def make_model(self):
        "Twelve patients, a tiny model, kept maps, and predictions."
        torch.manual_seed(0)
        for i in range(12):
            patient = self.folder / 'patients' / CLASSES[i % 3] / f'P{i}'
            patient.mkdir(parents=True)
            for j, modality in enumerate(MODALITIES):
                (patient / f'{modality}_1.png').write_bytes(self.pictures[3 * i + j])
        self.cohort = read_cohort(self.folder / 'patients')
        self.model = CMUSNet(3, BACKBONE, weights=None, proj=8).eval()
        save_model(self.model, self.folder / 'model', CLASSES, size=32)
        self.loaded = load_model(self.folder / 'model')
        probs = np.random.default_rng(0).dirichlet([1, 1, 1], 12)
        predictions(self.cohort.df.index, self.cohort.df.label, probs, CLASSES).to_csv(
            self.folder / 'preds.csv'
        )
        self.probs = probs
        predict_patients(
            self.folder / 'model',
            self.folder / 'patients',
            self.folder / 'new.csv',
            ComputeConfig(progress=False),
        )
        self.small = self.cohort.subset(['P0', 'P1'])
        cache = FeatureCache(self.folder / 'cache', n_views=1, pooled=True, progress=False)
        self.prints = cache.fill(self.model, self.small, size=32)
        self.maps = self.read_maps(cache)

    def read_maps(self, cache):
        "The maps of both patients."
        cases = FeatureCases(cache, self.prints, self.small)
        return [cases.maps(i, modality) for i in range(2) for modality in MODALITIES]

    def config(self):
        "Settings of a training of a second."
        return TrainConfig(backbone=BACKBONE, weights=None, size=32, views=1, epochs=1)

    def cross_validate(self, folder):
        "Two folds with the tiny model."
        cache = FeatureCache(self.folder / 'maps', n_views=1, progress=False)
        options = dict(k=2, cache=cache, page=False, compute=ComputeConfig(progress=False, device='cpu'))
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return cross_validate(self.cohort, folder, self.config(), **options)

    def make_run(self):
        "A finished cross-validation and its figures."
        self.run = self.cross_validate(self.folder / 'cv')
        self.run_patients = sorted(self.run.test.patient)


def fuzz_folder(rng, folder, shared):
    "A folder of patients with hostile names, links and files."
    root = folder / 'cohort'
    root.mkdir()
    files, layout = [], rng.choice(['class/patient'] * 4 + ['patient', 'modality', 'flat'])
    classes = [any_name(rng) for _ in range(rng.randrange(1, 4))]
    for _ in range(rng.randrange(1, 6)):
        label, patient = rng.choice(classes), any_name(rng)
        for _ in range(rng.randrange(4)):
            name = rng.choice(STEMS) + (rng.choice(SUFFIXES) if rng.random() < 0.3 else '.png')
            place = {
                'class/patient': root / label / patient / name,
                'patient': root / patient / name,
                'modality': root / rng.choice(['OM', 'IM', 'TEM']) / f'{patient}_{name}'[-200:],
                'flat': root / f'{name[:2]}_{label}_{patient}_1.png'[:200],
            }[layout]
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                good = rng.choice(shared.pictures)
                place.write_bytes(good if rng.random() < 0.8 else mutate(rng, good))
                files.append(place)
    places = [path for path in root.rglob('*') if path.is_dir()] or [root]
    for _ in range(rng.choice([0, 0, 1, 2])):
        add_oddity(rng, rng.choice([*places, root]), shared)
    bearing = [
        file for file in files if is_image(file) and slot_of(file.name) and not file.name.startswith('.')
    ]

    def attempt():
        cohort = read_cohort(root, ids=rng.choice(['name', 'class/name']))
        check_nothing_lost(cohort, bearing)
        check_cohort_output(rng, cohort, folder)

    return attempt


def add_oddity(rng, place, shared):
    "A link, a pipe, a folder with the name of an image, a hostile table …"
    name = place / (rng.choice(STEMS) + rng.choice(['.png', '', '.jpg', '.csv']))
    outside = shared.folder / 'outside'
    outside.mkdir(exist_ok=True)
    kind = rng.randrange(9)
    with contextlib.suppress(OSError):
        if kind == 0:
            name.symlink_to(place)
        elif kind == 1:
            name.symlink_to(outside)
        elif kind == 2:
            name.symlink_to(
                rng.choice(['/dev/zero', '/dev/stdin', '/proc/self/mem', '/etc/passwd', 'nowhere', name.name])
            )
        elif kind == 3:
            os.mkfifo(name)
        elif kind == 4:
            name.mkdir()
        elif kind == 5:
            (place / 'labels.csv').write_bytes(any_table(rng, ['P 1', 'P1', 'x'])[0])
        elif kind == 6:
            name.joinpath(*['d'] * 30).mkdir(parents=True)
        elif kind == 7:
            name.write_bytes(rng.choice(shared.bombs))
        else:
            (place / ('.' + name.name)).write_bytes(rng.choice(shared.pictures))


def any_cell(rng, text):
    "A cell of a table: the text, quoted as it should be."
    text = text.replace('\udcff', '?').replace('\udcfe', '?')
    if re.search('[,;\t"\n\r]', text) or rng.random() < 0.1:
        return '"' + text.replace('"', '""') + '"'
    return text


NUMBERS = [
    '',
    'nan',
    '1e400',
    '-1',
    '0',
    '9' * 400,
    '1,5',
    '0x10',
    'inf',
    '0.2 um',
    '[1]',
    '{"a": 1}',
    '１',
    '1_000',
    '1e-400',
]


def any_table(rng, patients):
    "A table of patients with hostile cells, and the patients whose rows were left as they should be."
    by_image = rng.random() < 0.5
    header = [
        'patient',
        'label',
        'path',
        'modality',
        'nm_per_px',
        'page',
        'stain',
        'notes',
        'group',
        'region',
    ]
    header = header if by_image else ['patient', 'label', 'OM', 'IM', 'TEM', 'group', 'notes']
    if rng.random() < 0.2:
        header[rng.randrange(1, len(header))] = rng.choice([*header, *NAMES])
    separator = rng.choice(',,,;\t')
    lines = [separator.join(any_cell(rng, name) for name in header)]
    for patient in patients:
        files = [f'OM_{rng.randrange(3)}.png', f'IM_{rng.randrange(3)}.png', f'TEM_{rng.randrange(3)}.png']
        if rng.random() < 0.2:
            files[rng.randrange(3)] = rng.choice(
                [
                    *NAMES,
                    '../../etc/passwd',
                    '/dev/zero',
                    '/dev/stdin',
                    'OM_1.png|OM_2.png',
                    'OM_1.png#page=99999999',
                    'OM_0.png#0,0,9,9',
                    'x' * 5000,
                    'http://x/y.png',
                ]
            )
        cells = {
            'patient': patient,
            'label': rng.choice([*CLASSES, any_name(rng, False)]),
            'path': files[0],
            'OM': files[0],
        }
        cells |= {'IM': files[1], 'TEM': files[2], 'modality': rng.choice(['OM', 'OM', 'IF', *NAMES])}
        odd = [any_name(rng, False), *rng.choices(NUMBERS, k=3)]
        lines.append(separator.join(any_cell(rng, cells.get(name, rng.choice(odd))) for name in header))
    if rng.random() < 0.3:
        damaged = rng.randrange(len(lines))
        lines[damaged] = rng.choice(
            [
                lines[damaged] + separator * 3,
                lines[damaged][: rng.randrange(1, 20)],
                '"' + lines[damaged],
                lines[damaged].replace(separator, separator + '"', 1),
                '',
                '\0' * 9,
                '"',
                '# note',
                '{"patient": 1}',
                'x' * 200_000,
                separator * 5000,
                lines[damaged] + '"',
            ]
        )
        patients = [p for i, p in enumerate(patients, 1) if i != damaged]
    text = rng.choice(['\n', '\n', '\r\n', '\r']).join(lines) + '\n'
    encoding = rng.choice(['utf-8'] * 7 + ['utf-8-sig', 'utf-16', 'latin-1', 'utf-32'])
    data = text.encode(encoding, 'replace')
    if rng.random() < 0.2:
        return mutate(rng, data), []
    return data, patients if encoding.startswith('utf') else []


def fuzz_table(rng, folder, shared):
    "A table of images or of patients."
    for modality in MODALITIES:
        for i in range(3):
            (folder / f'{modality}_{i}.png').write_bytes(rng.choice(shared.pictures))
    given = [
        any_name(rng, False).replace('\udcff', '?').replace('\udcfe', '?') for _ in range(rng.randrange(1, 6))
    ]
    data, patients = any_table(rng, given)
    table = folder / f'table{rng.choice([".csv", ".csv", ".tsv"])}'
    table.write_bytes(data)

    def attempt():
        cohort = read_cohort(table, check=rng.choice(['full', 'fast', False]))
        told = cohort.report() + ' '.join(f'{p.patient} {p.file} {p.what}' for p in cohort.findings)
        rows = any(problem.kind == 'missing patient' for problem in cohort.findings)
        for patient in patients:
            name = patient.strip().replace('\r', '\n')
            is_known = name in cohort or name in told or repr(name)[1:-1] in told
            if name and not is_known and not (rows and name in ('NA', 'nan', 'null')):
                raise Fault(f'lost: patient {patient!r}')
        check_cohort_output(rng, cohort, folder)

    return attempt


def fuzz_image(rng, folder, shared):
    "A damaged image next to a good one."
    suffix = rng.choice([*shared.images])
    data = shared.images[suffix]
    if rng.random() < 0.25:
        data = rng.choice(shared.bombs)
    if rng.random() < 0.85:
        data = mutate(rng, data)
    if rng.random() < 0.2:
        suffix = rng.choice(
            [
                '.jpg',
                '.png',
                '.tif',
                '.dcm',
                '.mrc',
                '.dm3',
                '.ser',
                '.svs',
                '.npy',
                '.avif',
                '.jp2',
                '.lsm',
            ]
        )
    patient = folder / 'cohort' / 'IgAN' / 'P1'
    patient.mkdir(parents=True)
    (patient / 'TEM_good.png').write_bytes(shared.pictures[0])
    file = patient / f'OM_bad{suffix}'
    file.write_bytes(data)

    def attempt():
        cohort = read_cohort(folder / 'cohort', check=rng.choice(['full', 'full', 'fast', False]))
        check_nothing_lost(cohort, [file])
        if file in cohort['P1'].OM:
            pixels = read_square(file, ImageSettings(size=32))
            if pixels.shape != (32, 32, 3):
                raise Fault(f'pixels of shape {pixels.shape}')

    return attempt


def fuzz_cache(rng, folder, shared):
    "A kept map that was damaged, exchanged, or replaced."
    shutil.copytree(shared.folder / 'cache', folder / 'cache')
    files = sorted(path for path in (folder / 'cache').rglob('*') if path.is_file())
    file, other = rng.sample(files, 2)
    how = rng.randrange(6)
    if how == 0:
        file.write_bytes(other.read_bytes())
    elif how == 1:
        file.write_bytes(tensors(rng, torch.zeros(tuple(shared.maps[0][0].shape))))
    elif how == 2:
        file.write_bytes(tensors(rng, torch.rand(rng.choice([(1,), (7, 1, 1), (3, 2, 2), (0,)]))))
    elif how == 3:
        file.write_bytes(rng.choice(shared.bombs))
    elif how == 4:
        file.write_bytes(hostile_safetensors(rng, file.read_bytes()))
    else:
        file.write_bytes(mutate(rng, file.read_bytes()))

    def attempt():
        cache = FeatureCache(folder / 'cache', n_views=1, pooled=True, progress=False)
        cache.fill(shared.model, shared.small, size=32)
        for found, kept in zip(shared.read_maps(cache), shared.maps):
            # Made again in a batch of its own, a map may differ in its last digits
            if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, kept)):
                raise Fault('a changed map was taken for the original one')

    return attempt


def tensors(rng, tensor):
    "A kept map of any type."
    from safetensors.torch import save

    return save(
        {rng.choice(['map', 'map', 'x']): tensor.to(rng.choice([torch.float16, torch.float32, torch.int8]))}
    )


def hostile_safetensors(rng, data):
    "A file of tensors whose header lies."
    length = struct.unpack('<Q', data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    how = rng.randrange(8)
    if how == 0:
        return struct.pack('<Q', rng.choice([2**63, 2**40, 0, length + 1, length - 1])) + data[8:]
    if how == 1:
        header = header.replace(b'F32', b'F64').replace(b'F16', b'F32')
    elif how == 2:
        header = re.sub(rb'\[(\d+),(\d+)\]', rb'[\2,\1]', header, count=1)
    elif how == 3:
        header = re.sub(rb'"shape":\[', rb'"shape":[99999999999,', header, count=1)
    elif how == 4:
        header = b'[' * rng.choice([10, 5000]) + header
    elif how == 5:
        header = header[:-1] + b',' + header[1:]
    elif how == 6:
        header = mutate(rng, header)
    else:
        body = body[: rng.randrange(len(body) + 1)]
    return struct.pack('<Q', len(header)) + header + body


def hostile_json(rng, text):
    "JSON with other values, types, keys or nesting."
    values = [
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        '',
        'x',
        '../../x',
        'hf-hub:a/b',
        [],
        {},
        [[]],
        'nan',
        '<b>',
        0.5,
        [1, 2, 3],
    ]
    how = rng.randrange(8)
    if how == 0:
        return '[' * rng.choice([100, 200_000])
    if how == 1:
        return text.replace(': ', rng.choice([': NaN, "x": ', ': -Infinity, "x": ', ': 1e999, "x": ']), 1)
    if how == 2:
        return text.rstrip()[:-1] + ', ' + text.lstrip()[1:]  # every key twice
    if how == 3:
        return json.dumps(rng.choice(values))
    if how == 4:
        return rng.choice(['', '\0', '\ufeff' + text, 'null', text + text])
    tree = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 4])):
        change_tree(rng, tree, values)
    return json.dumps(tree)


def change_tree(rng, tree, values):
    "Change, remove or add something at a random place of parsed JSON."
    node = tree
    while isinstance(node, (dict, list)) and node:
        key = rng.choice([*node]) if isinstance(node, dict) else rng.randrange(len(node))
        inner = node[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            how = rng.random()
            if how < 0.2:
                del node[key]
            elif how < 0.3 and isinstance(node, dict):
                node[any_name(rng)] = copy.deepcopy(rng.choice(values))
            else:
                node[key] = copy.deepcopy(rng.choice(values))
            return
        node = inner


def fix_checksums(folder):
    "Checksums as whoever changed the files would write them, too."
    import hashlib

    file = folder / 'checksums.json'
    if file.is_symlink():
        return
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        known = json.loads(file.read_text())
        table = known.get('files', known)
        for name in table:
            if isinstance(table[name], str) and not (folder / name).is_symlink():
                table[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        file.write_text(json.dumps(known, indent=1) + '\n')  # as the package writes it


def fuzz_model(rng, folder, shared):
    "A folder of a model in which a file was changed, exchanged or replaced."
    model = folder / 'model'
    shutil.copytree(shared.folder / 'model', model)
    files = sorted(path for path in model.iterdir() if path.suffix in ('.json', '.safetensors'))
    file = rng.choice(files)
    data, how = file.read_bytes(), rng.randrange(6)
    if how == 0:
        file.unlink()
    elif how == 1:
        changed = rng.choice(shared.bombs) if rng.random() < 0.5 else mutate(rng, data)
        file.write_bytes(changed)
    elif how == 2:
        file.unlink()
        file.symlink_to(rng.choice(['/dev/zero', file.name, '/etc/passwd', 'nowhere']))
    elif file.suffix == '.json':
        file.write_text(hostile_json(rng, data.decode()), encoding='utf-8')
    elif how == 3:
        file.write_bytes(not_finite(rng, file))
    else:
        file.write_bytes(hostile_safetensors(rng, data))
    is_same = file.is_file() and file.resolve() == file and file.read_bytes() == data
    fixed = rng.random() < 0.6
    if fixed:
        fix_checksums(model)

    def attempt():
        network, config = load_model(model)
        if not fixed and not is_same:
            raise Fault(f'a model was loaded although {file.name} was changed')
        if not all(p.isfinite().all() for p in network.state_dict().values() if p.is_floating_point()):
            raise Fault('a model with weights that are not finite was loaded')
        with torch.inference_mode():
            bags = [(torch.rand(1, 1, 3, 32, 32), torch.ones(1, 1, dtype=torch.bool)) for _ in MODALITIES]
            out = network(*bags)
        if len(config['classes']) != out.fusion.shape[1]:
            raise Fault('other classes than outputs')

    return attempt


def not_finite(rng, file):
    "The weights with a NaN, or all as another type."
    from safetensors.torch import load_file, save

    state = load_file(file)
    name = rng.choice([name for name in state if state[name].is_floating_point()])
    if rng.random() < 0.7:
        state[name] = state[name].clone()
        state[name].flatten()[0] = rng.choice([float('nan'), float('inf')])
    else:
        state[name] = state[name].to(torch.int8)
    return save(state)


def fuzz_run(rng, folder, shared):
    "A finished cross-validation in which a file was changed."
    run = folder / 'cv'
    shutil.copytree(shared.folder / 'cv', run)
    files = sorted(
        path for path in run.rglob('*') if path.is_file() and path.stat().st_size and path.suffix != '.lock'
    )
    file = rng.choice(files)
    data = file.read_bytes()
    if file.suffix == '.json' and rng.random() < 0.6:
        file.write_text(hostile_json(rng, data.decode()), encoding='utf-8')
    elif file.suffix == '.csv' and rng.random() < 0.6:
        file.write_bytes(hostile_csv(rng, data.decode()).encode('utf-8', 'replace'))
    else:
        file.write_bytes(mutate(rng, data))
    resume = file.read_bytes() != data and rng.random() < (0.5 if file.name == 'run.json' else 0.05)

    def attempt():
        found = shared.cross_validate(run) if resume else CrossValidation(run)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            measures = measure_run(found)
        if sorted(found.test.patient) != shared.run_patients or len(measures.first) != len(
            shared.run_patients
        ):
            raise Fault(f'lost: {len(measures.first)} of {len(shared.run_patients)} patients are left')

    return attempt


def hostile_csv(rng, text):
    "A table of predictions with lines or cells changed."
    lines = text.splitlines()
    how = rng.randrange(6)
    if how == 0:
        lines = lines[: rng.randrange(len(lines))]
    elif how == 1:
        lines.append(rng.choice(lines))
    elif how == 2:
        rng.shuffle(lines)
    elif how == 3:
        lines[0] = lines[0].replace(rng.choice(lines[0].split(',')), any_cell(rng, any_name(rng, False)))
    else:
        row = rng.randrange(len(lines))
        cells = lines[row].split(',')
        cells[rng.randrange(len(cells))] = any_cell(rng, rng.choice([any_name(rng, False), *NUMBERS]))
        lines[row] = ','.join(cells)
    return '\n'.join(lines) + '\n'


def fuzz_predictions(rng, folder, shared):
    "A table of predictions for the explorer."
    data = (shared.folder / 'preds.csv').read_text()
    file = folder / 'preds.csv'
    file.write_bytes(
        hostile_csv(rng, data).encode('utf-8', 'replace')
        if rng.random() < 0.7
        else mutate(rng, data.encode())
    )

    def attempt():
        model, config = shared.loaded
        book = CaseBook(CasePredictor(model, config['classes'], size=32), shared.cohort, file)
        if not np.isfinite(book.predictions[[f'p_{name}' for name in CLASSES]].to_numpy(float)).all():
            raise Fault('probabilities that are not finite')

    return attempt


def fuzz_evidence(rng, folder, shared):
    "A table of new patients, changed, and its pages."
    data = (shared.folder / 'new.csv').read_text()
    file = folder / 'new.csv'
    changed = hostile_csv(rng, data).encode('utf-8', 'replace')
    file.write_bytes(changed if rng.random() < 0.8 else mutate(rng, data.encode()))

    def attempt():
        table = load_predictions(file)
        for page in write_prediction_pages(table, folder / 'new.html', title=any_name(rng)):
            check_page(page.read_text(encoding='utf-8'))

    return attempt


def fuzz_page(rng, folder, shared):
    "A report about patients and classes with hostile names."
    classes, patients = [], []
    while len(classes) < 3:
        classes = list(dict.fromkeys([*classes, any_name(rng)]))
    root = folder / 'cohort'
    for i in range(9):
        patient = f'{any_name(rng)[:60]}{i}'
        place = root / classes[i % 3] / patient / 'OM_1.png'
        place.parent.mkdir(parents=True)
        place.write_bytes(shared.pictures[i])
        patients.append(patient)

    def attempt():
        cohort = read_cohort(root)
        probs = np.random.default_rng(0).dirichlet([1, 1, 1], len(cohort))
        preds = predictions(cohort.df.index, cohort.df.label, probs, cohort.classes)
        history = pd.DataFrame(dict(epoch=[0, 1], train_loss=[1, 0.5], valid_loss=[1, 0.6]))
        facts = dict(title=any_name(rng), settings={any_name(rng): any_name(rng)}, train=cohort, test=cohort)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            report = write_report(
                folder / 'report.html', **facts, history=history, preds=preds, notes=[any_name(rng)]
            )
        check_page(report.read_text(encoding='utf-8'))
        check_page(render_diagnosis(check_cohort(cohort)))

    return attempt


KINDS = {
    'folder': (fuzz_folder, 0.24),
    'table': (fuzz_table, 0.25),
    'image': (fuzz_image, 0.2),
    'cache': (fuzz_cache, 0.09),
    'model': (fuzz_model, 0.1),
    'run': (fuzz_run, 0.05),
    'predictions': (fuzz_predictions, 0.06),
    'evidence': (fuzz_evidence, 0.03),
    'page': (fuzz_page, 0.01),
}


# --- running


def stop(number, frame):
    "Called when an input takes too long."
    raise Slow(f'more than {LIMIT} s')


def try_input(rng, kind, folder, shared):
    "The outcome of one input, and the fault if it is one."
    folder.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(LIMIT)
    faulthandler.dump_traceback_later(5 * LIMIT, exit=True)
    try:
        attempt = KINDS[kind][0](rng, folder, shared)
        with contextlib.redirect_stderr(io.StringIO()):
            outcome, fault = settle(attempt, folder)
    except Slow as error:
        outcome, fault = 'FAULT', error
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if fault is None and grown > MEMORY / 2:
        fault = Fault(f'{grown / 2**30:.1f} GiB of memory')
    if shared.canary.exists():
        fault = Fault('code of the input was run')
        shared.canary.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    return 'FAULT' if fault else outcome, fault


def settle(attempt, folder):
    "Run an attempt: 'read', 'refused', or the fault."
    try:
        attempt()
    except Fault as fault:
        return 'FAULT', fault
    except Exception as error:
        try:
            check_error(error, folder)
        except Exception as fault:
            return 'FAULT', fault if isinstance(fault, Fault) else error
        return 'refused', None
    return 'read', None


def limit_memory():
    "A process that wants too much gets a `MemoryError`."
    with contextlib.suppress(OSError, ValueError):
        used = int(re.search(r'VmSize:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def print_counts(counts, peak, seconds):
    "A line for each kind of input."
    print(f'{"":12}{"inputs":>8}{"read":>8}{"refused":>9}{"FAULT":>7}')
    rows = [*KINDS, 'all'] if len({kind for kind, _ in counts}) > 1 else {kind for kind, _ in counts}
    for kind in rows:
        one = [
            sum(n for (k, o), n in counts.items() if kind in (k, 'all') and o == outcome)
            for outcome in ('read', 'refused', 'FAULT')
        ]
        print(f'{kind:12}{sum(one):8}{one[0]:8}{one[1]:9}{one[2]:7}')
    print(f'{seconds:.0f} s, at most {peak / 2**30:.1f} GiB of memory', flush=True)


def show_fault(name, fault, whole):
    "Print a fault: its line, and the place, or the whole traceback."
    cause = fault.__cause__ or fault
    frames = traceback.extract_tb(cause.__traceback__)
    place = next(
        (f'{Path(f.filename).name}:{f.lineno}' for f in reversed(frames) if 'cmus_fastai' in f.filename), ''
    )
    text = f'{type(fault).__name__}: {fault}'.encode('utf-8', 'backslashreplace').decode()
    print(f'FAULT {name} at {place}: {text[:400]}', flush=True)
    if whole:
        traceback.print_exception(cause)


def main():
    "Try all inputs; returns the number of faults."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--inputs', type=int, default=10_000, help='how many')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other inputs')
    parser.add_argument('--seconds', type=float, default=1200, help='stop after this time, with a fault')
    parser.add_argument('--kinds', nargs='+', default=[*KINDS], choices=[*KINDS])
    parser.add_argument('--only', type=int, help='number of one input, to see its traceback')
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', module='timm')
    start, counts, faults = time.time(), Counter(), []
    weights = [KINDS[kind][1] for kind in options.kinds]
    with tempfile.TemporaryDirectory(prefix='cmus_fuzz-') as folder:
        shared = Shared(Path(folder), options.kinds)
        limit_memory()
        signal.signal(signal.SIGALRM, stop)
        for i in range(options.inputs) if options.only is None else [options.only]:
            rng = random.Random(f'{options.seed} {i}')
            kind = rng.choices(options.kinds, weights)[0]
            outcome, fault = try_input(rng, kind, Path(folder) / f'case-{i:06}', shared)
            counts[kind, outcome] += 1
            if fault:
                faults.append(fault)
                show_fault(f'{kind} {i}', fault, options.only is not None)
            if time.time() - start > options.seconds:
                faults.append(Fault('not finished'))
                print(f'FAULT: only {i + 1} of {options.inputs} inputs in {options.seconds:.0f} s')
                break
    print_counts(counts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.time() - start)
    return min(len(faults), 100)


if __name__ == '__main__':
    sys.exit(main())
