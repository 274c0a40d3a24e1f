"""Selections against a definition written out token by token, over random places and expressions."""

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from steering_vectors.tokens import Place, Prompt, Tokens, as_selection, select

MAYBE = st.none() | st.integers(-9, 9)
UP = st.none() | st.integers(0, 9)
STEPS = st.none() | st.integers(1, 3)


@st.composite
def sequences(draw: Any) -> dict[str, Any]:
    "A batch: prompts of different length padded on one side, some generated columns, ids."
    b, s, new = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 5))
    lengths = [draw(st.integers(1, s)) for _ in range(b)]
    side = draw(st.sampled_from(["left", "right"]))
    real = torch.zeros(b, s, dtype=torch.bool)
    for r, n in enumerate(lengths):
        real[r, slice(s - n, s) if side == "left" else slice(0, n)] = True
    ids = torch.tensor([[draw(st.integers(0, 4)) for _ in range(s + new)] for _ in range(b)])
    return {"b": b, "s": s, "total": s + new, "lengths": lengths, "real": real, "ids": ids}


@st.composite
def parts(draw: Any) -> tuple[Tokens, Any]:
    "One part, and the function that says which of a row's tokens are in it."
    name = draw(st.sampled_from(["all", "prompt", "generated", "response"]))
    bound = MAYBE if name == "prompt" else UP
    index: Any = draw(st.none() | bound.filter(lambda i: i is not None) | st.builds(slice, bound, bound, STEPS))
    tokens = getattr(Tokens, name) if index is None else getattr(Tokens, name)[index]
    without = draw(st.sets(st.integers(0, 4), max_size=2))

    def members(n: int, total: int) -> list[int]:
        "Numbers of a row's own tokens that are meant; the row has `n` prompt tokens and `total` in all."
        own = list(range(total))
        part = {"all": own, "prompt": own[:n], "generated": own[n:], "response": own[n - 1 :]}[name]
        if index is None:
            return part
        if isinstance(index, slice):
            return part[index]  # a sequence that is complete is sliced as any list is
        return [part[index]] if -len(part) <= index < len(part) else []

    return (tokens - without if without else tokens), (members, without)


@st.composite
def expressions(draw: Any) -> tuple[Tokens, list[Any]]:
    chosen = draw(st.lists(parts(), min_size=1, max_size=3))
    tokens = chosen[0][0]
    for other, _ in chosen[1:]:
        tokens = tokens | other
    return tokens, [meaning for _, meaning in chosen]


def definition(batch: dict[str, Any], meanings: list[Any]) -> torch.Tensor:
    mask = torch.zeros(batch["b"], batch["total"], dtype=torch.bool)
    for r in range(batch["b"]):
        columns = [c for c in range(batch["total"]) if c >= batch["s"] or batch["real"][r, c]]
        for members, without in meanings:
            for number in members(batch["lengths"][r], len(columns)):
                if int(batch["ids"][r, columns[number]]) not in without:
                    mask[r, columns[number]] = True
    return mask


def passes(selection: Any, batch: dict[str, Any], sizes: list[int], said: bool = True) -> torch.Tensor:
    "What is selected in consecutive passes of the given sizes, side by side."
    start, found = 0, []
    for size in sizes:
        place = Place(
            start,
            batch["b"],
            size,
            batch["s"],
            torch.tensor(batch["lengths"]) if said else None,
            batch["real"],
            batch["ids"][:, start : start + size],
        )
        mask = select(selection, place)
        found.append(torch.full((batch["b"], size), mask) if isinstance(mask, bool) else mask.expand(batch["b"], -1))
        start += size
    return torch.cat(found, 1)


@st.composite
def splits(draw: Any, total: int) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


@settings(max_examples=400, deadline=None)
@given(sequences(), expressions(), st.data(), st.booleans())
def test_expressions(batch: dict[str, Any], expression: Any, data: Any, said: bool) -> None:
    tokens, meanings = expression
    expected = definition(batch, meanings)
    sizes = data.draw(splits(batch["total"]))
    assert torch.equal(passes(tokens, batch, sizes, said), expected), (tokens, sizes)
    assert eval(repr(tokens)) == tokens


@settings(max_examples=300, deadline=None)
@given(sequences(), st.data())
def test_columns(batch: dict[str, Any], data: Any) -> None:
    s, total = batch["s"], batch["total"]
    kind = data.draw(st.sampled_from(["min", "list", "slice", "mask", "masks"]))
    columns = torch.arange(total).expand(batch["b"], -1)
    if kind == "min":
        m = data.draw(st.integers(-s, 12))
        selection, expected = as_selection(min_token_index=m), columns >= (m + s if m < 0 else m)
    elif kind == "list":
        chosen = data.draw(st.lists(st.integers(-s, 12), max_size=4))
        selection = as_selection(token_indices=chosen)
        expected = torch.isin(columns, torch.tensor([c + s if c < 0 else c for c in chosen], dtype=torch.long))
    elif kind == "slice":
        cut = data.draw(st.builds(slice, MAYBE, MAYBE, STEPS))
        selection = as_selection(token_indices=cut)
        start = 0 if cut.start is None else max(cut.start + s if cut.start < 0 else cut.start, 0)
        stop = total if cut.stop is None else cut.stop + s if cut.stop < 0 else cut.stop
        expected = (columns >= start) & (columns < stop) & ((columns - start) % (cut.step or 1) == 0)
    else:
        rows = 1 if kind == "mask" else batch["b"]
        width = data.draw(st.integers(1, 12))
        mask = torch.tensor([[data.draw(st.booleans()) for _ in range(width)] for _ in range(rows)])
        selection = as_selection(token_indices=mask[0] if kind == "mask" else mask)
        expected = torch.zeros(batch["b"], total, dtype=torch.bool)
        n = min(width, total)
        expected[:, :n] = mask[:, :n]
    sizes = data.draw(splits(total))
    assert torch.equal(passes(selection, batch, sizes), expected)


