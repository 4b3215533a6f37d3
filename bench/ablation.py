"""What do PoisonCAM's choices matter? Masks, window, stride and number of clusters, one varied at a time, on finished victims.

    python bench/ablation.py [--folders runs/ssl/patch-pattern=10-seed0,...] [--out results/ablation-poisoncam.json]

Folders as for `bench/poisoncam.py`. Of every scan: the share of all poisons whose window covers half of the trigger, precision
of the twenty best scores, recall and precision of what is removed, forward passes, seconds. Scores count on `--tests` pictures,
fewer than by default, so that a victim takes under twelve minutes of one core. It is drawn by
`nbs/results/02_poisoncam_ablation.ipynb`.
"""
import sys

from poisoncam import arguments, chosen, finish, line, measure, victims

from bdnb.core import limit_threads
from bdnb.defenses.poisoncam import PoisonCAM
from bdnb.defenses.poisonfilter import FilterRecipe

AXES = dict(masks=('full', 'grid', 'random', 'interval', 'coarse'), window=(.2, .27, .34, .41, .5), stride=(.25, .5, 1.),
            clusters=(5, 10, 20, 40, 80), soft=(True, False), alone=(True, False))
DEFAULT = dict(masks='full', window=.34, stride=.5, clusters=20, soft=True, alone=True)


def settings():
    "Every setting once: the default, and those that differ from it in one place."
    yield DEFAULT
    for axis, values in AXES.items():
        yield from (DEFAULT | {axis: v} for v in values if v != DEFAULT[axis])


def main():
    p = arguments(__doc__.splitlines()[0])
    p.add_argument('--tests', type=int, default=300, help='test pictures of a score')
    p.add_argument('--axes', default=','.join(AXES), help='which, with commas between')
    p.add_argument('--out', default='results/ablation-poisoncam.json')
    o = p.parse_args()
    limit_threads(o.threads)
    axes, rows, filter = chosen(p, o.axes, AXES, 'axis'), [], FilterRecipe.quick(steps=o.steps)
    for case in victims(o):
        for s in settings():
            differs = [k for k in s if s[k] != DEFAULT[k]]
            if differs and differs[0] not in axes: continue
            row = measure(case, 'poisoncam', PoisonCAM(**s, tests=o.tests, seed=case.seed, filter=filter))
            rows.append(row | dict(setting=s))
            print(' '.join(f'{k}={s[k]}' for k in differs) or 'default', line(row), sep='\n  ', file=sys.stderr, flush=True)
            finish(o, rows, tests=o.tests, default=DEFAULT, axes={a: list(AXES[a]) for a in axes})


if __name__ == '__main__': main()
