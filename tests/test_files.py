"""Files: exact, atomic, and every damaged one refused by name, without anything in it being run."""

import json
import os
import pickle
import random
import struct

import families
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from steering_vectors import SteeringVector, train_steering_vector
from steering_vectors.demo import tiny_tokenizer
from steering_vectors.vectors import files, headers, hub, provenance
from steering_vectors.vectors.files import VectorData, load_file, save_file
from steering_vectors.vectors.hub import VectorFolder
from steering_vectors.vectors.provenance import Provenance

STORY = Provenance(
    model_id="someone/tiny-llama",
    revision="0123456789abcdef",
    model_type="llama",
    hidden_size=8,
    num_layers=6,
    aggregator="mean_aggregator",
    read_position="-1",
    num_pairs=60,
    library_version="1.0.0",
    activation_norms={0: 1.5, 3: 0.1},
    suggested_multiplier=-2.5,
    note='joyful "against" miserable ☺ \ud83d \x00',
    extra={"seed": 3, "path": [None, True, {"deep": 0.25}]},
)


def layers(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(8, generator=g, dtype=torch.float64).to(dtype) for n in (3, 0)}


def same(a: VectorData, b: VectorData) -> bool:
    return (
        (a.layer_type, a.provenance) == (b.layer_type, b.provenance)
        and a.layer_activations.keys() == b.layer_activations.keys()
        and all(
            v.dtype == b.layer_activations[n].dtype and torch.equal(v, b.layer_activations[n])
            for n, v in a.layer_activations.items()
        )
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_value_comes_back_exactly(tmp_path, dtype):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    g = torch.Generator().manual_seed(1)
    info = torch.iinfo(bits)
    v = torch.randint(info.min, info.max, (65536,), generator=g, dtype=bits).view(dtype)  # any bits: subnormals, -0.0
    v = torch.where(v.isfinite(), v, torch.tensor(-0.0, dtype=dtype))
    save_file(tmp_path / "v.safetensors", {5: v}, "mlp", Provenance())
    back = load_file(tmp_path / "v.safetensors").layer_activations[5]
    assert back.dtype == dtype and torch.equal(back.view(bits), v.view(bits))


def test_the_whole_story_comes_back(tmp_path):
    save_file(tmp_path / "v", layers(), "self_attn", STORY)
    back = load_file(tmp_path / "v")
    assert same(back, VectorData(layers(), "self_attn", STORY))
    assert list(back.layer_activations) == [0, 3]
    with safe_open(tmp_path / "v", framework="pt") as f:
        header = json.loads(f.metadata()["steering_vector"])
    assert header["format_version"] == 1 and header["num_pairs"] == 60 and header["layer_type"] == "self_attn"


def test_numbers_of_numpy_are_written(tmp_path):
    story = Provenance(num_pairs=np.int64(3), suggested_multiplier=np.float32(0.5), activation_norms={1: np.float64(2)})
    save_file(tmp_path / "v", layers(), "mlp", story)
    assert load_file(tmp_path / "v").provenance == Provenance(
        num_pairs=3, suggested_multiplier=0.5, activation_norms={1: 2.0}
    )


def test_tensors_may_share_storage_require_grad_or_be_views(tmp_path):
    one = torch.randn(4, 8, requires_grad=True)
    vector = {n: one[n] for n in range(4)} | {n: one[0] for n in range(4, 7)} | {7: torch.randn(8, 2)[:, 0]}
    save_file(tmp_path / "v", vector, "mlp", Provenance())
    back = load_file(tmp_path / "v").layer_activations
    assert all(torch.equal(back[n], vector[n]) and not back[n].requires_grad for n in vector)


@pytest.mark.parametrize("story, error", [
    (dict(num_pairs="3"), TypeError), (dict(num_pairs=3.5), TypeError), (dict(hidden_size=True), TypeError),
    (dict(note=3), TypeError), (dict(activation_norms=[1.0]), TypeError), (dict(extra=[1]), TypeError),
    (dict(suggested_multiplier="2"), TypeError), (dict(suggested_multiplier=float("nan")), ValueError),
])  # fmt: skip
def test_a_story_of_wrong_kinds_is_refused_when_written(story, error):
    with pytest.raises(error, match=f"Provenance.{next(iter(story))}"):
        Provenance(**story)


@pytest.mark.parametrize("vector, story, words", [
    ({}, {}, "it has no layers"),
    ({-1: torch.ones(8)}, {}, "layer -1 counts from the end"),
    ({0: torch.ones(8), -1: torch.ones(8)}, {}, "layer -1 counts from the end"),
    ({True: torch.ones(8)}, {}, "True is not a layer number"),
    ({"0": torch.ones(8)}, {}, "'0' is not a layer number"),
    ({6: torch.ones(8)}, {"num_layers": 6}, "comes from a model of 6 layers"),
    ({0: torch.ones(8)}, {"hidden_size": 9}, "layer 0 is 8 wide, but the model is 9 wide"),
    ({0: torch.ones(8), 1: torch.ones(7)}, {}, "layer 1 is 7 wide, but another layer is 8 wide"),
    ({0: torch.ones(1, 8)}, {}, "shape (1, 8)"),
    ({0: torch.tensor(1.0)}, {}, "shape ()"),
    ({0: torch.ones(0)}, {}, "shape (0,)"),
    ({0: torch.ones(8).to(torch.float8_e4m3fn)}, {}, "float8"),
    ({0: torch.ones(8, dtype=torch.cfloat)}, {}, "complex"),
    ({0: torch.tensor([1.0, float("inf")])}, {}, "NaN or infinity"),
    ({0: torch.tensor([1.0, float("nan")])}, {}, "NaN or infinity"),
    ({0: torch.ones(8)}, {"extra": {"a": float("nan")}}, "what JSON cannot"),
    ({0: torch.ones(8)}, {"extra": {"a": object()}}, "what JSON cannot"),
    ({0: torch.ones(8)}, {"activation_norms": {0: float("inf")}}, "what JSON cannot"),
])  # fmt: skip
def test_what_must_not_be_saved_leaves_the_old_file(tmp_path, vector, story, words):
    path = tmp_path / "old.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError) as e:
        save_file(path, vector, "decoder_block", Provenance(**story))
    assert words in str(e.value) and str(path) in str(e.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["old.safetensors"]


def test_an_unknown_layer_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Choose decoder_block"):
        save_file(tmp_path / "v", layers(), "decoder", Provenance())


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "v"
    save_file(path, layers(), "mlp", STORY)
    before = path.read_bytes()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, where, stop)
    with pytest.raises(KeyboardInterrupt):
        save_file(path, {0: torch.zeros(8)}, "mlp", STORY)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["v"]


def test_saving_follows_a_link_and_respects_the_umask(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "v")
    save_file(tmp_path / "link", layers(), "mlp", STORY)
    assert (tmp_path / "link").is_symlink() and same(
        load_file(tmp_path / "real" / "v"), VectorData(layers(), "mlp", STORY)
    )
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "real" / "v").stat().st_mode & 0o777 == 0o666 & ~umask


