"Rotation control: angles and norms against an oracle in double precision, and in fastai's training loop"
import pickle, tempfile, warnings
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import *
from fastai.callback.all import *
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from reid_fastai.callback import rotation as rotation_module
from reid_fastai.callback.arrays import ArrayHistory
from reid_fastai.callback.history import *
from reid_fastai.callback.precision import ReIDPrecision, supports_precision
from reid_fastai.callback.regularizer import *
from reid_fastai.callback.rotation import *
from reid_fastai.optimizer import lamb
from reid_fastai.regularizers import *
from reid_fastai.rotation import *
from reid_fastai.rotation import _axes,_rows,_turn_together

for o in [o for o in globals() if o.startswith('test')]: del globals()[o]

# ---- the rule

def oracle(new, old, angle, per_channel, keep):
    "The formula with numpy in double precision, row by row"
    rows = (lambda w: w.reshape(len(w), -1)) if per_channel else (lambda w: w.reshape(1, -1))
    n,o = rows(new.double().numpy().copy()),rows(old.double().numpy())
    for i in range(len(o)):
        r,u = np.linalg.norm(o[i]),(n[i]-o[i])-np.dot(n[i]-o[i], o[i])/np.dot(o[i], o[i])*o[i]
        turned = np.cos(angle)*o[i]+np.sin(angle)*r*u/np.linalg.norm(u)
        n[i] = dict(both=turned, angle=turned*np.linalg.norm(n[i])/r, norm=n[i]*r/np.linalg.norm(n[i]))[keep]
    return torch.tensor(n.reshape(new.shape))

