"BCU: what is reset and what is not, on every kind of network; and what happens to a run that cannot go well."
import copy

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import as_launched, leave_together, needs_fork, refused, same, saved_by_two, state
from bdnb.core import BdnbError
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.doors import open_corpus
from bdnb.data.shapes import ShapeCaps
from bdnb.defenses.bcu import (BCU, RATIOS, SMALL_SCALE, Recovered, agreement, chance_agreement, hold_out, largest_scale,
                               plan_released, plan_reset, reset_weights, route, stage_totals)
from bdnb.models.classifiers import Classifier, classifier_logits, create_classifier
from bdnb.objectives.distill import Distillation, ask, drawn_view, kd_loss, temperature

torch.set_num_threads(1)
NETS = {'resnet18': 8, 'preactresnet18': 8, 'vgg11': 8, 'vgg16': 8, 'wrn16': 16, 'vit': 32}
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def slim(name='resnet18', classes=12, seed=0): return create_classifier(name, classes, width=NETS[name], seed=seed)


@pytest.fixture(scope='module')
def pool():
    c = ShapeCaps(36)
    return ArrayCorpus(c.images, c.keys, name='pool')                     # no labels, no captions


def quick(**options): return BCU(**{**dict(epochs=2, batch_size=16), **options})


@pytest.mark.parametrize('name', NETS)
def test_shares_by_stage_and_norms_untouched(name):
    model = slim(name)
    before = state(model)
    norms = {f'net.{n}.{k}' for n, m in model.net.named_modules() if isinstance(m, NORMS) for k in m.state_dict()}
    rows = reset_weights(model, plan_reset(model))
    after = model.state_dict()
    assert norms and all(torch.equal(before[k], after[k]) for k in norms)
    for stage, (n, k) in stage_totals(rows).items():
        p = RATIOS.get(stage, RATIOS['stage4'])
        assert abs(k - n*p) <= 6*(n*p*(1 - p))**.5 + 1, (stage, n, k)
    planned = {'net.' + r['parameter'] for r in rows}
    assert all(torch.equal(before[k], after[k]) for k in before.keys() - planned)
    stages = [s for _, s in route(model)]
    assert stages[0] == 'stem' and stages[-1] == 'head' and stages == sorted(stages, key=lambda s: (s == 'head', s != 'stem', s))


@pytest.mark.parametrize('name', ['torchvision/resnet18', 'densenet121', 'vit_b_32', 'convnext_tiny'])
def test_torchvision_networks_are_routed_to_the_end(name):
    model = create_classifier(name, 7, image_size=64)
    routed = route(model)
    plan = plan_reset(model)
    assert routed[0][1] == 'stem' and routed[-1][1] == 'head' and 'stage4' in {s for _, s in routed}
    norms = {f'{n}.{k}' for n, m in model.net.named_modules() if isinstance(m, NORMS) for k in m.state_dict()}
    assert norms.isdisjoint(k for k, _, _ in plan)
    matrices = {n for n, p in model.net.named_parameters() if p.ndim >= 2 and n.endswith('weight')}
    assert matrices <= {k for k, _, _ in plan}, matrices - {k for k, _, _ in plan}
    attention = {k.rsplit('.', 1)[-1] for k, _, _ in plan}
    if name == 'vit_b_32': assert {'in_proj_weight', 'in_proj_bias'} <= attention


def test_as_released_is_by_name():
    model = slim('resnet18')
    other = copy.deepcopy(model)
    reset_weights(model, plan_reset(model), seed=3)
    reset_weights(other, plan_released(other), seed=3)
    assert same(state(model), state(other))                              # the network it was written for
    shares = lambda name: {k: p for k, _, p in plan_released(slim(name))}
    assert set(shares('vgg16').values()) == {.01} and 'features.1.weight' in shares('vgg16')
    assert shares('preactresnet18')['linear.weight'] == .01 and shares('preactresnet18')['layer4.0.conv1.weight'] == .27
    assert 'position' not in shares('vit') and shares('vit')['norm.weight'] == .01


def test_nothing_reset_is_the_identity(pool):
    model = slim()
    before = state(model)
    BCU(scale=0).reset(model)
    assert same(state(model), before)
    batch = type('B', (), dict(images=pool.images[:8], epoch=0))
    assert Distillation(copy.deepcopy(model).eval())(model.eval(), batch)['kd'].abs() < 1e-6
    BCU(ratios={'stem': 1.}, seed=1).reset(model)
    changed = {k for k, v in state(model).items() if not torch.equal(v, before[k])}
    assert changed == {'net.conv1.weight'} and (model.net.conv1.weight != before['net.conv1.weight']).all()


