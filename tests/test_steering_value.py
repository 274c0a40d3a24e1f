"""How to steer as a value: the same to the bit as `apply`, through JSON and back, in every measure, alone and together."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import shown

from steering_vectors import (
    Steering,
    SteeringVector,
    Tokens,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    answer_gap,
    completion_gap,
    explore,
    multiplier_limit,
    next_token_shift,
    projections,
    prompt_ids,
    sweep,
    text_loss,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.evaluate.arguments import in_model

IDS = torch.tensor([[1, 5, 9, 33, 40, 41, 7, 8], [1, 6, 8, 30, 43, 44, 9, 10]])
PROMPT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
OPERATORS = [addition_operator(), ablation_operator(), ablation_operator(0.5), ablation_then_addition_operator()]
SELECTIONS = [
    None,
    Tokens.all,
    Tokens.prompt,
    Tokens.generated,
    Tokens.response,
    Tokens.prompt[-4:],
    Tokens.prompt[0],
    Tokens.generated[:8],
    Tokens.response[1:5:2],
    Tokens.columns[3:],
    Tokens.columns[1, 4],
    Tokens.prompt[-4:] | Tokens.generated[:8],
    (Tokens.prompt | Tokens.generated) - [13, 5],
    Tokens.all & Tokens.columns[2:6],
    Tokens.all - Tokens.prompt[:2],
    ~Tokens.prompt,
]
CONTRASTS = [("How are you?", "glad", "so sad"), ("And now?", "fine", "bad")]
QUESTIONS = [("A or B?", "A", "B"), ("B or A?", "B", "A")]
TEXTS = ["The sky is blue.", "Bread is baked."]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def made(request):
    generator = torch.Generator().manual_seed(2)
    vector = SteeringVector({n: 2 * torch.randn(32, generator=generator) for n in (0, 1, 2)})
    return tiny_model(request.param), tiny_tokenizer(), vector


@pytest.fixture(scope="module")
def tiny():
    generator = torch.Generator().manual_seed(3)
    vector = SteeringVector({n: 2 * torch.randn(32, generator=generator) for n in (1, 2)})
    return tiny_model(), tiny_tokenizer(), vector


def logits(model, *handles, ids=IDS):
    "What the model returns while all of these are attached."
    with ExitStack() as stack, torch.no_grad():
        for handle in handles:
            stack.enter_context(handle)
        return model(input_ids=ids).logits


# The value


@pytest.mark.parametrize("operator", OPERATORS, ids=shown)
@pytest.mark.parametrize("multiplier", [1.5, 0, [2, -1]], ids=shown)
@pytest.mark.parametrize("tokens", [None, Tokens.prompt[-4:], Tokens.columns[2:]], ids=shown)
def test_a_steering_is_apply_to_the_bit(made, operator, multiplier, tokens):
    model, _, vector = made
    how = {"operator": operator, "multiplier": multiplier, "tokens": tokens}
    ours = logits(model, vector.steering(**how).apply(model, prompt=PROMPT))
    assert torch.equal(ours, logits(model, vector.apply(model, **how, prompt=PROMPT)))
    assert multiplier == 0 or not torch.equal(ours, logits(model))


def test_plain_directions_steer_as_their_vector_does(made):
    model, _, vector = made
    plain = Steering(dict(vector.layer_activations), multiplier=2)
    assert torch.equal(logits(model, plain.apply(model)), logits(model, vector.apply(model, multiplier=2)))


@pytest.mark.parametrize("one, other", [(2, 1.5), (2, [1.5, -1]), ([1.5, -1], 2)], ids=shown)
def test_multipliers_are_multiplied(tiny, one, other):
    model, _, vector = tiny
    ours = logits(model, vector.steering(multiplier=one).times(other).apply(model))
    product = torch.tensor(one) * torch.tensor(other)
    assert torch.equal(ours, logits(model, vector.apply(model, multiplier=product.tolist())))


def test_two_multipliers_per_row_are_refused(tiny):
    with pytest.raises(ValueError, match="Both multipliers are given by row"):
        tiny[2].steering(multiplier=[1, 2]).times([1, 2])


def test_a_steering_stays_as_it_was(tiny):
    model, _, vector = tiny
    steering = vector.steering(multiplier=2)
    steering.times(3), steering.apply(model)
    assert steering.multiplier == 2
    with pytest.raises(AttributeError):
        steering.multiplier = 3


@pytest.mark.parametrize(
    "how, written",
    [
        ({}, "v[1:3].steering()"),
        ({"multiplier": 2}, "v[1:3].steering(multiplier=2)"),
        ({"multiplier": [1, -2]}, "v[1:3].steering(multiplier=[1.0, -2.0])"),
        ({"operator": ablation_operator(0.5)}, "v[1:3].steering(operator=ablation_operator(fraction=0.5))"),
        ({"tokens": Tokens.prompt[-4:]}, "v[1:3].steering(tokens=Tokens.prompt[-4:])"),
    ],
    ids=shown,
)
def test_a_steering_prints_as_the_line_that_makes_it(tiny, how, written):
    steering = tiny[2].steering(**how)
    assert repr(steering) == written
    v = tiny[2]
    again = eval(written, {"v": v, "Tokens": Tokens, "ablation_operator": ablation_operator})
    assert repr(again) == written and "layers" in steering._repr_html_()


def test_the_layers_are_printed_as_the_index_that_chooses_them(tiny):
    vector = tiny[2]
    assert repr(vector[2].at([0, 2, 5]).steering()) == "v[[0, 2, 5]].steering()"
    assert repr(vector[2].steering()) == "v[2].steering()"


# JSON


@pytest.mark.parametrize("operator", OPERATORS, ids=shown)
@pytest.mark.parametrize("tokens", SELECTIONS, ids=shown)
def test_every_steering_comes_back_from_json(tiny, operator, tokens):
    v = tiny[2]
    steering = v.steering(operator=operator, multiplier=-1.5, tokens=tokens)
    again = Steering.from_json(steering.to_json("joy"), {"joy": v})
    assert repr(again) == repr(steering) and again.operator == operator and again.vector == v
    assert again.to_json("joy") == steering.to_json("joy")


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
slices = st.builds(slice, st.none() | st.integers(0, 40), st.none() | st.integers(0, 40), st.none() | st.integers(1, 5))
parts = st.sampled_from([Tokens.prompt, Tokens.generated, Tokens.response]).flatmap(
    lambda part: slices.map(lambda index: part[index])
)
leaves = parts | slices.map(lambda index: Tokens.columns[index]) | st.sampled_from([s for s in SELECTIONS if s])
expressions = st.recursive(
    leaves,
    lambda inner: (
        st.builds(lambda a, b: a | b, inner, inner)
        | st.builds(lambda a, b: a & b, inner, inner)
        | st.builds(lambda a, b: a - b, inner, inner)
        | st.builds(lambda a, ids: a - ids, inner, st.lists(st.integers(2, 90), min_size=1, max_size=4))
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(tokens=st.none() | expressions, multiplier=numbers | st.lists(numbers, min_size=1, max_size=4))
def test_any_expression_and_any_multiplier_come_back_from_json(tokens, multiplier):
    v = SteeringVector({1: torch.ones(4), 2: torch.ones(4)})
    steering = v.steering(multiplier=multiplier, tokens=tokens)
    again = Steering.from_json(json.loads(steering.to_json("joy")), {"joy": v})
    assert again.tokens == steering.tokens and repr(again) == repr(steering)
    ours, theirs = torch.as_tensor(again.strength), torch.as_tensor(steering.strength)
    assert torch.equal(ours, theirs)


def test_the_layers_of_a_steering_are_chosen_from_the_named_vector(tiny):
    v = tiny[2]
    again = Steering.from_json(v[2].steering(multiplier=2).to_json("joy"), {"joy": v})
    assert list(again.layer_activations) == [2] and again.vector == v[2]
    plain = Steering.from_json('{"vector": "joy", "layers": [1]}', {"joy": dict(v.layer_activations)})
    assert list(plain.layer_activations) == [1]


HOSTILE = [
    "[]",
    '"joy"',
    "{}",
    "not json",
    '{"vector": "gloom"}',
    '{"vector": 3}',
    '{"vector": "joy", "gate": true}',
    '{"vector": "joy", "layers": [7]}',
    '{"vector": "joy", "layers": "all"}',
    '{"vector": "joy", "layers": [1.5]}',
    '{"vector": "joy", "layers": [true]}',
    '{"vector": "joy", "multiplier": "2"}',
    '{"vector": "joy", "multiplier": true}',
    '{"vector": "joy", "multiplier": NaN}',
    '{"vector": "joy", "multiplier": Infinity}',
    '{"vector": "joy", "multiplier": [1, null]}',
    '{"vector": "joy", "multiplier": []}',
    '{"vector": "joy", "operator": "os.system"}',
    '{"vector": "joy", "operator": {"ablation": "half"}}',
    '{"vector": "joy", "operator": {"ablation": 0.5, "addition": 1}}',
    '{"vector": "joy", "tokens": "Tokens.__class__"}',
    '{"vector": "joy", "tokens": "__import__(\'os\').getcwd()"}',
    '{"vector": "joy", "tokens": "Tokens.prompt[__import__(\'os\').getcwd()]"}',
    '{"vector": "joy", "tokens": "[Tokens.prompt for _ in range(9)]"}',
    '{"vector": "joy", "tokens": "Tokens.prompt ** 9"}',
    '{"vector": "joy", "tokens": "Tokens.prompt and Tokens.generated"}',
    '{"vector": "joy", "tokens": "Tokens.nothing"}',
    '{"vector": "joy", "tokens": "Tokens.generated[-1]"}',
    '{"vector": "joy", "tokens": 3}',
    '{"vector": "joy", "tokens": "Tokens.prompt["}',
    json.dumps({"vector": "joy", "tokens": "~" * 1999 + "Tokens.prompt"}),
    json.dumps({"vector": "joy", "tokens": "(" * 900 + "Tokens.prompt" + ")" * 900}),
    json.dumps({"vector": "joy", "tokens": "Tokens.prompt | " * 500 + "Tokens.prompt"}),
]


@pytest.mark.parametrize("written", HOSTILE, ids=lambda w: w[:60])
def test_what_is_no_steering_is_refused(tiny, written):
    with pytest.raises((ValueError, TypeError)):
        Steering.from_json(written, {"joy": tiny[2]})


def test_what_belongs_to_one_batch_or_model_is_not_written(tiny):
    v = tiny[2]
    with pytest.raises(ValueError, match="layer_config belongs to one model"):
        v.steering(layer_config={"decoder_block": "model.layers.{num}"}).to_json("joy")
    with pytest.raises(ValueError, match="A mask of tokens"):
        v.steering(tokens=torch.ones(8, dtype=torch.bool)).to_json("joy")
    with pytest.raises(ValueError, match="your own operator"):
        v.steering(operator=lambda h, v: v).to_json("joy")


# Measures


MEASURES = {
    "completion_gap": lambda m, t, s, numbers: completion_gap(m, t, s, CONTRASTS, numbers).values,
    "answer_gap": lambda m, t, s, numbers: answer_gap(m, t, s, QUESTIONS, numbers).values,
    "text_loss": lambda m, t, s, numbers: text_loss(m, t, s, TEXTS, numbers).values,
    "next_token_shift": lambda m, t, s, numbers: torch.tensor(
        [next_token_shift(m, t, s, "Hi", x, 100).change for x in numbers]
    ),
    "sweep": lambda m, t, s, numbers: [
        sweep(m, t, s, "Hi", numbers, "all", 4).token_ids["all", float(x)] for x in numbers
    ],
}
HOWS = [
    {},
    {"operator": ablation_operator(0.5)},
    {"operator": ablation_then_addition_operator(), "tokens": Tokens.response},
    {"tokens": Tokens.prompt[-2:]},
    {"operator": lambda activation, vector: -0.3 * activation + vector},
]


def same(ours, theirs):
    return ours == theirs if isinstance(ours, list) else torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("how", HOWS, ids=shown)
def test_a_steering_at_two_is_measured_at_twice_the_multiplier(tiny, name, how):
    model, tokenizer, v = tiny
    doubled = MEASURES[name](model, tokenizer, v.steering(multiplier=2, **how), [-1, 1])
    assert same(doubled, MEASURES[name](model, tokenizer, v.steering(**how), [-2, 2]))


@pytest.mark.parametrize("how", HOWS, ids=shown)
def test_a_loss_is_that_of_the_model_in_the_same_context(tiny, how):
    model, tokenizer, v = tiny
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    prompt = inputs["input_ids"][:, :1]  # a text's first token is its prompt
    if "tokens" in how:  # one pass over the text: the tokens as columns
        length = inputs["input_ids"].shape[1]
        columns = [0] if how["tokens"].within_prompt else list(range(length))
        by_hand = v.apply(model, **{**how, "tokens": columns}, multiplier=1.5)
    else:
        by_hand = v.apply(model, **how, multiplier=1.5, prompt=prompt)
    with by_hand, torch.no_grad():
        expected = float(model(**inputs, labels=inputs["input_ids"]).loss)
    assert math.isclose(text_loss(model, tokenizer, v.steering(**how), TEXTS[:1], 1.5)[1.5], expected, rel_tol=1e-4)


@pytest.mark.parametrize("how", HOWS, ids=shown)
def test_the_next_token_is_that_of_a_pass_in_the_same_context(tiny, how):
    model, tokenizer, v = tiny
    ids = prompt_ids(tokenizer, "Hi")
    after = logits(model, v.apply(model, **how, multiplier=1.5, prompt=ids), ids=ids)[0, -1].softmax(-1)
    shift = next_token_shift(model, tokenizer, v.steering(**how), "Hi", 1.5, 5)
    chosen = [tokenizer.convert_tokens_to_ids(token) for token in shift.tokens]
    assert torch.allclose(torch.tensor(shift.after), after[chosen], atol=1e-6)


@pytest.mark.parametrize("how", HOWS, ids=shown)
def test_a_sweep_is_generation_in_the_same_context(tiny, how):
    model, tokenizer, v = tiny
    ids = prompt_ids(tokenizer, "Hi")
    with v.apply(model, **how, multiplier=3, prompt=ids):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert sweep(model, tokenizer, v.steering(**how), "Hi", 3, "all", 6)["all", 3] == written


def several(v):
    "Three steerings that differ in everything."
    torch.manual_seed(4)
    other = SteeringVector({1: torch.randn(32)})
    return [
        v[2].steering(multiplier=2, tokens=Tokens.response),
        other,
        v[1].steering(operator=ablation_operator(0.5), tokens=Tokens.prompt),
    ]


def test_several_steerings_are_nested_contexts(tiny):
    model, tokenizer, v = tiny
    parts, ids = several(v), prompt_ids(tokenizer, "Hi")
    handles = [in_model(model, part).steerings[0].times(1.5).apply(model, ids) for part in parts]
    after = logits(model, *handles, ids=ids)[0, -1].softmax(-1)
    shift = next_token_shift(model, tokenizer, parts, "Hi", 1.5, 5)
    chosen = [tokenizer.convert_tokens_to_ids(token) for token in shift.tokens]
    assert torch.equal(torch.tensor(shift.after), after[chosen])
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert sweep(model, tokenizer, parts, "Hi", 1.5, max_new_tokens=6)["all", 1.5] == written


@pytest.mark.parametrize("name", MEASURES)
def test_a_list_of_one_is_the_one(tiny, name):
    model, tokenizer, v = tiny
    one = v.steering(multiplier=2, tokens=Tokens.response)
    ours = MEASURES[name](model, tokenizer, [one], [1])
    assert same(ours, MEASURES[name](model, tokenizer, one, [1]))


@pytest.mark.parametrize("name", MEASURES)
def test_one_multiplier_per_row_is_refused(tiny, name):
    model, tokenizer, v = tiny
    for wrong in (v.steering(multiplier=[1, 2]), [v, v.steering(multiplier=[1, 2])]):
        with pytest.raises(ValueError, match="a multiplier for each row"):
            MEASURES[name](model, tokenizer, wrong, [1])


def test_the_limit_of_several_is_lower(tiny):
    v = tiny[2]
    known = replace(v, provenance=replace(v.provenance, activation_norms={1: 10.0, 2: 10.0}, num_layers=3))
    one = multiplier_limit(known)
    assert math.isclose(multiplier_limit(known.steering(multiplier=-2)), one / 2)
    assert math.isclose(multiplier_limit([known, known.steering(multiplier=3)]), one / 4)
    assert multiplier_limit([known, v]) == 3  # one of them does not know its activations


def test_projections_take_the_vector_of_a_steering(tiny):
    model, tokenizer, v = tiny
    plain = projections(model, tokenizer, v, TEXTS).mean
    steering = v.steering(multiplier=5, tokens=Tokens.prompt, operator=ablation_operator())
    assert torch.equal(projections(model, tokenizer, steering, TEXTS).mean, plain)
    mapped = v.steering(layer_config={"decoder_block": "model.layers.{num}"})
    assert torch.equal(projections(model, tokenizer, mapped, TEXTS).mean, plain)
    with pytest.raises(TypeError, match="takes one vector"):
        projections(model, tokenizer, [v, v], TEXTS)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_finds_layers_where_the_steering_says(tiny, name):
    model, tokenizer, v = tiny
    mlp = SteeringVector(v.layer_activations, "mlp")
    mapped = mlp.steering(layer_config={"mlp": "model.layers.{num}.mlp"})
    assert same(MEASURES[name](model, tokenizer, mapped, [2]), MEASURES[name](model, tokenizer, mlp, [2]))


# The control


def halve(activation, vector):
    return -activation / 2


def explored(tiny, steering, **how):
    model, tokenizer, _ = tiny
    return explore(model, tokenizer, steering, "Hi", multipliers=[-1, 1], max_new_tokens=4, **how)


@pytest.mark.parametrize(
    "operator, name",
    [
        *zip(OPERATORS, ["add", "ablate", "ablation_operator(fraction=0.5)", "ablate, then add"], strict=True),
        (halve, "halve"),
    ],
    ids=shown,
)
def test_the_dials_begin_with_the_steerings_own(tiny, operator, name):
    model, tokenizer, v = tiny
    steering = v[2].steering(operator=operator, tokens=Tokens.response)
    control = explored(tiny, steering)
    assert control.operator == name and control.tokens == Tokens.response
    assert list(control.pickers["operator"].options)[0][1] == name
    written = sweep(model, tokenizer, steering, "Hi", control.multiplier, max_new_tokens=4)
    assert control.output.text == written[2, control.multiplier]
    control.operator, control.tokens = "add", Tokens.all
    plain = sweep(model, tokenizer, v[2], "Hi", control.multiplier, max_new_tokens=4)
    assert control.output.text == plain[2, control.multiplier]


def test_an_operator_of_ones_own_is_chosen_by_name(tiny):
    model, tokenizer, v = tiny
    control = explored(tiny, v[2], operators={"mine": halve, "plain": None})
    assert control.operator == "mine"
    own = sweep(model, tokenizer, v[2].steering(operator=halve), "Hi", control.multiplier, max_new_tokens=4)
    assert control.output.text == own[2, control.multiplier]
    control.operator = "plain"
    assert "steer-error" not in control.html


def test_several_steerings_are_explored_together(tiny):
    model, tokenizer, v = tiny
    pair = [v[2].steering(multiplier=2), SteeringVector({1: torch.ones(32)})]
    control = explored(tiny, pair)
    assert control.layer == "all" and [x for _, x in control.pickers["layer"].options] == [1, 2, "all"]
    written = sweep(model, tokenizer, pair, "Hi", control.multiplier, max_new_tokens=4)
    assert control.output.text == written["all", control.multiplier]
    control.layer = 1  # only the second has it
    alone = sweep(model, tokenizer, pair[1], "Hi", control.multiplier, max_new_tokens=4)
    assert control.output.text == alone[1, control.multiplier]


def test_several_steerings_share_their_dials(tiny):
    v = tiny[2]
    with pytest.raises(ValueError, match="different operators"):
        explored(tiny, [v, v.steering(operator=halve)])
    with pytest.raises(ValueError, match="different tokens"):
        explored(tiny, [v, v.steering(tokens=Tokens.prompt)])
    with pytest.raises(ValueError, match="a multiplier for each row"):
        explored(tiny, v.steering(multiplier=[1, 2]))
