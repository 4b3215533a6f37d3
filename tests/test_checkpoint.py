"""What a stranger's checkpoint file may try, and what it gets: one line, and nothing run."""
import json, os, pickle, subprocess, sys, textwrap, warnings, zipfile
from pathlib import Path
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from bdnb.core import BdnbError
from bdnb.models.build import ClipModel, create_model
from bdnb.models import checkpoint
from bdnb.models.checkpoint import (agrees, architecture, as_wanted, convert, from_hub, load_checkpoint, load_weights,
                                    read_header, read_tensors, save_checkpoint, state_dict_in, write_tensors)
from bdnb.models.encoders import load_encoder

@pytest.fixture(scope='module')
def model(): return create_model('tiny', seed=5)

@pytest.fixture(scope='module')
def good(model, tmp_path_factory): return save_checkpoint(model, tmp_path_factory.mktemp('good')/'tiny.safetensors')

def refused(path, *words, model=None):
    "Loading fails with one line that names the file and holds these words."
    with pytest.raises(BdnbError) as e: load_checkpoint(path, model)
    line = str(e.value)
    assert str(path) in line and '\n' not in line and all(w in line for w in words), line
    assert 'weights_only' not in line                          # we never pass on the advice to switch the protection off

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

# ---- round trips

def test_round_trip_is_bit_exact(model, good):
    assert same(load_checkpoint(good), model) and read_header(good)['meta'] == {}
    odd = create_model('tiny', seed=1, image_size=64)
    with torch.no_grad(): odd.net.logit_scale.fill_(np.nextafter(np.float32(1), np.float32(2)))
    odd.set_normalisation([.5, .25, 1/3], [.1, .2, .3])
    path = save_checkpoint(odd, good.parent/'odd.safetensors', note='é', rows=[1, None])
    back = load_checkpoint(path)
    assert same(back, odd) and back.image_size == 64 and torch.equal(back.mean, odd.mean) and torch.equal(back.std, odd.std)
    assert read_header(path)['meta'] == {'note': 'é', 'rows': [1, None]}

def test_names_are_open_clips(model, good): assert load_file(good).keys() == model.net.state_dict().keys()

def test_same_model_same_bytes(model, good, tmp_path):
    assert save_checkpoint(model, tmp_path/'a.safetensors').read_bytes() == good.read_bytes()

def test_filling_a_model_keeps_its_place(model, good):
    into = create_model('tiny', seed=9).train()
    assert load_checkpoint(good, into) is into and into.training and same(into, model)
    assert same(create_model('tiny', good), model)

def test_wrapped_models(model, good, tmp_path):
    wrapped = torch.nn.DataParallel(model)
    assert save_checkpoint(wrapped, tmp_path/'w.safetensors').read_bytes() == good.read_bytes()

def test_tied_and_strided_tensors(tmp_path):
    a = torch.arange(12.).reshape(3, 4)
    tied = dict(a=a, same=a, column=a[:, 1], turned=a.T, row=a[1], grown=a[:1].expand(5, 4))
    back, header = read_tensors(write_tensors(tied, tmp_path/'t.safetensors', {'k': 1}))
    assert header == {'k': 1} and all(torch.equal(back[k], v) for k, v in tied.items())

def test_tied_parameters_load(model, tmp_path):
    net = create_model('tiny', seed=2)
    net.net.text.ln_final.bias = net.net.text.transformer.resblocks[0].ln_1.bias
    with torch.no_grad(): net.net.text.ln_final.bias.uniform_()
    back = load_checkpoint(save_checkpoint(net, tmp_path/'t.safetensors'))
    assert torch.equal(back.net.text.ln_final.bias, net.net.text.ln_final.bias) and same(back, net)

# ---- published files

def published(model, prefix='module.', dtype=None):
    f = lambda v: v.to(dtype) if dtype and v.is_floating_point() else v
    return {prefix + k: f(v) for k, v in model.net.state_dict().items()}

