"""What transformers itself cannot do, in the installed version: found out by doing it unsteered, and skipped with the reason."""

from collections.abc import Callable

import pytest
import transformers

SINCE = (5, 23)  # from this version on, all of it works, and nothing here may be skipped


def installed() -> tuple[int, ...]:
    return tuple(int(n) for n in transformers.__version__.split(".")[:2])


def fault(unsteered: Callable[[], object], what: str, ask: bool | None = None) -> str | None:
    "Why `what` cannot be tested: it fails without steering as well. None where it works. `ask`: whether it may fail at all."
    if not (installed() < SINCE if ask is None else ask):
        return None
    try:
        unsteered()
    except (NameError, ImportError):  # the test's own fault
        raise
    except Exception as error:
        words = str(error).strip().split("\n")[0][:120]
        return f"transformers {transformers.__version__} itself: {what}, unsteered as well ({type(error).__name__}: {words})"
    return None


def skip_if(reason: str | None) -> None:
    if reason is not None:
        pytest.skip(reason)
