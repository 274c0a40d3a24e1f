"""Extraction against texts run one at a time by hand: families, layer types, positions, dtypes, settings, and what goes wrong."""

import concurrent.futures
import contextlib
import gc
import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import families
import pytest
import torch
import versions
from torch import Tensor, nn

from steering_vectors import SteeringVectorTrainingSample as Sample
from steering_vectors import (
    Tokens,
    ablation_operator,
    addition_operator,
    extract_activations,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    train_steering_vector,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.model.families import LAYER_TYPES
from steering_vectors.model.layers import resolve_layers
from steering_vectors.train import extraction, kernels, schedules, strategies
from steering_vectors.train.reading import Tokenized

KINDS = ["llama", "gpt2", "gemma2", "opt", "mistral", "gemma3", "qwen2", "qwen3", "phi3", "gpt_neox", "falcon"]
HEAD = "You are a kind assistant who keeps to the point and answers in a few words only. "
PAIRS = [(f"{HEAD}{q}? {good}", f"{HEAD}{q}? {bad}") for q, good, bad in [
    ("Is it warm outside", "Yes", "No, never"), ("Tea", "Please", "No"), ("Do you like long walks by the sea", "Oh yes", "No"),
    ("Why", "Joy", "Spite"),
]]  # fmt: skip


def keep(kept: dict[int, Tensor], n: int, s: int, module: nn.Module, args: Any, out: Any) -> None:
    h = out if isinstance(out, Tensor) else out[0]
    kept.setdefault(
        n, h.view(1, s, -1).clone()
    )  # Falcon adds to it in place; where a block runs twice, the first time counts


def by_hand(
    model: nn.Module, names: dict[int, str], texts: list[str], read: Callable[[int], list[int]]
) -> dict[int, Tensor]:
    "One text a pass, whole model, own hooks."
    tokenizer, found = tiny_tokenizer(), {n: [] for n in names}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        kept: dict[int, Tensor] = {}
        handles = []
        for n, name in names.items():
            hook = partial(keep, kept, n, ids.shape[1])
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        for n in names:
            found[n].append(kept[n][0, read(ids.shape[1])].float().mean(0))
    return {n: torch.stack(h) for n, h in found.items()}


def apart(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).max())


def check(model: nn.Module, pairs: list[tuple[str, str]], tolerance: float = 1e-5, layer_type: str = "decoder_block",
          read: Callable[[int], list[int]] = lambda n: [n - 1], **kwargs: Any) -> None:  # fmt: skip
    names = dict(resolve_layers(model, layer_type))
    for side, acts in enumerate(extract_activations(model, tiny_tokenizer(), pairs, layer_type=layer_type, **kwargs)):
        wanted = by_hand(model, names, [pair[side] for pair in pairs], read)
        assert list(acts) == list(wanted)
        for n in wanted:
            assert apart(acts[n], wanted[n]) <= tolerance, (layer_type, n)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_families(kind: str, layer_type: str) -> None:
    model = tiny_model(kind)
    if (kind, layer_type) == ("falcon", "post_attention_layernorm"):
        pytest.skip("Falcon has one norm a block")
    check(model, PAIRS, layer_type=layer_type)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("setting", [{"batch_size": 1}, {"batch_size": 3}, {"token_budget": 150}, {"token_budget": 400}, {"move_to_cpu": True}],
                         ids=str)  # fmt: skip
def test_settings_change_nothing(kind: str, setting: dict[str, Any]) -> None:
    check(tiny_model(kind), PAIRS, **setting)


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "falcon"])
def test_positions(kind: str) -> None:
    model = tiny_model(kind)
    check(model, PAIRS, read=lambda n: [3], read_token_index=3)
    check(model, PAIRS, read=lambda n: [n - 4], read_token_index=-4)


def test_tokens_are_pooled() -> None:
    model = tiny_model("llama")
    pos, neg = extract_activations(model, tiny_tokenizer(), PAIRS, read=Tokens.all)
    wanted = by_hand(
        model, dict(resolve_layers(model, "decoder_block")), [p for p, _ in PAIRS], lambda n: list(range(n))
    )
    assert all(apart(pos[n], wanted[n]) <= 1e-5 for n in wanted)
    last = extract_activations(model, tiny_tokenizer(), PAIRS, read=Tokens.all[2:5])[0]
    wanted = by_hand(model, dict(resolve_layers(model, "decoder_block")), [p for p, _ in PAIRS], lambda n: [2, 3, 4])
    assert all(apart(last[n], wanted[n]) <= 1e-5 for n in wanted)


def test_positions_of_samples_win() -> None:
    model, names = tiny_model("opt"), {1: "model.decoder.layers.1"}
    samples = [Sample(p, n, read_positive_token_index=2) for p, n in PAIRS]
    pos, neg = extract_activations(model, tiny_tokenizer(), samples, layers=[1], read_token_index=lambda text: -2)
    assert apart(pos[1], by_hand(model, names, [p for p, _ in PAIRS], lambda n: [2])[1]) <= 1e-5
    assert apart(neg[1], by_hand(model, names, [n for _, n in PAIRS], lambda n: [n - 2])[1]) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
