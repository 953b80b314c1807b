"Exported networks: they compute what PyTorch computes, say what they take, and are refused where they do not"
import copy, os, pickle, random, re, sys, zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('onnx'); ort = pytest.importorskip('onnxruntime')

from hostile import DAMAGES
from reid_fastai import cli_export, portable
from reid_fastai.cli import reid_eval
from reid_fastai.cli_export import reid_export
from reid_fastai.data.block import read_image
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.export import Embedder, load_embedder, load_model, read_meta, save_model
from reid_fastai.models import LinearHead, Method, ObjectiveHead, ReIDNet, build_reid_net, load_backbone, methods
from reid_fastai.portable import PIXELS, SUFFIXES, Portable, PortableNet, export_net, read_portable, to_pixels

size = (64,32)

@pytest.fixture(scope='module')
def data(): return make_synthetic(tiny=True)

@pytest.fixture(scope='module')
def files(data): return sorted((data/'bounding_box_train').glob('*.jpg'))[:9]

@pytest.fixture(scope='module')
def images(files): return torch.from_numpy(np.stack([read_image(o, size) for o in files]))

def trained(arch, regions=0, seed=0):
    "A network whose statistics and norms are not those of its start, so that nothing is left out unseen"
    torch.manual_seed(seed)
    net = build_reid_net(arch, 5, regions, pretrained=False, size=size)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias, std=.2)
            nn.init.normal_(m.running_mean, std=.2); nn.init.uniform_(m.running_var, .5, 1.5)
    return net.eval()

@pytest.fixture(scope='module')
def net(): return trained('test_resnet', 2)

@pytest.fixture(scope='module')
def model(net, tmp_path_factory): return save_model(net, tmp_path_factory.mktemp('model')/'model.safetensors', size)

@pytest.fixture(scope='module')
def exported(net, images, tmp_path_factory):
    d = tmp_path_factory.mktemp('exported')
    return {f: (d/f'net{s}', export_net(net, d/f'net{s}', images, f))[0] for f,s in SUFFIXES.items()}

@torch.no_grad()
def oracle(net, images, flip=False, normalize=False):
    "Written apart from the library: the mirror image by NumPy, the length by hand"
    a = images.numpy().astype(np.float32)/255
    y = net(torch.from_numpy(a)).numpy()
    if flip: y = (y+net(torch.from_numpy(a[...,::-1].copy())).numpy())/2
    return y/np.sqrt((y**2).sum(1, keepdims=True)) if normalize else y

def as_taken(images, pixels):
    "Images in NumPy, as the table of `PIXELS` describes them"
    d,a = PIXELS[pixels],images.numpy()
    if d['colours']=='BGR': a = a[:,::-1]
    if d['layout']=='(b, h, w, 3)': a = a.transpose(0, 2, 3, 1)
    if d['dtype']=='float32': a = (a/255).astype(np.float32)
    if pixels=='imagenet': a = (a-np.array([.485, .456, .406], np.float32).reshape(3, 1, 1))/np.array([.229, .224, .225], np.float32).reshape(3, 1, 1)
    return np.ascontiguousarray(a)

def bare(path, x):
    "What a program without this library does with an ONNX file"
    s = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return s.run(None, {s.get_inputs()[0].name: x})[0]

@pytest.mark.parametrize('fmt', SUFFIXES)
@pytest.mark.parametrize('arch,regions', [('test_resnet',0), ('test_resnet',2), ('test_efficientnet',0)])
def test_backbones(fmt, arch, regions, images, tmp_path):
    net,path = trained(arch, regions),tmp_path/f'net{SUFFIXES[fmt]}'
    assert export_net(net, path, images, fmt)['difference']<=1e-4
    run = Portable(path)
    for b in 1,2,7,9: np.testing.assert_allclose(run(images[:b]).numpy(), oracle(net, images[:b]), atol=1e-4)

