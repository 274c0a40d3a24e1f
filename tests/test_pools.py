"""Pools of a model's own answers: what is in them, that they are reused, saved and loaded, and refuse what does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import quiet
from safetensors.torch import save_file
from torch import Tensor

from steering_vectors import (
    OPEN_PROMPTS,
    Pool,
    SteeringVector,
    Tokens,
    divergence,
    optimize_steering_vector,
    own_answers,
    predicted_shift,
    sample_pool,
    train_reader,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train.damage import EVERYDAY_PROMPTS
from steering_vectors.train.gradients import ShiftPlace
from steering_vectors.train.pools import many_answers
from steering_vectors.train.written import equal_parts, learn_from_texts, reading_layers

QUESTIONS = ["How are you?", "Hello", "Why is it so?"]
CONTRASTS = [
    ("How?", " fine", " bad"),
    ("How?", " glad", " sad"),
    ("How?", " good", " grim"),
    ("How?", " well", " ill"),
]

READABLE = [
    ("How?", f" {a}", f" {b}")
    for a, b in zip(("aab", "aba", "abb", "baa", "bab", "bba"), ("xxy", "xyx", "xyy", "yxx", "yxy", "yyx"), strict=True)
]


def likes(pool: Pool) -> Tensor:
    "The score of a reader that likes half of the alphabet."
    return torch.tensor([sum(i < 50 for i in said) / len(said) for _, said in pool.pairs])


@pytest.fixture(scope="module")
def tiny() -> Any:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return model, tokenizer, sample_pool(model, tokenizer, 1, QUESTIONS, answers=12, length=6)


def by_hand(model: Any, pair: Any, layer: int, tokens: Any = None) -> Tensor:
    "The gradient of one answer's log-probability, through `apply`."
    row, (asked, said) = torch.zeros(model.config.hidden_size, requires_grad=True), pair
    ids = torch.tensor([asked + said])
    with SteeringVector({layer: row}).steering(tokens=tokens).apply(model, ids[:, : len(asked)]):
        logp = model(ids).logits[0].float().log_softmax(-1)[len(asked) - 1 : -1]
    return torch.autograd.grad(logp.gather(1, torch.tensor(said)[:, None]).sum(), row)[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "mistral", "falcon"])
@pytest.mark.parametrize("tokens", [None, Tokens.response], ids=repr)
def test_each_answer_has_its_own_gradient(kind: str, tokens: Any) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, -2, QUESTIONS, answers=3, length=5, tokens=tokens)
    assert len(pool) == 9 and pool.questions.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for pair, found in zip(pool.pairs, pool.gradients, strict=True):
        assert torch.allclose(found, by_hand(model, pair, 1, tokens), atol=1e-5, rtol=1e-3)


def test_bfloat16_is_near() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    narrow: Any = tiny_model().to(torch.bfloat16)
    pool = sample_pool(narrow, tokenizer, 1, QUESTIONS, answers=3, length=5)
    exact = torch.stack([by_hand(model, pair, 1) for pair in pool.pairs])
    assert pool.gradients.dtype == torch.float32
    assert (pool.gradients - exact).norm() < 0.1 * exact.norm()


def test_the_padding_side_does_not_matter() -> None:
    model, found = tiny_model(), []
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        found.append(sample_pool(model, tokenizer, 1, QUESTIONS, answers=3, length=5))
    assert found[0].pairs == found[1].pairs and torch.equal(found[0].gradients, found[1].gradients)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "opt", "mamba", "rwkv", "falcon_mamba", "jamba"])
def test_a_repeated_cache_draws_what_a_repeated_question_draws(name: str, monkeypatch: Any) -> None:
    if name not in families.CAUSAL:
        pytest.skip("this transformers has no such family")
    with quiet():
        model: Any = families.build(name).to(torch.float32).eval()
        row, tokenizer, found = [1, 5, 6, 7, 8], tiny_tokenizer(), []
        for cached in (True, False):
            if not cached:
                monkeypatch.setattr(
                    "steering_vectors.train.pools._cache_after", lambda *_: (_ for _ in ()).throw(ValueError())
                )
            torch.manual_seed(3)
            with torch.no_grad():
                found.append(many_answers(model, tokenizer, row, 6, 8))
    assert found[0] == found[1]


def test_it_is_the_same_for_one_seed_and_nothing_is_changed(tiny: Any) -> None:
    model, tokenizer, pool = tiny
    model.train()
    torch.manual_seed(5)
    state, wanted = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    try:
        with torch.inference_mode():
            again = sample_pool(model, tokenizer, 1, QUESTIONS, answers=12, length=6)
        assert all(m.training for m in model.modules())
    finally:
        model.eval()
    assert again.pairs == pool.pairs and torch.equal(again.gradients, pool.gradients)
    assert sample_pool(model, tokenizer, 1, QUESTIONS, answers=12, length=6, seed=1).pairs != pool.pairs
    assert torch.equal(torch.get_rng_state(), state) and [p.requires_grad for p in model.parameters()] == wanted
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_scores_count_within_their_question_only(tiny: Any) -> None:
    _, _, pool = tiny
    scores = likes(pool)
    shifted = scores + 10.0 * pool.questions
    assert torch.allclose(pool.towards(scores), pool.towards(shifted), atol=1e-6)
    assert torch.allclose(pool.towards(2 * scores), 2 * pool.towards(scores))
    mine = scores.double()
    for q in range(3):
        mine[pool.questions == q] -= mine[pool.questions == q].mean()
    assert torch.allclose(pool.towards(scores), (mine[:, None] * pool.gradients.double()).mean(0), atol=1e-9)


def test_the_prediction_is_right_for_a_small_shift() -> None:
    "The mean score of one token, exactly, under a shift; the pool is large enough to foretell it."
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, 1, ["Hello"], answers=2000, length=1)
    scores = likes(pool)
    score_of_token = (torch.arange(model.config.vocab_size) < 50).float()
    ids = torch.tensor([pool.pairs[0][0]])
    way = pool.towards(scores).float()
    v = SteeringVector({1: 0.3 * way / way.norm()})
    with torch.no_grad():
        before = model(ids).logits[0, -1].softmax(-1) @ score_of_token
        with v.apply(model):
            after = model(ids).logits[0, -1].softmax(-1) @ score_of_token
    foretold = predicted_shift(model, tokenizer, v, pool, scores)
    assert foretold == pytest.approx(float(after - before), rel=0.25)
    assert predicted_shift(model, tokenizer, v, pool, scores, multiplier=-2) == pytest.approx(-2 * foretold)


@pytest.mark.parametrize("layer", [1, [1, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vector_of_texts_moves_the_score_and_costs_what_was_asked(layer: Any, dtype: torch.dtype) -> None:
    model, tokenizer = tiny_model(num_layers=4).to(dtype), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, layer, QUESTIONS, answers=12, length=6)
    answers = own_answers(model, tokenizer, ["Hello", "Why?"])
    v = optimize_steering_vector(
        model, tokenizer, CONTRASTS, layer, 0.002, objective="texts", pool=pool, reader=likes(pool), prompts=answers
    )
    assert predicted_shift(model, tokenizer, v, pool, likes(pool)) > 0
    facts = v.provenance.extra
    assert facts["optimization"]["objective"] == "texts" and facts["optimization"]["answers"] == 36
    assert facts["calibration"]["prompts"] == "2 prompts of the user and 3 prompts of the user"
    both = learn_from_texts(
        model, tokenizer, CONTRASTS, ShiftPlace.of(model, layer), pool, likes(pool), answers
    ).answers
    assert divergence(model, tokenizer, v, both, multipliers=[1])[1] == pytest.approx(0.002, rel=0.11)


def test_a_reader_is_learned_where_none_is_given(tiny: Any) -> None:
    model, tokenizer, pool = tiny
    v = optimize_steering_vector(model, tokenizer, READABLE, 1, 0.002, objective="texts", pool=pool, prompts=["Hello"])
    assert "Reader(layer 1" in v.provenance.extra["optimization"]["reader"]
    reader = train_reader(model, tokenizer, READABLE, 1)
    given = optimize_steering_vector(
        model, tokenizer, READABLE, 1, 0.002, objective="texts", pool=pool, reader=reader, prompts=["Hello"]
    )
    assert torch.allclose(v.layer_activations[1], given.layer_activations[1], atol=1e-5)
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in READABLE]
    again = optimize_steering_vector(
        model, tokenizer, iter(rows), 1, 0.002, objective="texts", pool=pool, prompts=["Hello"]
    )
    assert torch.allclose(v.layer_activations[1], again.layer_activations[1], atol=1e-5)


def test_parts_are_equal_in_damage(tiny: Any) -> None:
    _, _, pool = tiny
    curved = pool.curvature
    a, b = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = equal_parts([a, 9 * b], curved)
    rest = total - a / curved.damage(a) ** 0.5
    assert curved.damage(rest) == pytest.approx(1.0) and torch.nn.functional.cosine_similarity(rest, b, 0) > 0.999


@pytest.mark.parametrize("tokens", [None, Tokens.response], ids=repr)
def test_a_file_holds_all_of_it(tmp_path: Path, tokens: Any) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, [0, 2], QUESTIONS, answers=3, length=5, layer_type="mlp", tokens=tokens)
    pool.save(tmp_path / "p.safetensors")
    again = Pool.load(tmp_path / "p.safetensors")
    assert torch.equal(again.gradients, pool.gradients) and torch.equal(again.questions, pool.questions)
    rest = [{k: v for k, v in vars(p).items() if k not in ("gradients", "questions")} for p in (pool, again)]
    assert rest[0] == rest[1]
    again.check(ShiftPlace.of(model, [0, 2], "mlp", None, tokens))


def test_files_that_hold_no_pool_are_refused(tmp_path: Path, tiny: Any) -> None:
    _, _, pool = tiny
    (tmp_path / "text").write_text("no")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    pool.save(tmp_path / "p")
    save_file(
        {
            "gradients": pool.gradients[:2],
            "questions": pool.questions,
            "sizes": torch.ones(3, 2).long(),
            "ids": torch.ones(6).long(),
        },
        tmp_path / "short",
        {"format": "steering-vectors pool 1", "pool": json.dumps({"modules": {}, "lengths": {}})},
    )
    whole = {"gradients": pool.gradients, "questions": pool.questions, "sizes": torch.ones(3, 2).long()}
    for name, header, count in (("unread", "{", 6), ("unknown", '{"modules": {}, "lengths": {}, "later": 1}', 6)):
        tensors = whole | {"ids": torch.ones(count).long()}
        save_file(tensors, tmp_path / name, {"format": "steering-vectors pool 1", "pool": header})
    facts = {"format": "steering-vectors pool 1", "pool": json.dumps({"modules": {}, "lengths": {}})}
    save_file(whole | {"ids": torch.ones(5).long()}, tmp_path / "ids", facts)
    for name, words in (
        ("text", "no safetensors file"),
        ("other", "holds no pool"),
        ("short", "3 answers and 2 gradients"),
        ("unread", "unread cannot be read as a pool"),
        ("unknown", "unknown cannot be read as a pool"),
        ("ids", "ids cannot be read as a pool"),
    ):
        with pytest.raises(ValueError, match=words):
            Pool.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Pool.load(tmp_path / "absent")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, tiny: Any, monkeypatch: Any) -> None:
    _, _, pool = tiny
    pool.save(tmp_path / "p")
    before = (tmp_path / "p").read_bytes()

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="no space"):
        pool.save(tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["p"]


def test_a_pool_of_another_model_is_refused(tiny: Any) -> None:
    model, tokenizer, pool = tiny
    theirs, other = replace(pool, model="org/theirs"), tiny_model()
    other.config._name_or_path = "org/ours"
    with pytest.raises(ValueError, match="answers of org/theirs, and the model is org/ours"):
        predicted_shift(other, tokenizer, SteeringVector({1: torch.ones(32)}), theirs, likes(pool))
    with pytest.raises(ValueError, match="answers of org/theirs"):
        how = {"objective": "texts", "pool": theirs, "reader": likes(pool), "prompts": ["Hello"]}
        optimize_steering_vector(other, tokenizer, CONTRASTS, 1, **how)
    other.config._name_or_path = "/cache/models--org--theirs/snapshots/0a1b"  # the same model, in a folder
    assert predicted_shift(other, tokenizer, SteeringVector({1: torch.ones(32)}), theirs, likes(pool))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layer": 2}, "This pool holds for layers"),
        ({"tokens": Tokens.response}, "This pool holds for layers"),
        ({"layer_type": "mlp"}, "This pool holds for layers"),
        ({"steps": 2}, "leave steps out"),
        ({"objective": "choices"}, "serve objective='texts'"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Any, wrong: Any, words: str) -> None:
    model, tokenizer, pool = tiny
    how = {"layer": 1, "objective": "texts", "pool": pool, "reader": likes(pool), "prompts": ["Hello"]} | wrong
    with pytest.raises(ValueError, match=words):
        optimize_steering_vector(model, tokenizer, CONTRASTS, **how)


def test_scores_and_vectors_that_do_not_fit_are_refused(tiny: Any) -> None:
    model, tokenizer, pool = tiny
    with pytest.raises(ValueError, match="the scores have shape"):
        predicted_shift(model, tokenizer, SteeringVector({1: torch.ones(32)}), pool, torch.ones(3))
    with pytest.raises(ValueError, match="the pool holds for"):
        predicted_shift(model, tokenizer, SteeringVector({1: torch.ones(32)}, "mlp"), pool, likes(pool))
    with pytest.raises(TypeError, match="prompts is a list"):
        sample_pool(model, tokenizer, 1, "Hello")
    with pytest.raises(ValueError, match="answers"):
        sample_pool(model, tokenizer, 1, QUESTIONS, answers=1)


def test_the_built_in_questions_are_open_and_not_the_everyday_ones() -> None:
    assert len(set(OPEN_PROMPTS)) == 16 and not set(OPEN_PROMPTS) & set(EVERYDAY_PROMPTS)


def test_texts_are_read_around_the_layer() -> None:
    model = tiny_model(num_layers=30)
    assert reading_layers(model, ShiftPlace.of(model, 15)) == [12, 18]
    assert reading_layers(model, ShiftPlace.of(model, 29)) == [26, 29]
