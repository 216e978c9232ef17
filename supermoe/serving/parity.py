"""Embeddings of a few made-up histories, saved with a model, so that a load on another machine can be checked there.

The histories are counted out of the schema, without random numbers (whose streams differ between library versions) and
without anybody's data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from supermoe.data.batch import Batch, Jagged
from supermoe.data.schema import Schema
from supermoe.model.supermoe import SuperMoE

LENGTHS = (12, 5, 1, 0)
START, EVENT_GAP = 1_577_836_800, 40_000  # seconds: 2020-01-01, and not a divisor of a day
# fp32 sums taken in another order differ by some 1e-6 of the norm; another model or a broken op by some 1e-1.
TOLERANCE = 1e-3


def probe_batch(schema: Schema, lengths: Sequence[int]) -> Batch:
    """One example for each read, which sees all of it; `lengths` are the reads' numbers of events, longest first."""
    visible_B = torch.tensor(lengths)
    offsets_S = torch.cat([torch.zeros(1, dtype=torch.int64), visible_B.cumsum(0)])
    num_events, num_examples = int(offsets_S[-1]), len(lengths)
    position = torch.arange(num_events)
    time_N = START + EVENT_GAP * position
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
        previous_S=torch.where(visible_B > 0, START + EVENT_GAP * offsets_S[:-1], 0),
        time_N=time_N,
        fields=fields,
        lists=lists,
        read_B=torch.arange(num_examples),
        visible_B=visible_B,
        cut_B=START + EVENT_GAP * (offsets_S[1:] + 2),
        example_B=torch.arange(num_examples),
        features_BP=_numbers(num_examples * len(schema.features), 0).reshape(num_examples, -1),
        bags={name: _lists(num_examples, bag.size) for name, bag in schema.bags.items()},
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
    """The vectors of histories of `LENGTHS` events -> fp32 [4, D]."""
    model.eval()
    return model.embed(probe_batch(schema, [min(n, max_events) for n in LENGTHS])).float()


def deviation(found_BD: Tensor, expected_BD: Tensor) -> float:
    """Largest distance between corresponding vectors, as a share of the mean norm of the expected ones."""
    distance = (found_BD - expected_BD).norm(dim=-1).max() / expected_BD.norm(dim=-1).mean().clamp_min(1e-12)
    return float(distance)