@pytest.mark.parametrize('wrap', [lambda d: {'epoch': 3, 'name': 'x', 'state_dict': d, 'optimizer': {'state': {}}},
                                  lambda d: {'model': d}, lambda d: d, lambda d: d | {'loss': {'center': torch.zeros(4)}}])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.module.'])
def test_convert(model, tmp_path, wrap, prefix):
    torch.save(wrap(published(model, prefix)), tmp_path/'p.pt')
    header = convert(tmp_path/'p.pt', tmp_path/'c.safetensors')
    assert same(load_checkpoint(tmp_path/'c.safetensors'), model) and header['name'] == 'tiny'
    assert header['meta']['converted_from'] == 'p.pt' and len(header['meta']['sha256']) == 64
    assert load_file(tmp_path/'c.safetensors').keys() == model.net.state_dict().keys()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(model, tmp_path, dtype):
    torch.save(published(model, '', dtype), tmp_path/'h.pt')
    back = load_checkpoint(tmp_path/'h.pt')
    for p, q in zip(back.parameters(), model.parameters()):
        assert p.dtype == torch.float32 and torch.equal(p, q.to(dtype).float())

def test_openai_extras_are_dropped(model, tmp_path):
    extra = dict(input_resolution=torch.tensor(32), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))
    torch.save(published(model, '') | extra, tmp_path/'o.pt')
    assert same(load_checkpoint(tmp_path/'o.pt'), model)

def test_both_text_layouts():
    import open_clip
    cfg = dict(embed_dim=16, vision_cfg=dict(layers=1, width=32, head_width=16, patch_size=16, image_size=32),
               text_cfg=dict(width=32, heads=2, layers=1))
    a, b = (ClipModel(f(**cfg).eval(), 'small') for f in (open_clip.CLIP, open_clip.CustomTextCLIP))
    tokens, pictures = a.tokenize(["a red circle", ""]), torch.rand(2, 3, 32, 32)
    for src, dst in ((a, b), (b, a)):
        torch.nn.init.normal_(src.net.logit_scale)
        load_weights(dst, src.net.state_dict())
        with torch.no_grad(): assert all(torch.equal(x, y) for x, y in zip(src(pictures, tokens), dst(pictures, tokens)))

@pytest.mark.slow
@pytest.mark.parametrize('name', ['RN50', 'ViT-B-32'])
def test_real_architectures(name, tmp_path):
    import open_clip
    with pytest.raises(BdnbError): create_model(name, str(tmp_path/'none.pt'))
    model = create_model(name + '-quickgelu', seed=1)
    torch.save({'state_dict': published(model)}, tmp_path/'p.pt')
    with pytest.warns(UserWarning, match='QuickGELU|activation'): header = convert(tmp_path/'p.pt', tmp_path/'c.safetensors')
    assert header['name'] == name + '-quickgelu' and same(load_checkpoint(tmp_path/'c.safetensors'), model)
    assert convert(tmp_path/'p.pt', tmp_path/'g.safetensors', model=name)['name'] == name            # the user knows: plain GELU
    theirs = open_clip.create_model(name + '-quickgelu', pretrained=str(tmp_path/'c.safetensors'))    # open_clip reads ours
    assert same(theirs, model.net)
    refused(tmp_path/'c.safetensors', 'has shape', 'needs', model='RN101' if name == 'RN50' else 'ViT-B-16')
    model.name = 'ViT-bigG-14'                                                                       # a header that lies
    refused(save_checkpoint(model, tmp_path/'lie.safetensors'), "says 'ViT-bigG-14'")

# ---- files that are not what they should be

def test_no_such_file(tmp_path):
    refused(tmp_path/'nowhere.pt', 'no such checkpoint file')
    refused(tmp_path, 'folder')

@pytest.mark.parametrize('suffix', ['.pt', '.safetensors', '.bin'])
@pytest.mark.parametrize('seed', range(5))
def test_random_bytes(tmp_path, suffix, seed):
    path = tmp_path/f'noise{suffix}'
    path.write_bytes(np.random.default_rng(seed).bytes(3000) if seed else b'')
    refused(path, 'not a checkpoint')

