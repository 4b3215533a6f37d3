"`bdnb cleanse --method bcu` and `bdnb tour --only bcu`: from a file and a folder to a file, and one line for every mistake."

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import same
from bdnb.core import read_json
from bdnb.data.shapes import ShapeCaps
from bdnb.models.build import create_model
from bdnb.models.checkpoint import read_tensors, save_checkpoint
from bdnb.models.classifiers import create_classifier, load_classifier, save_classifier
from bdnb.models.encoders import create_encoder, load_encoder, save_encoder

torch.set_num_threads(1)
quick = '--epochs 1 --batch-size 16 --device cpu -q'
test = "'shapes:?n=36&split=test'"
aim = '--trigger badnet:size=5 --target star'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Models and folders, good and bad."
    d, shapes = tmp_path_factory.mktemp('bcu'), ShapeCaps(40)
    def folder(name, pictures):
        (d/name).mkdir()
        for i, p in enumerate(pictures): Image.fromarray(p).save(d/name/f'{i}.png')
    colour = [x.permute(1, 2, 0).numpy() for x in shapes.images]
    folder('pictures', colour)
    folder('few', colour[:3])
    folder('none', [])
    folder('grey', [p[..., 0] for p in colour])
    folder('large', [p.repeat(2, 0).repeat(3, 1) for p in colour])
    folder('mixed', colour[:20])
    (d/'mixed'/'cut.png').write_bytes((d/'pictures'/'0.png').read_bytes()[:60])
    model = create_classifier('resnet18', shapes.classes, width=4)
    save_classifier(model, d/'model.safetensors')
    torch.save(model.net.state_dict(), d/'plain.pt')
    with torch.no_grad(): model.net.fc.bias[0] = float('nan')
    save_classifier(model, d/'broken.safetensors')
    with torch.no_grad(): model.net.fc.bias[0], model.net.fc.weight[:] = 0., 3e38
    save_classifier(model, d/'huge.safetensors')
    save_encoder(create_encoder('resnet10', 8), d/'encoder.safetensors')
    save_checkpoint(create_model('tiny'), d/'clip.safetensors')
    return d


def weights(path): return load_classifier(path).state_dict()


def test_a_folder_without_labels_cleanses_a_classifier(files, run, tmp_path):
    line = f'cleanse {files}/model.safetensors --method bcu --images {files}/pictures --scale 2 --test {test} {aim} {quick}'
    code, out, err = run(f'{line} --out {tmp_path}/a')
    assert code == 0, err
    done, config = read_json(tmp_path/'a'/'metrics.json'), read_json(tmp_path/'a'/'config.json')
    assert done['scale'] == 2 and 0 <= done['agreement'] <= 1 and done['before'].keys() == done['after'].keys() >= {'ca', 'asr'}
    assert done['counts'] == dict(done['counts'], pictures=36, others=33) and config['options']['scale'] == 2
    assert 'agreement' in out and 'asr' in out and 'report:' in out
    names = {p.name for p in (tmp_path/'a').iterdir()}
    assert names == {'config.json', 'history.jsonl', 'metrics.json', 'model.safetensors', 'pictures', 'report.html'}
    new = weights(tmp_path/'a'/'model.safetensors')
    assert not same(new, weights(files/'model.safetensors')) and load_classifier(tmp_path/'a'/'model.safetensors').classes
    assert run(f'{line} --out {tmp_path}/b')[0] == 0 and same(new, weights(tmp_path/'b'/'model.safetensors'))      # again
    again = run(f'{line} --out {tmp_path}/a')
    assert again[0] == 2 and 'finished run' in again[2]


