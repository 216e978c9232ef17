"""Inputs declared over windows before the cut: SQL aggregates, aggregates derived from the fields, bags of values.

Numbers become columns of `examples/features.npy`, quantile-normalised to [0, 1] with knots fitted on the training
examples; bags become ids with counts. Training and serving run this same code, so they agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from supermoe.config import FeatureConfig
from supermoe.data.aggregates import (
    History,
    Values,
    Window,
    bag,
    lifetime_aggregates,
    lifetime_numbers,
    once_per_moment,
    window_aggregates,
)
from supermoe.data.chunks import Chunk, history_rows
from supermoe.data.expressions import EXAMPLE, check, check_events, evaluate, of_types, over_nothing
from supermoe.data.schema import BagSchema
from supermoe.data.splits import SPLITS
from supermoe.data.sql import quote
from supermoe.data.staging import Staged
from supermoe.data.store import StoreWriter
from supermoe.data.vocab import Vocabularies, Vocabulary, normalise, quantile_knots
from supermoe.typed_yaml import UserError, format_duration, nearest

SMALL_VOCABULARY = 64  # `auto` counts the values of smaller fields one by one, and makes bags of larger ones
MIN_VARIED_ROWS, MIN_VARIED_SHARE = 500, 0.02  # a column must differ in this many training examples, or in this share
FIT_ROWS = 50_000  # training examples that knots are fitted on, evenly spread where there are more
BLOCK_ROWS = 8_192  # rows at a time of the pass that normalises


class Features:
    """Computes the groups chunk by chunk: `add` every chunk in order, then `finish`.

    `knots`: name -> knots of a fitted model, whose columns are then written in that order; None to fit them here.
    `copied`: fields that labels are about, whose ids are counted in every window.
    """

    def __init__(
        self,
        staged: Staged,
        writer: StoreWriter,
        vocabularies: Vocabularies,
        groups: Mapping[str, FeatureConfig],
        knots: dict[str, np.ndarray] | None,
        copied: Collection[str] = (),
    ):
        self.staged, self.writer, self.groups, self.knots = staged, writer, groups, knots
        self.vocabularies = vocabularies.categories
        self._known = {name: _texts(vocabulary) for name, vocabulary in self.vocabularies.items()}
        _check(staged, self.vocabularies, groups)
        self.bags: dict[str, BagSchema] = {}
        self._bag_writers: dict[str, list[_BagWriter]] = {}
        for group, config in groups.items():
            schemas = _bags_of(group, config, self.vocabularies, copied)
            self.bags |= schemas
            self._bag_writers[group] = [_BagWriter(writer, name, schema) for name, schema in schemas.items()]
        self._raw = writer.scratch / "features.raw"  # the float32 rows as computed
        self._raw.write_bytes(b"")
        self.names: list[str] = []  # of all columns computed
        self._train: list[np.ndarray] = []  # bool per example, chunk by chunk

    def add(self, chunk: Chunk) -> None:
        """Compute the chunk's columns and bags."""
        columns: dict[str, np.ndarray] = {}
        history = self._history(chunk) if any(c.auto or c.bag for c in self.groups.values()) else None
        for group, config in self.groups.items():
            columns |= self._declared(group, config, chunk)
            if history is None:
                continue
            seen = history if config.events is None else history.only(self._of_types(config.events))
            if config.auto:
                columns |= {f"{group}_{name}": values for name, values in _derived(seen, config).items()}
            once = {name: once_per_moment(seen, seen.categories[name]) for name in self._bagged(group)}
            for bag_writer in self._bag_writers[group]:
                bag_writer.append(seen, once)
        self.names = list(columns)
        matrix = np.empty((chunk.num_examples, len(columns)), np.float32)
        for index, values in enumerate(columns.values()):
            matrix[:, index] = values
        with self._raw.open("ab") as file:
            file.write(matrix.data)
        self._train.append(chunk.split_B == SPLITS["train"])

    def finish(self) -> dict[str, np.ndarray]:
        """Fit the knots unless given, write the normalised columns; returns name -> knots of the columns kept.

        Fitted columns that are the same for all training examples, or repeat an earlier one, are left out.
        """
        for writers in self._bag_writers.values():
            for bag_writer in writers:
                bag_writer.close()
        knots = self._fit() if self.knots is None else self.knots
        position = {name: index for index, name in enumerate(self.names)}
        with self.writer.column("examples/features", np.float32, width=len(knots)) as column:
            for _, rows in self._blocks():
                block = np.empty((len(rows), len(knots)), np.float32)
                for index, (name, fitted) in enumerate(knots.items()):
                    block[:, index] = normalise(rows[:, position[name]], fitted)
                column.append(block)
        return knots

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows as computed [n, columns]), read so that no more than a block is in memory."""
        width, size = len(self.names), sum(map(len, self._train))
        for first in range(0, size, BLOCK_ROWS):
            number = min(BLOCK_ROWS, size - first)
            values = np.fromfile(self._raw, np.float32, number * width, offset=first * width * 4)
            yield first, values.reshape(number, width)

    def _fit(self) -> dict[str, np.ndarray]:
        """Knots of the columns that differ among enough of the training examples and from earlier columns."""
        train = np.flatnonzero(np.concatenate([np.zeros(0, bool), *self._train]))
        sample = train[np.linspace(0, max(len(train) - 1, 0), min(len(train), FIT_ROWS)).astype(np.int64)]
        parts = [np.zeros((0, len(self.names)), np.float32)]
        for first, rows in self._blocks():
            parts.append(rows[sample[(sample >= first) & (sample < first + len(rows))] - first])
        matrix, knots, seen = np.concatenate(parts), {}, set()
        for index, name in enumerate(self.names):
            values = matrix[:, index]
            is_new = (content := hash(values.tobytes())) not in seen
            seen.add(content)
            if is_new and _varied(values) >= min(MIN_VARIED_ROWS, MIN_VARIED_SHARE * len(values)):
                knots[name] = quantile_knots(values)
        return knots

    def _history(self, chunk: Chunk) -> History:
        """The chunk's events as arrays: ids from the store's columns, numbers from the log."""
        first, end = int(chunk.offsets[0]), int(chunk.offsets[-1])
        numbers = [
            name
            for name, config in self.staged.fields.items()
            if config.kind == "number" or (config.kind == "category" and self.vocabularies[name].holds_amounts)
        ]
        casts = ", ".join(f"TRY_CAST({quote(name)} AS DOUBLE) AS {quote(name)}" for name in numbers)
        log = self._chunk_columns(casts) if numbers else {}
        local = chunk.user_B - chunk.first_user
        start = chunk.offsets[local] - first
        length = np.diff(chunk.offsets)
        return History(
            user_N=np.repeat(np.arange(len(length)), length),
            time_N=np.asarray(self.writer.read("events/time")[first:end]),
            categories={name: self._values(name, first, end) for name in self.vocabularies},
            numbers={name: np.ma.filled(log[name], np.nan) for name in numbers},
            start_B=start,
            end_B=start + chunk.visible_B,
            user_B=local,
            cut_B=chunk.cut_B,
        )

    def _bagged(self, group: str) -> set[str]:
        """Fields that the group makes bags of."""
        return {bag_writer.schema.field for bag_writer in self._bag_writers[group]}

    def _chunk_columns(self, listed: str) -> dict[str, np.ndarray]:
        return self.staged.con.execute(f"SELECT {listed} FROM chunk_events ORDER BY user_row, position").fetchnumpy()

    def _of_types(self, events: list[str]) -> np.ndarray:
        """Bool per event of the chunk: is it of one of these types."""
        return np.asarray(self._chunk_columns(f"{of_types(events)} AS kept")["kept"], bool)

    def _values(self, name: str, first: int, end: int) -> Values:
        """The chunk's ids of one category field."""
        vocabulary = self.vocabularies[name]
        known = self._known[name]
        if self.staged.fields[name].kind == "category":
            return Values(np.asarray(self.writer.read(f"events/{name}")[first:end]), vocabulary.size, known)
        offsets = np.asarray(self.writer.read(f"events/{name}.offsets")[first : end + 1])
        ids = np.asarray(self.writer.read(f"events/{name}")[offsets[0] : offsets[-1]])
        return Values(ids, vocabulary.size, known, offsets - offsets[0])

    def _declared(self, group: str, config: FeatureConfig, chunk: Chunk) -> dict[str, np.ndarray]:
        """The group's SQL over each of its windows."""
        if not config.sql:
            return {}
        con, key = self.staged.con, f"features.{group}.sql"
        casts = {name: f"CAST(({sql}) AS DOUBLE)" for name, sql in config.sql.items()}
        empty = over_nothing(con, history_rows(config.windows[0], config.events), casts, key)
        columns = {}
        for window in config.windows:
            table = evaluate(con, history_rows(window, config.events), casts, key)
            example = table[EXAMPLE].to_numpy() - chunk.first_example
            for name, nothing in empty.items():
                values = np.full(chunk.num_examples, np.nan if nothing is None else nothing)
                values[example] = table[name].to_numpy()
                if np.isinf(values).any():
                    raise UserError(
                        f"{key}.{name}: the value is infinite for {np.isinf(values).sum()} examples (in: "
                        f"{config.sql[name]}); guard divisions and logarithms, for example with nullif(x, 0)."
                    )
                columns[f"{group}_{name}_{format_duration(window)}"] = values
        return columns


