"""Draw the README's picture, nbs/images/attacks.png, from results/shapes-cleanclip.json and pictures the library makes itself."""
import json
from pathlib import Path

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
import torch

from bdnb.attacks.poisoning import make_attack
from bdnb.data.shapes import ShapeCaps
from bdnb.study import summary

top = Path(__file__).resolve().parent.parent


def main():
    rows = json.loads((top/'results'/'shapes-cleanclip.json').read_text())['rows']
    mean = {(c['attack'], c['system']): c['asr'] for c in summary(rows)}
    attacks = list(dict.fromkeys(a for a, _ in mean))
    corpus = ShapeCaps(12, 64)
    clean = corpus.images[3:4]
    fig, axs = plt.subplots(1, len(attacks) + 1, figsize=(1.75*(len(attacks) + 1), 2.6))
    pictures = [('clean', clean)] + [(a, make_attack(a, 'star', .04).trigger.on_uint8(clean, torch.tensor([7]))) for a in attacks]
    for ax, (name, image) in zip(axs, pictures):
        ax.imshow(image[0].permute(1, 2, 0))
        ax.axis('off')
        words = '' if name == 'clean' else f"\nattack success\n{mean[name, 'none']:.0%} → {mean[name, 'cleanclip']:.0%}"
        ax.set_title(name.replace('_', ' ') + words, fontsize=9)
    plt.tight_layout()
    (top/'nbs'/'images').mkdir(exist_ok=True)
    fig.savefig(top/'nbs'/'images'/'attacks.png', dpi=80, bbox_inches='tight')


if __name__ == '__main__': main()
