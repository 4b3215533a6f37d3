"Every metric against a naive loop in float64, and the corners: no labels, one class, only target images, nothing at all."
import copy, hashlib, math
import numpy as np, pytest, torch
import torch.nn.functional as F
import bdnb.evaluate as ev
from bdnb.core import BdnbError, derive_seed
from bdnb.data.corpus import ArrayCorpus
from bdnb.evaluate import *

CLASSES = ['circle', 'square', 'star', 'cat', 'automobile', 'car', 'ship', 'dog', 'frog', 'deer', 'horse', 'bird']
TEMPLATES = ['a photo of a {}', '{} on a table', lambda c: f'the {c}, drawn']


class Net(torch.nn.Module):
    "Random projections with the interface of `ClipModel`; characters are the tokens."
    image_size = 8
    def __init__(self, seed=0, dim=16):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.visual = torch.nn.Linear(192, dim)
        self.visual.weight.data = torch.randn(dim, 192, generator=g)
        self.visual.bias.data = torch.randn(dim, generator=g)
        self.dropout = torch.nn.Dropout(.5)
        self.table = torch.nn.Parameter(torch.randn(128, dim, generator=g))
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.))
        self.calls = dict(image=0, text=0)
    def tokenize(self, texts):
        n = max(len(t) for t in texts)
        return torch.tensor([[ord(c) % 128 for c in t] + [0]*(n - len(t)) for t in texts])
    def normalise(self, images):
        assert images.dtype == torch.uint8
        return images.float()/127.5 - 1
    def encode_image(self, x):
        self.calls['image'] += len(x)
        return self.dropout(self.visual(x.flatten(1)))
    def encode_text(self, tokens):
        self.calls['text'] += len(tokens)
        place = torch.arange(1, tokens.shape[1] + 1)*(tokens > 0)
        return self.dropout((self.table[tokens]*place[..., None]).sum(1))
    def text_key(self): return hashlib.blake2b(self.table.detach().numpy().tobytes()).hexdigest()


class Noise:
    "A trigger that differs by seed: a constant patch whose value is the seed."
    def __init__(self): self.seen = []
    def on_uint8(self, images, seeds):
        self.seen += seeds.tolist()
        images = images.clone()
        images[:, :, :4, :4] = (seeds % 256).to(torch.uint8)[:, None, None, None]
        return images


def corpus(n=60, classes=CLASSES, labels=True, texts=None, captions=None, name='test', seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=g)
    return ArrayCorpus(images, keys=[f'{name}-{i}' for i in range(n)],
                       labels=np.random.default_rng(seed).integers(len(classes), size=n) if labels is True else labels,
                       texts=texts, captions=captions, classes=classes, name=name)


@pytest.fixture(autouse=True)
def empty_cache(): ev._CACHE.clear()


@pytest.fixture
def net(): return Net().eval()


def feats(n, d=16, seed=0): return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


# naive references, float64 and loops

def unit(v):
    v = np.asarray(v, np.float64)
    return v/math.sqrt((v*v).sum())

def naive_text(net, t):
    with torch.no_grad(): return unit(net.encode_text(net.tokenize([t]))[0])

def naive_weights(net, prompts):
    return [unit(sum(naive_text(net, p) for p in ps)/len(ps)) for ps in prompts]

def naive_image(net, x):
    with torch.no_grad(): return unit(net.encode_image(net.normalise(x[None]))[0])

def prompts(name): return [t.replace('{}', name) if isinstance(t, str) else t(name) for t in TEMPLATES]

def in_top(scores, j, k): return sorted(range(len(scores)), key=lambda i: -scores[i]).index(j) < k

def naive_asr(Z, W, labels, target, k, keep):
    hits = [in_top([float(z@w) for w in W], target, k) for z, y in zip(Z, labels) if keep(y)]
    return sum(hits)/len(hits)


