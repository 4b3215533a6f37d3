"Strange, broken and hostile picture files: each loads as RGB, or is named in one line."
import io, os, struct, threading, tracemalloc, warnings, zlib

import numpy as np
import pytest
import torch
from PIL import Image

from bdnb.core import BdnbError
from bdnb.data import images
from bdnb.data.images import BadImage, MAX_PIXELS, _eight_bits, decode_image, load_image

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(16, 0)
RGB = np.stack([RAMP, RAMP[:, ::-1], 255 - RAMP // 2], -1)


def saved(im, fmt, **kw):
    b = io.BytesIO()
    im.save(b, fmt, **kw)
    return b.getvalue()


def png(w, h, kind=0, depth=1, data=b''):
    "A PNG made by hand: any header, any data."
    def chunk(k, d): return struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, kind, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(data, 9)) + chunk(b'IEND', b''))


def one_line(name, src, says):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(BadImage) as e: decode_image(src, name)
    text = str(e.value)
    assert '\n' not in text and text.startswith(f'{name}: ') and says in text, text


def far(src, want):
    im = decode_image(src)
    assert im.mode == 'RGB' and im.size == (64, 16)
    return np.abs(np.asarray(im).astype(int) - want).max()


GREY3 = np.stack([RAMP] * 3, -1)


@pytest.mark.parametrize('what,src,want,tol', [
    ('grey png', lambda: saved(Image.fromarray(RAMP), 'PNG'), GREY3, 0),
    ('grey jpeg', lambda: saved(Image.fromarray(RAMP), 'JPEG', quality=100), GREY3, 2),
    ('16-bit png', lambda: saved(Image.fromarray(RAMP.astype(np.uint16) * 257), 'PNG'), GREY3, 0),
    ('16-bit tiff', lambda: saved(Image.fromarray(RAMP.astype(np.uint16) * 257), 'TIFF'), GREY3, 0),
    ('32-bit tiff', lambda: saved(Image.fromarray(RAMP.astype(np.int32) * 2**22), 'TIFF'), GREY3, 0),
    ('float tiff', lambda: saved(Image.fromarray(RAMP / np.float32(255)), 'TIFF'), GREY3, 0),
    ('16-bit rgb png', lambda: png(64, 16, 2, 16, b''.join(b'\0' + r.repeat(2).tobytes() for r in RGB.reshape(16, -1))), RGB, 0),
    ('cmyk jpeg', lambda: saved(Image.fromarray(RGB).convert('CMYK'), 'JPEG', quality=100), RGB, 6),
    ('palette png', lambda: saved(Image.fromarray(RGB).quantize(256), 'PNG'), RGB, 12),
    ('grey + alpha', lambda: saved(Image.fromarray(np.stack([RAMP, RAMP * 0 + 255], -1)), 'PNG'), GREY3, 0),
    ('rgba', lambda: saved(Image.fromarray(np.dstack([RGB, RAMP * 0 + 255])), 'PNG'), RGB, 0),
    ('webp', lambda: saved(Image.fromarray(RGB), 'WEBP', lossless=True), RGB, 0),
    ('bmp', lambda: saved(Image.fromarray(RGB), 'BMP'), RGB, 0),
    ('ppm', lambda: saved(Image.fromarray(RGB), 'PPM'), RGB, 0),
    ('two-frame gif', lambda: saved(Image.fromarray(RAMP), 'GIF', save_all=True,
                                    append_images=[Image.new('L', (64, 16))]), GREY3, 0),
    ('two-frame webp', lambda: saved(Image.fromarray(RGB), 'WEBP', lossless=True, save_all=True,
                                     append_images=[Image.new('RGB', (64, 16))]), RGB, 0),
])
def test_strange_files_load_as_rgb(what, src, want, tol):
    assert far(src(), want) <= tol


def test_bilevel_and_full_range_16_bit():
    assert set(np.unique(np.asarray(decode_image(saved(Image.fromarray(RAMP > 99), 'PNG'))))) == {0, 255}
    dark = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert np.asarray(decode_image(saved(Image.fromarray(dark), 'PNG')))[0, :, 0].tolist() == [0, 1, 128, 255]


def whole(im):
    "Eight bits of a deeper picture, all pixels at once."
    x = np.nan_to_num(np.asarray(im).astype(np.float64), nan=0., posinf=0., neginf=0.)
    lo, hi = float(x.min()), float(x.max())
    if im.mode.startswith('I;16') or (im.mode == 'I' and 0 <= lo and hi <= 65535): lo, hi = 0., 65535.
    elif im.mode == 'F' and 0 <= lo and hi <= 1: lo, hi = 0., 1.
    return ((x - lo) * (255 / max(hi - lo, 1e-300))).round().astype(np.uint8)


