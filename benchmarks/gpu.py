"""What a GPU is for, in one command of at most 8 minutes, without a network:

    pip install --no-index --no-deps WHEELS/*.whl      # on a machine that has torch ≥ 2.11 and timm
    python benchmarks/gpu.py [--data DIR] [--minutes 8] [--tiny] [--device cuda]

WHEELS is a folder of wheels, filled where there is a network, on the same platform, by

    pip wheel --no-deps -w WHEELS . && pip download --no-deps -d WHEELS fastai fastcore fasttransform fastprogress fastdownload python-fasthtml starlette uvicorn \\
        itsdangerous python-multipart beautifulsoup4 soupsieve oauthlib requests urllib3 certifi charset-normalizer plum-dispatch beartype rich markdown-it-py mdurl \\
        pygments cloudpickle pytorch-metric-learning scikit-learn narwhals joblib threadpoolctl scipy pandas tzdata matplotlib contourpy cycler fonttools kiwisolver \\
        pyparsing python-dateutil six packaging tqdm pytest pluggy iniconfig

(fastai also names spacy, which nothing here imports: `--no-deps` in the first line leaves it out)

It prints, as Markdown:
- training of ResNet50, 384×128, batches of 64, with the paper's branches: images a second of `reid_learner.fit` and of a bare loop, in fp32, TF32 and bf16, in either layout, and compiled in channels last;
- the share of the penalty and of θ's update in a step (goal: at most 1 %);
- `RetrievalResults` and re-ranking at the size of Market-1501 and of MSMT17 on the device, beside the bare product;
- the tests that are marked for a GPU;
- with --data, one training of 10 epochs by `reid-train`.
Each part has a share of the time. What does not fit is left out with a message. What fails is reported in one line, the rest runs, and the exit code is 1.
`--tiny --device cpu` runs all but the tests at toy size; its training has 2 steps, on rendered pedestrians if there is no --data.
"""
import argparse, gc, statistics, subprocess, sys, tempfile, time, warnings
BEGAN = time.perf_counter()  # the time for imports counts
from pathlib import Path

import timm, torch
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders

from reid_fastai.callback.precision import ReIDPrecision, precisions, supports_precision
from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.core import brief
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.evaluation.all import RetrievalResults
from reid_fastai.learner import reid_learner
from reid_fastai.losses import ReIDLoss
from reid_fastai.models import build_reid_net
from reid_fastai.optimizer import FusedAdam
from reid_fastai.regularizers import AdaptiveL2Regularizer

warnings.filterwarnings('ignore')
SIZES = dict(market=(3368, 15913, 750), msmt17=(11659, 82161, 3060))

def sync(dev):
    if dev.type=='cuda': torch.cuda.synchronize()

def secs(f, dev):
    sync(dev)
    start = time.perf_counter()
    f()
    sync(dev)
    return time.perf_counter()-start

def attempt(a, what, f, *args):
    "Result of `f`; if it fails, print `what` and the error in one line, and return NaN"
    try: return f(*args)
    except Exception as e:
        a.failed = True
        print(f'{what}{type(e).__name__}: {brief(e, 300)}', flush=True)
        return float('nan')
    finally:
        gc.collect()  # else the next peak of memory would contain this network
        if a.device.type=='cuda': torch.cuda.empty_cache()

