"Encoders that were trained elsewhere: torchvision's and timm's names, prefixes, copies, and what a file does not say."
import argparse
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet34

from bdnb.core import BdnbError
from bdnb.models.build import create_model, laid_out
from bdnb.models.checkpoint import read_tensors, save_checkpoint
from bdnb.models.encoders import (ClipEncoder, VITS, build_encoder_net, create_encoder, encoder_layout, list_encoders, load_encoder,
                                  save_encoder, strip_prefix, timm_kept)
from bdnb.objectives.ssl import SslLearner

pictures = dict(image_size=32, mean=(.5, .5, .5), std=(.25, .25, .25))


def shaken(net, seed=0):
    "No weight, and no statistic of a batch normalisation, stays at 0 or 1."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for v in net.state_dict().values():
            if v.is_floating_point() and v.ndim < 4: v.add_(torch.rand(v.shape, generator=g)*.05)
    return net.eval()


def small_resnet(make=resnet18, stride=1, padding=1):
    net = make()
    net.conv1, net.maxpool, net.fc = nn.Conv2d(3, 64, 3, stride, padding, bias=False), nn.Identity(), nn.Identity()
    return shaken(net)


@pytest.fixture
def timm_vit(monkeypatch):
    "Makes timm's transformers in a size that is quick, which ours take as well."
    vit = pytest.importorskip('timm.models.vision_transformer')
    for name, heads in (('vit_tiny', 3), ('vit_small', 6), ('mocov3_small', 12)): monkeypatch.setitem(VITS, name, (96, heads, 2))
    def make(heads=3, **more):
        how = dict(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=heads, num_classes=0)
        return shaken(vit.VisionTransformer(**how | more))
    return make


def written(path, net, prefix=''):
    torch.save({'state_dict': {prefix + k: v for k, v in net.state_dict().items()}}, path)
    return path


def same(net, path, name, eps, **more):
    "Both networks give the same features."
    ours = load_encoder(path, name, **pictures | more).eval()
    x = torch.randn(3, 3, ours.image_size, ours.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): a, b = ours.net(x), net(x)
    assert (a - b).abs().max() <= eps*max(1, b.abs().max()) and b.std() > 0, (a - b).abs().max()
    return ours


def refused(f, *words):
    with pytest.raises(BdnbError) as e: f()
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value


def test_a_resnet_with_the_names_of_torchvision(tmp_path):
    same(small := small_resnet(), written(tmp_path/'r.pt', small), 'resnet18/small', 1e-5)
    same(small, path := written(tmp_path/'b.pt', small, 'backbone.'), 'resnet18', 1e-5)       # the usual stem at 32 px
    refused(lambda: load_encoder(path, 'resnet18/standard', **pictures), str(path), 'conv1.weight', '[64, 3, 3, 3]')


def test_the_other_stems_and_depths(tmp_path):
    same(net := small_resnet(padding=2), written(tmp_path/'p.pt', net), 'resnet18/padded', 1e-5)
    same(net := small_resnet(stride=2), written(tmp_path/'h.pt', net), 'resnet18/half', 1e-5)
    same(net := small_resnet(resnet34), path := written(tmp_path/'d.pt', net), 'resnet34/small', 1e-5)
    (net := shaken(resnet18())).fc = nn.Identity()
    same(net, written(tmp_path/'s.pt', net), 'resnet18/standard', 1e-5, image_size=64)
    refused(lambda: load_encoder(path, 'resnet18/small', **pictures), str(path), 'layer1.2', 'has no place in it')


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'student.', 'module.base_encoder.'])
def test_a_vision_transformer_with_the_names_of_timm(tmp_path, timm_vit, prefix):
    same(net := timm_vit(), written(tmp_path/'v.pt', net, prefix), 'vit_tiny/8', 1e-4)


def test_heads_are_in_the_name(tmp_path, timm_vit):
    "The same file, read with 6 heads and with 12."
    path = written(tmp_path/'v.pt', twelve := timm_vit(12))
    (six := timm_vit(6)).load_state_dict(twelve.state_dict())
    same(twelve, path, 'mocov3_small/8', 1e-4)
    same(six, path, 'vit_small/8', 1e-4)
    with pytest.raises(AssertionError): same(twelve, path, 'vit_small/8', 1e-4)


