"How commands end: what they refuse, what they keep, and what they leave behind"
import errno, io, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd, pytest, torch
from torch._utils import ExceptionWrapper

from reid_fastai import cli, config, files, run_setup, runs, shell as shell_module
from reid_fastai.cli import reid_compare, reid_eval, reid_train
from reid_fastai.cli_search import reid_embed, reid_search
from reid_fastai.config import RunConfig, read_config
from reid_fastai.core import DivergedError
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.files import *
from reid_fastai.results import write_results
from reid_fastai.shell import Patient, _parse, one_line, run_command

tiny = ['--arch', 'test_resnet', '--pretrained', 'none', '--size', '64x32', '--n-pids', '4', '--epochs', '2', '--steps', '2']
pos = dict(reid_train=['data'], reid_eval=['run','data'], reid_compare=['data'])

@pytest.fixture(scope='module')
def data(): return str(make_synthetic(tiny=True))

@pytest.fixture
def shell(capsys):
    "Runs a command in this process"
    def f(func, *args):
        capsys.readouterr()
        code = run_command(func.__wrapped__, [str(a) for a in args], func.__name__.replace('_','-'), pos[func.__name__])
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return f

@pytest.fixture(scope='module')
def done(data, tmp_path_factory):
    "A complete run"
    out = tmp_path_factory.mktemp('done')/'run'
    assert run_command(reid_train.__wrapped__, [data, '--out', str(out), *tiny], 'reid-train', ['data'])==0
    return out

@pytest.fixture
def run(done, tmp_path): return Path(shutil.copytree(done, tmp_path/'run'))

@pytest.fixture(scope='module')
def halted(data, tmp_path_factory):
    "A run that was interrupted after its first epoch"
    class Stop:
        def __init__(self, f): self.f = f
        def __call__(self, cp):
            self.f(cp)
            raise KeyboardInterrupt
    out = tmp_path_factory.mktemp('halted')/'run'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runs.Checkpoint, '_write', lambda cp, f=runs.Checkpoint._write: Stop(f)(cp))
        assert run_command(reid_train.__wrapped__, [data, '--out', str(out), *tiny], 'reid-train', ['data'])==130
    return out

@pytest.fixture
def cut(halted, tmp_path): return Path(shutil.copytree(halted, tmp_path/'cut'))

def refused(res, *words):
    assert res.code==2 and res.err.count('\n')==1 and len(res.err)<=320 and 'Traceback' not in res.err, res.err
    for w in words: assert w in res.err, res.err

def figures(out): return {k: v for k,v in read_json(out/'results.json').items() if 'second' not in k and k!='files'}

# ---- folders

def test_a_folder_is_held_by_one_process(cut, shell):
    with hold_folder(cut): refused(shell(reid_train, '--resume', cut), 'in use by process', str(os.getpid()))
    assert shell(reid_train, '--resume', cut).code==0

def test_of_two_starts_on_one_folder_the_second_is_refused(data, tmp_path, shell, monkeypatch):
    "Both passed all checks before either made the folder"
    def slow(*args, f=runs.make_learner, **kw):
        if not (tmp_path/'r').exists(): (tmp_path/'r').mkdir(); write_json(tmp_path/'r'/'config.json', dict(of='the other'))
        return f(*args, **kw)
    monkeypatch.setattr(runs, 'make_learner', slow)
    refused(shell(reid_train, data, '--out', tmp_path/'r', *tiny), 'exists already')
    assert read_json(tmp_path/'r'/'config.json')==dict(of='the other') and len(list(tmp_path.iterdir()))==1

def test_a_folder_is_of_one_kind(run, data, shell):
    before = {o.name: o.read_bytes() for o in run.iterdir()}
    refused(shell(reid_compare, data, '--out', run, *tiny), 'contains a training run')
    refused(shell(reid_eval, run, '--out', run), 'contains a training run')
    refused(shell(reid_train, data, '--out', run, *tiny), 'exists already')
    assert before=={o.name: o.read_bytes() for o in run.iterdir()}

def test_leavings_of_a_killed_process_are_removed(cut, shell):
    (cut/'.checkpoint.pth.abc.tmp').write_bytes(b'half')
    assert shell(reid_train, '--resume', cut).code==0 and not list(cut.glob('.*.tmp'))

def test_a_run_knows_its_data_wherever_it_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(data).parent)
    assert RunConfig(Path(data).name).data==data and RunConfig('~/x').data==os.path.expanduser('~/x')

# ---- damage

