"""Every family of the installed transformers: its layers are found, steering them does something, and the law holds.

The law: steered with a cache equals steered without one, token by token. Both sides are compared with loops written here,
which use no cache and hooks of their own, on logits of every step in float64.
"""

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers
import versions
from families import quiet
from families_by_hand import (
    STEPS,
    by_hand,
    by_hand_cached,
    first_tensor,
    generate,
    logits,
    prepare,
    put_back,
    read_by_hand,
    run,
    vector,
)
from torch import Tensor

from steering_vectors import Gate, SteeringVector, find_layers, train_steering_vector
from steering_vectors.demo import tiny_tokenizer
from steering_vectors.model.blocks import text_config
from steering_vectors.model.families import LAYER_TYPES
from steering_vectors.model.layers import block_holder
from steering_vectors.steer.tokens import Tokens

CHECKS = ["found", *LAYER_TYPES[1:], "steered", "trained", "cached", "padded", "region", "gated"]
MARKS: dict[str, dict[str, str]] = {}
IMAGE_MARKS: dict[str, str] = {}
LISTED = families.listed()


@pytest.fixture(scope="module", params=sorted(families.CAUSAL))
def family(request: pytest.FixtureRequest) -> Iterator[Any]:
    "A tiny model of each family, with what the checks of one family share."
    name = request.param
    MARKS[name] = {}
    if name in families.CANNOT:
        pytest.skip(families.CANNOT[name])
    versions.skip_if(versions.fault(lambda: run(name), f"the tiny {name} does not run"))
    family = prepare(name)
    family.found = find_layers(family.model)
    yield family


@pytest.fixture(autouse=True)
def mark(request: pytest.FixtureRequest) -> Iterator[None]:
    "Note what came of a check, for the table."
    if "family" not in request.fixturenames:
        yield
        return
    family = request.getfixturevalue("family")
    check = request.node.callspec.params.get("layer_type") or request.node.originalname.removeprefix("test_")
    marks = MARKS[family.name]
    marks[check] = "FAILED"
    request.node.mark_as = lambda text: marks.__setitem__(check, text)
    yield


def ok(request: pytest.FixtureRequest, text: str = "ok") -> None:
    request.node.mark_as(text)


def compare(family: Any, columns: Tensor, ids: Tensor, mask: Tensor, **where: Any) -> None:
    "Steered with a cache against steered by hand without one; what the cache itself changes is measured without steering."
    model, name = family.model, family.found["decoder_block"][1]
    v, cache = vector(family, name), family.name not in families.NO_CACHE
    plain = generate(model, ids, mask, use_cache=cache)
    bare = by_hand(model, name, None, ids, mask, columns)
    noise = float((plain[1] - bare[1]).abs().max())
    wanted = by_hand(model, name, v, ids, mask, columns)
    with SteeringVector({1: v}).apply(model, **where):
        steered = generate(model, ids, mask, use_cache=cache)
    error, effect = float((steered[1] - wanted[1]).abs().max()), float((wanted[1] - bare[1]).abs().max())
    said = f"error {error:.1e}, effect {effect:.1e}, the cache alone {noise:.1e}"
    least = 1e-4 if family.model.dtype == torch.float32 else 1e-7
    same = torch.equal(steered[0], wanted[0]) and error <= least + 4 * noise
    if same and effect > 100 * (error + noise):
        return
    alike = by_hand_cached(
        model, name, v, ids, mask, columns
    )  # where the family's cache is to blame, by hand it is so, too
    off, moved = float((steered[1] - alike[1]).abs().max()), float((alike[1] - plain[1]).abs().max())
    assert torch.equal(steered[0], alike[0]), said
    assert off <= least and moved > 100 * off, f"{said}; {off:.1e} from by hand with a cache, which moves {moved:.1e}"


# --- the checks ------------------------------------------------------------------------------------------------------


