"""Scores of continuations: what is shared and passed over computes the same, on many families, and never more than asked."""

import threading
from typing import Any

import families
import pytest
import torch
from families import quiet
from torch import nn

from steering_vectors import SteeringVector, Tokens, ablation_operator, completion_gap, text_loss
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.modes import undisturbed
from steering_vectors.steer.steering import Steering
from steering_vectors.train import continuations, scores
from steering_vectors.train.continuations import log_probabilities, next_logits, plain_passes, steered_masks
from steering_vectors.train.scores import ScoringWay, TextScorer, _ways, steered_pass
from steering_vectors.train.tails import blocks_below, keeping, passing_over

PAIRS = [
    ([1, 5, 6, 7, 8, 9], [20, 21, 22]),
    ([1, 5, 6, 7, 8, 9], [20, 23]),
    ([1, 5, 6, 30, 31], [7, 8, 9, 33, 34, 35]),
    ([1, 40], [41]),
    ([1, 5, 6, 7], [8, 9, 20, 22]),
]
FAMILIES = """llama gpt2 gpt_neox gptj gemma gemma2 gemma3_text mistral qwen2 qwen3 phi phi3 opt falcon bloom mpt stablelm olmo2
    cohere granite starcoder2 mixtral qwen3_moe deepseek_v3 glm4 smollm3 nemotron mamba rwkv falcon_mamba jamba lfm2 zamba2
    recurrent_gemma qwen3_next gemma3n_text gpt_oss llama4_text biogpt xglm""".split()


def by_hand(model: nn.Module, how: Steering | None, m: float = 1.0, pairs: Any = PAIRS) -> torch.Tensor:
    "One text at a time, padded with nothing, through the whole model."
    found, steerings = [], [] if how is None else [how]
    with undisturbed(model):
        for pair in pairs:
            (now,) = plain_passes([pair], [steered_masks(one.selection, [pair]) for one in steerings], 1)
            with steered_pass(model, steerings, m, now.masks):
                found.append(log_probabilities(now, next_logits(model, now))[0].mean())
    return torch.stack(found)


def way_of(model: nn.Module) -> ScoringWay:
    return list(_ways[model].values())[-1][0]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in families.CAUSAL])
def test_every_family_scores_as_the_plain_model_does(name: str) -> None:
    with quiet():
        model: Any = families.build(name).to(torch.float32)
        width = model.config.get_text_config(decoder=True).hidden_size
        torch.manual_seed(1)
        how = SteeringVector({1: torch.randn(width), 2: torch.randn(width)}).steering()
        scorer, found = TextScorer(model, PAIRS), {}
        with undisturbed(model):
            for m in (0.0, 0.5, -1.0):
                found[m] = scorer.scores([how], m)
        for m, scores in found.items():
            assert torch.allclose(scores, by_hand(model, how if m else None, m), atol=1e-4), (m, way_of(model))
    assert not any("forward" in vars(module) for module in model.modules())


SHORT, ALIKE, LONG = ([1, 40], [41]), ([7, 7, 7, 7], [7]), ([1, *range(5, 13)], [20, 21])
NAMES = ["llama", "gpt2", "bart", "mpt", "rwkv", "xlstm", "whisper", "marian"]


