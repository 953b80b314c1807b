"The commands as a user runs them: what they write, what they refuse, and that they repeat themselves"
import json, os, re, runpy, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from reid_fastai import cli, cli_export, cli_search, interpret, results, runs
from reid_fastai.callback.checkpoint import Checkpoint
from reid_fastai.cli import *
from reid_fastai.comparison_results import comparison_table, plot_strengths
from reid_fastai.config import RunConfig
from reid_fastai.core import DivergedError
from reid_fastai.data.datasets import read_dataset
from reid_fastai.data.splits import count_nonmatches
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.evaluation.all import RetrievalResults, read_verification
from reid_fastai.experiments import Comparison
from reid_fastai.export import save_model
from reid_fastai.files import atomic_write, check_writable, read_json, write_json
from reid_fastai.models import build_reid_net
from reid_fastai.shell import _parse
from forks import command, fork

tiny_args = dict(arch='test_resnet', pretrained='none', size='64x32', n_pids=4, epochs=2, steps=2)

@pytest.fixture(scope='module')
def data(): return str(make_synthetic(tiny=True))

@pytest.fixture(scope='module')
def run(data, tmp_path_factory, drawing):
    with drawing(): return reid_train(data, out=tmp_path_factory.mktemp('runs')/'a', **tiny_args)

script = lambda name: str(Path(sys.executable).parent/name)

