"Batches under bad files, workers, ranks and interruptions."
import numpy as np, pytest, torch
from PIL import Image
from bdnb.core import BdnbError
from bdnb.data.batches import Batch, Batches, epoch_order, rank_rows
from bdnb.data.corpus import ArrayCorpus, Corpus, FolderCorpus
from bdnb.data.images import BadImage


def toy(n=50, side=8, **kw):
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kw = dict(labels=np.arange(n) % 5, texts=[f'caption {i}' for i in range(n)], classes=list('abcde'), name='toy') | kw
    return ArrayCorpus(images, keys=[f'k{i}' for i in range(n)], **kw)


class Virtual(Corpus):
    "A corpus that must be decoded, with some samples that cannot be."
    def __init__(self, n, bad=(), side=8):
        super().__init__([f'v{i}' for i in range(n)], labels=np.arange(n) % 3, texts=[f't{i}' for i in range(n)], name='virtual')
        self.bad, self.side, self.decoded = set(bad), side, []
    def _image(self, i, size=None, fit='crop'):
        self.decoded.append(i)
        if i in self.bad: raise BadImage(f'v{i}: damaged image: two\nlines')
        return torch.full((3, size or self.side, size or self.side), i % 256, dtype=torch.uint8)


def same(a, b):
    return (a.keys, a.texts, a.seed, a.epoch, a.step, a.rows) == (b.keys, b.texts, b.seed, b.epoch, b.step, b.rows) and \
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)


@pytest.mark.parametrize('make', [toy, lambda: Virtual(50, bad=[3, 17, 40])])
@pytest.mark.parametrize('start', [0, 1, 5, 6])
def test_resume_is_the_tail(make, start):
    whole = list(Batches(make(), 8, seed=1).epoch(3))
    tail = list(Batches(make(), 8, seed=1).epoch(3, start))
    assert len(tail) == len(whole) - start
    assert all(same(a, b) for a, b in zip(tail, whole[start:]))


