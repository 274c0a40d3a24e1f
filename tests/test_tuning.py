"""Tuning: what chooses does not judge, every candidate costs the same, anchors, refusals, and nothing of the user's changes."""

from typing import Any

import pytest
import torch
from test_default_device import Elsewhere

from steering_vectors import (
    SteeringVector,
    completion_gap,
    few_shot,
    logistic_aggregator,
    mean_aggregator,
    own_answers,
    pca_aggregator,
    plot_tuning,
    prompt_effect,
    random_direction,
    train_steering_vector,
    tune,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.evaluate.candidates import TuningRow, chance_effect
from steering_vectors.evaluate.heldout import halves, repeated
from steering_vectors.evaluate.intervals import estimate, verdict
from steering_vectors.evaluate.tuning import _with_the_choice
from steering_vectors.modes import undisturbed
from steering_vectors.train.prompts import continuation_ids

SAID = "come here|look at that|what a day|where are you|stop it now|this is good|give it back|let me in".split("|")
PAIRS = [(said.upper(), said) for said in SAID]
CONTRASTS = [(f"{n} and {n + 1}: ", f" YES {n}", f" yes {n}") for n in range(32)]
PROMPTS = ["Hello", "How are you?", "What is it?"]


def tuned(model: Any = None, **changed: Any) -> Any:
    asked = {"layers": [1, 2], "prompts": PROMPTS, "anchors": False} | changed
    return tune(
        model or tiny_model(), tiny_tokenizer(), asked.pop("pairs", PAIRS), asked.pop("contrasts", CONTRASTS), **asked
    )


def test_the_choice_is_by_one_half_and_the_numbers_by_the_other() -> None:
    found, model, tokenizer = tuned(), tiny_model(), tiny_tokenizer()
    choose, judge = halves(CONTRASTS)
    assert not {c[0] for c in choose} & {c[0] for c in judge} and len(choose) == len(judge) == 16
    for row in found.rows:
        for items, mean in ((choose, row.by_choosers), (judge, row.effect.value)):
            values = completion_gap(model, tokenizer, row.steering, items, [0, 1]).values
            assert abs(float((values[:, 1] - values[:, 0]).mean()) - mean) < 1e-4
        changed = values[:, 1] - values[:, 0]
        assert row.wrong_way == float((changed < 0).double().mean())
    assert sum(row.chosen for row in found.rows) == 1


@pytest.mark.parametrize(
    "leads, taken",
    [  # at layers 1, 4 and 8, of which 4 is in the middle: what each item says more than at layer 4
        ({1: [0.0, 0.0], 8: [0.0, 0.0]}, 4),  # all alike
        ({1: [0.0, 0.0], 8: [0.9, -0.6]}, 4),  # ahead by luck: 0.15, its standard error 0.75
        ({1: [0.0, 0.0], 8: [0.3, 0.2]}, 8),  # ahead on both items alike: 0.25, its standard error 0.05
        ({1: [0.5, 0.4], 8: [0.6, 0.35]}, 1),  # two that cannot be told apart, and the middle is behind both
    ],
)
def test_of_those_that_are_as_good_the_middle_one_is_taken(leads: dict[int, list[float]], taken: int) -> None:
    effects = {4: [0.0, 0.0]} | leads
    rows = [TuningRow((n,), "mean", estimate(torch.zeros(4)), 0.0, 0.1, choosing=tuple(effects[n])) for n in effects]
    assert next(row for row in _with_the_choice(rows, 4) if row.chosen).layers == (taken,)


def test_judges_have_no_part_in_the_choice() -> None:
    choose, judge = halves(CONTRASTS)
    turned = [(p, b, a) if (p, a, b) in judge else (p, a, b) for p, a, b in CONTRASTS]
    first, other = tuned(), tuned(contrasts=turned)
    assert first.chosen.layers == other.chosen.layers
    assert first.chosen.by_choosers == pytest.approx(other.chosen.by_choosers, abs=1e-5)
    assert first.chosen.effect.value == pytest.approx(-other.chosen.effect.value, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_costs_the_budget(dtype: torch.dtype) -> None:
    methods = {"mean": mean_aggregator(), "pca": pca_aggregator(), "logistic": logistic_aggregator()}
    found = tuned(tiny_model().to(dtype), aggregators=methods, kl=0.05, anchors=True)
    assert [(r.layers, r.method) for r in found.rows[:6]] == [((n,), m) for n in (1, 2) for m in methods]
    assert all(abs(row.kl / 0.05 - 1) <= 0.101 for row in found.rows[:7]) and found.rows[6].is_random
    assert found.rows[7].multiplier == 1.0 and [r.kind for r in found.rows[6:]] == ["anchor"] * 2
    assert found.steering.multiplier == 1.0 and found.vector.provenance.extra["calibration"]["kl"] == 0.05


def test_chance_is_the_largest_of_four_random_directions_whatever_their_names() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    loud = SteeringVector({0: torch.randn(32, generator=torch.Generator().manual_seed(3))})
    found = tuned(model, vectors={"random forest": loud}, anchors=True)
    (row,) = [row for row in found.rows if row.is_random]
    assert row.method == "the largest of 4 random directions" and row.kind == "anchor"
    assert chance_effect(found.rows) == row.effect.value
    assert chance_effect([r for r in found.rows if not r.is_random]) == 0.0
    _, judge = halves(CONTRASTS)
    first, effects = row.steering.vector, []
    for seed in range(4):
        values = completion_gap(model, tokenizer, random_direction(first, seed), judge, [0, 1]).values
        effects.append(float((values[:, 1] - values[:, 0]).mean()))
    assert (
        row.effect.value == pytest.approx(max(effects, key=abs), abs=1e-4) and len({f"{x:.4f}" for x in effects}) == 4
    )


def test_candidates_are_the_vectors_that_training_makes() -> None:
    model, tokenizer, found = tiny_model(), tiny_tokenizer(), tuned()
    trained = train_steering_vector(model, tokenizer, PAIRS, layers=[1, 2])
    for row in found.rows:
        (n,) = row.layers
        assert torch.allclose(
            row.steering.layer_activations[n], trained.layer_activations[n] * row.multiplier, atol=1e-5
        )
        story = row.steering.vector.provenance
        assert story.activation_norms[n] == pytest.approx(trained.provenance.activation_norms[n], rel=1e-5)
        assert story.num_pairs == len(PAIRS)
    sets = tuned(pairs={"positive": [a for a, _ in PAIRS], "negative": [b for _, b in PAIRS[:5]]})
    assert sets.vector.provenance.num_negative == 5


def test_learned_vectors_are_judged_beside_the_others() -> None:
    learned = SteeringVector({0: torch.randn(32, generator=torch.Generator().manual_seed(3))})
    found = tuned(vectors={"learned": learned})
    assert (
        found.rows[2].layers == (0,) and found.rows[2].method == "learned" and abs(found.rows[2].kl / 0.1 - 1) <= 0.101
    )


def test_too_few_items_are_refused_or_warned_of() -> None:
    with pytest.raises(ValueError, match="too few to choose by"):
        tuned(contrasts=CONTRASTS[:3])
    with pytest.raises(ValueError, match="between 0 and 1"):
        tuned(test=1.5)
    with pytest.warns(UserWarning, match="below 16"):
        found = tuned(contrasts=CONTRASTS[:12])
    assert "too few for an interval" in found.sentence and found.notes


def test_items_that_were_trained_on_and_items_given_twice() -> None:
    own = [("Say: ", said.upper(), said) for said in SAID]
    with pytest.warns(UserWarning, match="8 of the 40 contrasts hold texts that were trained on"):
        found = tuned(contrasts=[*CONTRASTS, *own])
    assert "memory" in repr(found)
    with pytest.warns(UserWarning, match="occur twice"):
        assert tuned(contrasts=[*CONTRASTS, *CONTRASTS[:4]]).num_choosers == 16
    assert repeated(CONTRASTS, PAIRS) == 0


def test_shuffled_labels_and_random_directions_are_called_no_effect() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(36, generator=g)
    assert "no effect" in verdict(estimate(values - values.mean() + 0.05))
    assert "no clearer" in verdict(estimate(0.1 + 0.1 * torch.rand(36, generator=g)), chance=0.3)
    assert "wrong way" in verdict(estimate(values - 2))
    turned = [c if n % 2 else (c[0], c[2], c[1]) for n, c in enumerate(CONTRASTS)]
    assert "The effect is there" not in tuned(contrasts=turned).sentence


def test_words_in_front_by_hand() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = prompt_effect(model, tokenizer, "Be loud.", CONTRASTS[:4], prompts=PROMPTS)
    system = [{"role": "system", "content": "Be loud."}]

    def score(prompt: Any, text: str) -> float:
        asked, said = continuation_ids(tokenizer, prompt, text)
        with undisturbed(model):
            logs = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
        return float(torch.stack([logs[len(asked) - 1 + i, t] for i, t in enumerate(said)]).mean())

    for (prompt, a, b), change in zip(CONTRASTS[:4], found.changes, strict=True):
        told = [*system, {"role": "user", "content": prompt}]
        wanted = score(told, a) - score(told, b) - score(prompt, a) + score(prompt, b)
        assert abs(wanted - float(change)) < 1e-4
    answers = own_answers(model, tokenizer, PROMPTS)
    for n, (asked, said) in enumerate(answers.pairs):
        told, _ = continuation_ids(tokenizer, [*system, {"role": "user", "content": PROMPTS[n]}], " x")
        with undisturbed(model):
            own, other = (
                model(torch.tensor([ids + said])).logits[0, -len(said) - 1 : -1].log_softmax(-1)
                for ids in (asked, told)
            )
        assert abs(float((own.exp() * (own - other)).sum(-1).mean()) - float(found.damages[n])) < 1e-5


def test_words_in_front_stand_in_the_table() -> None:
    records = [({"prompt": "Say: ", "response": a}, {"prompt": "Say: ", "response": b}) for a, b in PAIRS]
    found = tuned(pairs=records, before={"instruction": "Be loud.", "examples": few_shot(records, 2)})
    assert [row.method for row in found.rows[2:]] == ["instruction", "examples"] and "instruction" in repr(found)
    assert all(row.layers == () and row.kl > 0 and row.steering is None for row in found.rows[2:])
    with pytest.raises(TypeError, match="drawn before"):
        tuned(prompts=own_answers(tiny_model(), tiny_tokenizer(), PROMPTS), before={"x": "Be loud."})
    with pytest.raises(ValueError, match="An example is"):
        few_shot(PAIRS)


def test_other_refusals() -> None:
    for changed, kind, words in [
        ({"layers": [9]}, ValueError, "ayer 9"),
        ({"aggregators": mean_aggregator}, TypeError, "makes an aggregator"),
        ({"aggregators": [mean_aggregator(), mean_aggregator()]}, ValueError, "Two methods"),
        ({"kl": -1}, ValueError, "above 0"),
        ({"pairs": [("same", "same")] * 8}, ValueError, "zero"),
    ]:
        with pytest.raises(kind, match=words):
            tuned(**changed)


def test_it_is_reproducible_and_changes_nothing() -> None:
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    weights, before, state = [p.clone() for p in model.parameters()], dict(vars(tokenizer)), torch.get_rng_state()
    found = [tune(model, tokenizer, PAIRS, CONTRASTS, [1, 2], prompts=PROMPTS) for _ in range(2)]
    assert repr(found[0]) == repr(found[1]) and torch.equal(torch.get_rng_state(), state)
    assert model.training and vars(tokenizer) == before
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_table_and_picture() -> None:
    seen: list[Any] = []
    found = tuned(progress=lambda done, wanted: seen.append((done, wanted)), anchors=True)
    assert seen == [(1, 2), (2, 2)]
    assert "chosen" in repr(found) and "<table" in found._repr_html_() and found.sentence in repr(found)
    assert len(plot_tuning(found).lines) == 4


def test_a_random_direction_is_as_long_and_points_elsewhere() -> None:
    v = SteeringVector({1: torch.ones(32), 2: torch.full((32,), 2.0, dtype=torch.bfloat16)})
    other = random_direction(v, seed=2)
    for n, direction in v.layer_activations.items():
        found = other.layer_activations[n]
        assert found.dtype == direction.dtype and found.float().norm() == pytest.approx(
            float(direction.float().norm()), rel=1e-2
        )
        assert abs(float(found.float() @ direction.float())) < 0.6 * float(direction.float().norm()) ** 2


def test_another_default_device_is_not_taken() -> None:
    wanted = tuned(anchors=True, before={"instruction": "Be loud."})
    with Elsewhere():
        found = tuned(anchors=True, before={"instruction": "Be loud."})
    assert repr(found) == repr(wanted)
