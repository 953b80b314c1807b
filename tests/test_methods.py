"Published networks: sizes as stated, start values, every shape, and the life of any other network"
import copy, math

import numpy as np
import pytest
import timm
import torch
from fastai.torch_core import TensorImage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reid_fastai.models.weights as weights
from reid_fastai.callback.all import AdaptiveL2
from reid_fastai.export import load_model, save_model
from reid_fastai.interpret import activation_maps
from reid_fastai.learner import reid_learner
from reid_fastai.losses import ReIDLoss
from reid_fastai.models import (BilinearAttention, PublishedRecipe, RelationAttention, ReIDNet, ReIDOutput, SpatialInteraction, build_reid_net,
                                interaction_aggregation, methods, register_method, reid_splitter, resolve_arch)
from reid_fastai.test_utils import tiny_dls

small = (64,32)
names = ['osnet_x1_0','osnet_x0_75','osnet_x0_5','osnet_x0_25','osnet_ibn_x1_0','osnet_ain_x1_0','rga_sc_resnet50','ianet_resnet50','bat_net']
kinds = ['osnet_x0_25','osnet_ibn_x1_0','osnet_ain_x1_0','rga_sc_resnet50','ianet_resnet50','bat_net']  # one of each build

@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv('REID_FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(weights, '_answers', lambda url: False)

def build(name, n_classes=6, size=small): return build_reid_net(name, n_classes, pretrained=False, size=size)
def images(n=4, size=small): return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0))
def count(m): return sum(p.numel() for p in m.parameters())

def test_names():
    assert set(names)==set(methods) and [resolve_arch(n) for n in names]==names
    with pytest.raises(ValueError, match="Similar names: .*'osnet_x1_0'"): resolve_arch('osnet_x10')

# --- as published

@pytest.mark.parametrize('name,n', [('osnet_x1_0',2_554_771), ('osnet_x0_75',1_671_017), ('osnet_x0_5',1_015_297), ('osnet_x0_25',587_127),
    ('osnet_ibn_x1_0',2_170_532+512*751+751), ('osnet_ain_x1_0',2_169_508+512*751+751), ('rga_sc_resnet50',31_364_272), ('ianet_resnet50',25_057_071), ('bat_net',31_389_852)])
def test_parameters(name, n):
    net = build_reid_net(name, 751, pretrained=False)
    assert count(net)==n and net.arch==name and net.n_classes==751

def test_attention_parameters():
    net = build_reid_net('rga_sc_resnet50', 751, pretrained=False)
    assert sum(count(m) for n,m in net.named_modules() if n.split('.')[-1].startswith('attention'))==6_314_096
    net = build('ianet_resnet50', 751)
    assert count(net.trunk.interaction2)+count(net.trunk.interaction3)==6144
    assert count(build('bat_net').trunk.attention)==463_770

@pytest.mark.parametrize('name,mmacs', [('osnet_x1_0',978.9), ('osnet_x0_75',571.8), ('osnet_x0_5',272.9), ('osnet_x0_25',82.3)])
def test_multiply_adds(name, mmacs):
    net = build_reid_net(name, 751, pretrained=False).eval()
    with torch.no_grad(),FlopCounterMode(display=False) as f: net(images(1, (256,128)))
    assert f.get_total_flops()/2e6==pytest.approx(mmacs, rel=1e-3)

def test_osnet_starts_as_published():
    net = build('osnet_x1_0', 751)
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel()>5000:
            assert m.weight.std().item()==pytest.approx(math.sqrt(2/(m.out_channels*m.kernel_size[0]**2)), rel=.05)
        if isinstance(m, (nn.Conv2d,nn.Linear)) and m.bias is not None: assert not m.bias.any()
    for m in (net.heads[0].fc, net.heads[0].classifier): assert m.weight.std().item()==pytest.approx(.01, rel=.02)

