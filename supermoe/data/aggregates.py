"""What can be counted in packed histories without being told how: the aggregates that `auto` features derive, and bags.

Everything is computed for a chunk of examples at once, from the events that each of them may see. Letters: N events of
the chunk laid end to end, B examples, R rows (events inside the window of each example, an event once per example that
sees it), M moments (distinct times of a user).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from supermoe.data.schema import FIRST_ID, PADDING
from supermoe.typed_yaml import ALL_TIME, format_duration

DAY = 86_400
MONTH = 28 * DAY  # counts over all time are given per 28 days, so that they mean the same at every cut
FEW_VALUES = 8  # numbers are also looked at by the values of fields with so few


@dataclass(frozen=True)
class Values:
    """Ids of one category field: one per event, or lists of them (`offsets` [N + 1])."""

    ids: np.ndarray
    size: int  # ids run from 0 to size - 1
    names: list[str]  # of the values with ids 2, 3, ...; empty for hashed fields
    offsets: np.ndarray | None = None

    def per_event(self, number_N: np.ndarray) -> np.ndarray:
        """A number per event -> the number of the event that each id belongs to."""
        return number_N if self.offsets is None else np.repeat(number_N, np.diff(self.offsets))


@dataclass(frozen=True)
class History:
    """A chunk's events, and those that each example may see: rows `start_B[b]:end_B[b]`, all before `cut_B[b]`."""

    user_N: np.ndarray  # rising
    time_N: np.ndarray  # int64 seconds UTC, rising within a user
    categories: dict[str, Values]
    numbers: dict[str, np.ndarray]  # float64 [N] as they stand in the log, NaN missing
    start_B: np.ndarray
    end_B: np.ndarray
    user_B: np.ndarray
    cut_B: np.ndarray

    def only(self, keep_N: np.ndarray) -> History:
        """The same examples over the events for which `keep_N` holds."""
        before = np.concatenate([[0], np.cumsum(keep_N)])
        return replace(
            self,
            user_N=self.user_N[keep_N],
            time_N=self.time_N[keep_N],
            categories={name: _keep(values, keep_N) for name, values in self.categories.items()},
            numbers={name: values[keep_N] for name, values in self.numbers.items()},
            start_B=before[self.start_B],
            end_B=before[self.end_B],
        )

    def begin(self, window: int) -> np.ndarray:
        """First row of each example that lies within `window` seconds before its cut."""
        if window == ALL_TIME or not len(self.time_N):
            return self.start_B
        low, high = self.time_N.min(), self.time_N.max()
        span = high - low + 2  # so that (user, time) is one rising number
        edge_B = np.clip(self.cut_B - window, low, high + 1)
        row_B = np.searchsorted(self.user_N * span + (self.time_N - low), self.user_B * span + (edge_B - low))
        return np.clip(row_B, self.start_B, self.end_B)

    def is_first_of(self, unit: int) -> np.ndarray:
        """Bool [N]: is the event its user's first one in its second (unit 1) or day (unit DAY)."""
        slot = self.time_N // unit
        return np.concatenate([[True], (np.diff(slot) != 0) | (np.diff(self.user_N) != 0)])[: len(slot)]

    @cached_property
    def moment_N(self) -> np.ndarray:
        """The moment that each event belongs to."""
        return np.cumsum(self.is_first_of(1)) - 1


def _keep(values: Values, keep_N: np.ndarray) -> Values:
    if values.offsets is None:
        return replace(values, ids=values.ids[keep_N])
    offsets = np.concatenate([[0], np.cumsum(np.diff(values.offsets)[keep_N])])
    return replace(values, ids=values.ids[values.per_event(keep_N)], offsets=offsets)


def once_per_moment(history: History, values: Values) -> Values:
    """The ids with repeats inside a moment taken out: buying three of a kind is one choice."""
    key = values.per_event(history.moment_N) * values.size + values.ids
    first = np.unique(key, return_index=True)[1]
    ids = np.full_like(values.ids, PADDING)
    ids[first] = values.ids[first]
    return replace(values, ids=ids)


