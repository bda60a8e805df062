"""Starting order sagas: written down first (`orders.sagas`), so that one whose start was lost is swept up."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

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


async def close_saga(conn: Connection, saga_id: str) -> None:
    """Write down that a workflow has done all that its sagas asked for."""
    await conn.execute("UPDATE orders.sagas SET done = TRUE WHERE workflow_id = $1 AND NOT done", saga_id)


@dataclass(frozen=True, slots=True)
class Saga:
    """One placement (kind PLACE) or cancellation (CANCEL) to be run as a workflow.

    `owner` is (user id, instrument id) of a single order where known: the Temporal UI finds it by them.
    """

    kind: str
    batch: OrderBatch
    owner: tuple[int, str] | None = None


async def record_saga(conn: Connection, saga: Saga) -> None:
    """Write the saga down in the caller's transaction."""
    await conn.execute(
        "INSERT INTO orders.sagas (saga_id, workflow_id, kind, order_ids) VALUES ($1, $1, $2, $3)",
        saga.batch.saga_id,
        saga.kind,
        saga.batch.order_ids,
    )


async def merge_sagas(pool: Pool, sagas: Sequence[Saga]) -> Saga | None:
    """One saga for all of `sagas`, which are of one kind; None when the sweeper has taken them all.

    The row of each says which workflow it belongs to before that is started, so that it cannot run in two.
    """
    if len(sagas) == 1:
        return sagas[0]
    kind, first = sagas[0].kind, sagas[0].batch
    total = sum(len(saga.batch.order_ids) for saga in sagas)
    workflow_id = f"{first.saga_id.split('-')[0]}-{first.order_ids[0]}-{total}{_suffix(first)}"
    rows = await pool.fetch(
        "UPDATE orders.sagas SET workflow_id = $2 WHERE saga_id = ANY($1) AND NOT swept RETURNING order_ids",
        [saga.batch.saga_id for saga in sagas],
        workflow_id,
    )
    order_ids = sorted(order_id for row in rows for order_id in row["order_ids"])
    return Saga(kind, OrderBatch(workflow_id, order_ids)) if order_ids else None


async def sweep_up(pool: Pool, older_than: timedelta, limit: int) -> list[Saga]:
    """Claim the sagas that should have ended by now; from then on they are not merged with others.

    Of more than `limit` some at random: sagas that never end must not keep others waiting.
    """
    rows = await pool.fetch(
        "UPDATE orders.sagas SET swept = TRUE WHERE NOT done AND workflow_id IN (SELECT workflow_id FROM orders.sagas"
        " WHERE NOT done AND created_at < now() - $1::interval ORDER BY random() LIMIT $2)"
        " RETURNING workflow_id, kind, order_ids",
        older_than,
        limit,
    )
    found: dict[str, Saga] = {}
    for row in rows:
        saga = found.setdefault(row["workflow_id"], Saga(row["kind"], OrderBatch(row["workflow_id"], [])))
        saga.batch.order_ids.extend(row["order_ids"])
    for saga in found.values():
        saga.batch.order_ids.sort()
    return list(found.values())


async def time_before_open_sagas(conn: Connection, kept: timedelta) -> datetime:
    """`kept` ago, or when the oldest saga that is still open was written down, if that is earlier."""
    before: datetime = await conn.fetchval(
        "SELECT least(now() - $1::interval, min(created_at)) FROM orders.sagas WHERE NOT done", kept
    )
    return before


async def forget_done_sagas(conn: Connection, before: datetime, limit: int) -> int:
    """Delete up to `limit` sagas that are done and were written down before then; how many it was."""
    status = await conn.execute(
        "DELETE FROM orders.sagas WHERE saga_id IN ("
        " SELECT saga_id FROM orders.sagas WHERE done AND created_at < $1 ORDER BY created_at LIMIT $2)",
        before,
        limit,
    )
    return int(status.split()[-1])


async def start_saga(client: Client, saga: Saga, *, eager: bool) -> bool:
    """Start the saga's workflow; False when it runs already or has completed.

    One that failed, was terminated or
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
            search_attributes=search_attributes(saga.batch.order_ids, saga.owner),
            static_summary=_summary(saga),
        )
    except WorkflowAlreadyStartedError:
        return False
    return True


def _summary(saga: Saga) -> str:
    """What an operator reads in the list of workflows."""
    verb = {"PLACE": "Places", "CANCEL": "Cancels"}[saga.kind]
    first, count = saga.batch.order_ids[0], len(saga.batch.order_ids)
    if count > 1:
        return f"{verb} {count} orders from {first} on"
    owner = "" if saga.owner is None else f" of user {saga.owner[0]} in {saga.owner[1]}"
    return f"{verb} order {first}{owner}"


def _suffix(batch: OrderBatch) -> str:
    """What tells two cancellations of the same order apart."""
    token = batch.saga_id.split("-")[3:]
    return f"-{token[0]}" if token else ""


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
