"""Learned vectors: gradients against plain autograd, on many families, and nothing of the user's is changed."""

import gc
import weakref
from typing import Any

import families
import pytest
import torch
from accelerate import cpu_offload
from families import quiet
from torch import Tensor, nn

from steering_vectors import (
    ContrastScores,
    Preferences,
    SteeringVector,
    Tokens,
    completion_gap,
    divergence,
    optimize_steering_vector,
    own_answers,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train.curvature import Curvature, damage_curvature, mixed
from steering_vectors.train.gradients import ShiftPlace, check_backward, differentiable, row_gradients, score_gradient
from steering_vectors.train.keeping import _kept
from steering_vectors.train.objectives import as_contrasts, choices, contrast_ids
from steering_vectors.train.optimizing import StepOptions, gradient_at_zero, stepped
from steering_vectors.train.scores import TextScorer

PAIRS = [
    ([1, 5, 6, 7, 8, 9], [20, 21, 22]),
    ([1, 5, 6, 7, 8, 9], [20, 23]),
    ([1, 5, 6, 30, 31], [7, 8, 9, 33, 34, 35]),
    ([1, 40], [41]),
]
WEIGHTS = torch.tensor([1.0, -0.5, 2.0, -1.0])
PROMPTS = ["How are you?", "Hello", "Why is it so?"]
CONTRASTS = [("How are you?", " fine", " bad"), ("And now?", " all glad", " so sad"), ("Hm", " good day", " grim")]
FAMILIES = """llama gpt2 gpt_neox gemma2 gemma3_text mistral qwen3 phi opt falcon bloom stablelm olmo2 cohere mixtral
    deepseek_v3 gpt_oss""".split()


def by_hand(model: Any, how: SteeringVector, tokens: Any = None, pairs: Any = PAIRS) -> Tensor:  # (n, size)
    "One text at a time, whole, through `apply`."
    found = []
    for asked, said in pairs:
        leaves = {n: v.detach().clone().requires_grad_() for n, v in how.layer_activations.items()}
        steering = SteeringVector(leaves, how.layer_type).steering(tokens=tokens)
        ids = torch.tensor([asked + said])
        with steering.apply(model, ids[:, : len(asked)]):
            logp = model(ids).logits[0].float().log_softmax(-1)[len(asked) - 1 : -1]
        total = logp.gather(1, torch.tensor(said)[:, None]).sum()
        found.append(torch.cat(torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)).float())
    return torch.stack(found)


def lengths_of(pairs: Any = PAIRS) -> Tensor:
    return torch.tensor([float(len(said)) for _, said in pairs])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in families.CAUSAL])
def test_the_gradient_is_that_of_plain_passes(name: str) -> None:
    with quiet():
        model: Any = families.build(name).to(torch.float32).eval()
        place = ShiftPlace.of(model, [1, 2])
        zero = SteeringVector({n: torch.zeros(place.width) for n in (1, 2)})
        each = by_hand(model, zero)
        found = score_gradient(TextScorer(model, PAIRS), place, WEIGHTS)
        rows, lengths = row_gradients(model, PAIRS, place)
    assert torch.allclose(found, (WEIGHTS / lengths_of()) @ each, atol=1e-5, rtol=1e-3)
    assert torch.allclose(rows[:, 0], each, atol=1e-5, rtol=1e-3)
    assert all(x > 0 for x in lengths.values()) and list(lengths) == [1, 2]
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp", "input_layernorm"])
@pytest.mark.parametrize(
    "tokens", [None, Tokens.prompt, Tokens.generated, Tokens.response, Tokens.prompt[-2:]], ids=repr
)
def test_any_part_and_any_tokens(layer_type: Any, tokens: Any) -> None:
    model = tiny_model(num_layers=4)
    place = ShiftPlace.of(model, 2, layer_type, None, tokens)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    each = by_hand(model, place.vector(shift), tokens)
    found = score_gradient(TextScorer(model, PAIRS), place, WEIGHTS, shift)
    assert torch.allclose(found, (WEIGHTS / lengths_of()) @ each, atol=1e-5, rtol=1e-3)
    at_zero = by_hand(model, place.vector(0 * shift), tokens)
    assert torch.allclose(row_gradients(model, PAIRS, place)[0][:, 0], at_zero, atol=1e-5, rtol=1e-3)


