"""Models spread by `device_map`, offloaded by accelerate, or quantised: hooks follow their modules."""

import importlib.util
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor

from steering_vectors import SteeringVector, ablation_operator, record_activations, train_steering_vector
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.steer.tokens import Tokens

DEVICES = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def offloaded(kind: str, how: str, folder: Path) -> Any:
    "A tiny model whose weights rest elsewhere (as meta tensors here) and come in for each module's forward."
    model = tiny_model(kind)
    if how == "cpu_offload":
        return cpu_offload(model, torch.device("cpu"))
    if how == "disk_offload":
        return disk_offload(model, str(folder), torch.device("cpu"))
    blocks = plain.MODULES[kind]["decoder_block"].format(1)
    device_map: dict[str, Any] = {name: "cpu" for name in top(model, blocks)} | {blocks: "disk"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


def top(model: Any, apart: str) -> list[str]:
    "Names of modules that together are everything but `apart`."
    names, parts = [], apart.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        prefix = "".join(f"{p}." for p in parts[:depth])
        names += [f"{prefix}{name}" for name, _ in parent.named_children() if name != parts[depth]]
    return names


HOW = ["cpu_offload", "disk_offload", "device_map"]


def prompt() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any) -> Any:
    return model.generate(**prompt(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
                          return_dict_in_generate=True, output_logits=True)  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_steering_an_offloaded_model(kind: str, how: str, tmp_path: Path) -> None:
    "The same tokens and logits as the model in memory, wherever the weights rest; and it is as it was afterwards."
    inside, outside = tiny_model(kind), offloaded(kind, how, tmp_path)
    assert any(p.device.type == "meta" for p in outside.parameters()), "something is offloaded"
    before = plain.hooks_on(outside)
    for layer_type in ("decoder_block", "mlp", "input_layernorm"):
        vector = SteeringVector(
            {n: torch.randn(32, generator=torch.Generator().manual_seed(n)) for n in (0, 1, 2)}, layer_type
        )
        for say in [
            {},
            {"min_token_index": 3},
            {"tokens": Tokens.response},
            {"operator": ablation_operator(), "multiplier": [1, 0]},
        ]:
            with vector.apply(inside, prompt=prompt(), **say):
                expected = generate(inside)
            with vector.apply(outside, prompt=prompt(), **say), record_activations(outside) as recorded:
                out = generate(outside)
            assert torch.equal(out.sequences, expected.sequences)
            assert all(plain.far(a, b) < 1e-6 for a, b in zip(out.logits, expected.logits, strict=True))
            assert [len(passes) for passes in recorded.values()] == [4, 4, 4]
        assert plain.far(expected.logits[0][0], generate(inside).logits[0][0]) > 1e-4
    assert plain.hooks_on(outside) == before
    assert all(plain.far(a, b) < 1e-6 for a, b in zip(generate(outside).logits, generate(inside).logits, strict=True))


@pytest.mark.parametrize("how", HOW)
def test_training_on_an_offloaded_model(how: str, tmp_path: Path) -> None:
    pairs = [("I am glad", "I am sad"), ("Hooray", "Oh no")]
    expected = train_steering_vector(tiny_model("llama"), tiny_tokenizer(), pairs)
    vector = train_steering_vector(offloaded("llama", how, tmp_path), tiny_tokenizer(), pairs)
    for n in range(3):
        assert plain.far(vector.layer_activations[n], expected.layer_activations[n]) < 1e-5
        assert vector.layer_activations[n].device.type == "cpu"


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs two GPUs; the meta offload above runs everywhere")
def test_a_model_on_two_devices() -> None:
    model, names = tiny_model("llama"), top(tiny_model("llama"), "model.layers.2")
    spread = dispatch_model(tiny_model("llama"), {name: 0 for name in names} | {"model.layers.2": 1})
    vector = SteeringVector({n: torch.ones(32) for n in range(3)})
    with vector.apply(model, min_token_index=3):
        expected = generate(model)
    with vector.apply(spread, min_token_index=3):
        out = generate(spread)
    assert torch.equal(out.sequences.cpu(), expected.sequences)


@pytest.mark.skipif(not DEVICES, reason="needs a GPU")
def test_a_model_on_a_gpu() -> None:
    model, other = tiny_model("llama"), tiny_model("llama").cuda()
    given = {k: t.cuda() for k, t in prompt().items()}
    for say in [{}, {"min_token_index": 3}, {"tokens": Tokens.response}, {"multiplier": [0, 2]}]:
        with SteeringVector({1: torch.ones(32)}).apply(model, **say), torch.no_grad():
            expected = model(**prompt()).logits
        with SteeringVector({1: torch.ones(32)}).apply(other, **say), torch.no_grad():
            assert plain.far(other(**given).logits.cpu(), expected) < 1e-4


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None or not DEVICES,
    reason="8- and 4-bit models need bitsandbytes and a GPU",
)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model(bits: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", hidden_size=64).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), device_map="cuda"
    )
    given = {k: t.cuda() for k, t in prompt().items()}
    v = torch.randn(64)
    with torch.no_grad(), record_activations(model) as recorded:
        model(**given)
        with SteeringVector({1: v}).apply(model, min_token_index=2):
            model(**given)
    moved = (recorded[1][1] - recorded[1][0]).float().cpu()
    assert torch.allclose(moved[:, 2:], v.expand(2, 4, 64), atol=0.05) and moved[:, :2].abs().max() == 0
