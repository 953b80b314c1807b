"`reid_learner` and what depends on it being whole"
import warnings

import pandas as pd, pytest, torch
from fastai.basics import load_learner
from fastai.callback.all import GradientAccumulation

from reid_fastai.callback.all import *
from reid_fastai.data.all import *
from reid_fastai.learner import *
from reid_fastai.test_utils import *

@pytest.fixture(scope='module')
def dls(): return tiny_dls()

def fit(learn, n=1, f='fit_one_cycle', *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(n, *args, **kw)
    return learn

def test_recipe_of_the_optimizer(dls):
    learn = tiny_learner(dls, cbs=AdaptiveL2())
    learn.create_opt()
    for h in learn.opt.hypers: assert (h['mom'],h['sqr_mom'],h['eps'],h['wd'])==(.9,.999,1e-7,0)
    assert len(learn.opt.hypers)==2

def test_small_arrays_learn_too(dls):
    "With fastai's eps of 1e-5 the θ of an array with a small norm would hardly move"
    learn = fit(tiny_learner(dls, cbs=AdaptiveL2()), 1, 'fit', 1e-3)
    h = learn.adaptive_l2.history
    small = h.name[(h.epoch==0)&(h.sq_norm>1e-3)&(h.sq_norm<1)]
    assert len(small) and (h[(h.epoch==1)&h.name.isin(small)].theta < -.5*len(dls.train)*1e-3).all()

def test_freeze_keeps_the_backbone_alone(dls):
    learn = tiny_learner(dls, cbs=AdaptiveL2(), regions=2, train_bn=False)
    learn.freeze()
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    fit(learn, 1, 'fit', 1e-2)
    moved = {n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.split('.')[0] in ('region_convs','heads','l2_theta') for n in moved)

def test_evaluated_once_by_default_and_each_time_on_request(dls):
    mAP = [v[2] for v in fit(tiny_learner(dls, cbs=AdaptiveL2()), 3).recorder.values]
    assert [v!=v for v in mAP]==[True,True,False]
    mAP = [v[1] for v in fit(tiny_learner(dls, eval_every=1), 2).recorder.values]
    assert all(v==v for v in mAP)

def test_evaluation_does_not_change_training():
    a,b = (fit(tiny_learner(tiny_dls(), eval_every=o), 2, 'fit', 1e-3) for o in (None, 1))
    for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(x, y)

def test_accumulation_and_validate(dls):
    learn = fit(tiny_learner(dls, cbs=[AdaptiveL2(), GradientAccumulation(32)]))
    with learn.no_bar(): v = learn.validate()
    assert len(v)==3 and v[1]==learn.retrieval().mAP

def test_validate_before_any_fit(dls):
    "With the progress bar, which an earlier fit would have left behind"
    learn = tiny_learner(dls, cbs=AdaptiveL2())
    v = learn.validate()
    assert len(v)==3 and v[1]==learn.retrieval().mAP==learn.retrieval_metrics.results.mAP

def test_export_embeds_the_same(dls, tmp_path):
    learn = tiny_learner(dls, cbs=AdaptiveL2()); learn.path = tmp_path
    fit(learn)
    feats = learn.embed()
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    files = [dls.splits.root/o for o in dls.test_df.path]
    assert torch.allclose(loaded.embed(loaded.dls.test_dl(files)), feats, atol=1e-6)

def test_loaders_without_identities_are_refused():
    with pytest.raises(ValueError, match='ReIDDataLoaders'): reid_learner(object(), 'resnet10t')
