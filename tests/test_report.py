"""The card: against a plain computation, in words that the numbers allow, through files and arithmetic; nothing of the user's changes."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_default_device import Elsewhere

from steering_vectors import (
    Report,
    Steering,
    SteeringVector,
    Tokens,
    ablation_operator,
    calibrate,
    completion_gap,
    decay,
    divergence,
    own_answers,
    plot_report,
    predicted_shift,
    random_direction,
    report,
    sample_pool,
    text_shift,
    train_reader,
    train_steering_vector,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.evaluate.report import _breaking
from steering_vectors.modes import undisturbed
from steering_vectors.vectors.evidence import report_of, report_section, without_report
from steering_vectors.vectors.provenance import Provenance

SAID = "come here|look at that|what a day|where are you|stop it now|this is good|give it back|let me in".split("|")
PAIRS = [tuple({"prompt": "Say: ", "response": text} for text in (said.upper(), said)) for said in SAID]
CONTRASTS = [(f"{n} and {n + 1}: ", f" YES {n}", f" yes {n}") for n in range(16)]
ASKED = {"prompts": ["Hello", "How are you?"], "questions": ["Hi", "Well?"], "max_new_tokens": 4}


def vector(model: Any = None) -> SteeringVector:
    return train_steering_vector(model or tiny_model(), tiny_tokenizer(), PAIRS, layers=[1])


def card(model: Any = None, steering: Any = None, contrasts: Any = CONTRASTS, **changed: Any) -> Report:
    model = model or tiny_model()
    asked = {"anchors": False, "training_samples": PAIRS} | ASKED | changed
    return report(model, tiny_tokenizer(), vector(model) if steering is None else steering, contrasts, **asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_numbers_are_those_of_the_measures(dtype: torch.dtype) -> None:
    model, tokenizer = tiny_model().to(dtype), tiny_tokenizer()
    v = calibrate(model, tokenizer, vector(model), prompts=ASKED["prompts"])
    found = card(model, v)
    gap = completion_gap(model, tokenizer, v, CONTRASTS, [-1, 0, 1]).values
    assert found.up.value == pytest.approx(float((gap[:, 2] - gap[:, 1]).mean()), abs=1e-4)
    assert found.down.value == pytest.approx(float((gap[:, 1] - gap[:, 0]).mean()), abs=1e-4)
    assert found.wrong_way == float((gap[:, 2] < gap[:, 1]).double().mean())
    answers = own_answers(model, tokenizer, ASKED["prompts"], seed=1)
    assert found.cost.value == pytest.approx(divergence(model, tokenizer, v, answers, [1])[1], rel=1e-3)
    assert found.worst == sorted(found.worst, key=lambda pair: pair[0]) and all(change < 0 for change, _ in found.worst)
    if found.breaking is not None:
        assert 0.5 <= found.damage[found.breaking] <= 2 and found.breaking in found.damage.multipliers


def test_texts_are_what_steering_writes_and_the_unsteered_model_reads() -> None:
    model, tokenizer, v = tiny_model(), tiny_tokenizer(), 4 * vector()
    reader = train_reader(model, tokenizer, PAIRS, layers=1)
    found = text_shift(model, tokenizer, v, reader, ["Hi", "How are you today?"], [-1, 1], max_new_tokens=5)
    for i, m in enumerate(found.multipliers):
        for q, question in enumerate(found.questions):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
            with undisturbed(model), v.apply(model, multiplier=m):
                out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            said = out[0, ids.shape[1] :].tolist()
            said = said[: said.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in said else said
            said = said or out[0, ids.shape[1] : ids.shape[1] + 1].tolist()
            assert found.texts[i][q] == tokenizer.decode(said, skip_special_tokens=True)
            wanted = reader.scores(model, tokenizer, [(ids[0].tolist(), said)])
            assert float(found.scores[q, i]) == pytest.approx(float(wanted), abs=1e-4)
            with undisturbed(model):
                logs = model(torch.cat([ids[0], torch.tensor(said)])[None]).logits[0].log_softmax(-1)
            surprise = -torch.stack([logs[ids.shape[1] - 1 + j, t] for j, t in enumerate(said)]).mean()
            assert float(found.surprises[q, i]) == pytest.approx(float(surprise), abs=1e-4)
    assert found.shift(1).value == pytest.approx(float((found.scores[:, 2] - found.scores[:, 0]).mean()))
    assert found.shift(-1).value == pytest.approx(float((found.scores[:, 0] - found.scores[:, 1]).mean()))


def test_few_items_repeats_and_missing_samples_are_said_in_words() -> None:
    found = card(contrasts=CONTRASTS[:3])
    assert (
        "too few for an interval" in found.sentence and found.up.low is None and "3 items are too few" in found.notes[0]
    )
    with pytest.warns(UserWarning, match="8 of 8 items hold texts that were trained on"):
        found = card(contrasts=[("Say: ", said.upper(), said) for said in SAID])
    assert any("memory" in note for note in found.notes) and "memory" in repr(found) and "memory" in found._repr_html_()
    assert any("nobody looked" in note for note in card(training_samples=None).notes)
    assert any("breaks text" in note for note in card(steering=300 * vector()).notes)


def test_a_random_direction_and_shuffled_labels_are_called_no_effect() -> None:
    v = vector()
    for seed in range(3):
        found = card(steering=random_direction(v, seed + 10), kl=0.1, anchors=True, contrasts=CONTRASTS)
        assert "The effect is there" not in found.sentence or found.up.low > abs(found.anchors[0].effect.value)
    turned = [c if n % 2 else (c[0], c[2], c[1]) for n, c in enumerate(CONTRASTS)]
    assert "The effect is there" not in card(contrasts=turned, kl=0.1).sentence
    other = [(p, b, a) for p, a, b in CONTRASTS]
    assert card(contrasts=other).up.value == pytest.approx(-card().up.value, abs=1e-5)


def test_anchors_cost_the_same_and_words_in_front_stand_beside() -> None:
    found = card(kl=0.1, anchors=True, before={"instruction": "Be loud."}, seed=0)
    assert [row.method for row in found.anchors] == ["the largest of 4 random directions", "instruction"]
    assert abs(found.anchors[0].kl / found.cost.value - 1) <= 0.101
    assert "instruction" in repr(found)


def test_the_readers_that_are_used() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    own = train_reader(model, tokenizer, PAIRS, layers=1)
    assert "of its own" in card(reader=own).reader and "on training" in card().reader
    assert any("favours this vector" in note for note in card().notes)
    assert "on contrasts" in card(training_samples=None).reader
    assert card(training_samples=None, contrasts=CONTRASTS[:3]).shift is None


@pytest.mark.parametrize(
    "how", [{"tokens": Tokens.response}, {"operator": ablation_operator()}, {"multiplier": -2.0}], ids=repr
)
def test_any_one_steering_can_be_judged(how: Any) -> None:
    found = card(steering=vector().steering(**how), anchors=True)
    assert found.cost.value > 0 and repr(found) and found.to_dict()["steering"] == repr(vector().steering(**how))


def test_a_pool_foretells_the_texts() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, 1, ["Hi", "Well?"], answers=6, length=4)
    v, reader = vector(model), train_reader(model, tokenizer, PAIRS, layers=1)
    found = card(model, v.steering(multiplier=0.5), reader=reader, pool=pool)
    wanted = predicted_shift(model, tokenizer, v, pool, reader, 0.5)
    assert found.predicted_shift == pytest.approx(wanted) and wanted != 0
    assert found.to_dict()["predicted_shift"] == found.predicted_shift
    assert "shift of texts, predicted" in repr(found)
    for how in ({"operator": ablation_operator()}, {"schedule": decay(4)}):
        with pytest.raises(ValueError, match="Leave the pool out"):
            card(model, v.steering(**how), reader=reader, pool=pool)


def test_the_breaking_mark() -> None:
    assert _breaking(lambda m: 0.1 * m**2, 0.1) == pytest.approx(10**0.5)
    assert 0.8 < 0.3 * abs(_breaking(lambda m: 0.3 * m**1.6, 0.3) or 0) ** 1.6 < 1.25
    assert _breaking(lambda m: 0.0, 0.0) is None and _breaking(lambda m: 0.2, 0.2) is None


def test_refusals() -> None:
    v = vector()
    for steering, contrasts, kind, words in [
        ([v, v], CONTRASTS, TypeError, "judges one"),
        (v.steering(multiplier=0), CONTRASTS, ValueError, "multiplier 0"),
        (v, [], ValueError, "No contrasts"),
        (SteeringVector({9: torch.ones(32)}), CONTRASTS, ValueError, "ayer 9"),
        (SteeringVector({1: torch.ones(31)}), CONTRASTS, ValueError, "31"),
        (v.steering(multiplier=[1.0, 2.0]), CONTRASTS, ValueError, "multiplier for each row"),
    ]:
        with pytest.raises(kind, match=words):
            card(steering=steering, contrasts=contrasts)
    with pytest.raises(TypeError, match="without a provenance"):
        _ = replace(card(), steering=Steering({1: torch.ones(32)})).vector


def test_it_travels_with_the_vector(tmp_path: Path) -> None:
    found = card()
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    v = found.vector
    v.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    assert report_of(loaded.provenance) == plain
    v.save_pretrained(tmp_path / "folder")
    readme = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert "## What was measured" in readme and plain["sentence"] in readme and "Not measured" in readme
    assert SteeringVector.from_pretrained(tmp_path / "folder").provenance.extra["report"] == plain
    for changed in (2 * v, -v, v + v, v.at([2]), calibrate(tiny_model(), tiny_tokenizer(), v, prompts=["Hello"])):
        assert report_of(changed.provenance) is None
    for same in (1 * v, v[1], v.to(torch.bfloat16)):
        assert report_of(same.provenance) == plain


def test_a_section_expects_nothing_of_a_file() -> None:
    for odd in (
        {},
        {"sentence": 3},
        {"sentence": "a|b\n# c", "effect": [1], "texts": {"1": "x|y\n<b>"}, "notes": 3, "damage": {"value": "x"}},
    ):
        text = report_section(Provenance(extra={"report": odd}))
        assert "\n# c" not in text and "<b>" not in text
    assert report_section(Provenance(extra={"report": "text"})) == "" and without_report(Provenance()) == Provenance()


def test_it_is_reproducible_and_changes_nothing() -> None:
    model, tokenizer, v = tiny_model().train(), tiny_tokenizer(), vector()
    weights, before, state = [p.clone() for p in model.parameters()], dict(vars(tokenizer)), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [report(model, tokenizer, v, CONTRASTS, PAIRS, **ASKED) for _ in range(2)]
    assert repr(found[0]) == repr(found[1]) and found[0].to_dict() == found[1].to_dict()
    assert torch.equal(torch.get_rng_state(), state) and model.training and vars(tokenizer) == before
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_default_device_is_not_taken() -> None:
    wanted = card(anchors=True)
    with Elsewhere():
        found = card(anchors=True)
    assert repr(found) == repr(wanted)


def test_page_and_picture() -> None:
    found = replace(card(), predicted_shift=0.31)
    page = found._repr_html_()
    for words in ("<svg", "Not measured", "wrong way", "+0.31", "breaking multiplier"):
        assert words in page
    assert found.to_dict()["predicted_shift"] == 0.31
    assert plot_report(found).get_xlabel() == "damage (nats per token)"
