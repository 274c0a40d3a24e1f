"""Pictures: each takes an Axes and returns it, carries its units, and costs nothing until something is drawn."""

import subprocess
import sys

import matplotlib
import pytest
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from steering_vectors import ProjectionSet, Provenance, SteeringVector  # noqa: E402
from steering_vectors.display import plots as p  # noqa: E402
from steering_vectors.evaluate.effects import Effect
from steering_vectors.evaluate.geometry import Similarity
from steering_vectors.evaluate.projections import Projections
from steering_vectors.evaluate.results import TokenValues
from steering_vectors.evaluate.shifts import TokenShift

EFFECT = Effect("gap", "nats per token", (-1.0, 0.0, 1.0), torch.tensor([[-1.0, 0, 1], [0, 0.1, 0.5]]))
PROJECTIONS = Projections(("<s>", "a", "b"), (3, 4), torch.tensor([[9.0, 1, 2], [9, 3, 4]]))
DRAWN = {
    "effect": (p.plot_effect, EFFECT, "multiplier", "nats per token"),
    "effects": (p.plot_effect, {"a": EFFECT, "b": EFFECT}, "multiplier", "nats per token"),
    "layers": (p.plot_layers, {3: EFFECT, 6: EFFECT}, "layer", "nats per token per multiplier"),
    "shift": (p.plot_shift, TokenShift(("a", "b"), (0.1, 0.2), (0.3, 0.1)), "probability", ""),
    "similarity": (p.plot_similarity, Similarity(("x", "y"), torch.eye(2)), "", ""),
    "tokens": (
        p.plot_tokens,
        TokenValues(("a", "b"), (1.0, -1.0), "projection (activation units)"),
        "",
        "activation units",
    ),
    "projections": (p.plot_projections, PROJECTIONS, "layer", "activation units"),
    "norms": (p.plot_norms, SteeringVector({1: torch.ones(4)}), "layer", "activation units"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_drawn_where_it_is_told_and_says_its_units(name):
    draw, data, x, y = DRAWN[name]
    ax = plt.subplots()[1]
    assert draw(data, ax=ax) is ax
    assert x in ax.get_xlabel() and y in ax.get_ylabel()
    assert draw(data) is not ax
    plt.close("all")


def test_more_series_than_colours():
    ax = p.plot_effect({str(i): EFFECT for i in range(9)})
    assert len(ax.get_legend().get_texts()) == 9
    plt.close("all")


@pytest.mark.parametrize(
    "missing, code, words",
    [
        ("ipywidgets", "s.Control(lambda n: str(n), n=[1, 2])", "pip install ipywidgets"),
        ("ipywidgets", "s.Control(lambda n: str(n), n=s.Range(0, 1, (0, 1)))", "pip install ipywidgets"),
        ("matplotlib", "s.plot_norms(s.SteeringVector({1: [1.0, 2.0]}))", "pip install matplotlib"),
    ],
)
def test_what_is_missing_is_named(missing, code, words):
    script = f"import sys; sys.modules['{missing}'] = None\nimport steering_vectors as s\ntry: {code}\nexcept ImportError as e: print(e)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert words in run.stdout


def test_nothing_is_imported_before_it_is_used():
    script = "import sys, steering_vectors as s; s.plot_effect, s.sweep; print([m for m in ('matplotlib', 'ipywidgets') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "draw, wrong",
    [
        (p.plot_effect, {}),
        (p.plot_effect, [EFFECT]),
        (p.plot_effect, {"a": 1.0}),
        (p.plot_effect, PROJECTIONS),
        (p.plot_layers, {}),
        (p.plot_layers, EFFECT),
        (p.plot_layers, {3: 0.5}),
        (p.plot_projections, {}),
        (p.plot_projections, {"a": EFFECT}),
        (p.plot_projections, [PROJECTIONS]),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_figure_is_made(draw, wrong):
    before = plt.get_fignums()
    with pytest.raises(TypeError, match="Draw "):
        draw(wrong)
    assert plt.get_fignums() == before


def test_a_set_of_texts_is_their_average_with_a_band():
    other = Projections(PROJECTIONS.tokens, (3, 4), 3 * PROJECTIONS.values)
    ax = p.plot_projections({"a": ProjectionSet((PROJECTIONS, other)), "b": PROJECTIONS})
    assert list(ax.lines[0].get_ydata()) == [3.0, 7.0] and list(ax.lines[1].get_ydata()) == [1.5, 3.5]
    assert len(ax.collections) == 1
    plt.close("all")


def test_values_are_drawn_in_the_order_of_their_axis():
    mixed = Effect("gap", "nats", (1.0, -1.0, 0.0), torch.tensor([[3.0, 1, 2]]))
    assert list(p.plot_effect(mixed).lines[0].get_ydata()) == [1, 2, 3]
    ax = p.plot_layers({6: mixed, 3: EFFECT})
    assert list(ax.lines[0].get_xdata()) == [3, 6] and ax.lines[0].get_ydata()[1] == pytest.approx(mixed.slope)
    plt.close("all")


def test_norms_of_layers_that_count_from_the_end():
    story = Provenance(activation_norms={2: 9.0}, num_layers=3)
    ax = p.plot_norms(SteeringVector({-1: torch.ones(4)}, provenance=story))
    assert [list(line.get_xdata()) for line in ax.lines] == [[2], [2]] and list(ax.lines[1].get_ydata()) == [9.0]
    plt.close("all")


def test_the_default_device_is_not_drawn_on():
    try:
        torch.set_default_device("meta")
        for draw, data, _, _ in DRAWN.values():
            assert draw(data)
        assert p.plot_projections(ProjectionSet((PROJECTIONS, PROJECTIONS)))
    finally:
        torch.set_default_device(None)
        plt.close("all")


@pytest.mark.parametrize(
    "draw", [p.plot_shift, p.plot_similarity, p.plot_tokens, p.plot_norms], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "wrong", [None, "x", [], {}, 1.5, torch.ones(3), Effect("gap", "nats", (0.0,), torch.ones(1, 1))]
)
def test_what_cannot_be_drawn_is_named(draw, wrong):
    with pytest.raises(TypeError, match="draws one|takes a SteeringVector"):
        draw(wrong)
    assert not plt.get_fignums()


def test_two_results_of_one_name_are_refused():
    e = Effect("gap", "nats", (0.0, 1.0), torch.ones(2, 2))
    for named in ({1: e, "1": e}, {None: e, "None": e, "a": e}):
        with pytest.raises(ValueError, match="the same name"):
            p.plot_effect(named)


def test_units_that_differ_are_all_written():
    nats, logits = (Effect("gap", unit, (0.0, 1.0), torch.ones(2, 2)) for unit in ("nats per token", "logits"))
    assert "(nats per token, logits)" in p.plot_effect({"a": nats, "b": logits}).get_ylabel()
    assert p.plot_effect({"a": nats, "b": nats}).get_ylabel().count("nats") == 1
    plt.close("all")


@pytest.mark.parametrize("name", ["all", "12", True, 1.0, None])
def test_effects_are_drawn_by_layers_numbers(name):
    e = Effect("gap", "nats", (0.0, 1.0), torch.ones(2, 2))
    with pytest.raises(TypeError, match="not a layer number"):
        p.plot_layers({name: e, 3: e})


def test_no_texts_are_no_picture():
    for nothing in (ProjectionSet(()), {"joy": ProjectionSet(())}):
        with pytest.raises(ValueError, match="nothing to draw"):
            p.plot_projections(nothing)


@pytest.mark.parametrize(
    "shapes", [((3, 4), (3, 5), (4,)), ((3, 4), (3, 4), (5,)), ((4,), (3, 4), (4,)), ((0, 4), (3, 4), (4,))], ids=repr
)
def test_a_contrast_has_two_sets_and_a_direction(shapes):
    with pytest.raises(ValueError, match="these have shapes"):
        p.plot_contrast(*(torch.ones(*shape) for shape in shapes))


def test_nothing_lies_along_a_zero_direction():
    with pytest.raises(ValueError, match="The direction is zero"):
        p.plot_contrast(torch.randn(3, 4), torch.randn(3, 4), torch.zeros(4))
