"""The span of several directions is removed at once: on a model, in every dtype, in every order, with rows of their own."""

from itertools import permutations
from typing import Any

import plain
import pytest
import torch

from steering_vectors import SteeringVector, record_activations, subspace_ablation_operator
from steering_vectors.demo import tiny_model


def directions(d: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, d, generator=g)
    return [t.to(dtype) for t in (a, b + 2 * a, c - a)]


def steered(model: Any, order: tuple[int, ...], multiplier: Any = 1.0) -> torch.Tensor:
    vs = [directions(32)[n] for n in order]
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    operator = subspace_ablation_operator(vs[1:])
    with SteeringVector({0: vs[0]}).apply(model, operator=operator, multiplier=multiplier):
        with record_activations(model, layer_nums=[0]) as seen, torch.no_grad():
            model(ids)
    return seen[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_of_the_span_is_left_whatever_the_order(dtype: torch.dtype) -> None:
    model = tiny_model("llama", num_layers=1).to(dtype)
    plainly = steered(model, (0, 1, 2), 0.0)
    found = [steered(model, order) for order in permutations(range(3))]
    eps = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]  # directions are float32
    for h in found:
        left = h.double() @ torch.stack(directions(32)).double().T / plainly.double().norm(dim=-1, keepdim=True)
        assert left.abs().max() < eps * 10
        assert plain.far(h, found[0]) < eps * float(plainly.abs().max())
    assert plain.far(found[0], plainly) > 0.05


def test_one_multiplier_per_row() -> None:
    "Its size makes no difference but for 0, which leaves the row as it is."
    model = tiny_model("llama", num_layers=1)
    whole, none = steered(model, (0, 1, 2)), steered(model, (0, 1, 2), 0.0)
    rows = steered(model, (0, 1, 2), [0.0, 3.0])
    assert torch.equal(rows[0], none[0])
    assert plain.far(rows[1], whole[1]) < 1e-5


@pytest.mark.parametrize("others", [[], [torch.zeros(2, 3)], [torch.zeros(3), torch.zeros(4)], [1.0]])
def test_bad_directions(others: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(d,\)"):
        subspace_ablation_operator(others)
