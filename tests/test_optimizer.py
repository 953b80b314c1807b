"The fused Adam beside fastai's: the same training, the same files"
import copy, pickle
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reid_fastai.callback.checkpoint import Checkpoint
from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.learner import paper_adam
from reid_fastai.optimizer import FusedAdam
import reid_fastai.schedules  # noqa: F401, gives learners their `fit_paper`
from reid_fastai.test_utils import tiny_dls, tiny_learner

loop_adam = partial(Adam, **paper_adam.keywords)

def run(opt_func, how):
    "Parameters and optimizer after a training in double precision, but for θ"
    torch.manual_seed(0)
    x = torch.randn(32, 4, dtype=torch.float64)
    dl = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), 8)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 1)).double()
    cbs = dict(accumulate=[GradientAccumulation(16)], clip=[GradientClip(.1)]).get(how, [])
    learn = Learner(DataLoaders(dl, dl), net, nn.MSELoss(), opt_func=opt_func, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())],
                    cbs=cbs+[_Single()]+([AdaptiveL2(.01)] if how!='wd' else []))
    with learn.no_bar(), learn.no_logging():
        if how=='freeze':
            learn.freeze()
            learn.fit(2, 1e-2)
            learn.unfreeze()
            learn.fit(2, slice(1e-3, 1e-2))
        elif how=='paper': learn.fit_paper(2, 3, lr=1e-2)
        else: learn.fit_one_cycle(4, 1e-2, wd=.1 if how=='wd' else None)
    return {n: p.detach().clone() for n,p in learn.model.named_parameters()},learn.opt

class _Single(Callback):
    "The loss as `Recorder` averages it"
    def after_loss(self): self.learn.loss = self.learn.loss.float()

def gap(a, b): return max(((a[n]-b[n]).norm()/b[n].norm().clamp(min=1e-9)).item() for n in b)

@pytest.mark.parametrize('how', ['cycle','freeze','paper','accumulate','clip','wd'])
def test_same_training_as_fastais_adam(how):
    ours,theirs = run(paper_adam, how),run(loop_adam, how)
    assert gap(ours[0], theirs[0])<1e-6
    assert [dict(o) for o in ours[1].hypers]==[{k: o[k] for k in ours[1].hypers[0]} for o in theirs[1].hypers]
    if how=='cycle': assert gap(run(partial(paper_adam, eps=1e-5), how)[0], theirs[0])>1e-5  # what a wrong constant would do

def test_theta_is_in_the_last_group_with_its_rate():
    learn = tiny_learner(cbs=AdaptiveL2())
    learn.remove_cb(learn.adaptive_l2)
    learn.create_opt()
    learn.add_cb(AdaptiveL2())  # joins an optimizer that exists
    assert isinstance(learn.opt, FusedAdam) and any(p is learn.adaptive_l2.regularizer.theta for p in learn.opt.param_lists[-1])
    seen = []
    class Watch(Callback):
        order = 70
        def before_step(self): self.before = learn.adaptive_l2.regularizer.theta.detach().clone()
        def after_step(self): seen.append((learn.adaptive_l2.regularizer.theta-self.before).abs().max().item())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-5, 1e-3), cbs=Watch())
    assert seen[0]==pytest.approx(1e-3, rel=1e-3)  # Adam's first step is its learning rate

@pytest.mark.parametrize('first,then', [(loop_adam,paper_adam), (paper_adam,paper_adam), (paper_adam,loop_adam)])
def test_checkpoints_of_either_go_on(first, then, tmp_path):
    "As an uninterrupted training does; those of before there was a fused Adam too"
    class Stop(Callback):
        order = 80
        def after_epoch(self):
            if self.epoch==0: raise KeyboardInterrupt
    def go(folder, opt_func, *cbs, start=0):
        learn = tiny_learner(opt_func=opt_func, cbs=[AdaptiveL2(.01), Checkpoint(folder), *cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-3, start_epoch=learn.checkpoint.load())
        return learn
    for o in 'whole','cut': (tmp_path/o).mkdir()
    whole = go(tmp_path/'whole', first)
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'cut', first, Stop())
    resumed = go(tmp_path/'cut', then)
    a,b = ({n: p.detach() for n,p in o.model.named_parameters()} for o in (resumed, whole))
    assert gap(a, b)==0 if first is then else gap(a, b)<1e-3
    assert np.allclose(*(o.adaptive_l2.history.theta for o in (resumed, whole)), rtol=0 if first is then else 1e-3, atol=1e-7)

