"""Images a second of an exported network beside PyTorch, with random weights.

    python benchmarks/export.py [--arch tf_efficientnet_lite0] [--size 256 128] [--bs 1 32] [--rounds 7] [--threads 2]

The rounds alternate, so that a change of the machine's load meets all of them; a figure is the median over the rounds, and a ratio is that of the medians.
PyTorch computes as `load_embedder` does: channels last, without gradients. Images are bytes for all.
"""
import argparse, os, statistics, tempfile, time
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--arch', default='tf_efficientnet_lite0')
p.add_argument('--size', type=int, nargs=2, default=(256,128))
p.add_argument('--bs', type=int, nargs='+', default=(1,32))
p.add_argument('--rounds', type=int, default=7)
p.add_argument('--images', type=int, default=64, help='in a round, of each')
p.add_argument('--threads', type=int, default=2)
args = p.parse_args()
os.environ['OMP_NUM_THREADS'] = str(args.threads)

import numpy as np, onnxruntime, torch  # noqa: E402
from PIL import Image  # noqa: E402

from reid_fastai.core import keep_freed_memory  # noqa: E402
from reid_fastai.data.synthetic import make_synthetic  # noqa: E402
from reid_fastai.models import build_reid_net  # noqa: E402
from reid_fastai.portable import Portable, export_net  # noqa: E402

keep_freed_memory()
torch.set_num_threads(args.threads)
torch.manual_seed(42)
net = build_reid_net(args.arch, 751, regions=0, pretrained=False, size=tuple(args.size)).eval().lay_out('cpu')
files = sorted((make_synthetic(tiny=True)/'bounding_box_train').glob('*.jpg'))
images = torch.from_numpy(np.stack([np.asarray(Image.open(o).convert('RGB').resize(args.size[::-1])).transpose(2, 0, 1) for o in files]))

@torch.no_grad()
def pytorch(x): return net(x/255)

with tempfile.TemporaryDirectory() as d:
    info = {o: export_net(net, Path(d)/f'{o}.onnx', images, int8=o=='int8') for o in ('fp32','int8')}
    runs = dict(PyTorch=pytorch, **{f'ONNX {o}': Portable(Path(d)/f'{o}.onnx') for o in info})
    sizes = {f'ONNX {o}': (Path(d)/f'{o}.onnx').stat().st_size/1e6 for o in info}

print(f'{args.arch}, {args.size[0]}×{args.size[1]}, {args.threads} threads; PyTorch {torch.__version__}, onnxruntime {onnxruntime.__version__}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores')
print(f"largest difference of fp32 {info['fp32']['difference']:.1e}, cosine of int8 {info['int8']['cosine']:.4f}\n")
print('| | images at a time | images a second | × PyTorch | MB |\n|---|---|---|---|---|')
for bs in args.bs:
    secs,x = {k: [] for k in runs},images[torch.arange(bs)%len(images)]
    for f in runs.values(): f(x)
    for _ in range(args.rounds):
        for k,f in runs.items():
            t,n = time.perf_counter(),max(1, args.images//bs)
            for _ in range(n): f(x)
            secs[k].append((time.perf_counter()-t)/n/bs)
    med = {k: statistics.median(v) for k,v in secs.items()}
    for k,v in med.items(): print(f"| {k} | {bs} | {1/v:.1f} | {med['PyTorch']/v:.2f} | {f'{sizes[k]:.1f}' if k in sizes else ''} |")
print(f'\nload {os.getloadavg()[0]:.1f} at the end')
