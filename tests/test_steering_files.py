"""A steering goes to a file with its gates and comes back the same, and whoever wants only the vector finds it."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from padded import padded_prompts, random_vector
from safetensors.torch import load_file as plain_load

from steering_vectors import (
    Condition,
    Gate,
    SteeringVector,
    Tokens,
    ablation_operator,
    decay,
    load_gate,
    load_steering,
    ramp,
    save_gate,
    save_steering,
)
from steering_vectors.demo import tiny_model
from steering_vectors.steer.steering import Steering
from steering_vectors.vectors.files import read_texts

ONE = Gate(torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0, 0.25)
TWO = Gate(
    torch.randn(32, generator=torch.Generator().manual_seed(1)), -3, -float("inf"), "mlp", tokens=Tokens.prompt[3:]
)
KNOWN = replace(ONE, judged={"opens": 0.9, "of": 12, "opens_for_others": 0.0, "others": 12})
CONDITIONS: dict[str, Condition] = {
    "a gate": ONE,
    "judged": KNOWN,
    "not": ~TWO,
    "both": ONE & TWO.per_token(float("inf")),
    "nested": ~(ONE | ~TWO) & (ONE | TWO),
}
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows and tokens": {"multiplier": [1.0, -2.0], "tokens": Tokens.response[:8] - [13]},
    "layers and decay": {"multiplier": {1: 1.0, 2: [0.5, 2.0]}, "schedule": decay(8)},
    "ramp and ablation": {"operator": ablation_operator(0.5), "schedule": ramp(3)},
}


def vector(dtype: torch.dtype = torch.float32) -> SteeringVector:
    return SteeringVector({n: (torch.arange(32) / 7 + n).to(dtype) for n in (1, 2)}, "mlp")


def same(a: Condition | None, b: Condition | None) -> bool:
    if a is None or b is None:
        return a is b
    one, other = a.gates, b.gates
    fields = ("layer", "threshold", "layer_type", "every_token", "tokens", "judged")
    return (
        repr(a) == repr(b)
        and all(getattr(g, f) == getattr(h, f) for g, h in zip(one, other, strict=True) for f in fields)
        and all(torch.equal(g.direction, h.direction) for g, h in zip(one, other, strict=True))
        and all(g.direction.dtype == h.direction.dtype for g, h in zip(one, other, strict=True))
    )


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_gate_alone(tmp_path: Path, name: str) -> None:
    save_gate(CONDITIONS[name], tmp_path / "g.safetensors")
    found = load_gate(tmp_path / "g.safetensors")
    assert same(found, CONDITIONS[name])
    answers = [torch.tensor([[n % 2 == 0], [n % 3 == 0]]) for n in range(len(found.gates))]
    assert torch.equal(found.opened(answers), CONDITIONS[name].opened(answers))
    with pytest.raises(ValueError, match="a gate and no vector, which `load_gate` reads"):
        SteeringVector.load(tmp_path / "g.safetensors")
    with pytest.raises(ValueError, match="a gate and no vector"):
        load_steering(tmp_path / "g.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*CONDITIONS, None])
@pytest.mark.parametrize("how", HOW)
def test_a_whole_steering(tmp_path: Path, how: str, name: str | None, dtype: torch.dtype) -> None:
    path, v = tmp_path / "s.safetensors", vector(dtype)
    steering = v.steering(**HOW[how], when=None if name is None else CONDITIONS[name])
    save_steering(steering, path)
    found = load_steering(path)
    assert repr(found) == repr(steering) and same(found.when, steering.when)
    assert found.vector == v and found.vector.provenance == v.provenance
    assert found.tokens == steering.tokens and found.schedule == steering.schedule
    assert SteeringVector.load(path) == v == SteeringVector.from_file(path)
    assert torch.equal(plain_load(path)["layer.2"], v.layer_activations[2])


def test_layers_alone_become_a_vector(tmp_path: Path) -> None:
    save_steering(Steering({3: torch.ones(4)}, multiplier=2.0, when=Gate(torch.ones(4), 1)), tmp_path / "s")
    found = load_steering(tmp_path / "s")
    assert found.vector == SteeringVector({3: torch.ones(4)}) and found.strength == 2


def test_the_vector_of_such_a_file_is_saved_without_the_settings(tmp_path: Path) -> None:
    save_steering(vector().steering(when=ONE), tmp_path / "s")
    SteeringVector.load(tmp_path / "s").save(tmp_path / "v")
    vector().save(tmp_path / "other")
    assert read_texts(tmp_path / "v") == read_texts(tmp_path / "other")
    assert load_steering(tmp_path / "v").when is None


def test_a_steering_from_a_file_does_the_same(tmp_path: Path) -> None:
    model, given = tiny_model("llama", num_layers=3).double(), padded_prompts((2, 0, 1, 0))
    steering = random_vector(model, (1, 2)).steering(when=ONE | Gate(-ONE.direction, 0, 0.5), schedule=decay(2))
    save_steering(steering, tmp_path / "s")
    logits, opened = [], []
    for how in (steering, load_steering(tmp_path / "s")):
        with torch.no_grad(), how.apply(model, given) as handle:
            logits.append(model(**given).logits)
        opened.append(handle.decisions.open)
    with torch.no_grad():
        assert not torch.equal(model(**given).logits, logits[0])
    assert torch.equal(*logits) and torch.equal(*opened)


def test_what_cannot_be_written_leaves_the_file(tmp_path: Path) -> None:
    class Own(Condition):
        gates = (ONE,)  # type: ignore[assignment]

    path, v = tmp_path / "s", vector()
    save_steering(v.steering(), path)
    before = path.read_bytes()
    refused: list[tuple[Callable[[], None], str]] = [
        (lambda: save_steering(v.steering(operator=lambda h, v: v), path), "your own operator"),
        (lambda: save_steering(v.steering(schedule=lambda n: n), path), "your own schedule"),
        (lambda: save_steering(v.steering(tokens=torch.ones(1, 3)), path), "mask"),
        (lambda: save_steering(v.steering(layer_config={"mlp": "m.{num}"}), path), "layer_config"),
        (lambda: save_steering(v.steering(when=Own()), path), "can be written"),
        (lambda: save_gate(replace(ONE, judged={"x": float("nan")}), path), "cannot be saved"),
        (lambda: save_steering(Steering({-1: torch.ones(4)}), path), "counts from the end"),
        (lambda: save_gate(v, path), "takes a gate"),  # type: ignore[arg-type]
    ]
    for save, words in refused:
        with pytest.raises((ValueError, TypeError), match=words):
            save()
    assert path.read_bytes() == before


def changed(path: Path, change: Callable[[dict[str, Any]], None], at: int | None = None) -> None:
    "Change the header of a safetensors file, or one byte of its tensors."
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    change(header)
    if at is not None:
        body[at] ^= 1
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g"

    def text(new: str) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["__metadata__"].update(steering_settings=new)

    for change, at in [
        (lambda h: None, 0),
        (text("{}"), None),
        (lambda h: h["__metadata__"].pop("settings_sha256"), None),
    ]:
        save_gate(ONE, path)
        changed(path, change, at)
        with pytest.raises(ValueError, match=r"g cannot be read as a gate: its settings do not match"):
            load_gate(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("[]", "later version"),
        ('{"when": 0, "gates": [], "more": 1}', "later version"),
        ('{"when": 0, "gates": []}', "a direction for each"),
        ('{"when": 1, "gates": [{"layer": 0, "threshold": 0}]}', "means nothing"),
        ('{"when": true, "gates": [{"layer": 0, "threshold": 0}]}', "means nothing"),
        ('{"when": ["~", 0, 0], "gates": [{"layer": 0, "threshold": 0}]}', "means nothing"),
        ('{"when": ["^", 0, 0], "gates": [{"layer": 0, "threshold": 0}]}', "means nothing"),
        ('{"when": ' + '["~", ' * 3000 + "0" + "]" * 3000 + ', "gates": [{"layer": 0, "threshold": 0}]}', "cannot be read"),
        ('{"when": 0, "gates": [{"layer": 0}]}', "does not know"),
        ('{"when": 0, "gates": [{"layer": 0, "threshold": 0, "hook": "x"}]}', "does not know"),
        ('{"when": 0, "gates": [{"layer": 0, "threshold": "high"}]}', "is a number"),
        ('{"when": 0, "gates": [{"layer": "x", "threshold": 0}]}', "cannot be read"),
        ('{"when": 0, "gates": [{"layer": 0, "threshold": 0, "tokens": "__import__(\'os\')"}]}', "not understood"),
        ('{"when": 0, "gates": [{"layer": 0, "threshold": 0, "tokens": "Tokens.response"}]}', "tokens of the prompt"),
        ('{"when": NaN, "gates": []}', "not a number"),
        ("{}", "holds no gate"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, settings: str, words: str) -> None:
    from safetensors.torch import save_file as plain_save

    from steering_vectors.vectors.files import Settings, settings_fields

    tensors, texts = settings_fields(Settings(settings, (torch.ones(4),)))
    plain_save(tensors, tmp_path / "g", metadata=texts)
    with pytest.raises(ValueError, match=words):
        load_gate(tmp_path / "g")


def test_a_header_whose_length_begins_as_a_pickle_does(tmp_path: Path) -> None:
    "A header of 640 bytes: the file begins with 80 02."
    vector().save(tmp_path / "v")
    short = struct.unpack("<Q", (tmp_path / "v").read_bytes()[:8])[0]
    replaced = replace(vector().provenance, note="x" * (640 - short - len('"note": "", ') - 4))
    SteeringVector(vector().layer_activations, "mlp", replaced).save(tmp_path / "v")
    assert (tmp_path / "v").read_bytes()[:2] == b"\x80\x02"
    assert SteeringVector.from_file(tmp_path / "v") == vector()


def test_what_is_no_steering_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    vector = SteeringVector({1: torch.ones(32)})
    for wrong, path in ((tmp_path / "a.safetensors", vector.steering()), (vector, tmp_path / "b.safetensors")):
        with pytest.raises(TypeError, match="takes a Steering"):
            save_steering(wrong, path)
    assert not list(tmp_path.iterdir())
