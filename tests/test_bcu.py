"BCU: what is reset and what is not, on every kind of network; and what happens to a run that cannot go well."
import copy

import pytest
import torch
from torch import nn

from bdnb.core import BdnbError
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.shapes import ShapeCaps
from bdnb.defenses.bcu import BCU, RATIOS, plan_released, plan_reset, reset_weights, route, stage_totals
from bdnb.models.classifiers import Classifier, create_classifier
from bdnb.objectives.distill import Distillation, kd_loss, temperature

torch.set_num_threads(1)
NETS = {'resnet18': 8, 'preactresnet18': 8, 'vgg11': 8, 'vgg16': 8, 'wrn16': 16, 'vit': 32}
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def slim(name='resnet18', classes=12, seed=0): return create_classifier(name, classes, width=NETS[name], seed=seed)
def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    def stop(model, epoch): raise Killed
    before = state(cut)
    with pytest.raises(Killed):
        quick().cleanse(cut, pool, out=tmp_path, checkpoint_every=1, quiet=True, device='cpu', on_epoch=stop)
    assert same(state(cut), before)                                       # an error hands the victim back as it was
    quick().cleanse(cut, pool, out=tmp_path, checkpoint_every=1, quiet=True, device='cpu')
    assert same(state(cut), state(whole))


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
    with pytest.raises(BdnbError, match="'kd' is nan at step 0"): quick().cleanse(model, pool, quiet=True, device='cpu')
    assert same(state(model), before) and not model.net.fc.weight.requires_grad and model.net.fc.bias.requires_grad


@pytest.mark.parametrize('options, words', [
    (dict(ratios={'layer9': .1}), "no stage or layer 'layer9'"), (dict(ratios={'stem': -1}), 'stem=-1'),
    (dict(scale=-1), 'scale=-1'),
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
