"""What is the second opinion about suspects worth? PoisonCAM's windows and filter before and after it, in the same scan.

    python bench/suspects.py [--folders runs/ssl/patch-pattern=10-seed0,...] [--out results/suspects-poisoncam.json]

Folders are those of `bench/poisoncam.py`: victims of `bdnb tour --only victims`; one that is not there is trained there first.
Each victim scans two piles: the one that it was trained on, whose triggers lie near the middle, and the same pictures with the
trigger anywhere. Before: windows by the encoder's masks, and every picture that the poison classifier suspects. After: what the
scan reports, with windows judged by what they do, and with acquittals.

Columns: localisation (share of windows that cover half of the trigger) of the examined poisons and of those that the classifier
suspects, the same poisons before and after; recall and precision of what is removed; precision of the twenty best scores, whom the
second opinion does not touch; passes of the encoder (not of the classifier), and seconds of the second opinion and of the scan.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from poisoncam import about, finish, hits, victims, victims_arguments
from bdnb.core import limit_threads
from bdnb.defenses.findings import FOUND, Scan
from bdnb.defenses.poisoncam import PoisonCAM, Search
from bdnb.evaluate import measuring


class Watched(Search):
    "A search that remembers what the second opinion was asked about."
    asked, extra = None, 0.

    def suspects(self, net, score, window, cleared):
        rows, self.asked, start = (~cleared & (window[:, 0] < 0)).nonzero()[:, 0], (window.clone(), cleared), time.perf_counter()
        for r in rows.split(16) if len(rows) else (): self.asked[0][r] = self.locate(r).window.cpu()
        self.extra = time.perf_counter() - start                                          # a scan does not do this
        return super().suspects(net, score, window, cleared)


def quality(found, truth, suspected):
    "Where the windows lie, also those of the poisons among `suspected`, and how good the removal is."
    m, removed = torch.as_tensor(truth.mask), ~found.keep
    named, q = m & suspected, found.filter_quality(truth.mask)
    where = found.localisation(truth.boxes)['localisation'] if (m & found.searched).any() else None
    on = hits(found.window[named], truth.boxes[named])['localisation'] if named.any() else None
    return dict(localisation=where, localisation_suspects=on, recall=q['recall'],
                precision=q['precision'] if removed.any() else None, removed=q['removed'])


def measure(case, plan, place, detector):
    "One victim, one pile: a row."
    truth, encoder, scan = plan.apply(case.data()[0]), case.victim()[0], Scan(quiet=True)
    device = next(encoder.parameters()).device
    with measuring(encoder):
        start = time.perf_counter()
        run = Watched(detector, truth.corpus.cache(encoder.image_size), encoder, scan, device)
        found = run.findings()
        seconds = time.perf_counter() - start
    row = dict(system='poisoncam', **about(case), place=place, verdict_of_scan=found.verdict, looks=found.evidence['looks'],
               acquitted=found.evidence['acquitted'], **{'precision@20': found.precision_at(20, truth.mask)},
               forwards=dict(scan.forwards), seconds=round(seconds - run.extra, 1),
               second_opinion_seconds=round(scan.seconds['second opinion'] - run.extra, 1))
    if found.verdict != FOUND: return row
    window, keep = run.asked
    return row | dict(first=quality(replace(found, window=window, keep=keep), truth, ~keep), after=quality(found, truth, ~keep))


def line(r):
    say = lambda q: ', '.join(f'{k} {100*v:.1f}' for k, v in q.items() if k != 'removed' and v is not None)
    both = f"first {say(r['first'])}; after {say(r['after'])}" if 'first' in r else ''
    return f"{r['attack']}, seed {r['seed']}, {r['place']}: {r['verdict_of_scan']}; {both}"


def main():
    p = victims_arguments(__doc__.splitlines()[0])
    p.add_argument('--window', default='.34', help="share of the picture's side; several, with commas between, are tried in order")
    p.add_argument('--places', default='near the middle,anywhere', help='of the trigger')
    p.add_argument('--out', default='results/suspects-poisoncam.json')
    o = p.parse_args()
    limit_threads(o.threads)
    rows = []
    for case in victims(o):
        piles, window = {'near the middle': case.plan}, tuple(float(w) for w in o.window.split(','))
        if hasattr(case.plan.trigger, 'place'):
            piles['anywhere'] = replace(case.plan, trigger=replace(case.plan.trigger, place='random'))
        for place in [p for p in piles if p in o.places.split(',')]:
            rows.append(measure(case, piles[place], place, PoisonCAM(window=window, seed=case.seed)))
            print(line(rows[-1]), file=sys.stderr, flush=True)
        finish(o, rows, window=window)


if __name__ == '__main__': main()
