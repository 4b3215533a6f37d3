"""Kernels and references against float64, at sizes that divide nothing.

Every test runs by each `road` there is: the plain reference, and the Triton kernel where one can run: compiled on a GPU, or on a
CPU when the interpreter was switched on before Triton was imported. `test_under_the_interpreter` starts such a process.

Tolerances (absolute): float32 views 2e-6, for they reach 3; bfloat16 and float16 views half a unit in the last place of a
number below 4 more (a whole one in the interpreter, which cuts where hardware rounds); cosines 2e-6 and heat 5e-6, for they are
sums of float32.
"""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdnb.core import BdnbError, rng
from bdnb.kernels import cam, kmeans
from bdnb.kernels.cam import assign, best_windows, masked_views, recluster_vote
from bdnb.kernels.kmeans import spherical_kmeans

INTERPRETED = cam.triton is not None and cam._interpreted()
VIEWS = {torch.float32: 2e-6, torch.bfloat16: 2e-6 + 2**(-6 if INTERPRETED else -7), torch.float16: 2e-6 + 2**-10}
COSINE, HEAT = 2e-6, 5e-6
has_gpu = torch.cuda.is_available() and not INTERPRETED
mean, std = (.485, .456, .406), (.229, .224, .225)


def test_a_machine_that_cannot_build_kernels_says_so(monkeypatch):
    "Triton without a C compiler: the references work, and the reason is said once."
    class Broken:
        def __getitem__(self, grid): raise RuntimeError('Failed to find C compiler.\nPlease specify via CC')
    monkeypatch.setattr(cam, '_one_kernel', Broken(), raising=False)
    with pytest.warns(UserWarning, match=r'no Triton kernel starts on cpu \(Failed to find C compiler\.\); PyTorch does the work'):
        assert not cam._starts.__wrapped__(torch.device('cpu'))
    class Gpu:
        is_cuda, dtype, device = True, torch.float32, torch.device('cpu')
    monkeypatch.setattr(cam, '_starts', lambda device: False)
    assert not cam._on_kernel(Gpu())


@pytest.fixture(params=['reference', 'kernel', 'gpu-reference', 'gpu-kernel'])
def road(request, monkeypatch):
    "The device to run on, after choosing the body."
    gpu = request.param.startswith('gpu')
    if gpu and not has_gpu: pytest.skip('needs a GPU')
    if request.param == 'kernel' and not INTERPRETED: pytest.skip('runs in `test_under_the_interpreter`')
    if request.param == 'gpu-kernel' and cam.triton is None: pytest.skip('needs Triton')
    if request.param.endswith('reference'): monkeypatch.setattr(cam, '_on_kernel', lambda *tensors: False)
    return torch.device('cuda' if gpu else 'cpu')


def pictures(B, H, W, dtype=torch.uint8, *seed):
    x = torch.rand(B, 3, H, W, generator=rng('pictures', *seed))
    return (x*255.99).to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


def mask_bank(M, H, W, empty=()):
    masks = torch.rand(M, H, W, generator=rng('masks')) < .4
    for m in empty: masks[m] = False
    return masks


def some_pairs(P, B, M):
    g = rng('pairs')
    return torch.stack([torch.randint(n, (P,), generator=g) for n in (B, M)], 1)


def exact_views(x, masks, pairs, mean=mean, std=std):
    "Float64 views, one by one."
    x = x.double()/255 if x.dtype == torch.uint8 else x.double()
    x = (x - torch.tensor(mean, dtype=torch.float64)[:, None, None])/torch.tensor(std, dtype=torch.float64)[:, None, None]
    pairs = [(b, m) for b in range(len(x)) for m in range(len(masks))] if pairs is None else pairs.tolist()
    return torch.stack([x[b]*~masks[m] for b, m in pairs]) if pairs else x.new_empty(0, *x.shape[1:])


