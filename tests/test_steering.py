"""Multipliers by row, several vectors at once, multiplier 0, gradients, dtypes: what a handle does to a model."""

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
)
from steering_vectors.demo import tiny_model
from steering_vectors.steer.tokens import Tokens

D = 32
OPERATORS = [
    None,
    addition_operator(),
    ablation_operator(),
    ablation_operator(0.5),
    ablation_then_addition_operator(),
    lambda h, v: h * v,
]
NAMES = ["none", "add", "ablate", "half", "ablate then add", "custom"]
SELECTIONS: list[dict[str, Any]] = [{}, {"min_token_index": 3}, {"token_indices": [1, 6]}, {"tokens": Tokens.response}]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(1))


def direction(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def generate(model: Any, ids: Tensor, **how: Any) -> Any:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0} | how
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), **options, return_dict_in_generate=True, output_logits=True
    )


# --- one multiplier a row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
@pytest.mark.parametrize("say", SELECTIONS, ids=str)
def test_rows_at_zero_are_bit_identical(dtype: torch.dtype, operator: Any, say: dict[str, Any], ids: Tensor) -> None:
    "Also with an infinity in the vector: what is not steered is not computed with."
    model = tiny_model("llama", dtype=dtype)
    v = direction(1, dtype)
    v[3] = torch.inf
    with torch.no_grad():
        before = model(ids).logits
        with SteeringVector({1: v}).apply(model, operator=operator, multiplier=[0, 1, 0], prompt=ids, **say):
            rows = model(ids).logits
        with SteeringVector({1: v}).apply(model, operator=operator, multiplier=0, prompt=ids, **say):
            zero = model(ids).logits
        with SteeringVector({1: v}).apply(model, operator=operator, multiplier=[0, 0, 0], prompt=ids, **say):
            zeros = model(ids).logits
    assert torch.equal(rows[0], before[0]) and torch.equal(rows[2], before[2])
    assert not torch.equal(rows[1], before[1]), "the row at 1 is steered"
    assert torch.equal(zero, before) and torch.equal(zeros, before)


@pytest.mark.parametrize("say", [{"multiplier": 0}, {"multiplier": [0, 0, 1]}, {"token_indices": [4]}], ids=str)
def test_minus_zero_stays(say: dict[str, Any], model: Any, ids: Tensor) -> None:
    "Adding 0 to -0.0 gives 0.0; a token that is not steered keeps its sign."
    layer, config = torch.nn.Identity(), {"mlp": "layers.{num}.mlp"}
    h = torch.full((3, 5, D), -0.0)
    assert torch.signbit(h).all() and not torch.signbit(h + 0 * direction(1)).all(), "the fault, seen"
    holder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": layer})])})
    holder.forward = lambda inputs_embeds: layer(inputs_embeds)  # type: ignore[method-assign]
    with SteeringVector({0: direction(1)}, "mlp").apply(holder, config, **say):
        out = holder(inputs_embeds=h)
    assert torch.signbit(out[:2, :4]).all()
    assert torch.equal(out[:2, :4], h[:2, :4]) and (say == {"multiplier": 0} or not torch.equal(out[2, 4], h[2, 4]))


