"Shards made by an enemy: nothing runs, nothing is unpickled, nothing grows without bound, and whatever is wrong is one line."
import gzip
import io
import os
import pickle
import random
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from bdnb.core import BdnbError
from bdnb.data import shards
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.shards import ShardCorpus, expand_shards, write_shards


def png(seed=0, side=8):
    buf = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(buf, 'PNG')
    return buf.getvalue()


def member(name, data=b'', **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for k, v in fields.items(): setattr(info, k, v)
    return info, data


def pack(path, members, mode='w'):
    with tarfile.open(path, mode) as t:
        for m in members:
            info, data = member(*m) if isinstance(m[0], str) else m
            t.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def pair(key, seed=0, text='a picture'): return [(f'{key}.png', png(seed)), (f'{key}.txt', text.encode())]


def raw_header(name, size=b'00000000000', kind=b'0'):
    "A tar header block with any size field, even an impossible one, and a right checksum."
    h = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    h[124:136] = size.ljust(12, b'\0')
    h[156:157] = kind
    h[148:156] = b' ' * 8
    h[148:156] = b'%06o\0 ' % sum(h)
    return bytes(h)


def base256(n): return (n % 2**96).to_bytes(12, 'big') if n < 0 else bytes([0x80]) + n.to_bytes(11, 'big')


def refused(pattern, *words):
    with pytest.raises(BdnbError) as e: ShardCorpus(pattern)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    return str(e.value)


class Canary:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('address', ['pipe:mkdir {0}/owned', 'pipe:mkdir {0}/owned; cat {0}/a.tar', 'file:{0}/a.tar', 'http://127.0.0.1:9/a.tar',
                                     's3://bucket/a.tar', 'gs://b/a.tar', ' pipe:mkdir {0}/owned', 'PIPE:mkdir {0}/owned', 'hdfs:a.tar',
                                     '{{pipe:mkdir {0}/owned,{0}/a.tar}}', 'pipe:mkdir {0}/owned-{{0..3}}', '-', ''])
def test_addresses_are_refused(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    pack(tmp_path/'a.tar', pair('a'))
    for pattern in [address.format(tmp_path), [address.format(tmp_path)]]: refused(pattern)
    assert not list(tmp_path.glob('*owned*'))


def test_special_files_do_not_hang(tmp_path):
    os.mkfifo(tmp_path/'fifo.tar')
    refused(tmp_path/'fifo.tar', 'fifo.tar', 'not a regular file')
    refused('/dev/zero', 'not a regular file')
    refused(tmp_path/'missing-{0..2}.tar', 'missing-0.tar', 'no such file')
    refused(tmp_path/'{0..99999999}.tar', 'more than')


@pytest.mark.parametrize('gz', [False, True])
def test_pickles_are_named_and_never_loaded(tmp_path, gz):
    bomb = pickle.dumps(Canary(tmp_path/'owned'))
    kinds = ['pyd', 'pickle', 'pkl', 'pth', 'pt', 'npy', 'npz', 'mp', 'cbor', 'ten', 'exe', 'txt.gz', 'jpg.pyd']
    path = pack(tmp_path/'a.tar', pair('a') + [(f'a.{k}', bomb) for k in kinds] + pair('b', 1), 'w:gz' if gz else 'w')
    c = ShardCorpus(path)
    assert [s.key for s in c] == [s.key for s in c.stream()] == ['a', 'b'] and not (tmp_path/'owned').exists()
    assert c.ignored == {k: [f'a.tar: a.{k}'] for k in kinds} and not c.skipped
    pickle.loads(bomb)
    assert (tmp_path/'owned').exists(), 'the canary must be live'


def test_members_disguised_as_other_things(tmp_path):
    bomb = pickle.dumps(Canary(tmp_path/'owned'))
    c = ShardCorpus(pack(tmp_path/'a.tar', [('a.png', bomb), ('a.txt', bomb), *pair('b')]))
    assert [s.key for s in c] == ['b'] and c.skipped[0][0] == 'a' and not (tmp_path/'owned').exists()
    c = ShardCorpus(pack(tmp_path/'b.tar', [('a.png', png()), ('a.json', bomb), *pair('b')]))
    assert c.keys == ['b'] and 'broken json' in c.skipped[0][1] and not (tmp_path/'owned').exists()


@pytest.mark.parametrize('name', ['../a.png', '/etc/a.png', 'a/../../b.png', 'a/..', '..\\a.png', 'C:\\a.png', 'C:/a.png', '\\\\host\\a.png', './../a.png'])
def test_names_that_escape(tmp_path, name):
    for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE):
        refused(pack(tmp_path/'a.tar', [*pair('a'), member(name, type=kind)]), 'a.tar', 'leads out')


def test_links_and_devices_are_not_followed(tmp_path):
    (tmp_path/'secret.txt').write_text('secret')
    odd = [member('a.txt', type=tarfile.SYMTYPE, linkname='secret.txt'), member('a.json', type=tarfile.LNKTYPE, linkname='../secret.txt'),
           member('a.cls', type=tarfile.CHRTYPE), member('a.jpg', type=tarfile.FIFOTYPE)]
    c = ShardCorpus(pack(tmp_path/'a.tar', [('a.png', png()), *odd]))
    assert c.texts is None and c.labels is None and len(c.ignored['(link or device)']) == 4 and len(list(c.stream())) == 1


@pytest.mark.parametrize('gz', [False, True])
@pytest.mark.parametrize('blocks', [
    [raw_header('a.png', base256(2**60))], [raw_header('a.png', base256(-1024))], [raw_header('a.png', base256(-1))],
    [raw_header('a.png', b'77777777777')],
    [raw_header('x', base256(2**40), b'x')], [raw_header('x', base256(2**40), b'L')], [raw_header('x', base256(-512), b'x')],
    [raw_header('x', b'%011o' % 60_000, b'x'), b'1' * 60_416], [raw_header('x', b'%011o' % 70_000, b'x'), b' ' * 70_144],
    [raw_header('a.png', b'junk')], [b'garbage' * 100], [raw_header('x', b'00000000000', b'x')] * 5000], ids=range(12))
def test_lying_headers(tmp_path, blocks, gz):
    "Sizes of an exabyte, steps backwards, headers that cost quadratic time, chains of headers: refused at once and by name."
    data = b''.join([*blocks, bytes(10240)])
    for first in [b'', pack(tmp_path/'ok.tar', pair('ok')).read_bytes()[:2048]]:      # two members, then the lie
        (tmp_path/'a.tar').write_bytes(gzip.compress(first + data) if gz else first + data)
        refused(tmp_path/'a.tar', 'a.tar')


def test_long_names_cost_no_time(tmp_path):
    "Names of 60,000 characters, with a folder in every second; split by a pattern, each would cost many seconds."
    names = ['a/'*30_000 + 'b', 'a/'*30_000 + 'b.png', 'a/'*29_000 + 'c.d/.png', 'a.b/'*15_000 + 'e']
    start = time.process_time()
    c = ShardCorpus(pack(tmp_path/'a.tar', [*pair('ok'), *((n, png()) for n in names)]))
    assert time.process_time() - start < 5
    assert c.keys == ['ok'] and 'no caption' in c.skipped[0][1] and len(c.ignored['(no suffix)']) == 3


def test_sparse_members(tmp_path):
    pax = {'GNU.sparse.map': '0,0', 'GNU.sparse.size': str(2**50), 'GNU.sparse.name': 'a.png'}
    with tarfile.open(tmp_path/'a.tar', 'w', format=tarfile.PAX_FORMAT) as t: t.addfile(member('a.png', pax_headers=pax)[0])
    refused(tmp_path/'a.tar', 'a.tar', 'sparse')


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'IMAGE_BYTES', 5000)
    monkeypatch.setattr(shards, 'TEXT_BYTES', 100)
    refused(pack(tmp_path/'a.tar', [('a.png', bytes(5001))]), 'a.png', '5,001 bytes')
    refused(pack(tmp_path/'b.tar', [*pair('a'), ('a.json', b' ' * 101)]), 'a.json')
    assert len(ShardCorpus(pack(tmp_path/'c.tar', [*pair('a'), ('a.mp4', bytes(9999))]))) == 1
    monkeypatch.setattr(shards, 'HELD_BYTES', 4000)
    refused(pack(tmp_path/'d.tar.gz', [('junk.bin', bytes(10**6)), *pair('a')], 'w:gz'), 'd.tar.gz')
    (tmp_path/'e.tar.gz').write_bytes(gzip.compress(pack(tmp_path/'e.tar', pair('a')).read_bytes() + bytes(10**6)))
    refused(tmp_path/'e.tar.gz', 'unpacks to more')
    for i in range(30): pack(tmp_path/f'f-{i}.tar.gz', [('a.png', png(side=8))], 'w:gz')
    monkeypatch.setattr(shards, 'HELD_BYTES', 4 * 10**4)
    assert len(ShardCorpus(tmp_path/'f-0.tar.gz')) == 1
    monkeypatch.setattr(shards, '_entries', _counting(shards._entries, monkeypatch, 3000))
    refused(tmp_path/'f-*.tar.gz', 'gunzip')


