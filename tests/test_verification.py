"Thresholds and error rates of pairs and searches, against scikit-learn, loops over pairs, and planted faults"
import json, shutil
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from sklearn.metrics import roc_curve

from reid_fastai.evaluation.all import *
from reid_fastai.evaluation.verification import _allowed
from reid_fastai.files import save_tensors

def make(n_q=13, n_g=60, n_ids=6, seed=0, ties=False, metric='euclidean', names=False, d=3, chunk_size=5):
    "Results with junk, distractors, shared cameras, and queries of people who are not in the gallery"
    rng = np.random.default_rng(seed)
    def part(n, pids):
        x = rng.normal(size=(n,d)) + pids[:,None]*.6
        return np.round(x, 0 if ties else 9).astype(np.float32),pids,rng.integers(0, 3, n)
    q,g = part(n_q, rng.integers(1, n_ids+2, n_q)),part(n_g, rng.integers(-1, n_ids, n_g))
    if names: q,g = ((x, np.array([f'p{o+1}' for o in p]), c) for x,p,c in (q,g))
    return RetrievalResults.from_embeddings(*q, *g, metric=metric, chunk_size=chunk_size)

def pairs(res):
    "All pairs by a loop: distance, whether it matches, query; and of each query what the protocol leaves of the gallery, in its order"
    dist = np.concatenate([d.numpy() for _,d in res.dists.blocks()])
    out,searches = [],{}
    for i in range(len(res)):
        if res.q_pids[i] in (-1, 0): continue
        searches[i] = []
        for j,g in enumerate(res.g_idxs):
            same = res.q_pids[i]==res.g_pids[g]
            if same and res.q_camids[i]==res.g_camids[g]: continue
            out.append((dist[i,j], bool(same), i))
            searches[i].append((dist[i,j], bool(same)))
    d,m,q = map(np.array, zip(*out))
    return d,m,q,searches

CASES = [dict(seed=o) for o in range(3)] + [dict(ties=True, seed=o) for o in range(3)] + [dict(names=True), dict(metric='cosine'), dict(chunk_size=1), dict(n_q=20, n_g=200, seed=5), dict(n_q=20, n_g=200, ties=True)]

@pytest.mark.parametrize('kw', CASES)
def test_roc_and_eer_are_those_of_sklearn(kw):
    v = (res := make(**kw)).verification()
    d,m,*_ = pairs(res)
    assert (v.n_match, v.n_nonmatch)==(m.sum(), (~m).sum())
    far,tar,t = roc_curve(m, -d, drop_intermediate=False)
    roc = v.roc()
    at = pd.Series(np.arange(len(t)), index=-t)[roc.threshold].to_numpy()
    np.testing.assert_array_equal(roc.far, far[at])
    np.testing.assert_array_equal(roc.tar, tar[at])
    assert len(roc)==len(np.unique(d[m]))
    grid = np.linspace(0, 1, 200_001)                # EER by a search along sklearn's curve, whose corners lines join
    by_length = np.r_[0, np.hypot(np.diff(far), np.diff(tar)).cumsum()]
    s = grid*by_length[-1]
    assert v.eer==pytest.approx(np.interp(s, by_length, far)[np.abs(np.interp(s, by_length, far)+np.interp(s, by_length, tar)-1).argmin()], abs=2e-5)

@pytest.mark.parametrize('kw', CASES)
def test_thresholds_by_trying_all(kw):
    v = (res := make(**kw)).verification()
    d,m,*_ = pairs(res)
    n = (~m).sum()
    ts = np.unique(d)
    fars = np.array([(d[~m]<=t).sum()/n for t in ts])
    for far in (1/n, 1.5/n, 2/n, .05, 1/3, .9, 1-.5/n):
        t,ok = v.threshold(far),ts[fars<=far]
        assert v.tar(far)==(d[m]<=t).mean()
        if len(ok): assert t==ok[-1], far
        else: assert t<d.min() and v.tar(far)==0

def test_all_distances_equal():
    "No threshold separates anything: at any FAR below 1 nothing is accepted, and the curve is the diagonal"
    v = RetrievalResults.from_embeddings(np.ones((3,2)), [1,2,3], [0,0,0], np.ones((6,2)), [1,2,3]*2, [1]*6, metric='euclidean').verification()
    assert v.eer==.5 and v.tar(.9)==0 and v.threshold(.9)<0 and v.roc().far.tolist()==[1] and (v.open_set(.5).dir==0).all()
    assert not (v.matches<=v.threshold(.9)).any()
    v.plot(); v.plot_roc()

def test_no_non_match_is_refused():
    with pytest.raises(ValueError, match='no non-matching pairs'): RetrievalResults.from_embeddings(np.eye(2), [1,1], [0,1], np.eye(2), [1,1], [2,3]).verification()

