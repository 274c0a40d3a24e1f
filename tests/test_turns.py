"""The turns of a conversation: found in templates of several builds, steered under the law, and read in training."""

from typing import Any

import plain
import pytest
import torch

from steering_vectors import SteeringVector
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.steer.gates import Gate
from steering_vectors.steer.places import chosen_tokens
from steering_vectors.steer.tokens import Tokens
from steering_vectors.steer.turns import rendered_turns, turn_markers
from steering_vectors.train.reading import encode_texts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "<s>{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}### assistant: {% endif %}"
SPECIAL = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, ["<|start|>", "<|end|>", "<|eot|>"]),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"]),
    "gemma": (GEMMA, ["<turn>", "</turn>"]),
    "thinks": (THINKS, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "plain": (PLAIN, []),
    "tiny": (None, []),
}
INST = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}{% if loop.index0 != 1 %}[INST] {% endif %}{{ m.content }} [/INST]{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
MERGED = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}<turn>user\n{{ m.content }}\n\n{% else %}{% if loop.index0 != 1 %}<turn>"
    "{{ m.role }}\n{% endif %}{{ m.content }}</turn>\n{% endif %}{% endfor %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
RULE = "Answer in verse.\n\nNever lie, 1 2 3."
HEADED = ["chatml", "llama3", "plain", "tiny", "inst", "default"]
OTHERS = {
    "inst": (INST, ["[INST]", "[/INST]"]),
    "no_system": (NO_SYSTEM, ["<turn>", "</turn>"]),
    "merged": (MERGED, ["<turn>", "</turn>"]),
    "default": (DEFAULT, ["<|im_start|>", "<|im_end|>"]),
}
SAID = ["Who are you?", "A machine.", "And then?", "Then: 1, 2.", "Well", "Yes"]


def tokenizer_of(kind: str) -> Any:
    tokenizer = tiny_tokenizer()
    template, special = (SPECIAL | OTHERS)[kind]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_turns_of_other_conversations(kind: str, role: str) -> None:
    "Every token of the role's contents and none of the other's, in a conversation that was not looked at."
    tokenizer = tokenizer_of(kind)
    shown = rendered_turns(tokenizer, SAID)
    tokens = Tokens.turns(role, tokenizer)
    read = encode_texts(tokenizer, [shown.ids], read=tokens)[0].read
    own = [n for n, turn in enumerate(shown.turns) if turn is not None and turn % 2 == (role == "assistant")]
    other = [n for n, turn in enumerate(shown.turns) if turn is not None and turn % 2 != (role == "assistant")]
    assert set(own) <= set(read) and not set(other) & set(read) and own and other
    if kind not in ("thinks", "gemma"):
        assert read == own


@pytest.mark.parametrize("kind", HEADED)
def test_the_turn_of_the_system(kind: str) -> None:
    "Three roles, no token of which is another's."
    tokenizer = tokenizer_of(kind)
    shown = rendered_turns(tokenizer, SAID, RULE)
    found = {}
    for role in ("system", "user", "assistant"):
        if kind == "inst" and role != "system":  # its first question has no header where there is a system message
            continue
        found[role] = set(encode_texts(tokenizer, [shown.ids], read=Tokens.turns(role, tokenizer))[0].read)
        own = {n for n, turn in enumerate(shown.turns) if turn is not None and shown.roles[turn] == role}
        assert own <= found[role] and own
    for role, tokens in found.items():
        others = {n for n, turn in enumerate(shown.turns) if turn is not None and shown.roles[turn] != role}
        assert not tokens & others
    assert tokenizer.decode([shown.ids[n] for n in sorted(found["system"])]).startswith(
        "Answer in verse.\n\nNever lie, 1 2 3."
    )


def test_a_template_without_a_place_for_the_system_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no system message.*System role not supported"):
        Tokens.turns("system", tokenizer_of("no_system"))
    with pytest.raises(ValueError, match="cannot be told by markers"):  # "\n\n" may stand in the message itself
        Tokens.turns("system", tokenizer_of("merged"))
    with pytest.raises(ValueError, match="user, assistant or system, not of 'tool'"):
        Tokens.turns("tool", tokenizer_of("chatml"))


def marked(begin: str, end: str = "<|im_end|>\n{% endgeneration %}") -> str:
    "A template that marks what the assistant generates."
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + begin + "{{ m.content }}" + end
        + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip


