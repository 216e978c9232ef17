"""Embeddings of a few made-up histories, saved with a model, so that a load on another machine can be checked there.

The histories are counted out of the schema, without random numbers (whose streams differ between library versions) and
without anybody's data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from supermoe.data.batch import Batch, Jagged
from supermoe.data.schema import Schema
from supermoe.model.supermoe import SuperMoE

START = 1_577_836_800  # seconds, 2020-01-01
# fp32 sums taken in another order differ by some 1e-6 of the norm; another model or a broken op by some 1e-1.
TOLERANCE = 1e-3


def probe_batch(schema: Schema, max_events: int) -> Batch:
    """Five examples over four reads: a long one (seen whole and in part), two short ones and an empty one."""
    lengths = torch.tensor([min(n, max_events) for n in (12, 5, 1, 0)])
    offsets_S = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    num_events, position = int(offsets_S[-1]), torch.arange(int(offsets_S[-1]))
    time_N = START + 40_000 * position
    visible_B = torch.cat([lengths[:1] // 2, lengths])
    read_B = torch.tensor([0, 0, 1, 2, 3])
    last_B = START + 40_000 * (offsets_S[read_B] + visible_B)
    fields, lists = {}, {}
    for salt, (name, field) in enumerate(schema.fields.items()):
        if field.kind == "number":
            fields[name] = _numbers(num_events, salt)
        elif field.kind == "category":
            fields[name] = (3 * position + salt) % field.size
        else:
            lists[name] = _lists(num_events, field.size)
    return Batch(
        offsets_S=offsets_S,
        previous_S=torch.where(lengths > 0, START + 40_000 * offsets_S[:-1], 0),
        time_N=time_N,
        fields=fields,
        lists=lists,
        read_B=read_B,
        visible_B=visible_B,
        cut_B=last_B + 86_400,
        example_B=torch.arange(5),
        features_BP=_numbers(5 * len(schema.features), 0).reshape(5, -1),
        bags={name: _lists(5, bag.size) for name, bag in schema.bags.items()},
    )


def _numbers(count: int, salt: int) -> Tensor:
    """Values in [0, 1); every fifth one is missing."""
    index = torch.arange(count)
    return torch.where(index % 5 == 4, torch.nan, (37 * index + 11 * salt) % 100 / 100)


def _lists(count: int, size: int) -> Jagged:
    """Lists of 0, 1 and 2 ids in turn, with counts."""
    lengths = torch.arange(count) % 3
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    index = torch.arange(int(offsets[-1]))
    return Jagged(offsets, 1 + index % (size - 1), 1.0 + index % 4)


@torch.inference_mode()
def probe_embeddings(model: SuperMoE, schema: Schema, max_events: int) -> Tensor:
    """The `user` vectors of the probe examples -> [5, D] fp32."""
    model.eval()
    return model(probe_batch(schema, max_events)).user_BD.float()


def deviation(found_BD: Tensor, expected_BD: Tensor) -> float:
    """Largest distance between corresponding vectors, as a share of the mean norm of the expected ones."""
    distance = (found_BD - expected_BD).norm(dim=-1).max() / expected_BD.norm(dim=-1).mean().clamp_min(1e-12)
    return float(distance)
