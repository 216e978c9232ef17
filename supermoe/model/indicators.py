"""Indicator tokens: a question about a user at a cut, as a vector that enters the encoder behind the history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from supermoe.config import ModelConfig
from supermoe.data.batch import Batch
from supermoe.data.schema import Schema
from supermoe.model.embedding import CALENDAR_KNOTS, INIT_STD, InterpolatedEmbedding, calendar, log_gap
from supermoe.model.feature_encoder import FeatureEncoder, Features
from supermoe.model.named import ByName

USER = "user"  # the question whose answer is the user's embedding


class Question(nn.Module):
    """What is learnt about one question: its vector, and how much of each feature dimension it lets in."""

    def __init__(self, dim: int):
        super().__init__()
        self.vector_D = nn.Parameter(torch.randn(dim) * INIT_STD)
        self.gate_D = nn.Parameter(torch.ones(dim))

    def forward(self, f_BD: Tensor) -> Tensor:
        """Feature vectors -> the question put to every example."""
        return self.vector_D + self.gate_D * f_BD


class Indicators(nn.Module):
    """question + gate * features + time since the last event and calendar of the cut, normalised as events are."""

    def __init__(self, schema: Schema, config: ModelConfig, questions: list[str]):
        super().__init__()
        self.features = FeatureEncoder(schema, config)
        self.when = InterpolatedEmbedding([config.number_bins, *CALENDAR_KNOTS], config.dim)
        self.questions = ByName({name: Question(config.dim) for name in questions})
        self.norm = nn.LayerNorm(config.dim, bias=False)

    def forward(
        self, batch: Batch, last_B: Tensor, seen_B: Tensor, questions: Sequence[str] | None = None
    ) -> tuple[Tensor, Features]:
        """Tokens of all `questions` about every example -> x_QBD, and the features, which heads read too.

        `last_B` is the time of the last visible event, read where `seen_B` says that there is one.
        """
        gap_B = log_gap(batch.cut_B - last_B).masked_fill(~seen_B, torch.nan)
        when_BD = self.when(torch.cat([gap_B[:, None], calendar(batch.cut_B)], dim=1))
        features = self.features(batch)
        asked = [self.questions[name](features.vector_BD) for name in questions or self.questions]
        return self.norm(when_BD + torch.stack(asked)), features