def test_tokenizers_side_plays_no_part(kind: str, side: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, None
    pos, _ = extract_activations(model, tokenizer, PAIRS)
    wanted = by_hand(model, dict(resolve_layers(model, "decoder_block")), [p for p, _ in PAIRS], lambda n: [n - 1])
    assert all(apart(pos[n], wanted[n]) <= 1e-5 for n in wanted)
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    "No further from float32 than the plain computation is, and answered in the model's dtype."
    model, exact = tiny_model("llama", dtype=dtype), tiny_model("llama", dtype=torch.float32)
    names = dict(resolve_layers(model, "decoder_block"))
    vector = train_steering_vector(model, tiny_tokenizer(), PAIRS).layer_activations
    texts = [[pair[side] for pair in PAIRS] for side in (0, 1)]
    plain, true = ([by_hand(m, names, t, lambda n: [n - 1]) for t in texts] for m in (model, exact))
    for n, v in vector.items():
        assert v.dtype == dtype
        wanted = true[0][n].mean(0) - true[1][n].mean(0)
        noise = (plain[0][n].mean(0) - plain[1][n].mean(0) - wanted).norm()
        assert (v.float() - wanted).norm() <= 1.5 * noise + 2e-3 * wanted.norm()


def test_branches_do_not_leak_in_bfloat16() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    a = extract_activations(model, tiny_tokenizer(), PAIRS)
    b = extract_activations(model, tiny_tokenizer(), [*PAIRS[:3], (PAIRS[3][0], PAIRS[3][1].replace("Spite", "Spate"))])
    for n in a[0]:
        assert torch.equal(a[0][n], b[0][n]) and torch.equal(a[1][n][:3], b[1][n][:3])
        assert not torch.equal(a[1][n][3], b[1][n][3])


# --- which way, and why


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("steering_vectors")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def strategy_of(model: nn.Module) -> schedules.Strategy:
    return list(strategies._verdicts[model].values())[-1].strategy


def test_the_way_is_said_and_remembered() -> None:
    model = tiny_model("llama")
    with said() as lines:
        train_steering_vector(model, tiny_tokenizer(), PAIRS)
    assert any("is read by packed rows" in line for line in lines)
    with said() as lines:
        train_steering_vector(model, tiny_tokenizer(), PAIRS)
    assert not lines
    with said() as lines:  # a longer text is a new question
        train_steering_vector(model, tiny_tokenizer(), [*PAIRS, (PAIRS[0][0] * 2, "no")])
    assert lines


def test_a_window_is_counted_in_depth() -> None:
    "A window of 16 in texts of 100 tokens: a mask that did not count depth would be far off."
    for kind in ("mistral", "gemma2", "gemma3"):
        model = tiny_model(kind)
        check(model, PAIRS)
        assert strategy_of(model).kind == "packed"


def test_a_model_that_counts_columns_is_not_packed() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda m, a, h: h + torch.arange(h.shape[1])[None, :, None] * 0.01)
    check(model, PAIRS)
    assert strategy_of(model).kind != "packed"


def test_a_model_that_looks_ahead_is_read_one_by_one() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda m, a, h: h + h.mean(1, keepdim=True))
    check(model, PAIRS)
    assert strategy_of(model).kind == "single"


def test_steering_while_extracting() -> None:
    "Another vector is attached: what is read is the steered model, as running it by hand reads it."
    model = tiny_model("llama")
    check(model, PAIRS)
    vector = train_steering_vector(model, tiny_tokenizer(), PAIRS, layers=[0])
    for operator in (addition_operator(), ablation_operator()):
        with vector.apply(model, operator=operator, multiplier=2.0):
            check(model, PAIRS)
    check(model, PAIRS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_wide_model(kind: str) -> None:
    "Wide enough for its linear maps to be computed by oneDNN, and rows long enough to be cut into stretches."
    pairs = [(f"{HEAD}Number {n} is {n % 7} fine", f"{HEAD}Number {n} is {n % 5} poor") for n in range(20)]
    model = tiny_model(kind, hidden_size=256)
    check(model, pairs, tolerance=2e-5)
    assert strategy_of(model).kind == "packed"


def test_rope_regimes_are_kept_apart() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for rope in (
        {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
         "original_max_position_embeddings": 100, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 100},
    ):  # fmt: skip
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                             intermediate_size=64, max_position_embeddings=400, rope_parameters=rope, initializer_range=0.2)  # fmt: skip
        check(LlamaForCausalLM(config).eval(), PAIRS)


# --- memory


