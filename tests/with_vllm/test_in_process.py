"""One engine in this process: every kind of steering at once, pieces of prompts, prefix cache cold and warm."""

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import engines
import pytest
import torch
from engines import KINDS

from steering_vectors.demo import tiny_model, tiny_tokenizer

NEW = 12


@pytest.fixture(scope="module")
def served(folder: Any) -> Iterator[SimpleNamespace]:
    "A tiny model in vLLM and in transformers, its vectors, and what transformers writes."
    model, tokenizer = tiny_model(hidden_size=engines.WIDE), tiny_tokenizer()
    have = engines.vectors(engines.WIDE, [0, 1, 2], 4.0)
    files = {name: engines.saved(folder, name, v) for name, v in have.items()}
    prompts = [tokenizer(text)["input_ids"] for text in engines.texts()]
    wanted = {
        (kind, i): engines.expected(model, ids, NEW, engines.steerings(kind, have))
        for kind in KINDS
        for i, ids in enumerate(prompts)
    }
    path = engines.checkpoint(folder / "tiny", model)
    with engines.engine(path, additional_config={"steering_vectors": files}) as llm:
        yield SimpleNamespace(llm=llm, model=model, have=have, prompts=prompts, wanted=wanted, files=files, path=path)


def everything(served: SimpleNamespace, order: list[tuple[str, int]]) -> tuple[float, int]:
    "All kinds for all prompts in one call: the largest difference, and how many tokens came from the cache."
    jobs = [(served.prompts[i], engines.asked(kind, served.have)) for kind, i in order]
    outs = engines.generate(served.llm, jobs, NEW)
    far = [engines.apart(engines.scores(out), served.wanted[key]) for key, out in zip(order, outs, strict=True)]
    assert max(far) < engines.CLOSE, dict(zip(order, far, strict=True))
    return max(far), sum(out.num_cached_tokens or 0 for out in outs)


def test_steering_changes_every_answer(served: SimpleNamespace) -> None:
    "So that equal numbers mean something: each kind differs from the unsteered one, far more than the tolerance."
    for (kind, i), steered in served.wanted.items():
        plain = served.wanted["none", i]
        assert kind == "none" or engines.apart(steered, plain) > 100 * engines.CLOSE, (kind, i)


def test_a_mixed_batch_cold_and_warm(served: SimpleNamespace) -> None:
    "The cache is full of blocks of every kind when the second and third call look for theirs."
    order = [(kind, i) for kind in KINDS for i in range(len(served.prompts))]
    engines.cold(served.llm)
    first = everything(served, order)
    random.Random(0).shuffle(order)
    second = everything(served, order)
    third = everything(served, order[::-1])
    calls = ", ".join(f"{far:.1e} ({cached} tokens from the cache)" for far, cached in (first, second, third))
    engines.report(f"mixed batch of {len(order)} requests: largest difference {calls}")
    assert second[1] > first[1] > 0


def test_the_log_probabilities_of_prompts(served: SimpleNamespace) -> None:
    "Each position of a prompt that is computed in pieces."
    ids = served.prompts[-1]
    jobs = [(ids, engines.asked(kind, served.have)) for kind in KINDS]
    outs = engines.generate(served.llm, jobs, 1, prompt_logprobs=0)
    for kind, out in zip(KINDS, outs, strict=True):
        with torch.no_grad(), engines.all_of(engines.steerings(kind, served.have), served.model, ids):
            logits = served.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        got = torch.tensor([at[i].logprob for at, i in zip(out.prompt_logprobs[1:], ids[1:], strict=True)])
        assert (got - wanted).abs().max() < engines.CLOSE, kind


def test_an_unsteered_request_is_as_with_an_empty_cache(served: SimpleNamespace) -> None:
    """A steered answer is the prompt of an unsteered request: its steered blocks are not taken over.

    The difference is 0; where blocks of the unsteered prompt are taken over, pieces are cut elsewhere and sums round otherwise.
    """
    for kind in ("all", "response", "two vectors"):
        engines.cold(served.llm)
        steered = engines.generate(served.llm, [(served.prompts[3], engines.asked(kind, served.have))], 90)[0]
        ids = served.prompts[3] + list(steered.outputs[0].token_ids)
        again = engines.generate(served.llm, [(ids, engines.asked("all", served.have))], 1)[0]
        warm = engines.generate(served.llm, [(ids, None)], NEW)[0]
        engines.cold(served.llm)
        empty = engines.generate(served.llm, [(ids, None)], NEW)[0]
        far = engines.apart(engines.scores(warm), engines.scores(empty))
        if kind == "all":
            assert again.num_cached_tokens > 150 and (warm.num_cached_tokens, far) == (0, 0)
        assert far < 1e-5, (kind, far)


