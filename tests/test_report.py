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
from steering_vectors.evaluate.candidates import TuningRow
from steering_vectors.evaluate.intervals import Estimate
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


def with_chance(effect: list[float], chance: float) -> Report:
    "A card whose items move by given amounts, beside a random direction."
    found, change = card(), torch.tensor(effect)
    values = torch.stack([change * (0 if m <= 0 else 1) for m in found.gap.multipliers], 1)
    even = Estimate(chance, chance - 0.1, chance + 0.1, 16)
    anchor = TuningRow((1,), "a direction", even, 0.5, 0.1, kind="anchor", is_random=True)
    return replace(found, gap=replace(found.gap, values=values), anchors=(anchor,))


ALIKE = [0.4, 0.5, 0.6, 0.5] * 4  # the interval is about 0.47 to 0.53


@pytest.mark.parametrize(
    "effect, chance, words",
    [
        (ALIKE, 0.0, "The effect is there."),
        (ALIKE, 0.3, "The effect is there."),
        (ALIKE, 0.6, "no clearer than what a random direction of the same damage does, +0.60"),
        (ALIKE, -0.6, "no clearer than what a random direction of the same damage does, -0.60"),
        ([0.5, -0.5] * 8, 0.0, "These items show no effect."),
        ([-x for x in ALIKE], 0.6, "no clearer than what a random direction of the same damage does, +0.60"),
        ([-x for x in ALIKE], 0.0, "the wrong way: are the labels turned round?"),
    ],
)
def test_the_sentence_is_as_strong_as_the_interval(effect: list[float], chance: float, words: str) -> None:
    found = with_chance(effect, chance)
    assert words in found.sentence and words in repr(found)
    assert sum(one in found.sentence for one in ("effect is there", "no clearer", "no effect", "labels turned")) == 1


def test_a_random_direction_and_shuffled_labels_are_called_no_effect() -> None:
    v = vector()
    for seed in (5, 6, 7):
        found = card(steering=random_direction(v, seed), kl=0.1, anchors=True)
        assert "no clearer than what a random direction of the same damage does" in found.sentence
        assert found.anchors[0].is_random
    turned = [c if n % 2 else (c[0], c[2], c[1]) for n, c in enumerate(CONTRASTS)]
    assert "These items show no effect." in card(contrasts=turned, kl=0.1).sentence
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


@pytest.mark.parametrize(
    "how, why",
    [
        ({"operator": ablation_operator()}, "added with one multiplier"),
        ({"schedule": decay(4)}, "added with one multiplier"),
        ({"tokens": Tokens.response}, "acts on Tokens.response, and the pool was made for Tokens.all"),
    ],
    ids=repr,
)
def test_a_pool_foretells_no_other_steering(how: Any, why: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, 1, ["Hi", "Well?"], answers=4, length=4)
    v, reader = vector(model), train_reader(model, tokenizer, PAIRS, layers=1)
    found = card(model, v.steering(**how), reader=reader, pool=pool)
    assert found.predicted_shift is None and any(why in note for note in found.notes)
    assert found.open_cost.value > 0 and "predicted_shift" not in found.to_dict()
    all_tokens = card(model, v.steering(tokens=Tokens.all), reader=reader, pool=pool)
    assert all_tokens.predicted_shift == card(model, v, reader=reader, pool=pool).predicted_shift


def test_a_pool_of_the_same_tokens_or_of_other_layers() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    v, reader = vector(model), train_reader(model, tokenizer, PAIRS, layers=1)
    pool = sample_pool(model, tokenizer, 1, ["Hi", "Well?"], answers=4, length=4, tokens=Tokens.response)
    found = card(model, v.steering(tokens=Tokens.response), reader=reader, pool=pool)
    assert found.predicted_shift == pytest.approx(predicted_shift(model, tokenizer, v, pool, reader))
    assert any("acts on Tokens.all" in note for note in card(model, v, reader=reader, pool=pool).notes)
    elsewhere = sample_pool(model, tokenizer, 2, ["Hi", "Well?"], answers=4, length=4)
    assert any("made for [2]" in note for note in card(model, v, reader=reader, pool=elsewhere).notes)
    with pytest.raises(ValueError, match="holds answers of"):
        model.config._name_or_path = "here"
        card(model, v, reader=reader, pool=replace(pool, model="elsewhere"))


