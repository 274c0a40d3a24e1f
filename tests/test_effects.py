"""Effects against computations of their own, over families; and what measuring must leave as it was."""

import pytest
import torch

from steering_vectors import (
    SteeringVector,
    Tokens,
    ablation_operator,
    answer_gap,
    completion_gap,
    next_token_shift,
    projections,
    steered_tokens,
    sweep,
    text_loss,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.effects import _continued, prompt_ids

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
        ([7], False, "A", ["▁A"]),  # ids have no text to go on
    ],
)
def test_a_completion_is_what_it_adds_to_the_prompts_tokens(prompt, chat, completion, pieces):
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}({% endfor %}"
    asked, written = _continued(tokenizer, prompt, completion, chat)
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


@pytest.mark.parametrize("multipliers", [[1.0], [1.0, 1.0]])
def test_one_multiplier_has_an_average_and_no_slope(multipliers):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    effect = answer_gap(model, tokenizer, SteeringVector({0: torch.ones(32)}), [("A or B?", "A", "B")], multipliers)
    assert "nan" not in repr(effect) and "slope" not in effect._repr_html_()
    for asked in ("slope", "slopes", "wrong_way"):
        with pytest.raises(ValueError, match="two different multipliers"):
            getattr(effect, asked)


def test_steering_only_the_response_changes_nothing_before_it(made):
    model, tokenizer, v = made
    contrasts = [("Hi", "good day", "bad"), ("How are you today?", "fine", "not so well")]
    some = completion_gap(model, tokenizer, v[2], contrasts, [0, 2], tokens=Tokens.response)
    every = completion_gap(model, tokenizer, v[2], contrasts, [0, 2])
    # at the last block earlier tokens have no way to be felt later: steering them or not is the same
    assert torch.allclose(some.values, every.values, atol=2e-4)
    early = completion_gap(model, tokenizer, v[0], contrasts, [0, 2], tokens=Tokens.response)
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
    later = next_token_shift(model, tokenizer, v[0], "Hi", multiplier=3, k=100, tokens=Tokens.generated)
    response = next_token_shift(model, tokenizer, v[0], "Hi", multiplier=3, k=100, tokens=Tokens.response)
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
