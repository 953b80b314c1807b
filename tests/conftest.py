"Several workers share the cores: each computes with one thread"
import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    for o in ('OMP_NUM_THREADS','MKL_NUM_THREADS','OPENBLAS_NUM_THREADS'): os.environ.setdefault(o, '1')
