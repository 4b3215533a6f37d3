"The repository keeps its own promises: notebooks and package agree, pages link, nothing points outside."
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from check_site import built_problems, source_problems

top = Path(__file__).resolve().parent.parent
nbs, lib = top/'nbs', top/'bdnb'
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(nbs).parts))
modules = sorted(lib.rglob('*.py'))
sys.path.insert(0, str(top/'tools'))


def nbdev(command, cwd):
    "Run one nbdev command in `cwd` with this interpreter, without the mark that nbdev_test leaves in the environment."
    code = f'import os; os.environ.pop("IN_TEST", None); from nbdev.cli import {command}; {command}.__wrapped__()'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the notebooks and settings, to run nbdev on without touching the tree."
    folder = tmp_path_factory.mktemp('copy')
    shutil.copy(top/'settings.ini', folder)
    shutil.copytree(nbs, folder/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_*'))
    return folder


def test_package_is_what_the_notebooks_export(copy):
    (copy/'bdnb').mkdir()
    nbdev('nbdev_export', copy)
    made = {p.relative_to(copy/'bdnb') for p in (copy/'bdnb').rglob('*.py')}
    kept = {p.relative_to(lib) for p in modules}
    wrong = [f'bdnb/{p} differs' for p in sorted(made & kept) if not filecmp.cmp(copy/'bdnb'/p, lib/p, shallow=False)]
    wrong += [f'bdnb/{p} is missing' for p in sorted(made - kept)]
    wrong += [f'bdnb/{p} comes from no notebook' for p in sorted(kept - made)]
    assert not wrong, 'the package and its notebooks disagree; run `make build`:\n' + '\n'.join(wrong)


def test_notebooks_are_clean(copy):
    nbdev('nbdev_clean', copy)
    dirty = [str(p.relative_to(top)) for p in notebooks if p.read_bytes() != (copy/p.relative_to(top)).read_bytes()]
    assert not dirty, 'notebooks carry noise; run `nbdev_clean`:\n' + '\n'.join(dirty)


def test_readme_is_made_from_the_index():
    from make_readme import readme
    assert (top/'README.md').read_text(encoding='utf-8') == readme(top), 'run `python tools/make_readme.py`'


def test_readme_maker(tmp_path):
    from make_readme import render
    cell = lambda source, *outputs: dict(cell_type='code', source=[source], outputs=list(outputs))
    shown = dict(output_type='display_data', data={'text/markdown': ['| a |\n', '|---|']})
    text = render(dict(cells=[
        dict(cell_type='markdown', source=['# T\n', '[x](a/b.ipynb#c) [y](https://e.org/main/LICENSE) [z](#t) ![p](i.svg)']),
        dict(cell_type='raw', source=['---']), cell('#| hide\nsecret = 1', shown), cell('#| echo: false\nquiet()', shown),
        cell('loud()', dict(output_type='stream', text=['said\n']))]), 'nbs/', 'https://e.org/main/')
    assert '[x](nbs/a/b.ipynb#c) [y](LICENSE) [z](#t) ![p](nbs/i.svg)' in text
    assert text.count('| a |') == 1 and '```python\nloud()\n```\n\n```\nsaid\n```' in text
    assert 'secret' not in text and 'quiet' not in text and '---\n' not in text.replace('|---|\n', '')
    picture = dict(output_type='display_data', data={'image/png': 'AA', 'text/plain': ['<Figure>']})
    with pytest.raises(SystemExit, match='save the picture'): render(dict(cells=[cell('draw()', picture)]))


def test_internal_links_resolve():
    problems = source_problems(top)
    assert not problems, '\n'.join(problems)


def write_site(folder, text):
    "A tiny site: one index whose markdown is `text`, one other notebook, one picture."
    (folder/'nbs/data').mkdir(parents=True)
    (folder/'_quarto.yml').write_text('website: {sidebar: {contents: [index.ipynb, {section: Data, contents: [data/a.ipynb]}]}}')
    for name, source in {'index': text, 'data/a': '# The `a` room\n## 1.2 Why?\n## Why?\n### Own {#mine}'}.items():
        (folder/f'nbs/{name}.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='markdown', source=[source])])))
    (folder/'nbs/p.svg').write_text('<svg/>')
    (folder/'README.md').write_text('[n](nbs/data/a.ipynb)')
    return folder


good = '''[a](data/a.ipynb) [b](data/a.ipynb#the-a-room) [c](data/a.ipynb#mine) [w](data/a.ipynb#why-1)
![p](p.svg) [u](https://e.org/x) `[not](a.link)`'''


def test_link_checker_is_content_with_a_good_site(tmp_path):
    assert source_problems(write_site(tmp_path, good)) == []


@pytest.mark.parametrize('bad, complaint', [
    ('[x](data/b.ipynb)', 'does not exist'), ('![x](q.svg)', 'does not exist'), ('<a href="z.html">x</a>', 'does not exist'),
    ('[x]\n\n[x]: gone.md', 'does not exist'), ('[x](../README.md)', 'leads out of nbs'),
    ('[x](data/a.ipynb#no)', 'names no heading')])
def test_link_checker_sees(tmp_path, bad, complaint):
    problems = source_problems(write_site(tmp_path, bad))
    assert len(problems) == 1 and complaint in problems[0] and problems[0].startswith('nbs/index.ipynb: ')


def test_link_checker_sees_the_sidebar(tmp_path):
    site = write_site(tmp_path, good)
    (site/'nbs/data/a.ipynb').rename(site/'nbs/data/c.ipynb')
    problems = source_problems(site)
    assert '_quarto.yml: the sidebar lists data/a.ipynb, which does not exist' in problems
    assert '_quarto.yml: the sidebar lacks data/c.ipynb' in problems


def test_link_checker_reads_rendered_pages(tmp_path):
    (tmp_path/'index.html').write_text('<a href="b.html#x">1</a><a href="b.html#y">2</a><img src="c.png"><a href="data:x"></a>')
    (tmp_path/'b.html').write_text('<h1 id="x">X</h1><a href="./">home</a>')
    assert built_problems(tmp_path) == ['index.html: b.html#y names no place in b.html', 'index.html: c.png does not exist']
    assert built_problems(tmp_path/'empty')


def test_site_configuration():
    import yaml
    from configparser import ConfigParser
    assert (nbs/'_quarto.yml').is_symlink() and (nbs/'_quarto.yml').resolve() == top/'_quarto.yml'
    quarto, nbdev_yml = (yaml.safe_load(p.read_text(encoding='utf-8')) for p in (top/'_quarto.yml', nbs/'nbdev.yml'))
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(top/'settings.ini', encoding='utf-8')
    assert quarto['format']['html']['html-math-method'] == 'mathml' and 'commonmark' not in quarto['format']
    assert (nbs/quarto['format']['html']['css']).exists() and all((nbs/f).exists() for f in quarto['metadata-files'])
    assert nbdev_yml['website']['title'] == ini['DEFAULT']['title']
    assert nbdev_yml['website']['repo-url'] == ini['DEFAULT']['git_url']


def tracked():
    "Text files that belong to the project, by git where there is git."
    done = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=top, capture_output=True, text=True)
    if done.returncode: pytest.skip('not a git checkout')
    return [top/name for name in done.stdout.split('\0') if name and (top/name).is_file()]


private = re.compile(r'(?<![\w.:)}-])/(?:root|home|work|Users|farm)/\w|\.\./sha(?:red)\b|^(?:<{7}|>{7}) ', re.M)
unfinished = re.compile(r'NotImplementedError|except( Exception)?: *(pass|\.\.\.)$|# *(TODO|FIXME|XXX)', re.M)


def test_nothing_points_at_one_persons_machine():
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b'\0' in data[:4096]: continue
        for line, text in enumerate(data.decode('utf-8').splitlines(), 1):
            if private.search(text): found.append(f'{path.relative_to(top)}:{line}: {text.strip()[:100]}')
    assert not found, '\n'.join(found)


def test_nothing_is_left_unfinished():
    found = [f'{p.relative_to(top)}: {m[0]}' for p in modules for m in unfinished.finditer(p.read_text(encoding='utf-8'))]
    assert not found, '\n'.join(found)


def test_no_large_files():
    large = [f'{p.relative_to(top)}: {p.stat().st_size / 1e6:.1f} MB' for p in tracked() if p.stat().st_size > 1_500_000]
    assert not large, '\n'.join(large)


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(nbs).as_posix())
def test_notebook_reads_well(path):
    "Short cells and lines, no error left in an output, and a test beside whatever is exported."
    code = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    sources = [''.join(c['source']) for c in code]
    exported = [s for s in sources if re.search(r'^#\|\s*export', s, re.M)]
    rest = '\n'.join(s for s in sources if s not in exported)
    assert max((len(s.splitlines()) for s in sources), default=0) <= 60, 'a code cell of more than 60 lines'
    long = '\n'.join(f'{len(line)}: {line.strip()[:60]}...' for s in sources for line in s.splitlines() if len(line) > 130)
    assert not long, f'lines of more than 130 characters:\n{long}'
    assert not any(o['output_type'] == 'error' for c in code for o in c['outputs']), 'an output that is an error'
    assert not exported or re.search(r'assert|test_|raises', rest), 'exports code but tests nothing'


