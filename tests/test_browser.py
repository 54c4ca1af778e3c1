"""The report as a browser lays it out: nothing is cut off, and no label hides another. Where a Chromium is installed."""

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
  box: box(svg), labels: [...svg.querySelectorAll("text[style]")].map(text => [text.textContent, ...box(text)]) }));
const cut = [...document.querySelectorAll(".scroll")].map(part => part.scrollWidth - part.clientWidth);
const fetched = performance.getEntriesByType("resource").length;
document.getElementById("seen").textContent = JSON.stringify({ charts, cut, fetched });
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_report_in_a_browser(tmp_path):
    """Two runs, most rows of one size and nearly one CIDEr, as teachers by several seeds are."""
    teachers = [made(f"teacher-{seed}", 50.0 + seed / 10, 40.0, 100.0 + seed) for seed in range(6)]
    runs = [{"run": "runs/photos", "rows": [*ROWS, *teachers]}, {"run": "runs/photos-pruned.macs-0.5", "rows": [*ROWS, *teachers]}]
    page = tmp_path / "report.html"
    report.write(compared(runs), page)
    page.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', shown, re.S)[1])
    assert seen["fetched"] == 0 and seen["cut"] == [0]
    assert len(seen["charts"]) == 2
    for chart in seen["charts"]:
        assert len(chart["labels"]) >= 9  # what both runs have at one place has one label
        for index, (text, left, top, right, bottom) in enumerate(chart["labels"]):
            assert chart["box"][0] <= left and right <= chart["box"][2] and bottom <= chart["box"][3], text
            for other, *where in chart["labels"][:index]:
                apart = right <= where[0] or where[2] <= left or bottom <= where[1] + 3 or where[3] <= top + 3  # 3: above and below letters
                assert apart, (text, other)
