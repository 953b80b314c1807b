"The gallery and its commands: answers beside a slow oracle, kills, two writers, damaged tables, and what bad input gets"
import base64, hashlib, io, pickle, random, re, shlex, shutil, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

pytest.importorskip('lancedb', reason="a gallery needs pip install '.[search]'")
from browser import Browser, needs_browser
from reid_fastai import cli_search
from reid_fastai.cli_search import *
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.export import load_embedder, save_model
from reid_fastai.files import read_json, write_json
from reid_fastai.gallery import *
from reid_fastai.models import build_reid_net

def make_model(path, seed=0, size=(64,32)):
    torch.manual_seed(seed)
    return save_model(build_reid_net('resnet10t', n_classes=5, regions=0, pretrained=False, size=size), path, size=size)

@pytest.fixture(scope='module')
def data(): return make_synthetic(tiny=True)

@pytest.fixture(scope='module')
def files(data): return sorted((data/'bounding_box_test').glob('[0-9]*.jpg'))

@pytest.fixture(scope='module')
def made(files, tmp_path_factory):
    "A run folder, and a gallery by its model; tests work on copies"
    d = tmp_path_factory.mktemp('made')
    make_model(d/'run'/'model.safetensors')
    g = Gallery.create(d/'run', d/'people').add(files, pid=[o.name[:4] for o in files], camid=[int(o.name[6]) for o in files], time=range(len(files)))
    assert len(g)==len(files)
    return d

