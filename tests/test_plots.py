"""Pictures: each takes an Axes and returns it, carries its units, and costs nothing until something is drawn."""

import subprocess
import sys

import matplotlib
import pytest
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from steering_vectors import SteeringVector  # noqa: E402
from steering_vectors import plots as p  # noqa: E402
from steering_vectors.effects import Effect, Projections, Similarity, TokenShift, TokenValues  # noqa: E402

EFFECT = Effect("gap", "nats a token", (-1.0, 0.0, 1.0), torch.tensor([[-1.0, 0, 1], [0, 0.1, 0.5]]))
PROJECTIONS = Projections(("<s>", "a", "b"), (3, 4), torch.tensor([[9.0, 1, 2], [9, 3, 4]]))
DRAWN = {
    "effect": (p.plot_effect, EFFECT, "multiplier", "nats a token"),
    "effects": (p.plot_effect, {"a": EFFECT, "b": EFFECT}, "multiplier", "nats a token"),
    "layers": (p.plot_layers, {3: EFFECT, 6: EFFECT}, "layer", "nats a token per multiplier"),
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
        ("ipywidgets", "s.explore", "pip install ipywidgets"),
        ("ipywidgets", "s.Control", "pip install ipywidgets"),
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
