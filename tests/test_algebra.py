"""Algebra, files and display of the vector: laws, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model
from steering_vectors.vectors.provenance import Provenance

D = 8


def vector(seed, layers=(0, 1), dtype=torch.float32, layer_type="decoder_block", d=D, **story):
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(d, generator=g).to(dtype) for n in layers}
    return SteeringVector(made, layer_type, Provenance(**story))


def close(a, b, **how):
    assert a.layer_activations.keys() == b.layer_activations.keys() and a.layer_type == b.layer_type
    for n, v in a.layer_activations.items():
        torch.testing.assert_close(v, b.layer_activations[n], **how)


layer_sets = st.sets(st.integers(0, 5), min_size=1).map(sorted)
numbers = st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), layer_sets, st.integers(0, 9), layer_sets, numbers, numbers)
def test_the_laws_of_a_vector_space(seed, some, other_seed, others, x, y):
    v, w = vector(seed, some, torch.float64), vector(other_seed + 10, others, torch.float64)
    close(v + w, w + v)
    close((v + w) + v, v + (w + v))
    close(x * (v + w), x * v + x * w)
    close((x + y) * v, x * v + y * v)
    close(x * (y * v), (x * y) * v)
    close(v - w, v + -w)
    close(-v, -1 * v)
    assert sorted((v + w).layer_activations) == sorted({*some, *others})
    for n in some:
        torch.testing.assert_close(((v + w) - w).layer_activations[n], v.layer_activations[n])
    for n in set(others) - set(some):
        assert not ((v + w) - w).layer_activations[n].any()
    if x:
        close(v * x / x, v)


def test_operations_leave_their_operands_alone():
    v, w = vector(0), vector(1, (1, 2))
    before = {n: t.clone() for n, t in v.layer_activations.items()}
    for made in (v + w, v - w, 2 * v, v / 3, -v, v.normalize(), w + v, v[0], v[1].at([3, 4])):
        for t in made.layer_activations.values():
            t_new = t.clone().add_(1)
            assert t_new is not t
    assert all(torch.equal(t, before[n]) for n, t in v.layer_activations.items()) and list(v.layer_activations) == [
        0,
        1,
    ]


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), np.array(2)])
def test_any_number_scales(number):
    for made in (vector(0) * number, number * vector(0)):
        assert isinstance(made, SteeringVector)
        close(made, vector(0) + vector(0))


@pytest.mark.parametrize("thing", ["2", True, [2], None, torch.ones(2), np.ones(2), vector(1)])
def test_anything_else_does_not(thing):
    for act in (lambda v: v * thing, lambda v: v / thing):
        with pytest.raises(TypeError):
            act(vector(0))


@pytest.mark.parametrize("act, error, words", [
    (lambda v: v + vector(1, layer_type="mlp"), ValueError, "`decoder_block`, the other to `mlp`"),
    (lambda v: v - vector(1, d=4), ValueError, "4 and 8 wide"),
    (lambda v: v + vector(1, (-1,)), ValueError, "Layer -1 counts from the end"),
    (lambda v: v.cosine_similarity(vector(1, (5,))), ValueError, "no layer in common: 0–1 and 5"),
    (lambda v: v.cosine_similarity(vector(1, layer_type="mlp")), ValueError, "nothing to do with each other"),
    (lambda v: (0 * v).normalize(), ValueError, "layer 0 is zero"),
    (lambda v: v / 0, ZeroDivisionError, "divided by zero"),
    (lambda v: v * math.inf, ValueError, "scaled by inf"),
    (lambda v: v + 1, TypeError, "unsupported operand"),
    (lambda v: 1 + v, TypeError, "unsupported operand"),
    (lambda v: False + v, TypeError, "unsupported operand"),
    (lambda v: sum([v, v], start=2), TypeError, "unsupported operand"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act(vector(0))


def test_negative_layers_add_among_themselves():
    assert list((vector(0, (-1, -2)) + vector(1, (-1,))).layer_activations) == [-2, -1]


def test_types_meet_in_the_wider_one():
    made = vector(0, dtype=torch.bfloat16) + vector(1, (1, 2))
    assert [v.dtype for v in made.layer_activations.values()] == [torch.bfloat16, torch.float32, torch.float32]
    assert (2 * vector(0, dtype=torch.float16)).layer_activations[0].dtype == torch.float16


def test_the_display_names_every_dtype():
    mixed = vector(0) + vector(1, (2,), torch.bfloat16) + vector(2, (3,))
    assert repr(mixed).endswith("float32 and bfloat16)")
    assert repr(vector(0, dtype=torch.float16)).endswith(", float16)")


@pytest.mark.parametrize("one", [1, np.int64(1), np.array(1), torch.tensor(1), torch.tensor([1])])
def test_any_whole_number_is_a_layer(one):
    v = vector(0)
    assert v[one] == v[1] and list(v[one].at(one).layer_activations) == [1]


@pytest.mark.parametrize("several", [[1, 0], (1, 0), np.array([1, 0]), torch.tensor([1, 0]), range(1, -1, -1)])
def test_any_row_of_whole_numbers_is_layers(several):
    v = vector(0)
    assert list(v[several].layer_activations) == list(v[1].at(several).layer_activations) == [1, 0]


@pytest.mark.parametrize("thing", ["1", 1.0, True, [True], torch.tensor(True), torch.tensor([True, False]), np.True_])
def test_what_is_no_layer_is_in_no_vector(thing):
    v = vector(0)
    with pytest.raises(TypeError, match="A vector is indexed by layers"):
        v[thing]
    assert thing not in v or isinstance(thing, list)
    assert True not in v and 1.0 not in v and None not in v and "1" not in v and v not in v


def test_a_vector_is_a_mapping_from_layers():
    v = vector(0, (5, 0, 3), num_layers=6)
    assert list(v) == [5, 0, 3] and len(v) == 3 and sorted(v) == [0, 3, 5] and max(v) == 5
    assert all(v[n] == v[[n]] for n in v) and {n: len(v[n]) for n in v} == {5: 1, 0: 1, 3: 1}
    for layer in (0, np.int64(3), torch.tensor(5), -1, -3, -6):
        assert layer in v and len(v[layer]) == 1
    for layer in (1, 6, -2, -7, 10**30):
        assert layer not in v
    by_hand = vector(0, (-1, 2))
    assert -1 in by_hand and -2 not in by_hand and 5 not in by_hand and list(by_hand) == [-1, 2]


def test_an_empty_vector_is_false_and_every_other_true():
    assert not SteeringVector({}) and len(SteeringVector({})) == 0 and list(SteeringVector({})) == []
    assert vector(0) and SteeringVector({0: torch.zeros(4)}) and (0 * vector(0))


def test_a_vector_is_not_taken_for_an_array_of_numbers():
    v = vector(0)
    for made in (
        lambda: np.asarray(v),
        lambda: np.array([v, v]),
        lambda: np.stack([v, v]),
        lambda: SteeringVector({0: v}),
    ):
        with pytest.raises(TypeError, match="not an array|must be a tensor, not a SteeringVector"):
            made()
    assert (v == np.ones(2)) is False and (v != np.array(0)) is True and [v, vector(1)].index(v) == 0


def test_vectors_are_summed_by_sum():
    v, w, x = vector(0), vector(1, (1, 2)), vector(2)
    assert sum([v, w, x]) == v + w + x and sum([v]) == v and sum([]) == 0
    assert 0 + v == v and np.int64(0) + v == v and 0.0 + v == v
    assert sum([v, w], start=x) == x + v + w
    assert sum([v, w]).provenance.origin == "sum of vectors" and sum([v]).provenance.origin is None


def test_a_vector_is_made_on_the_cpu_whatever_the_default_device(tmp_path):
    v = vector(0)
    with torch.device("meta"):
        assert SteeringVector({0: [1.0, 2.0], 1: np.ones(2)}).layer_activations[0].device.type == "cpu"
        v.save(tmp_path / "v")
        v.to_gguf(tmp_path / "v.gguf") if 0 not in v else v[1].to_gguf(tmp_path / "v.gguf")
        assert SteeringVector.load(tmp_path / "v") == v and SteeringVector.from_gguf(tmp_path / "v.gguf") == v[1]
        assert (v + v).normalize().cosine_similarity(v)[0] == pytest.approx(1)
        assert v.to_vllm_lens()["layer_indices"] == [0, 1]


@pytest.mark.parametrize("thing", ["1", 1.0, None, [1.5], np.array(1.5), torch.tensor(1.5)])
def test_nothing_else_is_a_layer(thing):
    with pytest.raises(TypeError, match="A vector is indexed by layers"):
        vector(0)[thing]
    with pytest.raises(TypeError):
        vector(0)[1].at(thing)


def test_lengths_and_angles_survive_float16():
    v = SteeringVector({0: torch.full((64,), 60000.0, dtype=torch.float16)})
    assert "norm 4.8e+05" in repr(v)
    assert v.cosine_similarity(v)[0] == pytest.approx(1)
    assert float(v.normalize().layer_activations[0].double().norm()) == pytest.approx(1, rel=1e-3)
    tiny = SteeringVector({0: torch.full((4,), 1e-300, dtype=torch.float64)})
    assert tiny.cosine_similarity(-tiny)[0] == pytest.approx(-1)
    assert (0 * v).cosine_similarity(v)[0] == 0


def test_gradients_flow_through_the_algebra():
    t = torch.ones(D, requires_grad=True)
    made = 2 * SteeringVector({0: t}) - SteeringVector({0: t}) / 2
    made.layer_activations[0].sum().backward()
    assert torch.equal(t.grad, torch.full((D,), 1.5))


def test_a_sum_claims_only_what_holds_of_both():
    a = vector(0, model_id="m", num_pairs=3, aggregator="mean", activation_norms={0: 1.0}, suggested_multiplier=2)
    b = vector(1, model_id="m", num_pairs=4, aggregator="mean", activation_norms={0: 9.0, 1: 2.0}, note="b")
    assert (a + b).provenance == Provenance(
        model_id="m", aggregator="mean", activation_norms={0: 1.0, 1: 2.0}, origin="sum of vectors"
    )
    assert (a + vector(1, model_id="n", activation_norms={1: 2.0})).provenance == Provenance(origin="sum of vectors")
    assert (4 * a).provenance.suggested_multiplier == 0.5 and (a / 4).provenance.suggested_multiplier == 8
    assert (a + a).provenance.suggested_multiplier is None and (a - a).provenance.suggested_multiplier is None
    assert (0 * a).provenance.suggested_multiplier is None and a.normalize().provenance.suggested_multiplier is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_laws_hold_of_what_the_model_does(kind, dtype):
    model, ids = tiny_model(kind, dtype=dtype), torch.arange(3, 15).view(2, 6)
    v, w = vector(0, (0, 1), dtype, d=32), vector(1, (1, 2), dtype, d=32)

    def logits(*contexts):
        handles = [made.apply(model, multiplier=m).attach() for made, m in contexts]
        try:
            with torch.no_grad():
                return model(ids).logits
        finally:
            for handle in handles:
                handle.remove()

    plain = logits()
    assert torch.equal(logits((2 * v, 1)), logits((v, 2)))
    assert torch.equal(logits((-v, 1)), logits((v, -1)))
    assert torch.equal(logits((0 * v, 1)), plain)
    assert not torch.equal(logits((v, 1)), plain)
    if dtype == torch.float32:
        torch.testing.assert_close(logits((v + w, 1)), logits((v, 1), (w, 1)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits((v + w - w, 1)), logits((v, 1)), atol=1e-5, rtol=1e-5)


def test_the_methods_keep_and_ship(tmp_path):
    v = vector(0, (1, 2), model_id="someone/tiny", model_type="llama", num_pairs=3, read_position="-1")
    v.save(tmp_path / "v.safetensors")
    v.save_pretrained(str(tmp_path / "v"))
    v.to_gguf(tmp_path / "v.gguf")
    for back in (
        SteeringVector.load(str(tmp_path / "v.safetensors")),
        SteeringVector.from_pretrained(tmp_path / "v"),
        SteeringVector.from_gguf(tmp_path / "v.gguf"),
    ):
        assert back == v and back.provenance == v.provenance and type(back) is SteeringVector
    assert v.to_vllm_lens(2)["scale"] == 2


def test_what_a_person_sees():
    v = vector(
        0, (1, 2), model_id="someone/tiny", num_pairs=3, aggregator="mean_aggregator", activation_norms={1: 10.0}
    )
    assert repr(v).endswith("of someone/tiny)") and "layers 1–2" in repr(v)
    table = v._repr_markdown_()
    for words in ("2 layers", "model: someone/tiny · 3 pairs · mean_aggregator", "| 10 |"):
        assert words in table
    many = vector(0, range(40))._repr_markdown_()
    assert many.count("\n") < 20 and "| 39 |" in many and "…" in many and "no provenance" in many
    both, note = (
        v + vector(1, (1,), model_id="someone/tiny"),
        vector(0, note="None of it", num_positive=1, num_negative=2),
    )
    assert "sum of vectors · model: someone/tiny" in both._repr_markdown_()
    assert "1 positive text · 2 negative texts · None of it" in note._repr_markdown_()
    assert "no layers" in repr(SteeringVector({}))
    assert isinstance(SteeringVector({})._repr_markdown_(), str)
