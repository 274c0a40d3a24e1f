"""Controls with a kernel behind them, in JupyterLab and in Voila: a move is answered anew, and an error is shown."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from browser import browser, chromium

ROOT = Path(__file__).parents[1]

PAGE = [
    "from steering_vectors import Control, Range",
    "calls = []\n"
    "def view(layer, multiplier):\n"
    "    calls.append(multiplier)\n"
    "    if multiplier > 2.5:\n"
    "        raise ValueError('multiplier too large for this model')\n"
    "    return f'call {len(calls)}: layer {layer} at {multiplier:+.2f}'\n"
    "Control(view, layer=[12, 18], multiplier=Range(-2, 3, marks=(-2, 0, 2)))",
]


def notebook(cells: list[str]) -> str:
    made = [{"cell_type": "code", "metadata": {}, "source": s, "outputs": [], "execution_count": None} for s in cells]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    "`scripts/_live.py` on a free port."

    def __init__(self, page: str, *options: str) -> None:
        self.port = free_port()
        script = [sys.executable, str(ROOT / "scripts" / "_live.py"), page, "--no-browser", f"--port={self.port}"]
        self.process = subprocess.Popen([*script, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self, path: str = "/") -> None:
        for _ in range(240):
            try:
                urllib.request.urlopen(self.url + path, timeout=120)
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.5)
        raise AssertionError("the server did not start in two minutes")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


OPEN = ["--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.expose_app_in_browser=True"]
TALK = "() => { const app = window.jupyterapp; return app && app.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status }"


@pytest.fixture
def made(tmp_path):
    "A notebook of one control over a plain function."
    path = tmp_path / "live_control.ipynb"
    path.write_text(notebook(PAGE))
    return str(path)


@pytest.fixture
def page():
    chromium()
    with browser() as launch:
        context = launch(viewport={"width": 1200, "height": 1400})
        context.set_default_timeout(120_000)
        yield context.new_page()


def answers(page: Any, first: str) -> None:
    "Move the multiplier of the control that says `first`."
    output = page.locator(".steer-output", has_text=first).last
    output.wait_for()
    handle = page.locator(".noUi-handle").last
    handle.press("ArrowRight")
    page.locator(".steer-output", has_text="layer 12 at +0.10").last.wait_for()
    handle.press("End")
    alert = page.locator(".steer-error").last
    alert.wait_for()
    assert "ValueError: multiplier too large for this model" in alert.inner_text()
    handle.press("Home")
    page.locator(".steer-output", has_text="layer 12 at -2.00").last.wait_for()
    assert page.locator(".steer-error").count() == 0


def run_all(page: Any, url: str) -> None:
    "Open a notebook in JupyterLab and run its cells."
    page.goto(url)
    page.wait_for_function(f"({TALK})() === 'idle'")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


@pytest.mark.skipif(not importlib.util.find_spec("jupyterlab"), reason="jupyterlab is not installed")
def test_a_move_is_answered_in_jupyterlab(made, page):
    server = Server(made, *OPEN)
    try:
        server.wait("/api")
        run_all(page, f"{server.url}/lab/tree/live_control.ipynb?reset")
        answers(page, "layer 12 at +0.00")
    finally:
        server.close()


@pytest.mark.skipif(not importlib.util.find_spec("voila"), reason="voila is not installed")
def test_a_move_is_answered_in_voila(made, page):
    server = Server(made, "--voila")
    try:
        server.wait()
        page.goto(server.url)
        answers(page, "layer 12 at +0.00")
    finally:
        server.close()


def answers_anew(page: Any) -> None:
    "Move the multiplier of the first control of a page; the model has to write something else."
    output = page.locator(".steer-output").first
    output.wait_for()
    handle = page.locator(".widget-slider .noUi-handle, .jupyter-widget-slider .noUi-handle").nth(1)
    for keys in (["Home"], ["ArrowRight"] * 5):  # the end of the range, then a value that no page has computed
        before = output.inner_text()
        for key in keys:
            handle.press(key)
        page.wait_for_function(
            "before => { const o = document.querySelector('.steer-output');"
            " return o && o.style.opacity == 1 && o.innerText != before }",
            arg=before,
        )
    assert page.locator(".steer-error, .jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0


@pytest.mark.skipif(not importlib.util.find_spec("jupyterlab"), reason="jupyterlab is not installed")
def test_a_guide_page_runs_in_jupyterlab_and_the_model_answers_anew(page):
    server = Server("basic_usage", *OPEN)
    try:
        server.wait("/api")
        page.set_default_timeout(400_000)
        run_all(page, f"{server.url}/lab/tree/guide/basic_usage.ipynb?reset")
        answers_anew(page)
    finally:
        server.close()


@pytest.mark.skipif(not importlib.util.find_spec("voila"), reason="voila is not installed")
def test_a_guide_page_runs_in_voila_and_the_model_answers_anew(page):
    server = Server("basic_usage", "--voila")
    try:
        server.wait("/static/favicon.ico")
        page.set_default_timeout(400_000)
        page.goto(server.url)
        answers_anew(page)
    finally:
        server.close()