def test_without_a_test_set_it_says_what_can_be_seen(files, run, tmp_path, monkeypatch):
    monkeypatch.setattr('bdnb.defenses.bcu.BCU.chance', lambda *args: .1)  # (an untrained teacher has one name for all)
    line = f'cleanse {files}/model.safetensors --method bcu --images {files}/pictures {quick} --out {tmp_path}/auto'
    code, out, err = run(line)
    done = read_json(tmp_path/'auto'/'metrics.json')
    assert code == 0 and out.count('probe of') == len(done['probes']) >= 2 and 'asr' not in out, err
    assert (done['scale'] <= 4) == bool(done['doubt']) == ('only a small reset' in err), err
    assert 'before' not in done and done['scale'] in (1, 2, 4, 8, 16, 32)
    said, page = f"{done['agreement']:.1%} of {done['held']}", (tmp_path/'auto'/'report.html').read_text(encoding='utf-8')
    assert done['held'] > 0 and said in out and said in page and f"Scale of the reset: {done['scale']:g}." in page
    assert ('only a small reset' in page) == bool(done['doubt'])


def test_a_classifier_is_no_clip(files, run, tmp_path):
    code, _, err = run(f"cleanse {files}/model.safetensors --data 'shapes:?n=64' --out {tmp_path}/c")
    assert code == 2 and 'model.safetensors: holds a classifier, not a CLIP; method bcu cleanses it' in err, err


def test_pictures_of_other_things_beside(files, run, tmp_path):
    line = f'cleanse {files}/model.safetensors --method bcu --images {files}/few --scale 1 {quick}'
    code, out, err = run(f'{line} --beside {files}/mixed --out {tmp_path}/both')
    assert code == 0 and '1 samples were left out' in err and 'cut.png' in err, err
    assert f'{files}/few and {files}/mixed' in str(read_tensors(tmp_path/'both'/'model.safetensors')[1])
    assert run(f'{line} --out {tmp_path}/few')[0] == 0
    assert not same(*(weights(tmp_path/n/'model.safetensors') for n in ('both', 'few')))
    code, _, err = run(f'{line} --beside {files}/none --out {tmp_path}/none')
    assert code == 2 and 'none' in err and not (tmp_path/'none').exists(), err


@pytest.mark.parametrize('name', ['grey', 'large', 'mixed'])
def test_pictures_of_any_kind(files, run, tmp_path, name):
    "Grey and larger pictures are read as colour at the model's size; a broken one is named, counted and left out."
    code, out, err = run(f'cleanse {files}/model.safetensors --method bcu --images {files}/{name} --scale 1 {quick} '
                         f'--out {tmp_path}/run')
    assert code == 0 and ('1 samples were left out' in err) == (name == 'mixed') == ('cut.png' in err), err


def test_pictures_of_a_table(files, run, tmp_path):
    "A bare path is guessed as everywhere else; the table's labels are not read."
    rows = [f'{p},0' for p in sorted((files/'pictures').rglob('*.png'))]
    (tmp_path/'few.csv').write_text('\n'.join(['image,label', *rows]))
    cure = f'cleanse {files}/model.safetensors --method bcu --scale 1 {quick}'
    for name, images in (('a', tmp_path/'few.csv'), ('b', files/'pictures')):
        code, _, err = run(f'{cure} --images {images} --out {tmp_path}/{name}')
        assert code == 0, err
    assert same(*(weights(tmp_path/n/'model.safetensors') for n in 'ab'))


def test_what_a_state_dict_does_not_say_is_said(files, run, tmp_path):
    "Size and normalisation are taken as usual for the network, with a warning, unless the options say them."
    import torchvision
    torch.save(torchvision.models.get_model('squeezenet1_1', num_classes=12).state_dict(), tmp_path/'tv.pt')
    line = f'cleanse {tmp_path}/tv.pt --method bcu --images {files}/pictures --classes 12 --model squeezenet1_1 --scale 1 {quick}'
    code, _, err = run(f'{line} --out {tmp_path}/a')
    assert code == 0 and 'image size 224' in err and '(0.485, 0.456, 0.406)' in err, err
    code, _, err = run(f'{line} --size 64 --mean .5,.5,.5 --std .2,.2,.2 --out {tmp_path}/b')
    assert code == 0 and 'does not say' not in err, err
    assert load_classifier(tmp_path/'b'/'model.safetensors').image_size == 64
    code, _, err = run(f'{line} --mean .5,.5 --out {tmp_path}/c')
    assert code == 2 and '--mean' in err and 'three numbers' in err, err


