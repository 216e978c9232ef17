"""The tables of a seesaw report, from numbers that are written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from supermoe.studies import seesaw_report
from supermoe.studies.seesaw_report import gain_rows, markdown, method_rows, metric_rows, optimal_rows, text_table


def method(gain: float, loses: bool = False) -> dict:
    return {"mean": 0.6 + gain, "gain": gain, "interval": [gain - 0.01, gain + 0.01], "loses": loses}


def facts(mean_gain: float, losers: list[str]) -> dict:
    return {
        "losers": losers,
        "mean_gain": mean_gain,
        "interval": [mean_gain - 0.01, mean_gain + 0.01],
        "mean_rank": 1.5,
        "parameters": 1000,
        "seconds_per_step": 0.25,
        "weights": {"step": [1, 2], "weight": [{"churn": 0.5, "spend": 0.5}, {"churn": 0.7, "spend": 0.3}]},
        "gradients": {"tasks": ["churn", "spend"], "cosine": [[1.0, -0.25], [-0.25, None]]},
        "experts": {"layer 1": {"churn": [0.75, 0.25], "spend": [0.5, 0.5]}},
    }


@pytest.fixture
def result() -> dict:
    """Two tasks, of which one has known best scores, under a method that loses one and a better one."""
    alone = {"values": [0.6], "mean": 0.6}
    churn = {"metric": "auc", "users": 1200, "prior": 0.5, "alone": alone, "optimal": 0.7}
    spend = {"metric": "r2", "users": 90, "prior": 0.0, "alone": {"values": [math.nan], "mean": math.nan}}
    nowhere = {"mean": math.nan, "gain": math.nan, "interval": [math.nan, math.nan], "loses": False}
    return {
        "config": "shop.yaml",
        "split": "test",
        "selected_on": "valid",
        "own": "equal",
        "seeds": [0, 1],
        "variants": {"slow": ["training.lr=1e-4"]},
        "tasks": {
            "churn": churn | {"methods": {"equal": method(-0.05, loses=True), "slow": method(0.05)}},
            "spend": spend | {"methods": {"equal": nowhere, "slow": nowhere}},
        },
        "methods": {"equal": facts(-0.05, ["churn"]), "slow": facts(0.05, [])},
        "differences": {"equal": {"slow": {"mean": -0.1, "interval": [-0.12, -0.08]}}},
    }


def test_the_best_method_comes_first_and_the_others_are_behind_it(result: dict) -> None:
    header, best, worst = method_rows(result)
    assert header[:4] == ["method", "losers", "mean gain", "95 %"]
    assert best == ["slow", "0", "+0.0500", "[+0.0400, +0.0600]", "-", "1.50", "250"]
    assert worst[:2] == ["equal", "1 (churn)"]
    assert worst[4] == "-0.1000 [-0.1200, -0.0800]"


def test_rows_of_tasks(result: dict) -> None:
    assert metric_rows(result) == [
        ["", "churn", "spend"],
        ["users", "1,200", "90"],
        ["metric", "auc", "r2"],
        ["prior", "0.5000", "0.0000"],
        ["alone", "0.6000", "-"],
        ["slow", "0.6500", "-"],
        ["equal", "0.5500", "-"],
    ]
    assert gain_rows(result)[2][:2] == ["equal", "**-0.0500 [-0.0600, -0.0400]**"]
    assert gain_rows(result)[1] == ["slow", "+0.0500 [+0.0400, +0.0600]", "- [-, -]"]
    assert optimal_rows(result)[1:] == [
        ["best possible", "0.7000"],
        ["alone", "50.0%"],
        ["slow", "75.0%"],
        ["equal", "25.0%"],
    ]
    assert text_table(gain_rows(result)).splitlines()[0].split() == ["method", "churn", "spend"]
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_boosting_has_a_row_where_it_was_asked_for(result: dict) -> None:
    result["tasks"]["churn"]["boosting"] = 0.62
    assert metric_rows(result)[4] == ["boosting", "0.6200", "-"]


def test_the_report_says_what_it_was_made_of(result: dict, tmp_path: Path) -> None:
    seesaw_report.write_seesaw_report(tmp_path, result)
    text = (tmp_path / "seesaw.md").read_text()
    for part in (
        "Measured on the split `test`; weights were selected on `valid`",
        "Means over the seeds 0, 1",
        "`slow`: training.lr=1e-4",
        "`spend` has no metric on this split and is not counted",
        "| churn | +1.00 | -0.25 |",
        "| spend | -0.25 | - |",
        "| churn | 75% | 25% |",
        "![gains](plots/gains.png)",
    ):
        assert part in text, part


def test_without_matplotlib_there_is_a_report_and_a_warning(
    result: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "supermoe.studies.seesaw_plots", None)
    with pytest.warns(UserWarning, match=r"no plots: they need the extra, pip install 'supermoe\[report\]'"):
        seesaw_report.write_seesaw_report(tmp_path, result)
    assert "## Plots" not in (tmp_path / "seesaw.md").read_text()
