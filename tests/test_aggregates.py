"""Derived aggregates and bags against a plain loop over random histories."""

from __future__ import annotations

import numpy as np
import pytest

from supermoe.data.aggregates import (
    DAY,
    MONTH,
    History,
    Values,
    Window,
    bag,
    expand,
    lifetime_aggregates,
    lifetime_numbers,
    once_per_moment,
    window_aggregates,
)
from supermoe.typed_yaml import ALL_TIME

WINDOW = 5 * DAY
NAMES = ["buy", "view", "sell"]


def random_history(seed: int = 0) -> History:
    """Users with 0 to 40 events over 60 days, several of them at the same second, and three cuts each."""
    rng = np.random.default_rng(seed)
    length = rng.integers(0, 41, 12)
    length[3] = 0
    user_N = np.repeat(np.arange(12), length)
    time_N = rng.integers(0, 60 * 8, length.sum()) * (DAY // 8) + 1_700_006_400
    time_N = time_N[np.lexsort((time_N, user_N))]
    offsets = np.append(0, np.cumsum(length))
    user_B = np.repeat(np.arange(12), 3)
    cut_B = 1_700_006_400 + np.tile([20, 41, 60], 12) * DAY
    visible_B = np.array(
        [(time_N[offsets[u] : offsets[u + 1]] < cut).sum() for u, cut in zip(user_B, cut_B, strict=True)]
    )
    size = len(user_N)
    lists = rng.integers(0, 4, size)
    return History(
        user_N=user_N,
        time_N=time_N,
        categories={
            "event": Values(rng.integers(0, 5, size).astype(np.int32), 5, NAMES),
            "tags": Values(
                rng.integers(0, 9, lists.sum()).astype(np.int32), 9, list("abcdefg"), np.append(0, np.cumsum(lists))
            ),
        },
        numbers={"amount": np.where(rng.random(size) < 0.2, np.nan, rng.normal(size=size))},
        start_B=offsets[user_B],
        end_B=offsets[user_B] + visible_B,
        user_B=user_B,
        cut_B=cut_B,
    )


def rows_of(history: History, example: int, window: int) -> list[int]:
    """Event rows inside a window, the slow way."""
    cut, rows = history.cut_B[example], range(len(history.time_N))
    mine = [row for row in rows if history.user_N[row] == history.user_B[example]]
    return [
        row for row in mine if history.time_N[row] < cut and (window == ALL_TIME or history.time_N[row] >= cut - window)
    ]


def ids_at(values: Values, row: int) -> list[int]:
    ids = [values.ids[row]] if values.offsets is None else values.ids[values.offsets[row] : values.offsets[row + 1]]
    return [int(i) for i in ids if i >= 2]


def by_event(history: History, rows: list[int]) -> dict[str, np.ndarray]:
    """The amounts of each type of event."""
    types, amounts = history.categories["event"].ids, history.numbers["amount"]
    return {name: np.array([amounts[r] for r in rows if types[r] == i], float) for i, name in enumerate(NAMES, start=2)}


def mean(values: np.ndarray) -> float:
    """Of what is not NaN."""
    present = values[~np.isnan(values)]
    return present.mean() if len(present) else np.nan


@pytest.mark.parametrize("window", [WINDOW, ALL_TIME])
def test_window_aggregates_equal_a_plain_loop(window):
    history = random_history()
    columns = window_aggregates(history, window, small=5)
    tag = "5d" if window == WINDOW else "all"
    for b in range(len(history.cut_B)):
        rows = rows_of(history, b, window)
        first = min((history.time_N[r] for r in rows), default=0)
        scale = MONTH / max(history.cut_B[b] - first, MONTH) if window == ALL_TIME and rows else 1.0
        times = history.time_N[rows]
        amounts = history.numbers["amount"][rows]
        events = [i for r in rows for i in ids_at(history.categories["event"], r)]
        expected = {
            "events": len(rows) * scale,
            "moments": len(set(times)) * scale,
            "days": len({t // DAY for t in times}) * scale,
            "sum_amount": np.nansum(amounts) * scale,
            "mean_amount": mean(amounts),
            "per_moment_amount": np.nansum(amounts) / len(set(times)) if rows else np.nan,
            **{f"sum_amount_event={name}": np.nansum(part) * scale for name, part in by_event(history, rows).items()},
            **{f"mean_amount_event={name}": mean(part) for name, part in by_event(history, rows).items()},
            "distinct_event": len(set(events)),
            "distinct_tags": len({i for r in rows for i in ids_at(history.categories["tags"], r)}),
            **{f"count_event={name}": events.count(i) * scale for i, name in enumerate(NAMES, start=2)},
        }
        found = {name.removesuffix(f"_{tag}"): values[b] for name, values in columns.items()}
        assert found.keys() == expected.keys()  # tags have seven values, more than five: not counted one by one
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name], value, rtol=1e-12, atol=1e-12, err_msg=name
            )  # sums in another order


def test_lifetime_aggregates_equal_a_plain_loop():
    history = random_history(1)
    columns = lifetime_aggregates(history)
    for b in range(len(history.cut_B)):
        rows = rows_of(history, b, ALL_TIME)
        times, cut = history.time_N[rows], history.cut_B[b]
        gaps = np.diff(np.unique(times)) / DAY
        expected = {
            "since_last": (cut - times.max()) / DAY if rows else np.nan,
            "since_first": (cut - times.min()) / DAY if rows else np.nan,
            "gap_mean": gaps.mean() if len(gaps) else np.nan,
            "gap_std": gaps.std() if len(gaps) else np.nan,
            "gap_last": gaps[-1] if len(gaps) else np.nan,
            "since_last_per_gap": (cut - times.max()) / DAY / max(gaps.mean(), 0.1) if len(gaps) else np.nan,
        }
        for i, name in enumerate(NAMES, start=2):
            own = [history.time_N[r] for r in rows if i in ids_at(history.categories["event"], r)]
            expected[f"since_last_{name}"] = (cut - max(own)) / DAY if own else np.nan
        for h in range(8):
            expected[f"hour{h}"] = np.mean(times % DAY // 10800 == h) if rows else np.nan
        for w in range(7):
            expected[f"weekday{w}"] = (
                np.mean(times.astype("datetime64[s]").astype("datetime64[D]").astype(int) % 7 == (w + 4) % 7)
                if rows
                else np.nan
            )
        assert columns.keys() == expected.keys()
        for name, value in expected.items():
            # the deviation comes from a difference of squares of some tens of days: 1e-6 of it survives
            np.testing.assert_allclose(columns[name][b], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_lifetime_numbers_equal_a_plain_loop():
    history = random_history(1)
    columns = lifetime_numbers(history)
    for b in range(len(history.cut_B)):
        rows = rows_of(history, b, ALL_TIME)
        amounts = history.numbers["amount"][rows]
        present = amounts[~np.isnan(amounts)]
        expected = {
            "last_amount": present[-1] if len(present) else np.nan,
            "largest_amount": present.max() if len(present) else np.nan,
            "std_amount": present.std() if len(present) else np.nan,
        }
        for name, part in by_event(history, rows).items():
            known = part[~np.isnan(part)]
            expected[f"last_amount_event={name}"] = known[-1] if len(known) else np.nan
            expected[f"mean_amount_event={name}"] = mean(part)
        assert columns.keys() == expected.keys()  # tags are lists: a number does not belong to one of their values
        for name, value in expected.items():
            # the deviation comes from a difference of squares near one: half of the digits survive
            np.testing.assert_allclose(columns[name][b], value, rtol=1e-7, atol=1e-7, err_msg=name)


def test_weekday_zero_is_monday():
    monday = int(np.datetime64("2024-01-01", "s").astype(int))
    history = History(np.zeros(1, int), np.array([monday]), {}, {}, *(np.array([n]) for n in (0, 1, 0, monday + DAY)))
    assert lifetime_aggregates(history)["weekday0"].tolist() == [1.0]


@pytest.mark.parametrize("field", ["event", "tags"])
@pytest.mark.parametrize("limit", [2, 100])
def test_bags_count_moments_and_keep_the_most_frequent(field, limit):
    history = random_history(2)
    values = history.categories[field]
    window = Window(history.begin(WINDOW), history.end_B)
    length, ids, counts = bag(window, once_per_moment(history, values), limit)
    ends = np.cumsum(length)
    for b in range(len(history.cut_B)):
        seen = {(history.time_N[r], i) for r in rows_of(history, b, WINDOW) for i in ids_at(values, r)}
        moments = sorted(
            {i: sum(j == i for _, j in seen) for _, i in seen}.items(), key=lambda item: (-item[1], item[0])
        )
        part = slice(ends[b] - length[b], ends[b])
        assert list(zip(ids[part].tolist(), counts[part].tolist(), strict=True)) == sorted(moments[:limit])


def test_only_keeps_the_examples_and_drops_events():
    history = random_history(3)
    keep = history.categories["event"].ids == 3
    kept = history.only(keep)
    assert kept.time_N.tolist() == history.time_N[keep].tolist()
    views = window_aggregates(history, WINDOW, 5)["count_event=view_5d"]
    np.testing.assert_array_equal(window_aggregates(kept, WINDOW, 5)["events_5d"], views)
    assert views.sum() > 0
    nothing = history.only(np.zeros(len(keep), bool))
    assert (window_aggregates(nothing, ALL_TIME, 5)["events_all"] == 0).all()
    assert np.isnan(lifetime_aggregates(nothing)["since_last"]).all()


def test_a_user_has_the_same_sums_in_every_chunk():
    history = random_history(4)
    alone = history.user_B == 7
    first, end = history.start_B[alone][0], history.start_B[alone][0] + int((history.user_N == 7).sum())
    small = History(
        user_N=history.user_N[first:end] * 0,
        time_N=history.time_N[first:end],
        categories={},
        numbers={"amount": history.numbers["amount"][first:end]},
        start_B=history.start_B[alone] - first,
        end_B=history.end_B[alone] - first,
        user_B=history.user_B[alone] * 0,
        cut_B=history.cut_B[alone],
    )
    for window in (WINDOW, ALL_TIME):
        together, apart = window_aggregates(history, window, 5), window_aggregates(small, window, 5)
        for name, values in apart.items():
            np.testing.assert_array_equal(
                values, together[name][alone], err_msg=name
            )  # bit-equal: serving takes other chunks


def test_expand_lists_ranges():
    rows, owner = expand(np.array([5, 2, 7]), np.array([7, 2, 10]))
    assert rows.tolist() == [5, 6, 7, 8, 9]
    assert owner.tolist() == [0, 0, 2, 2, 2]
