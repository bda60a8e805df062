"""Exposures: what users have open in an instrument, and the margin that their orders require.

`exposures.order_margin` is what the orders of one user in one instrument require. Every change of it reaches the
ledger exactly once: through `freeze_funds` for a check, through `settle` for engine events, through
`unfreeze_funds` for a release.
"""

from collections.abc import Sequence
from decimal import Decimal

from activities.risk.rows import ClaimRow, ExposureRow, Key, NewExposureRow, OpenRow
from domain.exposure import Exposure, Side
from domain.instruments import Instrument
from domain.money import ZERO
from domain.problems import Problem
from storage.db import Connection, columns
from storage.rows import assignments, batch, column_list, read, unnest

_CREATE = f"""
    INSERT INTO risk.exposures ({column_list(NewExposureRow)}) SELECT * FROM {unnest(NewExposureRow)}
    ON CONFLICT DO NOTHING
"""
_SAVE = f"""
    UPDATE risk.exposures e SET {assignments(OpenRow, without=["user_id", "instrument_id"])},
        pending_step = coalesce($13, e.pending_step), updated_at = now()
    FROM {unnest(OpenRow)} WHERE e.user_id = n.user_id AND e.instrument_id = n.instrument_id
"""


async def take_in_liquidation_order(
    conn: Connection, user_id: int, instrument_id: str, side: Side, quantity: Decimal, bound_price: Decimal
) -> None:
    """Count a liquidation order among the open ones, in the caller's transaction; it needs no margin and no leave."""
    key = (user_id, instrument_id)
    row = (await lock_exposures(conn, [key]))[key]
    after = row.state.with_order(side, quantity, bound_price, reduce_only=True)
    await save_exposures(conn, {key: (after, row.order_margin)})


