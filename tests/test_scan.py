"`bdnb scan`: clean lists in the form that came in, two processes like one, kills, memory, time left, and strangers' keys."
import base64
import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import as_launched, fork, needs_fork, start_two
import bdnb.defenses.findings as findings
import bdnb.objectives.ssl as ssl
import bdnb.ssl_study as ssl_study
from bdnb.cli import main
from bdnb.core import BdnbError, read_json, rng
from bdnb.data.corpus import ArrayCorpus, Corpus, CsvCorpus, FolderCorpus
from bdnb.data.doors import open_corpus, read_keys, write_spec
from bdnb.data.images import BadImage
from bdnb.data.shards import write_shards
from bdnb.defenses.findings import COLUMNS, FOUND, NO_EVIDENCE, Findings, Scan, Team, contents, load_findings
from bdnb.defenses.patchsearch import PatchSearch
from bdnb.defenses.poisoncam import PoisonCAM, Search
from bdnb.defenses.poisonfilter import FilterEnsemble, FilterRecipe
from bdnb.models.checkpoint import read_tensors, write_tensors
from bdnb.models.encoders import Encoder, create_encoder, save_encoder
from bdnb.scan import cell, scan_corpus

torch.set_num_threads(1)
quick = FilterRecipe.quick(steps=40, models=2, batch=16)
how = PoisonCAM(clusters=2, tests=20, look=20, search='all', filter=quick)


class Red(nn.Module):
    "Two features: red squares, and the rest."
    dim, nap, fuse = 2, 0., None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0: raise BdnbError('the fuse is burnt')
        time.sleep(self.nap)
        red = ((x[:, 0] > .9) & (x[:, 1] < .1)).float().sum((1, 2))*20
        return torch.stack([red, x[:, 2].clamp(min=0).sum((1, 2))], 1)*self.weight


def red(size=32): return Encoder(Red(), 'red', size, mean=(0, 0, 0), std=(1, 1, 1))


def pictures(n=60, every=6):
    g = rng('pile')
    for i in range(n):
        x = torch.randint(60, 120, (3, 32, 32), generator=g, dtype=torch.uint8)
        if every and i % every == 0:
            x[:, 8:16, 4 + i % 17:12 + i % 17] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
        yield x


def save(x, path): Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)


def fill(folder, n=60, every=6, broken=True):
    "A folder of pictures, one of them damaged, in two classes."
    for i, x in enumerate(pictures(n, every)):
        (at := folder/f'class {i % 2}').mkdir(parents=True, exist_ok=True)
        save(x, at/f'{i:03d}.png')
    if broken: (folder/'class 1'/'031-broken.png').write_bytes(b'\x89PNG\r\n\x1a\nnot a picture')
    return folder


def kept_keys(found): return [k for k, keep in zip(found.keys, found.keep.tolist()) if keep]


class Every:
    "A detector that finds every sixth picture, by decree."
    def scan(self, corpus, encoder, out=None, quiet=False, device=None, share=None, writer=True, budget_bytes=2**31):
        n, S = len(corpus), encoder.image_size
        hit, nan = torch.arange(n) % 6 == 0, torch.full((n,), float('nan'))
        window = torch.tensor([0, 0, 8, 8]).expand(n, 4)
        evidence = dict(top=torch.tensor([0]), heat=torch.rand(1, S, S), crops=corpus.gather([0])[:, :, :8, :8], clusters=2,
                        forwards={}, seconds={}, skipped=[list(s) for s in corpus.skipped])
        return Findings(corpus.keys, hit.float(), hit.long(), window, nan, ~hit, FOUND, evidence)


def scan_line(line, out): return scan_corpus(open_corpus(line), red(), out, Every(), quiet=True, line=line)


# What was kept, in the form that came in


def test_a_folder_comes_back_as_a_list_that_opens(tmp_path):
    pile = fill(tmp_path/'pile')
    found = scan_line(f'folder:{pile}?size=32&n=50&seed=1', tmp_path/'scan')
    line = found.evidence['clean']
    assert line == f"folder:{pile}?size=32&n=50&seed=1&keep={tmp_path/'scan'/'kept.txt'}"
    again = open_corpus(line)
    assert again.keys == kept_keys(found) and 'class 1/031-broken.png' not in again.keys
    assert open_corpus(f"folder:{pile}?keep={tmp_path/'scan'/'kept.txt'}").keys == again.keys
    assert sorted([*read_keys(tmp_path/'scan'/'removed.txt'), *again.keys]) == sorted(found.keys)
    assert json.loads((tmp_path/'scan'/'scan.json').read_text())['clean'] == line


HEAD = '\ufeffid,image ,"caption, or so",label\r\n'


def table(folder):
    "A table with every oddity that a CSV may have, and its rows as text by picture."
    rows = {}
    for i, x in enumerate(pictures()):
        save(x, folder/f'p{i:02d}.png')
        cell = f'"p{i:02d}.png"' if i % 3 == 0 else f' p{i:02d}.png '
        rows[f'p{i:02d}.png'] = [f'{i},{cell},"a ""red"", or\nnot {i}",{"ab"[i % 2]}' + ('\r\n' if i % 2 else '\n')]
    for i in (6, 7): rows[f'p{i:02d}.png'].append(f"'{i}',p{i:02d}.png,another caption;,{'ab'[i % 2]}\r\n")
    rows['gone.png'] = ['9,gone.png,no such file,a\n']
    rows['p00.png and no caption'] = ['0,p00.png,,a\n']
    text = HEAD + ''.join(r[0] for r in rows.values()) + '\r\n' + ''.join(r[1] for r in rows.values() if len(r) > 1)
    (folder/'pairs.csv').write_text(text, encoding='utf-8', newline='')
    return rows


def test_a_table_comes_back_as_that_table_without_rows(tmp_path):
    (folder := tmp_path/'data').mkdir()
    rows = table(folder)
    line = f'csv:{folder}/pairs.csv?caption_col=caption, or so'
    found = scan_line(line, tmp_path/'scan')
    kept = kept_keys(found)
    assert 'p06.png' not in kept and 'p07.png' in kept
    assert 'gone.png' not in found.keys and 'gone.png' in str(found.evidence['skipped'])
    want = HEAD + ''.join(rows[k][0] for k in kept) + ''.join(rows[k][1] for k in kept if len(rows[k]) > 1)
    assert (tmp_path/'scan'/'kept.csv').read_bytes().decode('utf-8') == want
    again, whole = open_corpus(found.evidence['clean']), open_corpus(line)
    assert again.keys == kept and not again.skipped and again.classes == ['a', 'b']
    at = [whole.keys.index(k) for k in kept]
    assert again.captions == [whole.captions[i] for i in at] and again.labels.tolist() == whole.labels[at].tolist()
    assert torch.equal(again[3].image, whole[at[3]].image)
    assert open_corpus(f"{line}&keep={tmp_path/'scan'/'kept.txt'}").keys == kept


