"""Passes that are put together otherwise: several sequences in a row, encoders beside the decoder, repeated caches, beams, interrupts, copies."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
)
from versions import fault, skip_if

from steering_vectors import SteeringVector, find_layers
from steering_vectors.demo import tiny_model
from steering_vectors.model.hooks import read_output
from steering_vectors.steer.calls import CacheFacts, CacheMemory
from steering_vectors.steer.starts import read_call
from steering_vectors.steer.tokens import Tokens

IDS = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(1))
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # padding


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def vector(layer: int = 1) -> SteeringVector:
    return SteeringVector({layer: 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))})


def steered(model: Any, call: Callable[[], Any], **how: Any) -> list[list[int]]:
    "Which tokens of a pass are steered, (b, s) of 0 and 1."
    seen: list[Tensor] = []
    block = model.get_submodule(find_layers(model)["decoder_block"][1])
    with torch.no_grad(), vector().apply(model, **how), read_output(block, lambda h: seen.append(h.clone())):
        call()
    with torch.no_grad(), read_output(block, lambda h: seen.append(h.clone())):
        call()
    return ((seen[0] - seen[-1]).abs().amax(-1) > 1e-6).int().tolist()


# --- several sequences in one row


FLAT = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
LIMITS = torch.tensor([0, 3, 7], dtype=torch.int32)
FLATTENED: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])},
    "positions from anywhere": {"position_ids": torch.tensor([[5, 6, 7, 0, 1, 2, 3]])},
    "three": {"position_ids": torch.tensor([[0, 1, 0, 1, 0, 1, 2]])},
    "limits": {"cu_seq_lens_q": LIMITS, "cu_seq_lens_k": LIMITS, "max_length_q": 4, "max_length_k": 4},
}


@pytest.mark.parametrize("told", FLATTENED)
@pytest.mark.parametrize(
    "how",
    [{"tokens": Tokens.all}, {"tokens": Tokens.response}, {"tokens": Tokens.prompt[0], "prompt": FLAT}, {"tokens": Tokens.columns[2:] & Tokens.all},
     {"token_indices": [-1]}, {"tokens": Tokens.all[1:], "multiplier": [1.0]}],
    ids=str,
)  # fmt: skip
def test_tokens_of_several_sequences_in_one_row_are_refused(model: Any, told: str, how: dict[str, Any]) -> None:
    def call() -> None:
        model(input_ids=FLAT, use_cache=False, **FLATTENED[told])

    with pytest.raises(ValueError, match="several sequences in one row"):
        steered(model, call, **how)
    assert steered(model, call) == [[1] * 7]


COLUMNS: list[tuple[dict[str, Any], list[int]]] = [
    ({"min_token_index": 2}, [0, 0, 1, 1, 1, 1, 1]),
    ({"token_indices": [0, 3]}, [1, 0, 0, 1, 0, 0, 0]),
    ({"token_indices": [-1], "prompt": FLAT}, [0, 0, 0, 0, 0, 0, 1]),
    ({"token_indices": torch.tensor([1, 0, 0, 0, 1, 1, 0]).bool()}, [1, 0, 0, 0, 1, 1, 0]),
    ({"tokens": Tokens.columns[1:6:2]}, [0, 1, 0, 1, 0, 1, 0]),
    ({"tokens": Tokens.columns[:] - [9]}, [1, 1, 1, 1, 0, 1, 1]),
    ({"multiplier": [1.0]}, [1, 1, 1, 1, 1, 1, 1]),
    ({"multiplier": [1.0], "min_token_index": 5}, [0, 0, 0, 0, 0, 1, 1]),
]


@pytest.mark.parametrize("told", FLATTENED)
@pytest.mark.parametrize(("how", "want"), COLUMNS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_columns_of_a_row_need_not_know_what_it_holds(
    model: Any, told: str, how: dict[str, Any], want: list[int]
) -> None:
    assert steered(model, lambda: model(input_ids=FLAT, use_cache=False, **FLATTENED[told]), **how) == [want]


@pytest.mark.parametrize("how", [{"min_token_index": 2}, {"tokens": Tokens.all}, {"multiplier": [1.0]}], ids=str)
def test_several_sequences_in_one_cache_are_refused(model: Any, how: dict[str, Any]) -> None:
    "As `generate_batch` reads them: of each sequence only what is new, so not even columns can be counted."
    for more in ({"past_key_values": DynamicCache()}, {"block_table": torch.zeros(2, 1)}):
        with pytest.raises(ValueError, match="several sequences in one row"), vector().apply(model, **how):
            model(input_ids=FLAT, **FLATTENED["limits"], **more)


# --- encoders


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=100, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **sizes, **ends
    )
    return BartForConditionalGeneration(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, **ends)
    ).eval()


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("columns", [6, 5])
def test_the_encoders_padding_is_not_the_decoders(make: Callable[[], Any], columns: int) -> None:
    model, decoder_ids = make(), IDS.flip(0)[:, :columns]
    given = {"input_ids": IDS, "attention_mask": LEFT, "decoder_input_ids": decoder_ids}
    assert steered(model, lambda: model(**given), tokens=Tokens.all) == [[1] * columns] * 2
    mask = torch.tensor([[1] * columns, [1] * (columns - 1) + [0]])
    padded = given | {"decoder_attention_mask": mask}
    assert steered(model, lambda: model(**padded), tokens=Tokens.all) == mask.tolist()
    plain = model.generate(IDS, attention_mask=LEFT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for tokens in (Tokens.generated, Tokens.response):
        outs = []
        for cached in (True, False):
            start = torch.full((2, 1), model.config.decoder_start_token_id)
            with vector().apply(model, tokens=tokens, prompt=start, multiplier=20):
                out = model.generate(
                    IDS, attention_mask=LEFT, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cached
                )
            assert out.shape == plain.shape and not torch.equal(out, plain)
            outs.append(out)
        assert torch.equal(*outs)


# --- caches, beams


def test_the_rows_of_a_cache_may_be_repeated(model: Any) -> None:
    mask = torch.cat([LEFT, torch.ones(2, 1, dtype=torch.long)], 1).repeat_interleave(2, 0)

    def step() -> None:
        cache = DynamicCache()
        model(input_ids=IDS, attention_mask=LEFT, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        model(input_ids=torch.tensor([[5], [5], [6], [6]]), attention_mask=mask, past_key_values=cache)

    block, seen = model.model.layers[1], []
    for how in ({"multiplier": 0}, {"tokens": Tokens.all[4:]}):
        with torch.no_grad(), vector().apply(model, **how), read_output(block, lambda h: seen.append(h.clone())):
            step()
    changed = [((a - b).abs().amax(-1) > 1e-6).int().tolist() for a, b in zip(seen[:2], seen[2:], strict=True)]
    assert changed == [[[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]], [[0], [0], [1], [1]]]


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_mask_and_beams_with_and_without_a_cache(model: Any, beams: int) -> None:
    mask = torch.zeros(2, 6, dtype=torch.long)
    mask[:, 3:5] = 1
    out = []
    for cached in (True, False):
        with vector().apply(model, token_indices=mask):
            options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
            out.append(model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=cached, **options))
    assert torch.equal(*out)


def test_beams_without_a_cache_do_not_pass_for_a_new_prompt(model: Any) -> None:
    with pytest.raises(ValueError, match="repeats an earlier one"), vector().apply(model, tokens=Tokens.response):
        model.generate(IDS, max_new_tokens=8, do_sample=False, num_beams=3, pad_token_id=0, use_cache=False)


# --- interrupts, copies


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_call_tells_the_next_one_nothing(model: Any, error: type[BaseException]) -> None:
    def fail(*_: Any) -> None:
        raise error

    def call() -> None:
        handle = model.model.layers[0].register_forward_hook(fail)
        with pytest.raises(error):
            model(IDS, attention_mask=LEFT)
        handle.remove()
        model.model(IDS)  # the inner model, without a mask

    assert steered(model, call, tokens=Tokens.all) == [[1] * 6] * 2


@pytest.mark.parametrize("how", [{}, {"tokens": Tokens.response}, {"multiplier": [1.0, 0.0]}], ids=str)
def test_a_model_can_be_copied_while_it_is_steered(model: Any, how: dict[str, Any]) -> None:
    with torch.no_grad():
        plain = model(IDS).logits
        with vector().apply(model, **how):
            other = copy.deepcopy(model)
            assert not torch.equal(model(IDS).logits, plain)
        assert torch.equal(other(IDS).logits, plain) and torch.equal(model(IDS).logits, plain)


# --- what the model is told


def test_columns_that_the_model_is_told_are_believed() -> None:
    "Older transformers say where a pass stands, and their static caches count only columns that are not zero."
    memory, cache = CacheMemory(), DynamicCache()
    prompt = {"input_ids": IDS, "past_key_values": cache, "cache_position": torch.arange(6)}
    assert read_call(prompt, {}, memory).start == 0
    memory.put(cache, CacheFacts(6, 6, None))
    step = {"input_ids": IDS[:, :1], "past_key_values": cache}
    assert read_call(step | {"cache_position": torch.tensor([6])}, {}, memory).start == 6
    on_the_device = read_call(step | {"cache_position": torch.empty(1, device="meta")}, {}, memory).start
    assert isinstance(on_the_device, Tensor)  # not waited for


def test_a_vector_without_numbers_can_be_attached() -> None:
    model: Any = tiny_model("llama").to("meta")
    ids = torch.ones(1, 4, dtype=torch.long, device="meta")
    skip_if(fault(lambda: model(ids), "a model without numbers does not run"))
    with SteeringVector({1: torch.ones(32, device="meta")}).apply(model):
        assert model(ids).logits.is_meta
