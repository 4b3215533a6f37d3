"""Does the scan keep quiet on clean pictures? PoisonCAM on clean piles and the encoders trained on them.

    python bench/false_alarms.py [--out results/alarms-poisoncam.json] runs/ssl/clean-seed20 runs/ssl/clean-seed20+again ...

A folder is the clean reference of `bdnb tour --only poisoncam`; `study.json` beside it says how its pictures are made. Every pile is
scanned twice: with one window of .34, and with the sizes that `bdnb scan` tries. For each: the verdict, how many pictures would be
removed, and of every look (size of window, number of clusters) the highest score and how many pictures reach its bar.
"""
import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bdnb.core import limit_threads, read_json, stamp, write_json
from bdnb.defenses.findings import FOUND
from bdnb.defenses.poisoncam import WINDOWS
from bdnb.models.encoders import load_encoder
from bdnb.ssl_study import make_detector, make_ssl_study, ssl_data


SIZES = {'one': dict(window=.34), 'bdnb scan': dict(window=WINDOWS)}


def scanned(folder, sizes):
    "A row."
    recipe = read_json(folder.parent/'study.json')['recipe']
    detectors = recipe.pop('detectors')
    given = recipe.pop('ssl') | recipe
    study = make_ssl_study(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    seed = int(re.search(r'seed(\d+)(\+again)?$', folder.name)[1])
    pile = ssl_data('wallpapers', study, seed)[0]
    encoder = load_encoder(folder/'encoder.safetensors').eval()
    found = make_detector('poisoncam', seed=seed, **detectors['poisoncam'] | SIZES[sizes]).scan(pile, encoder, quiet=True)
    return dict(system='poisoncam', data='wallpapers', attack='none', encoder=folder.name, seed=seed, sizes=sizes,
                alarm=found.verdict == FOUND, looks=found.evidence['looks'], removed=float((~found.keep).float().mean()))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folders', nargs='+', type=Path)
    p.add_argument('--out', default='results/alarms-poisoncam.json')
    o = p.parse_args()
    limit_threads(1)
    rows = [scanned(f, sizes) for sizes in SIZES for f in o.folders]
    for r in rows: print(r)
    command = ' '.join(['python bench/false_alarms.py', *map(str, o.folders)])
    write_json(o.out, dict(study=Path(o.out).stem, **stamp(command), rows=rows))


if __name__ == '__main__': main()
