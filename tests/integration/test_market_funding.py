"""Funding rates on a real database: each interval's rate fixed once, from its own samples, whoever was away."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from api.routes.market import MarkPriceResponse, TickerResponse
from api.routes.market_history import FundingRateResponse
from domain.clock import iso
from domain.funding_rate import funding_rate
from domain.instruments import SHIPPED
from market.funding import FIXED_MAX, LATE_SAMPLES_SECONDS, FundingRates
from market.instrument_market import InstrumentMarket
from settings import Settings
from storage.db import Pool
from tests.integration.identity_app import Exchange, complete, running_exchange
from tests.integration.market_app import BTC, ETH, SOL, eventually, running_market

D = Decimal
HOUR = timedelta(hours=1)
# A funding time of every interval below.
START = datetime(2026, 3, 1, tzinfo=UTC)
CAP = D("0.00375")


def rates(pool: Pool, interval: timedelta = 8 * HOUR) -> FundingRates:
    return FundingRates(pool, {BTC: InstrumentMarket(SHIPPED[0])}, interval)


async def sample(pool: Pool, at: datetime, premium: str, mark: int = 60_000, instrument_id: str = BTC) -> None:
    """One round of mark prices."""
    await pool.execute(
        "INSERT INTO market.mark_prices VALUES ($1, $2, 60000, $3, 60000, $4, 0, 'simulated')",
        instrument_id,
        at,
        mark,
        D(premium),
    )


async def fixed(pool: Pool, instrument_id: str = BTC) -> list[tuple[Any, ...]]:
    """effective_at, rate, premium average, mark price and samples of every rate, oldest first."""
    rows = await pool.fetch(
        "SELECT effective_at, rate, premium_average, mark_price, samples FROM market.funding_rates"
        " WHERE instrument_id = $1 ORDER BY effective_at",
        instrument_id,
    )
    return [tuple(row) for row in rows]


async def announced(pool: Pool) -> list[dict[str, str]]:
    rows = await pool.fetch("SELECT payload FROM outbox.messages WHERE topic = 'market.funding-rate' ORDER BY 1")
    return [msgspec.json.decode(line) for row in rows for line in row["payload"].split("\n")]


async def test_an_interval_is_fixed_from_its_own_samples_once_it_has_ended(pool: Pool) -> None:
    end = START + 8 * HOUR
    await sample(pool, START, "0.001")
    await sample(pool, START + HOUR, "0.002")
    await sample(pool, end - timedelta(microseconds=1), "0.003", mark=60_100)
    funding = rates(pool)
    # Until there is a sample of the next interval, one of this interval may still be on its way.
    await funding.update(end + timedelta(seconds=1))
    assert await fixed(pool) == []
    await sample(pool, end, "0.009", mark=60_200)
    await funding.update(end + timedelta(seconds=1))
    assert await fixed(pool) == [(end, D("0.0015"), D("0.002"), D(60_200), 3)]
    await funding.update(end + timedelta(seconds=2))
    await rates(pool).update(end + timedelta(seconds=3))
    assert len(await fixed(pool)) == 1
    assert await announced(pool) == [
        {"instrumentId": BTC, "rate": "0.0015", "effectiveAt": iso(end), "source": "simulated"}
    ]


async def test_missed_intervals_are_fixed_for_their_own_time(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    await sample(pool, START + HOUR, "0.001")
    await sample(pool, START + 9 * HOUR, "-0.002", mark=59_000)
    await sample(pool, START + 26 * HOUR, "0.02", mark=61_000)
    await rates(pool).update(START + 32 * HOUR + timedelta(seconds=LATE_SAMPLES_SECONDS))
    assert await fixed(pool) == [
        (START + 8 * HOUR, D("0.0005"), D("0.001"), D(60_000), 1),
        (START + 16 * HOUR, D("-0.0015"), D("-0.002"), D(59_000), 1),
        (START + 24 * HOUR, D("0.0001"), D(0), D(59_000), 0),
        (START + 32 * HOUR, CAP, D("0.02"), D(61_000), 1),
    ]
    assert [event["effectiveAt"] for event in await announced(pool)] == [
        iso(START + hours * HOUR) for hours in (8, 16, 24, 32)
    ]
    assert [record.levelname for record in caplog.records if "from 0 samples" in record.message] == ["WARNING"]


async def test_a_shorter_interval_pays_its_share(pool: Pool) -> None:
    await sample(pool, START + timedelta(minutes=1), "0.001")
    await rates(pool, HOUR).update(START + 2 * HOUR)
    assert [(row[0], row[1]) for row in await fixed(pool)] == [(START + HOUR, D("0.0000625"))]


async def test_before_the_first_sample_nothing_is_fixed(pool: Pool) -> None:
    await rates(pool).update(START + 100 * HOUR)
    assert await fixed(pool) == []


async def test_while_the_index_is_frozen_nothing_is_fixed(pool: Pool) -> None:
    await sample(pool, START + HOUR, "0.001")
    await sample(pool, START + 8 * HOUR, "0.001")
    await pool.execute("INSERT INTO market.index_states VALUES ($1, 'ccxt', $2, $2)", BTC, START + 7 * HOUR)
    await rates(pool).update(START + 17 * HOUR)
    assert await fixed(pool) == []
    await pool.execute("UPDATE market.index_states SET frozen_since = NULL")
    await rates(pool).update(START + 17 * HOUR)
    assert [row[0] for row in await fixed(pool)] == [START + 8 * HOUR, START + 16 * HOUR]


async def test_of_processes_that_fix_at_once_one_announces(pool: Pool) -> None:
    await sample(pool, START + HOUR, "0.001")
    await asyncio.gather(*(rates(pool).update(START + 40 * HOUR) for _ in range(4)))
    assert len(await fixed(pool)) == len(await announced(pool)) == 4


async def test_a_long_absence_is_made_up_in_parts(pool: Pool) -> None:
    await sample(pool, START, "0.001")
    funding = rates(pool, timedelta(seconds=1))
    now = START + timedelta(seconds=FIXED_MAX + 20)
    for expected in (FIXED_MAX, FIXED_MAX + 10, FIXED_MAX + 10):
        await funding.update(now)
        assert len(await fixed(pool)) == expected


async def test_the_predicted_rate_is_that_of_the_samples_so_far_and_survives_a_restart(pool: Pool) -> None:
    market = InstrumentMarket(SHIPPED[0])
    funding = FundingRates(pool, {BTC: market}, 8 * HOUR)
    await sample(pool, START - HOUR, "0.2")
    premiums = ["0.001", "0.0016", "0.0004"]
    for number, premium in enumerate(premiums, 1):
        now = START + number * HOUR
        await sample(pool, now, premium)
        await funding.update(now)
        average = sum(map(D, premiums[:number]), D(0)) / number
        assert market.predicted_rate is not None
        assert D(market.predicted_rate) == funding_rate(average, 8 * HOUR, CAP)
    again = InstrumentMarket(SHIPPED[0])
    await FundingRates(pool, {BTC: again}, 8 * HOUR).update(START + 4 * HOUR)
    assert again.predicted_rate == market.predicted_rate
    await funding.update(START + 8 * HOUR)
    assert market.predicted_rate == "0.0001"


@pytest.fixture
async def exchange(settings: Settings) -> AsyncIterator[Exchange]:
    async with running_exchange(complete(settings, settings.state_dir)) as exchange:
        yield exchange


async def test_the_market_process_fixes_rates_and_shows_what_to_expect(
    pool: Pool, redis: Redis, settings: Settings, exchange: Exchange
) -> None:
    short = settings.model_copy(update={"funding_interval_seconds": 1, "mark_price_interval_seconds": 0.2})
    async with running_market(pool, redis, short):

        async def three_intervals() -> bool:
            return len(await fixed(pool, SOL)) >= 3

        await eventually(three_intervals)
        ticker = TickerResponse.model_validate((await exchange.client.get(f"/api/market/tickers/{SOL}")).json())
        mark = MarkPriceResponse.model_validate((await exchange.client.get(f"/api/market/mark-price/{SOL}")).json())
    assert ticker.funding_rate is not None
    assert ticker.predicted_funding_rate is not None
    assert mark.predicted_funding_rate is not None
    rows = await fixed(pool, SOL)
    assert [row[0].microsecond for row in rows] == [0] * len(rows)
    assert any(row[4] > 1 for row in rows)
    events = [(event["instrumentId"], event["effectiveAt"]) for event in await announced(pool)]
    assert len(events) == len(set(events)) == await pool.fetchval("SELECT count(*) FROM market.funding_rates")


async def test_rates_are_listed_newest_first_page_by_page(pool: Pool, exchange: Exchange) -> None:
    await sample(pool, START + HOUR, "0.001")
    await rates(pool).update(START + 40 * HOUR)
    path = f"/api/market/funding-rates/{BTC}"
    first = (await exchange.client.get(f"{path}?limit=3")).json()
    assert first["items"][2] == {
        "instrumentId": BTC,
        "effectiveAt": iso(START + 16 * HOUR),
        "rate": "0.0001",
        "premiumAverage": "0",
        "markPrice": "60000",
        "samples": 0,
        "source": "simulated",
    }
    rest = (await exchange.client.get(f"{path}?limit=3&cursor={first['nextCursor']}")).json()
    assert rest["nextCursor"] is None
    times = [FundingRateResponse.model_validate(item).effective_at for item in (*first["items"], *rest["items"])]
    assert times == [START + hours * HOUR for hours in (32, 24, 16, 8)]
    assert (await exchange.client.get(f"/api/market/funding-rates/{ETH}")).json()["items"] == []
    for broken, status in (("DOGE", 404), (f"{BTC}?cursor=x", 422), (f"{BTC}?limit=0", 422)):
        response = await exchange.client.get(f"/api/market/funding-rates/{broken}")
        assert response.status_code == status


async def test_when_funding_falls_due_and_what_it_may_come_to_is_known_before_any_rate(pool: Pool) -> None:
    terms = "SELECT instrument_id, interval_seconds, rate_cap FROM market.v_funding_schedules"
    await rates(pool).update(START)
    # 75 % of 1 / 100 less 0.5 %.
    assert [tuple(row) for row in await pool.fetch(terms)] == [(BTC, 8 * 3600, D("0.00375"))]
    # A process that starts with another interval says so.
    await rates(pool, HOUR).update(START)
    assert [tuple(row) for row in await pool.fetch(terms)] == [(BTC, 3600, D("0.00375"))]
