"Studies of encoders whose detector changes between two starts in the same folder."
import warnings
from dataclasses import dataclass

import pytest
import torch

import bdnb.ssl_study as ssl_study
from bdnb.core import read_json, write_json
from bdnb.defenses.findings import FOUND, Findings
from bdnb.defenses.poisonfilter import FilterRecipe
from bdnb.models.encoders import create_encoder
from bdnb.ssl_study import ERASE, make_ssl_study, ssl_tour

CASE = 'patch-pattern=10-seed0'
study = make_ssl_study(n=40, class_rate=1., probe_n=30, test_n=20, epochs=1, batch_size=20, width=4, queue=64)


@dataclass(frozen=True)
class Blunt:
    "Removes the first pictures."
    many:int = 3
    left:int = 0
    seed:int = 0
    filter:FilterRecipe = None

    def recipe(self, size): return self.filter or FilterRecipe.quick()

    def scan(self, corpus, encoder, out=None, quiet=False):
        n = len(corpus)
        window = torch.tensor([0, self.left, 8, 8]).repeat(n, 1)
        return Findings(corpus.keys, torch.rand(n), torch.zeros(n, dtype=torch.int64), window, torch.rand(n), torch.arange(n) >= self.many,
                        FOUND, dict(looks=[], seconds={}, forwards={}))


@pytest.fixture
def tour(tmp_path, monkeypatch):
    "Make the rows of a study with a detector of these defaults: (the detector's row, pictures trained on, warnings)."
    trained = []
    def train(corpus, recipe, seed, out, quiet):
        trained.append(len(corpus))
        assert recipe.epochs == 1 and not (out/'checkpoint.pt').exists()
        return create_encoder('resnet10/half', 4, recipe.image_size), None, 1.
    monkeypatch.setattr(ssl_study, 'train_encoder', train)
    def call(system='blunt', retrain=True, **defaults):
        monkeypatch.setattr(ssl_study, 'make_detector', lambda name, **o: Blunt(**(defaults | o)))
        trained.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            rows = ssl_tour(tmp_path, systems=(system,), study=study, reference=False, retrain=retrain, quiet=True)
        return rows[1], trained[:], [str(w.message) for w in said if 'row-' in str(w.message)]
    call.folder = tmp_path/CASE
    return call


def test_a_row_belongs_to_its_detectors_settings(tour):
    row, trained, said = tour()
    assert trained == [40, 37] and row['settings']['many'] == 3 and row['settings']['filter']['steps'] and not said
    assert tour() == (row, [], [])
    other, trained, said = tour(many=5)
    assert trained == [35] and other['after']['removed'] == 5 and len(said) == 1
    assert 'row-blunt.json: was made with many=3, not 5; the scan is done again' in said[0]
    assert tour(many=5) == (other, [], [])
    newer = {**other, 'settings': {**other['settings'], 'gone': None}}              # an option of other days that says nothing
    del newer['settings']['left'], newer['settings']['filter']['width']             # and some that came later, at their defaults
    write_json(tour.folder/'row-blunt.json', newer)
    again, trained, said = tour(many=5)
    assert again['settings'] == newer['settings'] and not trained and not said


def test_a_scan_of_other_settings_leaves_a_row_with_a_training_alone(tour):
    row, *_ = tour()
    assert tour(retrain=False) == (row, [], [])
    scanned, trained, said = tour(retrain=False, many=5)
    assert not trained and len(said) == 1 and scanned['after']['removed'] == 5 and 'asr' not in scanned['after']
    assert read_json(tour.folder/'row-blunt.json')['after']['removed'] == 3
    assert tour(retrain=False, many=5) == (scanned, [], [])                              # no scan, and none is announced
    assert tour() == (row, [], [])


def test_an_encoder_is_trained_again_unless_the_same_pictures_are_kept(tour):
    tour()
    assert tour(left=5)[1] == []                                   # another setting and another row, but the same pictures
    (tour.folder/'blunt'/'retrained'/'checkpoint.pt').touch()      # killed while training on others
    assert tour(many=5)[1] == [35] and read_json(tour.folder/'blunt'/'retrained'/'training.json')['kept']
    assert tour(f'blunt{ERASE}')[1] == [40]
    assert tour(f'blunt{ERASE}', left=5)[1] == [40] and tour(f'blunt{ERASE}', left=5)[1] == []        # other windows


def test_folders_from_before_settings_were_kept(tour):
    row, *_ = tour()
    path, note = tour.folder/'row-blunt.json', tour.folder/'blunt'/'retrained'/'training.json'
    write_json(path, {k: v for k, v in row.items() if k != 'settings'})
    write_json(note, dict(seconds=1.))
    old, trained, said = tour(many=5)
    assert old['after'] == row['after'] and not trained and 'does not say which settings' in said[0] and 'Delete it' in said[0]
    path.unlink()
    assert tour()[1] == [37]                                       # whose pictures were in the old one, nobody knows
