"The loop survives what happens to loops: kills, full disks, torn files, second processes, losses that are not numbers."
import errno
import json
import math
import os
import pickle
import random
import signal
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from conftest import as_launched, fork, leave_together, needs_fork, saved_by_two, start_two
import bdnb.train as train
from bdnb.core import BdnbError
from bdnb.data.batches import Batches
from bdnb.data.corpus import FolderCorpus
from bdnb.data.shapes import ShapeCaps
from bdnb.models.build import ClipModel
from bdnb.models.tiny import tiny_clip
from bdnb.objectives.contrastive import CleanClipObjective, ClipObjective
from bdnb.objectives.ssl import SslLearner, SslObjective, SslRecipe, train_encoder
from bdnb.train import fit, parameter_groups

torch.set_num_threads(1)


def fresh(norm='group', dropout=0.):
    model = ClipModel(tiny_clip(width=8, norm=norm), 'tiny')
    if dropout: model.net.visual.proj = nn.Sequential(nn.Dropout(dropout), model.net.visual.proj)
    return model


def weights(model): return torch.cat([v.detach().flatten().float() for v in model.state_dict().values()])
def corpus(n=48): return ShapeCaps(n)
def log(folder): return [{k: v for k, v in json.loads(r).items() if k != 'seconds'} for r in (folder/'history.jsonl').open()]


class PowerCut(Exception): "All at once."


class Stops:
    "An objective that dies at its n-th call."
    def __init__(self, inner, n): self.inner, self.n = inner, n
    def __call__(self, model, batch):
        self.n -= 1
        if self.n < 0: raise PowerCut
        return self.inner(model, batch)


# Kills


def long_run(folder, slow_write=None):
    "Forty steps of CleanCLIP with dropout and batch norm; checkpoints and log lines at different steps; final weights in a file."
    if slow_write: train.torch = SimpleNamespace(**{**vars(torch), 'save': half_a_file(slow_write)})
    model = fresh('batch', dropout=.2)
    fit(model, CleanClipObjective(), Batches(corpus(), 16, seed=3), steps=40, lr=1e-3, warmup=4, out=folder, checkpoint_every=3,
        log_every=4, device='cpu')
    torch.save(model.state_dict(), folder/'final.pt')


def half_a_file(flag):
    "A `torch.save` that writes half of the file, from the second time on, raises a flag and sleeps."
    def save(state, path):
        torch.save(state, path)
        if state['step'] < 6: return
        path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
        flag.touch()
        time.sleep(60)
    return save


def start(*args):
    p = fork.Process(target=long_run, args=args)
    p.start()
    return p


def wait_for(true, process, seconds=120):
    end = time.monotonic() + seconds
    while not true() and process.is_alive() and time.monotonic() < end: time.sleep(.002)
    return true()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder of a run that nothing happened to."
    if fork is None: pytest.skip('no forkserver here')
    folder = tmp_path_factory.mktemp('whole')
    p = start(folder)
    p.join()
    assert p.exitcode == 0
    return folder


def assert_same_run(a, b):
    one, two = (torch.load(f/'final.pt', weights_only=True) for f in (a, b))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert log(a) == log(b) and [r['step'] for r in log(b)] == list(range(4, 41, 4))
    assert {p.name for p in b.iterdir()} == {'final.pt', 'checkpoint.pt', 'history.jsonl'}


