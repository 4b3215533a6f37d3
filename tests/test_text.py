"EDA, the packaged synonyms and the two ways to WordNet."
import json, random, re, shutil, subprocess, sys
import pytest
import bdnb.data.text as text
from bdnb.core import BdnbError
from bdnb.data.text import DEBIAN_WORDNET, TextView, WordNetFiles, clean_text, eda, packaged_synonyms, stop_words, wordnet_synonyms

debian = pytest.mark.skipif(not (DEBIAN_WORDNET/'data.noun').exists(), reason="Debian's wordnet-base is not installed")
WORDS = ['dog', 'dogs', 'running', 'ran', 'big', 'bigger', 'geese', 'red', 'circle', 'men', 'boxes', 'ponies', 'quickly', 'hot', 'a', 'the',
         'was', 'leaves', 'wolves', 'better', 'glasses', 'churches', 'wishes', 'buzzes', 'biggest', 'made', 'zyzzyva', 'ice', 'well', 'axes']


@pytest.fixture
def fresh():
    "Forget which WordNet was found, before and after."
    caches = [text._wordnet, text.wordnet_synonyms]
    for c in caches: c.cache_clear()
    yield
    for c in caches: c.cache_clear()


def test_the_packaged_list_is_in_the_package():
    code = "import bdnb.data.text as t; print(len(t._packaged()[1]), 'nltk' in __import__('sys').modules)"
    n, nltk = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert int(n) >= 300 and nltk == 'False'
    for word in 'dog man car chair pizza tree house red blue circle square small large standing riding'.split(): assert packaged_synonyms(word)


@pytest.mark.parametrize('caption', ['', ' ', '123 !?', '日本語', '🎈', "'", '\n\t'])
def test_captions_without_letters_come_back(caption):
    assert all(eda(caption, random.Random(s)) == caption for s in range(20))


@pytest.mark.parametrize('caption', ['a', 'I', "Don't", 'Ünïcode Straße', 'x-ray', 'the of and', 'word ' * 500, 'a\tb\nc', "it’s"])
def test_never_empty_and_only_letters(caption):
    for s in range(60):
        out = eda(caption, random.Random(s))
        assert re.fullmatch('[a-z]+( [a-z]+)*', out), out


def test_cleaning_follows_the_official_rules():
    assert clean_text("The Dog's  X-ray, (2nd) photo.") == 'the dogs x ray nd photo'


def test_k_is_a_tenth_rounded_down_and_at_least_one():
    for n in (1, 9, 10, 19, 20, 35):
        words = [f'{a}{b}' for a in 'bcdfg' for b in 'bcdfghjklmnp'][:n]
        assert not set(words) & stop_words()
        k, grown, changed = max(1, n//10), set(), set()
        for s in range(100):
            out = eda(' '.join(words), random.Random(s), lambda w: ('zz',)).split()
            if 'zz' in out: (grown if len(out) > n else changed).add(out.count('zz'))
        assert grown == changed == {k}


def test_the_draw_does_not_depend_on_order_or_global_state():
    texts, keys = [f'a small dog number {i} runs on green grass' for i in range(40)], [f'k{i}' for i in range(40)]
    view = TextView(3, 'packaged')
    random.seed(0); state = random.getstate()
    once = dict(zip(keys, view(texts, keys)))
    assert random.getstate() == state
    assert [view([t], [k])[0] for t, k in zip(texts, keys)] == list(once.values())
    assert view(texts, keys) != TextView(4, 'packaged')(texts, keys)
    code = ('import json; from bdnb.data.text import TextView; '
            f'print(json.dumps(TextView(3, "packaged")({texts!r}, {keys!r})))')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={'PYTHONHASHSEED': '7', 'PATH': '',
                         'PYTHONPATH': ':'.join(sys.path)})
    assert json.loads(out.stdout) == list(once.values())


def test_without_wordnet(fresh, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'nltk', None)
    monkeypatch.setitem(sys.modules, 'nltk.corpus', None)
    monkeypatch.setattr(text, 'DEBIAN_WORDNET', tmp_path)
    assert text.synonym_backend('auto') == 'packaged'
    with pytest.raises(BdnbError, match='WordNet is not installed'): TextView(backend='wordnet')
    with pytest.raises(BdnbError, match='unknown synonyms'): TextView(backend='nltk')


@debian
def test_debians_files(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nltk.corpus', None)
    assert text.synonym_backend('auto') == 'wordnet'
    assert 'domestic dog' in wordnet_synonyms('dogs') and 'red' not in wordnet_synonyms('red') and not wordnet_synonyms('zyzzyva')
    assert all(re.fullmatch('[a-z]+( [a-z]+)*', s) for w in WORDS for s in wordnet_synonyms(w))
    out = [eda('a big dog runs on the grass', random.Random(s), wordnet_synonyms) for s in range(50)]
    assert len(set(out)) > 20 and all(re.fullmatch('[a-z]+( [a-z]+)*', o) for o in out)


@debian
def test_nltk_and_our_reader_agree(fresh, monkeypatch, tmp_path):
    "Debian's files, completed to what nltk wants, read by nltk: the same lemmas for every word."
    nltk = pytest.importorskip('nltk')
    folder = tmp_path/'corpora'/'wordnet'
    shutil.copytree(DEBIAN_WORDNET, folder)
    (folder/'lexnames').write_text(''.join(f'{i:02}\tname.{i}\t1\n' for i in range(45)))
    (folder/'index.sense').write_text('')
    monkeypatch.setattr(nltk.data, 'path', [str(tmp_path)])
    from nltk.corpus import LazyCorpusLoader
    from nltk.corpus.reader import WordNetCorpusReader
    import nltk.corpus
    monkeypatch.setattr(nltk.corpus, 'wordnet', LazyCorpusLoader('wordnet', WordNetCorpusReader, None))
    monkeypatch.setattr(text, 'DEBIAN_WORDNET', tmp_path/'nowhere')
    look, ours = text._wordnet(), WordNetFiles(DEBIAN_WORDNET)
    assert look is not None
    sample = random.Random(0).sample(sorted(ours.index['noun']), 300) + random.Random(1).sample(sorted(ours.index['verb']), 200)
    for word in WORDS + [w for w in sample if '_' not in w] + [w + 's' for w in sample if '_' not in w]:
        assert {x.lower() for x in look(word)} == {x.lower() for x in ours.lemmas(word)}, word
    assert 'domestic dog' in wordnet_synonyms('dogs')
