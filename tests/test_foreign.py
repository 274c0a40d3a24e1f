"""Files that other programs wrote: read at the right layer or refused in words, and never run."""

import io
import json
import os
import pickle
import struct
import zipfile

import families  # noqa: F401 # quiet transformers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file as save_safetensors

from steering_vectors import SteeringVector, record_activations
from steering_vectors.demo import tiny_model
from steering_vectors.vectors.foreign import read_vector_file
from steering_vectors.vectors.hints import hint_from_name
from steering_vectors.vectors.numbering import number_rows
from steering_vectors.vectors.provenance import Provenance

D, L = 8, 4
STATES = torch.randn(L + 1, D, generator=torch.Generator().manual_seed(0))
BLOCKS = STATES[1:]  # row n is the output of block n


def write(path, value):
    "One value in the format that a suffix names."
    if path.suffix == ".pt":
        torch.save(value, path)
    elif path.suffix == ".old":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    elif path.suffix == ".npy":
        np.save(path, value.numpy())
    elif path.suffix == ".npz":
        np.savez(path, **{str(k): v.numpy() for k, v in (value if isinstance(value, dict) else {"x": value}).items()})
    elif path.suffix == ".safetensors":
        save_safetensors(
            {str(k): v.contiguous() for k, v in (value if isinstance(value, dict) else {"x": value}).items()}, path
        )
    else:
        plain = {str(k): v.tolist() for k, v in value.items()} if isinstance(value, dict) else value.tolist()
        path.write_text(json.dumps(plain))
    return path


def directions(path, *args, **options):
    return SteeringVector.from_file(path, *args, **options).layer_activations


SUFFIXES = [".pt", ".old", ".npy", ".npz", ".safetensors", ".json"]
DICTS = [suffix for suffix in SUFFIXES if suffix != ".npy"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("convention, rows", [
    ("block_output", BLOCKS), ("block_input", STATES[:-1]), ("hidden_states", STATES),
])  # fmt: skip
def test_every_convention_ends_at_the_same_block(tmp_path, suffix, convention, rows):
    path = write(tmp_path / f"v{suffix}", rows)
    shift = convention != "block_output"
    wanted = SteeringVector({1: BLOCKS[1], 2: BLOCKS[2]})
    assert SteeringVector.from_file(path, [1 + shift, 2 + shift], convention) == wanted
    assert SteeringVector.from_file(path, torch.tensor([1, 2]) + shift, convention=convention) == wanted
    assert SteeringVector.from_file(path, 1 + shift, convention) == wanted[1]
    with pytest.raises(ValueError, match="does not say where its directions were read") as e:
        SteeringVector.from_file(path)
    for word in ("'block_output'", "'block_input'", "'hidden_states'", str(path)):
        assert word in str(e.value)


@pytest.mark.parametrize("suffix", DICTS)
@pytest.mark.parametrize("spell", [
    "{}", "layer_{}", "layer{}", "layers.{}", "model.layers.{}", "Layer {}", "blocks.{}", "h.{}", "L{}", "joy/layer_{:02}",
    "transformer.h.{}", "layer_{}.mean", "steer.layer-{}", "gemma-2-2b.layer_{}",
])  # fmt: skip
def test_names_with_numbers_are_layers(tmp_path, suffix, spell):
    path = write(tmp_path / f"v{suffix}", {spell.format(n): BLOCKS[n] for n in (3, 1)})
    assert SteeringVector.from_file(path, convention="block_output") == SteeringVector({3: BLOCKS[3], 1: BLOCKS[1]})
    assert list(directions(path, 3, convention="block_input")) == [2]
    with pytest.raises(ValueError, match="has no layer 2. As it counts, it has 1 and 3|has no layer 2"):
        directions(path, [2], convention="block_output")


@pytest.mark.parametrize("suffix", DICTS)
@pytest.mark.parametrize(
    "names", [("joy", "rage"), ("arr_0", "arr_1"), ("joy_v2", "joy_v3"), ("layer_1", "mean"), ("llama3", "llama4")]
)
def test_names_without_numbers_are_asked_for(tmp_path, suffix, names):
    path = write(tmp_path / f"v{suffix}", {name: BLOCKS[i] for i, name in enumerate(names)})
    with pytest.raises(ValueError, match="names no layer. Choose one tensor with name="):
        directions(path, convention="block_output")
    layers = None if names[0] == "layer_1" else 2
    got = directions(path, layers, convention="block_output", name=names[0])
    assert torch.equal(got[1 if layers is None else 2], BLOCKS[0])
    with pytest.raises(ValueError, match="no tensor 'fear'"):
        directions(path, 2, convention="block_output", name="fear")


@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D)])
def test_one_direction_has_the_layer_that_is_given(tmp_path, shape):
    path = write(tmp_path / "v.pt", STATES[2].reshape(shape))
    assert directions(path, 18, "block_input").keys() == {17} == directions(path, [18], "hidden_states").keys()
    assert directions(path, -1, "block_output").keys() == {-1} and directions(path, -1, "block_input").keys() == {-2}
    with pytest.raises(ValueError, match="which layer its direction is for. Pass layers=18"):
        directions(path, convention="block_output")