@pytest.mark.slow
@needs_fork
def test_kill_9_at_random_moments(whole, tmp_path):
    "Killed again and again, each time after at least one more checkpoint, the run ends where it would have ended."
    path, draw, hits, seen = tmp_path/'checkpoint.pt', random.Random(0), 0, None
    stat = lambda: (path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None
    for _ in range(4):
        p = start(tmp_path)
        wait_for(lambda: stat() != seen, p)
        time.sleep(draw.random()*.25)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        hits, seen = hits + (p.exitcode == -signal.SIGKILL), stat()
        if (tmp_path/'final.pt').exists(): break
    assert hits >= 2 and not (tmp_path/'final.pt').exists(), 'the kills came too late to test anything'
    p = start(tmp_path)
    p.join()
    assert p.exitcode == 0
    assert_same_run(whole, tmp_path)


@pytest.mark.slow
@needs_fork
def test_kill_while_a_checkpoint_is_written(whole, tmp_path):
    "The old checkpoint stays whole; what was half written is swept away by the next run."
    flag = tmp_path.parent/f'{tmp_path.name}-flag'
    p = start(tmp_path, flag)
    assert wait_for(flag.exists, p)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    assert len(list(tmp_path.glob('.*.tmp.pt'))) == 1
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 3
    p = start(tmp_path)
    p.join()
    assert p.exitcode == 0
    assert_same_run(whole, tmp_path)


def short(model, out, objective=None, n=99, **options):
    options = dict(steps=6, lr=1e-3, checkpoint_every=2, log_every=4, device='cpu', batches=Batches(corpus(), 16)) | options
    return fit(model, Stops(objective or ClipObjective(), n), out=out, **options)


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    real = torch.save
    def save(state, path):
        if state['step'] < 4: return real(state, path)
        path.write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(BdnbError, match='checkpoint.pt.*disk is full'): short(fresh(), tmp_path)
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 2 and not list(tmp_path.glob('.*'))


def test_torn_log_line(tmp_path):
    "A power cut may tear the last line of the log; the run goes on and the log comes out whole."
    with pytest.raises(PowerCut): short(fresh(), tmp_path/'a', n=5)
    with (tmp_path/'a/history.jsonl').open('a') as f: f.write('{"step": 5, "lo')
    short(fresh(), tmp_path/'a')
    short(fresh(), tmp_path/'b')
    assert log(tmp_path/'a') == log(tmp_path/'b') and [r['step'] for r in log(tmp_path/'a')] == [4, 6]


def test_finished_run_is_loaded(tmp_path):
    one, two = fresh(), fresh()
    a = short(one, tmp_path)
    b = short(two, tmp_path, n=0)                                   # not one more step
    assert a.rows == b.rows and torch.equal(weights(one), weights(two))
    assert short(fresh(), tmp_path, resume=False).column('loss') == a.column('loss')


# Refusals


@dataclass(frozen=True)
class Weighted:
    weight: float = 1.
    view: object = math.sqrt
    def __call__(self, model, batch): return {'clip': self.weight*ClipObjective()(model, batch)['clip']}


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stopped')
    fit(fresh(), Weighted(), Batches(corpus(), 16), steps=3, lr=1e-3, out=folder, checkpoint_every=2, device='cpu')
    return folder


@pytest.mark.parametrize('name, change', [
    ('lr', dict(lr=2e-3)), ('steps', dict(steps=4)), ('schedule', dict(schedule='constant')), ('seed', dict(seed=1)),
    ('precision', dict(precision='bf16')), ('objective', dict(objective=Weighted(2.))),
    ('objective', dict(objective=Weighted(view=math.cos))),
    ('batch_size', dict(batches=lambda: Batches(corpus(), 8))), ('order', dict(batches=lambda: Batches(corpus(), 16, seed=1))),
    ('corpus', dict(batches=lambda: Batches(ShapeCaps(48, seed=1), 16))),
    ('corpus', dict(batches=lambda: Batches(corpus().with_captions('a {}'), 16))),
    ('corpus', dict(batches=lambda: Batches(corpus()._with(_store=corpus().images.flip(3)), 16))),
    ('weights', dict(marks=dict(weights='others')))])
def test_resume_with_other_settings_is_refused(stopped, name, change):
    before, change = (stopped/'checkpoint.pt').read_bytes(), {k: v() if k == 'batches' else v for k, v in change.items()}
    options = dict(objective=Weighted(), batches=Batches(corpus(), 16), steps=3, lr=1e-3, checkpoint_every=2, device='cpu')
    options |= change
    with pytest.raises(BdnbError, match=rf'other settings \({name} was .*checkpoint|checkpoint.*other settings \(.*{name} was '):
        fit(fresh(), out=stopped, **options)
    assert (stopped/'checkpoint.pt').read_bytes() == before


class Killed(Exception): pass


def test_an_encoder_of_another_recipe_does_not_go_on(tmp_path):
    "Also where `fit` does not see the number: temperature, slow copy, queue, normalisation. The same recipe goes on."
    def stop(model, epoch): raise Killed
    how = SslRecipe('mocov2', 'resnet10/half', 4, views='global_local', epochs=2, batch_size=16, queue=32, hidden=8, out=4)
    plain = lambda recipe, **options: train_encoder(ShapeCaps(32), recipe, quiet=True, device='cpu', **options)
    train_it = lambda recipe, **options: plain(recipe, out=tmp_path/'run', checkpoint_every=1, **options)
    whole, _, _ = plain(how)
    with pytest.raises(Killed): train_it(how, on_epoch=stop)
    before = (tmp_path/'run'/'checkpoint.pt').read_bytes()
    others = dict(temperature=.5, momentum=.9, momentum_end=1., late_queue=False, mean=(.5,)*3, std=(.2,)*3)
    for name, other in others.items():
        with pytest.raises(BdnbError, match=rf'checkpoint.pt: .*other settings \(recipe was {name}=.*, is {name}='):
            train_it(replace(how, **{name: other}))
        assert (tmp_path/'run'/'checkpoint.pt').read_bytes() == before
    encoder, history, _ = train_it(how)
    assert history.rows[-1]['step'] == 4 and before != (tmp_path/'run'/'checkpoint.pt').read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), encoder.state_dict().values()))


