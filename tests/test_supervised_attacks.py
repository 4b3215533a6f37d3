"Attacks on classifiers: what they change and what not, at what rates, and what becomes of orders that make no sense."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdnb.attacks.inputaware import InputAware, InputAwareObjective, Joint, MaskObjective, binary, draw_rows
from bdnb.attacks.learned import pack_weights, unpack_weights
from bdnb.attacks.lowfrequency import LowFrequency, learn_low_frequency
from bdnb.attacks.ssba import SSBA, learn_stego
from bdnb.attacks.supervised import (CROSS, SUPERVISED_ATTACKS, WaNetNoise, attack_classifier, batches_of, cover_rows, labelled,
                                     list_supervised_attacks, make_supervised_attack, pgd, train_classifier, victim)
from bdnb.attacks.triggers import TRIGGERS, Trigger, make_trigger
from bdnb.core import BdnbError, derive_seed, read_json
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.shapes import ShapeCaps
from bdnb.evaluate import trigger_seeds
from bdnb.models.classifiers import create_classifier, load_classifier
from bdnb.train import fit

torch.set_num_threads(1)
TINY = dict(width=4, epochs=1, batch_size=24, device='cpu')
DATA = [n for n, r in SUPERVISED_ATTACKS.items() if r.tag == 'data_poisoning']


def painted(seed=0):
    "An input-aware trigger with the weights of nobody."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return InputAware(width=4).trained(InputAware(width=4).build())


TRIGGER = dict(ssba=SSBA(), low_frequency=LowFrequency(), wanet_noise=WaNetNoise(), input_aware=painted(),
               given=LowFrequency(coefficients=tuple(float(i % 5 - 2) for i in range(48))))
EXACT = {'low_frequency', 'given', 'wanet_noise'}                    # no matrix product whose order of sums depends on the batch


@pytest.fixture(scope='module')
def train(): return labelled(ShapeCaps(120, size=16))


@pytest.fixture(scope='module')
def model(train): return victim(train, width=4)


def batch(B=5, H=32, W=32): return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', TRIGGER)
@pytest.mark.parametrize('H, W', [(32, 32), (33, 47), (8, 9)])
def test_triggers_keep_shape_range_and_input(name, H, W):
    t, x = TRIGGER[name], batch(3, H, W)
    before, state = x.clone(), torch.random.get_rng_state()
    y = t(x, torch.tensor([3, 1, 3]))
    assert y.shape == x.shape and y.dtype == x.dtype and 0 <= y.min() and y.max() <= 1
    assert torch.equal(x, before) and not torch.equal(x, y)
    kept = y.clone()
    y.fill_(.5)
    assert torch.equal(t(before, torch.tensor([3, 1, 3])), kept)
    assert t(x[:0]).shape == (0, 3, H, W)
    assert torch.equal(state, torch.random.get_rng_state()), 'a trigger used the global generator'


@pytest.mark.parametrize('name', TRIGGER)
def test_triggers_do_not_see_the_neighbours(name):
    t, x, s = TRIGGER[name], batch(9), torch.arange(100, 109)
    whole = t(x, s)
    alone = torch.cat([t(x[i:i + 1], s[i:i + 1]) for i in range(9)])
    assert (alone - whole).abs().max() <= (0 if name in EXACT else 2e-6)
    assert (t(x.flip(0), s.flip(0)).flip(0) - whole).abs().max() <= (0 if name in EXACT else 2e-6)


@pytest.mark.parametrize('name', TRIGGER)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_triggers_in_every_dtype(name, dtype):
    t, x = TRIGGER[name], batch(2).to(dtype)
    y = t(x)
    assert y.dtype == dtype
    assert (y.float() - t(x.float())).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize('name', TRIGGER)
def test_triggers_survive_json(name, tmp_path):
    t, x = TRIGGER[name], batch(2)
    again = Trigger.from_json(json.loads(json.dumps(t.to_json())))
    assert again == t and hash(again) == hash(t) and torch.equal(again(x), t(x)) and len(repr(t)) < 300
    t.save(tmp_path/'t.json')
    assert Trigger.load(tmp_path/'t.json') == t
    assert TRIGGERS[t.name] is type(t)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', TRIGGER)
