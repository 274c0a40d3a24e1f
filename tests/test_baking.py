"""Baking over every family: the copy equals the steered model, or the reason is said; and a saved copy is the same model."""

import json
import warnings
from pathlib import Path

import families
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteForCausalLM

from steering_vectors import SteeringVector, ablation_operator, find_layers, record_activations
from steering_vectors.baking import bake, probe, steered
from steering_vectors.demo import tiny_model

EXPECTED = json.loads(Path(__file__).with_name("baking.json").read_text())
PLACES = [(t, None) for t in ("decoder_block", "mlp", "self_attn")] + [
    (t, ablation_operator()) for t in ("mlp", "self_attn")
]


@pytest.fixture(autouse=True)
def one_thread():
    "Logits are compared bit for bit below, and with several threads the order of a sum differs from run to run."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def direction(d, seed=1, scale=1.0):
    return scale * torch.randn(d, generator=torch.Generator().manual_seed(seed))


def outcome(model, layer_type, operator, folder=None):
    "bias, llama or the beginning of the reason; what succeeds is compared here with the hooks again, after a save."
    names = find_layers(model)[layer_type]
    if not names:
        return "no such layers"
    n = sorted(names)[len(names) // 2]
    with torch.no_grad(), record_activations(model, layer_type) as seen:
        probe(model)
    d = seen[n][0].shape[-1]
    for as_llama in (False, True):
        try:
            with families.quiet():
                baked = bake(model, {n: direction(d)}, layer_type, 1.5, operator=operator, as_llama=as_llama)
        except ValueError as e:
            reason = str(e)
            if "as_llama=True writes" not in reason:
                break
            continue
        wanted = steered(model, {n: direction(d)}, (layer_type, None), [(operator, 1.5)])
        if (wanted - probe(model)).abs().max() < 1e-4 * wanted.abs().max():
            return "no effect to compare"
        assert (probe(baked) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        if folder is not None:
            with families.quiet():
                baked.save_pretrained(folder)
                served = type(baked).from_pretrained(folder)
            assert torch.equal(probe(served), probe(baked))
        return "as Llama" if as_llama else "yes"
    for words, short in {
        "has last gone through": "no: a norm or experts come last",
        "the copy differs": "no: not a sum",
        "as_llama": "no: no bias",
    }.items():
        if words in reason:
            return short
    return "no: not Llama" if "differ in" in reason else reason


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_what_can_be_baked_is_equal_and_what_cannot_says_why(name, tmp_path):
    model = families.build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_json_string()
    got = {
        f"{t}{'' if op is None else ' ablation'}": outcome(model, t, op, tmp_path / str(k))
        for k, (t, op) in enumerate(PLACES)
    }
    assert got == EXPECTED[name]
    assert model.config.to_json_string() == config and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_type_and_many_layers(kind, dtype):
    model = tiny_model(kind, dtype=dtype)
    v = SteeringVector({n: direction(32, n, 0.5).to(dtype) for n in range(3)})
    for multiplier in (1.0, -2.5):
        baked = v.bake(model, multiplier)
        assert {p.dtype for p in baked.parameters()} == {dtype}
        with torch.no_grad(), v.apply(model, multiplier=multiplier):
            wanted = model(torch.arange(3, 23)[None]).logits.double()
        error = (baked(torch.arange(3, 23)[None]).logits.double() - wanted).abs().max() / wanted.abs().max()
        assert error < (1e-5 if dtype.itemsize >= 4 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fraction", [1.0, 0.4, 2.0])
@pytest.mark.parametrize("layer_type", ["mlp", "self_attn"])
def test_ablation_of_every_type(dtype, fraction, layer_type):
    for kind in ("llama", "gpt2", "gemma2", "opt"):
        v = SteeringVector({n: direction(32, n, 7.0).to(dtype) for n in range(3)}, layer_type)
        baked = v.bake(tiny_model(kind, dtype=dtype), operator=ablation_operator(fraction))
        assert {p.dtype for p in baked.parameters()} == {dtype}


def test_generation_is_the_steered_generation():
    model, v = tiny_model("gpt2"), SteeringVector({1: direction(32, scale=5.0)})
    ids = torch.arange(3, 11).view(2, 4)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    with v.apply(model, multiplier=2):
        wanted = model.generate(ids, **options)
    assert torch.equal(v.bake(model, 2).generate(ids, **options), wanted)
    assert not torch.equal(model.generate(ids, **options), wanted)


def test_negative_layers_and_zero():
    model = tiny_model("llama")
    assert torch.equal(probe(bake(model, {-1: direction(32)}, "decoder_block", 0)), probe(model))
    a, b = (bake(model, {n: direction(32)}, "decoder_block") for n in (-1, 2))
    assert torch.equal(probe(a), probe(b))


def test_a_steered_model_gives_a_plain_copy_or_none():
    model, v = tiny_model("gpt2").train(), SteeringVector({1: direction(32)})
    state = torch.get_rng_state()
    plain = probe(model)
    handle = v.patch(model, multiplier=0)
    baked = v.bake(model)
    handle.remove()
    assert not any(m._forward_hooks for m in baked.modules()) and torch.equal(torch.get_rng_state(), state)
    assert model.training and not baked.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(probe(model), plain)


def test_tied_weights_stay_tied(tmp_path):
    model = tiny_model("gpt2")
    baked = bake(model, {1: direction(32)}, "decoder_block")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (baked.get_output_embeddings().weight is baked.get_input_embeddings().weight) == tied
    assert baked.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_a_switched_on_bias_survives_the_checkpoint(tmp_path):
    baked = bake(tiny_model("llama"), {1: direction(32)}, "decoder_block")
    baked.save_pretrained(tmp_path)
    served = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert served.config.mlp_bias is True and torch.equal(probe(served), probe(baked))
    bias = served.model.layers[1].mlp.down_proj.bias
    torch.testing.assert_close(bias.detach(), direction(32))
    assert not served.model.layers[0].mlp.down_proj.bias.any()


def test_mistral_and_qwen_become_llamas(tmp_path):
    for kind in ("mistral", "qwen2"):
        model = tiny_model(kind)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            baked = bake(model, {1: direction(32)}, "decoder_block", as_llama=True)
        assert baked.config.model_type == "llama" and type(baked).__name__ == "LlamaForCausalLM"
        window = getattr(model.config, "sliding_window", None)
        if window is not None and window < model.config.max_position_embeddings:
            assert baked.config.max_position_embeddings == window and f"up to {window} tokens" in str(heard[0].message)
        baked.save_pretrained(tmp_path / kind)
        served = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        wanted = steered(model, {1: direction(32)}, ("decoder_block", None), [(None, 1.0)])
        assert (probe(served) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind, layer_type, options, error, words", [
    ("gemma2", "decoder_block", {}, ValueError, "post_feedforward_layernorm (Gemma2RMSNorm)"),
    ("qwen3", "decoder_block", {}, ValueError, "builds model.layers.1.mlp.down_proj without a bias"),
    ("qwen3", "decoder_block", {"as_llama": True}, ValueError, "differ in model.layers.0.self_attn."),
    ("gpt2", "decoder_block", {"as_llama": True}, ValueError, "differ in"),
    ("llama", "input_layernorm", {}, ValueError, "input_layernorm (LlamaRMSNorm)"),
    ("llama", "decoder_block", {"operator": ablation_operator()}, ValueError, "the skip path carries the component past"),
    ("gpt2", "input_layernorm", {"operator": ablation_operator()}, ValueError, "the skip path"),
    ("llama", "mlp", {"operator": lambda h, v: v}, ValueError, "cannot be baked: weights can add the vector"),
    ("llama", "decoder_block", {"multiplier": [1.0, 2.0]}, ValueError, "one multiplier"),
    ("llama", "decoder_block", {"multiplier": float("nan")}, ValueError, "one multiplier"),
])  # fmt: skip
def test_what_cannot_be_baked_says_why(kind, layer_type, options, error, words):
    with pytest.raises(error) as e:
        bake(tiny_model(kind), {1: direction(32)}, layer_type, **options)
    assert words in str(e.value)


def test_wrong_vectors_and_models_are_refused():
    with pytest.raises(ValueError, match="Layer 7 does not exist"):
        bake(tiny_model("llama"), {7: direction(32)}, "decoder_block")
    with pytest.raises(ValueError, match="16"):
        bake(tiny_model("llama"), {1: direction(16)}, "decoder_block")
    with pytest.raises(TypeError, match="no transformers model"):
        bake(nn.Linear(2, 2), {1: direction(32)}, "decoder_block")


def test_a_factor_after_the_map_is_noticed():
    config = families.tiny_config("granite")
    config.residual_multiplier = 0.22
    model = GraniteForCausalLM(config).eval()
    with pytest.raises(ValueError, match="GraniteForCausalLM cannot be baked at `decoder_block`: the copy differs"):
        bake(model, {1: direction(32)}, "decoder_block")
    bake(model, {1: direction(32)}, "mlp")


def test_the_guide_names_the_families():
    page = (Path(__file__).parents[1] / "nbs" / "guide" / "bake.ipynb").read_text()
    for answer, words in {"yes": "**yes**", "as Llama": "**as a Llama**"}.items():
        names = [name for name, places in EXPECTED.items() if places["decoder_block"] == answer]
        assert f"{words}, {len(names)} " in page and ", ".join(names) in page
    assert f"each of the {len(EXPECTED)} text families" in page


def test_a_layer_norm_with_a_bias_takes_the_vector():
    for kind in ("gpt2", "opt"):
        baked = bake(tiny_model(kind), {1: direction(32)}, "input_layernorm", 2.0)
        wanted = steered(tiny_model(kind), {1: direction(32)}, ("input_layernorm", None), [(None, 2.0)])
        assert (probe(baked) - wanted).abs().max() < 1e-5 * wanted.abs().max()


if __name__ == "__main__":  # write the list anew; read the difference before you commit it
    table = {}
    for family in sorted(families.listed()):
        made = families.build(family)
        table[family] = {f"{t}{'' if op is None else ' ablation'}": outcome(made, t, op) for t, op in PLACES}
    Path(__file__).with_name("baking.json").write_text(json.dumps(table, indent=1) + "\n")
