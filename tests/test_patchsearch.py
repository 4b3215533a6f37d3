"PatchSearch on encoders whose answer is known: repaired and as released, with and without a map, killed and resumed."
import pytest
import torch
from torch import nn

from bdnb.core import BdnbError, rng
from bdnb.data.corpus import ArrayCorpus
from bdnb.defenses.findings import FOUND, Scan, load_findings
from bdnb.defenses.patchsearch import PatchSearch, PatchSearchRun, grad_cam, target_layer
from bdnb.defenses.poisonfilter import FilterRecipe
from bdnb.models.encoders import Encoder, create_encoder

quick = FilterRecipe.quick(models=2, steps=60)
cpu = torch.device('cpu')


class Red(nn.Module):
    "Maps of red pixels, of green light and of blue light; features are their means."
    dim = 3

    def __init__(self, scale=1.):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.tensor([60., 1., 1.])*scale), nn.Identity()

    def forward(self, x):
        red = ((x[:, 0] > .9) & (x[:, 1] < .1)).float()
        return (self.last(torch.stack([red, x[:, 1], x[:, 2]], 1))*self.weight[:, None, None]).mean((2, 3))


def encoder(scale=1.): return Encoder(Red(scale), 'red', 32, mean=(0, 0, 0), std=(1, 1, 1))


def pile(n=200, every=10):
    "Pictures of many tints, from green to blue; every tenth has a red square."
    g = rng('pile')
    tint = torch.rand(n, 3, 1, 1, generator=g)*120
    images = (tint + torch.rand(n, 3, 32, 32, generator=g)*60).to(torch.uint8)
    truth, boxes = torch.zeros(n, dtype=torch.bool), torch.full((n, 4), -1)
    for i in range(0, n, every):
        y, x = torch.randint(0, 24, (2,), generator=g).tolist()
        images[i, :, y:y + 8, x:x + 8] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
        truth[i], boxes[i] = True, torch.tensor([y, x, 8, 8])
    return ArrayCorpus(images), truth, boxes


def run_of(corpus, net, **options):
    run = PatchSearchRun(PatchSearch(**dict(clusters=4, tests=64) | options), corpus, net, Scan(quiet=True), cpu)
    run.prepare()
    return run


@pytest.mark.parametrize('as_released', [False, True])
def test_a_planted_trigger_is_found(as_released):
    corpus, truth, boxes = pile()
    found = PatchSearch(clusters=6, tests=60, filter=quick, as_released=as_released).scan(corpus, encoder(), quiet=True)
    assert found.verdict == FOUND and truth[found.top(1)].all()
    assert not found.searched.all() and found.evidence['forwards']['search'] == 61*int(found.searched.sum())
    quality = found.filter_quality(truth)
    assert quality['recall'] > .8


def test_something_is_always_found():
    "As published: the best of nothing is still the best. This is why PoisonCAM asks for evidence."
    corpus, truth, _ = pile()
    found = PatchSearch(clusters=6, tests=60, filter=quick).scan(corpus.subset(~truth.numpy()), encoder(), quiet=True)
    assert found.verdict == FOUND


def test_an_empty_paste_moves_nobody_unless_as_released():
    corpus, net = pile()[0], encoder(scale=30.)
    moved = {}
    for released in (False, True):
        run = run_of(corpus, net, clusters=12, tests=200, as_released=released)
        with torch.no_grad(): moved[released] = float((run.assign(net(run.tests)) != run.test_own).float().mean())
    assert moved[False] == 0 and moved[True] > 0


def test_as_released_counts_can_fall_below_zero_and_ours_cannot():
    corpus, net = pile()[0], encoder(scale=30.)
    rows = torch.arange(1, 60)
    crops = corpus.images[rows][:, :, :9, :9]
    with torch.no_grad():
        ours = run_of(corpus, net, clusters=12, tests=200).moved(rows, crops, 0, 200)
        theirs = run_of(corpus, net, clusters=12, tests=200, as_released=True).moved(rows, crops, 0, 200)
    assert (ours >= 0).all() and (theirs < 0).any()


