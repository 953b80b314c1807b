"`reid_learner` and what depends on it being whole"
import json, os, pickle, re, socket, subprocess, sys, warnings
from dataclasses import replace

import numpy as np, pandas as pd, pytest, timm, torch
from fastai.basics import CrossEntropyLossFlat, load_learner
from fastai.callback.all import (Callback, CSVLogger, TerminateOnNaNCallback, CutMix, EarlyStoppingCallback, GradientAccumulation, MixUp, ReduceLROnPlateau, SaveModelCallback,
                                 ShortEpochCallback, ShowGraphCallback, TrackerCallback)
from fastai.data.transforms import Normalize
from fastai.interpret import ClassificationInterpretation, Interpretation
from PIL import Image
from torch import nn

from reid_fastai.callback.all import *
from reid_fastai.callback.evaluation import RetrievalMetrics, _blank, extract_features, search
from reid_fastai.data.all import *
from reid_fastai.export import load_model, save_model
from reid_fastai.interpret import *
from reid_fastai.learner import *
from reid_fastai.losses import ReIDLoss
from reid_fastai.models import build_reid_net, reid_splitter
from reid_fastai.published import find_recipe
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
    assert len(v)==3 and v[1]==100*learn.retrieval().mAP

def test_validate_before_any_fit(dls):
    "With the progress bar, which an earlier fit would have left behind"
    learn = tiny_learner(dls, cbs=AdaptiveL2())
    v = learn.validate()
    assert len(v)==3 and v[1]==100*learn.retrieval().mAP==100*learn.retrieval_metrics.results.mAP

def test_validate_accepts_no_other_loader(dls):
    learn = tiny_learner(dls)
    for kw in dict(ds_idx=0),dict(dl=dls.test_dl(dls.test_df)):
        with learn.no_bar(), pytest.raises(ValueError, match=r'^`validate` searches .*`search\(learn.embed\(dl\), df\)`'): learn.validate(**kw)
    with learn.no_bar():
        assert len(learn.get_preds(dl=dls.test_dl(dls.test_df[:3]))[0])==3 and len(learn.validate())==2, 'the learner is not left locked'

def test_results_are_kept_until_the_weights_change(dls, tmp_path):
    learn = tiny_learner(dls); learn.path = tmp_path
    learn.save('start')
    cb = fit(learn).retrieval_metrics
    res,n = cb.results,len(dls.test_df)
    with learn.no_bar(), learn.no_logging():
        learn.get_preds()
        learn.predict(dls.splits.root/dls.test_df.path[0])
        learn.lr_find(show_plot=False, num_it=2, suggest_funcs=None)
    assert res is cb.results is cb.current
    seen = []
    learn.retrieval = lambda *args: seen.append(args) or res
    learn.show_results(max_n=1, k=1)
    assert not seen
    learn.load('start')
    learn.show_results(max_n=1, k=1)
    assert seen and cb.current is None and cb.results is res

def test_without_mirror_images(dls):
    learn = tiny_learner(dls, flip=False)
    assert torch.equal(learn.embed(), learn.embed(flip=False)) and not torch.equal(learn.embed(), learn.embed(flip=True))
    assert fit(learn).recorder.values[0][1]==100*learn.retrieval().mAP==100*learn.retrieval(flip=False).mAP

def test_metrics_leave_with_their_callback(dls):
    "Their last values would be shown as those of later epochs"
    learn = fit(tiny_learner(dls)).remove_cb(RetrievalMetrics)
    assert fit(learn).recorder.metric_names==['epoch','train_loss','time']
    assert fit(learn.add_cb(RetrievalMetrics())).recorder.metric_names[2:4]==['mAP','rank1']

def test_short_epochs_show_their_metrics(dls):
    learn = fit(tiny_learner(dls), cbs=ShortEpochCallback(.5))
    loss,mAP,_ = learn.recorder.values[0]
    assert loss>0 and mAP==100*learn.retrieval_metrics.results.mAP

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

# ---- features are counted

class Mean(nn.Module):
    "Embeds an image as its mean colour"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return self.w*torch.as_tensor(x).as_subclass(torch.Tensor).mean((2,3))

