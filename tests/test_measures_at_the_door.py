"""What a measure is given is checked before anything is computed; what it returns can be gone through."""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from steering_vectors import (
    Provenance,
    SteeringVector,
    Tokens,
    answer_gap,
    completion_gap,
    explore,
    find_layers,
    multiplier_limit,
    next_token_shift,
    projections,
    similarity,
    steered_tokens,
    sweep,
    text_loss,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer

MEASURES = {
    "sweep": lambda m, t, v, ids: sweep(m, t, v, ids, multipliers=[0, 1], max_new_tokens=1),
    "next_token_shift": lambda m, t, v, ids: next_token_shift(m, t, v, ids),
    "completion_gap": lambda m, t, v, ids: completion_gap(m, t, v, [(ids, "a", "b")]),
    "answer_gap": lambda m, t, v, ids: answer_gap(m, t, v, [(ids, "a", "b")]),
    "text_loss": lambda m, t, v, ids: text_loss(m, t, v, ["Hi", ids]),
    "projections": lambda m, t, v, ids: projections(m, t, v, ids),
    "projections of several": lambda m, t, v, ids: projections(m, t, v, ["Hi", ids]),
    "explore": lambda m, t, v, ids: explore(m, t, v, ids, multipliers=[1], max_new_tokens=1),
}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return tiny_model(), tiny_tokenizer(), SteeringVector({n: torch.randn(32) for n in (1, 2)})


@pytest.mark.parametrize("name", MEASURES)
def test_ids_of_another_tokenizer_are_named(tiny, name):
    model, tokenizer, v = tiny
    for ids, wrong in (([5, 100, 6], 100), (torch.tensor([[5, 50_000]]), 50_000)):
        with pytest.raises(ValueError, match=f"{wrong} is no token of this model, which has 0 to 99"):
            MEASURES[name](model, tokenizer, v, ids)


@pytest.mark.parametrize("name", MEASURES)
def test_a_vector_of_another_width_is_refused_as_by_apply(tiny, name):
    model, tokenizer, _ = tiny
    for width in (16, 33):
        with pytest.raises(ValueError, match=f"The vector of layer 1 has width {width}, but the hidden size"):
            MEASURES[name](model, tokenizer, SteeringVector({1: torch.ones(width)}), [5, 6, 7])
    with pytest.raises(ValueError, match="holds NaN"):
        MEASURES[name](model, tokenizer, SteeringVector({1: torch.full((32,), math.nan)}), [5, 6, 7])


@pytest.mark.parametrize("seed", [True, "1", 1.5, None, torch.tensor([1])])
def test_a_seed_is_a_whole_number(tiny, seed):
    with pytest.raises(TypeError, match="seed must be a whole number"):
        sweep(*tiny, "Hi", temperature=1.0, seed=seed, max_new_tokens=1)


def test_a_seed_may_be_of_any_library(tiny):
    seeds = 3, np.int64(3), torch.tensor(3)
    texts = [dict(sweep(*tiny, "Hi", [0, 1], 1, 4, temperature=1.0, seed=seed)) for seed in seeds]
    assert texts[0] == texts[1] == texts[2]
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        sweep(*tiny, "Hi", temperature=1.0, seed=-1, max_new_tokens=1)


@pytest.mark.parametrize("progress", [3, "x", [print]])
def test_progress_is_a_function(tiny, progress):
    with pytest.raises(TypeError, match="progress is a function of two numbers"):
        sweep(*tiny, "Hi", max_new_tokens=1, progress=progress)


@pytest.mark.parametrize("multiplier", [True, "2", None, [1], [True], torch.tensor([1.0]), 1j, {0: 1}])
def test_one_multiplier_is_one_number(tiny, multiplier):
    with pytest.raises(TypeError, match="multiplier is one number"):
        next_token_shift(*tiny, "Hi", multiplier)


def test_one_multiplier_may_be_of_any_library(tiny):
    shifts = [next_token_shift(*tiny, "Hi", m) for m in (0.5, Fraction(1, 2), np.float32(0.5), torch.tensor(0.5))]
    assert all(shift == shifts[0] for shift in shifts)


def test_a_multiplier_too_large_for_a_float_is_refused(tiny):
    with pytest.raises(TypeError, match="Multipliers are numbers"):
        sweep(*tiny, "Hi", multipliers=[10**400], max_new_tokens=1)


@pytest.mark.parametrize("fraction", ["a", True, None, torch.ones(2), 0, -0.0, math.nan, -math.inf])
def test_a_fraction_is_a_finite_number(fraction):
    known = SteeringVector({1: torch.ones(4)}, provenance=Provenance(activation_norms={1: 10.0}))
    for v in (known, SteeringVector({1: torch.ones(4)})):
        with pytest.raises((TypeError, ValueError), match="fraction"):
            multiplier_limit(v, fraction=fraction)


def test_the_limit_is_a_plain_number():
    known = SteeringVector({1: torch.ones(4)}, provenance=Provenance(activation_norms={1: 10.0}))
    for fraction in (0.5, Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)):
        limit = multiplier_limit(known, fraction=fraction)
        assert type(limit) is float and limit == 2.5
        assert multiplier_limit(known, fraction=-fraction) == -2.5
    assert multiplier_limit(SteeringVector({1: torch.ones(4)}), fraction=-1) == -3.0
    for wrong in ({1: torch.ones(4)}, torch.ones(4), None):
        with pytest.raises(TypeError, match="takes a SteeringVector"):
            multiplier_limit(wrong)


