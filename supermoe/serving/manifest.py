"""What every published folder shares: files that appear whole or not at all, and a manifest.json of what is there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supermoe.typed_yaml import UserError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write a file or folder to; it takes the name `path` once the block has ended well.

    A full disk, a missing right and the like become a `UserError`; what was written by then is removed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _swap(beside, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; free space or choose another folder, then run again"
        ) from error
    finally:
        _remove(beside)


def _swap(beside: Path, path: Path) -> None:
    """Rename `beside` to `path`; a folder cannot be renamed over a full one, so the old one steps aside first."""
    if not path.is_dir():
        os.replace(beside, path)
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    os.replace(path, aside)
    os.replace(beside, path)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Publish a small JSON file."""
    with publishing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str) -> Any:
    """Content of a JSON file; a `UserError` with the remedy where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
