"""Steering and reading written by hand: hooks and loops that use nothing of the library and no cache, to compare with."""

import inspect
from types import SimpleNamespace
from typing import Any

import families
import torch
from families import quiet
from torch import Tensor, nn

STEPS = 3


def prepare(name: str) -> SimpleNamespace:
    "A tiny model of a family, and the batch that its checks read: the first row has two places of padding."
    dtype = torch.float32 if name in families.FLOAT32 else torch.float64
    model = families.build(name).to(dtype)
    rows = 1 if name in families.ONE_ROW else 2
    ids = torch.randint(3, 90, (rows, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return SimpleNamespace(name=name, model=model, ids=ids, mask=mask, dtype=dtype)


def run(name: str) -> None:
    "Build a family and run it once."
    family = prepare(name)
    logits(family.model, family.ids)


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def put_back(output: Any, h: Tensor) -> Any:
    if isinstance(output, Tensor):
        return h
    return output._replace(**{output._fields[0]: h}) if hasattr(output, "_fields") else type(output)([h, *output[1:]])


def added(h: Tensor, v: Tensor, columns: Tensor) -> Tensor:
    "`h` with `v` added where `columns`, a bool (b, s), says so, whatever the layout of streams."
    h, b = h.clone(), columns.shape[0]
    if h.ndim == 4 and h.shape[1] == b and h.shape[0] != b:  # streams come first
        h[:, columns[:, : h.shape[2]]] += v
    else:
        assert h.shape[0] == b, f"a layout that this test does not know: {tuple(h.shape)}"
        h[columns[:, : h.shape[1]]] += v
    return h


def read_by_hand(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    "What a module returns first in one pass."
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(first_tensor(out).detach()))
    logits(model, ids)
    hook.remove()
    return seen[0]


def width(model: nn.Module, name: str, ids: Tensor) -> int:
    "The width of what a module returns."
    return read_by_hand(model, name, ids).shape[-1]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with quiet():
        return (
            model(input_ids=ids, use_cache=False).logits if takes(model, "use_cache") else model(input_ids=ids).logits
        )


def takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def generate(
    model: nn.Module, ids: Tensor, mask: Tensor, steps: int = STEPS, use_cache: bool = True
) -> tuple[Tensor, Tensor]:
    "Greedy tokens (b, s + steps) and the logits of every step (b, steps, vocabulary)."
    with quiet(), torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, use_cache=use_cache,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return out.sequences, torch.stack(list(out.logits), 1)


def by_hand(
    model: nn.Module, name: str, v: Tensor | None, ids: Tensor, mask: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    "The same without a cache: every step reads everything again, and a hook of our own adds `v` at `columns` (b, all)."
    every: list[Tensor] = []
    for _ in range(STEPS):
        hook = model.get_submodule(name).register_forward_hook(
            lambda module, args, out: None if v is None else put_back(out, added(first_tensor(out), v, columns))
        )
        ids, step = generate(model, ids, mask, 1, use_cache=False)
        hook.remove()
        every.append(step)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, torch.cat(every, 1)


def by_hand_cached(
    model: nn.Module, name: str, v: Tensor, ids: Tensor, mask: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    "With the model's own cache, and a hook of our own that counts the columns it has seen."
    seen = 0

    def add(module: nn.Module, args: Any, out: Any) -> Any:
        nonlocal seen
        h = first_tensor(out)
        n = h.shape[2] if h.ndim == 4 and h.shape[1] == len(ids) != h.shape[0] else h.shape[1]
        start = 0 if n > 1 else seen  # a family without a cache reads everything again
        seen = start + n
        return put_back(out, added(h, v, columns[:, start:seen]))

    hook = model.get_submodule(name).register_forward_hook(add)
    try:
        return generate(model, ids, mask)
    finally:
        hook.remove()


def vector(family: Any, name: str) -> Tensor:
    "A random direction as wide as what a module returns."
    n = width(family.model, name, family.ids)
    return torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=family.dtype)
