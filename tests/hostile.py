"Damaged files, odd images and hostile tables for `attack.py`"
import io, os, pickle, struct
from pathlib import Path

import numpy as np
from PIL import Image

# ---- damage: name -> function of a file and of random numbers

def _bytes(f): return lambda p, rng: p.write_bytes(f(p.read_bytes(), rng))
def _const(b): return lambda p, rng: p.write_bytes(b)
def _instead(f): return lambda p, rng: (p.unlink(), f(p))
def flip(n, bit=False):
    "Change `n` random bytes, or one bit in each"
    def f(old, rng):
        data = bytearray(old)
        for i in rng.sample(range(len(data)), min(n, len(data))): data[i] ^= 1<<rng.randrange(8) if bit else rng.randrange(1, 256)
        return bytes(data)
    return _bytes(f)
def save(im, fmt='PNG', **kw): im.save(b := io.BytesIO(), fmt, **kw); return b.getvalue()
_png = save(Image.new('RGB', (8,8)))

CUTS = {'cut': _bytes(lambda o, r: o[:r.randrange(len(o))]), 'short': _bytes(lambda o, r: o[:-1]), 'empty': _const(b''), 'text': _bytes(lambda o, r: b'my notes\n'*r.randint(1, 99)),
    'zeros': _bytes(lambda o, r: o[:3*len(o)//4].ljust(len(o), b'\0')), 'noise': _bytes(lambda o, r: r.randbytes(r.randint(1, 4000)))}
NO_FILE = {'folder': _instead(Path.mkdir), 'FIFO': _instead(os.mkfifo), 'loop': _instead(lambda p: p.symlink_to(p.name))}
DAMAGES = {'a byte': flip(1), 'a byte again': flip(1), 'a bit': flip(1, bit=True), '2 bytes': flip(2), '50 bytes': flip(50), **CUTS, **NO_FILE, 'removed': _instead(lambda p: None),
    'twice': _bytes(lambda o, r: o+o), 'PNG': _const(_png), 'JSON': _bytes(lambda o, r: r.choice([b'[]', b'{}', b'null', b'{"a": NaN}', b'['*5000])),
    'pickle': _const(pickle.dumps({})), 'table': _const(b'a,b\n1,2\n')}


# ---- images: name -> function of an RGB image

def _as(mode, fmt='PNG', **kw): return lambda im: save(im.convert(mode), fmt, **kw), lambda im: im.convert(mode)
def _grey(fmt, dtype, scale): return lambda im: save(Image.fromarray((np.asarray(im.convert('L'))*scale).astype(dtype)), fmt), lambda im: im.convert('L')
def _moving(im): return save(im.convert('P'), 'GIF', save_all=True, append_images=[im.convert('P').rotate(180)])
def _sized(*size): return lambda im: save(im.resize(size))
def _header(n): return lambda im: _png[:16]+struct.pack('>II', n, n)+_png[24:]

#: Bytes of an odd image, and a plain one with the same pixels
TWINS = {'16-bit': _grey('PNG', 'uint16', np.uint16(257)), '16-bit TIFF': _grey('TIFF', 'uint16', np.uint16(257)), 'float TIFF': _grey('TIFF', 'float32', 1/255), 'grey': _as('L'), 'palette': _as('P'),
    'opaque RGBA': _as('RGBA'), 'black and white': _as('1'), 'CMYK': _as('CMYK', 'TIFF'), 'WebP': _as('RGB', 'WEBP', lossless=True), 'BMP': _as('RGB', 'BMP'), 'moving GIF': (_moving, _as('P')[1])}
#: Bytes of images with other pixels than the dataset's
PIXELS = {'CMYK JPEG': _as('CMYK', 'JPEG')[0], '1×1': _sized(1, 1), '20000×1': _sized(20000, 1), '1×20000': _sized(1, 20000), 'see-through': lambda im: (im.putalpha(9), save(im))[1],
    'header of 60000×60000': _header(60000), 'header of 12000×12000': _header(12000)}


# ---- tables: name -> function of rows and of random numbers, to text or bytes

HEAD = ['path','pid','camid','split']
def to_csv(rows, sep=',', end='\n', head=HEAD, quote=''): return end.join(sep.join(quote+o+quote for o in row) for row in [head, *rows])+end

def _written(code='utf-8', **kw): return lambda rows, rng: to_csv(rows, **kw).encode(code)
def _column(c, f): return lambda rows, rng: to_csv([[*row[:c], f(row[c]), *row[c+1:]] for row in rows])
def _without(c): return lambda rows, rng: to_csv([row[:c]+row[c+1:] for row in rows], head=HEAD[:c]+HEAD[c+1:])
def _wider(cell, name): return lambda rows, rng: to_csv([[*row, cell] for row in rows], head=[*HEAD, name])
def _only(f): return lambda rows, rng: to_csv([o for o in rows if f(o)])
def _more(f): return lambda rows, rng: to_csv([*rows, f(*rng.choice(rows))])
def _cell(c, v):
    def f(rows, rng):
        row = rng.choice(rows)
        row[c] = v(row[c]) if callable(v) else v
        return to_csv(rows)
    return f

#: Tables of the same images, or of what is to be refused
SAME_OR_REFUSED = {
    'UTF-8 with mark': _written('utf-8-sig'), 'UTF-16': _written('utf-16'), 'UTF-32': _written('utf-32'), 'semicolons': _written(sep=';'), 'tabs': _written(sep='\t'), 'bars': _written(sep='|'), 'spaces': _written(sep=', '),
    'CRLF': _written(end='\r\n'), 'CR': _written(end='\r'), 'blank lines': _written(end='\n\n'), 'quotes': _written(quote='"'), 'open quote': lambda rows, rng: to_csv(rows).replace('query', '"query', 1),
    'capitals': _written(head=[o.title() for o in HEAD]), 'shouting': _written(head=[o.upper() for o in HEAD]), 'no header': lambda rows, rng: to_csv(rows[1:], head=rows[0]), 'header alone': _only(lambda o: False),
    'an extra column': _wider('x', 'note'), 'a column twice': _wider('7', 'pid'), 'a long row': _more(lambda *o: 'x'*7), 'a short row': _more(lambda *o: 'x'), 'NULs': lambda rows, rng: '\0'.join(to_csv(rows)),
    'float pids': _column(1, lambda o: f'{o}.0'), 'float camids': _column(2, lambda o: f'{o}.0'), 'exponents': _column(1, lambda o: f'{int(o):e}'), 'padded pids': _column(1, lambda o: o if o=='-1' else o.zfill(6)),
    'pids in spaces': _column(1, lambda o: f' {o} '), 'pids with plus': _column(1, lambda o: o if o=='-1' else f'+{o}'), 'other digits': _column(1, lambda o: o.translate({48+i: 0x660+i for i in range(10)})),
    '26-digit pids': _column(1, lambda o: o if o in '-1 0' else o.ljust(26, '0')), 'a 26-digit pid': _cell(1, '1'*26), 'pid NaN': _cell(1, 'nan'), 'pid inf': _cell(1, 'inf'), 'pid None': _cell(1, 'None'), 'a formula': _cell(1, '=1+1'),
    'no path column': _without(0), 'no pid column': _without(1), 'no split column': _without(3), 'an empty path': _cell(0, ''), 'an empty pid': _cell(1, ''), 'an empty camid': _cell(2, ''), 'an empty split': _cell(3, ''),
    'dotted paths': _column(0, lambda o: f'./{o}'), 'absolute paths': _column(0, lambda o: f'{{dir}}/{o}'), 'backslashes': _column(0, lambda o: o.replace('/', '\\')), 'a lost image': _cell(0, 'data/none.jpg'), 'a folder': _cell(0, 'data'),
    'a long path': _cell(0, 'a/'*2500), 'a NUL': _cell(0, lambda o: o+'\0'), 'a row twice': _more(lambda *o: o), 'an image in two spellings': _more(lambda p, *o: ['./'+p, *o]),
    'leakage': lambda rows, rng: to_csv([*rows, (lambda p, *o: [p.replace('/', '/./', 1), *o[:2], 'train'])(*rng.choice([o for o in rows if o[3]!='train']))]),
    'no queries': _only(lambda o: o[3]!='query'), 'no gallery': _only(lambda o: o[3]!='gallery'), 'no matches': _only(lambda o: o[3]!='gallery' or o[1] in '-1 0'), 'one camera': _column(2, lambda o: '1'), 'camid -7': _cell(2, '-7'),
    'capital splits': _column(3, str.upper), 'split test': _cell(3, 'test'), 'a long cell': _cell(3, 'x'*200_000)}
#: Tables that may say something else of the images, which is the user's to say
ANY_FIGURES = {'flipped bytes': lambda rows, rng: bytes(b^rng.randrange(1, 256) if rng.random()<.0005 else b for b in to_csv(rows).encode()), 'cut': lambda rows, rng: (lambda o: o[:rng.randrange(len(o))])(to_csv(rows)),
    'noise': lambda rows, rng: rng.randbytes(3000), 'no camid column': _without(2), 'camid text': _cell(2, 'door'), 'camid 2.5': _cell(2, '2.5'), 'camid of 20 digits': _cell(2, '9'*20),
    'shuffled': lambda rows, rng: to_csv(rng.sample(rows, len(rows))), 'Latin-1': lambda rows, rng: to_csv([[p, 'é'+pid, *o] for p,pid,*o in rows]).encode('latin-1')}