@pytest.fixture
def shell(capsys, monkeypatch):
    "Runs a command of this environment; in this process, as importing all it needs takes seconds"
    def f(name, *args):
        monkeypatch.setattr(sys, 'argv', [script(name), *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: runpy.run_path(sys.argv[0], run_name='__main__')
        return SimpleNamespace(returncode=e.value.code or 0, **capsys.readouterr()._asdict())
    return f

def test_run_folder(run):
    assert {o.name for o in run.iterdir()}>={'config.json','metrics.csv','lambdas.csv','lambda_hist.png','ranked.png','model.safetensors','results.json','summary.md'}
    assert not {o.name for o in run.iterdir()}&{'checkpoint.pth','best.safetensors'} and Image.open(run/'ranked.png').width>1000
    assert all(np.asarray(Image.open(o)).std()>10 for o in run.glob('*.png'))
    cfg = json.loads((run/'config.json').read_text())
    assert cfg['seed']==42 and cfg['dataset']['counts']['train']['images']==60 and cfg['versions']['torch']
    assert list(pd.read_csv(run/'metrics.csv').columns)==['epoch','train_loss','penalty','mAP','rank1','seconds']
    assert pd.read_csv(run/'lambdas.csv').epoch.max()==2

def test_same_seed_same_numbers(run, data, tmp_path):
    other = reid_train(data, out=tmp_path/'b', **tiny_args)
    cols = ['train_loss','penalty','mAP','rank1']
    pd.testing.assert_frame_equal(pd.read_csv(run/'metrics.csv')[cols], pd.read_csv(other/'metrics.csv')[cols], check_exact=True)
    assert (run/'model.safetensors').read_bytes()==(other/'model.safetensors').read_bytes()
    third = reid_train(data, out=tmp_path/'c', seed=1, **tiny_args)
    assert not pd.read_csv(run/'metrics.csv')[cols].equals(pd.read_csv(third/'metrics.csv')[cols])

def test_eval_gives_the_figures_of_the_run(run):
    res = reid_eval(run)
    assert f'| mAP | {100*res.mAP:.2f} |' in (run/'summary.md').read_text()

@pytest.mark.parametrize('args,words', [
    (['/no/such/folder'], 'does not exist'), (['--arch', 'resnet5o'], "'resnet50"), (['--amplitude', '0'], 'amplitude: got 0.0'),
    (['--amplitude', 'nan'], 'amplitude: got nan'), (['--size', 'big'], 'such as 256x128'), (['--epochs', '0'], 'epochs=0'), (['--l2', 'lasso'], "'lasso'"),
    (['--pretrained', '/no/such.safetensors'], 'there is no such file'), (['--seed', '-1'], 'seed=-1'),
    (['--size', '64x32', '--regions', '9'], 'can be cut into at most 8 strips'),
    (['--arch', 'test_resnet', '--pretrained', 'none', '--size', '64x32', '--n-pids', '4', '--regions', '8'], 'cut into 8 strips')])
def test_bad_input_exits_with_2(args, words, tmp_path, shell):
    res = shell('reid-train', '--out', tmp_path/'run', *args)
    assert res.returncode==2 and words in res.err and 'Traceback' not in res.err, res.err
    assert not (tmp_path/'run').exists()

def test_existing_run_is_kept(run, shell):
    before = sorted((o.name, o.stat().st_mtime_ns) for o in run.iterdir())
    res = shell('reid-train', '--out', run)
    assert res.returncode==2 and 'exists already' in res.err
    assert before==sorted((o.name, o.stat().st_mtime_ns) for o in run.iterdir())

@pytest.mark.parametrize('cmd,args', [('reid-train', ['--out', '{}/file/run']), ('reid-compare', ['--out', '{}/file/run']), ('reid-synth', ['{}/file/data']),
    ('reid-eval', ['{run}', '--csv', '{}/file/q.csv']), ('reid-eval', ['{run}', '--csv', '{}']), ('reid-eval', ['{run}', '--features', '{}/file/f.safetensors']),
    ('reid-eval', ['{run}', '--features', '{}/file']), ('reid-eval', ['{run}', '--metric', 'manhattan']), ('reid-train', ['--resume', '{}/damaged'])])
def test_what_cannot_be_written_or_read_is_refused_first(cmd, args, run, data, tmp_path, shell, monkeypatch):
    (tmp_path/'file').write_text('mine'); (tmp_path/'damaged').mkdir(); (tmp_path/'damaged'/'config.json').write_text('{"data": ')
    monkeypatch.setattr('reid_fastai.cli.load_embedder', lambda file: pytest.fail('the embedding has begun'))
    res = shell(cmd, *[a.format(tmp_path, run=run) for a in args])
    assert res.returncode==2 and ': error: ' in res.err and 'Traceback' not in res.err, res.err
    assert str(tmp_path) in res.err or 'manhattan' in res.err
    assert {o.name for o in tmp_path.iterdir()}=={'file','damaged'} and (tmp_path/'file').read_text()=='mine'

def test_verify_stores_thresholds_with_the_model(run, tmp_path, shell):
    shutil.copytree(run, own := tmp_path/'run')
    res = shell('reid-eval', own, '--verify', '--far', '.02', '.05', '--csv', tmp_path/'q.csv')
    v = reid_eval(own).verification()
    stored = read_verification(own)
    assert res.returncode==0 and f'{v.n_nonmatch:,} non-matching pairs' in res.out and f'{100*v.eer:.2f} %' in res.out
    assert {k: o['threshold'] for k,o in stored['thresholds'].items()}=={str(o): v.threshold(o) for o in (.05,.02,.01)} and (stored['metric'],stored['flip'])==('cosine',True) and stored['eer']==v.eer
    assert len(pd.read_csv(own/'verification.csv'))==len(v.roc()) and (own/'verification.png').read_bytes()[:4]==b'\x89PNG'
    assert {o.name for o in own.iterdir()}-{o.name for o in run.iterdir()}=={'verification.json','verification.csv','verification.png'}
    (own/'verification.json').write_text('{')
    res = shell('reid-eval', own, '--verify', '--metric', 'euclidean', '--out', tmp_path/'out', '--quiet')
    assert (res.returncode, res.out, res.err)==(0, '', '') and (own/'verification.json').read_text()=='{'
    assert json.loads((tmp_path/'out'/'verification.json').read_text())['metric']=='euclidean'
    assert {o.name for o in (tmp_path/'out').iterdir()}=={'evaluation.json','ranked.png','verification.json','verification.csv','verification.png'}
    assert shell('reid-eval', own, '--out', tmp_path/'out').returncode==0

@pytest.mark.parametrize('args,words', [(['--verify','--far','2'], 'between 0 and 1'), (['--far','.02'], 'only with `--verify`'), (['--verify','--far','.02','1e-9'], 'are too few for this rate')])
def test_far_that_cannot_be_measured(args, words, run, tmp_path, shell):
    res = shell('reid-eval', run, *args, '--out', tmp_path/'out')
    assert res.returncode==2 and words in res.err and not (tmp_path/'out').exists(), res.err

def test_verify_without_non_matching_pairs(run, data, tmp_path, shell):
    "One person alone in query and gallery: one line, and nothing is written"
    df = read_dataset(data).df
    who = df[df.split=='query'].pid.iloc[0]
    df = df[(df.split!='train') & (df.pid==who)].assign(path=lambda o: [str(Path(data)/p) for p in o.path])
    df.to_csv(tmp_path/'one.csv', index=False)
    res = shell('reid-eval', run, tmp_path/'one.csv', '--verify', '--out', tmp_path/'out', '--csv', tmp_path/'q.csv')
    assert res.returncode==2 and res.err.count('\n')==1 and 'no non-matching pairs' in res.err, res.err
    assert {o.name for o in tmp_path.iterdir()}=={'one.csv'}

def test_verify_would_replace(run, tmp_path, shell):
    res = shell('reid-eval', run, '--verify', '--csv', run/'verification.csv')
    assert res.returncode==2 and 'that is the file of csv' in res.err and not (run/'verification.csv').exists()

def test_thresholds_of_another_model_are_kept(run, tmp_path, shell, monkeypatch):
    "Also in `--out`; those of the same model and a damaged file are replaced"
    shutil.copytree(run, own := tmp_path/'run')
    other = save_model(build_reid_net('test_resnet', n_classes=5, regions=0, pretrained=False, size=(64,32)), own/'other.safetensors', size=(64,32))
    for _ in range(2): assert shell('reid-eval', own, '--verify', '--features', tmp_path/'f.safetensors').returncode==0
    kept = (own/'verification.json').read_bytes()
    with monkeypatch.context() as m:
        m.setattr(cli, 'load_embedder', lambda *_: pytest.fail('the evaluation has begun'))
        for args in ([other], [other, '--out', own]):
            res = shell('reid-eval', *args, '--verify')
            assert res.returncode==2 and res.err.count('\n')==1 and all(o in res.err for o in ('verification.json', 'other.safetensors', '--out')), res.err
    assert (own/'verification.json').read_bytes()==kept and read_verification(own)
    (own/'verification.json').write_bytes(kept[:100])
    assert shell('reid-eval', own, '--verify', '--features', tmp_path/'f.safetensors').returncode==0 and (own/'verification.json').read_bytes()==kept

def test_folders_on_the_way_are_made(run, tmp_path, shell):
    assert shell('reid-eval', run, '--csv', tmp_path/'new'/'q.csv').returncode==0 and (tmp_path/'new'/'q.csv').exists()

def test_data_that_is_none(tmp_path, data, shell):
    (tmp_path/'photos').mkdir()
    res = shell('reid-train', tmp_path/'photos', '--out', tmp_path/'r')
    assert res.returncode==2 and 'no known layout' in res.err and 'bounding_box_train' in res.err
    res = shell('reid-train', data, '--out', tmp_path/'r', '--size', '64x32', '--n-pids', '99', '--arch', 'test_resnet', '--pretrained', 'none')
    assert res.returncode==2 and '99' in res.err and not (tmp_path/'r').exists()

def test_truncated_image_is_named(tmp_path, shell):
    d = make_synthetic(tmp_path/'d', tiny=True)
    bad = sorted((d/'query').iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:200])
    res = shell('reid-train', d, '--out', tmp_path/'r', '--size', '64x32', '--n-pids', '4', '--arch', 'test_resnet', '--pretrained', 'none')
    assert res.returncode==2 and bad.name in res.err

@pytest.mark.parametrize('split', ['query','bounding_box_test'])
def test_truncated_test_image_is_named_before_hours_of_training(split, tmp_path, monkeypatch):
    "Also where training and tuning use only the training images"
    d = make_synthetic(tmp_path/'d', tiny=True)
    (bad := next(o for o in sorted((d/split).iterdir()) if not o.name.startswith('-1'))).write_bytes(b'cut')
    monkeypatch.setattr(runs, 'fit_run', lambda *_: pytest.fail('it trains'))
    with pytest.raises(ValueError, match=bad.name): reid_train(str(d), out=tmp_path/'r', val_pids=.25, **tiny_args)
    with pytest.raises(ValueError, match=bad.name): reid_compare(str(d), out=tmp_path/'c', tune_pids=.25, **tiny_args)
    assert [o.name for o in tmp_path.iterdir()]==['d']

def test_help_states_units_and_defaults(shell):
    for cmd in ('reid-train','reid-eval','reid-compare','reid-synth'): assert shell(cmd, '--help').returncode==0
    assert 'px; default' in ' '.join(shell('reid-train', '--help').out.split())

@pytest.mark.parametrize('cmd', ['reid-eval', 'reid-export', 'reid-search'])
def test_every_command_runs_as_a_module(cmd, monkeypatch, capsys):
    "Those of other modules too, where no script is on the path"
    monkeypatch.setattr(sys, 'argv', sys.argv)
    with pytest.raises(SystemExit) as e: cli.main([cmd, '--help'])
    assert not e.value.code and f'usage: {cmd} ' in capsys.readouterr().out

def started(*argv, log):
    "Starts a command in another process, whose number is returned"
    if not torch.cuda.is_available(): return fork(command, argv, log)
    with open(f'{log}.err', 'w') as f: return subprocess.Popen([script(argv[0]), *map(str, argv[1:])], stdout=subprocess.DEVNULL, stderr=f).pid  # CUDA does not survive a fork

def _csv(run): return pd.read_csv(run/'metrics.csv').drop(columns='seconds')

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the process is killed by a signal')
def test_resume_after_a_kill(data, tmp_path, shell):
    "Killed by the system in the middle of an epoch, and gone on with by another process: the last digit is the same"
    args = ['--arch', 'test_resnet', '--pretrained', 'none', '--size', '64x32', '--n-pids', '4', '--epochs', '5', '--steps', '4', '--eval-every', '2']
    whole,cut = tmp_path/'whole',tmp_path/'cut'
    assert shell('reid-train', data, '--out', whole, *args).returncode==0
    pid = started('reid-train', data, '--out', cut, *args, log=tmp_path/'killed')
    while not (cut/'metrics.csv').exists() or len(pd.read_csv(cut/'metrics.csv'))<1:
        assert not os.waitpid(pid, os.WNOHANG)[0], (tmp_path/'killed.err').read_text()
        time.sleep(.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (cut/'checkpoint.pth').exists() and not (cut/'results.json').exists()
    res = shell('reid-train', '--resume', cut, '--lr', '1')
    assert res.returncode==2 and 'lr' in res.err
    assert os.waitpid(started('reid-train', '--resume', cut, log=tmp_path/'resumed'), 0)[1]==0, (tmp_path/'resumed.err').read_text()
    pd.testing.assert_frame_equal(_csv(whole), _csv(cut), check_exact=True)
    for f in ('model.safetensors','lambdas.csv'): assert (whole/f).read_bytes()==(cut/f).read_bytes()
    assert shell('reid-train', '--resume', cut).returncode==0  # complete: nothing is trained again

def test_killed_before_the_first_epoch_ended(run, data, tmp_path):
    "Only `config.json` is there"
    out = tmp_path/'r'; out.mkdir()
    (out/'config.json').write_text((run/'config.json').read_text())
    assert reid_train(resume=out)==out
    pd.testing.assert_frame_equal(_csv(run), _csv(out), check_exact=True)

def test_resume_refuses_other_data(run, tmp_path):
    out = tmp_path/'r'; out.mkdir()
    cfg = json.loads((run/'config.json').read_text())
    cfg['dataset']['counts']['train']['images'] += 1
    cfg.pop('sha256')  # else it would be damaged
    (out/'config.json').write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match='begun with dataset'): reid_train(resume=out)

def test_swapped_labels_are_other_data(data, tmp_path):
    "They keep the counts. Earlier versions stored no fingerprint, and notes may be worded in another way"
    splits,other,cfg = read_dataset(data),read_dataset(data),RunConfig(data, **tiny_args)
    at = [0,(other.df.pid!=other.df.pid[0]).argmax()]
    other.df.loc[at,'pid'] = other.df.pid[at[::-1]].to_numpy()
    assert other.counts().equals(splits.counts())
    runs._begin(tmp_path/'r', asked := runs._describe(cfg, splits))
    with pytest.raises(ValueError, match='begun with dataset table='): runs.train_run(tmp_path/'r', other, cfg)
    (tmp_path/'c').mkdir()
    cmp = lambda o: Comparison(tmp_path/'c', o, cfg, arms=['none'])
    cmp(splits)._begin()
    with pytest.raises(ValueError, match='begun with table='): cmp(other)._begin()
    asked['dataset']['notes'] = ['Another wording.']
    del asked['dataset']['table']
    runs._begin(tmp_path/'old', asked)
    runs._check_same(tmp_path/'old', runs._describe(cfg, other))
    write_json(tmp_path/'c'/'comparison.json', {k: v for k,v in read_json(tmp_path/'c'/'comparison.json').items() if k!='table'})
    cmp(other)._begin()

@pytest.mark.parametrize('every', [None, 2])
def test_held_out_identities_choose(every, data, tmp_path):
    "Also among epochs that are not all evaluated"
    out = reid_train(data, out=tmp_path/'r', val_pids=.25, eval_every=every, **tiny_args)
    res,table = json.loads((out/'results.json').read_text()),pd.read_csv(out/'metrics.csv')
    assert res['epoch']==table.mAP.idxmax()+1 and res['queries']==6
    assert round(100*reid_eval(out).mAP, 4)==res['mAP']
    assert 'was chosen by mAP on 25 %' in (out/'summary.md').read_text()

def test_compare(data, tmp_path, shell, drawing):
    args = [data, '--out', tmp_path/'c', '--arch', 'test_resnet', '--pretrained', 'none', '--size', '64x32', '--n-pids', '4', '--epochs', '1', '--steps', '2',
            '--arms', 'none', 'adaptive', '--seeds', '1', '--amplitudes', '5e-3']
    with drawing(): res = shell('reid-compare', *args)
    assert res.returncode==0 and '| adaptive | 0.005 |' in res.out, res.err
    assert list(pd.read_csv(tmp_path/'c'/'results.csv').arm)==['none','adaptive']
    assert (tmp_path/'c'/'summary.md').exists() and all(np.asarray(Image.open(tmp_path/'c'/f'{o}.png')).std()>10 for o in ('curves','lambda_hist'))
    res = shell('reid-compare', *args, '--lr', '1e-2')
    assert res.returncode==2 and 'was begun with lr=0.001' in res.err
    begun = read_json(tmp_path/'c'/'comparison.json')
    for k in ('compile','first_size','drop_path'): del begun['cfg'][k]
    write_json(tmp_path/'c'/'comparison.json', begun)
    assert shell('reid-compare', *args).returncode==0  # an older version wrote the file

def test_table_of_the_paper_says_what_is_missing(tmp_path, shell):
    res = shell('reid-compare', '--table', 'paper', '--root', tmp_path, '--out', tmp_path/'t')
    assert res.returncode==0 and res.out.count('skipped: ')==15 and '87.2 / 94.6' in res.out
    assert shell('reid-compare', '--table', 'paper').returncode==2
    res = shell('reid-compare', '--table', 'paper', '--root', tmp_path, '--out', tmp_path/'t', '--seeds', '5', '--arms', 'none')
    assert res.returncode==2 and "--arms, --seeds: determined by the paper's table" in res.err
    res = shell('reid-compare', tmp_path, '--table', 'paper', '--root', tmp_path, '--out', tmp_path/'t')
    assert res.returncode==2 and 'DATA: determined' in res.err

def test_table_of_the_paper_trains_where_it_is_told(monkeypatch, tmp_path, data):
    from reid_fastai import tables
    seen = []
    class Fake:
        name = 'Market-1501'
        def roots(self, root): return [data]
        def __call__(self, root): return root
    def train(out, splits, cfg, device, workers):
        seen.append((device, workers, cfg.seed))
        return dict(mAP=1., reranked=dict(mAP=1., **{'Rank-1':1.}), **{'Rank-1':1.})
    for k,v in dict(_datasets=(Fake(),), build_net=lambda cfg: None, train_run=train).items(): monkeypatch.setattr(tables, k, v)
    reid_compare(table='paper', root=tmp_path, out=tmp_path/'t', seed=7, device='cpu', workers=3)
    assert set(seen)=={('cpu', 3, 7)}

def test_a_diverged_strength_counts_as_0(monkeypatch, tmp_path, data):
    "Else the grid, which extends itself, could not be finished"
    def train(self, stage, splits, arm, seed, strength):
        if strength>8: raise DivergedError('The loss is nan.')
        return dict(mAP=strength)
    monkeypatch.setattr(Comparison, '_train', train)
    with pytest.warns(UserWarning, match='decoupled with strength 37.5 counts as mAP 0. The loss is nan.'):
        assert (cmp := Comparison(tmp_path/'c', read_dataset(data), RunConfig(data), arms=['decoupled'], tune_pids=.25))._strengths()=={'decoupled': 7.5}
    assert [(o['strength'],o['mAP']) for o in cmp.rows]==[(37.5,0.)]  # it is in the table, and counted in the summary

def test_a_diverged_test_run_is_left_out(monkeypatch, tmp_path, data):
    "The other arms are trained, without the arm that follows its λ, and tables and figures say it"
    def train(self, stage, splits, arm, seed, strength):
        if arm=='adaptive' or (arm,seed)==('none',43): raise DivergedError('The loss is nan.')
        (d := self.out/f'{arm}-{seed}').mkdir()
        (d/'metrics.csv').write_text('epoch,train_loss,mAP\n1,2.,30.\n')
        self.rows.append(dict(stage=stage, arm=arm, strength=strength, seed=seed, mAP=30., ms_per_step=1., images_per_second=1., folder=d.name, **{'Rank-1':50.}))
    monkeypatch.setattr(Comparison, '_train', train)
    make = lambda name,arms: Comparison(tmp_path/name, read_dataset(data), RunConfig(data, **tiny_args), arms, seeds=2, factors=[.1], amplitudes=[.2])
    with pytest.warns(UserWarning) as warned: runs = (cmp := make('c', ['none','conventional','adaptive','annealed'])).run()
    said = [str(o.message) for o in warned if 'left out' in str(o.message)]
    assert len(said)==5 and sum('diverged' in o and 'annealed' in o for o in said)==2 and 'final-none-seed43 is left out of the results. The loss is nan.' in said
    assert len(runs)==len(pd.read_csv(tmp_path/'c'/'results.csv'))==8 and runs.mAP.isna().sum()==5
    table = comparison_table(runs)
    assert list(table.seeds)==['1, 1 diverged', 2, '0, 2 diverged', '0, 2 diverged'] and table.loc['conventional','mAP − none']=='+0.00' and table.mAP['adaptive']==''
    assert 'final-adaptive-0.2-seed43, final-annealed-seed43.' in (s := cmp.summary()) and 'nan' not in s
    assert plot_strengths(runs).figure.axes[1].get_title()=='adaptive, 2 diverged' and (tmp_path/'c'/'curves.png').exists()
    with pytest.warns(UserWarning, match='left out'): assert make('d', ['adaptive']).run().mAP.isna().all()

def test_tuning_with_distractors(monkeypatch, tmp_path, data):
    "All arms are tuned with their own strengths on the same people, among images of others"
    tried = []
    def train(self, stage, splits, arm, seed, strength):
        tried.append((arm, strength))
        assert stage=='tune' and splits is self.held
        return dict(mAP=1/(1+abs(strength-2)))
    monkeypatch.setattr(Comparison, '_train', train)
    cmp = Comparison(tmp_path/'c', read_dataset(data), RunConfig(data), arms=['rotation','decoupled'], strengths=dict(rotation=[1,2,4], decoupled=[.5,2,8]), tune_pids=.25, tune_distractors=.5)
    assert cmp._strengths()==dict(rotation=2, decoupled=2) and {*tried}>={('rotation',4.), ('decoupled',8.)}
    assert cmp.held.counts().distractors.gallery>0

def test_eval_on_other_data_with_kept_features(run, tmp_path, shell):
    "A model, another dataset: the figures of its images, re-ranked too, and again from the kept embeddings unless an image has changed"
    import shutil
    other = make_synthetic(tmp_path/'other', tiny=True, seed=7)
    args = [run, other, '--features', tmp_path/'f.safetensors']
    first = shell('reid-eval', *args, '--rerank', '--csv', tmp_path/'q.csv')
    assert first.returncode==0 and 're-ranked: ' in first.out, first.err
    assert list(pd.read_csv(tmp_path/'q.csv').path.map(lambda o: o.split('/')[0]))==['query']*6
    again = shell('reid-eval', *args)
    assert again.returncode==0 and [l for l in again.out.splitlines() if l.startswith('mAP')][0] in first.out
    assert shell('reid-eval', run).out!=again.out
    shutil.copy(o := next(other.rglob('query/*.jpg')), tmp_path/'kept.jpg')
    o.write_bytes(next(other.rglob('bounding_box_train/*.jpg')).read_bytes())  # another image under the same name
    changed = shell('reid-eval', *args)
    assert changed.returncode==2 and 'embeddings of other images' in changed.err
    shutil.rmtree(other)
    assert shell('reid-eval', *args).returncode==2

def _documented():
    "Commands of the README, the pages and the notebooks, with the names of their options"
    here = Path(__file__).parents[1]
    texts = {p: p.read_text(encoding='utf-8') for p in [here/'README.md', *here.glob('nbs/*.md')]}
    for p in here.glob('nbs/**/*.ipynb'): texts[p] = '\n\n'.join(''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
    for p,text in texts.items():
        lines = [l for block in re.findall(r'^```(?:sh|bash)\n(.*?)^```', text, re.S|re.M) for l in block.replace('\\\n', ' ').splitlines()] + re.findall(r'`(reid-\w+ [^`\n]+)`', text)
        for l in lines:
            if (m := re.search(r'\b(reid-(?:train|eval|compare|synth|embed|search|export)) ([^|]*)', l)) and not re.search('[…{]', l) and not re.fullmatch('--[a-z-]+', m[2]): yield pytest.param(m[1], m[2], id=f'{p.name}: {m[0][:60]}')

@pytest.mark.parametrize('cmd,args', _documented())
def test_documented_commands_are_understood(cmd, args):
    "… by the parser; what they name need not exist"
    func = next(filter(None, (getattr(m, cmd.replace('-', '_'), None) for m in (cli, cli_search, cli_export))))
    pos = dict(reid_train=['data'], reid_eval=['run','data'], reid_compare=['data'], reid_synth=['path'], reid_embed=['images'], reid_export=['run']).get(func.__name__)
    try: opts = _parse(func.__wrapped__, cmd, pos, shlex.split(args, comments=True))
    except SystemExit as e:
        assert e.code in (0, None)  # --help and --version
        return
    nets = [o for o in [*(opts.get('archs') or []), opts.get('arch') or ''] if o.startswith(('osnet','bat_net'))]
    assert not nets or opts.get('pretrained') not in (None,'imagenet'), f'{nets} have no pretrained weights'

def test_a_comparison_that_is_run_again_has_each_run_once(monkeypatch, tmp_path, data):
    "In the same process, interrupted and complete"
    stop = [('adaptive',43)]
    def train(self, stage, splits, arm, seed, strength):
        if (arm,seed) in stop: raise KeyboardInterrupt
        (d := self.out/f'{arm}-{seed}').mkdir(exist_ok=True)
        (d/'metrics.csv').write_text('epoch,train_loss,mAP\n1,2.,30.\n')
        self.rows.append(dict(stage=stage, arm=arm, strength=strength, seed=seed, mAP=30., ms_per_step=1., images_per_second=1., folder=d.name, **{'Rank-1':50.}))
    monkeypatch.setattr(Comparison, '_train', train)
    cmp = Comparison(tmp_path/'c', read_dataset(data), RunConfig(data, **tiny_args), ['conventional','adaptive'], seeds=2, factors=[.1], amplitudes=[.2])
    with pytest.raises(KeyboardInterrupt): cmp.run()
    stop.clear()
    for _ in range(2): assert len(cmp.run())==4

def test_grids_that_cannot_be_tried(tmp_path, data):
    make = lambda **kw: Comparison(tmp_path/'c', read_dataset(data), RunConfig(data, **tiny_args), ['conventional','adaptive'], tune_pids=.25, **kw)
    with pytest.raises(ValueError, match='0 cannot be tried'): make(factors=(0,1e-3,1e-2))
    with pytest.raises(ValueError, match='first four digits'): make(factors=(.0025,.00250001,.01))
    assert make(factors=.1, amplitudes=.2).grids==dict(conventional=[.1], adaptive=[.2])

def test_a_diverged_row_of_the_papers_table(monkeypatch, tmp_path, data):
    "The other rows are trained"
    from reid_fastai import tables
    class Fake:
        name = 'Market-1501'
        def roots(self, root): return [data]
        def __call__(self, root): return root
    def train(out, splits, cfg, *_):
        if cfg.l2=='conventional': raise DivergedError('The loss is nan.')
        return dict(mAP=1., reranked=dict(mAP=1., **{'Rank-1':1.}), **{'Rank-1':1.})
    for k,v in dict(_datasets=(Fake(),), build_net=lambda cfg: None, train_run=train).items(): monkeypatch.setattr(tables, k, v)
    assert list(tables.paper_table(tmp_path/'t', tmp_path).measured)==['diverged']+['1.0 / 1.0']*4

# ---- what cannot work is refused before the long part

@pytest.mark.parametrize('kw,words', [(dict(rerank=True), 'Re-ranking'), (dict(verify=True, far=1e-9), 'too few for this rate')])
def test_eval_refuses_before_it_embeds(run, tmp_path, monkeypatch, kw, words):
    from reid_fastai.evaluation import rerank
    monkeypatch.setattr(rerank, 'free_memory', lambda: 1000)
    monkeypatch.setattr(cli, 'join_parts', lambda *_: pytest.fail('all images were embedded'))
    with pytest.raises(ValueError, match=words): reid_eval(run, out=tmp_path/'e', **kw)

def test_rates_among_images_of_one_person(run, tmp_path, data):
    s = read_dataset(data)
    df = s.df[(s.df.split=='train') | (s.df.pid==s.query.pid.iloc[0])]
    df.assign(path=[str(s.root/o) for o in df.path]).to_csv(tmp_path/'one.csv', index=False)
    with pytest.raises(ValueError, match='There are no non-matching pairs'): reid_eval(run, str(tmp_path/'one.csv'), verify=True, far=.1, out=tmp_path/'e')

def test_pairs_are_counted_before_the_search(data):
    df,_ = results.search_rows(splits := read_dataset(data))
    emb = torch.randn(len(df), 4)
    q,g = ((df.split==o).to_numpy() for o in ('query','gallery'))
    res = RetrievalResults.from_embeddings(emb[q], df.pid[q], df.camid[q], emb[g], df.pid[g], df.camid[g])
    assert count_nonmatches(*(df.pid[df.split==o].to_numpy() for o in ('query','gallery')))==res.verification().n_nonmatch

def test_eval_takes_a_path(run, tmp_path, data):
    reid_eval(run, Path(data), out=tmp_path/'e', quiet=True)
    assert read_json(tmp_path/'e'/'evaluation.json')['data']==data

def test_reranking_that_cannot_work_is_refused_before_training(tmp_path, data):
    s = read_dataset(data)
    q = s.query[:3]
    g = s.gallery[s.gallery.pid.isin(q.pid)].groupby('pid').head(3)
    df = pd.concat([s.train, q, g])
    df.assign(path=[str(s.root/o) for o in df.path]).to_csv(tmp_path/'small.csv', index=False)
    with pytest.raises(ValueError, match='k1=20, k2=6: with 12 images'): reid_train(str(tmp_path/'small.csv'), out=tmp_path/'r', rerank=True, **tiny_args)
    assert not (tmp_path/'r').exists()

@pytest.mark.parametrize('name', ['market','market[1]'])
def test_a_restart_finds_its_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (d := Path(f'runs/{name}-net-20260101-000000-{os.getppid()}')).mkdir(parents=True)
    (d/'config.json').write_text('{}')
    assert cli._new_folder(None, Path('runs')/f'{name}-net', True)==d

@pytest.mark.parametrize('name', ['x'*250, '歩'*82])
def test_what_is_writable_can_be_written(name, tmp_path):
    "Names that leave no room for a temporary ending"
    check_writable(tmp_path/name)
    atomic_write(tmp_path/name, 'a')
    assert (tmp_path/name).read_text()=='a' and len(list(tmp_path.iterdir()))==1

def _interrupted(data, out, monkeypatch, **args):
    "A run that was interrupted after its first epoch"
    def stop(self, after=Checkpoint.after_epoch):
        after(self)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', stop)
        with pytest.raises(KeyboardInterrupt): reid_train(data, out=out, **{**tiny_args, **args})
    return out

def test_resume_without_the_initial_weights(data, run, tmp_path, monkeypatch):
    "A checkpoint has all arrays, so the file that the run began with may be gone, or be another one"
    shutil.copy(run/'model.safetensors', file := tmp_path/'w.safetensors')
    whole = reid_train(data, out=tmp_path/'whole', **{**tiny_args, 'pretrained': str(file)})
    cut = _interrupted(data, tmp_path/'cut', monkeypatch, pretrained=str(file))
    file.unlink()
    reid_train(resume=cut)
    assert (cut/'model.safetensors').read_bytes()==(whole/'model.safetensors').read_bytes()

def test_l2sp_is_resumed_with_the_same_initial_weights(data, run, tmp_path, monkeypatch):
    "Its penalty is the distance from them"
    shutil.copy(run/'model.safetensors', file := tmp_path/'w.safetensors')
    whole = reid_train(data, out=tmp_path/'whole', l2='l2sp', **{**tiny_args, 'pretrained': str(file)})
    cut = _interrupted(data, tmp_path/'cut', monkeypatch, l2='l2sp', pretrained=str(file))
    save_model(build_reid_net('test_resnet', 5, regions=0, pretrained=False), file, (64,32))
    with pytest.raises(ValueError, match='begun with other initial weights'): reid_train(resume=cut)
    shutil.copy(run/'model.safetensors', file)
    reid_train(resume=cut)
    assert (cut/'model.safetensors').read_bytes()==(whole/'model.safetensors').read_bytes()
    file.unlink()
    assert reid_train(resume=cut)==cut  # complete: it is only read

def _named(data, folder, columns):
    "A CSV file of three people, seen by cameras with names"
    files = sorted(Path(data).glob('bounding_box_test/[0-9]*.jpg'))
    df = pd.DataFrame([(str(files[i]), ['anna','bert','carl'][i//4], ['door','hall','yard','7'][i%4], 'gallery' if i%4 else 'query') for i in range(12)], columns=['path','pid','camid','split'])
    df[columns].to_csv(path := folder/'named.csv', index=False)
    return path

def test_names_of_people_and_cameras_in_the_outputs_of_eval(run, data, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(results, 'plot_ranked', interpret.plot_ranked)
    monkeypatch.setattr(results, 'save_figure', lambda fig, path: titles.extend(o.get_title() for o in fig.axes))
    reid_eval(run, str(_named(data, tmp_path, ['path','pid','camid','split'])), out=tmp_path/'e', csv=tmp_path/'q.csv')
    df = pd.read_csv(tmp_path/'q.csv')
    assert df.pid.tolist()==['anna','bert','carl'] and df.camid.tolist()==['door']*3
    assert titles[0]=='query 0\nanna\ndoor' and not any('id ' in o or 'cam ' in o for o in titles)
    reid_eval(run, str(_named(data, tmp_path, ['path','pid','split'])), csv=tmp_path/'q.csv')
    assert pd.read_csv(tmp_path/'q.csv').camid.isna().all()  # unknown

def test_commands_in_messages_can_be_copied(data, tmp_path, monkeypatch):
    "Also if a path has spaces"
    with pytest.raises(KeyboardInterrupt) as e:
        monkeypatch.setattr(Checkpoint, 'after_epoch', lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        reid_train(data, out=(out := tmp_path/'my run'), **tiny_args)
    assert shlex.split(re.search('`(.*)`', str(e.value))[1])==['reid-train','--resume',str(out)]
    with pytest.raises(ValueError) as e: reid_train(data, out=out, **tiny_args)
    assert shlex.split(re.search('`(--resume.*)`', str(e.value))[1])==['--resume',str(out)]
    with pytest.raises(ValueError) as e: read_verification(save_model(build_reid_net('test_resnet', 5, regions=0, pretrained=False), tmp_path/'a b.safetensors', (64,32)))
    assert shlex.split(str(e.value).split('Create it: ')[1])==['reid-eval',str(tmp_path/'a b.safetensors'),'--verify']

def test_a_run_on_a_read_only_file_system(run, monkeypatch):
    "Such as a volume of a container: there, removing a file that does not exist is an error of its own"
    import errno
    def unlink(self, missing_ok=False): raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
    want = reid_eval(run).mAP
    monkeypatch.setattr(Path, 'unlink', unlink)
    assert reid_eval(run).mAP==want and results.read_results(run)

def test_resume_with_the_dataset_in_another_place(data, run, tmp_path, monkeypatch):
    "As on a cluster, where each job copies the dataset to a folder of its own"
    for o in ('job1','job2','other'): shutil.copytree(data, tmp_path/o/'people')
    whole = reid_train(data, out=tmp_path/'whole', **tiny_args)
    cut = _interrupted(str(tmp_path/'job1'/'people'), tmp_path/'cut', monkeypatch)
    shutil.rmtree(tmp_path/'job1')
    with pytest.raises(ValueError, match='does not exist'): reid_train(resume=cut)
    next((tmp_path/'other'/'people'/'query').glob('*.jpg')).unlink()
    with pytest.raises(ValueError, match='begun with'): reid_train(str(tmp_path/'other'/'people'), resume=cut)
    reid_train(str(tmp_path/'job2'/'people'), resume=cut)
    assert pd.read_csv(whole/"metrics.csv").drop(columns="seconds").equals(pd.read_csv(cut/"metrics.csv").drop(columns="seconds"))
    with pytest.raises(ValueError, match='--lr'): reid_train(str(tmp_path/'job2'/'people'), resume=cut, lr=.1)

def test_a_comparison_goes_on_with_the_dataset_in_another_place(data, tmp_path):
    shutil.copytree(data, tmp_path/'people')
    shutil.copytree(data, tmp_path/'job'/'people')
    args = dict(out=tmp_path/'c', arms=['none'], **{**tiny_args, 'epochs': 1})
    reid_compare(str(tmp_path/'people'), seeds=1, **args)
    reid_compare(str(tmp_path/'job'/'people'), seeds=2, **args)
    assert len(pd.read_csv(tmp_path/'c'/'results.csv'))==2
    next((tmp_path/'job'/'people'/'query').glob('*.jpg')).unlink()
    with pytest.raises(ValueError, match='was begun with'): reid_compare(str(tmp_path/'job'/'people'), seeds=2, **args)
