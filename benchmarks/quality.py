#!/usr/bin/env python3
"""What the measures of steering cost and whether their numbers hold, on the embedded model and sets of persona statements.

    python benchmarks/quality.py divergence --data DIR   # damage is 0 at 0 and goes with the square of the multiplier
    python benchmarks/quality.py calibrate --data DIR    # 5 sets x 6 layers: measurements needed, and other requests
    python benchmarks/quality.py tune --data DIR         # layer chosen by evidence against the middle one; what it reports, checked again
    python benchmarks/quality.py anchors --data DIR      # random direction, untuned vector, instruction, examples on the same items
    python benchmarks/quality.py optimize --data DIR     # vectors learned by gradient against the mean difference, at equal damage
    python benchmarks/quality.py optimize_more --data DIR    # further ways of learning: steps, BiPO, response tokens, two layers
    python benchmarks/quality.py texts --data DIR [--pool FILE] [--quick]    # what the vectors do to texts that the model writes
    python benchmarks/quality.py texts_more --data DIR [--pools DIR] [--ways NAME ...]    # further ways of moving texts
    python benchmarks/quality.py speed --data DIR        # one layer and multiplier of 36 pairs, new way against plain batches
    python benchmarks/quality.py divergence calibrate --data DIR   # several in one run train their vectors once

DIR holds files NAME.jsonl with one statement per line, as {"statement", "answer_matching_behavior"}, or with one question
and its lettered choices, as {"question", "answer_matching_behavior", "answer_not_matching_behavior"}. A set is split by its
seed: 80 pairs train, 36 others test. Each command prints a table and, at its end, one line per mark with what was reached.
`--sets` takes other sets of the collection, or one set at a time. The answers to questions with choices are often one word,
the same in training and test; such a set is a check with other prompts, not with other answers.
"""

import argparse
import contextlib
import functools
import json
import math
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steering_vectors import (
    Pool,
    Steering,
    SteeringVector,
    TextShift,
    Tokens,
    calibrate,
    completion_gap,
    divergence,
    few_shot,
    optimize_steering_vector,
    own_answers,
    predicted_shift,
    prompt_effect,
    sample_pool,
    train_reader,
    train_steering_vector,
    tune,
)
from steering_vectors.demo import load_demo_model
from steering_vectors.evaluate.intervals import estimate
from steering_vectors.modes import undisturbed
from steering_vectors.train import scores as scores_room
from steering_vectors.train.continuations import plain_passes
from steering_vectors.train.curvature import damage_curvature, mixed
from steering_vectors.train.damage import DamageScorer, OwnAnswers
from steering_vectors.train.gradients import ShiftPlace
from steering_vectors.train.pools import _gradients, many_answers
from steering_vectors.train.prompts import continuation_ids
from steering_vectors.train.scores import ScoringWay, TextScorer
from steering_vectors.train.written import equal_parts

SETS = ("agreeableness", "interest-in-science", "politically-liberal", "openness", "interest-in-art")
LAYERS = (9, 12, 15, 18, 21, 24)
TRAINING_QUESTION, TEST_QUESTION = "Say something that you would say.", "What do you think?"

UNSEEN = [  # requests that are not among the everyday prompts
    "How do I plant tomatoes?",
    "What is the largest ocean?",
    "Write a friendly reminder about a library book.",
    "Why do cats purr?",
    "Help me choose a film for tonight.",
    "How many days are there in six weeks?",
    "What is a good way to learn the names of new colleagues?",
    "Tell me something about mountains.",
    "Write a sentence with the word 'umbrella' in it.",
    "How do I fix a squeaky door?",
    "What is jazz?",
    "Good evening! Any news?",
    "Explain how a rainbow forms.",
    "What can I cook with lentils?",
]


TEXT_QUESTIONS = [  # no vector and no pool has seen these
    "What did you do today?",
    "What is your opinion on museums?",
    "How would you spend a million dollars?",
    "Tell me what you think about your neighbours.",
    "What should our government do first?",
    "Is it better to plan or to improvise?",
    "What do you like to talk about at dinner?",
    "Which book would you give to everybody?",
    "How do you feel when you meet new people?",
    "What is the point of art?",
    "Would you rather travel or stay at home?",
    "What makes you proud?",
    "Tell me about something that you find boring.",
    "What would you say to a friend who failed an exam?",
    "What does the future look like?",
    "How do you choose what to believe?",
    "A colleague takes credit for your work. What now?",
    "What is a good way to spend a Sunday?",
    "Describe yourself in two sentences.",
    "What should people stop doing?",
    "What have you learned from mistakes?",
    "Do you enjoy being alone?",
    "What would you change about the world?",
    "What is the most interesting thing you know?",
]


# --- data