@pytest.mark.parametrize('share', [0, .0001, .3, .999])
def test_truncated(model, good, tmp_path, share):
    torch.save(model.net.state_dict(), tmp_path/'full.pt')
    for src, dst in ((good, tmp_path/'cut.safetensors'), (tmp_path/'full.pt', tmp_path/'cut.pt')):
        dst.write_bytes(src.read_bytes()[:int(share*src.stat().st_size)])
        refused(dst, 'not a checkpoint, or damaged')

def header_only(path, entries, body=b''):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + body)
    return path

def test_shape_bombs(tmp_path):
    bomb = dict(dtype='F32', shape=[2**31, 2**31], data_offsets=[0, 4])
    refused(header_only(tmp_path/'a.safetensors', {'visual.proj': bomb}, b'1234'), 'not a checkpoint')
    (tmp_path/'b.safetensors').write_bytes((2**40).to_bytes(8, 'little') + b'{}')
    refused(tmp_path/'b.safetensors', 'not a checkpoint')
    huge = torch.zeros(1).expand(2**20, 2**20)                     # four terabytes on paper, four bytes on disk
    torch.save({'visual.conv1.weight': huge}, tmp_path/'c.pt')
    refused(tmp_path/'c.pt', 'none of tiny')
    refused(tmp_path/'c.pt', 'has no', model='tiny')
    torch.save({'logit_scale': huge}, tmp_path/'d.pt')
    refused(tmp_path/'d.pt', 'logit_scale has shape [1048576, 1048576]', model='tiny')

def test_compressed_archive(tmp_path):
    torch.save({'a': torch.zeros(10**6)}, tmp_path/'a.pt')
    with zipfile.ZipFile(tmp_path/'a.pt') as src, zipfile.ZipFile(tmp_path/'b.pt', 'w', zipfile.ZIP_DEFLATED) as dst:
        for i in src.infolist(): dst.writestr(i.filename, src.read(i))
    refused(tmp_path/'b.pt', 'compressed')

def test_members_that_overlap(tmp_path):
    "One megabyte of a file may be listed a thousand times: each would be read as another tensor."
    torch.save({f'{i}': torch.zeros(1000) + i for i in range(50)}, tmp_path/'a.pt')
    data = bytearray((tmp_path/'a.pt').read_bytes())
    with zipfile.ZipFile(tmp_path/'a.pt') as z: first = z.getinfo('a/data/0').header_offset
    at = -1
    while (at := data.find(b'PK\x01\x02', at + 1)) >= 0:
        name = bytes(data[at + 46:at + 46 + int.from_bytes(data[at + 28:at + 30], 'little')])
        if name.startswith(b'a/data/'):
            data[at + 42:at + 46] = first.to_bytes(4, 'little')                         # all at the place of the first,
            data[at + 20:at + 28] = (50_000).to_bytes(4, 'little')*2                    # and longer than they are
    (tmp_path/'b.pt').write_bytes(data)
    refused(tmp_path/'b.pt', 'overlap')
    assert len(read_tensors(tmp_path/'a.pt')[0]) == 50

@pytest.mark.parametrize('write', [lambda t, p: save_file(t, p/'a.safetensors'), lambda t, p: torch.save(t, p/'a.safetensors')])
def test_a_million_names_are_not_compared(tmp_path, monkeypatch, write):
    monkeypatch.setattr(checkpoint, 'MOST_TENSORS', 9)
    write({f'{i}': torch.zeros(1) for i in range(10)}, tmp_path)
    (tmp_path/'a.safetensors').rename(tmp_path/'a.bin')
    refused(tmp_path/'a.bin', 'holds 10 tensors, at most 9')

def test_torchscript(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path/'a.pt')
    refused(tmp_path/'a.pt', 'TorchScript')

class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)

