"""Cost of a step of CMUS-Net, compared with its encoders alone.

For bags of 3, 6, 10 and mixed sizes, batches of 1 and 4 patients, inference and training step (forward and
backward), in one run:
  loop   every image through its encoder alone, one after the other, then the head and the loss
  floor  the encoders alone on the same images, each modality in one call
  model  CMUS-Net (encoders, SMIL, CMSA and heads) and the loss
Printed are medians in milliseconds a patient and the ratios model/floor and model/loop. The three take turns
within each repeat, so that a noisy machine affects them alike. Peak memory is that of a fresh process that
does one training step. "above" is what the step needs in addition to a process that only builds the model,
and its ratio is to the floor's. With --peak_tflops the last column is the model's share of the device's peak:
the counted operations of the encoders, divided by time and peak.

    python benchmarks/step.py --json cmus_fastai/results/step_lite0.json
    python benchmarks/step.py --backbone swin_tiny_patch4_window7_224 --proj 0 \\
        --json cmus_fastai/results/step_swin.json
    python benchmarks/step.py --device cuda --backbone swin_base_patch4_window7_224 --precision bf16 \\
        --compile --peak_tflops 989
"""

from functools import partial
from itertools import product
from typing import NamedTuple
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
    fresh,
    interleaved,
    machine,
    median,
    network,
    peak_mib,
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


def bag_sizes(bag, n_patients):
    "Number of TEM images of each patient; a mixed bag of one patient has ten."
    if bag == 'mixed' and n_patients == 1:
        return [10]
    return BAGS[bag][:n_patients]


def build_network(args):
    "The network, with compiled encoders if the command line asks for them."
    net = network(args)
    if args.compile:
        for encoder in (net.om, net.im, net.tem):
            encoder.use_compile()
    return net


# --- the three ways; each returns something to differentiate


class Images(NamedTuple):
    "One batch; the real TEM images are taken from the bags once, outside of what is timed."

    om: torch.Tensor
    im: torch.Tensor
    tem: tuple  # Bags and mask
    y: torch.Tensor
    real: torch.Tensor  # Real TEM images, without padding


def loop(net, loss, images):
    "Every image alone, then the head."
    mask = images.tem[1]

    def one_by_one(encoder, pixels):
        return torch.cat([encoder(image[None]) for image in pixels])

    om_maps, im_maps = one_by_one(net.om, images.om), one_by_one(net.im, images.im)
    tem_maps = one_by_one(net.tem, images.real)
    padded = tem_maps.new_zeros(*mask.shape, *tem_maps.shape[1:]).index_put((mask,), tem_maps)
    return loss(net.head(om_maps, im_maps, (padded, mask)), images.y)


def floor(net, loss, images):
    "The encoders alone, each in one call."
    return net.om(images.om).mean() + net.im(images.im).mean() + net.tem(images.real).mean()


def model(net, loss, images):
    "CMUS-Net."
    return loss(net(images.om, images.im, images.tem), images.y)


def ways_of(args, net, bag, n_patients):
    "The three ways on one batch, as functions without arguments."
    om, im, (bags, mask), y = batch(bag_sizes(bag, n_patients), args.size, args.device)
    images = Images(om, im, (bags, mask), y, real=bags[mask])
    loss = MultiLoss()

    def run(way):
        with autocast(args):
            return way(net, loss, images)

    return {way.__name__: partial(run, way) for way in (loop, floor, model)}


# --- measurements


def measure_child(args):
    "Peak memory of one training step, or of building the model alone ('base')."
    net = build_network(args)
    if args.way != 'base':
        step(ways_of(args, net, args.bag, args.bs)[args.way], net)
    answer(peak_mib(args.device))


def encoder_gflop(encoder, image):
    "Floating-point operations of one image, in billions: without and with a backward pass."

    def forward():
        return encoder(image).mean()

    return {train: flops(partial(step, forward, encoder, train)) / 1e9 for train in (False, True)}


def time_columns(args, net, bag, n_patients, train):
    "Times and their ratios, as columns of the table."
    net.train(train)
    ways = ways_of(args, net, bag, n_patients)
    steps = {name: partial(step, way, net, train) for name, way in ways.items()}
    times = interleaved(steps, args.repeats, args.device)
    ms = {name: median(values) / n_patients * 1000 for name, values in times.items()}
    to_floor = ratio(times['model'], times['floor'])
    return dict(**ms, to_floor=to_floor, to_loop=ratio(times['model'], times['loop']))


def memory_columns(args, bag, n_patients, base):
    "Peak memory of a training step, as columns of the table."
    peak = {way: fresh(__file__, args, bag=bag, bs=n_patients, way=way) for way in ('floor', 'model')}
    above = {way: mib - base for way, mib in peak.items()}
    return dict(mib=peak['model'], above=above['model'], above_to_floor=above['model'] / above['floor'])


def main():
    args = arguments(
        __doc__,
        **BACKBONE,
        **PRECISION,
        **PEAK,
        compile=dict(action='store_true', help='compile the encoders, for every way alike'),
    )
    if args.child:
        measure_child(args)
        return
    torch.manual_seed(0)
    net, image = build_network(args), torch.rand(1, 3, args.size, args.size, device=args.device)
    gflop = encoder_gflop(network(args).om, image)  # without compilation, which would hide operations
    base = fresh(__file__, args, way='base')
    print(machine(args.device))
    compiled = ', compiled' if args.compile else ''
    table = Table(
        f'{args.backbone}, {args.size} px, {args.precision}{compiled}, {args.device}; '
        f'medians of {args.repeats}, ms a patient',
        COLUMNS,
        hide=() if args.peak_tflops else ('gflop', 'of_peak'),
    )
    for bag, n_patients, train in product(BAGS, (1, 4), (False, True)):
        times = time_columns(args, net, bag, n_patients, train)
        memory = memory_columns(args, bag, n_patients, base) if train else {}
        n_images = sum(bag_sizes(bag, n_patients)) + 2 * n_patients
        work = gflop[train] * n_images / n_patients
        table.add(
            bag=bag,
            batch=n_patients,
            step='train' if train else 'inference',
            **times,
            **memory,
            gflop=work,
            of_peak=work / times['model'] / args.peak_tflops if args.peak_tflops else None,
        )
    write(args, dict(step=table))


if __name__ == '__main__':
    main()