def _derived(history: History, config: FeatureConfig) -> dict[str, np.ndarray]:
    """The columns of an `auto` group."""
    columns: dict[str, np.ndarray] = {}
    for window in config.windows:
        columns |= window_aggregates(history, window, SMALL_VOCABULARY)
    return columns | lifetime_aggregates(history) | lifetime_numbers(history)


def _bags_of(
    group: str, config: FeatureConfig, vocabularies: Mapping[str, Vocabulary], copied: Collection[str]
) -> dict[str, BagSchema]:
    """Declared bags over the declared windows; else an `auto` group's large fields over its two longest windows.

    The fields that labels are about get a bag in every window, for the heads to copy from.
    """
    pairs = [(name, window, True) for name in config.bag for window in config.windows]
    if config.auto and not config.bag:
        longest = sorted(config.windows)[-2:]
        large = {name for name, v in vocabularies.items() if v.values is None or len(v.values) > SMALL_VOCABULARY}
        every = [
            (name, window, name in large and window in longest) for name in vocabularies for window in config.windows
        ]
        pairs = [(name, window, is_input) for name, window, is_input in every if is_input or name in copied]
    return {
        f"{group}_{name}_{format_duration(window)}": BagSchema(
            field=name, window=window, size=vocabularies[name].size, max_ids=config.max_bag, input=is_input
        )
        for name, window, is_input in pairs
    }


