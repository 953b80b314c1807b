"The data modules: what is dull to read in a notebook. Every dataset here is made by the test itself, in the naming of the real ones."
import os, pickle, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import Learner, Transform, load_learner, set_seed
from fastai.callback.hook import summary  # noqa: F401, gives `Learner` its `summary`
from fastai.torch_core import TensorCategory, TensorImage
from fastcore.all import first
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

import reid_fastai.data.block as block
import reid_fastai.data.memory as memory
from reid_fastai.data.augment import EraseEach, MirrorEach, PadCropEach, erase_boxes, reid_augs
from reid_fastai.data.block import ReIDDataLoaders, read_image
from reid_fastai.data.boxes import column_values
from reid_fastai.data.csv_files import read_numbers
from reid_fastai.data.datasets import CUHK03, MSMT17, DukeMTMC, Market1501, detect_layout, layouts, read_dataset
from reid_fastai.data.image import image_list, open_image
from reid_fastai.data.sampler import PKSampler, draws
from reid_fastai.data.splits import DISTRACTOR_PID, JUNK_PID, ReIDSplits, check_protocol, count_matches

KW = dict(size=(32,16), n_pids=4, n_imgs=3, val_bs=5)

def noise(path, seed, size=(16,32), **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1],3), dtype=np.uint8)).save(path, **kw)

def make_market(root):
    "6 training identities × 5 images and one with 2; 4 queries; a gallery of 8 right answers, 2 distractors and 3 junk images"
    rows = [('bounding_box_train', p, k%3+1, k) for p in range(2,8) for k in range(5)] + [('bounding_box_train', 9, 1, k) for k in range(2)]
    rows += [('query', p, 1, 0) for p in range(11,15)] + [('bounding_box_test', p, k+2, k) for p in range(11,15) for k in range(2)]
    rows += [('bounding_box_test', p, k+1, k) for p,n in ((0,2),(-1,3)) for k in range(n)]
    for i,(d,p,c,k) in enumerate(rows): noise(root/d/f'{"-1" if p<0 else f"{p:04d}"}_c{c}s1_{k:06d}_0{i%10}.jpg', i)
    for d in ('bounding_box_train','query','bounding_box_test'): (root/d/'Thumbs.db').write_bytes(b'\xd0\xcf\x11\xe0')
    return root

@pytest.fixture(scope='module')
def market(tmp_path_factory): return make_market(tmp_path_factory.mktemp('data')/'Market')

@pytest.fixture(autouse=True)
def left_out_is_expected():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'\d+ of \d+ identities have fewer')
        yield

def make_dls(root, **kw): return ReIDDataLoaders.from_path(root, **{**KW, **kw})
@pytest.fixture
def dls(market): return make_dls(market)

# --- datasets

def test_market_counts(market):
    s = read_dataset(market)
    assert s.counts().loc['train'].to_dict()==dict(images=32, identities=7, cameras=3, distractors=0, junk=0)
    assert s.counts().loc['query'].to_dict()==dict(images=4, identities=4, cameras=1, distractors=0, junk=0)
    assert s.counts().loc['gallery'].to_dict()==dict(images=13, identities=4, cameras=3, distractors=2, junk=3)
    assert s.root==market and all((market/o).is_file() and o.endswith('.jpg') for o in s.df.path)
    assert set(s.gallery.pid)=={JUNK_PID, DISTRACTOR_PID, 11, 12, 13, 14}

def test_order_is_that_of_names(market):
    for o in ('train','query','gallery'): assert (p := getattr(read_dataset(market), o).path.tolist())==sorted(p)

def test_name_is_honest(market, monkeypatch):
    assert read_dataset(market).name=='Market'
    counts = {k: tuple(v) for k,v in read_dataset(market).counts().T.to_dict('list').items()}
    monkeypatch.setattr(Market1501, '_published', {'Market-1501': counts})
    assert read_dataset(market).name=='Market-1501' and not read_dataset(market).notes
    n,*rest = counts['query']
    monkeypatch.setattr(Market1501, '_published', {'Market-1501': {**counts, 'query': (n+1,*rest)}})
    assert read_dataset(market).name=='Market'
    assert f'other counts than Market-1501 (in brackets): query: images {n} ({n+1}).' in repr(read_dataset(market))

def test_versions_of_cuhk03_are_told_apart_by_their_counts(tmp_path, monkeypatch):
    root = touch(tmp_path/'detected', *(f'{d}/{NAMES[CUHK03]}' for d in ('bounding_box_train','query','bounding_box_test')))
    one = dict(train=(1,1,1,0,0), query=(1,1,1,0,0), gallery=(1,1,1,0,0))
    monkeypatch.setattr(CUHK03, '_published', {'a': {**one, 'gallery': (2,1,1,0,0)}, 'b': one})
    assert CUHK03(root).name=='b'
    monkeypatch.setattr(CUHK03, '_published', {'a': {**one, 'gallery': (2,1,1,0,0)}, 'b': {**one, 'gallery': (3,2,1,0,0)}})
    assert CUHK03(root).notes[0].endswith('than a (in brackets): gallery: images 1 (2).')

def test_upper_case_ending(tmp_path):
    root = make_market(tmp_path/'m')
    f = first((root/'query').glob('*.jpg')); f.rename(f.with_suffix('.JPG'))
    assert len(read_dataset(root).query)==4

def touch(root, *names):
    for o in names: (root/o).parent.mkdir(parents=True, exist_ok=True); (root/o).write_text('')
    return root

NAMES = {Market1501: '0002_c1s1_000451_03.jpg', DukeMTMC: '0002_c1_f0046182.jpg', CUHK03: '0002_c1_21.png'}
@pytest.mark.parametrize('layout', NAMES, ids=lambda o: o.name)
def test_relatives_are_told_apart(layout, tmp_path):
    root = touch(tmp_path/'x', *(f'{d}/{NAMES[layout]}' for d in ('bounding_box_train','query','bounding_box_test')))
    assert detect_layout(root) is layout and detect_layout(tmp_path) is layout
    assert read_dataset(root).df[['pid','camid']].drop_duplicates().values.tolist()==[[2,1]]
    for o in NAMES:
        if o is not layout:
            with pytest.raises(ValueError, match='is not named like|no .jpg image'): o(root)

@pytest.mark.parametrize('folders', [('train','test'), ('mask_train_v2','mask_test_v2')])
def test_msmt(folders, tmp_path):
    for o in folders: (tmp_path/o).mkdir()
    for f,t in dict(train='0000/0000_000_01_a.jpg 0\n0002/0002_000_03_a.jpg 2\n', val='0001/0001_000_02_a.jpg 1\n',
                    query='0000/0000_000_07_a.jpg 0\n', gallery='0000/0000_000_15_a.jpg 0\n').items(): (tmp_path/f'list_{f}.txt').write_text(t)
    s = read_dataset(tmp_path)
    assert detect_layout(tmp_path) is MSMT17
    # nobody is 0; test identity 0 is not training identity 0
    assert s.train.pid.tolist()==[1,3,2] and s.query.pid.tolist()==s.gallery.pid.tolist()==[4]
    assert s.train.path[0]==f'{folders[0]}/0000/0000_000_01_a.jpg' and s.query.path[0].startswith(folders[1])
    assert s.df.camid.tolist()==[1,3,2,7,15]

@pytest.mark.parametrize('line', ['0000/0000_000_01_a.jpg', '0000/0000_000_01_a.jpg x', 'photo.jpg 0'])
def test_msmt_bad_line(line, tmp_path):
    for o in ('train','test'): (tmp_path/o).mkdir()
    for o in ('train','val','query','gallery'): (tmp_path/f'list_{o}.txt').write_text(line+'\n')
    with pytest.raises(ValueError, match='list_train.txt: the line'): read_dataset(tmp_path)

def test_layout_errors(market, tmp_path):
    for f in (read_dataset, Market1501):
        with pytest.raises(ValueError, match='nowhere does not exist'): f(tmp_path/'nowhere')
        with pytest.raises(ValueError, match='is a file. Unpack'): f(market/'query'/'Thumbs.db')
    with pytest.raises(ValueError) as e: read_dataset(touch(tmp_path/'holiday', 'beach.jpg'))
    assert all(l.name in str(e.value) for l in layouts) and 'bounding_box_train' in str(e.value) and 'beach.jpg' in str(e.value)
    half = touch(tmp_path/'half', f'bounding_box_train/{NAMES[Market1501]}')
    with pytest.raises(ValueError, match='`query`, `bounding_box_test` missing'): Market1501(half)
    (tmp_path/'none').mkdir()
    with pytest.raises(ValueError, match='Found there: nothing'): read_dataset(tmp_path/'none')

