"""Write README.md from `nbs/index.ipynb`: its markdown cells, and the markdown that its code cells printed.

`python tools/make_readme.py` writes the file; `--check` only says (exit code 1) that it is out of date.
Links are rewritten from the notebook's place in the site to the file's place in the repository.
"""
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

top = Path(__file__).resolve().parent.parent
link = re.compile(r'(\]\(|(?:href|src)=")([^)"\s]+)')


def repository_link(target, prefix, blob):
    "The same link seen from the top of the repository: `target` is as written in the notebook, `prefix` its folder."
    if target.startswith(blob): return target[len(blob):]
    if re.match(r'[a-z][a-z+.-]*:|#|/', target): return target
    return prefix + target


def output_text(output, name):
    "What one output of a code cell adds to the page; pictures must be files of their own, which the text links to."
    if output['output_type'] == 'stream': return '```\n' + ''.join(output['text']).rstrip() + '\n```'
    data = output.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    if any(kind.startswith('image/') for kind in data):
        raise SystemExit(f'{name}: save the picture under nbs/ and link to it; README.md cannot hold it')
    return '```\n' + ''.join(data.get('text/plain', '')).rstrip() + '\n```'


def render(notebook, prefix='nbs/', blob='', name='index.ipynb'):
    "Markdown of a notebook (the parsed JSON). Cells under `#| hide` are left out; `#| echo: false` leaves out only the code."
    parts = []
    for cell in notebook['cells']:
        source = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown': parts.append(source)
        if cell['cell_type'] != 'code' or re.search(r'^#\|\s*hide\s*$', source, re.M): continue
        code = '\n'.join(line for line in source.splitlines() if not line.startswith('#|')).strip()
        if code and not re.search(r'^#\|\s*echo:\s*false', source, re.M): parts.append(f'```python\n{code}\n```')
        parts += [output_text(output, name) for output in cell['outputs']]
    text = '\n\n'.join(part for part in parts if part)
    text = link.sub(lambda m: m[1] + repository_link(m[2], prefix, blob), text)
    return f'<!-- Made from {prefix}{name} by tools/make_readme.py: change that notebook, not this file. -->\n\n{text}\n'


def readme(folder=top):
    "The text of README.md for the repository in `folder`."
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(folder/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    notebook = json.loads((folder/cfg['nbs_path']/cfg['readme_nb']).read_text(encoding='utf-8'))
    return render(notebook, cfg['nbs_path'] + '/', f"{cfg['git_url']}/blob/{cfg['branch']}/", cfg['readme_nb'])


if __name__ == '__main__':
    path, text = top/'README.md', readme()
    if '--check' in sys.argv[1:]:
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            sys.exit('README.md is out of date: python tools/make_readme.py')
    else: path.write_text(text, encoding='utf-8')
