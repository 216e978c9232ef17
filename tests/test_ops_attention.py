from __future__ import annotations

import numpy as np
import pytest
import torch
from ops_checks import assert_as_exact_as_torch, assert_same
from torch import Tensor

from supermoe.ops import attention, packing, reference

LENGTHS = [
    [1],
    [63],
    [100],
    [0, 0],
    [],
    [5, 1, 0],
    [0, 9, 3, 0, 28, 1, 19],  # in no order, empty ones between
    [100, 63, 63, 40, 33, 17, 16, 15, 3, 2, 1, 1, 0],
]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


def heads(num_rows: int, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return [torch.randn(num_rows, 2, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def questions(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indicators in random order: reads with none, one or many, examples that see nothing, something, everything."""
    generator = np.random.default_rng(seed)
    read = np.concatenate([np.full(generator.integers(0, 6), s) for s in range(len(lengths))] or [np.zeros(0)]).astype(
        int
    )
    generator.shuffle(read)
    visible = [int(generator.choice([0, lengths[s], generator.integers(0, lengths[s] + 1)])) for s in read]
    return torch.from_numpy(read), torch.tensor(visible, dtype=torch.int64)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("weighted", [True, False])
def test_history_agrees_with_the_reference(lengths: list[int], weighted: bool) -> None:
    offsets = offsets_of(lengths)
    inputs = heads(sum(lengths))
    groups = packing.pack(offsets)
    assert_same(
        lambda q, k, v: attention.history_attention(q, k, v, offsets, offsets, groups),
        lambda q, k, v: reference.history_attention(q, k, v, offsets, offsets),
        inputs,
        heads(sum(lengths) + 1)[0][:-1] if weighted else None,
    )


def test_history_with_cached_keys_aligns_at_the_end() -> None:
    known, new = [5, 7, 3, 4, 0, 100], [2, 7, 0, 1, 0, 30]
    (q_NHA,), (k_JHA, v_JHA) = heads(sum(new), 1), heads(sum(known), 2)
    where = offsets_of(new), offsets_of(known)
    assert_same(
        lambda q, k, v: attention.history_attention(q, k, v, *where),
        lambda q, k, v: reference.history_attention(q, k, v, *where),
        [q_NHA, k_JHA, v_JHA],
    )


def test_reference_history_is_causal_and_stays_in_its_read() -> None:
    offsets = offsets_of([6, 4])
    q, k, v = heads(10)
    before = reference.history_attention(q, k, v, offsets, offsets)
    k[4], v[4] = 9.0, 9.0
    changed = (reference.history_attention(q, k, v, offsets, offsets) != before).any(dim=2).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 2 + [False] * 4
    torch.testing.assert_close(before[0], v[0])  # a first event sees nothing but itself


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("weighted", [True, False])
def test_indicators_agree_with_the_reference(lengths: list[int], weighted: bool) -> None:
    offsets, (read, visible) = offsets_of(lengths), questions(lengths)
    inputs = heads(len(read)) + heads(sum(lengths), 2)
    groups = packing.pack_indicators(offsets, read, visible)
    assert_same(
        lambda *x: attention.indicator_attention(*x, offsets, read, visible, groups),
        lambda *x: reference.indicator_attention(*x, offsets, read, visible),
        inputs,
        heads(len(read) + 1)[0][:-1] if weighted else None,
    )


def test_an_indicator_that_sees_nothing_returns_its_own_value() -> None:
    offsets, read, visible = offsets_of([3, 0]), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 2])
    q, k_self, v_self, k, v = heads(3) + heads(3, 2)
    out = attention.indicator_attention(q, k_self, v_self, k, v, offsets, read, visible)
    torch.testing.assert_close(out[:2], v_self[:2])
    assert not torch.allclose(out[2], v_self[2])


def test_indicators_are_finite_and_exact_with_huge_scores() -> None:
    offsets, read, visible = offsets_of([4]), torch.tensor([0, 0]), torch.tensor([4, 2])
    inputs = [1e3 * x for x in heads(2) + heads(4, 2)]  # scores of 1e6 overflow exp in every dtype
    out = attention.indicator_attention(*inputs, offsets, read, visible)
    torch.testing.assert_close(out, reference.indicator_attention(*inputs, offsets, read, visible))
    assert out.isfinite().all()


def test_packed_is_as_each_user_alone() -> None:
    lengths = [40, 17, 3, 1]
    offsets, (read, visible) = offsets_of(lengths), questions(lengths, seed=3)
    q, k, v = heads(sum(lengths), dtype=torch.float32)
    own = heads(len(read), dtype=torch.float32)
    packed = attention.history_attention(q, k, v, offsets, offsets)
    answers = attention.indicator_attention(*own, k, v, offsets, read, visible)
    for s, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        mine, alone = read == s, offsets_of([end - start])
        here = slice(start, end)
        torch.testing.assert_close(packed[here], attention.history_attention(q[here], k[here], v[here], alone, alone))
        torch.testing.assert_close(
            answers[mine],
            attention.indicator_attention(
                *(x[mine] for x in own), k[here], v[here], alone, torch.zeros_like(read[mine]), visible[mine]
            ),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    lengths = [100, 63, 9, 1]
    offsets, (read, visible) = offsets_of(lengths), questions(lengths)
    assert_as_exact_as_torch(
        lambda q, k, v: attention.history_attention(q, k, v, offsets, offsets),
        lambda q, k, v: reference.history_attention(q, k, v, offsets, offsets),
        heads(sum(lengths)),
        dtype,
    )
    assert_as_exact_as_torch(
        lambda *x: attention.indicator_attention(*x, offsets, read, visible),
        lambda *x: reference.indicator_attention(*x, offsets, read, visible),
        heads(len(read)) + heads(sum(lengths), 2),
        dtype,
    )


def test_gradcheck() -> None:
    lengths = [3, 0, 5]
    offsets, (read, visible) = offsets_of(lengths), questions(lengths, seed=1)
    leaves = [x.requires_grad_() for x in heads(len(read)) + heads(sum(lengths), 2)]
    assert torch.autograd.gradcheck(lambda *x: attention.indicator_attention(*x, offsets, read, visible), leaves)
    q, k, v = (x.requires_grad_() for x in heads(sum(lengths)))
    assert torch.autograd.gradcheck(lambda *x: attention.history_attention(*x, offsets, offsets), (q, k, v))