@pytest.mark.parametrize('arch', ['osnet_x1_0','rga_sc_resnet50','ianet_resnet50','bat_net'])
def test_methods(arch, images, tmp_path):
    "Each published network, as ONNX; as programs of `torch.export` they are in `test_methods.py`"
    net,path = trained(arch),tmp_path/'net.onnx'
    assert export_net(net, path, images)['difference']<=1e-4
    want = oracle(net, images[:3])
    np.testing.assert_allclose(bare(path, images[:3].numpy()), want, atol=1e-4*max(1, abs(want).max()), rtol=0)

@pytest.mark.parametrize('pixels,flip,normalize', [*((o,True,True) for o in PIXELS), ('uint8',False,False), ('uint8',True,False)])
def test_pixels_flip_and_length(pixels, flip, normalize, net, images, tmp_path):
    path = tmp_path/'net.onnx'
    export_net(net, path, images, pixels=pixels, flip=flip, normalize=normalize)
    x = as_taken(images, pixels)
    np.testing.assert_allclose(to_pixels(images, pixels), x, atol=1e-6)
    np.testing.assert_allclose(bare(path, x), oracle(net, images, flip, normalize), atol=1e-4)

def test_what_a_file_says(exported):
    for f,path in exported.items():
        meta = read_meta(path)
        assert {k: meta[k] for k in ('format','arch','n_features','size','pixels','flip','normalize','int8')}==dict(
            format=f, arch='test_resnet', n_features=192, size=size, pixels='uint8', flip=False, normalize=False, int8=False)
        assert meta['input']==PIXELS['uint8'] and meta['mean']==meta['std']==[.5, .5, .5] and meta['version'] and meta['torch']
    import onnx
    m = onnx.load(exported['onnx'])
    onnx.checker.check_model(m)
    assert read_meta(exported['onnx'])['opset']==m.opset_import[0].version==17
    assert [o.dim_param or o.dim_value for o in m.graph.input[0].type.tensor_type.shape.dim]==['batch', 3, *size]
    assert m.graph.output[0].type.tensor_type.shape.dim[0].dim_param=='batch'
    with zipfile.ZipFile(exported['pt2']) as z: assert not z.testzip()

def test_embedder(exported, net, files, images, model):
    for path in exported.values():
        emb = load_embedder(path)
        for flip in False,True: np.testing.assert_allclose(emb(files, flip=flip, bs=4).numpy(), oracle(net, images, flip), atol=1e-4)
        torch.testing.assert_close(emb(Image.open(files[0])), load_embedder(model)(files[:1]), atol=1e-4, rtol=0)
        assert emb([]).shape==(0,192) and emb.size==size

def test_flip_inside_is_not_done_twice(net, files, images, tmp_path):
    export_net(net, tmp_path/'a.onnx', images, flip=True)
    emb = load_embedder(tmp_path/'a.onnx')
    np.testing.assert_allclose(emb(files).numpy(), oracle(net, images, True), atol=1e-4)
    with pytest.raises(ValueError, match='exported with flip'): emb(files, flip=False)
    export_net(net, tmp_path/'b.onnx', images, normalize=True)
    np.testing.assert_allclose(load_embedder(tmp_path/'b.onnx')(files).norm(dim=1).numpy(), 1, atol=1e-5)

def test_what_training_put_on_the_network_stays_behind(net, images, tmp_path):
    net = copy.deepcopy(net).train()
    net.l2_theta = nn.Parameter(torch.full((7,), 5.))
    export_net(net, tmp_path/'a.torchscript', images, 'torchscript')
    assert net.training and 'l2_theta' in dict(net.named_parameters())
    run = torch.jit.load(tmp_path/'a.torchscript')
    assert not [n for n,_ in run.named_parameters() if 'theta' in n]
    np.testing.assert_allclose(run(images).detach().numpy(), oracle(net.eval(), images), atol=1e-4)

class BatchOfTwo(nn.Module):
    "Right for the two images that are traced, and for no other number"
    def forward(self, x): return x*1.01 if len(x)!=2 else x

class Sorted(nn.Module):
    "No operator of ONNX"
    def forward(self, x): return torch.special.bessel_j0(x)

class NotANumber(nn.Module):
    def forward(self, x): return x*float('nan')

