"""A server as people start it, over HTTP: many requests at once, bad ones among them, on one rank and on two."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import engines
import pytest
from engines import KINDS

from steering_vectors.demo import tiny_model, tiny_tokenizer

NEW = 8


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def post(port: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read() or b"{}")


@contextmanager
def server(path: str, files: dict[str, str], log: Any, *more: str, threads: str = "nobind") -> Iterator[int]:
    "The port of a server that is up; ended afterwards with all its processes."
    port = free_port()
    options = {name.replace("_", "-"): str(value) for name, value in engines.SMALL.items()}
    flags = [x for name, value in options.items() for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--port", str(port), *flags]
    command += ["--host", "127.0.0.1", "--served-model-name", "tiny", "--gpu-memory-utilization", "0.2", *more]
    command += ["--additional-config", json.dumps({"steering_vectors": files})]
    env = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": threads,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with open(log, "w") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        try:
            for _ in range(600):
                if running.poll() is not None:
                    raise RuntimeError(log.read_text()[-3000:])
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield port
        finally:
            running.terminate()
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()


@pytest.fixture(scope="module")
def tiny(folder: Any) -> SimpleNamespace:
    model = tiny_model(hidden_size=engines.WIDE)
    have = engines.vectors(engines.WIDE, [0, 1, 2], 4.0)
    files = {name: engines.saved(folder, f"http_{name}", v) for name, v in have.items()}
    return SimpleNamespace(model=model, have=have, files=files, path=engines.checkpoint(folder / "http", model))


def answer(port: int, ids: list[int], args: dict[str, Any] | None, **more: Any) -> tuple[int, Any]:
    body = {"model": "tiny", "prompt": ids, "max_tokens": NEW, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    return post(port, "/v1/completions", body | {"return_token_ids": True, "vllm_xargs": args} | more)


def read(said: Any) -> tuple[list[int], list[float]]:
    choice = said["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def all_kinds(port: int, tiny: SimpleNamespace, kinds: list[str], at_once: int) -> float:
    "Every kind for three prompts, many at a time; the largest difference from transformers."
    prompts = [tiny_tokenizer()(text)["input_ids"] for text in engines.texts(3)]
    order = [(kind, ids) for kind in kinds for ids in prompts]
    with ThreadPoolExecutor(at_once) as pool:
        said = list(pool.map(lambda job: answer(port, job[1], engines.asked(job[0], tiny.have)), order))
    assert [status for status, _ in said] == [200] * len(order), said
    wanted = [engines.expected(tiny.model, ids, NEW, engines.steerings(kind, tiny.have)) for kind, ids in order]
    return max(engines.apart(read(body), want) for (_, body), want in zip(said, wanted, strict=True))


def chat(port: int, tiny: SimpleNamespace, kind: str) -> float:
    "One answer in a chat; the difference from transformers."
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    more = {"logprobs": True, "vllm_xargs": engines.asked(kind, tiny.have)}
    status, said = post(port, "/v1/chat/completions", body | more)
    assert status == 200, said
    ids = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    chosen, logprobs = engines.expected(tiny.model, ids, NEW, engines.steerings(kind, tiny.have))
    got = [one["logprob"] for one in said["choices"][0]["logprobs"]["content"]]
    assert said["usage"]["prompt_tokens"] == len(ids)
    return engines.apart((chosen, got), (chosen, logprobs))


BAD = [
    ({"vector": "grief"}, "no vector 'grief'; it has"),
    ({"vector": "joy", "multiplyer": 2}, "no field 'multiplyer'"),
    ({"vector": "joy", "tokens": "Tokens.generated - [13]"}, "leaves out token ids"),
    ({"vector": "joy", "operator": "ablation"}, "adds vectors"),
    ({"vector": "joy", "tokens": "Tokens.prompt[500:]"}, "selects nothing of a prompt"),
]


@pytest.mark.processes
def test_a_server_with_concurrent_and_bad_requests(tiny: SimpleNamespace, folder: Any) -> None:
    with server(tiny.path, tiny.files, folder / "server.log", "--enforce-eager") as port:
        far = all_kinds(port, tiny, list(KINDS), 12)
        engines.report(f"server: {3 * len(KINDS)} requests, 12 at a time, largest difference {far:.1e}")
        assert far < engines.CLOSE
        ids = tiny_tokenizer()("Hello")["input_ids"]
        for bad, why in BAD:
            status, body = answer(port, ids, {"steering": json.dumps(bad)})
            assert (status, why in json.dumps(body)) == (400, True), (bad, status, body)
        status, body = answer(port, ids, {"steering": '{"vector": "joy"}'}, use_beam_search=True, n=2)
        assert (status, "beam search" in json.dumps(body)) == (400, True), (status, body)
        for kind in ("none", "all", "two vectors"):
            assert chat(port, tiny, kind) < engines.CLOSE
        assert all_kinds(port, tiny, ["response", "none"], 6) < engines.CLOSE  # and the server goes on


@pytest.mark.processes
def test_two_tensor_parallel_ranks(tiny: SimpleNamespace, folder: Any) -> None:
    files = {name: file for name, file in tiny.files.items() if name != "inner"}
    more = ["--enforce-eager", "--tensor-parallel-size", "2"]
    with server(tiny.path, files, folder / "ranks.log", *more, threads="0|1") as port:
        kinds = [kind for kind in KINDS if kind != "a part"]
        far = [all_kinds(port, tiny, kinds, 12), all_kinds(port, tiny, kinds[::-1], 12)]
        engines.report(f"two ranks: 2 x {3 * len(kinds)} requests, largest difference {max(far):.1e}")
        assert max(far) < engines.CLOSE


@pytest.mark.processes
def test_a_server_that_cannot_be_steered_does_not_start(tiny: SimpleNamespace, folder: Any) -> None:
    ngram = json.dumps({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2})
    with pytest.raises(RuntimeError, match="cannot steer this engine: speculative_config"):
        with server(tiny.path, tiny.files, folder / "refused.log", "--enforce-eager", "--speculative-config", ngram):
            pass