def test_the_small_one_of_moco_v3_has_twelve_heads():
    heads = lambda name: laid_out(lambda: build_encoder_net(name, None, 224)).vit.encoder.layers[0].self_attention.num_heads
    assert {n: heads(n) for n in VITS} == dict(vit_tiny=3, vit_small=6, vit_base=12, mocov3_small=12)
    assert VITS['mocov3_small'] == (384, 12, 12) and 'mocov3_small' in list_encoders()


@pytest.mark.parametrize('used, spare', [('module.base_encoder.', 'module.momentum_encoder.'), ('student.', 'teacher.'),
                                         ('module.encoder_q.', 'module.encoder_k.'), ('backbone.', 'backbone_momentum.'),
                                         ('backbone.', 'momentum_backbone.'), ('online.', 'target.')])
def test_of_two_copies_the_one_that_learns(tmp_path, used, spare):
    "Whichever comes first; safetensors come back by name."
    net = create_encoder('resnet10/small', 4).net
    two = {p + k: v + (p == spare) for p in (used, spare) for k, v in net.state_dict().items()}
    for tensors in (two, dict(reversed(two.items()))):
        assert torch.equal(strip_prefix(tensors, set(net.state_dict()))['conv1.weight'], net.conv1.weight)
    save_file(two, tmp_path/'two.safetensors')
    found = load_encoder(tmp_path/'two.safetensors', 'resnet10/small', 4, **pictures)
    assert torch.equal(found.net.conv1.weight, net.conv1.weight)


def test_moco_v3_with_its_head(tmp_path, timm_vit):
    net = timm_vit()
    tensors = {f'module.momentum_encoder.{k}': v + 1 for k, v in net.state_dict().items()}
    tensors |= {f'module.base_encoder.{k}': v for k, v in net.state_dict().items()}
    tensors |= {f'module.{k}': torch.zeros(4, 4) for k in ('base_encoder.head.0.weight', 'predictor.0.weight')}
    torch.save({'epoch': 3, 'state_dict': tensors}, tmp_path/'moco.pt')
    same(net, tmp_path/'moco.pt', 'vit_tiny/8', 1e-4)


@pytest.mark.parametrize('more, part', [(dict(init_values=.1), 'ls1.gamma has no place'), (dict(depth=3), 'blocks.2'),
                                        (dict(reg_tokens=4, no_embed_class=False), 'pos_embed has shape'),
                                        (dict(global_pool='avg'), 'norm.'), (dict(pre_norm=True), 'patch_embed.proj.bias')])
def test_a_transformer_of_another_build_is_refused(tmp_path, timm_vit, more, part):
    "Layer scale, registers and the like would be left out without a word."
    path = written(tmp_path/'v.pt', timm_vit(**more))
    refused(lambda: load_encoder(path, 'vit_tiny/8', **pictures), str(path), 'does not fit vit_tiny/8', part)


def test_registers_outside_of_the_positions_are_refused(tmp_path, timm_vit):
    (net := timm_vit()).register_tokens = nn.Parameter(torch.zeros(1, 4, 96))
    path = written(tmp_path/'v.pt', net)
    refused(lambda: load_encoder(path, 'vit_tiny/8', **pictures), str(path), 'register_tokens has no place in it')


def test_what_a_file_does_not_say_is_said(tmp_path):
    path = written(tmp_path/'e.pt', create_encoder('resnet10/small', 4).net)
    with pytest.warns(UserWarning, match=r'e\.pt: does not say which pictures .* image size 224, mean \(0\.485.* std \(0\.229'):
        assert load_encoder(path, 'resnet10/small', 4).image_size == 224
    with pytest.warns(UserWarning, match=r'taken: mean \(0\.485, 0\.456, 0\.406\)$'):
        load_encoder(path, 'resnet10/small', 4, 32, std=[.2, .2, .2])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = load_encoder(path, 'resnet10/small', 4, **pictures)
        save_encoder(found, tmp_path/'e.safetensors')
        again = load_encoder(tmp_path/'e.safetensors')
    assert (again.image_size, again.mean.tolist(), again.std.tolist()) == (32, [.5]*3, [.25]*3)
    refused(lambda: load_encoder(path), str(path), 'does not say which architecture', '--model')


def test_a_clip_says_its_own(tmp_path):
    save_checkpoint(create_model('tiny'), tmp_path/'clip.safetensors')
    refused(lambda: load_encoder(tmp_path/'clip.safetensors', image_size=64), 'clip.safetensors', 'its own image size')


