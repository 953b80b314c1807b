"""Trains in several processes, for test_distributed.py: `python ranks.py FOLDER CASE… -- N…` writes FOLDER/CASE-N-RANK.pth for each number of processes N.

The processes are forked from one that has imported everything and computed nothing, which saves the import of torch in each of them."""
import os, socket, sys, warnings
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
warnings.simplefilter('ignore')
import torch
from fastai.callback.all import *
from fastcore.all import *
from reid_fastai.all import *
from reid_fastai.core import ranks
from reid_fastai.test_utils import *
import reid_fastai.callback.distributed as cd

class Frozen(Callback):
    "Norms use the statistics they have"
    run_after = TrainEvalCallback
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.eval()

class Watch(Callback):
    "Losses of all steps"
    order = 70
    def before_fit(self): self.losses = []
    def after_batch(self):
        if self.training: self.losses.append(self.loss.item())

def outcome(learn):
    "What is compared"
    cb = find_l2(learn)
    return dict(weights={k: v.clone() for k,v in learn.model.state_dict().items()}, history=cb.history[['theta','lam','sq_norm']].to_numpy('float64') if cb else None, table=[[float(v) for v in row] for row in learn.recorder.values],
                losses=learn.watch.losses, epoch=learn.dls.train.epoch, wrapped=type(learn.model).__name__, forwards=[n for n,m in learn.model.named_modules() if 'forward' in vars(m)],
                chance=torch.rand(2), bs=learn.dls.train.bs)

def train(fit, regions=0, cbs=(), l2=AdaptiveL2, augs=None, **kw):
    "A learner, trained by `fit`"
    learn = tiny_learner(tiny_dls(steps=5, batch_tfms=augs, **kw), regions=regions, seed=1+ranks.rank, cbs=[l2(), *cbs, Watch()])  # rank 0 gives its weights and random numbers to all
    if learn.model.heads[0].classifier.weight.std()<.01: [h.classifier.weight.data.mul_(30) for h in learn.model.heads]
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): fit(learn)
    return outcome(learn)

def shared(regions=0):
    "What evaluation gives within the context"
    learn = tiny_learner(tiny_dls(steps=1, val_bs=8), regions=regions, cbs=Watch())
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx():
        embs,val = learn.embed(),learn.validate()
        res = learn.retrieval()
        rr = res.rerank(k1=5, k2=2)
    return dict(embs=embs, val=[float(o) for o in val], ranks=res.ranks, reranked=rr.ranks, ap=rr.ap, topk=res.topk(3).idxs)

def without(name, f=lambda *_: None):
    "Another `callback.distributed` with a fault"
    def case():
        old = getattr(cd, name)
        setattr(cd, name, f)
        try: return train(lambda l: l.fit(2, 1e-3), regions=0, cbs=[Frozen()])
        finally: setattr(cd, name, old)
    return case

class Twice(AdaptiveL2):
    "A penalty that each process adds to the gradient of its part"
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad + self.regularizer()*ranks.n

CASES = {
    'plain': lambda: train(lambda l: l.fit(2, 1e-3), cbs=[Frozen()]),
    'regions': lambda: train(lambda l: l.fit(2, 1e-3), regions=2, cbs=[Frozen()]),
    'statistics': lambda: train(lambda l: l.fit_one_cycle(2, 1e-3), regions=2),
    'accumulated': lambda: train(lambda l: l.fit(4, 1e-3), regions=0, cbs=[Frozen(), GradientAccumulation(32)]),
    'paper': lambda: train(lambda l: l.fit_paper(1, 1, 1e-3), regions=2, cbs=[Frozen()]),
    'conventional': lambda: train(lambda l: l.fit(2, 1e-3), cbs=[Frozen(), GradientClip(.5)], l2=ConventionalL2),
    'workers': lambda: train(lambda l: l.fit(1, 1e-3), cbs=[Frozen()], in_memory=False, num_workers=2),
    'shared': shared,
    'fault: mined apart': without('gather', lambda o: o),
    'fault: not averaged': without('mean_gradients'),
    'fault: penalty twice': lambda: train(lambda l: l.fit(2, 1e-3), cbs=[Frozen()], l2=Twice),
}

def go(out, cases, rank, n, port):
    "One process"
    torch.set_num_threads(1)
    if n>1: os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(n), RANK=str(rank), LOCAL_RANK=str(rank))
    with together():
        for c in cases: torch.save(CASES[c](), f'{out}/{c}-{n}-{rank}.pth')

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def fork(f, *args):
    "Run `f` in a forked process, whose number is returned"
    if pid := os.fork(): return pid
    code = 1
    try: f(*args); code = 0
    except BaseException: import traceback; traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)

if __name__=='__main__':
    out,*args = sys.argv[1:]
    at = args.index('--')
    bad = 0
    for n in map(int, args[at+1:]):
        port = free_port()
        pids = [fork(go, out, args[:at] or list(CASES), r, n, port) for r in range(n)]
        bad += sum(os.waitpid(p, 0)[1]!=0 for p in pids)
    sys.exit(bad)
