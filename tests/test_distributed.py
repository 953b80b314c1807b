"Several processes give the training, the figures and the files of one"
import json, os, re, signal, socket, subprocess, sys, time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file

from reid_fastai.callback.precision import supports_precision
from reid_fastai.core import ranks
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.distributed import LostProcess, talking
from reid_fastai.run_setup import check_device

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the processes are forked')
here = Path(__file__).parent
env = dict(os.environ, PYTHONPATH=str(here.parent), MPLBACKEND='agg')
tiny = '--arch test_resnet --pretrained none --size 64x32 --n-pids 4 --steps 2 --epochs'.split()

# ---- from Python

@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    "Of a case, a number of processes and a rank"
    d = tmp_path_factory.mktemp('several')
    res = subprocess.run([sys.executable, here/'several.py', d, '--', '1', '2', '4'], capture_output=True, text=True, env=env)
    assert res.returncode==0, res.stderr[-3000:]
    return lambda case, n, rank=0: torch.load(d/f'{case}-{n}-{rank}.pth', weights_only=False)

def distance(a, b):
    "Relative, of all weights together, and the largest of a single array"
    flat = lambda o: torch.cat([v.double().flatten() for v in o.values()])
    return ((flat(a)-flat(b)).norm()/flat(b).norm()).item(), max(((a[k]-b[k]).double().norm()/b[k].double().norm().clamp_min(1e-9)).item() for k in b)

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('case', ['plain', 'regions', 'statistics', 'accumulated', 'accumulated, regions', 'paper', 'paper, global', 'rotation', 'auto', 'conventional', 'workers', 'found'])
def test_the_training_of_one_process(outcome, case, n):
    "Weights, running statistics, θ, λ, losses and the table; with statistics frozen and not, with the paper's two phases, accumulation, clipping, rotation control, loader processes, and after `lr_find`"
    one = outcome(case, 1)
    for rank in range(n):
        got = outcome(case, n, rank)
        assert max(distance(got['weights'], one['weights']))<1e-9
        np.testing.assert_allclose(got['history'], one['history'], rtol=1e-5)
        np.testing.assert_allclose(got['losses'], one['losses'], rtol=1e-5)
        np.testing.assert_allclose(got['table'], one['table'], rtol=1e-5)
        assert got['epoch']==one['epoch'] and got['chance'].equal(one['chance']), 'the next epoch would have other batches or other augmentations'
        assert got['bs']==16 and not got['forwards'] and got['wrapped']=='ReIDNet', 'loader and network are left as they were'

