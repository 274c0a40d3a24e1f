"""Steering per request, without vLLM: windows in every split, keys of blocks, refusals, and the plugin on modules that stand in."""

import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_vectors import SteeringVector, Tokens, ablation_operator, record_activations
from steering_vectors.demo import tiny_model
from steering_vectors.serve import vllm as plugin
from steering_vectors.serve.blocks import block_key
from steering_vectors.serve.engines import FIT, PRIVATE, CannotSteer
from steering_vectors.serve.requests import PLACES_AHEAD, SteeredRequest, admitted, positions, read_request, slots_asked
from steering_vectors.serve.splices import SteeredPasses, splice
from steering_vectors.steer.records import read_tokens

LAYERS = {"joy": [0, 1], "calm": [1]}
EXPRESSIONS = [
    None,
    Tokens.all,
    Tokens.all[2:],
    Tokens.prompt,
    Tokens.prompt[-3:],
    Tokens.prompt[1:-1:2],
    Tokens.generated,
    Tokens.generated[2:7],
    Tokens.response,
    Tokens.response[:3],
    Tokens.response[1::3],
    Tokens.columns[1, 4, 11],
    Tokens.columns[3:],
    ~Tokens.prompt,
    Tokens.prompt[:2] | Tokens.generated[1:4],
    Tokens.all[3:] & Tokens.response,
    Tokens.all - Tokens.columns[2:9],
]


def field(*parts: tuple[str, float, Any]) -> str:
    return json.dumps(
        [{"vector": v, "multiplier": m} | ({} if t is None else {"tokens": repr(t)}) for v, m, t in parts]
    )


def asked(*parts: tuple[str, float, Any], prompt: int = 6) -> SteeredRequest:
    return SteeredRequest(admitted(field(*parts), LAYERS, prompt), prompt)


# --- windows ---------------------------------------------------------------------------------------------------------


def steered_by_apply(tokens: Tokens | None, prompt: int, total: int, cuts: list[int]) -> list[bool]:
    "Which tokens `apply` steers in a sequence that is computed in pieces with a cache."
    model = tiny_model(num_layers=1)
    ids = torch.arange(total)[None] % 90 + 3
    steering = SteeringVector({0: torch.full((32,), 100.0)}).steering(tokens=tokens)
    cache: Any = None
    with torch.no_grad(), record_activations(model) as plain:
        model(ids)
    with torch.no_grad(), steering.apply(model, prompt=ids[:, :prompt]), record_activations(model) as acts:
        for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
            cache = model(ids[:, start:stop], past_key_values=cache, use_cache=True).past_key_values
    seen = torch.cat(acts[0], 1)[0]
    return ((seen - plain[0][0][0]).abs().amax(-1) > 50).tolist()


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(EXPRESSIONS), st.integers(3, 8), st.sets(st.integers(1, 13), max_size=6))
def test_positions_in_any_split_are_those_of_apply(tokens: Tokens | None, prompt: int, cuts: set[int]) -> None:
    at = sorted(cuts)
    pieces = [positions(tokens, prompt, a, b) for a, b in zip([0, *at], [*at, 14], strict=True)]
    assert np.concatenate(pieces).tolist() == positions(tokens, prompt, 0, 14).tolist()
    if tokens is None or not tokens.within_prompt or positions(tokens, prompt, 0, prompt).any():
        assert np.concatenate(pieces).tolist() == steered_by_apply(tokens, prompt, 14, at)


@pytest.mark.parametrize("tokens", EXPRESSIONS, ids=repr)
def test_every_single_token_split(tokens: Tokens | None) -> None:
    ones = [bool(positions(tokens, 5, i, i + 1)[0]) for i in range(300)]
    assert ones == positions(tokens, 5, 0, 300).tolist()


