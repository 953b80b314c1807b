"Penalty and gradients of the regularisers against a float64 oracle"
import pytest, timm, torch
from torch import nn

from reid_fastai.regularizers import *

def oracle(reg, g=1.):
    "Value and gradients by autograd in float64, from the formula"
    ws = [w.detach().double().requires_grad_() for w in reg.arrays]
    theta = reg.theta.detach().double().requires_grad_()
    lam = reg.amplitudes.double()*(.2*theta+.5).clip(0, 1)
    loss = sum(l*(w**2).sum() for l,w,p in zip(lam, ws, reg.arrays) if p.requires_grad)
    (g*loss).backward()
    return loss.detach(), theta.grad, [w.grad for w in ws]

def rel(a, b): return ((a.double()-b).norm()/b.norm()).item()

@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(0)
    return timm.create_model('resnet50')

def test_resnet50_against_float64(resnet):
    reg = AdaptiveL2Regularizer(resnet, dict(kernel=5e-3, bias=1e-3, gamma=2e-3, beta=3e-3))
    with torch.no_grad():
        reg.theta.uniform_(-3, 3)
        for w in reg.arrays: w += 1e-3  # zero biases would hide a wrong gradient
    loss,theta,ws = oracle(reg)
    out = reg()
    assert out.dtype==torch.float32 and rel(out.detach(), loss)<1e-5
    out.backward()
    assert rel(reg.theta.grad, theta)<1e-5
    assert max(((t-o).abs()/o.abs().clamp_min(1e-12)).max() for t,o in [(reg.theta.grad.double(), theta)])<1e-5
    for p,w in zip(reg.arrays, ws):
        if w.norm()>0: assert rel(p.grad, w)<1e-5
        p.grad = None

@pytest.mark.parametrize('fill', [.1, 1., 37.])
def test_no_drift_on_a_large_array(fill):
    "A running float32 sum over 2**24 equal numbers would lose digits"
    m = nn.Module(); m.w = nn.Parameter(torch.full((2**12+1, 2**12+3), fill))
    assert rel(L2Regularizer(m, 1.)().detach(), m.w.detach().double().square().sum())<1e-5

@pytest.mark.parametrize('dtype,tol', [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_accumulates_in_float32(dtype, tol):
    torch.manual_seed(0)
    m = nn.Linear(512, 512).to(dtype)
    with torch.no_grad(): m.weight.mul_(1000)
    reg = AdaptiveL2Regularizer(m, .1)
    loss,theta,ws = oracle(reg)
    assert reg.theta.dtype==torch.float32
    assert rel(reg().detach(), loss)<1e-5
    reg().backward()
    assert rel(reg.theta.grad, theta)<1e-5
    assert m.weight.grad.dtype==dtype and rel(m.weight.grad, ws[0])<tol

def test_upstream_gradient_scales_both():
    reg = AdaptiveL2Regularizer(nn.Linear(3, 2), .1)
    _,theta,ws = oracle(reg, 128.)
    (128*reg()).backward()
    assert rel(reg.theta.grad, theta)<1e-5 and rel(reg.arrays[0].grad, ws[0])<1e-5

def test_non_contiguous_and_channels_last():
    m = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    reg = L2Regularizer(m, 1.)
    assert not m.weight.is_contiguous()
    reg().backward()
    assert torch.allclose(m.weight.grad, 2*m.weight) and rel(reg().detach(), sum(p.detach().double().square().sum() for p in m.parameters()))<1e-6

def test_complex_arrays():
    m = nn.Linear(3, 4, dtype=torch.complex64)
    reg = L2Regularizer(m, .5)
    want = sum(.5*(p.real.double()**2+p.imag.double()**2).sum() for p in m.parameters())
    assert rel(reg().detach(), want.detach())<1e-6
    reg().backward()
    assert torch.allclose(m.weight.grad, m.weight)

def test_frozen_arrays_are_left_alone():
    m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    reg = AdaptiveL2Regularizer(m, .1)
    m[0].requires_grad_(False)
    loss,theta,ws = oracle(reg)
    assert rel(reg().detach(), loss)<1e-5
    reg().backward()
    assert reg.theta.grad[:2].eq(0).all() and torch.allclose(reg.theta.grad.double(), theta)
    assert m[0].weight.grad is None and m[2].weight.grad is not None

def test_inactive_still_reaches_theta():
    m = nn.Linear(2, 2).requires_grad_(False)
    reg = AdaptiveL2Regularizer(m)
    reg().backward()
    assert reg.theta.grad.eq(0).all()

def test_state_dict_holds_theta_alone(resnet):
    assert list(AdaptiveL2Regularizer(resnet).state_dict())==['theta'] and not L2Regularizer(resnet).state_dict()
    assert len(AdaptiveL2Regularizer(resnet).theta)==161

def test_tied_arrays_count_once():
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    m[1].weight = m[0].weight
    assert L2Regularizer(m).names==['0.weight','0.bias','1.bias']

def test_kinds_of_timm_norms():
    kinds = param_kinds(timm.create_model('convnext_atto'))
    assert kinds['stem.1.weight']=='gamma' and kinds['stem.1.bias']=='beta' and kinds['stages.0.blocks.0.norm.weight']=='gamma'
    assert kinds['stages.0.blocks.0.conv_dw.weight']=='kernel' and kinds['head.fc.bias']=='bias'

def test_layers_of_normalised_weights_are_no_norms():
    class NormLinear(nn.Linear): pass
    class FilterNorm(nn.Module):
        def __init__(self): super().__init__(); self.weight,self.bias = nn.Parameter(torch.ones(1, 4, 1, 1)),nn.Parameter(torch.zeros(1, 4, 1, 1))
    kinds = param_kinds(nn.Sequential(NormLinear(4, 8), FilterNorm(), nn.LayerNorm((4,8,8))))
    assert list(kinds.values())==['kernel','bias','gamma','beta','gamma','beta']

@pytest.mark.parametrize('kw,words', [(dict(amplitude=0), '> 0'), (dict(amplitude='a lot'), "'a lot'"), (dict(amplitude=float('inf')), 'inf'),
    (dict(amplitude={'kernel': 1.}), "['bias']"), (dict(amplitude={'kernel': 1., 'bias': -1.}), '-1.0'), (dict(exclude='heads.*'), "'heads.*'")])
def test_bad_input(kw, words):
    with pytest.raises(ValueError) as e: AdaptiveL2Regularizer(nn.Linear(2, 2), **kw)
    assert words in str(e.value)

@pytest.mark.parametrize('reg', [L2Regularizer, AdaptiveL2Regularizer])
def test_strengths_are_on_the_device_of_the_model(reg): assert reg(nn.Linear(2, 2, device='meta')).lambdas().device.type=='meta'