class _Batches:
    "Random batches at hand, as a loader"
    def __init__(self, n, bs, size, dev):
        self.b = [(torch.rand(bs, 3, *size, device=dev), torch.arange(bs, device=dev)//4, torch.zeros(bs, dtype=torch.long, device=dev)) for _ in range(min(n, 4))]
        self.n,self.device,self.dataset = n,dev,None
    def __len__(self): return self.n
    def __iter__(self): return (self.b[i%len(self.b)] for i in range(self.n))
    def to(self, dev): return self

class _NoSearch(Callback):
    "Training alone"
    def before_validate(self): raise CancelValidException()

def set_tf32(on): torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on

def network(a, layout, compiled):
    torch.manual_seed(0)
    net = build_reid_net(a.arch, 751, pretrained=False).to(a.device).to(memory_format=layout)
    if compiled: net.compile()
    return net

def bare(a, net, precision, dl):
    "A training loop of PyTorch alone"
    reg,loss_func = AdaptiveL2Regularizer(net).to(a.device),ReIDLoss()
    opt = torch.optim.Adam([*net.parameters(), reg.theta], lr=1e-4, eps=1e-7, fused=True)
    def go():
        net.train()  # `fit` leaves it in evaluation mode
        for x,pid,_ in dl:
            with torch.autocast(a.device.type, precisions[precision], enabled=precision!='fp32'): out = net(x)
            (loss_func(out, pid)+reg()).backward()
            opt.step()
            opt.zero_grad()
    return go

def fit(a, net, precision, dl):
    dls = DataLoaders(dl, dl, device=a.device)
    dls.c,dls.n_inp = 751,1
    learn = reid_learner(dls, net, cbs=[AdaptiveL2(), _NoSearch(), *([ReIDPrecision(precision)] if precision!='fp32' else [])])
    learn.remove_cb(learn.retrieval_metrics)
    def go():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    return go

def training(a):
    dl = _Batches(a.steps, a.bs, a.size, a.device)
    print(f'## Training\n\n{a.arch}, {a.size[0]}×{a.size[1]}, batches of {a.bs}, global and two regional branches; images a second, medians of at most {a.rounds} rounds in turn\n')
    print('| precision | layout | compiled | bare loop | fit | fit / bare (goal 0.97) | peak memory of both, GB |\n|---|---|---|---|---|---|---|')
    for compiled in (False,) if a.tiny else (False, True):
        for name,precision,tf32 in ('fp32','fp32',False),('TF32','fp32',True),('bf16','bf16',False):
            if a.device.type!='cuda' and name=='TF32' or not supports_precision(precision, a.device): continue
            for layout in torch.contiguous_format,torch.channels_last:
                if a.tiny and precision=='bf16' and layout is torch.contiguous_format: continue
                if compiled and layout is not torch.channels_last: continue
                row = f'| {name} | {str(layout).split(".")[-1]} | {compiled} | '
                if a.left()<(60 if compiled else 20): print(f'{row}left out, no time |'); continue
                set_tf32(tf32)
                attempt(a, row, beside_bare, a, row, precision, layout, compiled, dl)
    set_tf32(False)

def beside_bare(a, row, precision, layout, compiled, dl):
    "Print a row of the table: a training by `fit` beside a bare loop"
    net = network(a, layout, compiled)
    gos = [bare(a, net, precision, dl), fit(a, net, precision, dl)]
    net.to(memory_format=layout)  # `reid_learner` has a layout of its own
    if a.device.type=='cuda': torch.cuda.reset_peak_memory_stats()
    for go in gos: go()
    ts = []
    while not ts or len(ts)<a.rounds and a.left()>sum(ts[-1]): ts.append([secs(go, a.device) for go in gos])
    b,t = (a.steps*a.bs/statistics.median(o) for o in zip(*ts))
    mem = torch.cuda.max_memory_allocated()/1e9 if a.device.type=='cuda' else float('nan')
    print(f'{row}{b:.0f} | {t:.0f} | {statistics.median(x/y for x,y in ts):.3f} | {mem:.1f} |', flush=True)

def shares(a):
    "Of the penalty, forward and backward, and of θ's update in a step"
    net,dl = network(a, torch.channels_last, False),_Batches(1, a.bs, a.size, a.device)
    precision = 'bf16' if supports_precision('bf16', a.device) else 'fp32'
    reg = AdaptiveL2Regularizer(net).to(a.device)
    step = bare(a, net, precision, dl)
    def penalty(): reg().backward()
    penalty()
    theta = FusedAdam([reg.theta], lr=1e-4)
    for f in step,penalty,theta.step: f()
    penalty()
    ts = [[secs(f, a.device) for f in (step,penalty,theta.step)] for _ in range(3 if a.tiny else 30)]
    s,p,t = map(statistics.median, zip(*ts))
    print(f'\nA step in {precision} takes {1e3*s:.1f} ms; the penalty alone {1e3*p:.2f} ms, {100*p/s:.2f} %; the update of θ alone {1e3*t:.2f} ms, {100*t/s:.2f} % (goal: 1 % together)', flush=True)

def features(n_q, n_g, n_ids, dev, d=2048):
    g = torch.Generator(dev).manual_seed(0)
    def part(n): return torch.randn(n, d, generator=g, device=dev),torch.randint(1, n_ids+1, (n,), generator=g, device=dev),torch.randint(0, 6, (n,), generator=g, device=dev)
    return *part(n_q),*part(n_g)

def retrieval(a):
    print('\n## Retrieval\n\n| size | product, s | retrieval, s | ratio | re-ranking, s | mAP |\n|---|---|---|---|---|---|')
    for name,(n_q,n_g,n_ids) in (dict(tiny=(40, 200, 10)) if a.tiny else SIZES).items():
        if a.left()<(30 if name=='market' else 90) and not a.tiny: print(f'| {name} | left out, no time |'); continue
        attempt(a, f'| {name} | ', search_of, a, name, n_q, n_g, n_ids)

def search_of(a, name, *sizes):
    "Print a row of the table: retrieval and re-ranking beside the bare product"
    args = features(*sizes, a.device)
    q,g = args[0],args[3]
    def product():
        for o in q.split(1024): o@g.T
    def search(): search.res = RetrievalResults.from_embeddings(*args); search.res.mAP
    for f in product,search: f()
    p,r = secs(product, a.device),secs(search, a.device)
    again = attempt(a, f'| {name}, re-ranking | ', secs, lambda: search.res.rerank().mAP, a.device) if name!='msmt17' or a.left()>150 else float('nan')
    print(f'| {name} | {p:.3f} | {r:.3f} | {r/p:.2f} | {again:.2f} | {100*search.res.mAP:.2f} |', flush=True)

def command(a, title, *args):
    "Print what a command of Python says, if it ends in time; `RuntimeError` if it fails"
    print(f'\n## {title}\n')
    try: res = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=(limit := a.left()))
    except subprocess.TimeoutExpired: return print(f'Not done within {limit:.0f} s', flush=True)
    print(res.stdout.strip())
    if res.returncode: raise RuntimeError(f'exit code {res.returncode}: {res.stderr.strip()[-250:]}')

def gpu_tests(a):
    "Run the tests for a GPU; other files of tests import packages that the help does not name"
    command(a, 'Tests', '-m', 'pytest', '-q', '--tb=short', '-p', 'no:cacheprovider', '-W', 'ignore', Path(__file__).resolve().parents[1]/'tests'/'test_gpu.py', '-m', 'gpu')

def train(a):
    data = a.data or make_synthetic(tiny=True)
    how = '--size 64x32 --epochs 1 --n-pids 4 --steps 2' if a.tiny else '--size 256x128 --epochs 10'
    with tempfile.TemporaryDirectory() as d:
        command(a, f'Training on {data}', '-m', 'reid_fastai.cli', 'reid-train', data, '--out', f'{d}/run', '--arch', a.arch, '--pretrained', a.pretrained, '--device', a.device, *how.split())

#: Share of the time, and seconds below which a part is left out
PARTS = {training: (50,20), shares: (8,15), retrieval: (20,30), gpu_tests: (10,30), train: (15,60)}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', help='dataset to train on, in a layout that reid-train knows')
    p.add_argument('--minutes', type=float, default=8)
    p.add_argument('--device', default='cuda')
    p.add_argument('--tiny', action='store_true', help='toy sizes, for a test of this script')
    p.add_argument('--arch', default=None, help='default: resnet50')
    p.add_argument('--pretrained', default='none', help="initial weights of the training on --data: 'none', 'imagenet', which needs a network or a cache, or a file")
    a = p.parse_args(argv)
    a.device = torch.device(a.device)
    if a.device.type=='cuda' and not torch.cuda.is_available(): raise SystemExit('No GPU here. `--tiny --device cpu` tries the script on the CPU.')
    a.arch = a.arch or ('resnet10t' if a.tiny else 'resnet50')
    a.size,a.bs,a.steps,a.rounds = ((64,32), 8, 1, 1) if a.tiny else ((384,128), 64, 10, 5)
    what = torch.cuda.get_device_name() if a.device.type=='cuda' else 'CPU'
    print(f'# {what}\n\ntorch {torch.__version__}, timm {timm.__version__}\n')
    parts = {f: o for f,o in PARTS.items() if not (f is train and not a.data and not a.tiny or f is gpu_tests and a.tiny)}
    a.failed = False
    for i,(f,(share,least)) in enumerate(parts.items()):
        left = BEGAN+60*a.minutes-10-(now := time.perf_counter())  # 10 s for the end of this process
        end = now+left*share/sum(o for o,_ in list(parts.values())[i:])
        a.left = lambda: end-time.perf_counter()
        name = f'\n{f.__name__.replace("_", " ")}: '
        if a.left()<(0 if a.tiny else least): print(f'{name}left out, {max(a.left(), 0):.0f} s are left for it')
        else: attempt(a, name, f, a)
    if a.failed: raise SystemExit('Some of it failed, see above.')

if __name__=='__main__': main()