def _varied(values: np.ndarray) -> int:
    """How many rows hold something else than the most frequent value; missing is a value too."""
    counts = np.unique(values, return_counts=True)[1]
    return len(values) - int(counts.max(initial=0))


class _BagWriter:
    """One bag's three columns, written chunk by chunk."""

    def __init__(self, writer: StoreWriter, name: str, schema: BagSchema):
        self.schema = schema
        parts = (("offsets", np.int64), ("ids", np.int32), ("counts", np.float32))
        self._columns = [writer.column(f"examples/bags/{name}.{part}", dtype) for part, dtype in parts]
        self._columns[0].append(np.zeros(1, np.int64))
        self._end = 0

    def append(self, history: History, once: Mapping[str, Values]) -> None:
        """Count in how many moments of the window each of the chunk's examples sees an id."""
        window = Window(history.begin(self.schema.window), history.end_B)
        length, ids, counts = bag(window, once[self.schema.field], self.schema.max_ids)
        self._columns[0].append(self._end + np.cumsum(length))
        self._columns[1].append(ids)
        self._columns[2].append(counts)
        self._end += len(ids)

    def close(self) -> None:
        """Complete the files."""
        for column in self._columns:
            column.close()


def _texts(vocabulary: Vocabulary) -> list[str]:
    """The values of a vocabulary as names; none of a hashed field."""
    return [] if vocabulary.values is None else [str(value) for value in vocabulary.values.to_pylist()]


def _check(staged: Staged, vocabularies: Mapping[str, Vocabulary], groups: Mapping[str, FeatureConfig]) -> None:
    """Refuse what can be seen to be wrong before any row is read."""
    for group, config in groups.items():
        for name, sql in config.sql.items():
            check(staged.con, sql, f"features.{group}.sql.{name}")
        for name in config.bag:
            if name not in vocabularies:
                raise UserError(
                    f"features.{group}.bag: '{name}' is not a category field of the events, "
                    f"{nearest(name, vocabularies)}."
                )
        check_events(config.events, staged.event_types, f"features.{group}.events")
