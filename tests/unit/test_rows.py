"""Statements take their lists of columns, in order, from the row types."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import NamedTuple

import pytest

from storage.rows import assignments, batch, column_list, parameters, unnest


class Row(NamedTuple):
    """One of every kind."""

    user_id: int
    name: str | None
    amount: Decimal
    is_open: bool
    at: datetime


class Unknown(NamedTuple):
    """A type that no statement has."""

    share: float


def test_columns_are_listed_in_the_order_of_the_fields() -> None:
    assert column_list(Row) == "user_id, name, amount, is_open, at"
    assert column_list(Row, "r") == "r.user_id, r.name, r.amount, r.is_open, r.at"


def test_a_batch_is_one_array_per_column_whether_there_are_rows_or_none() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [Row(1, None, Decimal(2), is_open=True, at=at), Row(3, "b", Decimal(4), is_open=False, at=at)]
    assert batch(Row, rows) == [[1, 3], [None, "b"], [Decimal(2), Decimal(4)], [True, False], [at, at]]
    assert batch(Row, []) == [[], [], [], [], []]


def test_the_arrays_have_the_types_of_the_fields_from_the_first_parameter_on() -> None:
    arrays = "$2::bigint[], $3::text[], $4::numeric[], $5::boolean[], $6::timestamptz[]"
    assert unnest(Row, 2) == f"unnest({arrays}) AS n (user_id, name, amount, is_open, at)"


def test_one_row_has_a_parameter_per_column() -> None:
    assert parameters(Row) == "$1, $2, $3, $4, $5"
    assert parameters(Row, 3) == "$3, $4, $5, $6, $7"


def test_a_type_without_an_sql_type_is_refused() -> None:
    with pytest.raises(KeyError):
        unnest(Unknown)


def test_all_columns_but_the_key_are_assigned() -> None:
    assert assignments(Row, without=["user_id", "at"]) == "name = n.name, amount = n.amount, is_open = n.is_open"
    assert assignments(Row, source="excluded", without=["user_id", "name", "at"]) == (
        "amount = excluded.amount, is_open = excluded.is_open"
    )
