"""The store: a folder of memory-mapped columns that a run trains from, and its writer.

    schema.json  fingerprint.json  summary.json  users.parquet  vocab/
    events/time.npy  events/<field>.npy  (lists: events/<field>.offsets.npy beside the ids)
    examples/{user,cut,visible,split,features}.npy  examples/labels/  examples/bags/

Events lie in (user, time, file order); user u owns the rows `offsets_U[u]:offsets_U[u + 1]`, so any slice of any
history is zero-copy and a store larger than memory trains.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from supermoe.data.disk import read_json, read_table
from supermoe.data.schema import Schema
from supermoe.data.splits import SPLITS
from supermoe.typed_yaml import UserError, validate

FORMAT_VERSION = 2  # of the files, and of the rules by which features and fields are derived
UTC = pa.timestamp("us", tz="UTC")
REMEDY = "delete the folder and prepare it again with `python -m supermoe.prepare --config ...`"


@dataclass(frozen=True)
class IdLists:
    """Lists of ids laid end to end: list i is `ids[offsets[i]:offsets[i + 1]]`; bags have `counts`, sets `asked`."""

    offsets: np.ndarray  # int64 [n + 1]
    ids: np.ndarray  # int32
    counts: np.ndarray | None = None  # float32
    asked: np.ndarray | None = None  # bool [n]


def is_asked(label: np.ndarray | IdLists) -> np.ndarray:
    """Which examples have a label: a number, the id of a class, or a set that is asked, be it empty -> bool [n]."""
    if isinstance(label, IdLists):
        return np.asarray(label.asked)
    return ~np.isnan(label) if label.dtype.kind == "f" else label >= 0


@dataclass(frozen=True)
class Examples:
    """The questions, sorted by (user, cut): user row, cut in seconds UTC, number of events before it, split code."""

    user: np.ndarray
    cut: np.ndarray
    visible: np.ndarray
    split: np.ndarray


class Store:
    """An opened store. All arrays are read-only memory maps: opening costs no memory, forked workers share pages."""

    def __init__(self, path: Path, schema: Schema, fingerprint: str, summary: dict[str, Any]):
        self.path, self.schema, self.fingerprint, self.summary = path, schema, fingerprint, summary

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open a finished store; a missing, half-written, truncated or foreign one is a `UserError` naming the file."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: there is no store here; run `python -m supermoe.prepare --config ...` first.")
        marks = read_json(path / "fingerprint.json", REMEDY, "version")
        if marks["version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: store format {marks['version']}, this version of supermoe reads {FORMAT_VERSION}; {REMEDY}"
            )
        for name, size in marks["files"].items():
            actual = (path / name).stat().st_size if (path / name).is_file() else None
            if actual != size:
                state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise UserError(f"{path / name} {state}: the store is damaged; {REMEDY}.")
        described = read_json(path / "schema.json", REMEDY)
        schema = validate(Schema, described, f"{path / 'schema.json'} is damaged, {REMEDY}")
        return cls(path, schema, marks["fingerprint"], read_json(path / "summary.json", REMEDY))

    def array(self, name: str) -> np.ndarray:
        """Memory map of <name>.npy, for example `events/time`."""
        return _memory_map(self.path / f"{name}.npy")

    @property
    def vocab(self) -> Path:
        """Folder of the fitted vocabularies and knots, see `supermoe/data/vocab.py`."""
        return self.path / "vocab"

    @cached_property
    def users(self) -> pa.Table:
        """users.parquet: user (own type), offset, length, attributes; row = user row."""
        return read_table(self.path / "users.parquet", REMEDY)

    @cached_property
    def offsets_U(self) -> np.ndarray:
        """int64 [U + 1]: event rows of each user."""
        table = read_table(self.path / "users.parquet", REMEDY, ["length"])
        return np.concatenate([[0], np.cumsum(table["length"].to_numpy())])

    @cached_property
    def time(self) -> np.ndarray:
        """int64 [M] seconds UTC of every event."""
        return self.array("events/time")

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Per category field int32 ids [M], per number field float32 [M] in [0, 1] with NaN for missing."""
        return {name: self.array(f"events/{name}") for name, f in self.schema.fields.items() if f.kind != "categories"}

    @cached_property
    def lists(self) -> dict[str, IdLists]:
        """Per field of kind `categories`: one list of ids per event."""
        names = [name for name, f in self.schema.fields.items() if f.kind == "categories"]
        return {name: IdLists(self.array(f"events/{name}.offsets"), self.array(f"events/{name}")) for name in names}

    @cached_property
    def examples(self) -> Examples:
        """Who is asked, when, and in which split."""
        return Examples(*(self.array(f"examples/{name}") for name in ("user", "cut", "visible", "split")))

    def rows_of(self, split: str) -> np.ndarray:
        """Rows of the examples of one split."""
        return np.flatnonzero(np.asarray(self.examples.split) == SPLITS[split])

    @property
    def prepared(self) -> Store:
        """The store as it was prepared: this one, unless it only stands for another."""
        return self

    def who_and_when(self, rows: np.ndarray) -> pa.Table:
        """What names examples outside of the store: the columns user_id (the user's own type) and cut."""
        user = self.users["user"].take(pa.array(np.asarray(self.examples.user)[rows]))
        cut = pa.array(np.asarray(self.examples.cut)[rows] * 1_000_000, pa.int64()).cast(UTC)
        return pa.table({"user_id": user, "cut": cut})

    @cached_property
    def features(self) -> np.ndarray:
        """float32 [n, P] in [0, 1], NaN missing."""
        return self.array("examples/features")

    @cached_property
    def bags(self) -> dict[str, IdLists]:
        """Per bag: ids and counts of each example."""
        folder = "examples/bags"
        return {
            name: IdLists(*(self.array(f"{folder}/{name}.{part}") for part in ("offsets", "ids", "counts")))
            for name in self.schema.bags
        }

    @cached_property
    def labels(self) -> dict[str, np.ndarray | IdLists]:
        """Per task: float32 (NaN: not asked), int32 (-1: not asked), or sets of classes."""
        return {name: self._label(f"examples/labels/{name}", label.kind) for name, label in self.schema.labels.items()}

    def _label(self, name: str, kind: str) -> np.ndarray | IdLists:
        if kind != "set":
            return self.array(name)
        return IdLists(self.array(f"{name}.offsets"), self.array(f"{name}.ids"), asked=self.array(f"{name}.asked"))


