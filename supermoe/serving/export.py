"""Embeddings of a whole population as Parquet parts with a manifest: the table that other teams read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from supermoe.serving.artifact import Artifact
from supermoe.serving.inference import embedding_table
from supermoe.serving.population import Request, serving_store
from supermoe.serving.publication import Publication, schema_of
from supermoe.typed_yaml import format_instant


def export(artifact: Artifact, request: Request, out: Path) -> Path:
    """Write the embeddings of a request's users under `out` and return the manifest's path.

    Rows are ordered by user id within a shard. A folder that holds vectors of another model or date is refused.
    """
    dtype, rows = artifact.config.export.dtype, artifact.config.export.rows_per_part
    identity = {
        "kind": "embeddings",
        "model_id": artifact.model_id,
        "as_of": format_instant(request.as_of),
        "dtype": dtype,
        "dim": artifact.model.embedding_dim,
    }
    publication = Publication(out, identity, request.shard, request.shards)
    with serving_store(artifact, request, out) as store:
        table = embedding_table(artifact, store, dtype)
    for part, start in enumerate(range(0, max(table.num_rows, 1), rows)):
        piece = table.slice(start, rows)
        publication.write(publication.name("part", part), piece, norm=norms(piece))
    return publication.finish(schema=schema_of(table))


def norms(table) -> dict[str, float]:
    """Smallest, mean and largest Euclidean norm of a part's vectors; what a consumer checks before trusting it."""
    column = table["embedding"].combine_chunks()
    values = (
        column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), column.type.list_size)
    )
    norm = np.linalg.norm(values, axis=1) if len(values) else np.zeros(1)
    return {"min": float(norm.min()), "mean": float(norm.mean()), "max": float(norm.max())}
