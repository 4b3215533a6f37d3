"What runs on a GPU where there is one: devices that do not fit together show up nowhere else."
import pytest, torch
from bdnb.classifier_study import classifier_tour, make_classifier_recipe
from bdnb.data.shapes import ShapeCaps
from bdnb.data.wallpapers import Wallpapers
from bdnb.defenses.bcu import BCU
from bdnb.defenses.poisoncam import PoisonCAM
from bdnb.defenses.poisonfilter import FilterRecipe
from bdnb.defenses.rivals import FineTuneClassifier
from bdnb.models.classifiers import Classifier, create_classifier, load_classifier
from bdnb.models.encoders import Encoder, create_encoder
from bdnb.ssl_study import make_ssl_study, ssl_tour
from bdnb.train import settled_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
QUICK = FilterRecipe.quick(models=2, steps=10)
SMALL = dict(width=16, n=200, test_n=100, pool_n=200, epochs=1)

@pytest.fixture
def worked(monkeypatch):
    "Where classifiers and encoders looked at more than one picture."
    seen = set()
    def watch(kind, method):
        was = getattr(kind, method)
        def note(self, images):
            if len(images) > 1: seen.add(images.device.type)
            return was(self, images)
        monkeypatch.setattr(kind, method, note)
    watch(Classifier, 'forward')
    watch(Encoder, 'embed')
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

@pytest.mark.parametrize('method', ['mocov2', 'simclr', 'byol', 'mocov3'])
def test_encoder_study(method, tmp_path, worked):
    "Victim, clean encoder, both detectors (one picture is evidence enough, so that all of a scan is run), retraining."
    detectors = dict(poisoncam=dict(window=.34, evidence=.001, witnesses=1, tests=64, filter=QUICK), patchsearch=dict(filter=QUICK))
    study = make_ssl_study('wallpapers', method=method, n=320, probe_n=100, test_n=60, epochs=1, queue=256, detectors=detectors)
    rows = ssl_tour(tmp_path, systems=list(detectors), study=study, quiet=True)
    assert [r['system'] for r in rows] == ['none', 'clean', *detectors] and worked == {'cuda'}
    for r in rows: assert 0 <= r['after']['asr'] <= 1 and r['before'] == rows[0]['before'] or r['system'] == 'clean'

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_scans_in_half_precision(precision, worked):
    pile, how = Wallpapers(120, 32, 0, 'train'), PoisonCAM(window=.34, tests=64, search='all', filter=QUICK, precision=precision)
    found = how.scan(pile, create_encoder('resnet10/half', 16, 32).eval(), device='cuda', quiet=True)
    assert worked == {'cuda'} and found.evidence['settings']['precision'] == precision and found.score.isfinite().all()

@pytest.mark.parametrize('options', [dict(masks='coarse'), dict(masks='interval', soft=False), dict(skip=.5, confirm=32)])
def test_scans(options, worked):
    "The same encoder finds the same windows on both devices, but where two are as good to a rounding."
    pile = Wallpapers(120, 32, 0, 'train')
    how, found = PoisonCAM(window=.34, tests=64, search='all', filter=QUICK, **options), []
    for device in 'cpu', 'cuda':
        found.append(how.scan(pile, create_encoder('resnet10/half', 16, 32).eval(), device=device, quiet=True))
    assert worked == {'cpu', 'cuda'} and (found[0].window == found[1].window).all(1).float().mean() > .9

def test_tokens_are_dropped(worked):
    how = PoisonCAM(window=.5, tests=32, drop=True, filter=QUICK, search='all')
    found = how.scan(Wallpapers(40, 32, 0, 'train'), create_encoder('vit_tiny/8', None, 32).eval(), device='cuda', quiet=True)
    assert worked <= {'cuda'} and found.searched.all()
