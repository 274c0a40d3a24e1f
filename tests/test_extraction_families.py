"""Every text family of the installed transformers: what extraction reads is what the plain model computes, and which way it went."""

import collections
from typing import Any

import families
import pytest
import torch
import versions
from families import quiet
from families_by_hand import run
from test_extraction import HEAD, apart, by_hand

from steering_vectors import extract_activations
from steering_vectors.demo import tiny_tokenizer
from steering_vectors.model.layers import resolve_layers
from steering_vectors.train.strategies import _verdicts

WAYS: dict[str, str] = {}
PAIRS = [(f"{HEAD}I am {good}", f"{HEAD}I am {bad}") for good, bad in [
    ("glad to be here", "sad to be here"), ("glad to see all of you here again today", "sad"), ("so glad", "no fool"),
]]  # fmt: skip
EXPECTED = {"packed": 115, "continued": 25}  # at least so many families

# What a family computes in the middle of a block that our own loop cannot tell from outside.
CANNOT = {
    **families.CANNOT,
    **families.REFUSED,
    "reformer": "its hashing needs lengths that are multiples of its chunks",
    "cpmant": "it puts 32 tokens of its own in front, which the loop here does not know",
}


@pytest.mark.parametrize("name", sorted(families.CAUSAL))
def test_family(name: str) -> None:
    if name in CANNOT:
        pytest.skip(CANNOT[name])
    versions.skip_if(versions.fault(lambda: run(name), f"the tiny {name} does not run"))
    versions.skip_if(
        versions.fault(lambda: same_without_a_cache(name), f"{name} computes another thing when it keeps a cache")
    )
    with quiet():
        model: Any = families.build(name).to(torch.float32)
        extract_activations(
            model, tiny_tokenizer(), PAIRS, read_token_index=5
        )  # what is found here must hold at the end
        found = extract_activations(model, tiny_tokenizer(), PAIRS)
        names = dict(resolve_layers(model, "decoder_block"))
        wanted = [plain(model, names, [pair[side] for pair in PAIRS]) for side in (0, 1)]
    way = list(_verdicts[model].values())[-1].strategy
    WAYS[name] = way.kind
    if found[0][0].shape != wanted[0][0].shape:
        pytest.skip("its blocks return several streams a token, which the loop here does not tell apart")
    for side in (0, 1):
        for n in names:
            assert apart(found[side][n], wanted[side][n]) <= 2e-5, (str(way), n)


def same_without_a_cache(name: str) -> None:
    "Fails where one pass that keeps a cache is not the pass that keeps none; only older versions have such families."
    model, ids = families.build(name).to(torch.float32), torch.arange(5, 95)[None]
    try:
        with quiet(), torch.no_grad():
            kept, none = (model(ids, use_cache=keep).logits for keep in (True, False))
    except (TypeError, ValueError, RuntimeError):
        return  # it does not take the argument, or these ids
    assert torch.allclose(kept, none, atol=1e-4), f"{float((kept - none).abs().max()):.1e} apart"


def plain(model: Any, names: dict[int, str], texts: list[str]) -> dict[int, torch.Tensor]:
    try:
        return by_hand(model, names, texts, lambda n: [n - 1])
    except (RuntimeError, IndexError, ValueError):
        pytest.skip("its blocks return something that the loop here does not know")


def test_ways() -> None:
    "How many families go which way: python -m pytest tests/test_extraction_families.py -s"
    if len(WAYS) < 100:
        pytest.skip("only where all families ran")
    if versions.installed() < versions.SINCE:
        pytest.skip("the numbers are those of the families that newer versions of transformers have")
    counts = collections.Counter(WAYS.values())
    for kind in counts:
        chosen = [name for name, way in WAYS.items() if way == kind]
        print(f"\n{kind}: {len(chosen)} families" + ("" if kind == "packed" else ": " + ", ".join(chosen)))
    for kind, number in EXPECTED.items():
        assert counts[kind] >= number, counts
