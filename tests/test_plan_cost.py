"""FLOPs against those of the operators, bytes that are sent, and meshes that cannot be."""

from __future__ import annotations

import dataclasses

import pytest
from plans import NEXT, config_of
from torch.utils.flop_counter import FlopCounterMode

from supermoe.data.batch import Batch
from supermoe.studies import plan_probe
from supermoe.studies.plan_cost import check_tables, expert_ranks, forward_flops, gpu_of, mesh_of
from supermoe.studies.plan_model import blueprint, schema_of
from supermoe.typed_yaml import UserError


@pytest.mark.parametrize("overrides", [[], [f"tasks={{next: {NEXT}}}"]])
def test_flops_are_those_of_the_forward_pass(overrides: list[str]) -> None:
    """Operators are counted in fp64, where experts run as plain products; attention counts whole, here by half."""
    config = config_of("model.max_events=8", "training.tokens_per_batch=512", "features={}", *overrides)
    made = blueprint(config, schema_of(config), "cpu")
    shape = plan_probe.shape_of(config)
    batch = plan_probe.made_up_batch(made.schema, shape)
    plan_probe.objective_of(config, made)  # fits the objectives' priors
    model = made.model.eval().double().requires_grad_(False)  # a softmax that needs a gradient makes it at once
    with FlopCounterMode(display=False) as counter:
        output = model(_double(batch))
        for objective in made.pretraining.values():
            objective.loss(model.heads, output, batch)
        for name, task in made.tasks.items():
            if task.head_spec().reads_events:
                task.loss(model.heads[name], output, batch)
    assert forward_flops(config, made, shape) == pytest.approx(counter.get_total_flops(), rel=0.1)


def _double(batch: Batch) -> Batch:
    fields = {name: x.double() if x.is_floating_point() else x for name, x in batch.fields.items()}
    return dataclasses.replace(batch, fields=fields, features_BP=batch.features_BP.double())


def test_a_token_travels_once_to_each_rank_that_has_an_expert_for_it() -> None:
    assert expert_ranks(config_of(), mesh_of(config_of(), 4)) == 1
    two = config_of("distributed.expert=2")
    assert expert_ranks(two, mesh_of(two, 4)) == pytest.approx(1.5)  # one of two ranks in half of the cases, else both


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (["distributed.expert=3"], 6, r"model\.moe\.experts=8 .* divisor of 8: 1, 2, 4, 8"),
        (["distributed.expert=4"], 6, r"6 GPUs .* divisor of 6: 1, 2, 3, 6"),
        (["distributed.expert=2", "model.dense_layers=2"], 2, "no experts"),
        (["distributed.shard_tables=10"], 2, r"training\.table_optimizer"),
        ([], 0, "--gpus"),
    ],
)
def test_meshes_that_cannot_be(overrides: list[str], gpus: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        mesh_of(config_of(*overrides), gpus)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distributed.shard_tables=1000"], "'next_event__item' scores all 3,002 ids"),
        (["distributed.shard_tables=9000", "distributed.strategy=fsdp2"], "tables.item_.weight stays whole"),
    ],
)
def test_tables_that_cannot_be_sharded(overrides: list[str], words: str) -> None:
    config = config_of("training.table_optimizer=rowwise_adagrad", *overrides)
    with pytest.raises(UserError, match=words):
        check_tables(config, blueprint(config, schema_of(config)), mesh_of(config, 2))


def test_unknown_devices_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'h200'"):
        gpu_of("h20")
