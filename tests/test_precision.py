"Half precision on any device: what it touches, what stays float32, and what is refused"
from types import SimpleNamespace

import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reid_fastai.callback.precision as precision
from reid_fastai import run_setup
from reid_fastai.callback.checkpoint import Checkpoint
from reid_fastai.callback.precision import *
from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.config import RunConfig
from reid_fastai.data.datasets import read_dataset
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.core import unwrap
from reid_fastai.learner import ReIDLearner, paper_adam
from reid_fastai.optimizer import FusedAdam
from reid_fastai.run_setup import check_compiler, make_learner
from reid_fastai.runs import train_run
from reid_fastai.shell import run_command
from reid_fastai.cli import reid_train
from reid_fastai.test_utils import tiny_dls, tiny_learner

halves = [o for o in ('bf16','fp16') if supports_precision(o, 'cpu')]
half = pytest.mark.parametrize('half', halves)

def small(*cbs, amplitude=5e-3, **kw):
    "A learner of a small plain network: a backward convolution in float16 takes a CPU ten times as long as one in float32"
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    dl = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), 8)
    net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    nn.init.constant_(net[1].bias, .1)  # an array of zeros has no gradient for its θ
    return ReIDLearner(DataLoaders(dl, dl), net, nn.MSELoss(), opt_func=paper_adam, cbs=[AdaptiveL2(amplitude), *cbs], **kw)

def fit(learn, how=None, n=1):
    if how: getattr(learn, f'to_{how}')()
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3)
    return learn

class Spy(Callback):
    "Gradients of the first step"
    order = 70
    def before_step(self):
        self.grads = {n: p.grad.clone() for n,p in self.model.named_parameters()}
        raise CancelFitException()

def theta(spy): return spy.grads['l2_theta']
def weights(spy): return torch.cat([g.flatten() for n,g in spy.grads.items() if n!='l2_theta'])

@half
def test_network_is_half_and_the_rest_is_not(half):
    "On the CPU, where fastai's own callback does nothing"
    def seen(learn):
        types,net = {},unwrap(learn.model)
        class Stop(Callback):
            order = 70
            def after_pred(self):
                types.update(pred={o.dtype for o in self.pred.embeddings+self.pred.logits}, autocast=torch.is_autocast_enabled('cpu'))
                if not isinstance(cb := self.learn.mixed_precision, ReIDPrecision): cb.autocast.__exit__(None, None, None)  # fastai would stay in it
                raise CancelFitException()
        def note(name):
            def f(m, i, o): types[name] = i[0].dtype,o.dtype
            return f
        for n,m in dict(conv=next(o for o in net.modules() if isinstance(o, nn.Conv2d)), neck=net.heads[0].neck, classifier=net.heads[0].classifier).items(): m.register_forward_hook(note(n))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Stop())
        return types
    learn = tiny_learner()
    getattr(learn, f'to_{half}')()
    types = seen(learn)
    assert types['conv'][1]==precisions[half] and types['neck']==types['classifier']==(torch.float32,)*2
    assert types['pred']=={torch.float32} and not types['autocast'] and not torch.is_autocast_enabled('cpu')
    if half=='bf16': assert seen(tiny_learner(cbs=MixedPrecision(amp_mode='bf16')))['conv'][1]==torch.float32, 'fastai has learnt it: our callback may go'

@half
@pytest.mark.parametrize('amplitude', [5e-3, 1e-7])
def test_gradient_of_theta_is_that_of_float32(half, amplitude, monkeypatch):
    "Also where it is far below what float16 holds; a penalty in half precision would lose it"
    for how,spy in (half, a := Spy()),(None, b := Spy()): fit(small(spy, amplitude=amplitude), how)
    off = lambda o: ((theta(o)-theta(b)).abs()/theta(b).abs()).max().item()
    assert theta(b).abs().min()>0 and off(a)<1e-3
    assert 0<((weights(a)-weights(b)).norm()/weights(b).norm()).item()<.1  # the network did run in half precision
    def in_half(self): self.learn.loss_grad = self.learn.loss_grad+sum((l.bfloat16()*w.bfloat16()**2).sum().float() for l,w in zip(self.regularizer.lambdas(), self.regularizer.arrays))
    class Late(Callback):
        "After the loss was scaled, so that λ is divided by the scale"
        order = MixedPrecision.order+1
        def before_backward(self): self.learn.loss_grad = self.learn.loss_grad+self.learn.adaptive_l2.regularizer()
    monkeypatch.setattr(AdaptiveL2, 'after_loss', in_half if half=='bf16' else lambda self: None)
    fit(small(c := Spy(), *[Late()]*(half=='fp16'), amplitude=amplitude), half)
    assert off(c)>1e-3