def test_a_handful_of_pictures_and_a_scale(files, run, tmp_path):
    "Nothing is held out of so few, and nothing is said about agreement."
    from shutil import copy
    (tmp_path/'few').mkdir()
    for p in sorted((files/'pictures').iterdir())[:3]: copy(p, tmp_path/'few')
    code, out, err = run(f'cleanse {files}/model.safetensors --method bcu --images {tmp_path}/few --scale 1 {quick} --out {tmp_path}/o')
    assert code == 0 and 'not measured' in out, err


def test_a_state_dict_needs_its_name(files, run, tmp_path):
    line = f'cleanse {files}/plain.pt --method bcu --images {files}/pictures --scale 1 {quick} --out {tmp_path}/run'
    code, out, err = run(f'{line} --model resnet18 --classes 12 --width 4')
    assert code == 0 and len(load_classifier(tmp_path/'run'/'model.safetensors').classes) == 12, err


def test_encoders_and_clips(files, run, tmp_path):
    for name in ('encoder', 'clip'):
        code, out, err = run(f'cleanse {files}/{name}.safetensors --method bcu --images {files}/pictures --scale 1 {quick} '
                             f'--out {tmp_path}/{name}')
        assert code == 0, err
    assert load_encoder(tmp_path/'encoder'/'model.safetensors').name == 'resnet10'
    code, out, err = run(f'evaluate {tmp_path}/clip/model.safetensors {test} -q --device cpu')
    assert code == 0 and 'ca' in out, err


def test_a_classifier_is_measured(files, run, tmp_path):
    line = f'{test} -q --device cpu --trigger badnet:size=6 --target star'
    code, out, err = run(f'evaluate {files}/model.safetensors {line} --json {tmp_path}/n.json --out {tmp_path}/run')
    said = read_json(tmp_path/'n.json')
    assert code == 0 and 0 <= said['metrics']['asr'] <= 1 and said['counts'] and (tmp_path/'run'/'report.html').exists(), err
    code, out, err = run(f'evaluate {files}/plain.pt {line} --model resnet18 --classes 12 --width 4 --size 32 --json {tmp_path}/p.json')
    assert code == 0 and read_json(tmp_path/'p.json')['metrics'] == said['metrics'], err          # the same network, without its header
    for name, words in (('encoder', 'names nothing to measure'), ('model', '--probe: is for a CLIP')):
        code, out, err = run(f'evaluate {files}/{name}.safetensors {test} -q --device cpu --probe {test}')
        assert code == 2 and words in err, err
    for more, words in (('{clip} --size 64', 'has its own image size'), ('{model} --target star', '--trigger too')):
        code, out, err = run(f"evaluate {more.format(clip=f'{files}/clip.safetensors', model=f'{files}/model.safetensors')} {test} -q")
        assert code == 2 and words in err, err