@pytest.mark.parametrize("shape", [(L + 1, D), (1, L + 1, D), (L + 1, 1, D)])
def test_rows_are_layers_from_0(tmp_path, shape):
    path = write(tmp_path / "v.pt", STATES.reshape(shape))
    assert directions(path, convention="block_output").keys() == {0, 1, 2, 3, 4}
    assert directions(path, [3, 1], "hidden_states").keys() == {0, 2}
    assert directions(path, [-2], "hidden_states").keys() == {2}
    assert directions(path, [10, 20, 30, 40, 50], "block_output").keys() == {10, 20, 30, 40, 50}
    with pytest.raises(ValueError, match="no layer 5. As it counts, it has 0–4"):
        directions(path, [1, 5], "block_output")


@given(st.integers(1, 6), st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
def test_rows_keep_their_numbers_or_get_those_given(rows, layers):
    tensor = torch.arange(rows * 2, dtype=torch.float32).reshape(rows, 2)
    naming = len(layers) == rows and (rows == 1 or max(layers) >= rows)
    if not naming and (max(layers) >= rows or (rows == 1 and len(layers) > 1)):
        with pytest.raises(ValueError, match="has no layer"):
            number_rows(tensor, None, layers)
        return
    got = number_rows(tensor, None, layers)
    assert list(got) == layers
    for i, n in enumerate(layers):
        assert torch.equal(got[n], tensor[i if naming else n])


@pytest.mark.parametrize("convention", ["block_input", "hidden_states"])
@pytest.mark.parametrize("value", [STATES, dict(enumerate(STATES)), list(STATES)])
def test_the_embeddings_are_no_block(tmp_path, convention, value):
    path = tmp_path / "v.pt"
    torch.save(value, path)
    with pytest.raises(ValueError, match=r"is the embeddings, .* Leave it out: layers=\[1, 2, 3, 4\]"):
        directions(path, convention=convention)
    with pytest.raises(ValueError, match="is the embeddings"):
        directions(path, 0, convention)
    assert directions(path, [1, 2, 3], convention).keys() == {0, 1, 2}


@pytest.mark.parametrize("value", [STATES, dict(enumerate(STATES)), [None, *STATES[1:]]])
def test_the_state_after_the_final_norm_is_warned_of(tmp_path, recwarn, value):
    torch.save(value, tmp_path / "v.pt")
    assert directions(tmp_path / "v.pt", [1, 3], "hidden_states").keys() == {0, 2}
    assert directions(tmp_path / "v.pt", [1, 4], "block_input").keys() == {0, 3} and not recwarn
    if isinstance(value, list):
        return
    with pytest.warns(UserWarning, match="after the model's final norm") as heard:
        assert directions(tmp_path / "v.pt", [1, 4], "hidden_states").keys() == {0, 3}
    assert "v.pt" in str(heard[0].message)


def test_the_conventions_are_those_of_a_model(tmp_path):
    model, ids = tiny_model("llama"), torch.arange(3, 9)[None]
    with torch.no_grad(), record_activations(model) as seen:
        states = model(ids, output_hidden_states=True).hidden_states
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k, n=n: inputs.update({n: (a or (k["hidden_states"],))[0]}), with_kwargs=True
        )
        for n, layer in enumerate(model.model.layers)
    ]
    model(ids)
    [hook.remove() for hook in hooks]
    wanted = SteeringVector({1: seen[1][0][0, -1]})
    torch.save(torch.stack([s[0, -1] for s in states]), tmp_path / "states.pt")
    torch.save({n: s[0, -1] for n, s in inputs.items()}, tmp_path / "inputs.pt")
    assert SteeringVector.from_file(tmp_path / "states.pt", 2, "hidden_states") == wanted
    assert SteeringVector.from_file(tmp_path / "inputs.pt", 2, "block_input") == wanted


@pytest.mark.parametrize("name, layer, convention", [
    ("blocks.12.hook_resid_post", 12, "block_output"), ("blocks.12.hook_resid_pre", 11, "block_input"),
    ("hook_resid_pre_3", 2, "block_input"), ("layer_3_resid_post", 3, "block_output"), ("resid_post.3", 3, "block_output"),
])  # fmt: skip
def test_a_hook_tells_the_convention(tmp_path, name, layer, convention):
    path = write(tmp_path / "v.safetensors", {name: BLOCKS[0]})
    assert directions(path).keys() == {layer} == directions(path, convention=convention).keys()
    other = {"block_output": "block_input", "block_input": "hidden_states"}[convention]
    with pytest.raises(ValueError, match=f"has convention='{convention}', and '{other}' was passed"):
        directions(path, convention=other)


