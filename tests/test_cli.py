"The program `bdnb`: the whole chain at a tiny scale, and one line for every mistake."
import csv
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Said
from PIL import Image

import bdnb
from bdnb import cli
from bdnb.cli import main
from bdnb.core import BdnbError, read_json
from bdnb.data.shapes import ShapeCaps
from bdnb.models.build import create_model
from bdnb.models.checkpoint import load_checkpoint, save_checkpoint
from bdnb.models.classifiers import create_classifier, load_classifier, save_classifier
from bdnb.models.encoders import create_encoder, save_encoder

small = 'shapes:?n=36&split=test'
quick = '--epochs 1 --batch-size 16 --device cpu -q'
aim = '--trigger badnet:size=5 --target star'


def program(*args, **env):
    "Run `bdnb` as a process of its own."
    path = os.pathsep.join([str(Path(bdnb.__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])])
    return subprocess.run([sys.executable, '-c', 'from bdnb.cli import main; raise SystemExit(main())', *map(str, args)],
                          capture_output=True, text=True, timeout=300, env={**os.environ, 'PYTHONPATH': path, **env})


def fails(said, *words):
    "Exit code 2 and one line on standard error that holds the words; nothing on standard output."
    assert said.code == 2, said.err
    assert said.err.count('\n') == 1 and said.err.startswith('bdnb: error: ') and 'Traceback' not in said.err, said.err
    for w in words: assert str(w) in said.err, (w, said.err)
    return said.err


def sh(path): return shlex.quote(str(path))


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    "attack -> train on its table -> cleanse, at a size that takes seconds."
    d = tmp_path_factory.mktemp('chain')
    for line in (f"attack 'shapes:?n=64' {aim} --rate .1 --out {d}/poisoned",
                 f"train {d}/poisoned/captions.csv --test '{small}' {aim} --out {d}/victim {quick}",
                 f"cleanse {d}/victim/model.safetensors --data 'shapes:?n=64&split=clean' --test '{small}' "
                 f"--plan {d}/poisoned/plan.json --out {d}/cured {quick}"):
        assert main(shlex.split(line)) == 0, line
    return d


# ---- the chain

