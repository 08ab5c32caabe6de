"""The page in a headless Chromium, where there is one."""

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lisatune.report.comparison_page import make_comparison_page
from lisatune.report.page import write_page
from tiny_report import HOSTILE, results, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PROBE = """<!DOCTYPE html><title>probe</title>
<iframe src="{page}" style="width:{width}px;height:800px"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const charts = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  document.body.dataset.found = JSON.stringify({{
    charts: charts.filter(box => box.width > 200 && box.height > 60).length,
    overflow: root.scrollWidth - root.clientWidth,
    named: [...page.querySelectorAll("[role=img]")].every(node => node.ariaLabel),
    ink: page.defaultView.getComputedStyle(page.querySelector("figure svg text")).fill,
    text: page.defaultView.getComputedStyle(page.body).color,
    paper: page.defaultView.getComputedStyle(page.body).backgroundColor,
  }});
}});</script>"""


def load(page: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after loading, and the lines of its console."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", *flags),
        *("--virtual-time-budget=5000", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("text", ["", HOSTILE], ids=["plain", "hostile"])
def test_the_page_loads_without_a_word_on_the_console(text: str, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "lisa")
    page = tmp_path / "report.html"
    write_page(make_comparison_page(results(text), tmp_path), page)
    dom, console = load(page, tmp_path)
    assert console == []
    assert dom.count("<figure>") == 6
    assert "<script" not in dom


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_charts_fit_the_screen_in_the_colours_of_the_page(width: int, scheme: str, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "lisa")
    page, probe = tmp_path / "report.html", tmp_path / "probe.html"
    write_page(make_comparison_page(results(), tmp_path), page)
    probe.write_text(PROBE.format(page=page.name, width=width))
    dom, console = load(
        probe, tmp_path, f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    )
    assert console == []
    found = json.loads(html.unescape(dom.split('data-found="')[1].split('"')[0]))
    assert found["charts"] == 6
    assert found["overflow"] == 0
    assert found["named"]
    assert found["ink"] == found["text"]
    assert found["paper"] == ("rgb(21, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
