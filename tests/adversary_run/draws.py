"""Laws 1 and 5: whom the insurance fund pays for, and no more than what a position was worth below zero at the mark."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

import asyncpg

from storage.db import Connection
from tests.adversary_run.fills import mark_of, position_at
from tests.adversary_run.findings import ROUNDING, Finding
from tests.adversary_run.standing import ZERO, Held, Stands, read_tiers

_DRAWS = """
    SELECT w.id, w.available, w.holds, w.at, d.*, r.after_seq, r.to_seq,
           k.quantity AS closing, k.created_at AS claimed_at, k.mark_price AS claimed_mark,
           q.margin_mode AS liquidated_as
    FROM witness.draws w JOIN ledger.insurance_draws d USING (reference_type, reference_id, user_id)
    LEFT JOIN witness.ranges r ON r.tx = w.tx AND r.instrument_id = d.instrument_id
    LEFT JOIN ledger.insurance_claims k ON k.liquidation_id = d.liquidation_id AND k.round = d.round
    LEFT JOIN risk.liquidation_queue q ON q.liquidation_id = d.liquidation_id
        AND (q.user_id, q.instrument_id) = (d.user_id, d.instrument_id)
    WHERE w.id > $1 ORDER BY w.id
"""
_FILLS = """
    SELECT seq, cause, price, quantity, side FROM positions.position_events
    WHERE user_id = $1 AND instrument_id = $2 AND seq > $3 AND seq <= $4 ORDER BY seq
"""
_PAID = """
    SELECT -sum(delta_available) FROM ledger.ledger_entries
    WHERE reference_type = 'FUNDING_FEE' AND reference_id = $1 AND user_id = $2 AND entry_type = 'FUNDING'
"""
# Marks that were in force at some moment between two: the last before, and those since.
_MARKS = """
    SELECT mark_price FROM market.mark_prices WHERE instrument_id = $1 AND calculated_at <= $3
    AND calculated_at >= coalesce((SELECT max(calculated_at) FROM market.mark_prices
                                   WHERE instrument_id = $1 AND calculated_at <= $2), $2)
"""
_FUNDED = """
    SELECT EXISTS (SELECT FROM witness.holds h WHERE h.user_id = $1 AND h.instrument_id = $2
        AND h.at > $3::timestamptz - interval '2 s' AND h.at <= $4 AND h.margin_after < h.margin_before
        AND NOT EXISTS (SELECT FROM witness.ranges r WHERE (r.tx, r.instrument_id) = (h.tx, h.instrument_id)))
