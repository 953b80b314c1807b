"""Trains from more images than the memory can hold, on a machine of a given size: memory of the training and its loader processes, and images a second.

    python benchmarks/large.py [--images 32621] [--size 384 128] [--memory 8] [--arch tf_efficientnet_lite0] [--bs 16] [--steps 10]

The training images are copies of rendered people, each a file of its own, as many as those of MSMT17 by default. The process may allocate no more than `--memory` GB, as a limit of the system,
and believes that as much is free, less what it uses. The test set is that of the rendered people. Linux only: the memory is the proportional set size (PSS) of all processes, which counts shared pages once.
"""
import argparse, os, re, resource, shutil, tempfile, time, warnings
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.core import Callback, CancelValidException

from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.core import keep_freed_memory
from reid_fastai.data import memory
from reid_fastai.data.block import ReIDDataLoaders
from reid_fastai.data.datasets import read_dataset
from reid_fastai.data.splits import ReIDSplits
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.learner import reid_learner

def used():
    "Memory of this process and its children, bytes"
    me = os.getpid()
    pids = [me, *(int(p.name) for p in Path('/proc').glob('[0-9]*') if (s := p/'stat').exists() and int(s.read_text().rpartition(')')[2].split()[1])==me)]
    return sum(1024*int(re.search(r'Pss:\s+(\d+) kB', Path(f'/proc/{p}/smaps_rollup').read_text())[1]) for p in pids)

def copies(n, root):
    "A dataset of `n` training images in folder `root`"
    splits = read_dataset(make_synthetic(tiny=n<1000))
    train,files = splits.real('train'),splits.files(splits.real('train'))
    rows = [dict(path=f'{i}.jpg', pid=train.pid[j]+10_000*(i//len(train)), camid=train.camid[j], split='train') for i in range(n) for j in [i%len(train)]]
    for o,r in enumerate(rows): shutil.copyfile(files[o%len(train)], root/r['path'])
    test = splits.real('query', 'gallery').assign(path=lambda o: splits.files(o))
    return ReIDSplits(pd.concat([pd.DataFrame(rows), test[['path','pid','camid','split']]]), 'copies', root)

class Watch(Callback):
    "The most memory in use after a batch; no evaluation"
    most = 0
    def after_batch(self): self.most = max(self.most, used())
    def before_validate(self): raise CancelValidException()

def main(a):
    limit = int(a.memory*1e9)
    keep_freed_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    memory.free_memory = lambda: max(0, limit-used())
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        splits = copies(a.images, Path(d))
        start = time.perf_counter()
        dls = ReIDDataLoaders.from_splits(splits, a.size, n_pids=a.bs//4, n_imgs=4, steps=a.steps, path=d)
        print(f'{a.images} training images of {a.size[0]}×{a.size[1]}: {3*a.images*a.size[0]*a.size[1]/1e9:.1f} GB as bytes; memory {a.memory:g} GB. Loaders made in {time.perf_counter()-start:.0f} s, {dls.train.fake_l.num_workers} loader processes')
        print(*[str(o.message) for o in said if 'free' in str(o.message)], sep='\n')
        learn = reid_learner(dls, a.arch, regions=0, pretrained=False, cbs=[AdaptiveL2(), watch := Watch()])
        learn.remove_cb(learn.retrieval_metrics)
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
        print(f'torch {torch.__version__}, {a.arch}: {a.steps} steps of {a.bs} images, {a.steps*a.bs/(time.perf_counter()-start):.1f} images a second; at most {watch.most/1e9:.2f} GB')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=32_621)
    p.add_argument('--size', nargs=2, type=int, default=(384,128), metavar=('H','W'))
    p.add_argument('--memory', type=float, default=8., help='GB of the imagined machine')
    p.add_argument('--arch', default='tf_efficientnet_lite0')
    p.add_argument('--bs', type=int, default=16, help='images in a batch, a multiple of 4; on a CPU the network itself needs much memory')
    p.add_argument('--steps', type=int, default=10)
    a = p.parse_args()
    if a.bs<4 or a.bs%4: p.error(f'--bs {a.bs}: a multiple of 4 is needed, because each identity has 4 images')
    main(a)
