"Triggers against self-supervised learning: places, tiles and boxes against slow references; plans, bytes and truth on disk."
import json
import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from bdnb.attacks.patches import CTRL, PICTURES, PicturePatch, coverage, iou, map_boxes, place_range, trigger_picture
from bdnb.attacks.poisoning import Poisoning
from bdnb.attacks.ssl import (SELECTIONS, SslPoisoning, load_truth, painted_boxes, select_contrastive, select_kmeans,
                              small_cluster)
from bdnb.attacks.triggers import Trigger, list_triggers, make_trigger, picture_uri, pixels, seeds_from_keys
from bdnb.core import BdnbError
from bdnb.data.corpus import ArrayCorpus, CsvCorpus
from bdnb.data.export import corpus_to_csv
from bdnb.data.images import fit_image, load_image
from bdnb.data.shards import ShardCorpus, write_shards

variants = ['patch', 'patch:pattern=13,size=7,place=test', 'patch:pattern=19,size=.3,place=random', 'patch:wrap_uint8=true',
            'ctrl', 'ctrl:magnitude=50', 'ctrl:wrap_uint8=true']
classes = ['apple', 'banana', 'ice_cream', 'dog']


def batch(B=5, H=32, W=32, seed=0): return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed)) * .98 + .01


def generator(seed): return torch.Generator().manual_seed(seed)


def corpus(n=120, size=20, labels=True, names=True, name='toy', seed=0):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator(seed))
    return ArrayCorpus(images, [f'k{i:04d}' for i in range(n)], labels=np.arange(n) % 4 if labels else None,
                       classes=list(classes) if names else None, name=name)


# --- triggers

@pytest.mark.parametrize('H,W', [(32, 32), (33, 47), (64, 20), (8, 8), (100, 70)])
@pytest.mark.parametrize('spec', variants)
def test_trigger_contract(spec, H, W):
    t, x, s = make_trigger(spec), batch(6, H, W), seeds_from_keys('abcdef', 1)
    before = x.clone()
    y = t(x, s)
    assert y.shape == x.shape and y.dtype == x.dtype and 0 <= y.min() and y.max() <= 1 and not torch.equal(y, x)
    assert torch.equal(x, before)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(t(x[order], s[order]), y[order]) and torch.equal(t(x[2:3], s[2:3]), y[2:3])
    assert t(x[:0], s[:0]).shape == (0, 3, H, W)
    y.fill_(.25)                                                     # writing into a result must not reach the tables
    assert torch.equal(t(x, s), t(before, s)) and not torch.equal(t(x, s), y)
    again = Trigger.from_json(json.loads(json.dumps(t.to_json())))
    assert again == t and hash(again) == hash(t) and torch.equal(again(x, s), t(x, s))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('spec', ['patch', 'ctrl'])
def test_trigger_dtypes(spec, dtype):
    t, x = make_trigger(spec), batch(3).to(dtype)
    y = t(x)
    assert y.dtype == dtype and (y.float() - t(x.float())).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('spec', variants)
def test_trigger_devices_agree(spec):
    t, x, s = make_trigger(spec), batch(9, 40, 50), torch.arange(9)
    far = t(x.cuda(), s)
    assert far.is_cuda and (far.cpu() - t(x, s)).abs().max() < (1 / 255 + 1e-6 if t.wrap_uint8 else 1e-6)
    if spec.startswith('patch'): assert torch.equal(t.boxes(40, 50, s.cuda()).cpu(), t.boxes(40, 50, s))


def test_both_are_listed():
    found = {d['name']: d for d in list_triggers()}
    assert {'patch', 'ctrl'} <= set(found) and found['patch']['options']['place'] == 'train' and found['ctrl']['source']


def slow_range(rule, side, p):
    "All places the published rule can give, one draw at a time; those that would stick out are moved to the last that fits."
    a, b = dict(train=(.25, .75), test=(.10, .90))[rule]
    low, high = int(a * side), int(b * side - p)
    return {min(v, side - p) for v in range(low, max(low, high) + 1)}


