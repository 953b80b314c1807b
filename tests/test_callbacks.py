"The callbacks in fastai's training loop: every trap has a test that fails without its rule"
import json, os, socket, tempfile, warnings
from functools import partial

import numpy as np, pandas as pd, pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastai.basics import *
from fastai.callback.all import *
from fastai.optimizer import ranger
from fastai.tabular.all import TabularDataLoaders, tabular_learner, Normalize, Categorify
from fastai.vision.all import ImageBlock, CategoryBlock, DataBlock, vision_learner
from torch import nn

from reid_fastai.callback.arrays import ArrayHistory
from reid_fastai.callback.regularizer import *
from reid_fastai.callback.rotation import AutoL2, RotationControl
from reid_fastai.core import PlainErrors, unwrap
from reid_fastai.callback.history import *
from reid_fastai.regularizers import *
from reid_fastai.test_utils import tiny_dls

for o in [o for o in globals() if o.startswith('test')]: del globals()[o]  # fastai exports helpers that pytest would take for tests

def net(): return nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 1))
def halves(m): return [params(m[0]), params(m[1])]
def dls(n=32, bs=8):
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    ds = L(zip(x, x.sum(1, keepdim=True)))
    return DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds, bs=bs), path=tempfile.mkdtemp())

def learner(*cbs, opt_func=Adam, splitter=halves, **kw):
    set_seed(0)
    return Learner(dls(), net(), MSELossFlat(), opt_func=opt_func, splitter=splitter, cbs=list(cbs), **kw)

class Spy(Callback):
    "Gradients and losses as the optimizer will see them"
    order = 100
    def before_fit(self): self.grads,self.tasks,self.totals = [],[],[]
    def before_backward(self):
        if self.training: self.tasks.append(self.learn.loss.item()); self.totals.append(self.learn.loss_grad.item())
    def before_step(self): self.grads.append({n: p.grad.clone() for n,p in self.model.named_parameters() if p.grad is not None})

def fit(learn, n=1, f='fit', *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(n, *args, **kw)
    return learn

# ---- the penalty

def test_penalty_reaches_the_gradient_and_only_there():
    a,b = fit(learner(Spy(), AdaptiveL2(.1)), 1, 'fit', 0.),fit(learner(Spy()), 1, 'fit', 0.)
    w = dict(a.model.named_parameters())
    pen = sum(.05*p.detach().double().square().sum() for n,p in w.items() if n!=THETA).item()
    assert a.spy.tasks==pytest.approx(b.spy.tasks, rel=1e-6)
    assert np.subtract(a.spy.totals, a.spy.tasks)==pytest.approx([pen]*4, rel=1e-5)
    for n,g in b.spy.grads[0].items(): assert torch.allclose(a.spy.grads[0][n], g+2*.05*w[n], atol=1e-6), n

def test_reported_losses_are_the_task_s():
    a,b = fit(learner(AdaptiveL2(.1)), 1, 'fit', 0.),fit(learner(), 1, 'fit', 0.)
    assert list(a.recorder.values[0][:2])==pytest.approx(list(b.recorder.values[0][:2]), rel=1e-5)
    assert list(a.recorder.metric_names)==['epoch','train_loss','valid_loss','penalty','time']
    assert a.recorder.values[0][2]==pytest.approx(a.adaptive_l2.regularizer().item(), rel=1e-6)

def test_validation_is_untouched():
    seen = []
    class Valid(Callback):
        order = 100
        def after_loss(self):
            if not self.training: seen.append((self.learn.loss_grad-self.learn.loss).item())
    a = learner(AdaptiveL2(.1), Valid())
    with a.no_bar(): v = a.validate()  # before any optimizer exists
    assert seen and max(map(abs, seen))==0 and len(v)==2 and v[1]==pytest.approx(a.adaptive_l2.penalty().item())

@pytest.mark.parametrize('n_acc', [16, 32])
def test_accumulation_equals_one_large_batch(n_acc):
    def run(bs, *cbs):
        set_seed(0)
        torch.manual_seed(0)
        x = torch.randn(n_acc, 4)
        dl = DataLoader(L(zip(x, x.sum(1, keepdim=True))), bs=bs)
        m = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))  # no BatchNorm, which sees the batch
        return fit(Learner(DataLoaders(dl, dl), m, MSELossFlat(), opt_func=SGD, cbs=[Spy(), AdaptiveL2(.1), *cbs])).spy.grads[-1]
    whole,parts = run(n_acc),run(4, GradientAccumulation(n_acc))
    assert whole.keys()==parts.keys() and THETA in whole
    for n in whole: assert torch.allclose(whole[n], parts[n], atol=1e-6), n

