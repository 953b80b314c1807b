"The cost of rotation control beside a training step of a ResNet50 or another network"
import platform, time
from statistics import median

import timm, torch
from fastcore.script import call_parse

from memory import timed
from reid_fastai.core import keep_freed_memory
from reid_fastai.losses import ReIDLoss
from reid_fastai.models import build_reid_net
from reid_fastai.rotation import scale_invariant, turn_arrays

def copies(ws): return [w.detach().clone() for w in ws]

def turn(ws, opt, per_channel):
    "What the callback does around the optimizer's step → seconds of its own"
    before,olds = timed(copies, ws)
    opt.step()
    after,_ = timed(turn_arrays, ws, olds, torch.full((len(ws),), 2e-3), per_channel)
    return before+after

@call_parse
def main(
    arch:str='resnet50', # Network
    steps:int=5, # Training steps
    bs:int=16, # Images in the batch
    height:int=256, # Of the images, px
    width:int=128, # Of the images, px
    threads:int=2 # Of torch
):
    "Print the share of a training step that rotation control takes, per array and per channel, and the time to find the arrays"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()
    print(f'torch {torch.__version__}, timm {timm.__version__}, {platform.processor() or platform.machine()}, {threads} threads, float32')
    net,loss_func = build_reid_net(arch, 751, pretrained=False),ReIDLoss()
    x,pid = torch.rand(bs, 3, height, width),torch.arange(bs)//4
    found,names = timed(scale_invariant, net, x)
    ws = [p for n,p in net.named_parameters() if n in names]
    print(f'{len(ws)} scale-invariant arrays of {sum(w.numel() for w in ws)/1e6:.1f} million weights, found in {found:.1f} s')
    opt = torch.optim.Adam(net.parameters(), lr=2e-4, eps=1e-7)
    whole,own = [],{False: [], True: []}
    for i in range(steps+1):
        start = time.perf_counter()
        loss_func(net(x), pid).backward()
        opt.step()
        whole.append(time.perf_counter()-start)  # a step without the control
        for per_channel in own: own[per_channel].append(turn(ws, opt, per_channel))
        opt.zero_grad()
    for per_channel,ts in own.items():
        t,step = median(ts[1:]),median(whole[1:])
        print(f'per {"channel" if per_channel else "array"}: {1e3*t:.0f} ms of a step of {step:.2f} s, {100*t/step:.1f} % (medians of {steps})')
