"Where the bytes of images lie: on the device, in memory, or nowhere"
from types import SimpleNamespace

import pytest, torch
from PIL import Image

from reid_fastai.data import block, memory
from reid_fastai.data.datasets import read_dataset
from reid_fastai.data.memory import ImageMemory
from reid_fastai.data.synthetic import make_synthetic
from reid_fastai.test_utils import tiny_dls
from pretend_gpu import pretend_gpu

GB,gpu,cpu = 10**9,torch.device('cuda'),torch.device('cpu')

@pytest.mark.parametrize('device,vram,ram,n_train,n,expect', [
    (gpu, 80, 8, 32_621, 126_441, ('all',gpu)), (gpu, 24, 8, 32_621, 126_441, ('train',gpu)), (gpu, 8, 64, 32_621, 126_441, ('all','cpu')),
    (cpu, 0, 8, 32_621, 126_441, ('none',None)), (cpu, 0, 12, 32_621, 126_441, ('train','cpu')), (cpu, 0, 64, 32_621, 126_441, ('all','cpu'))])
def test_msmt17_at_384x128(device, vram, ram, n_train, n, expect, monkeypatch, recwarn):
    monkeypatch.setattr(memory, '_free', lambda: ram*GB)
    monkeypatch.setattr(memory, '_free_on', lambda d: vram*GB)
    assert memory._place(n_train, n, (384,128), device)==(dict(all=n, train=n_train, none=0)[expect[0]], expect[1])
    assert len(recwarn)==(expect[0]!='all')

def test_processes_on_one_machine_share_its_memory(monkeypatch):
    "Each of 4 has a quarter of it; a GPU belongs to one process"
    monkeypatch.setattr(memory, 'free_memory', lambda: 64*GB)
    assert memory._place(32_621, 126_441, (384,128), cpu)==(126_441,'cpu')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    with pytest.warns(UserWarning, match='need 18.6 GB; images may use half of the 16.0 GB that are free for each of 4 processes: training images'):
        assert memory._place(32_621, 126_441, (384,128), cpu)==(32_621,'cpu')
    with pytest.raises(ValueError, match='takes 18.6 GB, and 16 GB are free for each of 4 processes. Images of about'): memory._check_memory('in_memory=True', 126_441, (384,128), 3, 'or not')
    monkeypatch.setattr(memory, '_free_on', lambda d: 80*GB)
    assert memory._place(32_621, 126_441, (384,128), gpu)==(126_441,gpu)

def paths(n=6):
    s = read_dataset(make_synthetic(tiny=True))
    return [str(s.root/o) for o in s.train.path[:n]]

def test_bytes_on_a_device(monkeypatch):
    "Gathered there, and the same as in memory"
    ps = paths()
    here = ImageMemory(ps, (64,32))
    with pretend_gpu(monkeypatch):
        there = ImageMemory(ps, (64,32), n_threads=1, device='cuda')
        assert there.x.device.type=='cuda'
        batch = there.x[there.rows(ps[3:0:-1])]
        assert batch.device.type=='cuda' and torch.equal(batch.cpu(), here.x[[3,2,1]])
    assert ps[0] in here and 'elsewhere' not in here

def test_training_images_alone_are_kept(monkeypatch):
    "The batches are those of all images in memory, and of none"
    def batches(dl): return [b[0].as_subclass(torch.Tensor) for b in dl]
    whole = tiny_dls(batch_tfms=[])
    n = len(whole.train_ds)
    monkeypatch.setattr(block, '_place', lambda *a: (n, 'cpu'))
    part = tiny_dls(batch_tfms=[])
    assert part.train.fake_l.num_workers==0<part.valid.fake_l.num_workers and part.train._columns() is not None and part.valid._columns() is None
    part.valid.fake_l.num_workers = 0  # quicker here
    for a,b in zip((whole.train,whole.valid), (part.train,part.valid)):
        assert all(torch.equal(x, y) for x,y in zip(batches(a), batches(b), strict=True))

def test_loader_processes_do_not_read_a_gpu(monkeypatch, tmp_path):
    "CUDA cannot be used in a forked process"
    Image.new('RGB', (8,8)).save(tmp_path/'a.png')
    mem = ImageMemory([str(tmp_path/'a.png')], (32,32))
    assert mem.rows([str(tmp_path/'a.png')]).tolist()==[0]
    monkeypatch.setattr(memory, 'get_worker_info', lambda: True)
    assert mem.rows([str(tmp_path/'a.png')]).tolist()==[0]
    mem.x = SimpleNamespace(device=torch.device('cuda'))
    assert mem.rows([str(tmp_path/'a.png')]) is None

@pytest.mark.parametrize('gpu,backend', [(True,'cpu:gloo,cuda:nccl'), (False,'gloo')])
def test_processes_exchange_tensors_of_cpu_and_gpu(gpu, backend, monkeypatch):
    "Beside a GPU, PyTorch would choose NCCL alone, which refuses tensors of the CPU"
    import reid_fastai.distributed as d
    seen = []
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(d.dist, 'is_nccl_available', lambda: True)
    monkeypatch.setattr(d.dist, 'rendezvous', lambda url: iter([(None, 0, 2)]))
    monkeypatch.setattr(d, '_one_start', lambda *args: None)
    monkeypatch.setattr(d.dist, 'init_process_group', lambda backend, **kw: seen.append(backend))
    monkeypatch.setattr(d.dist, 'all_reduce', lambda x: seen.append(x.device.type))
    d._join()
    assert seen==[backend,'cpu']