class BFloat16(Callback):
    "What fastai's `MixedPrecision` does on a GPU; on a CPU it switches itself off"
    order = MixedPrecision.order
    def before_batch(self): self.autocast = torch.autocast('cpu', torch.bfloat16); self.autocast.__enter__()
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad.float(); self.autocast.__exit__(None, None, None)

@pytest.mark.parametrize('amp', [BFloat16, lambda: MixedPrecision(amp_mode=AMPMode.BF16)])
def test_mixed_precision_keeps_the_penalty_exact(amp):
    learn = learner(Spy(), AdaptiveL2(.1), amp())
    with torch.no_grad(): learn.model[1].weight.mul_(1000)
    pen = sum(.05*p.detach().double().square().sum() for n,p in learn.model.named_parameters() if n!=THETA).item()
    class Total(Callback):
        order = AdaptiveL2.order+1
        def after_loss(self): self.pens = getattr(self, 'pens', [])+[(self.learn.loss_grad.double()-self.learn.loss.double()).item()]
    learn.add_cb(Total())
    fit(learn, 1, 'fit', 0.)
    assert learn.total.pens[0]==pytest.approx(pen, rel=1e-5)  # bfloat16 has 3 digits

# ---- θ and the optimizer

def add_later(): learn = learner(); learn.create_opt(); learn.add_cb(AdaptiveL2(.1)); return learn
def add_after_fit(): learn = fit(learner()); learn.add_cb(AdaptiveL2(.1)); return learn
def add_as_class(): return learner(AdaptiveL2)
def with_torch_opt(): return learner(AdaptiveL2(.1), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
def with_built_opt():
    m = net()
    learn = Learner(dls(), m, MSELossFlat(), opt_func=OptimWrapper(opt=torch.optim.SGD(m.parameters(), lr=.1)))
    return learn.add_cb(AdaptiveL2(.1))

@pytest.mark.parametrize('make', [lambda: learner(AdaptiveL2(.1)), lambda: learner(AdaptiveL2(.1), splitter=trainable_params),
    add_later, add_after_fit, add_as_class, with_torch_opt, with_built_opt], ids='cbs flat later after_fit class torch_opt built_opt'.split())
def test_theta_trains_however_the_callback_came(make):
    learn = make()
    fit(learn, 1, 'fit', 1e-2)
    theta = learn.model.l2_theta
    assert (theta<0).all(), theta
    assert sum(p is theta for g in learn.opt.param_lists for p in g)==1 and any(p is theta for p in learn.opt.param_lists[-1])

def test_theta_with_fit_cbs_goes_on_at_the_next_fit():
    learn = learner()
    fit(learn, 1, 'fit', 1e-2, cbs=AdaptiveL2(.1))
    theta = learn.model.l2_theta.detach().clone()
    assert (theta<0).all()
    fit(learn, 1, 'fit', 1e-2, cbs=AdaptiveL2(.1))
    assert (learn.model.l2_theta<theta).all()

def test_removal_leaves_the_learner_as_it_was():
    learn = learner()
    before = learn.opt_func,learn.splitter,len(learn.metrics)
    learn.add_cb(AdaptiveL2(.1)); learn.remove_cb(AdaptiveL2)
    assert before==(learn.opt_func,learn.splitter,len(learn.metrics))

def test_export_after_removal(tmp_path):
    "fastai's default splitter takes all trainable parameters, also θ of a removed callback; if the callback is added again, θ is trained on"
    learn = fit(learner(cb := AdaptiveL2(.1), splitter=trainable_params), 1, 'fit', 1e-2).remove_cb(cb)
    learn.path,data,learn.dls = tmp_path,learn.dls,tiny_dls()  # those of a list cannot be exported
    learn.export()
    assert len(learn.dls.train_ds) and not learn.model.l2_theta.requires_grad
    theta,learn.dls = learn.model.l2_theta.detach().clone(),data
    fit(learn.add_cb(cb), 1, 'fit', 1e-2)
    assert (learn.model.l2_theta<theta).all()

def test_theta_of_a_model_that_another_learner_gave_up():
    model = fit(learner(AdaptiveL2(.1)), 1, 'fit', 1e-2).remove_cb(AdaptiveL2).model
    theta,learn = model.l2_theta.detach().clone(),learner(AdaptiveL2(.1))
    learn.model = model
    fit(learn, 1, 'fit', 1e-2)
    assert (model.l2_theta<theta).all()

@pytest.mark.parametrize('cb', [ConventionalL2(.5), AdaptiveL2(), AutoL2(), RotationControl()])
def test_a_callback_belongs_to_one_learner(cb):
    "A learner that has lost it must not report its penalty"
    a = learner(cb)
    with pytest.warns(UserWarning, match='belonged to another Learner'): b = learner(cb)
    assert cb not in a.cbs and cb in b.cbs and cb.learn is b and not a.metrics
    with a.no_bar(): a.fit(1)
    with warnings.catch_warnings(), b.no_bar():
        warnings.simplefilter('error')
        b.fit(1)
        copy = deepcopy(b)
    assert copy.cbs[-1] is not cb

@pytest.mark.parametrize('cbs', [lambda: [RotationControl(.1), AdaptiveL2(.1)], lambda: [AdaptiveL2(.1), RotationControl(.1)], lambda: [ConventionalL2()], lambda: [AdaptiveL2(.1)], lambda: [AutoL2()]])
@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize('before', [0, 1])
def test_removal_restores_the_default_decay(cbs, opt_func, before):
    "Of an optimizer that is older or younger than the callbacks; else a comparison with and without them would be unfair"
    class Decays(Callback):
        def after_step(self): self.learn.seen = decays(self.learn)
    learn = learner(Decays(), opt_func=opt_func)
    given = learn.opt_func
    if before: fit(learn)
    fit(learn, cbs=cbs())
    assert learn.seen=={0} and learn.opt_func is given
    learn.save('m')
    assert decays(fit(learn))==learn.seen=={.01} and not [p for g in learn.opt.param_lists for p in g if p is getattr(learn.model, THETA, None)]
    assert decays(fit(learn, reset_opt=True))=={.01}

def test_a_chosen_decay_of_0_stays():
    learn = fit(learner(), cbs=AdaptiveL2(.1))
    learn.opt.set_hypers(wd=0.)
    assert decays(fit(learn, cbs=AdaptiveL2(.1)))=={0}

def test_decay_stays_dropped_while_a_callback_needs_it():
    learn = fit(learner(ConventionalL2()), cbs=RotationControl(.1))
    assert decays(learn)==decays(fit(learn, reset_opt=True))=={0}

def test_theta_of_other_arrays_is_refused():
    "As many scales as shifts: the number of θ is the same"
    learn = fit(learner(AdaptiveL2(.1, exclude='gamma')), 1, 'fit', 1e-2)
    learn.remove_cb(AdaptiveL2)
    with pytest.raises(ValueError, match='0.1.bias is only in one of the two sets.*del learn.model.l2_theta'): learn.add_cb(AdaptiveL2(.1, exclude='beta'))
    del learn.model.l2_theta
    assert (fit(learn.add_cb(AdaptiveL2(.1, exclude='beta')), 1, 'fit', 1e-2).model.l2_theta<0).all()

@pytest.mark.parametrize('make', [ArrayHistory, RotationControl, AdaptiveL2, ConventionalL2])
def test_lambda_follows_a_model_that_fit_has_moved(make, monkeypatch):
    "To a GPU; the parameters stay the same objects"
    learn = learner(make())
    seen = []
    fit(learn)
    monkeypatch.setattr(L2Regularizer, 'to', lambda self, device: seen.append(device))
    monkeypatch.setattr(AdaptiveL2Regularizer, 'to', lambda self, device: seen.append(device))
    fit(learn)
    assert torch.device('cpu') in seen

@pytest.mark.parametrize('make', [ArrayHistory, RotationControl, AdaptiveL2, ConventionalL2])
def test_history_of_another_model_begins_anew(make):
    cb = make()
    for _ in range(2): fit(learner(cb))
    assert list(cb.history.epoch.unique())==[0,1]

def test_theta_is_no_child_of_a_sequential():
    learn = learner(AdaptiveL2(.1))
    assert len(learn.model)==2 and THETA in dict(learn.model.named_parameters(recurse=False))

def test_freeze_trains_head_and_its_thetas_alone():
    learn = learner(AdaptiveL2(.1), train_bn=False)
    fit(learn, 1, 'fit', 1e-2)  # so that Adam has momentum
    learn.freeze()
    cb,w = learn.adaptive_l2,learn.model[0][0].weight.detach().clone()
    theta = learn.model.l2_theta.detach().clone()
    head = torch.tensor([n.startswith('1.') for n in cb.regularizer.names])
    fit(learn, 2, 'fit', 1e-2)
    assert len(learn.opt.param_lists)==2
    assert torch.equal(learn.model[0][0].weight, w), 'frozen weights are not decayed'
    assert torch.equal(learn.model.l2_theta[~head], theta[~head]), 'their θ does not drift on momentum'
    assert (learn.model.l2_theta[head]<theta[head]).all()
    learn.unfreeze()
    fit(learn, 1, 'fit', 1e-2)
    assert (learn.model.l2_theta[~head]<theta[~head]).all()

def test_frozen_by_hand_theta_stands_still():
    "`freeze` makes fastai forget the momentum; `requires_grad_` does not"
    learn = fit(learner(AdaptiveL2(.1)), 1, 'fit', 1e-2)
    learn.model[0][0].requires_grad_(False)
    off,theta = ~learn.adaptive_l2.regularizer.active(),learn.model.l2_theta.detach().clone()
    fit(learn, 1, 'fit', 1e-2)
    assert off.any() and torch.equal(learn.model.l2_theta[off], theta[off]) and (learn.model.l2_theta[~off]<theta[~off]).all()

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.Adam)])
def test_without_the_callback_theta_stands_still(opt_func):
    learn = fit(learner(AdaptiveL2(.1), opt_func=opt_func), 1, 'fit', 1e-2)
    theta = learn.model.l2_theta.detach().clone()
    with learn.removed_cbs(learn.adaptive_l2): fit(learn, 1, 'fit', 1e-2)
    assert torch.equal(learn.model.l2_theta, theta)
    assert (fit(learn, 1, 'fit', 1e-2).model.l2_theta<theta).all()

