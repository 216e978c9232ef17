"""Vectors of events: categories, lists, numbers, time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from factories import check_gradients, make_batch, make_schema

from supermoe.config import ModelConfig
from supermoe.data.batch import Jagged
from supermoe.model.embedding import (
    EventEmbedding,
    InterpolatedEmbedding,
    calendar,
    embedding_table,
    gap_to_previous,
    log_gap,
    mean_embedding,
)

CONFIG = ModelConfig(dim=8, heads=2, number_bins=4)


def test_interpolation_is_exact_at_knots_linear_between_and_flat_outside() -> None:
    embedding = InterpolatedEmbedding([3, 5], 8)
    first_column, second_column = embedding.weight[:4], embedding.weight[4:]
    u_N2 = torch.tensor([[0.0, 0.0], [0.5, 1.0], [1.0, 0.3], [2.0, -1.0], [torch.nan, 0.25], [0.25, torch.nan]])
    expected = [
        first_column[0] + second_column[0],
        first_column[1] + second_column[4],
        first_column[2] + 0.8 * second_column[1] + 0.2 * second_column[2],
        first_column[2] + second_column[0],
        first_column[3] + second_column[1],
        (first_column[0] + first_column[1]) / 2 + second_column[5],
    ]
    torch.testing.assert_close(embedding(u_N2), torch.stack(expected))


def test_interpolation_without_columns_is_zero() -> None:
    assert InterpolatedEmbedding([], 8)(torch.zeros(3, 0)).tolist() == [[0.0] * 8] * 3


def test_calendar_and_gap() -> None:
    monday = 1_500_249_600  # 2017-07-17 00:00 UTC
    u_N2 = calendar(torch.tensor([monday, monday + 12 * 3600, monday + 7 * 86400 - 1, 0]))
    torch.testing.assert_close(u_N2[:, 0], torch.tensor([0, 0.5, 1 - 1 / 86400, 0], dtype=torch.float64))
    assert (u_N2[:, 1] * 6).round().int().tolist() == [0, 0, 6, 3]  # 1970-01-01 was a Thursday
    gaps = log_gap(torch.tensor([0, 1, 86400, 5 * 365 * 86400, 10 * 365 * 86400]))
    assert gaps[0] == 0
    assert gaps[3] == gaps[4] == 1
    assert (gaps.diff()[:3] > 0).all()


def test_gap_is_to_the_event_before_the_read() -> None:
    batch = make_batch([3, 1, 0], [])
    gap_N = gap_to_previous(batch)
    assert gap_N.tolist() == [0, *batch.time_N[:3].diff().tolist(), 0]
    earlier = dataclasses.replace(batch, previous_S=batch.previous_S - torch.tensor([7, 9, 0]))
    assert gap_to_previous(earlier).tolist() == [7, *gap_N[1:3].tolist(), 9]


def test_lists_are_averaged_without_padding() -> None:
    table = embedding_table(5, 3)
    lists = Jagged(torch.tensor([0, 3, 3]), torch.tensor([2, 0, 4]))
    expected = torch.stack([(table.weight[2] + table.weight[4]) / 2, torch.zeros(3)])
    torch.testing.assert_close(mean_embedding(table, lists), expected)


def test_padding_contributes_nothing_and_gets_no_gradient() -> None:
    embedding, batch = EventEmbedding(make_schema(), CONFIG).eval(), make_batch()
    padded = dataclasses.replace(batch, fields={**batch.fields, "type": torch.zeros_like(batch.fields["type"])})
    before = embedding(padded)
    before.square().sum().backward()
    table = embedding.tables["type"]
    assert not table.weight.grad.any()
    with torch.no_grad():
        table.weight[1:] += 1
    assert torch.equal(embedding(padded), before)
    assert not torch.equal(embedding(batch), before)


@pytest.mark.parametrize("name", ["type", "store", "value"])
def test_every_field_matters(name: str) -> None:
    embedding, batch = EventEmbedding(make_schema(), CONFIG).eval(), make_batch()
    other = dataclasses.replace(batch, fields={**batch.fields, name: 1 - batch.fields[name].clamp(max=1)})
    assert not torch.equal(embedding(other), embedding(batch))


def test_only_vocabularies_are_tables() -> None:
    embedding = EventEmbedding(make_schema(), CONFIG)
    tables = {name for name, p in embedding.named_parameters() if getattr(p, "is_table", False)}
    assert tables == {"tables.type_.weight", "tables.store_.weight", "tables.tags_.weight"}


def test_gradients() -> None:
    embedding, batch = EventEmbedding(make_schema(), CONFIG).eval(), make_batch()
    fields = {name: ids.clamp(min=1) if name != "value" else ids for name, ids in batch.fields.items()}
    known = dataclasses.replace(batch, fields=fields)  # the padding row has a value but no gradient
    check_gradients(embedding, lambda: embedding(known))