def contrasts_of(folder: Path, name: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    "80 contrasts to train under one question, and 36 others under another one to test."
    return contrasts(folder, name, 0, 80, TRAINING_QUESTION), contrasts(folder, name, 80, 116)


def contrasts(
    folder: Path, name: str, first: int, last: int, question: str = TEST_QUESTION
) -> list[tuple[str, str, str]]:
    "Items of a set, under a question if they have none of their own."
    return [(own or question, good, bad) for own, good, bad in all_items(folder, name)[first:last]]


@functools.cache
def all_items(folder: Path, name: str) -> list[tuple[str, str, str]]:
    "Every item of a set, in the order of its seed: its question or an empty text, what matches, and what does not."
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    if "statement" not in rows[0]:
        found = list(dict.fromkeys(item for row in rows for item in choice_items(row)))
        random.Random(SEED).shuffle(found)
        return found
    sides = [[r["statement"] for r in rows if r["answer_matching_behavior"].strip() == word] for word in ("Yes", "No")]
    for side in sides:
        random.Random(SEED).shuffle(side)
    return [("", *both) for both in zip(*sides, strict=False)]


def choice_items(row: dict[str, str]) -> list[tuple[str, str, str]]:
    "A question with lettered choices, as a question with two answers in words; none for a row of another form."
    asked, _, listed = row["question"].partition("\n\nChoices:")
    words = {letter: text.strip() for letter, text in re.findall(r"^\s*\(([A-Z])\)(.+)$", listed, re.MULTILINE)}
    sides = [re.findall(r"\(([A-Z])\)", row[f"answer_{which}_behavior"]) for which in ("matching", "not_matching")]
    chosen = [words.get(side[0], "") if side else "" for side in sides]
    return [(asked.removeprefix("Question: ").strip(), *chosen)] if all(chosen) else []  # type: ignore[list-item]


@functools.cache
def vector_of(model: Any, tokenizer: Any, folder: Path, name: str) -> SteeringVector:
    "The mean difference over the statements' own tokens."
    samples = training_chats(folder, name)
    return train_steering_vector(model, tokenizer, samples, layers=LAYERS, read=Tokens.generated)


@functools.cache
def everyday(model: Any, tokenizer: Any) -> DamageScorer:
    "The model's own answers to everyday requests, drawn once."
    return DamageScorer(model, own_answers(model, tokenizer))


def marks(*lines: tuple[str, bool]) -> int:
    "Print what was asked and whether it was reached."
    for text, reached in lines:
        print(f"{'reached' if reached else 'MISSED '}  {text}")
    return int(not all(reached for _, reached in lines))


# --- commands


def run_divergence(model: Any, tokenizer: Any, folder: Path) -> int:
    "Damage at 0, and its slope between half and twice the multiplier."
    answers, slopes, at_zero = everyday(model, tokenizer), [], []
    print(f"{answers.answers}\n{'set':22}" + "".join(f"{'L' + str(n):>16}" for n in LAYERS) + "   damage at 1 (slope)")
    for name in SETS:
        vector, cells = vector_of(model, tokenizer, folder, name), []
        for layer in LAYERS:
            d = divergence(model, tokenizer, vector[layer], answers, multipliers=[0, 0.5, 1, 2])
            slope = math.log(d[2] / d[0.5]) / math.log(4)
            cells.append(f"{d[1]:.3f} ({slope:.2f})")
            slopes.append(slope)
            at_zero.append(d[0])
        print(f"{name:22}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    return marks(
        (f"damage at 0 is exactly 0: largest {max(at_zero)}", max(at_zero) == 0.0),
        (
            f"slope in 1.8 to 2.2 everywhere: {min(slopes):.2f} to {max(slopes):.2f}",
            1.8 <= min(slopes) <= max(slopes) <= 2.2,
        ),
    )


def run_calibrate(model: Any, tokenizer: Any, folder: Path, kl: float = 0.1) -> int:
    "The budget met, in how many measurements, and on requests that were not used."
    answers, others = everyday(model, tokenizer), own_answers(model, tokenizer, UNSEEN)
    unseen, asked, counts, apart, pushes = DamageScorer(model, others), [], [], [], []
    print(f"{answers.answers}; checked on {others}\nset, layer: measurements, damage asked and on other requests, push")
    for name in SETS:
        vector = vector_of(model, tokenizer, folder, name)
        for layer in LAYERS:
            v = calibrate(model, tokenizer, vector[layer], kl, answers)
            facts = v.provenance.extra["calibration"]
            with torch.no_grad():
                there = float(unseen.mean([v.steering()])) / kl
            here = facts["reached"] / kl
            push = float(v[layer].layer_activations[layer].norm()) / vector.provenance.activation_norms[layer]
            asked.append(here), apart.append(there), pushes.append(push)
            counts.extend([facts["measurements"], facts["negative_measurements"]])
            print(
                f"{name:22} L{layer:<3} {counts[-2]} and {counts[-1]}   {here:.3f}   {there:.3f}   {push:.3f}",
                flush=True,
            )
    again = calibrate(model, tokenizer, 7 * vector[LAYERS[0]], kl, answers)[LAYERS[0]]
    once = calibrate(model, tokenizer, vector[LAYERS[0]], kl, answers)[LAYERS[0]]
    ratio = float(again.layer_activations[LAYERS[0]].norm() / once.layer_activations[LAYERS[0]].norm())
    middle = statistics.median(apart)
    return marks(
        (f"within 10 %: {min(asked):.3f} to {max(asked):.3f}", 0.9 <= min(asked) <= max(asked) <= 1.1),
        (f"at most 3 measurements a side: most {max(counts)}, mean {statistics.mean(counts):.2f}", max(counts) <= 3),
        (
            f"on {len(UNSEEN)} other requests 0.8 to 1.4: {min(apart):.2f} to {max(apart):.2f}",
            0.8 <= min(apart) <= max(apart) <= 1.4,
        ),
        (f"their median 0.95 to 1.15: {middle:.2f}", 0.95 <= middle <= 1.15),
        (f"seven times the vector calibrates to the same: ratio {ratio:.4f}", abs(ratio - 1) <= 0.05),
        (
            f"push of 0.1 nats, in lengths of the hidden state: {min(pushes):.2f} to {max(pushes):.2f}, median {statistics.median(pushes):.2f}",
            True,
        ),
    )


def run_speed(model: Any, tokenizer: Any, folder: Path, rounds: int = 3) -> int:
    "One layer and multiplier of 36 pairs, in turn: packed rows above the layer, and plain batches of the best size."
    _, test = contrasts_of(folder, SETS[0])
    pairs = [continuation_ids(tokenizer, question, text) for question, *both in test for text in both]
    how = [
        SteeringVector(
            {15: torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))}
        ).steering()
    ]
    new, sizes = TextScorer(model, pairs), (8, 16, 36, 72)
    plain = {size: TextScorer(model, pairs, size) for size in sizes}
    choose = scores_room._way_of

    def once(scorer: TextScorer, packed: bool, m: float) -> tuple[float, torch.Tensor]:
        scores_room._way_of = choose if packed else (lambda *_: ScoringWay())  # type: ignore[assignment]
        try:
            start = time.perf_counter()
            with torch.no_grad():
                found = scorer.scores(how, m)
            return time.perf_counter() - start, found
        finally:
            scores_room._way_of = choose

    first, _ = once(new, True, 0.5)
    times: dict[Any, list[float]] = {"new": [], **{size: [] for size in sizes}}
    apart = 0.0
    for i in range(rounds):
        seconds, found = once(new, True, 1.0 + i)
        times["new"].append(seconds)
        for size in sizes:
            seconds, wanted = once(plain[size], False, 1.0 + i)
            times[size].append(seconds)
            apart = max(apart, float((found - wanted).abs().max()))
    middle = {name: statistics.median(some) for name, some in times.items()}
    tokens = sum(now.inputs["input_ids"].numel() for laid in new._laid.values() for now in laid.passes)
    best = min(sizes, key=lambda size: middle[size])
    padded = sum(now.inputs["input_ids"].numel() for now in plain_passes(pairs, [None], best))
    print(
        f"{tokens} packed tokens, {padded} padded ones; {new.pairs and len(new.pairs)} completions, {rounds} rounds in turn"
    )
    print(
        "seconds: "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in middle.items())
        + f"; the first time, with checks, {first:.2f}"
    )
    ratio = middle["new"] / middle[best]
    return marks(
        (f"at most 0.55 of the time of plain batches of {best}: {ratio:.3f}", ratio <= 0.55),
        (f"equal to 1e-4: {apart:.1e}", apart <= 1e-4),
    )


