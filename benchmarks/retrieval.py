"""Time and memory of retrieval and re-ranking on random features of a benchmark's size, beside the bare matrix product.

    python benchmarks/retrieval.py [--sizes market msmt17] [--verify] [--rerank] [--classic] [--torchreid DIR]

Each size runs in a process of its own, so that its peak memory is its own.
`--classic` also times dense NumPy re-ranking, written here as lean as it can be (7 GB at Market-1501's size, not run at MSMT17's).
`--torchreid` also times that library's evaluator and, with `--rerank`, the published NumPy code of re-ranking that it carries; DIR is a
checkout of KaiyangZhou/deep-person-reid, its extension built by `python setup.py build_ext --inplace` in `torchreid/metrics/rank_cylib`.
The environment variable OMP_NUM_THREADS sets the threads of PyTorch and of NumPy.
"""
import argparse, functools, statistics, subprocess, sys
from pathlib import Path

import numpy as np
import torch

from memory import peak, timed
from reid_fastai.evaluation.all import RetrievalResults

SIZES = dict(tiny=(200, 1000, 50), market=(3368, 15913, 750), msmt17=(11659, 82161, 3060))

def features(n_q, n_g, n_ids, d=2048, noise=4., seed=0):
    "Clusters that overlap: hard enough that many images lie between the matches. A sixth of the gallery are distractors"
    g = torch.Generator().manual_seed(seed)
    who = torch.randn(n_ids+1, d, generator=g)
    def part(n, pids):
        x = torch.randn(n, d, generator=g).mul_(noise)
        for a,p in zip(x.split(4096), pids.split(4096)): a += who[p]
        return x,pids,torch.randint(0, 6, (n,), generator=g)
    g_pids = torch.randint(1, n_ids+1, (n_g,), generator=g)
    g_pids[torch.rand(n_g, generator=g)<1/6] = 0
    return *part(n_q, torch.randint(1, n_ids+1, (n_q,), generator=g)),*part(n_g, g_pids)

