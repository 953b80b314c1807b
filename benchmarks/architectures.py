"""Published networks beside their authors' code: the same arrays, the same images, the same outputs in evaluation and in training

    python benchmarks/architectures.py --torchreid DIR --rga DIR --ianet DIR --batnet DIR

Each DIR is a clone: KaiyangZhou/deep-person-reid, microsoft/Relation-Aware-Global-Attention-Networks, blue-blue272/ImgReID-IAnet and
PengfeiFANGanu/Attention-in-Attention-Networks. The last two have no licence: they are run here, and nothing is taken from them.
Both sides compute in float64: in training BatchNorm over a few images magnifies the rounding of float32 beyond 1e-5.
With `--batch`, a training step (forward and backward pass, no optimizer) of that many images is timed in float32 on both sides, in turn."""
import importlib.util, sys, tempfile, time, types
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
from fastcore.script import call_parse
from torch import nn
from torch.nn import functional as F

from reid_fastai.models import build_reid_net

n_classes,size = 751,(256,128)

def module(folder, path, package):
    "The file `path` of `folder` as a module of a package that does not run the `__init__` of the folders on the way"
    parts = [package, *Path(path).parent.parts]
    for i in range(len(parts)):
        name = '.'.join(parts[:i+1])
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(Path(folder, *parts[1:i+1]))]
    return importlib.import_module('.'.join([*parts, Path(path).stem]))

def of_torchreid(folder):
    "OSNet of all widths and norms: (name, network, function of images to embedding and logits)"
    for name in ('osnet_x1_0','osnet_x0_75','osnet_x0_5','osnet_x0_25','osnet_ibn_x1_0','osnet_ain_x1_0'):
        file = 'osnet_ain' if 'ain' in name else 'osnet'
        net = getattr(module(folder, f'torchreid/models/{file}.py', 'theirs_torchreid'), name)(n_classes, pretrained=False, loss='triplet')
        def run(net, x): return (net(x)[::-1] if net.training else (net(x),))
        yield name,net,partial(run, net)

def of_rga(folder):
    folder = Path(folder)
    sys.path.insert(0, str(folder/'reid/models/models_utils'))  # it imports a neighbour by its bare name
    with redirect_stdout(StringIO()):
        net = module(folder, 'reid/models/rga_model.py', 'theirs_rga').resnet50_rga(pretrained=False, num_classes=n_classes)
    def run(x):
        before,after,*logits = net([x], training=net.training)
        return (before if net.training else after),*logits
    yield 'rga_sc_resnet50',net,run

def of_ianet(folder):
    m = module(folder, 'models/IAResnet.py', 'theirs_ianet')
    with patch.object(m, 'resnet50_s1', lambda pretrained: sys.modules[m.__package__+'.resnets1'].resnet50_s1(pretrained=False)):
        net = m.IAResNet50_location(last_s1=True, num_classes=n_classes)
    def run(x):
        with patch.object(torch.Tensor, 'cuda', lambda t: t):  # it puts its Gaussian onto a GPU
            return net(x)[::-1] if net.training else (net(x),)
    yield 'ianet_resnet50',net,run

def of_batnet(folder):
    net = module(folder, 'models/bilinear_aia_noHard_net.py', 'theirs_batnet').BilinearAIAnetCnoHard(n_classes, loss={'xent','htri'})
    grid,sample = F.affine_grid,F.grid_sample
    def old_grid(theta, size): return grid(theta.to(next(net.parameters()).dtype), size, align_corners=True)  # as in torch 1.1, which it is for
    def run(x):
        with patch.multiple(F, affine_grid=old_grid, grid_sample=partial(sample, align_corners=True)):
            if not net.training: return net(x),
            logits,embs = net(x)
            return *embs,*logits
    yield 'bat_net',net,run

@contextmanager
def dropout_off(*nets):
    "Dropout draws other numbers in other networks"
    drops = [(m,m.p) for net in nets for m in net.modules() if isinstance(m, nn.Dropout)]
    for m,_ in drops: m.p = 0.
    yield
    for m,p in drops: m.p = p

