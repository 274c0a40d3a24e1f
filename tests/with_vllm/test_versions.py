"""The vLLM that is installed is one that was tested, and has every private name that the plugin uses."""

import pytest
import vllm

from steering_vectors.serve import engines as known
from steering_vectors.serve.vllm import WRAPPED

NAMES = known.PRIVATE | known.HTTP | known.RUNNERS


def test_this_version_is_a_tested_one() -> None:
    "A newer one speaks here first: run `scripts/test vllm --all` with it, then put it into TESTED."
    version = vllm.__version__.split("+")[0]
    assert version in known.TESTED, f"vLLM {version} is not in TESTED, {known.TESTED}"
    assert set(known.TESTED) <= set(known.SEEN) and set(WRAPPED) <= set(known.PRIVATE)


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_as_expected(name: str) -> None:
    assert known.missing_name(name, NAMES[name]) is None


def test_the_fields_that_are_read_are_there() -> None:
    from dataclasses import fields

    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    assert {"req_ids", "num_scheduled_tokens", "num_computed_tokens_np"} <= {f.name for f in fields(InputBatch)}
    assert "sampling_params" in {f.name for f in fields(CachedRequestState)}