def test_temperature_ends_exactly():
    for epochs in (1, 2, 3, 7, 10, 49, 100, 333): assert temperature(epochs - 1, epochs) == 4.
    assert temperature(0, 100) == pytest.approx(1.03) and temperature(49, 100) == 2.5


def test_gradient_is_that_of_soft_cross_entropy():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    s.requires_grad_()
    ours, = torch.autograd.grad(kd_loss(s, t, 3.), s)
    ce, = torch.autograd.grad(nn.functional.cross_entropy(s/3, (t/3).softmax(1)), s)
    assert torch.allclose(ours, ce, rtol=1e-12, atol=1e-15)


def test_same_seed_same_student_and_labels_are_not_read(pool):
    labelled = ArrayCorpus(pool.images, pool.keys, [i % 12 for i in range(len(pool))], name='pool')
    runs = []
    for corpus, seed in ((pool, 0), (labelled, 0), (pool, 1)):
        model = slim()
        found = quick(seed=seed).cleanse(model, corpus, quiet=True, device='cpu')
        assert found.model is model and found.seconds > 0 and found.history.rows[-1]['step'] == 6
        runs.append(state(model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_killed_and_resumed_ends_the_same(pool, tmp_path):
    whole, cut = slim(), slim()
    quick().cleanse(whole, pool, quiet=True, device='cpu')
    class Killed(Exception): pass
    def stop(model, epoch):
        if epoch == 1: raise Killed
    before = state(cut)
    with pytest.raises(Killed):
        quick().cleanse(cut, pool, out=tmp_path, checkpoint_every=1, quiet=True, device='cpu', on_epoch=stop)
    assert same(state(cut), before)                                       # an error hands the victim back as it was
    epochs = []
    quick().cleanse(cut, pool, out=tmp_path, checkpoint_every=1, quiet=True, device='cpu', on_epoch=lambda m, e: epochs.append(e))
    assert same(state(cut), state(whole)) and epochs == [1]                # the first epoch was not made again


def test_pools_of_any_size(pool):
    with pytest.raises(BdnbError, match='pool: the corpus is empty'): quick().cleanse(slim(), pool.subset([]), quiet=True)
    assert quick(epochs=1).cleanse(slim('vgg11'), pool.subset(range(17)), quiet=True, device='cpu').history.last('step') == 1
    assert quick(epochs=1).cleanse(slim(), pool.subset([4]), quiet=True, device='cpu').history.last('step') == 1
    large = ArrayCorpus(torch.randint(256, (8, 3, 48, 40), dtype=torch.uint8), name='large')
    assert quick(epochs=1).cleanse(slim(), large, quiet=True, device='cpu').history.last('step') == 1      # resized


def test_wrong_size_names_both_sizes():
    with pytest.raises(BdnbError, match=r'\[2, 3, 48, 48\].*32'): slim()(torch.zeros(2, 3, 48, 48))


def test_non_finite_logits_stop_the_run(pool):
    model = slim()
    with torch.no_grad(): model.net.fc.bias[0] = float('inf')
    model.net.fc.weight.requires_grad_(False)
    before = state(model)
    with pytest.raises(BdnbError, match='non-finite logits, first for'): quick().cleanse(model, pool, quiet=True, device='cpu')
    assert same(state(model), before) and not model.net.fc.weight.requires_grad and model.net.fc.bias.requires_grad
    with pytest.raises(BdnbError, match="'kd' is nan at step 0"):
        quick(ask_once=False).cleanse(model, pool, quiet=True, device='cpu')
    assert same(state(model), before) and not model.net.fc.weight.requires_grad and model.net.fc.bias.requires_grad


@pytest.mark.parametrize('options, words', [
    (dict(ratios={'layer9': .1}), "no stage or layer 'layer9'"), (dict(ratios={'stem': -1}), 'stem=-1'),
    (dict(scale=-1), 'scale=-1'), (dict(scale='some'), "scale='some'"), (dict(scale='auto', grid=(4., 2.)), 'ascending'),
    (dict(scale='auto', probe=0), 'probe=0'), (dict(scale='auto', tolerance=1.), 'tolerance=1'),
    (dict(held_out=1.5), 'held_out=1.5'), (dict(optimizer='adam'), 'adamw'),
    (dict(as_released=True, ratios={'stem': .1}), 'exclude'), (dict(t_start=0), 'positive'), (dict(epochs=0), 'epochs')])
def test_bad_options(pool, options, words):
    model = slim()
    before = state(model)
    with pytest.raises(BdnbError, match=words): quick(**options).cleanse(model, pool, quiet=True)
    assert same(state(model), before)


def test_a_network_without_a_route_lists_its_layers(pool):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 6, 1)
        def forward(self, x): return self.c(self.b(self.a(x))).mean((2, 3))[:, :2]
    model = Classifier(Odd(), 'mine', 2)
    with pytest.raises(BdnbError, match='mine: no routing by depth.*Layers: a, b, c'): quick().cleanse(model, pool, quiet=True)
    before = state(model)
    BCU(ratios={'c': 1}).reset(model)
    assert {k for k, v in state(model).items() if not torch.equal(v, before[k])} == {'net.c.weight', 'net.c.bias'}
    with pytest.raises(BdnbError, match='not a Sequential'): quick().cleanse(nn.Sequential(), pool)

def test_attention_pooling_is_routed_though_never_called():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        def forward(self, x): return nn.functional.linear(x.mean((2, 3)), self.q.weight, self.q.bias)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.pool, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), Pool(), nn.Linear(8, 5)
        def forward(self, x): return self.head(self.pool(self.body(self.stem(x))))
    names = [n for n, _ in route(Classifier(Net(), 'mine', 5))]
    assert names == ['stem', 'body', 'pool.q', 'pool.out', 'head']


