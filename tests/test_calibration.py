"""Calibration: budgets are met, the story tells it and drops it in time, and what cannot be calibrated is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering_vectors import (
    Provenance,
    SteeringVector,
    Tokens,
    ablation_operator,
    calibrate,
    divergence,
    explore,
    own_answers,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.evaluate.arguments import in_model
from steering_vectors.evaluate.calibration import calibrated_marks
from steering_vectors.steer.steering import Steering
from steering_vectors.train.budgets import BudgetSearch as _Search
from steering_vectors.train.damage import DamageScorer
from steering_vectors.vectors.strengths import calibration_of

KL = 0.002  # a tiny model with random weights has little to lose


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any, SteeringVector, Any]:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    v = SteeringVector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    return model, tokenizer, v, own_answers(model, tokenizer, ["Hello", "How are you?", "Once upon a time"])


def test_divergence_is_an_effect_by_prompt(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    d = divergence(model, tokenizer, v, answers, [-1, 0, 1, 2])
    assert (d.what, d.unit, d.should_rise) == ("damage", "nats per token", False)
    assert d.values.shape == (3, 4) and d[0] == 0.0 and d.p95[1] == 0.0 and 0 < d[1] < d[2]
    assert all(top >= mean for top, mean in zip(d.p95, d.mean, strict=True))
    assert d.tokens.shape == (sum(len(said) for _, said in answers.pairs), 4)
    assert "damage (nats per token)" in repr(d) and "95 %" in d._repr_html_()
    lone = divergence(model, tokenizer, v, ["Hello"], 1, seed=0)
    assert lone.values.shape == (1, 1)


def test_divergence_takes_several_steerings(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    both = divergence(model, tokenizer, [v, v], answers, [1])
    assert both[1] == pytest.approx(divergence(model, tokenizer, v, answers, [2])[2], rel=1e-3)


def test_damage_goes_with_the_square(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    d = divergence(model, tokenizer, v, answers, [0.05, 0.1])
    assert d[0.1] / d[0.05] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("factor", [1.0, 7.0, 0.01, -3.0])
def test_multiplier_one_costs_the_budget(tiny: Any, factor: float) -> None:
    model, tokenizer, v, answers = tiny
    found = calibrate(model, tokenizer, factor * v, KL, answers)
    facts = found.provenance.extra["calibration"]
    d = divergence(model, tokenizer, found, answers, [facts["negative"], 0, 1])
    assert d[1] == pytest.approx(KL, rel=0.1) and d[facts["negative"]] == pytest.approx(KL, rel=0.1)
    assert found.provenance.suggested_multiplier == facts["multiplier"] == 1.0 > 0 > facts["negative"]
    assert facts["kl"] == KL and 1 <= facts["measurements"] <= 6 and facts["reached"] == pytest.approx(d[1], rel=1e-3)
    assert facts["scaled_by"] > 0 and facts["prompts"] == "3 prompts of the user" and facts["model"]
    direction = torch.cosine_similarity(found.layer_activations[1], factor * v.layer_activations[1], dim=0)
    assert float(direction) == pytest.approx(1)


def test_the_length_of_the_vector_does_not_matter(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    one, seven = (calibrate(model, tokenizer, f * v, KL, answers).layer_activations[1] for f in (1, 7))
    assert torch.allclose(one, seven, rtol=1e-3)


def test_a_vector_stays_a_vector_and_a_steering_a_steering(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    assert isinstance(calibrate(model, tokenizer, v, KL, answers), SteeringVector)
    how = v.steering(tokens=Tokens.generated, multiplier=-2)
    found = calibrate(model, tokenizer, how, KL, answers)
    assert isinstance(found, Steering) and found.strength == 1.0 and repr(found.tokens) == "Tokens.generated"
    assert divergence(model, tokenizer, found, answers, [1])[1] == pytest.approx(KL, rel=0.1)
    cosine = torch.cosine_similarity(found.layer_activations[1], v.layer_activations[1], dim=0)
    assert float(cosine) == pytest.approx(-1)  # the steering's own sign is in the vector now
    assert calibration_of(found.vector.provenance)["tokens"] == "Tokens.generated"
    bare = calibrate(model, tokenizer, Steering({1: v.layer_activations[1]}), KL, answers)
    assert isinstance(bare, Steering) and calibration_of(bare.vector.provenance)


def test_one_scorer_serves_many_calls(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    scorer = DamageScorer(model, answers)
    for layer in (0, 1, 2):
        vector = SteeringVector({layer: v.layer_activations[1]})
        found = calibrate(model, tokenizer, vector, KL / 10, scorer)
        assert found == calibrate(model, tokenizer, vector, KL / 10, answers)
        assert divergence(model, tokenizer, found, scorer, [1])[1] == pytest.approx(KL / 10, rel=0.1)
    with pytest.raises(ValueError, match="another model"):
        divergence(tiny_model(), tokenizer, v, scorer)


def test_several_layers_and_parts(tiny: Any) -> None:
    model, tokenizer, _, answers = tiny
    for layer_type in ("decoder_block", "mlp", "self_attn"):
        v = SteeringVector({n: torch.linspace(-1, 1, 32) for n in (0, -1)}, layer_type)
        found = calibrate(model, tokenizer, v, KL / 10, answers)
        assert divergence(model, tokenizer, found, answers, [1])[1] == pytest.approx(KL / 10, rel=0.1)
        assert [*found.layer_activations] == [0, -1]


def test_the_norms_of_the_story_make_the_first_guess(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    told = replace(v, provenance=Provenance(activation_norms={1: 1e-3}))
    with pytest.raises(ValueError, match="no multiplier costs"):
        calibrate(model, tokenizer, told, KL, answers)


def test_arithmetic_rescales_it_or_drops_it(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    found = calibrate(model, tokenizer, v, KL, answers)
    facts, twice = calibration_of(found.provenance), calibration_of((2 * found).provenance)
    assert twice["multiplier"] == 0.5 and twice["negative"] == facts["negative"] / 2 and twice["kl"] == KL
    assert (2 * found).provenance.suggested_multiplier == 0.5
    assert calibration_of((found / 2).provenance)["multiplier"] == 2.0
    turned = calibration_of((-found).provenance)
    assert (turned["multiplier"], turned["negative"]) == (-facts["negative"], -1.0)
    assert divergence(model, tokenizer, -found, answers, [turned["multiplier"]]).mean[0] == pytest.approx(KL, rel=0.1)
    other = SteeringVector({2: torch.ones(32)}, provenance=found.provenance)
    for gone in (
        found + v,
        found + found,
        found - other,
        found.normalize(),
        found.at([0, 2]),
        0 * found,
        (found + other)[1],
    ):
        assert calibration_of(gone.provenance) is None and gone.provenance.suggested_multiplier is None
    for kept in (found[1], found.to(torch.float64), found.to(torch.bfloat16), found.steering().vector):
        assert calibration_of(kept.provenance) == facts
    two = calibrate(model, tokenizer, SteeringVector({0: torch.ones(32), 1: torch.ones(32)}), KL / 10, answers)
    assert calibration_of(two[[0, 1]].provenance) and calibration_of(two[0].provenance) is None


def test_it_goes_through_files(tiny: Any, tmp_path: Any) -> None:
    model, tokenizer, v, answers = tiny
    found = calibrate(model, tokenizer, v, KL, answers)
    found.save(tmp_path / "v.safetensors")
    again = SteeringVector.load(tmp_path / "v.safetensors")
    assert calibration_of(again.provenance) == calibration_of(found.provenance)
    found.to_gguf(tmp_path / "v.gguf", multiplier=2)
    there = SteeringVector.from_gguf(tmp_path / "v.gguf").provenance
    assert calibration_of(there)["multiplier"] == 0.5 and there.suggested_multiplier == 0.5


@pytest.mark.parametrize("kl", [0, -1, float("inf"), float("nan")])
def test_a_budget_that_is_none_is_refused(tiny: Any, kl: float) -> None:
    with pytest.raises(ValueError, match="nats per token above 0"):
        calibrate(tiny[0], tiny[1], tiny[2], kl, tiny[3])


def test_what_cannot_be_calibrated_is_refused(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    for wrong, words in [
        (0 * v, "zero at every layer"),
        (v.steering(multiplier=0), "multiplier 0"),
        (v.steering(operator=ablation_operator()), "set the fraction"),
        (SteeringVector({1: torch.ones(16)}), "width 16"),
        (replace(v, provenance=Provenance(num_layers=30)), "another model"),
        (replace(v, provenance=Provenance(hidden_size=64)), "another model"),
    ]:
        with pytest.raises(ValueError, match=words):
            calibrate(model, tokenizer, wrong, KL, answers)
    for wrong in ([v, v], {1: torch.ones(32)}, "v"):
        with pytest.raises(TypeError, match="one SteeringVector or one Steering"):
            calibrate(model, tokenizer, wrong, KL, answers)
    with pytest.raises(TypeError, match="nats per token"):
        calibrate(model, tokenizer, v, "normal", answers)
    with pytest.raises(ValueError, match="stays at .* no multiplier costs 9"):
        calibrate(model, tokenizer, v, 9, answers)


def test_the_name_of_the_model_counts_without_its_folder(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    before = model.config._name_or_path
    try:
        model.config._name_or_path = "/models/some-model"
        same, other = (replace(v, provenance=Provenance(model_id=name)) for name in ("org/some-model", "org/other"))
        assert (
            calibration_of(calibrate(model, tokenizer, same, KL, answers).provenance)["model"] == "/models/some-model"
        )
        with pytest.raises(ValueError, match="org/other"):
            calibrate(model, tokenizer, other, KL, answers)
    finally:
        model.config._name_or_path = before


@pytest.mark.parametrize("power", [1.0, 1.6, 2.0, 2.6, 3.5])
@pytest.mark.parametrize("guess", [0.1, 1.0, 50.0])
def test_the_search_meets_its_budget(power: float, guess: float) -> None:
    m, seen = _Search(lambda m: 0.3 * m**power / (1 + 0.05 * m**power), 0.1, most=100.0).run(guess)
    assert abs(seen[-1][1] / 0.1 - 1) <= 0.1 and seen[-1][0] == m and len(seen) <= 6


def test_the_search_survives_what_is_no_number() -> None:
    m, seen = _Search(lambda m: 0.02 * m * m if m < 20 else float("nan"), 0.1, most=30.0).run(30.0)
    assert abs(seen[-1][1] / 0.1 - 1) <= 0.1
    with pytest.raises(ValueError, match="does not grow steadily"):
        _Search(lambda m: 0.5, 0.1, most=10.0).run(1.0)
    with pytest.raises(ValueError, match="stays at 0"):
        _Search(lambda m: 0.0, 0.1, most=10.0).run(1.0)


def test_controls_take_their_marks_from_it(tiny: Any) -> None:
    model, tokenizer, v, answers = tiny
    found = calibrate(model, tokenizer, v, 0.1 * KL, answers)
    facts = calibration_of(found.provenance)
    marks = calibrated_marks(in_model(model, found))
    root = (0.1 / facts["kl"]) ** 0.5
    assert (
        marks[3] == 0
        and marks[5] == pytest.approx(root, rel=0.05)
        and marks[1] == pytest.approx(root * facts["negative"], rel=0.05)
    )
    assert marks[6] / marks[4] == pytest.approx(10**0.5, rel=0.06)
    assert calibrated_marks(in_model(model, found.steering(multiplier=2)))[5] == pytest.approx(root / 2, rel=0.05)
    for other in (v, [found, found], found.steering(tokens=Tokens.generated)):
        assert calibrated_marks(in_model(model, other)) is None
    control = explore(model, tokenizer, found, "Hello", max_new_tokens=2)
    assert control.axes["multiplier"].marks == marks and control.multiplier == marks[-2]


def test_nothing_of_the_users_is_changed(tiny: Any) -> None:
    _, tokenizer, v, answers = tiny
    model = tiny_model().train()
    state, before = torch.get_rng_state(), v.layer_activations[1].clone()
    calibrate(model, tokenizer, v, KL, answers)
    calibrate(model, tokenizer, v, KL, ["Hello"])
    assert model.training and torch.equal(torch.get_rng_state(), state) and torch.equal(v.layer_activations[1], before)
    assert v.provenance == Provenance() and all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