def test_a_table_without_a_line_and_one_with_tabs(tmp_path):
    (folder := tmp_path/'data').mkdir()
    for i, x in enumerate(pictures()): save(x, folder/f'{i}.png')
    (folder/'t.tsv').write_text('file\ttitle\n' + ''.join(f'{i}.png\tp\xe9re, {i}\n' for i in range(60)), encoding='latin-1')
    corpus = CsvCorpus(folder/'t.tsv', encoding='latin-1')
    found = scan_corpus(corpus.subset(range(10, 60)), red(), tmp_path/'scan', Every(), quiet=True)
    line = found.evidence['clean']
    assert line == f"csv:{tmp_path/'scan'/'kept.tsv'}?encoding=latin-1&folder={folder}"
    assert open_corpus(line).keys == kept_keys(found) and open_corpus(line).texts[0].startswith('p\xe9re, 1')
    nameless = ArrayCorpus(torch.stack([*pictures()]))
    assert scan_corpus(nameless, red(), tmp_path/'b', Every(), quiet=True).evidence['clean'] is None


def test_shards_come_back_as_a_list_that_opens(tmp_path):
    corpus = ArrayCorpus(torch.stack([*pictures()]), texts=[f'text {i}' for i in range(60)])
    write_shards(corpus, tmp_path/'shards', 25)
    found = scan_line(f'wds:{tmp_path}/shards/{{00000..00002}}.tar', tmp_path/'scan')
    again = open_corpus(found.evidence['clean'])
    assert again.keys == kept_keys(found) and again.texts == [f'text {int(k)}' for k in again.keys]
    assert torch.equal(again[5].image, corpus[int(again.keys[5])].image)


def test_a_line_that_cannot_be_said_is_not_said():
    assert write_spec('folder', 'a?b', keep='k') is None and write_spec('wds', 'a&b', keep='k') == 'wds:a&b?keep=k'


# The command


def run(*args):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err): code = main([str(a) for a in args])
    return code, out.getvalue(), err.getvalue()


def test_a_damaged_picture_is_named_counted_and_skipped(tmp_path, tiny):
    pile = fill(tmp_path/'pile', 30, 0)
    code, out, err = run('scan', f'folder:{pile}', '--encoder', tiny, '--out', tmp_path/'scan', '--clusters', 2, '-q')
    assert code == 0, err
    assert '1 samples were left out' in err and '031-broken.png' in err
    assert '031-broken.png' in (tmp_path/'scan'/'report.html').read_text()
    assert [line.split() for line in out.splitlines() if 'skipped' in line][0][-1] == '1'
    names = [r['key'] for r in csv.DictReader(open(tmp_path/'scan'/'findings.csv'))]
    assert len(names) == 30 and 'class 1/031-broken.png' not in names
    said = json.loads((tmp_path/'scan'/'scan.json').read_text())
    assert [k for k, _ in said['skipped']] == ['class 1/031-broken.png'] and 'not an image' in said['skipped'][0][1]
    assert len(open_corpus(said['clean'])) == 30 and said['clean'] in out


def test_an_encoder_that_says_nothing(tmp_path):
    "A bare state dict with torchvision's names is the same encoder as the file that says everything."
    pile, net = fill(tmp_path/'pile', 12, 0, broken=False), create_encoder('resnet10/small', 4, mean=(.5, .4, .3))
    save_encoder(net, tmp_path/'e.safetensors')
    tensors = {f"backbone.{k.replace('shortcut', 'downsample')}": v for k, v in net.net.state_dict().items()}
    torch.save({'state_dict': tensors}, tmp_path/'e.pt')
    command = lambda out, *more: run('scan', f'folder:{pile}', '--out', tmp_path/out, '--clusters', 2, '-q', *more)
    bare = '--encoder', tmp_path/'e.pt', '--model', 'resnet10/small', '--width', 4, '--size', 32, '--mean', '.5,.4,.3'
    code, _, err = command('a', '--encoder', tmp_path/'e.safetensors')
    assert code == 0, err
    code, _, err = command('b', *bare, '--std', '.229,.224,.225')
    assert code == 0 and 'does not say' not in err, err
    assert (tmp_path/'a'/'findings.csv').read_bytes() == (tmp_path/'b'/'findings.csv').read_bytes()
    assert read_json(tmp_path/'b'/'scan.json')['image_size'] == 32
    code, _, err = command('b', *bare)                               # the same network and pictures: every stage is there
    assert code == 0 and 'e.pt: does not say which pictures it reads; taken: std (0.229, 0.224, 0.225)' in err, err


@pytest.mark.parametrize('option, value, why', [
    ('--size', 32, 'is for --encoder'), ('--width', 4, 'is for --encoder'), ('--mean', '0,0,0', 'is for --encoder'),
    ('--std', '1,1,1', 'is for --encoder'), ('--model', 'resnet18', 'is for --encoder'), ('--mean', '0,0', 'three numbers')])
def test_what_is_trained_needs_no_description(tmp_path, tiny, option, value, why):
    source = ('--encoder', tiny) if why == 'three numbers' else ('--train', 'moco')
    code, _, err = run('scan', f'folder:{tmp_path}', *source, '--out', tmp_path/'scan', option, value)
    assert code == 2 and err.startswith(f'bdnb: error: {option}') and why in err and err.count('\n') == 1, err


