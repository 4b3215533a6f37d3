"""What does BCU cost? Against the training of its victim, and against a loop written as the official recipe has it.

    python bench/bcu.py [--out results/race-bcu.json] [--races plain crops study last last_crops victim]

Races on ShapeCaps with a slim ResNet-18, each over the same number of epochs:

- `BCU.cleanse`, in float32 (plain, crops), as the study runs it (study) and with the channels last, as `bdnb cleanse` does (last,
  last_crops), against the official recipe's loop (`defense/ft/distillation_dropout_increase.py`, described, not copied): PIL
  pictures transformed one by one in a `DataLoader` without workers, the teacher asked anew at every step, and after every epoch two
  test passes, clean and triggered, with gradients being recorded. The test sets are to the pool what CIFAR-10's are to its 5,000
  pictures: twice as many clean ones, 1.8 times as many triggered ones. Our side is charged for one evaluation at its end. Goal: 3.
- `BCU.cleanse`, with its automatic scale's probes, against the training of its victim by the recipe of the study.

The clock counts CPU seconds of one thread, so a busy machine does not matter; blocks alternate, and the median counts.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, Resize, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bdnb.attacks.triggers import make_trigger
from bdnb.classifier_study import make_classifier_recipe
from bdnb.core import limit_threads, stamp, write_json
from bdnb.data.batches import Batches
from bdnb.data.corpus import ArrayCorpus
from bdnb.data.shapes import ShapeCaps
from bdnb.defenses.bcu import BCU
from bdnb.evaluate import trigger_seeds
from bdnb.models.classifiers import create_classifier, evaluate_classifier
from bdnb.objectives.classify import CrossEntropyObjective
from bdnb.train import fit, settled_precision

now = time.process_time


class Pictures(torch.utils.data.Dataset):
    "PIL pictures with labels, transformed one by one."
    def __init__(self, images, labels, transform):
        self.items, self.transform = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images], transform
        self.labels = labels
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.transform(self.items[i]), int(self.labels[i])


def transforms(model, train, augmented):
    more = [RandomCrop(32, padding=4), RandomHorizontalFlip()] if train and augmented else []
    return Compose([Resize((32, 32)), *more, ToTensor(), Normalize(model.mean.tolist(), model.std.tolist())])


def official(model, pool, test, trigger, o):
    "Seconds of the official recipe's loop; every evaluation records gradients, as there."
    defense, teacher, student = BCU(scale=4.), copy.deepcopy(model.net).eval(), copy.deepcopy(model)
    defense.reset(student)
    net, size = student.net, o.batch
    loader = lambda images, labels, train: torch.utils.data.DataLoader(
        Pictures(images, labels, transforms(model, train, o.augment)), size, shuffle=train, num_workers=0)
    others = test.labels != 0
    stamped = trigger.on_uint8(test.images, trigger_seeds(test.keys))[others][:int(1.8*len(pool))]
    sets = [loader(test.images, test.labels, False), loader(stamped, [0]*len(stamped), False)]
    data, opt = loader(pool.images, [0]*len(pool), True), torch.optim.SGD(net.parameters(), .01, .9, weight_decay=5e-4)
    plan, start, seen = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100), now(), []
    for epoch in range(o.epochs):
        T = 1 + 3/o.epochs*(epoch + 1)
        net.train()
        for x, _ in data:
            with torch.no_grad(): says = teacher(x)
            loss = F.kl_div((net(x)/T).log_softmax(1), (says/T).softmax(1), reduction='batchmean')
            opt.zero_grad()
            loss.backward()
            opt.step()
        net.eval()
        for part in sets:
            hits = sum(int((net(x).argmax(1) == y).sum()) for x, y in part)
            seen.append(hits/len(part.dataset))
        plan.step()
    return now() - start, len(stamped)


def ours(model, pool, test, trigger, o):
    "Seconds of `BCU.cleanse` and one evaluation."
    model, start = copy.deepcopy(model), now()
    cure = BCU(scale=4., epochs=o.epochs, batch_size=o.batch, crop_flip=o.augment, precision=o.precision, channels_last=o.last)
    cure.cleanse(model, pool, quiet=True, device='cpu')
    evaluate_classifier(model.eval(), test, trigger, test.classes[0])
    return now() - start


def race_loop(o, augment, precision='no', last=False):
    "Our loop against the official recipe's."
    o.augment, o.last, o.precision = augment, last, settled_precision(precision, 'cpu')
    model, trigger = create_classifier('resnet18', 12, width=o.width), make_trigger('badnet:size=3')
    pool, test = ShapeCaps(o.n, split='clean'), ShapeCaps(2*o.n, split='test')
    pool = ArrayCorpus(pool.images, pool.keys, name='pool')
    mine, theirs = [], []
    for _ in range(o.blocks):
        mine.append(ours(model, pool, test, trigger, o))
        seconds, stamped = official(model, pool, test, trigger, o)
        theirs.append(seconds)
        print(f'ours {mine[-1]:.1f} s, official {seconds:.1f} s', file=sys.stderr, flush=True)
    a, b = statistics.median(mine), statistics.median(theirs)
    size = (f'ResNet-18 of width {o.width}, {o.n} pictures, {o.epochs} epochs, batch {o.batch}, {len(test)} clean and {stamped} '
            f"triggered test pictures, {'crop and flip' if augment else 'no augmentation'}, ours in "
            f"{'float32' if o.precision == 'no' else o.precision}{', channels last' if last else ''}")
    return dict(what='BCU loop', size=size, ours='bdnb BCU.cleanse and one evaluation', peer="the official recipe's loop",
                ours_value=a, peer_value=b, unit='CPU-s', ratio=b/a, goal=3.)


def race_victim(o):
    "BCU with the study's settings against its victim's training, both at a tenth of the pictures."
    recipe = make_classifier_recipe('shapes')
    train, pool = ShapeCaps(recipe.n//10, split='train'), ShapeCaps(recipe.pool_n//10, split='clean')
    mine, theirs = [], []
    for _ in range(o.blocks):
        model, start = create_classifier(recipe.arch, 12, width=recipe.width), now()
        fit(model, CrossEntropyObjective(), Batches(train, recipe.batch_size), epochs=recipe.epochs, quiet=True, device='cpu',
            lr=recipe.lr, precision=recipe.precision)
        theirs.append(now() - start)
        start = now()
        recipe.defense('bcu').cleanse(model, pool, quiet=True, device='cpu')
        mine.append(now() - start)
    a, b = statistics.median(mine), statistics.median(theirs)
    size = (f'{recipe.arch} of width {recipe.width}: victim on {len(train)} pictures for {recipe.epochs:g} epochs, BCU on {len(pool)} for '
            f'{recipe.defense("bcu").epochs:g} epochs and its probes (the study: ten times as many pictures on both sides)')
    return dict(what='cost of a cure', size=size, ours='BCU with the automatic scale', peer="the victim's training",
                ours_value=a, peer_value=b, unit='CPU-s', ratio=b/a)


RACES = dict(plain=lambda o: race_loop(o, False), crops=lambda o: race_loop(o, True), study=lambda o: race_loop(o, False, 'auto'),
             last=lambda o: race_loop(o, False, last=True), last_crops=lambda o: race_loop(o, True, last=True), victim=race_victim)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', default='results/race-bcu.json')
    p.add_argument('--n', type=int, default=500, help='pictures in the pool')
    p.add_argument('--epochs', type=int, default=4)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--width', type=int, default=16)
    p.add_argument('--blocks', type=int, default=3)
    p.add_argument('--races', nargs='+', choices=RACES, default=list(RACES), help='which of them to run')
    o = p.parse_args()
    limit_threads(1)
    rows = [RACES[name](o) for name in o.races]
    for r in rows: print(f"{r['what']}: {r['ours_value']:.1f} against {r['peer_value']:.1f} CPU-s of {r['peer']}: {r['ratio']:.2f} times")
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    write_json(o.out, dict(study=Path(o.out).stem, **stamp(' '.join(['python bench/bcu.py', *words])), rows=rows, clock='cpu', threads=1,
                           blocks=o.blocks))


if __name__ == '__main__': main()