class Trap:
    "Unpickling it makes a folder."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch, old format", "numpy"])
def test_a_pickle_is_named_and_never_run(tmp_path, how):
    path, trap = tmp_path / "v", Trap(tmp_path / "sprung")
    if how == "pickle":
        path.write_bytes(pickle.dumps(trap))
    elif how == "numpy":
        with open(path, "wb") as f:
            np.save(f, np.array([trap], dtype=object), allow_pickle=True)
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match="v cannot be read as a steering vector: it is"):
        load_file(path)
    assert os.listdir(tmp_path) == ["v"]


def with_header(header: dict | str, tensors=None, **texts: str) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return save(tensors or {"layer.0": torch.ones(8)}, metadata={"steering_vector": text, **texts})


GOOD = {"format_version": 1, "layer_type": "mlp"}


@pytest.mark.parametrize("data, words", [
    (b"", "damaged, or not a safetensors file"),
    (b"{}", "damaged, or not a safetensors file"),
    (b"GGUF\3\0\0\0" + b"\0" * 50, "GGUF file, which `SteeringVector.from_gguf` reads"),
    (struct.pack("<Q", 2**62) + b"{}", "damaged"),
    (struct.pack("<Q", 12) + b"[" * 12, "damaged"),
    (save({"layer.0": torch.ones(8)}), "no `steering_vector` header"),
    (save({}), "holds nothing and no `steering_vector` header"),
    (with_header("[]"), "does not say which version"),
    (with_header("{}"), "does not say which version"),
    (with_header("[" * 100_000), "not JSON"),
    (with_header('{"format_version": 1, "format_version": 1, "layer_type": "mlp"}'), "two fields have the same name"),
    (with_header('{"format_version": 1, "layer_type": "mlp", "suggested_multiplier": NaN}'), "not a number of JSON"),
    (with_header('{"format_version": 1, "layer_type": "mlp", "suggested_multiplier": 1e999}'), "not finite"),
    (with_header('{"format_version": 1, "layer_type": "mlp", "suggested_multiplier": 1' + "0" * 400 + "}"), "not finite"),
    (with_header('{"format_version": 1, "layer_type": "mlp", "num_pairs": 1' + "0" * 5000 + "}"), "not JSON"),
    (with_header(GOOD | {"format_version": True}), "does not say which version"),
    (with_header(GOOD | {"format_version": 1.0}), "does not say which version"),
    (with_header(GOOD | {"format_version": 2}), "version 2; this library reads version 1"),
    (with_header(GOOD | {"layer_type": ["mlp"]}), "Unknown layer_type"),
    (with_header({"format_version": 1}), "Unknown layer_type"),
    (with_header(GOOD | {"later": {"a": 1}}), "a field 'later'"),
    (with_header(GOOD | {"texts": {}}), "a field 'texts'"),
    (with_header(GOOD | {"calibration": float("inf")}), "not a number of JSON"),
    (with_header('{"format_version": 1, "layer_type": "mlp", "calibration": [1e999]}'), "not finite"),
    (with_header(GOOD | {"checksum": "sha256"}), "its checksum, or a text beside it, is missing"),
    (with_header(GOOD | {"checksum": "sha256"}, format="pt", sha257="0"), "its checksum, or a text beside it, is missing"),
    (with_header(GOOD | {"checksum": "blake3"}), "of the kind 'blake3'"),
    (with_header(GOOD | {"num_pairs": 1.5}), "num_pairs is 1.5"),
    (with_header(GOOD | {"hidden_size": "8"}), "hidden_size is '8'"),
    (with_header(GOOD | {"extra": 3}), "extra is 3"),
    (with_header(GOOD | {"extra": None}), "extra is None"),
    (with_header(GOOD | {"activation_norms": [1]}), "activation_norms are not named by layers"),
    (with_header(GOOD | {"activation_norms": {"-1": 1}}), "activation_norms are not named by layers"),
    (with_header(GOOD | {"activation_norms": {"1": "a"}}), "activation_norms are not all finite numbers"),
    (with_header(GOOD | {"activation_norms": {"1": 10**400}}), "activation_norms are not all finite numbers"),
    (with_header(GOOD | {"activation_norms": {"1": True}}), "activation_norms are not all finite numbers"),
    (with_header(GOOD | {"hidden_size": 9}), "layer 0 is 8 wide, but the model is 9 wide"),
    (with_header(GOOD | {"num_layers": 0}), "comes from a model of 0 layers"),
    (with_header(GOOD, sha256="0"), "do not match its checksum"),
    (with_header(GOOD, {"layer.00": torch.ones(8)}), "a tensor 'layer.00'"),
    (with_header(GOOD, {"layer.-1": torch.ones(8)}), "a tensor 'layer.-1'"),
    (with_header(GOOD, {"layer.٣": torch.ones(8)}), "a tensor 'layer."),
    (with_header(GOOD, {"3": torch.ones(8), "layer.3": torch.ones(8)}), "a tensor '3'"),
    (with_header(GOOD, {"model.layer.3": torch.ones(8)}), "a tensor 'model.layer.3'"),
    (with_header(GOOD, {"layer.0": torch.ones(2, 4)}), "shape (2, 4)"),
    (with_header(GOOD, {"layer.0": torch.ones(8, dtype=torch.int8)}), "int8"),
    (with_header(GOOD, {"layer.0": torch.full((8,), float("nan"))}), "NaN or infinity"),
    (with_header(GOOD, {"layer.0": torch.ones(8), "layer.1": torch.ones(9)}), "9 wide, but another layer is 8 wide"),
])  # fmt: skip
def test_a_wrong_file_says_what_is_wrong_and_with_which_file(tmp_path, data, words):
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError) as e:
        load_file(path)
    assert words in str(e.value) and str(path) in str(e.value)


