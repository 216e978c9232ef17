"""Tables sharded over two and three processes against whole ones: gradients, training, checkpoints, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from factories import make_batch, make_schema
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh

from supermoe.config import ModelConfig, TrainingConfig
from supermoe.data.batch import Batch
from supermoe.data.schema import FieldSchema, Schema
from supermoe.distributed.row_shard import sharded_parameters
from supermoe.distributed.table_parallel import shard_tables
from supermoe.model.heads import HeadSpec
from supermoe.model.supermoe import SuperMoE
from supermoe.objectives.event_softmax import EventSoftmax, next_ids
from supermoe.training.optim import average_weights, build_optimizers
from supermoe.typed_yaml import UserError

CONFIG = ModelConfig(dim=16, layers=1, heads=2, dropout=0, head_dropout=0, feature_dropout=0, number_bins=3)
TRAINING = TrainingConfig(lr=0.05, table_optimizer="rowwise_adagrad", weight_decay=0)
SIZE = 26  # ids: blocks of 9, 9 and 8 rows, or of 13 and 13
HEADS = {"next": HeadSpec("field", field="type", reads="event"), "churn": HeadSpec("linear", size=1)}
SHARDED = {"embedding.tables.type_.weight", "embedding.tables.tags_.weight", "heads.next_.bias"}


def wide_schema() -> Schema:
    """`type` and the list field `tags` have tables to shard, `store` has not; no bags, which score every id."""
    wide = {"type": FieldSchema(kind="category", size=SIZE), "tags": FieldSchema(kind="categories", size=SIZE)}
    return make_schema().model_copy(update={"fields": {**make_schema().fields, **wide}, "bags": {}})


def build_model(deferred_rows: int | None = None, schema: Schema | None = None) -> SuperMoE:
    torch.manual_seed(0)
    return SuperMoE(schema or wide_schema(), CONFIG, HEADS, deferred_rows)


def batch_of(rank: int, step: int) -> Batch:
    """A batch of its own for every rank and step, in double precision; rank 2 has no event at all."""
    lengths, examples = ((6, 3, 1), ((0, 6), (1, 2), (2, 1))) if rank < 2 else ((0,), ((0, 0),))
    batch = make_batch(lengths, examples, wide_schema(), seed=10 * step + rank)
    fields = {name: x.double() if x.is_floating_point() else x for name, x in batch.fields.items()}
    return dataclasses.replace(batch, fields=fields, features_BP=batch.features_BP.double())


def loss_of(model: Any, rank: int, step: int) -> torch.Tensor:
    """Sampled softmax over the next `type` and something of a task."""
    batch = batch_of(rank, step)
    output, next_N = model(batch), next_ids(batch, "type")
    position = (next_N >= 2).nonzero()[:, 0]
    torch.manual_seed(100 * step + rank)  # the negatives
    softmax = EventSoftmax(wide_schema(), "type", negatives=5)
    losses_N = softmax.losses(model.heads["next"], output.event_ND[position], next_N[position])
    return losses_N.sum() + model.heads["churn"].logits(output.task_BX["churn"], batch).square().sum()


class Whole:
    """One process with whole tables, which takes the mean loss over the ranks' batches."""

    def __init__(self) -> None:
        self.model = build_model().double()
        self.optimizers = build_optimizers(self.model, TRAINING, 10)

    def step(self, ranks: int, step: int) -> None:
        (sum(loss_of(self.model, rank, step) for rank in range(ranks)) / ranks).backward()
        update(self.optimizers)


