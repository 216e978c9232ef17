"""A folder of Parquet parts that several processes may fill, each its own shard, and one manifest of what is there.

Every shard leaves a small record of its parts; the manifest is the records put together. A shard that is run again
replaces its own parts and nothing else; parts of another model, date or division into shards are refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from supermoe.data.disk import publishing, read_json
from supermoe.serving.manifest import MANIFEST, sha256, write_json
from supermoe.typed_yaml import UserError

RECORDS = ".shards"
REMEDY = "give an empty folder, or remove this one"


class Publication:
    """Parts of one shard of one kind of output (`identity` tells model, date and kind) under `folder`."""

    def __init__(self, folder: Path, identity: dict[str, Any], shard: int = 0, of: int = 1):
        self.folder, self.identity, self.shard, self.of = folder, {**identity, "shards": of}, shard, of
        self.record = folder / RECORDS / f"{shard:05d}.json"
        self.parts: list[dict[str, Any]] = []
        self.replaced: set[str] = set()
        for path in sorted((folder / RECORDS).glob("*.json")):
            self._refuse_other(read_json(path, REMEDY, "identity", "parts")["identity"])
        if self.record.is_file():  # until this run has ended the folder must not look complete
            self.replaced = {part["file"] for part in read_json(self.record, REMEDY)["parts"]}
            self.record.unlink()
            (folder / MANIFEST).unlink(missing_ok=True)

    def _refuse_other(self, found: dict[str, Any]) -> None:
        for key in sorted({*found, *self.identity}):
            if found.get(key) != self.identity.get(key):
                raise UserError(
                    f"{self.folder} already holds output with {key} {found.get(key)}, this run has "
                    f"{key} {self.identity.get(key)}; they cannot be mixed in one folder: {REMEDY}"
                )

    def name(self, stem: str, part: int | None = None) -> str:
        """File name of a part: stem[-shard-of-n][-part].parquet."""
        shard = f"-{self.shard:05d}-of-{self.of:05d}" if self.of > 1 else ""
        return f"{stem}{shard}{'' if part is None else f'-{part:05d}'}.parquet"

    def write(self, name: str, table: pa.Table, **facts: Any) -> None:
        """Publish one part; `facts` go into its entry of the manifest."""
        path = self.folder / name
        with publishing(path) as beside:
            pq.write_table(table, beside, compression="zstd")
            digest = sha256(beside)
        self.parts.append({"file": name, "rows": table.num_rows, "sha256": digest, **facts})

    def finish(self, **facts: Any) -> Path:
        """Record the shard, drop parts that only an earlier run had, and renew the manifest, with `facts` in it."""
        write_json(self.record, {"identity": self.identity, "parts": self.parts})
        for name in self.replaced - {part["file"] for part in self.parts}:
            (self.folder / name).unlink(missing_ok=True)
        written: list[Any] = []
        # Another shard may record itself, and publish a manifest that knows more, while this one is written: look.
        while written != (records := [read_json(path, REMEDY) for path in sorted(self.record.parent.glob("*.json"))]):
            parts = [part for record in records for part in record["parts"]]
            totals = {"complete": len(records) == self.of, "rows": sum(part["rows"] for part in parts)}
            write_json(self.folder / MANIFEST, {**self.identity, **facts, **totals, "parts": parts})
            written = records
        return self.folder / MANIFEST


def make_room(folder: Path, of: int) -> None:
    """Remove output that was divided into another number of shards, which cannot be renewed part by part."""
    for path in sorted((folder / RECORDS).glob("*.json")):
        if read_json(path, REMEDY, "identity")["identity"].get("shards") != of:
            shutil.rmtree(folder)
            return


def parse_shard(text: str) -> tuple[int, int]:
    """'i/n' -> (i, n), with i from 0 to n - 1."""
    index, slash, count = text.partition("/")
    if slash and index.isdigit() and count.isdigit() and int(index) < int(count):
        return int(index), int(count)
    raise UserError(f"--shard {text}: expected i/n with i from 0 to n - 1, for example --shard 0/4")


def schema_of(table: pa.Table) -> dict[str, str]:
    """Column -> Arrow type, as the manifest tells it."""
    return {field.name: str(field.type) for field in table.schema}
