"`bdnb attack --mode ssl`, and a scan that is told the truth."
import csv

import numpy as np
import pytest
import torch
from PIL import Image

from bdnb import cli
from bdnb.attacks.ssl import SslPoisoning, load_boxes
from bdnb.core import BdnbError, read_json, write_json
from bdnb.data.corpus import FolderCorpus
from bdnb.data.doors import open_corpus
from bdnb.defenses.findings import FOUND, Findings, attack_truth, judge_findings
from bdnb.models.checkpoint import write_tensors
from bdnb.models.encoders import encode, load_encoder, save_encoder

PATCH = 'patch:pattern=10,size=9'


def photos(folder, n=24, size=48, classes=()):
    g = np.random.default_rng(0)
    for i in range(n):
        where = folder/classes[i % len(classes)] if classes else folder
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(where/f'{i:02d}.png')
    return folder


def table(path):
    with open(path, newline='', encoding='utf-8') as f: return list(csv.DictReader(f))


def test_pictures_of_a_class_and_nothing_else_is_changed(run, tmp_path):
    out = tmp_path/'p'
    code, said, err = run(f'attack shapes:?n=120 --mode ssl --trigger {PATCH} --target star --class-rate .5 --seed 3 --out {out}')
    assert code == 0, err
    clean, back = open_corpus('shapes:?n=120'), open_corpus(str(out/'captions.csv')).cache(32, progress=False)
    done = SslPoisoning(PATCH, 'star', class_rate=.5, seed=3).apply(clean)
    assert '4.17% of the set, 50.0% of the 10 of class \'star\'' in said and f'table: {out}/captions.csv' in said
    assert torch.equal(back.images, done.corpus.images) and back.texts == clean.texts
    assert [back.classes[y] for y in back.labels] == [clean.classes[y] for y in clean.labels]
    truth, boxes = read_json(out/'ground_truth.json'), load_boxes(out)
    assert truth['keys'] == done.keys and truth['size'] == [32, 32] == boxes[1] and SslPoisoning.load(out/'plan.json') == done.plan
    assert [r['key'] for r in table(out/'boxes.csv')] == truth['images'] == list(boxes[0])
    assert list(boxes[0].values()) == done.boxes[done.index].tolist() and len(truth['images']) == 5


@pytest.mark.parametrize('options, fields', [
    ('--select con --count 5', dict(select='con', count=5)), ('--select conp --rate .25', dict(select='conp', rate=.25)),
    ('--select kmeans --count 4 --clusters 3', dict(select='kmeans', count=4, clusters=3)),
    ('--select con --class-rate .5 --clusters 4', dict(select='con', class_rate=.5, clusters=4))])
def test_an_encoder_chooses_where_nobody_has_labels(run, tmp_path, tiny, options, fields):
    pile, net = photos(tmp_path/'pile'), load_encoder(tiny)
    line = f'attack folder:{pile} --mode ssl --trigger {PATCH} {options} --encoder {tiny} --size 40 -q --out {tmp_path}/p'
    code, said, err = run(line)
    assert code == 0 and 'without labels nobody knows' in said, err
    clean = open_corpus(f'folder:{pile}').cache(40, progress=False)
    z = encode(net, clean.cache(net.image_size, progress=False))
    done = SslPoisoning(PATCH, **fields).apply(clean, z)
    assert read_json(tmp_path/'p'/'ground_truth.json')['keys'] == done.keys
    spec = said.partition('pictures: ')[2].split('\n')[0]              # a table needs captions or labels
    assert torch.equal(open_corpus(spec).cache(40, progress=False).images, done.corpus.images)
    assert read_json(tmp_path/'p'/'config.json')['notes'] == done.plan.describe(clean, z).split('\n')


@pytest.mark.parametrize('options, words', [
    ('--select con --count 13', '13 pictures are to be poisoned: selection con of 24 pictures takes 1 to 12'),
    ('--select conp --count 25', 'there are only 24'), ('--select con --rate .001', 'is none; raise it'),
    ('--select con --class-rate .5', 'needs a number of classes'), ('--select kmeans --count 3', "select='kmeans' needs a number"),
    ('--select kmeans --count 3 --clusters 25', '25 clusters of 24 pictures are too many'),
    ('--select con --count 3 --trigger patch:size=41', '41 pixels does not fit into 40 x 40'),
    ('--select con --count 3 --encoder {d}/none.pt', 'none.pt: no such checkpoint file'),
    ('--select con --count 3 --encoder {d}', 'a folder; name the checkpoint file in it'),
    ('--select con --count 3 --encoder {d}/bare.pt', '--encoder {d}/bare.pt: does not say which network it is'),
    ('--select con --count 3 --encoder {d}/found.safetensors', 'found.safetensors: holds a findings, not an encoder'),
    ('--select con --count 3 --encoder {d}/noname.safetensors', '--encoder {d}/noname.safetensors: does not say which network it is'),
    ('--select con --count 3 --size 65000', 'size must be 1 to 4,096 pixels, not 65000'),
    ('--select con --count 3 --encoder {d}/nan.safetensors', 'tensor conv1.weight holds values that are not finite')])
