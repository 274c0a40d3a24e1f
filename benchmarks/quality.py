#!/usr/bin/env python3
"""What the measures of steering cost and whether their numbers hold, on the embedded model and sets of persona statements.

    python benchmarks/quality.py divergence --data DIR   # damage is 0 at 0 and goes with the square of the multiplier
    python benchmarks/quality.py calibrate --data DIR    # 5 sets x 6 layers: measurements needed, and other requests
    python benchmarks/quality.py tune --data DIR         # layer chosen by evidence against the middle one; what it reports, checked again
    python benchmarks/quality.py anchors --data DIR      # random direction, untuned vector, instruction, examples on the same items
    python benchmarks/quality.py optimize --data DIR     # vectors learned by gradient against the mean difference, at equal damage
    python benchmarks/quality.py optimize_more --data DIR    # further ways of learning: steps, BiPO, response tokens, two layers
    python benchmarks/quality.py texts --data DIR [--pool FILE] [--quick]    # what the vectors do to texts that the model writes
    python benchmarks/quality.py speed --data DIR        # one layer and multiplier of 36 pairs, new way against plain batches
    python benchmarks/quality.py divergence calibrate --data DIR   # several in one run train their vectors once

DIR holds files NAME.jsonl with one statement per line, as {"statement", "answer_matching_behavior"}. A set is split by its
seed: 80 pairs train, 36 others test. Each command prints a table and, at its end, one line per mark with what was reached.
"""

import argparse
import functools
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steering_vectors import (
    Pool,
    SteeringVector,
    Tokens,
    calibrate,
    completion_gap,
    divergence,
    few_shot,
    optimize_steering_vector,
    own_answers,
    predicted_shift,
    sample_pool,
    train_reader,
    train_steering_vector,
    tune,
)
from steering_vectors.demo import load_demo_model
from steering_vectors.evaluate.intervals import estimate
from steering_vectors.train import scores as scores_room
from steering_vectors.train.continuations import plain_passes
from steering_vectors.train.curvature import damage_curvature
from steering_vectors.train.damage import DamageScorer, OwnAnswers
from steering_vectors.train.gradients import ShiftPlace
from steering_vectors.train.prompts import continuation_ids
from steering_vectors.train.scores import ScoringWay, TextScorer

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


