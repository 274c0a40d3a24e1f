"""Handles: what they keep alive, what `with` means, what they notice, what they decorate, and what operators get."""

import asyncio
import contextlib
import copy
import functools
import gc
import io
import itertools
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from plain import hooks_on, shown
from torch import Tensor, nn
from versions import fault, skip_if

from steering_vectors import (
    SteeringVector,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    find_layers,
    record_activations,
)
from steering_vectors.demo import tiny_model
from steering_vectors.model import attachments
from steering_vectors.model.hooks import HookHandle, edit_output, read_output
from steering_vectors.model.layers import resolve_layer_numbers, resolve_layers
from steering_vectors.model.recording import Recording
from steering_vectors.steer.positions import PassTracker
from steering_vectors.steer.tokens import Tokens

D = 32
IDS = torch.tensor([[5, 9, 17, 33, 12, 44, 21], [7, 8, 19, 30, 11, 40, 22]])


def direction(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vector(*layers: int) -> SteeringVector:
    return SteeringVector({n: direction(n) for n in layers or (1,)})


@pytest.fixture
def model() -> Iterator[Any]:
    model = tiny_model("llama")
    yield model
    assert hooks_on(model) == 0 and len(attachments._listeners) == 0 and attachments._stance.forced is None


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


# --- what a dropped handle keeps -------------------------------------------------------------------------------------

HOW: list[dict[str, Any]] = [{}, {"min_token_index": 3}, {"tokens": Tokens.response, "multiplier": [1.0, 2.0]}]


def alive(gone: list[Any]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in gone)


@pytest.mark.parametrize("how", HOW, ids=shown)
@pytest.mark.parametrize("run", [False, True], ids=["not run", "run"])
def test_a_dropped_handle_lets_its_model_go(how: dict[str, Any], run: bool) -> None:
    "Nothing is removed: model and handle are dropped, attached."
    mm: Any = tiny_model()
    handle = vector(0, 1).patch(mm, **how)
    if run:
        logits(mm)
    gone = [weakref.ref(block) for block in mm.model.layers]
    assert alive(gone) == 3 and attachments._stance.forced is not None, "as long as the model is there"
    del mm, handle
    assert alive(gone) == 0 and attachments._stance.forced is None and not list(attachments._listeners)


@pytest.mark.parametrize("how", HOW, ids=shown)
def test_a_cell_that_runs_four_times(how: dict[str, Any]) -> None:
    gone: list[Any] = []
    for i in range(4):
        mm: Any = tiny_model(seed=i)
        handle = vector().patch(mm, **how)
        gone.append(weakref.ref(mm.model.layers[1]))
    assert alive(gone) == 1 and attachments._stance.forced is not None
    handle.remove()
    assert attachments._stance.forced is None and hooks_on(mm) == 0
    del mm, handle
    assert alive(gone) == 0


def test_a_dropped_reader_and_a_dropped_recording() -> None:
    mm: Any = tiny_model()
    gone = [weakref.ref(block) for block in mm.model.layers]
    read_output(mm.model.layers[0], lambda h: None)
    record_activations(mm).attach()
    del mm
    assert alive(gone) == 0 and attachments._stance.forced is None


def test_hooks_that_others_cleared_free_the_switch(model: Any) -> None:
    handle = vector().patch(model)
    for module in model.modules():
        module._forward_hooks.clear()
    gc.collect()
    assert attachments._stance.forced is None
    handle.remove()
    with vector().apply(model):
        steered = logits(model)
    assert not torch.equal(steered, logits(model))


def test_a_model_that_goes_leaves_the_switch_to_another(model: Any) -> None:
    mm: Any = tiny_model(seed=3)
    vector().patch(mm)
    with vector().apply(model):
        del mm
        gc.collect()
        assert attachments._stance.forced is not None
    assert attachments._stance.forced is None


COPIES: dict[str, Callable[[Any], Any]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("how", HOW, ids=shown)
@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_is_another_model(model: Any, made: Callable[[Any], Any], how: dict[str, Any]) -> None:
    "It is not steered, it can be steered, and it does not keep the original."
    plain = logits(model)
    with vector().apply(model, **how), warnings.catch_warnings(action="error", category=RuntimeWarning):
        twin = made(model)
        assert not torch.equal(logits(model), plain)
        assert torch.equal(logits(twin), plain)
        with vector(2).apply(twin):
            other = logits(twin)
        assert torch.equal(logits(twin), plain)
    with vector(2).apply(model):
        assert torch.equal(logits(model), other)
    mm: Any = tiny_model()
    vector().patch(mm, **how)
    twin, gone = made(mm), [weakref.ref(mm)]
    del mm
    assert alive(gone) == 0 and attachments._stance.forced is None


# --- one meaning of `with` -------------------------------------------------------------------------------------------


def add_one(h: Tensor) -> Tensor:
    return h + 1


def kinds(model: Any) -> dict[str, Callable[[], Any]]:
    layer = model.model.layers[1]
    return {
        "HookHandle": lambda: HookHandle(layer, add_one, "edits"),
        "apply": lambda: vector().apply(model),
        "apply to tokens": lambda: vector().apply(model, min_token_index=2),
        "PassTracker": lambda: PassTracker(model),
        "record_activations": lambda: record_activations(model),
    }


@pytest.mark.parametrize("kind", ["HookHandle", "apply", "apply to tokens", "PassTracker", "record_activations"])
def test_with_attaches_what_is_not_attached_and_removes_it(model: Any, kind: str) -> None:
    make = kinds(model)[kind]
    for by_hand in (False, True):
        handle = make().attach() if by_hand else make()
        with handle:
            assert handle.attached and hooks_on(model) > 0
            with pytest.raises(ValueError, match="already attached"):
                handle.attach()
            with handle:
                pass
            assert handle.attached and hooks_on(model) > 0, "the outer one is still open"
        assert not handle.attached and hooks_on(model) == 0
        with handle:
            assert hooks_on(model) > 0, "and again"
        handle.remove()
        assert hooks_on(model) == 0


@pytest.mark.parametrize("made", ["edit_output", "read_output", "patch"])
def test_what_is_returned_attached(model: Any, made: str) -> None:
    layer = model.model.layers[1]
    make: dict[str, Callable[[], Any]] = {
        "edit_output": lambda: edit_output(layer, add_one),
        "read_output": lambda: read_output(layer, lambda h: None),
        "patch": lambda: vector().patch(model),
    }
    handle = make[made]()
    before = hooks_on(model)
    with pytest.raises(ValueError, match="already attached"):
        handle.attach()
    assert hooks_on(model) == before > 0
    with handle:
        assert hooks_on(model) == before
    assert hooks_on(model) == 0
    handle.attach()
    handle.remove()


def test_an_edit_acts_once_however_it_was_attached() -> None:
    layer, x = nn.Identity(), torch.zeros(1)
    with HookHandle(layer, add_one, "edits"):
        assert layer(x) == 1
    handle = edit_output(layer, add_one)
    with handle, handle:
        assert layer(x) == 1
    assert layer(x) == 0


def test_a_recording_goes_on_when_it_is_opened_again(model: Any) -> None:
    recording = record_activations(model, layer_nums=[1])
    assert isinstance(recording, Recording)
    with recording as first:
        logits(model)
    logits(model)
    with recording as second:
        logits(model)
    assert type(first) is dict and first is second is recording.recorded and len(first[1]) == 2


def test_threads_enter_and_leave_one_handle(model: Any) -> None:
    "The last of them to leave removes."
    handle, plain, start = vector().apply(model), logits(model), threading.Barrier(8)
    results: list[Tensor] = []

    def run() -> None:
        start.wait()
        for _ in range(20):
            with handle:
                results.append(logits(model))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160 and not handle.attached and torch.equal(logits(model), plain)
    assert all(torch.equal(r, results[0]) for r in results) and not torch.equal(results[0], plain)


# --- steering that does not happen -----------------------------------------------------------------------------------


def call_forward(module: nn.Module) -> None:
    "What a fused path does: the module runs, its hooks do not."
    kind = type(module)
    module.__class__ = type("Fast", (kind,), {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)})


def fast_layers(model: Any) -> None:
    for layer in model.model.layers:
        call_forward(layer)


def fast_last(model: Any) -> None:
    call_forward(model.model.layers[2])


def own_loop(model: Any) -> None:
    "The whole inner model is gone around."
    call_forward(model.model)
    fast_layers(model)


def fast_mlps(model: Any) -> None:
    for layer in model.model.layers:
        call_forward(layer.mlp)


PATHS = {
    "layers by .forward": (fast_layers, "decoder_block", (0, 1), "model.layers.0, model.layers.1"),
    "one of two layers": (fast_last, "decoder_block", (1, 2), "model.layers.2"),
    "a loop of its own": (own_loop, "decoder_block", (1,), "model.layers.1"),
    "a fused mlp": (fast_mlps, "mlp", (1,), "model.layers.1.mlp"),
}


@pytest.mark.parametrize(("change", "layer_type", "layers", "names"), PATHS.values(), ids=PATHS)
def test_a_module_that_never_ran_is_an_error_at_the_end(
    model: Any, change: Any, layer_type: Any, layers: tuple[int, ...], names: str
) -> None:
    change(model)
    v = SteeringVector({n: direction(n) for n in layers}, layer_type)
    for open_ in (lambda: v.apply(model), lambda: v.patch(model), lambda: v.apply(model, min_token_index=3)):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(ValueError, match="while this block was open") as e,
        ):
            with open_():
                logits(model)
        assert f"LlamaForCausalLM ran 1 time while this block was open, but {names} never did" in str(e.value)
        assert hooks_on(model) == 0
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match="nothing was recorded there"):
        with record_activations(model, layer_type, layer_nums=layers):
            logits(model)

    @v.apply(model)
    def steered() -> Tensor:
        return logits(model)

    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=f"but {names} never did"):
        steered()


