"""Strength by layer, by row and by token of the response, together, against a plain loop; and the ways of generating agree."""

import threading
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from test_gates import EXACT, NEW, PADS, ROWS, SEEN, S, gate_of, generate, prompts, vector_of, wanted
from torch import Tensor
from versions import fault, skip_if

from steering_vectors import SteeringVector, Tokens, ablation_operator, addition_operator, decay, ramp
from steering_vectors.demo import tiny_model
from steering_vectors.evaluate.arguments import as_steerings
from steering_vectors.steer.steering import Steering


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_layers=3).double()


def two_steps(numbers: Tensor) -> Tensor:
    "Full, then nothing, then turned around."
    return torch.where(numbers < 2, 1.0, torch.where(numbers < 3, 0.0, -0.5))


SCHEDULES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], float]]] = {
    "decay": (decay(2), lambda n: 0.5 ** (n / 2)),
    "ramp": (ramp(3), lambda n: min(1.0, (n + 1) / 3)),
    "one's own": (two_steps, lambda n: 1.0 if n < 2 else 0.0 if n < 3 else -0.5),
}
WAYS: dict[str, dict[str, Any]] = {
    "a cache": {}, "no cache": {"use_cache": False}, "a static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4}, "sampled": {"do_sample": True, "num_return_sequences": 2, "temperature": 3.0},
}  # fmt: skip


def check(
    model: Any,
    out: Any,
    factor: Callable[[int], float],
    by_row: list[float],
    by_layer: dict[int, float],
    copies: int = 1,
    columns: int = S,
) -> None:
    "Every step's logits against hooks that multiply by hand."
    moved = []
    for r, sequence in enumerate(out.sequences):
        row, pads = r // copies, PADS[r // copies]
        steps, logits = torch.stack([s[source_of(out, r, t)] for t, s in enumerate(out.logits)]), []
        for t in range(NEW):
            ids = sequence[pads : columns + t]
            hooks = []
            for n, v in vector_of(model).layer_activations.items():
                numbers = torch.arange(len(ids)) - (columns - pads - 1)
                weights = torch.tensor([factor(int(k)) if k >= 0 else 0.0 for k in numbers], dtype=torch.float64)
                change = by_row[row] * by_layer[n] * weights[:, None] * v
                module = model.model.layers[n]
                hooks.append(module.register_forward_hook(lambda m, a, h, change=change: h + change))
            with torch.no_grad():
                logits.append(model(ids[None]).logits[0, -1])
            for hook in hooks:
                hook.remove()
        expected = torch.stack(logits)
        assert plain.far(steps, expected) < EXACT, f"row {r}"
        unsteered = plain.logits_of_steps(model, sequence, columns, pads, {}, lambda c, own: False)
        moved.append(plain.far(expected, unsteered))
    assert min(m for m, k in zip(moved, [k for k in by_row for _ in range(copies)], strict=True) if k) > SEEN


