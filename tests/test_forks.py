"""Tutorials are forked by changing the line that loads the model: each runs from top to bottom with three others.

A base model of 12 layers without a chat template, a chat model of 24 layers, and one like Gemma 3, whose configuration is
nested and whose template knows no system message. They have random weights, so what a page says about one model's words
does not hold for them, and what it says about mechanism does.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from execnb.shell import CaptureShell
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, PreTrainedTokenizerFast

import steering_vectors.demo
from steering_vectors.demo import tiny_model

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as many base models split
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def cells(page: Path, kind: str) -> list[str]:
    return [
        "".join(c["source"]) for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind
    ]


def tokenizer_of(template: str | None, start: bool) -> PreTrainedTokenizerFast:
    "A tokenizer with the words of the pages, and with `.Yes` as one token, as many base models have it."
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    texts = [text for page in PAGES for text in cells(page, "code")]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([*texts, *["Yes\nNo\n.Yes .No"] * 50], trainer)
    if start:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, padding_side="left", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    return fast


def model_of(kind: str, num_layers: int, vocab_size: int) -> Any:
    "A tiny model, with as many token embeddings as the tokenizer needs."
    config = tiny_model(kind, num_layers=1).config
    fresh = steering_vectors.demo.tiny._tiny_config(kind, num_layers, config.hidden_size)
    fresh.vocab_size = vocab_size
    torch.manual_seed(0)
    if kind != "gemma3":
        return AutoModelForCausalLM.from_config(fresh).eval()
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 28, "patch_size": 14}
    nested = Gemma3Config(text_config=fresh.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForImageTextToText.from_config(nested).eval()


def brief(model: Any) -> Any:
    "Let `model` write four tokens where it is asked for more: what it writes means nothing."
    generate = model.generate

    def generate_few(*args: Any, max_new_tokens: int, **options: Any) -> Any:
        return generate(*args, max_new_tokens=min(max_new_tokens, 4), **options)

    model.generate = generate_few
    return model


def base() -> tuple[Any, Any]:
    tokenizer = tokenizer_of(None, start=True)
    return brief(model_of("llama", 12, len(tokenizer))), tokenizer


def chat() -> tuple[Any, Any]:
    tokenizer = tokenizer_of(CHAT, start=False)
    return brief(model_of("qwen2", 24, len(tokenizer))), tokenizer


def gemma_like() -> tuple[Any, Any]:
    tokenizer = tokenizer_of(GEMMA, start=True)
    return brief(model_of("gemma3", 26, len(tokenizer))), tokenizer


@pytest.mark.parametrize("load", [base, chat, gemma_like], ids=lambda f: f.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_tutorial_runs_with_another_model(page: Path, load: Any, monkeypatch: Any, capsys: Any) -> None:
    if page.stem == "a_persona_over_a_conversation" and load is base:
        pytest.skip("a conversation needs a chat template, and the page says so")
    source = "\n".join(cells(page, "code"))
    assert len(re.findall(r"load_demo_model\(", source)) == 1, "one line loads the model"
    monkeypatch.setattr(steering_vectors.demo, "load_demo_model", load)
    monkeypatch.chdir(page.parent)
    shell = CaptureShell(path=page.parent)
    for cell in cells(page, "code"):
        shell.run(cell)
        if shell.exc:
            raise shell.exc
    said = "".join(capsys.readouterr())
    assert "Traceback (most recent call last)" not in said, said  # IPython prints what a display raises, and goes on
    assert not shell.user_ns.get("embedded")


def test_the_lines_for_a_model_of_ones_own_run(monkeypatch: Any, capsys: Any) -> None:
    "What the home page and README.md say is the whole of it, with a model that was not the pages' own."
    import transformers

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "AutoTokenizer" in block]
    model, tokenizer = base()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    exec(lines, {})
    assert capsys.readouterr().out.strip()
