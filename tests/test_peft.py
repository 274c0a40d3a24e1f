"""Models wrapped by peft: the same layers under longer names, and what some adapters put in front of the text."""

from typing import Any

import peft
import plain
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from versions import SINCE, fault, installed, skip_if

from steering_vectors import SteeringVector, find_layers, record_activations, train_steering_vector
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.model.hooks import read_output
from steering_vectors.steer import positions
from steering_vectors.steer.caches import Adapter, find_cache, returned
from steering_vectors.steer.tokens import Tokens

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc2"]}


def wrapped(kind: str) -> Any:
    "A LoRA model whose adapters do something."
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules=TARGETS[kind], task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def prompt() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp"])
def test_steered_generation(kind: str, layer_type: Any) -> None:
    model, g = wrapped(kind), torch.Generator().manual_seed(2)
    directions = {n: torch.randn(32, generator=g) for n in (0, 2)}
    before = plain.hooks_on(model)
    for say, want in [
        ({"min_token_index": 3}, lambda c, own, n: c >= 3),
        ({"tokens": Tokens.response}, lambda c, own, n: own >= n - 1),
    ]:
        with SteeringVector(directions, layer_type).apply(model, prompt=prompt(), **say):
            out = model.generate(**prompt(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
                                 return_dict_in_generate=True, output_logits=True)  # fmt: skip
        named = {"base_model.model." + plain.MODULES[kind][layer_type].format(n): v for n, v in directions.items()}
        for r, pads in enumerate((2, 0)):
            n = 6 - pads
            expected = plain.logits_of_steps(
                model, out.sequences[r], 6, pads, named, lambda c, own, n=n, want=want: want(c, own, n)
            )
            unsteered = plain.logits_of_steps(model, out.sequences[r], 6, pads, {}, lambda c, own: False)
            assert plain.far(torch.stack([s[r] for s in out.logits]), expected) < 1e-5
            assert plain.far(expected, unsteered) > 1e-3
    assert plain.hooks_on(model) == before


def test_layers_and_training() -> None:
    model, inner = wrapped("llama"), tiny_model("llama")
    assert {k: len(v) for k, v in find_layers(model).layers.items()} == {
        k: len(v) for k, v in find_layers(inner).layers.items()
    }
    pairs = [("I am glad", "I am sad"), ("Hooray", "Oh no")]
    vector = train_steering_vector(model, tiny_tokenizer(), pairs)
    tokenizer = tiny_tokenizer()
    for n in range(3):
        name = f"base_model.model.model.layers.{n}"
        ends = [
            [plain.activation(model, torch.tensor(tokenizer(t)["input_ids"]), name) for t in pair] for pair in pairs
        ]
        expected = torch.stack([pos - neg for pos, neg in ends]).mean(0)
        assert plain.far(vector.layer_activations[n], expected) < 1e-5
    other = train_steering_vector(inner, tiny_tokenizer(), pairs)
    assert plain.far(other.layer_activations[2], vector.layer_activations[2]) > 1e-3, "the adapters count"


def test_a_vector_moves_between_the_wrapped_and_the_plain_model() -> None:
    model = wrapped("llama")
    vector, ids = SteeringVector({1: torch.ones(32)}), prompt()["input_ids"]
    with (
        torch.no_grad(),
        model.disable_adapter(),
        vector.apply(model, min_token_index=2),
        record_activations(model) as recorded,
    ):
        inside = model(ids).logits
    inner = tiny_model("llama")
    with torch.no_grad(), vector.apply(inner, min_token_index=2):
        assert plain.far(inside, inner(ids).logits) < 1e-6
    assert list(recorded) == [0, 1, 2]


def test_adapters_train_while_steering() -> None:
    model = wrapped("llama")
    with SteeringVector({1: torch.ones(32)}).apply(model, min_token_index=2):
        model(prompt()["input_ids"]).logits.sum().backward()
    grads = [p.grad.norm() for name, p in model.named_parameters() if "lora_A" in name]
    assert grads and all(g > 0 for g in grads)


# --- adapters that put something in front of the text ----------------------------------------------------------------

X = torch.tensor([[5, 9, 17, 33, 12, 44, 21]])
GEN: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
IN_FRONT = {
    "prompt": lambda k: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=k),
    "p-tuning": lambda k: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=k, encoder_hidden_size=16),
}
EVERY = IN_FRONT | {"prefix": lambda k: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=k)}


def tuned(kind: str, k: int = 4) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), EVERY[kind](k)).eval()