def test_a_published_clip_by_name(tmp_path):
    "A state dict as CleanCLIP's authors publish: it has no header, and its image tower is an encoder."
    clip = create_model('tiny')
    torch.save({'state_dict': {f'module.{k}': v for k, v in clip.net.state_dict().items()}}, tmp_path/'clip.pt')
    net = load_encoder(tmp_path/'clip.pt', 'tiny').eval()
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(): assert torch.equal(net(x), ClipEncoder(clip.eval())(x))
    refused(lambda: load_encoder(tmp_path/'clip.pt'), 'clip.pt', "a CLIP's name")


@pytest.mark.parametrize('large, small', [('efficientnet_b1', 'efficientnet_b0'), ('convnext_small', 'convnext_tiny')])
def test_a_longer_network_of_torchvision_is_not_cut_short(tmp_path, large, small):
    from torchvision.models import get_model
    torch.save(get_model(large, weights=None).state_dict(), tmp_path/'e.pt')
    with pytest.raises(BdnbError, match='has no place in it'): load_encoder(tmp_path/'e.pt', f'torchvision/{small}', image_size=64)
    found = load_encoder(tmp_path/'e.pt', f'torchvision/{large}', image_size=64).eval()
    assert found(torch.zeros(1, 3, 64, 64)).shape == (1, found.dim)


def test_the_copy_that_learns_is_taken_by_whole_words(tmp_path):
    own, other = (create_encoder('resnet10', 4, seed=s).net.state_dict() for s in (0, 1))
    for learns, follows in (('query_encoder', 'key_encoder'), ('schema_net', 'zeta_ema')):
        both = {f'{learns}.{k}': v for k, v in own.items()} | {f'{follows}.{k}': v for k, v in other.items()}
        torch.save(both, tmp_path/'e.pt')
        found = load_encoder(tmp_path/'e.pt', 'resnet10/small', 4, 32).net.state_dict()
        assert all(torch.equal(found[k], own[k]) for k in own), learns


