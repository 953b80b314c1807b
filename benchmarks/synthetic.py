"How long the synthetic benchmark takes to render, and how hard it is without training"
import tempfile, time
from pathlib import Path

import numpy as np, torch
from PIL import Image
from fastcore.script import call_parse

from reid_fastai.callback.evaluation import search
from reid_fastai.data.datasets import read_dataset
from reid_fastai.data.splits import JUNK_PID
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.export import Embedder
from reid_fastai.models import build_reid_net

def histogram(path, strips=4, bins=8):
    "RGB histograms of horizontal strips, their square roots, so that cosine is the Bhattacharyya coefficient"
    x = np.asarray(Image.open(path)).astype(int)*bins//256
    codes = (x*[bins*bins, bins, 1]).sum(-1)
    return np.sqrt(np.concatenate([np.bincount(o.ravel(), minlength=bins**3) for o in np.array_split(codes, strips)]))

@call_parse
def main(seed:int=42): # Of the benchmark
    "Render into a temporary folder, and search with untrained features"
    with tempfile.TemporaryDirectory() as d:
        start = time.perf_counter()
        splits = read_dataset(make_synthetic(Path(d)/'synthetic', seed=seed))
        print(f'{len(splits)} images rendered in {time.perf_counter()-start:.1f} s\n{splits}')
        df = splits.df[(splits.df.split!='train') & (splits.df.pid!=JUNK_PID)]
        files = [splits.root/o for o in df.path]
        print('Colour histograms:', search(torch.from_numpy(np.stack([histogram(o) for o in files])).float(), df), sep='\n')
        net = build_reid_net('tf_efficientnet_lite0', 1, regions=0)
        print('ImageNet features:', search(Embedder(net, (128,64))(files), df), sep='\n')