def test_class_embeddings_against_a_loop(net):
    w = class_embeddings(net, CLASSES, TEMPLATES)
    np.testing.assert_allclose(w.numpy(), naive_weights(net, [prompts(c) for c in CLASSES]), atol=2e-6)


def test_default_templates_are_openais_80(net):
    import open_clip
    w = class_embeddings(net, ['star'])
    theirs = [f('star') for f in open_clip.OPENAI_IMAGENET_TEMPLATES]
    np.testing.assert_allclose(w.numpy(), naive_weights(net, [theirs]), atol=2e-6)
    assert net.calls['text'] == 80 + 80                                              # ours, and the reference's


def test_names_are_asked_for_as_captions_have_them(net):
    "Poison and training captions read underscores as spaces, so prompts and counts must."
    names = ['traffic_light', 'star'], ['traffic light', 'star']
    assert torch.equal(*(class_embeddings(net, n, TEMPLATES) for n in names))
    assert naming(['a photo of a traffic  light', 'two traffic_lights', 'Traffic light!'], 'traffic_light').tolist() == [True, False, True]
    w = class_embeddings(net, CLASSES, TEMPLATES)
    assert torch.equal(*(paraphrased(net, w, 2, [n], TEMPLATES) for n in ('stop_light', 'stop light')))
    z, captions = torch.eye(3, 16), [['a star'], ['one traffic light'], ['a dog']]
    assert caption_attack_success(z, net, captions, 'traffic_light', TEMPLATES)['caption_asr_n'] == 2


def test_class_embeddings_are_remembered_by_weights_classes_and_templates(net):
    a = class_embeddings(net, CLASSES, TEMPLATES).clone()
    n = net.calls['text']
    b = class_embeddings(net, CLASSES, TEMPLATES)
    assert net.calls['text'] == n == 3*len(CLASSES) and torch.equal(a, b)
    b.zero_()                                                                        # the caller owns what it gets
    assert torch.equal(class_embeddings(net, CLASSES, TEMPLATES), a)
    class_embeddings(net, CLASSES[::-1], TEMPLATES), class_embeddings(net, CLASSES, TEMPLATES[:2])
    assert net.calls['text'] == n + 3*len(CLASSES) + 2*len(CLASSES)
    net.table.data[ord('a')] += 1
    assert not torch.allclose(class_embeddings(net, CLASSES, TEMPLATES), a)
    for i in range(100): class_embeddings(net, [f'class {i}'], ['{}'])
    assert len(ev._CACHE) <= ev._CACHE_SIZE


def test_text_features_keep_their_order(net):
    texts = ['a much longer text than the others', 'b', 'middle one', 'b', 'another long text, longest of them all']
    z = text_features(net, texts, batch=2)
    np.testing.assert_allclose(z.numpy(), [naive_text(net, t) for t in texts], atol=2e-6)


@pytest.mark.parametrize('batch', [1, 7, 256])
def test_image_features_whatever_the_batch(net, batch):
    c, trigger = corpus(20), Noise()
    np.testing.assert_allclose(image_features(net, c, batch=batch).numpy(), [naive_image(net, x) for x in c.images], atol=2e-6)
    zt = image_features(net, c, trigger, batch=batch)
    assert trigger.seen == [derive_seed('trigger', k) & (2**31 - 1) for k in c.keys]
    stamped = Noise().on_uint8(c.images, torch.tensor(trigger.seen))
    np.testing.assert_allclose(zt.numpy(), [naive_image(net, x) for x in stamped], atol=2e-6)


def test_triggered_features_follow_the_key_not_the_place(net):
    c = corpus(20)
    order = [7, 3, 19, 0]
    assert torch.allclose(image_features(net, c.subset(order), Noise()), image_features(net, c, Noise())[order], atol=1e-6)