def told(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        run()
    return [str(w.message) for w in warned if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("change", [fast_layers, fast_last], ids=lambda f: f.__name__)
def test_by_hand_it_is_a_warning_once_a_handle(model: Any, change: Any) -> None:
    change(model)

    def run() -> None:
        handle = vector(1, 2).patch(model)
        for _ in range(3):
            logits(model)
        handle.remove()  # never raises

    for _ in range(2):  # a second handle is told as well
        (message,) = told(run)
        assert message.startswith("A pass of LlamaModel went past ") and "model.layers.2" in message


def test_later_passes_that_go_past_are_told(model: Any) -> None:
    "A fused path for single tokens, as some programs have: the prompt is steered, and the rest is not."
    block = model.model.layers[1]
    kind = type(block)

    def call(self: Any, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.forward(h, *args, **kwargs) if h.shape[1] == 1 else kind.__call__(self, h, *args, **kwargs)

    block.__class__ = type("Fast", (kind,), {"__call__": call})

    def run() -> None:
        with vector().apply(model):
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, pad_token_id=0)

    assert len(told(run)) == 1


def test_an_error_on_its_way_is_left_alone(model: Any) -> None:
    fast_layers(model)
    with warnings.catch_warnings(action="ignore"), pytest.raises(KeyError, match="mine"), vector().apply(model):
        logits(model)
        raise KeyError("mine")


def nothing(model: Any) -> None:
    pass


def only_a_layer(model: Any) -> None:
    model.model.layers[0].mlp(torch.zeros(1, 1, D))


def cut_off(model: Any) -> None:
    def stop(*args: Any) -> None:
        raise InterruptedError

    hook = model.model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        model(IDS)
    hook.remove()


def dropped_while_training(model: Any) -> None:
    call_forward(model.model.layers[1])
    model.train()
    model(IDS)


def at_zero(model: Any) -> None:
    fast_layers(model)
    with vector().apply(model, multiplier=0):
        logits(model)


@pytest.mark.parametrize("run", [nothing, only_a_layer, cut_off, dropped_while_training], ids=lambda f: f.__name__)
def test_honest_reasons_not_to_run(model: Any, run: Any) -> None:
    with warnings.catch_warnings(action="error"), vector().apply(model):
        run(model)


def test_zero_has_nothing_to_notice(model: Any) -> None:
    with warnings.catch_warnings(action="error"):
        at_zero(model)


def test_an_encoder_alone_and_an_encoder_that_runs_once() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=100, d_model=D, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    t5 = T5ForConditionalGeneration(config).eval()
    names = {"decoder_block": "encoder.block.{num}"}
    with warnings.catch_warnings(action="error"):
        with vector().apply(t5):
            t5.get_encoder()(IDS)
        with vector().apply(t5):
            t5.generate(IDS, max_new_tokens=3, min_new_tokens=3)
        with vector().apply(t5, names) as handle, record_activations(t5, layer_config=names, layer_nums=[1]) as seen:
            t5.generate(IDS, max_new_tokens=3, min_new_tokens=3)
    assert len(seen[1]) == 1 and handle.modules == {1: "encoder.block.1"}
    begun = t5.get_encoder()(IDS)
    with pytest.raises(ValueError, match=r"encoder\.block\.1 never did"), vector().apply(t5, names):
        t5.generate(encoder_outputs=begun, max_new_tokens=3, min_new_tokens=3)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}], ids=shown
)
def test_no_false_alarm_while_generating(model: Any, how: dict[str, Any]) -> None:
    ids = IDS[:1]
    with warnings.catch_warnings(action="error", category=RuntimeWarning), vector(0, 2).apply(model):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0, **how)