class Sharded:
    """One rank's part: its own batch, its own rows, the rest averaged as DDP does."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.model = shard_tables(build_model().double(), mesh, min_rows=20)
        self.optimizers = build_optimizers(self.model, TRAINING, 10)

    def step(self, step: int) -> None:
        loss_of(self.model, self.mesh.get_local_rank(), step).backward()
        rows = sharded_parameters(self.model)
        assert rows.keys() == SHARDED
        for name, p in self.model.named_parameters():
            if name in rows:
                assert p.grad is not None
                assert p.grad.is_sparse
            else:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad, group=self.mesh.get_group())
                p.grad /= self.mesh.size()
        update(self.optimizers)

    def state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizers)
        return {"model": self.model.state_dict(), "optimizer": optimizer}

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder, process_group=self.mesh.get_group())
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"])


def update(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(sharded: Sharded, whole: Whole) -> None:
    """The sharded weights, gathered, are the whole ones; row-wise Adagrad adds up in fp32, hence 1e-6."""
    for name, expected in whole.model.state_dict().items():
        found = sharded.model.state_dict()[name]
        found = found.full_tensor() if name in SHARDED else found
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def check_gradients(mesh: DeviceMesh) -> None:
    """Every gradient, also of tables, is the one of the mean loss over all ranks."""
    sharded, whole = Sharded(mesh), Whole()
    loss_of(sharded.model, mesh.get_local_rank(), 0).backward()
    (sum(loss_of(whole.model, rank, 0) for rank in range(mesh.size())) / mesh.size()).backward()
    expected = dict(whole.model.named_parameters())
    for name, p in sharded_parameters(sharded.model).items():
        grad = expected[name].grad
        assert grad is not None
        assert p.grad is not None
        torch.testing.assert_close(p.grad.to_dense(), grad[p.shard.first : p.shard.last], atol=1e-12, rtol=1e-12)
        assert p.shard.first > 0 or not p.grad.to_dense()[0].any()  # padding's


def check_average_and_whole_weights(sharded: Sharded, whole: Whole) -> None:
    """An average of sharded weights is sharded too; weights saved whole are taken by rows."""
    average = average_weights(sharded.model, 0.9)
    average.update_parameters(sharded.model)
    saved = average.module.state_dict()["embedding.tables.type_.weight"]
    torch.testing.assert_close(saved.full_tensor(), whole.model.embedding.tables["type"].weight, atol=1e-6, rtol=1e-6)
    other = Sharded(sharded.mesh)
    other.model.load_state_dict(whole.model.state_dict())
    assert_equal(other, whole)


def check_drawing(three: DeviceMesh, two: DeviceMesh) -> None:
    """Tables that no process ever held whole start alike on any number of ranks."""
    schema = wide_schema()
    fields = {**schema.fields, "type": FieldSchema(kind="category", size=50_000)}
    schema = schema.model_copy(update={"fields": fields})
    found = []
    for mesh in (three, two):
        if mesh.get_coordinate() is not None:
            model = shard_tables(build_model(20, schema), mesh, min_rows=20)
            model.heads["next"].start_at(torch.linspace(1, 2, 50_000))
            found.append([model.state_dict()[name].full_tensor() for name in sorted(SHARDED)])
    if len(found) == 2:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        table = found[0][1]
        assert table.std().item() == pytest.approx(0.02, rel=0.01)
        assert not table[0].any()
        assert len(table.unique(dim=0)) == 50_000


def check_refusals(mesh: DeviceMesh) -> None:
    sharded = Sharded(mesh)
    with pytest.raises(UserError, match=r"training\.table_optimizer"):
        build_optimizers(sharded.model, TrainingConfig(), 10)
    with pytest.raises(UserError, match="negatives: auto"):
        EventSoftmax(wide_schema(), "type", negatives="all").losses(
            sharded.model.heads["next"], torch.zeros(1, 16).double(), torch.tensor([3])
        )
    heads = {"rank": HeadSpec("field", field="type")}
    with pytest.raises(UserError, match=r"tasks\.rank"):
        shard_tables(SuperMoE(make_schema(), CONFIG, heads), mesh, min_rows=5)


def work(folder: Path) -> None:
    """What each of three processes does; the last has no part in the mesh of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    three, two = DeviceMesh("cpu", [0, 1, 2]), DeviceMesh("cpu", [0, 1])
    check_drawing(three, two)
    check_gradients(three)
    check_refusals(three)
    sharded, whole = Sharded(three), Whole()
    for step in range(3):
        sharded.step(step)
        whole.step(3, step)
    assert_equal(sharded, whole)
    check_average_and_whole_weights(sharded, whole)
    dcp.save(sharded.state(), checkpoint_id=folder / "checkpoint")
    if dist.get_rank() < 2:  # the same training goes on with two ranks
        sharded = Sharded(two)
        sharded.load(folder / "checkpoint")
        assert_equal(sharded, whole)
        for step in range(3, 6):
            sharded.step(step)
            whole.step(2, step)
        assert_equal(sharded, whole)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process loads what three have saved
def test_sharded_tables_train_as_whole_ones_do(tmp_path: Path) -> None:
    ranks.launch(3, work, tmp_path)
    saved = {"model": build_model().double().state_dict()}
    dcp.load(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)  # one process takes them whole
    whole = Whole()
    for step in range(3):
        whole.step(3, step)
    torch.testing.assert_close(saved["model"], dict(whole.model.state_dict()), atol=1e-6, rtol=1e-6)
