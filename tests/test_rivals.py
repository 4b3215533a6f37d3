"The rivals with labels: what each may change, what each must refuse, and its formula against a slower one."
import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import as_launched, leave_together, needs_fork, same, saved_by_two, state
from bdnb.core import BdnbError
from bdnb.data.batches import Batches
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.shapes import ShapeCaps
from bdnb.defenses.rivals import (ANP, NAD, AdversarialMasks, FinePruning, FineTuneClassifier, MaskedChannels, attention_map,
                                  head_of, sleepy_channels, stage_ends)
from bdnb.models.classifiers import Classifier, create_classifier, evaluate_classifier

torch.set_num_threads(1)
QUICK = dict(batch_size=16, epochs=1)
ALL = {'finetune': FineTuneClassifier(**QUICK), 'fine_pruning': FinePruning(**QUICK), 'nad': NAD(teacher_epochs=1, **QUICK),
       'anp': ANP(steps=3, threshold=.99, **QUICK)}


def slim(name='resnet18', width=8, seed=0): return create_classifier(name, 12, width=width, seed=seed)


@pytest.fixture(scope='module')
def clean():
    c = ShapeCaps(36)
    return c._with(texts=None, captions=None)


@pytest.mark.parametrize('name', ALL)
def test_same_seed_same_model_and_no_hook_stays(clean, name):
    runs = []
    for _ in range(2):
        model = slim()
        found = ALL[name].cleanse(model, clean, quiet=True, device='cpu')
        assert found.model is model and found.seconds > 0 and found.history.rows
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.requires_grad and not p._backward_hooks for p in model.parameters())
        runs.append(state(model))
    assert same(*runs) and not same(runs[0], state(slim()))


@pytest.mark.parametrize('name', ALL)
def test_bad_input_leaves_the_model_alone(clean, name):
    model = slim()
    before, cure = state(model), ALL[name]
    bad = {'needs labels': ArrayCorpus(clean.images, clean.keys, name='pool'), 'is empty': clean.subset([]),
           'has 3 classes': ArrayCorpus(clean.images, clean.keys, clean.labels % 3, classes=['a', 'b', 'c'])}
    for words, corpus in bad.items():
        with pytest.raises(BdnbError, match=words): cure.cleanse(model, corpus, quiet=True)
    with pytest.raises(BdnbError, match='not a Linear'): cure.cleanse(nn.Linear(2, 2), clean)
    with torch.no_grad(): model.net.fc.bias[0] = float('nan')
    broken = state(model)
    with pytest.raises(BdnbError, match='nan|not finite|non-finite'): cure.cleanse(model, clean, quiet=True, device='cpu')
    after = state(model)
    assert all(torch.equal(after[k].nan_to_num(7), broken[k].nan_to_num(7)) for k in broken)
    assert before.keys() == after.keys()


@pytest.mark.parametrize('name', ALL)
def test_on_epoch_sees_the_classifier_that_is_being_cured(clean, name):
    seen = []
    def look(model, epoch): seen.append((epoch, evaluate_classifier(model, clean)['ca']))
    model = slim()
    cure = replace(ALL[name], teacher_epochs=2) if name == 'nad' else ALL[name]
    cure.cleanse(model, clean, quiet=True, device='cpu', on_epoch=look)
    assert [e for e, _ in seen] == [0]                                       # NAD's teacher is nobody's business


def test_another_cure_does_not_go_on_from_a_checkpoint(clean, tmp_path):
    options = dict(out=tmp_path, checkpoint_every=1, quiet=True, device='cpu')
    ALL['finetune'].cleanse(slim(), clean, **options)
    with pytest.raises(BdnbError, match='recipe was FineTuneClassifier.*, is FinePruning'):
        ALL['fine_pruning'].cleanse(slim(), clean, **options)
    with pytest.raises(BdnbError, match='weights was'): ALL['finetune'].cleanse(slim(seed=1), clean, **options)


def test_classes_in_another_order_are_refused(clean):
    "Their numbers would mean other names, and accuracy nothing."
    model = create_classifier('resnet18', clean.classes, width=4)
    turned = clean._with(classes=list(reversed(clean.classes)), labels=len(clean.classes) - 1 - clean.labels)
    for use in (lambda c: FineTuneClassifier(**QUICK).cleanse(model, c, quiet=True), lambda c: evaluate_classifier(model, c)):
        with pytest.raises(BdnbError, match='give both in one order'): use(turned)
    other = ['something else', *clean.classes[1:]]
    moved = clean._with(classes=[other[1], other[0], *other[2:]])                       # another name, and one at another place
    with pytest.raises(BdnbError, match='give both in one order'): evaluate_classifier(model, moved)
    with pytest.warns(UserWarning, match="class 0 is 'something else'.*taken for the same"):
        evaluate_classifier(model, clean._with(classes=other))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for names in (clean.classes, [f'class {i}' for i in range(len(other))]):          # the same, and nothing in common
            assert evaluate_classifier(model, clean._with(classes=names))['ca'] >= 0