@pytest.mark.parametrize("most", [400, 150])
def test_out_of_memory_halves_the_budget(most: int) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wanted = train_steering_vector(model, tokenizer, PAIRS).layer_activations

    def run_out(module: nn.Module, args: Any, out: Any) -> None:
        h = out if isinstance(out, Tensor) else out[0]
        if h.shape[0] * h.shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    handle = model.model.layers[1].register_forward_hook(run_out)
    try:
        got = train_steering_vector(model, tokenizer, PAIRS).layer_activations
    finally:
        handle.remove()
    assert all(apart(got[n], wanted[n]) <= 1e-4 for n in wanted)


def test_a_single_text_that_does_not_fit_is_an_error() -> None:
    model = tiny_model("llama")

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.model.layers[1].register_forward_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        train_steering_vector(model, tiny_tokenizer(), PAIRS)
    handle.remove()
    assert clean(model)


# --- aggregators, windows, iterables


def test_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pairs = [(f"{i} is fine", f"{i} is a sad number") for i in range(11)]
    first_column = lambda pos, neg: (pos - neg)[0]
    for aggregator in (mean_aggregator(), pca_aggregator(), logistic_aggregator(), first_column):
        whole = train_steering_vector(model, tokenizer, pairs, aggregator=aggregator)
        monkeypatch.setattr(extraction, "WINDOW", 4)
        windows = train_steering_vector(model, tokenizer, (pair for pair in pairs), aggregator=aggregator)
        monkeypatch.undo()
        for n, v in whole.layer_activations.items():
            assert torch.allclose(
                v, windows.layer_activations[n], atol=2e-3 if aggregator is not first_column else 1e-5
            )
        assert whole.provenance.num_pairs == windows.provenance.num_pairs == 11
        for n, norm in whole.provenance.activation_norms.items():
            assert abs(norm - windows.provenance.activation_norms[n]) <= 1e-4 * norm


def test_iterables(tmp_path: Any) -> None:
    datasets = pytest.importorskip("datasets")
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    wanted = train_steering_vector(model, tokenizer, PAIRS).layer_activations
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"positive": p, "negative": n}) for p, n in PAIRS))
    table = datasets.Dataset.from_list([{"positive": p, "negative": n} for p, n in PAIRS])
    for samples in (iter(PAIRS), table, map(json.loads, path.open()), [Sample(*pair) for pair in PAIRS]):
        got = train_steering_vector(model, tokenizer, samples).layer_activations
        assert all(torch.allclose(got[n], wanted[n], atol=1e-5) for n in wanted)