def test_settings_do_not_depend_on_the_process():
    "What is told apart by its address in memory would be refused by every other process."
    objective = CleanClipObjective(image_view=math.sqrt)
    text = train._settled(dict(a=objective, b=(1, 2.5, None), c=torch.ones(2), d=fresh(), e=lambda: 0))
    assert '0x' not in text and 'inmodal_weight=1.0' in text and 'sqrt' in text
    assert train._settled(torch.ones(2)) != train._settled(torch.zeros(2))


class Evil:
    def __reduce__(self): return os.mkdir, ('pwned',)


@pytest.mark.parametrize('what', ['truncated', 'empty', 'text', 'foreign', 'pickle', 'other model'])
def test_bad_checkpoint_is_refused(stopped, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path/'checkpoint.pt', (stopped/'checkpoint.pt').read_bytes()
    contents = {'truncated': good[:len(good)//2], 'empty': b'', 'text': b'hello', 'pickle': pickle.dumps(Evil(), protocol=2)}
    path.write_bytes(contents.get(what, good))
    if what == 'foreign': torch.save(fresh().state_dict(), path)
    model = ClipModel(tiny_clip(width=16, norm='group'), 'tiny') if what == 'other model' else fresh()
    with pytest.raises(BdnbError, match='checkpoint.pt: '):
        fit(model, Weighted(), Batches(corpus(), 16), steps=3, lr=1e-3, out=tmp_path, checkpoint_every=2, device='cpu')
    assert not (tmp_path/'pwned').exists()


@pytest.mark.parametrize('options, words', [
    (dict(precision='fp16'), 'fp16 needs a GPU'), (dict(lr=-1.), 'lr=-1'), (dict(lr=math.nan), 'lr=nan'),
    (dict(log_every=0), 'log_every=0'), (dict(steps=0), 'no training at all'), (dict(epochs=1), 'either epochs or steps'),
    (dict(optimizer='adam'), "did you mean 'adamw'"),
    (dict(grad_accum=0), 'grad_accum=0'), (dict(schedule='cos'), 'unknown schedule')])
def test_bad_options(options, words):
    options = dict(steps=1, device='cpu') | options
    with pytest.raises(BdnbError, match=words): fit(fresh(), ClipObjective(), Batches(corpus(), 16), **options)


def test_nothing_to_train():
    with pytest.raises(BdnbError, match='no trainable parameter'):
        fit(fresh().requires_grad_(False), ClipObjective(), Batches(corpus(), 16), steps=1, device='cpu')


def test_batches_that_do_not_divide():
    two = SimpleNamespace(num_processes=2, process_index=1)
    share = train._share(Batches(corpus(), 16), two)
    assert (share.rank, share.world_size) == (1, 2) and len(next(share.epoch(0))) == 8
    with pytest.raises(BdnbError, match='batch_size 15 does not divide by 2'): train._share(Batches(corpus(), 15), two)
    with pytest.raises(BdnbError, match='last batch of 3 .* drop_last'):
        train._share(Batches(corpus(35), 16, drop_last=False), two)
    train._share(Batches(corpus(36), 16, drop_last=False), two)


def test_tensorboard(tmp_path):
    options = dict(steps=2, log_every=1, out=tmp_path, tensorboard=True, device='cpu')
    try: import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(BdnbError, match=r'pip install bdnb\[tensorboard\]'):
            fit(fresh(), ClipObjective(), Batches(corpus(), 16), **options)
    else:
        fit(fresh(), ClipObjective(), Batches(corpus(), 16), **options)
        assert list((tmp_path/'tensorboard').glob('events*'))


# Losses that are not numbers


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_non_finite_loss_stops_before_the_weights(value):
    class Bad:
        def __call__(self, model, batch):
            return {'fine': model.logit_scale*0, 'sour': model.logit_scale*(value if batch.step == 1 else 0)}
    model, good, batches = fresh(), fresh(), Batches(corpus(), 16)
    options = dict(lr=1e-2, schedule='constant', device='cpu')
    fit(good, Bad(), batches, steps=1, **options)
    with pytest.raises(BdnbError) as e: fit(model, Bad(), batches, steps=3, **options)
    seen = [b.keys for b in batches.epoch(0)]
    assert "'sour'" in str(e.value) and 'step 1 (epoch 0)' in str(e.value) and all(k in str(e.value) for k in seen[1][:4])
    assert torch.equal(weights(model), weights(good))              # one step made, the second not even begun


def test_broken_weights_never_replace_a_checkpoint(tmp_path):
    class Root:
        "A finite loss with an infinite gradient, at step 2."
        def __call__(self, model, batch):
            z = model(batch.images)[0]
            return {'root': z.square().sum() if batch.step != 2 else (z*0).square().sum().sqrt()}
    with pytest.raises(BdnbError, match='is not finite after step 3'):
        fit(fresh(), Root(), Batches(corpus(), 16), steps=3, lr=1e-4, out=tmp_path, checkpoint_every=1, device='cpu')
    s = torch.load(tmp_path/'checkpoint.pt', weights_only=True)
    assert s['step'] == 2 and all(v.isfinite().all() for v in s['model'].values())


def test_fit_leaves_the_world_as_it_was():
    "Modes of submodules and torch's random state; also when the run fails."
    model = fresh('batch').eval()
    model.net.text.train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    short(model, None)
    with pytest.raises(PowerCut): short(model, None, n=1)
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in short(model, None) and model.parameters())


# What a step is


def test_schedule_first_and_last_step():
    lrs = lambda **o: fit(fresh(), ClipObjective(), Batches(corpus(), 16), epochs=4, lr=.01, optimizer='sgd', log_every=1,
                          device='cpu', **o).column('lr')
    warm, official = lrs(warmup=4), lrs(schedule='official', warmup=2)
    assert len(warm) == 12 and warm[0] == .0025 and warm[3] == warm[4] == .01
    assert warm[-1] == pytest.approx(.005*(1 + math.cos(math.pi*7/8)))
    assert official[0] == pytest.approx(.005*(1 + math.cos(math.pi/10))) and official[9] < 1e-12 < 1e-4 < official[-1]
    assert lrs(schedule='constant') == [.01]*12


def test_accumulation_takes_whole_groups():
    "Five batches, two a step: two steps an epoch, the fifth batch is left out, and a mean over samples is that of the whole."
    seen = []
    class Mean:
        def __call__(self, model, batch):
            seen.append((batch.epoch, batch.step))
            i, t, _ = model(batch.images, model.tokenize(batch.texts))
            return {'loss': (i - t).square().sum(1).mean()}         # a term may be called what it likes
    one, two = fresh(), fresh()
    go = lambda m, b, k: fit(m, Mean(), Batches(corpus(40), b, shuffle=False), epochs=2, lr=.01, optimizer='sgd', grad_accum=k,
                             log_every=1, device='cpu')
    h = go(one, 8, 2)
    assert seen == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)] and h.column('epoch') == [0, 0, 1, 1]
    g = go(two, 16, 1)
    assert (weights(one) - weights(two)).abs().max() < 1e-5
    assert all(abs(a - b) < 1e-5 for a, b in zip(h.column('loss'), g.column('loss')))


