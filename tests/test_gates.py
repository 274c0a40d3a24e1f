"""Gates: each row is steered in its whole response, or not at all, and every way of generating decides the same.

What a gate should decide is worked out here from hooks of PyTorch, one row at a time, without padding or cache. Steered rows must be
those of an ungated steering bit for bit, the others those of an unsteered model.
"""

import copy
import pickle
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
from padded import S, padded_prompts, random_vector
from torch import Tensor
from versions import fault, skip_if

from steering_vectors import (
    SteeringVector,
    Tokens,
    ablation_operator,
    addition_operator,
    bake,
    explore,
    prompt_ids,
    train_gate,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.steer.gates import Condition, Gate
from steering_vectors.steer.steering import Steering
from steering_vectors.train.discriminants import discriminant
from steering_vectors.vectors.gguf import write_gguf

NEW, ROWS = 4, 4  # tokens generated, rows
PADS = (2, 0, 1, 0)
EXACT, SEEN = 2e-6, 1e-3
READ = 0  # the layer that gates read


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_layers=3).double()


def prompts() -> dict[str, Tensor]:
    return padded_prompts(PADS)


def vector_of(model: Any, layers: Sequence[int] = (1, 2), seed: int = 3) -> SteeringVector:
    return random_vector(model, layers, seed)


def states_of(model: Any, ids: Tensor, layer: int = READ, kind: str = "llama") -> Tensor:
    "What a layer returns for one text without padding, (s, d)."
    kept = []
    module = model.get_submodule(plain.MODULES[kind]["decoder_block"].format(layer))
    hook = module.register_forward_hook(
        lambda m, a, out: kept.append((out if isinstance(out, Tensor) else out[0])[0].detach().clone())
    )
    with torch.no_grad():
        model(ids[None])
    hook.remove()
    return kept[0]


def means_of(model: Any, given: dict[str, Tensor], layer: int = READ, kind: str = "llama") -> Tensor:
    rows = zip(given["input_ids"], given["attention_mask"].bool(), strict=True)
    return torch.stack([states_of(model, ids[mask], layer, kind).mean(0) for ids, mask in rows])


def gate_of(model: Any, seed: int = 7, layer: int = READ, kind: str = "llama", given: Any = None) -> Gate:
    "A gate that opens for two of the four rows."
    direction = torch.randn(
        model.config.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    scores = (means_of(model, given or prompts(), layer, kind).double() @ direction).sort().values
    return Gate(direction, layer, float(scores[1:3].mean()))


def wanted(model: Any, gate: Gate, given: dict[str, Tensor], kind: str = "llama") -> list[bool]:
    return (means_of(model, given, gate.layer, kind).double() @ gate.direction > gate.threshold).tolist()


def generate(model: Any, given: dict[str, Tensor], **how: Any) -> Any:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | how
    return model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)


def check_rows(
    model: Any, out: Any, given: dict[str, Tensor], opened: Sequence[bool], copies: int = 1, kind: str = "llama",
    vectors: SteeringVector | None = None, exact: float = EXACT, steps_of: Any = None,
) -> None:  # fmt: skip
    "Every step's logits against the plain loop: open rows steered in their response, closed rows not at all."
    block, moved = plain.MODULES[kind]["decoder_block"], []
    by_name = {block.format(n): v for n, v in (vectors or vector_of(model)).layer_activations.items()}
    for r, sequence in enumerate(out.sequences):
        row = r // copies
        pads, n = int((given["attention_mask"][row] == 0).sum()), given["input_ids"].shape[1]
        steps = steps_of(r) if steps_of else torch.stack([s[r] for s in out.logits])

        def late(c: int, own: int, n: int = n, pads: int = pads) -> bool:
            return own >= n - pads - 1

        steered = plain.logits_of_steps(model, sequence, n, pads, by_name, late)
        unsteered = plain.logits_of_steps(model, sequence, n, pads, {}, late)
        assert plain.far(steps, steered if opened[row] else unsteered) < exact, f"row {r}"
        moved.append(plain.far(steered, unsteered))
    assert min(moved) > SEEN, "steering changes nothing, so open and closed rows look alike"
    assert 0 < sum(opened) < len(opened), "all rows alike"


