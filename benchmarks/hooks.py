"""What steering costs: microseconds a hook beside a hand-written add, and decoding with every block steered.

    python benchmarks/hooks.py            # the hooks, and decoding and a sweep on the embedded model
    python benchmarks/hooks.py --hooks    # the hooks alone

Both sides of every ratio are measured in turns in one run, and medians are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors import Gate, SteeringVector, Tokens

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


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int = 400) -> dict[str, float]:
    "Seconds of one call of each way, in turns: the lower quartile, since other programs only ever add to a time."
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.quantiles(t[rounds // 10 :], n=4)[0] for name, t in times.items()}


def ways(v: Tensor, b: int, s: int) -> dict[str, dict[str, Any]]:
    "How the vector is applied, by name. A pass of one column continues 100; a longer one begins."
    first = 100 if s == 1 else 0
    mask = torch.zeros(b, first + s, dtype=torch.bool)
    mask[0, first + s // 2 :] = True  # in other rows no token, so that it is a mask also where there is one column
    gate = Gate(v, layer=0, threshold=-1e9)
    return {
        "every token": {},
        "min_token_index": {"min_token_index": first + s // 2},
        "Tokens": {"tokens": Tokens.all[first + s // 2 : first + s]},
        "mask": {"token_indices": mask},
        "by row": {"multiplier": [1.0 + i for i in range(b)]},
        "by row, masked": {"multiplier": [1.0 + i for i in range(b)], "token_indices": mask},
        "gate": {"when": gate.per_token()},
    }


def hooks() -> None:
    "Microseconds a hook."
    print(f"{BLOCKS} hooks, float32; microseconds a hook (times the hand-written add)")
    for b, s, width in ((1, 1, 4096), (8, 1, 4096), (1, 8, 64)):
        h, v = torch.randn(b, s, width), torch.randn(width)
        cache = Cache() if s == 1 else None
        attention = torch.ones(b, s + 100 if s == 1 else s, dtype=torch.long)
        vector, applied = SteeringVector({0: v}).at(range(BLOCKS)), ways(v, b, s)
        stacks = {name: Stack().eval() for name in ("none", "by hand", *applied)}

        def call(
            name: str, stacks: dict[str, Stack] = stacks, h: Tensor = h, mask: Tensor = attention, cache: Any = cache
        ) -> Callable[[], Any]:
            return lambda: stacks[name](inputs_embeds=h, past_key_values=cache, attention_mask=mask)

        with ExitStack() as opened, torch.no_grad():
            opened.enter_context(by_hand(stacks["by hand"], v))
            for name, how in applied.items():
                opened.enter_context(vector.apply(stacks[name], **how))
            took = in_turns({name: call(name) for name in stacks})
        per = {name: (t - took["none"]) / BLOCKS * 1e6 for name, t in took.items()}
        print(f"\n{str((b, s, width)):<16}" + f"hand-written add {per['by hand']:5.1f}")
        for name in applied:
            print(f"{name:>20}{per[name]:8.1f} ({per[name] / per['by hand']:.2f})")


def decoding(tokens: int = 120) -> None:
    "One token after another on the embedded model, all of its blocks steered, against unsteered; each token both ways, in turns."
    from steering_vectors.demo import load_demo_model

    model, tokenizer = load_demo_model()
    ids = tokenizer("Tell me about your day, from the morning to the evening.", return_tensors="pt")["input_ids"]
    blocks, width = model.config.num_hidden_layers, model.config.hidden_size
    vector = SteeringVector({0: torch.randn(width) * 1e-3}).at(range(blocks))
    handles = {
        "unsteered": None,
        "every token": vector.apply(model),
        "min_token_index=4": vector.apply(model, min_token_index=4),
        "Tokens.response": vector.apply(model, tokens=Tokens.response, prompt=ids),
        "a multiplier by row": vector.apply(model, multiplier=[1.0]),
        "a gate": vector.apply(model, when=Gate(torch.randn(width), layer=0, threshold=-1e9).per_token()),
    }
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

    def step(handle: Any) -> float:
        with handle if handle is not None else nullcontext(), torch.no_grad():
            start = time.perf_counter()
            model(ids[:, -1:], past_key_values=cache)
            took = time.perf_counter() - start
        cache.crop(-1)  # the same place for the next one
        return took

    times: dict[str, list[float]] = {name: [] for name in handles}
    for r in range(tokens):
        for name in list(handles)[r % len(handles) :] + list(handles)[: r % len(handles)]:
            times[name].append(step(handles[name]))
    print(
        f"\nSmolLM2-135M, all {blocks} blocks steered, {tokens} tokens each way in turns; ms a token (times unsteered)"
    )
    for name, t in times.items():
        ratios = [a / u for a, u in zip(t[5:], times["unsteered"][5:], strict=True)]
        print(f"{name:<20}{statistics.median(t[5:]) * 1e3:>7.2f}   ({statistics.median(ratios):.3f}, median of pairs)")


def sweeping(rounds: int = 3, tokens: int = 40) -> None:
    "A grid of three layers and seven multipliers against three plain generations of seven rows, in turns."
    from steering_vectors import sweep
    from steering_vectors.demo import load_demo_model

    model, tokenizer = load_demo_model()
    vector = SteeringVector({n: torch.randn(model.config.hidden_size) * 1e-3 for n in (10, 15, 20)})
    prompt, multipliers = "Tell me about your day, from the morning to the evening.", (-3, -2, -1, 0, 1, 2, 3)
    grid = sweep(model, tokenizer, vector, prompt, multipliers, max_new_tokens=1)
    ids = torch.tensor([grid.prompt_ids] * len(multipliers))

    def plain() -> None:
        for _ in grid.layers:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)

    def steered() -> None:
        sweep(model, tokenizer, vector, prompt, multipliers, max_new_tokens=tokens)

    ratios = []
    for _ in range(rounds):
        took = []
        for way in (plain, steered):
            start, cpu = time.perf_counter(), time.process_time()
            way()
            took.append((time.perf_counter() - start, time.process_time() - cpu))
        ratios.append([b / a for a, b in zip(*took, strict=True)])
    wall, cpu = (statistics.median(r[clock] for r in ratios) for clock in (0, 1))
    print(
        f"\na sweep of 3 layers x 7 multipliers x {tokens} tokens, by three plain generations: {wall:.2f} (processor time {cpu:.2f})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hooks", action="store_true", help="only the hooks")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    hooks()
    if not arguments.hooks:
        decoding()
        sweeping()
