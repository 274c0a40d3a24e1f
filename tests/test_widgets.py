"""Controls without a browser: what they call and when; and in one: what a page without a kernel does."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from browser import Watched, browser, chromium

from steering_vectors.display.controls import Control
from steering_vectors.display.sliders import Range, Setting
from steering_vectors.markup import Html, as_html

EMBED = Path(__file__).parents[1] / "nbs" / "widgets" / "embed.js"


def said(layer, multiplier):
    return f"layer {layer} at {multiplier:+g} <b></script>"


def state(page: str) -> dict:
    return json.loads(re.search(r'widget-state\+json">(.*?)</script>', page).group(1))["state"]


def test_every_combination_is_in_the_page_once():
    page = Control(said, layer=[1, 2], multiplier=[-1.0, 0.0, 1.0]).to_html()
    cells = [m["state"]["value"] for m in state(page).values() if m["model_name"] == "HTMLModel"]
    assert cells == [as_html(said(a, m)) for a in (1, 2) for m in (-1.0, 0.0, 1.0)]


def test_three_axes_nest_and_each_stack_follows_its_own_axis():
    page = Control(lambda **v: str(v), a=[1, 2], b=["x", "y"], c=[5, 6, 7], start={"a": 2, "c": 7}).to_html()
    models = state(page)
    links = [m["state"] for m in models.values() if m["model_name"] == "DirectionalLinkModel"]
    assert len(links) == 1 + 2 + 4
    for link in links:
        picker, stack = (models[link[end][0].removeprefix("IPY_MODEL_")]["state"] for end in ("source", "target"))
        assert stack["selected_index"] == picker["index"]
        assert len(stack["children"]) == len(picker["_options_labels"])


def test_a_page_is_the_same_in_another_process_and_ids_differ_within_one():
    import subprocess
    import sys

    code = "from steering_vectors import Control; c = Control(lambda m: f'{m}</script>', m=[1, 2]); print(c.to_html()); print(c.to_html())"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    assert runs[0] == runs[1]
    first, second = runs[0].splitlines()
    assert not set(state(first)) & set(state(second))


def test_the_fallback_is_the_starting_cell_and_the_grid_is_stated():
    page = Control(said, layer=[1, 2], multiplier=[-1.0, 1.0], start={"layer": 2, "multiplier": 1.0}).to_html()
    fallback = page[page.index('class="steer-fallback"') :]
    assert "layer 2 at +1" in fallback and "layer 1" not in fallback.split("Computed for")[0]
    assert "Computed for layer 1, 2 × multiplier -1, +1" in fallback
    assert "<b>" not in fallback.replace("&lt;b&gt;", "")


def test_moves_in_quick_succession_are_one_call():
    calls = []

    async def session():
        control = Control(
            lambda multiplier: calls.append(multiplier) or f"{multiplier:+g}", delay=0.02, multiplier=Range(-3, 3, (0,))
        )
        for m in (0.5, 1.0, 1.5, 2.0):
            control.multiplier = m
            await asyncio.sleep(0.002)
        assert not calls and "opacity:0.35" in control.widget.children[-1].value
        await asyncio.sleep(0.1)
        return control.widget.children[-1].value

    shown = asyncio.run(session())
    assert calls == [2.0] and "+2" in shown and "opacity:1" in shown


def test_a_move_on_another_thread_is_answered_on_the_loop():
    import threading

    where = []

    async def session():
        control = Control(lambda n: where.append(threading.current_thread()) or str(n), delay=0.01, n=[1, 2])
        thread = threading.Thread(target=lambda: setattr(control, "n", 2))
        thread.start()
        thread.join()
        await asyncio.sleep(0.1)

    asyncio.run(session())
    assert where == [threading.main_thread()]


def test_a_value_that_moves_while_the_view_works_leaves_the_result_marked_as_old():
    async def session():
        control = Control(lambda n: (setattr(control, "n", 2) if n == 1 else None) or str(n), delay=0.01, n=[0, 1, 2])
        control.n = 1
        control.refresh()
        assert "opacity:0.35" in control.widget.children[-1].value
        await asyncio.sleep(0.1)
        return control.widget.children[-1].value

    shown = asyncio.run(session())
    assert ">2<" in shown and "opacity:1" in shown


def test_an_error_is_shown_and_the_next_move_answered():
    def view(n):
        if n == 2:
            raise RuntimeError("no <such> layer")
        return f"fine {n}"

    control = Control(view, n=[1, 3], start={"n": 3})
    control.n = 2
    assert "RuntimeError: no &lt;such&gt; layer" in control.html and 'role="alert"' in control.html
    with pytest.raises(RuntimeError):
        _ = control.output
    control.n = 1
    assert "fine 1" in control.html
    with pytest.raises(RuntimeError):  # an error in the grid of a page is the page's error
        Control(view, n=[1, 2]).to_html()


def test_progress_moves_the_bar():
    control = Control(lambda n: control.progress(3, 8) or str(n), n=[1])
    assert control.output == "1"
    bar = control.widget.children[-2]
    assert (bar.value, bar.max) == (3, 8)


def test_results_are_kept():
    calls = []
    control = Control(lambda n: calls.append(n) or str(n), n=[1, 2])
    control.to_html()
    control.n = 2
    assert control.output == "2" and calls == [1, 2]


def masks(kind):
    import torch

    rows = [torch.zeros(2000, dtype=torch.int64), torch.zeros(2000, dtype=torch.int64)]
    rows[1][500:1500] = 1
    return [row.numpy() for row in rows] if kind == "numpy" else rows


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("axis", [lambda a, b: [a, b], lambda a, b: Setting(a, (a, b)), lambda a, b: Setting(a, (a,))])
def test_long_masks_are_told_apart(kind, axis):
    none, half = masks(kind)
    calls = []
    control = Control(lambda tokens: calls.append(1) or f"{int(tokens.sum())} tokens", tokens=axis(none, half))
    assert control.output == "0 tokens" and ">0 tokens<" in control.to_html()
    control.tokens = half
    assert control.output == "1000 tokens" and ">1000 tokens<" in control.html and control.tokens is half
    control.tokens = none
    assert control.output == "0 tokens" and "opacity:1" in control.html and len(calls) == 2


def test_an_axis_of_masks_starts_where_it_is_told():
    none, half = masks("torch")
    control = Control(lambda tokens: str(int(tokens.sum())), tokens=[none, half], start={"tokens": half})
    assert control.output == "1000"
    with pytest.raises(ValueError, match="cannot start at"):
        Control(lambda tokens: "", tokens=[none], start={"tokens": half})
    with pytest.raises(ValueError, match="cannot start at"):
        Control(lambda tokens: "", tokens=Setting("none of them", ("a", "b")))


def test_explore_takes_a_mask():
    import torch

    from steering_vectors import SteeringVector, sweep
    from steering_vectors.demo import tiny_model, tiny_tokenizer
    from steering_vectors.display.explorer import explore
    from steering_vectors.train.prompts import prompt_ids

    model, tokenizer = tiny_model(), tiny_tokenizer()
    v = SteeringVector({1: 3 * torch.ones(32)})
    mask = torch.zeros_like(prompt_ids(tokenizer, "Hi"))
    mask[:, 3:6] = 1
    control = explore(
        model, tokenizer, v.steering(tokens=mask), "Hi", layers=None, multipliers=[0, 1, 2], max_new_tokens=4
    )  # starts at 1
    assert (
        control.output.text
        == sweep(model, tokenizer, v.steering(tokens=mask), "Hi", layers=[1], multipliers=[1], max_new_tokens=4)[1, 1]
    )
    assert [i for i, x in enumerate(control.output.marked.values) if x] == [3, 4, 5]
    control.tokens = 1 - mask
    assert (
        control.output.text
        == sweep(model, tokenizer, v.steering(tokens=1 - mask), "Hi", layers=[1], multipliers=[1], max_new_tokens=4)[
            1, 1
        ]
    )
    assert control.output.marked.values[3:6] == (0, 0, 0) and "error" not in control.html


def test_an_axis_cannot_take_the_name_of_what_a_control_has():
    have = Control(lambda n: str(n), n=[1])
    names = {name for name in {*dir(Control), *vars(have)} if not name.startswith("_")}
    assert {"values", "output", "html", "start", "view"} <= names
    for name in sorted((names | {"delay", "_last"}) - {"view"}):  # Python itself has no room for a second `view`
        with pytest.raises(ValueError, match=f"No axis can be called '{name}'.*to_html, values"):
            Control(lambda **values: "", **{name: [1, 2]})


def test_live_and_page_come_from_one_display():
    bundle = Control(said, layer=[1, 2], multiplier=[0.0])._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(bundle)
    assert bundle["text/plain"].startswith("Control(layer 1")


SHOWN = """
from steering_vectors.display.controls import Control
seen = []
def view(layer):
    seen.append(layer)
    if layer == 3: raise ValueError("no layer 3")
    return f"layer {layer}"
