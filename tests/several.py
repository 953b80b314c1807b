"""Trains in several processes, for test_distributed.py: `python several.py FOLDER CASE… -- N…` writes FOLDER/CASE-N-RANK.pth for each number of processes N.
`torchrun … several.py FOLDER CASE…` does it in the processes of torchrun, and with SEVERAL_ON=cuda on GPUs.
`python several.py JOBS.json` runs commands in several processes, and adds to each job the `codes`, `out` and `err` of its processes and its `seconds`.

The processes are forked from one that has imported everything and computed nothing, which saves the import of torch in each of them."""
import io, json, os, shutil, signal, socket, sys, time, warnings
from pathlib import Path

device = os.environ.get('SEVERAL_ON', 'cpu')
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', TORCH_CPP_LOG_LEVEL='ERROR', **(dict(CUDA_VISIBLE_DEVICES='') if device=='cpu' else {}))  # more processes than GPUs would be refused
warnings.simplefilter('ignore')
import torch
from contextlib import redirect_stdout
from functools import lru_cache
from timm.layers import BatchNormAct2d
from fastai.callback.all import *
from fastai.torch_core import set_seed
from fastcore.all import *
from reid_fastai.all import *
from reid_fastai.core import ranks
from reid_fastai.test_utils import *
import reid_fastai.callback.distributed as cd
from forks import command, fork

class Frozen(Callback):
    "Norms use the statistics they have"
    run_after = TrainEvalCallback
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.eval()

class Stop(Callback):
    "Ends a training after its first epoch"
    order = 80
    def after_epoch(self): raise CancelFitException()

class Watch(Callback):
    "Losses of all steps"
    order = 70
    def before_fit(self): self.losses = []
    def after_batch(self):
        if self.training: self.losses.append(self.loss.item())

def outcome(learn):
    "What is compared"
    cb = find_l2(learn)
    return dict(weights={k: v.cpu().clone() for k,v in learn.model.state_dict().items()}, history=cb.history[['theta','lam','sq_norm','angle','rotates']].to_numpy('float64') if cb else None, table=[[float(v) for v in row] for row in learn.recorder.values],
                losses=learn.watch.losses, epoch=learn.dls.train.epoch, wrapped=type(learn.model).__name__, forwards=[n for n,m in learn.model.named_modules() if 'forward' in vars(m)],
                chance=torch.rand(2), bs=learn.dls.train.bs)

def small_net(n_classes, regions):
    "A network of two stages, one of timm's norms with an activation in it"
    trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False), BatchNormAct2d(8), conv_norm(8, 16, 3, 2))
    net = ReIDNet(trunk, torch.nn.Sequential(conv_norm(16, 16, 3)), 16, n_classes, regions, arch='small')
    for h in net.heads: torch.nn.init.normal_(h.classifier.weight, std=.1)
    return net

@lru_cache
def loaders(**kw): return tiny_dls(steps=5, device=device, **kw)

def learner(regions=0, l2=AdaptiveL2, cbs=(), dtype=torch.float64, seed=None, **kw):
    "In float64, where 1e-9 is a difference; in float32, Adam makes much of the rounding of gradients that are nearly zero"
    set_seed(ifnone(seed, 1+ranks.rank))  # rank 0 gives its weights and random numbers to all
    dls,loss = loaders(**kw),ReIDLoss()
    dls.train.epoch = 0
    learn = reid_learner(dls, small_net(dls.c, regions).to(dtype), loss_func=lambda out,pid,cam: loss(out, pid).float(), cbs=[l2(), *cbs, Watch()])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def train(fit, *args, **kw):
    "What `fit` makes of a learner"
    learn = learner(*args, **kw)
    with learn.distrib_ctx(): fit(learn)
    return outcome(learn)

def resumed():
    "Two epochs, of which one process has trained the first"
    def fit(learn, folder, *cbs):
        learn.add_cbs([cb := Checkpoint(folder), *cbs])
        learn.fit(2, 1e-3, start_epoch=cb.load())
    first,own = folder/'first',folder/f'resumed-{ranks.n}'
    if ranks.n==1:
        first.mkdir()
        train(lambda l: fit(l, first, Stop()), cbs=[Frozen()])
    by_leader(shutil.copytree)(first, own)
    return train(lambda l: fit(l, own), cbs=[Frozen()])

def found():
    "A learning rate, then the best of two epochs"
    learn,said = learner(cbs=[Frozen()]),io.StringIO()
    learn.path = folder/f'found-{ranks.n}'
    with learn.distrib_ctx(), redirect_stdout(said):
        learn.fit(1, 1e-3)
        rate = learn.lr_find(num_it=12, show_plot=False)
        learn.fit(2, 1e-3, cbs=SaveModelCallback(monitor='train_loss'))
    return dict(outcome(learn), rate=rate[0], said=said.getvalue())

def few_queries():
    "Fewer queries than processes"
    gen = torch.Generator().manual_seed(0)
    return RetrievalResults.from_embeddings(torch.randn(3, 4, generator=gen), [1,2,3], [0]*3, torch.randn(40, 4, generator=gen), [0,1,2,3]*10, [1]*40)

def verified_numbers(res):
    "Numbers of a verification, as one vector: from kept pairs, from a bracket, from the bootstrap and from searches"
    v = res.verification()
    return torch.cat([torch.as_tensor(o, dtype=torch.float64).flatten() for o in (v.roc().to_numpy(), v.summary().to_numpy(), v.threshold(.6), v.interval(.3, n=20).to_numpy(), v.open_set(.5).to_numpy())])

