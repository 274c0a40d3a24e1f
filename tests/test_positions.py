"""Where a pass stands: what is told from inside, what is refused, what is remembered and for how long, and what it costs."""

import gc
import itertools
import warnings
from typing import Any

import families
import plain
import pytest
import torch
from test_law import NEW, Case, S, chunks_fail, compare, generate, one, prompts, vector_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from versions import skip_if

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model
from steering_vectors.steer import positions
from steering_vectors.steer.tokens import Tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_layers=2).double()


FIRST = Case("the first token", {"tokens": Tokens.prompt[0]}, lambda c, own, n, r: own == 0, True)
LATE = Case("column 3 on", {"min_token_index": 3}, lambda c, own, n, r: c >= 3)
ANSWER = Case("response", {"tokens": Tokens.response}, lambda c, own, n, r: own >= n - 1, True)


def steps(out: Any, r: int) -> Tensor:
    return torch.stack([s[r] for s in out.logits])


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FIRST, LATE, ANSWER], ids=lambda c: c.name)
def test_a_cache_that_is_used_again(model: Any, case: Case) -> None:
    "A static cache is emptied and filled with other prompts, padded elsewhere: the old padding is not believed."
    cache = StaticCache(model.config, max_cache_len=32)
    turned = {name: t.flip(0) for name, t in prompts().items()}
    unpadded = {"input_ids": prompts()["input_ids"] + 3, "attention_mask": torch.ones(2, S, dtype=torch.long)}
    outs = []
    with vector_of(model).apply(model, **case.say):
        for given in (prompts(), turned, unpadded, prompts()):
            cache.reset()
            outs.append((given, generate(model, given, past_key_values=cache)))
    for given, out in outs:
        for r in range(2):
            compare(model, given, r, out.sequences[r], steps(out, r), case)


def test_padding_of_what_the_cache_held_before_is_forgotten(model: Any) -> None:
    "The next text in the same cache says nothing of padding: it has none."
    cache, given = StaticCache(model.config, max_cache_len=32), prompts()
    with torch.no_grad(), vector_of(model).apply(model, **FIRST.say):
        model.model(**given, past_key_values=cache)
        cache.reset()
        other = torch.arange(10, 10 + 2 * S).view(2, S)
        with pytest.warns(UserWarning, match="without a mask"):
            states = model.model(other, past_key_values=cache).last_hidden_state
    logits = model.lm_head(states)
    whole = {"input_ids": other, "attention_mask": torch.ones(2, S, dtype=torch.long)}
    for r in range(2):
        compare(model, whole, r, torch.cat([other[r], torch.tensor([0])]), logits[r, S - 1 :], FIRST)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
@pytest.mark.parametrize("case", [FIRST, LATE, ANSWER], ids=lambda c: c.name)
def test_drafts_beyond_a_sliding_window(kind: str, case: Case) -> None:
    "Whole and rejected drafts, in a cache that keeps only a window and is rolled back."
    config = tiny_model(kind, num_layers=2).config
    config.sliding_window = 4
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    given = one()
    for lookup in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_model(kind, num_layers=1)}):
        with vector_of(model).apply(model, **case.say, prompt=given):
            out = generate(model, given, **lookup, max_new_tokens=8)
        compare(model, given, 0, out.sequences[0], torch.cat(out.logits), case)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "rwkv"])
@pytest.mark.parametrize("case", [LATE, ANSWER], ids=lambda c: c.name)
def test_a_state_without_a_length_is_counted(name: str, case: Case) -> None:
    model = families.build(name).double()
    from steering_vectors import find_layers

    layer = find_layers(model)["decoder_block"][0].replace(".0", ".{}")
    for given in (one(), {"input_ids": one()["input_ids"] + 2, "attention_mask": one()["attention_mask"]}):
        with vector_of(model).apply(model, **case.say):
            out = generate(model, given)
        assert compare(model, given, 0, out.sequences[0], torch.cat(out.logits), case, layer=layer) > 1e-3


def test_a_state_that_is_older_than_the_context_is_refused() -> None:
    model = families.build("rwkv").double()
    with torch.no_grad():
        out = model(one()["input_ids"], use_cache=True)
        with vector_of(model).apply(model):  # every token: nothing has to be known
            model(torch.tensor([[5]]), state=out.state)
        with (
            vector_of(model).apply(model, min_token_index=3),
            pytest.raises(ValueError, match="before the steering context"),
        ):
            model(torch.tensor([[5]]), state=out.state)