async def positions_in_liquidation(conn: Connection, keys: Sequence[Key]) -> set[Key]:
    """Those of `keys` (user, instrument) that are the liquidation's: of a cross account, all that is cross."""
    rows = await conn.fetch(
        "SELECT k.user_id, k.instrument_id FROM unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " WHERE EXISTS (SELECT FROM risk.liquidation_queue q WHERE q.user_id = k.user_id"
        "  AND q.status IN ('PENDING', 'PROCESSING') AND (q.instrument_id = k.instrument_id"
        "   OR q.margin_mode = 'CROSS' AND EXISTS (SELECT FROM risk.exposures e WHERE e.user_id = k.user_id"
        "      AND e.instrument_id = k.instrument_id AND e.margin_mode = 'CROSS')))",
        *columns(keys, 2),
    )
    return {(row["user_id"], row["instrument_id"]) for row in rows}


async def set_margin_mode(conn: Connection, user_id: int, instrument: Instrument, mode: str) -> None:
    """ISOLATED or CROSS for a user's future positions, in the caller's transaction.

    Raises Problem MARGIN_MODE_NOT_CHANGEABLE while there is a position or an open order.
    """
    await create_missing(conn, [(user_id, instrument.instrument_id)], {instrument.instrument_id: instrument})
    changed = await conn.fetchval(
        "UPDATE risk.exposures SET margin_mode = $3, updated_at = now() WHERE user_id = $1 AND instrument_id = $2"
        " AND (margin_mode = $3 OR (signed_quantity = 0 AND open_orders = 0 AND bid_quantity = 0 AND ask_quantity = 0"
        "   AND bid_notional = 0 AND ask_notional = 0)) RETURNING TRUE",
        user_id,
        instrument.instrument_id,
        mode,
    )
    if not changed:
        raise Problem("MARGIN_MODE_NOT_CHANGEABLE", "Close the position and cancel the open orders first")


async def position_margin(conn: Connection, user_id: int, instrument_id: str) -> tuple[Decimal, int]:
    """What the ledger holds behind a position, and which version of it this is."""
    held = await conn.fetchrow(
        "SELECT position_margin, margin_version FROM ledger.v_margin_holds WHERE user_id = $1 AND instrument_id = $2",
        user_id,
        instrument_id,
    )
    return (held[0], held[1]) if held else (ZERO, 0)


def without_claim(state: Exposure, claim: ClaimRow) -> Exposure:
    """An exposure when an order or an amendment gives back what it claimed."""
    return state.with_claim(claim.side, -claim.quantity, -claim.notional, -claim.orders, -claim.loss)


async def read_claims(conn: Connection, ids: Sequence[int]) -> list[ClaimRow]:
    """What orders and amendments claim, in order of their ids."""
    if not ids:
        return []
    rows = await conn.fetch(
        f"SELECT {column_list(ClaimRow)} FROM orders.v_claims WHERE order_id = ANY($1) ORDER BY order_id", ids
    )
    return read(ClaimRow, rows)


async def create_missing(conn: Connection, keys: Sequence[Key], instruments: dict[str, Instrument]) -> None:
    """Empty exposures for those of `keys` that have none, at the instrument's default leverage."""
    rows = [NewExposureRow(user_id, name, instruments[name].default_leverage) for user_id, name in keys]
    await conn.execute(_CREATE, *batch(NewExposureRow, rows))


async def lock_exposures(conn: Connection, keys: Sequence[Key]) -> dict[Key, ExposureRow]:
    """The exposures of `keys`, locked in (user, instrument) order so that no two transactions wait for each other.

    It waits for every check of these keys, and keeps new ones out until the caller's transaction ends.
    """
    rows = await conn.fetch(
        f"SELECT {column_list(ExposureRow, 'e')} FROM risk.exposures e"
        " JOIN unnest($1::bigint[], $2::text[]) AS k (user_id, instrument_id)"
        " USING (user_id, instrument_id) ORDER BY e.user_id, e.instrument_id FOR UPDATE OF e",
        *columns(keys, 2),
    )
    return {row.key: row for row in read(ExposureRow, rows)}


async def read_unfrozen(conn: Connection, exposures: dict[Key, ExposureRow]) -> set[Key]:
    """Keys whose last check the ledger does not hold in full yet; a new order must not be netted against it."""
    pending = {key: row.pending_step for key, row in exposures.items() if row.pending_step}
    if not pending:
        return set()
    frozen = await conn.fetch(
        "SELECT step_id FROM ledger.v_steps WHERE step_id = ANY($1) AND (result -> 'refused')::text = '[]'",
        [f"freeze:{step}" for step in set(pending.values())],
    )
    held = {row["step_id"].removeprefix("freeze:") for row in frozen}
    return {key for key, step in pending.items() if step not in held}


async def read_exposure(conn: Connection, user_id: int, instrument: Instrument) -> Exposure:
    """What a user has open in an instrument, without a lock; nothing at the default leverage for whom is new to it."""
    row = await conn.fetchrow(
        f"SELECT {column_list(ExposureRow)} FROM risk.exposures WHERE user_id = $1 AND instrument_id = $2",
        user_id,
        instrument.instrument_id,
    )
    return Exposure(instrument.default_leverage) if row is None else ExposureRow(*row).state


async def save_exposures(
    conn: Connection, changed: dict[Key, tuple[Exposure, Decimal]], pending_step: str | None = None
) -> None:
    """Write exposures that are locked, each with the margin that its orders require, as `pending_step` asked for it."""
    rows = [_open_row(key, state, margin) for key, (state, margin) in changed.items()]
    await conn.execute(_SAVE, *batch(OpenRow, rows), pending_step)


def _open_row(key: Key, state: Exposure, order_margin: Decimal) -> OpenRow:
    return OpenRow(
        user_id=key[0],
        instrument_id=key[1],
        signed_quantity=state.signed_quantity,
        entry_notional=state.entry_notional,
        bid_quantity=state.bid_quantity,
        bid_notional=state.bid_notional,
        ask_quantity=state.ask_quantity,
        ask_notional=state.ask_notional,
        open_orders=state.open_orders,
        order_margin=order_margin,
        bid_loss=state.bid_loss,
        ask_loss=state.ask_loss,
    )
