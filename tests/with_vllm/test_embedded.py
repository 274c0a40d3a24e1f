"""The embedded model in vLLM: real texts, equal to transformers and to what the guide's page shows; and the speed."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import pytest

from steering_vectors import Tokens, prompt_ids, train_steering_vector
from steering_vectors.demo import joy_pairs, load_demo_model

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "nbs" / "guide" / "serve.ipynb"
QUESTION, NEW = "Tell me about your day.", 24
WHICH = {"every token": None, "the answer": Tokens.response, "its first 8 tokens": Tokens.response[:8]}
LAYERS, MULTIPLIERS = [12, 15, 18], [-3, -1, 0, 1, 3]


@pytest.fixture(scope="module")
def served(folder: Any) -> Iterator[SimpleNamespace]:
    model, tokenizer = load_demo_model()
    vector = train_steering_vector(model, tokenizer, joy_pairs(tokenizer)[::2], layers=LAYERS, show_progress=False)
    files = {"joy": engines.saved(folder, "embedded", vector)}
    path = engines.checkpoint(folder / "embedded", model, tokenizer)
    ids = prompt_ids(tokenizer, QUESTION)[0].tolist()
    options = {"additional_config": {"steering_vectors": files}, "max_model_len": 512}
    with engines.engine(path, **options) as llm:
        yield SimpleNamespace(llm=llm, model=model, tokenizer=tokenizer, vector=vector, ids=ids)


def steering(served: SimpleNamespace, which: str, layer: int, multiplier: float) -> Any:
    return served.vector[layer].steering(multiplier=multiplier, tokens=WHICH[which])


def test_real_texts_are_those_of_transformers_and_of_the_page(served: SimpleNamespace) -> None:
    order = [(which, n, m) for which in WHICH for n in LAYERS for m in MULTIPLIERS]
    jobs = [(served.ids, {"steering": steering(served, *key).to_vllm("joy")}) for key in order]
    outs = engines.generate(served.llm, jobs, NEW)
    said = {
        key: served.tokenizer.decode(engines.scores(out)[0], skip_special_tokens=True)
        for key, out in zip(order, outs, strict=True)
    }
    engines.report("recorded: " + json.dumps([[*key, text] for key, text in said.items()]))
    far = {
        key: engines.apart(
            engines.scores(out), engines.expected(served.model, served.ids, NEW, [("joy", steering(served, *key))])
        )
        for key, out in zip(order, outs, strict=True)
    }
    engines.report(f"{len(order)} requests, largest difference {max(far.values()):.1e}")
    assert max(far.values()) < engines.CLOSE, far
    page = PAGE.read_text(encoding="utf-8")
    for key, text in said.items():  # what a text begins with; near ties may fall otherwise on another processor
        start = json.dumps(" ".join(text.split()[:6]))[1:-1]
        assert json.dumps(start)[1:-1] in page, (key, text)


def test_the_speed_steered_and_unsteered_in_turn(served: SimpleNamespace) -> None:
    "Reported; asserted only where it would be a fault and no noise."
    plain, steered = [(served.ids, None)] * 16, [(served.ids, {"steering": served.vector.to_vllm("joy", 1)})] * 16
    rates: dict[str, list[float]] = {"unsteered": [], "steered": []}
    engines.generate(served.llm, plain + steered, 4)
    for _ in range(3):
        for name, jobs in (("unsteered", plain), ("steered", steered)):
            start = time.perf_counter()
            outs = engines.generate(served.llm, jobs, 32)
            rates[name].append(sum(len(o.outputs[0].token_ids) for o in outs) / (time.perf_counter() - start))
    engines.report(
        f"tokens per second, in turn: { {name: [round(r) for r in values] for name, values in rates.items()} }"
    )
    assert max(rates["steered"]) > 0.5 * max(rates["unsteered"])