def test_a_file_of_another_program_needs_no_checksum(tmp_path):
    (tmp_path / "v").write_bytes(with_header(GOOD))
    assert same(load_file(tmp_path / "v"), VectorData({0: torch.ones(8)}, "mlp", Provenance()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
UNKNOWN = st.dictionaries(
    (st.sampled_from(["needs", "calibration", "gate", "Note"]) | st.text()).filter(
        lambda k: k not in provenance.KNOWN_FIELDS
    ),
    JSON,
    max_size=4,
)
writable = st.characters(exclude_categories=["Cs"])  # safetensors writes UTF-8


def exactly(value):
    "A JSON value that also tells 1, 1.0 and True apart."
    return json.dumps(value, sort_keys=True)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    UNKNOWN,
    st.dictionaries(st.text(writable).filter(lambda k: k not in provenance.OWN_FIELDS), st.text(writable), max_size=3),
)
def test_what_a_later_version_adds_is_kept_and_written_back(tmp_path, fields, texts):
    path, again = tmp_path / "tomorrow", tmp_path / "again"
    header = json.dumps(GOOD | {"num_pairs": 3} | fields)
    path.write_bytes(with_header(header, **{"format": "pt"} | texts))
    vector = SteeringVector.load(path)
    assert exactly(vector.provenance.later) == exactly(fields) and vector.provenance.texts == texts
    vector.to(torch.float32)[0].save(again)
    with safe_open(again, framework="pt") as f:
        kept = f.metadata()
    written = json.loads(kept["steering_vector"])
    assert written.pop("checksum") == "sha256" and exactly(written) == exactly(GOOD | {"num_pairs": 3} | fields)
    assert {k: v for k, v in kept.items() if k not in provenance.OWN_FIELDS} == texts
    assert SteeringVector.load(again).provenance == vector.provenance
    data = bytearray(again.read_bytes())
    data[-1] ^= 1
    again.write_bytes(data)
    with pytest.raises(ValueError, match="do not match its checksum"):
        load_file(again)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(UNKNOWN)
def test_control_vectors_and_folders_keep_them_too(tmp_path, fields):
    vector = SteeringVector({1: torch.ones(8)}, provenance=Provenance(later=fields, note="joy"))
    vector.to_gguf(tmp_path / "v.gguf")
    vector.save_pretrained(tmp_path / "v")
    for back in (SteeringVector.from_gguf(tmp_path / "v.gguf"), SteeringVector.from_pretrained(tmp_path / "v")):
        assert exactly(back.provenance.later) == exactly(fields) and back.provenance.note == "joy"
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    assert exactly({k: config[k] for k in fields}) == exactly(fields)


@given(st.integers().filter(lambda n: n != 1), st.none() | st.text(st.characters(categories=["L", "N"]), min_size=1))
def test_another_version_is_refused_and_names_what_it_needs(version, needs):
    header = {"format_version": version, "needs": needs, "layer_type": "a new kind", "gate": [1.0]}
    with pytest.raises(ValueError, match=f"version {version}; this library reads version 1") as e:
        headers.read_header(json.dumps(header))
    assert f"steering-vectors {needs}:" in str(e.value) or (needs is None and "another version" in str(e.value))
    assert "pip install -U steering-vectors" in str(e.value)


def test_what_somebody_added_to_config_json_is_kept(tmp_path):
    VectorFolder(VectorData(layers(), "mlp", STORY)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"licence": "MIT", "num_pairs": 7}))
    back = SteeringVector.from_pretrained(tmp_path)
    assert back.provenance.later == {"licence": "MIT"} and back.provenance.num_pairs == STORY.num_pairs
    back.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config | {"licence": "MIT"}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        SteeringVector.from_pretrained(tmp_path)


