"""A loaded model over a serving store: outputs batch by batch, and the table of embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from supermoe.data.batch import Batch
from supermoe.data.batches import Batches
from supermoe.data.store import Store
from supermoe.model.supermoe import Output
from supermoe.serving.artifact import Artifact

TIMESTAMP = pa.timestamp("us", tz="UTC")
EXAMPLES_PER_BATCH = 1024  # a retrieval task holds so many rows of logits over its whole vocabulary
FLOATS = {"float32": pa.float32(), "float16": pa.float16()}


def outputs(artifact: Artifact, store: Store) -> Iterator[tuple[Batch, Output]]:
    """Every example of the split `serve` with all that the model says about it."""
    return ((batch, artifact.model(batch)) for batch in serving_batches(artifact, store))


def serving_batches(artifact: Artifact, store: Store) -> Iterator[Batch]:
    """Every example of the split `serve`, in batches of similar length."""
    config = artifact.config
    batches = Batches(
        store,
        "serve",
        max_events=config.model.max_events,
        tokens_per_batch=config.training.tokens_per_batch,
        examples_per_batch=EXAMPLES_PER_BATCH,
    )
    with tqdm(total=batches.num_examples, unit=" users", desc="encode", delay=2, leave=False) as bar:
        for batch in batches.epoch(0):
            yield batch
            bar.update(batch.num_examples)


def embeddings(artifact: Artifact, store: Store) -> np.ndarray:
    """The vectors of a serving store in the order of its examples, that is, by user id -> float32 [n, D]."""
    found = np.zeros((len(store.examples.cut), artifact.model.embedding_dim), np.float32)
    for batch in serving_batches(artifact, store):
        found[batch.example_B.numpy()] = artifact.model.embed(batch).float().numpy()
    return found


def user_ids(store: Store) -> pa.ChunkedArray:
    """The user id of every example, in the source's own type."""
    return pq.read_table(store.path / "users.parquet", columns=["user"])["user"].take(
        pa.array(np.asarray(store.examples.user))
    )


def instants(seconds: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    """Seconds UTC -> Arrow timestamps; null where `missing`."""
    return pa.array(np.asarray(seconds) * 1_000_000, pa.int64(), mask=missing).cast(TIMESTAMP)


def vectors(values: np.ndarray, dtype: str) -> pa.FixedSizeListArray:
    """[n, D] floats -> a fixed-size list column."""
    flat = pa.array(np.ascontiguousarray(values, dtype=dtype).reshape(-1), FLOATS[dtype])
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def embedding_table(artifact: Artifact, store: Store, dtype: str) -> pa.Table:
    """One row per example: user_id, embedding, as_of, last_event_time (null: none), n_events, is_cold, model_id."""
    n_events = np.asarray(store.examples.visible)
    cold = n_events == 0
    last_row = np.asarray(store.offsets_U)[np.asarray(store.examples.user)] + n_events - 1
    last_time = np.zeros(len(n_events), np.int64)
    last_time[~cold] = store.time[last_row[~cold]]
    return pa.table(
        {
            "user_id": user_ids(store),
            "embedding": vectors(embeddings(artifact, store), dtype),
            "as_of": instants(store.examples.cut),
            "last_event_time": instants(last_time, cold),
            "n_events": n_events,
            "is_cold": cold,
            "model_id": pa.array([artifact.model_id] * len(cold), pa.string()),
        }
    )