def test_ianet_starts_as_its_backbone():
    "Without its blocks the network computes the same"
    net = build('ianet_resnet50').eval()
    x = images(2)
    with torch.no_grad():
        bare = copy.deepcopy(net)
        bare.trunk = nn.Sequential(*(o for n,o in net.trunk.named_children() if 'interaction' not in n))
        assert torch.equal(net(x), bare(x))
        for n in ('interaction2','interaction3'):
            nn.init.ones_(getattr(net.trunk, n)[0].norm.weight)
            assert not torch.allclose(net(x), bare(x))
            nn.init.zeros_(getattr(net.trunk, n)[0].norm.weight)

def test_rga_head_keeps_its_bias_at_zero():
    "Whatever the optimizer, after freezing and unfreezing"
    learn = reid_learner(tiny_dls(), 'rga_sc_resnet50', pretrained=False, cbs=AdaptiveL2())
    head = learn.model.heads[0]
    assert head.classifier.weight.std().item()==pytest.approx(1e-3, rel=.1)
    learn.freeze(); learn.unfreeze()
    learn.opt.set_hyper('lr', 1e-2)
    was = head.neck.weight.clone()
    sum(o.square().sum() for o in head.train()(torch.rand(4, 2048))).backward()
    learn.opt.step()
    assert not head.neck.bias.any() and not head.neck.bias.requires_grad and not torch.equal(head.neck.weight, was)

def test_rga_computes_no_matrix_of_relations():
    "The products take n²d/16 multiply-adds in the order that is used, n²d/8 + n³/4 with the matrix"
    n,d = 2048,128
    att = RelationAttention(d, n).eval()
    with FlopCounterMode(display=False) as count,torch.no_grad(): att(torch.rand(1, d, n, 1))
    found = count.flop_counts['Global']
    assert sum(found[o] for o in (torch.ops.aten.mm,torch.ops.aten.bmm))/2==n*n*d/16

def test_rga_embedding_is_before_the_norm_in_training_alone():
    head = build('rga_sc_resnet50').heads[0]
    nn.init.constant_(head.neck.weight, 3.)
    fmap = torch.rand(4, 2048, 2, 1)
    torch.testing.assert_close(head.train().embed(fmap), fmap.mean((2,3)))
    torch.testing.assert_close(head.eval().embed(fmap), 3*fmap.mean((2,3))/(1+1e-5)**.5)

def test_relations_are_rows_and_columns():
    "θ and φ are told apart, and the order of nodes does not matter to what each node's relations sum to"
    torch.manual_seed(0)
    att = RelationAttention(16, 8, ratio=2).eval()
    x = torch.rand(1, 16, 8, 1)
    other = copy.deepcopy(att)
    other.theta,other.phi = att.phi,att.theta
    w = other.relations[0].weight
    with torch.no_grad():
        assert not torch.allclose(att(x), other(x))
        w.copy_(torch.cat([w[:,8:], w[:,:8]], 1))  # what was a row is a column now
        torch.testing.assert_close(att(x), other(x))

def test_spatial_interaction_prefers_near_places():
    "Of two places that look alike the nearer one counts more"
    att = SpatialInteraction(4, 1., 1.).double()
    x = torch.zeros(1, 4, 9, 1, dtype=torch.float64)
    x[0,0,3],x[0,0,8] = 20.,20.
    x[0,1,3] = x[0,2,8] = 1e-3  # marks that change the likeness little
    y = att._aggregate(x)[0,:,2]
    assert y[1]>y[2]

def test_bilinear_attention_by_hand():
    att = BilinearAttention(48).eval()
    x = torch.rand(1, 48, 2, 2)
    with torch.no_grad():
        y = att.reduce(x)
        outer = torch.einsum('bihw,bjhw->bijhw', y, y)
        tri = torch.stack([outer[:,j+d,j] for d in range(3) for j in range(3-d)], 1)
        want = x*(att.local(tri)*att.total(tri.mean((2,3), keepdim=True))).sigmoid()
        torch.testing.assert_close(att(x), want)

# --- shapes

