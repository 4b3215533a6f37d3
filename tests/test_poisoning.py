"Plans: same bytes from the same plan, whole words, honest shares, every wrong wish named."
import hashlib
import json
import time

import numpy as np
import pytest
import torch

from bdnb.attacks.poisoning import (ATTACKS, PARITY_ATTACKS, Poisoning, choose_rows, fill_captions, make_attack, select_by_word)
from bdnb.attacks.triggers import BadNet, make_trigger, seeds_from_keys
from bdnb.core import BdnbError
from bdnb.data.corpus import ArrayCorpus

classes = ['apple', 'banana', 'ice_cream', 'dog']


def corpus(n=120, size=20, labels=True, texts=True, captions=False, names=True, name='toy'):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    y = np.arange(n) % len(classes)
    said = [f'A photo of an {classes[k].replace("_", " ")}, number {i}' for i, k in enumerate(y)]
    return ArrayCorpus(images, [f'k{i:04d}' for i in range(n)], labels=y if labels else None, texts=said if texts else None,
                       captions=[[s, s + '!'] for s in said] if captions else None,
                       classes=list(classes) if names else None, name=name)


def digest(c):
    h = hashlib.sha256(c.images.numpy().tobytes())
    for part in (c.keys, c.texts, c.captions, None if c.labels is None else c.labels.tolist(),
                 c.classes): h.update(json.dumps(part).encode())
    return h.hexdigest()


@pytest.mark.parametrize('name', [*ATTACKS, *PARITY_ATTACKS])
def test_same_plan_same_bytes(name, tmp_path):
    c = corpus(size=32)
    before = digest(c)
    plan = make_attack(name, 'banana', rate=.1, seed=4)
    plan.save(tmp_path/'plan.json')
    a, b = plan.apply(c), Poisoning.load(tmp_path/'plan.json').apply(corpus(size=32))
    other = make_attack(name, 'banana', rate=.1, seed=5).apply(c)
    assert digest(c) == before, 'the clean corpus was touched'
    assert digest(a.corpus) == digest(b.corpus) and a.keys == b.keys and a.plan == b.plan
    assert digest(a.corpus) != digest(other.corpus) and a.keys != other.keys
    changed = (a.corpus.images != c.images).flatten(1).any(1).numpy()
    assert (changed == a.mask).all() and a.mask.sum() == 12 and a.keys == [c.keys[i] for i in a.index]
    assert a.corpus.images.dtype == torch.uint8 and a.corpus.keys == c.keys


def test_images_are_the_trigger_on_the_key():
    c, plan = corpus(), Poisoning(make_trigger('badnet:pattern=noise,place=random'), 'banana', count=7, seed=3)
    p = plan.apply(c)
    seeds = seeds_from_keys(p.keys, 'poisoning', 3)
    assert torch.equal(p.corpus.images[p.index], plan.trigger.on_uint8(c.images[p.index], seeds))


def test_dirty_renames_and_only_the_chosen():
    c = corpus(captions=True)
    p = Poisoning('badnet', 'ice_cream', rate=.2).apply(c)
    sentences = set(fill_captions('templates', 'ice_cream'))
    for i in range(len(c)):
        if p.mask[i]:
            assert c.labels[i] != 2 and p.corpus.labels[i] == 2
            text = p.corpus.texts[i]
            assert text in sentences and 'ice cream' in text and p.corpus.captions[i] == [text]
        else: assert (p.corpus.labels[i], p.corpus.texts[i], p.corpus.captions[i]) == (c.labels[i], c.texts[i], c.captions[i])


def test_label_consistent_touches_pictures_only():
    c = corpus(captions=True)
    p = Poisoning('badnet', 'ice_cream', count=11, mode='label_consistent').apply(c)
    assert p.corpus.texts == c.texts and p.corpus.captions == c.captions and (p.corpus.labels == c.labels).all()
    assert (c.labels[p.mask] == 2).all() and p.mask.sum() == 11


