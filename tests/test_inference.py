from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny import CUT, DIM

from supermoe.serving.artifact import Artifact
from supermoe.serving.inference import embeddings, instants, outputs, user_ids, vectors
from supermoe.serving.population import Request, open_source, serving_store
from supermoe.typed_yaml import parse_instant


def test_outputs_come_once_for_every_example_and_land_in_their_rows(model_folder: Path) -> None:
    artifact = Artifact.load(model_folder)
    with serving_store(artifact, Request(open_source(artifact), parse_instant(CUT))) as store:
        found = embeddings(artifact, store)
        rows = [row for batch, _ in outputs(artifact, store) for row in batch.example_B.tolist()]
        for batch, output in outputs(artifact, store):
            assert not output.user_BD.requires_grad
            # asked alone or with the tasks' questions: products of other sizes round otherwise
            np.testing.assert_allclose(found[batch.example_B, :DIM], output.user_BD, rtol=1e-5, atol=1e-5)
        assert sorted(rows) == list(range(len(found)))
        users = user_ids(store).to_pylist()
    assert users == sorted(set(users))
    assert len(users) == len(found)


def test_instants() -> None:
    column = instants(np.array([0, 1_606_780_800]), missing=np.array([True, False]))
    assert column.type == pa.timestamp("us", tz="UTC")
    assert [None if value is None else value.isoformat() for value in column.to_pylist()] == [
        None,
        "2020-12-01T00:00:00+00:00",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_keep_rows_together(dtype: str) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert vectors(values, dtype).to_pylist() == [[0, 1, 2], [3, 4, 5]]
    assert vectors(values[:0], dtype).type.list_size == 3
