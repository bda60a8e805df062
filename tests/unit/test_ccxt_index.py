"""The index through ccxt, against exchanges of our own that speak and fail as the real ones do."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from domain.index_price import IndexPrice
from domain.instruments import SHIPPED
from market.ccxt_index import CcxtIndex, read_urls, read_weights
from settings import Settings
from tests.spot_exchanges import Answer, SpotExchanges, document, running_spot_exchanges, status, text

BTC, ETH, SOL = (instrument.instrument_id for instrument in SHIPPED)
WAIT_SECONDS = 15.0


class HastyIndex(CcxtIndex):
    """Without ccxt's own limits (Kraken: a request a second), which make for slow tests."""

    def _open(self, name: str) -> Any:
        exchange = super()._open(name)
        exchange.enableRateLimit = False
        return exchange


@pytest.fixture
async def spot() -> AsyncIterator[SpotExchanges]:
    async with running_spot_exchanges() as exchanges:
        yield exchanges


@asynccontextmanager
async def running_index(spot: SpotExchanges, **more: Any) -> AsyncIterator[CcxtIndex]:
    settings = Settings(
        index_source="ccxt",
        index_urls=spot.urls(),
        **{"index_poll_seconds": 0.05, "index_timeout_seconds": 0.5, "index_stale_seconds": 1.0} | more,
    )
    index = HastyIndex(SHIPPED, settings)
    task = asyncio.create_task(index.run())
    try:
        yield index
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def now_of(index: CcxtIndex, instrument_id: str = BTC) -> IndexPrice:
    return index.read(datetime.now(UTC), {})[instrument_id]


async def eventually(index: CcxtIndex, accept: Callable[[IndexPrice], bool], instrument_id: str = BTC) -> IndexPrice:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            reading = now_of(index, instrument_id)
            if accept(reading):
                return reading
            await asyncio.sleep(0.02)


def uses(*names: str) -> Callable[[IndexPrice], bool]:
    return lambda reading: {used.name for used in reading.used} == set(names)


def drops(**reasons: str) -> Callable[[IndexPrice], bool]:
    return lambda reading: dict(reading.dropped) == reasons


ALL = uses("binance", "coinbase", "kraken")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _told_of(reading: IndexPrice) -> set[str]:
    return {name for name, reason in reading.dropped.items() if reason != "no answer yet"}


async def test_all_three_are_asked_and_weighed_exactly(spot: SpotExchanges) -> None:
    spot["binance"].prices["BTC"] = "60000.12345678"
    spot["coinbase"].prices["BTC"] = "60010.1"
    spot["kraken"].prices["BTC"] = "60020.3"
    async with running_index(spot, index_exchanges="binance:2,coinbase:1,kraken:0.5") as index:
        await index.warm_up()
        reading = await eventually(index, ALL)
        for instrument_id, price in ((ETH, 3000), (SOL, 150)):
            assert (await eventually(index, ALL, instrument_id)).price == price
    weighed = (2 * Decimal("60000.12345678") + Decimal("60010.1") + Decimal("0.5") * Decimal("60020.3")) / Decimal(
        "3.5"
    )
    assert reading.price == weighed.quantize(Decimal("1e-8"))
    assert reading.dropped == {}
    assert {used.name: used.price for used in reading.used}["binance"] == Decimal("60000.12345678")


async def test_prices_are_never_floats(spot: SpotExchanges) -> None:
    """As a float, the price would end in …785 and be rounded down; whether text or JSON number, it is rounded up."""
    price = "60000.123456785000001"
    spot["kraken"].prices["BTC"] = price
    spot["binance"].answer = text(f'[{{"a":1,"p":{price},"q":1,"f":1,"l":1,"T":{_now_ms()},"m":true}}]')
    async with running_index(spot) as index:
        reading = await eventually(index, ALL)
    exact = Decimal("60000.12345679")
    assert {used.name: used.price for used in reading.used} == {"binance": exact, "coinbase": 60_000, "kraken": exact}


