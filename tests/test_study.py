"Rows of studies whose cures change between two starts in the same folder."
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest

import bdnb.study as study
from bdnb.classifier_study import CLASSIFIER_DEFENSES, ClassifierCase, classifier_tour, make_classifier_recipe
from bdnb.core import read_json, write_json
from bdnb.study import DEFENSES, make_recipe, unlike


def test_the_first_option_that_differs():
    usual = dict(rate=.1, ratios=None, filter=dict(steps=9, width=4))
    said = lambda was, **now: unlike(Path('x'), was, usual | now, usual)
    for same in usual, {}, dict(rate=.1), dict(filter=dict(steps=9)), dict(filter=None), dict(gone=None):
        assert said(same) is None, same
    assert said(dict(rate=.2)) == 'x: was made with rate=0.2, not 0.1'
    assert said({}, rate=.3) == 'x: was made with rate=0.1, not 0.3'              # it came later, and is not as usual now
    assert said(dict(filter=dict(width=8))) == 'x: was made with filter.width=8, not 4'
    assert said(dict(gone=1)) == 'x: was made with gone=1, not None'
    assert said(dict(ratios=dict(head=.1))) == 'x: was made with ratios.head=0.1, not None'
    assert said(dict(ratios=dict(head=.1)), ratios=dict(head=.1, body=.2)) == 'x: was made with ratios.body=None, not 0.2'
    assert said(dict(ratios={})) == 'x: was made with ratios={}, not None'


@pytest.fixture(params=['clip', 'classifier'])
def rows(request, tmp_path, monkeypatch):
    "Rows of a study whose victim and cure are made up: (rows, systems that were cured, warnings)."
    clip, cured = request.param == 'clip', []
    case, note = study._Case if clip else ClassifierCase, dict(metrics=dict(ca=.9, asr=1.), seconds=1., tag='', rate=.1)
    tour, attack, table, name = ((study.tour, 'badnet', DEFENSES, 'finetune') if clip else
                                 (classifier_tour, 'badnets', CLASSIFIER_DEFENSES, 'bcu'))
    small = dict(n=20, test_n=9)
    recipe = make_recipe(clean_n=9, **small) if clip else make_classifier_recipe(pool_n=9, swift=False, **small)
    (kind, own), folder = table[name], tmp_path/f'{attack}-seed0'/name

    def cure(self, system, *choice):
        cured.append(system)
        defense = self.defense(system, *choice[:1])
        write_json(folder/'config.json', dict(settings=asdict(defense)))
        (folder/f'weights {defense.weight_decay:g}').touch()
        return (note['metrics'],)*(1 + clip) + (dict(seconds=1.),)
    monkeypatch.setattr(case, 'victim', lambda self: (None, note['metrics'], 1.) if clip else (None, None, note))
    monkeypatch.setattr(case, 'cure', cure)

    def call(**options):
        monkeypatch.setitem(table, name, (kind, own | options))
        cured.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            made = tour(tmp_path, attacks=(attack,), defenses=(name,), recipe=recipe, quiet=True)
        return made, cured[:], [str(w.message) for w in said]
    call.folder = folder
    return call


def test_a_row_belongs_to_its_cures_settings(rows):
    first, cured, said = rows(weight_decay=.125)
    assert len(cured) == 1 and not said and [r['system'] for r in first] == ['none', *cured]
    assert rows(weight_decay=.125) == (first, [], [])
    other, cured, said = rows(weight_decay=.25)
    assert len(cured) == 1 and len(other) == 2
    assert said == [f'{rows.folder}: was made with weight_decay=0.125, not 0.25; it is made again']
    assert sorted(p.name for p in rows.folder.iterdir()) == ['config.json', 'row.json', 'weights 0.25']      # and nothing old
    config = read_json(rows.folder/'config.json')
    del config['settings']['schedule']                                                 # it came later, and is as usual
    write_json(rows.folder/'config.json', config)
    assert rows(weight_decay=.25) == (other, [], [])
