"The order of the notebooks is a topological sort of the imports, and `all` hands on every public name"
import ast, importlib, re
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = Path(__file__).parents[1]
lib = get_config(root).lib_path

def _module(nb):
    m = re.search(r'#\|\s*default_exp ([\w.]+)', nb.read_text(encoding='utf-8'))
    return m and m[1]

order = {m: nb.name for nb in sorted(nbglob(root/'nbs', as_path=True)) if (m := _module(nb))}

def _imports(module):
    "Our modules that the module imports, relative or absolute, at any depth of the code"
    path = lib/f'{module.replace(".", "/")}.py'
    parents = ('reid_fastai.'+module).split('.')
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom): names = ['.'.join([*(parents[:-node.level] if node.level else []), *([node.module] if node.module else [])])]
        else: continue
        for n in (o.removeprefix('reid_fastai.').removesuffix('.all') for o in names if o.startswith('reid_fastai.')):
            yield from [o for o in order if o.startswith(f'{n}.')] or [n]  # a package stands for all of its modules

def test_every_notebook_has_a_number_of_its_own():
    numbers = [nb.split('_')[0] for nb in order.values()]
    assert len(set(numbers))==len(numbers) and all(re.fullmatch(r'\d\d[a-z]?', o) for o in numbers), [o for o in order.values() if numbers.count(o.split('_')[0])>1]

@pytest.mark.parametrize('module', order)
def test_imports_point_one_way(module):
    for o in _imports(module):
        if o in order: assert order[o]<order[module], f'{order[module]} imports {o}, which is {order[o]}'

@pytest.mark.parametrize('module,banned', [('regularizers', 'fastai'), ('rotation', 'fastai'), ('losses', 'fastai'), *((m,o) for m in order if m.startswith('models.') for o in ('fastai', 'reid_fastai.regularizers')),
                                           ('learner', 'reid_fastai.data.datasets'), ('callback.regularizer', 'reid_fastai.models')])
def test_what_must_not_be_known(module, banned):
    tree = ast.parse((lib/f'{module.replace(".", "/")}.py').read_text(encoding='utf-8'))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    names += [f'reid_fastai.{o}' for o in _imports(module)]
    assert not [n for n in names if n==banned or n.startswith(banned+'.')]

def test_all_hands_on_every_public_name():
    everything = importlib.import_module('reid_fastai.all')
    for module in [o for o in order if o not in ('test_utils', 'shell') and not o.startswith('cli')]:
        m = importlib.import_module(f'reid_fastai.{module}')
        missing = [n for n in m.__all__ if not hasattr(everything, n)]
        assert not missing, f'{module}: {missing}'

def test_star_import_of_models_takes_names_alone():
    "The package hands on its modules' names, and not the modules: one is called `all`"
    space = {}
    exec('from reid_fastai.models import *', space)
    assert {'build_reid_net', 'ReIDNet', 'ReIDOutput', 'resolve_arch', 'reid_splitter', 'methods'} <= set(space) and 'all' not in space and 'net' not in space