@pytest.mark.parametrize("layers", [(1,), (0, 2), (2,)])
@pytest.mark.parametrize("exit_", [1, 2])
def test_no_false_alarm_for_a_draft_of_the_first_layers(model: Any, layers: tuple[int, ...], exit_: int) -> None:
    ids = IDS[:1]

    def write() -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, assistant_early_exit=exit_
        )

    skip_if(fault(write, "drafts of the first layers"))
    with warnings.catch_warnings(action="error", category=RuntimeWarning), vector(*layers).apply(model):
        with record_activations(model, layer_nums=layers) as seen:
            write()
    assert all(seen.values()), "the passes of the whole model ran every layer"


def test_a_model_that_was_cut_before_is_told(model: Any) -> None:
    model.config.num_hidden_layers = 1
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=r"model\.layers\.1 never did"):
        with vector(1).apply(model):
            logits(model)


def test_no_false_alarm_in_threads(model: Any) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(30):
                logits(model)
        except BaseException as e:
            errors.append(e)

    with warnings.catch_warnings(action="error", category=RuntimeWarning), vector(0, 1, 2).apply(model):
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


@pytest.mark.parametrize("thread", [False, True], ids=["a hook", "another thread"])
def test_no_false_alarm_for_a_pass_that_had_begun(model: Any, thread: bool) -> None:
    "A context is opened while a pass is under way, and layer 0 has run already."
    opened: list[Any] = []

    def open_() -> None:
        opened.append(vector(0).patch(model))

    def meanwhile(*args: Any) -> None:
        if not opened and thread:
            other = threading.Thread(target=open_)
            other.start()
            other.join()
        elif not opened:
            open_()

    quiet = model.register_forward_hook(lambda *args: None)  # so that PyTorch looks for hooks at the end of the pass
    inner = model.model.register_forward_hook(lambda *args: None)
    hook = model.model.layers[1].register_forward_hook(meanwhile)
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        plain = logits(model)
        assert opened and not torch.equal(logits(model), plain)
    for handle in (*opened, quiet, inner, hook):
        handle.remove()