class Eval(Touch):
    def __reduce__(self): return eval, (f'open({str(self.path)!r}, "w")',)

@pytest.mark.parametrize('payload', [Touch, Eval])
def test_malicious_pickles_run_nothing(model, tmp_path, payload):
    mark, tensors = tmp_path/'owned', model.net.state_dict()
    torch.save({'state_dict': tensors, 'optimizer': payload(mark)}, tmp_path/'zip.pt')
    torch.save(tensors | {'x': payload(mark)}, tmp_path/'legacy.pt', _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 4): (tmp_path/f'plain{protocol}.pt').write_bytes(pickle.dumps(payload(mark), protocol))
    (tmp_path/'dressed.safetensors').write_bytes(pickle.dumps(payload(mark)))
    for path in sorted(tmp_path.glob('*.*')):
        for f in (load_checkpoint, read_tensors, lambda p: load_checkpoint(p, 'tiny'), lambda p: create_model('tiny', p),
                  lambda p: convert(p, tmp_path/'out.safetensors')):
            with pytest.raises(BdnbError): f(path)
    refused(tmp_path/'zip.pt', 'runs nothing from a file', 'system' if payload is Touch else 'eval')
    assert not mark.exists() and not (tmp_path/'out.safetensors').exists()
    pickle.loads(pickle.dumps(payload(mark)))                      # the payload does work, when somebody runs it
    assert mark.exists()

# ---- weights that do not fit

def test_first_wrong_shape_is_named(model, tmp_path):
    wrong = dict(model.net.state_dict(), logit_scale=torch.zeros(2, 3))
    refused(write_tensors(wrong, tmp_path/'w.safetensors', header_of(model)), 'logit_scale has shape [2, 3]', 'needs []')

def header_of(model): return dict(name=model.name, image_size=model.image_size)

def test_missing_and_unexpected(model, tmp_path):
    state = model.net.state_dict()
    few = {k: v for k, v in state.items() if 'resblocks' not in k}
    refused(write_tensors(few, tmp_path/'few.safetensors', header_of(model)), 'has no', 'resblocks', f'({len(state) - len(few)} in')
    more = state | {'head.weight': torch.zeros(1)}
    refused(write_tensors(more, tmp_path/'more.safetensors', header_of(model)), 'has head.weight')
    torch.save({'epoch': 1}, tmp_path/'none.pt')
    refused(tmp_path/'none.pt', 'no state dict')

@pytest.mark.parametrize('value,words', [(float('nan'), 'not finite'), (float('inf'), 'not finite')])
def test_not_finite(model, tmp_path, value, words):
    bad = {k: v.clone() for k, v in model.net.state_dict().items()}
    bad['text.ln_final.bias'][3] = value
    path = write_tensors(bad, tmp_path/'n.safetensors', header_of(model))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    refused(path, 'text.ln_final.bias', words)
    refused(path, words, model=model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())       # a refused file leaves the model as it was

@pytest.mark.parametrize('kind', [torch.int64, torch.complex64, torch.bool])
def test_wrong_kind(model, tmp_path, kind):
    torch.save(dict(model.net.state_dict(), logit_scale=torch.zeros((), dtype=kind)), tmp_path/'k.pt')
    refused(tmp_path/'k.pt', 'logit_scale', 'float32 is needed')

def test_whole_numbers_and_fractions():
    "A counter of batches may be a fraction, and nothing else; what is not finite is told before it is rounded."
    whole, half = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.float16)
    assert as_wanted('bn.num_batches_tracked', torch.full((2,), 3.), whole, 'x.pt').tolist() == [3, 3]
    for name, v, like, words in (('relative_position_index', torch.zeros(2), whole, 'plain torch.int64 is needed'),
                                 ('bn.num_batches_tracked', torch.full((2,), float('nan')), whole, 'not finite'),
                                 ('weight', whole, half, 'plain torch.float16 is needed'),
                                 ('weight', torch.full((2,), 1e6), half, 'not finite')):
        with pytest.raises(BdnbError, match=f'x.pt: tensor {name} .*{words}'): as_wanted(name, v, like, 'x.pt')