async def test_dollars_stand_in_where_an_exchange_does_not_trade_the_currency_of_settlement(
    spot: SpotExchanges,
) -> None:
    spot["coinbase"].quote = "USD"
    async with running_index(spot) as index:
        await eventually(index, ALL)
    assert "/api/v3/brokerage/market/products/BTC-USD/ticker" in spot["coinbase"].requests


async def test_a_market_that_an_exchange_does_not_have_is_left_out_there_alone(spot: SpotExchanges) -> None:
    del spot["kraken"].prices["SOL"]
    async with running_index(spot) as index:
        await eventually(index, ALL)
        reading = await eventually(index, uses("binance", "coinbase"), SOL)
    assert reading.dropped == {"kraken": "LookupError"}


FAILURES: dict[str, Answer] = {
    "too many requests": status(429, '{"code":-1003,"msg":"Too much request weight used"}'),
    "banned": status(418, '{"code":-1003,"msg":"Way too many requests; IP banned"}'),
    "server error": status(500, "<html>oops</html>"),
    "unavailable": status(503),
    "garbage": text("{not json"),
    "html": text("<html>maintenance</html>"),
    "nothing": text(""),
    "null": text("null"),
    "a number": text("7"),
    "a list": document([1, 2, 3]),
    "a list of lists": document([[["x"]]]),
    "another document": document({"hello": "world"}),
    "no trades": document([]),
    "other trades": document({"trades": [{"price": {}, "size": []}], "error": [], "result": {"XBTUSDT": [{}]}}),
    "kraken's error": document({"error": ["EGeneral:Internal error"]}),
}


@pytest.mark.parametrize("name", ["binance", "coinbase", "kraken"])
async def test_a_failing_exchange_is_dropped_when_its_last_answer_is_stale_and_comes_back(
    spot: SpotExchanges, name: str
) -> None:
    others = {"binance", "coinbase", "kraken"} - {name}
    async with running_index(spot) as index:
        await eventually(index, ALL)
        spot[name].answer = status(500)
        assert name in {used.name for used in now_of(index).used}
        reading = await eventually(index, uses(*others))
        assert reading.price == 60_000
        assert reading.dropped[name] == "ExchangeNotAvailable"
        spot[name].answer = None
        await eventually(index, ALL)


@pytest.mark.parametrize("failure", FAILURES)
async def test_whatever_an_exchange_answers_the_others_go_on(spot: SpotExchanges, failure: str) -> None:
    for name in ("coinbase", "kraken"):
        spot[name].answer = FAILURES[failure]
    async with running_index(spot, index_exchanges="binance:1,coinbase:1,kraken:1") as index:
        reading = await eventually(index, lambda reading: _told_of(reading) == {"coinbase", "kraken"})
        # One left is not enough.
        assert (reading.price, reading.used) == (None, ())
        spot["coinbase"].answer = None
        assert (await eventually(index, uses("binance", "coinbase"))).price == 60_000


@pytest.mark.parametrize("price", ["0", "-60000", "NaN", "Infinity", "1e300", "60000000000000", "", "cheap"])
async def test_an_absurd_price_is_never_used(spot: SpotExchanges, price: str) -> None:
    async with running_index(spot) as index:
        await eventually(index, ALL)
        spot["binance"].prices["BTC"] = price
        seen = set()

        def is_dropped(reading: IndexPrice) -> bool:
            seen.add(reading.price)
            return "binance" in reading.dropped

        await eventually(index, is_dropped)
        assert seen == {Decimal(60_000)}


async def test_one_price_far_off_moves_the_index_by_its_share_of_two_percent(spot: SpotExchanges) -> None:
    spot["kraken"].prices["BTC"] = "90000"
    async with running_index(spot) as index:
        assert (await eventually(index, ALL)).price == 60_400