def test_only_a_network_with_tokens_drops_them(tmp_path, tiny):
    pile, vit = fill(tmp_path/'pile', 12, 0, broken=False), tmp_path/'vit.safetensors'
    save_encoder(create_encoder('vit_tiny/8', image_size=32), vit)
    command = lambda net, *more: run('scan', f'folder:{pile}', '--encoder', net, '--out', tmp_path/'scan', '--clusters', 2,
                                     '--window', '.5', '--drop-tokens', '--precision', 'bf16', '--device', 'cpu', '-q', *more)
    code, _, err = command(tiny)
    assert code == 2 and err.startswith("bdnb: error: --drop-tokens: encoder 'resnet10/half' has no tokens to drop"), err
    assert err.count('\n') == 1 and not (tmp_path/'scan').exists()
    code, _, err = command(vit, '--window', '.5,.1')
    assert code == 2 and 'drop with window=0.1: a mask leaves no token uncovered' in err and not (tmp_path/'scan').exists(), err
    code, _, err = command(vit)
    said = read_json(tmp_path/'scan'/'scan.json')['settings']
    assert code == 0 and said['drop'] is True and said['precision'] == 'bf16', err


@pytest.mark.slow
def test_train_first_and_not_twice(tmp_path):
    "`--train`: an encoder is trained into the folder, used again by the same command, refused to another."
    pile = fill(tmp_path/'pile', 64, 6)
    command = lambda *more: run('scan', f'folder:{pile}', '--out', tmp_path/'scan', '-q', *more)
    code, out, err = command('--train', 'moco')
    assert code == 0, err
    made = tmp_path/'scan'/'encoder'/'encoder.safetensors'
    before, table = made.stat().st_mtime_ns, (tmp_path/'scan'/'findings.csv').read_bytes()
    assert command('--train', 'moco')[0] == 0 and made.stat().st_mtime_ns == before
    assert (tmp_path/'scan'/'findings.csv').read_bytes() == table
    code, _, err = command('--train', 'simclr')
    assert code == 2 and 'holds an encoder of another method' in err and (tmp_path/'scan'/'report.html').exists()
    code, out, err = run('scan', f'folder:{pile}', '--out', tmp_path/'b', '-q', '--encoder', made)
    assert code == 0 and (tmp_path/'b'/'findings.csv').read_bytes() == table, err


def test_an_interrupted_scan_keeps_what_it_has(tmp_path, tiny, monkeypatch):
    "Ctrl-C is not a failure that sweeps the folder; a failure before anything was done is."
    pile = fill(tmp_path/'pile', 30, 0)
    command = 'scan', f'folder:{pile}', '--encoder', tiny, '--out', tmp_path/'new'/'scan', '-q', '--clusters', 2
    def stop(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Search, 'examine', stop)
        code, _, err = run(*command)
    left = {p.name for p in (tmp_path/'new'/'scan'/'stages').iterdir()}
    assert code == 130 and left == {'features.safetensors', 'clusters.safetensors'}
    assert run(*command)[0] == 0
    with monkeypatch.context() as m:
        m.setattr(Search, 'features', stop)
        assert run(*command[:5], tmp_path/'other', *command[6:])[0] == 130 and not (tmp_path/'other').exists()


# Two processes




def same(a, b):
    for name in ('score', 'cluster', 'window', 'probability', 'keep'):
        assert torch.equal(*(getattr(f, name).nan_to_num(-1.) for f in (a, b))), name
    assert a.keys == b.keys and a.verdict == b.verdict and a.evidence['forwards'] == b.evidence['forwards']
    assert a.evidence['skipped'] == b.evidence['skipped'] and torch.equal(a.evidence['heat'], b.evidence['heat'])


def adaptive(): return PoisonCAM(clusters=3, tests=40, look=20, filter=quick, batch=64)


def one_of_two(rank, port, folder):
    as_launched(rank, port)
    team, corpus = Team(cpu=True), FolderCorpus(folder/'pile')
    found = scan_corpus(corpus, red(), folder/f'two-{rank}', adaptive(), quiet=True, team=team)
    found.save(folder/f'found-{rank}.safetensors')
    (folder/f'seen-{rank}.json').write_text(json.dumps(corpus.skipped))
    broken, said = red(), ''
    if rank: broken.net.fuse = 5
    try: scan_corpus(FolderCorpus(folder/'pile'), broken, folder/'broken', adaptive(), quiet=True, team=team)
    except BdnbError as e: said = str(e)
    (folder/f'error-{rank}.txt').write_text(said)
    fewer = FolderCorpus(folder/'pile').subset(range(100))
    try: scan_corpus(fewer, red(), folder/'two-0', adaptive(), quiet=True, team=team)
    except BdnbError as e: (folder/f'refused-{rank}.txt').write_text(str(e))
    team.close()


@pytest.mark.slow
@needs_fork
def test_two_processes_are_one(tmp_path):
    "Findings bit for bit, files from the first alone, each picture decoded once; an error in one ends both, and names it."
    fill(tmp_path/'pile', 150)
    alone = scan_corpus(FolderCorpus(tmp_path/'pile'), red(), tmp_path/'one', adaptive(), quiet=True)
    assert alone.verdict == FOUND and len(alone.evidence['skipped']) == 1 and (~alone.keep).sum() >= 20
    assert start_two(one_of_two, tmp_path) == [0, 0]
    for rank in (0, 1):
        same(alone, load_findings(tmp_path/f'found-{rank}.safetensors'))
        assert json.loads((tmp_path/f'seen-{rank}.json').read_text()) == [list(s) for s in alone.evidence['skipped']]
    assert not (tmp_path/'two-1').exists()
    for name in ('findings.csv', 'kept.txt', 'removed.txt'):
        assert (tmp_path/'two-0'/name).read_bytes() == (tmp_path/'one'/name).read_bytes()
    assert (tmp_path/'error-1.txt').read_text() == 'the fuse is burnt'
    assert (tmp_path/'error-0.txt').read_text() == 'process 1 of 2 stopped: BdnbError: the fuse is burnt'
    for rank in (0, 1): assert 'two-0: holds a scan of other pictures' in (tmp_path/f'refused-{rank}.txt').read_text()


