"""How small may a pile be? PoisonCAM's search on small piles, clean and poisoned, with two numbers of clusters.

    python bench/small_piles.py [--out results/small-piles.json] [--sizes 40,80,150,300] [--draws 5]

The encoder is the shipped victim (`nbs/tutorials/hijacked.safetensors`); every pile is drawn anew from `Wallpapers`, and of the
poisoned ones nine tenths of the target class carry the victim's own trigger. Clusters: one for 100 pictures (at least two), as
PatchSearch's published number scales, and ten (one for eight pictures, where those are fewer), the default. A row says how many
piles raised an alarm, with the window sizes of `bdnb scan`. The poison classifier is left out: it runs after an alarm only.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bdnb.core import limit_threads, stamp, write_json
from bdnb.data.wallpapers import Wallpapers
from bdnb.defenses.findings import Scan
from bdnb.defenses.poisoncam import PoisonCAM, Search
from bdnb.evaluate import measuring
from bdnb.models.encoders import load_encoder
from bdnb.ssl_study import make_ssl_study, ssl_plan


def alarm(encoder, pile, clusters):
    "(does the search see a trigger?, highest score)"
    search = Search(PoisonCAM(window=(.27, .36), clusters=clusters), pile, encoder, Scan(None, quiet=True), torch.device('cpu'))
    with measuring(encoder):
        search.prepare()
        _, _, seen, tried = search.look()
    return seen, max(l['best'] for l in tried)


def row(encoder, n, clusters, poisoned, draws):
    "One size, one number of clusters."
    study, found = make_ssl_study(), []
    for seed in range(draws):
        pile = Wallpapers(n, 32, 1000 + seed, 'small', study.classes, study.contrast)
        if poisoned: pile = ssl_plan('patch:pattern=10', study, seed).apply(pile).corpus
        found.append(alarm(encoder, pile, clusters))
    return dict(pictures=n, clusters=clusters, poisoned=poisoned, piles=draws, alarms=sum(a for a, _ in found),
                highest=[s for _, s in found])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', default='results/small-piles.json')
    p.add_argument('--sizes', default='40,80,150,300', help='pictures in a pile, with commas between')
    p.add_argument('--draws', type=int, default=5, help='piles of a size')
    o = p.parse_args()
    limit_threads(1)
    encoder, rows = load_encoder(ROOT/'nbs/tutorials/hijacked.safetensors').eval(), []
    for n in map(int, o.sizes.split(',')):
        for clusters in (max(2, n//100), min(10, n//8)):
            for poisoned in (False, True):
                rows.append(row(encoder, n, clusters, poisoned, o.draws))
                print(rows[-1], flush=True)
    write_json(o.out, dict(study=Path(o.out).stem, **stamp(), rows=rows))


if __name__ == '__main__': main()