WAYS: dict[str, dict[str, Any]] = {
    "a cache": {},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "sampled, several returned": {"do_sample": True, "num_return_sequences": 2, "temperature": 3.0},
}


@pytest.mark.parametrize("told", [True, False], ids=["prompt=", "first pass"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_decides_the_same(model: Any, way: str, told: bool) -> None:
    given, how, gate = prompts(), WAYS[way], gate_of(model)
    if way == "chunks":
        skip_if(fault(lambda: generate(model, given, **how), "a prompt in chunks"))
    if way in ("chunks", "no cache") and not told:  # from inside it cannot be known where the prompt ends
        with pytest.raises(ValueError, match="prompt="), vector_of(model).apply(model, when=gate):
            generate(model, given, **how)
        return
    torch.manual_seed(0)
    handle = vector_of(model).apply(model, when=gate, prompt=given if told else None)
    with handle:
        out = generate(model, given, **how)
    copies = how.get("num_return_sequences", 1)
    opened = wanted(model, gate, given)
    check_rows(model, out, given, opened, copies)
    assert handle.decisions.open.tolist() == [o for o in opened for _ in range(copies)]


@pytest.mark.parametrize("told", [True, False], ids=["prompt=", "first pass"])
def test_beams(model: Any, told: bool) -> None:
    "Beams change places only within a prompt, whose verdict they share."
    given, gate, beams = prompts(), gate_of(model), 3
    with vector_of(model).apply(model, when=gate, prompt=given if told else None):
        out = generate(model, given, num_beams=beams, num_return_sequences=2)

    def steps_of(r: int) -> Tensor:
        return torch.stack([out.logits[t][out.beam_indices[r, t]] for t in range(NEW)])

    check_rows(model, out, given, wanted(model, gate, given), 2, steps_of=steps_of)


def test_beams_without_a_cache_need_the_prompt(model: Any) -> None:
    given, gate = prompts(), gate_of(model)
    with vector_of(model).apply(model, when=gate), pytest.raises(ValueError, match="prompt="):
        generate(model, given, num_beams=2, use_cache=False)
    with vector_of(model).apply(model, when=gate, prompt=given):
        fresh = generate(model, given, num_beams=2, use_cache=False)
    with vector_of(model).apply(model, when=gate, prompt=given):
        cached = generate(model, given, num_beams=2)
    assert torch.equal(fresh.sequences, cached.sequences)
    assert not torch.equal(fresh.sequences, generate(model, given, num_beams=2).sequences)


@pytest.mark.parametrize("operator", [addition_operator(), ablation_operator()], ids=["addition", "ablation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_bit_equal_to_steered_and_unsteered_ones(operator: Any, dtype: torch.dtype) -> None:
    model, given = tiny_model("llama", num_layers=3, dtype=dtype), prompts()
    gate, v = gate_of(model), vector_of(model)
    handle = v.apply(model, operator=operator, when=gate, prompt=given)
    with handle:
        gated = generate(model, given)
    with v.apply(model, operator=operator, tokens=Tokens.response, prompt=given):
        steered = generate(model, given)
    plainly = generate(model, given)
    for r, is_open in enumerate(handle.decisions.open.tolist()):
        same, other = (steered, plainly) if is_open else (plainly, steered)
        assert torch.equal(gated.sequences[r], same.sequences[r])
        assert all(torch.equal(a[r], b[r]) for a, b in zip(gated.logits, same.logits, strict=True))
        assert not torch.equal(gated.logits[0][r], other.logits[0][r])
    assert 0 < int(handle.decisions.open.sum()) < ROWS


def test_algebra(model: Any) -> None:
    given, one, two = prompts(), gate_of(model, 7), gate_of(model, 12, layer=1)
    a, b = torch.tensor(wanted(model, one, given)), torch.tensor(wanted(model, two, given))
    assert not torch.equal(a, b)
    cases: list[tuple[Condition, Tensor]] = [
        (~one, ~a), (one & two, a & b), (one | two, a | b), (one & ~two, a & ~b), (~(one | two) | (two & one), ~(a | b) | (a & b)),
    ]  # fmt: skip
    for condition, opened in cases:
        handle = vector_of(model).apply(model, when=condition, prompt=given)
        with handle:
            out = generate(model, given)
        assert handle.decisions.open.tolist() == opened.tolist(), condition
        if 0 < int(opened.sum()) < ROWS:
            check_rows(model, out, given, opened.tolist())


def test_a_gate_on_the_steered_layer_reads_what_is_not_steered(model: Any) -> None:
    given, gate, v = prompts(), gate_of(model, layer=1), vector_of(model)
    with v.apply(model, when=gate, prompt=given):
        out = generate(model, given)
    check_rows(model, out, given, wanted(model, gate, given))


def test_right_padding_in_one_pass(model: Any) -> None:
    "Rows end at columns of their own; each is decided by its own tokens."
    left = prompts()
    given = {k: torch.stack([t.roll(-PADS[r]) for r, t in enumerate(v)]) for k, v in left.items()}
    gate, v = gate_of(model), vector_of(model)
    handle = v.apply(model, when=gate, prompt=given)
    with torch.no_grad():
        with handle:
            gated = model(**given).logits
        plainly = model(**given).logits
        with v.apply(model, tokens=Tokens.response, prompt=given):
            steered = model(**given).logits
    opened = wanted(model, gate, left)
    assert handle.decisions.open.tolist() == opened
    for r, is_open in enumerate(opened):
        assert torch.equal(gated[r], (steered if is_open else plainly)[r])
        assert not torch.equal(steered[r], plainly[r])


def test_right_padding_in_two_passes(model: Any) -> None:
    "A short row answers in a pass in which a long one is still read."
    left = prompts()
    given = {k: torch.stack([t.roll(-PADS[r]) for r, t in enumerate(v)]) for k, v in left.items()}
    gate, v = gate_of(model), vector_of(model)
    logits, cache = [], None
    with torch.no_grad(), v.apply(model, when=gate, prompt=given):
        for start, end in [(0, 4), (4, S)]:
            inputs = {"input_ids": given["input_ids"][:, start:end], "attention_mask": given["attention_mask"][:, :end]}
            out = model(**inputs, past_key_values=cache, use_cache=True)
            cache, _ = out.past_key_values, logits.append(out.logits)
    with torch.no_grad(), v.apply(model, when=gate, prompt=given):
        at_once = model(**given).logits
    with torch.no_grad():
        unsteered = model(**given).logits
    mask = given["attention_mask"].bool()
    assert plain.far(torch.cat(logits, 1)[mask], at_once[mask]) < EXACT
    for r, is_open in enumerate(wanted(model, gate, left)):
        assert (plain.far(at_once[r, mask[r]], unsteered[r, mask[r]]) > SEEN) == is_open


def test_several_batches_in_one_context(model: Any) -> None:
    first = prompts()
    second = {k: t.flip(0) for k, t in first.items()}
    gate = gate_of(model)
    handle = vector_of(model).apply(model, when=gate)
    with handle:
        outs = [(given, generate(model, given), handle.decisions) for given in (first, second, first)]
    for given, out, decisions in outs:
        check_rows(model, out, given, wanted(model, gate, given))
        assert decisions.open.tolist() == wanted(model, gate, given)


def second_turn(model: Any) -> tuple[Any, dict[str, Tensor]]:
    first = generate(model, prompts())
    said = torch.randint(3, 90, (ROWS, 3), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, said], 1)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(ROWS, ids.shape[1] - S, dtype=torch.long)], 1)
    return first.past_key_values, {"input_ids": ids, "attention_mask": mask}


def test_a_second_turn_read_as_a_whole(model: Any) -> None:
    _, given = second_turn(model)
    gate = gate_of(model, given=given)
    with vector_of(model).apply(model, when=gate, prompt=given):
        out = generate(model, given)
    check_rows(model, out, given, wanted(model, gate, given))


def test_a_second_turn_from_a_kept_cache_is_refused(model: Any) -> None:
    "The gate has not seen the beginning; to decide by the rest would be another decision than without the cache."
    cache, given = second_turn(model)
    with (
        pytest.raises(ValueError, match="in a cache from before"),
        vector_of(model).apply(model, when=gate_of(model, given=given), prompt=given),
    ):
        generate(model, given, past_key_values=cache)


def test_a_second_turn_in_an_open_context(model: Any) -> None:
    "Without `prompt=`, the first prompt's decision must not go on silently; read anew, each turn has its own decision."
    given, gate = prompts(), gate_of(model)
    said = torch.randint(3, 90, (ROWS, 12), generator=torch.Generator().manual_seed(2))
    handle = vector_of(model).apply(model, when=gate)
    with handle:
        first = generate(model, given)
        ids = torch.cat([first.sequences, said], 1)
        mask = torch.cat([given["attention_mask"], torch.ones(ROWS, ids.shape[1] - S, dtype=torch.long)], 1)
        second = {"input_ids": ids, "attention_mask": mask}
        with pytest.raises(ValueError, match="prompt="):
            generate(model, second, past_key_values=first.past_key_values)
        again = generate(model, second)
        decided = handle.decisions.open.tolist()
    opened = wanted(model, gate, second)
    assert decided == opened != wanted(model, gate, given)
    check_rows(model, first, given, wanted(model, gate, given))
    check_rows(model, again, second, opened)


def test_threads_that_share_a_handle_have_decisions_of_their_own(model: Any) -> None:
    first = prompts()
    batches = [first, {k: t.flip(0) for k, t in first.items()}]
    gate, both_ran = gate_of(model), threading.Barrier(2, timeout=60)
    handle, found = vector_of(model).apply(model, when=gate), {}

    def one(n: int) -> None:
        out = generate(model, batches[n])
        both_ran.wait()
        found[n] = out, handle.decisions
        both_ran.wait()

    with handle:
        threads = [threading.Thread(target=one, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        last = handle.decisions  # this thread ran nothing, as when a streamer generates in another one
    for n, (out, decisions) in found.items():
        opened = wanted(model, gate, batches[n])
        assert decisions.open.tolist() == opened
        check_rows_of(model, out, batches[n], opened)
    assert last.open.tolist() in [wanted(model, gate, batch) for batch in batches]
    assert wanted(model, gate, batches[0]) != wanted(model, gate, batches[1])


def check_rows_of(model: Any, out: Any, given: dict[str, Tensor], opened: Sequence[bool]) -> None:
    "Open rows differ from an unsteered run, closed ones do not."
    plainly = generate(model, given)
    for r, is_open in enumerate(opened):
        assert (plain.far(out.logits[0][r], plainly.logits[0][r]) > SEEN) == is_open


def test_all_rows_alike_cost_no_mask(model: Any) -> None:
    "Where all rows are open, or all closed, the result is bit for bit that of no gate, or of no steering."
    given, gate, v = prompts(), gate_of(model), vector_of(model)
    with v.apply(model, tokens=Tokens.response, prompt=given):
        steered = generate(model, given)
    plainly = generate(model, given)
    for condition, same, other in [(gate | ~gate, steered, plainly), (gate & ~gate, plainly, steered)]:
        for how in ({}, {"use_cache": False}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}):
            with v.apply(model, when=condition, prompt=given):
                out = generate(model, given, **how)
            copies = how.get("num_return_sequences", 1)
            assert torch.equal(out.sequences, same.sequences.repeat_interleave(copies, 0))
            if not how:
                assert all(torch.equal(a, b) for a, b in zip(out.logits, same.logits, strict=True))
            assert not torch.equal(out.logits[0][::copies], other.logits[0])


def test_a_cache_that_is_gone_on_with_twice(model: Any) -> None:
    "A pass that is cut back to the middle of the prompt and read on is decided by what the cache holds now."
    given, gate, v = prompts(), gate_of(model), vector_of(model)
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad(), v.apply(model, when=gate, prompt=given):
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:5], attention_mask=mask[:, :5], past_key_values=cache)
        cache.crop(-2)
        again = model(ids[:, 3:], attention_mask=mask, past_key_values=cache).logits[:, -1]
        at_once = model(ids, attention_mask=mask).logits[:, -1]
    with torch.no_grad():
        unsteered = model(ids, attention_mask=mask).logits[:, -1]
    assert plain.far(again, at_once) < EXACT
    moved = [plain.far(a, b) > SEEN for a, b in zip(at_once, unsteered, strict=True)]
    assert moved == wanted(model, gate, given)


