"""Attention on packed batches against padded scaled_dot_product_attention, forward and backward, batches of 64 users.

    python benchmarks/attention.py [--quick]

`history` is causal self-attention of the events; `questions` adds ten indicator tokens a user, each of which reads the
whole history and itself: packed, a cross-attention to the cached keys; padded, rows of their own behind the events
under a quadratic mask. Lengths follow MovieLens-1M and The Complete Journey (quantiles below), cut at 256 events. One
thread. Writes benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from side_by_side import interleave, settings
from torch import Tensor

from supermoe import ops

QUANTILES = {  # events per user, in steps of 5 %
    "MovieLens-1M": (20, 23, 27, 32, 38, 44, 51, 60, 70, 81, 96, 109, 126, 148, 173, 208, 253, 309, 400, 556, 2314),
    "The Complete Journey": (
        *(1, 26, 55, 85, 116, 166, 203, 244, 295, 350, 408),
        *(473, 547, 639, 741, 852, 985, 1154, 1384, 1771, 4204),
    ),
}
USERS, QUESTIONS, MAX_EVENTS, HEADS, WIDTH = 64, 10, 256, 2, 32


class Batch:
    """One batch in both layouts; the packed one counts the time of its packing, once per batch, too."""

    def __init__(self, quantiles: tuple[int, ...], seed: int, device: str):
        generator = np.random.default_rng(seed)
        drawn = np.interp(generator.random(USERS), np.linspace(0, 1, len(quantiles)), quantiles)
        lengths = torch.from_numpy(-np.sort(-np.minimum(drawn, MAX_EVENTS))).long().to(device)
        self.longest = int(lengths[0])
        self.offsets_S = F.pad(lengths.cumsum(0), (1, 0))
        self.events = int(lengths.sum())
        self.read_M = torch.arange(USERS, device=device).repeat(QUESTIONS)
        self.visible_M = lengths.repeat(QUESTIONS)
        self.events_3NHA = [_leaf(device, self.events, HEADS, WIDTH) for _ in range(3)]
        self.questions_3MHA = [_leaf(device, USERS * QUESTIONS, HEADS, WIDTH) for _ in range(3)]
        total = self.longest + QUESTIONS
        self.padded_3 = [_leaf(device, USERS, HEADS, total, WIDTH) for _ in range(3)]
        place = torch.arange(total, device=device)
        is_event = place < self.longest
        seen = (place[None, :] <= place[:, None]) & is_event[None, :]
        own = torch.eye(total, dtype=torch.bool, device=device) & ~is_event
        real_B1J = ((place < lengths[:, None]) | ~is_event)[:, None]
        self.mask_B1JJ = ((seen | own)[None] & real_B1J)[:, None]

    def packed_history(self) -> None:
        """Ours."""
        out = ops.history_attention(*self.events_3NHA, self.offsets_S, self.offsets_S, ops.pack(self.offsets_S))
        torch.autograd.grad(out.square().sum(), self.events_3NHA)

    def packed_questions(self) -> None:
        """Ours, with the indicator pass."""
        history = ops.history_attention(*self.events_3NHA, self.offsets_S, self.offsets_S, ops.pack(self.offsets_S))
        packing = ops.pack_indicators(self.offsets_S, self.read_M, self.visible_M)
        where = self.offsets_S, self.read_M, self.visible_M, packing
        asked = ops.indicator_attention(*self.questions_3MHA, *self.events_3NHA[1:], *where)
        torch.autograd.grad(history.square().sum() + asked.square().sum(), self.events_3NHA + self.questions_3MHA)

    def padded_history(self) -> None:
        """Every user as long as the longest."""
        short_3 = [x[:, :, : self.longest].detach().requires_grad_() for x in self.padded_3]
        out = F.scaled_dot_product_attention(*short_3, is_causal=True)
        torch.autograd.grad(out.square().sum(), short_3)

    def padded_questions(self) -> None:
        """The same with the questions behind the events and a mask."""
        out = F.scaled_dot_product_attention(*self.padded_3, attn_mask=self.mask_B1JJ)
        torch.autograd.grad(out.square().sum(), self.padded_3)


def _leaf(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def over(batches: list[Batch], run: Callable[[Batch], None]) -> Callable[[int], Any]:
    """The function of a round: all batches."""
    return lambda number: [run(batch) for batch in batches]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is saved")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="attention", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    rounds, num_batches = (3, 1) if arguments.quick else (7, 4)
    torch.set_num_threads(1)
    rows = []
    for data, quantiles in QUANTILES.items():
        batches = [Batch(quantiles, seed, arguments.device) for seed in range(num_batches)]
        events = sum(batch.events for batch in batches)
        slots = sum(USERS * batch.longest for batch in batches)
        for measure in ("history", "questions"):
            functions = {name: over(batches, getattr(Batch, f"{name}_{measure}")) for name in ("packed", "padded")}
            for row in interleave(functions, rounds, arguments.device):
                row |= {"data": data, "measure": measure, "real_share": events / slots}
                rows.append(row | {"tokens_per_cpu_second": 1e3 * events / row["ms"]})
                print(
                    f"{data} {measure} {row['contender']}: {rows[-1]['tokens_per_cpu_second']:,.0f} events/s, "
                    f"{row['ratio']:.2f} of packed's time",
                    flush=True,
                )
    if not arguments.quick:
        print(f"-> {harness.write(arguments.name, rows, **settings(arguments.device, rounds))}")


if __name__ == "__main__":
    main()
