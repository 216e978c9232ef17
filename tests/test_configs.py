"""The shipped configs: quickstart asks the tasks it promises, the template fits a log of its shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from supermoe.config import load_run
from supermoe.data.prepare import prepare

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_tells_its_command(path):
    load_run(path)
    assert f"--config configs/{path.name}" in path.read_text().split("\nrun:")[0]


def test_quickstart_asks_its_nine_tasks():
    config = load_run(CONFIGS / "quickstart.yaml")
    assert list(config.tasks) == [
        "redeem", "churn", "spend", "departments", "next_type", "age", "income", "household_size", "kids"
    ]  # fmt: skip
    assert config.run == Path("runs/quickstart")


def write_log(folder: Path) -> None:
    """Files of the names, columns and formats that own_log.yaml speaks of: null items, unordered rows, local times."""
    rng = np.random.default_rng(0)
    times = pd.Timestamp("2023-07-01") + pd.to_timedelta(rng.integers(0, 340 * 24 * 60, 3000), unit="min")
    customers = [f"c{n}" for n in rng.integers(0, 80, 3000)]
    articles = pd.Series(rng.integers(0, 40, 3000)).astype("Int64").mask(rng.random(3000) < 0.1)
    prices = rng.gamma(2, 9, 3000)
    log = pd.DataFrame({"customer_id": customers, "ordered_at": times, "article_id": articles, "price_eur": prices})
    (folder / "log/orders").mkdir(parents=True)
    (folder / "log/views").mkdir()
    log.assign(campaign=rng.integers(0, 999, 3000)).iloc[:2000].to_parquet(folder / "log/orders/part-0.parquet")
    views = log.iloc[2000:].assign(ts=log["ordered_at"].astype("datetime64[ms]").astype("int64"))
    views[["customer_id", "ts", "article_id"]].to_csv(folder / "log/views/2024.csv", index=False)
    items = {"brand": [f"b{n % 7}" for n in range(40)], "tags": [["new", "sale"][: n % 3] for n in range(40)]}
    pd.DataFrame({"article_id": np.arange(40)} | items).to_parquet(folder / "log/articles.parquet")
    people = pd.DataFrame({"customer_id": [f"c{n}" for n in range(60)], "segment": list("abc") * 20})
    people.to_parquet(folder / "log/customers.parquet")
    refunds = log.sample(150, random_state=0)[["customer_id", "ordered_at"]]
    refunds.rename(columns={"ordered_at": "refunded_at"}).to_parquet(folder / "log/refunds.parquet")


def test_the_template_fits_a_log_of_its_shape(tmp_path, monkeypatch, capsys):
    write_log(tmp_path)
    monkeypatch.chdir(tmp_path)
    store = prepare(load_run(CONFIGS / "own_log.yaml", ["data.fields.item.min_count=1"]))
    printed = capsys.readouterr().out
    assert store.path == Path("runs/own_log/store")
    assert store.schema.event_types == ["order", "view"]
    assert list(store.schema.labels) == ["reorder", "refund", "spend", "brands", "next_basket", "next_item", "segment"]
    assert store.summary["examples"].keys() == {"train", "valid"}  # no test cut
    assert {name.split("_")[0] for name in store.schema.features} == {"auto", "baskets"}
    assert "baskets_brand_28d" in store.schema.bags
    for task in store.schema.labels:
        assert f"label     {task}:" in printed
