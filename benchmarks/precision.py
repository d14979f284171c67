"""Inference in bfloat16 against float32: time and agreement.

Simulated patients are read once and then diagnosed in float32 and under autocast to bfloat16, in turn;
times are medians in milliseconds a
patient, without reading. Convolutions work channels-last in both, which is the Encoder's default.
Agreement is the share of test patients with
the same most probable class, and the largest difference of any probability. It means most where a head
has learnt something: for
EfficientNet-Lite0, whose ImageNet weights come with a package, the head is trained on kept maps for
--epochs epochs; other backbones and
their heads are random ("head"), and only their times count. "right" is the share of test patients
diagnosed rightly, in float32 and bfloat16.

    python benchmarks/precision.py --json cmus_fastai/results/precision.json
"""

import tempfile
from pathlib import Path
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
import torch
import cmus_fastai.data.bag  # noqa: F401 (gives a Cohort its dataloaders)
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.training.features import FeatureCache
from cmus_fastai.training.learner import cmus_learner
from cmus_fastai.data.phantom import make_phantom

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


def trained(a, train):
    "A network whose head has learnt on kept maps of frozen ImageNet encoders."
    dls = train.dataloaders(
        valid=0.2,
        size=a.size,
        cache=FeatureCache(bs=16, progress=False),
        device=torch.device(a.device),
        num_workers=0,
    )
    learn = cmus_learner(dls, 'tf_efficientnet_lite0', seed=0, precision=None)
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_preset(a.epochs)
    return learn.model


def reader(net, batches, bf16, device):
    "A function that diagnoses all batches: probabilities [patients,K]."

    def run():
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            return torch.cat([net(*b[:3]).fusion.float().softmax(1) for b in batches])

    return run


def main():
    a = arguments(
        __doc__,
        **{k: BACKBONE[k] for k in ('size', 'proj')},
        **PEAK,
        backbones=dict(
            nargs='+',
            default=['tf_efficientnet_lite0', 'swin_tiny_patch4_window7_224', 'resnet50'],
            help='timm backbones',
        ),
        patients=(150, 'simulated patients, two thirds of them to train the head'),
        epochs=(25, 'of training the head'),
        bs=(4, 'patients in a batch'),
    )
    print(machine(a.device))
    if not (native := has_bf16(a.device)):
        print(
            'This processor has no bfloat16 instructions: they are imitated, and no gain is to be expected.'
        )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        make_phantom(Path(tmp) / 'phantom', a.patients, size=a.size, progress=False)
        train, test = Cohort.from_folder(Path(tmp) / 'phantom', check='fast', progress=False).split(1 / 3)
        batches = list(
            train.dataloaders(
                valid=test, size=a.size, bs=a.bs, device=torch.device(a.device), num_workers=0
            ).valid
        )
        y = torch.cat([b[3] for b in batches]).as_subclass(torch.Tensor)
        t = Table(
            f'inference, {len(test)} patients in batches of {a.bs}, {a.size} px, {a.device}; medians of '
            f'{a.repeats}, ms a patient',
            COLUMNS,
            () if a.peak_tflops else ('of_peak',),
        )
        for backbone in a.backbones:
            head = 'trained' if backbone == 'tf_efficientnet_lite0' else 'random'
            net = (trained(a, train) if head == 'trained' else network(a, backbone)).eval()
            ways = {k: reader(net, batches, k == 'bf16', a.device) for k in ('fp32', 'bf16')}
            p, s = {k: f() for k, f in ways.items()}, interleaved(ways, a.repeats, a.device)
            right = {
                f'right_{k}': (v.argmax(1) == y).float().mean().item() if head == 'trained' else None
                for k, v in p.items()
            }
            t.add(
                backbone=backbone,
                head=head,
                **{k: median(v) / len(test) * 1000 for k, v in s.items()},
                to_fp32=ratio(s['bf16'], s['fp32']),
                same=(p['fp32'].argmax(1) == p['bf16'].argmax(1)).float().mean().item(),
                difference=(p['fp32'] - p['bf16']).abs().max().item(),
                **right,
                of_peak=flops(ways['bf16']) / median(s['bf16']) / a.peak_tflops / 1e12
                if a.peak_tflops
                else None,
            )
    write(a, dict(precision=t), bf16_instructions=bool(native))


if __name__ == '__main__':
    main()
