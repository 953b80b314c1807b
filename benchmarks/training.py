"""Images a second and peak memory of `reid_learner.fit`, beside a bare PyTorch loop and beside the training loops of two other libraries.

    python benchmarks/training.py [--arch resnet50] [--size 256 128] [--precision bf16] [--torchreid DIR] [--fastreid DIR]

- bare loop: the same network, loss, penalty and optimizer, batches of floats at hand; no loader, no augmentation, no callback. `--compile` adds one with a compiled network.
- fit: `reid_learner.fit` of images in memory, with augmentation and `AdaptiveL2`.
- from files: what `reid-train` does, from image files on: decoding once, then the epochs. torchreid (`ImageTripletEngine.train`) and fast-reid (`SimpleTrainer`)
  train the same backbone from the same files at the same size and batch, with their own loaders, samplers, transforms and losses.

All take turns in one process; ratios are medians of the rounds. Peak memory is that of a process of its own. DIR is a checkout of KaiyangZhou/deep-person-reid or
JDAI-CV/fast-reid (the latter needs the packages yacs and termcolor). People are rendered by `make_synthetic`.
"""
import argparse, collections, collections.abc, contextlib, io, itertools, os, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path
from unittest.mock import MagicMock

import torch
from fastai.callback.core import Callback, CancelValidException
from torch import nn

import memory
from reid_fastai.callback.precision import ReIDPrecision, precisions
from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.core import keep_freed_memory
from reid_fastai.data.block import ReIDDataLoaders
from reid_fastai.data.datasets import read_dataset
from reid_fastai.data.splits import JUNK_PID
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.learner import reid_learner
from reid_fastai.losses import ReIDLoss
from reid_fastai.models import build_reid_net, fast_depthwise
from reid_fastai.regularizers import AdaptiveL2Regularizer

warnings.filterwarnings('ignore')

def device(): return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
def sync():
    if torch.cuda.is_available(): torch.cuda.synchronize()

class _NoSearch(Callback):
    "Training alone"
    def before_validate(self): raise CancelValidException()

def network(a, n_classes, ours=True):
    torch.manual_seed(0)
    net = build_reid_net(a.arch, n_classes, regions=0, pretrained=False).to(device())
    return fast_depthwise(net).lay_out(device()) if ours else net

def loaders(a):
    return ReIDDataLoaders.from_path(a.data, size=a.size, n_pids=a.bs//4, n_imgs=4, steps=a.steps, device=device())

def learner(a, dls):
    learn = reid_learner(dls, network(a, dls.c), cbs=[AdaptiveL2(), _NoSearch(), *([ReIDPrecision(a.precision)] if a.precision!='fp32' else [])])
    learn.remove_cb(learn.retrieval_metrics)
    return learn

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)

def ours_in_memory(a):
    learn = learner(a, loaders(a))
    return lambda: fit(learn)

def ours_from_files(a):
    "Decoding is part of the first epoch of `a.epochs`, and is spread over them"
    dls = loaders(a)
    learn = learner(a, dls)
    def go():
        fit(learn)
        start = time.perf_counter()
        loaders(a)
        return -(time.perf_counter()-start)*(1-1/a.epochs)  # what one epoch does not pay
    return go

def bare(a, compiled=False):
    dls = loaders(a)
    batches = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x,y,_ in dls.train]
    net,loss_func = network(a, dls.c).train(),ReIDLoss()
    if compiled: net.compile()
    reg = AdaptiveL2Regularizer(net).to(device())
    opt = torch.optim.Adam([*net.parameters(), reg.theta], lr=1e-4, eps=1e-7, fused=True)
    scaler = torch.amp.GradScaler(device().type, enabled=a.precision=='fp16')
    def go():
        for x,pid in batches:
            with torch.autocast(device().type, precisions[a.precision], enabled=a.precision!='fp32'): out = net(x)
            scaler.scale(loss_func(out, pid)+reg()).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        sync()
    return go

class _Pair(nn.Module):
    "Our network with the output that torchreid expects"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x):
        out = self.net(x)
        return (out.logits[0],out.embeddings[0]) if self.training else out

def torchreid(a):
    for o in 'cv2','gdown','h5py','imageio','faiss': sys.modules.setdefault(o, MagicMock())  # not needed for training
    sys.path.insert(0, a.torchreid)
    root = Path(tempfile.mkdtemp())
    (root/'market1501').mkdir()
    os.symlink(Path(a.data).resolve(), root/'market1501'/'Market-1501-v15.09.15')
    with contextlib.redirect_stdout(io.StringIO()):
        from torchreid.data import ImageDataManager
        from torchreid.engine import ImageTripletEngine
        dm = ImageDataManager(str(root), 'market1501', height=a.size[0], width=a.size[1], batch_size_train=a.bs, num_instances=4, train_sampler='RandomIdentitySampler',
                              transforms=['random_flip','random_crop','random_erase'], use_gpu=torch.cuda.is_available(), workers=os.cpu_count())
        model = _Pair(network(a, dm.num_train_pids, ours=False))
        engine = ImageTripletEngine(dm, model, torch.optim.Adam(model.parameters(), lr=1e-4), use_gpu=torch.cuda.is_available())
    engine.epoch,engine.max_epoch = 0,1
    engine.train_loader = _Steps(engine.train_loader, a.steps)
    def go():
        with contextlib.redirect_stdout(io.StringIO()): engine.train(print_freq=10**6)
        sync()
    return go

class _Steps:
    "`n` batches of a loader at a time, over and over; its workers go on meanwhile"
    def __init__(self, dl, n):
        self.n = n
        self.batches = (b for _ in itertools.count() for b in dl)
    def __len__(self): return self.n
    def __iter__(self): return itertools.islice(self.batches, self.n)