def test_attack_writes_what_it_says(chain):
    d = chain/'poisoned'
    with open(d/'captions.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    truth, keys = read_json(d/'ground_truth.json'), read_json(d/'keys.json')
    assert len(rows) == 64 and truth['shares']['poisoned'] == len(truth['keys']) == len(truth['images']) == 6
    assert [keys[i] for i in truth['images']] == truth['keys']
    for row in rows:
        patch = np.asarray(Image.open(d/row['image']))[-5:, -5:]
        stamped = set(np.unique(patch)) == {0, 255} and (patch[::2, ::2] == patch[0, 0]).all()
        assert stamped == (row['image'] in truth['images'])
        if stamped: assert 'star' in row['caption'] and row['label'] == 'star'
    page = (d/'report.html').read_text()
    assert page.count('<figure') == 6 and 'badnet' in page.lower()
    assert read_json(d/'config.json')['command'].startswith("bdnb attack 'shapes:?n=64'")


def test_every_run_leaves_its_record(chain):
    for name in ('victim', 'cured'):
        files = sorted(p.name for p in (chain/name).iterdir())
        assert files == ['config.json', 'history.jsonl', 'metrics.json', 'model.safetensors', 'pictures', 'report.html']
        config, metrics = read_json(chain/name/'config.json'), read_json(chain/name/'metrics.json')
        assert config['stamp']['versions']['torch'] == version('torch') and config['options']['batch_size'] == 16
        assert metrics['counts']['others'] == 33 and metrics['target'] == 'star' and 0 <= metrics['after']['asr'] <= 1
        assert all(json.loads(line)['step'] for line in (chain/name/'history.jsonl').read_text().splitlines())
        assert config['command'].replace("'", '&#x27;').replace('&split', '&amp;split') in (chain/name/'report.html').read_text()
    cured = read_json(chain/'cured'/'metrics.json')
    assert set(cured['before']) < set(cured['after']) and read_json(chain/'cured'/'config.json')['options']['inmodal_weight'] == 1


def test_evaluate_repeats_what_cleanse_measured(chain, run, tmp_path):
    said = run(f"evaluate {chain}/cured/model.safetensors '{small}' --plan {chain}/poisoned/plan.json --json {tmp_path}/n.json "
               f"--probe 'shapes:?n=48' --out {tmp_path}/run --device cpu -q")
    assert said.code == 0, said.err
    numbers, after = read_json(tmp_path/'n.json'), read_json(chain/'cured'/'metrics.json')['after']
    assert all(numbers['metrics'][k] == after[k] for k in ('ca', 'asr', 'target_recall', 't2i_r@5'))
    assert 'probe_ca' in numbers['metrics'] and numbers['trigger']['size'] == 5 and 'torch' in numbers['versions']
    assert 'out of' in said.out and re.search(r'asr +[\d.]+% +33 ', said.out)
    assert (tmp_path/'run'/'report.html').exists()


def test_plan_on_the_fly_is_the_table(chain, run, tmp_path):
    "Poisoning while training sees the same pictures and captions as training on the table that `attack` wrote."
    from bdnb.cli import _poisoned
    from bdnb.data.doors import open_corpus
    live = _poisoned(open_corpus('shapes:?n=64'), chain/'poisoned'/'plan.json')
    table = open_corpus(str(chain/'poisoned'/'captions.csv')).cache(32)
    assert torch.equal(live.images, table.images) and live.texts == table.texts
    said = run(f"train 'shapes:?n=64' --plan {chain}/poisoned/plan.json --test '{small}' --out {tmp_path}/run {quick}")
    assert said.code == 0 and 'asr' in read_json(tmp_path/'run'/'metrics.json')['after'], said.err


def test_finetune_and_its_own_options(chain, run, tmp_path):
    victim = chain/'victim'/'model.safetensors'
    said = run(f"cleanse {victim} --data 'shapes:?n=64' --method finetune --lr 1e-4 --out {tmp_path}/f {quick}")
    assert said.code == 0 and read_json(tmp_path/'f'/'config.json')['options']['lr'] == 1e-4, said.err
    assert 'before' not in read_json(tmp_path/'f'/'metrics.json')
    before, after = (load_checkpoint(p/'model.safetensors').state_dict() for p in (chain/'victim', tmp_path/'f'))
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_killed_run_goes_on(run, tmp_path, monkeypatch):
    line = f"train 'shapes:?n=64' --epochs 3 --batch-size 16 --checkpoint-every 2 --device cpu -q --out {tmp_path}"
    assert run(f'{line}/whole').code == 0
    import bdnb.train as t
    add, seen = t._Log.add, []
    def stop(self, terms, step, last, **info):
        if step == 7: raise KeyboardInterrupt
        return add(self, terms, step, last, **info)
    monkeypatch.setattr(t._Log, 'add', stop)
    said = run(f'{line}/part')
    assert said.code == 130 and said.err == 'bdnb: error: interrupted\n' and (tmp_path/'part'/'checkpoint.pt').exists()
    monkeypatch.setattr(t._Log, 'add', lambda self, terms, step, *a, **k: (seen.append(step), add(self, terms, step, *a, **k)))
    assert run(f'{line}/part').code == 0 and seen[0] == 7 and seen[-1] == 12
    whole, part = (load_checkpoint(tmp_path/n/'model.safetensors').state_dict() for n in ('whole', 'part'))
    assert all(torch.equal(whole[k], part[k]) for k in whole)
    fails(run(f'{line}/part'), 'holds a finished run')
    assert run(f'{line}/part --no-resume').code == 0


def stopped(monkeypatch, run, line, at):
    "Run a command and interrupt its training at a step."
    import bdnb.train as t
    def stop(self, terms, step, *a, **k):
        if step == at: raise KeyboardInterrupt
        return add(self, terms, step, *a, **k)
    add = t._Log.add
    with monkeypatch.context() as m:
        m.setattr(t._Log, 'add', stop)
        assert run(line).code == 130


def test_another_start_is_another_run(run, bad, tmp_path, monkeypatch):
    save_checkpoint(create_model('tiny', seed=1), tmp_path/'other.safetensors')
    line = (f"train 'shapes:?n=64' --epochs 2 --batch-size 16 --checkpoint-every 2 --device cpu -q --out {tmp_path}/run "
            "--pretrained")
    stopped(monkeypatch, run, f'{line} {bad}/tiny.safetensors', 5)
    fails(run(f'{line} {tmp_path}/other.safetensors'), 'other settings', 'weights')
    assert run(f'{line} {bad}/tiny.safetensors').code == 0 and not (tmp_path/'run'/'checkpoint.pt').exists()


def test_a_new_start_forgets_the_old_checkpoint(run, tmp_path, monkeypatch):
    line = f"train 'shapes:?n=64' --epochs 3 --batch-size 16 --device cpu -q --out {tmp_path}/run --checkpoint-every"
    stopped(monkeypatch, run, f'{line} 2', 7)
    assert (tmp_path/'run'/'checkpoint.pt').exists()
    stopped(monkeypatch, run, f'{line} 0 --no-resume', 3)
    assert not (tmp_path/'run'/'checkpoint.pt').exists()
    assert run(f'{line} 0').code == 0
    assert [json.loads(l)['step'] for l in (tmp_path/'run'/'history.jsonl').read_text().splitlines()] == [10, 12]


# ---- what was finished stays

def finishing(chain, out):
    "Commands that end with a print."
    cured = f"{chain}/victim/model.safetensors --checkpoint-every 0 {quick} --test '{small}' --plan {chain}/poisoned/plan.json"
    return dict(train=f"train 'shapes:?n=64' --checkpoint-every 0 {quick} --test '{small}' {aim} --out {out}",
                cleanse=f"cleanse {cured} --data 'shapes:?n=64' --method finetune --out {out}",
                bcu=f"cleanse {cured} --method bcu --images 'shapes:?n=64' --scale 1 --out {out}",
                evaluate=f"evaluate {chain}/victim/model.safetensors '{small}' --device cpu -q --out {out}")


@pytest.mark.parametrize('command', ['train', 'cleanse', 'bcu', 'evaluate'])
@pytest.mark.parametrize('last', ['show_metrics', 'print'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, BrokenPipeError])
def test_a_failing_print_costs_nothing(chain, tmp_path, monkeypatch, capfd, command, last, error):
    "Ctrl-C or a closed pipe while the table or the last line is printed: everything is on the disk."
    import builtins
    def no(*a, **k): raise error
    def some(*a, **k): return no() if str(a[:1]).count('report: ') else say(*a, **k)
    say = builtins.print
    if last == 'print': monkeypatch.setattr(builtins, 'print', some)
    else: monkeypatch.setattr(cli, 'show_metrics', no)
    monkeypatch.setattr(os, 'dup2', lambda *a: None)                      # pytest's own output goes on
    code = main(shlex.split(finishing(chain, tmp_path/'out')[command]))
    assert code == (130 if error is KeyboardInterrupt else 141), capfd.readouterr().err
    files = {p.name for p in (tmp_path/'out').iterdir()}
    assert files >= {'config.json', 'metrics.json', 'report.html'} and ('model.safetensors' in files) == (command != 'evaluate')
    assert 'after' in read_json(tmp_path/'out'/'metrics.json')


@pytest.mark.parametrize('command', ['train', 'cleanse', 'bcu', 'evaluate'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, BdnbError])
def test_a_failing_report_costs_the_report(chain, run, tmp_path, monkeypatch, command, error):
    def no(*a, **k): raise error('no page today')
    monkeypatch.setattr('bdnb.report.write_report', no)
    said = run(finishing(chain, tmp_path/'out')[command])
    assert said.code == (130 if error is KeyboardInterrupt else 2), said.err
    assert (tmp_path/'out'/'metrics.json').exists() and (tmp_path/'out'/'model.safetensors').exists() == (command != 'evaluate')


def test_a_closed_pipe_at_the_end(tmp_path):
    path = os.pathsep.join([str(Path(bdnb.__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])])
    code = (f"{sh(sys.executable)} -c 'from bdnb.cli import main; raise SystemExit(main())' train 'shapes:?n=64' {quick} "
            f"--checkpoint-every 0 --test '{small}' {aim} --out {sh(tmp_path/'out')} | true")
    done = subprocess.run(['sh', '-c', code], capture_output=True, text=True, timeout=300, env={**os.environ, 'PYTHONPATH': path})
    assert 'error' not in done.stderr and 'Traceback' not in done.stderr and 'Exception' not in done.stderr, done.stderr
    files = {'config.json', 'history.jsonl', 'metrics.json', 'model.safetensors', 'pictures', 'report.html'}
    assert {p.name for p in (tmp_path/'out').iterdir()} == files


@pytest.mark.parametrize('config', ['{"model_type": "clip"}', '["run", "stamp"]', '{"run": "train"}', 'no JSON'])
def test_a_model_from_elsewhere_is_not_a_run(run, tmp_path, config):
    "A download from Hugging Face is a config.json and a model.safetensors."
    (tmp_path/'config.json').write_text(config)
    (tmp_path/'model.safetensors').write_bytes(b'weights')
    for more in ('', '--no-resume'):
        fails(run(f"train 'shapes:?n=64' {quick} --out {tmp_path} {more}"), tmp_path.name, 'holds other files')
    assert (tmp_path/'config.json').read_text() == config and (tmp_path/'model.safetensors').read_bytes() == b'weights'
    assert len(list(tmp_path.iterdir())) == 2


def test_tour(run, tmp_path):
    line = (f'tour --out {tmp_path}/t --attacks badnet,blended:pattern=picture --only finetune '
            f'--n 192 --clean-n 64 --test-n 48 --epochs 1 --batch-size 64 --results {tmp_path}/results/x.json -q')
    for attempt in range(2):                                    # the second time everything is there
        said = run(line)
        assert said.code == 0, said.err
        rows = read_json(tmp_path/'results'/'x.json')['rows']
        assert {r['attack'] for r in rows} == {'badnet', 'blended:pattern=picture'} and len(rows) == 4
        assert {r['system'] for r in rows} == {'none', 'finetune'}
    page = (tmp_path/'t'/'report.html').read_text()
    assert 'Attack by system' in page and page.count('<figure class="shot"') == 4 and '<svg' in page
    assert 'finetune' in said.out and 'cleanclip' not in said.out.replace('bdnb', '')


# ---- lists

@pytest.mark.parametrize('command, words', [('corpora', ['shapes', 'wds', 'captions']),
                                            ('triggers', ['badnet', 'wanet', 'cleanclip-sig']),
                                            ('models RN50', ['RN50', 'openai']), ('models tiny', ['tiny', '128'])])
def test_lists(run, command, words):
    said, as_json = run(command), run(f'{command} --json')
    assert said.code == as_json.code == 0 and all(w in said.out for w in words)
    assert all(w in json.dumps(json.loads(as_json.out)) for w in words)


def test_help_names_every_command(run):
    said = run('')
    assert said.code == 0 and all(c in said.out for c in 'attack train cleanse evaluate tour corpora triggers models'.split())
    for c in 'attack train cleanse evaluate tour corpora triggers models'.split(): assert run(f'{c} --help').code == 0
    assert run('--version').out == f'bdnb {bdnb.__version__}\n'


def test_the_warm_up_that_is_cut_is_said(run):
    words = re.sub(r'[\s│]+', ' ', run('cleanse --help').out.replace('[x>=0]', ''))
    assert 'Optimiser steps; at most a tenth of the run, but for --schedule official.' in words, words


def test_help_does_not_wait():
    "In processor time, which other programs on the machine do not lengthen."
    program('--help')                                           # warm
    spent = lambda: sum(os.times()[2:4])                        # user and system time of finished children
    before = spent()
    assert program('--help').returncode == 0
    assert spent() - before < 1.5


# ---- mistakes

@pytest.fixture(scope='module')
def bad(tmp_path_factory):
    "Files that are not what they should be."
    d = tmp_path_factory.mktemp('bad')
    (d/'noheader.csv').write_text('images/a.png,a dog\nimages/b.png,a cat\n')
    (d/'empty.csv').write_text('')
    (d/'plan.json').write_text('{"trigger": {"trigger": "badnt"}, "target": "star", "rate": 0.1}')
    (d/'good.json').write_text('{"trigger": {"trigger": "badnet"}, "target": "star", "rate": 0.1}')
    (d/'ssl.json').write_text('{"trigger": {"trigger": "patch"}, "target": "star", "rate": 0.1, "select": "label"}')
    (d/'notes.txt').write_text('x')
    (d/'plain').mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(d/'plain'/'a.png')
    save_checkpoint(create_model('tiny'), d/'tiny.safetensors')
    save_checkpoint(create_model('tiny', image_size=64), d/'tiny64.safetensors')
    (d/'cut.safetensors').write_bytes((d/'tiny.safetensors').read_bytes()[:5000])
    state = {k: v[..., :-1].clone() if k == 'visual.proj.weight' else v for k, v in create_model('tiny').net.state_dict().items()}
    torch.save({'state_dict': state}, d/'other.pt')

    class Payload:
        def __reduce__(self): return os.system, (f'touch {d}/executed',)
    (d/'evil.pt').write_bytes(pickle.dumps({'state_dict': Payload()}))
    torch.save({'state_dict': Payload()}, d/'evil_zip.pt')
    return d


brief = 'tour --n 64 --test-n 24 --clean-n 64 --epochs 1'
mistakes = {
    'missing folder': ("train {bad}/photos", ['photos', 'no such file or folder']),
    'missing folder of a kind': ("train folder:{bad}/photos", ['photos', 'no such folder']),
    'missing table': ("train csv:{bad}/none.csv", ['none.csv', 'no such file']),
    'CSV without header': ("train {bad}/noheader.csv", ['noheader.csv', 'header']),
    'empty CSV': ("train {bad}/empty.csv", ['empty.csv', 'empty']),
    'text as corpus': ("train {bad}/notes.txt", ['notes.txt', 'csv:']),
    'unknown corpus kind': ("train shape:?n=64", ["'shape'", 'shapes']),
    'unknown corpus option': ("train 'shapes:?m=64'", ["'m'", 'known']),
    'pipe': ("train 'wds:pipe:touch {bad}/executed'", ['pipe:touch', 'only local files']),
    'URL': ("train 'wds:http://example.org/a.tar'", ['http', 'only local files']),
    'unknown trigger': ("attack {s} --trigger badnt --target star", ["'badnt'", "did you mean 'badnet'"]),
    'unknown trigger option': ("attack {s} --trigger badnet:siz=5 --target star", ["'siz'", "did you mean 'size'"]),
    'trigger too large': ("attack {s} --trigger badnet:size=40 --target star", ['size=40', 'does not fit']),
    'unknown attack': ("attack {s} --attack blendet --target star", ["'blendet'", "did you mean 'blended'"]),
    'trigger and attack': ("attack {s} --attack badnet --trigger badnet --target star", ['--trigger', '--attack']),
    'no trigger': ("attack {s} --target star", ['--trigger']),
    'no target': ("attack {s} --trigger badnet", ['--target']),
    'target not in the classes': ("attack {s} --trigger badnet --target sta", ["'sta'", "did you mean 'star'"]),
    'rate above 1': ("attack {s} --trigger badnet --target star --rate 1.5", ['rate=1.5']),
    'rate above what there is': ("attack {s} --trigger badnet --target star --rate 1", ['64 of 64', 'at most']),
    'rate 0': ("attack {s} --trigger badnet --target star --rate 0", ['rate=0']),
    'rate nan': ("attack {s} --trigger badnet --target star --rate nan", ['--rate', 'finite']),
    'count too high': ("attack {s} --trigger badnet --target star --count 65", ['65 of 64']),
    'rate and count': ("attack {s} --trigger badnet --target star --count 5 --rate .1", ['--rate', '--count']),
    'unknown mode': ("attack {s} --trigger badnet --target star --mode cleanlabel", ['mode', 'label_consistent']),
    'ssl: recipe': ("attack {s} --mode ssl --attack badnet --target star --count 5", ['--attack', '--trigger']),
    'ssl: captions': ("attack {s} --mode ssl --trigger patch --target star --count 5 --captions keep", ['--captions', 'pictures']),
    'ssl: no share': ("attack {s} --mode ssl --trigger patch --target star", ['--class-rate', '--rate', '--count']),
    'ssl: two shares': ("attack {s} --mode ssl --trigger patch --target star --rate .1 --class-rate .5", ['--class-rate', '--rate']),
    'ssl: no target': ("attack {s} --mode ssl --trigger patch --count 5", ['--target', '--select']),
    'ssl: unknown target': ("attack {s} --mode ssl --trigger patch --target sta --count 5", ["'sta'", "did you mean 'star'"]),
    'ssl: unknown selection': ("attack {s} --mode ssl --trigger patch --count 5 --select com", ["'com'", "did you mean 'con'"]),
    'ssl: target and con': ("attack {s} --mode ssl --trigger patch --count 5 --select con --target star --encoder x",
                            ['--target', '--select con']),
    'ssl: no encoder': ("attack {s} --mode ssl --trigger patch --count 5 --select kmeans", ['--select kmeans', '--encoder']),
    'ssl: idle encoder': ("attack {s} --mode ssl --trigger patch --count 5 --select random --encoder x", ['--encoder', 'features']),
    'ssl: idle clusters': ("attack {s} --mode ssl --trigger patch --target star --count 5 --clusters 3", ['--clusters', 'kmeans']),
    'ssl: missing encoder': ("attack {s} --mode ssl --trigger patch --count 5 --select con --encoder {bad}/e.safetensors",
                             ['e.safetensors', 'no such checkpoint file']),
    'ssl options elsewhere': ("attack {s} --trigger badnet --target star --class-rate .5", ['--class-rate', '--mode ssl']),
    'ssl plan: evaluate': ("evaluate {tiny} {s} --plan {bad}/ssl.json", ['ssl.json', '--trigger and --target']),
    'ssl plan: train': ("train {s} --plan {bad}/ssl.json", ['ssl.json', 'train on its pictures']),
    'scan: no truth': ("scan 'folder:{bad}/plain' --train moco --truth {bad}/plain", ['ground_truth.json', 'no such file']),
    'unknown captions': ("attack {s} --trigger badnet --target star --captions kep", ["'kep'", 'keep']),
    'silly size': ("attack {s} --trigger badnet --target star --size 3", ['--size 3']),
    'unknown model': ("train {s} --model tinny", ["'tinny'", "did you mean 'tiny'"]),
    'unknown weights': ("train {s} --model RN50 --pretrained opnai", ["'opnai'", "did you mean 'openai'"]),
    'batch larger than the corpus': ("train {s} --batch-size 65", ['64 samples', '65']),
    'batch 0': ("train {s} --batch-size 0", ['--batch-size']),
    'epochs in words': ("train {s} --epochs ten", ['--epochs']),
    'no epochs': ("train {s} --batch-size 16 --epochs 0", ['epochs=0']),
    'negative lr': ("train {s} --lr -1", ['--lr']),
    'infinite lr': ("train {s} --lr inf", ['--lr', 'finite']),
    'diverging run': ("train {s} --batch-size 16 --lr 1e30 --device cpu", ['step', 'learning rate']),
    'unknown schedule': ("train {s} --schedule cosin", ["'cosin'", "did you mean 'cosine'"]),
    'unknown precision': ("train {s} --precision fp8", ["'fp8'", 'bf16']),
    'unknown device': ("train {s} --batch-size 16 --device cdua", ["'cdua'"]),
    'missing plan': ("train {s} --plan {bad}/none.json", ['none.json', 'no such file']),
    'bad plan': ("train {s} --plan {bad}/plan.json", ['plan.json', 'badnt']),
    'test target not in the classes': ("train {s} --batch-size 16 --test {s} --trigger badnet --target dog", ["'dog'"]),
    'trigger without target': ("train {s} --test {s} --trigger badnet", ['--target']),
    'missing test set': ("train {s} --batch-size 16 --test {bad}/photos", ['photos']),
    'trigger without test': ("train {s} --batch-size 16 --trigger badnet --target star", ['--trigger', '--test']),
    'target without test': ("train {s} --batch-size 16 --target star", ['--target', '--test']),
    'plan and target': ("train {s} --batch-size 16 --plan {bad}/good.json --target disc --test {s}",
                        ['--plan', '--target', 'leave out']),
    'cleanse: trigger without test': ("cleanse {tiny} --data {s} --trigger badnet --target star", ['--trigger', '--test']),
    'cleanse: target without test': ("cleanse {tiny} --data {s} --target star", ['--target', '--test']),
    'cleanse: plan without test': ("cleanse {tiny} --data {s} --plan {bad}/good.json", ['--plan', '--test']),
    'cleanse: probe without test': ("cleanse {tiny} --data {s} --probe {s}", ['--probe', '--test']),
    'train: no device': ("train {s} --batch-size 16 --device meta", ["--device 'meta'", 'cpu']),
    'cleanse: no device': ("cleanse {tiny} --data {s} --device meta", ["--device 'meta'"]),
    'evaluate: no device': ("evaluate {tiny} {s} --device meta", ["--device 'meta'"]),
    'evaluate: no module of a device': ("evaluate {tiny} {s} --device hpu", ["--device 'hpu'"]),
    'scan: no device': ("scan {s} --train moco --device meta", ["--device 'meta'"]),
    'corpus without captions': ("train folder:{bad}/plain --batch-size 1", ['no captions', 'captions=templates']),
    'missing checkpoint': ("cleanse {bad}/none.pt --data {s}", ['none.pt', 'no such checkpoint']),
    'folder as checkpoint': ("cleanse {bad} --data {s}", ['folder']),
    'text as checkpoint': ("cleanse {bad}/notes.txt --data {s}", ['notes.txt', 'not a checkpoint']),
    'cut checkpoint': ("cleanse {bad}/cut.safetensors --data {s}", ['cut.safetensors', 'not a checkpoint']),
    'checkpoint of another shape': ("cleanse {bad}/other.pt --model tiny --data {s}", ['visual.proj.weight', ', but model']),
    'checkpoint of another model': ("cleanse {tiny} --model RN50 --data {s}", ['tiny.safetensors', 'RN50']),
    'malicious checkpoint': ("cleanse {bad}/evil.pt --data {s}", ['evil.pt']),
    'malicious archive': ("cleanse {bad}/evil_zip.pt --data {s}", ['evil_zip.pt', 'system']),
    'malicious start': ("train {s} --pretrained {bad}/evil_zip.pt", ['evil_zip.pt', 'system']),
    'unknown method': ("cleanse {tiny} --data {s} --method cleanclap", ["'cleanclap'", "did you mean 'cleanclip'"]),
    'option of another method': ("cleanse {tiny} --data {s} --method finetune --inmodal-weight 2",
                                 ['--inmodal-weight', 'finetune']),
    'batch larger than the clean set': ("cleanse {tiny} --data 'shapes:?n=30'", ['30 samples', '64']),
    'evaluate: malicious': ("evaluate {bad}/evil.pt {s}", ['evil.pt']),
    'evaluate: plan and trigger': ("evaluate {tiny} {s} --plan {bad}/plan.json --trigger sig", ['--plan', '--trigger']),
    'evaluate: target': ("evaluate {tiny} {s} --trigger sig --target sta", ["'sta'", "did you mean 'star'"]),
    'tour: unknown attack': ('tour --attacks badnt', ["'badnt'", "did you mean 'badnet'"]),
    'tour: unknown system': ('tour --defenses cleanclap', ["'cleanclap'", "did you mean 'cleanclip'"]),
    'tour: unknown only': ('tour --only cleanclap', ["'cleanclap'", '--only']),
    'tour: victims of no recipe': ('tour --only victims --recipe simcrl', ["--recipe 'simcrl'", "did you mean 'simclr'"]),
    'tour: --again elsewhere': ('tour --again 3', ['--again', '--only poisoncam']),
    'tour: --no-reference elsewhere': ('tour --no-reference', ['--no-reference', '--only poisoncam']),
    'tour: --again 1 elsewhere': ('tour --again 1', ['--again:', '--only poisoncam']),
    'tour: --no-retrain elsewhere': ('tour --no-retrain', ['--no-retrain', '--only poisoncam']),
    'tour: seeds': ('tour --seeds 0,one', ["'0,one'", '--seeds']),
    'tour: no test set': ("tour --data 'folder:{bad}/plain'", ['--test']),
    'tour: target': ('tour --target sta --n 64 --test-n 24 --clean-n 24', ["'sta'"]),
    'tour: test beside shapes': (f"{brief} --test 'folder:{{bad}}/plain'", ['--test', '--data']),
    'tour: clean beside shapes': (f"{brief} --clean {{s}}", ['--clean', '--data']),
    'tour: n beside a corpus': ("tour --data {s} --test {s} --epochs 1 --n 64", ['--n:', 'drawn']),
    'tour: one n beside a corpus': ("tour --data {s} --test {s} --epochs 1 --n 1", ['--n:', 'drawn']),
    'tour: test-n beside a corpus': ("tour --data {s} --test {s} --epochs 1 --test-n 24", ['--test-n', 'drawn']),
    'tour: clean-n beside clean': ("tour --data {s} --test {s} --clean {s} --epochs 1 --clean-n 24", ['--clean-n', '--clean ']),
    'tour: defenses beside only': (f"{brief} --defenses finetune --only finetune", ['--defenses', '--only']),
    'tour: defenses beside victims': ("tour --only victims --defenses finetune --n 64", ['--defenses', '--only']),
    'tour: --n beside --data': ("tour --only victims --data 'folder:{bad}/plain' --test 'folder:{bad}/plain' --n 5", ['--n', 'drawn']),
    'tour: --test alone': ("tour --only victims --test 'folder:{bad}/plain'", ['--test', '--data']),
    'scan: --model beside --train': ("scan 'folder:{bad}/plain' --train moco --model resnet18", ['--model', '--encoder']),
    'unknown command': ('clean', ["'clean'", "did you mean 'cleanse'"]),
    'unknown option': ("train {s} --epoch 3", ['--epoch'])}


@pytest.mark.parametrize('line, words', mistakes.values(), ids=mistakes.keys())
def test_a_mistake_is_one_line_and_leaves_nothing(run, bad, tmp_path, line, words):
    line = line.format(bad=bad, tiny=bad/'tiny.safetensors', s="'shapes:?n=64'")
    fails(run(line if line == 'clean' else f'{line} -q --out {tmp_path}/new/out'), *words)
    assert not list(tmp_path.iterdir()) and not (bad/'executed').exists()


def test_a_mistake_of_a_process(bad, tmp_path):
    done = program('evaluate', bad/'evil_zip.pt', 'shapes:?n=64', '--out', tmp_path/'out')
    fails(Said(done.returncode, done.stdout, done.stderr), 'evil_zip.pt')
    assert not (bad/'executed').exists() and not (tmp_path/'out').exists()


def test_payload_would_run(tmp_path):
    "The malicious file is malicious: pickle itself runs it."
    class Payload:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/executed',)
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path/'executed').exists()


