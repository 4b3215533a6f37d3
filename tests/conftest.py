"Tests share two cores with whatever else runs: one thread each, no display, no network."
import os
import shlex
from typing import NamedTuple

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest  # noqa: E402  (what stands above is read by what is imported below)
import torch
from bdnb.core import BdnbError
from bdnb.models.checkpoint import write_tensors


class Said(NamedTuple):
    "What one run of the program gave back."
    code:int; out:str; err:str


@pytest.fixture
def run(capsys):
    "Run `bdnb` in this process: a `Said`."
    from bdnb.cli import main
    def call(line):
        capsys.readouterr()
        return Said(main(shlex.split(line) if isinstance(line, str) else line), *capsys.readouterr())
    return call


def refused(f, *words):
    "One line, with these words in it."
    with pytest.raises(BdnbError) as e: f()
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value


def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "The file of a small encoder; only read."
    from bdnb.models.encoders import create_encoder, save_encoder
    path = tmp_path_factory.mktemp('encoder')/'e.safetensors'
    save_encoder(create_encoder('resnet10/half', 4), path)
    return path


@pytest.fixture
def stranger(tmp_path):
    "Writes a header and tensors; returns the path."
    def write(header, tensors=None): return write_tensors(tensors or {'a': torch.zeros(3)}, tmp_path/'odd.safetensors', header)
    return write


@pytest.fixture
def no_storage(monkeypatch):
    "Any network that is built with storage fails."
    register = torch.nn.Module.register_parameter
    def stop(self, name, p):
        assert p is None or p.is_meta, 'a network was built'
        return register(self, name, p)
    monkeypatch.setattr(torch.nn.Module, 'register_parameter', stop)