def test_positions_do_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        assert positions(Tokens.response[:2] | Tokens.columns[0], 3, 0, 6).tolist() == [1, 0, 1, 1, 0, 0]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_coefficients_are_sums_of_multipliers_in_any_order_of_passes(data: st.DataObject) -> None:
    "Also where a request goes back to its beginning, as after it has lost its blocks."
    one = st.tuples(st.sampled_from(list(LAYERS)), st.sampled_from([-2.0, 0.0, 0.5, 3.0]), st.sampled_from(EXPRESSIONS))
    parts = data.draw(st.lists(one, min_size=1, max_size=3))
    request = asked(*parts)
    for start in data.draw(st.lists(st.integers(0, 3 * PLACES_AHEAD), min_size=1, max_size=6)):
        stop = start + data.draw(st.integers(0, 2 * PLACES_AHEAD))
        for i, (name, _) in enumerate(request.slots):
            want = sum(m * positions(t, 6, start, stop).astype(float) for v, m, t in parts if v == name)
            np.testing.assert_array_equal(request.coefficients(start, stop)[:, i], want)


# --- blocks ----------------------------------------------------------------------------------------------------------

FEW = st.tuples(
    st.sampled_from(["joy", "calm"]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([None, Tokens.prompt, Tokens.response, Tokens.generated, Tokens.generated[:2], Tokens.columns[6:]]),
)
PLAN = st.lists(FEW, min_size=1, max_size=2)


def chain(request: SteeredRequest | None, size: int, blocks: int) -> list[Any]:
    "Hashes of blocks of equal tokens, each including the one before it, as vLLM makes them."
    found, last = [], None
    for i in range(blocks):
        key = None if request is None else block_key(request, i * size, (i + 1) * size)
        last = hash((last, key))
        found.append(last)
    return found


def plan(request: SteeredRequest | None, stop: int) -> list[dict[Any, float]]:
    "What each token gets, by slot, without zeros."
    if request is None:
        return [{}] * stop
    rows = request.coefficients(0, stop)
    return [{slot: x for slot, x in zip(request.slots, row, strict=True) if x} for row in rows.tolist()]


@settings(deadline=None, max_examples=300)
@given(PLAN, st.none() | PLAN, st.integers(1, 5))
def test_a_block_is_shared_exactly_if_all_up_to_its_end_is_steered_alike(one: Any, other: Any, size: int) -> None:
    a, b = asked(*one), None if other is None else asked(*other)
    chains = chain(a, size, 4), chain(b, size, 4)
    for i in range(4):
        alike = plan(a, (i + 1) * size) == plan(b, (i + 1) * size)
        assert (chains[0][i] == chains[1][i]) == alike


def test_keys_are_the_same_in_every_process() -> None:
    key = block_key(asked(("joy", 2.0, Tokens.prompt[1:3])), 0, 4)
    assert key is not None and key.hex().startswith("b82d5c53a99bc29a"), key.hex()


# --- refusals --------------------------------------------------------------------------------------------------------

BAD = [
    "",
    "null",
    "[]",
    "[[]]",
    "7",
    '"joy"',
    '{"vector": 3}',
    '{"vector": "joy", "vector": "joy"}',
    '{"vector": "joy", "multiplier": true}',
    '{"vector": "joy", "multiplier": "2"}',
    '{"vector": "joy", "multiplier": [1, 2]}',
    '{"vector": "joy", "multiplier": Infinity}',
    '{"vector": "joy", "multiplier": 1e39}',
    '{"vector": "joy", "multiplier": 1' + "0" * 400 + "}",
    '{"vector": "joy", "operator": {"ablation": 1}}',
    '{"vector": "joy", "layers": [9]}',
    '{"vector": "joy", "layers": [-1]}',
    '{"vector": "joy", "tokens": "Tokens.response - [13]"}',
    '{"vector": "joy", "tokens": "Tokens.columns[-3:]"}',
    '{"vector": "joy", "tokens": "Tokens.all[99999999999999999999:]"}',
    '{"vector": "joy", "tokens": "Tokens.prompt[6:]"}',
    '{"vector": "joy", "tokens": "' + "~" * 1900 + 'Tokens.all"}',
    '{"vector": "joy", "tokens": "' + "(" * 900 + "Tokens.all" + ")" * 900 + '"}',
    '{"vector": "joy", "tokens": "' + " | ".join(f"Tokens.all[{i}]" for i in range(60)) + '"}',
    "[" * 100_000,
    [{"vector": "joy"}] * 17,
    {"vector": "joy", "file": "/etc/passwd"},
    b"{}",
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:50])
def test_a_bad_request_is_a_value_error_that_names_the_field(bad: Any) -> None:
    with pytest.raises(ValueError, match="^steering: "):
        admitted(bad, LAYERS, 6)


