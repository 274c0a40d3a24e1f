"""Are two checkouts the same library to the bit? Vectors, logits, texts and files of both, compared.

    git worktree add ../before COMMIT
    python benchmarks/same_results.py --before ../before

Each checkout runs in a process of its own on the same tiny models of many families, with one thread. What is compared goes
through public names alone, so a change of structure has nothing to excuse a difference with.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ["llama", "gpt2", "gemma2", "opt", "mistral", "qwen2", "phi3", "gpt_neox", "falcon"]
QUESTIONS = ["Is it warm", "Do you like long walks by the sea", "How was the day", "What is for tea"]
PAIRS = [(f"Be brief. {q}? Yes, gladly", f"Be brief. {q}? No, never") for q in QUESTIONS]


def digest(value: Any) -> str:
    "One number for tensors, texts and files."
    import torch

    if isinstance(value, torch.Tensor):
        kept = value.detach().contiguous()
        value = f"{kept.dtype}{tuple(kept.shape)}".encode() + kept.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()[:16]


def results() -> dict[str, str]:
    "Everything that this process's library computes, by name."
    import torch

    torch.set_num_threads(1)
    from steering_vectors.demo import tiny_model, tiny_tokenizer

    tokenizer, found = tiny_tokenizer(), {}
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model(family).to(dtype)
            for name, value in of_model(model, tokenizer).items():
                found[f"{family} {str(dtype)[6:]}: {name}"] = digest(value)
    return found


def of_model(model: Any, tokenizer: Any) -> dict[str, Any]:
    "Vectors, steered logits and texts, measures and files of one model."
    import torch

    import steering_vectors as sv

    out: dict[str, Any] = {}
    aggregators = {"mean": sv.mean_aggregator(), "pca": sv.pca_aggregator(), "logistic": sv.logistic_aggregator()}
    vectors = {}
    for layer_type in ("decoder_block", "self_attn", "mlp"):
        v = vectors[layer_type] = sv.train_steering_vector(model, tokenizer, PAIRS, layer_type=layer_type)
        out |= {f"{layer_type} {n}": x for n, x in v.layer_activations.items()}
    for name, aggregator in aggregators.items():
        v = sv.train_steering_vector(model, tokenizer, PAIRS, layers=[1, 2], aggregator=aggregator, read_token_index=-2)
        out |= {f"{name} {n}": x for n, x in v.layer_activations.items()}
    read = sv.extract_activations(model, tokenizer, PAIRS, read=sv.Tokens.all[2:])
    out |= {f"extracted {side} {n}": x for side, acts in enumerate(read) for n, x in acts.items()}

    v = vectors["decoder_block"]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(["Hello", "How was your day?"], padding=True, return_tensors="pt")
        for name, how in steerings(sv, batch).items():
            for layer_type, vector in vectors.items():
                with torch.no_grad(), vector.apply(model, **how):
                    out[f"{side} {layer_type} {name}"] = model(**batch).logits
        with v[1].apply(model, multiplier=[3.0, -3.0], tokens=sv.Tokens.response, prompt=batch):
            out[f"{side} text"] = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
    contrasts = [("Hi", "yes", "no"), ("Hello there", "glad", "sad")]
    out["gap"] = sv.completion_gap(model, tokenizer, v[1], contrasts, multipliers=[-1, 0, 2]).values
    out["loss"] = sv.text_loss(model, tokenizer, v[1], ["The sky is blue"], multipliers=[0, 2]).values
    out["sweep"] = sv.sweep(
        model, tokenizer, v, "Hi", layers=[1, "all"], multipliers=[0, 2], max_new_tokens=5
    ).token_ids
    out["projections"] = sv.projections(model, tokenizer, v, "Hello there").values
    with tempfile.TemporaryDirectory() as folder:
        v[1:].to_gguf(f"{folder}/v.gguf")
        out["v.gguf"] = Path(folder, "v.gguf").read_bytes()
        v.save(f"{folder}/v.safetensors")  # its header has no order of its own
        raw = Path(folder, "v.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        out["v.safetensors"] = (json.dumps(header, sort_keys=True), sv.SteeringVector.load(f"{folder}/v.safetensors"))
    return out


def steerings(sv: Any, batch: Any) -> dict[str, dict[str, Any]]:
    "Arguments of `apply`."
    T = sv.Tokens
    return {
        "all": {},
        "twice": {"multiplier": 2.0},
        "rows": {"multiplier": [1.5, -1.0]},
        "columns": {"min_token_index": 3},
        "list": {"token_indices": [0, -1]},
        "prompt": {"tokens": T.prompt[-3:], "prompt": batch},
        "joined": {"tokens": (T.prompt[1:4] | T.response) - [5], "prompt": batch},
        "ablation": {"operator": sv.ablation_operator()},
        "half": {"operator": sv.ablation_operator(0.5), "multiplier": [1.0, 0.0]},
        "then": {"operator": sv.ablation_then_addition_operator(), "multiplier": 1.5, "tokens": T.all[2:], "prompt": batch},
    }  # fmt: skip


def run(checkout: Path) -> dict[str, str]:
    "The results of a checkout, computed in a process of its own."
    env = dict(
        os.environ, PYTHONPATH=str(checkout), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error"
    )
    done = subprocess.run([sys.executable, __file__], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout")
    before = parser.parse_args().before
    if before is None:
        print(json.dumps(results()))
        return 0
    old, new = run(before.resolve()), run(ROOT)
    different = [name for name in old | new if old.get(name) != new.get(name)]
    print(f"{len(new)} results of {len(FAMILIES)} families, {len(different)} different from {before}")
    print("\n".join(different[:40]))
    return min(len(different), 1)


if __name__ == "__main__":
    sys.exit(main())
