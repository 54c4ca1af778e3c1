"""The report as a browser lays it out: nothing is cut off, and no label hides another. Needs a Chromium (Debian: apt install chromium)."""

import json
import re
import shutil
import subprocess

import pytest
from test_ledger import ROWS, compared, made

from compress import report

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

# Written behind the page: what a reader would see of it, as JSON in an element of its own.
LOOK = """<pre id="seen"></pre><script>
const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] };
const charts = [...document.querySelectorAll("svg")].map(svg => ({
  box: box(svg), texts: [...svg.querySelectorAll("text")].map(text => [text.textContent, ...box(text)]) }));
const cut = [...document.querySelectorAll(".scroll")].map(part => part.scrollWidth - part.clientWidth);
const fetched = performance.getEntriesByType("resource").length;
document.getElementById("seen").textContent = JSON.stringify({ charts, cut, fetched });
</script>"""


@pytest.mark.slow
def test_a_report_in_a_browser(tmp_path):
    """Two runs, most rows of one size and nearly one CIDEr, as teachers by several seeds are: too many for all to have a label."""
    assert CHROMIUM, "no Chromium is installed; the report cannot be looked at without one (Debian: apt install chromium)"
    teachers = [made(f"teacher-{seed}", 50.0 + seed / 10, 40.0, 100.0 + seed) for seed in range(30)]
    again = [row | {"seconds": 1.0} for row in teachers]  # other rows, at the same places
    runs = [{"run": "runs/photos", "rows": [*ROWS, *teachers]}, {"run": "runs/photos-pruned.macs-0.5", "rows": [*ROWS, *again]}]
    page = tmp_path / "report.html"
    report.write(compared(runs), page)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += ["--window-size=1300,1000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    seen = json.loads(found[1])
    assert seen["fetched"] == 0 and seen["cut"] == [0] and len(seen["charts"]) == 2
    for chart in seen["charts"]:
        names = [text for text, *_ in chart["texts"] if text.startswith("teacher-")]
        assert len(names) == len(set(names)) > 5
        for index, (text, left, top, right, bottom) in enumerate(chart["texts"]):
            assert chart["box"][0] <= left and right <= chart["box"][2] and bottom <= chart["box"][3], text
            for other, *where in chart["texts"][:index]:
                apart = right <= where[0] or where[2] <= left or bottom <= where[1] + 3 or where[3] <= top + 3  # 3: above and below letters
                assert apart, (text, other)
