"The evaluation modules against slow loops written from the protocol's words, over ties, junk, distractors, dtypes and layouts."
import os, warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from fastai.torch_core import TensorImage
from pandas.testing import assert_frame_equal

import reid_fastai.evaluation.counting as counting
import reid_fastai.evaluation.distances as distances
import reid_fastai.evaluation.ranked as ranked
import reid_fastai.evaluation.rerank as rerank
from reid_fastai.evaluation.distances import Distances, topk_keys
from reid_fastai.evaluation.metrics import RetrievalResults
from forks import fork
from pretend_gpu import pretend_gpu
from reid_fastai.files import load_tensors, save_tensors

build = RetrievalResults.from_embeddings
quiet = pytest.mark.filterwarnings('ignore:.*These queries are skipped')

# --- oracle

def dist(a, b, metric):
    "One distance in float64, or its square, which orders alike"
    a,b = np.asarray(a, dtype=np.float64),np.asarray(b, dtype=np.float64)
    if metric=='euclidean': return float(((a-b)**2).sum())
    n = np.sqrt((a**2).sum()*(b**2).sum())
    return 1-float((a*b).sum()/n) if n else 1.

def oracle(q, qp, qc, g, gp, gc, metric):
    "Per query: (AP, first hit, INP) or None, and the ranked list of gallery indices"
    res,lists = [],[]
    for i in range(len(q)):
        kept = [j for j in range(len(g)) if gp[j]!=-1 and not (gp[j]==qp[i]>0 and gc[j]==qc[i])]
        kept.sort(key=lambda j: (dist(q[i], g[j], metric), j))
        right = [gp[j]==qp[i]>0 for j in kept]
        lists.append(kept)
        if not any(right): res.append(None); continue
        hits,precs,last = 0,[],0
        for r,ok in enumerate(right, 1):
            if ok: hits,last = hits+1,r; precs.append(hits/r)
        res.append((sum(precs)/hits, right.index(True)+1, hits/last))
    return res,lists

def problem(seed, n_q, n_g, d, ids, cams, ties):
    rng = np.random.default_rng(seed)
    f = (lambda n: rng.integers(-1, 2, (n,d))) if ties else (lambda n: rng.standard_normal((n,d)))
    return [f(n_q).astype(np.float32), rng.integers(-1, ids+1, n_q), rng.integers(0, cams, n_q),
            f(n_g).astype(np.float32), rng.integers(-1, ids+1, n_g), rng.integers(0, cams, n_g)]

problems = st.builds(problem, st.integers(0,2**31), st.integers(1,40), st.integers(1,90),
                     st.integers(1,6), st.integers(1,8), st.integers(1,4), st.booleans())

def check(res, p, metric):
    want,lists = oracle(*p, metric)
    df,k = res.per_query(),min(12, len(p[3]))
    for i,w in enumerate(want):
        got = tuple(df.loc[i, ['AP','first_hit','INP']])
        assert np.isnan(got).all() if w is None else np.allclose(got, w, rtol=0, atol=1e-12), (i, got, w)
    some = [w for w in want if w]
    np.testing.assert_allclose([res.mAP, res.mINP, res.rank1],
                               [np.mean([w[0] for w in some]), np.mean([w[2] for w in some]), np.mean([w[1]==1 for w in some])])
    np.testing.assert_allclose(res.cmc(7), [np.mean([w[1]<=r for w in some]) for r in range(1,8)])
    assert res.n_skipped==want.count(None)
    idxs,dists = res.topk(k)
    for i,l in enumerate(lists):
        assert [o for o in idxs[i].tolist() if o>=0]==l[:k], i
        assert dists[i].isinf().sum()==max(0, k-len(l)) and (idxs[i,len(l):]==-1).all()

# --- metrics

@quiet
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(p=problems, chunk=st.integers(1,50), bins=st.sampled_from([8,2048]), block=st.sampled_from([1,300,2**20]))
def test_protocol(p, chunk, bins, block):
    "Every number follows from the protocol's words; whole-number vectors under Euclidean distance give exact ties"
    ties = bool((p[0]==p[0].round()).all())
    metric = 'euclidean' if ties else ['cosine','euclidean'][chunk%2]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(counting, '_n_bins', bins)
        m.setattr(counting, '_block', block)
        want,_ = oracle(*p, metric)
        if not any(want):
            with pytest.raises(ValueError, match='empty' if (p[4]==-1).all() else 'has a match'): build(*p, metric=metric, chunk_size=chunk)
        else: check(build(*p, metric=metric, chunk_size=chunk), p, metric)

