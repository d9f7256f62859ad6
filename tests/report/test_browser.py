"""The pages in a real browser: no errors, all pictures there, nothing beyond the edge, readable."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gblm.report.page import comparison_page, run_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

WIDTHS = (390, 1400)
LOOK = """
const light = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const clear = text => /rgba\\(.*, 0(\\.\\d+)?\\)/.test(text);  // lets what is behind show through
const contrast = (page, element) => {
  const ink = light(page.getComputedStyle(element).color);
  let behind = element;
  while (clear(page.getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const paper = light(page.getComputedStyle(behind).backgroundColor);
  return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
};
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentWindow, root = page.document.documentElement;
    const all = selector => [...page.document.querySelectorAll(selector)];
    const texts = all("body *:not(svg *)").filter(e =>
      [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
    return {
      overflow: root.scrollWidth - root.clientWidth,
      pictures: all("img").length,
      broken: all("img").filter(e => !(e.complete && e.naturalWidth > 0)).length,
      figures: all("svg").length,
      empty: all("svg").filter(e => e.getBoundingClientRect().width < 50).length,
      ink: all("svg text").map(e => page.getComputedStyle(e).fill)[0] || "",
      paper: page.getComputedStyle(page.document.body).backgroundColor,
      faint: texts.filter(e => contrast(page, e) < 4.5).map(e => e.outerHTML.slice(0, 200)),
      small: texts.filter(e => parseFloat(page.getComputedStyle(e).fontSize) < 12).length,
    };
  });
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
};
"""


def look(pages: list[str], folder: Path, dark: bool) -> tuple[list[dict], list[str]]:
    """Return what each page looks like at both widths, and what the browser complained of."""
    frames = "".join(
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for page in pages
        for width in WIDTHS
    )
    harness = folder / f"harness-{dark}.html"
    script = f"<meta charset='utf-8'><script>{LOOK}</script>"
    harness.write_text(f"<!doctype html>{script}<body>{frames}</body>", "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,900"]
    flags += ["--enable-logging=stderr", "--v=0", "--hide-scrollbars", "--no-first-run"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, harness.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console


@pytest.mark.parametrize("dark", [False, True])
def test_pages_look_right(make_report, vision, tmp_path: Path, dark: bool):
    runs = {"a": make_report(), "b": vision}
    pages = [run_page(make_report()), run_page(vision), comparison_page(runs)]
    found, console = look(pages, tmp_path, dark)
    assert console == []
    assert len(found) == 6
    for page in found:
        assert page["overflow"] == 0
        assert page["broken"] == page["empty"] == page["small"] == 0
        assert page["figures"] >= 2
        assert page["faint"] == []
    assert [page["pictures"] for page in found] == [0, 0, 1, 1, 0, 0]
    light = [sum(map(int, re.findall(r"\d+", page["paper"])[:3])) > 382 for page in found]
    assert light == [not dark] * 6
    inks = [sum(map(int, re.findall(r"\d+", page["ink"])[:3])) < 382 for page in found]
    assert inks == [not dark] * 6  # the figures follow


def test_the_browser_sees_what_is_wrong(tmp_path: Path):
    wrong = """<body style="background: #fff"><div style="width: 3000px">wide</div>
      <img src="data:image/png;base64,AAAA"><p style="color: #ccc; font-size: 8px">faint</p>
      <script>console.error("wrong")</script>"""
    (page, _), console = look([wrong], tmp_path, dark=False)
    assert page["overflow"] > 2000
    assert page["broken"] == page["small"] == len(page["faint"]) == 1
    assert console
