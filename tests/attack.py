"""Attacks the commands and judges what they make of it: `make attack` runs all of it, `tests/test_attack.py` a few.

A command runs in a forked child of a process that imported everything and computed nothing, so an attack costs no import of torch. Each attack is
seeded by `--seed`, its kind and its number, and can be repeated alone."""
import argparse, atexit, csv, hashlib, json, os, pickle, random, re, runpy, shlex, shutil, signal, socket, struct, subprocess, sys, tempfile, time, traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

root = str(Path(__file__).resolve().parents[1])  # the library beside this file is attacked, whatever is installed
sys.path.insert(0, root)
os.environ.update(PYTHONPATH=root, TORCH_CPP_LOG_LEVEL='ERROR', OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MPLBACKEND='agg')  # one thread a command, as several run at once
from hostile import ANY_FIGURES, CUTS, DAMAGES, NO_FILE, PIXELS, SAME_OR_REFUSED, TWINS, flip, save, to_csv
from PIL import Image
from safetensors.numpy import load_file

LIMIT = 60  # seconds after which a command hangs
TINY = '--arch test_resnet --pretrained none --size 64x32 --n-pids 4 --epochs 3 --steps 2'.split()
COMPARE = [*TINY, *'--epochs 1 --arms none adaptive --amplitudes 5e-3 --seeds 1'.split()]
PROGS = {'reid-train':['data'], 'reid-eval':['run','data'], 'reid-compare':['data'], 'reid-synth':['path'],
    'reid-embed':['model','images'], 'reid-search':['gallery','photos'], 'reid-export':['run']}  # and their positional arguments
script = lambda prog: str(Path(sys.executable).parent/prog)

class Failed(Exception):
    "An attack that a command did not survive: `what` is 'hang', 'traceback', 'wrong' or 'message'"
    def __init__(self, what, why): self.what,self.why = what,why


# ---- commands in forked children

def _child(argv, cwd, out, err, go, events, nth, sig, env):
    "Be the command `argv`, as its own process would be; at the `nth` file event below `events` send `sig` to itself, without `nth` list the events"
    os.setpgid(0, 0)
    os.environ.update(env)
    os.chdir(cwd)
    for n,f in ((0, os.devnull), (1, out), (2, err)): os.dup2(os.open(f, os.O_RDWR|os.O_CREAT|os.O_TRUNC if n else os.O_RDONLY, 0o666), n)
    sys.stdin,sys.stdout,sys.stderr = (open(n, mode, encoding='utf-8', closefd=False) for n,mode in ((0,'r'),(1,'w'),(2,'w')))
    for o in signal.SIGINT,signal.SIGTERM: signal.signal(o, signal.default_int_handler if o==signal.SIGINT else signal.SIG_DFL)
    sys.argv,seen = [script(argv[0]), *map(str, argv[1:])],[]
    def note(event, o):
        seen.append(f'{event} {o}')
        if len(seen)==nth: os.kill(os.getpid(), sig)
    def hook(event, args):
        if event in ('open','os.rename','os.remove','os.mkdir','os.rmdir','os.truncate','os.link'):
            o = args[1] if event=='os.rename' else args[0]
            if isinstance(o, (str,Path)) and str(o).startswith(events): note(event, os.path.basename(o))
    if events:
        fsync = os.fsync
        def noted(fd): note('fsync', fd); fsync(fd)
        os.fsync = noted
        sys.addaudithook(hook)
    os.write(go, b'.')
    try: runpy.run_path(sys.argv[0], run_name='__main__'); code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e: traceback.print_exc(); code = 130 if isinstance(e, KeyboardInterrupt) else 1
    for o in signal.SIGINT,signal.SIGTERM: signal.signal(o, signal.SIG_IGN)
    try: atexit._run_exitfuncs(); sys.stdout.flush(); sys.stderr.flush()
    except Exception: code = 120
    if events and not nth: Path(f'{out}.events').write_text('\n'.join(seen))
    os._exit(code)

class Command:
    "A command at work; `wait` for it, perhaps with a signal meanwhile"
    n = 0
    def __init__(self, argv, cwd, logs, events='', nth=None, own=None, env={}):
        Command.n += 1
        self.argv,self.log,(r,w) = list(map(str, argv)),Path(logs)/f'{os.getpid()}-{Command.n}',os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try: _child(self.argv, cwd, f'{self.log}.out', f'{self.log}.err', w, str(events), nth, own, env)
            finally: os._exit(99)
        os.close(w); os.read(r, 1); os.close(r)  # it is about to begin
        self.begun = time.monotonic()

    def wait(self, after=None, sig=None):
        "Its end: exit status, what it wrote, duration; `sig` is sent `after` seconds"
        end,secs = None,0
        while not (o := os.waitpid(self.pid, os.WNOHANG))[0]:
            secs = time.monotonic()-self.begun
            if after is not None and secs>=after: os.killpg(self.pid, sig); after = None
            if secs>LIMIT: os.killpg(self.pid, signal.SIGKILL); end = 'hang'
            time.sleep(.002)
        read = lambda ext: Path(f'{self.log}.{ext}').read_text(errors='replace')
        res = SimpleNamespace(argv=self.argv, code=end or os.waitstatus_to_exitcode(o[1]), out=read('out'), err=read('err'), secs=secs)
        if Path(f'{self.log}.out.events').exists(): res.events = read('out.events').splitlines()
        for f in self.log.parent.glob(f'{self.log.name}.*'): f.unlink()
        return res

