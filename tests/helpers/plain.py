"""Steering and training written out plainly, to compare with: one text at a time, no padding, no cache, PyTorch's own hooks.

Nothing here calls the library. Every step of a generation is computed from the beginning of its text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def shown(value: object) -> str:
    "A value as the name of a case: its `repr` without addresses, which differ from process to process."
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


Change = Callable[[Tensor, Tensor], Tensor]  # one token's activation (d,), the scaled vector (d,) -> its new activation
Want = Callable[[int, int], bool]  # column of the batch, number in the row -> whether it is steered

# Names of the five outputs of a block, as printed by each family's model; written by hand.
LLAMA = {
    "decoder_block": "model.layers.{}",
    "self_attn": "model.layers.{}.self_attn",
    "mlp": "model.layers.{}.mlp",
    "input_layernorm": "model.layers.{}.input_layernorm",
    "post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
}
MODULES: dict[str, dict[str, str]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"], LLAMA),
    "gpt2": {
        "decoder_block": "transformer.h.{}",
        "self_attn": "transformer.h.{}.attn",
        "mlp": "transformer.h.{}.mlp",
        "input_layernorm": "transformer.h.{}.ln_1",
        "post_attention_layernorm": "transformer.h.{}.ln_2",
    },
    "opt": {
        "decoder_block": "model.decoder.layers.{}",
        "self_attn": "model.decoder.layers.{}.self_attn",
        "mlp": "model.decoder.layers.{}.fc2",
        "input_layernorm": "model.decoder.layers.{}.self_attn_layer_norm",
        "post_attention_layernorm": "model.decoder.layers.{}.final_layer_norm",
    },
    "gpt_neox": {
        "decoder_block": "gpt_neox.layers.{}",
        "self_attn": "gpt_neox.layers.{}.attention",
        "mlp": "gpt_neox.layers.{}.mlp",
        "input_layernorm": "gpt_neox.layers.{}.input_layernorm",
        "post_attention_layernorm": "gpt_neox.layers.{}.post_attention_layernorm",
    },
    "falcon": {  # one norm for both halves of a block, so there is none after attention
        "decoder_block": "transformer.h.{}",
        "self_attn": "transformer.h.{}.self_attention",
        "mlp": "transformer.h.{}.mlp",
        "input_layernorm": "transformer.h.{}.input_layernorm",
    },
}


def add(h: Tensor, v: Tensor) -> Tensor:
    return h + v


def ablate(h: Tensor, v: Tensor) -> Tensor:
    h32, v32 = h.to(torch.promote_types(h.dtype, torch.float32)), v.to(torch.promote_types(v.dtype, torch.float32))
    return (h32 - (h32 @ v32) / (v32 @ v32) * v32).to(h.dtype)


def ablate_then_add(h: Tensor, v: Tensor) -> Tensor:
    return ablate(h, v) + v


@contextmanager
def steered(
    model: nn.Module, vectors: Mapping[str, Tensor], columns: Sequence[int], change: Change = add
) -> Iterator[None]:
    "While open, the outputs of the named modules are changed at the given columns, for one row of text."

    def hook_for(v: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            flat = h.reshape(-1, h.shape[-1])  # one row, so a flattened layout is the same
            rows = [change(token, v.to(token.dtype)) if c in columns else token for c, token in enumerate(flat)]
            new = torch.stack(rows).reshape(h.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(hook_for(v)) for name, v in vectors.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits(
    model: nn.Module,
    ids: Tensor,  # (s,) one text, no padding
    vectors: Mapping[str, Tensor],  # module name to (d,), multiplied already
    columns: Sequence[int],  # which of its tokens to steer
    change: Change = add,
    **inputs: Any,
) -> Tensor:  # (s, vocabulary)
    "The logits of one text in one pass without a cache."
    with torch.no_grad(), steered(model, vectors, columns, change):
        return model(input_ids=ids[None], use_cache=False, **inputs).logits[0]


def logits_of_steps(
    model: nn.Module,
    row: Tensor,  # (columns,) prompt and answer, padding on the left included
    prompt: int,  # columns of the prompt
    pads: int,  # columns of padding
    vectors: Mapping[str, Tensor],  # module name to (d,), multiplied already
    want: Want,
    change: Change = add,
) -> Tensor:  # (steps, vocabulary)
    "The logits that decided each token of the answer, every one from a pass of its own over the text so far."
    steps = []
    for end in range(prompt, len(row)):
        columns = [c - pads for c in range(pads, end) if want(c, c - pads)]
        steps.append(logits(model, row[pads:end], vectors, columns, change)[-1])
    return torch.stack(steps)


def activation(model: nn.Module, ids: Tensor, name: str, read: int | slice = -1) -> Tensor:  # (d,), or (s, d)
    "What the named module returned at one token of one text, or at several."
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        kept.append(h.detach().reshape(-1, h.shape[-1])[read].clone())  # Falcon adds to it in place, later

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
    handle.remove()
    return kept[0]


def hooks_on(model: nn.Module) -> int:
    "How many forward hooks of any kind are on the model."
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def far(a: Tensor, b: Tensor) -> float:
    "The largest difference, relative to the largest number."
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
