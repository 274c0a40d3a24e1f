"""Prompts that share a batch are answered as they would be alone, in families of every kind."""

from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch

from steering_vectors import SteeringVector, sweep
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.evaluate.arguments import in_model
from steering_vectors.evaluate.writing import _answered
from steering_vectors.modes import undisturbed
from steering_vectors.train import pools
from steering_vectors.train.answering import left_padded, prompt_groups
from steering_vectors.train.damage import _drawn_answers

ROWS = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23], [31, 32, 33, 34], [41, 42, 43]]
TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=2)
NAMES = "llama gpt2 bloom opt gpt_neox gemma3_text qwen2 falcon mpt mamba rwkv recurrent_gemma bamba xlnet ctrl biogpt".split()
BY_LENGTH = {"xlnet"}  # a padded prompt is answered differently
ALONE = {"rwkv"}  # its cached steps mix the rows of a batch


def answered(model: Any, rows: list[list[int]]) -> list[list[int]]:
    batch = left_padded(rows, 0)
    with undisturbed(model):
        out = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_shares_a_batch_is_answered_alike(name: str) -> None:
    model = families.build(name).eval()
    groups = prompt_groups(model, TOKENIZER, ROWS)
    assert sorted(n for group in groups for n in group) == [0, 1, 2, 3]
    alone, by_length = [[1], [3], [2], [0]], [[1, 3], [2], [0]]
    assert groups == (alone if name in ALONE else by_length if name in BY_LENGTH else [[1, 3, 2, 0]])
    for group in groups:
        together = answered(model, [ROWS[n] for n in group])
        assert together == [answered(model, [ROWS[n]])[0] for n in group]


class Numbered(torch.nn.Module):
    "Embeds tokens together with the number of their column, padding included."

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) + torch.arange(ids.shape[1])[:, None]


@pytest.mark.parametrize("kind", ["llama", "numbered", "rwkv"])
def test_steered_texts_are_those_of_each_question_alone(kind: str) -> None:
    model = families.build("rwkv").eval() if kind == "rwkv" else tiny_model()
    if kind == "numbered":
        model.model.embed_tokens = Numbered(model.model.embed_tokens)
    subject = in_model(model, SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))}))
    multipliers = [-4.0, 0.0, 4.0]
    together = _answered(model, TOKENIZER, subject, ROWS, multipliers, 5)
    assert together == [
        [_answered(model, TOKENIZER, subject, [row], [m], 5)[0][0] for row in ROWS] for m in multipliers
    ]
    assert together[0] != together[1] != together[2]


@pytest.mark.parametrize("name", sorted({*NAMES, "falcon_h1"} - {"xlnet"}))  # XLNet takes no multiplier per row
def test_a_sweep_answers_each_layer_and_multiplier_as_alone(name: str) -> None:
    model = families.build(name).eval()
    v = SteeringVector(
        {n: 2 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(n)) for n in (0, 1)}
    )
    how: dict[str, Any] = {"multipliers": [-4, 0, 4], "max_new_tokens": 6}
    together = sweep(model, tiny_tokenizer(), v, ROWS[0], **how)
    for layer, m in together:
        with v[layer].apply(model, multiplier=m):
            alone = answered(model, [ROWS[0]])[0]
        written = list(together.token_ids[layer, m])
        assert written == alone[: len(written)]
    assert len(set(together.token_ids.values())) > 2


@pytest.mark.parametrize("name", ["llama", "rwkv"])
def test_many_answers_are_drawn_together_only_where_rows_do_not_mix(name: str, monkeypatch: Any) -> None:
    model, drawn = families.build(name).eval(), []

    def seen(model: Any, tokenizer: Any, ids: torch.Tensor, *how: Any) -> list[list[int]]:
        drawn.append(len(ids))
        return _drawn_answers(model, tokenizer, ids, *how)

    monkeypatch.setattr(pools, "_drawn_answers", seen)
    with undisturbed(model, 0):
        found = pools.many_answers(model, TOKENIZER, ROWS[0], 3, 6)
    assert drawn == ([1, 1, 1] if name in ALONE else [3])
    assert len(found) == 3 and len({tuple(said) for said in found}) > 1
