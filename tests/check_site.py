"""Do the site's internal links resolve? Two questions, one answer each: a list of complaints, empty when all is well.

`source_problems(top)` reads what is written: the sidebar of `_quarto.yml`, the notebooks' markdown, the `*.md` files.
`built_problems(folder)` reads what Quarto made of it: `python tests/check_site.py _docs`.
"""
import json
import re
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

fence = re.compile(r'^(```+|~~~+).*?^\1\s*$', re.M | re.S)
inline_code = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.S)
md_link = re.compile(r'\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)')
md_ref = re.compile(r'^\s{0,3}\[[^\]^]+\]:\s*<?(\S+?)>?(?:\s|$)', re.M)
html_link = re.compile(r'(?:href|src)\s*=\s*["\']([^"\']+)["\']')
heading = re.compile(r'^#{1,6}\s+(.+?)\s*#*\s*$', re.M)
explicit_id = re.compile(r'\{[^}]*#([\w:.-]+)[^}]*\}')
html_id = re.compile(r'(?:id|name)\s*=\s*["\']([^"\']+)["\']')


def prose(text):
    "Markdown without what only looks like a link or a heading: fenced blocks and inline code."
    return inline_code.sub('', fence.sub('', text))


def markdown_of(path):
    "All the markdown a reader sees of a notebook or of a markdown file."
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb': return text
    parts = []
    for cell in json.loads(text)['cells']:
        if cell['cell_type'] == 'markdown': parts.append(''.join(cell['source']))
        for output in cell.get('outputs', []): parts.append(''.join(output.get('data', {}).get('text/markdown', '')))
    return '\n\n'.join(parts)


def links(text):
    "Targets of every link and picture in markdown, as written."
    text = prose(text)
    return [m for pattern in (md_link, md_ref, html_link) for m in pattern.findall(text)]


def slugs(title):
    "The id that a heading gets from Pandoc (the site) and from GitHub, before repetitions are numbered."
    title = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', title).replace('`', '').replace('*', '')
    kept = re.sub(r'[^\w\s.-]', '', unicodedata.normalize('NFC', title).strip().lower())
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', kept)) or 'section', re.sub(r'\s', '-', kept.replace('.', ''))


def anchors(text):
    "Every #anchor that a page of markdown offers; both styles number a repeated id (`why`, `why-1`, ...)."
    found, seen = set(html_id.findall(text)), ({}, {})
    for title in heading.findall(fence.sub('', text)):
        found |= set(explicit_id.findall(title))
        for slug, times in zip(slugs(explicit_id.sub('', title)), seen):
            n = times[slug] = times.get(slug, -1) + 1
            found.add(f'{slug}-{n}' if n else slug)
    return found


def sidebar_entries(node):
    "Every file that the `contents` of a Quarto sidebar names, in order."
    if isinstance(node, str): return [node]
    if isinstance(node, list): return [entry for item in node for entry in sidebar_entries(item)]
    return [node[k] for k in ('href', 'file') if k in node] + sidebar_entries(node.get('contents', []))


def link_problems(path, top, root):
    "Complaints about the links of one page; they must stay below `root` (what is published with that page)."
    where, problems, text = path.relative_to(top), [], markdown_of(path)
    for target in links(text):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc: continue
        goal = (path.parent/unquote(parts.path)).resolve() if parts.path else path
        if root not in (goal, *goal.parents): problems.append(f'{where}: {target} leads out of {root.name}/')
        elif not goal.exists(): problems.append(f'{where}: {target} does not exist')
        elif parts.fragment and goal.suffix in ('.ipynb', '.md') and unquote(parts.fragment) not in anchors(markdown_of(goal)):
            problems.append(f'{where}: {target} names no heading of {goal.name}')
    return problems


def source_problems(top):
    "Complaints about the sidebar and all links of the repository in folder `top`, one line each."
    top = Path(top).resolve()
    nbs = top/'nbs'
    sidebar = yaml.safe_load((top/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    listed = sidebar_entries(sidebar)
    pages = sorted(p for p in nbs.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(nbs).parts))
    names = [p.relative_to(nbs).as_posix() for p in pages]
    problems = [f'_quarto.yml: the sidebar lists {e}, which does not exist' for e in listed if not (nbs/e).exists()]
    problems += [f'_quarto.yml: the sidebar lists {e} twice' for e in sorted(set(listed)) if listed.count(e) > 1]
    problems += [f'_quarto.yml: the sidebar lacks {n}' for n in names if n not in listed]
    for page in pages: problems += link_problems(page, top, nbs)
    for page in sorted([*top.glob('*.md'), *nbs.rglob('*.md')]):
        problems += link_problems(page, top, nbs if nbs in page.parents else top)
    return problems


class Page(HTMLParser):
    "Links out of, and ids in, one rendered page."
    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if value and key in ('id', 'name'): self.ids.add(value)
            if value and key in ('href', 'src'): self.links.append(value)


def built_problems(folder):
    "Complaints about relative links of the rendered site in `folder`, one line each."
    folder = Path(folder).resolve()
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in sorted(folder.rglob('*.html'))}
    problems = [] if pages else [f'{folder}: no page was rendered']
    for path, page in pages.items():
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc: continue
            goal = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if goal.is_dir(): goal = goal/'index.html'
            if not goal.exists(): problems.append(f'{path.relative_to(folder)}: {target} does not exist')
            elif parts.fragment and goal in pages and unquote(parts.fragment) not in pages[goal].ids | {'top'}:
                problems.append(f'{path.relative_to(folder)}: {target} names no place in {goal.name}')
    return problems


if __name__ == '__main__':
    found = built_problems(sys.argv[1]) if sys.argv[1:] else source_problems(Path(__file__).parent.parent)
    print('\n'.join(found) or 'all internal links resolve')
    sys.exit(bool(found))