@pytest.mark.parametrize('size', [(256,128),(384,128),(128,64)])
@pytest.mark.parametrize('name', kinds)
def test_shapes(name, size):
    net = build(name, size=size).eval()
    with torch.no_grad(): emb = net(images(1, size))
    want = {'rga_sc_resnet50': 2048, 'ianet_resnet50': 2048, 'bat_net': 1024}.get(name, 512)
    assert emb.shape==(1,want) and net.n_features==want and emb.isfinite().all()

@pytest.mark.parametrize('name', kinds)
def test_training_output(name):
    net = build(name).train()
    out = net(TensorImage(images()))
    k = 2 if name=='bat_net' else 1
    assert type(out) is ReIDOutput and len(out.embeddings)==len(out.logits)==len(net.heads)==k
    assert all(type(o) is torch.Tensor for l in out for o in l)
    assert sum(o.shape[1] for o in out.embeddings)==net.n_features and all(o.shape==(4,6) for o in out.logits)
    ReIDLoss()(out, torch.tensor([0,0,1,1])).backward()
    fixed = {'heads.0.neck.bias'} if 'rga' in name else set()
    assert {n for n,p in net.named_parameters() if p.grad is None}==fixed
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)

@pytest.mark.parametrize('name', [n for n in kinds if 'rga' not in n])
def test_odd_sizes(name):
    with torch.no_grad(): assert build(name).eval()(images(1, (101,47))).isfinite().all()

def test_rga_is_of_one_size():
    net = build('rga_sc_resnet50', size=(101,47)).eval()
    with torch.no_grad(): assert net(images(1, (101,47))).shape==(1,2048)
    for other in ((128,64),(47,101),(102,47)):
        with pytest.raises(ValueError, match=rf'Images of {other[0]}×{other[1]} px .*built for 101×47 px only.*position of the map'): net(images(1, other))
    assert build('rga_sc_resnet50', size=None).size==(256,128)

@pytest.mark.parametrize('size', [256,(256,),(256.,128.),(8,8),'256x128'])
def test_bad_size(size):
    with pytest.raises(ValueError, match='pass .height, width. in pixels'): build('rga_sc_resnet50', size=size)

# --- life of a network

@pytest.mark.parametrize('name', kinds)
def test_splitter(name):
    net = build(name)
    backbone,head = reid_splitter(net)
    fixed = [net.heads[0].neck.bias] if 'rga' in name else []
    assert sorted(map(id, backbone+head+fixed))==sorted(map(id, net.parameters()))
    assert {id(p) for p in head+fixed}=={id(p) for p in net.heads.parameters()}

@pytest.mark.parametrize('name', kinds)
def test_trains(name, tmp_path):
    "A frozen epoch, one of the whole network, a picture, a file and back"
    learn = reid_learner(tiny_dls(steps=1, n_pids=2, n_imgs=2), name, pretrained=False, cbs=AdaptiveL2(), flip=False)
    learn.freeze()
    conv,cls = next(p for p in learn.model.trunk.parameters() if p.ndim==4),learn.model.heads[0].classifier.weight
    was = conv.clone(),cls.clone()
    with learn.no_bar(),learn.no_logging():
        with learn.removed_cbs(learn.retrieval_metrics): learn.fit(1, 1e-3)
        assert torch.equal(conv, was[0]) and not torch.equal(cls, was[1])
        learn.unfreeze()
        learn.fit_one_cycle(1, 1e-3)
    assert not torch.equal(conv, was[0])
    assert math.isfinite(learn.recorder.values[-1][0]) and learn.retrieval_metrics.results.mAP>0
    net,x = learn.model.eval(),images(2)
    maps = activation_maps(net, x)
    assert maps.shape==(2,*small) and maps.isfinite().all()
    back = load_model(save_model(net, tmp_path/'m.safetensors', small))
    assert back.arch==name
    with torch.no_grad(): torch.testing.assert_close(back(x), net(x))

