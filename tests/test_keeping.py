"""What was measured of a model is kept for exactly as long as it would be measured again the same."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from steering_vectors import SteeringVector, own_answers
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train.keeping import _kept

PROMPTS = ["How are you?", "Hello", "Why is it so?"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "Grows with each call of `generate` that samples."
    calls: list[int] = []
    model = type(tiny_model())
    plain = model.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("do_sample"):
            calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "generate", counted)
    return calls


def answers(model: Any, **how: Any) -> Any:
    return own_answers(model, tiny_tokenizer(), PROMPTS, **how)


def test_the_same_question_is_answered_once(drawn: list[int]) -> None:
    model = tiny_model()
    first = answers(model)
    first.pairs[0][1].append(5)  # what is returned is the user's
    calls = len(drawn)
    again = answers(model)
    assert len(drawn) == calls > 0 and first.pairs[1:] == again.pairs[1:] and len(again.pairs[0][1]) == 16
    answers(model, seed=1), answers(model, length=4)
    assert len(drawn) == 3 * calls


def scaled(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight *= 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": scaled,
    "through data": lambda model: model.lm_head.weight.data.mul_(2),
    "data replaced": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data * 2),
    "a weight replaced": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight * 2)),
    "a module replaced": lambda model: setattr(model.model, "norm", torch.nn.Identity()),
    "weights loaded": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
    "another type": lambda model: model.to(torch.bfloat16),
    "generation": lambda model: setattr(model.generation_config, "repetition_penalty", 1.5),
    "a hook": lambda model: model.model.layers[1].register_forward_hook(lambda m, a, out: out),
    "a hook before": lambda model: model.model.layers[1].register_forward_pre_hook(lambda m, a: a),
    "a steering": lambda model: SteeringVector({1: torch.ones(32)}).patch(model),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_model_is_noticed(drawn: list[int], change: Callable[[Any], Any]) -> None:
    model = tiny_model()
    answers(model)
    calls = len(drawn)
    kept = change(model)
    after = answers(model)
    assert len(drawn) == 2 * calls
    fresh = deepcopy(model) if not hasattr(kept, "remove") else None
    if fresh is not None:
        assert answers(fresh).pairs == after.pairs
    else:
        kept.remove()
        answers(model)
        assert len(drawn) == 2 * calls  # what was kept of the model alone is right again


def test_adapters_that_are_switched_are_noticed(drawn: list[int]) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with_adapter = answers(model)
    with model.disable_adapter():
        without = answers(model)
    assert without.pairs != with_adapter.pairs and without.pairs == answers(tiny_model()).pairs
    assert answers(model).pairs == with_adapter.pairs


def test_a_copy_and_another_model_have_their_own(drawn: list[int]) -> None:
    model = tiny_model()
    answers(model)
    calls = len(drawn)
    answers(deepcopy(model)), answers(tiny_model())
    assert len(drawn) == 3 * calls and model in _kept


def test_weights_of_inference_mode_and_empty_ones() -> None:
    model = tiny_model()
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("number", torch.tensor(1.0))
    with torch.inference_mode():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    assert answers(model).pairs == answers(model).pairs
