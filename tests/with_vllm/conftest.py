"""Tests of the plugin inside a real vLLM: collected only where vLLM is installed. `scripts/test vllm` makes such a place.

Most engines run in the process of the test, so that several of them start in the time of one.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

WITH_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if WITH_VLLM else ["test_*"]

SWITCHES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
if WITH_VLLM:
    os.environ.update({name: value for name, value in SWITCHES.items() if name not in os.environ})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Where checkpoints and vectors of the tests are."
    return tmp_path_factory.mktemp("served")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = getattr(sys.modules.get("engines"), "REPORT", [])
    if lines:
        terminalreporter.section("vLLM and transformers")
        for line in lines:
            terminalreporter.write_line(line)
