"""Words, messages and ids become token ids: with tokenizers of several makes, templates in Jinja and in code."""

import warnings
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steering_vectors.demo import tiny_tokenizer
from steering_vectors.train.chats import has_template
from steering_vectors.train.prompts import added_tokens, continuation_ids, prompt_ids
from steering_vectors.train.texts import prompt_length, text_ids, texts_ids

USER = {"role": "user", "content": "a"}
OPEN = [USER, {"role": "assistant", "content": "b c"}]
WORDS = ["[UNK]", "<s>", "</s>", "a", "b", "c", "user", "assistant", ":", "[G]", "think", "none", "system"]
PLAIN = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} : {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def words(
    start: tuple[str, ...] = (),
    end: tuple[str, ...] = (),
    template: str | None = None,
    kind: type = PreTrainedTokenizerFast,
) -> Any:
    "A tokenizer of whole words that puts `start` and `end` around every text."
    vocab = {w: i for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(w, vocab[w]) for w in (*start, *end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*start, "$A", *end]), special_tokens=special
    )
    made = kind(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]", chat_template=template
    )
    if "[G]" in start:
        made.add_special_tokens({"additional_special_tokens": ["[G]"]})
    return made


def read(tokenizer: Any, ids: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens([int(i) for i in torch.as_tensor(ids).reshape(-1)]))


# The start token once


@pytest.mark.parametrize(
    "start, end",
    [
        ((), ()),
        (("<s>",), ()),
        (("<s>",), ("</s>",)),
        (("[G]", "<s>"), ()),
        (("[G]", "<s>"), ("</s>",)),
        ((), ("</s>",)),
    ],
)
def test_the_start_stands_once_however_it_is_written(start: tuple[str, ...], end: tuple[str, ...]) -> None:
    tokenizer = words(start, end)
    first, last = added_tokens(tokenizer)
    assert (read(tokenizer, first), read(tokenizer, last)) == (" ".join(start), " ".join(end))
    bare, begun = "a b", " ".join([*start, "a b"])
    wanted = " ".join([*start, "a", "b"])
    for text in (bare, begun):
        assert read(tokenizer, prompt_ids(tokenizer, text, chat=False)) == wanted  # to be continued: no end
        assert read(tokenizer, text_ids(tokenizer, text)) == " ".join([wanted, *end])  # the tokenizer's own ids
        assert texts_ids(tokenizer, [text, text]) == [text_ids(tokenizer, text)] * 2
        asked, written = continuation_ids(tokenizer, text, " c", chat=False)
        assert (read(tokenizer, asked), read(tokenizer, written)) == (wanted, "c")
    assert text_ids(tokenizer, bare) == tokenizer(bare)["input_ids"]


