"""The model compiled by vLLM: the addition is part of what is compiled, and its numbers change from pass to pass."""

from typing import Any

import engines
from engines import KINDS

from steering_vectors.demo import tiny_model, tiny_tokenizer

NEW = 8


def test_a_compiled_model_is_steered_alike(folder: Any) -> None:
    model, tokenizer = tiny_model(hidden_size=engines.WIDE), tiny_tokenizer()
    have = engines.vectors(engines.WIDE, [0, 1, 2], 4.0)
    files = {name: engines.saved(folder, f"compiled_{name}", v) for name, v in have.items()}
    path = engines.checkpoint(folder / "compiled", model)
    prompts = [tokenizer(text)["input_ids"] for text in engines.texts(3)]
    options = {"enforce_eager": False, "additional_config": {"steering_vectors": files}}
    with engines.engine(path, **options) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name == "VLLM_COMPILE"
        order = [(kind, ids) for kind in KINDS for ids in prompts]
        outs = engines.generate(llm, [(ids, engines.asked(kind, have)) for kind, ids in order], NEW)
    for (kind, ids), out in zip(order, outs, strict=True):
        want = engines.expected(model, ids, NEW, engines.steerings(kind, have))
        assert engines.apart(engines.scores(out), want) < engines.CLOSE, (kind, len(ids))
