"""What the ledger tells the engine of the margin behind positions: what lowers one is in the log before money moves.

A margin that a funding payment takes from is announced first, by a stored step of the payment's page; the payment is
booked once the engine has carried that out, and what came of it and of all before it is settled.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from activities.matching.steps import append_commands
from domain.clock import to_ms
from domain.matching import AnyCommand, MoveMargin, margin_units
from domain.money import ZERO
from domain.steps import FundingDraws, MarginDraw
from storage.db import Connection, columns
from storage.once import NotYetError, first_result, store_result

Key = tuple[int, str]


@dataclass(slots=True)
class Announced:
    """What the payments of a page may take of the margins of (user, instrument), as the engine is told (quote), and
    with which command of each instrument's log it was told last. `times`: in so many steps."""

    amounts: dict[Key, Decimal] = field(default_factory=dict)
    command_seqs: dict[str, int] = field(default_factory=dict)
    times: int = 0

    def beyond(self, needed: Mapping[Key, Decimal]) -> dict[Key, Decimal]:
        """By how much `needed` is more than what was announced."""
        missing = {key: amount - self.amounts.get(key, ZERO) for key, amount in needed.items()}
        return {key: amount for key, amount in missing.items() if amount > ZERO}

    def spared(self, taken: Mapping[Key, Decimal]) -> dict[Key, Decimal]:
        """By how much what was announced is more than what is `taken`."""
        spared = {key: amount - taken.get(key, ZERO) for key, amount in self.amounts.items()}
        return {key: amount for key, amount in spared.items() if amount > ZERO}


async def await_engine(conn: Connection, instrument_id: str, command_seq: int) -> None:
    """Raises NotYetError until the engine has carried out that command, and all that came of it and of those before
    is booked: until then a fill may still count on the margin that is to be taken away."""
    row = await conn.fetchrow(
        "SELECT m.command_seq, c.applied_seq, EXISTS (SELECT FROM matching.v_events e WHERE e.instrument_id = $1"
        "   AND e.seq > c.applied_seq AND e.command_seq <= $2) AS unbooked"
        " FROM matching.v_cursors m JOIN ledger.v_cursors c USING (instrument_id) WHERE instrument_id = $1",
        instrument_id,
        command_seq,
    )
    assert row is not None, f"Expected cursors of {instrument_id}"
    if row["command_seq"] < command_seq or row["unbooked"]:
        raise NotYetError(f"Command {command_seq} of {instrument_id} is not settled: the engine is at {row[0]}")


async def tell_engine(conn: Connection, moved: Mapping[Key, Decimal]) -> dict[str, int]:
    """Tell the engine, in the caller's transaction, by how much the margin of positions has changed, or will have.

    Answers the seq of the last command of each instrument.
    """
    rows = await conn.fetch(
        "SELECT instrument_id, i.tick_size * i.lot_size AS unit, c.applied_seq, now() AS now"
        " FROM matching.v_instruments i JOIN ledger.v_cursors c USING (instrument_id)"
        " WHERE instrument_id = ANY($1)",
        sorted({instrument_id for _, instrument_id in moved}),
    )
    known = {row["instrument_id"]: row for row in rows}
    commands: defaultdict[str, list[AnyCommand]] = defaultdict(list)
    for (user_id, instrument_id), amount in sorted(moved.items()):
        row = known[instrument_id]
        units = margin_units(amount, row["unit"])
        commands[instrument_id].append(
            MoveMargin(at=to_ms(row["now"]), user_id=user_id, amount=units, after_seq=row["applied_seq"])
        )
    return await append_commands(conn, commands)


async def read_announced(conn: Connection, page: str) -> Announced:
    """What was announced for the payments of a page so far."""
    found = Announced()
    while (stored := await first_result(conn, "ledger", _step(page, found.times + 1), FundingDraws)) is not None:
        found.times += 1
        for draw in stored.draws:
            key = (draw.user_id, draw.instrument_id)
            found.amounts[key] = found.amounts.get(key, ZERO) + draw.amount
        found.command_seqs |= stored.command_seqs
    return found


async def announce(conn: Connection, page: str, times: int, draws: Mapping[Key, Decimal]) -> None:
    """Tell the engine, for the next time after `times`, that the payments of a page will take so much of margins."""
    command_seqs = await tell_engine(conn, {key: -amount for key, amount in draws.items()})
    stored = FundingDraws([MarginDraw(*key, amount) for key, amount in sorted(draws.items())], command_seqs)
    await store_result(conn, "ledger", _step(page, times + 1), stored)


def _step(page: str, number: int) -> str:
    return f"funding:{page}:{number}"


async def await_liquidations(conn: Connection, payers: Collection[int], drawn: Collection[Key]) -> None:
    """Raises NotYetError while an order or a deleveraging of a liquidation is under way that counts on money of
    `payers`: on all of it in cross mode, else on a margin that is `drawn` from.

    The caller has locked the payers' balances, which keeps new ones from being submitted (see `book.lock_money`).
    """
    rows = await conn.fetch(
        "SELECT instrument_id, max(command_seq) AS command_seq FROM risk.v_liquidations"
        " WHERE user_id = ANY($1::bigint[]) AND status IN ('PENDING', 'PROCESSING') AND (margin_mode = 'CROSS'"
        "   OR (user_id, instrument_id) IN (SELECT * FROM unnest($2::bigint[], $3::text[])))"
        " GROUP BY instrument_id ORDER BY 1",
        list(payers),
        *columns(sorted(drawn), 2),
    )
    for row in rows:
        await await_engine(conn, row["instrument_id"], row["command_seq"])