def test_pruned_channels_stay_pruned(clean):
    model = slim()
    FinePruning(tolerance=1., **QUICK | dict(epochs=3)).cleanse(model, clean, quiet=True, device='cpu')
    columns = head_of(model).weight.detach().abs().sum(0)
    assert (columns == 0).sum() == len(columns) - 1                        # all but one: accuracy was allowed to fall to nothing
    with pytest.raises(BdnbError, match='Conv2d, not linear'):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 12, 7), nn.Flatten())
        head_of(type(model)(net, 'mine', 12))


def test_pruning_order_is_ascending_activity():
    z = torch.tensor([[0., 5., .1, 2.], [0., 4., .2, 2.]])
    dead, acc = sleepy_channels(z, torch.tensor([0, 0]), torch.tensor([[0., 1., 0., 0.], [0., 0., 0., 1.]]), None, .1)
    assert dead.tolist() == [0, 2, 3] and acc[:4] == [1, 1, 1, 1]


def test_attention_maps_against_loops():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for p in (1., 2., 3.):
        for b in range(2):
            m = torch.tensor([sum(abs(float(x[b, c, i, j]))**p for c in range(3)) for i in range(4) for j in range(5)])
            assert torch.allclose(attention_map(x, p)[b], m/m.norm(), atol=1e-5)


@pytest.mark.parametrize('name, ends', [('resnet18', 4), ('vgg11', 4), ('wrn16', 3), ('vit', 4)])
def test_nad_on_other_networks(clean, name, ends):
    model = slim(name, dict(wrn16=16, vit=32).get(name, 8))
    assert len(stage_ends(model)) == ends
    assert NAD(teacher_epochs=1, **QUICK).cleanse(model, clean, quiet=True, device='cpu').history.last('attention') >= 0


def test_anp_changes_gains_alone_and_the_adversary_makes_it_worse(clean):
    model = slim()
    before = state(model)
    ANP(steps=4, batch_size=16, threshold=.999, tolerance=1.).cleanse(model, clean, quiet=True, device='cpu')
    names = {f'{n}.weight' for n in MaskedChannels(model).names}
    for k, v in state(model).items():
        if k in names: assert ((v == before[k]) | (v == 0)).all()
        else: assert torch.equal(v, before[k]), k
    assert any((model.state_dict()[k] == 0).any() for k in names)
    masked = MaskedChannels(slim().eval()).eval()
    batch = next(Batches(clean, 16).epoch(0))
    weak, strong = (AdversarialMasks(eps=e, alpha=.5)(masked, batch) for e in (0., .4))
    assert torch.allclose(weak['natural'], weak['robust']) and torch.equal(weak['natural'], strong['natural'])
    assert strong['robust'] > strong['natural']


def test_masks_dim_the_gain_and_nothing_else():
    model = slim().eval()
    masked, x = MaskedChannels(model).eval(), torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    noise = [[torch.full_like(m, .1), torch.full_like(m, -.2)] for m in masked.masks]
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for n in masked.names:
            m = by_hand.get_submodule(n)
            m.weight *= 1.1
            m.bias *= .8
        assert torch.allclose(masked(x, noise), by_hand(x), atol=1e-5)
    assert F.cross_entropy(masked(x, noise), torch.zeros(4, dtype=torch.int64)).requires_grad
    with pytest.raises(BdnbError, match='batch-normalised'): ANP(steps=1).cleanse(slim('vit', 32), ShapeCaps(20), quiet=True)


def one_of_two(rank, port, folder):
    as_launched(rank, port)
    model, c = slim(), ShapeCaps(34)
    ANP(steps=4, batch_size=16, threshold=.99).cleanse(model, c._with(texts=None, captions=None), quiet=True, device='cpu')
    torch.save(state(model), folder/f'{rank}.pt')
    leave_together()


@pytest.mark.slow
@needs_fork
def test_two_processes_prune_alike(tmp_path):
    "And the two pictures at the end, one for each, which have no batch statistics, are left out."
    one, other = saved_by_two(one_of_two, tmp_path)
    assert same(one, other) and not same(one, state(slim()))


def test_maps_are_looked_for_where_there_are_any(clean):
    "MobileNet's last stage ends in a layer that answers with a vector; a perceptron has no map at all."
    model = create_classifier('torchvision/mobilenet_v3_small', 12, image_size=32)
    assert NAD(teacher_epochs=1, **QUICK).cleanse(model, clean, quiet=True, device='cpu').history.last('attention') > 0
    flat = nn.Sequential(nn.Flatten(), *[nn.Linear(3*32*32, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)])
    with pytest.raises(BdnbError, match='flat: NAD compares attention maps'): NAD().check(Classifier(flat, 'flat', 12))


@pytest.mark.parametrize('how', [FineTuneClassifier(epochs=2, batch_size=6), NAD(epochs=2, teacher_epochs=1, batch_size=6)])
def test_an_epoch_is_one_with_gradients_that_are_summed(clean, how):
    assert how.cleanse(slim(), clean, quiet=True, device='cpu', grad_accum=3).history.last('step') == 2*2