@dataclass(frozen=True)
class Window:
    """The events of each example that lie inside a window: rows `begin_B[b]:end_B[b]`."""

    begin_B: np.ndarray
    end_B: np.ndarray

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows [R], the example that each belongs to [R])."""
        return expand(self.begin_B, self.end_B)

    def sums(self, values_N: np.ndarray) -> np.ndarray:
        """Sum per example, of its own values only, so that a user's sums are the same in every chunk."""
        return self._reduce(np.add, values_N, 0.0)

    def total_and_mean(self, values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sum, mean) per example of the values that are not NaN; a mean of none is NaN."""
        is_known = ~np.isnan(values_N)
        if not is_known.any():
            return np.zeros(len(self.begin_B)), np.full(len(self.begin_B), np.nan)
        total, before = self.sums(np.where(is_known, values_N, 0.0)), np.concatenate([[0], np.cumsum(is_known)])
        return total, ratio(total, before[self.end_B] - before[self.begin_B])

    def largest(self, values_N: np.ndarray) -> np.ndarray:
        """Largest value per example that is not NaN, NaN where there is none."""
        return self._reduce(np.fmax, values_N, np.nan)

    def _reduce(self, function: np.ufunc, values_N: np.ndarray, nothing: float) -> np.ndarray:
        if not len(self.begin_B):
            return np.zeros(0)
        ranges = np.stack([self.begin_B, self.end_B], 1).ravel()
        found = function.reduceat(np.append(values_N, nothing), ranges)[::2]
        return np.where(self.end_B > self.begin_B, found, nothing)

    def distinct(self, history: History, unit: int) -> np.ndarray:
        """Number of seconds (unit 1) or days (unit DAY) with an event, per example."""
        is_first = history.is_first_of(unit)
        before = np.concatenate([[0], np.cumsum(is_first)])
        inside = before[self.end_B] - before[self.begin_B] + ~np.append(is_first, True)[self.begin_B]
        return np.where(self.end_B > self.begin_B, inside, 0)

    def count(self, values: Values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Known ids per example -> (example, id, count), sorted by (example, id)."""
        if values.offsets is None:
            rows, owner = self.rows
        else:
            rows, owner = expand(values.offsets[self.begin_B], values.offsets[self.end_B])
        ids = values.ids[rows]
        known = ids >= FIRST_ID
        key = owner[known] * values.size + ids[known]
        if len(self.begin_B) * values.size <= 4 * len(key):
            dense = np.bincount(key)
            found = np.flatnonzero(dense)
            counts = dense[found]
        else:
            found, counts = np.unique(key, return_counts=True)
        return found // values.size, found % values.size, counts