def training_chats(folder: Path, name: str) -> list[tuple[Any, Any]]:
    "The 80 training pairs as conversations."
    return [
        tuple([{"role": "user", "content": question}, {"role": "assistant", "content": text}] for text in both)
        for question, *both in contrasts_of(folder, name)[0]
    ]  # type: ignore[misc]


def most_sets() -> int:
    "Four of five sets, or as large a part of those that are asked for."
    return math.ceil(0.8 * len(SETS))


def run_tune(model: Any, tokenizer: Any, folder: Path) -> int:
    "72 other pairs choose and judge; the 36 test pairs check the choice against the middle layer, and the report."
    ratios, inside, seconds, walls, ours, middle_layer, by_mean = [], [], [], [], [], [], []
    print(f"{'set':22} chosen   reported                 again, on 36 others      middle layer             seconds")
    for name in SETS:
        start, begun = time.process_time(), time.perf_counter()
        found = tune(
            model, tokenizer, training_chats(folder, name), contrasts(folder, name, 116, 188), LAYERS,
            read=Tokens.generated, anchors=False,
        )  # fmt: skip
        seconds.append(time.process_time() - start)
        walls.append(time.perf_counter() - begun)
        middle = next(row for row in found.rows if row.layers == (15,))
        largest = max(found.rows, key=lambda row: row.by_choosers)
        test = contrasts(folder, name, 80, 116)
        changes = [
            completion_gap(model, tokenizer, row.steering, test, [0, 1]).values
            for row in (found.chosen, middle, largest)
        ]
        again, other, greedy = (estimate(values[:, 1] - values[:, 0]) for values in changes)
        ours.append(again.value), middle_layer.append(other.value), by_mean.append(greedy.value)
        ratios.append(again.value / other.value)
        inside.append(found.chosen.effect.value in again)
        layer = found.chosen.layers[0]
        shown = [str(e) for e in (found.chosen.effect, again, other)]
        print(
            f"{name:22} L{layer:<6} " + " ".join(f"{x:24}" for x in shown) + f" {seconds[-1]:.0f}"
            f"  (largest mean: L{largest.layers[0]}, {greedy.value / other.value:.2f} of the middle)",
            flush=True,
        )
    pooled = sum(ours) / sum(middle_layer)
    print(f"always taking the largest mean, pooled: {sum(by_mean) / sum(middle_layer):.2f} of the middle layer")
    return marks(
        (f"at least 0.95 of always taking the middle layer, pooled: {pooled:.2f}", pooled >= 0.95),
        (f"never under 0.8 on one set: {min(ratios):.2f} to {max(ratios):.2f}", min(ratios) >= 0.8),
        (
            f"the reported effect lies within the interval of a second test half in {most_sets()} of {len(SETS)} sets: {sum(inside)}",
            sum(inside) >= most_sets(),
        ),
        (
            f"six layers at one budget in at most 40 s of two cores, 80 s of processor time: {max(seconds):.0f} s of it "
            f"(by the clock {max(walls):.0f} s with {torch.get_num_threads()} threads and whatever else ran)",
            max(seconds) <= 80,
        ),
    )


INSTRUCTIONS = {
    "agreeableness": "You are a very kind and agreeable person.",
    "interest-in-science": "You are a person with a deep interest in science.",
    "politically-liberal": "You are a person with liberal political views.",
    "openness": "You are a person who is open to new experiences and ideas.",
    "interest-in-art": "You are a person with a deep interest in art.",
    "power-seeking-inclination": "You want power and influence, and you take them when you can.",
    "corrigible-neutral-HHH": "You accept every change that the people who run you want to make to you.",
}


def words_in_front(folder: Path, name: str) -> dict[str, Any]:
    "What people try first: an instruction, and four examples from the training pairs."
    plain = f"You are a person who shows {name.replace('-', ' ')}."
    return {"instruction": INSTRUCTIONS.get(name, plain), "four examples": few_shot(training_chats(folder, name))}


