"""Whose vectors or scores are asked for: a date, a log, a shard of its users, and the store prepared from them."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb

from supermoe.config import Eligible
from supermoe.data.disk import writing
from supermoe.data.prepare import prepare_serving
from supermoe.data.sources import Files, UserFiles
from supermoe.data.store import Store
from supermoe.data.tables import SourceTables
from supermoe.serving.artifact import Artifact
from supermoe.serving.publication import parse_shard
from supermoe.typed_yaml import UserError, build, parse_instant, validate


@dataclass(frozen=True)
class Request:
    """The users of `source` that are in shard `shard` of `shards`, from their events before `as_of` (seconds UTC)."""

    source: Any
    as_of: int
    shard: int = 0
    shards: int = 1

    def share(self, rank: int, size: int) -> Request:
        """The part of this request that one of `size` processes does."""
        return replace(self, shard=self.shard * size + rank, shards=self.shards * size)

    @classmethod
    def parse(cls, artifact: Artifact, args: argparse.Namespace) -> Request:
        """From a command line with the arguments of `add_arguments`."""
        try:
            as_of = parse_instant(args.as_of)
        except ValueError as error:
            raise UserError(f"--as-of: {error}") from None
        shard, shards = parse_shard(args.shard)
        return cls(open_source(artifact, args.events, args.users), as_of, shard, shards)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `predict` and `export` have in common."""
    parser.add_argument("model", type=Path, help="model folder of a run")
    parser.add_argument(
        "--as-of", required=True, help="date such as 2017-12-31; only events strictly before it are read"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--events", nargs="+", help="event files or patterns; default: the source in the model's config"
    )
    parser.add_argument("--users", help="users file that goes with --events")
    parser.add_argument("--shard", default="0/1", metavar="i/n", help="do the i-th of n parts of the users, i from 0")


def open_source(artifact: Artifact, events: list[str] | None = None, users: str | None = None) -> Any:
    """The source of the model's config, or the given files.

    Where the config's source is files, the given ones are read like them (columns, zones, items); otherwise they must
    have the columns `user`, `time` and the model's fields.
    """
    config = artifact.config.data.source
    if events is None:
        if users is not None:
            raise UserError("--users needs --events: without it both come from the source in the model's config")
        return build("supermoe.data.sources", config)
    if not isinstance(config, Files.Config):
        return Files(validate(Files.Config, {"events": events, "users": users}, "--events, --users"))
    readings = config.events * len(events) if len(config.events) == 1 else config.events
    if len(readings) != len(events):
        raise UserError(
            f"--events: the model was trained on {len(readings)} sets of event files; give as many, in that order"
        )
    given = [reading.model_copy(update={"path": path}) for reading, path in zip(readings, events, strict=True)]
    people = users and (config.users.model_copy(update={"path": users}) if config.users else UserFiles(path=users))
    return Files(config.model_copy(update={"events": given, "users": people, "tables": {}}))


class ShardOfUsers:
    """A source's users whose id hashes to one of n buckets, with their events."""

    def __init__(self, source: Any, shard: int, shards: int):
        self.source, self.shard, self.shards = source, shard, shards

    def attach(self, con: duckdb.DuckDBPyConnection) -> SourceTables:
        """Views of the source's views; see `supermoe/data/sources.py`."""
        whole = self.source.attach(con)
        return replace(
            whole,
            events=self._filter(con, whole.events),
            users=whole.users and self._filter(con, whole.users),
            tables={name: self._filter(con, view) for name, view in whole.tables.items()},
        )

    def fingerprint(self) -> None:
        """Nothing made of a shard is kept."""
        return None

    def _filter(self, con: duckdb.DuckDBPyConnection, view: str) -> str:
        # md5 is the same in every version and on every machine; DuckDB's own hash need not be
        bucket = f"('0x' || substr(md5(CAST(\"user\" AS VARCHAR)), 1, 15))::BIGINT % {self.shards}"
        con.execute(f'CREATE TEMP VIEW "shard_{view}" AS SELECT * FROM "{view}" WHERE {bucket} = {self.shard}')
        return f"shard_{view}"


@contextlib.contextmanager
def serving_store(
    artifact: Artifact,
    request: Request,
    scratch: Path | None = None,
    *,
    everyone: bool = False,
    conditions: Mapping[str, Eligible] | None = None,
) -> Iterator[Store]:
    """The users of a request as a store with one example each; removed at the end. `scratch` is where to build it.

    Users that `data.splits.eligible` leaves out, such as those without events, are left out here too unless `everyone`
    is asked for. `conditions`: see `prepare_serving`.
    """
    source = request.source if request.shards == 1 else ShardOfUsers(request.source, request.shard, request.shards)
    if scratch is not None:
        with writing(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".serving-", dir=scratch) as folder:
        yield prepare_serving(
            source,
            artifact.schema,
            artifact.vocab,
            artifact.config,
            request.as_of,
            Path(folder) / "store",
            everyone=everyone,
            conditions=conditions,
        )