class Stops:
    "A loader that gives `k` batches of those it has"
    def __init__(self, dl, k): self.dl,self.k,self.dataset = dl,k,dl.dataset
    def __len__(self): return len(self.dl)
    def __iter__(self):
        for _,b in zip(range(self.k), self.dl): yield b

class DistributedDL:
    "What fastai's does to the loader of the first of two processes"
    def __init__(self, dl): self.dl,self.dataset,self.n = dl,dl.dataset,dl.n
    def __len__(self): return -(-len(self.dl)//2)
    def __iter__(self): return iter(Stops(self.dl, len(self)))

def test_features_that_were_not_computed_are_never_averaged(dls):
    valid,n = dls.valid.new(bs=5),len(dls.test_df)
    whole = extract_features(Mean(), valid)
    for dl in (Stops(valid, 2), valid.new(drop_last=True, bs=n-1)):
        with pytest.raises(ValueError, match='rows of features came for'): extract_features(Mean(), dl)
    with pytest.raises(ValueError, match=f'10 rows of features came for {n} images'): search(whole[:10], dls.test_df)
    for dl in (dls.train, valid.new(shuffle=True), torch.utils.data.DataLoader(dls.valid_ds, shuffle=True)):
        with pytest.raises(ValueError, match='random order'): extract_features(Mean(), dl)
    with pytest.raises(ValueError, match="rows of split 'train', which would join the gallery"): search(whole, dls.test_df.assign(split=['train',*dls.test_df.split[1:]]))
    with pytest.raises(ValueError, match='no images'): extract_features(Mean(), [])
    assert torch.equal(extract_features(Mean(), list(valid)), whole), 'a loader that does not say how many it has'
    assert torch.equal(extract_features(Mean(), DistributedDL(valid)), whole)
    learn = tiny_learner(dls)
    learn.dls = dls.__class__(dls.train, Stops(valid, 1))
    learn.dls.test_df = dls.test_df
    with pytest.raises(ValueError, match='rows of features came for'): learn.retrieval()

def test_a_foreign_network_is_refused(dls):
    with pytest.raises(ValueError, match='is a Linear; a Re-ID learner needs a `ReIDNet`'): reid_learner(dls, nn.Linear(2, 2))
    net = tiny_learner(dls).model
    for wrapped in torch.compile(net, backend='eager'),nn.DataParallel(net): assert reid_learner(dls, wrapped).model is wrapped

def test_unwrapped_in_the_learner(dls, tmp_path):
    "A compiled learner is trained, evaluated and saved as the model inside"
    learn = tiny_learner(dls, cbs=AdaptiveL2())
    bare = learn.model
    learn.model = nn.DataParallel(torch.compile(bare, backend='eager'))
    fit(learn)
    assert [len(g) for g in learn.splitter(learn.model)]==[len(g) for g in learn.splitter(bare)]
    assert (bare.l2_theta<0).any() and all('_orig_mod' not in n and 'module.' not in n for n in learn.adaptive_l2.history.name)
    back = load_model(save_model(learn.model, tmp_path/'m.safetensors', (64,32)))
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad(): assert torch.allclose(back(x), bare.eval()(x), atol=1e-6)
    learn.plot_activations(n=2)

_ddp = """
import json, os, sys, types, torch
try: import accelerate
except ImportError:  # what fastai uses of it
    class Accelerator:
        def __init__(self, cpu=False): pass
        def prepare(self, m): return torch.nn.parallel.DistributedDataParallel(m)
        def backward(self, loss): loss.backward()
    sys.modules['accelerate'] = types.SimpleNamespace(Accelerator=Accelerator)
import fastai.distributed as fd
from reid_fastai.test_utils import *
rank = int(os.environ['RANK'])
torch.distributed.init_process_group('gloo')
def broadcast(self, t, r):  # fastai's own asks for a GPU
    t = torch.tensor(t); torch.distributed.broadcast(t, r); return t.tolist()
fd.DistributedDL._broadcast = broadcast
learn = tiny_learner(tiny_dls(steps=2), eval_every=1)
with learn.no_bar(), learn.no_logging(), learn.added_cbs(fd.DistributedTrainer(sync_bn=False, cpu=True)): learn.fit(1, 1e-3)
json.dump([learn.recorder.values[-1][-2], 100*learn.retrieval().mAP, learn.retrieval_metrics.results.n_skipped], open(f'{sys.argv[1]}/{rank}.json', 'w'))
torch.distributed.destroy_process_group()
"""
def test_fastais_distributed_trainer(tmp_path):
    "Each of two processes evaluates all images: both have the figure of the saved network in the table"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', OMP_NUM_THREADS='1')
    ps = [subprocess.Popen([sys.executable, '-c', _ddp, str(tmp_path)], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), stderr=subprocess.PIPE) for r in (0,1)]
    errs = [p.communicate(timeout=200)[1].decode()[-2000:] for p in ps]
    assert [p.returncode for p in ps]==[0,0], errs
    a,b = [json.loads((tmp_path/f'{r}.json').read_text()) for r in (0,1)]
    assert a[0]==pytest.approx(b[0]) and a[0]==pytest.approx(a[1])

