"""Importing the library is cheap: it adds little time, and loads nothing that only some of its functions need."""

import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

import steering_vectors

HEAVY = ["sklearn", "scipy", "matplotlib", "ipywidgets", "gguf", "pandas", "IPython", "nbdev", "fastcore"]
TWENTY = """Aggregator mean_aggregator pca_aggregator logistic_aggregator LayerType LayerMatcher ModelLayerConfig
get_num_matching_layers guess_and_enhance_layer_config PatchDeltaOperator record_activations SteeringVector
SteeringPatchHandle train_steering_vector SteeringVectorTrainingSample aggregate_activations extract_activations
ablation_operator addition_operator ablation_then_addition_operator""".split()


def measured(statement: str) -> tuple[float, list[str]]:
    """Seconds of the processor that `statement` takes after `import torch, transformers`, and the heavy modules it has
    loaded. (The clock on the wall would measure what else the machine does.)"""
    code = f"""
import json, sys, time
import torch, transformers
before = set(sys.modules)
start = time.process_time()
{statement}
took = time.process_time() - start
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


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'stear'"):
        steering_vectors.stear  # noqa: B018


def returned(hint: Any) -> set[type]:
    "The classes of this library that a return annotation names."
    inside = {found for part in typing.get_args(hint) for found in returned(part)}
    own = isinstance(hint, type) and getattr(hint, "__module__", "").startswith("steering_vectors")
    return inside | {hint} if own else inside


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    "Every public function, and every public method and property of the public classes."
    for name in steering_vectors.__all__:
        value = getattr(steering_vectors, name)
        if inspect.isfunction(value):
            yield name, inspect.unwrap(value)
        for kind in value.__mro__ if inspect.isclass(value) else ():
            if not kind.__module__.startswith("steering_vectors"):
                continue
            for attribute, method in vars(kind).items():
                method = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
                if inspect.isfunction(method) and (not attribute.startswith("_") or attribute.startswith("__")):
                    yield f"{name}.{attribute}", inspect.unwrap(method)


def elsewhere() -> dict[str, Any]:
    "Names that modules import for type checkers only."
    import matplotlib.axes
    import torch.distributed
    import transformers

    from steering_vectors.vectors.hints import Convention

    names = {name: getattr(transformers, name) for name in ("PreTrainedModel", "PreTrainedTokenizerBase")}
    return {
        **names,
        "Axes": matplotlib.axes.Axes,
        "Convention": Convention,
        "ProcessGroup": torch.distributed.ProcessGroup,
        **{n: getattr(steering_vectors, n) for n in steering_vectors.__all__},
    }


def hidden(functions: Iterable[tuple[str, Callable[..., Any]]]) -> dict[str, set[type]]:
    "Functions that return a class of this library that has no public name."
    public = {value for value in map(steering_vectors.__dict__.get, steering_vectors.__all__) if inspect.isclass(value)}
    found = {}
    for name, function in functions:
        # what a function's own module has under a name comes before what is listed here
        names = {key: value for key, value in elsewhere().items() if key not in function.__globals__}
        hint = typing.get_type_hints(function, localns=names).get("return")
        if missing := returned(hint) - public:
            found[name] = missing
    return found


def test_what_public_functions_return_is_public() -> None:
    functions = list(public_functions())
    assert (
        len(functions) > 100
        and {"sweep", "SteeringVector.apply", "Tokens.__or__", "Effect.slope"} <= dict(functions).keys()
    )
    assert hidden(functions) == {}


def test_a_hidden_type_would_be_found() -> None:
    from steering_vectors.display.explorer import SteeredAnswer

    def one() -> SteeredAnswer: ...
    def several() -> dict[int, list[SteeredAnswer | None]]: ...
    def none() -> steering_vectors.Tokens: ...

    assert hidden([("one", one), ("several", several), ("none", none)]) == {
        "one": {SteeredAnswer},
        "several": {SteeredAnswer},
    }
