"""A crash on the real processes: 200 leveraged accounts, the mark price falls by 30 %, worker and engine are killed.

The bids are too few on purpose, so that the book, the fund and deleveraging all have their part: bids above the
bankruptcy price cost nobody anything, bids below it cost the fund, which pays for what the mark fell below it, and
whoever still has equity at the mark when no bid is left is deleveraged at the bankruptcy price.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

import asyncpg
import pytest
from temporalio.client import Client

from domain.contracts.liquidation import LIQUIDATION
from tests.exchange import BTC, NAMESPACE, Exchange, Trader
from tests.waiting import until

Item = TypeVar("Item")
Result = TypeVar("Result")
D = Decimal
SETTINGS = {"insurance_fund_seed": 17_000}
EACH = D("0.1")
BOLD, CALM = 60, 140
# Bankrupt at 57,000 and 54,000, without the fees.
BANKRUPTCY_PRICE = {20: D(57_000), 10: D(54_000)}
# The mark at which the bold are liquidated: it has jumped over their bankruptcy price.
JUMPED_TO = "56500"
# Bids: for half of the bold above their bankruptcy price, for the others between it and that mark; for the calm far
# below theirs.
BIDS = ((D(57_100), BOLD // 2), (D(56_600), BOLD // 2), (D(51_600), CALM))
# The higher the leverage of the same profit, the earlier one is deleveraged.
SHORTS, SHORT_LEVERAGES = (D(4), D(12), D(4)), (20, 10, 5)
AT_ONCE = 12


@dataclass(frozen=True)
class Market:
    """Who trades: the longs by leverage, the shorts from the one to be deleveraged first on, and who bids."""

    longs: dict[int, list[Trader]]
    shorts: list[Trader]
    bidder: Trader

    @property
    def leverage_of(self) -> dict[int, int]:
        """Of every long, by user id."""
        return {int(long.user_id): leverage for leverage, longs in self.longs.items() for long in longs}


@dataclass(frozen=True)
class Absorbed:
    """How one long's position was closed: seqs of its fills with the book, and with who was deleveraged; the price of
    the worst of the former, and what the fund paid."""

    book: list[int]
    deleveraged: list[int]
    worst: Decimal | None
    insurance: Decimal


@pytest.mark.timeout(170)
async def test_a_crash_with_worker_and_engine_killed_is_absorbed_by_book_then_fund_then_deleveraging(
    exchange: Exchange, admin: Trader
) -> None:
    market = await open_positions(exchange, admin)

    for price in ("58500", JUMPED_TO):
        await fall_to(exchange, admin, price)
    await until_closed(exchange, market.longs[20])
    for price in ("55500", "54200"):
        await fall_to(exchange, admin, price)
    await until(lambda: some_are_closed(exchange, market.longs[10]), 30, "liquidations to be in full swing")
    for victim in ("engine", "worker"):
        exchange.kill(victim)
    assert await open_liquidations(exchange) > 0
    await asyncio.sleep(1)
    exchange.start("worker", "engine")
    await until_closed(exchange, market.longs[10])
    for price in ("50000", "46000", "42000"):
        await fall_to(exchange, admin, price)

    await assert_nothing_is_stuck(exchange)
    await exchange.audit(admin)
    await assert_absorbed_in_order(exchange, market)
    await assert_nobody_lost_more_than_the_margin(exchange, market)
    # All of the bidder's money stands behind what they bought: more than it could lose.
    bought = await market.bidder.position()
    assert bought["liquidationPrice"] is None
    assert D(bought["marginRatio"]) > 1
    fund = await admin.get("/api/admin/insurance-fund")
    assert fund["funds"][0]["openClaims"] == 0


async def open_positions(exchange: Exchange, admin: Trader) -> Market:
    """200 longs bought from three shorts at 60,000, and the bids below."""

    bidder, *others = await exchange.crowd(1 + len(SHORTS) + BOLD + CALM)
    shorts, bold, calm = others[: len(SHORTS)], others[len(SHORTS) :][:BOLD], others[len(SHORTS) + BOLD :]
    await in_parallel(lambda rich: exchange.deposit(admin, rich, "1000000"), [bidder, *shorts])
    await in_parallel(lambda long: exchange.deposit(admin, long, "1000"), bold + calm)
    answer = await bidder.client.put(f"/api/positions/{BTC}/margin-mode", json={"marginMode": "CROSS"})
    assert answer.status_code == 200, answer.text
    leverages = [(bidder, 2), *zip(shorts, SHORT_LEVERAGES, strict=True), *((long, 20) for long in bold)]
    await in_parallel(lambda pair: set_leverage(*pair), leverages)
    for short, quantity in zip(shorts, SHORTS, strict=True):
        await short.place("SELL", str(quantity), "60000")
    opened = await in_parallel(lambda long: long.place("BUY", str(EACH), "60000"), bold + calm)
    assert {order["status"] for order in opened} == {"FILLED"}
    for price, accounts in BIDS:
        await bidder.place("BUY", str(EACH * accounts), str(price))
    await exchange.until_settled(20)
    return Market({20: bold, 10: calm}, shorts, bidder)


async def set_leverage(trader: Trader, leverage: int) -> None:
    """Of BTC, in place of 10."""
    answer = await trader.client.put(f"/api/positions/{BTC}/leverage", json={"leverage": leverage})
    assert answer.status_code == 200, answer.text


async def in_parallel(act: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> list[Result]:
    """A few at a time, so that no request waits for long."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(item: Item) -> Result:
        async with gate:
            return await act(item)

    return await asyncio.gather(*map(one, items))


