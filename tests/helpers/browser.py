"""Chromium for tests: a page that writes down what it asks for outside and what goes wrong in it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

ARGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
ARGS += " --disable-component-update --disable-sync"


def chromium() -> str:
    "The browser, or a skip that says what is missing."
    pytest.importorskip("playwright", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on PATH")
    return path


@contextmanager
def browser() -> Iterator[Callable[..., Any]]:
    "A function that opens a browser with an empty profile; its options are playwright's."
    from playwright.sync_api import sync_playwright

    path = chromium()
    with ExitStack() as stack:
        profiles = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        p = stack.enter_context(sync_playwright())

        def opened(**options: Any) -> Any:
            profile = tempfile.mkdtemp(dir=profiles)
            context = p.chromium.launch_persistent_context(
                profile, executable_path=path, headless=True, args=ARGS.split(), **options
            )
            stack.callback(context.close)
            context.set_default_timeout(15_000)
            context.route("**/favicon.ico", lambda route: route.fulfill(status=204))
            return context

        yield opened


class Watched:
    "A page of a browser, with its errors and the requests that left `home`."

    def __init__(self, context: Any, home: str) -> None:
        self.page, self.outside, self.errors = context.new_page(), [], []
        local = (home, "data:", "blob:", "about:")
        self.page.on("request", lambda r: r.url.startswith(local) or self.outside.append(r.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))

    def controls(self) -> list[Any]:
        "The controls of the page, each once its widgets stand."
        found = self.page.locator(".steer-control")
        for i in range(found.count()):
            found.nth(i).locator(".widget-subarea .widget-html-content").first.wait_for()
        return [found.nth(i) for i in range(found.count())]

    def shown(self, control: Any) -> str:
        "What a control shows: the text and the pictures of its visible cell."
        cells = control.locator(".widget-html-content")
        seen = [cells.nth(i) for i in range(cells.count()) if cells.nth(i).is_visible()]
        return "\n".join(c.inner_html() for c in seen)
