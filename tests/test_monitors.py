"""A monitor's numbers are those of the replies alone, whatever else is in the batch; AUROC is the share of ordered pairs."""

import pytest
import torch

from steering_vectors import SteeringVector, auroc, monitor, record_activations
from steering_vectors.demo import tiny_model, tiny_tokenizer


def talk(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]


def test_by_hand() -> None:
    "Found again with the tokenizer's own text and one pass per conversation."
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    words = ["Hi", "Hello", "And?", "zzz!", "Ok", "So be it."]
    found = monitor(model, tokenizer, SteeringVector({0: v, 1: v}), talk(*words))
    text = tokenizer.apply_chat_template(talk(*words), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_offsets_mapping=True)
    with record_activations(model, layer_nums=[0, 1]) as seen, torch.no_grad():
        model(ids["input_ids"])
    for n, word in enumerate(words[1::2]):
        start = text.index(word)
        inside = [start <= a and b <= start + len(word) for a, b in ids["offset_mapping"][0].tolist()]
        for k in (0, 1):
            along = seen[k][0][0] @ v / v.norm()
            assert abs(along[torch.tensor(inside)].mean() - found.values[n, k]) < 1e-5
    usual = [talk("Who?", "Me"), talk("a", "A much longer reply than others.", "b", "B")]
    scaled = monitor(model, tokenizer, SteeringVector({0: v, 1: v}), talk(*words), usual)
    alone = torch.cat([monitor(model, tokenizer, SteeringVector({0: v, 1: v}), each).values for each in usual])
    assert torch.allclose(scaled.values, (found.values - alone.mean(0)) / alone.std(0), atol=1e-4)


def test_auroc_counts_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 9, (40,), generator=g), torch.randint(2, 11, (30,), generator=g)
    pairs = (a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None]).double()
    assert abs(auroc(a, b) - float(pairs.mean())) < 1e-12
    with pytest.raises(ValueError, match="NaN"):
        auroc([float("nan")], [1.0])


def test_no_reply() -> None:
    with pytest.raises(ValueError, match="none of"), pytest.warns(UserWarning, match="header"):
        monitor(tiny_model("llama"), tiny_tokenizer(), SteeringVector({0: torch.ones(32)}), talk("Hi"))
