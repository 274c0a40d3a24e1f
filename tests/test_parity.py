"""Steering and training against the same computations written plainly (`plain`): families × layer types × padding × dtype.

The plain side: one text at a time, no padding, no cache, hooks of its own, logits at every step.
"""

from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    record_activations,
    train_steering_vector,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer

KINDS = ["llama", "gpt2", "gemma2", "opt", "mistral", "gemma3", "qwen2", "qwen3", "phi3", "gpt_neox", "falcon"]
PLACES = [(kind, layer_type) for kind in KINDS for layer_type in plain.MODULES[kind]]
CLOSE = 1e-5  # float32, relative to the largest logit
SEEN = 1e-2  # by how much steering must have changed the logits
TEXTS = ["Hi", "Who are you?", "Tell me"]
S, NEW = 6, 4

models: dict[tuple[str, torch.dtype], Any] = {}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    if (kind, dtype) not in models:
        models[kind, dtype] = tiny_model(kind, dtype=dtype)
    return models[kind, dtype]


def directions(model: Any, layers: tuple[int, ...] = (0, 2)) -> dict[int, Tensor]:
    g = torch.Generator().manual_seed(7)
    return {n: 2 * torch.randn(model.config.hidden_size, generator=g) for n in layers}


def batch(side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    "Three texts, padded on one side, and each on its own. Position ids count each row's own tokens."
    g = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 90, (n,), generator=g) for n in (4, S, 5)]
    ids, mask = torch.zeros(3, S, dtype=torch.long), torch.zeros(3, S, dtype=torch.long)
    for r, row in enumerate(rows):
        at = slice(S - len(row), S) if side == "left" else slice(0, len(row))
        ids[r, at], mask[r, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, rows


def modules(kind: str, layer_type: str, vectors: dict[int, Tensor]) -> dict[str, Tensor]:
    return {plain.MODULES[kind][layer_type].format(n): v for n, v in vectors.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind,layer_type", PLACES)
def test_logits_of_a_padded_batch(kind: str, layer_type: Any, side: str) -> None:
    model, (given, rows) = model_of(kind), batch(side)
    vectors = directions(model)
    with torch.no_grad(), SteeringVector(vectors, layer_type).apply(model):
        steered = model(**given).logits
    for r, row in enumerate(rows):
        expected = plain.logits(model, row, modules(kind, layer_type, vectors), range(len(row)))
        unsteered = plain.logits(model, row, {}, [])
        assert plain.far(steered[r][given["attention_mask"][r].bool()], expected) < CLOSE
        assert plain.far(expected, unsteered) > SEEN


@pytest.mark.parametrize("kind,layer_type", PLACES)
def test_logits_of_every_step(kind: str, layer_type: Any) -> None:
    "Left-padded generation with a cache, steered from column 2 on."
    model, (given, rows) = model_of(kind), batch("left")
    given.pop("position_ids")
    vectors = directions(model)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with SteeringVector(vectors, layer_type).apply(model, min_token_index=2):
        out = model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    for r, row in enumerate(rows):
        named, pads = modules(kind, layer_type, vectors), S - len(row)
        expected = plain.logits_of_steps(model, out.sequences[r], S, pads, named, lambda c, own: c >= 2)
        unsteered = plain.logits_of_steps(model, out.sequences[r], S, pads, {}, lambda c, own: False)
        assert plain.far(torch.stack([step[r] for step in out.logits]), expected) < CLOSE
        assert plain.far(expected, unsteered) > SEEN


def test_a_family_without_a_layer_type_says_so() -> None:
    "What `plain.MODULES` leaves out is an error, not another module."
    left_out = [(kind, t) for kind in KINDS for t in plain.LLAMA if t not in plain.MODULES[kind]]
    assert left_out == [("falcon", "post_attention_layernorm")]
    for kind, layer_type in left_out:
        with pytest.raises(ValueError, match="post_attention_layernorm"):
            SteeringVector(directions(model_of(kind)), layer_type).apply(model_of(kind))


OPERATORS: list[tuple[Any, plain.Change]] = [
    (addition_operator(), plain.add),
    (ablation_operator(), plain.ablate),
    (ablation_operator(fraction=0.5), lambda h, v: (h + plain.ablate(h, v)) / 2),
    (ablation_then_addition_operator(), plain.ablate_then_add),
    (lambda h, v: h * v, lambda h, v: h + h * v),
]


@pytest.mark.parametrize(
    "operator,change", OPERATORS, ids=["add", "ablate", "ablate half", "ablate then add", "custom"]
)
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_operators_with_a_multiplier_a_row(kind: str, operator: Any, change: plain.Change) -> None:
    model, (given, rows) = model_of(kind), batch("left")
    vectors, multipliers = directions(model), [1.5, 0.0, -0.5]
    for layer_type in ("decoder_block", "mlp"):
        with (
            torch.no_grad(),
            SteeringVector(vectors, layer_type).apply(model, operator=operator, multiplier=multipliers),
        ):
            steered = model(**given).logits
        moved = []
        for r, (row, m) in enumerate(zip(rows, multipliers, strict=True)):
            named = {name: m * v for name, v in modules(kind, layer_type, vectors).items()} if m else {}
            expected = plain.logits(model, row, named, range(len(row)), change)
            assert plain.far(steered[r][given["attention_mask"][r].bool()], expected) < CLOSE
            moved.append(plain.far(expected, plain.logits(model, row, {}, [])))
        assert moved[0] > SEEN and moved[1] == 0 and moved[2] > SEEN / 4


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_further_from_float32_than_the_plain_computation(kind: str) -> None:
    low, high = model_of(kind, torch.bfloat16), model_of(kind)
    high = tiny_model(kind)
    high.load_state_dict({name: t.float() for name, t in low.state_dict().items()})  # the same weights, exactly
    vectors = {n: v.bfloat16().float() for n, v in directions(high).items()}
    ours, plainly = [], []
    for layer_type in ("decoder_block", "mlp"):
        named = modules(kind, layer_type, vectors)
        for row in batch("left")[1]:
            exact = plain.logits(high, row, named, range(len(row)))
            with torch.no_grad(), SteeringVector(vectors, layer_type).apply(low):
                ours.append(error(low(row[None]).logits[0], exact))
            plainly.append(
                error(plain.logits(low, row, {k: v.bfloat16() for k, v in named.items()}, range(len(row))), exact)
            )
    assert sum(ours) <= 1.0001 * sum(plainly)
    assert sum(ours) > 0, "bfloat16 is rounded, and the comparison sees it"


@pytest.mark.parametrize("operator,change", OPERATORS[1:4], ids=["ablate", "ablate half", "ablate then add"])
def test_a_projection_in_bfloat16_removes_what_it_says(operator: Any, change: Callable[..., Tensor]) -> None:
    low = model_of("llama", torch.bfloat16)
    v, (given, _) = directions(low, (1,)), batch("left")
    seen: list[Tensor] = []
    hook = low.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o.detach()))
    with torch.no_grad():
        low(**given)
        with SteeringVector(v).apply(low, operator=operator):
            low(**given)
    hook.remove()
    # the user's own hook ran after ours in the second pass, so it saw the edited state
    before, after = seen[0].float() @ v[1] / (v[1] @ v[1]), seen[1].float() @ v[1] / (v[1] @ v[1])
    wanted = {"ablation_operator()": 0 * before, "ablation_operator(fraction=0.5)": before / 2}.get(
        repr(operator), torch.ones_like(before)
    )
    scale = before.abs().max()
    assert (before - wanted).abs().max() > 0.1 * scale
    assert (after - wanted).abs().max() < 0.02 * scale.clamp(min=1)


