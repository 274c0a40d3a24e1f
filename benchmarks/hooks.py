"""What steering costs: microseconds a hook beside a hand-written add, and decoding with every block steered.

    python benchmarks/hooks.py            # the hooks, and decoding on the embedded model
    python benchmarks/hooks.py --hooks    # the hooks alone

Both sides of every ratio are measured in turns in one run, and medians are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors import SteeringVector

BLOCKS, WIDTH = 30, 4096


class Block(nn.Module):
    "A block that does nothing, so that only hooks take time."

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Stack(nn.Module):
    "A decoder without weights: its forward takes what a real one takes."

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(self, inputs_embeds: Tensor, past_key_values: Any = None, attention_mask: Any = None) -> Tensor:
        h = inputs_embeds
        for layer in self.layers:
            h = layer(h)
        return h


class Cache:
    "A cache that says how much it holds."

    def get_seq_length(self) -> int:
        return 100


@contextmanager
def by_hand(stack: Stack, v: Tensor) -> Iterator[None]:
    "The least one can write."
    hooks = [layer.register_forward_hook(lambda module, args, output: output + v) for layer in stack.layers]
    yield
    for hook in hooks:
        hook.remove()


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int = 60, repeats: int = 20) -> dict[str, float]:
    "Median seconds of one call of each way; every round measures all of them."
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(t[len(t) // 6 :]) for name, t in times.items()}


def hooks() -> None:
    "Microseconds a hook, decoding one column at a time."
    print(f"{BLOCKS} hooks, one column a pass, float32; microseconds a hook (times the hand-written add)")
    print(f"{'activation':<14}{'hand-written add':>18}{'every token':>18}{'min_token_index':>18}{'a multiplier a row':>20}")
    for b in (1, 8):
        stacks = {name: Stack().eval() for name in ("none", "by hand", "every", "min", "rows")}
        h, v, cache = torch.randn(b, 1, WIDTH), torch.randn(WIDTH), Cache()
        mask = torch.ones(b, 101, dtype=torch.long)
        vector = SteeringVector({0: v}).at(range(BLOCKS))

        def call(name: str, stacks: dict[str, Stack] = stacks, h: Tensor = h, mask: Tensor = mask, cache: Cache = cache) -> Callable[[], Any]:
            return lambda: stacks[name](inputs_embeds=h, past_key_values=cache, attention_mask=mask)

        with ExitStack() as opened, torch.no_grad():
            opened.enter_context(by_hand(stacks["by hand"], v))
            opened.enter_context(vector.apply(stacks["every"]))
            opened.enter_context(vector.apply(stacks["min"], min_token_index=50))
            opened.enter_context(vector.apply(stacks["rows"], multiplier=[1.0 + i for i in range(b)]))
            took = in_turns({name: call(name) for name in stacks})
        per = {name: (t - took["none"]) / BLOCKS * 1e6 for name, t in took.items()}
        cells = [f"{per[n]:.1f} ({per[n] / per['by hand']:.2f})" for n in ("every", "min", "rows")]
        print(f"{str((b, 1, WIDTH)):<14}{per['by hand']:>18.1f}{cells[0]:>18}{cells[1]:>18}{cells[2]:>20}")


def decoding(tokens: int = 24, rounds: int = 7) -> None:
    "Seconds to decode on the embedded model, all of its blocks steered, against unsteered."
    from steering_vectors.demo import load_demo_model

    model, tokenizer = load_demo_model()
    given = tokenizer("Tell me about your day, from the morning to the evening.", return_tensors="pt")
    blocks, width = model.config.num_hidden_layers, model.config.hidden_size
    vector = SteeringVector({0: torch.randn(width) * 1e-3}).at(range(blocks))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def plain() -> None:
        model.generate(**given, **options)

    def every() -> None:
        with vector.apply(model):
            plain()

    def late() -> None:
        with vector.apply(model, min_token_index=4):
            plain()

    ways = {"unsteered": plain, "every token": every, "min_token_index": late}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(rounds + 1):
        for name in list(ways)[r % 3 :] + list(ways)[: r % 3]:
            start = time.perf_counter()
            ways[name]()
            if r:
                times[name].append(time.perf_counter() - start)
    print(f"\nSmolLM2-135M, {tokens} tokens, all {blocks} blocks steered; median of {rounds} runs in turns")
    base = statistics.median(times["unsteered"])
    for name, t in times.items():
        ratio = statistics.median(a / u for a, u in zip(t, times["unsteered"], strict=True))
        print(f"{name:<18}{statistics.median(t):>8.3f} s   {statistics.median(t) / base:.3f} of unsteered (median of paired ratios {ratio:.3f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hooks", action="store_true", help="only the hooks")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    hooks()
    if not arguments.hooks:
        decoding()
