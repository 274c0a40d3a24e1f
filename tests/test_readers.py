"""Readers: against scikit-learn, by ids and by words, on several families; refusals; nothing of the user's is changed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering_vectors import Tokens, record_activations, train_reader
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.modes import undisturbed
from steering_vectors.train.discriminants import discriminant, unseen_scores
from steering_vectors.train.prompts import continuation_ids

SAID = "come here|look at that|what a day|where are you|stop it now|this is good|give it back|let me in|hold on|not so fast".split(
    "|"
)
PAIRS = [tuple({"prompt": "Say: ", "response": text} for text in (said.upper(), said)) for said in SAID]
UNSEEN = [{"prompt": "Say: ", "response": text} for text in ("GO AWAY", "go away", "WHO IS IT", "who is there")]


def test_the_direction_is_that_of_scikit_learn() -> None:
    from sklearn.covariance import LedoitWolf

    g = torch.Generator().manual_seed(0)
    up, down = (torch.randn(30, 12, generator=g, dtype=torch.float64) for _ in range(2))
    up = up * torch.arange(1, 13) + 0.5
    within = torch.cat([up - up.mean(0), down - down.mean(0)])
    covariance = torch.tensor(LedoitWolf(assume_centered=True).fit(within.numpy()).covariance_)
    expected = torch.linalg.solve(covariance, up.mean(0) - down.mean(0))
    assert torch.allclose(discriminant(up, down).direction, expected, rtol=1e-8)


def test_scores_of_a_fold_do_not_depend_on_its_own_texts() -> None:
    g = torch.Generator().manual_seed(0)
    up, down = (torch.randn(10, 6, generator=g, dtype=torch.float64) for _ in range(2))
    high, _ = unseen_scores(up, down, 5)
    for n in (0, 7):
        left = [i for i in range(10) if i % 5 != n % 5]
        assert torch.isclose(high[n], discriminant(up[left], down[left]).scores(up[n : n + 1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_the_mean_over_the_answers_own_tokens_is_read(kind: str, dtype: torch.dtype) -> None:
    model, tokenizer = tiny_model(kind).to(dtype), tiny_tokenizer()
    reader = train_reader(model, tokenizer, PAIRS, layers=[0, 1])
    found = reader.scores(model, tokenizer, UNSEEN)
    for text, score in zip(UNSEEN, found, strict=True):
        prompt, answer = continuation_ids(tokenizer, text["prompt"], text["response"])
        with undisturbed(model), record_activations(model, layer_nums=[0, 1]) as seen:
            model(input_ids=torch.tensor([prompt + answer]))
        each = [
            seen[n][0][0, len(prompt) :].double().mean(0) @ v - reader.offsets[n] for n, v in reader.directions.items()
        ]
        assert abs(float(sum(each) / 2 - score)) <= (1e-3 if dtype == torch.float32 else 0.25)


def test_ids_and_words_score_alike_whatever_stands_beside_them() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    reader = train_reader(model, tokenizer, PAIRS, layers=1)
    by_words = reader.scores(model, tokenizer, UNSEEN)
    pairs = [continuation_ids(tokenizer, text["prompt"], text["response"]) for text in UNSEEN]
    assert torch.allclose(by_words, reader.scores(model, tokenizer, pairs), atol=1e-4)
    assert torch.allclose(
        by_words, reader.scores(model, tokenizer, [tuple(map(torch.tensor, pair)) for pair in pairs]), atol=1e-4
    )
    alone = torch.cat([reader.scores(model, tokenizer, [pair]) for pair in pairs])
    assert torch.allclose(by_words, alone, atol=1e-4)
    assert torch.allclose(by_words, reader.scores(model, tokenizer, pairs, batch_size=1), atol=1e-4)


def test_the_unit_is_half_the_distance_between_classes_that_were_not_fitted() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    reader = train_reader(model, tokenizer, PAIRS, layers=1)
    means = [float(reader.scores(model, tokenizer, [pair[side] for pair in PAIRS]).mean()) for side in (0, 1)]
    assert means[0] >= 1 and means[1] <= -1, "its own texts lie further out than unseen ones"
    assert reader.judged["positive"] == reader.judged["negative"] == len(PAIRS) and 0.7 < reader.judged["auroc"] <= 1


def test_pairs_sets_and_contrasts_make_the_same_reader() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sets = {"positive": [a for a, _ in PAIRS], "negative": [b for _, b in PAIRS]}
    contrasts = [("Say: ", said.upper(), said) for said in SAID]
    first = train_reader(model, tokenizer, PAIRS, layers=1)
    for samples in (sets, contrasts, iter(PAIRS), [list(pair) for pair in PAIRS]):
        other = train_reader(model, tokenizer, samples, layers=-2 if len(model.model.layers) == 3 else 1)
        assert torch.equal(first.directions[1], other.directions[1]) and first.offsets == other.offsets


def test_labels_that_mean_nothing_are_refused_or_read_by_chance() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    g, seen = torch.Generator().manual_seed(0), []
    for _ in range(6):
        turned = [
            pair if flip else pair[::-1] for pair, flip in zip(PAIRS, torch.rand(10, generator=g) < 0.5, strict=True)
        ]
        try:
            seen.append(train_reader(model, tokenizer, turned, layers=1).judged["auroc"])
        except ValueError as error:
            assert "does not tell the others apart" in str(error)
            seen.append(0.5)
    assert sum(seen) / len(seen) < 0.8


def test_refusals() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for samples, words in [(PAIRS[:3], "at least 4 texts"), ([("a", "b")] * 3 + ["c"], "pair")]:
        with pytest.raises((ValueError, TypeError), match=words):
            train_reader(model, tokenizer, samples, layers=1)
    with pytest.raises(ValueError, match="ayer 9"):
        train_reader(model, tokenizer, PAIRS, layers=9)
    reader = train_reader(model, tokenizer, PAIRS, layers=1)
    for texts, kind, words in [
        ([], ValueError, "no texts"),
        ("one", TypeError, "list of one"),
        (UNSEEN[0], TypeError, "list of one"),
        (["unmarked"], ValueError, "prompt ends"),
        ([([3, 4], [])], ValueError, "names none of them"),
        ([([3, 4], [10**6])], ValueError, "tokenizer"),
    ]:
        with pytest.raises(kind, match=words):
            reader.scores(model, tokenizer, texts)
    narrow = replace(reader, directions={1: torch.ones(8, dtype=torch.float64)})
    with pytest.raises(ValueError, match="width 8, and the model returns width 32"):
        narrow.scores(model, tokenizer, UNSEEN)
    strings = train_reader(model, tokenizer, [(a.upper(), a) for a in SAID], layers=1, read=Tokens.all[1:])
    assert strings.scores(model, tokenizer, ["unmarked"]).shape == (1,)


def test_model_tokenizer_and_random_numbers_are_as_they_were() -> None:
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    weights, before = [p.clone() for p in model.parameters()], dict(vars(tokenizer))
    state = torch.get_rng_state()
    reader = train_reader(model, tokenizer, PAIRS, layers=1)
    first = reader.scores(model, tokenizer, UNSEEN)
    assert torch.equal(torch.get_rng_state(), state) and model.training and vars(tokenizer) == before
    assert all(
        torch.equal(a, b) and b.requires_grad and b.grad is None
        for a, b in zip(weights, model.parameters(), strict=True)
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    again: Any = train_reader(model, tokenizer, PAIRS, layers=1)
    assert torch.equal(first, again.scores(model, tokenizer, UNSEEN))


def test_another_default_device_is_not_taken() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.device("meta"):
        reader = train_reader(model, tokenizer, PAIRS, layers=1)
        scores = reader.scores(model, tokenizer, UNSEEN)
    assert scores.device.type == "cpu"
    assert bool(scores[0] > scores[1])