def shared(regions=0):
    "What evaluation gives within the context"
    learn = learner(regions, val_bs=8, seed=1)
    with learn.distrib_ctx():
        embs,val = learn.embed(),learn.validate()
        res = learn.retrieval()
        rr,preds = res.rerank(k1=5, k2=2),learn.get_preds()[0]
        verified = torch.cat([verified_numbers(o) for o in (res, few_queries())])
    return dict(verified=verified, preds=preds, embs=embs, val=[float(o) for o in val], ranks=res.ranks, reranked=rr.ranks, ap=rr.ap, topk=res.topk(3).idxs)

def refused():
    "Messages of what cannot be trained together"
    res = []
    def ask(learn, n_epoch=1):
        try:
            with learn.distrib_ctx(): learn.fit(n_epoch, 1e-3)
        except ValueError as e: res.append(str(e))
    ask(learner(n_pids=5))
    ask(learner(), 1+ranks.rank)
    other = learner(val_bs=16)
    other.dls.splits.df.loc[3,'camid'] += ranks.rank
    ask(other)
    one = learner()
    with one.distrib_ctx(): one.fit(1, 1e-3)  # goes on as if nothing had been
    return dict(messages=res, bs=one.dls.train.bs)

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
    'accumulated, regions': lambda: train(lambda l: l.fit(2, 1e-3), regions=2, cbs=[Frozen(), GradientAccumulation(32)]),
    'paper, global': lambda: train(lambda l: l.fit_paper(1, 1, 1e-3), regions=0, cbs=[Frozen()]),
    'rotation': lambda: train(lambda l: l.fit_one_cycle(2, 1e-3), l2=RotationControl),
    'auto': lambda: train(lambda l: l.fit_one_cycle(2, 1e-3), l2=AutoL2),
    'paper': lambda: train(lambda l: l.fit_paper(1, 1, 1e-3), regions=2, cbs=[Frozen()]),
    'conventional': lambda: train(lambda l: l.fit(2, 1e-3), cbs=[Frozen(), GradientClip(.5)], l2=ConventionalL2),
    'workers': lambda: train(lambda l: l.fit(1, 1e-3), cbs=[Frozen()], in_memory=False, num_workers=2),
    'float32': lambda: train(lambda l: l.fit(2, 1e-3), regions=2, cbs=[Frozen()], dtype=torch.float32),
    'float32, global': lambda: train(lambda l: l.fit(2, 1e-3), cbs=[Frozen()], dtype=torch.float32),
    'found': found, 'resumed': resumed, 'shared': shared, 'refused': refused,
    'fault: mined apart': without('gather', lambda o: o),
    'fault: not averaged': without('mean_gradients'),
    'fault: penalty twice': lambda: train(lambda l: l.fit(2, 1e-3), cbs=[Frozen()], l2=Twice),
}
if supports_precision('bf16', 'cpu'): CASES['bf16'] = lambda: train(lambda l: l.to_bf16().fit(1, 1e-3), regions=2, cbs=[Frozen()], dtype=torch.float32)

def go(out, cases, rank, n):
    "One process"
    global folder
    folder = Path(out)
    torch.set_num_threads(1)
    with together():
        for c in cases:
            signal.alarm(60)  # a case that waits for ever fails
            torch.save(CASES[c](), f'{out}/{c}-{n}-{rank}.pth')
        signal.alarm(0)

def go_forked(out, cases, rank, n, port):
    if n>1: os.environ.update(in_group(rank, n, port))
    go(out, cases, rank, n)

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def in_group(rank, n, port): return dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(n), RANK=str(rank), LOCAL_RANK=str(rank))

def run(job):
    """Run `argv`, or of each rank its own in `argvs`, in `n` processes; `kill`: [rank, file that must be there, how many lines it must have]"""
    n,port,start,kill = job.get('n', 1),free_port(),time.time(),job.get('kill')
    argvs,logs = job.get('argvs') or [job['argv']]*n,[f'{job["cwd"]}/.{job["name"].replace(" ", "-")}-{r}' for r in range(n)]
    left = {fork(command, argvs[r], logs[r], job['cwd'], in_group(r, n, port) if n>1 else {}): r for r in range(n)}
    pids,codes = list(left),[None]*n
    while left:
        time.sleep(.01)
        if kill and (f := Path(job['cwd'])/kill[1]).exists() and len(f.read_text().splitlines())>=kill[2]: os.kill(pids[kill[0]], signal.SIGKILL); kill = None
        if time.time()-start>60: [os.kill(p, signal.SIGKILL) for p in left]
        for p in list(left):
            if (o := os.waitpid(p, os.WNOHANG))[0]: codes[left.pop(p)] = os.waitstatus_to_exitcode(o[1])
    job.update(codes=codes, seconds=time.time()-start, **{ext: [Path(f'{l}.{ext}').read_text() for l in logs] for ext in ('out','err')})

if __name__=='__main__':
    out,*args = sys.argv[1:]
    if out.endswith('.json'):
        import reid_fastai.cli  # once for all forks
        jobs = json.loads(Path(out).read_text())
        for o in jobs: run(o)
        Path(out).write_text(json.dumps(jobs))
        sys.exit()
    if 'RANK' in os.environ: sys.exit(go(out, args, *(int(os.environ[o]) for o in ('RANK','WORLD_SIZE'))))
    at = args.index('--')
    bad = 0
    for n in map(int, args[at+1:]):
        port = free_port()
        pids = [fork(go_forked, out, args[:at] or list(CASES), r, n, port) for r in range(n)]
        bad += sum(os.waitpid(p, 0)[1]!=0 for p in pids)
    sys.exit(bad)
