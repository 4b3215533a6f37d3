"""Who finds the poison, and at what cost? PatchSearch and PoisonCAM on the same encoder and the same pictures, in one run.

    python bench/poisoncam.py [--folders runs/ssl/patch-pattern=10-seed0,...] [--out results/race-poisoncam.json]

A folder holds a victim of `bdnb tour --only poisoncam`: its name says trigger and seed, `study.json` beside it says how the
pictures are made. A victim that is not there is trained there first. Sides, all with the same window, test pictures, clusters,
seed and poison classifier, so that only the search differs:

- PatchSearch as released: Grad-CAM, its pruned search, every crop on all test pictures, with the faults of the released script
- PatchSearch, repaired
- PatchSearch, repaired, its map taken from `layer2` (where a picture of 32 px still has a map of 8 x 8 cells; the
  last layer of these encoders has 2 x 2, which handicaps every map of it)
- PoisonCAM full: masks, every picture of the set examined, every crop on all test pictures
- PoisonCAM: sequential scoring and more search where the score is high; one size of window and one number of clusters, where the
  default may look again with fewer clusters
- PoisonCAM, fast: with coarse-to-fine masks

Columns: share of *all* poisons whose window covers half of the trigger (localisation; all are localised, also those that a search
never examined, outside of the clock), the same over the poisons that it did examine, precision of the twenty best scores, recall
and precision of what is removed, forward passes, wall and CPU seconds of every stage. The attack puts its trigger near the
middle, where a window that never moves would cover half of it (`chance`): so localisation is also given for nine tenths of the
trigger, and for the same pictures with the trigger anywhere in them. `localisation` is the map's answer alone. `reported` is what
a scan would say in the end, had its search come to all of them: PoisonCAM judges the windows of suspects that proved nothing by what
they do; of poisons that the classifier clears it is the map's answer. Goals: 30 points of localisation above the
gradient's map, and a tenth of the full search's wall time at the same recall. On a busy machine read the CPU seconds.
"""
import argparse
import os
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bdnb.attacks.patches import coverage, iou
from bdnb.core import BdnbError, limit_threads, read_json, read_options, stamp, write_json
from bdnb.defenses.findings import FOUND, Scan
from bdnb.defenses.patchsearch import PatchSearch, PatchSearchRun
from bdnb.defenses.poisoncam import PoisonCAM, Search, cluster_counts
from bdnb.defenses.poisonfilter import FilterRecipe, filter_probability
from bdnb.evaluate import measuring
from bdnb.kernels.cam import assign
from bdnb.models.encoders import encode
from bdnb.probe import verdict
from bdnb.ssl_study import SslCase, make_ssl_study, ssl_data
from bdnb.study import peak_bytes

RELEASED, REPAIRED, FINE = 'patchsearch as released', 'patchsearch repaired', 'patchsearch repaired (layer2)'
FULL, OURS, FAST = 'poisoncam full', 'poisoncam', 'poisoncam fast'
SIDES = {RELEASED: (PatchSearch, dict(as_released=True)), REPAIRED: (PatchSearch, {}), FINE: (PatchSearch, dict(layer='layer2')),
         FULL: (PoisonCAM, dict(search='all', sequential=False)), OURS: (PoisonCAM, {}),
         FAST: (PoisonCAM, dict(masks='coarse'))}


def victim(folder, changes=()):
    "The case of a victim's folder."
    folder = Path(folder)
    named = re.fullmatch(r'(.+)-seed(\d+)', folder.name)
    if not named: raise BdnbError(f"{folder}: a victim's folder is named TRIGGER-seedN, for instance patch-pattern=10-seed0")
    attack, seed, note = named[1] if ':' in named[1] else named[1].replace('-', ':', 1), int(named[2]), folder.parent/'study.json'
    recipe = read_json(note)['recipe'] if note.exists() else {}
    flat = {**recipe.pop('ssl', {}), **{k: v for k, v in recipe.items() if k != 'detectors'}, **dict(changes)}
    study = make_ssl_study(**{k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()})
    opened = lru_cache(None)(lambda: ssl_data('wallpapers', study, seed))
    return SslCase(folder, attack, seed, study, opened, True)


