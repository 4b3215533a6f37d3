"CleanCLIP against its formula: naive loops, full-length texts, separate towers, everything in double precision."
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import state
import bdnb.defenses.cleanclip as module
from bdnb.attacks.triggers import make_trigger
from bdnb.core import BdnbError
from bdnb.data.augment import autoaugment
from bdnb.data.batches import Batches
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.shapes import ShapeCaps
from bdnb.data.text import TextView
from bdnb.defenses.cleanclip import CleanCLIP, FineTune, SupervisedCleanCLIP, evaluate_head, head_logits
from bdnb.evaluate import trigger_seeds
from bdnb.models.build import ClipModel
from bdnb.models.tiny import tiny_clip
from bdnb.objectives.contrastive import CleanClipObjective, ClipObjective, clip_loss, inmodal_loss
from bdnb.train import History, SCHEDULES

torch.set_num_threads(1)
view = TextView(backend='packaged')


def fresh(norm='group'): return ClipModel(tiny_clip(width=8, norm=norm), 'tiny')
def open_clip_model():
    from open_clip.model import CLIP
    vision = dict(layers=[1, 1, 1, 1], width=16, image_size=32, head_width=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ClipModel(CLIP(32, vision, dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)), 'RN-tiny')


class InDouble(nn.Module):
    "A `ClipModel` in float64 that reads bytes."
    def __init__(self, model): super().__init__(); self.model, self.tokenize = model.double(), model.tokenize
    def forward(self, images, tokens): return self.model(images.double()/255, tokens)


def ce(s, A, B):
    "Mean cross-entropy of the rows of s A B^T with the diagonal right."
    total = 0.
    for i, a in enumerate(A):
        row = [s*sum(x*y for x, y in zip(a, b)) for b in B]
        top = max(row)
        total += math.log(sum(math.exp(v - top) for v in row)) + top - row[i]
    return total/len(A)


def unit(z): return (z/z.norm(dim=1, keepdim=True)).tolist()


def formula(model, images, texts, image_views, text_views, together=False):
    "Both losses of section 'objective' of the paper's code; `together`: the two views of a tower in one call."
    import open_clip
    net, tokens = model.net, open_clip.SimpleTokenizer()
    pixels = lambda x: (x.double()/255 - model.mean[:, None, None])/model.std[:, None, None]
    tower = lambda x: net.encode_image(pixels(x))
    words = lambda t: net.encode_text(tokens(list(t), context_length=77))
    if together: i, iv = tower(torch.cat([images, image_views])).chunk(2)
    else: i, iv = tower(images), tower(image_views)
    (i, iv, t, tv), s = (unit(z.detach()) for z in (i, iv, words(texts), words(text_views))), net.logit_scale.exp().item()
    return dict(clip=(ce(s, i, t) + ce(s, t, i))/2, inmodal=(ce(s, i, iv) + ce(s, t, tv))/2)


def views_of(batch): return autoaugment(batch.images, batch.generator('image view')), view(batch.texts, batch.keys)
def first_batch(n=7, seed=0): return next(Batches(ShapeCaps(32), n, seed=seed).epoch(0))


@pytest.mark.parametrize('make, together', [(fresh, False), (lambda: fresh('batch'), True), (open_clip_model, True)])
def test_loss_is_the_formula(make, together):
    "Cropped texts, one call for both views: the formula with 77 places (and separate calls, where no norm mixes samples)."
    model, batch = make().double().train(), first_batch()
    want = formula(model, batch.images, batch.texts, *views_of(batch), together)
    got = CleanClipObjective(2., 3., view)(InDouble(model), batch)
    assert got['clip'].item() == pytest.approx(2*want['clip'], abs=1e-9)
    assert got['inmodal'].item() == pytest.approx(3*want['inmodal'], abs=1e-9)
    plain = ClipObjective()(InDouble(model), batch)['clip'].item()
    if not together: assert plain == pytest.approx(want['clip'], abs=1e-9)


def test_loss_in_single_precision():
    model, batch = fresh(), first_batch()
    want = formula(copy.deepcopy(model).double(), batch.images, batch.texts, *views_of(batch))
    for k, v in CleanClipObjective(text_view=view)(model, batch).items(): assert v.item() == pytest.approx(want[k], abs=2e-5)


def test_batch_norm_sees_both_views_together():
    model, batch = fresh('batch').double().train(), first_batch()
    separate = formula(model, batch.images, batch.texts, *views_of(batch))
    assert abs(CleanClipObjective(text_view=view)(InDouble(model), batch)['clip'].item() - separate['clip']) > 1e-3


def test_cropped_texts_are_exact():
    model, batch = fresh().double(), first_batch()
    batch.texts[0] = 'word ' * 100                                   # longer than the tower, and the end mark must stay
    batch.texts[1] = 'a'
    for texts in (batch.texts, batch.texts[1:]):
        cropped, full = model.tokenize(texts), model._full(model.tokenize(texts))
        assert full.shape[1] == 77 and (cropped == 49407).any(1).all()
        assert cropped.shape[1] == 77 if texts is batch.texts else cropped.shape[1] < 30
        assert (model.encode_text(cropped) - model.net.encode_text(full, normalize=True)).abs().max() < 1e-12
    long = model.encode_text(model.tokenize(['word ' * 100, 'bird ' * 100]))
    assert (long[0] - long[1]).abs().max() > 1e-3                     # not one embedding for all long captions


