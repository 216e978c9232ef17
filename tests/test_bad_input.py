"""What a user can get wrong: each ends in one paragraph with the place and the remedy, exit code 2, nothing changed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from world import (
    Harm,
    blank,
    contents,
    events,
    items,
    log_csv,
    mark,
    remove,
    replace,
    row_8,
    run,
    table,
    truncate,
    twice_the_same_column,
    write,
)

from supermoe.data.store import Store

PREPARE, TRAIN, EVALUATE = "prepare --config config.yaml run=fresh", "train --config config.yaml", "evaluate run"
PREDICT, EXPORT = (f"{command} run/model --as-of 2020-12-01 --out out" for command in ("predict", "export"))
EVENTS = f"{PREPARE} data.source.events="
CSV = f"{EVENTS}log.csv data.source.users=null"
ITEMS = f"{PREPARE} data.source.items='{{path: items.parquet, key: type}}'"
CHURN, SPEND = "tasks.churn.label", "tasks.spend.label"
TASKS = list(tiny.make_config(Path()).tasks)
DAYS = [f"u{day % 9},2020-01-{day:02d},1.5" for day in range(1, 31)]


def cuts(train: str, valid: str = "null") -> str:
    return f"{PREPARE} 'data.splits.train={train}' data.splits.valid={valid}"


Case = tuple[str, str, str] | tuple[str, str, str, Harm]

# fmt: off
CONFIG: list[Case] = [
    ("no config file", "train --config gone.yaml", "config file gone.yaml: No such file"),
    ("broken YAML", PREPARE, "config.yaml, line 1, column 10: not valid YAML", write("config.yaml", "run: [a, }")),
    ("a key given twice", PREPARE, "config.yaml, line 2, column 1: ... 'run' given twice",
     write("config.yaml", "run: a\nrun: b")),
    ("unknown section", f"{PREPARE} trainig.lr=1", "config.yaml: trainig: unknown key, did you mean 'training'?"),
    ("unknown key", f"{PREPARE} training.epocs=3", "training.epocs: unknown key, did you mean 'epochs'?"),
    ("unknown key of a task", f"{PREPARE} tasks.churn.label.windw=3d",
     "tasks.churn.label.windw: unknown key, did you mean 'window'?"),
    ("unknown key of a series", cuts("{frist: 2020-05-01, last: 2020-06-01}"),
     "data.splits.train.frist: unknown key, did you mean 'first'?"),
    ("wrong type", f"{PREPARE} model.dim=wide", "model.dim: ... valid integer ... (got 'wide')"),
    ("out of range", f"{PREPARE} model.dropout=1.5", "model.dropout: ... less than 1 (got 1.5)"),
    ("NaN in the config", f"{PREPARE} training.lr=.nan", "training.lr: ... finite number (got nan)"),
    ("keys that do not fit", f"{PREPARE} model.moe.top_k=9", "model.moe: top_k (9) cannot exceed experts (4)"),
    ("no override", f"{PREPARE} training.lr", "override 'training.lr' is not of the form key.subkey=value"),
    ("unknown component", f"{PREPARE} model.moe.router=sofmax", "unknown type 'sofmax', did you mean 'softmax'?"),
    ("unknown type of task", f"{PREPARE} tasks.churn.type=binry", "tasks.churn: ... did you mean 'binary'?"),
    ("a class that cannot be imported", f"{PREPARE} loss.balancer=my.own:One", "cannot import 'my.own:One'"),
    ("no such date", f"{PREPARE} data.splits.valid=2020-13-01",
     "data.splits.valid: expected a date such as ... got '2020-13-01'"),
    ("no duration", f"{PREPARE} tasks.churn.label.window=soon", "label.window: expected a duration such as 28d"),
    ("a label without end", f"{PREPARE} tasks.churn.label.window=all", "tasks.churn.label: a label window must end"),
    ("no task left", " ".join([PREPARE, *(f"tasks.{name}=null" for name in TASKS)]), "at least one task is needed"),
    ("memory of no size", f"{PREPARE} data.memory_limit=lots", "data.memory_limit: 'lots' is not a size such as 2GB"),
    ("too little memory", f"{PREPARE} data.memory_limit=1MB", "out of memory ... raise `data.memory_limit`"),
    ("no source", "prepare --config bare.yaml", "data.source: is required; give ... one of: complete_journey, files",
     write("bare.yaml", "{run: fresh, data: {}, tasks: {a: {type: binary, label: {attribute: x}}}}")),
    ("weights of an unknown task", f"{TRAIN} 'loss.balancer={{type: fixed, weights: {{chrun: 2}}}}'",
     "loss.balancer.weights.chrun: there is no such task, did you mean 'churn'?"),
]

FILES: list[Case] = [
    ("no such file", f"{EVENTS}gone.parquet", "data.source.events[0]: the file gone.parquet does not exist; relative"),
    ("a pattern without files", f"{EVENTS}'logs/*.csv'", "data.source.events[0]: no file matches logs/*.csv"),
    ("a folder without files", f"{EVENTS}logs", "the folder logs holds no Parquet or CSV file", Path("logs").mkdir),
    ("a file of another kind", f"{EVENTS}log.txt", "log.txt has an unknown ending; expected one of .parquet",
     write("log.txt", "")),
    ("an empty file", CSV, "data.source.events[0]: the file log.csv is empty (0 bytes)", write("log.csv", "")),
    ("a header without rows", CSV, "data.source: the events hold no rows", log_csv()),
    ("Parquet without rows", PREPARE, "data.source: the events hold no rows",
     table("events.parquet", lambda frame: frame[:0])),
    ("no row that fits", f"{EVENTS}'{{path: events.parquet, where: value < 0}}'",
     "the events hold no rows ... `where`"),
    ("Parquet that is none", PREPARE, "events.parquet is not a readable Parquet file", write("events.parquet", "a,b")),
    ("truncated Parquet", PREPARE, "events.parquet is not a readable Parquet file", truncate("events.parquet")),
    ("CSV with a row too long", CSV, "log.csv is not a readable CSV file ... Line: 32 ... Expected ... 3 Found: 4",
     log_csv(*DAYS, "u1,2020-02-01,1,2")),
    ("CSV with a row too short", CSV, "Line: 3 ... Expected ... 3 Found: 1", log_csv(DAYS[0], "u1", *DAYS)),
    ("CSV with an open quote", CSV, "Line: 2 ... unterminated quote", log_csv('"u1,2020-02-01,1')),
    ("CSV that is none", CSV, "log.csv is not a readable CSV file", write("log.csv", bytes(range(256)))),
    ("CSV in another encoding", CSV, "log.csv is not a readable CSV file ... not utf-8",
     write("log.csv", "user,time\nM\xfcller,2020-01-01\n".encode("latin-1"))),
    ("no user column", PREPARE, "events.parquet has no column 'user'; name it under data.source.events[0].columns.user",
     table("events.parquet", lambda frame: frame.rename(columns={"user": "client"}))),
    ("no time column", PREPARE, "no column 'time'; name it under data.source.events[0].columns.time, one of: user, ts",
     table("events.parquet", lambda frame: frame.rename(columns={"time": "ts"}))),
    ("a mapped column that is missing", f"{EVENTS}'{{path: events.parquet, columns: {{user: usr}}}}'",
     "data.source.events[0].columns.user: events.parquet has no column 'usr', did you mean 'user'?"),
    ("duplicate columns in CSV", CSV, "log.csv has two columns 'User'", write("log.csv", "user,time,User\n1,2,3\n")),
    ("duplicate columns in Parquet", PREPARE, "has two columns 'shop' ... rename one", twice_the_same_column),
    ("a column with a name of ours", PREPARE, "'cut' is a name used inside; rename the column", events(cut=1)),
    ("columns of two types", f"{EVENTS}'[events.parquet, other.parquet]'",
     "data.source.events[1]: the column 'shop' is VARCHAR in other.parquet and BIGINT in events.parquet; rename",
     lambda: tiny.make_log().assign(shop="x").to_parquet("other.parquet")),
    ("where over an unknown column", f"{EVENTS}'{{path: events.parquet, where: colour = 1}}'",
     "data.source.events[0].where: the condition 'colour = 1' does not fit events.parquet"),
]

VALUES: list[Case] = [
    ("a time that is none", CSV, "log.csv, row 31, column 'time': the value 'yesterday' is no time ... write ISO times",
     log_csv(*DAYS, "u1,yesterday,1")),
    ("a missing time", PREPARE, "events.parquet, row 8, column 'time': the value None is no time", row_8("time", None)),
    ("zones and none", CSV, "row 1, column 'time': ... carries no zone, but '2020-02-01T01:00+02:00' in row 31 does",
     log_csv(*DAYS, "u1,2020-02-01T01:00+02:00,1")),
    ("an unknown zone", f"{EVENTS}'{{path: events.parquet, time_zone: Mars/Base}}'",
     "data.source.events[0].time_zone: ... Unknown TimeZone 'Mars/Base'"),
    ("times as numbers", PREPARE, "'time' of events.parquet holds numbers ... time_unit", events(time=7)),
    ("the wrong unit of time", f"{EVENTS}'{{path: events.parquet, time_unit: s}}'",
     "row 1, column 'time': ... counts us since 1970 and not s, as do all others; set time_unit: us",
     events(time=lambda frame: frame["time"].astype("int64"))),
    ("seconds for milliseconds", f"{EVENTS}'{{path: events.parquet, time_unit: ms}}'",
     "row 1, column 'time': ... counts s since 1970 and not ms, as do all others; set time_unit: s",
     events(time=lambda frame: frame["time"].astype("datetime64[s]").astype("int64"))),
    ("dates written otherwise", CSV, "row 1, column 'time': the value '31.12.2020' ... time_format: '%d.%m.%Y'",
     log_csv("u1,31.12.2020,1")),
    ("decimal commas", CSV, "data.fields: the column 'value' ... decimal commas, such as '1,5'; give decimal: ','",
     log_csv(*(day.replace("1.5", '"1,5"') for day in DAYS))),
    ("CSV's options for Parquet", f"{EVENTS}'{{path: events.parquet, nulls: [NA]}}'", "decimal and nulls are for CSV"),
    ("infinity", PREPARE, "events.parquet, row 8, column 'value': the value 'inf' is infinite", row_8("value", np.inf)),
    ("a row without a user", PREPARE, "row 8, column 'user': ... drop_null_users: true", row_8("user", None)),
    ("NaN for a user", PREPARE, "row 8, column 'user': ... names no user",
     events(user=lambda frame: np.where(frame.index == 7, np.nan, 1.0))),
    ("a fraction for a user", PREPARE, "row 1, column 'user': the value '1.5' is no whole number", events(user=1.5)),
    ("a list for a user", PREPARE, "the user column 'user' of events.parquet is VARCHAR[]; ids are whole numbers",
     events(user=lambda frame: frame["tags"])),
    ("a user twice in the users table", PREPARE, "data.source.users: users.parquet has 2 rows for the user 'u00'; keep",
     table("users.parquet", lambda frame: pd.concat([frame, frame]))),
    ("an item twice", ITEMS, "data.source.items: items.parquet has 2 rows for the type 'milk'", items("milk", "milk")),
    ("items of another type", ITEMS, "data.source.items.key: 'type' is VARCHAR in the events and BIGINT", items(1, 2)),
    ("an unknown field", f"{PREPARE} data.fields.colour=category", "data.fields.colour: ... no such column, expected"),
    ("text as a number", f"{PREPARE} data.fields.type=number", "data.fields.type: the column is VARCHAR, not a number"),
]

QUESTIONS: list[Case] = [
    ("no SQL", f"{PREPARE} {CHURN}.sql='count(* > 3'", f"{CHURN}.sql: not valid SQL: syntax error ... count(* > 3"),
    ("an unknown column", f"{PREPARE} {CHURN}.sql='sum(prise) > 1'", f"{CHURN}.sql: ... \"prise\" ... Columns at hand"),
    ("an unknown function", f"{PREPARE} {CHURN}.sql='cunt(*) > 1'", f"{CHURN}.sql: ... cunt does not exist"),
    ("no aggregate", f"{PREPARE} {CHURN}.sql='value > 3'", f"{CHURN}.sql: ... must be part of an aggregate function"),
    ("a sub-select", f"{PREPARE} {CHURN}.sql='(select 1) > 0'", f"{CHURN}.sql: a sub-select could look beyond"),
    ("text as a yes or no", f"{PREPARE} {CHURN}.sql='mode(type)'", f"{CHURN}: a task of type binary needs a number"),
    ("another type for nobody", f"{PREPARE} {CHURN}.empty=maybe",
     f"{CHURN}.empty: 'maybe' does not fit ... bool; give"),
    ("neither no nor yes", f"{TRAIN} data.store=fresh/store {CHURN}.sql='count(*)' {CHURN}.empty=0",
     "tasks.churn: a binary label must be 0 or 1"),
    ("an infinite label", f"{PREPARE} {SPEND}.sql='sum(value) / 0'", f"{SPEND}: 254 of 299 labels are NaN or infinite"),
    ("a NaN label", f"{PREPARE} \"{SPEND}.sql=sum(value) * 'nan'::double\"", f"{SPEND}: ... NaN or infinite; guard"),
    ("a constant label", f"{PREPARE} {SPEND}.sql='1 + 0' {SPEND}.empty=1",
     "tasks.spend: all 239 labels ... are the same"),
    ("no label at all", f"{PREPARE} tasks.churn.eligible.sql='count(*) > 999'",
     "tasks.churn: no training example has a label ... or remove the task with tasks.churn=null"),
    ("unknown event type", f"{PREPARE} {CHURN}.events=[buy]", f"{CHURN}.events: the log has no events of type 'buy'"),
    ("unknown table", f"{PREPARE} {CHURN}.table=refunds", f"{CHURN}.table: no table 'refunds' is declared"),
    ("unknown attribute", f"{PREPARE} tasks.segment.label.attribute=segmnt",
     "tasks.segment.label.attribute: the users table has no column 'segmnt', did you mean 'segment'?"),
    ("no users table", f"{PREPARE} data.source.users=null",
     "tasks.segment.label.attribute: ... there is no users table"),
    ("ids of an unknown field", f"{PREPARE} tasks.next_type.label.field=colour",
     "tasks.next_type.label: 'colour' is not a category field of the events, expected one of: shop, tags, type"),
    ("ids of a number", f"{PREPARE} tasks.next_type.label.field=value",
     "'value' is not a category field of the events"),
    ("an unknown field in a bag", f"{PREPARE} features.counts.bag=[typ]",
     "features.counts.bag: ... did you mean 'type'"),
    ("an infinite feature", f"{PREPARE} features.counts.sql.n=1/0.0", "features.counts.sql.n: the value is infinite"),
    ("nobody is asked", f"{PREPARE} 'data.splits.eligible.sql=count(*) > 999'",
     "data.splits: no user is eligible for the train split"),
    ("overlapping cuts", cuts("[2020-05-01, 2020-05-10]", "2020-05-15"),
     "data.splits.train: ... 2020-05-10 ends at 2020-06-07, after the valid cut 2020-05-15 ... to 2020-04-17"),
    ("a window past the data", cuts("[2020-05-01]", "2020-12-20"),
     "data.splits.valid: ... ends at 2021-01-17, but the log ends at 2020-12-31 ... to 2020-12-04 or earlier"),
    ("a cut before the data", cuts("[2019-05-01]"), "data.splits.train: no event lies before the cut 2019-05-01"),
    ("a log too short", f"{PREPARE} {CHURN}.window=365d",
     "data.splits: the log spans ... too short for automatic cuts"),
]

STORED: list[Case] = [
    ("truncated column", EVALUATE, "run/store/events/time.npy has 4736 bytes instead of 9472: ... prepare it again",
     truncate("run/store/events/time.npy")),
    ("missing column", EVALUATE, "run/store/events/time.npy is missing: ... prepare it again",
     remove("run/store/events/time.npy")),
    ("blank column", EVALUATE, "run/store/examples/cut.npy: not a readable column",
     blank("run/store/examples/cut.npy")),
    ("blank users", EVALUATE, "cannot read run/store/users.parquet: ... prepare it", blank("run/store/users.parquet")),
    ("blank vocabulary", EVALUATE, "cannot read run/store/vocab/type.parquet: ... prepare it again",
     blank("run/store/vocab/type.parquet")),
    ("edited schema", EVALUATE, "run/store/schema.json is damaged ... fields.value.kind: ... (got 'nubber')",
     replace("run/store/schema.json", '"number"', '"nubber"')),
    ("longer schema", EVALUATE, "run/store/schema.json has ... the store is damaged",
     replace("run/store/schema.json", "value", "values")),
    ("truncated mark", EVALUATE, "run/store/fingerprint.json is not valid JSON",
     truncate("run/store/fingerprint.json")),
    ("store of another version", EVALUATE, "run/store: store format 99, this version of supermoe reads 2; delete",
     mark("run/store/fingerprint.json", version=99)),
    ("no store", EVALUATE, "run/store: there is no store here; run `python -m supermoe.prepare", remove("run/store")),
    ("no run", "evaluate nothing", "nothing: there are no trained weights here; give the `run` folder"),
    ("truncated checkpoint", TRAIN, "run/checkpoints: every checkpoint is damaged; delete this folder",
     truncate("run/checkpoints/step_*/*.distcp")),
    ("checkpoint of another version", TRAIN, "checkpoint format 99 ... continue with the version that wrote it",
     mark("run/checkpoints/step_00000001/checkpoint.json", version=99)),
    ("changed config", f"{TRAIN} seed=1", "started with another config: seed was 0 and is now 1. Restore these values"),
    ("truncated best weights", EVALUATE, "run/checkpoints/best.safetensors is truncated or damaged ... delete",
     truncate("run/checkpoints/best.safetensors")),
    ("missing best weights", TRAIN, "run/checkpoints/best.safetensors: it is missing; delete",
     remove("run/checkpoints/best.safetensors")),
    ("truncated weights", PREDICT,
     "run/model/model.safetensors is truncated or damaged ... copy the whole model folder",
     truncate("run/model/model.safetensors")),
    ("missing weights", EXPORT, "run/model/model.safetensors: it is missing; copy",
     remove("run/model/model.safetensors")),
    ("a model of another format", PREDICT, "run/model/manifest.json does not describe a supermoe model",
     mark("run/model/manifest.json", format="onnx")),
    ("a model of another version", EXPORT, "run/model/manifest.json: format version 99 ... install supermoe",
     mark("run/model/manifest.json", version=99)),
    ("an edited model", PREDICT, "run/model: the content has the id ... a file was changed; copy the whole",
     mark("run/model/schema.json", fields={})),
    ("a run instead of a model", "predict run --as-of 2020-12-01 --out out",
     "run/manifest.json ... a model folder holds"),
    ("no model", "doctor nothing",
     "nothing is not a model folder: it does not exist; give the `model` folder of a run"),
    ("damaged probes", "doctor run/model", "run/model/parity.json is not valid JSON",
     truncate("run/model/parity.json")),
]

SERVED: list[Case] = [
    ("an unknown task", f"{PREDICT} --tasks chrun", "--tasks: this model has no task 'chrun', did you mean 'churn'?"),
    ("no date", "predict run/model --as-of soon --out out", "--as-of: expected a date such as ... got 'soon'"),
    ("a date before the data", "export run/model --as-of 1999-01-01 --out out", "no user is eligible ... 1999-01-01"),
    ("no such shard", f"{EXPORT} --shard 4/4", "--shard 4/4: expected i/n with i from 0 to n - 1"),
    ("users without events", f"{PREDICT} --users users.parquet", "--users needs --events"),
    ("no such events", f"{PREDICT} --events gone.parquet", "the file gone.parquet does not exist"),
    ("events without a field", f"{PREDICT} --events events.parquet",
     "the events have no column 'type', which the model",
     table("events.parquet", lambda frame: frame.drop(columns="type"))),
    ("events without rows", f"{PREDICT} --events events.parquet", "no user to serve: ... no rows before 2020-12-01",
     table("events.parquet", lambda frame: frame[:0])),
    ("output of another date", "export run/model --as-of 2020-12-01 --out run/embeddings",
     "run/embeddings already holds output with as_of 2021-01-01, this run has as_of 2020-12-01 ... empty folder"),
    ("output of another model", "export run/model --as-of 2021-01-01 --out run/embeddings",
     "run/embeddings already holds output with model_id 0123 ... they cannot be mixed",
     replace("run/embeddings/.shards/00000.json", '"model_id": "', '"model_id": "0123')),
]

PLACES: list[Case] = [
    ("a store that is a folder of another's", f"{PREPARE} data.store=run/model", "run/model exists and is not a store"),
    ("a file where the run should be", "train --config config.yaml run=events.parquet/run",
     "cannot write events.parquet/run/store: Not a directory ... choose another place"),
    ("a file where the output should be", "predict run/model --as-of 2020-12-01 --out config.yaml",
     "cannot write config.yaml: File exists"),
    ("a place that may not be written", "export run/model --as-of 2020-12-01 --out /sys/supermoe",
     "cannot write /sys/supermoe: ... choose another place"),
]
# fmt: on

CASES = [*CONFIG, *FILES, *VALUES, *QUESTIONS, *STORED, *SERVED, *PLACES]


@pytest.mark.filterwarnings("ignore:the checkpoint .* is damaged")
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_one_paragraph_and_nothing_half_written(world: Path, capsys: pytest.CaptureFixture, case: Case) -> None:
    _, command, says, *harm = case
    for do in harm:
        do()
    before = contents()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in told[-2:]] in ([True], [False, True])
    assert re.search(".*".join(map(re.escape, says.split(" ... "))), told[-1]), told[-1]
    if Path("fresh").exists() and any(Path("fresh").iterdir()):
        Store.open("fresh/store")  # a later step refused what was prepared
    assert {name: data for name, data in contents().items() if not name.startswith("fresh/store/")} == before


def test_the_table_is_long_enough_and_free_of_repetition() -> None:
    assert len({case[0] for case in CASES}) == len(CASES) >= 40
