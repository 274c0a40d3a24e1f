"""Compiled forwards: what was traced before a hook came would run without it. Here it does not."""

from typing import Any

import plain
import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from steering_vectors import SteeringVector, record_activations
from steering_vectors.demo import tiny_model
from steering_vectors.steer.tokens import Tokens

S, NEW = 6, 5
LAYER = "model.layers.{}"


@pytest.fixture
def model() -> Any:
    torch._dynamo.reset()
    yield tiny_model("llama", num_layers=2)
    torch._dynamo.reset()


def vectors() -> dict[int, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(32, generator=g) for n in (0, 1)}


def prompt() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, S), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, compiled: bool = True) -> Any:
    "With a static cache, whose forward `generate` compiles; on the CPU it has to be told to."
    config = CompileConfig(backend="eager", fullgraph=False, dynamic=False)
    config._compile_all_devices = compiled
    return model.generate(
        **prompt(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, cache_implementation="static",
        compile_config=config, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def steps_of(out: Any, row: int) -> Tensor:
    return torch.stack([step[row] for step in out.logits])


def expected(model: Any, out: Any, row: int, m: float, first: int = 0) -> Tensor:
    pads = (2, 0)[row]
    named = {LAYER.format(n): m * v for n, v in vectors().items()} if m else {}
    return plain.logits_of_steps(model, out.sequences[row], S, pads, named, lambda c, own: c >= first)


class Traced:
    "Counts the graphs that torch.compile makes."

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def test_the_fault_is_real(model: Any) -> None:
    "A plain hook that is added after an unsteered, compiled generation is skipped on the passes that are compiled."
    generate(model)
    calls: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: calls.append(1))
    generate(model)
    hook.remove()
    assert len(calls) < NEW, "the compiled passes did not call it"


@pytest.mark.parametrize(
    "say,first", [({}, 0), ({"min_token_index": 3}, 3), ({"min_token_index": S + 1}, S + 1)], ids=str
)
def test_static_cache_generation_that_compiles(model: Any, say: dict[str, Any], first: int) -> None:
    "Steered on every pass, before and after unsteered runs; the model is clean afterwards."
    vector = SteeringVector(vectors())
    with vector.apply(model, **say):
        before = generate(model)
    unsteered = generate(model)
    with vector.apply(model, **say):
        after = generate(model)
    again = generate(model)
    for row in range(2):
        assert plain.far(steps_of(before, row), expected(model, before, row, 1.0, first)) < 1e-5
        assert plain.far(steps_of(after, row), expected(model, after, row, 1.0, first)) < 1e-5
        assert plain.far(steps_of(unsteered, row), expected(model, unsteered, row, 0)) < 1e-5
        assert plain.far(steps_of(again, row), expected(model, again, row, 0)) < 1e-5
    assert not torch.equal(before.sequences, unsteered.sequences)
    assert torch.equal(again.sequences, unsteered.sequences) and torch.equal(before.sequences, after.sequences)
    assert plain.hooks_on(model) == 0


def test_compiled_generation_without_steering_is_compiled_again_afterwards(model: Any) -> None:
    "The switch goes back: after a context, compiled code is used as before."
    with SteeringVector(vectors()).apply(model):
        generate(model)
    torch._dynamo.utils.counters.clear()
    generate(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "it compiles again, once the model is free"


@pytest.mark.parametrize(
    "say", [{}, {"min_token_index": 2}, {"token_indices": [0, 3]}, {"tokens": Tokens.response}], ids=str
)
@pytest.mark.parametrize("how", ["the whole model", "torch.compile(model)", "its blocks"])
def test_compiled_called_applied_called(model: Any, say: dict[str, Any], how: str) -> None:
    ids, backend = prompt()["input_ids"], Traced()
    with torch.no_grad():
        plainly = model(ids, use_cache=False).logits
        with SteeringVector(vectors()).apply(model, prompt=ids, **say):
            expected = model(ids, use_cache=False).logits
        if how == "its blocks":
            for layer in model.model.layers:
                layer.compile(backend=backend)
            compiled = model
        elif how == "the whole model":
            model.compile(backend=backend)
            compiled = model
        else:
            compiled = torch.compile(model, backend=backend)
        compiled(ids, use_cache=False)
        assert backend.graphs > 0, "it was compiled"
        for _ in range(2):
            with SteeringVector(vectors()).apply(compiled, prompt=ids, **say), record_activations(compiled) as recorded:
                steered = compiled(ids, use_cache=False).logits
            assert len(recorded[1]) == 1
            assert plain.far(steered, expected) < 1e-5
            assert plain.far(compiled(ids, use_cache=False).logits, plainly) < 1e-5
    assert plain.far(expected, plainly) > 1e-2
    assert plain.hooks_on(model) == 0


def test_a_vector_of_the_plain_model_fits_the_compiled_one(model: Any) -> None:
    compiled = torch.compile(model, backend="eager")
    assert list(SteeringVector(vectors()).apply(compiled).modules.values()) == [
        "_orig_mod.model.layers.0",
        "_orig_mod.model.layers.1",
    ]
