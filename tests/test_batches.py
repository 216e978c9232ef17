"""Reads, packing, order and ranks of the loader, on a store made by hand in memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from supermoe.data.batches import Batches, plan_reads, ranges
from supermoe.data.store import SPLITS, IdLists

LENGTHS = [5, 0, 12, 1, 30, 7]


@pytest.fixture
def store():
    """Six users; every user has examples that see a third, two thirds and all of the history."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    user = np.repeat(np.arange(len(LENGTHS)), 3)
    visible = np.stack([np.array(LENGTHS) // 3, 2 * np.array(LENGTHS) // 3, LENGTHS], 1).ravel()
    n = len(user)
    bag = IdLists(np.arange(n + 1) * 2, np.arange(2 * n, dtype=np.int32), counts=np.ones(2 * n, np.float32))
    sets = IdLists(np.arange(n + 1), np.arange(n, dtype=np.int32), asked=np.ones(n, bool))
    return SimpleNamespace(
        offsets_U=offsets,
        time=np.concatenate([np.sort(rng.integers(0, 1000, k)) for k in LENGTHS]),
        columns={"item": np.arange(offsets[-1], dtype=np.int32) + 2, "price": rng.random(offsets[-1], np.float32)},
        lists={"tags": IdLists(np.arange(offsets[-1] + 1), np.arange(offsets[-1], dtype=np.int32))},
        examples=SimpleNamespace(user=user, visible=visible, cut=visible * 10, split=np.full(n, SPLITS["train"])),
        labels={"y": np.arange(n, dtype=np.float32), "s": sets},
        features=np.arange(n * 2, dtype=np.float32).reshape(n, 2),
        bags={"b": bag},
    )


def make(store, **kwargs):
    return Batches(store, "train", **{"max_events": 8, "tokens_per_batch": 16, **kwargs})


def test_every_example_sees_its_own_last_events(store):
    seen = []
    for batch in make(store, shuffle=True).epoch(3):
        for b in range(batch.num_examples):
            row = int(batch.example_B[b])
            begin = int(batch.offsets_S[batch.read_B[b]])
            items = batch.fields["item"][begin : begin + int(batch.visible_B[b])] - 2
            end = store.offsets_U[store.examples.user[row]] + store.examples.visible[row]
            own = np.arange(end - len(items), end)
            assert items.tolist() == own.tolist()
            assert len(items) >= min(8, store.examples.visible[row]) * 0.5
            assert batch.labels["y"][b] == row
            assert batch.features_BP[b].tolist() == [2 * row, 2 * row + 1]
            assert batch.labels["s"].ids[batch.labels["s"].offsets[b]] == row
            assert batch.bags["b"].ids[batch.bags["b"].offsets[b]] == 2 * row
            seen.append(row)
    assert sorted(seen) == list(range(len(store.examples.user)))


def test_reads_are_sorted_by_length_and_know_the_time_before_them(store):
    for batch in make(store, shuffle=True).epoch(0):
        length = batch.offsets_S.diff()
        assert (length[1:] <= length[:-1]).all()
        for s in range(len(length)):
            if length[s]:
                first = int(batch.fields["item"][batch.offsets_S[s]]) - 2
                begins = first in store.offsets_U[:-1]
                assert batch.previous_S[s] == store.time[first if begins else first - 1]


def test_the_order_depends_on_seed_and_epoch_alone_and_resumes_anywhere(store):
    loader = make(store, shuffle=True, seed=5)
    whole = [b.example_B.tolist() for b in loader.epoch(2)]
    assert [b.example_B.tolist() for b in make(store, shuffle=True, seed=5).epoch(2, start=2)] == whole[2:]
    assert whole != [b.example_B.tolist() for b in loader.epoch(3)]
    assert len(whole) == len(loader)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_deal_out_the_same_batches_and_end_together(store, ranks):
    """A step's batches do not depend on the number of ranks; who has none left takes an empty one."""
    whole = [[b.example_B.tolist() for b in step] for step in make(store, shuffle=True).steps(1, size=3)]
    assert [len(step) for step in whole] == [3] * (len(whole) - 1) + [len(make(store)) - 3 * (len(whole) - 1)]
    loaders = [make(store, shuffle=True, rank=r, world_size=ranks) for r in range(ranks)]
    assert {len(loader) for loader in loaders} == {len(make(store))}
    for step, *shares in zip(whole, *(loader.steps(1, size=3) for loader in loaders), strict=True):
        assert {len(share) for share in shares} == {-(-len(step) // ranks)}
        dealt = [share[i].example_B.tolist() for i in range(len(shares[0])) for share in shares]
        assert dealt == step + [[]] * (len(dealt) - len(step))
    parts = [[b.example_B for b in loader.epoch(0)] for loader in loaders]
    assert len({len(p) for p in parts}) == 1
    rows = torch.cat([row for part in parts for row in part])
    assert sorted(rows.tolist()) == list(range(len(store.examples.user)))


def test_steps_resume_anywhere(store):
    steps = [[b.example_B.tolist() for b in step] for step in make(store, shuffle=True).steps(2, size=2)]
    again = [[b.example_B.tolist() for b in step] for step in make(store, shuffle=True).steps(2, size=2, start=1)]
    assert again == steps[1:]


def test_a_batch_keeps_to_its_budget(store):
    for batch in make(store, tokens_per_batch=10).epoch(0):
        assert batch.num_events <= 10 + 8
    for batch in make(store, examples_per_batch=2, tokens_per_batch=10**6).epoch(0):
        assert batch.num_examples <= 2 + 3


def test_an_example_far_back_gets_a_read_of_its_own():
    read, start, end = plan_reads(np.array([0, 0, 0]), np.array([10, 90, 100]), max_events=20)
    assert read.tolist() == [0, 1, 1]
    assert start.tolist() == [0, 80]
    assert end.tolist() == [10, 100]


def test_no_examples_give_no_batches(store):
    loader = Batches(store, "test", max_events=8, tokens_per_batch=16)
    assert len(loader) == 0
    assert list(loader.epoch(0)) == []


def test_ranges_lay_slices_end_to_end():
    rows, offsets = ranges(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert rows.tolist() == [5, 6, 9, 10, 11]
    assert offsets.tolist() == [0, 2, 2, 5]