def test_requests_that_steer_their_answer_share_the_prompt(served: SimpleNamespace) -> None:
    "And two that steer the prompt alike share it with each other, but with nobody else."
    engines.cold(served.llm)
    engines.generate(served.llm, [(served.prompts[-1], None)], 1)
    shared = {}
    for kind in ("generated", "response", "all", "prompt"):
        out = engines.generate(served.llm, [(served.prompts[-1], engines.asked(kind, served.have))], 1)[0]
        shared[kind] = out.num_cached_tokens
    whole = shared["generated"]
    assert whole > 150 and shared == {"generated": whole, "response": whole, "all": 0, "prompt": whole}, shared


def test_parameters_are_used_again_and_never_changed(served: SimpleNamespace) -> None:
    from vllm import SamplingParams

    extra = engines.asked("response", served.have)
    params = SamplingParams(temperature=0.0, max_tokens=NEW, logprobs=0, ignore_eos=True, extra_args=extra)
    before = json.dumps(params.extra_args)
    prompt = {"prompt_token_ids": served.prompts[1]}
    outs = [served.llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2)]
    assert json.dumps(params.extra_args) == before
    for out in outs:
        assert engines.apart(engines.scores(out), served.wanted["response", 1]) < engines.CLOSE


def test_several_answers_to_one_prompt(served: SimpleNamespace) -> None:
    out = engines.generate(
        served.llm, [(served.prompts[2], engines.asked("response", served.have))], NEW, n=3, temperature=1e-4, seed=0
    )[0]
    assert {tuple(o.token_ids) for o in out.outputs} == {tuple(served.wanted["response", 2][0])}


@pytest.mark.parametrize(
    "asked, why",
    [
        ('{"vector": "grief"}', "no vector 'grief'"),
        ('{"vector": "joy", "multiplyer": 2}', "no field 'multiplyer'"),
        ('{"vector": "joy", "multiplier": NaN}', "not a number"),
        ('{"vector": "joy", "multiplier": 1e999}', "not finite"),
        ('{"vector": "joy", "operator": "ablation"}', "adds vectors"),
        ('{"vector": "joy", "tokens": "Tokens.generated - [13]"}', "leaves out token ids"),
        ('{"vector": "joy", "tokens": "Tokens.prompt[900:]"}', "selects nothing of a prompt of"),
        ('{"vector": "joy", "tokens": "__import__(\'os\')"}', "is not understood"),
        ('{"vector": "joy", "layers": [7]}', "has no layer 7"),
        ("joy", "Expecting value"),
        (17, "is written as an object"),
    ],
)
def test_what_cannot_be_steered_is_refused_and_the_engine_goes_on(
    served: SimpleNamespace, asked: Any, why: str
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=why):
        engines.generate(served.llm, [(served.prompts[0], {"steering": asked})], 1)
    out = engines.generate(served.llm, [(served.prompts[0], engines.asked("all", served.have))], NEW)[0]
    assert engines.apart(engines.scores(out), served.wanted["all", 0]) < engines.CLOSE


def test_requests_that_are_stopped_and_computed_again(served: SimpleNamespace) -> None:
    "A cache too small for all answers: some requests lose their blocks in the middle, and the answers are the same."
    kinds = [kind for kind in KINDS if kind != "none"][:8]
    new, ids = 80, served.prompts[2]
    wanted = [engines.expected(served.model, ids, new, engines.steerings(kind, served.have)) for kind in kinds]
    options = {"num_gpu_blocks_override": 20, "additional_config": {"steering_vectors": served.files}}
    with engines.engine(served.path, enable_prefix_caching=False, disable_log_stats=False, **options) as llm:
        outs = engines.generate(llm, [(ids, engines.asked(kind, served.have)) for kind in kinds], new)
        stopped = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert stopped > 0
    for kind, out, want in zip(kinds, outs, wanted, strict=True):
        assert engines.apart(engines.scores(out), want) < engines.CLOSE, kind
