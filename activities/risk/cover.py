"""What the rest of an account has for each of its cross positions, as the engine is told (`SetCover`).

It is told with every order of a cross account that is checked, with a withdrawal, and by the risk monitor once it has
become less: marks of other instruments move, and money goes to isolated positions or pays funding.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal

import asyncpg

from activities.matching.steps import append_commands
from activities.risk.collateral import read_collateral
from domain.clock import to_ms
from domain.matching import AnyCommand, SetCover, margin_units
from domain.money import AMOUNT_STEP, ZERO
from storage.db import Connection

Key = tuple[int, str]
# The engine's messages have 64 bits for a number; nobody's account is that large.
UNITS_MAX = 1 << 62
# So much of a position's maintenance margin is kept back, so that not every tick of another mark has to be told.
KEPT_BACK = Decimal("0.1")

_CROSS = """
    SELECT e.user_id, e.instrument_id, i.quote_asset, i.tick_size * i.lot_size AS unit, e.told_cover,
           coalesce(l.applied_seq, 0) AS applied_seq, coalesce(h.position_margin, 0) AS margin,
           greatest(0, coalesce(h.order_margin, 0) - e.bid_loss - e.ask_loss) AS order_margin,
           coalesce(p.signed_quantity * m.mark_price - sign(p.signed_quantity) * p.entry_notional, 0) AS profit,
           coalesce(abs(p.signed_quantity) * m.mark_price * t.maintenance_margin_rate - t.cumulative, 0) AS maintenance
    FROM risk.v_exposures e JOIN matching.v_instruments i USING (instrument_id)
    LEFT JOIN ledger.v_cursors l USING (instrument_id)
    LEFT JOIN ledger.v_margin_holds h ON h.user_id = e.user_id AND h.instrument_id = e.instrument_id
    LEFT JOIN positions.v_positions p
        ON p.user_id = e.user_id AND p.instrument_id = e.instrument_id AND p.margin_mode = 'CROSS'
    LEFT JOIN LATERAL (
        SELECT mark_price FROM market.v_mark_prices k WHERE k.instrument_id = e.instrument_id
        ORDER BY calculated_at DESC LIMIT 1) m ON TRUE
    LEFT JOIN LATERAL (
        SELECT maintenance_margin_rate, cumulative FROM risk.v_leverage_tiers k
        WHERE k.instrument_id = e.instrument_id AND notional_from <= abs(p.signed_quantity) * m.mark_price
        ORDER BY notional_from DESC LIMIT 1) t ON TRUE
    WHERE e.user_id = ANY($1::bigint[]) AND e.margin_mode = 'CROSS'
"""


@dataclass(frozen=True, slots=True)
class Cover:
    """`amount` (quote) covers a cross position beyond its own margin, with all that the ledger has booked up to event
    `after_seq`. `told` is what the engine was told last, None if nothing. `unit`: a tick times a lot (quote)."""

    amount: Decimal
    told: Decimal | None
    after_seq: int
    unit: Decimal

    def less(self, amount: Decimal) -> "Cover":
        """What is left of it when `amount` (quote) goes."""
        return replace(self, amount=self.amount - amount)

    def command(self, user_id: int, at_ms: int) -> SetCover:
        """The engine's command that tells it."""
        units = max(-UNITS_MAX, min(UNITS_MAX, margin_units(self.amount, self.unit)))
        return SetCover(at=at_ms, user_id=user_id, cover=units, after_seq=self.after_seq)


async def read_covers(conn: Connection, user_ids: Collection[int]) -> dict[Key, Cover]:
    """The cover of all that `user_ids` hold or may hold in cross mode, by (user, instrument).

    It is what nothing holds less funding that is owed, the initial margin that orders in that instrument hold, and of
    every other cross position its margin, less what its maintenance margin is beyond its unrealized profit: a profit
    that is not realized pays for no loss that is. What orders hold for their open loss is their own; what those of
    other instruments hold may be lost with their fills.
    """
    rows = await conn.fetch(_CROSS, list(user_ids))
    collateral = await read_collateral(conn, {row["user_id"] for row in rows})
    accounts: defaultdict[tuple[int, str], Decimal] = defaultdict(Decimal)
    # Realized with fills that are not booked: what of the cross profit or loss no position has.
    unbooked = {purse: -money.cross_loss for purse, money in collateral.items()}
    for row in rows:
        unbooked[row["user_id"], row["quote_asset"]] -= row["profit"]
    for purse, money in collateral.items():
        accounts[purse] = money.available - money.funding_owed + min(ZERO, unbooked[purse])
    for row in rows:
        accounts[row["user_id"], row["quote_asset"]] += _spare(row)
    covers = {}
    for row in rows:
        exact = accounts[row["user_id"], row["quote_asset"]] - _spare(row) + row["order_margin"]
        exact -= KEPT_BACK * row["maintenance"]
        amount = exact.quantize(AMOUNT_STEP, ROUND_FLOOR)
        covers[row["user_id"], row["instrument_id"]] = Cover(amount, row["told_cover"], row["applied_seq"], row["unit"])
    return covers


def _spare(row: asyncpg.Record) -> Decimal:
    """What a cross position can do without for another one's loss (quote)."""
    return Decimal(row["margin"] + min(ZERO, row["profit"] - row["maintenance"]))


async def tell_covers(conn: Connection, covers: Mapping[Key, Cover]) -> None:
    """Append the commands that tell `covers` to the engine's logs, in the caller's transaction."""
    if not covers:
        return
    at_ms = to_ms(await conn.fetchval("SELECT now()"))
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    for (user_id, instrument_id), cover in sorted(covers.items()):
        commands[instrument_id].append(cover.command(user_id, at_ms))
    await append_commands(conn, commands)


async def tell_covers_again(conn: Connection, user_ids: Collection[int]) -> None:
    """Tell what the engine has heard of before anew: money of `user_ids` has gone."""
    covers = await read_covers(conn, user_ids)
    await tell_covers(conn, {key: cover for key, cover in covers.items() if cover.told is not None})