def test_bfloat16_is_as_near_to_float32_as_plain_passes_are() -> None:
    model = tiny_model(num_layers=4)
    place = ShiftPlace.of(model, 2)
    exact = (WEIGHTS / lengths_of()) @ by_hand(model, place.vector(torch.zeros(32)))
    narrow: Any = model.to(torch.bfloat16)
    plain = (WEIGHTS / lengths_of()) @ by_hand(narrow, place.vector(torch.zeros(32)))
    found = score_gradient(TextScorer(narrow, PAIRS), place, WEIGHTS)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 2 * (plain - exact).norm() + 0.02 * exact.norm()


def test_finite_differences_agree() -> None:
    model = tiny_model(num_layers=4).double()
    pairs, place = contrast_ids(tiny_tokenizer(), CONTRASTS), ShiftPlace.of(model, [1, 2])
    scorer = TextScorer(model, pairs)
    gradient = gradient_at_zero(scorer, place, choices)
    for seed in range(3):
        way = torch.randn(place.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            up, down = (scorer.scores([place.steering(sign * 1e-2 * way)]) for sign in (1, -1))
        gaps = [(s[0::2] - s[1::2]).mean() for s in (up, down)]
        assert float((gaps[0] - gaps[1]) / 2e-2) == pytest.approx(float(gradient.double() @ way), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "mistral", "falcon"])
def test_a_learned_vector_raises_the_gap_and_costs_what_was_asked(kind: str, dtype: torch.dtype) -> None:
    model, tokenizer = tiny_model(kind).to(dtype), tiny_tokenizer()
    answers = own_answers(model, tokenizer, PROMPTS)
    v = optimize_steering_vector(model, tokenizer, CONTRASTS, 1, 0.002, prompts=answers)
    gap = completion_gap(model, tokenizer, v, CONTRASTS, multipliers=[-1, 0, 1])
    assert gap[-1] < gap[0] < gap[1]
    assert divergence(model, tokenizer, v, answers, multipliers=[1])[1] == pytest.approx(0.002, rel=0.11)
    story = v.provenance
    assert story.suggested_multiplier == 1.0 and story.num_pairs == 3 and story.model_type == model.config.model_type
    assert story.extra["optimization"] == {"objective": "choices", "steps": 0}
    assert story.extra["calibration"]["negative"] < 0 and 1 in (story.activation_norms or {})


def test_the_padding_side_does_not_matter() -> None:
    model, found = tiny_model(), []
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        found.append(optimize_steering_vector(model, tokenizer, CONTRASTS, 1, 0.002, prompts=PROMPTS)[1])
        assert tokenizer.padding_side == side
    assert torch.equal(*(v.layer_activations[1] for v in found))


def test_it_beats_a_random_direction_and_the_mean_at_its_own_game() -> None:
    model, tokenizer = tiny_model(num_layers=4), tiny_tokenizer()
    place, answers = ShiftPlace.of(model, 2), own_answers(model, tokenizer, PROMPTS)
    pairs = contrast_ids(tokenizer, CONTRASTS)
    g = gradient_at_zero(TextScorer(model, pairs), place, choices).double()
    curvature, _ = damage_curvature(model, tokenizer, place, answers, draws=64)
    best = curvature.whitened(g)
    for seed in range(5):
        other = torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for some in (other, g):
            gain = [float(g @ v) / curvature.damage(v) ** 0.5 for v in (best, some)]
            assert gain[0] >= gain[1] * (1 - 1e-9)