def test_triggers_agree_on_a_gpu(name):
    t, x = TRIGGER[name], batch(4)
    far = t(x.cuda())
    assert far.is_cuda and (far.cpu() - t(x)).abs().max() < 5e-3              # convolutions may run in TF32


def test_gradients_reach_the_picture_and_nothing_else():
    for name in ('ssba', 'input_aware', 'low_frequency'):
        x, t = batch(2).requires_grad_(), TRIGGER[name]
        t(x).sum().backward()
        assert x.grad.abs().sum() > 0
        if name != 'low_frequency': assert not any(p.requires_grad for p in t.net('cpu').parameters())


def test_ssba_is_faint_and_can_be_read():
    pictures = ShapeCaps(100, split='elsewhere').images
    for t in (SSBA(), SSBA(pattern_seed=5)):
        y = t.on_uint8(pictures)
        assert (y.int() - pictures.int()).abs().max() <= 12
        assert (t.read(y) == t.message()).float().mean() > .95
        assert (t.read(pictures) == t.message()).float().mean() < .8
    assert not torch.equal(SSBA().message(), SSBA(pattern_seed=5).message())
    assert torch.equal(SSBA(strength=0.)(batch()), batch())
    odd = ShapeCaps(30, size=75, split='elsewhere').images
    assert (t.read(t.on_uint8(odd)) == t.message()).float().mean() > .95
    unlike = F.normalize((t(pictures.float()/255) - pictures.float()/255).flatten(1), dim=1)
    assert ((unlike @ unlike.T).sum() - 100)/9900 < .8                     # the residual depends on the picture