def test_a_written_out_chat_is_not_begun_or_wrapped_again() -> None:
    for tokenizer in (words(("<s>",), (), PLAIN), words(("<s>",), ("</s>",), PLAIN), tiny_tokenizer()):
        chat = [{"role": "user", "content": "a"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        wanted = prompt_ids(tokenizer, chat).tolist()
        assert wanted[0].count(tokenizer.bos_token_id) == 1
        for spelled in (text, text.removeprefix("<s>"), "a"):
            assert prompt_ids(tokenizer, spelled).tolist() == wanted
        assert prompt_ids(tokenizer, text, chat=False).tolist() == wanted
        assert len(prompt_ids(tokenizer, text, chat=True)[0]) > len(wanted[0])  # asked for
        for role in ("system", "assistant"):
            turn = tokenizer.apply_chat_template([{"role": role, "content": "b"}], tokenize=False)
            assert prompt_ids(tokenizer, turn).tolist() == prompt_ids(tokenizer, turn, chat=False).tolist()


def test_an_unknown_word_is_no_beginning_of_a_chat() -> None:
    tokenizer = words(("<s>",), (), PLAIN)
    assert read(tokenizer, prompt_ids(tokenizer, "zzz a")) == "<s> user : [UNK] a </s> assistant :"
    tokenizer.pad_token = "a"  # some people take a word
    assert read(tokenizer, prompt_ids(tokenizer, "a b")) == "<s> user : a b </s> assistant :"


def test_letters_alone_are_a_word_and_no_opening() -> None:
    template = PLAIN.replace(
        "{{ bos_token }}{% for m in messages %} {{ m.role }}", "{% for m in messages %}<s> {{ m.role }}"
    )
    tokenizer = words((), (), template)  # the start token is what a turn begins with, as in SmolLM 2
    assert read(tokenizer, prompt_ids(tokenizer, "user a")).endswith("<s> user : user a </s> assistant :")
    assert read(tokenizer, prompt_ids(tokenizer, "<s> user : a")) == "<s> user : a"
    assert read(tokenizer, prompt_ids(tokenizer, "user : a")) == "user : a"


# A conversation is continued or answered


@pytest.mark.parametrize(
    "chat, add, wanted",
    [
        ([USER], None, "<s> user : a </s> assistant :"),
        ([USER], True, "<s> user : a </s> assistant :"),
        ([USER], False, "<s> user : a"),
        (OPEN, None, "<s> user : a </s> assistant : b c"),
        (OPEN, False, "<s> user : a </s> assistant : b c"),
        (OPEN, True, "<s> user : a </s> assistant : b c </s> assistant :"),
        ([{"role": "system", "content": "c"}], None, "<s> system : c </s> assistant :"),
        (
            [*OPEN, {"role": "tool", "content": "c"}],
            None,
            "<s> user : a </s> assistant : b c </s> tool : c </s> assistant :",
        ),
        ([USER, {"role": "assistant", "content": ""}], None, "<s> user : a </s> assistant :"),
    ],
)
def test_continued_or_answered(chat: Any, add: bool | None, wanted: str) -> None:
    tokenizer = words(("<s>",), ("</s>",), PLAIN)
    wanted = wanted.replace("tool", "[UNK]")
    before = [dict(message) for message in chat]
    assert read(tokenizer, prompt_ids(tokenizer, chat, add_generation_prompt=add)) == wanted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read(tokenizer, text_ids(tokenizer, chat, add)) == wanted  # training and measuring alike
    assert chat == before


def test_training_tells_once_that_a_conversation_is_answered() -> None:
    tokenizer = words(("<s>",), (), PLAIN)
    with pytest.warns(UserWarning, match="add_generation_prompt=False") as seen:
        texts_ids(tokenizer, [[USER], "a", [USER], OPEN])
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts_ids(tokenizer, [OPEN, "a"])
        texts_ids(tokenizer, [[USER]], True)
        texts_ids(tokenizer, [[USER]], False)
        prompt_ids(tokenizer, [USER])  # a prompt is there to be answered


TRIMS = (
    PLAIN.replace("m.content }}", "m.content | trim }}").replace(":", ":\n").replace("assistant :\n", "assistant :\n")
)


def lines(template: str) -> Any:
    "One token a character, so that white space can be seen."
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("said", ["", " ", "b", "b c", "b c \n", " b"])
def test_templates_that_trim_keep_their_header_and_end_on_the_content(said: str) -> None:
    tokenizer = lines(
        "{% for m in messages %}#{{ m.role }}\n\n{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}#assistant\n\n{% endif %}"
    )
    ids = prompt_ids(tokenizer, [USER, {"role": "assistant", "content": said}])
    assert tokenizer.decode(ids[0]) == "#user\n\na</s>#assistant\n\n" + said.strip()


def test_templates_that_do_not_trim_keep_white_space() -> None:
    tokenizer = tiny_tokenizer()
    ids = prompt_ids(tokenizer, [USER, {"role": "assistant", "content": " b \n"}])
    assert tokenizer.decode(ids[0]) == "<s>[user] a</s>[assistant]  b \n"


def test_a_template_that_rewrites_what_was_said_is_an_error_without_placeholders() -> None:
    tokenizer = lines("{% for m in messages %}#{{ m.content | lower }}{% endfor %}")
    with pytest.raises(ValueError, match="does not write the last message as it stands") as error:
        prompt_ids(tokenizer, [{"role": "assistant", "content": "Hello"}])
    assert "Hello" in str(error.value) and "WHERE" not in str(error.value)
    tokenizer = lines("{% for m in messages %}{{ raise_exception('no ' + m.content) }}{% endfor %}")
    with pytest.raises(ValueError, match="refuses the conversation: no Hello$"):
        prompt_ids(tokenizer, [{"role": "assistant", "content": "Hello"}])
    for last in (
        {"content": None},
        {},
        {"content": []},
        {"content": [*parts("b"), {"type": "image"}]},
        {"content": "b", "tool_calls": [{"name": "c"}]},
    ):
        with pytest.raises(ValueError, match="does not end with text, so there is nothing to continue"):
            prompt_ids(tiny_tokenizer(), [USER, {"role": "assistant", **last}])


THINKS = (  # as Qwen 3: thoughts are taken out of what was said and put into their own place
    "{% for m in messages %}#{{ m.role }}\n{% set c = m.content %}{% set t = '' %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ t }}\n</think>\n\n{{ c }}{% else %}{{ c }}{% endif %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}#assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_a_thinking_switch_goes_through() -> None:
    tokenizer = lines(THINKS)
    decode = tokenizer.decode
    for template, end in ((None, "#assistant\n"), ({"enable_thinking": False}, "#assistant\n<think>\n\n</think>\n\n")):
        assert decode(prompt_ids(tokenizer, "a", template=template)[0]) == "#user\na</s>\n" + end
        assert decode(text_ids(tokenizer, [USER], True, template)) == "#user\na</s>\n" + end
        asked, written = continuation_ids(tokenizer, "a", "b", template=template)
        assert decode(asked).endswith(end) and decode(written) == "b"
        record = {"prompt": "a", "response": "b"}
        ids = text_ids(tokenizer, record, template=template)
        assert ids == asked + written and prompt_length(tokenizer, record, ids, template=template) == len(asked)
    said = "<think>\nso</think>\n\nyes"  # written with another line break by the template
    ids = text_ids(tokenizer, [USER, {"role": "assistant", "content": said}])
    assert decode(ids).endswith("#assistant\n<think>\nso\n</think>\n\nyes")


def test_other_arguments_of_the_template_go_through_and_this_librarys_own_do_not() -> None:
    tokenizer = words(("<s>",), (), "{% for t in tools %} {{ t.name }}{% endfor %}" + PLAIN)
    tools = [{"name": "none"}]
    assert read(tokenizer, prompt_ids(tokenizer, "a", template={"tools": tools})).startswith("none <s> user")
    other = {"chat_template": "{% for m in messages %}{{ m.content }} think{% endfor %}"}
    assert read(tokenizer, prompt_ids(tokenizer, "a", template=other)) == "a think"
    assert (
        read(words(("<s>",)), prompt_ids(words(("<s>",)), "a", template=other)) == "a think"
    )  # a base model's tokenizer
    for name in ("add_generation_prompt", "continue_final_message", "tokenize"):
        with pytest.raises(ValueError, match=name):
            prompt_ids(tokenizer, "a", template={name: True})


# Templates of known models, shortened to what matters here

LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' %}"
    "{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im|>system\nYou are helpful.<|/im|>\n{% endif %}{% for m in messages %}"
    "<|im|>{{ m.role + '\n' + m.content }}<|/im|>\n{% endfor %}{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
VICUNA = (
    "A chat between a user and an assistant. {% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ c.text + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
KNOWN = {"llama2": LLAMA2, "llama3": LLAMA3, "gemma": GEMMA, "qwen": QWEN, "deepseek": DEEPSEEK, "vicuna": VICUNA, "llava": LLAVA}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates(name: str) -> None:
    tokenizer = lines(KNOWN[name])
    question = [{"role": "user", "content": "How are you?"}]
    spelled = [{"role": "user", "content": parts("How are you?")}] if name == "llava" else question
    text = tokenizer.apply_chat_template(spelled, tokenize=False, add_generation_prompt=True)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    for prompt in (
        question,
        "How are you?",
        parts("How are you?") and [{"role": "user", "content": parts("How are you?")}],
    ):
        assert prompt_ids(tokenizer, prompt)[0].tolist() == wanted
    begun = wanted if wanted[0] == 1 else [1, *wanted]  # written out, it is begun as any string is
    assert prompt_ids(tokenizer, text)[0].tolist() == begun
    for said in ("Fine", "(", "Fine, thanks\n\nand you?", "So so "):
        chat = [*question, {"role": "assistant", "content": said}]
        ids = text_ids(tokenizer, chat)
        assert ids == prompt_ids(tokenizer, chat)[0].tolist()
        if name != "llava":
            assert ids == tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=False)
        assert tokenizer.decode(ids[prompt_length(tokenizer, chat, ids) :]).rstrip() == said.rstrip()
        again = prompt_ids(tokenizer, chat, add_generation_prompt=True)[0].tolist()
        assert len(again) > len(ids)
    first = text[: text.index("How")].strip()  # what a turn begins with, and no start token before it
    assert (
        prompt_ids(tokenizer, first + "How")[0].tolist() == prompt_ids(tokenizer, first + "How", chat=False)[0].tolist()
    )
    header = prompt_ids(tokenizer, [*question, {"role": "assistant", "content": ""}])[0].tolist()
    assert header == text_ids(tokenizer, [*question, {"role": "assistant", "content": "Fine"}])[:-4]
    assert tokenizer.decode(prompt_ids(tokenizer, question, add_generation_prompt=False)[0]).endswith("How are you?")


def test_thoughts_that_a_template_drops_are_not_dropped_silently() -> None:
    chat = [USER, {"role": "assistant", "content": "<think>so</think>yes"}]
    with pytest.raises(ValueError, match="does not write the last message as it stands: <think>so</think>yes"):
        text_ids(lines(DEEPSEEK), chat)
    assert lines(QWEN).decode(text_ids(lines(QWEN), chat)).endswith("<think>so</think>yes")


DROPS = LLAMA3.replace("{% for m in messages %}", "{% for m in messages if m.role in ['user', 'assistant'] %}")


@pytest.mark.parametrize(
    "template, asked, role",
    [
        (DROPS, [{"role": "system", "content": "Be  short."}, USER], "system"),  # as Phi 3's first template
        (DROPS, [{"role": "developer", "content": [{"type": "text", "text": "Be short."}]}, USER], "developer"),
        (LLAMA3.replace("| trim", "| trim | replace('x', 'y')"), [{"role": "user", "content": "ax"}], "user"),
        (LLAMA3.replace("in messages", "in messages[-2:]"), [{"role": "user", "content": "ax"}, OPEN[1], USER], "user"),
    ],
)
def test_words_of_the_system_and_the_user_are_not_dropped_silently(template: str, asked: Any, role: str) -> None:
    tokenizer = lines(template)
    wanted = f"does not write the {role} message as it stands: {'Be +short' if role != 'user' else 'ax'}.*as a string"
    for ask in (
        lambda: prompt_ids(tokenizer, asked),
        lambda: text_ids(tokenizer, [*asked, OPEN[1]]),
        lambda: text_ids(tokenizer, {"prompt": asked, "response": "b"}),
        lambda: prompt_ids(tokenizer, asked, add_generation_prompt=False),
    ):
        with pytest.raises(ValueError, match=wanted) as error:
            ask()
        assert "WHERE" not in str(error.value)
    assert tokenizer.decode(text_ids(tokenizer, OPEN)).endswith("b c")


@pytest.mark.parametrize("more", ["{{ messages[-1].content }}", "[so: {{ messages[-1]['content'] | trim }}]"])
def test_a_last_message_that_is_written_twice_has_no_one_end(more: str) -> None:
    for template in (LLAMA3 + more, more + LLAMA3):
        tokenizer = lines(template)
        with pytest.raises(ValueError, match="writes the last message more than once.*: b c. Write the text yourself"):
            text_ids(tokenizer, OPEN)
        assert "WHERE" not in tokenizer.decode(prompt_ids(tokenizer, [USER])[0])


# Contents in parts


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


NEEDS_PARTS = (
    "{% for m in messages %}#{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% else %}<{{ p.type }}>{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}#assistant\n{% endif %}"
)
TAKES_BOTH = (
    "{% for m in messages %}#{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}#assistant\n{% endif %}"
)
ADDS = "{% for m in messages %}{{ '#' + m.role + '\n' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}#assistant\n{% endif %}"  # fmt: skip
WRITES = ADDS.replace("{{ '#' + m.role + '\n' + m.content + '</s>' }}", "#{{ m.role }}\n{{ m.content }}</s>")


@pytest.mark.parametrize("template", [NEEDS_PARTS, TAKES_BOTH, ADDS, WRITES])
@pytest.mark.parametrize("said", ["bc", parts("bc"), parts("b", "c"), ""])
def test_contents_are_strings_or_parts_whatever_the_template_takes(template: str, said: Any) -> None:
    tokenizer = lines(template)
    begun = "#user\na</s>#assistant\n"
    for asked in ("a", parts("a")):
        question = {"role": "user", "content": asked}
        assert tokenizer.decode(prompt_ids(tokenizer, [question])[0]) == begun
        chat = [question, {"role": "assistant", "content": said}]
        ids = text_ids(tokenizer, chat)
        assert tokenizer.decode(ids) == begun + ("bc" if said else "")
        assert tokenizer.decode(ids[: prompt_length(tokenizer, chat, ids)]) == begun
        assert ids == prompt_ids(tokenizer, chat)[0].tolist()
    assert tokenizer.decode(prompt_ids(tokenizer, "a")[0]) == begun


def test_an_image_stays_where_it_is() -> None:
    tokenizer = lines(NEEDS_PARTS)
    chat = [{"role": "user", "content": [{"type": "image"}, *parts("a")]}, {"role": "assistant", "content": "b"}]
    ids = text_ids(tokenizer, chat)
    assert tokenizer.decode(ids) == "#user\n<image>a</s>#assistant\nb"


# Formats in code


class InCode(PreTrainedTokenizerFast):
    "No template: the format is code, and gives ids."

    def apply_chat_template(self, conversation: Any, add_generation_prompt: bool = False, **rest: Any) -> Any:
        open_end = self.opens(rest)
        if add_generation_prompt and conversation[-1]["role"] == "assistant":
            raise RuntimeError("use continue_final_message")
        text = "<s>" + "".join(f" {m['role']} : {m['content']} </s>" for m in conversation)
        text = text.removesuffix(" </s>") if open_end else text
        text += " assistant :" if add_generation_prompt else ""
        return self(text, add_special_tokens=False)  # a dictionary, as it is where return_dict is left out

    def opens(self, rest: Any) -> bool:
        return bool(rest.get("continue_final_message"))


class Ignores(InCode):
    def opens(self, rest: Any) -> bool:
        return False


class Refuses(InCode):
    def opens(self, rest: Any) -> bool:
        if "continue_final_message" in rest:
            raise TypeError("unexpected keyword")
        return False


class Lists(InCode):
    def apply_chat_template(self, conversation: Any, add_generation_prompt: bool = False, **rest: Any) -> Any:
        return super().apply_chat_template(conversation, add_generation_prompt, **rest)["input_ids"]


@pytest.mark.parametrize("kind", [InCode, Ignores, Refuses, Lists])
def test_a_chat_format_in_code_is_a_chat_format(kind: type) -> None:
    tokenizer = words(("<s>",), (), None, kind)
    assert tokenizer.chat_template is None and has_template(tokenizer)
    header = "<s> user : a </s> assistant :"
    assert read(tokenizer, prompt_ids(tokenizer, "a")) == header
    assert read(tokenizer, prompt_ids(tokenizer, [USER])) == header
    assert read(tokenizer, prompt_ids(tokenizer, "<s> user : a")) == "<s> user : a"
    assert read(tokenizer, prompt_ids(tokenizer, [USER], add_generation_prompt=False)) == "<s> user : a"
    ids = text_ids(tokenizer, OPEN)
    assert read(tokenizer, ids) == header + " b c" and prompt_length(tokenizer, OPEN, ids) == len(header.split())
    assert read(tokenizer, text_ids(tokenizer, [USER, {"role": "assistant", "content": ""}])) == header
    asked, written = continuation_ids(tokenizer, "a", "b")
    assert (read(tokenizer, asked), read(tokenizer, written)) == (header, "b")
    ids = text_ids(tokenizer, {"prompt": "a", "response": "b c"})
    assert read(tokenizer, ids) == header + " b c"
    inside = [{**OPEN[0], "content": parts("a")}, {**OPEN[1], "content": parts("b", " c")}]
    assert text_ids(tokenizer, inside) == text_ids(tokenizer, OPEN)


class Backend:
    "As `MistralCommonBackend`: a method in place of a property, pieces in place of words, no answer without words."

    def __init__(self) -> None:
        self.own, self.chat_template = words(("<s>",), ()), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __call__(self, *args: Any, **how: Any) -> Any:
        return self.own(*args, **how)

    def added_tokens_decoder(self) -> None:
        raise NotImplementedError

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        mark = " " if skip_special_tokens else "▁"
        return mark.join(self.own.convert_ids_to_tokens([i for i in ids if i > 2 or not skip_special_tokens]))

    def apply_chat_template(self, conversation: Any, continue_final_message: bool = False, **rest: Any) -> Any:
        last = conversation[-1]
        if last["role"] == "assistant" and not (continue_final_message and last["content"]):
            raise RuntimeError("expected the user")
        turns = [f"{m['role']} : {m['content']} :" if m["role"] == "user" else m["content"] for m in conversation]
        return self(" ".join(["<s>", *turns]), add_special_tokens=False)


def test_a_backend_that_lacks_what_others_have() -> None:
    tokenizer: Any = Backend()
    header = "<s> user : a c :"
    chat = [{"role": "user", "content": "a c"}, {"role": "assistant", "content": "b c"}]
    empty = [chat[0], {"role": "assistant", "content": ""}]
    for prompt in ("a c", chat[:1], empty, "<s> user : a c :"):
        assert read(tokenizer, prompt_ids(tokenizer, prompt)) == header
    assert read(tokenizer, text_ids(tokenizer, chat)) == header + " b c"
    assert prompt_length(tokenizer, chat, text_ids(tokenizer, chat)) == len(header.split())
    assert read(tokenizer, prompt_ids(tokenizer, chat[:1], add_generation_prompt=False)) == "<s> user : a c"
    assert text_ids(tokenizer, {"prompt": "a c", "response": "b c"}) == text_ids(tokenizer, chat)
    with pytest.raises(ValueError, match="expected the user"):
        text_ids(tokenizer, chat, add_generation_prompt=True)


@pytest.mark.parametrize("said", ["b", "a", "0", "b c b", "b </s>", "c : b"])
def test_closing_tokens_are_cut_off_by_what_other_words_end_with_too(said: str) -> None:
    tokenizer = words(("<s>",), (), None, Ignores)
    chat = [USER, {"role": "assistant", "content": said}]
    wanted = "<s> user : a </s> assistant : " + said.replace("0", "[UNK]")
    if "0" in said:
        with pytest.raises(ValueError, match="does not write the last message as it stands: 0"):
            text_ids(tokenizer, chat)
    else:
        assert read(tokenizer, text_ids(tokenizer, chat)) == wanted


def test_a_special_token_that_is_read_as_letters_begins_no_chat() -> None:
    tokenizer = tiny_tokenizer()
    texts = [read(tokenizer, prompt_ids(tokenizer, "<s>[user] a")), read(tokenizer, text_ids(tokenizer, "<s>a"))]
    assert texts[0].split()[:2] == ["<s>", "["] and texts[1] == "<s> a"
    tokenizer.split_special_tokens = True
    for ask in (prompt_ids, text_ids, lambda *given: text_ids(given[0], {"prompt": given[1], "response": "b"})):
        with pytest.raises(
            ValueError, match="begins with '<s>', and this tokenizer reads a special token.* as letters"
        ):
            ask(tokenizer, "<s>[user] a")
    assert read(tokenizer, text_ids(tokenizer, "a<s>")) == "<s> a < s >"


@pytest.mark.parametrize("pad", ["[G]", "</s>"])
def test_padding_is_no_text(pad: str) -> None:
    tokenizer = words(("<s>",), ())
    tokenizer.pad_token = pad
    number = tokenizer.convert_tokens_to_ids
    ids, p = [number("<s>"), number("a")], number(pad)
    for padded in ([p, p, *ids], [*ids, p, p], torch.tensor([[*ids, p, p]])):
        for ask in (prompt_ids, text_ids, lambda *given: text_ids(given[0], {"prompt": "a", "response": given[1]})):
            with pytest.raises(ValueError, match=f"padding .token {p}, 2 times.*Tokenize without padding"):
                ask(tokenizer, padded)
    if pad == "</s>":  # one end of a text is its own
        assert text_ids(tokenizer, [*ids, p]) == [*ids, p]
    else:
        with pytest.raises(ValueError, match="These ids end with padding"):
            text_ids(tokenizer, [*ids, p])
    tokenizer.pad_token = None
    assert text_ids(tokenizer, [*ids, p, p]) == [*ids, p, p]


def test_a_tokenizer_without_a_format_takes_words_as_they_are() -> None:
    tokenizer = words(("<s>",))
    assert not has_template(tokenizer)
    assert read(tokenizer, prompt_ids(tokenizer, "a b")) == "<s> a b"
    for ask in (lambda: prompt_ids(tokenizer, [USER]), lambda: prompt_ids(tokenizer, "a", True)):
        with pytest.raises(ValueError, match="no chat template"):
            ask()


def test_what_would_be_passed_over_or_fail_inside_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    for labels in ([-100, 5], torch.tensor([[5, -1]])):
        for ask in (prompt_ids, text_ids, lambda *given: text_ids(given[0], {"prompt": "a", "response": given[1]})):
            with pytest.raises(ValueError, match="Token ids are 0 or more, and these hold -1"):
                ask(tokenizer, labels)
    for template in ("chatml", ["tools"]):
        with pytest.raises(TypeError, match="template= holds arguments of the chat template by name"):
            prompt_ids(tokenizer, [USER], template=template)  # type: ignore[arg-type]
    for content in (["a"], ("a", {"type": "text", "text": "b"})):
        with pytest.raises(TypeError, match="content is a string or a list of parts.*not .*'a'"):
            prompt_ids(tokenizer, [{"role": "user", "content": content}])
    with pytest.raises(ValueError, match="chat=True puts a record's prompt into the chat template"):
        text_ids(tokenizer, "a", chat=True)
    assert text_ids(tokenizer, {"prompt": "a", "response": "b"}, chat=True)


def test_a_processor_is_told_from_its_tokenizer() -> None:
    class SomeProcessor:
        tokenizer = tiny_tokenizer()

        def __call__(self, *args: Any) -> Any: ...

    for ask in (prompt_ids, text_ids):
        with pytest.raises(TypeError, match=r"SomeProcessor is a processor.*pass processor\.tokenizer"):
            ask(SomeProcessor(), "a")  # type: ignore[operator]
        with pytest.raises(TypeError, match="right order"):
            ask(torch.nn.Linear(1, 1), "a")  # type: ignore[operator]


# A continuation is tokenized with what it continues


def pieces(prepend: str = "first", start: bool = False) -> Any:
    "A tokenizer that marks the beginnings of words, as Llama 2's does."
    letters = ["▁", "A", "B", "(", ")", ":", "\n"]
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", *letters, *(f"▁{x}" for x in "AB(:"), "AB", "▁AB"])}
    merges = [("▁", x) for x in "AB(:"] + [("A", "B"), ("▁A", "B")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prepend", ["first", "always"])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("prompt", ["(", "A (", "A:(", "B A\n(", "A </s>("])
def test_a_letter_after_ids_is_the_letter_and_not_a_word_begun(prepend: str, start: bool, prompt: str) -> None:
    tokenizer = pieces(prepend, start)
    ids = prompt_ids(tokenizer, prompt)
    by_words = continuation_ids(tokenizer, prompt, "A")
    for given in (ids, ids[0], ids[0].tolist(), tuple(ids[0].tolist())):
        assert continuation_ids(tokenizer, given, "A") == by_words
        assert read(tokenizer, continuation_ids(tokenizer, given, "A")[1]) == "A"
        assert read(tokenizer, continuation_ids(tokenizer, given, " A")[1]) == "▁A"
        assert read(tokenizer, continuation_ids(tokenizer, given, "B)")[1]) == "B )"
        assert continuation_ids(tokenizer, given, [4, 5])[1] == [4, 5]


def test_ids_that_words_would_not_give_stay_as_they_are() -> None:
    tokenizer = pieces()
    number = tokenizer.convert_tokens_to_ids
    for ids, said, wanted in (
        ([number("("), number("A")], "B", "B"),  # by words, (AB would be one token less
        ([number("(")], "A", "A"),  # an opening without the mark of a word
        ([number("</s>"), number("▁("), number("▁("), number("(")], "A)", "A )"),
    ):
        asked, written = continuation_ids(tokenizer, ids, said)
        assert asked == ids and read(tokenizer, written) == wanted
        assert tokenizer.decode(asked + written) == tokenizer.decode(asked) + said


CORPUS = "A model (any model) writes: 'So it is.' Is it? Answer A or B:\n(A) yes, (B) no.\n\nI answer (A), as it is so."


def learned(kind: str) -> Any:
    "A tokenizer that learned its pieces from a text, as real ones do."
    from tokenizers import trainers

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>") if kind == "bpe" else models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    how: dict[str, Any] = {"vocab_size": 55, "special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **how) if kind == "unigram" else trainers.BpeTrainer(**how)
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    start = [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_ids_are_continued_as_their_words_are(kind: str) -> None:
    tokenizer, same = learned(kind), 0
    for cut in range(1, len(CORPUS)):
        prompt, completion = CORPUS[:cut], CORPUS[cut : cut + 9]
        ids = prompt_ids(tokenizer, prompt)
        asked, written = continuation_ids(tokenizer, ids, completion)
        assert asked == ids[0].tolist() and tokenizer.decode(asked + written) == tokenizer.decode(asked) + completion
        try:
            by_words = continuation_ids(tokenizer, prompt, completion)
        except ValueError:
            continue  # the two merge
        assert (asked, written) == by_words
        same += 1
    assert same > len(CORPUS) // 3


def test_words_that_cannot_follow_ids_are_refused() -> None:
    tokenizer = words()
    with pytest.raises(ValueError, match="No tokens were found that write 'zz' after"):
        continuation_ids(lowercase(), lowercase()("a b")["input_ids"], "zz")
    for empty in ("", []):
        with pytest.raises(ValueError, match="A completion is empty"):
            continuation_ids(tokenizer, [3], empty)


def lowercase() -> Any:
    "Knows no other words than two, and drops the rest."
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, " ": 2}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_continuation_of_messages_goes_on_with_the_templates_text() -> None:
    tokenizer = pieces()
    tokenizer.chat_template = "{% for m in messages %}({{ m.content }}:{% endfor %}"
    opened = [{"role": "user", "content": "B"}, {"role": "assistant", "content": "("}]
    asked, written = continuation_ids(tokenizer, opened, "A")
    assert tokenizer.decode(asked) == "(B:((" and read(tokenizer, written) == "A"
    assert continuation_ids(tokenizer, asked, "A") == (asked, written)
    with pytest.raises(ValueError, match="merges with the end of the prompt"):
        continuation_ids(tokenizer, "A", "B", chat=False)


# What is no prompt


@pytest.mark.parametrize("prompt", ["", [], torch.zeros(1, 0, dtype=torch.long)])
def test_a_prompt_without_tokens_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        prompt_ids(words(), prompt)


@pytest.mark.parametrize("prompt", [None, 3.5, ["a", "b"], {"input_ids": [1]}, [[1, 2], [3, 4]], torch.ones(3), torch.ones(2, dtype=torch.bool)])  # fmt: skip
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="A prompt is words|The ids of a prompt are one row"):
        prompt_ids(words(), prompt)


def test_ids_come_on_the_cpu_whatever_the_default_device() -> None:
    tokenizer = tiny_tokenizer()
    wanted = prompt_ids(tokenizer, "a").tolist()
    torch.set_default_device("meta")
    try:
        assert prompt_ids(tokenizer, "a").tolist() == wanted
        assert prompt_ids(tokenizer, wanted[0]).tolist() == wanted
        assert continuation_ids(tokenizer, wanted, "b")[1] == text_ids(tokenizer, "b")[1:]
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "tokenizer", [tiny_tokenizer(), words(("<s>",), ("</s>",), PLAIN), words(("<s>",), (), None, InCode)]
)
def test_the_tokenizer_is_not_changed(tokenizer: Any) -> None:
    before = {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"}, tokenizer.backend_tokenizer.to_str()
    continuation_ids(tokenizer, OPEN, " c")
    texts_ids(tokenizer, [OPEN, "a", {"prompt": "a", "response": "b"}])
    assert (
        {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"},
        tokenizer.backend_tokenizer.to_str(),
    ) == before
