"Corpora under bad data, bad disks and small memory; files written whole or not at all."
import errno, os, pickle, shutil, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdnb import core
from bdnb.core import BdnbError, atomic_write, hash_normal, hash_uniform, read_json, write_json
from bdnb.data import corpus as corpus_module
from bdnb.data.corpus import ArrayCorpus, Corpus, CsvCorpus, FolderCorpus, merge
from bdnb.data.export import corpus_to_csv
from bdnb.data.images import BadImage


def picture(path, shade, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (shade, 255 - shade, 7)).save(path)


def refused(f, *says, exc=BdnbError):
    with pytest.raises(exc) as e: f()
    text = str(e.value)
    assert '\n' not in text and all(s in text for s in says), text
    return text


@pytest.fixture
def folder(tmp_path):
    "Two classes of ten pictures; two pictures are bad."
    for c, y in (('cat', 0), ('dog', 100)):
        for i in range(10): picture(tmp_path/'set'/c/f'{i}.png', y + i)
    (tmp_path/'set'/'cat'/'3.png').write_bytes((tmp_path/'set'/'cat'/'3.png').read_bytes()[:50])
    (tmp_path/'set'/'dog'/'7.png').write_bytes(b'')
    return tmp_path/'set'


def table(tmp_path, text, name='pairs.csv', **kw):
    for i in range(5): picture(tmp_path/f'{i}.png', i)
    path = tmp_path/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CsvCorpus(path, **kw)


# ---------------------------------------------------------------- folders

def test_bad_folders(tmp_path):
    refused(lambda: FolderCorpus(tmp_path/'none'), 'none: no such folder')
    refused(lambda: FolderCorpus(tmp_path), str(tmp_path), 'no pictures')
    (tmp_path/'a.txt').write_text('x')
    refused(lambda: FolderCorpus(tmp_path/'a.txt'), 'a.txt: not a folder')
    refused(lambda: FolderCorpus(tmp_path), 'no pictures')
    picture(tmp_path/'a.png', 1); picture(tmp_path/'cat'/'b.png', 1)
    refused(lambda: FolderCorpus(tmp_path), 'both directly in it and in its folders')


def test_folder_layouts(folder):
    c = FolderCorpus(folder)
    assert c.classes == ['cat', 'dog'] and c.labels.tolist() == [0] * 10 + [1] * 10 and c.keys[0] == 'cat/0.png'
    assert c.labels.dtype == np.int64 and c[12].label == 1 and c[12].image[0, 0, 0] == 102 and c[0].image.shape == (3, 9, 12)
    picture(folder/'dog'/'deep'/'x.JPEG', 5); picture(folder/'.trash'/'x.png', 5)
    (folder/'emu').mkdir(); (folder/'dog'/'notes.txt').write_text('x')
    (folder/'dog'/'loop').symlink_to(folder/'dog', target_is_directory=True)
    c = FolderCorpus(folder)
    assert c.classes == ['cat', 'dog', 'emu'] and len(c) == 21 and 'dog/deep/x.JPEG' in c.keys and c.notes[0][0] == 'emu'
    flat = FolderCorpus(folder/'cat')
    assert flat.labels is None and flat.classes is None and len(flat) == 10


def test_what_is_hidden_is_counted(folder):
    "torchvision's ImageFolder reads such pictures: a trainer may have learned from what we do not look at."
    whole = FolderCorpus(folder)
    cls = whole.classes[0]
    (folder/cls/'.cache').mkdir()
    for name in ('.x.png', '.cache/y.png', '.DS_Store'): (folder/cls/name).write_bytes((folder/whole.keys[0]).read_bytes())
    (folder/'.git').mkdir()
    c = FolderCorpus(folder)
    assert c.keys == whole.keys and [k for k, _ in c.skipped] == ['.git', f'{cls}/.cache', f'{cls}/.x.png']
    assert all('hidden, not read' in why for _, why in c.skipped)


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    cls, real = FolderCorpus(folder).classes[0], os.scandir
    def scandir(path):
        if Path(path).name == cls: raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(BdnbError, match=f'{cls}: cannot read the folder: Permission denied'): FolderCorpus(folder)


def test_file_names_that_are_not_utf8(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b'caf\xe9.png')
    try: Image.new('RGB', (2, 2)).save(open(name, 'wb'), 'PNG')
    except OSError: pytest.skip('this disk takes UTF-8 names only')
    c = FolderCorpus(tmp_path)
    assert c.keys == ['caf\\xe9.png']
    assert c[0].image.shape == (3, 2, 2)