def test_arithmetic_does_not_carry_what_it_cannot_understand():
    v = SteeringVector({1: torch.ones(8)}, provenance=Provenance(later={"calibration": 0.1}))
    for made in (2 * v, v / 2, -v, v + v, v.normalize(), v.at([0, 1])):
        assert made.provenance.later == {}
    for same in (v[1], v.to(torch.bfloat16), v[[1]]):
        assert same.provenance.later == {"calibration": 0.1}


def test_two_sets_are_counted_apart(tmp_path):
    story = Provenance(num_positive=13, num_negative=np.int64(20), origin="sum of vectors")
    save_file(tmp_path / "v", layers(), "mlp", story)
    assert load_file(tmp_path / "v").provenance == story
    for wrong in (True, 1.5, "13"):
        with pytest.raises(TypeError, match="num_positive"):
            Provenance(num_positive=wrong)


@pytest.mark.parametrize("wrong, words", [
    (dict(later={"note": 1}), "it knows 'note'"), (dict(later={"format_version": 2}), "it knows 'format_version'"),
    (dict(texts={"sha256": "0"}), "it knows 'sha256'"), (dict(later={"texts": 1}), "it knows 'texts'"),
])  # fmt: skip
def test_known_names_are_not_smuggled_in(wrong, words):
    with pytest.raises(ValueError, match=words):
        Provenance(**wrong)
    with pytest.raises(TypeError, match="texts"):
        Provenance(texts={"a": 1})