@pytest.mark.slow
def test_torchrun(tmp_path, tiny):
    "The command as one types it: the same files as from one process, and one report."
    pile = fill(tmp_path/'pile', 60)
    args = f"scan folder:{pile} --encoder {tiny} --clusters 2 --device cpu -q --out".split()
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'bdnb.cli', *args]
    done = subprocess.run([*launch, str(tmp_path/'two')], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('report: ') == 1
    assert run(*args, tmp_path/'one')[0] == 0
    for name in ('findings.csv', 'kept.txt', 'removed.txt'):
        assert (tmp_path/'two'/name).read_bytes() == (tmp_path/'one'/name).read_bytes()


def small_moco(): return replace(ssl_study.SSL_METHODS['mocov2'], width=4, epochs=2, batch_size=16, queue=32, hidden=16, out=8)


def trained(folder, out): return f"scan folder:{folder/'pile'} --train moco --clusters 2 --device cpu -q --out {folder/out}".split()


def one_of_two_trains(rank, port, folder):
    as_launched(rank, port)
    ssl_study.SSL_METHODS['mocov2'] = small_moco()
    sys.exit(main(trained(folder, 'two')))


@pytest.mark.slow
@needs_fork
def test_what_two_processes_train_is_what_one_trains(tmp_path, monkeypatch):
    "Weights and findings bit for bit: batch statistics are those of whole batches."
    fill(tmp_path/'pile', 60)
    monkeypatch.setitem(ssl_study.SSL_METHODS, 'mocov2', small_moco())
    assert start_two(one_of_two_trains, tmp_path) == [0, 0] and run(*trained(tmp_path, 'one'))[0] == 0
    one, two = (read_tensors(tmp_path/n/'encoder'/'encoder.safetensors')[0] for n in ('one', 'two'))
    assert one and one.keys() == two.keys() and all(v.equal(two[k]) for k, v in one.items())
    assert (tmp_path/'two'/'findings.csv').read_bytes() == (tmp_path/'one'/'findings.csv').read_bytes()


# Kills


def slow_scan(folder, out, nap):
    torch.set_num_threads(1)
    findings.EVERY, net = 0., red()
    net.net.nap = nap
    found = scan_corpus(FolderCorpus(folder), net, out, replace(how, batch=64), quiet=True)
    found.save(out/'found.safetensors')


@pytest.mark.slow
@needs_fork
def test_kill_9_within_the_search(tmp_path):
    "Killed twice, each time when more pieces had been written, and ended: the findings of a scan that nothing happened to."
    fill(tmp_path/'pile')
    out, parts = tmp_path/'scan', lambda: sorted(out.glob('stages/search-*.part.safetensors'))
    for _ in range(2):
        had, end = len(parts()), time.monotonic() + 300
        p = fork.Process(target=slow_scan, args=(tmp_path/'pile', out, .02))
        p.start()
        while len(parts()) <= had and p.is_alive() and time.monotonic() < end: time.sleep(.01)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        assert p.exitcode == -signal.SIGKILL and len(parts()) > had and not (out/'stages'/'search.safetensors').exists()
    assert len(parts()) >= 2 and all(findings.read_tensors(f)[0] for f in parts())
    p = fork.Process(target=slow_scan, args=(tmp_path/'pile', out, 0.))
    p.start()
    p.join(600)
    assert p.exitcode == 0 and not parts()
    slow_scan(tmp_path/'pile', tmp_path/'whole', 0.)
    same(load_findings(tmp_path/'whole'/'found.safetensors'), load_findings(out/'found.safetensors'))
    assert (out/'findings.csv').read_bytes() == (tmp_path/'whole'/'findings.csv').read_bytes()


# Time left


class Ticks:
    "A clock that only work moves."
    def __init__(self): self.now = 0.
    def perf_counter(self): return self.now
    monotonic = time = perf_counter


def timed_scan(monkeypatch, corpus, detector, net):
    "(records of (stage, done, total, left, now), the time at the end); a picture costs 1 in the encoder, and 2 in the filter."
    clock, seen = Ticks(), []
    monkeypatch.setattr(findings, 'time', clock)
    spend = lambda price: lambda module, x, y: setattr(clock, 'now', clock.now + price*len(x[0]))
    net.net.register_forward_hook(spend(1))
    real = FilterEnsemble.forward
    def forward(self, x):
        clock.now += len(x)*(6 if self.training else 2)              # forwards and back
        return real(self, x)
    monkeypatch.setattr(FilterEnsemble, 'forward', forward)
    stages = Scan(progress=lambda *a: seen.append((*a, clock.now)))
    with torch.no_grad(): Search(detector, corpus, net.eval(), stages, torch.device('cpu')).findings()
    return seen, stages


def test_the_time_left_is_honest(monkeypatch):
    "Without a trigger the estimate holds from the first piece on: clusters of unequal size and pruned rounds are foreseen."
    detector = PoisonCAM(clusters=10, tests=40, look=20, pass_above=20, evidence=1., batch=50)
    noise = torch.randint(0, 256, (300, 3, 32, 32), generator=rng('noise'), dtype=torch.uint8)
    seen, _ = timed_scan(monkeypatch, ArrayCorpus(noise), detector, squint(32))
    end = seen[-1][-1]
    assert {s for s, *_ in seen} == {'features', 'search'} and end > 3000
    for stage, done, total, left, now in seen:
        assert 0 < done <= total and abs(left - (end - now)) <= .15*(end - now) + 50, (stage, done, total, left, end - now)
    assert seen[-1][3] == 0 and [d for s, d, *_ in seen if s == 'search'] == sorted(d for s, d, *_ in seen if s == 'search')


def test_the_time_left_counts_the_classifier(monkeypatch):
    "From its first step on: steps at their pace, and the pictures that it will be asked about; then what is left of them."
    detector = PoisonCAM(clusters=2, tests=40, batch=50, search='all', filter=FilterRecipe.quick(steps=30, every=100))
    seen, _ = timed_scan(monkeypatch, ArrayCorpus(torch.stack([*pictures(300, 6)])), detector, red())
    last = [r for r in seen if r[0] in ('classifier', 'filter')]
    assert [r[0] for r in last][:31] == ['classifier']*30 + ['filter'] and last[0][1:3] == (1, 30)
    end = last[-1][-1]
    for stage, done, total, left, now in last:
        assert abs(left - (end - now)) <= .05*(end - now) + 1e-6, (stage, done, left, end - now)
    assert last[-1][1:4] == (300, 300, 0)


class Terminal(io.StringIO):
    def isatty(self): return True


def shown(monkeypatch, every, **options):
    "Lines of a scan's progress, without those of a stage's beginning."
    monkeypatch.setattr(sys, 'stderr', said := Terminal())
    replace(how, **options).scan(ArrayCorpus(torch.stack([*pictures(60, every)])), red())
    return [line for line in said.getvalue().split('\r\033[K') if re.match(r'(.+): ([0-9]+) of \2,', line)]


def test_the_time_left_is_said_to_be_of_one_look(monkeypatch):
    "On a clean pile all looks are made. How many there will be nobody knows: the first that shows a trigger is the last."
    lines = shown(monkeypatch, 0, clusters=(4, 2), window=(.27, .36))
    looks = [re.search(r'left for look (\d) of at most 4, more may follow$', line) for line in lines]
    assert all(looks) and list(dict.fromkeys(m[1] for m in looks)) == ['1', '2', '3', '4'], lines


def test_what_the_time_left_does_not_hold_is_said(monkeypatch):
    classify = Search.classify
    def suspicious(self, net):                                       # five honest pictures too, so that there is a second opinion
        p = classify(self, net)['probability']
        p[1:6] = .99
        return dict(probability=p)
    monkeypatch.setattr(Search, 'classify', suspicious)
    ends = {line.split(':')[0]: line.split('left', 1)[1] for line in shown(monkeypatch, 6)}
    more, opinion = ', more may follow', ', a second opinion may follow'
    assert ends['search'] == more and ends['classifier'] == ends['filter'] == opinion and ends['second opinion'] == '', ends


# Memory


class Drawn(Corpus):
    "Pictures that are made when they are asked for; one in the middle cannot be."
    def __init__(self, n, size):
        super().__init__([f'{i:06d}' for i in range(n)], name='drawn')
        self.size = size
        self.noise = np.random.default_rng(0).integers(0, 256, 8*3*size*size, np.uint8)

    def _image(self, i, size=None, fit='crop'):
        if i == len(self)//2: raise BadImage(f'{self.keys[i]}: torn')
        n = 3*self.size**2
        return torch.from_numpy(self.noise[(i*7919) % (7*n):][:n].reshape(3, self.size, self.size))


class Squint(nn.Module):
    "A few sums of a picture."
    dim = 12

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 12)

    def forward(self, x): return self.linear(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def squint(size):
    torch.manual_seed(0)
    return Encoder(Squint(), 'squint', size, mean=(.5,)*3, std=(.1,)*3).eval()


def anonymous():
    "Bytes of this process that no file stands behind."
    return int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1])*1024