# ---------------------------------------------------------------- bad samples

def test_bad_samples_are_named_counted_and_skipped(folder):
    c = FolderCorpus(folder)
    refused(lambda: c[3], 'cat/3.png', 'damaged', exc=BadImage)
    refused(lambda: c[17], 'dog/7.png', '0 bytes', exc=BadImage)
    assert c.skipped == []
    for _ in range(2): assert len(list(c)) == 18
    assert [k for k, _ in c.skipped] == ['cat/3.png', 'dog/7.png'] and 'damaged' in c.skipped[0][1]
    a = FolderCorpus(folder).cache(4)
    assert len(a) == 18 and a.skipped == c.skipped and a.labels.tolist() == [0] * 9 + [1] * 9
    assert 'cat/3.png' not in a.keys and a[3].key == 'cat/4.png' and (a[3].image[0] == 4).all()


def test_all_bad(folder):
    for p in folder.rglob('*.png'): p.write_bytes(b'GIF89a')
    for f in (lambda: list(FolderCorpus(folder)), lambda: FolderCorpus(folder).cache(4),
              lambda: FolderCorpus(folder).cache(4, budget_bytes=1, folder=folder/'c')):
        text = refused(f, 'none of its 20 images can be used', 'cat/0.png')
        assert str(folder) in text
    assert not list((folder/'c').iterdir())


# ---------------------------------------------------------------- tables

def test_bad_tables(tmp_path):
    refused(lambda: CsvCorpus(tmp_path/'none.csv'), 'none.csv: no such file')
    refused(lambda: CsvCorpus(tmp_path), 'cannot read')
    refused(lambda: table(tmp_path, ''), 'pairs.csv: the file is empty')
    refused(lambda: table(tmp_path, 'image,caption\n'), 'no usable rows')
    refused(lambda: table(tmp_path, '0.png,a cat\n1.png,a dog\n'), 'no image column', 'columns found: 0.png, a cat')
    refused(lambda: table(tmp_path, 'image,size\n0.png,9\n'), 'no caption column', 'columns found: image, size')
    refused(lambda: table(tmp_path, 'image,caption\n0.png,x\n', caption_col='captoin'),
            "no column 'captoin'; did you mean 'caption'?")
    refused(lambda: table(tmp_path, 'image,caption\n0.png,caf\xe9\n'.encode('latin-1')),
            'pairs.csv: not utf-8 text', 'save it as UTF-8')
    refused(lambda: table(tmp_path, 'image,caption\n0.png,a\n'.encode('utf-16')), 'not utf-8')
    refused(lambda: table(tmp_path, 'image,caption\n0.png,a\n', encoding='klingon'), "unknown encoding 'klingon'")
    refused(lambda: table(tmp_path, 'image,caption\n0.png,' + 'x' * 200_000), 'pairs.csv line', 'field larger')
    refused(lambda: table(tmp_path, 'image,caption\n0.png,\n1.png, \n'), 'no usable rows of 2', 'row 2: 0.png: no caption')
    assert table(tmp_path, 'image,caption\n0.png,caf\xe9\n'.encode('latin-1'), encoding='latin-1').texts == ['caf\xe9']


@pytest.mark.parametrize('end', ['', '\n'])
def test_a_quote_that_is_never_closed_is_no_caption(tmp_path, end):
    "Or it would swallow every row behind it without a word."
    (tmp_path/'a.csv').write_text('image,caption\na.png,one\nb.png,"two\nc.png,three\nd.png,four' + end)
    with pytest.raises(BdnbError, match=r'a.csv line \d: a quote is opened and never closed'): CsvCorpus(tmp_path/'a.csv')
    (tmp_path/'b.csv').write_text('image,caption\na.png,"one\nline"\nb.png,"two"' + end)
    assert CsvCorpus(tmp_path/'b.csv').texts == ['one line', 'two']


def test_rows_are_skipped_and_recorded(tmp_path):
    c = table(tmp_path, '\ufeffImage,Caption,extra\n0.png,a cat,\n1.png,,\n,lost,\n2.png,a dog, and more,\n\n'
                        'https://x.org/a.png,far,\n'
                        'pipe:cat /etc/passwd,run,\nmissing.png,gone,\n3.png,"two\nlines, one caption",\n')
    assert c.keys == ['0.png', 'missing.png', '3.png'] and c.texts == ['a cat', 'gone', 'two lines, one caption']
    want = ['row 3: 1.png: no caption', 'row 4: no image', 'row 5: 4 cells for 3 columns', 'row 6: empty row',
            'row 7: https://x.org/a.png is a URL', 'row 8: pipe:cat /etc/passwd is a URL']
    assert len(c.skipped) == 6 and all(w in reason for w, (_, reason) in zip(want, c.skipped))
    refused(lambda: c[1], 'pairs.csv row 9: missing.png: no such image file', exc=BadImage)
    a = c.cache(4)
    assert a.texts == ['a cat', 'two lines, one caption'] and len(a.skipped) == 7 and 'row 9' in a.skipped[-1][1]