mistakes = {
    'no images': ('{model} --method bcu', ['--images']),
    'no data': ('{clip}', ['--data', '--method bcu']),
    'data for bcu': ('{bcu} --data shapes', ['--data', "'bcu' has no such option"]),
    'workers for bcu': ('{bcu} --workers 2', ['--workers', "'bcu' has no such option"]),
    'warm-up in steps': ('{bcu} --warmup 5', ['--warmup']),
    'images for another': ('{clip} --data shapes:?n=64 --images {d}/pictures', ['--images', '--method bcu']),
    'scale for another': ('{clip} --data shapes:?n=64 --scale 2', ['--scale']),
    'scale': ('{bcu} --scale big', ["'big'", 'a number, or auto']),
    'negative scale': ('{bcu} --scale -1', ['scale=-1']),
    'infinite scale': ('{bcu} --scale inf', ['scale=inf']),
    'no such folder': ('{model} --method bcu --images {d}/nowhere', ['nowhere']),
    'empty folder': ('{model} --method bcu --images {d}/none', ['none']),
    'too few': ('{model} --method bcu --images {d}/few', ['3 pictures are too few']),
    'no such file': ('{d}/no.safetensors --method bcu --images {d}/pictures', ['no.safetensors']),
    'plain weights': ('{d}/plain.pt --method bcu --images {d}/pictures', ['plain.pt']),
    'plain weights, other width': ('{d}/plain.pt --method bcu --images {d}/pictures --model resnet18 --classes 12 --width 8',
                                   ['plain.pt']),
    'weights not finite': ('{d}/broken.safetensors --method bcu --images {d}/pictures', ['fc.bias', 'not finite']),
    'logits not finite': ('{d}/huge.safetensors --method bcu --images {d}/pictures', ['non-finite logits, first for']),
    'encoder with a test': (f'{{d}}/encoder.safetensors --method bcu --images {{d}}/pictures --test {test}',
                            ['--test', 'encoder']),
    'trigger without a test': ('{bcu} --trigger badnet --target star', ['--trigger', '--test']),
    'target without a test': ('{bcu} --target star', ['--target', '--test']),
    'plan without a test': ('{bcu} --plan {d}/plan.json', ['--plan', '--test']),
    'target without a trigger': (f'{{bcu}} --test {test} --target star', ['--target', '--trigger']),
    'no device': ('{bcu} --device meta', ["--device 'meta'"]),
    'target': (f'{{bcu}} --test {test} --trigger badnet --target sta', ["'sta'"]),
    'trigger without a target': (f'{{bcu}} --test {test} --trigger badnet', ['--target']),
    'classes that look like a number': ('{d}/plain.pt --method bcu --images {d}/pictures --model resnet18 --classes ² --width 4', ['plain.pt']),
    'shares that are no numbers': ('{bcu} --ratios head', ['--ratios', 'head=.1']),
    'shares of no layer': ('{bcu} --scale 1 --ratios haed=.1', ["no stage or layer 'haed'", 'head']),
    'shares elsewhere': ('{model} --method finetune --data shapes --ratios head=.1', ['--ratios', 'only for --method bcu']),
    'learning rate': ('{bcu} --lr nan', ['--lr']),
    'diverged': ('{bcu} --scale 1 --lr 1e30 --epochs 3', ['lower learning rate'])}


@pytest.mark.parametrize('line, words', mistakes.values(), ids=mistakes)
def test_mistakes(files, run, tmp_path, line, words):
    names = dict(d=files, model=f'{files}/model.safetensors', clip=f'{files}/clip.safetensors',
                 bcu=f'{files}/model.safetensors --method bcu --images {files}/pictures')
    where = '' if '--device' in line else '--device cpu'
    code, out, err = run(f"cleanse {line.format(**names)} --batch-size 16 {where} -q --out {tmp_path}/run")
    assert code == 2 and err.count('\n') == 1 and err.startswith('bdnb: error: '), err
    for w in words: assert w in err, err
    assert not (tmp_path/'run').exists()


def test_a_network_without_a_route_lists_its_layers(files, run, tmp_path, monkeypatch):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 12)
        def forward(self, x): return self.b(self.a(x).mean((2, 3)))
    from bdnb.models.classifiers import Classifier
    monkeypatch.setattr('bdnb.defenses.bcu_encoders.load_any', lambda path, **given: Classifier(Odd(), 'odd', 12))
    code, out, err = run(f'cleanse {files}/model.safetensors --method bcu --images {files}/pictures {quick} --out {tmp_path}/run')
    assert code == 2 and err.count('\n') == 1 and 'odd: no routing by depth' in err and '--ratios b=.1' in err and 'a, b' in err, err
    assert not (tmp_path/'run').exists()
    code, out, err = run(f'cleanse {files}/model.safetensors --method bcu --images {files}/pictures {quick} '
                         f'--ratios a=.5,b=.1 --out {tmp_path}/run')                                 # what it advises helps
    said = read_json(tmp_path/'run'/'config.json')['options']
    assert code == 0 and said['ratios'] == str({'a': .5, 'b': .1}) and said['scale'] == 1, err


