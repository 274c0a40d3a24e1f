"""What one call was given: caches recognised by what they are, under any name, and passes that continue something unknown."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from test_unusual_passes import steered, vector
from torch import Tensor
from transformers import BertConfig, BertModel, DynamicCache, OpenAIGPTConfig, OpenAIGPTLMHeadModel, StaticCache

from steering_vectors.demo import tiny_model
from steering_vectors.model.families import CACHE_NAMES
from steering_vectors.modes import undisturbed
from steering_vectors.steer import caches
from steering_vectors.steer.caches import cache_length, find_cache, is_cache, named_arguments, returned
from steering_vectors.steer.tokens import Tokens
from steering_vectors.train.batches import PassReader, continued_batch, padded_batch
from steering_vectors.train.reading import EncodedText

X = torch.tensor([[5, 9, 17, 33, 12, 44, 21]])
ONE = X[:, :1]
GEN: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def passes_of(model: Any, call: Callable[[], Any], **how: Any) -> list[list[list[int]]]:
    "Which tokens of each pass of `call` are steered."
    from steering_vectors import find_layers
    from steering_vectors.model.hooks import read_output

    block, seen = model.get_submodule(find_layers(model)["decoder_block"][1]), []
    for say in ({"multiplier": 0.0}, how):
        acts: list[Tensor] = []
        with (
            torch.no_grad(),
            vector().apply(model, **say),
            read_output(block, lambda h, acts=acts: acts.append(h.clone())),
        ):
            call()
        seen.append(acts)
    return [((a - b).abs().amax(-1) > 1e-6).int().tolist() for a, b in zip(*seen, strict=True)]


# --- caches under any name, of any kind ------------------------------------------------------------------------------


def renamed(model: Any, name: str, back: str) -> Any:
    "A decoder that takes its cache as `name` and returns it as `back`, as a later transformers might."
    kind = type(model.model)

    class Renamed(kind):  # type: ignore[misc, valid-type]
        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None, **kwargs: Any
        ) -> Any:
            cache = kwargs.get(name) if kwargs.get(name) is not None else DynamicCache(config=self.config)
            inner = next(k for k in CACHE_NAMES if k in named_arguments_of(kind))
            out = super().forward(input_ids, attention_mask=attention_mask, use_cache=True, **{inner: cache})
            return {"last_hidden_state": out.last_hidden_state, back: cache}

    other = Renamed(model.config).eval()
    other.load_state_dict(model.model.state_dict())
    return other


def named_arguments_of(kind: type) -> list[str]:
    return caches._parameter_names(kind)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "memory_of_the_text", "kv"])
@pytest.mark.parametrize("say", [{"min_token_index": 4}, {"tokens": Tokens.response}], ids=str)
def test_a_cache_under_any_name(model: Any, name: str, say: dict[str, Any]) -> None:
    other = renamed(model, name, name)

    def loop() -> None:
        out = other(X, use_cache=True)
        for _ in range(2):
            out = other(ONE, use_cache=True, **{name: out[name]})

    first = [0, 0, 0, 0, 1, 1, 1] if "tokens" not in say else [0] * 6 + [1]
    assert passes_of(other, loop, **say) == [[first], [[1]], [[1]]]


class Wrapper:
    "Somebody's cache that hands everything on to another."

    def __init__(self, inside: Any):
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inside"], name)


class Sub(DynamicCache):
    "A subclass, as users write them."


@pytest.mark.parametrize("make", [lambda m: DynamicCache(config=m.config), lambda m: Sub(config=m.config),
                                  lambda m: StaticCache(config=m.config, max_cache_len=20),
                                  lambda m: Wrapper(DynamicCache(config=m.config))])  # fmt: skip
@pytest.mark.parametrize("by_place", [True, False])
def test_kinds_of_caches(model: Any, make: Callable[[Any], Any], by_place: bool) -> None:
    names = named_arguments_of(type(model.model))
    name = next(k for k in CACHE_NAMES if k in names)

    def loop() -> None:
        cache = make(model)
        for ids in (X, ONE, ONE):
            if by_place:
                model.model(ids, *[None] * (names.index(name) - 1), cache)
            else:
                model.model(ids, **{name: cache})

    assert passes_of(model, loop, min_token_index=8) == [[[0] * 7], [[0]], [[1]]]
    assert passes_of(model, loop, tokens=Tokens.generated[1:]) == [[[0] * 7], [[0]], [[1]]]


@pytest.mark.parametrize("kind", ["static", "hybrid", "dynamic"])
def test_caches_that_generate_makes(model: Any, kind: str) -> None:
    found = passes_of(model, lambda: model.generate(X, cache_implementation=kind, **GEN), tokens=Tokens.response)
    assert found == [[[0] * 6 + [1]], [[1]], [[1]]]


def pairs(cache: Any) -> tuple[Any, ...]:
    return tuple((layer.keys.clone(), layer.values.clone()) for layer in cache.layers)


def test_tuples_of_pairs_are_counted(model: Any) -> None:
    "Code of one's own that keeps keys and values in tuples, new ones with each pass, under a name of its own."
    kind = type(model.model)

    class Tuples(kind):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Any = None, past: Any = None, **kwargs: Any) -> Any:
            cache = DynamicCache()
            for n, (keys, values) in enumerate(past or ()):
                cache.update(keys, values, n)
            name = next(k for k in CACHE_NAMES if k in named_arguments_of(kind))
            out = super().forward(input_ids, use_cache=True, **{name: cache})
            return out.last_hidden_state, pairs(cache)

    other = Tuples(model.config).eval()

    def loop() -> None:
        past = None
        for ids in (X, ONE, ONE):
            _, past = other(ids, past=past)

    assert passes_of(other, loop, min_token_index=8) == [[[0] * 7], [[0]], [[1]]]
    with torch.no_grad():
        _, old = other(X)
        with vector().apply(other, min_token_index=3), pytest.raises(ValueError, match="before the steering context"):
            other(ONE, past=old)
    with torch.no_grad(), vector().apply(other, min_token_index=3) as handle:
        loop()
        gc.collect()
        assert len(handle.tracker.memory.strong) == 0 and len(handle.tracker.memory.weak) == 0, "none is kept alive"


def test_what_is_a_cache() -> None:
    k = torch.zeros(1, 2, 4, 8)
    assert is_cache(DynamicCache()) and is_cache(((k, k), (k, k))) and is_cache([k], "state") and is_cache([k], "mems")
    for value in (None, k, [k, k], (k, k), [], 3, True, "text", {"full_attention": (k, k)}, [[1, 2]]):
        assert not is_cache(value, "position_embeddings")
    assert find_cache({"encoder_cache": DynamicCache(), "hidden_states": [k]}) is None
    assert find_cache({"a": DynamicCache(), "b": DynamicCache()}) is None, "which of the two is not known"
    hinted = DynamicCache()
    assert find_cache({"a": DynamicCache(), "past_key_values": hinted}) == ("past_key_values", hinted)
    assert cache_length([]) is None and caches.is_blank([]) and not caches.is_blank(object())


# --- the guard -------------------------------------------------------------------------------------------------------


class Memo:
    "A cache that shows nothing of being one."

    def __init__(self, kept: Any = None):
        self.kept = kept


HIDDEN: dict[str, Callable[[Any], Any]] = {
    "an object": lambda cache: Memo({"c": cache}),
    "a list": lambda cache: [t for pair in pairs(cache) for t in pair],
    "a dictionary": lambda cache: {n: pair for n, pair in enumerate(pairs(cache))},
}


def strange(model: Any, hide: Callable[[Any], Any], inside: bool = False) -> Any:
    "A decoder whose cache nobody knows: given and returned as `memo`, or kept inside."
    kind = type(model.model)
    name = next(k for k in CACHE_NAMES if k in named_arguments_of(kind))

    class Strange(kind):  # type: ignore[misc, valid-type]
        now: Any = None

        def forward(
            self, input_ids: Any = None, memo: Any = None, position_ids: Any = None, use_cache: Any = None
        ) -> Any:
            if memo is None and (not inside or position_ids is None):
                self.now = DynamicCache()
            out = super().forward(input_ids, use_cache=True, **{name: self.now})
            return {"last_hidden_state": out.last_hidden_state} | ({} if inside else {"memo": hide(self.now)})

    return Strange(model.config).eval()


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("how", [{}, {"use_cache": True}], ids=str)
@pytest.mark.parametrize("say", [{"min_token_index": 4}, {"token_indices": [8]}, {"tokens": Tokens.response}], ids=str)
def test_an_unknown_cache_is_refused(model: Any, hidden: str, how: dict[str, Any], say: dict[str, Any]) -> None:
    other = strange(model, HIDDEN[hidden])
    with torch.no_grad(), vector().apply(other, **say):
        memo = other(X, **how)["memo"]
        with pytest.raises(ValueError, match="no cache was recognised") as error:
            other(ONE, memo=memo, **how)
    assert transformers.__version__ in str(error.value) and "memo" in str(error.value)
    with torch.no_grad(), vector().apply(other):  # every token: nothing has to be known
        other(ONE, memo=other(X)["memo"])


def test_a_cache_that_was_returned_and_not_given_back(model: Any) -> None:
    "Kept inside, with a word about it in what was returned."
    other = strange(model, HIDDEN["an object"])
    with torch.no_grad(), vector().apply(other, min_token_index=4):
        other(X)
        with pytest.raises(ValueError, match="the last pass returned memo"):
            other(ONE)


def test_a_cache_kept_inside_shows_in_positions_and_masks(model: Any) -> None:
    other = strange(model, HIDDEN["an object"], inside=True)
    with torch.no_grad(), vector().apply(other, min_token_index=4):
        other(X)
        with pytest.raises(ValueError, match="a single token at position 7"):
            other(ONE, position_ids=torch.tensor([[7]]))
    with (
        torch.no_grad(),
        vector().apply(model, min_token_index=4),
        pytest.raises(ValueError, match="its mask has 8 columns"),
    ):
        model.model(ONE, attention_mask=torch.ones(1, 8, dtype=torch.long))


def test_what_continues_nothing_is_not_refused(model: Any) -> None:
    "Fresh prompts of one token, generation without a cache, models that ignore use_cache, arguments that hold nothing yet."
    late = {"min_token_index": 3}
    fresh = [[[0, 0, 0, 1, 1, 1, 1]], [[0]]]
    assert passes_of(model, lambda: (model(X), model(ONE)), **late) == fresh
    assert passes_of(model, lambda: (model(X, use_cache=True), model(ONE, use_cache=True)), **late) == fresh
    assert passes_of(model, lambda: (model(X, use_cache=False), model(ONE, use_cache=False)), **late) == fresh
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 100,
    }
    bert = BertModel(BertConfig(**sizes)).eval()
    assert passes_of(bert, lambda: (bert(X, use_cache=True), bert(ONE, use_cache=True)), **late) == fresh
    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_embd=32, n_layer=3, n_head=2, vocab_size=100)).eval()
    assert passes_of(gpt, lambda: (gpt(X), gpt(ONE)), **late) == fresh
    grown = passes_of(gpt, lambda: gpt.generate(ONE, **GEN), min_token_index=1)
    assert grown == [[[0]], [[0, 1]], [[0, 1, 1]]]
    twice = lambda **how: (model.generate(X, **GEN, **how), model.generate(ONE, **GEN, **how))  # noqa: E731
    assert passes_of(model, twice, **late) == [[[0, 0, 0, 1, 1, 1, 1]], [[1]], [[1]], [[0]], [[0]], [[0]]]
    assert passes_of(model, lambda: twice(use_cache=False), **late)[3:] == [[[0]], [[0, 0]], [[0, 0, 0]]]
    other = strange(model, HIDDEN["an object"])
    assert steered(other, lambda: other(X, use_cache=True), **late) == [[0, 0, 0, 1, 1, 1, 1]]


def test_arguments_without_names_are_not_lost() -> None:
    class Loose(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None: ...

    cache = DynamicCache()
    entries = named_arguments(Loose(), (X, cache), {})
    assert find_cache(entries) == ("argument 2", cache)


# --- continuing while reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "past_key_values", "kv"])
def test_reading_continues_under_the_name_that_the_model_has(model: Any, name: str) -> None:
    kind, own = type(model.model), next(k for k in CACHE_NAMES if k in named_arguments_of(type(model.model)))

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        CACHE: Any = None,
    ) -> Any:  # noqa: E501
        out = kind.forward(
            self,
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{own: CACHE},
        )  # noqa: E501
        return {"last_hidden_state": out.last_hidden_state, name: returned(out)[own]}

    scope: dict[str, Any] = {"body": forward, "Any": Any}
    exec(
        f"def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, {name}=None):\n"
        f"    return body(self, input_ids, attention_mask, position_ids, use_cache, {name})",
        scope,
    )
    other = type("Renamed", (kind,), {"forward": scope["forward"]})(model.config).eval()
    texts = {0: EncodedText([5, 9, 17, 33, 12], [4]), 1: EncodedText([5, 9, 17, 8], [3])}
    now = continued_batch(other, texts, 3)
    assert now.inputs[name].get_seq_length() == 3
    assert now.inputs["attention_mask"].shape == (2, 5), "the columns before are in the mask"
    blocks = {n: block for n, block in enumerate(other.layers)}
    with undisturbed(other), PassReader(other, blocks) as reader:
        plain = reader.run(padded_batch(texts))
        continued = reader.run(continued_batch(other, texts, 3))
    assert all(torch.allclose(plain[n], continued[n], atol=1e-5) for n in blocks)