def test_caches_are_given_up(model: Any) -> None:
    "What is remembered of a cache goes with it, and all of it with the handle."
    handle = vector_of(model).apply(model, min_token_index=2).attach()
    for _ in range(3):
        generate(model, one())
    gc.collect()
    assert len(handle.tracker.memory.weak) == 0 and len(handle.tracker.memory.strong) == 0
    kept = DynamicCache()
    with torch.no_grad():
        model(one()["input_ids"], past_key_values=kept)
    assert len(handle.tracker.memory.weak) == 1, "a cache that lives is known"
    handle.remove()
    assert len(handle.tracker.memory.weak) == 0


# --- what cannot be told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"guidance_scale": 1.5}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_without_a_cache_the_prompts_end_does_not_show(model: Any, how: dict[str, Any]) -> None:
    "Also where another pass comes in between, as with guidance."
    with vector_of(model).apply(model, tokens=Tokens.response), pytest.raises(ValueError, match="prompt="):
        generate(model, one(), use_cache=False, **how)


def test_prompts_with_the_same_beginning_one_after_the_other(model: Any) -> None:
    "Looks like generating without a cache, and is refused alike; with `prompt=` each is right."
    ids = one()["input_ids"]
    with torch.no_grad(), vector_of(model).apply(model, tokens=Tokens.response):
        model(ids[:, :4], use_cache=False)
        with pytest.raises(ValueError, match="repeats an earlier one"):
            model(ids, use_cache=False)


def test_padding_that_is_not_told_is_refused() -> None:
    "A mask of another shape and no position ids: nobody knows which columns are padding."
    model = families.build("bart").double()
    given = prompts()
    for say, known in [({"min_token_index": 3}, True), ({"tokens": Tokens.prompt[0]}, False)]:
        vector = SteeringVector({0: torch.ones(32, dtype=torch.float64)})
        if known:
            with vector.apply(model, **say):
                generate(model, given, cache_implementation="static")
        else:
            with vector.apply(model, **say), pytest.raises(ValueError, match="padding cannot be told"):
                generate(model, given, cache_implementation="static")
            with (
                vector.apply(model, **say, prompt=given["input_ids"]),
                pytest.raises(ValueError, match="padding cannot be told"),
            ):
                generate(model, given, cache_implementation="static")
            with vector.apply(model, **say, prompt=given):
                static = generate(model, given, cache_implementation="static")
            with vector.apply(model, **say):
                dynamic = generate(model, given)
            assert all(plain.far(a, b) < 1e-5 for a, b in zip(static.logits, dynamic.logits, strict=True))


# --- prompt= ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FIRST, ANSWER], ids=lambda c: c.name)
def test_a_prompt_without_its_mask_takes_the_padding_from_the_model(model: Any, case: Case) -> None:
    given, no_chunks = prompts(), chunks_fail(model)
    for how in [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}]:
        if no_chunks and "prefill_chunk_size" in how:
            continue
        with vector_of(model).apply(model, **case.say, prompt=given["input_ids"]):
            out = generate(model, given, **how)
        for r in range(2):
            compare(model, given, r, out.sequences[r], steps(out, r), case)
    skip_if(no_chunks)  # the other ways held


WRONG = {
    "other ids": lambda g: {**g, "input_ids": g["input_ids"] + 1},
    "one other id in the second chunk": lambda g: {**g, "input_ids": g["input_ids"] + torch.tensor([0] * 5 + [1])},
    "no padding": lambda g: {**g, "attention_mask": torch.ones_like(g["attention_mask"])},
    "padding on the other side": lambda g: {
        "input_ids": g["input_ids"].roll(-2, 1),
        "attention_mask": g["attention_mask"].roll(-2, 1),
    },
    "more padding": lambda g: {k: torch.cat([torch.zeros(2, 2, dtype=torch.long), t], 1) for k, t in g.items()},
    "a row less": lambda g: {k: t[:1].repeat(3, 1) for k, t in g.items()},
}


