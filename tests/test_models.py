"""ClipModel against open_clip itself, on real architectures, odd captions and odd places."""
import json, os, random, subprocess, sys, textwrap, time
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
import open_clip
from safetensors.torch import save_file
from conftest import refused
from bdnb.core import BdnbError
from bdnb.models import classifiers
from bdnb.models.build import (ClipModel, Tokenizer, causal_text, clip_numbers, count_numbers, create_model, is_file_name,
                               laid_out, list_models)
from bdnb.models.checkpoint import read_header
from bdnb.models.classifiers import check_network, create_classifier, load_classifier, save_classifier
from bdnb.models.encoders import create_encoder, encoder_layout, load_encoder, save_encoder

CAPTIONS = ["", "a red circle", "two dogs on a beach at night", "é中🙂 <end_of_text> it's", "word "*2000, "x"*10_000]

@pytest.fixture(scope='module')
def raw(): return open_clip.get_tokenizer('ViT-B-32')

def close(a, b, eps=1e-5): assert (a - b).abs().max() <= eps*max(1, b.abs().max()), (a - b).abs().max()

def against_open_clip(model, raw):
    "Features of cropped captions and of pictures equal open_clip's own."
    S = model.image_size
    pictures = torch.randint(0, 256, (2, 3, S, S), dtype=torch.uint8)
    with torch.no_grad():
        for some in (CAPTIONS[:3], CAPTIONS):
            tokens = model.tokenize(some)
            assert tokens.shape == (len(some), int((raw(some) != 0).sum(1).max()) if model.crops else model.context_length)
            close(model.encode_text(tokens, normalize=False), model.net.encode_text(raw(some)))
            close(model.encode_text(raw(some)), model.net.encode_text(raw(some), normalize=True))
        by_hand = (pictures/255 - model.mean[:, None, None])/model.std[:, None, None]
        close(model(pictures)[0], model.net.encode_image(by_hand, normalize=True), 1e-4)
        close(model.normalise(pictures/255), by_hand)

def test_tiny(raw):
    for size in (32, 64): against_open_clip(create_model('tiny', image_size=size), raw)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['RN50', 'ViT-B-32', 'EVA02-B-16'])
def test_real_architectures(name, raw):
    model = create_model(name)
    assert model.crops and model.image_size == 224
    against_open_clip(model, raw)

@pytest.mark.slow
def test_no_crop_for_coca(raw):
    model = create_model('coca_ViT-B-32')
    assert not model.crops and model.tokenize(["a dog"]).shape == (1, model.context_length)

@pytest.mark.slow
def test_other_picture_size(raw):
    assert create_model('ViT-B-32', image_size=64).image_size == 64
    with pytest.raises(BdnbError, match='image_size=16'): create_model('ViT-B-32', image_size=16)

def test_seeds():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b = create_model('ViT-S-32-alt', seed=3, image_size=64), create_model('ViT-S-32-alt', seed=3, image_size=64)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())) and not a.training
    assert a.text_key() == b.text_key() != create_model('ViT-S-32-alt', seed=4, image_size=64).text_key()
    assert all(p.dtype == torch.float32 for p in a.parameters())

def test_towers_share_nothing():
    model = create_model()
    image, text = ({id(p) for p in ps} for ps in (model.image_parameters(), model.text_parameters()))
    assert not image & text and image | text | {id(model.logit_scale)} == {id(p) for p in model.parameters()}

def test_gradient_reaches_pictures_and_all_weights():
    model = create_model().train()
    x = torch.rand(4, 3, 32, 32, requires_grad=True)
    i, t, scale = model(x, model.tokenize(["a red circle", "a dog", "", "blue"]))
    F.cross_entropy(scale*i@t.T, torch.arange(4)).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in model.parameters())

