"""What the name of a column says of the whole numbers in it: whether they measure something, or name it."""

from __future__ import annotations

import re

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
NAMING = re.compile(r"band|bin|bucket|category|class|code|group|ids?|key|kind|segment|sku|status|type|zip")
GLUED = re.compile(r"\w{2,}(?<!pa)(?<!val)(?<!vo)(?<!flu)(?<!gr)id")  # itemid; not paid, valid, void, fluid, grid
MEASURED = re.compile(
    r"age|amount|amt|balance|bytes|clicks|cost|count|discount|distance|duration|fee|height|hours|income|length|minutes|"
    r"points|price|qty|quantity|rating|revenue|salary|score|seconds|spend|sum|temperature|total|value|views|weight"
)
UNIT = re.compile(r"cents?|eur|gbp|km|meters|metres|miles|ms|rub|usd")


def names_something(column: str) -> bool:
    """Item_id, mcc_code, payment_type, itemid: equal numbers are one thing, and there is nothing to add up."""
    last = _words(column)[-1]
    return bool(NAMING.fullmatch(last) or GLUED.fullmatch(last))


def measures_something(column: str) -> bool:
    """Price, price_cents, total_items, durationMs: numbers that can be added up."""
    words = _words(column)
    first, last = words[0], words[-1]
    known = MEASURED.fullmatch(first) or MEASURED.fullmatch(last) or UNIT.fullmatch(last)
    return bool(known) and not names_something(column)


def _words(column: str) -> list[str]:
    return [word.lower() for word in WORD.findall(column)] or [""]