def test_no_images(tmp_path):
    root = touch(tmp_path/'m', 'query/Thumbs.db', f'bounding_box_train/{NAMES[Market1501]}', f'bounding_box_test/{NAMES[Market1501]}')
    for f in (read_dataset, Market1501):
        with pytest.raises(ValueError, match='no .jpg image in `query`'): f(root)

def test_stranger_is_named(tmp_path):
    root = make_market(tmp_path/'m')
    noise(root/'bounding_box_test'/'zebra.jpg', 0)
    with pytest.raises(ValueError, match='zebra.jpg is not named like 0002_c1s1'): read_dataset(root)

def test_two_datasets_in_one_folder(tmp_path):
    for o in ('a','b'): make_market(tmp_path/o)
    with pytest.raises(ValueError, match='contains 2 datasets: a .*, b '): read_dataset(tmp_path)
    with pytest.raises(ValueError, match='contains 2 datasets of layout Market-1501: a, b'): Market1501(tmp_path)
    assert read_dataset(tmp_path/'b').root==tmp_path/'b'

# --- your own data

def make_own(root):
    "Three people to learn from, named, with 4 images each and one with a single image; two to search for"
    files = [f'train/{p}/{i}.{e}' for p in ('ann lee','bob','7b') for i,e in enumerate(('jpg','png','jpeg','JPG'))] + ['train/one/0.jpg']
    files += ['query/eve/0.jpg','query/joe/0.jpg','gallery/eve/1.jpg','gallery/eve/2.jpg','gallery/joe/1.png','gallery/zoe/1.jpg']
    for i,f in enumerate(files): noise(root/f, i)
    return root

def own_table(root, **kw):
    fs = sorted(str(o.relative_to(root)) for o in root.rglob('*') if o.is_file() and o.suffix!='.csv')
    df = pd.DataFrame(dict(path=fs, pid=[o.split('/')[1] for o in fs], split=[o.split('/')[0] for o in fs]))
    df.assign(**kw).to_csv(root/'own.csv', index=False)
    return root/'own.csv'

def test_folders_of_people(tmp_path):
    s = read_dataset(make_own(tmp_path/'own'))
    assert (len(s.train), len(s.query), len(s.gallery))==(13,2,4) and s.name=='Folders'
    names = [s.pid_names[o] for o in s.df.pid]
    assert names==[o.split('/')[1] for o in s.df.path] and min(s.pid_names)==1
    assert not s.has_cameras and s.df.camid.is_unique and 'Cameras are unknown' in repr(s)
    (tmp_path/'own'/'train'/'stray.jpg').touch()
    with pytest.raises(ValueError, match='stray.jpg is not in the folder of an identity'): read_dataset(tmp_path/'own')

def test_table_and_folders_agree(tmp_path):
    root = make_own(tmp_path/'own')
    a,b = read_dataset(root),read_dataset(own_table(root))
    cols = ['path','split','pid']
    pd.testing.assert_frame_equal(a.df[cols].sort_values('path', ignore_index=True), b.df[cols].sort_values('path', ignore_index=True))

@pytest.mark.parametrize('pids,want', [(['7','7','8','8'], [7,7,8,8]), (['007','007','7','7'], [1,1,2,2]), (['-1','0','a','a'], [1,2,3,3])])
def test_identities_of_a_table(pids, want, tmp_path):
    for i in range(4): noise(tmp_path/f'{i}.jpg', i)
    pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(4)], pid=pids, camid=['x','y','x','y'], split=['train','train','query','gallery'])).to_csv(tmp_path/'t.csv', index=False)
    s = read_dataset(tmp_path/'t.csv')
    assert s.df.pid.tolist()==want and s.df.camid.tolist()==[1,2,1,2]

def test_bad_tables(tmp_path):
    root = make_own(tmp_path/'own')
    table = own_table(root); df = pd.read_csv(table)
    def refused(df, match):
        df.to_csv(table, index=False)
        with pytest.raises(ValueError, match=match): read_dataset(table)
    refused(df.drop(columns='pid'), "columns \\['pid'\\] are missing")
    refused(df.assign(pid=[None,*df.pid[1:]]), 'rows without `pid`: 1, the first is row 0')
    refused(df.assign(camid=[None]+[1]*(len(df)-1)), 'without `camid`.*leave the column out')
    refused(df.assign(camid=-1), 'camera -1')
    refused(df.assign(path=['gone.jpg',*df.path[1:]]), '1 of 19 images do not exist, such as .*gone.jpg')
    refused(pd.concat([df, df[:1]]), 'is listed twice in split')
    refused(pd.concat([df, df[:1].assign(pid='other')]), 'is listed with 2 identities')
    other = 'query' if df.split[0]!='query' else 'gallery'
    refused(pd.concat([df, df[:1].assign(split=other)]).assign(camid=[1]*len(df)+[7]), 'is listed with 2 cameras')
    refused(df.assign(split='val'), "contains \\['val'\\]")
    table.write_text('')
    with pytest.raises(ValueError, match='cannot be read as a table'): read_dataset(table)

def test_names_that_programs_write_for_missing_values(tmp_path):
    df = pd.read_csv(table := own_table(make_own(tmp_path/'own')), dtype=str)
    a,b = df.pid.unique()[:2]
    df.assign(pid=df.pid.replace({a: 'NA', b: 'None'}), camid=['null']+['1']*(len(df)-1)).to_csv(table, index=False)
    s = read_dataset(table)
    assert {'NA','None'}<={*s.pid_names.values()} and 'null' in s.camid_names.values() and "'NA' in `pid` is a name" in s.notes[0]

def test_without_cameras_only_the_query_itself_is_ignored(tmp_path):
    "The same image in query and gallery is no answer; every other image of the person is"
    from reid_fastai.callback.evaluation import search
    root = make_own(tmp_path/'own')
    df = pd.read_csv(own_table(root))
    df = pd.concat([df, df[df.split=='query'].assign(split='gallery')], ignore_index=True)
    dls = ReIDDataLoaders.from_df(df, root, **{**KW, 'n_pids':3, 'n_imgs':4})
    t = dls.test_df
    res = search(torch.eye(len(t)), t)
    assert res.n_matches.tolist()==[2,1]
    assert list(t.split)==['query']*2+['gallery']*6
    assert 'Cameras are unknown' in repr(dls.splits)
    decoded = {str(o[1]) for b in dls.valid for o in dls.valid.decode_batch(b)}
    assert decoded=={'eve','joe','zoe'}

def test_held_out_without_cameras(tmp_path):
    from reid_fastai.data.holdout import hold_out
    held = hold_out(read_dataset(make_own(tmp_path/'own')), .5)
    assert held.query.pid.is_unique and len(held.query)==2 and held.gallery.groupby('pid').size().tolist()==[3,3]
    assert not set(held.query.path)&set(held.gallery.path) and not held.has_cameras

def test_identity_0_and_single_images_when_holding_out():
    "Training may have an identity 0, which stays; a query needs a second image of its camera"
    from reid_fastai.data.holdout import hold_out
    rows = [(f'{p}-{c}-{i}.jpg', p, c, 'train') for p in range(6) for c in (1,2) for i in range(2)]
    table = lambda rows: ReIDSplits(pd.DataFrame(rows+[('q.jpg', 9, 1, 'query'), ('g.jpg', 9, 2, 'gallery')], columns=['path','pid','camid','split']))
    for seed in range(4):
        held = hold_out(table(rows), .5, seed)
        assert 0 in set(held.train.pid) and held.train.pid.nunique()==held.query.pid.nunique()==3
    with pytest.raises(ValueError, match='no held-out identity has two images from one camera'): hold_out(table([o for o in rows if o[0].endswith('-0.jpg')]), .5)

def test_links_that_lead_up_are_not_followed(tmp_path):
    from reid_fastai.cli_search import list_images
    touch(tmp_path/'photos', 'a.jpg', 'more/b.jpg')
    for o in ('here','more/up'): (tmp_path/'photos'/o).symlink_to(tmp_path/'photos')
    (tmp_path/'photos'/'other').symlink_to(tmp_path/'photos'/'more')
    (tmp_path/'photos'/'all').symlink_to('/')
    files = list_images([tmp_path/'photos', tmp_path/'photos'/'a.jpg'])
    assert sorted(Path(o).name for o in files)==['a.jpg','b.jpg']