shapes = (32,16,3,3),(64,32),(8,1,3,3),(5,),(256,128,3,3)
@pytest.mark.parametrize('keep', KEEPS)
@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_rule_against_the_formula(keep, per_channel, layout):
    torch.manual_seed(0)
    olds = [torch.randn(s) for s in shapes if not (per_channel and len(s)==1)]
    olds = [o.to(memory_format=layout) if o.ndim==4 else o for o in olds]
    news = [o+1e-2*torch.randn_like(o)-1e-2*o for o in olds]
    angles = torch.linspace(1e-4, .1, len(olds))
    want = [oracle(n, o, a.item(), per_channel, keep) for n,o,a in zip(news, olds, angles)]
    turn_arrays(ws := [n.clone() for n in news], olds, angles, per_channel, keep)
    for w,x,o in zip(ws, want, olds): assert (w-x).abs().max()<5e-6*o.abs().max()
    if keep!='norm': assert torch.allclose(turned_angles(ws, olds, per_channel), angles.double(), rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('keep', KEEPS)
@pytest.mark.parametrize('per_channel', [False, True])
def test_arrays_together_as_on_a_gpu(keep, per_channel):
    "On a CPU arrays turn one by one, on a GPU all in one call"
    torch.manual_seed(0)
    olds = [torch.randn(s) for s in shapes[:4]]
    olds[0] = olds[0].to(memory_format=torch.channels_last)
    olds[1][3] = 0.
    news = [o+1e-2*torch.randn_like(o) for o in olds]
    angles = torch.linspace(1e-3, .1, len(olds))
    turn_arrays(one := [n.clone() for n in news], olds, angles, per_channel, keep)
    _turn_together(whole := [n.clone() for n in news], olds, angles, per_channel, keep)
    for a,b,n in zip(one, whole, news): assert torch.allclose(a, b, rtol=1e-6, atol=1e-7) and not torch.equal(a, n)

def test_norm_does_not_drift():
    "Over many steps; an error of one part in a million a step would be seen"
    torch.manual_seed(0)
    w = torch.randn(16, 16, 3, 3)
    norm = w.double().norm()
    for _ in range(300):
        old = w.clone()
        w += 1e-3*torch.randn_like(w)-1e-2*w
        turn_arrays([w], [old], torch.tensor([5e-3]))
    assert abs(w.double().norm()/norm-1)<1e-5

def test_outputs_without_tensors_are_refused():
    class Result:
        def __init__(self, x): self.x = x
    class Net(nn.Linear):
        def forward(self, x): return Result(super().forward(x))
    with pytest.raises(ValueError, match='^The output of Net has no tensors.*`RotationControl'): scale_invariant(Net(3, 2), torch.randn(4, 3))

def in_layout(w, layout):
    "`w` as rows in pieces, as a part of a larger array, or in a memory format"
    if layout=='permuted': return w.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    if layout=='part': return torch.cat([w, w], 2)[:,:,:w.shape[2]]
    return w.clone(memory_format=layout)

layouts = torch.contiguous_format,torch.channels_last,'permuted','part'
@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('new_layout', layouts)
@pytest.mark.parametrize('old_layout', layouts)
def test_any_memory_layout(old_layout, new_layout, per_channel):
    torch.manual_seed(0)
    old = torch.randn(5, 4, 3, 2)
    new = old+.1*torch.randn(5, 4, 3, 2)
    assert turned_angles([in_layout(old, new_layout)], [in_layout(old, old_layout)], per_channel)==0
    turn_arrays([w := in_layout(new, new_layout)], [in_layout(old, old_layout)], torch.tensor([.3]), per_channel)
    assert torch.allclose(w, oracle(new, old, .3, per_channel, 'both').float(), atol=1e-5) and w.stride()==in_layout(new, new_layout).stride()

def test_rows_of_one_layout_are_not_copied():
    "Rotation runs in each step, so arrays in PyTorch's memory formats must stay in place"
    for w in (torch.randn(5, 4, 3, 2), torch.randn(8, 1, 3, 3), torch.randn(5, 4).t(), torch.randn(3)):
        for o in (w, w.to(memory_format=torch.channels_last) if w.ndim==4 else w):
            for c in (False,True):
                for x in (o, o.clone()): assert _rows(x, _axes(o, c), c).data_ptr()==x.data_ptr()

def test_no_arrays_no_angles(): assert turned_angles([], []).shape==(0,)

def test_no_direction_no_turn():
    old = torch.randn(4, 3)
    turn_arrays([w := .9*old], [old], torch.tensor([.1]))
    assert torch.equal(w, old), 'a step along the array'
    turn_arrays([w := old.clone()], [old], torch.tensor([.1]))
    assert torch.equal(w, old), 'no step'
    old[1] = 0
    new = old+.1
    turn_arrays([w := new.clone()], [old], torch.tensor([.1]), per_channel=True)
    assert torch.allclose(w[1], new[1]) and torch.allclose(w[[0,2,3]].norm(dim=1), old[[0,2,3]].norm(dim=1))

# ---- which arrays

def test_networks_whose_invariant_arrays_are_known():
    import timm
    m = timm.create_model('test_resnet', num_classes=5)
    x = torch.randn(4, 3, 32, 32)
    convs = [n for n,p in m.named_parameters() if p.ndim==4]
    before,rng = {k: v.clone() for k,v in m.state_dict().items()},torch.get_rng_state()
    m.eval()
    assert scale_invariant(m, x)==convs and len(convs)>10
    assert not m.training and torch.equal(rng, torch.get_rng_state()) and {o.eps for o in m.modules() if isinstance(o, nn.BatchNorm2d)}=={1e-5}
    for k,v in m.state_dict().items(): assert torch.equal(v, before[k]), k
    se = timm.create_model('mobilenetv3_small_050', num_classes=5)
    want = [n for n,p in se.named_parameters() if p.ndim==4 and '.se.' not in n and n!='conv_head.weight']
    assert scale_invariant(se, x)==want and len(want)<len([p for p in se.parameters() if p.ndim==4])

@pytest.mark.parametrize('fault', ['bias','no norm','hidden by zero'])
def test_faults_are_found(fault):
    "Each of these looks invariant to a shape, a name or a careless test"
    class Zero(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.gate = nn.Conv2d(4, 4, 1, bias=False),nn.Parameter(torch.zeros(1))
        def forward(self, x): return x+self.gate*self.conv(x)
    mid = {'bias': [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)],
           'no norm': [nn.Conv2d(4, 4, 1, bias=False)], 'hidden by zero': [Zero()]}[fault]
    if fault=='bias': nn.init.zeros_(mid[0].bias)
    m = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), *mid, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert scale_invariant(m, torch.randn(4, 3, 8, 8))==['0.weight']+['4.weight']*(fault=='bias')