def pairs_of(folder: Path, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    "Pairs of a matching and another statement: 80 to train, 36 others to test."
    pairs = all_pairs(folder, name)
    return pairs[:80], pairs[80:116]


@functools.cache
def all_pairs(folder: Path, name: str) -> list[tuple[str, str]]:
    "Every pair of a set, in the order of its seed."
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    sides = [[r["statement"] for r in rows if r["answer_matching_behavior"].strip() == word] for word in ("Yes", "No")]
    for side in sides:
        random.Random(SEED).shuffle(side)
    return list(zip(*sides, strict=False))


@functools.cache
def vector_of(model: Any, tokenizer: Any, folder: Path, name: str) -> SteeringVector:
    "The mean difference over the statements' own tokens."
    pairs, _ = pairs_of(folder, name)

    def chat(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": TRAINING_QUESTION}, {"role": "assistant", "content": text}]

    samples = [(chat(good), chat(bad)) for good, bad in pairs]
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
    _, test = pairs_of(folder, SETS[0])
    pairs = [continuation_ids(tokenizer, TEST_QUESTION, text) for both in test for text in both]
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


def held_out_contrasts(folder: Path, name: str, first: int, last: int) -> list[tuple[str, str, str]]:
    "Pairs of a set as contrasts, under the question of the tests."
    return [(TEST_QUESTION, good, bad) for good, bad in all_pairs(folder, name)[first:last]]


def training_chats(folder: Path, name: str) -> list[tuple[Any, Any]]:
    "The 80 training pairs as conversations."
    asked = {"role": "user", "content": TRAINING_QUESTION}
    return [
        tuple([asked, {"role": "assistant", "content": text}] for text in both) for both in pairs_of(folder, name)[0]
    ]


def run_tune(model: Any, tokenizer: Any, folder: Path) -> int:
    "72 other pairs choose and judge; the 36 test pairs check the choice against the middle layer, and the report."
    ratios, inside, seconds, walls, ours, middle_layer, by_mean = [], [], [], [], [], [], []
    print(f"{'set':22} chosen   reported                 again, on 36 others      middle layer             seconds")
    for name in SETS:
        start, begun = time.process_time(), time.perf_counter()
        found = tune(
            model, tokenizer, training_chats(folder, name), held_out_contrasts(folder, name, 116, 188), LAYERS,
            read=Tokens.generated, anchors=False,
        )  # fmt: skip
        seconds.append(time.process_time() - start)
        walls.append(time.perf_counter() - begun)
        middle = next(row for row in found.rows if row.layers == (15,))
        largest = max(found.rows, key=lambda row: row.by_choosers)
        test = held_out_contrasts(folder, name, 80, 116)
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
            f"the reported effect lies within the interval of a second test half in 4 of 5 sets: {sum(inside)}",
            sum(inside) >= 4,
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
}


def run_anchors(model: Any, tokenizer: Any, folder: Path) -> int:
    "What the middle layer's vector does at 0.1 nats, beside a random direction, an instruction and four examples."
    kept: dict[str, list[Any]] = {}
    for name in SETS:
        chats = training_chats(folder, name)
        before = {"instruction": INSTRUCTIONS[name], "four examples": few_shot(chats)}
        found = tune(
            model, tokenizer, chats, held_out_contrasts(folder, name, 80, 116), 15, test=0.85,
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
    random_rows = kept["random direction"]
    return marks(
        (
            "a random direction's effect is below a third of the mean's",
            statistics.mean(r.effect.value for r in random_rows)
            <= statistics.mean(r.effect.value for r in kept["mean"]) / 3,
        )
    )


def contrasts_of(folder: Path, name: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    "The pairs of a set as contrasts under the question of training, and under another one for the test."
    training, test = pairs_of(folder, name)
    return [(TRAINING_QUESTION, *both) for both in training], [(TEST_QUESTION, *both) for both in test]


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


def effects_table(effects: dict[str, list[torch.Tensor]], base: str) -> dict[str, tuple[float, float, float]]:
    "Print the effect of each method, and return its ratio to that of `base` with the interval."
    print(f"{'method':34}{'up':>7}{'wrong':>7}{'down':>7}{'wrong':>7}   times {base} [90 %]       sets ahead")
    found = {}
    for name, some in effects.items():
        each, base_effects = torch.cat(some), effects[base][: len(some)]
        found[name] = ratio_interval(some, base_effects)
        ahead = sum(float(x.mean()) > float(y.mean()) for x, y in zip(some, base_effects, strict=True))
        wrong = (each < 0).double().mean(0)
        print(
            f"{name:34}{each[:, 0].mean():+7.2f}{wrong[0]:7.2f}{each[:, 1].mean():+7.2f}{wrong[1]:7.2f}   "
            f"{found[name][0]:.2f} [{found[name][1]:.2f}, {found[name][2]:.2f}]{ahead:>12} of {len(some)}",
            flush=True,
        )
    return found


def more_pairs(folder: Path, name: str, first: int) -> list[tuple[str, str, str]]:
    "80 pairs that neither training nor test has, as contrasts."
    return [(TRAINING_QUESTION, *both) for both in all_pairs(folder, name)[first : first + 80]]


def written(
    model: Any, tokenizer: Any, vector: SteeringVector | None, multiplier: float = 1.0, length: int = 28
) -> list[Any]:
    "Greedy answers to the questions, as ids of the question and of the answer."
    chats = [[{"role": "user", "content": question}] for question in TEXT_QUESTIONS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    steered = (vector or random_direction(model, 0)).apply(model, multiplier=multiplier if vector else 0, prompt=batch)
    with torch.no_grad(), steered:
        out = model.generate(**batch, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    start, found = batch["input_ids"].shape[1], []
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], out[:, start:].tolist(), strict=True):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        found.append((ids[mask.bool()].tolist(), row[:end]))
    return found


def surprise(model: Any, texts: list[Any]) -> float:
    "How improbable texts are to the unsteered model, in nats per token."
    with torch.no_grad():
        return -float(TextScorer(model, texts).scores().mean())


def run_texts(model: Any, tokenizer: Any, folder: Path, layer: int = 15) -> int:
    """What vectors do to texts that the model writes, by two readers that share no statement with the learning.

    The same damage for all: 0.1 nats per token, half of it on everyday requests and half on open questions."""
    pool = Pool.load(POOL) if POOL else sample_pool(model, tokenizer, layer)
    _, answers = damage_curvature(model, tokenizer, ShiftPlace.of(model, layer))
    damage = DamageScorer(model, with_open(answers, pool))
    base = surprise(model, written(model, tokenizer, None))
    print(
        f"{pool}\n{damage.answers}\n{len(TEXT_QUESTIONS)} questions, both signs, greedy; unsteered: {base:.2f} nats per token"
    )
    ways = TEXT_WAYS[: 2 if QUICK else None]
    found = {way: Judged() for way in ways}
    readers: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, list[list[Any]]]] = {}
    for i, name in enumerate(SETS):
        training, test = contrasts_of(folder, name)
        readers[name] = {
            "C": train_reader(model, tokenizer, more_pairs(folder, name, 120), 15),
            "B": train_reader(model, tokenizer, more_pairs(folder, name, 200), 21),
        }
        scores = readers[name]["C"].scores(model, tokenizer, pool.pairs)
        texts[name] = {}
        for way in ways:
            v = text_vector(model, tokenizer, folder, way, i, damage, pool, layer)
            down = v.provenance.extra["calibration"]["negative"]
            both = texts[name][way] = [written(model, tokenizer, v, m) for m in (1.0, down)]
            for letter, reader in readers[name].items():
                high, low = (reader.scores(model, tokenizer, some).double() for some in both)
                found[way].moved[letter].append((high - low) / 2)
            found[way].surprise.append(statistics.mean(surprise(model, some) for some in both))
            found[way].gaps.append(both_ways(model, tokenizer, v, test))
            found[way].foretold.append(predicted_shift(model, tokenizer, v, pool, scores) * (1 - down) / 2)
            now = found[way]
            told = ", ".join(f"{letter} {float(some[-1].mean()):+.2f}" for letter, some in now.moved.items())
            print(
                f"{name:22} {way:24} shift {told}; foretold {now.foretold[-1]:+.2f}; gap {float(now.gaps[-1].mean()):+.2f}; "
                f"surprise {now.surprise[-1]:.2f}",
                flush=True,
            )
        for sign, some in zip("+-", texts[name]["texts"], strict=True):
            print(f"   {sign} {tokenizer.decode(some[3][1])!r}", flush=True)
    return _texts_judged(model, tokenizer, readers, texts, found, base)


@dataclass
class Judged:
    "What was measured of one method, set by set."

    moved: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"C": [], "B": []})
    gaps: list[torch.Tensor] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    foretold: list[float] = field(default_factory=list)