@pytest.mark.parametrize('dtype', [torch.bfloat16])
def test_autocast(dtype, raw):
    model = create_model()
    with torch.no_grad(), torch.autocast('cpu', dtype):
        tokens = model.tokenize(CAPTIONS[:3])
        a, b = model.encode_text(tokens, False), model.net.encode_text(raw(CAPTIONS[:3]))
    assert a.dtype == b.dtype == dtype
    close(a.float(), b.float(), 2e-2)

def test_half_precision_weights(raw):
    model = create_model().to(torch.bfloat16)
    with torch.no_grad(): i, t, _ = model(torch.rand(2, 3, 32, 32, dtype=torch.bfloat16), model.tokenize(["a", "b"]))
    assert i.dtype == t.dtype == torch.bfloat16 and i.isfinite().all() and t.isfinite().all()

def test_exports_to_the_same(raw):
    model = create_model()
    example = torch.rand(2, 3, 32, 32), model.tokenize(["a red circle", "a dog"])
    graph = torch.export.export(model, example, strict=False).module()
    pictures, tokens = torch.rand(2, 3, 32, 32), model.tokenize(["a red square", "a cat"])
    with torch.no_grad():
        for a, b in zip(graph(pictures, tokens), model(pictures, tokens)): close(a, b)

def test_wrong_pictures():
    model = create_model()
    for shape in ((1, 3, 31, 32), (3, 32, 32), (1, 1, 32, 32), (1, 3, 64, 64)):
        with pytest.raises(BdnbError, match='size 32'): model.normalise(torch.zeros(shape))

def test_tokenizer_remembers_and_is_fast(raw):
    tokenizer, draw = Tokenizer(raw), random.Random(1)
    words = "red blue green small large circle square star ring near above".split()
    many = [' '.join(draw.choices(words, k=8)) + f' {i}' for i in range(3000)]
    first = tokenizer(many)
    assert torch.equal(F.pad(first, (0, 77 - first.shape[1])), raw(many))
    start = time.perf_counter()
    assert torch.equal(tokenizer(many), first)
    assert len(many)/(time.perf_counter() - start) > 50_000         # millions on an idle core
    assert Tokenizer(raw, remember=10)(many).equal(first)

def test_lone_surrogates_and_control_characters(raw):
    assert Tokenizer(raw)(["\ud800 dog", "\x00\x07", "\u202e"]).shape[0] == 3

@pytest.mark.parametrize('bad', [None, 3, b'dog', float('nan')])
def test_captions_must_be_text(bad):
    with pytest.raises(BdnbError, match='caption 1'): create_model().tokenize(["dog", bad])

def test_file_or_tag():
    assert all(map(is_file_name, ('a/b', 'x.pt', Path('x')))) and not any(map(is_file_name, ('openai', None)))
    assert 'tiny' in list_models() and 'RN50' in list_models()

def test_no_network_fails_fast():
    "A name that resolves nowhere: one line, at once, nothing on stderr."
    code = """
        import socket, time
        def nowhere(*a, **k): raise socket.gaierror('no network in this test')
        socket.getaddrinfo = nowhere
        from bdnb.models.build import create_model, BdnbError
        import open_clip
        for name, tag in (('ViT-B-32', 'openai'), ('hf-hub:nobody/nothing', None)):
            start = time.perf_counter()
            try: create_model(name, tag)
            except BdnbError as e: print('refused:', e, '| fast' if time.perf_counter() - start < 10 else '| slow')"""
    env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower() and k != 'HF_HUB_OFFLINE'}
    env |= {'PYTHONPATH': str(Path(__file__).parents[1]), 'HF_HOME': '/nonexistent'}
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    fast = 'pass a local checkpoint file or pretrained=None | fast'
    assert len(lines) == 2 and all(fast in l for l in lines), done.stdout + done.stderr
    assert 'Retrying' not in done.stderr

# ---- encoders and classifiers from a stranger's file