@pytest.mark.parametrize('name', kinds)
def test_exports(name):
    "In the default mode of `torch.export`, for batches of any size"
    net = build(name).eval()
    x = images(2)
    prog = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('b', min=1, max=64)},))
    with torch.no_grad():
        for n in (2, 5): torch.testing.assert_close(prog.module()(images(n)), net(images(n)), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('name', kinds)
def test_bf16(name):
    "Under autocast, and as a half-precision network"
    net = build(name).train()
    with torch.autocast('cpu', torch.bfloat16): out = net(images())
    assert all(o.dtype==torch.float32 and o.isfinite().all() for o in out.embeddings+out.logits)
    ReIDLoss()(out, torch.tensor([0,0,1,1])).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    assert net.eval().bfloat16()(images().bfloat16()).isfinite().all()

def test_large_values_in_half_precision():
    "Sums over channels exceed what float16 holds; the blocks of IANet compute them in float32"
    block = interaction_aggregation(8, 5, 10)
    for o in block: nn.init.ones_(o.norm.weight)
    x = 100*torch.rand(2, 8, 16, 8)
    with torch.autocast('cpu', torch.float16): assert block(x.half()).isfinite().all()
    assert block.half()(x.half()).isfinite().all()


# --- weights

def _renamed_back(net):
    "Arrays of an OSNet under torchreid's names, as one would write them down for its blocks"
    sd,lite = {},{'0':'conv1', '1':'conv2', '2':'bn'}
    for k,v in net.state_dict().items():
        part = k.split('.')
        if part[0]=='heads':
            new = {'fc': 'fc.0', 'norm': 'fc.1', 'classifier': 'classifier'}[part[2]]
            sd[f'{new}.{part[3]}'] = v
        elif part[0] in ('trunk','global_stage'):
            stage,*i = part[1].split('_')
            rest,cn = part[2:],{'0':'conv', '1':'bn'}
            if not i: new = f'{stage}.{cn[rest[0]]}.{rest[1]}'
            elif i==['2']: new = f'{stage}.2.0.{cn[rest[1]]}.{rest[2]}'
            elif rest[0]=='streams': new = f"{stage}.{i[0]}.conv2{'abcd'[int(rest[1])]}.{rest[2]+'.' if rest[1]!='0' else ''}{lite[rest[3]]}.{rest[4]}"
            elif rest[0]=='gate': new = f"{stage}.{i[0]}.gate.{ {'1':'fc1', '3':'fc2'}[rest[1]]}.{rest[2]}"
            else: new = f"{stage}.{i[0]}.{dict(reduce='conv1', restore='conv3', shortcut='downsample')[rest[0]]}.{cn[rest[1]]}.{rest[2]}"
            sd[new] = v
    return sd

def test_checkpoint_of_torchreid(tmp_path):
    "With the prefix of `DataParallel`, and an accuracy that is a number of NumPy's"
    ref = build('osnet_x0_25', 10)
    theirs = _renamed_back(ref)
    assert {'conv2.0.conv2a.conv1.weight','conv3.1.conv2d.3.bn.running_var','conv2.2.0.conv.weight','conv4.0.downsample.bn.weight','fc.1.bias'}<=theirs.keys()
    torch.save(dict(state_dict={f'module.{k}': v for k,v in theirs.items()}, epoch=3, rank1=np.float32(.9), mAP=np.float64(.8)), tmp_path/'model.pth.tar-3')
    same,other = (build_reid_net('osnet_x0_25', n, pretrained=tmp_path/'model.pth.tar-3') for n in (10,6))
    assert all(torch.equal(v, same.state_dict()[k]) for k,v in ref.state_dict().items())
    bad = [k for k,v in ref.state_dict().items() if 'classifier' not in k and not torch.equal(v, other.state_dict()[k])]
    assert not bad and other.heads[0].classifier.weight.shape==(6,512)

@pytest.mark.parametrize('change', [lambda sd: sd.pop('conv3.0.gate.fc1.bias'), lambda sd: sd.update({'conv5.conv.weight': torch.zeros(1)}), lambda sd: sd.update({'conv5.more': torch.zeros(1)})])
def test_checkpoint_that_does_not_fit(change, tmp_path):
    sd = _renamed_back(build('osnet_x0_25', 10))
    change(sd)
    torch.save(sd, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='are not those of osnet_x0_25'): build_reid_net('osnet_x0_25', 10, pretrained=tmp_path/'w.pth')

@pytest.mark.parametrize('name', ['rga_sc_resnet50','ianet_resnet50'])
def test_imagenet_weights_of_the_backbone(name, tmp_path):
    ref = timm.create_model('resnet50')
    for p in (tmp_path/'w.pth', tmp_path/'home/weights/resnet50.tv_in1k.pth'):
        p.parent.mkdir(parents=True, exist_ok=True)
        torch.save(ref.state_dict(), p)
    for pretrained in (tmp_path/'w.pth', True):
        net = build_reid_net(name, 6, pretrained=pretrained, size=small)
        assert torch.equal(net.trunk.layer3_5.conv2.weight, ref.layer3[5].conv2.weight) and torch.equal(net.global_stage.layer4_2.bn3.weight, ref.layer4[2].bn3.weight)

def test_checkpoint_of_microsoft(tmp_path):
    ref = build('rga_sc_resnet50', 6)
    inner = {'theta': 'theta_{}', 'phi': 'phi_{}', 'g': 'gx_{}', 'relations': 'gg_{}'}
    def theirs(k):
        part = k.split('.')
        if part[0]=='heads': return {'neck': 'feat_bn', 'classifier': 'cls'}[part[2]]+'.'+part[3]
        if not part[1].startswith('attention'): return 'backbone.'+'.'.join([part[1].replace('_', '.'), *part[2:]])
        kind = f"backbone.rga_att{part[1][-1]}.{inner.get(part[3], 'W_{}').format(part[2])}"
        return f'{kind}.{int(part[4])*3+int(part[5])}.{part[6]}' if part[3]=='weigh' else f"{kind}.{'.'.join(part[4:])}"
    sd = {theirs(k): torch.rand_like(v) if v.is_floating_point() else v for k,v in ref.state_dict().items() if k not in ('mean','std')}
    assert {'backbone.rga_att1.W_spatial.3.weight','backbone.rga_att4.gg_channel.1.running_var','backbone.layer4.0.downsample.0.weight','backbone.conv1.weight'}<=sd.keys()
    torch.save(dict(state_dict=sd, epoch=600, best_top1=0.), tmp_path/'w.pth')
    got = build_reid_net('rga_sc_resnet50', 6, pretrained=tmp_path/'w.pth', size=small).state_dict()
    assert all(torch.equal(got[k], sd[theirs(k)]) for k in got if k not in ('mean','std'))

@pytest.mark.parametrize('name', ['osnet_x0_25','bat_net'])
def test_no_weights(name, tmp_path):
    with pytest.raises(ValueError, match=f'No pretrained weights for {name}.*pretrained=False') as e: build_reid_net(name, 6)
    assert str(tmp_path/'home/weights'/f'{name}.pth') in str(e.value) and len(str(e.value))<=400

# --- the register

def test_a_method_of_ones_own():
    def build_it(n_classes, pretrained, size): return ReIDNet(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1)), nn.Sequential(nn.ReLU()), 8, n_classes, 0, arch='my_method')
    register_method('my_method', build_it)
    try: assert build_reid_net('my_method', 6).eval()(images(2)).shape==(2,8) and methods['my_method'].recipe is None
    finally: del methods['my_method']

def test_every_method_has_its_published_settings():
    for o in methods.values():
        r = o.recipe
        assert isinstance(r, PublishedRecipe) and r.source and r.frozen_epochs<r.epochs and all(0<m<r.epochs for m in r.milestones)
        assert (r.triplet is None)==(r.margin is None) and (r.schedule=='cosine')==(not r.milestones)

def test_published_augmentation_has_no_idle_transform():
    "A shift by 0 pixels took longer than the mirror"
    from reid_fastai.published import find_recipe, published_augs
    assert {type(o).__name__ for o in published_augs(find_recipe('osnet_x1_0'))}=={'MirrorEach'}
    assert {type(o).__name__ for o in published_augs(find_recipe('rga_sc_resnet50'))}=={'MirrorEach','EraseEach'}
