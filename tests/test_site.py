"""The built site in Chromium: every control moves without a kernel, nothing is fetched from outside, nothing breaks."""

import ast
import functools
import html
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


CUT_OFF = """() => [...document.querySelectorAll('main pre, main table, main .sd-table, main .steer-control')]
    .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1)
    .map(e => e.innerText.slice(0, 80))"""
BROKEN_WORDS = """() => { const broken = [], range = document.createRange();
    for (const cell of document.querySelectorAll('main td, main th')) {
        if (!cell.offsetParent) continue;
        const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) for (const word of texts.currentNode.data.matchAll(/[\\p{L}\\p{N}_]+/gu)) {
            range.setStart(texts.currentNode, word.index);
            range.setEnd(texts.currentNode, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.push(word[0]);
        } }
    return broken }"""
PROSE = """() => { const copy = document.querySelector('main').cloneNode(true);
    copy.querySelectorAll('pre, code, script, style').forEach(e => e.remove());
    return copy.textContent }"""


def resized(w: Watched, width: int) -> None:
    "The page at another width, once it has been drawn so: tables that do not fit become lists."
    w.page.set_viewport_size({"width": width, "height": 900})
    w.page.wait_for_function(f"innerWidth === {width}")
    w.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")


@pytest.mark.parametrize("path", PAGES)
def test_pages_open_without_errors_and_nothing_is_cut_off(home, context, path):
    w = Watched(context, home)
    w.page.goto(f"{home}/{path}")
    words = w.page.locator("main p, main li").all_inner_texts()
    assert sum(len(t.split()) for t in words) > 40, "a page without prose"
    for width in (1280, 1000, 400):
        resized(w, width)
        assert w.page.evaluate(CUT_OFF) == [], f"cut off at {width} pixels"
        assert w.page.evaluate(BROKEN_WORDS) == [], f"words of tables broken at {width} pixels"
        assert w.page.evaluate("document.documentElement.scrollWidth") <= width + 1
    seen = w.page.locator("main").text_content()  # what is folded, too
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


TEXT_COLUMN = "() => document.querySelector('main').getBoundingClientRect().width"


def test_the_text_has_most_of_the_window(home, context):
    w = Watched(context, home)
    w.page.goto(f"{home}/guide/tune.html")
    for width, least in {1280: 740, 1100: 740, 1000: 680, 400: 350}.items():
        resized(w, width)
        assert w.page.evaluate(TEXT_COLUMN) >= least, f"at {width} pixels"
    fold, links = w.page.locator("#TOC .toc-fold"), w.page.locator("#TOC ul").first
    assert not links.is_visible()
    fold.press("Enter")
    assert links.is_visible() and fold.get_attribute("aria-expanded") == "true"
    w.page.close()


def test_the_cheat_sheet_is_one_screen(home, context):
    w = Watched(context, home)
    w.page.set_viewport_size({"width": 1280, "height": 900})
    w.page.goto(f"{home}/cheat_sheet.html")
    assert w.page.evaluate("document.querySelector('main .page-navigation').getBoundingClientRect().top") <= 900
    w.page.close()


# the contrast of every text of a page with what is behind it, by the formula of WCAG; what is below LEAST
FAINT = """least => { const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const rgba = text => { const v = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
        return text.startsWith('color(srgb') ? [v[0] * 255, v[1] * 255, v[2] * 255, v[3] ?? 1] : [v[0], v[1], v[2], v[3] ?? 1] };
    const over = (top, under) => under.map((v, i) => v + (top[i] - v) * top[3]);
    const behind = e => { if (!e) return [255, 255, 255];
        const own = rgba(getComputedStyle(e).backgroundColor);
        return own[3] === 1 ? own.slice(0, 3) : over(own, behind(e.parentElement)) };
    const faint = new Set(), texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) { const e = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !e.offsetParent || e.closest('script, style, svg')) continue;
        const back = behind(e), ink = over(rgba(getComputedStyle(e).color), back), two = [light(back), light(ink)];
        const ratio = (Math.max(...two) + .05) / (Math.min(...two) + .05);
        if (ratio < least) faint.add(`${texts.currentNode.data.trim().slice(0, 30)}: ${ratio.toFixed(1)}`) }
    return [...faint] }"""
LOOKS = ["index.html", "guide/tune.html", "guide/serve.html", "reference/vectors/vector.html", "coming_from_0_12.html"]


def brightness(page: Any, which: str) -> float:
    "The mean of red, green and blue of the body, 0 to 255."
    colour = page.evaluate(f"getComputedStyle(document.body).{which}")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("path", LOOKS)
def test_pages_can_be_read_in_light_and_dark(home, context, path):
    w = Watched(context, home)
    for scheme in ("light", "dark"):
        w.page.emulate_media(color_scheme=scheme)
        w.page.goto(f"{home}/{path}")
        w.controls()
        dark = scheme == "dark"
        assert (brightness(w.page, "backgroundColor") < 60) == dark and (brightness(w.page, "color") > 180) == dark
        assert "serif" not in w.page.evaluate("getComputedStyle(document.body).fontFamily").replace("sans-serif", "")
        assert w.page.evaluate(FAINT, 3.9) == [], scheme
    w.page.locator(".quarto-color-scheme-toggle").first.click()
    w.page.wait_for_timeout(300)
    assert brightness(w.page, "backgroundColor") > 200
    w.page.evaluate("localStorage.clear()")  # where the choice is kept
    w.page.close()