@pytest.mark.parametrize("kind,layer_type", PLACES)
def test_recordings(kind: str, layer_type: Any) -> None:
    "What a module returned, at every token, also where the block adds to it in place afterwards."
    model, row = model_of(kind), batch("left")[1][1]
    with torch.no_grad(), record_activations(model, layer_type) as recorded:
        model(row[None])
    for n in range(3):
        name = plain.MODULES[kind][layer_type].format(n)
        expected = torch.stack([plain.activation(model, row, name, read) for read in range(S)])
        assert plain.far(recorded[n][0].reshape(S, -1), expected) < CLOSE


# --- training --------------------------------------------------------------------------------------------------------

PAIRS = [
    ("I am so glad", "I am sad"),
    ("What a day!", "What a long and dreadful day"),
    ("Yes", "No, never"),
    ("Hooray", "Oh no"),
    ("a", "b"),
]


def expected_vector(model: Any, kind: str, layer_type: str, n: int, read: int = -1) -> Tensor:
    tokenizer = tiny_tokenizer()
    name = plain.MODULES[kind][layer_type].format(n)

    def mean(which: int) -> Tensor:
        acts = [
            plain.activation(model, torch.tensor(tokenizer(pair[which])["input_ids"]), name, read).float()
            for pair in PAIRS
        ]
        return torch.stack(acts).mean(0)

    return mean(0) - mean(1)


