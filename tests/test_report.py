"The report: self-contained, escaped, and true to the run folder it was made from."
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bdnb import evaluate
from bdnb.core import BdnbError, write_json
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.images import BadImage
from bdnb.data.shapes import ShapeCaps
from bdnb.attacks.triggers import make_trigger
from bdnb.models.build import create_model
from bdnb.report import (Html, compare, counts, curves, describe_metric, load_pictures, mean_over_seeds, metric_rows,
                         metrics_table, page, pictures_of, read_history, save_pictures, series_of, tag, tour_table, write_report)
from bdnb.study import defence_table, summary

evil = ['<script>alert(1)</script>', '"><img src=x onerror=alert(2)>', "' onmouseover='alert(3)", 
        '</style><script>alert(4)</script>', '<!-- ', ']]>', '&#60;script&#62;', 'javascript:alert(5)',
        '\u202eevil\x1b[2J\x00', 'a' * 3000, '\ud800 alone']


class Elements(HTMLParser):
    "Every element and its attributes; complains about bad nesting."
    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, name, attrs):
        self.found.append((name, dict(attrs)))
        if name not in ('img', 'meta', 'br'): self.open.append(name)

    def handle_endtag(self, name): assert self.open and self.open.pop() == name, name
    def handle_data(self, data): self.text.append(data)