def test_theta_has_the_rate_of_the_head():
    learn = fit(learner(AdaptiveL2(.1)), 1, 'fit', slice(1e-2))
    assert [h['lr'] for h in learn.opt.hypers]==pytest.approx([1e-3, 1e-2])
    assert any(p is learn.model.l2_theta for p in learn.opt.param_lists[-1])

@pytest.mark.parametrize('f,args', [('fit_one_cycle', (1e-2,)), ('fine_tune', (1e-2,)), ('fit_flat_cos', (1e-2,))])
def test_schedules(f, args):
    learn = fit(learner(AdaptiveL2(.1)), 2, f, *args)
    assert (learn.model.l2_theta<0).all() and (np.diff(learn.adaptive_l2.history.groupby('epoch').lam.mean())<0).all()

# ---- weight decay

def decays(learn): return {h.get('wd', 0) for h in learn.opt.hypers}

@pytest.mark.parametrize('make', [lambda: learner(AdaptiveL2(.1)), lambda: learner(ConventionalL2()), add_later, add_after_fit, with_torch_opt])
def test_default_decay_is_dropped(make):
    learn = fit(make(), 1, 'fit', 1e-2)
    assert decays(learn)=={0}
    learn.create_opt()
    assert decays(learn)=={0}

def test_without_the_callback_decay_stays(): assert decays(fit(learner()))=={.01}

