"Poisoned self-supervised learning and its detectors on a GPU, where there is one."
import pytest, torch
from bdnb.data.wallpapers import Wallpapers
from bdnb.defenses.poisoncam import PoisonCAM
from bdnb.defenses.poisonfilter import FilterRecipe
from bdnb.models.encoders import Encoder, create_encoder
from bdnb.ssl_study import make_ssl_study, ssl_tour

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
QUICK = FilterRecipe.quick(models=2, steps=10)

@pytest.fixture
def worked(monkeypatch):
    "Where encoders looked at more than one picture."
    seen, embed = set(), Encoder.embed
    def note(self, x):
        if len(x) > 1: seen.add(x.device.type)
        return embed(self, x)
    monkeypatch.setattr(Encoder, 'embed', note)
    return seen

@pytest.mark.parametrize('method', ['mocov2', 'simclr', 'byol', 'mocov3'])
def test_encoder_study(method, tmp_path, worked):
    "Victim, clean encoder, both detectors (one picture is evidence enough, so that all of a scan is run), retraining."
    detectors = dict(poisoncam=dict(window=.34, evidence=.001, witnesses=1, tests=64, filter=QUICK), patchsearch=dict(filter=QUICK))
    study = make_ssl_study('wallpapers', method=method, n=320, probe_n=100, test_n=60, epochs=1, queue=256, detectors=detectors)
    rows = ssl_tour(tmp_path, systems=list(detectors), study=study, quiet=True)
    assert [r['system'] for r in rows] == ['none', 'clean', *detectors] and worked == {'cuda'}
    for r in rows: assert 0 <= r['after']['asr'] <= 1 and r['before'] == rows[0]['before'] or r['system'] == 'clean'

@pytest.mark.parametrize('options', [dict(masks='coarse'), dict(masks='interval', soft=False), dict(skip=.5, confirm=32)])
def test_scans(options, worked):
    "The same encoder finds the same windows on both devices, but where two are as good to a rounding."
    pile = Wallpapers(120, 32, 0, 'train')
    how, found = PoisonCAM(window=.34, tests=64, search='all', filter=QUICK, **options), []
    for device in 'cpu', 'cuda': found.append(how.scan(pile, create_encoder('resnet10/half', 16, 32).eval(), device=device, quiet=True))
    assert worked == {'cpu', 'cuda'} and (found[0].window == found[1].window).all(1).float().mean() > .9

def test_tokens_are_dropped(worked):
    how = PoisonCAM(window=.5, tests=32, drop=True, filter=QUICK, search='all')
    found = how.scan(Wallpapers(40, 32, 0, 'train'), create_encoder('vit_tiny/8', None, 32).eval(), device='cuda', quiet=True)
    assert worked <= {'cuda'} and found.searched.all()
