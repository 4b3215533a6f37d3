"What people install: a wheel that holds everything and nothing else, and a command that answers at once."
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bdnb

top = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(top/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def best_of_three(code):
    "Seconds of the fastest of three fresh interpreters that run `code`, and what the last one printed."
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, '-c', code], cwd=top, capture_output=True, text=True, timeout=120,
                              env={**os.environ, 'COLUMNS': '120'})
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    return min(seconds), done.stdout


def test_import_is_quick():
    seconds, printed = best_of_three('import bdnb; print(bdnb.__version__)')
    assert printed.strip() == cfg['version'] and seconds < 1, f'import bdnb took {seconds:.2f} s'


def test_help_is_quick():
    seconds, printed = best_of_three('import sys; sys.argv = ["bdnb", "--help"]; from bdnb.cli import main; main()')
    assert 'bdnb' in printed and 'tour' in printed
    assert seconds < 1.5, f'bdnb --help took {seconds:.2f} s'


def test_one_version():
    assert bdnb.__version__ == cfg['version']
    assert re.search(rf'^version: {re.escape(cfg["version"])}$', (top/'CITATION.cff').read_text(encoding='utf-8'), re.M)
    assert f'## {cfg["version"]}' in (top/'CHANGELOG.md').read_text(encoding='utf-8')


def test_citation():
    import yaml
    cff = yaml.safe_load((top/'CITATION.cff').read_text(encoding='utf-8'))
    papers = {ref['url'].rsplit('/', 1)[1]: ref for ref in cff['references']}
    assert set(papers) == {'2312.07955', '2403.16257', '2303.03323', '2211.12044', '2409.17601'}
    assert all(ref['title'] and len(ref['authors']) > 1 for ref in papers.values())


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel of this tree, built without network from a copy (setuptools writes beside what it builds)."
    tree, out = tmp_path_factory.mktemp('tree'), tmp_path_factory.mktemp('wheel')
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(top/name, tree)
    shutil.copytree(top/'bdnb', tree/'bdnb', ignore=shutil.ignore_patterns('__pycache__'))
    command = ['-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', str(out), str(tree)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = out.glob('*.whl')
    with zipfile.ZipFile(path) as archive: yield archive


def metadata(wheel, name):
    "Text of one file of the wheel's dist-info."
    [path] = [n for n in wheel.namelist() if n.endswith(f'.dist-info/{name}')]
    return wheel.read(path).decode('utf-8')


@pytest.mark.slow
def test_wheel_holds_the_package(wheel):
    inside = {n for n in wheel.namelist() if '.dist-info/' not in n}
    here = {p.relative_to(top).as_posix() for kind in ('*.py', '*.json') for p in (top/'bdnb').rglob(kind)}
    assert inside == here
    assert not any(n.startswith(('tests/', 'nbs/', 'tools/')) for n in inside)
    assert 'Apache License' in metadata(wheel, 'licenses/LICENSE')


@pytest.mark.slow
def test_wheel_says_what_it_needs(wheel):
    meta = Parser().parsestr(metadata(wheel, 'METADATA'))
    assert (meta['Name'], meta['Version'], meta['Requires-Python']) == ('bdnb', cfg['version'], '>=3.10')
    needs = {r.name: r for r in map(Requirement, meta.get_all('Requires-Dist')) if not (r.marker and 'extra' in str(r.marker))}
    assert set(needs) == {Requirement(r).name for r in shlex.split(cfg['requirements'])}
    assert {'torch', 'torchvision', 'typer'} <= set(needs) and not {'nbdev', 'fastcore'} & set(needs)
    assert not any('==' in str(r.specifier) for r in needs.values()) and str(needs['triton'].marker) == 'sys_platform == "linux"'
    assert set(meta.get_all('Provides-Extra')) == {'dev', 'parquet', 'wordnet', 'tensorboard'}
    assert 'bdnb = bdnb.cli:main' in metadata(wheel, 'entry_points.txt')


def test_a_stamp_names_what_a_person_types(tmp_path):
    code = "import sys, runpy; sys.argv = ['x', '--help']; import bdnb.core as c; print(c.stamp()['command'])"
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == 'x --help'
    (tmp_path/'bdnb_probe.py').write_text("import sys, types\nfrom bdnb.core import stamp\n"
                                          "sys.modules['__main__'].__spec__ = types.SimpleNamespace(name='bdnb.classifier_study')\n"
                                          "print(stamp()['command'])\n")
    said = subprocess.run([sys.executable, str(tmp_path/'bdnb_probe.py'), '--seeds', '0'], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == 'python -m bdnb.classifier_study --seeds 0'


def test_a_copy_without_its_history_says_its_commit_itself(tmp_path, monkeypatch):
    "`BDNB_COMMIT` comes first; without it git is asked, and where there is none the stamp says so."
    from bdnb.core import stamp
    monkeypatch.setenv('BDNB_COMMIT', 'a1b2c3')
    assert stamp('x')['commit'] == 'a1b2c3'
    monkeypatch.delenv('BDNB_COMMIT')
    monkeypatch.setenv('PATH', str(tmp_path))                            # no git here
    assert stamp('x')['commit'] is None
