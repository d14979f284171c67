"""Use a saved model where only the package and its base requirements are installed.

    python tools/portable.py cmus_demo_out/model cmus_demo_out/phantom

A new virtual environment gets the package without any extra. In it the model is loaded, with the weights of
its encoders as a local file, while sockets and further processes are forbidden. Its predictions are
compared with those of this environment, as are the logits of the exported head.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
import torch
from safetensors.torch import save_file
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.training.artifact import load_model, predict_cohort
from cmus_fastai.training.export import example_bags, export_head

root = Path(__file__).resolve().parents[1]
THERE = """
import os, socket, subprocess, sys, warnings
warnings.simplefilter('ignore')
import torch
from cmus_fastai.data.cohort import Cohort
from cmus_fastai.training.artifact import ModelError, load_model, predict_cohort
from cmus_fastai.training.export import load_head

def refuse(*args, **kwargs):
    raise AssertionError('a socket or a process was asked for')

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
subprocess.Popen.__init__ = os.system = os.fork = os.posix_spawn = refuse
folder, patients, scratch = sys.argv[1:]
try:
    load_model(folder)
except ModelError as error:
    print(f'without the weights: {error}')
model, config = load_model(folder, weights=f'{scratch}/encoder.safetensors')
cohort = Cohort.read(patients, progress=False)
chosen = cohort.subset(list(cohort.df.index)[:8])
preds, _ = predict_cohort(model, config, chosen)
want = torch.load(f'{scratch}/want.pt', weights_only=True)
probs = torch.tensor(preds.filter(like='p_').to_numpy())
logits = load_head(f'{scratch}/head.pt2')(*want['bags']).fusion
print(f"largest difference of a probability {(probs - want['probs']).abs().max():.1e}")
print(f"largest difference of an exported logit {(logits - want['logits']).abs().max():.1e}")
assert (probs - want['probs']).abs().max() < 1e-6 and (logits - want['logits']).abs().max() < 1e-4
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help='folder of a saved model with frozen encoders, all alike')
    parser.add_argument('patients', help='folder of patients')
    args = parser.parse_args()
    model, config = load_model(args.model)
    cohort = Cohort.read(args.patients, progress=False)
    preds, _ = predict_cohort(model, config, cohort.subset(list(cohort.df.index)[:8]))
    bags = example_bags(model.head, model.om.grid(config['size']), (1, 1, 6), 4)
    with torch.no_grad():
        logits = model.head(bags[:3], bags[3:6], bags[6:]).fusion
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        state = model.om.backbone.state_dict()
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()}, scratch / 'encoder.safetensors'
        )
        export_head(model, scratch / 'head.pt2', model.om.grid(config['size']))
        probs = torch.tensor(preds.filter(like='p_').to_numpy())
        torch.save(dict(probs=probs, bags=bags, logits=logits), scratch / 'want.pt')
        subprocess.run([sys.executable, '-m', 'venv', scratch / 'env'], check=True)
        python = scratch / 'env' / 'bin' / 'python'
        subprocess.run(
            [sys.executable, '-m', 'uv', 'pip', 'install', '-q', '--python', python, root], check=True
        )
        paths = [str(Path(path).resolve()) for path in (args.model, args.patients)]
        done = subprocess.run([python, '-W', 'ignore', '-c', THERE, *paths, scratch], cwd=scratch)
        sys.exit(done.returncode)


if __name__ == '__main__':
    main()
