"""Layers of models that stand inside something else, or are built another way than the families' own classes."""

import families
import pytest
import torch
from families import quiet
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaModel, T5Config, T5ForConditionalGeneration

from steering_vectors import SteeringVector, find_layers
from steering_vectors.demo import tiny_model
from steering_vectors.model.blocks import unwrap
from steering_vectors.model.families import LAYER_TYPES
from steering_vectors.model.layers import block_holder, resolve_layers

IDS = torch.tensor([[1, 20, 30, 40]])


def wrapped(how: str, model: nn.Module) -> nn.Module:
    if how == "compiled":
        return torch.compile(model)
    if how == "data parallel":
        return nn.DataParallel(model)
    peft = pytest.importorskip("peft")
    if how == "lora":
        with quiet():
            return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    with quiet():
        return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("how", ["compiled", "data parallel", "lora", "prompt tuning"])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_a_wrapped_model_has_the_same_layers(how: str, layer_type: str) -> None:
    model = tiny_model("llama")
    plain = {n: model.get_submodule(name) for n, name in resolve_layers(model, layer_type).items()}
    outer = wrapped(how, model)
    names = resolve_layers(outer, layer_type)
    assert {n: outer.get_submodule(name) for n, name in names.items()} == plain
    assert unwrap(outer)[0] is model
    assert block_holder(outer) is model.model


def test_a_wrapped_model_takes_templates_with_its_prefix_or_without() -> None:
    model = wrapped("lora", tiny_model("llama"))
    wanted = {n: f"base_model.model.model.layers.{n}.mlp" for n in range(3)}
    for template in ("model.layers.{num}.mlp", "base_model.model.model.layers.{num}.mlp"):
        assert resolve_layers(model, "mlp", {"mlp": template}) == wanted
    assert (
        resolve_layers(
            model, "mlp", {"mlp": lambda whole, n: f"{'base_model.model.' * (whole is model)}model.layers.{n}.mlp"}
        )
        == wanted
    )


def test_steering_a_lora_model_is_steering_the_model_in_it() -> None:
    model = tiny_model("llama")
    vector = SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with vector.apply(model):
            wanted = model(input_ids=IDS).logits
        outer = wrapped("lora", model)  # LoRA begins as the identity
        with vector.apply(outer):
            steered = outer(input_ids=IDS).logits
        after = outer(input_ids=IDS).logits
    assert torch.equal(steered, wanted) and not torch.equal(steered, before)
    assert torch.equal(after, before)


def test_base_models_have_the_layers_of_their_language_models() -> None:
    whole = tiny_model("llama")
    assert isinstance(whole.model, LlamaModel)
    assert resolve_layers(whole.model, "self_attn") == {n: f"layers.{n}.self_attn" for n in range(3)}
    assert block_holder(whole.model) is whole.model


def test_of_an_encoder_and_a_decoder_the_decoder_is_meant() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=5, num_decoder_layers=3, vocab_size=99)
    )
    found = find_layers(t5)
    assert found["decoder_block"] == {n: f"decoder.block.{n}" for n in range(3)}
    assert found["self_attn"][0] == "decoder.block.0.layer.0.SelfAttention"
    assert found["mlp"][0] == "decoder.block.0.layer.2.DenseReluDense"
    size = dict(
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=99,
    )
    bart = BartForConditionalGeneration(BartConfig(encoder_layers=5, decoder_layers=3, **size))
    assert resolve_layers(bart, "decoder_block") == {n: f"model.decoder.layers.{n}" for n in range(3)}


def test_a_stack_cut_short_is_still_found() -> None:
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:2]
    assert list(resolve_layers(model, "decoder_block")) == [0, 1]


@pytest.mark.parametrize("name", ["falcon", "opt"])
def test_what_a_family_has_follows_its_config(name: str) -> None:
    "Falcon's parallel blocks have one norm, its serial ones two; OPT norms before its parts or after them."
    changed = {
        "falcon": {"new_decoder_architecture": False, "parallel_attn": False},
        "opt": {"do_layer_norm_before": False},
    }[name]
    before = find_layers(families.build(name))
    families.MORE[name], kept = families.MORE.get(name, {}) | changed, families.MORE.get(name)
    try:
        after = find_layers(families.build(name))
    finally:
        families.MORE.pop(name) if kept is None else families.MORE.__setitem__(name, kept)
    if name == "falcon":
        assert not before["post_attention_layernorm"] and after["post_attention_layernorm"]
    else:
        assert before["post_attention_layernorm"][0].endswith("final_layer_norm") and before["input_layernorm"]
        assert after["post_attention_layernorm"][0].endswith("self_attn_layer_norm") and not after["input_layernorm"]


@pytest.mark.parametrize(
    "layer_config",
    [{"mlp": "model.layers.{}.mlp"}, {"mlp": 3}, {"mlps": "model.layers.{num}.mlp"}, {"mlp": "nothing.{num}"}],
)
def test_a_config_that_cannot_be_is_refused(layer_config: dict) -> None:
    with pytest.raises((ValueError, TypeError), match="layer_config|Unknown layer_type"):
        resolve_layers(tiny_model("llama"), "mlp", layer_config)
