from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake_run import make_run_batch, run_schema

from supermoe.data.schema import FIRST_ID, FieldSchema
from supermoe.objectives.event_softmax import MAX_FULL_SOFTMAX, EventSoftmax, entropy, next_ids


class Head:
    """A field head whose query is its input."""

    def __init__(self, size: int, dim: int):
        g = torch.Generator().manual_seed(0)
        self.weight = torch.randn(size, dim, generator=g)
        self.bias = torch.randn(size, generator=g)

    def query(self, x):
        return x

    def table(self):
        return self.weight, self.bias

    def rows(self, ids):
        return self.weight, self.bias, ids


def schema_of(size: int, hash_size: int | None = None):
    return run_schema().model_copy(
        update={"fields": {"f": FieldSchema(kind="category", size=size, hash_size=hash_size)}}
    )


def test_next_ids_stop_at_the_ends_of_reads() -> None:
    batch = replace(
        make_run_batch(0, 3),
        offsets_S=torch.tensor([0, 3, 4, 4]),
        fields={"f": torch.tensor([5, 6, 0, 8])},
    )
    assert next_ids(batch, "f").tolist() == [6, 0, 0, 0]
    assert batch.fields["f"].tolist() == [5, 6, 0, 8]


def test_full_softmax_is_over_real_classes_only() -> None:
    head, x = Head(7, 4), torch.randn(3, 4)
    target = torch.tensor([2, 6, 4])
    logits = (x @ head.weight.t() + head.bias)[:, FIRST_ID:]
    expected = -logits.log_softmax(-1)[range(3), target - FIRST_ID]
    torch.testing.assert_close(EventSoftmax(schema_of(7), "f").losses(head, x, target), expected)


@pytest.mark.parametrize("hash_size", [None, 40])
def test_sampled_softmax_has_the_full_one_as_its_limit(hash_size: int | None) -> None:
    """With many draws the corrected sum over negatives approaches the sum over all classes but the target's own.

    Both logits carry -log q; the target's is not averaged over draws, so the limit is log(1 + J (Z - e_t) q_t / e_t).
    """
    torch.manual_seed(0)
    size, draws = 42, 200_000
    softmax = EventSoftmax(schema_of(size, hash_size), "f", negatives=draws)
    head, x, target = Head(size, 4), torch.randn(2, 4), torch.tensor([2, 30])
    logits = (x @ head.weight.t() + head.bias)[:, FIRST_ID:]
    own = logits[range(2), target - FIRST_ID]
    rest = logits.exp().sum(-1) - own.exp()
    q = softmax.log_q(target - FIRST_ID).exp()
    expected = torch.log1p(rest * draws * q / own.exp())
    # relative error of a mean over 2e5 draws with a spread of about 3 means: below 1 %, so 0.02 on the log
    torch.testing.assert_close(softmax.losses(head, x, target), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("hash_size", [None, 40])
def test_negatives_are_drawn_as_log_q_says(hash_size: int | None) -> None:
    torch.manual_seed(0)
    softmax = EventSoftmax(schema_of(12, hash_size), "f", negatives=100_000)
    drawn = torch.bincount(softmax._draw(torch.device("cpu")), minlength=10) / 100_000
    q = softmax.log_q(torch.arange(softmax.num_classes)).exp()
    assert q.sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(drawn, q, atol=0.008, rtol=0)  # 5 standard errors of a share of 0.5 in 1e5


def test_auto_samples_only_large_vocabularies() -> None:
    assert EventSoftmax(schema_of(MAX_FULL_SOFTMAX + FIRST_ID), "f").num_negatives is None
    assert EventSoftmax(schema_of(MAX_FULL_SOFTMAX + FIRST_ID + 1), "f").num_negatives == 512
    assert EventSoftmax(schema_of(20), "f", negatives=5).num_negatives == 5


@pytest.mark.parametrize("negatives", ["all", 3])
def test_nothing_to_predict_is_an_empty_loss(negatives) -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    softmax = EventSoftmax(schema_of(7), "f", negatives)
    loss = softmax.losses(Head(7, 4), x, torch.zeros(0, dtype=torch.int64)).sum()
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None


def test_prior_is_smoothed() -> None:
    prior = EventSoftmax(schema_of(5), "f").prior(torch.tensor([9.0, 9.0, 3.0, 0.0, 0.0]))
    torch.testing.assert_close(prior, torch.tensor([4 / 6, 1 / 6, 1 / 6]))
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(math.log(4))