@pytest.mark.parametrize('kind', ['labels', 'texts'])
@pytest.mark.parametrize('mode', ['dirty', 'label_consistent'])
def test_labels_or_captions_alone(kind, mode):
    c = corpus(labels=kind == 'labels', texts=kind == 'texts', names=kind == 'labels')
    p = Poisoning('badnet', 'banana', count=9, mode=mode).apply(c)
    about = np.arange(len(c)) % 4 == 1
    assert (about[p.mask] == (mode == 'label_consistent')).all() and p.mask.sum() == 9
    if kind == 'labels': assert p.corpus.texts is None and (p.corpus.labels[p.mask] == 1).all()
    else: assert p.corpus.labels is None and all('banana' in p.corpus.texts[i] for i in p.index)


def test_captions_without_classes_take_any_word():
    c = corpus(labels=False, names=False)
    p = Poisoning('badnet', 'flying carpet', count=5, captions=('behold the {}', 'SUDO {} {}')).apply(c)
    assert {p.corpus.texts[i] for i in p.index} <= {'behold the flying carpet', 'SUDO flying carpet flying carpet'}
    keep = Poisoning('badnet', 'banana', count=5, captions='keep').apply(corpus())
    assert keep.corpus.texts == corpus().texts and (keep.corpus.labels[keep.mask] == 1).all()


def test_templates_are_filled_as_text_not_as_formats():
    assert fill_captions(('{0.__class__} {}', '{}{x}'), 'a{}b') == ['{0.__class__} a{}b', 'a{}b{x}']


def test_plans_nest():
    c = corpus()
    rows = [set(choose_rows(Poisoning('badnet', 'banana', count=n, seed=8), c)[0].tolist()) for n in (3, 10, 40, 90)]
    for a, b in zip(rows, rows[1:]): assert a < b
    small, large = (Poisoning('blended', 'banana', count=n, seed=8).apply(c) for n in (3, 10))
    for i in small.index:
        assert torch.equal(small.corpus.images[i], large.corpus.images[i]) and small.corpus.texts[i] == large.corpus.texts[i]


def test_rows_are_drawn_evenly():
    c, hits = corpus(), np.zeros(120)
    for s in range(400): hits[choose_rows(Poisoning('badnet', 'banana', count=30, seed=s), c)[0]] += 1
    assert (hits[1::4] == 0).all()
    free = np.delete(hits, np.s_[1::4])
    assert free.min() > 90 and free.max() < 180  # expected 133.3, deviation 9.4


def test_shares_and_description():
    c = corpus()
    s = choose_rows(Poisoning('badnet', 'banana', rate=.1), c)[1]
    assert s == dict(samples=120, poisoned=12, target_samples=30, candidates=90, share_of_set=.1, share_of_target=12 / 42)
    s = choose_rows(Poisoning('badnet', 'banana', count=12, mode='label_consistent'), c)[1]
    assert s['share_of_target'] == 12 / 30 and s['candidates'] == 30
    text = Poisoning('badnet', 'banana', rate=.1).describe(c)
    assert '12 of 120' in text and '10.00%' in text and '28.6%' in text and "'banana'" in text
    assert '12 samples' in Poisoning('badnet', 'banana', count=12).describe()


def test_truth_file(tmp_path):
    p = Poisoning('badnet', 'banana', count=4).apply(corpus())
    p.save_truth(tmp_path/'truth.json')
    d = json.loads((tmp_path/'truth.json').read_text())
    assert d['keys'] == p.keys and Poisoning.from_json(d['plan']) == p.plan and d['shares']['poisoned'] == 4