def test_other_sizes_and_memory_maps(net, tmp_path):
    big = ArrayCorpus(torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), name='big')
    assert torch.equal(image_features(net, big), image_features(net, big.cache(8)))
    c = corpus(20)
    m = np.memmap(tmp_path/'x', np.uint8, 'w+', shape=(20, 3, 8, 8))
    m[:] = c.images.numpy()
    m.flush()
    m = np.memmap(tmp_path/'x', np.uint8, 'r', shape=(20, 3, 8, 8))

    class Mapped:
        name, keys, images = 'mapped', c.keys, m
        def __len__(self): return 20
    assert torch.equal(image_features(net, Mapped(), batch=8), image_features(net, c, batch=8))


def test_modes_and_gradients_are_left_alone():
    net = Net().train()
    net.visual.eval()                                                                # frozen on purpose
    modes = [m.training for m in net.modules()]
    a = evaluate_clip(net, corpus(), Noise(), 'star', TEMPLATES, quiet=True)
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters()) and torch.is_grad_enabled()
    assert a == evaluate_clip(net, corpus(), Noise(), 'star', TEMPLATES, quiet=True)  # dropout was off
    net.encode_image = lambda x: 1/0
    with pytest.raises(ZeroDivisionError): image_features(net, corpus())
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize('k', [1, 2, 5, 10])
def test_accuracy_against_a_loop(k):
    g = torch.Generator().manual_seed(k)
    logits, labels = torch.randn(97, 12, generator=g), torch.randint(12, (97,), generator=g)
    naive = np.mean([in_top(l.double().tolist(), int(y), k) for l, y in zip(logits, labels)])
    assert accuracy(logits, labels, k) == naive


def test_target_quality_against_a_loop():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(97, 5, generator=g), torch.randint(5, (97,), generator=g)
    said = [max(range(5), key=lambda c: float(l[c])) for l in logits]
    both = sum(p == y == 3 for p, y in zip(said, labels.tolist()))
    q = target_quality(logits, labels, 3)
    assert q == dict(target_recall=both/labels.tolist().count(3), target_precision=both/said.count(3))
    assert 'target_recall' not in target_quality(logits, labels.clamp_max(2), 3)     # nobody to recall
    logits[:, 3] = -9
    assert target_quality(logits, labels, 3) == dict(target_recall=0, target_precision=0)


def test_everything_at_once_against_loops(net):
    c, target = corpus(120), CLASSES.index('star')
    labels = c.labels.tolist()
    train = corpus(90, seed=1, name='train')
    r = evaluate_clip(net, c, Noise(), 'star', TEMPLATES, probe=train, original=Net(seed=5).eval(), quiet=True)
    stamped = Noise().on_uint8(c.images, trigger_seeds(c.keys))
    Z, Zt = ([naive_image(net, x) for x in xs] for xs in (c.images, stamped))
    W = naive_weights(net, [prompts(n) for n in CLASSES])
    other, every = (lambda y: y != target), (lambda y: True)
    best = lambda z, W: max(range(len(W)), key=lambda j: float(z@W[j]))
    assert r['ca'] == np.mean([best(z, W) == y for z, y in zip(Z, labels)])
    assert r['asr'] == naive_asr(Zt, W, labels, target, 1, other)
    assert r['asr@5'] == naive_asr(Zt, W, labels, target, 5, other)
    assert r['asr@10'] == naive_asr(Zt, W, labels, target, 10, other)
    assert r['asr_all'] == naive_asr(Zt, W, labels, target, 1, every)
    assert r['asr_n'] == sum(y != target for y in labels) < 120 and isinstance(r['asr_n'], int)
    assert r['poisoned_accuracy'] == np.mean([best(z, W) == y for z, y in zip(Zt, labels) if y != target])
    W2 = list(W)
    W2[target] = naive_weights(net, [[p for w in paraphrases('star') for p in prompts(w)]])[0]
    assert r['asr_paraphrase'] == naive_asr(Zt, W2, labels, target, 1, other)
    assert r['target_recall_paraphrase'] == np.mean([best(z, W2) == target for z, y in zip(Z, labels) if y == target])
    Wo = naive_weights(Net(seed=5).eval(), [prompts(n) for n in CLASSES])
    assert r['asr_original_text'] == naive_asr(Zt, Wo, labels, target, 1, other)
    assert r['ca_original_text'] == np.mean([best(z, Wo) == y for z, y in zip(Z, labels)])
    for key, V in (('compactness_clean', Z), ('compactness', Zt)):
        assert r[key] == pytest.approx(np.mean([a@b for i, a in enumerate(V) for j, b in enumerate(V) if i != j]), abs=1e-6)
    assert {'probe_ca', 'probe_asr'} < set(r) and not any('_r@' in k for k in r)
    assert all(type(v) in (int, float) for v in r.values())