@settings(deadline=None, max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=20),
        lambda x: (
            st.lists(x) | st.dictionaries(st.sampled_from(["vector", "multiplier", "tokens", "layers", "operator"]), x)
        ),
    )
)
def test_whatever_comes_in_is_admitted_or_refused(junk: Any) -> None:
    try:
        full = admitted(junk, LAYERS, 6)
    except ValueError:
        return
    assert all(r.layers for r in read_request(full))


def test_what_was_not_admitted_is_never_taken_for_unsteered() -> None:
    with pytest.raises(ValueError, match="not been admitted"):
        slots_asked('{"vector": "joy"}')


def test_the_written_request_comes_back() -> None:
    v = SteeringVector({1: torch.ones(4), 0: torch.ones(4)})
    for tokens in EXPRESSIONS:
        full = json.loads(admitted(v.to_vllm("joy", 2, tokens), LAYERS, 6))[0]
        assert (full["vector"], full["layers"], full["multiplier"]) == ("joy", [0, 1], 2)
        assert tokens is None or repr(read_tokens(full["tokens"])) == repr(tokens)
    with pytest.raises(ValueError, match="adds vectors"):
        v.steering(operator=ablation_operator()).to_vllm("joy")
    with pytest.raises(ValueError, match="one multiplier"):
        v.steering(multiplier=[1.0, 2.0]).to_vllm("joy")


# --- the addition ----------------------------------------------------------------------------------------------------


def a_pass(kinds: dict[str, str] | None = None, rows: int = 32) -> tuple[SteeredPasses, torch.nn.ModuleList]:
    blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    for block in blocks:
        block.mlp = torch.nn.Identity()
    have = {"joy": {0: torch.ones(3), 1: 2 * torch.ones(3)}, "calm": {1: -torch.ones(3)}}
    files = {n: SteeringVector(v, (kinds or {}).get(n, "decoder_block")) for n, v in have.items()}
    return SteeredPasses(blocks, files, rows, torch.device("cpu")), blocks


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_of_a_pass_get_what_their_tokens_are_to_get(data: st.DataObject) -> None:
    "Passes one after another over the same tensors: nothing is left of the one before."
    passes, blocks = a_pass()
    for _ in range(3):
        names, counts, done, want = [], [], [], []
        for i in range(data.draw(st.integers(1, 4))):
            parts = data.draw(st.none() | PLAN)
            name, count, start = f"r{i}", data.draw(st.integers(1, 6)), data.draw(st.integers(0, 12))
            passes.forget([name])
            if parts is not None:
                passes.admit(name, admitted(field(*parts), LAYERS, 6), 6)
            names, counts, done = [*names, name], [*counts, count], [*done, start]
            for at in range(start, start + count):
                given = [(v, m) for v, m, t in parts or [] if positions(t, 6, at, at + 1)[0]]
                joy, calm = (sum(m for v, m in given if v == name) for name in ("joy", "calm"))
                want.append([joy, 2 * joy - calm])
        passes.fill(names, counts, done)
        got = [block(torch.zeros(len(want) + 4, 3))[:, 0].tolist() for block in blocks]
        assert [list(pair) for pair in zip(*got, strict=True)] == want + [[0, 0]] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_zeros_adds_nothing_at_all(dtype: torch.dtype) -> None:
    module, coefficients = torch.nn.Identity(), torch.zeros(8, 2)
    h = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    splice(module, coefficients, torch.full((2, 3), 1e30))
    assert torch.equal(module(h), h) and module(h).dtype == dtype
    coefficients[2] = 1e-30
    assert torch.equal(module(h)[[0, 1, 3, 4, 5]], h[[0, 1, 3, 4, 5]]) and not torch.equal(module(h), h)