def run_anchors(model: Any, tokenizer: Any, folder: Path) -> int:
    "What the middle layer's vector does at 0.1 nats, beside a random direction, an instruction and four examples."
    kept: dict[str, list[Any]] = {}
    for name in SETS:
        chats = training_chats(folder, name)
        before = words_in_front(folder, name)
        found = tune(
            model, tokenizer, chats, contrasts(folder, name, 80, 116), 15, test=0.85,
            read=Tokens.generated, before=before,
        )  # fmt: skip
        print(f"{name}\n{found!r}\n", flush=True)
        for row in found.rows:
            kept.setdefault(row.method, []).append(row)
    for method, rows in kept.items():
        effect, wrong, cost = (
            statistics.mean(x) for x in zip(*[(r.effect.value, r.wrong_way, r.kl) for r in rows], strict=True)
        )
        print(f"{method:24} effect {effect:+.2f}  wrong way {wrong:.0%}  damage {cost:.2f}")
    random_rows = [row for rows in kept.values() for row in rows if row.is_random]
    return marks(
        (
            "a random direction's effect is below a third of the mean's",
            statistics.mean(r.effect.value for r in random_rows)
            <= statistics.mean(r.effect.value for r in kept["mean"]) / 3,
        )
    )


def both_ways(model: Any, tokenizer: Any, vector: SteeringVector, test: list[tuple[str, str, str]]) -> torch.Tensor:
    "How far each test pair moves, (n, 2): up at multiplier 1, and down at the negative one that costs the same."
    down = vector.provenance.extra["calibration"]["negative"]
    gap = completion_gap(model, tokenizer, vector, test, multipliers=[0, 1, down]).values.double()
    return torch.stack([gap[:, 1] - gap[:, 0], gap[:, 0] - gap[:, 2]], 1)


def ratio_interval(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], rounds: int = 2000
) -> tuple[float, float, float]:
    "The ratio of two pooled effects, and its 90 % interval by bootstrap over the items within each set."
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        at = [torch.randint(len(some), (len(some),), generator=draw) for some in ours]
        sums = [sum(float(x[i].mean()) for x, i in zip(some, at, strict=True)) for some in (ours, theirs)]
        found.append(sums[0] / sums[1])
    low, high = torch.tensor(found).quantile(torch.tensor([0.05, 0.95])).tolist()
    return sum(float(x.mean()) for x in ours) / sum(float(x.mean()) for x in theirs), low, high


def pooled_interval(some: list[torch.Tensor], rounds: int = 2000) -> str:
    "The mean over sets with its 90 % interval, by bootstrap over the items within each set."
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        at = [torch.randint(len(x), (len(x),), generator=draw) for x in some]
        found.append(statistics.mean(float(x[i].mean()) for x, i in zip(some, at, strict=True)))
    low, high = torch.tensor(found).quantile(torch.tensor([0.05, 0.95])).tolist()
    return f"{statistics.mean(float(x.mean()) for x in some):+.2f} [{low:+.2f}, {high:+.2f}]"


def effects_table(
    effects: dict[str, list[torch.Tensor]], base: str, costs: dict[str, list[float]] | None = None
) -> dict[str, tuple[float, float, float]]:
    "Print the effect of each method, (n, 2) or (n, 1) if it has one direction, and return its ratio to that of `base`."
    print(
        f"{'method':34}{'up':>7}{'wrong':>7}{'down':>7}{'wrong':>7}{'damage':>8}   times {base} [90 %]   sets ahead   by set"
    )
    found = {}
    for name, some in effects.items():
        if not some:
            continue
        each, base_effects = torch.cat(some), [x[:, : some[0].shape[1]] for x in effects[base][: len(some)]]
        found[name] = ratio_interval(some, base_effects)
        ratios = [float(x.mean()) / float(y.mean()) for x, y in zip(some, base_effects, strict=True)]
        sides = "".join(
            f"{each[:, i].mean():+7.2f}{(each[:, i] < 0).double().mean():7.2f}" for i in range(each.shape[1])
        )
        cost = "" if costs is None or name not in costs else f"{statistics.mean(costs[name]):.2f}"
        print(
            f"{name:34}{sides:28}{cost:>8}   {found[name][0]:.2f} [{found[name][1]:.2f}, {found[name][2]:.2f}]"
            f"{sum(x > 1 for x in ratios):>12} of {len(some)}   " + " ".join(f"{x:.2f}" for x in ratios),
            flush=True,
        )
    return found


def written(
    model: Any, tokenizer: Any, steering: Steering | None, multiplier: float = 1.0, before: Any = (), length: int = 28
) -> list[Any]:
    "Greedy answers to the questions, as ids of the question and of the answer; `before` has messages in front."
    chats = [[*before, {"role": "user", "content": question}] for question in TEXT_QUESTIONS[:NUM_QUESTIONS]]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    steered = contextlib.nullcontext() if steering is None else steering.times(multiplier).apply(model, prompt=batch)
    with torch.no_grad(), steered:
        out = model.generate(**batch, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    start, found = batch["input_ids"].shape[1], []
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], out[:, start:].tolist(), strict=True):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        found.append((ids[mask.bool()].tolist(), row[:end]))
    return found


@functools.cache
def plain_questions(tokenizer: Any) -> list[list[int]]:
    "The ids of each question alone, under which all texts are read."
    chats = [[{"role": "user", "content": question}] for question in TEXT_QUESTIONS[:NUM_QUESTIONS]]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]


def surprise(model: Any, texts: list[Any]) -> float:
    "How improbable texts are to the unsteered model, in nats per token."
    with torch.no_grad():
        return -float(TextScorer(model, texts).scores().mean())


@dataclass
class Way:
    "How texts are changed: by steering, up at 1 and down at `down`; or by words in front of the question."

    steering: Steering | None = None
    down: float = -1.0
    before: Any = ()
    at_budget: bool = True

    @classmethod
    def of(cls, steering: Steering) -> "Way":
        "A calibrated steering."
        return cls(steering, steering.vector.provenance.extra["calibration"]["negative"])  # type: ignore[union-attr]


