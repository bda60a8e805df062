"""Starting order sagas: written down first (`orders.sagas`), so that one whose start was lost is swept up."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from temporalio.client import Client
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError

from clients import ORDERS_QUEUE
from domain.sagas import ORDER_CANCELLATION, ORDER_PLACEMENT, OrderBatch
from storage.db import Connection, Pool

WORKFLOW_OF_KIND = {"PLACE": ORDER_PLACEMENT, "CANCEL": ORDER_CANCELLATION}
ORDER_ID = SearchAttributeKey.for_int("OrderId")
ORDER_IDS = SearchAttributeKey.for_keyword_list("OrderIds")
USER_ID = SearchAttributeKey.for_keyword("UserId")
INSTRUMENT_ID = SearchAttributeKey.for_keyword("InstrumentId")
SEARCHABLE_ORDERS_MAX = 100


@dataclass(frozen=True, slots=True)
class Saga:
    """One placement (kind PLACE) or cancellation (CANCEL) to be run as a workflow."""

    kind: str
    batch: OrderBatch


async def record_saga(conn: Connection, saga: Saga) -> None:
    """Write the saga down in the caller's transaction."""
    await conn.execute(
        "INSERT INTO orders.sagas (workflow_id, kind, order_ids) VALUES ($1, $2, $3)",
        saga.batch.saga_id,
        saga.kind,
        saga.batch.order_ids,
    )


async def stalled_sagas(pool: Pool, older_than: timedelta, limit: int) -> list[Saga]:
    """Sagas that should have ended by now, oldest first."""
    rows = await pool.fetch(
        "SELECT kind, workflow_id, order_ids FROM orders.sagas WHERE NOT done AND created_at < now() - $1::interval"
        " ORDER BY created_at LIMIT $2",
        older_than,
        limit,
    )
    return [Saga(row["kind"], OrderBatch(row["workflow_id"], row["order_ids"])) for row in rows]


async def start_saga(client: Client, saga: Saga, *, eager: bool, owner: tuple[int, str] | None = None) -> bool:
    """Start the saga's workflow; False when it runs already or has completed.

    `owner` is (user id, instrument id) of a single order, for the Temporal UI. One that failed, was terminated or
    timed out may be started again: every step answers what it did the first time.
    """
    try:
        await client.start_workflow(
            WORKFLOW_OF_KIND[saga.kind],
            saga.batch,
            id=saga.batch.saga_id,
            task_queue=ORDERS_QUEUE,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
            id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            request_eager_start=eager,
            search_attributes=_search_attributes(saga.batch.order_ids, owner),
            static_summary=f"{len(saga.batch.order_ids)} orders from {saga.batch.order_ids[0]}",
        )
    except WorkflowAlreadyStartedError:
        return False
    return True


def _search_attributes(order_ids: Sequence[int], owner: tuple[int, str] | None) -> TypedSearchAttributes:
    if len(order_ids) == 1:
        pairs: list[SearchAttributePair[int] | SearchAttributePair[str]] = [SearchAttributePair(ORDER_ID, order_ids[0])]
        if owner is not None:
            pairs += [SearchAttributePair(USER_ID, str(owner[0])), SearchAttributePair(INSTRUMENT_ID, owner[1])]
        return TypedSearchAttributes(pairs)
    if len(order_ids) <= SEARCHABLE_ORDERS_MAX:
        return TypedSearchAttributes([SearchAttributePair(ORDER_IDS, [str(order_id) for order_id in order_ids])])
    return TypedSearchAttributes.empty
