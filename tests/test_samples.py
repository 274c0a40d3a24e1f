"""Samples with tokenizers of several makes: beginnings are not doubled, nothing about the tokenizer changes."""

import copy
import warnings
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steering_vectors import SteeringVectorTrainingSample as Sample
from steering_vectors import Tokens
from steering_vectors.demo import tiny_tokenizer
from steering_vectors.train.reading import encode_samples, encode_texts, read_places, tokenize_samples, tokenize_texts
from steering_vectors.train.samples import as_rows, as_sample, as_sets, as_text
from steering_vectors.train.texts import text_ids, texts_ids


def words(bos: str | None, eos: str | None = None, template: str | None = None) -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["[UNK]", "<s>", "</s>", "a", "b", "c", "user", "assistant", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(w, vocab[w]) for w in (bos, eos) if w]
    single = " ".join([*([f"{bos}"] if bos else []), "$A", *([f"{eos}"] if eos else [])])
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="[UNK]", chat_template=template
    )


def state(tokenizer: Any) -> Any:
    return (
        copy.deepcopy({k: v for k, v in vars(tokenizer).items() if k != "_tokenizer"}),
        tokenizer.padding_side,
        len(tokenizer),
    )


@pytest.mark.parametrize("bos, text, ids", [
    ("<s>", "a b", [1, 3, 4]), ("<s>", "<s> a b", [1, 3, 4]), (None, "a b", [3, 4]), (None, "<s> a b", [1, 3, 4]),
])  # fmt: skip
def test_a_beginning_is_not_doubled(bos: str | None, text: str, ids: list[int]) -> None:
    tokenizer = words(bos)
    before = state(tokenizer)
    assert text_ids(tokenizer, text) == ids
    assert texts_ids(tokenizer, [text, "c", text])[2] == ids
    assert state(tokenizer) == before


def test_chats_of_several_shapes() -> None:
    template = "{{ bos_token }}{% for m in messages %} {{ m.role }} : {{ m.content | trim }} </s>{% endfor %}"
    tokenizer = words("<s>", "</s>", template)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    assert text_ids(tokenizer, talk) == [1, 6, 8, 3, 2, 7, 8, 4, 5]  # one <s>, and it ends on `c`
    assert text_ids(tokenizer, talk[:1], add_generation_prompt=False) == [1, 6, 8, 3]
    (pair,) = encode_samples(
        tokenizer, [(talk, [talk[0], {"role": "assistant", "content": "c"}])], read=Tokens.generated
    )
    assert pair.positive.read == [7, 8] and pair.negative.read == [7]
    (pair,) = encode_samples(tokenizer, [(talk, talk)], read=Tokens.response)
    assert pair.positive.read == [6, 7, 8]
    with pytest.raises(ValueError, match="no chat template"):
        text_ids(words("<s>"), talk)


def test_spellings_of_a_sample() -> None:
    wanted = Sample("a", "b")
    for spelled in (
        ("a", "b"),
        ["a", "b"],
        {"positive": "a", "negative": "b"},
        {"positive_str": "a", "negative_str": "b", "other": 1},
        wanted,
    ):
        assert as_sample(spelled) == wanted  # type: ignore[arg-type]
    for wrong in (
        "ab",
        ("a",),
        ("a", "b", "c"),
        {"chosen": "a"},
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        3,
    ):
        with pytest.raises(TypeError, match="A training sample must be a pair"):
            as_sample(wrong)  # type: ignore[arg-type]


def test_positions_after_truncation_count_what_is_left() -> None:
    tokenizer = tiny_tokenizer()
    (pair,) = encode_samples(tokenizer, [("abcdef", "xy")], max_length=3, truncation="left", read_token_index=0)
    assert tokenizer.decode([pair.positive.ids[pair.positive.read[0]]]) == "d"
    (pair,) = encode_samples(tokenizer, [("abcdef", "abcxyz")], max_length=3, truncation="left", read=Tokens.all)
    assert pair.positive.read == [0, 1, 2]
    for wrong in ("no", 3.5, None):
        with pytest.raises((TypeError, ValueError)):
            encode_samples(tokenizer, [("a", "b")], read_token_index=lambda text: wrong)  # noqa: B023