def ones_of(model: Any, call: Any, **say: Any) -> list[list[list[int]]]:
    "Which columns of each pass are steered."
    block, seen = model.get_submodule(find_layers(model)["decoder_block"][1]), []
    vector = SteeringVector(
        {1: 0.02 * torch.randn(32, generator=torch.Generator().manual_seed(3))}
    )  # writes the same words
    for how in ({"multiplier": 0.0}, say):
        acts: list[Tensor] = []
        with (
            torch.no_grad(),
            vector.apply(model, **how),
            read_output(block, lambda h, acts=acts: acts.append(h.clone())),
        ):
            call()
        seen.append(acts)
    return [((a - b).abs().amax(-1) > 1e-6).int().tolist() for a, b in zip(*seen, strict=True)]


def writing(model: Any, ids: Tensor = X, mask: Tensor | None = None, **how: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return lambda: model.generate(input_ids=ids, attention_mask=mask, **GEN, **how)


def skip_unless_it_generates(kind: str, model: Any) -> None:
    "peft has to know the transformers that is installed: what it writes must be what single passes over everything write."

    def unsteered() -> None:
        ids, ones = X, torch.ones_like(X)
        out = model.generate(input_ids=X, attention_mask=ones, **GEN, return_dict_in_generate=True, output_logits=True)
        for step, token in zip(out.logits, out.sequences[0, 7:], strict=True):
            with torch.no_grad():
                logits = model(ids).logits[:, -1]
            assert plain.far(step, logits) < 1e-3, "other logits than without a cache"
            ids = torch.cat([ids, token.view(1, 1)], 1)

    said = f"peft {peft.__version__} does not generate with {kind} tuning"
    skip_if(fault(unsteered, said, ask=installed() != SINCE))


SAYS: list[
    tuple[dict[str, Any], list[int], list[int]]
] = [  # what is said, then which of the text's tokens, and of three more
    ({"tokens": Tokens.response}, [6], [1, 1]),
    ({"tokens": Tokens.prompt[0]}, [0], [0, 0]),
    ({"tokens": Tokens.prompt[-2:] | Tokens.generated[1:]}, [5, 6], [0, 1]),
    ({"tokens": Tokens.all[1:3]}, [1, 2], [0, 0]),
    ({"tokens": Tokens.all}, [0, 1, 2, 3, 4, 5, 6], [1, 1]),
]


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("say, own, later", SAYS, ids=lambda x: str(x) if isinstance(x, dict) else "")
@pytest.mark.parametrize("prompt", [None, X, {"input_ids": X, "attention_mask": torch.ones_like(X)}, [X[0].tolist()]])
def test_tokens_are_those_of_the_text(kind: str, say: Any, own: list[int], later: list[int], prompt: Any) -> None:
    "With `prompt=` and without it, one forward pass and a generation alike."
    model, front = tuned(kind), 0 if kind == "prefix" else 4
    skip_unless_it_generates(kind, model)
    first = [0] * front + [int(c in own) for c in range(7)]
    assert ones_of(model, writing(model), **say, prompt=prompt) == [[first], *([[n]] for n in later)]
    assert ones_of(model, lambda: model(X), **say, prompt=prompt) == [[first]]


@pytest.mark.parametrize("kind", EVERY)
def test_columns_are_those_that_blocks_compute(kind: str) -> None:
    "Learned embeddings are columns; what stands in the cache beforehand is not."
    model, front = tuned(kind), 0 if kind == "prefix" else 4
    skip_unless_it_generates(kind, model)
    for least in (2, 5, 6, 8, 10):
        columns = [int(c >= least) for c in range(front + 9)]
        want = [[columns[: front + 7]], *([[c]] for c in columns[front + 7 :])]
        assert ones_of(model, writing(model), min_token_index=least) == want
        assert ones_of(model, lambda: model(X), min_token_index=least) == want[:1]
    assert ones_of(model, writing(model), token_indices=[-1], prompt=X)[0] == [[0] * (front + 6) + [1]]


@pytest.mark.parametrize("kind", IN_FRONT)
def test_the_law_with_learned_embeddings(kind: str) -> None:
    "Without a cache the embeddings are put in front again at every pass."
    model = tuned(kind)
    skip_unless_it_generates(kind, model)
    with pytest.raises(ValueError, match="repeats an earlier one"):
        ones_of(model, writing(model, use_cache=False), tokens=Tokens.response)
    say: dict[str, Any]
    for say in (
        {"tokens": Tokens.response, "prompt": X},
        {"tokens": Tokens.prompt[0], "prompt": X},
        {"min_token_index": 6},
    ):
        cached = ones_of(model, writing(model), **say)
        flat = [n for step in cached for n in step[0]]
        uncached = ones_of(model, writing(model, use_cache=False), **say)
        assert uncached == [[flat[: 11 + t]] for t in range(3)]


@pytest.mark.parametrize("kind", EVERY)
def test_padded_rows_behind_an_adapter(kind: str) -> None:
    model, front = tuned(kind), 0 if kind == "prefix" else 4
    given = prompt()
    call = writing(model, given["input_ids"], given["attention_mask"])
    skip_unless_it_generates(kind, model)
    for said in (None, given):
        first = ones_of(model, call, tokens=Tokens.prompt[0] | Tokens.response, prompt=said)[0]
        assert first == [[0] * front + [0, 0, 1, 0, 0, 1], [0] * front + [1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("kind", EVERY)
def test_a_disabled_adapter_puts_nothing_in_front(kind: str) -> None:
    model = tuned(kind)
    with model.disable_adapter():
        for said in (None, X):
            assert ones_of(model, writing(model), tokens=Tokens.response, prompt=said)[0] == [[0] * 6 + [1]]
        assert ones_of(model, writing(model), min_token_index=6)[0] == [[0] * 6 + [1]]


@pytest.mark.parametrize("kind", IN_FRONT)
def test_another_prompt_behind_an_adapter_is_refused(kind: str) -> None:
    model = tuned(kind)
    for other in (X[:, :5] + 1, torch.arange(20)[None], torch.arange(11)[None]):
        with pytest.raises(ValueError, match="embeddings per row, 4 of them from the adapter"):
            ones_of(model, writing(model), tokens=Tokens.response, prompt=other)
    with pytest.raises(ValueError, match=r"7 columns and the model was given 11 \(4 of them from the adapter\)"):
        ones_of(model, writing(model), token_indices=torch.tensor([1, 0, 0, 0, 0, 0, 1]))


@pytest.mark.parametrize("kind", IN_FRONT)
def test_an_adapter_that_repeats_itself_behind_a_cache_is_refused(kind: str) -> None:
    "What forward does with every cache that it is given: its tokens end up in the middle of the text."
    model, ids = tuned(kind), torch.tensor([[5]])

    def continued() -> None:
        cache = find_cache(returned(model(X, use_cache=True)))
        assert cache is not None
        model(inputs_embeds=model.get_input_embeddings()(ids), **{cache[0]: cache[1]})

    said: Any
    for said in ({"tokens": Tokens.response}, {"tokens": Tokens.generated, "prompt": X}, {"tokens": Tokens.all}):
        with pytest.raises(ValueError, match=r"put its 4 tokens in front once more.*use_cache=False"):
            ones_of(model, continued, **said)
    assert ones_of(model, continued, min_token_index=13) == [[[0] * 11], [[0, 0, 1, 1, 1]]]


@pytest.mark.parametrize("say", [{"tokens": Tokens.response}, {"tokens": Tokens.prompt[0], "prompt": X}, {"min_token_index": 8}, {"token_indices": [2, 8]}], ids=str)  # fmt: skip
def test_a_prefix_that_is_not_in_the_cache_is_not_counted(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    "A transformers that peft does not know makes a cache of its own, without the prefix."
    model = tiny_model("llama")
    want = ones_of(model, writing(model), **say)
    monkeypatch.setattr(positions, "prompt_adapter", lambda model: Adapter("PREFIX_TUNING", 4, True))
    assert ones_of(model, writing(model), **say) == want


def test_the_model_inside_does_not_know_its_adapter_but_finds_the_prompt() -> None:
    model = tuned("prompt")
    inner, block = model.base_model, model.base_model.model.layers[1]
    seen: list[Tensor] = []
    for m in (0.0, 1.0):
        with SteeringVector({1: torch.ones(32)}).apply(inner, multiplier=m, tokens=Tokens.response, prompt=X):
            with torch.no_grad(), read_output(block, lambda h: seen.append(h.clone())):
                model(X)
    assert ((seen[0] - seen[1]).abs().amax(-1) > 1e-6).int().tolist() == [[0] * 10 + [1]]


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("k, texts, size", [
    (20, [("abcdefghi", "abcdefghj")], None), (10, [("abcd", "abce"), ("ab", "x")], 4), (4, [("abc", "abd")] * 2, 2), (3, [("ab", "b")], 1),
])  # fmt: skip
def test_training_reads_the_text_behind_what_is_in_front(kind: str, k: int, texts: Any, size: int | None) -> None:
    "Whatever the numbers of learned tokens, of the text's tokens and of rows have to do with each other."
    model, tokenizer = tuned(kind, k), tiny_tokenizer()
    once = lambda text: model(tokenizer(text, return_tensors="pt").input_ids)  # noqa: E731
    skip_if(fault(lambda: once("ab"), f"{kind} tuning does not run"))
    vector = train_steering_vector(model, tokenizer, texts, batch_size=size)
    for n in range(3):
        block, ends = model.get_submodule(find_layers(model)["decoder_block"][n]), []
        for text in (text for pair in texts for text in pair):
            seen: list[Tensor] = []
            with torch.no_grad(), read_output(block, lambda h, seen=seen: seen.append(h[0, -1].clone())):
                once(text)
            ends += seen
        expected = torch.stack([a - b for a, b in zip(ends[::2], ends[1::2], strict=True)]).mean(0)
        assert plain.far(vector.layer_activations[n], expected) < 1e-5
