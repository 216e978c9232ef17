"""Batches out of a store: reads that several examples of a user share, packed to a token budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supermoe.data.batch import Batch, Jagged, SetLabels
from supermoe.data.store import SPLITS, IdLists, Store

# An example joins a later example's read if it still sees this share of the events it could see in a read of its own.
MIN_CONTEXT = 0.5


class Batches:
    """The batches of one split, in an order that (seed, epoch) decide alone, so (epoch, index) is the whole position.

    A read is a slice of at most `max_events` events of one user. Examples of the same user whose histories overlap
    share a read, so that several cuts cost one history pass. What a batch holds does not depend on the number of ranks:
    they deal the batches out among themselves, and all take equally many, if need be empty ones.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        *,
        max_events: int,
        tokens_per_batch: int,
        examples_per_batch: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.store, self.seed, self.shuffle = store, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.example = np.flatnonzero(np.asarray(store.examples.split) == SPLITS[split])
        user = np.asarray(store.examples.user)[self.example]
        visible = np.asarray(store.examples.visible)[self.example]
        read, start, end = plan_reads(user, visible, max_events)
        order = np.argsort(read, kind="stable")  # examples grouped by read
        self.example, self.visible = self.example[order], (visible - start[read])[order]
        self.example_offsets = np.concatenate([[0], np.cumsum(np.bincount(read, minlength=len(start)))])
        first_example = self.example_offsets[:-1]
        self.read_first = np.asarray(store.offsets_U)[user[order][first_example]] + start  # among all events
        self.read_length = end - start
        self.has_previous = start > 0
        cost = self.read_length / tokens_per_batch
        if examples_per_batch:
            cost = np.maximum(cost, np.diff(self.example_offsets) / examples_per_batch)
        self._cost = cost + 1e-9
        self._num_batches = max(1, math.ceil(self._cost.sum())) if len(cost) else 0

    def __len__(self) -> int:
        """Batches of one epoch, over all ranks."""
        return self._num_batches

    @property
    def num_examples(self) -> int:
        """Examples of the split, over all ranks."""
        return len(self.example)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from the `start`-th on."""
        for batches in self.steps(epoch, self.world_size, start):
            yield from batches

    def steps(self, epoch: int, size: int, start: int = 0) -> Iterator[list[Batch]]:
        """One epoch in steps of `size` batches, the last one of what is left: this rank's share of each step.

        All ranks' shares of a step are equally long; one that has run out of batches gets empty ones.
        """
        parts = self._parts(epoch)
        nothing = np.zeros(0, np.int64)
        for first in range(start * size, len(parts), size):
            step = parts[first : first + size]
            step += [nothing] * (-len(step) % self.world_size)
            yield [self.collate(reads) for reads in step[self.rank :: self.world_size]]

    def _parts(self, epoch: int) -> list[np.ndarray]:
        """The reads of every batch of one epoch."""
        if self._num_batches == 0:
            return []
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._cost))
        else:
            order = np.argsort(-self.read_length, kind="stable")
        filled = np.cumsum(self._cost[order])
        shares = np.arange(1, self._num_batches) / self._num_batches
        return np.split(order, np.searchsorted(filled, shares * filled[-1]))

    def collate(self, reads: np.ndarray) -> Batch:
        """Pack the given reads, longest first, with all their examples."""
        store = self.store
        reads = reads[np.argsort(-self.read_length[reads], kind="stable")]
        first, length = self.read_first[reads], self.read_length[reads]
        rows, offsets = ranges(first, length)
        picked, picked_offsets = ranges(self.example_offsets[reads], np.diff(self.example_offsets)[reads])
        example = self.example[picked]
        cut = store.examples.cut[example]
        read = np.repeat(np.arange(len(reads)), np.diff(picked_offsets))
        return Batch(
            offsets_S=_tensor(offsets),
            previous_S=_tensor(self._previous(first, length, reads)),
            time_N=_tensor(store.time[rows]),
            fields={
                name: _tensor(column[rows], torch.float32 if column.dtype.kind == "f" else torch.int64)
                for name, column in store.columns.items()
            },
            lists={name: gather_lists(lists, rows) for name, lists in store.lists.items()},
            read_B=_tensor(read),
            visible_B=_tensor(self.visible[picked]),
            cut_B=_tensor(cut),
            example_B=_tensor(example),
            features_BP=_tensor(store.features[example], torch.float32),
            bags={name: gather_lists(bag, example) for name, bag in store.bags.items()},
            labels={name: label_rows(label, example) for name, label in store.labels.items()},
        )

    def _previous(self, first: np.ndarray, length: np.ndarray, reads: np.ndarray) -> np.ndarray:
        """Time of the event before each read, or of its own first event; 0 for a read without events."""
        row = np.where(self.has_previous[reads], first - 1, first)
        previous = np.zeros(len(reads), np.int64)
        previous[length > 0] = self.store.time[row[length > 0]]
        return previous


def plan_reads(user: np.ndarray, visible: np.ndarray, max_events: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group examples into reads.

    `user` [n] and `visible` [n] are sorted by (user, visible). Returns read [n], and per read its start and end in the
    user's history. The last example of a user opens a read that ends where its history ends; earlier ones join it while
    they keep `MIN_CONTEXT` of their own context.
    """
    n = len(user)
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    alone = np.minimum(visible, max_events)
    opener = np.zeros(n, bool)
    start = np.zeros(n, np.int64)  # of the read that the example belongs to
    last = np.flatnonzero(np.append(user[1:] != user[:-1], True))  # one cursor per user, moving back in time
    first = np.append(0, last[:-1] + 1)
    current, cursor = np.maximum(0, visible[last] - max_events), last
    opener[last] = True
    while len(cursor):  # once per example of the busiest user
        start[cursor] = current
        keep = cursor > first
        cursor, first, current = cursor[keep] - 1, first[keep], current[keep]
        opens = (visible[cursor] - current) < np.ceil(MIN_CONTEXT * alone[cursor])
        opener[cursor] = opens
        current = np.where(opens, np.maximum(0, visible[cursor] - max_events), current)
    # an opener is the last example of its read
    read = np.append(0, np.cumsum(opener)[:-1])
    return read, start[opener], visible[opener]


def ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the slices [start, start + length) laid end to end, and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(length)])
    return np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], length), offsets


def gather_lists(lists: IdLists, index: np.ndarray) -> Jagged:
    """The lists at `index`, laid end to end."""
    rows, offsets = ranges(lists.offsets[index], lists.offsets[index + 1] - lists.offsets[index])
    weights = None if lists.counts is None else _tensor(lists.counts[rows], torch.float32)
    return Jagged(_tensor(offsets), _tensor(lists.ids[rows], torch.int64), weights)


def label_rows(label: Any, example: np.ndarray) -> Tensor | SetLabels:
    """A label column at the rows `example`, in the form of `Batch.labels`."""
    if isinstance(label, IdLists):
        assert label.asked is not None, "lists that are labels say who was asked"
        jagged = gather_lists(label, example)
        return SetLabels(_tensor(label.asked[example]), jagged.offsets, jagged.ids)
    return _tensor(label[example], torch.float32 if label.dtype.kind == "f" else torch.int64)


def _tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if dtype is None else tensor.to(dtype)
