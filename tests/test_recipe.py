"The paper's recipe: its schedule at every epoch, its two phases, and a run through all of it"
import json

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, Learner, first, set_seed
from torch import nn

from reid_fastai.callback.regularizer import AdaptiveL2
from reid_fastai.data.block import ReIDDataLoaders
from reid_fastai.data.datasets import read_dataset
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.learner import paper_adam, reid_learner
from reid_fastai.config import RunConfig, recipes
from reid_fastai.published import find_recipe
from reid_fastai.run_setup import fit_run
from reid_fastai.runs import train_run
from reid_fastai.schedules import *
import reid_fastai.run_setup as run_setup
import reid_fastai.runs as runs

class Watch(Callback):
    "What each epoch of training looked like"
    order = 70
    def __init__(self): self.rows = []
    def after_train(self):
        self.rows.append(dict(lr={h['lr'] for h in self.opt.hypers}, trains={n: p.requires_grad for n,p in self.model.named_parameters()}))

def test_learning_rate_of_every_epoch():
    "Against the numbers of the recipe, written out"
    climb = np.linspace(2e-6, 2e-4, 10).tolist()
    first = climb + [2e-4]*10
    second = climb + [2e-4]*30 + [2e-5]*30 + [2e-6]*130
    np.testing.assert_allclose([warmup_steps(e) for e in range(paper_frozen_epochs)], first)
    np.testing.assert_allclose([warmup_steps(e) for e in range(paper_epochs)], second)

def test_both_phases_follow_it(tmp_path):
    "In a Learner, over all 220 epochs; the second phase starts again"
    from fastai.data.core import DataLoaders
    from torch.utils.data import TensorDataset, DataLoader
    dl = DataLoader(TensorDataset(torch.randn(2,3), torch.randn(2,1)), 2)
    watch = Watch()
    learn = Learner(DataLoaders(dl, dl), nn.Sequential(nn.Linear(3,3), nn.Linear(3,1)), nn.MSELoss(), opt_func=paper_adam, cbs=[AdaptiveL2(), watch],
                    splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())])
    with learn.no_bar(), learn.no_logging(): learn.fit_paper()
    lrs = [one for o in watch.rows for one in o['lr']]
    assert len(watch.rows)==220 and lrs==[warmup_steps(e) for n in (20,200) for e in range(n)]
    assert [o['trains']['0.weight'] for o in watch.rows]==[False]*20+[True]*200 and all(o['trains']['1.weight'] for o in watch.rows)
    theta = learn.adaptive_l2.history.pivot(index='epoch', columns='name', values='theta')
    assert len(theta)==221 and (theta.loc[:20, ['0.weight','0.bias']]==0).all(axis=None) and (theta.loc[20, ['1.weight','1.bias']]<0).all()

@pytest.fixture(scope='module')
def splits(): return read_dataset(make_synthetic(tiny=True))

def test_frozen_is_frozen_entirely(splits):
    "Weights, running statistics and batch norms of the backbone stay as they are; necks, classifiers and region convolutions train"
    set_seed(0)
    dls = ReIDDataLoaders.from_splits(splits, size=(64,32), n_pids=4, n_imgs=4, steps=2, device='cpu')
    learn = reid_learner(dls, 'test_resnet', pretrained=False, cbs=AdaptiveL2(), train_bn=True)
    groups = [{id(p) for p in g} for g in learn.splitter(learn.model)]
    snap = lambda: {n: t.clone() for n,t in learn.model.state_dict().items()}
    at = {0: snap()}
    class Snap(Callback):
        def after_train(self): at[len(at)] = snap()
    with learn.no_bar(), learn.no_logging(): learn.fit_paper(1, 1, lr=1e-2, cbs=Snap())
    back = [n for n,p in learn.model.named_parameters() if id(p) in groups[0]]
    prefixes = {n.split('.')[0] for n in back}
    stats = [n for n in at[0] if n.split('.')[0] in prefixes and 'running' in n]
    assert stats and all(torch.equal(at[0][n], at[1][n]) for n in back+stats)
    assert all(not torch.equal(at[1][n], at[2][n]) for n in stats)
    head = [n for n,p in learn.model.named_parameters() if id(p) in groups[-1] and 'theta' not in n]
    assert {n.split('.')[-1] for n in head}=={'weight','bias'} and all(not torch.equal(at[0][n], at[1][n]) for n in head)

def test_constants():
    "Each has one home; this is what they have to be"
    cfg = RunConfig(recipe='paper')
    assert {k: getattr(cfg, k) for k in ('arch','regions','size','n_pids','n_imgs','steps','frozen_epochs','epochs','lr','l2','amplitude','flip')}==dict(
        arch='resnet50', regions=2, size=[384,128], n_pids=16, n_imgs=4, steps=200, frozen_epochs=20, epochs=200, lr=2e-4, l2='adaptive', amplitude=5e-3, flip=True)
    assert paper_adam.keywords==dict(mom=.9, sqr_mom=.999, eps=1e-7, wd=0.)
    assert set(recipes)=={'quick','laptop','paper','published'}

