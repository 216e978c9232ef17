"""The training loop: a plain loop with named methods that continues where a killed run of the same command stopped."""

from __future__ import annotations

import itertools
import random
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tqdm import tqdm

from supermoe.config import TrainingConfig
from supermoe.data.batch import Batch
from supermoe.data.batches import Batches
from supermoe.data.disk import publishing
from supermoe.model.weights import read_weights, save_weights
from supermoe.objectives.objective import NonFiniteLoss, Objective
from supermoe.training.checkpoint import Checkpoints
from supermoe.training.evaluation import Evaluation, evaluate
from supermoe.training.metrics import MetricsLog
from supermoe.training.optim import average_weights, build_optimizers, clip_gradients, lr_factor, set_lr

BEST = "best.safetensors"


class Trainer:
    """Trains a model on an objective; everything it leaves lies under `folder`.

    The order of batches is a function of the step, so weights, optimiser, balancer, random state and `progress` are the
    whole state.

    Args:
        valid: batches to select on; None or empty: the last weights are the best ones.
        identity: what must not change between two starts of one run: the resolved config and the store's fingerprint.
        event_names: of the ids of the field `event`, for the router's statistics.
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
        event_names: list[str] | None = None,
    ):
        self.model, self.objective, self.config, self.folder = model, objective, config, folder
        self.train, self.event_names = train, event_names
        self.valid = valid if valid is not None and len(valid) else None
        self.device = next(model.parameters()).device
        self.average = average_weights(model, config.ema) if config.ema else None
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, identity)
        self.steps_per_epoch = -(-len(train) // config.accumulate)
        whole = config.epochs * self.steps_per_epoch
        self.num_steps = min(whole, config.max_steps or whole)
        self.optimizers = build_optimizers(model, config, self.num_steps)
        self.step = 0
        self.progress: dict[str, Any] = {"best_step": None, "best_gain": None, "unimproved": 0}
        self.progress |= {"minutes": 0.0, "finished": False}
        self._terminated = False

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
        log = MetricsLog(self.folder, self.step, self.config.tensorboard)
        bar = tqdm(total=self.num_steps, initial=self.step, desc="train", unit=" steps", mininterval=1, leave=False)
        try:
            self.model.train()
            for batches in self._steps():
                self._train_step(batches, log, bar)
                self.progress["minutes"] = (time.monotonic() - started) / 60
                self.progress["finished"] = self._is_over()
                if self._evaluation_is_due():
                    self._evaluate(log)
                elif self.progress["finished"]:  # there is nothing to select on
                    self.progress["best_step"] = self.step
                    self._save_best()
                if self.progress["finished"] or self._terminated or self.step % self.config.checkpoint_every == 0:
                    self._save()
                if self.progress["finished"]:
                    return
                if self._terminated:
                    raise SystemExit(f"terminated after step {self.step}, which is saved; the same command continues")
        finally:
            bar.close()
            log.close()
            signal.signal(signal.SIGTERM, previous)

    def resume(self) -> None:
        """Take the state of the last whole checkpoint, if there is one.

        Raises:
            UserError: when it belongs to another config or version, or all are damaged.
        """
        latest = self.checkpoints.latest()
        if latest is None:
            return
        path, state = latest
        tensors = self._tensors()
        self.checkpoints.load(path, tensors)
        self.model.load_state_dict(tensors["model"])
        set_optimizer_state_dict(self.model, self.optimizers, tensors["optimizer"])
        self.objective.balancer.load_state_dict(tensors["balancer"])
        if self.average is not None:
            self.average.load_state_dict(tensors["average"])
        torch.set_rng_state(tensors["random"]["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random"]["cuda"], self.device)
        version, internal, gauss = state["python_random"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(state["numpy_random"])
        self.progress = state["progress"]
        self.step = int(path.name.removeprefix("step_"))
        tqdm.write(f"continuing from {path}")

    def evaluated_model(self) -> Any:
        """The weights that count: their average where one is kept."""
        return self.model if self.average is None else self.average.module

    def load_best(self) -> Any:
        """The model with the weights of the best evaluation, in evaluation mode; `UserError` if they are damaged."""
        folder = self.folder / "checkpoints"
        remedy = f"delete {folder} and run supermoe.train again, which trains from the beginning"
        self.evaluated_model().load_state_dict(read_weights(folder / BEST, remedy))
        return self.evaluated_model().eval()

    def _steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step from the current one on."""
        for epoch in itertools.count(self.step // self.steps_per_epoch):
            batches = self.train.epoch(epoch, start=self.step % self.steps_per_epoch * self.config.accumulate)
            while group := list(itertools.islice(batches, self.config.accumulate)):
                yield group

    def _train_step(self, batches: list[Batch], log: MetricsLog, bar: Any) -> None:
        """One optimiser step."""
        objective, model = self.objective, self.model
        count_T = objective.counts(batches)
        sum_T = torch.zeros_like(count_T)
        counts: dict[int, Tensor] = {}
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                batch = batch.to(self.device)
                output = model(batch)
                loss, part_T = objective.loss(
                    model.heads, output, batch, count_T, num_batches=len(batches), step=self.step + 1
                )
            loss.backward()
            sum_T += part_T
            for entry in output.routings:
                counts[entry.layer] = counts.get(entry.layer, 0) + entry.routing.counts_E
        lr, norm = self._update()
        for layer, router in zip(sorted(counts), model.routers(), strict=True):
            router.update(counts[layer])
        if self.average is not None:
            self.average.update_parameters(model)
        losses = objective.finish_step(sum_T, count_T)
        self.step += 1
        weights = dict(zip(objective.names, objective.balancer.weight_T.tolist(), strict=True))
        log.add("train", self.step, loss=losses, weight=weights, lr=lr, gradient_norm=norm)
        bar.set_postfix(loss=f"{np.nanmean(list(losses.values())):.3f}", refresh=False)
        bar.update()

    def _update(self) -> tuple[float, float]:
        """Clip, set the learning rate, step -> its factor and the gradient's norm."""
        for param in self.model.parameters():
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)  # every weight gets optimiser state, so that checkpoints are whole
        norm = clip_gradients(self.model, self.config.clip_norm)
        if not np.isfinite(norm):
            raise NonFiniteLoss(
                f"step {self.step + 1}: the gradient's norm is {norm} although every loss is finite. The weights "
                f"before this step are kept: lower training.lr or use training.precision=fp32"
            )
        factor = lr_factor(self._share_done(), self.config)
        set_lr(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.config.lr * factor, norm

    def _share_done(self) -> float:
        """Progress in (0, 1]: by steps, or by minutes where they run out first."""
        by_steps = (self.step + 1) / self.num_steps
        by_time = self.progress["minutes"] / self.config.max_minutes if self.config.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def _is_over(self) -> bool:
        minutes = self.config.max_minutes
        return self.step >= self.num_steps or (minutes is not None and self.progress["minutes"] >= minutes)

    # --- evaluation ---

    def _evaluation_is_due(self) -> bool:
        every = self.config.evaluate_every or self.steps_per_epoch
        return self.valid is not None and (self.progress["finished"] or self.step % every == 0)

    def _evaluate(self, log: MetricsLog) -> None:
        """Measure on the validation split, keep the weights if they are the best, and stop when patience ends."""
        assert self.valid is not None
        bf16 = self.config.precision == "bf16"
        found = evaluate(self.evaluated_model(), self.objective.tasks, self.valid, "valid", self.event_names, bf16)
        best, gain = self.progress["best_gain"], found.selection
        if np.isnan(gain):
            warnings.warn(
                f"no task has a metric on the validation split, so the last weights are kept: {found.undefined}",
                stacklevel=2,
            )
        if best is None or np.isnan(gain) or gain > best:
            self.progress |= {"best_step": self.step, "best_gain": None if np.isnan(gain) else gain, "unimproved": 0}
            self._save_best()
        else:
            self.progress["unimproved"] += 1
        patience = self.config.patience
        if patience is not None and self.progress["unimproved"] >= patience:
            self.progress["finished"] = True
        log.add("valid", self.step, selection=gain, metrics=found.metrics, gain=found.gains, router=found.router)
        tqdm.write(self._line(found))

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
        """All tensors of the state, nested, to be saved or filled."""
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers),
            "balancer": self.objective.balancer.state_dict(),
            "random": {"torch": torch.get_rng_state()},
        }
        if self.average is not None:
            tensors["average"] = self.average.state_dict()
        if self.device.type == "cuda":
            tensors["random"]["cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def _save(self) -> None:
        numpy_state = np.random.get_state(legacy=False)
        numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
        state = {"progress": self.progress, "python_random": random.getstate(), "numpy_random": numpy_state}
        self.checkpoints.save(self.step, self._tensors(), state)

    def _save_best(self) -> None:
        with publishing(self.folder / "checkpoints" / BEST) as beside:
            save_weights(self.evaluated_model(), beside)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        """Finish the step, save, and go."""
        self._terminated = True
