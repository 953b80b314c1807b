"The synthetic benchmark: bytes, layout, and what is left of an interrupted rendering"
import hashlib

import pytest
from PIL import Image

import reid_fastai.data.synthetic as synthetic
from reid_fastai.data.datasets import Market1501, read_dataset
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
    monkeypatch.setattr(synthetic, '_render', lambda *a: pytest.fail('render it again'))
    assert make_synthetic(p, tiny=True)==p
    with pytest.raises(ValueError, match='is not the requested benchmark'): make_synthetic(p, tiny=True, seed=1)

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
    with pytest.raises(ValueError, match='Pass another folder'): make_synthetic(tmp_path, tiny=True)
    assert (tmp_path/'mine').read_text()=='precious'

def refused(f, *words):
    with pytest.raises(ValueError) as e: f()
    s = str(e.value)
    assert isinstance(e.value, ValueError) and len(s)<=300 and '\n' not in s and all(o in s for o in words), s

@pytest.mark.parametrize('how', ['empty','gone','extra','folder'])
def test_damaged_folder_is_not_taken_for_whole(how, tmp_path, monkeypatch):
    p = make_synthetic(tmp_path/'t', tiny=True)
    bad = sorted((p/'query').iterdir())[2]
    if how=='empty': bad.write_bytes(b'')
    elif how=='gone': bad.unlink()
    elif how=='folder': (p/'query').rename(p/'elsewhere')
    else: (p/'query'/'0001_c1s1_000000_99.jpg').write_bytes(b'x')
    refused(lambda: make_synthetic(p, tiny=True), str(p), 'query/', 'Remove')
    monkeypatch.setattr(synthetic, 'cache_home', lambda: tmp_path)
    (p/'synthetic.json').exists() and p.rename(tmp_path/'synthetic-tiny-v1-seed42')
    again = make_synthetic(tiny=True)  # the cache is ours: what is damaged there is rendered again
    assert digest(again)==digest(make_synthetic(tmp_path/'other', tiny=True)) and not any(o.name.startswith('.') for o in tmp_path.iterdir())

def test_hostile_arguments(tmp_path):
    for seed in (-1, 10**20, 2.5, '4', None): refused(lambda: make_synthetic(tmp_path/'t', tiny=True, seed=seed), f'seed={seed}'[:20])
    for n in (0, -1, 1.5): refused(lambda: make_synthetic(tmp_path/'t', n_jobs=n), f'n_jobs={n}')
    refused(lambda: make_synthetic(tmp_path/('x'*5000), tiny=True), 'xxx')
    (tmp_path/'file').write_text('mine')
    refused(lambda: make_synthetic(tmp_path/'file', tiny=True), 'file')
    p = make_synthetic(tmp_path/'d', tiny=True)
    (p/'synthetic.json').write_bytes(b'\xff\xfe')
    refused(lambda: make_synthetic(p, tiny=True), 'Pass another folder')
    assert not (tmp_path/'t').exists()

def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert make_synthetic('~/toy', tiny=True)==tmp_path/'toy' and len(read_dataset('~/toy').df)
