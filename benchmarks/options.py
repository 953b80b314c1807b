"Options of `reid-train` on the command lines of other scripts"
import json

def value(text):
    "'epochs=10' → ('epochs', 10)"
    k,_,v = text.partition('=')
    try: return k,json.loads(v)
    except ValueError: return k,v

def add_set(parser): parser.add_argument('--set', nargs='*', default=[], metavar='OPTION=VALUE', type=value, help='options of reid-train, such as epochs=10')
