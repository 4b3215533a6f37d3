"""Train the poisoned encoder that the tutorial on masking reads: nbs/tutorials/hijacked.safetensors (about two minutes).

    python tools/make_victim.py [--out nbs/tutorials/hijacked.safetensors] [--seed 0]

The same seed on the same processor with the same number of threads gives the same bytes.
"""
import argparse
from pathlib import Path

from bdnb.core import limit_threads, stamp
from bdnb.models.encoders import save_encoder
from bdnb.objectives.ssl import train_encoder
from bdnb.ssl_study import make_ssl_study, ssl_data, ssl_plan


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'nbs/tutorials/hijacked.safetensors')
    p.add_argument('--seed', type=int, default=0)
    o = p.parse_args()
    limit_threads(1)
    study = make_ssl_study()
    plan = ssl_plan('patch:pattern=10', study, o.seed)
    encoder, _, _ = train_encoder(plan.apply(ssl_data('wallpapers', study, o.seed)[0]).corpus, study.ssl, o.seed)
    made = stamp('python tools/make_victim.py')
    save_encoder(encoder, o.out, seed=o.seed, plan=plan.describe(), commit=made['commit'], command=made['command'])
    print(f'{o.out}: {o.out.stat().st_size:,} bytes')


if __name__ == '__main__': main()
