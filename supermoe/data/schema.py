"""What a store holds, in one readable file: fields, features, bags and labels. Saved with the model too."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from supermoe.typed_yaml import Config

PADDING, UNKNOWN = 0, 1  # the two ids every vocabulary starts with
FIRST_ID = 2


class FieldSchema(Config):
    """One input column of the events."""

    kind: Literal["category", "categories", "number"]
    size: int = 0  # of category fields: ids run from 0 to size - 1, padding and unknown included
    hash_size: int | None = None


class BagSchema(Config):
    """Counts of a field's ids over one window before the cut."""

    field: str
    window: int  # seconds
    size: int
    max_ids: int  # most frequent ids kept per example
    input: bool = True  # read by the feature network; otherwise only copied by the heads of labels about the field


class LabelSchema(Config):
    """What is asked of the examples under one task name.

    kind `number`: float32, NaN where not asked. `class`: int32 class, -1 where not asked. `set`: a set of classes per
    example. With `field` the classes are that field's vocabulary ids; otherwise `classes` lists their values in order,
    and where those are values of an event field, `source` names it and `ids` are the classes' vocabulary ids.
    """

    kind: Literal["number", "class", "set"]
    classes: list[Any] | None = None
    field: str | None = None
    source: str | None = None
    ids: list[int] = Field(default_factory=list)
    num_classes: int = 0


class Schema(Config):
    """Everything the model's input and output layers are sized by."""

    version: int = 1
    fields: dict[str, FieldSchema]
    features: list[str] = Field(default_factory=list)  # names of the columns of features_BP
    bags: dict[str, BagSchema] = Field(default_factory=dict)
    labels: dict[str, LabelSchema] = Field(default_factory=dict)
    event_types: list[str] = Field(default_factory=list)
