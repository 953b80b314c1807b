"The benchmarks run, at toy size"
import ast, os, re, runpy, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import TensorImage

import reid_fastai.all  # noqa: F401; once for all forks
from reid_fastai.config import RunConfig
from reid_fastai.core import DivergedError
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.test_utils import tiny_learner
from forks import fork, leave, log_to

root = Path(__file__).parents[1]

def run(*args): return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=root, timeout=200)

def forked(script, *args, logs):
    "Run a script in a fork of this process, which saves the imports"
    if not hasattr(os, 'fork') or torch.cuda.is_available(): return run(script, *args)  # CUDA does not survive a fork
    _,status = os.waitpid(fork(_script, [script, *map(str, args)], logs/'log'), 0)
    return SimpleNamespace(returncode=os.waitstatus_to_exitcode(status), **{f'std{o}': (logs/f'log.{o}').read_text() for o in ('out','err')})

def _script(argv, log):
    log_to(log)
    os.chdir(root)
    signal.alarm(200)  # as long as `run` waits
    torch.set_num_threads(1)  # the threads of the parent do not exist in a fork
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent.absolute()))  # as for a script
    try: runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as e: leave(e)

def test_gpu_script_on_the_cpu(tmp_path):
    res = forked('benchmarks/gpu.py', '--tiny', '--device', 'cpu', logs=tmp_path)
    assert res.returncode==0, res.stderr[-800:]
    for o in '| fp32 | contiguous_format |','| fp32 | channels_last |','the penalty alone','| tiny |','Run folder:': assert o in res.stdout
    bad = forked('benchmarks/gpu.py', logs=tmp_path) if not torch.cuda.is_available() else None
    assert bad is None or bad.returncode==1 and '\nNo GPU here' in '\n'+bad.stderr and 'Traceback' not in bad.stderr

@pytest.fixture
def benchmark(monkeypatch):
    "Names of a script"
    monkeypatch.syspath_prepend(root/'benchmarks')
    return lambda name: SimpleNamespace(**runpy.run_path(str(root/'benchmarks'/f'{name}.py')))

@pytest.fixture
def gpu(monkeypatch):
    "The script as a module"
    monkeypatch.syspath_prepend(root/'benchmarks')
    import gpu
    monkeypatch.setattr(gpu, 'BEGAN', time.perf_counter())
    return gpu

def test_wheels_for_the_gpu_script():
    "Its help names all that the package and pytest need beside torch and timm"
    from importlib import metadata
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    def needed(*names):
        "With what they require, without extras, and without spacy, which nothing imports"
        found,todo = set(),[*names]
        while todo:
            if (n := canonicalize_name(todo.pop())) in found|{'spacy'}: continue
            found.add(n)
            todo += [r.name for r in map(Requirement, metadata.requires(n) or []) if not r.marker or r.marker.evaluate(dict(extra=''))]
        return found
    text = ast.get_docstring(ast.parse((root/'benchmarks/gpu.py').read_text()))
    named = re.search(r'pip download --no-deps -d WHEELS (.+?)\n\n', text, re.S)[1].replace('\\', '').split()
    missing = needed('reid_fastai', 'pytest')-needed('torch', 'timm')-{'reid-fastai', *map(canonicalize_name, named)}
    assert not missing, f'Name these in the help of benchmarks/gpu.py: {sorted(missing)}'

def test_time_of_the_gpu_script(gpu, monkeypatch, capsys):
    "A part without time is left out, a command that takes too long is ended, and one that fails says why"
    gpu.main('--tiny --device cpu --minutes 0'.split())
    assert capsys.readouterr().out.count(': left out, 0 s are left for it')==4
    gpu.command(SimpleNamespace(left=lambda: .1), 'Slow', '-c', 'import time; time.sleep(60)')
    with pytest.raises(RuntimeError, match='^exit code 1: why$'): gpu.command(SimpleNamespace(left=lambda: 60), 'Bad', '-c', 'import sys; print("seen"); sys.exit("why")')
    assert capsys.readouterr().out=='\n## Slow\n\nNot done within 0 s\n\n## Bad\n\nseen\n'
    lefts = []
    monkeypatch.setattr(gpu, 'PARTS', {lambda a: lefts.append(a.left()): (1,0), lambda a: lefts.append(a.left()): (1,0)})
    gpu.main('--tiny --device cpu --minutes 8'.split())
    assert lefts[0]<=235<lefts[1]<=470

