"Break the long lines of a page's code. The syntax tree of the result must be the same, except for white space in docstrings."
import ast, io, re, textwrap, tokenize
from keyword import iskeyword

_opening,_closing = '([{',')]}'
_before = {'if', 'else', 'for', 'and', 'or', '+', '-', '|', '&', '*', '/', '==', '%', '<', '>', '<=', '>='}  # a line may begin with these
_compound = {'if', 'elif', 'else', 'for', 'while', 'with', 'try', 'except', 'finally', 'def', 'class'}

def _tree(src):
    "What `src` says, to compare; None if it is not Python"
    try: tree = ast.parse(src)
    except SyntaxError: return None
    for o in ast.walk(tree):
        if isinstance(o, ast.Expr) and isinstance(o.value, ast.Constant) and isinstance(o.value.value, str): o.value.value = ' '.join(o.value.value.split())
    return ast.dump(tree)

def _tokens(src):
    skip = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    return [t for t in _whole_strings(src, tokenize.generate_tokens(io.StringIO(src).readline)) if t.type not in skip]

def _whole_strings(src, toks):
    "Since Python 3.12 an f-string is several tokens; it becomes one again, because older versions cannot read one that is broken inside"
    start,end = (getattr(tokenize, f'FSTRING_{o}', None) for o in ('START','END'))
    lines,opened = src.splitlines(keepends=True),[]
    for t in toks:
        if t.type==start: opened.append(t.start)
        if not opened: yield t
        elif t.type==end:
            (r,c),(r2,c2) = opened.pop(),t.end
            text = ''.join(lines[r-1:r2])
            if not opened: yield tokenize.TokenInfo(tokenize.STRING, text[c:len(text)-len(lines[r2-1])+c2], (r,c), t.end, t.line)

def _above(lines, i, t, width):
    "The comment `t` at the end of line `i`, on lines of its own above it"
    code = lines[i][:t.start[1]].rstrip()
    pad = ' '*(len(lines[i])-len(lines[i].lstrip()))
    text = textwrap.wrap(t.string.lstrip('# '), width-len(pad)-2, break_long_words=False) or ['']
    return [f'{pad}# {o}' for o in text]+([code] if code else [])

def _split_string(t, depth, room):
    "Where a plain string token can be cut so that its first part has at most `room` characters, and what to insert there"
    s = t.string
    head = s[:len(s)-len(s.lstrip('rRbBuUfF'))]
    quote = s[len(head)]
    if s[len(head):].startswith(quote*3): return None
    balanced = lambda o: 'f' not in head.lower() or o.count('{')==o.count('}')
    cut = next((k for k in range(min(room, len(s)-2), len(head)+3, -1) if s[k]==' ' and balanced(s[:k])), None)
    return cut and (cut+1, quote+('' if depth else ' \\'), head+quote)

def _docstring(lines, i, t, width):
    "Line `i`, which holds nothing but the one-line docstring `t`, as several"
    pad,s = lines[i][:t.start[1]],t.string
    if pad.strip() or s[0] not in '"\'' or s[:3] in ('"""', "'''") or t.end[1]<len(lines[i].rstrip()): return None
    text = textwrap.wrap(s[1:-1], width-len(pad)-3, break_long_words=False)
    return [pad+'"""'+text[0], *[pad+o for o in text[1:-1]], pad+text[-1]+'"""'] if len(text)>1 else None