@pytest.mark.parametrize(
    "text",
    ["", "Hi", [5, 6], (5, 6), range(5, 8), [np.int64(5), np.int64(6)], [5, torch.tensor(6)], np.array([5, 6])]
    + [np.array([[5, 6]]), torch.tensor([5, 6]), [{"role": "assistant", "content": "hi"}], {"prompt": "a"}, None, 3],
    ids=repr,
)
def test_one_text_is_no_list_of_texts(tiny, text):
    with pytest.raises(TypeError, match="This is one text"):
        text_loss(*tiny, text)


@pytest.mark.parametrize(
    "text",
    [[5, 6], range(5, 7), [np.int64(5), np.int64(6)], [5, torch.tensor(6)], np.array([[5, 6]]), torch.tensor([5, 6])],
    ids=repr,
)
def test_ids_of_any_library_are_one_text(tiny, text):
    assert projections(*tiny, text).tokens == projections(*tiny, [5, 6]).tokens


@pytest.mark.parametrize(
    "texts",
    [
        lambda: ("Hi", "you"),
        lambda: (text for text in ["Hi", "you"]),
        lambda: pd.Series(["Hi", "you"], index=[7, 3]),
        lambda: np.array(["Hi", "you"]),
        lambda: pd.DataFrame({"text": ["Hi", "you"]})["text"],
        lambda: dict.fromkeys(["Hi", "you"]).keys(),
    ],
)
def test_texts_come_in_any_collection(tiny, texts):
    found, wanted = projections(*tiny, texts()), projections(*tiny, ["Hi", "you"])
    assert len(found) == 2 and torch.equal(found.mean, wanted.mean)
    assert torch.equal(text_loss(*tiny, texts()).values, text_loss(*tiny, ["Hi", "you"]).values)


@pytest.mark.parametrize("rows", [np.array([[5, 6], [7, 8]]), torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]])
def test_rows_of_ids_are_several_texts(tiny, rows):
    assert torch.equal(projections(*tiny, rows).mean, projections(*tiny, [[5, 6], [7, 8]]).mean)
    assert torch.equal(text_loss(*tiny, rows).values, text_loss(*tiny, [[5, 6], [7, 8]]).values)


@pytest.mark.parametrize("measure", [text_loss, projections])
def test_a_table_is_not_read_by_the_names_of_its_columns(tiny, measure):
    with pytest.raises(TypeError, match="pass the column that holds them"):
        measure(*tiny, pd.DataFrame({"text": ["Hi", "you"], "label": [0, 1]}))


@pytest.mark.parametrize("text", [[[]], ["Hi", []], torch.zeros(1, 0, dtype=torch.long)], ids=repr)
def test_a_text_without_tokens_is_named(tiny, text):
    with pytest.raises(ValueError, match=r"(Text \d|This text) has no tokens"):
        projections(*tiny, text)


def test_a_vector_without_layers_is_nothing_to_project_on(tiny):
    with pytest.raises(ValueError, match="The vector has no layers"):
        projections(*tiny[:2], SteeringVector({}), "Hi")


def test_the_set_of_texts_is_a_sequence(tiny):
    found = projections(*tiny, ["Hi", "you"])
    assert found[np.int64(1)] is found[-1] is found[torch.tensor(1)]
    assert found[:0].layers == () and len(found[:0].mean) == 0 and list(reversed(found)) == [found[1], found[0]]
    for index in (True, "a", 1.0, None):
        with pytest.raises(TypeError, match="numbered from 0 to 1"):
            found[index]
    with pytest.raises(IndexError, match="numbered from 0 to 1; 2 is none"):
        found[2]