TEXT_WAYS = ("mean difference", "texts", "texts, three readers", "closed form of choices", "random direction")


def with_open(answers: OwnAnswers, pool: Pool) -> OwnAnswers:
    "Answers to everyday requests and as many to open questions."
    some = pool.answers(len(answers))
    return OwnAnswers((*answers.pairs, *some.pairs), f"{answers.what} and {some.what}", answers.seed)


def text_vector(
    model: Any, tokenizer: Any, folder: Path, way: str, i: int, damage: DamageScorer, pool: Pool, layer: int
) -> SteeringVector:
    "A vector made in one way from the training pairs of a set, at the common damage."
    training, _ = contrasts_of(folder, SETS[i])
    samples = [tuple({"prompt": q, "response": text} for text in both) for q, *both in training]
    if way.startswith("texts"):  # calibrated on the same answers
        scores = None
        if way == "texts, three readers":
            each = [train_reader(model, tokenizer, samples, n, Tokens.generated) for n in (9, 15, 21)]
            scores = torch.stack([reader.scores(model, tokenizer, pool.pairs) for reader in each]).sum(0)
        return optimize_steering_vector(model, tokenizer, training, layer, objective="texts", pool=pool, reader=scores)
    if way == "closed form of choices":
        vector = optimize_steering_vector(model, tokenizer, training, layer)
    elif way == "mean difference":
        vector = train_steering_vector(model, tokenizer, samples, layers=[layer], read=Tokens.generated)
    else:
        vector = random_direction(model, i)
    return calibrate(model, tokenizer, vector, 0.1, damage)