def test_a_block_that_returns_a_pair_has_its_sum_steered() -> None:
    class Pair(torch.nn.Module):
        def forward(self, h: torch.Tensor) -> Any:
            return h, 2 * h

    module, h = Pair(), torch.ones(2, 3)
    splice(module, torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0, 0.0, 0.0]]))
    first, rest = module(h)
    assert (first + rest)[:, 0].tolist() == [8, 3] and torch.equal(rest, 2 * h)


def test_a_batch_of_one_around_the_rows_is_steered_and_a_larger_one_refused() -> None:
    module, coefficients = torch.nn.Identity(), torch.tensor([[0.0], [2.0], [0.0]])
    splice(module, coefficients, torch.ones(1, 3))
    assert module(torch.zeros(1, 2, 3))[0, :, 0].tolist() == [0, 2]
    for shape in [(2, 2, 3), (2, 1, 3), (1, 1, 2, 3), (2, 4)]:
        with pytest.raises(ValueError, match="A steered module returns"):
            module(torch.zeros(shape))


def test_a_spliced_module_compiles_without_a_break() -> None:
    module, coefficients = torch.nn.Linear(3, 3), torch.zeros(8, 1)
    splice(module, coefficients, torch.ones(1, 3))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    h = torch.randn(4, 3)
    plain = compiled(h)
    coefficients[1] = 2.0  # in place: what was compiled sees it
    assert torch.allclose(compiled(h) - plain, torch.tensor([[0.0], [2.0], [0.0], [0.0]]).expand(4, 3), atol=1e-6)


def test_vectors_of_parts_are_added_there() -> None:
    passes, blocks = a_pass({"calm": "mlp"})
    passes.admit("a", admitted(field(("joy", 1.0, None), ("calm", 3.0, None)), LAYERS, 6), 6)
    passes.fill(["a"], [1], [0])
    assert blocks[1].mlp(torch.zeros(1, 3)).tolist() == [[-3.0] * 3]
    assert blocks[1](torch.zeros(1, 3)).tolist() == [[2.0] * 3]


# --- the plugin, on modules that stand in for vLLM's ------------------------------------------------------------------


def fake() -> dict[str, ModuleType]:
    "The modules of vLLM that the plugin touches, with classes that do as little as possible."

    class EngineArgs:
        def __init__(self, **settings: Any):
            self.settings = settings

        def create_engine_config(self, usage_context: Any = None) -> Any:
            model = SimpleNamespace(
                runner_type="generate", get_hidden_size=lambda: 4, get_total_num_hidden_layers=lambda: 2
            )
            parallel = SimpleNamespace(
                use_ubatching=False,
                pipeline_parallel_size=1,
                prefill_context_parallel_size=1,
                decode_context_parallel_size=1,
                tensor_parallel_size=1,
            )
            usual = dict(
                speculative_config=None,
                kv_transfer_config=None,
                parallel_config=parallel,
                cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
                model_config=model,
                scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
                additional_config={},
            )
            return SimpleNamespace(**usual | self.settings)

    class InputProcessor:
        def __init__(self, config: Any):
            self.vllm_config = config

        def process_inputs(self, request_id: str, prompt: list[int], params: Any) -> Any:
            own = SimpleNamespace(extra_args=params.extra_args)
            return SimpleNamespace(sampling_params=own, prompt_token_ids=prompt, prompt_embeds=None)

    class WorkerBase:
        def __init__(self, vllm_config: Any, local_rank: int = 0):
            self.vllm_config = vllm_config

        def load_model(self) -> None:
            self.model_runner = runner_v1()

    def _gen_prompt_embeds_extra_hash_keys(request: Any, start_token_idx: int, end_token_idx: int) -> list[Any]:
        return []

    class VLLMValidationError(ValueError):
        def __init__(self, message: str, *, parameter: str | None = None):
            super().__init__(message)

    class ChatCompletionRequest:
        def __init__(self, vllm_xargs: Any):
            self.vllm_xargs = vllm_xargs

        def to_beam_search_params(self, max_tokens: int) -> str:
            return "beams"

    contents: dict[str, list[Any]] = {
        "vllm": [],
        "vllm.engine.arg_utils": [EngineArgs],
        "vllm.v1.engine.input_processor": [InputProcessor],
        "vllm.v1.core.kv_cache_utils": [_gen_prompt_embeds_extra_hash_keys],
        "vllm.v1.worker.worker_base": [WorkerBase],
        "vllm.exceptions": [VLLMValidationError],
        "vllm.entrypoints.openai.chat_completion.protocol": [ChatCompletionRequest],
    }
    made = {name: ModuleType(name) for name in contents}
    for name, things in contents.items():
        for thing in things:
            setattr(made[name], thing.__name__, thing)
    made["vllm"].__version__ = "0.32.0+cpu"  # type: ignore[attr-defined]
    return made


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))