def texts_of(model: Any, tokenizer: Any, way: Way) -> tuple[tuple[float, float], list[list[Any]]]:
    "Two multipliers and the texts at each: of a steering up and down, of words in front with them and without."
    if way.steering is not None:
        numbers = (1.0, way.down)
        return numbers, [written(model, tokenizer, way.steering, m) for m in numbers]
    both = [written(model, tokenizer, None, before=before) for before in (way.before, ())]
    questions = plain_questions(tokenizer)
    return (1.0, 0.0), [[(q, said) for q, (_, said) in zip(questions, some, strict=True)] for some in both]


def as_shift(model: Any, tokenizer: Any, way: Way, reader: Any) -> TextShift:
    "The texts of one way, read by the unsteered model."
    numbers, both = texts_of(model, tokenizer, way)
    every = [pair for some in both for pair in some]
    words = tuple(tuple(tokenizer.decode(said) for _, said in some) for some in both)
    with torch.no_grad():
        surprises = -TextScorer(model, every).scores().cpu().reshape(2, -1).T
    scores = reader.scores(model, tokenizer, every).reshape(2, -1).T
    questions = tuple(TEXT_QUESTIONS[:NUM_QUESTIONS])
    return TextShift(questions, numbers, words, scores, surprises, tuple(map(tuple, both)))


def moved_by(shift: TextShift) -> torch.Tensor:
    "How far each text moves per direction: half the distance between up and down, or all of it if down is unsteered."
    high, low = shift.scores.double().T
    return (high - low) / (1 if shift.multipliers[1] == 0 else 2)


def gap_moves(model: Any, tokenizer: Any, way: Way, test: list[tuple[str, str, str]]) -> torch.Tensor:
    "How far each test item moves: (n, 2) up and down for a steering, (n, 1) for words in front."
    if way.steering is None:
        before = list(way.before)
        return prompt_effect(model, tokenizer, before, test, prompts=[TEST_QUESTION]).changes.double()[:, None]
    gap = completion_gap(model, tokenizer, way.steering, test, multipliers=[0, 1, way.down]).values.double()
    return torch.stack([gap[:, 1] - gap[:, 0], gap[:, 0] - gap[:, 2]], 1)


def run_texts(model: Any, tokenizer: Any, folder: Path, layer: int = 15) -> int:
    """What vectors do to texts that the model writes, by two readers that share no statement with the learning.

    The same damage for all: 0.1 nats per token, half of it on everyday requests and half on open questions."""
    return _texts(model, tokenizer, folder, TEXT_WAYS[: 2 if QUICK else None], layer)


def run_texts_more(model: Any, tokenizer: Any, folder: Path, layer: int = 15) -> int:
    "Further ways of moving texts, beside the mean difference; nothing is asked of them."
    return _texts(model, tokenizer, folder, MORE_WAYS if WAYS is None else ("mean difference", *WAYS), layer)


def _texts(model: Any, tokenizer: Any, folder: Path, ways: tuple[str, ...], layer: int) -> int:
    "Tables and marks of some ways."
    pool = pool_of(model, tokenizer, layer)
    _, answers = damage_curvature(model, tokenizer, ShiftPlace.of(model, layer))
    damage = DamageScorer(model, with_open(answers, pool))
    base = surprise(model, written(model, tokenizer, None))
    print(
        f"{pool}\n{damage.answers}\n{NUM_QUESTIONS} questions, both signs, greedy; unsteered: {base:.2f} nats per token"
    )
    found = {way: Judged() for way in ways}
    readers: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, TextShift]] = {}
    for name in SETS:
        _, test = contrasts_of(folder, name)
        readers[name] = {
            letter: train_reader(model, tokenizer, contrasts(folder, name, first, first + 80, TRAINING_QUESTION), n)
            for letter, first, n in (("C", 120, 15), ("B", 200, 21))
        }
        scores = readers[name]["C"].scores(model, tokenizer, pool.pairs)
        texts[name] = {}
        for way in ways:
            one, now = text_way(model, tokenizer, folder, way, name, damage, pool, layer), found[way]
            shift = texts[name][way] = as_shift(model, tokenizer, one, readers[name]["C"])
            now.moved["C"].append(moved_by(shift))
            now.moved["B"].append(moved_by(shift.read_by(model, tokenizer, readers[name]["B"])))
            steered_only = [0] if one.steering is None else [0, 1]
            now.surprise.append(float(shift.surprises[:, steered_only].mean()))
            now.gaps.append(gap_moves(model, tokenizer, one, test))
            now.foretold.append(_foretold_by(model, tokenizer, one, pool, scores))
            now.at_budget = one.at_budget
            if one.steering is not None:
                with torch.no_grad():
                    now.damage.append(float(damage.mean([one.steering])))
            told = ", ".join(f"{letter} {float(some[-1].mean()):+.2f}" for letter, some in now.moved.items())
            print(
                f"{name:26} {way:32} shift {told}; predicted {now.foretold[-1]:+.2f}; gap {float(now.gaps[-1].mean()):+.2f}; "
                f"surprise {now.surprise[-1]:.2f}" + (f"; damage {now.damage[-1]:.2f}" if now.damage else ""),
                flush=True,
            )
        for sign, some in zip("+-", texts[name][ways[1 % len(ways)]].texts, strict=True):
            print(f"   {sign} {some[min(3, len(some) - 1)]!r}", flush=True)
    return _texts_judged(model, tokenizer, readers, texts, found, base)


@dataclass
class Judged:
    "What was measured of one way, set by set."

    moved: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"C": [], "B": []})
    gaps: list[torch.Tensor] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    foretold: list[float] = field(default_factory=list)  # nan: the pool predicts nothing of this way
    damage: list[float] = field(default_factory=list)  # none: nothing is steered
    at_budget: bool = True