def test_ties_are_broken_by_the_seed_unless_as_released():
    run = run_of(pile()[0], encoder())
    score = torch.full((200,), float('nan'))
    score[7], score[3] = .5, .25
    ours = run.ranking(score)
    assert ours[:2].tolist() == [7, 3] and ours[2:].tolist() != sorted(ours[2:].tolist()) and torch.equal(ours, run.ranking(score))
    released = run_of(pile()[0], encoder(), as_released=True).ranking(score)
    assert released[:2].tolist() == [7, 3] and sorted(released.tolist()) == list(range(200)) and released[2] != 0


def test_the_map_of_a_transformer_explains_the_cluster():
    "As released it explains the largest raw feature: another map, whatever the clusters are."
    vit = create_encoder('vit_tiny/8', image_size=32).eval()
    corpus = ArrayCorpus(torch.randint(0, 256, (60, 3, 32, 32), generator=rng('vit'), dtype=torch.uint8))
    ours, theirs = (run_of(corpus, vit, as_released=r) for r in (False, True))
    z = torch.randn(5, vit.dim, generator=rng('z'))
    assert theirs.target(z).equal(z.max(1).values) and (ours.target(z).abs() <= 1.0001).all()
    rows = torch.arange(4)
    heat = grad_cam(vit, corpus.images[rows], ours.target)
    assert heat.shape == (4, 32, 32) and heat.min() >= 0 and heat.max() <= 1
    theirs.centroids = ours.centroids
    assert not torch.allclose(heat, grad_cam(vit, corpus.images[rows], theirs.target), atol=1e-3)
    for cell in heat.unfold(1, 8, 8).unfold(2, 8, 8)[0, 1:3, 1:3].flatten(0, 1): assert cell.std() < .5      # a 4 x 4 grid, smoothed
    found = ours.locate(rows)
    assert found.window.shape == (4, 4) and found.heat.shape == (4, 32, 32) and found.forwards.tolist() == [1]*4


def test_the_layer_can_be_named():
    net = create_encoder('resnet10', 8, 32)
    assert target_layer(net, 'layer2') is net.net.layer2
    with pytest.raises(BdnbError, match="no layer 'layr2'; did you mean"): target_layer(net, 'layr2')
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())         # one cell is no map
    assert target_layer(Encoder(pooled, 'pooled', 32, dim=4)) is pooled[0]
    flat = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), 'flat', 32, dim=4)
    with pytest.raises(BdnbError, match='no layer gives a map'): target_layer(flat)


def test_a_killed_scan_goes_on(tmp_path):
    corpus, net, how = pile()[0], encoder(), PatchSearch(clusters=6, tests=60, filter=quick)
    whole = how.scan(corpus, net, quiet=True)

    def dying(pieces, work, done):
        if len(pieces[0]) < 100: raise KeyboardInterrupt                 # the search's pieces are small, the features' are not
        return [work(p) for p in pieces]
    with pytest.raises(KeyboardInterrupt): how.scan(corpus, net, out=tmp_path, quiet=True, share=dying)
    assert list(tmp_path.glob('features*'))
    again = how.scan(corpus, net, out=tmp_path, quiet=True)
    assert again.rows() == whole.rows() and again.evidence['forwards'] == whole.evidence['forwards']


@pytest.mark.parametrize('option', [dict(window=0.), dict(tests=0), dict(prune=2.)])
def test_bad_options(option):
    with pytest.raises(BdnbError, match=f'patchsearch: {next(iter(option))}='): PatchSearch(**option)


@pytest.mark.parametrize('as_released', [False, True])
def test_it_looks_once_and_its_findings_can_be_kept(as_released, tmp_path):
    "There is no bar to write down; and too few crops for the classifier are no reason for another number of clusters."
    corpus = pile(n=1500)[0]
    how = PatchSearch(tests=60, per_round=1, top_k=400, filter=quick, as_released=as_released)
    found = how.scan(corpus, encoder(), quiet=True)
    assert [(l['clusters'], l['bar']) for l in found.evidence['looks']] == [(15, None)] and int(found.searched.sum()) < 400
    found.save(tmp_path/'found.safetensors')
    assert load_findings(tmp_path/'found.safetensors').evidence['looks'] == found.evidence['looks']