@pytest.mark.parametrize('fault,fmt,words', [(BatchOfTwo, 'onnx', 'differ from those of PyTorch by'), (BatchOfTwo, 'torchscript', 'differ from those of PyTorch by'), (BatchOfTwo, 'pt2', 'cannot be exported as pt2'),
    (Sorted, 'onnx', 'cannot be exported as onnx'), (NotANumber, 'onnx', 'by nan')])
def test_a_network_that_is_exported_wrongly_is_refused(fault, fmt, words, net, images, tmp_path, capfd):
    net = copy.deepcopy(net)
    net.trunk = nn.Sequential(net.trunk, fault())
    with pytest.raises(ValueError) as e: export_net(net, tmp_path/f'a{SUFFIXES[fmt]}', images, fmt)
    assert words in str(e.value) and len(str(e.value))-len(str(tmp_path))<300 and '\n' not in str(e.value)
    assert not list(tmp_path.iterdir()) and 'graph(' not in capfd.readouterr().out
    if (fault,fmt)!=(BatchOfTwo,'onnx'): return
    path = tmp_path/f'a{SUFFIXES[fmt]}'  # an existing file is kept
    export_net(trained('test_resnet'), path, images, fmt)
    before = path.read_bytes()
    with pytest.raises(ValueError): export_net(net, path, images, fmt)
    assert path.read_bytes()==before and len(list(tmp_path.iterdir()))==1

def test_a_model_of_narrow_images(tmp_path):
    "Only networks of one size are built for a size"
    net = trained('test_resnet')
    assert load_model(save_model(net, tmp_path/'m.safetensors', (64,24)))(torch.rand(1, 3, 64, 24)).shape==(1,net.n_features)

def test_wrong_pixels_would_be_seen(net, images, tmp_path, monkeypatch):
    "The comparison prepares images apart from the network: one that reads them as BGR differs"
    monkeypatch.setattr(PortableNet, 'forward', lambda self, x: self.net(x.flip(1).float()/255))
    with pytest.raises(ValueError, match='differ'): export_net(net, tmp_path/'a.onnx', images)

def test_int8(net, images, tmp_path, monkeypatch):
    whole,small = (export_net(net, tmp_path/f'{o}.onnx', images, int8=o) for o in (False,True))
    sizes = {o: (tmp_path/f'{o}.onnx').stat().st_size for o in (False,True)}
    assert sizes[True]<.5*sizes[False] and .95<small['cosine']<1-1e-6 and read_meta(tmp_path/'True.onnx')['int8']
    got = torch.from_numpy(bare(tmp_path/'True.onnx', images.numpy()))
    assert torch.cosine_similarity(got, torch.from_numpy(oracle(net, images))).min()>.9
    monkeypatch.setattr(portable, '_cosine', lambda a, b: .89)
    with pytest.raises(ValueError, match='cosine .* is 0.89; at least 0.9 is needed'): export_net(net, tmp_path/'c.onnx', images, int8=True)
    assert not (tmp_path/'c.onnx').exists()

@pytest.mark.parametrize('fmt', SUFFIXES)
def test_damaged_files(fmt, exported, net, images, tmp_path):
    "A changed file is refused or gives the same embeddings"
    whole,path,rng,refused = exported[fmt].read_bytes(),tmp_path/f'a{SUFFIXES[fmt]}',np.random.default_rng(0),0
    want = oracle(net, images[:1])
    for n in range(24):
        data = bytearray(whole)
        data[rng.integers(len(data)) if n<16 else -1-rng.integers(1000)] ^= 1<<int(rng.integers(8))
        path.write_bytes(data if n%8 else whole[:rng.integers(len(whole))])
        try: got = Portable(path)(images[:1])
        except ValueError as e:
            refused += 1
            assert str(path) in str(e)
        else: np.testing.assert_allclose(got.numpy(), want, atol=1e-6)
    assert refused>=16

@pytest.mark.parametrize('name', DAMAGES)
def test_other_damage(name, exported, tmp_path):
    path,whole = tmp_path/'a.onnx',exported['onnx'].read_bytes()
    path.write_bytes(whole)
    DAMAGES[name](path, random.Random(1))
    with pytest.raises(ValueError, match=str(path)): read_portable(path)