def test_a_part_that_fails(gpu, monkeypatch, capsys):
    "Such as a compiled training without a compiler: one line, and the rest of the table and the other parts follow"
    def compiled(a, row, precision, layout, *_):
        if layout is torch.channels_last: print(f'{row}done')
        else: raise RuntimeError('no compiler\nin any of these folders: …')
    def shares(a): raise ValueError('out of memory')
    def last(a): print('last')
    monkeypatch.setattr(gpu, 'beside_bare', compiled)
    monkeypatch.setattr(gpu, 'PARTS', {gpu.training: (1,0), shares: (1,0), last: (1,0)})
    with pytest.raises(SystemExit, match='failed'): gpu.main('--tiny --device cpu'.split())
    said = capsys.readouterr().out.splitlines()
    at = said.index('| fp32 | contiguous_format | False | RuntimeError: no compiler in any of these folders: …')
    assert said[at+1]=='| fp32 | channels_last | False | done' and said[-3:]==['', 'shares: ValueError: out of memory', 'last']

def test_gpu_script_collects_one_file(gpu, monkeypatch):
    "Others import hypothesis, nbdev or execnb, which the machine need not have"
    monkeypatch.setattr(gpu, 'command', lambda a, title, *args: said.extend(args))
    said = []
    gpu.gpu_tests(None)
    assert [o for o in said if 'tests' in str(o)]==[root/'tests'/'test_gpu.py']

def test_training_beside_a_bare_loop(tmp_path):
    res = forked('benchmarks/training.py', logs=tmp_path, *['--arch', 'resnet10t', '--size', '64', '32', '--bs', '8', '--steps', '1', '--rounds', '1', '--data', make_synthetic(tiny=True)])
    assert res.returncode==0 and '× the bare loop' in res.stdout and 'not known' not in res.stdout, res.stderr[-800:]

def test_peak_memory_of_a_process(tmp_path):
    "A process has its own peak, not that of the larger process that started it"
    code = "import numpy as np, subprocess, sys; sys.path.insert(0, 'benchmarks'); from memory import peak; np.ones(10**8); print(peak()); sys.exit(subprocess.call([sys.executable, '-c', 'import sys; sys.path.insert(0, \"benchmarks\"); from memory import peak; print(peak())']))"
    res = run('-c', code)
    parent,child = map(float, res.stdout.split())
    assert .8<parent<1.2 and child<.1, res.stdout

def test_how_many_identities(tmp_path, benchmark):
    "Nested parts of the training identities, the same steps and the same test set; complete runs are not repeated"
    from reid_fastai.files import read_json
    data = str(make_synthetic(tiny=True))
    args = ['benchmarks/identities.py', data, '--out', tmp_path/'o', '--pretrained', 'none', '--identities', '0', '3', '6', '--set', 'arch=resnet10t', 'size=64x32', 'epochs=1', 'n_pids=4']
    res = forked(*args, logs=tmp_path)
    assert res.returncode==0 and '| identities | images | mAP | Rank-1 |' in res.stdout, res.stderr[-800:]
    df = pd.read_csv(tmp_path/'o'/'identities.csv')
    assert df.identities.tolist()==[0,3,6] and df.images.tolist()==[0,18,36]
    few,more = (read_json(tmp_path/'o'/f'{n}-all-42'/'config.json') for n in (3,6))
    assert (few['n_pids'],more['n_pids'])==(3,4) and few['steps']==more['steps']==3
    before = (tmp_path/'o'/'3-all-42'/'model.safetensors').stat().st_mtime_ns
    assert forked(*args, logs=tmp_path).returncode==0 and (tmp_path/'o'/'3-all-42'/'model.safetensors').stat().st_mtime_ns==before
    assert len(pd.read_csv(tmp_path/'o'/'identities.csv'))==3
    for said in 'bf16 mixed precision','bf16 mixed precision, then fp32, compiled': assert benchmark('identities').first_precision(dict(precision=said))=='bf16'
    assert benchmark('identities').first_precision(dict(precision='fp32, TF32 off'))=='fp32'
    bad = forked(*args, '--out', tmp_path/'other', '--identities', '-3', logs=tmp_path)
    assert bad.returncode==1 and 'numbers from 0' in bad.stderr
    bad = forked(*args, '--out', tmp_path/'other', '--identities', '3', '99', logs=tmp_path)
    assert bad.returncode==1 and 'has 10 training identities' in bad.stderr and 'Traceback' not in bad.stderr and not (tmp_path/'other').exists()

