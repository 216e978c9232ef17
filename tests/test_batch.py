from __future__ import annotations

import dataclasses
import itertools

import torch
from factories import make_batch

from supermoe.data.batch import Jagged, SetLabels


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


def test_examples_are_picked_and_events_stay() -> None:
    batch = make_batch(lengths=(3, 1), examples=((0, 3), (0, 2), (1, 1)))
    sets = SetLabels(torch.tensor([True, False, True]), torch.tensor([0, 2, 2, 3]), torch.tensor([4, 5, 6]))
    batch = dataclasses.replace(batch, labels={**batch.labels, "sets": sets})
    index = torch.tensor([2, 0])
    taken = batch.take(index)
    assert taken.time_N is batch.time_N
    assert taken.num_examples == 2
    for name in ("read_B", "visible_B", "cut_B", "example_B", "features_BP"):
        torch.testing.assert_close(getattr(taken, name), getattr(batch, name)[index], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(taken.labels["age"], batch.labels["age"][index])
    assert taken.labels["sets"].asked_B.tolist() == [True, True]
    assert taken.labels["sets"].ids.tolist() == [6, 4, 5]
    for name, bag in batch.bags.items():
        assert as_lists(taken.bags[name]) == [as_lists(bag)[i] for i in index]
    assert batch.take(index[:0]).num_examples == 0


def as_lists(bag: Jagged) -> list[list[tuple[int, float]]]:
    """Every list's ids and weights."""
    assert bag.weights is not None
    pairs = list(zip(bag.ids.tolist(), bag.weights.tolist(), strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(bag.offsets.tolist())]
