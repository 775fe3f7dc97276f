"""The documentation site in a browser: nothing overflows, formulas are typeset, links lead somewhere, all offline."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.table
DOCS = Path(__file__).parents[1] / "docs"
FRAME = {"genindex.html", "search.html", "py-modindex.html"}
BROKEN = "() => MathJax.startup.promise.then(() => document.querySelectorAll('mjx-merror').length)"
WIDTHS = (1200, 400)


class Links(HTMLParser):
    """The targets and anchors of a page. (Pages of source code lead back to names by the module that defines them.)"""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site without the plots of the gallery."""
    out = tmp_path_factory.mktemp("site")
    options = ["-b", "html", "-W", "--keep-going", "-q", "-D", "plot_gallery=0"]
    subprocess.run([sys.executable, "-m", "sphinx", *options, DOCS, out], check=True)
    return out


def test_links_lead_to_files_and_anchors(site):
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > 100
    lost = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[there].anchors if there in pages and "_modules" not in path.parts else None
            if not there.exists() or (anchors is not None and unquote(parts.fragment) not in anchors):
                lost.append((path.name, target))
    assert not lost


def test_pages_fit_their_screen_and_ask_the_network_for_nothing(site):
    sync = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or pytest.skip("no browser")
    wide, asked, broken = [], [], []
    with sync.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
        for path in sorted(site.rglob("*.html")):
            if "_static" in path.parts or path.name in FRAME:
                continue
            page.goto(path.as_uri())
            if "mathjax/tex-chtml.js" in path.read_text() and page.evaluate(BROKEN):
                broken.append(path.name)
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    wide.append((path.name, width))
        chromium.close()
    assert not broken
    assert not wide
    assert not asked


def test_search_works_offline(site):
    sync = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or pytest.skip("no browser")
    with sync.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(f"{(site / 'search.html').as_uri()}?q=certificate")
        page.wait_for_selector("#search-results li a")
        found = page.locator("#search-results li a").all_inner_texts()
        chromium.close()
    assert any(re.search("certificate", title, re.IGNORECASE) for title in found)
