"BCU for encoders, for the image tower of a CLIP, and from a checkpoint and a folder to a checkpoint."
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import as_launched, leave_together, needs_fork, same, saved_by_two, state
from bdnb.core import BdnbError, derive_seed
from bdnb.data.batches import Batches
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.shapes import ShapeCaps
from bdnb.defenses.bcu import RATIOS, plan_reset, reset_weights, route
from bdnb.defenses.bcu_encoders import EncoderBCU, bcu_for, cleanse_checkpoint, load_any, neighbour_overlap
from bdnb.models.build import create_model
from bdnb.models.checkpoint import save_checkpoint
from bdnb.models.classifiers import create_classifier, load_classifier, save_classifier
from bdnb.models.encoders import create_encoder, encode, save_encoder
from bdnb.objectives.distill import crop, relational_loss

torch.set_num_threads(1)


def slim(): return create_classifier('resnet18', 12, width=8)


@pytest.fixture(scope='module')
def pool():
    c = ShapeCaps(36)
    return ArrayCorpus(c.images, c.keys, name='pool')


def test_a_checkpoint_and_a_folder(pool, tmp_path):
    (tmp_path/'pictures').mkdir()
    for i in range(30): Image.fromarray(pool.images[i].permute(1, 2, 0).numpy()).save(tmp_path/'pictures'/f'{i}.png')
    save_classifier(slim(), tmp_path/'old.safetensors')
    out = tmp_path/'new.safetensors'
    found = cleanse_checkpoint(tmp_path/'old.safetensors', tmp_path/'pictures', out, quiet=True, device='cpu', epochs=1,
                               batch_size=16, scale=2.)
    new = load_classifier(out)
    assert same(state(new), state(found.model)) and not same(state(new), state(slim())) and new.classes == slim().classes
    with pytest.raises(BdnbError, match="no option 'epoch'"):
        cleanse_checkpoint(tmp_path/'old.safetensors', tmp_path/'pictures', out, epoch=1)
    with pytest.raises(BdnbError, match='nothing'): cleanse_checkpoint(tmp_path/'old.safetensors', tmp_path/'nothing', out)
    with pytest.raises(BdnbError, match='none.safetensors'):
        cleanse_checkpoint(tmp_path/'none.safetensors', tmp_path/'pictures', out)


@pytest.mark.parametrize('kind', ['cosine', 'relational', 'softmax'])
def test_encoders(pool, kind):
    encoder = create_encoder('resnet10', 8)
    before = state(encoder)
    found = EncoderBCU(kind=kind, scale='auto', grid=(1., 8.), epochs=2, batch_size=16, held_out=.5).cleanse(
        encoder, pool, quiet=True, device='cpu')
    assert found.model is encoder and not same(before, state(encoder)) and found.held == 18
    (none, alone), (eight, agrees) = found.probes                          # four neighbours of seventeen
    assert (none, eight) == (0, 8) and 4/17 < alone <= 1 and 0 < found.agreement < 1
    assert found.scale == (8 if agrees >= alone - .5*(alone - 4/17) else 1)
    identity = create_encoder('resnet10', 8)
    EncoderBCU(scale=0).reset(identity)
    assert same(before, state(identity))
    with pytest.raises(BdnbError, match='not a Classifier'): EncoderBCU(kind=kind).cleanse(slim(), pool, quiet=True)


def test_few_pictures_have_few_neighbours():
    "Were all others neighbours, any two encoders would agree."
    how, g = EncoderBCU(), torch.Generator().manual_seed(0)
    assert [how.nearest(n) for n in (2, 5, 11, 40, 41, 500)] == [1, 1, 2, 9, 10, 10]
    a, b = (torch.randn(11, 8, generator=g) for _ in range(2))
    assert neighbour_overlap(a, b, how.nearest(11)) < .6 and how.chance(None, range(11)) == .2
    assert how.chance(None, range(2)) == 1                                 # one other: nothing can be measured


def test_shares_that_the_user_names_are_not_multiplied():
    assert bcu_for(slim()).scale == 'auto' and bcu_for(slim(), ratios=dict(stage4=.3)).scale == 1
    assert bcu_for(slim(), ratios=dict(stage4=.3), scale='auto').scale == 'auto'