def several(argv, cwd, logs, n, rank=0, **kw):
    "Start a command in `n` processes that work together; `kw` is for that of `rank`"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = lambda r: dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(n), RANK=str(r), LOCAL_RANK=str(r)) if n>1 else {}
    return [Command(argv, cwd, logs, env=env(r), **(kw if r==rank else {})) for r in range(n)]


# ---- judgements

def one_line(res, names=()):
    "Exit 2 with one proper line that has one of `names`"
    said = [o for o in re.split(r'[\r\n]+', res.err) if o.strip()]
    if res.code=='hang': raise Failed('hang', f'more than {LIMIT} s')
    if 'Traceback (most recent' in res.err+res.out: raise Failed('traceback', said[-1] if said else '')
    if res.code!=2: raise Failed('message', f'exit {res.code}: {res.err[-200:]!r}')
    if len(said)!=1: raise Failed('message', f'{len(said)} lines: {res.err[-400:]!r}')
    if not said[0].startswith(f'{res.argv[0]}: error: ') or len(said[0])>300: raise Failed('message', f'{len(said[0])} characters: {said[0][:400]!r}')
    if names and not any(str(o) in said[0] for o in names): raise Failed('message', f'none of {[str(o)[:60] for o in names]} is named: {said[0]!r}')
    return said[0]

LOCKS = '.lock','.held_by.json'  # who writes to a folder; left behind by a kill, and of no meaning then

def untimed(text):
    "Lines without durations: columns of tables, and what is said of the training"
    lines,odd = re.sub(r'[\d.]+ s an epoch, \d+ images a second', '', text).splitlines(),()
    def f(l, below):
        nonlocal odd
        if not l.startswith('|'): return l
        cells = l.split('|')
        if below.startswith('| ---') or below.startswith('|---'): odd = {i for i,c in enumerate(cells) if _of_time.search(c)}
        return '|'.join(c for i,c in enumerate(cells) if i not in odd)
    return [f(l, below) for l,below in zip(lines, [*lines[1:], '']) if l.startswith('|') or not _of_time.search(l)]

_of_time = re.compile('second|sha256|ms_per_step|ms a step')  # keys of what differs between two runs with the same figures

def figures(d):
    "File -> what has to be the same in every digit: all but durations, checksums and the pixels of pictures"
    def f(o):
        if not o.is_file() or o.suffix=='.png' or o.name in ('config.json', *LOCKS): return None
        data = o.read_bytes()
        try:
            if o.suffix=='.json': return drop(json.loads(data))
            if o.suffix=='.md': return untimed(data.decode())
            if o.suffix=='.csv':
                head,*rows = csv.reader(l for l in data.decode().splitlines() if not l.startswith('#'))
                return [[v for k,v in zip(head, row, strict=True) if not _of_time.search(k)] for row in [head, *rows]]
        except (ValueError, csv.Error): pass  # damaged: as it is
        return hashlib.sha256(data).hexdigest()
    def drop(o): return {k: drop(v) for k,v in o.items() if not _of_time.search(k) and not str(v).startswith('/') and not re.fullmatch('[0-9a-f]{64}', str(v))} if isinstance(o, dict) else o
    return {str(o.relative_to(d)): f(o) for o in sorted(d.rglob('*'))} if d.is_dir() else {}

def same(found, wanted, but=()):
    "Refuse other figures than `wanted`"
    for k in sorted({*found, *wanted}-set(but)):
        if k not in found or k not in wanted: raise Failed('wrong', f'{k} is {"missing" if k in wanted else "left behind"}')
        if found[k]!=wanted[k]: raise Failed('wrong', f'{k} differs: {str(found[k])[:150]} for {str(wanted[k])[:150]}')

def close(found, wanted, tol=2e-3):
    "Refuse a run in folder `found` that differs from `wanted` by more than rounding, which Adam enlarges in weights where a gradient is nearly zero"
    a,b = (load_file(d/'model.safetensors') for d in (found, wanted))
    norm = lambda f: sum((f(k).astype('float64')**2).sum() for k in b)**.5
    if (far := norm(lambda k: a[k]-b[k])/norm(lambda k: b[k]))>tol: raise Failed('wrong', f'weights differ by {far:.1e}')
    rows = lambda d: [float(r['lam']) for r in csv.DictReader((d/'lambdas.csv').open())]
    if (far := max(abs(x/y-1) for x,y in zip(rows(found), rows(wanted), strict=True)))>1e-5: raise Failed('wrong', f'λ differs by {far:.1e}')

def shown(res): return re.search(r'^mAP +\d', res.out, re.M)

def tree(d):
    "All below `d`, with the content of files"
    return {str(o.relative_to(d)): hashlib.sha256(o.read_bytes()).digest() if o.is_file() and not o.is_symlink() else os.lstat(o).st_mode
            for o in sorted(d.rglob('*')) if o.name not in LOCKS}


# ---- what is attacked, made once