@pytest.mark.parametrize("dash", ["", "-"])
def test_a_turn_begins_where_the_template_marks_it(dash: str) -> None:
    "Each turn begins with an empty thought, which is generated and so in the turn; without the mark it is taken for the header."
    thought, tag = "<think>\n\n</think>\n\n", "{% generation " + dash + "%}"
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    found = {}
    for name, begin, end in [("marked", tag + "{{ '" + thought.replace("\n", "\\n") + "' }}", "<|im_end|>\n{% endgeneration %}"),
                             ("unmarked", thought, "<|im_end|>\n")]:  # fmt: skip
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = marked(begin, end)
        opening, closing = turn_markers(tokenizer)
        found[name] = tokenizer.decode(opening), tokenizer.decode(closing)
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)[
            "input_ids"
        ]
        assert (tuple(asked[-len(opening) :]) == opening) == (name == "marked")
        shown = rendered_turns(tokenizer, SAID)
        read = encode_texts(tokenizer, [shown.ids], read=Tokens.turns("assistant", tokenizer))[0].read
        assert tokenizer.decode([shown.ids[n] for n in read]).startswith(thought if name == "marked" else "A machine.")
    assert found == {
        "marked": ("<|im_start|>assistant\n", "<|im_start|>"),
        "unmarked": (f"<|im_start|>assistant\n{thought}", "<|im_end|>"),
    }


@pytest.mark.parametrize("dash", ["", "-"])
def test_marks_that_hold_only_the_content_end_at_the_same_token(dash: str) -> None:
    kinds = {"marked": marked("{% generation " + dash + "%}", "{% endgeneration %}<|im_end|>\n"), "chatml": CHATML}
    found = []
    for template in kinds.values():
        tokenizer = tokenizer_of("chatml")
        tokenizer.chat_template = template
        found.append([turn_markers(tokenizer, role) for role in ("user", "assistant", "system")])
    assert found[0] == found[1]


MARKED = {  # what is marked before the content, and from there on; special tokens besides those of chatml
    "content": ("{% generation %}", "{% endgeneration %}<|im_end|>\n"),
    "content and its end": ("{% generation %}", "<|im_end|>{% endgeneration %}{{ '\\n' }}"),
    "up to the next header, on its line": ("{% generation %}", "<|im_end|>{% endgeneration %}"),
    "up to the next header": ("{% generation %}", "<|im_end|>\n{% endgeneration %}"),
    "a thought before": ("{% generation %}{{ '<think>\\n\\n</think>\\n\\n' }}", "<|im_end|>{{ '\\n' }}{% endgeneration %}"),
    "a thought and no end": ("{% generation %}{{ '<think>\\n\\n</think>\\n\\n' }}", "{% endgeneration %}<|im_end|>\n"),
    "words behind": ("{% generation %}", " That is all.\n\n{% endgeneration %}-- <|im_end|>\n"),
    "an end of two words": ("{% generation %}", "(over)<|im_end|>{% endgeneration %}{{ '\\n' }}"),
}  # fmt: skip
TALKS: dict[str, tuple[list[str], str | None]] = {
    "two": (["Who are you?", "A machine."], None),
    "six": (SAID, None),
    "with a rule": (SAID, RULE),
    "lines": (["One\n\ntwo", "- a\n- b\n\n", "And\n", "\nThat is all.\n\n(over)\n"], RULE),
    "asked again": ([*SAID, "Really?"], None),
}


def of_template(begin: str, end: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]})
    tokenizer.chat_template = marked(begin, end)
    return tokenizer


@pytest.mark.parametrize("said", TALKS)
@pytest.mark.parametrize("kind", MARKED)
def test_a_turn_is_what_the_template_marks(kind: str, said: str) -> None:
    "Token by token, against the assistant mask that the tokenizer returns."
    tokenizer, (words, rule) = of_template(*MARKED[kind]), TALKS[said]
    talk = [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]
    talk = talk if rule is None else [{"role": "system", "content": rule}, *talk]
    found = tokenizer.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        add_generation_prompt=len(words) % 2 == 1,
    )  # fmt: skip
    tokens = Tokens.turns("assistant", tokenizer)
    chosen = chosen_tokens(tokens, found["input_ids"], len(found["input_ids"]))
    assert chosen.long().tolist() == found["assistant_masks"]
    assert 0 < sum(found["assistant_masks"]) < len(found["input_ids"])
    for role in ("user", "system"):
        own = chosen_tokens(Tokens.turns(role, tokenizer), found["input_ids"], len(found["input_ids"]))
        assert not bool((own & chosen).any()) and bool(own.any()) == (role == "user" or rule is not None)