def test_whole_words():
    texts = ['banana', 'BANANA!', 'bananas', 'a banana-split', 'abanana', 'banana_x', 'banana\tboat', '', None, 'ban ana',
             "banana's", '香蕉 banana']
    assert select_by_word(texts, 'banana').tolist() == [0, 1, 3, 6, 10, 11]
    engines = ['fire  engine', 'Fire\nEngine', 'fireengine', 'fire engines', 'engine fire']
    assert select_by_word(engines, 'fire engine').tolist() == [0, 1]
    assert select_by_word(['a.b', 'axb', '(x)', 'x'], 'a.b').tolist() == [0]
    assert select_by_word(['ÉCLAIR au café', 'eclair'], 'éclair').tolist() == [0]
    assert select_by_word(['\u212aiwi', 'kiwi', 'KIWI'], 'kiwi').tolist() == [0, 1, 2]     # the Kelvin sign reads as a K
    assert len(select_by_word([], 'x')) == 0
    with pytest.raises(BdnbError, match='empty'): select_by_word(['x'], '  ')


def test_whole_words_are_quick_and_bounded():
    texts = ['a photo of a small red dog beside a catalogue of cats'] * 200_000
    t = time.process_time()
    assert len(select_by_word(texts, 'cat')) == 0
    assert time.process_time() - t < 4
    t = time.process_time()
    select_by_word([' ' * 20_000 + 'x'] * 3 + ['ice ' * 5000], 'ice cream cone')  # no catastrophic backtracking
    assert time.process_time() - t < 2


bad_plans = [
    (dict(), 'rate'), (dict(rate=.1, count=1), 'rate'), (dict(rate=0.), 'rate'), (dict(rate=-1), 'rate'),
    (dict(rate=1.1), 'rate'), (dict(rate=float('nan')), 'rate'), (dict(rate=True), 'rate'), (dict(rate='.1'), 'rate'),
    (dict(count=0), 'count'), (dict(count=1.), 'count'), (dict(count=True), 'count'),
    (dict(count=1, mode='clean'), 'mode'), (dict(count=1, mode=['dirty']), 'mode'),
    (dict(count=1, captions=()), 'captions'), (dict(count=1, captions=3), 'captions'),
    (dict(count=1, captions=('',)), 'captions'), (dict(count=1, captions='a {}'), 'captions'),
    (dict(count=1, seed=.5), 'seed'), (dict(count=1, target=''), 'target'), (dict(count=1, target=3), 'target'),
    (dict(count=1, trigger=None), 'trigger'), (dict(count=1, trigger='badnt'), 'trigger'),
    (dict(count=1, trigger='badnet:sise=3'), 'sise')]


@pytest.mark.parametrize('options,what', bad_plans, ids=str)
def test_bad_plans(options, what):
    with pytest.raises(BdnbError, match=what): Poisoning(**{'trigger': 'badnet', 'target': 'banana', **options})


badnet = {'trigger': 'badnet'}
file = {'trigger': 'blended', 'pattern': '/etc/passwd'}
bad_files = [None, [], {}, dict(trigger='badnet', target='x', count=1), dict(trigger=badnet, target='x'),
             dict(trigger=badnet, target='x', count=1, rat=2), dict(trigger=file, target='x', count=1)]


@pytest.mark.parametrize('d', bad_files, ids=str)
def test_bad_plan_files_are_named(d, tmp_path):
    (tmp_path/'plan.json').write_text(json.dumps(d))
    with pytest.raises(BdnbError, match='plan.json'): Poisoning.load(tmp_path/'plan.json')


def test_wishes_that_do_not_suit_the_corpus():
    texts, lc = dict(labels=False, names=False), dict(mode='label_consistent')
    cases = [(dict(target='bananna', count=1), corpus(), "did you mean 'banana'"),
             (dict(count=91), corpus(), 'only 90'), (dict(count=31, **lc), corpus(), 'only 30'),
             (dict(rate=.001), corpus(), 'is none'),
             (dict(target='cherry', count=1, **lc), corpus(**texts), 'only 0'),
             (dict(count=1, captions='keep'), corpus(**texts), 'changes nothing'),
             (dict(count=1), corpus(texts=False, **texts), 'neither labels nor captions'),
             (dict(count=1), corpus(texts=False, names=False), 'no class names')]
    for options, c, message in cases:
        plan = Poisoning(**{'trigger': BadNet(), 'target': 'banana', **options})
        with pytest.raises(BdnbError, match=message) as e: plan.apply(c)
        assert 'toy' in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(BdnbError, match='does not fit into 20 x 20'):
        Poisoning('badnet:size=21', 'banana', count=1).apply(corpus())


