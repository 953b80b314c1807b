"A few of the attacks of `make attack`, and that its judgements can fail"
import os, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork') or not hasattr(os, 'mkfifo'), reason='attacks need fork, signals and FIFOs')
here = Path(__file__).parent
sys.path.insert(0, str(here))
env = dict(os.environ)
if hasattr(os, 'fork'): from attack import KINDS, Failed, close, figures, numbers, one_line, same
os.environ.clear(); os.environ.update(env)  # importing `attack` sets the threads of its children

def test_a_few_attacks():
    "The kinds that are quick; the seed is fixed, so the attacks are the same each time"
    kinds = 'kill train,files of a run,images,tables,options'
    res = subprocess.run([sys.executable, here/'attack.py', '--only', kinds, '--kills', '2', '--inputs', '16', '--jobs', str(min(2, os.cpu_count()))], capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    assert re.search(r'^all +18 +18 +0 +0 +0 +0$', res.stdout, re.M), res.stdout

def test_numbers_of_attacks_add_up():
    n = numbers(KINDS, SimpleNamespace(kills=100, inputs=1000, disks=24))
    for group,total in dict(kills=100, inputs=1000, disks=24).items(): assert sum(v for k,v in n.items() if KINDS[k].group==group)==total
    assert min(n.values())>=10

def said(err, code=2, out=''): return SimpleNamespace(argv=['reid-train'], code=code, err=err, out=out)

def test_a_proper_refusal_is_accepted():
    assert one_line(said('reid-train: error: /a/config.json is damaged.\n'), ['config.json'])

@pytest.mark.parametrize('res,what,why', [
    (said('', code='hang'), 'hang', '60 s'), (said('Traceback (most recent call last):\nKeyError: 1\n', code=1), 'traceback', 'KeyError: 1'), (said('reid-train: error: config.json', code=1), 'message', 'exit 1'),
    (said('usage: …\nreid-train: error: config.json'), 'message', '2 lines'), (said('config.json is damaged'), 'message', '22 characters'), (said(f'reid-train: error: config.json {"x"*300}'), 'message', 'characters'),
    (said('reid-train: error: damaged'), 'message', 'is named'), (said(''), 'message', '0 lines')])
def test_what_is_no_proper_refusal(res, what, why):
    with pytest.raises(Failed) as e: one_line(res, ['config.json'])
    assert e.value.what==what and why in e.value.why

def test_other_figures_are_found(tmp_path):
    "Durations and checksums may differ, a last digit may not"
    def run(d, mAP, train_loss, secs):
        (tmp_path/d).mkdir()
        (tmp_path/d/'results.json').write_text(f'{{"mAP": {mAP}, "seconds_per_epoch": {secs}, "sha256": "{secs}"}}')
        (tmp_path/d/'metrics.csv').write_text(f'epoch,train_loss,seconds\n1,{train_loss},{secs}\n')
        return figures(tmp_path/d)
    right = run('a', 29.16, 4.5741, 1)
    same(run('b', 29.16, 4.5741, 2), right)
    for d,args,file in (('c', (29.17, 4.5741, 1), 'results.json'), ('d', (29.16, 4.5742, 1), 'metrics.csv')):
        with pytest.raises(Failed) as e: same(run(d, *args), right)
        assert file in e.value.why
    (tmp_path/'b'/'.metrics.csv.x').write_text('')
    with pytest.raises(Failed) as e: same(figures(tmp_path/'b'), right)
    assert 'left behind' in e.value.why

def test_other_weights_are_found(tmp_path):
    "Rounding may differ between numbers of processes, a step may not"
    def run(d, w, lam):
        (tmp_path/d).mkdir()
        save_file({'w': np.array([1,w], dtype='float32')}, tmp_path/d/'model.safetensors')
        (tmp_path/d/'lambdas.csv').write_text(f'epoch,lam\n1,{lam}\n')
        return tmp_path/d
    right = run('a', 1, .005)
    close(run('b', 1.001, .00500001), right)
    for d,args,what in (('c', (1.01, .005), 'weights differ by 7.1e-03'), ('d', (1, .0051), 'λ differs by 2.0e-02')):
        with pytest.raises(Failed) as e: close(run(d, *args), right)
        assert e.value.why==what
