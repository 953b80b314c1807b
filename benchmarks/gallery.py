"""A gallery of many embeddings: time to write, index and search it, recall of the index against exact search, disk and peak memory.

    python benchmarks/gallery.py [--n 1000000] [--d 1280] [--queries 200] [--home DIR]

Embeddings are clustered as those of people are: 20 images of each, around a centre of their own. Queries are further images of random people. Each step runs in a process of its
own, so that its peak memory is its own. At the default size about 12 GB of disk and 16 GB of memory are needed.
The environment variables OMP_NUM_THREADS and LANCE_CPU_THREADS set the threads of PyTorch and of the database.
"""
import argparse, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch

from memory import peak, timed
from reid_fastai.gallery import Gallery
from reid_fastai.gallery_table import _format, _lancedb, _schema, _table

STEPS = 'write','index','approximate','exact','recall'
PER = 20  # images of a person
PART = 50_000  # embeddings added at a time

def images(people, d, seed):
    "An image of each of `people`: a centre, and as much again that changes from image to image"
    base = torch.stack([torch.randn(d, generator=torch.Generator().manual_seed(int(p))) for p in people.unique()])
    return base[people.unique(return_inverse=True)[1]]+torch.randn(len(people), d, generator=torch.Generator().manual_seed(seed))

def queries(a): return images(torch.randint(0, max(1, a.n//PER), (a.queries,), generator=torch.Generator().manual_seed(1)), a.d, 2**40)
def disk(d): return sum(o.stat().st_size for o in Path(d).rglob('*') if o.is_file())/1e9

def cpu(): return time.process_time()  # of all threads, whatever else the machine does

def searches(g, a, exact):
    "Seconds of each search, and the rows that were found"
    first,_ = timed(lambda: g.search(queries(a)[:1], 1, exact=exact))
    c,rows = cpu(),[timed(lambda: g.search(q, 10, exact=exact)) for q in queries(a).split(1)]
    return first,(cpu()-c)/len(rows),[o[0] for o in rows],[o[1].df.time.tolist() for o in rows]

def step(name, a):
    d = f'{a.home}/gallery'
    if name=='write':
        meta = dict(format=_format, version='benchmark', model='0'*64, model_file='none', metric='cosine', size=[256,128], n_features=a.d)
        g,spent = Gallery(d, _lancedb().connect(d).create_table(_table, schema=_schema(meta))),0.
        for i in range(0, a.n, PART):
            rows = torch.arange(i, min(i+PART, a.n))
            x = images(rows//PER, a.d, i+1)
            spent += timed(lambda: g.add(x, time=rows.tolist(), camid=(rows%6).tolist()))[0]
        return print(f'| write, {PART:,} at a time | {spent:.1f} s | {disk(d):.2f} GB of disk | {peak():.2f} GB |')
    g = Gallery.load(d)
    if name=='index':
        c,t = cpu(),timed(g.index)[0]
        return print(f'| build the index | {t:.1f} s, {cpu()-c:.0f} s of CPU | {disk(d):.2f} GB of disk with it | {peak():.2f} GB |')
    if name=='recall': return recall(g, a)
    first,of_cpu,secs,rows = searches(g, a, name=='exact')
    torch.save(rows, f'{a.home}/{name}.pt')
    print(f'| {name} search, one query at a time | median {1e3*statistics.median(secs):.1f} ms, {1e3*of_cpu:.1f} ms of CPU | first {first:.2f} s, slowest {1e3*max(secs):.0f} ms | {peak():.2f} GB |')

def recall(g, a):
    exact,near = (torch.load(f'{a.home}/{o}.pt') for o in ('exact','approximate'))
    one = statistics.mean(x[0]==y[0] for x,y in zip(exact, near))
    ten = statistics.mean(len({*x}&{*y})/len(x) for x,y in zip(exact, near))
    print(f'| recall of the index | @1 {one:.3f} | @10 {ten:.3f} | |')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=1_000_000, help='embeddings')
    p.add_argument('--d', type=int, default=1280, help='numbers of each')
    p.add_argument('--queries', type=int, default=200)
    p.add_argument('--home', help='folder to work in, where there is room; default: a temporary one')
    p.add_argument('--step', choices=STEPS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.step: step(a.step, a)
    else:
        with tempfile.TemporaryDirectory(dir=a.home) as tmp:
            print(f'{a.n:,} embeddings of {a.d:,} numbers, {a.queries} queries, k=10, {torch.get_num_threads()} threads\n\n| step | result | | peak memory |\n|---|---|---|---|', flush=True)
            for o in STEPS: subprocess.run([sys.executable, __file__, '--n', str(a.n), '--d', str(a.d), '--queries', str(a.queries), '--home', tmp, '--step', o], check=True)