@pytest.mark.parametrize(
    "name", ["blocks.3.hook_resid_mid", "blocks.3.attn.hook_z", "blocks.3.mlp.hook_post", "hook_embed"]
)
def test_a_hook_inside_a_block_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a place inside a block that is the output of none of its parts"):
        directions(write(tmp_path / "v.safetensors", {name: BLOCKS[0]}))


def test_parts_of_a_block(tmp_path):
    def read(name, *args, **options):
        return SteeringVector.from_file(write(tmp_path / "v.pt", {name: BLOCKS[0]}), *args, **options)

    assert read("model.layers.3.mlp", convention="block_output").layer_type == "mlp"
    assert read("h.3.attn", convention="block_output").layer_type == "self_attn"
    assert read("layer_3", convention="block_output", layer_type="self_attn").layer_type == "self_attn"
    with pytest.raises(ValueError, match="is for whole blocks, and these directions belong to `mlp`"):
        read("model.layers.3.mlp", convention="block_input")
    with pytest.raises(ValueError, match="has layer_type='mlp', and 'self_attn' was passed"):
        read("model.layers.3.mlp", convention="block_output", layer_type="self_attn")
    for unclear in ("model.layers.3.mlp.down_proj.vector", "blocks.3.hook_mlp_out"):
        with pytest.raises(ValueError, match="Pass layer_type="):
            read(unclear, convention="block_output")
        assert read(unclear, convention="block_output", layer_type="mlp").layer_type == "mlp"
    with pytest.raises(ValueError, match="Unknown layer_type 'block'"):
        read("layer_3", convention="block_output", layer_type="block")
    with pytest.raises(ValueError, match="Unknown convention 'resid_pre'"):
        read("layer_3", convention="resid_pre")
    mixed = write(tmp_path / "m.pt", {"layers.1.mlp": BLOCKS[0], "layers.2.self_attn": BLOCKS[1]})
    with pytest.raises(ValueError, match="belong to different parts of the block"):
        directions(mixed, convention="block_output")
    assert directions(mixed, convention="block_output", name="self_attn").keys() == {2}


FEATURE = {
    "modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k", "index": "10956", "vector": BLOCKS[0].tolist(),
    "vectorLabel": "joy", "vectorDefaultSteerStrength": 44, "pos_values": [1.5, 1.2], "pos_str": ["a", "b"],
    "freq_hist_data_bar_values": [0.1, 0.2, 0.3], "topkCosSimIndices": [1, 2], "activations": [{"values": [0.0] * 9}] * 900,
}  # fmt: skip
PYTHON = {"model_id": "gpt2-small", "source": "7-abc", "index": "1", "values": BLOCKS[0].tolist(), "label": "joy"}