def test_auto_scale_reads_no_label_and_is_the_same_again(pool):
    labelled = ArrayCorpus(pool.images, pool.keys, [i % 12 for i in range(len(pool))], name='pool')
    auto = dict(scale='auto', grid=(1., 4., 16.), held_out=.25, tolerance=.1)
    found, states = [], []
    for corpus in (pool, labelled):
        model = slim()
        found.append(quick(**auto).cleanse(model, corpus, quiet=True, device='cpu'))
        states.append(state(model))
    a, b = found
    assert same(*states) and a.scale == b.scale and a.probes == b.probes and a.agreement == b.agreement
    assert a.scale in (1, 4, 16) and a.probes[0][0] == 0 and len(a.probes) <= 3
    held = pool.split(.25, 0)[0]
    says = classifier_logits(slim(), held).argmax(1)
    chance = sum(float((says == k).double().mean())**2 for k in range(12))
    need = a.probes[0][1] - .1*max(0., a.probes[0][1] - chance)
    assert all((agrees >= need) == (scale <= a.scale) for scale, agrees in a.probes[1:]) or a.scale == 1
    fixed = slim()                                                        # the same student as with that number given
    again = quick(scale=a.scale, held_out=.25).cleanse(fixed, pool, quiet=True, device='cpu')
    assert same(state(fixed), states[0]) and again.agreement == a.agreement and again.probes == ()


def test_a_small_automatic_scale_leaves_doubts():
    found = {scale: Recovered(None, None, 0., scale=scale, agreement=.9, probes=((0., .95),)).doubt for scale in (2., SMALL_SCALE, 8.)}
    assert 'scale 2' in found[2.] and found[SMALL_SCALE] and not found[8.]
    assert not Recovered(None, None, 0., scale=1.).doubt                  # the user's own choice
    assert not Recovered(None, None, 0., scale=4., probes=((0., .95), (4., .9))).doubt       # nothing larger was asked for


def test_bisection_needs_few_probes():
    grid = BCU().grid
    assert len(grid) == 6
    for right in grid:
        scale, probed = largest_scale(lambda s: float(s <= right), grid, .5)
        assert scale == right and len(probed) <= 3 and len(set(probed)) == len(probed)
    assert largest_scale(lambda s: 0., grid, .5)[0] == 1


def test_one_scale_in_the_grid_is_nothing_to_pick(pool):
    done = quick(epochs=1, scale='auto', grid=(2.,)).cleanse(slim(), pool, quiet=True, device='cpu')
    assert done.scale == 2 and done.probes == () and not done.doubt


def test_agreement_counts_names(pool):
    a, b = slim(), slim(seed=1)
    says = classifier_logits(a, pool).argmax(1)
    with torch.no_grad(): b.net.fc.bias[says[0]] += 1e4                     # b has one name for everything
    share = float((says == says[0]).double().mean())
    assert agreement(a, a, pool) == 1 and agreement(a, b, pool) == agreement(b, a, pool) == share
    with torch.no_grad(): b.net.fc.bias[(says.max() + 1) % 12] += 1e5       # and now one that a gives to none
    assert agreement(a, b, pool) == float((says == (says.max() + 1) % 12).double().mean()) < 1