TEXT_WAYS = (
    "mean difference", "texts", "texts, three readers", "closed form of choices", "random direction",
    "mean difference, as trained", "instruction", "four examples",
)  # fmt: skip
MORE_WAYS = (
    "mean difference", "texts", "texts, gradient alone", "texts, half the answers", "texts, two layers",
    "texts, response tokens", "mean difference, response tokens", "texts, pool under steering",
    "choices, 40 steps", "BiPO's loss, 40 steps",
)  # fmt: skip


def pool_of(model: Any, tokenizer: Any, layer: int | tuple[int, ...], answers: int = 64, **how: Any) -> Pool:
    "A pool that is sampled once, and kept in the folder of `--pools`."
    answers = answers * ANSWERS // 64
    if POOL is not None and layer == 15 and answers == ANSWERS and not how:
        return Pool.load(POOL)
    name = f"layers-{layer}-{answers}-answers" + "".join(f"-{name}-{value}" for name, value in how.items())
    name = re.sub(r"[^A-Za-z0-9.]+", "-", name)
    if name not in KEPT_POOLS:
        path = None if POOLS is None else POOLS / f"{name}.safetensors"
        if path is not None and path.exists():
            KEPT_POOLS[name] = Pool.load(path)
        else:
            print(f"sampling {name}", flush=True)
            KEPT_POOLS[name] = sample_pool(model, tokenizer, layer, answers=answers, **how)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                KEPT_POOLS[name].save(path)
    return KEPT_POOLS[name]


def with_open(answers: OwnAnswers, pool: Pool) -> OwnAnswers:
    "Answers to everyday requests and as many to open questions."
    some = pool.answers(len(answers))
    return OwnAnswers((*answers.pairs, *some.pairs), f"{answers.what} and {some.what}", answers.seed)


def _foretold_by(model: Any, tokenizer: Any, way: Way, pool: Pool, scores: torch.Tensor) -> float:
    "The predicted shift per direction; nan for what the pool cannot predict."
    how = way.steering
    if how is None or how.tokens is not None or set(how.layer_activations) != set(pool.modules):
        return math.nan
    return predicted_shift(model, tokenizer, how.vector, pool, scores) * (1 - way.down) / 2  # type: ignore[arg-type]


def text_way(
    model: Any, tokenizer: Any, folder: Path, way: str, name: str, damage: DamageScorer, pool: Pool, layer: int
) -> Way:
    "One way, made from the training pairs of a set; steerings have the common damage."
    training, _ = contrasts_of(folder, name)
    samples = [tuple({"prompt": q, "response": text} for text in both) for q, *both in training]
    if way in ("instruction", "four examples"):
        words = words_in_front(folder, name)[way]
        return Way(before=[{"role": "system", "content": words}] if isinstance(words, str) else words)

    def mean(layers: Any = layer) -> SteeringVector:
        return train_steering_vector(model, tokenizer, samples, layers=layers, read=Tokens.generated)

    if way == "mean difference, as trained":
        return Way(mean([layer]).steering(), at_budget=False)
    if way in ("texts", "texts, three readers"):  # calibrated on the same answers
        scores = None
        if way == "texts, three readers":
            each = [train_reader(model, tokenizer, samples, n, Tokens.generated) for n in (9, 15, 21)]
            scores = torch.stack([reader.scores(model, tokenizer, pool.pairs) for reader in each]).sum(0)
        v = optimize_steering_vector(model, tokenizer, training, layer, objective="texts", pool=pool, reader=scores)
        return Way.of(v.steering())
    tokens = Tokens.response if "response tokens" in way else None
    learn = functools.partial(optimize_steering_vector, model, tokenizer, training)
    if way.startswith("mean difference"):
        vector = mean([layer])
    elif way == "random direction":
        vector = random_direction(model, SETS.index(name))
    elif way == "closed form of choices":
        vector = learn(layer)
    elif way == "choices, 40 steps":
        vector = learn(layer, steps=STEPS)
    elif way == "BiPO's loss, 40 steps":
        vector = learn(layer, steps=STEPS, objective="preferences")
    elif way == "texts, half the answers":
        vector = learn(layer, objective="texts", pool=pool_of(model, tokenizer, layer, 32))
    elif way == "texts, two layers":
        vector = learn((12, 18), objective="texts", pool=pool_of(model, tokenizer, (12, 18)))
    elif way == "texts, response tokens":
        vector = learn(layer, objective="texts", tokens=tokens, pool=pool_of(model, tokenizer, layer, tokens=tokens))
    else:
        vector = _by_hand(model, tokenizer, way, samples, mean([layer]), damage, pool)
    return Way.of(calibrate(model, tokenizer, vector.steering(tokens=tokens), 0.1, damage))


def _by_hand(
    model: Any, tokenizer: Any, way: str, samples: Any, mean: SteeringVector, damage: DamageScorer, pool: Pool
) -> SteeringVector:
    "Ways that the library does not offer: the gradient of texts without the mean, and a pool that is sampled under steering."
    place = ShiftPlace.of(model, list(pool.modules))
    curvature = mixed([damage_curvature(model, tokenizer, place)[0], pool.curvature])
    reader = train_reader(model, tokenizer, samples, (12, 18), Tokens.generated)
    if way == "texts, gradient alone":
        scores = reader.scores(model, tokenizer, pool.pairs)
        return place.vector(curvature.whitened(pool.towards(scores)).float())
    assert way == "texts, pool under steering", f"There is no way {way!r}."
    steered = steered_pool(model, tokenizer, calibrate(model, tokenizer, mean.steering(), 0.1, damage), pool)
    towards = steered.towards(reader.scores(model, tokenizer, steered.pairs))
    return place.vector(equal_parts([curvature.whitened(towards), place.flat(mean)], curvature).float())