@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str
)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_prompt_that_is_not_the_one_is_refused(model: Any, wrong: str, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prompt= (is not what|has 3 rows)"):
        with vector_of(model).apply(model, tokens=Tokens.response, prompt=WRONG[wrong](prompts())):
            generate(model, prompts(), **how)
    assert plain.hooks_on(model) == 0


def test_a_part_of_the_text_may_be_called_the_prompt(model: Any) -> None:
    "Scoring a whole dialogue in one pass: `prompt=` says where the answer begins, each row in its place."
    given = prompts()
    whole = torch.cat([given["input_ids"], torch.full((2, 3), 9)], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), vector_of(model).apply(model, tokens=Tokens.response, prompt=given):
        logits = model(whole, attention_mask=mask, position_ids=places).logits
    for r in range(2):
        sequence = torch.cat([whole[r], torch.tensor([0])])
        compare(model, given, r, sequence, logits[r, S - 1 :], ANSWER)


# --- cost ------------------------------------------------------------------------------------------------------------


def test_masks_are_built_once_a_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    real = positions.select
    monkeypatch.setattr(positions, "select", lambda *args: (next(calls), real(*args))[1])
    deep = tiny_model("llama", num_layers=6)
    vector = SteeringVector({0: torch.ones(32)}).at(range(6))
    with vector.apply(deep, token_indices=[1, 7]):
        generate(deep, one())
    assert next(calls) == NEW, "six layers share the mask of a pass"
    with vector.apply(deep) as handle:
        generate(deep, one())
    assert handle.tracker is None and next(calls) == NEW + 1, "nothing is asked where every token is steered"


class Waits(TorchDispatchMode):
    "Counts operations that would make the CPU wait for the device."

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "equal",
            "masked_select",
            "unique_dim",
            "_unique2",
            "item",
        ):
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


SELECTIONS: list[dict[str, Any]] = [
    {},
    {"min_token_index": 3},
    {"token_indices": [1, 8]},
    {"tokens": Tokens.response},
    {"tokens": Tokens.all[1::2]},
    {"tokens": Tokens.generated[1:] - [5]},
    {"multiplier": [0, 1]},
]