@pytest.mark.parametrize('make', [toy, lambda: Virtual(50, bad=[3, 17, 40])])
@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('drop_last', [True, False])
def test_ranks_make_up_the_global_batch(make, world, drop_last):
    one = list(Batches(make(), 8, seed=2, size=8, drop_last=drop_last).epoch(1))
    many = [list(Batches(make(), 8, seed=2, size=8, drop_last=drop_last, rank=r, world_size=world).epoch(1)) for r in range(world)]
    for k, b in enumerate(one):
        parts = [m[k] for m in many]
        assert sum((p.keys for p in parts), []) == b.keys
        assert torch.equal(torch.cat([p.images for p in parts]), b.images)
        assert {p.seed for p in parts} == {b.seed} and {p.rows[1] for p in parts} == {len(b)}
        assert [p.rows[0] for p in parts] == np.cumsum([0] + [len(p) for p in parts])[:-1].tolist()


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [epoch_order(100, s, e).tolist() for s in range(3) for e in range(3)]
    assert all(sorted(o) == list(range(100)) for o in orders) and len(set(map(tuple, orders))) == 9
    assert epoch_order(5, 0, 9, shuffle=False).tolist() == list(range(5))
    for n, b, w in [(10, 4, 4), (9, 8, 2), (3, 8, 8)]:
        steps = -(-n//b)
        rows = [(k*b + i) for k in range(steps) for r in range(w) for i in range(*rank_rows(n, b, k, r, w)[:2])]
        assert rows == list(range(n))


@pytest.mark.parametrize('workers', [0, 2])
def test_bad_samples_are_named_once_and_substituted(workers):
    bad = [0, 5, 6, 7, 33]
    batches = Batches(Virtual(40, bad), 8, seed=4, workers=workers)
    seen = [list(batches.epoch(e)) for e in range(2)]
    reference = [list(Batches(Virtual(40, bad), 8, seed=4).epoch(e)) for e in range(2)]
    for a, b in zip(sum(seen, []), sum(reference, [])):
        assert same(a, b) and len(a) == 8 and len(set(a.keys)) == 8
        assert a.keys == [f'v{i}' for i in a.index.tolist()] and not set(a.index.tolist()) & set(bad)
        assert torch.equal(a.images[:, 0, 0, 0].long(), a.index)
    assert sorted(k for k, _ in batches.skipped) == sorted(f'v{i}' for i in bad)
    assert all('damaged' in reason and '\n' not in reason for _, reason in batches.skipped)


@pytest.mark.parametrize('workers', [0, 2])
def test_nothing_readable_is_one_line(workers):
    with pytest.raises(BdnbError, match='none of the 6 samples') as e: list(Batches(Virtual(6, range(6)), 2, workers=workers).epoch(0))
    assert '\n' not in str(e.value) and 'Traceback' not in str(e.value)


def test_every_picture_is_decoded_once():
    corpus = Virtual(32)
    list(Batches(corpus, 8).epoch(0))
    assert sorted(corpus.decoded) == list(range(32))


def test_a_file_that_vanishes_during_the_run(tmp_path):
    for i in range(12):
        (tmp_path/'a').mkdir(exist_ok=True)
        Image.new('RGB', (10 + i, 12), (20*i, 0, 0)).save(tmp_path/'a'/f'{i:02}.png')
    batches = Batches(FolderCorpus(tmp_path), 4, size=8)
    list(batches.epoch(0))
    (tmp_path/'a'/'07.png').unlink()
    assert [len(b) for b in batches.epoch(1)] == [4, 4, 4]
    assert [k for k, _ in batches.skipped] == ['a/07.png']
    with pytest.raises(BdnbError, match='different sizes'): list(Batches(FolderCorpus(tmp_path), 4).epoch(0))


def test_bad_requests():
    for kw, words in [(dict(batch_size=51), 'toy: 50 samples do not fill one batch of 51'), (dict(batch_size=0), 'batch_size'),
                      (dict(batch_size=8, world_size=3), '8 does not divide by 3'), (dict(batch_size=8, rank=-1), 'rank -1')]:
        with pytest.raises(BdnbError, match=words): Batches(toy(), **kw)
    with pytest.raises(BdnbError, match='empty'): Batches(toy(0, labels=None, classes=None), 4, drop_last=False)
    assert [len(b) for b in Batches(toy(), 64, drop_last=False).epoch(0)] == [50]


def test_columns_that_do_not_exist_are_none():
    b = next(Batches(toy(labels=None, texts=None, classes=None), 4, text_view=lambda t, k: t).epoch(0))
    assert b.labels is None and b.texts is None and b.text_views is None and b.to('cpu').labels is None


def test_subset_memmap_and_size(tmp_path):
    np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), dtype=np.uint8).tofile(tmp_path/'x.u8')
    mapped = np.memmap(tmp_path/'x.u8', np.uint8, 'r+', shape=(30, 3, 8, 8))
    corpus = ArrayCorpus(mapped, keys=[str(i) for i in range(30)], name='mapped').subset(range(10, 30))
    b = next(Batches(corpus, 5).epoch(0))
    assert torch.equal(b.images, torch.from_numpy(mapped[b.index.numpy() + 10])) and b.keys == [str(i + 10) for i in b.index.tolist()]
    b.images.zero_()
    assert mapped.any()                                     # a batch is a copy
    assert next(Batches(corpus, 5, size=12).epoch(0)).images.shape == (5, 3, 12, 12)


def test_generators_by_name():
    a, b = (next(Batches(toy(), 8, seed=5, rank=r, world_size=2).epoch(0)) for r in range(2))
    draw = lambda batch, name: torch.rand(3, generator=batch.generator(name)).tolist()
    assert draw(a, 'x') == draw(b, 'x') != draw(a, 'y')
    assert isinstance(a.pin(), Batch) and torch.equal(a.pin().images, a.images)


def test_text_views_follow_the_epoch_only_when_redrawn():
    class View:
        redraw = True
        def __call__(self, texts, keys, epoch): return [f'{t}/{epoch}' for t in texts]
    assert [next(Batches(toy(), 2, text_view=View()).epoch(e)).text_views[0][-2:] for e in (0, 4)] == ['/0', '/4']
    once = [next(Batches(toy(), 2, text_view=lambda t, k: [f'{x}|{y}' for x, y in zip(t, k)]).epoch(4))][0]
    assert once.text_views == [f'{t}|{k}' for t, k in zip(once.texts, once.keys)]
