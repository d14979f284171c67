"""Inference in bfloat16 compared with float32: time and agreement.

Simulated patients are read once and then classified in float32 and under autocast to bfloat16, in turns.
Times are medians in milliseconds a patient, without reading. Convolutions work channels-last in both, as is
the default of `Encoder`. Agreement is the share of test patients with the same most probable class, and the
largest difference of any probability. It is informative only for a trained head. EfficientNet-Lite0 has
ImageNet weights from a package, and its head is trained on kept feature maps for --epochs epochs. Other
backbones and their heads have random weights (see "head"), and only their times count. "right" is the
accuracy on test patients, in float32 and in bfloat16.

    python benchmarks/precision.py --json cmus_fastai/results/precision.json
"""

import tempfile
from functools import partial
from pathlib import Path
import torch
from common import (
    BACKBONE,
    PEAK,
    Table,
    arguments,
    flops,
    has_bf16,
    interleaved,
    machine,
    median,
    network,
    ratio,
    write,
)
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.data.phantom import make_phantom
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.training.learner import cmus_learner

TRAINED = 'tf_efficientnet_lite0'
COLUMNS = dict(
    backbone=('backbone', '<32'),
    head=('head', '<9'),
    fp32=('fp32 ms', '>9.0f'),
    bf16=('bf16 ms', '>9.0f'),
    to_fp32=('bf16/fp32', '>11.2f'),
    same=('same class', '>12.1%'),
    difference=('diff', '>9.4f'),
    right_fp32=('right fp32', '>12.1%'),
    right_bf16=('right bf16', '>12.1%'),
    of_peak=('of peak', '>9.1%'),
)


def make_patients(args, folder):
    "Training and test patients, simulated."
    make_phantom(folder, args.patients, size=args.size, progress=False)
    return Cohort.from_folder(folder, check='fast', progress=False).split(1 / 3)


def load_batches(args, train, test):
    "All test patients in batches, and their labels."
    device = torch.device(args.device)
    dls = train.dataloaders(valid=test, size=args.size, bs=args.bs, device=device, num_workers=0)
    batches = list(dls.valid)
    return batches, torch.cat([b[3] for b in batches]).as_subclass(torch.Tensor)


def train_network(args, train):
    "A network whose head is trained on kept feature maps of frozen ImageNet encoders."
    dls = train.dataloaders(
        valid=0.2,
        size=args.size,
        cache=FeatureCache(bs=16, progress=False),
        device=torch.device(args.device),
        num_workers=0,
    )
    learn = cmus_learner(dls, TRAINED, seed=0, precision=None)
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_preset(args.epochs)
    return learn.model


def predict(net, batches, bf16, device):
    "Probabilities of all batches, [patients,K]."
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        return torch.cat([net(*b[:3]).fusion.float().softmax(1) for b in batches])


def accuracy(probabilities, y):
    "Share of patients whose most probable class is the right one."
    return (probabilities.argmax(1) == y).float().mean().item()


def compare(args, net, batches, y, is_trained):
    "Times and agreement of both precisions, as columns of the table."
    ways = {name: partial(predict, net, batches, name == 'bf16', args.device) for name in ('fp32', 'bf16')}
    fp32, bf16 = (way() for way in ways.values())
    times = interleaved(ways, args.repeats, args.device)
    of_peak = None
    if args.peak_tflops:
        of_peak = flops(ways['bf16']) / median(times['bf16']) / args.peak_tflops / 1e12
    return dict(
        fp32=median(times['fp32']) / len(y) * 1000,
        bf16=median(times['bf16']) / len(y) * 1000,
        to_fp32=ratio(times['bf16'], times['fp32']),
        same=accuracy(bf16, fp32.argmax(1)),
        difference=(fp32 - bf16).abs().max().item(),
        right_fp32=accuracy(fp32, y) if is_trained else None,
        right_bf16=accuracy(bf16, y) if is_trained else None,
        of_peak=of_peak,
    )


def main():
    args = arguments(
        __doc__,
        **{name: BACKBONE[name] for name in ('size', 'proj')},
        **PEAK,
        backbones=dict(
            nargs='+', default=[TRAINED, 'swin_tiny_patch4_window7_224', 'resnet50'], help='timm backbones'
        ),
        patients=(150, 'simulated patients, two thirds of them to train the head'),
        epochs=(25, 'of training the head'),
        bs=(4, 'patients in a batch'),
    )
    print(machine(args.device))
    native = bool(has_bf16(args.device))
    if not native:
        print('This processor has no bfloat16 instructions. They are emulated, so expect no gain.')
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        train, test = make_patients(args, Path(folder) / 'phantom')
        batches, y = load_batches(args, train, test)
        table = Table(
            f'inference, {len(test)} patients in batches of {args.bs}, {args.size} px, {args.device}; '
            f'medians of {args.repeats}, ms a patient',
            COLUMNS,
            hide=() if args.peak_tflops else ('of_peak',),
        )
        for backbone in args.backbones:
            is_trained = backbone == TRAINED
            net = train_network(args, train) if is_trained else network(args, backbone)
            row = compare(args, net.eval(), batches, y, is_trained)
            table.add(backbone=backbone, head='trained' if is_trained else 'random', **row)
    write(args, dict(precision=table), bf16_instructions=native)


if __name__ == '__main__':
    main()
