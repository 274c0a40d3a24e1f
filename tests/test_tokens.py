"""Selections against a definition written out token by token, over random places and expressions."""

import itertools
import pickle
import re
import warnings
from collections.abc import Callable
from operator import and_, or_, sub
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from plain import shown

from steering_vectors.steer.layouts import Layout, PromptLayout, numbering, prompt_tokens
from steering_vectors.steer.places import select
from steering_vectors.steer.selections import Columns
from steering_vectors.steer.tokens import Tokens, as_selection

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


Meaning = Callable[[dict[str, Any], int], set[int]]  # the columns of row r of a batch that are meant


@st.composite
def parts(draw: Any) -> tuple[Tokens, Meaning]:
    "One part, and the columns that are in it."
    name = draw(st.sampled_from(["all", "prompt", "generated", "response"]))
    bound = MAYBE if name == "prompt" else UP
    index: Any = draw(st.none() | bound.filter(lambda i: i is not None) | st.builds(slice, bound, bound, STEPS))
    tokens = getattr(Tokens, name) if index is None else getattr(Tokens, name)[index]

    def meaning(batch: dict[str, Any], r: int) -> set[int]:
        own = [c for c in range(batch["total"]) if c >= batch["s"] or batch["real"][r, c]]
        n = batch["lengths"][r]
        part = {"all": own, "prompt": own[:n], "generated": own[n:], "response": own[n - 1 :]}[name]
        if index is None:
            return set(part)
        if isinstance(index, slice):
            return set(part[index])  # a sequence that is complete is sliced as any list is
        return {part[index]} if -len(part) <= index < len(part) else set()

    return tokens, meaning


@st.composite
def columns(draw: Any, batch: dict[str, Any]) -> tuple[Any, Meaning]:
    "Columns as `as_selection` takes them, and which those are."
    s, b = batch["s"], batch["b"]
    kind = draw(st.sampled_from(["list", "slice", "mask", "masks"]))
    if kind == "list":
        chosen = draw(st.lists(st.integers(-s, 12), max_size=4))
        return chosen, lambda batch, r: {c + s if c < 0 else c for c in chosen} & set(range(batch["total"]))
    if kind == "slice":
        cut = draw(st.builds(slice, MAYBE, MAYBE, STEPS))
        start = 0 if cut.start is None else max(cut.start + s if cut.start < 0 else cut.start, 0)
        stop = batch["total"] if cut.stop is None else max(cut.stop + s if cut.stop < 0 else cut.stop, 0)
        return cut, lambda batch, r: set(range(batch["total"])[start : stop : cut.step])
    width = draw(st.integers(1, 12))
    rows = [[draw(st.booleans()) for _ in range(width)] for _ in range(b if kind == "masks" else 1)]
    mask = torch.tensor(rows if kind == "masks" else rows[0])
    return mask, lambda batch, r: {c for c, on in enumerate(rows[r % len(rows)]) if on and c < batch["total"]}


@st.composite
def expressions(draw: Any, batch: dict[str, Any], depth: int = 3) -> tuple[Tokens, Meaning]:
    "An expression in which parts, columns and ids are joined at random, and the columns it means."
    if not depth or draw(st.integers(0, 3)) == 0:
        return draw(parts())
    left, means = draw(expressions(batch, depth - 1))
    sign = draw(st.sampled_from(["|", "&", "-", "~", "ids"]))
    if sign == "~":
        everything, _ = Tokens.all, None
        real = lambda batch, r: {c for c in range(batch["total"]) if c >= batch["s"] or batch["real"][r, c]}
        return ~left if draw(st.booleans()) else everything - left, lambda batch, r: real(batch, r) - means(batch, r)
    if sign == "ids":
        ids = draw(st.sets(st.integers(0, 4), max_size=3))
        spelt = draw(st.sampled_from([ids, sorted(ids), torch.tensor(sorted(ids), dtype=torch.long), tuple(ids)]))
        return left - spelt, lambda batch, r: {c for c in means(batch, r) if int(batch["ids"][r, c]) not in ids}
    join = {"|": or_, "&": and_, "-": sub}[sign]
    if draw(st.booleans()):
        right, others = draw(expressions(batch, depth - 1))
        return join(left, right), lambda batch, r: join(means(batch, r), others(batch, r))
    raw, others = draw(columns(batch))
    if draw(st.booleans()):
        return join(raw, left), lambda batch, r: join(others(batch, r), means(batch, r))
    if sign == "-":
        raw = Tokens.columns[raw] if isinstance(raw, list) or draw(st.booleans()) else raw  # a list there is ids
    return join(left, raw), lambda batch, r: join(means(batch, r), others(batch, r))