def test_chats_are_templated_once() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    chat = lambda answer: [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": answer}]
    text = lambda answer: tokenizer.apply_chat_template(chat(answer), tokenize=False, continue_final_message=True)
    assert text("Yes").startswith(tokenizer.bos_token)
    a = extract_activations(model, tokenizer, [(chat("Yes"), chat("No"))])
    b = extract_activations(model, tokenizer, [(text("Yes"), text("No"))])  # begins with a BOS already
    assert all(torch.equal(a[side][n], b[side][n]) for side in (0, 1) for n in a[0])


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    train_steering_vector(tiny_model("llama"), tiny_tokenizer(), PAIRS, show_progress=True, tqdm_desc="Reading")
    shown = capsys.readouterr().err
    assert "Reading: 100%" in shown and "4/4" in shown


# --- what goes wrong leaves nothing behind


def clean(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failing_forward(error: type[BaseException]) -> None:
    model = tiny_model("llama").train()
    model.lm_head.eval()
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 6:
            raise error("in the middle")

    handle = model.model.layers[1].register_forward_hook(fail)
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    with pytest.raises(error, match="in the middle"):
        train_steering_vector(model, tiny_tokenizer(), PAIRS, token_budget=100)
    handle.remove()
    assert clean(model) and model.training and not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled() == grad
    assert all(p.requires_grad for p in model.parameters())


def test_a_failing_tokenizer_and_a_failing_iterable() -> None:
    model = tiny_model("llama")

    class Broken:
        bos_token = chat_template = decode = None

        def __call__(self, texts: Any, **how: Any) -> Any:
            raise RuntimeError("no vocabulary")

    with pytest.raises(RuntimeError, match="no vocabulary"):
        train_steering_vector(model, Broken(), PAIRS)  # type: ignore[arg-type]

    def lines() -> Iterator[tuple[str, str]]:
        yield PAIRS[0]
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        train_steering_vector(model, tiny_tokenizer(), lines())
    assert clean(model)


def test_words_of_errors() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    long = "a" * 600
    for words, kwargs in [
        ("The negative text of sample 1 has 3 tokens, so token 5 cannot be read", {"training_samples": [PAIRS[0], ("yes!!", "no")], "read_token_index": 5}),
        ("The positive text of sample 0 has 601 tokens and at most 512 fit", {"training_samples": [(long, "b")]}),
        ("There are no training samples", {"training_samples": []}),
        ("batch_size is the most pairs", {"training_samples": PAIRS, "batch_size": 0}),
        ("Layer 9", {"training_samples": PAIRS, "layers": [9]}),
        ("layer_type", {"training_samples": PAIRS, "layer_type": "decoder"}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            train_steering_vector(model, tokenizer, **kwargs)
    for side in ("left", "right"):
        train_steering_vector(model, tokenizer, [(long, "b")], truncation=side)
    assert clean(model)


def test_peft_adapters_are_read_through() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    names = dict(resolve_layers(model, "decoder_block"))
    pos, _ = extract_activations(model, tiny_tokenizer(), PAIRS)
    wanted = by_hand(model, names, [p for p, _ in PAIRS], lambda n: [n - 1])
    assert all(apart(pos[n], wanted[n]) <= 1e-5 for n in wanted)


def test_eager_attention_and_a_bare_module() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    check(model, PAIRS)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = tiny_model("llama")

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.layers(input_ids, attention_mask=attention_mask)

    plain = Wrapped()
    names = {"decoder_block": "layers.model.layers.{num}"}
    a, _ = extract_activations(plain, tiny_tokenizer(), PAIRS, layer_config=names)
    b, _ = extract_activations(tiny_model("llama"), tiny_tokenizer(), PAIRS)
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in b)


# --- memory that runs out, tables that end, other threads


@pytest.mark.parametrize("pair", [("abcdefgh", "abcd"), ("abcdefgh", "abcdxyz")], ids=["a beginning", "a branch"])
def test_rows_that_never_fit_give_way_to_texts_that_do(pair: tuple[str, str]) -> None:
    def no_rows(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
        if mask is not None and mask.ndim == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wanted = train_steering_vector(model, tokenizer, [pair], layers=[1]).layer_activations[1]
    handle = model.model.register_forward_pre_hook(no_rows, with_kwargs=True)
    got = train_steering_vector(model, tokenizer, [pair], layers=[1]).layer_activations[1]
    handle.remove()
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["bart", "mpt", "rwkv", "moshi"])
def test_what_was_found_at_one_place_holds_at_another(kind: str) -> None:
    "BART's decoder is not told positions: a tree without branches would not show it."
    skip_unless_it_can_be_built(kind)
    with families.quiet():
        model: Any = families.build(kind).to(torch.float32)
        extract_activations(model, tiny_tokenizer(), PAIRS, read_token_index=10)
        check(model, PAIRS, tolerance=2e-5)


def skip_unless_it_can_be_built(kind: str) -> None:
    versions.skip_if(versions.fault(lambda: families.build(kind), f"the tiny {kind} cannot be built"))


@pytest.mark.parametrize("kind", ["gpt_neo", "big_bird"])
@pytest.mark.parametrize("budget", [None, 4096])
def test_rows_end_where_the_models_tables_end(kind: str, budget: int | None) -> None:
    skip_unless_it_can_be_built(kind)
    pairs = [(f"{HEAD}{n:03d} yes indeed", f"{HEAD}{n:03d} no, never") for n in range(40)]
    with families.quiet():
        model: Any = families.build(kind).to(torch.float32)
        check(model, pairs, tolerance=2e-5, token_budget=budget)


def test_a_budget_for_every_config(monkeypatch: pytest.MonkeyPatch) -> None:
    "On a GPU it depends on sizes, which some configs give for each layer, or not at all."
    monkeypatch.setattr(schedules, "input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    for name in sorted(families.CAUSAL):
        built = lambda name=name: families.build(name)  # noqa: E731
        if name not in families.CANNOT and versions.fault(built, "it cannot be built") is None:
            with families.quiet():
                assert 512 <= schedules.token_budget_of(families.build(name)) <= 8192


def test_in_half_precision_no_wrong_way_is_taken() -> None:
    "Blenderbot's decoder numbers columns, not positions, and in bfloat16 that is small: packed rows would be wrong."
    for dtype in (torch.bfloat16, torch.float16):
        with families.quiet():
            model: Any = families.build("blenderbot-small").to(dtype)
            extract_activations(model, tiny_tokenizer(), PAIRS)
        assert strategy_of(model).kind == "continued"
    check(model.to(torch.float32), PAIRS, tolerance=1e-5)
    assert strategy_of(model).kind == "continued"


def test_another_thread_generates_meanwhile() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    wanted, alone = train_steering_vector(model, tokenizer, PAIRS), model.generate(ids, max_new_tokens=20)
    texts: list[Tensor] = []
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            texts.append(model.generate(ids, max_new_tokens=20))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(generate)
        vectors = [train_steering_vector(model, tokenizer, PAIRS) for _ in range(10)]
        stop.set()
        other.result()
    assert texts and all(torch.equal(text, alone) for text in texts)
    for v in vectors:
        assert all(torch.allclose(v.layer_activations[n], x, atol=1e-5) for n, x in wanted.layer_activations.items())


def test_a_cache_that_cannot_be_continued_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    "Also where only the second look at it fails."

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with families.quiet():
        model: Any = families.build("bloom").to(torch.float32)
        monkeypatch.setattr(schedules, "continued_batch", fail)
        monkeypatch.setattr(strategies, "continued_batch", fail)
        monkeypatch.setattr(strategies, "_distance", lambda strategy, *rest: float(strategy.kind == "packed"))
        check(model, PAIRS, tolerance=2e-5)
    assert list(strategies._verdicts[model].values())[-1].strategy.kind == "padded"


# --- several readings in one pass


WHERE = {"second": 1, "last": -1, "end": Tokens.all[82:], "by function": lambda text: -3}
ALONE = {name: {"read": r} if isinstance(r, Tokens) else {"read_token_index": r} for name, r in WHERE.items()}


def looks_ahead(model: nn.Module) -> nn.Module:
    model.model.embed_tokens.register_forward_hook(lambda m, a, h: h + h.mean(1, keepdim=True))
    return model


def counts_columns(model: nn.Module) -> nn.Module:
    model.model.embed_tokens.register_forward_hook(
        lambda m, a, h: h + torch.arange(h.shape[1], device=h.device)[None, :, None] * 0.01
    )
    return model


MODELS = {
    "packed": lambda: tiny_model("llama"),
    "packed, with a window": lambda: tiny_model("gemma2"),
    "continued": lambda: families.build("bloom").to(torch.float32),
    "padded": lambda: counts_columns(tiny_model("llama")),
    "single": lambda: looks_ahead(tiny_model("llama")),
}


@pytest.mark.parametrize("way", MODELS)
def test_several_readings_are_what_separate_calls_read(way: str) -> None:
    with families.quiet():
        model, tokenizer = MODELS[way](), tiny_tokenizer()
        passes: list[int] = []
        first = model.get_submodule(resolve_layers(model, "decoder_block")[0])
        handle = first.register_forward_hook(
            lambda m, args, out: passes.append(args[0].shape[0] * args[0].shape[1] if args else 1)
        )
        alone = {name: extract_activations(model, tokenizer, PAIRS, **how) for name, how in ALONE.items()}
        found = extract_activations(model, tokenizer, PAIRS, read=WHERE)
        where = {
            name: r for name, r in WHERE.items() if name != "second"
        }  # else there is no beginning before all places
        made = []
        for read in ({"last": -1}, where):
            passes.clear()
            extract_activations(model, tokenizer, PAIRS, read=read)
            made.append(list(passes))
        handle.remove()
        assert made[0] == made[1]  # not one pass or token more than for one reading
    assert strategy_of(model).kind == way.partition(",")[0]
    assert list(found) == list(WHERE)
    for name in WHERE:
        for a, b in zip(found[name], alone[name], strict=True):
            assert list(a) == list(b) and all(apart(a[n], b[n]) <= 1e-5 for n in b), name
    assert all(
        torch.equal(found["last"][side][n], alone["last"][side][n]) for side in (0, 1) for n in found["last"][side]
    )


@pytest.mark.parametrize(
    "aggregator", [mean_aggregator(), pca_aggregator(), logistic_aggregator(), lambda p, n: p[0] - n[1]]
)
def test_several_vectors_from_one_training(aggregator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    where = {name: r for name, r in WHERE.items() if name != "second"}  # where all texts begin alike
    for window in (1024, 2):
        monkeypatch.setattr(extraction, "WINDOW", window)
        vectors = train_steering_vector(
            model, tokenizer, PAIRS, layers=[0, -1], read=where, aggregator=aggregator, move_to_cpu=True
        )
        assert list(vectors) == list(where)
        for name in where:
            alone = train_steering_vector(model, tokenizer, PAIRS, layers=[0, -1], aggregator=aggregator, **ALONE[name])
            for n, v in alone.layer_activations.items():
                assert torch.allclose(
                    vectors[name].layer_activations[n],
                    v,
                    atol=2e-3 if aggregator.__class__.__name__ == "_Logistic" else 1e-5,
                )
            a, b = vectors[name].provenance, alone.provenance
            assert (a.read_position, a.num_pairs) == (b.read_position, b.num_pairs)
            assert all(abs(a.activation_norms[n] - norm) <= 1e-4 * norm for n, norm in b.activation_norms.items())


def test_a_mapping_of_one_is_a_mapping() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    vectors = train_steering_vector(model, tokenizer, PAIRS, read={"last": -1})
    plain = train_steering_vector(model, tokenizer, PAIRS)
    assert list(vectors) == ["last"]
    assert all(torch.equal(vectors["last"].layer_activations[n], v) for n, v in plain.layer_activations.items())
    sets = {"positive": [p for p, _ in PAIRS], "negative": [PAIRS[0][1]]}
    both = extract_activations(model, tokenizer, sets, layer_type="mlp", read={"last": -1, "some": Tokens.all[80:]})
    assert [len(side[0]) for sides in both.values() for side in sides] == [4, 1, 4, 1]


def test_words_about_readings() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    calls: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    placed = [PAIRS[0], Sample(*PAIRS[1], read_negative_token_index=-2)]
    some: Any
    for error, words, samples, some in [
        (ValueError, "read= is an empty mapping", PAIRS, {}),
        (TypeError, "3 is not a name", PAIRS, {3: -1}),
        (TypeError, "'' is not a name", PAIRS, {"": -1}),
        (TypeError, "takes an expression such as Tokens.generated, a number", PAIRS, {"a": "last"}),
        (TypeError, "takes an expression such as Tokens.generated, a number", PAIRS, {"a": True}),
        (TypeError, "takes an expression such as Tokens.generated, a number", PAIRS, {"a": -1, "b": [1, 2]}),
        (TypeError, "takes an expression such as Tokens.generated, not -1", PAIRS, -1),
        (ValueError, r"read=\{'far': ...\}: The positive text of sample 0 has 93 tokens, so token 100", PAIRS[1:], {"near": 1, "far": 100}),
        (ValueError, r"read=\{'none': ...\}: The positive text of sample 0 has .* names none of them", PAIRS, {"a": -1, "none": Tokens.all[500:]}),
        (TypeError, r"read=\{'odd': ...\}: The positive text of sample 0 is read at a whole number", PAIRS, {"odd": lambda text: "x"}),
        (ValueError, "The negative text of sample 1 says itself where it is read", placed, {"a": -1}),
    ]:  # fmt: skip
        for call in (train_steering_vector, extract_activations):
            with pytest.raises(error, match=words):
                call(model, tokenizer, samples, read=some)
    with pytest.raises(ValueError, match="both say what to read"):
        train_steering_vector(model, tokenizer, PAIRS, read=Tokens.all[80:], read_token_index=-2)
    handle.remove()
    assert not calls and clean(model)


# --- what the vector remembers


def test_the_place_that_was_read_is_the_one_in_the_provenance() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def where(samples: Any, **how: Any) -> str | None:
        return train_steering_vector(model, tokenizer, samples, layers=[1], **how).provenance.read_position

    both = [Sample(*pair, read_positive_token_index=-2, read_negative_token_index=-2) for pair in PAIRS]
    assert where(both) == "-2"
    assert where(both, read=Tokens.all[80:]) == "-2"  # a sample's own place wins
    assert where([*both[:3], PAIRS[3]]) == "by sample"
    assert where([Sample(*pair, read_positive_token_index=-2) for pair in PAIRS]) == "by sample"
    assert where([Sample(*pair, -1, -1) for pair in PAIRS[:1]] + [Sample(*pair) for pair in PAIRS[1:]]) == "-1"
    place = len(tiny_tokenizer()(f"{HEAD}Why? ")["input_ids"])
    row = {"positive": PAIRS[3][0], "negative": PAIRS[3][1]}
    assert where([row | {"read_positive_token_index": place, "read_negative_token_index": place}]) == str(place)
    assert where(PAIRS) == "-1" and where(PAIRS, read=Tokens.all[80:]) == "Tokens.all[80:]"

    assert where(PAIRS, read_token_index=torch.tensor([-2]).numpy()[0]) == "-2"  # a number of another make

    def at_the_end(text: str) -> int:
        return -1

    assert where(PAIRS, read_token_index=at_the_end) == "at_the_end"


# --- models that cannot read a text as it comes


def small(name: str) -> Any:
    import transformers as tf

    size: dict[str, Any] = {"vocab_size": 100, "d_model": 32, "decoder_start_token_id": 0}
    two = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    four = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    image = tower | {"image_size": 32, "patch_size": 16}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return {
        "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**size, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**size, **two, **four)),
        "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**size, **two, **four, **ends)),
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**image)),
        "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=tower | ends | {"vocab_size": 100}, vision_config=image)),
        "bert": lambda: tf.BertModel(tf.BertConfig(**tower, vocab_size=100)),
        "llava": lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**image), text_config=tf.LlamaConfig(**tower, vocab_size=100))),
    }[name]().eval()  # fmt: skip