@pytest.mark.parametrize(
    "name, first", [(name, first) for name in NAMES for first in (SHORT, LONG)] + [("llama", ALIKE), ("bart", ALIKE)]
)
def test_one_text_is_enough_to_find_out_a_model_that_cannot_run_branches(
    name: str, first: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(scores, "row_budget", lambda model: 12)  # the long one and a branch of it do not fit into a row
    monkeypatch.setattr(continuations, "row_budget", lambda model: 12)
    with quiet():
        model: Any = families.build(name).to(torch.float32)
        width = model.config.get_text_config(decoder=True).hidden_size
        how = SteeringVector({1: torch.linspace(-1, 1, width)}).steering()
        with undisturbed(model):
            TextScorer(model, [first]).scores([how])
        later = [pair for pair in PAIRS if len(pair[0] + pair[1]) <= len(first[0] + first[1])]
        later += [([1, 42], [43]), ([9, 40], [41]), ([9, 43], [41])]
        with undisturbed(model):
            found = TextScorer(model, later).scores([how])
        assert torch.allclose(found, by_hand(model, how, pairs=later), atol=1e-4), way_of(model)
    assert way_of(model).packed == (name in ("llama", "gpt2"))


def test_most_families_take_the_cheap_way() -> None:
    chosen = {}
    for name in ("llama", "gpt2", "gemma2", "mistral", "qwen3", "opt", "gpt_neox"):
        with quiet():
            model = families.build(name).to(torch.float32)
            with undisturbed(model):
                TextScorer(model, PAIRS).scores([SteeringVector({1: torch.ones(32)}).steering()])
        chosen[name] = way_of(model)
    assert all(way.packed and way.below == 2 for way in chosen.values()), chosen


@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp", "input_layernorm"])
@pytest.mark.parametrize(
    "tokens", [None, Tokens.prompt, Tokens.generated, Tokens.response, Tokens.prompt[-2:], [2, 3]], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_part_and_any_tokens(layer_type: Any, tokens: Any, dtype: torch.dtype) -> None:
    model: Any = tiny_model(num_layers=4).to(dtype)
    torch.manual_seed(2)
    how = SteeringVector({2: torch.randn(32), 3: torch.randn(32)}, layer_type).steering(tokens=tokens)
    with undisturbed(model):
        found = TextScorer(model, PAIRS).scores([how], 1.5)
    assert torch.allclose(found, by_hand(model, how, 1.5).to(found.dtype), atol=1e-5)
    assert way_of(model) == ScoringWay(True, False, 3 if layer_type == "decoder_block" else 2)


def test_half_precision_is_no_further_from_float64_than_the_plain_way() -> None:
    exact: Any = tiny_model(num_layers=4).to(torch.float64)
    half: Any = tiny_model(num_layers=4, dtype=torch.bfloat16)
    how = SteeringVector({2: torch.linspace(-1, 1, 32)}).steering()
    with undisturbed(half):
        found = TextScorer(half, PAIRS).scores([how], 2)
    truth = by_hand(exact, how, 2)
    assert (found - truth).abs().max() <= 2 * (by_hand(half, how, 2) - truth).abs().max() + 1e-3


def test_several_steerings_with_tokens_of_their_own() -> None:
    model = tiny_model(num_layers=4)
    torch.manual_seed(3)
    two = [
        SteeringVector({1: torch.randn(32)}).steering(tokens=Tokens.generated, multiplier=2),
        SteeringVector({3: torch.randn(32)}).steering(operator=ablation_operator(), tokens=Tokens.prompt),
    ]
    with undisturbed(model):
        found, alone = TextScorer(model, PAIRS).scores(two), [TextScorer(model, [p], 1).scores(two) for p in PAIRS]
    assert torch.allclose(found, torch.cat(alone), atol=1e-5)
    for n, pair in enumerate(PAIRS):
        with undisturbed(model):
            (now,) = plain_passes([pair], [steered_masks(how.selection, [pair]) for how in two], 1)
            with steered_pass(model, two, 1.0, now.masks):
                wanted = log_probabilities(now, next_logits(model, now))[0].mean()
        assert torch.allclose(found[n], wanted, atol=1e-5)


def test_an_operator_of_the_users_goes_the_plain_way() -> None:
    model, calls = tiny_model(num_layers=4), []

    def operator(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(h.shape))
        return v

    with undisturbed(model):
        TextScorer(model, PAIRS, batch_size=2).scores([SteeringVector({2: torch.ones(32)}).steering(operator=operator)])
    assert [shape[0] for shape in calls] == [2, 2, 1]


def test_the_lower_blocks_run_once_for_all_multipliers_and_vectors() -> None:
    model, ran = tiny_model(num_layers=4), {0: 0, 3: 0}
    layers: Any = model.model.layers
    hooks = [layers[n].self_attn.register_forward_hook(lambda *_, n=n: ran.__setitem__(n, ran[n] + 1)) for n in ran]
    scorer = TextScorer(model, PAIRS)
    vectors = [SteeringVector({2: torch.randn(32)}).steering() for _ in range(2)]
    with undisturbed(model):
        scorer.scores(vectors[:1], 1.0)
        ran.update({0: 0, 3: 0})
        for how in vectors:
            for m in (-2, -1, 0, 1, 2):
                scorer.scores([how], m)
    for hook in hooks:
        hook.remove()
    assert ran == {0: 0, 3: 10}


def test_a_vocabulary_that_is_large_makes_shorter_rows() -> None:
    model = tiny_model()
    with undisturbed(model):
        whole = TextScorer(model, PAIRS).scores()
        assert torch.allclose(TextScorer(model, PAIRS, batch_size=1).scores(), whole, atol=1e-5)
        assert torch.allclose(TextScorer(model, PAIRS, batch_size=2).scores(), whole, atol=1e-5)


def test_an_error_in_a_pass_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    how = SteeringVector({1: torch.ones(32)}).steering()
    blocks = blocks_below(model, [how])

    def fails(*_: Any) -> None:
        raise RuntimeError("here")

    hook = model.model.layers[0].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="here"):
        keeping(lambda: model(torch.tensor([[1, 2]])), blocks)
    hook.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="did not run once each"):
        keeping(lambda: None, blocks)


