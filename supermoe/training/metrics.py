"""Where the numbers of a run go while it trains: metrics.jsonl, and TensorBoard by option."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from supermoe.data.disk import publish_text
from supermoe.typed_yaml import UserError


class MetricsLog:
    """Appends one JSON object per line; numbers that are not finite become null.

    Opened at a step of a resumed run, it drops the lines of later steps: the file reads as if nothing had happened.
    A `silent` one, of ranks but the first, writes nothing.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False, silent: bool = False):
        self.path = folder / "metrics.jsonl"
        self._file: Any = None
        self._board: Any = None
        if silent:
            return
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        if tensorboard:
            self._board = _tensorboard(folder)
        publish_text(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))  # a kill here loses none
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, kind: str, step: int, **values: Any) -> None:
        """One line `{"kind": ..., "step": ..., **values}`; nested numbers go to TensorBoard under `kind/key/...`."""
        self._write({"kind": kind, "step": step, **finite(values)})
        if self._board is not None:
            for name, value in _scalars(values, kind):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl; a last line that was cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line break is empty or was cut off


def finite(value: Any) -> Any:
    """The same nested value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: Any, prefix: str) -> list[tuple[str, float]]:
    if isinstance(values, dict):
        return [pair for key, item in values.items() for pair in _scalars(item, f"{prefix}/{key}")]
    return [(prefix, float(values))] if isinstance(values, int | float) else []


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "training.tensorboard needs the extra: pip install 'supermoe[tensorboard]', or set it to false"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))
