"Triggers at odd sizes, in every dtype, in any company, from hostile JSON; and their bytes against slow references."
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bdnb.attacks.triggers import (SIG, TRIGGERS, BadNet, Blended, Stripes, Trigger, WaNet, list_triggers, make_trigger,
                                   picture_uri, pixels, seeds_from_keys, warp_field, wrap_bytes)
from bdnb.core import BdnbError

variants = ['badnet', 'badnet:place=random,pattern=noise', 'badnet:place=corners,pattern=yellow,margin=1',
            'badnet:place=center,pattern=dots', 'badnet:pattern=fixed-noise,size=.3',
            'badnet:pattern=solid,color=#00ff80,place=tl', 'badnet:pattern=noise,wrap_uint8=true',
            'blended', 'blended:pattern=picture', 'blended:pattern=fixed-noise,alpha=.5', 'blended:wrap_uint8=true',
            'sig', 'sig:mode=blend', 'sig:freq=3,wrap_uint8=true', 'wanet', 'wanet:s=3,k=2', 'wanet:mode=jitter',
            'stripes', 'stripes:kind=blend', 'stripes:colors=binary,place=br', 'stripes:kind=blend,alpha=.5,wrap_uint8=true']
sizes = [(32, 32), (33, 47), (64, 20), (8, 8)]


def batch(B=5, H=32, W=32, seed=0):
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed)) * .98 + .01


def seeds(B): return seeds_from_keys([f'picture-{i}' for i in range(B)], 7)


@pytest.mark.parametrize('H,W', sizes)
@pytest.mark.parametrize('spec', variants)
def test_shape_range_and_no_aliasing(spec, H, W):
    t, x = make_trigger(spec), batch(3, H, W)
    before = x.clone()
    y = t(x, seeds(3))
    assert y.shape == x.shape and y.dtype == x.dtype and 0 <= y.min() and y.max() <= 1
    assert torch.equal(x, before), 'the input was modified'
    assert not torch.equal(y, x)
    kept = y.clone()
    x.fill_(.5)
    assert torch.equal(y, kept), 'the output shares memory with the input'
    y.fill_(.25)  # a write into a result must not reach the trigger's own tables
    assert torch.equal(t(before, seeds(3)), kept)


@pytest.mark.parametrize('spec', variants)
def test_neighbours_do_not_matter(spec):
    t, x, s = make_trigger(spec), batch(17, 30, 30), seeds(17)
    whole = t(x, s)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    assert torch.equal(t(x[order], s[order]), whole[order])
    for i in (0, 9, 16): assert torch.equal(t(x[i:i + 1], s[i:i + 1]), whole[i:i + 1])
    assert torch.equal(t.on_uint8((x * 255).byte(), s)[3:8], t.on_uint8((x[3:8] * 255).byte(), s[3:8]))
    assert t(x[:0], s[:0]).shape == (0, 3, 30, 30)
    last = x.contiguous(memory_format=torch.channels_last)
    assert (t(last, s) - whole).abs().max() < 1e-6


@pytest.mark.parametrize('spec', variants)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(spec, dtype):
    t, x = make_trigger(spec), batch(3).to(dtype)
    y = t(x, seeds(3))
    assert y.dtype == dtype
    full = t(x.float(), seeds(3))
    if not t.wrap_uint8: assert (y.float() - full).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 1e-3)
    elif dtype in (torch.bfloat16, torch.float16): assert torch.equal(y, full.to(dtype))


@pytest.mark.parametrize('spec', variants)
def test_json_round_trip(spec, tmp_path):
    t, x = make_trigger(spec), batch(4)
    again = Trigger.from_json(json.loads(json.dumps(t.to_json())))
    assert again == t and torch.equal(again(x, seeds(4)), t(x, seeds(4)))
    t.save(tmp_path/'t.json')
    assert Trigger.load(tmp_path/'t.json') == t
    assert hash(again) == hash(t) and type(t).__name__ in repr(t)


