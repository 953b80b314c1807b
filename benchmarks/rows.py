"Results in a CSV file that grows by a row after each training, so that an interrupted script goes on where it stopped"
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr

from reid_fastai.core import DivergedError
from reid_fastai.files import atomic_write, check_writable

def rank_correlation(df, a, b): "Spearman's rank correlation of two columns, with the number of rows"; return f'{spearmanr(df[a], df[b]).statistic:.2f} over {len(df)} runs'

class Rows(list):
    "Rows of a CSV file, as dicts"
    def __init__(self, file):
        check_writable(file)
        self.file = Path(file)
        rows = pd.read_csv(file, dtype=dict(dataset=str)).to_dict('records') if self.file.exists() else []
        super().__init__({k: None if v!=v else v for k,v in row.items()} for row in rows)  # None is an empty cell, which pandas reads as NaN

    def has(self, **values):
        "Whether a row has these values"
        return any(all(row[k]==v for k,v in values.items()) for row in self)

    def check_same(self, **values):
        "Raise `ValueError` if the file was begun with other values"
        for k,v in values.items():
            if self and k not in self[0]: raise ValueError(f'{self.file} has no column {k}: another script or an older version wrote it. Name another file.')
            if self and self[0][k]!=v: raise ValueError(f'{self.file} has rows with {k}={self[0][k]}, but this call has {v}. Name another file.')

    def fill(self, key, names, seeds, train, shown):
        "Add a row with the result of `train(name, seed)` for each name, in column `key`, and seed that has none, and print the columns `shown`"
        for seed in seeds:
            for name in names:
                if self.has(**{key: name, 'seed': seed}): continue
                try: row = train(name, seed)
                except DivergedError as e: print(f'{name}, seed {seed}, has no row: {e}', flush=True); continue
                self.add({key: name, 'seed': seed, **row})
                print({k: self[-1][k] for k in (key,'seed',*shown)}, flush=True)
        if not self: raise ValueError('No training has a result.')

    def add(self, row):
        "Add a row, and write the file"
        self.append(row)
        atomic_write(self.file, pd.DataFrame(self).to_csv(index=False))