class World:
    "A dataset, and finished and interrupted runs with what their commands give"
    def __init__(self, home): self.dir,self.ref,self.logs = Path(home),{},Path(home)/'logs'
    @property
    def data(self): return self.dir/'data'
    @property
    def run(self): return self.dir/'run'

    def argv(self, name, d):
        "The command `name`, working in folder `d`"
        odd = {'train':[], 'train seed 1':['--seed','1'], 'train held-out':['--val-pids','.3','--rerank','--seed','3']}
        if name in odd: return ['reid-train', self.data, '--out', d/'run', *TINY, *odd[name]]
        shown = ['--out', d/'out'/'shown'] if '--out' in self.options('reid-eval') else []
        return {'embed': ['reid-embed', d/'run', self.data/'bounding_box_test', '--out', d/'gallery'], 'compare': ['reid-compare', self.data, '--out', d/'comp', *COMPARE], 'resume cut': ['reid-train', '--resume', d/'cut'], 'resume': ['reid-train', '--resume', d/'run'],
            'eval': ['reid-eval', d/'run', self.data, '--csv', d/'out'/'q.csv', '--features', d/'out'/'f.safetensors', '--rerank', *shown],
            'features': ['reid-eval', d/'run', '--features', d/'f.safetensors'], 'just eval': ['reid-eval', d/'run'],
            'pretrained': ['reid-train', self.data, '--out', d/'new', *TINY, '--pretrained', d/'run'/'model.safetensors'],
            'images': ['reid-eval', d/'run', d/'data'], 'table': ['reid-eval', d/'run', d/'table.csv'], 'synth': ['reid-synth', d/'data', '--tiny']}[name]

    def go(self, name, d=None, **kw):
        d = d or self.dir
        return Command(self.argv(name, d), self.dir, self.logs, **kw).wait()

    def options(self, prog):
        if prog not in self.ref: self.ref[prog] = sorted(set(re.findall(r'(?<![\w-])--[a-z][\w-]*', Command([prog, '--help'], self.dir, self.logs).wait().out))-{'--help','--version','--pdb'})
        return self.ref[prog]

    def make(self, kinds):
        "What attacks of `kinds` need"
        self.logs.mkdir(parents=True)
        need = [o for k in kinds for o in KINDS[k].needs]
        def ref(name, made=None, d=None):
            res = self.go(name, d, events=made if name in ('train','train held-out','compare','eval') else '')
            res.figures,res.out = figures(Path(made)) if made else {},self.plain(res.out, d or self.dir)
            self.ref[name] = res
            return res
        ref('synth')
        ref('train', self.run)
        if self.ref['train'].code: sys.exit(f'nothing to attack: {self.ref["train"].err}')
        self.rows = [[f'data/{o.parent.name}/{o.name}', re.match(r'-?\d+', o.name)[0].lstrip('0') or '0', re.search(r'_c(\d)', o.name)[1], s]
                     for s,p in (('train','bounding_box_train'),('query','query'),('gallery','bounding_box_test')) for o in sorted((self.data/p).glob('*.jpg'))]
        (self.dir/'table.csv').write_text(to_csv(self.rows))
        if 'gallery' in need and (res := self.go('embed')).code: sys.exit(f'there is no gallery to attack: {res.err}')
        (self.dir/'out').mkdir(); (self.dir/'other').mkdir()
        for name,made in (('eval',self.dir/'out'), ('just eval',None), ('features',None), ('resume',None), ('images',None), ('table',None), ('compare',self.dir/'comp'), ('pretrained',self.dir/'new')):
            if name in need: ref(name, made)
            if name=='eval' and name in need: shutil.copy(self.dir/'out'/'f.safetensors', self.dir/'f.safetensors')
        for name in ('train seed 1','train held-out'):
            if name in need: ref(name, self.dir/'other'/name/'run', self.dir/'other'/name)
        if 'two' in need:
            d = self.dir/'other'/'two'
            self.ref['two'] = [o.wait() for o in several(self.argv('train', d), self.dir, self.logs, 2, events=d/'run')][0]
            self.ref['two'].figures = figures(d/'run')
        for name,cut in (('train','cut'), ('compare','ccut')):
            if cut in need: self.cut(name, cut)

    def cut(self, name, cut):
        "What is killed after the second checkpoint: a run with an epoch to go, a comparison in its second run"
        saved,d = [i for i,o in enumerate(self.ref[name].events, 1) if o=='os.rename checkpoint.pth'],self.dir/'other'/cut
        made = d/self.argv(name, d)[3].name
        self.go(name, d, events=made, nth=saved[1]+1, own=signal.SIGKILL)
        made.rename(self.dir/cut)
    def plain(self, text, d): return '\n'.join(untimed(re.sub(r'\S*\r', '', text))).replace(str(d), '@').replace(str(self.dir), '@')

class Attack:
    "One attack: its own random numbers and its own folder"
    def __init__(self, world, kind, i, seed):
        self.w,self.kind,self.i,self.rng,self.row = world,kind,i,random.Random(f'{seed} {kind} {i}'),kind
        self.dir,self.seed = world.dir/'attacks'/f'{kind}-{i}'.replace(' ', '-'),seed
        self.dir.mkdir(parents=True)
    def copy(self, *names):
        for o in names: (shutil.copytree if (self.w.dir/o).is_dir() else shutil.copy)(self.w.dir/o, self.dir/o)
    def start(self, argv, **kw): return Command(argv, self.dir, self.w.logs, **kw)
    def run(self, argv, after=None, sig=None, **kw): return self.start(argv, **kw).wait(after, sig)
    def judge(self, argv, names, right):
        "Run a command on bad input: either `right(result)`, or a proper refusal that changes nothing"
        before,res = tree(self.dir),self.run(argv)
        if res.code==0: return right(res)
        one_line(res, names)
        now = tree(self.dir)
        if changed := sorted(k for k in {*now, *before} if now.get(k)!=before.get(k) and not (k not in now and k.endswith('.tmp'))):  # what a kill left may be tidied away
            raise Failed('wrong', f'refused, but changed {changed[:4]}')
    def like(self, name):
        "Whether a result has all lines of that of command `name` on undamaged input, in their order; there may be notes between them"
        if self.w.ref[name].code: raise Failed('message', f'undamaged input is refused: {self.w.ref[name].err[-200:]}')
        def right(res):
            lines = iter(self.w.plain(res.out, self.dir).splitlines())
            if lost := [l for l in self.w.ref[name].out.splitlines() if l not in lines]: raise Failed('wrong', f'exit 0 without the line {lost[0]!r}')
        return right


