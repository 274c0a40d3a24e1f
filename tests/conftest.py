"""Results that are worth reading as one table: family x check."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    import sys

    module = next((m for name, m in sys.modules.items() if name.split(".")[-1] == "test_families"), None)
    if module is not None and module.MARKS:
        terminalreporter.section("families")
        terminalreporter.write_line(module.table())
