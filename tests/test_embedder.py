from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tiny import CUT, VECTOR, make_log, make_users

from supermoe.serving.artifact import Artifact
from supermoe.serving.embedder import Embedder
from supermoe.serving.export import export
from supermoe.serving.population import Request, open_source
from supermoe.typed_yaml import UserError, parse_instant

# Reads are padded together in other groups when other users are about: fp32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def embedder(model_folder: Path) -> Embedder:
    return Embedder.load(model_folder)


@pytest.fixture(scope="module")
def everyone(embedder: Embedder) -> pd.DataFrame:
    return embedder.embed(make_log(), as_of=CUT)


def vectors(frame: pd.DataFrame) -> np.ndarray:
    return np.stack(list(frame["embedding"]))


def test_the_frame_that_comes_back(everyone: pd.DataFrame, embedder: Embedder) -> None:
    log = make_log()
    past = log[log["time"] < CUT]
    expected = past.groupby("user")["time"].agg(["count", "max"])
    assert list(everyone["user_id"]) == list(expected.index)
    assert list(everyone["n_events"]) == list(expected["count"])
    assert list(everyone["last_event_time"]) == list(expected["max"].dt.tz_localize("UTC"))
    assert set(everyone["as_of"]) == {pd.Timestamp(CUT, tz="UTC")}
    assert set(everyone["model_id"]) == {embedder.model_id}
    assert not everyone["is_cold"].any()
    assert vectors(everyone).dtype == np.float32
    assert vectors(everyone).shape == (len(expected), VECTOR)
    distance = np.linalg.norm(vectors(everyone)[0] - vectors(everyone)[1:], axis=1)
    assert distance.min() > 1e-3


def test_batch_export_gives_the_same_vectors(everyone: pd.DataFrame, model_folder: Path, tmp_path: Path) -> None:
    artifact = Artifact.load(model_folder)
    export(artifact, Request(open_source(artifact), parse_instant(CUT)), tmp_path)
    exported = pd.concat([pd.read_parquet(path) for path in sorted(tmp_path.glob("*.parquet"))], ignore_index=True)
    np.testing.assert_array_equal(vectors(exported), vectors(everyone))
    pd.testing.assert_frame_equal(exported.drop(columns="embedding"), everyone.drop(columns="embedding"))


def test_a_user_is_the_same_alone_and_among_others(everyone: pd.DataFrame, embedder: Embedder) -> None:
    log = make_log()
    alone = embedder.embed(log[log["user"] == "u07"], as_of=CUT)
    np.testing.assert_allclose(vectors(alone), vectors(everyone[everyone["user_id"] == "u07"]), **CLOSE)


def test_a_user_never_seen_has_the_vector_of_a_seen_one_with_the_same_events(
    everyone: pd.DataFrame, embedder: Embedder
) -> None:
    log = make_log()
    stranger = log[log["user"] == "u07"].assign(user="stranger")
    np.testing.assert_allclose(
        vectors(embedder.embed(stranger, as_of=CUT)), vectors(everyone[everyone["user_id"] == "u07"]), **CLOSE
    )


def test_one_event_and_none(embedder: Embedder) -> None:
    one = make_log().head(1)
    found = embedder.embed(one, users=["nobody", *one["user"], "nobody else"], as_of=CUT)
    assert list(found["user_id"]) == ["nobody", "nobody else", *one["user"]]
    assert list(found["n_events"]) == [0, 0, 1]
    assert list(found["is_cold"]) == [True, True, False]
    assert found["last_event_time"].isna().tolist() == [True, True, False]
    cold, same, warm = vectors(found)
    np.testing.assert_array_equal(cold, same)
    assert np.isfinite(cold).all()
    assert np.linalg.norm(cold - warm) > 1e-3


def test_nobody_has_an_event(embedder: Embedder) -> None:
    nothing = make_log().head(0)
    found = embedder.embed(nothing, users=pd.DataFrame({"user": ["a", "b"]}), as_of=CUT)
    assert list(found["is_cold"]) == [True, True]
    with pytest.raises(UserError, match=r"as_of.*no event to take the date from"):
        embedder.embed(nothing, users=["a"])


def test_events_from_the_date_on_change_nothing(everyone: pd.DataFrame, embedder: Embedder) -> None:
    log = make_log()
    later = log.copy()
    later.loc[later["time"] >= CUT, "type"] = "beer"
    pd.testing.assert_frame_equal(embedder.embed(later, as_of=CUT), everyone)
    at_the_cut = pd.concat([log, log.head(1).assign(time=pd.Timestamp(CUT))])
    pd.testing.assert_frame_equal(embedder.embed(at_the_cut, as_of=CUT), everyone)


def test_without_a_date_every_event_is_read(embedder: Embedder) -> None:
    log = make_log()
    found = embedder.embed(log)
    assert found["n_events"].sum() == len(log)
    assert found["as_of"][0] == log["time"].max().tz_localize("UTC") + pd.Timedelta(seconds=1)


def test_arrow_and_duckdb_frames_and_other_names(everyone: pd.DataFrame, embedder: Embedder) -> None:
    log = make_log()
    for frame in (pa.Table.from_pandas(log), duckdb.from_df(log)):
        pd.testing.assert_frame_equal(embedder.embed(frame, users=make_users(), as_of=CUT), everyone)
    renamed = log.rename(columns={"user": "client_id", "time": "ts"})
    found = embedder.embed(renamed, as_of=CUT, columns={"user": "client_id", "time": "ts"})
    pd.testing.assert_frame_equal(found, everyone)


def test_what_cannot_be_read_is_named(embedder: Embedder) -> None:
    log = make_log()
    with pytest.raises(UserError, match=r"no column 'type', which the model reads; .* add it empty"):
        embedder.embed(log[["user", "time"]], as_of=CUT)
    with pytest.raises(UserError, match="no column 'time'"):
        embedder.embed(log.drop(columns="time"), as_of=CUT)
    with pytest.raises(UserError, match=r"as_of: expected a date .* 'yesterday'"):
        embedder.embed(log, as_of="yesterday")


def test_fields_that_a_frame_lacks_are_missing_under_one_warning(embedder: Embedder) -> None:
    log = make_log()
    lacking = ["shop", "value", "tags"]
    empty = log.assign(**dict.fromkeys(lacking))
    with pytest.warns(UserWarning, match="the events lack shop, value, tags, which the model reads") as warned:
        found = embedder.embed(log.drop(columns=lacking), as_of=CUT)
    assert len(warned) == 1
    pd.testing.assert_frame_equal(found, embedder.embed(empty, as_of=CUT))


def test_neither_trainer_nor_objectives_are_loaded(model_folder: Path) -> None:
    code = (
        "import sys; from supermoe.serving.embedder import Embedder; "
        f"Embedder.load({str(model_folder)!r}); "
        "print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('supermoe.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = done.stdout
    assert "serving" in parts
    for part in ("objectives", "training", "distributed"):
        assert part not in parts