def test_a_block_that_runs_twice_is_not_passed_over() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.randn(1, 2)
    with torch.no_grad():
        assert torch.equal(keeping(lambda: two(one(x)), [one, two]), two(one(x)))
    for order in (lambda: two(one(one(x))), lambda: one(two(x)), lambda: two(x)):
        with pytest.raises(ValueError, match="did not run once each"):
            keeping(order, [one, two])


def test_another_thread_meets_the_whole_model() -> None:
    model, ids = tiny_model(num_layers=4), torch.tensor([[5, 6, 7]])
    below = blocks_below(model, [SteeringVector({2: torch.ones(32)}).steering()])
    seen: list[torch.Tensor] = []
    with undisturbed(model):
        wanted = model(ids).logits
        kept = keeping(lambda: model(torch.tensor([[9, 10, 11]]), use_cache=False), below)

        def other() -> None:
            with torch.no_grad():
                seen.append(model(ids).logits)

        with passing_over(below, kept):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            mine = model(ids, use_cache=False).logits
    assert torch.equal(seen[0], wanted) and not torch.equal(mine, wanted)


def test_what_has_a_forward_of_its_own_or_is_compiled_is_not_passed_over() -> None:
    model, how = tiny_model(), [SteeringVector({1: torch.ones(32)}).steering()]
    assert len(blocks_below(model, how)) == 2
    block = model.model.layers[0]
    block.forward = block.forward
    assert blocks_below(model, how) == []
    del block.forward
    model.model.layers[2].compile()
    assert blocks_below(model, how) == []


def test_steering_that_is_open_already_counts() -> None:
    model, tokenizer = tiny_model(num_layers=4), tiny_tokenizer()
    low, high = SteeringVector({0: torch.randn(32)}), SteeringVector({2: torch.randn(32)})
    contrasts = [("Hello", " you", " me"), ("How", " are", " is")]
    with low.apply(model):
        found = completion_gap(model, tokenizer, high, contrasts, [0, 1]).values
    both = [low.steering(), high.steering()]
    assert torch.allclose(found[:, 1], completion_gap(model, tokenizer, both, contrasts, [1]).values[:, 0], atol=1e-5)
    assert torch.allclose(found[:, 0], completion_gap(model, tokenizer, low, contrasts, [1]).values[:, 0], atol=1e-5)


def test_gradients_are_those_of_the_plain_way() -> None:
    model = tiny_model(num_layers=4)
    for weight in model.parameters():
        weight.requires_grad_(False)
    start, grads = torch.linspace(-1, 1, 32), []
    for packed in (True, False):
        learned = start.clone().requires_grad_()
        how = SteeringVector({2: learned}).steering()
        if packed:
            TextScorer(model, PAIRS).scores([how])[0].backward()
        else:
            (now,) = plain_passes(PAIRS[:1], [None], 1)
            with steered_pass(model, [how], 1.0, now.masks):
                log_probabilities(now, next_logits(model, now))[0].mean().backward()
        grads.append(learned.grad)
    assert way_of(model).below == 3 and torch.allclose(grads[0], grads[1], atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_default_device_do_not_matter(side: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.padding_side = side
    v, texts = SteeringVector({1: torch.ones(32)}), ["A first text.", "Another one that is longer."]
    here = text_loss(model, tokenizer, v, texts, [0, 1]).values
    torch.set_default_device("meta")
    try:
        there = text_loss(model, tokenizer, v, texts, [0, 1]).values
    finally:
        torch.set_default_device(None)
    assert torch.equal(here, there)
