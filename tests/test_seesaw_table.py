"""The table of a seesaw study from handwritten predictions: pairing, gains, losers, ranks, every form of score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from supermoe.studies.seesaw_table import Answers, aligned, compare, metric_of, read_predictions
from supermoe.typed_yaml import UserError

NUM_USERS = 300
RNG = np.random.default_rng(0)
VALUE = RNG.normal(size=NUM_USERS)


def predictions(target: object, score: object, users: np.ndarray | None = None) -> pa.Table:
    users = np.arange(NUM_USERS) if users is None else users
    return pa.table({"user_id": users, "cut": np.zeros(len(users)), "target": target, "score": score})


def regression(noise: float, seed: int = 0) -> pa.Table:
    return predictions(VALUE, VALUE + noise * np.random.default_rng(seed).normal(size=NUM_USERS))


def test_a_method_that_is_worse_for_one_task_and_better_for_another():
    value = Answers(
        "r2",
        {
            "alone": [regression(0.5, 1), regression(0.5, 2)],
            "good": [regression(0.2, 1), regression(0.2, 2)],
            "bad": [regression(0.9, 1), regression(0.9, 2)],
        },
    )
    half = np.arange(0, NUM_USERS, 2)  # the second task is asked of every other user
    target = (VALUE[half] > 0).astype(np.float32)
    noise = np.random.default_rng(5).normal(size=len(half))
    scores = {"alone": VALUE[half] + noise, "good": VALUE[half] + noise, "bad": VALUE[half]}
    sign = Answers("auc", {name: [predictions(target, score, half)] * 2 for name, score in scores.items()})
    found = compare({"value": value, "sign": sign}, num_resamples=300)

    good, bad = found["tasks"]["value"]["methods"]["good"], found["tasks"]["value"]["methods"]["bad"]
    assert good["interval"][0] > 0
    assert not good["loses"]
    assert bad["loses"]
    assert bad["interval"][0] < bad["gain"] < bad["interval"][1] < 0
    assert bad["gain"] == pytest.approx(np.mean(bad["values"]) - found["tasks"]["value"]["alone"]["mean"])
    assert found["tasks"]["sign"]["methods"]["good"]["interval"] == [0.0, 0.0]  # paired: equal answers never differ
    assert (found["tasks"]["sign"]["users"], found["tasks"]["value"]["users"]) == (150, 300)
    methods = found["methods"]
    assert (methods["good"]["losers"], methods["bad"]["losers"]) == ([], ["value"])
    assert methods["good"]["mean_rank"] == (1 + 2.5) / 2  # among three; it shares the second and third place
    assert methods["bad"]["mean_rank"] == (3 + 1) / 2
    difference = found["differences"]["good"]["bad"]
    assert difference["mean"] == pytest.approx(methods["good"]["mean_gain"] - methods["bad"]["mean_gain"])
    assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]


def test_other_examples_cannot_be_compared():
    moved = predictions(VALUE, VALUE, np.arange(NUM_USERS) + 1)
    with pytest.raises(UserError, match=r"'value' by equal \(training 2\) are of other examples"):
        compare({"value": Answers("r2", {"alone": [regression(1)], "equal": [regression(1), moved]})})


def test_a_task_without_a_metric_is_shown_and_not_counted():
    one_value = predictions(np.ones(NUM_USERS, np.float32), VALUE)
    tables = {"flat": Answers("auc", {"alone": [one_value], "equal": [one_value]})}
    with pytest.raises(UserError, match="no task has a metric on this split"):
        compare(tables)
    found = compare(tables | {"value": Answers("r2", {"alone": [regression(0.5)], "equal": [regression(0.2)]})}, 50)
    assert np.isnan(found["tasks"]["flat"]["methods"]["equal"]["gain"])
    assert found["methods"]["equal"]["losers"] == []
    assert found["methods"]["equal"]["mean_gain"] > 0


def test_every_form_of_prediction_is_measured_as_in_training():
    classes = predictions(
        ["b", "a", "b", "c"], [[0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.4, 0.5]], np.arange(4)
    )
    classes = classes.replace_schema_metadata({"classes": json.dumps(["a", "b", "c"])})
    assert metric_of(classes, "macro_auc") == pytest.approx((1 + 0.625 + 1) / 3)
    sets = predictions([["a", "b"], [], ["b"]], [[0.9, 0.1], [0.2, 0.3], [0.1, 0.6]], np.arange(3))
    sets = sets.replace_schema_metadata({"classes": json.dumps(["a", "b"])})
    assert metric_of(sets, "macro_auc") == pytest.approx((1 + 0.5) / 2)
    ranked = pa.table(
        {
            "user_id": [1, 2, 3],
            "cut": [0, 0, 0],
            "target": [["milk", "beer"], [], ["bread"]],
            "top_k": [["beer", "milk", "bread"], ["milk"], ["milk", "bread"]],
        }
    )
    assert metric_of(ranked, "ndcg@10") == pytest.approx((1 + 1 / np.log2(3)) / 2)  # the second has nothing to find
    single = pa.table({"user_id": [1, 2], "cut": [0, 0], "target": [7, 8], "top_k": [[7, 5], [5, 6]]})
    assert metric_of(single, "ndcg@10") == 0.5
    with pytest.raises(UserError, match="the metric mrr cannot be resampled; a seesaw study knows auc, r2"):
        metric_of(ranked, "mrr")


def test_optimal_scores_are_put_beside_the_examples_that_were_asked():
    optimal = pa.table({"user_id": [1, 2, 3], "cut": [0, 0, 0], "score": [0.1, 0.2, 0.3]})
    table = pa.table({"user_id": [3, 1], "cut": [0, 0], "target": [1.0, 0.0], "score": [0.0, 1.0]})
    found = aligned(optimal, table)
    assert found["score"].to_pylist() == [0.3, 0.1]
    assert metric_of(found, "auc") == 1.0


def test_a_missing_file_tells_how_to_get_it(tmp_path: Path):
    with pytest.raises(UserError, match="delete the folder"):
        read_predictions(tmp_path, "test", "churn")
