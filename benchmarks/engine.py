"""Frozen encoders with OpenVINO compared with PyTorch: time, agreement, and the effect of bfloat16.

Encoders get random images in batches of 8, in turns. "eager" is PyTorch in float32, "bf16 eager" the same
under autocast. "fp32" and "bf16": `OpenVINOEngine`, and "bare" is OpenVINO's own loop: one compiled network
in float32, one request, no copy of its output. Times are medians in milliseconds an image; ratios are medians
repeat by repeat. "diff" is the largest difference of any feature from PyTorch's in float32, "cosine" the mean
cosine similarity of bfloat16 maps with float32 maps.

The second table is the effect of bfloat16 on predictions: the head is trained on maps of one precision, and
classifies test patients from maps of the same precision or of the other one.

    python benchmarks/engine.py --json cmus_fastai/results/engine.json
"""

import tempfile
from functools import partial
from pathlib import Path
import numpy as np
import torch
from common import Table, arguments, has_bf16, interleaved, machine, median, ratio, write
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.phantom import make_phantom
from cmus_fastai.models.encoder import Encoder
from cmus_fastai.training.config import ComputeConfig, TrainConfig
from cmus_fastai.training.engine import BATCH, OpenVINOEngine, TorchEngine
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.training.fit import predict_outputs, train_model

TRAINED = 'tf_efficientnet_lite0'
ENGINE = dict(
    backbone=('backbone', '<32'),
    eager=('eager ms', '>9.2f'),
    bf16_eager=('bf16 eager', '>11.2f'),
    bare=('bare ms', '>9.2f'),
    fp32=('fp32 ms', '>9.2f'),
    bf16=('bf16 ms', '>9.2f'),
    to_eager=('fp32/eager', '>11.2f'),
    bf16_to_eager=('bf16/eager', '>11.2f'),
    to_bare=('fp32/bare', '>10.2f'),
    difference=('diff', '>9.1e'),
    cosine=('cosine', '>8.4f'),
)
EFFECT = dict(
    trained=('maps in training', '<17'),
    tested=('maps in test', '<13'),
    accuracy=('accuracy', '>9.3f'),
    same=('same class', '>11.1%'),
    difference=('largest difference of p', '>24.4f'),
)


COLUMNS = dict(engine=ENGINE, effect=EFFECT)


def bare_loop(engine, images):
    "OpenVINO's own loop over batches, without anything of ours."
    request = engine._request(BATCH)
    arrays = [piece.numpy() for piece in images.split(BATCH)]
    return lambda: [request.infer([array], share_inputs=True, share_outputs=True) for array in arrays]


def compare_engines(args, name):
    "Times and agreement of one backbone."
    weights = 'package' if name == TRAINED else None
    encoder = Encoder(name, weights).eval()
    images = torch.rand(args.images, 3, args.size, args.size)
    engines = dict(
        eager=TorchEngine(encoder),
        bf16_eager=TorchEngine(encoder, 'bf16'),
        fp32=OpenVINOEngine(encoder, args.size),
        bf16=OpenVINOEngine(encoder, args.size, 'bf16'),
    )

    def encode(engine):
        return [engine(piece) for piece in images.split(BATCH)]

    ways = {way: partial(encode, engine) for way, engine in engines.items()}
    ways['bare'] = bare_loop(engines['fp32'], images)
    times = interleaved(ways, args.repeats)
    maps = {way: torch.cat(ways[way]()).float() for way in engines}
    cosine = torch.cosine_similarity(maps['bf16'].flatten(1), maps['eager'].flatten(1))
    return dict(
        {way: median(seconds) / args.images * 1000 for way, seconds in times.items()},
        to_eager=ratio(times['fp32'], times['eager']),
        bf16_to_eager=ratio(times['bf16'], times['eager']),
        to_bare=ratio(times['fp32'], times['bare']),
        difference=(maps['fp32'] - maps['eager']).abs().max().item(),
        cosine=cosine.mean().item(),
    )


def predictions(args, train, test, trained, tested):
    "Probabilities of the test patients, [patients,K], by a head trained on maps of one precision."
    config, compute = TrainConfig(size=args.size, epochs=args.epochs), ComputeConfig(progress=False)
    caches = {name: FeatureCache(precision=name, progress=False) for name in {trained, tested}}
    learn = train_model(config, train, cache=caches[trained], compute=compute)
    learn.dls.cache = caches[tested]
    return predict_outputs(learn, test).fusion


def effect_of_bf16(args, table):
    "Fill the table of predictions from maps in bfloat16."
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / 'phantom'
        make_phantom(root, args.patients, size=args.size, progress=False)
        train, test = Cohort.from_folder(root, check='fast', progress=False).split(1 / 3)
        reference = None
        for trained, tested in ((None, None), (None, 'bf16'), ('bf16', 'bf16')):
            preds = predictions(args, train, test, trained, tested)
            probs = preds.filter(like='p_').to_numpy(float)
            reference = probs if reference is None else reference
            table.add(
                trained=trained or 'fp32',
                tested=tested or 'fp32',
                accuracy=(preds.pred == preds.label).mean(),
                same=float(np.mean(probs.argmax(1) == reference.argmax(1))),
                difference=float(np.abs(probs - reference).max()),
            )


def main():
    args = arguments(
        __doc__,
        size=(224, 'side of the images, px'),
        images=(32, 'images that are encoded in a repeat'),
        backbones=dict(
            nargs='+', default=[TRAINED, 'resnet18', 'swin_tiny_patch4_window7_224'], help='timm backbones'
        ),
        patients=(225, 'simulated patients for the effect of bfloat16; 0: leave it out'),
        epochs=(25, 'of training the head'),
    )
    print(machine())
    torch.manual_seed(0)
    table = Table(f'encoders, batches of {BATCH} at {args.size} px; medians of {args.repeats}', ENGINE)
    for name in args.backbones:
        table.add(backbone=name, **compare_engines(args, name))
    effect = Table('predictions of test patients from maps in bfloat16 (OpenVINO)', EFFECT)
    if args.patients:
        effect_of_bf16(args, effect)
    write(args, dict(engine=table, effect=effect), bf16_instructions=bool(has_bf16('cpu')))


if __name__ == '__main__':
    main()
