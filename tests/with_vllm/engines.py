"""What the tests with vLLM share: a model in both engines, kinds of steering, and the comparison."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from steering_vectors import SteeringVector, Tokens
from steering_vectors.demo import tiny_tokenizer

WIDE = 128  # 4 heads of 32: the smallest that vLLM's attention takes on a CPU
SMALL = {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 320, "max_num_seqs": 16}
ALWAYS = {"gpu_memory_utilization": 0.2, "enforce_eager": True, "seed": 0, "enable_prefix_caching": True}
CLOSE = 1e-4  # of log-probabilities
REPORT: list[str] = []  # numbers worth reading, printed at the end


def report(line: str) -> None:
    REPORT.append(line)


def directions(width: int, layers: list[int], size: float, seed: int) -> SteeringVector:
    "A random vector, `size` long at each layer."
    torch.manual_seed(seed)
    return SteeringVector({n: size * torch.nn.functional.normalize(torch.randn(width), dim=0) for n in layers})


def saved(folder: Path, name: str, vector: SteeringVector) -> str:
    path = folder / f"{name}.safetensors"
    vector.save(path)
    return str(path)


def checkpoint(folder: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def texts(count: int = 5) -> list[str]:
    "Prompts of many lengths, some longer than a piece of prefill."
    words = "The day was long and the road was longer, so we sat down by the river and told each other stories. "
    return [(words * 3)[:n] for n in (3, 31, 64, 97, 208)][:count]


# name: vectors with multiplier, tokens and layers (None: all)
KINDS: dict[str, list[tuple[str, float, Tokens | None, list[int] | None]]] = {
    "none": [],
    "all": [("joy", 2.0, None, None)],
    "response": [("joy", -2.0, Tokens.response, None)],
    "prompt": [("joy", 2.0, Tokens.prompt, None)],
    "generated": [("joy", 3.0, Tokens.generated, [1])],
    "the first of the answer": [("joy", 3.0, Tokens.response[:5], None)],
    "a window of the answer": [("joy", -3.0, Tokens.generated[2:7], None)],
    "the end of the prompt": [("joy", 4.0, Tokens.prompt[-3:], None)],
    "columns": [("joy", 4.0, Tokens.columns[1:40:3], None)],
    "a union": [("joy", 2.0, Tokens.prompt[:2] | Tokens.generated[1:4], None)],
    "two vectors": [("joy", 2.0, Tokens.response, None), ("calm", -1.5, Tokens.all[1:], None)],
    "a part": [("inner", 2.0, Tokens.response, None)],
}


def vectors(width: int, layers: list[int], size: float) -> dict[str, SteeringVector]:
    made = {name: directions(width, layers, size, seed) for seed, name in enumerate(["joy", "calm"])}
    inner = directions(width, layers[-1:], size, 2)
    return made | {"inner": SteeringVector(inner.layer_activations, "mlp")}


def steerings(kind: str, have: dict[str, SteeringVector]) -> list[tuple[str, Any]]:
    "The name of each vector, and its steering."
    chosen = [(name, have[name] if at is None else have[name][at], m, which) for name, m, which, at in KINDS[kind]]
    return [(name, vector.steering(multiplier=m, tokens=which)) for name, vector, m, which in chosen]


def asked(kind: str, have: dict[str, SteeringVector]) -> dict[str, Any] | None:
    "What a request of this kind says."
    return {"steering": [how.to_vllm(name) for name, how in steerings(kind, have)]} if KINDS[kind] else None


@contextmanager
def engine(model: str, **options: Any) -> Iterator[Any]:
    "A vLLM engine, and nothing left of it afterwards."
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    chosen = SMALL | ALWAYS | options
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = bool(chosen["enforce_eager"])  # vLLM compiles its helpers even then
    llm = LLM(model, **chosen)
    try:
        yield llm
    finally:
        torch._dynamo.config.disable = before
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, jobs: list[tuple[list[int], dict[str, Any] | None]], new: int, **more: Any) -> list[Any]:
    "Greedy answers, all jobs at once."
    from vllm import SamplingParams

    how = {"temperature": 0.0, "max_tokens": new, "logprobs": 0, "ignore_eos": True} | more
    params = [SamplingParams(extra_args=args, **how) for _, args in jobs]
    return llm.generate([{"prompt_token_ids": ids} for ids, _ in jobs], params, use_tqdm=False)


def scores(out: Any) -> tuple[list[int], list[float]]:
    "The ids that vLLM has chosen, and their log-probabilities."
    ids = list(out.outputs[0].token_ids)
    return ids, [at[i].logprob for at, i in zip(out.outputs[0].logprobs, ids, strict=True)]


@contextmanager
def all_of(how: list[tuple[str, Any]], model: Any, ids: list[int]) -> Iterator[None]:
    "All steerings of one kind, by `apply`."
    with ExitStack() as stack:
        for _, steering in how:
            stack.enter_context(steering.apply(model, prompt=torch.tensor([ids])))
        yield


def expected(model: Any, ids: list[int], new: int, how: list[tuple[str, Any]]) -> tuple[list[int], list[float]]:
    "The same by transformers, steered by `apply`, the answer written token by token."
    prompt = torch.tensor([ids])
    with torch.no_grad(), all_of(how, model, ids):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            eos_token_id=model.config.vocab_size + 1,  # no answer ends before its time
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    chosen = out.sequences[0, len(ids) :]
    logprobs = [at[0].float().log_softmax(-1)[i].item() for at, i in zip(out.logits, chosen, strict=True)]
    return chosen.tolist(), logprobs


def apart(one: tuple[list[int], list[float]], other: tuple[list[int], list[float]]) -> float:
    "The largest difference of log-probabilities; infinite if the ids differ."
    return max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) if one[0] == other[0] else float("inf")


def cold(llm: Any) -> None:
    assert llm.reset_prefix_cache()