# ---- refused before training

def test_fastais_method_is_refused(dls):
    learn = tiny_learner(dls)
    with pytest.raises(ValueError, match='`with learn.distrib_ctx\\(\\):`'): learn.to_distributed(sync_bn=False)
    assert not hasattr(learn, 'distributed_trainer')

class Sync(Callback):
    "What `distrib_ctx` does to the network, without other processes"
    order = 11
    def __init__(self, sync_bn=True): self.sync_bn = sync_bn
    def before_fit(self):
        if self.sync_bn: self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

def lite(dls): return reid_learner(dls, 'tf_efficientnet_lite0', regions=0, pretrained=False)

def test_lost_activations_are_refused(dls):
    learn = lite(dls)
    for f in (lambda: fit(learn, cbs=Sync()), lambda: learn.add_cb(Sync()).validate()):
        with pytest.raises(ValueError, match=r"^PyTorch's SyncBatchNorm drops .* norms of the network .*timm.layers.convert_sync_batchnorm\(learn.model\).*`sync_bn=False`"): f()
    learn.remove_cb(Sync)
    assert not any(type(m) is nn.SyncBatchNorm for m in learn.model.modules()), 'refused before the network was changed'
    learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    with pytest.raises(ValueError, match='drops the activations'): fit(learn)
    fit(tiny_learner(dls, cbs=Sync(False)))

def test_norms_that_keep_their_activations_are_not_refused(dls):
    x = torch.rand(2, 3, 64, 32)
    net = lite(dls).model.eval()
    with torch.no_grad(): before = net(x)
    net = timm.layers.convert_sync_batchnorm(net)
    check_norms(net)
    check_norms(tiny_learner(dls).model, sync_bn=True)  # plain norms, activations beside them
    with torch.no_grad(): assert torch.allclose(net(x), before, atol=1e-5)

@pytest.mark.parametrize('cb', [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau, TrackerCallback])
def test_monitors(dls, cb, tmp_path):
    learn = tiny_learner(dls); learn.path = tmp_path
    for f in (lambda: fit(learn, 2, 'fit', 1e-3, cbs=cb()), lambda: learn.add_cb(cb()).lr_find(show_plot=False, num_it=2)):
        with pytest.raises(ValueError, match=f"^{cb.__name__} monitors 'valid_loss'.*eval_every=1"): f()
    learn.remove_cb(cb)
    for every,words in ((None,'only after the last'), (2,'every 2 epochs')):
        learn.retrieval_metrics.every = every
        with pytest.raises(ValueError, match=f"^{cb.__name__} monitors 'mAP'.*{words}.*`eval_every=1`"): fit(learn, 3, 'fit', 1e-3, cbs=cb(monitor='mAP'))
    assert len(fit(learn, 1, 'fit', 1e-3, cbs=cb(monitor='mAP')).recorder.values)==1  # one epoch is the last
    learn.retrieval_metrics.every = 1
    assert len(fit(learn, 2, 'fit', 1e-3, cbs=cb(monitor='mAP')).recorder.values)==2