def _memory_map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable column of a store ({error}); {REMEDY}.") from None


class Column:
    """A .npy file of [n] values, or [n, width], written piece by piece; its header is completed by `close`."""

    _HEADER = 128  # bytes; room for any length, so that the final header fits where the first one stood

    def __init__(self, path: Path, dtype: Any, width: int | None = None):
        self.dtype, self.length, self._row = np.dtype(dtype), 0, () if width is None else (width,)
        self._file = path.open("wb")
        self._file.write(b" " * self._HEADER)

    def append(self, values: np.ndarray) -> None:
        """Write n more values or rows."""
        assert values.shape[1:] == self._row
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Write the header; until then the file does not load."""
        text = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {(self.length, *self._row)}, }}"
        prefix = np.lib.format.magic(1, 0) + (self._HEADER - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(prefix + text.ljust(self._HEADER - 11).encode() + b"\n")
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file as it is."""
        with suppress(OSError):  # closing flushes, which a full disk refuses once more
            self._file.close()

    def __enter__(self) -> Column:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close() if kind is None else self.abandon()


class StoreWriter:
    """Builds a store in a hidden sibling folder of `path` that `finish` moves into place, never half-written.

    Used in `with`: on an error the sibling folder is removed.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.folder = self.path.parent / f".{self.path.name}.writing"
        self._columns: list[Column] = []

    def __enter__(self) -> StoreWriter:
        """Make the sibling folder; a `UserError` where `path` is not a store, as nothing else is ever overwritten."""
        if self.path.exists() and not (self.path / "fingerprint.json").is_file() and not _is_empty_folder(self.path):
            raise UserError(
                f"{self.path} exists and is not a store; give another folder under `data.store`, or remove it."
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("events", "examples/labels", "examples/bags", "vocab", "scratch"):
            (self.folder / name).mkdir(parents=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for column in self._columns:
            column.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def scratch(self) -> Path:
        """Folder for sorted Parquet and spill files; gone when the store is finished."""
        return self.folder / "scratch"

    def column(self, name: str, dtype: Any, width: int | None = None) -> Column:
        """Start <name>.npy of [n] values, or [n, width], to be written in pieces."""
        column = Column(self.folder / f"{name}.npy", dtype, width)
        self._columns.append(column)
        return column

    def write(self, name: str, values: np.ndarray) -> None:
        """Write <name>.npy at once."""
        np.save(self.folder / f"{name}.npy", values, allow_pickle=False)

    def read(self, name: str) -> np.ndarray:
        """Memory map of a column that was written before."""
        return _memory_map(self.folder / f"{name}.npy")

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """A column written before, `rows` rows at a time; mapped anew for each, so that only one is resident."""
        for first in range(0, len(self.read(name)), rows):
            yield np.array(self.read(name)[first : first + rows])

    def finish(self, schema: Schema, fingerprint: str, summary: dict[str, Any]) -> Store:
        """Write the JSON files and move the folder to its place, over an older store there."""
        shutil.rmtree(self.scratch)
        _write_json(self.folder / "schema.json", schema.model_dump(mode="json"))
        _write_json(self.folder / "summary.json", summary)
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}
        marks = {"version": FORMAT_VERSION, "fingerprint": fingerprint, "files": sizes}
        _write_json(self.folder / "fingerprint.json", marks)
        if self.path.exists():
            old = self.path.parent / f".{self.path.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.path, old)
            os.replace(self.folder, self.path)
            shutil.rmtree(old)
        else:
            os.replace(self.folder, self.path)
        return Store.open(self.path)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
