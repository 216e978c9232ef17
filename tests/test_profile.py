"""Leading directions of the features: the part of a user's vector that no task has shaped."""

from __future__ import annotations

import torch

from supermoe.model.profile import Profile


def test_every_group_gives_its_principal_components_under_one_norm() -> None:
    x_BX = torch.randn(300, 9, generator=torch.Generator().manual_seed(0))
    x_BX[:, 5] = 5 * x_BX[:, 0] + 7  # of another mean, and along with an input of the other group
    profile = Profile([4, 5], dim=2)
    profile.fit(x_BX.split(128), square_norm=16)
    found_BP = profile(x_BX)
    assert found_BP.shape == (300, 4)
    for found, part in zip(found_BP.split(2, dim=1), x_BX.split([4, 5], dim=1), strict=True):
        left, strength, _ = torch.linalg.svd(part - part.mean(0), full_matrices=False)
        expected = left[:, :2] * strength[:2]
        expected = expected * (16 / expected.square().sum(1).mean()).sqrt()
        torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=1e-4)  # fp32 sums of 300


def test_a_group_of_few_inputs_keeps_them_all_and_one_that_never_varies_is_zero() -> None:
    profile = Profile([1, 0, 3], dim=2)
    x_BX = torch.tensor([[1.0, 5.0, 5.0, 5.0], [-1.0, 5.0, 5.0, 5.0]])
    profile.fit([x_BX], square_norm=4)
    assert profile(x_BX).abs().tolist() == [[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
