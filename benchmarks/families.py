"""What holds on every family of the installed transformers: this library beside another that has its names.

    python benchmarks/families.py                         # this library
    python benchmarks/families.py --other PATH            # and the one installed in folder PATH (pip install --target)

Each library runs in a process of its own on the same tiny models, and is compared with hooks and loops written by hand,
which use no cache (tests/helpers/families_by_hand.py). The list of layers to be found is the committed one (tests/helpers/families.json).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
CHECKS = ["found", *PARTS, "steered", "trained", "min_token_index, cached", "left-padded batch"]
PAIRS = [("I am glad", "I am sad"), ("what a day it is", "no"), ("yes, it is so", "never in my life")]


def measure(tokenizer_folder: str) -> dict[str, dict[str, bool]]:
    "Family -> check -> whether it holds, for the library that this process imports."
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import families
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    listed = families.listed()
    return {name: marks(name, listed[name], tokenizer) for name in listed if name not in families.NOT_TEXT}


def holds(check: Callable[[], Any]) -> bool:
    try:
        return bool(check())
    except Exception:
        return False


def marks(name: str, listed: dict[str, Any], tokenizer: Any) -> dict[str, bool]:
    "What holds on one family; a part that it does not have is not counted."
    import families
    import torch
    from families_by_hand import STEPS, by_hand, generate, logits, prepare, vector

    from steering_vectors import SteeringVector, guess_and_enhance_layer_config, train_steering_vector

    family = prepare(name)
    model, ids, full = family.model, family.ids, torch.ones_like(family.ids)
    config: dict[str, Any] = {}
    with families.quiet():
        holds(lambda: config.update(guess_and_enhance_layer_config(model)))
    block = listed["decoder_block"].replace("{num}", "1")
    found = config.get("decoder_block") == listed["decoder_block"]
    out = {"found": found}
    for part in PARTS:
        if listed[part]:
            inside = config.get(part)
            out[part] = inside is not None and (callable(inside) or inside.startswith(listed[part].split("{num}")[0]))
    v = vector(family, block)
    steering = SteeringVector({1: v}, "decoder_block")

    def steered() -> bool:
        before = logits(model, ids)
        with steering.apply(model):
            return not torch.allclose(logits(model, ids), before, atol=1e-7, rtol=0)

    def trained() -> bool:
        with families.quiet():
            one, many = (train_steering_vector(model, tokenizer, PAIRS, batch_size=n) for n in (1, 3))
        a, b = one.layer_activations, many.layer_activations
        return all(float((a[n] - b[n]).norm()) <= 1e-4 * float(a[n].norm()) for n in a)

    def law(ids: Any, mask: Any, start: int) -> bool:
        columns = (torch.arange(ids.shape[1] + STEPS + 1) >= start).expand(len(ids), -1)
        cache = name not in families.NO_CACHE
        bare, wanted = (by_hand(model, block, w, ids, mask, columns)[1] for w in (None, v))
        noise = float((generate(model, ids, mask, use_cache=cache)[1] - bare).abs().max())
        with steering.apply(model, min_token_index=start):
            got = generate(model, ids, mask, use_cache=cache)[1]
        least = 1e-4 if model.dtype == torch.float32 else 1e-7
        return float((got - wanted).abs().max()) <= least + 4 * noise

    out["steered"] = holds(lambda: found and steered())
    out["trained"] = holds(lambda: found and trained())
    if name not in families.REFUSED:
        out["min_token_index, cached"] = holds(lambda: found and law(ids, full, 4))
        if name in families.PADDED_FLOAT32:
            model.float()
        out["left-padded batch"] = holds(lambda: found and law(ids * family.mask, family.mask, ids.shape[1]))
    return out


def run(path: str | None, tokenizer_folder: str) -> dict[str, dict[str, bool]]:
    "Measure in a process of its own; `path` is where it finds its `steering_vectors`."
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([path or str(ROOT), *sys.path]))
    command = [sys.executable, __file__, "--measure", tokenizer_folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tokenizer_folder)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    marks: dict[str, dict[str, bool]] = json.loads(done.stdout.splitlines()[-1])
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", help="folder in which another library of this name is installed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    from steering_vectors.demo import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer().save_pretrained(folder)
        columns = {"this": run(None, folder)} | ({"other": run(args.other, folder)} if args.other else {})
    print(f"{'families on which it holds':<28}" + "".join(f"{name:>12}" for name in columns))
    for check in CHECKS:
        cells = []
        for marks in columns.values():
            asked = [m[check] for m in marks.values() if check in m]
            cells.append(f"{f'{sum(asked)}/{len(asked)}':>12}")
        print(f"{check:<28}" + "".join(cells))


if __name__ == "__main__":
    main()