"""
# A plan is made by a mark that is no older than a mark may be.
MARK_AGE = timedelta(seconds=10)
# And some moments before the claim; others' marks may have moved by then.
PLANNED_BEFORE = timedelta(seconds=2)


@dataclass(frozen=True)
class Purse:
    """What a user had when the ledger wrote a draw down, before anything of that booking."""

    available: Decimal
    holds: Mapping[str, Mapping[str, str]]

    def held(self, instrument_id: str, kind: str) -> Decimal:
        """What is held for `orders`, or for the `position`."""
        return Decimal(self.holds[instrument_id][kind])

    def is_cross(self, instrument_id: str) -> bool:
        """The margin mode."""
        return self.holds[instrument_id]["mode"] == "CROSS"

    @property
    def total(self) -> Decimal:
        """All money of the user."""
        return self.available + sum((self.held(n, "orders") + self.held(n, "position") for n in self.holds), ZERO)


async def broken_draws(conn: Connection, after_id: int) -> tuple[list[Finding], int]:
    """Draws since `after_id` that nothing justifies, and the last id looked at."""
    found: list[Finding] = []
    claims: defaultdict[tuple[int, int], list[asyncpg.Record]] = defaultdict(list)
    for draw in await conn.fetch(_DRAWS, after_id):
        after_id = draw["id"]
        if draw["reference_type"] == "FUNDING_FEE":
            found += await _judge_funding(conn, draw)
            continue
        key = draw["user_id"], draw["instrument_id"]
        fills = await conn.fetch(_FILLS, *key, draw["after_seq"], draw["to_seq"])
        if not any(fill["cause"] == "LIQUIDATION" for fill in fills):
            found.append(await _judge_order(conn, draw, fills))
        elif draw["closing"] is None or draw["liquidated_as"] is None:
            found.append(Finding("5", "a draw of a liquidation does not name it", _name(draw)))
        else:
            claims[draw["liquidation_id"], draw["round"]].append(draw)
    for draws in claims.values():
        found += await _judge_liquidation(conn, draws)
    return found, after_id


def _name(draw: asyncpg.Record) -> str:
    return f"{draw['amount']:f} for user {draw['user_id']} {draw['instrument_id']} in {draw['reference_id']}"


def _purse(draw: asyncpg.Record) -> Purse:
    return Purse(draw["available"], json.loads(draw["holds"]))


async def _judge_funding(conn: Connection, draw: asyncpg.Record) -> list[Finding]:
    owed = await conn.fetchval(_PAID, draw["reference_id"], draw["user_id"])
    had = _purse(draw).total
    if draw["amount"] <= owed - had:
        return []
    return [
        Finding("1", "funding drew on the fund while its payer had money", f"{_name(draw)}: owed {owed:f}, had {had:f}")
    ]


async def _judge_order(conn: Connection, draw: asyncpg.Record, fills: Sequence[asyncpg.Record]) -> Finding:
    """A fill that was no liquidation drew on the fund: never right. The kind tells in which state its user was."""
    if not fills:
        return Finding("1", "the fund paid for no fill at all", _name(draw))
    name, purse = draw["instrument_id"], _purse(draw)
    mark = await mark_of(conn, name, fills[0]["seq"])
    stands = await _stood(conn, draw, purse, {name: [mark]}, draw["at"])
    mode = "cross" if purse.is_cross(name) else "isolated"
    state = "was due" if any(stands.due()) else "was sound"
    causes = "/".join(sorted({fill["cause"] for fill in fills}))
    traded = ", ".join(f"{f['side']} {f['quantity']:f} at {f['price']:f}" for f in fills)
    kind = f"an order ({causes}) of a user whose {mode} position {state} drew on the fund"
    return Finding("1", kind, f"{_name(draw)}: {traded}; mark {mark:f}; {stands}")


async def _judge_liquidation(conn: Connection, draws: Sequence[asyncpg.Record]) -> list[Finding]:
    first, drawn = draws[0], sum((draw["amount"] for draw in draws), ZERO)
    name, purse, claimed_at = first["instrument_id"], _purse(first), first["claimed_at"]
    found = []
    if first["claimed_mark"] not in await _marks(conn, name, claimed_at - MARK_AGE, claimed_at):
        found.append(
            Finding("5", "a claim names a mark that there was not", f"{_name(first)}: {first['claimed_mark']:f}")
        )
    is_cross = first["liquidated_as"] == "CROSS"
    stands = await _stood(conn, first, purse, {name: [first["claimed_mark"]]}, claimed_at)
    held = next(h for h in stands.cross + stands.isolated if h.instrument_id == name)
    share = min(Decimal(1), abs(first["closing"] / held.quantity))
    worth = stands.pool if is_cross else (held.margin + held.pnl) * share
    if drawn <= max(ZERO, -worth) + ROUNDING:
        return found
    elsewhere = (
        sum(
            (
                purse.held(n, "orders") + purse.held(n, "position")
                for n in purse.holds
                if n != name and purse.is_cross(n)
            ),
            ZERO,
        )
        if is_cross
        else ZERO
    )
    kind = (
        f"{'a cross' if is_cross else 'an isolated'} liquidation drew more than what was worth below zero at its mark"
    )
    if elsewhere:
        kind += ", with margin held for other cross positions"
    if await conn.fetchval(_FUNDED, first["user_id"], name, claimed_at, draws[-1]["at"]):
        kind += ", and funding took of the margin under way"
    detail = f"{drawn:f} of {_name(first)}, claim {first['liquidation_id']}/{first['round']}: worth {worth:f}"
    return [
        *found,
        Finding("1", kind, f"{detail} at mark {first['claimed_mark']:f}, elsewhere {elsewhere:f}; {stands}"),
    ]


async def _stood(
    conn: Connection, draw: asyncpg.Record, purse: Purse, marks: dict[str, list[Decimal]], planned_at: datetime
) -> Stands:
    """How the user stood before a draw; instruments without `marks` are valued at their worst since the plan."""
    tiers = await read_tiers(conn)
    stands = Stands(purse.total)
    for name, hold in purse.holds.items():
        seq = draw["after_seq"] if name == draw["instrument_id"] else int(hold["seq"])
        quantity, entry = await position_at(conn, draw["user_id"], name, seq)
        if not purse.is_cross(name):
            stands.apart += purse.held(name, "orders") + purse.held(name, "position")
        if not quantity:
            continue
        known = marks.get(name) or await _marks(conn, name, planned_at - PLANNED_BEFORE, draw["at"])
        mark = min(known) if quantity > 0 else max(known)
        held = Held(name, quantity, entry, purse.held(name, "position"), mark, tiers[name])
        (stands.cross if purse.is_cross(name) else stands.isolated).append(held)
    return stands


async def _marks(conn: Connection, instrument_id: str, since: datetime, until: datetime) -> list[Decimal]:
    return [row[0] for row in await conn.fetch(_MARKS, instrument_id, since, until)]
