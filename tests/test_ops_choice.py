"""The choice of a back end, on invented ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from supermoe import ops
from supermoe.ops import choice
from supermoe.ops.choice import BACKENDS, Backend


@pytest.fixture(autouse=True)
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A back end `picky`, tried first, whose dropout takes vectors only and returns sevens."""
    module = ModuleType("picky_ops")
    module.dropout = lambda x, p, training: torch.full_like(x, 7)
    module.refusal = lambda op, x, *others: None if x.dim() == 1 else f"{op} wants a vector, not {x.dim()} dimensions"
    monkeypatch.setitem(sys.modules, "picky_ops", module)
    backend = Backend("for tests", {"dropout": "picky_ops"}, devices=("cpu",))
    known = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({"picky": backend, **known})
    choice._warn_once.cache_clear()
    choice._not_importable.cache_clear()
    yield backend
    ops.use(None)
    BACKENDS.clear()
    BACKENDS.update(known)


def test_the_first_that_takes_the_operands_runs() -> None:
    assert ops.dropout(torch.ones(3), 0.0).tolist() == [7] * 3
    ops.use("reference")
    assert ops.dropout(torch.ones(3), 0.0).tolist() == [1] * 3


def test_refused_operands_go_to_the_next_with_one_warning_that_names_the_reason() -> None:
    with pytest.warns(UserWarning, match="dropout runs on the ops backend 'torch': 'picky'.*wants a vector"):
        assert ops.dropout(torch.ones(1, 2), 0.0).tolist() == [[1, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.dropout(torch.ones(1, 2), 0.0)


def test_a_forced_back_end_raises_instead() -> None:
    ops.use("picky")
    with pytest.raises(ValueError, match=r"dropout cannot run on .*'picky'.*wants a vector.*ops.use\(None"):
        ops.dropout(torch.ones(1, 2), 0.0)


def test_ops_that_the_forced_one_lacks_are_picked_as_ever() -> None:
    ops.use("picky")
    assert ops.route(torch.zeros(2, 3), 1).expert_NK.shape == (2, 1)


def test_what_is_not_automatic_waits_to_be_named(picky: Backend) -> None:
    BACKENDS["picky"] = replace(picky, automatic=False)
    assert ops.dropout(torch.ones(3), 0.0).tolist() == [1] * 3
    assert ops.backends()["picky"] == "idle, used where ops.use names it: for tests"
    ops.use("picky")
    assert ops.dropout(torch.ones(3), 0.0).tolist() == [7] * 3


def test_a_missing_package_is_named_with_its_remedy(picky: Backend) -> None:
    BACKENDS["picky"] = replace(picky, requires=("no_such_package",), remedy="pip install it")
    assert ops.backends()["picky"].startswith("off: the package `no_such_package` cannot be imported")
    with pytest.raises(ValueError, match=r"'picky' cannot be used here: the package `no_such_package`.*pip install it"):
        ops.use("picky")
    with pytest.warns(UserWarning, match="no_such_package"):
        assert ops.dropout(torch.ones(3), 0.0).tolist() == [1] * 3


def test_a_device_that_is_not_here_is_named_and_others_do_not_warn(picky: Backend) -> None:
    BACKENDS["picky"] = replace(picky, devices=("xpu",))
    assert ops.backends()["picky"] == "off: it runs on xpu, and there is no such device here"
    with pytest.raises(ValueError, match="it runs on xpu"):
        ops.use("picky")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.dropout(torch.ones(3), 0.0)


def test_states() -> None:
    assert ops.backends()["picky"] == "active: for tests"
    ops.use("picky")
    assert ops.backends()["picky"] == "active, forced by ops.use('picky'): for tests"
    assert ops.backends()["torch"].startswith("active")  # for the ops that `picky` lacks
    ops.use("reference")
    assert ops.backends()["torch"] == "idle: 'reference' is forced by ops.use"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"no ops backend 'cuda'; known: picky, .*torch.*, reference"):
        ops.use("cuda")


def test_a_device_without_any_back_end() -> None:
    with pytest.raises(ValueError, match="no ops backend has dropout on meta"):
        ops.dropout(torch.ones(3, device="meta"), 0.5)


def test_every_back_end_has_what_it_names() -> None:
    for name, backend in BACKENDS.items():
        if choice._off(name) is None:
            for op in backend.modules:
                assert callable(choice._function(name, op)), (name, op)