def mutate(data: bytes, rng: random.Random) -> bytes:
    "One of the ways a file is damaged."
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    new = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
    at = min(i, len(data) - 1)
    return rng.choice([
        lambda: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],  # a bit turns
        lambda: data[:at] + bytes([rng.choice(b'{}[]",:0123456789-+.eE\\layer')]) + data[at + 1 :],  # a letter changes
        lambda: data[:i],  # cut off
        lambda: data[i:],  # the beginning is lost
        lambda: data[:i] + data[j:],  # a piece is lost
        lambda: data[:i] + new + data[i:],  # something is put in
        lambda: data[:i] + new + data[i + len(new) :],  # something is written over
        lambda: data + new,  # something follows
        lambda: data[:i] + data[j:] + data[i:j],  # two pieces change places
        lambda: data[:i] + bytes(j - i) + data[j:],  # a hole
        lambda: struct.pack("<Q", rng.choice([0, 1, i, 2**rng.randrange(64)])) + data[8:],  # another header length
    ])()  # fmt: skip


def test_thousands_of_damaged_files_are_refused_or_read_the_same(tmp_path):
    path, rng = tmp_path / "fuzzed.safetensors", random.Random(0)
    refused = 0
    for story in (Provenance(), STORY):
        save_file(path, layers(), "decoder_block", story)
        data, kept = path.read_bytes(), load_file(path)
        for k in range(2000):
            damaged = mutate(data, rng) if k % 4 else mutate(mutate(data, rng), rng)
            path.write_bytes(damaged)
            try:
                back = load_file(path)
            except ValueError as e:
                assert str(path) in str(e)
                refused += 1
            else:
                assert same(back, kept)
    assert refused > 3000


def scramble(value, rng: random.Random):
    "A JSON value with one place changed."
    strange = [None, True, 0, -1, 1e300, 10**30, "", "x", [], {}, {"0": 1}, [0], "mlp", 1]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return rng.choice([
            lambda: {**value, key: scramble(value[key], rng)},
            lambda: {k: v for k, v in value.items() if k != key},
            lambda: {**value, rng.choice(["layer", "x", "-1", "7", key.upper()]): rng.choice(strange)},
        ])()  # fmt: skip
    return rng.choice(strange)


def test_thousands_of_altered_headers_are_refused_or_obey_the_rules(tmp_path):
    path, rng = tmp_path / "altered.safetensors", random.Random(1)
    tensors = {f"layer.{n}": v for n, v in layers().items()}
    header, outcomes = json.loads(headers.write_header("mlp", STORY)), [0, 0]
    for _ in range(2000):
        path.write_bytes(save(tensors, metadata={"steering_vector": json.dumps(scramble(header, rng))}))
        try:
            vector, layer_type, story = load_file(path)
        except ValueError as e:
            assert str(path) in str(e)
            outcomes[0] += 1
        else:
            save_file(path, vector, layer_type, story)
            assert same(load_file(path), VectorData(vector, layer_type, story))
            outcomes[1] += 1
    assert min(outcomes) > 200