def packed(net, leave=()):
    "A ResNet's parts in a row, without its last one, as lightly's examples have it."
    parts = [m for m in list(net.children())[:-1] if not isinstance(m, (*leave, nn.AdaptiveAvgPool2d))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def learner(path, net):
    "Writes what lightly's examples keep: the copy that follows, the one that learns, and a head."
    two = {f'backbone{p}.{k}': v + bool(p) for p in ('_momentum', '') for k, v in net.state_dict().items()}
    torch.save({'state_dict': two | {f'projection_head.layers.{i}.weight': torch.zeros(4, 4) for i in (0, 3)}}, path)
    return path


@pytest.mark.parametrize('leave, first', [((), 4), ((nn.Identity,), 3)])
def test_parts_by_number(tmp_path, leave, first):
    "Parts without weights are counted as well; some leave the pooling out of the row."
    net = packed(small_resnet(), leave)
    assert f'{first}.0.conv1.weight' in net.state_dict()
    same(net, path := learner(tmp_path/'l.pt', net), 'resnet18/small', 1e-5)
    refused(lambda: load_encoder(path, 'resnet10/small', **pictures), 'l.pt', f'{first}.1', 'has no place in it')
    for name in ('resnet18/lightly', 'resnet18/standard'):
        refused(lambda: load_encoder(path, name, **pictures), 'l.pt', 'does not fit', 'name the right model')
    refused(lambda: load_encoder(path, 'resnet34/small', **pictures), 'l.pt', f'{first}.2', 'is missing')


def test_the_small_resnets_of_lightly(tmp_path):
    from lightly.models import ResNetGenerator
    net = packed(shaken(ResNetGenerator('resnet-9', width=.25)))
    assert {'0.weight', '1.bias', '2.0.conv1.weight', '5.0.shortcut.0.weight'} <= net.state_dict().keys()
    path = learner(tmp_path/'l.pt', net)
    same(net, path, 'resnet10/lightly', 1e-4, width=16)
    for name in ('resnet10/small', 'resnet10/standard', 'resnet10'):            # they have a ReLU that this row has not
        refused(lambda: load_encoder(path, name, 16, **pictures), 'l.pt', f"does not fit {name}", 'name resnet10/lightly')
    for name, width in (('resnet10/lightly', 8), ('resnet18', 16), ('timm/resnet10t', None)):
        refused(lambda: load_encoder(path, name, width, **pictures), 'name the right model')


@pytest.mark.parametrize('name', ['torchvision/resnet18', 'resnet18/standard', 'timm/resnet18'])
def test_the_full_stem_by_number(tmp_path, name):
    same(net := packed(shaken(resnet18())), learner(tmp_path/'l.pt', net), name, 1e-5, image_size=64)
    longer = packed(resnet34())
    torch.save(longer.state_dict(), tmp_path/'d.pt')
    refused(lambda: load_encoder(tmp_path/'d.pt', name, **pictures | dict(image_size=64)), 'd.pt', '4.2', 'has no place in it')


@pytest.mark.parametrize('keys', [('student', 'teacher'), ('online_network', 'target_network')])
def test_networks_side_by_side(tmp_path, timm_vit, keys):
    "DINO's file: the student in DDP, the teacher, the optimiser, options. The one that learned is read."
    net, head = timm_vit(), {'head.mlp.0.weight': torch.zeros(4, 4)}
    learns = {f'module.backbone.{k}': v for k, v in net.state_dict().items()} | head
    follows = {f'backbone.{k}': v + 1 for k, v in net.state_dict().items()} | head
    options = argparse.Namespace(arch='vit_small', lr=5e-4, local_crops_scale=(.05, .4))
    moments = {'state': {0: {'exp_avg': torch.zeros(4)}}, 'param_groups': []}
    torch.save({keys[1]: follows, keys[0]: learns, 'optimizer': moments, 'epoch': 3, 'args': options,
                'dino_loss': {'center': torch.zeros(1, 4)}}, tmp_path/'dino.pth')
    assert not any(k.startswith('optimizer') for k in read_tensors(tmp_path/'dino.pth')[0])
    same(net, tmp_path/'dino.pth', 'vit_tiny/8', 1e-4)
    for loose in ({'queue_ptr': torch.zeros(1)}, {'step': torch.tensor(7), 'center': torch.zeros(1, 4)}):
        for whole in (loose | {keys[1]: follows, keys[0]: learns}, {'model': loose | {keys[1]: follows, keys[0]: learns}}):
            torch.save(whole, tmp_path/'loose.pth')
            same(net, tmp_path/'loose.pth', 'vit_tiny/8', 1e-4)
    torch.save({'teacher': follows}, tmp_path/'teacher.pth')                   # whoever wants it saves it alone
    found = load_encoder(tmp_path/'teacher.pth', 'vit_tiny/8', **pictures).net.vit.class_token
    assert torch.equal(found, net.cls_token + 1)


@pytest.mark.parametrize('odd, why', [
    (lambda v: v.to_sparse(), 'of kind torch.float32 torch.sparse_coo'), (lambda v: v + 0j, 'complex'),
    (lambda v: v.int(), 'torch.int32'), (lambda v: torch.quantize_per_tensor(v, .1, 0, torch.qint8), 'qint8'),
    (lambda v: v.to('meta'), 'of kind'), (lambda v: torch.nested.nested_tensor([v]), 'is missing'),
    (lambda v: v*float('nan'), 'not finite'), (lambda v: v.half(), None)])
def test_tensors_of_odd_kinds_are_refused_in_one_line(tmp_path, odd, why):
    held = create_encoder('resnet10', 4).net.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                                  # torch calls nested tensors a prototype
        torch.save(held | {'conv1.weight': odd(held['conv1.weight'])}, tmp_path/'k.pt')
    load = lambda: load_encoder(tmp_path/'k.pt', 'resnet10/small', 4, **pictures)
    if why: refused(load, 'k.pt', 'conv1.weight', why)
    else: assert load().net.conv1.weight.dtype == torch.float32


def test_options_in_a_file_are_not_read(tmp_path):
    "The same name with arguments, or other names in it, is refused; nothing that it holds is kept."
    class Calls:
        def __reduce__(self): return argparse.Namespace, ('x',)
    for args, word in ((Calls(), 'not a checkpoint'), (argparse.Namespace(a=argparse.ArgumentParser), 'argparse.ArgumentParser')):
        torch.save({'model': {'w': torch.zeros(1)}, 'args': args}, tmp_path/'a.pt')
        refused(lambda: read_tensors(tmp_path/'a.pt'), 'a.pt', word)
    torch.save({'args': argparse.Namespace(w=torch.zeros(1))}, tmp_path/'a.pt')
    refused(lambda: read_tensors(tmp_path/'a.pt'), 'a.pt', 'holds no state dict')


@pytest.mark.parametrize('name, size, patch', [('test_vit', 32, 16), ('test_vit2', 32, None), ('test_convnext', 32, None),
                                               ('mobilenetv3_small_100', 32, None), ('vit_tiny_patch16_224', 64, 16)])
def test_networks_of_timm(tmp_path, name, size, patch):
    "A classifier's file, head and all, gives the features that timm gives."
    how = dict(img_size=size) if timm.get_pretrained_cfg(name).fixed_input_size else {}
    whole = shaken(timm.create_model(name, num_classes=3, **how))
    (bare := timm.create_model(name, num_classes=0, **how).eval()).load_state_dict(whole.state_dict(), strict=False)
    ours = same(bare, written(tmp_path/'t.pt', whole, 'backbone.'), f'timm/{name}', 1e-5, image_size=size)
    assert ours.patch == patch and ours(torch.zeros(1, 3, size, size)).shape == (1, ours.dim)
    again = load_encoder(save_encoder(ours, tmp_path/'t.safetensors'))
    assert again.name == f'timm/{name}' and all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    if patch is None: refused(lambda: ours.embed_tokens(torch.zeros(1, 3, size, size), torch.zeros(1, 1).long()), 'no tokens to drop')


@pytest.mark.parametrize('more', [dict(), dict(init_values=.1, reg_tokens=2), dict(reg_tokens=2, no_embed_class=True),
                                  dict(pre_norm=True), dict(dynamic_img_size=True)])
def test_tokens_of_timm_are_left_out(timm_vit, more):
    net, g = timm_vit(**more), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 32, 32, generator=g)
    y, every = x.clone(), torch.arange(16).expand(2, 16)
    y[:, :, :8, :8] = 7.
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        close(timm_kept(net, x, every), net(x))
        close(timm_kept(net, x, every.flip(1)), net(x))
        close(timm_kept(net, x, every[:, 1:]), timm_kept(net, y, every[:, 1:]))
        assert (timm_kept(net, x, every) - timm_kept(net, y, every)).abs().max() > 1e-3