class Stages(Scan):
    "A scan that also counts CPU seconds."
    def __init__(self):
        super().__init__(quiet=True)
        self.cpu = Counter()

    def stage(self, name, make, group=None):
        start = time.process_time()
        try: return super().stage(name, make, group)
        finally: self.cpu[group or name] += time.process_time() - start


class Split:
    "Takes the search apart: seconds, CPU seconds and passes of its localising and of its scoring."
    def __init__(self, run):
        self.spent, self.on = defaultdict(Counter), False
        search = run.run

        def watched():
            self.on = True
            try: return search()
            finally: self.on = False
        run.run, run.locate, run.moved = watched, self.timed('localise', run.locate), self.timed('score', run.moved)
        network, guilty = run.network, run.guilty
        run.network = lambda weights: self.keep('net', network(weights))
        run.guilty = lambda score: self.keep('guilty', guilty(score))
        self.kept = {}

    def keep(self, name, value):
        self.kept[name] = value
        return value

    def timed(self, name, method):
        def call(*args):
            wall, cpu = time.perf_counter(), time.process_time()
            out = method(*args)
            if self.on:
                more = dict(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)
                self.spent[name].update(more, forwards=int(out.forwards.sum()) if name == 'localise' else 0)
            return out
        return call


def stages_of(scan, split):
    "Stage -> seconds, CPU seconds and forward passes."
    of = lambda s: dict(seconds=scan.seconds[s], cpu_seconds=scan.cpu[s], forwards=scan.forwards[s])
    names = {'features': 'features', 'clusters': 'k-means', 'floor': 'floor', 'classifier': 'classifier', 'second opinion': 'windows'}
    out = {says: of(s) for s, says in names.items() if s in scan.seconds}
    search = of('search')
    out['localise'] = {k: split.spent['localise'][k] for k in search}
    out['score'] = {k: search[k] - split.spent['localise'][k] for k in search}
    return {k: {n: round(v, 3) for n, v in s.items()} for k, s in out.items()}


def hits(windows, boxes):
    "Shares of windows on their triggers."
    covered = coverage(windows, boxes)
    mean = lambda v: float(v.float().mean())
    return dict(localisation=mean(covered >= .5), iou=mean(iou(windows, boxes)), **{'localisation@.9': mean(covered >= .9)})


def reported(run, rows, kept):
    "Windows of poisons as a scan would report them, had its search come to all of them."
    window, how = torch.cat([run.locate(p).window.cpu() for p in rows.split(16)]), run.how
    if not kept or not isinstance(how, PoisonCAM): return window                           # PatchSearch reports its map's answer
    run.how = replace(how, sequential=True, confirm=128)                                   # is the bar reached? no more is asked
    score = torch.cat([run.examine(p)['score'] for p in rows.split(16)])
    run.how = how
    p = filter_probability(kept['net'], run.pictures.gather(rows), run.encoder.normalise, run.device)
    for i in ((p > run.recipe.threshold) & (score < run.bar)).nonzero()[:, 0].split(16):
        if len(i): window[i] = run.judge(kept['net'], rows[i], kept['guilty'])['window']
    return window


def localised(run, case, truth, kept):
    "Of all poisons, and of the same pictures with the trigger anywhere; and what a window in the middle would get."
    rows, at, w = torch.as_tensor(truth.mask).nonzero()[:, 0], (run.encoder.image_size - run.w)//2, run.w
    middle, out, chance = torch.tensor([at, at, w, w]).expand(len(rows), 4), {}, {}
    locate = lambda: torch.cat([run.locate(p).window.cpu() for p in rows.split(16)])
    def note(boxes, end=''):
        out.update({k + end: v for k, v in hits(locate(), boxes).items()})
        chance.update({k + end: v for k, v in hits(middle, boxes).items()})
        out['reported' + end] = hits(reported(run, rows, kept), boxes)['localisation']
    note(truth.boxes[rows])
    if hasattr(case.plan.trigger, 'place'):
        other = replace(case.plan, trigger=replace(case.plan.trigger, place='random')).apply(case.data()[0])
        run.pictures = other.corpus.cache(run.encoder.image_size)
        own, base = assign(encode(run.encoder, run.pictures.gather(rows)), run.centroids.cpu())
        run.own, run.base = run.own.clone(), run.base.clone()
        run.own[rows], run.base[rows] = own, base.float()
        note(other.boxes[rows], ', anywhere')
    return out, chance