def test_monitors_that_do_not_compare(dls, tmp_path):
    learn = tiny_learner(dls); learn.path = tmp_path
    fit(learn, 2, 'fit', 1e-3, cbs=SaveModelCallback(monitor='mAP', every_epoch=True))
    fit(learn, 2, 'fit', 1e-3, cbs=SaveModelCallback(monitor='train_loss'))
    assert len(list((tmp_path/'models').iterdir()))==3

def test_validation_with_a_monitor(dls, tmp_path):
    learn = tiny_learner(dls, cbs=EarlyStoppingCallback(monitor='mAP', patience=9)); learn.path = tmp_path
    with learn.no_bar():
        assert learn.validate()[1]>0
        learn.add_cb(SaveModelCallback())
        for _ in range(2):
            with pytest.raises(ValueError, match="^SaveModelCallback monitors 'valid_loss'"): learn.validate()

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_mixed_images_are_refused(dls, cb):
    with pytest.raises(ValueError, match=f'^{cb.__name__} mixes pairs.*`reid_augs`'): fit(tiny_learner(dls, cbs=cb()))

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), lambda out, pid: 0.])
def test_losses_of_one_target_are_refused(dls, loss):
    with pytest.raises(ValueError, match=r'^loss_func=.*called with \(output, pid, camid\)'): fit(tiny_learner(dls, loss_func=loss))

def own_loss(out, pid, camid):
    embs,logits = out
    return sum(o.float().mean() for o in logits)

@pytest.mark.parametrize('loss', [own_loss, ReIDLoss()])
def test_predictions_need_no_loss(dls, loss):
    learn = fit(tiny_learner(dls, loss_func=loss))
    with learn.no_bar(): assert len(learn.get_preds(cbs=TerminateOnNaNCallback())[0])==len(learn.get_preds(with_loss=True)[2])==len(dls.test_df)
    assert learn.loss_func is loss

def test_normalised_images_are_refused(dls):
    twice = tiny_learner(tiny_dls(batch_tfms=[Normalize.from_stats([.5]*3, [.2]*3)]))
    with pytest.raises(ValueError, match='^`batch_tfms` has `Normalize`'): fit(twice)
    twice.model.mean.zero_()
    twice.model.std.fill_(1.)
    fit(twice)  # a network that leaves it to the loaders

def test_summary_before_any_fit(dls):
    for learn in (tiny_learner(dls, cbs=AdaptiveL2()), tiny_learner(dls)):
        assert 'Conv2d' in learn.summary() and learn.opt is None

def test_another_network_needs_another_optimizer(dls):
    learn = fit(tiny_learner(dls, cbs=AdaptiveL2()))
    learn.model = tiny_learner(dls).model
    with learn.no_bar(): assert len(learn.validate())==3
    for _ in range(2):
        with pytest.raises(ValueError, match='^The optimizer has .* none of the .*`learn.create_opt\\(\\)`'): fit(learn)
    learn.create_opt()
    assert (fit(learn).model.l2_theta<0).all()

def test_loaders_with_other_identities_are_refused(dls):
    learn = fit(tiny_learner(dls))
    other = tiny_dls(); other.c = dls.c+1
    learn.dls = other
    with learn.no_bar(): learn.validate()
    with pytest.raises(ValueError, match=f'^The network has {dls.c} classes, but the loaders have {dls.c+1} training identities'): fit(learn)

class Scaled(ReIDLoss):
    "A loss with a trainable parameter"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, *args): return self.scale*super().forward(*args)

def test_untrained_parameters_of_the_loss_are_named(dls, recwarn):
    loss = Scaled()
    with pytest.warns(UserWarning, match='^Scaled has 1 trainable parameter arrays .*`splitter=lambda m: '): fit(tiny_learner(dls, loss_func=loss))
    recwarn.clear()
    fit(tiny_learner(dls, loss_func=loss, splitter=lambda m: [(g := reid_splitter(m))[0], [*g[1], *loss.parameters()]]))
    assert loss.scale!=1 and not [o for o in recwarn if 'keep their values' in str(o.message)]

