from __future__ import annotations

import dataclasses

import torch
from factories import make_batch

from supermoe.data.batch import SetLabels


def test_sizes() -> None:
    batch = make_batch(lengths=(3, 1), examples=((0, 3), (0, 2), (1, 1)))
    assert (batch.num_events, batch.num_examples) == (4, 3)


def test_moving_reaches_every_tensor() -> None:
    """The device `meta` holds no data, so whatever was left behind still has some."""
    batch = make_batch()
    sets = SetLabels(torch.ones(5).bool(), torch.arange(6), torch.arange(5))
    batch = dataclasses.replace(batch, labels={**batch.labels, "sets": sets})
    moved = batch.to("meta")
    assert moved.time_N.is_meta
    assert moved.fields["value"].is_meta
    assert moved.lists["tags"].ids.is_meta
    assert moved.bags["type_28d"].weights is not None
    assert moved.bags["type_28d"].weights.is_meta
    assert moved.lists["tags"].weights is None
    assert moved.labels["age"].is_meta
    assert moved.labels["sets"].asked_B.is_meta
    assert not batch.time_N.is_meta