@pytest.mark.parametrize("feature, hook, number", [(FEATURE, "hookName", 12), (PYTHON, "hook_name", 7)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_feature_of_neuronpedia(tmp_path, feature, hook, number, wrapped):
    path = tmp_path / "feature"

    def read(*args, **more):
        path.write_text(json.dumps({"vector": feature | more, "url": "…"} if wrapped else feature | more))
        return SteeringVector.from_file(path, *args)

    for place, layer in (("post", number), ("pre", number - 1)):
        v = read(**{hook: f"blocks.{number}.hook_resid_{place}"})
        assert v == SteeringVector({layer: BLOCKS[0]}) and v.provenance.model_id == feature.get("modelId", "gpt2-small")
        assert v.provenance.origin == "read from feature (JSON)" and "joy" in v.provenance.extra.values()
    with pytest.raises(ValueError, match="does not say where its directions were read"):
        read()
    assert read(None, "block_output").layer_activations.keys() == {number}


def test_a_feature_keeps_its_texts_and_not_its_examples(tmp_path):
    path = tmp_path / "feature.json"
    path.write_text(json.dumps(FEATURE))
    v = SteeringVector.from_file(path, convention="block_output")
    assert v.provenance.extra["vectorLabel"] == "joy" and v.provenance.extra["vectorDefaultSteerStrength"] == 44
    assert "activations" not in v.provenance.extra
    v.save(tmp_path / "v.safetensors")
    assert SteeringVector.load(tmp_path / "v.safetensors").provenance == v.provenance
    for changed, words in [
        ({"vector": []}, "`vector` is empty"), ({"hookName": "blocks.11.hook_resid_pre"}, "its fields disagree"),
        ({"layer": "12-gemmascope-mlp-16k"}, "does not belong to whole blocks. Pass layer_type="),
        ({"hookName": "blocks.12.hook_mlp_out"}, "Pass layer_type="),
    ]:  # fmt: skip
        path.write_text(json.dumps(FEATURE | changed))
        with pytest.raises(ValueError, match=words):
            SteeringVector.from_file(path)


def test_the_harness_file_comes_back(tmp_path):
    for kind, layer_type in [
        ("llama", "decoder_block"),
        ("gpt2", "mlp"),
        ("gpt_neox", "self_attn"),
        ("opt", "decoder_block"),
    ]:
        model = tiny_model(kind)
        v = SteeringVector({0: torch.randn(32), 2: torch.randn(32)}, layer_type)
        v.to_lm_eval(tmp_path / "v.pt", model, multiplier=3)
        back = SteeringVector.from_file(tmp_path / "v.pt")
        assert back == 3 * v and set(back.provenance.extra.values()) == {3.0}
        assert SteeringVector.from_file(tmp_path / "v.pt", 2, "block_output", layer_type) == 3 * v[2]
        with pytest.raises(ValueError, match="has convention='block_output'"):
            SteeringVector.from_file(tmp_path / "v.pt", convention="block_input")


@pytest.mark.parametrize("step, words", [
    ({"action": "clamp"}, "does something else than add"), ({"head_index": 3}, "does something else than add"),
    ({"steering_coefficient": "3"}, "no direction with a number"), ({"steering_vector": None}, "no direction with a number"),
])  # fmt: skip
def test_what_the_harness_does_otherwise_is_refused(tmp_path, step, words):
    torch.save(
        {"layers.1": {"steering_vector": BLOCKS[0][None], "steering_coefficient": 2.0, "action": "add"} | step},
        tmp_path / "v.pt",
    )
    with pytest.raises(ValueError, match=words):
        directions(tmp_path / "v.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".old", ".npz", ".safetensors"])
def test_the_type_is_kept(tmp_path, dtype, suffix):
    if suffix == ".npz" and dtype == torch.bfloat16:
        return
    value = BLOCKS[0].to(dtype)
    got = directions(write(tmp_path / f"v{suffix}", {3: value}), convention="block_output")[3]
    assert got.dtype == dtype and torch.equal(got, value) and not got.requires_grad and got.is_contiguous()


def test_gradients_big_endian_and_views(tmp_path):
    big = torch.randn(1000, D)
    torch.save({3: torch.nn.Parameter(big[2]), 4: big[:, 0][:D]}, tmp_path / "v.pt")
    got = directions(tmp_path / "v.pt", convention="block_output")
    assert torch.equal(got[3], big[2]) and not got[3].requires_grad and got[4].untyped_storage().nbytes() == 4 * D
    np.save(tmp_path / "v.npy", big[2].numpy().astype(">f8"))
    assert directions(tmp_path / "v.npy", 3, "block_output")[3].dtype == torch.float64


@pytest.mark.parametrize("value, words", [
    (torch.full((D,), float("nan")), "NaN or infinity"), (torch.full((D,), float("inf")), "NaN or infinity"),
    (torch.arange(D), "no tensor of floating-point numbers"), (torch.ones(D).to(torch.float8_e4m3fn), "float8"),
    (torch.tensor(1.0), "no tensor of floating-point numbers"), ({}, "no tensor of floating-point numbers"),
    ({1: torch.ones(D), 2: torch.ones(D + 1)}, "another layer is 8 wide"), (torch.ones(2, 3, D), "shape (2, 3, 8)"),
    ({1: torch.ones(2, D)}, "has 2 rows, and a layer has one direction"), (torch.ones(D, 1), "shape (8, 1)"),
    (torch.ones(D).to_sparse(), "no tensor of floating-point numbers"), (torch.empty(D, device="meta"), "no tensor"),
    ({"layer": 3, "vector": STATES}, "its fields name 3, and its tensor has 5 rows"), ("joy", "no tensor"), (torch.ones(0), "shape (0,)"),
])  # fmt: skip
def test_what_is_no_direction_is_refused(tmp_path, value, words):
    torch.save(value, tmp_path / "v.pt")
    layers = None if isinstance(value, dict) else 1
    with pytest.raises(ValueError) as e:
        directions(tmp_path / "v.pt", layers, "block_output")
    assert words in str(e.value) and str(tmp_path / "v.pt") in str(e.value)


@pytest.mark.parametrize("value, layers", [
    ({"layer": 3, "vector": BLOCKS[0]}, [3]), ({"layers": [3, 9], "vectors": STATES[:2]}, [3, 9]),
    ({"meta": {"layer_idx": torch.tensor(3)}, "v": BLOCKS[0]}, [3]), ({"happy": {3: BLOCKS[0]}}, [3]),
    ({"layer": "3", "direction": BLOCKS[0][None]}, [3]), ({"hook_name": "blocks.3.hook_resid_post", "v": BLOCKS[0]}, [3]),
])  # fmt: skip
def test_fields_name_the_layer(tmp_path, value, layers):
    torch.save(value, tmp_path / "v.pt")
    assert list(directions(tmp_path / "v.pt", convention="block_output")) == layers
    with pytest.raises(ValueError, match="no layer 5"):
        directions(tmp_path / "v.pt", 5, "block_output")


class Trap:
    "Unpickling it makes a folder."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch, old format", "dictionary", "numpy", "npz"])
def test_nothing_in_a_file_is_run(tmp_path, how):
    path, trap = tmp_path / "v.pt", Trap(tmp_path / "sprung")
    with open(path, "wb") as f:
        if how == "pickle":
            pickle.dump(trap, f)
        elif how == "numpy":
            np.save(f, np.array([trap], dtype=object), allow_pickle=True)
        elif how == "npz":
            np.savez(f, a=np.array([trap], dtype=object))
        else:
            torch.save(
                {1: trap} if how == "dictionary" else trap, f, _use_new_zipfile_serialization=how != "torch, old format"
            )
    with pytest.raises(ValueError, match=r"v.pt cannot be read as a steering vector: it (is a pickle|holds)") as e:
        SteeringVector.from_file(path, 1, "block_output")
    assert "\n" not in str(e.value) and len(str(e.value)) < 400 and e.value.__cause__ is None
    with pytest.raises(ValueError, match="v.pt cannot be read as a steering vector: it is"):
        SteeringVector.load(path)
    assert os.listdir(tmp_path) == ["v.pt"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


@pytest.mark.parametrize("data, words", [
    (LFS, "Run `git lfs pull`"), (b"<!DOCTYPE html>\n<html>", "it is a web page"), (b"\n <html lang=en>", "it is a web page"),
    (b"PK\3\4 cut off", "not known"), (b"", "empty, damaged"), (b"joy,1.0\n", "not known"), (b"\x89PNG\r\n", "not known"),
    (b"\x80\x04N.", "it is a pickle"), (b"\x93NUMPY\1\0", "not a numpy file"), (b'{"a": ', "its JSON cannot be read"),
    (b'{"a": NaN}', "NaN is not a number of JSON"), (b'{"3": [1, 2]}\n{"3": [1]}\n', "one per line"),
    (b'{"a": 1, "a": 2}', "two fields have the same name"), (b'{"3": ["x"]}', "no tensor of floating-point numbers"),
    (struct.pack("<Q", 9) + b"{" * 9, "damaged, or not a safetensors file"), (b"[" * 100_000, "its JSON cannot be read"),
    (b"\xff\xfe{\x00", "not known"), (b'{"3": [[1, 2], [3]]}', "no tensor of floating-point numbers"),
])  # fmt: skip
def test_every_other_file_is_named(tmp_path, data, words):
    path = tmp_path / "v.safetensors"
    path.write_bytes(data)
    for read in (SteeringVector.from_file, SteeringVector.load, SteeringVector.from_gguf):
        with pytest.raises(ValueError) as e:
            read(path)
        assert str(path) in str(e.value) and "Error" not in str(e.value)
        assert read != SteeringVector.from_file or words in str(e.value)
        assert data != LFS or "Run `git lfs pull`" in str(e.value)


def test_a_pointer_in_a_folder_is_named(tmp_path):
    (tmp_path / "steering_vector.safetensors").write_bytes(LFS)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        SteeringVector.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_names_the_call_that_reads_it(tmp_path, suffix):
    path = write(tmp_path / f"v{suffix}", STATES)
    with pytest.raises(ValueError, match="`SteeringVector.from_file` reads") as e:
        SteeringVector.load(path)
    assert str(path) in str(e.value)


def test_our_own_files_are_read_too(tmp_path):
    v = SteeringVector({1: BLOCKS[0], 3: BLOCKS[1]}, "mlp", Provenance(note="joy"))
    v.save(tmp_path / "v.pt")  # by content, whatever the name
    back = SteeringVector.from_file(tmp_path / "v.pt")
    assert back == v and back.provenance == v.provenance and SteeringVector.from_file(tmp_path / "v.pt", 3) == v[3]
    with pytest.raises(ValueError, match="has layer_type='mlp'"):
        SteeringVector.from_file(tmp_path / "v.pt", layer_type="self_attn")
    data = bytearray((tmp_path / "v.pt").read_bytes())
    data[-1] ^= 1
    (tmp_path / "v.pt").write_bytes(data)
    with pytest.raises(ValueError, match="do not match its checksum") as e:
        SteeringVector.from_file(tmp_path / "v.pt")
    assert str(e.value).count("cannot be read") == 1
    whole = SteeringVector({1: BLOCKS[0], 3: BLOCKS[1]}, provenance=Provenance(note="joy"))
    whole.to_gguf(tmp_path / "v.safetensors")
    back = SteeringVector.from_file(tmp_path / "v.safetensors", [3])
    assert back == whole[3] and back.provenance == whole.provenance
    with pytest.raises(ValueError, match="has convention='block_output', and 'block_input' was passed"):
        SteeringVector.from_file(tmp_path / "v.safetensors", convention="block_input")
    with pytest.raises(ValueError, match="no layer 2. As it counts, it has 1"):
        SteeringVector.from_file(tmp_path / "v.safetensors", 2)


def test_a_vector_read_is_a_vector(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    path = tmp_path / "joy.safetensors"
    save_safetensors({"layer_2": torch.ones(32)}, path, metadata={"author": "somebody", "model_name": "someone/tiny"})
    v = SteeringVector.from_file(path, convention="block_input")
    assert v.provenance.origin == "read from joy.safetensors (safetensors)" and v.provenance.model_id == "someone/tiny"
    assert v.provenance.extra == {"author": "somebody", "model_name": "someone/tiny"}
    assert "read from joy.safetensors" in v._repr_markdown_()
    with v.apply(tiny_model("llama")) as handle:
        assert list(handle.modules) == [1]
    v.save(tmp_path / "v")
    assert SteeringVector.load(tmp_path / "v").provenance == v.provenance


@pytest.mark.parametrize(
    "layers, error", [("all", TypeError), ([1, 1], TypeError), ([], TypeError), (True, TypeError), ([1.0], TypeError)]
)
def test_layers_are_numbers(tmp_path, layers, error):
    with pytest.raises(error, match="layers must be one layer number, or several different ones"):
        directions(write(tmp_path / "v.pt", STATES), layers, "block_output")


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        SteeringVector.from_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        SteeringVector.from_file(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_default_device_does_not_matter(tmp_path, suffix):
    path = write(tmp_path / f"v{suffix}", STATES)
    torch.set_default_device("meta")
    try:
        got = directions(path, 2, "hidden_states")
    finally:
        torch.set_default_device(None)
    assert torch.equal(got[1], BLOCKS[1])


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "v.brainpatch", "w") as z:
        z.writestr("manifest.json", "{}")
    with pytest.raises(ValueError, match="a zip archive, of neither PyTorch nor numpy"):
        directions(tmp_path / "v.brainpatch")
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    (tmp_path / "v.pt").write_bytes(script.getvalue())
    with pytest.raises(ValueError, match="v.pt cannot be read as a steering vector"):
        directions(tmp_path / "v.pt")


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_name_tells_something_or_nothing(name):
    try:
        told = hint_from_name(name)
    except ValueError as e:
        assert "a place inside a block" in str(e)
    else:
        assert told.layer is None or str(abs(told.layer)) in name.replace("0", "") or "0" in name or not name.isascii()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=80),
    st.sampled_from([b"", b"PK\3\4", b"\x80\x02", b"\x93NUMPY", b"{", b"[", b"GGUF", b"\x50\0\0\0\0\0\0\0{"]),
)
def test_any_bytes_are_read_or_refused_by_name(tmp_path, data, begin):
    path = tmp_path / "v.bin"
    path.write_bytes(begin + data)
    try:
        read_vector_file(path, 1, "block_output")
    except ValueError as e:
        assert str(path) in str(e)


def held(tmp_path, suffix, value):
    "A file with tensors and other things in it, as `torch.save`, numpy, JSON or safetensors have them."
    path = tmp_path / f"v{suffix}"
    tensors = {k: v for k, v in value.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in value.items() if k not in tensors}
    if suffix == ".pt":
        torch.save(value, path)
    elif suffix == ".npz":
        np.savez_compressed(
            path, **{k: v.numpy() for k, v in tensors.items()}, **{k: np.array(v) for k, v in rest.items()}
        )
    elif suffix == ".json":
        path.write_text(json.dumps({k: v.tolist() for k, v in tensors.items()} | rest))
    else:
        save_safetensors(
            {k: v.contiguous() for k, v in tensors.items()}, path, metadata={k: str(v) for k, v in rest.items()}
        )
    return path


HOLDING = [".pt", ".npz", ".json", ".safetensors"]


@pytest.mark.parametrize("suffix", HOLDING)
@pytest.mark.parametrize("field", [
    {"layers": [18, 19]}, {"layer": [18, 19]}, {"target_layers": [18, 19]}, {"layers": ["layer_18", "layer_19"]}, {"layers": ["18", "19"]},
    {"layer_indices": [18.0, 19.0]},
])  # fmt: skip
@pytest.mark.parametrize("name", [None, "vectors"])
def test_a_field_numbers_the_rows_in_every_format(tmp_path, suffix, field, name):
    path = held(tmp_path, suffix, {"vectors": STATES[:2]} | field)
    got = directions(path, convention="block_output", name=name)
    assert list(got) == [18, 19] and torch.equal(got[18], STATES[0]) and torch.equal(got[19], STATES[1])
    assert list(directions(path, 19, "hidden_states", name=name)) == [18]
    with pytest.raises(ValueError, match="no layer 1"):
        directions(path, 1, "block_output", name=name)


@pytest.mark.parametrize("suffix", HOLDING)
@pytest.mark.parametrize("field", [
    {"start_layer": 10}, {"first_layer": 10}, {"layer_offset": 10}, {"layer_range": [10, 12]}, {"layers": ["early", "late"]}, {"num_layers": 30}, {"layers": 30}, {"n_layers": 40},
])  # fmt: skip
def test_rows_that_may_be_other_layers_are_asked_for(tmp_path, suffix, field):
    path = held(tmp_path, suffix, {"vectors": STATES[:2]} | field)
    for layers in (None, 1, [0]):
        with pytest.raises(ValueError, match="so its rows may not be layers 0 to 1"):
            directions(path, layers, "block_output")
    got = directions(path, [10, 11], "block_output")
    assert list(got) == [10, 11] and torch.equal(got[11], STATES[1])


@pytest.mark.parametrize(
    "field", [{"num_layers": 4}, {"n_layers": 5}, {"start_layer": 0}, {"layer_type": "x"}, {"seed": 3}]
)
@pytest.mark.parametrize("suffix", HOLDING)
def test_rows_that_fit_what_the_file_tells_are_read(tmp_path, suffix, field):
    assert list(directions(held(tmp_path, suffix, {"vectors": STATES} | field), convention="block_output")) == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("value", [
    {"0": {"layer": 18, "vector": BLOCKS[0]}}, {"layers": [18, 19], "vectors": {"0": BLOCKS[0], "1": BLOCKS[1]}},
    {"layer": 18, "directions": {0: BLOCKS[0], 1: BLOCKS[1]}}, {"hook_name": "blocks.3.hook_resid_post", "layer_2": BLOCKS[0]},
])  # fmt: skip
def test_a_name_and_a_field_that_disagree_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="its fields name .*, and its tensors"):
        directions(tmp_path / "v.pt", convention="block_output")


def test_a_layer_that_a_field_and_a_name_agree_on_is_read(tmp_path):
    torch.save({"layer": 3, "directions": {2: BLOCKS[0], 3: BLOCKS[1]}}, tmp_path / "v.pt")
    assert list(directions(tmp_path / "v.pt", 3, "block_output")) == [3]
    with pytest.raises(ValueError, match="its fields name 3, and its tensors 2"):
        directions(tmp_path / "v.pt", 2, "block_output")


@pytest.mark.parametrize("layers", [None, 1, 3, [2]])
def test_a_field_for_one_layer_and_many_rows_are_refused(tmp_path, layers):
    "Rows may be layers, features of an autoencoder, or samples."
    torch.save({"hook_name": "blocks.3.hook_resid_post", "W_dec": STATES}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="its fields name 3, and its tensor has 5 rows"):
        directions(tmp_path / "v.pt", layers, "block_output")


def test_rows_for_layers_counted_from_the_end(tmp_path):
    path = write(tmp_path / "v.pt", STATES[:2])
    got = directions(path, [-2, -1], "block_output")
    assert list(got) == [-2, -1] and torch.equal(got[-1], STATES[1])
    assert list(directions(path, [-2, -1], "block_input")) == [-3, -2]
    with pytest.raises(ValueError, match="may be rows of its tensor or their numbers"):
        directions(path, [-1, -2], "block_output")
    assert list(directions(write(tmp_path / "v.pt", STATES), -1, "block_output")) == [4]


@pytest.mark.parametrize("suffix", DICTS)
@pytest.mark.parametrize(
    "name", ["llama-3.1", "Qwen2.5", "mean_v0.2", "layers_10_20", "layers_10-20", "layer 3 to 7", "layers 3:7", "-1.18"]
)
def test_other_numbers_are_no_layers(tmp_path, suffix, name):
    path = write(tmp_path / f"v{suffix}", {name: BLOCKS[0]})
    with pytest.raises(ValueError, match="which layer its direction is for"):
        directions(path, convention="block_output")
    assert list(directions(path, 18, "block_output")) == [18]
    if name.startswith("layers_"):
        with pytest.raises(ValueError, match="is of certain layers"):
            directions(write(tmp_path / f"v{suffix}", {name: STATES}), convention="block_output")


@pytest.mark.parametrize("source", ["2024-05-01", "arXiv:2406.11717", "arXiv 2401.5", "7"])
def test_where_a_file_comes_from_is_no_layer(tmp_path, source):
    path = held(tmp_path, ".safetensors", {"v": BLOCKS[0], "source": source})
    assert list(directions(path, 18, "block_output")) == [18]
    with pytest.raises(ValueError, match="which layer its direction is for"):
        directions(path, convention="block_output")


@pytest.mark.parametrize("name", [
    "layer_3_attn_out", "mlp_layer_3", "mlp.3", "model.layers.3.linear_attn", "model.layers.3.block_sparse_moe", "layers.3.feed_forward",
    "layer_3.o_proj", "decoder.layers.3.self_attn_layer_norm", "transformer.h.3.ln_f", "layer_3_head_2",
])  # fmt: skip
def test_a_part_of_a_block_is_never_taken_for_the_block(tmp_path, name):
    path = write(tmp_path / "v.pt", {name: BLOCKS[0]})
    with pytest.raises(ValueError, match="may be a part of the block. Pass layer_type="):
        directions(path, convention="block_output")
    assert SteeringVector.from_file(path, convention="block_output", layer_type="mlp").layer_type == "mlp"


@pytest.mark.parametrize(
    "name", ["normalised_layer_3", "layer_3.headline", "format.layers.3", "attentive.3", "layer_3.normed"]
)
def test_words_that_only_begin_like_a_part(tmp_path, name):
    assert list(directions(write(tmp_path / "v.pt", {name: BLOCKS[0]}), convention="block_output")) == [3]


def test_whole_numbers_in_json_are_no_direction(tmp_path):
    for value in ({"input_ids": [1, 2, 3]}, [1, 2, 3], {"18": [1, 0]}, {"shape": [[1, 2], [3, 4]]}):
        (tmp_path / "v.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match="no tensor of floating-point numbers"):
            directions(tmp_path / "v.json", 3, "block_output")
    (tmp_path / "v.json").write_text('{"tokens": [5, 7], "layer": 18, "vector": [1, 0.5, 0]}')
    assert torch.equal(directions(tmp_path / "v.json", convention="block_output")[18], torch.tensor([1.0, 0.5, 0.0]))


def test_lists(tmp_path):
    torch.save({"layers": [18, 3], "vectors": [BLOCKS[0], BLOCKS[1]]}, tmp_path / "v.pt")
    got = directions(tmp_path / "v.pt", convention="block_output")
    assert torch.equal(got[18], BLOCKS[0]) and torch.equal(got[3], BLOCKS[1])
    entry = {"layer": 18, "vector": BLOCKS[0].tolist(), "hookName": "blocks.18.hook_resid_pre"}
    (tmp_path / "v.json").write_text(json.dumps([entry]))
    assert list(directions(tmp_path / "v.json")) == [17]
    (tmp_path / "v.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(ValueError, match="a list of 2 things. Put the one you want"):
        directions(tmp_path / "v.json")


def test_a_harness_file_may_be_a_list(tmp_path):
    "As the harness's own description has it."
    step = {"steering_vector": BLOCKS[0], "steering_coefficient": 2.0, "action": "add", "bias": None}
    for steps in ([{"hookpoint": "layers.1"} | step], [{"hookpoint": f"layers.{n}"} | step for n in (1, 3)]):
        torch.save(steps, tmp_path / "v.pt")
        got = directions(tmp_path / "v.pt")
        assert list(got) == [1, 3][: len(steps)] and all(torch.equal(v, 2 * BLOCKS[0]) for v in got.values())
    torch.save([{"hookpoint": "layers.1"} | step] * 2, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="several steps at one module"):
        directions(tmp_path / "v.pt")


@pytest.mark.parametrize("suffix", HOLDING)
@pytest.mark.parametrize("field, words", [
    ({"layers": [3, 3]}, "name a layer twice"), ({"layers": ["layer_3", "3"]}, "name a layer twice"),
    ({"layers": [3, 4], "layer_ids": [4, 5]}, "disagree about its layers"), ({"target_layers": [3], "layers": [3, 4]}, "disagree about its layers"),
])  # fmt: skip
def test_fields_that_cannot_both_be_right(tmp_path, suffix, field, words):
    with pytest.raises(ValueError, match=words):
        directions(held(tmp_path, suffix, {"vectors": STATES[:2]} | field), convention="block_output")