def run_folder(folder, words):
    "A run folder in which everything that can hold a word holds these."
    images = ShapeCaps(len(words), seed=1).images
    keys = [f'{i} {w}' for i, w in enumerate(words)]
    corpus = ArrayCorpus(images, keys, [0]*len(words), words, classes=words[:1], name=words[0])
    shots = pictures_of(corpus, make_trigger('badnet'), len(words))
    save_pictures(folder, {words[1]: shots, **{w: [] for w in words[2:]}})
    write_json(folder/'config.json', dict(run=words[0], title=words[1], text=words[2], command=words[3], notes=words,
                                          options={w: w for w in words}, skipped=[[w, w] for w in words],
                                          stamp=dict(created=words[0], hardware={'cpu': words[1]}, versions={words[2]: words[3]},
                                                     commit=words[0])))
    rows = [dict(system=w, data=w, attack=w, seed=w, before={'asr': 1.}, after={'asr': .5}) for w in words]
    write_json(folder/'metrics.json', dict(target=words[0], counts=dict(pictures=5, others=4), rows=rows,
                                           before={'ca': .5, 'asr': 1., words[1]: .5}, after={'ca': .25, 'asr': .5}))
    lines = [json.dumps({'step': i, 'loss': 1/i, **{w: 1/i for w in words}}) for i in range(1, 5)]
    (folder/'history.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


def test_nothing_from_the_data_becomes_markup(tmp_path):
    text = write_report(run_folder(tmp_path, evil)).read_text(encoding='utf-8')
    tame = write_report(run_folder(tmp_path, [f'word{i}' for i in range(len(evil))])).read_text(encoding='utf-8')
    names = lambda t: [n for n, _ in Elements(t).found]
    assert names(text) == names(tame)                                       # evil words change no element
    for name, attrs in Elements(text).found:
        assert name != 'script' and not [a for a in attrs if a.startswith('on')], (name, attrs)
        assert all(attrs[a].startswith('data:image/png;base64,') for a in ('src', 'href') if a in attrs)
    said = ' '.join(Elements(text).text)
    assert all(w in said for w in evil[:4]) and '\x1b' not in text and '\u202e' not in text and '\\u202e' in said


def test_asks_nothing_of_the_network(tmp_path):
    text = write_report(run_folder(tmp_path, ['http://example.org/x.png'] * 4)).read_text()
    found = Elements(text).found
    policy = [a['content'] for n, a in found if a.get('http-equiv') == 'Content-Security-Policy']
    assert policy and "default-src 'none'" in policy[0] and 'script' not in policy[0]
    assert not {'script', 'link', 'iframe', 'object', 'embed', 'form', 'a', 'base'} & {n for n, _ in found}
    assert 'url(' not in text and '@import' not in text
    assert any(a.get('name') == 'viewport' for _, a in found) and 'prefers-color-scheme:dark' in text


@pytest.mark.parametrize('word', evil)
def test_tag(word):
    made = tag('td', word, title=word, cls=word)
    seen = Elements(made)
    assert [n for n, _ in seen.found] == ['td'] and set(seen.found[0][1]) == {'title', 'class'}
    if word.isprintable(): assert ''.join(seen.text) == word == seen.found[0][1]['title']
    assert tag('p', Html('<b>x</b>'), None, [1, ['<']]) == '<p><b>x</b>1&lt;</p>'


def test_pictures_survive_the_folder_and_lists_of_strangers(tmp_path):
    test = ShapeCaps(8, seed=2)
    shots = pictures_of(test, make_trigger('sig'), 3)
    save_pictures(tmp_path, {'a': shots[:1], 'b/../c': shots[1:]})
    assert load_pictures(tmp_path) == {'a': shots[:1], 'b/../c': shots[1:]}
    (tmp_path/'secret').write_text('x')
    listed = tmp_path/'pictures'/'pictures.json'
    for wrong in ({'a': 1}, [{'title': 'x', 'shots': [dict(key='k', clean='../secret', gain=1, changed=0)]}],
                  [{'title': 'x', 'shots': [dict(key='k', gain=1, changed=0)] * 9}], [3]):
        write_json(listed, wrong)
        with pytest.raises(BdnbError, match='pictures.json'): load_pictures(tmp_path)


def test_pictures_show_what_the_evaluation_sees():
    test = ShapeCaps(6, seed=3)
    for spec in ('badnet', 'badnet:pattern=noise,place=random', 'wanet:s=2', 'stripes'):
        trigger = make_trigger(spec)
        seen = trigger.on_uint8(test.images, evaluate.trigger_seeds(test.keys))
        for i, s in zip(range(6), pictures_of(test, trigger, 6)):
            read = lambda data: np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
            clean, triggered = test.images[i].numpy(), seen[i].numpy()
            assert (read(s.clean) == clean).all() and (read(s.triggered) == triggered).all() and s.key == test.keys[i]
            change = np.abs(triggered.astype(int) - clean)
            assert abs(read(s.difference).astype(int) - change*s.gain).max() <= 0.05*change.max() + 1
            assert s.changed == pytest.approx((change.max(0) > 0).mean())


def test_broken_pictures_are_passed_over():
    class Broken(ArrayCorpus):
        def _image(self, i, size=None, fit='crop'):
            if i == 0: raise BadImage('broken')
            return super()._image(i, size, fit)
    broken = Broken(ShapeCaps(4).images, list('abcd'))
    assert [s.key for s in pictures_of(broken, make_trigger('badnet'), 4, 16)] == ['b', 'c', 'd']


def test_large_pictures_become_thumbnails():
    big = (ShapeCaps(1, size=256).images[0].repeat(1, 2, 4))
    im = Image.open(io.BytesIO(compare('k', big, big).clean))
    assert im.size == (224, 112)
    assert compare('k', big, big).gain == 255 and compare('k', big, big).changed == 0


def test_every_number_of_the_evaluation_has_a_name():
    model, test = create_model('tiny'), ShapeCaps(36, split='test')
    old = create_model('tiny', seed=1)
    found = evaluate.evaluate_clip(model, test, make_trigger('badnet'), 'star', probe=ShapeCaps(24), original=old)
    pairs = ArrayCorpus(test.images, test.keys, texts=test.texts)
    found |= evaluate.evaluate_clip(model, pairs, make_trigger('badnet'), 'star')
    some = 'ca asr_all target_recall asr_original_text probe_asr caption_asr@5 t2i_r@5 compactness'
    assert set(some.split()) <= set(found)
    assert not [n for n in metric_rows(found) if not describe_metric(n).what]
    of = {describe_metric(n).of for n in metric_rows(found)} - {''}
    assert of <= set(counts(test, 'star', found))                       # and every denominator is counted


def test_denominators_against_a_count():
    test = ShapeCaps(50, seed=5)
    star = [c for c in test.labels if test.classes[c] == 'star']
    assert counts(test, 'star') == dict(pictures=50, targets=len(star), others=50 - len(star), captions=50, captioned=50)
    many = ArrayCorpus(test.images[:3], captions=[['a', 'b'], ['c'], ['d', 'e', 'f']])
    assert counts(many, 'word', dict(caption_asr_n=2)) == dict(pictures=3, captions=6, captioned=3, caption_others=2)
    table = metrics_table({'measured': {'ca': .5, 'asr': 1.}}, counts(test, 'star'), 'star')
    assert f'>{50 - len(star)}<' in table and 'good' not in table


def test_means_over_seeds_against_numpy():
    g = np.random.default_rng(0)
    draw = lambda: dict(ca=float(g.random()), asr=float(g.random()))
    rows = [dict(system=s, data='d', attack=a, seed=k, before=draw(), after=draw())
            for a in 'ab' for s in ('none', 'x', 'y') for k in range(4)]
    for (data, attack), group in mean_over_seeds(rows).items():
        assert set(group) == {'before', 'x', 'y'}
        for s in 'xy':
            v = [r['after']['asr'] for r in rows if r['attack'] == attack and r['system'] == s]
            assert group[s]['asr'] == (pytest.approx(np.mean(v)), min(v), max(v)) and group[s]['seeds'] == 4
    assert tour_table(rows).count('<tr') == 3


def test_history_may_end_in_the_middle_of_a_line(tmp_path):
    path = tmp_path/'history.jsonl'
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert len(read_history(path)) == 2 and series_of(read_history(path)) == {'loss': [(1, 2.)]}
    path.write_text('{"step": 1\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(BdnbError, match='line 1'): read_history(path)
    assert read_history(tmp_path/'none') == []


def test_curves_stay_inside_their_frame():
    drawn = curves({'a': [(i, (-1)**i * 1e6*i) for i in range(1000)], 'b': [(0, 0.), (1e9, 1.)]})
    points = [tuple(map(float, p.split(','))) for line in re.findall(r'points="([^"]*)"', drawn) for p in line.split()]
    assert len(points) == 302 and all(0 <= x <= 360 and 0 <= y <= 190 for x, y in points)


@pytest.mark.parametrize('config, message', [(None, 'no such file'), ('{', 'not JSON'), ('[]', 'must be objects')])
def test_folder_that_holds_no_run(tmp_path, config, message):
    if config is not None: (tmp_path/'config.json').write_text(config)
    with pytest.raises(BdnbError, match=message): write_report(tmp_path)
    assert not (tmp_path/'report.html').exists()


def test_full_page_is_well_formed(tmp_path):
    write_json(tmp_path/'config.json', {})
    assert Elements(write_report(tmp_path).read_text()).found and Elements(page('t', tag('p', 'x'))).text
    assert html.unescape(page('<t>')).count('<t>') == 1


def test_other_pools_are_other_columns():
    "One seed on two pools is not two seeds."
    row = lambda system, asr, **pool: dict(data='d', attack='a', system=system, after=dict(ca=.5, asr=asr), **pool)
    rows = [row('none', 1.), row('bcu', .02, pool='held out', pool_n=5000, pool_poisoned=0.),
            row('bcu', .8, pool='held out', pool_n=100, pool_poisoned=.01)]
    found = summary(rows)
    assert [c['seeds'] for c in found] == [1, 1, 1] and [c['asr'] for c in found] == [1., .02, .8]
    head = defence_table(rows).splitlines()[0]
    assert '| no defence | BCU on held out, 5,000 | BCU on held out, 100, 1 % poisoned |' in head


def test_a_control_is_not_what_was_before():
    "Encoders of clean pictures, or trained for longer, are measured by themselves; their numbers are not the victim's."
    from bdnb.report import mean_over_seeds
    row = lambda system, before: dict(data='d', attack='a', seed=0, system=system, before=dict(asr=before), after=dict(asr=before))
    rows = [row('none', .9), row('clean', 0.), row('poisoncam', .9), row('none+again', .2)]
    assert [mean_over_seeds(r)['d', 'a']['before']['asr'][0] for r in (rows, rows[::-1], rows[1:2])] == [.9, .9, 0.]