def test_found(family: Any, request: pytest.FixtureRequest) -> None:
    "The text decoder's blocks, all of them, each entered in each pass; and what is committed is what is found."
    model, found = family.model, family.found
    entered: list[str] = []
    holder = block_holder(model)
    hooks = [holder.register_forward_pre_hook(lambda m, a: entered.append("holder"))]
    for name in found["decoder_block"].values():
        hooks.append(model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: entered.append(name)))
    logits(model, family.ids)
    for hook in hooks:
        hook.remove()
    assert entered.count("holder") == 1
    assert list(dict.fromkeys(entered[1:])) == list(found["decoder_block"].values())
    if family.name in LISTED:
        assert families.describe(found) == LISTED[family.name]
    ok(request, f"{len(found['decoder_block'])}" + ("" if family.name in LISTED else " new"))


@pytest.mark.parametrize("layer_type", LAYER_TYPES[1:])
def test_part(family: Any, layer_type: str, request: pytest.FixtureRequest) -> None:
    "A part runs where its name says that it runs, and steering it changes the logits; a family without one says so."
    model, names = family.model, family.found[layer_type]
    if not names:
        words = {"self_attn": "attention|attn", "mlp": "mlp|feedforward"}.get(layer_type, "$.")
        inside = [m for name in family.found["decoder_block"].values() for m in model.get_submodule(name).modules()]
        assert family.name == "xlm" or not [m for m in inside if re.search(words, type(m).__name__, re.IGNORECASE)]
        return ok(request, "none")
    order: list[tuple[str, str, int]] = []
    hooks = []
    for kind in ("self_attn", "mlp", layer_type):
        for n, name in family.found[kind].items():
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(lambda m, a, k=kind, n=n: order.append((k, "in", n))))
            hooks.append(module.register_forward_hook(lambda m, a, o, k=kind, n=n: order.append((k, "out", n))))
    plain = logits(model, family.ids)
    for hook in hooks:
        hook.remove()
    for n in names:
        run = [(kind, door) for kind, door, number in order if number == n]
        assert (layer_type, "out") in run, f"block {n} never ran it"
        attention = run.index(("self_attn", "out")) if n in family.found["self_attn"] else None
        mlp = run.index(("mlp", "out")) if n in family.found["mlp"] else len(run)
        if layer_type == "input_layernorm":
            assert run.index((layer_type, "out")) < (mlp if attention is None else attention)
        if layer_type == "post_attention_layernorm":
            assert run.index((layer_type, "out")) < mlp
            assert attention is None or run.index(("self_attn", "in")) < run.index((layer_type, "in"))
    n, name = next(iter(names.items()))
    v = vector(family, name)
    with SteeringVector({n: v}, layer_type).apply(model):
        assert not torch.allclose(logits(model, family.ids), plain, rtol=0, atol=1e-7)
    assert torch.equal(logits(model, family.ids), plain)
    total = len(family.found["decoder_block"])
    ok(request, "ok" if len(names) == total else f"{len(names)}/{total}")


def test_steered(family: Any, request: pytest.FixtureRequest) -> None:
    "One block steered: the logits are those of a hook written by hand, and different from before."
    model, name = family.model, family.found["decoder_block"][1]
    v = vector(family, name)
    plain = logits(model, family.ids)
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, out: put_back(out, first_tensor(out) + v))
    wanted = logits(model, family.ids)
    hook.remove()
    with SteeringVector({1: v}).apply(model):
        steered = logits(model, family.ids)
    assert torch.equal(steered, wanted)
    assert not torch.allclose(steered, plain, rtol=0, atol=1e-7)
    assert torch.equal(logits(model, family.ids), plain)
    ok(request)


