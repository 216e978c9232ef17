from __future__ import annotations

import pytest
import torch
from fake_run import make_model, make_run_batch, run_schema

from supermoe.data.schema import FIRST_ID
from supermoe.objectives.event_softmax import entropy
from supermoe.objectives.pretraining import NextEvent
from supermoe.typed_yaml import UserError


def make(fields: list[str]) -> NextEvent:
    objective = NextEvent(NextEvent.Config(fields=fields), name="next", schema=run_schema())
    objective.fit_prior({"type": torch.arange(11).flip(0)})
    return objective


def test_default_is_every_category() -> None:
    assert list(make([]).head_specs()) == ["next__type", "next__store"]


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
