"""The same calls give the same vectors as in steering-vectors 0.12.2, which runs in a process of its own."""

from pathlib import Path
from typing import Any

import peers
import pytest
import torch

from steering_vectors.demo import tiny_model, tiny_tokenizer

CALLS = """
from steering_vectors import *
def calls(model, tokenizer):
    how = {} if model.config.model_type == "gpt2" else {"batch_size": 4}  # 0.12.2 pads, which moves GPT-2's positions
    def after_the_mark(text):
        return len(tokenizer(text[: text.index("?")])["input_ids"]) + 2
    pairs = [(f"Is {a}, then, {b}? {yes}", f"Is {a}, then, {b}? {no}") for a, b in [("tea", "good"), ("x", "y"), ("a cup", "fine")]
             for yes, no in [("Yes", "No"), ("Surely", "Hardly ever"), ("It is", "Not at all")]]
    placed = [SteeringVectorTrainingSample(a, b, 5, -2) for a, b in pairs]
    aggregators = {"mean": mean_aggregator(), "pca": pca_aggregator(), "logistic": logistic_aggregator()}
    found = {name: train_steering_vector(model, tokenizer, pairs, aggregator=a) for name, a in aggregators.items()}
    found["options"] = train_steering_vector(model, tokenizer, pairs, aggregator=logistic_aggregator({"C": 0.1}))
    found["a number"] = train_steering_vector(model, tokenizer, pairs, read_token_index=16)
    found["a function"] = train_steering_vector(model, tokenizer, pairs, read_token_index=after_the_mark)
    found["by sample"] = train_steering_vector(model, tokenizer, placed, layers=[-1, 0])
    found["self_attn"] = train_steering_vector(model, tokenizer, pairs, layer_type="self_attn", **how)
    found["custom"] = train_steering_vector(model, tokenizer, pairs, aggregator=lambda p, n: (p - n).amax(0))
    return {f"{name} {layer}": v.float() for name, s in found.items() for layer, v in s.layer_activations.items()}
"""

OLD = (
    CALLS
    + """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.save(calls(AutoModelForCausalLM.from_pretrained(sys.argv[1]), tokenizer), sys.argv[2])
"""
)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_vectors_are_those_of_0_12(kind: str, tmp_path: Path) -> None:
    library = peers.install("steering-vectors==0.12.2")
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    peers.run(OLD, tmp_path / "model", tmp_path / "old.pt", peers=library)
    old = torch.load(tmp_path / "old.pt")
    names: dict[str, Any] = {}
    exec(CALLS, names)
    new = names["calls"](model, tokenizer)
    assert old.keys() == new.keys() and len(old) == 3 * 8 + 2
    for name, v in old.items():
        close = 2e-3 if "logistic" in name or "options" in name else 1e-4  # scikit-learn stops when it is close enough
        assert torch.allclose(v, new[name], atol=close * float(v.abs().max())), name