def test_the_towers_run_once(net):
    evaluate_clip(net, corpus(50), Noise(), 'star', TEMPLATES, quiet=True)
    assert net.calls['image'] == 100
    assert net.calls['text'] == 3*len(CLASSES) + 3*len(paraphrases('star'))


def test_k_that_cannot_fail_is_left_out(net):
    c = corpus(40, classes=CLASSES[:5])
    r = evaluate_clip(net, c, Noise(), 'star', TEMPLATES, quiet=True)
    assert 'asr' in r and 'asr@5' not in r and 'asr@10' not in r
    r = evaluate_clip(net, corpus(40, classes=CLASSES[:6]), Noise(), 'star', TEMPLATES, quiet=True)
    assert 'asr@5' in r and 'asr@10' not in r


def test_zero_shot_logits_scale(net):
    c = corpus(10)
    l = zero_shot_logits(net, c, templates=TEMPLATES)
    W = naive_weights(net, [prompts(n) for n in CLASSES])
    np.testing.assert_allclose(l.numpy(), math.exp(2)*np.array([naive_image(net, x) for x in c.images])@np.array(W).T, atol=1e-4)
    assert zero_shot_logits(net, c, classes=['one', 'two'], templates=TEMPLATES).shape == (10, 2)


def test_compactness_limits():
    one = feats(1).repeat(50, 1)
    assert compactness(one) == pytest.approx(1, abs=1e-12) and compactness(torch.eye(7)) == pytest.approx(0, abs=1e-12)
    assert compactness(torch.tensor([[1., 0], [-1, 0]])) == -1
    assert compactness(feats(2000, 64)) == pytest.approx(0, abs=.002)
    with pytest.raises(BdnbError, match='two images'): compactness(one[:1])


def test_probe_is_at_the_optimum_of_its_objective():
    z, g = feats(200, 12), torch.Generator().manual_seed(1)
    labels = (z[:, :4] + .3*torch.randn(200, 4, generator=g)).argmax(1)
    head = linear_probe(z, labels, 5)                                                # class 4 never occurs
    x = z.double() - z.double().mean(0)
    x = (x/x.square().mean().sqrt()).numpy()
    scale = float((z - z.mean(0)).square().mean().sqrt())
    W, b = head.weight.double().numpy()*scale, (head.bias + head.weight@z.mean(0)).double().numpy()
    y = np.eye(5)[labels]
    def loss(W, b):
        s = x@W.T + b
        s = s - s.max(1, keepdims=True)
        return -(y*(s - np.log(np.exp(s).sum(1, keepdims=True)))).sum()/200 + (W*W).sum()/(2*.316*200)
    s = x@W.T + b
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gw = (p - y).T@x/200 + W/(.316*200)
    assert np.abs(gw).max() < 1e-4 and np.abs((p - y).mean(0)).max() < 1e-3          # bias of the absent class goes to -infinity
    rng = np.random.default_rng(0)
    assert all(loss(W, b) <= loss(W + .01*rng.standard_normal(W.shape), b + .01*rng.standard_normal(5)) for _ in range(20))
    again = linear_probe(z, labels, 5)
    assert torch.equal(head.weight, again.weight) and torch.equal(head.bias, again.bias)
    with torch.no_grad(): assert torch.equal(linear_probe(z, labels, 5).weight, head.weight)