def test_a_guess_of_the_commonest_name_is_worth_nothing(pool):
    "Where nine of ten pictures have one name, calling everything so agrees to 90 %, and must not pass."
    teacher = slim()
    says = classifier_logits(teacher, pool).argmax(1)
    by_hand = sum((float((says == k).sum())/len(pool))**2 for k in range(12))
    assert abs(chance_agreement(teacher, pool) - by_hand) < 1e-12
    class Mostly(BCU):
        def distil(self, model, *args, **options): model.scale = self.scale
        def agreement(self, model, *args): return .98 if model.scale == 0 else .95 if model.scale <= 4 else .9
        def chance(self, *args): return .9**2 + .1**2
    scale, probes = Mostly(scale='auto', tolerance=.4).pick_scale(teacher, pool, pool)
    assert scale == 4 and probes[0] == (0., .98)


def test_frames_of_a_track_are_on_one_side(pool):
    tracks = pool._with(keys=[f'{i//4}_{i%4}' for i in range(len(pool))])
    rest, held = hold_out(tracks, .2, 32, 0, '(.*)_')
    assert held.labels is None and len(rest) + len(held) == len(pool)
    assert not {k.split('_')[0] for k in held.keys} & {k.split('_')[0] for k in rest.keys}
    with pytest.raises(BdnbError, match='does not match this key'): quick(scale='auto', group='x(.*)').cleanse(slim(), tracks, quiet=True)


def test_stages_where_three_pixels_become_two():
    found = {k: s for k, s, _ in plan_reset(create_classifier('resnet18', 12, width=4, image_size=12))}
    assert found['layer4.1.conv2.weight'] == 'stage4' and found['layer3.0.conv1.weight'] == 'stage3'


def test_shifts_without_mirrors(pool):
    x = pool.images[:6]
    a, b = (drawn_view(kind)(x, torch.Generator().manual_seed(3)) for kind in ('crop', True))
    mirrored = ((a != b).flatten(1).any(1)).sum()
    assert 0 < mirrored < 6 and drawn_view(False) is None
    with pytest.raises(BdnbError, match="crop_flip='flip'"): quick(crop_flip='flip').cleanse(slim(), pool, quiet=True)


def test_known_answers_and_asking_again_teach_the_same(pool):
    once, again = slim(), slim()
    quick(epochs=1).cleanse(once, pool, quiet=True, device='cpu')
    quick(epochs=1, ask_once=False).cleanse(again, pool, quiet=True, device='cpu')
    for k, v in state(once).items(): assert torch.allclose(v.float(), state(again)[k].float(), atol=1e-4), k
    half = quick(epochs=1, half_teacher=True, ask_once=False).cleanse(slim(), pool, quiet=True, device='cpu')
    assert half.history.last('kd') > 0


def test_a_teacher_in_half_precision_answers_so_whether_or_not_it_is_asked_once(pool):
    teacher = slim().eval()
    whole, half = (quick(half_teacher=h).known(teacher, pool) for h in (False, True))
    asked = ask(teacher, pool.images, half=True)
    assert half.dtype == torch.float32 and not half.equal(whole)
    assert torch.allclose(half, asked, atol=2e-2*float(whole.abs().max())) and torch.allclose(half, whole, rtol=0, atol=.1)


class Stop(Exception): pass


def stop(*_): raise Stop


def test_channels_last_learns_the_same_and_goes_on_after_a_kill(pool, tmp_path):
    "Equal up to rounding; the weights lie as they did; bit for bit when killed, with the teacher asked at every step or once."
    plain = slim()
    quick(epochs=1).cleanse(plain, pool, quiet=True, device='cpu')
    for view in (False, True):
        how, whole, parts = quick(epochs=1, channels_last=True, crop_flip=view), slim(), slim()
        run = lambda model, **o: how.cleanse(model, pool, quiet=True, device='cpu', **o)
        run(whole)
        assert all(v.is_contiguous() for v in whole.state_dict().values())
        if not view: assert all(torch.allclose(v.float(), state(whole)[k].float(), atol=1e-3) for k, v in state(plain).items())
        out = dict(out=tmp_path/f'view{view}', checkpoint_every=1)
        with pytest.raises(Stop): run(parts, on_epoch=stop, **out)
        assert same(state(parts), state(slim())) and all(v.is_contiguous() for v in parts.state_dict().values())
        run(parts, **out)
        assert same(state(parts), state(whole))


