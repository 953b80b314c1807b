"""Which change of a recipe is worth having: trainings that differ in one thing, on held-out training identities.

    python benchmarks/recipe.py DATA --out FILE.csv [--changes base gem circle …] [--seeds 1] [--set epochs=5 steps=200 l2=auto precision=bf16 …]

A fifth of the training identities is held out, as queries and gallery, the same for all seeds; half of the images of the others join the gallery as distractors and are not trained on. The test set is not used.
Every training is evaluated twice: with its embeddings, and with the embeddings after the neck (BatchNorm), which the classifier gets.
A row is added to FILE.csv after each training. Trainings that have a row are not repeated, so the command can be interrupted and given again.
"""
import time
from inspect import signature

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.torch_core import TensorImage
from fastai.vision.augment import Brightness, Contrast, Saturation
from pytorch_metric_learning.losses import CircleLoss, MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from timm.utils import ModelEmaV3
from torch import nn

from options import chosen, parser, setting, start
from rows import Rows
from reid_fastai.comparison_results import markdown_table
from reid_fastai.config import RIVALS, RunConfig
from reid_fastai.core import keep_freed_memory
from reid_fastai.callback.evaluation import search
from reid_fastai.callback.regularizer import L2Callback
from reid_fastai.data.augment import EraseEach
from reid_fastai.data.holdout import hold_out
from reid_fastai.losses import ReIDLoss
from reid_fastai.models import ObjectiveHead, at_least_float32, global_average, methods
from reid_fastai.regularizers import THETA
from reid_fastai.results import result_figures
from reid_fastai.run_setup import build_net, fit_run, load_splits, make_learner

class GeMHead(ObjectiveHead):
    "Generalised mean over space, with exponent 3"
    def embed(self, fmap): return global_average(at_least_float32(fmap).clamp(1e-6)**3).pow(1/3).clamp(0, 1)