def definition(batch: dict[str, Any], meaning: Meaning) -> torch.Tensor:
    mask = torch.zeros(batch["b"], batch["total"], dtype=torch.bool)
    for r in range(batch["b"]):
        mask[r, sorted(meaning(batch, r))] = True
    return mask


def passes(selection: Any, batch: dict[str, Any], sizes: list[int], said: bool = True) -> torch.Tensor:
    "What is selected in consecutive passes of the given sizes, side by side."
    start, found = 0, []
    for size in sizes:
        place = Layout(
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


@settings(max_examples=600, deadline=None)
@given(sequences(), st.data(), st.booleans())
def test_expressions(batch: dict[str, Any], data: Any, said: bool) -> None:
    tokens, meaning = data.draw(expressions(batch))
    expected = definition(batch, meaning)
    sizes = data.draw(splits(batch["total"]))
    assert torch.equal(passes(tokens, batch, sizes, said), expected), (tokens, sizes)
    again = eval(repr(tokens)) if "mask of shape" not in repr(tokens) else tokens
    assert again == tokens and hash(again) == hash(tokens) and repr(again) == repr(tokens)
    assert torch.equal(passes(again, batch, sizes, said), expected)
    if tokens.within_prompt:
        assert not expected[:, batch["s"] :].any()


@settings(max_examples=300, deadline=None)
@given(sequences(), st.data())
def test_columns(batch: dict[str, Any], data: Any) -> None:
    chosen, meaning = data.draw(columns(batch))
    if data.draw(st.booleans()):
        m = data.draw(st.integers(-batch["s"], 12))
        selection = as_selection(min_token_index=m)
        expected = torch.arange(batch["total"]).expand(batch["b"], -1) >= (m + batch["s"] if m < 0 else m)
    else:
        selection, expected = as_selection(token_indices=chosen), definition(batch, meaning)
    sizes = data.draw(splits(batch["total"]))
    assert torch.equal(passes(selection, batch, sizes), expected)
    if selection is not None:
        assert torch.equal(passes(Tokens.columns & selection, batch, sizes), expected)


@settings(max_examples=300, deadline=None)
@given(sequences(), st.data())
def test_a_start_that_only_the_device_knows(batch: dict[str, Any], data: Any) -> None:
    "The same, with the column as a tensor, as a static cache on a GPU gives it."
    selection, _ = data.draw(expressions(batch))
    for start in range(batch["total"]):
        ids = batch["ids"][:, start : start + 1]
        rest = (batch["b"], 1, batch["s"], torch.tensor(batch["lengths"]), batch["real"], ids)
        a, b = select(selection, Layout(start, *rest)), select(selection, Layout(torch.tensor(start), *rest))
        full = [torch.full((batch["b"], 1), m) if isinstance(m, bool) else m.expand(batch["b"], -1) for m in (a, b)]
        assert torch.equal(*full)


@pytest.mark.parametrize("whole", [True, False], ids=["mask of everything", "mask of the prompt"])
@pytest.mark.parametrize(
    "tokens", [Tokens.all, Tokens.generated, Tokens.response, Tokens.generated[1:3], Tokens.response[::2]], ids=shown
)
def test_padding_beyond_the_prompt(tokens: Tokens, whole: bool) -> None:
    "A later turn may be padded as well: rows then count apart, in however many passes it is read."
    real = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    at_once = select(tokens, Layout(0, 2, 9, 3, None, real))
    assert isinstance(at_once, torch.Tensor)
    for start in range(3, 9):
        known = real if whole else real[:, : max(start + 1, 3)]
        got = select(tokens, Layout(start, 2, 1, 3, None, known))
        full = torch.full((2, 1), got) if isinstance(got, bool) else got
        assert torch.equal(full.expand(2, -1), at_once[:, start : start + 1]), start


def test_expressions_are_values() -> None:
    a, b = Tokens.prompt[-4:] | Tokens.generated[:8] - [13, 2], Tokens.prompt[-4:] | Tokens.generated[:8] - [2, 13]
    assert a == b and hash(a) == hash(b) and a != Tokens.prompt[-4:]
    assert Tokens.all | Tokens.all == Tokens.all
    assert len({Tokens.all, Tokens.prompt, Tokens.generated, Tokens.response}) == 4
    assert repr(Tokens.all - 3 | Tokens.prompt) == "(Tokens.all - [3]) | Tokens.prompt"
    assert Tokens.prompt | (Tokens.all | Tokens.generated) == (Tokens.prompt | Tokens.all) | Tokens.generated
    assert Tokens.prompt & Tokens.prompt == Tokens.prompt and Tokens.all - [] == Tokens.all
    assert pickle.loads(pickle.dumps(a | [3] | torch.tensor([True]))) == a | [3] | torch.tensor([True])
    assert as_selection(token_indices=[1, 2]) == as_selection(tokens=(1, 2)) != as_selection(tokens=[2, 1])
    big = Tokens.prompt | torch.ones(8, 512, dtype=torch.bool)
    assert repr(big) == "Tokens.prompt | Tokens.columns[mask of shape (8, 512)]"
    assert bool(Tokens.prompt) and bool(~Tokens.all)


def test_signs_bind_as_python_binds_them() -> None:
    p, g, a = Tokens.prompt, Tokens.generated, Tokens.all
    assert p | g - [13] == p | (g - [13]) != (p | g) - [13]
    assert p | g & a == p | (g & a) != (p | g) & a
    assert p & g - a == p & (g - a) and a - p - g == (a - p) - g != a - (p - g)
    for x in (p | (g - [13]), (p | g) - [13], (a - p) - g, a - (p - g), (p & g) | a, p & (g | a), ~(p | [3])):
        assert eval(repr(x)) == x


IDS: list[Any] = [
    13,
    np.int64(13),
    torch.tensor(13),
    [13],
    (13, 13),
    {13},
    range(13, 14),
    (i for i in [13]),
    [torch.tensor(13)],
    np.array([13]),
    torch.tensor([[13], [13]], dtype=torch.int32),
    np.array(13, dtype=np.uint8),
]


@pytest.mark.parametrize("ids", IDS, ids=shown)
def test_ids_of_every_type(ids: Any) -> None:
    assert repr(Tokens.prompt - ids) == "Tokens.prompt - [13]"


COLUMNS: list[Any] = [
    [3, 4],
    (3, 4),
    range(3, 5),
    {3, 4},
    [np.int64(3), torch.tensor(4)],
    slice(3, 5),
    slice(np.int64(3), torch.tensor(5)),
    as_selection(token_indices=[3, 4]),
    Tokens.columns[3:5],
    Tokens.columns[3, 4],
    Tokens.columns[[3, 4]],
    Tokens.columns[np.int64(3)] | Tokens.columns[4],
    [False, False, False, True, True],
    [[0, 0, 0, 1, 1]],
    torch.tensor([0, 0, 0, 1, 1]),
    torch.tensor([False, False, False, True, True]),
    np.array([0.0, 0.0, 0.0, 1.0, 1.0]),
    np.array([[False, False, False, True, True]]),
]


@pytest.mark.parametrize("chosen", COLUMNS, ids=shown)
@pytest.mark.parametrize("join", [or_, and_, sub], ids=lambda join: join.__name__)
def test_columns_of_every_type_stand_on_either_side(chosen: Any, join: Any) -> None:
    place = Layout(0, 1, 8, 4)
    named = [False, False, False, True, True, False, False, False]
    response = [False, False, False, True, True, True, True, True]

    def marks(selection: Tokens) -> list[bool]:
        mask = select(selection, place)
        return [mask] * 8 if isinstance(mask, bool) else mask[0].tolist()

    rule: dict[Any, Any] = {or_: lambda a, b: a or b, and_: lambda a, b: a and b, sub: lambda a, b: a and not b}
    assert marks(join(chosen, Tokens.response)) == [rule[join](a, b) for a, b in zip(named, response, strict=True)]
    by_type = isinstance(chosen, (slice, Tokens, Columns)) or str(getattr(chosen, "dtype", "")).endswith("bool")
    if join is sub and not by_type:
        return  # to the right of - these are ids, or refused
    assert marks(join(Tokens.response, chosen)) == [rule[join](a, b) for a, b in zip(response, named, strict=True)]


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Tokens.all - "x", TypeError, "token ids"),
    (lambda: Tokens.all - "", TypeError, "token ids"),
    (lambda: Tokens.all - b"ab", TypeError, "token ids"),
    (lambda: Tokens.all - 1.5, TypeError, "token ids"),
    (lambda: Tokens.all - None, TypeError, "token ids"),
    (lambda: Tokens.all - True, TypeError, "token ids"),
    (lambda: Tokens.all - [True], TypeError, "token ids"),
    (lambda: Tokens.all - [3, True], TypeError, "token ids"),
    (lambda: Tokens.all - [np.True_], TypeError, "token ids"),
    (lambda: Tokens.all - [[3]], TypeError, "token ids"),
    (lambda: Tokens.all - {"input_ids": [3]}, TypeError, "token ids"),
    (lambda: Tokens.all - {3: "x"}, TypeError, "token ids"),
    (lambda: Tokens.all - torch.tensor([0.0, 1.0]), TypeError, "token ids"),
    (lambda: Tokens.all - np.array(["a"]), TypeError, "token ids"),
    (lambda: Tokens.all - [-1], ValueError, "-1 is not one"),
    (lambda: Tokens.all - 2**63, ValueError, "is not one"),
    (lambda: Tokens.all - torch.tensor([0, 1, 1, 0]), ValueError, "mask.bool"),
    (lambda: Tokens.all - [0, 0, 1], ValueError, "mask.bool"),
    (lambda: Tokens.prompt | 3, TypeError, "list of column numbers"),
    (lambda: 3 & Tokens.prompt, TypeError, "list of column numbers"),
    (lambda: Tokens.prompt & "x", TypeError, "list of column numbers"),
    (lambda: "" | Tokens.prompt, TypeError, "list of column numbers"),
    (lambda: Tokens.prompt | None, TypeError, "list of column numbers"),
    (lambda: Tokens.prompt | True, TypeError, "list of column numbers"),
    (lambda: Tokens.prompt | [3, True], TypeError, "list of column numbers"),
    (lambda: Tokens.prompt & {3: 4}, TypeError, "list of column numbers"),
    (lambda: 1.5 - Tokens.prompt, TypeError, "list of column numbers"),
    (lambda: Tokens.prompt | slice(0.5, 2), TypeError, "list of column numbers"),
    (lambda: Tokens.prompt | slice(None, None, -1), ValueError, "step must be"),
    (lambda: Tokens.prompt | [[True], [True, False]], ValueError, "differ in length"),
    (lambda: Tokens.prompt | torch.tensor([3, 4]), ValueError, "For column numbers pass a list"),
    (lambda: Tokens.prompt[True], TypeError, "number or a slice"),
    (lambda: Tokens.prompt[None], TypeError, "number or a slice"),
    (lambda: Tokens.prompt[1.0], TypeError, "number or a slice"),
    (lambda: Tokens.prompt[[0, 1]], TypeError, "number or a slice"),
    (lambda: Tokens.prompt[1:][0], ValueError, "and once"),
    (lambda: (Tokens.prompt - [13])[0], ValueError, "and once"),
    (lambda: (~Tokens.prompt)[0], ValueError, "and once"),
    (lambda: Tokens.columns[2:][0], ValueError, "and once"),
    (lambda: Tokens.columns["x"], TypeError, "list of column numbers"),
    (lambda: Tokens.columns[True], TypeError, "list of column numbers"),
    (lambda: 13 in Tokens.prompt, TypeError, "write Tokens.prompt - .13."),
    (lambda: Tokens.all in (Tokens.all | Tokens.prompt), TypeError, "write .Tokens.all . Tokens.prompt. - .13."),
    (lambda: list(Tokens.prompt), TypeError, "cannot be listed"),
    (lambda: [*Tokens.generated[:3]], TypeError, "cannot be listed"),
    (lambda: dict(Tokens.all), TypeError, "cannot be listed"),
    (lambda: len(Tokens.prompt), TypeError, "len"),  # type: ignore[arg-type]
    (lambda: as_selection(tokens=""), TypeError, "names no tokens"),
    (lambda: as_selection(tokens={3: 4}), TypeError, "names no tokens"),
    (lambda: as_selection(token_indices=[3, True]), TypeError, "names no tokens"),
    (lambda: as_selection(min_token_index=np.True_), TypeError, "must be a column number"),
    (lambda: as_selection(min_token_index=torch.tensor(True)), TypeError, "must be a column number"),
]