def test_long_captions_load_and_are_noted(tmp_path):
    c = table(tmp_path, f'image,caption\n0.png,{"word " * 2000}\n1.png,short\n')
    assert len(c) == 2 and len(c.texts[0]) <= 2000 and c.texts[0].endswith('word') and c[0].text == c.texts[0]
    assert len(c.notes) == 1 and 'row 2: 0.png: caption cut to 2,000' in c.notes[0][1] and not c.skipped
    assert c.cache(4).notes == c.notes


def test_table_dialects(tmp_path):
    assert table(tmp_path, 'title\tfilepath\na cat, asleep\t0.png\n', 'p.tsv').texts == ['a cat, asleep']
    assert table(tmp_path, 'title\tfilepath\na cat\t0.png\n', 'p.csv').keys == ['0.png']
    names = table(tmp_path, 'path,class\n0.png,dog\n1.png,cat\n2.png,dog\n3.png,\n')
    assert names.classes == ['cat', 'dog'] and names.labels.tolist() == [1, 0, 1]
    assert names.texts is None and len(names.skipped) == 1
    ids = table(tmp_path, 'path,label\n0.png,10\n1.png,2\n')
    assert ids.classes is None and ids.labels.tolist() == [10, 2]
    absolute = table(tmp_path, f'image,caption\n{tmp_path}/0.png,a\n../{tmp_path.name}/1.png,b\n')
    assert [s.text for s in absolute] == ['a', 'b']
    rows = 'image,caption,label\n0.png,a,x\n0.png,b,x\n1.png,c,y\n0.png,d,y\n'
    grouped, each = table(tmp_path, rows), table(tmp_path, rows, group=False)
    assert grouped.captions == [['a', 'b'], ['c']] and grouped.texts == ['a', 'c'] and 'contradicts' in grouped.skipped[0][1]
    assert each.keys == ['0.png#2', '0.png#3', '1.png#4', '0.png#5'] and each.texts == list('abcd')


# ---------------------------------------------------------------- caching

def counted(monkeypatch):
    calls, load = [], corpus_module.load_image
    def spy(src, *a, **kw): calls.append(str(src)); return load(src, *a, **kw)
    monkeypatch.setattr(corpus_module, 'load_image', spy)
    return calls


@pytest.mark.parametrize('workers', [0, 1, 4])
@pytest.mark.parametrize('budget', [2**31, 1])
def test_cache_decodes_once_in_order(folder, tmp_path, monkeypatch, workers, budget):
    calls = counted(monkeypatch)
    a = FolderCorpus(folder).cache(6, budget_bytes=budget, folder=tmp_path/'c', workers=workers)
    assert len(calls) == 20 == len(set(calls)) and len(a) == 18 and a.images.shape == (18, 3, 6, 6)
    for _ in range(2): list(a); a.subset([1, 2]).gather([0])
    assert len(calls) == 20
    assert a.images[:, 0, 0, 0].tolist() == [i for i in range(10) if i != 3] + [100 + i for i in range(10) if i != 7]
    assert (tmp_path/'c').exists() == (budget == 1)


def test_mapped_cache_cleans_up_after_itself(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'t')); (tmp_path/'t').mkdir()
    a = FolderCorpus(folder).cache(6, budget_bytes=1)
    assert len(list((tmp_path/'t').rglob('*.u8'))) == 1
    part = a.subset([17])
    del a
    assert not list((tmp_path/'t').iterdir()) and (part.images[:, 0] == 109).all()      # the view outlives the name


def test_a_failing_decoder_leaves_no_file(folder, tmp_path, monkeypatch):
    def boom(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(corpus_module, 'load_image', boom)
    with pytest.raises(KeyboardInterrupt): FolderCorpus(folder).cache(6, budget_bytes=1, folder=tmp_path/'c', workers=1)
    assert not list((tmp_path/'c').iterdir())


def test_cache_on_a_full_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, 'open', full_open(Path.open))
    zoo = FolderCorpus(folder, name='zoo')
    text = refused(lambda: zoo.cache(6, budget_bytes=1, folder=tmp_path/'c'), 'zoo-crop6.u8', 'the disk is full')
    assert str(tmp_path/'c') in text and not list((tmp_path/'c').iterdir())