def shake(net):
    "Random numbers for what starts as a constant, so that no exchange of arrays stays hidden"
    for m in net.modules():
        if isinstance(m, (nn.modules.batchnorm._BatchNorm,nn.InstanceNorm2d)):
            nn.init.normal_(m.weight, 1 if m.weight.any() else 0, .1)
            if m.bias.requires_grad: nn.init.normal_(m.bias, 0, .1)
            if m.running_mean is not None: nn.init.normal_(m.running_mean, 0, .1), nn.init.uniform_(m.running_var, .5, 1.5)

def distance(a, b):
    "Largest difference, relative to the largest value where that is above 1"
    return ((a-b).abs().max()/b.abs().max().clamp_min(1)).item()

def time_steps(ours, net, run, batch, n=5):
    "Print the median time of a training step of both networks, and their ratio"
    ours.float().train(), net.float().train()
    x,times = torch.rand(batch, 3, *size),{}
    def of_ours(): return [*(out := ours(x)).embeddings, *out.logits]
    for _ in range(n):
        for who,step in (('ours', of_ours), ('theirs', lambda: run(x))):
            start = time.perf_counter()
            sum(o.mean() for o in step()).backward()
            times.setdefault(who, []).append(time.perf_counter()-start)
    a,b = (sorted(times[who])[n//2] for who in ('ours','theirs'))
    print(f'{"":16} a training step of {batch} images: {a:.2f} s, theirs {b:.2f} s, ratio {b/a:.2f}')

def compare(name, net, run, file, tol, batch):
    "Load the arrays of `net` by way of a checkpoint file; print how far outputs, and the running statistics after training, differ, and with `batch` the times of a step"
    shake(net)
    torch.save(dict(state_dict={f'module.{k}': v for k,v in net.state_dict().items()}, epoch=1), file)
    ours = build_reid_net(name, n_classes, pretrained=file).double()
    net.double()
    x = torch.rand(4, 3, *size, dtype=torch.float64)
    normed = (x-ours.mean)/ours.std
    with torch.no_grad(),dropout_off(net, ours):
        net.eval(), ours.eval()
        evaluation = distance(ours(x), run(normed)[0])
        net.train(), ours.train()
        out = ours(x)
        training = max(distance(a, b) for a,b in zip([*out.embeddings, *out.logits], run(normed), strict=True))
        net.eval(), ours.eval()
        emb = ours(x)
        after = distance(emb, run(normed)[0])
    assert (emb.std(0)>0).float().mean()>.1  # equal zeros would prove nothing
    n = sum(p.numel() for p in ours.parameters())
    print(f'{name:16} {n:10,} parameters; evaluation {evaluation:.1e}, training {training:.1e}, evaluation after one training batch {after:.1e}', flush=True)
    if batch: time_steps(ours, net, run, batch)
    return max(evaluation, training, after)<=tol

@call_parse
def main(
    torchreid:str=None, # Clone of KaiyangZhou/deep-person-reid
    rga:str=None, # Clone of microsoft/Relation-Aware-Global-Attention-Networks
    ianet:str=None, # Clone of blue-blue272/ImgReID-IAnet
    batnet:str=None, # Clone of PengfeiFANGanu/Attention-in-Attention-Networks
    tol:float=1e-5, # Largest difference
    seed:int=0, # Of arrays and images
    batch:int=0 # Images in a timed training step; 0: times are not measured
):
    "Compare our networks with their authors' code"
    torch.manual_seed(seed)
    found = [(f,d) for f,d in ((of_torchreid,torchreid), (of_rga,rga), (of_ianet,ianet), (of_batnet,batnet)) if d]
    if not found: raise SystemExit('Give the folder of at least one project, see --help.')
    with tempfile.TemporaryDirectory() as d: ok = [compare(*o, f'{d}/net.pth', tol, batch) for f,folder in found for o in f(folder)]
    if not all(ok): raise SystemExit(f'{ok.count(False)} of {len(ok)} networks differ by more than {tol}.')
