"A few of the attacks of `make attack`"
import os, subprocess, sys
from pathlib import Path

import pytest

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='attacks fork')
def test_a_few_attacks():
    res = subprocess.run([sys.executable, Path(__file__).with_name('attack.py'), '--kills', '5', '--inputs', '24', '--disks', '2', '--seed', '7'], capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr

def test_the_harness_can_fail(tmp_path):
    "Judgements refuse what they are there to refuse"
    from types import SimpleNamespace as ns
    sys.path.insert(0, str(Path(__file__).parent))
    from attack import Failed, figures, one_line, same
    good = ns(argv=['reid-eval'], code=2, out='', err='reid-eval: error: a.csv: there is no such file.\n')
    one_line(good, ['a.csv'])
    for bad in (dict(code=0), dict(code=1), dict(code='hang'), dict(err=''), dict(err=good.err*2), dict(err='Traceback (most recent call last)'), dict(err=good.err.replace('a.csv', 'a'*300))):
        with pytest.raises(Failed): one_line(ns(**{**vars(good), **bad}), ['a.csv'])
    with pytest.raises(Failed): one_line(good, ['b.csv'])
    (tmp_path/'metrics.csv').write_text('epoch,mAP,seconds\n1,30.5,2.0\n')
    was = figures(tmp_path)
    (tmp_path/'metrics.csv').write_text('epoch,mAP,seconds\n1,30.5,3.0\n')
    same(figures(tmp_path), was)
    (tmp_path/'metrics.csv').write_text('epoch,mAP,seconds\n1,30.6,2.0\n')
    with pytest.raises(Failed): same(figures(tmp_path), was)
    (tmp_path/'metrics.csv').unlink()
    with pytest.raises(Failed): same(figures(tmp_path), was)