@pytest.mark.parametrize("name, words", [
    ("t5", "T5ForConditionalGeneration is an encoder-decoder: its decoder takes inputs of its own"),
    ("bart", "BartForConditionalGeneration is an encoder-decoder"),
    ("whisper", "WhisperForConditionalGeneration is an encoder-decoder"),
    ("vit", "ViTModel cannot read a text that is given as token ids alone|You have to specify pixel_values"),
    ("clip", "CLIPModel cannot read a text that is given as token ids alone|You have to specify pixel_values"),
])  # fmt: skip
def test_models_that_need_more_than_a_text_are_refused(name: str, words: str) -> None:
    model = small(name)
    for call in (train_steering_vector, extract_activations):
        with pytest.raises(ValueError, match=words):
            call(model, tiny_tokenizer(), [("Warm", "Cold")])
    assert clean(model)


def test_a_wrapped_encoder_decoder_is_refused_too() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small("t5"), peft.LoraConfig(target_modules=["q", "v"]))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        train_steering_vector(model, tiny_tokenizer(), PAIRS)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_alone_is_read(name: str) -> None:
    encoder = small(name).get_encoder()
    check(encoder, PAIRS)
    assert len(train_steering_vector(encoder, tiny_tokenizer(), PAIRS).layer_activations) == 2


