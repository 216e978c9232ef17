from __future__ import annotations

import torch
from factories import make_schema

from supermoe.config import ModelConfig
from supermoe.model.supermoe import SuperMoE
from supermoe.serving.parity import deviation, probe_batch, probe_embeddings


def make_model(seed: int) -> SuperMoE:
    torch.manual_seed(seed)
    return SuperMoE(make_schema(), ModelConfig(dim=16, layers=2, profile_dim=0), {})


def test_probes_are_the_same_every_time_and_use_every_input() -> None:
    schema = make_schema()
    first, second = (probe_batch(schema, [12, 5, 1, 0]) for _ in range(2))
    assert torch.equal(first.time_N, second.time_N)
    assert first.num_events == 18
    assert first.visible_B.tolist() == [12, 5, 1, 0]
    assert first.fields["type"].unique().numel() > 5
    assert first.fields["value"].isnan().any()
    assert (first.fields["value"].nan_to_num() < 1).all()
    assert first.lists["tags"].ids.numel() > 0
    assert first.lists["tags"].ids.max() < schema.fields["tags"].size
    assert first.features_BP.shape == (4, 2)
    assert all(bag.ids.numel() > 0 for bag in first.bags.values())
    last_B = torch.tensor([int(first.time_N[end - 1]) for end in (12, 17, 18)])
    assert (first.cut_B[:3] > last_B).all()


def test_deviation_tells_models_apart() -> None:
    schema = make_schema()
    one, other = (probe_embeddings(make_model(seed), schema, max_events=256) for seed in (0, 1))
    assert one.shape == (4, 16)
    assert deviation(one, one.clone()) == 0
    assert deviation(one, other) > 0.1
    moved = one.clone()
    moved[2] += 1.0  # every one of 16 numbers by 1: a distance of 4
    assert abs(deviation(moved, one) - 4 / one.norm(dim=-1).mean().item()) < 1e-5


def test_probes_fit_a_model_with_a_short_memory() -> None:
    assert probe_embeddings(make_model(0), make_schema(), max_events=3).isfinite().all()
