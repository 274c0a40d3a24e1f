"""Other families: per request by the plugin, and baked into a plain checkpoint. Both equal the model under `apply`."""

import functools
from typing import Any

import engines
import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, OPTConfig, PhiConfig, Starcoder2Config

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model, tiny_tokenizer

NEW = 8
SIZES = {"hidden_size": engines.WIDE, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512}
WIDER = {"intermediate_size": 2 * engines.WIDE, "initializer_range": 0.2}
BY_HAND: dict[str, Any] = {
    "phi": lambda: PhiConfig(**SIZES, **ENDS, **WIDER, partial_rotary_factor=0.5),
    "starcoder2": lambda: Starcoder2Config(**SIZES, **ENDS, **WIDER, num_key_value_heads=2),
    "granite": lambda: GraniteConfig(
        **SIZES, **ENDS, **WIDER, num_key_value_heads=2, mlp_bias=True, attention_multiplier=32**-0.5
    ),
    "opt": lambda: OPTConfig(
        **SIZES, **ENDS, ffn_dim=256, word_embed_proj_dim=engines.WIDE, init_std=0.2, do_layer_norm_before=True
    ),
}
BAKED = {
    "gpt2": {},
    "qwen2": {"as_llama": True},
    "opt": {},
    "phi": {},
    "gpt_neox": {},
    "starcoder2": {},
    "llama": {},
    "granite": {},
}
PER_REQUEST = ["gpt2", "qwen2", "gpt_neox", "opt", "phi", "starcoder2", "granite", "mistral", "qwen3", "phi3", "gemma2"]
LONGER = {"gemma2": 10}  # its hidden states are ten times as long
QUICK = {"gpt2", "qwen2"}


def families(names: Any) -> list[Any]:
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in names]


def made(kind: str) -> Any:
    if kind not in BY_HAND:
        model = tiny_model(kind, hidden_size=engines.WIDE)
        model.set_attn_implementation("eager")  # the other one of transformers leaves out the softcap of Gemma 2
        return model
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BY_HAND[kind](), dtype=torch.float32).eval()


def jobs() -> list[list[int]]:
    return [tiny_tokenizer()(text)["input_ids"] for text in engines.texts(4)]


@functools.cache
def per_request(kind: str) -> tuple[Any, dict[str, SteeringVector], list[tuple[str, list[int]]], list[Any]]:
    "A model, vectors, requests, and what transformers answers to them."
    model, size = made(kind), 4.0 * LONGER.get(kind, 1)
    have = {
        "joy": engines.directions(engines.WIDE, [0, 1, 2], size, 0),
        "calm": engines.directions(engines.WIDE, [1], size, 1),
    }
    order = [(name, ids) for name in ("none", "response", "two vectors", "columns") for ids in jobs()]
    wanted = [engines.expected(model, ids, NEW, engines.steerings(name, have)) for name, ids in order]
    for i in (4, 8, 12):  # each kind shows; a prompt may be too long for a window of attention to reach what is steered
        assert max(engines.apart(w, plain) for w, plain in zip(wanted[i : i + 4], wanted[:4], strict=True)) > 1e-2
    return model, have, order, wanted


@functools.cache
def baked(kind: str) -> tuple[Any, list[Any]]:
    "A baked model, and what transformers answers with the vector that is in it."
    model, vector = made(kind), engines.directions(engines.WIDE, [1, 2], 4.0, 0)
    wanted = [engines.expected(model, ids, NEW, [("baked", vector.steering(multiplier=1.5))]) for ids in jobs()]
    plain = [engines.expected(model, ids, NEW, []) for ids in jobs()]
    assert all(engines.apart(a, b) > 1e-2 for a, b in zip(wanted, plain, strict=True))
    return vector.bake(model, 1.5, **BAKED[kind]), wanted


@pytest.fixture(scope="module", autouse=True)
def transformers_first(request: pytest.FixtureRequest) -> None:
    "vLLM runs some families by the classes of transformers, and changes these classes for the rest of the process."
    cases = {"test_steered_per_request": per_request, "test_a_baked_checkpoint_needs_no_plugin": baked}
    for item in request.session.items:
        if getattr(item, "originalname", None) in cases:
            cases[item.originalname](item.callspec.params["kind"])


@pytest.mark.parametrize("kind", families(PER_REQUEST))
def test_steered_per_request(folder: Any, kind: str) -> None:
    model, have, order, wanted = per_request(kind)
    files = {name: engines.saved(folder, f"{kind}_{name}", v) for name, v in have.items()}
    path = engines.checkpoint(folder / f"plain_{kind}", model)
    with engines.engine(path, additional_config={"steering_vectors": files}) as llm:
        outs = engines.generate(llm, [(ids, engines.asked(name, have)) for name, ids in order], NEW)
    far = [engines.apart(engines.scores(out), want) for out, want in zip(outs, wanted, strict=True)]
    engines.report(f"{kind}: {len(order)} requests, largest difference {max(far):.1e}")
    assert max(far) < engines.CLOSE, far


@pytest.mark.parametrize("kind", families(BAKED))
def test_a_baked_checkpoint_needs_no_plugin(folder: Any, kind: str) -> None:
    model, wanted = baked(kind)
    path = engines.checkpoint(folder / f"baked_{kind}", model)
    with engines.engine(path) as llm:
        outs = engines.generate(llm, [(ids, None) for ids in jobs()], NEW)
    far = [engines.apart(engines.scores(out), want) for out, want in zip(outs, wanted, strict=True)]
    engines.report(f"{kind} baked: largest difference {max(far):.1e}")
    assert max(far) < engines.CLOSE, far