def deep_pictures(h, w):
    "Of every mode, with their ends far apart (in other blocks), negative numbers, NaN and infinities."
    r = np.random.default_rng(h)
    sixteen = r.integers(0, 65536, (h, w), dtype=np.uint16)
    yield from (Image.fromarray(sixteen), Image.frombytes('I;16B', (w, h), sixteen.byteswap().tobytes()))
    for x in (sixteen.astype(np.int32), r.integers(-2**31, 2**31, (h, w), dtype=np.int32), np.full((h, w), -3, np.int32)):
        yield Image.fromarray(x)
    for x in (r.random((h, w), np.float32), r.normal(0, 1e30, (h, w)).astype(np.float32), np.full((h, w), np.nan, np.float32)):
        x[0, 0], x[-1, -1] = x.min(), x.max()
        yield Image.fromarray(x)
        flat = x.reshape(-1)
        flat[:3], flat[-3:] = (np.nan, np.inf, -np.inf), (np.inf, np.nan, -np.inf)
        yield Image.fromarray(x)


@pytest.mark.parametrize('h,w', [(1, 9), (600, 900), (1, 300_001), (300_001, 1), (512, 512)])
def test_eight_bits_block_by_block_are_the_same(h, w):
    for im in deep_pictures(h, w): assert np.array_equal(np.asarray(_eight_bits(im)), whole(im)), im.mode


def test_deep_pictures_need_little_memory():
    "At most 8 bytes a pixel beside the 16-bit picture itself (all at once it was 24)."
    im = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (2048, 2048), dtype=np.uint16))
    tracemalloc.start()
    try: _eight_bits(im); peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 8 * 2048**2 + 10**7, f'{peak / 2048**2:.1f} bytes a pixel'


def test_transparency_is_white():
    clear = np.zeros((1, 2, 4), np.uint8)
    clear[0, 1] = 10, 20, 30, 255
    want = [[[255] * 3, [10, 20, 30]]]
    assert np.asarray(decode_image(saved(Image.fromarray(clear), 'PNG'))).tolist() == want
    assert np.asarray(decode_image(saved(Image.fromarray(clear), 'WEBP', lossless=True))).tolist() == want
    pal = Image.new('P', (2, 1), 0)
    pal.putpalette([0, 0, 0, 10, 20, 30])
    pal.putpixel((1, 0), 1)
    for kw in (dict(transparency=0), dict(transparency=b'\0\xff')):
        assert np.asarray(decode_image(saved(pal, 'PNG', **kw))).tolist() == want
    assert np.asarray(decode_image(saved(pal, 'GIF', transparency=0))).tolist() == want
    grey = Image.new('L', (2, 1), 7)
    grey.putpixel((1, 0), 9)
    assert np.asarray(decode_image(saved(grey, 'PNG', transparency=7)))[0, :, 0].tolist() == [255, 9]


NOISE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)), 'JPEG')