def test_marked_links_have_the_colour_of_the_site(home, context):
    w = Watched(context, home)
    w.page.emulate_media(reduced_motion="reduce")  # colours change at once
    w.page.goto(f"{home}/guide/tune.html")
    own = w.page.evaluate("getComputedStyle(document.querySelector('main p a')).color")
    for marked in (".sidebar-link.active", "#TOC .nav-link.active"):
        assert w.page.locator(marked).first.evaluate("e => getComputedStyle(e).color") == own
    w.page.close()


LIBRARY = 8.3  # points: "small", the smallest font of the library's own plots


def shown_labels(page: str) -> list[float]:
    "The smallest font of each plotted picture of a page's notebook, in pixels of the picture (100 per inch)."
    notebook = ROOT / "nbs" / Path(page).with_suffix(".ipynb")
    pictures: list[float] = []
    drawn = ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if notebook.exists() else []:
        drawn += "".join(cell["source"])  # a function above may draw it
        for out in cell.get("outputs", []):
            if "image/png" in out.get("data", {}):
                sizes = [float(n) for n in re.findall(r"(?:font|label)_?size=([\d.]+)", drawn)]
                pictures.append(min([10.0 if "plt." in drawn else LIBRARY, *sizes]) * 100 / 72)
                drawn = ""
    return pictures


WITH_PICTURES = [page for page in PAGES if shown_labels(page)]


@pytest.mark.parametrize("path", WITH_PICTURES)
def test_labels_of_pictures_can_be_read(home, context, path):
    w = Watched(context, home)
    w.page.goto(f"{home}/{path}")
    for width in (1280, 1000):
        resized(w, width)
        scales = w.page.locator("main img").evaluate_all(
            "all => all.filter(e => e.offsetParent && !e.closest('.steer-control')).map(e => e.clientWidth / e.naturalWidth)"
        )
        sizes = shown_labels(path)
        assert len(scales) == len(sizes), "pictures that the page's notebook does not plot"
        shown = [scale * size for scale, size in zip(scales, sizes, strict=True)]
        assert min(shown) >= 8, f"labels of {[round(x, 1) for x in shown]} pixels at {width}"
    w.page.close()


def setting(name: str) -> str:
    "One value of settings.ini."
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    return re.search(rf"^{name} *= *(.*)$", text, re.MULTILINE)[1]


def test_links_to_files_of_the_repository_name_files():
    blob = f"https://github.com/{setting('user')}/{setting('repo')}/blob/{setting('branch')}/"
    missing = set()
    for page in PAGES:
        text = (SITE / page).read_text(encoding="utf-8")
        files = re.findall(rf'href="{re.escape(blob)}([^"#]+)', text)
        assert files, page  # "View source", on every page
        missing |= {(page, name) for name in files if not (ROOT / name).is_file()}
    assert not missing


def test_every_page_links_to_repository_and_package():
    links = [
        f"https://github.com/{setting('user')}/{setting('repo')}",
        f"https://pypi.org/project/{setting('lib_name')}/",
    ]
    for page in PAGES:
        text = (SITE / page).read_text(encoding="utf-8")
        bar = text[text.index("<nav") : text.index("<main")]
        assert all(f'href="{link}"' in bar for link in links), page


def signatures(page: str) -> dict[str, str]:
    "What a page shows under each heading that names a function, class or method: the text of its first block of code."
    text = (SITE / page).read_text(encoding="utf-8")
    found = re.findall(r"<h3[^>]*>(?:<[^>]*>)*([\w.]+)<.*?<pre[^>]*>(.*?)</pre>", text, re.DOTALL)
    return {name: html.unescape(re.sub(r"<[^>]+>", "", code)) for name, code in found}


REFERENCE = [p for p in PAGES if p.startswith("reference/")]


def test_signatures_have_types_by_their_names():
    shown = signatures("reference/vectors/vector.html")
    for method in ("apply", "patch_activations", "bake"):
        assert "operator: PatchDeltaOperator | None = None" in shown[f"SteeringVector.{method}"]
    training = signatures("reference/train/training.html")["train_steering_vector"]
    for one in (
        "layer_type: LayerType",
        "aggregator: Aggregator =",
        "truncation: Truncation |",
        "distributed: Distributed",
    ):
        assert one in training


@pytest.mark.parametrize("page", REFERENCE)
def test_what_a_page_documents_has_a_short_signature_and_a_table_of_arguments(page):
    text = (SITE / page).read_text(encoding="utf-8")
    assert "_overload_dummy" not in text
    for part in re.split(r"<h3", text)[1:]:
        name = re.match(r"[^>]*>(?:<[^>]*>)*([\w.]+)<", part)
        code = re.search(r"<pre[^>]*>(.*?)</pre>", part, re.DOTALL)
        told = html.unescape(re.sub(r"<[^>]+>", "", code[1])) if name and code else ""
        if not name or not told.startswith((f"{name[1]}(", "def ")):
            continue
        assert not told.startswith("def "), f"{name[1]} is shown without its source's names"
        assert max(map(len, told.splitlines())) <= 110, name[1]
        tree = ast.parse("def f" + told[len(name[1]) :].rstrip() + ": ...").body[0]
        asked = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]
        rows = re.findall(r"<tr><td><code>\**(\w+)</code>", part.split("</table>")[0])
        assert [n for n in rows if n in asked] == asked, name[1]


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
