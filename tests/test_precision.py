"Half precision on any device: what it touches, what stays float32, and what is refused"
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from torch import nn

import reid_fastai.callback.precision as precision
from reid_fastai.callback.checkpoint import Checkpoint
from reid_fastai.callback.precision import *
from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.config import RunConfig
from reid_fastai.models import build_reid_net
from reid_fastai.runs import check_compiler, make_learner
from reid_fastai.shell import run_command
from reid_fastai.cli import reid_train
from reid_fastai.test_utils import tiny_learner

halves = [o for o in ('bf16','fp16') if supports_precision(o, 'cpu')]
half = pytest.mark.parametrize('half', halves)

class Spy(Callback):
    "Types and gradients as training sees them"
    order = 70
    def __init__(self, stop=True): self.stop,self.grads,self.types = stop,[],{}
    def before_fit(self):
        def note(name):
            def f(m, i, o):
                if m.training: self.types[name] = i[0].dtype,o.dtype
            return f
        head = self.model.heads[0]
        self.hooks = [m.register_forward_hook(note(n)) for n,m in dict(conv=next(o for o in self.model.modules() if isinstance(o, nn.Conv2d)), neck=head.neck, classifier=head.classifier).items()]
    def after_pred(self): self.pred_types,self.autocast = {o.dtype for o in self.pred.embeddings+self.pred.logits},torch.is_autocast_enabled('cpu')
    def before_step(self):
        self.grads.append({n: p.grad.clone() for n,p in self.model.named_parameters()})
        if self.stop: raise CancelFitException()
    def after_fit(self): [h.remove() for h in self.hooks]

def fit(how=None, *cbs, amplitude=5e-3, n=1, **kw):
    learn = tiny_learner(cbs=[AdaptiveL2(amplitude), *cbs], **kw)
    if how: getattr(learn, f'to_{how}')()
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3)
    return learn

def theta(spy): return spy.grads[0]['l2_theta']
def weights(spy): return torch.cat([g.flatten() for n,g in spy.grads[0].items() if n!='l2_theta'])

@half
def test_network_is_half_and_the_rest_is_not(half):
    "On the CPU, where fastai's own callback does nothing"
    fit(half, spy := Spy())
    assert spy.types['conv'][1]==precisions[half] and spy.types['neck']==spy.types['classifier']==(torch.float32,)*2
    assert spy.pred_types=={torch.float32} and not spy.autocast and not torch.is_autocast_enabled('cpu')
    plain = tiny_learner(cbs=[MixedPrecision(amp_mode='bf16'), spy := Spy()])
    with plain.no_bar(), plain.no_logging(): plain.fit(1)
    assert spy.types['conv'][1]==torch.float32, 'fastai has learnt it: our callback may go'

@half
@pytest.mark.parametrize('amplitude', [5e-3, 1e-7])
def test_gradient_of_theta_is_that_of_float32(half, amplitude, monkeypatch):
    "Also where it is far below what float16 holds; a penalty in half precision would lose it"
    fit(half, a := Spy(), amplitude=amplitude)
    fit(None, b := Spy(), amplitude=amplitude)
    assert theta(b).abs().min()>0 and ((theta(a)-theta(b)).abs()<=1e-3*theta(b).abs()).all()
    assert 0<((weights(a)-weights(b)).norm()/weights(b).norm()).item()<.2
    def lossy(self): self.learn.loss_grad = self.learn.loss_grad+self.regularizer().to(precisions[half]).float() if half=='fp16' else self.learn.loss_grad+sum(
        (a*(w.to(torch.bfloat16)**2).sum()).float() for a,w in zip(self.regularizer.lambdas(), self.regularizer.arrays))
    monkeypatch.setattr(AdaptiveL2, 'after_loss', lossy)
    fit(half, c := Spy(), amplitude=amplitude)
    if half=='bf16' or amplitude<1e-5: assert not ((theta(c)-theta(b)).abs()<=1e-3*theta(b).abs()).all()

@half
def test_with_accumulation_and_clipping(half):
    fit(half, GradientAccumulation(48), GradientClip(.5), spy := Spy())
    assert sum(g.square().sum() for g in spy.grads[0].values()).sqrt()==pytest.approx(.5, rel=1e-3)  # clipped after it was unscaled

