"""Another default device: no tensor is made where nobody said, so that nothing mixes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import steering_vectors
from steering_vectors import SteeringVector, train_steering_vector
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.steer.tokens import Tokens

MAKERS = {getattr(torch, name) for name in (
    "tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange", "rand", "randn", "randint", "linspace", "eye", "scalar_tensor",
)}  # fmt: skip
OURS = str(Path(steering_vectors.__file__).parent)
X = torch.tensor([[5, 9, 17, 33, 12], [5, 9, 17, 33, 12]])
LEFT = {
    "input_ids": torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 9]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


class Elsewhere(TorchFunctionMode):
    "While open, tensors that our modules make without a device have no numbers, as if the default device were another."

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (
            func in MAKERS
            and kwargs.get("device") is None
            and not (func is torch.as_tensor and isinstance(args[0], torch.Tensor))
        ):
            if sys._getframe(1).f_code.co_filename.startswith(OURS):
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


SAYS: list[dict[str, Any]] = [
    {}, {"min_token_index": 3}, {"token_indices": [1, 4, 6]}, {"token_indices": slice(1, 6, 2)}, {"token_indices": torch.tensor([1, 0, 1, 0, 1, 1])},
    {"token_indices": [-1, -2]}, {"tokens": Tokens.response}, {"tokens": Tokens.all[1::2]}, {"tokens": Tokens.prompt[-2:] | Tokens.generated[:2]},
    {"tokens": Tokens.all - [33]}, {"multiplier": [1.0, 0.0]}, {"multiplier": [1.0, 2.0], "tokens": Tokens.prompt[0]},
]  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("say", SAYS, ids=str)
def test_generation_under_another_default_device(say: dict[str, Any], how: dict[str, Any]) -> None:
    model = tiny_model("llama")
    vector = SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **how}
    outs = []
    for mode in (None, Elsewhere()):
        handle = vector.apply(model, **say, prompt=LEFT)
        if mode is None:
            with handle:
                outs.append(model.generate(**LEFT, **options))
        else:
            with mode, handle:
                outs.append(model.generate(**LEFT, **options))
    assert torch.equal(*outs)


def test_single_passes_under_another_default_device() -> None:
    "Rows without a mask, lengths only, embeddings, positions."
    model = tiny_model("llama")
    vector = SteeringVector({1: torch.ones(32)})
    embeds = model.get_input_embeddings()(X).detach()
    longer = torch.cat([torch.ones(2, 3, 32), embeds], 1)
    ragged = torch.tensor([[5, 9, 17, 33, 12], [6, 7, 0, 0, 0]])
    calls: list[tuple[Any, Any]] = [
        (lambda: model(X), None), (lambda: model(X), X), (lambda: model(inputs_embeds=embeds), X), (lambda: model(inputs_embeds=longer), X),
        (lambda: model(X, position_ids=torch.arange(5, 10).expand(2, -1)), None), (lambda: model(ragged), [[5, 9, 17, 33, 12], [6, 7]]),
    ]  # fmt: skip
    with torch.no_grad():
        for call, prompt in calls:
            with vector.apply(model, tokens=Tokens.response, prompt=prompt):
                wanted = call().logits
            with vector.apply(model, tokens=Tokens.response, prompt=prompt), Elsewhere():
                assert torch.equal(call().logits, wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_reading_under_another_default_device(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    pairs = [("I am glad", "I am sad"), ("what a day it is", "no")]
    wanted = train_steering_vector(model, tokenizer, pairs)
    with Elsewhere():
        found = train_steering_vector(model, tokenizer, pairs)
    assert all(torch.allclose(found.layer_activations[n], v, atol=1e-6) for n, v in wanted.layer_activations.items())


def test_a_tensor_made_without_a_device_would_be_seen() -> None:
    scope: dict[str, Any] = {"torch": torch}
    exec(compile("def make():\n    return torch.ones(1)", f"{OURS}/positions.py", "exec"), scope)
    with Elsewhere():
        assert scope["make"]().is_meta and not torch.ones(1).is_meta
