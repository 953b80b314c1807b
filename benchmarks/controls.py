"""Which part of rotation control has an effect: trainings that differ in one part, on one dataset.

    python benchmarks/controls.py DATA --out FILE.csv [--controls …] [--seeds 1] [--set epochs=5 steps=200 …]

A row is added to FILE.csv after each training. Trainings that have a row are not repeated, so the command can be interrupted and given again, and a file may be moved to another machine.
"""
import argparse, sys, time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.schedule import SchedCos, SchedNo
from fastai.optimizer import Larc

from options import add_set
from reid_fastai.callback.regularizer import ConventionalL2
from reid_fastai.callback.rotation import AutoL2, RotationControl
from reid_fastai.config import RunConfig
from reid_fastai.core import keep_freed_memory
from reid_fastai.experiments import markdown_table
from reid_fastai.files import atomic_write, check_writable
from reid_fastai.runs import fit_run, load_splits, make_learner, result_figures

def radians(cfg, lam): return (2*cfg.lr*lam)**.5

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
    'lars': ('LARS, without rotation control', lambda c,l: [], partial(Larc, mom=.9, clip=False, trust_coeff=1.), dict(lr=1e-3)),
    'adaptive rest': ('both, adaptive L2 for the other arrays', lambda c,l: [AutoL2(l)], None, {}),
    'constant rest': ('both, constant L2 for the other arrays', lambda c,l: [RotationControl(l), ConventionalL2(2.5e-3)], None, {}),
    'random none': ('random weights, no regularisation', lambda c,l: [], None, dict(pretrained='none')),
    'random constant': ('random weights, constant L2', lambda c,l: [ConventionalL2(2.5e-3)], None, dict(pretrained='none')),
    'random both': ('random weights, angles set, norms kept', lambda c,l: [RotationControl(l)], None, dict(pretrained='none'))}

def train(name, splits, cfg, lam, device):
    "Train one control → its figures, last epoch"
    _,cbs,opt_func,opts = CONTROLS[name]
    cfg = cfg.but(**opts)
    learn = make_learner(splits, cfg, device=device)
    learn.add_cbs(cbs(cfg, lam))
    if opt_func: learn.opt_func = opt_func
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): fit_run(learn, cfg, 0)
    res = result_figures(learn.retrieval_metrics.results or learn.retrieval(cfg.flip))
    return dict({k: res[k] for k in ('mAP','Rank-1','mINP')}, minutes=round((time.perf_counter()-start)/60, 1))

def main(a):
    check_writable(a.out)
    if odd := [o for o in a.controls if o not in CONTROLS]: raise ValueError(f'--controls {odd}: there are {list(CONTROLS)}.')
    keep_freed_memory()
    out,splits = Path(a.out),load_splits(a.data)
    rows = pd.read_csv(out).to_dict('records') if out.exists() else []
    for seed in range(a.seed, a.seed+a.seeds):
        cfg = RunConfig(**dict(dict(epochs=5, steps=200), **dict(a.set), data=a.data, l2='none', seed=seed))
        setting = dict(dataset=splits.name, arch=cfg.arch, size='x'.join(map(str, cfg.size)), epochs=cfg.epochs, steps=cfg.steps, lam=a.lam, torch=torch.__version__)
        if odd := [k for k in setting if k!='torch' and rows and rows[0][k]!=setting[k]]:
            raise ValueError(f'{out} has rows with {odd[0]}={rows[0][odd[0]]}, and is now to go on with {setting[odd[0]]}. Name another file.')
        for name in a.controls:
            if any((r['control'], r['seed'])==(name, seed) for r in rows): continue
            rows.append(dict(control=name, seed=seed, **train(name, splits, cfg, a.lam, a.device), **setting))
            atomic_write(out, pd.DataFrame(rows).to_csv(index=False))
            print({k: rows[-1][k] for k in ('control','seed','mAP','Rank-1','minutes')}, flush=True)
    df = pd.DataFrame(rows).groupby('control', sort=False).agg({'seed': 'count', 'mAP': ['mean','std'], 'Rank-1': 'mean'}).reset_index()
    pm = [f'{m:.2f}'+(f' ± {s:.2f}' if s==s else '') for m,s in zip(df.mAP['mean'], df.mAP['std'])]
    print(markdown_table(pd.DataFrame({'control': [CONTROLS[o][0] for o in df.control], 'seeds': df.seed['count'], 'mAP': pm, 'Rank-1': df['Rank-1']['mean'].map('{:.2f}'.format)})))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', help="'synthetic', the folder of a dataset, or a CSV file")
    p.add_argument('--out', required=True, help='CSV file of the results')
    p.add_argument('--controls', nargs='+', default=list(CONTROLS), help=f'some of: {", ".join(CONTROLS)}')
    p.add_argument('--lam', type=float, default=.01, help='λ of rotation control')
    p.add_argument('--seeds', type=int, default=1, help='number of seeds')
    p.add_argument('--seed', type=int, default=42, help='the first of them')
    p.add_argument('--device')
    add_set(p)
    try: main(p.parse_args())
    except ValueError as e: sys.exit(f'controls.py: error: {e}')