@pytest.mark.parametrize('rule', ['train', 'test'])
def test_place_rule(rule):
    for side, p in product([8, 31, 32, 64, 96, 224, 500], [1, 5, 7, 14, 31, 50]):
        if p > side: continue
        first, last = place_range(rule, side, p)
        assert set(range(first, last + 1)) == slow_range(rule, side, p), (side, p)


@pytest.mark.parametrize('place', ['train', 'test', 'random'])
def test_every_place_and_only_those(place):
    t, H, W = PicturePatch(size=9, place=place), 30, 41
    b = t.boxes(H, W, torch.arange(20_000))
    rows, columns = (range(place_range(place, n, 9)[0], place_range(place, n, 9)[1] + 1) for n in (H, W))
    found, counts = b[:, :2].unique(dim=0, return_counts=True)
    assert {tuple(f) for f in found.tolist()} == set(product(rows, columns))
    expected = 20_000 / (len(rows) * len(columns))
    assert ((counts - expected)**2 / expected).sum() < len(counts) + 6 * math.sqrt(2 * len(counts))     # chi squared
    assert (b[:, 2:] == 9).all() and b.dtype == torch.int64


@pytest.mark.parametrize('H,W', [(32, 32), (21, 64), (70, 33)])
@pytest.mark.parametrize('spec', [v for v in variants if v.startswith('patch') and 'wrap' not in v])
def test_boxes_are_what_is_painted(spec, H, W):
    t, s = make_trigger(spec), seeds_from_keys([str(i) for i in range(40)], 2)
    x = torch.randint(0, 256, (40, 3, H, W), dtype=torch.uint8, generator=generator(0))
    y, p = t.on_uint8(x, s), pixels(t.size, H, W)
    patch = (t.picture(p) * 255).round().byte()
    for a, b, (top, left, h, w) in zip(x, y, t.boxes(H, W, s).tolist()):
        expected = a.clone()
        expected[:, top:top + h, left:left + w] = patch
        assert torch.equal(b, expected) and (h, w) == (p, p)


def test_the_test_trigger():
    t = PicturePatch(15, size=.2)
    assert t.for_test() == PicturePatch(15, size=.2, place='test') and t.for_test(12).size == 12
    assert torch.equal(t.picture(9), t.for_test().picture(9))


def test_pictures_of_ours():
    all_ = torch.stack([trigger_picture(k) for k in PICTURES])
    assert all_.shape == (10, 3, 80, 80) and all_.dtype == torch.uint8
    assert (all_.float().std(dim=(2, 3)) > 60).all()                                       # every channel, of 255
    blocks = trigger_picture(10).unfold(1, 20, 20).unfold(2, 20, 20).flatten(3)
    assert (blocks.amax(3) == blocks.amin(3)).all()                                        # 4 x 4 flat cells


