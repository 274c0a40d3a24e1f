"""No field of a steering is dropped in silence: whoever takes a steering carries each field out, or refuses it.

The fields are read from the class, so a new one fails here until somebody has decided what each taker does with it.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from steering_vectors import (
    Gate,
    Steering,
    SteeringVector,
    Tokens,
    ablation_operator,
    bake,
    calibrate,
    completion_gap,
    decay,
    divergence,
    explore,
    multiplier_limit,
    next_token_shift,
    sweep,
    text_loss,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.steer.additions import only_adds
from steering_vectors.steer.records import SteeringRecord
from steering_vectors.vectors.exports import vllm_lens_payload, write_lm_eval
from steering_vectors.vectors.gguf import write_gguf
from steering_vectors.vectors.provenance import Provenance

VECTOR = SteeringVector({1: torch.ones(32), 2: -torch.ones(32)})
OWN_NAMES = {"decoder_block": "model.layers.{num}"}
UNUSUAL: dict[str, list[Any]] = {
    "operator": [ablation_operator()],
    "multiplier": [2.0, [1.0, 2.0], {1: 1.0, 2: 0.5}],
    "tokens": [Tokens.response, Tokens.after([1])],
    "when": [Gate(torch.ones(32), 0, -float("inf"))],
    "schedule": [decay(8)],
    "layer_config": [OWN_NAMES],
}
CASES = [(name, value) for name, values in UNUSUAL.items() for value in values]
EXPORTS = {"operator", "tokens", "when", "schedule"}  # what these refuse
CONDITIONS = {"when", "schedule"}


def a_measure(call: Callable[..., Any], *data: Any, **how: Any) -> Callable[[Steering, Path], Any]:
    return lambda steering, _: call(tiny_model(), tiny_tokenizer(), steering, *data, **how)


TAKERS: dict[str, tuple[Callable[[Steering, Path], Any], set[str]]] = {
    "sweep": (a_measure(sweep, "Hi", [0, 1], max_new_tokens=2), set()),
    "completion_gap": (a_measure(completion_gap, [("Hi", "a", "b")], [0, 1]), set()),
    "text_loss": (a_measure(text_loss, ["Hello there"], [0, 1]), CONDITIONS),
    "next_token_shift": (a_measure(next_token_shift, "Hi"), set()),
    "explore": (a_measure(explore, "Hi", multipliers=[1], max_new_tokens=2), CONDITIONS),
    "divergence": (a_measure(divergence, prompts=["Hi"], multipliers=[0, 1]), set()),
    "calibrate": (a_measure(calibrate, prompts=["Hi"]), {"operator"}),
    "multiplier_limit": (lambda steering, _: multiplier_limit(steering), set()),
    "bake": (lambda steering, _: bake(tiny_model(), steering), {"operator", "tokens", "when", "schedule"}),
    "gguf": (lambda steering, path: write_gguf(path / "v.gguf", steering, Provenance()), EXPORTS),
    "vllm_lens": (lambda steering, _: vllm_lens_payload(steering), EXPORTS),
    "lm_eval": (lambda steering, path: write_lm_eval(path / "v.pt", tiny_model(), steering), EXPORTS),
}


def test_every_field_has_an_unusual_value() -> None:
    assert UNUSUAL.keys() == {f.name for f in fields(Steering)} - {"vector"}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_a_field_is_carried_out_or_refused(taker: str, name: str, value: Any, tmp_path: Path) -> None:
    call, refused = TAKERS[taker]
    steering = Steering(VECTOR, **{name: value})
    by_row_or_layer = name == "multiplier" and not isinstance(value, float)  # one number is needed everywhere here
    if name in refused or by_row_or_layer:
        with pytest.raises(ValueError):
            call(steering, tmp_path)
        assert list(tmp_path.iterdir()) == []
    else:
        call(steering, tmp_path)


def test_a_request_of_an_engine_carries_every_field_or_is_refused() -> None:
    unusual = {
        "layers": (1,),
        "multiplier": 2.0,
        "tokens": Tokens.response,
        "operator": ablation_operator(),
        "schedule": decay(8),
    }
    assert unusual.keys() == set(SteeringRecord._fields) - {"vector"}
    for name, value in unusual.items():
        record = SteeringRecord("joy", **{name: value})
        if name in ("operator", "schedule"):
            with pytest.raises(ValueError):
                only_adds(record)
        else:
            assert getattr(only_adds(record), name) == value
    for multiplier in [(1.0, 2.0), {1: 1.0, 2: 0.5}]:
        with pytest.raises(ValueError, match="has one multiplier"):
            only_adds(SteeringRecord("joy", multiplier=multiplier))