def gradients(model, objective, batch):
    model.zero_grad()
    sum(objective(model, batch).values()).backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


def test_without_inmodal_it_is_plain_fine_tuning():
    model, batch = fresh(), first_batch()
    objectives = ClipObjective(), CleanClipObjective(inmodal_weight=0., text_view=view), CleanClipObjective(text_view=view)
    plain, off, on = (gradients(model, o, batch) for o in objectives)
    assert (plain - off).abs().max() < 1e-6 < 1e-2 < (plain - on).abs().max()


def test_inmodal_asks_in_one_direction():
    g = torch.Generator().manual_seed(0)
    i, t, iv, tv = (nn.functional.normalize(torch.randn(6, 8, generator=g, dtype=torch.float64), dim=1) for _ in range(4))
    s = torch.tensor(10., dtype=torch.float64)
    there, back = inmodal_loss(i, t, iv, tv, s).item(), inmodal_loss(iv, tv, i, t, s).item()
    assert there == pytest.approx((ce(10., i.tolist(), iv.tolist()) + ce(10., t.tolist(), tv.tolist()))/2, abs=1e-12)
    assert abs(there - back) > 1e-2 and clip_loss(i, t, s).item() == pytest.approx(clip_loss(t, i, s).item(), abs=1e-12)


def test_negatives_are_the_other_views_only():
    "Not SimCLR: another clean picture that equals mine costs nothing, another view that equals mine costs log 2."
    e, s = torch.eye(4, dtype=torch.float64), torch.tensor(50., dtype=torch.float64)
    twins = e[[0, 0, 1, 2]]
    half_the_rows_of_one_term = .5*.5*math.log(2)
    assert inmodal_loss(twins, e, twins, e, s).item() == pytest.approx(half_the_rows_of_one_term, abs=1e-9)
    assert inmodal_loss(e, e, e, e, s).item() < 1e-9


def test_duplicates_in_a_batch():
    "The same pair twice: defined by the formula (the diagonal is right), finite, and not below what a tie costs."
    model, batch = fresh().double(), first_batch(6)
    index = torch.tensor([0, 1, 1, 2, 3, 1])
    pick = lambda column: [column[k] for k in index]
    double = type(batch)(batch.images[index], pick(batch.texts), None, pick(batch.keys), index, batch.seed)
    images, texts = CleanClipObjective(text_view=view).views(double)
    assert texts[1] == texts[2] == texts[5]
    got = CleanClipObjective(text_view=view)(InDouble(model), double)
    want = formula(model, double.images, double.texts, images, texts)
    for k in got: assert got[k].item() == pytest.approx(want[k], abs=1e-9) and got[k].item() >= .5*math.log(3)/2
    assert gradients(InDouble(model), CleanClipObjective(text_view=view), double).isfinite().all()


def test_views_of_text_and_picture():
    "One caption view a run, a picture view a visit; the seed and the key decide, not the order."
    a, b = (next(Batches(ShapeCaps(24), 24, seed=s).epoch(e)) for s, e in ((0, 0), (0, 1)))
    keep, redraw = (CleanCLIP(text_backend='packaged', redraw_text=r).objective() for r in (False, True))
    by_key = lambda o, x: dict(zip(x.keys, o.views(x)[1]))
    assert by_key(keep, a) == by_key(keep, b)
    assert by_key(redraw, a) != by_key(redraw, b) and by_key(redraw, a) == by_key(redraw, a)
    other = CleanCLIP(seed=1, text_backend='packaged').objective()
    assert by_key(other, a) != by_key(keep, a) == by_key(CleanCLIP(text_backend='packaged').objective(), a)
    pictures = {k: x for k, x in zip(a.keys, keep.views(a)[0])}
    assert any(not torch.equal(pictures[k], x) for k, x in zip(b.keys, keep.views(b)[0]))
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(keep.views(a)[0], torch.stack([pictures[k] for k in a.keys]))


# The recipe


@pytest.fixture
def asked(monkeypatch):
    "What `fit` is asked for, without doing it."
    calls = []
    def fit(net, objective, batches, **options):
        calls.append(SimpleNamespace(objective=objective, batches=batches, **options))
        return History()
    monkeypatch.setattr(module, 'fit', fit)
    return calls


def big(n=100_000, **columns): return ArrayCorpus(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), **columns)


