"""How fast is `fit`? Steps a second against a loop written by hand, and against the data path of the official CleanCLIP code.

    python bench/fit.py [--flickr 'PATTERN OF SHARDS'] [--out results/race-fit.json]

Two races, each with the same model, objective and optimiser on both sides:

- `fit` against a plain PyTorch loop over the same batches: what the checks, the log and Accelerate cost. Goal: a ratio of .97.
- With `--flickr`: our data path (decode once to bytes, AutoAugment by the batch, captions cropped to the longest) against the
  official one (`src/data.py`: a JPEG file opened and decoded once for each view, AutoAugment and resize per picture by PIL,
  captions of 77 places, a `DataLoader` with and without workers). Goal: 1.5. Our decoding is charged to us, spread over the ten
  epochs of the recipe. Both sides have their captions tokenised and augmented beforehand.

Blocks of steps alternate between the two sides; a side's speed is the median over its blocks. The clock is the wall's: run it on
a quiet machine (under four minutes on two cores), or with `--cpu --threads 1 --workers 0` on a busy one, to count CPU seconds.
"""
import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import AutoAugment, CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bdnb.core import derive_seed, limit_threads, stamp, write_json
from bdnb.data.batches import Batches
from bdnb.data.corpus import CsvCorpus
from bdnb.data.doors import open_corpus
from bdnb.data.shapes import ShapeCaps
from bdnb.data.text import TextView
from bdnb.models.build import ClipModel, default_tokenizer
from bdnb.models.tiny import tiny_clip
from bdnb.objectives.contrastive import CleanClipObjective, clip_loss, inmodal_loss
from bdnb.train import fit, make_optimizer

VIEW = TextView(backend='packaged')
LR, EPOCHS, SKIP = 1e-4, 10, 3        # learning rate; epochs of the recipe; steps of a block that are not timed
now = time.perf_counter               # `--cpu`: time.process_time


class Timed:
    "An objective that notes when it is called: a step is from one call to the next."
    def __init__(self, inner): self.inner, self.at = inner, []
    def __call__(self, model, batch):
        self.at.append(now())
        return self.inner(model, batch)
    def per_step(self): return (self.at[-1] - self.at[SKIP])/(len(self.at) - 1 - SKIP)


def ours(model, batches, steps):
    "Seconds a step of `fit`."
    objective = Timed(CleanClipObjective(text_view=VIEW))
    fit(model, objective, batches, steps=steps, lr=LR, schedule='constant', device='cpu', quiet=True)
    return objective.per_step()


def by_hand(model, batches, steps):
    "Seconds a step of the loop that one would write without `fit`."
    objective, done = Timed(CleanClipObjective(text_view=VIEW)), 0
    opt = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=.1, fused=True)
    model.train()
    while done < steps:
        for batch in batches.epoch(done//len(batches)):
            loss = sum(objective(model, batch).values())
            opt.zero_grad()
            loss.backward()
            opt.step()
            done += 1
            if done == steps: break
    return objective.per_step()


class OfficialPairs(torch.utils.data.Dataset):
    "The official data set in memory-lean form: files on disk, all captions and their views as int64 [N, 77]."
    def __init__(self, corpus, folder, size):
        self.files = [folder/k for k in corpus.keys]
        tokens = default_tokenizer()
        texts = corpus.texts, VIEW(corpus.texts, corpus.keys)
        self.captions, self.views = (tokens.raw(list(t), context_length=77) for t in texts)
        mean, std = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
        self.transform = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), lambda x: x.convert('RGB'),
                                  ToTensor(), Normalize(mean, std)])
        self.augment = AutoAugment()
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        clean, view = self.transform(Image.open(self.files[i])), self.transform(self.augment(Image.open(self.files[i])))
        return clean, view, self.captions[i], self.views[i]


def official(model, pairs, batch_size, workers, steps):
    "Seconds a step of the official data path, with our losses and optimiser."
    opt, at, net = make_optimizer(model, lr=LR), [], model.net
    model.train()
    while len(at) < steps:
        for clean, view, tokens, token_views in torch.utils.data.DataLoader(pairs, batch_size, shuffle=True, drop_last=True,
                                                                            num_workers=workers):
            at.append(now())
            i, iv = net.encode_image(torch.cat([clean, view]), normalize=True).chunk(2)
            t, tv = net.encode_text(torch.cat([tokens, token_views]), normalize=True).chunk(2)
            scale = net.logit_scale.exp()
            loss = clip_loss(i, t, scale) + inmodal_loss(i, t, iv, tv, scale)
            opt.zero_grad()
            loss.backward()
            opt.step()
            if len(at) == steps: break
    return (at[-1] - at[SKIP])/(len(at) - 1 - SKIP)