def test_trained(family: Any, request: pytest.FixtureRequest) -> None:
    "A batch of texts of several lengths trains the vector that one text at a time does, and that our own hook reads."
    model, found, tokenizer = family.model, family.found, tiny_tokenizer()
    if family.name == "prophetnet":
        with pytest.raises(ValueError, match="Cannot find"), quiet():
            train_steering_vector(model, tokenizer, [("I am glad", "I am sad")])
        return ok(request, "refused")
    pairs = [("I am glad", "I am sad"), ("what a day it is", "no"), ("yes, it is so", "never in my life")]
    with quiet():
        one = train_steering_vector(model, tokenizer, pairs, batch_size=1)
        many = train_steering_vector(model, tokenizer, pairs, batch_size=3)
    wanted: dict[int, Tensor] = {}
    for n, name in found["decoder_block"].items():
        total: list[Tensor] = []
        for pair in pairs:
            for sign, text in zip((1, -1), pair, strict=True):
                ids = tokenizer(text, return_tensors="pt").input_ids
                h = read_by_hand(model, name, ids)
                h = h.transpose(0, 1) if family.name == "xlnet" else h
                h = h.mean(0) if h.ndim == 4 and h.shape[1:3] == ids.shape else h.mean(2) if h.ndim == 4 else h
                total.append(sign * h[0, -1])
        wanted[n] = torch.stack(total).sum(0) / len(pairs)
    assert list(one.layer_activations) == list(wanted)
    for n, v in wanted.items():
        for trained in (one, many):
            got = trained.layer_activations[n]
            assert got.shape == v.shape
            error = float((got - v).norm() / v.norm())
            assert error <= 1e-4, f"layer {n}: {error:.1e}"
    ok(request)


def test_cached(family: Any, request: pytest.FixtureRequest) -> None:
    "The law, for `min_token_index`: a column in the prompt and all after it, generated ones included."
    ids = family.ids
    columns = (torch.arange(ids.shape[1] + STEPS + 1) >= 4).expand(len(ids), -1)
    refused_or(family, request, lambda: compare(family, columns, ids, torch.ones_like(ids), min_token_index=4))


def refused_or(family: Any, request: pytest.FixtureRequest, check: Callable[[], None]) -> None:
    "A family in whose blocks single tokens cannot be told must say so, with nothing left behind; the others must hold."
    if family.name in families.NOT_TEXT:
        ok(request, "not text")
        pytest.skip(families.NOT_TEXT[family.name])
    if family.name not in families.REFUSED:
        check()
        return ok(request)
    name = family.found["decoder_block"][1]
    plain = logits(family.model, family.ids)
    with SteeringVector({1: vector(family, name)}).apply(family.model, min_token_index=4):
        with pytest.raises(ValueError, match="Cannot find"):
            logits(family.model, family.ids)
    assert torch.equal(logits(family.model, family.ids), plain)
    ok(request, "refused")


def test_padded(family: Any, request: pytest.FixtureRequest) -> None:
    "The law, for a batch padded on the left: each row's own second token and everything generated."
    ids, mask = family.ids * family.mask, family.mask
    columns = torch.zeros(len(ids), ids.shape[1] + STEPS + 1, dtype=torch.bool)
    columns[0, 3] = columns[1:, 1] = True
    columns[:, ids.shape[1] :] = True
    where = {"tokens": Tokens.prompt[1:2] | Tokens.generated, "prompt": {"input_ids": ids, "attention_mask": mask}}
    if family.name in families.PADDED_FLOAT32:
        family = SimpleNamespace(**{**vars(family), "model": family.model.float(), "dtype": torch.float32})
    refused_or(family, request, lambda: compare(family, columns, ids, mask, **where))


def test_region(family: Any, request: pytest.FixtureRequest) -> None:
    "The law, for a region: in each row all that comes after a marker, generated tokens included."
    ids, marker = family.ids.clone(), int(family.ids[0, 2])
    ids[1:, 1] = marker
    first = (ids == marker).int().argmax(1, keepdim=True)
    columns = torch.arange(ids.shape[1] + STEPS + 1)[None] > first
    refused_or(
        family, request, lambda: compare(family, columns, ids, torch.ones_like(ids), tokens=Tokens.after(marker))
    )