def measure(case, system, detector):
    "One side on one victim: a row."
    truth, encoder, scan = case.poisoned(), case.victim()[0], Stages()
    pictures = truth.corpus.cache(encoder.image_size)
    kind = PatchSearchRun if isinstance(detector, PatchSearch) else Search
    device = next(encoder.parameters()).device
    with measuring(encoder):
        encoder(pictures.gather(torch.arange(min(256, len(pictures)))))          # nobody pays for the first pass
        wall, cpu = time.perf_counter(), time.process_time()
        run = kind(detector, pictures, encoder, scan, device)
        split = Split(run)
        found = run.findings()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        places, chance = localised(run, case, truth, split.kept)
    where, quality = found.localisation(truth.boxes), found.filter_quality(truth.mask)
    after = dict(**places, localisation_examined=where['localisation'], recall=quality['recall'], precision=quality['precision'],
                 found=float(found.verdict == FOUND), **{'precision@20': found.precision_at(20, truth.mask)})
    counts = dict(examined=int(found.searched.sum()), examined_poisons=where['examined'], removed=quality['removed'],
                  forwards=sum(found.evidence['forwards'].values()))
    return dict(system=system, **about(case), after={k: v for k, v in after.items() if v == v}, chance=chance, **counts,
                seconds=round(wall, 3), cpu_seconds=round(cpu, 3), stages=stages_of(scan, split), peak_bytes=peak_bytes())


SEEN = {}

def before(case):
    "The victim as the probe sees it, measured once."
    note = case.folder/'row-none.json'
    if case.folder not in SEEN:
        SEEN[case.folder] = read_json(note)['before'] if note.exists() else case.measure(case.victim()[0])
    return SEEN[case.folder]


def about(case):
    "What a row says of its victim."
    shares, seen = case.plan.choose(case.data()[0])[1], before(case)
    return dict(data='wallpapers', attack=case.attack, model=f'{case.study.ssl.method} {case.study.ssl.encoder}', seed=case.seed,
                rate=shares['share_of_set'], class_rate=shares['share_of_target'], verdict=verdict(seen), before=seen)


def compared(rows):
    "Race rows of one victim."
    by, out = {r['system']: r for r in rows}, []
    same = lambda r: dict(attack=r['attack'], seed=r['seed'], size=f"{r['attack']}, seed {r['seed']}")
    def race(what, ours, peer, value, unit, goal, ratio, **more):
        if ours not in by or peer not in by: return
        a, b = value(by[ours]), value(by[peer])
        if a != a or b != b: return
        out.append(dict(what=what, **same(by[ours]), ours=ours, peer=peer, ours_value=a, peer_value=b, unit=unit,
                        ratio=ratio(a, b), goal=goal, **more))
    for ours in (OURS, FAST):
        for peer in (RELEASED, REPAIRED, FINE):
            for key in ('localisation', 'localisation@.9', 'localisation, anywhere', 'reported', 'reported, anywhere'):
                share = lambda r: 100*r['after'].get(key, float('nan'))
                race(f'{key}, of all poisons', ours, peer, share, '%', '30 points', lambda a, b: a/b if b else None)
        recall = {f'{k}_recall': by[s]['after']['recall'] for k, s in (('ours', ours), ('peer', FULL)) if s in by}
        for key, clock in (('seconds', 'wall'), ('cpu_seconds', 'CPU')):
            race(f'whole scan, {clock} time', ours, FULL, lambda r: r[key], 's', '10 times', lambda a, b: b/a, **recall)
    return out