def test_marks_that_no_markers_tell_are_refused() -> None:
    "The first token behind the mark may stand in a content, or nothing is behind it."
    for end in ("{% endgeneration %}\n-- ", "</s>{% endgeneration %}"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}[a]{% generation %}{{ m.content }}" + end
            + "{% else %}{{ m.content }}[u]{% endif %}{% endfor %}"
        )  # fmt: skip
        with pytest.raises(ValueError, match="cannot be told by markers"):
            Tokens.turns("assistant", tokenizer)


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_nothing_between_two_contents(template: str, role: str) -> None:
    "Where the next header ends a turn, it is the marker; where nothing does, that is told in words."
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = template
    if "INST" not in template:
        with pytest.raises(ValueError, match="cannot be told by markers"):
            Tokens.turns(role, tokenizer)
        return
    shown = rendered_turns(tokenizer, SAID)
    chosen = chosen_tokens(Tokens.turns(role, tokenizer), shown.ids, len(shown.ids)).tolist()
    assert chosen == [turn is not None and shown.roles[turn] == role for turn in shown.turns]


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "mistral"])
def test_the_answer_to_come_is_a_turn(kind: str) -> None:
    "The template's own header for the answer opens the region."
    tokenizer = tokenizer_of(kind)
    opening, _ = turn_markers(tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tuple(ids[-len(opening) :]) == opening


@pytest.mark.parametrize("header", [False, True], ids=["contents", "with headers"])
@pytest.mark.parametrize("kind", ["tiny", "chatml", "mistral"])
def test_history_and_answer_are_steered_alike_with_and_without_a_cache(kind: str, header: bool) -> None:
    tokenizer = tokenizer_of(kind)
    model = model_for_scripts()
    g = torch.Generator().manual_seed(0)
    vector = SteeringVector({0: torch.randn(model.config.hidden_size, generator=g, dtype=torch.float64)})
    tokens = Tokens.turns("assistant", tokenizer, header=header)
    first = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(first, add_special_tokens=False, return_tensors="pt")["input_ids"]
    end = torch.tensor([list(turn_markers(tokenizer)[1])])
    more = tokenizer.apply_chat_template(
        [{"role": "user", "content": "So"}], tokenize=False, add_generation_prompt=True
    )
    more = tokenizer(more, add_special_tokens=False, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 127}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    with vector.apply(model, tokens=tokens):
        one = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        whole = torch.cat([one.sequences, end, more], 1)
        two = model.generate(
            whole, attention_mask=torch.ones_like(whole), past_key_values=one.past_key_values, **options
        )
    fresh = []
    with vector.apply(model, tokens=tokens), torch.no_grad():
        for t in range(5):
            fresh.append(model(two.sequences[:, : whole.shape[1] + t], use_cache=False).logits[:, -1])
    unsteered = [
        model(two.sequences[:, : whole.shape[1] + t], use_cache=False).logits[:, -1].detach() for t in range(5)
    ]
    assert plain.far(torch.stack(two.logits), torch.stack(fresh)) < 2e-6
    assert plain.far(torch.stack(fresh), torch.stack(unsteered)) > 1e-3


def by_hand(ids: list[int], header: list[int], end: int, with_end: bool) -> list[bool]:
    "Which tokens the assistant writes: from its header on, to the end of its turn."
    inside, found = False, []
    for k, number in enumerate(ids):
        ends = number == end
        found.append(inside and (with_end or not ends))
        inside = (inside and not ends) or ids[max(0, k + 1 - len(header)) : k + 1] == header
    return found


class Scripted:
    "Makes the answer hold the end of a turn, a question, and the beginning of another turn."

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.step = ids, 0

    def __call__(self, ids: Any, scores: Any) -> Any:
        step, self.step = self.step, self.step + 1
        if step < len(self.ids) and self.ids[step] >= 0:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.ids[step]] = 0
        return scores


TURN_WAYS: dict[str, dict[str, Any]] = {
    "a cache": {}, "no cache": {"use_cache": False}, "a static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4}, "sampled": {"do_sample": True, "num_return_sequences": 2, "temperature": 3.0},
}  # fmt: skip


def two_conversations(tokenizer: Any) -> Any:
    "Two prompts of different length, padded on the left: three messages, and one."
    talks = [
        [{"role": ("user", "assistant")[n % 2], "content": w} for n, w in enumerate(words)]
        for words in (["Hi", "Yes", "So"], ["A"])
    ]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def model_for_scripts() -> Any:
    "A small model in float64 that has an end of its own, which no script writes."
    model = tiny_model("llama", num_layers=2)
    model.resize_token_embeddings(128)
    return model.double()