def test_tables_are_gone_through_from_the_end(tiny):
    effect, found = completion_gap(*tiny, [("Hi", "a", "b")], [-1, 0, 2]), projections(*tiny, "Hi")
    assert list(reversed(effect)) == [2, 0, -1] and list(reversed(found)) == [2, 1]
    assert list(reversed(similarity(tiny[2]))) == ["2", "1"] and list(reversed(tiny[2])) == [2, 1]


def test_two_vectors_of_one_name_are_refused(tiny):
    v = tiny[2][1]
    for vectors in ({1: v, "1": -v}, {None: v, "None": -v, "b": v}):
        with pytest.raises(ValueError, match="the same name"):
            similarity(vectors)


def test_steered_tokens_of_ids_that_are_none(tiny):
    for ids in ([-1], torch.tensor([5, -100])):
        with pytest.raises(ValueError, match="prompt_ids holds -"):
            steered_tokens(tiny[1], ids, [7])
    with pytest.raises(TypeError, match="tokenizer must be the model's tokenizer"):
        steered_tokens(None, [5], [7])


@pytest.mark.parametrize("prompt", [[], ["a", "b"], None, 3, torch.tensor([[5, 6], [7, 8]])], ids=repr)
def test_explore_asks_for_a_prompt_at_the_door(tiny, prompt):
    with pytest.raises((TypeError, ValueError), match="prompt"):
        explore(*tiny, prompt, multipliers=[1], max_new_tokens=1)


@pytest.mark.parametrize("name", ["operators", "start"])
@pytest.mark.parametrize("wrong", ["add", 3, [None], [("layer", 1)]], ids=repr)
def test_explore_asks_for_mappings(tiny, name, wrong):
    with pytest.raises(TypeError, match=f"{name} is a mapping"):
        explore(*tiny, "Hi", multipliers=[1], max_new_tokens=1, **{name: wrong})


@pytest.mark.parametrize("cut", [slice("a", None), slice(None, 1.0), slice(True, 2), slice(None, None, "x")], ids=repr)
def test_a_slice_of_layers_has_whole_numbers(tiny, cut):
    with pytest.raises(TypeError, match="A vector is indexed by layers"):
        tiny[2][cut]
    assert tiny[2][np.int64(1) : torch.tensor(2)] == tiny[2][1]


@pytest.mark.parametrize("wrong", [np.bool_(True), torch.tensor(True), torch.tensor(2j), np.complex128(2 + 1j), 2j])
def test_a_vector_is_scaled_by_real_numbers(tiny, wrong):
    for scale in (lambda v: v * wrong, lambda v: wrong * v):
        with pytest.raises(TypeError):
            scale(tiny[2])


def test_a_direction_without_numbers_is_shown_without_a_length(tiny):
    "Models on the meta device are steered with such directions, to try shapes."
    for v in (SteeringVector({1: torch.ones(4, device="meta")}), tiny[2].to("meta")):
        assert "norm nan" in repr(v) and "nan" in v._repr_markdown_()


def test_a_mask_holds_numbers():
    mask, ids = torch.ones(3, device="meta"), torch.ones(3, device="meta", dtype=torch.long)
    for make in (lambda: Tokens.prompt | mask, lambda: mask & Tokens.prompt, lambda: Tokens.columns[mask]):
        with pytest.raises(ValueError, match="meta device and holds no numbers"):
            make()
    with pytest.raises(TypeError, match="token ids"):
        Tokens.prompt - ids


@pytest.mark.parametrize("number", [3, np.int64(3), torch.tensor(3)])
def test_one_column_is_no_mask(number):
    for make in (lambda: Tokens.prompt | number, lambda: number & Tokens.prompt):
        with pytest.raises(TypeError, match="a list of column numbers"):
            make()


def test_found_layers_answer_as_a_dictionary(tiny):
    found = find_layers(tiny[0])
    assert found.get("mlp") == found["mlp"] and dict(found).keys() == set(found)
    for name in ("mpl", 1, None, True):
        assert found.get(name) is None and found.get(name, 3) == 3 and name not in found
    with pytest.raises(ValueError, match="Unknown layer_type 'mpl'"):
        found["mpl"]