class Block(nn.Module):
    "A residual block with the norms before the convolutions"
    def __init__(self, n): super().__init__(); self.norms,self.convs = nn.ModuleList(nn.BatchNorm2d(n) for _ in range(2)),nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, bias=False) for _ in range(2))
    def forward(self, x):
        y = x
        for norm,conv in zip(self.norms, self.convs): y = conv(norm(y).relu())
        return x+y

def test_kernels_of_a_sum_are_invariant_only_together():
    "Without a norm after each convolution, all kernels of a residual stream can be doubled together, but none of them alone"
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), *[Block(4) for _ in range(4)], nn.BatchNorm2d(4)),torch.randn(4, 3, 8, 8)
    alone = [n for n,p in m.named_parameters() if p.ndim==4 and scale_invariant(m, x, names=[n])]
    assert scale_invariant(m, x)==alone==[f'{i}.convs.0.weight' for i in range(1, 5)]

@pytest.mark.parametrize('frozen_too', [False, True])
def test_kernels_before_frozen_norms(frozen_too):
    "A frozen norm divides by stored statistics, so its kernel is not scale-invariant; one that is frozen too may be trained later, with its norm"
    cbs = [RotationControl(.1), BnFreeze()]
    learn = learner(*cbs)
    for n,p in learn.model.named_parameters():
        if isinstance(learn.model.get_submodule(n.rpartition('.')[0]), nn.BatchNorm1d) or frozen_too and n==turning[0]: p.requires_grad_(False)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); fit(learn, 1, 'fit', 1e-2)
    assert learn.rotation_control.names==turning[:frozen_too]

def test_synchronised_norms_do_not_wait(monkeypatch):
    "One process tests alone, and the others would never answer"
    def wait(*args): raise AssertionError('it waits')
    monkeypatch.setattr(nn.SyncBatchNorm, 'forward', wait)
    m = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.SyncBatchNorm(4))
    assert scale_invariant(m, torch.randn(4, 3, 8, 8))==['0.weight']
    with pytest.raises(AssertionError, match='it waits'): m(torch.randn(4, 3, 8, 8))

class Aux(nn.Module):
    "A layer that the forward pass leaves out, one whose output is not used, and one that is frozen"
    def __init__(self):
        super().__init__()
        self.first,self.norm,self.aux,self.idle,self.frozen = nn.Linear(4, 4, bias=False),nn.BatchNorm1d(4),nn.Linear(4, 2),nn.Linear(4, 2),nn.Linear(4, 4, bias=False).requires_grad_(False)
    def forward(self, x): self.idle(x); return self.norm(self.first(self.frozen(x)))

@pytest.mark.parametrize('drop', [DropPath(.999), StochasticDepth(.999, 'row')])
def test_branches_that_are_left_out_hide_nothing(drop):
    "A kernel without a norm is not invariant, however seldom its branch is used"
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.first,self.norm,self.plain,self.drop = nn.Linear(4, 4, bias=False),nn.BatchNorm1d(4),nn.Linear(4, 4),drop
        def forward(self, x): return x+self.drop(self.plain(self.norm(self.first(x))))
    m = Block().train()
    assert scale_invariant(m, torch.randn(8, 4))==['first.weight'] and drop.training