def test_fractions_of_an_epoch_and_the_hook():
    seen = []
    h = fit(fresh(), ClipObjective(), Batches(corpus(), 16), epochs=2.34, log_every=3, device='cpu',
            on_epoch=lambda model, epoch: seen.append((epoch, type(model))))
    assert h.column('step') == [3, 6, 7] and seen == [(0, ClipModel), (1, ClipModel)]


def test_parameter_groups_of_a_resnet():
    from open_clip.model import CLIP
    net = CLIP(16, dict(layers=[1, 1, 1, 1], width=16, image_size=32, head_width=16),
               dict(context_length=77, vocab_size=60, width=16, heads=2, layers=1))
    name = {id(p): n for n, p in net.named_parameters()}
    decay, free = ([name[id(p)] for p in g['params']] for g in parameter_groups(net, .1))
    spared = lambda n: any(w in n for w in ('bn', 'ln_', 'bias', 'logit_scale', 'downsample.1'))
    assert free == [n for n in name.values() if spared(n)] and decay == [n for n in name.values() if not spared(n)]
    assert {'token_embedding.weight', 'positional_embedding', 'text_projection', 'visual.conv1.weight'} <= set(decay)
    assert {'logit_scale', 'visual.bn1.weight', 'ln_final.weight', 'visual.layer1.0.downsample.1.weight'} <= set(free)