def test_no_false_alarm_for_a_pass_inside_of_a_pass(model: Any) -> None:
    "An operator that asks the model itself."
    asked: list[Tensor] = []

    def op(h: Tensor, v: Tensor) -> Tensor:
        if not asked:
            asked.append(v)
            model(IDS[:1])
        return v

    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        with vector(0, 1, 2).apply(model, operator=op):
            logits(model)
    assert asked


# --- decorators ------------------------------------------------------------------------------------------------------


def test_a_coroutine_runs_steered(model: Any) -> None:
    plain = logits(model)

    class Job:
        async def __call__(self) -> Tensor:
            await asyncio.sleep(0)
            return logits(model)

    async def job(times: int = 1) -> Tensor:
        await asyncio.sleep(0)
        return logits(model)

    class Server:
        @vector().apply(model)
        async def answer(self) -> Tensor:
            return await job()

        @vector().apply(model)
        @staticmethod
        async def static() -> Tensor:
            return await job()

    with vector().apply(model):
        steered = logits(model)
    decorate = vector().apply(model)
    for function in (
        decorate(job),
        decorate(functools.partial(job, 2)),
        decorate(Job()),
        Server().answer,
        Server.static,
    ):
        assert torch.equal(asyncio.run(function()), steered)
        assert torch.equal(logits(model), plain)

    async def both() -> list[Tensor]:
        return await asyncio.gather(decorate(job)(), decorate(job)())

    assert all(torch.equal(out, steered) for out in asyncio.run(both())) and torch.equal(logits(model), plain)


def test_what_runs_later_is_refused(model: Any) -> None:
    handle = vector().apply(model)

    def tokens() -> Iterator[Tensor]:
        yield logits(model)

    async def stream() -> Any:
        yield logits(model)

    async def job() -> Tensor:
        return logits(model)

    class Streamer:
        def __call__(self) -> Iterator[Tensor]:
            yield logits(model)

    for function in (
        tokens,
        stream,
        functools.partial(tokens),
        Streamer(),
        functools.partial(Streamer()),
        staticmethod(tokens),
    ):
        with pytest.raises(TypeError, match="cannot decorate a generator function.*`with vector.apply"):
            handle(function)
    for function in (lambda: tokens(), lambda: stream(), lambda: job(), lambda: (logits(model) for _ in range(2))):
        with (
            pytest.raises(TypeError, match="cannot decorate a function that returned a"),
            warnings.catch_warnings(action="error"),
        ):
            handle(function)()
        assert hooks_on(model) == 0