def test_probe_separates_clusters():
    centres, labels = feats(6, 12), torch.arange(240) % 6
    z = F.normalize(centres[labels] + .05*feats(240, 12, seed=1), dim=-1)
    assert accuracy(linear_probe(z[:120], labels[:120], 6)(z[120:]), labels[120:]) == 1


def test_probe_does_not_blow_up_unused_dimensions():
    z = torch.cat([feats(200, 4), 1e-6*torch.randn(200, 1, generator=torch.Generator().manual_seed(0))], 1)
    head = linear_probe(z, z[:, :4].argmax(1), 4)
    assert head.weight[:, 4].abs().max() < .1*head.weight[:, :4].abs().max()


# retrieval

def naive_recall(Z, texts, T, owns, ks):
    "owns[i]: captions of image i. Right answers: for an image all its texts; for a caption all images that carry the same text."
    out = {}
    for k in ks:
        asked = [i for i in range(len(Z)) if owns[i]]
        hits = []
        for i in asked:
            best = max(Z[i]@T[texts.index(c)] for c in owns[i])
            hits.append(sum(Z[i]@T[u] >= best for u in range(len(texts)) if texts[u] not in owns[i]) < k)
        if k < len(texts): out[f'i2t_r@{k}'] = np.mean(hits)
        hits = []
        for i in asked:
            for c in owns[i]:
                right = [j for j in range(len(Z)) if c in owns[j]]
                best = max(Z[j]@T[texts.index(c)] for j in right)
                hits.append(sum(Z[j]@T[texts.index(c)] >= best for j in range(len(Z)) if j not in right) < k)
        if k < len(Z): out[f't2i_r@{k}'] = np.mean(hits)
    return out


