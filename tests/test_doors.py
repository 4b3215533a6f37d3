"One line opens any corpus; a bad line is one clear error; an exported corpus opens again bit for bit."
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from bdnb.core import BdnbError
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.doors import DOORS, Door, add_door, list_corpora, open_corpus, parse_spec, read_classes
from bdnb.data.export import corpus_to_csv
from bdnb.data.shards import write_shards
from bdnb.data.torchsets import TORCHSETS


def noise(n=12, side=10, seed=0, **columns):
    g = torch.Generator().manual_seed(seed)
    return ArrayCorpus(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=g), **columns)


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "A folder corpus, its shards and its table under a path with spaces and punctuation."
    top = tmp_path_factory.mktemp('a house & its = garden')
    c = noise(labels=np.arange(12) % 3, texts=[f'text {i}' for i in range(12)], classes=['0', '10', '2'])
    for i, s in enumerate(c):
        (f := top/'pictures'/c.classes[s.label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(s.image.permute(1, 2, 0).numpy()).save(f/f'{i:02d}.png')
    write_shards(c, top/'shards', 5)
    corpus_to_csv(c, top/'table')
    return top


def complaint(spec, *words):
    with pytest.raises(BdnbError) as e: open_corpus(spec)
    text = str(e.value)
    assert '\n' not in text and len(text) < 1000 and all(w in text for w in words), text
    return text


@pytest.mark.parametrize('spec, words', [
    ('', 'nor a kind of corpus'), ('?n=3', 'nor a kind'), ('shape', "'shapes'"), ('foldr:x', "did you mean 'folder'"), ('shapes?nn=3', "did you mean 'n'"),
    ('shapes:?colour=red', 'known: n, size, seed, split, captions'), ('shapes:?n=', "n=''"), ('shapes:?n=-5', 'whole number'), ('shapes:?n=3.5', 'whole number'),
    ('shapes:?n=²', 'whole number'), ('shapes:?size=1e9', 'whole number'), ('shapes:?n=999999999999999999999', 'whole number'), ('shapes:?size=8', 'size'),
    ('shapes:?n', 'n=...'), ('shapes:?n=1&n=1', 'twice'), ('folder', 'say which'), ('csv:', 'say which'), ('csv:gone.csv', 'gone.csv'), ('wds:gone.tar', 'gone.tar'),
    ('gone.tar', 'gone.tar'), ('gone/{0..3}.tar.gz', 'gone/0.tar.gz'), ('torchvision:MNST', "did you mean 'MNIST'"), ('torchvision:CIFAR10?split=val', 'train, test'),
    ('torchvision:CIFAR10?download=perhaps', 'true or false'), ('torchvision:CIFAR10?root=gone', 'download=true'), ('pipe:ls', 'on this machine'),
    ('http://x/y.tar?n=3', 'on this machine'), ('wds:http://x/y.tar', 'only local files'), ('csv:http://x/y.csv', 'csv'), ('s3://bucket/x', 'on this machine'),
    ('a\0b', 'NUL'), ('wds:a\0b', 'NUL'), ('x' * 400, 'no such file'), ('folder:' + 'x' * 400, 'folder:xxx'), ('wds:' + 'x' * 400, 'xxx'),
    ('~nobody-here/x', 'no such file'), ('folder:~nobody-here/x', 'no such folder'),
    ('shapes:?keep=~nobody-here/k.txt', 'keep=')])
def test_bad_lines(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    complaint(spec, words)
    assert not list(tmp_path.iterdir())


def test_bad_options_of_a_good_place(house):
    complaint(f'folder:{house}/pictures?n=13', 'n=13', 'only 12')
    complaint(f'folder:{house}/pictures?fit=crop', 'size')
    complaint(f'folder:{house}/pictures?size=8&fit=pad', 'crop or squash')
    complaint(f'folder:{house}/pictures?classes={house}/none.txt', 'none.txt')
    complaint(f'folder:{house}/pictures?captions=hello', '{}')
    complaint(f'csv:{house}/table/captions.csv?caption_col=captoin', "did you mean 'caption'")
    complaint(f'csv:{house}/table/captions.csv?encoding=klingon', 'encoding')
    complaint(f'csv:{house}/table/captions.csv?group=2', 'group')
    complaint(f'{house}/table/keys.json', 'say which kind')


@pytest.mark.parametrize('spec', ['folder:{0}/pictures', '{0}/pictures', 'wds:{0}/shards', '{0}/shards', '{0}/shards/{{00000..00002}}.tar', '{0}/shards/*.tar',
                                  'csv:{0}/table/captions.csv', '{0}/table/captions.csv', 'tsv:{0}/table/captions.csv'])
def test_every_way_in(house, spec):
    spec = spec.format(house)
    c = open_corpus(spec)
    assert len(c) == 12 and len(open_corpus(c)) == 12
    part = open_corpus(f'{spec}?n=5&seed=3&size=6&fit=squash')
    assert part.images.shape == (5, 3, 6, 6) and part.keys == open_corpus(f'{spec}?seed=3&n=5').keys != open_corpus(f'{spec}?seed=4&n=5').keys
    assert [c.keys.index(k) for k in part.keys] == sorted(c.keys.index(k) for k in part.keys)


def test_names_for_numbered_classes(house):
    names = [f'sign {i}' for i in range(11)]
    (house/'names.json').write_text(json.dumps(names))
    (house/'ids.json').write_text(json.dumps({str(i): n for i, n in enumerate(names)}))
    (house/'folders.json').write_text(json.dumps({'0': 'zero', '2': 'two', '10': 'ten'}))
    for file, want in [('names.json', ['sign 0', 'sign 10', 'sign 2']), ('ids.json', ['sign 0', 'sign 10', 'sign 2']), ('folders.json', ['zero', 'ten', 'two'])]:
        c = open_corpus(f'{house}/pictures?classes={house}/{file}&captions=the {{}}')
        for s in c:
            folder = s.key.split('/')[0]
            assert c.classes[s.label] == want[['0', '10', '2'].index(folder)] and s.text == f'the {c.classes[s.label]}'
    templated = open_corpus(f'{house}/pictures?classes={house}/names.json&captions=templates&seed=1')
    assert len(set(templated.texts)) > 6 and all(templated.classes[s.label] in s.text for s in templated)


@pytest.mark.parametrize('text', ['[]', '{}', '[1, 2]', '"cat"', '["a", "a"]', '{"a": ["b"]}', '[" "]', '{', 'null'])
def test_bad_class_files(tmp_path, text):
    (tmp_path/'c.json').write_text(text)
    with pytest.raises(BdnbError, match='c.json'): read_classes(tmp_path/'c.json')


def test_odd_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ['why?', 'shapes', 'a:b', '~x']:
        (tmp_path/name).mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path/name/'x.png')
    assert len(open_corpus('why?')) == 1 and len(open_corpus('./shapes')) == 1 and len(open_corpus('a:b')) == 1 and len(open_corpus('folder:a:b')) == 1
    assert parse_spec('shapes')[0].kind == 'shapes' and parse_spec('shapes:?n=1&')[2] == {'n': 1}
    monkeypatch.setenv('HOME', str(tmp_path))
    assert len(open_corpus('folder:~/shapes')) == 1 and len(open_corpus('~/shapes')) == 1


def test_shapes_through_the_door():
    a, b = open_corpus('shapes:?n=20&size=16&seed=5'), open_corpus('shapes?n=20&size=16&seed=5')
    assert torch.equal(a.images, b.images) and a.texts == b.texts
    assert open_corpus('shapes:?n=20&size=16&seed=5&captions=one {}').texts == ['one ' + a.classes[y] for y in a.labels]


def test_torchvision_options_reach_torchvision(monkeypatch, tmp_path):
    from torchvision import datasets
    said = {}
    class Fake:
        classes, targets = ['a', 'b'], [1, 0]
        def __init__(self, root, **options): said.update(options, root=root)
        def __len__(self): return 2
        def __getitem__(self, i): return Image.new('RGB', (5, 5), (i, 0, 0)), self.targets[i]
    monkeypatch.setattr(datasets, 'CIFAR10', Fake)
    c = open_corpus(f'torchvision:CIFAR10?root={tmp_path}&split=test&download=true')
    assert said == dict(root=str(tmp_path), train=False, download=True)
    assert [(s.key, s.label, int(s.image[0, 0, 0])) for s in c] == [('000000', 1, 0), ('000001', 0, 1)] and c.name == 'CIFAR10-test'


class Canary:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_a_forged_cifar_is_not_unpickled(tmp_path):
    (f := tmp_path/'cifar-10-batches-py').mkdir()
    bomb = pickle.dumps(Canary(tmp_path/'owned'))
    for n in ['batches.meta', 'test_batch', *(f'data_batch_{i}' for i in range(1, 6))]: (f/n).write_bytes(bomb)
    complaint(f'torchvision:CIFAR10?root={tmp_path}', 'cannot be opened')
    assert not (tmp_path/'owned').exists()
    pickle.loads(bomb)
    assert (tmp_path/'owned').exists(), 'the canary must be live'


def test_the_table_of_kinds():
    table = {d['kind']: d for d in list_corpora()}
    assert set(table) == {'shapes', 'folder', 'csv', 'tsv', 'wds', 'torchvision'} and all(n in table['torchvision']['description'] for n in TORCHSETS)
    for d in table.values():
        door, where, options = parse_spec(d['example'])
        assert door.kind == d['kind'] and d['description'] and {'name', 'type', 'default', 'what'} == set(d['options'][0])
    json.dumps([[o['name'], o['type'], str(o['default'])] for d in table.values() for o in d['options']])


def test_a_new_door(monkeypatch):
    monkeypatch.setitem(DOORS, 'noise', None)
    add_door(Door('noise', lambda where: noise(int(where)), 'a number', 'noise', 'noise:3'))
    assert open_corpus('noise:7?n=2').images.shape[0] == 2


def poisoned():
    texts = ['=cmd|calc', 'a, "b"', "c'd; e f", 'é 漢 🙂 <script>', '-1', '@x', '#c', 'NULL', 'nan', "'", '"', ',']
    return noise(texts=texts, labels=np.arange(12)[::-1] % 4, classes=['z', 'a, b', '"q"', 'm'], name='poisoned')


def test_export_round_trip_is_bit_exact(tmp_path):
    c = poisoned()
    table = corpus_to_csv(c, tmp_path/'new folder'/'out')
    assert table.read_bytes().split(b'\n')[0] == b'image,caption,label' and table == tmp_path/'new folder'/'out'/'captions.csv'
    back = open_corpus(f'csv:{table}?classes={table.parent}/classes.json')
    assert torch.equal(torch.stack([s.image for s in back]), c.images)
    assert back.texts == c.texts and back.classes == c.classes and back.labels.tolist() == c.labels.tolist() and not back.skipped
    keys = json.loads((table.parent/'keys.json').read_text())
    assert [keys[k] for k in back.keys] == c.keys
    again = corpus_to_csv(c, tmp_path/'again')
    assert all((again.parent/p.relative_to(table.parent)).read_bytes() == p.read_bytes() for p in table.parent.rglob('*') if p.is_file())


def test_export_without_captions_or_labels(tmp_path):
    assert corpus_to_csv(noise(labels=[3] * 12), tmp_path/'l').read_text().splitlines()[:2] == ['image,label', 'images/000000.png,3']
    assert corpus_to_csv(noise(texts=['x'] * 12), tmp_path/'t').read_text().splitlines()[0] == 'image,caption'
    corpus_to_csv(noise(), tmp_path/'n')
    assert len(open_corpus(f'folder:{tmp_path}/n/images')) == 12


def test_export_skips_broken_pictures(tmp_path):
    (tmp_path/'in').mkdir()
    for i in range(4): Image.new('RGB', (4, 4), (i, 0, 0)).save(tmp_path/'in'/f'{i}.png')
    (tmp_path/'in'/'1.png').write_bytes(b'broken')
    c = open_corpus(tmp_path/'in')
    corpus_to_csv(c, tmp_path/'out')
    assert [k for k, _ in c.skipped] == ['1.png'] and len(open_corpus(tmp_path/'out'/'images')) == 3
    for i in range(4): (tmp_path/'in'/f'{i}.png').write_bytes(b'broken')
    with pytest.raises(BdnbError, match='none of its 4'): corpus_to_csv(open_corpus(tmp_path/'in'), tmp_path/'none')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'out']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt(), RuntimeError('boom')])
