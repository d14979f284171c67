"""What a step of CMUS-Net costs beside its encoders.

For bags of 3, 6, 10 and mixed sizes, batches of 1 and 4 patients, inference and training step (forward and backward), in one run:
  loop   every image through its encoder alone, one after the other, then the head (for training: with backward)
  floor  the encoders alone on the same images, each modality in one call
  model  CMUS-Net
Printed are medians in milliseconds a patient and the ratios model/floor and model/loop. The three are timed in turn within each
repeat, so that a noisy machine disturbs them alike. Peak memory is that of a fresh process that does one training step.

    python benchmarks/step.py [--backbone tf_efficientnet_lite0] [--size 224] [--repeats 5] [--device cpu] [--json out.json]
"""
import argparse, json, platform, resource, statistics, subprocess, sys, time
import warnings
import torch
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
from cmus_fastai.model import CMUSNet
from cmus_fastai.multiloss import MultiLoss

BAGS = {'3': [3]*4, '6': [6]*4, '10': [10]*4, 'mixed': [2, 10, 3, 6]}

def batch(sizes, size, device):
    B, N = len(sizes), max(sizes)
    mask = torch.arange(N)[None] < torch.tensor(sizes)[:, None]
    new = lambda *s: torch.rand(*s, 3, size, size, device=device)
    return new(B), new(B), (new(B, N), mask.to(device)), torch.arange(B, device=device) % 3

def steps(net, om, im, tem, y):
    "The three ways, as functions of nothing that return something to differentiate."
    loss, real = MultiLoss(), tem[0][tem[1]]
    def one_by_one():
        maps = [torch.cat([enc(x[None]) for x in xs]) for enc, xs in ((net.om, om), (net.im, im), (net.tem, real))]
        bag = maps[2].new_zeros(*tem[1].shape, *maps[2].shape[1:]).index_put((tem[1],), maps[2])
        return loss(net.head(maps[0], maps[1], (bag, tem[1])), y)
    def floor(): return net.om(om).mean() + net.im(im).mean() + net.tem(real).mean()
    def model(): return loss(net(om, im, tem), y)
    return dict(loop=one_by_one, floor=floor, model=model)

def seconds(f, train, net, device):
    sync = torch.cuda.synchronize if device == 'cuda' else (lambda: None)
    sync(); start = time.perf_counter()
    if train:
        f().backward()
        net.zero_grad(set_to_none=True)
    else:
        with torch.inference_mode(): f()
    sync()
    return time.perf_counter() - start

def network(a): return CMUSNet(3, a.backbone, weights=None, **(dict(proj=a.proj) if a.proj else {})).to(a.device)

def peak(a, name, bs, what):
    "Peak memory of a fresh process, MiB."
    args = [sys.executable, __file__, '--child', name, what, '--bs', str(bs), *sum([[f'--{k}', str(getattr(a, k))] for k in ('backbone', 'size', 'device', 'proj')], [])]
    return float(subprocess.run(args, capture_output=True, text=True, check=True).stdout.split()[-1])

def child(a):
    name, what = a.child
    net = network(a)
    f = steps(net, *batch(BAGS[name][:a.bs], a.size, a.device))[what]
    seconds(f, True, net, a.device)
    if a.device == 'cuda': print(torch.cuda.max_memory_allocated()/2**20)
    else: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**10 if sys.platform != 'darwin' else 2**20))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--backbone', default='tf_efficientnet_lite0'); p.add_argument('--size', type=int, default=224)
    p.add_argument('--repeats', type=int, default=5); p.add_argument('--device', default='cpu'); p.add_argument('--proj', type=int, default=256, help='as in the small preset; 0: none, as published')
    p.add_argument('--json'); p.add_argument('--bs', type=int, default=4, help=argparse.SUPPRESS); p.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(a)
    torch.manual_seed(0)
    net, rows = network(a), []
    print(f'{a.backbone}, {a.size} px, {a.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}; medians of {a.repeats}')
    print(f"{'bag':>6}{'batch':>6}{'step':>10}{'loop ms':>10}{'floor ms':>10}{'model ms':>10}{'/floor':>8}{'/loop':>8}{'MiB':>8}{'/floor':>8}")
    for name, sizes in BAGS.items():
        for bs in (1, 4):
            ways = steps(net, *batch(sizes[:bs] if name != 'mixed' or bs > 1 else sizes[1:2], a.size, a.device))
            for train in (False, True):
                net.train(train)
                for f in ways.values(): seconds(f, train, net, a.device)         # warm up
                t = {k: [] for k in ways}
                for _ in range(a.repeats):
                    for k, f in ways.items(): t[k].append(seconds(f, train, net, a.device))
                med = {k: statistics.median(v)/bs*1000 for k, v in t.items()}
                over = lambda k: statistics.median(m/x for m, x in zip(t['model'], t[k]))
                mem = {k: peak(a, name, bs, k) for k in ('floor', 'model')} if train else dict(floor=float('nan'), model=float('nan'))
                rows.append(dict(bag=name, batch=bs, step='train' if train else 'inference', **med, to_floor=over('floor'), to_loop=over('loop'), mib=mem['model'], mib_to_floor=mem['model']/mem['floor']))
                r = rows[-1]
                print(f"{name:>6}{bs:>6}{r['step']:>10}{r['loop']:>10.0f}{r['floor']:>10.0f}{r['model']:>10.0f}{r['to_floor']:>8.2f}{r['to_loop']:>8.2f}{r['mib']:>8.0f}{r['mib_to_floor']:>8.2f}", flush=True)
    if a.json:
        with open(a.json, 'w') as f: json.dump(dict(arguments=vars(a), torch=torch.__version__, rows=rows), f, indent=1)

if __name__ == '__main__': main()