@pytest.mark.parametrize('spec', ['badnet:pattern=noise,place=random', 'blended', 'stripes', 'stripes:kind=blend'])
def test_fresh_randomness_comes_from_the_seed(spec):
    t, x = make_trigger(spec), batch(1).expand(6, -1, -1, -1)
    s = torch.tensor([1, 2, 1, 2**62, -5, 0])
    y = t(x, s)
    assert torch.equal(y[0], y[2])
    assert len({tuple(p.flatten().tolist()) for p in y}) == 5
    state = torch.random.get_rng_state()
    t(x, s)
    assert torch.equal(state, torch.random.get_rng_state()), 'a trigger used the global generator'
    assert torch.equal(t(x), t(x, torch.arange(6)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('spec', variants)
def test_devices_agree(spec):
    t, x = make_trigger(spec), batch(9)
    far = t(x.cuda(), seeds(9))
    assert far.is_cuda and (far.cpu() - t(x, seeds(9))).abs().max() < (1 / 255 + 1e-6 if t.wrap_uint8 else 1e-5)


def test_wrap_is_what_topilimage_does():
    from torchvision.transforms.functional import to_pil_image
    assert wrap_bytes(torch.tensor([1.5, -.5, -1., 2.1])).tolist() == [126, 129, 1, 23]
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(np.array(to_pil_image(x))).permute(2, 0, 1)
    assert torch.equal(wrap_bytes(x).byte(), theirs)
    t = BadNet(pattern='noise', place='random', size=12, wrap_uint8=True)
    raw, bytes_ = t.paint(batch(4), seeds(4)), (t(batch(4), seeds(4)) * 255).round()
    assert raw.min() < 0 and raw.max() > 1  # wrapping was needed
    assert torch.equal(bytes_, torch.from_numpy(np.trunc(raw.numpy() * np.float32(255)) % 256))


def test_bytes_survive_where_the_trigger_is_not():
    x = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    for wrap in (False, True):
        y = BadNet(size=5, wrap_uint8=wrap).on_uint8(x)
        assert torch.equal(y[..., :27, :], x[..., :27, :]) and torch.equal(y[..., :27], x[..., :27])
    with pytest.raises(BdnbError, match='uint8'): BadNet().on_uint8(x.float())


def slow_patch(x, top, left, patch):
    out = x.clone()
    for b in range(len(x)):
        for c in range(3):
            for i in range(patch.shape[-2]):
                for j in range(patch.shape[-1]): out[b, c, top + i, left + j] = patch[c, i, j]
    return out


@pytest.mark.parametrize('place,at', [('tl', (2, 2)), ('tr', (2, 33)), ('bl', (19, 2)), ('br', (19, 33)), ('center', (10, 17))])
def test_places_against_a_slow_paste(place, at):
    x = batch(2, 26, 40)
    checker = torch.tensor([[(i + j) % 2 for j in range(5)] for i in range(5)]).float().expand(3, 5, 5)
    assert torch.equal(BadNet(size=5, place=place, margin=2)(x), slow_patch(x, *at, checker))


def test_random_places_are_all_that_fit_and_only_those():
    x = torch.full((4000, 3, 8, 9), .5)
    y = BadNet(size=6, place='random', pattern='white')(x, torch.arange(4000))
    corners = (y[:, 0] == 1).flatten(1).float().argmax(1)
    counts = {(int(c) // 9, int(c) % 9): int(n) for c, n in zip(*corners.unique(return_counts=True))}
    assert set(counts) == {(i, j) for i in range(3) for j in range(4)}
    assert max(counts.values()) < 1.3 * 4000 / 12 and min(counts.values()) > .7 * 4000 / 12
    assert ((y[:, 0] == 1).flatten(1).sum(1) == 36).all()


def test_noise_patch_has_the_pictures_mean():
    x = torch.tensor([.2, .5, .8])[None, :, None, None].expand(40, 3, 64, 64)
    raw = BadNet(size=64, pattern='noise').paint(x, torch.arange(40))
    assert (raw.mean((0, 2, 3)) - x[0, :, 0, 0]).abs().max() < .01 and abs(raw.std(dim=(2, 3)).mean() - 1) < .01


@pytest.mark.parametrize('H,W', sizes)
def test_sig_against_three_loops(H, W):
    slow = torch.zeros(3, H, W, dtype=torch.float64)
    for k in range(3):
        for i in range(H):
            for j in range(W): slow[k, i, j] = .3 * np.sin(2 * np.pi * 5 * j / W)
    x = batch(2, H, W).double()
    assert torch.allclose(SIG(delta=.3, freq=5.)(x), (x + slow).clamp(0, 1), atol=1e-12)
    assert torch.allclose(SIG(delta=.3, freq=5., mode='blend', alpha=.1)(x), (.9 * x + .1 * slow).clamp(0, 1), atol=1e-12)


def slow_warp(x, grid):
    "Bilinear sampling with aligned corners, one pixel at a time."
    H, W = x.shape[1:]
    out = torch.zeros_like(x)
    for i in range(H):
        for j in range(W):
            px, py = (grid[i, j, 0].item() + 1) / 2 * (W - 1), (grid[i, j, 1].item() + 1) / 2 * (H - 1)
            x0, y0 = min(int(px), W - 2), min(int(py), H - 2)
            a, b = px - x0, py - y0
            out[:, i, j] = ((1 - a) * (1 - b) * x[:, y0, x0] + a * (1 - b) * x[:, y0, x0 + 1]
                            + (1 - a) * b * x[:, y0 + 1, x0] + a * b * x[:, y0 + 1, x0 + 1])
    return out


@pytest.mark.parametrize('t', [WaNet(), WaNet(s=4., k=3), WaNet(mode='jitter'), WaNet(pattern_seed=3)])
def test_wanet_against_a_slow_warp(t):
    x = batch(2, 14, 19).double()
    grid = t.grid(14, 19)
    assert grid.abs().max() <= 1
    for b in range(2): assert torch.allclose(t(x)[b], slow_warp(x[b], grid[0].double()), atol=1e-6)


def test_wanet_fields():
    assert torch.equal(warp_field(32, 32, 4, 0), warp_field(32, 32, 4, 0))
    assert not torch.equal(warp_field(32, 32, 4, 0), warp_field(32, 32, 4, 1))
    small, large = warp_field(16, 16, 4, 0), warp_field(64, 64, 4, 0)
    knots = [0, 0, -1, -1], [0, -1, 0, -1]                                   # corners are the same at any size
    assert torch.allclose(small[0][knots], large[0][knots], atol=1e-5)
    step = lambda f: (f[0, 1:] - f[0, :-1]).abs().mean()
    assert step(large) < .1 * step(warp_field(64, 64, 0, 0))                 # smooth, or not


def test_patch_sizes():
    assert [pixels(16 / 224, s, s) for s in (224, 112, 96, 64, 32, 16)] == [16, 8, 7, 5, 5, 5]
    assert BadNet().size == Stripes().size == 16 / 224
    x = torch.full((1, 3, 224, 224), .5)
    assert (BadNet()(x) != x).any(1).sum() == 16 * 16


wrong = ['', 'badnt', 'badnet:sise=5', 'badnet:size=0', 'badnet:size=-3', 'badnet:size=0.0', 'badnet:size=1.01',
         'badnet:size=nan', 'badnet:size=big', 'badnet:size=true', 'badnet:place=middle', 'badnet:pattern=cheker',
         'badnet:color=red',
         'badnet:margin=-1', 'badnet:margin=.5', 'badnet:pattern_seed=x', 'badnet:size', 'badnet:wrap_uint8=2',
         'blended:alpha=1.5', 'blended:alpha=inf', 'blended:pattern=3', 'blended:pattern=no/such/file.png',
         'sig:mode=multiply', 'sig:freq=-1', 'sig:delta=x', 'wanet:k=1', 'wanet:k=2.5', 'wanet:k=100000', 'wanet:mode=rough',
         'wanet:s=-1', 'stripes:kind=path', 'stripes:colors=grey', 'stripes:alpha=-1', 'stripes:size=nan']


@pytest.mark.parametrize('spec', wrong)
def test_bad_options_are_named(spec):
    with pytest.raises(BdnbError) as e: make_trigger(spec)
    message = str(e.value)
    assert '\n' not in message and len(message) < 400
    if ':' in spec and 'file' not in spec: assert spec.split(':')[0] in message and spec.split(':')[1].split('=')[0] in message


def test_typing_errors_get_a_hint():
    typed = {'badnt': 'badnet', 'badnet:sise=5': 'size', 'badnet:pattern=cheker': 'checker', 'wanet:mode=smoth': 'smooth'}
    for spec, hint in typed.items():
        with pytest.raises(BdnbError, match=f"did you mean '{hint}'"): make_trigger(spec)


bad_images = [torch.rand(3, 32, 32), torch.rand(2, 1, 32, 32), torch.rand(2, 4, 32, 32), torch.rand(2, 3, 1, 32),
              torch.zeros(2, 3, 32, 32, dtype=torch.uint8), np.zeros((2, 3, 32, 32), np.float32), None]


@pytest.mark.parametrize('images', bad_images)
@pytest.mark.parametrize('name', TRIGGERS)
def test_bad_images(name, images):
    with pytest.raises(BdnbError, match=name): make_trigger(name)(images)


@pytest.mark.parametrize('seeds', [torch.arange(3), torch.arange(2.), [0, 1], torch.zeros(2, 1, dtype=torch.int64)])
def test_bad_seeds(seeds):
    with pytest.raises(BdnbError, match='seeds'): BadNet()(batch(2), seeds)


@pytest.mark.parametrize('t', [BadNet(size=33), BadNet(size=20, margin=7), Stripes(size=40)]
                         + [BadNet(size=2**40, pattern=p) for p in BadNet.patterns] + [Stripes(size=2**40)], ids=repr)
def test_patches_that_do_not_fit(t):
    "The error comes before the patch: one of 2^40 pixels would not fit into memory either."
    with pytest.raises(BdnbError, match='does not fit into 32 x 32'): t(batch(2))


hostile = [None, [], 'badnet', {}, dict(trigger=3), dict(trigger='badnet:size=5'), dict(trigger='nope'),
           *[dict(trigger='badnet', size=v) for v in ([5], None, '5', {})], dict(trigger='badnet', __class__=1),
           dict(trigger='badnet', pattern='/etc/passwd'), dict(trigger='sig', delta=1e400), dict(trigger='sig', mode={}),
           dict(trigger='wanet', s='x'), dict(trigger='stripes', margin=True),
           *[dict(trigger='blended', pattern=v) for v in ('kitty.png', '\\\\host\\x', 'http://example.org/x', ['noise'],
                                                          'data:image/png;base64,AAAA', 'data:image/png;base64,!!')]]


@pytest.mark.parametrize('d', hostile, ids=str)
def test_hostile_json(d, tmp_path):
    with pytest.raises(BdnbError): Trigger.from_json(d)


def test_json_may_not_open_a_file_that_exists(tmp_path):
    Image.new('RGB', (8, 8), 'red').save(tmp_path/'red.png')
    with pytest.raises(BdnbError, match='no file may be named'):
        Trigger.from_json(dict(trigger='blended', pattern=str(tmp_path/'red.png')))


def test_a_picture_bomb_in_json_is_refused():
    import base64, io
    Image.new('1', (9000, 9000)).save(f := io.BytesIO(), format='PNG')
    with pytest.raises(BdnbError, match='too many pixels'):
        Trigger.from_json(dict(trigger='blended', pattern='data:image/png;base64,' + base64.b64encode(f.getvalue()).decode()))


def test_pictures_travel_inside(tmp_path):
    rgb = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(tmp_path/'mine.png')
    x = torch.zeros(2, 3, 20, 20)
    for t in (Blended(alpha=1., pattern=str(tmp_path/'mine.png')), Blended(alpha=1., pattern=tmp_path/'mine.png'),
              make_trigger(f'blended:alpha=1.0,pattern={tmp_path}/mine.png'), Blended(alpha=1., pattern=picture_uri(rgb))):
        assert torch.equal((t(x)[0] * 255).round().byte(), rgb) and len(repr(t)) < 200
    patch = BadNet(size=20, pattern=picture_uri(rgb))
    assert torch.equal(patch.on_uint8(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0, :, 12:, 12:], rgb)
    assert Trigger.from_json(json.loads(json.dumps(patch.to_json()))) == patch
    big = picture_uri(torch.zeros(3, 1000, 500, dtype=torch.uint8))
    assert Blended(pattern=big)(batch(1)).shape == (1, 3, 32, 32)


def test_registry():
    for d in list_triggers():
        assert d['what'] and d['source'] and json.dumps(d)
        assert make_trigger(d['name'], **d['options']) == make_trigger(d['name'])
    with pytest.raises(dataclasses.FrozenInstanceError): BadNet().size = 3


def test_gradients_reach_the_picture():
    x = batch(2).requires_grad_()
    for name in set(TRIGGERS) - {'input_aware'}:          # that one has no weights before its attack has made them
        g, = torch.autograd.grad(make_trigger(name)(x).sum(), x)
        assert g.abs().sum() > 0
