"""Do held-out identities rank trainings as the test set does? Evaluates the tuning runs of a finished `reid-compare` on the test set, and prints the rank correlation.

    python benchmarks/heldout.py COMPARISON [--device cpu]

The figures are kept in COMPARISON/heldout.csv. Models that are in it are not evaluated again.
"""
import argparse, sys
from pathlib import Path

import pandas as pd

from rows import Rows, rank_correlation
from reid_fastai.callback.evaluation import search
from reid_fastai.comparison_results import markdown_table
from reid_fastai.export import load_embedder
from reid_fastai.files import model_file, read_json
from reid_fastai.results import result_figures, search_rows
from reid_fastai.run_setup import chosen_device, load_splits

def main(a):
    out = Path(a.comparison)
    if not (out/'results.csv').exists(): raise ValueError(f'{out} is no folder of a finished `reid-compare`: results.csv is missing.')
    cfg,runs = read_json(out/'comparison.json')['cfg'],pd.read_csv(out/'results.csv').query('stage=="tune"').dropna(subset='folder')  # a training that diverged has none
    if len(runs)<3: raise ValueError(f'{out} has {len(runs)} tuning runs; a rank correlation needs at least 3. Give `reid-compare` several strengths.')
    rows,(df,files) = Rows(out/'heldout.csv'),search_rows(load_splits(cfg['data']))
    for r in runs.itertuples():
        if rows.has(folder=r.folder): continue
        res = result_figures(search(load_embedder(model_file(out/r.folder), chosen_device(a.device))(files, flip=cfg['flip']), df))
        rows.add({'folder': r.folder, 'arm': r.arm, 'strength': r.strength, 'held-out mAP': r.mAP, 'test mAP': res['mAP'], 'test Rank-1': res['Rank-1']})
    df = pd.DataFrame(rows)
    print(markdown_table(df.drop(columns='folder').round(2)))
    names = 'held-out mAP','test mAP'
    print('\nRank correlation (Spearman) of held-out and test mAP: '+rank_correlation(df, *names))
    for arm,o in df.groupby('arm', sort=False):
        if len(o)>2: print(f'{arm}: {rank_correlation(o, *names)}')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('comparison', help='folder of `reid-compare`')
    p.add_argument('--device')
    try: main(p.parse_args())
    except ValueError as e: sys.exit(f'heldout.py: error: {e}')