def line(r):
    a, s = r['after'], r['stages']
    share = lambda k: f"{100*a[k]:5.1f}" if k in a else '    –'
    spent = ' '.join(f"{k} {v['cpu_seconds']:.1f}" for k, v in s.items())
    return (f"{r['system']:31} found {share('localisation')}  anywhere {share('localisation, anywhere')}  reported {share('reported')}, {share('reported, anywhere')}  @20 "
            f"{share('precision@20')}  recall {share('recall')}  precision {share('precision')}  examined {r['examined']:5} "
            f"({r['examined_poisons']} poisons)  forwards {r['forwards']:9,}  wall {r['seconds']:.1f} s, "
            f"CPU {r['cpu_seconds']:.1f} s: {spent}")


def victims_arguments(about):
    "What every script over victims asks for."
    p = argparse.ArgumentParser(description=about)
    p.add_argument('--folders', default='runs/ssl/patch-pattern=10-seed0', help='victims, with commas between')
    p.add_argument('--recipe', default='', help='what the folders do not say of their making: class_rate=.5,epochs=45')
    p.add_argument('--threads', type=int, default=1)
    return p


def arguments(about):
    p = victims_arguments(about)
    p.add_argument('--steps', type=int, default=FilterRecipe.quick().steps, help='of the poison classifier, at most')
    return p


def chosen(p, text, known, what):
    "The names in `text`; a complaint of the parser `p` for one that is not known."
    names = [s.strip() for s in text.split(',')]
    for s in names:
        if s not in known: p.error(f"no {what} '{s}'; there are {', '.join(known)}")
    return names


def victims(o):
    "The cases of all folders, each announced."
    for folder in o.folders.split(','):
        case = victim(folder, read_options(o.recipe, '--recipe'))
        print(f'{case.attack}, seed {case.seed}', file=sys.stderr)
        yield case


def finish(o, rows, **more):
    "Write the file."
    words = [re.sub(r'/[^,]*/(?=[^/,]+/[^/,]+)', '', w) for w in sys.argv[1:]]              # folders without what is above them
    script = Path(sys.argv[0]).name
    write_json(o.out, dict(study=Path(o.out).stem, **stamp(shlex.join(['python', f'bench/{script}', *words])), rows=rows,
                           threads=o.threads, load=[round(v, 2) for v in os.getloadavg()], **more))


def main():
    p = arguments(__doc__.splitlines()[0])
    p.add_argument('--window', type=float, default=.34, help="share of the picture's side, of every side of the race")
    p.add_argument('--tests', type=int, default=1000, help='test pictures of every side')
    p.add_argument('--clusters', type=int, help='of every side')
    p.add_argument('--sides', default=','.join(SIDES), help='which, with commas between')
    p.add_argument('--out', default='results/race-poisoncam.json')
    o = p.parse_args()
    limit_threads(o.threads)
    sides, rows, races = chosen(p, o.sides, SIDES, 'side'), [], []
    for case in victims(o):
        mine, clusters = [], o.clusters or cluster_counts(len(case.data()[0]))[0]      # one number: no second look for any side
        for s in sides:
            kind, options = SIDES[s]
            same = dict(window=o.window, tests=o.tests, clusters=clusters, seed=case.seed,
                        filter=FilterRecipe.quick(steps=o.steps))
            mine.append(measure(case, s, kind(**same, **options)))
            print(line(mine[-1]), file=sys.stderr, flush=True)
        rows, races = rows + mine, races + compared(mine)
        finish(o, rows + races, tests=o.tests, window=o.window, clusters=clusters)
    said = '{what}, {size}: {ours} {ours_value:.1f} {unit}, {peer} {peer_value:.1f} {unit}'
    for r in races: print(said.format(**r), file=sys.stderr)


if __name__ == '__main__': main()