@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
@pytest.mark.parametrize("say", SELECTIONS, ids=str)
@pytest.mark.parametrize("layer_type", ["decoder_block", "mlp"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_each_row_is_what_it_would_be_alone(
    kind: str, layer_type: Any, operator: Any, say: dict[str, Any], ids: Tensor
) -> None:
    model = tiny_model(kind)
    vector, ms = SteeringVector({0: direction(1), 2: direction(2)}, layer_type), [-1.0, 0.0, 2.0]
    with vector.apply(model, operator=operator, multiplier=ms, prompt=ids, **say):
        together = generate(model, ids)
    for r, m in enumerate(ms):
        with vector.apply(model, operator=operator, multiplier=m, prompt=ids[r : r + 1], **say):
            alone = generate(model, ids[r : r + 1])
        assert torch.equal(alone.sequences[0], together.sequences[r])
        assert all(plain.far(t[r], a[0]) < 1e-5 for t, a in zip(together.logits, alone.logits, strict=True))
    assert plain.far(together.logits[-1][0], generate(model, ids).logits[-1][0]) > 1e-3


@pytest.mark.parametrize("multiplier", [[-2, 3], torch.tensor([-2.0, 3.0]), (-2, 3)], ids=["list", "tensor", "tuple"])
def test_beams_and_returned_sequences_keep_their_rows_multiplier(model: Any, ids: Tensor, multiplier: Any) -> None:
    vector, two = SteeringVector({1: direction(1)}), ids[:2]
    for how in [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}]:
        torch.manual_seed(0)
        with vector.apply(model, multiplier=multiplier):
            out = generate(model, two, output_scores=True, **how)
        for r, sequence in enumerate(out.sequences):
            m = float(multiplier[r // 2])
            expected = plain.logits_of_steps(
                model, sequence, 5, 0, {"model.layers.1": m * direction(1)}, lambda c, own: True
            )
            at = out.beam_indices[r].tolist() if "num_beams" in how else [r] * 3
            assert plain.far(torch.stack([out.logits[t][at[t]] for t in range(3)]), expected) < 1e-5


def test_seven_strengths_in_one_batch(model: Any, ids: Tensor) -> None:
    "The same prompt seven times gives the tokens of seven runs."
    vector, ms = SteeringVector({1: direction(1)}), [-3, -2, -1, 0, 1, 2, 3]
    with vector.apply(model, multiplier=ms):
        together = generate(model, ids[:1].repeat(7, 1))
    for r, m in enumerate(ms):
        with vector.apply(model, multiplier=m):
            assert torch.equal(generate(model, ids[:1]).sequences[0], together.sequences[r])
    assert len(together.sequences.unique(dim=0)) > 3


def test_a_row_gets_the_same_number_as_a_number(ids: Tensor) -> None:
    "0.1 is not exact in float32; one multiplier for all and one a row must round alike, in every dtype."
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, vector = tiny_model("llama", dtype=dtype), SteeringVector({1: direction(1)})
        with torch.no_grad():
            with vector.apply(model, multiplier=0.1):
                number = model(ids).logits
            with vector.apply(model, multiplier=[0.1, 0.1, 0.1]):
                rows = model(ids).logits
            with vector.apply(model, multiplier=torch.tensor([0.1] * 3, dtype=torch.float64)):
                tensor = model(ids).logits
        assert torch.equal(number, rows) and torch.equal(number, tensor)


# --- several at once -------------------------------------------------------------------------------------------------


def test_several_vectors_compose_in_opening_order(model: Any, ids: Tensor) -> None:
    a, b = SteeringVector({1: direction(1)}), SteeringVector({1: direction(2)})
    unit = direction(1) / direction(1).norm()

    def along(*opened: Any) -> Tensor:
        from contextlib import ExitStack

        with torch.no_grad(), ExitStack() as stack, record_activations(model) as recorded:
            for handle in opened:
                stack.enter_context(handle)
            model(ids)
        return recorded[1][0] @ unit

    ablate, add_a, add_b = (
        (lambda: a.apply(model, operator=ablation_operator())),
        (lambda: a.apply(model)),
        (lambda: b.apply(model)),
    )
    base, norm = along(), direction(1).norm()
    assert torch.allclose(along(ablate(), add_a()), norm.expand(3, 5), atol=1e-4), "the addition survives"
    assert torch.allclose(along(add_a(), ablate()), torch.zeros(3, 5), atol=1e-4), "the ablation has the last word"
    assert torch.allclose(along(add_a(), add_b()), base + norm + direction(2) @ unit, atol=1e-4)
    assert torch.allclose(along(add_a(), add_a()), base + 2 * norm, atol=1e-4)


def test_selections_of_several_vectors_do_not_mix(model: Any, ids: Tensor) -> None:
    a, b = SteeringVector({1: direction(1)}), SteeringVector({1: direction(2)})
    with torch.no_grad(), record_activations(model) as recorded:
        model(ids)
        with (
            a.apply(model, token_indices=[1]),
            b.apply(model, min_token_index=3),
            a.apply(model, token_indices=[4], multiplier=[0, 1, 2]),
        ):
            model(ids)
    moved = recorded[1][1] - recorded[1][0]
    expected = torch.zeros(3, 5, D)
    expected[:, 1] += direction(1)
    expected[:, 3:] += direction(2)
    expected[:, 4] += torch.tensor([0.0, 1.0, 2.0])[:, None] * direction(1)
    assert torch.allclose(moved, expected, atol=1e-5)


def test_hidden_states_show_the_edited_states(model: Any, ids: Tensor) -> None:
    "All but the last, which transformers reports after the final norm."
    with torch.no_grad():
        before = model(ids, output_hidden_states=True).hidden_states
        with SteeringVector({0: direction(1)}).apply(model):
            after = model(ids, output_hidden_states=True).hidden_states
        with SteeringVector({0: direction(1)}).apply(model), record_activations(model) as recorded:
            out = generate(model, ids, output_hidden_states=True)
    assert torch.allclose(after[1] - before[1], direction(1).expand(3, 5, D), atol=1e-5)
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[2], before[2], atol=1e-3)
    assert all(torch.equal(step[1], h) for step, h in zip(out.hidden_states, recorded[0], strict=True))


def test_an_earlier_recording_does_not_change(model: Any, ids: Tensor) -> None:
    with torch.no_grad(), record_activations(model, clone_activations=False) as recorded:
        model(ids)
        kept = recorded[1][0].clone()
        with SteeringVector({1: direction(1)}).apply(model):
            model(ids)
    assert torch.equal(recorded[1][0], kept) and not torch.equal(recorded[1][1], kept)


@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
@pytest.mark.parametrize("say", [{}, {"multiplier": [1, 0, 2]}, {"token_indices": [4]}], ids=str)
def test_nothing_is_written_into(operator: Any, say: dict[str, Any]) -> None:
    "A module may return its very input, which others hold too: the edit makes a new tensor."
    layer, config = torch.nn.Identity(), {"mlp": "layers.{num}.mlp"}
    holder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": layer})])})
    holder.forward = lambda inputs_embeds: layer(inputs_embeds)  # type: ignore[method-assign]
    h, v = torch.randn(3, 5, D), direction(1)
    kept, kept_v = h.clone(), v.clone()
    with SteeringVector({0: v}, "mlp").apply(holder, config, operator=operator, **say):
        out = holder(inputs_embeds=h)
    assert torch.equal(h, kept) and torch.equal(v, kept_v) and not torch.equal(out, h)


# --- dtypes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vector_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS[1:5], ids=NAMES[1:5])
def test_the_vector_follows_the_activation(
    model_dtype: torch.dtype, vector_dtype: torch.dtype, operator: Any, ids: Tensor
) -> None:
    model, v = tiny_model("llama", dtype=model_dtype), direction(1, vector_dtype)
    with torch.no_grad(), record_activations(model) as recorded:
        model(ids)
        with SteeringVector({1: v}).apply(model, operator=operator, multiplier=1.5):
            logits = model(ids).logits
    before, after = (h.double() for h in recorded[1])
    assert recorded[1][1].dtype == logits.dtype == model_dtype
    w = 1.5 * v.double()
    component = (before @ w / (w @ w))[..., None] * w
    part = {"addition_operator()": 0, "ablation_operator(fraction=0.5)": 0.5}.get(repr(operator), 1)
    expected = before - part * component + (0 if repr(operator).startswith("ablation_operator") else w)
    assert (
        plain.far(after, expected)
        < {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[model_dtype]
    )


def test_autocast(model: Any, ids: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with SteeringVector({1: direction(1)}, "mlp").apply(model, min_token_index=2):
            low = model(ids).logits
    with torch.no_grad(), SteeringVector({1: direction(1)}, "mlp").apply(model, min_token_index=2):
        high = model(ids).logits
        far = plain.far(model(ids).logits, tiny_model("llama")(ids).logits)
    assert plain.far(low, high) < 0.1 < far


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
@pytest.mark.parametrize("multiplier", [2.0, [1.0, 0.0, -2.0]], ids=["number", "rows"])
@pytest.mark.parametrize("say", SELECTIONS[:3], ids=str)
def test_gradients_reach_the_vector_and_the_model(
    operator: Any, multiplier: Any, say: dict[str, Any], ids: Tensor
) -> None:
    "Compared with finite differences. (The model's norms compute in float32, so steps must not be too small.)"
    model = tiny_model("llama").double()
    weight = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    v = direction(1, torch.float64).requires_grad_()

    def score(v: Tensor) -> Tensor:
        with SteeringVector({1: v}).apply(model, operator=operator, multiplier=multiplier, **say):
            return (model(ids).logits * weight).sum()

    (gradient,) = torch.autograd.grad(score(v), v)
    assert gradient.norm() > 1e-6
    step, towards = 1e-3, direction(5, torch.float64)
    with torch.no_grad():
        slope = (score(v + step * towards) - score(v - step * towards)) / (2 * step)
    assert torch.isclose(slope, gradient @ towards, rtol=1e-2, atol=1e-2)

    model.zero_grad()
    score(v.detach()).backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0


def test_a_pass_without_gradients_does_not_lose_those_of_the_next(model: Any, ids: Tensor) -> None:
    "One handle for evaluation and training: the vector is converted anew each time, with its new numbers."
    v = direction(1).requires_grad_()
    with SteeringVector({1: v}).apply(model):
        with torch.no_grad():
            first = model(ids).logits
        model(ids).logits.sum().backward()
        assert v.grad is not None and v.grad.norm() > 0
        with torch.no_grad():
            v += 1
            second = model(ids).logits
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("operator", OPERATORS[1:5], ids=NAMES[1:5])
def test_inference_mode_first_and_gradients_afterwards(operator: Any, ids: Tensor) -> None:
    model = tiny_model("llama")
    for multiplier in (1.5, [1.0, 2.0, 0.0]):
        with SteeringVector({1: direction(1)}).apply(model, operator=operator, multiplier=multiplier):
            with torch.inference_mode():
                model(ids)
            model.zero_grad()
            model(ids).logits.sum().backward()
            assert model.model.embed_tokens.weight.grad.norm() > 0


def test_gradient_checkpointing(ids: Tensor) -> None:
    "Layers run a second time, outside of a pass: right where every token is steered, and an error where it cannot be told."
    model = tiny_model("llama")
    vector = SteeringVector({1: direction(1)})
    with vector.apply(model):
        model(ids).logits.sum().backward()
    expected = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = plain.hooks_on(model)  # transformers leaves one of its own
    with vector.apply(model):
        model(ids, use_cache=False).logits.sum().backward()
    assert torch.allclose(model.model.embed_tokens.weight.grad, expected, atol=1e-5)
    within = SteeringVector({1: direction(1)}, "self_attn")
    with within.apply(model, min_token_index=2), pytest.raises(ValueError, match="Gradient checkpointing"):
        model(ids, use_cache=False).logits.sum().backward()
    assert plain.hooks_on(model) == before


@pytest.mark.parametrize("say", [{}, {"min_token_index": 2}, {"token_indices": [0, 3]}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_whole_blocks_under_gradient_checkpointing(ids: Tensor, say: Any, reentrant: bool) -> None:
    "The edit comes after what is run again, so it does not matter when or for which tokens."

    def gradients(checkpointing: bool, inside: bool) -> list[Tensor]:
        model, v = tiny_model("llama").train(), direction(1).requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with SteeringVector({1: v}).apply(model, multiplier=2, operator=ablation_operator(), **say):
            loss = model(ids, use_cache=False).logits.pow(2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [v.grad, *(layer.mlp.down_proj.weight.grad for layer in model.model.layers)]

    wanted = gradients(False, True)
    for inside in (True, False):
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(gradients(True, inside), wanted, strict=True)
        )
