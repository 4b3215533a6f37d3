"The report in a real browser: no script runs, nothing sticks out of a phone. Skipped where there is no Chromium."
import re
import shutil
import subprocess

import pytest
from PIL import Image

from bdnb.report import write_report
from test_report import Elements, evil, run_folder

browser = next((b for b in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome')) if b), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser is None, reason='no Chromium here')]


def chromium(tmp_path, page, *args, size=(390, 844)):
    "Standard output of a headless Chromium that opened a page."
    command = [browser, '--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--force-device-scale-factor=1',
               f'--user-data-dir={tmp_path}/profile', f'--window-size={size[0]},{size[1]}', *args, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    ours = ['<script>document.title = "ran"</script>', '<img src=x onerror="document.title=\'ran\'">']
    words = ours + [w for w in evil if '\ud800' not in w]
    return write_report(run_folder(folder, words))


def titled(report, name, change):
    "A changed copy of the report."
    path = report.with_name(name)
    path.write_text(change(report.read_text(encoding='utf-8')), encoding='utf-8')
    return path


def title(dom): return re.search('<title>(.*?)</title>', dom, re.S)[1]


def test_no_script_runs(tmp_path, report):
    dom = chromium(tmp_path, report, '--dump-dom')
    assert title(dom) != 'ran'
    for name, attrs in Elements(dom).found:
        assert name != 'script' and not [a for a in attrs if a.startswith('on')], (name, attrs)
    inject = '<script>document.title = "ran"</script><img src=x onerror="document.title=\'ran\'">'
    put = lambda text: text.replace('</main>', inject + '</main>')
    held = titled(report, 'held.html', put)                                     # should the escaping ever fail, the policy holds
    assert title(chromium(tmp_path, held, '--dump-dom')) != 'ran'
    free = titled(report, 'free.html', lambda text: put(re.sub('<meta http-equiv[^>]*>', '', text)))
    assert title(chromium(tmp_path, free, '--dump-dom')) == 'ran'               # the test would notice


@pytest.mark.parametrize('width', [390, 1100])
def test_nothing_sticks_out(tmp_path, report, width):
    script = '<script>document.title = document.documentElement.scrollWidth + " " + innerWidth</script>'
    put = lambda text: re.sub('<meta http-equiv[^>]*>', '', text).replace('</main>', '</main>' + script)
    free = titled(report, f'width{width}.html', put)
    wide, window = map(int, title(chromium(tmp_path, free, '--dump-dom', size=(width, 844))).split())
    assert wide <= window <= max(width, 500), (wide, window)


def test_screenshot(tmp_path, report):
    chromium(tmp_path, report, f'--screenshot={tmp_path}/page.png')
    im = Image.open(tmp_path/'page.png').convert('RGB')
    assert im.size == (390, 844) and len(im.getcolors(im.width*im.height)) > 50      # something was drawn
