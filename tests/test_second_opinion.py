"""How a second opinion counts in what a head answers."""

from __future__ import annotations

import pytest
import torch
from factories import make_batch
from torch import Tensor

from supermoe.data.batch import Batch
from supermoe.model.embedding import embedding_table
from supermoe.model.heads import FieldHead, LinearHead, NextFieldHead
from supermoe.model.second_opinion import SecondOpinion

SIZE, WIDTH = 11, 6


class Same(SecondOpinion):
    """Says -8 of everything."""

    def logits(self, batch: Batch) -> Tensor:
        return torch.full((batch.num_examples, SIZE), -8.0)


def answer(kind: str, second: SecondOpinion) -> tuple[torch.nn.Module, Tensor]:
    """A head, and its logits of a batch."""
    torch.manual_seed(0)
    batch, table = make_batch(), embedding_table(SIZE, 4)
    x_BX = torch.randn(batch.num_examples, WIDTH)
    if kind == "linear":
        head = LinearHead(WIDTH, SIZE, ["type_all"], dropout=0.0, second=second)
    elif kind == "field":
        head = FieldHead(WIDTH, table, ["type_all"], dropout=0.0, second=second)
    else:
        head = NextFieldHead(WIDTH, WIDTH, table, ["type_all"], 0.0, 0.0, second)
    torch.nn.init.normal_(head.bias)
    head.train(second.training)
    if kind == "next":
        return head, head.logits_at_cut(torch.randn(batch.num_examples, SIZE), x_BX, batch)
    return head, head.logits(x_BX, batch)


@pytest.mark.parametrize("kind", ["linear", "field", "next"])
def test_heads_mix_it_in_by_its_share_and_only_when_they_answer(kind: str) -> None:
    second = Same().eval()
    _, alone = answer(kind, second)
    assert alone.std() > 0.1  # without a share the network answers
    for share in (0.25, 1.0):
        second.share.fill_(share)
        torch.testing.assert_close(answer(kind, second)[1], (1 - share) * alone - 8 * share)
    torch.testing.assert_close(answer(kind, second.train())[1], alone)


def test_its_share_is_kept_with_the_head() -> None:
    second = Same().eval()
    second.share.fill_(0.25)
    head, _ = answer("linear", second)
    assert head.state_dict()["second.share"] == 0.25