def test_rows_of_a_cache_are_repeated(model: Any) -> None:
    given, gate, v = prompts(), gate_of(model), vector_of(model)
    ids, mask = given["input_ids"], given["attention_mask"]
    more = torch.arange(10, 10 + 2 * ROWS)[:, None]
    longer = torch.cat([mask, torch.ones(ROWS, 1, dtype=torch.long)], 1).repeat_interleave(2, 0)
    with torch.no_grad(), v.apply(model, when=gate, prompt=given):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cached = model(more, attention_mask=longer, past_key_values=cache).logits[:, -1]
    whole = torch.cat([ids.repeat_interleave(2, 0), more], 1)
    with torch.no_grad(), v.apply(model, when=gate, prompt=given):
        fresh = model(whole, attention_mask=longer).logits[:, -1]
    with torch.no_grad():
        unsteered = model(whole, attention_mask=longer).logits[:, -1]
    assert plain.far(cached, fresh) < EXACT
    moved = [plain.far(a, b) > SEEN for a, b in zip(fresh, unsteered, strict=True)]
    assert moved == [on for on in wanted(model, gate, given) for _ in range(2)]


def test_fewer_rows_than_were_read_are_refused(model: Any) -> None:
    given, v = prompts(), vector_of(model)
    with torch.no_grad(), v.apply(model, when=gate_of(model)), pytest.raises(ValueError, match="goes on with 3"):
        cache = model(**given, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1, 2]))
        mask = torch.cat([given["attention_mask"], torch.ones(ROWS, 1, dtype=torch.long)], 1)[:3]
        model(torch.full((3, 1), 9), attention_mask=mask, past_key_values=cache)


