#!/usr/bin/env python3
"""Time and memory of training, side by side with steering-vectors 0.12.2, in turn, in one run.

    python benchmarks/extraction.py [FILE.jsonl ...]          # the table; no file: a generated set of questions
    python benchmarks/extraction.py --first [FILE.jsonl ...]  # the first training of a model, the check included, against the next
    python benchmarks/extraction.py --limit [FILE.jsonl]      # 1,000 pairs against one bare pass over the same rows
    python benchmarks/extraction.py --memory                  # 20,000 short pairs against 2,000
    python benchmarks/extraction.py --bfloat16 [FILE.jsonl]   # how far from float32, and whether branches leak
    python benchmarks/extraction.py --kernels [FILE.jsonl]    # what each fast kernel gains, as ratios

`--plain-kernels` trains without the fast kernels (steering_vectors.train.kernels) in the table and with `--limit`.

A file holds one question a line, as {"question", "answer_matching_behavior", "answer_not_matching_behavior"}. Each question
goes through the model's chat template, and the two answers make the pair. Either library runs in a process of its own, since
both are imported under one name; the older one is installed into a cache folder first. `--json FILE` keeps the numbers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OLD = "steering-vectors==0.12.2"
KERNELS = ("onednn", "tree_attention", "shortcut")


# --- samples


def generated(n: int) -> list[dict[str, str]]:
    "Questions nobody wrote, where no file is given."
    things = "kindness science money honesty risk music silence power order humour patience speed".split()
    verbs = "value avoid admire question praise enjoy fear study".split()
    asked = [f"Do you {v} {a} more than {b}?" for v in verbs for a in things for b in things if a != b]
    return [
        {"question": q, "answer_matching_behavior": "Yes", "answer_not_matching_behavior": "No"}
        for q in (asked * (n // len(asked) + 1))[:n]
    ]


def rows_of(path: str | None, n: int) -> list[dict[str, str]]:
    if path is None:
        return generated(n)
    return [json.loads(line) for line in Path(path).read_text().splitlines()[:n]]


def pairs_of(tokenizer: Any, path: str | None, n: int) -> list[tuple[str, str]]:
    "Question and answer in the chat template, as text: what both libraries can take."
    pairs = []
    for row in rows_of(path, n):
        chat = [{"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        answers = row["answer_matching_behavior"], row["answer_not_matching_behavior"]
        pairs.append(tuple(text + answer.strip() for answer in answers))
    return pairs


def distinct(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[int, int]:
    "Distinct beginnings, and tokens in all."
    ids = [tuple(tokenizer(text)["input_ids"]) for pair in pairs for text in pair]
    return len({i[:k] for i in ids for k in range(1, len(i) + 1)}), sum(map(len, ids))


# --- a worker: one library, one model, jobs from standard input


def rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(folder: str, dtype: str, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from steering_vectors import train_steering_vector

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    model(**tokenizer("warm", return_tensors="pt").to(device))
    before = rss()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pairs = pairs_of(tokenizer, job["file"], job["pairs"])
        kwargs = {"batch_size": job["batch_size"]} if job["batch_size"] else {}
        with without_kernels(job["without"]):
            wall, cpu = time.perf_counter(), time.process_time()
            vector = train_steering_vector(model, tokenizer, pairs, layers=job["layers"], **kwargs)
            if device != "cpu":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if job["save"]:
            torch.save({layer: v.float().cpu() for layer, v in vector.layer_activations.items()}, job["save"])
        print(json.dumps({"wall": wall, "cpu": cpu, "extra": rss() - before}), flush=True)


def without_kernels(names: Sequence[str]) -> AbstractContextManager[None]:
    "A context without some fast kernels; the older library has none."
    if not names:
        return nullcontext()
    from steering_vectors.train.kernels import plain_kernels

    return plain_kernels(*names)


class Worker:
    "A process that runs one of the two libraries."

    def __init__(self, folder: str, dtype: str, device: str, library: Path | None = None):
        path = str(library) if library else str(ROOT)
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--worker", folder, "--dtype", dtype, "--device", device]
        self.process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A worker ended with code {self.process.wait()}; its error is above.")
        return dict(json.loads(line))

    def __call__(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin
        print(json.dumps({"batch_size": None, "save": None, "without": [], **job}), file=self.process.stdin, flush=True)
        return self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def old_library() -> Path:
    "The folder with the older library, installed on first use."
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "steering_vectors"
        / "peers"
        / OLD.replace("==", "-")
    )
    if not (cache / "steering_vectors").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(cache), OLD]
        subprocess.run(command, check=True)
    return cache


# --- what is measured


def table(folder: str, tokenizer: Any, files: list[str | None], args: argparse.Namespace) -> list[dict[str, Any]]:
    "Both libraries, every file, all layers and one; ours with and without oneDNN, which not every processor gains by."
    library, found = old_library(), []
    kinds = {"ours": [], "without oneDNN": ["onednn"]} if not args.plain_kernels else {"plain kernels": list(KERNELS)}
    for file in files:
        few, total = distinct(tokenizer, pairs_of(tokenizer, file, args.pairs))
        name = Path(file).stem if file else "generated"
        print(f"\n{name}: {args.pairs} pairs, {total} tokens, {few} of them distinct")
        print(f"{'layers':>6s} {'':16s} {'first':>7s} {'next':>7s} {'0.12 at 1':>10s} {'at 8':>7s} {'at 16':>7s} "
              f"{'best by first':>14s} {'best by next':>13s} {'first by next':>14s} {'(cpu)':>7s} {'MB, 0.12':>12s} {'apart':>8s}")  # fmt: skip
        for layers in (None, [15]):
            job = {"file": file, "pairs": args.pairs, "layers": layers}
            for kind, numbers in _side_by_side(folder, library, job, kinds, args).items():
                first, later, old = numbers["first"]["wall"], numbers["next"]["wall"], numbers["old"]
                best, cpu = min(old.values()), numbers["first"]["cpu"] / numbers["next"]["cpu"]
                line = {"questions": name, "layers": "all" if layers is None else layers[0], "kernels": kind, "distinct": few,
                        "tokens": total, "by_first": best / first, "by_next": best / later, **numbers}  # fmt: skip
                found.append(line)
                print(f"{line['layers']!s:>6s} {kind:16s} {first:7.2f} {later:7.2f} {old['1']:10.2f} {old['8']:7.2f} {old['16']:7.2f} "
                      f"{best / first:13.1f}x {best / later:12.1f}x {first / later:14.2f} {cpu:7.2f} "
                      f"{numbers['memory'][0] / 1e6:6.0f}/{numbers['memory'][1] / 1e6:.0f} {numbers['apart']:8.1e}", flush=True)  # fmt: skip
    return found


def _side_by_side(
    folder: str, library: Path, job: dict[str, Any], kinds: dict[str, list[str]], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    "Ours in each kind, first and later trainings of a process of its own, and the older library at three batch sizes, in turn."
    import torch

    with tempfile.TemporaryDirectory() as temp, Worker(folder, args.dtype, args.device, library) as theirs:
        rounds: list[dict[str, Any]] = []
        for _ in range(args.repeats):
            one = {str(size): theirs(**job, batch_size=size, save=f"{temp}/{size}.pt") for size in (1, 8, 16)}
            for kind, off in kinds.items():
                with Worker(folder, args.dtype, args.device) as ours:
                    one[f"{kind}, first"] = ours(**job, without=off, save=f"{temp}/{kind}.pt")
                    one[kind] = ours(**job, without=off)
            rounds.append(one)
        best = {who: min((r[who] for r in rounds), key=lambda one: one["wall"]) for who in rounds[0]}
        wanted = torch.load(f"{temp}/1.pt")
        apart = {kind: _apart(wanted, torch.load(f"{temp}/{kind}.pt")) for kind in kinds}
    old_walls = {size: best[size]["wall"] for size in ("1", "8", "16")}
    extra = rounds[0]["1"]["extra"]
    return {
        kind: {"first": best[f"{kind}, first"], "next": best[kind], "old": old_walls, "memory": [rounds[0][f"{kind}, first"]["extra"], extra],
               "apart": apart[kind]}
        for kind in kinds
    }  # fmt: skip


def _apart(a: dict[int, Any], b: dict[int, Any]) -> float:
    return max(float((a[n] - b[n]).norm() / a[n].norm()) for n in a)


def first_and_next(model: Any, tokenizer: Any, files: list[str | None], n: int, repeats: int) -> dict[str, Any]:
    "A training whose way is not known yet, and the same again, in turn: medians of ratios."
    from statistics import median

    from steering_vectors import train_steering_vector
    from steering_vectors.train.strategies import _verdicts

    found = {}
    print(f"the first training by the next, {n} pairs, {repeats} rounds: wall, processor (median, least to most)")
    for file in files:
        pairs = pairs_of(tokenizer, file, n)
        for layers in (None, [15]):

            def seconds(layers: list[int] | None = layers, pairs: Any = pairs) -> tuple[float, float]:
                wall, cpu = time.perf_counter(), time.process_time()
                train_steering_vector(model, tokenizer, pairs, layers=layers)
                return time.perf_counter() - wall, time.process_time() - cpu

            seconds()  # kernels are made for these shapes
            rounds = []
            for _ in range(repeats):
                _verdicts.clear()
                rounds.append((seconds(), seconds()))
            where = f"{Path(file).stem if file else 'generated'}, {'all layers' if layers is None else f'layer {layers[0]}'}"
            ratios = [[one[clock] / two[clock] for one, two in rounds] for clock in (0, 1)]
            found[where] = [median(r) for r in ratios]
            shown = "   ".join(f"{median(r):.3f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
            print(f"{where:40s} {shown}   next {median(two[0] for _, two in rounds):.2f} s", flush=True)
    return found


def limit(model: Any, tokenizer: Any, file: str | None, n: int) -> dict[str, float]:
    "Training on many pairs, against one bare pass of the base model over the same packed rows."
    import torch

    from steering_vectors import train_steering_vector
    from steering_vectors.train.batches import inner_model
    from steering_vectors.train.kernels import fast_kernels
    from steering_vectors.train.reading import encode_samples
    from steering_vectors.train.schedules import Strategy, plan_batches, token_budget_of
    from steering_vectors.train.strategies import _verdicts

    pairs = pairs_of(tokenizer, file, n)
    texts = dict(enumerate(text for pair in encode_samples(tokenizer, pairs) for text in pair))
    inner = inner_model(model)
    packed = [job.make() for job in plan_batches(Strategy("packed"), inner, texts, token_budget_of(model))]

    def bare() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            for one in packed:
                with fast_kernels(one.attention):
                    inner(**one.inputs, use_cache=False)
        return time.perf_counter() - wall, time.process_time() - cpu

    def train() -> tuple[float, float]:
        _verdicts.clear()  # the check belongs to the time
        wall, cpu = time.perf_counter(), time.process_time()
        train_steering_vector(model, tokenizer, pairs)
        return time.perf_counter() - wall, time.process_time() - cpu

    rounds = [(bare(), train()) for _ in range(2)]
    passes, trained = ([min(r[i][clock] for r in rounds) for clock in (0, 1)] for i in (0, 1))
    tokens = sum(one.inputs["input_ids"].numel() for one in packed)
    print(f"{len(pairs)} pairs, {tokens} tokens in {len(packed)} rows: bare pass {passes[0]:.2f} s, training {trained[0]:.2f} s, "
          f"{trained[0] / passes[0]:.3f} times (processor time: {passes[1]:.2f} s, {trained[1]:.2f} s, {trained[1] / passes[1]:.3f} times)")  # fmt: skip
    return {"pairs": len(pairs), "tokens": tokens, "bare": passes[0], "training": trained[0], "times": trained[0] / passes[0],
            "cpu_times": trained[1] / passes[1]}  # fmt: skip


def kernels(model: Any, tokenizer: Any, file: str | None, n: int, repeats: int) -> dict[str, Any]:
    "Training with all fast kernels, with each left out, and with none, in turn: medians of ratios, wall and processor time."
    from statistics import median

    from steering_vectors import train_steering_vector
    from steering_vectors.train.kernels import plain_kernels

    pairs, found = pairs_of(tokenizer, file, n), {}
    variants = {"all": None, **{f"without {name}": (name,) for name in KERNELS}, "none": KERNELS}

    def seconds(left_out: tuple[str, ...] | None, layers: list[int] | None) -> tuple[float, float]:
        with plain_kernels(*left_out) if left_out else nullcontext():
            wall, cpu = time.perf_counter(), time.process_time()
            train_steering_vector(model, tokenizer, pairs, layers=layers)
            return time.perf_counter() - wall, time.process_time() - cpu

    print(
        f"{len(pairs)} pairs, {repeats} rounds      time, relative to all kernels: wall (least to most)   processor (least to most)"
    )
    for layers in (None, [15]):
        for left_out in variants.values():
            seconds(left_out, layers)  # the check of the strategy is made once and not measured
        rounds = [{name: seconds(left_out, layers) for name, left_out in variants.items()} for _ in range(repeats)]
        where = "all layers" if layers is None else f"layer {layers[0]}"
        for name in variants:
            ratios = [[times[name][clock] / times["all"][clock] for times in rounds] for clock in (0, 1)]
            found[f"{where}, {name}"] = [median(r) for r in ratios]
            shown = "   ".join(f"{median(r):6.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios)
            print(f"{where:12s} {name:24s} {shown}", flush=True)
    return found


def memory_of(n: int) -> None:
    "Peak extra memory of training on `n` short pairs, in this fresh process."
    from steering_vectors import train_steering_vector
    from steering_vectors.demo import tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def pairs(n: int) -> Iterator[tuple[str, str]]:
        for i in range(n):
            yield f"Is {i} a good number? Yes", f"Is {i} a good number? No"

    train_steering_vector(model, tokenizer, pairs(8))
    before = rss()
    train_steering_vector(model, tokenizer, pairs(n))
    print(rss() - before)


def memory() -> dict[str, float]:
    "Fresh processes for 2,000 and for 20,000 pairs."
    extra = {}
    for n in (2_000, 20_000):
        command = [sys.executable, __file__, "--memory-of", str(n)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, check=True
        )
        extra[n] = int(done.stdout.split()[-1])
        print(f"{n:6d} pairs: {extra[n] / 1e6:.1f} MB beyond the model")
    print(f"ratio {extra[20_000] / extra[2_000]:.2f}")
    return {"2000": extra[2_000], "20000": extra[20_000], "ratio": extra[20_000] / extra[2_000]}


def bfloat16(model: Any, tokenizer: Any, file: str | None, n: int) -> dict[str, Any]:
    "In bfloat16: how far from float32 plain and packed passes are, and whether a branch sees its siblings."
    import torch

    from steering_vectors.train.batches import PassReader, inner_model
    from steering_vectors.train.reading import EncodedText, encode_samples
    from steering_vectors.train.requests import Request
    from steering_vectors.train.schedules import Strategy, plan_batches

    texts = dict(enumerate(text for p in encode_samples(tokenizer, pairs_of(tokenizer, file, n)) for text in p))
    inner, modules = inner_model(model), Request().modules(model)

    def read(strategy: Strategy, texts: dict[int, Any]) -> torch.Tensor:
        "Activations (layers, texts, d), as computed."
        with torch.no_grad(), PassReader(inner, modules) as reader:
            done = [(job.numbers, reader.run(job.make())) for job in plan_batches(strategy, inner, texts, 2048)]
        at = {number: i for i, number in enumerate(n for numbers, _ in done for n in numbers)}
        return torch.stack([torch.cat([acts[layer] for _, acts in done])[[at[n] for n in texts]] for layer in modules])

    def differences(h: torch.Tensor) -> torch.Tensor:
        return h[:, 0::2] - h[:, 1::2]

    def relative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).norm(dim=-1) / b.norm(dim=-1)

    exact = read(Strategy("single"), texts)
    model.to(torch.bfloat16)
    by_pair, found = {}, {}
    print("bfloat16 from float32, over all layers:   a text   a pair's difference   the vector (worst layer)")
    for name, kind in {"one text a pass": "single", "padded batches": "padded", "packed rows": "packed"}.items():
        h = read(Strategy(kind), texts).float()
        by_pair[kind] = relative(differences(h), differences(exact)).mean(0)
        vector = relative(differences(h).mean(1), differences(exact).mean(1))
        line = [float(x) for x in (relative(h, exact).mean(), by_pair[kind].mean(), vector.mean(), vector.max())]
        found[kind] = line
        print(f"{name:40s}{line[0]:8.4f}{line[1]:21.4f}{line[2]:13.4f} ({line[3]:.3f})")
    more = by_pair["packed"] - by_pair["single"]
    error = float(more.std() / len(more) ** 0.5)
    print(
        f"a pair's difference, packed further than plain by {float(more.mean()):+.4f}, with a standard error of {error:.4f}"
    )
    changed = {**texts, 1: EncodedText([*texts[1].ids[:-1], texts[1].ids[-1] + 1], texts[1].read)}
    others = [n != 1 for n in texts]
    a, b = (read(Strategy("packed"), t)[:, others] for t in (texts, changed))
    leaks = sum(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
    print(f"one branch changed: {leaks} of {len(a)} layers differ in any other text")
    return {**found, "further": float(more.mean()), "standard_error": error, "leaks": leaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", help="a folder or a name from the Hub; left out, the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--plain-kernels", action="store_true")
    parser.add_argument("--json", help="write the numbers here, beside what is there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.dtype, args.device)
    if args.memory_of:
        return memory_of(args.memory_of)
    if args.memory:
        return keep(args.json, "memory", memory())
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from steering_vectors.demo import load_demo_model

    logging.set_verbosity_error()
    if args.model:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            AutoTokenizer.from_pretrained(args.model),
        )
    else:
        model, tokenizer = load_demo_model()
    model = model.to(args.device).eval()
    files = args.files or [None]
    if args.kernels:
        return keep(args.json, "kernels", kernels(model, tokenizer, files[0], args.pairs, max(args.repeats, 5)))
    if args.first:
        numbers = first_and_next(model, tokenizer, files, args.pairs, max(args.repeats, 5))
        return keep(args.json, "first", numbers)
    if args.limit:
        with without_kernels(KERNELS if args.plain_kernels else ()):
            numbers = limit(model, tokenizer, files[0], 1000 if args.pairs == 48 else args.pairs)
        return keep(args.json, "limit", numbers)
    if args.bfloat16:
        return keep(args.json, "bfloat16", bfloat16(model, tokenizer, files[0], args.pairs))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        keep(args.json, "table", table(folder, tokenizer, files, args))


def keep(path: str | None, name: str, numbers: Any) -> None:
    "Put `numbers` into the file under `name`."
    if path:
        old = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps({**old, name: numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