def test_one_identity_has_thresholds_without_intervals(tmp_path):
    rng = np.random.default_rng(0)
    v = RetrievalResults.from_embeddings(rng.normal(size=(2,4)), [1,1], [0,1], rng.normal(size=(200,4)), [1]*3+[0]*197, [2]*200).verification()
    assert (v.n_match, v.n_nonmatch)==(6, 394) and v.summary().low.isna().all()
    save_tensors(tmp_path/'model.safetensors', dict(w=torch.ones(1)), {})
    v.save(tmp_path, tmp_path/'model.safetensors', 'x')
    assert read_verification(tmp_path/'model.safetensors')['thresholds']['0.01']['low'] is None
    with pytest.raises(ValueError, match='one identity'): v.interval(.1)

def test_queries_of_nobody_are_left_out():
    with pytest.warns(UserWarning, match='have pid -1 or 0'): v = RetrievalResults.from_embeddings(np.eye(3), [1,0,-1], [0,0,0], np.eye(3), [1,2,0], [1,1,1]).verification()
    assert (v.n_match, v.n_nonmatch)==(1, 2)

@pytest.mark.parametrize('kw', CASES)
def test_dir_by_a_loop_over_searches(kw):
    "A search answers with the first of the nearest images. Its non-mated twin goes through the gallery without its identity"
    v = (res := make(**kw)).verification()
    *_,searches = pairs(res)
    alone = {q: min([d for d,same in s if not same], default=np.inf) for q,s in searches.items()}
    mated = {q: s for q,s in searches.items() if any(same for _,same in s)}
    n = sum(np.isfinite(o) for o in alone.values())
    for far in (1/n, .1+1/n, .5, .99):
        got = v.open_set(far).loc[far]
        assert sum(o<=got.threshold for o in alone.values())/n<=far
        hits = 0
        for s in mated.values():
            d,same = min(s, key=lambda o: o[0])      # `min` takes the first of equal ones
            hits += same and d<=got.threshold
        assert got.dir==hits/len(mated)
        larger = sorted(o for o in alone.values() if o>got.threshold)
        assert sum(o<=larger[0] for o in alone.values())/n>far
    assert v.open_set([.5,.9]).index.tolist()==[.5,.9]

def test_dir_ends_at_rank1():
    "With a threshold that nearly all non-mated searches pass, mated searches pass it too: what is left is Rank-1"
    res = make(n_q=400, n_g=500, n_ids=8)
    assert res.verification().open_set(.999).dir.iloc[0]==pytest.approx(res.rank1)

def bootstrap(res, far, rng, q_order):
    "Threshold and TAR of one draw, by a loop over pairs that are repeated"
    ids = np.unique(res.q_pids[q_order])
    g_pids = [res.g_pids[g] for g in res.g_idxs]
    unit = [p if p in ids else (('distractor', j) if p==0 else ('other', p)) for j,p in enumerate(g_pids)]
    rest = [*sorted({u[1] for u in unit if isinstance(u, tuple) and u[0]=='other'}), *(j for j,p in enumerate(g_pids) if p==0)]
    rest = [('other', o) for o in rest[:len(rest)-sum(p==0 for p in g_pids)]]+[('distractor', o) for o in rest[len(rest)-sum(p==0 for p in g_pids):]]
    times = {p: 0 for p in [*ids, *rest]}
    for o in (list(ids), rest):
        for i in (rng.integers(len(o), size=len(o)) if o else ()): times[o[i]] += 1
    dist = np.concatenate([d.numpy() for _,d in res.dists.blocks()])
    own,other = [],[]
    for i in q_order:
        for j,u in enumerate(unit):
            if res.q_pids[i]!=g_pids[j]: other += [dist[i,j]]*times[res.q_pids[i]]*times[u]
            elif res.q_camids[i]!=res.g_camids[res.g_idxs[j]]: own += [dist[i,j]]*times[u]
    own,other = np.array(own),np.array(other)
    if not len(own) or not len(other): return np.nan,np.nan
    ok = [t for t in np.unique(np.r_[own, other]) if (other<=t).mean()<=far]
    t = ok[-1] if ok else np.nextafter(other.min(), np.float32(-np.inf))
    return t,(own<=t).mean()

@pytest.mark.parametrize('kw', [dict(), dict(ties=True), dict(n_q=5, n_g=25, n_ids=3, seed=3), dict(seed=2, n_ids=3)])
@pytest.mark.parametrize('far', [.02, .2, .7])
def test_bootstrap_by_repeating_pairs(kw, far):
    v = (res := make(**kw)).verification()
    got = v._bootstrap([far], 12, 7)[:,0]
    rng = np.random.default_rng(7)
    want = np.array([bootstrap(res, far, rng, v.queries.tolist()) for _ in range(12)])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)

def test_interval_covers_the_truth():
    "Of 25 small sets of people, intervals of 95 % hold the threshold and TAR of a large one in most cases; without the resampling of identities they would be far too narrow"
    def people(n_ids, seed):
        rng = np.random.default_rng(seed)
        who = np.repeat(rng.normal(size=(n_ids,6)), 6, 0)
        x,pids,cams = who+.5*rng.normal(size=who.shape),np.repeat(np.arange(n_ids)+1, 6),np.tile(np.arange(6), n_ids)
        return RetrievalResults.from_embeddings(x[::3], pids[::3], cams[::3], x, pids, cams, metric='euclidean').verification()
    truth = people(1000, 1)
    got = [people(50, 100+o).interval(.01, n=60) for o in range(25)]
    for name,t in (('threshold', truth.threshold(.01)), ('tar', truth.tar(.01))):
        assert 19<=sum(o.low[name]<=t<=o.high[name] for o in got)<=25, name

