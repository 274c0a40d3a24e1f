"""Where the helpers are, and results that are worth reading as one table: family x check."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    module = next((m for name, m in sys.modules.items() if name.split(".")[-1] == "test_families"), None)
    if module is not None and module.MARKS:
        terminalreporter.section("families")
        terminalreporter.write_line(module.table())