@pytest.fixture
def home(made, tmp_path, monkeypatch):
    "A copy of run and gallery, and the folder to work in"
    for o in ('run','people'): shutil.copytree(made/o, tmp_path/o)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def vectors(home, n=0, d=None, metric='cosine', seed=0):
    "A gallery of embeddings: clusters with many exact ties"
    g = Gallery.create(home/'run', home/f'vectors-{metric}', metric)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40,512))[rng.integers(0, 40, n)]+.3*rng.normal(size=(n,512))
    x[1::2] = x[::2][:n//2]
    x = torch.from_numpy(x.astype(np.float32))
    if n: g.add(x, camid=rng.integers(0, 4, n), time=rng.uniform(0, 100, n))
    return g,x

def tree(d): return {str(o.relative_to(d)): hashlib.sha256(o.read_bytes()).hexdigest() if o.is_file() else 'folder' for o in sorted(Path(d).rglob('*'))}

# ---- answers

@pytest.mark.parametrize('metric', ['cosine','euclidean'])
def test_exact_search_beside_a_sorted_oracle(metric, home):
    g,x = vectors(home, 400, metric=metric)
    df = g.table.to_pandas()
    q = x[[3,50,399]]+.1*torch.randn(3, 512)
    a,b = q.double().numpy(),x.double().numpy()
    if metric=='cosine': D = 1-(a/np.linalg.norm(a, axis=1, keepdims=True))@(b/np.linalg.norm(b, axis=1, keepdims=True)).T
    else: D = np.linalg.norm(a[:,None]-b[None], axis=2)
    D = D.round(9)  # twins are equal whatever BLAS did
    for where,ok in ((None, np.ones(400, bool)), ('camid != 3 and time > 50', ((df.camid!=3) & (df.time>50)).to_numpy())):
        res,rows = g.search(q, 30, where),ok.nonzero()[0]
        order = np.argsort(D[:,rows], axis=1, kind='stable')[:,:30]
        assert np.array_equal(res.df.time.to_numpy().reshape(3,30), df.time.to_numpy()[rows][order])
        assert np.allclose(res.df.distance.to_numpy().reshape(3,30), np.take_along_axis(D[:,rows], order, 1), atol=2e-4 if metric=='euclidean' else 1e-6)
        assert res.how.startswith('exact search among') and (where is None or str(len(rows)) in res.how)

def test_fewer_than_k_pass_the_condition(home):
    g = Gallery.load(home/'people')
    res = g.search(torch.randn(1, 512), 9, 'time < 3')
    assert len(res.df)==3 and res.df['rank'].tolist()==[1,2,3]

def test_condition_is_read_to_its_end(home):
    "The database reads `camid = 3 time > 5` as `camid = 3`"
    g = Gallery.load(home/'people')
    assert g.table.count_rows('camid = 3 time > 5')==g.table.count_rows('camid = 3')>0
    for o in ('camid = 3 time > 5', 'camid = 3) nonsense', 'camid = 3; time > 5', '', 'camid', 'nobody = 3'):
        with pytest.raises(ValueError, match='where='): g.search(torch.randn(1, 512), 1, o)

def test_boxes_are_cut_out(home, files):
    frame = Image.new('RGB', (120,80), 'gray')
    frame.paste(Image.open(files[0]), (10,5))
    frame.paste(Image.open(files[1]), (60,12))
    frame.save('frame.png')
    w,h = Image.open(files[0]).size
    Path('t.csv').write_text(f'path;x1;y1;x2;y2;time;camid;pid\nframe.png;10;5;{10+w};{5+h};1.5;4;\nframe.png;60;12;{60+w};{12+h};1.5;4;Ann\n')
    reid_embed(home/'run', out=home/'people', boxes='t.csv', append=True, quiet=True)
    df = Gallery.load(home/'people').table.to_pandas().tail(2)
    want = load_embedder(home/'run'/'model.safetensors')([Image.open(o) for o in files[:2]])
    assert np.allclose(np.stack(df.vector), want, atol=1e-4)
    assert df.x1.tolist()==[10,60] and df.camid.tolist()==[4,4] and df.pid.tolist()[1]=='Ann' and pd.isna(df.pid.tolist()[0])
    assert [Image.open(io.BytesIO(o)).size for o in df.thumbnail]==[(w,h)]*2

def test_index_finds_what_is_near_and_says_that_it_is_approximate(home):
    g,x = vectors(home, 600)
    with pytest.raises(ValueError, match='has no index'): g.search(x[:2], exact=False)
    g.index()
    g.add(x[:1]*2+.5, time=1234)  # after the index: found all the same
    exact,near = (g.search(x[::20], 1, exact=o) for o in (True,False))
    assert (exact.df.distance-near.df.distance).abs().lt(1e-4).mean()>=.95
    assert 'approximate' in near.how and 'exact' not in near.how and 'exact' in exact.how
    assert g.search(x[:1]*2+.5, 1, exact=False).df.time[0]==1234
    assert set(g.search(x[:3], 5, 'camid = 2', exact=False).df.camid)=={2}

def test_a_larger_gallery_takes_more_candidates(home, monkeypatch):
    "With the same number for all sizes, recall at 1 million was 0.85"
    from lancedb.query import LanceVectorQueryBuilder
    g,x = vectors(home, 40)
    g.index()
    asked,ef = [],LanceVectorQueryBuilder.ef
    monkeypatch.setattr(LanceVectorQueryBuilder, 'ef', lambda self, n: asked.append(n) or ef(self, n))
    for n,k in ((40,5),(10**6,5),(10**6,300)):
        monkeypatch.setattr(Gallery, '__len__', lambda self: n)
        g.search(x[:1], k, exact=False)
    assert asked==[150,750,900]

def test_versions_and_another_handle(home):
    a,b = Gallery.load(home/'people'),Gallery.load(home/'people')
    n = len(a)
    assert b.search(torch.ones(1, 512), 1).how.split()[3]==str(n)
    a.add(torch.randn(5, 512))
    assert b.search(torch.ones(1, 512), 1).how.split()[3]==str(n+5)
    a.restore(2)
    assert len(Gallery.load(home/'people'))==n and b.search(torch.ones(1, 512), 1).how.split()[3]==str(n)
    assert b.versions().images.tolist()[-2:]==[n+5,n]

def test_at_a_url(home, files):
    "In place of object storage, which needs a network: create, add, load and search, in Python and by commands"
    g = Gallery.create(home/'run', url := f'file://{home}/far/people').add(files[:4])
    assert len(Gallery.load(url).add(files[4:], pid='Ann'))==len(files) and (home/'far'/'people').is_dir()
    assert g.search(files[5], 1).df.pid[0]=='Ann'
    reid_embed(home/'run', [str(o) for o in files[:3]], out=(url := f'file://{home}/far/new'), quiet=True)
    reid_embed(home/'run', [str(o) for o in files[3:5]], out=url, append=True, quiet=True)
    assert reid_search(url, [str(files[4])], k=1, quiet=True).df.path[0]==str(files[4]) and len(Gallery.load(url))==5
    with pytest.raises(ValueError, match='exists already.*--append'): reid_embed(home/'run', [str(files[0])], out=url, quiet=True)
    with pytest.raises(ValueError, match='far/none does not exist.*makes a gallery'): Gallery.load(f'file://{home}/far/none')
    with pytest.raises(ValueError, match='inside the gallery'): reid_search(url, [str(files[4])], k=1, csv='far/new/f.csv')

def test_exact_search_beyond_the_memory(home, monkeypatch):
    from reid_fastai import gallery_store as mod
    g,x = vectors(home, 500)
    want = g.search(x[:1], 2)
    monkeypatch.setattr(mod, 'free_memory', lambda: 4*500*x.shape[1]+200_000_000)
    g = Gallery.load(g.path)
    assert g.search(x[:1], 2).df.equals(want.df)
    g.add(x[:1])
    with pytest.raises(ValueError, match=r'501 embeddings.* GB; .* GB are free\. Search with the index'): g.search(x[:1], 2)
    assert len(g.index().search(x[:1], 2, exact=False).df)==2

def test_embeddings_are_read_in_slices(home, monkeypatch):
    "The checksums of all batches kept the batches in memory: 0.49 GB of embeddings took 1.18 GB"
    from reid_fastai import gallery_store as mod
    g,x = vectors(home, 100)
    want = g.search(x[:5], 20, 'time > 30').df
    monkeypatch.setattr(mod, '_slice', 16)
    read,sizes = mod._vectors_proof,[]
    monkeypatch.setattr(mod, '_vectors_proof', lambda t: sizes.append(len(t)) or read(t))
    g = Gallery.load(g.path)
    assert g.search(x[:5], 20, 'time > 30').df.equals(want) and sizes==6*[16]+[4]
    g.delete('camid = 2 or time < 5').add(x[:3]+.5, time=50)
    after = g.search(x[:5], len(g)).df
    monkeypatch.undo()
    assert Gallery.load(g.path).search(x[:5], len(g)).df.equals(after)

def test_search_after_deletion_and_compaction(home):
    "Rows get other ids; earlier versions are dropped, with the names in them"
    g,x = vectors(home, 60)
    for i in range(3): g.add(x[i::3]*1.5+i, time=200+i, pid=f'person-{i}')
    g.delete("camid = 1 or pid = 'person-1'")
    files = lambda: b''.join(o.read_bytes() for o in Path(g.path).rglob('*') if o.is_file())
    want,n = g.search(x[:4], 5, 'time > 30').df,len(g)
    assert set(g.search(x[:4], 5, 'time > 30').df.pid.dropna())<={'person-0','person-2'} and b'person-1' in files()
    assert len(Gallery.load(g.path).versions())==6
    assert len(g.optimize())==n and len(g.versions())>=6
    assert g.search(x[:4], 5, 'time > 30').df.equals(want) and Gallery.load(g.path).search(x[:4], 5, 'time > 30').df.equals(want)
    assert len(g.optimize(days=0).versions())==1 and b'person-1' not in files()
    assert g.search(x[:4], 5, 'time > 30').df.equals(want) and set(g.search(x[:1], n).df.camid.dropna())=={0,2,3}
    with pytest.raises(ValueError, match='where='): g.delete('pid = 7')
    with pytest.raises(ValueError, match='days=-1'): g.optimize(-1)

def test_deleted_images_leave_the_disk(home):
    "The database itself does not rewrite a file of which less than a tenth is deleted"
    g,x = vectors(home, 60)
    g.add(x[:2], pid='someone').index()
    g.table.optimize()
    stored = lambda: any(b'someone' in o.read_bytes() for o in Path(g.path).rglob('*') if o.is_file())
    want = g.search(x[:5], 5, 'time > 10').df
    assert stored() and len(g.delete("pid = 'someone'"))==60 and len(g.optimize(days=0).versions())==1 and not stored()
    assert g.search(x[:5], 5, 'time > 10').df.equals(want) and g.indexed==60 and g.search(x[:5], 1, exact=False).df.distance.max()<1e-3

def test_has_what_was_added_under_another_name(home, monkeypatch):
    g,x = vectors(home, 3)
    monkeypatch.chdir(home)
    g.add(x, path=['a.jpg','b/../c.jpg',home/'d.jpg'])
    assert g.has([home/'a.jpg', 'c.jpg', 'd.jpg', 'e.jpg'])==[True]*3+[False] and g.has('a.jpg')==[True]
    with pytest.raises(ValueError, match='zip'): g.has(['a.jpg','c.jpg'], [None])

def test_row_ids_in_any_order(home):
    "`where` with embeddings whose row ids do not ascend"
    g,x = vectors(home, 50)
    want = g.search(x[:3], 5, 'camid = 2').df
    version,v,size,ids = g._read
    o = torch.randperm(50)
    g._read = version,v[o],size[o],ids[o.numpy()]
    assert g.search(x[:3]+.01, 5, 'camid = 2').df.distance.size==15 and set(g.search(x[:3], 5, 'camid = 2').df.camid)=={2}
    assert np.allclose(g.search(x[:3], 5, 'camid = 2').df.distance, want.distance, atol=1e-6)

def test_index_says_what_it_holds(home):
    g,x = vectors(home, 300)
    g.index()
    assert '(HNSW)' in g.search(x[:1], exact=False).how
    g.add(x[:20]+.1)
    assert 'HNSW of 300 of 320 images' in g.search(x[:1], exact=False).how
    assert g.optimize().indexed==320 and '(HNSW)' in g.search(x[:1], exact=False).how

@pytest.mark.parametrize('exact', [True, False])
@pytest.mark.parametrize('where', [None, 'camid = 2'])
def test_a_search_opens_the_table_once(where, exact, home, monkeypatch):
    "To see whether the gallery was changed or replaced; in object storage it takes long"
    g,x = vectors(home, 50)
    g.index()
    opened,newest = [],Gallery._newest
    monkeypatch.setattr(Gallery, '_newest', lambda self: opened.append(1) or newest(self))
    assert len(g.search(x[:2], 1, where, exact).df)==2 and opened==[1]

def test_photos_with_boxes(home, files):
    frame = Image.new('RGB', (120,80), 'gray')
    frame.paste(im := Image.open(files[7]), (30,10))
    frame.save('frame.png')
    w,h = im.size
    res = reid_search(home/'people', ['frame.png'], k=1, box=f'30,10,{30+w},{10+h}', quiet=True)
    assert res.df.path[0]==str(files[7]) and Image.open(io.BytesIO(res.q_thumbs[0])).size==(w,h)
    res = Gallery.load(home/'people').search([files[3],'frame.png'], 1, boxes=[None,(30,10,30+w,10+h)])
    assert res.df.path.tolist()==[str(files[3]),str(files[7])]

def test_names_that_are_partly_known_numbers(home, files, monkeypatch):
    "pandas writes 7.0 for 7 if a number of the column is missing"
    df = pd.DataFrame(dict(path=[str(o) for o in files[:3]], pid=[7,None,12]))
    df.to_csv('t.csv', index=False)
    assert '7.0' in Path('t.csv').read_text()
    reid_embed(home/'run', out='new', boxes='t.csv', quiet=True)
    res = reid_search('new', [str(files[0])], k=1, pid='7', where="pid = '7'", quiet=True)
    assert res.df.match.tolist()==[True] and Gallery.load('new').table.to_arrow()['pid'].to_pylist()==['7',None,'12']
    monkeypatch.setattr(cli_search, '_part', 1)  # names must not depend on what is committed together
    pd.DataFrame(dict(path=df.path, pid=[7,None,12])).to_csv('t.csv', index=False, na_rep='NA')
    reid_embed(home/'run', out='third', boxes='t.csv', quiet=True)
    assert Gallery.load('third').table.to_arrow()['pid'].to_pylist()==['7',None,'12']
    df.assign(pid=['Ann','7.0','7.0']).to_csv('t.csv', index=False)
    reid_embed(home/'run', out='other', boxes='t.csv', quiet=True)
    assert Gallery.load('other').table.to_arrow()['pid'].to_pylist()==['Ann','7.0','7.0']

# ---- several writers, kills, damage

WRITERS = """
import os, signal, sys, time, torch
from pathlib import Path
from reid_fastai.gallery import Gallery
home = Path(sys.argv[1])
def write(name, n):
    g = Gallery.load(home/'people')
    for i in range(n):
        g.add(torch.randn(50, 512), pid=f'{name}-{i}')
        with open(home/f'{name}.txt', 'a') as f: f.write('.')
def start(name, n):
    if pid := os.fork(): return pid
    code = 1
    try: write(name, n); code = 0
    finally: os._exit(code)
a,b,c = [start(*o) for o in (('a',8), ('b',8), ('c',10**6))]
said = home/'c.txt'
while not said.exists() or said.stat().st_size<5: time.sleep(.005)
time.sleep(float(sys.argv[2]))
os.kill(c, signal.SIGKILL)
sys.exit(max(os.waitpid(o, 0)[1] for o in (a,b)))
"""

def test_two_writers_and_a_killed_one(home):
    "Everything that two processes add at once is there; of one that is killed, whole additions alone"
    n = len(Gallery.load(home/'people'))
    res = subprocess.run([sys.executable, '-c', WRITERS, str(home), str(random.random()*.02)], capture_output=True, text=True, timeout=200)
    assert res.returncode==0, res.stderr
    g = Gallery.load(home/'people')
    counts = g.table.to_pandas().pid.value_counts()
    assert all(counts[f'{o}-{i}']==50 for o in 'ab' for i in range(8))
    mine = counts[[o for o in counts.index if o.startswith('c-')]]
    assert len(mine)>=(home/'c.txt').stat().st_size>=5 and (mine==50).all()
    assert len(g)==n+50*(16+len(mine))
    assert len(g.search(torch.ones(1, 512), 3).df)==3
    assert len(g.add(torch.ones(2, 512)))==n+50*(16+len(mine))+2

def test_interrupted_embedding_leaves_nothing(home, data, files, monkeypatch):
    from reid_fastai import gallery_store as mod
    class Stop:
        def __init__(self, e): self.e,self.size,self.n = e,e.size,0
        def __call__(self, x, **kw):
            self.n += 1
            if self.n>1: raise KeyboardInterrupt
            return self.e(x, **kw)
    monkeypatch.setattr(mod, 'load_embedder', lambda *a: Stop(load_embedder(*a)))
    before = tree(home)
    with pytest.raises(KeyboardInterrupt): reid_embed(home/'run', [str(o) for o in files], out=home/'new', quiet=True)
    assert tree(home)==before
    monkeypatch.setattr(mod, 'load_embedder', lambda *a: (s := Stop(load_embedder(*a)), setattr(s, 'n', 1))[0])
    with pytest.raises(KeyboardInterrupt): reid_embed(home/'run', [str(data/'query')], out=home/'people', append=True, quiet=True)
    assert tree(home)==before

def test_damaged_files_never_change_an_answer(home):
    "Flipped bytes, cut and empty files: the answer of the undamaged gallery, with all columns, or a refusal"
    rng,g = random.Random(0),Gallery.load(home/'people')
    q = torch.from_numpy(np.random.default_rng(1).normal(size=(2,512)).astype(np.float32))
    ask = lambda g: g.search(q, 3, 'camid > 1')
    want,parts = ask(g),[o.relative_to(home/'people') for o in sorted((home/'people').rglob('*')) if o.is_file()]
    refused = 0
    for i in range(40):
        shutil.rmtree(home/'copy', ignore_errors=True)
        shutil.copytree(home/'people', home/'copy')
        f = home/'copy'/rng.choice([*parts, *2*[o for o in parts if o.suffix=='.lance']])
        old = bytearray(f.read_bytes())
        how = rng.choice(['flip','flip','flip','cut','empty'])
        if how=='flip': old[rng.randrange(len(old))] ^= 1<<rng.randrange(8)
        f.write_bytes({'flip':old, 'cut':old[:len(old)//2], 'empty':b''}[how])
        try: res = ask(Gallery.load(home/'copy'))
        except ValueError as e:
            refused += 1
            assert len(str(e))<=400 and 'copy' in str(e)
        else: assert res.df.equals(want.df) and res.thumbs==want.thumbs, (f, how)
    assert refused>=5

def change_row(folder, row=2, **values):
    "Write other values into a row, as damage of its file would, and keep the checksums of the old ones"
    table = Gallery.load(folder).table
    df = table.to_arrow().slice(row, 1).to_pylist()[0]
    table.delete(f'time = {row}')
    table.add([{**df, **values}])

@pytest.mark.parametrize('where', [None, "pid is not null"])
@pytest.mark.parametrize('change', [dict(pid='0009'), dict(path='/another.jpg'), dict(camid=9), dict(x1=1.), dict(pid=None), dict(thumbnail=b'')], ids=lambda o: str(next(iter(o))))
def test_damage_of_any_column_is_seen(change, where, home):
    change_row(home/'people', **change)
    g = Gallery.load(home/'people')
    with pytest.raises(ValueError, match='people is damaged: 1 of 28.*do not match their checksums'): g.search(torch.ones(1, 512), len(g), where)

def test_damage_outside_of_what_was_found(home, files):
    "A condition depends on the camera of every image"
    change_row(home/'people', camid=99)
    g = Gallery.load(home/'people')
    assert g.search(files[5], 1).df.path[0]==str(files[5])
    for o in (dict(), dict(exact=False)):
        with pytest.raises(ValueError, match='1 of 28 images do not match'): g.index().search(files[5], 1, 'camid < 9', **o)

def test_an_index_search_verifies_what_it_found(home):
    g,x = vectors(home, 80)
    v = x[6].clone(); v[0] *= -1
    row = g.table.to_arrow().slice(6, 1).to_pylist()[0]
    g.table.delete(f'time = {row["time"]}')
    g.table.add([{**row, 'vector': v.numpy()}])
    g.index()
    with pytest.raises(ValueError, match='1 of 1 found images do not match'): g.search(v[None], 1, exact=False)

def test_a_gallery_of_another_format(home):
    from reid_fastai.gallery_table import _lancedb, _schema
    meta = dict(Gallery.load(home/'people').meta, format=1)
    _lancedb().connect(str(home/'old')).create_table('images', schema=_schema(meta))
    with pytest.raises(ValueError, match=r'old is of format 1, .* reads format 2\. Embed the images anew'): Gallery.load(home/'old')

def test_short_memory_is_no_damage(home, monkeypatch):
    from reid_fastai import gallery_store as mod
    g = Gallery.load(home/'people')
    def short(t): raise MemoryError('no memory')
    monkeypatch.setattr(mod, '_vectors_proof', short)
    with pytest.raises(MemoryError): g.search(torch.ones(1, 512), 1)
    monkeypatch.setattr(type(g.table), 'count_rows', lambda *a: short(0))
    with pytest.raises(MemoryError): g.search(torch.ones(1, 512), 1, 'camid = 1')

# ---- threads and processes

def test_threads_share_a_gallery(home):
    "No thread sees damage while others add and delete"
    g,x = vectors(home, 60)
    stop = time.monotonic()+2
    def repeat(f):
        n = 0
        while time.monotonic()<stop: f(); n += 1
        return n
    works = [lambda: g.search(x[:1], k=5), lambda: g.search(x[:1], k=5, where='camid<4'), lambda: g.add(x[:2], camid=9), lambda: g.delete('camid=9')]
    with ThreadPoolExecutor(4) as ex: assert min(ex.map(repeat, works))

def test_a_gallery_is_pickled(home, files):
    g = Gallery.load('people', home/'run')
    back = pickle.loads(pickle.dumps(g))
    assert back.search(files[3], k=2).df.equals(g.search(files[3], k=2).df) and back.model==g.model

# ---- commands that are given again

def test_append_skips_what_is_there(home, files, capsys):
    Image.new('RGB', (120,80), 'gray').save('frame.png')
    Path('t.csv').write_text('path,x1,y1,x2,y2\n./frame.png,10,5,40,60\nframe.png,60,12,90,70\n')
    n = len(files)
    for _ in range(2):
        reid_embed(home/'run', [str(o) for o in files], out=home/'people', append=True)
        reid_embed(home/'run', out=home/'people', boxes='t.csv', append=True)
    assert len(Gallery.load(home/'people'))==n+2
    assert f'0 images added, {n} skipped' in (out := capsys.readouterr().out) and '0 images added, 2 skipped' in out
    Path('t.csv').write_text('path,x1,y1,x2,y2\nframe.png,10,5,40,60\nframe.png,61,12,90,70\n')
    reid_embed(home/'run', out=home/'people', boxes='t.csv', append=True)
    assert '1 images added, 1 skipped' in capsys.readouterr().out and len(Gallery.load(home/'people'))==n+3
    Path('t.csv').write_text('path,x1,y1,x2,y2\nframe.png,62,12,90,70\nframe.png,62,12,90,70\n')
    reid_embed(home/'run', out=home/'people', boxes='t.csv', append=True)
    assert '1 images added, 1 skipped' in capsys.readouterr().out and len(Gallery.load(home/'people'))==n+4

@pytest.mark.parametrize('new', [True, False])
def test_a_broken_photo_loses_only_its_part(new, home, files, monkeypatch):
    (home/'photos').mkdir()
    for i,o in enumerate(files[:11]): shutil.copy(o, home/'photos'/f'{i:02}.jpg')
    (home/'photos'/'09.jpg').write_text('no photo')
    monkeypatch.setattr(cli_search, '_part', 4)
    embed = lambda out, **kw: reid_embed(home/'run', ['photos'], out=out, quiet=True, **kw)
    if not new: Gallery.create(home/'run', home/'mine')
    with pytest.raises(ValueError, match=r'^8 of 11 images were added to mine; give the command again with --append.*09\.jpg'): embed('mine', append=not new)
    assert len(Gallery.load('mine'))==8
    (home/'photos'/'01.jpg').write_text('no photo')
    with pytest.raises(ValueError, match='01.jpg'): embed('other')
    assert not Path('other').exists()
    (home/'photos'/'09.jpg').unlink()
    assert sorted(Path(o).name for o in embed('mine', append=True).table.to_pandas().path)==[f'{i:02}.jpg' for i in range(11) if i!=9]

def test_a_table_without_boxes(home, files):
    pd.DataFrame(dict(path=[o.name for o in files[:3]], time=[1.5,2,3], camid=[4,5,6], pid=['Ann','','Bob'])).to_csv('t.csv', index=False)
    df = reid_embed(home/'run', [str(files[0].parent)], out='new', boxes='t.csv', quiet=True).table.to_pandas()
    assert df.path.tolist()==[str(o) for o in files[:3]] and df.time.tolist()==[1.5,2,3] and df.pid.fillna('').tolist()==['Ann','','Bob'] and df.x1.isna().all()
    want = load_embedder(home/'run'/'model.safetensors')(files[:3])
    assert np.allclose(np.stack(df.vector), want, atol=1e-4)

# ---- the page

def page(words):
    "The Python block of the how-to with `words`"
    text = (Path(__file__).parents[1]/'nbs'/'howto_search.md').read_text(encoding='utf-8')
    block, = [o for o in re.findall(r'```python\n(.*?)```', text, re.S) if words in o]
    return block

def test_table_from_a_mot_file(home):
    (home/'frames').mkdir()
    for i in (1,2): Image.new('RGB', (120,80), 'gray').save(home/'frames'/f'{i:06}.jpg')
    Path('mot.txt').write_text('1,7,11,6,30,40,0.9,-1,-1,-1\n2,7,-9,6,40,40,0.9,-1,-1,-1\n2,8,100,50,60.5,60,0.8,-1,-1,-1\n2,9,-50,6,40,40,0.9,-1,-1,-1\n')
    exec(page('mot.txt'), {})
    df = reid_embed('run', out='new', boxes='tracks.csv', quiet=True).table.to_pandas()
    assert df[['x1','y1','x2','y2']].to_numpy().tolist()==[[10,5,40,45], [0,5,30,45], [99,49,120,80]]
    assert df.pid.tolist()==['7','7','8'] and df.time.tolist()==[0,.04,.04] and df.camid.tolist()==[3]*3 and [Path(o).name for o in df.path]==['000001.jpg']+['000002.jpg']*2

def test_times_and_cameras_to_numbers():
    df = pd.DataFrame(dict(when=['1970-01-01T02:00:01.5+02:00','1970-01-01T00:00:03Z'], camera=['hall','door']))
    exec(page('df.when'), dict(df=df, pd=pd))
    assert df.time.tolist()==[1.5,3] and df.camid.tolist()==[2,1]

# ---- what it writes

class Page(HTMLParser):
    def __init__(self, text): super().__init__(); self.tags,self.text = [],[]; self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)

def test_page_is_whole_and_marks_what_is_known(home, data, files):
    photos = [str(o) for o in sorted((data/'query').glob('*.jpg'))[:2]]
    Gallery.load(home/'people').add(photos[0])  # of a person without a name
    res = reid_search(home/'people', photos, k=4, html='f.html', csv='f.csv', png='f.png', pid=Path(photos[0]).name[:4], quiet=True)
    text = Path('f.html').read_text(encoding='utf-8')
    page = Page(text)
    imgs = [a for t,a in page.tags if t=='img']
    assert len(imgs)==2+8 and all(a['alt'] for a in imgs)
    for a in imgs: Image.open(io.BytesIO(base64.b64decode(a['src'].removeprefix('data:image/jpeg;base64,')))).load()
    assert not re.search(r'https?://|<script|<link|@import|url\(', text) and not [a for t,a in page.tags if 'href' in a]
    marks = [re.search('[✓✗]?$', o.strip())[0] for o in page.text if re.match(r'\d\. \d', o)]
    known = res.df.pid.notna()
    assert known.sum()==7 and marks==['' if not k else '✓' if m else '✗' for k,m in zip(known, res.df.match)]
    df = pd.read_csv('f.csv')
    assert df.query_path.tolist()==[o for o in photos for _ in range(4)] and np.allclose(df.distance, res.df.distance)
    assert Image.open('f.png').size==(5*120, 2*176)
    assert '✓' not in reid_search(home/'people', photos, k=4, html='g.html', quiet=True)._repr_png_().decode('latin1') and not re.search('[✓✗]', Path('g.html').read_text(encoding='utf-8'))

@needs_browser
def test_page_in_a_browser(home, data, tmp_path_factory):
    "Images are shown, marks are beside known people only, nothing is requested, and nothing sticks out on a phone"
    photos = [str(o) for o in sorted((data/'query').glob('*.jpg'))[:2]]
    Gallery.load(home/'people').add(photos[0])  # of a person without a name
    res = reid_search(home/'people', photos, k=4, html='f.html', pid=Path(photos[0]).name[:4], where=f"path!='{100*'x'}'", quiet=True)
    with closing(Browser(home.as_uri(), tmp_path_factory.mktemp('profile'))) as browser:
        for width in (1280, 390):
            browser.see(width)
            browser.open('f.html')
            assert browser.js('document.documentElement.scrollWidth')<=width
        widths = browser.js('[...document.images].map(i => i.naturalWidth)')
        assert len(widths)==2+8 and all(widths)
        marks = browser.js('[...document.querySelectorAll("li b")].map(o => o.innerText.match(/[✓✗]?$/)[0])')
        assert marks==['' if pd.isna(o) else '✓' if o else '✗' for o in res.df.match] and set(marks)=={'✓','✗',''}
        assert not browser.errors and {o for o in browser.urls if not o.startswith('data:')}=={f'{browser.base}/f.html'}

def keep_thresholds(folder, sha, known):
    "What `reid-eval --verify` writes"
    write_json(folder/'verification.json', dict(flip=True, model=sha, metric='cosine', data='', n_match=9, n_nonmatch=99, eer=.1, thresholds={k: dict(threshold=t, tar=.5) for k,t in known.items()}, dir={}))

def test_same_or_not(home, data):
    sha = hashlib.sha256((home/'run'/'model.safetensors').read_bytes()).hexdigest()
    photo = str(sorted((data/'query').glob('*.jpg'))[0])
    plain = reid_search(home/'people', [photo], k=5, quiet=True)
    d = float(plain.df.distance[2])
    keep_thresholds(home/'run', sha, {'0.01': 2*d, '0.001': d})
    res = reid_search(home/'people', [photo], k=5, model=home/'run', same=True, quiet=True)
    assert res.df.same.tolist()==[True]*3+[False]*2 and 'false accept rate 0.001 of pairs: about 0.028 false accepts per photo among 28 images' in res.how
    assert reid_search(home/'people', [photo], k=5, model=home/'run', same=True, far=1e-2, quiet=True).df.same.all()
    write_json(home/'run'/'verification.json', dict(read_json(home/'run'/'verification.json'), flip=False))
    with pytest.raises(ValueError, match='measured with --no-flip.*reid-eval run --verify --flip$'): reid_search(home/'people', [photo], model='run', same=True)
    write_json(home/'run'/'verification.json', dict(read_json(home/'run'/'verification.json'), flip=True))
    with pytest.raises(ValueError, match='Choose one of them, or measure it: reid-eval run --verify --far 0.02'): reid_search(home/'people', [photo], model='run', same=True, far=.02)

def test_same_in_a_large_gallery(home, data):
    sha = hashlib.sha256((home/'run'/'model.safetensors').read_bytes()).hexdigest()
    photo = str(sorted((data/'query').glob('*.jpg'))[0])
    d = float(reid_search(home/'people', [photo], k=5, quiet=True).df.distance[1])
    keep_thresholds(home/'run', sha, {'0.01': 2*d})
    kept = read_json(home/'run'/'verification.json')
    ask = lambda **kw: reid_search(home/'people', [photo], k=5, model='run', same=True, open_set=True, quiet=True, **kw)
    with pytest.raises(ValueError, match='no thresholds of the open set'): ask()
    write_json(home/'run'/'verification.json', dict(kept, dir={'0.01': dict(threshold=d, dir=.5)}))
    assert ask().df.same.tolist()==[True]*2+[False]*3 and ask().how.endswith('(1 % of searches for unknown people find somebody)')
    with pytest.raises(ValueError, match='has thresholds of the open set for 0.01. Choose one of them.$'): ask(far=1e-3)
    write_json(home/'run'/'verification.json', dict(kept, n_gallery=20, dir={'0.01': dict(threshold=d, dir=.5)}))
    assert ask().how.endswith('find somebody, in a gallery of 20 images; more among 28)') and ask(where='time < 15').how.endswith('find somebody)')

# ---- the commands

@pytest.fixture
def shell(capsys, monkeypatch):
    "Runs a command as a shell would, in this process"
    def f(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: getattr(cli_search, name.replace('-', '_'))()
        return SimpleNamespace(returncode=e.value.code or 0, **capsys.readouterr()._asdict())
    return f

def test_from_a_folder_to_a_page(home, data, shell):
    res = shell('reid-embed', 'run', data/'bounding_box_test', '--out', 'mine')
    assert res.returncode==0 and '30 images added' in res.out and not res.err, res
    res = shell('reid-embed', 'run', data/'query', '--out', 'mine', '--append')
    assert res.returncode==0 and ': 36 images' in res.out, res
    photo = next((data/'query').glob('*.jpg'))
    res = shell('reid-search', 'mine', photo, '--k', 3, '--html', 'new/f.html')
    assert res.returncode==0 and 'exact search among 36 images' in res.out and Path('new/f.html').exists() and not res.err, res
    res = shell('reid-search', 'mine', photo, '--k', 3, '--index', '--where', "path like '%query%'")
    assert res.returncode==0 and 'approximate' in res.out and '6 of 36' in res.out, res
    assert {o.name for o in home.iterdir()}=={'run','people','mine','new'}

BAD = {
    'another model':       ('reid-embed other.safetensors photo.jpg --out people --append', 'another model'),
    'another model, search': ('reid-search people photo.jpg --model other.safetensors', 'another model'),
    'another size':        ('reid-embed large.safetensors photo.jpg --out people --append', 'another model'),
    'model gone':          ('reid-search orphan photo.jpg --k 1', 'which no longer exists'),
    'corrupt table':       ('reid-search corrupt photo.jpg', 'is damaged, or no gallery'),
    'damaged vectors':     ('reid-search flipped photo.jpg', 'do not match their checksums'),
    'empty folder':        ('reid-embed run empty --out new', 'holds no images'),
    'box outside':         ('reid-embed run --boxes outside.csv --out new', 'is not inside the image'),
    'box outside, append': ('reid-embed run --boxes outside.csv --out people --append', 'is not inside the image'),
    'boxes without x1':    ('reid-embed run --boxes no_x1.csv --out new', 'column x1 missing'),
    'boxes of other names': ('reid-embed run --boxes left.csv --out new', '1 of 2 rows name a file again'),
    'box without end':     ('reid-search people photo.jpg --box 0,0,inf,9', 'four numbers'),
    'index of a bad condition': ('reid-search people photo.jpg --index --where colour=3', 'colour'),
    'boxes gone':          ('reid-embed run --boxes gone.csv --out new', 'gone.csv'),
    'k too large':         ('reid-search people photo.jpg --k 29', 'k from 1 to 28'),
    'k of 0':              ('reid-search people photo.jpg --k 0', 'k=0'),
    'where does not parse': ('reid-search people photo.jpg --where camid=((', "where="),
    'where half read':     ('reid-search people photo.jpg --where "camid = 3 time > 5"', "where="),
    'where of no column':  ('reid-search people photo.jpg --where colour=3', "colour"),
    'where passes nobody': ('reid-search people photo.jpg --where camid=99', 'none of the 28 images'),
    'missing photo':       ('reid-search people nobody.jpg', 'nobody.jpg'),
    'missing photo, embed': ('reid-embed run nobody.jpg --out new', 'nobody.jpg'),
    'no image':            ('reid-embed run photo.jpg text.jpg --out new', 'text.jpg'),
    'no image, append':    ('reid-embed run photo.jpg text.jpg --out people --append', 'text.jpg'),
    'no image, search':    ('reid-search people text.jpg --html f.html', 'text.jpg'),
    'not a gallery':       ('reid-embed run photo.jpg --out run --append', 'is no gallery'),
    'not a gallery, search': ('reid-search empty photo.jpg', 'is no gallery'),
    'a file for a gallery': ('reid-search photo.jpg photo.jpg', 'is no gallery'),
    'another table':       ('reid-search table photo.jpg', 'no gallery of reid_fastai'),
    'out exists':          ('reid-embed run photo.jpg --out people', 'exists already'),
    'out is a file':       ('reid-embed run photo.jpg --out photo.jpg', 'exists already'),
    'out below a file':    ('reid-embed run photo.jpg --out photo.jpg/new', 'cannot be written'),
    'no model':            ('reid-embed nothing photo.jpg --out new', 'nothing'),
    'metric':              ('reid-embed run photo.jpg --out new --metric manhattan', 'manhattan'),
    'far of no rate':      ('reid-search people photo.jpg --same --far 1e20', 'far=1e+20'),
    'far is 0':            ('reid-search people photo.jpg --same --far 0', 'far=0'),
    'far for nothing':     ('reid-search people photo.jpg --far 0.01', 'only with `--same`'),
    'same unknown':        ('reid-search people photo.jpg --same', 'reid-eval'),
    'same of another':     ('reid-search people2 photo.jpg --same', 'belongs to another model'),
    'photo replaced':      ('reid-search people photo.jpg --png photo.jpg', 'would be replaced'),
    'model replaced':      ('reid-search people photo.jpg --model run --csv run/model.safetensors', 'would be replaced'),
    'thresholds replaced': ('reid-search people photo.jpg --model run --html run/verification.json', 'would be replaced'),
    'output in the gallery': ('reid-search people photo.jpg --png people/new/f.png', 'inside the gallery'),
    'name without quotes': ('reid-search people photo.jpg --where "pid = 7"', "text, as in pid = '7'"),
    'open set for nothing': ('reid-search people photo.jpg --open-set', 'only with `--same`'),
    'box of two photos':   ('reid-search people photo.jpg text.jpg --box 0,0,9,9', 'a single photo'),
    'box of three numbers': ('reid-search people photo.jpg --box 0,0,9', 'x1,y1,x2,y2'),
    'photo box outside':   ('reid-search people photo.jpg --box 0,0,900,9', 'is not inside the image'),
    'html is a folder':    ('reid-search people photo.jpg --html run', 'is a folder'),
}

@pytest.fixture(scope='module')
def bad_home(made, files, tmp_path_factory):
    "Galleries and files with something amiss"
    import lancedb
    d = tmp_path_factory.mktemp('bad')
    for o in ('run','people'): shutil.copytree(made/o, d/o)
    for o in ('corrupt','flipped'): shutil.copytree(made/'people', d/o)
    for o in (d/'corrupt').rglob('*.lance'):
        if o.is_file(): o.write_bytes(o.read_bytes()[:100])
    data = bytearray((part := next(o for o in (d/'flipped').rglob('*.lance') if o.is_file())).read_bytes())
    at = data.find(Gallery.load(made/'people').table.to_pandas().vector[2].tobytes()[:20])
    assert at>0
    data[at+3] ^= 8
    part.write_bytes(data)
    shutil.copy(files[0], d/'photo.jpg')
    (d/'text.jpg').write_text('my notes')
    (d/'empty').mkdir()
    make_model(d/'other.safetensors', 1)
    make_model(d/'large.safetensors', 0, (128,64))
    make_model(d/'gone'/'model.safetensors')
    Gallery.create(d/'gone', d/'orphan').add(files[:2])
    shutil.rmtree(d/'gone')
    make_model(d/'run2'/'model.safetensors', 2)
    Gallery.create(d/'run2', d/'people2').add(files[:12])
    keep_thresholds(d/'run2', '0'*64, {'0.001': .1})
    lancedb.connect(d/'table').create_table('images', [dict(a=1)])
    (d/'outside.csv').write_text('path,x1,y1,x2,y2\nphoto.jpg,0,0,8,8\nphoto.jpg,0,0,500,8\n')
    (d/'no_x1.csv').write_text('path,y1,x2,y2\nphoto.jpg,0,8,8\n')
    (d/'left.csv').write_text('path,left,top\nphoto.jpg,0,8\nphoto.jpg,9,8\n')
    return d

@pytest.mark.parametrize('case', BAD)
def test_bad_input_gets_one_line_and_changes_nothing(case, bad_home, monkeypatch, shell):
    monkeypatch.chdir(bad_home)
    before = tree(bad_home)
    cmd,words = BAD[case]
    res = shell(*shlex.split(cmd))
    lines = res.err.splitlines()
    assert res.returncode==2 and len(lines)==1 and len(lines[0])<=300 and words in lines[0] and 'Traceback' not in res.err, res.err
    assert lines[0].startswith(f'{cmd.split()[0]}: error: ') and not lines[0].endswith('…')
    assert tree(bad_home)==before

@pytest.mark.parametrize('cmd', ['reid-embed run photo.jpg --out new', 'reid-search people photo.jpg'])
def test_without_the_database(cmd, bad_home, monkeypatch, shell):
    monkeypatch.chdir(bad_home)
    monkeypatch.setitem(sys.modules, 'lancedb', None)
    res = shell(*cmd.split())
    assert res.returncode==2 and "pip install 'reid_fastai[search]'" in res.err and len(res.err.splitlines())==1, res.err
    assert not (bad_home/'new').exists()

@pytest.fixture
def small(tmp_path):
    "A gallery of nine embeddings"
    save_model(build_reid_net('resnet10t', 5, regions=0, pretrained=False), tmp_path/'m.safetensors', (64,32))
    return Gallery.create(tmp_path/'m.safetensors', tmp_path/'g').add(torch.rand(9, 512), camid=10**6+1)

def test_camera_in_full(small, tmp_path):
    small.search(torch.rand(1, 512), k=1).to_html(tmp_path/'o.html')
    assert 'camera 1000001<' in (tmp_path/'o.html').read_text(encoding='utf-8')

def test_a_zero_embedding_is_named(small):
    with pytest.raises(ValueError, match='is zero'): small.index().search(torch.zeros(1, 512), k=2, exact=False)

def test_the_model_is_read_once(home, monkeypatch):
    "As long as the file does not change"
    from reid_fastai import gallery_store
    reads = []
    monkeypatch.setattr(gallery_store, 'read_bytes', lambda f, real=gallery_store.read_bytes: reads.append(f) or real(f))
    g = Gallery.load(home/'people', home/'run')
    g.embedder
    with pytest.raises(ValueError, match='no verification.json'): g.threshold()
    assert len(reads)==1
    make_model(home/'run'/'model.safetensors', seed=1)
    with pytest.raises(ValueError, match='made by another model'): g.threshold()

def test_a_search_does_not_wait_for_the_index(home, monkeypatch):
    g = Gallery.load(home/'people', home/'run')
    building,found = threading.Event(),threading.Event()
    def slow(table, *args, real=type(g.table).create_index, **kwargs):
        building.set()
        assert found.wait(20)
        return real(table, *args, **kwargs)
    monkeypatch.setattr(type(g.table), 'create_index', slow)
    with ThreadPoolExecutor(2) as ex:
        built = ex.submit(g.index)
        assert building.wait(20)
        search = ex.submit(g.search, torch.ones(1, 512), 1)
        try: assert len(search.result(10).df)==1
        finally: found.set()
        assert built.result().indexed==len(g)

def test_a_change_needs_no_working_folder(home, monkeypatch):
    "Which may be another one than when the gallery was opened"
    monkeypatch.chdir(home)
    g = Gallery.load('people', 'run')
    (home/'other').mkdir()
    monkeypatch.chdir(home/'other')
    n = len(g)
    assert len(g.index().delete('time < 1'))==n-1==g.optimize(0).indexed

def test_a_pickled_gallery_can_search(home):
    "In a process that has not imported the module which adds the methods"
    make,args = Gallery.load(home/'people', home/'run').__reduce__()
    assert make.__module__=='reid_fastai.gallery' and len(make(*args).search(torch.ones(1, 512), 1).df)==1

def test_a_folder_under_two_names(home, files, capsys):
    "A link to a folder does not make other images of those below it"
    shutil.copytree(files[0].parent, home/'photos')
    (home/'link').symlink_to('photos')
    n = len(reid_embed(home/'run', 'photos', out=home/'g'))
    for o in ('link', home/'link', 'link/../photos'): assert len(reid_embed(home/'run', o, out=home/'g', append=True))==n
    assert Gallery.load(home/'g').has([home/'link'/files[0].name, home/'link'/'no.jpg'])==[True,False]

def test_a_box_that_is_listed_twice_is_added_once(home, files):
    Image.new('RGB', (120,80), 'gray').save('frame.png')
    Path('t.csv').write_text('path,x1,y1,x2,y2\n'+'frame.png,10,5,40,60\n'*2+'frame.png,60,12,90,70\n')
    for append in (False, True): assert len(reid_embed(home/'run', boxes='t.csv', out=home/'g', append=append))==2

def test_a_single_photo_in_python(home, files):
    want = reid_search(home/'people', [files[0]], k=2).df
    for o in (files[0], str(files[0])): assert reid_search(home/'people', o, k=2).df.equals(want)

def test_a_gallery_in_the_home_folder(home, files, monkeypatch):
    "The database replaces ~ by the home folder, and so must all else"
    monkeypatch.setenv('HOME', str(home/'me'))
    assert len(Gallery.create(home/'run', '~/a').add(files[:2]))==2==len(Gallery.load('~/a')) and (home/'me'/'a').is_dir()
    for append in (False, True): assert len(reid_embed(home/'run', files[:2], out='~/b', append=append))==2
    assert {o.name for o in (home/'me').iterdir()}=={'a','b'} and not (home/'~').exists()
    with pytest.raises(ValueError, match='exists already'): reid_embed(home/'run', files[:2], out='~/b')

@pytest.mark.parametrize('more', [0,3])
def test_a_gallery_made_anew_under_an_open_one(more, home, files):
    "Whoever has the former gallery open is told, instead of getting images of the new one by embeddings of the former, or writing into it"
    old,n = Gallery.load(home/'people'),len(files)
    for _ in range(more): old.add(torch.randn(2, 512))  # the former gallery has more versions than the new one
    old.search(torch.ones(1, 512), 1)
    shutil.rmtree(home/'people')
    Gallery.create(home/'run', home/'people').add(files[::-1])
    for f in (lambda: old.search(torch.ones(1, 512), 1), lambda: old.add(files[:2]), lambda: old.delete('true'), lambda: old.has(files), lambda: old.indexed, lambda: old.restore(2)):
        with pytest.raises(ValueError, match='was replaced.*Gallery.load'): f()
    assert len(g := Gallery.load(home/'people'))==n and g.search(files[0], n).df.path.nunique()==n

def test_a_copy_in_place_of_an_open_gallery(home, files):
    "An older copy has the same description, but fewer versions"
    old = Gallery.load(home/'people')
    shutil.copytree(home/'people', home/'copy')
    old.add(files[:2])
    old.search(torch.ones(1, 512), 1)
    shutil.rmtree(home/'people')
    (home/'copy').rename(home/'people')
    with pytest.raises(ValueError, match='was replaced'): old.search(torch.ones(1, 512), 1)
    with pytest.raises(ValueError, match='was replaced'): old.add(files[:2])

def test_a_gallery_that_cannot_be_written(home, monkeypatch):
    "Going back is refused as such; the gallery is not damaged"
    g = Gallery.load(home/'people')
    def restore(self, version): raise RuntimeError('LanceError(IO): Read-only file system (os error 30)')
    monkeypatch.setattr(type(g.table), 'restore', restore)
    with pytest.raises(ValueError, match='cannot be written.*Read-only'): g.restore(1)
