"""Does BCU cleanse encoders that learned a patch without labels? Before, and after each kind of distillation.

    python bench/bcu_encoders.py [--folders runs/ssl/patch-pattern=10-seed0,...] [--out results/bcu-encoders.json]

Folders are those of `bench/poisoncam.py`: victims of `bdnb tour --only victims`; one that is not there is trained there
first. The pool: fresh clean pictures of the same corpus, without labels. Columns: the linear probe's clean accuracy, its accuracy
under the trigger and its attack success rate, before and after; the scale that was picked from the agreement of neighbours, that
agreement, and seconds. `distillation alone` is the control: nothing is reset.
"""
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from poisoncam import about, finish, victims, victims_arguments
from bdnb.core import limit_threads
from bdnb.data.wallpapers import Wallpapers
from bdnb.defenses.bcu_encoders import bcu_for

SYSTEMS = {'distillation alone': dict(scale=0.), **{k: dict(kind=k) for k in ('cosine', 'relational', 'softmax')}}


def cured(case, system, pool):
    "A row."
    encoder = copy.deepcopy(case.victim()[0])
    found = bcu_for(encoder, seed=case.seed, held_out=.1, **SYSTEMS[system]).cleanse(encoder, pool, quiet=True)
    return dict(about(case), system=system, after=case.measure(encoder.eval()), scale=found.scale, agreement=found.agreement,
                probes=found.probes, seconds=round(found.seconds, 1), pictures=len(pool))


def main():
    p = victims_arguments(__doc__.splitlines()[0])
    p.add_argument('--pool-n', type=int, default=1500, help='clean pictures')
    p.add_argument('--out', default='results/bcu-encoders.json')
    o = p.parse_args()
    limit_threads(o.threads)
    rows = []
    for case in victims(o):
        s = case.study
        pool = Wallpapers(o.pool_n, s.ssl.image_size, case.seed, 'clean', s.classes, s.contrast)
        for system in SYSTEMS:
            rows.append(r := cured(case, system, pool))
            say = lambda m: f"CA {m['ca']:.1%}, patched {m['pa']:.1%}, ASR {m['asr']:.1%}"
            told = f"{system}: {say(r['before'])} -> {say(r['after'])}; scale {r['scale']:g}, {r['seconds']:.0f} s"
            print(told, file=sys.stderr, flush=True)
        finish(o, rows)


if __name__ == '__main__': main()
