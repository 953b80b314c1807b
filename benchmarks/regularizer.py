"The fused penalty beside the naive sum and beside bare passes over the weights, and its share of a ResNet50 training step"
import platform, time
from statistics import median

import timm, torch
from fastcore.script import call_parse

from reid_fastai.core import keep_freed_memory
from reid_fastai.models import build_reid_net
from reid_fastai.losses import ReIDLoss
from reid_fastai.regularizers import AdaptiveL2Regularizer, hard_sigmoid

def naive(reg):
    "The formula, written down"
    lam = reg.amplitudes*hard_sigmoid(reg.theta)
    sum(l*(w**2).sum() for l,w in zip(lam, reg.arrays)).backward()

def fused(reg): reg().backward()

@torch.no_grad()
def bare(reg):
    "The least that PyTorch's operations can do: each array read for the value, then read and its gradient written; no sum, no θ, no autograd"
    for w in reg.arrays: w.view(-1)@w.view(-1)
    for w in reg.arrays: w.grad = 2*w

def secs(f, reg):
    "Time of forward and backward, gradients made anew as after `zero_grad(set_to_none=True)`"
    for p in (*reg.arrays, reg.theta): p.grad = None
    start = time.perf_counter()
    f(reg)
    return time.perf_counter()-start

def compare(reg, reps, how):
    "Print the times, and the ratios of naive to the others"
    ways = naive,fused,bare
    for f in ways: secs(f, reg)  # warm up
    ts = [[secs(f, reg) for f in ways] for _ in range(reps)]
    print(f'{how}: ' + ', '.join(f'{f.__name__} {1e3*median(t):.1f} ms' for f,t in zip(ways, zip(*ts))) + ' (medians)')
    for i in 1,2: print(f'  naive / {ways[i].__name__}: {median(t[0]/t[i] for t in ts):.2f} (median of pairs), {min(t[0] for t in ts)/min(t[i] for t in ts):.2f} (of minima)')

def step(net, loss_func, reg, opt, x, pid, penalty):
    "Time of a training step, with or without the penalty"
    start = time.perf_counter()
    loss = loss_func(net(x), pid)
    if penalty: loss = loss+reg()
    loss.backward(); opt.step(); opt.zero_grad()
    return time.perf_counter()-start

@call_parse
def main(
    reps:int=100, # Repetitions of naive, fused and the bare passes, in turn
    steps:int=5, # Training steps with and without the penalty, in turn
    bs:int=16, # Images in the batch of a training step
    height:int=256, # Of the images, px
    width:int=128, # Of the images, px
    threads:int=2 # Of torch
):
    "Print the ratio of naive to fused, and the share of a step that the penalty takes"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f'torch {torch.__version__}, timm {timm.__version__}, {platform.processor() or platform.machine()}, {threads} threads, float32')
    reg = AdaptiveL2Regularizer(timm.create_model('resnet50'))
    print(f'ResNet50, {len(reg.arrays)} arrays, {sum(w.numel() for w in reg.arrays)/1e6:.1f} million weights, forward + backward, {reps} in turn')
    compare(reg, reps, 'as PyTorch comes')
    keep_freed_memory()
    compare(reg, reps, 'freed memory kept, as by reid-train')

    net = build_reid_net('resnet50', 751, pretrained=False)
    reg,loss_func = AdaptiveL2Regularizer(net),ReIDLoss()
    opt = torch.optim.Adam([*net.parameters(), reg.theta], lr=2e-4, eps=1e-7)
    x,pid = torch.rand(bs, 3, height, width),torch.arange(bs)//4
    step(net, loss_func, reg, opt, x, pid, True)
    ts = [[step(net, loss_func, reg, opt, x, pid, p) for p in (False, True)] for _ in range(steps)]
    alone = median(secs(fused, reg) for _ in range(9))
    off,on = (median(t) for t in zip(*ts))
    print(f'Training step of the paper\'s network, {bs} images of {height}×{width}: {off:.2f} s without, {on:.2f} s with the penalty (medians)')
    print(f'The penalty by itself takes {1e3*alone:.0f} ms, {100*alone/on:.1f} % of a step')
