"The commands as a user runs them: what they write, what they refuse, and that they repeat themselves"
import json, subprocess, sys
from pathlib import Path

import pandas as pd, pytest

from reid_fastai.cli import *
from reid_fastai.data.synthetic import make_synthetic

tiny_args = dict(arch='resnet10t', pretrained='none', size='64x32', n_pids=4, epochs=2, steps=2)

@pytest.fixture(scope='module')
def data(): return str(make_synthetic(tiny=True))

@pytest.fixture(scope='module')
def run(data, tmp_path_factory): return reid_train(data, out=tmp_path_factory.mktemp('runs')/'a', **tiny_args)

def shell(*args):
    "Run a command of this environment"
    return subprocess.run([Path(sys.executable).parent/args[0], *map(str, args[1:])], capture_output=True, text=True)

def test_run_folder(run):
    assert {o.name for o in run.iterdir()}>={'config.json','metrics.csv','lambdas.csv','lambda_hist.png','model.safetensors','summary.md'}
    cfg = json.loads((run/'config.json').read_text())
    assert cfg['seed']==42 and cfg['dataset']['counts']['train']['images']==60 and cfg['versions']['torch']
    assert list(pd.read_csv(run/'metrics.csv').columns)==['epoch','train_loss','penalty','mAP','rank1','time']
    assert pd.read_csv(run/'lambdas.csv').epoch.max()==2

def test_same_seed_same_numbers(run, data, tmp_path):
    other = reid_train(data, out=tmp_path/'b', **tiny_args)
    cols = ['train_loss','penalty','mAP','rank1']
    pd.testing.assert_frame_equal(pd.read_csv(run/'metrics.csv')[cols], pd.read_csv(other/'metrics.csv')[cols], check_exact=True)
    assert (run/'model.safetensors').read_bytes()==(other/'model.safetensors').read_bytes()
    third = reid_train(data, out=tmp_path/'c', seed=1, **tiny_args)
    assert not pd.read_csv(run/'metrics.csv')[cols].equals(pd.read_csv(third/'metrics.csv')[cols])

def test_eval_gives_the_figures_of_the_run(run):
    res = reid_eval(run)
    assert f'| mAP | {100*res.mAP:.2f} |' in (run/'summary.md').read_text()

@pytest.mark.parametrize('kw', [dict(l2='conventional', factor=1e-3), dict(l2='none')])
def test_other_regularisers(kw, data, tmp_path):
    out = reid_train(data, out=tmp_path/'r', **{**tiny_args, 'epochs':1}, **kw)
    assert (out/'lambdas.csv').exists()==(kw['l2']!='none')

@pytest.mark.parametrize('args,words', [
    (['/no/such/folder'], 'does not exist'), (['--arch', 'resnet5o'], "'resnet50"), (['--amplitude', '0'], 'amplitude: got 0.0'),
    (['--amplitude', 'nan'], 'amplitude: got nan'), (['--size', 'big'], 'such as 256x128'), (['--epochs', '0'], 'epochs=0'), (['--l2', 'lasso'], "'lasso'"),
    (['--pretrained', '/no/such.safetensors'], 'there is no such file')])
def test_bad_input_exits_with_2(args, words, tmp_path):
    res = shell('reid-train', '--out', tmp_path/'run', *args)
    assert res.returncode==2 and words in res.stderr and 'Traceback' not in res.stderr, res.stderr
    assert not (tmp_path/'run').exists()

def test_existing_run_is_kept(run):
    before = sorted((o.name, o.stat().st_mtime_ns) for o in run.iterdir())
    res = shell('reid-train', '--out', run)
    assert res.returncode==2 and 'exists already' in res.stderr
    assert before==sorted((o.name, o.stat().st_mtime_ns) for o in run.iterdir())

def test_data_that_is_none(tmp_path, data):
    (tmp_path/'photos').mkdir()
    res = shell('reid-train', tmp_path/'photos', '--out', tmp_path/'r')
    assert res.returncode==2 and 'no known layout' in res.stderr and 'bounding_box_train' in res.stderr
    res = shell('reid-train', data, '--out', tmp_path/'r', '--size', '64x32', '--n-pids', '99', '--arch', 'resnet10t', '--pretrained', 'none')
    assert res.returncode==2 and '99' in res.stderr and not (tmp_path/'r').exists()

def test_truncated_image_is_named(tmp_path):
    d = make_synthetic(tmp_path/'d', tiny=True)
    bad = sorted((d/'query').iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:200])
    res = shell('reid-train', d, '--out', tmp_path/'r', '--size', '64x32', '--n-pids', '4', '--arch', 'resnet10t', '--pretrained', 'none')
    assert res.returncode==2 and bad.name in res.stderr

def test_help_states_units_and_defaults():
    for cmd in ('reid-train','reid-eval','reid-synth'): assert shell(cmd, '--help').returncode==0
    assert 'px (default: 128x64)' in ' '.join(shell('reid-train', '--help').stdout.split())