paper_args = dict(recipe='paper', arch='resnet14t', pretrained='none', size='64x32', n_pids=2, n_imgs=2, frozen_epochs=1, epochs=2, steps=2)

def test_a_run_passes_through_every_phase(splits, tmp_path):
    "A smaller ResNet of bottlenecks with its replicated stage and regional branch, random weights, few steps"
    res = train_run(out := tmp_path/'r', splits, RunConfig(splits.root, **paper_args))
    table = pd.read_csv(out/'metrics.csv')
    assert len(table)==3 and table.train_loss.notna().all() and table.mAP.notna().tolist()==[True,False,True]  # at the end of each phase
    lam = pd.read_csv(out/'lambdas.csv')
    assert lam.epoch.max()==3 and lam.name.nunique()==res['arrays']==28+2+26+26  # kernels, biases, gammas, betas: 19 convolutions, 4 of them twice, 2 of the regions, 3 classifiers and necks
    frozen = lam[(lam.epoch==1) & lam.name.str.startswith('trunk')]
    assert len(frozen) and (frozen.theta==0).all() and (lam[(lam.epoch==3) & lam.name.isin(frozen.name)].theta<0).any()
    cfg = json.loads((out/'config.json').read_text())
    assert 'Measured after epoch 3 of 3' in (out/'summary.md').read_text() and cfg['recipe']=='paper'

small_args = {**paper_args, 'arch': 'test_resnet'}

@pytest.fixture(scope='module')
def whole(splits, tmp_path_factory):
    out = tmp_path_factory.mktemp('paper')/'whole'
    return out, train_run(out, splits, RunConfig(splits.root, **small_args))

@pytest.mark.parametrize('stop', [1, 2])
def test_it_goes_on_in_either_phase(whole, splits, stop, tmp_path, monkeypatch):
    "Interrupted at the start of the second phase or in its middle; the last digit is the same"
    class Fails(Callback):
        seen = 0
        def before_train(self):
            Fails.seen += 1
            if Fails.seen==stop+1: raise KeyboardInterrupt
    def interrupted(learn, *args):
        with learn.added_cbs(Fails()): fit_run(learn, *args)
    cfg = RunConfig(splits.root, **small_args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs, 'fit_run', interrupted)
        train_run(tmp_path/'r', splits, cfg)
    assert len(pd.read_csv(tmp_path/'r'/'metrics.csv'))==stop
    res = train_run(tmp_path/'r', splits, cfg)
    assert {k:v for k,v in res.items() if 'second' not in k}=={k:v for k,v in whole[1].items() if 'second' not in k}
    for f in ('lambdas.csv','model.safetensors'): assert (tmp_path/'r'/f).read_bytes()==(whole[0]/f).read_bytes()

@pytest.mark.parametrize('arch,opts', [('osnet_x0_25', dict(n_pids=4, n_imgs=2, l2='conventional', factor=2.5e-4, lr=1.5e-3)), ('bat_net', dict(lr=5e-4, factor=5e-5))])
def test_published_recipe_is_the_default_of_its_network(arch, opts):
    "An option given beside it takes precedence; the rest is the network's"
    given = {k: opts[k] for k in ('n_pids','n_imgs') if k in opts}
    cfg,r = RunConfig(recipe='published', arch=arch, **given),find_recipe(arch)
    assert {k: getattr(cfg, k) for k in opts}==opts and cfg.epochs==r.epochs and cfg.size==list(r.size)
    if not given: assert cfg.n_pids*cfg.n_imgs==r.batch
    with pytest.raises(ValueError, match='no published recipe'): RunConfig(recipe='published', arch='resnet18')

@pytest.mark.parametrize('opts,done', [(dict(recipe='published', arch='osnet_x0_25', n_imgs=2, l2='adaptive'), 2), (dict(recipe='laptop', arch='test_resnet', size='64x64', first_size='32x32', drop_path=.3), 2), (paper_args, 1)])
def test_a_run_goes_on_to_the_same_digits(opts, done, tmp_path, interrupted):
    "AMSGrad's largest moments, the schedule, the size of the images and the mean loss are those of a run without interruption, also at the end of a phase"
    splits = read_dataset(make_synthetic(tiny=True))
    cfg = RunConfig(splits.root, **dict(pretrained='none', n_pids=4, epochs=3, steps=2, size='64x32') | opts)
    train_run(tmp_path/'whole', splits, cfg)
    interrupted(tmp_path/'cut', splits, cfg, done)
    train_run(tmp_path/'cut', splits, cfg)
    a,b = (pd.read_csv(tmp_path/o/'metrics.csv').drop(columns='seconds') for o in ('whole','cut'))
    assert a.equals(b)
    for f in ('lambdas.csv','model.safetensors'): assert (tmp_path/'whole'/f).read_bytes()==(tmp_path/'cut'/f).read_bytes()