def _break(lines, i, toks, depths, width):
    "Line `i` in two, at each possible place, the best first"
    line = lines[i]
    pad = len(line)-len(line.lstrip())
    here = [(t,d) for t,d in zip(toks, depths) if t.start[0]==i+1 and t.end[0]==i+1]
    if not here: return []
    deeper = pad+(8 if line.lstrip().startswith(('def ', 'class ', 'async ')) else 4)
    is_first = lambda k: not k or toks[k-1].end[0]<toks[k].start[0] and not depths[k] and not lines[toks[k].start[0]-2].endswith('\\')
    begins = toks.index(here[0][0])
    starts = is_first(begins)  # of a statement
    first = toks[next(k for k in range(begins, -1, -1) if is_first(k))]  # of the statement that the line belongs to
    cuts,in_target = [],False  # the variables of a loop stay together
    for (a,d),(b,e) in zip(here, here[1:]):
        at,in_target = b.start[1],a.string=='for' or in_target and a.string!='in'
        if in_target or at>width+5*(a.string==':') or at<=pad+4 or a.string in ('.', 'not', '**', '-') or b.string in (*_closing, ',', '.', ':', ')'): continue
        inner = ' '*(deeper if starts else pad)
        if a.string==';' and not d and first.string not in _compound: cuts.append((0, at, line[:a.start[1]].rstrip(), ' '*pad+line[at:]))
        elif a.string==':' and not d and first.string in _compound and b.type!=tokenize.COMMENT: cuts.append((-1, at, line[:at].rstrip(), ' '*(first.start[1]+4)+line[at:]))
        elif a.string==',' and e: cuts.append((1+2*e, at, line[:at].rstrip(), inner+line[at:]))
        elif b.string in _before and (b.string.isalpha() or line[at-1]==' '): cuts.append((2+2*e+(0 if b.string.isalpha() else 1)+(0 if e else 1.5), at, line[:at].rstrip()+('' if e else ' \\'), inner+line[at:]))
        elif a.string in _opening and e: cuts.append((6+2*e, at, line[:at].rstrip(), inner+line[at:]))
        elif a.string in ('=', ':=') or iskeyword(a.string) or a.string==',' and not e: cuts.append((9+2*e, at, line[:at].rstrip()+('' if e else ' \\'), inner+line[at:]))
    for t,d in here:
        if t.type==tokenize.STRING and t.end[1]>width and (s := _split_string(t, d, width-t.start[1]-4)):
            at = t.start[1]+s[0]
            cuts.append((7+2*d, at, line[:at]+s[1], ' '*(deeper if starts else pad)+s[2]+line[at:]))
    cuts = [c for c in cuts if len(c[2])<=width+5*c[2].endswith(':') and len(c[3])<len(line)]
    # A compound statement goes below its colon first; else the outermost place, the later the better
    return [c[2:] for c in sorted(cuts, key=lambda c: c[0]-3*c[1]/width)]

def wrap(
    src:str, # Python
    width:int=95 # Characters that a line may have
) -> str: # The same program
    "Break lines of more than `width` characters between tokens, and put comments at their end above them"
    lines,tree = src.split('\n'),_tree(src)
    if tree is None or all(len(o)<=width for o in lines): return src
    done = set()  # lines that cannot be broken
    for _ in range(10*len(lines)+100):
        i = next((i for i,o in enumerate(lines) if len(o)>width and o not in done), None)
        if i is None: break
        toks,depths,depth = _tokens('\n'.join(lines)),[],0
        for t in toks:
            if t.type==tokenize.OP and t.string in _closing: depth -= 1
            depths.append(depth)
            if t.type==tokenize.OP and t.string in _opening: depth += 1
        note = next((t for t in toks if t.type==tokenize.COMMENT and t.start[0]==i+1), None)
        text = next((t for t in toks if t.type==tokenize.STRING and t.start[0]==t.end[0]==i+1), None)
        if note and not note.string.startswith('#|'): ways = [_above(lines, i, note, width)]
        else: ways = [o for o in [text and _docstring(lines, i, text, width)] if o] + _break(lines, i, toks, depths, width)
        begin = next((lines[k] for k in range(i-1, -1, -1) if lines[k].strip() and len(lines[k])-len(lines[k].lstrip())<len(lines[i])-len(lines[i].lstrip())), '')
        ways.append([' '*(len(begin)-len(begin.lstrip())+4)+lines[i].lstrip()])  # deeply indented below a bracket
        new = next((o for o in ways if list(o)!=[lines[i]] and _tree('\n'.join([*lines[:i], *o, *lines[i+1:]]))==tree), None)
        if new: lines[i:i+1] = new
        else: done.add(lines[i])
    return '\n'.join(lines)

def wrap_shell(
    src:str, # Commands
    width:int=95 # Characters that a line may have
) -> str: # The same commands
    "Break long commands before an option or an argument, and put comments at their end above them"
    res = []
    for line in src.split('\n'):
        code,_,note = line.partition('  # ')
        if len(line)>width and note and code.strip(): res.append(f'# {note.strip()}'); line = code.rstrip()
        while len(line)>width:
            ends = [o.start() for o in re.finditer(' ', line[:width-2]) if o.start()>4 and not any(line[:o.start()].count(q)%2 for q in '"\'')]  # outside of quotes
            if not ends: break
            at = max((o for o in ends if o>=width//2 and line.startswith(' --', o)), default=ends[-1])
            res.append(line[:at]+' \\')
            line = '    '+line[at+1:]
        res.append(line)
    return '\n'.join(res)

def wrap_fences(
    text:str # Markdown
) -> str: # The same, with shorter lines in its blocks of Python and shell
    "Break long lines of code in Markdown"
    how = dict(python=wrap, py=wrap, sh=wrap_shell, bash=wrap_shell)
    return re.sub(r'^(`{3,})(\w+)\n(.*?)^\1$', lambda m: f'{m[1]}{m[2]}\n{how[m[2]](m[3][:-1])}\n{m[1]}' if m[2] in how and m[3] else m[0], text, flags=re.S|re.M)