def test_no_decay_of_theta():
    "With decay, a θ without gradient would be pulled to 0"
    learn = learner(AdaptiveL2(.1))
    with torch.no_grad(): learn.model.l2_theta.fill_(-4.)  # hard sigmoid is flat here
    assert (fit(learn, 2, 'fit', .1).model.l2_theta==-4.).all()

@pytest.mark.parametrize('make', [
    lambda: learner(AdaptiveL2(), wd=.1), lambda: learner(wd=.01).add_cb(ConventionalL2()),
    lambda: learner(AdaptiveL2(), opt_func=partial(Adam, wd=.1)),
    lambda: learner(AdaptiveL2(), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=.1)),
    lambda: learner(AdaptiveL2(), opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))),
    lambda: fit(learner(AdaptiveL2()), 1, 'fit', 1e-2, wd=.01), lambda: fit(learner(AdaptiveL2()), 1, 'fit_one_cycle', 1e-2, wd=.2),
    lambda: fit(learner(AdaptiveL2(), opt_func=lambda p,lr: Adam(p, lr, wd=.3)))])
def test_chosen_decay_is_refused(make):
    with pytest.raises(ValueError, match='Weight decay 0.[0-9]+ was chosen.*ConventionalL2'): make()

def test_refused_decay_does_not_linger():
    learn = learner(AdaptiveL2(.1))
    with pytest.raises(ValueError, match='Weight decay 0.1'): fit(learn, 1, 'fit', 1e-2, wd=.1)
    assert decays(fit(learn, 1, 'fit', 1e-2))=={0}
    learn = fit(learner(), 1, 'fit', 1e-2, wd=.1)
    with pytest.raises(ValueError, match=r'learn.opt.set_hypers\(wd=0.\)'): learn.add_cb(AdaptiveL2(.1))
    learn.opt.set_hypers(wd=0.)
    assert decays(fit(learn.add_cb(AdaptiveL2(.1)), 1, 'fit', 1e-2))=={0}

