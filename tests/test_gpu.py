"What a GPU alone can show"
import os, subprocess, sys
from functools import partial
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.optimizer import Adam

from reid_fastai.callback.precision import *
from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.learner import paper_adam
from reid_fastai.test_utils import tiny_dls, tiny_learner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')]

def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-3)
    return learn

def gpu_learner(**kw): return tiny_learner(tiny_dls(device='cuda'), **kw)

def test_bytes_lie_on_the_gpu():
    dls,cpu = tiny_dls(device='cuda', batch_tfms=[]),tiny_dls(batch_tfms=[])
    assert dls.train._columns()[0].is_cuda and dls.train.fake_l.num_workers==0
    for a,b in zip(dls.valid, cpu.valid, strict=True): assert a[0].is_cuda and torch.allclose(a[0].cpu(), b[0], rtol=0, atol=2e-7) and torch.equal(a[1].cpu(), b[1])
    assert not dls.valid_ds[0][0].is_cuda

def test_before_the_first_fit(tmp_path):
    "The network is on the GPU at once: for embedding, and for the moments that `load` creates"
    learn = fit(gpu_learner(cbs=AdaptiveL2(), path=tmp_path))
    learn.save('m')
    other = gpu_learner(cbs=AdaptiveL2(), path=tmp_path)
    assert next(other.model.parameters()).is_cuda
    other.retrieval(); other.plot_activations(n=1)
    fit(other.load('m'))

@pytest.mark.parametrize('how', ['fp32','bf16','fp16'])
def test_training(how):
    if not supports_precision(how, 'cuda'): pytest.skip(f'no {how}')
    learn = gpu_learner(cbs=AdaptiveL2())
    fit(learn if how=='fp32' else getattr(learn, f'to_{how}')(), 2)
    assert how in training_precision(learn) and all(p.isfinite().all() for p in learn.model.parameters()) and learn.retrieval_metrics.results.mAP>0

@pytest.mark.parametrize('how', ['bf16','fp16'])
def test_gradient_of_theta(how):
    if not supports_precision(how, 'cuda'): pytest.skip(f'no {how}')
    grads = []
    class Keep(Callback):
        order = 70
        def before_step(self): grads.append(self.learn.adaptive_l2.regularizer.theta.grad.clone()); raise CancelFitException()
    for o in how,None:
        learn = gpu_learner(cbs=[AdaptiveL2(), Keep()])
        fit(getattr(learn, f'to_{o}')() if o else learn)
    assert ((grads[0]-grads[1]).abs()<=1e-3*grads[1].abs()).all()

def test_fused_optimizer():
    "One step from equal gradients"
    out = []
    for opt_func in paper_adam,partial(Adam, **paper_adam.keywords):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(1000, device='cuda'))
        opt = opt_func([p], lr=1e-2)
        for i in range(10):
            p.grad = torch.randn(1000, device='cuda', generator=torch.Generator('cuda').manual_seed(i))
            opt.step()
        out.append(p.detach())
    torch.testing.assert_close(*out, rtol=1e-5, atol=1e-6)

@pytest.mark.skipif(torch.cuda.device_count()<2, reason='there are no two GPUs')
def test_two_gpus_train_as_one(tmp_path):
    "NCCL, and statistics synchronised by PyTorch's kernels; in float64"
    for n in 1,2:
        argv = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', n, Path(__file__).parent/'several.py', tmp_path, 'statistics']
        subprocess.run(list(map(str, argv)), check=True, timeout=200, env=dict(os.environ, SEVERAL_ON='cuda'))
    one,*two = (torch.load(tmp_path/f'statistics-{o}.pth', weights_only=False)['weights'] for o in ('1-0','2-0','2-1'))
    for got in two: torch.testing.assert_close(got, one, rtol=1e-6, atol=1e-9)