def fastreid(a):
    for o in 'Mapping','Sequence': setattr(collections, o, getattr(collections.abc, o))  # gone from `collections` since Python 3.10
    for o in 'faiss','cv2','gdown': sys.modules.setdefault(o, MagicMock())
    sys.path.insert(0, a.fastreid)
    from fastreid.config import get_cfg
    from fastreid.data.build import fast_batch_collator
    from fastreid.data.common import CommDataset
    from fastreid.data.samplers import NaiveIdentitySampler
    from fastreid.data.transforms import build_transforms
    from fastreid.engine.train_loop import SimpleTrainer
    from fastreid.modeling.losses import cross_entropy_loss, triplet_loss
    from fastreid.utils.events import EventStorage
    cfg = get_cfg()
    cfg.INPUT.SIZE_TRAIN = list(a.size)
    cfg.INPUT.PADDING.ENABLED = cfg.INPUT.REA.ENABLED = True
    splits = read_dataset(a.data)
    items = [(str(Path(splits.root)/o.path), o.pid, o.camid) for o in splits.train[lambda o: o.pid!=JUNK_PID].itertuples()]
    data = CommDataset(items, build_transforms(cfg, is_train=True), relabel=True)
    batches = torch.utils.data.BatchSampler(NaiveIdentitySampler(data.img_items, a.bs, 4), a.bs, True)
    # Its own loader is PyTorch's, with a stream of CUDA beside it
    dl = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=os.cpu_count(), collate_fn=fast_batch_collator, pin_memory=torch.cuda.is_available())
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.net = network(a, data.num_classes, ours=False)
        def forward(self, b):
            pid = b['targets'].to(device())
            out = self.net(b['images'].to(device()).float()/255)
            return dict(x=cross_entropy_loss(out.logits[0], pid, .1), t=triplet_loss(out.embeddings[0], pid, 0., False, True))
    model = Model()
    trainer = SimpleTrainer(model, dl, torch.optim.Adam(model.parameters(), lr=1e-4), None)  # its sampler never ends, nor do its workers
    def go():
        with EventStorage(0) as trainer.storage:
            for trainer.iter in range(a.steps): trainer.run_step()
        sync()
    return go

def peak(): return torch.cuda.max_memory_allocated()/1e9 if torch.cuda.is_available() else memory.peak()

def timed(go):
    start = time.perf_counter()
    less = go() or 0.
    sync()
    return time.perf_counter()-start+less

def main(a):
    ways = {'bare loop': bare, 'fit': ours_in_memory}
    if a.compile: ways['bare loop, compiled'] = lambda a: bare(a, compiled=True)
    if a.torchreid or a.fastreid: ways['from files'] = ours_from_files
    if a.torchreid: ways['torchreid'] = torchreid
    if a.fastreid: ways['fast-reid'] = fastreid
    keep_freed_memory()
    if a.only:
        ways[a.only](a)()
        print(peak())
        return
    print(f'torch {torch.__version__}, {device()}, {torch.get_num_threads()} threads; {a.arch}, {a.size[0]}×{a.size[1]}, batches of {a.bs}, ours in {a.precision}; {a.rounds} rounds of {a.steps} steps')
    gos = {k: f(a) for k,f in ways.items()}
    for go in gos.values(): go()  # warm up
    def turn(go):
        if a.torchreid or a.fastreid: time.sleep(5)  # their loader processes fill their queues first, and not during another's turn
        return timed(go)
    ts = [[turn(go) for go in gos.values()] for _ in range(a.rounds)]
    cols = dict(zip(gos, zip(*ts)))
    def ratio(k, of): return statistics.median(o/t for o,t in zip(cols[of], cols[k]))
    print(f'  fit is {ratio("fit", "bare loop"):.3f} × the bare loop (goal 0.97)', flush=True)
    if a.compile: print(f'  compiled: {ratio("bare loop, compiled", "bare loop"):.2f} × the bare loop')
    for peer in 'torchreid','fast-reid':
        if peer in cols: print(f'  from files, {a.epochs} epochs of {a.steps} steps: {ratio("from files", peer):.2f} × {peer} (goal 1.5)')
    print('\n| loop | images/s | peak memory, GB |\n|---|---|---|', flush=True)
    for k,t in cols.items():
        res = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--only', k, '--data', str(a.data), '--steps', '2'], capture_output=True, text=True)
        print(f'| {k} | {a.steps*a.bs/statistics.median(t):.1f} | '+(f'{float(res.stdout.split()[-1]):.2f}' if res.returncode==0 else 'not known')+' |', flush=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet50')
    p.add_argument('--size', nargs=2, type=int, default=(256,128), metavar=('H','W'))
    p.add_argument('--bs', type=int, default=16, help='images in a batch, a multiple of 4')
    p.add_argument('--steps', type=int, default=8, help='of a round; the loaders of the other libraries have up to two batches a core ready when it begins, so take many more steps')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--epochs', type=int, default=10, help='over which decoding once is spread')
    p.add_argument('--precision', default='fp32', choices=list(precisions), help='of ours and of the bare loop')
    p.add_argument('--compile', action='store_true', help='also compile the network of the bare loop; this takes minutes')
    p.add_argument('--torchreid', metavar='DIR')
    p.add_argument('--fastreid', metavar='DIR')
    p.add_argument('--data', default=None, help='dataset in the layout of Market-1501; default: rendered people')
    p.add_argument('--only', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.bs<4 or a.bs%4: p.error(f'--bs {a.bs}: a multiple of 4 is needed, because each identity has 4 images')
    if a.rounds<1: p.error(f'--rounds {a.rounds}: at least 1 is needed')
    a.data,a.size = a.data or make_synthetic(),tuple(a.size)
    main(a)