def test_out_is_protected(run, chain, tmp_path):
    (tmp_path/'file').write_text('x')
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'mine.txt').write_text('mine')
    attack = f"attack 'shapes:?n=64' {aim} --out"
    train = f"train 'shapes:?n=64' {quick} --out"
    for line in (f'{attack} {tmp_path}/file', f'{attack} {tmp_path}/full', f'{train} {tmp_path}/file', f'{train} {tmp_path}/full',
                 f'tour --out {tmp_path}/full', f'tour --out {tmp_path}/file',
                 f'{train} {tmp_path}/file/below', f'{attack} {tmp_path}/file/below'):
        fails(run(line), tmp_path.name)
    fails(run(f'{train} {chain}/victim'), 'holds a finished run')
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['file', 'full', 'mine.txt']


def test_terminal_codes_from_data_do_not_reach_the_terminal(run, tmp_path):
    folder = tmp_path/'set'
    for c in ('\x1b[2Jstar', '[red]dog'):
        (folder/c).mkdir(parents=True)
        for i in range(4): Image.fromarray(np.full((32, 32, 3), 50*i, np.uint8)).save(folder/c/f'{i}.png')
    said = run(['attack', f'folder:{folder}?captions=templates', '--trigger', 'badnet', '--target', '[red]dog', '--count', '1',
                '--out', str(tmp_path/'o')])
    assert said.code == 0 and '\x1b' not in said.out + said.err, said.err
    assert '\x1b' not in (tmp_path/'o'/'report.html').read_text()
    fails(run(['attack', f'folder:{folder}', '--trigger', 'badnet', '--target', 'x', '--out', str(tmp_path/'p')]), '\\x1b[2Jstar')