def race(blocks, **sides):
    "Median seconds a step of each side, blocks alternating; one short block each before."
    seconds = {k: [] for k in sides}
    for block in range(blocks + 1):
        for k, side in sides.items():
            s = side()
            if block: seconds[k].append(s)
        print(f'block {block}: ' + ', '.join(f'{k} {v[-1]*1e3:.0f} ms' for k, v in seconds.items() if v), file=sys.stderr)
    return {k: statistics.median(v) for k, v in seconds.items()}


def row(what, size, ours_name, peer, ours_seconds, peer_seconds, **more):
    return dict(what=what, size=size, ours=ours_name, peer=peer, ours_value=1/ours_seconds, peer_value=1/peer_seconds,
                unit='steps/s', ratio=peer_seconds/ours_seconds, **more)


def race_loop(o):
    "`fit` against a loop by hand."
    batches = Batches(ShapeCaps(max(1024, 2*o.batch)), o.batch)
    model = lambda: ClipModel(tiny_clip(), 'tiny')
    s = race(o.blocks, fit=lambda: ours(model(), batches, o.steps), hand=lambda: by_hand(model(), batches, o.steps))
    size = f'tiny CLIP, CleanCLIP, batch {o.batch}, 32 px'
    return [row('training loop', size, 'bdnb.train.fit', 'PyTorch loop by hand', s['fit'], s['hand'], goal=.97)]


def as_files(spec, n, folder):
    "The first n pairs as JPEG files and a CSV, as the official code wants them; returns the corpus of that CSV."
    corpus = open_corpus(spec if spec.startswith('wds:') else f'wds:{spec}')
    with open(folder/'pairs.csv', 'w', newline='') as f:
        out = csv.writer(f)
        out.writerow(['image', 'caption'])
        for i in range(min(n, len(corpus))):
            s = corpus.sample(i)
            Image.fromarray(s.image.permute(1, 2, 0).numpy()).save(folder/f'{i:06}.jpg', quality=85)
            out.writerow([f'{i:06}.jpg', s.text])
    return CsvCorpus(folder/'pairs.csv')


def race_data(o, folder):
    "Our data path against the official one, from the same files."
    corpus, start = as_files(o.flickr, o.n, folder), now()
    batches = Batches(corpus.cache(o.size, progress=False), o.batch)
    decoding = (now() - start)/(EPOCHS*len(batches))
    model, pairs = lambda: ClipModel(tiny_clip(o.size), 'tiny'), OfficialPairs(corpus, folder, o.size)
    CleanClipObjective(text_view=VIEW).views(next(batches.epoch(0)))
    for b in Batches(batches.corpus, o.batch, drop_last=False).epoch(0): CleanClipObjective(text_view=VIEW).views(b)
    sides = {f'{w} workers': lambda w=w: official(model(), pairs, o.batch, w, o.steps) for w in o.workers}
    s = race(o.blocks, ours=lambda: ours(model(), batches, o.steps), **sides)
    size = f'{len(corpus):,} Flickr8k pairs as JPEG, tiny CLIP, batch {o.batch}, {o.size} px'
    return [row('CleanCLIP data path', size, 'bdnb', f'official data path, DataLoader with {w} workers', s['ours'] + decoding,
                s[f'{w} workers'], decoding_seconds_per_step=decoding, goal=1.5) for w in o.workers]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--flickr', help='pattern of Flickr8k WebDataset shards; the data race is left out without it')
    p.add_argument('--out', default='results/race-fit.json')
    p.add_argument('--blocks', type=int, default=5, help='timed blocks of each side')
    p.add_argument('--steps', type=int, default=13, help=f'steps in a block, the first {SKIP} not timed')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--n', type=int, default=1024, help='pairs of the data race')
    p.add_argument('--size', type=int, default=64, help='side of its pictures')
    p.add_argument('--workers', type=int, nargs='+', default=[0, 2], help='of the official DataLoader')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--cpu', action='store_true', help='count CPU seconds (then without workers)')
    o = p.parse_args()
    if o.cpu and o.workers != [0]: p.error('--cpu sees no worker processes: add --workers 0')
    if o.cpu: globals().update(now=time.process_time)
    if o.steps < SKIP + 2: p.error(f'--steps must be {SKIP + 2} or more')
    limit_threads(o.threads)
    torch.manual_seed(derive_seed('bench fit') % 2**31)
    rows = race_loop(o)
    if o.flickr:
        with tempfile.TemporaryDirectory() as folder: rows += race_data(o, Path(folder))
    for r in rows: print('{what}: {ours_value:.2f} against {peer_value:.2f} steps/s of {peer}: {ratio:.2f} times'.format(**r))
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    write_json(o.out, dict(study='race-fit', **stamp(' '.join(['python bench/fit.py', *words])), rows=rows,
                           clock='cpu' if o.cpu else 'wall', threads=o.threads, blocks=o.blocks, steps=o.steps))


if __name__ == '__main__': main()
