"The rivals against their formulas, written down by hand, and against the package pytorch-cpr"
import tempfile
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import *
from fastai.callback.all import *
from torch import nn

from reid_fastai.callback.regularizer import *
from reid_fastai.callback.rivals import *
from reid_fastai.callback.rotation import RotationControl

for o in [o for o in globals() if o.startswith('test')]: del globals()[o]

def halves(m): return [params(m[0]), params(m[1:])]
def learner(*cbs, opt_func=partial(SGD, mom=.9), n=16, bs=8):
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    ds = L(zip(x, x.sum(1, keepdim=True)))
    set_seed(0)
    return Learner(DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds, bs=bs), path=tempfile.mkdtemp()), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)),
                   MSELossFlat(), opt_func=opt_func, splitter=halves, cbs=list(cbs))

def fit(learn, n=2, lr=1e-2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr)
    return learn

def by_hand(before=noop, after=noop, n=2, lr=1e-2, opt=partial(torch.optim.SGD, momentum=.9)):
    "The same training, in plain PyTorch"
    learn = learner()
    m,o = learn.model,None
    o = opt(m.parameters(), lr=lr)
    for _ in range(n):
        for x,y in learn.dls.train:
            o.zero_grad()
            nn.functional.mse_loss(m(x), y).backward()
            kernels = [p for p in m.parameters() if p.ndim>1]
            with torch.no_grad(): before(kernels, lr)
            old = [k.detach().clone() for k in kernels]
            o.step()
            with torch.no_grad(): after(kernels, old, lr)
    return m

def same(a, b): return all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x,y in zip(a.parameters(), b.parameters()))

def test_decoupled():
    def decay(ks, lr): [k.mul_(1-lr*5) for k in ks]
    a = fit(learner(DecoupledL2(5.)))
    assert same(a.model, by_hand(before=decay)) and not same(a.model, by_hand())

def test_decoupled_is_adamw():
    "With all arrays but kernels excluded, PyTorch's AdamW is the oracle; fused through OptimWrapper and beside fastai's Adam"
    def adamw(ps, lr):
        ps = list(ps)
        return torch.optim.AdamW([dict(params=[p for p in ps if p.ndim>1], weight_decay=2.), dict(params=[p for p in ps if p.ndim==1], weight_decay=0.)], lr=lr)
    want = by_hand(opt=adamw)
    for opt_func in (partial(OptimWrapper, opt=torch.optim.AdamW), partial(Adam, mom=.9, sqr_mom=.999, eps=1e-8)):
        a = fit(learner(DecoupledL2(2.), opt_func=opt_func))
        assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x,y in zip(a.model.parameters(), want.parameters()))

def test_cautious():
    def decay(ks, old, lr):
        for k,o in zip(ks, old):
            u = (o-k)/lr
            k -= lr*5*torch.where(u*o>=0, o, 0.)
    a = fit(learner(CautiousL2(5.)))
    assert same(a.model, by_hand(after=decay)) and not same(a.model, fit(learner(DecoupledL2(5.))).model)

def cpr_rule(kappas, lams):
    "What `pytorch_cpr.adamcpr.l2_update` does, with `kappa_update=1` and `reg_by_lr=False`"
    def after(ks, old, lr):
        for k,kappa,lam in zip(ks, kappas, lams):
            lam.add_(1/k.numel()*(k.square().sum()-kappa)).clip_(min=0.)
            k.addcmul_(k, lam, value=-2)
    return after

def test_cpr():
    kernels = [p.detach().clone() for p in learner().model.parameters() if p.ndim>1]
    kappas,lams = [.5*k.square().sum() for k in kernels],[torch.zeros(()) for _ in kernels]
    a = fit(learner(CPR(.5, warm=0)))
    assert same(a.model, by_hand(after=cpr_rule(kappas, lams))) and not same(a.model, by_hand())
    h = a.cpr.history
    assert np.allclose(h.lam[(h.epoch==2) & (h.kind=='kernel')], lams, rtol=1e-5) and min(lams)>0
    assert same(fit(learner(CPR(.5, warm=2))).model, by_hand()), 'warming up'

