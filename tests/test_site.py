"""The built site in Chromium: every control moves without a kernel, nothing is fetched from outside, nothing breaks."""

import functools
import http.server
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from browser import Watched, browser, chromium

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SITE", ROOT / "_docs"))
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html")) if SITE.exists() else []
GUIDE = [p for p in PAGES if p.startswith("guide/")]
WITH_CONTROL = [p for p in PAGES if 'class="steer-control"' in (SITE / p).read_text(encoding="utf-8")]

pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: scripts/docs build")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def home():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def context():
    chromium()
    with browser() as launch:
        yield launch()


def moves(w: Watched, control: Any) -> None:
    """Go along every picker of a control from end to end; each must change what is shown. The multiplier comes last among
    the sliders and is moved first, since no layer changes anything at multiplier 0."""
    handles = control.locator(".noUi-handle")
    for i in reversed(range(handles.count())):
        handle, seen = handles.nth(i), set()
        handle.press("Home")
        steps = int(float(handle.get_attribute("aria-valuemax") or 1))
        for _ in range(steps + 1):
            for _ in range(10):  # a busy machine is slow to show the next value
                w.page.wait_for_timeout(60)
                if w.shown(control) not in seen:
                    break
            seen.add(w.shown(control))
            handle.press("ArrowRight")
        assert len(seen) >= min(steps + 1, 2), f"slider {i} changes nothing"
    buttons = control.locator(".widget-toggle-button")
    if buttons.count():
        seen = set()
        for i in range(buttons.count()):
            buttons.nth(i).click()
            w.page.wait_for_timeout(60)
            seen.add(w.shown(control))
        assert len(seen) >= 2, "buttons change nothing"


def named(control: Any) -> None:
    "A screen reader can say what each slider is called and where it is, and what buttons are for."
    for row in control.locator(".widget-hslider").all():
        handle = row.locator(".noUi-handle")
        assert handle.get_attribute("aria-label") == row.locator(".widget-label").inner_text()
        assert handle.get_attribute("aria-valuetext") == row.locator(".widget-readout").inner_text()
    for row in control.locator(".widget-toggle-buttons").all():
        assert row.get_attribute("role") == "group" and row.get_attribute("aria-label")


def sliders(page: str) -> list[dict[str, int]]:
    "For each control of a page its sliders, as name and number of marks."
    states = re.findall(r'widget-state\+json">(.*?)</script>', (SITE / page).read_text(encoding="utf-8"), re.DOTALL)
    models = [
        [m["state"] for m in json.loads(state)["state"].values() if m["model_name"] == "SelectionSliderModel"]
        for state in states
    ]
    return [{m["description"]: len(m["_options_labels"]) for m in some} for some in models]


STRENGTHS = {"multiplier", "strength", "fraction", "joy"}  # joy: one of two multipliers on the page that mixes vectors


@pytest.mark.parametrize("page", GUIDE)
def test_every_guide_page_moves_layer_and_multiplier(page):
    both = [named for named in sliders(page) if "layer" in named and STRENGTHS & named.keys()]
    assert both, sliders(page)
    assert max(named[name] for named in both for name in STRENGTHS & named.keys()) >= 5, both


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_light(page):
    assert (SITE / page).stat().st_size < 4 * 2**20


@pytest.mark.parametrize("path", WITH_CONTROL)
def test_controls_move_without_a_kernel(home, context, path):
    w = Watched(context, home)
    w.page.goto(f"{home}/{path}")
    controls = w.controls()
    assert controls
    for control in controls:
        assert not control.locator(".steer-fallback").is_visible()
        assert "Computed for" in control.locator(".steer-grid").inner_text()
        named(control)
        moves(w, control)
        named(control)
    assert not w.errors and not w.outside
    w.page.close()


@pytest.mark.parametrize(
    "path", [p for p in WITH_CONTROL if p == "index.html" or p.startswith(("guide/", "tutorials/"))]
)
def test_controls_move_from_a_file_and_in_a_narrow_window(context, path):
    w = Watched(context, SITE.as_uri())
    w.page.set_viewport_size({"width": 400, "height": 800})
    w.page.goto((SITE / path).as_uri())
    for control in w.controls():
        moves(w, control)
        assert control.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "a control is wider than its place"
    assert w.page.evaluate("document.documentElement.scrollWidth") <= 401
    assert not w.errors and not w.outside
    w.page.close()


CUT_OFF = """() => [...document.querySelectorAll('main pre, main table, main .steer-control')]
    .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1)
    .map(e => e.innerText.slice(0, 80))"""
PROSE = """() => { const copy = document.querySelector('main').cloneNode(true);
    copy.querySelectorAll('pre, code, script, style').forEach(e => e.remove());
    return copy.textContent }"""


@pytest.mark.parametrize("path", PAGES)
def test_pages_open_without_errors_and_nothing_is_cut_off(home, context, path):
    w = Watched(context, home)
    w.page.goto(f"{home}/{path}")
    words = w.page.locator("main p, main li").all_inner_texts()
    assert sum(len(t.split()) for t in words) > 40, "a page without prose"
    for width in (1280, 1000, 400):
        w.page.set_viewport_size({"width": width, "height": 900})
        assert w.page.evaluate(CUT_OFF) == [], f"cut off at {width} pixels"
        assert w.page.evaluate("document.documentElement.scrollWidth") <= width + 1
    seen = w.page.locator("main").inner_text()
    assert "](" not in w.page.evaluate(PROSE), "Markdown that was not rendered"
    assert "noqa" not in seen and "__main__." not in seen
    pictures = w.page.locator("main img").evaluate_all("all => all.map(e => e.alt)")
    assert all(pictures) and "figure" not in pictures, "a picture without words"
    if w.page.locator("script[src*='access.js']").count():
        w.page.keyboard.press("Tab")
        w.page.keyboard.press("Enter")
        assert w.page.evaluate("document.activeElement.tagName") == "MAIN", "the first Tab does not skip the navigation"
    assert not w.errors and not w.outside
    w.page.close()


def test_links_within_the_site_lead_somewhere():
    texts = {page: (SITE / page).read_text(encoding="utf-8") for page in PAGES}
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    missing = set()
    for page, text in texts.items():
        for link, part in re.findall(r'href="([^"#?:]*)(?:#([^"]*))?"', text):
            target = ((SITE / page).parent / link).resolve() if link else (SITE / page).resolve()
            name = target.relative_to(SITE.resolve()).as_posix() if target.is_relative_to(SITE.resolve()) else ""
            if not target.exists() or (part and name in ids and part not in ids[name]):
                missing.add((page, f"{link}#{part}" if part else link))
    assert not missing


def test_search_finds_a_page(home, context):
    w = Watched(context, home)
    w.page.goto(f"{home}/index.html")
    box = w.page.locator("input[type=search], .aa-Input, #quarto-search input, input[placeholder*=earch]").first
    if not box.is_visible():
        w.page.locator("#quarto-search button, .aa-DetachedSearchButton, [aria-label*=earch]").first.click()
    box.fill("ablation")
    w.page.locator("a[href*=operators]").first.wait_for()
    w.page.close()