@pytest.mark.parametrize('sign, bound', [(1, math.log(100)), (-1, 0.)])
def test_logit_scale_stays_in_range(sign, bound):
    class Push:
        def __call__(self, model, batch): return {'push': -sign*model.logit_scale}
    model = fresh()
    fit(model, Push(), Batches(corpus(), 16), steps=2, lr=50., optimizer='sgd', device='cpu')
    assert model.logit_scale.item() == pytest.approx(bound, abs=1e-6)


def test_a_process_of_several_trains_apart(monkeypatch):
    "Without `apart`, Accelerate would wait for the second process."
    told = dict(LOCAL_RANK='0', WORLD_SIZE='2')
    for k, v in told.items(): monkeypatch.setenv(k, v)
    with pytest.raises(KeyError), train.apart():
        assert train._accelerator('no', 'cpu').num_processes == 1 and not told.keys() & os.environ.keys()
        raise KeyError
    assert told.items() <= os.environ.items()


def test_bf16_in_the_towers_only():
    seen, model = [], fresh()
    model.net.visual.proj.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    half = fit(model, CleanClipObjective(), Batches(corpus(), 16), steps=3, lr=1e-3, precision='bf16', log_every=1, device='cpu')
    full = fit(fresh(), CleanClipObjective(), Batches(corpus(), 16), steps=3, lr=1e-3, log_every=1, device='cpu')
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert half.column('loss') != full.column('loss') and half.column('loss') == pytest.approx(full.column('loss'), rel=.02)