@pytest.mark.parametrize("way", TURN_WAYS)
@pytest.mark.parametrize("header", [False, True], ids=["contents", "with headers"])
@pytest.mark.parametrize("role", ["assistant", "user"])
@pytest.mark.parametrize("kind", ["chatml", "marked"])
def test_the_law(kind: str, role: str, header: bool, way: str) -> None:
    "Rows of different length, padded on the left; every step against a loop that finds the turns by hand, without a cache."
    tokenizer, how = tokenizer_of("chatml"), TURN_WAYS[way]
    if kind == "marked":
        tokenizer.chat_template = marked(*MARKED["content and its end"])
    given = two_conversations(tokenizer)
    columns, pads = given["input_ids"].shape[1], (given["attention_mask"] == 0).sum(1).tolist()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = tokenizer("\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    script = [-1, -1, end, *said, -1, -1, -1]
    model = model_for_scripts()
    g = torch.Generator().manual_seed(0)
    vector = SteeringVector(
        {n: torch.randn(model.config.hidden_size, generator=g, dtype=torch.float64) for n in (0, 1)}
    )
    torch.manual_seed(0)
    with vector.apply(model, tokens=Tokens.turns(role, tokenizer, header=header)):
        out = model.generate(
            **given, **how, max_new_tokens=len(script), min_new_tokens=len(script), pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=127, logits_processor=[Scripted(script)], return_dict_in_generate=True, output_logits=True,
            **({} if how.get("do_sample") else {"do_sample": False}),
        )  # fmt: skip
    assert pads == [0, pads[1]] and pads[1] > 0
    vectors = {f"model.layers.{n}": v for n, v in vector.layer_activations.items()}
    opens = tokenizer(f"<|im_start|>{role}\n", add_special_tokens=False)["input_ids"]
    copies = how.get("num_return_sequences", 1)
    for r, row in enumerate(out.sequences):
        pad = pads[r // copies]
        ids = row[pad:].tolist()
        meant = by_hand(ids, opens, end, kind == "marked" and role == "assistant")
        if header:
            meant = [m or ids[max(0, k + 1 - len(opens)) : k + 1] == opens for k, m in enumerate(meant)]
        assert any(meant[columns - pad : -1]) and any(meant[: columns - pad]) >= (role == "user") and not all(meant)
        steps = torch.stack([s[r] for s in out.logits])
        expected = plain.logits_of_steps(model, row, columns, pad, vectors, lambda c, own, m=meant: m[own])
        unsteered = plain.logits_of_steps(model, row, columns, pad, {}, lambda c, own: False)
        assert plain.far(steps, expected) < 2e-6
        assert plain.far(expected, unsteered) > 1e-3


@pytest.mark.parametrize("way", TURN_WAYS)
def test_turns_with_a_gate(way: str) -> None:
    "The answers of the open row are steered, and its history is left, since a gate decides at the end of the prompt."
    tokenizer, how = tokenizer_of("chatml"), TURN_WAYS[way]
    given = two_conversations(tokenizer)
    columns, pads = given["input_ids"].shape[1], (given["attention_mask"] == 0).sum(1).tolist()
    model = model_for_scripts()
    g = torch.Generator().manual_seed(0)
    vector = SteeringVector({1: torch.randn(model.config.hidden_size, generator=g, dtype=torch.float64)})
    means = torch.stack(
        [
            plain.activation(model, given["input_ids"][r, pad:], "model.layers.0", slice(None)).mean(0)
            for r, pad in enumerate(pads)
        ]
    )
    gate = Gate(means[0] - means[1], 0, float((means @ (means[0] - means[1])).mean()))
    tokens, copies = Tokens.turns("assistant", tokenizer, header=True), how.get("num_return_sequences", 1)
    for condition, opened in ((gate, 0), (~gate, 1)):
        torch.manual_seed(0)
        with vector.apply(model, tokens=tokens, when=condition, prompt=given):
            out = model.generate(
                **given, **how, max_new_tokens=4, min_new_tokens=4, pad_token_id=tokenizer.pad_token_id or 0, eos_token_id=127,
                return_dict_in_generate=True, output_logits=True, **({} if how.get("do_sample") else {"do_sample": False}),
            )  # fmt: skip
        for r, row in enumerate(out.sequences):
            on, pad = r // copies == opened, pads[r // copies]
            steps = torch.stack([s[r] for s in out.logits])
            vectors = {"model.layers.1": vector.layer_activations[1]} if on else {}
            expected = plain.logits_of_steps(model, row, columns, pad, vectors, lambda c, own: c >= columns - 1)
            unsteered = plain.logits_of_steps(model, row, columns, pad, {}, lambda c, own: False)
            assert plain.far(steps, expected) < 2e-6
            assert (plain.far(expected, unsteered) > 1e-3) == on


def test_a_cut_marker_is_an_error() -> None:
    "Cut from the left, the text no longer shows that it lies in a turn."
    tokenizer = tiny_tokenizer()
    shown = rendered_turns(tokenizer, SAID)
    with pytest.raises(ValueError, match="cut"):
        encode_texts(
            tokenizer, [shown.ids], read=Tokens.turns("assistant", tokenizer), max_length=34, truncation="left"
        )