def test_cpr_against_the_package():
    "The package's optimizer and the callback beside Adam give the same weights and λ"
    from pytorch_cpr import AdamCPR
    opts = []
    def adam_cpr(ps, lr):
        ps = list(ps)
        opts.append(AdamCPR([dict(params=[p for p in ps if (p.ndim>1)==r], regularize=r) for r in (True,False)], lr=lr, kappa_init_method='dependent', kappa_init_param=.5))
        return opts[0]
    want = by_hand(opt=adam_cpr, n=4)
    a = fit(learner(CPR(.5, warm=0), opt_func=partial(Adam, mom=.9, sqr_mom=.999, eps=1e-8)), n=4)
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x,y in zip(a.model.parameters(), want.parameters()))
    lams = [float(o['lagmul']) for o in opts[0].state.values()][:2]
    h = a.cpr.history
    assert np.allclose(h.lam[(h.epoch==4) & (h.kind=='kernel')], lams, rtol=1e-4) and min(lams)>0

def test_l2sp():
    start = [p.detach().clone() for p in learner().model.parameters()]
    def pull(ks, lr): pass
    a = fit(learner(L2SP(.1, .05)))
    learn = learner()
    o = torch.optim.SGD(learn.model.parameters(), lr=1e-2, momentum=.9)
    for _ in range(2):
        for x,y in learn.dls.train:
            o.zero_grad()
            ps = list(learn.model.parameters())
            (nn.functional.mse_loss(learn.model(x), y)+.1*sum((p-s).square().sum() for p,s in zip(ps[:2], start))+.05*sum(p.square().sum() for p in ps[2:])).backward()
            o.step()
    assert same(a.model, learn.model)

def test_awd():
    lam = [0.]
    def push(ks, lr):
        g,w = (torch.cat([o.flatten() for o in os]).norm() for os in ([k.grad for k in ks], ks))
        lam[0] = .1*lam[0]+.9*.3*g/w
        for k in ks: k.grad += lam[0]*k
    a = fit(learner(AWD(.3)))
    assert same(a.model, by_hand(before=push)) and not same(a.model, by_hand())

@pytest.mark.parametrize('cb', [DecoupledL2, CautiousL2, CPR, L2SP, AWD])
def test_same_history(cb):
    a = fit(learner(cb()))
    h = find_l2(a).history
    assert list(h.columns)==['epoch','name','kind','theta','lam','sq_norm','angle','rotates'] and list(h.epoch.unique())==[0,1,2] and h.lam.notna().all()

@pytest.mark.parametrize('cb', [DecoupledL2, CautiousL2, CPR, AWD])
def test_layer_scales_do_not_decay(cb):
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.gamma,self.layer_scale = nn.Parameter(torch.ones(8)),nn.Parameter(torch.ones(8,1,1))
        def forward(self, x): return self.gamma*self.layer_scale.flatten()*x
    learn = learner(cb())
    learn.model = nn.Sequential(learn.model[0], Scaled(), learn.model[2])
    h = find_l2(fit(learn))
    assert [w.ndim for w in h._kernels()[1]]==[2,2] and {*h.history[h.history.lam!=0].name}<={'0.weight','2.weight'}

def test_awd_with_kernels_of_zeros():
    learn = learner(AWD(.3))
    for p in learn.model.parameters(): nn.init.zeros_(p)
    assert all(p.isfinite().all() for p in fit(learn).model.parameters())

@pytest.mark.parametrize('warm', [-1, 1.5, '1'])
def test_warm_up_of_whole_epochs(warm):
    with pytest.raises(ValueError, match='warm=.*it must be a whole number from 0'): CPR(warm=warm)

@pytest.mark.parametrize('make', [lambda: CPR(.5, warm=0), lambda: AWD(.3)])
def test_state_goes_on(make, tmp_path):
    "λ of an interrupted training comes back from the table"
    import pandas as pd
    cb = find_l2(fit(learner(make())))
    cb.history.to_csv(tmp_path/'l.csv', index=False)
    again = find_l2(learner(make()))
    again.restore_history(pd.read_csv(tmp_path/'l.csv'))
    assert torch.equal(again.regularizer.factors, cb.regularizer.factors) and cb.regularizer.factors.max()>0

@pytest.mark.parametrize('make', [lambda: CPR(.5, warm=0), lambda: AWD(.3)])
def test_lr_find_leaves_lambda_alone(make):
    "It raises the learning rate until training diverges, and restores only model and optimizer"
    learn = fit(learner(make()))
    lam = find_l2(learn).regularizer.factors.clone()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(end_lr=1e6, stop_div=False, show_plot=False)
    assert torch.equal(find_l2(learn).regularizer.factors, lam) and not fit(learn).model[0].weight.isnan().any()