@pytest.mark.parametrize("say", SELECTIONS, ids=str)
def test_a_token_costs_no_synchronisation(model: Any, say: dict[str, Any]) -> None:
    "After the prompt, steering adds no operation that waits for a device. (A mask of the user's stays on the CPU and is looked at there.)"
    given = prompts()
    mask = torch.cat([given["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)

    def waits() -> dict[str, int]:
        cache = DynamicCache()
        with torch.no_grad():
            model(**given, past_key_values=cache)
            model(torch.ones(2, 1, dtype=torch.long), attention_mask=mask[:, : S + 1], past_key_values=cache)
            with Waits() as counted:
                for n in range(2, 5):
                    model(torch.ones(2, 1, dtype=torch.long), attention_mask=mask[:, : S + n], past_key_values=cache)
        return counted.seen

    unsteered = waits()
    with vector_of(model).apply(model, **say):
        steered = waits()
    assert steered == unsteered


def test_a_wait_would_be_counted(model: Any) -> None:
    "An operator that looks at its numbers is seen by the count."
    with (
        Waits() as counted,
        torch.no_grad(),
        vector_of(model).apply(model, operator=lambda h, v: v if h.sum() > 0 else -v),
    ):
        model(one()["input_ids"])
    assert sum(counted.seen.values()) >= 2


# --- rows without a mask ---------------------------------------------------------------------------------------------

RIGHT = torch.tensor([[5, 9, 17, 33, 12], [6, 7, 0, 0, 0]])
COUNTED = [Tokens.response, Tokens.prompt[-1], Tokens.prompt[0], Tokens.all[1:3], Tokens.generated[1:]]


def looked_at(model: Any, ids: Tensor, say: Any, prompt: Any = None, **how: Any) -> list[list[int]]:
    from test_unusual_passes import steered

    return steered(
        model, lambda: model(ids, **how), **(say if isinstance(say, dict) else {"tokens": say}), prompt=prompt
    )


@pytest.fixture(scope="module")
def three() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("tokens", COUNTED, ids=str)
@pytest.mark.parametrize(
    "ids", [RIGHT, RIGHT.flip(1), torch.tensor([[5, 9, 17], [6, 7, 0]]), torch.tensor([[5, 9, 17, 8], [6, 7, 7, 7]])]
)
@pytest.mark.parametrize("said", [False, True])
def test_rows_that_look_padded_are_refused(three: Any, tokens: Any, ids: Tensor, said: bool) -> None:
    "An evaluation harness pads on the right and passes the bare ids; ids in prompt= do not tell more."
    with pytest.raises(ValueError, match="look padded.*attention_mask="):
        looked_at(three, ids, tokens, prompt=ids if said else None)


def test_rows_that_do_not_look_padded_are_warned_about_once(three: Any) -> None:
    ids = torch.tensor([[5, 9, 17], [6, 7, 8]])
    with torch.no_grad(), vector_of(three).apply(three, tokens=Tokens.response):
        with pytest.warns(UserWarning, match="2 rows came in without a mask.*attention_mask="):
            three(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            three(ids + 20)


@pytest.mark.parametrize("tokens", COUNTED, ids=str)
def test_rows_of_which_the_padding_is_known(three: Any, tokens: Any) -> None:
    "By a mask, by the tokenizer's output, by generate, or because there is nothing to know: no warning, no error."
    mask = (RIGHT != 0).long()
    one, same = RIGHT[:1], RIGHT[:1].repeat(3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = looked_at(three, RIGHT, tokens, attention_mask=mask)
        assert looked_at(three, RIGHT, tokens, prompt={"input_ids": RIGHT, "attention_mask": mask}) == told
        assert looked_at(three, RIGHT, tokens, prompt=[[5, 9, 17, 33, 12], [6, 7]]) == told, "the lengths tell"
        assert looked_at(three, same, tokens) == looked_at(three, one, tokens) * 3
        ones = torch.ones_like(RIGHT)
        assert looked_at(three, RIGHT, tokens, attention_mask=ones)[1] == looked_at(three, RIGHT[1:], tokens)[0]
        with vector_of(three).apply(three, tokens=tokens):
            generate(three, {"input_ids": torch.tensor([[5, 9, 17], [6, 7, 8]])})
    for free in (Tokens.all, {"min_token_index": 2}, {"token_indices": [1]}, {"token_indices": slice(1, 3)}):
        assert len(looked_at(three, RIGHT, free)) == 2


def test_lengths_that_fit_on_both_sides_are_refused(three: Any) -> None:
    ids = torch.tensor([[5, 9, 17], [6, 7, 8]])
    with pytest.raises(ValueError, match="on which side they are padded"):
        looked_at(three, ids, Tokens.response, prompt=[[5, 9, 17], [6, 7]])
    left = looked_at(three, RIGHT.flip(1), Tokens.prompt[0], prompt=[[12, 33, 17, 9, 5], [7, 6]])
    assert left == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]


# --- position ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 10, 1000])
def test_one_sequence_begins_anywhere(three: Any, first: int) -> None:
    ids = torch.tensor([[5, 9, 17, 33, 12, 44, 21]])
    places = torch.arange(first, first + 7)[None]
    for say, want in [
        ({"min_token_index": 3}, [0, 0, 0, 1, 1, 1, 1]),
        (Tokens.prompt[:2], [1, 1, 0, 0, 0, 0, 0]),
        (Tokens.response, [0] * 6 + [1]),
    ]:
        assert looked_at(three, ids, say, position_ids=places) == [want]
        assert looked_at(three, ids, say, position_ids=places, use_cache=False) == [want]


@pytest.mark.parametrize("places", [[0, 2, 4, 6, 8], [0, 0, 5, 9, 3], [7, 3, 9, 8, 11], [0, 5, 6, 7, 8]], ids=str)
def test_positions_of_the_users_own(three: Any, places: list[int]) -> None:
    "Columns need none of them; a single row may be counted, for nothing shows padding in it."
    ids, given = torch.tensor([[5, 9, 17, 33, 12]]), torch.tensor([places])
    assert looked_at(three, ids, {"min_token_index": 3}, position_ids=given) == [[0, 0, 0, 1, 1]]
    assert looked_at(three, ids, Tokens.response, position_ids=given) == [[0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    "places, want",
    [
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1]), ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1]), ([0, 1, 2, 0, 0], [1, 1, 1, 0, 0]), ([0, 1, 2, 1, 1], [1, 1, 1, 0, 0]),
        ([0, 1, 2, 2, 2], [1, 1, 1, 0, 0]), ([1, 1, 1, 1, 0], [0, 0, 0, 0, 1]), ([6, 6, 6, 7, 8], [0, 0, 1, 1, 1]), ([3, 4, 5, 6, 7], [1] * 5),
    ],
)  # fmt: skip
def test_padding_shows_in_positions(three: Any, places: list[int], want: list[int]) -> None:
    ids = torch.tensor([[5, 9, 17, 33, 12], [6, 7, 8, 9, 10]])
    given = torch.tensor([places, [0, 1, 2, 3, 4]])
    assert looked_at(three, ids, Tokens.all, position_ids=given) == [want, [1] * 5]


# --- embeddings ------------------------------------------------------------------------------------------------------

X = torch.tensor([[5, 9, 17, 33, 12, 44, 21]])


def embedded(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("front, back", [(0, 0), (3, 0), (0, 2), (4, 3)])
def test_the_prompt_is_found_among_embeddings(three: Any, front: int, back: int) -> None:
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(1, front, 32, generator=g),
        embedded(three, X),
        embedded(three, torch.arange(60, 60 + back)[None]),
    ]
    from test_unusual_passes import steered

    got = steered(
        three, lambda: three(inputs_embeds=torch.cat(parts, 1)), tokens=Tokens.prompt[0] | Tokens.response, prompt=X
    )
    assert got == [[0] * front + [1, 0, 0, 0, 0, 0, 1] + [1] * back]


@pytest.mark.parametrize("columns", [5, 6, 8, 9, 14])
def test_embeddings_without_the_prompt_are_refused(three: Any, columns: int) -> None:
    from test_unusual_passes import steered

    other = torch.randn(1, columns, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"given {columns} embeddings per row, and no ids; prompt= has 7 columns"):
        steered(three, lambda: three(inputs_embeds=other), tokens=Tokens.response, prompt=X)
    assert steered(three, lambda: three(inputs_embeds=other), min_token_index=columns - 1) == [
        [0] * (columns - 1) + [1]
    ]


def test_as_many_embeddings_as_the_prompt_has_tokens_are_believed(three: Any) -> None:
    from test_unusual_passes import steered

    soft = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    assert steered(three, lambda: three(inputs_embeds=soft), tokens=Tokens.response, prompt=X) == [[0] * 6 + [1]]
    grown = torch.cat([soft, torch.randn(1, 2, 32)], 1)

    def loop() -> None:  # without a cache the embeddings come again, with more behind them
        three(inputs_embeds=soft, use_cache=False)
        three(inputs_embeds=grown, use_cache=False)

    from test_calls import passes_of

    assert passes_of(three, loop, tokens=Tokens.response, prompt=X)[1] == [[0] * 6 + [1] * 3]
    with pytest.raises(ValueError, match="repeats an earlier one"):
        passes_of(three, loop, tokens=Tokens.response)


# --- what the user did is what the error is about --------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_scoring_the_end_of_a_text(three: Any, cached: bool) -> None:
    with pytest.raises(ValueError, match=r"logits of its last 3 tokens \(logits_to_keep=3\).*prompt=") as error:
        looked_at(three, X, Tokens.response, logits_to_keep=3, use_cache=cached)
    assert "draft" not in str(error.value)
    assert looked_at(three, X, Tokens.response, logits_to_keep=3, prompt=X[:, :5]) == [[0, 0, 0, 0, 1, 1, 1]]
    assert looked_at(three, X, {"min_token_index": 5}, logits_to_keep=3) == [[0] * 5 + [1, 1]]


def git() -> Any:
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(0)
    eyes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return GitForCausalLM(GitConfig(vision_config=eyes, **sizes, **ends)).eval()


@pytest.mark.parametrize(
    "say",
    [{"min_token_index": 10}, {"token_indices": [1]}, {"tokens": Tokens.response}, {"tokens": Tokens.prompt[0]}],
    ids=str,
)
def test_a_model_that_puts_an_image_among_the_tokens(say: dict[str, Any]) -> None:
    model, image = git(), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match="was given 7 per row, and its blocks compute 12 columns, because it puts 5 of its own"
    ):
        looked_at(model, X, say, pixel_values=image)
    assert looked_at(model, X, {"multiplier": [2.0]}, pixel_values=image) == [[1] * 12]
    assert looked_at(model, X, {}, pixel_values=image) == [[1] * 12]
    assert sum(looked_at(model, X, say)[0]) == (0 if "min_token_index" in say else 1)