async def fall_to(exchange: Exchange, admin: Trader, price: str) -> None:
    """The simulated index is held at `price`; returns when the mark price has followed."""
    answer = await admin.client.post(f"/api/admin/mark-price/{BTC}", json={"price": price})
    assert answer.status_code == 200, answer.text

    async def has_followed() -> bool:
        newest = await exchange.pool.fetchval(
            "SELECT mark_price FROM market.mark_prices WHERE instrument_id = $1 ORDER BY calculated_at DESC LIMIT 1",
            BTC,
        )
        return bool(newest == D(price))

    await until(has_followed, 20, f"mark {price}")


async def open_longs(exchange: Exchange, longs: Sequence[Trader]) -> int:
    """How many of them still hold something."""
    ids = [int(long.user_id) for long in longs]
    found: int = await exchange.pool.fetchval(
        "SELECT count(*) FROM positions.positions WHERE user_id = ANY($1) AND signed_quantity <> 0", ids
    )
    return found


async def some_are_closed(exchange: Exchange, longs: Sequence[Trader]) -> bool:
    """A tenth is."""
    return await open_longs(exchange, longs) <= len(longs) * 9 // 10


async def open_liquidations(exchange: Exchange) -> int:
    """Rows that are not at an end."""
    found: int = await exchange.pool.fetchval(
        "SELECT count(*) FROM risk.liquidation_queue WHERE status IN ('PENDING', 'PROCESSING')"
    )
    return found


async def until_closed(exchange: Exchange, longs: Sequence[Trader]) -> None:
    """Returns when none of them holds anything and no liquidation is open."""

    async def closed() -> bool:
        return not await open_longs(exchange, longs) and not await open_liquidations(exchange)

    await until(closed, 100, "every ruined position to be closed")


async def assert_nothing_is_stuck(exchange: Exchange) -> None:
    """No row, no position and no workflow of a liquidation is open, and no order is on its way."""
    await exchange.until_settled(30)
    assert await open_liquidations(exchange) == 0
    assert not await exchange.pool.fetchval(
        "SELECT count(*) FROM positions.positions WHERE status = 'LIQUIDATION_PENDING'"
    )
    client = await Client.connect(exchange.settings.require_temporal_address(), namespace=NAMESPACE)

    async def none_runs() -> bool:
        running = await client.count_workflows(f"WorkflowType = '{LIQUIDATION}' AND ExecutionStatus = 'Running'")
        return running.count == 0

    # What Temporal lists is a moment behind.
    await until(none_runs, 10, "every LiquidationWorkflow to end")
    others = await client.count_workflows(
        f"WorkflowType = '{LIQUIDATION}' AND ExecutionStatus IN ('Failed', 'TimedOut', 'Terminated', 'Canceled')"
    )
    assert others.count == 0
    assert all(exchange.is_running(name) for name in ("engine", "worker", "market", "api"))


