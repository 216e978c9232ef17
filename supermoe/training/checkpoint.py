"""Checkpoints: folders that are whole or absent, found again by the same command.

A checkpoint holds the tensors in the format of torch.distributed.checkpoint, and `checkpoint.json` with the rest:
format version, position, config, and the size and CRC-32 of every file. It is written beside its place and renamed when
it is complete, all in the background. Sharded weights appear in it whole, so that it loads on any number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from supermoe.data.disk import remove
from supermoe.distributed.mesh import World
from supermoe.typed_yaml import UserError

VERSION = 2
MANIFEST = "checkpoint.json"

# Keys of the config that may change between two starts of one run: where things lie, what is drawn, how often is saved.
FREE_KEYS = (
    "run",
    "data.store",
    "data.memory_limit",
    "data.threads",
    "report",
    "export",
    "training.max_minutes",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.tensorboard",
    "training.threads",
    "training.backend",
    "distributed",
)


class Checkpoints:
    """The checkpoints of one run, `step_<n>` folders under `folder`; the last `keep` stay.

    All ranks of the `world` write their parts of one checkpoint, in the background: `save` takes a copy and returns,
    and what went wrong is told by the next `save` or `wait`, to all ranks alike. `identity` is the run's resolved
    config as plain data, plus whatever else must not change within a run.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any], world: World | None = None):
        self.folder, self.keep, self.identity, self.world = folder, keep, identity, world or World()
        self._group = self.world.new_group()  # collectives of the background must not mix with those of training
        self._writing: threading.Thread | None = None
        self._failure: str | None = None

    def save(self, step: int, tensors: dict[str, Any], progress: dict[str, Any]) -> None:
        """Begin to write a checkpoint: nested tensors, and progress as plain data that JSON keeps.

        Raises:
            UserError: when the one before could not be written, such as on a full disk; earlier checkpoints stay.
        """
        self.wait()
        state = BlockingAsyncStager().stage(tensors)
        manifest = {"version": VERSION, "step": step, "identity": self.identity, "progress": dict(progress)}
        self._writing = threading.Thread(target=self._write, args=(step, state, manifest))
        self._writing.start()

    def wait(self) -> None:
        """Return when what was begun is written; raises as `save` does."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise UserError(failure)

    @contextlib.contextmanager
    def finished(self) -> Iterator[None]:
        """Leave the block only when all is written, also by an error, which then counts more."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(UserError):
                self.wait()
            raise
        self.wait()

    def _write(self, step: int, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Write beside, rename when complete; runs on all ranks, in the background."""
        path = self.folder / f"step_{step:08d}"
        beside = path.with_name(f".{path.name}.writing")
        failure = None
        try:
            with self.world.watch(lambda: f"the checkpoint {path}"):
                self._do(lambda: _make_empty(beside))
                with _quiet():
                    dcp.save(state, checkpoint_id=str(beside), process_group=self._group, no_dist=self._group is None)
                manifest["files"] = self._fingerprints(beside)
                self._do(lambda: self._publish(beside, path, manifest))
        except UserError as error:
            failure = str(error)
        except (OSError, RuntimeError, CheckpointException) as error:
            failure = (
                f"cannot write the checkpoint {path}: {_reason(error)}; free space or choose another `run` folder; "
                f"earlier checkpoints are untouched, the same command continues from them"
            )
            if self.world.is_first:
                remove(beside)
        self._failure = failure

    def _do(self, work: Callable[[], None]) -> None:
        """Do something on the first rank; where it fails, all ranks raise."""
        told: list[str | None] = [None]
        if self.world.is_first:
            try:
                work()
            except OSError as error:
                told = [_reason(error)]
        if self._group is not None:
            dist.broadcast_object_list(told, 0, group=self._group)
        if told[0] is not None:
            raise OSError(told[0])

    def _fingerprints(self, folder: Path) -> dict[str, list[int]]:
        """Of all files; every rank reads its share of them."""
        files = sorted(folder.iterdir())[self.world.rank :: self.world.size]
        shares: list[Any] = [{file.name: _fingerprint(file) for file in files}]
        if self._group is not None:
            shares *= self.world.size
            dist.all_gather_object(shares, shares[0], group=self._group)
        return {name: found for share in shares for name, found in share.items()}

    def _publish(self, beside: Path, path: Path, manifest: dict[str, Any]) -> None:
        (beside / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(beside, path)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The last whole checkpoint and its progress, or None if there is none at all; the same on all ranks.

        A damaged one is passed over with a warning; what a killed run has half written is removed. Raises `UserError`
        if all are damaged, if another version wrote it, or if the config has changed since.
        """
        self.wait()
        return self.world.gather(self.world.first(self._latest))[0]

    def _latest(self) -> tuple[Path, dict[str, Any]] | None:
        for half in self.folder.glob(".*.writing"):
            remove(half)
        steps = self._steps()
        for path in reversed(steps):
            manifest = _read_whole(path)
            if manifest is not None:
                self._check(path, manifest)
                return path, manifest["progress"]
        if steps:
            raise UserError(
                f"{self.folder}: every checkpoint is damaged; delete this folder to start the run from its beginning"
            )
        return None

    def load(self, path: Path, tensors: dict[str, Any]) -> None:
        """Fill nested tensors in place from a checkpoint."""
        try:
            with _quiet():
                dcp.load(tensors, checkpoint_id=str(path), process_group=self._group, no_dist=self._group is None)
        except (OSError, RuntimeError, ValueError, CheckpointException) as error:
            raise UserError(
                f"cannot load the checkpoint {path}: {_reason(error)}; delete it to continue from the one before"
            ) from error

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def _check(self, path: Path, manifest: dict[str, Any]) -> None:
        if manifest["version"] != VERSION:
            raise UserError(
                f"{path} has checkpoint format {manifest['version']}, this version of supermoe reads {VERSION}: "
                f"continue with the version that wrote it, or choose another `run` folder"
            )
        changed = changes(manifest["identity"], self.identity)
        if changed:
            raise UserError(
                f"the run in {self.folder.parent} was started with another config: {'; '.join(changed)}. Restore these "
                f"values to continue it, or choose another `run` folder"
            )


def changes(saved: Any, current: Any, key: str = "") -> list[str]:
    """What differs between two nested mappings, one line per key; `FREE_KEYS` may differ."""
    if key in FREE_KEYS or saved == current:
        return []
    if isinstance(saved, dict) and isinstance(current, dict):
        prefix = f"{key}." if key else ""
        names = [*saved, *(name for name in current if name not in saved)]
        return [line for name in names for line in changes(saved.get(name), current.get(name), f"{prefix}{name}")]
    return [f"{key} was {saved!r:.60} and is now {current!r:.60}"]


def _reason(error: BaseException) -> str:
    """What an error says; torch puts a traceback before it, and errors of other ranks into one of its own."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"{_reason(cause)} (rank {rank})"
    return getattr(error, "strerror", None) or str(error).rstrip().splitlines()[-1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that there is no process group; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _fingerprint(file: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _read_whole(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None with a warning if any of its files is not what was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:  # the files of another version are not ours to judge
            return manifest
        damaged = [name for name, expected in manifest["files"].items() if _fingerprint(path / name) != expected]
        problem = f"the content of {damaged[0]} is not what was written" if damaged else ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error)
    if not problem:
        return manifest
    warnings.warn(f"the checkpoint {path} is damaged ({problem}): continuing from the one before", stacklevel=3)
    return None
