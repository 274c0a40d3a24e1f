"""Importing the library is cheap: it adds little time, and loads nothing that only some of its functions need."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import steering_vectors

HEAVY = ["sklearn", "scipy", "matplotlib", "ipywidgets", "gguf", "pandas", "IPython", "nbdev", "fastcore"]
TWENTY = """Aggregator mean_aggregator pca_aggregator logistic_aggregator LayerType LayerMatcher ModelLayerConfig
get_num_matching_layers guess_and_enhance_layer_config PatchDeltaOperator record_activations SteeringVector
SteeringPatchHandle train_steering_vector SteeringVectorTrainingSample aggregate_activations extract_activations
ablation_operator addition_operator ablation_then_addition_operator""".split()


def measured(statement: str) -> tuple[float, list[str]]:
    "Seconds that `statement` takes after `import torch, transformers`, and the heavy modules it has loaded."
    code = f"""
import json, sys, time
import torch, transformers
before = set(sys.modules)
start = time.perf_counter()
{statement}
took = time.perf_counter() - start
print(json.dumps([took, [m for m in {HEAVY} if m in sys.modules and m not in before]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, loaded = json.loads(done.stdout.splitlines()[-1])
    return took, loaded


@pytest.mark.parametrize(
    "statement",
    ["import steering_vectors", f"from steering_vectors import {', '.join(TWENTY)}"],
    ids=["package", "names"],
)
def test_importing_adds_little(statement: str) -> None:
    runs = [measured(statement) for _ in range(3)]
    assert runs[0][1] == []
    assert min(took for took, _ in runs) <= 0.3


def test_the_names_of_0_12_come_first() -> None:
    assert steering_vectors.__all__[:20] == TWENTY


def test_every_public_name_is_there() -> None:
    assert len(set(steering_vectors.__all__)) == len(steering_vectors.__all__)
    for name in steering_vectors.__all__:
        assert getattr(steering_vectors, name) is not None
    assert set(steering_vectors.__all__) <= set(dir(steering_vectors))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(steering_vectors.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {(a.asname, n.module) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == set(steering_vectors._home.items())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'steer'"):
        steering_vectors.steer  # noqa: B018