def test_relations_are_compared_in_float32():
    z, t = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.eye(8, 16)
    with torch.autocast('cpu', torch.bfloat16): half = relational_loss(z, t)
    assert half == relational_loss(z, t)


def test_clip_keeps_its_text_tower(pool, tmp_path):
    clip = create_model('tiny', image_size=32)
    before = state(clip)
    save_checkpoint(clip, tmp_path/'clip.safetensors')
    EncoderBCU(scale=8., epochs=1, batch_size=18).cleanse(clip, pool, quiet=True, device='cpu')
    moved = {k for k, v in state(clip).items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith('net.visual.') for k in moved) and all(p.requires_grad for p in clip.parameters())
    assert same(state(load_any(tmp_path/'clip.safetensors')), before)
    with pytest.raises(BdnbError, match='corpus is empty'): EncoderBCU().cleanse(clip, pool.subset([]), quiet=True)
    for kind in ('relational', 'softmax'):
        with pytest.raises(BdnbError, match="where the text tower looks: for a CLIP use 'cosine'"):
            EncoderBCU(kind=kind).cleanse(clip, pool, quiet=True)


def one_of_two(rank, port, folder):
    as_launched(rank, port)
    clip, c = create_model('tiny', image_size=32), ShapeCaps(32)
    EncoderBCU(scale=8., epochs=3, batch_size=16).cleanse(clip, ArrayCorpus(c.images, c.keys), quiet=True, device='cpu')
    torch.save(state(clip), folder/f'{rank}.pt')
    leave_together()


@pytest.mark.slow
@needs_fork
def test_two_processes_cleanse_a_clip(tmp_path):
    "Six steps: from the second on, each would wait for gradients of a text tower that nobody ran."
    one, other = saved_by_two(one_of_two, tmp_path)
    learned = lambda w: {k: v for k, v in w.items() if 'running' not in k}               # statistics are of one's own pictures
    assert same(learned(one), learned(other)) and not same(one, state(create_model('tiny', image_size=32)))


@pytest.mark.parametrize('kind', ['cosine', 'relational', 'softmax'])
def test_options_of_bcu_mean_the_same_for_encoders(pool, kind):
    how, encoder = EncoderBCU(kind=kind, epochs=1), create_encoder('resnet10', 8)
    goal = how.objective(encoder, pool)
    assert torch.equal(goal.answers, encode(encoder, pool))                  # asked once, as classifiers are
    assert replace(how, ask_once=False).objective(encoder, pool).answers is None
    assert replace(how, crop_flip='crop').objective(encoder, pool).view is crop
    assert replace(how, t_squared=True).objective(encoder, pool).t_squared
    with pytest.raises(BdnbError, match="crop_flip='flip'"): replace(how, crop_flip='flip').objective(encoder, pool)
    batch = next(Batches(pool, 18, size=32).epoch(0))
    kept, asked = (replace(how, ask_once=once).objective(encoder, pool)(create_encoder('resnet10', 8, seed=1), batch)
                   for once in (True, False))
    assert float(kept[kind].detach()) == pytest.approx(float(asked[kind].detach()), abs=1e-5)