def test_moments_take_the_layout_of_their_weights():
    "A fused update walks through memory: moments of a run on a CPU, where kernels are channels last, would belong to other weights on a GPU"
    steps = []
    for layout in torch.contiguous_format,torch.channels_last:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4, 3, 3, 3))
        opt = FusedAdam([p], lr=.1)
        p.grad = torch.randn(4, 3, 3, 3)
        opt.step()
        state = opt.state_dict()
        for s in state['state']: s.update({k: v.to(memory_format=layout) for k,v in s.items() if torch.is_tensor(v) and v.ndim==4})
        opt.load_state_dict(state)
        opt.step()
        steps.append(p.detach().clone())
    assert torch.equal(*steps)

def test_learner_files_of_either_load_without_a_warning(tmp_path, recwarn):
    for save,load in (loop_adam,paper_adam),(paper_adam,loop_adam),(paper_adam,paper_adam):
        a,b = (tiny_learner(opt_func=o, cbs=AdaptiveL2(), path=tmp_path) for o in (save,load))
        with a.no_bar(), a.no_logging(): a.fit(1, 1e-3)
        a.save('x')
        recwarn.clear()
        b.load('x')
        assert not [o for o in recwarn if 'optimizer' in str(o.message)]
        for s,t in zip(a.opt.state_dict()['state'], b.opt.state_dict()['state'], strict=True):
            assert s['step']==t['step'] and torch.equal(s['grad_avg'], t['grad_avg']) and torch.equal(s['sqr_avg'], t['sqr_avg'])
        assert b.opt.hypers[-1]['lr']==a.opt.hypers[-1]['lr']

def test_lr_find_and_export(tmp_path):
    learn = tiny_learner(cbs=AdaptiveL2(), path=tmp_path)
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=3, show_plot=False)
        assert gap({n: p.detach() for n,p in learn.model.named_parameters()}, before)==0
        learn.fit(1, 1e-3)
    learn.export()
    assert learn.opt.state_dict()['state'][0]['step']==3

def test_a_plateau_reduces_the_rate():
    learn = tiny_learner(eval_every=1)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, slice(1e-4, 1e-3), cbs=ReduceLROnPlateau(monitor='mAP', patience=1, min_delta=1000.))
    assert [g['lr'] for g in learn.opt.opt.param_groups]==pytest.approx([1e-5, 1e-4])

def test_hypers_set_the_group_and_copies_do_not():
    opt = FusedAdam([nn.Parameter(torch.zeros(2))], lr=.1)
    h = opt.hypers[0]
    h['mom'],h['lr'] = .5,.2
    assert opt.opt.param_groups[0]['betas']==(.5, .99) and opt.hypers[0]=={'lr': .2, 'mom': .5, 'sqr_mom': .99, 'eps': 1e-5, 'wd': .01}
    for o in copy.deepcopy(h),pickle.loads(pickle.dumps(h)),opt.state_dict()['hypers'][0]:
        assert type(o) is dict and o==h
        o['lr'] = 9.
    assert opt.hypers[0]['lr']==.2
    assert copy.deepcopy(opt).hypers==opt.hypers

def test_lr_find_is_no_epoch_of_a_checkpoint(tmp_path):
    learn = tiny_learner(tiny_dls(steps=1), cbs=Checkpoint(tmp_path), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=6, show_plot=False)
        assert not learn.checkpoint.file.exists()
        learn.fit(1, 1e-3)
    assert list(learn.checkpoint.table.epoch)==[1]

def test_amsgrad_goes_on_from_a_state_of_adam():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    a,b = (FusedAdam([p], lr=.1, amsgrad=o) for o in (False,True))
    a.step()
    b.load_state_dict(a.state_dict())
    b.step()
    assert b.state_dict()['state'][0]['max_sqr_avg'].max()>0
