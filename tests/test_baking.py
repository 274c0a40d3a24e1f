"""Baking over every family: the copy equals the steered model, or the reason is said; and a saved copy is the same model."""

import json
import warnings
from pathlib import Path

import families
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteForCausalLM

from steering_vectors import Steering, SteeringVector, ablation_operator, find_layers, record_activations
from steering_vectors.demo import tiny_model
from steering_vectors.vectors.baking import bake, probe, steered_logits
from steering_vectors.vectors.checkpoints import plain_copy

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
                baked = bake(
                    model,
                    SteeringVector({n: direction(d)}, layer_type).steering(operator=operator, multiplier=1.5),
                    as_llama=as_llama,
                )
        except ValueError as e:
            reason = str(e)
            if "as_llama=True writes" not in reason:
                break
            continue
        wanted = steered_logits(model, [SteeringVector({n: direction(d)}, layer_type).steering(operator, 1.5)])
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
    assert torch.equal(probe(bake(model, SteeringVector({-1: direction(32)}).steering(multiplier=0))), probe(model))
    a, b = (bake(model, SteeringVector({n: direction(32)})) for n in (-1, 2))
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
    baked = bake(model, SteeringVector({1: direction(32)}))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (baked.get_output_embeddings().weight is baked.get_input_embeddings().weight) == tied
    assert baked.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_a_switched_on_bias_survives_the_checkpoint(tmp_path):
    baked = bake(tiny_model("llama"), SteeringVector({1: direction(32)}))
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
            baked = bake(model, SteeringVector({1: direction(32)}), as_llama=True)
        assert baked.config.model_type == "llama" and type(baked).__name__ == "LlamaForCausalLM"
        window = getattr(model.config, "sliding_window", None)
        if window is not None and window < model.config.max_position_embeddings:
            assert baked.config.max_position_embeddings == window and f"up to {window} tokens" in str(heard[0].message)
        baked.save_pretrained(tmp_path / kind)
        served = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        wanted = steered_logits(model, [Steering({1: direction(32)})])
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
    ("llama", "decoder_block", {"multiplier": float("nan")}, ValueError, "must be finite"),
])  # fmt: skip
def test_what_cannot_be_baked_says_why(kind, layer_type, options, error, words):
    with pytest.raises(error) as e:
        llama = options.pop("as_llama", False)
        bake(tiny_model(kind), SteeringVector({1: direction(32)}, layer_type).steering(**options), llama)
    assert words in str(e.value)


def test_wrong_vectors_and_models_are_refused():
    with pytest.raises(ValueError, match="Layer 7 does not exist"):
        bake(tiny_model("llama"), SteeringVector({7: direction(32)}))
    with pytest.raises(ValueError, match="16"):
        bake(tiny_model("llama"), SteeringVector({1: direction(16)}))
    with pytest.raises(TypeError, match="not a transformers model"):
        bake(nn.Linear(2, 2), SteeringVector({1: direction(32)}))


class Packed(torch.Tensor):
    "A weight that unpacks itself when it is used, as torchao's and quanto's do."

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers):
        self.numbers, self.scale = (numbers / 0.01).to(torch.int8), 0.01

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].numbers.float() * 0.01)
        unpack = lambda x: x.numbers.float() * x.scale if isinstance(x, Packed) else x  # noqa: E731
        return function(*torch.utils._pytree.tree_map(unpack, args), **(kwargs or {}))


class Int8Linear(nn.Module):
    "Integers under the name of a float, with a scale beside them."

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", (linear.weight / 0.01).to(torch.int8))
        self.register_buffer("weight_scale", torch.tensor(0.01))

    def forward(self, x):
        return x @ (self.weight.float() * self.weight_scale).T


class GPTQLinear(Int8Linear):
    "Buffers of names of their own."

    def __init__(self, linear):
        super().__init__(linear)
        self.register_buffer("qweight", self._buffers.pop("weight").to(torch.int32))

    def forward(self, x):
        return x @ (self.qweight.float() * self.weight_scale).T


class PackedLinear(GPTQLinear):
    "The same as parameters."

    def __init__(self, linear):
        super().__init__(linear)
        self.weight_packed = nn.Parameter(self._buffers.pop("qweight"), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight_packed.float() * self.weight_scale).T


class Extra(nn.Linear):
    "A state that is no tensor."

    def get_extra_state(self):
        return {"packed": b"..."}

    def set_extra_state(self, state): ...


def subclassed(linear):
    linear.weight = nn.Parameter(Packed(linear.weight.data), requires_grad=False)
    return linear


def eight_bits(linear, dtype):
    linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    return linear


