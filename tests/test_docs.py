"Builds the site and walks through it in headless Chromium, as a visitor would; a test fails on any console error or request to another host."
import ast, html, importlib, os, pkgutil, re, runpy, subprocess, sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import reid_fastai
from browser import needs_browser, serve

pytest.importorskip('myst_nb', reason="the documentation needs pip install '.[dev]'")
root = Path(__file__).parents[1]

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built from scratch with warnings as errors"
    d = tmp_path_factory.mktemp('docs')
    res = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-d', d/'doctrees', root/'nbs', d/'html'], capture_output=True, text=True)
    assert not res.returncode, res.stderr
    return d/'html'


@pytest.fixture(scope='module')
def served(site, tmp_path_factory):
    with serve(site, tmp_path_factory.mktemp('profile')) as browser: yield browser

@pytest.fixture
def browser(served):
    served.see()
    served.errors.clear(), served.urls.clear()
    yield served
    served.js('1')  # collects what was still under way
    assert not served.errors
    assert all(o.startswith((served.base, 'data:')) for o in served.urls)


def pages(site): return sorted(str(p.relative_to(site)) for p in site.rglob('*.html') if p.relative_to(site).parts[0]!='_modules')

def public():
    "Full name of every public function and class"
    for m in pkgutil.walk_packages(reid_fastai.__path__, 'reid_fastai.'):
        mod = importlib.import_module(m.name)
        if m.name.endswith(('.all', '._modidx')): continue
        yield from (f'{m.name}.{k}' for k in getattr(mod, '__all__', []) if getattr(getattr(mod, k), '__module__', None)==m.name)

def test_every_symbol_has_an_entry(site):
    "… with a link to its source"
    entries = {k: b for p in site.glob('*.html') for k,b in re.findall(r'<dt class="sig[^"]*" id="([\w.]+)">(.*?)</dt>', p.read_text(encoding='utf-8'), re.S)}
    missing = set(public())-set(entries)
    assert len(entries)>80 and not missing
    assert not [k for k,b in entries.items() if '_modules/' not in b]

