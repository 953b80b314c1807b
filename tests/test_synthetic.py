"The synthetic benchmark: bytes, layout, and what is left of an interrupted rendering"
import hashlib

import pytest
from PIL import Image

import reid_fastai.data.synthetic as synthetic
from reid_fastai.data.datasets import Market1501
from reid_fastai.data.synthetic import *

def digest(path):
    h = hashlib.sha256()
    for o in sorted(path.rglob('*.jpg')): h.update(str(o.relative_to(path)).encode()+o.read_bytes())
    return h.hexdigest()

@pytest.fixture
def small(monkeypatch):
    "The full benchmark with fewer people, and so with a pool of processes"
    monkeypatch.setattr(synthetic, '_full', dict(size=(32,16), train=6, per_train=8, test=3, queries=3, per_test=6, distractors=5, junk=3))

def test_bytes_follow_from_the_seed_and_not_from_the_processes(tmp_path, small):
    one,two,other = (make_synthetic(tmp_path/n, seed=s, n_jobs=j) for n,s,j in (('1',7,1), ('2',7,2), ('3',8,1)))
    assert digest(one)==digest(two)!=digest(other)

def test_layout_and_counts(tmp_path, small):
    c = Market1501(make_synthetic(tmp_path/'s')).counts()
    assert c.loc['train'].tolist()==[48,6,c.cameras['train'],0,0]
    assert c.loc['query'].tolist()[:2]==[9,3] and c.loc['gallery'].tolist()==[26,3,c.cameras['gallery'],5,3]

def test_every_query_has_a_match_in_another_camera(tmp_path, small):
    s = Market1501(make_synthetic(tmp_path/'s'))
    for q in s.query.itertuples(): assert ((s.gallery.pid==q.pid)&(s.gallery.camid!=q.camid)).any()

def test_tiny(tmp_path):
    p = make_synthetic(tmp_path/'t', tiny=True)
    assert len(list(p.rglob('*.jpg')))==60+6+24+6 and {Image.open(o).size for o in p.rglob('*.jpg')}=={(32,64)}

def test_complete_folder_is_returned_at_once(tmp_path, monkeypatch):
    p = make_synthetic(tmp_path/'t', tiny=True)
    monkeypatch.setattr(synthetic, '_render', lambda *a: pytest.fail('rendered again'))
    assert make_synthetic(p, tiny=True)==p
    with pytest.raises(ValueError, match='is not the benchmark asked for'): make_synthetic(p, tiny=True, seed=1)

def test_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    take,n = synthetic._take,[]
    def twice(*args):
        n.append(1)
        if len(n)>2: raise KeyboardInterrupt
        take(*args)
    monkeypatch.setattr(synthetic, '_take', twice)
    with pytest.raises(KeyboardInterrupt): make_synthetic(tmp_path/'t', tiny=True)
    assert not list(tmp_path.iterdir())

def test_second_to_finish_takes_the_first(tmp_path, monkeypatch):
    render = synthetic._render
    def slow(root, *args):
        render(root, *args)
        monkeypatch.setattr(synthetic, '_render', render)
        make_synthetic(tmp_path/'t', tiny=True)  # the other process is quicker
    monkeypatch.setattr(synthetic, '_render', slow)
    p = make_synthetic(tmp_path/'t', tiny=True)
    assert [o.name for o in tmp_path.iterdir()]==['t'] and (p/'synthetic.json').exists()

def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path/'mine').write_text('precious')
    with pytest.raises(ValueError, match='Name another folder'): make_synthetic(tmp_path, tiny=True)
    assert (tmp_path/'mine').read_text()=='precious'
