"""From a config to a store, again from the same config, and the same walk in serving; and the command."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from supermoe import cli
from supermoe.config import RunConfig
from supermoe.data.prepare import fingerprint, prepare, prepare_serving
from supermoe.data.sources import Files, Frames
from supermoe.data.store import Store
from supermoe.prepare import main
from supermoe.typed_yaml import UserError, apply_override, validate

DAYS = 120


def log(seed=0, num_users=30):
    """Events of some users over 120 days from 2020-01-01."""
    rng = np.random.default_rng(seed)
    size = num_users * 40
    seconds = rng.integers(0, DAYS * 86400, size)
    return pd.DataFrame(
        {
            "user": rng.integers(0, num_users, size),
            "time": pd.Timestamp("2020-01-01") + pd.to_timedelta(seconds, unit="s"),
            "event": rng.choice(["buy", "see"], size),
            "item": rng.choice([f"i{n}" for n in range(20)], size),
            "price": rng.random(size).round(3),
        }
    )


RAW = {
    "data": {
        "source": {"type": "files", "events": "log.csv", "users": "users.csv"},
        "splits": {"type": "time", "train": ["2020-02-01", "2020-02-15"], "valid": "2020-03-01", "test": "2020-03-15"},
        "memory_limit": "300MB",
        "threads": 1,
    },
    "features": {
        "money": {"windows": ["14d", "all"], "sql": {"spend": "sum(price)", "times": "count(*)"}, "bag": ["item"]},
    },
    "tasks": {
        "active": {"type": "binary", "label": {"window": "14d", "sql": "count(*) > 3", "empty": False}},
        "spend": {"type": "regression", "label": {"window": "14d", "sql": "sum(price)", "empty": 0}},
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log().to_csv("log.csv", index=False)
    pd.DataFrame({"user": [0, 99], "age": ["old", "young"]}).to_csv("users.csv", index=False)
    return tmp_path


def config(*overrides):
    raw = {"run": "run", **RAW}
    for text in overrides:
        raw = apply_override(raw, text)
    return validate(RunConfig, raw, "test")


def test_the_store_holds_what_the_config_asks_for(folder, capsys):
    store = prepare(config())
    printed = capsys.readouterr().out
    frame = log().sort_values(["user", "time"], kind="stable")
    assert store.users["user"].to_pylist() == [*range(30), 99]
    assert (
        store.time.tolist()
        == (frame["time"].astype("int64") // (10**9 if "ns" in str(frame["time"].dtype) else 10**6)).tolist()
    )
    values = np.array([None, None, *pd.read_parquet(store.vocab / "item.parquet")["value"]])
    assert values[store.columns["item"]].tolist() == frame["item"].tolist()
    assert set(store.columns) == {"event", "item", "price"}
    assert store.schema.labels.keys() == {"active", "spend"}
    assert store.features.shape == (len(store.examples.cut), len(store.schema.features))
    assert store.summary["events"] == 1200
    for words in ("users     31", "1,200 from 2020-01-01", "buy", "item: kind category", "active", "no leak found"):
        assert words in printed
    assert json.loads((store.path / "summary.json").read_text()) == store.summary


def test_an_unchanged_store_is_used_again_and_a_changed_one_made_anew(folder, capsys):
    prepare(config())
    capsys.readouterr()
    prepare(config("data.memory_limit=400MB", "model.dim=32"))
    assert "up to date" in capsys.readouterr().out
    prepare(config("tasks.spend=null"))
    assert "prepared anew, as the source or the sections" in capsys.readouterr().out
    log(seed=1).to_csv("log.csv", index=False)
    assert prepare(config("tasks.spend=null")).summary["events"] == 1200
    assert "prepared anew" in capsys.readouterr().out


def test_a_damaged_store_is_made_anew(folder, capsys):
    store = prepare(config())
    (store.path / "events/time.npy").write_bytes(b"")
    assert len(prepare(config()).time) == 1200
    assert "damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    [
        "data.fields.item=category",
        "data.splits.valid=2020-03-02",
        "features.money.windows=[7d]",
        "tasks.active.label.window=7d",
        "tasks.active.eligible={window: 7d}",
        "loss.pretraining={again: {type: next_event, fields: [colour]}}",
    ],
)
def test_all_that_decides_the_content_is_in_the_fingerprint(folder, override):
    source = Files(config().data.source)
    assert fingerprint(config(override), source) != fingerprint(config(), source)
    assert fingerprint(config("seed=5", "data.threads=2", "training.lr=0.1"), source) == fingerprint(config(), source)


def test_frames_are_prepared_each_time(folder, capsys):
    source = Frames(log())
    prepare(config(), source)
    prepare(config(), source)
    assert "prepared anew" in capsys.readouterr().out


def test_an_error_leaves_no_store(folder):
    with pytest.raises(UserError, match=r"data\.fields\.colour"):
        prepare(config("data.fields.colour=category"))
    with pytest.raises(UserError, match=r"tasks\.spend\.label"):
        prepare(config("tasks.spend.label.sql=sum(prise)"))
    assert list((folder / "run").iterdir()) == []


def test_serving_gives_the_same_inputs_as_training(folder):
    store = prepare(config())
    rows = store.rows_of("test")
    as_of = config().data.splits.test
    served = prepare_serving(Files(config().data.source), store.schema, store.vocab, config(), as_of, folder / "serve")
    assert served.examples.user.tolist() == store.examples.user[rows].tolist()
    assert served.examples.visible.tolist() == store.examples.visible[rows].tolist()
    assert set(served.examples.cut.tolist()) == {as_of}
    np.testing.assert_array_equal(served.features, store.features[rows])
    bag, served_bag = store.bags["money_item_all"], served.bags["money_item_all"]
    for n, row in enumerate(rows):
        mine = slice(served_bag.offsets[n], served_bag.offsets[n + 1])
        theirs = slice(bag.offsets[row], bag.offsets[row + 1])
        assert served_bag.ids[mine].tolist() == bag.ids[theirs].tolist()
    assert len(served.time) == np.count_nonzero(store.time < as_of)
    assert served.schema.labels == {}


def test_serving_everyone_includes_users_without_events(folder):
    store = prepare(config())
    frame = log()[:3].assign(item="never seen", user=7)
    source = Frames(frame, users=pd.DataFrame({"user": [7, 500]}))
    served = prepare_serving(
        source, store.schema, store.vocab, config(), 1_600_000_000, folder / "serve", everyone=True
    )
    assert served.users["user"].to_pylist() == [7, 500]
    assert served.examples.visible.tolist() == [3, 0]
    assert served.columns["item"].tolist() == [1, 1, 1]
    alone = prepare_serving(source, store.schema, store.vocab, config(), 1_600_000_000, folder / "serve2")
    assert alone.examples.user.tolist() == [0]


def test_the_command_prints_and_exits_with_2_on_an_error(folder, capsys):
    (folder / "c.yaml").write_text(yaml.safe_dump({"run": "run", **RAW}))
    main(["--config", "c.yaml"])
    assert "store     run/store" in capsys.readouterr().out
    assert Store.open(folder / "run/store").summary["users"] == 31
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main(["--config", "c.yaml", "data.source.events=gone.csv"]))
    assert stop.value.code == 2
    assert "error: data.source.events[0]: the file gone.csv does not exist" in capsys.readouterr().err