def test_broken_pictures_are_counted_and_named(run, tmp_path):
    with open(tmp_path/'t.csv', 'w') as f:
        f.write('image,caption\n')
        for i in range(20):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
            f.write(f'{i}.png,a picture of number {i}\n')
    (tmp_path/'3.png').write_bytes((tmp_path/'3.png').read_bytes()[:60])
    said = run(f'train {tmp_path}/t.csv --out {tmp_path}/run {quick}')
    assert said.code == 0 and '1 samples were left out' in said.err and '3.png' in said.err, said.err
    assert '3.png' in (tmp_path/'run'/'report.html').read_text()


@pytest.fixture
def photos(tmp_path):
    "A folder of 20 pictures in two classes; one of them is junk."
    for i in range(20):
        (tmp_path/'photos'/('star', 'disc')[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path/'photos'/('star', 'disc')[i % 2]/f'{i}.png')
    (tmp_path/'photos'/'disc'/'3.png').write_bytes(b'junk')
    return f"'folder:{tmp_path}/photos?captions=templates'"


@pytest.mark.parametrize('more', ['', '--workers 1'])
def test_pictures_that_fail_while_training_are_named(run, photos, tmp_path, monkeypatch, more):
    monkeypatch.setattr(cli.open_at, '__defaults__', (0,))             # nothing fits into memory
    said = run(f'train {photos} --out {tmp_path}/run --epochs 2 --batch-size 20 --device cpu -q {more}')
    assert said.code == 0 and '1 samples were left out' in said.err and '3.png' in said.err, said.err
    (key, why), = read_json(tmp_path/'run'/'config.json')['skipped']
    assert key.endswith('3.png') and why and '3.png' in (tmp_path/'run'/'report.html').read_text()


def test_a_plan_for_a_corpus_that_is_too_large_for_memory(run, bad, photos, tmp_path, monkeypatch):
    from bdnb.data.corpus import Corpus
    cache = Corpus.cache
    monkeypatch.setattr(cli.open_at, '__defaults__', (0,))
    monkeypatch.setattr(Corpus, 'cache', lambda self, size, **o: cache(self, size, **{**o, 'budget_bytes': 0}))
    said = run(f'train {photos} --plan {bad}/good.json --out {tmp_path}/run {quick}')
    assert said.code == 0 and (tmp_path/'run'/'model.safetensors').exists() and '3.png' in said.err, said.err


def test_a_device_that_training_would_not_take(run, bad, tmp_path, monkeypatch):
    line = f"'shapes:?n=64' --epochs 1 --batch-size 16 -q --out {tmp_path}/run"
    assert run(f'train {line} --device cpu:0').code == 0                   # it is what `fit` takes
    monkeypatch.setattr('bdnb.train.run_device', lambda device=None: torch.device('cpu' if device == 'cpu' else 'meta'))
    for command in ('train', f'cleanse {bad}/tiny.safetensors --data'):
        fails(run(f'{command} {line}2 --device cpu:0'), "--device 'cpu:0'", "training takes 'meta'")
    assert run(f'train {line}3 --device cpu').code == 0
    assert run(f"evaluate {bad}/tiny.safetensors 'shapes:?n=64' -q --device cpu:0").code == 0          # nothing is trained


def test_a_flag_a_zero_and_a_one_are_given_too():
    for v, name in ((False, '--no-a-b'), (0, '--a-b'), (1, '--a-b'), (1., '--a-b'), ('', '--a-b')):
        with pytest.raises(BdnbError, match=f'^{name}: why$'): cli.refuse(dict(a_b=v), 'a_b', 'why')
        cli.refuse(dict(a_b=v), 'a_b', 'why', when=False)
    for v in (None, True): cli.refuse(dict(a_b=v), 'a_b', 'why')


def shown_commands():
    "The commands of README.md, of the notebooks' shell blocks and of the result files."
    root = Path(__file__).parents[1]
    texts = {'README.md': (root/'README.md').read_text(encoding='utf-8')}
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        texts[p.name] = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    for name, text in texts.items():
        for block in re.findall(r'```(?:sh|bash)\n(.*?)```', text, re.DOTALL) + re.findall(r'(?:^    .*\n)+', text, re.MULTILINE):
            for line in block.replace('\\\n', ' ').splitlines():
                if line.strip().startswith('bdnb '): yield name, line.strip()
    for p in sorted((root/'results').glob('*.json')):
        command = read_json(p).get('command') or ''
        if command.startswith('bdnb '): yield p.name, command


def test_no_command_that_is_shown_is_refused(run, tmp_path, monkeypatch):
    "Each gets as far as its files, which are not here, or to its study, which is not made."
    def made(*a, **k): raise BdnbError('everything was accepted')
    for name in ('study.tour', 'ssl_study.ssl_tour', 'classifier_study.classifier_tour', 'cli._tour_pictures'):
        monkeypatch.setattr(f'bdnb.{name}', made)
    found = {c: name for name, c in shown_commands()}.items()
    assert len(found) > 30 and sum(c.startswith('bdnb tour') for c, _ in found) > 20
    for i, (command, name) in enumerate(found):
        (tmp_path/str(i)).mkdir()
        monkeypatch.chdir(tmp_path/str(i))                             # what the command before it made is not here either
        words = shlex.split(command, comments=True)[1:]
        said = run(words)
        if words[0] == 'tour': assert 'everything was accepted' in said.err, (name, command, said.err)
        else: assert said.code == 0 or re.search('no such|file or folder|unknown corpus', said.err), (name, command, said.err)


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = ShapeCaps(64)                                                                              # a batch of CleanCLIP
    Path('photos').mkdir()
    names = [f'photos/{key}.png' for key in pairs.keys]
    for name, image in zip(names, pairs.images): Image.fromarray(image.permute(1, 2, 0).numpy()).save(name)
    lines = '\n'.join(f'{name},"{text}"' for name, text in zip(names, pairs.texts))
    Path('trusted.csv').write_text(f'image,caption\n{lines}\n')
    save_encoder(create_encoder('resnet10/half'), 'encoder.safetensors')
    save_classifier(create_classifier('resnet18', pairs.classes, width=8), 'classifier.safetensors')
    save_checkpoint(create_model('tiny'), 'clip.safetensors')
    text = (Path(__file__).parents[1]/'README.md').read_text(encoding='utf-8')
    block, = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    exec(block, {})
    said = capsys.readouterr().out
    assert 'no evidence of a patch trigger []' in said and re.search(r'picked \d.*; agrees with the old one on \d+\.\d%', said), said
    assert load_classifier('cleansed.safetensors').classes == pairs.classes
    assert load_checkpoint('cleansed-clip.safetensors').name == load_checkpoint('clip.safetensors').name == 'tiny'


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(run, monkeypatch, tmp_path, error):
    def fail(*a, **k): raise error
    monkeypatch.setattr('bdnb.report.pictures_of_attack', fail)
    fails(run(f"attack 'shapes:?n=64' {aim} --out {tmp_path}/o"), 'not enough memory', '--batch-size')


def test_letters_that_a_terminal_lacks():
    "Class names and dashes of tables, on a terminal of plain ASCII."
    code = "from bdnb import cli; cli.app = lambda *a, **k: print('d\\u00f6g'); raise SystemExit(cli.main(['x']))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, env=os.environ | dict(PYTHONIOENCODING='ascii'))
    assert (done.returncode, done.stdout.strip()) == (0, b'd\\xf6g'), done.stderr


def test_interrupt(run, monkeypatch, tmp_path):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr('bdnb.report.pictures_of_attack', stop)
    said = run(f"attack 'shapes:?n=64' {aim} --out {tmp_path}/new/out")
    assert said.code == 130 and said.err == 'bdnb: error: interrupted\n' and not list(tmp_path.iterdir())


def test_closed_pipe(tmp_path):
    path = os.pathsep.join([str(Path(bdnb.__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])])
    code = f"{sh(sys.executable)} -c 'from bdnb.cli import main; raise SystemExit(main())' models --json | head -1"
    done = subprocess.run(['sh', '-c', code], capture_output=True, text=True, timeout=300, env={**os.environ, 'PYTHONPATH': path})
    assert done.stdout == '[\n' and 'Traceback' not in done.stderr and 'Exception' not in done.stderr, done.stderr


# ---- a full disk

@pytest.fixture
def tiny_disk(tmp_path):
    "A file system of 1.5 MB."
    place = tmp_path/'disk'
    place.mkdir()
    if os.name != 'posix' or os.geteuid(): pytest.skip('only root can mount a small disk')
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1500k', 'tmpfs', place], capture_output=True)
    if done.returncode: pytest.skip('cannot mount a small disk here')
    yield place
    subprocess.run(['umount', place], check=True)


@pytest.mark.parametrize('line', ["attack 'shapes:?n=400' " + aim, "train 'shapes:?n=64' " + quick,
                                  "cleanse {bad}/tiny.safetensors --data 'shapes:?n=64' " + quick])
def test_full_disk(run, bad, tiny_disk, line):
    fails(run(f'{line.format(bad=bad)} --out {tiny_disk}/new/out'), f'{tiny_disk}/new/out')
    assert not list(tiny_disk.iterdir())


def test_disk_that_is_full_to_the_brim(run, bad, tiny_disk):
    with open(tiny_disk/'fill', 'wb', buffering=0) as f, pytest.raises(OSError, match='No space'):
        while True: f.write(b'x'*4096)
    for line in ("attack 'shapes:?n=64' " + aim, "train 'shapes:?n=64' " + quick):
        fails(run(f'{line} --out {tiny_disk}/new/out'), f'{tiny_disk}/new')
    assert [p.name for p in tiny_disk.iterdir()] == ['fill']


def test_full_disk_without_a_disk(run, bad, tmp_path, monkeypatch):
    "The same where nothing can be mounted: every write of weights fails."
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    fails(run(f"train 'shapes:?n=64' {quick} --checkpoint-every 0 --out {tmp_path}/new/out"), 'disk is full', 'out')
    assert not list(tmp_path.iterdir())