def check_tokens(
    model: Any, gate: Gate, out: Any, columns: int, pads: Sequence[int], copies: int = 1, vectors: Any = None
) -> None:
    "Every step's logits against the plain loop, in which each token is decided by what it is alone."
    vectors, seen, moved = (
        vectors or {f"model.layers.{n}": v for n, v in vector_of(model).layer_activations.items()},
        set(),
        [],
    )
    for r, sequence in enumerate(out.sequences):
        own_scores = states_of(model, sequence[pads[r // copies] :]) @ gate.direction > gate.threshold
        seen |= set(own_scores.tolist())

        def want(c: int, own: int, opened: Tensor = own_scores) -> bool:
            return bool(opened[own])

        expected = plain.logits_of_steps(model, sequence, columns, pads[r // copies], vectors, want)
        unsteered = plain.logits_of_steps(model, sequence, columns, pads[r // copies], {}, want)
        assert plain.far(torch.stack([s[r] for s in out.logits]), expected) < EXACT
        moved.append(plain.far(expected, unsteered))
    assert seen == {True, False} and min(moved) > SEEN


@pytest.mark.parametrize("way", WAYS)
def test_token_by_token(model: Any, way: str) -> None:
    given, how = prompts(), WAYS[way]
    if way == "chunks":
        skip_if(fault(lambda: generate(model, given, **how), "a prompt in chunks"))
    gate = gate_of(model).per_token()
    torch.manual_seed(0)
    with vector_of(model).apply(model, when=gate):
        out = generate(model, given, **how)
    check_tokens(model, gate, out, S, PADS, how.get("num_return_sequences", 1))


@pytest.mark.parametrize("kept", [True, False], ids=["the cache is kept", "read again"])
def test_token_by_token_in_two_turns(model: Any, kept: bool) -> None:
    "Each token is decided by itself, so a kept cache hides nothing."
    given, gate = prompts(), gate_of(model).per_token()
    said = torch.randint(3, 90, (ROWS, 3), generator=torch.Generator().manual_seed(2))
    with vector_of(model).apply(model, when=gate):
        first = generate(model, given)
        ids = torch.cat([first.sequences, said], 1)
        mask = torch.cat([given["attention_mask"], torch.ones(ROWS, ids.shape[1] - S, dtype=torch.long)], 1)
        cache = {"past_key_values": first.past_key_values} if kept else {}
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, **cache)
    check_tokens(model, gate, second, ids.shape[1], PADS)


def test_token_by_token_with_beams(model: Any) -> None:
    "Each token is decided by itself, so rows of the cache may change places."
    given, gate = prompts(), gate_of(model).per_token()
    vectors = {f"model.layers.{n}": v for n, v in vector_of(model).layer_activations.items()}
    with vector_of(model).apply(model, when=gate):
        out = generate(model, given, num_beams=3, num_return_sequences=2)
    assert len({tuple(rows) for rows in (out.beam_indices % 3).tolist()}) > 1, "no beam has changed its place"
    for r, sequence in enumerate(out.sequences):
        opened = states_of(model, sequence[PADS[r // 2] :]) @ gate.direction > gate.threshold

        def want(c: int, own: int, opened: Tensor = opened) -> bool:
            return bool(opened[own])

        expected = plain.logits_of_steps(model, sequence, S, PADS[r // 2], vectors, want)
        steps = torch.stack([out.logits[t][out.beam_indices[r, t]] for t in range(NEW)])
        assert plain.far(steps, expected) < EXACT
        assert plain.far(expected, plain.logits_of_steps(model, sequence, S, PADS[r // 2], {}, want)) > SEEN


def test_both_kinds_together_and_with_tokens(model: Any) -> None:
    given, gate = prompts(), gate_of(model)
    each = gate_of(model, 11).per_token()
    vectors = {f"model.layers.{n}": v for n, v in vector_of(model).layer_activations.items()}
    with vector_of(model).apply(model, when=gate & each, tokens=Tokens.generated[:2], prompt=given):
        out = generate(model, given)
    opened, moved = wanted(model, gate, given), []
    for r, sequence in enumerate(out.sequences):
        tokens = states_of(model, sequence[PADS[r] :]) @ each.direction > each.threshold

        def want(c: int, own: int, r: int = r, tokens: Tensor = tokens) -> bool:
            return opened[r] and S - PADS[r] <= own < S - PADS[r] + 2 and bool(tokens[own])

        expected = plain.logits_of_steps(model, sequence, S, PADS[r], vectors, want)
        assert plain.far(torch.stack([s[r] for s in out.logits]), expected) < EXACT
        moved.append(plain.far(expected, plain.logits_of_steps(model, sequence, S, PADS[r], {}, want)) > SEEN)
    assert any(moved) and not any(m for m, on in zip(moved, opened, strict=True) if not on)


def test_a_multiplier_per_row_goes_on_top(model: Any) -> None:
    given, gate, v = prompts(), gate_of(model), vector_of(model)
    row = wanted(model, gate, given).index(True)
    multipliers = [0.0 if r == row else 1.0 for r in range(ROWS)]
    with v.apply(model, when=gate, multiplier=multipliers, prompt=given):
        out = generate(model, given)
    plainly = generate(model, given)
    assert all(torch.equal(a[row], b[row]) for a, b in zip(out.logits, plainly.logits, strict=True))
    for r, is_open in enumerate(wanted(model, gate, given)):
        assert (plain.far(out.logits[0][r], plainly.logits[0][r]) > SEEN) == (is_open and r != row)


# Gemma 2's own eager attention turns padding into NaN in float64, steered or not; so it is compared in float32.
KINDS = {
    "mistral": torch.float64, "qwen2": torch.float64, "qwen3": torch.float64, "phi3": torch.float64, "gpt2": torch.float64,
    "gpt_neox": torch.float64, "opt": torch.float64, "falcon": torch.float64, "gemma2": torch.float32, "gemma3": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_families(kind: str) -> None:
    other, given = tiny_model(kind, num_layers=3).to(KINDS[kind]), prompts()
    gate = gate_of(other, kind=kind)
    for how in [{}, {"cache_implementation": "static"}, {"use_cache": False}]:
        with vector_of(other).apply(other, when=gate, prompt=given):
            out = generate(other, given, **how)
        exact = EXACT if KINDS[kind] == torch.float64 else 20 * EXACT
        check_rows(other, out, given, wanted(other, gate, given, kind), kind=kind, exact=exact)


def test_nothing_is_left_and_gradients_pass(model: Any) -> None:
    given, gate = prompts(), gate_of(model)
    before = plain.hooks_on(model)
    direction = torch.randn(32, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode(), Steering({1: direction.detach()}, when=gate).apply(model):
        model(**given)
    with Steering({1: direction}, when=gate).apply(model, given):
        model(**given).logits.sum().backward()
    assert direction.grad is not None and bool(direction.grad.any())
    assert plain.hooks_on(model) == before


def test_bad_input(model: Any) -> None:
    gate, v = gate_of(model), vector_of(model)
    with pytest.raises(TypeError, match="takes a gate"):
        v.apply(model, when=lambda prompt: True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be above"):
        v.apply(model, when=Gate(gate.direction, 2))
    with pytest.raises(ValueError, match="Layer 7|layer 7"):
        v.apply(model, when=Gate(gate.direction, 7))
    with pytest.raises(ValueError, match="per_token"):
        v.steering(tokens=Tokens.prompt, when=gate)
    with pytest.raises(ValueError, match="no gate"):
        _ = v.apply(model).decisions
    with pytest.raises(ValueError, match="Nothing has been decided"):
        _ = v.apply(model, when=gate).decisions
    with pytest.raises(ValueError, match="leave when= out"):
        v.steering(when=gate).to_json("v")
    with pytest.raises(ValueError, match="when="):
        bake(model, v.steering(when=gate))
    with pytest.raises(ValueError, match="when="):
        write_gguf("never.gguf", v.steering(when=gate), v.provenance, "llama")
    with pytest.raises(ValueError, match="Leave when= out, or compare texts with `sweep`"):
        explore(model, tiny_tokenizer(), v.steering(when=gate), "Hi")
    handle = v.apply(model, when=gate.per_token())
    with handle, torch.no_grad():
        model(**prompts())
    with pytest.raises(ValueError, match="nothing for a row"):
        _ = handle.decisions


def loud_and_quiet() -> tuple[list[str], list[str]]:
    words = [
        "come here",
        "look at that",
        "what a day",
        "where are you",
        "stop it now",
        "this is good",
        "give it back",
        "let me in",
    ]
    return [word.upper() for word in words], words


@pytest.mark.parametrize("as_chat", [False, True], ids=["words", "conversations"])
def test_a_trained_gate_tells_new_prompts_apart(as_chat: bool) -> None:
    model, tok = tiny_model("llama"), tiny_tokenizer()
    loud, quiet = loud_and_quiet()
    told: Any = [[[{"role": "user", "content": t}] for t in side] if as_chat else side for side in (loud, quiet)]
    gate = train_gate(model, tok, *told, layer=1, chat=as_chat)
    assert gate.judged["opens"] - gate.judged["opens_for_others"] > 0.6
    new: Any = ["GO AWAY", "go away", "WHO IS IT", "who is it there"]
    if as_chat:
        new = [
            tok.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
            for t in new
        ]
    batch = tok(new, return_tensors="pt", padding=True, add_special_tokens=not as_chat)
    v = SteeringVector({2: torch.ones(32)})
    with torch.no_grad(), v.apply(model, when=gate, prompt=batch) as handle:
        model(**batch)
    assert handle.decisions.open.tolist() == [True, False, True, False]


def test_words_are_prompts_as_everywhere_else() -> None:
    "Words go into the chat template where there is one, so the gate reads what the model will be asked."
    model, tok = tiny_model("llama"), tiny_tokenizer()
    loud, quiet = loud_and_quiet()
    chats = [[[{"role": "user", "content": t}] for t in side] for side in (loud, quiet)]
    ids = [[prompt_ids(tok, t)[0].tolist() for t in side] for side in (loud, quiet)]
    gates = [train_gate(model, tok, *both, layer=1) for both in ((loud, quiet), chats, ids)]
    for gate in gates[1:]:
        assert torch.equal(gate.direction, gates[0].direction) and gate.threshold == gates[0].threshold
    bare = train_gate(model, tok, loud, quiet, layer=1, chat=False)
    assert not torch.equal(bare.direction, gates[0].direction)


def test_training_and_deciding_read_the_same_mean() -> None:
    "The scores of a batch are those of the prompts one by one, where the shared beginning is left out."
    model, tok = tiny_model("llama").double(), tiny_tokenizer()
    gate = train_gate(model, tok, *loud_and_quiet(), layer=1, chat=False)
    batch = tok(["GO AWAY", "who is it there"], return_tensors="pt", padding=True)
    v = SteeringVector({2: torch.ones(32, dtype=torch.float64)})
    with torch.no_grad(), v.apply(model, when=gate, prompt=batch) as handle:
        model(**batch)
    assert repr(gate.tokens) == "Tokens.prompt[1:]"  # all begin with <s>
    for r, text in enumerate(["GO AWAY", "who is it there"]):
        own = states_of(model, tok(text, return_tensors="pt").input_ids[0], 1)[1:].mean(0)
        assert abs(float(own @ gate.direction) - float(handle.decisions.scores[r, 0])) < EXACT * float(
            gate.direction.norm()
        )


def test_kinds_that_do_not_differ_are_judged_so() -> None:
    model, tok = tiny_model("llama"), tiny_tokenizer()
    _, quiet = loud_and_quiet()
    gate = train_gate(model, tok, quiet[::2], quiet[1::2], layer=1, chat=False)
    assert gate.judged["opens"] - gate.judged["opens_for_others"] < 0.6


def test_a_prompt_without_the_gates_tokens_stays_closed(model: Any) -> None:
    given, gate = prompts(), gate_of(model)
    far = Gate(gate.direction, READ, -float("inf"), tokens=Tokens.prompt[5:])
    handle = vector_of(model).apply(model, when=far, prompt=given)
    with handle, torch.no_grad():
        model(**given)
    assert handle.decisions.open.tolist() == [False, True, False, True]  # rows 0 and 2 have fewer than six tokens


def test_a_judgement_is_of_one_gate() -> None:
    "Where what was judged is changed, the judgement is gone; where it is not, it stays."
    model, tok = tiny_model("llama"), tiny_tokenizer()
    gate = train_gate(model, tok, *loud_and_quiet(), layer=1, chat=False)
    assert "opens for" in repr(gate) and gate.judged["of"] == 8
    changed: list[dict[str, Any]] = [
        {"threshold": gate.threshold + 1}, {"tokens": Tokens.prompt[-3:]}, {"layer": 0}, {"every_token": True},
        {"direction": -gate.direction}, {"layer_type": "mlp"},
    ]  # fmt: skip
    for how in changed:
        other = replace(gate, **how)
        assert other.judged == {} and "opens for" not in repr(other)
        back = replace(other, **{name: getattr(gate, name) for name in how})
        assert back.judged == {}, "it is gone, not hidden"
    assert gate.per_token().judged == {}
    same = [replace(gate), replace(gate, threshold=gate.threshold), replace(gate, direction=gate.direction.clone())]
    for other in [*same, copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))]:
        assert other.judged == gate.judged and repr(other) == repr(gate)
    mine = replace(gate, threshold=0.0, judged={"opens": 1.0, "of": 3, "opens_for_others": 0.0, "others": 3})
    assert "opens for 100% of 3" in repr(mine) and replace(mine, threshold=1.0).judged == {}


def test_a_gate_trained_on_a_part_of_the_prompt() -> None:
    "It is learned from the same tokens that it reads, found here by hand."
    model, tok = tiny_model("llama").double(), tiny_tokenizer()
    sides = loud_and_quiet()
    gate = train_gate(model, tok, *sides, layer=1, chat=False, tokens=Tokens.prompt[-3:])
    assert gate.tokens == Tokens.prompt[-3:] and gate.judged["of"] == 8
    means = [
        torch.stack([states_of(model, tok(t, return_tensors="pt").input_ids[0], 1)[-3:].mean(0) for t in side])
        for side in sides
    ]
    made = discriminant(*means)
    assert plain.far(gate.direction, made.direction) < EXACT
    whole = train_gate(model, tok, *sides, layer=1, chat=False)
    assert plain.far(gate.direction, whole.direction) > SEEN
    batch = tok(["GO AWAY", "who is it there"], return_tensors="pt", padding=True)
    with torch.no_grad(), SteeringVector({2: torch.ones(32).double()}).apply(model, when=gate, prompt=batch) as handle:
        model(**batch)
    for r, text in enumerate(["GO AWAY", "who is it there"]):
        own = float(states_of(model, tok(text, return_tensors="pt").input_ids[0], 1)[-3:].mean(0) @ gate.direction)
        assert abs(own - float(handle.decisions.scores[r, 0])) < EXACT * float(gate.direction.norm())
        assert handle.decisions.open[r] == (own > gate.threshold)
    with pytest.raises(ValueError, match="none of the .* tokens of prompt 0"):
        train_gate(model, tok, *sides, layer=1, chat=False, tokens=Tokens.prompt[40:])
    with pytest.raises(ValueError, match="reads tokens of the prompt"):
        train_gate(model, tok, *sides, layer=1, chat=False, tokens=Tokens.generated)