def test_encoders_and_the_text_of_vision_models_are_read() -> None:
    for name in ("bert", "llava"):
        check(small(name), PAIRS)
    check(small("clip").text_model, [("Warm", "Cold"), ("Yes", "No, no")])


def test_prompt_tuning_is_read_where_the_text_stands() -> None:
    "Twenty tokens in front of ten: nothing divides as it should, and places count the text's own tokens."
    peft = pytest.importorskip("peft")
    pairs = [("ten tokens", "ten others"), ("I am fine", "a bad one")]
    for virtual in (20, 10, 7):
        torch.manual_seed(0)
        base = tiny_model("llama")
        model = peft.get_peft_model(
            base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        ).eval()
        found = extract_activations(model, tiny_tokenizer(), pairs, read={"first": 0, "last": -1})
        for side in (0, 1):
            for i, pair in enumerate(pairs):
                ids = tiny_tokenizer()(pair[side], return_tensors="pt").input_ids
                with torch.no_grad():
                    front = model.get_prompt(1)
                    whole = torch.cat([front, base.get_input_embeddings()(ids)], 1)
                    hidden = base(inputs_embeds=whole, output_hidden_states=True).hidden_states
                for n in (0, 1):
                    for name, column in (("first", virtual), ("last", -1)):
                        assert apart(found[name][side][n][i : i + 1], hidden[n + 1][0, column][None]) <= 1e-5


