"A device that is not there: its tensors compute on the CPU and keep to the rules of a GPU, so that code for one is tested without one."
from contextlib import contextmanager

import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

class GpuTensor(torch.Tensor):
    "Says it is on a GPU, and holds a tensor on the CPU"
    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device='cuda:0')
    def __init__(self, data): self.data_ = data
    def __repr__(self): return f'GpuTensor({self.data_})'
    def tolist(self): return self.data_.tolist()
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

def _run(func, args, kwargs):
    "An operation: refused where devices mix, computed on the CPU, its result where a GPU would leave it"
    name,device = func._schema.name.split('::')[1],kwargs.get('device')
    tensors = [o for o in tree_leaves((args, kwargs)) if isinstance(o, torch.Tensor)]
    here = {id(o.data_): o for o in tensors if isinstance(o, GpuTensor)}
    foreign = any(o.dim() and not isinstance(o, GpuTensor) for o in tensors)
    may_mix = name in ('copy_', '_to_copy') or (name.startswith('index') and isinstance(args[0], GpuTensor))  # a GPU takes indices from the CPU
    if here and foreign and not may_mix: raise RuntimeError(f'{name}: tensors on different devices')
    to_gpu = bool(here) if device is None else torch.device(device).type=='cuda'
    args,kwargs = tree_map(lambda o: o.data_ if isinstance(o, GpuTensor) else o, (args, kwargs))
    res = func(*args, **(kwargs if device is None else {**kwargs, 'device':'cpu'}))
    def place(o):
        if not (to_gpu and isinstance(o, torch.Tensor)): return o
        return here[id(o)] if id(o) in here else GpuTensor(o)  # an operation in place returns its own tensor
    return tree_map(place, res)

class _Placing(TorchDispatchMode):
    "Factories with `device='cuda'` too"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

@contextmanager
def pretend_gpu(monkeypatch):
    "Within it there is a GPU, so it seems"
    if not hasattr(torch._C, '_ensureCUDADeviceGuardSet'): pytest.skip(f'torch {torch.__version__} cannot pretend a device')
    monkeypatch.setattr(torch.cuda, '_lazy_init', lambda: None)
    torch._C._ensureCUDADeviceGuardSet()
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device='cuda')` is to come by here
    try:
        with _Placing(): yield GpuTensor
    finally: torch._C._set_only_lift_cpu_tensors(lifted)