def shadowed(linear):
    made = Extra(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def laid_out(linear, how):
    linear.weight = nn.Parameter(how(linear.weight.data), requires_grad=False)
    return linear


QUANTISED = {
    "tensor subclass": (subclassed, "a Packed"),
    "float8_e4m3fn": (lambda m: eight_bits(m, torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "float8_e5m2": (lambda m: eight_bits(m, torch.float8_e5m2), "torch.float8_e5m2"),
    "int8 parameter": (lambda m: eight_bits(m, torch.int8), "torch.int8"),
    "int8 module": (Int8Linear, "torch.int8"),
    "buffers": (GPTQLinear, "torch.int32"),
    "packed parameters": (PackedLinear, "torch.int32"),
    "no tensor": (shadowed, "a dict"),
    "sparse": (lambda m: laid_out(m, torch.Tensor.to_sparse), "the layout torch.sparse_coo"),
    "sparse rows": (lambda m: laid_out(m, torch.Tensor.to_sparse_csr), "the layout torch.sparse_csr"),
    "offloaded": (lambda m: m.to("meta"), "on the device meta"),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(
    "where", ["layers.1.mlp.down_proj", "layers.0.self_attn.q_proj"]
)  # the place itself, and another
def test_every_quantised_weight_is_refused_before_anything_is_copied(monkeypatch, name, where):
    model, (quantise, words) = tiny_model("llama"), QUANTISED[name]
    parent = model.model.get_submodule(where.rpartition(".")[0])
    setattr(parent, where.rpartition(".")[2], quantise(model.model.get_submodule(where)))
    for later in ("probe", "plain_copy"):
        monkeypatch.setattr(f"steering_vectors.vectors.baking.{later}", None)
    with pytest.raises(ValueError) as e:
        SteeringVector({1: direction(32)}).bake(model)
    for part in (
        "LlamaForCausalLM has quantised or offloaded weights",
        f"model.{where}.",
        words,
        "Load it in a floating type",
    ):
        assert part in str(e.value)


def test_a_replaced_layer_is_named(monkeypatch):
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate_proj = nn.Sequential(model.model.layers[0].mlp.gate_proj)
    with pytest.raises(ValueError, match="differ in model.layers.0.mlp.gate_proj.* A layer of the model was replaced"):
        bake(model, SteeringVector({1: direction(32)}))


def test_integers_that_the_config_builds_are_no_obstacle():
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "told, not done"}  # the weights decide, not the config
    wanted = steered_logits(model, [Steering({1: direction(32)})])
    assert (probe(bake(model, SteeringVector({1: direction(32)}))) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    counted = tiny_model("gpt2")
    made = type(counted)

    class Counting(made):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("positions", torch.arange(4))

    counting = Counting(counted.config).eval()
    counting.load_state_dict(counted.state_dict(), strict=False)
    assert bake(counting, SteeringVector({1: direction(32)})).positions.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_baking_does_not_ask_the_default_device(kind):
    model = tiny_model(kind)
    torch.set_default_device("meta")
    try:
        logits, copy = probe(model), plain_copy(model, type(model), model.config)
    finally:
        torch.set_default_device(None)
    assert logits.device.type == "cpu" and torch.equal(logits, probe(model))
    assert torch.equal(logits, probe(copy)) and not any(p.is_meta for p in copy.parameters())


def test_a_factor_after_the_map_is_noticed():
    config = families.tiny_config("granite")
    config.residual_multiplier = 0.22
    model = GraniteForCausalLM(config).eval()
    with pytest.raises(ValueError, match="GraniteForCausalLM cannot be baked at `decoder_block`: the copy differs"):
        bake(model, SteeringVector({1: direction(32)}))
    bake(model, SteeringVector({1: direction(32)}, "mlp"))


def test_the_guide_names_the_families():
    page = (Path(__file__).parents[1] / "nbs" / "guide" / "bake.ipynb").read_text()
    for answer, words in {"yes": "**yes**", "as Llama": "**as a Llama**"}.items():
        names = [name for name, places in EXPECTED.items() if places["decoder_block"] == answer]
        assert f"{words}, {len(names)} " in page and ", ".join(names) in page
    assert f"each of the {len(EXPECTED)} text families" in page


def test_a_layer_norm_with_a_bias_takes_the_vector():
    for kind in ("gpt2", "opt"):
        baked = bake(tiny_model(kind), SteeringVector({1: direction(32)}, "input_layernorm").steering(multiplier=2.0))
        wanted = steered_logits(
            tiny_model(kind), [SteeringVector({1: direction(32)}, "input_layernorm").steering(multiplier=2.0)]
        )
        assert (probe(baked) - wanted).abs().max() < 1e-5 * wanted.abs().max()


if __name__ == "__main__":  # write the list anew; read the difference before you commit it
    table = {}
    for family in sorted(families.listed()):
        made = families.build(family)
        table[family] = {f"{t}{'' if op is None else ' ablation'}": outcome(made, t, op) for t, op in PLACES}
    Path(__file__).with_name("baking.json").write_text(json.dumps(table, indent=1) + "\n")


def test_a_copy_draws_no_weights_only_to_overwrite_them(monkeypatch):
    model = tiny_model("llama")

    def refuse(tensor, *args, **kwargs):
        assert tensor.is_meta, "a weight was drawn"

    for name in ("kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(f"torch.nn.init.{name}", refuse)
    with pytest.raises(AssertionError, match="drawn"):
        type(model)(model.config)
    copy = plain_copy(model, type(model), model.config)
    assert torch.equal(probe(copy), probe(model))