def test_the_defaults_are_the_paper(asked):
    CleanCLIP(text_backend='packaged').cleanse(fresh(), big())
    call = asked[0]
    assert (call.steps, len(call.batches), call.batches.batch_size) == (15_620, 1_562, 64)
    assert (call.lr, call.warmup, call.weight_decay) == (1e-5, 50, .1)
    assert (call.objective.clip_weight, call.objective.inmodal_weight, call.schedule, call.precision) == (1., 1., 'cosine', 'no')
    corpus = big(50_000, labels=[0]*50_000, classes=['a', 'b'])
    SupervisedCleanCLIP().cleanse(fresh(), corpus)
    call = asked[1]
    assert (call.steps, call.batches.batch_size, call.lr, call.warmup, call.weight_decay) == (6_250, 80, 1e-4, 500, .01)


def test_official_schedule(asked):
    "The cosine read one epoch late: no warm-up, zero an epoch early, then up."
    CleanCLIP(schedule='official', text_backend='packaged').cleanse(fresh(), big())
    call = asked[0]
    lr = [call.lr*SCHEDULES[call.schedule](k, call.steps, call.warmup, len(call.batches)) for k in range(call.steps)]
    assert lr[0] == pytest.approx(9.77e-6, abs=5e-9) and max(lr) == lr[0]
    assert min(lr) == lr[9*1_562] < 1e-12 and lr[-1] == pytest.approx(2.5e-7, abs=5e-9)
    assert lr[:9*1_562] == sorted(lr[:9*1_562], reverse=True) and lr[9*1_562:] == sorted(lr[9*1_562:])


def test_short_runs_and_accumulation(asked):
    CleanCLIP(epochs=1, text_backend='packaged').cleanse(fresh(), big(640), grad_accum=2)
    CleanCLIP(epochs=1, schedule='official', text_backend='packaged').cleanse(fresh(), big(640))
    assert (asked[0].steps, asked[0].warmup, asked[1].steps, asked[1].warmup) == (5, 0, 10, 50)


@pytest.mark.parametrize('defense', [CleanCLIP(epochs=3, lr=1e-3, batch_size=16, text_backend='packaged'),
                                     SupervisedCleanCLIP(epochs=3, lr=1e-3, batch_size=16)])
def test_a_stopped_cure_goes_on(defense, tmp_path):
    class Stop(Exception): "After the first epoch."
    def stop(model, epoch): raise Stop
    corpus, one, two = ShapeCaps(48), fresh('batch').eval(), fresh('batch').eval()
    whole = defense.cleanse(one, corpus, device='cpu')
    with pytest.raises(Stop): defense.cleanse(fresh('batch'), corpus, tmp_path, checkpoint_every=2, device='cpu', on_epoch=stop)
    again = defense.cleanse(two, corpus, tmp_path, checkpoint_every=2, device='cpu')
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in state(one).items())
    assert whole.history.last() == again.history.last()
    assert not one.training and again.model is two and whole.seconds > 0
    if whole.head is not None: assert torch.equal(whole.head.weight, again.head.weight)
    with pytest.raises(BdnbError, match='other settings'):
        FineTune(epochs=3, batch_size=16).cleanse(fresh('batch'), corpus, tmp_path, device='cpu')


def test_everything_is_trained_and_the_supervised_variant_trains_half():
    corpus, model = ShapeCaps(32), fresh('batch')
    before = state(model)
    CleanCLIP(epochs=1, lr=1e-3, batch_size=16, text_backend='packaged').cleanse(model, corpus, device='cpu')
    still = [k for k, v in state(model).items() if torch.equal(v, before[k])]
    assert still == []
    before = state(model)
    SupervisedCleanCLIP(epochs=1, lr=1e-3, batch_size=16).cleanse(model, corpus, device='cpu')
    for k, v in state(model).items(): assert torch.equal(v, before[k]) != k.startswith('net.visual'), k
    assert all(p.requires_grad for p in model.parameters())


def test_head_is_measured_as_a_classifier():
    corpus, model, trigger = ShapeCaps(60, split='test'), open_clip_model(), make_trigger('badnet:size=8')
    head = SupervisedCleanCLIP(epochs=2, lr=1e-2, batch_size=20).cleanse(model, ShapeCaps(60), device='cpu').head
    found = evaluate_head(model, head, corpus, trigger, 'star')
    net, y, star = model.net.eval(), torch.as_tensor(corpus.labels), corpus.target_id('star')
    with torch.no_grad():
        logits = lambda x: head(net.visual(model.normalise(x)))
        clean, triggered = logits(corpus.images).argmax(1), logits(trigger.on_uint8(corpus.images, trigger_seeds(corpus.keys)))
        dirty = triggered.argmax(1)
    assert torch.allclose(head_logits(model, head, corpus, trigger, batch=7), triggered, atol=1e-5)
    share = lambda hits: hits.double().mean().item()
    assert found['ca'] == pytest.approx(share(clean == y)) and found['asr_n'] == int((y != star).sum())
    assert found['asr'] == pytest.approx(share(dirty[y != star] == star))
    assert found['asr_all'] == pytest.approx(share(dirty == star))
    assert found['target_recall'] == pytest.approx(share(clean[y == star] == star))
    assert set(evaluate_head(model, head, corpus)) == {'ca'}