def measured(folder, name, n, size, budget, detector):
    "Scan and write down: peak of the resident set, peak of its anonymous part above the start, pictures found."
    import ctypes, threading
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**20)      # M_MMAP_THRESHOLD: large buffers go back at once, or their fragments would be counted
    net = squint(size)
    scan_corpus(Drawn(512, size), net, folder/f'{name}-first', detector, quiet=True)      # modules are not the pictures'
    start, peak, stop = anonymous(), [0], threading.Event()
    def watch():
        while not stop.wait(.01): peak[0] = max(peak[0], anonymous())
    (watcher := threading.Thread(target=watch)).start()
    found = scan_corpus(Drawn(n, size), net, folder/name, detector, quiet=True, budget_bytes=budget)
    stop.set()
    watcher.join()
    said = dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024, grown=max(0, peak[0] - start), n=len(found.keys),
                examined=int(found.searched.sum()), asked=int((~found.probability.isnan()).sum()),
                clusters=found.evidence['clusters'], skipped=found.evidence['skipped'])
    (folder/f'{name}.json').write_text(json.dumps(said))


def in_a_process(folder, name, *args):
    p = fork.Process(target=measured, args=(folder, name, *args))
    p.start()
    p.join(1800)
    assert p.exitcode == 0
    return json.loads((folder/f'{name}.json').read_text())


small = FilterRecipe.quick(models=1, width=2, steps=10)
linux = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no /proc here')


@pytest.mark.slow
@needs_fork
@linux
def test_100_000_pictures_within_4_gigabytes(tmp_path):
    "A thousand clusters, pictures in a mapped file, one of them torn: everything at full size but the network and the pictures."
    few = PoisonCAM(masks='grid', window=.5, tests=32, look=8, per_round=1, evidence=.01, more=32, filter=small)
    said = in_a_process(tmp_path, 'large', 100_000, 32, 2**24, few)
    assert said['n'] == 99_999 and said['clusters'] == 999 and said['examined'] > 3000 and said['asked'] == 99_999
    assert said['skipped'] == [['050000', '050000: torn']]
    assert said['peak'] < 4*2**30, said
    rows = sum(1 for _ in open(tmp_path/'large'/'findings.csv')) - 1
    assert rows == 99_999


@pytest.mark.slow
@needs_fork
@linux
def test_pictures_beyond_the_budget_are_not_held(tmp_path):
    "30,000 pictures of 64 px are 369 MB: in memory within the budget, else in the file, and the process does not grow by them."
    few = PoisonCAM(clusters=20, masks='grid', window=.5, tests=32, look=8, per_round=1, batch=128, evidence=.01, more=8,
                    filter=small)
    decoded = 30_000*3*64**2
    held = in_a_process(tmp_path, 'held', 30_000, 64, 2**31, few)
    mapped = in_a_process(tmp_path, 'mapped', 30_000, 64, 2**24, few)
    assert held['grown'] > decoded, held                               # else this test could not fail
    assert mapped['grown'] < .25*decoded, (held, mapped)
    assert (tmp_path/'held'/'findings.csv').read_bytes() == (tmp_path/'mapped'/'findings.csv').read_bytes()


# The report


class Page(HTMLParser):
    "Tags with their attributes, and the text."
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], '', []
        self.feed(text)

    def handle_starttag(self, name, attributes): self.tags.append((name, dict(attributes)))
    def handle_data(self, text): self.text += text
    def all(self, name): return [a for n, a in self.tags if n == name]