def test_gradient_is_clipped():
    def moved(max_norm):
        model = fresh()
        before = weights(model)
        fit(model, ClipObjective(), Batches(corpus(), 16), steps=1, lr=1., optimizer='sgd', weight_decay=0., max_norm=max_norm,
            device='cpu')
        return (weights(model) - before).norm().item()
    assert moved(None) > .2 and moved(.1) == pytest.approx(.1, rel=1e-3)


@pytest.mark.slow
def test_corpus_that_is_not_in_memory(tmp_path):
    "Decoded by a worker, stopped within an epoch, resumed: the weights of the run on the cached corpus, dropout and all."
    from torchvision.io import write_png
    for s in corpus(): (tmp_path/f'c{s.label}').mkdir(exist_ok=True), write_png(s.image, str(tmp_path/f'c{s.label}/{s.key}.png'))
    on_disk = FolderCorpus(tmp_path).with_captions()
    run = lambda m, c, out, n=99: short(m, out, n=n, batches=Batches(c, 16, size=32, workers=1), checkpoint_every=4)
    cached, read, stopped = (fresh(dropout=.2) for _ in range(3))
    a = run(cached, on_disk.cache(32, progress=False), None)
    b = run(read, on_disk, None)
    with pytest.raises(PowerCut): run(fresh(dropout=.2), on_disk, tmp_path/'.run', 5)
    c = run(stopped, on_disk, tmp_path/'.run')
    assert torch.equal(weights(cached), weights(read)) and torch.equal(weights(cached), weights(stopped))
    assert a.column('loss') == b.column('loss') == c.column('loss')


def test_views_are_made_in_full_precision():
    "In bfloat16 a place in a picture of 224 px is off by a quarter of a pixel."
    seen = []
    model = lambda *pair: seen.append(torch.stack(pair)) or {}
    batch = next(iter(Batches(corpus(8), 8).epoch(0)))
    with torch.autocast('cpu', torch.bfloat16): SslObjective()(model, batch)
    SslObjective()(model, batch)
    assert seen[0].dtype == torch.float32 and torch.equal(*seen)


class Half:
    "An objective that notes the precision of each of its steps."
    def __init__(self): self.said = []
    def __call__(self, model, batch):
        self.said.append((torch.is_autocast_enabled('cpu'), AcceleratorState._shared_state.get('_mixed_precision')))
        return {'loss': model(batch.images.float()).mean()}


def test_a_hook_that_trains_leaves_the_run_as_it_was():
    "Accelerate keeps device and precision for all in one place."
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(3*32*32, 2)
        def forward(self, x): return self.layer(x.flatten(1))
    inner, outer = Half(), Half()
    batches = Batches(corpus(32), 16)
    hook = lambda model, epoch: fit(Net(), inner, batches, epochs=1, device='cpu', quiet=True)
    fit(Net(), outer, batches, epochs=3, precision='bf16', device='cpu', on_epoch=hook, quiet=True)
    assert outer.said == [(True, 'bf16')]*6 and inner.said == [(False, 'no')]*6


def test_a_forward_of_half_precision_goes_away():
    "Accelerate puts one upon the model when several processes train."
    model, own = nn.Linear(2, 2), nn.Linear(2, 2)
    own.forward = mine = lambda x: x
    for m in (model, own):
        with train._restoring(m, torch.device('cpu')): m.forward = m._original_forward = lambda x: x.bfloat16()
    assert not {'forward', '_original_forward'} & model.__dict__.keys() and model(torch.ones(1, 2)).dtype == torch.float32
    assert own.forward is mine and '_original_forward' not in own.__dict__


# Two processes


CASES = [(o, optimizer) for o in (ClipObjective(), CleanClipObjective(inmodal_weight=2.)) for optimizer in ('sgd', 'adamw')]


