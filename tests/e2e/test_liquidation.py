"""A falling market on the real processes: the risk monitor finds whom it costs everything, and each liquidation ends.

The market is thin on purpose, so that book, insurance fund and deleveraging all have their part.
"""

from decimal import Decimal
from functools import partial

import pytest

from tests.exchange import BTC, Exchange, Trader
from tests.waiting import until

D = Decimal
LONGS = 12
FALL = ("58000", "55500", "54000", "52000", "48000", "42000")


async def hold(admin: Trader, price: str) -> None:
    answer = await admin.client.post(f"/api/admin/mark-price/{BTC}", json={"price": price})
    assert answer.status_code == 200, answer.text


async def until_no_liquidation_is_open(exchange: Exchange, seconds: float) -> None:
    async def none() -> bool:
        return not await exchange.pool.fetchval(
            "SELECT EXISTS (SELECT FROM risk.liquidation_queue WHERE status IN ('PENDING', 'PROCESSING'))"
            " OR EXISTS (SELECT FROM positions.positions WHERE status = 'LIQUIDATION_PENDING')"
        )

    await until(none, seconds, "every liquidation to end")


@pytest.mark.timeout(170)
async def test_a_fall_of_the_market_liquidates_everybody_it_ruins_and_the_books_stay_clean(
    exchange: Exchange, admin: Trader
) -> None:
    winner, buyer = await exchange.trader(admin, "1000000"), await exchange.trader(admin, "1000000")
    longs = [await exchange.trader(admin, "1000") for _ in range(LONGS)]
    await winner.place("SELL", str(D("0.1") * LONGS), "60000")
    for long in longs:
        assert (await long.place("BUY", "0.1", "60000"))["status"] == "FILLED"
    await longs[0].place("BUY", "0.01", "50000")
    # For half of them; the rest is deleveraged, as no bid is within the protection band.
    await buyer.place("BUY", str(D("0.1") * LONGS / 2), "53000")
    await exchange.until_settled()

    for number, price in enumerate(FALL):
        await hold(admin, price)
        if number == 3:
            exchange.kill("worker")
            exchange.start("worker")
        await until(partial(_knows, exchange, price), 20, f"mark {price}")
    await until_all_are_closed(exchange, [long.user_id for long in longs])
    await until_no_liquidation_is_open(exchange, 60)
    await exchange.until_settled(30)
    await exchange.audit(admin)

    page = await admin.get("/api/admin/liquidations", limit=100)
    done = [row for row in page["items"] if row["status"] == "PROCESSED"]
    assert {row["userId"] for row in done} >= {long.user_id for long in longs}
    [position] = await longs[0].get("/api/positions")
    assert (position["status"], position["quantity"]) == ("CLOSED", "0")
    # Nobody lost more than the margin of the position, and fees.
    for long in longs:
        [balance] = await long.get("/api/ledger/balances")
        assert D(balance["available"]) >= D("1000") - 600 - 10
    assert await exchange.pool.fetchval("SELECT count(*) FROM matching.deleveragings") > 0
    fund = await admin.get("/api/admin/insurance-fund")
    assert (fund["funds"][0]["openClaims"], fund["movements"][-1]["amount"]) == (0, "1000000")
    assert exchange.is_running("worker")


async def _knows(exchange: Exchange, price: str) -> bool:
    newest = await exchange.pool.fetchval(
        "SELECT mark_price FROM market.mark_prices WHERE instrument_id = $1 ORDER BY calculated_at DESC LIMIT 1", BTC
    )
    return bool(newest == D(price))


async def until_all_are_closed(exchange: Exchange, user_ids: list[str]) -> None:
    async def closed() -> bool:
        left = await exchange.pool.fetchval(
            "SELECT count(*) FROM positions.positions WHERE user_id = ANY($1) AND signed_quantity <> 0",
            [int(user_id) for user_id in user_ids],
        )
        return bool(left == 0)

    await until(closed, 60, "every ruined position to be closed")