def test_chunks_change_nothing():
    a,b = (make(chunk_size=o, n_q=40, n_g=400, metric='cosine').verification() for o in (3, 999))
    pd.testing.assert_frame_equal(a.roc(), b.roc(), check_exact=True)
    pd.testing.assert_frame_equal(a.summary(), b.summary(), check_exact=True)
    assert repr(a)==repr(b)

def test_wide_and_narrow_collections_agree():
    "Thresholds from the kept pairs and from a bracket of one pass are the same"
    v = make(n_q=40, n_g=400, ties=True).verification()
    want = [v.threshold(o) for o in (.05, .3, .9)]
    v._near(v.n_nonmatch)
    d = v._nearest[0]
    for far,t in zip((.05, .3, .9), want): assert t==max(o for o in np.r_[d, v.matches] if (d<=o).mean()<=far)

@pytest.mark.parametrize('far,n', [*product((.01, .29, .57, .58, 1e-3, 1/3, .07), (1, 3, 7, 100, 1000, 12345))])
def test_allowed(far, n): assert _allowed(far, n)==max(k for k in range(n+1) if k/n<=far)

def test_reranked_distances_too():
    res = make(n_q=20, n_g=60).rerank(k1=5, k2=2)
    d,m,*_ = pairs(res)
    v = res.verification()
    assert v.matches.tolist()==sorted(d[m].tolist()) and v.tar(.1)==(d[m]<=v.threshold(.1)).mean()

@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    save_tensors((folder := tmp_path_factory.mktemp('kept'))/'model.safetensors', dict(w=torch.ones(1)), {})
    (v := make(n_q=40, n_g=400).verification()).save(folder, folder/'model.safetensors', 'data')
    return folder,v

@pytest.fixture
def stored(kept, tmp_path): return Path(shutil.copytree(kept[0], tmp_path/'run')),kept[1]

def test_stored_with_the_model(stored):
    folder,v = stored
    res = read_verification(folder/'model.safetensors')
    assert res==read_verification(folder) and res['flip'] is True
    assert {'model','metric','data','n_match','n_nonmatch','eer','thresholds','dir'}<=set(res) and set(res['thresholds']['0.001'])=={'threshold','low','high','tar'}
    assert res['thresholds']['0.001']['threshold']==v.threshold(1e-3) and res['eer']==v.eer
    assert res['dir']['0.1']['dir']==v.open_set(.1).dir[.1]
    assert len(pd.read_csv(folder/'verification.csv'))==len(v.roc())

@pytest.mark.parametrize('change,words', [
    (lambda o: {**o, 'eer': 0.}, 'damaged'), (lambda o: {k: v for k,v in o.items() if k not in ('eer','sha256')}, 'is not a file of'),
    (lambda o: {'mAP': 80.}, 'is not a file of'), (lambda o: [], 'damaged'), (lambda o: {**{k: v for k,v in o.items() if k!='sha256'}, 'thresholds': {'0.001': 3.}}, 'is not a file of'),
    (lambda o: {**{k: v for k,v in o.items() if k!='sha256'}, 'thresholds': {'0.001': {'threshold': 'x', 'tar': 1.}}}, 'is not a file of'),
    (lambda o: {**{k: v for k,v in o.items() if k!='sha256'}, 'model': '0'*64}, 'another model')])
def test_damaged_or_foreign(stored, change, words):
    path = stored[0]/'verification.json'
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=words) as e: read_verification(stored[0])
    assert 'verification.json' in str(e.value) and '\n' not in str(e.value)

def test_cut_off_file(stored):
    path = stored[0]/'verification.json'
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='verification.json is damaged'): read_verification(stored[0])

def test_planted_look_alikes():
    "Two people who look the same fix the smallest rates: no threshold below their share of the pairs accepts them or anything farther, and the bootstrap knows that some draws lack one of them"
    rng = np.random.default_rng(0)
    who = rng.normal(size=(30,16))
    who[1] = who[0]
    x,pids,cams = np.repeat(who, 4, 0),np.repeat(np.arange(30)+1, 4),np.tile(np.arange(4), 30)
    x = x+np.arange(len(x))[:,None]*1e-7
    v = RetrievalResults.from_embeddings(x, pids, cams, x+.01*(pids[:,None]>2), pids, cams, metric='euclidean').verification()
    share = 2*16/v.n_nonmatch
    assert v.threshold(share*.9)<1e-4 and v.tar(share*.9)<=2/30
    assert v.threshold(share*1.1)>.01 and v.tar(share*1.1)==1
    low,high = v.interval(share*1.1, n=200).loc['threshold']
    assert low<1e-4 and high>v.threshold(share*1.1)
    assert v.open_set(.05).dir[.05]<=2/30 and v.open_set(.1).dir[.1]==pytest.approx(v.results.rank1)
