"""What to expect from how many identities: the same test set, and training on a part of the training identities.

    python benchmarks/identities.py DATA --out FOLDER [--identities 0 25 50] [--images 0] [--seeds 1] [--pretrained FILE] [--set epochs=10 size=128x64 …]

0 identities is the starting model without any training on DATA: with `--pretrained FILE`, one that was trained elsewhere. Identities of a seed are nested: those of 25 are among those of 50.
All runs take as many steps as an epoch of the whole training set has, unless `--set steps=…` says otherwise. Runs that are complete in FOLDER are not repeated, and interrupted ones go on.
"""
from pathlib import Path

import numpy as np, pandas as pd

from fastai.torch_core import set_seed

from options import chosen, parser, setting, start
from reid_fastai.callback.evaluation import search
from reid_fastai.comparison_results import markdown_table
from reid_fastai.config import RunConfig
from reid_fastai.data.splits import DISTRACTOR_PID, ReIDSplits
from reid_fastai.export import Embedder
from reid_fastai.files import atomic_write
from reid_fastai.results import result_figures, search_rows
from reid_fastai.run_setup import build_net, chosen_device, load_splits
from reid_fastai.runs import train_run

def people(splits):
    "Sorted training identities"
    return np.unique(splits.train.pid[splits.train.pid>DISTRACTOR_PID])

def subset(splits, n, images, seed):
    "`splits` with `n` random training identities, and at most `images` random images of each; 0: all images"
    rng,train = np.random.default_rng(seed),splits.train
    pids = rng.permutation(people(splits))[:n]
    rows = train[train.pid.isin(pids)]
    if images: rows = rows.iloc[rng.permutation(len(rows))].groupby('pid').head(images)
    df = pd.concat([rows.sort_index(), splits.query, splits.gallery])
    return ReIDSplits(df if splits.has_cameras else df.drop(columns='camid'), f'{splits.name}, {n} training identities', splits.root)

def untrained(splits, cfg, device=None):
    "Figures of the starting model, with the random weights of the seed where none are loaded"
    set_seed(cfg.seed)
    df,files = search_rows(splits)
    return result_figures(search(Embedder(build_net(cfg, 1).to(chosen_device(device)), cfg.size)(files, flip=cfg.flip), df))

def first_precision(res): "Precision in which a run began, which can be that of another machine"; return res['precision'].split()[0].rstrip(',')

def main(a):
    splits,out,rows = load_splits(a.data),Path(a.out),[]
    old = pd.read_csv(file, dtype=dict(dataset=str)) if (file := out/'identities.csv').exists() else None  # rows of earlier calls are kept
    given,most = chosen(a.set, pretrained='use --pretrained'),len(people(splits))
    counts = splits.real('train').pid.value_counts()
    sizes = a.identities or [o for o in (0, 25, 50, 100, 200, 751) if o<=most]
    if min(*sizes, a.images)<0: raise ValueError(f'--identities {sizes}, --images {a.images}: numbers from 0 are needed.')
    if max(sizes)>most: raise ValueError(f'--identities {max(sizes)}: {splits.name} has {most} training identities.')
    for seed in range(a.seed, a.seed+a.seeds):
        for n in sizes:
            opts = dict(given, data=a.data, seed=seed, pretrained=a.pretrained)
            cfg = RunConfig(**opts)
            part = subset(splits, n, a.images, seed)
            steps = cfg.steps or max(1, int(counts[counts>=cfg.n_imgs].sum())//(cfg.n_pids*cfg.n_imgs))
            if n: res = train_run(out/f'{n}-{a.images or "all"}-{seed}', part, RunConfig(**dict(opts, steps=steps, n_pids=min(n, cfg.n_pids))), a.device)
            else: res = untrained(splits, cfg, a.device)
            same = setting(cfg, a.device, 'arch','size')
            if 'precision' in res: same['precision'] = first_precision(res)
            rows.append({'dataset': splits.name, 'identities': n, 'images': len(part.train), 'seed': seed, **{k: res[k] for k in ('mAP','Rank-1','Rank-5','mINP')}, 'epochs': cfg.epochs if n else 0, 'steps': steps if n else 0, 'pretrained': a.pretrained, **same})
            atomic_write(file, pd.concat([old, pd.DataFrame(rows)]).drop_duplicates(['dataset','identities','images','seed','epochs','steps','arch','size','precision','options'], keep='last').to_csv(index=False))
    df = pd.DataFrame(rows).groupby('identities').agg({'images': 'mean', 'mAP': ['mean','std'], 'Rank-1': ['mean','std']}).reset_index()
    shown = pd.DataFrame({'identities': df.identities, 'images': df.images['mean'].round().astype(int),
                          **{o: [f'{m:.2f}'+(f' ± {s:.2f}' if a.seeds>1 else '') for m,s in zip(df[o]['mean'], df[o]['std'])] for o in ('mAP','Rank-1')}})
    atomic_write(out/'identities.md', (table := markdown_table(shown))+'\n')
    print(table)

if __name__=='__main__':
    p = parser(__doc__, 'folder of the runs and of the table')
    p.add_argument('--identities', nargs='+', type=int, help='numbers of training identities; default: 0 25 50 100 200 751, as far as DATA has as many')
    p.add_argument('--images', type=int, default=0, help='at most so many images of each identity; 0: all')
    p.add_argument('--pretrained', default='imagenet', help="'imagenet', 'none', or a model.safetensors to start from")
    start(main, p)
