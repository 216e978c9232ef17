"""Heads: linear, field, copied counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from factories import check_gradients, make_batch, take_lists
from torch import nn

from supermoe.model.embedding import embedding_table
from supermoe.model.heads import CopyTerm, FieldHead, LinearHead

BAGS = ["type_28d", "type_all"]


def randomise(module: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def test_linear_head_starts_at_its_bias() -> None:
    head, batch = LinearHead(6, 3, [], dropout=0.5), make_batch()
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
    assert head.logits(torch.randn(5, 6), batch).tolist() == [[1.0, -2.0, 3.0]] * 5


def test_linear_head_with_bags_starts_at_its_bias_and_copies_counts_once_it_has_learnt() -> None:
    head, batch = LinearHead(6, 11, BAGS, dropout=0), make_batch()
    x_BX = torch.randn(5, 6)
    assert not head.logits(x_BX, batch).any()
    with torch.no_grad():
        head.copy.class_VW[:, 0] = 1.0
    bag = batch.bags["type_28d"]
    had_BV = torch.zeros(5, 11)
    had_BV[torch.repeat_interleave(torch.arange(5), bag.offsets.diff()), bag.ids] = torch.log1p(bag.weights)
    torch.testing.assert_close(head.logits(x_BX, batch), had_BV)


def test_copy_term_weighs_counts_by_window_read_out_and_class() -> None:
    copy, batch = CopyTerm(6, 11, BAGS, start=1.0), make_batch()
    assert copy.window.bias.tolist() == [0.5, 0.5]
    randomise(copy)
    copy.rate_V.fill_(2.0)
    x_BX = torch.randn(5, 6)
    expected_BV = torch.zeros(5, 11)
    for w, name in enumerate(BAGS):
        bag = batch.bags[name]
        for b in range(5):
            for r in range(int(bag.offsets[b]), int(bag.offsets[b + 1])):
                weight = copy.window(x_BX)[b, w] + copy.class_VW[bag.ids[r], w]
                expected_BV[b, bag.ids[r]] += weight * torch.log1p(2 * bag.weights[r])
    torch.testing.assert_close(copy(x_BX, batch), expected_BV)


def test_field_head_scores_by_the_tables_own_embeddings() -> None:
    table = embedding_table(11, 4)
    head, x_BX = FieldHead(6, table, [], dropout=0), torch.randn(5, 6)
    randomise(head)
    weight_VD, bias_V = head.table()
    assert weight_VD is table.weight
    torch.testing.assert_close(head.logits(x_BX, make_batch()), head.query(x_BX) @ table.weight.t() + bias_V)
    assert "weight" not in {name for name, _ in head.named_parameters() if "norm" not in name and "project" not in name}


def test_field_head_starts_as_a_dirichlet_posterior() -> None:
    head, batch = FieldHead(6, embedding_table(11, 4), ["type_all"], dropout=0), make_batch()
    prior_V = torch.rand(11).softmax(0)
    head.start_at(prior_V)
    bag = batch.bags["type_all"]
    counts_BV = torch.zeros(5, 11)
    counts_BV[torch.repeat_interleave(torch.arange(5), bag.offsets.diff()), bag.ids] = bag.weights
    posterior_BV = (60 * prior_V + counts_BV) / (60 + counts_BV.sum(1, keepdim=True))
    torch.testing.assert_close(head.logits(torch.randn(5, 6), batch).softmax(1), posterior_BV)


def test_field_head_of_events_takes_any_number_of_rows() -> None:
    head = FieldHead(6, embedding_table(11, 4), [], dropout=0)
    assert head.query(torch.randn(17, 6)).shape == (17, 4)
    assert head.copy is None


def test_an_examples_logits_depend_on_its_own_bags_only() -> None:
    head, batch = FieldHead(6, embedding_table(11, 4), BAGS, dropout=0), make_batch()
    randomise(head)
    x_BX = torch.randn(5, 6)
    logits_BV = head.logits(x_BX, batch)
    order = torch.tensor([3, 1])
    picked = dataclasses.replace(batch, bags={name: take_lists(bag, order) for name, bag in batch.bags.items()})
    torch.testing.assert_close(head.logits(x_BX[order], picked), logits_BV[order])


@pytest.mark.parametrize("rows", [0, 5])
def test_gradients(rows: int) -> None:
    batch = make_batch(examples=[(0, 1)] * rows)
    linear = LinearHead(6, 11, BAGS, dropout=0)
    field = FieldHead(6, embedding_table(11, 4).double(), BAGS, dropout=0)
    for head in (linear, field):
        randomise(head)
        check_gradients(head, lambda x, head=head: head.logits(x, batch), torch.randn(rows, 6))


def test_the_prior_of_a_head_with_direct_inputs_weakens_with_users_and_doubts_what_was_learnt() -> None:
    head = LinearHead(6, 3, [], dropout=0, direct_dim=4)
    assert LinearHead(6, 3, [], dropout=0).penalty(100) == 0.0
    with torch.no_grad():
        head.direct_CX.fill_(1.0)
    direct = [head.penalty(users).item() for users in (100, 10_000)]
    assert direct == pytest.approx([400 / 100 * 12, 400 / 10_000 * 12])
    with torch.no_grad():
        head.direct_CX.zero_()
        head.weight.fill_(1.0)
    learnt = [head.penalty(users).item() for users in (100, 10_000)]
    assert learnt == pytest.approx([400 / 100 * 18 * 101, 400 / 10_000 * 18 * 2])
