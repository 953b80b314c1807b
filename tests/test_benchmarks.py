"The benchmarks run, at toy size"
import os, runpy, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest, torch

import reid_fastai.all  # noqa: F401; once for all forks
from forks import fork, leave, log_to

root = Path(__file__).parents[1]

def run(*args): return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=root, timeout=200)

def forked(script, *args, logs):
    "Run a script in a fork of this process, which saves the imports"
    if not hasattr(os, 'fork') or torch.cuda.is_available(): return run(script, *args)  # CUDA does not survive a fork
    _,status = os.waitpid(fork(_script, [script, *map(str, args)], logs/'log'), 0)
    return SimpleNamespace(returncode=os.waitstatus_to_exitcode(status), **{f'std{o}': (logs/f'log.{o}').read_text() for o in ('out','err')})

def _script(argv, log):
    log_to(log)
    os.chdir(root)
    signal.alarm(200)  # as long as `run` waits
    torch.set_num_threads(1)  # the threads of the parent do not exist in a fork
    sys.argv = argv
    try: runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as e: leave(e)

def test_gpu_script_on_the_cpu(tmp_path):
    res = forked('benchmarks/gpu.py', '--tiny', '--device', 'cpu', logs=tmp_path)
    assert res.returncode==0, res.stderr[-800:]
    for o in '| fp32 | contiguous_format |','| fp32 | channels_last |','the penalty alone','| tiny |': assert o in res.stdout
    bad = forked('benchmarks/gpu.py', logs=tmp_path) if not torch.cuda.is_available() else None
    assert bad is None or bad.returncode==1 and '\nNo GPU here' in '\n'+bad.stderr and 'Traceback' not in bad.stderr

def test_training_beside_a_bare_loop(tmp_path):
    res = forked('benchmarks/training.py', logs=tmp_path, *['--arch', 'resnet10t', '--size', '64', '32', '--bs', '8', '--steps', '1', '--rounds', '1'])
    assert res.returncode==0 and '× the bare loop' in res.stdout and 'peak memory' in res.stdout, res.stderr[-800:]

def test_how_many_identities(tmp_path):
    "Nested parts of the training identities, the same steps and the same test set; complete runs are not repeated"
    import pandas as pd
    from reid_fastai.data.synthetic import make_synthetic
    from reid_fastai.files import read_json
    data = str(make_synthetic(tiny=True))
    args = ['benchmarks/identities.py', data, '--out', tmp_path/'o', '--pretrained', 'none', '--identities', '0', '3', '6', '--set', 'arch=resnet10t', 'size=64x32', 'epochs=1', 'n_pids=4']
    res = forked(*args, logs=tmp_path)
    assert res.returncode==0 and '| identities | images | mAP | Rank-1 |' in res.stdout, res.stderr[-800:]
    df = pd.read_csv(tmp_path/'o'/'identities.csv')
    assert df.identities.tolist()==[0,3,6] and df.images.tolist()==[0,18,36]
    few,more = (read_json(tmp_path/'o'/f'{n}-all-42'/'config.json') for n in (3,6))
    assert (few['n_pids'],more['n_pids'])==(3,4) and few['steps']==more['steps']==3
    before = (tmp_path/'o'/'3-all-42'/'model.safetensors').stat().st_mtime_ns
    assert forked(*args, logs=tmp_path).returncode==0 and (tmp_path/'o'/'3-all-42'/'model.safetensors').stat().st_mtime_ns==before
    bad = forked(*args, '--identities', '99', logs=tmp_path)
    assert bad.returncode==1 and 'has 10 training identities' in bad.stderr and 'Traceback' not in bad.stderr

def test_retrieval_with_thresholds(tmp_path):
    res = forked('benchmarks/retrieval.py', '--sizes', 'tiny', '--repeats', '1', '--verify', logs=tmp_path)
    assert res.returncode==0 and 'equal error rate' in res.stdout and 'intervals' in res.stdout, res.stderr[-800:]

def test_exported_networks():
    pytest.importorskip('onnxruntime')
    res = run('benchmarks/export.py', '--arch', 'test_resnet', '--size', '64', '32', '--bs', '2', '--rounds', '1', '--images', '4', '--threads', '1')
    assert res.returncode==0 and '| ONNX int8 | 2 |' in res.stdout, res.stderr[-800:]

def test_gallery_at_toy_size(monkeypatch, capsys):
    "All steps in this process, as the database does not survive a fork"
    pytest.importorskip('lancedb')
    def here(*argv):
        monkeypatch.setattr(sys, 'argv', list(argv))
        runpy.run_path(argv[0], run_name='__main__')
    monkeypatch.setattr(subprocess, 'run', lambda argv, check: here(*argv[1:]))
    here(str(root/'benchmarks/gallery.py'), '--n', '600', '--d', '32', '--queries', '5')
    out = capsys.readouterr().out
    for o in '600 embeddings of 32 numbers','| write','| build the index','| approximate search','| exact search','| recall of the index | @1 ': assert o in out