def source_of(out: Any, r: int, t: int) -> int:
    "The row of the logits that decided token `t` of sequence `r`; beams change places."
    beams = getattr(out, "beam_indices", None)
    return r if beams is None else int(beams[r, t])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_counts_the_same(model: Any, way: str, name: str) -> None:
    given, how, (schedule, factor) = prompts(), WAYS[way], SCHEDULES[name]
    if way == "chunks":
        skip_if(fault(lambda: generate(model, given, **how), "a prompt in chunks"))
    torch.manual_seed(0)
    with vector_of(model).apply(model, schedule=schedule, prompt=given):
        out = generate(model, given, **how)
    check(model, out, factor, [1.0] * ROWS, {1: 1.0, 2: 1.0}, how.get("num_return_sequences", 1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("way", WAYS)
def test_layer_row_and_token_together(model: Any, way: str, name: str) -> None:
    given, rows, how = prompts(), [1.0, -1.0, 0.0, 2.0], WAYS[way]
    if way == "chunks":
        skip_if(fault(lambda: generate(model, given, **how), "a prompt in chunks"))
    schedule, factor = SCHEDULES[name]
    multiplier = {1: rows, 2: [0.5 * m for m in rows]}
    torch.manual_seed(0)
    with vector_of(model).apply(model, multiplier=multiplier, schedule=schedule, prompt=given):
        out = generate(model, given, **how)
    check(model, out, factor, rows, {1: 1.0, 2: 0.5}, how.get("num_return_sequences", 1))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_beams(model: Any, name: str, use_cache: bool) -> None:
    "A factor depends on the number of a token alone, which beams share. Without a cache, the prompt has to be given."
    given, (schedule, factor) = prompts(), SCHEDULES[name]
    how = {"num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
    for told in (True, False):
        handle = vector_of(model).apply(model, schedule=schedule, prompt=given if told else None)
        if not use_cache and not told:
            with handle, pytest.raises(ValueError, match="prompt="):
                generate(model, given, **how)
            continue
        with handle:
            out = generate(model, given, **how)
        assert len({tuple(rows) for rows in (out.beam_indices % 3).tolist()}) > 1, "no beam has changed its place"
        check(model, out, factor, [1.0] * ROWS, {1: 1.0, 2: 1.0}, 2)


@pytest.mark.parametrize("kept", [True, False], ids=["the cache is kept", "read again"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_two_turns(model: Any, name: str, kept: bool) -> None:
    "Each answer is counted from its own prompt, which has to be given where the cache is kept."
    given, (schedule, factor) = prompts(), SCHEDULES[name]
    first = generate(model, given)
    said = torch.randint(3, 90, (ROWS, 3), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, said], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(ROWS, ids.shape[1] - S, dtype=torch.long)], 1)
    second = {"input_ids": ids, "attention_mask": mask}
    with vector_of(model).apply(model, schedule=schedule):
        begun = generate(model, given)
        longer = {"input_ids": torch.cat([begun.sequences, said], 1), "attention_mask": mask}
        if kept:
            with pytest.raises(ValueError, match="prompt="):
                generate(model, longer, past_key_values=begun.past_key_values)
        else:
            check_later = generate(model, longer)
    if not kept:
        check(model, check_later, factor, [1.0] * ROWS, {1: 1.0, 2: 1.0}, columns=ids.shape[1])
    cache = {"past_key_values": first.past_key_values} if kept else {}
    with vector_of(model).apply(model, schedule=schedule, prompt=second):
        out = generate(model, second, **cache)
    check(model, out, factor, [1.0] * ROWS, {1: 1.0, 2: 1.0}, columns=ids.shape[1])


def test_a_multiplier_by_layer_is_that_of_scaled_vectors(model: Any) -> None:
    given, v = prompts(), vector_of(model)
    with v[1].apply(model, multiplier=2.0), v[2].apply(model, multiplier=0.5):
        apart = generate(model, given)
    with v.apply(model, multiplier={2: 0.5, 1: 2.0}):
        together = generate(model, given)
    with v.apply(model, multiplier={1: 2.0, 2: 0}) as handle:
        one = generate(model, given)
    with v[1].apply(model, multiplier=2.0):
        alone = generate(model, given)
    assert all(torch.equal(a, b) for a, b in zip(apart.logits, together.logits, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.logits, alone.logits, strict=True))
    assert list(handle.edits) == [1]
    assert not torch.equal(apart.logits[0], alone.logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "operator", [addition_operator(), ablation_operator(), lambda h, v: v * h.mean(-1, keepdim=True)]
)
def test_a_constant_schedule_is_a_multiplier(operator: Any, dtype: torch.dtype) -> None:
    model, given = tiny_model("llama", num_layers=3, dtype=dtype), prompts()
    v = vector_of(model)
    with v.apply(model, operator=operator, multiplier=2.0, schedule=lambda n: torch.full_like(n, 0.75), prompt=given):
        scheduled = generate(model, given)
    with v.apply(model, operator=operator, multiplier=1.5, tokens=Tokens.response, prompt=given):
        plainly = generate(model, given)
    assert all(torch.equal(a, b) for a, b in zip(scheduled.logits, plainly.logits, strict=True))
    assert not torch.equal(plainly.logits[0], generate(model, given).logits[0])


def test_with_a_gate_and_tokens(model: Any) -> None:
    given, gate = prompts(), gate_of(model)
    with vector_of(model).apply(model, when=gate, schedule=ramp(3), tokens=Tokens.generated, prompt=given):
        out = generate(model, given)
    rows = [float(o) for o in wanted(model, gate, given)]
    check(model, out, lambda n: min(1.0, (n + 1) / 3) if n >= 1 else 0.0, rows, {1: 1.0, 2: 1.0})


def test_a_token_at_zero_is_left_bit_for_bit(model: Any) -> None:
    given = prompts()
    with vector_of(model).apply(model, operator=ablation_operator(), schedule=torch.zeros_like, prompt=given):
        out = generate(model, given)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, generate(model, given).logits, strict=True))


def test_json_and_code() -> None:
    v = SteeringVector({1: torch.ones(4), 2: torch.ones(4)})
    for s in [
        v.steering(multiplier={1: 2, 2: 0.5}, schedule=decay(16)), v.steering(multiplier={1: [1, 2], 2: 3}, schedule=ramp(4)),
    ]:  # fmt: skip
        again = Steering.from_json(s.to_json("v"), {"v": v})
        assert repr(again) == repr(s)
        assert again.to_json("v") == s.to_json("v")
    assert repr(v.steering(multiplier={1: 2, 2: 0.5}, schedule=decay(16))) == (
        "v[1:3].steering(multiplier={1: 2, 2: 0.5}, schedule=decay(16))"
    )
    assert v.steering(multiplier={1: 2, 2: 0.5}).times(2).strengths == {1: 4.0, 2: 1.0}


def test_bad_input(model: Any) -> None:
    v = vector_of(model)
    for multiplier in ({1: 1}, {1: 1, 2: 1, 3: 1}, {}):
        with pytest.raises(ValueError, match="names each layer"):
            v.steering(multiplier=multiplier)
    with pytest.raises(ValueError, match="finite"):
        v.steering(multiplier={1: 1, 2: float("nan")})
    with pytest.raises(TypeError, match="schedule="):
        v.steering(schedule=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="your own schedule"):
        v.steering(schedule=two_steps).to_json("v")
    with pytest.raises(ValueError, match="lies in the prompt"):
        v.steering(schedule=decay(2), tokens=Tokens.prompt)
    with pytest.raises(ValueError, match="for each layer"):
        as_steerings(v.steering(multiplier={1: 1, 2: 2}))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_two_threads_with_two_steerings_do_not_add_up(model: Any, gated: bool) -> None:
    "Each thread of a server has its own steering; both contexts are open at once."
    given, both_open = prompts(), threading.Barrier(2, timeout=60)
    gate = gate_of(model)
    found: dict[int, Any] = {}

    def one(seed: int, alone: bool) -> Any:
        how: dict[str, Any] = {"when": gate, "prompt": given} if gated else {}
        with vector_of(model, seed=seed).apply(model, this_thread_only=True, **how):
            if alone:
                return generate(model, given)
            both_open.wait()
            found[seed] = generate(model, given)
            both_open.wait()
        return None

    expected = {seed: one(seed, True) for seed in (3, 4)}
    threads = [threading.Thread(target=one, args=(seed, False)) for seed in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (3, 4):
        assert all(torch.equal(a, b) for a, b in zip(found[seed].logits, expected[seed].logits, strict=True))
    assert not torch.equal(expected[3].logits[0], expected[4].logits[0])
    assert not torch.equal(expected[3].logits[0], generate(model, given).logits[0])


def test_other_threads_are_not_steered_and_not_looked_at(model: Any) -> None:
    given, kept = prompts(), []
    before = generate(model, given)
    with vector_of(model).apply(model, this_thread_only=True, tokens=Tokens.response):
        thread = threading.Thread(target=lambda: kept.append(generate(model, given, use_cache=False)))
        thread.start()
        thread.join()
    assert len(kept) == 1, "a pass that a tracker would refuse runs in another thread"
    assert torch.equal(kept[0].sequences, before.sequences)
    with vector_of(model).apply(model, tokens=Tokens.response, prompt=given):
        thread = threading.Thread(target=lambda: kept.append(generate(model, given)))
        thread.start()
        thread.join()
    assert not torch.equal(kept[1].logits[0], before.logits[0])