def test_controls(tmp_path):
    "Every control trains; rows of the file are not trained again"
    args = ['benchmarks/controls.py', str(make_synthetic(tiny=True)), '--out', tmp_path/'c.csv', '--set', 'arch=test_resnet', 'pretrained=none', 'size=32x32', 'epochs=1', 'steps=3', 'lr=0.03', 'n_pids=4']
    res = forked(*args, logs=tmp_path)
    assert res.returncode==0 and '| control | seeds | mAP | Rank-1 |' in res.stdout, res.stderr[-800:]
    df = pd.read_csv(tmp_path/'c.csv')
    assert len(df)==16 and df.control.is_unique and df.mAP.between(0, 100, inclusive='neither').all()
    assert df[~df.control.str.contains('random')].mAP.nunique()>10  # the controls differ
    df.iloc[1:].to_csv(tmp_path/'c.csv', index=False)
    again = forked(*args, '--controls', 'none', 'norm', logs=tmp_path)
    assert again.returncode==0 and again.stdout.count("{'control'")==1 and pd.read_csv(tmp_path/'c.csv').mAP.iloc[-1]==df.mAP.iloc[0]
    arms = forked(*args, '--controls', 'constant', 'conventional=0.0025', 'rotation=0.01', 'rotation=0.05', logs=tmp_path)
    mAP = pd.read_csv(tmp_path/'c.csv').set_index('control').mAP
    assert arms.returncode==0 and mAP['conventional=0.0025']==mAP.constant and mAP['rotation=0.01']==mAP.both!=mAP['rotation=0.05'], arms.stderr[-800:]
    held = forked(*args, '--out', tmp_path/'h.csv', '--controls', 'none', 'both', 'rotation=0.05', '--hold-out', '.4', '--distractors', '.2', logs=tmp_path)
    df = pd.read_csv(tmp_path/'h.csv')
    assert held.returncode==0 and df['held-out mAP'].nunique()==df.mAP.nunique()==3 and (df['held-out mAP']!=df.mAP).all() and df.dataset.str.contains('4 of 10 training identities held out').all(), held.stderr[-800:]
    d = df['held-out mAP'].rank()-df.mAP.rank()
    assert f'held-out and test mAP: {1-6*(d**2).sum()/(3*8):.2f} over 3 runs' in held.stdout and '| control | seeds | held-out mAP | mAP | Rank-1 |' in held.stdout
    for bad,words in ((['--controls', 'some'], "['some']"), (['--controls', 'some=0.1'], "l2='some'"), (['--set', 'epochs=1', 'steps=3', 'pretrained=none'], 'arch=test_resnet'),
                      (['--hold-out', '.4'], 'has rows with dataset='), (['--hold-out', '2'], 'share=2'),
                      ([o.replace('lr=0.03', 'lr=0.3') for o in args[args.index('--set'):]], 'has rows with options='), (['--set', 'epoch=5'], 'no option epoch'),
                      (['--set', 'seed=1'], 'use --seed'), (['--set', 'val_pids=0.1'], 'in its own way'), (['--set', 'factor=0.5'], 'conventional=0.0125')):
        res = forked(*args, *bad, logs=tmp_path)
        assert res.returncode==1 and words in res.stderr and 'Traceback' not in res.stderr

def test_recipe(tmp_path):
    "Every change trains, and most differ, on held-out identities"
    args = ['benchmarks/recipe.py', str(make_synthetic(tiny=True)), '--out', tmp_path/'r.csv', '--set', 'arch=tf_mobilenetv3_small_minimal_100', 'pretrained=none', 'size=64x32', 'epochs=1', 'steps=3', 'lr=0.03', 'n_pids=4', 'n_imgs=2', '--distractors', '0']
    res = forked(*args, logs=tmp_path)
    assert res.returncode==0 and '| change | seeds | mAP |' in res.stdout, res.stderr[-800:]
    df = pd.read_csv(tmp_path/'r.csv')
    assert len(df)==17 and df.change.is_unique and df.mAP.between(0, 100, inclusive='neither').all() and df['mAP after the neck'].nunique()>14
    again = forked(*args, logs=tmp_path)
    assert again.returncode==0 and "{'change'" not in again.stdout
    for bad,words in ((['--changes', 'some'], "['some']"), (['--set', 'regions=2'], 'regions=2'), (['--set', 'arch=osnet_x0_25', 'pretrained=none'], 'arch=osnet_x0_25'),
                      (['--set', 'arch=resnet18', 'pretrained=none', 'size=64x32', '--changes', 'base', 'stride'], "change 'stride': resnet18")):
        res = forked(*args, *bad, logs=tmp_path)
        assert res.returncode==1 and words in res.stderr and 'Traceback' not in res.stderr