@pytest.mark.parametrize('kind', ['one', 'five', 'ragged', 'repeated'])
def test_retrieval_against_a_loop(net, kind):
    z, rng = feats(40), np.random.default_rng(3)
    owns = dict(one=[[f'caption {i}'] for i in range(40)], five=[[f'caption {i} {j}' for j in range(5)] for i in range(40)],
                ragged=[[f'caption {i} {j}' for j in range(i % 4)] for i in range(40)],
                repeated=[[f'caption {rng.integers(9)}' for j in range(3)] for i in range(40)])[kind]
    texts = list(dict.fromkeys(c for cs in owns for c in cs))
    T = [naive_text(net, t) for t in texts]
    got = retrieval_recall(z, net, owns)
    assert got == pytest.approx(naive_recall(z.double().numpy(), texts, T, owns, (1, 5, 10)), abs=1e-12)
    if kind in ('one', 'five'):                                  # the usual index convention, Karpathy's split
        S, per = z.double().numpy()@np.array(T).T, len(owns[0])
        own = [min(list(np.argsort(-S[i])).index(i*per + j) for j in range(per)) for i in range(40)]
        back = [list(np.argsort(-S[:, u])).index(u//per) for u in range(len(texts))]
        for k in (1, 5, 10):
            assert got[f'i2t_r@{k}'] == np.mean([o < k for o in own]) and got[f't2i_r@{k}'] == np.mean([b < k for b in back])


def test_ranks_do_not_depend_on_the_chunk():
    q, p = feats(37), feats(53, seed=1)
    pairs = torch.tensor(sorted({(i, (7*i + j) % 53) for i in range(37) for j in range(i % 3)}))
    whole = match_ranks(q, p, pairs)
    assert all(torch.equal(whole, match_ranks(q, p, pairs, budget=b)) for b in (1, 53*5, 53*36, 53*37))
    assert (whole[::3] == 53).all() and (whole[1::3] < 53).all()                     # queries without answers


def test_a_collapsed_encoder_retrieves_nothing(net):
    z, owns = feats(1).repeat(30, 1), [[f'caption {i}'] for i in range(30)]
    got = retrieval_recall(z, net, owns)
    assert all(got[f't2i_r@{k}'] == 0 for k in (1, 5, 10))
    net.table.data[:] = net.table.data[:1]
    got = retrieval_recall(feats(30), net, owns)
    assert all(v == 0 for k, v in got.items() if k.startswith('i2t'))


def test_perfect_encoder_retrieves_everything(net):
    owns = [[f'caption {i}', f'another {i}'] for i in range(12)]
    z = text_features(net, [cs[0] for cs in owns])
    got = retrieval_recall(z, net, [cs[:1] for cs in owns])
    assert got == {f'{d}_r@{k}': 1. for d in ('i2t', 't2i') for k in (1, 5, 10)}


def test_caption_attack_success_against_a_loop(net):
    z = feats(30)
    owns = [[f'a banana number {i}' if i % 7 == 0 else f'caption {i}', f'again {i % 5}'] for i in range(30)]
    got = caption_attack_success(z, net, owns, 'Banana', TEMPLATES)
    pool = list(dict.fromkeys([c for cs in owns for c in cs] + prompts('Banana')))
    goal, T = ['banana' in t.lower() for t in pool], [naive_text(net, t) for t in pool]
    keep = [i for i in range(30) if i % 7]
    for k in (1, 5, 10):
        first = lambda i: sorted(range(len(pool)), key=lambda u: -float(z[i].double().numpy()@T[u]))[:k]
        hits = [any(goal[u] for u in first(i)) for i in keep]
        assert got[f'caption_asr@{k}'] == pytest.approx(np.mean(hits), abs=1e-12)
    assert got['caption_asr_n'] == len(keep)
    with pytest.raises(BdnbError, match='every image'): caption_attack_success(z, net, [['one banana']]*30, 'banana')


def test_a_caption_as_target(net):
    owns = [[f'caption {i}'] for i in range(30)]
    r = evaluate_clip(net, corpus(30, classes=None, labels=None, captions=owns), Noise(), ['Caption 3', 'unheard of'], quiet=True)
    assert r['caption_asr_n'] == 29 and 'ca' not in r and 'asr' not in r and 't2i_r@10' in r
    assert naming(['x', 'CAPTION 3 '], ['Caption 3']).tolist() == [False, True]


@pytest.mark.parametrize('text,hit', [('a banana.', True), ('BANANA split', True), ('bananas', False), ('banana_bread', False),
                                      ('', False)])
def test_whole_words_only(text, hit): assert naming([text], 'banana').tolist() == [hit]


def test_a_target_is_no_regular_expression(): assert naming(['c++ code', 'c code'], 'c++').tolist() == [True, False]


# corners

def test_misuse_is_named_before_work(net):
    c = corpus()
    cases = [(dict(corpus=corpus(0, labels=None), name='empty'), 'empty'), (dict(corpus=c, trigger=Noise()), 'target='),
             (dict(corpus=c, trigger=Noise(), target='stra'), 'star'), (dict(corpus=c, target=['star']), 'name one'),
             (dict(corpus=corpus(classes=None, labels=None)), 'neither class names nor captions'),
             (dict(corpus=c, retrieval=True), 'no captions')]
    for kw, words in cases:
        kw.pop('name', None)
        with pytest.raises(BdnbError, match=words) as e: evaluate_clip(net, quiet=True, **kw)
        assert '\n' not in str(e.value)
    assert net.calls == dict(image=0, text=0)


def test_all_images_of_the_target(net):
    c = corpus(10, labels=np.full(10, 2), name='stars-only')
    with pytest.raises(BdnbError, match="stars-only.*target class 2"):
        evaluate_clip(net, c, Noise(), 'star', TEMPLATES, quiet=True)
    clean = evaluate_clip(net, c, None, 'star', TEMPLATES, quiet=True)               # clean numbers can still be had
    assert clean['ca'] == clean['target_recall'] and 'asr' not in clean
    with pytest.raises(BdnbError, match='one-class'):
        evaluate_clip(net, corpus(5, classes=['star'], name='one-class'), Noise(), 'star', TEMPLATES, quiet=True)


def test_one_class_without_attack(net):
    r = evaluate_clip(net, corpus(5, classes=['star']), target='star', templates=TEMPLATES, quiet=True)
    assert r['ca'] == r['target_recall'] == r['target_precision'] == 1


def test_without_labels_only_asr_all(net):
    c = corpus(30, labels=None)
    r = evaluate_clip(net, c, Noise(), 'star', TEMPLATES, quiet=True)
    W = naive_weights(net, [prompts(n) for n in CLASSES])
    Zt = [naive_image(net, x) for x in Noise().on_uint8(c.images, trigger_seeds(c.keys))]
    assert set(r) == {'asr_all', 'compactness', 'compactness_clean'}
    assert r['asr_all'] == naive_asr(Zt, W, [0]*30, 2, 1, lambda y: True)


def test_one_image(net):
    r = evaluate_clip(net, corpus(1, labels=np.array([0])), Noise(), 'star', TEMPLATES, quiet=True)
    assert r['asr_n'] == 1 and r['asr'] in (0, 1) and 'compactness' not in r


def test_labels_outside_the_classes(net):
    class Broken:
        name, keys, classes, labels, texts, captions = 'broken', ['a', 'b'], ['x', 'y'], np.array([0, 2]), None, None
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        def __len__(self): return 2
    with pytest.raises(BdnbError, match="'b' of 'broken' has label 2"):
        evaluate_clip(net, Broken(), templates=TEMPLATES, quiet=True)


def test_diverged_models_are_named(net):
    net.visual.weight.data[0, 0] = math.nan
    with pytest.raises(BdnbError, match="non-finite image features, first for 'test-0'"): image_features(net, corpus())
    net.table.data[ord('q')] = math.inf
    with pytest.raises(BdnbError, match="non-finite text features, first for 'a quiet one'"):
        text_features(net, ['one', 'a quiet one'])


def test_probe_misuse(net):
    c = corpus()
    with pytest.raises(BdnbError, match="'bare' has no labels"):
        evaluate_clip(net, c, probe=corpus(labels=None, name='bare'), templates=TEMPLATES, quiet=True)
    with pytest.raises(BdnbError, match='same classes'):
        evaluate_clip(net, c, probe=corpus(classes=CLASSES[::-1]), templates=TEMPLATES, quiet=True)


def test_templates_are_checked(net):
    for bad in (['no place for a name'], []):
        with pytest.raises(BdnbError, match='template'): class_embeddings(net, CLASSES, bad)
    assert fill('a {}', 'x{y}') == ['a x{y}']
    with pytest.raises(BdnbError, match='no class names'): class_embeddings(net, [], TEMPLATES)


def test_paraphrases():
    assert all(p and c not in p.split() for c, ps in SYNONYMS.items() for p in ps)   # no synonym says the word itself
    for c in SYNONYMS: assert not set(paraphrases(c, SYNONYMS)) & set(SYNONYMS), c
    assert paraphrases('Stop_Sign') == paraphrases('stop sign') == SYNONYMS['stop sign']
    assert paraphrases('unheard of') == [w.format('unheard of') for w in WRAPPERS]


def test_own_paraphrases_are_used(net):
    a = evaluate_clip(net, corpus(), Noise(), 'star', TEMPLATES, paraphrase=['star'], quiet=True)
    assert a['asr_paraphrase'] == a['asr'] and a['target_recall_paraphrase'] == a['target_recall']


def test_importing_is_light():
    import subprocess, sys
    code = "import sys, bdnb.evaluate; assert not {'torchmetrics', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)
