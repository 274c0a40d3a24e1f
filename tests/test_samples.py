"""Samples with tokenizers of several makes: beginnings are not doubled, nothing about the tokenizer changes."""

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steering_vectors import SteeringVectorTrainingSample as Sample
from steering_vectors import Tokens
from steering_vectors.demo import tiny_tokenizer
from steering_vectors.samples import as_sample, encode_samples, text_ids, texts_ids


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