def test_an_average_beside_the_network_stays_behind():
    net = {f'layer{i}.weight': torch.zeros(1) for i in range(12)}
    more = {'steps': torch.zeros(1)}
    wrapped = {f'module.{k}': v for k, v in net.items()} | more
    for beside in ({'ema': net | more}, {'ema': net | more, 'slow': net | more}, {'ema': wrapped}):
        assert state_dict_in(net | beside, 'x.pt') == net
    beside = state_dict_in({'queue_ptr': torch.zeros(1), 'student': net, 'teacher': net}, 'x.pt')
    assert list(beside) == ['queue_ptr', *(f'student.{k}' for k in net)]                # one object of two names is read once

@pytest.mark.parametrize('header,words', [
    (dict(name='hf-hub:evil/model', image_size=32), 'not built in'), (dict(name='local-dir:/tmp', image_size=32), 'not built in'),
    (dict(name=['tiny'], image_size=32), 'not built in'), (dict(name='tiny', image_size=10**9), '16 to 1024'),
    (dict(name='tiny', image_size='32'), '16 to 1024'), (dict(name='ViT-bigG-14', image_size=224), 'other shapes'),
    (dict(name='tiny', image_size=32, std=[0, 1, 1]), 'mean and std'),
    (dict(name='tiny', image_size=32, mean=[1, 2]), 'mean and std')])
def test_headers_that_lie(model, tmp_path, header, words):
    refused(write_tensors(model.net.state_dict(), tmp_path/'h.safetensors', header), words)

HUB = [n for n in open_clip.list_models() if any(k.startswith('hf_') for k in open_clip.get_model_config(n)['text_cfg'])]

@pytest.fixture
def no_building(monkeypatch):
    "Any attempt to build a network of open_clip with storage fails."
    def stop(*a, device='cpu', **k): assert device == 'meta', 'a network was built'; return create(*a, device=device, **k)
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, 'create_model', stop)
    monkeypatch.setattr(open_clip, 'get_tokenizer', stop)

@pytest.mark.parametrize('name', HUB)
def test_no_header_makes_us_fetch(name, tmp_path, no_building):
    "A text tower or a tokenizer of Hugging Face would come over the network: whoever wants that says so."
    c = open_clip.get_model_config(name)
    t = c['text_cfg']
    tensors = {'text.ln_final.weight': torch.zeros(t.get('width', 512)), 'text.text_projection': torch.zeros(1, c['embed_dim'])}
    tensors |= {f'text.transformer.resblocks.{i}.a': torch.zeros(1) for i in range(t.get('layers', 12))}
    path = write_tensors(tensors, tmp_path/'h.safetensors', dict(name=name, image_size=224))
    refused(path, name, 'from Hugging Face', f'--model {name}')
    assert from_hub(name) and from_hub('ViT-B-32') is from_hub('tiny') is None

def test_a_name_by_hand_may_fetch(tmp_path, monkeypatch):
    "... with the picture size that the file says."
    asked = []
    def create(name, image_size): asked.append((name, image_size)); raise BdnbError('asked for')
    monkeypatch.setattr(checkpoint, 'create_model', create)
    path = write_tensors({'a': torch.zeros(1)}, tmp_path/'h.safetensors', dict(name='roberta-ViT-B-32', image_size=64))
    with pytest.raises(BdnbError, match='asked for'): load_checkpoint(path, 'roberta-ViT-B-32')
    with pytest.raises(BdnbError, match='asked for'): load_encoder(path, 'roberta-ViT-B-32')
    with pytest.raises(BdnbError, match='asked for'): load_checkpoint(path, 'ViT-B-32')
    assert asked == [('roberta-ViT-B-32', 64)]*2 + [('ViT-B-32', None)]

