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

def test_gallery_at_toy_size():
    pytest.importorskip('lancedb')
    res = run('benchmarks/gallery.py', '--n', '600', '--d', '32', '--queries', '5')
    assert res.returncode==0, res.stderr[-800:]
    for o in '600 embeddings of 32 numbers','| write','| build the index','| approximate search','| exact search','| recall of the index | @1 ': assert o in res.stdout
