"""Klines of the real exchange: what was traded is in them, once, also across kill -9 of the market process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

from tests.exchange import BTC, Exchange, Trader
from tests.waiting import until


async def klines(exchange: Exchange, period: str) -> list[dict[str, Any]]:
    answer = await exchange.client.get("/api/market/kline", params={"symbol": BTC, "period": period})
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()
    return items


@asynccontextmanager
async def two_sides(exchange: Exchange, admin: Trader) -> AsyncIterator[tuple[Trader, Trader]]:
    """A maker with an ask that lasts, and a taker."""
    maker, taker = await exchange.trader(admin, "100000"), await exchange.trader(admin, "100000")
    await maker.place("SELL", "1", "60000")
    yield maker, taker
    await exchange.until_settled()


async def test_every_trade_is_counted_once_in_every_period(exchange: Exchange, admin: Trader) -> None:
    quantities = ["0.001", "0.002", "0.004", "0.008", "0.016", "0.032"]
    async with two_sides(exchange, admin) as (_, taker):
        for number, quantity in enumerate(quantities):
            if number == 2:
                exchange.kill("market")
            if number == 4:
                exchange.start("market")
            assert (await taker.place("BUY", quantity, "60000"))["status"] == "FILLED"
            if number == 4:
                exchange.kill("market")
        exchange.start("market")
        total = sum(map(Decimal, quantities))

        async def counted() -> bool:
            return sum(Decimal(kline["volume"]) for kline in await klines(exchange, "1d")) >= total

        await until(counted, 30, "the klines to count every trade")
        for period in ("1m", "5m", "15m", "1h", "4h", "1d"):
            items = await klines(exchange, period)
            assert sum(Decimal(kline["volume"]) for kline in items) == total
            assert sum(kline["tradeCount"] for kline in items) == len(quantities)
            assert [kline["closed"] for kline in items] == sorted((kline["closed"] for kline in items), reverse=True)

    async def predicted() -> bool:
        ticker = (await exchange.client.get(f"/api/market/tickers/{BTC}")).json()
        return ticker["volume24h"] == str(total) and ticker["predictedFundingRate"] is not None

    await until(predicted, 10, "the ticker")
    await exchange.audit(admin)
