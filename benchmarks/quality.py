#!/usr/bin/env python3
"""What the measures of steering cost and whether their numbers hold, on the embedded model and sets of persona statements.

    python benchmarks/quality.py divergence --data DIR   # damage is 0 at 0 and goes with the square of the multiplier
    python benchmarks/quality.py calibrate --data DIR    # 5 sets x 6 layers: measurements needed, and other requests
    python benchmarks/quality.py tune --data DIR         # layer chosen by evidence against the middle one; what it reports, checked again
    python benchmarks/quality.py anchors --data DIR      # random direction, untuned vector, instruction, examples on the same items
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
from pathlib import Path
from typing import Any

import torch

from steering_vectors import (
    SteeringVector,
    Tokens,
    calibrate,
    completion_gap,
    divergence,
    few_shot,
    own_answers,
    train_steering_vector,
    tune,
)
from steering_vectors.demo import load_demo_model
from steering_vectors.evaluate.intervals import estimate
from steering_vectors.train import scores as scores_room
from steering_vectors.train.continuations import plain_passes
from steering_vectors.train.damage import DamageScorer
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


# --- data


def pairs_of(folder: Path, name: str, seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    "Pairs of a matching and another statement: 80 to train, 36 others to test."
    pairs = all_pairs(folder, name, seed)
    return pairs[:80], pairs[80:116]


@functools.cache
def all_pairs(folder: Path, name: str, seed: int = 0) -> list[tuple[str, str]]:
    "Every pair of a set, in the order of its seed."
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    sides = [[r["statement"] for r in rows if r["answer_matching_behavior"].strip() == word] for word in ("Yes", "No")]
    for side in sides:
        random.Random(seed).shuffle(side)
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


def contrasts_of(folder: Path, name: str, first: int, last: int) -> list[tuple[str, str, str]]:
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
    ratios, inside, seconds, walls, ours, middle_layer = [], [], [], [], [], []
    print(f"{'set':22} chosen   reported                 again, on 36 others      middle layer             seconds")
    for name in SETS:
        start, begun = time.process_time(), time.perf_counter()
        found = tune(
            model, tokenizer, training_chats(folder, name), contrasts_of(folder, name, 116, 188), LAYERS,
            read=Tokens.generated, anchors=False,
        )  # fmt: skip
        seconds.append(time.process_time() - start)
        walls.append(time.perf_counter() - begun)
        middle = next(row for row in found.rows if row.layers == (15,))
        test = contrasts_of(folder, name, 80, 116)
        changes = [
            completion_gap(model, tokenizer, row.steering, test, [0, 1]).values for row in (found.chosen, middle)
        ]
        again, other = (estimate(values[:, 1] - values[:, 0]) for values in changes)
        ours.append(again.value), middle_layer.append(other.value)
        ratios.append(again.value / other.value)
        inside.append(found.chosen.effect.value in again)
        layer = found.chosen.layers[0]
        shown = [str(e) for e in (found.chosen.effect, again, other)]
        print(f"{name:22} L{layer:<6} " + " ".join(f"{x:24}" for x in shown) + f" {seconds[-1]:.0f}", flush=True)
    pooled = sum(ours) / sum(middle_layer)
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
            model, tokenizer, chats, contrasts_of(folder, name, 80, 116), 15, test=0.85,
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


COMMANDS = {
    "divergence": run_divergence,
    "calibrate": run_calibrate,
    "tune": run_tune,
    "anchors": run_anchors,
    "speed": run_speed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", choices=COMMANDS, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the sets")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
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