# ---- history

@pytest.mark.parametrize('cb', [lambda: AdaptiveL2(.1), ConventionalL2])
def test_history_is_of_one_model(cb):
    "Other arrays, or another learner, begin a history of their own"
    learn = fit(learner(cb()), 2, 'fit', 1e-2)
    cb = first(learn.cbs, lambda o: isinstance(o, L2Callback))
    learn.model[1] = nn.Linear(8, 1)
    fit(learn, 1, 'fit', 1e-2)
    assert list(cb.history.epoch.unique())==[0,1,2,3], 'a head like the last continues it'
    learn.model[1] = nn.Linear(8, 1, bias=False)
    if hasattr(learn.model, THETA):
        with pytest.raises(ValueError, match='`del learn.model.l2_theta`'): fit(learn)
        assert list(cb.history.epoch.unique())==[0,1,2,3], 'a refusal loses nothing'
        del learn.model.l2_theta
    learn.create_opt()
    fit(learn, 1, 'fit', 1e-2)
    assert list(cb.history.epoch.unique())==[0,1] and list(cb.history.name.unique())==cb.regularizer.names
    learn.plot_lambda_hist(); learn.plot_lambdas()
    for _ in range(2):
        learn.remove_cb(cb)
        learn = fit(learner(cb), 1, 'fit', 1e-2)
        assert list(cb.history.epoch.unique())==[0,1] and len(cb.regularizer.names)==6

def test_lr_find_and_validate_leave_no_trace():
    learn = fit(learner(AdaptiveL2(.1)), 2, 'fit', 1e-2)
    h,theta = learn.adaptive_l2.history,learn.model.l2_theta.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=10)
    learn.validate()
    pd.testing.assert_frame_equal(learn.adaptive_l2.history, h)
    assert torch.equal(learn.model.l2_theta, theta)
    fit(learn, 1, 'fit', 1e-2)
    assert list(learn.adaptive_l2.history.epoch.unique())==[0,1,2,3]

def test_lr_find_before_the_first_fit():
    learn = learner(AdaptiveL2(.1))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=10)
    h = fit(learn, 1, 'fit', 1e-2).adaptive_l2.history
    assert list(h.epoch.unique())==[0,1] and (h[h.epoch==0].lam.round(6)==.05).all()

def test_skipped_epochs_are_not_recorded():
    learn = fit(learner(AdaptiveL2(.1)), 4, 'fit', 1e-2, start_epoch=2)
    assert list(learn.adaptive_l2.history.epoch.unique())==[0,1,2]

def test_conventional_history():
    h = fit(learner(ConventionalL2(factor=1e-2)), 2).conventional_l2.history
    assert (h.lam.round(8)==1e-2).all() and h.theta.isna().all() and h.epoch.max()==2

def test_lambdas_of_small_amplitudes_are_seen():
    "One colour scale for factors that differ by orders of magnitude would hide the small ones"
    amplitude = dict(kernel=5e-3, bias=1e-2, gamma=1e-5, beta=1e-1)
    learn = fit(learner(AdaptiveL2(amplitude)), 2, 'fit', 1e-2)
    ax = learn.plot_lambdas()
    img = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert np.allclose(img[:,0][~np.isnan(img[:,0])], .5) and 'gamma' in ax.get_title()

def _fallen(to, n=30, epochs=4):
    "A history whose λ fall from 0.005 to between `to` and 0.005, evenly"
    lam = lambda e: 5e-3-(5e-3-to)*np.linspace(0, 1, n)*e/epochs
    return pd.concat([pd.DataFrame(dict(epoch=e, name=[f'w{i}' for i in range(n)], kind='kernel', lam=lam(e))) for e in range(epochs+1)])

@pytest.mark.parametrize('to,zero', [(4.6e-3, False), (1e-3, True)])
def test_axis_of_lambda_spans_what_occurred(to, zero):
    "A small fall fills the panel; a large one is shown down to 0"
    from reid_fastai.callback.history import plot_lambda_hist, plot_lambdas
    h = _fallen(to)
    (ax,) = plot_lambda_hist(h, 1e-2)
    low,high = ax.get_ylim()
    assert low<to and high>5e-3 and (low==0)==zero
    if not zero: assert (5e-3-to)/(high-low)>.7
    shares = ax.images[0].get_array().sum(0)
    assert np.allclose(shares, 100) and '%' in ax.figure.get_suptitle()
    im = plot_lambdas(h, 1e-2).images[0]
    assert np.allclose(im.get_clim(), (to, 5e-3), rtol=1e-5)