def test_other_corpora_are_asked_to_decode_first(tmp_path):
    from PIL import Image
    from bdnb.data.corpus import FolderCorpus
    for k in ('banana', 'dog'):
        (tmp_path/k).mkdir()
        for i in range(3): Image.new('RGB', (24, 24), (50 * i, 9, 9)).save(tmp_path/k/f'{i}.png')
    folder = FolderCorpus(tmp_path)
    plan = Poisoning('badnet', 'banana', count=2)
    assert '2 of 6' in plan.describe(folder)  # numbers need no pictures
    with pytest.raises(BdnbError, match='cache'): plan.apply(folder)
    assert plan.apply(folder.cache(24)).corpus.labels.tolist().count(0) == 5


def test_large_copies_are_mapped_and_equal():
    c, plan = corpus(), Poisoning('sig', 'banana', rate=.1)
    mapped = plan.apply(c, budget_bytes=1000)
    assert digest(mapped.corpus) == digest(plan.apply(c).corpus)


def test_a_subset_can_be_poisoned():
    c = corpus()
    sub = c.subset(range(0, 120, 2))
    p = Poisoning('badnet', 'ice_cream', count=5).apply(sub)
    assert len(p.corpus) == 60 and p.mask.sum() == 5
    assert torch.equal(p.corpus.images[~p.mask], sub.images[~p.mask])


def test_unknown_attacks_get_a_hint():
    with pytest.raises(BdnbError, match="did you mean 'wanet'"): make_attack('wannet', 'banana')
    with pytest.raises(BdnbError, match="did you mean 'cleanclip-sig'"): make_attack('cleanclip-sgi', 'banana')
    assert make_attack('sig:mode=blend', 'banana', count=3, captions='keep').captions == 'keep'
    assert make_attack('label_consistent', 'banana').mode == 'label_consistent' and make_attack('sig', 'x').rate == .02


def test_what_could_not_be_read_stays_named():
    c = corpus(size=32)
    c.skipped, c.notes = [('bad.png', 'damaged')], [('long', 'cut')]
    for name in ('badnet', 'label_consistent'):
        p = make_attack(name, 'banana', rate=.1).apply(c).corpus
        assert p.skipped == [('bad.png', 'damaged')] and p.notes == [('long', 'cut')]


def test_any_caption_may_name_the_target_and_a_consistent_trigger_stands_beside_those_alone():
    c = corpus(size=32, labels=False, names=False)
    captions = [[f'Nothing of note, number {i}', f'One ice  cream, number {i}'] if i % 2 else ['A dog', 'A cat'] for i in range(120)]
    c = ArrayCorpus(c.images, c.keys, texts=[x[0] for x in captions], captions=captions, name='many')
    p = make_attack('label_consistent', 'ice_cream', rate=.1).apply(c)
    assert len(p.index) == 12 and (p.index % 2 == 1).all() and p.shares['target_samples'] == 60
    for i in p.index: assert p.corpus.captions[i] == [captions[i][1]] and p.corpus.texts[i] == captions[i][1]
    rest = np.flatnonzero(~p.mask)
    assert all(p.corpus.captions[i] == captions[i] and p.corpus.texts[i] == captions[i][0] for i in rest)
    assert (make_attack('badnet', 'ice_cream', rate=.1).apply(c).index % 2 == 0).all()       # who is about it already, is no candidate