@pytest.mark.parametrize('view', [False, True])
def test_a_run_of_another_scale_or_victim_is_not_gone_on_from(pool, tmp_path, view):
    how = quick(scale=0., crop_flip=view)
    def begun(cure, model, **options):
        return cure.cleanse(model, pool, out=tmp_path, checkpoint_every=1, quiet=True, device='cpu', **options)
    victim = slim()
    with pytest.raises(Stop): begun(how, victim, on_epoch=stop)
    assert same(state(victim), state(slim()))                                # after an error it is what it was
    with pytest.raises(BdnbError, match=r'recipe was .*, is '): begun(quick(scale=8., crop_flip=view), slim())
    with pytest.raises(BdnbError, match=r"weights was \w+, is \w+"): begun(how, slim(seed=1))
    assert begun(how, victim).history.last('step') == 6


def test_probes_are_not_made_again_after_a_kill(pool, tmp_path, monkeypatch):
    seen, plain = [], BCU.distil
    monkeypatch.setattr(BCU, 'chance', lambda self, *args: 0.)
    monkeypatch.setattr(BCU, 'distil', lambda self, *a, **o: (seen.append(o), plain(self, *a, **o))[1])
    run = lambda seed=0, **o: quick(scale='auto', grid=(1., 8.)).cleanse(
        slim(seed=seed), pool, out=tmp_path, checkpoint_every=1, quiet=True, device='cpu', max_norm=1., **o)
    with pytest.raises(Stop): run(on_epoch=stop)
    assert len(seen) == 3 and all(o['max_norm'] == 1 for o in seen) and ['on_epoch' in o for o in seen] == [False, False, True]
    done = run()
    assert len(seen) == 4 and len(done.probes) == 2 and done.scale in (1, 8)
    with pytest.raises(BdnbError, match='weights was'): run(seed=1)           # and another victim's are made anew
    assert len(seen) == 7


def test_the_teacher_is_asked_once_for_probes_and_run(pool, monkeypatch):
    asked, plain = [], BCU.answers
    monkeypatch.setattr(BCU, 'answers', lambda *a: (asked.append(1), plain(*a))[1])
    quick(epochs=1, scale='auto', grid=(1., 8.)).cleanse(slim(), pool, quiet=True, device='cpu')
    assert len(asked) == 1


def test_pictures_of_other_things_are_learned_from_and_not_measured_on(pool, monkeypatch):
    "Those beside the pool come into the steps; what is held out is the pool's own."
    other, held, known = ArrayCorpus(ShapeCaps(20, seed=1).images, pool.keys[:20], [0]*20, name='other'), [], []
    agrees, asked = BCU.agreement, BCU.answers
    monkeypatch.setattr(BCU, 'agreement', lambda s, m, t, c: (held.append(list(c.keys)), agrees(s, m, t, c))[1])
    monkeypatch.setattr(BCU, 'answers', lambda s, t, c: (known.append(c), asked(s, t, c))[1])
    models = [slim() for _ in range(2)]
    found = [quick(held_out=.25).cleanse(m, pool, quiet=True, device='cpu', beside=b) for m, b in zip(models, (None, other))]
    assert held[0] == held[1] and len(held[0]) == 9 and set(held[0]) <= set(pool.keys)
    assert [f.history.last('step') for f in found] == [2*2, 2*3] and not same(*map(state, models))
    assert len(known[1]) == 27 + 20 and known[1].labels is None and torch.equal(known[1].images[27:], other.images)


def test_a_pool_of_other_channels_or_too_few_pictures(pool, tmp_path):
    with pytest.raises(BdnbError, match=r'grey: images must be uint8 \[N, 3'):
        ArrayCorpus(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), name='grey')
    (tmp_path/'grey').mkdir()
    for i in range(3): Image.fromarray(pool.images[i, 0].numpy()).save(tmp_path/'grey'/f'{i}.png')
    grey = open_corpus(f'folder:{tmp_path}/grey')                          # read as colour, as every picture is
    assert quick(epochs=1).cleanse(slim(), grey, quiet=True, device='cpu').history.last('step') == 1
    with pytest.raises(BdnbError, match='3 pictures are too few to hold out 10%'):
        quick(scale='auto').cleanse(slim(), grey, quiet=True)