# ---- kills

SIGNALS = signal.SIGKILL,signal.SIGTERM,signal.SIGINT

PHASES = ['reading data','epoch 1','a later epoch','last epoch, evaluation','writing a checkpoint','after training','first run','second run','tables and pictures','pictures and summary',
    'before it writes','writing','all written']

def phase(name, out):
    "How far a killed command had come, by what it left behind"
    has = lambda o: (out/o).exists()
    rows = lambda o: max(0, len((out/o).read_text().splitlines())-1) if has(o) else 0
    if name=='eval': return 'all written' if len(list(out.glob('[!.]*')))>=len(list((out.parents[2]/'out').iterdir())) else 'writing' if any(out.iterdir()) else 'before it writes'
    if name=='compare': return ['first run','second run','tables and pictures'][min(rows('results.csv'), 2)] if has('comparison.json') else 'reading data'
    if not has('config.json'): return 'reading data'
    if has('results.json'): return 'all written'
    if any(out.glob('.checkpoint.pth?*')): return 'writing a checkpoint'
    if has('model.safetensors'): return 'pictures and summary'
    n = rows('metrics.csv')
    return 'epoch 1' if n==0 else 'a later epoch' if n<2 else 'last epoch, evaluation' if n==2 else 'after training'

def kill(a):
    "Kill a command at a random moment, go on with it, and compare with the uninterrupted one"
    name = a.kind.split(maxsplit=1)[1]
    ref,first = a.w.ref[name],a.w.argv(name, a.dir)
    out = a.dir/'out' if name=='eval' else Path(first[3])
    if name=='eval': a.copy('run'); out.mkdir()
    again = ['reid-train', '--resume', out] if name.startswith('train') else first
    for n in range(1+sum(a.rng.random()<.3 for _ in range(2))):
        sig,argv = SIGNALS[(a.i+n)%3],first if n==0 or not (out/'config.json').exists() else again
        if a.rng.random()<.5: res = a.run(argv, events=out, nth=a.rng.randint(1, len(ref.events)), own=sig)
        else: res = a.run(argv, after=a.rng.uniform(0, ref.secs), sig=sig)
        if n==0: a.row = f'{a.kind}: {phase(name, out)}'
        if 'Traceback' in res.err: raise Failed('traceback', f'{sig.name}: {res.err.splitlines()[-1]}')
        if res.code=='hang' or (res.code and res.code not in {signal.SIGKILL:(-9,), signal.SIGTERM:(143,-15), signal.SIGINT:(130,)}[sig]):
            raise Failed('hang' if res.code=='hang' else 'message', f'exit {res.code} after {sig.name}: {res.err[-300:]!r}')
        if res.code==130 and not 1<=len(res.err.splitlines())<=2: raise Failed('message', f'{len(res.err.splitlines())} lines after Ctrl-C: {res.err[-300:]!r}')
    res = a.run(again if out.exists() else first)
    if res.code and not (out/'config.json').exists(): res = a.run(first)  # nothing was begun
    if res.code: raise Failed('hang' if res.code=='hang' else 'traceback' if 'Traceback' in res.err else 'wrong', f'cannot go on: {res.err[-300:]!r}')
    left = [o for o in figures(out) if name=='eval' and o.startswith('.')]  # of an output folder that is the user's, SIGKILL may leave a part
    same(figures(out), ref.figures, left)
    if name=='eval': a.like('eval')(res)

def kill_rank(a):
    "Kill one of two processes that train together, and then the other as a launcher would; go on with one, two or four"
    ref,argv,out = a.w.ref['two'],a.w.argv('train', a.dir),a.dir/'run'
    rank,n,by_event = a.rng.randrange(2),a.rng.choice([1, 2, 2, 4]),a.rng.random()<.4
    if by_event: rank = 0  # which writes the files
    ps = several(argv, a.dir, a.w.logs, 2, rank, **(dict(events=out, nth=a.rng.randint(1, len(ref.events)), own=signal.SIGKILL) if by_event else {}))
    ps[rank].wait(*(() if by_event else (a.rng.uniform(0, ref.secs), signal.SIGKILL)))
    lost = time.monotonic()-ps[1-rank].begun
    other = ps[1-rank].wait(lost+1, signal.SIGTERM)
    a.row = f'{a.kind}: {phase("train", out)}'
    if other.secs>lost+8: raise Failed('hang', f'the other process went on for {other.secs-lost:.1f} s')
    if 'Traceback' in other.err: raise Failed('traceback', other.err[-300:])
    if other.code not in (0, 2, 143) or len(other.err.splitlines())>2: raise Failed('message', f'exit {other.code}: {other.err[-300:]!r}')
    again = ['reid-train', '--resume', out] if (out/'config.json').exists() else argv
    rs = [o.wait() for o in several(again, a.dir, a.w.logs, n)]
    if any(r.code for r in rs): raise Failed('wrong', f'{n} processes cannot go on: {[r.err[-200:] for r in rs]}')
    if n==2: return same(figures(out), ref.figures)
    if not (out/'results.json').exists(): raise Failed('wrong', 'not complete')
    close(out, a.w.dir/'other'/'two'/'run')