class PatchEach(EraseEach):
    "Cover a rectangle of an image with the same part of another image of the batch"
    def __init__(self): super().__init__(fill=0.)
    def encodes(self, x:TensorImage):
        part = super().encodes(torch.ones_like(x))
        return torch.where(part==0, x.roll(len(x)//2, 0), x)

class Averaged(Callback):
    "Evaluate the exponential moving average of the weights"
    def __init__(self, decay): self.decay = decay
    def before_fit(self): self.ema = ModelEmaV3(self.learn.model, decay=self.decay)
    def after_batch(self):
        if self.training: self.ema.update(self.learn.model)
    def after_fit(self): self.learn.model.load_state_dict(self.ema.module.state_dict())

def gem(learn): learn.model.heads[0].__class__ = GeMHead
def strips(n):
    def change(learn):
        net,whole,l2 = learn.model,learn.model.maps,learn.cbs.filter(lambda cb: isinstance(cb, L2Callback))
        learn.remove_cbs(l2)
        if hasattr(net, THETA): delattr(net, THETA)  # θ has a value for each array, and the number of arrays changes
        net.heads.extend(ObjectiveHead(net.heads[0].n_features, net.n_classes).to(learn.dls.device) for _ in range(n))
        def maps(x):
            fmap, = whole(x)
            return [fmap, *fmap.tensor_split(n, 2)]
        net.maps = maps
        learn.add_cbs(l2)
    return change
def halve(net): next(m for m in net.global_stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0]>1).stride = (2,2)
def stride(learn): halve(learn.model)
def check_stride(cfg):
    "Raise `ValueError` if the last stage does not work with stride 2 in one convolution, as with a shortcut beside it"
    halve(net := build_net(cfg, 2).eval())
    try:
        with torch.no_grad(): net(torch.rand(1, 3, *cfg.size))
    except RuntimeError as e: raise ValueError(f"change 'stride': {cfg.arch} has a shortcut beside the convolution that would get stride 2. Leave it out of --changes.") from e
def metric(loss, miner=None):
    def change(learn): learn.loss_func = ReIDLoss(triplet=lambda emb,pid: loss(emb, pid, miner(emb, pid) if miner else None))
    return change
def patch(learn): learn.dls.train.after_batch.add(PatchEach())
def colours(learn): learn.dls.train.after_batch.add([Brightness(.2, p=.5), Contrast(.2, p=.5), Saturation(.2, p=.5)])
def averaged(learn): learn.add_cb(Averaged(.99))

def no(cfg): return {}
def half(cfg):
    "Half the strength, given or default, of any regulariser"
    k = dict(adaptive='amplitude', conventional='factor').get(cfg.l2, 'strength')
    if k=='strength' and cfg.l2 not in RIVALS: raise ValueError(f"half strength: l2={cfg.l2} has none. Leave 'half strength' out of --changes.")
    return {k: .5*(getattr(cfg, k) or next(iter(signature(RIVALS[cfg.l2]).parameters.values())).default)}

#: Change -> (what it is, function that changes the learner or None, function of the options that gives other options)
CHANGES = {
    'base': ('the recipe', None, no),
    'gem': ('GeM pooling, exponent 3', gem, no),
    '2 strips': ('a second and third head on the upper and the lower half of the map', strips(2), no),
    '4 strips': ('four more heads, on quarters of the map', strips(4), no),
    'circle': ('circle loss instead of the triplet loss', metric(CircleLoss(m=.25, gamma=64)), no),
    'multi-similarity': ('multi-similarity loss instead of the triplet loss', metric(MultiSimilarityLoss(), MultiSimilarityMiner()), no),
    'no triplet': ('cross-entropy alone', lambda learn: setattr(learn, 'loss_func', ReIDLoss(triplet=False)), no),
    'patch': ('random patches of other images', patch, no),
    'colours': ('random brightness, contrast and saturation', colours, no),
    'drop path': ('residual branches left out at random, with probabilities that rise from 0 in the first block to just below 0.2 in the last', None, lambda c: dict(drop_path=.2)),
    'average': ('moving average of the weights, decay 0.99', averaged, no),
    'stride': ('last stage with stride 2', stride, no),
    'more people': ('twice the identities per batch, half the images of each', None, lambda c: dict(n_pids=2*c.n_pids, n_imgs=c.n_imgs//2)),
    'fewer people': ('half the identities per batch, twice the images of each', None, lambda c: dict(n_pids=c.n_pids//2, n_imgs=2*c.n_imgs)),
    'half strength': ('half the strength of the regulariser', None, half),
    'half rate': ('half the learning rate', None, lambda c: dict(lr=c.lr/2)),
    'double rate': ('twice the learning rate', None, lambda c: dict(lr=2*c.lr))}

def train(name, splits, cfg, device):
    "Train with one change → its figures on the held-out identities, last epoch"
    _,change,opts = CHANGES[name]
    cfg = cfg.but(**opts(cfg))
    learn = make_learner(splits, cfg, device=device)
    if change: change(learn)
    learn.remove_cb(learn.retrieval_metrics)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): fit_run(learn, cfg, 0)
    minutes = (time.perf_counter()-start)/60
    feats,heads = learn.embed(flip=cfg.flip),learn.model.eval().heads
    parts = feats.to(heads[0].neck.weight.device).split([h.n_features for h in heads], 1)
    with torch.no_grad(): after = torch.cat([h.neck(o) for h,o in zip(heads, parts)], 1).cpu()
    res = {k+where: result_figures(search(o, learn.dls.test_df))[k] for o,where in ((feats,''), (after,' after the neck')) for k in ('mAP','Rank-1')}
    return dict(res, minutes=round(minutes, 1))

def main(a):
    if odd := [o for o in a.changes if o not in CHANGES]: raise ValueError(f'--changes {odd}: there are {list(CHANGES)}.')
    keep_freed_memory()
    rows,base = Rows(a.out),RunConfig(**dict(dict(epochs=5, steps=200, l2='auto'), **chosen(a.set), data=a.data, seed=a.seed))
    if base.arch in methods: raise ValueError(f'arch={base.arch}: the changes are made for backbones of timm and torchvision with the light head.')
    if base.regions: raise ValueError(f'regions={base.regions}: the changes are made for the light head. Use regions=0.')
    for name in a.changes: base.but(**CHANGES[name][2](base))  # raises `ValueError` for options that a change makes invalid
    if 'stride' in a.changes: check_stride(base)
    splits = hold_out(load_splits(a.data), .2, 42, a.distractors)  # the same people for all seeds
    same = dict(dataset=splits.name, distractors=a.distractors, **setting(base, a.device, 'arch','size','epochs','steps','l2'))
    rows.check_same(**same)
    def run(name, seed): return dict(train(name, splits, base.but(seed=seed), a.device), **same, torch=torch.__version__)
    rows.fill('change', a.changes, range(a.seed, a.seed+a.seeds), run, ('mAP','Rank-1','mAP after the neck','minutes'))
    df = pd.DataFrame(rows)
    mean = df.groupby('change', sort=False)[['mAP','Rank-1','mAP after the neck','Rank-1 after the neck','minutes']].mean().reset_index()
    mean.insert(1, 'seeds', df.groupby('change', sort=False).seed.count().values)
    print(markdown_table(mean.assign(change=[CHANGES[o][0] for o in mean.change], **{k: mean[k].map('{:.1f}'.format) for k in mean.columns[2:]})))

if __name__=='__main__':
    p = parser(__doc__, 'CSV file of the results')
    p.add_argument('--changes', nargs='+', default=list(CHANGES), help=f'some of: {", ".join(CHANGES)}')
    p.add_argument('--distractors', type=float, default=.5, help='share of the images of the other training identities that join the held-out gallery')
    start(main, p)
