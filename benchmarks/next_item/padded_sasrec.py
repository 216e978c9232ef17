"""Contender: SASRec in plain PyTorch, padded to 200, with cross-entropy over all items at the real positions."""

from __future__ import annotations

import sys
from pathlib import Path

import harness
import numpy as np
import torch
import torch.nn.functional as F
from movielens import MAX_LENGTH, read_training
from torch import Tensor, nn

DIM, LAYERS, DROPOUT, BATCH, STEPS = 64, 2, 0.2, 128, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, 1, DROPOUT, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(DIM, DIM), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(DIM, DIM), nn.Dropout(DROPOUT)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False, is_causal=True)[0]
        return x + self.feed_forward(self.norm(x))


class SASRec(nn.Module):
    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, DIM, padding_idx=0)
        self.positions = nn.Embedding(MAX_LENGTH, DIM)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(MAX_LENGTH))

    def forward(self, items: Tensor) -> Tensor:
        x = self.dropout(self.items(items) + self.positions.weight)
        for block in self.blocks:
            x = block(x, self.mask)
        return self.norm(x)


class Training:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        ratings = read_training(folder)
        self.random = np.random.default_rng(0)
        self.histories = [group.to_numpy() for _, group in ratings.groupby("user")["item"]]
        self.model = SASRec(int(ratings["item"].max()))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.next_batch = 0

    def batch(self, users: np.ndarray) -> tuple[Tensor, Tensor]:
        """Items and the items that follow them, padded with 0 at the end."""
        items = np.zeros((len(users), MAX_LENGTH + 1), dtype=np.int64)
        for row, user in enumerate(users):
            history = self.histories[user][-(MAX_LENGTH + 1) :]
            items[row, : len(history)] = history
        padded = torch.from_numpy(items)
        return padded[:, :-1] * (padded[:, 1:] > 0), padded[:, 1:]

    def train(self) -> int:
        self.model.train()
        tokens = 0
        for _ in range(STEPS):
            items, targets = self.batch(self.random.integers(len(self.histories), size=BATCH))
            real = targets > 0
            logits = self.model(items)[real] @ self.model.items.weight.t()
            loss = F.cross_entropy(logits, targets[real])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            tokens += int(real.sum())
        return tokens

    @torch.no_grad()
    def embed(self) -> int:
        self.model.eval()
        users = self.random.integers(len(self.histories), size=512)
        for part in np.split(users, len(users) // BATCH):
            items, _ = self.batch(part)
            last = (items > 0).sum(dim=1) - 1
            self.model(items)[torch.arange(len(part)), last]
        return len(users)


if __name__ == "__main__":
    training = Training(Path(sys.argv[1]))
    harness.serve({"train": training.train, "embed": training.embed})