def close(a, b, tolerance): torch.testing.assert_close(a.cpu().double(), b.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize('B, M, H, W', [(1, 1, 1, 1), (2, 3, 7, 5), (3, 2, 19, 31), (1, 2, 37, 29)])
@pytest.mark.parametrize('dtype', VIEWS)
def test_views(road, B, M, H, W, dtype):
    x, masks = pictures(B, H, W), mask_bank(M, H, W, empty=[0])
    for last in (True, False):
        got = masked_views(x.to(road), masks.to(road), None, mean, std, dtype, last)
        close(got, exact_views(x, masks, None), VIEWS[dtype])
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize('source', [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', ['contiguous', 'channels last', 'crop', 'one for all'])
def test_views_of_any_source(road, source, layout):
    x, masks, pairs = pictures(4, 11, 13, source), mask_bank(5, 11, 13), some_pairs(7, 4, 5)
    if layout == 'channels last': x = x.contiguous(memory_format=torch.channels_last)
    if layout == 'crop': x = pictures(4, 20, 20, source)[:, :, 3:14, 5:18]
    if layout == 'one for all': x = x[:1].expand(4, -1, -1, -1)
    turned = masks.transpose(1, 2).contiguous().transpose(1, 2)                 # masks with other strides
    for last in (True, False):
        got = masked_views(x.to(road), turned.to(road), pairs.to(road), mean, std, channels_last=last)
        close(got, exact_views(x, masks, pairs), VIEWS[torch.float32])


def test_empty_mask_shows_the_plain_picture(road):
    x, masks = pictures(2, 9, 9).to(road), torch.zeros(1, 9, 9, dtype=torch.bool, device=road)
    plain = masked_views(x, masks, mean=mean, std=std)
    assert torch.equal(plain, masked_views(x, masks.expand(3, 9, 9), mean=mean, std=std)[::3])
    full = masked_views(x, ~masks, mean=mean, std=std)
    assert not full.any() and plain.all(dim=0).any()


@pytest.mark.parametrize('B, M, P', [(0, 3, None), (3, 0, None), (2, 2, 0), (0, 0, None)])
def test_nothing_to_do(road, B, M, P):
    x, masks = pictures(B, 6, 5).to(road), mask_bank(M, 6, 5).to(road)
    pairs = None if P is None else torch.empty(P, 2, dtype=torch.int64, device=road)
    assert masked_views(x, masks, pairs).shape == (0, 3, 6, 5)
    c = torch.eye(4, device=road)
    own, base = torch.zeros(B, dtype=torch.int64, device=road), torch.ones(B, device=road)
    votes = recluster_vote(torch.empty(0, 4, device=road), c, own, base, masks, pairs)
    assert [list(v.shape) for v in votes] == [[0], [0], [0], [B, 6, 5]] and not votes.heat.any()
    assert [len(v) for v in assign(torch.empty(0, 4, device=road), c)] == [0, 0]


@pytest.mark.parametrize('pairs', [True, False])
def test_views_backward(road, pairs):
    masks, pairs = mask_bank(3, 7, 9), some_pairs(11, 4, 3) if pairs else None
    x = pictures(4, 7, 9, torch.float32)
    P = 12 if pairs is None else 11
    g = torch.randn(P, 3, 7, 9, generator=rng('g'))
    there = None if pairs is None else pairs.to(road)
    leaf = x.to(road).requires_grad_()
    got, = torch.autograd.grad(masked_views(leaf, masks.to(road), there, mean, std), leaf, g.to(road))
    exact = x.double().requires_grad_()
    want, = torch.autograd.grad(exact_views(exact, masks, pairs), exact, g.double())
    close(got, want, 2e-5)                                                       # a sum of up to 7 numbers, over .22
    again, = torch.autograd.grad(masked_views(leaf, masks.to(road), there, mean, std), leaf, g.to(road))
    if road.type == 'cpu' or cam._on_kernel(leaf): assert torch.equal(got, again)


def test_pictures_one_pixel_wide(road):
    "Their last stride says nothing of where the next pixel is."
    x, masks = pictures(2, 1, 5, torch.float32).transpose(2, 3), mask_bank(3, 5, 1)
    assert x.is_contiguous() and x.stride(3) == 5
    assert torch.equal(masked_views(x.to(road), masks.to(road)).cpu(), masked_views(x.clone().reshape(2, 3, 5, 1), masks))


def features(N, d, dtype=torch.float32, *seed):
    return (torch.randn(N, d, generator=rng('features', *seed))*7).to(dtype)


def centres(K, d, *seed): return F.normalize(torch.randn(K, d, generator=rng('centres', *seed)), dim=1)


def exact_cosines(z, c): return F.normalize(z.double(), dim=1) @ c.double().T


@pytest.mark.parametrize('N, d, K', [(1, 1, 1), (13, 5, 1), (17, 33, 65), (67, 40, 3), (5, 129, 130)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_assign(road, N, d, K, dtype):
    z, c = features(N, d, dtype), centres(K, d)
    index, best = assign(z.to(road), c.to(road))
    exact = exact_cosines(z, c)
    close(best, exact.amax(1), COSINE)
    close(exact.gather(1, index.cpu()[:, None])[:, 0], exact.amax(1), COSINE)    # the chosen one is a maximum
    raw = assign(z.to(road), c.to(road), normalise=False)[1]
    close(raw, (z.double() @ c.double().T).amax(1), 7*d*COSINE)


@pytest.mark.parametrize('d', [512, 768, 2048])
@pytest.mark.parametrize('noise', [0, 1])
def test_long_sums(road, d, noise):
    "Cosines near one, of many terms that are mostly of one sign: an adder that cuts off instead of rounding adds up its cuts."
    c = centres(130, d)
    own = torch.randint(130, (140,), generator=rng('own'))
    z = 7*(c[own] + noise*torch.randn(140, d, generator=rng('noise', d))/d**.5)
    exact, masks, base = exact_cosines(z, c), mask_bank(1, 2, 2), torch.ones(140)
    index, best = assign(z.to(road), c.to(road))
    votes = recluster_vote(z.to(road), c.to(road), own.to(road), base.to(road), masks.to(road))
    assert torch.equal(index.cpu(), exact.argmax(1)) and torch.equal(votes.assigned, index)
    close(best, exact.amax(1), COSINE)
    close(votes.similarity, exact.gather(1, own[:, None])[:, 0], COSINE)


@pytest.mark.parametrize('paired', [False, True])
def test_rows_chunk_by_chunk(road, paired, monkeypatch):
    "What belongs to a view is found in the second and third chunk too."
    monkeypatch.setattr(cam, '_CHUNK', 1)                                          # 128 rows
    z, c, masks, own = features(262, 5), centres(3, 5), mask_bank(131, 2, 3).to(road), torch.tensor([2, 0])
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(131)).flip(0).contiguous().to(road) if paired else None
    votes = recluster_vote(z.to(road), c.to(road), own.to(road), torch.ones(2, device=road), masks, pairs)
    exact = exact_cosines(z, c)
    rows = own.repeat_interleave(131).flip(0) if paired else own.repeat_interleave(131)
    assert votes.assigned.cpu().equal(exact.argmax(1)) and votes.changed.cpu().equal(exact.argmax(1) != rows)
    close(votes.similarity, exact.gather(1, rows[:, None])[:, 0], COSINE)


def test_many_masks(road):
    "A sum over a thousand masks is as exact as over ten."
    vote, masks = torch.rand(2, 1000, generator=rng('many votes')), mask_bank(1000, 3, 3)
    z = torch.stack([1 - vote.flatten(), (1 - (1 - vote.flatten())**2).sqrt()], 1)            # a cosine of 1 - vote with the first
    heat = recluster_vote(z.to(road), torch.eye(2, device=road), torch.zeros(2, dtype=torch.int64, device=road),
                          torch.ones(2, device=road), masks.to(road)).heat
    over = masks.flatten(1).double()
    exact = (1 - exact_cosines(z, torch.eye(2))[:, 0]).view(2, -1) @ over/over.sum(0)
    close(heat.flatten(1), exact, HEAT)


def test_strided_features_and_wide_centroids(road):
    z, c = features(9, 14).T.contiguous().T, centres(4, 14)
    close(assign(z.to(road)[:, ::2], c.to(road)[:, ::2])[1], exact_cosines(z[:, ::2], c[:, ::2]).amax(1), COSINE)


@pytest.mark.parametrize('K', [2, 63, 64, 65, 200])
def test_ties_go_to_the_lowest(road, K):
    "Small whole numbers: every product is exact, so equal centroids tie exactly, across tiles too."
    z = torch.randint(-4, 5, (23, 6), generator=rng('ties', K)).float()
    c = torch.randint(-3, 4, (5, 6), generator=rng('tied centres')).float().repeat(K//5 + 1, 1)[:K]
    index, _ = assign(z.to(road), c.to(road))
    table = z @ c.T
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in table])
    assert torch.equal(index.cpu(), first) and index.max() < 5


def test_odd_features(road):
    c = centres(70, 6)
    z = torch.zeros(4, 6)
    z[1, 2], z[2, 0] = float('nan'), float('inf')
    z[3] = c[69]
    index, best = assign(z.to(road), c.to(road))
    assert index.tolist() == [0, 0, 0, 69] and best[0] == 0 and best[1:3].isnan().all() and abs(best[3] - 1) < COSINE


def test_odd_centroids(road):
    "A centroid that is no number is not passed over in silence. Without dimensions everything is at 0."
    c = centres(70, 6)
    c[66, 3] = float('nan')
    index, best = assign(features(3, 6).to(road), c.to(road))
    assert index.tolist() == [66]*3 and not best.isfinite().any()
    index, best = assign(torch.ones(3, 0, device=road), torch.ones(2, 0, device=road))
    assert index.tolist() == [0, 0, 0] and best.tolist() == [0, 0, 0]


def exact_votes(z, c, own, base, masks, pairs, soft):
    "Float64, by loops. A view whose two best clusters are closer than float32 can tell may go either way: none must be."
    B, (M, H, W) = len(own), masks.shape
    pairs = [(b, m) for b in range(B) for m in range(M)] if pairs is None else pairs.tolist()
    cosines = exact_cosines(z, c)
    if len(pairs) and len(c) > 1:
        two = cosines.topk(2, 1).values
        assert (two[:, 0] - two[:, 1]).min() > 1e-5, 'choose another seed'
    assigned = cosines.argmax(1)
    total, count = torch.zeros(B, H, W, dtype=torch.float64), torch.zeros(B, H, W, dtype=torch.float64)
    for p, (b, m) in enumerate(pairs):
        vote = base[b].double() - cosines[p, own[b]] if soft else float(assigned[p] != own[b])
        total[b] += vote*masks[m]
        count[b] += masks[m]
    rows = torch.tensor([b for b, _ in pairs], dtype=torch.int64)
    return assigned, cosines.gather(1, own[rows, None])[:, 0], assigned != own[rows], total/count.clamp(min=1)


@pytest.mark.parametrize('B, M, H, W, K, d', [(1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 1, 4), (3, 7, 11, 13, 67, 35),
                                              (5, 4, 24, 25, 9, 64)])
@pytest.mark.parametrize('soft', [True, False])
@pytest.mark.parametrize('paired', [True, False])
def test_votes(road, B, M, H, W, K, d, soft, paired):
    masks, pairs = mask_bank(M, H, W, empty=[M - 1]), some_pairs(B*M + 3, B, M) if paired else None
    z, c = features(B*M + 3 if paired else B*M, d, torch.float32, 1), centres(K, d)
    own, base = torch.randint(K, (B,), generator=rng('own')), torch.rand(B, generator=rng('base'))
    on = lambda x: None if x is None else x.to(road)
    got = recluster_vote(*map(on, (z, c, own, base, masks, pairs)), soft=soft)
    assigned, similarity, changed, heat = exact_votes(z, c, own, base, masks, pairs, soft)
    assert torch.equal(got.assigned.cpu(), assigned) and torch.equal(got.changed.cpu(), changed)
    close(got.similarity, similarity, COSINE)
    close(got.heat, heat, HEAT)
    assert all(torch.equal(a, b) for a, b in zip(got, recluster_vote(*map(on, (z, c, own, base, masks, pairs)), soft=soft)))


def test_a_view_that_stays_has_the_similarity_that_won(road):
    z, c, masks = features(60, 31).to(road), centres(66, 31).to(road), mask_bank(3, 4, 4).to(road)
    index, best = assign(z[::3], c)
    votes = recluster_vote(z[::3].repeat_interleave(3, 0), c, index, best, masks)
    assert not votes.changed.any()
    if INTERPRETED and index.device.type == 'cpu' and cam._on_kernel(z, c):
        # numpy's product of matrices, which stands in for the kernel's, rounds a row by its place in the block (seen with AVX2)
        close(votes.similarity[::3], best.double(), COSINE)
        return close(votes.heat, torch.zeros_like(votes.heat).double(), HEAT)
    assert not votes.heat.any() and torch.equal(votes.similarity[::3], best)


@pytest.mark.parametrize('paired', [False, True])
def test_a_launch_has_one_axis(road, paired, monkeypatch):
    "CUDA ends the others at 65,535 programs. Several blocks of everything that can be long."
    B, M, H, W, launched, kernels = 17, 37, 5, 9, set(), cam._on_kernel(torch.zeros(1, device=road))

    class Watched:
        def __init__(self, name): self.name, self.kernel = name, getattr(cam, f'_{name}_kernel')

        def __getitem__(self, grid):
            assert len(grid) == 1, self.name
            launched.add((self.name, grid[0] > 3))
            return self.kernel[grid]

    if kernels: monkeypatch.setattr(cam, '_on_kernel', lambda *tensors: True)
    for name in ('pack', 'views', 'weights', 'heat') if kernels else ():
        monkeypatch.setattr(cam, f'_{name}_kernel', Watched(name))
    for name, tiles in dict(pack=dict(BLOCK=16), weights=dict(BM=16), heat=dict(BB=16, BM=16, BN=16)).items():
        monkeypatch.setitem(cam._TUNED, name, {**cam._TUNED[name], **tiles})
    x, masks, pairs = pictures(B, H, W), mask_bank(M, H, W), some_pairs(B*M, B, M) if paired else None
    z, c, own, base = features(B*M, 5), centres(3, 5), torch.arange(B) % 3, torch.rand(B, generator=rng('base'))
    on = lambda v: None if v is None else v.to(road)
    close(masked_views(*map(on, (x, masks, pairs)), mean, std), exact_views(x, masks, pairs), VIEWS[torch.float32])
    votes = recluster_vote(*map(on, (z, c, own, base, masks, pairs)))
    close(votes.heat, exact_votes(z, c, own, base, masks, pairs, True)[3], HEAT)
    assert launched == ({(name, True) for name in ('views', 'heat', 'weights' if paired else 'pack')} if kernels else set())


@pytest.mark.parametrize('soft', [True, False])
def test_a_broken_feature_breaks_its_map_and_no_other(road, soft):
    z, c, masks = features(6, 5), centres(4, 5), mask_bank(3, 6, 6)
    z[4, 1] = float('nan')
    own, base = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    votes = recluster_vote(z.to(road), c.to(road), own.to(road), base.to(road), masks.to(road), soft=soft)
    assert votes.heat[1].isnan().all() and votes.heat[0].isfinite().all() and not votes.changed[4]
    assert best_windows(votes.heat, 3)[2].isnan().tolist() == [False, True]


def test_rows_that_do_not_exist(road):
    "An error in the reference; NaN, and nothing read outside, in the kernel."
    x, masks, c = pictures(2, 5, 5).to(road), mask_bank(3, 5, 5).to(road), centres(4, 5).to(road)
    own, base = torch.tensor([0, 9]).to(road), torch.ones(2, device=road)
    pairs = torch.tensor([[0, 1], [2, 0], [1, 3], [-1, 0], [1, -7]]).to(road)
    call_views = lambda: masked_views(x, masks, pairs)
    call_votes = lambda: recluster_vote(features(5, 5).to(road), c, own, base, masks, pairs)
    if not cam._on_kernel(x):
        with pytest.raises(BdnbError, match='pair 1 names picture 2, but there are 2'): call_views()
        with pytest.raises(BdnbError, match=r'own\[1\] is 9, but there are 4 clusters'): call_votes()
        return
    assert call_views().isnan().flatten(1).all(1).tolist() == [False, True, True, True, True]
    votes = call_votes()
    assert votes.similarity.isnan().tolist() == [False, True, True, True, True] and votes.heat[1].isnan().all()


def test_last_of_many_rows(road):
    "Row numbers times row lengths beyond 2**31. On a CPU in memory that is reserved and, but for the last row, never touched."
    if road.type == 'cpu':
        x = torch.from_numpy(np.zeros((11_000, 3, 256, 256), np.uint8))
        x[-1] = 255
        got = masked_views(x, torch.zeros(1, 256, 256, dtype=torch.bool), torch.tensor([[10_999, 0]]), mean=.5, std=.5)
        assert x.numel() > 2**31 and (got - 1).abs().max() < 2e-6
        return
    if torch.cuda.get_device_properties(0).total_memory < 20e9: pytest.skip('needs 12 GB of GPU memory')
    x, masks = pictures(4, 512, 512).to(road), mask_bank(1000, 512, 512).to(road)
    got = masked_views(x, masks, None, mean, std, torch.bfloat16)                # 3.1e9 elements
    close(got[-2:], exact_views(x.cpu(), masks.cpu(), torch.tensor([[3, 998], [3, 999]])), VIEWS[torch.bfloat16])
    z, c = torch.zeros(2**20 + 3, 2049, dtype=torch.bfloat16, device=road), centres(5, 2049)
    z[-1] = c[3].to(road)
    index, best = assign(z, c.to(road))
    assert index[-1] == 3 and not index[:-1].any() and abs(best[-1] - 1) < 1e-4


@pytest.mark.parametrize('B, H, W, w', [(3, 7, 5, 5), (2, 23, 31, 6), (1, 1, 1, 1), (2, 40, 40, 11)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_windows(road, B, H, W, w, dtype):
    heat = (torch.randn(B, H, W, generator=rng('heat'))*1e-3).to(dtype)
    sums = heat.double().unfold(1, w, 1).unfold(2, w, 1).sum((3, 4))
    top, left, score = best_windows(heat.to(road), w)
    assert torch.equal(top.cpu()*(W - w + 1) + left.cpu(), sums.flatten(1).argmax(1)) and score.dtype == dtype
    close(score, sums.amax((1, 2)).to(dtype), 1e-9)


@pytest.mark.parametrize('value', [0., .1, -1/3, 1e-30, 3e37])
def test_equal_windows_first_in_reading_order(road, value):
    heat = torch.full((2, 33, 41), value, device=road)
    assert [v.tolist() for v in best_windows(heat, 7)[:2]] == [[0, 0], [0, 0]]
    heat[1, 12, 30] = heat[1, 25, 20] = abs(value)*2 + 1e-3
    assert [v[1].item() for v in best_windows(heat, 5)[:2]] == [8, 26]


def ops(road):
    x, masks, c = pictures(2, 5, 7, torch.float32), mask_bank(3, 5, 7), centres(4, 6)
    pairs, scale = some_pairs(5, 2, 3), torch.full((3,), 2.)
    own, base = torch.tensor([1, 3]), torch.tensor([.5, .25])
    o, N = torch.ops.bdnb, None
    yield o.masked_views.default, (x, masks, N, scale, -scale, torch.float32, True)
    yield o.masked_views.default, (x.requires_grad_(), masks, pairs, scale, -scale, torch.float32, False)
    yield o.masked_views.default, ((x.detach()*255).byte(), masks, pairs, scale, -scale, torch.bfloat16, True)
    yield o.masked_views_backward.default, (torch.randn(6, 3, 5, 7, generator=rng(0)), masks, N, scale, 2, torch.float32)
    yield o.assign.default, (features(9, 6), c, True)
    yield o.recluster_vote.default, (features(6, 6), c, own, base, masks, N, True)
    yield o.recluster_vote.default, (features(5, 6), c, own, base, masks, pairs, False)


@pytest.mark.parametrize('case', range(7))
def test_operator_is_registered_rightly(road, case):
    op, args = list(ops(road))[case]
    on = lambda a: a.detach().to(road).requires_grad_(a.requires_grad) if torch.is_tensor(a) else a
    assert set(torch.library.opcheck(op, tuple(map(on, args))).values()) == {'SUCCESS'}


def test_compile_and_autocast(road):
    x, masks, c = pictures(2, 9, 9).to(road), mask_bank(3, 9, 9).to(road), centres(5, 27).to(road)
    own, base = torch.tensor([1, 3]).to(road), torch.tensor([.5, .25]).to(road)

    def scan(x):
        views = masked_views(x, masks, mean=mean, std=std)
        z = F.adaptive_avg_pool2d(views, 3).flatten(1)
        votes = recluster_vote(z, c, own, base, masks)
        return assign(z, c) + tuple(votes) + best_windows(votes.heat, 4)
    plain = scan(x)
    compiled = torch.compile(scan, fullgraph=True, backend='aot_eager')(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))
    z = features(6, 27).to(road)
    with torch.autocast(road.type, torch.bfloat16):
        assert torch.equal(assign(z, c)[1], recluster_vote(z, c, own, base, masks).similarity) is False
        inside = recluster_vote(z, c, own, base, masks)
    assert all(torch.equal(a, b) for a, b in zip(inside, recluster_vote(z, c, own, base, masks)))


@pytest.mark.parametrize('change, complaint', [
    (dict(features=torch.ones(5, 6)), '5 features for 6 views'), (dict(centroids=torch.ones(0, 6)), 'there are no centroids'),
    (dict(centroids=torch.ones(4, 5)), 'not of the same encoder'), (dict(own=torch.zeros(2)), r'own must be int64 \[B\]'),
    (dict(base=torch.ones(3)), r'base must be float \[2\]'), (dict(masks=torch.ones(3, 5, 7)), 'masks must be bool'),
    (dict(pairs=torch.ones(6, 3, dtype=torch.int64)), r'pairs must be int64 \[P, 2\]'),
    (dict(features=torch.ones(6, 6, requires_grad=True)), 'no gradient'), (dict(features=[1]), 'features must be float')])
def test_bad_votes(change, complaint):
    good = dict(features=features(6, 6), centroids=centres(4, 6), own=torch.tensor([1, 3]), base=torch.ones(2),
                masks=mask_bank(3, 5, 7))
    recluster_vote(**good)
    with pytest.raises(BdnbError, match=complaint): recluster_vote(**{**good, **change})


@pytest.mark.parametrize('change, complaint', [
    (dict(images=torch.ones(2, 1, 5, 7)), r'images must be uint8 or float \[B, 3, H, W\], not float32 \[2, 1, 5, 7\]'),
    (dict(images=torch.ones(2, 3, 5, 7, dtype=torch.int64)), 'images must be'),
    (dict(dtype=torch.int32), 'dtype must be a float'),
    (dict(masks=mask_bank(2, 7, 5)), 'do not fit'), (dict(pairs=torch.tensor([[0, 3]])), 'pair 0 names mask 3, but there are 3')])
def test_bad_views(change, complaint, monkeypatch):
    monkeypatch.setattr(cam, '_on_kernel', lambda *tensors: False)
    good = dict(images=pictures(2, 5, 7), masks=mask_bank(3, 5, 7))
    masked_views(**good)
    with pytest.raises(BdnbError, match=complaint): masked_views(**{**good, **change})


POINTERS = {'*u8': 'images masks changed', '*i64': 'pairs order starts own index', '*i32': 'words first',
            '*fp16': 'z c parts weight number', '*bf16': 'grad',
            '*fp32': 'x scale shift down lower length high base best mine vote heat sums counts'}


def variants():
    "Kernels with what is constant in them, and the type of their result where it is not float32."
    kinds = dict(OWN=True, PAIRS=False)
    for name, more, out in (('pack', {}, None), ('views', dict(PAIRS=True, LAST=True, BLOCK=1024), '*bf16'),
                            ('views', dict(PAIRS=False, LAST=False, BLOCK=512), '*fp32'), ('back', dict(PAIRS=True), '*fp32'),
                            ('split', {}, None), ('nearest', kinds, None), ('nearest', dict(OWN=False, PAIRS=True), None),
                            ('vote', dict(kinds, SOFT=True, NORMALISE=True), None), ('weights', {}, None),
                            ('heat', dict(PAIRS=True), None), ('heat', dict(PAIRS=False), None)):
        yield getattr(cam, '_views_back_kernel' if name == 'back' else f'_{name}_kernel'), {**cam._TUNED[name], **more}, out


@pytest.mark.skipif(cam.triton is None or INTERPRETED, reason='needs a Triton that compiles')
@pytest.mark.parametrize('capability', [80, 90])
def test_kernels_compile_without_a_gpu(capability, tmp_path, monkeypatch):
    "To machine code, by the compiler alone: the interpreter forgives what the compiler does not."
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    types = {name: kind for kind, names in POINTERS.items() for name in names.split()}
    for kernel, constants, out in variants():
        options = {k: constants.pop(k) for k in ('num_warps', 'num_stages') if k in constants}
        kinds = {n: 'constexpr' if n in constants else out if n == 'out' else types.get(n, 'i32') for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=kinds,
                           constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
        made = cam.triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
        assert len(made.asm['cubin']) > 1000 and f'sm_{capability}' in made.asm['ptx'], kernel


@pytest.mark.parametrize('init', ['random', 'k-means++'])
@pytest.mark.parametrize('N, d, k', [(1, 3, 1), (211, 17, 13), (97, 5, 97)])
def test_kmeans(road, N, d, k, init):
    z = features(N, d).to(road)
    one, two = (spherical_kmeans(z, k, seed=5, iterations=6, init=init) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3])) and one.inertia == two.inertia
    assert torch.equal(one.assigned, assign(z, one.centroids)[0]) and one.assigned.device == z.device
    exact = exact_cosines(z.cpu(), one.centroids.cpu())
    close(one.similarity, exact.amax(1), COSINE)
    assert one.assigned.unique().numel() == k and all(b <= a + 1e-4 for a, b in zip(one.inertia, one.inertia[1:]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_kmeans_of_any_float(road, dtype):
    z = features(60, 9, dtype).to(road)
    got, want = spherical_kmeans(z, 4), spherical_kmeans(z.float(), 4)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3])) and got.centroids.dtype == torch.float32


def test_update_over_many_blocks(road):
    "Sums against float64, the large cluster's too: half of 40,000 rows in one cluster, another cluster empty."
    x = F.normalize(features(40_001, 6), dim=1) + .5
    a = torch.randint(5, (len(x),), generator=rng('a'))
    a[a == 3] = 0
    a[::2] = 1
    got, add = kmeans._sums(x.to(road), a.to(road), 5).cpu(), lambda v: torch.zeros(5, 6, dtype=torch.float64).index_add_(0, a, v)
    assert ((got - add(x.double())).abs() <= 5e-6*add(x.double().abs())).all()      # roundings of 2**14 float32 additions, a walk


def test_kernels_start(road):
    if not cam._on_kernel(torch.zeros(1, device=road)): pytest.skip('the references are asked')
    assert cam._starts.__wrapped__(road)


def test_without_triton():
    "On systems that have no Triton, the module imports and the references answer."
    code = ('import sys; sys.modules["triton"] = None\nimport torch\nfrom bdnb.kernels import cam\n'
            'assert cam.triton is None and cam.assign(torch.eye(3), torch.eye(3))[0].tolist() == [0, 1, 2]\n'
            'print(cam.masked_views(torch.zeros(1, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)).shape)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert 'torch.Size([2, 3, 4, 4])' in done.stdout, done.stderr


@pytest.mark.skipif(INTERPRETED, reason='is the interpreter')
@pytest.mark.skipif(cam.triton is None, reason='needs Triton')
def test_under_the_interpreter():
    "The same file again, kernels only, in a process whose Triton interprets."
    command = [sys.executable, '-m', 'pytest', __file__, '-p', 'no:cacheprovider', '-k', '[kernel', '-rs', '--durations=3']
    done = subprocess.run(command, env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and 'skipped' not in done.stdout.splitlines()[-1], done.stdout[-3000:] + done.stderr[-1000:]