def test_the_report_shows_evidence_and_no_foreign_html(tmp_path):
    evil = ['<script>alert(1)</script>.png', '"><img src=x onerror=alert(2)>.png', '&lt;b&gt;.png', "=cmd|'/c calc'.png",
            '\u202egnp.exe.png']
    images = torch.stack([*pictures()])
    keys = [evil[i//6 % 5] + str(i) if i % 6 == 0 else f'<i>{i}</i>' for i in range(60)]
    corpus = ArrayCorpus(images, keys, name='<h1>name', skipped=[('<u>bad', '<svg onload=alert(3)>: torn')])
    scan_corpus(corpus, red(), tmp_path/'scan', how, 'bdnb scan "<b>x"', True)
    text = (tmp_path/'scan'/'report.html').read_text(encoding='utf-8')
    page = Page(text)
    assert not page.all('i') and not page.all('u') and 'onerror' not in {a for _, d in page.tags for a in d}
    assert all('alert' not in str(v) for n, d in page.tags for v in (n, *d.values())) and 'alert(1)' in page.text
    for shown in (evil[0] + '0', evil[1] + '6', '<u>bad', '<svg onload=alert(3)>: torn', 'bdnb scan "<b>x"', '<h1>name'):
        assert shown in page.text, shown
    shots = [a for a in page.all('img')]
    assert all(a['src'].startswith('data:image/png;base64,') for a in shots) and len(shots) % 3 == 0 and len(shots) >= 30
    sizes = [Image.open(io.BytesIO(base64.b64decode(a['src'].split(',', 1)[1]))).size for a in shots[:3]]
    assert [a['alt'] for a in shots[:3]] == ['picture', 'heat', 'crop'] and sizes == [(32, 32), (32, 32), (9, 9)]
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(shots[1]['src'].split(',', 1)[1]))).convert('L'), np.float64)
    red_at = np.asarray(Image.open(io.BytesIO(base64.b64decode(shots[0]['src'].split(',', 1)[1]))).convert('RGB'), np.float64)
    assert heat.std() > 0 and red_at[..., 0].max() == 255             # the frame
    bars = [float(a['height']) for a in page.all('rect')]
    assert len(bars) == 20 and max(bars) == 95 and min(bars) >= 0 and sum(b > 0 for b in bars) >= 2
    rows = list(csv.DictReader(open(tmp_path/'scan'/'findings.csv', encoding='utf-8')))
    assert not any(r['key'].startswith('=') for r in rows)


def test_a_clean_set_says_so(tmp_path):
    found = scan_corpus(ArrayCorpus(torch.stack([*pictures(60, 0)])), red(), tmp_path/'scan', how, quiet=True)
    page = Page((tmp_path/'scan'/'report.html').read_text(encoding='utf-8'))
    assert found.verdict == NO_EVIDENCE and 'no evidence of a patch trigger' in page.text and 'Nothing was removed' in page.text
    assert (tmp_path/'scan'/'removed.txt').read_text() == '' and len(read_keys(tmp_path/'scan'/'kept.txt')) == 60


def test_parquet_says_the_same(tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    found = scan_corpus(ArrayCorpus(torch.stack([*pictures()])), red(), tmp_path/'scan', Every(), quiet=True)
    table = parquet.read_table(tmp_path/'scan'/'findings.parquet')
    assert table.to_pylist() == found.rows() and len(found.rows()) == 60
    scan_corpus(ArrayCorpus(torch.stack([*pictures(60, 0)])), red(), tmp_path/'clean', how, quiet=True)
    assert parquet.read_schema(tmp_path/'clean'/'findings.parquet') == table.schema       # also where nothing has a probability


def test_empty_cells_are_empty():
    "A picture that was not examined has no number, and nothing that stands for one."
    assert [cell(v) for v in (None, '', -1., '-1', '=1', 'a', True)] == ['', '', '-1', "'-1", "'=1", 'a', 'True']


def test_a_key_is_one_cell_in_any_spreadsheet(tmp_path):
    "Some separate cells at semicolons, and read full-width signs as plain ones."
    keys = ['cat/x;=1+2;.png', '\uff1d1+2.png', '\n=1', *(f'{i:02d}' for i in range(57))]
    pile = ArrayCorpus(torch.stack([*pictures()]), keys)
    found = scan_corpus(pile, red(), tmp_path/'scan', how, quiet=True)
    text = (tmp_path/'scan'/'findings.csv').read_bytes().decode()
    assert '"cat/x;=1+2;.png"' in text and '"\'\uff1d1+2.png"' in text and '"\'\n=1"' in text
    assert all(len(row) == len(COLUMNS) for row in csv.reader(text.splitlines(keepends=True))) and found.keys == keys


def test_few_pictures_are_called_few(tmp_path):
    found = scan_corpus(ArrayCorpus(torch.stack([*pictures()])), red(), tmp_path/'scan', how, quiet=True)
    assert found.verdict == FOUND and '60 pictures are few' in found.evidence['warning'] and found.keep.any()
    text = Page((tmp_path/'scan'/'report.html').read_text(encoding='utf-8')).text
    assert '60 pictures are few' in text and 'Scoring stops early' not in text                        # there is one look
    assert '60 pictures are few' in read_json(tmp_path/'scan'/'scan.json')['warning']


def test_the_report_says_what_early_stopping_may_miss(tmp_path):
    found = scan_corpus(ArrayCorpus(torch.stack([*pictures()])), red(), tmp_path/'scan', replace(how, look=8), quiet=True)
    text, bound = Page((tmp_path/'scan'/'report.html').read_text(encoding='utf-8')).text, found.evidence['miss_bound']
    assert 0 < bound < 1 and f'is lost so with a probability of {bound:.0%}' in text


def test_a_filter_that_spares_nobody_is_no_finding(monkeypatch):
    "It has learned nothing; to leave out every picture helps nobody."
    monkeypatch.setattr(Search, 'classify', lambda self, net: dict(probability=torch.ones(self.n)))
    found = how.scan(ArrayCorpus(torch.stack([*pictures()])), red(), quiet=True)
    assert found.verdict == NO_EVIDENCE and found.keep.all()
    reached = max(l['reached'] for l in found.evidence['looks'])
    assert reached and f'{reached} crops reach the bar, but the poison classifier suspects every picture' in found.evidence['warning']


@pytest.mark.parametrize('said, words', [(0., 'clears every picture, so nothing is removed'), (None, 'of 60 pictures are suspects, more than half')])
def test_a_filter_that_clears_all_or_suspects_most_is_no_quiet_matter(monkeypatch, tmp_path, said, words):
    opinion = torch.full((60,), said) if said is not None else (torch.arange(60) % 3 > 0).float()
    monkeypatch.setattr(Search, 'classify', lambda self, net: dict(probability=opinion))
    detector = replace(how, acquit=None)
    found = scan_corpus(ArrayCorpus(torch.stack([*pictures()])), red(), tmp_path/'scan', detector, quiet=True)
    assert found.verdict == FOUND and words in found.evidence['warning']
    text = Page((tmp_path/'scan'/'report.html').read_text(encoding='utf-8')).text
    assert words in text and f"classifier {opinion[found.top(1)].item():.0%}, {'kept' if found.keep[found.top(1)] else 'removed'}" in text
    assert read_json(tmp_path/'scan'/'scan.json')['image_size'] == 32


def test_a_picture_without_finite_features_is_named():
    class Picky(type(red().net)):
        def forward(self, x): return super().forward(x) + torch.where(x.amax((1, 2, 3)) > .99, float('nan'), 0.)[:, None]
    images = torch.stack([*pictures(60, 0)]).clamp(max=200)
    images[37, 0, 0, 0] = 255
    net = red()
    net.net = Picky()
    with pytest.raises(BdnbError, match='not finite, first for picture 000037'):
        replace(how, batch=16).scan(ArrayCorpus(images, [f'{i:06}' for i in range(60)]), net, quiet=True)


def test_a_scan_of_a_changed_pile_or_encoder_begins_anew(tmp_path):
    images = torch.stack([*pictures(60, 0)])
    assert how.scan(ArrayCorpus(images), red(), tmp_path, quiet=True).verdict == NO_EVIDENCE
    poisoned = torch.stack([*pictures()])
    assert how.scan(ArrayCorpus(poisoned), red(), tmp_path, quiet=True).verdict == FOUND
    one, two = red(), red()
    two.mean += .1
    assert contents(images, ['a'], one) == contents(images, ['a'], red()) != contents(images, ['a'], two)


def test_a_scan_of_other_pictures_is_not_written_over(tmp_path, tiny):
    one, other = (fill(tmp_path/name, 12, 0, broken=False) for name in ('one', 'other'))
    line = ['--encoder', tiny, '--out', tmp_path/'scan', '--clusters', 2, '-q']
    for _ in range(2):
        code, _, err = run('scan', f'folder:{one}', *line)
        assert code == 0, err
    before = (tmp_path/'scan'/'findings.csv').read_bytes()
    code, _, err = run('scan', f'folder:{other}', *line)
    assert code == 2 and 'holds the scan of' in err and (tmp_path/'scan'/'findings.csv').read_bytes() == before, err


def test_a_folder_with_other_files_is_not_a_scans(tmp_path, tiny):
    "A project may have a folder of that name, and a metrics.json of its own."
    pile, line = fill(tmp_path/'pile', 12, 0, broken=False), ('--encoder', tiny, '--clusters', 2, '-q')
    for name, held in (('a', ('encoder/x.py', 'metrics.json', 'train.py')), ('b', ('metrics.json',)), ('c', ('report.html',))):
        for f in held:
            (tmp_path/name/f).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/name/f).write_text('mine')
        code, _, err = run('scan', f'folder:{pile}', '--out', tmp_path/name, *line)
        assert code == 2 and 'holds other files' in err and err.count('\n') == 1, err
        assert all((tmp_path/name/f).read_text() == 'mine' for f in held)
    for _ in range(2):
        code, _, err = run('scan', f'folder:{pile}', '--out', tmp_path/'d', *line)
        assert code == 0, err
        (tmp_path/'d'/'.DS_Store').write_text('')                                    # whoever looks into it leaves that


