"A headless Chromium that opens pages as a visitor would, and notes console errors and requests"
import functools, json, re, shutil, subprocess, threading, time
from contextlib import closing, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

try: from websockets.sync import client as ws_client
except ImportError: ws_client = None
chromium = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
needs_browser = pytest.mark.skipif(not (chromium and ws_client), reason="no Chromium on PATH, or no package websockets")

class Browser:
    "One tab of a headless Chromium that can reach nothing but this machine, over the DevTools protocol"
    def __init__(self, base, profile):
        self.base,self.n,self.errors,self.urls = base,0,[],[]
        self.proc = subprocess.Popen([chromium, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
            '--no-first-run', '--hide-scrollbars', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', '--remote-debugging-port=0', f'--user-data-dir={profile}',
            'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        said = []
        for line in self.proc.stderr:
            said.append(line)
            if m := re.search(r'ws://\S+', line): break
        else: raise RuntimeError(f'Chromium did not start: {"".join(said)}')
        threading.Thread(target=self.proc.stderr.read, daemon=True).start()  # a full pipe would stop it
        self.ws,self.session = ws_client.connect(m[0], max_size=None),None
        tab = self('Target.createTarget', url='about:blank')['targetId']
        self.session = self('Target.attachToTarget', targetId=tab, flatten=True)['sessionId']
        for o in 'Page', 'Runtime', 'Log', 'Network': self(f'{o}.enable')
    def __call__(self, method, **params):
        "The result of a command; what happens meanwhile is noted"
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params, **({'sessionId': self.session} if self.session else {}))))
        while (msg := json.loads(self.ws.recv(timeout=60))).get('id')!=self.n: self.note(msg.get('method'), msg.get('params'))
        assert 'error' not in msg, msg
        return msg['result']
    def note(self, method, o):
        if method=='Network.requestWillBeSent': self.urls.append(o['request']['url'])
        bad = method=='Runtime.exceptionThrown' or (method=='Runtime.consoleAPICalled' and o['type'] in ('error', 'assert'))
        if bad or (method=='Log.entryAdded' and o['entry']['level']=='error'): self.errors.append(o)
    def js(self, code):
        "Value of a JavaScript expression"
        res = self('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in res, res
        return res['result'].get('value')
    def wait(self, code, secs=30):
        "Value of a JavaScript expression, once it is true"
        end = time.monotonic()+secs
        while not (res := self._during_navigation(code)):
            assert time.monotonic()<end, f'never true: {code}'
            time.sleep(.05)
        return res
    def _during_navigation(self, code):
        "Value of `code`; None if the page is left while it is computed"
        try: return self.js(code)
        except AssertionError as e:
            if 'navigated or closed' not in str(e): raise
    def open(self, page):
        "Load `page` and typeset its formulas"
        self('Page.navigate', url=f'{self.base}/{page}')
        self.wait(f'location.href.endsWith({json.dumps(page)}) && document.readyState=="complete"')
        self.wait('window.MathJax ? MathJax.startup.promise.then(() => true) : true')
    def see(self, width=1280, height=900, dark=False):
        "Size of the window, and the colours the visitor prefers"
        self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width<600)
        self('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
    def close(self):
        self.ws.close()
        self.proc.terminate()
        self.proc.wait(20)

@contextmanager
def serve(folder, profile):
    "A browser, and the files of `folder` on a port of this machine"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with closing(Browser(f'http://127.0.0.1:{server.server_port}', profile)) as browser: yield browser
    server.shutdown()
