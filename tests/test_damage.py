"""Damage: against a plain computation, with any kind of prompt, and nothing of the user's is changed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import EVERYDAY_PROMPTS, OwnAnswers, SteeringVector, Tokens, own_answers, prompt_ids
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.modes import undisturbed
from steering_vectors.train.damage import DamageScorer, kl_per_token

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def vector(seed: int = 0) -> SteeringVector:
    return SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(seed))})


def by_hand(model: Any, answers: OwnAnswers, how: Any, m: float) -> list[Tensor]:
    "Each answer by itself, whole, in float64."
    found = []
    with undisturbed(model):
        for asked, said in answers.pairs:
            ids = torch.tensor([asked + said])
            own = model(ids).logits[0].double().log_softmax(-1)
            with how.times(m).apply(model, ids[:, : len(asked)]):
                steered = model(ids).logits[0].double().log_softmax(-1)
            kl = (own.exp() * (own - steered)).sum(-1)
            found.append(kl[len(asked) - 1 : -1])
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "mistral", "falcon"])
@pytest.mark.parametrize("tokens", [None, Tokens.prompt, Tokens.response, Tokens.generated], ids=repr)
def test_it_is_the_mean_kl_of_the_steered_probabilities(kind: str, tokens: Any) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    answers, how = (
        own_answers(model, tokenizer, ["Hello", "How are you?", "A"], length=6),
        vector().steering(tokens=tokens),
    )
    scorer = DamageScorer(model, answers)
    with undisturbed(model):
        for m in (-1.0, 2.0):
            found, wanted = scorer.by_token([how], m), by_hand(model, answers, how, m)
            assert [len(a) for a in found] == [len(b) for b in wanted] == [len(said) for _, said in answers.pairs]
            for a, b in zip(found, wanted, strict=True):
                assert torch.allclose(a.double(), b, atol=2e-6, rtol=1e-3)
            assert torch.allclose(
                scorer.mean([how], m).double(), torch.stack([b.mean() for b in wanted]).mean(), rtol=1e-3, atol=2e-6
            )


def test_it_is_exactly_zero_at_zero() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    scorer = DamageScorer(model, own_answers(model, tokenizer, ["Hello"]))
    assert float(scorer.mean([vector().steering()], 0.0)) == 0.0
    assert all(not part.any() for part in scorer.by_token([vector().steering()], 0))


def test_the_everyday_prompts_are_short_and_different() -> None:
    assert len(EVERYDAY_PROMPTS) == len({*EVERYDAY_PROMPTS}) == 24
    assert all(2 <= len(prompt.split()) <= 15 for prompt in EVERYDAY_PROMPTS)


def test_answers_are_the_models_own_and_seeded() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    state = torch.get_rng_state()
    one, same, other = (own_answers(model, tokenizer, ["Hello", "Well"], seed=seed) for seed in (0, 0, 1))
    assert one == same and one != other and torch.equal(torch.get_rng_state(), state)
    assert own_answers(model, tokenizer, one) is one
    assert "2 prompts of the user" in repr(one) and "seed 0" in repr(one)
    assert "24 everyday prompts" in repr(own_answers(model, tokenizer, length=1))


@pytest.mark.parametrize("templated", [True, False])
def test_words_messages_and_ids(templated: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = CHAT if templated else None
    messages = [{"role": "user", "content": "Hello"}]
    prompts: list[Any] = ["Hello", [5, 6, 7], torch.tensor([[8, 9]])] + ([messages] if templated else [])
    answers = own_answers(model, tokenizer, prompts, length=3)
    assert [asked for asked, _ in answers.pairs] == [prompt_ids(tokenizer, p)[0].tolist() for p in prompts]
    if templated:
        assert answers.pairs[0][0] == answers.pairs[3][0]
    assert all(1 <= len(said) <= 3 for _, said in answers.pairs)


@pytest.mark.parametrize("wrong", ["Hello", [], 5, [5, 6, 7], [{"role": "user", "content": "Hello"}], {"a": "b"}])
def test_what_is_no_list_of_prompts_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="prompts is a list"):
        own_answers(tiny_model(), tiny_tokenizer(), wrong)


def test_ids_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="500 is no token of this model"):
        own_answers(tiny_model(), tiny_tokenizer(), [[5, 500]])


def test_an_answer_ends_with_the_token_that_ends_it() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(3, 40))
    for _, said in own_answers(model, tokenizer, ["Hello", "How are you?", "And now?"], length=12).pairs:
        assert not any(3 <= token < 40 for token in said[:-1])


def test_modes_gradients_and_tokenizer_come_back() -> None:
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    tokenizer.padding_side, hooks = "right", [len(m._forward_hooks) for m in model.modules()]
    DamageScorer(model, own_answers(model, tokenizer, ["Hello"])).mean([vector().steering()])
    assert model.training and all(p.requires_grad for p in model.parameters()) and tokenizer.padding_side == "right"
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


def test_a_part_of_the_vocabulary_that_cannot_be_said_counts_nothing() -> None:
    own = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert torch.allclose(kl_per_token(own, torch.tensor([[0.0, 0.0, -torch.inf]])), torch.zeros(1), atol=1e-7)


def test_gradients_go_through() -> None:
    model, tokenizer = tiny_model(num_layers=4), tiny_tokenizer()
    scorer, learned = DamageScorer(model, own_answers(model, tokenizer, ["Hello", "Well"])), torch.linspace(-1, 1, 32)
    learned.requires_grad_()
    kl = scorer.mean([SteeringVector({2: learned}).steering()])
    kl.backward()
    with torch.no_grad():
        further = scorer.mean([SteeringVector({2: learned + 1e-2 * learned.grad / learned.grad.norm()}).steering()])
    assert float(further - kl) == pytest.approx(1e-2 * float(learned.grad.norm()), rel=0.05)


def test_bfloat16_is_near_float32() -> None:
    tokenizer, exact, half = tiny_tokenizer(), tiny_model(), tiny_model(dtype=torch.bfloat16)
    answers, how = (
        own_answers(exact, tokenizer, ["Hello", "How are you?"]),
        [SteeringVector({1: 20 * torch.ones(32)}).steering()],
    )
    with torch.no_grad():
        a, b = (float(DamageScorer(model, answers).mean(how)) for model in (exact, half))
    assert b == pytest.approx(a, rel=0.1)


def test_the_default_device_does_not_matter() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        here = DamageScorer(model, own_answers(model, tokenizer, ["Hello"])).mean([vector().steering()])
        how = [vector().steering()]
        torch.set_default_device("meta")
        try:
            there = DamageScorer(model, own_answers(model, tokenizer, ["Hello"])).mean(how)
        finally:
            torch.set_default_device(None)
    assert torch.equal(here, there)
