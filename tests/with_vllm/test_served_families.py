"""Other families: per request by the plugin, and baked into a plain checkpoint. Both equal the model under `apply`."""

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
        return tiny_model(kind, hidden_size=engines.WIDE)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BY_HAND[kind](), dtype=torch.float32).eval()


def jobs() -> list[list[int]]:
    return [tiny_tokenizer()(text)["input_ids"] for text in engines.texts(4)]


@pytest.mark.parametrize("kind", families(PER_REQUEST))
def test_steered_per_request(folder: Any, kind: str) -> None:
    model, size = made(kind), 4.0 * LONGER.get(kind, 1)
    have = {
        "joy": engines.directions(engines.WIDE, [0, 1, 2], size, 0),
        "calm": engines.directions(engines.WIDE, [1], size, 1),
    }
    files = {name: engines.saved(folder, f"{kind}_{name}", v) for name, v in have.items()}
    order = [(name, ids) for name in ("none", "response", "two vectors", "columns") for ids in jobs()]
    wanted = [engines.expected(model, ids, NEW, engines.steerings(name, have)) for name, ids in order]
    for i in (4, 8, 12):  # each kind shows; a prompt may be too long for a window of attention to reach what is steered
        assert max(engines.apart(w, plain) for w, plain in zip(wanted[i : i + 4], wanted[:4], strict=True)) > 1e-2
    path = engines.checkpoint(folder / f"plain_{kind}", model)
    with engines.engine(path, additional_config={"steering_vectors": files}) as llm:
        outs = engines.generate(llm, [(ids, engines.asked(name, have)) for name, ids in order], NEW)
    far = [engines.apart(engines.scores(out), want) for out, want in zip(outs, wanted, strict=True)]
    engines.report(f"{kind}: {len(order)} requests, largest difference {max(far):.1e}")
    assert max(far) < engines.CLOSE, far


@pytest.mark.parametrize("kind", families(BAKED))
def test_a_baked_checkpoint_needs_no_plugin(folder: Any, kind: str) -> None:
    model, prompts = made(kind), jobs()
    vector = SteeringVector(engines.directions(engines.WIDE, [1, 2], 4.0, 0).layer_activations)
    wanted = [engines.expected(model, ids, NEW, [("baked", vector.steering(multiplier=1.5))]) for ids in prompts]
    plain = [engines.expected(model, ids, NEW, []) for ids in prompts]
    assert all(engines.apart(a, b) > 1e-2 for a, b in zip(wanted, plain, strict=True))
    path = engines.checkpoint(folder / f"baked_{kind}", vector.bake(model, 1.5, **BAKED[kind]))
    with engines.engine(path) as llm:
        outs = engines.generate(llm, [(ids, None) for ids in prompts], NEW)
    far = [engines.apart(engines.scores(out), want) for out, want in zip(outs, wanted, strict=True)]
    engines.report(f"{kind} baked: largest difference {max(far):.1e}")
    assert max(far) < engines.CLOSE, far