def in_step(objective, optimizer, out=None, n=99):
    "Five steps; group norm, because batch norm's statistics are those of a process's own slice."
    model = fresh('group')
    history = fit(model, Stops(objective, n), Batches(corpus(), 16, seed=1), steps=5, lr=.01 if optimizer == 'sgd' else 1e-3,
                  eps=1e-6, optimizer=optimizer, max_norm=5., log_every=2, out=out, checkpoint_every=2, device='cpu')
    return model, history


def one_of_two(rank, port, folder):
    as_launched(rank, port)
    for k, case in enumerate(CASES):
        model, history = in_step(*case)
        torch.save(dict(weights=weights(model), rows=history.rows), folder/f'{k}-{rank}.pt')
    assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == 'gloo'
    try: in_step(*CASES[3], out=folder/'run', n=3)
    except PowerCut: (folder/f'cut-{rank}').touch()
    leave_together()


@pytest.mark.slow
@needs_fork
def test_two_processes_are_one(tmp_path):
    "Negatives from both processes, gradients through the exchange; and a run that two began can be ended by one."
    assert start_two(one_of_two, tmp_path) == [0, 0]
    for k, case in enumerate(CASES):
        first, second = (torch.load(tmp_path/f'{k}-{r}.pt', weights_only=True) for r in (0, 1))
        model, history = in_step(*case)
        start = weights(fresh())
        assert torch.equal(first['weights'], second['weights']), case
        assert (first['weights'] - weights(model)).abs().max() < 1e-4 < .003 < (weights(model) - start).abs().max(), case
        for key in ('loss', 'clip'): assert [r[key] for r in first['rows']] == pytest.approx(history.column(key), abs=1e-4)
    assert (tmp_path/'cut-0').exists() and (tmp_path/'cut-1').exists()
    assert torch.load(tmp_path/'run/checkpoint.pt', weights_only=True)['step'] == 2
    alone, history = in_step(*CASES[3], out=tmp_path/'run')
    assert (weights(alone) - weights(model)).abs().max() < 1e-4 and history.column('step') == [2, 4, 5]


def contrast(recipe): return train_encoder(ShapeCaps(16), recipe, quiet=True, device='cpu')[0]


MOCO = SslRecipe('mocov2', 'vit_tiny', epochs=1, batch_size=8, queue=32, hidden=32, out=16, lr=.5)


def contrast_of_two(rank, port, folder):
    as_launched(rank, port)
    torch.save(weights(contrast(MOCO)), folder/f'{rank}.pt')
    leave_together()


@pytest.mark.slow
@needs_fork
def test_two_processes_fill_one_queue(tmp_path):
    "Also in the first training, whose learner is made before the processes know of each other."
    one, other = saved_by_two(contrast_of_two, tmp_path)
    alone, start = weights(contrast(MOCO)), weights(MOCO.new_encoder(0))
    assert torch.equal(one, other) and (one - alone).abs().max() < 1e-4 < .003 < (alone - start).abs().max()


def test_moco_v3_has_other_heads_and_positions_for_a_transformer():
    recipe = SslRecipe('mocov3', 'vit_tiny', hidden=32, out=16)
    of = lambda e: SslLearner(e, 'mocov3', 32, 16)
    layers = lambda m: sum(isinstance(x, torch.nn.Linear) for x in m.modules())
    vit, net = of(recipe.new_encoder()), of(replace(recipe, encoder='resnet10', width=4).new_encoder())
    assert [layers(m.projector) for m in (vit, net)] == [3, 2] and [layers(m.predictor) for m in (vit, net)] == [2, 2]
    assert isinstance(vit.predictor.layers[-1], torch.nn.BatchNorm1d) and isinstance(net.predictor.layers[-1], torch.nn.Linear)
    learned, trained = recipe.new_encoder(), contrast(replace(recipe, epochs=1, batch_size=8))
    positions = lambda e: e.net.vit.encoder.pos_embedding
    assert torch.equal(positions(learned), positions(trained)) and not positions(learned).requires_grad
