"""The store of a run's last training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from supermoe.data.merged import MergedStore
from supermoe.data.prepare import prepare
from supermoe.data.sources import Frames
from supermoe.data.store import SPLITS, Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("merged")
    return prepare(tiny.make_config(folder), Frames(events=tiny.make_log(), users=tiny.make_users()))


def test_validation_examples_are_training_examples_and_test_ones_are_not(store: Store) -> None:
    merged = MergedStore(store, ["segment"])
    before, after = np.asarray(store.examples.split), merged.examples.split
    assert len(merged.rows_of("valid")) == 0
    assert np.array_equal(after == SPLITS["train"], before <= SPLITS["valid"])
    assert np.array_equal(merged.rows_of("test"), store.rows_of("test"))
    assert np.array_equal(merged.labels["churn"], store.labels["churn"], equal_nan=True)


def test_attributes_of_validation_users_are_known_at_every_training_cut(store: Store) -> None:
    before, after = np.asarray(store.labels["segment"]), MergedStore(store, ["segment"]).labels["segment"]
    user, split = np.asarray(store.examples.user), np.asarray(store.examples.split)
    assert np.array_equal(after[before >= 0], before[before >= 0])
    validation = np.unique(user[(split == SPLITS["valid"]) & (before >= 0)])
    early = np.isin(user, validation) & (split == SPLITS["train"])
    assert (before[early] == -1).all()
    assert (after[early] >= 0).all()


def test_attributes_of_test_users_stay_unknown(store: Store) -> None:
    before, after = np.asarray(store.labels["segment"]), MergedStore(store, ["segment"]).labels["segment"]
    user, split = np.asarray(store.examples.user), np.asarray(store.examples.split)
    held_out = np.unique(user[(split == SPLITS["test"]) & (before >= 0)])
    assert len(held_out) > 0
    assert (after[np.isin(user, held_out) & (split != SPLITS["test"])] == -1).all()


def test_other_labels_stay_at_their_cuts(store: Store) -> None:
    merged = MergedStore(store, [])
    assert np.array_equal(merged.labels["segment"], store.labels["segment"])


def test_the_store_itself_is_not_changed(store: Store) -> None:
    assert len(MergedStore(store, ["segment"]).labels) == len(store.labels)
    assert len(Store.open(Path(store.path)).rows_of("valid")) > 0