def test_starts_are_those_of_the_present_model():
    cb = L2SP()
    fit(learner(cb))
    other = learner()
    with torch.no_grad(): other.model[0].weight.add_(1.)
    start = other.model[0].weight.detach().clone()
    other.add_cb(cb)
    assert torch.equal(cb.regularizer.starts[0], start) and float(cb.penalty())<.1*float(start.square().sum())

@pytest.mark.parametrize('make', [lambda: DecoupledL2(5.), lambda: CautiousL2(5.), lambda: CPR(.5, warm=0), lambda: AWD(.3)])
def test_frozen_and_skipped(make):
    class Skip(Callback):
        order = MixedPrecision.order
        def before_step(self): raise CancelStepException()
    a = learner(make(), Skip())
    before = [p.detach().clone() for p in a.model.parameters()]
    fit(a)
    assert all(torch.equal(p, b) for p,b in zip(a.model.parameters(), before))
    a = learner(make())
    a.freeze()
    fit(a)
    assert torch.equal(a.model[0].weight, before[0]) and not torch.equal(a.model[2].weight, before[2])

@pytest.mark.parametrize('make', [RotationControl, DecoupledL2, CautiousL2, CPR, L2SP, AWD])
def test_no_message_offers_what_is_refused(make):
    "A strength by kind is for `AdaptiveL2` and `ConventionalL2` alone"
    for odd in (dict(kernel=.1), 0):
        with pytest.raises(ValueError, match='needed a finite number > 0') as e: make(odd)
        assert 'by kind' not in str(e.value)

def test_runs_of_all_arms(tmp_path, interrupted):
    "Each regulariser that a command offers changes the training, leaves the same history, and an interrupted run gives the same digits"
    from reid_fastai.comparison_results import ALL_ARMS
    from reid_fastai.config import RunConfig
    from reid_fastai.data.datasets import read_dataset
    from reid_fastai.data.synthetic import make_synthetic
    from reid_fastai.experiments import GRIDS
    from reid_fastai.runs import train_run
    splits = read_dataset(make_synthetic(tiny=True))
    base = RunConfig(str(splits.root), arch='test_resnet', pretrained='none', size='64x32', n_pids=4, n_imgs=2, steps=2, epochs=2, lr=1e-2, l2='none')
    models,tables = {},{}
    for arm in ALL_ARMS:
        cfg,out = base.with_l2(arm, GRIDS.get(arm, [None])[-1], **dict(curve=[.1,.05,.01]) if arm=='annealed' else {}),tmp_path/arm
        train_run(out, splits, cfg)
        if arm in ('annealed','auto','cpr','l2sp','awd','lamb'):  # these have a state
            interrupted(cut := tmp_path/'cut'/arm, splits, cfg, 1)
            train_run(cut, splits, cfg)
            for f in ('model.safetensors','lambdas.csv'): assert (cut/f).read_bytes()==(out/f).read_bytes(), (arm, f)
        models[arm],tables[arm] = (out/'model.safetensors').read_bytes(),pd.read_csv(out/'lambdas.csv')
    assert len(set(models.values()))==len(ALL_ARMS)
    for arm,o in tables.items():
        assert o.columns.tolist()==tables['none'].columns.tolist() and o[['epoch','name']].equals(tables['none'][['epoch','name']]), arm
        assert (tmp_path/arm/'angle_hist.png').exists() and (o.lam==0).all()==(arm in ('none','lamb','rotation')) and o.sq_norm.gt(0).any() and o.angle.gt(0).any(), arm

def test_l2sp_looks_at_the_kinds_once(monkeypatch):
    "Not once for each array: BAT-net took 39 s"
    from reid_fastai.callback import rivals
    from reid_fastai.test_utils import tiny_learner
    asked = []
    monkeypatch.setattr(rivals, 'param_kinds', lambda m, real=rivals.param_kinds: asked.append(m) or real(m), raising=False)
    learn = tiny_learner(cbs=L2SP())
    assert not asked and learn.cbs.filter(risinstance(L2SP))[0]._starts

def test_rotation_selects_its_arrays_once(monkeypatch):
    from reid_fastai.callback import rotation
    from reid_fastai.test_utils import tiny_learner
    asked = []
    monkeypatch.setattr(rotation, 'select_arrays', lambda *a, real=rotation.select_arrays: asked.append(a) or real(*a))
    learn = tiny_learner(cbs=RotationControl())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.rotation_control.names and len(asked)<=4  # two for the names, and two for the record
