"""Measures with gates and schedules: each equals doing it by hand, text by text, with `apply(prompt=...)`.

The texts of a measure stand together in packed rows and their lower blocks run once. By hand each text is a pass of its own,
steered as the model is while it writes.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import (
    Gate,
    Steering,
    SteeringVector,
    Tokens,
    ablation_operator,
    answer_gap,
    calibrate,
    completion_gap,
    decay,
    divergence,
    next_token_shift,
    prompt_ids,
    ramp,
    sweep,
    text_loss,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train.damage import own_answers
from steering_vectors.train.prompts import continuation_ids
from steering_vectors.train.scores import TextScorer

CLOSE, SEEN = 1e-5, 1e-3  # scores are float32
CONTRASTS = [
    ("Tell me", "a joke!", "nothing."),
    ("So what", "a joke!", "is it?"),
    ("Go on then", "yes sir", "no"),
    ("Hi", "ho", "hum"),
]
ANSWERS = [(prompt, good[0], bad[0]) for prompt, good, bad in CONTRASTS if good[0] != bad[0]]
MULTIPLIERS = (-2.0, 0.0, 1.0)


def turned(numbers: Tensor) -> Tensor:
    "Full, nothing, then turned around."
    return torch.where(numbers < 2, 1.0, torch.where(numbers < 3, 0.0, -0.5))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, num_layers=4).double()


@pytest.fixture(scope="module")
def tok() -> Any:
    return tiny_tokenizer()


def random(seed: int) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector() -> SteeringVector:
    return SteeringVector({2: random(1), 3: random(2)})


def gate_of(model: Any, tok: Any, layer: int = 1, seed: int = 3) -> Gate:
    "A gate that opens for half of the prompts."
    direction = random(seed)
    scores = []
    for prompt, *_ in CONTRASTS:
        ids = prompt_ids(tok, prompt)
        with torch.no_grad(), vector().apply(model, when=Gate(direction, layer), prompt=ids) as handle:
            model(ids)
        scores.append(float(handle.decisions.scores))
    return Gate(direction, layer, sum(sorted(scores)[1:3]) / 2)


def each_of(model: Any, tok: Any) -> Gate:
    "A gate that opens for some tokens."
    direction = random(4)
    kept: list[Tensor] = []
    hook = model.get_submodule("model.layers.0" if hasattr(model, "model") else "transformer.h.0").register_forward_hook(
        lambda m, a, out: kept.append((out if isinstance(out, Tensor) else out[0])[0].detach())
    )  # fmt: skip
    with torch.no_grad():
        model(prompt_ids(tok, "Tell me a joke"))
    hook.remove()
    return Gate(direction, 0, float((kept[0] @ direction).median())).per_token()


CASES = "gate closed_gate each both gate_tokens decay ramp own_schedule gate_and_decay ablation own_operator by_layer_type".split()


def steering_of(name: str, model: Any, tok: Any) -> Steering:
    v, gate = vector(), gate_of(model, tok)
    return {
        "gate": lambda: v.steering(when=gate),
        "closed_gate": lambda: v.steering(when=gate & ~gate),
        "each": lambda: v.steering(when=each_of(model, tok)),
        "both": lambda: v.steering(when=~gate | each_of(model, tok)),
        "gate_tokens": lambda: v.steering(when=gate, tokens=Tokens.generated[1:]),
        "decay": lambda: v.steering(schedule=decay(2)),
        "ramp": lambda: v.steering(schedule=ramp(3), multiplier=0.5),
        "own_schedule": lambda: v.steering(schedule=turned, tokens=Tokens.all - Tokens.at(5)),
        "gate_and_decay": lambda: v.steering(when=~gate, schedule=decay(1)),
        "ablation": lambda: v.steering(operator=ablation_operator(0.5), when=gate, schedule=turned),
        "own_operator": lambda: v.steering(operator=lambda h, w: w * h.sigmoid(), when=gate, schedule=decay(2)),
        "by_layer_type": lambda: SteeringVector({2: random(1)}, "mlp").steering(when=gate, schedule=decay(2)),
    }[name]()


def by_hand(model: Any, steerings: list[Steering], multiplier: float, prompt: list[int], more: list[int]) -> Tensor:
    "The log-probabilities of every token after each token of the continuation but the last, one pass."
    handles = [how.times(multiplier).apply(model, torch.tensor([prompt])) for how in steerings]
    ids = torch.tensor([prompt + more])
    for handle in handles:
        handle.attach()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    for handle in handles:
        handle.remove()
    return logits.log_softmax(-1)


def score(model: Any, steerings: list[Steering], multiplier: float, prompt: list[int], more: list[int]) -> float:
    found = by_hand(model, steerings, multiplier, prompt, more)
    return float(found.gather(1, torch.tensor(more)[:, None]).mean())


def gaps(model: Any, tok: Any, steerings: list[Steering]) -> Tensor:
    rows = []
    for prompt, good, bad in CONTRASTS:
        one, other = (continuation_ids(tok, prompt, text) for text in (good, bad))
        rows.append([score(model, steerings, m, *one) - score(model, steerings, m, *other) for m in MULTIPLIERS])
    return torch.tensor(rows)


def moves(values: Tensor) -> Tensor:
    "How far each row is from the unsteered one."
    return (values - values[:, 1:2]).abs().amax(1)


@pytest.mark.parametrize("name", CASES)
def test_completion_gap(model: Any, tok: Any, name: str) -> None:
    steering = steering_of(name, model, tok)
    expected = gaps(model, tok, [steering])
    for size in (None, 1):
        found = completion_gap(model, tok, steering, CONTRASTS, MULTIPLIERS, batch_size=size).values
        assert (found - expected).abs().max() < CLOSE
    moved = moves(expected) > SEEN
    if name == "closed_gate":
        assert not moved.any() and torch.equal(found, found[:, 1:2].expand_as(found))
    elif "gate" in name or name in ("ablation", "own_operator", "by_layer_type"):
        assert moved.sum() == 2, "half of the prompts are open"
    else:
        assert moved.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(tok: Any, dtype: torch.dtype) -> None:
    "Closed texts are scored as unsteered ones, bit for bit."
    model = tiny_model("llama", num_layers=4, dtype=dtype)
    gate = gate_of(model, tok)
    found = completion_gap(model, tok, vector().steering(when=gate, schedule=decay(2)), CONTRASTS, MULTIPLIERS).values
    moved = moves(found) > SEEN
    assert moved.sum() == 2 and torch.equal(found[~moved], found[~moved][:, 1:2].expand(-1, 3))


def test_answer_gap(model: Any, tok: Any) -> None:
    "The one token that decides is number 0 of the response: a decay does nothing yet, a ramp has a third."
    v, gate = vector(), gate_of(model, tok)
    full = answer_gap(model, tok, v.steering(tokens=Tokens.response), ANSWERS, MULTIPLIERS).values
    assert torch.equal(answer_gap(model, tok, v.steering(schedule=decay(1)), ANSWERS, MULTIPLIERS).values, full)
    third = answer_gap(model, tok, v.steering(tokens=Tokens.response, multiplier=1 / 3), ANSWERS, MULTIPLIERS).values
    assert (
        answer_gap(model, tok, v.steering(schedule=ramp(3)), ANSWERS, MULTIPLIERS).values - third
    ).abs().max() < CLOSE
    gated = answer_gap(model, tok, v.steering(when=gate), ANSWERS, MULTIPLIERS).values
    is_open = [score(model, [v.steering(when=gate)], 1, *continuation_ids(tok, p, a)) != score(model, [], 1, *continuation_ids(tok, p, a))
               for p, a, _ in ANSWERS]  # fmt: skip
    expected = torch.where(torch.tensor(is_open)[:, None], full, full[:, 1:2])
    assert torch.equal(gated, expected) and 0 < sum(is_open) < len(is_open)


def test_the_saving_way_is_taken(tok: Any) -> None:
    "What is compared above is packed rows with the lower blocks run once, not the plain way."
    from steering_vectors.train.scores import ScoringWay, _ways

    model = tiny_model("llama", num_layers=4).double()
    completion_gap(model, tok, vector().steering(when=gate_of(model, tok), schedule=decay(2)), CONTRASTS, MULTIPLIERS)
    assert [way for way, _ in _ways[model].values()] == [ScoringWay(True, False, 3)]


def test_prompts_are_read_once_for_all_multipliers(model: Any, tok: Any) -> None:
    pairs = [continuation_ids(tok, p, text) for p, *both in CONTRASTS for text in both]
    gate, scorer, counted = gate_of(model, tok), TextScorer(model, pairs), []
    hook = model.register_forward_pre_hook(lambda *a: counted.append(1))
    for m in MULTIPLIERS:
        scorer.scores([vector().steering(when=gate)], m)
    first, _ = len(counted), counted.clear()
    for m in MULTIPLIERS:
        scorer.scores([vector().steering(when=gate)], m)
    hook.remove()
    assert len(counted) <= len(MULTIPLIERS) * 2 < first


def test_several_steerings(model: Any, tok: Any) -> None:
    gate = gate_of(model, tok)
    pair = [vector().steering(when=gate), SteeringVector({3: random(5)}).steering(schedule=decay(1))]
    found = completion_gap(model, tok, pair, CONTRASTS, MULTIPLIERS).values
    assert (found - gaps(model, tok, pair)).abs().max() < CLOSE
    low = SteeringVector({1: random(6)}).steering()
    with pytest.raises(ValueError, match="A gate reads layer 1, and .* one changes layer 1"):
        completion_gap(model, tok, [low, *pair], CONTRASTS)


def test_a_gate_above_the_steered_layer_is_refused(model: Any, tok: Any) -> None:
    gate = gate_of(model, tok)
    scorer = TextScorer(model, [([5, 6], [7, 8])])
    scorer.scores([vector().steering(when=gate)])
    with pytest.raises(ValueError, match="must not be above"):  # also where the gate has decided already
        scorer.scores([SteeringVector({0: random(1)}).steering(when=gate)])


@pytest.mark.parametrize("name", ["gate", "gate_and_decay", "each", "own_schedule"])
def test_divergence(model: Any, tok: Any, name: str) -> None:
    steering = steering_of(name, model, tok)
    answers = own_answers(model, tok, [prompt for prompt, *_ in CONTRASTS], length=5)
    expected = torch.zeros(len(CONTRASTS), len(MULTIPLIERS))
    for i, (prompt, said) in enumerate(answers.pairs):
        own = by_hand(model, [], 1, prompt, said)
        for k, m in enumerate(MULTIPLIERS):
            steered = by_hand(model, [steering], m, prompt, said)
            expected[i, k] = float((own.exp() * (own - steered)).sum(-1).mean())
    found = divergence(model, tok, steering, answers, MULTIPLIERS).values
    assert (found - expected).abs().max() < CLOSE and expected.max() > SEEN
    if "gate" in name:
        assert sorted((found.amax(1) == 0).tolist()) == [False, False, True, True]


def test_calibrate(model: Any, tok: Any) -> None:
    "The budget is the mean over all answers, and what it holds for is told."
    steering, asked = steering_of("gate_and_decay", model, tok), [prompt for prompt, *_ in CONTRASTS]
    answers = own_answers(model, tok, asked, length=5)
    found = calibrate(model, tok, steering, 0.05, answers)
    assert divergence(model, tok, found, answers, [1]).mean[0] == pytest.approx(0.05, rel=0.1)
    told = found.vector.provenance.extra["calibration"]
    assert told["when"] == repr(steering.when) and told["schedule"] == "decay(1)"
    with pytest.raises(ValueError, match="The damage stays at 0"):
        calibrate(model, tok, steering_of("closed_gate", model, tok), 0.05, answers)


@pytest.mark.parametrize("name", [name for name in CASES if name != "own_operator"])
def test_sweep(model: Any, tok: Any, name: str) -> None:
    "Each text is the one that is generated by hand at its layer and multiplier, whatever else is in the batch."
    steering = steering_of(name, model, tok)
    layers = ["all", *steering.layer_activations]
    changed = set()
    for prompt, *_ in CONTRASTS:
        ids = prompt_ids(tok, prompt)
        s = sweep(model, tok, steering, prompt, (-8, 0, 8), layers, max_new_tokens=6)
        for layer, m in s:
            chosen = steering if layer == "all" else replace(steering, vector=steering.vector[layer])
            with chosen.times(m).apply(model, ids):
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
                )
            new = out[0, ids.shape[1] :].tolist()
            end = new.index(tok.eos_token_id) if tok.eos_token_id in new else len(new)
            assert s.token_ids[layer, m] == tuple(new[:end])
        changed.add(len({s.token_ids["all", m] for m in (-8, 0, 8)}) > 1)
    assert changed == ({False} if name == "closed_gate" else {True, False} if name == "gate" else changed)


def test_next_token_shift(model: Any, tok: Any) -> None:
    steering, moved = steering_of("gate", model, tok), []
    for prompt, *_ in CONTRASTS:
        ids = prompt_ids(tok, prompt)
        with torch.no_grad(), steering.times(3).apply(model, ids):
            after = model(ids).logits[0, -1].float().softmax(-1)
        shift = next_token_shift(model, tok, steering, prompt, 3)
        assert shift.after == pytest.approx(
            [float(after[tok.convert_tokens_to_ids(t)]) for t in shift.tokens], abs=1e-6
        )
        moved.append(shift.before != shift.after)
    assert sorted(moved) == [False, False, True, True]


def test_text_loss_has_no_prompt(model: Any, tok: Any) -> None:
    texts, each = ["Tell me a joke", "So what is it?"], each_of(model, tok)
    steering = vector().steering(when=each)
    found = text_loss(model, tok, steering, texts, MULTIPLIERS).values
    ids = [tok(text)["input_ids"] for text in texts]
    expected = torch.tensor([[-score(model, [steering], m, row[:1], row[1:]) for m in MULTIPLIERS] for row in ids])
    assert (found - expected).abs().max() < CLOSE and moves(expected).min() > SEEN
    for how in ({"when": gate_of(model, tok)}, {"schedule": decay(2)}, {"when": each & gate_of(model, tok)}):
        with pytest.raises(ValueError, match="no prompt and no response"):
            text_loss(model, tok, vector().steering(**how), texts)