def test_nothing_compared_agrees_with_nothing():
    "nllb-clip-base-siglip is another library's on both sides: its configuration says only how wide the shared space is."
    assert not any(agrees(n, architecture({})) for n in open_clip.list_models())
    assert agrees('nllb-clip-base-siglip', architecture({'text_projection': (1, 768)}))
    assert not agrees('nllb-clip-base-siglip', architecture({'text_projection': (1, 512)}))

@pytest.mark.parametrize('name', ['ViT-bigG-14', 'RN50x64', 'convnext_large_d'])
def test_a_small_file_builds_no_giant(name, tmp_path, no_building):
    "Tensors of one number under the right names show an architecture too, but hold no weights of it."
    c = open_clip.get_model_config(name)
    v, t = c['vision_cfg'], c['text_cfg']
    small = {'ln_final.weight': torch.zeros(t['width']), 'text_projection': torch.zeros(1, c['embed_dim'])}
    small |= {f'transformer.resblocks.{i}.a': torch.zeros(1) for i in range(t['layers'])}
    if name.startswith('RN'):
        small |= {'visual.attnpool.positional_embedding': torch.zeros(2, 1),
                  'visual.layer1.0.conv1.weight': torch.zeros(v['width'], 1)}
        small |= {f'visual.layer{b + 1}.{i}.a': torch.zeros(1) for b, n in enumerate(v['layers']) for i in range(n)}
    else:
        small |= {'visual.conv1.weight': torch.zeros(v.get('width', 1), 1, 1, v.get('patch_size', 1)),
                  'visual.positional_embedding': torch.zeros(2, 1)}
        small |= {f'visual.transformer.resblocks.{i}.a': torch.zeros(1) for i in range(v.get('layers', 0))}
    assert agrees(name, architecture({k: v.shape for k, v in small.items()}))
    path = write_tensors(small, tmp_path/'giant.safetensors', dict(name=name, image_size=224))
    refused(path, 'numbers, but', 'name the right model')
    with pytest.raises(BdnbError, match='giant.safetensors'): load_encoder(path)

@pytest.mark.parametrize('text', ['{', '[1]', '"x"', 'NaN', '['*100_000])
def test_headers_that_are_no_headers(model, tmp_path, text):
    save_file(dict(model.net.state_dict()), tmp_path/'h.safetensors', metadata={'bdnb': text})
    refused(tmp_path/'h.safetensors')

def test_foreign_safetensors(model, tmp_path):
    save_file(dict(model.net.state_dict()), tmp_path/'f.safetensors')
    assert same(load_checkpoint(tmp_path/'f.safetensors'), model)

# ---- writing

def test_refused_names_and_meta(model, tmp_path):
    with pytest.raises(BdnbError, match='.safetensors'): save_checkpoint(model, tmp_path/'m.pt')
    for bad in (object(), float('nan')):
        with pytest.raises(BdnbError, match='plain JSON'): save_checkpoint(model, tmp_path/'m.safetensors', x=bad)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.skipif(not hasattr(os, 'fork'), reason="file size limits are a POSIX matter")
def test_no_room_leaves_the_old_file(good, tmp_path):
    (tmp_path/'m.safetensors').write_bytes(b'old')
    code = f"""
        import resource, signal
        from bdnb.models.checkpoint import *
        from bdnb.core import BdnbError
        model = load_checkpoint({str(good)!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
        try: save_checkpoint(model, {str(tmp_path/'m.safetensors')!r})
        except BdnbError as e: print('refused:', e)"""
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[1])})
    assert 'refused:' in done.stdout and 'm.safetensors' in done.stdout, done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['m.safetensors'] and (tmp_path/'m.safetensors').read_bytes() == b'old'

def test_bad_replacement_leaves_the_old_file(model, tmp_path):
    (tmp_path/'noise.pt').write_bytes(b'noise')
    (tmp_path/'old.safetensors').write_bytes(b'old')
    with pytest.raises(BdnbError): convert(tmp_path/'noise.pt', tmp_path/'old.safetensors')
    assert (tmp_path/'old.safetensors').read_bytes() == b'old'
