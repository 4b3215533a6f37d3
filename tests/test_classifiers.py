"timm's classifiers by name: built at any size without a network, kept on disk, guarded against strangers' headers, reset by BCU."
import pytest
import timm
import torch
from torch import nn

from conftest import refused
from bdnb.core import BdnbError
from bdnb.defenses.bcu import BCU, RATIOS, stage_totals
from bdnb.defenses.bcu_encoders import load_any
from bdnb.models.classifiers import (check_network, create_classifier, list_classifiers, load_classifier, save_classifier,
                                     usual_pictures)

torch.set_num_threads(1)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
SMALL = [('convnext_atto', 32), ('vit_tiny_patch16_224', 32), ('resnet18', 32), ('mobilenetv3_small_050', 32),
         ('efficientnet_b0', 32), ('test_vit', 48), ('levit_128s', 64), ('mobilevit_xxs', 64), ('mixer_s32_224', 64)]
FIXED = [('swin_tiny_patch4_window7_224', 64), ('swinv2_tiny_window8_256', 64), ('beit_base_patch16_224', 64),
         ('maxvit_tiny_rw_224', 64), ('deit_tiny_distilled_patch16_224', 64), ('xcit_nano_12_p16_224', 64), ('coat_tiny', 64)]
BAD_NAMES = ['timm/hf-hub:timm/resnet18.a1_in1k', 'timm/hf_hub:timm/resnet18', 'timm/HF-HUB:timm/resnet18', 'timm/',
             'hf-hub:timm/resnet18', 'timm/local-dir:/tmp', 'timm/resnet18.a1_in1k', 'timm/timm/resnet18', 'timm/./resnet18',
             'timm//resnet18', 'timm', 'torchvision/timm/resnet18', 'timm/vit_b_16', 'timm/preactresnet18']


def header(**fields): return dict(kind='classifier') | fields