def _counting(entries, monkeypatch, budget):
    "`_entries` under a small budget for what is held, but with room for each single shard."
    def small(paths, *args):
        real = shards._files
        def files(path, ignored):
            monkeypatch.setattr(shards, 'HELD_BYTES', 4 * 10**4)
            out = list(real(path, ignored))
            monkeypatch.setattr(shards, 'HELD_BYTES', budget)
            return out
        monkeypatch.setattr(shards, '_files', files)
        return entries(paths, *args)
    return small


@pytest.mark.parametrize('gz', [False, True])
def test_truncation_at_every_length(tmp_path, gz):
    whole = pack(tmp_path/'whole.tar', pair('a') + pair('b', 1)).read_bytes()
    end = len(whole.rstrip(b'\0'))
    whole = gzip.compress(whole) if gz else whole[:-(-end // 512) * 512 + 512]
    path = tmp_path/('cut.tar.gz' if gz else 'cut.tar')
    for cut in [*range(0, len(whole), 37), *range(0, len(whole), 512), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        refused(path, str(path), 'truncated')
    path.write_bytes(whole)
    assert len(ShardCorpus(path)) == 2


@pytest.mark.parametrize('gz', [False, True])
def test_random_damage_is_an_error_or_harmless(tmp_path, gz):
    whole = pack(tmp_path/'w.tar', pair('a') + [('b.png', png(1)), ('b.json', b'{"captions": ["x", "y"], "label": 1}')]).read_bytes()[:5120]
    whole += bytes(1024)
    whole = gzip.compress(whole, mtime=0) if gz else whole
    dice, ends = random.Random(0), dict(good=0, bad=0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 4)): data[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path/'d.tar').write_bytes(data)
        try:
            c = ShardCorpus(tmp_path/'d.tar')
            a, b = [s.key for s in c], [s.key for s in c.stream()]
            assert a == b
            ends['good'] += 1
        except BdnbError as e:
            assert '\n' not in str(e)
            ends['bad'] += 1
    assert ends['bad'] > 30 and (gz or ends['good'] > 30), ends


def test_a_broken_picture_in_the_middle(tmp_path):
    members = [m for i in range(5) for m in pair(f's{i}', i, f'number {i}')]
    members[4] = ('s2.png', png(2)[:100])
    members[6] = ('s3.png', b'')
    c = ShardCorpus(pack(tmp_path/'a.tar', members))
    assert len(c) == 5
    with pytest.raises(BdnbError, match=r'a\.tar: s2'): c[2]
    assert [s.text for s in c] == ['number 0', 'number 1', 'number 4'] and [k for k, _ in c.skipped] == ['s2', 's3']
    assert [s.text for s in c.stream()] == ['number 0', 'number 1', 'number 4'] and len(c.skipped) == 2
    a = ShardCorpus(tmp_path/'a.tar').cache(8, progress=False)
    assert a.keys == ['s0', 's1', 's4'] and [k for k, _ in a.skipped] == ['s2', 's3'] and 'a.tar' in a.skipped[0][1]


def test_one_stray_field_does_not_empty_the_corpus(tmp_path):
    members = [m for i in range(9) for m in pair(f's{i}', i)]
    c = ShardCorpus(pack(tmp_path/'a.tar', [*members, ('x.png', png()), ('x.txt', b'with label'), ('x.cls', b'3')]))
    assert len(c) == 10 and c.labels is None
    c = ShardCorpus(pack(tmp_path/'b.tar', [*members, ('x.png', png()), ('y.png', png()), ('y.txt', b' \n')]))
    assert len(c) == 9 and c.skipped == [('x', 'it has no caption, most others do'), ('y', 'it has no caption, most others do')]


def test_labels_of_both_kinds(tmp_path):
    members = [m for i in range(6) for m in [(f's{i}.png', png(i)), (f's{i}.cls', b'dog' if i % 2 else b'cat')]]
    c = ShardCorpus(pack(tmp_path/'a.tar', [*members, ('x.png', png()), ('x.cls', b'4')]))
    assert c.classes == ['cat', 'dog'] and c.labels.tolist() == [0, 1] * 3 and c.skipped[0][0] == 'x'
    c = ShardCorpus(pack(tmp_path/'b.tar', [('a.png', png()), ('a.json', b'{"label": 7}'), ('b.png', png()), ('b.json', b'{"label": 1e400}')]))
    assert c.labels.tolist() == [7] and c.classes is None and c.skipped[0][0] == 'b'
    (tmp_path/'classes.json').write_text('["only one"]')
    refused(tmp_path/'b.tar', 'classes.json', '1 names')


def test_names_of_classes_come_once(tmp_path):
    (tmp_path/'classes.json').write_text('["cat", "dog", "cat"]')
    refused(pack(tmp_path/'a.tar', [*pair('a'), ('a.cls', b'1')]), 'classes.json', "'cat' comes twice")


def test_order_and_keys(tmp_path):
    refused(pack(tmp_path/'apart.tar', [('a.png', png()), ('b.png', png()), ('a.txt', b'x')]), "'a'", 'neighbours')
    refused(pack(tmp_path/'twice.tar', [('a.png', png()), ('a.PNG', png())]), 'duplicate', 'a.PNG')
    refused(pack(tmp_path/'none.tar', []), 'no usable sample')
    refused(pack(tmp_path/'text.tar', [('a.txt', b'x')]), 'no picture')
    for n in range(2): pack(tmp_path/f's{n}.tar', pair('same', n, f'from {n}'))
    c = ShardCorpus(tmp_path/'s{0..1}.tar')
    assert c.keys == ['s0/same', 's1/same'] and [s.key for s in c.stream()] == c.keys
    (tmp_path/'more').mkdir()
    pack(tmp_path/'more'/'s0.tar', pair('same', 2))
    assert ShardCorpus([tmp_path/'s0.tar', tmp_path/'more'/'s0.tar']).keys == ['0-s0/same', '1-s0/same']
    c = ShardCorpus(pack(tmp_path/'odd.tar', [*pair('./dir/a b'), *pair('caf\udce9'), *pair('new\nline'), ('__meta__/x.png', b''), ('._a.png', b'')]))
    assert c.keys == ['dir/a b', 'caf\\xe9', 'new\\nline'] and [s.key for s in c.stream()] == c.keys
    for k in c.keys: k.encode('utf-8')


def test_shards_that_cannot_be_used(tmp_path):
    a = pack(tmp_path/'a.tar', pair('a'))
    refused([a, a], 'twice')
    refused([a, tmp_path/'x'/'..'/'b.tar'], 'no such file')
    (tmp_path/'c.tar').symlink_to('c.tar')
    refused(tmp_path/'c.tar', 'c.tar')


def test_keys_that_a_shard_cannot_hold(tmp_path):
    keys = ['a.jpg', '000000000', '_000000001', 'b/c.d/e', '../up', '/abs', 'x' * 300, 'é', '__m__/x', 'pipe:ls', ' ']
    c = ArrayCorpus(torch.zeros(len(keys), 3, 4, 4, dtype=torch.uint8), keys=keys, labels=range(len(keys)))
    write_shards(c, tmp_path)
    back = ShardCorpus(tmp_path)
    assert back.keys == keys and [s.key for s in back.stream()] == keys and back.labels.tolist() == list(range(len(keys)))


def test_captions(tmp_path):
    many = b'{"captions": ["one", "two", "two"], "caption": "zero", "other": [[[]]]}'
    c = ShardCorpus(pack(tmp_path/'a.tar', [('a.jpg', png()), ('a.json', many), ('b.png', png()), ('b.json', many), ('b.txt', b'\xef\xbb\xbfmain\r\n'),
                                            ('c.webp', png()), ('c.txt', b'x' * 3000)]))
    assert c.texts == ['zero', 'main', 'x' * 2000] and c.captions[0] == ['zero', 'one', 'two', 'two'] and c.captions[1][0] == 'main'
    assert c.notes == [('c', 'a.tar: 1 caption cut to 2,000 characters')]


def test_a_changed_shard_is_noticed(tmp_path):
    c = ShardCorpus(pack(tmp_path/'a.tar', pair('a')))
    c[0]
    pack(tmp_path/'a.tar', pair('longer', 3, 'something else') + pair('more'))
    for read in (lambda: c[0], lambda: list(c.stream())):
        with pytest.raises(BdnbError, match='changed'): read()
    (tmp_path/'a.tar').unlink()
    with pytest.raises(BdnbError, match='changed'): c[0]


@pytest.fixture(scope='module')
def corpus():
    g = torch.Generator().manual_seed(0)
    return ArrayCorpus(torch.randint(0, 256, (23, 3, 12, 12), dtype=torch.uint8, generator=g), labels=np.arange(23) % 4,
                       captions=[[f'number {i}', f'the {i}th'] for i in range(23)], classes=list('abcd'), name='numbers')


@pytest.mark.parametrize('gz', [False, True])
@pytest.mark.parametrize('per_shard', [4, 23])
def test_stream_is_the_corpus(tmp_path, corpus, gz, per_shard):
    paths = write_shards(corpus, tmp_path, per_shard)
    if gz:
        for p in paths: p.with_suffix('.tar.gz').write_bytes(gzip.compress(p.read_bytes()))
        paths = [p.with_suffix('.tar.gz') for p in paths]
    c = ShardCorpus(paths)
    assert (c.keys, c.captions, c.classes, c.labels.tolist()) == (corpus.keys, corpus.captions, corpus.classes, corpus.labels.tolist())
    for a, b, x in zip(c.stream(), c, corpus.images, strict=True):
        assert (a.key, a.label, a.text) == (b.key, b.label, b.text) and torch.equal(a.image, b.image) and torch.equal(a.image, x)
    for world, workers in [(1, 1), (2, 1), (1, 3), (2, 3), (5, 2)]:
        parts = [[s.key for s in c.stream(r, world, w, workers)] for r in range(world) for w in range(workers)]
        assert sorted(sum(parts, [])) == sorted(c.keys) and all(p == sorted(p, key=c.keys.index) for p in parts) and all(parts)
    for bad in [(1, 1), (-1, 2), (0, 1, 2, 2)]:
        with pytest.raises(BdnbError): list(c.stream(*bad))


def test_workers_can_read(tmp_path, corpus):
    write_shards(corpus, tmp_path, 5)
    loader = torch.utils.data.DataLoader(ShardCorpus(tmp_path), batch_size=None, num_workers=2)
    assert [s.key for s in loader] == corpus.keys


def test_plain_webdataset_reads_what_we_write(tmp_path, corpus):
    import webdataset as wds
    paths = write_shards(corpus, tmp_path, 10, 'webp')
    read = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False).decode('rgb8').to_tuple('webp', 'txt', 'cls'))
    assert [t for _, t, _ in read] == corpus.texts and [y for *_, y in read] == corpus.labels.tolist()
    assert all(np.array_equal(x, i.permute(1, 2, 0).numpy()) for (x, *_), i in zip(read, corpus.images, strict=True))


