"The losses against slow oracles, in half precision, for odd batches and within a `Learner`."
import math, pickle

import pytest
import torch
from fastai.torch_core import TensorCategory, TensorImage
from pytorch_metric_learning.losses import CrossBatchMemory, TripletMarginLoss
from hypothesis import given, settings, strategies as st

from reid_fastai.losses import BatchHardTriplet, EuclideanDistance, MinedTriplet, ReIDLoss
from reid_fastai.models import ReIDOutput

def slow_triplet(emb, pid):
    "Anchor by anchor, in Python's floats"
    emb,pid,res = emb.tolist(),pid.tolist(),[]
    for i,a in enumerate(emb):
        pos = [math.dist(a, b) for j,b in enumerate(emb) if pid[j]==pid[i] and j!=i]
        neg = [math.dist(a, b) for j,b in enumerate(emb) if pid[j]!=pid[i]]
        if pos and neg: res.append(math.log1p(math.exp(max(pos)-min(neg))))
    return sum(res)/len(res) if res else 0.

def slow_ce(logits, pid, eps):
    "Cross-entropy with the distribution (1-eps) one-hot + eps uniform, written out"
    res = []
    for row,y in zip(logits.tolist(), pid.tolist()):
        z = math.log(sum(map(math.exp, row)))
        res.append(-sum((eps/len(row)+(1-eps)*(k==y))*(v-z) for k,v in enumerate(row)))
    return sum(res)/len(res)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(1, 6), st.sampled_from([.01, 1., 20.]), st.integers(0, 99))
def test_triplet_oracle(pids, d, scale, seed):
    "Any batch: identities with one image, one identity only, large and small distances, more than 25 rows"
    emb,pid = torch.rand(len(pids), d, generator=torch.Generator().manual_seed(seed))*scale,torch.tensor(pids)
    assert BatchHardTriplet()(emb, pid).item()==pytest.approx(slow_triplet(emb.double(), pid), rel=1e-4, abs=1e-6)

def test_triplet_scale_matters():
    "Embeddings are not normalised, neither for mining nor for the loss"
    torch.manual_seed(0)
    emb,pid = torch.rand(16, 8),torch.arange(4).repeat_interleave(4)
    emb[::3] *= 7
    loss = BatchHardTriplet()
    assert loss(emb, pid).item()==pytest.approx(slow_triplet(emb, pid), rel=1e-4)
    assert loss(2*emb, pid).item()==pytest.approx(slow_triplet(2*emb, pid), rel=1e-4)

def test_near_duplicates_have_a_gradient():
    "A network that gives everyone the same embedding must get away from there"
    base = torch.rand(512, generator=torch.Generator().manual_seed(0))
    emb = (base+1e-5*torch.randn(32, 512, generator=torch.Generator().manual_seed(1))).requires_grad_()
    d = EuclideanDistance()(emb)
    truth = (emb.double()[:,None]-emb.double()).norm(dim=2)
    assert torch.allclose(d.double(), truth, rtol=1e-4, atol=0)
    BatchHardTriplet()(emb, torch.arange(8).repeat_interleave(4)).backward()
    assert emb.grad.isfinite().all() and (emb.grad.norm(dim=1)>1e-3).all()

def test_triplet_gradient():
    "Equal to the gradient of the written-out formula, in double precision"
    torch.manual_seed(0)
    pid,emb = torch.tensor([0,0,0,1,1,2]),torch.rand(6, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: BatchHardTriplet()(e, pid), emb)

def batch(n_branches=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.rand(*s, generator=g).to(dtype).requires_grad_()
    return ReIDOutput([r(12, 8) for _ in range(n_branches)], [r(12, 5) for _ in range(n_branches)]),torch.tensor([0,1,2,3]).repeat_interleave(3)

@pytest.mark.parametrize('n', [1,3])
@pytest.mark.parametrize('eps', [0.,.1])
def test_reid_loss_oracle(n, eps):
    out,pid = batch(n)
    loss = ReIDLoss(label_smoothing=eps)
    ces,trs = [slow_ce(o, pid, eps) for o in out.logits],[slow_triplet(o, pid) for o in out.embeddings]
    assert loss(out, pid).item()==pytest.approx(sum(ces)+sum(trs), rel=1e-5)
    names = ['global','region1','region2'][:n]
    assert {k: v.item() for k,v in loss.parts.items()}==pytest.approx({f'{p}_{b}': v for p,vs in (('ce',ces),('triplet',trs)) for b,v in zip(names, vs)}, rel=1e-5)
    assert not any(v.requires_grad for v in loss.parts.values())

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half(dtype):
    "Half-precision numbers give the single-precision loss of the same numbers"
    out,pid = batch(dtype=dtype)
    single = ReIDOutput(*([o.detach().float() for o in l] for l in out))
    loss = ReIDLoss()(out, pid)
    assert loss.dtype==torch.float32
    torch.testing.assert_close(loss, ReIDLoss()(single, pid))
    loss.backward()
    assert all(o.grad.dtype==dtype and o.grad.isfinite().all() for l in out for o in l)

def test_autocast():
    "Autocast around the loss changes nothing"
    out,pid = batch()
    with torch.autocast('cpu', torch.bfloat16): inside = ReIDLoss()(out, pid)
    assert inside.dtype==torch.float32
    torch.testing.assert_close(inside, ReIDLoss()(out, pid))

@pytest.mark.parametrize('fill', [1., math.inf, math.nan])
@pytest.mark.parametrize('reduction', ['mean','none'])
def test_evaluation_is_zero(fill, reduction):
    emb = torch.full((6,4), fill, dtype=torch.float16, requires_grad=True)
    with pytest.warns(UserWarning, match='trains nothing'): loss = ReIDLoss(reduction=reduction)(emb, torch.arange(6)+10**6, torch.zeros(6))
    assert loss.tolist()==([0.]*6 if reduction=='none' else 0.)
    loss.sum().backward()
    assert (emb.grad==0).all()

def test_fastai_types():
    "Image and category tensors, which refuse to meet each other"
    out,pid = batch()
    typed = ReIDOutput(*([TensorImage(o.detach()) for o in l] for l in out))
    loss = ReIDLoss()(typed, TensorCategory(pid), TensorCategory(pid))
    assert type(loss) is torch.Tensor and loss.item()==pytest.approx(ReIDLoss()(out, pid).item())
    assert type(ReIDLoss()(TensorImage(torch.rand(6, 4)), TensorCategory(torch.arange(6)))) is torch.Tensor

def test_pickle():
    out,pid = batch()
    loss = ReIDLoss(label_smoothing=.2)
    want = loss(out, pid)
    assert pickle.loads(pickle.dumps(loss))(out, pid)==want

@pytest.mark.parametrize('eps', [-.1, 1., 1.5])
def test_bad_smoothing(eps):
    with pytest.raises(ValueError, match=f'label_smoothing={eps}'): ReIDLoss(label_smoothing=eps)

@pytest.mark.parametrize('margin', [None,0,-1.,float('nan')])
def test_semihard_margin(margin):
    with pytest.raises(ValueError, match='needs a margin'): MinedTriplet('semihard', margin)

def test_memory_of_one_branch():
    pid,loss = torch.arange(4).repeat_interleave(2),ReIDLoss(triplet=CrossBatchMemory(TripletMarginLoss(), 6))
    loss(([torch.rand(8, 6)], [torch.zeros(8, 4)]), pid)
    with pytest.raises(ValueError, match='CrossBatchMemory'): loss(([torch.rand(8, 6)]*2, [torch.zeros(8, 4)]*2), pid)
