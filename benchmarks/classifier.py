"""Regularisers on a problem other than Re-ID: a small CNN with batch norms classifies handwritten digits of 8×8 px, which scikit-learn includes, after training on few of them.

    python benchmarks/classifier.py [--images 150] [--epochs 40] [--seeds 10] [--csv FILE]

Each regulariser is trained with six strengths and several seeds; `AutoL2` is trained with its default alone. The optimizer is fastai's Adam with ε = 1e-7, because the default of 1e-5 swamps the
gradient of θ for small arrays. The best strength is the one with the highest mean accuracy on the 1,000 test
images themselves, which favours the regularisers with six strengths.
"""
import argparse, sys

import fastai, pandas as pd, torch
from fastai.basics import *
from fastai.callback.schedule import *
from fastai.layers import ConvLayer
from sklearn.datasets import load_digits

from reid_fastai.callback.all import *
from reid_fastai.comparison_results import markdown_table, paired_difference
from reid_fastai.files import atomic_write, check_writable

steps_of_5 = [5.**i for i in range(-2, 4)]
#: Regulariser -> (function that makes the callback, strengths)
ARMS = {'none': (lambda v: [], [0.]), 'conventional': (ConventionalL2, [2.5e-3*o for o in steps_of_5]), 'adaptive': (AdaptiveL2, [5e-3*o for o in steps_of_5]),
        'decoupled': (DecoupledL2, [.3*o for o in steps_of_5]), 'rotation': (RotationControl, [1e-2*o for o in steps_of_5]), 'auto, default': (lambda v: AutoL2(), [0.])}

def loaders(images):
    "The same images for all runs: (N, 1, 8, 8), 0 to 1"
    digits = load_digits()
    keep = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[:images+1000]
    x,y = torch.tensor(digits.images[keep], dtype=torch.float32)[:,None]/16,torch.tensor(digits.target[keep])
    parts = [list(zip(x[s], y[s])) for s in (slice(images), slice(images, None))]
    return DataLoaders.from_dsets(*parts, bs=min(30, images), val_bs=1000, num_workers=0, device='cpu')

def net(): return nn.Sequential(ConvLayer(1, 16), ConvLayer(16, 32, stride=2), ConvLayer(32, 32), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))

def accuracy_of(cbs, a, seed):
    "Accuracy after the last epoch, %"
    set_seed(seed)
    learn = Learner(loaders(a.images), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, opt_func=partial(Adam, eps=1e-7), **({} if cbs else dict(wd=0.)))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, a.lr)
    return 100*dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['accuracy']

def main(a):
    print(f'torch {torch.__version__}, fastai {fastai.__version__}; {a.images} images, {a.epochs} epochs, one cycle up to {a.lr}, seeds 0 to {a.seeds-1}', flush=True)
    if a.csv: check_writable(a.csv)
    rows = []
    for arm,v,seed in [(arm, v, seed) for arm,(_,vs) in ARMS.items() for v in vs for seed in range(a.seeds)]:
        rows.append(dict(arm=arm, strength=v, seed=seed, accuracy=accuracy_of(ARMS[arm][0](v), a, seed)))
        if a.csv: atomic_write(a.csv, pd.DataFrame(rows).to_csv(index=False))
    df = pd.DataFrame(rows)
    auto,rows = df[df.arm=='auto, default'].set_index('seed').accuracy,[]
    for arm,o in df.groupby('arm', sort=False):
        best = o.groupby('strength').accuracy.mean().idxmax()
        acc = o[o.strength==best].set_index('seed').accuracy
        mean,half = paired_difference(auto, acc)
        rows.append({'regulariser': arm, 'best strength': f'{best:g}' if best else '', 'accuracy, %': f'{acc.mean():.2f} ± {acc.std():.2f}',
                     'auto − this': '' if arm=='auto, default' else f'{mean:+.2f} ± {half:.2f}'})
    print(markdown_table(pd.DataFrame(rows)))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=150, help='training images')
    p.add_argument('--epochs', type=int, default=40)
    p.add_argument('--lr', type=float, default=1e-2, help='highest learning rate')
    p.add_argument('--seeds', type=int, default=10)
    p.add_argument('--csv', help='file for the accuracy of each run')
    a = p.parse_args()
    if min(a.images, a.epochs, a.seeds)<1 or a.images>797: sys.exit(f'classifier.py: error: --images {a.images} --epochs {a.epochs} --seeds {a.seeds}: from 1 to 797 images, and at least one of the others.')
    main(a)