def test_preference_rows_chats_and_tables_are_the_same_contrasts() -> None:
    rows = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in CONTRASTS]
    assert as_contrasts(rows) == as_contrasts(CONTRASTS) == as_contrasts(iter(CONTRASTS))
    columns = {key: [row[key] for row in rows] for key in ("prompt", "chosen", "rejected")}
    assert as_contrasts(columns) == as_contrasts(rows)
    chat = [{"role": "user", "content": "Hi"}]
    whole = [{k: [*chat, {"role": "assistant", "content": text}] for k, text in (("chosen", "a"), ("rejected", "b"))}]
    assert as_contrasts(whole) == [((chat, "a"), (chat, "b"))] == as_contrasts([(chat, "a", "b")])
    for wrong, words in (
        ([("a", "b")], "has no prompt"),
        ([("a", "b", 3)], "the last two of them texts"),
        ([], "No contrasts"),
    ):
        with pytest.raises(ValueError, match=words):
            as_contrasts(wrong)
    with pytest.raises(TypeError):
        as_contrasts([5])


def test_bipo_has_the_published_loss_and_gradient() -> None:
    model, tokenizer = tiny_model(num_layers=4), tiny_tokenizer()
    pairs, place = contrast_ids(tokenizer, CONTRASTS), ShiftPlace.of(model, 2)
    each = by_hand(model, place.vector(torch.zeros(32)), pairs=pairs)
    found = gradient_at_zero(TextScorer(model, pairs), place, Preferences(0.3))
    assert torch.allclose(found, 0.3 / 2 * (each[0::2] - each[1::2]).mean(0), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("objective", ["choices", "preferences", lambda s: (s.matching - s.other).tanh().mean()])
def test_steps_hold_the_damage_and_raise_the_aim(objective: Any) -> None:
    model, tokenizer = tiny_model(num_layers=4), tiny_tokenizer()
    answers = own_answers(model, tokenizer, PROMPTS)
    how = {"prompts": answers, "kl": 0.01, "objective": objective}
    before = optimize_steering_vector(model, tokenizer, CONTRASTS, [1, 2], **how)
    after = optimize_steering_vector(model, tokenizer, CONTRASTS, [1, 2], **how, steps=12, contrasts_per_step=3, seed=0)
    assert divergence(model, tokenizer, after, answers, multipliers=[1])[1] == pytest.approx(0.01, rel=0.11)
    gaps = [completion_gap(model, tokenizer, v, CONTRASTS, multipliers=[0, 1]) for v in (before, after)]
    assert gaps[1][1] - gaps[1][0] > 0.9 * (gaps[0][1] - gaps[0][0])
    assert after.provenance.extra["optimization"]["steps"] == 12 and "12 steps of Adam" in str(
        after.provenance.aggregator
    )
    assert not torch.allclose(before.layer_activations[1], after.layer_activations[1])


def test_steps_stay_on_the_sphere() -> None:
    model, place = tiny_model(num_layers=4), ShiftPlace.of(tiny_model(num_layers=4), 2)
    form = Curvature(torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    pairs = contrast_ids(tiny_tokenizer(), CONTRASTS)
    start = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for objective in (choices, Preferences()):
        end = stepped(model, pairs, place, objective, form, start, StepOptions(5, 0.5, 2))
        assert form.damage(end) == pytest.approx(form.damage(start), rel=1e-6)


def test_modes_gradients_random_numbers_and_hooks_come_back() -> None:
    model, tokenizer = tiny_model(num_layers=4), tiny_tokenizer()
    model.train()
    model.model.layers[1].eval()
    frozen = model.model.layers[0].mlp.down_proj.weight
    frozen.requires_grad = False
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    torch.manual_seed(7)
    before = torch.get_rng_state(), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    for outside in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with outside():
            v = optimize_steering_vector(model, tokenizer, CONTRASTS, 2, 0.002, steps=2, prompts=PROMPTS)
    with pytest.raises(ValueError, match="Are both sides alike"):
        optimize_steering_vector(model, tokenizer, [("Hi", " a", " a")], 2, prompts=PROMPTS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [m.training for m in model.modules()] == before[1]
    assert [p.requires_grad for p in model.parameters()] == before[2]
    assert bool((model.lm_head.weight.grad == 1).all()) and frozen.grad is None
    assert all(p.grad is None for p in model.parameters() if p is not model.lm_head.weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert not v.layer_activations[2].requires_grad and not v.layer_activations[2].is_inference()


def test_the_same_call_gives_the_same_vector_and_nothing_old_is_used() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    once, twice = (optimize_steering_vector(model, tokenizer, CONTRASTS, 1, 0.002) for _ in range(2))
    assert torch.equal(once.layer_activations[1], twice.layer_activations[1])
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    third = optimize_steering_vector(model, tokenizer, CONTRASTS, 1, 0.002)
    fresh = optimize_steering_vector(_as_new(model), tokenizer, CONTRASTS, 1, 0.002)
    assert torch.equal(third.layer_activations[1], fresh.layer_activations[1])


def _as_new(model: Any) -> Any:
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    return other


def test_what_is_kept_for_a_model_does_not_keep_the_model() -> None:
    model = tiny_model()
    damage_curvature(model, tiny_tokenizer(), ShiftPlace.of(model, 1), PROMPTS)
    there = weakref.ref(model)
    assert model in _kept
    del model
    gc.collect()
    assert there() is None


def test_what_has_no_backward_is_refused_in_words() -> None:
    tokenizer = tiny_tokenizer()
    offloaded = cpu_offload(tiny_model(), torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        optimize_steering_vector(offloaded, tokenizer, CONTRASTS, 1)
    with torch.inference_mode():
        inference = tiny_model()
        inference.load_state_dict({k: v.clone() for k, v in inference.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="inference_mode"):
        check_backward(inference)
    quantized = torch.ao.quantization.quantize_dynamic(tiny_model(), {nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match="quantized"):
        optimize_steering_vector(quantized, tokenizer, CONTRASTS, 1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kl": -1}, "kl is a damage"),
        ({"layer": 9}, "Layer 9 does not exist"),
        ({"layer": []}, "No layer"),
        ({"steps": -1}, "steps"),
        ({"objective": "choice"}, "Unknown objective"),
        ({"objective": lambda scores: 1.0}, "returns one number"),
        ({"objective": lambda scores: scores.matching}, "returns one number"),
        ({"contrasts_per_step": 0}, "contrasts_per_step"),
        ({"kl": 50.0}, "no multiplier costs 50|not within 10 %"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: Any, words: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match=words):
        optimize_steering_vector(model, tokenizer, CONTRASTS, **({"layer": 1, "prompts": PROMPTS} | wrong))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_function_sees_the_scores_with_and_without_the_shift() -> None:
    seen: list[ContrastScores] = []

    def noted(scores: ContrastScores) -> Tensor:
        seen.append(scores)
        return (scores.matching - scores.other).mean()

    model, tokenizer = tiny_model(), tiny_tokenizer()
    v = optimize_steering_vector(
        model, tokenizer, CONTRASTS, 1, 0.01, steps=2, objective=noted, prompts=PROMPTS, contrasts_per_step=3
    )
    assert [len(s.matching) for s in seen] == [3, 3, 3]
    assert torch.equal(seen[0].matching.detach(), seen[0].matching_before)
    assert not torch.equal(seen[1].matching.detach(), seen[1].matching_before)
    assert v.provenance.extra["optimization"]["objective"] == "noted"


def test_mixed_curvature_is_the_mean() -> None:
    a, b = (
        Curvature(torch.randn(3, 8, generator=torch.Generator().manual_seed(s), dtype=torch.float64)) for s in (0, 1)
    )
    v = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert mixed([a, b]).damage(v) == pytest.approx((a.damage(v) + b.damage(v)) / 2)
    assert Curvature(torch.zeros(1, 8, dtype=torch.float64)).damage(v) >= 0


def test_other_threads_and_later_passes_are_untouched() -> None:
    model = tiny_model()
    ids = torch.tensor([[1, 5, 6]])
    before = model(ids).logits
    with differentiable(model):
        assert not any(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
    assert torch.equal(model(ids).logits, before) and model(ids).logits.requires_grad


def test_a_vector_by_hand_learns_through_apply() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    row = torch.zeros(32, requires_grad=True)
    v = SteeringVector({1: row})
    ids = tokenizer("How are you? fine", return_tensors="pt").input_ids
    losses, adam = [], torch.optim.Adam([row], lr=0.5)
    for _ in range(5):
        with v.apply(model):
            loss = model(ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