@pytest.mark.parametrize('n', [1, 2, 4])
def test_resumed_by_another_number(outcome, n):
    "One process trains an epoch and `n` the next: the weights, θ, λ, angles and losses of two epochs in one process"
    one = outcome('plain', 1)
    for rank in range(n):
        got = outcome('resumed', n, rank)
        assert max(distance(got['weights'], one['weights']))<1e-9 and got['chance'].equal(one['chance'])
        np.testing.assert_allclose(got['history'], one['history'], rtol=1e-5)
        np.testing.assert_allclose(got['losses'], one['losses'][len(one['losses'])//2:], rtol=1e-5)

@pytest.mark.parametrize('n', [2, 4])
def test_turned_arrays(outcome, n):
    "Of the cases with rotation control"
    for case in 'rotation','auto': assert (outcome(case, n)['history'][:,-1]==1).any()

@pytest.mark.parametrize('n', [2, 4])
def test_one_rate_and_one_voice(outcome, n):
    "All processes suggest the rate of one, and only rank 0 prints what `SaveModelCallback` does"
    one,*got = outcome('found', 1),*(outcome('found', n, rank) for rank in range(n))
    assert {o['rate'] for o in got}=={one['rate']}
    assert [o['said'].count('Better model found') for o in (one, *got)]==[2, 2, *[0]*(n-1)] and not any(o['said'] for o in got[1:])

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('case,tol', [('float32', 1e-5), ('float32, global', 1e-5), pytest.param('bf16', 1e-3, marks=pytest.mark.skipif(not supports_precision('bf16', 'cpu'), reason='no bf16 here'))])
def test_in_less_than_float64(outcome, case, tol, n):
    "What is left is rounding, equal in all processes"
    got = [outcome(case, n, rank) for rank in range(n)]
    assert distance(got[0]['weights'], outcome(case, 1)['weights'])[0]<tol
    np.testing.assert_allclose(got[0]['losses'], outcome(case, 1)['losses'], rtol=tol)
    for o in got[1:]: assert all(v.equal(got[0]['weights'][k]) for k,v in o['weights'].items()) and o['losses']==got[0]['losses']

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('fault', ['mined apart', 'not averaged', 'penalty twice'])
def test_a_fault_would_be_seen(outcome, fault, n): assert distance(outcome(f'fault: {fault}', n)['weights'], outcome('plain', 1)['weights'])[0]>1e-3

@pytest.mark.parametrize('n', [2, 4])
def test_evaluation_is_exact(outcome, n):
    one = outcome('shared', 1)
    for rank in range(n):
        got = outcome('shared', n, rank)
        for k,v in one.items(): assert np.array_equal(np.asarray(v), np.asarray(got[k]), equal_nan=True), k

@pytest.mark.parametrize('n', [2, 4])
def test_refusals(outcome, n):
    for rank in range(n):
        got = outcome('refused', n, rank)
        sizes,epochs,data = got['messages']
        assert re.match(f'n_pids=5: cannot be divided evenly among {n} processes. Use n_pids=4 or {8 if n==4 else 6}, or one of 5 processes.$', sizes)
        assert epochs.startswith('Epochs: 1 in process 0, 2 in process 1.') and data.startswith('The dataset: ') and 'in process 1' in data
        assert got['bs']==16 and all(len(o)<300 and '\n' not in o for o in got['messages'])
    assert not outcome('refused', 1)['messages']

@pytest.mark.parametrize('err', [RuntimeError('[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:10142'), RuntimeError(r'[C:\gloo\gloo\transport\uv\unbound_buffer.cc:67] Timed out'),
                                 torch.distributed.DistNetworkError('Broken pipe'), torch.distributed.DistBackendError('NCCL error: remote process exited')])
def test_errors_of_a_lost_process(err):
    with pytest.raises(LostProcess), talking(): raise err

@pytest.mark.parametrize('err', [RuntimeError('connection refused'), RuntimeError('wandb: Connection reset by peer'), RuntimeError('Default process group has not been initialized'), RuntimeError('mat1 and mat2 shapes cannot be multiplied'), OSError('Connection refused')])
def test_other_errors(err):
    "Such as that of a logger during a training"
    with pytest.raises(type(err)) as e, talking(): raise err
    assert e.value is err

def test_an_unknown_device(monkeypatch):
    for n in 1,2:
        monkeypatch.setattr(ranks, 'n', n)
        with pytest.raises(ValueError, match="^device='foo' is not available"): check_device('foo')
    with pytest.raises(ValueError, match="^device='cuda:1': each of the 2 processes"): check_device('cuda:1')
    assert check_device('cpu')==torch.device('cpu')

@pytest.mark.parametrize('count,device,words', [(0, 'cuda', "device='cuda' is not available"), (2, 'cuda', 'There are 2 GPUs here for at least 3'), (2, None, 'There are 2 GPUs here for at least 3')])
def test_fewer_gpus_than_processes(count, device, words, monkeypatch):
    "Without any GPU, no number of processes would do"
    if not count and torch.cuda.is_available(): pytest.skip('there is a GPU')
    monkeypatch.setattr(ranks, 'n', 4)
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    with pytest.raises(ValueError, match=words): check_device(device)

# ---- the start

def launched(*argvs, cwd):
    "Run launchers side by side, which have to end well"
    ps = [subprocess.Popen(list(map(str, o)), cwd=cwd, env=dict(env, OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for o in argvs]
    try: said = [p.communicate(timeout=100) for p in ps]
    finally:
        for p in ps: p.terminate()  # which they pass on
    assert not any(p.returncode for p in ps), said
    return said

launchers = pytest.mark.skipif(not os.environ.get('LAUNCHERS'), reason='`make attack` runs it')

@launchers
def test_two_nodes(outcome, tmp_path):
    "Two agents of torchrun, with a process each"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    launched(*[[sys.executable, '-m', 'torch.distributed.run', '--nnodes', 2, '--nproc-per-node', 1, '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{port}', here/'several.py', tmp_path, 'statistics']]*2, cwd=tmp_path)
    for rank in 0,1: assert max(distance(torch.load(tmp_path/f'statistics-2-{rank}.pth', weights_only=False)['weights'], outcome('statistics', 1)['weights']))<1e-9

@launchers
def test_accelerate(tmp_path):
    "Starts the processes as the page says"
    pytest.importorskip('accelerate')
    launch = [sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--main_process_port', 0]
    said, = launched([*launch, '--multi_gpu', '--num_processes', 2, '-m', 'reid_fastai.cli', 'reid-train', make_synthetic(tiny=True), '--device', 'cpu', '--out', 'run', *tiny, '1'], cwd=tmp_path)
    assert said[0].count('Run folder: run')==1 and (tmp_path/'run'/'results.json').exists(), said

def test_a_second_start_ignores_the_keys_of_the_first():
    "torchrun keeps its store when it starts processes again. One that is early must wait for the others, and not use the addresses of those that have ended"
    from concurrent.futures import ThreadPoolExecutor
    from reid_fastai.distributed import _one_start
    server = torch.distributed.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    def start(rank, delay=0):
        time.sleep(delay)
        store = _one_start(torch.distributed.TCPStore('localhost', server.port, is_master=False, timeout=timedelta(seconds=20)), rank, 3, secs=20)
        store.set(f'address {rank}', str(delay))
        return [store.get(f'address {r}') for r in range(3)]
    with ThreadPoolExecutor(3) as ex:
        for delays in (0,0,0),(.5,0,.2),(0,.3,.6): assert list(ex.map(start, range(3), delays))==[[str(o).encode() for o in delays]]*3
    with pytest.raises(RuntimeError, match='not all of them answered within 0 s'): _one_start(torch.distributed.TCPStore('localhost', server.port, is_master=False, timeout=timedelta(seconds=20)), 0, 3, secs=.3)

# ---- from the shell


@pytest.fixture(scope='module')
def jobs(tmp_path_factory):
    "Commands that have run: folder, exit codes, what they said, seconds"
    d = tmp_path_factory.mktemp('commands')
    data,other = str(make_synthetic(tiny=True)),str(make_synthetic(d/'other', tiny=True, seed=7))
    train = lambda out, *more: ['reid-train', data, '--out', out, *tiny, '3', *more]
    evaluate = lambda out: ['reid-eval', 'one', '--rerank', '--verify', '--csv', f'{out}.csv', '--out', out, '--features', f'{out}.safetensors']
    compare = lambda out: ['reid-compare', data, '--out', out, *tiny, '1', '--arms', 'adaptive', '--amplitudes', '5e-3', '--seeds', '1']
    resume = lambda out: ['reid-train', '--resume', out]
    res = [dict(name='one', argv=train('one')), dict(name='train', n=2, argv=train('two')),
           *(dict(name=f'eval {n}', n=n, argv=evaluate(f'eval{n}')) for n in (1,2)), *(dict(name=f'compare {n}', n=n, argv=compare(f'compare{n}')) for n in (1,2)),
           dict(name='bad option', n=2, argv=train('bad', '--amplitude', '0')), dict(name='odd batch', n=4, argv=train('bad', '--n-pids', '6')), dict(name='many', n=4, argv=train('bad', '--n-pids', '2')),
           dict(name='no data', n=2, argvs=[train('bad'), ['reid-train', str(d/'nothing'), *train('bad')[2:]]]), dict(name='other data', n=2, argvs=[train('bad'), ['reid-train', other, *train('bad')[2:]]]),
           dict(name='exists', n=2, argv=train('one')), dict(name='help', n=2, argv=['reid-train', '--help']), dict(name='no command', argv=['train']),
           dict(name='kill 1', n=2, argv=train('kill1'), kill=[1, 'kill1/metrics.csv', 2]), dict(name='resume 1', n=2, argv=resume('kill1')),
           dict(name='kill 0', n=2, argv=train('kill0'), kill=[0, 'kill0/metrics.csv', 2]), dict(name='resume 0', n=4, argv=resume('kill0'))]
    (d/'jobs.json').write_text(json.dumps([dict(o, cwd=str(d)) for o in res]))
    subprocess.run([sys.executable, here/'several.py', d/'jobs.json'], check=True, env=env)
    return SimpleNamespace(dir=d, **{'all': {o['name']: SimpleNamespace(**o) for o in json.loads((d/'jobs.json').read_text())}})

def weights(d): return load_file(d/'model.safetensors')
def figures(d): return {k: v for k,v in json.loads((d/'results.json').read_text()).items() if 'second' not in k and k not in ('files','sha256')}

def test_one_voice_and_one_folder(jobs):
    job = jobs.all['train']
    assert job.codes==[0,0] and not any(job.err) and not job.out[1], job.err
    assert {o.name for o in (jobs.dir/'two').iterdir()}=={o.name for o in (jobs.dir/'one').iterdir()}
    words = lambda o: re.sub(r'Training took.*|[\d.]+|(one|two)$', '', o, flags=re.M).split()  # durations may have more digits
    assert words(job.out[0])==words(jobs.all['one'].out[0])

def test_a_run_of_several_processes(jobs):
    "Trained norms, float32 and augmentation: what is left is rounding, which Adam enlarges"
    a,b = jobs.dir/'one',jobs.dir/'two'
    assert distance(weights(b), weights(a))[0]<2e-3
    np.testing.assert_allclose(pd.read_csv(b/'lambdas.csv').lam, pd.read_csv(a/'lambdas.csv').lam, rtol=1e-5)
    np.testing.assert_allclose(pd.read_csv(b/'metrics.csv')[['train_loss','penalty']], pd.read_csv(a/'metrics.csv')[['train_loss','penalty']], rtol=2e-3)

def test_the_figures_of_one_process(jobs):
    "Evaluation to the last digit"
    for f in ('eval{}.csv', 'eval{}.safetensors', 'eval{}/evaluation.json', 'eval{}/verification.json', 'eval{}/verification.csv'): assert (jobs.dir/f.format(1)).read_bytes()==(jobs.dir/f.format(2)).read_bytes(), f
    assert jobs.all['eval 2'].out==[jobs.all['eval 1'].out[0], ''] and jobs.all['eval 2'].codes==[0,0]

def test_a_comparison_of_several_processes(jobs):
    one,two = (pd.read_csv(jobs.dir/f'compare{n}'/'results.csv') for n in (1,2))
    cols = ['stage','arm','strength','seed','queries','gallery','folder']
    assert jobs.all['compare 2'].codes==[0,0] and one[cols].equals(two[cols]) and not jobs.all['compare 2'].out[1]
    np.testing.assert_allclose(two[['mAP','Rank-1']], one[['mAP','Rank-1']], atol=1.)
    assert {o.name for o in (jobs.dir/'compare1').iterdir()}=={o.name for o in (jobs.dir/'compare2').iterdir()}

@pytest.mark.parametrize('name,words', [('bad option', 'amplitude: got 0.0'), ('odd batch', 'Use n_pids=4 or 8, or one of 2, 3, 6 processes.'), ('many', 'Use n_pids=4, or one of 2 processes.'),
                                        ('no data', 'nothing does not exist'), ('other data', 'The dataset: '), ('exists', 'one exists already'), ('no command', 'name one of reid-train, reid-eval, reid-compare, reid-synth, reid-embed, reid-export, reid-search first')])
def test_an_error_is_said_once_and_ends_all(jobs, name, words):
    job = jobs.all[name]
    said = [l for o in job.err for l in o.splitlines()]
    assert len(said)==1 and words in said[0] and len(said[0])<=300 and set(job.codes)=={2} and job.seconds<20, (said, job.codes, job.seconds)
    assert not (jobs.dir/'bad').exists()

def test_help_is_shown_once(jobs): assert jobs.all['help'].codes==[0,0] and [o.count('usage:') for o in jobs.all['help'].out]==[1,0]

@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_process(jobs, rank):
    "The others end at once and say how to go on; the run goes on with the same number of processes to the same bytes, and with another number"
    job,again,d = jobs.all[f'kill {rank}'],jobs.all[f'resume {rank}'],jobs.dir/f'kill{rank}'
    assert job.codes[rank]==-9 and job.codes[1-rank]==2 and job.seconds<20
    said = job.err[1-rank].splitlines()
    assert said==[f'reid-train: error: Another process of this group has ended, so this one cannot continue. The run is kept in kill{rank}; resume it with `reid-train --resume kill{rank}`.']
    assert set(again.codes)=={0} and len(pd.read_csv(d/'metrics.csv'))==3, again.err
    whole = jobs.dir/'two'
    if rank: assert (d/'model.safetensors').read_bytes()==(whole/'model.safetensors').read_bytes() and figures(d)==figures(whole)
    else:
        assert distance(weights(d), weights(whole))[0]<2e-3
        np.testing.assert_allclose(pd.read_csv(d/'lambdas.csv').lam, pd.read_csv(whole/'lambdas.csv').lam, rtol=1e-5)

def test_each_node_counts_its_own_restarts(monkeypatch):
    "A process was killed on the other node: the node of rank 0 has counted no failure, and goes on with the run all the same"
    from reid_fastai import cli
    for counts,again in (((0,0), False), ((0,1), True), ((2,0), True)):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(counts[0]))
        monkeypatch.setattr(cli, 'join_parts', lambda x: torch.cat([x, torch.tensor(counts[1:])]))
        assert cli._started_again()==again

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds the processes of torchrun in /proc')
def test_torchrun_starts_again_by_itself(jobs, tmp_path):
    "One of its processes is killed: torchrun starts all of them anew, and these go on with the run"
    data,commands = jobs.all['one'].argv[1],Path(sys.executable).parent
    start = ['--no-python'] if (commands/'reid-train').exists() else ['-m', 'reid_fastai.cli']
    argv = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '3', *start, 'reid-train', data, '--out', 'run', *tiny, '3']
    path = f'{commands}{os.pathsep}{os.environ["PATH"]}'
    p = subprocess.Popen(argv, cwd=tmp_path, env=dict(env, OMP_NUM_THREADS='1', PATH=path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    f = tmp_path/'run'/'metrics.csv'
    while not f.exists() or len(f.read_text().splitlines())<2:
        assert p.poll() is None, p.communicate()
        time.sleep(.02)
    ours = [int(o) for o in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split() if 'reid-train' in Path(f'/proc/{o}/cmdline').read_text()]
    os.kill(ours[1], signal.SIGKILL)
    out,err = p.communicate(timeout=120)
    assert p.returncode==0 and len(ours)==2, err
    assert 'Traceback' not in err and len(pd.read_csv(f))==3 and (tmp_path/'run'/'results.json').exists()
    assert out.count('Run folder: run')==1 and out.count('train_loss')==2, out  # the heading of the table, once a start