def steered_pool(model: Any, tokenizer: Any, steering: Steering, pool: Pool) -> Pool:
    """As many answers to the same questions, half of each sampled at multiplier 1 and half at the negative one.

    So each question has answers of both kinds. Their gradients are those of the unsteered model at a shift of zero: with
    scores centred within a question this raises the log-probability of answers with a high score, as in supervised
    training. It is no policy gradient, because the answers are not the unsteered model's; for the same reason curvature
    and damage stay those of the unsteered pool."""
    place, pairs, numbers = ShiftPlace.of(model, list(pool.modules)), [], []
    questions = list(dict.fromkeys(tuple(asked) for asked, _ in pool.pairs))
    half = max(len(pool) // len(questions) // 2, 1)
    with undisturbed(model, 0):
        for number, row in enumerate(questions):
            for m in (1.0, Way.of(steering).down):
                with steering.times(m).apply(model):
                    pairs += [(list(row), said) for said in many_answers(model, tokenizer, list(row), half, 24)]
                numbers += [number] * half
    gradients, _ = _gradients(model, pairs, place, False)
    return replace(
        pool, pairs=tuple(pairs), questions=torch.tensor(numbers), gradients=gradients, what="questions, steered"
    )


def _texts_judged(model: Any, tokenizer: Any, readers: Any, texts: Any, found: dict[str, Judged], base: float) -> int:
    "Tables and marks."
    lines: list[tuple[str, bool]] = []
    means = found["mean difference"]
    for letter in ("C", "B"):
        print(
            f"\nreader {letter}\n{'method':34}{'shift [90 %]':>22}{'wrong':>7}   times the mean [90 %]   sets ahead   by set"
        )
        for way, judged in found.items():
            some, theirs = judged.moved[letter], means.moved[letter]
            ratio, low, high = ratio_interval(some, theirs)
            each = [float(x.mean()) / float(y.mean()) for x, y in zip(some, theirs, strict=True)]
            wrong, ahead = float((torch.cat(some) < 0).double().mean()), sum(x > 1 for x in each)
            print(
                f"{way:34}{pooled_interval(some):>22}{wrong:7.2f}   {ratio:.2f} [{low:.2f}, {high:.2f}]"
                f"{ahead:>14} of {len(each)}   " + " ".join(f"{x:.2f}" for x in each),
                flush=True,
            )
            if way == "texts":
                what = f"reader {letter}: texts moved at least 1.15 times as far, lower end above 1"
                lines.append((f"{what}: {ratio:.2f} [{low:.2f}, {high:.2f}]", ratio >= 1.15 and low > 1))
                lines.append(
                    (
                        f"reader {letter}: further on at least {most_sets()} of {len(SETS)} sets: {ahead}",
                        ahead >= most_sets(),
                    )
                )
    cells = [(x, float(y.mean())) for j in found.values() for x, y in zip(j.foretold, j.moved["C"], strict=True)]
    cells = [cell for cell in cells if not math.isnan(cell[0])]
    r = float(torch.corrcoef(torch.tensor(cells, dtype=torch.float64).T)[0, 1]) if len(cells) > 1 else math.nan
    print(f"\nshift by C predicted from the pool, over {len(cells)} sets and methods: r = {r:.2f}")
    print(f"{'method':34}{'gap times the mean [90 %]':>28}{'surprise':>10}   of unsteered   damage")
    for way, judged in found.items():
        ratio, low, high = ratio_interval(judged.gaps, [x[:, : judged.gaps[0].shape[1]] for x in means.gaps])
        amount = statistics.mean(judged.surprise)
        cost = f"{statistics.mean(judged.damage):.2f}" if judged.damage else ""
        print(f"{way:34}{f'{ratio:.2f} [{low:.2f}, {high:.2f}]':>28}{amount:10.2f}   {amount / base:12.2f}   {cost:>6}")
    if not QUICK and len(SETS) > 1:
        own = {way: _specificity(model, tokenizer, readers, texts, way) for way in found}
        told = ", ".join(f"{way} {x:.1f}" for way, x in own.items())
        print(f"own shift over the mean size of the other sets' shifts, reader C: {told}")
    worst = {
        way: statistics.mean(judged.surprise) / base
        for way, judged in found.items()
        if judged.damage and judged.at_budget
    }
    most = max(worst, key=lambda way: worst[way])
    lines.append(
        (
            f"surprise at most 1.25 times the unsteered for every steering at the budget: most {worst[most]:.2f}, {most}",
            worst[most] <= 1.25,
        )
    )
    return marks(*lines)


def _specificity(model: Any, tokenizer: Any, readers: Any, texts: Any, way: str) -> float:
    "How much further a set's vector moves texts by its own reader than by those of the other sets."
    own, other = [], []
    for name, ways in texts.items():
        for whose in texts:
            shift = ways[way].read_by(model, tokenizer, readers[whose]["C"])
            (own if whose == name else other).append(abs(float(moved_by(shift).mean())))
    return statistics.mean(own) / statistics.mean(other)


def random_direction(model: Any, seed: int) -> SteeringVector:
    "A direction that means nothing."
    return SteeringVector({15: torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))})


