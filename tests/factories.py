"""Seeded random schemas and batches for tests of everything from the model up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from supermoe.data.batch import Batch, Jagged
from supermoe.data.schema import BagSchema, FieldSchema, LabelSchema, Schema

START = 1_500_000_000  # 2017-07-14 UTC
DAY = 86400


def make_schema() -> Schema:
    """Every kind of field, two features, two bags of one field; one field has a name that `nn.Module` uses itself."""
    return Schema(
        fields={
            "type": FieldSchema(kind="category", size=11),
            "store": FieldSchema(kind="category", size=5),
            "tags": FieldSchema(kind="categories", size=7),
            "value": FieldSchema(kind="number"),
        },
        features=["spend_28d", "visits_all"],
        bags={
            "type_28d": BagSchema(field="type", window=28 * DAY, size=11, max_ids=8),
            "type_all": BagSchema(field="type", window=1 << 60, size=11, max_ids=8),
        },
        labels={
            "churn": LabelSchema(kind="number"),
            "age": LabelSchema(kind="class", classes=["young", "old", "older"], num_classes=3),
            "next_type": LabelSchema(kind="set", field="type", num_classes=11),
        },
    )


def make_batch(
    lengths: Sequence[int] = (7, 4, 4, 1, 0),
    examples: Sequence[tuple[int, int]] = ((0, 7), (0, 3), (1, 4), (3, 1), (4, 0)),
    schema: Schema | None = None,
    seed: int = 0,
) -> Batch:
    """A batch of reads of these `lengths` (longest first) and of `examples` (read, visible), with labels."""
    schema = schema or make_schema()
    generator = torch.Generator().manual_seed(seed)
    num_events, num_examples = sum(lengths), len(examples)
    offsets_S = _offsets(torch.tensor(lengths, dtype=torch.int64))
    steps_N = torch.randint(0, 3 * DAY, (num_events,), generator=generator)
    time_N = torch.cat([START + part.cumsum(0) for part in steps_N.split(list(lengths))]) if num_events else steps_N
    read_B, visible_B = torch.tensor(examples, dtype=torch.int64).reshape(-1, 2).unbind(1)
    first_S = torch.tensor(
        [int(time_N[o]) if n else 0 for o, n in zip(offsets_S.tolist(), lengths, strict=False)], dtype=torch.int64
    )
    last_B = torch.tensor([int(time_N[offsets_S[r] + v - 1]) if v else START for r, v in examples], dtype=torch.int64)
    fields, lists = {}, {}
    for name, field in schema.fields.items():
        if field.kind == "category":
            fields[name] = torch.randint(0, field.size, (num_events,), generator=generator)
        elif field.kind == "number":
            fields[name] = _with_missing(torch.rand(num_events, generator=generator), generator)
        else:
            lists[name] = _jagged(num_events, field.size, 4, False, generator)
    return Batch(
        offsets_S=offsets_S,
        previous_S=first_S,
        time_N=time_N,
        fields=fields,
        lists=lists,
        read_B=read_B,
        visible_B=visible_B,
        cut_B=last_B + 1 + torch.randint(0, 9 * DAY, (num_examples,), generator=generator),
        example_B=torch.arange(num_examples),
        features_BP=_with_missing(torch.rand(num_examples, len(schema.features), generator=generator), generator),
        bags={name: _jagged(num_examples, bag.size, 5, True, generator) for name, bag in schema.bags.items()},
        labels={
            "churn": torch.randint(0, 2, (num_examples,), generator=generator).float(),
            "age": torch.randint(-1, 3, (num_examples,), generator=generator),
        },
    )


def take_events(batch: Batch, start_S: Tensor, stop_S: Tensor) -> Batch:
    """The same examples over the events `start_S[s]:stop_S[s]` of every read, as if earlier ones were read before."""
    ranges = [
        torch.arange(int(o + a), int(o + b))
        for o, a, b in zip(batch.offsets_S.tolist(), start_S.tolist(), stop_S.tolist(), strict=False)
    ]
    row_N = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
    before_S = batch.offsets_S[:-1] + start_S - 1
    previous_S = torch.where(start_S > 0, batch.time_N[before_S.clamp(min=0)], batch.previous_S)
    return Batch(
        **{
            **{name: getattr(batch, name) for name in batch.__dataclass_fields__},
            "offsets_S": _offsets(stop_S - start_S),
            "previous_S": previous_S,
            "time_N": batch.time_N[row_N],
            "fields": {name: value[row_N] for name, value in batch.fields.items()},
            "lists": {name: take_lists(value, row_N) for name, value in batch.lists.items()},
        }
    )


def take_examples(batch: Batch, rows: Sequence[int]) -> Batch:
    """The same reads with only these examples."""
    row_B = torch.tensor(rows, dtype=torch.int64)
    picked = {n: getattr(batch, n)[row_B] for n in ("read_B", "visible_B", "cut_B", "example_B", "features_BP")}
    return Batch(
        **{
            **{name: getattr(batch, name) for name in batch.__dataclass_fields__},
            **picked,
            "bags": {name: take_lists(value, row_B) for name, value in batch.bags.items()},
            "labels": {name: value[row_B] for name, value in batch.labels.items()},
        }
    )


def take_user(batch: Batch, read: int) -> tuple[Batch, list[int]]:
    """One read alone with its examples, and the rows those examples had."""
    rows = [b for b, r in enumerate(batch.read_B.tolist()) if r == read]
    lengths_S = batch.offsets_S.diff()
    only_S = torch.arange(len(lengths_S)) == read
    alone = take_examples(take_events(batch, torch.zeros_like(lengths_S), lengths_S * only_S), rows)
    return Batch(
        **{
            **{name: getattr(alone, name) for name in alone.__dataclass_fields__},
            "offsets_S": torch.tensor([0, int(lengths_S[read])]),
            "previous_S": batch.previous_S[read : read + 1],
            "read_B": torch.zeros_like(alone.read_B),
        }
    ), rows


def take_lists(jagged: Jagged, row: Tensor) -> Jagged:
    """The lists of these rows, in this order."""
    parts = [torch.arange(int(jagged.offsets[r]), int(jagged.offsets[r + 1])) for r in row.tolist()]
    index = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    weights = None if jagged.weights is None else jagged.weights[index]
    return Jagged(_offsets(torch.tensor([len(p) for p in parts], dtype=torch.int64)), jagged.ids[index], weights)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _with_missing(values: Tensor, generator: torch.Generator) -> Tensor:
    return values.masked_fill(torch.rand(values.shape, generator=generator) < 0.2, torch.nan)


def _jagged(rows: int, size: int, longest: int, counted: bool, generator: torch.Generator) -> Jagged:
    """Lists of up to `longest` distinct ids from 1 up; bags also have counts of 1 to 5."""
    lengths = torch.randint(0, longest, (rows,), generator=generator)
    ids = [torch.randperm(size - 1, generator=generator)[:n] + 1 for n in lengths.tolist()]
    flat = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)
    counts = torch.randint(1, 6, (len(flat),), generator=generator).float() if counted else None
    return Jagged(_offsets(lengths), flat, counts)


def check_gradients(module: torch.nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """`gradcheck` of `function(*inputs)` in fp64 for the inputs and for every parameter of `module` that it uses."""
    module.double()
    parameters = [p for p in module.parameters() if p.requires_grad]
    leaves = [x.double().requires_grad_() for x in inputs]

    def evaluate(*values: Tensor) -> Tensor:
        return function(*values[: len(leaves)])

    assert torch.autograd.gradcheck(evaluate, (*leaves, *parameters), fast_mode=True, atol=1e-7)
