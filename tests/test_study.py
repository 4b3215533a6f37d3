"Rows of studies whose cures change between two starts in the same folder."
import importlib.util
import shlex
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest

import bdnb.study as study
from bdnb.classifier_study import CLASSIFIER_DEFENSES, ClassifierCase, classifier_tour, make_classifier_recipe
from bdnb.core import BdnbError, read_json, write_json
from bdnb.study import DEFENSES, make_recipe, row_stands, say_command, unlike


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


def test_nothing_is_thrown_away_before_the_data_are_open(tmp_path):
    folder, (kind, own) = tmp_path/'finetune', DEFENSES['finetune']
    def gone(): raise BdnbError('photos: no such folder')
    def stands(opened=gone, **options):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            return row_stands(folder, kind(**own, **options), opened), [str(w.message) for w in said]
    assert stands() == (False, [])
    write_json(folder/'row.json', {})
    write_json(folder/'config.json', dict(settings=asdict(kind(weight_decay=.125))))
    assert stands(weight_decay=.125) == (True, [])
    with pytest.raises(BdnbError, match='no such folder'): stands(weight_decay=.25)
    assert (folder/'row.json').exists() and stands(weight_decay=.125) == (True, [])
    assert stands(lambda: None, weight_decay=.25)[0] is False and not folder.exists()
    write_json(folder/'row.json', {})
    for _ in range(2):                                                 # no settings: in a file without them, or in no file
        stood, said = stands(weight_decay=.25)
        assert stood and len(said) == 1 and 'does not say which settings' in said[0]
        write_json(folder/'config.json', dict(system='finetune'))


def test_a_mistyped_corpus_leaves_no_study(tmp_path):
    for tour, attack in (study.tour, 'badnet'), (classifier_tour, 'badnets'):
        with pytest.raises(BdnbError, match='nowhere'):
            tour(tmp_path/'out', data='folder:nowhere', test='folder:nowhere', attacks=(attack,))
        assert not (tmp_path/'out'/'study.json').exists()


def test_every_results_file_names_a_command_that_is_there():
    top = Path(__file__).parents[1]
    files = sorted((top/'results').glob('*.json'))
    assert len(files) > 40
    for path in files:
        words = shlex.split(say_command(read_json(path)))
        if words[0] == 'bdnb': continue                                # test_cli runs these as far as their data
        assert words[0] == 'python', (path, words)
        if words[1] == '-m': assert importlib.util.find_spec(words[2]), (path, words)
        else: assert (top/words[1]).is_file(), (path, words)
        assert not any(set('()') & set(w) and ' ' not in w for w in words), (path, words)          # a value that fell apart
