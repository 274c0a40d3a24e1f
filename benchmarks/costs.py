#!/usr/bin/env python3
"""What each step costs beside answering: seconds and memory, on the embedded model.

    python benchmarks/costs.py [--threads 2] [STEP ...]     # all steps; or those whose names hold a word

A step runs twice in a process of its own, forked from one that has loaded the model, so that its first time pays for all
that is done once. Its time is told in seconds and in plain answers: a greedy answer of 40 tokens to one request, without a
vector, measured in the same process. Memory is what the process grew by, beyond the loaded model.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from steering_vectors import (
    SteeringVector,
    Tokens,
    calibrate,
    completion_gap,
    divergence,
    optimize_steering_vector,
    prompt_ids,
    report,
    sample_pool,
    sweep,
    train_gate,
    train_steering_vector,
    tune,
)
from steering_vectors.demo import joy_chats, joy_contrasts, load_demo_model

SUMS = [f"What is {a} plus {b}?" for a in range(2, 7) for b in range(3, 7)]
TALK = [f"{what} {of}" for what in ("Tell me about", "I like", "Describe", "What do you think of", "Remember")
        for of in ("the sea", "your friends", "a good day", "music")]  # fmt: skip


def steps(model: Any, tokenizer: Any, thirty: SteeringVector | None) -> dict[str, Callable[[], Any]]:
    "What is measured, by name; `thirty` is a vector of all layers, or None where only the names are asked for."
    pairs, contrasts, ids = joy_chats(), joy_contrasts(), prompt_ids(tokenizer, "Tell me about your day.")
    v = thirty and thirty[15]

    def answer(**inputs: Any) -> Any:
        return model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, **inputs)

    def steered(vector: Any = v, **how: Any) -> Any:
        with vector.apply(model, **how):
            return answer()

    def train(**how: Any) -> Any:
        return train_steering_vector(model, tokenizer, pairs, show_progress=False, **how)

    return {
        "answer": answer,
        "steered answer, one layer": steered,
        "steered answer, 30 layers": lambda: steered(thirty, multiplier=0.1),
        "steered answer, response tokens": lambda: steered(tokens=Tokens.response, prompt=ids),
        f"train, {len(pairs)} pairs, layer 15": lambda: train(layers=[15]),
        f"train, {len(pairs)} pairs, all 30 layers": train,
        "train a gate, 20 and 20 prompts": lambda: train_gate(model, tokenizer, SUMS, TALK, layer=10),
        f"completion_gap, {len(contrasts)} contrasts, 3 multipliers": lambda: completion_gap(
            model, tokenizer, v, contrasts, [-1, 0, 1]
        ),
        "sweep, 5 multipliers, 40 tokens": lambda: sweep(
            model, tokenizer, v, "Tell me about your day.", [-2, -1, 0, 1, 2], max_new_tokens=40
        ),
        "divergence, one multiplier": lambda: divergence(model, tokenizer, v, multipliers=[1]),
        "calibrate": lambda: calibrate(model, tokenizer, v),
        "tune, 3 layers": lambda: tune(model, tokenizer, pairs, contrasts, layers=[12, 15, 18], anchors=False),
        "report": lambda: report(model, tokenizer, v, contrasts, pairs),
        "optimize_steering_vector": lambda: optimize_steering_vector(model, tokenizer, contrasts, 15),
        "sample_pool, 16 questions x 8": lambda: sample_pool(model, tokenizer, 15, answers=8),
    }


def seconds_of(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak() -> float:
    "The most memory that this process has held, in megabytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trained(model: Any, tokenizer: Any, _: None, out: Any) -> None:
    "Send the vector that the steps use."
    vector = train_steering_vector(model, tokenizer, joy_chats(), show_progress=False)
    out.send({n: v.tolist() for n, v in vector.layer_activations.items()})


def measured(model: Any, tokenizer: Any, asked: tuple[str, int, SteeringVector], out: Any) -> None:
    "Send what a step costs: in seconds the first and the second time, a plain answer in seconds, megabytes."
    name, threads, thirty = asked
    torch.set_num_threads(threads)
    every = steps(model, tokenizer, thirty)
    every["answer"]()
    unit, before = statistics.median(seconds_of(every["answer"]) for _ in range(5)), peak()
    first, again = seconds_of(every[name]), seconds_of(every[name])
    out.send((first, again, unit, peak() - before))


def forked(run: Callable[..., None], model: Any, tokenizer: Any, asked: Any) -> Any:
    "What `run` sends from a process of its own."
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(model, tokenizer, asked, theirs))
    child.start()
    theirs.close()
    found = ours.recv()
    child.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="words in the names of steps")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # so that no pool of threads is forked
    model, tokenizer = load_demo_model()
    wanted = [s for s in steps(model, tokenizer, None) if not asked.steps or any(word in s for word in asked.steps)]
    thirty = SteeringVector({n: torch.tensor(v) for n, v in forked(trained, model, tokenizer, None).items()})
    print(f"{'':48} {'first':>8} {'again':>8}   answers  memory")
    for name in wanted:
        first, again, unit, grown = forked(measured, model, tokenizer, (name, asked.threads, thirty))
        print(f"{name:48} {first:6.2f} s {again:6.2f} s {again / unit:9.2f}  {grown:4.0f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
