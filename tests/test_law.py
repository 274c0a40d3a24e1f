"""The law: steered with a cache equals steered without one, token by token.

Every way of generating is run steered, and the logits of each of its steps are compared with a loop that uses no cache, no
padding and hooks of its own (`plain.logits_of_steps`). What a selection should mean is written here by hand, once more.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plain
import pytest
import torch
from padded import S, padded_prompts, random_vector
from torch import Tensor
from versions import fault, skip_if

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model
from steering_vectors.steer.tokens import Tokens

NEW = 4  # tokens generated
PADS = (2, 0)  # columns of padding of each row
EXACT = 2e-6  # `generate` hands logits over in float32; inside, everything is float64
SEEN = 1e-3  # steering must have changed the logits by more than this


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_layers=2).double()


def vector_of(model: Any, seed: int = 3) -> SteeringVector:
    return random_vector(model, (0, 1), seed)


def prompts() -> dict[str, Tensor]:
    return padded_prompts(PADS)


def one() -> dict[str, Tensor]:
    return {name: t[1:] for name, t in prompts().items()}


@dataclass
class Case:
    "A way to name tokens, and which they are: column, number in the row, the row's prompt tokens, row."

    name: str
    say: dict[str, Any]
    want: Callable[[int, int, int, int], bool]
    needs_prompt: bool = False


MASK = [1, 0, 1, 0, 1, 1, 0, 1]  # the prompt and two generated columns
MASKS = [[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0, 0, 1]]
COLUMNS = [
    Case("everything", {}, lambda c, own, n, r: True),
    Case("min_token_index in the prompt", {"min_token_index": 3}, lambda c, own, n, r: c >= 3),
    Case("min_token_index at its end", {"min_token_index": S}, lambda c, own, n, r: c >= S),
    Case("min_token_index after it", {"min_token_index": S + 2}, lambda c, own, n, r: c >= S + 2),
    Case("list", {"token_indices": [1, 4, S, S + 2]}, lambda c, own, n, r: c in (1, 4, S, S + 2)),
    Case("slice", {"token_indices": slice(1, S + 2, 2)}, lambda c, own, n, r: 1 <= c < S + 2 and c % 2 == 1),
    Case("mask (s,)", {"token_indices": torch.tensor(MASK)}, lambda c, own, n, r: c < S + 2 and MASK[c] == 1),
]
BY_ROW = [
    Case("mask (b, s)", {"token_indices": torch.tensor(MASKS)}, lambda c, own, n, r: c < S + 2 and MASKS[r][c] == 1)
]
NAMED = [
    Case("negative columns", {"token_indices": [-1, -3]}, lambda c, own, n, r: c in (S - 1, S - 3), True),
    Case("Tokens.all", {"tokens": Tokens.all}, lambda c, own, n, r: True),
    Case("Tokens.all[1::3]", {"tokens": Tokens.all[1::3]}, lambda c, own, n, r: own % 3 == 1),
    Case("Tokens.prompt", {"tokens": Tokens.prompt}, lambda c, own, n, r: own < n, True),
    Case("Tokens.generated", {"tokens": Tokens.generated}, lambda c, own, n, r: own >= n, True),
    Case("Tokens.response", {"tokens": Tokens.response}, lambda c, own, n, r: own >= n - 1, True),
    Case("Tokens.response[1:3]", {"tokens": Tokens.response[1:3]}, lambda c, own, n, r: n <= own < n + 2, True),
    Case(
        "Tokens.prompt[-2:] | Tokens.generated[1:2]",
        {"tokens": Tokens.prompt[-2:] | Tokens.generated[1:2]},
        lambda c, own, n, r: n - 2 <= own < n or own == n + 1,
        True,
    ),
    Case("Tokens.prompt[0]", {"tokens": Tokens.prompt[0]}, lambda c, own, n, r: own == 0, True),
]
EVERY = COLUMNS + BY_ROW + NAMED
SOME = [COLUMNS[0], COLUMNS[1], COLUMNS[2], COLUMNS[4], COLUMNS[6], BY_ROW[0], NAMED[0], NAMED[2], NAMED[5], NAMED[7]]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def compare(
    model: Any,
    given: dict[str, Tensor],  # prompt and mask
    row: int,  # which of its rows
    sequence: Tensor,  # prompt and answer
    steps: Tensor,  # (steps, vocabulary) logits that decided the answer
    case: Case,
    multiplier: float = 1.0,
    layer: str = "model.layers.{}",
    change: plain.Change = plain.add,
) -> float:
    "Assert that the steps are those of the plain loop; returns how far steering has moved them."
    pads, columns = int((given["attention_mask"][row] == 0).sum()), given["attention_mask"].shape[1]
    vectors = {layer.format(n): multiplier * v for n, v in vector_of(model).layer_activations.items()}

    def want(c: int, own: int) -> bool:
        return case.want(c, own, columns - pads, row)

    expected = plain.logits_of_steps(model, sequence, columns, pads, vectors, want, change)
    unsteered = plain.logits_of_steps(model, sequence, columns, pads, {}, want)
    assert plain.far(steps, expected) < (EXACT if expected.dtype == torch.float64 else 10 * EXACT)
    return plain.far(expected, unsteered)


def generate(model: Any, given: dict[str, Tensor], **how: Any) -> Any:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | how
    if "assistant_model" in how or "prompt_lookup_num_tokens" in how:  # older transformers allow no least length there
        del options["min_new_tokens"]
        options["eos_token_id"] = 10**6  # no token
    return model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)


def check(model: Any, case: Case, given: dict[str, Tensor], copies: int = 1, prompt: Any = None, **how: Any) -> Any:
    "Generate steered, and compare every row and step with the plain loop. `copies`: rows returned for each prompt."
    prompt = prompt if prompt is not None else given if case.needs_prompt else None
    with vector_of(model).apply(model, **case.say, prompt=prompt):
        out = generate(model, given, **how)
    moved = [
        compare(model, given, r // copies, out.sequences[r], torch.stack([s[r] for s in out.logits]), case)
        for r in range(len(out.sequences))
    ]
    assert max(moved) > SEEN, "steering changed nothing"
    return out


@named(EVERY)
def test_greedy_with_left_padding(model: Any, case: Case) -> None:
    out = check(model, case, prompts())
    logits = torch.stack(out.logits, 1)
    logits[..., 2] = -torch.inf  # the end of the text, which was not allowed
    assert torch.equal(logits.argmax(-1), out.sequences[:, S:])


@named(NAMED)
def test_the_first_pass_says_where_the_prompt_ends(model: Any, case: Case) -> None:
    "The same without `prompt=`: a prompt that is read at once shows its end."
    given = prompts()
    with vector_of(model).apply(model, **case.say):
        out = generate(model, given)
    for r in range(2):
        compare(model, given, r, out.sequences[r], torch.stack([s[r] for s in out.logits]), case)


@named(EVERY)
def test_sampling_with_returned_sequences(model: Any, case: Case) -> None:
    torch.manual_seed(0)
    out = check(model, case, prompts(), copies=3, do_sample=True, num_return_sequences=3, temperature=3.0)
    assert len(out.sequences.unique(dim=0)) > 2


@named(EVERY)
def test_static_cache(model: Any, case: Case) -> None:
    check(model, case, prompts(), cache_implementation="static")


UNSTEERED = Case("unsteered", {}, lambda c, own, n, r: False)


def chunks_fail(model: Any, layer: str = "model.layers.{}") -> str | None:
    "Why a prompt in chunks cannot be tested here."
    given = prompts()

    def unsteered() -> None:
        out = generate(model, given, prefill_chunk_size=4)
        for r in range(2):
            steps = torch.stack([s[r] for s in out.logits])
            compare(model, given, r, out.sequences[r], steps, UNSTEERED, layer=layer)

    return fault(unsteered, "a prompt read in chunks gives other logits than at once")


@named(EVERY)
def test_chunked_prefill(model: Any, case: Case) -> None:
    skip_if(chunks_fail(model))
    check(model, case, prompts(), prefill_chunk_size=4)


@named(EVERY)
def test_no_cache_at_all(model: Any, case: Case) -> None:
    check(model, case, prompts(), use_cache=False)


@named(EVERY)
def test_beams(model: Any, case: Case) -> None:
    "The logits of a returned beam's step lie in the row where that beam was at the time."
    given, beams = prompts(), 3
    with vector_of(model).apply(model, **case.say, prompt=given if case.needs_prompt else None):
        out = generate(model, given, num_beams=beams, num_return_sequences=2)
    moved = []
    for r, sequence in enumerate(out.sequences):
        steps = torch.stack([out.logits[t][out.beam_indices[r, t]] for t in range(NEW)])
        moved.append(compare(model, given, r // 2, sequence, steps, case))
    assert max(moved) > SEEN


@named(COLUMNS + NAMED)
def test_assisted_by_a_draft_model(model: Any, case: Case) -> None:
    draft = tiny_model("llama", num_layers=1, seed=5).double()
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    check(model, case, one(), assistant_model=draft)


@named(COLUMNS + NAMED)
def test_drafts_that_are_accepted(model: Any, case: Case) -> None:
    "The model drafts for itself, so that whole drafts are accepted and passes begin at uneven columns."
    draft = tiny_model("llama", num_layers=2).double()
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    check(model, case, one(), assistant_model=draft)


@named(COLUMNS + NAMED)
def test_prompt_lookup(model: Any, case: Case) -> None:
    ids = torch.tensor([[7, 8, 9, 7, 8, 9]])  # something to look up
    check(model, case, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, prompt_lookup_num_tokens=2)


@named([case for case in NAMED if case.needs_prompt])
def test_a_draft_in_the_first_pass_is_not_taken_for_the_prompt(model: Any, case: Case) -> None:
    "Without `prompt=` the first pass of an assisted generation looks like a longer prompt. It must be refused, not believed."
    ids = torch.tensor([[7, 8, 9, 7, 8, 9]])
    before = plain.hooks_on(model)
    with pytest.raises(ValueError, match="prompt="), vector_of(model).apply(model, **case.say):
        generate(
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            prompt_lookup_num_tokens=3,
            max_new_tokens=2,
            min_new_tokens=2,
        )
    assert plain.hooks_on(model) == before


@named(EVERY)
def test_several_generations_in_one_context(model: Any, case: Case) -> None:
    second = {
        name: t.flip(0) for name, t in prompts().items()
    }  # another prompt, of the same shape, padded in the other row
    with vector_of(model).apply(model, **case.say):
        outs = [(given, generate(model, given)) for given in (prompts(), second, prompts())]
    for given, out in outs:
        for r in range(2):
            compare(model, given, r, out.sequences[r], torch.stack([s[r] for s in out.logits]), case)
    assert all(torch.equal(a, b) for a, b in zip(outs[0][1].logits, outs[2][1].logits, strict=True))


@named(EVERY)
@pytest.mark.parametrize("whole", [True, False], ids=["all ids again", "only the new ids"])
def test_a_second_turn_from_a_kept_cache(model: Any, case: Case, whole: bool) -> None:
    "A chat goes on: the cache of the first answer is kept, new words are added, and the answer to them is steered."
    first = generate(model, prompts())
    said = torch.randint(3, 90, (2, 3), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, said], 1)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(2, ids.shape[1] - S, dtype=torch.long)], 1)
    cached = first.past_key_values.get_seq_length()
    given = {"input_ids": ids if whole else ids[:, cached:], "attention_mask": mask}
    columns = ids.shape[1]

    prompt = {"input_ids": ids, "attention_mask": mask}
    if not whole:
        copied = copy.deepcopy(first.past_key_values)
        skip_if(fault(lambda: generate(model, given, past_key_values=copied), "a cache is continued only with all ids"))
    with vector_of(model).apply(model, **case.say, prompt=prompt if case.needs_prompt else None):
        out = generate(model, given, past_key_values=first.past_key_values)
    steps = torch.stack(out.logits, 1)
    # What the cache holds was computed unsteered, and stays so; what is read now is steered. Without a cache that is: steer from `cached` on.
    for r in range(2):
        sequence = torch.cat([ids[r], out.sequences[r, -NEW:]])

        def want(c: int, own: int, n: int, row: int, r: int = r) -> bool:
            return c >= cached and case.want(
                c if not case.say.get("token_indices") == [-1, -3] else c - columns + S, own, n, row
            )

        kept = Case(case.name, case.say, want)
        compare(model, prompt, r, sequence, steps[r], kept)


@named(COLUMNS + NAMED)
def test_both_turns_steered(model: Any, case: Case) -> None:
    "The same, with the context open from the beginning: then it is as if there had been no cache."
    if case.needs_prompt:
        with vector_of(model).apply(model, **case.say), pytest.raises(ValueError, match="prompt="):
            first = generate(model, one())
            ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
            generate(
                model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=first.past_key_values
            )
        return
    with vector_of(model).apply(model, **case.say):
        first = generate(model, one())
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = generate(model, given, past_key_values=first.past_key_values)
    compare(model, given, 0, out.sequences[0], torch.cat(out.logits), case)


@named(EVERY)
def test_the_base_model_called_directly(model: Any, case: Case) -> None:
    "A loop of one's own over the model without its head, with a cache; also with the prompt read in two passes."
    given = prompts()
    sequence = torch.cat(
        [given["input_ids"], torch.randint(3, 90, (2, 3), generator=torch.Generator().manual_seed(4))], 1
    )
    mask = torch.cat([given["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    states, cache = [], None
    with torch.no_grad(), vector_of(model).apply(model, **case.say, prompt=given if case.needs_prompt else None):
        for start, end in [(0, 4), (4, S), (S, S + 1), (S + 1, S + 3)]:
            inputs = {
                "input_ids": sequence[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
            }
            out = model.model(**inputs, past_key_values=cache, use_cache=True)
            states.append(out.last_hidden_state)
            cache = out.past_key_values
    logits = model.lm_head(torch.cat(states, 1))
    for r in range(2):
        last = torch.cat([sequence[r], torch.tensor([0])])  # the loop wants a token for each step it checks
        compare(model, given, r, last, logits[r, S - 1 :], case)


@named(EVERY)
def test_embeddings_instead_of_ids(model: Any, case: Case) -> None:
    given = prompts()
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    with vector_of(model).apply(model, **case.say, prompt=given if case.needs_prompt else None):
        out = generate(model, {"inputs_embeds": embeds, "attention_mask": given["attention_mask"]})
    for r in range(2):
        sequence = torch.cat([given["input_ids"][r], out.sequences[r]])
        compare(model, given, r, sequence, torch.stack([s[r] for s in out.logits]), case)


@named([case for case in SOME if case not in BY_ROW])  # a streamer takes one row
def test_generation_in_a_streamers_thread(model: Any, case: Case) -> None:
    given, kept = one(), []
    with vector_of(model).apply(model, **case.say, prompt=given if case.needs_prompt else None):
        thread = threading.Thread(target=lambda: kept.append(generate(model, given)))
        thread.start()
        thread.join()
    assert compare(model, given, 0, kept[0].sequences[0], torch.cat(kept[0].logits), case) > SEEN


@named(COLUMNS)
def test_guidance_by_columns(model: Any, case: Case) -> None:
    "The second, unconditional pass reads a sequence of its own, from the last prompt token on: its columns are counted in it."
    given = one()
    with vector_of(model).apply(model, **case.say):
        out = model.generate(
            **given, guidance_scale=1.5, do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True, output_scores=True,
        )  # fmt: skip
    sequence = out.sequences[0]
    compare(model, given, 0, sequence, torch.cat(out.logits), case)
    vectors = {f"model.layers.{n}": v for n, v in vector_of(model).layer_activations.items()}

    def want(c: int, own: int) -> bool:
        return case.want(c, own, 1, 0)

    free = plain.logits_of_steps(model, sequence[S - 1 :], 1, 0, vectors, want).log_softmax(-1)
    bound = torch.cat(out.logits).double().log_softmax(-1)
    assert plain.far(torch.cat(out.scores), free + 1.5 * (bound - free)) < 1e-5


@named([case for case in NAMED if case.needs_prompt])
def test_guidance_with_a_prompt_is_refused(model: Any, case: Case) -> None:
    given = one()
    with pytest.raises(ValueError, match="guidance_scale"), vector_of(model).apply(model, **case.say, prompt=given):
        generate(model, given, guidance_scale=1.5)


# Gemma 2's own eager attention turns padding into NaN in float64, steered or not; so it is compared in float32.
WIDE = {"gpt2": torch.float64, "opt": torch.float64, "gemma2": torch.float32}


@pytest.mark.parametrize("kind", WIDE)
@named(SOME)
def test_other_families(kind: str, case: Case) -> None:
    "Learned absolute positions, sliding windows, another way to pass arguments: greedy, static, chunked and beams."
    other = tiny_model(kind, num_layers=2).to(WIDE[kind])
    layer, given = plain.MODULES[kind]["decoder_block"], prompts()
    no_chunks = chunks_fail(other, layer)
    for how in [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"num_beams": 2, "num_return_sequences": 2},
    ]:
        if no_chunks and "prefill_chunk_size" in how:
            continue
        with vector_of(other).apply(other, **case.say, prompt=given if case.needs_prompt else None):
            out = generate(other, given, **how)
        copies = len(out.sequences) // 2
        for r, sequence in enumerate(out.sequences):
            rows = out.beam_indices[r].tolist() if copies > 1 else [r] * NEW
            steps = torch.stack([out.logits[t][rows[t]] for t in range(NEW)])
            assert compare(other, given, r // copies, sequence, steps, case, layer=layer) >= 0
    skip_if(no_chunks)  # the other ways held


def test_a_window_that_the_text_outgrows() -> None:
    "Gemma 2 with a sliding window of four tokens, greedy and with a static cache."
    from transformers import AutoModelForCausalLM

    config = tiny_model("gemma2", num_layers=2).config
    config.sliding_window = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for case in SOME:
        for how in [{}, {"cache_implementation": "static"}]:
            given = prompts()
            with vector_of(model).apply(model, **case.say, prompt=given if case.needs_prompt else None):
                out = generate(model, given, **how)
            for r in range(2):
                compare(model, given, r, out.sequences[r], torch.stack([s[r] for s in out.logits]), case)


def test_the_comparison_can_fail(model: Any) -> None:
    "A selection that is one column off is seen."
    off = Case("off by one", {"min_token_index": 4}, lambda c, own, n, r: c >= 3)
    with pytest.raises(AssertionError):
        check(model, off, prompts())


def test_the_response_includes_the_pass_that_writes_the_first_word(model: Any) -> None:
    given = one()
    unsteered = generate(model, given)
    with vector_of(model).apply(model, multiplier=8, tokens=Tokens.response, prompt=given):
        response = generate(model, given)
    with vector_of(model).apply(model, multiplier=8, tokens=Tokens.generated, prompt=given):
        generated = generate(model, given)
    assert response.sequences[0, S] != unsteered.sequences[0, S]
    assert generated.sequences[0, S] == unsteered.sequences[0, S]
    assert torch.equal(generated.logits[0], unsteered.logits[0])
    assert not torch.allclose(generated.logits[1], unsteered.logits[1])