@pytest.mark.parametrize("write,error,words", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_means_nothing_is_refused_where_it_is_written(write: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        write()


@pytest.mark.parametrize("numbers", [[0], [1], [0, 1], [1, 0]], ids=str)
@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda i: torch.tensor(i, dtype=torch.uint8)])
def test_a_tensor_that_looks_like_numbers_is_a_mask_and_warned_about(numbers: list[int], kind: Any) -> None:
    with pytest.warns(UserWarning, match=re.escape(f"pass the list {numbers}")):
        chosen = as_selection(token_indices=kind(numbers))
    assert chosen == as_selection(token_indices=[bool(i) for i in numbers])  # as in 0.12
    with pytest.warns(UserWarning, match="For column numbers") as heard:
        Tokens.generated | kind(numbers)
    assert heard[0].filename == __file__


@pytest.mark.parametrize(
    "mask",
    [
        [0, 1, 1],
        [0, 0],
        torch.tensor([1, 1]),
        torch.tensor([0, 0, 1]),
        torch.tensor([[0, 1]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([False, True]),
        [False, True],
    ],
    ids=shown,
)
def test_nothing_else_is_warned_about(mask: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_selection(token_indices=mask)


ELSEWHERE: list[Any] = [
    Tokens.all[1:],
    Tokens.prompt[-2:],
    Tokens.response - [3],
    Tokens.response & [2, 3],
    Tokens.all - (Tokens.prompt | slice(4, None, 2)),
    {"min_token_index": 2},
    {"token_indices": [0, -1]},
    {"token_indices": []},
    {"token_indices": slice(1, None, 2)},
    {"token_indices": [True, False, True]},
    {"token_indices": np.array([[1, 0, 1], [0, 1, 1]])},
]


@pytest.mark.parametrize("how", ELSEWHERE, ids=str)
def test_another_default_device(how: Any) -> None:
    "Every tensor is made where it belongs, whatever device is the default."

    def everything() -> list[Any]:
        chosen = as_selection(**how) if isinstance(how, dict) else as_selection(tokens=how)
        said = PromptLayout.of(
            {"input_ids": [[0, 5, 7], [3, 4, 5]], "attention_mask": [[0, 1, 1], [1, 1, 1]]}
        ).for_rows(4)
        found: list[Any] = [
            said.lengths.tolist(),
            said.is_token.tolist(),
            said.ids.tolist(),
            PromptLayout.of([[1], [2, 3]]).lengths.tolist(),
        ]  # type: ignore[union-attr]
        ids = torch.cat([said.ids, said.ids + 1], 1)  # type: ignore[list-item, operator]
        for real in (said.is_token, None):
            for start, length in [(0, 6), (2, 3), (4, 1), (torch.tensor(4, device="cpu"), 1)]:
                here = ids[:, int(start) : int(start) + length]
                place = Layout(start, 4, length, 3, said.lengths if real is not None else None, real, here)
                mask = select(chosen, place)
                found += [mask if isinstance(mask, bool) else mask.tolist()]
                found += [numbering(place)[0].tolist(), prompt_tokens(place).tolist()]
        return [*found, repr(chosen), hash(chosen)]

    expected, before = everything(), torch.get_default_device()
    try:
        torch.set_default_device("meta")
        assert everything() == expected
    finally:
        torch.set_default_device(before)


@pytest.mark.parametrize(
    "tokens",
    [
        Tokens.all,
        Tokens.prompt - [13],
        Tokens.generated,
        Tokens.response,
        Tokens.generated[:8],
        Tokens.prompt[-4:] | Tokens.generated[:8],
        Tokens.response & slice(2, None),
        Tokens.generated - Tokens.prompt,
        (Tokens.all - [13]) | Tokens.response,
        Tokens.columns[4],
        [0, 4] | Tokens.prompt,
        as_selection(min_token_index=3),
    ],
    ids=shown,
)
def test_integers_decide_a_generated_token(tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    "No tensor is made in a pass that reads one generated token, padded rows or not."
    for real in (None, torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()):
        place = Layout(4, 2, 1, 3, None, real)
        with monkeypatch.context() as m:
            for name in ("arange", "zeros", "tensor", "isin", "full", "ones_like"):
                m.setattr(torch, name, None)
            assert select(tokens, place) is (tokens != Tokens.prompt - [13])


def test_what_an_expression_needs() -> None:
    mask = torch.ones(4, dtype=torch.bool)
    for tokens, prompt, padding, ids, masks, within in [
        (Tokens.all, False, True, False, 0, False),
        (Tokens.prompt, True, True, False, 0, True),
        (Tokens.prompt[-2:] - [13], True, True, True, 0, True),
        (Tokens.columns[3], False, False, False, 0, False),
        (Tokens.columns[-1], True, False, False, 0, False),
        (Tokens.columns[3:] - mask, False, False, False, 1, False),
        (Tokens.all & mask, False, True, False, 1, False),
        (Tokens.all - Tokens.prompt, True, True, False, 0, False),
        (Tokens.prompt | mask, True, True, False, 1, False),
        (Tokens.prompt & mask, True, True, False, 1, True),
        (mask - Tokens.prompt, True, True, False, 1, False),
        (Tokens.all & [-1], True, True, False, 0, False),
    ]:
        got = (tokens.needs_prompt, tokens.needs_padding, tokens.needs_ids, len(tokens.masks), tokens.within_prompt)
        assert got == (prompt, padding, ids, masks, within), tokens
    assert as_selection(tokens=[-1]).needs_prompt and not as_selection(tokens=[1]).needs_padding  # type: ignore[union-attr]
    assert len(as_selection(tokens=mask).masks) == 1  # type: ignore[union-attr]


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
        said = PromptLayout.of(prompt)
        assert (
            said.columns == 6 and said.lengths.tolist() == [4, 6] and said.is_token is not None and said.ids is not None
        )
        assert said.is_token.int().tolist()[0] == [0, 0, 1, 1, 1, 1]
    one = tokenizer("Hi!")
    for prompt in [one, one["input_ids"], torch.tensor(one["input_ids"]), [one["input_ids"]], tuple(one["input_ids"])]:
        assert PromptLayout.of(prompt).lengths.tolist() == [4]
    uneven = PromptLayout.of([[1, 2, 3], [4]])
    assert uneven.columns == 3 and uneven.lengths.tolist() == [3, 1] and uneven.ids is None
    for nothing in ["Hi", ["Hi", "Ho"], None, 3.5]:
        with pytest.raises(TypeError):
            PromptLayout.of(nothing)
    for empty in [[], [[]], torch.zeros(2, 0)]:
        with pytest.raises(ValueError):
            PromptLayout.of(empty)


ODD: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(0, 5, dtype=torch.long), ValueError, "is empty"),
    ([1, [2, 3]], ValueError, "lists deep"),
    ([[1, 2], ["a", "b"]], TypeError, "tokenizer.text"),
    (torch.zeros(1, 2, 3, dtype=torch.long), ValueError, "lists deep"),
    (torch.tensor([[1.0, 2.0]]), TypeError, "whole numbers"),
    (np.array([[1.0, 2.0]]), TypeError, "whole numbers"),
    (torch.tensor([[True, False]]), TypeError, "whole numbers"),
    ({"input_ids": torch.zeros(2, 8)}, TypeError, "whole numbers"),
    ({"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}, ValueError, "rows of .3. columns, and its ids have .2."),
    ({"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}, ValueError, "columns, and its ids"),
    ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1, 1]]}, ValueError, "columns, and its ids"),
    ({"input_ids": [[1, 2]], "attention_mask": torch.zeros(1, 1, 2, 2)}, ValueError, "lists deep"),
    ({"input_ids": [[1, 2]], "attention_mask": [[0.0, -1e9]]}, ValueError, "other numbers than 0 and 1"),
    ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, ValueError, "other numbers than 0 and 1"),
    ({"pixel_values": torch.zeros(1, 3)}, ValueError, "no input_ids"),
    ({}, ValueError, "no input_ids"),
    ({"inputs_embeds": torch.zeros(2, 3)}, ValueError, "no input_ids"),
    ([None], TypeError, "tokenizer.text"),
    (7, TypeError, "tokenizer.text"),
]


@pytest.mark.parametrize("prompt,error,words", ODD, ids=[str(i) for i in range(len(ODD))])
def test_odd_prompts_are_refused_in_words(prompt: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PromptLayout.of(prompt)


def test_more_prompts() -> None:
    from types import SimpleNamespace

    from steering_vectors.demo import tiny_tokenizer

    uneven = PromptLayout.of({"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]})
    assert uneven.columns == 3 and uneven.lengths.tolist() == [3, 1] and uneven.is_token is None
    assert PromptLayout.of([np.array([1, 2]), np.array([3, 4])]).ids.tolist() == [[1, 2], [3, 4]]  # type: ignore[union-attr]
    assert PromptLayout.of(np.array([[1, 2], [3, 4]])).lengths.tolist() == [2, 2]
    assert PromptLayout.of({"input_ids": [[1, 2]], "attention_mask": None}).is_token is None
    thing = SimpleNamespace(input_ids=torch.tensor([[0, 1]]), attention_mask=torch.tensor([[False, True]]))
    assert PromptLayout.of(thing).lengths.tolist() == [1]
    embedded = PromptLayout.of({"inputs_embeds": torch.zeros(2, 4, 8), "attention_mask": [[0, 1, 1, 1], [1, 1, 1, 1]]})
    assert embedded.columns == 4 and embedded.lengths.tolist() == [3, 4] and embedded.ids is None

    batch = tiny_tokenizer()(["Hi!", "Hello"], padding=True, return_tensors="pt")
    assert PromptLayout.of(batch).words == [batch.tokens(0), batch.tokens(1)]
    batch["input_ids"] = batch["input_ids"][:, 1:]  # no longer what the tokenizer made: its words do not fit
    batch["attention_mask"] = batch["attention_mask"][:, 1:]
    assert PromptLayout.of(batch).words is None and PromptLayout.of(batch).columns == 5


MIXED: list[Any] = [
    Tokens.response - Tokens.columns[7],
    [1, 6] | Tokens.generated[2:],
    Tokens.all & slice(3, None, 2),
    (Tokens.response | torch.tensor([False, False, True, False, False, False])) - [5],
    ~Tokens.prompt[1:],
]


@pytest.mark.parametrize("tokens", MIXED, ids=shown)
def test_in_a_model_with_and_without_a_cache(tokens: Tokens) -> None:
    "Padded rows, generated from: the columns that differ from the unsteered ones are those that are meant."
    from steering_vectors import SteeringVector
    from steering_vectors.demo import tiny_model
    from steering_vectors.model.hooks import read_output

    model = tiny_model()
    given = {"input_ids": torch.tensor([[0, 0, 9, 17, 5, 12], [5, 9, 17, 33, 12, 44]])}
    given["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    vector = SteeringVector({1: torch.full((model.config.hidden_size,), 3.0)})
    seen: list[torch.Tensor] = []

    def run(cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
        "The ids, and what layer 1 returned for each column."
        seen.clear()
        with vector.apply(model, tokens=tokens, prompt=given), read_output(model.model.layers[1], seen.append):
            ids = model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
        return ids, torch.cat(seen, 1) if cache else seen[-1]

    ids, acts = run(cache=True)
    again, others = run(cache=False)
    assert torch.equal(ids, again)
    real = torch.cat([given["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    seen.clear()
    with torch.no_grad(), read_output(model.model.layers[1], seen.append):
        model(ids[:, :-1], attention_mask=real)
    meant = select(tokens, Layout(0, 2, 10, 6, None, given["attention_mask"].bool(), ids[:, :-1]))
    assert isinstance(meant, torch.Tensor) and bool(meant.any())
    for found in (acts, others):
        marks = (found - seen[0]).abs().amax(-1) > 1
        assert torch.equal(marks & real.bool(), meant.expand(2, -1) & real.bool())


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
    assert not torch.equal(passes(Tokens.response, batch, [5]), definition(batch, lambda batch, r: {3, 4}))
    assert list(itertools.chain(*passes(Tokens.response, batch, [5]).int().tolist())) == [0, 0, 1, 1, 1]