def test_what_goes_on_after_the_call_is_refused(model: Any) -> None:
    "Work that is begun in the function and done after it would be unsteered."
    handle, wait = vector().apply(model), threading.Event()

    @contextlib.contextmanager
    def scope() -> Iterator[Tensor]:
        yield logits(model)

    @contextlib.asynccontextmanager
    async def later() -> Any:
        yield logits(model)

    class Streamer:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Tensor:
            return logits(model)

    def begun() -> threading.Thread:
        thread = threading.Thread(target=wait.wait)
        thread.start()
        return thread

    with ThreadPoolExecutor(1) as pool:
        for function in (
            scope,
            later,
            Streamer,
            begun,
            lambda: pool.submit(wait.wait),
            lambda: map(lambda _: logits(model), range(2)),
            lambda: filter(lambda _: logits(model).any(), range(2)),
            lambda: itertools.starmap(logits, [(model,)]),
        ):
            with pytest.raises(TypeError, match="cannot decorate a function that returned a"):
                handle(lambda function=function: function())()
            assert hooks_on(model) == 0
        wait.set()


def test_what_is_done_when_the_call_ends_is_returned(model: Any) -> None:
    handle = vector().apply(model)
    with handle:
        steered = logits(model)
    with ThreadPoolExecutor(1) as pool:

        def work() -> Any:
            future = pool.submit(logits, model)
            future.result()
            return future

        assert torch.equal(handle(work)().result(), steered)
    for value in ([1], iter([1]), zip([1], [2], strict=True), range(2), io.StringIO("a"), torch.no_grad(), handle):
        assert handle(lambda value=value: value)() is value


def test_only_functions_are_decorated(model: Any) -> None:
    "A class or a property would be decorated in vain: their code runs at other times."
    handle = vector().apply(model)

    class Asked:
        def answer(self) -> Tensor:
            return logits(model)

    for what in (
        Asked,
        property(Asked.answer),
        functools.cached_property(Asked.answer),
        functools.partialmethod(Asked.answer),
        3,
        None,
        (handle for _ in range(1)),
    ):
        with pytest.raises(TypeError, match="decorates a function or a method, not .*directly above the `def`"):
            handle(what)

    class Right:
        @property
        @handle
        def answer(self) -> Tensor:
            return logits(model)

    with handle:
        steered = logits(model)
    assert torch.equal(Right().answer, steered) and not torch.equal(logits(model), steered)


def test_ordinary_functions(model: Any) -> None:
    plain = logits(model)
    with vector().apply(model):
        steered = logits(model)

    @vector().apply(model)
    def again(times: int) -> list[Tensor]:
        "Calls itself."
        return [logits(model)] + (again(times - 1) if times else [])

    assert again.__name__ == "again" and again.__doc__ == "Calls itself."
    assert all(torch.equal(out, steered) for out in again(3)) and torch.equal(logits(model), plain)
    with pytest.raises(ZeroDivisionError):
        vector().apply(model)(lambda: 1 / 0)()
    assert torch.equal(vector().apply(model)(functools.partial(logits, model))(), steered)


# --- operators -------------------------------------------------------------------------------------------------------


def of_the_batch(h: Tensor, v: Tensor) -> Tensor:
    return v * (1 + h.mean(dim=(0, 1), keepdim=True))


def whole_norm(h: Tensor, v: Tensor) -> Tensor:
    "Written for one vector: over (b, 1, d) its norm would be that of all rows together."
    return v / torch.norm(v) * h.norm(dim=-1, keepdim=True)


def squeezed(h: Tensor, v: Tensor) -> Tensor:
    v = v.squeeze()
    return (h @ v / (v @ v)).unsqueeze(-1) * v


def over_rows(h: Tensor, v: Tensor) -> Tensor:
    return v + h - h.amax(0, keepdim=True)


CUSTOM = [of_the_batch, whole_norm, squeezed, over_rows]
ROWS = [[1.0, 1.0, 1.0], [1.0, 0.0, 2.0], [2.0, -1.0, 2.0], [0.0, 3.0, 0.0], [0.1, 0.2, 0.3]]
THREE = torch.cat([IDS, IDS[:1].flip(1)])


@pytest.mark.parametrize(
    "operator", [*CUSTOM, None, ablation_operator(0.5), ablation_then_addition_operator()], ids=shown
)
@pytest.mark.parametrize("rows", ROWS, ids=shown)
@pytest.mark.parametrize("say", [{}, {"min_token_index": 3}], ids=shown)
def test_a_row_gets_what_its_multiplier_would_give_the_batch(
    model: Any, operator: Any, rows: list[float], say: dict[str, Any]
) -> None:
    plain = logits(model, THREE)
    with vector().apply(model, operator=operator, multiplier=rows, **say):
        together = logits(model, THREE)
    for r, m in enumerate(rows):
        with vector().apply(model, operator=operator, multiplier=m, **say):
            alone = logits(model, THREE)
        exact = callable(operator) and operator in CUSTOM or m == 0
        assert torch.equal(together[r], alone[r]) if exact else torch.allclose(together[r], alone[r], atol=1e-5)
        assert m != 0 or torch.equal(together[r], plain[r])
    assert not torch.allclose(together, plain, atol=1e-3)