def test_writing_is_careful(tmp_path, corpus, monkeypatch):
    with pytest.raises(BdnbError, match='did you mean'): write_shards(corpus, tmp_path, ext='pgn')
    write_shards(corpus, tmp_path, 10)
    with pytest.raises(BdnbError, match='already holds shards'): write_shards(corpus, tmp_path)
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(tarfile.TarFile, 'addfile', full)
    with pytest.raises(BdnbError, match='00000.tar: cannot write: the disk is full'): write_shards(corpus, tmp_path/'full')
    assert not list((tmp_path/'full').iterdir())


def test_expansion(tmp_path):
    for n in ['b.tar', 'a.tar', 'c.tar.gz', 'd.tgz', 'e.zip', 'with space {x}.tar', 'co:lon.tar']: (tmp_path/n).touch()
    names = lambda p: [x.name for x in expand_shards(p)]
    assert names(tmp_path) == ['a.tar', 'b.tar', 'c.tar.gz', 'co:lon.tar', 'd.tgz', 'with space {x}.tar']
    assert names(f'{tmp_path}/{{b,a}}.tar') == ['b.tar', 'a.tar'] and names(f'{tmp_path}/?.tar*'.replace('?', '*')) == ['a.tar', 'b.tar',
                                                                                'c.tar.gz', 'co:lon.tar', 'with space {x}.tar']
    assert names(tmp_path/'with space {x}.tar') == ['with space {x}.tar']
