"""What a step of training keeps in memory: activations, and apart from them what has the size of a weight.

Under autocast a weight has 16-bit copies, and its gradient is made in 16 bits before it is finished. These grow with
the weight and not with the batch, and a rank holds those of its share of the weights only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
_COPIES = {_ATEN._to_copy.default, _ATEN.clone.default}
_SUMS = {_ATEN.add.Tensor, _ATEN.add_.Tensor}  # of a weight's gradients from several uses


class Event(NamedTuple):
    """A storage is made (bytes above 0) or goes; `finished`: it stays, as the gradient that is now complete."""

    storage: int
    bytes: int
    finished: bool = False


@dataclass(frozen=True)
class Activations:
    """Most bytes before the first gradient is finished, and between one finished gradient and the next.

    `order` names the parameters in the order in which their gradients are finished. `weights` has, for each that is no
    table, most bytes per number of its copies and of its gradients that are not finished; `bytes_G` is without these.
    """

    bytes_G: np.ndarray  # [1 + len(order)]
    order: list[str]
    weights: dict[str, np.ndarray]  # each as long


class LiveBytes(TorchDispatchMode):
    """The storages that operators make, numbered as they come, and which of them were copied or added up from which."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.sources: dict[int, list[int]] = {}
        self._numbers = count()
        self._at: dict[int, int] = {}  # address -> number, of storages in use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = [self.known(x) for x in args if isinstance(x, Tensor)] if func in _COPIES | _SUMS else []
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                number = self._follow(tensor.untyped_storage())
                if sources:
                    self.sources.setdefault(number, []).extend(source for source in sources if source != number)
        return out

    def known(self, tensor: Tensor) -> int:
        """The number of a tensor's storage; -1: not followed."""
        return self._at.get(tensor.untyped_storage().data_ptr(), -1)

    def ignore(self, tensor: Tensor) -> int:
        """Number a storage that was there before, without an event."""
        return self._at.setdefault(tensor.untyped_storage().data_ptr(), next(self._numbers))

    def finish(self, grad: Tensor) -> int:
        """Note that a gradient is complete; a sparse one stays among the activations."""
        storage = self.known(grad) if grad.layout == torch.strided else -1
        if storage >= 0:
            del self._at[grad.untyped_storage().data_ptr()]
        self.events.append(Event(storage, -grad.untyped_storage().nbytes() if storage >= 0 else 0, finished=True))
        return storage

    def _follow(self, storage: torch.UntypedStorage) -> int:
        place, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return -1
        if place not in self._at:
            number = self._at[place] = next(self._numbers)
            self.events.append(Event(number, size))
            weakref.finalize(storage, self._forget, place, number, size)
        return self._at[place]

    def _forget(self, place: int, number: int, size: int) -> None:
        if self._at.get(place) == number:
            del self._at[place]
            self.events.append(Event(number, -size))


def peaks(events: list[tuple[int, Event]], num_finished: int) -> np.ndarray:
    """Most bytes up to each finished gradient, and after the last one; events come with how many finished before."""
    peak_G = np.zeros(num_finished + 1)
    now = last = 0
    for interval, event in events:
        peak_G[last + 1 : interval + 1] = now
        now, last = now + event.bytes, interval
        if not event.finished:  # what is finished goes at the end of its interval
            peak_G[last] = max(peak_G[last], now)
    peak_G[last + 1 :] = now
    return peak_G


def follow(model: nn.Module, step: Callable[[], Tensor]) -> Activations:
    """Run `step` and its backward pass; activations are what lives, less weights' copies and gradients."""
    live = LiveBytes()
    grads: dict[str, int] = {}

    def note(name: str, param: Tensor) -> None:
        assert param.grad is not None
        grads[name] = live.finish(param.grad)

    params = dict(model.named_parameters())
    hooks = [
        param.register_post_accumulate_grad_hook(lambda p, name=name: note(name, p)) for name, param in params.items()
    ]
    numbers = {name: live.ignore(param) for name, param in params.items()}
    for buffer in model.buffers():
        live.ignore(buffer)
    with live:
        step().backward()
    for hook in hooks:
        hook.remove()
    weights = {name: param for name, param in params.items() if not getattr(param, "is_table", False)}
    owner = _owners(live, weights, numbers, grads)
    events: dict[str | None, list[tuple[int, Event]]] = {name: [] for name in (None, *weights)}
    interval = 0
    for event in live.events:
        events[owner.get(event.storage)].append((interval, event))
        interval += event.finished
    per_number = {name: peaks(events[name], len(grads)) / param.numel() for name, param in weights.items()}
    return Activations(peaks(events[None], len(grads)), list(grads), per_number)


def _owners(
    live: LiveBytes, weights: Mapping[str, Tensor], numbers: dict[str, int], grads: dict[str, int]
) -> dict[int, str]:
    """Whose copies storages are, or whose gradients on the way."""
    owner = {numbers[name]: name for name in weights}
    for storage, sources in live.sources.items():  # as they came
        if len(sources) == 1 and sources[0] in owner:
            owner[storage] = owner[sources[0]]
    sizes = {event.storage: event.bytes for event in live.events if event.bytes > 0}
    for name in weights.keys() & grads.keys():
        waiting = [grads[name]]
        while waiting:
            storage = waiting.pop()
            # a part of a larger storage is a view of activations
            if storage not in owner and 0 < sizes.get(storage, 0) <= weights[name].nbytes:
                owner[storage] = name
                waiting += live.sources.get(storage, [])
    return owner