def two_starts(a):
    "A second command on the folder of a run: exactly one gets it, and the other says who has it"
    out,ref = a.dir/'run',a.w.ref
    other = a.rng.choice([a.w.argv('train seed 1', a.dir), ['reid-train','--resume',out], ['reid-compare', a.w.data, '--out', out, *COMPARE]])
    p = a.start(a.w.argv('train', a.dir))
    time.sleep(a.rng.choice([0, a.rng.uniform(0, .9*ref['train'].secs)]))
    q = a.start(other)
    rs = p.wait(),q.wait()
    for r in rs:
        if r.code: one_line(r, [out])
    won = [i for i,r in enumerate(rs) if r.code==0]
    if not won or (len(won)==2 and other[1]!='--resume'): raise Failed('wrong', f'exit {[r.code for r in rs]}')
    same(figures(out), ref['train' if 0 in won else 'compare' if other[0]=='reid-compare' else 'train seed 1'].figures)


# ---- damaged files

def targets(w, kind):
    "Folder, file and the command that meets it"
    names = lambda d: sorted(str(o.relative_to(w.dir/d)) for o in (w.dir/d).rglob('[!.]*') if o.is_file())
    if kind=='weights to start from': return [('run', 'model.safetensors', 'pretrained')]
    if kind=='files of a comparison': return [(d, f, 'compare') for d in ('comp','ccut') for f in names(d)]
    return [*((('cut', f, 'resume cut') for f in 2*names('cut'))), *(('run', f, c) for f in names('run') for c in ('resume','just eval')), *3*[('run', 'model.safetensors', 'just eval')],
            *2*[('f.safetensors', '', 'features')]]

def damage(a, how=None):
    "Damage a file, and use what it belongs to: the figures of the undamaged one, or a refusal that names the file"
    ts = targets(a.w, a.kind)
    d,f,name = a.rng.choice(ts) if how else ts[a.i%len(ts)]
    a.copy(d, *({'run'}-{d} if name=='features' else ()))
    what,how = ('pickle',how) if how else a.rng.choice(list(DAMAGES.items()))
    how(p := a.dir/d/f, a.rng)
    bad = p.read_bytes() if p.is_file() else None
    argv = a.w.argv(name, a.dir)
    if d=='ccut': argv[3] = a.dir/'ccut'
    def right(res):
        if name in ('resume','just eval','features'): a.like(name)(res)
        if name in ('just eval','features'): return
        ref = 'pretrained' if name=='pretrained' else 'compare' if name=='compare' else 'train'
        untouched = bad is not None and (d,name)!=('cut','resume cut') and p.is_file() and p.read_bytes()==bad
        same(figures(a.dir/'new' if name=='pretrained' else a.dir/d), a.w.ref[ref].figures, [f] if untouched or f.endswith('.png') else [])
    if name in a.w.ref: a.like(name)
    try: a.judge(argv, [p.name, *([p.parent] if what in ('removed','loop') else [])], right)
    except Failed as e: raise Failed(e.what, f'{d}/{f}, {what}, {name}: {e.why}') from e

class Touch:
    "A pickle that makes a file when it is read"
    def __init__(self, p): self.p = str(p)
    def __reduce__(self): return open,(self.p, 'w')