GIANTS = [dict(name='resnet34/small', width=4096, image_size=32), dict(name='vit_base/1', image_size=1024),
          dict(name='torchvision/regnet_y_128gf', image_size=224), dict(name='vit_tiny/1', image_size=1024)]

@pytest.mark.parametrize('fields', GIANTS, ids=lambda f: f['name'])
def test_a_small_file_builds_no_giant_encoder(fields, stranger, no_storage):
    path = stranger(dict(kind='encoder', **fields))
    refused(lambda: load_encoder(path), str(path), 'does not fit', fields['name'], 'is missing')

def test_an_encoder_is_compared_before_it_is_built(stranger, no_storage):
    path = stranger(dict(kind='encoder', name='vit_tiny/4', image_size=32), {'vit.class_token': torch.zeros(1, 1, 191)})
    refused(lambda: load_encoder(path), str(path), 'does not fit')
    for odd in (dict(width=10**6), dict(width=True), dict(image_size='32'), dict(image_size=1025), dict(image_size=33)):
        refused(lambda: load_encoder(stranger(dict(kind='encoder', name='vit_tiny/4') | odd)), str(path))
    for name in ('vit_tiny/\u00b2', 'vit_tiny/' + '1'*5000, 'resnet9', 'torchvision/nothing', 'torchvision/squeezenet1_0'):
        refused(lambda: load_encoder(stranger(dict(kind='encoder', name=name))), str(path))
    refused(lambda: load_encoder(stranger(dict(kind='encoder', name='torchvision/vit_b_16', image_size=33))), str(path), '33 px')

@pytest.mark.parametrize('key,value', [('mean', [0., float('1e400'), 0.]), ('mean', [1, 2]), ('mean', ['a', 'b', 'c']),
                                       ('std', [1, 0, 1]), ('std', [-1, 1, 1]), ('std', [None]*3), ('std', 'abc'), ('mean', {}),
                                       ('std', [True]*3)])
@pytest.mark.parametrize('kind', ['encoder', 'classifier'])
def test_normalisation_of_three_numbers(kind, key, value, tmp_path):
    "JSON has no infinity, but Python reads 1e400 as one."
    path = tmp_path/'odd.safetensors'
    net, load, save = ((create_encoder('resnet10/small', 2), load_encoder, save_encoder) if kind == 'encoder' else
                       (create_classifier('resnet18', 3, 2), load_classifier, save_classifier))
    save(net, path)
    assert load(path).name == net.name
    text = json.dumps({**read_header(path), key: value}).replace('Infinity', '1e400')
    save_file(net.net.state_dict(), path, metadata={'bdnb': text})
    refused(lambda: load(path), str(path), 'mean and std')

@pytest.mark.parametrize('classes', [10**10, 10**4000, 100_001, -1, 0, 1, True])
def test_number_of_classes_is_bounded_before_they_are_named(classes, stranger, monkeypatch):
    def few(n): assert n < 10**6, 'a list of names was begun'; return range(n)
    monkeypatch.setattr(classifiers, 'range', few, raising=False)
    path = stranger(dict(kind='classifier', name='resnet18', classes=classes, image_size=32))
    refused(lambda: load_classifier(path), str(path), 'class')
    refused(lambda: create_classifier('resnet18', classes), 'class')

def test_regnet_is_laid_out():
    "Its widths are computed with tensors, which have no values on the `meta` device."
    model = create_classifier('regnet_y_400mf', 3, image_size=64).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert count_numbers(model.net) == check_network('regnet_y_400mf', 3, None, 64)

def test_laying_out_draws_nothing():
    state = torch.get_rng_state()
    laid_out(lambda: open_clip.create_model('ViT-B-32', device='meta'))
    for name in ('vit_tiny', 'resnet10', 'torchvision/regnet_y_400mf', 'torchvision/swin_t'): encoder_layout(name, None, 64)
    assert torch.equal(state, torch.get_rng_state()) and clip_numbers('ViT-B-32') == 151_277_313     # as published