@quiet
@pytest.mark.parametrize('metric', ['cosine','euclidean'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(metric, dtype):
    "Features of every precision are ranked as their own values say"
    p = problem(1, 30, 200, 16, 9, 4, False)
    for i in (0,3): p[i] = torch.as_tensor(p[i]).to(dtype)
    check(build(*p, metric=metric), [*p[:3], p[3], *p[4:]] if dtype!=torch.bfloat16 else [p[0].float(), *p[1:3], p[3].float(), *p[4:]], metric)

@quiet
@pytest.mark.parametrize('metric', ['cosine','euclidean'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('d', [37,2048])
def test_chunks(metric, dtype, d):
    "Neither the chunk size nor the place in the gallery changes a bit of a distance"
    p = problem(2, 130, 333, d, 20, 4, False)
    p[3][[5,100,332]] = p[3][0] # equal images, at the edges
    p[0],p[3] = torch.as_tensor(p[0]).to(dtype),torch.as_tensor(p[3]).to(dtype)
    one = build(*p, metric=metric)
    for c in (1,2,31,64,65,129):
        res = build(*p, metric=metric, chunk_size=c)
        assert (res.ranks==one.ranks).all()
        for a,b in zip(res.topk(333), one.topk(333)): assert torch.equal(a, b)
    d = torch.cat([o for _,o in Distances(p[0], p[3], metric).blocks()])
    assert all(torch.equal(d[:,0], d[:,i]) for i in (5,100,332))

@quiet
def test_layouts_and_kinds():
    "Arrays, tensors, lists, views, gradients, strings, large and float labels: all the same"
    p = problem(3, 20, 80, 8, 6, 3, False)
    want = build(*p).ranks
    t = [torch.as_tensor(o) for o in p]
    wide = [torch.randn(len(o), 16) for o in (p[0],p[3])]
    for w,o in zip(wide, (t[0],t[3])): w[:,::2] = o
    assert (build(*t).ranks==want).all()
    assert (build(*[o.tolist() for o in p]).ranks==want).all()
    assert (build(wide[0][:,::2], *t[1:3], wide[1][:,::2], *t[4:]).ranks==want).all()
    assert (build(t[0].T.contiguous().T.requires_grad_(), *t[1:3], t[3].T.contiguous().T, *t[4:]).ranks==want).all()
    big = lambda x: np.where(x>0, x.astype(np.int64)*10**15-7, x)
    assert (build(p[0], big(p[1]), p[2], p[3], big(p[4]), p[5]).ranks==want).all()
    assert (build(p[0], p[1].astype(float), p[2].astype(np.uint8), p[3], p[4].astype(np.int16), p[5]).ranks==want).all()
    real = [(p[1]>0).nonzero()[0], (p[4]>0).nonzero()[0]]
    ints = [o[real[i>2]] for i,o in enumerate(p)]
    strs = [o if i in (0,3) else np.array([f'name {v}' for v in o]) for i,o in enumerate(ints)]
    assert (build(*strs).ranks==build(*ints).ranks).all()
    assert build(*[o.astype(object) if o.dtype.kind=='U' else o for o in strs]).mAP==build(*ints).mAP

@pytest.mark.parametrize('reranked', [False, True])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_training_precision_does_not_leak(metric, reranked):
    "Autocast and reduced-precision products are training's business"
    p = problem(4, 60, 300, 64, 20, 4, False)
    p[0],p[3] = np.abs(p[0])+1,np.abs(p[3])+1
    def ranking():
        res = build(*p, metric=metric)
        return (res.rerank() if reranked else res).topk(300)
    want = ranking()
    torch.set_float32_matmul_precision('medium')
    try:
        with torch.autocast('cpu', dtype=torch.bfloat16): got = ranking()
        assert torch.get_float32_matmul_precision()=='medium'
    finally: torch.set_float32_matmul_precision('highest')
    assert all(torch.equal(a, b) for a,b in zip(want, got))

def test_products_use_all_digits(monkeypatch):
    "What `highest` means shows on a GPU alone; that it is set shows here"
    seen,linear = [],distances.linear
    monkeypatch.setattr(distances, 'linear', lambda *a: seen.append(torch.get_float32_matmul_precision()) or linear(*a))
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try: build(**args(q_feats=torch.eye(3), g_feats=torch.eye(3)))
    finally: torch.set_float32_matmul_precision(old)
    assert seen==['highest']

@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_scale_of_cosine(scale):
    "Features far from 1 are no matter of squares that overflow or vanish"
    p = [torch.as_tensor(o) for o in problem(8, 20, 80, 8, 6, 3, False)]
    p[1] = p[1].clamp_min(1)
    want,got = build(*p).ranks,build(p[0]*scale, *p[1:3], p[3]*scale, *p[4:]).ranks
    assert (want==got).all()

def test_sparse_features():
    "Among mostly zero features a shift would cost digits"
    g = torch.Generator().manual_seed(0)
    q,x = (torch.rand(n, 2048, generator=g)*(torch.rand(n, 2048, generator=g)<.01) for n in (20,200))
    d = torch.cat([o for _,o in Distances(q, x, 'euclidean').blocks()])
    assert (d/torch.cdist(q.double(), x.double(), compute_mode='donot_use_mm_for_euclid_dist')-1).abs().max()<3e-7

def test_collapsed_model():
    "All features equal: the gallery's order decides"
    res = build(np.ones((3,8)), [1,2,3], [0]*3, np.ones((600,8)), np.arange(600)%3+1, [1]*600)
    assert res.ranks.tolist()==[r for i in range(3) for r in range(i+1, 601, 3)]

def test_far_from_zero():
    "Distances of 0.01 around 1000 survive float32"
    rng = np.random.default_rng(5)
    p = [(1000+rng.standard_normal((20,32))*.01).astype(np.float32), np.arange(20)+1, [0]*20,
         (1000+rng.standard_normal((100,32))*.01).astype(np.float32), np.arange(100)%20+1, [1]*100]
    check(build(*p, metric='euclidean'), p, 'euclidean')

def test_query_of_no_identity():
    "Junk and distractor queries are skipped, with a warning, though the gallery has their labels"
    with pytest.warns(UserWarning, match='2 of 3 queries have pid -1 or 0'):
        res = build(np.ones((3,2)), [0,-1,2], [0]*3, np.ones((3,2)), [0,-1,2], [1]*3)
    assert res.n_skipped==2 and res.mAP==1/2 # the distractor ties with the match, and comes first

def test_metrics_of_skipped_queries_are_nan():
    df = build(np.eye(2), [1,2], [0,0], np.eye(2), [1,3], [1,1]).per_query()
    assert df.matches.tolist()==[1,0] and df.loc[1, ['AP','first_hit','INP']].isna().all() and df.AP[0]==1
    assert list(df)==['query','pid','camid','AP','first_hit','INP','matches']

def test_round_trip(tmp_path):
    p = problem(6, 20, 60, 8, 5, 3, False)
    p[1],p[4] = np.abs(p[1])+1,p[4]
    p[2],p[5] = [np.array([f'cam{c}' for c in o]) for o in (p[2],p[5])]
    p[0],p[3] = torch.as_tensor(p[0]).bfloat16(),torch.as_tensor(p[3]).bfloat16()
    res = build(*p, metric='euclidean', chunk_size=7)
    res.save(tmp_path/'r')
    res.save(tmp_path/'r') # replaces
    assert [o.name for o in tmp_path.iterdir()]==['r']
    got = RetrievalResults.load(tmp_path/'r')
    assert got.per_query().equals(res.per_query()) and repr(got)==repr(res) and got.dists.dtype==res.dists.dtype
    assert all(torch.equal(a, b) for a,b in zip(got.topk(9), res.topk(9)))

def test_saves_features_that_share_memory(tmp_path):
    f,p,c = torch.rand(6, 4),[1,1,2,2,3,3],[1,2]*3
    for i,(q,n) in enumerate([(f,6), (f[:2],2), (f[2:4],2)]):
        res = build(q, p[:n], c[:n], f, p, c)
        res.save(tmp_path/f'{i}.safetensors')
        again = RetrievalResults.load(tmp_path/f'{i}.safetensors')
        assert torch.equal(again.dists.q, res.dists.q) and torch.equal(again.dists.g, res.dists.g)

def test_reranked_results_need_an_import(tmp_path, monkeypatch):
    res = build(torch.rand(4, 4), [1,1,2,2], [1]*4, torch.rand(8, 4), [1,1,2,2]*2, [2]*8).rerank(2, 1)
    res.save(tmp_path/'f')
    assert RetrievalResults.load(tmp_path/'f').mAP==res.mAP
    monkeypatch.delitem(ranked._readers, 'RerankedDistances')
    with pytest.raises(ValueError, match='has RerankedDistances, which are read after `from reid_fastai.evaluation.all import'): RetrievalResults.load(tmp_path/'f')

@pytest.mark.parametrize('data', [b'', b'\x80\x04K\x01.', b'x'*64])
def test_load_refuses(data, tmp_path):
    (tmp_path/'r').write_bytes(data)
    with pytest.raises(ValueError, match='damaged'): RetrievalResults.load(tmp_path/'r')

def test_load_refuses_others_safetensors(tmp_path):
    import safetensors.torch
    safetensors.torch.save_file({'a': torch.zeros(1)}, tmp_path/'r')
    with pytest.raises(ValueError, match='not written by'): RetrievalResults.load(tmp_path/'r')
    with pytest.raises(ValueError, match='no such file'): RetrievalResults.load(tmp_path/'nowhere')

def args(**kw): return {**dict(q_feats=np.eye(3), q_pids=[1,2,3], q_camids=[0]*3, g_feats=np.eye(3), g_pids=[1,2,3], g_camids=[1]*3), **kw}
@pytest.mark.parametrize('kw,msg', [
    (dict(q_feats=np.full((3,3), np.nan)), 'q_feats: 3 of 3 rows contain NaN'), (dict(g_feats=np.diag([1,np.inf,1])), 'the first is row 1'),
    (dict(q_pids=[1,2]), r'q_pids: shape \(2,\) for 3'), (dict(q_camids=[1]*4), r'q_camids: shape \(4,\) for 3'),
    (dict(g_pids=[[1,2,3]]), r'g_pids: shape \(1, 3\) for 3'), (dict(g_camids=[]), 'g_camids'),
    (dict(g_feats=np.eye(3)[:,:2]), '3 numbers per image, gallery features 2'),
    (dict(g_feats=np.zeros((0,3)), g_pids=[], g_camids=[]), 'empty: 0 images'), (dict(g_pids=[-1]*3), 'empty: 3 images, 3 of them junk'),
    (dict(q_feats=np.zeros((0,3)), q_pids=[], q_camids=[]), 'query is empty'),
    (dict(g_pids=[4,5,6]), 'No query has a match'),
    (dict(g_camids=[0]*3), 'from another camera'), (dict(metric='l2'), "metric='l2'"), (dict(chunk_size=0), 'chunk_size=0'),
    (dict(q_pids=[1,2,.5]), 'integers or strings'), (dict(q_pids=np.array(['a',2,3], dtype=object)), 'q_pids: labels of several types'),
    (dict(q_feats=np.ones(3)), 'images, numbers per image'), (dict(q_feats=np.zeros((3,0)), g_feats=np.zeros((3,0))), 'images, numbers per image'),
    (dict(q_pids=['a','b','c']), 'both must be integers or both strings'),
    (dict(q_feats=1e20*np.eye(3, dtype=np.float32), g_feats=np.eye(3, dtype=np.float32), metric='euclidean'), 'overflows'),
], ids=str)
def test_errors(kw, msg):
    with pytest.raises(ValueError, match=msg): build(**args(**kw))

def test_chosen_queries():
    "By index, or one bool per query"
    res = build(**args())
    idxs = res.topk(2).idxs
    assert torch.equal(res.topk(2, [2,0]).idxs, idxs[[2,0]]) and torch.equal(res.topk(2, np.array([0,2])[::-1]).idxs, idxs[[2,0]]) and torch.equal(res.topk(2, np.array([True,False,True])).idxs, idxs[[0,2]])
    for bad,words in (([], 'none is chosen'), ([False]*3, 'none is chosen'), ([True], '1 bools for 3'), ([0,3], r'queries=\[3\]: there are 3'), ([-1], r'\[-1\]')):
        with pytest.raises(ValueError, match=words): res.topk(2, bad)

def test_features_that_are_not_numbers():
    "A comparison of regularisers has to know that the training diverged"
    from reid_fastai.core import DivergedError
    with pytest.raises(DivergedError, match='1 of 2 rows contain NaN'): distances.as_feats(torch.tensor([[1.,2.],[float('nan'),0.]]))

def test_unknown_cameras():
    q,g = np.float32([[1,0]]),np.float32([[1,0],[.9,.1],[0,1]])
    with pytest.warns(UserWarning, match='2 gallery images have camera -1'): assert build(q, [1], [-1], g, [1,1,2], [-1,2,-1]).n_matches.tolist()==[1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert build(q, [1], None, g, [1,1,2], None).n_matches.tolist()==[2]
        assert build(q, [1], [-1], g, [1,1,2], [-1,-2,-3]).n_matches.tolist()==[1]  # the query itself is in the gallery
    with pytest.raises(ValueError, match='Only one of'): build(q, [1], [0], g, [1,1,2], None)

def test_labels_beyond_int64():
    p = args(q_pids=np.array([2**64-1,1,2], 'uint64'))
    with pytest.raises(ValueError, match='label 18446744073709551615'): build(**p)

def test_threads_share_the_precision():
    "PyTorch's setting belongs to the process: the last thread restores what was set before the first"
    a,b = (distances.full_precision(torch.device('cpu')) for _ in range(2))
    torch.set_float32_matmul_precision('medium')
    try:
        for f in (a.__enter__, b.__enter__, lambda: a.__exit__(None, None, None)): f(); assert torch.get_float32_matmul_precision()=='highest'
        b.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision()=='medium'
    finally: torch.set_float32_matmul_precision('highest')

def _newer_precision():
    torch.set_num_threads(1)  # the threads of the parent do not exist in a fork
    torch.set_float32_matmul_precision('highest')
    torch.backends.cuda.matmul.fp32_precision = 'tf32'
    with pytest.raises(RuntimeError): torch.get_float32_matmul_precision()
    old = torch.backends.cuda.matmul.fp32_precision,torch.backends.mkldnn.matmul.fp32_precision
    with distances.full_precision(torch.device('cpu')): assert torch.get_float32_matmul_precision()=='highest'
    assert old==(torch.backends.cuda.matmul.fp32_precision,torch.backends.mkldnn.matmul.fp32_precision) and old[0]=='tf32'
    assert build(**args()).mAP==1
    from reid_fastai.callback.precision import _tf32
    assert _tf32()=='as set by fp32_precision'

@pytest.mark.skipif(not hasattr(torch.backends, 'fp32_precision') or not hasattr(os, 'fork'), reason='an older PyTorch, or no forks')
def test_precision_set_by_the_newer_names():
    "PyTorch refuses to read the older setting then; in a process of its own, because the setting is global"
    assert os.waitpid(fork(_newer_precision), 0)[1]==0

def test_large_whole_numbers_stay_apart():
    a,b = 2**60,2**60+1
    assert build(**args(q_pids=np.array([a,b,a], dtype=object), g_pids=np.array([a,b,b], dtype=object))).n_matches.tolist()==[1,2,1]
    with pytest.raises(ValueError, match='Pass them as integers or strings'): build(**args(q_pids=np.array([2**70,1,2], dtype=object)))
    with pytest.raises(ValueError, match='above 16,777,216, where float32'): build(**args(q_pids=np.array([2**24+4,1,2], 'float32')))

@pytest.mark.parametrize('f', ['cmc','topk'])
def test_k(f):
    with pytest.raises(ValueError, match='k=0'): getattr(build(**args()), f)(0)

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0,10**6), m=st.integers(1,70), data=st.data())
def test_topk_keys(seed, m, data):
    "As sorting whole rows by (key, column) would give"
    k,keys = data.draw(st.integers(1,m)),torch.randint(0, 4, (9,m), generator=torch.Generator().manual_seed(seed)).float()
    want = torch.tensor([sorted(range(m), key=lambda j: (r[j],j))[:k] for r in keys.tolist()])
    v,i = topk_keys(keys, k)
    assert torch.equal(i, want) and torch.equal(v, keys.gather(1, want))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('metric', ['cosine','euclidean'])
def test_gpu(metric):
    p = problem(7, 40, 300, 8, 9, 4, metric=='euclidean')
    p[1] = np.abs(p[1])+1
    q = [torch.as_tensor(o).cuda() for o in p]
    check(build(*q, metric=metric), p, metric)
    check(build(q[0], *p[1:], metric=metric), p, metric)

@quiet
@pytest.mark.parametrize('metric', ['cosine','euclidean'])
@pytest.mark.parametrize('dtype', [torch.float16,torch.float32])
def test_devices(metric, dtype, monkeypatch):
    "The same figures as from the CPU, and no operation mixes devices"
    p = [torch.as_tensor(o) for o in problem(7, 40, 300, 8, 9, 4, metric=='euclidean')]
    p[0],p[3] = p[0].to(dtype),p[3].to(dtype)
    cpu = build(*p, metric=metric)
    want = cpu.per_query(),cpu.rerank().per_query(),cpu.topk(9).idxs
    with pretend_gpu(monkeypatch) as on:
        for features in ([on(o) for o in p], [on(p[0]), *p[1:3], on(p[3]), *p[4:]]):
            got = build(*features, metric=metric)
            assert_frame_equal(got.per_query(), want[0])
            assert_frame_equal(got.rerank().per_query(), want[1])
            assert torch.equal(torch.as_tensor(got.topk(9).idxs.tolist()), want[2])

def test_pretended_device(monkeypatch):
    "It refuses what a GPU refuses"
    x = torch.ones(3)
    with pretend_gpu(monkeypatch) as on:
        assert (y := on(x)+1).device.type=='cuda' and torch.zeros(2, device='cuda').device.type=='cuda' and y.cpu().device.type=='cpu'
        with pytest.raises(RuntimeError, match='different devices'): on(x)+x
        with pytest.raises((RuntimeError, TypeError)): on(x).numpy()

# --- re-ranking

def dense_rerank(q, g, k1, k2, lam, metric='cosine'):
    "The published algorithm with full matrices: squares of the metric's own distances in the joined set, each row divided by its largest, then sets, weights, Jaccard"
    x,n_q = np.concatenate([q, g]).astype(np.float64),len(q)
    if metric=='cosine':
        x = x/np.linalg.norm(x, axis=1, keepdims=True)
        original_dist = np.maximum(1-x@x.T, 0)
    else: original_dist = np.sqrt(np.square(x[:,None]-x).sum(2))
    D,n = original_dist**2,len(x)
    D /= D.max(1, keepdims=True)
    order = np.argsort(D, axis=1, kind='stable')
    sees = lambda k: [set(o[:k+1].tolist()) for o in order]
    near,half = sees(k1),sees(int(np.around(k1/2)))
    V = np.zeros((n,n))
    for i in range(n):
        r = {j for j in near[i] if i in near[j]}
        members = set(r)
        for j in r:
            rj = {h for h in half[j] if j in half[h]}
            if len(rj&r)>2/3*len(rj): members |= rj
        m = sorted(members)
        V[i,m] = np.exp(-D[i,m])/np.exp(-D[i,m]).sum()
    V = np.stack([V[o[:k2]].mean(0) for o in order])
    J = np.stack([1-np.minimum(V[i], V[n_q:]).sum(1)/np.maximum(V[i], V[n_q:]).sum(1) for i in range(n_q)])
    return (1-lam)*J+lam*D[:n_q,n_q:]

def crowd(seed, n_q, n_g, d=24, ids=12, noise=.8):
    "Several images of each of `ids` people, and distractors"
    rng = np.random.default_rng(seed)
    who,qp,gp = rng.standard_normal((ids+1, d)),rng.integers(1, ids+1, n_q),rng.integers(0, ids+1, n_g)
    gp[0],qp[0] = 1,1
    f = lambda p: (who[p]+noise*rng.standard_normal((len(p), d))).astype(np.float32)
    return [f(qp), qp, np.zeros(n_q, int), f(gp), gp, np.ones(n_g, int)]

@pytest.mark.parametrize('metric', ['cosine','euclidean'])
@pytest.mark.parametrize('k1,k2,lam', [(20,6,.3), (5,3,.3), (7,1,0.), (1,2,1.), (10,11,.5), (3,1,.9)])
def test_rerank(metric, k1, k2, lam):
    "Distances and metrics of the dense algorithm"
    p = crowd(k1, 15, 90)
    want,res = dense_rerank(p[0], p[3], k1, k2, lam, metric),build(*p, metric=metric, chunk_size=4).rerank(k1, k2, lam)
    np.testing.assert_allclose(torch.cat([o for _,o in res.dists.blocks()]), want, atol=1e-5)
    ap = []
    for i in range(15):
        right = p[4][np.argsort(want[i], kind='stable')]==p[1][i]
        ap.append((right.cumsum()/np.arange(1, 91))[right].mean())
    assert abs(res.mAP-np.mean(ap))<1e-4

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=st.integers(0,2**31), n_q=st.integers(1,12), n_g=st.integers(2,40), k=st.integers(1,12), k2=st.integers(1,6), noise=st.floats(.05, 2))
def test_rerank_any_size(seed, n_q, n_g, k, k2, noise):
    k1 = min(k, n_q+n_g-1)
    p = crowd(seed, n_q, n_g, ids=5, noise=noise)
    p[3][-1] = -p[0][0]  # where the farthest image is near, distances relative to it magnify rounding
    x = np.concatenate([p[0], p[3]]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    D = np.sort(1-x@x.T, axis=1)
    for o in {k1, int(np.around(k1/2)), min(k2, k1+1)-1}: assume(o+1>=len(D) or (D[:,o+1]-D[:,o]).min()>5e-7)  # float32 does not tell who the last neighbour is
    want = dense_rerank(p[0], p[3], k1, min(k2, k1+1), .3)
    np.testing.assert_allclose(torch.cat([o for _,o in build(*p).rerank(k1, min(k2, k1+1)).dists.blocks()]), want, atol=1e-5)

def test_rerank_larger():
    p = crowd(0, 100, 900, ids=60, noise=1.2)
    np.testing.assert_allclose(torch.cat([o for _,o in build(*p).rerank().dists.blocks()]), dense_rerank(p[0], p[3], 20, 6, .3), atol=1e-5)

def test_rerank_chunks_and_order():
    "Chunks change nothing; junk is as if it were not there; a second re-ranking starts from the features again"
    p = crowd(1, 30, 120)
    a,b = (build(*p, chunk_size=c).rerank().topk(20) for c in (576,7))
    assert all(torch.equal(x, y) for x,y in zip(a, b))
    j = [*p[:3], np.concatenate([np.ones((5,24), np.float32), p[3]]), np.concatenate([[-1]*5, p[4]]), np.concatenate([[0]*5, p[5]])]
    c = build(*j).rerank()
    assert torch.equal(c.topk(20).idxs, a.idxs+5) and torch.equal(c.topk(20).dists, a.dists)
    assert torch.equal(c.rerank().topk(20).dists, a.dists)
    assert torch.equal(c.topk(20, [17,3]).dists, a.dists[[17,3]])

def test_rerank_of_equal_features():
    res = build(np.ones((2,4)), [1,2], [0,0], np.ones((60,4)), np.arange(60)%2+1, [1]*60).rerank()
    assert res.topk(60).dists[:,0].isfinite().all() and 0<res.mAP<=1

def test_rerank_memory(monkeypatch):
    "What does not fit is refused before a distance is computed, and what is said to fit does fit"
    p = crowd(2, 20, 80)
    res = build(*p)
    need = [rerank.rerank_memory(100, 24, k, 6) for k in (20,10)]
    assert need[1]<need[0]
    monkeypatch.setattr(rerank, 'free_memory', lambda: need[1])
    monkeypatch.setattr(Distances, 'keys', lambda self: pytest.fail('began to compute'))
    with pytest.raises(ValueError, match=r'k1=20, k2=6 may take .* k1=10, k2=6 would fit'): res.rerank()
    monkeypatch.undo()
    monkeypatch.setattr(rerank, 'free_memory', lambda: need[1])
    assert res.rerank(k1=10).mAP>0

@pytest.mark.parametrize('kw,msg', [
    (dict(k1=0), 'k1=0'), (dict(k1=100), '1..99'), (dict(k1=3,k2=5), 'k2=5'), (dict(lambda_value=-.1), 'lambda_value=-0.1')], ids=str)
def test_rerank_errors(kw, msg):
    with pytest.raises(ValueError, match=msg): build(*crowd(2, 20, 80)).rerank(**kw)

def test_rerank_round_trip(tmp_path):
    res = build(*crowd(3, 20, 80)).rerank()
    res.save(tmp_path/'r')
    got = RetrievalResults.load(tmp_path/'r')
    assert got.per_query().equals(res.per_query()) and torch.equal(got.topk(9).dists, res.topk(9).dists)
    assert got.rerank(5, 2).mAP==res.rerank(5, 2).mAP

def test_rerank_of_an_earlier_version_is_refused(tmp_path):
    "Its weights follow from other distances; mixed with those of now they would rank wrongly without a word"
    build(*crowd(3, 20, 80)).rerank().save(tmp_path/'r')
    tensors,meta = load_tensors(tmp_path/'r')
    del meta['original']
    save_tensors(tmp_path/'old', tensors, meta)
    with pytest.raises(ValueError, match='old: re-ranked by an earlier version.*again'): RetrievalResults.load(tmp_path/'old')

# --- pictures

@pytest.fixture
def shown():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    yield
    plt.close('all')

def gallery(n): return [np.full((8,4,3), 20*i%256, dtype=np.uint8) for i in range(n)]

def test_plot_ranked(shown, tmp_path):
    "Every kind of image source draws the same; frames follow correctness, ignored images are absent, and what runs out is blank"
    import pandas as pd
    from matplotlib.colors import to_hex
    from PIL import Image
    from reid_fastai.interpret import plot_ranked, plot_worst
    x = np.arange(6)[:,None]+1.
    res = build([[0.],[0.]], [7,9], [1,1], x, [7,8,7,-1,0,7], [1,2,2,3,3,4], metric='euclidean')
    q,g = gallery(2),gallery(6)
    for i,o in enumerate(g): Image.fromarray(o).save(tmp_path/f'{i}.png')
    paths = [tmp_path/f'{i}.png' for i in range(6)]
    x = np.stack(g)
    for src in (g, paths, [str(o) for o in paths], pd.Series(paths, index=list('abcdef')), torch.as_tensor(x).permute(0,3,1,2), lambda i: g[i], x):
        axs = plot_ranked(res, q, src, queries=0, k=6)
        assert axs.shape==(1,7)
        shown_ = [a for a in axs[0,1:] if a.axison]
        assert [a.images[0].get_array()[0,0,0] for a in shown_]==[20,40,80,100]
        assert [to_hex(a.spines['left'].get_edgecolor()) for a in shown_]==['#d62728','#2ca02c','#d62728','#2ca02c']
        assert [a.get_title()[0] for a in shown_]==['✗','✓','✗','✓']
        assert shown_[0].get_title()=='✗ 2.000\nid 8\ncam 2' and axs[0,0].get_xlabel()=='AP 50 %'
    assert plot_ranked(res, q, g, queries=[1], k=2)[0,0].get_xlabel()=='no match'
    assert plot_worst(res, q, g, n=5, k=2).shape==(1,3) # the query without a match is not among the worst

def test_plot_cmc(shown):
    from reid_fastai.interpret import plot_cmc
    res = build(*crowd(3, 20, 80))
    ax = plot_cmc({'a': res, 'b': res.rerank()}, k=5)
    assert [o.get_label().split()[0] for o in ax.lines]==['a','b'] and plot_cmc(res, ax=ax) is ax and len(ax.lines)==3

def test_curves_of_arms_can_be_told_apart(shown):
    "Equal curves differ in colour and style, and their names stand apart at the end"
    import pandas as pd
    from reid_fastai.comparison_results import plot_learning_curves, plot_strengths
    same = pd.DataFrame(dict(epoch=[1,2,3], train_loss=[3.,2.,1.]))
    ax = plot_learning_curves({a: [same, same] for a in ('none','conventional','adaptive','annealed')})
    assert len({o.get_linestyle() for o in ax.lines})==4 and len({o.get_color() for o in ax.lines})==4
    at = {o.get_text(): o.xy[1] for o in ax.texts}
    assert set(at)=={'none','conventional','adaptive','annealed'} and min(np.diff(sorted(at.values())))>.07 and max(at.values())<=1
    runs = pd.DataFrame([dict(stage='tune', arm='conventional', strength=v, seed=0, mAP=50.) for v in (2e-3,1e-2,5e-2)])
    ax = plot_strengths(runs)
    ax.figure.canvas.draw()
    assert [o.get_text() for o in ax.get_xticklabels()]==['0.002','0.01','0.05'] and not any(o.get_text() for o in ax.get_xticklabels(minor=True))

def test_junk_as_text_is_said():
    with pytest.warns(UserWarning, match="'-1' as text"): build(np.eye(2), ['0007','0008'], [0,0], np.eye(2), ['0007','-1'], [1,1])

def test_single_shot_with_negative_identities():
    "Each distractor counts alone, whatever the numbers of the identities"
    q,g = np.float32([[1,0,0]]),np.float32([[.2,1,0],[.9,.1,0],[.8,.2,0],[.1,0,1]])
    f = lambda o: build(q, [7], [0], g, [7,0,o,0], [1]*4).single_shot_cmc(4).tolist()
    assert f(-2)==f(9)==[0,0,1,1]

@pytest.mark.parametrize('metric', ['cosine','euclidean'])
def test_fastai_tensors(metric):
    "The output of any network for a batch of the loaders"
    p = problem(3, 20, 80, 8, 6, 3, False)
    assert (build(TensorImage(p[0]), *p[1:3], TensorImage(p[3]), *p[4:], metric=metric).ranks==build(*p, metric=metric).ranks).all()

def test_pickled_results_have_all_methods(monkeypatch):
    "Also in a process that imports only what the pickle names"
    import pickle
    from reid_fastai.evaluation import ranked
    res = RetrievalResults.from_embeddings(torch.rand(4, 8), [1,1,2,2], [1,2,1,2], torch.rand(4, 8), [1,1,2,2], [2,1,2,1])
    loaded = []
    monkeypatch.setattr(ranked, 'import_module', loaded.append)
    assert pickle.loads(pickle.dumps(res)).mAP==res.mAP and loaded==['reid_fastai.evaluation.all']

def test_features_in_any_memory_order():
    "Other byte orders and negative strides, as NumPy's flips make them; nothing else is copied"
    x = np.random.default_rng(0).normal(size=(5,6)).astype('float32')
    for o in (x.astype('>f4'), x[::-1].copy()[::-1], np.asfortranarray(x), x[:,::-1].copy()[:,::-1]): assert torch.equal(distances.as_feats(o), torch.tensor(x))
    assert distances.as_feats(x).data_ptr()==x.ctypes.data