@pytest.mark.skipif(os.getuid()==0, reason='root can read every folder') if hasattr(os, 'getuid') else pytest.mark.skip
def test_an_unreadable_folder_is_named(tmp_path):
    from reid_fastai.cli_search import list_images
    touch(tmp_path, 'a/a.jpg', 'b/b.jpg')
    (tmp_path/'b').chmod(0)
    try:
        with pytest.raises(ValueError, match='/b cannot be read: Permission denied'): list_images([tmp_path])
    finally: (tmp_path/'b').chmod(0o755)

_group = '/sys/fs/cgroup'
@pytest.mark.parametrize('files,want', [
    ({f'{_group}/memory.max': '8000000', f'{_group}/memory.current': '6000000', f'{_group}/memory.stat': 'anon 5\nslab_inactive_file 1\ninactive_file 1000000\n'}, 3_000_000),
    ({f'{_group}/memory.max': '8000000', f'{_group}/memory.current': '9999999'}, 0),
    ({f'{_group}/memory.max': 'max', '/proc/meminfo': 'MemFree: 1 kB\nMemAvailable:  2000 kB\n'}, 2_048_000),
    ({'/proc/self/cgroup': '0::/slurm/job_7\n', f'{_group}/slurm/job_7/memory.max': '8000000', f'{_group}/slurm/job_7/memory.current': '6000000'}, 2_000_000),
    ({'/proc/self/cgroup': '0::/slurm/job_7\n', f'{_group}/slurm/job_7/memory.max': 'max', f'{_group}/slurm/memory.max': '5000000'}, 5_000_000),
    ({'/proc/self/cgroup': '4:cpu,memory:/job\n0::/\n', f'{_group}/memory/job/memory.limit_in_bytes': '8000000', f'{_group}/memory/job/memory.usage_in_bytes': '7000000'}, 1_000_000),
    ({}, None)])
def test_free_memory(files, want, monkeypatch):
    "Of a machine, a container and a job: the limit without what is used; the cache of files can be freed"
    import reid_fastai.core as core
    class Fake(type(Path())):
        def read_text(self, *args): return files[str(self)]
    monkeypatch.setattr(core, 'Path', Fake)
    monkeypatch.setattr(core.os.path, 'exists', lambda o: str(o) in files)
    assert core.free_memory()==want

def test_one_image_for_a_test_loader(market):
    dls = make_dls(market)
    file = str(dls.splits.root/dls.test_df.path[0])
    want = dls.test_dl([file]).one_batch()[0]
    for o in (file, Path(file), Image.open(file), np.array(Image.open(file).convert('RGB')), np.array([file])): assert torch.equal(dls.test_dl(o).one_batch()[0], want)

def test_the_gpu_of_a_started_process(monkeypatch):
    gpu = torch.device('cuda', 0)
    monkeypatch.setattr(block, 'default_device', lambda: gpu)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert block._own_gpu(None) is None
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert block._own_gpu(None)==torch.device('cuda', 3) and block._own_gpu(gpu) is gpu and block._own_gpu('cpu')=='cpu'
    monkeypatch.setattr(block, 'default_device', lambda: torch.device('cpu'))
    assert block._own_gpu(None) is None

@pytest.mark.skipif(os.name=='nt', reason='names are Unicode')
def test_names_that_are_not_utf8(tmp_path):
    "Tables cannot hold them"
    from reid_fastai.cli_search import list_images
    root = make_own(tmp_path/'own')
    photo = next(root.rglob('train/*/*.jpg'))
    try: os.rename(photo, os.fsencode(photo.parent)+b'/caf\xe9.jpg')
    except OSError: pytest.skip('the file system refuses such names')
    for f in read_dataset,lambda o: list_images([o]):
        with pytest.raises(ValueError, match=r'caf.udce9.jpg.*: the name is not UTF-8. Rename the file'): f(root)

def test_overlap_is_said(market):
    s = read_dataset(market)
    df = pd.concat([s.df, s.train[:1].assign(path='x.jpg', split='gallery')])
    assert '1 identities are in training and in testing' in repr(type(s)(df))

# --- sampler

@settings(deadline=None)
@given(st.integers(1,40), st.integers(1,40), st.integers(0,60), st.integers(0,9))
def test_draws(n, k, times, seed):
    if k>n: n,k = k,n
    o = draws(np.random.default_rng(seed), n, k, times)
    assert o.shape==(times,k)
    per = n//k
    for i in range(0, times, per): assert len(set(o[i:i+per].flat))==o[i:i+per].size # nothing twice between two shuffles

pk = st.tuples(st.lists(st.integers(1,9), min_size=1, max_size=25),
               st.integers(1,6), st.integers(1,4), st.integers(0,5), st.integers(0,50), st.randoms())

@settings(deadline=None)
@given(pk)
def test_pk_batches(o):
    counts,p,k,epoch,seed,rnd = o
    pids = np.repeat(np.arange(len(counts))*7+3, counts)
    rnd.shuffle(pids)
    n = sum(c>=k for c in counts)
    if n<p:
        with pytest.raises(ValueError, match=f'n_pids={p}, but only {n} of {len(counts)}'): PKSampler(pids, p, k, seed=seed)
        return
    s = PKSampler(pids, p, k, seed=seed)
    b = s.batches(epoch)
    assert b.shape==(len(s), p*k) and len(s)==max(1, sum(c for c in counts if c>=k)//(p*k))
    ids = pids[b].reshape(len(s), p, k)
    assert (ids==ids[:,:,:1]).all()
    assert all(len(set(r))==p for r in ids[:,:,0])
    assert all(len(set(r))==p*k for r in b)
    assert not set(np.unique(ids)) & set(s.left_out)
    assert s.left_out=={int(v): c for v,c in zip(np.arange(len(counts))*7+3, counts) if c<k}
    assert (b==PKSampler(pids, p, k, seed=seed).batches(epoch)).all()
    for i in np.unique(ids): # within an epoch nothing comes back before its turn
        mine = b.reshape(-1,k)[pids[b].reshape(-1,k)[:,0]==i]
        per = (pids==i).sum()//k
        for j in range(0, len(mine), per): assert len(set(mine[j:j+per].flat))==mine[j:j+per].size

def test_epochs_and_seeds_differ():
    pids = np.repeat(np.arange(20), 8)
    f = lambda seed,epoch: PKSampler(pids, 4, 2, seed=seed).batches(epoch).tolist()
    assert f(1,0)!=f(1,1) and f(1,0)!=f(2,0) and f(0,1)!=f(1,0)

def test_identities_are_drawn_evenly():
    pids = np.repeat(np.arange(7), [4,4,4,4,4,4,100])
    n = np.bincount(pids[PKSampler(pids, 3, 4, steps=700).batches()].ravel())/4
    assert n.min()>270 and n.max()<330 # 300 each, however many images they have

def test_left_out_warns():
    with pytest.warns(UserWarning, match='2 of 5 identities have fewer than 3 images and are skipped'):
        PKSampler([1,1,2,2]+[3]*3+[4]*4+[5]*5, 2, 3)

# --- augmentation

def img(b=64, h=32, w=16, seed=0): return TensorImage(torch.rand(b,3,h,w, generator=torch.Generator().manual_seed(seed)))

@pytest.mark.parametrize('dtype', [torch.float, torch.uint8])
def test_mirror_is_per_image(dtype):
    x = (img(400)*255).to(dtype)
    set_seed(0); y = MirrorEach()(x, split_idx=0)
    same,flipped = ((a==b).flatten(1).all(1) for a,b in ((y,x), (y,x.flip(-1))))
    assert (same^flipped).all() and .4<flipped.float().mean()<.6 and y.dtype==dtype and isinstance(y, TensorImage)

def test_pad_crop_oracle():
    x,p = img(50),4
    set_seed(1); y = PadCropEach(p)(x, split_idx=0)
    xp,seen = F.pad(torch.Tensor(x), [p]*4),set()
    for a,b in zip(xp, y):
        hits = [(i,j) for i in range(2*p+1) for j in range(2*p+1) if torch.equal(a[:,i:i+32,j:j+16], torch.Tensor(b))]
        assert len(hits)==1
        seen.add(hits[0])
    assert len(seen)>20 # images go their own ways
    assert {0,2*p}<={i for i,_ in seen} and {0,2*p}<={j for _,j in seen} # the extremes occur

def test_erase_is_a_rectangle_per_image():
    x,fill = img(300)*.4,(.5,.6,.7)
    set_seed(2); y = EraseEach(fill=fill)(x, split_idx=0)
    boxes = set()
    for a,b in zip(x, y):
        m = (a!=b).all(0)
        if not m.any(): assert torch.equal(a, b); continue
        ys,xs = m.nonzero(as_tuple=True)
        box = ys.min().item(),ys.max().item(),xs.min().item(),xs.max().item()
        assert m.sum()==(box[1]-box[0]+1)*(box[3]-box[2]+1)
        assert torch.allclose(torch.Tensor(b[:,m]), torch.tensor(fill)[:,None]) and torch.equal(a[:,~m], b[:,~m])
        boxes.add(box)
    assert len(boxes)>100 and .4<(y!=x).flatten(1).any(1).float().mean()<.6

@settings(deadline=None)
@given(st.integers(8,200), st.integers(8,200), st.integers(0,20))
def test_boxes_within_bounds(h, w, seed):
    torch.manual_seed(seed)
    t,d,l,r = erase_boxes(200, h, w)
    assert (t>=0).all() and (l>=0).all() and (d<=h).all() and (r<=w).all() and ((d>t)==(r>l)).all()
    eh,ew = (o[d>t].double() for o in (d-t, r-l))
    slack = (eh+.5)*(ew+.5)/(h*w) # sides are rounded
    assert (slack>=.02-1e-6).all() and ((eh-.5)*(ew-.5)/(h*w)<=.4+1e-6).all()
    assert ((eh-.5)/(ew+.5)<=1/.3+1e-6).all() and ((eh+.5)/(ew-.5).clip(1e-9)>=.3-1e-6).all()

def test_box_that_never_fits_is_empty():
    t,d,l,r = erase_boxes(50, 100, 4, area=(.9,1.), aspect=(.3,.4))
    assert (t==d).all() and (l==r).all()
    x = img(20, 100, 4)
    assert torch.equal(EraseEach(1., (.9,1.), (.3,.4))(x, split_idx=0), x)

def test_augs_follow_the_seed_and_spare_the_input():
    x = img(); x0 = x.clone()
    for f in reid_augs(3):
        set_seed(5); a = f(x, split_idx=0)
        set_seed(5); b = f(x, split_idx=0)
        c = f(x, split_idx=0)
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(x, x0) and torch.equal(f(x, split_idx=1), x)

# --- images

@pytest.mark.parametrize('orientation', range(1,9))
@pytest.mark.parametrize('ext', ['png','jpg'])
def test_exif(orientation, ext, tmp_path):
    "Stored as a camera with this orientation would store it, an image comes out upright"
    up = np.zeros((60,40,3), np.uint8); up[:30,:20] = 250; up[30:,20:,0] = 250
    T = Image.Transpose
    undo = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
            6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}[orientation]
    im = Image.fromarray(up)
    exif = Image.Exif(); exif[0x0112] = orientation
    (im.transpose(undo) if undo is not None else im).save(tmp_path/f'a.{ext}', exif=exif, **({} if ext=='png' else dict(quality=100, subsampling=0)))
    o = read_image(tmp_path/f'a.{ext}', (60,40)).transpose(1,2,0)
    assert np.abs(o.astype(int)-up).mean()<2