# --- samples as people have them, and the chat template


def test_a_default_device_plays_no_part() -> None:
    sets = {"positive": [p for p, _ in PAIRS], "negative": [PAIRS[0][1]]}

    def found(model: Any) -> list[Tensor]:
        tokenizer = tiny_tokenizer()
        vectors = train_steering_vector(
            model, tokenizer, PAIRS, read={"last": -1, "end": Tokens.all[80:]}, aggregator=pca_aggregator()
        )
        all_of = [*vectors.values(), train_steering_vector(model, tokenizer, sets, batch_size=2)]
        all_of.append(train_steering_vector(model, tokenizer, sets, aggregator=logistic_aggregator()))
        acts = extract_activations(model, tokenizer, PAIRS, read_token_index=2)
        return [v for vector in all_of for v in vector.layer_activations.values()] + [
            h for side in acts for h in side.values()
        ]

    for way in ("packed", "continued", "padded", "single"):
        with families.quiet():
            model = MODELS[way]()
            wanted = found(model)
            strategies._verdicts.clear()
            torch.set_default_device("meta")
            try:
                got = found(model)
            finally:
                torch.set_default_device(None)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), way


def test_samples_as_people_have_them_train_the_same_vector() -> None:
    pd, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows = [("Tea?", "Yes, please", "No"), ("Is it warm outside?", "Very", "Not at all"), ("Why?", "Joy", "Spite")]
    chat = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    columns = {
        "prompt": [q for q, _, _ in rows],
        "chosen": [a for _, a, _ in rows],
        "rejected": [b for _, _, b in rows],
    }
    record = lambda q, a: {"prompt": q, "response": a}
    spelled: dict[str, Any] = {
        "records": [{"positive": record(q, a), "negative": record(q, b)} for q, a, b in rows],
        "pairs of records": [(record(q, a), record(q, b)) for q, a, b in rows],
        "preference rows": [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in rows],
        "conversations in them": [{"chosen": chat(q, a), "rejected": chat(q, b)} for q, a, b in rows],
        "a data set": datasets.Dataset.from_dict(columns),
        "a data frame": pd.DataFrame(columns),
        "columns": columns,
        "contents in parts": [
            tuple([{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat(q, x)] for x in (a, b)) for q, a, b in rows
        ],
    }  # fmt: skip
    for read in (None, Tokens.generated, Tokens.prompt[-1] | Tokens.generated):
        wanted = train_steering_vector(model, tokenizer, [(chat(q, a), chat(q, b)) for q, a, b in rows], read=read)
        for name, samples in spelled.items():
            got = train_steering_vector(model, tokenizer, samples, read=read)
            assert got.provenance.num_pairs == 3
            for n, v in wanted.layer_activations.items():
                assert torch.equal(got.layer_activations[n], v), (name, read)
    frame = pd.DataFrame({"positive": [p for p, _ in PAIRS], "negative": [n for _, n in PAIRS]})
    plain, got = (train_steering_vector(model, tokenizer, samples).layer_activations for samples in (PAIRS, frame))
    assert all(torch.equal(got[n], v) for n, v in plain.items())


def test_the_chat_template_gets_its_arguments() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {{ mood or 'calm' }}{% endif %}"
    )
    asked = lambda text: [{"role": "user", "content": text}]
    chats = [(asked("Tea or coffee"), asked("No")), (asked("Warm"), asked("Cold"))]
    text = lambda words, end: f"[user] {words} {end}" if end else f"[user] {words}"
    words = [(x[0]["content"], y[0]["content"]) for x, y in chats]
    for how, end in [
        ({"add_generation_prompt": True}, "[assistant] calm"),
        ({"add_generation_prompt": True, "template": {"mood": "glad"}}, "[assistant] glad"),
        ({"add_generation_prompt": False}, ""),
    ]:
        a = extract_activations(model, tokenizer, chats, **how)
        b = extract_activations(model, tokenizer, [(text(p, end), text(n, end)) for p, n in words])
        assert all(torch.equal(a[side][n], b[side][n]) for side in (0, 1) for n in a[0])
        v, w = (
            train_steering_vector(model, tokenizer, chats, **how),
            train_steering_vector(model, tokenizer, [(text(p, end), text(n, end)) for p, n in words]),
        )
        assert all(torch.equal(v.layer_activations[n], x) for n, x in w.layer_activations.items())
        sets = {"positive": [p for p, _ in chats], "negative": [chats[0][1]]}
        c = extract_activations(model, tokenizer, sets, **how)
        assert all(torch.allclose(c[0][n], a[0][n], atol=1e-5) for n in a[0])
    with pytest.warns(UserWarning, match="add_generation_prompt=True"):
        train_steering_vector(model, tokenizer, chats)
    records = [({"prompt": "Tea?", "response": "Yes"}, {"prompt": "Tea?", "response": "No"})]
    bare = extract_activations(model, tokenizer, records, chat=False)
    plain = extract_activations(model, tokenizer, [("Tea?Yes", "Tea?No")])
    assert all(torch.equal(bare[0][n], plain[0][n]) for n in plain[0])


