"""A second opinion: a simple model beside a head's network, fitted when the network has been trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from supermoe.data.batch import Batch


class SecondOpinion(nn.Module):
    """Logits of its own, of which `share` counts in what the head answers, and nothing in what it trains."""

    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.zeros(()))

    def logits(self, batch: Batch) -> Tensor:
        """What it says of the batch's examples -> [B, C]."""
        raise NotImplementedError

    def plant(self, *args: Any, **kwargs: Any) -> None:
        """Take over what was fitted."""
        raise NotImplementedError

    def beside(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """The head's logits with its share of these."""
        if self.training or not self.share:
            return logits_BC
        return torch.lerp(logits_BC, self.logits(batch).to(logits_BC.dtype), self.share)
