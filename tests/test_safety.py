"""Nothing is left behind: not by errors, not by Ctrl-C at any line, not by any order of opening and closing."""

import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from plain import hooks_on

import steering_vectors
from steering_vectors import (
    SteeringVector,
    ablation_operator,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    record_activations,
    train_steering_vector,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.model import attachments
from steering_vectors.model.hooks import edit_output
from steering_vectors.steer.tokens import Tokens

IDS = torch.arange(3, 13).reshape(2, 5)
D = 32
UNGUARDED = {"record_activations", "Attachment.remove", "Attachment.__exit__"}
SOURCES = {
    str(Path(steering_vectors.__file__).parent / f"{name}.py")
    for name in (
        "model/attachments",
        "model/hooks",
        "model/runs",
        "model/recording",
        "steer/steering",
        "steer/positions",
    )
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def clean(model: Any) -> Any:
    "Before and after each test the model is the same, and unhooked."
    before, logits = hooks_on(model), model(IDS).logits
    yield
    assert hooks_on(model) == before == 0
    assert len(attachments._listeners) == 0 and attachments._stance.forced is None
    assert torch.equal(model(IDS).logits, logits)


def vector(*layers: int, seed: int = 0) -> SteeringVector:
    g = torch.Generator().manual_seed(seed)
    return SteeringVector({n: torch.randn(D, generator=g) for n in layers})


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupted_at(line: int, run: Callable[[], Any]) -> bool:
    """Run, with a KeyboardInterrupt before the line of that number that the library executes; whether there was such a line.

    Left out are the few lines on the way out that no Python code can guard: the end of a recording's block, those of `__exit__`, and the first of `remove`.
    """
    left = line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if code.co_filename not in SOURCES or code.co_qualname in UNGUARDED:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        while attachments._lock._is_owned():  # a tracer can stop between a block and its exit, where no signal comes in
            attachments._lock.release()
        return True
    finally:
        sys.settrace(None)
    return False


def every_line(run: Callable[[], Any], check: Callable[[], None], step: int = 1) -> int:
    lines = 0
    while interrupted_at(lines * step, run):
        check()
        lines += 1
    check()
    return lines


def nothing_left(model: Any) -> Callable[[], None]:
    def check() -> None:
        assert hooks_on(model) == 0 and len(attachments._listeners) == 0 and attachments._stance.forced is None

    return check


@pytest.mark.parametrize("say", [{}, {"min_token_index": 2}], ids=str)
def test_an_interrupt_at_any_line_of_a_with_statement(model: Any, say: dict[str, Any]) -> None:
    "Attaching, the pass itself, and removing."

    def run() -> None:
        with torch.no_grad(), vector(0, 2).apply(model, **say):
            model(IDS)

    assert every_line(run, nothing_left(model), step=1 if say == {} else 3) > 40


def test_an_interrupt_at_any_line_of_patch(model: Any) -> None:
    kept: list[Any] = []

    def run() -> None:
        kept.clear()
        kept.append(vector(0, 2).patch(model, min_token_index=2))
        kept.pop().remove()

    assert every_line(run, nothing_left(model)) > 60


def test_an_interrupt_at_any_line_of_a_recording(model: Any) -> None:
    def run() -> None:
        with torch.no_grad(), record_activations(model, layer_nums=[0, 2]):
            model(IDS)

    assert every_line(run, nothing_left(model)) > 15


def test_the_search_for_leftovers_can_find_one(model: Any) -> None:
    "An attach without its clean-up leaves a hook, and the check sees it."

    def careless() -> None:
        for n in (0, 2):
            edit_output(model.model.layers[n], lambda h: h)

    with pytest.raises(AssertionError):
        every_line(careless, nothing_left(model))
    for handle in [e[0] for entry in list(attachments._listeners) for e in entry.edits]:
        handle.remove()  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("say", [{}, {"min_token_index": 2}, {"tokens": Tokens.response}], ids=str)
def test_an_error_during_generate(model: Any, error: type[BaseException], say: dict[str, Any]) -> None:
    calls = itertools.count()

    def fail(module: Any, args: Any) -> None:
        if next(calls) == 3:
            raise error("stop")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(error), vector(0, 1).apply(model, **say):
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    finally:
        hook.remove()


def test_after_an_interrupt_the_same_context_goes_on(model: Any) -> None:
    "A pass that was cut off leaves no half-known place behind."
    armed = [True]

    def fail(module: Any, args: Any) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    with torch.no_grad(), vector(0).apply(model, min_token_index=2):
        expected = model(IDS).logits
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(IDS, attention_mask=torch.tensor([[0, 0, 1, 1, 1]] * 2))
        hook.remove()
        assert torch.equal(model(IDS).logits, expected)
        base = model.model(IDS).last_hidden_state
        assert torch.equal(model.lm_head(base), expected)


# --- errors while attaching ------------------------------------------------------------------------------------------


def test_an_error_while_attaching_attaches_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.nn.Module.register_forward_hook, itertools.count()

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("the real cause")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", fail)
    with pytest.raises(RuntimeError, match="the real cause"):
        with vector(0, 1, 2).apply(model, min_token_index=1):
            raise AssertionError("the block must not run")


WRONG: list[tuple[type[Exception], str, Callable[[Any], Any]]] = [
    (ValueError, "Layer 7 does not exist", lambda m: vector(0, 7).patch(m)),
    (ValueError, "the same layer", lambda m: vector(2, -1).patch(m)),
    (ValueError, "has width 3", lambda m: SteeringVector({0: torch.ones(3)}).patch(m)),
    (ValueError, "Unknown layer_type", lambda m: SteeringVector({0: torch.ones(D)}, "block").patch(m)),
    (ValueError, "Pass one of them", lambda m: vector(0).patch(m, min_token_index=1, token_indices=[1])),
    (ValueError, "finite", lambda m: vector(0).patch(m, multiplier=float("nan"))),
    (ValueError, "one number per row", lambda m: vector(0).patch(m, multiplier=torch.ones(2, 2))),
    (TypeError, "operator must be", lambda m: vector(0).patch(m, operator=3)),
    (TypeError, "prompt= takes", lambda m: vector(0).patch(m, tokens=Tokens.response, prompt="Hello")),
    (TypeError, "Module", lambda m: vector(0).patch("gpt2")),
    (ValueError, "no module", lambda m: vector(0).patch(m, {"decoder_block": "layers.{num}"})),
    (ValueError, "does not exist", lambda m: record_activations(m, layer_nums=[9]).__enter__()),
    (ValueError, "sample", lambda m: train_steering_vector(m, tiny_tokenizer(), [])),
    (ValueError, "Layer 9", lambda m: train_steering_vector(m, tiny_tokenizer(), [("a", "b")], layers=[9])),
]


@pytest.mark.parametrize("error,words,call", WRONG, ids=[words for _, words, _ in WRONG])
def test_bad_input_attaches_nothing(model: Any, error: type[Exception], words: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(error, match=words):
        call(model)


def test_an_error_inside_the_pass_names_its_cause(model: Any) -> None:
    with (
        pytest.raises(ValueError, match="3 numbers, one per row, but the model was given 2 rows"),
        vector(0).apply(model, multiplier=[1, 2, 3]),
    ):
        model(IDS)
    with (
        pytest.raises(ValueError, match="operator must return"),
        vector(0).apply(model, operator=lambda h, v: h.sum(-1)),
    ):
        model(IDS)
    with (
        pytest.raises(ValueError, match="mask of tokens has 3 rows"),
        vector(0).apply(model, token_indices=torch.ones(3, 5)),
    ):
        model(IDS)
    with pytest.raises(ZeroDivisionError), vector(0).apply(model, operator=lambda h, v: 1 / 0):
        model(IDS)


# --- orders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_handles_go_in_any_order(model: Any, order: tuple[int, ...]) -> None:
    makers = [
        lambda: vector(0, 1, seed=1).apply(model),
        lambda: vector(1, 2, seed=2).apply(model, min_token_index=2),
        lambda: vector(1, seed=3).apply(model, operator=ablation_operator(), multiplier=[1, 0]),
    ]
    handles = [make().attach() for make in makers]
    left = [0, 1, 2]
    for gone in order:
        handles[gone].remove()
        left.remove(gone)
        with torch.no_grad():
            now = model(IDS).logits
        others = [makers[n]() for n in left]
        for handle in [handles[n] for n in left]:
            handle.remove()
        for handle in others:
            handle.attach()
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, now), "as if the others had been opened alone"
        handles = [others[left.index(n)] if n in left else handles[n] for n in range(3)]


def test_random_opening_and_closing(model: Any) -> None:
    rng, open_ = random.Random(0), []
    for _ in range(60):
        if open_ and rng.random() < 0.5:
            open_.pop(rng.randrange(len(open_))).remove()
        else:
            say = rng.choice([{}, {"min_token_index": 1}, {"multiplier": 0}, {"multiplier": [1, 0]}])
            open_.append(vector(rng.randrange(3)).patch(model, **say))
        with torch.no_grad():
            model(IDS)
    for handle in open_:
        handle.remove()


def test_a_handle_can_be_used_again(model: Any) -> None:
    handle = vector(1).apply(model, min_token_index=2)
    results = []
    for _ in range(2):
        with torch.no_grad(), handle, handle:  # entered twice, left twice
            results.append(model(IDS).logits)
    assert torch.equal(*results) and not handle.attached
    handle.attach()
    with pytest.raises(ValueError, match="already attached"):
        handle.attach()
    handle.remove()
    handle.remove()


def test_the_users_things_come_back_as_they_were(model: Any) -> None:
    tokenizer, state = tiny_tokenizer(), torch.get_rng_state()
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    padding = tokenizer.padding_side, tokenizer.pad_token
    train_steering_vector(model, tokenizer, [("good", "bad"), ("yes", "no")])
    with pytest.raises(ValueError):
        train_steering_vector(model, tokenizer, [("good", "bad")], read_token_index=40)
    with vector(0).apply(model, min_token_index=1):
        pass
    assert all(m.training is mode for m, mode in modes) and all(p.requires_grad is g for p, g in grads)
    assert (tokenizer.padding_side, tokenizer.pad_token) == padding and torch.equal(torch.get_rng_state(), state)
    model.model.embed_tokens.weight.requires_grad_(True)
    model.eval()


# --- training --------------------------------------------------------------------------------------------------------

PAIRS = [("good day", "bad day"), ("good!", "bad!")]
BAD_TRAINING: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "layers as a number": (TypeError, "a list of whole numbers", {"layers": 1}),
    "layers as a word": (TypeError, "a list of whole numbers", {"layers": "all"}),
    "no layers": (ValueError, "layers is empty", {"layers": []}),
    "layer_config as a template": (TypeError, "maps layer types to templates", {"layer_config": "model.layers.{num}"}),
    "an aggregator not made": (TypeError, "call it, aggregator=pca_aggregator", {"aggregator": pca_aggregator}),
    "an aggregator's name": (TypeError, "not 'pca'", {"aggregator": "pca"}),
    "no aggregator": (TypeError, "not None", {"aggregator": None}),
    "read as a word": (TypeError, "an expression such as Tokens.generated", {"read": "all"}),
    "a place as a word": (TypeError, "is read at a whole number", {"read_token_index": "last"}),
    "a place of nothing": (TypeError, "is read at a whole number", {"read_token_index": lambda text: None}),
    "batch_size as a word": (ValueError, "a whole number, 1 or more, not '8'", {"batch_size": "8"}),
    "half a batch": (ValueError, "a whole number, 1 or more, not 2.5", {"batch_size": 2.5}),
    "no budget": (ValueError, "token_budget is the most tokens", {"token_budget": 0}),
}


@pytest.mark.parametrize(("error", "words", "options"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_reads_nothing(model: Any, error: type[Exception], words: str, options: dict[str, Any]) -> None:
    calls: list[Any] = []
    handle = model.register_forward_pre_hook(lambda *args: calls.append(args))
    inner = model.model.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        with pytest.raises(error, match=words):
            train_steering_vector(model, tiny_tokenizer(), PAIRS, **options)
    finally:
        handle.remove()
        inner.remove()
    assert not calls


def test_wrong_things_in_the_wrong_places_are_named(model: Any) -> None:
    tokenizer: Any = tiny_tokenizer()
    with pytest.raises(TypeError, match="are model and tokenizer in the right order"):
        train_steering_vector(tokenizer, model, PAIRS)
    for wrong in ("gpt2", None, tokenizer):
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            train_steering_vector(wrong, tokenizer, PAIRS)
        with pytest.raises(TypeError, match="must be a torch.nn.Module"), record_activations(wrong):
            pass
    for wrong in (None, model):
        with pytest.raises(TypeError, match="tokenizer must be the model's tokenizer"):
            train_steering_vector(model, wrong, PAIRS)
    with pytest.raises(TypeError, match="The negative text of sample 2 must be a string"):
        train_steering_vector(model, tokenizer, [*PAIRS, ("a", float("nan"))])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="Sample 2 must be a pair"):
        train_steering_vector(model, tokenizer, [*PAIRS, "lonely"])  # type: ignore[list-item]
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match="positive text of sample 2 has token .* Is this the model's own tokenizer"):
        train_steering_vector(model, tokenizer, [*PAIRS, ("zebra", "b")])


def test_a_model_that_overflows_is_named() -> None:
    model: Any = tiny_model("llama", dtype=torch.float16)
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight.fill_(6e4)
    weight[::2] = -6e4
    for aggregator in (mean_aggregator(), pca_aggregator(), logistic_aggregator()):
        with pytest.raises(ValueError, match="layer 1 hold NaN or infinity in . of 4 texts: .* overflows in float16"):
            train_steering_vector(model, tiny_tokenizer(), PAIRS, layers=[1], aggregator=aggregator)


def test_numbers_of_numpy_and_torch_are_numbers(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    expected = train_steering_vector(model, tokenizer, PAIRS, layers=[0, 1])
    for layers in (np.arange(2), torch.arange(2), range(2), iter([0, 1]), (np.int64(0), torch.tensor(1))):
        assert train_steering_vector(model, tokenizer, PAIRS, layers=layers) == expected
    assert train_steering_vector(model, tokenizer, PAIRS, batch_size=np.int64(1))[0:2].layer_activations.keys() == {
        0,
        1,
    }
    assert SteeringVector({np.int64(1): np.ones(D, dtype=np.float32)}) == SteeringVector({1: torch.ones(D)})
    v = vector(1)
    with v.apply(model, min_token_index=3):
        third = model(IDS).logits
    for three in (np.int64(3), torch.tensor(3)):
        with v.apply(model, min_token_index=three):
            assert torch.equal(model(IDS).logits, third)
        with v.apply(model, token_indices=slice(three, None)):
            assert torch.equal(model(IDS).logits, third)


def test_a_handle_decorates_a_function(model: Any) -> None:
    v, plain = vector(1), model(IDS).logits

    @v.apply(model)
    def steered() -> torch.Tensor:
        return model(IDS).logits  # type: ignore[no-any-return]

    first = steered()
    assert not torch.equal(first, plain) and torch.equal(steered(), first) and torch.equal(model(IDS).logits, plain)
