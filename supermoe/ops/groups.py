"""Products of rows with the matrices of their experts, on a CPU: three ways to lay rows out, one interface.

A group holds the slots `start:end`. `product` writes its rows times their experts' matrices; `add_outer` puts the sum
of its rows' outer products into each expert's gradient, whose memory is not yet filled where no group did before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GATHERED = 1 << 15  # values of a matrix up to which it is copied for a batched product


@dataclass(frozen=True)
class Pieces:
    """Rows of one expert after the other, `counts[i]` of `experts[i]`; nothing is padded."""

    start: int
    end: int
    experts: list[int]
    counts: list[int]
    continues: bool  # the first expert has rows in the group before, too

    def product(self, rows_RI: Tensor, stack_EIO: Tensor, out_RO: Tensor) -> None:
        """out = rows times their experts' matrices."""
        matrices = stack_EIO.unbind()
        parts = zip(self.experts, rows_RI.split(self.counts), out_RO.split(self.counts), strict=True)
        for expert, rows, out in parts:
            torch.mm(rows, matrices[expert], out=out)

    def add_outer(self, left_RI: Tensor, right_RO: Tensor, grad_EIO: Tensor) -> None:
        """grad[e] = left_e^T right_e, added to what the group before left there."""
        grads = grad_EIO.unbind()
        parts = zip(self.experts, left_RI.split(self.counts), right_RO.split(self.counts), strict=True)
        for place, (expert, left, right) in enumerate(parts):
            if place == 0 and self.continues:
                grads[expert].addmm_(left.t(), right)
            else:
                torch.mm(left.t(), right, out=grads[expert])


@dataclass(frozen=True)
class Even:
    """The same number of rows for each of the experts `first:last`: one batched product on the stack itself."""

    start: int
    end: int
    first: int
    last: int

    def product(self, rows_RI: Tensor, stack_EIO: Tensor, out_RO: Tensor) -> None:
        """out = rows times their experts' matrices."""
        torch.bmm(self._by_expert(rows_RI), stack_EIO[self.first : self.last], out=self._by_expert(out_RO))

    def add_outer(self, left_RI: Tensor, right_RO: Tensor, grad_EIO: Tensor) -> None:
        """grad[e] = left_e^T right_e."""
        left_EIR = self._by_expert(left_RI).transpose(1, 2)
        torch.bmm(left_EIR, self._by_expert(right_RO), out=grad_EIO[self.first : self.last])

    def _by_expert(self, rows_RI: Tensor) -> Tensor:
        return rows_RI.unflatten(0, (self.last - self.first, -1))


@dataclass(frozen=True)
class Blocks:
    """Blocks of equally many rows, block b of expert `experts[b]`; one batched product where matrices are small."""

    start: int
    end: int
    experts: list[int]

    def product(self, rows_RI: Tensor, stack_EIO: Tensor, out_RO: Tensor) -> None:
        """out = rows times their experts' matrices."""
        rows_bRI, out_bRO = self._by_block(rows_RI), self._by_block(out_RO)
        if stack_EIO[0].numel() <= _GATHERED:
            torch.bmm(rows_bRI, stack_EIO.index_select(0, torch.tensor(self.experts)), out=out_bRO)
            return
        for expert, rows, out in zip(self.experts, rows_bRI, out_bRO, strict=True):
            torch.mm(rows, stack_EIO[expert], out=out)

    def add_outer(self, left_RI: Tensor, right_RO: Tensor, grad_EIO: Tensor) -> None:
        """grad[e] += left_e^T right_e; every expert's gradient is filled before."""
        left_bIR, right_bRO = self._by_block(left_RI).transpose(1, 2), self._by_block(right_RO)
        if grad_EIO[0].numel() <= _GATHERED:
            for expert, outer in zip(self.experts, torch.bmm(left_bIR, right_bRO), strict=True):
                grad_EIO[expert].add_(outer)
            return
        for expert, left, right in zip(self.experts, left_bIR, right_bRO, strict=True):
            grad_EIO[expert].addmm_(left, right)

    def _by_block(self, rows_RI: Tensor) -> Tensor:
        return rows_RI.unflatten(0, (len(self.experts), -1))
