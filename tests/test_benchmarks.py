"The benchmarks run, at toy size"
import subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]

def run(*args): return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=root, timeout=200)

def test_gpu_script_on_the_cpu():
    res = run('benchmarks/gpu.py', '--tiny', '--device', 'cpu')
    assert res.returncode==0, res.stderr[-800:]
    for o in '| fp32 | contiguous_format |','| fp32 | channels_last |','the penalty alone','| tiny |': assert o in res.stdout
    bad = run('benchmarks/gpu.py') if not __import__('torch').cuda.is_available() else None
    assert bad is None or bad.returncode==1 and '\nNo GPU here' in '\n'+bad.stderr and 'Traceback' not in bad.stderr

def test_training_beside_a_bare_loop():
    res = run('benchmarks/training.py', '--arch', 'resnet10t', '--size', '64', '32', '--bs', '8', '--steps', '1', '--rounds', '1')
    assert res.returncode==0 and '× the bare loop' in res.stdout and 'peak memory' in res.stdout, res.stderr[-800:]

def test_how_many_identities(tmp_path):
    "Nested parts of the training identities, the same steps and the same test set; complete runs are not repeated"
    import pandas as pd
    from reid_fastai.data.synthetic import make_synthetic
    from reid_fastai.files import read_json
    data = str(make_synthetic(tiny=True))
    args = ['benchmarks/identities.py', data, '--out', tmp_path/'o', '--pretrained', 'none', '--identities', '0', '3', '6', '--set', 'arch=resnet10t', 'size=64x32', 'epochs=1', 'n_pids=4']
    res = run(*args)
    assert res.returncode==0 and '| identities | images | mAP | Rank-1 |' in res.stdout, res.stderr[-800:]
    df = pd.read_csv(tmp_path/'o'/'identities.csv')
    assert df.identities.tolist()==[0,3,6] and df.images.tolist()==[0,18,36]
    few,more = (read_json(tmp_path/'o'/f'{n}-all-42'/'config.json') for n in (3,6))
    assert (few['n_pids'],more['n_pids'])==(3,4) and few['steps']==more['steps']==3
    before = (tmp_path/'o'/'3-all-42'/'model.safetensors').stat().st_mtime_ns
    assert run(*args).returncode==0 and (tmp_path/'o'/'3-all-42'/'model.safetensors').stat().st_mtime_ns==before
    bad = run(*args, '--identities', '99')
    assert bad.returncode==1 and 'has 10 training identities' in bad.stderr and 'Traceback' not in bad.stderr

def test_retrieval_with_thresholds():
    res = run('benchmarks/retrieval.py', '--sizes', 'tiny', '--repeats', '1', '--verify')
    assert res.returncode==0 and 'equal error rate' in res.stdout and 'intervals' in res.stdout, res.stderr[-800:]

def test_exported_networks():
    __import__('pytest').importorskip('onnxruntime')
    res = run('benchmarks/export.py', '--arch', 'test_resnet', '--size', '64', '32', '--bs', '2', '--rounds', '1', '--images', '4', '--threads', '1')
    assert res.returncode==0 and '| ONNX int8 | 2 |' in res.stdout, res.stderr[-800:]
def test_gallery_at_toy_size():
    pytest.importorskip('lancedb')
    res = run('benchmarks/gallery.py', '--n', '600', '--d', '32', '--queries', '5')
    assert res.returncode==0, res.stderr[-800:]
    for o in '600 embeddings of 32 numbers','| write','| build the index','| approximate search','| exact search','| recall of the index | @1 ': assert o in res.stdout
