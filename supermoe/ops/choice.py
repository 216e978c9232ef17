"""Which implementation of an op runs: back ends as data, tried in order; what one cannot take goes to the next.

A back end is an entry of `BACKENDS`: for each op that it has, a module with a function of that name and of the
signature in `reference`. The module may have `refusal(op, *operands)`, which says in one sentence why it cannot take
these operands, or None.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """Implementations of some ops under one name."""

    about: str  # for people: what it is, or what it does differently
    modules: Mapping[str, str]  # op -> the module that has it; imported at the op's first call
    devices: tuple[str, ...] = ("cpu", "cuda")
    requires: tuple[str, ...] = ()  # packages that must import
    remedy: str = ""  # how to get them
    automatic: bool = True  # False: used only where `use` names it


_OWN = "supermoe.ops."
_HISTORY = ("history_attention", "indicator_attention")
_LOSSES = ("linear_cross_entropy", "linear_cross_entropy_sets")

BACKENDS: dict[str, Backend] = {  # the first that takes the operands is used
    "triton": Backend(
        about="our own kernels for the router and the experts",
        modules={"route": _OWN + "triton_moe", "expert_ffn": _OWN + "triton_moe"},
        devices=("cuda",),
        requires=("triton", "supermoe.kernels"),
        remedy="pip install -e '.[triton]' in a clone of supermoe",
    ),
    "torch": Backend(
        about="attention by length, chunked cross-entropy, grouped experts, bulk dropout",
        modules={
            "route": _OWN + "routing",
            "expert_ffn": _OWN + "experts",
            **dict.fromkeys(_HISTORY, _OWN + "attention"),
            **dict.fromkeys(_LOSSES, _OWN + "cross_entropy"),
            "dropout": _OWN + "random_bytes",
        },
    ),
    "tutel": Backend(
        about="experts between Tutel's dispatch kernels, in padded buffers",
        modules={"expert_ffn": _OWN + "tutel"},
        requires=("tutel", "tutel_custom_kernel"),
        remedy="build it as its own project says: https://github.com/microsoft/Tutel",
        automatic=False,
    ),
    "reference": Backend(
        about="plain PyTorch, for what no other back end has or takes",
        modules=dict.fromkeys(
            ("route", "expert_ffn", *_HISTORY, *_LOSSES, "sampled_cross_entropy", "dropout"), _OWN + "reference"
        ),
    ),
}
_forced: str | None = None


def use(name: str | None) -> None:
    """Force one back end for every op that it has; None lets each call pick again.

    A forced back end raises where it cannot take the operands. Ops that it does not have are picked as ever.

    Raises:
        ValueError: when there is no such back end, or it cannot run on this machine.
    """
    global _forced
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"there is no ops backend {name!r}; known: {', '.join(BACKENDS)}")
        reason = _off(name)
        if reason is not None:
            raise ValueError(f"the ops backend {name!r} cannot be used here: {reason}")
    _forced = name


def backends() -> dict[str, str]:
    """Each back end and in one sentence whether it is active on this machine and why."""
    return {name: _state(name, backend) for name, backend in BACKENDS.items()}


def call(op: str, *operands: Any) -> Any:
    """Run `op` on the forced back end, or on the first one that takes these operands; operands[0] tells the device.

    Raises:
        ValueError: when the forced back end does not take the operands; the message says why.
    """
    device = operands[0].device.type
    if _forced is not None and op in BACKENDS[_forced].modules:
        reason = _refusal(_forced, op, device, operands)
        if reason is not None:
            raise ValueError(
                f"{op} cannot run on the ops backend {_forced!r}, which ops.use forced: {reason}; "
                f"ops.use(None) lets each call pick one"
            )
        return _function(_forced, op)(*operands)
    refused = ""
    for name, backend in BACKENDS.items():
        if not backend.automatic or op not in backend.modules or device not in backend.devices:
            continue
        reason = _refusal(name, op, device, operands)
        if reason is None:
            if refused:
                _warn_once(f"{op} runs on the ops backend {name!r}: {refused}")
            return _function(name, op)(*operands)
        refused = refused or f"{name!r} does not take it, as {reason}"
    raise ValueError(f"no ops backend has {op} on {device}: {refused or 'move the tensors to a CPU or a CUDA device'}")


def _function(name: str, op: str) -> Any:
    return getattr(import_module(BACKENDS[name].modules[op]), op)


def _refusal(name: str, op: str, device: str, operands: tuple[Any, ...]) -> str | None:
    """Why the back end cannot take this call."""
    backend = BACKENDS[name]
    if device not in backend.devices:
        return f"it runs on {' and '.join(backend.devices)}, not on {device}"
    reason = _not_importable(backend.requires, backend.remedy)
    if reason is not None:
        return reason
    refuse = getattr(import_module(backend.modules[op]), "refusal", None)
    return None if refuse is None else refuse(op, *operands)


def _off(name: str) -> str | None:
    """Why the back end cannot run on this machine at all."""
    backend = BACKENDS[name]
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if not set(here) & set(backend.devices):
        return f"it runs on {' and '.join(backend.devices)}, and there is no such device here"
    return _not_importable(backend.requires, backend.remedy)


@cache
def _not_importable(packages: tuple[str, ...], remedy: str) -> str | None:
    for package in packages:
        try:
            import_module(package)
        except (ImportError, OSError) as error:  # OSError: a library that does not load
            return f"the package `{package}` cannot be imported ({error}); {remedy}"
    return None


def _state(name: str, backend: Backend) -> str:
    reason = _off(name)
    if reason is not None:
        return f"off: {reason}"
    if name == _forced:
        return f"active, forced by ops.use({name!r}): {backend.about}"
    if _forced is not None and set(backend.modules) <= set(BACKENDS[_forced].modules):
        return f"idle: {_forced!r} is forced by ops.use"
    if not backend.automatic:
        return f"idle, used where ops.use names it: {backend.about}"
    return f"active: {backend.about}"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
