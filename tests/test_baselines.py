from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_run import make_task, run_schema

from supermoe.data.store import SPLITS, IdLists
from supermoe.studies.baselines import boosting
from supermoe.typed_yaml import UserError

SIZE, VALUES = 500, 11  # examples, rows of the field's vocabulary
TASKS = {"churn": "binary", "spend": "regression", "age": "multiclass", "topics": "multilabel", "basket": "retrieval"}


def lists(rows: list[np.ndarray], **more: np.ndarray) -> IdLists:
    return IdLists(np.concatenate([[0], np.cumsum([len(row) for row in rows])]), np.concatenate(rows), **more)


@pytest.fixture
def store() -> SimpleNamespace:
    """Labels of every kind that follow from two features or from the only bag; a fifth of them are missing."""
    rng = np.random.default_rng(0)
    features = rng.random((SIZE, 2)).astype(np.float32)
    taken = [rng.choice(np.arange(2, VALUES), 2, replace=False).astype(np.int32) for _ in range(SIZE)]
    missing = rng.random(SIZE) < 0.2
    topics = [np.flatnonzero([u > 0.5, v > 0.5, u < 0.3, v < 0.3]).astype(np.int32) for u, v in features]
    everyone = np.ones(SIZE, bool)
    labels = {
        "churn": np.where(missing, np.nan, features[:, 0] > 0.5).astype(np.float32),
        "spend": np.where(missing, np.nan, 3 * features[:, 1]).astype(np.float32),
        "age": np.where(missing, -1, (features[:, 0] * 3).astype(int)).astype(np.int32),
        "topics": lists(topics, asked=everyone),
        "basket": lists([ids[:1] for ids in taken], asked=everyone),
        "item": np.zeros(SIZE, np.int32),
    }
    bag = lists(taken, counts=np.tile(np.array([5, 1], np.float32), SIZE))
    split = np.where(np.arange(SIZE) < 400, SPLITS["train"], SPLITS["test"])
    schema = run_schema()
    return SimpleNamespace(
        schema=schema.model_copy(update={"bags": {"type_28d": schema.bags["type_28d"]}}),
        examples=SimpleNamespace(split=split),
        features=features,
        bags={"type_28d": bag},
        labels=labels,
    )


def metrics(store: SimpleNamespace, **kinds: str) -> dict[str, dict[str, float]]:
    return boosting(store, {name: make_task(kind, name) for name, kind in (kinds or TASKS).items()}, "test")


def test_what_the_features_tell_is_found(store: SimpleNamespace) -> None:
    found = metrics(store)
    assert found["churn"]["auc"] > 0.95
    assert found["spend"]["r2"] > 0.9
    assert found["age"]["macro_auc"] > 0.95
    assert found["topics"]["macro_auc"] > 0.9
    assert found["basket"]["ndcg@10"] > 0.9  # the bag holds each answer with the larger count


def test_test_labels_are_measured_on_and_not_learnt(store: SimpleNamespace) -> None:
    store.labels["churn"][400:] = 1 - store.labels["churn"][400:]
    assert metrics(store, churn="binary")["churn"]["auc"] < 0.05


def test_tasks_of_every_event_have_no_baseline(store: SimpleNamespace) -> None:
    assert list(metrics(store, item="next_item", churn="binary")) == ["churn"]


def test_nothing_to_learn_from_is_the_users_to_mend(store: SimpleNamespace) -> None:
    store.features, store.bags = store.features[:, :0], {}
    with pytest.raises(UserError, match="there are no `features` to learn from"):
        metrics(store)


@pytest.mark.filterwarnings("error")
def test_a_feature_that_no_labelled_example_has_is_left_out(store: SimpleNamespace) -> None:
    expected = metrics(store)
    tested_only = np.where(np.arange(SIZE) < 400, np.nan, 1.0).astype(np.float32)
    store.features = np.column_stack([store.features, tested_only])
    assert metrics(store) == expected