def pickles(a):
    "A pickle in place of a file"
    import torch
    def evil(p, rng):
        o = rng.choice([lambda x: x, lambda x: {'model':x}, lambda x: {'state_dict':{'weight':torch.zeros(1), 'x':x}}, lambda x: [x]])(Touch(a.dir/'touched'))
        how = rng.choice([lambda: p.write_bytes(pickle.dumps(o, rng.randint(0, 5))), lambda: torch.save(o, p), lambda: torch.save(o, p, _use_new_zipfile_serialization=False)])
        how()
    try:
        if a.i%2: return damage(a, evil)
        evil(p := a.dir/f'w.{a.rng.choice(["pth","pt","bin","pkl","safetensors","ckpt","tar","csv","jpg"])}', a.rng)
        argv = [a.w.argv('train', a.dir)+['--pretrained',p], ['reid-eval',p,a.w.data], ['reid-eval',a.w.run,a.w.data,'--features',p], ['reid-train',p,'--out',a.dir/'run',*TINY]][a.i//2%4]
        a.judge(argv, [p.name], lambda res: (_ for _ in ()).throw(Failed('wrong', 'a pickle was taken')))
    finally:
        if (a.dir/'touched').exists(): raise Failed('wrong', 'the code of a pickle ran')


# ---- images and tables

def images(a):
    """An image of the dataset is damaged or odd: the same figures or a refusal; those of a plain image with the same pixels if the format is odd.
    Flipped bytes that still decode are other pixels, and those are the user's data: any figures."""
    a.copy('run', 'data')
    p = a.rng.choice(sorted((a.dir/'data').rglob('*.jpg')))
    what = a.rng.choice([*TWINS, *PIXELS, *CUTS, *NO_FILE, *4*['bytes']])
    argv,right = a.w.argv('images', a.dir),a.like('images')
    if what in (*TWINS, *PIXELS): im = Image.open(p).convert('RGB')
    try:
        if what in TWINS:
            odd,twin = TWINS[what]
            p.write_bytes(save(twin(im).convert('RGB')))
            plain = a.run(argv)
            p.write_bytes(odd(im))
            def right(res):
                if res.out!=plain.out: raise Failed('wrong', 'other figures than those of a plain image with the same pixels')
        elif what in PIXELS or what=='bytes':
            flip(a.rng.choice([1, 3, 30]))(p, a.rng) if what=='bytes' else p.write_bytes(PIXELS[what](im))
            def right(res):
                if 'header' in what: return a.like('images')(res)  # of a training image, which an evaluation does not read
                if not shown(res): raise Failed('wrong', f'accepted: {res.out[-200:]!r}')
        else:
            {**CUTS, **NO_FILE}[what](p, a.rng)
            if a.rng.random()<.3: argv,right = ['reid-train', a.dir/'data', '--out', a.dir/'new', *TINY],lambda res: same(figures(a.dir/'new'), a.w.ref['train'].figures)
        a.judge(argv, [p.name], right)
    except Failed as e: raise Failed(e.what, f'{what}: {e.why}') from e

def tables(a):
    "A hostile CSV: the figures of the plain one or a refusal; -1 and 0 that become names have to be mentioned"
    a.copy('run')
    (a.dir/'data').symlink_to(a.w.data)
    kinds = {**SAME_OR_REFUSED, **ANY_FIGURES}
    what = [*kinds][a.i%len(kinds)] if a.i<len(kinds) else a.rng.choice([*kinds, *8*['flipped bytes'], *4*['cut']])
    text = kinds[what]([list(o) for o in a.w.rows], a.rng)
    (a.dir/'table.csv').write_bytes(text if isinstance(text, bytes) else text.replace('{dir}', str(a.w.dir)).encode())
    def right(res):
        if what not in ANY_FIGURES and not re.search(r'(-1|\b0\b).*\bname', res.out+res.err): a.like('table')(res)
        elif not shown(res): raise Failed('wrong', f'accepted: {res.out[-200:]!r}')
    try: a.judge(a.w.argv('table', a.dir), ['table.csv','table',a.dir], right)
    except Failed as e: raise Failed(e.what, f'{what}: {e.why}') from e


# ---- options, surroundings, full disks

BAD = ['', 'nan', 'inf', '-inf', '1e400', '-1', '9'*20, 'text', 'x'*5000, '☃λ ü', 'FILE', 'FOLDER', 'FILE/x', '100000x100000', '1x1', "'; ls", '%s{0}', 'true\n']
ODD = ['0', '1', '0.5', '1e-320', '1000', '03']  # right for some options
LONG = {(o, '1000') for o in ('--epochs','--steps','--seeds')}  # right, and too long for a test
NAMES = '--out','--csv','--features','--html','--png','path'  # of what is to be made: any name is right
TEXTS = '--pid','--where'  # any text may be right

def options(a):
    "A value that an option cannot have, or seldom has"
    every = [(p, o, v) for p,pos in PROGS.items() for o in [*a.w.options(p), *pos] for v in BAD+ODD if (o,v) not in LONG]
    prog,opt,v = random.Random(a.seed).sample(every, len(every))[a.i%len(every)]
    a.copy('run', *(['gallery'] if prog=='reid-search' else []))
    (a.dir/'FOLDER').mkdir()
    for o in ('FILE','FOLDER/mine'): (a.dir/o).write_text('mine')
    value = [v] if opt[0]!='-' else [opt, v]
    pos = lambda name, *usual: value if opt==name else usual
    photos = a.w.data/'query'
    argv = {'reid-train': ['reid-train', *pos('data', a.w.data), '--out', 'new', *TINY], 'reid-compare': ['reid-compare', *pos('data', a.w.data), '--out', 'new', *COMPARE],
            'reid-eval': ['reid-eval', *pos('run', 'run'), *pos('data')], 'reid-synth': ['reid-synth', '--tiny', *pos('path', 'new')],
            'reid-embed': ['reid-embed', *pos('model', 'run'), *pos('images', photos), '--out', 'new'], 'reid-export': ['reid-export', *pos('run', 'run')],
            'reid-search': ['reid-search', *pos('gallery', 'gallery'), *pos('photos', sorted(photos.glob('*.jpg'))[0])]}[prog]
    if opt=='--resume': argv = ['reid-train']
    if opt[0]=='-': argv += value
    made = a.dir/(v if opt in ('--out','path') else 'new')
    def right(res):
        if v in BAD and not (opt in NAMES+TEXTS and v) and (opt,prog)!=('--root','reid-compare'): raise Failed('wrong', 'accepted')
        if prog=='reid-embed' and not made.is_dir(): raise Failed('wrong', 'there is no gallery')
        if prog=='reid-export' and not [o for o in [made, *(a.dir/'run').iterdir()] if o.suffix in ('.onnx','.torchscript','.pt2') and o.is_file()]: raise Failed('wrong', 'there is no exported file')
        if prog=='reid-search' and 'distance' not in res.out and '--quiet' not in argv: raise Failed('wrong', f'no answer: {res.out[-100:]!r}')
        if prog=='reid-eval' and not shown(res): raise Failed('wrong', f'no figures: {res.out[-100:]!r}')
        if prog in ('reid-train','reid-compare') and not (made/'summary.md').exists(): raise Failed('wrong', 'there is no summary.md')
        if prog=='reid-train' and 'NaN' in (made/'results.json').read_text(): raise Failed('wrong', 'NaN in results.json')
    said = {opt.strip('-'), opt.strip('-').replace('-', '_'), opt.strip('-').rstrip('s'), v[:40].strip() or 'argument'}
    try: a.judge(argv, said, right)
    except Failed as e: raise Failed(e.what, f'{prog} {opt} {v[:40]!r}: {e.why}') from e

TRAIN,EVAL,COMP = 'train','just eval','compare'
# Surroundings of a real process: shell line, command, exit codes that are right, when the output can be written and when not
SURROUNDINGS = [(o, c, (0,)) for o,c in (('PYTHONIOENCODING=cp1252 {}', TRAIN), ('PYTHONIOENCODING=ascii {}', COMP), ('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {}', TRAIN), ('{} | head -2', TRAIN), ('{} | head -1', EVAL),
    ('{} | head -2', COMP), ('{} <&-', TRAIN), ('env -u HOME -u REID_FASTAI_HOME {}', TRAIN), ('HOME=/proc/none {}', TRAIN), ('HOME=/proc MPLCONFIGDIR=/proc/none {}', COMP),
    ('COLUMNS=1 TERM=dumb {}', TRAIN), ('COLUMNS=none LINES=0 {}', TRAIN), ('umask 077; {}', TRAIN), ('ulimit -n 40; {}', TRAIN), ('{} 2>&1 | cat', COMP))] + [
    ('mkdir gone; cd gone; rmdir ../gone; {}', c, (2,)) for c in (TRAIN, EVAL)] + [
    (o, c, (0, 1, 2, 120)) for o,c in (('{} >/dev/full', TRAIN), ('{} >/dev/full 2>&1', TRAIN), ('{} >&-', TRAIN), ('{} 2>&-', TRAIN), ('{} >/dev/full', COMP))]

def surroundings(a):
    "A real process with a terminal, locale, home or working folder that is not as usual: the run is complete and right"
    line,name,codes = SURROUNDINGS[a.i%len(SURROUNDINGS)]
    if name==EVAL: a.copy('run')
    argv = a.w.argv(name, a.dir)
    shell = 'set -o pipefail; '+line.format(shlex.join([script(argv[0]), *map(str, argv[1:])]))
    try: p = subprocess.run(['bash','-c',shell], cwd=a.dir, capture_output=True, text=True, errors='replace', timeout=2*LIMIT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired: raise Failed('hang', f'{line}: more than {2*LIMIT} s') from None
    if 'Traceback' in p.stderr or 'Exception ignored' in p.stderr: raise Failed('traceback', f'{line}, {name}: {p.stderr[-300:]!r}')
    if p.returncode not in codes: raise Failed('message', f'{line}, {name}: exit {p.returncode}: {p.stderr[-300:]!r}')
    if name==EVAL or codes==(2,): return
    try: same(figures(a.dir/('run' if name==TRAIN else 'comp')), a.w.ref[name].figures)
    except Failed as e: raise Failed(e.what, f'{line}, {name}: {e.why}') from e

def disk_full(a):
    "A command on a small tmpfs: a refusal that says what was needed, nothing half-made, and what was begun goes on when there is room"
    name,d = ('train','compare','eval','train held-out','synth','train')[a.i%6],a.dir/'disk'
    d.mkdir()
    out = {'synth':d/'data', 'eval':d/'out', 'compare':d/'comp'}.get(name, d/'run')
    need = {'synth':600, 'eval':400}.get(name, 160_000)  # kB
    mount = lambda *o: subprocess.run(['mount', *o], check=True, capture_output=True)
    mount('-t', 'tmpfs', '-o', f'size={round(need*a.rng.uniform(.01, .9))}k', 'none', str(d))
    try:
        if name=='eval': (d/'run').symlink_to(a.w.run); out.mkdir()
        argv = a.w.argv(name, d)
        before,res = tree(d),a.run(argv)
        if res.code:
            said,kept = one_line(res),(out/'config.json').exists() or (out/'comparison.json').exists()
            if not re.search(r'\d+(\.\d+)? ?([kKMG]i?B|bytes)', said) or (kept and name.startswith('train') and '--resume' not in said) or str(d) not in said: raise Failed('message', f'file, need or `--resume` is not named: {said!r}')
            if not kept and name!='eval' and tree(d)!=before: raise Failed('wrong', f'left behind: {sorted({*tree(d)}-{*before})[:4]}')
            if any(o.name.startswith('.') and o.stat().st_size>4096 for o in d.rglob('*') if o.is_file()): raise Failed('wrong', 'a half-written file is left behind')
            mount('-o', 'remount,size=900m', str(d))
            res = a.run(['reid-train','--resume',out] if kept and name.startswith('train') else argv)
            if res.code: raise Failed('wrong', f'cannot go on: {res.err[-300:]!r}')
        same(figures(out), figures(a.w.data) if name=='synth' else a.w.ref[name].figures)
    finally: subprocess.run(['umount', '-l', str(d)])

def can_mount():
    with tempfile.TemporaryDirectory() as d:
        return not subprocess.run(f'mount -t tmpfs -o size=64k none {d} && umount {d}', shell=True, capture_output=True).returncode if sys.platform=='linux' else False


# ---- all of them

def _k(f, share, group, *needs): return SimpleNamespace(f=f, share=share, group=group, needs=needs)
KINDS = {'kill train': _k(kill, .4, 'kills'), 'kill train held-out': _k(kill, .15, 'kills', 'train held-out'), 'kill compare': _k(kill, .18, 'kills', 'compare'), 'kill eval': _k(kill, .17, 'kills', 'eval'), 'kill a rank': _k(kill_rank, .1, 'kills', 'two'),
    'files of a run': _k(damage, .29, 'inputs', 'cut', 'resume', 'just eval', 'eval', 'features'), 'weights to start from': _k(damage, .02, 'inputs', 'pretrained'), 'files of a comparison': _k(damage, .1, 'inputs', 'compare', 'ccut'), 'images': _k(images, .13, 'inputs', 'images'),
    'tables': _k(tables, .12, 'inputs', 'table'), 'options': _k(options, .26, 'inputs', 'gallery'), 'pickles': _k(pickles, .04, 'inputs', 'cut', 'resume', 'just eval', 'eval', 'features'),
    'surroundings': _k(surroundings, .025, 'inputs', 'compare', 'just eval'), 'two starts': _k(two_starts, .015, 'inputs', 'compare', 'train seed 1'),
    'disk full': _k(disk_full, 1, 'disks', 'train held-out', 'compare', 'eval')}

def numbers(kinds, asked):
    "Kind -> how many attacks: shares of `asked.kills`, `asked.inputs` and `asked.disks` that add up to them"
    res,upto = {},Counter()
    for name,k in kinds.items():
        part = lambda: round(getattr(asked, k.group)*upto[k.group]/sum(o.share for o in kinds.values() if o.group==k.group))
        before = part()
        upto[k.group] += k.share
        res[name] = part()-before
    return res

def attack(world, kind, i, seed, keep):
    "One attack: the row of the table it counts for, what was wrong, and why"
    a,what,why = Attack(world, kind, i, seed),'survived',''
    try: KINDS[kind].f(a)
    except Failed as e: what,why = e.what,e.why
    except Exception as e: what,why = 'message',f'the harness failed: {"".join(traceback.format_exception(e))[-300:]}'
    if not (keep and what!='survived'): shutil.rmtree(a.dir, ignore_errors=True)
    return dict(kind=kind, i=i, row=a.row, what=what, why=why[:500])

def attacks(world, cases, seed, jobs, keep):
    "Yield the results of all attacks, which forked workers take one by one from a file they share"
    (todo := world.dir/'todo').write_bytes(b''.join(struct.pack('<I', i) for i in range(len(cases))))
    fd,(r,w) = os.open(todo, os.O_RDONLY),os.pipe()
    for _ in range(jobs):
        if os.fork(): continue
        try:
            while n := os.read(fd, 4): os.write(w, json.dumps(attack(world, *cases[struct.unpack('<I', n)[0]], seed, keep)).encode()+b'\n')  # below 4 kB, so whole
        finally: os._exit(0)
    os.close(w)
    with open(r) as f: yield from map(json.loads, f)

def self_check(world):
    "A forked command gives what a real process gives"
    d = world.dir/'other'/'process'
    argv = world.argv('train', d)
    subprocess.run([script(argv[0]), *map(str, argv[1:])], capture_output=True, check=True)
    same(figures(d/'run'), world.ref['train'].figures)

def table(found):
    "What was tried and what became of it, as text"
    cols = dict(survived='survived', hang='hangs', traceback='tracebacks', wrong='wrong results', message='unclear errors')
    rows = Counter((o['row'], o['what']) for o in found)
    keys = sorted({k for k,_ in rows}, key=lambda k: [f(o) for f,o in zip((list(KINDS).index, PHASES.index), k.split(': '))])
    count = lambda k, w: sum(n for (r,v),n in rows.items() if (k is None or r==k) and (w is None or v==w))
    lines = [['kind of attack','tried',*cols.values()], *([k or 'all', count(k, None), *(count(k, w) for w in cols)] for k in [*keys, None])]
    return '\n'.join(f'{str(l[0]):<48}'+''.join(f'{o:>15}' for o in l[1:]) for l in lines)

def main():
    p = argparse.ArgumentParser(description='Attack the commands with kills, damaged files, hostile input and full disks, and judge what they make of it.')
    for o,v,h in (('kills',100,'Runs to kill'), ('inputs',1000,'Damaged or hostile inputs'), ('disks',24,'Full disks'), ('seed',0,'Of everything'), ('jobs',2,'Attacks at once')):
        p.add_argument(f'--{o}', type=int, default=v, help=f'{h}; default: {v}')
    p.add_argument('--only', help=f'Kinds of attack, separated by commas: {", ".join(KINDS)}')
    p.add_argument('--case', type=int, help='Number of the one attack to repeat; with `--only`')
    p.add_argument('--keep', help='New folder for the work, in which the folders of failed attacks are kept')
    a = p.parse_args()
    kinds = {k: KINDS[k] for k in (a.only.split(',') if a.only else KINDS)}
    import reid_fastai.cli, matplotlib.backends.backend_agg  # noqa: F401; once for all children
    Image.init()
    home = Path(a.keep or tempfile.mkdtemp(prefix='attack-')).resolve()
    os.environ['REID_FASTAI_HOME'] = str(home/'cache')
    skipped = 'disk full' in kinds and not can_mount()
    if skipped: del kinds['disk full']
    cases = [(k, i) for k,n in numbers(kinds, a).items() for i in range(n)] if a.case is None else [(k, a.case) for k in kinds]
    random.Random(a.seed).shuffle(cases)
    try:
        (world := World(home)).make(kinds)
        if not a.only: self_check(world)
        found,begun = [],time.monotonic()
        for o in attacks(world, cases, a.seed, a.jobs, a.keep):
            found.append(o)
            if sys.stderr.isatty(): print(f'\r{len(found)} of {len(cases)} attacks, {time.monotonic()-begun:.0f} s ', end='', file=sys.stderr)
    finally:
        if not a.keep: shutil.rmtree(home, ignore_errors=True)
    bad = sorted((o for o in found if o['what']!='survived'), key=lambda o: (o['kind'], o['i']))
    print(f'\n{table(found)}\n\nSeed {a.seed}, {(time.monotonic()-begun)/60:.1f} minutes, {a.jobs} at once.'+' Full disks were skipped: no tmpfs can be mounted.'*skipped)
    for o in bad: print(f'\n{o["what"]}: {o["row"]}: {o["why"]}\n    {sys.executable} {sys.argv[0]} --seed {a.seed} --only {shlex.quote(o["kind"])} --case {o["i"]}')
    if len(found)!=len(cases): print(f'\n{len(cases)-len(found)} attacks have no result.')
    return int(bool(bad) or len(found)!=len(cases))

if __name__=='__main__': sys.exit(main())