def runner_v1() -> Any:
    model = Model()
    batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=np.zeros(8, int))
    return SimpleNamespace(
        get_model=lambda: model,
        device=torch.device("cpu"),
        requests={},
        input_batch=batch,
        _prepare_inputs=lambda output, counts: "prepared",
    )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    modules = fake()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules


@pytest.fixture
def files(tmp_path: Any) -> dict[str, Any]:
    SteeringVector({0: torch.ones(4), 1: torch.ones(4)}).save(tmp_path / "joy.safetensors")
    return {"steering_vectors": {"joy": str(tmp_path / "joy.safetensors")}, "theirs": 1}


def configured(vllm: dict[str, ModuleType], **settings: Any) -> Any:
    plugin.register()
    args: Any = vllm["vllm.engine.arg_utils"].EngineArgs  # type: ignore[attr-defined]
    return args(**settings).create_engine_config()


def test_the_stand_ins_have_the_names_that_the_plugin_uses(vllm: dict[str, ModuleType]) -> None:
    from steering_vectors.serve.engines import missing_name

    assert [missing_name(name, needs) for name, needs in PRIVATE.items()] == [None] * len(PRIVATE)


def test_registering_twice_wraps_once_and_an_engine_without_vectors_is_left_alone(vllm: dict[str, ModuleType]) -> None:
    config = configured(vllm, additional_config={"theirs": 1})
    again = configured(vllm, additional_config={"theirs": 1})
    assert config.additional_config == again.additional_config == {"theirs": 1}
    worker: Any = vllm["vllm.v1.worker.worker_base"].WorkerBase(config)  # type: ignore[attr-defined]
    before = worker.load_model
    worker.load_model()
    assert "load_model" not in vars(worker) and before.__func__ is type(worker).load_model
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None), num_prompt_tokens=3)
    assert vllm["vllm.v1.core.kv_cache_utils"]._gen_prompt_embeds_extra_hash_keys(request, 0, 4) == []  # type: ignore[attr-defined]