@pytest.mark.parametrize("how", [{}, {"tokens": Tokens.response}], ids=repr)
def test_damage_on_open_questions_is_measured_on_the_answers_of_the_pool(how: Any) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, 1, ["Hi", "Well?"], answers=6, length=4)
    steering = (40 * vector(model)).steering(**how)
    found = card(model, steering, pool=pool)
    wanted = divergence(model, tokenizer, steering, pool.answers(), [1])[1]
    assert found.open_cost.value == pytest.approx(wanted, rel=1e-3) and found.open_cost.n == 12
    assert found.cost.value != pytest.approx(wanted, rel=1e-2)
    assert found.to_dict()["damage_on_open_questions"] == found.open_cost.to_dict()
    assert "damage on open questions" in repr(found) and "damage on open questions" in found._repr_html_()
    assert "damage on open questions" not in repr(card(model, steering))


def test_other_readers_read_the_texts_that_are_written() -> None:
    model, tokenizer, v = tiny_model(), tiny_tokenizer(), 40 * vector()
    own, other = (train_reader(model, tokenizer, PAIRS, layers=n) for n in (1, 2))
    found = card(model, v, reader=own, others={"calm": other, "the same": own})
    assert found.others["the same"].shift(1.0) == found.shift.shift(1.0)
    alone = text_shift(model, tokenizer, v, other, ASKED["questions"], max_new_tokens=4)
    assert found.others["calm"].texts == alone.texts
    assert torch.allclose(found.others["calm"].scores, alone.scores, atol=1e-5)
    assert not torch.allclose(alone.scores, found.shift.scores, atol=1e-2)
    assert found.to_dict()["others"]["calm"]["up"] == found.others["calm"].shift(1.0).to_dict()
    assert "other concept, calm: texts read, up" in repr(found) and "other concept, calm" in found._repr_html_()
    line = "How far other concepts move along is not measured"
    assert line not in found.not_measured + repr(found) + found._repr_html_() + found.to_dict()["not_measured"]
    assert line in card().not_measured and line in repr(card()) and "others" not in card().to_dict()
    with pytest.raises(TypeError, match="readers by name"):
        card(model, v, reader=own, others=[other])
    with pytest.raises(ValueError, match="pass reader="):
        card(model, v, training_samples=None, contrasts=CONTRASTS[:3], others={"calm": other})


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
    model, tokenizer = tiny_model(), tiny_tokenizer()
    pool = sample_pool(model, tokenizer, 1, ["Hi", "Well?"], answers=6, length=4)
    others = {"calm": train_reader(model, tokenizer, PAIRS, layers=2)}
    found = card(model, kl=0.1, anchors=True, before={"instruction": "Be loud."}, pool=pool, others=others)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    v = found.vector
    v.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    assert report_of(loaded.provenance) == plain
    v.save_pretrained(tmp_path / "folder")
    readme = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert "## What was measured" in readme and plain["sentence"] in readme and "Not measured" in readme
    assert f"| multiplier that costs about 1 nat | {found.breaking:.2f} |" in readme
    assert f"| wrong way, share of items | {found.wrong_way:.0%} |" in readme
    assert f"| damage on open questions | {found.open_cost} |" in readme
    assert f"| shift of texts, predicted | {found.predicted_shift:+.2f} |" in readme
    assert f"| other concept, calm: texts read, up | {found.others['calm'].shift(1.0)} |" in readme
    assert f"{found.shift.surprise(-1):.2f} at -1" in readme and f"Texts were read by {found.reader}" in readme
    for row in found.anchors:
        assert f"| {row.effect} | {row.kl:.2f} | {row.method} |" in readme
    assert found.worst and plain["worst"][0]["prompt"] == found.worst[0][1][0]
    for change, (prompt, first, second) in found.worst:
        assert f"- {change:+.2f}: {prompt.strip()}: {first.strip()} *against* {second.strip()}" in readme
        assert f"{change:+.2f}: {prompt.strip()!r}: {first.strip()!r} against" in repr(found)
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
        {"sentence": "x", "worst": [3, {}, {"prompt": "<b>", "change": "x"}], "anchors": [[], {"method": "<b>"}]},
        {
            "sentence": "x",
            "others": {"<b>": 3, "c": {"up": {"value": 1}}},
            "reading": {"surprise": {"\n# c": 1}, "reader": 3},
        },
        {"sentence": "x", "breaking": "<b>", "wrong_way": True, "predicted_shift": [], "not_measured": 3, "worst": "x"},
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
    for words in ("<svg", "Not measured", "wrong way", "+0.31", "costs about 1 nat"):
        assert words in page
    assert found.to_dict()["predicted_shift"] == 0.31
    assert plot_report(found).get_xlabel() == "damage (nats per token)"