def test_long_histograms_have_no_holes():
    "40 bins for 54 arrays were white and coloured by turns"
    from reid_fastai.callback.history import plot_lambda_hist
    h = _fallen(1e-4, 54, 200)
    holes = lambda ax: sum(len(o[np.nonzero(o)[0][0]:np.nonzero(o)[0][-1]+1])-(o>0).sum() for o in np.ma.filled(ax.images[0].get_array(), 0).T)
    assert holes(plot_lambda_hist(h)[0])<.02*holes(plot_lambda_hist(h, bins=150)[0])+5

# ---- save, load, export

def test_round_trip_without_a_warning():
    a = fit(learner(AdaptiveL2(.1)), 1, 'fit', 1e-2)
    a.save('m')
    b = learner(AdaptiveL2(.1)); b.path = a.path
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        b.load('m')
    assert torch.equal(a.model.l2_theta, b.model.l2_theta)
    def state(l): return [l.opt.state[p]['grad_avg'] for g in l.opt.param_lists for p in g]
    for x,y in zip(state(a), state(b)): assert torch.equal(x, y)

def test_weights_without_theta_load_and_others_are_named():
    a,b = fit(learner()),learner(AdaptiveL2(.1)); b.path = a.path
    a.save('m', with_opt=False)
    theta = b.model.l2_theta.detach()
    with torch.no_grad(): b.model.l2_theta.fill_(-1.)
    b.load('m', with_opt=False)
    assert torch.equal(b.model[0][0].weight, a.model[0][0].weight) and (theta==-1).all()
    state = a.model.state_dict()
    del state['1.bias']
    with pytest.raises(RuntimeError, match='Missing key.*1.bias'): b.model.load_state_dict(state)
    c = deepcopy(b.model)
    with torch.no_grad(): c.l2_theta.fill_(-2.)
    c.load_state_dict(a.model.state_dict())
    assert (c.l2_theta==-2).all() and (theta==-1).all()
    b.save('m')
    a.load('m', strict=False, with_opt=False)

def test_export_goes_on():
    from fastai.test_utils import synth_dbunch, RegModel
    def make(): return Learner(synth_dbunch(), RegModel(), MSELossFlat(), cbs=AdaptiveL2(.1), path=tempfile.mkdtemp())
    a = fit(make(), 1, 'fit', 1e-2)
    a.dls = _Empties(a.dls)
    a.export()
    b = load_learner(a.path/'export.pkl')
    x = torch.randn(4, 1)
    assert torch.equal(a.model(x), b.model(x)) and b.adaptive_l2.regularizer.theta is b.model.l2_theta
    pd.testing.assert_frame_equal(a.adaptive_l2.history, b.adaptive_l2.history)
    b.dls = synth_dbunch()
    theta = b.model.l2_theta.detach().clone()
    fit(b, 1, 'fit', 1e-2)
    assert (b.model.l2_theta<theta).all()

class _Empties(DataLoaders):
    "Plain loaders that can be emptied, as those of a `DataBlock` can"
    def __init__(self, dls): super().__init__(*dls.loaders)
    def new_empty(self): return DataLoaders()

# ---- other learners

def test_optimizer_of_another_model_is_refused():
    learn = fit(learner(ConventionalL2()))
    learn.model = net()
    learn.validate()
    with pytest.raises(ValueError, match='none of the 6 .*`learn.create_opt'): fit(learn)
    learn.create_opt()
    before = learn.model[1].weight.detach().clone()
    assert not torch.equal(fit(learn).model[1].weight, before)

def test_exchanged_head_is_regularised():
    learn = learner(AdaptiveL2(.1))
    learn.model[1] = nn.Linear(8, 1)
    fit(learn)
    assert any(a is learn.model[1].weight for a in learn.adaptive_l2.regularizer.arrays)

def test_vision_learner(tmp_path):
    from PIL import Image
    from torchvision.models import resnet18
    for i in range(12): Image.fromarray(np.full((40,40,3), 20*i, np.uint8)).save(tmp_path/f'{i}.png')
    db = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=lambda p: sorted(p.ls()), get_y=lambda o: 'ab'[int(o.stem)%2])
    learn = vision_learner(db.dataloaders(tmp_path, bs=4, num_workers=0, device='cpu'), resnet18, pretrained=False, cbs=AdaptiveL2(amplitude=5e-3))
    fit(learn, 1, 'fine_tune')
    assert (learn.model.l2_theta<0).all() and decays(learn)=={0}