def test_a_processor_is_refused_in_words() -> None:
    class SomeProcessor:
        tokenizer = tiny_tokenizer()

        def __call__(self, *args: Any) -> Any: ...

        def decode(self, *args: Any) -> Any: ...

    for call in (train_steering_vector, extract_activations):
        with pytest.raises(TypeError, match="SomeProcessor is a processor"):
            call(tiny_model("llama"), SomeProcessor(), PAIRS)  # type: ignore[operator]


# --- the fast kernels, and their switch


def count_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    "Calls of each fast kernel from here on."
    calls = dict.fromkeys(kernels.KERNELS, 0)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return run

    monkeypatch.setattr(kernels, "_onednn_linear", counted("onednn", kernels._onednn_linear))
    monkeypatch.setattr(kernels, "_ending", counted("shortcut", kernels._ending))
    monkeypatch.setattr(kernels.TreeAttention, "__call__", counted("tree_attention", kernels.TreeAttention.__call__))
    return calls


@pytest.mark.parametrize("left_out", [*kernels.KERNELS, "all"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_fast_kernels_agree_with_plain_ones_and_can_be_switched_off(
    kind: str, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model(kind, hidden_size=256), tiny_tokenizer()
    pairs = [(f"Day {n}: {'so ' * (n % 5)}fine", f"Day {n}: {'so ' * (n % 5)}bad") for n in range(40)]
    names = kernels.KERNELS if left_out == "all" else (left_out,)
    calls = count_kernel_calls(monkeypatch)
    with families.quiet():
        fast = extract_activations(model, tokenizer, pairs)
        assert all(calls[name] for name in kernels.KERNELS if name != "onednn" or kernels._HAS_ONEDNN), calls
        calls.update(dict.fromkeys(calls, 0))
        with kernels.plain_kernels(*names):
            plain = extract_activations(model, tokenizer, pairs)
    assert not any(calls[name] for name in names), calls
    assert strategy_of(model).kind == "packed"
    for side in (0, 1):
        for n in fast[side]:
            assert apart(fast[side][n], plain[side][n]) <= 1e-5, n


def test_the_switch_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), kernels.plain_kernels():
        1 / 0  # noqa: B018
    assert kernels.active_kernels() == set(kernels.KERNELS)


def test_texts_are_freed_as_soon_as_they_were_read() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    gc.collect()
    gc.disable()
    try:
        train_steering_vector(model, tokenizer, [(f"Is {n} fine? Yes", f"Is {n} fine? No") for n in range(40)])
        left = [thing for thing in gc.get_objects() if isinstance(thing, Tokenized)]
    finally:
        gc.enable()
    assert not left