def test_calls_of_an_operator(model: Any) -> None:
    "One for each different multiplier but 0; one in all where it promises to broadcast."
    calls: list[Any] = []

    def count(h: Tensor, v: Tensor) -> Tensor:
        calls.append((tuple(h.shape), tuple(v.shape)))
        return v + 0 * h

    def shapes(multiplier: Any) -> list[Any]:
        calls.clear()
        with vector().apply(model, operator=count, multiplier=multiplier):
            logits(model, THREE)
        return list(calls)

    one = ((3, 7, D), (1, 1, D))
    assert shapes(2.0) == shapes([2.0, 2.0, 2.0]) == shapes([0.0, 2.0, 0.0]) == [one]
    assert shapes([1.0, 2.0, 1.0]) == [one] * 2 and shapes([1.0, 2.0, 3.0]) == [one] * 3
    with vector().apply(model, operator=count, multiplier=[1.0, 2.0, 3.0]):
        by_groups = logits(model, THREE)
    count.by_row = True  # type: ignore[attr-defined]
    assert shapes([1.0, 2.0, 3.0]) == [((3, 7, D), (3, 1, D))]
    with vector().apply(model, operator=count, multiplier=[1.0, 2.0, 3.0]):
        assert torch.equal(logits(model, THREE), by_groups)
    assert all(h.dtype == torch.float32 for h in [by_groups])


def test_an_operator_that_broadcasts_gets_the_activations_dtype() -> None:
    dtypes: list[torch.dtype] = []

    def mine(h: Tensor, v: Tensor) -> Tensor:
        dtypes.append(v.dtype)
        return v

    mine.by_row = True  # type: ignore[attr-defined]
    low = tiny_model(dtype=torch.bfloat16)
    for m in (2.0, [1.0, 2.0]):
        with vector().apply(low, operator=mine, multiplier=m):
            logits(low)
    assert set(dtypes) == {torch.bfloat16}


def adds_in_place(h: Tensor, v: Tensor) -> Tensor:
    h += 100
    return v


def writes_the_vector(h: Tensor, v: Tensor) -> Tensor:
    v.mul_(3)
    return v


def returns_its_input(h: Tensor, v: Tensor) -> Tensor:
    return h.mul_(0).add_(v)


def fills_both(h: Tensor, v: Tensor) -> Tensor:
    change = v.clone()
    h.zero_()
    v.zero_()
    return change


IN_PLACE = {adds_in_place: 1.0, writes_the_vector: 3.0, returns_its_input: 1.0, fills_both: 1.0}


