"""Contender: RecTools' SASRec with its softmax loss and its own Lightning trainer, in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
from movielens import MAX_LENGTH, read_training
from pytorch_lightning import Callback, Trainer
from rectools.dataset import Dataset
from rectools.models import SASRecModel

STEPS = 1  # a step takes seconds
USERS = 256


class Rounds(Callback):
    """Stops the trainer before each round until it is asked for."""

    def __init__(self) -> None:
        self.embed: Any = None
        self.current: harness.Round | None = None
        self.steps = self.tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        harness.ready(["train", "embed"], rectools=importlib.metadata.version("rectools"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        while self.current is None:
            self.current = harness.receive()
            if self.current is None:
                sys.exit()
            if self.current.measure == "embed":
                self.current.done(self.embed(pl_module.torch_model))
                self.current = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.current is not None
        self.steps += 1
        self.tokens += int((batch["y"] > 0).sum())
        if self.steps == STEPS:
            self.current.done(self.tokens)
            self.current, self.steps, self.tokens = None, 0, 0


def main(folder: Path) -> None:
    ratings = read_training(folder)
    dataset = Dataset.construct(
        ratings.rename(columns={"user": "user_id", "item": "item_id", "time": "datetime"}).assign(weight=1.0)
    )
    rounds = Rounds()
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    model = SASRecModel(
        n_blocks=2,
        n_heads=1,
        n_factors=64,
        session_max_len=MAX_LENGTH,
        dropout_rate=0.2,
        loss="softmax",
        batch_size=128,
        get_trainer_func=lambda: Trainer(accelerator="cpu", max_epochs=1000, callbacks=[rounds], **quiet),
    )

    @torch.no_grad()
    def embed(network: Any) -> int:
        users = ratings["user"].drop_duplicates().sample(USERS).to_numpy()
        loader = model.data_preparator.get_dataloader_recommend(
            model.data_preparator.transform_dataset_u2i(dataset, users), batch_size=128
        )
        network.eval()
        items = network.item_model.get_all_embeddings()
        for batch in loader:
            network.encode_sessions(batch, items)[:, -1]
        network.train()
        return USERS

    rounds.embed = embed
    model.fit(dataset)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]))