async def test_trades_of_long_ago_are_no_price_of_now(spot: SpotExchanges) -> None:
    spot["coinbase"].age_seconds = 3600
    spot["binance"].age_seconds = -3600
    async with running_index(spot) as index:
        await eventually(index, drops(binance="no recent trade", coinbase="no recent trade"))


async def test_an_exchange_that_hangs_delays_neither_the_others_nor_a_reading(spot: SpotExchanges) -> None:
    async with running_index(spot, index_timeout_seconds=0.3) as index:
        await eventually(index, ALL)
        spot["kraken"].hangs = True
        before = len(spot["binance"].requests)
        started = time.perf_counter()
        await asyncio.sleep(2.0)
        assert len(spot["binance"].requests) - before > 10
        for _ in range(100):
            now_of(index)
        assert time.perf_counter() - started < 10
        reading = await eventually(index, uses("binance", "coinbase"))
    assert reading.dropped == {"kraken": "RequestTimeout"}


async def test_an_exchange_that_fails_is_asked_less_and_less_often(spot: SpotExchanges) -> None:
    spot["coinbase"].answer = status(429)
    async with running_index(spot) as index:
        await eventually(index, uses("binance", "kraken"))
        await asyncio.sleep(1.5)
    assert len(spot["binance"].requests) > 4 * len(spot["coinbase"].requests)


async def test_an_exchange_whose_markets_cannot_be_listed_joins_once_they_can(spot: SpotExchanges) -> None:
    spot["coinbase"].markets_answer = status(502)
    spot["kraken"].markets_answer = text("{broken")
    async with running_index(spot) as index:
        await eventually(index, drops(coinbase="ExchangeNotAvailable", kraken="LookupError"))
        spot["coinbase"].markets_answer = spot["kraken"].markets_answer = None
        await eventually(index, ALL)


async def test_warming_up_ends_without_any_answer(spot: SpotExchanges) -> None:
    for name in spot.by_name:
        spot[name].hangs = True
    async with running_index(spot, index_stale_seconds=0.3) as index:
        async with asyncio.timeout(10):
            await index.warm_up()
        assert now_of(index).price is None


async def test_failing_and_recovering_are_logged_once_each(
    spot: SpotExchanges, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "market.ccxt_index")
    async with running_index(spot) as index:
        await eventually(index, ALL)
        spot["binance"].answer = status(500, "x" * 10_000)
        await asyncio.sleep(1.0)
        spot["binance"].answer = None
        await eventually(index, lambda _: f"binance answers again for {BTC}" in caplog.messages)
    lines = [record.getMessage() for record in caplog.records if BTC in record.getMessage()]
    assert [line[:22] for line in lines] == ["binance fails for BTC-", "binance answers again "]
    assert max(map(len, lines)) < 400


def test_weights_are_read_from_text() -> None:
    assert read_weights("binance:2, kraken:0.5,okx") == {"binance": 2, "kraken": Decimal("0.5"), "okx": 1}


@pytest.mark.parametrize("wrong", ["", "binance:1", "a:1,b:0", "a:1,b:-1", "a:1,b:NaN", "a:1,b:x", "a:1,a:2,b:1"])
def test_wrong_weights_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="EXCHANGE_INDEX_EXCHANGES"):
        read_weights(wrong)


@pytest.mark.parametrize("wrong", ["binance", "other=http://x", "binance=ftp://x", "binance=http://", "=http://x"])
def test_wrong_addresses_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="EXCHANGE_INDEX_URLS"):
        read_urls(wrong, ["binance"])


@pytest.mark.parametrize("unknown", ["nowhere", "base.exchange", "__init__", "Binance"])
def test_an_exchange_that_ccxt_does_not_know_is_refused(unknown: str) -> None:
    with pytest.raises(ValueError, match="ccxt knows no exchange"):
        CcxtIndex(SHIPPED, Settings(index_exchanges=f"binance,{unknown}"))