async def assert_absorbed_in_order(exchange: Exchange, market: Market) -> None:
    """Over all positions and for each one: first the book, then the book with the fund's money, then others' profit."""
    absorbed = await read_absorbed(exchange)
    assert set(absorbed) == set(market.leverage_of)
    by_book = [a for a in absorbed.values() if a.book and not a.insurance and not a.deleveraged]
    by_fund = [a for a in absorbed.values() if a.book and a.insurance and not a.deleveraged]
    by_others = {user: a for user, a in absorbed.items() if a.deleveraged}
    assert min(len(by_book), len(by_fund), len(by_others)) >= BOLD // 4
    assert len(by_book) + len(by_fund) + len(by_others) == BOLD + CALM
    assert min(a.book[0] for a in by_book) < min(a.book[0] for a in by_fund)
    assert min(a.book[0] for a in by_fund) < min(a.deleveraged[0] for a in by_others.values())

    for user, a in absorbed.items():
        # The fund pays where a bid below the bankruptcy price was taken.
        bankrupt_at = BANKRUPTCY_PRICE[market.leverage_of[user]]
        assert (a.insurance > 1) == (a.worst is not None and a.worst < bankrupt_at), (user, a)
    # Who is deleveraged had an order with the engine before, which went as far as margin and the fund's claim allowed:
    # not down to the next bid.
    best_bid = BIDS[-1][0]
    orders = await read_first_orders(exchange, list(by_others))
    assert set(orders) == set(by_others)
    for user, order in orders.items():
        assert order["seq"] < by_others[user].deleveraged[0], user
        assert order["granted"] is not None, user
        assert order["bound_price"] > best_bid, user
    # The first in the queue is closed altogether before the second, and the third is left alone.
    deleveraged = await exchange.pool.fetch(
        "SELECT counterparty_user_id AS user_id, sum(quantity) AS quantity, min(seq) AS first, max(seq) AS last"
        " FROM matching.deleveragings GROUP BY 1 ORDER BY first"
    )
    assert [row["user_id"] for row in deleveraged] == [
        int(short.user_id) for short in market.shorts[: len(deleveraged)]
    ]
    assert all(row["quantity"] == quantity for row, quantity in zip(deleveraged[:-1], SHORTS, strict=False))
    assert len(deleveraged) < len(SHORTS)


async def read_absorbed(exchange: Exchange) -> dict[int, Absorbed]:
    """By user: a liquidation's fills are those of an order, or without one those with whom it deleverages."""
    rows = await exchange.pool.fetch(
        "SELECT e.user_id,"
        " coalesce(array_agg(e.seq ORDER BY e.seq) FILTER (WHERE e.order_id IS NOT NULL), '{}') AS book,"
        " coalesce(array_agg(e.seq ORDER BY e.seq) FILTER (WHERE e.order_id IS NULL), '{}') AS deleveraged,"
        " min(e.price) FILTER (WHERE e.order_id IS NOT NULL) AS worst, coalesce(max(l.paid), 0) AS insurance"
        " FROM positions.position_events e LEFT JOIN ("
        "   SELECT user_id, sum(delta_available + delta_reserved) AS paid FROM ledger.ledger_entries"
        "   WHERE entry_type = 'INSURANCE_FUND' AND user_id IS NOT NULL GROUP BY 1) l USING (user_id)"
        " WHERE e.cause = 'LIQUIDATION' GROUP BY e.user_id"
    )
    return {row["user_id"]: Absorbed(*list(row)[1:]) for row in rows}


async def read_first_orders(exchange: Exchange, users: Sequence[int]) -> dict[int, asyncpg.Record]:
    """The first liquidation order of each: its bound, the seq of its first event, and what the fund had granted."""
    rows = await exchange.pool.fetch(
        "SELECT DISTINCT ON (o.user_id) o.user_id, o.bound_price, e.seq, c.amount AS granted FROM orders.orders o"
        " JOIN (SELECT (payload::json ->> 'order_id')::bigint AS order_id, min(seq) AS seq FROM matching.events"
        "   GROUP BY 1) e USING (order_id)"
        " JOIN risk.liquidation_queue q ON q.user_id = o.user_id"
        " LEFT JOIN ledger.insurance_claims c ON c.liquidation_id = q.liquidation_id AND c.round = 1"
        " WHERE o.is_liquidation AND o.user_id = ANY($1) ORDER BY o.user_id, o.order_id",
        users,
    )
    return {row["user_id"]: row for row in rows}


async def assert_nobody_lost_more_than_the_margin(exchange: Exchange, market: Market) -> None:
    """All that is left to the longs is what did not stand behind their positions."""
    rows = await exchange.pool.fetch("SELECT user_id, available, reserved FROM ledger.ledger_balances")
    left = {row["user_id"]: (row["available"], row["reserved"]) for row in rows}
    for user, leverage in market.leverage_of.items():
        opening = EACH * 60_000
        assert left[user] == (1_000 - opening / leverage - opening * D("0.0005"), 0), user
