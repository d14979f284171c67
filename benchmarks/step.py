"""What a step of CMUS-Net costs beside its encoders.

For bags of 3, 6, 10 and mixed sizes, batches of 1 and 4 patients, inference and training step (forward
and backward), in one run:
  loop   every image through its encoder alone, one after the other, then the head (for training: with
         backward)
  floor  the encoders alone on the same images, each modality in one call
  model  CMUS-Net: encoders, SMIL, CMSA and heads; with the loss
Printed are medians in milliseconds a patient and the ratios model/floor and model/loop. The three are
timed in turn within each
repeat, so that a noisy machine disturbs them alike. Peak memory is that of a fresh process that does one
training step; "above" is what
the step takes on top of a process that only builds the model, and its ratio is to the floor's.
With --peak_tflops the last column is the model's share of the device's peak: the encoders' operations,
counted, over time and peak.

    python benchmarks/step.py --json cmus_fastai/results/step_lite0.json
    python benchmarks/step.py --backbone swin_tiny_patch4_window7_224 --proj 0 \\
        --json cmus_fastai/results/step_swin.json
    python benchmarks/step.py --device cuda --backbone swin_base_patch4_window7_224 --precision bf16 \\
        --compile --peak_tflops 989
"""

from functools import partial
import torch
from common import (
    BACKBONE,
    PEAK,
    PRECISION,
    Table,
    answer,
    arguments,
    autocast,
    batch,
    flops,
    interleaved,
    machine,
    median,
    network,
    peak_mib,
    fresh,
    ratio,
    step,
    write,
)
from cmus_fastai.training.losses import MultiLoss

BAGS = {'3': [3] * 4, '6': [6] * 4, '10': [10] * 4, 'mixed': [2, 10, 3, 6]}
COLUMNS = dict(
    bag=('bag', '>6'),
    batch=('batch', '>6'),
    step=('step', '>10'),
    loop=('loop ms', '>10.0f'),
    floor=('floor ms', '>10.0f'),
    model=('model ms', '>10.0f'),
    to_floor=('/floor', '>8.2f'),
    to_loop=('/loop', '>8.2f'),
    mib=('MiB', '>8.0f'),
    above=('above', '>8.0f'),
    above_to_floor=('/floor', '>8.2f'),
    gflop=('GFLOP', '>8.1f'),
    of_peak=('of peak', '>9.1%'),
)


def steps(net, om, im, tem, y, a):
    "The three ways, as functions of nothing that return something to differentiate."
    loss, real = MultiLoss(), tem[0][tem[1]]

    def loop():
        maps = [
            torch.cat([enc(x[None]) for x in xs]) for enc, xs in ((net.om, om), (net.im, im), (net.tem, real))
        ]
        bag = maps[2].new_zeros(*tem[1].shape, *maps[2].shape[1:]).index_put((tem[1],), maps[2])
        return loss(net.head(maps[0], maps[1], (bag, tem[1])), y)

    def floor():
        return net.om(om).mean() + net.im(im).mean() + net.tem(real).mean()

    def model():
        return loss(net(om, im, tem), y)

    def cast(f):
        def run():
            with autocast(a):
                return f()

        return run

    return {f.__name__: cast(f) for f in (loop, floor, model)}


def sizes(bag, n):
    return BAGS[bag][:n] if bag != 'mixed' or n > 1 else BAGS[bag][1:2]


def built(a):
    net = network(a)
    for e in (net.om, net.im, net.tem) if a.compile else ():
        e.use_compile()
    return net


def child(a):
    net = built(a)
    if a.way != 'base':
        step(steps(net, *batch(sizes(a.bag, a.bs), a.size, a.device), a)[a.way], net)
    answer(peak_mib(a.device))


def encoder_gflop(encoder, image):
    "Floating-point operations of one image, in billions: without and with a backward pass."
    def forward():
        return encoder(image).mean()
    return {train: flops(partial(step, forward, encoder, train))/1e9 for train in (False, True)}


def main():
    a = arguments(
        __doc__,
        **BACKBONE,
        **PRECISION,
        **PEAK,
        compile=dict(action='store_true', help='compile the encoders, for every way alike'),
    )
    if a.child:
        child(a)
        return
    torch.manual_seed(0)
    net, image = built(a), torch.rand(1, 3, a.size, a.size, device=a.device)
    gflop = encoder_gflop(network(a).om, image)  # not of the compiled code, which would not be counted
    base = fresh(__file__, a, way='base')
    print(machine(a.device))
    t = Table(
        f'{a.backbone}, {a.size} px, {a.precision}{", compiled" if a.compile else ""}, {a.device}; medians '
        f'of {a.repeats}, ms a patient',
        COLUMNS,
        () if a.peak_tflops else ('gflop', 'of_peak'),
    )
    for bag in BAGS:
        for bs in (1, 4):
            ns = sizes(bag, bs)
            ways = steps(net, *batch(ns, a.size, a.device), a)
            for train in (False, True):
                net.train(train)
                timed = {k: partial(step, f, net, train) for k, f in ways.items()}
                s = interleaved(timed, a.repeats, a.device)
                mib = (
                    {k: fresh(__file__, a, bag=bag, bs=bs, way=k) - base for k in ('floor', 'model')}
                    if train
                    else None
                )
                work, ms = (
                    gflop[train] * (sum(ns) + 2 * bs) / bs,
                    {k: median(v) / bs * 1000 for k, v in s.items()},
                )
                t.add(
                    bag=bag,
                    batch=bs,
                    step='train' if train else 'inference',
                    **ms,
                    to_floor=ratio(s['model'], s['floor']),
                    to_loop=ratio(s['model'], s['loop']),
                    mib=mib and mib['model'] + base,
                    above=mib and mib['model'],
                    above_to_floor=mib and mib['model'] / mib['floor'],
                    gflop=work,
                    of_peak=work / ms['model'] / a.peak_tflops if a.peak_tflops else None,
                )
    write(a, dict(step=t))


if __name__ == '__main__':
    main()
