"""The same vector in llama.cpp and in transformers: the same change, at the same blocks."""

import ast
import json
import re
from pathlib import Path

import llamacpp
import pytest
import torch

from steering_vectors import SteeringVector, train_steering_vector
from steering_vectors.demo import joy_pairs, load_demo_model
from steering_vectors.vectors.gguf import gguf_bytes

MULTIPLIERS = [-3, -1, 0, 1, 3]  # those of the guide
QUESTION = [{"role": "user", "content": "Tell me about your day."}]


@pytest.fixture(scope="module")
def demo():
    llamacpp.binary()
    model, tokenizer = load_demo_model()
    vector = train_steering_vector(model, tokenizer, joy_pairs(tokenizer), layers=[15, 18], show_progress=False)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return model, tokenizer, vector, inputs


def ours(demo, vector, multiplier, words=24):
    model, tokenizer, _, inputs = demo
    with vector.apply(model, multiplier=multiplier):
        out = model.generate(**inputs, max_new_tokens=words, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def unquantised(demo, tmp_path_factory):
    return llamacpp.unquantised(tmp_path_factory.mktemp("model") / "f32.gguf")


def theirs(demo, path, multiplier=None, gguf_model=None):
    _, tokenizer, _, inputs = demo
    option = ["--control-vector", path] if multiplier is None else ["--control-vector-scaled", f"{path}:{multiplier}"]
    prompt = tokenizer.decode(inputs["input_ids"][0])
    return llamacpp.complete(prompt, *option, model=gguf_model or llamacpp.model())


def words(text):
    return re.findall(r"[\w']+", text)


@pytest.mark.parametrize("multiplier", [-3, 0, 3])
def test_in_float32_the_answers_are_the_same(demo, unquantised, tmp_path, multiplier):
    vector = demo[2][18]
    vector.to_gguf(tmp_path / "joy.gguf")
    a, b = words(ours(demo, vector, multiplier)), words(theirs(demo, tmp_path / "joy.gguf", multiplier, unquantised))
    print(multiplier, "|", " ".join(a), "|", " ".join(b))
    assert a[:12] == b[:12]


def recorded() -> dict[int, list[str]]:
    "What the page quotes of llama.cpp: for each layer, its answer at each multiplier."
    page = Path(__file__).parents[1] / "nbs" / "guide" / "llama_cpp.ipynb"
    cells = ["".join(cell["source"]) for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]]
    text = next(cell for cell in cells if "recorded = {" in cell)
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return ast.literal_eval(next(node.value for node in nodes if ast.unparse(node.targets[0]) == "recorded"))


@pytest.mark.parametrize("layer, multiplier", [(n, m) for n in (15, 18) for m in MULTIPLIERS])
def test_the_guide_quotes_the_engine(demo, unquantised, tmp_path, layer, multiplier):
    model, tokenizer, _, _ = demo
    vector = train_steering_vector(model, tokenizer, joy_pairs(tokenizer)[::2], layers=[layer], show_progress=False)
    vector.to_gguf(tmp_path / "joy.gguf")
    said = theirs(demo, tmp_path / "joy.gguf", multiplier, unquantised)
    quoted = recorded()[layer][MULTIPLIERS.index(multiplier)]
    assert quoted.startswith(" ".join(said.split()[:6]))


@pytest.mark.parametrize("multiplier", [0, 3])
def test_with_its_own_quantised_model_the_answers_begin_alike(demo, tmp_path, multiplier):
    "Its Q4_1 weights make llama.cpp round activations to 8 bits, so that near ties go either way later on."
    vector = demo[2][18]
    vector.to_gguf(tmp_path / "joy.gguf")
    a, b = words(ours(demo, vector, multiplier)), words(theirs(demo, tmp_path / "joy.gguf", multiplier))
    print(multiplier, "|", " ".join(a), "|", " ".join(b))
    assert a[:4] == b[:4]


def test_a_multiplier_may_be_folded_into_the_file(demo, tmp_path):
    demo[2].to_gguf(tmp_path / "joy.gguf")
    demo[2].to_gguf(tmp_path / "three.gguf", multiplier=3)
    assert theirs(demo, tmp_path / "joy.gguf", 3) == theirs(demo, tmp_path / "three.gguf")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_block_is_the_same_one(demo, unquantised, tmp_path, seed):
    "A large random direction makes a babble of its own at every block, so one block off would show."
    r = torch.randn(576, generator=torch.Generator().manual_seed(seed))
    babble = {n: ours(demo, SteeringVector({n: 200 * r / r.norm()}), 1.0)[:7] for n in (4, 5, 6)}
    SteeringVector({5: 200 * r / r.norm()}).to_gguf(tmp_path / "babble.gguf")
    assert len(set(babble.values())) == 3
    assert theirs(demo, tmp_path / "babble.gguf", gguf_model=unquantised)[:7] == babble[5]


def test_a_file_with_block_0_is_skipped_whole(demo, tmp_path):
    "Why `to_gguf` refuses block 0: llama.cpp says so in its log, and goes on without steering."
    directions = {"direction.0": torch.ones(576), "direction.18": demo[2].layer_activations[18]}
    (tmp_path / "zero.gguf").write_bytes(gguf_bytes({}, directions))
    demo[2].to_gguf(tmp_path / "joy.gguf")
    assert theirs(demo, tmp_path / "zero.gguf", 3) == theirs(demo, tmp_path / "joy.gguf", 0)