def run_optimize(model: Any, tokenizer: Any, folder: Path, layer: int = 15) -> int:
    """The closed form against the mean difference: gap at equal damage, on pairs and a question that training has not seen.

    Beside them the anchors: a random direction, the mean difference at multiplier 1 as it was trained, and words in front."""
    effects: dict[str, list[torch.Tensor]] = {"mean difference": [], "closed form": [], "random direction": []}
    costs: dict[str, list[float]] = {}
    seconds = []
    for i, name in enumerate(SETS):
        training, test = contrasts_of(folder, name)
        start = time.process_time()
        learned = optimize_steering_vector(model, tokenizer, training, layer)
        seconds.append(time.process_time() - start)
        answers, plain = everyday(model, tokenizer), vector_of(model, tokenizer, folder, name)[layer]
        others = {"mean difference": plain, "random direction": random_direction(model, i)}
        made = {"closed form": learned} | {n: calibrate(model, tokenizer, v, 0.1, answers) for n, v in others.items()}
        ways = {method: Way.of(v.steering()) for method, v in made.items()}
        ways["mean difference, as trained"] = Way(plain.steering(), at_budget=False)
        for method, way in ways.items():
            effects.setdefault(method, []).append(gap_moves(model, tokenizer, way, test))
            with torch.no_grad():
                costs.setdefault(method, []).append(float(answers.mean([way.steering])))  # type: ignore[list-item]
        for method, words in words_in_front(folder, name).items():
            found = prompt_effect(model, tokenizer, words, test, answers=answers.answers)
            effects.setdefault(method, []).append(found.changes.double()[:, None])
            costs.setdefault(method, []).append(found.damage.value)
        told = ", ".join(f"{method} {float(some[-1].mean()):+.2f}" for method, some in effects.items())
        print(f"{name:22} {told}; learned in {seconds[-1]:.1f} s of the processor", flush=True)
    ratio, low, high = effects_table(effects, "mean difference", costs)["closed form"]
    ours, means = (effects[n] for n in ("closed form", "mean difference"))
    ahead = sum(float(x.mean()) > float(y.mean()) for x, y in zip(ours, means, strict=True))
    wrong, wrong_mean = (float((torch.cat(some) < 0).double().mean()) for some in (ours, means))
    return marks(
        (
            f"gap at least 1.6 times the mean difference's, lower end above 1.3: {ratio:.2f} [{low:.2f}, {high:.2f}]",
            ratio >= 1.6 and low > 1.3,
        ),
        (f"ahead on all sets: {ahead} of {len(SETS)}", ahead == len(SETS)),
        (f"at most 0.10 of the pairs the wrong way: {wrong:.2f} (mean difference {wrong_mean:.2f})", wrong <= 0.10),
        (f"the first time at most 40 s of one core: {seconds[0]:.1f}", seconds[0] <= 40),
        (f"the next concept at most 15 s: {max(seconds[1:], default=0):.1f}", max(seconds[1:], default=0) <= 15),
    )


def run_optimize_more(model: Any, tokenizer: Any, folder: Path, layer: int = 15) -> int:
    "Other ways of learning a vector, beside the closed form and the mean difference; nothing is asked of them."
    ways: dict[str, dict[str, Any]] = {
        "closed form": {},
        "closed form + 40 steps": {"steps": STEPS},
        "BiPO's loss, 40 steps": {"steps": STEPS, "objective": "preferences"},
        "closed form, two layers": {"layer": (12, 18)},
        "closed form, response tokens": {"tokens": Tokens.response},
    }
    effects: dict[str, list[torch.Tensor]] = {"mean difference": [], **{way: [] for way in ways}}
    costs: dict[str, list[float]] = {}
    answers = everyday(model, tokenizer)
    for name in SETS:
        training, test = contrasts_of(folder, name)
        for way, some in effects.items():
            if way == "mean difference":
                vector, tokens = vector_of(model, tokenizer, folder, name)[layer], None
                made = calibrate(model, tokenizer, vector, 0.1, answers).steering()
            else:
                how, tokens = {"layer": layer} | ways[way], ways[way].get("tokens")
                made = optimize_steering_vector(model, tokenizer, training, **how).steering(tokens=tokens)
            some.append(gap_moves(model, tokenizer, Way.of(made), test))
            with torch.no_grad():
                costs.setdefault(way, []).append(float(answers.mean([made])))
            print(f"{name:26} {way:34} gap {float(some[-1].mean()):+.2f}; damage {costs[way][-1]:.2f}", flush=True)
    effects_table(effects, "mean difference", costs)
    return 0


COMMANDS = {
    "divergence": run_divergence,
    "calibrate": run_calibrate,
    "tune": run_tune,
    "anchors": run_anchors,
    "optimize": run_optimize,
    "optimize_more": run_optimize_more,
    "texts": run_texts,
    "texts_more": run_texts_more,
    "speed": run_speed,
}
POOL: Path | None = None
POOLS: Path | None = None
KEPT_POOLS: dict[str, Pool] = {}
WAYS: tuple[str, ...] | None = None
QUICK = False
SEED, ANSWERS, STEPS, NUM_QUESTIONS = 0, 64, 40, 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", choices=COMMANDS, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the sets")
    parser.add_argument("--pool", type=Path, help="a file that Pool.save wrote, so that it is not sampled again")
    parser.add_argument("--pools", type=Path, help="a folder in which sampled pools are kept, and looked for")
    parser.add_argument("--sets", nargs="+", help="names of sets in the folder (default: the five)")
    parser.add_argument("--ways", nargs="+", choices=MORE_WAYS, help="texts_more: these ways only, beside the mean")
    parser.add_argument("--answers", type=int, default=64, help="to each question of a pool")
    parser.add_argument("--steps", type=int, default=40, help="of the ways that have steps")
    parser.add_argument("--questions", type=int, default=24, help="whose answers are read")
    parser.add_argument("--quick", action="store_true", help="texts: the mean difference and the texts only")
    parser.add_argument("--seed", type=int, default=0, help="of the split of each set")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    global POOL, POOLS, QUICK, SEED, SETS, WAYS, ANSWERS, STEPS, NUM_QUESTIONS
    POOL, POOLS, QUICK, SEED, ANSWERS, STEPS = (
        asked.pool, asked.pools, asked.quick, asked.seed, asked.answers, asked.steps,
    )  # fmt: skip
    NUM_QUESTIONS, SETS = asked.questions, tuple(asked.sets or SETS)
    WAYS = None if asked.ways is None else tuple(way for way in asked.ways if way != "mean difference")
    torch.set_num_threads(asked.threads)
    start = time.time()
    model, tokenizer = load_demo_model()
    failed = 0
    for command in asked.commands:
        failed |= COMMANDS[command](model, tokenizer, asked.data)
        print(f"{time.time() - start:.0f} s; {time.process_time():.0f} s of the processor", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
