"PoisonCAM on encoders whose answer is known, and the scan command on files."
import importlib
import inspect
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bdnb.attacks.patches import CTRL, coverage
from bdnb.core import BdnbError, rng, write_json
from bdnb.data.corpus import ArrayCorpus
from bdnb.defenses.findings import FOUND, NO_EVIDENCE, Scan, contents
from bdnb.defenses.poisoncam import (INNOCENTS, WINDOWS, Located, PoisonCAM, Search, cluster_counts, mask_bank, masked_features,
                                     masked_probability, miss_bound)
from bdnb.defenses.poisonfilter import FilterEnsemble, FilterRecipe, poison_probability
from bdnb.models.checkpoint import read_header
from bdnb.models.encoders import Encoder, create_encoder, save_encoder
from bdnb.ssl_study import make_ssl_study
from bdnb.train import settled_precision

quick = FilterRecipe.quick(steps=60)


class Colours(nn.Module):
    "Three features: red squares, green squares, and the rest."
    dim = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        strong = lambda a, b: ((x[:, a] > .9) & (x[:, b] < .1)).float().sum((1, 2))*20
        return torch.stack([strong(0, 1), strong(1, 0), x[:, 2].clamp(min=0).sum((1, 2))], 1)*self.weight


def encoder(): return Encoder(Colours(), 'colours', 32, mean=(0, 0, 0), std=(1, 1, 1))


