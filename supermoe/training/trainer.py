"""The training loop: a plain loop with named methods that continues where a killed run of the same command stopped."""

from __future__ import annotations

import itertools
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from supermoe.config import TrainingConfig
from supermoe.data.batch import Batch
from supermoe.data.batches import Batches
from supermoe.distributed.parallelize import Parallel
from supermoe.objectives.objective import NonFiniteLoss, Objective
from supermoe.training.checkpoint import Checkpoints
from supermoe.training.evaluation import Evaluation, evaluate
from supermoe.training.metrics import MetricsLog
from supermoe.training.optim import (
    average_weights,
    build_optimizers,
    clip_gradients,
    lr_factor,
    optimizer_state,
    set_lr,
    start_optimizers,
)
from supermoe.training.seeding import seed_everything
from supermoe.training.sharded_weights import load_weights, save_weights

BEST = "best.safetensors"
RETRAIN = "delete {} and run supermoe.train again, which trains from the beginning"


class MicroBatch(nn.Module):
    """From a batch to its share of the step's loss: all that uses weights, so that what wraps it sees them used."""

    def __init__(self, model: Any, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, count_T: Tensor, **options: Any) -> tuple[Tensor, Tensor, list[Any]]:
        """Loss with a gradient, sums of losses, and routings."""
        output = self.model(batch)
        loss, sum_T = self.objective.loss(self.model.heads, output, batch, count_T, **options)
        return loss, sum_T, output.routings


