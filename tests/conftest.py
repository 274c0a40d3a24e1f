"""Where the helpers are, and results that are worth reading as one table: family x check."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

MARKED = {  # what a file needs, so that `-m "not browser"` and the like leave it out
    "browser": {"test_site", "test_live"},
    "processes": {"test_distributed"},
    "compiler": {"test_compiled", "test_llamacpp"},
    "slow": {
        "test_families",
        "test_families_wrapped",
        "test_extraction_families",
        "test_baking",
        "test_parity",
        "test_extraction",
        "test_regions",
        "test_conditions_in_measures",
        "test_gates",
        "test_scores",
        "test_damage",
        "test_calibration",
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in (name for name, files in MARKED.items() if item.path.stem in files):
            item.add_marker(name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    module = next((m for name, m in sys.modules.items() if name.split(".")[-1] == "test_families"), None)
    if module is not None and module.MARKS:
        terminalreporter.section("families")
        terminalreporter.write_line(module.table())
