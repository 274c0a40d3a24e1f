"""Effects against computations of their own, over families; and what measuring must leave as it was."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import shown

from steering_vectors import (
    Effect,
    Projections,
    ProjectionSet,
    Similarity,
    SteeringVector,
    Tokens,
    TokenShift,
    TokenValues,
    ablation_operator,
    answer_gap,
    completion_gap,
    multiplier_limit,
    next_token_shift,
    projections,
    similarity,
    steered_tokens,
    sweep,
    text_loss,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train.prompts import continuation_ids, prompt_ids

KINDS = ["llama", "gpt2", "gemma2", "opt", "gpt_neox"]


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    model, tokenizer = tiny_model(request.param), tiny_tokenizer()
    generator = torch.Generator().manual_seed(1)
    return model, tokenizer, SteeringVector({n: 2 * torch.randn(32, generator=generator) for n in (0, 1, 2)})


def blocks(model):
    "The list of decoder blocks, found here without the library."
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    return lists[0]


class Added:
    "A plain forward hook that adds to one block."

    def __init__(self, model, layer, delta):
        def hook(module, args, out):
            return (out[0] + delta, *out[1:]) if isinstance(out, tuple) else out + delta

        self.handle = blocks(model)[layer].register_forward_hook(hook)

    def __enter__(self): ...

    def __exit__(self, *error):
        self.handle.remove()


def greedy(model, ids, n):
    "Generation without a cache and without `generate`."
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("multiplier", [-1.5, 0, 2])
def test_a_sweep_is_greedy_generation_with_a_hook(made, multiplier):
    model, tokenizer, v = made
    s = sweep(model, tokenizer, v, "How are you?", layers=[1], multipliers=[-1.5, 0, 2], max_new_tokens=6)
    ids = prompt_ids(tokenizer, "How are you?")
    with Added(model, 1, multiplier * v.layer_activations[1]):
        alone = greedy(model, ids, 6)[0, ids.shape[1] :].tolist()
    got = list(s.token_ids[1, multiplier])
    assert got == alone[: len(got)] and (len(got) == 6 or alone[len(got)] == tokenizer.eos_token_id)
    if multiplier:
        assert s[1, multiplier] != s[1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", ["Hi", "a long prompt " * 60])
def test_what_a_sweep_finds_does_not_depend_on_what_else_was_asked_for(tiny, prompt, temperature):
    how = {"max_new_tokens": 4, "temperature": temperature, "seed": 3}
    layers, multipliers = [1, 2, (1, 2), "all"], [-9, -6, -3, -1, 0, 1, 3, 6, 9]
    every = sweep(*tiny, prompt, multipliers, layers, **how)
    assert list(every) == [(layer, m) for layer in layers for m in multipliers]
    for layer in layers:
        alone = sweep(*tiny, prompt, multipliers, [layer], **how)
        assert {key: every.token_ids[key] for key in alone} == alone.token_ids
    assert len(set(every.token_ids.values())) > 9


def test_completions_are_scored_one_at_a_time_alike(made):
    model, tokenizer, v = made
    contrasts = [("Hi", "good day", "bad"), ("How are you today?", "fine", "not so well"), ("Well?", "x", "y")]
    effect = completion_gap(model, tokenizer, v[1], contrasts, multipliers=[-1, 0, 2], batch_size=4)

    def score(prompt, text, m):
        start = prompt_ids(tokenizer, prompt)[0]
        ids = torch.cat([start, torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])])[None]
        with Added(model, 1, m * v.layer_activations[1]), torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return float(logp[len(start) - 1 :].mean())

    for i, (prompt, a, b) in enumerate(contrasts):
        for j, m in enumerate((-1, 0, 2)):
            expected = score(prompt, a, m) - score(prompt, b, m)
            assert float(effect.values[i, j]) == pytest.approx(expected, abs=2e-4)


def sentencepiece_like():
    "A tokenizer that writes the beginning of every text as if a space stood before it, as Llama's does."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "A", "B", "▁A", "▁B", "(", "▁("])}
    merges = [("▁", "A"), ("▁", "B"), ("▁", "(")]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>")


@pytest.mark.parametrize(
    "prompt, chat, completion, pieces",
    [
        ("(", False, "A", ["A"]),  # by itself it would be ▁A
        ("(", False, " A", ["▁A"]),
        ([{"role": "user", "content": "A"}], False, "B", ["B"]),  # messages: the template's text goes on
        ("A", True, "B", ["B"]),
        ([7], False, "A", ["A"]),  # ids: the completion is tokenized after what they write
    ],
)
def test_a_completion_is_what_it_adds_to_the_prompts_tokens(prompt, chat, completion, pieces):
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}({% endfor %}"
    asked, written = continuation_ids(tokenizer, prompt, completion, chat)
    assert tokenizer.convert_ids_to_tokens(written) == pieces
    assert asked == prompt_ids(tokenizer, prompt, chat)[0].tolist()


@pytest.mark.parametrize("chat", [False, True])
def test_a_completion_that_merges_with_the_prompt_is_refused(chat):
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="merges with the end of the prompt"):
        completion_gap(None, tokenizer, None, [("A ", "B", "A")], chat=chat)
    with pytest.raises(ValueError, match="merges with the end of the prompt"):
        answer_gap(tiny_model(), tokenizer, None, [("A ", "B", "A")], chat=chat)


@pytest.mark.parametrize(
    "prompt, words",
    [
        (torch.ones(2, 3, dtype=torch.long), r"shape \(2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.tensor([1.0, 2.0]), "float32"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        ({"input_ids": [1, 2]}, "its input_ids"),
        (["Hi", "there"], "not a list"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, words):
    with pytest.raises((TypeError, ValueError), match=words):
        prompt_ids(tiny_tokenizer(), prompt)


def test_ids_may_come_as_a_list(made):
    model, tokenizer, v = made
    ids = prompt_ids(tokenizer, "Hi")
    by_list = sweep(model, tokenizer, v, ids[0].tolist(), layers=[1], multipliers=[0, 1], max_new_tokens=3)
    by_tensor = sweep(model, tokenizer, v, ids, layers=[1], multipliers=[0, 1], max_new_tokens=3)
    assert by_list == by_tensor and by_list.prompt == tokenizer.decode(ids[0])


@pytest.mark.parametrize("multipliers", [(1.0,), (1.0, 1.0)])
def test_one_multiplier_has_an_average_and_no_slope(multipliers):
    effect = Effect("logit gap", "logits", multipliers, torch.ones(1, len(multipliers)))
    assert "nan" not in repr(effect) and "slope" not in effect._repr_html_()
    for asked in ("slope", "slopes", "wrong_way"):
        with pytest.raises(ValueError, match="two different multipliers"):
            getattr(effect, asked)


def test_steering_only_the_response_changes_nothing_before_it(made):
    model, tokenizer, v = made
    contrasts = [("Hi", "good day", "bad"), ("How are you today?", "fine", "not so well")]
    some = completion_gap(model, tokenizer, v[2].steering(tokens=Tokens.response), contrasts, multipliers=[0, 2])
    every = completion_gap(model, tokenizer, v[2], contrasts, [0, 2])
    # at the last block earlier tokens have no way to be felt later: steering them or not is the same
    assert torch.allclose(some.values, every.values, atol=2e-4)
    early = completion_gap(model, tokenizer, v[0].steering(tokens=Tokens.response), contrasts, multipliers=[0, 2])
    assert not torch.allclose(early.values, completion_gap(model, tokenizer, v[0], contrasts, [0, 2]).values, atol=1e-3)


def test_answer_gaps_are_differences_of_logits(made):
    model, tokenizer, v = made
    effect = answer_gap(model, tokenizer, v[0], [("A or B?", "A", "B")], multipliers=[0, 1])
    a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
    with Added(model, 0, v.layer_activations[0]), torch.no_grad():
        logits = model(input_ids=prompt_ids(tokenizer, "A or B?")).logits[0, -1]
    assert float(effect.values[0, 1]) == pytest.approx(float(logits[a] - logits[b]), abs=1e-3)


def test_text_loss_is_the_models_own_loss(made):
    model, tokenizer, v = made
    texts = ["The sky is blue.", "Bread."]
    effect = text_loss(model, tokenizer, v[1], texts, multipliers=[0, 1])
    for i, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with Added(model, 1, v.layer_activations[1]), torch.no_grad():
            assert float(effect.values[i, 1]) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=2e-4)


def test_projections_see_what_steering_made(made):
    model, tokenizer, v = made
    plain = projections(model, tokenizer, v, "Hello there")
    with v[1].apply(model, operator=ablation_operator()):
        ablated = projections(model, tokenizer, v, "Hello there")
    assert float(ablated.values[1].abs().max()) < 1e-4 < float(plain.values[1].abs().max())
    assert torch.equal(ablated.values[0], plain.values[0])


def test_the_first_word_is_steered_by_the_last_token_of_the_prompt(made):
    model, tokenizer, v = made
    every = next_token_shift(model, tokenizer, v[0], "Hi", multiplier=3, k=100)
    later = next_token_shift(model, tokenizer, v[0].steering(tokens=Tokens.generated), "Hi", multiplier=3, k=100)
    response = next_token_shift(model, tokenizer, v[0].steering(tokens=Tokens.response), "Hi", multiplier=3, k=100)
    assert max(map(abs, later.change)) == 0
    assert max(map(abs, response.change)) > 0 and max(map(abs, every.change)) > 0


@pytest.mark.parametrize(
    "choice, columns",
    [
        ({}, range(0, 7)),
        ({"min_token_index": 4}, range(4, 7)),
        ({"tokens": Tokens.response}, range(4, 7)),
        ({"tokens": Tokens.generated}, range(5, 7)),
        ({"tokens": Tokens.prompt[-2:] | Tokens.generated[:1]}, range(3, 6)),
        ({"tokens": [1, 6]}, (1, 6)),
        ({"tokens": slice(2, 4)}, range(2, 4)),
    ],
)
def test_steered_tokens_are_the_columns_that_were_named(choice, columns):
    marked = steered_tokens(tiny_tokenizer(), [1, 10, 11, 12, 13], [20, 21, 22], **choice)
    assert [i for i, x in enumerate(marked.values) if x] == list(columns)


def test_measuring_leaves_everything_as_it_was(made):
    model, tokenizer, v = made
    model.train()
    blocks(model)[1].eval()
    modes = [m.training for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    state, template, side = torch.get_rng_state(), tokenizer.chat_template, tokenizer.padding_side
    sweep(model, tokenizer, v, "Hi", layers=["all"], multipliers=[0, 1], max_new_tokens=2, temperature=1.0)
    completion_gap(model, tokenizer, v, [("Hi", "a", "b")], [1])
    with pytest.raises(ValueError):
        sweep(model, tokenizer, v, "Hi", layers=[9])
    assert [m.training for m in model.modules()] == modes
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert (tokenizer.chat_template, tokenizer.padding_side) == (template, side)
    model.eval()


# --- what a measure is given is checked at its door -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    generator = torch.Generator().manual_seed(3)
    vector = SteeringVector({n: 2 * torch.randn(32, generator=generator) for n in (1, 2)})
    return tiny_model(), tiny_tokenizer(), vector


MEASURES = {
    "completion_gap": lambda m, t, v, **how: completion_gap(m, t, v, [("Hi", "a", "b"), ("Hello", "cd", "e")], **how),
    "answer_gap": lambda m, t, v, **how: answer_gap(m, t, v, [("Hi", "a", "b"), ("Hello", "c", "d")], **how),
    "text_loss": lambda m, t, v, **how: text_loss(m, t, v, ["The sky", "Bread and butter"], **how),
    "sweep": lambda m, t, v, **how: sweep(m, t, v, "Hi", max_new_tokens=2, **how),
}


@pytest.mark.parametrize("measure", [completion_gap, answer_gap])
@pytest.mark.parametrize(
    "contrasts",
    [
        [("How?", "glad"), ("And?", "bad")],  # one completion each
        [("How?", "glad", "sad", "mad")],
        ("How?", "glad", "sad"),  # without a list
        ["How?", "glad", "sad"],
        "How?",
        [("How?", "glad", "sad"), "abc"],  # three letters are no contrast
        [("How?", 1, 2)],
        [("How?", ["g"], ["s"])],
        [([{"role": "user", "content": "Hi"}], "a")],
        ([{"role": "user", "content": "Hi"}], "a", "b"),
        {"How?": ("glad", "sad")},
        None,
        [],
    ],
    ids=shown,
)
def test_what_is_no_list_of_contrasts_is_refused(tiny, measure, contrasts):
    with pytest.raises(ValueError, match="what matches, what does not"):
        measure(*tiny, contrasts)


@pytest.mark.parametrize(
    "texts",
    ["The sky", b"The sky", [{"role": "user", "content": "Hi"}], torch.tensor([1, 5, 6]), [], None, 3],
    ids=shown,
)
def test_one_text_without_a_list_is_refused(tiny, texts):
    with pytest.raises((TypeError, ValueError), match="texts come in a list|give at least one"):
        text_loss(*tiny, texts)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    "multipliers, words",
    [
        ("2", "not '2'"),
        ([1, "2"], "not '2'"),
        (True, "not True"),
        ([False, 1], "not False"),
        (np.array([True]), "Multipliers are numbers"),
        ([], "No multipliers"),
        (torch.ones(0), "No multipliers"),
        ([1, 1.0], "there 2 times"),
        ([0, math.nan], "finite"),
        (math.inf, "finite"),
        (torch.ones(2, 2), "Multipliers are numbers"),
        ([None], "Multipliers are numbers"),
        ({1: 2}, "Multipliers are numbers"),
    ],
    ids=shown,
)
def test_multipliers_that_are_none_are_refused(tiny, name, multipliers, words):
    with pytest.raises((TypeError, ValueError), match=words):
        MEASURES[name](*tiny, multipliers=multipliers)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    "several",
    [torch.linspace(-2, 2, 3), np.array([-2.0, 0, 2]), range(-2, 3, 2), (-2, 0, 2), lambda: iter([-2, 0, 2])],
    ids=shown,
)
def test_multipliers_may_come_as_anything_that_holds_numbers(tiny, name, several):
    several = several() if callable(several) else several
    plain, other = (MEASURES[name](*tiny, multipliers=m) for m in ([-2, 0, 2], several))
    assert plain.multipliers == other.multipliers and all(type(m) is float for m in other.multipliers)
    key = (1, 2.0) if name == "sweep" else 2.0
    assert plain[key] == other[key]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("one", [2, 2.0, torch.tensor(2.0), np.float32(2), np.int64(2)], ids=shown)
def test_one_multiplier_needs_no_list(tiny, name, one):
    assert MEASURES[name](*tiny, multipliers=one).multipliers == (2.0,)


def test_a_multiplier_is_looked_up_as_one_would_type_it(tiny):
    s = sweep(*tiny, "Hi", layers=1, multipliers=torch.tensor([-0.3, 0, 0.3]), max_new_tokens=2)
    assert s[1, 0.3] == s[1, np.float32(0.3)] == s[1, torch.tensor(0.3)] and (1, 0.31) not in s
    effect = answer_gap(*tiny, [("Hi", "a", "b")], multipliers=np.linspace(-0.3, 0.3, 7, dtype=np.float32))
    assert 0.1 in effect and 0 in effect and -0.2 in effect and 0.15 not in effect


@pytest.mark.parametrize(
    "layers", ["frist", ["frist"], [True], True, 1.5, [1.5], [(1, "a")], [()], {1: 2}, b"all", [[[1]]]], ids=shown
)
def test_layers_that_are_none_are_refused(tiny, layers):
    with pytest.raises(TypeError, match="A layer is a number"):
        sweep(*tiny, "Hi", layers=layers, multipliers=[1], max_new_tokens=2)
    if not isinstance(layers, list):
        with pytest.raises(TypeError, match="A layer is a number"):
            multiplier_limit(tiny[2], layers)


@pytest.mark.parametrize(
    "layers, words",
    [([], "No layers"), ([2, -1], "Name each layer once"), ([1, 1], "once"), (0, "no layer 0"), ([-3], "no layer 0")],
)
def test_layers_that_are_not_there_are_refused(tiny, layers, words):
    with pytest.raises(ValueError, match=words):
        sweep(*tiny, "Hi", layers=layers, multipliers=[1], max_new_tokens=2)


@pytest.mark.parametrize(
    "layers, keys",
    [
        ("all", ["all"]),
        (2, [2]),
        (-1, [2]),
        (np.int64(1), [1]),
        ([torch.tensor(1), "all"], [1, "all"]),
        ([(1, 2), [-1, 1]], [(1, 2), (2, 1)]),
        (range(1, 3), [1, 2]),
        (np.array([-2, -1]), [1, 2]),
        (None, [1, 2]),
    ],
    ids=shown,
)
def test_layers_are_what_one_would_type(tiny, layers, keys):
    s = sweep(*tiny, "Hi", layers=layers, multipliers=2, max_new_tokens=3)
    assert list(s.layers) == keys and list(s) == [(key, 2.0) for key in keys]
    for key in keys:
        chosen = tiny[2] if key == "all" else tiny[2][key]
        assert (
            s[key, 2] == sweep(tiny[0], tiny[1], chosen, "Hi", layers="all", multipliers=2, max_new_tokens=3)["all", 2]
        )


@pytest.mark.parametrize(
    "how", [{"batch_size": 0}, {"batch_size": -1}, {"batch_size": 2.5}, {"batch_size": True}], ids=shown
)
def test_a_batch_has_a_size(tiny, how):
    for name in ("completion_gap", "text_loss"):
        with pytest.raises((TypeError, ValueError), match="batch_size must be"):
            MEASURES[name](*tiny, **how)
    with pytest.raises((TypeError, ValueError), match="batch_size must be"):
        projections(*tiny, ["Hi"], **how)
    with pytest.raises((TypeError, ValueError), match="must be"):
        sweep(*tiny, "Hi", max_new_tokens=how["batch_size"])
    with pytest.raises((TypeError, ValueError), match="k must be"):
        next_token_shift(*tiny, "Hi", k=how["batch_size"])


@pytest.mark.parametrize("temperature", [-1, math.nan, math.inf, "1", None, True, [1.0]], ids=shown)
def test_a_temperature_is_a_number_from_0_on(tiny, temperature):
    with pytest.raises((TypeError, ValueError), match="A temperature is a number from 0 on"):
        sweep(*tiny, "Hi", 0, 1, 2, temperature=temperature)


@pytest.mark.parametrize("name", MEASURES)
def test_a_vector_is_a_vector(tiny, name):
    with pytest.raises(TypeError, match="takes a SteeringVector, not a dict"):
        MEASURES[name](tiny[0], tiny[1], tiny[2].layer_activations)


# --- negative layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(-2, -1), (1, -1), (-2, 2)], ids=shown)
def test_a_vector_may_count_from_the_end(tiny, numbers):
    model, tokenizer, v = tiny
    behind = SteeringVector(dict(zip(numbers, v.layer_activations.values(), strict=True)))
    for name, measure in MEASURES.items():
        a, b = (measure(model, tokenizer, vector, multipliers=[0, 2]) for vector in (v, behind))
        assert a == b if name == "sweep" else torch.equal(a.values, b.values)
    a, b = (projections(model, tokenizer, vector, "Hi") for vector in (v, behind))
    assert a.layers == b.layers == (1, 2) and torch.equal(a.values, b.values)
    assert b[-1] == b[2] and -1 in b and -3 not in b and True not in b
    s = sweep(model, tokenizer, behind, "Hi", layers=[-2, 2], multipliers=1, max_new_tokens=2)
    assert s[-2, 1] == s[1, 1] and (-1, 1) in s and (0, 1) not in s and (-4, 1) not in s


def test_one_direction_at_layers_counted_from_both_ends(tiny):
    model, tokenizer, v = tiny
    p = projections(model, tokenizer, v[1].at([-1, 0]), "Hi")
    assert p.layers == (0, 2) and torch.equal(p.values, projections(model, tokenizer, v[1].at([0, 2]), "Hi").values)
    with pytest.raises(ValueError, match="2 and -1 are the same layer of 3"):
        projections(model, tokenizer, v[1].at([-1, 2]), "Hi")


def test_a_layer_that_does_not_exist_is_named_as_it_was_given(tiny):
    model, tokenizer, v = tiny
    with pytest.raises(ValueError, match="Layer -9 does not exist"):
        projections(model, tokenizer, SteeringVector({-9: torch.ones(32)}), "Hi")
    with pytest.raises(ValueError, match="no layer -9"):
        sweep(model, tokenizer, v, "Hi", layers=-9, multipliers=1, max_new_tokens=2)
    with pytest.raises(ValueError, match="Layer 7 does not exist"):
        completion_gap(model, tokenizer, SteeringVector({7: torch.ones(32)}), [("Hi", "a", "b")])
    assert sweep(
        model,
        tokenizer,
        SteeringVector({**v.layer_activations, 7: torch.ones(32)}),
        "Hi",
        layers=1,
        multipliers=1,
        max_new_tokens=2,
    )[1, 1]


def knowing(vector, **story):
    return SteeringVector(vector.layer_activations, vector.layer_type, replace(vector.provenance, **story))


def test_the_limit_counts_layers_as_the_model_does(tiny):
    v = knowing(tiny[2], activation_norms={1: 10.0, 2: 40.0}, num_layers=3)
    length = {n: float(a.norm()) for n, a in v.layer_activations.items()}
    assert multiplier_limit(v, -1) == multiplier_limit(v, 2) == pytest.approx(40 / length[2])
    behind = knowing(SteeringVector({-2: v.layer_activations[1]}), activation_norms={1: 10.0, 2: 40.0}, num_layers=3)
    assert (
        multiplier_limit(behind)
        == multiplier_limit(behind, -2)
        == multiplier_limit(behind, 1)
        == multiplier_limit(v, 1)
    )
    with pytest.raises(ValueError, match="does not know how many layers"):
        multiplier_limit(knowing(behind, num_layers=None))
    assert multiplier_limit(SteeringVector({-1: torch.ones(4)})) == 3.0


def test_a_layer_that_was_not_read_is_like_the_nearest_that_was(tiny):
    v = knowing(tiny[2], activation_norms={1: 10.0, 2: 40.0}, num_layers=8)
    one = v[2].at(range(2, 6))
    assert multiplier_limit(one) == pytest.approx(multiplier_limit(v, 2) / 4)


def test_directions_are_compared_at_one_layer_however_it_is_counted(tiny):
    v = knowing(tiny[2], num_layers=3)
    behind = SteeringVector({-1: -v.layer_activations[2]})
    assert similarity({"a": v, "b": behind})["a", "b"] == pytest.approx(-1)
    assert similarity({"a": v, "b": v}, layer=-1)["a", "b"] == pytest.approx(1)
    with pytest.raises(ValueError, match="width"):
        similarity({"a": v[1], "b": SteeringVector({1: torch.ones(4)})})
    with pytest.raises(ValueError, match="layer type"):
        similarity({"a": v[1], "b": SteeringVector({1: torch.ones(32)}, "mlp")})
    with pytest.raises(TypeError, match="compared by name"):
        similarity(v.layer_activations)
    with pytest.raises(ValueError, match="for several vectors"):
        similarity(v, layer=1)


# --- a number does not depend on the batch it was computed in ---------------------------------------------------------

SELECTIONS = [
    None,
    [-1],
    [0, -2],
    [2, 9],
    slice(-2, None),
    slice(-3, -1),
    slice(None, None, 2),
    torch.tensor([0, 1, 0, 1, 1, 0, 0, 0, 1, 1]),
    torch.ones(1, 5),
    Tokens.prompt[-2:],
    Tokens.response,
    Tokens.generated[1:3] | Tokens.prompt[0],
    Tokens.all,
]


@pytest.mark.parametrize("tokens", SELECTIONS, ids=shown)
def test_the_size_of_a_batch_changes_no_number(tiny, tokens):
    model, tokenizer, v = tiny
    contrasts = [("Hi", "good day", "bad"), ("How are you all today?", "fine", "not so well"), ("Well well", "x", "y")]
    gaps = [
        completion_gap(model, tokenizer, v.steering(tokens=tokens), contrasts, multipliers=[0, 2], batch_size=n).values
        for n in (1, 2, 5, 16)
    ]
    alone = torch.cat(
        [completion_gap(model, tokenizer, v.steering(tokens=tokens), [c], multipliers=[0, 2]).values for c in contrasts]
    )
    assert all(torch.allclose(gap, alone, atol=2e-4) for gap in gaps)
    whole = completion_gap(model, tokenizer, v, contrasts, [0, 2]).values
    if tokens is not None and repr(tokens) != "Tokens.all":
        assert not torch.allclose(gaps[0], whole, atol=1e-3)


@pytest.mark.parametrize("tokens", [t for t in SELECTIONS if repr(t) != "[-1]"], ids=shown)
def test_the_size_of_a_batch_changes_no_loss_and_no_projection(tiny, tokens):
    model, tokenizer, v = tiny
    texts = ["The sky is blue today.", "Bread.", "We met at noon, and it rained."]
    if isinstance(tokens, (Tokens, type(None), torch.Tensor)):
        losses = [
            text_loss(model, tokenizer, v.steering(tokens=tokens), texts, multipliers=[0, 2], batch_size=n).values
            for n in (1, 2, 16)
        ]
        assert all(torch.allclose(loss, losses[0], atol=2e-4) for loss in losses)
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in [("Hi", "Hello"), ("How are you?", "Fine, thank you"), ("?", "Well then")]
    ]
    means = [projections(model, tokenizer, v, chats, tokens=tokens, batch_size=n).mean for n in (1, 2, 16)]
    alone = torch.tensor([projections(model, tokenizer, v, chat, tokens=tokens).mean for chat in chats])
    assert all(torch.allclose(mean, alone, atol=2e-4) for mean in means)


@pytest.mark.parametrize("name", MEASURES)
def test_a_mask_with_a_row_for_each_text_is_refused(tiny, name):
    with pytest.raises(ValueError, match="a measure makes batches of its own.*Tokens"):
        MEASURES[name](*tiny[:2], tiny[2].steering(tokens=torch.ones(5, 9)))
    with pytest.raises(ValueError, match="a measure makes batches of its own"):
        steered_tokens(tiny[1], [1, 5, 6], [7], torch.ones(2, 4))


def test_a_selection_that_meets_no_text_is_refused_whatever_the_batch(tiny):
    contrasts = [("Hi", "a", "b"), ("Hello", "c", "d")]
    for size in (1, 16):
        with pytest.raises(ValueError, match="names no token of any of these texts"):
            completion_gap(*tiny[:2], tiny[2].steering(tokens=[500]), contrasts, batch_size=size)
        some = completion_gap(
            *tiny[:2], tiny[2].steering(tokens=Tokens.prompt[23:]), contrasts, [0, 2], size
        )  # only the longer one has these
        assert float(some.values[0, 0]) == pytest.approx(float(some.values[0, 1]), abs=1e-6)
        assert abs(float(some.values[1, 0] - some.values[1, 1])) > 1e-4


# --- words, messages and ids mean the same in every measure -----------------------------------------------------------


def written_out(tokenizer, words="hi"):
    messages = [{"role": "user", "content": words}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_start_token_is_there_once(tiny):
    model, tokenizer, v = tiny
    text = written_out(tokenizer)
    p = projections(model, tokenizer, v, text)
    assert p.tokens[:2] == ("<s>", "[") and p.tokens.count("<s>") == 1
    assert projections(model, tokenizer, v, "<s>plain").tokens == projections(model, tokenizer, v, "plain").tokens
    a, b = (text_loss(model, tokenizer, v, [t], [0, 1]).values for t in ("<s>plain", "plain"))
    assert torch.equal(a, b)
    asked = sweep(model, tokenizer, v, text, layers=1, multipliers=0, max_new_tokens=2)
    assert (
        asked.prompt_ids == sweep(model, tokenizer, v, "hi", layers=1, multipliers=0, max_new_tokens=2).prompt_ids
    )  # nor is it wrapped again
    gaps = [completion_gap(model, tokenizer, v, [(t, "a", "b")], [2]).values for t in (text, "hi")]
    choices = [answer_gap(model, tokenizer, v, [(t, "a", "b")], [2]).values for t in (text, "hi")]
    shifts = [next_token_shift(model, tokenizer, v, t) for t in (text, "hi")]
    assert torch.equal(*gaps) and torch.equal(*choices) and shifts[0] == shifts[1]


def test_what_the_assistant_has_begun_is_continued(tiny):
    model, tokenizer, v = tiny
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "("}]
    text = written_out(tokenizer) + "("
    assert (
        tokenizer.decode(sweep(model, tokenizer, v, begun, layers=1, multipliers=0, max_new_tokens=2).prompt_ids)
        == text
    )
    for measure in (completion_gap, answer_gap):
        a, b = (measure(model, tokenizer, v, [(prompt, "a", "b")], [0, 2]).values for prompt in (begun, text))
        assert torch.equal(a, b)
    assert next_token_shift(model, tokenizer, v, begun) == next_token_shift(model, tokenizer, v, text)
    assert "".join(projections(model, tokenizer, v, begun).tokens) == text


def test_a_finished_chat_gets_no_empty_header(tiny):
    model, tokenizer, v = tiny
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    text = "".join(projections(model, tokenizer, v, chat).tokens)
    assert text.endswith("[assistant] hello") and text.count("[assistant]") == 1
    closed = "".join(projections(model, tokenizer, v, chat, add_generation_prompt=True).tokens)
    assert closed.endswith("hello</s>[assistant] ")


TEMPLATE = "{% for m in messages %}[{{ m['role'] }}{{ mood }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def test_arguments_of_the_template_go_through(tiny):
    model, v = tiny[0], tiny[2]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    how, messages = {"template": {"mood": "!"}}, [{"role": "user", "content": "hi"}]
    plain = {"chat": False, "layers": 1, "multipliers": [0, 2], "max_new_tokens": 3}

    def shown(p):
        return "".join(p.tokens).removeprefix("<s>")

    assert sweep(model, tokenizer, v, "hi", layers=1, multipliers=0, max_new_tokens=2, **how).prompt_ids == tuple(
        tokenizer("[user!]hi[assistant]", add_special_tokens=False)["input_ids"]
    )
    closed = sweep(
        model, tokenizer, v, messages, layers=1, multipliers=0, max_new_tokens=2, add_generation_prompt=False, **how
    )
    assert tokenizer.decode(closed.prompt_ids) == "[user!]hi"
    bare = torch.tensor(tokenizer("[user!]hi[assistant]", add_special_tokens=False)["input_ids"])
    for measure in (completion_gap, answer_gap):
        a = measure(model, tokenizer, v, [("hi", "a", "b")], [0, 2], **how).values
        assert torch.equal(a, measure(model, tokenizer, v, [(bare, "a", "b")], [0, 2]).values)
    assert next_token_shift(model, tokenizer, v, "hi", **how) == next_token_shift(model, tokenizer, v, bare)
    assert shown(projections(model, tokenizer, v, messages, add_generation_prompt=False, **how)) == "[user!]hi"
    a = text_loss(model, tokenizer, v, [messages], [0, 2], add_generation_prompt=True, **how).values
    assert torch.equal(a, text_loss(model, tokenizer, v, [bare], [0, 2]).values)
    assert plain


# --- projections of replies -------------------------------------------------------------------------------------------


def test_a_replys_mean_is_the_five_lines_by_hand(made):
    model, tokenizer, v = made
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]
        for reply in ("ab", "good day to you")
    ]
    replies = projections(model, tokenizer, v, chats, tokens=Tokens.generated)
    assert isinstance(replies, ProjectionSet) and replies.mean.shape == (2, 3) and len(replies) == 2
    for i, reply in enumerate(("ab", "good day to you")):
        ids = torch.tensor([tokenizer("[user] hi</s>[assistant] " + reply)["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        direction = v.layer_activations[0] / v.layer_activations[0].norm()
        by_hand = (states[1][0, -len(reply) :] @ direction).mean()
        assert float(replies.mean[i, 0]) == pytest.approx(float(by_hand), abs=2e-4)
        assert "".join(replies[i].tokens) == reply and replies[i][0].tokens == replies[i].tokens


@pytest.mark.parametrize(
    "texts, first, kind",
    [
        (["hi", "hello"], "<s>hi", ProjectionSet),
        (("hi",), "<s>hi", ProjectionSet),
        (
            [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
            "<s>[user] a</s>[assistant] b",
            ProjectionSet,
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "<s>[user] a</s>[assistant] b",
            Projections,
        ),
        ([{"prompt": "a", "response": "b"}], "<s>[user] a</s>[assistant] b", ProjectionSet),
        ({"prompt": "a", "response": "b"}, "<s>[user] a</s>[assistant] b", Projections),
        ([torch.tensor([1, 20]), [1, 21, 22]], None, ProjectionSet),
        ([1, 20, 21], None, Projections),
        (torch.tensor([[1, 20]]), None, Projections),
    ],
    ids=shown,
)
def test_one_text_gives_one_result_and_a_list_gives_a_set(tiny, texts, first, kind):
    found = projections(*tiny, texts)
    assert isinstance(found, kind)
    one = found[0] if kind is ProjectionSet else found
    assert first is None or "".join(one.tokens) == first


@pytest.mark.parametrize(
    "text, tokens, words",
    [
        ("hi", Tokens.generated, "do not tell where a reply begins"),
        (["hi", "ho"], Tokens.response, "Text 0 is words or ids"),
        ([1, 5, 6], [-1], "do not tell where a reply begins"),
        ([[{"role": "user", "content": "a"}]], Tokens.generated, "names none of the"),
        ("hi", [70], "names none of the 3 tokens of this text"),
        ([], None, "give at least one"),
        (["hi"], torch.ones(2, 3), "batches of its own"),
    ],
    ids=shown,
)
@pytest.mark.filterwarnings("ignore:A conversation does not end")
def test_a_reply_that_is_not_there_is_no_number(tiny, text, tokens, words):
    with pytest.raises(ValueError, match=words):
        projections(*tiny, text, tokens=tokens)


def test_chosen_tokens_are_averaged_and_all_of_them_leave_out_the_first(tiny):
    every, chosen = projections(*tiny, "hello"), projections(*tiny, "hello", tokens=Tokens.all)
    assert torch.equal(every.values, chosen.values)
    assert every.mean == pytest.approx(every.values[:, 1:].mean(1).tolist())
    assert chosen.mean == pytest.approx(every.values.mean(1).tolist())
    assert projections(*tiny, "hello", tokens=[2, 4]).tokens == ("e", "l")


# --- results are containers -------------------------------------------------------------------------------------------


def test_a_sweep_is_a_mapping(tiny):
    s = sweep(*tiny, "Hi", multipliers=[0, 1], max_new_tokens=2)
    keys = [(1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)]
    assert list(s) == list(s.keys()) == keys and len(s) == 4 and dict(s) == dict(s.items()) == dict(s.texts)
    assert list(s.values()) == [s[key] for key in keys]
    assert (1, 1) in s and (torch.tensor(2), np.float64(1)) in s and (3, 1) not in s and 1 not in s and "Hi" not in s
    assert s.get((1, 9)) is None and s.get((1, 1)) == s[1, 1] and ((9, 9), "x") not in s.items()
    for missing in ((1, 9), (9, 1), 1, "Hi", (1, 2, 3), (1, None), (True, 1)):
        with pytest.raises(ValueError, match="were computed"):
            s[missing]
    with pytest.raises(KeyError):
        s[1, 9]
    assert copy.deepcopy(s) == s


def test_an_effect_is_read_by_multiplier():
    effect = Effect("gap", "nats", (-1.0, 0.0, 1.0), torch.tensor([[1.0, 2, 3], [3, 4, 5]]))
    assert 1 in effect and torch.tensor(-1) in effect and 2 not in effect and "1" not in effect and True not in effect
    assert list(effect) == [-1, 0, 1] and len(effect) == 3 and dict(effect) == {-1: 2, 0: 3, 1: 4}
    assert effect.items() == ((-1, 2), (0, 3), (1, 4)) and effect.get(7) is None
    for missing in (2, "1", None, (1, 2)):
        with pytest.raises(ValueError, match="there are -1, 0, 1"):
            effect[missing]


def test_the_other_results_answer_in_len_and_iteration(tiny):
    values = TokenValues(("a", "b"), (1.0, -1.0), "x")
    assert list(values) == [("a", 1.0), ("b", -1.0)] and len(values) == 2 and "a" in values and "c" not in values
    shift = TokenShift(("a", "b"), (0.1, 0.2), (0.3, 0.1))
    assert list(shift) == [("a", 0.1, 0.3), ("b", 0.2, 0.1)] and len(shift) == 2 and "b" in shift and 0.1 not in shift
    angles = Similarity(("x", "y"), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert "x" in angles and ("x", "y") in angles and "z" not in angles and ("x", "z") not in angles
    assert (
        list(angles) == ["x", "y"]
        and len(angles) == 2
        and angles["x"] == {"x": 1.0, "y": 0.5}
        and angles["x", "y"] == 0.5
    )
    p = projections(*tiny, "Hi")
    assert (
        list(p) == [1, 2] and len(p) == 2 and 1 in p and 0 not in p and "a" not in p and dict(p)[1].tokens == p.tokens
    )
    both = projections(*tiny, ["Hi", "Ho"])
    assert len(both) == 2 and [q.tokens for q in both] == [both[0].tokens, both[1].tokens] and len(both[1:]) == 1
    with pytest.raises(IndexError):
        both[2]
    for result in (values, shift, angles, p, both, projections(*tiny, ["Hi"])[:0]):
        assert repr(result)


# --- what is the user's comes back ------------------------------------------------------------------------------------


class Accelerator:
    "Two devices with random numbers of their own, as torch.cuda has them."

    def __init__(self, begun=True):
        self.states, self.begun = [torch.tensor([7]), torch.tensor([8])], begun
        self.asked = []

    def is_initialized(self):
        return self.begun

    def is_available(self):
        return True

    def device_count(self):
        return 2

    def get_rng_state(self, device):
        self.asked.append(torch.device(device).index)
        return self.states[torch.device(device).index].clone()

    def set_rng_state(self, state, device):
        self.states[torch.device(device).index] = state

    def manual_seed_all(self, seed):
        self.states = [torch.tensor([seed]), torch.tensor([seed])]


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_numbers_come_back_on_every_device(tiny, monkeypatch, begun, temperature):
    fake = Accelerator(begun)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda *a, **k: fake)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", fake.manual_seed_all)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    state = torch.get_rng_state()
    first = sweep(*tiny, "Hi", [0, 1], 1, 4, temperature=temperature, seed=5)
    assert first == sweep(*tiny, "Hi", [0, 1], 1, 4, temperature=temperature, seed=5)
    completion_gap(*tiny, [("Hi", "a", "b")])
    projections(*tiny, "Hi")
    assert [int(s) for s in fake.states] == [7, 8] and torch.equal(torch.get_rng_state(), state)
    assert set(fake.asked) == ({0, 1} if begun else set())


def test_nothing_is_seeded_where_nothing_is_drawn(tiny, monkeypatch):
    def refuse(seed):
        raise AssertionError("seeded")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    for measure in MEASURES.values():
        measure(*tiny)
    sweep(*tiny, "Hi", 0, 1, 2, temperature=1.0)  # on the CPU alone


def on_another_device(measured):
    "The results of `measured` with and without another default device."
    plain = measured()
    try:
        torch.set_default_device("meta")
        return plain, measured()
    finally:
        torch.set_default_device(None)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("tokens", [None, [0], slice(-2, None), Tokens.response], ids=shown)
@pytest.mark.parametrize("name", [*MEASURES, "next_token_shift", "projections"])
def test_the_default_device_is_the_users_own_affair(tiny, name, tokens):
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]] * 2

    def measured():
        if name == "next_token_shift":
            return next_token_shift(*tiny[:2], tiny[2].steering(tokens=tokens), "Hi")
        if name == "projections":
            found = projections(*tiny, chats, tokens=tokens)
            return [found.mean, found[0].values, repr(found), repr(found[0])]
        result = MEASURES[name](*tiny[:2], tiny[2].steering(tokens=tokens), multipliers=[0, 2])
        return result if name == "sweep" else [result.values, result.slope, result.mean, repr(result)]

    assert same(*on_another_device(measured))


def test_what_needs_no_model_needs_no_default_device(tiny):
    known = knowing(tiny[2], activation_norms={1: 10.0, 2: 40.0}, num_layers=3)

    def measured():
        angles, marked = similarity(known), steered_tokens(tiny[1], [1, 5, 6], [7], Tokens.response)
        return [
            angles.values,
            repr(angles),
            marked,
            multiplier_limit(known, -1),
            sweep(*tiny, "Hi", 1, 1, 2, temperature=1.0),
        ]

    assert same(*on_another_device(measured))