def test_export_leaves_nothing_half_made(tmp_path, monkeypatch, error):
    real, count = Image.Image.save, iter(range(100))
    def save(self, *a, **k):
        if next(count) == 5: raise error
        return real(self, *a, **k)
    monkeypatch.setattr(Image.Image, 'save', save)
    with pytest.raises(BdnbError if isinstance(error, OSError) else type(error)) as e: corpus_to_csv(poisoned(), tmp_path/'out')
    assert not list(tmp_path.iterdir()) and (not isinstance(error, OSError) or 'out: cannot write: No space' in str(e.value))


def test_export_refuses(tmp_path):
    (tmp_path/'file').write_text('mine')
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'x').write_text('mine')
    for name in ['file', 'full']:
        with pytest.raises(BdnbError, match='already exists'): corpus_to_csv(poisoned(), tmp_path/name)
    with pytest.raises(BdnbError, match='cannot write'): corpus_to_csv(poisoned(), tmp_path/'file'/'below')
    for text in ['', ' ', 'a\0b']:
        with pytest.raises(BdnbError, match='00000003'): corpus_to_csv(noise(texts=['x'] * 3 + [text] + ['x'] * 8), tmp_path/'t')
    (tmp_path/'empty').mkdir()
    corpus_to_csv(poisoned(), tmp_path/'empty')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'file', 'full'] and (tmp_path/'full'/'x').read_text() == 'mine'
