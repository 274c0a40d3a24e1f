"""Models wrapped by peft: the same layers under longer names."""

from typing import Any

import plain
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from steering_vectors import SteeringVector, find_layers, record_activations, train_steering_vector
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.tokens import Tokens

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc2"]}


def wrapped(kind: str) -> Any:
    "A LoRA model whose adapters do something."
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules=TARGETS[kind], task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def prompt() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp"])
def test_steered_generation(kind: str, layer_type: Any) -> None:
    model, g = wrapped(kind), torch.Generator().manual_seed(2)
    directions = {n: torch.randn(32, generator=g) for n in (0, 2)}
    before = plain.hooks_on(model)
    for say, want in [
        ({"min_token_index": 3}, lambda c, own, n: c >= 3),
        ({"tokens": Tokens.response}, lambda c, own, n: own >= n - 1),
    ]:
        with SteeringVector(directions, layer_type).apply(model, prompt=prompt(), **say):
            out = model.generate(**prompt(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
                                 return_dict_in_generate=True, output_logits=True)  # fmt: skip
        named = {"base_model.model." + plain.MODULES[kind][layer_type].format(n): v for n, v in directions.items()}
        for r, pads in enumerate((2, 0)):
            n = 6 - pads
            expected = plain.logits_of_steps(
                model, out.sequences[r], 6, pads, named, lambda c, own, n=n, want=want: want(c, own, n)
            )
            unsteered = plain.logits_of_steps(model, out.sequences[r], 6, pads, {}, lambda c, own: False)
            assert plain.far(torch.stack([s[r] for s in out.logits]), expected) < 1e-5
            assert plain.far(expected, unsteered) > 1e-3
    assert plain.hooks_on(model) == before


def test_layers_and_training() -> None:
    model, inner = wrapped("llama"), tiny_model("llama")
    assert {k: len(v) for k, v in find_layers(model).layers.items()} == {
        k: len(v) for k, v in find_layers(inner).layers.items()
    }
    pairs = [("I am glad", "I am sad"), ("Hooray", "Oh no")]
    vector = train_steering_vector(model, tiny_tokenizer(), pairs)
    tokenizer = tiny_tokenizer()
    for n in range(3):
        name = f"base_model.model.model.layers.{n}"
        ends = [
            [plain.activation(model, torch.tensor(tokenizer(t)["input_ids"]), name) for t in pair] for pair in pairs
        ]
        expected = torch.stack([pos - neg for pos, neg in ends]).mean(0)
        assert plain.far(vector.layer_activations[n], expected) < 1e-5
    other = train_steering_vector(inner, tiny_tokenizer(), pairs)
    assert plain.far(other.layer_activations[2], vector.layer_activations[2]) > 1e-3, "the adapters count"


def test_a_vector_moves_between_the_wrapped_and_the_plain_model() -> None:
    model = wrapped("llama")
    vector, ids = SteeringVector({1: torch.ones(32)}), prompt()["input_ids"]
    with (
        torch.no_grad(),
        model.disable_adapter(),
        vector.apply(model, min_token_index=2),
        record_activations(model) as recorded,
    ):
        inside = model(ids).logits
    inner = tiny_model("llama")
    with torch.no_grad(), vector.apply(inner, min_token_index=2):
        assert plain.far(inside, inner(ids).logits) < 1e-6
    assert list(recorded) == [0, 1, 2]


def test_adapters_train_while_steering() -> None:
    model = wrapped("llama")
    with SteeringVector({1: torch.ones(32)}).apply(model, min_token_index=2):
        model(prompt()["input_ids"]).logits.sum().backward()
    grads = [p.grad.norm() for name, p in model.named_parameters() if "lora_A" in name]
    assert grads and all(g > 0 for g in grads)