def test_links(site):
    "Every link within the site has a page, and a place on it, to go to"
    html = {p.relative_to(site): p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    ids = {p: set(re.findall(r'\bid="([^"]+)"', s)) for p,s in html.items()}
    def there(page, href):
        path,_,anchor = unquote(href).partition('#')
        to = Path(os.path.normpath(page.parent/path)) if path else page
        return (site/to).exists() and (not anchor or to not in ids or anchor in ids[to])
    bad = {(str(p), h) for p,s in html.items() for h in re.findall(r'<a [^>]*?href="([^"?]+)', s) if not re.match('[a-z]+:', h) and not there(p, h)}
    assert not bad

@needs_browser
def test_home(browser, site):
    browser.open('index.html')
    assert any(o.endswith('.css') for o in browser.urls)  # requests are seen
    assert 'reid_fastai' in browser.js('document.title')
    assert browser.js('document.querySelector("article h1").innerText').strip()
    linked = browser.js('[...document.querySelectorAll(".sidebar-tree a")].map(a => a.getAttribute("href"))')
    assert set(linked)>={p for p in pages(site) if p not in ('index.html', 'search.html', 'genindex.html', 'py-modindex.html')}

@needs_browser
def test_api(browser):
    browser.open('01_regularizers.html')
    entry = 'document.getElementById("reid_fastai.regularizers.hard_sigmoid")'
    assert browser.js(f'{entry}.innerText').startswith('hard_sigmoid(')
    assert 'Any shape' in browser.js(f'{entry}.parentElement.querySelector("table").innerText')
    assert browser.js('document.querySelectorAll("mjx-container svg").length')>5
    assert not browser.js('document.querySelectorAll("mjx-merror, [data-mjx-error]").length')
    browser.open(browser.js(f'{entry}.querySelector("a[href*=_modules]").getAttribute("href")'))
    assert 'def hard_sigmoid(' in browser.js('document.querySelector(":target").innerText')

@needs_browser
def test_tutorial(browser, site):
    browser.open(next(p for p in pages(site) if p.startswith('tutorials/')))
    assert browser.js('document.querySelectorAll("div.highlight").length')
    assert browser.js('document.querySelectorAll("article img").length')

@needs_browser
@pytest.mark.parametrize('query,page', [('hard_sigmoid', '01_regularizers'), ('re-ranking', '11_evaluation.rerank'), ('mINP', '10_evaluation.metrics')])
def test_search(browser, query, page):
    browser.open('index.html')
    browser.js(f'document.querySelector(".sidebar-search").value={query!r}; document.querySelector(".sidebar-search-container").submit()')
    # Its link rather than a click on it: the list is still growing
    href = browser.wait(f'document.querySelector("#search-results a[href^=\\"{page}.html\\"]")?.getAttribute("href")')
    browser.open(href)
    browser.wait(f'location.pathname=="/{page}.html"')

@needs_browser
def test_every_page(browser, site):
    "Figures are there, formulas are typeset, nothing sticks out, wide screens show whole tables, and the colours are those asked for"
    for page in pages(site):
        browser.open(page)
        assert not browser.js('[...document.images].filter(i => i.loading!="lazy" && !i.naturalWidth).map(i => i.src)'), page
        assert not browser.js('document.querySelectorAll("[data-mjx-error]").length'), page
        for width,dark in (1440, True),(1280, False),(390, False),(390, True):
            browser.see(width, dark=dark)
            assert browser.js('document.documentElement.scrollWidth')<=width, (page, width)  # `innerWidth` of a phone grows with the page
            if width==1440: assert not browser.js('[...document.querySelectorAll(".table-wrapper")].filter(o => o.scrollWidth>o.clientWidth).map(o => o.innerText)'), page
            shade = sum(map(int, re.findall(r'\d+', browser.js('getComputedStyle(document.body).backgroundColor'))[:3]))/3
            assert (shade<64 if dark else shade>192), (page, dark)

@needs_browser
def test_phone(browser, site):
    "Wide figures scroll and keep their size up to 640 px; wide tables scroll; sentences are wrapped, and columns are not; options are not broken"
    browser.see(390)
    browser.open('tutorials/02_watching_lambda.html')
    browser.js('document.querySelectorAll("img").forEach(i => i.loading="eager")')
    browser.wait('[...document.images].every(i => i.naturalWidth)')
    assert browser.js('[...document.querySelectorAll("img.wide")].map(i => i.width==Math.min(i.naturalWidth, 640) && i.naturalWidth>480)') == [True]*browser.js('document.querySelectorAll("img.wide").length') != []
    space = '[...document.querySelectorAll(".output pre%s")].filter(o => /%s/.test(o.textContent)).map(o => getComputedStyle(o).whiteSpace)'
    assert set(browser.js(space % (' .sentence', 'ValueError')))=={'pre-wrap'}
    browser.open('tutorials/04_your_data_and_backbone.html')
    assert set(browser.js(space % ('', 'identities  cameras')))=={'pre'}
    browser.open('results_methods.html')
    assert browser.js('[...document.querySelectorAll("article table")].every(t => t.rows[0].cells.length<4 || t.offsetWidth>=576)')
    assert browser.js('[...document.querySelectorAll(".highlight .word")].map(o => o.offsetHeight<30)')==[True]*browser.js('document.querySelectorAll(".highlight .word").length') != []

def shown(site):
    "Name and text of every page but those of the source"
    for p in pages(site): yield p, (site/p).read_text(encoding='utf-8')

def bare(text): return html.unescape(re.sub('<[^>]+>', '', text))

def test_no_object_is_shown_by_its_address(site):
    for p,s in shown(site): assert not (found := re.findall(r'functools\.partial|<[\w.]+ object at 0x[0-9a-f]+|&lt;[^<>]{0,60} at 0x[0-9a-f]+', s)), (p, found[:3])

def test_a_blank_line_separates_messages(site):
    "Also if the output of a cell was stored in several parts"
    seen = 0
    for p,s in shown(site):
        for out in re.findall(r'<div class="cell_output.*?</div>\s*</div>', s, re.S):
            lines = bare(out).strip().split('\n')
            starts = [i for i,l in enumerate(lines) if i and l.startswith('ValueError: ')]
            seen += len(starts)
            assert not (bad := [lines[i] for i in starts if lines[i-1].startswith('ValueError: ')]), (p, bad)
    assert seen>50

def test_lines_of_code_fit_the_page(site):
    "At most 100 characters a line, in cells, blocks of pages and signatures; outputs are wrapped by the browser"
    n,long = 0,[]
    for p,s in shown(site):
        for block in re.findall(r'<div class="highlight-(?!none|myst-ansi)[^"]*[^>]*><div class="highlight"><pre>(.*?)</pre>', s, re.S):
            n += 1
            long += [(p, l) for l in bare(block).split('\n') if len(l)>100]
    assert n>400 and not long

def test_every_image_is_described(site):
    "By a sentence, not by the name of its file"
    n = 0
    for p,s in shown(site):
        for img in re.findall(r'<img [^>]*>', s):
            n += 1
            alt = html.unescape((re.search(r'alt="([^"]*)"', img) or ['',''])[1])
            assert len(alt.split())>3 and not re.search(r'\.(png|svg|jpg)|_images|[0-9a-f]{16}', alt), (p, img)
    assert n>40

def test_version(site):
    "… in the footer, in CITATION.cff and in what to cite"
    v = reid_fastai.__version__
    assert all(f'reid_fastai {v}' in s for _,s in shown(site))
    assert f'version: {v}\n' in (root/'CITATION.cff').read_text(encoding='utf-8')
    assert f'version = {{{v}}}' in (root/'nbs/citation.md').read_text(encoding='utf-8')

def test_tutorials_lead_to_their_notebook(site):
    for p,s in shown(site):
        if p.startswith('tutorials/'):
            (to,) = re.findall(r'href="([^"]*\.ipynb)"', s)
            assert Path(to).name==Path(p).with_suffix('.ipynb').name and (site/p).parent.joinpath(to).exists()

def test_help_of_commands(site):
    "… is on the page of the command line, with options as a shell takes them"
    page = bare((site/'21_cli.html').read_text(encoding='utf-8'))
    for cmd,option in (('reid-train', '--n-pids'), ('reid-eval', '--features'), ('reid-compare', '--tune-pids'), ('reid-synth', '--tiny')):
        assert option in page.split(f'usage: {cmd} ')[1].split('show this help message')[0], cmd

def test_every_parameter_is_described(site):
    "No row of a table of parameters ends in an empty cell"
    cell = r'<tr[^>]*><td><p><code[^>]*><span class="pre[^"]*">([^<]*)</span></code></p></td>'
    html = {p.name: p.read_text(encoding='utf-8').replace('\n', '') for p in site.glob('*.html')}
    assert sum(len(re.findall(cell, s)) for s in html.values())>500
    rows = {k: re.findall(cell+r'(?:(?!</tr>).)*?<td>(?:<p></p>)?</td></tr>', s) for k,s in html.items()}
    assert not {k: v for k,v in rows.items() if v}

def test_every_result_is_described(site):
    "The comment on a result is on the page of its module, whether the function states a type or not"
    words = lambda text: re.sub(r'\W+', '', text)
    for py in (root/'reid_fastai').rglob('*.py'):
        code = py.read_text(encoding='utf-8')
        if not (nb := re.search(r'File to edit: [./]*nbs/(.*)\.ipynb', code)): continue
        page = words(bare((site/f'{nb[1]}.html').read_text(encoding='utf-8')))
        for name,note in re.findall(r'^def ([a-z]\w*)\((?:[^()]|\([^()]*\))*?\n?\)(?: *-> *[^:#\n]+)?: # (.*)', code, re.M): assert words(note) in page, (py.name, name, note)

def test_index_of_names(site):
    "Every public name is on the page, with a link to its entry and its purpose"
    page = (site/'api.html').read_text(encoding='utf-8')
    assert not {o for o in public() if f'#{o}"' not in page}
    assert not re.findall(r'<td>(?:<p></p>)?</td>\s*</tr>', page)

wrap,wrap_fences = (runpy.run_path(str(root/'nbs/_wrap.py'))[o] for o in ('wrap', 'wrap_fences'))

@pytest.mark.parametrize('src', ['x = f(aaaaaaaaaa, [bbbbbbbbbb, cccccccccc], dddddddddd)  # a note', 'if aaaaaaaaaa: bbbbbbbbbb = 1; cccccccccc = 2; dddddddddd = 3',
    'def f():\n    "A docstring of some length that has to be broken"\n    return \'a string that is rather long\' + \'b\'',
    "raise ValueError(f'{aaaaaa} is a message with {len(bbbbbb)} items in it')", 'x = aaaaaaaaaa if bbbbbbbbbb else cccccccccc if dddddddddd else eeeeeeeeee',
    'def f(\n    a:int=1, # what this argument is, in a sentence\n    b=None # and this\n): pass'])
def test_wrap(src):
    "Lines of at most 40 characters, and the same program"
    res = wrap(src, 40)
    assert max(map(len, res.split('\n')))<=46 and res!=src
    def same(o):
        for n in ast.walk(t := ast.parse(o)):
            if isinstance(n, ast.Constant) and isinstance(n.value, str): n.value = ' '.join(n.value.split())
        return ast.dump(t)
    assert same(res)==same(src)
    words = lambda s: sorted(' '.join(o.lstrip('# ') for o in re.findall('#[^\n]*', s)).split())
    assert words(res)==words(src)

def test_wrap_keeps_the_variables_of_a_loop_together():
    for src in ('xx = [ffff(aaaaaaaa) for bbbbbb,cccccc in dddddddd if eeeeeeee]', 'test_eq([kkkk(aaaaaaaaaaaaaa) for nnnnnn,_ in unwrap(mmmmmmmm)], [])'):
        assert re.search(r'for \w+,\w+ in', wrap(src, 40)) and wrap(src, 40)!=src

def test_wrap_shell_lines():
    import shlex
    line = 'reid-train DATA '+' '.join(f'--option-{i} {i}' for i in range(12))
    res = wrap_fences(f'a\n```sh\n{line}  # and what it does\n```\nb\n```\n{line}\n```\n')
    block = res.split('```')[1].removeprefix('sh\n')
    assert max(map(len, block.split('\n')))<=95 and shlex.split(block.replace('\\\n', ' '), comments=True)==shlex.split(line)
    assert '# and what it does' in block and res.startswith('a\n') and res.endswith(f'b\n```\n{line}\n```\n')
    line = 'python controls.py '+' '.join(f'--option-{i} "a b" \'c  d\'' for i in range(9))+' "adaptive rest"'*9  # never inside quotes
    block = wrap_fences(f'```sh\n{line}\n```\n').split('```')[1].removeprefix('sh\n')
    assert max(map(len, block.split('\n')))<=95 and shlex.split(block.replace('\\\n', ''))==shlex.split(line)

def test_wrap_leaves_alone_what_fits_or_is_no_python():
    assert wrap('x = 1')=='x = 1'
    no = '%matplotlib inline and a line that is longer than the page is wide'
    assert wrap(no, 20)==no
    text = "x = \'\'\'a long line within a string that has several\nlines\'\'\'"
    assert wrap(text, 20).count('within a string that has several\n')==1