def test_arrays_that_are_not_used_are_left_out():
    m = Aux()
    assert scale_invariant(m, torch.randn(8, 4))==['first.weight','frozen.weight']
    assert not m.frozen.weight.requires_grad and all(p.grad is None for p in m.parameters())

def test_generator_while_the_critic_trains():
    from fastai.vision.gan import GANModule, basic_critic, basic_generator
    m = GANModule(basic_generator(32, 3), basic_critic(32, 3))
    x = torch.randn(4, 3, 32, 32)
    m.switch(False)
    found = scale_invariant(m, x)
    assert found and all(n.startswith('critic') for n in found)

class Noise(nn.Module):
    def __init__(self, draw): super().__init__(); self.draw = draw
    def forward(self, x): return x+torch.tensor(self.draw(size=x.shape), dtype=x.dtype)

class Steps(nn.Module):
    "Replaces its buffer in each pass"
    def __init__(self): super().__init__(); self.register_buffer('n', torch.ones(1))
    def forward(self, x): self.n = self.n+1; return x*self.n

@pytest.mark.parametrize('layer', ['spectral norm','numpy','steps'])
def test_layers_whose_passes_differ(layer):
    "Buffers and random numbers are the same in each pass, and afterwards as before"
    torch.manual_seed(0)
    last = {'spectral norm': nn.utils.spectral_norm(nn.Linear(8, 8)), 'numpy': Noise(np.random.normal), 'steps': Steps()}[layer]
    m = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), last)
    before,state = {k: v.clone() for k,v in m.state_dict().items()},np.random.get_state()[1].copy()
    assert scale_invariant(m, torch.randn(8, 4))==['0.weight']+['2.weight_orig']*(layer=='spectral norm')
    for k,v in m.state_dict().items(): assert torch.equal(v, before[k]), k
    assert (np.random.get_state()[1]==state).all()

@pytest.mark.parametrize('draw', [np.random.default_rng(0).normal, lambda size: np.full(size, np.nan)])
def test_outputs_that_cannot_be_compared(draw):
    m = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), Noise(draw))
    with pytest.warns(UserWarning, match='^The output of Sequential contains NaN or changes.*`RotationControl'): assert scale_invariant(m, torch.randn(8, 4))==[]

class Inputs(nn.Linear):
    def __init__(self, use): super().__init__(4, 3, bias=False); self.norm,self.use = nn.BatchNorm1d(3),use
    def forward(self, x, *o): return self.use(self.norm(super().forward(x)), *o)

@pytest.mark.parametrize('case', ['graph','0-dim','list','infinite'])
def test_inputs_of_any_form(case):
    torch.manual_seed(0)
    use,o = {'graph': (lambda y, e: y.index_add(0, e[0], y[e[1]]), torch.randint(9, (2, 20))), '0-dim': (torch.mul, torch.tensor(2.)),
             'list': (lambda y, o: y+o[0], [torch.randn(9, 1)]), 'infinite': (lambda y, o: torch.cat([y, -o], 1), torch.full((9, 1), torch.inf))}[case]
    assert scale_invariant(Inputs(use), torch.randn(9, 4), o)==['weight']

def test_an_infinite_output_hides_nothing():
    m = nn.Sequential(nn.Linear(4, 3), nn.ConstantPad1d((0, 1), -torch.inf))
    assert scale_invariant(m, torch.randn(9, 4))==[]

# ---- in the training loop

def net(): return nn.Sequential(nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
turning = ['0.0.weight','1.weight']
def halves(m): return [params(m[0]), params(m[1:])]
def learner(*cbs, opt_func=Adam, n=32, bs=8, **kw):
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    ds = L(zip(x, x.sum(1, keepdim=True)))
    dls = DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds, bs=bs), path=tempfile.mkdtemp())
    set_seed(0)
    return Learner(dls, net(), MSELossFlat(), opt_func=opt_func, splitter=halves, cbs=list(cbs), **kw)

