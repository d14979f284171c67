"""Memory and time of one training step for bags of 1 to 256 TEM images.

One patient, forward and backward, all three encoders trained. Each line is a fresh process that does a
single step:
  chunk  `CMUSNet(chunk=16)`: the encoders take so many images at a time and forget what lies between
         (gradient checkpointing);
         the backward pass computes it anew
  plain  all images at once, up to --plain_max of them
  base   a process that only imports and builds the model
Ratios of memory are to the bag of 16 with chunk; "above" is what the step takes on top of the base. Time
is a median in milliseconds
an image (TEM, OM and IM), chunk and plain in turn in one process; its ratio is to plain at the same bag.
On a CPU, memory is the peak of the whole process; with CUDA, that of its tensors on the card.

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


def one_step(a, net, bag):
    om, im, tem, y = batch([bag], a.size, a.device)

    def loss():
        with autocast(a):
            return MultiLoss()(net(om, im, tem), y)

    return lambda: step(loss, net)


def child(a):
    net = network(a, chunk=a.chunk if a.way == 'chunk' else None).train()
    if a.bag:
        one_step(a, net, a.bag)()
    answer(peak_mib(a.device))


def with_chunk(net, chunk, step):
    "One step in pieces of `chunk` images."
    net.chunk = chunk
    step()


def main():
    a = arguments(
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
    if a.child:
        child(a)
        return
    torch.manual_seed(0)
    print(machine(a.device))
    t = Table(
        f'one training step of one patient, {a.backbone}, {a.size} px, {a.precision}, chunk {a.chunk}, '
        f'{a.device}; times are medians of {a.repeats}',
        COLUMNS,
    )

    def mib(bag, way):
        return fresh(__file__, a, bag=bag, way=way)

    base, ref, net = mib(0, 'base'), mib(16, 'chunk'), network(a).train()
    t.add(way='base', mib=base, to_16=base / ref)
    for bag in a.bags:
        f, ways = one_step(a, net, bag), ['plain', 'chunk'] if bag <= a.plain_max else ['chunk']

        timed = {way: partial(with_chunk, net, a.chunk if way == 'chunk' else None, f) for way in ways}
        s = interleaved(timed, a.repeats, a.device, warm=bag == a.bags[0])
        for w in ways:
            m = mib(bag, w)
            t.add(
                bag=bag,
                way=w,
                mib=m,
                above=m - base,
                to_16=m / ref,
                above_to_16=(m - base) / (ref - base),
                ms=median(s[w]) / (bag + 2) * 1000,
                to_plain=ratio(s[w], s['plain']) if 'plain' in s else None,
            )
    write(a, dict(memory=t))


if __name__ == '__main__':
    main()
