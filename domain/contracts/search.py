"""Search attributes: by what workflows are found in Temporal."""

from collections.abc import Sequence

from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes

ORDER_ID = SearchAttributeKey.for_int("OrderId")
ORDER_IDS = SearchAttributeKey.for_keyword_list("OrderIds")
USER_ID = SearchAttributeKey.for_keyword("UserId")
INSTRUMENT_ID = SearchAttributeKey.for_keyword("InstrumentId")
SEARCHABLE_ORDERS_MAX = 100


def search_attributes(order_ids: Sequence[int], owner: tuple[int, str] | None) -> TypedSearchAttributes:
    """`OrderIds` of up to SEARCHABLE_ORDERS_MAX orders, and what else is known of a single one."""
    pairs: list[SearchAttributePair[int] | SearchAttributePair[str] | SearchAttributePair[Sequence[str]]] = []
    if len(order_ids) <= SEARCHABLE_ORDERS_MAX:
        pairs.append(SearchAttributePair(ORDER_IDS, [str(order_id) for order_id in order_ids]))
    if len(order_ids) == 1:
        pairs.append(SearchAttributePair(ORDER_ID, order_ids[0]))
        if owner is not None:
            pairs += [SearchAttributePair(USER_ID, str(owner[0])), SearchAttributePair(INSTRUMENT_ID, owner[1])]
    return TypedSearchAttributes(pairs)