def test_gated(family: Any, request: pytest.FixtureRequest) -> None:
    "The law, for a gate that reads block 0: one row is steered in its response, and the other not at all."
    model, ids, name = family.model, family.ids, family.found["decoder_block"][0]
    if family.name in families.NOT_TEXT or family.name in families.REFUSED:
        return refused_or(family, request, lambda: None)
    mask, kept = torch.ones_like(ids), []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, out: kept.append(first_tensor(out).detach()))
    generate(model, ids, mask, 1, use_cache=False)  # positions may be counted in another way outside of `generate`
    hook.remove()
    states, prompt = kept[0][:, : ids.shape[1]], {"input_ids": ids, "attention_mask": mask}
    direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    width = getattr(text_config(model), "hidden_size", states.shape[-1])  # BLT names one for each of its parts only
    if states.shape != (*ids.shape, width):  # several streams for each token
        steered = SteeringVector({1: vector(family, family.found["decoder_block"][1])})
        with pytest.raises(ValueError, match="several streams|has width"):
            with steered.apply(model, when=Gate(direction, 0), prompt=prompt):
                logits(model, ids)
        return ok(request, "refused")
    scores = states.double().mean(1) @ direction
    gate = Gate(direction, 0, float(scores.mean()) if len(ids) > 1 else -float("inf"))
    columns = torch.arange(ids.shape[1] + STEPS + 1) >= ids.shape[1] - 1
    columns = columns[None] & (scores > gate.threshold)[:, None]
    assert len(ids) == 1 or 0 < int(columns.any(1).sum()) < len(ids)
    compare(family, columns, ids, mask, when=gate, prompt=prompt)
    ok(request)


@pytest.mark.parametrize("name", sorted(families.IMAGE_TEXT))
def test_image_and_text(name: str) -> None:
    "Models that also see: the list that is found is the one that runs when there is nothing to see."
    if name in families.CANNOT_IMAGE:
        pytest.skip(families.CANNOT_IMAGE[name])
    cannot = versions.fault(lambda: families.build(name, families.IMAGE_TEXT), f"the tiny {name} cannot be built")
    versions.skip_if(cannot)
    model = families.build(name, families.IMAGE_TEXT)
    if name in families.AMBIGUOUS:
        with pytest.raises(ValueError, match="Cannot tell which list holds the decoder blocks"):
            find_layers(model)
        return
    found, listed = find_layers(model), families.listed("image_text")
    IMAGE_MARKS[name] = "FAILED"
    if name in listed:
        assert families.describe(found) == listed[name]
    ran: set[str] = set()
    for block in found["decoder_block"].values():
        model.get_submodule(block).register_forward_hook(lambda m, a, o, block=block: ran.add(block))
    try:
        logits(model, torch.randint(3, 90, (1, 6)))
    except Exception:  # it insists on seeing something; then the committed list is what is compared
        IMAGE_MARKS[name] = "listed"
        assert name in listed
        return
    assert ran == set(found["decoder_block"].values())
    IMAGE_MARKS[name] = "runs"


def test_every_listed_family_is_still_there() -> None:
    "What was found once must not disappear unnoticed."
    missing = set(LISTED) - set(families.CAUSAL)
    if missing and versions.installed() < versions.SINCE:
        pytest.skip(f"transformers {transformers.__version__} does not have {', '.join(sorted(missing))} yet")
    assert not missing, f"no longer in transformers: {sorted(missing)}"
    assert not set(LISTED) & set(families.CANNOT)
    assert len(LISTED) >= 128


def table() -> str:
    "Family x check, and the totals."
    short = {
        "input_layernorm": "in norm",
        "post_attention_layernorm": "post norm",
        "self_attn": "attn",
        "found": "blocks",
    }
    lines = [f"{'family':<26}" + "".join(f"{short.get(check, check):>10}" for check in CHECKS)]
    for name, marks in sorted(MARKS.items()):
        row = (
            "".join(f"{marks.get(check, ''):>10}" for check in CHECKS)
            if marks
            else "  " + families.CANNOT.get(name, "")[:90]
        )
        lines.append(f"{name:<26}{row}")
    built = [marks for marks in MARKS.values() if marks]
    good = [
        sum(marks.get(check, "FAILED") not in ("FAILED", "none", "not text", "") for marks in built) for check in CHECKS
    ]
    lines.append(f"{f'of {len(built)} families':<26}" + "".join(f"{n:>10}" for n in good))
    if IMAGE_MARKS:
        counts = {mark: list(IMAGE_MARKS.values()).count(mark) for mark in ("runs", "listed", "FAILED")}
        lines.append(
            f"image and text: {len(IMAGE_MARKS)} classes found; the blocks found run on text alone in {counts['runs']}, "
            f"compared with the list only in {counts['listed']}, failed in {counts['FAILED']}"
        )
    return "\n".join(lines)
