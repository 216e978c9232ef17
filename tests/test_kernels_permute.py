from __future__ import annotations

import pytest
import torch
from kernel_tests import DEVICE, needs_device
from torch import Tensor

from supermoe.kernels import permute

pytestmark = needs_device


def check(expert_NK: Tensor, num_experts: int, rows: int = 16) -> permute.Plan:
    plan = permute.plan(expert_NK.to(DEVICE), num_experts, rows)
    expert_R, pair_P = expert_NK.flatten(), plan.pair_P.cpu()
    first, tile_expert, place_R = plan.first_tile_E.tolist(), plan.expert_T.cpu(), plan.place_NK.cpu().flatten()
    dropped = torch.where(expert_R < 0, num_experts, expert_R)
    last = first[num_experts] + -(-int((expert_R < 0).sum()) // rows)
    for expert, (start, end) in enumerate(zip(first, [*first[1:], last], strict=True)):
        pairs = torch.where(dropped == expert)[0]
        padding = torch.full(((end - start) * rows - len(pairs),), -1)
        assert len(padding) < rows
        assert torch.equal(pair_P[start * rows : end * rows].long(), torch.cat([pairs, padding]))
        assert (tile_expert[start:end] == expert).all()
    assert (tile_expert[last:] > num_experts).all()
    kept = expert_R >= 0
    assert (place_R[~kept] == -1).all()
    assert torch.equal(pair_P[place_R[kept].long()].long(), torch.where(kept)[0])
    return plan


@pytest.mark.parametrize(("num_tokens", "k"), [(0, 2), (1, 1), (700, 3)])  # 2100 pairs: three blocks
def test_pairs_sorted_by_expert(num_tokens: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    check(torch.randint(-1, 5, (num_tokens, k), generator=generator), 5)


def test_extremes() -> None:
    check(torch.full((40, 1), 2), 3)  # all rows on one expert
    check(torch.full((40, 1), -1), 3)  # all dropped
    check(torch.zeros(32, 1, dtype=torch.int64), 1)  # no padding
    check(torch.arange(40)[:, None] % 20, 20, rows=64)  # more experts than full tiles


def test_combine_sums_each_token() -> None:
    expert_NK = torch.tensor([[0, 1], [1, -1], [-1, -1], [2, 0]])
    plan = check(expert_NK, 3)
    rows_PD = torch.randn(len(plan.pair_P), 24, generator=torch.Generator().manual_seed(0))
    place_NK = plan.place_NK.cpu().long()
    expected = (rows_PD[place_NK.clamp(min=0)] * (place_NK >= 0)[..., None]).sum(1)
    torch.testing.assert_close(permute.combine(rows_PD.to(DEVICE), plan).cpu(), expected)
