"""Two threads inside one context: each has its own place in its own sequence."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import SteeringVector, ablation_operator
from steering_vectors.demo import tiny_model
from steering_vectors.steer.positions import PassTracker
from steering_vectors.steer.tokens import Tokens

ROUNDS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def vector() -> SteeringVector:
    g = torch.Generator().manual_seed(0)
    return SteeringVector({n: torch.randn(32, generator=g) for n in (0, 2)})


def ids_of(length: int, seed: int) -> Tensor:
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, new: int = 12, **how: Any) -> tuple[Tensor, ...]:
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0} | how
    out = model.generate(ids, attention_mask=mask, **options, return_dict_in_generate=True, output_logits=True)
    return tuple(out.logits)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    "Run all at the same time; an error of any of them is raised here."
    results, errors, start = [None] * len(calls), queue.Queue(), threading.Barrier(len(calls))

    def run(n: int) -> None:
        try:
            start.wait()
            results[n] = calls[n]()
        except BaseException as e:
            errors.put(e)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not errors.empty():
        raise errors.get()
    return results


SAY: list[dict[str, Any]] = [
    {},
    {"min_token_index": 9},
    {"token_indices": [2, 8, 11]},
    {"tokens": Tokens.response},
    {"tokens": Tokens.prompt[:3] | Tokens.generated[1::2]},
    {"multiplier": [1, -1]},
]


@pytest.mark.parametrize("say", SAY, ids=str)
def test_two_generations_inside_one_context(model: Any, say: dict[str, Any]) -> None:
    short, long = ids_of(5, 1), ids_of(12, 2)
    with vector().apply(model, **say):
        alone = [generate(model, short), generate(model, long)]
    for _ in range(ROUNDS):
        with vector().apply(model, **say):
            together = at_once(lambda: generate(model, short), lambda: generate(model, long))
        for a, t in zip(alone, together, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, t, strict=True))


def test_different_ways_of_generating_at_once(model: Any) -> None:
    calls = [
        lambda: generate(model, ids_of(5, 1)),
        lambda: generate(model, ids_of(7, 3), cache_implementation="static"),
        lambda: generate(model, ids_of(6, 4), num_beams=2),
        lambda: generate(model, ids_of(8, 5), use_cache=False),
    ]
    with vector().apply(model, min_token_index=6, operator=ablation_operator()):
        alone = [call() for call in calls]
        together = at_once(*calls)
    for a, t in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, t, strict=True))


def test_contexts_opened_and_closed_while_another_thread_generates(model: Any) -> None:
    "A second context, for another row width, comes and goes; the first generation is steered by its own all along or an error is seen."
    other = tiny_model("llama", seed=4)
    with vector().apply(model, min_token_index=4):
        alone = generate(model, ids_of(6, 1))

    def churn() -> int:
        n = 0
        for _ in range(200):
            with vector().apply(other, min_token_index=1), torch.no_grad():
                n += int(torch.isfinite(other(ids_of(3, 1)).logits).all())
        return n

    with vector().apply(model, min_token_index=4):
        logits, n = at_once(lambda: generate(model, ids_of(6, 1)), churn)
    assert n == 200 and all(torch.equal(x, y) for x, y in zip(alone, logits, strict=True))


def test_a_shared_place_would_be_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    "With one state for all threads the comparison above fails: the fault, present and seen."

    class Shared:
        call, outer, uncached, last = None, {}, (), None

    forget = PassTracker._forget

    def shared(self: PassTracker) -> None:
        forget(self)
        self.local = Shared()  # type: ignore[assignment]

    monkeypatch.setattr(PassTracker, "_forget", shared)
    seen = 0
    short, long = ids_of(5, 1), ids_of(12, 2)
    with vector().apply(model, min_token_index=9):
        alone = generate(model, short, 40)
    for _ in range(6):
        try:
            with vector().apply(model, min_token_index=9):
                together, _ = at_once(lambda: generate(model, short, 40), lambda: generate(model, long, 40))
            seen += not all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))
        except Exception:
            seen += 1
        if seen:
            return
    raise AssertionError("a shared state went unnoticed")