@pytest.mark.parametrize("name", ["向" * 80 + ".st", "v" * 255])  # as long as a file system allows
def test_a_long_name_is_written(tmp_path, name):
    save_file(tmp_path / name, layers(), "decoder_block", STORY)
    assert [p.name for p in tmp_path.iterdir()] == [name] and load_file(tmp_path / name).provenance == STORY


@pytest.mark.parametrize("family", ["qwen4_exp", "qwen4_exp_text", "llama"])
@pytest.mark.parametrize("layer_type", ["decoder_block", "mlp"])
def test_a_trained_vector_is_as_wide_as_its_story_says(tmp_path, family, layer_type):
    with families.quiet():  # the first two return several streams side by side
        model = families.build(family).to(torch.float32)
        v = train_steering_vector(model, tiny_tokenizer(), [("I am glad", "I am sad")], layer_type=layer_type)
    v.save(tmp_path / "v.safetensors")
    back = SteeringVector.load(tmp_path / "v.safetensors")
    assert back == v and back.provenance == v.provenance
    assert {len(x) for x in v.layer_activations.values()} == {v.provenance.hidden_size}
    back.apply(model)


def test_the_mixin_writes_and_reads_a_folder(tmp_path):
    vector = VectorData(dict(sorted(layers().items())), "mlp", STORY)
    VectorFolder(vector).save_pretrained(tmp_path / "v")
    assert sorted(os.listdir(tmp_path / "v")) == ["README.md", "config.json", "steering_vector.safetensors"]
    assert same(VectorFolder.from_pretrained(str(tmp_path / "v")).vector, vector)
    assert json.loads((tmp_path / "v" / "config.json").read_text())["aggregator"] == "mean_aggregator"


def test_the_card_tells_the_story(tmp_path):
    story = Provenance(
        model_id="someone/tiny-llama", note="joy: yes # not a comment", suggested_multiplier=2, num_pairs=60
    )
    VectorFolder(VectorData(layers(), "mlp", story)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/tiny-llama" and card.data.library_name == "steering-vectors"
    assert "steering-vector" in card.data.tags
    for words in ("joy: yes # not a comment", "multiplier=2)", "num pairs: 60", "`mlp`"):
        assert words in card.text
    assert hub.model_card(VectorData(layers(), "mlp", Provenance(model_id="/home/me/model"))).data.base_model is None


def test_pushing_uploads_the_folder(monkeypatch):
    seen = {}

    class Hub:
        def __init__(self, **options):
            seen["token"] = options["token"]

        def create_repo(self, repo_id, **options):
            seen["repo"] = (repo_id, options["private"])
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, commit_message, **options):
            seen["files"], seen["vector"] = sorted(os.listdir(folder_path)), load_file(folder_path / VectorFolder.FILE)
            seen["message"] = commit_message
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    vector = VectorData(layers(), "mlp", STORY)
    url = VectorFolder(vector).push_to_hub("me/joy", token="secret", private=True, commit_message="joy")
    assert (
        url == "commit" and seen["repo"] == ("me/joy", True) and seen["token"] == "secret" and seen["message"] == "joy"
    )
    assert seen["files"] == ["README.md", "config.json", "steering_vector.safetensors"] and same(seen["vector"], vector)


def test_a_repository_is_downloaded_with_the_options_given(tmp_path, monkeypatch):
    vector, asked = VectorData(layers(), "mlp", STORY), []
    VectorFolder(vector).save_pretrained(tmp_path)

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"], options["token"], options["local_files_only"]))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **options: download(**options))
    back = VectorFolder.from_pretrained("me/joy", revision="abc", token="secret", local_files_only=True).vector
    assert same(back, vector)
    assert asked == [("me/joy", name, "abc", "secret", True) for name in ("config.json", VectorFolder.FILE)]


@pytest.fixture
def no_hub(monkeypatch):
    "Any question to the Hub is a failure at once."

    def asked(*args, **options):
        raise AssertionError(f"the Hub was asked for {args or options}")

    monkeypatch.setattr(hub, "hf_hub_download", asked)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", asked)