@pytest.mark.parametrize('cls', [Interpretation, ClassificationInterpretation])
def test_interpretation(dls, cls):
    learn = tiny_learner(dls)
    for _ in range(2):
        with pytest.raises(ValueError, match=r'^Interpretation sorts .*show_results\(worst=True\)'): cls.from_learner(learn)
    with learn.no_bar(): assert len(learn.get_preds()[0])==len(dls.test_df), 'the learner is not left locked'

def test_no_test_set_is_found_before_training(dls):
    learn = tiny_learner(dls)
    learn.dls = type('Loaders', (dls.__class__,), {})(dls.train, dls.valid)
    class Batch(Callback):
        def before_batch(self): pytest.fail('began to train')
    with pytest.raises(ValueError, match='^These loaders have no queries'): fit(learn, 1, 'fit', 1e-3, cbs=Batch())

def test_errors_of_the_network_are_plain(dls):
    "Met in the evaluation, in the forward pass of training, or within a callback of fastai's"
    learn = tiny_learner(dls)
    def fail(*_): raise ValueError('A map of 1×1 cannot be cut.')
    learn.model.register_forward_pre_hook(lambda m,_: None if m.training else fail())
    class Theirs(Callback): after_batch = fail
    for f in (lambda: fit(learn), lambda: learn.validate(), lambda: fit(tiny_learner(dls, cbs=Theirs()))):
        with pytest.raises(ValueError, match='^A map of 1×1'): f()

# ---- the table

def test_cells_without_evaluation_are_empty(dls, tmp_path, capsys):
    learn = tiny_learner(dls, cbs=[CSVLogger(), ShowGraphCallback()]); learn.path = tmp_path
    learn.fit(2, 1e-3)
    text,rows = capsys.readouterr().out,(tmp_path/'history.csv').read_text().splitlines()
    assert 'nan' not in text and 'nan' not in str(rows)
    assert rows[1].split(',')[2:4]==['',''] and float(rows[2].split(',')[2])==pytest.approx(100*learn.retrieval_metrics.results.mAP)
    assert pd.read_csv(tmp_path/'history.csv').mAP.isna().tolist()==[True,False]
    learn.recorder.plot_loss(with_valid=False)

def test_an_empty_cell_is_a_number():
    for o in (_blank, pickle.loads(pickle.dumps(_blank))): assert np.isnan(o) and f'{o:.6f}'==str(o)=='' and not o>1
    assert json.dumps([_blank])=='[NaN]' and np.isnan(np.array([_blank, 1.])).tolist()==[True,False] and repr(pd.Series([_blank])[0])

# ---- pictures

def test_pictures_of_the_learner(dls, tmp_path):
    import matplotlib; matplotlib.use('agg')
    learn = tiny_learner(dls); learn.path = tmp_path
    n = len(dls.test_df)
    assert learn.show_results(max_n=2, k=3).shape==(2,4) and learn.show_results(worst=True, max_n=2, k=3).shape==(2,4)
    assert learn.show_results(queries=[0], k=10*n).shape[1]<=n+1
    learn.model.train()
    assert learn.plot_activations(dls.splits.root/dls.test_df.path[0]).shape==(2,1) and learn.model.training
    assert learn.plot_activations(Image.open(dls.splits.root/dls.test_df.path[0])).shape==(2,1)
    for f in (lambda: learn.plot_activations([]), lambda: learn.plot_activations(n=0)):
        with pytest.raises(ValueError, match='No images to draw'): f()
    with pytest.raises(ValueError, match='n=0'): learn.show_results(max_n=0)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    for f in (loaded.show_results, loaded.plot_activations):
        with pytest.raises(ValueError, match='no queries and gallery'): f()

def test_pictures_without_cameras(tmp_path):
    splits = tiny_dls().splits
    df = splits.df.drop(columns='camid')
    dls = ReIDDataLoaders.from_df(df, splits.root, size=(64,32), n_pids=4, steps=1, device='cpu')
    axs = tiny_learner(dls).show_results(max_n=1, k=2)
    assert 'cam' not in axs[0,0].get_title()