def fit(learn, n=1, f='fit', *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(n, *args, **kw)
    return learn

class Watch(Callback):
    "Angle and norm of each array in each step, by arccos in double precision, and the learning rates"
    order = 300
    def before_fit(self): self.rows = []
    def before_step(self): self.old = {n: p.detach().double().flatten() for n,p in self.model.named_parameters()}
    def after_step(self):
        for n,p in self.model.named_parameters():
            a,b = p.detach().double().flatten(),self.old[n]
            d = (a/a.norm()-b/b.norm()).norm()
            self.rows.append(dict(name=n, angle=float(2*torch.arcsin((d/2).clamp(max=1))), norm=float(a.norm()), lrs=[h['lr'] for h in self.opt.hypers]))
    @property
    def df(self): return pd.DataFrame(self.rows)

opts = dict(adam=Adam, sgd=partial(SGD, mom=.9), lamb=lamb, fused=partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True)), ranger=ranger)
@pytest.mark.parametrize('opt', opts)
def test_equal_angles_with_any_optimizer(opt): check_equal_angles(opts[opt])

def check_equal_angles(opt_func):
    "Each array that turns has the angle of its group's learning rate and its first norm"
    learn = learner(RotationControl(.1), Watch(), opt_func=opt_func)
    norms = {n: p.detach().norm().item() for n,p in learn.model.named_parameters()}
    df = fit(learn, 2, 'fit_one_cycle', slice(1e-3,1e-2)).watch.df
    assert learn.rotation_control.names==turning
    for i,n in enumerate(turning):
        o = df[df.name==n]
        assert len(o)==8 and np.allclose(o.angle, [(2*.1*lrs[i])**.5 for lrs in o.lrs], rtol=1e-3), f'angle of {n}'
        assert np.allclose(o.norm, norms[n], rtol=1e-6), f'norm of {n}'
    assert df[df.name=='4.weight'].norm.nunique()==8, 'the last layer takes the plain step'

def unprojected(ws, olds, angles, *args):
    "Turns towards the whole step instead of its part orthogonal to the array"
    for w,o,a in zip(ws, olds, angles.tolist()):
        d,norm = w-o,o.norm()
        w.data.copy_(np.cos(a)*o + np.sin(a)*norm*d/d.norm())
        w.data.mul_(norm/w.data.norm())

def other_norm(ws, olds, angles, per_channel, keep): turn_arrays(ws, olds, angles, per_channel, 'angle')

def last_rate(self):
    "The learning rate of the last group for all arrays"
    return dict.fromkeys(ArrayHistory._lrs(self), self.opt.hypers[-1]['lr'])

@pytest.mark.parametrize('where,name,fault,words', [
    (rotation_module, 'turn_arrays', unprojected, 'angle of'), (rotation_module, 'turn_arrays', other_norm, 'norm of'), (RotationControl, '_lrs', last_rate, 'angle of')])
def test_equal_angles_finds_faults(where, name, fault, words, monkeypatch):
    "The check above fails with a faulty rule or learning rate"
    monkeypatch.setattr(where, name, fault)
    with pytest.raises(AssertionError, match=words): check_equal_angles(Adam)

@pytest.mark.parametrize('kw,want', [(dict(angle='linear'), lambda lr, t: .1*lr), (dict(angle=SchedCos(.01, 0.)), lambda lr, t: .005*(1+np.cos(np.pi*t)))])
def test_other_angles(kw, want):
    o = fit(learner(RotationControl(.1, **kw), Watch()), 2, 'fit', 1e-2).watch.df.query("name=='1.weight'")
    assert np.allclose(o.angle, [want(1e-2, i/8) for i in range(8)], rtol=1e-3)