def test_the_whole_way_of_a_request(vllm: dict[str, ModuleType], files: dict[str, Any]) -> None:
    given = dict(files)
    config = configured(vllm, additional_config=given)
    assert given == files and config.additional_config["theirs"] == 1
    json.dumps(config.additional_config)  # vLLM hashes it as JSON
    params = SimpleNamespace(extra_args={"steering": '{"vector": "joy", "tokens": "Tokens.response"}', "other": 2})
    said = json.dumps(params.extra_args)
    front: Any = vllm["vllm.v1.engine.input_processor"].InputProcessor(config)  # type: ignore[attr-defined]
    request = front.process_inputs("a", [1, 2, 3], params)
    assert json.dumps(params.extra_args) == said and request.sampling_params.extra_args["other"] == 2
    core = SimpleNamespace(sampling_params=request.sampling_params, num_prompt_tokens=3)
    keys = [vllm["vllm.v1.core.kv_cache_utils"]._gen_prompt_embeds_extra_hash_keys(core, i, i + 2) for i in (0, 2)]  # type: ignore[attr-defined]
    assert keys[0] == [] and keys[1][0][0] == "steering"
    worker: Any = vllm["vllm.v1.worker.worker_base"].WorkerBase(config)  # type: ignore[attr-defined]
    worker.load_model()
    runner = worker.model_runner
    runner.requests["a"] = core
    runner.input_batch.req_ids = ["a"]
    assert runner._prepare_inputs(SimpleNamespace(finished_req_ids=set()), np.array([3])) == "prepared"
    assert [layer(torch.zeros(3, 4))[:, 0].tolist() for layer in runner.get_model().layers] == [[0, 0, 1]] * 2
    runner.input_batch.req_ids = []
    runner._prepare_inputs(SimpleNamespace(finished_req_ids={"a"}), np.array([], int))
    assert runner.get_model().layers[0](torch.zeros(3, 4)).abs().sum() == 0


@pytest.mark.parametrize("named", [True, False])
def test_a_bad_request_gets_the_engines_own_error(vllm: dict[str, ModuleType], files: Any, named: bool) -> None:
    config = configured(vllm, additional_config=files if named else {})
    front: Any = vllm["vllm.v1.engine.input_processor"].InputProcessor(config)  # type: ignore[attr-defined]
    error = vllm["vllm.exceptions"].VLLMValidationError  # type: ignore[attr-defined]
    with pytest.raises(error, match="no vector 'grief'; it has " + ("'joy'" if named else "none")):
        front.process_inputs("a", [1], SimpleNamespace(extra_args={"steering": '{"vector": "grief"}'}))


def test_beam_search_is_refused_with_steering_and_left_alone_without(vllm: dict[str, ModuleType]) -> None:
    configured(vllm)
    chat: Any = vllm["vllm.entrypoints.openai.chat_completion.protocol"].ChatCompletionRequest  # type: ignore[attr-defined]
    assert chat(None).to_beam_search_params(3) == "beams"
    with pytest.raises(ValueError, match="beam search cannot be steered"):
        chat({"steering": '{"vector": "joy"}'}).to_beam_search_params(3)


OTHER: dict[Any, Any] = {None: "something", False: True, 1: 2, "generate": "pooling"}


@pytest.mark.parametrize("path", FIT)
def test_an_engine_that_cannot_be_steered_does_not_start(vllm: dict[str, ModuleType], files: Any, path: str) -> None:
    config = configured(vllm)
    *owners, last = path.split(".")
    changed = getattr(config, owners[0]) if owners else config
    setattr(changed, last, OTHER[FIT[path][0]])
    settings = {owners[0] if owners else last: changed if owners else getattr(config, last)}
    with pytest.raises(CannotSteer, match="cannot steer this engine"):
        configured(vllm, additional_config=files, **settings)
    assert configured(vllm, **settings) is not None  # without vectors it does


@pytest.mark.parametrize("name", [name for name in PRIVATE if "create_engine_config" not in name])
def test_a_missing_name_of_vllm_refuses_the_start(vllm: dict[str, ModuleType], files: Any, name: str) -> None:
    module, _, path = name.partition(":")
    plugin.register()
    owner: Any = vllm[module]
    *owners, last = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, last, lambda: None)
    with pytest.raises(CannotSteer, match="cannot steer vLLM 0.32.0.*Tested: vLLM"):
        configured(vllm, additional_config=files)


def test_an_untested_version_is_told(vllm: Any, files: Any, caplog: pytest.LogCaptureFixture) -> None:
    vllm["vllm"].__version__ = "9.9.0"
    configured(vllm, additional_config=files)
    assert "has not been tested with vLLM 9.9.0" in caplog.text


