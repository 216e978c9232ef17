"""Contender: supermoe, its own loader, model, objective and training step, on a prepared store."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import harness
import torch

from supermoe.config import load_run
from supermoe.data.batches import Batches
from supermoe.data.prepare import prepare
from supermoe.training.build import build_run
from supermoe.training.metrics import MetricsLog

CONFIG = Path(__file__).parent.parent / "movielens.yaml"
STEPS = 6
TOKENS = 16384  # of a batch of users to embed


class Training:
    def __init__(self, overrides: list[str]) -> None:
        config = load_run(CONFIG, overrides)
        store = prepare(config)
        run = build_run(config, store)
        self.trainer, self.model = run.trainer, run.model
        self.steps = self.trainer._steps()
        self.log = MetricsLog(config.run, 0, False)
        users = Batches(store, "valid", max_events=config.model.max_events, tokens_per_batch=TOKENS)
        self.to_embed = list(users.epoch(0))[::4]  # from the longest histories to the shortest
        self.loading = itertools.chain.from_iterable(run.trainer.train.epoch(epoch) for epoch in itertools.count())

    def train(self) -> int:
        self.model.train()
        tokens = 0
        for group in itertools.islice(self.steps, STEPS):
            self.trainer._train_step(group, self.log, _NoBar())
            tokens += sum(int((batch.offsets_S.diff() - 1).sum()) for batch in group)  # events with a next one
        return tokens

    @torch.no_grad()
    def embed(self) -> int:
        self.model.eval()
        return sum(len(self.model.embed(batch)) for batch in self.to_embed)

    def load(self) -> int:
        return sum(batch.num_events for batch in itertools.islice(self.loading, 20))


class _NoBar:
    def update(self) -> None:
        pass

    def set_postfix(self, **_: Any) -> None:
        pass


if __name__ == "__main__":
    training = Training(sys.argv[1:])
    harness.serve({"train": training.train, "embed": training.embed, "load": training.load})