def test_clip_and_accumulation():
    a = fit(learner(RotationControl(.1), Watch(), GradientClip(.1)), 1, 'fit', 1e-2).watch.df
    b = fit(learner(RotationControl(.1), Watch(), GradientAccumulation(16)), 1, 'fit', 1e-2).watch.df
    for df,n in ((a,4),(b,2)):
        o = df[df.name=='1.weight']
        assert len(o)==n and np.allclose(o.angle, (2*.1*1e-2)**.5, rtol=1e-3)

@pytest.mark.skipif(not supports_precision('bf16', 'cpu'), reason='no bf16 here')
def test_equal_angles_under_autocast():
    "The network computes in bfloat16; arrays and angles are those of float32"
    learn,types = learner(RotationControl(.1), ReIDPrecision('bf16'), Watch()),set()
    learn.model[1].register_forward_hook(lambda m, i, o: types.add((m.training, o.dtype)))
    df = fit(learn, 1, 'fit', 1e-2).watch.df
    assert learn.rotation_control.names==turning and (True,torch.bfloat16) in types
    for n in turning:
        o = df[df.name==n]
        assert len(o)==4 and np.allclose(o.angle, (2*.1*1e-2)**.5, rtol=1e-3) and np.allclose(o.norm, o.norm.iloc[0], rtol=1e-6), n

def test_skipped_step_turns_nothing():
    "As `MixedPrecision` skips one when a gradient overflows"
    class Skip(Callback):
        order = MixedPrecision.order
        def before_step(self):
            self.seen = getattr(self, 'seen', [])+[self.model[1].weight.detach().clone()]
            if self.iter==2: raise CancelStepException()
    learn = fit(learner(RotationControl(.1), Skip()), 1, 'fit', 1e-2)
    a = learn.skip.seen
    assert not torch.equal(a[1], a[2]) and torch.equal(a[2], a[3])

def test_frozen_arrays_stay():
    learn = fit(learner(RotationControl(.1)), 1, 'fit', 1e-2)
    learn.freeze()
    w = learn.model[0][0].weight.detach().clone()
    v = learn.model[1].weight.detach().clone()
    fit(learn, 1, 'fit', 1e-2)
    assert torch.equal(learn.model[0][0].weight, w) and not torch.equal(learn.model[1].weight, v)
    learn.unfreeze()
    assert not torch.equal(fit(learn, 1, 'fit', 1e-2).model[0][0].weight, w)

def test_lr_find_leaves_no_trace():
    learn = learner(RotationControl(.1))
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    assert not len(learn.rotation_control.history)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])

def test_finding_changes_no_training():
    "Weights after training with `keep` of nothing that turns equal those without the callback"
    b = fit(learner(wd=0.), 2)
    class Find(RotationControl):
        def _find(self): super()._find(); return []
    c = fit(learner(Find()), 2)
    for x,z in zip(b.model.state_dict().values(), c.model.state_dict().values()): assert torch.equal(x, z)

def test_choice_by_name():
    cb = fit(learner(RotationControl(arrays='kernel', exclude='0.*'))).rotation_control
    assert cb.names==['1.weight','4.weight'] and set(cb.history.name[cb.history.rotates])==set(cb.names)

def test_history_and_pictures():
    learn = fit(learner(RotationControl(.1)), 2, 'fit', 1e-2)
    h = learn.rotation_control.history
    assert list(h.columns)==['epoch','name','kind','theta','lam','sq_norm','angle','rotates'] and list(h.epoch.unique())==[0,1,2]
    o = h[h.rotates & (h.epoch>0)]
    assert set(o.name)==set(turning) and np.allclose(o.angle, (2*.1*1e-2)**.5, rtol=1e-3) and (h.lam==0).all()
    learn.plot_angle_hist(); learn.plot_angles()