@settings(max_examples=150, deadline=None)
@given(
    sequences(),
    st.one_of(
        expressions().map(lambda e: e[0]),
        st.builds(lambda i: as_selection(token_indices=i), st.lists(st.integers(-1, 9), min_size=1)),
    ),
)
def test_a_start_that_only_the_device_knows(batch: dict[str, Any], selection: Any) -> None:
    "The same, with the column as a tensor, as a static cache on a GPU gives it."
    for start in range(batch["total"]):
        ids = batch["ids"][:, start : start + 1]
        rest = (batch["b"], 1, batch["s"], torch.tensor(batch["lengths"]), batch["real"], ids)
        a, b = select(selection, Place(start, *rest)), select(selection, Place(torch.tensor(start), *rest))
        full = [torch.full((batch["b"], 1), m) if isinstance(m, bool) else m.expand(batch["b"], -1) for m in (a, b)]
        assert torch.equal(*full)


def test_expressions_are_values() -> None:
    a, b = Tokens.prompt[-4:] | Tokens.generated[:8] - [13, 2], Tokens.prompt[-4:] | Tokens.generated[:8] - [2, 13]
    assert a == b and hash(a) == hash(b) and a != Tokens.prompt[-4:]
    assert Tokens.all | Tokens.all == Tokens.all
    assert len({Tokens.all, Tokens.prompt, Tokens.generated, Tokens.response}) == 4
    assert repr(Tokens.all - 3 | Tokens.prompt) == "Tokens.all - [3] | Tokens.prompt"


@pytest.mark.parametrize("name", ["all", "generated", "response"])
@pytest.mark.parametrize("index", [-1, slice(-2, None), slice(None, -1), slice(0, 3, -1)], ids=str)
def test_the_end_of_what_is_being_written(name: str, index: Any) -> None:
    with pytest.raises(ValueError, match="still being written|step must be"):
        getattr(Tokens, name)[index]


WRONG: list[tuple[Any, type[Exception]]] = [
    ({"min_token_index": 1, "token_indices": [1]}, ValueError),
    ({"token_indices": [1], "tokens": Tokens.all}, ValueError),
    ({"min_token_index": 1.5}, TypeError),
    ({"min_token_index": "3"}, TypeError),
    ({"token_indices": torch.tensor([2, 3])}, ValueError),
    ({"token_indices": torch.ones(1, 2, 3)}, ValueError),
    ({"token_indices": slice(None, None, -1)}, ValueError),
    ({"token_indices": slice(None, None, 0)}, ValueError),
    ({"tokens": "response"}, TypeError),
    ({"tokens": 3}, TypeError),
    ({"token_indices": [1.5]}, TypeError),
    ({"token_indices": slice(0.5, None)}, TypeError),
    ({"token_indices": torch.tensor([])}, ValueError),
]


@pytest.mark.parametrize("say,error", WRONG, ids=[str(w[0]) for w in WRONG])
def test_what_names_no_tokens_is_refused(say: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        as_selection(**say)


def test_prompts() -> None:
    from steering_vectors.demo import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    batch = tokenizer(["Hi!", "Hello"], padding=True, return_tensors="pt")
    for prompt in [
        batch,
        dict(batch),
        {k: v.tolist() for k, v in batch.items()},
        {k: v.numpy() for k, v in batch.items()},
    ]:
        said = Prompt.of(prompt)
        assert said.columns == 6 and said.lengths.tolist() == [4, 6] and said.real is not None and said.ids is not None
        assert said.real.int().tolist()[0] == [0, 0, 1, 1, 1, 1]
    one = tokenizer("Hi!")
    for prompt in [one, one["input_ids"], torch.tensor(one["input_ids"]), [one["input_ids"]], tuple(one["input_ids"])]:
        assert Prompt.of(prompt).lengths.tolist() == [4]
    uneven = Prompt.of([[1, 2, 3], [4]])
    assert uneven.columns == 3 and uneven.lengths.tolist() == [3, 1] and uneven.ids is None
    for nothing in ["Hi", ["Hi", "Ho"], None, 3.5]:
        with pytest.raises(TypeError):
            Prompt.of(nothing)
    for empty in [[], [[]], torch.zeros(2, 0)]:
        with pytest.raises(ValueError):
            Prompt.of(empty)


def test_the_definition_can_disagree() -> None:
    "The two sides of the comparison are two: a response that began one token late would be seen."
    batch = {
        "b": 1,
        "s": 3,
        "total": 5,
        "lengths": [3],
        "real": torch.ones(1, 3, dtype=torch.bool),
        "ids": torch.zeros(1, 5, dtype=torch.long),
    }
    late = [(lambda n, total: list(range(n, total)), set())]
    assert not torch.equal(passes(Tokens.response, batch, [5]), definition(batch, late))
    assert list(itertools.chain(*passes(Tokens.response, batch, [5]).int().tolist())) == [0, 0, 1, 1, 1]