def test_tabular_learner():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=64), c=rng.choice(list('xyz'), 64))); df['y'] = df.a*2
    tdl = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names='c', cont_names='a', y_names='y', bs=16, device='cpu')
    learn = fit(tabular_learner(tdl, layers=[8], n_out=1, cbs=AdaptiveL2(.1)), 1, 'fit_one_cycle', 1e-2)
    assert (learn.model.l2_theta<0).all()

def test_unlabelled_prediction():
    learn = fit(learner(AdaptiveL2(.1)))
    with learn.no_bar(): preds,_ = learn.get_preds(dl=DataLoader(L((x,) for x in torch.randn(8, 4)), bs=4))
    assert preds.shape==(8,1)

def test_two_penalties_are_refused():
    with pytest.raises(ValueError, match='ConventionalL2 was added to a Learner that has AdaptiveL2'): learner(AdaptiveL2(), ConventionalL2())

# ---- wrappers

def compiled(m): return torch.compile(m, backend='eager')
@pytest.mark.parametrize('wrap', [compiled, nn.DataParallel, lambda m: compiled(nn.DataParallel(m)), lambda m: nn.DataParallel(compiled(nn.DataParallel(m)))], ids='compile parallel both nested'.split())
@pytest.mark.parametrize('before', [True, False])
def test_wrapped_models(wrap, before):
    "Names, kinds and the number of arrays are those of the model inside, whether it is wrapped before or after the callback is added"
    learn = learner()
    bare = learn.model
    if before: learn.model = wrap(bare)
    learn.splitter = trainable_params
    learn.add_cb(AdaptiveL2(.1))
    if not before: learn.model = wrap(bare)
    fit(learn, 1, 'fit', 1e-2)
    want = [n for n,_ in net().named_parameters()]
    assert learn.adaptive_l2.regularizer.names==want and list(learn.adaptive_l2.history.name.unique())==want
    assert (bare.l2_theta<0).all() and any(p is bare.l2_theta for p in learn.opt.param_lists[-1])
    assert param_kinds(learn.model)==param_kinds(net()) and len(AdaptiveL2Regularizer(learn.model, .1).names)==len(want)
    fit(learn, 1, 'fit', 1e-2)
    assert list(learn.adaptive_l2.history.epoch.unique())==[0,1,2], 'the history goes on'

def test_a_part_called_module_is_no_wrapper():
    m = nn.Module()
    m.module = nn.Linear(2, 1)
    assert unwrap(m) is m and list(param_kinds(m))==['module.weight','module.bias']

# ---- errors

def message(f):
    with pytest.raises(ValueError) as e: f()
    return str(e.value)

def test_errors_are_plain():
    "Without the line that fastai puts before the message of a callback"
    assert message(lambda: fit(learner(AdaptiveL2()), 1, 'fit', 1e-2, wd=.1)).startswith('Weight decay 0.1 was chosen')

def test_all_our_callbacks_are_plain():
    import importlib, pkgutil, reid_fastai
    for m in pkgutil.walk_packages(reid_fastai.__path__, 'reid_fastai.'):
        for o in vars(importlib.import_module(m.name)).values():
            if isinstance(o, type) and issubclass(o, Callback) and o.__module__==m.name: assert issubclass(o, PlainErrors), o

def test_an_error_before_validation_does_not_lock_the_learner():
    learn = fit(learner(AdaptiveL2(.1)))
    learn.model[1] = nn.Linear(8, 1, bias=False)
    assert '`del learn.model.l2_theta`' in message(learn.validate)
    assert not learn.lock.locked()

# ---- two processes

def _gradients(rank, frozen):
    torch.manual_seed(0)
    m = nn.Linear(4, 1)
    reg = AdaptiveL2Regularizer(m, .1)
    m.register_parameter(THETA, reg.theta)
    if frozen: m.weight.requires_grad_(False); m.bias.requires_grad_(False)
    ddp = nn.parallel.DistributedDataParallel(m)
    x = torch.arange(8.).reshape(2, 4)+rank
    for _ in range(2):  # the second step fails where a parameter got no gradient in the first
        m.zero_grad()
        (ddp(x).pow(2).mean()+reg()).backward()
    return [p.grad.tolist() for p in m.parameters() if p.grad is not None]

def _worker(rank, port, d):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    (d/f'{rank}.json').write_text(json.dumps([_gradients(rank, frozen) for frozen in (False,True)]))
    dist.destroy_process_group()