@pytest.mark.parametrize('make', [lambda: [AutoL2(.1, .1)], lambda: [RotationControl(.1), AdaptiveL2(.1)], lambda: [AdaptiveL2(.1), RotationControl(.1)]])
def test_beside_adaptive_l2(make):
    learn = fit(learner(*make(), Watch()), 2, 'fit', 1e-2)
    h = find_l2(learn).history
    last = h[h.epoch==2].set_index('name')
    assert set(last.index[last.rotates])==set(turning) and (h.lam[h.rotates]==0).all() and (last.theta[last.rotates]==0).all()
    assert (last.theta[~last.rotates]<0).all() and (last.lam[~last.rotates]>0).all()
    pen = sum(l*n for l,n,r in zip(last.lam, last.sq_norm, last.rotates) if not r)
    assert find_l2(learn).penalty().item()==pytest.approx(pen, rel=1e-5)
    o = learn.watch.df.query("name=='1.weight'")
    assert np.allclose(o.angle, (2*.1*1e-2)**.5, rtol=1e-3) and np.allclose(o.norm, o.norm.iloc[0], rtol=1e-6)

@pytest.mark.parametrize('once', [True, False])
def test_a_later_fit_without_rotation_spares_nothing(once):
    "After `fit(cbs=RotationControl())` or `remove_cb`, the arrays that turned are penalised again; the history tells the epochs apart"
    learn = fit(learner(AdaptiveL2(.1)), 1, 'fit', 1e-2)
    if not once: learn.add_cb(RotationControl(.1))
    fit(learn, 1, 'fit', 1e-2, cbs=RotationControl(.1) if once else None)
    if not once: learn.remove_cb(RotationControl)
    fit(learn, 1, 'fit', 1e-2)
    h = learn.adaptive_l2.history
    start,before,turned,after = (h[(h.epoch==e) & h.name.isin(turning)] for e in range(4))
    assert turned.rotates.all() and not h[h.epoch!=2].rotates.any() and (turned.lam==0).all()
    assert (start.lam.values>before.lam.values).all() and (before.theta.values==turned.theta.values).all() and (after.theta.values<turned.theta.values).all() and (after.lam>0).all()
    last = h[h.epoch==3]
    assert learn.adaptive_l2.penalty().item()==pytest.approx((last.lam*last.sq_norm).sum(), rel=1e-5)

def test_auto_has_one_exclude():
    "An excluded array is neither turned nor penalised"
    learn = fit(learner(AutoL2(.1, .1, exclude='1.weight'), Watch()), 1, 'fit', 1e-2)
    df = learn.watch.df
    assert learn.rotation_control.names==['0.0.weight'] and '1.weight' not in set(learn.auto_l2.history.name)
    assert df[df.name=='1.weight'].norm.nunique()==4 and np.allclose(df[df.name=='0.0.weight'].angle, (2*.1*1e-2)**.5, rtol=1e-3)

def decays(learn): return {h['wd'] for h in learn.opt.hypers}

@pytest.mark.parametrize('kw,wd', [({}, 0.), (dict(wd=.1), .1), (dict(opt_func=partial(Adam, wd=.2)), .2), (dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), 0.)])
def test_default_decay_is_left_out(kw, wd):
    "A chosen decay remains"
    assert decays(fit(learner(RotationControl(.1), **kw)))=={wd}

def test_decay_of_an_existing_optimizer():
    learn = fit(learner())
    before = learn.opt_func
    class Decays(Callback):
        def after_step(self): self.learn.seen = decays(self.learn)
    for kw,seen in (({}, 0.), (dict(wd=.01), .01)):
        fit(learn, cbs=[RotationControl(.1), Decays()], **kw)
        assert learn.seen=={seen} and decays(learn)=={.01} and learn.opt_func is before

def test_history_is_restored_before_a_fit():
    "As for a run that was interrupted after its last epoch"
    h = fit(learner(RotationControl(.1))).rotation_control.history
    cb = learner(RotationControl(.1)).rotation_control
    cb.restore_history(h)
    pd.testing.assert_frame_equal(cb.history, h)