def test_changes_of_a_recipe(benchmark):
    "A patch comes from another image of the batch, GeM weighs large values more, and strips are pooled alone"
    recipe = benchmark('recipe')
    learn = tiny_learner()
    recipe.patch(learn)
    cover, = [o for o in learn.dls.train.after_batch.fs if isinstance(o, recipe.PatchEach)]
    torch.manual_seed(0)
    x = TensorImage(torch.arange(32.).view(-1, 1, 1, 1).expand(-1, 3, 16, 8))
    values = [o.unique().tolist() for o in cover.encodes(x)]
    assert all(set(v)<={i, (i+16)%32} and i in v for i,v in enumerate(values)) and 8<sum(len(v)==2 for v in values)<24
    head = recipe.GeMHead(1, 2)
    fmap = torch.tensor([.1,.5]).view(1, 1, 1, 2)
    assert head.embed(fmap).item()==pytest.approx(((.1**3+.5**3)/2)**(1/3), rel=1e-5)
    small = tiny_learner()
    net = small.model.eval()
    before = net(x := torch.rand(2, 3, 64, 32))
    recipe.strips(2)(small)
    parts = net(x).chunk(3, 1)
    assert len(net.heads)==3 and parts[0].equal(before) and not parts[1].equal(parts[2])
    torch.testing.assert_close((parts[1]+parts[2])/2, before)  # no value is clipped here, so the mean of the halves is that of the map