def test_two_processes_agree(tmp_path):
    "On the gradients, of a network that is trained and of one that is frozen, where only θ has one"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    mp.spawn(_worker, (port, tmp_path), nprocs=2)
    a,b = (json.loads((tmp_path/f'{rank}.json').read_text()) for rank in range(2))
    assert a==b and [len(o) for o in a]==[3,1]

# ---- callbacks, optimizers and layers that change between fits

@pytest.mark.parametrize('make', [ConventionalL2, AdaptiveL2, AutoL2, ArrayHistory, RotationControl])
def test_a_callback_is_added_once(make):
    "It would add its penalty twice"
    learn = learner(cb := make())
    for again in (lambda: learn.add_cb(cb), lambda: fit(learn, cbs=cb)):
        with pytest.raises(ValueError, match='is a callback of this Learner already'): again()
    assert sum(o is cb for o in learn.cbs)==1
    fit(learn); learn.remove_cb(cb); fit(learn.add_cb(cb))

def test_a_refused_callback_leaves_the_decay():
    learn = fit(learner())
    with pytest.raises(ValueError, match='no parameter array'): learn.add_cb(AdaptiveL2(.1, exclude='typo'))
    assert decays(fit(learn))=={.01}

def test_parameters_that_the_optimizer_lacks_are_named():
    learn = fit(learner(ConventionalL2()))
    learn.model[1] = nn.Linear(8, 1)
    with pytest.warns(UserWarning, match='2 of the 6 trainable parameter arrays.*`learn.create_opt'): fit(learn)
    learn.create_opt()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learn)

@pytest.mark.parametrize('opt_func', [Adam, ranger])
def test_theta_joins_an_optimizer_that_was_loaded(opt_func):
    "Loading, also by `lr_find`, leaves fastai's optimizers without entries for new arrays"
    learn = learner(opt_func=opt_func)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=10)
    assert (fit(learn, 1, 'fit', 1e-2, cbs=AdaptiveL2(.1)).model.l2_theta<0).all()
    fit(learn, 1, 'fit', 1e-2, cbs=AdaptiveL2(.1))

def test_removal_keeps_a_new_splitter():
    learn = learner(AdaptiveL2(.1))
    learn.splitter = trainable_params
    assert learn.remove_cb(AdaptiveL2).splitter is trainable_params

# --- loggers

def _logged(dls_args=dict(size=(64,32), n_pids=4, n_imgs=4, steps=2, device='cpu')):
    from reid_fastai.data.block import ReIDDataLoaders
    from reid_fastai.data.synthetic import make_synthetic
    from reid_fastai.learner import reid_learner
    return reid_learner(ReIDDataLoaders.from_path(make_synthetic(tiny=True), **dls_args), 'test_resnet', pretrained=False, cbs=AdaptiveL2())

def test_tensorboard(tmp_path):
    "The event file holds a histogram of λ for each kind and epoch, the penalty and mAP, with fastai's callback as it is"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = _logged()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=TensorBoardCallback(tmp_path))
    events = EventAccumulator(str(tmp_path), size_guidance=dict(histograms=0))
    events.Reload()
    last = learn.adaptive_l2.history[lambda o: o.epoch==2]
    for kind,o in last.groupby('kind'):
        hists = events.Histograms(f'lambda/{kind}')
        assert [h.step for h in hists]==[2,4]
        h = hists[-1].histogram_value
        assert h.num==len(o) and h.min==pytest.approx(o.lam.min()) and h.max==pytest.approx(o.lam.max()) and h.sum==pytest.approx(o.lam.sum())
    assert events.Scalars('mAP')[-1].value==pytest.approx(100*learn.retrieval_metrics.results.mAP)
    assert events.Scalars('penalty')[-1].value==pytest.approx((last.lam*last.sq_norm).sum(), rel=1e-4)

def test_wandb_offline(tmp_path, monkeypatch):
    "A run that never left the machine holds the same"
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as theirs
    for k,v in dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR=str(tmp_path)).items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(theirs, '_format_config', lambda o: o.clear())  # fastai 2.8.12 fails in it on any Learner, with the fastcore that it needs
    learn,run = _logged(),wandb.init(project='test')
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2, cbs=theirs.WandbCallback())
        s,last = run.summary,learn.adaptive_l2.history[lambda o: o.epoch==1]
        assert s['mAP']==pytest.approx(100*learn.retrieval_metrics.results.mAP) and s['penalty']==pytest.approx((last.lam*last.sq_norm).sum(), rel=1e-4)
        for kind,o in last.groupby('kind'): assert sum(dict(s[f'lambda/{kind}'])['values'])==len(o)
    finally: run.finish()