def test_probes_outlive_an_interrupt(files, run, tmp_path, monkeypatch):
    "They cost as much as the run that follows, which may write no checkpoint in so small a pool."
    from bdnb.defenses.bcu import BCU
    line, plain, made = f'cleanse {files}/model.safetensors --method bcu --images {files}/pictures {quick}', BCU.distil, []
    line += f' --out {tmp_path}/run'
    def stop(self, *args, **options):
        made.append(options.get('what', 'BCU'))
        if made[-1] == 'BCU': raise KeyboardInterrupt
        return plain(self, *args, **options)
    monkeypatch.setattr(BCU, 'distil', stop)
    monkeypatch.setattr(BCU, 'chance', lambda *args: .1)                   # (an untrained teacher has one name for all)
    run(line)
    assert made[-1] == 'BCU' and len(made) > 2 and (tmp_path/'run'/'probes.json').exists()
    made.clear()
    monkeypatch.setattr(BCU, 'distil', lambda s, *args, **o: (made.append(o.get('what', 'BCU')), plain(s, *args, **o))[1])
    code, _, err = run(line)
    assert code == 0 and made == ['BCU'], err


small = '--n 96 --test-n 48 --clean-n 60 --epochs 1 --batch-size 32 -q'

def test_tour(run, tmp_path, monkeypatch):
    import bdnb.classifier_study as study
    recipe = study.make_classifier_recipe(width=4, cure=dict(epochs=1, batch_size=32))
    monkeypatch.setitem(study.CLASSIFIER_RECIPES, 'shapes', recipe)
    line = f'tour --only bcu,finetune --out {tmp_path}/t --results {tmp_path}/bcu.json {small}'
    code, out, err = run(line)
    rows = read_json(tmp_path/'bcu.json')['rows']
    assert code == 0 and [r['system'] for r in rows] == ['none', 'kd_only', 'bcu', 'finetune']*2, err
    assert [r['attack'] for r in rows] == ['badnets']*4 + ['blended']*4 and {r['data'] for r in rows} == {'shapes'}
    assert all(w in out for w in ('Tour', 'badnets', 'blended', 'kd_only', 'before', 'What BCU picked'))
    assert (tmp_path/'t'/'report.html').exists() and {'commit', 'hardware', 'versions'} <= read_json(tmp_path/'bcu.json').keys()
    assert run(line)[0] == 0 and read_json(tmp_path/'bcu.json')['rows'] == rows                            # nothing done twice
    rated = run(f'tour --only bcu --attacks badnets --rate .25 --out {tmp_path}/r {small}')
    assert rated[0] == 0 and abs(read_json(tmp_path/'r'/'badnets-seed0'/'row.json')['rate'] - .25) < .01, rated[2]


@pytest.mark.parametrize('line, words', [
    ('--attacks badnts', ["'badnts'", "did you mean 'badnets'"]), ('--only bcu,nadd', ["'nadd'", "did you mean 'nad'"]),
    ('--seeds one', ['--seeds']), ('--target sta', ["'sta'"]), ('--model resnet19', ["'resnet19'"]),
    ('--model torchvision/vit_b_16 --size 50', ['torchvision/vit_b_16', '50 px']), ('--only bcu:scale=some', ["'auto'"]),
    ('--only bcu,finetune:crop_flip=flip', ['crop_flip']),
    ("--data folder:nowhere", ['test set']), (f"--data shapes:?n=64 --test {test} --n 5", ['--n:', 'drawn']),
    (f"--data shapes:?n=64 --test {test} --test-n 5", ['--test-n', 'drawn']), (f'--test {test}', ['--test', '--data']),
    ('--defenses bcu', ['--defenses', '--only']), ('--clean shapes:?n=64 --clean-n 60', ['--clean-n', '--clean ']),
    ('--rate 2', ['rate']), ('--recipe shape', ["did you mean 'shapes'"]),
    ('--only bcu,finetune --clean shapes:?n=64', ['finetune needs'])])
