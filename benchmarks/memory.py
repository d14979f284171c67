"""Memory and time of one training step for bags of 1 to 256 TEM images.

One patient, forward and backward, all three encoders trained. Memory is that of a fresh process that does a
single step:
  chunk  `CMUSNet(chunk=16)`: the encoders take so many images at a time, discard the activations, and compute
         them again in the backward pass (gradient checkpointing)
  plain  all images at once, up to --plain_max of them
  base   a process that only imports and builds the model
Ratios of memory are to the bag of 16 with chunk; "above" is what the step needs in addition to the base.
Time is a median in milliseconds an image (TEM, OM and IM). chunk and plain take turns in one process, and the
ratio is to plain at the same bag. On a CPU, memory is the peak of the whole process; with CUDA, that of its
tensors on the card.

    python benchmarks/memory.py --json cmus_fastai/results/memory.json
"""

from functools import partial
import torch
from common import (
    BACKBONE,
    PRECISION,
    Table,
    answer,
    arguments,
    autocast,
    batch,
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

COLUMNS = dict(
    bag=('bag', '>6'),
    way=('way', '>7'),
    mib=('MiB', '>8.0f'),
    above=('above', '>8.0f'),
    to_16=('/bag 16', '>9.2f'),
    above_to_16=('above/16', '>10.2f'),
    ms=('ms/image', '>10.0f'),
    to_plain=('/plain', '>8.2f'),
)


def training_step(args, net, images, chunk):
    "One training step of one patient, in pieces of `chunk` images."
    om, im, tem, y = images
    net.chunk = chunk

    def loss():
        with autocast(args):
            return MultiLoss()(net(om, im, tem), y)

    step(loss, net)


def chunk_of(args, way):
    "Images in a piece; None: all at once."
    return args.chunk if way == 'chunk' else None


def measure_child(args):
    "Peak memory of one training step, or of building the model alone (bag 0)."
    chunk = chunk_of(args, args.way)
    net = network(args, chunk=chunk).train()
    if args.bag:
        training_step(args, net, batch([args.bag], args.size, args.device), chunk)
    answer(peak_mib(args.device))


def time_ways(args, net, bag):
    "Seconds of a training step for each way that the bag allows."
    names = ['plain', 'chunk'] if bag <= args.plain_max else ['chunk']
    images = batch([bag], args.size, args.device)
    ways = {name: partial(training_step, args, net, images, chunk_of(args, name)) for name in names}
    return interleaved(ways, args.repeats, args.device, warm=bag == args.bags[0])


def main():
    args = arguments(
        __doc__,
        3,
        **BACKBONE,
        **PRECISION,
        bags=dict(
            type=int, nargs='+', default=[1, 4, 16, 64, 256], help='bag sizes (default: 1 4 16 64 256)'
        ),
        chunk=(16, 'images in a piece'),
        plain_max=(16, 'largest bag to try without chunk'),
    )
    if args.child:
        measure_child(args)
        return
    torch.manual_seed(0)
    print(machine(args.device))
    table = Table(
        f'one training step of one patient, {args.backbone}, {args.size} px, {args.precision}, '
        f'chunk {args.chunk}, {args.device}; times are medians of {args.repeats}',
        COLUMNS,
    )
    base = fresh(__file__, args, bag=0, way='base')
    reference = fresh(__file__, args, bag=16, way='chunk')
    net = network(args).train()
    table.add(way='base', mib=base, to_16=base / reference)
    for bag in args.bags:
        times = time_ways(args, net, bag)
        for way, seconds in times.items():
            mib = fresh(__file__, args, bag=bag, way=way)
            table.add(
                bag=bag,
                way=way,
                mib=mib,
                above=mib - base,
                to_16=mib / reference,
                above_to_16=(mib - base) / (reference - base),
                ms=median(seconds) / (bag + 2) * 1000,
                to_plain=ratio(seconds, times['plain']) if 'plain' in times else None,
            )
    write(args, dict(memory=table))


if __name__ == '__main__':
    main()