@pytest.mark.parametrize("kind,layer_type", PLACES)
def test_training_equals_one_text_at_a_time(kind: str, layer_type: Any) -> None:
    model = model_of(kind)
    expected = {n: expected_vector(model, kind, layer_type, n) for n in range(3)}
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        for batch_size in (1, 2, None):
            vector = train_steering_vector(model, tokenizer, PAIRS, layer_type=layer_type, batch_size=batch_size)
            assert list(vector.layer_activations) == [0, 1, 2]
            for n, v in expected.items():
                assert plain.far(vector.layer_activations[n], v) < CLOSE, (side, batch_size, n)
                assert v.norm() > SEEN
        assert tokenizer.padding_side == side
    assert plain.hooks_on(model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_where_it_is_told(kind: str) -> None:
    model = model_of(kind)
    vector = train_steering_vector(model, tiny_tokenizer(), PAIRS, layers=[-2], read_token_index=1)
    assert list(vector.layer_activations) == [1]
    expected = expected_vector(model, kind, "decoder_block", 1, read=1)
    assert plain.far(vector.layer_activations[1], expected) < CLOSE
    assert plain.far(expected, expected_vector(model, kind, "decoder_block", 1)) > SEEN


def test_training_in_bfloat16_is_no_further_from_float32() -> None:
    "Over all families; a single one is a matter of luck, for a difference of means cancels most digits."
    ours: dict[str, float] = {}
    plainly: dict[str, float] = {}
    for kind in KINDS:
        low, high = model_of(kind, torch.bfloat16), tiny_model(kind)
        high.load_state_dict({name: t.float() for name, t in low.state_dict().items()})
        vector = train_steering_vector(low, tiny_tokenizer(), PAIRS)
        exact = {n: expected_vector(high, kind, "decoder_block", n) for n in range(3)}
        ours[kind] = sum(error(vector.layer_activations[n], v) for n, v in exact.items())
        plainly[kind] = sum(error(expected_vector(low, kind, "decoder_block", n), v) for n, v in exact.items())
    assert min(plainly.values()) > 0
    assert sum(ours.values()) <= 1.05 * sum(plainly.values()), (ours, plainly)
    assert all(ours[kind] <= 1.5 * plainly[kind] for kind in KINDS), (ours, plainly)


def test_the_comparisons_can_fail() -> None:
    "A vector that is a thousandth off, or one token too few, is seen."
    model, (given, rows) = model_of("llama"), batch("left")
    vectors = directions(model)
    with torch.no_grad(), SteeringVector(vectors).apply(model):
        steered = model(**given).logits[0][given["attention_mask"][0].bool()]
    off = {name: 1.001 * v for name, v in modules("llama", "decoder_block", vectors).items()}
    assert plain.far(steered, plain.logits(model, rows[0], off, range(4))) > CLOSE
    assert (
        plain.far(steered, plain.logits(model, rows[0], modules("llama", "decoder_block", vectors), range(1, 4)))
        > CLOSE
    )