def _texts_judged(model: Any, tokenizer: Any, readers: Any, texts: Any, found: dict[str, Judged], base: float) -> int:
    "Tables and marks."
    lines: list[tuple[str, bool]] = []
    means = found["mean difference"]
    for letter in ("C", "B"):
        print(f"\nreader {letter}\n{'method':24}{'shift':>7}{'wrong':>7}   times the mean [90 %]   sets ahead   by set")
        for way, judged in found.items():
            some, theirs = judged.moved[letter], means.moved[letter]
            ratio, low, high = ratio_interval(some, theirs)
            each = [float(x.mean()) / float(y.mean()) for x, y in zip(some, theirs, strict=True)]
            wrong, shift = float((torch.cat(some) < 0).double().mean()), float(torch.cat(some).mean())
            ahead, sets = sum(x > 1 for x in each), " ".join(f"{x:.2f}" for x in each)
            print(
                f"{way:24}{shift:+7.2f}{wrong:7.2f}   {ratio:.2f} [{low:.2f}, {high:.2f}]{ahead:>14} of {len(each)}   {sets}"
            )
            if way == "texts":
                what = f"reader {letter}: texts moved at least 1.15 times as far, lower end above 1"
                lines.append((f"{what}: {ratio:.2f} [{low:.2f}, {high:.2f}]", ratio >= 1.15 and low > 1))
                lines.append((f"reader {letter}: further on at least 4 of 5 sets: {ahead}", ahead >= 4))
    cells = [(x, float(y.mean())) for j in found.values() for x, y in zip(j.foretold, j.moved["C"], strict=True)]
    r = float(torch.corrcoef(torch.tensor(cells, dtype=torch.float64).T)[0, 1])
    print(f"\nshift by C foretold from the pool, over {len(cells)} sets and methods: r = {r:.2f}")
    print(f"{'method':24}{'gap times the mean [90 %]':>28}{'surprise':>10}   of unsteered")
    for way, judged in found.items():
        ratio, low, high = ratio_interval(judged.gaps, means.gaps)
        amount = statistics.mean(judged.surprise)
        print(f"{way:24}{f'{ratio:.2f} [{low:.2f}, {high:.2f}]':>28}{amount:10.2f}   {amount / base:.2f}")
    if not QUICK:
        own = {way: _specificity(model, tokenizer, readers, texts, way) for way in TEXT_WAYS[:3]}
        told = ", ".join(f"{way} {x:.1f}" for way, x in own.items())
        print(f"own shift over the mean size of the other sets' shifts, reader C: {told}")
    worst = statistics.mean(found["texts"].surprise) / base
    lines.append((f"surprise of the texts at most 1.25 times the unsteered: {worst:.2f}", worst <= 1.25))
    return marks(*lines)


def _specificity(model: Any, tokenizer: Any, readers: Any, texts: Any, way: str) -> float:
    "How much further a set's vector moves texts by its own reader than by those of the other sets."
    own, other = [], []
    for name, ways in texts.items():
        for whose in texts:
            high, low = (readers[whose]["C"].scores(model, tokenizer, some) for some in ways[way])
            (own if whose == name else other).append(abs(float((high - low).mean()) / 2))
    return statistics.mean(own) / statistics.mean(other)


