"""What of an order saga can be searched for in the Temporal UI, as docs/temporal-recipes.md says."""

import pytest

from activities.orders.sagas import (
    INSTRUMENT_ID,
    ORDER_ID,
    ORDER_IDS,
    SEARCHABLE_ORDERS_MAX,
    USER_ID,
    search_attributes,
)

# Temporal refuses a longer value, and with it the start of the workflow.
VALUE_BYTES_MAX = 2048


def names(order_ids: list[int]) -> set[str]:
    """Of the attributes that a saga of several orders gets."""
    return {pair.key.name for pair in search_attributes(order_ids, None)}


@pytest.mark.parametrize("count", [1, 2, SEARCHABLE_ORDERS_MAX])
def test_every_order_of_a_small_batch_is_found_by_order_ids(count: int) -> None:
    found = search_attributes(list(range(7, 7 + count)), None)[ORDER_IDS]
    assert list(found) == [str(order_id) for order_id in range(7, 7 + count)]


def test_a_larger_batch_starts_without_its_orders_ids() -> None:
    assert names(list(range(SEARCHABLE_ORDERS_MAX + 1))) == set()


def test_the_ids_of_the_largest_batch_fit() -> None:
    largest = [10**14 + number for number in range(SEARCHABLE_ORDERS_MAX)]
    listed = search_attributes(largest, None)[ORDER_IDS]
    assert len(str(list(listed)).replace(" ", "")) <= VALUE_BYTES_MAX


def test_a_single_order_is_found_by_its_number_its_user_and_its_instrument_too() -> None:
    found = search_attributes([7], (1003, "BTC-USDT-PERP"))
    assert (found[ORDER_ID], found[USER_ID], found[INSTRUMENT_ID]) == (7, "1003", "BTC-USDT-PERP")


def test_of_several_orders_no_single_user_is_named() -> None:
    assert names([7, 8]) == {ORDER_IDS.name}