class Trainer:
    """Trains a model on an objective; everything it leaves lies under `folder`.

    The order of batches and the random numbers are functions of the step, so weights, optimiser, balancer and
    `progress` are the whole state. A step's batches do not depend on the number of ranks that share them, so a run
    continues to the same losses on another mesh.

    Args:
        valid: batches to select on; None or empty: the last weights are the best ones.
        identity: what must not change between two starts of one run: the resolved config and the store's fingerprint.
        seed: of the random numbers.
        until: share of the schedule after which training ends.
        replay: `progress["evaluations"]` of another run, which the balancer hears again at the same shares of the
            schedule, in place of evaluations of this one.
        event_names: of the ids of the field `event`, for the router's statistics.
        parallel: the ranks that share the work; the model is spread over them here.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        train: Batches,
        valid: Batches | None,
        config: TrainingConfig,
        *,
        folder: Path,
        identity: dict[str, Any],
        seed: int = 0,
        until: float = 1.0,
        replay: list[Any] | None = None,
        event_names: list[str] | None = None,
        parallel: Parallel | None = None,
    ):
        self.model, self.objective, self.config, self.folder = model, objective, config, folder
        self.train, self.seed, self.until, self.event_names = train, seed, until, event_names
        self.replay = replay
        self.valid = valid if valid is not None and len(valid) else None
        self.device = next(model.parameters()).device
        self.parallel = parallel or Parallel()
        self.world = self.parallel.world
        self.parallel.shard(model)
        self.average = average_weights(model, config.ema) if config.ema else None
        with self.world.watch(lambda: "before the first step"):
            self._micro_batch = self.parallel.wrap(MicroBatch(model, objective), self.average and self.average.module)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, identity, self.world)
        if self.valid is None and replay is None and objective.balancer.validates:
            warnings.warn(
                f"loss.balancer={objective.balancer.config.type} follows what evaluations find, and there is no "
                f"validation split: its weights stay as they start",
                stacklevel=2,
            )
        self.step = 0
        self.progress: dict[str, Any] = {
            "minutes": 0.0,
            "finished": False,
            "best_step": None,
            "best_share": 1.0,
            "best_gain": None,
            "unimproved": 0,
            "evaluations": [],  # [share of the schedule, gains by task] each
            "replayed": 0,
        }
        self._take_steps_of(config.accumulate or self.world.size)
        self._terminated = False

    def _take_steps_of(self, batches: int) -> None:
        """Plan the run in optimiser steps of so many micro-batches over all ranks."""
        self.progress["batches_per_step"] = self.batches_per_step = batches
        self.steps_per_epoch = -(-len(self.train) // batches)
        assert self.config.epochs is not None, "whoever builds the run decides how long it is"
        whole = self.config.epochs * self.steps_per_epoch
        self.num_steps = min(whole, self.config.max_steps or whole)
        self.optimizers = build_optimizers(self.model, self.config, self.num_steps, self.parallel)

    # --- the loop ---

    def fit(self) -> None:
        """Train to the end from where the trainer stands: the start, or what `resume` found.

        Raises:
            NonFiniteLoss: when a loss or gradient is not finite; the checkpoints are those of before.
            SystemExit: after SIGTERM, with a checkpoint saved.
        """
        if self.progress["finished"]:
            return
        started = time.monotonic() - 60 * self.progress["minutes"]
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        log = MetricsLog(self.folder, self.step, self.config.tensorboard, silent=not self.world.is_first)
        bar = tqdm(total=self.num_steps, initial=self.step, desc="train", unit=" steps", mininterval=1, leave=False)
        bar.disable = bar.disable or not self.world.is_first
        try:
            with self.checkpoints.finished(), self.world.watch(lambda: f"step {self.step + 1}"):
                self._loop(started, log, bar)
        finally:
            bar.close()
            log.close()
            signal.signal(signal.SIGTERM, previous)

    def _loop(self, started: float, log: MetricsLog, bar: Any) -> None:
        self.model.train()
        for batches in self._steps():
            self._train_step(batches, log, bar)
            # What one rank was told, or its clock says, all follow.
            minutes, terminated = self.world.max((time.monotonic() - started) / 60, self._terminated)
            self.progress["minutes"] = minutes
            self.progress["finished"] = self._is_over()
            self._replay()
            if self._evaluation_is_due():
                self._evaluate(log)
            elif self.progress["finished"]:  # there is nothing to select on
                self.progress["best_step"] = self.step
                self.save_best()
            if self.progress["finished"] or terminated or self.step % self.config.checkpoint_every == 0:
                self.checkpoints.save(self.step, self._tensors(), self.progress)
            if self.progress["finished"]:
                return
            if terminated:
                self.checkpoints.wait()
                raise SystemExit(f"terminated after step {self.step}, which is saved; the same command continues")

    def resume(self) -> None:
        """Take the state of the last whole checkpoint, if there is one.

        Raises:
            UserError: when it belongs to another config or version, or all are damaged.
        """
        latest = self.checkpoints.latest()
        if latest is None:
            return
        path, self.progress = latest
        if self.progress["batches_per_step"] != self.batches_per_step:  # it was started on another number of ranks
            self._take_steps_of(self.progress["batches_per_step"])
        start_optimizers(self.optimizers)
        self.checkpoints.load(path, self._tensors())
        self.step = int(path.name.removeprefix("step_"))
        self._tell(f"continuing from {path}")

    def evaluated_model(self) -> Any:
        """The weights that count: their average where one is kept."""
        return self.model if self.average is None else self.average.module

    def load_best(self) -> Any:
        """The model with the weights of the best evaluation, in evaluation mode; `UserError` if they are damaged."""
        load_weights(self.evaluated_model(), self.best, RETRAIN.format(self.best.parent))
        return self.evaluated_model().eval()

    def save_best(self) -> None:
        """Publish the weights that count as the best ones."""
        save_weights(self.evaluated_model(), self.best, self.world)

    @property
    def best(self) -> Path:
        """The file of the weights of the best evaluation."""
        return self.folder / "checkpoints" / BEST

    def _steps(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step from the current one on."""
        for epoch in itertools.count(self.step // self.steps_per_epoch):
            yield from self.train.steps(epoch, self.batches_per_step, start=self.step % self.steps_per_epoch)

    def _train_step(self, batches: list[Batch], log: MetricsLog, bar: Any) -> None:
        """One optimiser step."""
        objective, model = self.objective, self.model
        seed_everything(self.seed, self.step, self.world.rank)
        count_T, tokens = objective.counts(batches), objective.tokens(batches)
        sum_T = torch.zeros_like(count_T)
        counts: dict[int, Tensor] = {}
        options = {"num_batches": len(batches), "tokens": tokens, "step": self.step + 1}
        for i, batch in enumerate(batches):
            with self.parallel.backward(is_last=i == len(batches) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    loss, part_T, routings = self._micro_batch(batch.to(self.device), count_T, **options)
                loss.backward()
            sum_T += part_T
            for entry in routings:
                counts[entry.layer] = counts.get(entry.layer, 0) + entry.routing.counts_E
        lr, norm = self._update()
        for layer, router in zip(sorted(counts), model.routers(), strict=True):
            router.update(self.world.sum(counts[layer]))
        if self.average is not None:
            self.average.update_parameters(model)
        after_T = self._losses(batches) if objective.balancer.looks_back else None
        losses = objective.finish_step(sum_T, count_T, after_T)
        self.step += 1
        log.add("train", self.step, loss=losses, **objective.balance(), lr=lr, gradient_norm=norm)
        bar.set_postfix(loss=f"{np.nanmean(list(losses.values())):.3f}", refresh=False)
        bar.update()

    @torch.no_grad()
    def _losses(self, batches: list[Batch]) -> Tensor:
        """Sums of the losses of micro-batches under the weights as they are -> float64 [T]."""
        sums = []
        with self.parallel.whole():
            for batch in batches:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    batch = batch.to(self.device)
                    sums.append(self.objective.sums(self.model.heads, self.model(batch), batch))
        return torch.stack(sums).sum(0)

    def _update(self) -> tuple[float, float]:
        """Clip, set the learning rate, step -> its factor and the gradient's norm."""
        for param in self.model.parameters():
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)  # every weight gets optimiser state, so that checkpoints are whole
        self.parallel.reduce_experts(self.model)
        norm = clip_gradients(self.model, self.config.clip_norm)
        if not np.isfinite(norm):
            raise NonFiniteLoss(
                f"step {self.step + 1}: the gradient's norm is {norm} although every loss is finite. The weights "
                f"before this step are kept: lower training.lr or use training.precision=fp32"
            )
        factor = lr_factor(self._share_done(self.step + 1), self.config)
        set_lr(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.config.lr * factor, norm

    def _share_done(self, step: int) -> float:
        """Progress in [0, 1] after `step` steps: by steps, or by minutes where they run out first."""
        by_time = self.progress["minutes"] / self.config.max_minutes if self.config.max_minutes else 0.0
        return min(1.0, max(step / self.num_steps, by_time))

    def _is_over(self) -> bool:
        return self._share_done(self.step) >= self.until

    # --- evaluation ---

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluate_every or self.steps_per_epoch
        return self.valid is not None and (self.progress["finished"] or self.step % every == 0)

    def _replay(self) -> None:
        """Tell the balancer what another run's evaluations found up to here."""
        heard = self.progress["replayed"]
        due = [gains for share, gains in (self.replay or [])[heard:] if share <= self._share_done(self.step)]
        for gains in due:
            self.objective.observe(gains)
        self.progress["replayed"] = heard + len(due)

    def _evaluate(self, log: MetricsLog) -> None:
        """Measure on the validation split, keep the weights if they are the best, and stop when patience ends."""
        assert self.valid is not None
        bf16 = self.config.precision == "bf16"
        with self.parallel.whole():
            model, tasks = self.evaluated_model(), self.objective.tasks
            found = evaluate(model, tasks, self.valid, "valid", self.event_names, bf16, self.world, metrics_only=True)
        gains = {name: gain for name, gain in found.gains.items() if np.isfinite(gain)}  # as JSON keeps them
        self.progress["evaluations"].append([self._share_done(self.step), gains])
        self.objective.observe(gains)
        best, gain = self.progress["best_gain"], found.selection
        if np.isnan(gain):
            warnings.warn(
                f"no task has a metric on the validation split, so the last weights are kept: {found.undefined}",
                stacklevel=2,
            )
        if best is None or np.isnan(gain) or gain > best:
            self.progress |= {"best_step": self.step, "best_share": self._share_done(self.step), "unimproved": 0}
            self.progress["best_gain"] = None if np.isnan(gain) else gain
            self.save_best()
        else:
            self.progress["unimproved"] += 1
        patience = self.config.patience
        if patience is not None and self.progress["unimproved"] >= patience:
            self.progress["finished"] = True
        log.add("valid", self.step, selection=gain, metrics=found.metrics, gain=found.gains, router=found.router)
        self._tell(self._line(found))

    def _line(self, found: Evaluation) -> str:
        """One evaluation as a person reads it."""
        tasks = self.objective.tasks
        values = [f"{name} {found.metrics[name][tasks[name].main_metric]:.3f}" for name in tasks]
        mark = "*" if self.progress["best_step"] == self.step else " "
        epoch = self.step / self.steps_per_epoch
        return (
            f"step {self.step}/{self.num_steps}{mark} epoch {epoch:.1f}  gain over prior {found.selection:.4f}  |  "
            f"{'  '.join(values)}  |  {self.progress['minutes']:.1f} min"
        )

    # --- state ---

    def _tensors(self) -> dict[str, Any]:
        """All tensors of the state, nested, to be saved or filled in place."""
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizers),
            "balancer": self.objective.balancer.state_dict(),
        }
        if self.average is not None:
            tensors["average"] = self.average.state_dict()
        return tensors

    def _tell(self, line: str) -> None:
        if self.world.is_first:
            tqdm.write(line)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        """Finish the step, save, and go."""
        self._terminated = True