def test_mistakes_are_found_before_a_picture_is_decoded(run, tmp_path, tiny, monkeypatch, options, words):
    pile, net = photos(tmp_path/'pile'), load_encoder(tiny)
    torch.save(net.net.state_dict(), tmp_path/'bare.pt')
    write_tensors({'a': torch.zeros(1)}, tmp_path/'found.safetensors', dict(kind='findings', name='a scan'))
    write_tensors({'a': torch.zeros(1)}, tmp_path/'noname.safetensors', dict(kind='encoder'))
    torch.nn.init.constant_(net.net.conv1.weight, float('nan'))
    save_encoder(net, tmp_path/'nan.safetensors')
    def decoded(*a, **k): raise AssertionError('decoded')
    monkeypatch.setattr(FolderCorpus, 'cache', decoded)
    line = f'attack folder:{pile} --mode ssl --trigger {PATCH} --encoder {tiny} --size 40 -q --out {tmp_path}/p '
    code, _, err = run(line + options.format(d=tmp_path))                        # of an option given twice the last counts
    assert code == 2 and words.format(d=tmp_path) in err and err.count('\n') == 1 and not (tmp_path/'p').exists(), err
    with pytest.raises(AssertionError, match='decoded'): run(line + '--select con --count 3')


def test_random_pictures_need_no_encoder(run, tmp_path):
    pile = photos(tmp_path/'pile', classes=('a', 'b'))
    code, said, err = run(f'attack folder:{pile} --mode ssl --trigger {PATCH} --select random --class-rate .5 --size 32 -q '
                          f'--out {tmp_path}/p')
    assert code == 0 and '6 of 24 pictures are poisoned: 25.00% of the set' in said and 'of the poisons are of it' in said, err
    code, _, err = run(f'attack folder:{photos(tmp_path/"bare")} --mode ssl --trigger {PATCH} --target a --count 3 -q --out {tmp_path}/q')
    assert code == 2 and 'no labels' in err and not (tmp_path/'q').exists()


@pytest.mark.parametrize('options, at', [('--trigger badnet:size=5,place=br', [27, 27, 5, 5]), ('--attack blended', [0, 0, 32, 32])])
def test_other_attacks_say_where_too(run, tmp_path, options, at):
    code, _, err = run(f'attack shapes:?n=64 {options} --target star --rate .1 --out {tmp_path}/p')
    boxes, size = load_boxes(tmp_path/'p')
    assert code == 0 and list(boxes) == read_json(tmp_path/'p'/'ground_truth.json')['images'] and size == [32, 32], err
    for b in boxes.values(): assert b == at or options.startswith('--attack') and min(b[2:]) > 28, b


def findings(keys, windows, removed):
    n = len(keys)
    score = torch.tensor([.9 if k in windows else .01 for k in keys])
    window = torch.tensor([windows.get(k, [0, 0, 6, 6]) for k in keys])
    return Findings(keys, score, torch.zeros(n, dtype=torch.int64), window, score, torch.tensor([k not in removed for k in keys]),
                    FOUND, dict(forwards={}, acquitted=0))


def test_a_scan_is_measured_against_the_truth(tmp_path, capsys):
    "Pictures of 64 pixels that were scanned at 32: boxes are half as large."
    keys = [f'{i:06d}.png' for i in range(40)]
    boxes = {k: [2*i, 10, 20, 20] for i, k in enumerate(keys[:10])}
    windows = {k: [i + 40*(i == 9), 5, 10, 10] for i, k in enumerate(keys[:10])}          # the last one is elsewhere
    cli._show_truth(findings(keys, windows, keys[1:12]), tmp_path, 32, (boxes, [64, 64]))
    said, out = read_json(tmp_path/'metrics.json'), capsys.readouterr().out
    assert judge_findings(findings(keys, windows, keys[1:12]), (boxes, [64, 64]), 32) == said
    assert said['poisoned'] == 10 and said['localisation'] == pytest.approx(.9) and said['recall'] == .9 and said['precision'] == 9/11
    assert said['precision@20'] == .5 and said['iou'] == pytest.approx(.9)
    for words in ('localisation', '90.0%', '81.8%', '50.0%'): assert words in out
    cli._show_truth(None, tmp_path, 32, None)                          # a scan that is told no truth
    assert not (tmp_path/'metrics.json').exists()


