"Tests share two cores with whatever else runs: one thread each, no display, no network."
import os
import shlex
import socket
import sys
from multiprocessing import get_context
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


fork = get_context('forkserver') if sys.platform != 'win32' else None   # children of a clean process, not of one that has trained
needs_fork = pytest.mark.skipif(fork is None, reason='no forkserver here')
if fork: fork.set_forkserver_preload(['bdnb.cli', 'bdnb.scan', 'bdnb.train', 'bdnb.models.tiny', 'bdnb.defenses.bcu', 'open_clip',
                                      'accelerate', 'webdataset', 'pyarrow.parquet'])
ENDS = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'


def as_launched(rank, port):
    "In a process of `start_two`: what torchrun would have said to it."
    torch.set_num_threads(1)
    os.environ.update(zip(ENDS, (str(rank), str(rank), '2', '2', '127.0.0.1', str(port))), ACCELERATE_USE_CPU='1')


def leave_together():
    "At the end of a process of `start_two`."
    import torch.distributed as both
    both.barrier()
    both.destroy_process_group()


def start_two(work, *args):
    "Run `work(rank, port, *args)` in two processes: their exit codes."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    pair = [fork.Process(target=work, args=(r, port, *args)) for r in (0, 1)]
    for p in pair: p.start()
    for p in pair: p.join(900)
    return [p.exitcode for p in pair]


def saved_by_two(work, folder):
    "What `work(rank, port, folder)` saved as `RANK.pt` in each of two processes."
    assert start_two(work, folder) == [0, 0]
    return [torch.load(folder/f'{r}.pt', weights_only=True) for r in (0, 1)]


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