def test_the_average_follows_the_weights(benchmark):
    learn = tiny_learner()
    ps = lambda: torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    start,seen = ps(),[]
    class Steps(Callback):
        def after_batch(self):
            if self.training: seen.append(ps())
    benchmark('recipe').averaged(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=Steps())
    want = start
    for o in seen: want = .99*want+.01*o
    assert len(seen)==3
    torch.testing.assert_close(ps(), want, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('kw,want', [(dict(l2='auto'), .005), (dict(l2='auto', strength=.02), .01), (dict(l2='decoupled'), .75), (dict(l2='adaptive'), .0025)])
def test_half_the_strength(benchmark, kw, want):
    "Of the regulariser that is trained, given or default"
    assert list(benchmark('recipe').CHANGES['half strength'][2](RunConfig(**kw)).values())==[pytest.approx(want)]

def test_a_diverged_training_has_no_row(benchmark, tmp_path, capsys):
    "The others are trained"
    def train(name, seed):
        if name=='a': raise DivergedError('NaN')
        return dict(mAP=1.)
    (rows := benchmark('rows').Rows(tmp_path/'r.csv')).fill('control', ['a','b'], [42], train, ('mAP',))
    assert [o['control'] for o in rows]==['b'] and 'a, seed 42, has no row: NaN' in capsys.readouterr().out

def test_the_starting_model_and_nested_identities(benchmark):
    from reid_fastai.run_setup import load_splits
    m,s = benchmark('identities'),load_splits(str(make_synthetic(tiny=True)))
    cfg = RunConfig(str(s.root), arch='test_resnet', pretrained='none', size='64x32')
    assert m.untrained(s, cfg)==m.untrained(s, cfg), 'random weights have the seed'
    few,more = (m.subset(s, n, 0, 42) for n in (3,6))
    assert {*few.train.pid}<{*more.train.pid}<{*s.train.pid} and few.query.equals(s.query) and more.gallery.equals(s.gallery)

def test_few_digits(benchmark):
    "Fewer than a batch are trained on"
    m = benchmark('classifier')
    assert len(m.loaders(20).train)==1 and len(m.loaders(150).train)==5

def test_digits_are_kept(benchmark, tmp_path, monkeypatch):
    "Each accuracy is written at once"
    m,n = benchmark('classifier'),[]
    def accuracy(*_):
        n.append(1)
        if len(n)==3: raise KeyboardInterrupt
        return 50.
    monkeypatch.setitem(m.main.__globals__, 'accuracy_of', accuracy)
    with pytest.raises(KeyboardInterrupt): m.main(SimpleNamespace(images=30, epochs=1, lr=.1, seeds=2, csv=str(tmp_path/'c.csv')))
    assert len(pd.read_csv(tmp_path/'c.csv'))==2

def test_memory_is_measured_before_the_products(benchmark, monkeypatch):
    m,seen = benchmark('retrieval'),[]
    monkeypatch.setitem(m.run.__globals__, 'peak', lambda: seen.append('peak') or 1.)
    monkeypatch.setitem(m.run.__globals__, 'product', lambda q,g: seen.append('product'))
    m.run('tiny', SimpleNamespace(repeats=1, verify=False, torchreid=None, rerank=False))
    assert seen[0]=='peak'

def test_rows_without_time_are_named(benchmark, capsys):
    benchmark('gpu').training(SimpleNamespace(steps=1, bs=8, size=(64,32), device=torch.device('cpu'), rounds=1, tiny=False, arch='x', left=lambda: 0))
    assert '| fp32 | contiguous_format | False | left out, no time |' in capsys.readouterr().out

def test_turns_begin_with_full_queues(benchmark, monkeypatch):
    "The loaders of other libraries do not work during the turns that follow theirs"
    m,seen = benchmark('training'),[]
    for k in ('bare','ours_in_memory','ours_from_files','torchreid'): monkeypatch.setitem(m.main.__globals__, k, lambda a: lambda: seen.append('go'))
    monkeypatch.setattr(m.time, 'sleep', lambda s: seen.append('wait'))
    monkeypatch.setattr(m.subprocess, 'run', lambda *a, **k: SimpleNamespace(returncode=1, stdout=''))
    m.main(SimpleNamespace(torchreid='x', fastreid=None, compile=False, only=None, arch='x', size=(1,1), bs=4, precision='fp32', rounds=1, steps=1, epochs=1, data='x'))
    assert seen[4:]==['wait','go']*4

def test_batches_of_whole_identities(tmp_path):
    res = forked('benchmarks/large.py', '--bs', '18', '--images', '60', logs=tmp_path)
    assert res.returncode==2 and 'multiple of 4' in res.stderr

def test_values_of_options(monkeypatch):
    import argparse
    monkeypatch.syspath_prepend(root/'benchmarks')
    from options import positive, setting, value
    assert [value(f'k={o}')[1] for o in ('False','None','2','.01','256x128','true')]==[False,None,2,.01,'256x128','true']
    for f,bad in ((value, 'epochs'), (positive, '0')):
        with pytest.raises(argparse.ArgumentTypeError): f(bad)
    of = lambda recipe: setting(RunConfig('synthetic', recipe, arch='resnet50', size='384x128', epochs=5, steps=200), 'cpu', 'arch', 'size', 'epochs', 'steps')
    assert of('quick')['options']=='{}' and 'paper' in of('paper')['options'] and of('paper')['precision']=='fp32'
    with pytest.raises(ValueError, match="flip='no': it must be True or False"): RunConfig(flip='no')

def test_rows_of_a_value_that_is_none(tmp_path, monkeypatch):
    "A CSV file holds None as an empty cell"
    monkeypatch.syspath_prepend(root/'benchmarks')
    from rows import Rows
    Rows(tmp_path/'r.csv').add(dict(control='none', steps=None))
    Rows(tmp_path/'r.csv').check_same(control='none', steps=None)
    with pytest.raises(ValueError, match='steps=None, but this call has 3'): Rows(tmp_path/'r.csv').check_same(steps=3)

def test_lars_moves_arrays_of_zeros(monkeypatch):
    "They and vectors take the plain step, kernels one in proportion to their norm; `lars=LR` is another learning rate"
    monkeypatch.syspath_prepend(root/'benchmarks')
    control = runpy.run_path(str(root/'benchmarks'/'controls.py'))['control']
    cfg,_,opt_func = control('lars=0.5', RunConfig(l2='none'), .01)
    assert cfg.lr==.5 and control('lars', cfg, .01)[0].lr==1e-3
    ps = [torch.nn.Parameter(o) for o in (torch.zeros(2, 2), torch.tensor([3.,4.]), torch.full((2,2), 2.))]
    for p in ps: p.grad = torch.full_like(p, .5)
    olds = [p.detach().clone() for p in ps]
    opt_func(ps, lr=.1).step()
    for p,o,step in zip(ps, olds, (.05,.05,.2)): assert torch.allclose(o-p, torch.full_like(o, step))

def test_cost_of_rotation_control(tmp_path):
    res = forked('benchmarks/rotation.py', *'--arch test_resnet --height 32 --width 32 --bs 8 --steps 1 --threads 1'.split(), logs=tmp_path)
    assert res.returncode==0 and ' scale-invariant arrays of ' in res.stdout, res.stderr[-800:]
    for how in ('array','channel'): assert f'per {how}: ' in res.stdout

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the limit and the memory of processes are those of Linux')
def test_more_images_than_memory(tmp_path):
    res = forked('benchmarks/large.py', *'--images 60 --size 64 32 --arch test_resnet --bs 8 --steps 1'.split(), logs=tmp_path)
    assert res.returncode==0 and ' 0 loader processes' in res.stdout and 'images a second; at most' in res.stdout, res.stderr[-800:]

def test_held_out_ranking_beside_the_test_ranking(tmp_path):
    "The rank correlation over models whose held-out figures are given"
    from reid_fastai.export import save_model
    from reid_fastai.files import write_json
    from reid_fastai.models import build_reid_net
    data,held = str(make_synthetic(tiny=True)),[50.,70.,60.,40.]
    write_json(tmp_path/'comparison.json', dict(cfg=dict(data=data, flip=False)))
    pd.DataFrame([dict(stage='tune', arm='none', strength=i, mAP=h, folder=f'm{i}') for i,h in enumerate(held)]).to_csv(tmp_path/'results.csv', index=False)
    for i in range(4):
        torch.manual_seed(i)
        (tmp_path/f'm{i}').mkdir()
        save_model(build_reid_net('test_resnet', 5, regions=0, pretrained=False), tmp_path/f'm{i}'/'model.safetensors', (32,32))
    res = forked('benchmarks/heldout.py', tmp_path, logs=tmp_path)
    df = pd.read_csv(tmp_path/'heldout.csv')
    assert res.returncode==0 and len(df)==4 and df['test mAP'].nunique()==4, res.stderr[-800:]
    d = df['held-out mAP'].rank()-df['test mAP'].rank()
    assert f'held-out and test mAP: {1-6*(d**2).sum()/(4*15):.2f} over 4 runs' in res.stdout
    pd.read_csv(tmp_path/'results.csv').head(2).to_csv(tmp_path/'results.csv', index=False)
    for folder,words in ((tmp_path,'has 2 tuning runs'), (tmp_path/'m0','results.csv is missing')):
        res = forked('benchmarks/heldout.py', folder, logs=tmp_path)
        assert res.returncode==1 and words in res.stderr and 'Traceback' not in res.stderr

def test_embedding():
    res = run('benchmarks/embedding.py', '--arch', 'test_resnet', '--size', '32', '32', '--images', '8', '--rounds', '1', '--threads', '1')
    assert res.returncode==0 and 'freed memory kept' in res.stdout, res.stderr[-800:]

def test_a_problem_other_than_re_id(tmp_path):
    res = forked('benchmarks/classifier.py', '--images', '30', '--epochs', '1', '--seeds', '2', '--csv', tmp_path/'c.csv', logs=tmp_path)
    assert res.returncode==0 and '| auto, default |' in res.stdout, res.stderr[-800:]
    df = pd.read_csv(tmp_path/'c.csv')
    assert len(df)==2*26 and df.accuracy.between(0, 100).all() and df.groupby('arm').accuracy.nunique().max()>3

def test_retrieval_with_thresholds(tmp_path):
    res = forked('benchmarks/retrieval.py', '--sizes', 'tiny', '--repeats', '1', '--verify', logs=tmp_path)
    assert res.returncode==0 and 'equal error rate' in res.stdout and 'intervals' in res.stdout, res.stderr[-800:]

def test_exported_networks():
    pytest.importorskip('onnxruntime')
    res = run('benchmarks/export.py', '--arch', 'test_resnet', '--size', '64', '32', '--bs', '2', '--rounds', '1', '--images', '4', '--threads', '1')
    assert res.returncode==0 and '| ONNX int8 | 2 |' in res.stdout, res.stderr[-800:]

def test_gallery_at_toy_size(monkeypatch, capsys):
    "All steps in this process, as the database does not survive a fork"
    pytest.importorskip('lancedb')
    monkeypatch.syspath_prepend(root/'benchmarks')
    def here(*argv):
        monkeypatch.setattr(sys, 'argv', list(argv))
        runpy.run_path(argv[0], run_name='__main__')
    monkeypatch.setattr(subprocess, 'run', lambda argv, check: here(*argv[1:]))
    here(str(root/'benchmarks/gallery.py'), '--n', '600', '--d', '32', '--queries', '5')
    out = capsys.readouterr().out
    for o in '600 embeddings of 32 numbers','| write','| build the index','| approximate search','| exact search','| recall of the index | @1 ': assert o in out
