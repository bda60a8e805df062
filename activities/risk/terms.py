"""What risk tells the engine of users: leverage, maintenance margin and cover, by which it guards fills."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from activities.matching.instruments import Rules
from activities.matching.steps import append_commands
from activities.risk.cover import Cover, read_covers, tell_covers
from activities.risk.exposures import lock_exposures, position_margin
from activities.risk.rows import ExposureRow, Key, ToldCoverRow, ToldTermsRow
from domain.clock import to_ms
from domain.exposure import Exposure
from domain.instruments import Instrument
from domain.margin import tier_of
from domain.matching import AnyCommand, SetTerms
from domain.money import ZERO
from storage.db import Connection, columns
from storage.rows import assignments, batch, unnest

# The engine has rates in millionths.
RATE_UNITS = 1_000_000
_TERMS_ARE_TOLD = f"""
    UPDATE risk.exposures e SET {assignments(ToldTermsRow, without=["user_id", "instrument_id"])}
    FROM {unnest(ToldTermsRow)} WHERE e.user_id = n.user_id AND e.instrument_id = n.instrument_id
"""
_COVERS_ARE_TOLD = f"""
    UPDATE risk.exposures e SET {assignments(ToldCoverRow, without=["user_id", "instrument_id"])}
    FROM {unnest(ToldCoverRow)} WHERE e.user_id = n.user_id AND e.instrument_id = n.instrument_id
"""


async def tell_terms(
    conn: Connection, states: Mapping[Key, Exposure], rows: Mapping[Key, ExposureRow], rules: Rules
) -> None:
    """Tell the engine on which terms it has to guard the fills of these users, where it knows others.

    They are in its log before the orders that are checked now, as these come later; and whoever changes terms holds
    the exposure's lock, so that the log has them in the order in which they were decided.
    """
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    told: list[ToldTermsRow] = []
    uncovered = await _uncovered(
        conn, [k for k, state in states.items() if state.leverage < (rows[k].told_leverage or 0)]
    )
    for key, state in sorted(states.items()):
        row = rows[key]
        leverage = state.leverage if key not in uncovered else rows[key].told_leverage or state.leverage
        rate = tier_of(state.worst_notional, rules.tiers[key[1]]).maintenance_margin_rate
        maintenance = -int(-rate * RATE_UNITS // 1)
        if (row.told_leverage, row.told_maintenance, row.told_mode) == (
            leverage,
            maintenance,
            row.margin_mode,
        ):
            continue
        bankruptcy = 0
        if row.told_leverage is None and state.signed_quantity:
            bankruptcy = await _bankruptcy(conn, key, state, rules.instruments[key[1]])
        commands[key[1]].append(
            SetTerms(
                at=to_ms(await conn.fetchval("SELECT now()")),
                user_id=key[0],
                leverage=leverage,
                maintenance=maintenance,
                cross=state.cross,
                bankruptcy=bankruptcy,
            )
        )
        told.append(ToldTermsRow(*key, leverage, maintenance, row.margin_mode))
    if not told:
        return
    await conn.execute(_TERMS_ARE_TOLD, *batch(ToldTermsRow, told))
    await append_commands(conn, commands)


async def _uncovered(conn: Connection, keys: Collection[Key]) -> set[Key]:
    """Those of `keys` whose orders lack margin and are about to be cancelled: a lower leverage, with more margin, is
    not told for these."""
    if not keys:
        return set()
    rows = await conn.fetch(
        "SELECT user_id, instrument_id FROM ledger.v_margin_holds JOIN unnest($1::bigint[], $2::text[])"
        " AS k (user_id, instrument_id) USING (user_id, instrument_id) WHERE order_short > 0",
        *columns(sorted(keys), 2),
    )
    return {(row["user_id"], row["instrument_id"]) for row in rows}


async def tell_covers_of(
    conn: Connection, keys: Collection[Key], spent: Mapping[Key, Decimal], losses: Mapping[Key, Decimal]
) -> None:
    """Tell the engine what covers these cross positions, once the checked orders hold their money: what is `spent` for
    other instruments goes, and for their own the open loss (quote)."""
    if not keys:
        return
    covers = await read_covers(conn, {user_id for user_id, _ in keys})
    told = {}
    for key in keys:
        elsewhere = sum((amount for other, amount in spent.items() if other[0] == key[0] and other != key), ZERO)
        told[key] = covers[key].less(elsewhere + losses.get(key, ZERO))
    await _tell(conn, told)


async def tell_lower_covers(conn: Connection) -> int:
    """Tell the engine of all cross accounts that have less than it knows and open orders; how many positions."""
    rows = await conn.fetch(
        "SELECT user_id, instrument_id FROM risk.exposures WHERE told_cover IS NOT NULL AND open_orders > 0"
    )
    if not rows:
        return 0
    keys = [(row["user_id"], row["instrument_id"]) for row in rows]
    async with conn.transaction():
        await lock_exposures(conn, keys)
        known = await read_covers(conn, {user_id for user_id, _ in keys})
        covers = {key: known[key] for key in keys if key in known}
        lower = {key: cover for key, cover in covers.items() if cover.told is not None and cover.amount < cover.told}
        await _tell(conn, lower)
    return len(lower)


async def _tell(conn: Connection, covers: Mapping[Key, Cover]) -> None:
    await tell_covers(conn, covers)
    rows = [ToldCoverRow(*key, cover.amount) for key, cover in covers.items()]
    await conn.execute(_COVERS_ARE_TOLD, *batch(ToldCoverRow, rows))


async def _bankruptcy(conn: Connection, key: Key, state: Exposure, instrument: Instrument) -> int:
    """The bankruptcy price (millionths of a tick, rounded against the user) of a position that was opened before the
    engine knew terms of its user."""
    margin, _ = await position_margin(conn, *key)
    is_long = state.signed_quantity > 0
    backing = state.entry_notional - margin if is_long else state.entry_notional + margin
    price = backing / abs(state.signed_quantity) / instrument.tick_size * RATE_UNITS
    return max(0, int(price.to_integral_value(ROUND_CEILING if is_long else ROUND_FLOOR)))