def test_foreign_files(tmp_path, net, images):
    class Half(nn.Module):
        def forward(self, x): return x/2
    torch.onnx.export(Half(), (torch.rand(1, 3),), tmp_path/'a.onnx', dynamo=False)
    torch.jit.script(Half()).save(tmp_path/'a.torchscript')
    (tmp_path/'a.pt2').write_text('mine')
    for o in 'onnx','torchscript','pt2':
        with pytest.raises(ValueError, match=f'a.{o}.*(no file of reid-export|no exported network)'): load_embedder(tmp_path/f'a.{o}')

def test_without_the_extra(model, exported, monkeypatch, tmp_path):
    def lacks(name):
        if name.split('.')[0].startswith('onnx'): raise ImportError(name)
        return __import__(name)
    monkeypatch.setattr(portable, 'import_module', lacks)
    for f in partial(reid_export, model, out=tmp_path/'a.onnx'),partial(load_embedder, exported['onnx']),partial(read_meta, exported['onnx']):
        with pytest.raises(ValueError, match=r"pip install 'reid_fastai\[export\]'"): f()
    assert not list(tmp_path.iterdir())
    reid_export(model, 'torchscript', out=tmp_path/'a.torchscript', quiet=True)

# ---- the file of a network, and embedders

class MaxHead(ObjectiveHead):
    "The same arrays, another embedding"
    def embed(self, fmap): return fmap.amax((2,3))

def with_head(head, arch='test_resnet'):
    trunk,stage,n,stats = load_backbone('test_resnet', False)
    return ReIDNet(trunk, stage, n, 5, 0, **stats, arch=arch, head=head)

def with_silu():
    net = build_reid_net('resnet10t', 5, 0, pretrained=False)
    for m in [*net.modules()]:
        for n,o in m.named_children():
            if isinstance(o, nn.ReLU): setattr(m, n, nn.SiLU())
    return net

@pytest.mark.parametrize('build', [partial(with_head, MaxHead), partial(with_head, partial(LinearHead, n_features=64)), with_silu])
def test_a_network_that_could_not_be_rebuilt_is_not_saved(build, tmp_path):
    net = build()
    net.trunk.eval()
    modes,state = [m.training for m in net.modules()],torch.get_rng_state()
    with pytest.raises(ValueError, match='register_method'): save_model(net, tmp_path/'m.safetensors', size)
    assert not list(tmp_path.iterdir()) and modes==[m.training for m in net.modules()] and torch.equal(state, torch.get_rng_state())

def test_an_own_head_is_saved_once_it_is_registered(files, tmp_path, monkeypatch):
    net = with_head(MaxHead, 'mine256')
    with pytest.raises(ValueError, match='register it first'): save_model(net, tmp_path/'m.safetensors', size)
    with monkeypatch.context() as m:
        m.setitem(methods, 'mine256', Method(lambda *_: with_head(MaxHead, 'mine256')))
        save_model(net, tmp_path/'m.safetensors', size)
        torch.testing.assert_close(load_embedder(tmp_path/'m.safetensors')(files), Embedder(net, size)(files))
    with pytest.raises(ValueError, match='register it first'): load_embedder(tmp_path/'m.safetensors')  # as in a new process

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_networks_of_other_precisions(dtype, net, files, images, tmp_path):
    mine,want = copy.deepcopy(net).to(dtype),Embedder(net, size)(files)
    emb = Embedder(mine, size)(files)
    assert emb.dtype==torch.float32
    torch.testing.assert_close(emb, want, atol=.05, rtol=.05)
    assert export_net(mine, tmp_path/'a.onnx', images)['difference']<=1e-4
    torch.testing.assert_close(load_embedder(save_model(mine, tmp_path/'m.safetensors', size))(files), load_embedder(tmp_path/'a.onnx')(files), atol=1e-4, rtol=0)

def test_another_default_precision(net, model, files, images, tmp_path, monkeypatch):
    want = Embedder(net, size)(files)
    torch.set_default_dtype(torch.float64)
    try:
        export_net(net, tmp_path/'a.onnx', images, pixels='imagenet')
        for o in Embedder(net, size),load_embedder(tmp_path/'a.onnx'): torch.testing.assert_close(o(files), want, atol=1e-4, rtol=0)
    finally: torch.set_default_dtype(torch.float32)

