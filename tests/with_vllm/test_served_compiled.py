"""The model compiled by vLLM: the addition is part of what is compiled, and its numbers change from pass to pass."""

from typing import Any

import engines
import pytest
from engines import KINDS

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model, tiny_tokenizer

NEW = 8


def far(folder: Any, have: dict[str, SteeringVector]) -> float:
    "The largest difference of a compiled engine from transformers, over all kinds."
    model, tokenizer = tiny_model(hidden_size=engines.WIDE), tiny_tokenizer()
    files = {name: engines.saved(folder, f"compiled_{name}", v) for name, v in have.items()}
    path = engines.checkpoint(folder / "compiled", model)
    order = [(kind, tokenizer(text)["input_ids"]) for kind in KINDS for text in engines.texts(3)]
    with engines.engine(path, enforce_eager=False, additional_config={"steering_vectors": files}) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
        outs = engines.generate(llm, [(ids, engines.asked(kind, have)) for kind, ids in order], NEW)
    wanted = [engines.expected(model, ids, NEW, engines.steerings(kind, have)) for kind, ids in order]
    found = max(engines.apart(engines.scores(out), want) for out, want in zip(outs, wanted, strict=True))
    engines.report(f"compiled: {len(order)} requests, largest difference {found:.1e}")
    return found


def test_a_compiled_model_is_steered_alike(folder: Any) -> None:
    assert far(folder, engines.vectors(engines.WIDE, [0, 1, 2], 4.0)) < engines.CLOSE


@pytest.mark.slow
def test_code_that_was_compiled_with_other_vectors_is_no_trap(folder: Any) -> None:
    "The same model and the same files with other numbers in them, after vLLM has kept what it compiled."
    for size in (4.0, 3.0):
        assert far(folder, engines.vectors(engines.WIDE, [0, 1, 2], size)) < engines.CLOSE