def test_every_layer_of_a_big_towers_image_side_is_routed():
    from open_clip.modified_resnet import ModifiedResNet
    class Tower(nn.Module):
        name, image_size = 'RN', 64
        def __init__(self):
            super().__init__()
            self.net = ModifiedResNet((1, 1, 1, 1), 32, heads=4, image_size=64, width=8)
            self.register_buffer('mean', torch.zeros(3))
        def forward(self, images): return self.net(images.float()/255)
    routed = dict(route(Tower()))
    pooled = {k for k in routed if k.startswith('attnpool.')}
    assert pooled == {f'attnpool.{k}_proj' for k in 'qkvc'} and {routed[k] for k in pooled} == {list(routed.values())[-1]}
    layers = {n for n, m in Tower().net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers == set(routed) and 'head' not in routed.values()


def test_the_bare_projection_of_a_vision_transformer_is_reset():
    "open_clip's `visual.proj` is a parameter of the tower, no layer of it."
    from open_clip.transformer import VisionTransformer
    class Tower(nn.Module):
        name, image_size = 'ViT', 16
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict(dict(visual=VisionTransformer(16, 8, 32, 4, 2, 4., output_dim=24), other=nn.Module()))
            self.net.other.proj = nn.Parameter(torch.zeros(4, 4))                    # belongs to what no picture passes
            self.register_buffer('mean', torch.zeros(3))
        def forward(self, images): return self.net['visual'](images.float()/255)
    tower = Tower()
    plan = {k: (stage, share) for k, stage, share in plan_reset(tower, scale=2.)}
    last = list(plan.values())[-1]
    assert list(plan)[-1] == 'visual.proj' and last == ('stage4', 2*RATIOS['stage4']) and 'other.proj' not in plan
    before = tower.net['visual'].proj.detach().clone()
    row = reset_weights(tower, plan_reset(tower, dict(stage4=.5), 1.))[-1]
    now = tower.net['visual'].proj.detach()
    assert row['parameter'] == 'visual.proj' and int((now != before).sum()) == row['replaced'] > 0
    assert float(now[now != before].std()) == pytest.approx(32**-.5, rel=.2)         # as large as open_clip's own
    assert [k for k, _, p in plan_reset(tower, {'visual.proj': .1}) if p] == ['visual.proj']
    with pytest.raises(BdnbError, match="no stage or layer 'other.proj'"): plan_reset(tower, {'other.proj': .1})


def test_an_encoder_of_timm_is_reset_by_its_own_start(pool):
    encoder = create_encoder('timm/test_vit', image_size=32)
    routed = dict(route(encoder))
    assert 'head' not in routed.values() and routed['patch_embed.proj'] == 'stem'
    before, fresh = state(encoder.net), create_encoder('timm/test_vit', image_size=32, seed=derive_seed('bcu fresh', 0)).net
    reset_weights(encoder, [('blocks.0.attn.qkv.weight', 'stage1', 1.)])
    assert torch.equal(encoder.net.blocks[0].attn.qkv.weight, fresh.blocks[0].attn.qkv.weight)
    assert not torch.equal(encoder.net.blocks[0].attn.qkv.weight, before['blocks.0.attn.qkv.weight'])


def test_encoder_file(pool, tmp_path):
    (tmp_path/'pictures').mkdir()
    for i in range(20): Image.fromarray(pool.images[i].permute(1, 2, 0).numpy()).save(tmp_path/'pictures'/f'{i}.png')
    save_encoder(create_encoder('resnet10', 8), tmp_path/'e.safetensors')
    options = dict(epochs=1, batch_size=9, scale=2., kind='relational')
    found = cleanse_checkpoint(tmp_path/'e.safetensors', tmp_path/'pictures', tmp_path/'new.safetensors', quiet=True, device='cpu',
                               **options)
    assert same(state(load_any(tmp_path/'new.safetensors')), state(found.model)) and 0 <= found.agreement <= 1


def test_neighbours_against_loops():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(12, 4, generator=g), torch.randn(12, 6, generator=g)
    def near(z, i):
        cos = [float(nn.functional.cosine_similarity(z[i], z[j], dim=0)) if j != i else -9 for j in range(12)]
        return set(sorted(range(12), key=lambda j: -cos[j])[:3])
    assert neighbour_overlap(a, b, 3) == pytest.approx(sum(len(near(a, i) & near(b, i))/3 for i in range(12))/12)

def test_classes_beside_an_encoder_are_refused_by_name(tmp_path):
    save_encoder(create_encoder('resnet10', 8), tmp_path/'encoder.safetensors')
    with pytest.raises(BdnbError, match=r"encoder\.safetensors.*--classes.*kind 'encoder'"):
        load_any(tmp_path/'encoder.safetensors', classes=10)


def test_one_picture_has_no_neighbours(tmp_path):
    "Of twelve pictures a tenth is one: with a given scale nothing is held out, without one it is said before anything is done."
    c = ShapeCaps(12)
    few, model = ArrayCorpus(c.images, c.keys, name='few'), create_encoder('resnet10', 8)
    given = EncoderBCU(scale=4., epochs=1, held_out=.1).sparing(12)
    assert given.held_out == 0 and given.cleanse(model, few, quiet=True, device='cpu').agreement is None
    auto = EncoderBCU(scale='auto', epochs=1, held_out=.1).sparing(12)
    with pytest.raises(BdnbError, match='few: 12 pictures are too few to hold out 10% of them'):
        auto.cleanse(model, few, quiet=True, device='cpu')
