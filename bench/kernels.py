"""How fast are the kernels of masking and clustering? On a CPU the window search and k-means; with `--gpu` the Triton kernels.

    python bench/kernels.py [--out results/race-kernels.json]
    python bench/kernels.py --gpu [--out results/race-kernels-gpu.json]

On a CPU, sides alternating in one run, medians of `--blocks`. The clock is the wall's: run it on a quiet machine (four minutes on
two cores), or with `--cpu --threads 1` on a busy one, to count CPU seconds.

- the hottest window of a map: `best_windows` against the convolution with w x w ones of the published code. Goal: 10 times.
- spherical k-means against faiss-cpu, from the same features, with the same number of iterations, all features used and the final
  assignment included on both sides. Goal: a ratio of 1/1.3 = .77. Twice: features without clusters and with.
- what share of a scan is not the encoder's forward pass.

On a GPU every result is checked first, against float64. Then `masked_views` and `recluster_vote` race eager PyTorch and
`torch.compile` of the same lines. `floor_share` is the least time that the card needs over the time measured: the bytes that must
move over the bandwidth of a large copy, or FLOPs over the rate of a large product, measured on the card in the same run. Last the
share of a scan, kernels against eager, for ResNet-18 and ViT-B in bfloat16.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bdnb.core import BdnbError, limit_threads, rng, stamp, write_json
from bdnb.kernels import cam
from bdnb.kernels.cam import best_windows, masked_views, recluster_vote
from bdnb.kernels.kmeans import spherical_kmeans

MEAN, STD = (.485, .456, .406), (.229, .224, .225)
NETS = dict(resnet18=512, vit_b_16=768)
now = time.perf_counter               # `--cpu`: time.process_time


def race(blocks, measure, **sides):
    "Median milliseconds of each side, sides alternating, after one round unmeasured."
    taken = {k: [] for k in sides}
    for block in range(blocks + 1):
        for k, side in sides.items():
            ms = measure(side)
            if block: taken[k].append(ms)
    return {k: statistics.median(v) for k, v in taken.items()}


def clock(side):
    "Milliseconds of one call."
    start = now()
    side()
    return (now() - start)*1e3


def on_gpu(side, repeats=10):
    "Milliseconds by the card's own clock, several calls in a row; it idles 10 ms first, so that they are queued when they begin."
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)     # cycles
    start.record()
    for _ in range(repeats): side()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)/repeats


def row(what, size, ours, peer, t_ours, t_peer, unit='ms', **more):
    scale = 1e3 if unit == 's' else 1
    r = dict(what=what, size=size, ours=ours, peer=peer, ours_value=t_ours/scale, peer_value=t_peer/scale, unit=unit,
             ratio=t_peer/t_ours, **more)
    text = '{what}, {size}: {ours_value:.3f} {unit} against {peer_value:.3f} of {peer}: {ratio:.2f} times'
    print(text.format(**r), file=sys.stderr)
    return r


def scene(B, M, side, w=60, device='cpu'):
    "Pictures, and windows at random places as masks."
    g = rng('bench', 'scene')
    images = (torch.rand(B, 3, side, side, generator=g)*255.99).to(torch.uint8)
    masks, at = torch.zeros(M, side, side, dtype=torch.bool), torch.randint(side - w + 1, (M, 2), generator=g)
    for m, (r, q) in enumerate(at.tolist()): masks[m, r:r + w, q:q + w] = True
    return images.to(device), masks.to(device)


def directions(N, d, K, spread, device='cpu'):
    "Features: N noisy copies of K directions (spread: noise over signal; None: noise only), and K centroids."
    g = rng('bench', 'directions', spread)
    c = F.normalize(torch.randn(K, d, generator=g), dim=1)
    z = torch.randn(N, d, generator=g)
    if spread is not None: z = z*spread/d**.5 + c[torch.randint(K, (N,), generator=g)]
    return z.to(device), c.to(device)


# ---- on a CPU

def race_windows(o):
    rows = []
    for B, side, w in ((64, 224, 60), (1, 224, 60), (256, 64, 17)):
        heat, ones = torch.rand(B, side, side, generator=rng('heat')), torch.ones(1, 1, w, w)
        by_conv = lambda: F.conv2d(heat[:, None], ones).flatten(1).max(1)
        if not torch.allclose(best_windows(heat, w)[2], by_conv()[0], rtol=1e-4): raise BdnbError('the window searches disagree')
        t = race(o.blocks, clock, ours=lambda: best_windows(heat, w), conv=by_conv)
        size = f'{B} maps of {side} px, window {w}'
        rows.append(row('window search', size, 'best_windows', f'conv2d with {w} x {w} ones', t['ours'], t['conv'],
                        goal=10 if w == 60 else None))
    return rows


def race_kmeans(o):
    try: import faiss
    except ImportError: raise BdnbError('the race of k-means needs faiss: pip install faiss-cpu') from None
    faiss.omp_set_num_threads(o.threads)
    rows = []
    for what, spread in (('without clusters', None), ('with clusters', 2.)):
        z, _ = directions(o.n, o.d, o.k, spread)
        unit, last = F.normalize(z, dim=1).numpy(), {}

        def ours(): last['ours'] = spherical_kmeans(z, o.k, iterations=o.iterations)

        def theirs():
            km = faiss.Kmeans(o.d, o.k, niter=o.iterations, nredo=1, spherical=True, seed=1, max_points_per_centroid=2**30)
            km.train(unit)
            last['faiss'] = km.index.search(unit, 1)[0].mean()
        t = race(max(1, o.blocks//2), clock, ours=ours, faiss=theirs)
        size = f'N={o.n:,}, d={o.d}, K={o.k}, {len(last["ours"].inertia) - 1} of {o.iterations} iterations, features {what}'
        rows.append(row('k-means', size, 'spherical_kmeans', 'faiss-cpu', t['ours'], t['faiss'], 's', goal=1/1.3,
                        cosine=float(last['ours'].similarity.mean()), peer_cosine=float(last['faiss'])))
    return rows


@torch.no_grad()
def cpu_share(o):
    "Forward pass, views and votes of a few pictures."
    rows, (images, masks) = [], scene(2, 8, 224)
    for name, d in NETS.items():
        net = models.get_model(name).eval()
        views = masked_views(images, masks, mean=MEAN, std=STD)
        z, c = directions(16, d, 1000, 1.)
        own, base = torch.zeros(2, dtype=torch.int64), torch.ones(2)
        t = race(2, clock, views=lambda: masked_views(images, masks, mean=MEAN, std=STD),
                 votes=lambda: recluster_vote(z, c, own, base, masks), forward=lambda: net(views))
        rest = t['views'] + t['votes']
        rows.append(row('share of a scan', f'16 views of 224 px, {name}, K=1000', 'masked_views and recluster_vote',
                        f'forward of {name}', rest, t['forward'], share=rest/(rest + t['forward'])))
    return rows


# ---- on a GPU

def eager_views(images, masks, dtype):
    "What one writes without a kernel."
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    x = (images.float()/255 - mean)/std
    return (x[:, None]*~masks[None, :, None]).flatten(0, 1).to(dtype=dtype, memory_format=torch.channels_last)


def eager_votes(z, c, own, base, masks):
    B, M = len(own), len(masks)
    s = F.normalize(z.float(), dim=1) @ c.T
    index, mine = s.argmax(1), s.gather(1, own.repeat_interleave(M)[:, None])[:, 0]
    vote, m = (base.repeat_interleave(M) - mine).view(B, M), masks.flatten(1).float()
    return index, mine, index != own.repeat_interleave(M), ((vote @ m)/m.sum(0).clamp(min=1)).view(B, *masks.shape[1:])


def agree(name, got, want, tolerance):
    worst = (got.double() - want.double()).abs().max().item() if got.numel() else 0.
    if not worst <= tolerance: raise BdnbError(f'{name}: off by {worst:.2g}, more than {tolerance:.2g}: not timed')


def check(device):
    "The kernels against float64 (the references), at ragged sizes, before anything is timed."
    images, masks = scene(3, 7, 61, 17, device)
    masks[3] = False
    pairs = torch.tensor([[2, 3], [0, 6], [2, 0], [1, 1], [2, 0]], device=device)
    for p in (None, pairs):
        for last in (True, False):
            want = masked_views(images.double()/255, masks, p, MEAN, STD, torch.float64)
            for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-6 + 2**-7), (torch.float16, 2e-6 + 2**-10)):
                agree('masked_views', masked_views(images, masks, p, MEAN, STD, dtype, last), want, tolerance)
        z, c = directions(21 if p is None else 5, 515, 1003, 1., device)
        own, base = torch.tensor([3, 0, 1002], device=device), torch.rand(3, generator=rng('base')).to(device)
        got = recluster_vote(z, c, own, base, masks, p)
        want = recluster_vote(z.double(), c.double(), own, base.double(), masks, p)
        for name, g, w in zip(got._fields, got, want): agree(f'recluster_vote {name}', g, w, 5e-6)
    print('kernels agree with float64', file=sys.stderr)


def machine(device):
    "Measured: bytes/s of a large copy, FLOP/s of a large product of halves."
    x = torch.empty(2**28, device=device)
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, device=device).half()
    return dict(bandwidth=2*x.nbytes/min(on_gpu(lambda: y.copy_(x)) for _ in range(5))*1e3,
                fp16=2*8192**3/min(on_gpu(lambda: a @ a, 3) for _ in range(3))*1e3)


def peak(side):
    "Most bytes of temporaries and results that one call holds."
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def race_views(o, rates, device):
    rows, B, M, side = [], o.pictures, o.masks, 224
    images, masks = scene(B, M, side, device=device)
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        sides = dict(ours=lambda: masked_views(images, masks, None, MEAN, STD, dtype),
                     eager=lambda: eager_views(images, masks, dtype), compiled=lambda: compiled(images, masks, dtype))
        compiled = torch.compile(eager_views, dynamic=False)
        t = race(o.blocks, on_gpu, **sides)
        floor = (B*M*3*side**2*size + images.nbytes + masks.nbytes)/rates['bandwidth']*1e3
        for peer in ('eager', 'compiled'):
            rows.append(row('masked_views', f'B={B}, M={M}, {side} px, {str(dtype)[6:]}, channels last', 'Triton kernel',
                            f'PyTorch, {peer}', t['ours'], t[peer], floor_share=floor/t['ours'], peer_floor_share=floor/t[peer],
                            bound='bytes', peak_bytes=peak(sides['ours']), peer_peak_bytes=peak(sides[peer])))
    return rows


def race_votes(o, rates, device):
    rows, B, M, K, side = [], o.pictures, o.masks, 1000, 224
    _, masks = scene(1, M, side, device=device)
    own, base = torch.zeros(B, dtype=torch.int64, device=device), torch.ones(B, device=device)
    for d in NETS.values():
        z, c = directions(B*M, d, K, 1., device)
        compiled = torch.compile(eager_votes, dynamic=False)
        sides = dict(eager=lambda: eager_votes(z, c, own, base, masks), compiled=lambda: compiled(z, c, own, base, masks),
                     assignment=lambda: cam._nearest_triton(z, c, own, base, None, M, True),
                     ours=lambda: recluster_vote(z, c, own, base, masks))
        t = race(o.blocks, on_gpu, **sides)
        moved = (z.nbytes + c.nbytes + B*side**2*4 + masks.nbytes)/rates['bandwidth']
        work = 3*2*B*M*K*d/rates['fp16']                            # three products of halves for one of float32
        floor = max(moved, work)*1e3
        for peer in ('eager', 'compiled'):
            rows.append(row('recluster_vote', f'{B*M:,} views, K={K}, d={d}, {side} px', 'Triton kernels', f'PyTorch, {peer}',
                            t['ours'], t[peer], floor_share=floor/t['ours'], peer_floor_share=floor/t[peer],
                            bound='bytes' if moved > work else 'FLOPs', assignment_ms=t['assignment'],
                            peak_bytes=peak(sides['ours']), peer_peak_bytes=peak(sides[peer])))
    return rows


@torch.no_grad()
def gpu_share(o, device):
    rows, B, M, K, side = [], o.pictures, o.masks, 1000, 224
    images, masks = scene(B, M, side, device=device)
    own, base = torch.zeros(B, dtype=torch.int64, device=device), torch.ones(B, device=device)
    for name, d in NETS.items():
        net = models.get_model(name).eval().to(device=device, dtype=torch.bfloat16, memory_format=torch.channels_last)
        views = masked_views(images, masks, None, MEAN, STD, torch.bfloat16)
        (z, c), forward = directions(B*M, d, K, 1., device), lambda: [net(v) for v in views.split(512)]
        t = race(max(1, o.blocks//2), lambda side: on_gpu(side, 2), forward=forward,
                 ours=lambda: (masked_views(images, masks, None, MEAN, STD, torch.bfloat16),
                               recluster_vote(z, c, own, base, masks)),
                 eager=lambda: (eager_views(images, masks, torch.bfloat16), eager_votes(z, c, own, base, masks)))
        whole = {k: t['forward'] + t[k] for k in ('ours', 'eager')}
        rows.append(row('share of a scan', f'{B*M:,} views of {side} px, {name} in bfloat16, K={K}', 'kernels and forward',
                        'PyTorch, eager, and forward', whole['ours'], whole['eager'], share=t['ours']/whole['ours'],
                        peer_share=t['eager']/whole['eager']))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--gpu', action='store_true', help='check and time the Triton kernels')
    p.add_argument('--out', help='results/race-kernels.json; with --gpu results/race-kernels-gpu.json')
    p.add_argument('--blocks', type=int, default=5, help='timed rounds (k-means: half as many)')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--cpu', action='store_true', help='count CPU seconds')
    p.add_argument('--n', type=int, default=127_000, help='features of the k-means race')
    p.add_argument('--d', type=int, default=512, help='their dimensions')
    p.add_argument('--k', type=int, default=1000, help='clusters')
    p.add_argument('--iterations', type=int, default=20)
    p.add_argument('--pictures', type=int, default=64, help='pictures of a batch on the GPU')
    p.add_argument('--masks', type=int, default=144, help='masks of a batch on the GPU')
    o = p.parse_args()
    if o.cpu and o.threads != 1: p.error('--cpu counts the time that threads wait for each other: add --threads 1')
    if o.cpu: globals().update(now=time.process_time)
    limit_threads(o.threads)
    extra = dict(threads=o.threads, load=[round(v, 2) for v in os.getloadavg()])
    if o.gpu:
        if not torch.cuda.is_available(): p.error('--gpu: no GPU is visible to PyTorch')
        if cam.triton is None or cam._interpreted(): p.error('--gpu: needs Triton, and TRITON_INTERPRET unset')
        device = torch.device('cuda')
        check(device)
        extra = dict(rates=machine(device))
        rows = race_views(o, extra['rates'], device) + race_votes(o, extra['rates'], device) + gpu_share(o, device)
    else: rows = race_windows(o) + race_kmeans(o) + cpu_share(o)
    out = o.out or f'results/race-kernels{"-gpu" if o.gpu else ""}.json'
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    write_json(out, dict(study=Path(out).stem, **stamp(' '.join(['python bench/kernels.py', *words])), rows=rows, blocks=o.blocks,
                         clock='gpu' if o.gpu else 'cpu' if o.cpu else 'wall', **extra))


if __name__ == '__main__': main()