@half
def test_with_accumulation_and_clipping(half):
    fit(small(GradientAccumulation(16), GradientClip(.05), spy := Spy()), half)
    assert sum(g.square().sum() for g in spy.grads.values()).sqrt()==pytest.approx(.05, rel=1e-3)  # clipped after it was unscaled

@pytest.mark.skipif('fp16' not in halves, reason='no fp16 here')
def test_an_overflow_skips_the_step_and_nothing_else():
    "The scale is halved until gradients fit; θ stays as it is meanwhile"
    class Watch(Callback):
        order = 80
        def __init__(self): self.thetas,self.scales = [],[]
        def after_batch(self):
            if self.training: self.thetas.append(self.learn.adaptive_l2.regularizer.theta.detach().clone()); self.scales.append(self.learn.scaler.get_scale())
    fit(small(watch := Watch()).to_fp16(init_scale=2.**40), n=10)
    still = [s for s,t in zip(watch.scales, watch.thetas) if (t==0).all()]
    assert 1<len(still)<len(watch.thetas) and still==[2.**(39-i) for i in range(len(still))] and watch.thetas[-1].isfinite().all() and (watch.thetas[-1]!=0).all()

def test_errors_and_evaluation_leave_autocast():
    "Evaluation is in float32, and a network that fails does not leave the next one in half precision"
    if not halves: pytest.skip('no half precision here')
    learn = fit(tiny_learner(), halves[0])
    assert torch.equal(learn.embed(), learn.to_fp32().embed()) and not any(isinstance(cb, MixedPrecision) for cb in learn.cbs)
    learn = small()
    learn.model[2].register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): fit(learn, halves[0])
    assert not torch.is_autocast_enabled('cpu')

def whole_and_resumed(folder, make, lr):
    "Learners with the callback of `make`, one after two epochs and one after an interruption between them; their arrays are equal"
    class Stop(Callback):
        order = 80
        def after_epoch(self):
            if self.epoch==0: raise KeyboardInterrupt
    def go(name, *cbs):
        learn = small(make(), Checkpoint(folder/name), *cbs)
        learn.dls.train.epoch = 0  # of our loaders
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, lr, start_epoch=learn.checkpoint.load())
        return learn
    for o in 'whole','cut': (folder/o).mkdir()
    whole = go('whole')
    with pytest.raises(KeyboardInterrupt): go('cut', Stop())
    cut = go('cut')
    assert all(torch.equal(a, b) for a,b in zip(whole.model.state_dict().values(), cut.model.state_dict().values()))
    return whole,cut

@half
def test_resume_goes_on_to_the_same_digits(half, tmp_path):
    whole,cut = whole_and_resumed(tmp_path, lambda: ReIDPrecision(half, init_scale=2.**20, growth_interval=3), 1e-3)
    assert whole.mixed_precision._scaler.state_dict()==cut.mixed_precision._scaler.state_dict()

def test_export_and_load(tmp_path):
    if not halves: pytest.skip('no half precision here')
    learn = fit(small(path=tmp_path), halves[0])
    learn.dls = tiny_dls()  # PyTorch's loaders cannot be exported
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
    with pytest.raises(ValueError, match='this CPU does not support fp16'): small().to_fp16().fit(1)
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