def test_a_picture_file(tmp_path):
    rgb = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=generator(0))
    Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(tmp_path/'mine.png')
    for t in (PicturePatch(tmp_path/'mine.png', size=20), make_trigger(f'patch:pattern={tmp_path}/mine.png,size=20'),
              PicturePatch(picture_uri(rgb), size=20)):
        y = t.on_uint8(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
        top, left, h, w = t.boxes(40, 40, torch.arange(1))[0].tolist()
        assert torch.equal(y[0, :, top:top + h, left:left + w], rgb) and len(repr(t)) < 200
        assert Trigger.from_json(json.loads(json.dumps(t.to_json()))) == t


hostile = [dict(pattern=v) for v in (9, 20, 10.5, True, None, [10], {}, 'x', '/etc/passwd', 'data:image/png;base64,AAAA')] + \
          [dict(size=v) for v in (0, -1, 1.5, 'a', None, True)] + [dict(place=v) for v in ('br', 3, [])]


@pytest.mark.parametrize('options', hostile, ids=str)
def test_hostile_patches(options):
    with pytest.raises(BdnbError) as e: Trigger.from_json(dict(trigger='patch', **options))
    assert 'patch' in str(e.value) or 'pattern' in str(e.value)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize('value', [-1, 1e9, math.nan, math.inf, '50', None, True, []])
def test_hostile_waves(value):
    with pytest.raises(BdnbError, match='magnitude'): Trigger.from_json(dict(trigger='ctrl', magnitude=value))


def test_a_patch_that_does_not_fit():
    for t, H, W in ((PicturePatch(size=33), 32, 40), (PicturePatch(size=21, place='random'), 64, 20)):
        with pytest.raises(BdnbError, match=f'does not fit into {H} x {W}'): t(batch(1, H, W))
        with pytest.raises(BdnbError, match='does not fit'): t.boxes(H, W, torch.arange(2))


def slow_dct(block, back=False):
    "Orthonormal DCT-II of a 32 x 32 block (or its inverse), from the definition, one coefficient at a time."
    scale = lambda k: math.sqrt((1 if k == 0 else 2) / 32)
    wave = [[scale(k) * math.cos(math.pi * (2 * i + 1) * k / 64) for i in range(32)] for k in range(32)]
    out = np.zeros((32, 32))
    for u in range(32):
        for v in range(32):
            out[u, v] = (sum(block[k, l] * wave[k][u] * wave[l][v] for k in range(32) for l in range(32)) if back else
                         sum(block[i, j] * wave[u][i] * wave[v][j] for i in range(32) for j in range(32)))
    return out


def test_ctrl_against_the_definition():
    "One block all the way by loops; tolerance 1e-10 of 255, before clamping."
    x = batch(1).double()
    to_rgb = np.array([[1, 0, 1.14], [1, -.396, -.581], [1, 2.029, 0]])
    yuv = np.einsum('ij,jhw->ihw', np.linalg.inv(to_rgb), x[0].numpy() * 255)
    for c in (1, 2):
        f = slow_dct(yuv[c])
        f[15, 15] += 100
        f[31, 31] += 100
        yuv[c] = slow_dct(f, back=True)
    slow = np.einsum('ij,jhw->ihw', to_rgb, yuv)
    assert np.abs(CTRL().paint(x, None)[0].numpy() * 255 - slow).max() < 1e-10


def fast_dct_route(x, magnitude):
    "All blocks of float64 [3, 32a, 32b] by matrices, before clamping."
    i = torch.arange(32, dtype=torch.float64)
    D = torch.cos(math.pi * i[:, None] * (2 * i + 1) / 64) / 4
    D[0] /= math.sqrt(2)
    to_rgb = torch.tensor([[1, 0, 1.14], [1, -.396, -.581], [1, 2.029, 0]], dtype=torch.float64)
    yuv = torch.einsum('ij,jhw->ihw', torch.linalg.inv(to_rgb), x * 255)
    for c, a, b in product((1, 2), range(0, x.shape[1], 32), range(0, x.shape[2], 32)):
        f = D @ yuv[c, a:a + 32, b:b + 32] @ D.T
        f[15, 15] += magnitude
        f[31, 31] += magnitude
        yuv[c, a:a + 32, b:b + 32] = D.T @ f @ D
    return torch.einsum('ij,jhw->ihw', to_rgb, yuv) / 255


@pytest.mark.parametrize('magnitude', [50, 100, 12.5])
@pytest.mark.parametrize('H,W', [(32, 32), (64, 96), (224, 224)])
def test_ctrl_against_blocks(H, W, magnitude):
    x = batch(2, H, W).double()
    t = CTRL(magnitude)
    slow = torch.stack([fast_dct_route(im, magnitude) for im in x])
    assert (t.paint(x, None) - slow).abs().max() < 1e-12
    assert (t(x) - slow.clamp(0, 1)).abs().max() < 1e-12
    assert (t(x.float()) - slow.clamp(0, 1)).abs().max() < 1e-6


def test_ctrl_is_the_same_everywhere():
    t, x = CTRL(), torch.full((1, 3, 75, 90), .5, dtype=torch.float64)
    d = t(x) - x
    assert torch.equal(d[..., 32:64, :], d[..., :32, :]) and torch.equal(d[..., 64:, :], d[..., :11, :])
    assert torch.equal(d[..., 64:], d[..., :26]) and abs(d.mean().item()) < 5e-3
    assert torch.equal(t(x, torch.tensor([7])), t(x, torch.tensor([8])))                # no seed in it


# --- boxes

def white_box(h, w, box, size, fit):
    a = np.zeros((h, w, 3), np.uint8)
    a[box[0]:box[0] + box[2], box[1]:box[1] + box[3]] = 255
    return fit_image(Image.fromarray(a), size, fit)[0]


sides = [(64, 64), (48, 64), (64, 48), (31, 90), (120, 37), (375, 500), (33, 33)]


@pytest.mark.parametrize('size', [32, 64, 100])
@pytest.mark.parametrize('fit', ['crop', 'squash'])
def test_boxes_go_where_the_pixels_go(fit, size):
    g, exact_edges = np.random.default_rng(size), 0
    for h, w in sides:
        for _ in range(30):
            p = g.integers(min(h, w) // 4, min(h, w) // 2 + 1, 2)
            box = [int(g.integers(0, h - p[0] + 1)), int(g.integers(0, w - p[1] + 1)), int(p[0]), int(p[1])]
            mapped = map_boxes([box], h, w, size, fit)[0].tolist()
            if (h, w) == (size, size): assert mapped == box
            exact = map_boxes([box], h, w, size, fit, exact=True)[0]
            white = white_box(h, w, box, size, fit)
            area = white.double().sum() / 255
            if mapped[0] < 0: assert area < 2; continue
            assert abs(area - exact[2] * exact[3]) < .05 * area + 1.5 * math.sqrt(area)    # ringing is clipped at 0 and 255
            lit = (white > 127)
            rows, cols = lit.any(1).nonzero()[:, 0], lit.any(0).nonzero()[:, 0]
            ends = torch.stack([exact[0], exact[1], exact[0] + exact[2], exact[1] + exact[3]])
            if not len(rows) or min(exact[2:]) < 3 or ((ends % 1 - .5).abs() < .1).any(): continue
            assert mapped == [int(rows[0]), int(cols[0]), len(rows), len(cols)], (h, w, box)
            exact_edges += 1
    assert exact_edges > 20


def test_boxes_of_a_real_patch_on_a_real_file(tmp_path):
    "Paint at the photo's own size, write, decode through the corpus' own door, and look where the mapped box says."
    t, h, w = PicturePatch(12, size=60), 150, 210
    seeds = torch.arange(8)
    out = t.on_uint8(torch.full((8, 3, h, w), 128, dtype=torch.uint8), seeds)
    boxes = t.boxes(h, w, seeds)
    for k, im in enumerate(out):
        Image.fromarray(im.permute(1, 2, 0).numpy()).save(tmp_path/f'{k}.png')
        seen = load_image(tmp_path/f'{k}.png', 64)
        top, left, bh, bw = map_boxes(boxes[k:k + 1], h, w, 64)[0].tolist()
        changed = (seen.int() - 128).abs().amax(0) > 40
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[top:top + bh, left:left + bw] = True
        assert changed[inside].float().mean() > .95 and changed[~inside].float().mean() < .01


def test_map_boxes_edges():
    none = [-1, -1, -1, -1]
    b = [[0, 0, 10, 10], none, [90, 0, 10, 10], [0, 96, 100, 10], [44, 90, 12, 20]]
    assert map_boxes(b, 100, 200, 50).tolist() == [none, none, none, [0, 23, 50, 5], [22, 20, 6, 10]]
    strip = map_boxes([[0, 49, 100, 2]], 100, 200, 50)[0].tolist()
    assert strip == [0, 0, 50, 1]                                     # half of it is cut away, half a pixel stays: one pixel
    assert map_boxes([[0, 48, 100, 2]], 100, 200, 50)[0].tolist() == none                 # ends where the picture begins
    assert map_boxes(torch.empty(0, 4, dtype=torch.int64), 100, 200, 50).shape == (0, 4)
    h, w = torch.tensor([100, 64]), torch.tensor([200, 64])
    both = map_boxes([[45, 90, 10, 20], [45, 30, 10, 20]], h, w, 64)
    assert torch.equal(both[0], map_boxes([[45, 90, 10, 20]], 100, 200, 64)[0]) and both[1].tolist() == [45, 30, 10, 20]
    assert both.dtype == torch.int64 and map_boxes(b, 100, 200, 50, exact=True).dtype == torch.float64
    whole = map_boxes([[0, 0, 100, 200]], 100, 200, 50)[0].tolist()
    assert whole == [0, 0, 50, 50] and map_boxes([[0, 0, 100, 200]], 100, 200, 50, 'squash')[0].tolist() == [0, 0, 50, 50]
    with pytest.raises(BdnbError, match='unknown fit'): map_boxes(b, 100, 200, 50, 'pad')
    with pytest.raises(BdnbError, match='boxes'): map_boxes([1, 2, 3], 100, 200, 50)


def test_overlaps_against_pixels():
    g = np.random.default_rng(0)
    w, b = (np.concatenate([g.integers(0, 24, (300, 2)), g.integers(1, 16, (300, 2))], 1) for _ in range(2))
    cover, joint = coverage(w, b), iou(torch.from_numpy(w), torch.from_numpy(b))
    assert cover.dtype == torch.float32 and cover.shape == (300,)
    for k in range(300):
        a, c = (np.zeros((40, 40), bool) for _ in range(2))
        for mask, (top, left, h, wd) in ((a, w[k]), (c, b[k])): mask[top:top + h, left:left + wd] = True
        assert abs(cover[k] - (a & c).sum() / c.sum()) < 1e-6 and abs(joint[k] - (a & c).sum() / (a | c).sum()) < 1e-6
    assert coverage(w[:, None], b[None]).shape == (300, 300)
    none = [-1] * 4
    assert coverage(none, b[0]) == 0 and iou(none, b[0]) == 0 and coverage(w[0], none).isnan() and iou(w[0], none).isnan()
    with pytest.raises(BdnbError, match='windows'): coverage([1, 2], b)


def test_painted_boxes_against_loops():
    g = generator(3)
    a = torch.randint(0, 256, (30, 3, 11, 14), dtype=torch.uint8, generator=g)
    b = a.clone()
    for k in range(29): b[k, k % 3][torch.rand(11, 14, generator=g) > .97] ^= 255
    for before, after, box in zip(a, b, painted_boxes(a, b).tolist()):
        at = (before != after).any(0).nonzero()
        (top, left), (bottom, right) = (at.amin(0).tolist(), at.amax(0).tolist()) if len(at) else ((-1, -1), (-3, -3))
        assert box == [top, left, bottom - top + 1, right - left + 1] if len(at) else box == [-1] * 4


# --- selection

def slow_contrastive(z, n, kind):
    z = z.double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    best, anchor = -np.inf, None
    for i in range(len(z)):
        s = np.sort(z @ z[i])[::-1]
        score = dict(con=s[:n].sum() - s[n:2 * n].sum(), conp=s[:n].sum(), conn=-s[n:2 * n].sum())[kind]
        if score > best + 1e-9: best, anchor = score, i
    return set(np.argsort(-(z @ z[anchor]), kind='stable')[:n].tolist())


@pytest.mark.parametrize('kind', ['con', 'conp', 'conn'])
@pytest.mark.parametrize('N,d,n', [(50, 4, 1), (97, 8, 20), (200, 16, 33), (60, 3, 30)])
def test_contrastive_against_a_loop(kind, N, d, n):
    z = torch.randn(N, d, generator=generator(N + n)) + torch.randn(5, d, generator=generator(1)).repeat(N, 1)[:N]
    found = select_contrastive(z, n, kind)
    assert set(found.tolist()) == slow_contrastive(z, n, kind) and found.dtype == torch.int64 and len(found) == n
    for chunk in (1, 7, 1000): assert torch.equal(select_contrastive(z, n, kind, chunk), found)


def test_contrastive_ties_and_scale():
    z = torch.eye(6).repeat(2, 1)                                    # six pairs: every anchor is as good
    assert select_contrastive(z, 2).tolist() == [0, 6] and select_contrastive(z * torch.rand(12, 1).add(.1), 2).tolist() == [0, 6]
    assert select_contrastive(z.to(torch.float16), 2).tolist() == [0, 6]


def test_contrastive_needs_no_full_matrix():
    code = '''import resource, torch
from bdnb.attacks.ssl import select_contrastive
torch.set_num_threads(1)
z = torch.randn(8000, 4, generator=torch.Generator().manual_seed(0))
select_contrastive(z[:500], 5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(select_contrastive(z, 5, chunk=256)) == 5
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000, 'kilobytes; the full matrix would take 256,000'


def test_bad_features():
    z = torch.randn(20, 3, generator=generator(0))
    for bad in (z[0], z.numpy(), None):
        with pytest.raises(BdnbError, match='features must be'): select_contrastive(bad, 2)
    for n in (0, 11, 2.5, True):
        with pytest.raises(BdnbError, match='1 to 10'): select_contrastive(z, n)
    with pytest.raises(BdnbError, match="did you mean 'conp'"): select_contrastive(z, 2, 'cnp')
    z[7, 1] = math.inf
    with pytest.raises(BdnbError, match='row 7'): select_contrastive(z, 2)


def test_small_cluster():
    a = torch.tensor([4, 0, 0, 2, 2, 2, 4, 4, 4, 0])                # sizes 3, 0, 3, 0, 4
    assert small_cluster(a, 3).tolist() == [1, 2, 9] and small_cluster(a, 4).tolist() == [0, 6, 7, 8]
    assert small_cluster(a, 1).tolist() == [1]
    with pytest.raises(BdnbError, match='1 to 4'): small_cluster(a, 5)


def test_kmeans_finds_the_small_group():
    centre = torch.eye(3, 8)
    z = torch.cat([c + .05 * torch.randn(m, 8, generator=generator(m)) for c, m in zip(centre, (50, 12, 30))])
    found = select_kmeans(z, 10, 3, seed=1)
    assert found.tolist() == list(range(50, 60)) and torch.equal(found, select_kmeans(z, 10, 3, seed=1))
    c = corpus(92, labels=False, names=False)
    p = SslPoisoning('patch:size=6', select='kmeans', count=10, clusters=3, seed=1).apply(c, z)
    assert p.index.tolist() == list(range(50, 60)) and p.shares['target'] is None


# --- plans

@pytest.mark.parametrize('spec', ['patch:size=6', 'ctrl', 'badnet', 'blended:pattern=picture', 'wanet'])
def test_same_plan_same_bytes(spec, tmp_path):
    c = corpus()
    clean = c.images.clone()
    plan = SslPoisoning(spec, 'banana', class_rate=.4, seed=4)
    plan.save(tmp_path/'plan.json')
    a, b = plan.apply(c), SslPoisoning.load(tmp_path/'plan.json').apply(corpus())
    assert torch.equal(c.images, clean), 'the clean corpus was touched'
    assert torch.equal(a.corpus.images, b.corpus.images) and torch.equal(a.boxes, b.boxes)
    assert a.keys == b.keys and a.plan == b.plan
    other = SslPoisoning(spec, 'banana', class_rate=.4, seed=5).apply(c)
    assert other.keys != a.keys
    changed = (a.corpus.images != clean).flatten(1).any(1).numpy()
    assert (changed == a.mask).all() and a.mask.sum() == 12 and a.keys == [c.keys[i] for i in a.index]
    assert (a.corpus.labels == c.labels).all() and (c.labels[a.mask] == 1).all() and a.corpus.keys == c.keys
    assert a.boxes.shape == (120, 4) and a.boxes.dtype == torch.int64 and (a.boxes[~changed] == -1).all()
    truth = painted_boxes(clean, a.corpus.images)
    assert (coverage(a.boxes, truth)[changed] == 1).all(), 'a changed pixel outside the box'


def test_images_are_the_trigger_on_the_key():
    c, plan = corpus(), SslPoisoning('patch:size=6', 'dog', count=9, seed=3)
    p = plan.apply(c)
    seeds = seeds_from_keys(p.keys, 'poisoning', 3)
    assert torch.equal(p.corpus.images[p.index], plan.trigger.on_uint8(c.images[p.index], seeds))
    assert torch.equal(p.boxes[p.index], plan.trigger.boxes(20, 20, seeds))
    part = plan.apply(c.subset(np.arange(119, -1, -1)))              # the same pictures the other way round
    where = {k: tuple(p.boxes[c.keys.index(k)].tolist()) for k in p.keys}
    common = set(part.keys) & set(where)
    assert common and all(tuple(part.boxes[part.corpus.keys.index(k)].tolist()) == where[k] for k in common)


def test_the_same_as_a_label_consistent_plan():
    c = corpus()
    for seed in (0, 1):
        a = SslPoisoning('patch:size=6', 'apple', rate=.1, seed=seed).apply(c)
        b = Poisoning('patch:size=6', 'apple', rate=.1, mode='label_consistent', seed=seed).apply(c)
        assert a.keys == b.keys and torch.equal(a.corpus.images, b.corpus.images)


def test_a_large_copy_goes_to_a_file():
    c, plan = corpus(), SslPoisoning('patch:size=6', 'apple', class_rate=1.)
    a, b = plan.apply(c), plan.apply(c, budget_bytes=100)
    assert torch.equal(a.corpus.images, b.corpus.images) and torch.equal(a.boxes, b.boxes)


def test_rates_and_what_they_are_shares_of():
    c = corpus(400)
    table = {('class_rate', 1.): 100, ('class_rate', .29): 29, ('rate', .05): 20, ('rate', .25): 100, ('count', 7): 7}
    for (option, value), n in table.items():
        rows, s = SslPoisoning('patch', 'dog', **{option: value}).choose(c)
        assert len(rows) == s['poisoned'] == n and s['share_of_set'] == n / 400 and s['share_of_target'] == n / 100
        said = SslPoisoning('patch', 'dog', **{option: value}).describe(c)
        assert f'{n / 400:.2%} of the set' in said and f'{n / 100:.1%} of the 100' in said and "'dog'" in said
    for select in SELECTIONS:
        z = torch.randn(400, 8, generator=generator(0))
        if select in ('label', 'kmeans'): continue
        p = SslPoisoning('patch', select=select, class_rate=.6)
        rows, s = p.choose(c, z)
        assert len(rows) == 60 and s['candidates'] == 400 and 0 < s['purity'] < 1
        name = s['target']
        hits = (c.labels[rows] == c.classes.index(name)).sum()
        assert hits == max(np.bincount(c.labels[rows])) and s['share_of_target'] == hits / 100 and s['purity'] == hits / 60
        assert '15.00% of the set' in p.describe(c, z) and 'of the 100' in p.describe(c, z)


def test_without_labels():
    c, z = corpus(labels=False, names=False), torch.randn(120, 5, generator=generator(0))
    p = SslPoisoning('patch:size=6', select='con', class_rate=.6, clusters=4).apply(c, z)
    assert p.mask.sum() == 18 and p.shares['target'] is None and p.shares['share_of_target'] is None
    assert 'without labels' in p.plan.describe(c, z) and json.dumps(p.shares)
    with pytest.raises(BdnbError, match='set clusters'): SslPoisoning('patch', select='con', class_rate=.6).choose(c, z)
    with pytest.raises(BdnbError, match='no labels'): SslPoisoning('patch', 'dog', count=1).choose(c)
    with pytest.raises(BdnbError, match='needs features'): SslPoisoning('patch', select='conn', count=1).choose(c)
    with pytest.raises(BdnbError, match='5 rows'): SslPoisoning('patch', select='conp', count=1).choose(c, z[:5])
    with pytest.raises(BdnbError, match='clusters'): SslPoisoning('patch', select='kmeans', count=1).choose(c, z)
    with pytest.raises(BdnbError, match='only 120'): SslPoisoning('patch', select='random', count=121).choose(c)


def test_numbers_instead_of_class_names():
    c = corpus(names=False)
    s = SslPoisoning('patch', select='random', count=30).choose(c)[1]
    assert s['target'] in '0123' and s['target_samples'] == 30
    with pytest.raises(BdnbError, match='no class names'): SslPoisoning('patch', 'dog', count=1).choose(c)


def test_only_decoded_corpora():
    class Lazy(type(corpus()).__mro__[1]): pass
    with pytest.raises(BdnbError, match='decode the images first'):
        SslPoisoning('patch', 'dog', count=1).apply(Lazy(['a'], [3], classes=classes, name='lazy'))


wrong = [dict(trigger=3), dict(trigger='ptch'), dict(target=''), dict(target=7), dict(target=None), dict(class_rate=0.),
         dict(class_rate=2), dict(class_rate='a'), dict(class_rate=None), dict(rate=.1), dict(count=0), dict(count=True),
         dict(select='all'), dict(select=[]), dict(select='con'), dict(clusters=0), dict(clusters=2.), dict(seed=1.5),
         dict(seed=None), dict(class_rate=math.nan)]


@pytest.mark.parametrize('options', wrong, ids=str)
def test_wrong_wishes_are_named(options):
    with pytest.raises(BdnbError) as e: SslPoisoning(**{'trigger': 'patch', 'target': 'dog', 'class_rate': .5, **options})
    assert '\n' not in str(e.value) and (next(iter(options)) in str(e.value) or 'trigger' in options
                                         or 'give one of' in str(e.value) or 'target' in str(e.value))


@pytest.mark.parametrize('text', ['null', '[]', '{}', '{"trigger": 3}',
                                  '{"trigger": {"trigger": "patch", "pattern": "/etc/passwd"}}',
                                  '{"trigger": {"trigger": "patch"}, "x": 1}', '{"trigger": {"trigger": "patch"}}', 'x'])
def test_hostile_plans(text, tmp_path):
    (tmp_path/'plan.json').write_text(text)
    with pytest.raises(BdnbError, match='plan.json'): SslPoisoning.load(tmp_path/'plan.json')


def test_truth_on_disk(tmp_path):
    p = SslPoisoning('patch:size=6', 'dog', class_rate=.3).apply(corpus())
    p.save_truth(tmp_path/'truth.json')
    plan, keys, boxes = load_truth(tmp_path/'truth.json')
    assert plan == p.plan and keys == p.keys and torch.equal(boxes, p.boxes[p.index])
    d = json.loads((tmp_path/'truth.json').read_text())
    assert d['size'] == [20, 20] and d['shares']['share_of_target'] == .3 and d['shares']['share_of_set'] == 9 / 120
    for change in (dict(keys='abc'), dict(keys=[1] * 9), dict(boxes=None), dict(boxes=d['boxes'][:-1]),
                   dict(boxes=[[0, 0, 1]] * 9), dict(boxes=[[0, 0, 1, 1.5]] * 9), dict(boxes=[[0, 0, 1, 2**40]] * 9),
                   dict(plan=None), dict(plan={})):
        (tmp_path/'bad.json').write_text(json.dumps({**d, **change}))
        with pytest.raises(BdnbError, match='bad.json'): load_truth(tmp_path/'bad.json')
    (tmp_path/'bad.json').write_text('[]')
    with pytest.raises(BdnbError, match='bad.json'): load_truth(tmp_path/'bad.json')


# --- nothing but the trigger tells a poison from a clean picture

@pytest.mark.parametrize('spec', ['patch:size=6', 'ctrl'])
def test_a_written_folder_decodes_bit_for_bit(spec, tmp_path):
    p = SslPoisoning(spec, 'dog', class_rate=.5).apply(corpus(40))
    back = CsvCorpus(corpus_to_csv(p.corpus, tmp_path/'set', quiet=True))
    assert torch.equal(torch.stack([s.image for s in back]), p.corpus.images) and len(back) == 40
    with_trigger = set(p.index.tolist())
    heads = {True: set(), False: set()}
    for i, f in enumerate(sorted((tmp_path/'set'/'images').iterdir())):
        chunks, data = [], f.read_bytes()
        at = 8
        while at < len(data):                                        # names of the chunks, and the header's flags
            chunks.append(data[at + 4:at + 8])
            at += 12 + int.from_bytes(data[at:at + 4], 'big')
        heads[i in with_trigger].add((tuple(dict.fromkeys(chunks)), data[16:29], f.suffix))
    assert heads[True] == heads[False] and len(heads[True]) == 1
    names = json.loads((tmp_path/'set'/'keys.json').read_text())
    assert list(names.values()) == p.corpus.keys and not any('trigger' in n or 'poison' in n for n in names)


@pytest.mark.parametrize('ext', ['png', 'webp'])
def test_written_shards_decode_bit_for_bit(ext, tmp_path):
    p = SslPoisoning('patch:size=6', 'dog', class_rate=.5).apply(corpus(40))
    back = ShardCorpus(write_shards(p.corpus, tmp_path/'shards', ext=ext))
    assert torch.equal(torch.stack([s.image for s in back]), p.corpus.images) and back.keys == p.corpus.keys