@pytest.mark.parametrize('src,says', [
    (b'', '0 bytes'), (b'\xff', 'not an image'), (b'<html></html>', 'not an image'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n', 'not an image'),
    (NOISE[:len(NOISE) // 2], 'damaged'), (NOISE[:30], 'image'), (png(9, 9, data=b''), 'damaged'), (png(9, 9, 7), 'image'),
    (png(0, 5), 'image'), (saved(Image.fromarray(RGB), 'WEBP')[:60], 'image'),
    (saved(Image.fromarray(RGB), 'GIF')[:200], 'image'),
    (saved(Image.effect_noise((99, 99), 80), 'GIF')[:5000], 'damaged'),
    (saved(Image.fromarray(RGB), 'TIFF')[:300], 'image'),
])
def test_broken_bytes_are_named(src, says):
    one_line('odd name.jpg', src, says)


def test_broken_paths_are_named(tmp_path):
    empty, page = tmp_path/'empty.jpg', tmp_path/'cut.jpg'
    empty.touch()
    page.write_bytes(NOISE[:1000])
    os.mkfifo(tmp_path/'pipe.jpg')
    for path, says in [(empty, '0 bytes'), (page, 'damaged'), (tmp_path/'none.jpg', 'no such'), (tmp_path, 'not a regular file'),
                       (tmp_path/'pipe.jpg', 'not a regular file'), (tmp_path/('x' * 400), 'cannot read'), ('a\0b.jpg', None)]:
        with pytest.raises(BadImage) as e: load_image(path, 8)
        assert says is None or (says in str(e.value) and path.name in str(e.value)), str(e.value)


@pytest.mark.filterwarnings('ignore::UserWarning:PIL')     # Pillow's remarks on broken TIFF tags
def test_every_flipped_byte_is_an_image_or_a_bad_image():
    rand = np.random.default_rng(1)
    for fmt in ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP', 'PPM'):
        good = np.frombuffer(saved(Image.fromarray(RGB), fmt), np.uint8)
        for _ in range(60):
            bad = good.copy()
            bad[rand.integers(0, min(len(bad), 400), 4)] = rand.integers(0, 256, 4)
            try: assert decode_image(bad.tobytes()).mode == 'RGB'
            except BadImage as e: assert '\n' not in str(e)


@pytest.mark.parametrize('w,h', [(20_000, 10_000), (9_000, 10_500), (8_193, 8_192), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_from_the_header(w, h, monkeypatch):
    "200 megapixels; the range in which Pillow only warns; just over our bound; absurd. Nothing is decoded and nothing is warned."
    def decoded(self, *a): raise AssertionError('the bomb was decoded')
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', decoded)
    one_line('bomb.png', png(w, h, data=bytes(1000)), 'too many pixels')


def test_a_real_bomb_and_a_bomb_inside_a_gif():
    one_line('real.png', png(20_000, 10_000, data=bytes(2501 * 10_000)), 'too many pixels')
    gif = (b'GIF89a' + struct.pack('<HHBBB', 1, 1, 0x80, 0, 0) + bytes(6) + b',' + struct.pack('<HHHHB', 0, 0, 60_000, 60_000, 0)
           + b'\x02\x02\x44\x01\x00;')
    one_line('frame.gif', gif, 'too many pixels')
    gif = gif.replace(struct.pack('<HH', 60_000, 60_000), struct.pack('<HH', 10_000, 10_000))
    one_line('frame.gif', gif, 'too many pixels')


def test_the_bound_is_a_parameter_and_the_default_is_inclusive():
    assert MAX_PIXELS == 2**26
    with pytest.raises(BadImage, match='10 x 10, at most 99'): decode_image(png(10, 10, data=bytes(30)), 'x', max_pixels=99)
    assert decode_image(png(10, 10, data=bytes(30)), 'x', max_pixels=100).size == (10, 10)


def test_callers_warning_filters_are_left_alone():
    before = list(warnings.filters)
    data = saved(Image.fromarray(RGB), 'PNG')
    threads = [threading.Thread(target=lambda: [decode_image(data) for _ in range(20)]) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert list(warnings.filters) == before and Image.MAX_IMAGE_PIXELS == 89478485


@pytest.mark.parametrize('w,h', [(4_000_000, 1), (1, 4_000_000)])
def test_strips_need_no_large_intermediate(w, h):
    "4 million pixels in a row would be 896 million after resizing the short side to 224."
    x = load_image(saved(Image.new('L', (w, h), 77), 'PNG'), 224)
    assert x.shape == (3, 224, 224) and x.dtype == torch.uint8 and (x == 77).all()


def test_options_are_checked():
    data = saved(Image.fromarray(RGB), 'PNG')
    for kw in (dict(size=0), dict(size=-4), dict(size=10**6), dict(size=8, fit='stretch')):
        with pytest.raises(BdnbError) as e: load_image(data, **kw)
        assert not isinstance(e.value, BadImage)


def test_a_jpeg_of_many_scans_is_not_decoded():
    "Each scan is a pass over the whole picture, and costs the file a few bytes."
    whole = saved(Image.fromarray(RGB), 'JPEG', progressive=True)
    last = whole.rindex(b'\xff\xda')
    far(whole, RGB)
    one_line('slow.jpg', whole[:-2] + whole[last:-2]*200 + whole[-2:], 'scans, at most 100')
    plain = saved(Image.fromarray(RGB), 'JPEG')
    split = 2**20 - 1 - plain.index(b'\xff\xda')                       # a marker across two blocks that are read
    comments = b''.join(b'\xff\xfe' + struct.pack('>H', 2 + n) + bytes(n) for n in [60_000]*17 + [split - 4 - 17*60_004])
    assert images._scans(io.BytesIO(plain[:2] + comments + plain[2:])) == 1


def test_large_pictures_are_decoded_one_after_another(monkeypatch):
    inside, most = [], []
    class Watch:
        def __enter__(self): inside.append(1); most.append(len(inside))
        def __exit__(self, *e): inside.pop()
    monkeypatch.setattr(images, '_large_lock', Watch())
    monkeypatch.setattr(images, 'LARGE', 64*16 - 1)
    decode_image(saved(Image.fromarray(RGB), 'PNG'))
    decode_image(saved(Image.fromarray(RGB[:8]), 'PNG'))
    assert most == [1] and not inside