def test_positions_count_in_the_tokenizers_own_ids_also_where_a_doubled_start_was_dropped() -> None:
    tokenizer = tiny_tokenizer()

    def last(text: str) -> int:
        return len(tokenizer(text)["input_ids"]) - 1

    for text in ("hello", "<s>hello"):
        ids = tokenizer(text)["input_ids"]
        for index in (last, -1, ids.index(tokenizer.convert_tokens_to_ids("o"))):
            (pair,) = encode_samples(tokenizer, [(text, "<s>xo" if callable(index) or index < 0 else text)], index)
            assert tokenizer.decode([pair.positive.ids[pair.positive.read[0]]]) == "o"
            assert pair.positive.ids == tokenizer("hello")["input_ids"]
        (pair,) = encode_samples(tokenizer, [(text, text)], read_token_index=0)
        assert pair.positive.read == [0]


# What people have in hand

ASK = [{"role": "user", "content": "Hi?"}]
GLAD, SAD = ({"role": "assistant", "content": said} for said in ("Yes", "No!"))
HEADER = "<s>[user] Hi?</s>[assistant] "


def read_of(rows: Any, tokenizer: Any = None, **how: Any) -> list[tuple[str, str, str, str]]:
    "Of each pair: both texts, and what is read of them."
    tokenizer = tokenizer or tiny_tokenizer()
    pairs = encode_samples(tokenizer, rows, read=Tokens.generated, **how)
    texts = [[text for text in pair] for pair in pairs]
    words = [
        [tokenizer.decode(t.ids) for t in p] + [tokenizer.decode([t.ids[i] for i in t.read]) for t in p] for p in texts
    ]
    return [(a, b, c, d) for a, b, c, d in words]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Yes", "rejected": "No!"},  # trl, standard
        {"prompt": ASK, "chosen": [GLAD], "rejected": [SAD]},  # trl, conversational
        {"chosen": [*ASK, GLAD], "rejected": [*ASK, SAD]},  # trl, with the prompt inside
        {"prompt": "Hi?", "chosen": [*ASK, GLAD], "rejected": [*ASK, SAD], "score_chosen": 8.0},  # UltraFeedback
        {"prompt": ASK, "chosen": [*ASK, GLAD], "rejected": [*ASK, SAD]},
        {"prompt": ASK, "chosen": "Yes", "rejected": "No!"},
        {"prompt": "Hi?", "chosen": GLAD, "rejected": SAD},
        {"prompt": "Hi?", "positive": "Yes", "negative": "No!", "id": 3},
        {"positive": {"prompt": "Hi?", "response": "Yes"}, "negative": {"prompt": "Hi?", "response": "No!"}},
        {"positive": {"question": ASK, "answer": "Yes"}, "negative": {"prompt": "Hi?", "completion": "No!", "n": 1}},
        {"positive": {"prompt": ASK, "completion": [GLAD]}, "negative": {"messages": [*ASK, SAD]}},
        ({"prompt": "Hi?", "response": "Yes"}, {"prompt": "Hi?", "response": "No!"}),
        ({"prompt": HEADER, "response": "Yes"}, {"prompt": HEADER.removeprefix("<s>"), "response": "No!"}),
        ({"prompt": "Hi?", "response": "Yes"}, [*ASK, SAD]),
        {"prompt": ASK[0], "chosen": "Yes", "rejected": "No!"},
        {"question": "Hi?", "chosen": [*ASK, GLAD], "rejected": [*ASK, SAD]},
        {"query": "", "prompt": "Hi?", "system": None, "chosen": "Yes", "rejected": "No!"},
        Sample({"prompt": "Hi?", "response": "Yes"}, [*ASK, SAD]),
    ],
)
def test_prompts_with_answers_in_the_spellings_people_have(row: Any) -> None:
    before = copy.deepcopy(row)
    assert read_of([row]) == [(HEADER + "Yes", HEADER + "No!", "Yes", "No!")]
    assert row == before