def product(q, g):
    "The bare product of tensors or arrays, a block at a time where the whole would take more than 2 GB"
    step = max(1, 5*10**8//len(g))
    for i in range(0, len(q), step): q[i:i+step]@g.T

def classic(q, g, k1=20, k2=6, lam=.3):
    "Dense re-ranking: full distances, a full argsort, a loop over images, dense weights"
    x = np.concatenate([q.numpy(), g.numpy()])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    n,n_q = len(x),len(q)
    D = np.square(1-x@x.T)
    D /= D.max(1, keepdims=True)
    order,V,half = np.argsort(D, axis=1).astype(np.int32),np.zeros((n,n), np.float32),int(np.around(k1/2))
    def reciprocal(i, k):
        near = order[i,:k+1]
        return near[(order[near,:k+1]==i).any(1)]
    for i in range(n):
        own = reciprocal(i, k1)
        more = [r for j in own if len(np.intersect1d(r := reciprocal(j, half), own))>2/3*len(r)]
        m = np.unique(np.concatenate([own, *more]))
        w = np.exp(-D[i,m])
        V[i,m] = w/w.sum()
    D = D[:n_q,n_q:].copy()
    V = np.stack([V[order[i,:k2]].mean(0) for i in range(n)])
    lists = [V[:,j].nonzero()[0] for j in range(n)]
    for i in range(n_q):
        s = np.zeros(n, np.float32)
        for j in V[i].nonzero()[0]: s[lists[j]] += np.minimum(V[i,j], V[lists[j],j])
        D[i] = (1-lam)*(1-s/(2-s))[n_q:] + lam*D[i]
    return D

@functools.cache
def torchreid_modules(folder):
    "Its distances, evaluator and re-ranking, by name: the package itself wants tensorboard, gdown and more"
    import types
    for name in ('torchreid','torchreid.metrics','torchreid.metrics.rank_cylib','torchreid.utils'):
        sys.modules[name] = m = types.ModuleType(name)
        m.__path__ = [str(Path(folder, *name.split('.')))]
    from torchreid.metrics import distance, rank
    from torchreid.utils import rerank
    if not rank.IS_CYTHON_AVAI: raise SystemExit(f'{folder}: the extension rank_cy is not built')
    return distance.compute_distance_matrix,rank.evaluate_rank,rerank.re_ranking

def beside_torchreid(folder, args, n):
    "Time torchreid's distances and compiled evaluator on the same features, and compare its figures"
    compute_distance_matrix,evaluate_rank,_ = torchreid_modules(folder)
    q,qp,qc,g,gp,gc = args
    labels = [o.numpy() for o in (qp,gp,qc,gc)]
    theirs = lambda: evaluate_rank(compute_distance_matrix(q, g, 'cosine').numpy(), *labels, max_rank=50)
    for _ in range(n):
        (o,ours),(t,(cmc,mAP)) = timed(lambda: (res := RetrievalResults.from_embeddings(*args), res.mAP, res.mINP, res.cmc(50))),timed(theirs)
        print(f'  ours {o:6.2f} s   torchreid {t:6.2f} s, {t/o:.2f} times as long; mAP differs by {abs(ours[1]-mAP):.1e}, CMC by {np.abs(ours[3]-cmc).max():.1e}')
    print(f'  peak memory with torchreid {peak():.2f} GB')

def published(folder, q, g):
    "The published re-ranking, in torchreid, of the cosine distances that torchreid hands it; it squares what it is given"
    compute_distance_matrix,_,re_ranking = torchreid_modules(folder)
    return re_ranking(*(compute_distance_matrix(*o, 'cosine').numpy() for o in ((q,g),(q,q),(g,g))))

def run(size, a):
    args = features(*SIZES[size])
    (q,g),n = (args[0],args[3]),(1 if size=='msmt17' else a.repeats)
    print(f'{size}: {len(q)} × {len(g)}, {q.shape[1]} numbers an image, {torch.get_num_threads()} threads; features {(q.nbytes+g.nbytes)/1e9:.2f} GB')
    RetrievalResults.from_embeddings(*(o[:600] for o in args)) # warm up
    rows,own = [],None
    for _ in range(n):
        r,res = timed(lambda: RetrievalResults.from_embeddings(*args))
        own = own or peak()  # before the products, whose blocks take up to 2 GB
        rows.append((timed(lambda: product(q, g))[0], timed(lambda: product(q.numpy(), g.numpy()))[0], r, res))
    for t,by_np,r,_ in rows: print(f'  product by PyTorch {t:6.2f} s, by NumPy {by_np:6.2f} s   retrieval {r:6.2f} s   ratios {r/t:.2f}, {r/by_np:.2f}')
    median = [statistics.median(o[2]/o[i] for o in rows) for i in (0,1)]
    print(f'  median ratio {median[0]:.2f} to PyTorch, {median[1]:.2f} to NumPy; peak memory {own:.2f} GB, with the products {peak():.2f} GB')
    if a.verify:
        t,v = timed(rows[0][3].verification)
        (by_far,_),(by_ids,_) = timed(lambda: v.threshold(1e-2)),timed(v.summary)
        print(f'  {v}\n  verification {t:.1f} s, thresholds {by_far:.1f} s, intervals {by_ids:.1f} s; peak memory {peak():.2f} GB')
    if a.torchreid: beside_torchreid(a.torchreid, args, n)
    if a.rerank:
        t,new = timed(rows[0][3].rerank)
        print(f'  re-ranking {t:.1f} s, peak memory {peak():.2f} GB')
        dense = {}
        if a.classic: dense['classic'] = lambda: classic(q, g)
        if a.torchreid: dense["torchreid's"] = lambda: published(a.torchreid, q, g)
        if dense and size=='msmt17': return print('  dense re-ranking left out: a single matrix of all pairs takes 35 GB')
        for name,f in dense.items():
            c,D = timed(f)
            off = [np.abs(D[rows]-b.numpy()) for rows,b in new.dists.blocks()]
            print(f'  {name} {c:.1f} s, {c/t:.1f} times as long; distances differ by at most {max(o.max() for o in off):.1e}, '
                  f'{sum((o>1e-5).sum() for o in off)} of {D.size} by more than 1e-5; peak memory {peak():.2f} GB')
            del D,off

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', nargs='+', default=['market'], choices=list(SIZES))
    p.add_argument('--verify', action='store_true', help='time thresholds and their bootstrap intervals too')
    p.add_argument('--rerank', action='store_true', help='time re-ranking too')
    p.add_argument('--classic', action='store_true', help='with --rerank: time the dense algorithm beside it')
    p.add_argument('--torchreid', metavar='DIR', help='time the evaluator of this checkout beside ours, and with --rerank its re-ranking')
    p.add_argument('--repeats', type=int, default=3)
    a = p.parse_args()
    if len(a.sizes)==1: run(a.sizes[0], a)
    else:
        rest = ['--verify']*a.verify+['--rerank']*a.rerank+['--classic']*a.classic+[f'--torchreid={a.torchreid}']*bool(a.torchreid)+[f'--repeats={a.repeats}']
        for s in a.sizes: subprocess.run([sys.executable, __file__, '--sizes', s, *rest], check=True)