"""


@pytest.fixture(scope="module")
def kernel():
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    client.execute_interactive(SHOWN, timeout=60)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def messages(client, code):
    "What a notebook is sent when it runs `code`, but for the widgets' own state."
    sent = []
    client.execute_interactive(code, timeout=60, output_hook=lambda m: sent.append((m["msg_type"], m["content"])))
    return [
        (kind, content) for kind, content in sent if kind not in ("status", "execute_input", "comm_open", "comm_msg")
    ]


def test_the_live_control_is_there_before_the_grid(kernel):
    (first, live), (then, both) = messages(kernel, "Control(view, layer=[1, 2], start={'layer': 2})")
    assert (first, then) == ("display_data", "update_display_data")
    assert "text/html" not in live["data"] and "layer 2" in live["data"]["text/plain"]
    assert live["transient"] == both["transient"] and "layer 1" in both["data"]["text/html"]
    assert messages(kernel, "seen")[0][1]["data"]["text/plain"] == "[2, 1]"


def test_a_grid_that_fails_says_so_and_leaves_the_live_control(kernel):
    sent = messages(kernel, "Control(view, layer=[1, 3])")
    assert sent[0][0] == "display_data" and "layer 1" in sent[0][1]["data"]["text/plain"]
    assert any("no layer 3" in json.dumps(content) for _, content in sent[1:])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    chromium()
    if not EMBED.exists():
        pytest.skip("nbs/widgets/embed.js is not there; scripts/docs build fetches it")
    folder = tmp_path_factory.mktemp("page")
    first = Control(said, layer=[1, 2, 3], multiplier=[-1.0, 0.0, 1.0], start={"layer": 2, "multiplier": 0.0})
    second = Control(
        lambda method, on, text: Html(f"<i>{method} {on}</i>"),
        method=["mean", "PCA"],
        on=[True, False],
        text=Setting("hm"),
    )
    long = Control(lambda n: "word " * 80 + "x" * 200 + str(n), n=[1, 2])
    body = "".join(c.to_html() for c in (first, second, long, first))
    script = f'<script src="{EMBED.as_uri()}"></script>'
    page = folder / "page.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>{body}{script}"
    )
    with browser() as launch:
        yield launch, launch(), page.as_uri()


def test_each_picker_changes_only_its_own_control(opened):
    _, context, url = opened
    w = Watched(context, "file:")
    w.page.goto(url)
    first, second, _, again = w.controls()
    assert "layer 2 at +0" in w.shown(first)
    assert "&lt;/script&gt;" in w.shown(first)
    first.locator(".noUi-handle").nth(1).press("ArrowRight")
    first.locator("text=layer 2 at +1").first.wait_for()
    first.locator(".noUi-handle").nth(0).press("Home")
    first.locator("text=layer 1 at +1").first.wait_for()
    assert "layer 2 at +0" in w.shown(again)
    assert "mean True" in w.shown(second)
    second.get_by_role("button", name="PCA").click()
    second.locator("text=PCA True").first.wait_for()
    second.get_by_role("button", name="off").click()
    second.locator("text=PCA False").first.wait_for()
    assert not w.outside and not w.errors
    w.page.close()


def test_a_narrow_window_needs_no_sideways_scrolling(opened):
    _, context, url = opened
    w = Watched(context, "file:")
    w.page.set_viewport_size({"width": 400, "height": 800})
    w.page.goto(url)
    w.controls()
    assert w.page.evaluate("document.documentElement.scrollWidth") <= 400
    w.page.close()


def test_without_javascript_the_starting_cell_is_read(opened):
    launch, _, url = opened
    page = launch(java_script_enabled=False).new_page()
    page.goto(url)
    control = page.locator(".steer-control").first
    assert control.locator(".steer-fallback").is_visible()
    assert "layer 2 at +0" in control.inner_text() and "Computed for layer 1, 2, 3" in control.inner_text()


def positions(slider):
    "The values that a slider can stand at."
    count = round((slider.max - slider.min) / slider.step)
    return [slider.min + i * slider.step for i in range(count + 1)]


MARKS = [
    (-0.06, -0.04, -0.02, 0, 0.02, 0.04, 0.06),
    (-0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15),
    (-1, 0.5),
    (-0.7, 0.3, 2),
    (3,),
    (-2, -1, 0, 1, 2),
    (0.001, 0.002),
    (-300, 0, 100),
    (1e-05, 3e-05),
]


@pytest.mark.parametrize("marks", MARKS, ids=repr)
def test_a_slider_reaches_every_mark_and_zero(marks):
    low, high = min(0.0, *marks), max(0.0, *marks)
    slider = Control(said, layer=[1], multiplier=Range(low, high, marks), start={"multiplier": marks[0]}).pickers[
        "multiplier"
    ]
    reached = positions(slider)
    for value in (*marks, 0):
        assert min(abs(value - x) for x in reached) < 1e-9 * max(1, abs(high))
    gaps = [b - a for a, b in zip(*(sorted({0.0, *marks})[i:] for i in (0, 1)), strict=False)]
    assert slider.step <= min(gaps) / 10 * (1 + 1e-9) and len(reached) <= 10_001


def test_a_step_that_is_given_stays():
    assert Control(said, layer=[1], multiplier=Range(-1, 1, (-1, 1), 0.5)).pickers["multiplier"].step == 0.5


def explored(prompt="Hi", numbers=(1, 2), **how):
    import torch

    from steering_vectors import SteeringVector
    from steering_vectors.demo import tiny_model, tiny_tokenizer
    from steering_vectors.display.explorer import explore

    model, tokenizer = how.pop("model", None) or tiny_model(), tiny_tokenizer()
    v = SteeringVector({n: 3 * torch.ones(32) + n for n in numbers})
    how = {"multipliers": [-1, 1], "max_new_tokens": 3, **how}
    steering = v.steering(tokens=how.pop("tokens", None))
    return explore(model, tokenizer, steering, prompt, **how), model, tokenizer, v


def test_layers_are_in_order_whatever_the_page_shows():
    from steering_vectors.demo import tiny_model

    control = explored(numbers=range(6), layers=[2, 4], model=tiny_model(num_layers=6))[0]
    picker = control.pickers["layer"]
    assert [v for _, v in picker.options] == [0, 1, 2, 3, 4, 5, "all"] and control.layer == 4
    assert control.axes["layer"] == [2, 4]
    control.layer = (1, 3)
    assert [v for _, v in picker.options] == [0, 1, 2, 3, 4, 5, "all", (1, 3)] and control.layer == (1, 3)
    backwards = explored(numbers=range(6), layers=[5, 3, "all"], model=tiny_model(num_layers=6))[0]
    assert [v for _, v in backwards.pickers["layer"].options] == [0, 1, 2, 3, 4, 5, "all"] and backwards.layer == 3


@pytest.mark.parametrize(
    "layers, shown", [("all", ["all"]), (2, [2]), (-1, [2]), ([1, "all", (1, -1)], [1, "all", (1, 2)])], ids=repr
)
def test_explore_takes_layers_as_one_would_type_them(layers, shown):
    control = explored(layers=layers)[0]
    assert control.axes["layer"] == shown and "steer-error" not in control.html
    assert explored(layers=[1, 2], start={"layer": -1})[0].layer == 2


@pytest.mark.parametrize(
    "how, words",
    [
        ({"layers": "frist"}, "not 'frist'"),
        ({"layers": [True]}, "not True"),
        ({"layers": [1, 1]}, "once"),
        ({"layers": []}, "No layers"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"multipliers": "2"}, "not '2'"),
        ({"multipliers": []}, "No multipliers"),
        ({"multipliers": [1, float("nan")]}, "finite"),
        ({"start": {"layer": "frist"}}, "not 'frist'"),
        ({"tokens": [[1, 0], [0, 1]]}, "batches of its own"),
    ],
    ids=repr,
)
def test_explore_refuses_at_the_door(how, words):
    with pytest.raises((TypeError, ValueError), match=words):
        explored(**how)


def test_explore_takes_any_prompt():
    from steering_vectors import sweep

    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "("}]
    for prompt in (begun, [1, 40, 41], [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]):
        control, *subject = explored(prompt)
        assert (
            control.output.text
            == sweep(*subject, prompt, control.multiplier, control.layer, 3)[control.layer, control.multiplier]
        )
        assert "steer-error" not in control.html and "prompt" in control.to_html()
        control.prompt = "Other words"
        assert (
            control.output.text
            == sweep(*subject, "Other words", control.multiplier, control.layer, 3)[control.layer, control.multiplier]
        )


def test_the_templates_arguments_reach_explore():
    control, model, tokenizer, v = explored(
        template={"chat_template": "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"}
    )
    assert "".join(control.output.marked.tokens).startswith("<Hi>")
    closed = explored([{"role": "user", "content": "Hi"}], add_generation_prompt=False)[0]
    assert "[assistant]" not in "".join(closed.output.marked.tokens)


def test_a_vector_that_counts_from_the_end_is_explored():
    from steering_vectors import sweep

    control, *subject = explored(numbers=(-1, -2))
    assert [v for _, v in control.pickers["layer"].options] == [1, 2, "all"]
    control.layer = -1
    assert control.output.text == sweep(*subject, "Hi", control.multiplier, 2, 3)[2, control.multiplier]


def test_sums_of_steps_are_taken_for_the_marks_they_mean():
    control = explored(multipliers=[-0.3, -0.1, 0.1, 0.3])[0]
    for value in (0.1 + 0.2, -0.3 + 3 * 0.1, 0.1 * 3 - 0.2):
        control.multiplier = value
        answer = control.output
        assert answer.text if abs(value) > 1e-9 else answer.text == answer.unsteered
    assert len(control.view.rows) == 1  # all of them were marks
