"""Images a second of an embedder on the CPU, with freed memory kept by the process and with freed memory returned to the system.

    python benchmarks/embedding.py [--arch tf_efficientnet_lite0] [--size 192 96] [--images 512] [--rounds 3] [--threads 2]

Each measurement has a process of its own, because the setting holds for a whole process. The rounds alternate; a figure is the median over the rounds. Weights are random.
"""
import argparse, statistics, subprocess, sys, time

def measure(a):
    "Print the images a second of one measurement"
    import torch
    from reid_fastai.core import keep_freed_memory
    from reid_fastai.data.synthetic import make_synthetic
    from reid_fastai.export import Embedder
    from reid_fastai.models import build_reid_net
    torch.set_num_threads(a.threads)
    if a.measure=='kept': keep_freed_memory()
    embed = Embedder(build_reid_net(a.arch, 751, regions=0, pretrained=False, size=tuple(a.size)).eval().lay_out('cpu'), tuple(a.size))
    files = sorted((make_synthetic(tiny=True)/'bounding_box_train').glob('*.jpg'))
    files = (files*(a.images//len(files)+1))[:a.images]
    embed(files[:64])
    start = time.perf_counter()
    embed(files, flip=True)
    print(a.images/(time.perf_counter()-start))

def main(a):
    import torch
    print(f'torch {torch.__version__}, {a.arch}, {a.size[0]}×{a.size[1]} px, {a.threads} threads, image and mirror image averaged', flush=True)
    speeds = {'returned': [], 'kept': []}
    for _ in range(a.rounds):
        for how,o in speeds.items(): o.append(float(subprocess.run([sys.executable, *sys.argv, '--measure', how], capture_output=True, text=True, check=True).stdout.split()[-1]))
    returned,kept = (statistics.median(o) for o in speeds.values())
    print(f'freed memory returned: {returned:.1f} images/s\nfreed memory kept: {kept:.1f} images/s, {kept/returned:.2f} × (medians of {a.rounds})')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='tf_efficientnet_lite0')
    p.add_argument('--size', type=int, nargs=2, default=(192,96))
    p.add_argument('--images', type=int, default=512)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--measure', choices=('kept','returned'), help=argparse.SUPPRESS)
    a = p.parse_args()
    (measure if a.measure else main)(a)