def test_a_compiled_training(monkeypatch):
    "`compile=True` compiles the network that is trained; its gradients are those without, and the summary names it"
    from reid_fastai.data.datasets import read_dataset
    from reid_fastai.data.synthetic import make_synthetic
    splits,graphs,real = read_dataset(make_synthetic(tiny=True)),[],nn.Module.compile
    def eager(graph, inputs): graphs.append(graph); return graph.forward
    monkeypatch.setattr(run_setup, 'check_compiler', lambda device: None)  # no C++ compiler is needed
    monkeypatch.setattr(nn.Module, 'compile', lambda self: real(self, backend=eager))
    spies = []
    for on in True,False:
        cfg = RunConfig(splits.root, arch='test_resnet', pretrained='none', size='32x32', n_pids=4, steps=1, precision='fp32', compile=on)
        learn = make_learner(splits, cfg, device='cpu')
        assert training_precision(learn)==f'fp32{", compiled"*on}'
        spies.append(Spy())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=spies[-1])
        assert training_precision(learn.to_bf16())==f'bf16 mixed precision{", compiled"*on}'
    assert graphs
    torch.testing.assert_close(spies[0].grads, spies[1].grads)

@pytest.mark.parametrize('convolutions,products,words', [(True, False, 'in convolutions'), (False, True, 'in products'), (True, True, 'in convolutions and products'), (False, False, 'off')])
def test_tf32_is_named_on_a_gpu(convolutions, products, words, monkeypatch):
    monkeypatch.setattr(torch.backends, 'cudnn', SimpleNamespace(allow_tf32=convolutions))
    monkeypatch.setattr(torch.backends.cuda, 'matmul', SimpleNamespace(allow_tf32=products))
    net = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device('cuda'))]))
    assert training_precision(SimpleNamespace(model=net, cbs=[]))==f'fp32, TF32 {words}'

def test_runs_of_earlier_versions_go_on(tmp_path):
    "Their config.json knows neither precision nor compilation, nor the table of the dataset, and has other notes"
    import json
    from reid_fastai.runs import _check_same, _versions
    wanted = dict(vars(RunConfig()), dataset=dict(name='d', table='1f', notes=['new']), versions=_versions())
    (tmp_path/'config.json').write_text(json.dumps({k: v for k,v in dict(wanted, dataset=dict(name='d', notes=['old'])).items() if k not in ('precision','compile')}))
    _check_same(tmp_path, wanted)
    with pytest.raises(ValueError, match="precision=None, but this call has 'bf16'"): _check_same(tmp_path, dict(wanted, precision='bf16'))

def test_fits_after_an_interrupted_step(monkeypatch):
    "The scale is kept, and not the step that was open"
    monkeypatch.setattr(precision, 'supports_precision', lambda *_: True)
    learn = small().to_fp16(init_scale=2.**9)
    def interrupt(*_): raise KeyboardInterrupt
    def cut():
        with monkeypatch.context() as m:
            m.setattr(FusedAdam, 'step', interrupt)
            with pytest.raises(KeyboardInterrupt): fit(learn)
    cut()
    learn.mixed_precision._scaler.update(2.**11)
    cut()
    assert fit(learn).mixed_precision._scaler.get_scale()==2.**11

def test_fits_after_a_fit_that_diverged(monkeypatch):
    "Its scale, at which gradients vanish, is not kept; that of `lr_find` never is"
    monkeypatch.setattr(precision, 'supports_precision', lambda *_: True)
    learn = fit(small().to_fp16(init_scale=2.**9))
    learn.mixed_precision._scaler.update(2.**-40)
    assert fit(learn).mixed_precision._scaler.get_scale()==2.**9
    scaler = learn.mixed_precision._scaler
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=2, show_plot=False, suggest_funcs=None)
    assert learn.mixed_precision._scaler is scaler

def test_resume_in_the_middle_of_an_accumulation(tmp_path):
    "Gradients that are not applied yet are kept"
    whole_and_resumed(tmp_path, lambda: GradientAccumulation(24), 1e-2)  # three of the four batches of an epoch

@half
def test_resume_in_another_precision(half, tmp_path, interrupted):
    "The change is named, in a warning and in the results"
    splits = read_dataset(make_synthetic(tiny=True))
    cfg = RunConfig(splits.root, arch='test_resnet', pretrained='none', size='64x32', n_pids=4, epochs=2, steps=2)
    interrupted(tmp_path/'r', splits, cfg, 1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(precision, 'default_precision', lambda device: half)
        with pytest.warns(UserWarning, match=f'was trained in fp32, and goes on in {half} mixed precision'): res = train_run(tmp_path/'r', splits, cfg)
    assert res['precision']==f'fp32, then {half} mixed precision' and res['precision'] in (tmp_path/'r'/'summary.md').read_text()
