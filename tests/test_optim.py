from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from supermoe.config import TrainingConfig
from supermoe.training.optim import RowwiseAdagrad, average_weights, build_optimizers, clip_gradients, lr_factor, set_lr


def make_model(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, sparse=sparse), nn.Linear(4, 3), nn.LayerNorm(3))
    model[0].weight.is_table = True
    return model


def groups_of(config: TrainingConfig) -> dict[str, dict]:
    model = make_model()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, config, 100)
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                found[names[id(p)]] = {"kind": type(optimizer).__name__, **group}
    return found


def test_every_parameter_has_one_group_and_only_matrices_decay() -> None:
    groups = groups_of(TrainingConfig(weight_decay=0.3, lr=1e-3, table_lr=5e-3))
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "0.weight": 0.3,
        "1.weight": 0.3,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
    }
    assert (groups["0.weight"]["lr"], groups["1.weight"]["lr"]) == (5e-3, 1e-3)
    rowwise = groups_of(TrainingConfig(table_optimizer="rowwise_adagrad"))
    assert (rowwise["0.weight"]["kind"], rowwise["1.weight"]["kind"]) == ("RowwiseAdagrad", "AdamW")


def test_the_default_decay_forgets_the_same_share_over_runs_of_any_length() -> None:
    model, config = make_model(), TrainingConfig(lr=2e-3)
    for num_steps in (50, 5000):
        decay = build_optimizers(model, config, num_steps)[0].param_groups[0]["weight_decay"]
        assert decay * config.lr * num_steps == pytest.approx(0.4)


def test_rowwise_adagrad_by_hand() -> None:
    table = nn.Parameter(torch.zeros(3, 2))
    optimizer = RowwiseAdagrad([table], lr=0.5)
    for gradient in ([[3.0, 1.0], [0.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]):
        table.grad = torch.tensor(gradient)
        optimizer.step()
    first, second = -0.5 * 3 / math.sqrt(5), -0.5 * 1 / math.sqrt(6)
    torch.testing.assert_close(table[0, 0].item(), first + second)
    assert table[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(table[2, 1].item(), -0.5 * 2 / math.sqrt(2))


def test_sparse_gradients_give_the_same_update_as_dense_ones() -> None:
    results = []
    for sparse in (False, True):
        model = make_model(sparse)
        config = TrainingConfig(table_optimizer="rowwise_adagrad", lr=0.1)
        optimizers = build_optimizers(model, config, 100)
        model(torch.tensor([1, 4, 4])).pow(3).sum().backward()
        norm = clip_gradients(model, 0.01)
        for optimizer in optimizers:
            optimizer.step()
        results.append((norm, model[0].weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_clipping_bounds_the_norm_and_leaves_small_gradients() -> None:
    model = make_model()
    model(torch.tensor([0, 1])).pow(3).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_gradients(model, 1e9)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in before)), rel=1e-5)
    clip_gradients(model, norm / 2)
    assert math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())) == pytest.approx(norm / 2, rel=1e-4)


def test_schedules() -> None:
    cosine = TrainingConfig(schedule="cosine", warmup_share=0.1)
    assert [lr_factor(x, cosine) for x in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=1e-12)
    constant = TrainingConfig(schedule="constant_then_decay", warmup_share=0.1, decay_share=0.2)
    assert [lr_factor(x, constant) for x in (0.05, 0.1, 0.7, 0.9, 1.0)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert lr_factor(1.0, TrainingConfig(warmup_share=1.0)) == pytest.approx(1.0)
    assert lr_factor(0.3, TrainingConfig(warmup_share=0.0, schedule="constant_then_decay", decay_share=0.0)) == 1.0


def test_set_lr_scales_each_groups_own_rate() -> None:
    optimizers = build_optimizers(make_model(), TrainingConfig(lr=0.2, table_lr=0.4), 100)
    for factor in (0.5, 0.25):
        set_lr(optimizers, factor)
        assert {group["lr"] for group in optimizers[0].param_groups} == {0.2 * factor, 0.4 * factor}


def test_average_starts_at_the_weights_and_then_lags() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("seen", torch.zeros(1))
    average = average_weights(model, 0.9)
    model.weight.data.fill_(1.0)
    model.seen += 1
    average.update_parameters(model)
    assert average.module.weight.item() == 1.0
    model.weight.data.fill_(2.0)
    average.update_parameters(model)
    decay = 2 / 11  # one earlier step: (1 + 1) / (10 + 1), below 0.9
    assert average.module.weight.item() == pytest.approx(decay * 1 + (1 - decay) * 2)
    assert average.module.seen.item() == 1.0