def test_subsets_are_cheap_and_pickle():
    big = ArrayCorpus(torch.zeros(1, 3, 64, 64, dtype=torch.uint8).expand(20_000, 3, 64, 64))      # 245 MB if ever copied
    s = big.subset(range(0, 20_000, 2)).split(.5)[0].subset(slice(10))
    assert s._store.data_ptr() == big._store.data_ptr() and len(s) == 10 and s.gather(torch.arange(4)).shape == (4, 3, 64, 64)
    t = pickle.loads(pickle.dumps(ArrayCorpus(torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8), labels=[0], classes=['a'])))
    assert t.classes == ['a'] and t[0].image[2, 7, 7] == 191
    refused(lambda: t.subset([0, 0]), 'twice')
    refused(lambda: merge([]), 'no corpora')


def test_base_corpus_is_abstract():
    with pytest.raises(TypeError, match='_image'): Corpus(['a'])[0]


# ---------------------------------------------------------------- export

def test_large_label_numbers_are_exported_one_by_one(tmp_path):
    "A table may hold a label of nine digits: a list of as many names would be 60 GB."
    labels = [999_999_999, 0, 7]
    code = ("import resource, sys, torch; from bdnb.data.corpus import ArrayCorpus; from bdnb.data.export import corpus_to_csv\n"
            "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() if sys.platform == 'linux' else 0\n"
            "if used: resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))\n"
            f"corpus_to_csv(ArrayCorpus(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), labels={labels}), sys.argv[1], quiet=True)")
    env = dict(os.environ, PYTHONPATH=str(Path(core.__file__).parents[1]))
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path/'out')], capture_output=True, text=True, env=env, timeout=120)
    assert out.returncode == 0, out.stderr[-500:]
    assert list(CsvCorpus(tmp_path/'out'/'captions.csv').labels) == labels
    named = ArrayCorpus(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), labels=[2, 0, 1], classes=['cat', 'dog', 'cow'])
    assert [r.rpartition(',')[2] for r in corpus_to_csv(named, tmp_path/'named').read_text().split()[1:]] == ['cow', 'cat', 'dog']
    digits = named._with(classes=['5', '6', '7'])
    assert [r.rpartition(',')[2] for r in corpus_to_csv(digits, tmp_path/'digits').read_text().split()[1:]] == ['2', '0', '1']


# ---------------------------------------------------------------- files whole or absent

def full_open(real):
    "`open` whose writes fail half way, as on a full disk."
    def opened(self, mode='r', *a, **kw):
        f = real(self, mode, *a, **kw)
        if 'w' in mode:
            write = f.write
            class Full:
                def write(self, b):
                    write(b[:len(b) // 2])
                    raise OSError(errno.ENOSPC, 'No space left on device')
                def __enter__(self): return self
                def __exit__(self, *a): f.close()
            return Full()
        return f
    return opened


def test_full_disk_simulated(tmp_path, monkeypatch):
    write_json(tmp_path/'r.json', [1])
    monkeypatch.setattr(Path, 'open', full_open(Path.open))
    monkeypatch.setattr(Path, 'write_text', lambda self, text, **kw: self.open('w').write(text))
    refused(lambda: write_json(tmp_path/'r.json', [2]), 'r.json: cannot write: the disk is full')
    monkeypatch.undo()
    assert read_json(tmp_path/'r.json') == [1] and os.listdir(tmp_path) == ['r.json']


def test_full_disk_for_real(tmp_path):
    "A file-size limit is a disk that is full for one process; it needs no privileges."
    code = ("import resource, sys; from bdnb.core import *\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try: write_json(sys.argv[1], list(range(10_000)))\n"
            "except BdnbError as e: print(e)")
    env = dict(os.environ, PYTHONPATH=str(Path(core.__file__).parents[1]))
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path/'r.json')], capture_output=True, text=True, env=env,
                         timeout=60)
    assert out.stdout.strip() == f'{tmp_path}/r.json: cannot write: the file is too large for this disk', out
    assert not list(tmp_path.iterdir())