def test_a_conversation_after_a_prompt_that_it_does_not_hold_goes_on_with_it() -> None:
    system = {"role": "system", "content": "Be short."}
    before = "<s>[system] Be short.</s>" + HEADER.removeprefix("<s>")
    for row in (
        {"prompt": [system], "chosen": [*ASK, GLAD], "rejected": [*ASK, SAD]},
        {"prompt": [system, *ASK], "chosen": [GLAD], "rejected": [SAD]},
        {"prompt": "Hi?", "chosen": [system, *ASK, GLAD], "rejected": [system, *ASK, SAD]},
        {"prompt": ASK, "chosen": [system, *ASK, GLAD], "rejected": [system, *ASK, SAD]},
        {"system": "Be short.", "prompt": "Hi?", "chosen": [system, *ASK, GLAD], "rejected": [system, *ASK, SAD]},
    ):
        assert read_of([row]) == [(before + "Yes", before + "No!", "Yes", "No!")]
    row = {"prompt": [*ASK, GLAD], "chosen": [*ASK[:0], {"role": "user", "content": "So?"}, SAD], "rejected": "x"}
    assert read_of([row])[0][0] == HEADER + "Yes</s>[user] So?</s>[assistant] No!"


def test_a_record_without_a_template_is_what_both_write_together() -> None:
    tokenizer = words("<s>", "</s>")
    assert read_of([{"prompt": "a b", "chosen": " c", "rejected": " a"}], tokenizer) == [
        ("<s> a b c", "<s> a b a", "c", "a")
    ]
    ids = {"prompt": [1, 3], "response": [4, 5]}
    assert read_of([(ids, {"prompt": [1, 3], "response": " a"})], tokenizer) == [("<s> a b c", "<s> a a", "b c", "a")]
    tokenizer = tiny_tokenizer()
    assert read_of([{"prompt": "a b", "chosen": " c", "rejected": "d"}], tokenizer, chat=False)[0][0] == "<s>a b c"


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "Hi?", "chosen": "Yes", "rejected": "No!"}, "call that column 'prompt'"),
        ({"question": "Hi?", "positive": "Yes", "negative": "No!"}, "'question' that its texts do not hold.*call that column 'prompt'"),
        ({"query": "Hi?", "chosen": [GLAD], "rejected": [SAD]}, "call that column 'prompt'"),
        ({"system": "Be short.", "prompt": "Hi?", "chosen": "Yes", "rejected": "No!"}, "make it the first message of the prompt"),
        ({"prompt": "Be short.", "chosen": [*ASK, GLAD], "rejected": [*ASK, SAD]}, "does not hold that prompt"),
        ({"prompt": ASK, "chosen": [{"role": "user", "content": "Ho?"}, GLAD], "rejected": [SAD]}, "does not hold that prompt"),
        ({"prompt": "Hi?", "chosen": None, "rejected": "No!"}, "positive text of sample 0 has a response that is neither.*None"),
        ({"prompt": 5, "chosen": "Yes", "rejected": "No!"}, "positive text of sample 0 has a prompt that is neither.*: 5"),
        (("a", [*ASK, {"role": "assistant", "content": None}]), "^The negative text of sample 0: The last message does not end with"),
        ({"positive": tiny_tokenizer()("a"), "negative": "b"}, "keys 'input_ids'.*Of a tokenizer's output, pass input_ids"),
        (("a", [1, 5, 0]), "^The negative text of sample 0: These ids end with padding"),
        ({"instruction": "Hi?", "chosen": "Yes", "rejected": "No!"}, "call that column 'prompt'"),
        ({"prompt": "How are you?", "chosen": "How are you? Fine", "rejected": "How are you? Bad"}, "Leave the column 'prompt' out"),
        ({"prompt": "How are you?", "positive": "<s>[user] How are you?", "negative": "How are you?"}, "take it off them"),
        ({"positive": {"prompt": "Hi?"}, "negative": {"prompt": "Hi?"}}, "one prompt and one response.*keys 'prompt'"),
        ({"positive": {"prompt": "a", "response": "b", "answer": "c"}, "negative": "b"}, "one prompt and one response"),
        ({"positive": float("nan"), "negative": "b"}, "The positive text of sample 0 must be a string.*it is nan"),
        ({"positive": "a", "negative": ["a", "b"]}, "The negative text of sample 0 must be a string"),
        ({"prompt": "Hi?", "completion": "Yes", "label": True}, "two sets without pairs are"),
        (("a", "b", "c"), "two sets without pairs are"),
    ],
)  # fmt: skip
def test_rows_that_are_not_pairs_name_the_spelling_that_is(row: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        encode_samples(tiny_tokenizer(), [row])


class Polars:
    "As much of a polars data frame as matters."

    columns = ["positive", "negative"]

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def iter_rows(self, named: bool = False) -> Any:
        return iter(self.rows if named else [tuple(row.values()) for row in self.rows])

    def to_dict(self, as_series: bool = True) -> Any:
        return {name: [row[name] for row in self.rows] for name in self.columns}


class Arrow:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.to_pylist = lambda: rows


def test_tables_are_read_by_row() -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    tokenizer = tiny_tokenizer()
    rows = [{"positive": "joy", "negative": "woe"}, {"positive": "yes", "negative": "no"}]
    prefer = [{"prompt": "Hi?", "chosen": "Yes", "rejected": "No!"}, {"prompt": "And?", "chosen": "a", "rejected": "b"}]
    talks = [{"chosen": [*ASK, GLAD], "rejected": [*ASK, SAD]}]
    for these in (rows, prefer, talks):
        wanted = encode_samples(tokenizer, these)
        frame = pandas.DataFrame(these)
        for table in (
            frame,
            frame.set_index(frame.columns[0], drop=False),
            datasets.Dataset.from_list(these),
            Arrow(these),
        ):
            assert encode_samples(tokenizer, table) == wanted
            assert as_sets(table) is None
    stored = pandas.DataFrame(talks)  # read from a file, messages come in arrays of objects
    for column in stored:
        stored[column] = [pandas.Series(talk).to_numpy() for talk in stored[column]]
    assert encode_samples(tokenizer, stored) == encode_samples(tokenizer, talks)
    stored["prompt"] = [pandas.Series(ASK).to_numpy()]
    assert encode_samples(tokenizer, stored) == encode_samples(tokenizer, talks)
    marked = [{**rows[0], "read_positive_token_index": 1}, {**rows[1], "read_positive_token_index": None}]
    assert encode_samples(tokenizer, pandas.DataFrame(marked)) == encode_samples(tokenizer, marked)
    some = [prefer[0], {"prompt": None, "chosen": "a", "rejected": "b"}]
    assert encode_samples(tokenizer, pandas.DataFrame(some)) == encode_samples(tokenizer, some)
    some[1]["prompt"] = float("nan")  # type: ignore[assignment]
    assert encode_samples(tokenizer, some)[1] == encode_samples(tokenizer, [("a", "b")])[0]
    assert encode_samples(tokenizer, Polars(rows)) == encode_samples(tokenizer, rows)  # type: ignore[arg-type]
    columns = datasets.Dataset.from_list(prefer)[:2]  # a part of a data set comes as columns
    assert encode_samples(tokenizer, columns) == encode_samples(tokenizer, prefer)
    frame = pandas.DataFrame({"good": ["joy"], "bad": ["woe"]})
    assert encode_samples(tokenizer, zip(frame["good"], frame["bad"], strict=True)) == encode_samples(
        tokenizer, rows[:1]
    )
    with pytest.raises(TypeError, match="Sample 0 must be a pair.*'good'"):
        encode_samples(tokenizer, frame)


def test_what_is_no_list_of_samples_is_refused_at_the_door() -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.DatasetDict(train=datasets.Dataset.from_list([{"positive": "a", "negative": "b"}]))
    for wrong, words in (
        (split, "one split of a data set.*'train'"),
        ({"good": ["a"], "bad": ["b"]}, "'good', 'bad'"),
        ("ab", "One sample is a list of one"),
        (Sample("a", "b"), "One sample is a list of one"),
    ):
        with pytest.raises(TypeError, match=words):
            as_rows(wrong)
    pairs = iter([("a", "b")])
    assert as_rows(pairs) is pairs


def test_two_sets_are_told_from_pairs() -> None:
    pandas = pytest.importorskip("pandas")
    for good, bad in (
        (["a"], ["b", "c"]),
        ([[*ASK, GLAD]], [[*ASK, SAD], "c"]),
        ([{"prompt": "a", "response": "b"}], []),
        (pandas.Series(["a"]), pandas.Series(["b", "c"])),
        (iter("ab"), (x for x in "c")),
        ([[1, 2]], [[3]]),
    ):
        sets = as_sets({"positive": good, "negative": bad})
        assert sets is not None and sets[0] is good and sets[1] is bad
    for one in ("a", [*ASK, GLAD], {"prompt": "a", "response": "b"}):
        with pytest.raises(TypeError, match=r"list of one: \[sample\]"):
            as_sets({"positive": one, "negative": one})
    for pairs in ([("a", "b")], (["a", "b"], ["c", "d"]), None, {"chosen": ["a"], "rejected": ["b"]}):
        assert as_sets(pairs) is None
    with pytest.raises(TypeError, match="two sets without pairs are"):
        encode_samples(tiny_tokenizer(), (["a", "b", "c"], ["d"]))


def test_texts_of_a_set_are_read_alone() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["joy", [*ASK, GLAD], {"prompt": "Hi?", "response": "Yes"}, [1, 5, 6], torch.tensor([1, 5])]
    encoded = encode_texts(tokenizer, texts)
    assert [t.ids for t in encoded] == texts_ids(tokenizer, texts)
    assert [t.read for t in encoded] == [[len(t.ids) - 1] for t in encoded]
    (talk, record) = encode_texts(tokenizer, texts[1:3], read=Tokens.generated)
    assert talk == record and len(talk.read) == 3
    with pytest.raises(ValueError, match="The positive text 7 is one string, and nothing in a string marks"):
        encode_texts(tokenizer, ["joy"], read=Tokens.response, start=7, side="positive")
    with pytest.raises(TypeError, match="Text 1 must be a string"):
        encode_texts(tokenizer, ["joy", None])  # type: ignore[list-item]
    assert encode_texts(tokenizer, iter([])) == []


def test_texts_are_tokenized_once_for_several_places(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = tiny_tokenizer(), []
    row = {"prompt": "Hi?", "chosen": "Yes", "rejected": "No!"}
    texts = tokenize_samples(tokenizer, [row, Sample("a", "b", 0)])
    plain = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kw: (calls.append(1), plain(*args, **kw))[1])
    read_places(texts, -1), read_places(texts, lambda text: 1), read_places(texts, read=Tokens.all[1:])
    assert not calls
    assert [t.read for t in read_places(texts, read=Tokens.generated)][:2] == [[24, 25, 26]] * 2
    assert [t.read for t in read_places(texts, -2)] == [[25], [25], [0], [0]]
    some = tokenize_texts(tokenizer, ["a", {"prompt": "b", "response": "c"}], ["One", "Two"])
    assert [t.read for t in read_places(some)] == [[1], [len(some[1].ids) - 1]]


# Where an answer begins


def test_a_conversation_that_ends_with_the_user_is_read_where_the_answer_begins() -> None:
    tokenizer = tiny_tokenizer()
    pair = (ASK, [{"role": "user", "content": "Yo?"}])
    for how in ({}, {"add_generation_prompt": True}):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ((pos, _),) = encode_samples(tokenizer, [pair], **how)  # type: ignore[arg-type]
        assert len(seen) == (not how)
        assert tokenizer.decode(pos.ids) == HEADER and pos.read == [len(pos.ids) - 1]
        ((pos, _),) = encode_samples(tokenizer, [pair], read=Tokens.prompt[-3:], add_generation_prompt=True)
        assert pos.read == [len(pos.ids) - 3, len(pos.ids) - 2, len(pos.ids) - 1]
    ((pos, _),) = encode_samples(tokenizer, [pair], add_generation_prompt=False)
    assert tokenizer.decode(pos.ids) == "<s>[user] Hi?"
    with pytest.raises(ValueError, match=r"Tokens\.generated names none"):
        encode_samples(tokenizer, [pair], read=Tokens.generated, add_generation_prompt=True)
    empty = [*ASK, {"role": "assistant", "content": ""}]  # the same, in an open turn
    ((pos, _),) = encode_samples(tokenizer, [(empty, empty)], read=Tokens.prompt[-2:])
    assert tokenizer.decode(pos.ids) == HEADER and pos.read == [len(pos.ids) - 2, len(pos.ids) - 1]


def persona(mood: str, said: str = "I went out.", template: Any = None) -> Any:
    chat = [{"role": "system", "content": f"Be {mood}."}, *ASK, {"role": "assistant", "content": said}]
    return chat if template is None else template(chat, tokenize=False, continue_final_message=True)


@pytest.mark.filterwarnings("ignore:.*depends on the lengths")
@pytest.mark.parametrize("said", [("I went out.", "I went out."), ("Great!", "Awful.")])
@pytest.mark.parametrize("read", [Tokens.generated, Tokens.prompt, Tokens.response, Tokens.prompt[-2:]])
def test_strings_whose_prompts_differ_are_not_read_as_responses(said: tuple[str, str], read: Tokens) -> None:
    tokenizer = tiny_tokenizer()
    make = tokenizer.apply_chat_template
    strings = (persona("glad", said[0], make), persona("low", said[1], make))
    for kept in (strings, tuple(text.removeprefix("<s>") for text in strings)):
        with pytest.raises(ValueError, match="differs from the other of its pair before"):
            encode_samples(tokenizer, [kept], read=read)
    chats = (persona("glad", said[0]), persona("low", said[1]))
    records = tuple({"prompt": chat[:-1], "response": chat[-1]["content"]} for chat in chats)
    assert encode_samples(tokenizer, [chats], read=read) == encode_samples(tokenizer, [records], read=read)
    rendered = tuple({"prompt": t[: len(t) - len(s)], "response": s} for t, s in zip(strings, said, strict=True))
    assert encode_samples(tokenizer, [rendered], read=read) == encode_samples(tokenizer, [chats], read=read)
    (pair,) = encode_samples(tokenizer, [chats], read=Tokens.generated)
    assert [tokenizer.decode([t.ids[i] for i in t.read]) for t in pair] == list(said)
    for same in (read_position_of(strings, tokenizer), read_position_of(chats, tokenizer)):
        assert same == [-1, -1]  # one token needs no prompt


def read_position_of(texts: Any, tokenizer: Any) -> list[int]:
    (pair,) = encode_samples(tokenizer, [texts])
    return [text.read[0] - len(text.ids) for text in pair]


def test_strings_that_part_in_the_answer_are_read_from_there() -> None:
    tokenizer = tiny_tokenizer()
    strings = [HEADER + said for said in ("Yes", "No!")]
    assert read_of([strings]) == [(*strings, "Yes", "No!")]
    closed = [text + "</s>" for text in strings]
    assert read_of([closed])[0][2:] == ("Yes</s>", "No!</s>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_of([strings, closed, ("I am glad", "I am low")])
    with pytest.warns(UserWarning, match="end alike") as seen:
        encode_samples(tokenizer, [("glad: I went", "sad: I went")] * 3, read=Tokens.generated)
    assert len(seen) == 1


@pytest.mark.parametrize("read", [Tokens.all, Tokens.all[:9], Tokens.prompt | Tokens.generated])
def test_an_average_with_the_first_token_over_unequal_lengths_is_told(read: Tokens) -> None:
    tokenizer, records = tiny_tokenizer(), [({"prompt": "a", "response": x}, {"prompt": "a", "response": y}) for x, y in (("b", "c"), ("bb", "c"), ("bb", "c"))]  # fmt: skip
    uneven = [("abc", "abd"), ("a", "abc"), ("ab", "a")] if read is not None and not read.needs_prompt else records
    with pytest.warns(UserWarning, match=r"Tokens\.all\[1:\]") as seen:
        encode_samples(tokenizer, uneven, read=read)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_samples(tokenizer, uneven[:1], read=read)
        encode_samples(tokenizer, uneven, read=Tokens.all[1:])
        encode_samples(tokenizer, uneven)
    with pytest.warns(UserWarning, match="depends on the lengths"):
        encode_texts(tokenizer, ["ab", "abc"], read=Tokens.all)


def test_a_string_beside_a_marked_prompt_begins_with_it_or_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    for marked in ([*ASK, SAD], {"prompt": "Hi?", "response": "No!"}, {"prompt": [1, 45, 78, 15], "response": [70]}):
        for pair in (("Hi? Yes", marked), (marked, "Yes")):
            with pytest.raises(
                ValueError, match="does not begin with the prompt that is marked in the other text of its pair"
            ):
                encode_samples(tokenizer, [pair], read=Tokens.generated)
            encode_samples(tokenizer, [pair])
    assert read_of([(HEADER + "Yes", [*ASK, SAD])]) == [(HEADER + "Yes", HEADER + "No!", "Yes", "No!")]
    assert read_of([({"prompt": "Hi?", "response": "Yes"}, HEADER + "No!")])[0][2:] == ("Yes", "No!")


CUT = {"prompt": "abcdef", "response": "uvwxyz"}


@pytest.mark.parametrize(
    "read, side, length, wanted",
    [
        (Tokens.generated, "left", 4, "wxyz"),
        (Tokens.response, "left", 4, "wxyz"),
        (Tokens.generated, "right", 10, "uvw"),
        (Tokens.prompt[-2:], "left", 9, "ef"),
        (Tokens.prompt[:2], "right", 4, "<s>a"),
        (Tokens.generated[:2], "right", 10, "uv"),
        (Tokens.all[1:], "left", 4, "xyz"),  # what is left is counted, and its first token stays out
        (Tokens.prompt[:2], "left", 9, None),
        (Tokens.generated[:2], "left", 4, None),
        (Tokens.prompt[-2:], "right", 4, None),
        (Tokens.response, "right", 4, None),
        (Tokens.prompt[0] | Tokens.generated, "left", 9, None),
    ],
)
def test_what_is_counted_from_an_end_that_was_cut_off_is_refused(
    read: Tokens, side: Any, length: int, wanted: str | None
) -> None:
    tokenizer = tiny_tokenizer()

    def ask() -> str:
        how: Any = {"chat": False, "max_length": length, "truncation": side}
        (pair,) = encode_samples(tokenizer, [(CUT, CUT)], read=read, **how)
        assert pair.positive == pair.negative
        return tokenizer.decode([pair.positive.ids[i] for i in pair.positive.read])

    if wanted is not None:
        assert ask() == wanted
    else:
        with pytest.raises(
            ValueError, match=rf"sample 0 is cut to {length} of 13 tokens, and .* depends on what was cut off"
        ):
            ask()


@pytest.mark.parametrize("index", [True, False, lambda text: True])
def test_truth_is_no_place(index: Any) -> None:
    with pytest.raises(TypeError, match="is read at a whole number"):
        encode_samples(tiny_tokenizer(), [("ab", "ac")], index)


def test_arrays_and_tables_of_other_makes() -> None:
    np, datasets = pytest.importorskip("numpy"), pytest.importorskip("datasets")
    tokenizer, pairs = tiny_tokenizer(), [("joy", "woe"), ("yes", "no")]
    wanted = encode_samples(tokenizer, pairs)
    table = datasets.Dataset.from_dict({"positive": ["joy", "yes"], "negative": ["woe", "no"]})

    class Lazy:
        def collect(self) -> Any:
            return Polars([{"positive": a, "negative": b} for a, b in pairs])

    arrays: list[Any] = [np.array(pairs), np.array(pairs, dtype=object), [np.array(pair) for pair in pairs], Lazy()]
    for given in [*arrays, *(table.with_format(name) for name in (None, "numpy", "pandas", "arrow", "torch"))]:
        assert encode_samples(tokenizer, given) == wanted


def test_pairs_of_ids_are_read_like_strings() -> None:
    tokenizer = tiny_tokenizer()
    pairs = [("joy", "jolt"), ("I love", "I hate")]
    ids = [tuple(text_ids(tokenizer, text) for text in pair) for pair in pairs]
    for read in (None, Tokens.generated, Tokens.all[1:]):
        wanted = encode_samples(tokenizer, pairs, read=read)
        assert encode_samples(tokenizer, ids, read=read) == wanted  # type: ignore[arg-type]
        assert encode_samples(tokenizer, [tuple(map(torch.tensor, pair)) for pair in ids], read=read) == wanted  # type: ignore[misc]
    assert as_text(torch.tensor([[1, 2]])) == [1, 2]


@pytest.mark.parametrize("read", [Tokens.generated, Tokens.prompt[-2:], Tokens.response, Tokens.all[1:]])
def test_places_are_found_whatever_the_default_device(read: Tokens) -> None:
    tokenizer, rows = tiny_tokenizer(), [{"prompt": "Hi?", "chosen": "Yes", "rejected": "No!"}]
    wanted = encode_samples(tokenizer, rows, read=read)
    torch.set_default_device("meta")
    try:
        assert encode_samples(tokenizer, rows, read=read) == wanted
    finally:
        torch.set_default_device(None)