def random_direction(model: Any, seed: int) -> SteeringVector:
    "A direction that means nothing."
    return SteeringVector({15: torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))})


def run_optimize(model: Any, tokenizer: Any, folder: Path, layer: int = 15) -> int:
    "The closed form against the mean difference: gap at equal damage, on pairs and a question that training has not seen."
    effects: dict[str, list[torch.Tensor]] = {"mean difference": [], "closed form": [], "random direction": []}
    seconds = []
    for i, name in enumerate(SETS):
        training, test = contrasts_of(folder, name)
        start = time.process_time()
        learned = optimize_steering_vector(model, tokenizer, training, layer)
        seconds.append(time.process_time() - start)
        answers = everyday(model, tokenizer)
        others = {
            "mean difference": vector_of(model, tokenizer, folder, name)[layer],
            "random direction": random_direction(model, i),
        }
        made = {"closed form": learned} | {n: calibrate(model, tokenizer, v, 0.1, answers) for n, v in others.items()}
        for method, vector in made.items():
            effects[method].append(both_ways(model, tokenizer, vector, test))
        told = ", ".join(f"{method} {float(some[-1].mean()):+.2f}" for method, some in effects.items())
        print(f"{name:22} {told}; learned in {seconds[-1]:.1f} s of the processor", flush=True)
    ratio, low, high = effects_table(effects, "mean difference")["closed form"]
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
        (f"the next concept at most 15 s: {max(seconds[1:]):.1f}", max(seconds[1:]) <= 15),
    )


def run_optimize_more(model: Any, tokenizer: Any, folder: Path, layer: int = 15) -> int:
    "Other ways of learning a vector, beside the closed form and the mean difference; nothing is asked of them."
    ways: dict[str, dict[str, Any]] = {
        "closed form": {},
        "closed form + 40 steps": {"steps": 40},
        "BiPO's loss, 40 steps": {"steps": 40, "objective": "preferences"},
        "closed form, two layers": {"layer": (12, 18)},
        "closed form, response tokens": {"tokens": Tokens.response},
    }
    effects: dict[str, list[torch.Tensor]] = {"mean difference": [], **{way: [] for way in ways}}
    answers = everyday(model, tokenizer)
    for name in SETS:
        training, test = contrasts_of(folder, name)
        mean = calibrate(model, tokenizer, vector_of(model, tokenizer, folder, name)[layer], 0.1, answers)
        effects["mean difference"].append(both_ways(model, tokenizer, mean, test))
        for way, how in ways.items():
            learned = optimize_steering_vector(model, tokenizer, training, **({"layer": layer} | how))
            steering = learned.steering(tokens=how.get("tokens"))
            down = learned.provenance.extra["calibration"]["negative"]
            gap = completion_gap(model, tokenizer, steering, test, multipliers=[0, 1, down]).values.double()
            effects[way].append(torch.stack([gap[:, 1] - gap[:, 0], gap[:, 0] - gap[:, 2]], 1))
        print(
            f"{name:22} " + ", ".join(f"{way} {float(some[-1].mean()):+.2f}" for way, some in effects.items()),
            flush=True,
        )
    effects_table(effects, "mean difference")
    return 0


COMMANDS = {
    "divergence": run_divergence,
    "calibrate": run_calibrate,
    "tune": run_tune,
    "anchors": run_anchors,
    "optimize": run_optimize,
    "optimize_more": run_optimize_more,
    "texts": run_texts,
    "speed": run_speed,
}
POOL: Path | None = None
QUICK = False
SEED = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", choices=COMMANDS, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the sets")
    parser.add_argument("--pool", type=Path, help="a file that Pool.save wrote, so that it is not sampled again")
    parser.add_argument("--quick", action="store_true", help="texts: the mean difference and the texts only")
    parser.add_argument("--seed", type=int, default=0, help="of the split of each set")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    global POOL, QUICK, SEED
    POOL, QUICK, SEED = asked.pool, asked.quick, asked.seed
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
