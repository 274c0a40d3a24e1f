"""Regions by marker obey the law: steered with a cache equals steered without one, token by token.

The markers are forced into the answer, so that regions begin and end while the model writes. What a region means is written
here by hand, once more, in a loop over the ids of each row; every step's logits are compared with a loop without a cache.
"""

import copy
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model
from steering_vectors.steer.gates import Gate
from steering_vectors.steer.layouts import PromptLayout
from steering_vectors.steer.pictures import token_cells
from steering_vectors.steer.records import read_tokens
from steering_vectors.steer.tokens import Tokens

PAD, OPEN, CLOSE, FIRST, SECOND = 0, 91, 92, 93, 94  # the opening marker is one token, `FIRST, SECOND` a marker of two
COLUMNS, NEW = 6, 7
EXACT, SEEN = 2e-6, 1e-3
FORCED = {1: OPEN, 3: CLOSE, 4: FIRST, 5: SECOND}  # what the answer holds at these steps


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_layers=2).double()


def vector_of(model: Any) -> SteeringVector:
    g = torch.Generator().manual_seed(3)
    return SteeringVector({n: torch.randn(model.config.hidden_size, generator=g, dtype=torch.float64) for n in (0, 1)})


def prompts() -> dict[str, Tensor]:
    "Two rows, the first padded on the left; the thinking is open at the end of the second."
    ids = torch.tensor([[PAD, PAD, FIRST, SECOND, 20, 21], [OPEN, 30, CLOSE, FIRST, OPEN, 31]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def between(ids: list[int], opening: int = OPEN, closing: int = CLOSE) -> list[bool]:
    "Inside, by a machine of two states."
    inside, found = False, []
    for i in ids:
        inside = inside and i != closing
        found.append(inside)
        inside = inside or i == opening
    return found


def pairs(ids: list[int]) -> list[bool]:
    return [ids[max(k - 1, 0) : k + 1] == [FIRST, SECOND] for k in range(len(ids))]


def after(ends: list[bool]) -> list[bool]:
    return [any(ends[:k]) for k in range(len(ends))]


def first_of_each(inside: list[bool], most: int) -> list[bool]:
    count, found = 0, []
    for i in inside:
        count = count + 1 if i else 0
        found.append(0 < count <= most)
    return found


def between_many(ids: list[int], opening: list[int], closing: list[int]) -> list[bool]:
    "Inside, where a marker is several tokens: it opens and closes at its last one."
    inside, found = False, []
    for k in range(len(ids)):
        inside = inside and ids[max(0, k + 1 - len(closing)) : k + 1] != closing
        found.append(inside)
        inside = inside or ids[max(0, k + 1 - len(opening)) : k + 1] == opening
    return found


PAIR, END = [FIRST, SECOND], [CLOSE, FIRST]  # the second ends with what the first begins with
Want = Callable[[list[int], int], list[bool]]  # ids of a row, tokens of its prompt -> which are meant
CASES: dict[str, tuple[Tokens, Want]] = {
    "between": (Tokens.between(OPEN, CLOSE), lambda ids, n: between(ids)),
    "after one": (Tokens.after(OPEN), lambda ids, n: after([i == OPEN for i in ids])),
    "after two": (Tokens.after([FIRST, SECOND]), lambda ids, n: after(pairs(ids))),
    "at one": (Tokens.at(CLOSE), lambda ids, n: [i == CLOSE for i in ids]),
    "at two": (Tokens.at([FIRST, SECOND]), lambda ids, n: pairs(ids)),
    "first of each": (Tokens.between(OPEN, CLOSE)[:1], lambda ids, n: first_of_each(between(ids), 1)),
    "in the answer": (
        Tokens.between(OPEN, CLOSE) & Tokens.generated,
        lambda ids, n: [b and k >= n for k, b in enumerate(between(ids))],
    ),
    "not inside": (~Tokens.between(OPEN, CLOSE), lambda ids, n: [not b for b in between(ids)]),
    "either": (
        Tokens.at(OPEN) | Tokens.after([FIRST, SECOND])[1:],
        lambda ids, n: [
            i == OPEN or (k > 0 and a)
            for k, (i, a) in enumerate(zip(ids, [False, *after(after(pairs(ids)))[1:]], strict=True))
        ],
    ),
}
CASES |= {
    "between two of two": (Tokens.between(PAIR, END), lambda ids, n: between_many(ids, PAIR, END)),
    "one and two": (Tokens.between(OPEN, END), lambda ids, n: between_many(ids, [OPEN], END)),
    "header and region": (
        Tokens.at(PAIR) | Tokens.between(PAIR, END),
        lambda ids, n: [p or b for p, b in zip(pairs(ids), between_many(ids, PAIR, END), strict=True)],
    ),
}
every = pytest.mark.parametrize("name", CASES)


class Forced:
    "Makes the answer hold the markers."

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step = self.step
        self.step += 1
        if step in FORCED:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, FORCED[step]] = 0
        return scores

    def __init__(self) -> None:
        self.step = 0


def generate(model: Any, given: dict[str, Tensor], **how: Any) -> Any:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | how
    return model.generate(
        **given, **options, logits_processor=[Forced()], return_dict_in_generate=True, output_logits=True
    )


def moved(
    model: Any, row: Tensor, columns: int, pads: int, steps: Tensor, want: Want, kept: int = 0, new: int = NEW
) -> float:
    "Assert that the steps are those of the plain loop without a cache; returns how far steering has moved them."
    vectors = {f"model.layers.{n}": v for n, v in vector_of(model).layer_activations.items()}
    meant = want(row[pads:].tolist(), columns - pads)
    expected = plain.logits_of_steps(model, row, columns, pads, vectors, lambda c, own: c >= kept and meant[own])
    unsteered = plain.logits_of_steps(model, row, columns, pads, {}, lambda c, own: False)
    assert plain.far(steps, expected) < EXACT
    return float(plain.far(expected, unsteered))


def check(model: Any, name: str, with_prompt: bool = True, copies: int = 1, **how: Any) -> Any:
    selection, want = CASES[name]
    given = prompts()
    with vector_of(model).apply(model, tokens=selection, prompt=given if with_prompt else None):
        out = generate(model, given, **how)
    far = []
    for r, row in enumerate(out.sequences):
        pads = int((given["attention_mask"][r // copies] == 0).sum())
        far.append(moved(model, row, COLUMNS, pads, torch.stack([s[r] for s in out.logits]), want))
    assert max(far) > SEEN, "steering changed nothing"
    return out


@every
def test_greedy(model: Any, name: str) -> None:
    out = check(model, name)
    assert out.sequences[0, COLUMNS + 1] == OPEN and out.sequences[0, COLUMNS + 3] == CLOSE


@every
def test_without_prompt(model: Any, name: str) -> None:
    check(model, name, with_prompt=False)


@every
def test_no_cache(model: Any, name: str) -> None:
    check(model, name, use_cache=False)


@every
def test_static_cache(model: Any, name: str) -> None:
    check(model, name, cache_implementation="static")


@every
def test_chunked(model: Any, name: str) -> None:
    check(model, name, prefill_chunk_size=4)


@every
def test_sampled_rows(model: Any, name: str) -> None:
    torch.manual_seed(0)
    out = check(model, name, copies=3, do_sample=True, num_return_sequences=3, temperature=3.0)
    assert len(out.sequences.unique(dim=0)) > 2


@every
def test_two_turns(model: Any, name: str) -> None:
    "The context stays open, the cache is kept, and the second turn knows the markers of the first."
    selection, want = CASES[name]
    given = prompts()
    with vector_of(model).apply(model, tokens=selection):
        first = generate(model, given)
        ids = torch.cat([first.sequences, torch.tensor([[40, 41], [42, OPEN]])], 1)
        mask = torch.cat([given["attention_mask"], torch.ones(2, NEW + 2, dtype=torch.long)], 1)
        if selection.needs_prompt:  # where the prompt of a second turn ends has to be given, in a context of its own
            with pytest.raises(ValueError, match="prompt="):
                generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
            return
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
    far = []
    for r, row in enumerate(second.sequences):
        steps = torch.stack([s[r] for s in second.logits])
        far.append(moved(model, row, ids.shape[1], int((mask[r] == 0).sum()), steps, want))
    assert max(far) > SEEN


@every
def test_a_cache_begun_outside(model: Any, name: str) -> None:
    "Its ids are not known without `prompt=`: an error. With it, what is read now is steered as the markers in it tell."
    selection, want = CASES[name]
    given = prompts()
    first = generate(model, given)
    ids = torch.cat([first.sequences, torch.tensor([[40, 41], [42, OPEN]])], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(2, NEW + 2, dtype=torch.long)], 1)
    prompt = {"input_ids": ids, "attention_mask": mask}
    kept = first.past_key_values.get_seq_length()
    again = copy.deepcopy(first.past_key_values)
    with vector_of(model).apply(model, tokens=selection), pytest.raises(ValueError, match="prompt="):
        generate(model, prompt, past_key_values=again)
    with vector_of(model).apply(model, tokens=selection, prompt=prompt):
        out = generate(model, prompt, past_key_values=first.past_key_values)
    far = []
    for r, row in enumerate(out.sequences):
        steps = torch.stack([s[r] for s in out.logits])
        far.append(moved(model, row, ids.shape[1], int((mask[r] == 0).sum()), steps, want, kept))
    assert max(far) > SEEN


@every
@pytest.mark.parametrize("told", [True, False], ids=["prompt=", "first pass"])
def test_beams_are_refused_with_a_cache_and_exact_without(model: Any, name: str, told: bool) -> None:
    selection, want = CASES[name]
    given = prompts()
    prompt = given if told else None
    before = plain.hooks_on(model)
    with vector_of(model).apply(model, tokens=selection, prompt=prompt), pytest.raises(ValueError, match="num_beams=1"):
        generate(model, given, num_beams=2)
    assert plain.hooks_on(model) == before
    if selection.needs_prompt and not told:  # a pass without a cache looks like a longer prompt
        with vector_of(model).apply(model, tokens=selection), pytest.raises(ValueError, match="prompt="):
            generate(model, given, num_beams=2, use_cache=False)
        return
    with vector_of(model).apply(model, tokens=selection, prompt=prompt):
        out = generate(model, given, num_beams=2, use_cache=False)
    far = []
    for r, row in enumerate(out.sequences):
        steps = torch.stack([out.logits[t][out.beam_indices[r, t]] for t in range(NEW)])
        far.append(moved(model, row, COLUMNS, int((given["attention_mask"][r] == 0).sum()), steps, want))
    assert max(far) > SEEN


WAYS: dict[str, dict[str, Any]] = {
    "a cache": {}, "no cache": {"use_cache": False}, "a static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4}, "sampled": {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0},
}  # fmt: skip


@every
@pytest.mark.parametrize("way", WAYS)
def test_with_a_gate(model: Any, name: str, way: str) -> None:
    "Of the region only the response of the open row is steered; which row is open is found by hand."
    selection, want = CASES[name]
    given, copies = prompts(), WAYS[way].get("num_return_sequences", 1)
    rows = [ids[mask.bool()] for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    means = torch.stack([plain.activation(model, row, "model.layers.0", slice(None)).mean(0) for row in rows])
    gate = Gate(means[0] - means[1], 0, float((means @ (means[0] - means[1])).mean()))
    far = []
    for condition, opened in ((gate, 0), (~gate, 1)):
        torch.manual_seed(0)
        handle = vector_of(model).apply(model, tokens=selection, when=condition, prompt=given)
        with handle:
            out = generate(model, given, **WAYS[way])
        assert handle.decisions.open.tolist() == [r // copies == opened for r in range(2 * copies)]
        for r, row in enumerate(out.sequences):
            pads = int((given["attention_mask"][r // copies] == 0).sum())

            def gated(ids: list[int], n: int, on: bool = r // copies == opened) -> list[bool]:
                return [on and inside and k >= n - 1 for k, inside in enumerate(want(ids, n))]

            far.append(moved(model, row, COLUMNS, pads, torch.stack([s[r] for s in out.logits]), gated))
            assert far[-1] == 0 or r // copies == opened
    assert max(far) > SEEN, "steering changed nothing"


@every
@pytest.mark.parametrize("way", WAYS)
def test_with_a_gate_that_decides_at_each_token(model: Any, name: str, way: str) -> None:
    selection, want = CASES[name]
    given, copies = prompts(), WAYS[way].get("num_return_sequences", 1)
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    far = []
    for sign in (1, -1):  # a token is open in exactly one of the two
        torch.manual_seed(0)
        gate = Gate(sign * direction, 0, every_token=True)
        with vector_of(model).apply(model, tokens=selection, when=gate, prompt=given):
            out = generate(model, given, **WAYS[way])
        for r, row in enumerate(out.sequences):
            pads = int((given["attention_mask"][r // copies] == 0).sum())
            opened = (
                plain.activation(model, row[pads:], "model.layers.0", slice(None)) @ (sign * direction) > 0
            ).tolist()

            def gated(ids: list[int], n: int, opened: list[bool] = opened) -> list[bool]:
                return [inside and on for inside, on in zip(want(ids, n), opened, strict=True)]

            far.append(moved(model, row, COLUMNS, pads, torch.stack([s[r] for s in out.logits]), gated))
    assert max(far) > SEEN, "steering changed nothing"


def test_accepted_drafts(model: Any) -> None:
    "The cache is cut where a draft was wrong, and the markers with it."
    ids = torch.tensor([[OPEN, 8, 9, CLOSE, 8, 9, OPEN, 8, 9]])
    draft = tiny_model("llama", num_layers=2).double()
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with vector_of(model).apply(model, tokens=Tokens.between(OPEN, CLOSE)):
        out = model.generate(
            **given, assistant_model=draft, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD,
            eos_token_id=10**6, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    steps = torch.cat(out.logits)
    assert moved(model, out.sequences[0], ids.shape[1], 0, steps, lambda row, n: between(row)) > SEEN


def test_embeddings_are_refused(model: Any) -> None:
    embeds = model.get_input_embeddings()(prompts()["input_ids"]).detach()
    with vector_of(model).apply(model, tokens=Tokens.after(OPEN)), pytest.raises(ValueError, match="embeddings"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mistral", "qwen2"])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_other_families(kind: str, how: dict[str, Any]) -> None:
    "Against the same model without a cache, logit by logit."
    other = tiny_model(kind, num_layers=2).double()
    given, sequences, logits = prompts(), [], []
    for options in [how, {"use_cache": False}]:
        with vector_of(other).apply(other, tokens=Tokens.between(OPEN, CLOSE)):
            out = generate(other, given, **options)
        sequences.append(out.sequences)
        logits.append(torch.stack(out.logits))
    unsteered = torch.stack(generate(other, given).logits)
    assert torch.equal(*sequences)
    assert plain.far(*logits) < EXACT
    assert plain.far(logits[0], unsteered) > SEEN


@every
def test_json_and_picture(name: str) -> None:
    selection, want = CASES[name]
    assert read_tokens(repr(selection)) == selection
    given = prompts()
    cells = token_cells(selection, PromptLayout.of(given))
    for r, row in enumerate(given["input_ids"].tolist()):
        pads = row.count(PAD)
        meant = want(row[pads:], len(row) - pads)
        assert [cell.steered for cell in cells[r]][pads:COLUMNS] == meant
