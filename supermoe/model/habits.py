"""Habits: what a user chose before, later choices counting more, as a second opinion on what comes next."""

from __future__ import annotations

import torch
from torch import Tensor

from supermoe.data.batch import Batch
from supermoe.data.schema import FIRST_ID
from supermoe.model.packed import read_of_events, visible_events
from supermoe.model.second_opinion import SecondOpinion

FADING = (0.8, 0.95, 0.98, 1.0)  # of a choice, what is left after each later event
LEAST = 1e-12  # weight of an id that nobody chose


class Habits(SecondOpinion):
    """logit_v = log(sum_k a_k count_kv + prior_v), up to a constant of the example.

    Each earlier choice of v adds FADING[k] to the power of the events since to count_kv. The last, which do not fade,
    are counted by `bag`, where there is one: it knows what lies before the events that are read.
    """

    weight_K: Tensor
    prior_V: Tensor

    def __init__(self, field: str, size: int, bag: str | None):
        super().__init__()
        self.field, self.bag = field, bag
        self.register_buffer("weight_K", torch.zeros(len(FADING)))
        self.register_buffer("prior_V", torch.zeros(size))

    def choices(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Earlier choices of known ids: example, id, and what each counts -> int64 [R], int64 [R], fp32 [R, K]."""
        example_R, event_R = visible_events(batch)
        last_B = batch.offsets_S[batch.read_B] + batch.visible_B - 1
        fading_K = torch.tensor(FADING, device=event_R.device)
        count_RK = fading_K ** (last_B[example_R] - event_R)[:, None]
        id_R = batch.fields[self.field][event_R]
        if self.bag is not None:
            bag = batch.bags[self.bag]
            assert bag.weights is not None, "bags are counted"
            example_R = torch.cat([example_R, read_of_events(bag.offsets, len(bag.ids))])
            id_R = torch.cat([id_R, bag.ids])
            count_RK = torch.cat([count_RK * (fading_K < 1), bag.weights[:, None] * (fading_K == 1)])
        known_R = id_R >= FIRST_ID
        return example_R[known_R], id_R[known_R], count_RK[known_R]

    def logits(self, batch: Batch) -> Tensor:
        """Ids ranked by habit -> logits_BV."""
        example_R, id_R, count_RK = self.choices(batch)
        mass_BV = self.prior_V.clamp(min=LEAST).repeat(batch.num_examples, 1)
        return mass_BV.index_put_((example_R, id_R), count_RK @ self.weight_K, accumulate=True).log_()

    @torch.no_grad()
    def plant(self, weight_K: Tensor, prior_V: Tensor) -> None:
        """Take over what was fitted: the weights, and the prior's in choices."""
        self.weight_K.copy_(weight_K)
        self.prior_V.copy_(prior_V)
