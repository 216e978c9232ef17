"""What the features say of a user, in short: the part of the user's vector that no task has shaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Profile(nn.Module):
    """Leading principal directions of groups of inputs, fixed by `fit`: (x - center) times a matrix of blocks.

    Each group has directions of its own, so that many windows of one kind of number do not hide another.
    """

    center_X: Tensor
    matrix_XP: Tensor

    def __init__(self, sizes: Sequence[int], dim: int):
        super().__init__()
        self.sizes, self.widths = list(sizes), [min(size, dim) for size in sizes]
        self.register_buffer("center_X", torch.zeros(sum(self.sizes)))
        blocks = [torch.eye(size, width) for size, width in zip(self.sizes, self.widths, strict=True)]
        self.register_buffer("matrix_XP", torch.block_diag(*blocks))

    def forward(self, x_BX: Tensor) -> Tensor:
        """Inputs, group behind group -> x_BP; what is behind the last group is not read."""
        return (x_BX[:, : len(self.center_X)] - self.center_X) @ self.matrix_XP

    @torch.no_grad()
    def fit(self, chunks: Iterable[Tensor], square_norm: float) -> None:
        """Set the directions by inputs that come in chunks; every group's vectors get this mean squared norm."""
        count, sum_X = 0, torch.zeros(sum(self.sizes), dtype=torch.float64)
        square_XX = torch.outer(sum_X, sum_X)
        for chunk_BX in chunks:
            x_BX = chunk_BX[:, : len(sum_X)]
            count += len(x_BX)
            sum_X += x_BX.sum(0)
            square_XX += x_BX.t() @ x_BX
        mean_X = sum_X / max(1, count)
        covariance_XX = square_XX / max(1, count) - torch.outer(mean_X, mean_X)
        self.center_X.copy_(mean_X)
        start, blocks = 0, []
        for size, width in zip(self.sizes, self.widths, strict=True):
            group = slice(start, start + size)
            variance_G, direction_GG = torch.linalg.eigh(covariance_XX[group, group])  # in ascending order
            total = variance_G.flip(0)[:width].sum().clamp(min=1e-12)
            blocks.append(direction_GG.flip(1)[:, :width] * (square_norm / total).sqrt())
            start += size
        self.matrix_XP.copy_(torch.block_diag(*blocks))