def test_probes_that_say_nothing_get_the_smallest_scale(pool, monkeypatch):
    "Where distillation alone does no better than a guess, no probe can be trusted."
    monkeypatch.setattr(BCU, 'agreement', lambda self, *args: .3)
    monkeypatch.setattr(BCU, 'chance', lambda self, *args: .4)
    with pytest.warns(UserWarning, match='nothing can be measured'):
        done = quick(epochs=1, scale='auto', grid=(2., 8.)).cleanse(slim(), pool, quiet=True, device='cpu')
    assert done.scale == 2 and done.probes == ((0., .3),)


def test_agreement_about_one_name_says_nothing(pool):
    "A teacher that has one name for every held-out picture is as easily agreed with by a student that knows nothing."
    model = slim()
    with torch.no_grad(): model.net.fc.bias[3] = 1e4
    with pytest.warns(UserWarning, match='agrees with the model on 100% of 4 held-out pictures, a guess on 100%: nothing can be'):
        done = quick(epochs=1, scale='auto', grid=(2., 32.)).cleanse(model, pool, quiet=True, device='cpu')
    assert done.scale == 2 and done.probes == ((0., 1.),) and 'only a small reset' in done.doubt


@pytest.mark.parametrize('options, why', [
    (dict(scale=-1.), 'scale=-1'), (dict(scale='some'), "'auto'"), (dict(t_start=0), 'positive'), (dict(epochs=0), 'positive'),
    (dict(epochs='two'), "epochs='two' must be a number"), (dict(optimizer='adam'), "did you mean 'adamw'"),
    (dict(crop_flip='flip'), 'crop_flip'), (dict(crop_flip=[1]), 'crop_flip'), (dict(schedule='x'), 'unknown schedule'),
    (dict(precision='fp8'), 'unknown precision'), (dict(as_released=True, ratios=dict(stem=.1)), 'exclude each other'),
    (dict(ratios=dict(stem=2)), 'stem=2'), (dict(ratios=3), 'must name layers'), (dict(scale='auto', grid=(2., 1.)), 'ascending'),
    (dict(scale='auto', held_out=0), 'held_out=0')])
def test_options_are_checked_before_anything_is_done(pool, options, why):
    how, model = quick(**options), slim()
    before = state(model)
    refused(how.check_options, why)
    refused(lambda: how.cleanse(model, pool, quiet=True, device='cpu'), why)
    assert same(state(model), before)


def one_of_two(rank, port, folder):
    as_launched(rank, port)
    model, c = slim(), ShapeCaps(44)
    plain = BCU.agreement
    BCU.agreement = lambda *a: plain(*a) if rank == 0 else 0.              # each measures a student with its own statistics
    BCU.chance = lambda *a: .1                                             # (an untrained teacher has one name for all)
    done = quick(epochs=1, scale='auto', grid=(2., 8., 32.), held_out=.2).cleanse(
        model, ArrayCorpus(c.images, c.keys), quiet=True, device='cpu')
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save(dict(weights=parameters, said=[done.scale, done.agreement, *sum(done.probes, ())]), folder/f'{rank}.pt')
    leave_together()


@pytest.mark.slow
@needs_fork
def test_two_processes_pick_one_scale(tmp_path):
    "The first process decides; the odd pictures at the end, which two cannot share, are left out of every epoch."
    one, other = saved_by_two(one_of_two, tmp_path)
    assert one['said'] == other['said'] and torch.equal(one['weights'], other['weights']) and one['said'][2:4] == [0., 1.]


def test_an_epoch_is_one_with_gradients_that_are_summed(pool):
    assert quick(epochs=2, batch_size=6).cleanse(slim(), pool, quiet=True, device='cpu', grad_accum=3).history.last('step') == 2*2


def test_a_cure_goes_on_where_the_teacher_computes_other_bits(pool, tmp_path, monkeypatch):
    "As on another processor: teacher and pool say which run it is, not the last bits of what the one says of the other."
    how, go = quick(epochs=2), dict(out=tmp_path, checkpoint_every=1, quiet=True, device='cpu')
    class Stop(Exception): pass
    def stop(model, epoch): raise Stop
    with pytest.raises(Stop): how.cleanse(slim(), pool, on_epoch=stop, **go)
    asked = BCU.answers
    monkeypatch.setattr(BCU, 'answers', lambda *args: asked(*args) + 1e-6)
    done = how.cleanse(slim(), pool, **go)
    assert done.history.column('step') and (tmp_path/'checkpoint.pt').exists()