def test_a_table_whose_name_begins_with_a_tilde(tmp_path, tiny, monkeypatch):
    pile = fill(tmp_path/'pile', 12, 0, broken=False)
    monkeypatch.chdir(tmp_path)
    rows = [f"{p},0" for p in sorted(pile.rglob('*.png'))]
    (tmp_path/'~pairs.csv').write_text('\n'.join(['image,label', *rows]))
    code, _, err = run('scan', 'csv:~pairs.csv', '--encoder', tiny, '--out', tmp_path/'scan', '--clusters', 2, '-q')
    assert code == 0 and len(CsvCorpus(tmp_path/'scan'/'kept.csv')) == 12, err


def test_a_finished_scan_is_not_written_over_by_other_options(tmp_path, tiny):
    pile, net = fill(tmp_path/'pile', 12, 0, broken=False), tmp_path/'other.safetensors'
    save_encoder(create_encoder('vit_tiny/8', image_size=32), net)
    command = lambda *more: run('scan', f'folder:{pile}', '--out', tmp_path/'scan', '--clusters', 2, '-q', *more)
    assert command('--encoder', tiny)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path/'scan').iterdir() if p.is_file()}
    for why, *more in (('window=[0.27, 0.36], not [0.5]', '--encoder', tiny, '--window', '.5'), ('seed=0, not 1', '--encoder', tiny, '--seed', 1),
                       ('holds a scan with another encoder', '--encoder', net)):
        code, _, err = command(*more)
        assert code == 2 and why in err and 'choose another folder as --out' in err and err.count('\n') == 1, err
        assert before == {p.name: p.read_bytes() for p in (tmp_path/'scan').iterdir() if p.is_file()}


def test_a_finished_scan_is_not_written_over_by_other_pictures(tmp_path, tiny, monkeypatch):
    "Under the same line: a pile of which pictures were deleted, and one of the same name in another place."
    here, there = (fill(tmp_path/name/'pile', 14, 0, broken=False) for name in ('here', 'there'))
    (there/'class 0'/'012.png').unlink()
    files = lambda: {p: p.read_bytes() for p in (tmp_path/'scan').rglob('*') if p.is_file()}
    def scan(folder):
        monkeypatch.chdir(folder.parent)
        return run('scan', 'folder:pile', '--encoder', tiny, '--out', tmp_path/'scan', '--clusters', 2, '-q')
    assert scan(here)[0] == 0
    before, last = files(), here/'class 1'/'013.png'
    picture = last.read_bytes()
    last.unlink()
    for folder in (here, there):
        code, _, err = scan(folder)
        assert code == 2 and 'holds a scan of other pictures; choose another folder as --out' in err and err.count('\n') == 1, err
        assert files() == before
    last.write_bytes(picture)                                         # all are there again: the scan that it was
    assert scan(here)[0] == 0


class Sixths(Every):
    "Another detector, which says with what settings it works."
    def __init__(self, of=6): self.of = of
    def settings(self, size, device): return dict(of=self.of)
    def scan(self, *args):
        found = super().scan(*args)
        found.evidence['settings'] = self.settings(32, None)
        return found


