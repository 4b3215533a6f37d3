"""Which class is a pattern mistaken for, by a classifier that never saw poison? What no cure can undercut depends on the target.

    python bench/mistaken.py [--attack blended] [--seed 10] [--out results/mistaken-blended.json]

The recipe is that of the ShapeCaps study of classifiers, without poison. A row is a class as target: of the test pictures of all
other classes that wear the pattern, the share that is called it (`asr`, 0..1).
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bdnb.attacks.supervised import labelled, make_supervised_attack
from bdnb.classifier_study import classifier_data, learn, make_classifier_recipe
from bdnb.core import limit_threads, stamp, write_json
from bdnb.models.classifiers import evaluate_classifier


def rows(attack, seed):
    "A row for every class."
    recipe = make_classifier_recipe()
    train, _, test = classifier_data('shapes', recipe, seed)
    trigger = make_supervised_attack(attack, recipe.target, seed=seed, **recipe.attacks.get(attack, {})).trigger
    model = learn(recipe, labelled(train), seed, 'clean')
    return [dict(attack=attack, seed=seed, target=c, **evaluate_classifier(model, test, trigger, c)) for c in test.classes]


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--attack', default='blended')
    p.add_argument('--seed', type=int, default=10)
    p.add_argument('--out', default=str(ROOT/'results'/'mistaken-blended.json'))
    o = p.parse_args()
    limit_threads()
    found = rows(o.attack, o.seed)
    for r in sorted(found, key=lambda r: r['asr']): print(f"{r['target']:10} {r['asr']:6.1%}")
    write_json(o.out, dict(study='mistaken', **stamp('python bench/' + stamp()['command']), rows=found))
