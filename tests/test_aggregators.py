"""Aggregators over dtypes, counts and pieces: what accumulates gives what one call gives."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import steering_vectors
from steering_vectors import (
    AccumulatingAggregator,
    aggregate_activations,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    train_steering_vector,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train.aggregators import unpaired
from steering_vectors.train.packing import ancestor_mask, block_mask, blocks, pack


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
    for acts in ((pos, neg), (neg, pos)):
        with pytest.raises(ValueError, match=r"(30|9) positive and (30|9) negative .* pca_aggregator\(paired=False\)"):
            pca_aggregator()(*acts)


SETS = [mean_aggregator(), logistic_aggregator(), logistic_aggregator(paired=False), pca_aggregator(paired=False)]


@pytest.mark.parametrize("aggregator", SETS, ids=["mean", "logistic", "logistic of sets", "pca of sets"])
@pytest.mark.parametrize("n,m", [(30, 9), (9, 30), (3, 400), (1, 12)])
def test_sets_of_unequal_length(aggregator: Any, n: int, m: int) -> None:
    "Whatever the counts, the way goes from negative to positive, and back when the sets change places."
    draw = torch.Generator().manual_seed(n)
    way = torch.zeros(20).index_fill_(0, torch.tensor([4]), 1.0)
    pos, neg = (torch.randn(k, 20, generator=draw) * 0.3 + 5 + s * way * 2 for k, s in ((n, 1), (m, -1)))
    found, back = aggregator(pos, neg), aggregator(neg, pos)
    assert float(found @ way / found.norm()) > 0.9 and torch.allclose(found, -back, atol=1e-3)
    order = torch.randperm(n, generator=draw), torch.randperm(m, generator=draw)
    assert torch.allclose(aggregator(pos[order[0]], neg[order[1]]), found, atol=2e-3)
    assert torch.allclose(aggregate_activations({2: pos}, {2: neg}, aggregator)[2], found)


def test_the_larger_set_weighs_no_more_in_the_mean_and_in_pca() -> None:
    pos, neg = crowds(40, 6, seed=7, m=15)
    for aggregator in (mean_aggregator(), pca_aggregator(paired=False)):
        assert torch.allclose(aggregator(pos, neg), aggregator(torch.cat([pos] * 5), neg), atol=1e-4)


def test_sets_by_definition() -> None:
    "PCA of sets is the longest line through both, each counted as one; of pairs, the same about each pair's middle."
    pos, neg = crowds(12, 7, seed=8, m=5)
    middle = (pos.mean(0) + neg.mean(0)) / 2
    spread = sum((h - middle).double().T @ (h - middle).double() / len(h) for h in (pos, neg))
    first = torch.linalg.eigh(spread).eigenvectors[:, -1].float()
    assert abs(float(first @ pca_aggregator(paired=False)(pos, neg))) > 1 - 1e-5
    pos, neg = crowds(12, 7, seed=9)
    about = torch.cat([pos - (pos + neg) / 2, neg - (pos + neg) / 2]).double()
    first = torch.linalg.eigh(about.T @ about).eigenvectors[:, -1].float()
    assert abs(float(first @ pca_aggregator()(pos, neg))) > 1 - 1e-5


def test_sets_of_one_length_are_no_pairs() -> None:
    pos, neg = crowds(25, 6, seed=10)
    other = neg[torch.randperm(25, generator=torch.Generator().manual_seed(1))]
    for aggregator in (unpaired(mean_aggregator()), unpaired(logistic_aggregator({"C": 3.0}))):
        assert torch.allclose(aggregator(pos, other), aggregator(pos, neg), atol=1e-3)
    paired = logistic_aggregator({"C": 3.0})
    assert not torch.allclose(paired(pos, other), paired(pos, neg), atol=1e-2)
    assert torch.equal(unpaired(paired)(pos, neg), logistic_aggregator({"C": 3.0}, paired=False)(pos, neg))


def test_who_needs_pairs() -> None:
    for make in (mean_aggregator, logistic_aggregator, lambda: pca_aggregator(paired=False)):
        assert make().needs_pairs is False and unpaired(make()) is not None  # type: ignore[attr-defined, no-untyped-call]
    assert pca_aggregator().needs_pairs is True  # type: ignore[attr-defined]
    for aggregator in (pca_aggregator(), Pairs()):
        with pytest.raises(ValueError, match="two sets without pairs have none. Use mean_aggregator"):
            unpaired(aggregator)

    def own(pos: torch.Tensor, neg: torch.Tensor) -> torch.Tensor:
        return pos.mean(0)

    assert unpaired(own) is own


class Pairs:
    "An aggregator of one's own: the median of the differences."

    needs_pairs = True

    def start(self) -> list[torch.Tensor]:
        return []

    def add(self, state: list[torch.Tensor], pos: torch.Tensor, neg: torch.Tensor) -> list[torch.Tensor]:
        return [*state, pos - neg]

    def merge(self, state: list[torch.Tensor], other: list[torch.Tensor]) -> list[torch.Tensor]:
        return state + other

    def finish(self, state: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(state).median(0).values

    def __call__(self, pos: torch.Tensor, neg: torch.Tensor) -> torch.Tensor:
        return self.finish(self.add(self.start(), pos, neg))


def test_an_accumulating_aggregator_of_ones_own() -> None:
    assert isinstance(Pairs(), steering_vectors.AccumulatingAggregator)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [(f"I am glad {i}", f"I am sad {i}") for i in range(5)]
    accumulated = train_steering_vector(model, tokenizer, pairs, layers=[1], aggregator=Pairs())
    at_once = train_steering_vector(
        model, tokenizer, pairs, layers=[1], aggregator=lambda pos, neg: (pos - neg).median(0).values
    )
    assert torch.allclose(accumulated.layer_activations[1], at_once.layer_activations[1], atol=1e-6)


def test_an_aggregator_that_subtracts_rows_is_told_why_it_cannot() -> None:
    pos, neg = crowds(8, 4, seed=11, m=3)
    with pytest.raises(RuntimeError) as caught:
        aggregate_activations({0: pos}, {0: neg}, lambda pos, neg: (pos - neg).mean(0))
    assert "8 positive and 3 negative activations. Without pairs" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError) as caught:  # of one length, the error is its own
        aggregate_activations({0: pos}, {0: pos}, lambda pos, neg: pos @ neg)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("one", [True, False], ids=["no positive", "no negative"])
@pytest.mark.parametrize("aggregator", [mean_aggregator(), pca_aggregator(paired=False), pca_aggregator()], ids=repr)
def test_an_empty_side(aggregator: Any, one: bool) -> None:
    acts = (torch.zeros(0, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="one of the two sides|differences of pairs"):
        aggregator(*(acts if one else acts[::-1]))


def test_another_default_device() -> None:
    pos, neg = crowds(12, 5, seed=12)
    row = pack([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 7, 8]], 99)[0]

    def everything() -> list[Any]:
        found: list[Any] = [make()(pos, neg) for make in (mean_aggregator, pca_aggregator, logistic_aggregator)]
        found += [aggregator(pos, neg[:4]) for aggregator in SETS]
        end, depth = (torch.tensor(n, device="cpu") for n in (row.end, row.depth))
        cut = blocks(row, size=2)
        return [*found, cut.keys, cut.used, block_mask(cut, end, depth, 2, 3), ancestor_mask(end, depth, 2, 3)]

    expected, before = everything(), torch.get_default_device()
    try:
        torch.set_default_device("meta")
        found = everything()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_default_device(before)


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