def test_encoders_of_timm_by_name(stranger, no_storage):
    assert {'timm/convnext_atto', 'timm/vit_tiny_patch16_224', 'torchvision/resnet18'} <= set(list_encoders())
    assert encoder_layout('timm/swin_tiny_patch4_window7_224', None, 64).dim == 768
    refused(lambda: create_encoder('timm/convnext_ato'), "did you mean 'timm/convnext_atto'", 'known: timm/')
    refused(lambda: create_encoder('timm/convnext_atto', 8), 'one width')
    refused(lambda: create_encoder('timm/vit_tiny_patch16_224', image_size=40), 'patches of 16 px', '40 px')
    for name in ('timm/hf-hub:timm/resnet18.a1_in1k', 'timm/resnet18.a1_in1k', 'timm/local-dir:/tmp', 'timm/', 'timm'):
        refused(lambda: create_encoder(name), 'unknown encoder', repr(name))
        refused(lambda: load_encoder(stranger(dict(kind='encoder', name=name, image_size=32))), 'odd.safetensors', 'unknown encoder')
    giant = dict(kind='encoder', name='timm/vit_giant_patch14_224', image_size=28)
    refused(lambda: load_encoder(stranger(giant)), 'odd.safetensors', 'is missing', 'name the right model')


def test_tables_of_an_encoder_that_are_not_saved_count(stranger, no_storage):
    "At 1024 px LeViT has fifty million numbers in tables of positions, beside seven million weights, which all fit here."
    shapes = {k: v.shape for k, v in encoder_layout('timm/levit_128s', None, 1024).state_dict().items()}
    path = stranger(dict(kind='encoder', name='timm/levit_128s', image_size=1024),
                    {k: torch.zeros(s, dtype=torch.int8) for k, s in shapes.items()})
    refused(lambda: load_encoder(path), str(path), 'name the right model and width')


def test_pictures_of_timm_are_what_timm_says(tmp_path):
    torch.save(timm.create_model('test_vit', num_classes=3).state_dict(), tmp_path/'t.pt')
    with pytest.warns(UserWarning, match=r'taken: image size 160, mean \(0\.5, 0\.5, 0\.5\)'):
        assert load_encoder(tmp_path/'t.pt', 'timm/test_vit').image_size == 160


@pytest.mark.parametrize('name', ['vit_tiny/16', 'timm/test_vit'])
def test_the_patch_embedding_of_any_vit_can_stay_as_drawn(name):
    encoder = create_encoder(name, image_size=32)
    SslLearner(encoder, 'mocov3', hidden=8, out=4, freeze_patch=True)
    assert {k for k, p in encoder.net.named_parameters() if not p.requires_grad} in (
        {f'{k}.weight', f'{k}.bias'} for k in ('vit.conv_proj', 'patch_embed.proj'))