@pytest.mark.parametrize(("operator", "times"), IN_PLACE.items(), ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize(
    "how", [{}, {"token_indices": [2]}, {"multiplier": [1.0, 0.0]}, {"multiplier": [1.0, 2.0]}], ids=shown
)
@pytest.mark.parametrize("by_row", [False, True])
def test_what_an_operator_writes_into_stays_as_it_was(
    model: Any, operator: Any, times: float, how: dict[str, Any], by_row: bool
) -> None:
    v = direction()
    kept = v.clone()

    def op(h: Tensor, v: Tensor) -> Tensor:
        return operator(h, v)  # type: ignore[no-any-return]

    op.by_row = by_row  # type: ignore[attr-defined]
    with record_activations(model, layer_nums=[1], clone_activations=False) as seen, torch.no_grad():
        model(IDS)
        before = seen[1][0].clone()
        with SteeringVector({1: times * v}).apply(model, **how):
            expected = [model(IDS).logits for _ in range(2)]
        handle = SteeringVector({1: v}).apply(model, operator=op, **how)
        with handle:
            assert all(torch.equal(model(IDS).logits, logits) for logits in expected), "every time"
    assert torch.equal(seen[1][0], before) and torch.equal(v, kept)


def test_gradients_through_an_operator_that_writes(model: Any) -> None:
    v = direction().requires_grad_()
    with SteeringVector({1: v}).apply(model, operator=returns_its_input, multiplier=[1.0, 2.0]):
        model(IDS).logits[..., 7].sum().backward()
    grad, v.grad = v.grad, None
    with SteeringVector({1: v}).apply(model, multiplier=[1.0, 2.0]):
        model(IDS).logits[..., 7].sum().backward()
    assert grad is not None and v.grad is not None and torch.allclose(grad, v.grad, atol=1e-5)


# --- multipliers that do not fit -------------------------------------------------------------------------------------

TOO_MUCH = [
    (torch.float16, 1e6, None),
    (torch.float16, [1.0, -1e6], None),
    (torch.float16, 1e6, lambda h, v: v),
    (torch.float16, [1.0, 1e6], lambda h, v: v),
    (torch.bfloat16, 1e39, None),
    (torch.float32, 1e39, None),
    (torch.float16, 1e30, ablation_operator()),
    (torch.float32, 1e25, ablation_then_addition_operator()),
    (torch.float16, 1e6, ablation_then_addition_operator()),
    (torch.float16, -1e5, ablation_then_addition_operator()),
    (torch.float16, [1.0, 1e6], ablation_then_addition_operator()),
]


@pytest.mark.parametrize(("dtype", "multiplier", "operator"), TOO_MUCH, ids=shown)
@pytest.mark.parametrize("say", [{}, {"min_token_index": 3}], ids=shown)
def test_a_multiplier_that_does_not_fit(
    dtype: torch.dtype, multiplier: Any, operator: Any, say: dict[str, Any]
) -> None:
    model: Any = tiny_model(dtype=dtype)
    plain, v = logits(model), vector()
    with pytest.raises(ValueError, match="does not fit torch.*The largest multiplier that fits is") as e:
        with v.apply(model, operator=operator, multiplier=multiplier, **say):
            logits(model)
    assert "model.layers.1" in str(e.value) and torch.equal(logits(model), plain)
    limit = float(str(e.value).rstrip(".").split()[-1])
    with record_activations(model, layer_nums=[1]) as seen, v.apply(model, multiplier=limit, operator=operator, **say):
        model(IDS)
    if operator is None or (dtype == torch.float16 and operator == ablation_then_addition_operator()):
        assert seen[1][0].isfinite().all() and seen[1][0].abs().max() > torch.finfo(dtype).max / 20, "the limit fits"


def test_what_fits_and_infinities_that_are_meant() -> None:
    low: Any = tiny_model(dtype=torch.float16)
    with vector().apply(low, multiplier=1000), vector(0).apply(low, operator=ablation_operator(), multiplier=1e6):
        logits(low)
    v = direction()
    v[3] = torch.inf
    with SteeringVector({1: v}).apply(low, multiplier=2.0), warnings.catch_warnings(action="error"):
        logits(low)
    with SteeringVector({1: torch.zeros(D)}).apply(low, multiplier=1e30):
        assert torch.equal(logits(low), logits(low))
    learned = (1e5 * direction()).requires_grad_()
    with pytest.raises(ValueError, match="does not fit torch.float16"), SteeringVector({1: learned}).apply(low):
        logits(low)


# --- shared modules, what was found ----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(h)  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.layers:
            h = block(h)
        return h


@pytest.mark.parametrize("layer_type", ["decoder_block", "mlp"])
@pytest.mark.parametrize("config", [None, "template", "function"])
def test_one_module_under_two_numbers(layer_type: Any, config: str | None) -> None:
    a, part = Block(), ".mlp" if layer_type == "mlp" else ""
    net = Stack(a, a, Block()).eval()
    configs: dict[str | None, Any] = {
        None: None,
        "template": {layer_type: f"layers.{{num}}{part}"},
        "function": {layer_type: lambda n: f"layers.{n}{part}"},
    }
    v = SteeringVector({1: torch.ones(4)}, layer_type)
    for n in (0, 1, -2):
        with pytest.raises(
            ValueError, match=rf"of layer {n} is one module under several numbers \(0–1 share modules\)"
        ):
            SteeringVector({n: torch.ones(4)}, layer_type).apply(net, configs[config])
    with SteeringVector({-1: torch.ones(4)}, layer_type).apply(net, configs[config]) as handle:
        net(torch.zeros(1, 1, 4))
    assert handle.modules == {2: f"layers.2{part}"}
    with pytest.raises(ValueError, match="share modules"):
        v.apply(Stack(a, a), configs[config])
    found = resolve_layers(net, layer_type, configs[config])
    assert resolve_layer_numbers(found, found, layer_type) == [2]


def test_a_mapping_of_layer_types() -> None:
    from collections.abc import Mapping

    from steering_vectors import FoundLayers

    found, falcon = find_layers(tiny_model("llama")), find_layers(tiny_model("falcon"))
    assert isinstance(found, FoundLayers) and isinstance(found, Mapping)
    assert "mlp" in found and "decoder" not in found and 0 not in found and len(found) == 5
    assert "post_attention_layernorm" not in falcon and falcon["post_attention_layernorm"] == {} and len(falcon) == 4
    assert list(falcon) == ["decoder_block", "self_attn", "mlp", "input_layernorm"]
    assert {kind: len(names) for kind, names in falcon.items()} == dict.fromkeys(falcon, 3)
    assert found == find_layers(tiny_model("llama")) != falcon
    with pytest.raises(ValueError, match="Unknown layer_type"):
        found["decoder"]  # type: ignore[index]


# --- torch.func, torch.compile, another default device ---------------------------------------------------------------

TRANSFORMED: list[dict[str, Any]] = [
    {},
    {"multiplier": [1.0, -2.0]},
    {"min_token_index": 3},
    {"operator": ablation_operator(), "multiplier": 2.0},
    {"operator": whole_norm, "multiplier": [1.0, 2.0]},
]


@pytest.mark.parametrize("how", TRANSFORMED, ids=shown)
def test_function_transforms(model: Any, how: dict[str, Any]) -> None:
    model.set_attn_implementation("eager")  # forward mode has no other
    model.requires_grad_(False)
    weight = torch.randn(2, 7, 100, generator=torch.Generator().manual_seed(3))

    def score(v: Tensor) -> Tensor:
        with SteeringVector({1: v}).apply(model, **how):
            return (model(IDS, use_cache=False).logits * weight).sum()  # type: ignore[no-any-return]

    many = torch.stack([direction(n) for n in range(3)])
    one_by_one = torch.stack([score(v) for v in many])
    assert torch.allclose(torch.vmap(score)(many), one_by_one, rtol=1e-3, atol=1e-3)
    leaf = direction(0).requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf), leaf)
    assert torch.allclose(torch.func.grad(score)(direction(0)), gradient, rtol=1e-3, atol=1e-3)
    assert torch.allclose(torch.vmap(torch.func.grad(score))(many)[0], gradient, rtol=1e-3, atol=1e-3)
    _, slope = torch.func.jvp(score, (direction(0),), (direction(5),))
    assert torch.allclose(slope, gradient @ direction(5), rtol=1e-3, atol=1e-3)


