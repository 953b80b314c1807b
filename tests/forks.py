"Forked processes, which need not import torch again"
import os, sys

def fork(f, *args):
    "Run `f` in a forked process, whose number is returned"
    if pid := os.fork(): return pid
    code = 1
    try: f(*args); code = 0
    except BaseException: import traceback; traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)

def log_to(log):
    "Write what this process prints to the files `log`.out and `log`.err"
    for fd,ext in ((1,'out'),(2,'err')): os.dup2(os.open(f'{log}.{ext}', os.O_CREAT|os.O_WRONLY|os.O_TRUNC), fd)
    sys.stdout,sys.stderr = (open(fd, 'w', closefd=False) for fd in (1,2))

def command(argv, log, cwd='.', env={}):
    "Be a process that runs a command of the library"
    import torch
    from reid_fastai import cli
    log_to(log)
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)  # the threads of the parent do not exist in a fork
    try: cli.main([str(o) for o in argv])
    except SystemExit as e: leave(e)

def leave(e):
    "End this process as `SystemExit` `e` ends a program"
    if isinstance(e.code, str): print(e.code, file=sys.stderr)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(1 if isinstance(e.code, str) else e.code or 0)