def test_attack_then_scan(run, tmp_path, tiny):
    code, _, err = run(f'attack shapes:?n=40 --mode ssl --trigger {PATCH} --target star --class-rate 1 --out {tmp_path}/p')
    assert code == 0, err
    line = f'--encoder {tiny} --clusters 2 --window .28 -q --out {tmp_path}/scan --truth {tmp_path}/p'
    code, said, err = run(f'scan {tmp_path}/p/captions.csv {line}')
    numbers = read_json(tmp_path/'scan'/'metrics.json')
    poisons = len(read_json(tmp_path/'p'/'ground_truth.json')['images'])
    assert code == 0 and 'Against the truth' in said and numbers['poisoned'] == poisons > 2 and 'recall' in numbers, err
    with pytest.raises(BdnbError, match='is what bdnb attack wrote; open folder:.*/p/images, or csv:'): open_corpus(f'folder:{tmp_path}/p')
    folder, whole = open_corpus(f'folder:{tmp_path}/p/images'), load_boxes(tmp_path/'p')[0]
    assert {f'images/{k}': b for k, b in attack_truth(f'{tmp_path}/p', folder)[0].items()} == whole          # the same by its folder
    by_key = {r['key']: r for r in table(tmp_path/'scan'/'findings.csv')}
    assert numbers['examined_poisons'] == sum(by_key[k]['score'] != '' for k in load_boxes(tmp_path/'p')[0])
    code, _, err = run(f"scan shapes:?n=40 {line.replace('/scan', '/other')}")
    why = f'error: --truth {tmp_path}/p: {poisons} of its {poisons} pictures are not here, first images/'
    assert code == 2 and why in err and not (tmp_path/'other').exists(), err
    code, _, err = run(f'attack shapes:?n=40 --mode ssl --trigger patch:pattern=12 --target star --class-rate 1 --out {tmp_path}/q')
    assert code == 0, err
    code, _, err = run(f"scan {tmp_path}/q/captions.csv {line.replace('/scan', '/other')}")            # called alike by both attacks
    assert code == 2 and 'is another picture than that of this corpus' in err, err
    assert not (tmp_path/'other').exists()


@pytest.mark.parametrize('size, text, why', [
    ([32, 32], 'key,top,left,height,width\na,1,2,3\n', 'row 2: must be a key and four whole numbers'),
    ([32, 32], 'key,top,left,height,width\na,1,2,3,4\n\nb,1,2,3,4\n', 'row 3'),
    ([32, 32], 'key,top,left,height,width\na,1,2,3,1e9\n', 'row 2'),
    ([32, 32], f'key,top,left,height,width\na,1,2,3,{"9"*5000}\n', 'row 2'),
    ([32, 32], 'key,top,left,height,width\na,-2,2,3,4\n', 'row 2'),
    ([32, 32], 'key,top,left,height,width\na,-1,-1,-1,-1\nb,-1,2,3,4\n', 'row 3: is no box in a picture of 32 x 32'),
    ([32, 32], 'key,top,left,height,width\na,29,2,4,4\n', 'row 2: is no box'),
    ([32, 32], 'key,top,left,height,width\na,0,0,0,0\n', 'row 2: is no box'),
    ([32, 32], 'key,top,left,height,width\n', 'names no picture'),
    ([32, 32], 'image,top,left,height,width\na,1,2,3,4\n', 'columns must be key, top'),
    ([32, 32], None, 'boxes.csv: no such file'),
    ([32], 'key,top,left,height,width\na,1,2,3,4\n', 'size must be'),
    ([32, 2**40], 'key,top,left,height,width\na,1,2,3,4\n', 'size must be'),
    ([32, True], 'key,top,left,height,width\na,1,2,3,4\n', 'size must be')])
def test_a_strangers_boxes(tmp_path, size, text, why):
    write_json(tmp_path/'ground_truth.json', dict(size=size))
    if text is not None: (tmp_path/'boxes.csv').write_text(text)
    with pytest.raises(BdnbError, match=why): load_boxes(tmp_path)
