"""What the names of columns say of the whole numbers in them."""

from __future__ import annotations

import pytest

from supermoe.data.naming import measures_something, names_something

NAMES = [
    "id",
    "item_id",
    "itemid",
    "storeID",
    "movieId",
    "mcc_code",
    "payment_type",
    "price_band",
    "HTTPStatus",
    "age_group",
]
AMOUNTS = [
    "price",
    "price_cents",
    "priceCents",
    "amount_rur",
    "total_items",
    "duration_ms",
    "sales_value",
    "order count",
]
NEITHER = ["paid", "valid", "bid", "store", "mcc", "day", "x", "_", "123"]


@pytest.mark.parametrize("column", [*NAMES, *AMOUNTS, *NEITHER])
def test_a_column_names_or_measures_something_or_does_not_tell(column: str) -> None:
    assert (names_something(column), measures_something(column)) == (column in NAMES, column in AMOUNTS)