def test_nan_is_found_inside_of_vmap(model: Any) -> None:
    def score(v: Tensor) -> Tensor:
        with SteeringVector({1: v}).apply(model):
            return model(IDS, use_cache=False).logits.sum()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="NaN"):
        torch.vmap(score)(torch.full((2, D), torch.nan))


@pytest.mark.parametrize(
    "open_", [lambda m: vector().apply(m), lambda m: record_activations(m)], ids=["apply", "record"]
)
def test_a_block_inside_of_a_compiled_function_is_refused(model: Any, open_: Any) -> None:
    def inside() -> Tensor:
        with open_(model):
            return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="cannot begin inside of a function that torch.compile compiles"):
        torch.compile(inside, backend="eager")()
    assert hooks_on(model) == 0 and attachments._stance.forced is None
    compiled = torch.compile(lambda: model(IDS, use_cache=False).logits, backend="eager")
    with torch.no_grad():
        plain = compiled()
        with vector().apply(model):
            assert not torch.equal(compiled(), plain)
        assert torch.equal(compiled(), plain)
    torch._dynamo.reset()


def test_another_default_device(model: Any) -> None:
    vectors, expected = vector(), []
    hows: list[dict[str, Any]] = [{}, {"multiplier": [1.0, 0.0]}, {"multiplier": (2, 3), "operator": whole_norm}]
    for how in hows:
        with vectors.apply(model, **how):
            expected.append(logits(model))
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)}
    shown: list[Any] = [(Tokens.response, batch), (Tokens.prompt[-2:], IDS), (None, batch)]
    pictures = [repr(vectors.apply(model, tokens=tokens, prompt=prompt)) for tokens, prompt in shown]
    torch.set_default_device("meta")
    try:
        for how, wanted in zip(hows, expected, strict=True):
            with vectors.apply(model, **how) as handle, record_activations(model) as seen:
                assert torch.equal(logits(model), wanted)
            assert "decoder_block" in repr(handle) and not seen[1][0].is_meta
        for (tokens, prompt), wanted in zip(shown, pictures, strict=True):
            assert repr(vectors.apply(model, tokens=tokens, prompt=prompt)) == wanted
    finally:
        torch.set_default_device(None)


def test_built_in_operators_are_still_equal_to_themselves() -> None:
    assert addition_operator() == addition_operator() and ablation_operator() != ablation_operator(0.5)