@pytest.mark.parametrize('name', ['config.json','results.json','metrics.csv','lambdas.csv','model.safetensors'])
@pytest.mark.parametrize('how', ['flip','cut','empty','gone'])
def test_damage_is_named(name, how, run, done, shell):
    "A run without its results counts as interrupted, and is completed again"
    f = run/name
    data = bytearray(f.read_bytes())
    if how=='flip': data[len(data)*2//3] ^= 4
    f.write_bytes(dict(flip=data, cut=data[:len(data)//2], empty=b'', gone=b'')[how])
    if how=='gone': f.unlink()
    evaluated,again = shell(reid_eval, run),shell(reid_train, '--resume', run)
    if (name,how)==('results.json','gone'): assert evaluated.code==again.code==0 and figures(run)==figures(done)
    else:
        for res in (evaluated,again): refused(res, name)

@pytest.mark.parametrize('at', [.1, .5, .9])
def test_a_damaged_checkpoint_is_refused(at, cut, shell):
    data = bytearray((cut/'checkpoint.pth').read_bytes())
    data[int(at*len(data))] ^= 1
    (cut/'checkpoint.pth').write_bytes(data)
    refused(shell(reid_train, '--resume', cut), 'checkpoint.pth')

def test_a_checkpoint_of_another_network(cut, shell, monkeypatch):
    "Another version of timm builds other arrays"
    monkeypatch.setattr(run_setup, 'build_net', lambda cfg,n,f=run_setup.build_net: f(cfg.but(arch='resnet10t'), n))
    refused(shell(reid_train, '--resume', cut), 'checkpoint.pth is of another network', 'config.json names, or train in another folder')

def test_tables_of_an_interrupted_run_are_written_anew(cut, done, shell):
    for f in ('metrics.csv','lambdas.csv'): (cut/f).write_text('damaged')
    assert shell(reid_train, '--resume', cut).code==0
    assert (cut/'lambdas.csv').read_bytes()==(done/'lambdas.csv').read_bytes() and figures(cut)==figures(done)

def test_a_pickle_is_not_run(cut, tmp_path, shell):
    import pickle
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/touched',)
    for data in (pickle.dumps(Evil()), seal(pickle.dumps(Evil()))):
        (cut/'checkpoint.pth').write_bytes(data)
        refused(shell(reid_train, '--resume', cut), 'checkpoint.pth')
    assert not (tmp_path/'touched').exists()

# ---- ends

def test_interruption_says_how_to_go_on(cut, done, shell, monkeypatch, capsys):
    monkeypatch.setattr(runs, 'fit_run', lambda *_: os.kill(os.getpid(), signal.SIGINT))
    res = shell(reid_train, '--resume', cut)
    assert res.code==130 and res.err.splitlines()==['reid-train: interrupted', f'reid-train: The run is kept in {cut}; resume it with `reid-train --resume {cut}`.']
    monkeypatch.setattr(runs, 'fit_run', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert shell(reid_train, '--resume', cut).code==143
    monkeypatch.undo()
    assert shell(reid_train, '--resume', cut).code==0 and figures(cut)==figures(done)

def test_a_full_disk_is_said(cut, done, shell, monkeypatch):
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        refused(shell(reid_train, '--resume', cut), '.held_by.json', 'No space left')
    n = 0
    def later(fd):
        nonlocal n
        n += 1
        if n>3: full(fd)
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', later)
        res = shell(reid_train, '--resume', cut)
        refused(res, str(cut), 'No space left', 'MB are free', '--resume')
    assert shell(reid_train, '--resume', cut).code==0 and figures(cut)==figures(done)

def test_output_is_no_reason_to_lose_a_run(data, tmp_path, monkeypatch):
    "The reader of stdout goes away at once, and the terminal knows no λ"
    r,w = os.pipe()
    os.close(r)
    monkeypatch.setattr(sys, 'stdout', open(w, 'w', encoding='cp1252'))
    assert run_command(reid_train.__wrapped__, [data, '--out', str(tmp_path/'r'), *tiny], 'reid-train', ['data'])==0
    raw = io.BytesIO()
    print('λ', file=Patient(stream := io.TextIOWrapper(raw, 'cp1252')))
    assert raw.getvalue()==b'?\n' and (tmp_path/'r'/'results.json').exists()

def test_divergence_ends_a_run(data, tmp_path, shell, monkeypatch):
    monkeypatch.setattr(config, '_largest_lr', 1e30)
    refused(shell(reid_train, data, '--out', tmp_path/'r', *tiny, '--lr', '1e30'), 'diverged', 'lr')

def test_messages_are_one_line():
    assert len(one_line('x'*10_000))<=300 and '\n' not in one_line('a\nb') and one_line('short')=='short'

def test_an_error_in_a_loader_process_keeps_its_message(capsys):
    "PyTorch puts a traceback before it"
    said = '/data/0001_c1.jpg cannot be read as an image: truncated. Remove it.'
    def work():
        try:
            try: raise OSError('truncated')
            except OSError as e: raise ValueError(said) from e
        except ValueError: lost = ExceptionWrapper(where='in DataLoader worker process 1')
        lost.reraise()
    assert run_command(work, [], 'work')==2 and capsys.readouterr().err==f'work: error: {said}\n'

@pytest.mark.parametrize('said', ['DataLoader worker (pid(s) 12, 13) exited unexpectedly', 'unable to write to file </torch_12_34_0>: No space left on device (28)',
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit.",
    'Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).'])
def test_a_lost_loader_process_has_a_remedy(said, capsys):
    def work(): raise RuntimeError(said)
    assert run_command(work, [], 'work')==2
    assert '--workers 0' in (err := capsys.readouterr().err) and err.count('\n')==1
    said = 'a bug'
    with pytest.raises(RuntimeError, match='a bug'): run_command(work, [], 'work')

def test_a_signal_just_after_the_renaming_is_not_hidden(tmp_path, monkeypatch):
    "The temporary file is gone by then; an error on removing it would replace that of the signal"
    def replace(a, b, real=os.replace): real(a, b); raise KeyboardInterrupt
    monkeypatch.setattr(files.os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt): files.atomic_write(tmp_path/'f', 'new')
    assert [o.read_text() for o in tmp_path.iterdir()]==['new']

# ---- options

@pytest.mark.parametrize('opt', ['epochs','seed','steps','n_pids','n_imgs','eval_every','frozen_epochs','regions'])
@pytest.mark.parametrize('v', [-1, 10**20, 1.5, True])
def test_numbers_have_bounds(opt, v):
    with pytest.raises(ValueError, match=f'{opt}=.*it must be a whole number from'): RunConfig(**{opt: v})

def test_options_of_one_published_network_are_not_those_of_another():
    cfg = RunConfig(recipe='published', arch='osnet_x1_0')
    assert cfg.but(arch='osnet_x1_0', epochs=3).epochs==3
    with pytest.raises(ValueError, match='arch=bat_net: these options are those of the authors of osnet_x1_0'): cfg.but(arch='bat_net')

def test_results_of_a_folder_given_as_text(tmp_path):
    write_results(str(tmp_path), dict(mAP=1.))
    assert (tmp_path/'results.json').exists()

@pytest.mark.parametrize('func,args,words', [
    (reid_train, ['--resume', ''], ["resume=''", 'unset']), (reid_train, [''], ["data=''"]), (reid_train, ['--pretrained', ''], ["pretrained=''"]),
    (reid_train, ['--lr', 'inf'], ['lr=inf']), (reid_compare, ['--lr', '1e20'], ['lr=1e+20']), (reid_train, ['--size', '100000x100000'], ['size']), (reid_train, ['--l2', 'annealed'], ["'none'"]),
    (reid_train, ['--device', 'cuda:77'], ['device']), (reid_train, ['--workers', '-3'], ['workers']), (reid_train, ['/a'*2500], ['/a/a']),
    (reid_train, ['--epochs', 'ten'], ['--epochs', '--help']), (reid_train, ['--no-such-option'], ['--no-such-option']),
    (reid_compare, ['--arms', 'none', 'none'], ['none', 'once']), (reid_compare, ['--factors', '-1', '--amplitudes', '1'], ['factor']), (reid_compare, ['--amplitudes', '1e-3', '0', '1'], ['amplitude']),
    (reid_train, ['--amplitude', '1e20'], ['amplitude', '1,000,000']), (reid_train, ['--factor', '9'*20], ['factor', '1,000,000']),
    (reid_train, ['--factor', '0.1'], ['--factor 0.1: --l2 adaptive does not use it']), (reid_train, ['--l2', 'conventional', '--amplitude', '0.1'], ['--amplitude 0.1', '--l2 auto']),
    (reid_compare, ['--strengths', 'rotation:0.1'], ['--strengths rotation:0.1', 'rotation=0.002,0.01,0.05']), (reid_compare, ['--strengths', 'rotation=0.1'], ['rotation', 'not among the arms']),
    (reid_compare, ['--tune-distractors', '2'], ['images']), (reid_compare, ['--tune-pids', '2'], ['identities']), (reid_compare, ['--seeds', '0'], ['seeds=0'])])
def test_bad_options_are_refused_before_anything_is_trained(func, args, words, data, tmp_path, shell, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, 'fit_run', lambda *_: pytest.fail('it trains'))
    args = args if func is reid_train and not args[0].startswith('-') else [data, *args]
    refused(shell(func, *([] if '--size' in args else tiny[4:6]), *tiny[:4], '--n-pids', '4', *args), *words)
    assert not list(tmp_path.iterdir())

def test_commands_keep_freed_memory(tmp_path, monkeypatch):
    "Otherwise embedding on a CPU takes twice the time"
    called = []
    monkeypatch.setattr(shell_module, 'keep_freed_memory', lambda: called.append(True))
    cli.reid_synth(tmp_path/'s', tiny=True, quiet=True)
    assert called

def test_an_unknown_network_is_refused_before_images_are_rendered(tmp_path, shell, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, 'load_splits', lambda *_: pytest.fail('it reads the data'))
    for args in ((reid_train, '--arch', 'resnet5'), (reid_compare, '--arch', 'resnet5'), (reid_compare, '--archs', 'test_resnet', 'resnet5')):
        refused(shell(*args), "'resnet5'", 'resnet50')
    assert not list(tmp_path.iterdir())

def test_switches(done, shell, tmp_path):
    assert shell(reid_eval, done, '--flip').out==shell(reid_eval, done).out!=shell(reid_eval, done, '--no-flip').out
    assert shell(reid_eval, done, '--quiet').out==''
    with pytest.raises(SystemExit) as e: shell(reid_eval, '--version')
    assert not e.value.code

def test_a_run_is_evaluated_with_its_own_flip(run, shell, monkeypatch):
    "Unless an option says otherwise"
    write_json(run/'config.json', dict(read_json(run/'config.json'), flip=False))
    asked = []
    def embed(file, files, paths, flip, *_): asked.append(flip); raise ValueError('enough')
    monkeypatch.setattr(cli, 'embed_kept', embed)
    for o in ([run], [run,'--flip'], [run,'--no-flip'], [run/'model.safetensors']): refused(shell(reid_eval, *o), 'enough')
    assert asked==[False,True,False,True]

def test_eval_keeps_figures_and_picture(done, shell, tmp_path, drawing):
    with drawing(): res = shell(reid_eval, done, '--out', tmp_path/'e', '--csv', tmp_path/'q.csv')
    ev,q = read_json(tmp_path/'e'/'evaluation.json'),pd.read_csv(tmp_path/'q.csv')
    assert res.code==0 and ev['mAP']==figures(done)['mAP']==pytest.approx(q.AP.mean(), abs=1e-3) and (tmp_path/'e'/'ranked.png').stat().st_size>1000
    refused(shell(reid_eval, done, '--csv', done/'model.safetensors'), 'file of the model')
    refused(shell(reid_eval, done, '--csv', tmp_path/'x', '--features', tmp_path/'.'/'x'), 'file of csv')

def test_a_complete_run_says_how_to_train_on(done, shell):
    refused(shell(reid_train, '--resume', done, '--epochs', '20'), 'complete', '--pretrained', 'the backbone; branches, heads and classifiers start anew')
    assert shell(reid_train, '--resume', done).code==0

def test_a_new_run_starts_from_the_weights_of_another(done, data, tmp_path, shell):
    args = [*tiny, '--pretrained', done/'model.safetensors']
    assert 'model.safetensors gives the backbone; branches, heads and classifiers start anew' in shell(reid_train, data, '--out', tmp_path/'r', *args).out
    net = run_setup.build_net(read_config(tmp_path/'r'), 10)
    for k,v in load_tensors(done/'model.safetensors')[0].items():
        if k.startswith(('trunk','global_stage')): assert torch.equal(net.state_dict()[k], v), k
    refused(shell(reid_train, data, '--out', tmp_path/'s', *args, '--arch', 'resnet18'), 'model.safetensors', 'resnet18')
    (tmp_path/'notes.txt').write_text('my notes')
    refused(res := shell(reid_train, data, '--out', tmp_path/'s', *tiny, '--pretrained', tmp_path/'notes.txt'), 'notes.txt')
    assert 'weights_only' not in res.err

def test_rows_stay_aligned(capsys):
    show = runs.row_printer()
    for v in (1e-30, -123456.789, float('nan'), 12.5): show(dict(epoch=1, train_loss=v, mAP=v))
    lines = capsys.readouterr().out.splitlines()
    assert len({len(l) for l in lines})==1 and 'nan' not in ' '.join(lines)

def test_ctrl_c_during_the_imports_shows_no_traceback():
    code = '''
import gc, os, signal, sys
class Interrupt:  # a module that swallows exceptions, as C extensions do
    def find_spec(self, name, *args):
        if name=='torch':
            print(gc.isenabled(), flush=True)
            try: os.kill(os.getpid(), signal.SIGINT)
            except BaseException: pass
sys.argv[0] = 'reid-synth'
sys.meta_path.insert(0, Interrupt())
import reid_fastai.cli
'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert p.stderr=='' and p.returncode==130 and p.stdout=='False\n', 'collections of garbage make the imports slow'

@pytest.mark.parametrize('sig,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_destructor_ends_the_command(sig, code, capsys):
    class Slow:
        def __del__(self):
            os.kill(os.getpid(), sig)
            time.sleep(.01)
    def work():
        Slow()
        time.sleep(20)
    begun,old = time.monotonic(),signal.signal(signal.SIGINT, signal.default_int_handler)
    try: assert run_command(work, [], 'work')==code
    finally: signal.signal(signal.SIGINT, old)
    err = capsys.readouterr().err
    assert 'Traceback' not in err and len(err.splitlines())==2 and time.monotonic()-begun<10

def test_a_diverged_run_is_not_trained_again(data, tmp_path, monkeypatch):
    "Repeating a comparison or the paper's table would train it each time, with the same result"
    monkeypatch.setattr(config, '_largest_lr', 1e30)
    cfg = RunConfig(data, arch='test_resnet', pretrained='none', size='64x32', epochs=2, steps=2, n_pids=4, lr=1e30)
    train = lambda: runs.train_run(tmp_path/'r', run_setup.load_splits(data), cfg, 'cpu', 0)
    with pytest.raises(DivergedError) as first: train()
    monkeypatch.setattr(runs, 'fit_run', lambda *_: pytest.fail('it trains'))
    with pytest.raises(DivergedError, match='Delete .*diverged.json to train it again') as again: train()
    assert str(again.value).startswith(str(first.value))
    lost = read_json(tmp_path/'r'/'diverged.json')
    write_json(tmp_path/'r'/'diverged.json', dict(lost, versions=dict(lost['versions'], torch='1.0')))
    with pytest.raises(pytest.fail.Exception, match='it trains'): train()

@pytest.mark.parametrize('func,pos,args,want', [
    (reid_eval, ['run','data'], 'RUN --rerank DATA', dict(run='RUN', data='DATA', rerank=True)),
    (reid_eval, ['run','data'], '--metric euclidean RUN --far .1 .2 --verify DATA', dict(run='RUN', data='DATA', far=[.1,.2])),
    (reid_embed, ['images'], 'RUN --out g a b', dict(model='RUN', images=['a','b'], out='g')),
    (reid_embed, ['images'], 'RUN a --out g b', dict(images=['a','b'])),
    (reid_search, None, 'g a --k 3 b', dict(gallery='g', photos=['a','b'], k=3)),
    (reid_search, None, 'g --k 3 -- -a --k', dict(photos=['-a','--k'], k=3)), (reid_search, None, '-- g -a', dict(gallery='g', photos=['-a']))])
def test_arguments_between_options(func, pos, args, want):
    res = _parse(func.__wrapped__, 'x', pos, args.split())
    assert {k: res[k] for k in want}==want

@pytest.mark.parametrize('args,words', [('', 'required: run'), ('a b c', 'arguments: c'), ('a --nope b', 'arguments: --nope')])
def test_arguments_that_are_missing_or_too_many(args, words):
    with pytest.raises(ValueError, match=words): _parse(reid_eval.__wrapped__, 'x', ['run','data'], args.split())

def test_home_folder_in_an_option(monkeypatch):
    "A shell leaves the ~ of `--out=~/x` as it is"
    monkeypatch.setenv('HOME', '/home/me')
    res = _parse(reid_search.__wrapped__, 'x', None, ['~/g', 'a', '~/b', '--csv=~/q.csv', '--pid=~', '--where=~x'])
    assert (res['gallery'],res['photos'],res['csv'],res['pid'],res['where'])==('/home/me/g', ['a','/home/me/b'], '/home/me/q.csv', '~', '~x')
