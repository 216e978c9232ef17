from __future__ import annotations

import pytest
import torch
from fake_run import make_model, make_run_batch, run_schema

from supermoe.data.schema import FIRST_ID, LabelSchema
from supermoe.objectives.event_softmax import entropy
from supermoe.objectives.pretraining import NextEvent, default_fields
from supermoe.typed_yaml import UserError


def make(fields: list[str]) -> NextEvent:
    objective = NextEvent(NextEvent.Config(fields=fields), name="next", schema=run_schema())
    objective.fit_prior({"type": torch.arange(11).flip(0)})
    return objective


def test_default_is_what_labels_are_about_or_else_the_largest_field() -> None:
    schema = run_schema()
    without = schema.model_copy(update={"labels": {}})
    largest = max(
        (f for f in schema.fields if schema.fields[f].kind == "category"), key=lambda f: schema.fields[f].size
    )
    assert default_fields(without) == [largest]
    asked = schema.model_copy(update={"labels": {"x": LabelSchema(kind="class", source="store", num_classes=2)}})
    assert default_fields(asked) == ["store"]
    assert default_fields(schema.model_copy(update={"fields": {}})) == []


def test_loss_is_the_mean_over_fields_on_the_scale_of_their_priors() -> None:
    objective, batch = make(["type", "store"]), make_run_batch(1)
    model = make_model({}, {"next": objective}).eval()
    output = model(batch)
    total, count = objective.loss(model.heads, output, batch)
    expected = 0.0
    for field, prior in objective.prior_C.items():
        head = model.heads[f"next__{field}"]
        weight, bias = head.table()
        for a, b in zip(batch.offsets_S[:-1].tolist(), batch.offsets_S[1:].tolist(), strict=True):
            for n in range(a, b - 1):
                target = int(batch.fields[field][n + 1])
                if target >= FIRST_ID:
                    log_p = (weight @ head.query(output.event_ND[n]) + bias)[FIRST_ID:].log_softmax(0)
                    expected = expected - log_p[target - FIRST_ID] / entropy(prior) / 2
    torch.testing.assert_close(total, expected)
    lengths = batch.offsets_S.diff().tolist()
    assert count == objective.count(batch) == sum(max(n - 1, 0) for n in lengths)


def test_fields_are_checked() -> None:
    with pytest.raises(
        UserError, match=r"loss\.pretraining\.next\.fields: there is no field 'typ', did you mean 'type'"
    ):
        make(["typ"])
    with pytest.raises(UserError, match="only a category"):
        make(["tags"])
