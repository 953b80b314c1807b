"Several workers share the cores: each computes with one thread"
import os, signal
from contextlib import contextmanager

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes commands in the background ignore it

if 'PYTEST_XDIST_WORKER' in os.environ:
    for o in ('OMP_NUM_THREADS','MKL_NUM_THREADS','OPENBLAS_NUM_THREADS'): os.environ.setdefault(o, '1')

# Each worker takes whole files. Those that take longest come first, so that no worker is left with one at the end.
LONGEST = 'test_notebooks test_distributed test_docs test_benchmarks test_cli test_attack test_recipe test_shell test_rivals test_methods test_models test_export test_gallery'.split()

def pytest_collection_modifyitems(items):
    order = {o: i for i,o in enumerate(LONGEST)}
    items.sort(key=lambda o: order.get(o.path.stem, len(order)))

@pytest.fixture(autouse=True, scope='session')
def drawing():
    "Drawing the pictures of a run takes longer than a training of two epochs: without `with drawing():`, ranked lists are short and files of pictures are blank"
    from functools import partial
    from matplotlib.figure import Figure
    from PIL import Image
    from reid_fastai import interpret, results
    def blank(self, file, dpi, **kwargs): Image.new('RGB', tuple(map(int, dpi*self.get_size_inches()))).save(file, 'png')
    @contextmanager
    def drawing():
        with pytest.MonkeyPatch.context() as m:
            m.setattr(results, 'plot_ranked', interpret.plot_ranked)
            m.setattr(Figure, 'savefig', savefig)
            yield
    results.plot_ranked = partial(interpret.plot_ranked, n=1, k=2)
    savefig,Figure.savefig = Figure.savefig,blank
    return drawing

@pytest.fixture
def interrupted(monkeypatch):
    "Trains a run, and interrupts it after some epochs"
    from fastai.basics import Callback
    from reid_fastai import runs
    def f(out, splits, cfg, epochs, real=runs.fit_run):
        class Interruption(Callback):
            order = 90
            def before_train(self):
                if len(self.learn.checkpoint.rows)==epochs: raise KeyboardInterrupt
        def cut(learn, cfg, start):
            learn.add_cb(Interruption())
            real(learn, cfg, start)
        with monkeypatch.context() as m:
            m.setattr(runs, 'fit_run', cut)
            with pytest.raises(KeyboardInterrupt): runs.train_run(out, splits, cfg)
    return f
