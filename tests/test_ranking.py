from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_run import make_labels, make_model, make_run_batch, make_task, make_tasks

from supermoe.data.batch import SetLabels
from supermoe.data.schema import FIRST_ID, LabelSchema
from supermoe.objectives import ranking
from supermoe.objectives.ranking import relevant_ids
from supermoe.typed_yaml import UserError


@pytest.fixture(scope="module")
def world():
    tasks = make_tasks()
    model = make_model(tasks, {}).eval()
    batch = make_run_batch(3)
    with torch.no_grad():
        return tasks, model, batch, model(batch)


def sets(*rows: list[int]) -> SetLabels:
    sizes = torch.tensor([len(row) for row in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return SetLabels(
        torch.ones(len(rows), dtype=torch.bool),
        offsets,
        torch.tensor([i for row in rows for i in row], dtype=torch.int64),
    )


def test_retrieval_loss_is_the_sum_over_each_set_by_its_best_dcg(world) -> None:
    tasks, model, batch, output = world
    task, head = tasks["basket"], model.heads["basket"]
    total, count = task.loss(head, output, batch)
    log_p = task.logits(head, output, batch)[:, FIRST_ID:].log_softmax(-1)
    labels = batch.labels["basket"]
    rows = [labels.ids[a:b] for a, b in zip(labels.offsets[:-1], labels.offsets[1:], strict=True)]
    best = [sum(1 / math.log2(place + 2) for place in range(len(ids))) for ids in rows]
    expected = sum(-log_p[i, ids - FIRST_ID].sum() / best[i] for i, ids in enumerate(rows) if len(ids))
    torch.testing.assert_close(total, expected)
    assert count == task.count(batch) == sum(len(ids) > 0 for ids in rows)


def test_rank_and_top_k_agree_with_a_full_sort() -> None:
    task = make_task("retrieval", "basket")
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    batch = replace(make_run_batch(0, 3), labels={"basket": sets([4, 7], [], [10])})
    order = [sorted(range(FIRST_ID, 11), key=lambda i: -row[i]) for row in logits]
    found = task.rank(logits.clone(), batch)
    assert found["top_k"].tolist() == order
    assert found["rank"].tolist() == [1 + min(order[0].index(4), order[0].index(7)), 0, 1 + order[2].index(10)]


@pytest.mark.parametrize("name", ["item", "basket"])
def test_with_nothing_to_find_every_weight_still_has_a_gradient(world, name: str) -> None:
    """Other ranks may have some, and wait for this one's."""
    tasks, model, batch, _ = world
    nothing = {"item": torch.full((batch.num_examples,), -1), "basket": sets(*[[]] * batch.num_examples)}
    batch = replace(batch, labels={**batch.labels, name: nothing[name]})
    with torch.enable_grad():
        loss, _ = tasks[name].loss(model.heads[name], model(batch), batch)
        weights = dict(model.heads[name].named_parameters())
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    unreached = [key for key, gradient in zip(weights, found, strict=True) if gradient is None]
    assert unreached == []


def test_metrics_need_no_ranking_of_who_has_nothing_to_find(world) -> None:
    tasks, model, batch, output = world
    for name in ("item", "basket"):
        task, head = tasks[name], model.heads[name]
        wanted_W = relevant_ids(batch.labels[name])[0].unique()
        assert 0 < len(wanted_W) < batch.num_examples
        whole, part = task.scores(head, output, batch), task.scores_for_metrics(head, output, batch)
        for key, values in whole.items():
            torch.testing.assert_close(part[key][wanted_W], values[wanted_W])
            assert part[key].shape == values.shape
        metrics = [task.metrics(as_arrays(scores), batch.labels[name]) for scores in (part, whole)]
        assert metrics[0] == pytest.approx(metrics[1])


def as_arrays(scores: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {key: values.detach().numpy() for key, values in scores.items()}


@pytest.mark.parametrize("cells", [1, 25])
def test_chunks_are_ranked_as_the_whole(world, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, model, batch, output = world
    for name in ("item", "basket"):
        task, head = tasks[name], model.heads[name]
        whole = task.scores(head, output, batch)
        monkeypatch.setattr(ranking, "CELLS", cells)
        in_chunks = task.scores(head, output, batch)
        monkeypatch.undo()
        assert in_chunks.keys() == whole.keys()
        for key, values in whole.items():
            torch.testing.assert_close(in_chunks[key], values)


def test_seen_ids_are_never_ranked(world) -> None:
    _, _, batch, _ = world
    task = make_task("retrieval", "basket", filter_seen=True)
    found = task.rank(torch.randn(batch.num_examples, 11), batch)["top_k"]
    for b in range(batch.num_examples):
        start = int(batch.offsets_S[batch.read_B[b]])
        seen = set(batch.fields["type"][start : start + int(batch.visible_B[b])].tolist())
        bag = batch.bags["type_all"]
        seen |= set(bag.ids[bag.offsets[b] : bag.offsets[b + 1]].tolist())
        assert set(found[b].tolist()) - {-1} == set(range(FIRST_ID, 11)) - seen


def test_next_item_is_learnt_at_every_event_and_from_the_labels_at_cuts(world) -> None:
    tasks, model, batch, output = world
    task, head = tasks["item"], model.heads["item"]
    total, count = task.loss(head, output, batch)
    weight, bias = head.table()
    expected, positions = 0.0, 0
    for a, b in zip(batch.offsets_S[:-1].tolist(), batch.offsets_S[1:].tolist(), strict=True):
        for n in range(a, b - 1):
            target = int(batch.fields["type"][n + 1])
            if target >= FIRST_ID:
                logits = (weight @ head.query(output.event_ND[n]) + bias)[FIRST_ID:]
                expected = expected - logits.log_softmax(0)[target - FIRST_ID]
                positions += 1
    labels_B = batch.labels["item"]
    log_p_BC = task.logits(head, output, batch)[:, FIRST_ID:].log_softmax(-1)
    asked = [b for b in range(batch.num_examples) if labels_B[b] >= FIRST_ID]
    expected = expected - sum(log_p_BC[b, labels_B[b] - FIRST_ID] for b in asked)
    torch.testing.assert_close(total, expected)
    assert count == task.count(batch) == positions + len(asked)
    assert positions > 0
    assert asked


def test_next_item_starts_at_what_the_last_visible_event_says(world) -> None:
    tasks, model, batch, output = world
    task, head = tasks["item"], model.heads["item"]
    found = task.scores(head, output, batch)
    weight, bias = head.table()
    for b in range(batch.num_examples):
        if batch.visible_B[b] == 0:  # popularity alone
            expected = bias
        else:
            event = int(batch.offsets_S[batch.read_B[b]] + batch.visible_B[b]) - 1
            expected = weight @ head.query(output.event_ND[event]) + bias
        assert found["top_k"][b].tolist() == (expected[FIRST_ID:].argsort(descending=True) + FIRST_ID).tolist()


def test_labels_at_cuts_teach_the_correction_and_events_the_rest() -> None:
    """Where no training example has a label, as under leave-one-out, the answer stays that of the last event."""
    tasks = {"item": make_tasks()["item"]}
    batch = make_run_batch(3)
    for labels_B in (batch.labels["item"], torch.full_like(batch.labels["item"], -1)):
        model = make_model(tasks, {})
        head = model.heads["item"]
        labelled = replace(batch, labels={"item": labels_B})
        tasks["item"].loss(head, model(labelled), labelled)[0].backward()
        of_labels = [*head.correction.parameters(), *head.trust.parameters()]
        assert any(bool(p.grad.any()) for p in of_labels) == bool((labels_B >= FIRST_ID).any())
        assert bool(head.project.weight.grad.any())  # of events


def test_what_is_popular_at_cuts_is_the_prior_of_next_item() -> None:
    task = make_task("next_item", "item")
    counts_V = torch.arange(11)
    task.fit_prior(torch.tensor([5, 5, 5, -1]), counts_V)
    assert int(task.prior_C.argmax()) + FIRST_ID == 5
    task.fit_prior(torch.full((4,), -1), counts_V)
    assert int(task.prior_C.argmax()) + FIRST_ID == 10


def test_scores_without_labels_have_no_rank(world) -> None:
    tasks, model, batch, output = world
    unlabelled = replace(batch, labels={})
    for name in ("basket", "item"):
        assert set(tasks[name].scores(model.heads[name], output, unlabelled)) == {"top_k", "scores"}


def test_prior_loss_is_that_of_answering_the_prior(world) -> None:
    tasks = world[0]
    labels = make_labels(200, seed=9)["basket"]
    log_p, losses = tasks["basket"].prior_C.log(), []
    for a, b in zip(labels.offsets[:-1], labels.offsets[1:], strict=True):
        if b > a:
            best = sum(1 / math.log2(place + 2) for place in range(int(b - a)))
            losses.append(-log_p[labels.ids[a:b] - FIRST_ID].sum().item() / best)
    assert tasks["basket"].prior_loss == pytest.approx(np.mean(losses), rel=1e-5)
    p = torch.arange(9).flip(0) + 1.0  # counts of the item's ids, smoothed by one
    assert tasks["item"].prior_loss == pytest.approx(torch.distributions.Categorical(p).entropy().item(), rel=1e-5)


def test_prior_is_popularity() -> None:
    task = make_task("retrieval", "basket", top_k=10)
    task.fit_prior(sets([5], [5], [7], []))
    scores = task.prior_scores(4)
    assert scores["top_k"][:, :2].tolist() == [[5, 7]] * 4
    assert task.metrics(scores, sets([5], [7], [], []))["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    item = make_task("next_item", "item")
    item.fit_prior(torch.zeros(0), torch.tensor([9.0] * 2 + [1.0] * 8 + [50.0]))
    assert item.prior_scores(1)["top_k"][0, 0] == 10


def test_relevant_ids_leave_out_what_names_nothing() -> None:
    row, ids = relevant_ids(sets([0, 1, 2], [], [9]))
    assert (row.tolist(), ids.tolist()) == ([0, 2], [2, 9])
    row, ids = relevant_ids(torch.tensor([-1, 1, 4]))
    assert (row.tolist(), ids.tolist()) == ([2], [4])


def test_nothing_to_find_is_said() -> None:
    task = make_task("next_item", "item")
    labels = torch.tensor([1, 1])  # an unknown id cannot be found
    assert task.undefined(labels) == "no example has an id to find"
    assert np.isnan(task.metrics({"top_k": np.array([[2], [3]])}, labels)["ndcg@10"])


def test_the_field_must_be_a_category() -> None:
    with pytest.raises(UserError, match=r"tasks\.basket\.label\.field: the field 'value' is of kind number"):
        make_task("retrieval", "basket", label=LabelSchema(kind="set", field="value"))
    with pytest.raises(UserError, match="did you mean 'store'"):
        make_task("retrieval", "basket", label=LabelSchema(kind="set", field="stor"))