def test_embeddings_can_be_changed_and_trained_on(exported, model, files):
    for path in model,*exported.values():
        emb = load_embedder(path)(files[:2])
        emb /= emb.norm(dim=1, keepdim=True)
        nn.Linear(192, 2)(emb).sum().backward()

def test_embedders_are_pickled(exported, model, files):
    for path in model,*exported.values():
        emb = load_embedder(path)
        torch.testing.assert_close(pickle.loads(pickle.dumps(emb))(files[:2]), emb(files[:2]), atol=1e-6, rtol=0)

def test_file_objects(model, files):
    emb = load_embedder(model)
    with open(files[0], 'rb') as f: torch.testing.assert_close(emb(f), emb(files[:1]))

# ---- the command

@pytest.fixture
def shell(capsys, monkeypatch):
    def f(*args):
        monkeypatch.setattr(sys, 'argv', ['reid-export', *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: reid_export()
        return SimpleNamespace(code=e.value.code or 0, **capsys.readouterr()._asdict())
    return f

def test_command(shell, model, net, images, tmp_path):
    res = shell(model, '--out', tmp_path/'a.onnx', '--flip', '--normalize', '--pixels', 'imagenet')
    assert res.code==0 and not res.err and 'gives (b, 192) float32, flip average, unit length' in res.out and 'takes (b, 3, h, w) float32 RGB' in res.out
    np.testing.assert_allclose(bare(tmp_path/'a.onnx', as_taken(images, 'imagenet')), oracle(net, images, True, True), atol=1e-4)
    from reid_fastai.files import checksum
    assert read_meta(tmp_path/'a.onnx')['model']==checksum(model.read_bytes())
    assert shell(model, '--out', tmp_path/'a.onnx').code==0 and not read_meta(tmp_path/'a.onnx')['flip']  # its own file is replaced

def test_evaluation_of_exported_networks(model, data, tmp_path):
    want = reid_eval(model, data, quiet=True)
    for f,s in SUFFIXES.items():
        reid_export(model, f, out=tmp_path/f'a{s}', quiet=True)
        got = reid_eval(tmp_path/f'a{s}', data, quiet=True)
        assert abs(got.mAP-want.mAP)<1e-3
    reid_export(model, out=tmp_path/'b.onnx', int8=True, data=data, quiet=True)
    assert abs(reid_eval(tmp_path/'b.onnx', data, quiet=True).mAP-want.mAP)<.1

@pytest.mark.parametrize('args,words', [(['{m}', '--format', 'tflite'], "format='tflite'"), (['{m}', '--pixels', 'bgr'], "pixels='bgr'"), (['{m}', '--format', 'pt2', '--int8'], '8 bits are only for ONNX'),
    (['{m}', '--out', '{d}/a.pt2'], 'must end in .onnx'), (['{m}', '--out', '{m}'], 'must end in .onnx'), (['{m}', '--out', '{d}/link.onnx'], 'not an intact file'), (['{m}', '--out', '{d}/mine.onnx'], 'not an intact file'),
    (['{m}', '--out', '{d}/folder.onnx'], 'is a folder'), (['{m}', '--out', '{d}/mine.onnx/a.onnx'], 'cannot be written'), (['{d}/damaged.safetensors'], 'damaged'), (['{d}/no.safetensors'], 'no such file'), (['{d}'], 'no such file'),
    (['{d}/x.onnx'], 'exported network already'), (['{m}', '--int8', '--out', '{d}/a.onnx'], '--data DATA'), (['{m}', '--data', '{d}/none', '--out', '{d}/a.onnx'], 'does not exist'), (['{m}', '--what'], '--help'), ([], 'run')])
def test_bad_input(args, words, shell, model, tmp_path):
    (tmp_path/'mine.onnx').write_text('mine'); (tmp_path/'link.onnx').symlink_to(model); (tmp_path/'folder.onnx').mkdir()
    data = bytearray(model.read_bytes()); data[-9] ^= 1
    (tmp_path/'damaged.safetensors').write_bytes(data)
    before,weights = sorted(os.listdir(tmp_path)),model.read_bytes()
    res = shell(*(o.format(m=model, d=tmp_path) for o in args))
    assert res.code==2 and words in res.err and len(res.err.splitlines())==1 and len(res.err)<=301 and res.err.startswith('reid-export: error: ')
    assert sorted(os.listdir(tmp_path))==before and (tmp_path/'mine.onnx').read_text()=='mine' and model.read_bytes()==weights and len(list(model.parent.iterdir()))==1

def test_data_of_the_run(data, model, tmp_path, monkeypatch):
    "Images are those of the run's dataset if it is at hand, evenly spread; else rendered ones"
    run = tmp_path/'run'
    run.mkdir()
    (run/'model.safetensors').write_bytes(model.read_bytes())
    monkeypatch.setattr(cli_export, '_trained_on', lambda file: str(data))
    seen = {}
    monkeypatch.setattr(cli_export, 'export_net', lambda net, out, images, *a, **kw: seen.update(images=images, **kw) or export_net(net, out, images, *a, **kw))
    reid_export(run/'model.safetensors', int8=True, quiet=True)
    assert (run/'model-int8.onnx').exists() and len(seen['images'])==60
    monkeypatch.setattr(cli_export, '_trained_on', lambda file: str(tmp_path/'gone'))
    reid_export(run/'model.safetensors', quiet=True)
    assert seen['checked_with'].startswith('synthetic-tiny') and len(seen['images'])==7

# ---- the page

def page(n):
    "The `n`th Python block of the how-to"
    text = (Path(__file__).parents[1]/'nbs'/'howto_export.md').read_text(encoding='utf-8')
    return re.findall(r'```python\n(.*?)```', text, re.S)[n]

def test_numpy_example(net, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for o,f in zip(('query.jpg','a.jpg','b.jpg'), files): Path(o).write_bytes(f.read_bytes())
    (exif := Image.Exif())[0x0112] = 6  # a photo of a camera on its side
    Image.open(files[1]).transpose(Image.Transpose.ROTATE_90).save('a.jpg', exif=exif, quality=95)
    x = torch.from_numpy(np.stack([read_image(o, size) for o in ('query.jpg','a.jpg','b.jpg')]))
    export_net(net, 'model.onnx', x, flip=True, normalize=True)
    exec(page(0), space := {})
    want = oracle(net, x, True, True)
    np.testing.assert_allclose(space['query'] @ space['gallery'].T, want[:1] @ want[1:].T, atol=1e-2)  # Pillow may decode at another scale

def test_deep_sort_example(net, images, tmp_path):
    export_net(net, tmp_path/'a.onnx', images, pixels='opencv')
    exec(page(1), space := {})
    enc = space['ImageEncoder'](str(tmp_path/'a.onnx'), 'images', 'features')  # as DeepSORT calls it
    assert tuple(enc.image_shape[:2])==size and enc.feature_dim==192 and enc(np.zeros((0, *size, 3), np.uint8)).shape==(0,192)
    np.testing.assert_allclose(enc(as_taken(images, 'opencv'), batch_size=4), oracle(net, images), atol=1e-4)

@pytest.mark.parametrize('x', [torch.rand(7,3,64,32), torch.zeros(0,3,64,32, dtype=torch.uint8), torch.zeros(3,64,32, dtype=torch.uint8)])
def test_images_of_an_export_are_bytes(x, tmp_path):
    "Floats in [0, 1] would be divided by 255 again, and compared as nearly black images"
    net = build_reid_net('test_resnet', 5, regions=0, pretrained=False).eval()
    with pytest.raises(ValueError, match='needed uint8'): export_net(net, tmp_path/'a.torchscript', x, format='torchscript')
    assert not list(tmp_path.iterdir())

def test_onnx_on_the_chosen_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(ort, 'get_available_providers', lambda: ['CUDAExecutionProvider','CPUExecutionProvider'])
    monkeypatch.setattr(ort, 'InferenceSession', lambda data, opts, providers: seen.extend(providers))
    portable._runner(b'', 'onnx', 'cuda:1')
    assert seen[0]==('CUDAExecutionProvider', {'device_id': 1})
