"""Where the helpers are, and results that are worth reading as one table: family x check."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

MARKED = {  # what a file, or a test of that name, needs, so that `-m "not browser"` and the like leave it out
    "browser": {"test_site", "test_live"},
    "processes": {"test_distributed", "test_importing_adds_little", "test_two_processes_build_once"},
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
        "test_forks",
        "test_upstream",
        "test_report",
        "test_expressions",
        "test_a_start_that_only_the_device_knows",
        "test_repeng_reads_ours_and_we_read_repengs",
        "test_lm_eval_steers_as_we_do",
        "test_thousands_of_altered_headers_are_refused_or_obey_the_rules",
        "test_thousands_of_damaged_files_are_refused_or_read_the_same",
        "test_what_a_later_version_adds_is_kept_and_written_back",
        "test_a_block_inside_of_a_compiled_function_is_refused",
    },
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    'Files that `-m "not slow"` and the like leave out are not even read.'
    left_out = (marked for mark, marked in MARKED.items() if f"not {mark}" in config.option.markexpr)
    return True if any(collection_path.stem in marked for marked in left_out) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = {item.path.stem, getattr(item, "originalname", None)}
        for mark in (mark for mark, marked in MARKED.items() if names & marked):
            item.add_marker(mark)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    module = next((m for name, m in sys.modules.items() if name.split(".")[-1] == "test_families"), None)
    if module is not None and module.MARKS:
        terminalreporter.section("families")
        terminalreporter.write_line(module.table())
