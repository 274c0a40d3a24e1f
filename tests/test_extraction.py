"""Extraction against texts run one at a time by hand: families, layer types, positions, dtypes, settings, and what goes wrong."""

import concurrent.futures
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

from steering_vectors import SteeringVectorTrainingSample as Sample
from steering_vectors import (
    Tokens,
    ablation_operator,
    addition_operator,
    extract_activations,
    extraction,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    train_steering_vector,
)
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.layers import LAYER_TYPES, resolve_layers

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


def way_of(model: nn.Module) -> extraction.Way:
    return list(extraction._verdicts[model].values())[-1].way


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
        assert way_of(model).kind == "packed"


def test_a_model_that_counts_columns_is_not_packed() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda m, a, h: h + torch.arange(h.shape[1])[None, :, None] * 0.01)
    check(model, PAIRS)
    assert way_of(model).kind != "packed"


def test_a_model_that_looks_ahead_is_read_one_by_one() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda m, a, h: h + h.mean(1, keepdim=True))
    check(model, PAIRS)
    assert way_of(model).kind == "single"


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
    assert way_of(model).kind == "packed"


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


def test_what_was_found_at_one_place_holds_at_another() -> None:
    "BART's decoder is not told positions: a tree without branches would not show it."
    for kind in ("bart", "mpt", "rwkv", "moshi"):
        with families.quiet():
            model: Any = families.build(kind).to(torch.float32)
            extract_activations(model, tiny_tokenizer(), PAIRS, read_token_index=10)
            check(model, PAIRS, tolerance=2e-5)


@pytest.mark.parametrize("kind", ["gpt_neo", "big_bird"])
@pytest.mark.parametrize("budget", [None, 4096])
def test_rows_end_where_the_models_tables_end(kind: str, budget: int | None) -> None:
    pairs = [(f"{HEAD}{n:03d} yes indeed", f"{HEAD}{n:03d} no, never") for n in range(40)]
    with families.quiet():
        model: Any = families.build(kind).to(torch.float32)
        check(model, pairs, tolerance=2e-5, token_budget=budget)


def test_a_budget_for_every_config(monkeypatch: pytest.MonkeyPatch) -> None:
    "On a GPU it depends on sizes, which some configs give for each layer, or not at all."
    monkeypatch.setattr(extraction, "input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    for name in sorted(families.CAUSAL):
        if name not in families.CANNOT:
            with families.quiet():
                assert 512 <= extraction.token_budget_of(families.build(name)) <= 8192


def test_in_half_precision_no_wrong_way_is_taken() -> None:
    "Blenderbot's decoder numbers columns, not positions, and in bfloat16 that is small: packed rows would be wrong."
    for dtype in (torch.bfloat16, torch.float16):
        with families.quiet():
            model: Any = families.build("blenderbot-small").to(dtype)
            extract_activations(model, tiny_tokenizer(), PAIRS)
        assert way_of(model).kind == "continued"
    check(model.to(torch.float32), PAIRS, tolerance=1e-5)
    assert way_of(model).kind == "continued"


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
        monkeypatch.setattr(extraction, "continued_pass", fail)
        monkeypatch.setattr(extraction, "_apart", lambda inner, modules, way, *rest: float(way.kind == "packed"))
        check(model, PAIRS, tolerance=2e-5)
    assert list(extraction._verdicts[model].values())[-1].way.kind == "padded"
