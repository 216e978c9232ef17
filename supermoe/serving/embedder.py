"""The whole Python API of serving: a model folder and a frame of events in, one vector per user out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from supermoe.data.fields import NULLS
from supermoe.data.schema import Schema
from supermoe.data.sources import Frames
from supermoe.data.sql import quote
from supermoe.data.tables import SourceTables
from supermoe.serving.artifact import Artifact
from supermoe.serving.inference import embedding_table
from supermoe.serving.population import Request, serving_store
from supermoe.typed_yaml import UserError, parse_instant


class Embedder:
    """A loaded model that turns events into user vectors; needs neither the trainer nor the objectives.

    >>> vectors = Embedder.load("runs/quickstart/model").embed(events)
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact

    @classmethod
    def load(cls, folder: Path | str) -> Embedder:
        """Read a model folder; `UserError` where it is damaged or of another version, see `Artifact.load`."""
        return cls(Artifact.load(folder))

    @property
    def model_id(self) -> str:
        """The content hash that every row carries; vectors of different ids must not be mixed."""
        return self.artifact.model_id

    def embed(
        self, events: Any, users: Any = None, as_of: Any = None, columns: Mapping[str, str] | None = None
    ) -> pd.DataFrame:
        """Vectors of all users in `users` or with an event before `as_of`, ordered by user id.

        Args:
            events: pandas frame, Arrow table or DuckDB relation with the columns `user`, `time` and the model's fields;
                fields that it lacks are missing (null) in every event, under one warning.
            users: a frame with a column `user`, or just ids: users who get a row also without any event.
            as_of: date, time or seconds UTC; only events strictly before it are read. Default: all events.
            columns: our names -> the frames' own, where they differ.
        Returns:
            user_id, embedding (float32 [D]), as_of, last_event_time, n_events, is_cold (no event, hence the cold
            vector), model_id.
        Raises:
            UserError: naming the column and row of what cannot be read.
        """
        if users is not None and not hasattr(users, "columns"):
            users = pa.table({"user": pa.array(users)})
        source = Frames(events=events, users=users, columns=columns)
        request = Request(_Completed(source, self.artifact.schema), _instant(source, as_of))
        with serving_store(self.artifact, request, everyone=True) as store:
            return embedding_table(self.artifact, store, "float32").to_pandas()


class _Completed:
    """Frames with the fields that they lack, empty. Files are not completed: a nightly job should not lose a column."""

    def __init__(self, source: Frames, schema: Schema):
        self.source, self.schema = source, schema

    def attach(self, con: duckdb.DuckDBPyConnection) -> SourceTables:
        """Views of the source's views, as they are where the events have none of the fields: that is refused later."""
        whole = self.source.attach(con)
        have = {row[0] for row in con.execute(f"DESCRIBE {whole.events}").fetchall()}
        absent = {name: field.kind for name, field in self.schema.fields.items() if name not in have}
        if not absent or not (have - {"event"}) & self.schema.fields.keys():
            return whole
        warnings.warn(f"the events lack {', '.join(absent)}, which the model reads: taken as missing", stacklevel=2)
        nulls = ", ".join(f"CAST(NULL AS {NULLS[kind]}) AS {quote(name)}" for name, kind in absent.items())
        con.execute(f"CREATE TEMP VIEW completed_events AS SELECT *, {nulls} FROM {whole.events}")
        return replace(whole, events="completed_events")


def _instant(source: Frames, as_of: Any) -> int:
    """Seconds UTC of `as_of`, or of the second after the last event."""
    if as_of is not None:
        try:
            return parse_instant(as_of)
        except ValueError as error:
            raise UserError(f"as_of: {error}") from None
    with duckdb.connect() as con:
        last = con.execute(f'SELECT epoch(max(time)) FROM "{source.attach(con).events}"').fetchall()[0][0]
    if last is None:
        raise UserError("as_of: there is no event to take the date from; give one, for example as_of='2017-12-31'")
    return math.floor(last) + 1