def test_tour_mistakes(run, tmp_path, line, words):
    usual = '--epochs 1 --batch-size 32 -q' if '--data' in line or '--clean' in line else small
    code, out, err = run(f'tour --only bcu --out {tmp_path}/t {usual} {line}')
    assert code == 2 and err.count('\n') == 1 and err.startswith('bdnb: error: '), err
    for w in words: assert w in err, err
    assert not (tmp_path/'t').exists()


def test_networks_of_torchvision_have_one_width():
    from bdnb.classifier_study import make_classifier_recipe
    assert make_classifier_recipe(arch='torchvision/resnet18').width is None and make_classifier_recipe(arch='vgg16-bn').width == 16
    assert make_classifier_recipe(arch='torchvision/resnet18', width=4).width == 4                   # asked for: the error says why not


def test_another_corpus_need_not_have_the_groups(tmp_path):
    "Frames of a track stay together in the study's own pool; pictures from elsewhere have no tracks."
    from bdnb.classifier_study import ClassifierCase, Pool, make_classifier_recipe
    case = ClassifierCase(tmp_path, 'badnets', 0, make_classifier_recipe('gtsrb_slim'), None, True)
    assert case.defense('bcu', Pool()).group == '(.*)_[0-9]+' and case.defense('bcu', Pool('folder:x')).group is None
    assert case.defense('nad', Pool('folder:x')).epochs == 15
    assert case.defense('bcu', Pool(beside='folder:x')).group == '(.*)_[0-9]+'                 # measured on the study's own


def test_an_automatic_scale_that_is_asked_for_beside_shares(files, run, tmp_path):
    code, out, err = run(f'cleanse {files}/model.safetensors --method bcu --images {files}/pictures {quick} --scale auto '
                         f'--ratios stage4=.3,head=.1 --out {tmp_path}/run')
    said = read_json(tmp_path/'run'/'config.json')['options']
    assert code == 0 and said['scale'] == 'auto' and 'probe of 0' in out, err


def test_cures_with_a_corpus_of_their_own_leave_the_victim_all_of_its_own(run, tmp_path, monkeypatch):
    import bdnb.classifier_study as study
    recipe = study.make_classifier_recipe(width=4, cure=dict(epochs=1, batch_size=32))
    monkeypatch.setitem(study.CLASSIFIER_RECIPES, 'shapes', recipe)
    code, _, err = run(f'tour --only bcu --attacks badnets --data shapes:?n=96 --test {test} --clean shapes:?n=60&seed=5 '
                       f'--epochs 1 --batch-size 32 -q --out {tmp_path}/t')
    assert code == 0, err
    truth = read_json(tmp_path/'t'/'badnets-seed0'/'attack.json')['shares']
    assert truth['samples'] == 96 and read_json(tmp_path/'t'/'study.json')['recipe']['pool_n'] == 0


def test_a_rate_that_is_too_large_is_refused_before_the_first_victim(run, tmp_path):
    code, _, err = run(f'tour --only bcu --attacks badnets,sig --rate .2 --out {tmp_path}/t {small}')
    assert code == 2 and err.count('\n') == 1 and 'at most' in err and not (tmp_path/'t').exists(), err


def test_a_cure_that_does_not_fit_the_network_is_refused_before_the_first_victim(run, tmp_path):
    code, _, err = run(f'tour --only bcu,anp --attacks badnets --model vit --out {tmp_path}/t {small}')
    assert code == 2 and err.count('\n') == 1 and 'batch-normalised' in err and not (tmp_path/'t').exists(), err
