"""Two sets of texts without pairs: lengths, spellings, aggregators, windows, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import shown
from test_extraction import HEAD, said

from steering_vectors import (
    SteeringVector,
    Tokens,
    extract_activations,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    train_steering_vector,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train import extraction, requests, schedules

WARM = [f"{HEAD}{text}" for text in ("Warm and sunny", "Hot!", "Mild, I would say", "Sunshine all day long", "Summer")]
COLD = [f"{HEAD}{text}" for text in ("Ice", "Cold and wet, as ever")]
SETS = {"positive": WARM, "negative": COLD}


def single(model: Any, texts: list[Any], **how: Any) -> dict[int, torch.Tensor]:
    "The activations of texts that stand on the positive side of pairs."
    return extract_activations(model, tiny_tokenizer(), [(text, texts[0]) for text in texts], **how)[0]


def close(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor], tolerance: float = 1e-5) -> bool:
    return list(a) == list(b) and all(
        a[n].shape == b[n].shape and torch.allclose(a[n], b[n], atol=tolerance) for n in b
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("sizes", [(5, 2), (2, 5), (1, 3), (4, 4)], ids=str)
def test_the_vector_is_the_difference_of_the_means(kind: str, sizes: tuple[int, int]) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    texts = WARM + COLD
    sets = {"positive": texts[: sizes[0]], "negative": texts[::-1][: sizes[1]]}
    pos, neg = extract_activations(model, tokenizer, sets)
    assert close(pos, single(model, sets["positive"])) and close(neg, single(model, sets["negative"]))
    vector = train_steering_vector(model, tokenizer, sets)
    assert close(vector.layer_activations, {n: pos[n].mean(0) - neg[n].mean(0) for n in pos})
    norms = {n: torch.cat([pos[n], neg[n]]).norm(dim=-1).median() for n in pos}
    assert all(abs(vector.provenance.activation_norms[n] - norm) < 1e-4 * norm for n, norm in norms.items())


def test_spellings_and_iterables() -> None:
    pd, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wanted = train_steering_vector(model, tokenizer, SETS).layer_activations
    table = datasets.Dataset.from_dict({"text": WARM})
    for positive, negative in [
        (iter(WARM), tuple(COLD)),
        ((text for text in WARM), pd.Series(COLD)),
        (table["text"], dict.fromkeys(COLD)),
        (table, [{"text": text} for text in COLD]),
        (map(str, WARM), [tokenizer(text)["input_ids"] for text in COLD]),
    ]:
        given = list(negative) if isinstance(negative, dict) else negative
        got = train_steering_vector(model, tokenizer, {"positive": positive, "negative": given})
        assert close(got.layer_activations, wanted)
        assert (got.provenance.num_positive, got.provenance.num_negative) == (5, 2)
    got = train_steering_vector(model, tokenizer, {"negative": COLD, "positive": WARM}).layer_activations
    assert close(got, wanted)


def test_conversations_and_records() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    talk = lambda question, answer: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chats = {"positive": [talk("Tea?", "Yes"), talk("Why?", "Joy, of course")], "negative": [talk("Tea?", "No")]}
    rows = {
        "positive": [{"prompt": "Tea?", "response": "Yes"}, {"prompt": "Why?", "response": "Joy, of course"}],
        "negative": [{"prompt": "Tea?", "response": "No"}],
    }
    for read in (None, Tokens.generated, Tokens.response, Tokens.prompt[-2:]):
        a, b = (extract_activations(model, tokenizer, sets, read=read) for sets in (chats, rows))
        assert all(close(x, y) for x, y in zip(a, b, strict=True))
    alone = extract_activations(model, tokenizer, [(chats["positive"][1], chats["negative"][0])], read=Tokens.generated)
    pos, neg = extract_activations(model, tokenizer, chats, read=Tokens.generated)
    assert close({n: h[1:] for n, h in pos.items()}, alone[0]) and close(neg, alone[1])


def test_every_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    "Packed, continued, padded and alone."
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wanted = train_steering_vector(model, tokenizer, SETS).layer_activations
    for kind in ("packed", "continued", "padded", "single"):
        read: list[int] = []

        class Count:
            def take(self, numbers: list[int], acts: Any) -> None:
                read.extend(numbers)  # noqa: B023

            def complete(self, num_rows: int) -> None:
                assert num_rows == 5

        monkeypatch.setattr(extraction, "remembered_strategy", lambda *_: schedules.Strategy(kind))  # type: ignore[arg-type] # noqa: B023
        seen = extraction.read_samples(model, tokenizer, SETS, requests.Request(), {"": Count()})
        assert sorted(read) == [0, 1, 2, 3, 4, 6, 8] and seen[:3] == (5, 2, False)
        assert close(train_steering_vector(model, tokenizer, SETS).layer_activations, wanted)


# --- aggregators


def test_aggregators_of_pairs_are_refused_before_anything_is_read() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    class OfPairs:
        needs_pairs = True

        def __call__(self, pos: torch.Tensor, neg: torch.Tensor) -> torch.Tensor:
            return (pos - neg).mean(0)

    def untouched() -> Iterator[str]:
        raise AssertionError("read")
        yield ""

    for aggregator in (pca_aggregator(), OfPairs()):
        with pytest.raises(ValueError, match="works on differences of pairs"):
            train_steering_vector(model, tokenizer, {"positive": untouched(), "negative": COLD}, aggregator=aggregator)
        equal = {"positive": WARM[:2], "negative": COLD}  # equally many are still no pairs
        with pytest.raises(ValueError, match="works on differences of pairs"):
            train_steering_vector(model, tokenizer, equal, aggregator=aggregator)
        train_steering_vector(model, tokenizer, list(zip(*equal.values(), strict=True)), aggregator=aggregator)


@pytest.mark.parametrize(
    "aggregator", [mean_aggregator(), logistic_aggregator(), pca_aggregator(paired=False)], ids=shown
)
def test_the_order_of_a_set_plays_no_part(aggregator: Any) -> None:
    "Also where both have one length, and rows that happen to stand side by side could be taken for pairs."
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for negative in (COLD, COLD + WARM[:3]):
        sets = {"positive": WARM, "negative": negative}
        turned = {"positive": WARM, "negative": negative[::-1]}
        a, b = (
            train_steering_vector(model, tokenizer, s, aggregator=aggregator).layer_activations for s in (sets, turned)
        )
        assert close(a, b, 2e-3) and all(v.isfinite().all() and v.any() for v in a.values())


def test_own_aggregators_get_all_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pos, neg = extract_activations(model, tokenizer, SETS)
    shapes = []

    def first_less_last(pos: torch.Tensor, neg: torch.Tensor) -> torch.Tensor:
        shapes.append((tuple(pos.shape), tuple(neg.shape)))
        return pos[4] - neg[-1]

    for window in (1024, 3, 1):
        monkeypatch.setattr(extraction, "WINDOW", window)
        vector = train_steering_vector(model, tokenizer, SETS, aggregator=first_less_last)
        assert close(vector.layer_activations, {n: pos[n][4] - neg[n][1] for n in pos})
    assert set(shapes) == {((5, 32), (2, 32))}


# --- windows, memory, progress, provenance


@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows_change_nothing(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wanted, rows = train_steering_vector(model, tokenizer, SETS), extract_activations(model, tokenizer, SETS)
    monkeypatch.setattr(extraction, "WINDOW", window)
    got = train_steering_vector(model, tokenizer, {"positive": iter(WARM), "negative": iter(COLD)})
    assert close(got.layer_activations, wanted.layer_activations)
    assert all(close(a, b) for a, b in zip(extract_activations(model, tokenizer, SETS), rows, strict=True))
    assert got.provenance.num_positive == 5 and got.provenance.num_negative == 2


def test_sets_are_taken_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    taken, behind = 0, []

    def texts(word: str) -> Iterator[str]:
        nonlocal taken
        for i in range(20):
            taken += 1
            yield f"{word} {i}"

    def watch(*_: Any) -> None:
        behind.append(taken)

    monkeypatch.setattr(extraction, "WINDOW", 4)
    handle = model.model.layers[0].register_forward_hook(watch)
    train_steering_vector(model, tokenizer, {"positive": texts("good"), "negative": texts("bad")})
    handle.remove()
    assert behind[0] == 8 and behind[-1] == 40


@pytest.mark.parametrize(
    "sets, total", [(SETS, "7/7"), ({"positive": (text for text in WARM), "negative": COLD}, "7it")]
)
def test_progress_counts_texts(sets: Any, total: str, capsys: pytest.CaptureFixture[str]) -> None:
    train_steering_vector(tiny_model("llama"), tiny_tokenizer(), sets, show_progress=True)
    assert total in capsys.readouterr().err


def test_provenance_and_files(tmp_path: Path) -> None:
    vector = train_steering_vector(tiny_model("llama"), tiny_tokenizer(), SETS)
    story = vector.provenance
    assert (story.num_pairs, story.num_positive, story.num_negative) == (None, 5, 2)
    vector.save(tmp_path / "warm.safetensors")
    again = SteeringVector.load(tmp_path / "warm.safetensors").provenance
    assert (again.num_pairs, again.num_positive, again.num_negative) == (None, 5, 2)
    pairs = train_steering_vector(tiny_model("llama"), tiny_tokenizer(), list(zip(WARM, COLD, strict=False))).provenance
    assert (pairs.num_pairs, pairs.num_positive, pairs.num_negative) == (2, None, None)


@pytest.mark.parametrize("setting", [{"batch_size": 1}, {"batch_size": 2}, {"token_budget": 150}, {"move_to_cpu": True}], ids=str)  # fmt: skip
def test_settings_change_nothing(setting: dict[str, Any]) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    wanted = extract_activations(model, tokenizer, SETS)
    got = extract_activations(model, tokenizer, SETS, **setting)
    assert all(close(a, b) for a, b in zip(got, wanted, strict=True))


# --- what is refused


def test_words_of_errors() -> None:
    pd = pytest.importorskip("pandas")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for error, words, sets in [
        (ValueError, "There are no negative texts", {"positive": WARM, "negative": []}),
        (ValueError, "There are no positive texts", {"positive": iter([]), "negative": COLD}),
        (ValueError, "There are no training samples", {"positive": [], "negative": []}),
        (TypeError, "one text, and must be a list", {"positive": "Warm", "negative": COLD}),
        (TypeError, "one text, and must be a list", {"positive": WARM, "negative": chat}),
        (TypeError, "The positive set must be", {"positive": pd.DataFrame({"text": WARM}), "negative": COLD}),
        (TypeError, "The negative set must be", {"positive": WARM, "negative": 3}),
        (TypeError, "The negative set must be", {"positive": WARM, "negative": None}),
        (TypeError, "two sets", {"harmful": WARM, "harmless": COLD}),
        (TypeError, "two sets", {"train": [("a", "b")]}),
        (TypeError, "is a tuple of two lists", (WARM, COLD)),
        (TypeError, "is a tuple of two lists", (WARM[:2], COLD)),  # which could be two pairs
        (TypeError, "is a tuple of two Series.*'positive': first", (pd.Series(WARM[:2]), pd.Series(COLD))),
        (TypeError, "is a tuple of two ndarrays", (pd.Series(WARM[:2]).to_numpy(), pd.Series(COLD).to_numpy())),
        (TypeError, "is a tuple of two list_iterators", (iter(WARM), iter(COLD))),
        (TypeError, "of a mapping pass its values", {"positive": dict(enumerate(WARM)), "negative": COLD}),
        (TypeError, "two sets without pairs are", [WARM, COLD]),
        (TypeError, "The negative text 1 must be", {"positive": WARM, "negative": ["Ice", None]}),
        (TypeError, "The positive text 2 must be", {"positive": ["Hot", "Mild", float("nan")], "negative": COLD}),
        (ValueError, "The positive text 1 has 901 tokens", {"positive": ["Hot", "a" * 900], "negative": COLD}),
    ]:  # fmt: skip
        for call in (train_steering_vector, extract_activations):
            with pytest.raises(error, match=words):
                call(model, tokenizer, sets)
    with pytest.raises(ValueError, match="The negative text 1 has 4 tokens, so token 5"):
        train_steering_vector(model, tokenizer, {"positive": WARM, "negative": [COLD[0], "Ice"]}, read_token_index=5)
    with pytest.raises(ValueError, match="where its prompt ends"):  # no other text to compare with
        train_steering_vector(model, tokenizer, SETS, read=Tokens.generated)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_rounding_is_no_direction(kind: str) -> None:
    "Means over unequally many equal activations differ in their last digits."
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    sets = {"positive": WARM * 3, "negative": COLD}
    for read in ({"read_token_index": 3}, {"read": {"early": 3}}, {"read": {"late": -1, "early": lambda text: 2}}):
        with pytest.raises(ValueError, match="both sides read the same, so there is no direction"):
            train_steering_vector(model, tokenizer, sets, **read)  # type: ignore[call-overload]
    close_by = {"positive": [HEAD + "Warm"], "negative": [HEAD + "Warn"]}
    assert all(v.any() for v in train_steering_vector(model, tokenizer, close_by).layer_activations.values())


def test_pairs_are_what_they_were() -> None:
    "Mappings in a list are pairs, and give the same numbers to the last bit as tuples do."
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pairs = list(zip(WARM, COLD, strict=False))
    with said():
        a = train_steering_vector(model, tokenizer, pairs)
        b = train_steering_vector(model, tokenizer, [{"positive": p, "negative": n} for p, n in pairs])
        c = train_steering_vector(
            model, tokenizer, {"positive": [p for p, _ in pairs], "negative": [n for _, n in pairs]}
        )
    assert all(torch.equal(a.layer_activations[n], v) for n, v in b.layer_activations.items())
    assert all(torch.equal(a.layer_activations[n], v) for n, v in c.layer_activations.items())
