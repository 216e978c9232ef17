"""The one thing that flows from the store to the model: a packed batch of histories and the questions asked of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jagged:
    """Lists of ids laid end to end: list i is `ids[offsets[i]:offsets[i + 1]]`, with `weights` beside them if any."""

    offsets: Tensor  # int64 [n + 1]
    ids: Tensor  # int64
    weights: Tensor | None = None  # float32

    def take(self, index: Tensor) -> Jagged:
        """The lists at `index` (int64 [n]), in that order."""
        offsets, place = _places(self.offsets, index)
        return Jagged(offsets, self.ids[place], None if self.weights is None else self.weights[place])


@dataclass(frozen=True)
class SetLabels:
    """Sets of classes, one per example; an example that is not asked has an empty set and False in `asked_B`."""

    asked_B: Tensor  # bool
    offsets: Tensor  # int64 [B + 1]
    ids: Tensor  # int64

    def take(self, index: Tensor) -> SetLabels:
        """The labels of the examples at `index` (int64 [n]), in that order."""
        offsets, place = _places(self.offsets, index)
        return SetLabels(self.asked_B[index], offsets, self.ids[place])


Labels = Tensor | SetLabels  # of a task's examples, see `Batch`


@dataclass(frozen=True)
class Batch:
    """S reads (slices of users' histories) of N events in all, and B examples (user, cut) that look at them.

    Reads are sorted by length, longest first; a read may be empty. Example b sees the first `visible_B[b]` events of
    read `read_B[b]`. Labels by task: float32 [B] (NaN: not asked), int64 [B] (-1: not asked) or SetLabels.
    """

    offsets_S: Tensor  # int64 [S + 1]: event range of each read
    previous_S: Tensor  # int64 seconds: time of the user's last event before the read, or of its first
    time_N: Tensor  # int64 seconds UTC
    fields: dict[str, Tensor]  # category: int64 [N] ids; number: float32 [N] in [0, 1], NaN missing
    lists: dict[str, Jagged]  # `categories` fields: one list per event
    read_B: Tensor  # int64
    visible_B: Tensor  # int64
    cut_B: Tensor  # int64 seconds UTC
    example_B: Tensor  # int64: row among the store's examples
    features_BP: Tensor  # float32 in [0, 1], NaN missing
    bags: dict[str, Jagged]  # counts of ids before the cut, one list per example
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def num_events(self) -> int:
        """N."""
        return self.time_N.shape[0]

    @property
    def num_examples(self) -> int:
        """B."""
        return self.read_B.shape[0]

    def take(self, index: Tensor) -> Batch:
        """The same events, and of the examples those at `index` (int64 [n]), in that order."""
        per_example = ("read_B", "visible_B", "cut_B", "example_B", "features_BP")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[index] for name in per_example},
            bags={name: bag.take(index) for name, bag in self.bags.items()},
            labels={name: take_labels(labels, index) for name, labels in self.labels.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))


def take_labels(labels: Labels, index: Tensor) -> Labels:
    """The labels of the examples at `index` (int64 [n]), in that order."""
    return labels.take(index) if isinstance(labels, SetLabels) else labels[index]


def _places(offsets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of the lists at `index`, and where their elements are."""
    sizes = offsets.diff()[index]
    taken = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    element = torch.arange(int(taken[-1]), device=offsets.device)
    return taken, element + torch.repeat_interleave(offsets[:-1][index] - taken[:-1], sizes)


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _map(getattr(value, f.name), function) for f in dataclasses.fields(value)})
    return value
