from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import CUT, VECTOR, make_log, make_model_folder

from supermoe import export
from supermoe.serving import publication
from supermoe.serving.artifact import Artifact
from supermoe.serving.manifest import sha256
from supermoe.serving.population import Request, open_source
from supermoe.typed_yaml import UserError, parse_instant


def run(model: Path, out: Path, *more: str) -> dict:
    export.main([str(model), "--as-of", CUT, "--out", str(out), *more])
    return json.loads((out / "manifest.json").read_text())


def read(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet"))).sort_by("user_id")


@pytest.fixture(scope="module")
def out(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    run(model_folder, folder)
    return folder


def test_the_table_keeps_its_contract(out: Path) -> None:
    table = read(out)
    assert table.schema.types == [
        pa.string(),
        pa.list_(pa.float32(), VECTOR),
        pa.timestamp("us", tz="UTC"),
        pa.timestamp("us", tz="UTC"),
        pa.int64(),
        pa.bool_(),
        pa.string(),
    ]
    log = make_log()
    assert table["user_id"].to_pylist() == sorted(log[log["time"] < CUT]["user"].unique())


def test_the_manifest_is_true(out: Path, model_folder: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["model_id"], manifest["as_of"]) == (Artifact.load(model_folder).model_id, CUT)
    assert (manifest["complete"], manifest["rows"], manifest["dim"]) == (True, read(out).num_rows, VECTOR)
    assert [part["rows"] for part in manifest["parts"]] == [20, manifest["rows"] - 20]  # rows_per_part: 20
    for part in manifest["parts"]:
        assert sha256(out / part["file"]) == part["sha256"]
        vectors = np.stack(pq.read_table(out / part["file"])["embedding"].to_numpy())
        assert part["norm"]["mean"] == pytest.approx(np.linalg.norm(vectors, axis=1).mean(), rel=1e-5)
        assert part["norm"]["min"] <= part["norm"]["mean"] <= part["norm"]["max"]


def test_exporting_again_gives_the_same_bytes(out: Path, model_folder: Path) -> None:
    before = json.loads((out / "manifest.json").read_text())
    assert run(model_folder, out) == before


def test_shards_together_are_the_whole(out: Path, model_folder: Path, tmp_path: Path) -> None:
    assert not run(model_folder, tmp_path, "--shard", "0/2")["complete"]
    manifest = run(model_folder, tmp_path, "--shard", "1/2")
    assert manifest["complete"]
    assert all(part["rows"] for part in manifest["parts"])
    parts, whole = read(tmp_path), read(out)
    assert parts.drop("embedding") == whole.drop("embedding")
    # fp32 sums in another order, as other users share the batch
    np.testing.assert_allclose(*(np.stack(t["embedding"].to_numpy()) for t in (parts, whole)), rtol=1e-4, atol=1e-5)


def test_half_precision(out: Path, model_folder: Path, tmp_path: Path) -> None:
    artifact = Artifact.load(model_folder)
    half = artifact.config.export.model_copy(update={"dtype": "float16"})
    artifact = dataclasses.replace(artifact, config=artifact.config.model_copy(update={"export": half}))
    export.export(artifact, Request(open_source(artifact), parse_instant(CUT)), tmp_path)
    table = read(tmp_path)
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), VECTOR)
    found = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    np.testing.assert_allclose(found, np.stack(read(out)["embedding"].to_numpy()), rtol=1e-3, atol=1e-3)  # 11 bits


def test_two_models_are_not_mixed_in_one_folder(model_folder: Path, tmp_path: Path) -> None:
    run(model_folder, tmp_path / "out")
    (tmp_path / "other").mkdir()
    other = make_model_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"model_id {Artifact.load(model_folder).model_id}.*cannot be mixed"):
        run(other, tmp_path / "out")
    with pytest.raises(UserError, match="already holds output with as_of"):
        export.main([str(model_folder), "--as-of", "2020-11-01", "--out", str(tmp_path / "out")])


def test_a_full_disk_leaves_nothing_that_looks_complete(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table, written = pq.write_table, []

    def fills_up(table: pa.Table, where: Path, **options: str) -> None:
        if written:
            where.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(where)
        write_table(table, where)

    monkeypatch.setattr(publication.pq, "write_table", fills_up)
    with pytest.raises(UserError, match=r"part-00001\.parquet: No space left on device; free space"):
        run(model_folder, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"part-00000.parquet"}
