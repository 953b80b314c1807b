"""Which part of rotation control has an effect: trainings that differ in one part, on one dataset.

    python benchmarks/controls.py DATA --out FILE.csv [--controls both constant rotation=0.02 …] [--seeds 1] [--set epochs=5 steps=200 …]

A control is one of the names below, a regulariser of `reid-compare` with a strength, such as rotation=0.02, or lars with a learning rate, such as lars=0.003.
With --hold-out SHARE, some training identities are not trained on. Each model is evaluated on them and on the test set, and the rank correlation of both mAPs is printed. Without it, only the test set is used.
A row is added to FILE.csv after each training. Trainings that have a row are not repeated, so the command can be interrupted and given again, and a file may be moved to another machine.
"""
import time

import pandas as pd
import torch
from fastai.callback.schedule import SchedCos, SchedNo
from fastai.optimizer import Optimizer, average_grad, larc_layer_lr, larc_step

from options import chosen, parser, setting, start
from rows import Rows, rank_correlation
from reid_fastai.callback.evaluation import search
from reid_fastai.callback.regularizer import ConventionalL2
from reid_fastai.callback.rotation import AutoL2, RotationControl
from reid_fastai.comparison_results import markdown_table
from reid_fastai.config import RunConfig
from reid_fastai.core import keep_freed_memory
from reid_fastai.data.holdout import hold_out
from reid_fastai.results import result_figures, search_rows
from reid_fastai.run_setup import fit_run, load_splits, make_learner

def radians(cfg, lam): return (2*cfg.lr*lam)**.5

def lars_rate(p, lr, **kwargs):
    "The learning rate of an array in LARS; `lr` for vectors and for arrays of zeros, which would not move"
    return larc_layer_lr(p, lr, clip=False, **kwargs) if p.ndim>1 and p.data.any() else dict(local_lr=lr)

def lars(params, lr): return Optimizer(params, [average_grad, lars_rate, larc_step], lr=lr, mom=.9, trust_coeff=1., eps=1e-8, wd=0.)

#: Control -> (what it is, function of (options, λ) that makes the callbacks, optimizer or None, other options)
CONTROLS = {
    'none': ('no regularisation', lambda c,l: [], None, {}),
    'constant': ('constant L2, λ = 0.0025', lambda c,l: [ConventionalL2(2.5e-3)], None, {}),
    'norm': ("norms kept, steps otherwise Adam's", lambda c,l: [RotationControl(l, keep='norm')], None, {}),
    'angle': ('angles set, norms free', lambda c,l: [RotationControl(l, keep='angle')], None, {}),
    'both': ('angles set, norms kept', lambda c,l: [RotationControl(l)], None, {}),
    'channel': ('both, per output channel', lambda c,l: [RotationControl(l, per_channel=True)], None, {}),
    'linear': ('both, angle in proportion to the learning rate', lambda c,l: [RotationControl(radians(c, l)/c.lr, angle='linear')], None, {}),
    'cosine': ('both, angle falls by a cosine', lambda c,l: [RotationControl(l, angle=SchedCos(radians(c, l), 0.))], None, {}),
    'even': ('both, constant angle, half of the highest', lambda c,l: [RotationControl(l, angle=SchedNo(radians(c, l)/2, radians(c, l)/2))], None, {}),
    'lamb': ('LAMB, without rotation control', lambda c,l: [], None, dict(l2='lamb', lr=3e-3)),
    'lars': ('LARS, without rotation control', lambda c,l: [], lars, dict(lr=1e-3)),
    'adaptive rest': ('both, adaptive L2 for the other arrays', lambda c,l: [AutoL2(l)], None, {}),
    'constant rest': ('both, constant L2 for the other arrays', lambda c,l: [RotationControl(l), ConventionalL2(2.5e-3)], None, {}),
    'random none': ('random weights, no regularisation', lambda c,l: [], None, dict(pretrained='none')),
    'random constant': ('random weights, constant L2', lambda c,l: [ConventionalL2(2.5e-3)], None, dict(pretrained='none')),
    'random both': ('random weights, angles set, norms kept', lambda c,l: [RotationControl(l)], None, dict(pretrained='none'))}