@pytest.mark.parametrize('mode,ext', [('L','png'), ('RGBA','png'), ('P','png'), ('1','png'), ('LA','png'), ('CMYK','jpg'),
                                      ('L','jpg'), ('RGB','webp')])
def test_modes(mode, ext, tmp_path):
    im = Image.fromarray(np.full((40,20,3), 200, np.uint8)).convert(mode)
    im.save(tmp_path/f'a.{ext}')
    o = read_image(tmp_path/f'a.{ext}', (32,16))
    assert o.shape==(3,32,16) and o.dtype==np.uint8 and (mode in ('1','P') or np.abs(o.astype(int)-200).max()<12)

def test_large_jpeg_is_close_to_the_plain_way(tmp_path):
    y,x = np.mgrid[:1600,:800]/1600
    Image.fromarray((np.stack([x+y/2, y, .5+.5*np.sin(9*x)], -1)*170).clip(0,255).astype(np.uint8)).save(tmp_path/'a.jpg', quality=95)
    want = np.asarray(Image.open(tmp_path/'a.jpg').resize((64,128), Image.Resampling.BILINEAR)).transpose(2,0,1)
    assert np.abs(read_image(tmp_path/'a.jpg', (128,64)).astype(int)-want).mean()<1.5

def broken(path, how):
    if how=='truncated': path.write_bytes(path.read_bytes()[:-len(path.read_bytes())//3])
    elif how=='text': path.write_text('not an image')
    elif how=='empty': path.write_bytes(b'')
    elif how=='gone': path.unlink()

@pytest.mark.parametrize('how', ['truncated','text','empty','gone'])
@pytest.mark.parametrize('in_memory', [True,False])
def test_broken_file_is_named(how, in_memory, tmp_path):
    root = make_market(tmp_path/'m')
    s = read_dataset(root)
    broken(root/s.train.path[7], how)
    with pytest.raises(ValueError, match=f'{s.train.path[7].split("/")[1]} cannot be read as an image'): ReIDDataLoaders.from_splits(s, **KW, in_memory=in_memory)

def test_not_an_image():
    with pytest.raises(ValueError, match='int.* cannot be read as an image'): read_image(3, (8,8))
    with pytest.raises(ValueError, match='an array of float64'): read_image(np.zeros((3,3)), (8,8))

# --- loaders

def test_pk_structure(dls):
    assert len(dls.train)==2 and dls.train.bs==12 # 30 images of eligible identities // 12
    for _ in range(3):
        bs = list(dls.train)
        assert len(bs)==2
        for x,pid,cam in bs:
            assert x.shape==(12,3,32,16) and x.dtype==torch.float32 and 0<=x.min() and x.max()<=1
            ids = pid.reshape(4,3)
            assert (ids==ids[:,:1]).all() and len(ids[:,0].unique())==4 and (pid<dls.c).all()
            assert dls.vocab[6]==9 and (pid!=6).all() # identity 9 has too few images
            assert isinstance(x, TensorImage) and isinstance(pid, TensorCategory) and isinstance(cam, TensorCategory)
    assert dls.train.epoch>=3

def order(d): return [b[1].tolist()+b[2].tolist() for b in d.train]
def test_epochs(market):
    a,b = make_dls(market),make_dls(market)
    o = [order(a) for _ in range(3)]
    assert o[0]!=o[1]!=o[2] and [order(b) for _ in range(3)]==o
    b.train.epoch = 1
    assert order(b)==o[1] # as a resumed run would have it
    assert order(make_dls(market, seed=7))!=o[0]

def test_same_seed_same_pixels(market):
    def f():
        set_seed(3)
        return torch.cat([b[0] for b in make_dls(market).train])
    assert torch.equal(f(), f())

def test_valid_is_in_order(dls):
    s = dls.splits
    want = pd.concat([s.query, s.gallery[s.gallery.pid!=JUNK_PID]], ignore_index=True)
    pd.testing.assert_frame_equal(dls.test_df, want)
    x,pid,cam = (torch.cat(o) for o in zip(*dls.valid))
    assert [dls.vocab[o] for o in pid.tolist()]==want.pid.tolist() and cam.tolist()==want.camid.tolist()
    for a,p in zip(x, want.path): assert np.array_equal((a*255).round().numpy(), read_image(s.root/p, (32,16))) # unaugmented, and the right file
    assert JUNK_PID not in dls.test_df.pid.values and DISTRACTOR_PID in dls.test_df.pid.values

def test_train_images_match_their_labels(market):
    d = make_dls(market, batch_tfms=[])
    by = {(r.pid,r.camid,read_image(d.splits.root/r.path, (32,16)).tobytes()) for r in d.splits.train.itertuples()}
    for x,pid,cam in d.train:
        for a,p,c in zip((x*255).round().byte(), pid.tolist(), cam.tolist()): assert (d.vocab[p],c,a.numpy().tobytes()) in by

def test_vocab_and_c(dls):
    assert dls.c==7 and list(dls.vocab)==[2,3,4,5,6,7,9,0,11,12,13,14] and dls.n_inp==1
    assert dls.train_ds.decode(dls.train_ds[0])[1:]==('person 2', 'camera 1')
    assert dls.valid_ds.decode(dls.valid_ds[0])[1:]==('person 11', 'camera 1')

@pytest.mark.parametrize('num_workers', [0,2])
def test_memory_and_files_agree(market, num_workers):
    a,b = (make_dls(market, batch_tfms=[], in_memory=o, num_workers=n) for o,n in ((True,0), (False,num_workers)))
    assert a.train._columns() is not None and b.train._columns() is None
    for k in (0,1):
        for p,q in zip(a[k], b[k], strict=True):
            for o,r in zip(p, q, strict=True): assert torch.equal(o, r) and type(o) is type(r)

def test_too_large_for_memory(market, monkeypatch):
    monkeypatch.setattr(memory, 'free_memory', lambda: 100_000)
    with pytest.warns(UserWarning, match='46 images of 32×16 need 0.0 GB'): d = make_dls(market, num_workers=0)
    assert d.train._columns() is not None and d.valid._columns() is None  # those of training do fit
    assert make_dls(market, in_memory=True).train._columns() is not None

def test_item_transforms_are_not_skipped(dls):
    class Black(Transform):
        order = 6
        def encodes(self, x:TensorImage): return x*0
    dls.valid.after_item.add(Black())
    assert first(dls.valid)[0].max()==0

def test_transforms_of_lists_of_images_are_not_skipped(dls):
    seen = []
    dls.valid.before_batch.add(Transform(lambda b: seen.append(len(b)) or b))
    n = len(first(dls.valid)[0])
    assert seen==[n]

def test_new(dls):
    t = dls.train.new(shuffle=False, drop_last=False, bs=7)
    assert [dls.vocab[o] for b in t for o in b[1].tolist()]==dls.splits.train.pid.tolist() and len(t)==5
    assert len(dls.train.new())==2 and first(dls.train.new())[1].reshape(4,3).unique(dim=1).shape==(4,1)
    with pytest.raises(ValueError, match='bs=7, but the batches are 4 identities × 3 images = 12'): dls.train.new(bs=7)

def test_whole_batches_for_each_process(dls, monkeypatch):
    "fastai's `DistributedDL` cuts the row numbers of an epoch into contiguous parts, one a process"
    monkeypatch.setenv('WORLD_SIZE', '3')
    assert len(dls.train)==3
    idxs = np.array(dls.train.get_idxs())
    pids = dls.splits.train.pid.values
    for part in np.split(idxs, 3): assert len(set(pids[part]))==4 and (pids[part].reshape(4,3)==pids[part].reshape(4,3)[:,:1]).all()

def test_show_batch(dls):
    import matplotlib.pyplot as plt
    for dl,want in ((dls.train,9), (dls.valid,5)): # a test batch has 5 images
        dl.show_batch()
        titles = [o.get_title() for o in plt.gcf().axes if o.get_title()]
        assert len(titles)==want and all(o.startswith('person ') and '\ncamera ' in o for o in titles)
        if dl is dls.train: assert [len(set(o.split('\n')[0] for o in titles[i:i+3])) for i in (0,3,6)]==[1,1,1]
    dls.train.show_batch(unique=True)
    assert len({o.get_title() for o in plt.gcf().axes if o.get_title()})==1
    plt.close('all')

def test_junk_is_nowhere(tmp_path, market):
    df = read_dataset(market).df
    df.loc[0,'pid'] = JUNK_PID
    d = ReIDDataLoaders.from_df(df, market, **KW)
    assert JUNK_PID not in d.vocab and len(d.train_ds)==31

@pytest.mark.parametrize('kind', [float, str, object, 'string', 'category'])
def test_junk_and_distractors_are_known_whatever_the_column_s_kind(market, kind):
    df = read_dataset(market).df
    df.loc[df.index[df.split=='gallery'][:3],'pid'] = [JUNK_PID, DISTRACTOR_PID, DISTRACTOR_PID]
    a,b = (ReIDDataLoaders.from_df(o, market, **KW) for o in (df, df.astype(dict(pid=kind, camid=kind))))
    assert list(a.test_df.pid)==list(b.test_df.pid) and list(a.test_df.camid)==list(b.test_df.camid) and a.vocab==b.vocab
    assert (a.test_df.pid==DISTRACTOR_PID).any() and JUNK_PID not in b.vocab and not b.splits.pid_names

def test_bad_input(market):
    df = read_dataset(market).df
    f = lambda df=df,**kw: ReIDDataLoaders.from_df(df, market, **{**KW, **kw})
    for size in (64, (64,), (0,32), 'ab'):
        with pytest.raises(ValueError, match='pass \\(height, width\\)'): f(size=size)
    for o in ('train','query','gallery'):
        with pytest.raises(ValueError, match=f'no images for `{o}`'): f(df[df.split!=o])
    with pytest.raises(ValueError, match='n_pids=9, but only 6 of 7'): f(n_pids=9)
    with pytest.raises(ValueError, match='0 means distractor'): f(df.assign(pid=df.pid.where(df.split!='query', 0)))
    leak = pd.concat([df, df[df.split=='query'][:1].assign(split='train')])
    with pytest.raises(ValueError, match='images both in `train` and in a test split: 1'): f(leak)
    with pytest.raises(ValueError, match='cannot be read as an image'): ReIDDataLoaders.from_df(df, **KW) # the root forgotten

def test_overlapping_identities_are_fine(market):
    df = read_dataset(market).df
    d = ReIDDataLoaders.from_df(df.assign(pid=df.pid.replace(11, 2)), market, **KW)
    assert d.c==7 and d.vocab[0]==2 and 11 not in d.vocab

# --- test loaders, export

def test_test_dl(dls, market, monkeypatch):
    want = torch.cat([b[0] for b in dls.valid])[:4]
    q = dls.splits.query
    files = [market/o for o in q.path]
    for items in (files, list(map(str, files)), [Image.open(o) for o in files], [o.read_bytes() for o in files], q, q[['path']]):
        t = dls.test_dl(items)
        b = t.one_batch()
        assert len(b)==1 and torch.equal(b[0], want) and t.n_inp==1
    x,pid,cam = dls.test_dl(q, with_labels=True, bs=2).one_batch()
    assert [dls.vocab[o] for o in pid.tolist()]==q.pid[:2].tolist() and cam.tolist()==q.camid[:2].tolist()
    assert dls.test_dl(q, with_labels=True).n_inp==1
    with pytest.raises(ValueError, match='with_labels=True needs a DataFrame'): dls.test_dl(files, with_labels=True)
    with pytest.raises(ValueError, match='Identity 99 is in no split'): dls.test_dl(q.assign(pid=99), with_labels=True).one_batch()

class Net(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(3*32*16, 7)
    def forward(self, x): return self.l(x.flatten(1))
def ce(out, pid, camid): return F.cross_entropy(out, pid.clamp(max=6))

def test_learner_and_export(dls, market, tmp_path):
    learn = Learner(dls, Net(), ce, path=tmp_path)
    with learn.no_logging(): learn.fit(1)
    assert 'Linear' in learn.summary()
    preds,(pid,cam) = learn.get_preds()
    assert [dls.vocab[o] for o in pid.tolist()]==dls.test_df.pid.tolist() and cam.tolist()==dls.test_df.camid.tolist()
    _,(pid,_) = learn.get_preds(ds_idx=0)
    assert [dls.vocab[o] for o in pid.tolist()]==dls.splits.train.pid.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.export()
        again = load_learner(tmp_path/'export.pkl')
    files = [market/o for o in dls.splits.query.path]
    assert again.dls.splits is None and again.dls.vocab==dls.vocab and again.dls.c==7 and len(again.dls.train_ds)==len(again.dls.train)==0
    assert torch.allclose(again.get_preds(dl=again.dls.test_dl(files))[0], preds[:4])
    assert torch.allclose(again.predict(files[1])[2], preds[1])
    assert torch.allclose(learn.predict(files[1])[2], preds[1])
    assert dls.valid._columns() is not None # export leaves the loaders as they were

def test_memory_is_not_pickled(dls):
    n = dls.train._columns()[0].numel()
    assert len(pickle.dumps(dls.new_empty()))<n/2
    d = pickle.loads(pickle.dumps(dls))
    assert torch.equal(d.valid.one_batch()[0], dls.valid.one_batch()[0])

def test_memory_reads_each_file_once(market, monkeypatch):
    seen = []
    def read(o, size): seen.append(o); return read_image(o, size)
    for o in (block, memory): monkeypatch.setattr(o, 'read_image', read)
    d = make_dls(market)
    for _ in range(2): list(d.train), list(d.valid)
    assert len(seen)==len(set(seen))==46 # 32 + 4 + 10; junk is not read

# --- what people and chance hand in: each ends as it should, or in one line that names the file

def says(f, *words):
    "`f` is refused in one line of at most 300 characters that has `words`"
    with pytest.raises(ValueError) as e: f()
    s = str(e.value)
    assert isinstance(e.value, ValueError) and len(s)<=300 and '\n' not in s, s
    assert not (missing := [o for o in words if str(o) not in s]), f'{missing} not in: {s}'
    return s

def plain_table(root, n=6):
    "Two people to learn from, two to search for in two cameras, a distractor and junk; every image exists"
    rows = [('train',p,i%2+1) for p in (1,2) for i in range(n//2)] + [(s,p,c) for p in (3,4) for s,c in (('query',1),('gallery',2))] + [('gallery',0,1), ('gallery',-1,2)]
    df = pd.DataFrame([(f'{i:02d}.png',p,c,s) for i,(s,p,c) in enumerate(rows)], columns=['path','pid','camid','split'])
    for i,o in enumerate(df.path): noise(root/o, i, size=(4,8))
    return df

@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp('plain')
    return root,plain_table(root)

def test_numbers_that_may_have_been_rounded(plain):
    "As floats, and by spreadsheets: different identities can have become equal"
    root,df = plain
    a,rest = 20230101123456788,list(df.pid[2:])
    says(lambda: ReIDSplits(df.assign(pid=[float(a),float(a+1),*map(float, rest)]), 'x'), 'pid', 'Read the column as integers')
    assert ReIDSplits(df.assign(pid=[a,a+1,*rest]), 'x').df.pid[0]==a
    df.assign(pid=df.pid.astype(str).replace('1', '2.02301E+11')).to_csv(root/'e.csv', index=False)
    assert any('spreadsheets' in o for o in read_dataset(root/'e.csv').notes)

def test_labels_of_tensors_and_float32():
    for o in (torch.tensor([3,4]), np.array([3,4], np.float32), [torch.tensor(3), np.float32(4)]): assert column_values('pid', o, 2)==['3','4']
    assert column_values('pid', torch.tensor(3), 2)==['3','3']

csv_ways = st.fixed_dictionaries(dict(kind=st.sampled_from([int, float, str, object]), sep=st.sampled_from([',', ';', '\t', '|']), end=st.sampled_from(['\n', '\r\n']),
    header=st.sampled_from([str, str.upper, str.title, lambda o: f' {o} ', lambda o: f' {o.upper()}']), encoding=st.sampled_from(['utf-8', 'utf-8-sig']),
    quoting=st.sampled_from([0, 1]), order=st.permutations(['path','pid','camid','split']), more=st.booleans()))

@settings(deadline=None, max_examples=60, derandomize=True)
@given(csv_ways)
def test_a_table_is_the_same_however_it_was_written(plain, o):
    root,df = plain
    want = read_dataset_csv(root, df)
    t = df.astype(dict(pid=o['kind'], camid=o['kind']))[o['order']].rename(columns=o['header'])
    if o['more']: t['remark'] = 'seen, perhaps; not sure'
    t.to_csv(root/'way.csv', index=False, sep=o['sep'], lineterminator=o['end'], encoding=o['encoding'], quoting=o['quoting'])
    s = read_dataset(root/'way.csv')
    pd.testing.assert_frame_equal(s.df, want.df)
    assert not s.pid_names
    plainly = o['sep']==',' and o['header'] is str
    assert any('way.csv' in n for n in s.notes)!=plainly, s.notes
    if o['sep']==';': assert 'semicolons' in str(s.notes)
    if o['header'] is str.upper: assert "'PATH'" in str(s.notes)

def read_dataset_csv(root, df):
    df.to_csv(root/'plain.csv', index=False)
    return read_dataset(root/'plain.csv')

@pytest.mark.parametrize('pids,want', [(['1.0','0.0','-1.0'], [1,0,-1]), (['7','7.0','8'], [7,7,8]), (['07.0','7.0','8'], None), (['1.5','2.0','3.0'], None), (['-0','0','1'], [0,0,1])])
def test_whole_floats_as_text_are_numbers(pids, want):
    got = read_numbers(pd.DataFrame(dict(pid=pids))).pid.tolist()
    assert got==(want or pids)

@pytest.mark.parametrize('pids,said', [(['-1','anna','0.0','anna'], ['-1','0.0']), ([-1,'anna',5,5], ['-1']), (['07','7','0000','7'], ['0000']), ([1.5,-1.,2.,2.], ['-1.0'])])
def test_a_name_that_looks_like_junk_or_a_distractor_is_said(pids, said):
    df = pd.DataFrame(dict(path=list('abcd'), pid=pids, camid=[1,2,1,2], split=['train','train','query','gallery']))
    s = ReIDSplits(read_numbers(df), 'x')
    notes = [o for o in s.notes if 'is a name here' in o]
    assert len(notes)==len(said) and all(any(repr(v) in n and ('junk' if '1' in v else 'distractor') in n for n in notes) for v in said), s.notes
    assert not any('is a name' in o for o in ReIDSplits(df.assign(pid=[-1,0,5,5]), 'x').notes)

def test_a_number_too_long(plain, tmp_path):
    root,df = plain
    long = '12345678901234567890123456'
    for v in (long, '9'*5000, '-'+long):
        df.assign(pid=[v,*df.pid[1:]]).to_csv(root/'t.csv', index=False)
        says(lambda: read_dataset(root/'t.csv'), 't.csv', 'pid', v.lstrip('-')[:6], 'digits')
    df.assign(camid=[long,*df.camid[1:]]).to_csv(root/'t.csv', index=False)
    says(lambda: read_dataset(root/'t.csv'), 't.csv', 'camid', '26 digits')
    for v in (int(long), 1e26, 2**63): says(lambda: ReIDDataLoaders.from_df(df.assign(pid=[v,*df.pid[1:]]), root, **KW), 'pid', 'digits')
    m = make_market(tmp_path/'m')
    noise(m/'query'/f'{long}_c1s1_000000_00.jpg', 0)
    says(lambda: read_dataset(m), long, 'c1s1', '26 digits')

def test_tables_that_are_none(plain):
    root,df = plain
    t = root/'bad.csv'
    good = df.to_csv(index=False)
    for data,word in ((b'\x89PNG\r\n\x1a\n'+bytes(99), 'NUL'), (good.replace('00.png','\0').encode(), 'NUL'), (good.replace('00.png','Größe.png').encode('latin1'), 'UTF-8'),
                      (good.encode('utf-16'), 'UTF-8'), (b'', 'No columns'), (b'\n\n', 'No columns'), (good.replace('train','"train',1).encode(), 'read as a table'),
                      (good.replace('00.png','00.png,9,9,9,9').encode(), 'read as a table'), (b'a'*100_000, 'path'), (','.join(f'column{i}' for i in range(5000)).encode(), 'path'),
                      (('path,'+good).encode(), 'path'), ((good.splitlines()[0]+'\n').encode(), 'no rows')):
        t.write_bytes(data)
        says(lambda: read_dataset(t), 'bad.csv', word)
    t.write_text(good.replace('00.png', 'x'*5000))
    says(lambda: read_dataset(t), 'bad.csv', 'do not exist')
    (root/'folder.png').mkdir(exist_ok=True)
    t.write_text(good.replace('00.png', 'folder.png'))
    says(lambda: read_dataset(t), 'bad.csv', 'are not files', 'folder.png')
    t.unlink()

def test_tables_of_a_program(plain):
    root,df = plain
    f = lambda df: ReIDDataLoaders.from_df(df, root, **KW)
    says(lambda: f(df[:0]), 'no rows')
    says(lambda: f(df[:0].astype(object)), 'no rows')
    says(lambda: f(df.to_dict()), 'dict', 'DataFrame')
    says(lambda: f(pd.concat([df, df.pid], axis=1)), 'pid', 'twice')
    says(lambda: f(df.assign(split=[f'part {"x"*i}' for i in range(len(df))])), 'split')
    says(lambda: f(df.rename(columns={'pid':'who'}).assign(**{f'column{i}':0 for i in range(500)})), "['pid']")

def test_one_image_by_two_spellings(plain, tmp_path):
    root,df = plain
    (root/'sub').mkdir(exist_ok=True)
    for o in ('link.png','hard.png'): (root/o).unlink(missing_ok=True)
    (root/'link.png').symlink_to(root/df.path[0])
    (root/'hard.png').hardlink_to(root/df.path[0])
    other = [f'./{df.path[0]}', f'sub/../{df.path[0]}', str(root/df.path[0]), 'link.png', 'hard.png']
    for o in other:
        extra = df[:1].assign(path=o)
        f = lambda df: ReIDDataLoaders.from_df(df, root, size=(16,8), n_pids=2, n_imgs=2)
        says(lambda: f(pd.concat([df, extra])), 'listed twice', "'train'", df.path[0])
        says(lambda: f(pd.concat([df, extra.assign(split='gallery')])), 'images both in `train` and in a test split: 1', df.path[0])
        says(lambda: f(pd.concat([df, extra.assign(pid=2)])), 'listed with 2 identities')
    for o in (f'./{df.path[0]}', f'sub/../{df.path[0]}'): # without files, too
        says(lambda: ReIDSplits(pd.concat([df, df[:1].assign(path=o)]), 'x', '/nowhere'), 'listed twice')

def test_what_cannot_be_evaluated_is_refused_before_an_image_is_decoded(plain, monkeypatch):
    root,df = plain
    for o in (block, memory): monkeypatch.setattr(o, 'read_image', lambda *a: pytest.fail('an image was decoded'))
    test = df.split!='train'
    for bad,words in ((df.assign(camid=1), ['camera 1']), (df.assign(pid=df.pid.where(df.split!='gallery', df.pid+10)), []),
                      (df.assign(camid=df.camid.where(~test, 5)), ['camera 5'])):
        says(lambda: ReIDDataLoaders.from_df(bad, root, **KW), 'no query has a match', *words)
        says(lambda: check_protocol(ReIDSplits(bad, 'mine', root)), 'mine', 'no query has a match', *words)
    check_protocol(ReIDSplits(df, 'mine', root))
    check_protocol(ReIDSplits(df.assign(pid=df.pid.where(df.index!=df.index[df.split=='query'][0], 99)), 'mine', root)) # one of two has none: it will be skipped
    says(lambda: check_protocol(ReIDSplits(df[df.split!='query'], 'mine', root)), 'no images for `query`')

labels = st.lists(st.tuples(st.integers(-1,3), st.integers(0,2)), min_size=1, max_size=12)
@settings(deadline=None)
@given(labels, labels)
def test_matches_are_those_of_the_definition(q, g):
    f = lambda o: pd.DataFrame(o, columns=['pid','camid'])
    assert count_matches(f(q), f(g)).tolist()==[sum(a==p and p>0 and b!=c for a,b in g) for p,c in q]

# --- images of all kinds

def ramp16(): return np.linspace(0, 65535, 64*32).reshape(64,32).astype(np.uint16)

@pytest.mark.parametrize('how', ['png','tif','big-endian tif','pgm','jp2','I;16 image','I;16B image'])
def test_16_bit_grey_is_scaled(how, tmp_path):
    a,f = ramp16(),tmp_path/f'a.{how[-3:]}'
    if how=='pgm': f.write_bytes(b'P5 32 64 65535\n'+a.astype('>u2').tobytes())
    elif how=='big-endian tif': Image.fromarray(a.astype('>u2')).save(f)
    elif how=='I;16 image': f = Image.fromarray(a)
    elif how=='I;16B image': f = Image.frombytes('I;16B', (32,64), a.astype('>u2').tobytes())
    elif how=='jp2': Image.fromarray(a).save(f, irreversible=False)
    else: Image.fromarray(a).save(f)
    got = read_image(f, (64,32)).astype(int)
    assert np.abs(got-a/257).max()<=1 and (got[0]==got[1]).all() and (got[0]==got[2]).all()

def test_deep_colour_is_scaled(tmp_path):
    "48-bit RGB, which Pillow cannot write, as PPM"
    a = np.stack([ramp16(), ramp16()[::-1], ramp16()*0+30000], -1)
    (tmp_path/'a.ppm').write_bytes(b'P6 32 64 65535\n'+a.astype('>u2').tobytes())
    assert np.abs(read_image(tmp_path/'a.ppm', (64,32)).transpose(1,2,0)-a/257).max()<=1

@pytest.mark.parametrize('mode', ['F','I'])
def test_unknown_range_is_refused(mode, tmp_path):
    im = Image.fromarray(ramp16().astype(dict(F=np.float32, I=np.int32)[mode]))
    im.save(tmp_path/'deep.tif')
    says(lambda: read_image(tmp_path/'deep.tif', (8,8)), 'deep.tif', f'mode {mode}', '8 bits')
    says(lambda: read_image(im, (8,8)), f'mode {mode}')

@pytest.mark.parametrize('mode,ext', [('1','png'), ('L','png'), ('P','png'), ('LA','png'), ('RGBA','png'), ('PA',None), ('CMYK','jpg'), ('CMYK','tif'), ('YCbCr','jpg'), ('HSV',None), ('LAB','tif'), ('RGBX',None)])
def test_every_mode_keeps_its_picture(mode, ext, tmp_path):
    "Halves of black and white, whose place and brightness no mode may change"
    a = np.zeros((64,32,3), np.uint8); a[:32] = 255
    im = Image.fromarray(a)
    im = Image.fromarray(np.stack([a[...,0], a[...,0]*0, a[...,0]*0], -1), 'LAB') if mode=='LAB' else im.convert('P').convert('PA') if mode=='PA' else im.convert(mode)
    if ext: im.save(tmp_path/f'a.{ext}'); im = tmp_path/f'a.{ext}'
    got = read_image(im, (64,32)).transpose(1,2,0).astype(int)
    assert np.abs(got-a)[list(range(24))+list(range(40,64))].max()<=6

def test_nothing_to_see_is_refused():
    for a in (np.zeros((0,0,3), np.uint8), np.zeros((0,5,3), np.uint8), np.zeros((4,0), np.uint8)): says(lambda: read_image(a, (8,8)), 'array', a.shape)
    says(lambda: read_image(Image.new('RGB', (0,0)), (8,8)), '0×0')
    says(lambda: read_image(np.zeros((3,8,5), np.uint8), (8,8)), (3,8,5), 'transpose(1,2,0)')
    for a in (np.zeros((8,4,3), np.float32), np.zeros((8,4,3), np.uint16), np.zeros(7, np.uint8), np.zeros((2,8,4,3), np.uint8), np.zeros((8,4,2), np.uint8)):
        says(lambda: read_image(a, (8,8)), a.shape, a.dtype, '(height, width, 3)')
    for o in (None, 3, [1], torch.zeros(3,8,8), object()): says(lambda: read_image(o, (8,8)), type(o).__name__)

def test_embedder_refuses_an_empty_array():
    from reid_fastai.export import Embedder
    from reid_fastai.models import build_reid_net
    embed = Embedder(build_reid_net('resnet10t', 1, regions=0, pretrained=False), (64,32))
    says(lambda: embed(np.zeros((0,0,3), np.uint8)), '(0, 0, 3)')
    says(lambda: embed([np.full((8,4,3), 9, np.uint8), np.zeros((0,4,3), np.uint8)]), '(0, 4, 3)')

@pytest.mark.parametrize('shape,words', [((3,128,64), 'transpose\\(1,2,0\\)'), ((1,128,64), 'transpose'), ((4,128,64), 'transpose'), ((128,64,1), 'height, width, 3')])
def test_channels_in_another_place_are_not_several_images(shape, words):
    for a in image_list(np.zeros(shape, np.uint8)),image_list(np.zeros((2, *shape), np.uint8)):
        with pytest.raises(ValueError, match=words): open_image(a[0])
    for one in (3,128,3),(128,64),(128,64,4): assert len(image_list(np.zeros(one, np.uint8)))==1
    assert len(image_list(np.zeros((2,128,64), np.uint8)))==2

def test_an_open_file_is_one_image(tmp_path):
    Image.new('RGB', (8,8)).save(tmp_path/'a.png')
    with open(tmp_path/'a.png', 'rb') as f: assert open_image(*image_list(f)).size==(8,8)

def test_only_regular_files_are_images(tmp_path, monkeypatch):
    import os, socket
    os.mkfifo(tmp_path/'fifo.jpg')
    (tmp_path/'folder.jpg').mkdir()
    with socket.socket(socket.AF_UNIX) as s:
        monkeypatch.chdir(tmp_path); s.bind('sock.jpg')  # the path of a socket is short
    for o,word in (('fifo','pipe'), ('folder','folder'), ('sock','socket'), ('gone','No such file')): says(lambda: read_image(tmp_path/f'{o}.jpg', (8,8)), f'{o}.jpg', word)
    says(lambda: read_image('/dev/zero', (8,8)), '/dev/zero', 'device')
    says(lambda: read_image(str(tmp_path/('x'*5000)), (8,8)), 'cannot be read as an image')
    says(lambda: read_image('a\0b', (8,8)), 'cannot be read as an image')
    for kind in ('fifo','folder'):
        m = make_market(tmp_path/kind)
        f = first((m/'query').glob('*.jpg'))
        f.unlink()
        os.mkfifo(f) if kind=='fifo' else f.mkdir()
        for in_memory in (True,False): says(lambda: make_dls(m, in_memory=in_memory), f.name)
    own = make_own(tmp_path/'own')
    os.mkfifo(own/'train'/'bob'/'pipe.jpg')
    says(lambda: ReIDDataLoaders.from_path(own, **{**KW, 'n_pids':3}), 'pipe.jpg')
    msmt = tmp_path/'msmt'
    for o in ('train','test'): (msmt/o).mkdir(parents=True)
    for o in ('train','val','query','gallery'): os.mkfifo(msmt/f'list_{o}.txt')
    says(lambda: read_dataset(msmt), 'msmt')

@pytest.mark.parametrize('seed', range(3))
def test_damaged_images_are_read_or_refused(seed, tmp_path):
    "Bytes flipped and files cut, in every format: no other exception than ours"
    rng,good = np.random.default_rng(seed),{}
    for ext in ('png','jpg','webp','bmp','gif','tif','ppm','tga','ico','jp2'):
        noise(tmp_path/f'a.{ext}', 0, size=(16,32))
        good[ext] = (tmp_path/f'a.{ext}').read_bytes()
    for ext,b in good.items():
        for i in range(12):
            x = bytearray(b)
            for at in rng.integers(0, len(b), 1+i): x[at] = rng.integers(256)
            if i%3==0: x = x[:rng.integers(len(x))]
            (tmp_path/f'b.{ext}').write_bytes(x)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                try: assert read_image(tmp_path/f'b.{ext}', (8,8)).shape==(3,8,8)
                except ValueError as e: assert type(e) is ValueError and f'b.{ext} cannot be read as an image' in str(e) and len(str(e))<=300 and '\n' not in str(e)

def test_pictures_are_opened_as_training_opens_them(tmp_path):
    "Sideways and 16 bits deep: a ranked list shows what the network saw"
    from reid_fastai.interpret import as_image
    up = Image.fromarray(np.linspace(0, 255, 60*40).reshape(60,40).astype(np.uint8))
    exif = Image.Exif(); exif[0x0112] = 6
    up.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'side.png', exif=exif)
    Image.fromarray(ramp16()).save(tmp_path/'deep.png')
    for o,size in (('side',(60,40)), ('deep',(64,32))):
        for f in (tmp_path/f'{o}.png', str(tmp_path/f'{o}.png'), Image.open(tmp_path/f'{o}.png')): assert np.array_equal(as_image(f), read_image(tmp_path/f'{o}.png', size).transpose(1,2,0))
    says(lambda: as_image(tmp_path/'gone.png'), 'gone.png')
    assert as_image(np.zeros((4,4,3))).dtype==float and as_image(torch.zeros(3,8,4)).shape==(8,4,3)

# --- folders that are none, and numbers out of all measure

def test_folders_that_cannot_be_read(market, tmp_path, monkeypatch):
    import os
    for f in (read_dataset, Market1501, detect_layout): says(lambda: f(tmp_path/('x'*5000)), 'xxx')
    says(lambda: read_dataset('x'*5000+'.csv'), 'xxx')
    says(lambda: read_dataset(f'{"x/"*2500}'), 'x/x')
    says(lambda: read_dataset('/dev/null'), '/dev/null', 'not a folder')
    for o in range(40): (tmp_path/'many'/f'{"long name "*20}{o}').mkdir(parents=True)
    says(lambda: read_dataset(tmp_path/'many'), 'many', *(l.name for l in layouts))
    for o in range(30): touch(tmp_path/'sets'/(f'market {o}'*3), *(f'{d}/{NAMES[Market1501]}' for d in ('bounding_box_train','query','bounding_box_test')))
    says(lambda: read_dataset(tmp_path/'sets'), 'contains')
    says(lambda: Market1501(tmp_path/'sets'), 'contains')
    m = make_market(tmp_path/'m')
    noise(m/'query'/f'{"z"*240}.jpg', 0)
    says(lambda: read_dataset(m), 'zzz', 'is not named like')
    (m/'query').rename(m/'q'); (m/'query').write_text('')
    says(lambda: read_dataset(m), 'm')
    own = make_own(tmp_path/'own')
    scandir = os.scandir
    def denied(path):  # root may read everything: the refusal is played
        if os.fspath(path).endswith(('bounding_box_test','bob')): raise PermissionError(13, 'Permission denied', os.fspath(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', denied)
    says(lambda: read_dataset(market), 'bounding_box_test', 'Permission denied')
    says(lambda: read_dataset(own), 'bob', 'Permission denied')

def test_a_file_that_may_not_be_read(plain, monkeypatch):
    import builtins, io
    root,df = plain
    df.to_csv(root/'t.csv', index=False)
    real = io.open
    def denied(file, *a, **k):
        if str(file).endswith(('t.csv','00.png')): raise PermissionError(13, 'Permission denied', str(file))
        return real(file, *a, **k)
    for m in (builtins, io): monkeypatch.setattr(m, 'open', denied)
    says(lambda: read_dataset(root/'t.csv'), 't.csv', 'Permission denied')
    says(lambda: read_image(root/'00.png', (8,8)), '00.png', 'Permission denied')

def test_list_that_is_no_text(tmp_path):
    for o in ('train','test'): (tmp_path/o).mkdir()
    for o in ('train','val','query','gallery'): (tmp_path/f'list_{o}.txt').write_bytes(b'\xff\xfe\x00')
    says(lambda: read_dataset(tmp_path), 'list_train.txt')
    for o in ('train','val','query','gallery'): (tmp_path/f'list_{o}.txt').write_text('x'*100_000+'\n')
    says(lambda: read_dataset(tmp_path), 'list_train.txt')

@pytest.mark.parametrize('kw', [dict(size=(100000,100000)), dict(size=(10**20,64)), dict(size=(64.5,32)), dict(size=(float('nan'),32)), dict(size=('64','32')), dict(size=(64,-32)),
    dict(size=(64,32,3)), *({o: v} for o in ('steps','n_pids','n_imgs','val_bs') for v in (10**20, -1, 0, 2.5, float('nan'), '4')),
    *(dict(seed=v) for v in (10**20, -1, 2.5, '4', None)), *(dict(num_workers=v) for v in (-1, 10**20, 1.5))])
def test_numbers_out_of_measure(kw, market, monkeypatch):
    for o in (block, memory): monkeypatch.setattr(o, 'read_image', lambda *a: pytest.fail('an image was decoded'))
    says(lambda: make_dls(market, **kw), f'{first(kw)}=', str(first(kw.values()))[:6])

def test_size_that_does_not_fit_says_what_would(market, monkeypatch):
    monkeypatch.setattr(memory, 'free_memory', lambda: 10**9)
    s = says(lambda: make_dls(market, size=(4000,2000)), 'size=(4000, 2000)', 'GB')
    h,w = map(int, s.split('about ')[1].split(' ')[0].split('×'))
    assert abs(h-2*w)<=2 and 500<h<4000
    says(lambda: make_dls(market, size=(4000,2000), val_bs=1, n_pids=2, in_memory=True), 'in_memory=True', 'GB')

def test_path_is_where_a_learner_keeps_its_files(market, tmp_path):
    d = make_dls(market, path=tmp_path)
    assert d.path==tmp_path and d.splits.root==market
    assert ReIDDataLoaders.from_path(source=market, path=tmp_path, **KW).path==tmp_path
    assert ReIDDataLoaders.from_df(read_dataset(market).df, market, path=tmp_path, **KW).path==tmp_path
    assert ReIDDataLoaders.from_splits(read_dataset(market), path=tmp_path, **KW).path==tmp_path

def test_messages_stay_short_whatever_they_quote():
    long = lambda o: o*250
    df = pd.DataFrame(dict(path=[long(o) for o in 'abcdef'], pid=[long(o) for o in 'uuvvww'], camid=[long(o) for o in 'xyxyxy'], split=['train','train','query','gallery','gallery','gallery']))
    f = lambda df: check_protocol(ReIDSplits(df, '/data/'+long('name '), '/data/'+long('root ')))
    f(df)
    again = df[:1].assign(path='./'+df.path[0])
    for bad,word in ((df.assign(pid=[long(o) for o in 'uuvwws']), 'no query'), (df.assign(camid='x'), 'camera 1'), (pd.concat([df, again]), 'listed twice'), (pd.concat([df, again.assign(pid='b')]), '2 identities'),
                     (pd.concat([df, again.assign(split='gallery')]), 'in a test split'), (df.assign(split=long('s')), 'split'), (df.rename(columns=dict(pid=long('p'))), 'missing'), (df[df.split!='query'], 'no images'),
                     (df.assign(pid='9'*300), 'digits'), (df.assign(camid=[None]*6), 'rows without'), (df.assign(camid=-2**60), 'camera -1152921504606846976'), (df.assign(camid=-5), 'camera -5')): says(lambda: f(bad), word)

def test_brief():
    from reid_fastai.core import brief
    assert brief('abc')=='abc' and brief('a\n b')=='a b' and len(brief('x'*999, 50))==50 and brief('/a/'+'b'*99+'/name.jpg', 40).endswith('name.jpg')
    assert brief('\udcff.jpg').encode()