@pytest.mark.parametrize("name", [
    "joy.safetensors", "me/joy.safetensors", "joy.gguf", "joy.PT", "./joy", "../joy", "/nowhere/joy", "a/b/c", "~/joy", "~",
    "joy\\vector", "me/joy/", ".joy",
])  # fmt: skip
def test_what_looks_like_a_path_is_never_asked_of_the_hub(no_hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        SteeringVector.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        SteeringVector.from_pretrained(tmp_path / "me" / "joy", revision="abc")


@pytest.mark.parametrize("name", ["a b", "", "me/jo y", "-joy", "joy..vector", "me/joy.", "joy/", "x" * 97, "ü/joy"])
def test_a_name_that_no_repository_can_have_is_refused(no_hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="There is no folder") as e:
        SteeringVector.from_pretrained(name)
    assert "Error" not in str(e.value)


def test_what_exists_is_read_at_once(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    vector = SteeringVector(layers(), "mlp", STORY)
    vector.save_pretrained("joy")
    vector.save("v")
    for name in (
        "joy",
        "./joy",
        "~/joy",
        tmp_path / "joy",
        str(tmp_path / "joy"),
        "joy/steering_vector.safetensors",
        "v",
        tmp_path / "v",
    ):
        back = SteeringVector.from_pretrained(name)
        assert back == vector and back.provenance == STORY
    os.makedirs("me/joy")
    with pytest.raises(
        FileNotFoundError, match="The folder me/joy has no steering_vector.safetensors; it holds nothing"
    ):
        SteeringVector.from_pretrained("me/joy")
    torch.save(layers(), "joy.pt")
    with pytest.raises(
        ValueError,
        match="joy.pt cannot be read as a steering vector: it is a PyTorch file, whose tensors `SteeringVector",
    ):
        SteeringVector.from_pretrained("joy.pt")


def test_a_repository_is_still_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def ask(*args, **options):
        asked.append(args or options["repo_id"])
        raise OSError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", ask)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", ask)
    for name in ("me/joy", "joy", "me/joy.v1", "me/joy-1_0"):
        with pytest.raises(OSError, match="offline"):
            SteeringVector.from_pretrained(name)
    assert len(asked) == 4


def test_fields_that_only_the_hubs_config_has_are_kept(tmp_path, monkeypatch):
    VectorFolder(VectorData(layers(), "mlp", STORY)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"licence": "MIT"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo_id, filename, **options: str(tmp_path / filename))
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda filename, **options: str(tmp_path / filename)
    )
    assert SteeringVector.from_pretrained("me/joy").provenance.later == {"licence": "MIT"}


def test_a_large_file_of_another_kind_is_not_read_whole(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(save({"w": torch.ones(1000, 1000)}))
    monkeypatch.setattr(files, "read_tensors", None)
    with pytest.raises(
        ValueError, match="it holds w and no `steering_vector` header. `SteeringVector.from_file` reads"
    ):
        load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("how", ["cut", "header", "length"])
def test_a_refusal_has_no_words_of_the_deserialiser(tmp_path, how):
    save_file(tmp_path / "v", layers(), "mlp", STORY)
    data = (tmp_path / "v").read_bytes()
    data = {
        "cut": data[:-3],
        "header": data[:8] + b"{" + data[9:].replace(b":", b";", 1),
        "length": b"\xff" * 8 + data[8:],
    }[how]
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(ValueError) as e:
        load_file(tmp_path / "v")
    assert (
        str(e.value)
        == f"{tmp_path / 'v'} cannot be read as a steering vector: it is damaged, or not a safetensors file."
    )
    assert "Safetensor" not in str(e.value)


def test_a_file_is_read_and_written_whatever_the_default_device(tmp_path):
    torch.set_default_device("meta")
    try:
        save_file(tmp_path / "v", layers_on_cpu, "mlp", STORY)
        back = load_file(tmp_path / "v")
    finally:
        torch.set_default_device(None)
    assert same(back, VectorData(dict(sorted(layers().items())), "mlp", STORY))


layers_on_cpu = layers()
