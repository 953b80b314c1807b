"Several processes give the training, the figures and the files of one"
import os, re, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the processes are forked')
here = Path(__file__).parent
env = dict(os.environ, PYTHONPATH=str(here.parent), MPLBACKEND='agg')

# ---- from Python

@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    "Of a case, a number of processes and a rank"
    d = tmp_path_factory.mktemp('several')
    res = subprocess.run([sys.executable, here/'several.py', d, '--', '1', '2', '4'], capture_output=True, text=True, env=env)
    assert res.returncode==0, res.stderr[-3000:]
    return lambda case, n, rank=0: torch.load(d/f'{case}-{n}-{rank}.pth', weights_only=False)

def distance(a, b):
    "Relative, of all weights together, and the largest of a single array"
    flat = lambda o: torch.cat([v.double().flatten() for v in o.values()])
    return ((flat(a)-flat(b)).norm()/flat(b).norm()).item(), max(((a[k]-b[k]).double().norm()/b[k].double().norm().clamp_min(1e-9)).item() for k in b)

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('case', ['plain', 'regions', 'statistics', 'accumulated', 'paper', 'conventional', 'workers'])
def test_the_training_of_one_process(outcome, case, n):
    "Weights, running statistics, θ, λ, losses and the table; with statistics frozen and not, with the paper's two phases, accumulation, clipping, and loader processes"
    one = outcome(case, 1)
    for rank in range(n):
        got = outcome(case, n, rank)
        assert max(distance(got['weights'], one['weights']))<1e-9
        np.testing.assert_allclose(got['history'], one['history'], rtol=1e-5)
        np.testing.assert_allclose(got['losses'], one['losses'], rtol=1e-5)
        np.testing.assert_allclose(got['table'], one['table'], rtol=1e-5)
        assert got['epoch']==one['epoch'] and got['chance'].equal(one['chance']), 'the next epoch would have other batches or other augmentations'
        assert got['bs']==16 and not got['forwards'] and got['wrapped']=='ReIDNet', 'loader and network are left as they were'

@pytest.mark.parametrize('n', [2, 4])
def test_in_float32(outcome, n):
    assert distance(outcome('float32', n)['weights'], outcome('float32', 1)['weights'])[0]<1e-5

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('fault', ['mined apart', 'not averaged', 'penalty twice'])
def test_a_fault_would_be_seen(outcome, fault, n): assert distance(outcome(f'fault: {fault}', n)['weights'], outcome('plain', 1)['weights'])[0]>1e-3

@pytest.mark.parametrize('n', [2, 4])
def test_evaluation_is_exact(outcome, n):
    one = outcome('shared', 1)
    for rank in range(n):
        got = outcome('shared', n, rank)
        for k,v in one.items(): assert np.array_equal(np.asarray(v), np.asarray(got[k]), equal_nan=True), k

@pytest.mark.parametrize('n', [2, 4])
def test_refusals(outcome, n):
    for rank in range(n):
        got = outcome('refused', n, rank)
        sizes,epochs,data = got['messages']
        assert re.match(f'n_pids=5: that many identities cannot be divided evenly among {n} processes. Use n_pids=4 or {8 if n==4 else 6}, or one of 5 processes.$', sizes)
        assert epochs.startswith('Epochs: 1 in process 0, 2 in process 1.') and data.startswith('The dataset: ') and 'in process 1' in data
        assert got['bs']==16 and all(len(o)<300 and '\n' not in o for o in got['messages'])
    assert not outcome('refused', 1)['messages']
