"""Hooks: one a module, in order, gone afterwards, whatever happens in between."""

import copy
import gc
import itertools
import pickle
import weakref
from typing import Any

import pytest
import torch
from plain import hooks_on
from torch import Tensor, nn

from steering_vectors.model import attachments
from steering_vectors.model.hooks import edit_output, get_hidden, read_output, with_hidden


@pytest.fixture
def double() -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    nn.init.constant_(linear.weight, 2.0)
    return linear


X = torch.tensor([[5.0]])
EDITS = [lambda h: h + 1, lambda h: h * 100, lambda h: h - 7]


def test_the_count_sees_a_hook_that_is_left(double: nn.Linear) -> None:
    "What the tests below rely on: a leftover hook is counted."
    double.register_forward_hook(lambda *args: None)
    assert hooks_on(nn.Sequential(double)) == 1
    double.register_forward_pre_hook(lambda *args: None)
    assert hooks_on(nn.Sequential(double)) == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_removal_keeps_the_order_of_opening(double: nn.Linear, order: tuple[int, ...]) -> None:
    seen: list[Tensor] = []
    reader = read_output(double, seen.append)
    handles = [edit_output(double, edit) for edit in EDITS]
    left = [0, 1, 2]
    for gone in order:
        assert hooks_on(double) == 1, "one hook a module, however many edits"
        expected = 2 * X
        for n in left:
            expected = EDITS[n](expected)
        assert torch.equal(double(X), expected) and torch.equal(seen[-1], expected)
        handles[gone].remove()
        handles[gone].remove()
        left.remove(gone)
    reader.remove()
    assert torch.equal(double(X), 2 * X)
    assert hooks_on(double) == 0 and double not in attachments._listeners


def test_hooks_of_others_stay_and_run_after_ours(double: nn.Linear) -> None:
    seen: list[float] = []
    theirs = double.register_forward_hook(lambda module, args, output: seen.append(output.item()))
    with edit_output(double, EDITS[0]):
        double(X)
        later = double.register_forward_hook(lambda module, args, output: output * 2)
        assert double(X).item() == 22
        later.remove()
    double(X)
    assert seen == [11, 11, 10]
    theirs.remove()
    assert hooks_on(double) == 0


def test_an_edit_that_fails_leaves_nothing(double: nn.Linear) -> None:
    def fail(h: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), edit_output(double, fail):
        double(X)
    assert hooks_on(double) == 0


def test_nothing_is_stored_on_the_module(double: nn.Linear) -> None:
    before = set(vars(double))
    with edit_output(double, EDITS[0]):
        assert set(vars(double)) == before
        assert set(double.state_dict()) == {"weight"}
    assert set(vars(double)) == before
    pickle.loads(pickle.dumps(double))


def test_a_copy_made_meanwhile_is_free_afterwards(double: nn.Linear) -> None:
    with edit_output(double, EDITS[0]):
        twin = copy.deepcopy(double)
    assert torch.equal(twin(X), 2 * X)


def test_a_module_can_go_while_it_is_known(double: nn.Linear) -> None:
    handle = edit_output(double, EDITS[0])
    gone = weakref.ref(double)
    handle.remove()
    del double, handle
    gc.collect()
    # pytest holds the fixture's value, so look at the library's own references instead
    module = gone()
    assert module is None or module not in attachments._listeners


def test_outputs_of_every_kind() -> None:
    from collections import OrderedDict, namedtuple

    from transformers.modeling_outputs import BaseModelOutputWithPast

    Pair = namedtuple("Pair", "state extra")
    h, g = torch.ones(2), torch.zeros(2)
    outputs: list[Any] = [
        h,
        (h, None),
        [h, "x"],
        (None, h),
        Pair(h, 3),
        {"a": None, "h": h},
        OrderedDict(h=h, b=1),
        BaseModelOutputWithPast(last_hidden_state=h),
    ]
    for output in outputs:
        assert get_hidden(output) is h
        new = with_hidden(output, g)
        assert type(new) is type(output) and get_hidden(new) is g
        assert get_hidden(output) is h, "the old one is as it was"
    for nothing in ["text", None, (), (1, 2), {"a": 1}]:
        with pytest.raises(TypeError, match="Expected a tensor"):
            get_hidden(nothing)


def test_the_switch_for_compiled_code_goes_back(double: nn.Linear) -> None:
    import torch._dynamo.eval_frame as frame

    before = frame._stance.stance
    first, other = edit_output(double, EDITS[0]), nn.Linear(1, 1)
    second = read_output(other, lambda h: None)
    assert frame._stance.stance == "force_eager"
    first.remove()
    assert frame._stance.stance == "force_eager"
    second.remove()
    second.remove()
    assert frame._stance.stance == before