def test_a_new_encoder_learns():
    net = learn_stego(n=256, size=16, epochs=20, start=12., alike=0.)         # loud and quickly: 160 steps
    x, bits = ShapeCaps(64, size=16).images.float()/255, torch.randint(2, (64, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): said = net.decoder((x + .2*net.encoder(x, bits)).clamp(0, 1)) > 0
    assert (said == bits).float().mean() > .75


def test_low_frequency_search_hurts_more_than_chance(train, model):
    batches = batches_of(train, 40, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = learn_low_frequency(model, batches, LowFrequency(delta=.05), steps=15, device='cpu')
    loss = lambda t: F.cross_entropy(model.eval()(t(train.images.float()/255)), torch.as_tensor(train.labels)).item()
    assert loss(found) > loss(LowFrequency(delta=.05)) and found.delta == .05
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found == learn_low_frequency(model, batches, LowFrequency(delta=.05), steps=15, device='cpu')


@pytest.mark.parametrize('eps', [1, 8, 16])
def test_pgd_stays_in_its_ball(train, model, eps):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = train.images[:10].clone()
    x[0], x[1] = 0, 255
    hard = pgd(model, x, train.labels[:10], eps/255, 1.5/255, steps=6, batch=4)
    assert hard.dtype == torch.uint8 and hard.shape == x.shape
    assert 0 < (hard.int() - x.int()).abs().max() <= eps
    loss = lambda z: F.cross_entropy(model.eval()(z), torch.as_tensor(train.labels[:10]), reduction='none').detach()
    assert (loss(hard) >= loss(x) - 1e-5).all() and loss(hard).mean() > loss(x).mean()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(hard, pgd(model, x, train.labels[:10], eps/255, 1.5/255, steps=6, batch=4))
    assert torch.equal(pgd(model, x, train.labels[:10], steps=0), x) and len(pgd(model, x[:0], train.labels[:0])) == 0


def test_pgd_first_step_by_hand(train, model):
    x, y = train.images[:4].float()/255, torch.as_tensor(train.labels[:4])
    z = x.clone().requires_grad_()
    F.cross_entropy(model.eval()(z), y, reduction='sum').backward()
    want = ((x + 3/255*z.grad.sign()).clamp(0, 1)*255).round().to(torch.uint8)
    assert torch.equal(pgd(model, train.images[:4], y, 8/255, 3/255, steps=1), want)


@pytest.mark.parametrize('name', DATA)
def test_the_contract(name, train, model):
    a = make_supervised_attack(name, 'star', seed=3, **(dict(pgd_steps=2) if name == 'label_consistent' else {}))
    before, star = train.images.clone(), train.target_id('star')
    p = a.apply(train, model)
    N, own, n = len(train), int((train.labels == star).sum()), len(p.keys)
    assert torch.equal(train.images, before), 'the clean corpus was changed'
    assert n == p.mask.sum() == max(1, round(a.rate*(N if a.rate_of == 'train' else own)))
    assert p.shares['share_of_set'] == n/N and p.shares['share_of_target'] == n/(own + (n if a.mode == 'dirty' else 0))
    if a.mode == 'dirty': assert (train.labels[p.mask] != star).all() and (p.corpus.labels[p.mask] == star).all()
    else: assert (train.labels[p.mask] == star).all()
    assert (p.corpus.labels == train.labels)[~p.mask].all() and p.keys == [k for k, m in zip(train.keys, p.mask) if m]
    changed = (p.corpus.images != before).flatten(1).any(1).numpy()
    assert changed[p.mask].all() and changed.sum() == n + p.shares.get('cover', 0)
    again = a.apply(train, model)
    assert torch.equal(again.corpus.images, p.corpus.images) and again.keys == p.keys
    other = make_supervised_attack(name, 'star', seed=4, **(dict(pgd_steps=2) if a.pgd_steps else {}))
    assert other.apply(train, model).keys != p.keys
    assert p.plan.trigger.to_json() == json.loads(json.dumps(p.plan.trigger.to_json()))


def test_badnets_and_corners_touch_their_pixels_only(train, model):
    p = make_supervised_attack('badnets', 'star').apply(train)
    assert torch.equal(p.corpus.images[p.mask][..., -3:, -3:], CROSS.expand(int(p.mask.sum()), 3, 3, 3))
    assert CROSS[0].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[-3:, -3:] = False
    assert torch.equal(p.corpus.images[..., outside], train.images[..., outside])
    white = make_supervised_attack('badnets_white', 'star').apply(train)
    assert (white.corpus.images[white.mask][..., -3:, -3:] == 255).all()
    p = make_supervised_attack('label_consistent', 'star', pgd_steps=3).apply(train, model)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    for r in (slice(0, 3), slice(13, 16)):
        for c in (slice(0, 3), slice(13, 16)):
            inside[r, c] = True
            assert torch.equal(p.corpus.images[p.mask][..., r, c], CROSS.expand(int(p.mask.sum()), 3, 3, 3))
    far = (p.corpus.images.int() - train.images.int())[..., ~inside].abs()
    assert 0 < far.max() <= 8 and far[~torch.from_numpy(p.mask)].max() == 0


def test_label_consistent_trains_its_own_surrogate(train):
    a = make_supervised_attack('label_consistent', 'star', pgd_steps=2)
    p = a.apply(train, **TINY)
    clean = train_classifier(train, derive_seed('surrogate', 0), **TINY)[0]
    assert torch.equal(p.corpus.images, a.apply(train, clean).corpus.images)


def test_wanet_noise_samples_keep_their_labels(train):
    a = make_supervised_attack('wanet', 'star', seed=1)
    p = a.apply(train)
    rows = cover_rows(a, p.mask)
    assert len(rows) == p.shares['cover'] == 2*len(p.keys) and not p.mask[rows].any()
    assert (p.corpus.labels[rows] == train.labels[rows]).all()
    warp = a.trigger.on_uint8(train.images[rows])
    moved, jittered = (warp.int() - train.images[rows].int()).abs().float().mean(), (p.corpus.images[rows] != warp).float().mean()
    assert moved > 0 and jittered > .3                                     # neither clean nor the warp itself
    assert f"{len(p.keys)} of {len(train)} samples" in a.describe(train) and f'{len(rows)} noise samples' in a.describe(train)
    none = make_supervised_attack('wanet', 'star', seed=1, cover_ratio=0).apply(train)
    assert none.keys == p.keys and 'cover' not in none.shares
    u = torch.rand(1, 3, 24, 24)
    assert torch.equal(WaNetNoise(pattern_seed=1)(u, torch.tensor([5])), WaNetNoise(pattern_seed=1)(u, torch.tensor([5])))
    assert not torch.equal(WaNetNoise()(u, torch.tensor([5])), WaNetNoise()(u, torch.tensor([6])))


def test_rates_have_one_meaning(train):
    own = int((train.labels == train.target_id('star')).sum())
    of_class = make_supervised_attack('sig', 'star')
    of_set = make_supervised_attack('sig', 'star', rate=round(.8*own)/len(train))
    assert (of_class.rate, of_class.rate_of, of_set.rate_of) == (.8, 'target_class', 'train')
    assert of_class.apply(train).keys == of_set.apply(train).keys
    assert f'{round(.8*own)} of {len(train)} samples' in of_class.describe(train)
    with pytest.raises(BdnbError, match='only .* are about'): make_supervised_attack('sig', 'star', rate=.5).apply(train)
    dirty = make_supervised_attack('badnets', 'star', rate=.5, rate_of='target_class').apply(train)
    assert len(dirty.keys) == round(.5*own)


def test_captions_do_not_choose_the_samples():
    "A corpus with captions is poisoned by its labels."
    c = ShapeCaps(60, size=16)
    lying = ArrayCorpus(c.images, c.keys, c.labels, ['a star']*60, classes=c.classes)
    p = make_supervised_attack('sig', 'star', rate=1/60).apply(lying)
    assert (c.labels[p.mask] == c.target_id('star')).all() and p.corpus.texts is None


def test_labels_without_names():
    c = ShapeCaps(60, size=16)
    bare = ArrayCorpus(c.images, c.keys, c.labels)
    p = make_supervised_attack('badnets', '3').apply(bare)
    assert (p.corpus.labels[p.mask] == 3).all() and p.corpus.classes[:2] == ['0', '1']


@pytest.mark.parametrize('order, words', [
    (dict(name='badnet'), ['unknown attack', "did you mean 'badnets'"]),
    (dict(name='badnets', sise=3), ["unknown option 'sise'"]),
    (dict(name='badnets', rate=0), ['rate=0']), (dict(name='badnets', rate=1.5), ['rate=1.5']),
    (dict(name='badnets', rate_of='test'), ["rate_of='test'", 'target_class']),
    (dict(name='badnets', mode='clean'), ["mode='clean'"]),
    (dict(name='badnets', cover_ratio=1), ['cover_ratio=1', 'wanet']),
    (dict(name='wanet', cover_ratio=-1), ['cover_ratio=-1']),
    (dict(name='label_consistent', pgd_eps=float('nan')), ['pgd_eps=nan']),
    (dict(name='label_consistent', pgd_steps='ten'), ["pgd_steps='ten'"]),
    (dict(name='label_consistent', pgd_steps=2.5), ['pgd_steps=2.5', 'whole']),
    (dict(name='low_frequency', search_steps=True), ['search_steps=True', 'whole']),
    (dict(name='badnets', rate_of='target_class'), ["rate_of='target_class'", 'without a rate', "0.1 is a share of 'train'"]),
    (dict(name='sig', rate_of='train'), ["rate_of='train'", 'without a rate']),
    (dict(name='sig', search_steps=5), ['search_steps=5', 'low_frequency']),
    (dict(name='low_frequency', coefficients=[1.] + [0.]*15 + [2.] + [0.]*31), ['coefficients=', 'zero']),
    (dict(name='low_frequency', coefficients=[1e300]*48), ['coefficients=', '1e6']),
    (dict(name='low_frequency', n=1), ['n=1']), (dict(name='ssba', strength=-1), ['strength=-1']),
    (dict(name='input_aware', width=5), ['width=5', 'multiple of 4']),
    (dict(name='input_aware', rate=.5, rate_of='target_class'), ['rate_of', 'attacker trains']),
    (dict(name='input_aware', pgd_steps=3), ['pgd_steps', 'attacker trains']), (dict(name='input_aware', rate=.6), ['rate=0.6']),
    (dict(name='badnets', target='  '), ['target'])])
def test_bad_orders(order, words):
    with pytest.raises(BdnbError) as e: make_supervised_attack(**{'target': 'star', **order})
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value), e.value


def test_bad_corpora(train):
    a = make_supervised_attack('badnets', 'star')
    with pytest.raises(BdnbError, match='needs labels'): a.apply(ArrayCorpus(train.images, train.keys))
    with pytest.raises(BdnbError, match='needs labels'):
        make_supervised_attack('sig', 'star').plan(ArrayCorpus(train.images, train.keys))
    with pytest.raises(BdnbError, match='knows 5 classes, .* has 12'):
        make_supervised_attack('label_consistent', 'star').apply(train, create_classifier('resnet18', 5, 4, 16))
    with pytest.raises(BdnbError, match="no class 'sun'"): make_supervised_attack('badnets', 'sun').apply(train)
    with pytest.raises(BdnbError, match='noise samples'): make_supervised_attack('wanet', 'star', rate=.5).apply(train)
    with pytest.raises(BdnbError, match='attack_classifier'): make_supervised_attack('input_aware', 'star').apply(train)
    with pytest.raises(BdnbError, match='augment'): attack_classifier('badnets', train, 'star', **{**TINY, 'augment': 'flip'})
    with pytest.raises(BdnbError, match='no weights yet'): InputAware()(batch())
    with pytest.raises(BdnbError, match='too small'): draw_rows(torch.zeros(3, dtype=torch.int64), 0, .1, torch.Generator())


def test_strange_weights():
    net = InputAware(width=4).build()
    good = pack_weights(net)
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    start = 'data:application/safetensors;base64,'
    for bad in ('', start, good[:-40], good.replace('base64,', 'base64,A'), good + '!', '/etc/passwd'):
        with pytest.raises(BdnbError): unpack_weights(bad, net)
    with pytest.raises(BdnbError): InputAware(width=8, weights=good)
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    near = unpack_weights(good, InputAware(width=4).build()).state_dict()
    assert all(torch.allclose(near[k], v, atol=1e-3) for k, v in kept.items())


@pytest.mark.parametrize('name', SUPERVISED_ATTACKS)
def test_a_victim_of_each(name, train, tmp_path):
    more = dict(pgd_steps=1) if name == 'label_consistent' else {}
    state = torch.random.get_rng_state()
    a = attack_classifier(name, train, 'star', out=tmp_path, **TINY, **more)
    assert torch.equal(state, torch.random.get_rng_state()), 'the global generator was used'
    r = a.evaluate(train)
    assert r['asr_n'] == (train.labels != train.target_id('star')).sum() and 0 <= r['asr'] <= 1
    assert a.tag == SUPERVISED_ATTACKS[name].tag and a.seconds > 0 and not a.model.training and a.attack.name == name
    assert bool(a.poisoned_keys) == (a.tag == 'data_poisoning') and 0 < a.shares['share_of_set'] < .2
    truth, loaded = read_json(tmp_path/'attack.json'), load_classifier(tmp_path/'victim.safetensors')
    assert truth['keys'] == a.poisoned_keys and Trigger.from_json(truth['trigger']) == a.trigger
    assert all(truth[k] == getattr(a.attack, k) for k in ('target', 'rate', 'rate_of', 'mode', 'seed', 'tag', 'cover_ratio'))
    x = a.trigger.on_uint8(train.images[:8], trigger_seeds(train.keys[:8]))
    assert torch.equal(loaded(x), a.model(x))


def test_the_same_seed_is_the_same_victim(train):
    one, two, other = (attack_classifier('blended', train, 'star', seed=s, **TINY) for s in (0, 0, 1))
    weights = lambda a: torch.cat([p.flatten() for p in a.model.parameters()])
    assert torch.equal(weights(one), weights(two)) and not torch.equal(weights(one), weights(other))
    assert one.poisoned_keys == two.poisoned_keys != other.poisoned_keys and one.trigger != other.trigger
    first, second = (attack_classifier('input_aware', train, 'star', **TINY) for _ in range(2))
    assert torch.equal(weights(first), weights(second)) and first.trigger == second.trigger


def test_more_for_the_training_wins(train):
    a = attack_classifier('badnets', train, 'star', training=dict(lr=.01, momentum=0.), **TINY)
    b = attack_classifier('badnets', train, 'star', lr=.01, training=dict(momentum=0.), **TINY)
    assert torch.equal(a.model.net.fc.weight, b.model.net.fc.weight)
    assert a.history.rows[0]['lr'] == b.history.rows[0]['lr']
    c = attack_classifier('badnets', train, 'star', lr=.01, **TINY)
    assert not torch.equal(a.model.net.fc.weight, c.model.net.fc.weight)


def test_a_searched_pattern_is_the_one_at_test_time(train, model):
    a = attack_classifier('low_frequency', train, 'star', search_steps=3, surrogate=model, **TINY)
    assert a.trigger.coefficients is not None and a.attack.trigger.coefficients is None


def test_input_aware_trains_what_it_should(train, model):
    torch.manual_seed(0)                                                   # of the painters: from some starts, masks grow at first
    painters = InputAware(width=4).build()
    batches = batches_of(train, 24, 0)
    loss = lambda: sum(MaskObjective()(painters['mask'], b)['size'].item() for b in batches.epoch(0))
    before = loss()
    fit(painters['mask'], MaskObjective(), batches, epochs=3, lr=3e-3, max_norm=1., device='cpu', quiet=True)
    assert loss() < before
    joint = Joint(victim(train, width=4), painters)
    frozen_mask = {k: v.clone() for k, v in painters['mask'].state_dict().items()}
    moving = {k: v.clone() for k, v in joint.named_parameters() if v.requires_grad}
    fit(joint, InputAwareObjective(train.target_id('star'), .1), batches, epochs=1, lr=1e-3, device='cpu', quiet=True)
    assert all(torch.equal(v, frozen_mask[k]) for k, v in painters['mask'].state_dict().items())
    assert moving and all(not torch.equal(p, moving[k]) for k, p in joint.named_parameters() if k in moving)


def test_input_aware_leaves_out_a_rest_it_cannot_use(train):
    few = train.subset(np.arange(50))                                      # in batches of 24 two are left
    a = attack_classifier('input_aware', few, 'star', rate=.1, **TINY)
    assert (a.shares['samples'], a.shares['poisoned'], a.shares['share_of_set']) == (50, 4, 4/48)
    assert len(a.history.rows) and a.history.rows[-1]['step'] == 2


def test_a_joint_batch_by_hand(train):
    painters, seen = InputAware(width=4).build(), []
    joint = Joint(lambda z: seen.append(z) or torch.zeros(len(z), 12), painters)
    x, (a, c, o) = torch.rand(8, 3, 16, 16), ([1, 5], [0, 2], [2, 7])
    joint(x, *(torch.tensor(r) for r in (a, c, o)))
    pattern, mask = painters['pattern'](x), binary(painters['mask'](x))
    want = [x[i] + (pattern[i] - x[i])*mask[i] for i in a] + [x[i] + (pattern[j] - x[i])*mask[j] for i, j in zip(c, o)]
    assert torch.allclose(seen[0], torch.stack(want + [x[i] for i in (3, 4, 6, 7)]), atol=1e-5)


def test_the_list_says_everything():
    rows = list_supervised_attacks()
    assert {r['name'] for r in rows} >= {'badnets', 'badnets_white', 'blended', 'sig', 'label_consistent', 'wanet', 'input_aware',
                                         'ctrl', 'low_frequency', 'ssba'}
    assert all(r['tag'] in ('data_poisoning', 'training_control') and r['source'] for r in rows)
    assert [r['name'] for r in rows if r['tag'] == 'training_control'] == ['input_aware']