@pytest.mark.skipif('fp16' not in halves, reason='no fp16 here')
def test_an_overflow_skips_the_step_and_nothing_else():
    "The scale is halved until gradients fit; θ and weights stay as they are meanwhile"
    class Watch(Callback):
        order = 80
        def __init__(self): self.thetas,self.scales = [],[]
        def after_batch(self):
            if self.training: self.thetas.append(self.learn.adaptive_l2.regularizer.theta.detach().clone()); self.scales.append(self.learn.scaler.get_scale())
    learn = tiny_learner(cbs=[AdaptiveL2(), watch := Watch()])
    learn.to_fp16(init_scale=2.**40)
    with learn.no_bar(), learn.no_logging(): learn.fit(10, 1e-3)
    still = [s for s,t in zip(watch.scales, watch.thetas) if (t==0).all()]
    assert 1<len(still)<len(watch.thetas) and still==[2.**(39-i) for i in range(len(still))] and watch.thetas[-1].isfinite().all() and (watch.thetas[-1]!=0).all()

@half
def test_errors_and_evaluation_leave_autocast(half):
    "Evaluation is in float32, and a network that fails does not leave the next one in half precision"
    learn = fit(half, n=1)
    feats = learn.embed()
    assert torch.equal(feats, learn.to_fp32().embed()) and not any(isinstance(cb, MixedPrecision) for cb in learn.cbs)
    learn = tiny_learner()
    getattr(learn, f'to_{half}')()
    learn.model.trunk.register_forward_hook(lambda *_: 1/0)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ZeroDivisionError): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')

@half
@pytest.mark.parametrize('name', ['osnet_x0_25','rga_sc_resnet50','ianet_resnet50','bat_net'])
def test_published_networks(half, name):
    net = build_reid_net(name, 5, pretrained=False, size=(64,32)).train()
    with torch.autocast('cpu', precisions[half]): out = net(torch.rand(4, 3, 64, 32))
    assert {o.dtype for o in out.embeddings+out.logits}=={torch.float32} and all(o.isfinite().all() for o in out.embeddings)

@half
def test_resume_goes_on_to_the_same_digits(half, tmp_path):
    class Stop(Callback):
        order = 80
        def after_epoch(self):
            if self.epoch==0: raise KeyboardInterrupt
    def go(folder, *cbs):
        learn = tiny_learner(cbs=[AdaptiveL2(), ReIDPrecision(half, init_scale=2.**20, growth_interval=2), Checkpoint(folder), *cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-3, start_epoch=learn.checkpoint.load())
        return learn
    for o in 'whole','cut': (tmp_path/o).mkdir()
    whole = go(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'cut', Stop())
    cut = go(tmp_path/'cut')
    assert all(torch.equal(a, b) for a,b in zip(whole.model.state_dict().values(), cut.model.state_dict().values()))
    assert whole.mixed_precision._scaler.state_dict()==cut.mixed_precision._scaler.state_dict()

def test_export_and_load(tmp_path):
    if not halves: pytest.skip('no half precision here')
    learn = tiny_learner(path=tmp_path)
    getattr(learn, f'to_{halves[0]}')()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export()
    assert not any(isinstance(cb, MixedPrecision) for cb in load_learner(tmp_path/'export.pkl').cbs)  # fastai ends it with `to_fp32`

def test_defaults_and_refusals(monkeypatch, capsys, tmp_path):
    assert check_precision(None, 'cpu')=='fp32' and check_precision(None) is None
    for able in True,False:
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: able)
        assert check_precision(None, 'cuda')==('bf16' if able else 'fp32')
    with pytest.raises(ValueError, match='^precision=\'bf16\': this CUDA does not'): check_precision('bf16', 'cuda')
    with pytest.raises(ValueError, match='one of'): RunConfig(precision='fp8')
    with pytest.raises(ValueError, match='True or False'): RunConfig(compile='yes')
    monkeypatch.setattr(precision, 'supports_precision', lambda o, device: o=='fp32')
    with pytest.raises(ValueError, match='this CPU does not compute in fp16'): tiny_learner().to_fp16().fit(1)
    for args in ['--precision','fp8'],['--precision','fp16','--device','cpu']:
        assert run_command(reid_train, [*args, '--out', str(tmp_path/'r')], 'reid-train', ['data'])==2
        err = capsys.readouterr().err
        assert err.count('\n')==1 and 'precision=' in err and len(err)<=301 and not (tmp_path/'r').exists()
    monkeypatch.setattr(torch, 'compile', lambda f: 1/0)
    with pytest.raises(ValueError, match='C\\+\\+ compiler'): check_compiler()

def test_config_makes_the_learner():
    from reid_fastai.data.datasets import read_dataset
    from reid_fastai.data.synthetic import make_synthetic
    splits = read_dataset(make_synthetic(tiny=True))
    for how in [None,'fp32',*halves]:
        learn = make_learner(splits, RunConfig(splits.root, arch='resnet10t', pretrained='none', size='64x32', n_pids=4, steps=1, precision=how), device='cpu')
        assert training_precision(learn)==(f'{how} mixed precision' if how in halves else 'fp32')