def test_pictures_have_names_of_people_and_cameras():
    splits = tiny_dls().splits
    df = splits.df.assign(pid='P'+splits.df.pid.astype(str), camid='door '+splits.df.camid.astype(str))
    dls = ReIDDataLoaders.from_df(df, splits.root, size=(64,32), n_pids=4, steps=1, device='cpu')
    query = dls.splits.query.iloc[0]
    assert splits.pid_names==splits.camid_names=={} and set(dls.splits.camid_names.values())==set(df.camid)
    for worst in (False,True):
        title = tiny_learner(dls).show_results(max_n=1, k=2, worst=worst)[0,0].get_title()
        assert re.fullmatch(r'query \d+\nP\d+\ndoor \d', title), title
    assert tiny_learner(dls).show_results(queries=0, k=2)[0,0].get_title()==f'query 0\n{dls.splits.pid_names[query.pid]}\n{dls.splits.camid_names[query.camid]}'

def test_pictures_of_named_cameras():
    from reid_fastai.evaluation.metrics import RetrievalResults
    res = RetrievalResults.from_embeddings(np.eye(2), ['a','b'], ['x','x'], np.eye(2), ['a','b'], ['y','y'])
    im = [np.zeros((8,4,3), np.uint8)]*2
    assert plot_ranked(res, im, im, k=9)[0,0].get_title().endswith('id a\ncam x')

def test_skipped_epochs_are_neither_compared_nor_saved(tmp_path):
    "The second phase of a published recipe skips the epochs of the first"
    saved = []
    class Save(SaveModelCallback):
        def _save(self, name): saved.append(name)
    recipe = replace(find_recipe('osnet_x1_0'), epochs=2, frozen_epochs=1)
    learn = tiny_learner(tiny_dls(steps=1), eval_every=1, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_published(recipe, cbs=[Save('mAP', every_epoch=True), stop := EarlyStoppingCallback('mAP', patience=9)])
    assert saved==['model_0','model_1'] and stop.best>0 and stop.run
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, start_epoch=2, cbs=SaveModelCallback('mAP', fname='none'))

def test_maps_of_a_compiled_network():
    net,x = build_reid_net('resnet10t', 5, regions=0, pretrained=False).eval(),torch.rand(2, 3, 64, 32)
    want = activation_maps(net, x)
    net.compile(backend='eager')
    with torch.no_grad(): net(x)
    assert torch.equal(activation_maps(net, x), want)

def test_grey_images():
    grey = np.arange(8, dtype=np.uint8).reshape(4, 2)
    want = np.stack([grey]*3, 2)
    for o in grey,grey[...,None],torch.tensor(grey)[None],Image.fromarray(grey): assert np.array_equal(as_image(o), want)

def test_the_graph_has_no_validation_loss(dls, tmp_path):
    "fastai draws the second column of the table as validation loss, which would be the penalty or mAP"
    learn,drawn = tiny_learner(dls, cbs=[AdaptiveL2(), ShowGraphCallback()], eval_every=1),[]
    class Spy(Callback):
        def before_train(self): self.progress.mbar.update_graph = lambda graphs, x, y: drawn.append(([[*map(float, o)] for _,o in graphs], x, y))
    learn.fit(2, 1e-3, cbs=Spy())
    n,losses = len(dls.train),[float(o) for o in learn.recorder.losses]
    assert drawn==[([losses[:n]], (0, 2*n), (0, max(losses[:n]))), ([losses], (0, 2*n), (0, max(losses)))]
    learn.path = tmp_path
    learn.export('graph.pkl')

@pytest.mark.parametrize('sizes', [dict(n_imgs=1), dict(n_pids=1)])
def test_batches_without_a_triplet(sizes):
    learn = tiny_learner(tiny_dls(**sizes))
    with pytest.warns(UserWarning, match='triplet loss is 0'): learn.fit(1, 1e-3)
    assert learn.loss_func.parts['triplet_global']==0
    learn.loss_func = ReIDLoss(triplet=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, 1e-3)
