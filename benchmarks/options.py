"Options of `reid-train` on the command lines of other scripts"
import argparse, ast, json, sys
from inspect import signature

from fastai.torch_core import default_device

from reid_fastai.callback.precision import check_precision
from reid_fastai.config import RunConfig

def value(text):
    "'epochs=10' → ('epochs', 10)"
    k,eq,v = text.partition('=')
    if not eq: raise argparse.ArgumentTypeError(f'{text}: write OPTION=VALUE, such as epochs=10')
    try: return k,ast.literal_eval(v)
    except (ValueError, SyntaxError): return k,v

def positive(text):
    "A whole number of at least 1"
    if (n := int(text))<1: raise argparse.ArgumentTypeError(f'{text}: a whole number of at least 1 is needed')
    return n

def parser(doc, out):
    "Parser of a script that trains with several seeds; `doc` describes the script, `out` its option --out"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', help="'synthetic', the folder of a dataset, or a CSV file")
    p.add_argument('--out', required=True, help=out)
    p.add_argument('--seeds', type=positive, default=1, help='number of seeds')
    p.add_argument('--seed', type=int, default=42, help='the first of them')
    p.add_argument('--device')
    p.add_argument('--set', nargs='*', default=[], metavar='OPTION=VALUE', type=value, help='options of reid-train, such as epochs=10')
    return p

def start(main, p):
    "Call `main` with the arguments that `p` has read; an error is one line"
    try: main(p.parse_args())
    except ValueError as e: sys.exit(f'{p.prog}: error: {e}')

def chosen(pairs, **elsewhere):
    "The options of `--set`; raise `ValueError` for unknown ones and for those that the script does not take, with the remedies `elsewhere`"
    opts = dict(pairs)
    elsewhere = dict(data='it is the first argument', seed='use --seed', val_pids='the script evaluates in its own way', rerank='the script evaluates in its own way') | elsewhere
    for k,v in opts.items():
        if k not in signature(RunConfig).parameters: raise ValueError(f'--set {k}={v}: reid-train has no option {k}.')
        if elsewhere.get(k): raise ValueError(f'--set {k}={v}: {elsewhere[k]}.')
    return opts

def setting(cfg, device, *columns):
    "What the rows of a file must share: the `columns`, the precision of training, and all other options that are not defaults"
    plain = vars(RunConfig(cfg.data, cfg.recipe, arch=cfg.arch)) | dict(recipe='quick')
    other = {k: v for k,v in vars(cfg).items() if k not in ('data','seed','precision',*columns) and v!=plain[k]}
    cols = {k: 'x'.join(map(str, v)) if isinstance(v := getattr(cfg, k), list) else v for k in columns}
    return {**cols, 'precision': check_precision(cfg.precision, device or default_device()), 'options': json.dumps(other)}