def title_problem(cells):
    "The site turns the first markdown cell with a title into the page's header and drops the rest of that cell."
    first = next((''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), '')
    if not re.match(r'# \S', first): return 'the first markdown cell is not a title (# ...)'
    extra = [line for line in first.splitlines()[1:] if line.strip() and not line.startswith('> ')]
    return f'the title cell also holds {extra[0][:60]!r}, which the site drops' if extra else None


def import_problem(source):
    "The site runs every cell that imports, without the cells before it: outside `#| export`, such a cell must only import."
    if re.search(r'^#\|\s*(export|exporti|exports|exec_doc|eval:\s*false)', source, re.M): return None
    tree = ast.parse('\n'.join('' if line[:1] in '%!' else line for line in source.splitlines()))
    kinds = (ast.Import, ast.ImportFrom)
    mixed = any(isinstance(n, kinds) for n in ast.walk(tree)) and not all(isinstance(n, kinds) for n in tree.body)
    return f'imports and other code in one cell: {source.splitlines()[0][:60]!r}' if mixed else None


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(nbs).as_posix())
def test_notebook_makes_a_page(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    problems = [title_problem(cells)] + [import_problem(''.join(c['source'])) for c in cells if c['cell_type'] == 'code']
    assert not any(problems), '\n'.join(p for p in problems if p)


@pytest.mark.parametrize('source, fine', [
    ('import a', True), ('x = 1', True), ('import a\nfrom b import c', True), ('%magic\nimport a', True),
    ('#| export\nimport a\nx = 1', True), ('import a\nx = 1', False), ('def f(): import a', False)])
def test_import_rule(source, fine): assert (import_problem(source) is None) == fine


def test_title_rule():
    cell = lambda source: dict(cell_type='markdown', source=[source])
    assert title_problem([dict(cell_type='code', source=['1']), cell('# T\n> d'), cell('more')]) is None
    assert 'drops' in title_problem([cell('# T\n> d\n\nmore')]) and title_problem([cell('text')]) and title_problem([])


@pytest.mark.slow
def test_site_can_process_the_notebooks(copy):
    "All that happens before Quarto draws the pages: nbdev runs imports and exported cells and documents what they define."
    code = 'if __name__ == "__main__":\n    from nbdev.serve import proc_nbs\n    proc_nbs(n_workers=2, force=True)\n'
    (copy/'process.py').write_text(code)
    path = os.pathsep.join([str(top), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run([sys.executable, '-W', 'ignore', 'process.py'], cwd=copy, capture_output=True, text=True, timeout=900,
                          env={**{k: v for k, v in os.environ.items() if k != 'IN_TEST'}, 'PYTHONPATH': path})
    assert done.returncode == 0, done.stderr[-2000:]
    for page in notebooks:
        made = json.loads((copy/'_proc'/page.relative_to(nbs)).read_text(encoding='utf-8'))['cells']
        assert made and ''.join(made[0]['source']).startswith('---'), f'{page.relative_to(top)} has no page header'


def imports(path):
    "Names of the top-level modules that a file imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (alias.name.split('.')[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(top).as_posix())
def test_package_runs_without_its_tools(path):
    tools = {'nbdev', 'fastcore', 'execnb', 'ghapi', 'IPython', 'pytest'} & set(imports(path))
    assert not tools, f'a development tool at run time: {", ".join(sorted(tools))}'