@pytest.mark.parametrize('name,size', SMALL)
def test_built_at_small_sizes(name, size):
    state = torch.get_rng_state()
    model = create_classifier(f'timm/{name}', ['a', 'b', 'c'], image_size=size, seed=1).eval()
    again = create_classifier(f'timm/{name}', 3, image_size=size, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with torch.no_grad(): out = model(torch.randint(256, (2, 3, size, size), dtype=torch.uint8))
    assert out.shape == (2, 3) and out.isfinite().all()
    own = timm.create_model(name, num_classes=3)
    assert model.net.state_dict().keys() == own.state_dict().keys() and type(model.net) is type(own)


@pytest.mark.parametrize('name,size', FIXED)
def test_networks_for_one_size_are_laid_out_at_another(name, size, no_storage):
    assert timm.get_pretrained_cfg(name).input_size[1] != size and check_network(f'timm/{name}', 3, None, size) > 10**6


def test_what_does_not_fit():
    refused(lambda: create_classifier('timm/convnext_atto', 3, width=8), 'timm/convnext_atto', 'timm', 'one width')
    refused(lambda: create_classifier('timm/vit_tiny_patch16_224', 3, image_size=40), 'patches of 16 px', '40 px')
    refused(lambda: create_classifier('timm/vit_tiny_patch16_224', 3, image_size=8), '8 px')
    refused(lambda: create_classifier('timm/crossvit_tiny_240', 3, image_size=64), 'timm/crossvit_tiny_240', '64 px')


def test_names():
    names = list_classifiers()
    theirs = [n for n in names if n.startswith('timm/')]
    assert {'timm/convnext_atto', 'timm/resnet18', 'resnet18', 'torchvision/resnet18', 'swin_t'} <= set(names)
    assert len(theirs) > 1000 and len(set(names)) == len(names) and not any(c in n for n in theirs for c in ':. ')
    refused(lambda: create_classifier('timm/convnext_ato'), "did you mean 'timm/convnext_atto'", 'known: timm/')
    refused(lambda: create_classifier('convnext_atto'), "did you mean 'timm/convnext_atto'", 'known: resnet18')
    refused(lambda: create_classifier('resnet81'), "did you mean 'resnet18'")


@pytest.mark.parametrize('name', BAD_NAMES)
def test_names_that_fetch_are_unknown(name, stranger, monkeypatch):
    def stop(*args, **options): raise AssertionError('timm was asked to build it')
    monkeypatch.setattr(timm, 'create_model', stop)
    refused(lambda: create_classifier(name, 3), 'unknown classifier', repr(name))
    path = stranger(header(name=name, classes=3, image_size=32))
    refused(lambda: load_classifier(path), str(path), 'unknown classifier')
    refused(lambda: load_classifier(stranger(header(name=name, classes=3))), 'unknown classifier')


def test_nothing_is_fetched(monkeypatch):
    asked, build = [], timm.create_model
    def note(*args, **options): asked.append(options); return build(*args, **options)
    monkeypatch.setattr(timm, 'create_model', note)
    create_classifier('timm/test_vit', 3, image_size=32)
    assert asked and all(o['pretrained'] is False for o in asked)


def test_a_small_file_builds_no_giant(stranger, no_storage):
    path = stranger(header(name='timm/vit_giant_patch14_224', classes=3, image_size=28))
    refused(lambda: load_classifier(path), str(path), 'name the right model')
    for odd in (dict(image_size=10**5), dict(image_size='32'), dict(classes=10**9), dict(width=4), dict(image_size=0)):
        with pytest.raises(BdnbError) as e: load_classifier(stranger(header(name='timm/test_vit', classes=3, image_size=32) | odd))
        assert str(path) in str(e.value) and 'a network was built' not in str(e.value)


def test_tables_that_are_not_saved_count(stranger, no_storage):
    "LeViT's grow with the fourth power of the side: fifty million numbers at 1024 px, beside nine million weights."
    assert check_network('timm/levit_128s', 3, None, 1024) > 4*10**7
    path = stranger(header(name='timm/levit_128s', classes=3, image_size=1024), {'a': torch.zeros(9_000_000, dtype=torch.int8)})
    refused(lambda: load_classifier(path), str(path), 'name the right model')


@pytest.mark.parametrize('name', ['timm/vit_tiny_patch16_224', 'timm/resnet18'])
def test_to_disk_and_back(name, tmp_path):
    model = create_classifier(name, ['a', 'b', 'c'], image_size=64, seed=3, mean=(.5, .4, .3), std=(.2, .3, .4)).eval()
    for load in (load_classifier, load_any):
        back = load(save_classifier(model, tmp_path/'m.safetensors'))
        assert (back.name, back.classes, back.image_size, back.width) == (name, ['a', 'b', 'c'], 64, None)
        x = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad(): assert torch.equal(model(x), back(x))


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet'])
def test_a_file_of_timm_gets_the_pictures_that_timm_names(name, tmp_path):
    path, cfg = tmp_path/'timm.pt', timm.get_pretrained_cfg(name)
    torch.save(timm.create_model(name, num_classes=3).state_dict(), path)
    for load in (load_classifier, load_any):
        with pytest.warns(UserWarning, match='does not say'): model = load(path, name=f'timm/{name}', classes=3)
        assert model.image_size == cfg.input_size[-1] == 160
        torch.testing.assert_close(model.mean, torch.tensor(cfg.mean))
        torch.testing.assert_close(model.std, torch.tensor(cfg.std))
    refused(lambda: load_classifier(path, name=f'timm/{name}', classes=4), str(path), '[4, ')
    refused(lambda: load_classifier(path, name='timm/test_vyt', classes=3), str(path), "did you mean 'timm/test_vit'")


def test_usual_pictures():
    assert usual_pictures('timm/vit_tiny_patch16_224') == dict(image_size=224, mean=(.5, .5, .5), std=(.5, .5, .5))
    assert usual_pictures('timm/inception_v3')['image_size'] == 299
    assert usual_pictures('timm/nothing') == usual_pictures('vit_b_16')         # refused a moment later


@pytest.mark.parametrize('name', ['convnext_atto', 'vit_tiny_patch16_224'])
def test_bcu_resets_by_depth(name):
    model = create_classifier(f'timm/{name}', 5, image_size=32)
    with torch.no_grad():
        for p in model.parameters(): p.add_(1.)                                # so that a fresh value differs from the old one
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    rows = BCU(scale=1.).reset(model)
    changed = {k for k, v in model.net.state_dict().items() if not torch.equal(v, before[k])}
    norms = {f'{n}.{k}' for n, m in model.net.named_modules() if isinstance(m, NORMS) for k, _ in m.named_parameters()}
    matrices = {f'{n}.weight' for n, m in model.net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert norms and norms.isdisjoint(changed) and matrices and matrices == {k for k in changed if k in matrices}
    assert changed <= {r['parameter'] for r in rows}
    totals = stage_totals(rows)
    assert list(totals) == ['stem', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
    for stage, (n, k) in totals.items(): assert abs(k - n*RATIOS[stage]) <= 6*(n*RATIOS[stage])**.5 + 1, (stage, n, k)