def test_erasing_after_an_interrupted_fit():
    "`after_fit` does not follow an interruption"
    from reid_fastai.data.augment import EraseEach
    from reid_fastai.published import ErasingFrom
    from reid_fastai.test_utils import tiny_learner
    class Stop(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn = tiny_learner()
    erase = first(o for o in learn.dls.train.after_batch.fs if isinstance(o, EraseEach))
    p = erase.p
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-3, cbs=[ErasingFrom(1), Stop()])
    assert erase.p==p>0
    learn.add_cb(ErasingFrom(1))  # one that stays
    for i in range(2):
        with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-3, cbs=Stop())
    learn.remove_cb(ErasingFrom)
    assert erase.p==p

def test_copies_of_options(splits):
    cfg = RunConfig(recipe='laptop')
    assert cfg.but(val_pids=.1).eval_every==1 and cfg.but(val_pids=.1).but(val_pids=0.).eval_every is None and cfg.but(eval_every=2).but(val_pids=.1).eval_every==2
    assert cfg.but(epochs=10).first_epochs==6 and cfg.but(first_epochs=21).but(epochs=40).first_epochs==21 and cfg.but(seed=1).first_epochs==cfg.first_epochs
    small = RunConfig(recipe='laptop', size='128x64', arch='test_resnet', pretrained='none', n_pids=4)
    with pytest.raises(ValueError, match='first_size=128x64: it must be smaller than size'): run_setup.check_run(splits, small)
    with pytest.raises(ValueError, match='recipe=paper: these options have the defaults of recipe=laptop'): cfg.but(recipe='paper')

def test_one_epoch_has_one_size():
    with pytest.raises(ValueError, match='epochs=1: progressive resizing needs at least 2'): RunConfig(recipe='laptop', epochs=1)
    with pytest.raises(ValueError, match='epochs=ten: it must be a whole number'): RunConfig(recipe='laptop', epochs='ten')

def test_laptop_recipe(splits):
    "Another regulariser does not take over a strength; small images end before the last epoch; a network of one size is refused"
    cfg = RunConfig(recipe='laptop')
    assert (cfg.l2,cfg.strength,cfg.first_size,cfg.first_epochs,cfg.size)==('auto', None, [128,64], 20, [256,128])
    assert cfg.but(strength=.1).but(l2='decoupled').strength is None and cfg.but(strength=.1).but(seed=1).strength==.1
    assert RunConfig(recipe='laptop', epochs=2).first_epochs==1
    assert RunConfig().first_size is None and RunConfig().first_epochs is None
    with pytest.raises(ValueError, match='built for 256×128'): run_setup.check_run(splits, RunConfig(recipe='laptop', arch='rga_sc_resnet50', pretrained='none', n_pids=4))

def test_size_of_the_loaders_is_not_smaller():
    from reid_fastai.test_utils import tiny_dls, tiny_learner
    learn = tiny_learner(tiny_dls())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='it must be smaller than size'): learn.fit_progressive(2, 1e-3, learn.dls.size, 1)

def test_first_epochs_see_small_images():
    "Whole images shrunk, with shifts of the same share; what evaluation sees keeps its size"
    from reid_fastai.callback.resize import ProgressiveResize, shrink
    from reid_fastai.test_utils import tiny_dls, tiny_learner
    class Seen(Callback):
        order = 90
        def __init__(self): self.x = {}
        def before_batch(self): self.x.setdefault((self.epoch, self.training), []).append(self.x_())
        def x_(self): return self.learn.x.as_subclass(torch.Tensor).clone()
    xs,evaluated = [],set()
    def note(m, args):
        if not m.training and len(args[0])>1: evaluated.add(tuple(args[0].shape[-2:]))  # a single image tests the network
    for cbs in ([], [ProgressiveResize((32,16), 1)]):
        learn,seen = tiny_learner(tiny_dls(batch_tfms=[]), cbs=[], eval_every=1),Seen()
        learn.model.register_forward_pre_hook(note)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 0., cbs=[seen, *cbs])
        xs.append(seen.x)
    full,small = xs
    for a,b in zip(full[0,True], small[0,True], strict=True):
        assert b.shape[-2:]==(32,16) and (shrink(a, (32,16))-b).abs().max()<=1/255
    assert all(torch.equal(a, b) for a,b in zip(full[1,True], small[1,True], strict=True)) and evaluated=={(64,32)}