def test_without_the_first_name_the_log_has_a_warning(vllm: Any, caplog: pytest.LogCaptureFixture) -> None:
    del vllm["vllm.engine.arg_utils"].EngineArgs.create_engine_config
    plugin.register()
    assert "cannot steer this version of vLLM" in caplog.text


# --- both model runners, over made-up schedules -----------------------------------------------------------------------


def runner_v2() -> Any:
    model = Model()
    return SimpleNamespace(
        get_model=lambda: model,
        device=torch.device("cpu"),
        add_requests=lambda output: None,
        finish_requests=lambda output: None,
        prepare_inputs=lambda output, batch_state, *more: batch_state,
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_both_runners_set_each_row_whatever_the_schedule(data: st.DataObject) -> None:
    "Pieces of prefill and single tokens in one pass, requests that come, go, change places and are computed again."
    vectors = {
        "joy": SteeringVector({0: torch.ones(3), 1: 2 * torch.ones(3)}),
        "calm": SteeringVector({1: -torch.ones(3)}),
    }
    first, second = runner_v1(), runner_v2()
    for runner in (first, second):
        plugin.follow(runner, SteeredPasses(runner.get_model().layers, vectors, 64, torch.device("cpu")))
    plans = [data.draw(st.none() | PLAN) for _ in range(4)]
    prompts, done = [data.draw(st.integers(3, 9)) for _ in plans], [0] * len(plans)
    params = [SimpleNamespace(extra_args=parts and {"steering": admitted(field(*parts), LAYERS, 9)}) for parts in plans]
    told: set[str] = set()
    for _ in range(8):
        batch = data.draw(st.permutations(range(len(plans))))[: data.draw(st.integers(1, len(plans)))]
        for i in batch:
            if data.draw(st.integers(0, 5)) == 0:  # has lost its blocks: from the beginning, under the same name
                done[i] = 0
                told.discard(f"r{i}")
        counts = [
            data.draw(st.integers(1, prompts[i] - done[i]) if done[i] < prompts[i] else st.just(1)) for i in batch
        ]
        names, starts = [f"r{i}" for i in batch], [done[i] for i in batch]
        new = [
            SimpleNamespace(req_id=f"r{i}", sampling_params=params[i], prompt_len=prompts[i])
            for i in batch
            if f"r{i}" not in told
        ]
        told |= set(names)
        gone = data.draw(st.sampled_from([set(), {"r9"}]))
        output = SimpleNamespace(finished_req_ids=gone, scheduled_new_reqs=new)
        first.requests |= {
            f"r{i}": SimpleNamespace(sampling_params=params[i], num_prompt_tokens=prompts[i]) for i in batch
        }
        first.input_batch.req_ids = names
        first.input_batch.num_computed_tokens_cpu[: len(names)] = starts
        first._prepare_inputs(output, np.array(counts))
        second.finish_requests(output)
        second.add_requests(output)
        pad = [0] * data.draw(st.integers(0, 2))  # the arrays of a recorded pass are longer than the batch
        second.prepare_inputs(
            output,
            SimpleNamespace(
                req_ids=names,
                num_scheduled_tokens=np.array(counts + pad),
                num_computed_tokens_np=np.array(starts + pad),
            ),
            None,
        )
        want = []
        for i, count in zip(batch, counts, strict=True):
            for at in range(done[i], done[i] + count):
                given = [(v, m) for v, m, t in plans[i] or [] if positions(t, prompts[i], at, at + 1)[0]]
                joy, calm = (sum(m for v, m in given if v == name) for name in ("joy", "calm"))
                want.append([joy, 2 * joy - calm])
            done[i] += count
        for runner in (first, second):
            got = [layer(torch.zeros(len(want) + 3, 3))[:, 0].tolist() for layer in runner.get_model().layers]
            assert [list(pair) for pair in zip(*got, strict=True)] == want + [[0, 0]] * 3