def test_a_library_call_does_not_write_over_a_finished_scan_either(tmp_path):
    images = torch.stack([*pictures()])
    scan = lambda images, net, detector, out='sixths': scan_corpus(ArrayCorpus(images), net, tmp_path/out, detector, quiet=True)
    scan(images, red(), Sixths())
    scan(images, red(), Sixths())
    scan(images, red(), Every(), 'every')                             # says no settings
    before, other, far = (tmp_path/'sixths'/'scan.json').read_bytes(), images.clone(), red()
    other[7, 0, 0, 0] += 1
    far.mean += .1
    for why, *call in (('of other pictures', other, red(), Sixths()), ('with another encoder', images, far, Sixths()),
                       ('by another detector', images, red(), Every()), ('by another detector', images, red(), how),
                       ('by another detector', images, red(), PatchSearch()), ('of=6, not 3', images, red(), Sixths(3))):
        with pytest.raises(BdnbError, match=f'sixths: .*{why}; choose another folder'): scan(*call)
        assert (tmp_path/'sixths'/'scan.json').read_bytes() == before and not (tmp_path/'sixths'/'stages').exists()
    with pytest.raises(BdnbError, match='every: holds a scan of other pictures'): scan(other, red(), Every(), 'every')


def test_the_rival_says_its_settings(tmp_path):
    images, quiet = torch.stack([*pictures()]), PatchSearch(clusters=2, tests=8, layer='first', filter=quick)
    net = red()
    net.net.first = nn.Identity()
    said = quiet.settings(32)
    assert said['filter']['steps'] == 40 and said['clusters'] == 2
    (tmp_path/'scan.json').write_text(json.dumps(dict(settings=said)))
    for other in (replace(quiet, seed=1), replace(quiet, filter=replace(quick, steps=41))):
        with pytest.raises(BdnbError, match='was made with (seed=0, not 1|filter.steps=40, not 41)'):
            scan_corpus(ArrayCorpus(images), net, tmp_path, other, quiet=True)


@pytest.mark.parametrize('text', ['[]', '3', '"words"', 'null', '{"settings": []}', '{"settings": "a"}', '{"settings": null}'])
def test_a_file_that_no_scan_wrote_is_named(tmp_path, tiny, text):
    pile = fill(tmp_path/'pile', 12, 0, broken=False)
    (tmp_path/'scan'/'stages').mkdir(parents=True)
    (tmp_path/'scan'/'scan.json').write_text(text)
    code, _, err = run('scan', f'folder:{pile}', '--encoder', tiny, '--out', tmp_path/'scan', '-q')
    assert code == 2 and 'scan.json: is not what a scan wrote' in err and err.count('\n') == 1, err


def test_nothing_is_trained_beside_the_scan_of_another_encoder(tmp_path, tiny, monkeypatch):
    pile = fill(tmp_path/'pile', 12, 0, broken=False)
    command = lambda *more: run('scan', f'folder:{pile}', '--out', tmp_path/'scan', '--clusters', 2, '-q', *more)
    assert command('--encoder', tiny)[0] == 0
    def train(*args, **options): raise AssertionError('it trains')
    monkeypatch.setattr(ssl, 'train_encoder', train)
    before = {p.name for p in (tmp_path/'scan').rglob('*')}
    code, _, err = command('--train', 'moco')
    assert code == 2 and 'holds a scan with another encoder than --train would make' in err and err.count('\n') == 1, err
    assert {p.name for p in (tmp_path/'scan').rglob('*')} == before
    alone = 'scan', f'folder:{pile}', '--out', tmp_path/'new', '--train', 'moco', '-q'
    code, _, err = run(*alone)
    assert code == 2 and '--train: 12 pictures do not fill one batch of 64' in err and '--encoder' in err, err
    fill(pile, 64, 0, broken=False)
    with pytest.raises(AssertionError, match='it trains'): run(*alone)


SAID = dict(kind='findings', keys=['a', 'b', 'c'], verdict=FOUND, evidence=dict(acquitted=0))


def parts():
    nan, whole = torch.full((3,), float('nan')), torch.zeros(3, dtype=torch.int64)
    return dict(score=nan, cluster=whole, window=torch.zeros(3, 4, dtype=torch.int64), probability=nan, keep=whole.bool())


@pytest.mark.parametrize('change', [
    dict(kind='scan'), dict(keys=3), dict(keys='abc'), dict(keys=['a', 'b']), dict(keys=['a', 'b', 3]), dict(keys=dict(a=1, b=2, c=3)),
    dict(keys=None), dict(verdict=None), dict(verdict='perhaps'), dict(verdict=[FOUND]), dict(evidence=None), dict(evidence=[]),
    dict(score=torch.tensor(1.)), dict(score=torch.zeros(3, dtype=torch.float64)), dict(score=torch.zeros(3, 1)), dict(score=None),
    dict(cluster=torch.zeros(3)), dict(window=torch.zeros(3, dtype=torch.int64)), dict(window=torch.zeros(3, 5, dtype=torch.int64)),
    dict(window=torch.zeros(3, 4)), dict(probability=torch.zeros(2)), dict(keep=torch.zeros(3))])
def test_a_file_that_holds_no_findings_is_named(tmp_path, change):
    path = tmp_path/'found.safetensors'
    write_tensors(parts(), path, SAID)
    assert load_findings(path).keys == SAID['keys']                   # whole, it is read
    tensors, said = ({k: v for k, v in (d | {k: change[k] for k in change if k in d}).items() if v is not None} for d in (parts(), SAID))
    write_tensors(tensors, path, said)
    with pytest.raises(BdnbError, match='found.safetensors: holds no findings'): load_findings(path)


@pytest.mark.parametrize('n, k', [(8, 2), (24, 3), (80, 10), (900, 10), (2000, 20)])
def test_small_piles_have_clusters_too(n, k):
    "With two clusters any odd crop moves the pictures between them."
    pile = ArrayCorpus(torch.zeros(n, 3, 32, 32, dtype=torch.uint8))
    assert Search(PoisonCAM(), pile, red(), Scan(None, quiet=True), torch.device('cpu')).k == k


def test_several_machines_are_refused(monkeypatch):
    from bdnb.defenses.findings import Team
    for k, v in dict(WORLD_SIZE='4', LOCAL_WORLD_SIZE='2').items(): monkeypatch.setenv(k, v)
    with pytest.raises(BdnbError, match='4 processes, 2 of them on this machine: a scan runs on one'): Team(cpu=True)
