"What runs on a GPU where there is one: devices that do not fit together show up nowhere else."
import pytest, torch
from bdnb.classifier_study import classifier_tour, make_classifier_recipe
from bdnb.data.shapes import ShapeCaps
from bdnb.defenses.bcu import BCU
from bdnb.defenses.rivals import FineTuneClassifier
from bdnb.models.classifiers import Classifier, create_classifier, load_classifier
from bdnb.train import settled_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
SMALL = dict(width=16, n=200, test_n=100, pool_n=200, epochs=1)

@pytest.fixture
def worked(monkeypatch):
    "Where classifiers looked at more than one picture."
    seen, forward = set(), Classifier.forward
    def note(self, images):
        if len(images) > 1: seen.add(images.device.type)
        return forward(self, images)
    monkeypatch.setattr(Classifier, 'forward', note)
    return seen

def recipe(**changes):
    cures = dict(anp=dict(steps=10), nad=dict(teacher_epochs=1), bcu=dict(grid=(1., 4.)))
    return make_classifier_recipe('shapes', **SMALL, augment=True, cures=cures,
                                  cure=dict(epochs=1, batch_size=32, crop_flip=True), **changes)

def test_classifier_study(tmp_path, worked):
    systems = ['clean', 'finetune', 'fine_pruning', 'nad', 'anp', 'kd_only', 'bcu']
    rows = classifier_tour(tmp_path, attacks=['badnets'], defenses=systems, recipe=recipe(), quiet=True)
    assert [r['system'] for r in rows] == ['none', *systems] and worked == {'cuda'}
    for r in rows:
        assert r['precision'] == settled_precision('auto')
        assert 0 <= r['after']['asr'] <= 1 and 0 <= r['after']['ca'] <= 1
    model = load_classifier(tmp_path/'badnets-seed0'/'bcu'/'model.safetensors')
    assert all(v.isfinite().all() for v in model.state_dict().values())
    worked.clear()
    again = classifier_tour(tmp_path, attacks=['badnets'], defenses=systems, recipe=recipe(), quiet=True)
    assert again == rows and not worked

@pytest.mark.parametrize('attack', ['blended', 'sig', 'wanet', 'label_consistent', 'input_aware', 'low_frequency'])
def test_victims(attack, tmp_path, worked):
    options = dict(label_consistent=dict(pgd_steps=3), low_frequency=dict(search_steps=3)).get(attack, {})
    row, = classifier_tour(tmp_path, attacks=[attack], defenses=[], recipe=recipe(attacks={attack: options}), quiet=True)
    assert worked == {'cuda'} and 0 <= row['after']['asr'] <= 1

@pytest.mark.parametrize('cure', [FineTuneClassifier, BCU])
def test_stays_on_the_processor(cure, worked):
    pool = ShapeCaps(64, 32, 0, 'clean')
    model = create_classifier('resnet18', pool.classes, 8)
    cure(epochs=1, batch_size=32).cleanse(model, pool, quiet=True, device='cpu')
    assert worked == {'cpu'} and {p.device.type for p in model.parameters()} == {'cpu'}