def control(name, cfg, lam):
    "The options and callbacks of a control, and its optimizer or None"
    name,given,strength = name.partition('=')
    if given and name!='lars': return cfg.with_l2(name, float(strength)),[],None
    _,cbs,opt_func,opts = CONTROLS[name]
    return cfg.but(**opts | (dict(lr=float(strength)) if given else {})),cbs(cfg, lam),opt_func

def train(name, splits, test, cfg, lam, device):
    "Train one control on `splits` → its figures on the test set, last epoch, and on the held-out identities of `splits`, if there are any"
    cfg,cbs,opt_func = control(name, cfg, lam)
    learn = make_learner(splits, cfg, device=device)
    learn.add_cbs(cbs)
    if opt_func: learn.opt_func = opt_func
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): fit_run(learn, cfg, 0)
    minutes,res,held = round((time.perf_counter()-start)/60, 1),result_figures(learn.retrieval_metrics.results or learn.retrieval(cfg.flip)),{}
    if splits is not test:
        held,(df,files) = {f'held-out {k}': res[k] for k in ('mAP','Rank-1')},search_rows(test)
        res = result_figures(search(learn.embed(learn.dls.test_dl(files), cfg.flip), df))
    return dict({k: res[k] for k in ('mAP','Rank-1','mINP')}, **held, minutes=minutes)

def main(a):
    if odd := [o for o in a.controls if o not in CONTROLS and '=' not in o]: raise ValueError(f'--controls {odd}: there are {list(CONTROLS)}, and regularisers with a strength, such as rotation=0.02.')
    keep_freed_memory()
    strength = 'name a regulariser with a strength in --controls, such as conventional=0.0125'
    opts = chosen(a.set, l2='choose --controls', factor=strength, amplitude=strength, strength=strength)
    rows,base = Rows(a.out),RunConfig(**dict(dict(epochs=5, steps=200), **opts, data=a.data, l2='none'))
    for name in a.controls: control(name, base, a.lam)  # raises `ValueError` for an unknown regulariser or strength
    test = load_splits(a.data)
    splits = hold_out(test, a.hold_out, 42, a.distractors) if a.hold_out else test  # the same people for all seeds
    same = dict(dataset=splits.name, **(dict(distractors=a.distractors) if a.hold_out else {}), **setting(base.but(l2='adaptive'), a.device, 'arch','size','epochs','steps'), lam=a.lam)
    rows.check_same(**same)
    def run(name, seed): return dict(train(name, splits, test, base.but(seed=seed), a.lam, a.device), **same, torch=torch.__version__)
    rows.fill('control', a.controls, range(a.seed, a.seed+a.seeds), run, ('mAP','Rank-1','minutes'))
    df,held = pd.DataFrame(rows),['held-out mAP'] if a.hold_out else []
    g = df.groupby('control', sort=False)
    def pm(k): return [f'{m:.2f}'+(f' ± {s:.2f}' if s==s else '') for m,s in zip(g[k].mean(), g[k].std())]
    print(markdown_table(pd.DataFrame({'control': [CONTROLS[o][0] if o in CONTROLS else o for o in g.size().index], 'seeds': g.size().values, **{k: pm(k) for k in (*held,'mAP')}, 'Rank-1': g['Rank-1'].mean().map('{:.2f}'.format).values})))
    if held and len(df)>2: print('\nRank correlation (Spearman) of held-out and test mAP: '+rank_correlation(df, *held, 'mAP'))

if __name__=='__main__':
    p = parser(__doc__, 'CSV file of the results')
    p.add_argument('--controls', nargs='+', default=list(CONTROLS), help=f'some of: {", ".join(CONTROLS)}; or regularisers with a strength')
    p.add_argument('--lam', type=float, default=.01, help='λ of rotation control')
    p.add_argument('--hold-out', type=float, metavar='SHARE', help='share of the training identities to hold out, such as 0.2; default: none')
    p.add_argument('--distractors', type=float, default=.5, help='with --hold-out, share of the images of the other training identities that join the held-out gallery')
    start(main, p)
