"""Aggregators over dtypes, counts and pieces: what accumulates gives what one call gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_vectors import aggregate_activations, logistic_aggregator, mean_aggregator, pca_aggregator
from steering_vectors.aggregators import AccumulatingAggregator


def crowds(n: int, d: int, seed: int, m: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shift = torch.randn(d, generator=draw)
    return torch.randn(n, d, generator=draw) + shift, torch.randn(m or n, d, generator=draw) - shift


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 30), st.integers(1, 12), st.integers(0, 99), st.lists(st.integers(1, 6), max_size=5), st.booleans()
)
def test_pieces_and_processes(n: int, d: int, seed: int, sizes: list[int], two: bool) -> None:
    pos, neg = crowds(n, d, seed)
    for aggregator in (mean_aggregator(), pca_aggregator()):
        assert isinstance(aggregator, AccumulatingAggregator)
        states = [aggregator.start(), aggregator.start()]
        cuts = [min(sum(sizes[:i]), n) for i in range(len(sizes) + 1)] + [n]
        for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
            k = i % 2 if two else 0
            states[k] = aggregator.add(states[k], pos[a:b], neg[a:b])
        got, wanted = aggregator.finish(aggregator.merge(*states)), aggregator(pos, neg)
        assert torch.allclose(got, wanted, atol=1e-3), (aggregator, got, wanted)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (40, 40), (1, 7)])
def test_pca_is_the_first_singular_direction(shape: tuple[int, int]) -> None:
    pos, neg = crowds(*shape, seed=1)
    found = pca_aggregator()(pos, neg)
    first = torch.as_tensor(np.linalg.svd((pos - neg).double().numpy())[2][0]).float()
    assert abs(float(found @ first)) > 1 - 1e-5 and abs(float(found.norm()) - 1) < 1e-5
    assert float(((pos - neg) @ found).mean()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [mean_aggregator, pca_aggregator, logistic_aggregator])
def test_dtypes(make: object, dtype: torch.dtype) -> None:
    pos, neg = (h.to(dtype) for h in crowds(30, 8, seed=2))
    found = make()(pos, neg)  # type: ignore[operator]
    exact = make()(pos.float(), neg.float())  # type: ignore[operator]
    assert found.dtype == dtype and found.shape == (8,)
    assert torch.allclose(found.float(), exact, atol=1e-3 if dtype.itemsize >= 4 else 2e-2)


@pytest.mark.parametrize("n", [6, 100])  # fewer pairs than they are wide, and more: each has its own matrix
@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-20, 1e15, 1e20, 1e35])
def test_tiny_and_huge_differences_keep_their_direction(n: int, scale: float) -> None:
    pos, neg = crowds(n, 16, seed=3)
    found = pca_aggregator()(pos * scale, neg * scale)
    assert found.dtype == torch.float32 and float(found @ pca_aggregator()(pos, neg)) > 0.999


def test_pairs_of_very_different_sizes_in_pieces() -> None:
    pos, neg = crowds(100, 16, seed=3)
    sizes = torch.logspace(-20, 15, 100)[:, None]
    pca = pca_aggregator()
    assert isinstance(pca, AccumulatingAggregator)
    state = pca.start()
    for i in range(0, 100, 20):
        state = pca.add(state, (pos * sizes)[i : i + 20], (neg * sizes)[i : i + 20])
    assert float(pca.finish(state) @ pca(pos * sizes, neg * sizes)) > 0.999
    assert state.moment.dtype == torch.float64 and state.deltas == [] and state.dtype == torch.float32


def test_counts() -> None:
    pos, neg = crowds(30, 6, seed=4, m=9)
    assert torch.allclose(mean_aggregator()(pos, neg), pos.mean(0) - neg.mean(0), atol=1e-5)
    arrow = logistic_aggregator()(pos, neg)
    assert float(arrow @ (pos.mean(0) - neg.mean(0))) > 0 and abs(float(arrow.norm()) - 1) < 1e-5
    with pytest.raises(ValueError, match="30 positive and 9 negative"):
        pca_aggregator()(pos, neg)


def test_logistic_takes_its_own_options() -> None:
    pos, neg = crowds(30, 6, seed=5)
    for options in ({"fit_intercept": True}, {"C": 0.01}, {"max_iter": 500, "fit_intercept": False}):
        assert abs(float(logistic_aggregator(options)(pos, neg).norm()) - 1) < 1e-5
    with pytest.raises(TypeError, match="nonsense"):
        logistic_aggregator({"nonsense": 1})(pos, neg)


def test_lists_of_batches() -> None:
    pos, neg = crowds(10, 4, seed=6)
    whole = aggregate_activations({3: pos}, {3: neg}, logistic_aggregator())
    parts = aggregate_activations({3: [pos[:4], pos[4:]]}, {3: [neg[:7], neg[7:]]}, logistic_aggregator())
    assert torch.allclose(whole[3], parts[3])