def expand(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges -> (rows [R], index of the range that each belongs to [R])."""
    length = end - begin
    owner = np.repeat(np.arange(len(length)), length)
    return np.arange(len(owner)) + (begin - np.cumsum(length) + length)[owner], owner


def bag(window: Window, values: Values, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The up to `limit` most frequent ids of each example -> (length of each bag [B], ids rising in a bag, counts)."""
    owner, ids, counts = window.count(values)
    length = np.bincount(owner, minlength=len(window.end_B))
    if len(length) and length.max() > limit:
        order = np.lexsort((ids, -counts, owner))
        rank = np.arange(len(order)) - np.repeat(np.cumsum(length) - length, length)
        kept = np.sort(order[rank < limit])
        ids, counts, length = ids[kept], counts[kept], np.minimum(length, limit)
    return length, ids.astype(np.int32), counts.astype(np.float32)


def window_aggregates(history: History, seconds: int, small: int) -> dict[str, np.ndarray]:
    """Counts, sums, means, distinct values in a window; fields of up to `small` values are counted value by value."""
    window, tag = Window(history.begin(seconds), history.end_B), format_duration(seconds)
    scale = _per_month(history) if seconds == ALL_TIME else np.ones(len(history.end_B))
    moments = window.distinct(history, 1)
    columns = {
        f"events_{tag}": (window.end_B - window.begin_B) * scale,
        f"moments_{tag}": moments * scale,
        f"days_{tag}": window.distinct(history, DAY) * scale,
    }
    for name, values_N in history.numbers.items():
        total, columns[f"mean_{name}_{tag}"] = window.total_and_mean(values_N)
        columns[f"sum_{name}_{tag}"] = total * scale
        columns[f"per_moment_{name}_{tag}"] = ratio(total, moments)
    for name, values_N in _by_value(history, ["event"]):
        total, columns[f"mean_{name}_{tag}"] = window.total_and_mean(values_N)
        columns[f"sum_{name}_{tag}"] = total * scale
    for name, values in history.categories.items():
        owner, ids, counts = window.count(values)
        columns[f"distinct_{name}_{tag}"] = np.bincount(owner, minlength=len(scale)).astype(np.float64)
        if 0 < len(values.names) <= small:
            dense = np.zeros((len(scale), values.size))
            dense[owner, ids] = counts
            for index, value in enumerate(values.names):
                columns[f"count_{name}={value}_{tag}"] = dense[:, FIRST_ID + index] * scale
    return columns


def _per_month(history: History) -> np.ndarray:
    """Factor that turns counts over all of an example's history into counts per 28 days."""
    since_first = history.cut_B - np.append(history.time_N, 0)[history.start_B]
    return MONTH / np.maximum(since_first, MONTH)


def _by_value(history: History, fields: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Numbers where a field has one of its values, NaN elsewhere; of fields with few values."""
    for field in fields:
        values = history.categories.get(field)
        if values is None or values.offsets is not None or not 0 < len(values.names) <= FEW_VALUES:
            continue
        for index, value in enumerate(values.names):
            here_N = values.ids == FIRST_ID + index
            for name, values_N in history.numbers.items():
                yield f"{name}_{field}={value}", np.where(here_N, values_N, np.nan)


def lifetime_numbers(history: History) -> dict[str, np.ndarray]:
    """Of every number, over all before the cut: last, largest, spread; last and mean by the values of small fields."""
    window, columns = Window(history.start_B, history.end_B), {}
    for name, values_N in history.numbers.items():
        mean, square = (window.total_and_mean(powers_N)[1] for powers_N in (values_N, values_N * values_N))
        columns[f"last_{name}"] = _last(history, values_N)
        columns[f"largest_{name}"] = window.largest(values_N)
        columns[f"std_{name}"] = _deviation(mean, square)
    for name, values_N in _by_value(history, history.categories):
        columns[f"last_{name}"] = _last(history, values_N)
        columns[f"mean_{name}"] = window.total_and_mean(values_N)[1]
    return columns


def _last(history: History, values_N: np.ndarray) -> np.ndarray:
    """The latest value that each example sees and that is not NaN, else NaN."""
    row_B = _last_row(history, ~np.isnan(values_N))
    return np.where(row_B >= history.start_B, np.append(values_N, np.nan)[row_B], np.nan)


def _last_row(history: History, keep_N: np.ndarray) -> np.ndarray:
    """The last row up to each example's last one for which `keep_N` holds; it may be another user's; -1 without."""
    rows = np.maximum.accumulate(np.where(keep_N, np.arange(len(keep_N)), -1))
    return np.append(rows, -1)[history.end_B - 1]


def lifetime_aggregates(history: History) -> dict[str, np.ndarray]:
    """Recency, rhythm and calendar over everything before the cut; times in days."""
    start, end = history.start_B, history.end_B
    columns = {"since_last": _since(history, end - 1), "since_first": _since(history, start)}
    if "event" in history.categories:
        types = history.categories["event"]
        for index, name in enumerate(types.names):
            columns[f"since_last_{name}"] = _since(history, _last_row(history, types.ids == FIRST_ID + index))
    columns |= _rhythm(history, columns["since_last"])
    rows, owner = expand(start, end)
    time = history.time_N[rows]
    for label, slot, size in (("hour", time % DAY // 10_800, 8), ("weekday", (time // DAY + 3) % 7, 7)):
        counts = np.bincount(owner * size + slot, minlength=len(end) * size).reshape(len(end), size)
        columns |= {f"{label}{index}": ratio(counts[:, index], end - start) for index in range(size)}
    return columns


def _rhythm(history: History, since_last_B: np.ndarray) -> dict[str, np.ndarray]:
    """Gaps between the moments of each example, in days."""
    time_M = history.time_N[history.is_first_of(1)]
    gap_M = np.diff(time_M, prepend=time_M[:1]) / DAY  # before each moment; at a user's first one it is never read
    moment_N = np.append(history.moment_N, 0)
    seen = history.end_B > history.start_B
    begin = np.where(seen, moment_N[np.where(seen, history.start_B, 0)] + 1, 0)
    gaps = Window(begin, np.where(seen, moment_N[history.end_B - 1] + 1, 0))
    number = gaps.end_B - gaps.begin_B
    mean = ratio(gaps.sums(gap_M), number)
    square = ratio(gaps.sums(gap_M * gap_M), number)
    return {
        "gap_mean": mean,
        "gap_std": _deviation(mean, square),
        "gap_last": np.where(number > 0, np.append(gap_M, 0.0)[gaps.end_B - 1], np.nan),
        "since_last_per_gap": since_last_B / np.maximum(mean, 0.1),
    }


def _deviation(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Standard deviation from the means of values and of their squares."""
    return np.sqrt(np.maximum(square - mean * mean, 0))


def _since(history: History, row_B: np.ndarray) -> np.ndarray:
    """Days from event `row_B` to the cut; NaN where the row is not among those that the example sees."""
    seen = (row_B >= history.start_B) & (row_B < history.end_B)
    return np.where(seen, (history.cut_B - np.append(history.time_N, 0)[np.where(seen, row_B, 0)]) / DAY, np.nan)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is zero."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