@pytest.mark.parametrize('cbs', [lambda: [AutoL2(.1, .1)], lambda: [RotationControl(.1)], lambda: [RotationControl(.1), ConventionalL2()]])
def test_the_same_arrays_turn_after_an_interruption(cbs):
    "An array of zeros is not found to be scale-invariant before the first step, but after it"
    start = learner(*cbs())
    with torch.no_grad(): start.model[1].weight.zero_()
    cb = first(fit(start, 1, 'fit', 1e-2).cbs, lambda o: isinstance(o, RotationControl))
    again = learner(*cbs())
    again.model.load_state_dict(start.model.state_dict())
    find_l2(again).restore_history(find_l2(start).history)
    other = first(fit(again, 1, 'fit', 1e-2).cbs, lambda o: isinstance(o, RotationControl))
    assert cb.names==other.names==['0.0.weight']
    assert first(fit(learner(*cbs()), 1, 'fit', 1e-2).cbs, lambda o: isinstance(o, RotationControl)).names==turning

def test_a_history_without_angles():
    from reid_fastai.callback.history import plot_angles
    h = fit(learner(AutoL2(.1, .1))).auto_l2.history
    with pytest.raises(ValueError, match='older version'): plot_angles(h.drop(columns=['angle','rotates']))

def test_figures_of_lambda_leave_out_what_turns():
    from reid_fastai.comparison_results import plot_mean_lambda
    learn = fit(learner(AutoL2(.1, .1)), 2, 'fit', 1e-2)
    h = learn.auto_l2.history
    free = h[~h.rotates]
    assert np.allclose(plot_mean_lambda({'auto': [h]}).lines[0].get_ydata(), free.groupby('epoch').lam.mean())
    axs = learn.plot_lambda_hist()
    assert axs[0].get_title()=='kernel (N = 1)' and f'{2000*free.lam[free.epoch==2].min():.0f} % of A/2' in axs[0].figure.get_suptitle()

def test_auto_is_removed_whole():
    learn = fit(learner(AutoL2(.1, .1)))
    cbs = learn.auto_l2
    learn.remove_cb(cbs)
    assert not [cb for cb in learn.cbs if isinstance(cb, ArrayHistory)]
    fit(learn.add_cb(cbs))

def test_pickled_together():
    "Learners are pickled with their callbacks"
    learn = fit(learner(AutoL2(.1, .1)))
    again = pickle.loads(pickle.dumps(learn.cbs))
    auto = first(again, lambda cb: isinstance(cb, AutoL2))
    assert auto.rotation is first(again, lambda cb: isinstance(cb, RotationControl))

def test_summary_of_a_run(tmp_path):
    "λ of the arrays that do not turn"
    from reid_fastai.config import RunConfig
    from reid_fastai.data.datasets import read_dataset
    from reid_fastai.data.synthetic import make_synthetic
    from reid_fastai.runs import train_run
    splits = read_dataset(make_synthetic(tiny=True))
    cfg = RunConfig(str(splits.root), arch='test_resnet', pretrained='none', size='64x32', n_pids=4, steps=2, epochs=2, lr=1e-2, l2='auto')
    train_run(tmp_path/'whole', splits, cfg)
    lam = pd.read_csv(tmp_path/'whole'/'lambdas.csv').query('epoch==2 and not rotates').lam
    res = train_run(tmp_path/'whole', splits, cfg)
    assert np.allclose([res['lambda_min'],res['lambda_mean']], [lam.min(),lam.mean()]) and res['arrays']==len(lam)
    assert f'over {len(lam)} parameter arrays' in (tmp_path/'whole'/'summary.md').read_text()

def test_each_array_has_an_angle():
    w = torch.ones(3, 2)
    turn_arrays([], [], torch.tensor([]))
    with pytest.raises(ValueError, match='2 arrays, 1 old arrays and 2 angles'): turn_arrays([w, w], [w], torch.ones(2))
