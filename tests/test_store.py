"""The store's files: written in pieces, published by renaming, checked when opened."""

from __future__ import annotations

import errno
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe.data.schema import BagSchema, FieldSchema, LabelSchema, Schema
from supermoe.data.store import Store, StoreWriter
from supermoe.typed_yaml import UserError

SCHEMA = Schema(
    fields={
        "item": FieldSchema(kind="category", size=9),
        "tags": FieldSchema(kind="categories", size=5),
        "price": FieldSchema(kind="number"),
    },
    features=["f"],
    bags={"bag": BagSchema(field="item", window=86400, size=9, max_ids=4)},
    labels={
        "y": LabelSchema(kind="number"),
        "c": LabelSchema(kind="class", num_classes=2),
        "s": LabelSchema(kind="set"),
    },
)


def fill(writer):
    """Two users with 2 and 1 events, one example each."""
    with writer.column("events/time", np.int64) as column:
        column.append(np.array([10, 20]))
        column.append(np.array([15]))
    writer.write("events/item", np.array([2, 3, 1], np.int32))
    writer.write("events/tags", np.array([2, 4], np.int32))
    writer.write("events/tags.offsets", np.array([0, 1, 1, 2]))
    writer.write("events/price", np.array([0.5, np.nan, 1.0], np.float32))
    pq.write_table(pa.table({"user": ["a", "b"], "offset": [0, 2], "length": [2, 1]}), writer.folder / "users.parquet")
    for name, values in (("user", [0, 1]), ("cut", [30, 30]), ("visible", [2, 1])):
        writer.write(f"examples/{name}", np.array(values))
    writer.write("examples/split", np.array([0, 2], np.int8))
    with writer.column("examples/features", np.float32, width=1) as column:
        column.append(np.array([[0.25], [0.75]], np.float32))
    for part, values in (("offsets", [0, 1, 1]), ("ids", [3]), ("counts", [2.0])):
        writer.write(f"examples/bags/bag.{part}", np.array(values))
    writer.write("examples/labels/y", np.array([1.0, np.nan], np.float32))
    writer.write("examples/labels/c", np.array([1, -1], np.int32))
    for part, values in (("offsets", [0, 2, 2]), ("ids", [0, 1]), ("asked", [True, True])):
        writer.write(f"examples/labels/s.{part}", np.array(values))


@pytest.fixture
def path(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        fill(writer)
        writer.finish(SCHEMA, "mark", {"users": 2})
    return tmp_path / "store"


def test_everything_is_read_back_as_memory_maps(path):
    store = Store.open(path)
    assert (store.schema, store.fingerprint, store.summary) == (SCHEMA, "mark", {"users": 2})
    assert store.offsets_U.tolist() == [0, 2, 3]
    assert store.time.tolist() == [10, 20, 15]
    assert isinstance(store.time, np.memmap)
    assert set(store.columns) == {"item", "price"}
    assert store.lists["tags"].offsets.tolist() == [0, 1, 1, 2]
    assert store.examples.visible.tolist() == [2, 1]
    assert store.rows_of("test").tolist() == [1]
    assert store.features.tolist() == [[0.25], [0.75]]
    assert store.bags["bag"].counts.tolist() == [2.0]
    assert store.labels["c"].tolist() == [1, -1]
    assert store.labels["s"].asked.tolist() == [True, True]
    assert store.users["user"].to_pylist() == ["a", "b"]
    with pytest.raises(ValueError, match="read-only"):
        store.time[0] = 1


@pytest.mark.parametrize("width", [None, 0, 3])
def test_columns_of_any_length_are_plain_npy(tmp_path, width):
    shape = () if width is None else (width,)
    with StoreWriter(tmp_path / "store") as writer:
        for total in (0, 5):
            with writer.column("events/x", np.float32, width) as column:
                for _ in range(total):
                    column.append(np.ones((1, *shape), np.float32))
            found = np.load(writer.folder / "events/x.npy")
            assert found.shape == (total, *shape)
            assert (found == 1).all()
            assert (writer.folder / "events/x.npy").stat().st_size % 64 == found.nbytes % 64  # rows start aligned


def test_blocks_are_the_column_in_pieces(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        writer.write("events/x", np.arange(5))
        assert [block.tolist() for block in writer.blocks("events/x", 2)] == [[0, 1], [2, 3], [4]]


def test_an_error_leaves_nothing_and_keeps_the_old_store(path):
    with pytest.raises(ZeroDivisionError), StoreWriter(path) as writer:
        writer.column("events/time", np.int64).append(np.arange(3 // 0))
    assert Store.open(path).fingerprint == "mark"
    assert [p.name for p in path.parent.iterdir()] == ["store"]


def test_a_new_store_takes_the_place_of_the_old_one(path):
    with StoreWriter(path) as writer:
        fill(writer)
        assert writer.finish(SCHEMA, "new", {}).fingerprint == "new"
    assert [p.name for p in path.parent.iterdir()] == ["store"]


def test_a_full_disk_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space left"), StoreWriter(tmp_path / "store"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_store_is_never_overwritten(tmp_path):
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(UserError, match=r"is not a store.*data\.store"), StoreWriter(tmp_path):
        pass
    assert (tmp_path / "photo.jpg").exists()


def damage_truncate(path):
    (path / "events/item.npy").write_bytes((path / "events/item.npy").read_bytes()[:-4])


def damage_remove(path):
    (path / "examples/cut.npy").unlink()


def damage_version(path):
    marks = json.loads((path / "fingerprint.json").read_text())
    (path / "fingerprint.json").write_text(json.dumps({**marks, "version": 99}))


def damage_json(path):
    (path / "fingerprint.json").write_text("{")


def damage_half(path):
    (path / "fingerprint.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, ["events/item.npy has", "damaged", "prepare"]),
        (damage_remove, ["examples/cut.npy is missing", "prepare"]),
        (damage_version, ["store format 99", "prepare"]),
        (damage_json, ["fingerprint.json", "not valid JSON", "prepare"]),
        (damage_half, ["fingerprint.json", "No such file", "prepare"]),
    ],
)
def test_a_damaged_store_is_refused_with_file_and_remedy(path, damage, words):
    damage(path)
    with pytest.raises(UserError) as error:
        Store.open(path)
    for word in words:
        assert word in str(error.value)


def test_no_store_at_all(tmp_path):
    with pytest.raises(UserError, match="no store here"):
        Store.open(tmp_path / "store")