def pile(n=200, every=10, colours=((255, 0, 0),), seed=0):
    "(corpus, truth bool [n], boxes int64 [n, 4])"
    g = rng('pile', seed)
    images = torch.randint(60, 120, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
    truth, boxes = torch.zeros(n, dtype=torch.bool), torch.full((n, 4), -1)
    for i in range(0, n if every else 0, every or 1):
        y, x = torch.randint(0, 24, (2,), generator=g).tolist()
        images[i, :, y:y + 8, x:x + 8] = torch.tensor(colours[(i//every) % len(colours)], dtype=torch.uint8)[:, None, None]
        truth[i], boxes[i] = True, torch.tensor([y, x, 8, 8])
    return ArrayCorpus(images), truth, boxes


def scan(corpus, out=None, **options):
    how = dict(clusters=2, tests=64, search='all', filter=quick) | options
    return PoisonCAM(**how).scan(corpus, encoder(), out, quiet=True)


def test_the_command_looks_through_the_windows_that_are_said():
    from bdnb import cli
    assert cli._shares('--window', inspect.signature(cli.scan).parameters['window'].default) == WINDOWS


half = pytest.mark.xfail(strict=True, reason='known weakness: half of the picture or trigger is covered, nothing is said')


@pytest.mark.parametrize('masks, soft', [('full', True), ('grid', True), ('random', True), ('coarse', True),
                                         pytest.param('interval', True, marks=half), pytest.param('full', False, marks=half),
                                         ('random', False)])
def test_a_planted_trigger_is_found(masks, soft):
    corpus, truth, boxes = pile()
    found = scan(corpus, masks=masks, soft=soft)
    assert found.verdict == FOUND and found.precision_at(20, truth) == 1
    if masks in ('full', 'coarse'): assert found.localisation(boxes)['localisation'] >= .95
    quality = found.filter_quality(truth)
    assert quality['recall'] >= .9 and quality['precision'] >= .9


class Picky(Colours):
    "Sees red only where there is much of it."
    def forward(self, x):
        red = ((x[:, 0] > .9) & (x[:, 1] < .1)).float().sum((1, 2))
        return torch.stack([(red - 20).clamp(min=0)*20, x[:, 1].sum((1, 2)), x[:, 2].sum((1, 2))], 1)*self.weight


def test_a_larger_window_is_tried_when_a_smaller_one_shows_nothing(tmp_path):
    corpus, truth, _ = pile()
    picky = Encoder(Picky(), 'picky', 32, mean=(0, 0, 0), std=(1, 1, 1))
    look = lambda window, **o: PoisonCAM(window=window, clusters=2, tests=64, search='all', filter=quick).scan(corpus, picky,
                                                                                                              quiet=True, **o)
    assert look(.12).verdict == NO_EVIDENCE
    found = look((.12, .27), out=tmp_path)
    assert found.verdict == FOUND and found.precision_at(20, truth) == 1 and (found.window[:, 2] == 9).all()
    small, large = found.evidence['looks']
    assert (small['window'], large['window']) == (.12, .27) and small['best'] < .08 < large['best']
    again = look((.12, .27), out=tmp_path)
    assert torch.equal(again.score, found.score) and again.evidence['looks'] == found.evidence['looks']
    assert again.evidence['forwards'] == found.evidence['forwards']
    stopped = look((.27, .36))                                           # the first that shows it is enough
    assert [l['window'] for l in stopped.evidence['looks']] == [.27]
    for bad in ((), (.27, 2), 0):
        with pytest.raises(BdnbError, match='poisoncam: window'): PoisonCAM(window=bad)


class Placed(Colours):
    "Sees red, and in which quarter of the picture it is."
    dim = 5

    def forward(self, x):
        red = ((x[:, 0] > .9) & (x[:, 1] < .1)).float()
        quarters = [red[:, y:y + 16, z:z + 16].sum((1, 2))*20 for y in (0, 16) for z in (0, 16)]
        return torch.stack([*quarters, x[:, 2].clamp(min=0).sum((1, 2))], 1)*self.weight


def test_fewer_clusters_are_tried_when_more_show_nothing(tmp_path):
    "A crop that is pasted at random rarely falls into its own quarter. With two clusters three quarters are one."
    corpus, truth, _ = pile()
    net = Encoder(Placed(), 'placed', 32, mean=(0, 0, 0), std=(1, 1, 1))
    look = lambda clusters, **o: PoisonCAM(clusters=clusters, tests=64, search='all', filter=quick, evidence=.35, witnesses=2).scan(
        corpus, net, quiet=True, **o)
    assert look(4).verdict == NO_EVIDENCE
    found = look((4, 2), out=tmp_path)
    assert found.verdict == FOUND and found.precision_at(2, truth) == 1 and found.evidence['clusters'] == 2
    many, few = found.evidence['looks']
    assert (many['clusters'], few['clusters'], many['reached']) == (4, 2, 0) and few['bar'] == pytest.approx(.35*2**.5)
    assert many['best'] < many['bar'] and few['best'] > few['bar']
    again = look((4, 2), out=tmp_path)
    assert torch.equal(again.score, found.score) and again.evidence['forwards'] == found.evidence['forwards']
    for bad in ((), (20, 1), 0, 2.5, '20'):
        with pytest.raises(BdnbError, match='poisoncam: clusters'): PoisonCAM(clusters=bad)


def test_the_look_with_most_witnesses_is_taken():
    "Also when it was not the last one; and once a look has enough for the classifier, nothing else is tried."
    corpus, truth, _ = pile()
    net = Encoder(Placed(), 'placed', 32, mean=(0, 0, 0), std=(1, 1, 1))
    look = lambda clusters, top_k: PoisonCAM(clusters=clusters, tests=64, search='all', filter=quick, evidence=.0707,
                                             top_k=top_k).scan(corpus, net, quiet=True)
    assert [l['clusters'] for l in look((4, 2), 5).evidence['looks']] == [4]
    found, alone = look((4, 2), 200), look(4, 200)
    assert [(l['clusters'], l['reached'] > 5) for l in found.evidence['looks']] == [(4, True), (2, True)]
    assert found.evidence['looks'][0]['reached'] > found.evidence['looks'][1]['reached']
    for name in ('score', 'window', 'cluster', 'probability', 'keep'):
        assert torch.equal(getattr(found, name).nan_to_num(-1.), getattr(alone, name).nan_to_num(-1.)), name
    assert torch.equal(found.evidence['heat'], alone.evidence['heat'])


def test_fewer_clusters_ask_for_more():
    run = searching(clusters=(2, 8), evidence=.4)[0]                     # also when the fewer are asked for first
    assert run.bar == pytest.approx(.8) and searching(clusters=(8,), evidence=.4)[0].bar == pytest.approx(.4)
    assert searching(clusters=(2, 32), evidence=.4)[0].bar == 1


def test_numbers_of_clusters():
    assert cluster_counts(40) == [5] and cluster_counts(800) == [10] and cluster_counts(1500) == [15, 10]
    assert cluster_counts(2000) == [20, 14, 10] and cluster_counts(127_000) == [1000, 700, 500]
    assert cluster_counts(50, (80, 60, 20)) == [50, 20]


def searching(**options):
    "A search that is ready to examine, with its poisons' rows and boxes."
    corpus, truth, boxes = pile()
    run = Search(PoisonCAM(**dict(clusters=2, tests=64) | options), corpus, encoder(), Scan(quiet=True), torch.device('cpu'))
    with torch.no_grad(): run.prepare()
    return run, truth.nonzero()[:, 0], boxes


def test_coarse_masks_look_closer_where_the_first_ones_point():
    "Fewer views than the dense bank, and their map is the dense map wherever all windows over a pixel were tried."
    run, rows, boxes = searching(masks='coarse')
    dense = searching(stride=.25)[0]
    with torch.no_grad(): found, every = run.locate(rows), dense.locate(rows)
    assert (found.forwards > len(run.early)).all() and (found.forwards < every.forwards).all()
    middle = boxes[rows, :2] + 4
    off = (found.window[:, :2] + 4 - middle).abs().amax(1)
    assert off.max() <= 6 and (off.float().mean() <= (every.window[:, :2] + 4 - middle).abs().amax(1).float().mean() + 1)


def test_pictures_that_no_mask_disturbs_are_not_scored():
    corpus, truth, _ = pile()
    whole, short = scan(corpus), scan(corpus, skip=.5)
    assert short.searched.all() and short.evidence['forwards']['floor'] == 128*len(mask_bank(32, 9))
    spared = ~truth & (short.score == 0)
    assert spared.float().mean() > .3
    assert short.evidence['forwards']['search'] <= whole.evidence['forwards']['search'] - 32*int(.3*len(truth))
    assert short.score[truth].equal(whole.score[truth]) and short.filter_quality(truth)['recall'] >= .9
    with pytest.raises(BdnbError, match='poisoncam: skip=1'): PoisonCAM(skip=1)


def test_a_second_look_saves_the_rest_of_the_test_pictures():
    corpus, truth, _ = pile()
    whole, short = scan(corpus, tests=200, confirm=None), scan(corpus, tests=200, confirm=64)
    saved = whole.evidence['forwards']['search'] - short.evidence['forwards']['search']
    everyone = 100 + int(truth.sum())                               # test pictures: the red cluster has no more
    assert saved == (everyone - 64)*int(truth.sum()) and set(short.top(20).tolist()) == set(truth.nonzero()[:, 0].tolist())
    assert (short.score[truth] - whole.score[truth]).abs().max() < .2 and short.score[~truth].equal(whole.score[~truth])


def test_what_a_scan_keeps_names_the_poison_classifiers_numbers(tmp_path, monkeypatch):
    def marks(recipe): # a scan that leaves them to the code, in one folder: what its files say that they depend on
        monkeypatch.setattr(FilterRecipe, 'quick', staticmethod(lambda: recipe))
        found = scan(pile()[0], filter=None, out=tmp_path)
        assert found.evidence['settings']['filter'] == asdict(recipe)
        return {read_header(p)['fingerprint'] for p in tmp_path.glob('*.safetensors')}
    before = marks(quick)
    assert len(before) == 1 and marks(quick) == before and not marks(replace(quick, paste=(.5, .9))) & before


class Convolved(Colours):
    "Red squares and the rest, by a convolution, which autocast rounds."
    dim = 2

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.conv.weight.data = torch.tensor([[20., -20, -20], [0, 0, 1]])[:, :, None, None]
        self.conv.bias.data = torch.tensor([-6., 0])

    def forward(self, x): return self.conv(x).relu().sum((2, 3))*self.weight


def test_in_half_precision_a_scan_finds_the_same():
    "Views and features are rounded; clusters and scores are made in float32."
    corpus, truth, _ = pile(n=100, every=5)
    net, seen, z, found = Encoder(Convolved(), 'convolved', 32, mean=(0, 0, 0), std=(1, 1, 1)), [], [], []
    net.net.register_forward_pre_hook(lambda module, x: seen.append(x[0].dtype))
    for precision in 'no', 'bf16':
        how = PoisonCAM(clusters=2, tests=64, search='all', filter=quick, precision=precision)
        run = Search(how, corpus, net, Scan(quiet=True), torch.device('cpu'))
        with torch.no_grad(): run.prepare()
        z.append(run.z)
        assert set(seen) == {torch.float32} and run.centroids.dtype == torch.float32
        found.append(how.scan(corpus, net, quiet=True))
    assert torch.bfloat16 in seen and {v.dtype for v in z} == {torch.float32} and not z[0].equal(z[1])
    torch.testing.assert_close(*z, rtol=.02, atol=0)
    one, half = found
    assert one.verdict == half.verdict == FOUND and half.keep.equal(one.keep)
    assert (half.score - one.score)[truth].abs().max() <= .02 and max(one.score[~truth].max(), half.score[~truth].max()) < .08
    assert set(half.top(20).tolist()) == set(truth.nonzero()[:, 0].tolist())


def test_scans_that_were_kept_before_there_was_a_precision_go_on(tmp_path):
    corpus, how = pile(n=40)[0], PoisonCAM(clusters=2, tests=8, look=4, search='patchsearch', filter=quick)
    def marks(precision):
        found = replace(how, precision=precision).scan(corpus, encoder(), tmp_path, quiet=True)
        kept, = {read_header(p)['fingerprint'] for p in tmp_path.glob('*.safetensors')}
        return kept, found.evidence['settings']
    old = {k: v for k, v in asdict(how).items() if k != 'precision'}
    kept, half = marks('no'), marks('bf16')
    assert kept == (contents(corpus.images, corpus.keys, encoder(), old), old)
    assert half[0] != kept[0] and half[1] == old | dict(precision='bf16')
    assert marks('auto') == (half if settled_precision('auto', 'cpu') == 'bf16' else kept)


def test_precisions_that_cannot_be():
    with pytest.raises(BdnbError, match="poisoncam: precision='bf61'"): PoisonCAM(precision='bf61')
    with pytest.raises(BdnbError, match='fp16 needs a GPU'): scan(pile(n=20)[0], precision='fp16')
    run = searching()[0]
    run.dtype = torch.float16
    run.encoder.net.weight.data.fill_(float('nan'))
    with pytest.raises(BdnbError, match='not finite.*too large for fp16: use precision=bf16'):
        run.stages.stage('features', run.features)


def judged(monkeypatch, *offers, rows=4, **options):
    """What `judge` makes of candidates: each offer is 'trigger', where it is, or 'beside', where nothing is."""
    run, poisons, boxes = searching(window=.25, **options)
    poisons, guilty = poisons[:rows], torch.zeros(2, dtype=torch.bool)
    guilty[run.own[poisons[0]]] = True
    right = boxes[poisons]
    beside = torch.where(right < 12, 24, 0)*torch.tensor([1, 1, 0, 0]) + torch.tensor([0, 0, 8, 8])
    windows = torch.stack([right if o == 'trigger' else beside for o in offers], 1)
    monkeypatch.setattr(run, 'candidates', lambda net, rows: (windows, rows*0 + 5))
    with torch.no_grad(): return run.judge(None, poisons, guilty), right, beside


@pytest.mark.parametrize('offers', [('beside', 'trigger', 'beside'), ('trigger', 'beside', 'beside'),
                                    ('beside', 'beside', 'trigger')])
def test_of_three_windows_the_one_that_moves_pictures_is_taken(monkeypatch, offers):
    found, right, _ = judged(monkeypatch, *offers, judge_tests=16)
    assert found['window'].equal(right) and (found['forwards'] == 5 + 3*16).all() and (found['moved'] >= 8).all()


def test_of_windows_that_move_equally_many_the_first_is_taken(monkeypatch):
    found, _, beside = judged(monkeypatch, 'beside', 'beside', 'beside')
    assert found['window'].equal(beside) and (found['moved'] == 0).all()
    found, right, _ = judged(monkeypatch, 'trigger', 'trigger')
    assert found['window'].equal(right) and (found['forwards'] == 5 + 2*52).all()          # there are 52 test pictures, not 128


def test_suspects_that_proved_nothing_are_looked_at_again(monkeypatch):
    "Those whose crop reached the bar keep their window, and so do pictures that are no suspects."
    corpus, truth, boxes = pile()
    asked, suspects = [], Search.suspects
    def blinded(self, net, score, window, keep):
        "As if the search had gone wrong on every other poison, and had never come to the first."
        rows = truth.nonzero()[:, 0]
        score, window = score.clone(), window.clone()
        score[rows[::2]], window[rows[::2], :2] = 0., 0
        score[rows[0]], window[rows[0]] = float('nan'), -1
        asked.append((score, window, keep, self.stages.clock))
        return suspects(self, net, score, window, keep)
    monkeypatch.setattr(Search, 'suspects', blinded)
    found = scan(corpus)
    score, window, keep, clock = asked[0]
    assert clock.expected['second opinion'] and clock.left() == 0                                  # no work was expected in vain
    again = ~keep & ~(score >= .08)
    assert again[truth].sum() == 10 and found.window[~again].equal(window[~again])
    assert found.localisation(boxes)['localisation'] == 1 and (found.window[~found.keep] >= 0).all()
    assert not found.keep[truth].any() and keep[~truth].equal(found.keep[~truth])                   # no poison is acquitted
    asked = int(again.sum()) + INNOCENTS                   # 49 masks; 32 test pictures of one cluster and all 20 of the other
    assert found.evidence['forwards']['second opinion'] == asked*(2*49 + 3*52)


def test_suspects_whose_window_does_nothing_are_acquitted(monkeypatch):
    "The classifier suspects ten honest pictures too. Their crops move as little as those of pictures that it cleared."
    corpus, truth, _ = pile()
    honest, classify = (~truth).nonzero()[:10, 0], Search.classify
    def suspicious(self, net):
        p = classify(self, net)['probability']
        p[honest] = .99
        return dict(probability=p)
    monkeypatch.setattr(Search, 'classify', suspicious)
    strict, found = scan(corpus, acquit=None), scan(corpus)
    assert not strict.keep[honest].any() and strict.evidence['acquitted'] == 0
    assert found.keep[honest].all() and found.evidence['acquitted'] >= 10 and (found.probability[honest] == .99).all()
    assert found.keep[truth].equal(strict.keep[truth]) and found.filter_quality(truth)['precision'] == 1
    for bad in (-.1, 1):
        with pytest.raises(BdnbError, match='poisoncam: acquit'): PoisonCAM(acquit=bad)
    with pytest.raises(BdnbError, match='poisoncam: judge_tests=None must be 1 or more'): PoisonCAM(judge_tests=None)


def test_a_settled_scan_goes_on_where_it_was(tmp_path, monkeypatch):
    "Neither the classifier nor what was heard before the kill is done again."
    corpus, truth, _ = pile()
    honest, classify, judge, heard = (~truth).nonzero()[:10, 0], Search.classify, Search.judge, []
    def suspicious(self, net):
        p = classify(self, net)['probability']
        p[honest] = .99
        return dict(probability=p)
    def hearing(self, net, rows, guilty):
        heard.append(rows)
        if dies and len(heard) > 3: raise KeyboardInterrupt
        return judge(self, net, rows, guilty)
    monkeypatch.setattr(Search, 'classify', suspicious)
    monkeypatch.setattr(Search, 'judge', hearing)
    go = lambda: PoisonCAM(clusters=2, tests=64, search='all', filter=quick).scan(corpus, encoder(), out=tmp_path, quiet=True)
    dies = True
    with pytest.raises(KeyboardInterrupt): go()
    monkeypatch.setattr('bdnb.defenses.poisoncam.train_filter', lambda *a, **k: pytest.fail('trained again'))
    dies, first = False, None
    heard.clear()
    first = go()
    assert 0 < len(torch.cat(heard)) and first.evidence['acquitted'] >= 10
    heard.clear()
    again = go()
    assert not heard and again.keep.equal(first.keep) and again.window.equal(first.window)
    assert again.evidence['forwards'] == first.evidence['forwards'] and again.evidence['acquitted'] == first.evidence['acquitted']


def test_who_is_acquitted(monkeypatch):
    "Who moves no more than nine of ten cleared pictures do; but nobody in a guilty cluster, and nobody who is proven."
    run = searching()[0]
    run.own, score, keep = torch.arange(200)//100, torch.full((200,), .01), torch.ones(200, dtype=torch.bool)
    score[100:105], suspects, said = .5, [100, 110, 10, 11, 12], {110: 0, 10: 0, 11: 3, 12: 2}
    keep[suspects], window = False, torch.zeros(200, 4, dtype=torch.int64)
    def judge(net, rows, guilty):
        assert guilty.tolist() == [False, True]
        moved = torch.tensor([said.get(int(r), 2) for r in rows])
        return dict(window=torch.full((len(rows), 4), 7), moved=moved, forwards=moved)
    monkeypatch.setattr(run, 'judge', judge)
    found = run.stages.stage('verdicts', lambda: run.suspects(None, score, window, keep))
    assert [r for r in suspects if not found['keep'][r]] == [100, 110, 11]
    assert [r for r in range(200) if found['window'][r, 0] == 7] == [11, 110]            # the others keep theirs
    run.how = replace(run.how, acquit=None)
    assert not run.stages.stage('again', lambda: run.suspects(None, score, window, keep))['keep'][suspects].any()
    run.how, few = replace(run.how, acquit=.9), keep.clone()
    few[15:100] = False                                                                  # too few are left to compare with
    assert not run.stages.stage('few', lambda: run.suspects(None, score, window, few))['keep'][suspects].any()
    none = torch.zeros(200, dtype=torch.bool)
    assert run.stages.stage('none', lambda: run.suspects(None, score, window, none))['window'].equal(window)


class Redness(nn.Module):
    "A poison classifier that knows: one network, sure by the red pixels that it sees."
    def forward(self, x):
        red = ((x[:, 0] > .9) & (x[:, 1] < .1)).float().sum((1, 2))
        return torch.stack([torch.zeros_like(red), red/8 - 2], 1)[:, None]


def test_the_classifier_points_where_the_encoder_does_not(monkeypatch):
    run, rows, boxes = searching()
    lost = torch.tensor([0, 0, 9, 9]).expand(len(rows), 4)
    monkeypatch.setattr(run, 'locate', lambda rows: Located(lost, None, None, torch.ones(len(rows), dtype=torch.int64)))
    windows, passes = run.candidates(Redness(), rows)
    assert windows.shape == (len(rows), 3, 4) and windows[:, 0].equal(lost) and (passes == 1).all()
    for i in 1, 2: assert (coverage(windows[:, i], boxes[rows]) >= .5).float().mean() >= .95, i


def test_the_classifier_is_asked_under_every_mask():
    corpus, _, _ = pile(n=20)
    net = FilterEnsemble(2, 4, 32).eval()
    masks = mask_bank(32, 9)[:3]
    with torch.no_grad():
        p = masked_probability(net, encoder(), corpus.images[:5], masks, batch=4)
        for i, m in ((0, 0), (3, 1), (4, 2)):
            view = corpus.images[i].float()[None]/255*~masks[m]
            assert p[i, m].item() == pytest.approx(poison_probability(net(view)).item(), abs=1e-6)
    assert p.shape == (5, 3)


def test_clusters_of_the_proven_crops():
    run = searching(clusters=2)[0]
    run.own = torch.tensor([0]*30 + [1]*3 + [0, 1])
    score = torch.cat([torch.full((33,), .5), torch.tensor([.01, float('nan')])])
    assert run.guilty(score).tolist() == [True, False]                 # 3 of 33 are less than a tenth
    score[:3] = 0.
    assert run.guilty(score).tolist() == [True, True]                  # 3 of 30 are not
    run.k, run.own = 20, torch.arange(35) % 20
    assert run.guilty(score).sum() == 10 and run.guilty(torch.full((35,), .01)).sum() == 0         # of many, those that hold most


def test_two_triggers_at_once():
    corpus, truth, boxes = pile(colours=((255, 0, 0), (0, 255, 0)))
    found = scan(corpus, clusters=3)
    assert found.verdict == FOUND and found.filter_quality(truth)['recall'] >= .9
    assert found.localisation(boxes)['localisation'] >= .95


def test_clean_pictures_lose_nothing():
    for seed in range(3):
        found = scan(pile(every=0, seed=seed)[0])
        assert found.verdict == NO_EVIDENCE and found.keep.all()


def test_the_benches_read_what_a_look_says(monkeypatch):
    piles = bench(monkeypatch, 'small_piles')
    seen, highest = piles.alarm(encoder(), pile()[0], 2)
    assert seen and .08 < highest <= 1


def test_a_global_trigger_that_no_encoder_learned_is_no_patch():
    "CTRL's wave in pictures raises no alarm by itself. The encoder never learned it: of a victim of CTRL this shows nothing."
    corpus, _, _ = pile(every=0)
    images = corpus.images.clone()
    images[::10] = CTRL().on_uint8(images[::10])
    found = scan(ArrayCorpus(images))
    assert found.verdict == NO_EVIDENCE and found.keep.all()


def test_the_unexamined_are_nan_and_the_search_goes_where_the_score_is():
    corpus, truth, _ = pile(n=400)
    found = scan(corpus, search='adaptive', clusters=8)
    assert not found.searched.all() and found.score[~found.searched].isnan().all()
    assert found.searched[truth].float().mean() > found.searched[~truth].float().mean()


def test_dropped_tokens_equal_masks_that_the_network_cannot_see():
    vit = create_encoder('vit_tiny/8', image_size=32).eval()
    images, bank = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), mask_bank(32, 8, 8)
    with torch.no_grad():
        z = masked_features(vit, images, bank, drop=True)
        covered = images.clone()
        covered[:, :, :8, :8] = 3                                       # the first mask's patch: whatever stands there
        other = masked_features(vit, covered, bank, drop=True)
    torch.testing.assert_close(z[0], other[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(z[1], other[1], atol=1e-3)
    with pytest.raises(BdnbError, match='no tokens to drop'): masked_features(encoder(), images, bank, drop=True)


@pytest.mark.parametrize('options, why', [
    (dict(window=(.5, .1)), 'drop with window=0.1: a mask leaves no token uncovered'), (dict(window=1.), 'no token uncovered'),
    (dict(window=.1, masks='coarse'), 'no token uncovered'), (dict(window=.1, alone=False), None),
    (dict(window=.1, masks='grid'), None), (dict(window=.5), None), (dict(window=.1, drop=False), None)])
def test_windows_that_leave_no_token_are_refused_before_anything_is_encoded(monkeypatch, options, why):
    vit, how = create_encoder('vit_tiny/8', image_size=32).eval(), PoisonCAM(**dict(drop=True) | options)
    def passes(*a, **k): raise AssertionError('encoded')
    for name in ('embed', 'embed_tokens'): monkeypatch.setattr(vit, name, passes)
    if why is None:
        with pytest.raises(AssertionError, match='encoded'): how.scan(pile(n=20)[0], vit, quiet=True)
    else:
        with pytest.raises(BdnbError, match=why): how.scan(pile(n=20)[0], vit, quiet=True)


def test_too_few_pictures_and_damaged_weights():
    with pytest.raises(BdnbError, match='too few to cluster'): scan(pile(n=5)[0])
    broken = encoder()
    broken.net.weight.data.fill_(float('nan'))
    with pytest.raises(BdnbError, match='not finite'): PoisonCAM().scan(pile(n=20)[0], broken, quiet=True)


def test_the_bound_of_the_first_look():
    assert abs(miss_bound(32, 2, .3) - .00125) < 5e-4 and miss_bound(32, 2, 0.) == 1 and miss_bound(10, 0, 1.) == 0
    chance = lambda **options: searching(**options)[0].chance_to_miss()
    assert chance(evidence=.2) == miss_bound(32, 2, .2) and chance(look=64) == chance(sequential=False) == 0      # one look
    assert chance(evidence=.05) == miss_bound(32, 1, .05)               # two of 32 reach that bar, and are not dropped


def bench(monkeypatch, name):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent/'bench'))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def victims_folder(out):
    "What a study leaves of a victim."
    folder = out/'patch-pattern=10-seed3'
    save_encoder(create_encoder('resnet10/half', 4), folder/'encoder.safetensors')
    write_json(folder/'training.json', dict(seconds=1.))
    write_json(folder/'row-none.json', dict(before=dict(ca=.9, pa=.8, asr=.1, fp=.0)))
    write_json(out/'study.json', dict(recipe=asdict(make_ssl_study(n=120, epochs=7))))
    return folder


def test_the_race_reads_a_victims_folder_and_its_columns_add_up(tmp_path, monkeypatch):
    race, folder = bench(monkeypatch, 'poisoncam'), victims_folder(tmp_path)
    case = race.victim(folder, dict(class_rate=.5))
    assert (case.attack, case.seed, case.study.class_rate, case.study.ssl.epochs) == ('patch:pattern=10', 3, .5, 7)
    row = race.measure(case, race.OURS, PoisonCAM(window=.34, clusters=4, tests=16, look=4, filter=quick))
    stages = row['stages'].values()
    assert row['class_rate'] == .5 and 0 <= row['after']['localisation'] <= 1 and row['before']['asr'] == .1
    assert sum(s['forwards'] for s in stages) == row['forwards'] and row['stages']['features']['forwards'] == 120
    assert row['stages']['localise']['forwards'] == 2*25*row['examined'] and min(s['seconds'] for s in stages) >= 0
    assert sum(s['seconds'] for s in stages) <= row['seconds'] + .01
    full = row | dict(system=race.FULL, seconds=10*row['seconds'])
    found = {(r['what'], r['peer']): r['ratio'] for r in race.compared([row, full])}
    assert found['whole scan, wall time', race.FULL] == pytest.approx(10)
    with pytest.raises(BdnbError, match="is named TRIGGER-seedN"): race.victim(tmp_path)


@pytest.mark.parametrize('search', ['adaptive', 'all'])
def test_the_second_opinion_is_measured(tmp_path, monkeypatch, search):
    bench(monkeypatch, 'poisoncam')
    suspects, folder = bench(monkeypatch, 'suspects'), victims_folder(tmp_path)
    case = bench(monkeypatch, 'poisoncam').victim(folder)
    eager = PoisonCAM(window=.34, clusters=4, tests=40, look=8, judge_tests=16, evidence=.01, witnesses=1,
                      search=search, filter=quick)
    row = suspects.measure(case, case.plan, 'near the middle', eager)
    assert row['verdict_of_scan'] == FOUND and set(row['first']) == set(row['after']) and row['seconds'] > 0
    assert row['first']['removed'] == row['after']['removed'] + row['acquitted'] and 'first' in suspects.line(row)


def test_the_ablation_varies_one_setting_at_a_time(monkeypatch):
    bench(monkeypatch, 'poisoncam')
    ablation = bench(monkeypatch, 'ablation')
    every = list(ablation.settings())
    assert len(every) == 1 + sum(len(v) - 1 for v in ablation.AXES.values())
    assert all(sum(s[k] != ablation.DEFAULT[k] for k in s) == (s is not every[0]) for s in every)
    for s in every: PoisonCAM(**s)


@pytest.mark.parametrize('line, says', [
    ('scan folder:nowhere --encoder e.safetensors', 'nowhere'),
    ('scan shapes:?n=20 --out {out}', 'give either --encoder CHECKPOINT or --train METHOD'),
    ('scan shapes:?n=20 --train mocca --out {out}', "did you mean 'moco'"),
    ('scan shapes:?n=20 --encoder nothing.safetensors --out {out}', 'no such checkpoint'),
    ('scan shapes:?n=20 --encoder nothing.safetensors --search some --out {out}', 'poisoncam: search'),
    ('scan shapes:?n=20 --encoder nothing.safetensors --precision bf61 --out {out}', "--precision 'bf61'"),
    ('scan shapes:?n=20 --encoder nothing.safetensors --precision fp16 --device cpu --out {out}', 'precision=fp16 needs a GPU'),
    ('scan shapes:?n=20 --train moco --drop-tokens --out {out}', '--drop-tokens: is for --encoder')])
def test_bad_scans_say_so_in_one_line_and_leave_nothing(run, tmp_path, line, says):
    out = tmp_path/'out'
    code, _, err = run(line.format(out=out))
    assert code == 2 and says in err and err.count('\n') == 1 and not out.exists()


def test_a_small_pile_in_which_most_pictures_reach_the_bar_is_scanned():
    "Crops for the classifier are at most a quarter of the pile, or nothing would be left to paste them on."
    found = scan(pile(n=12, every=2)[0], evidence=.001, witnesses=1, tests=12, look=12)
    assert found.evidence['looks'][0]['reached'] > 3 and not found.probability.isnan().any()


def test_where_no_random_mask_was_is_neither_hot_nor_cold():
    "With what windows say alone all heat is below zero, and nothing would be hotter than what nobody asked about."
    search, rows, _ = searching(masks='random', count=12)
    with torch.no_grad(): found, seen = search.locate(rows[:8]), search.bank.any(0)
    assert not seen.all() and (found.heat[:, seen].amax(1) < 0).any()
    middle = found.heat[:, seen].mean(1, keepdim=True).expand(-1, int((~seen).sum()))
    torch.testing.assert_close(found.heat[:, ~seen], middle)


def test_what_is_proven_is_not_taken_for_clean(monkeypatch):
    "However much there is of it: a fifth of this pile."
    trained, (corpus, truth, _) = [], pile(every=5)
    def train(images, clean, crops, validation, *args, **options):
        trained.append((clean, validation))
        raise KeyboardInterrupt
    monkeypatch.setattr('bdnb.defenses.poisoncam.train_filter', train)
    with pytest.raises(KeyboardInterrupt): scan(corpus)
    clean, (poisoned, negative) = trained[0]
    assert not truth[clean].any() and truth[poisoned].all() and not truth[negative].any() and len(clean) > 100


def test_equals_do_not_come_in_the_folders_order():
    search, *_ = searching()
    score = torch.zeros(search.n)
    score[[5, 9]] = torch.tensor([.5, .7])
    order = search.ranking(score)
    assert order[:2].tolist() == [9, 5] and order.sort().values.tolist() == list(range(search.n))
    assert order[2:].tolist() != sorted(order[2:].tolist()) and torch.equal(order, search.ranking(score))


def test_features_that_are_lost_under_a_mask_are_said(monkeypatch):
    search, *_ = searching()
    plain = masked_features
    def lost(*args, **options):
        z = plain(*args, **options)
        z[-1] = float('nan')
        return z
    monkeypatch.setattr('bdnb.defenses.poisoncam.masked_features', lost)
    with pytest.raises(BdnbError, match=f'not finite for {search.pictures.keys[3]} under a mask'): search.locate(torch.tensor([1, 3]))


def test_views_with_as_many_tokens_share_a_pass(monkeypatch):
    vit, sizes = create_encoder('vit_tiny/8', image_size=32).eval(), []
    images, bank = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), mask_bank(32, 12, 6)
    plain = vit.embed_tokens
    monkeypatch.setattr(vit, 'embed_tokens', lambda x, keep: (sizes.append(keep.shape), plain(x, keep))[1])
    with torch.no_grad():
        z = masked_features(vit, images, bank, drop=True)
        assert sum(n for n, _ in sizes) == 2*len(bank) and len(sizes) == len({k for _, k in sizes}) < len(bank)
        one = masked_features(vit, images[1:], bank[7:8], drop=True)[0]
    torch.testing.assert_close(z[len(bank) + 7], one, atol=1e-5, rtol=1e-4)
