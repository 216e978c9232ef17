"""Files and folders that appear whole or not at all, a disk that refuses them, and what is read back damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe.data.sql import complaint
from supermoe.typed_yaml import UserError

REMEDY = "free space, or choose another place, then run the same command again"


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the operating system or DuckDB refuse inside the block, which writes to `place`, into a `UserError`.

    Such as a full disk, a missing right, or a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot write {place}: {error.strerror or error}{file}; {REMEDY}") from error
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{place}: out of memory, or of disk for spilling ({complaint(error)}); raise `data.memory_limit`, free "
            f"space there, or point `data.store` at a larger disk"
        ) from None
    except duckdb.IOException as error:
        raise UserError(f"{place}: {complaint(error)}; {REMEDY}") from None


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write a file or folder to; it takes the name `path` once the block has ended well.

    A full disk, a missing right and the like become a `UserError`; what was written by then is removed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            _swap(beside, path)
    finally:
        remove(beside)


def publish_text(path: Path, text: str) -> None:
    """Publish a small text file."""
    with publishing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: Path, remedy: str, *keys: str) -> Any:
    """Content of a JSON file; a `UserError` with the remedy where it is missing, broken, or lacks one of the keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path} has no key '{key}'; {remedy}")
    return content


def read_table(path: Path, remedy: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file or some of its columns; a `UserError` with the remedy where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"cannot read {path}: it is missing; {remedy}")
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {path}: {error}; {remedy}") from None


def _swap(beside: Path, path: Path) -> None:
    """Rename `beside` to `path`; a folder cannot be renamed over a full one, so the old one steps aside first."""
    if not path.is_dir():
        os.replace(beside, path)
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    os.replace(path, aside)
    os.replace(beside, path)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file or folder, which may never have been there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
