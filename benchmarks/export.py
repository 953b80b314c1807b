"""Images a second of an exported network beside PyTorch, with random weights.

    python benchmarks/export.py [--arch tf_efficientnet_lite0] [--size 256 128] [--bs 1 32] [--rounds 7] [--threads 2]

The rounds alternate, so that a change of the machine's load meets all of them; a figure is the median over the rounds, and a ratio is that of the medians.
PyTorch computes as `load_embedder` does: channels last, without gradients. Images are bytes for all.
"""
import argparse, os, statistics, tempfile, time
from pathlib import Path

def main(a):
    os.environ['OMP_NUM_THREADS'] = str(a.threads)  # read by the libraries below when they are imported
    import numpy as np, onnxruntime, torch
    from PIL import Image
    from reid_fastai.core import keep_freed_memory
    from reid_fastai.data.synthetic import make_synthetic
    from reid_fastai.models import build_reid_net
    from reid_fastai.portable import Portable, export_net
    keep_freed_memory()
    torch.set_num_threads(a.threads)
    torch.manual_seed(42)
    net = build_reid_net(a.arch, 751, regions=0, pretrained=False, size=tuple(a.size)).eval().lay_out('cpu')
    files = sorted((make_synthetic(tiny=True)/'bounding_box_train').glob('*.jpg'))
    images = torch.from_numpy(np.stack([np.asarray(Image.open(o).convert('RGB').resize(a.size[::-1])).transpose(2, 0, 1) for o in files]))
    with tempfile.TemporaryDirectory() as d:
        info = {o: export_net(net, Path(d)/f'{o}.onnx', images, int8=o=='int8') for o in ('fp32','int8')}
        runs = dict(PyTorch=torch.no_grad()(lambda x: net(x/255)), **{f'ONNX {o}': Portable(Path(d)/f'{o}.onnx') for o in info})
        sizes = {f'ONNX {o}': (Path(d)/f'{o}.onnx').stat().st_size/1e6 for o in info}
    print(f'{a.arch}, {a.size[0]}×{a.size[1]}, {a.threads} threads; PyTorch {torch.__version__}, onnxruntime {onnxruntime.__version__}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores')
    print(f"largest difference of fp32 {info['fp32']['difference']:.1e}, cosine of int8 {info['int8']['cosine']:.4f}\n")
    print('| | images at a time | images a second | × PyTorch | MB |\n|---|---|---|---|---|')
    for bs in a.bs: compare(bs, images[torch.arange(bs)%len(images)], runs, sizes, a)
    print(f'\nload {os.getloadavg()[0]:.1f} at the end')

def compare(bs, x, runs, sizes, a):
    "Print the images a second of each of `runs` with the batch `x`"
    secs,n = {k: [] for k in runs},max(1, a.images//bs)
    for f in runs.values(): f(x)
    for _ in range(a.rounds):
        for k,f in runs.items():
            t = time.perf_counter()
            for _ in range(n): f(x)
            secs[k].append((time.perf_counter()-t)/n/bs)
    med = {k: statistics.median(v) for k,v in secs.items()}
    for k,v in med.items(): print(f"| {k} | {bs} | {1/v:.1f} | {med['PyTorch']/v:.2f} | {f'{sizes[k]:.1f}' if k in sizes else ''} |")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='tf_efficientnet_lite0')
    p.add_argument('--size', type=int, nargs=2, default=(256,128))
    p.add_argument('--bs', type=int, nargs='+', default=(1,32))
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--images', type=int, default=64, help='in a round, of each')
    p.add_argument('--threads', type=int, default=2)
    main(p.parse_args())