def test_full_tmpfs(tmp_path):
    "A file system of 64 KiB, where the machine lets us mount one."
    disk = tmp_path/'disk'
    disk.mkdir()
    code = ("import sys, torch; from bdnb.core import *\n"
            "def save():\n"
            "    with atomic_write(sys.argv[1] + '/w.pt') as tmp: torch.save(torch.zeros(100_000), tmp)\n"
            "def arrays():\n"
            "    with atomic_write(sys.argv[1] + '/w.bin') as tmp, tmp.open('wb') as f: f.write(bytes(100_000))\n"
            "for f in (save, arrays):\n"
            "    try: f()\n"
            "    except BdnbError as e: print(e)\n"
            "import os; print(os.listdir(sys.argv[1]))")
    env = dict(os.environ, PYTHONPATH=str(Path(core.__file__).parents[1]))
    mount = f'mount -t tmpfs -o size=64k none {disk} && exec "$@"'
    probe = ['unshare', '-m', 'sh', '-c', mount, 'sh', 'true']
    if not shutil.which('unshare') or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip('mounting needs privileges')
    out = subprocess.run(['unshare', '-m', 'sh', '-c', mount, 'sh', sys.executable, '-c', code, str(disk)],
                         capture_output=True, text=True, env=env, timeout=120)
    assert out.stdout.splitlines() == [f'{disk}/w.{k}: cannot write: the disk is full' for k in ('pt', 'bin')] + ['[]'], out


@pytest.mark.parametrize('text,says', [(b'{"a": ' + b'7' * 5000 + b'}', 'limit'), (b'\xff\xfe', 'not JSON'),
                                       (b'[' * 200_000, 'not JSON'), (b'{"a":\n 1,}', 'line 2'), (b'', 'not JSON')],
                         ids=['digits', 'bytes', 'brackets', 'comma', 'empty'])
def test_json_that_is_none(tmp_path, text, says):
    "Python refuses to read numbers of thousands of digits with an error of its own."
    (tmp_path/'a.json').write_bytes(text)
    told = refused(lambda: read_json(tmp_path/'a.json'), 'a.json', says)
    assert 'sys.set_int' not in told


def test_unwritable_places(tmp_path):
    (tmp_path/'file').write_text('x')
    refused(lambda: write_json(tmp_path/'file'/'a.json', 1), 'a.json: cannot write')
    refused(lambda: write_json(tmp_path/('x' * 300), 1), 'cannot write: the name is too long')
    refused(lambda: write_json('/proc/nowhere/a.json', 1), '/proc/nowhere/a.json: cannot write')
    def other():
        with atomic_write(tmp_path/'a.bin'): open(tmp_path/'input-that-is-missing')
    with pytest.raises(FileNotFoundError): other()          # an error about another file is not ours to rename
    assert os.listdir(tmp_path) == ['file']


# ---------------------------------------------------------------- numbers by counter

CUDA = pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))


@pytest.mark.parametrize('device', ['cpu', CUDA])
def test_hash_numbers_do_not_depend_on_batch_or_device(device):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -2**63, 2**32, 2**32 + 1] + list(range(500)))
    for f in (hash_uniform, hash_normal):
        for n in (1, 2, 7, 3072):
            whole = f(seeds, n, stream=3)
            there = f(seeds.to(device), n, stream=3)
            assert torch.isfinite(whole).all() and torch.equal(f(seeds[5:6].to(device), n, stream=3)[0], there[5])
            if f is hash_uniform or device == 'cpu': assert torch.equal(there.cpu(), whole)
            else:                             # log and cos of two devices: a last bit in one number of a hundred million
                assert (there.cpu() != whole).float().mean() < 1e-5 and (there.cpu() - whole).abs().max() < 1e-6
    assert hash_uniform(seeds[:0], 5).shape == (0, 5) and hash_normal(seeds, 0).shape == (507, 0)
    assert len(hash_uniform(seeds, 64).unique(dim=0)) == len(seeds.unique())


def test_hash_numbers_match_a_plain_reading():
    "Python integers, one number at a time."
    def mix(x):
        x ^= x >> 15; x = x * 0x2C1B3C6D & 0xFFFFFFFF; x ^= x >> 12; x = x * 0x297A2D39 & 0xFFFFFFFF
        return x ^ x >> 15
    def word(seed, j, stream):
        lo, hi = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        a = mix((mix(lo) ^ hi) + 0x3C6EF372 + stream & 0xFFFFFFFF)
        b = mix((mix(hi) ^ lo) + a * 3 + 0x1B873593 & 0xFFFFFFFF)
        return mix(mix(j + a & 0xFFFFFFFF) ^ mix(b ^ stream))
    seeds = [0, 1, -5, 2**40 + 3, 2**63 - 1]
    want = [[(word(s, j, 9) >> 8) / 2**24 for j in range(50)] for s in seeds]
    assert hash_uniform(torch.tensor(seeds), 50, stream=9).tolist() == want
