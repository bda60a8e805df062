"""GET /api/reports/…: sums by day that are known, who may see whose, page by page."""

import itertools
import random
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from domain.events import AutoDeleveraged, BusinessEvent, LedgerEntryCreated, LiquidationTriggered, TradeExecuted
from reporting.counting import Entry, count
from storage.db import Pool
from tests.integration.identity_app import Exchange, bearer, running_exchange, settings_without_workflows
from tests.integration.ledger_world import BTC, ETH
from tests.integration.reporting_world import read_model

REPORTS = ("pnl", "volume", "fees", "liquidations", "open-interest")
DAYS = {"from": "2026-03-01", "to": "2026-03-04"}
NAME = BTC.instrument_id

Headers = dict[str, str]


@pytest.fixture
async def exchange(database_url: str, redis_url: str, temporal_address: str, tmp_path: Path) -> AsyncIterator[Exchange]:
    async with running_exchange(settings_without_workflows(database_url, redis_url, temporal_address, tmp_path)) as app:
        yield app


@pytest.fixture
async def people(exchange: Exchange, pool: Pool) -> tuple[tuple[int, Headers], tuple[int, Headers], Headers]:
    """Two users with their headers, and an operator's headers."""
    ids = {name: await exchange.add_user(f"{name}@example.com") for name in ("alice", "bob", "root")}
    await pool.execute("UPDATE auth.auth_credentials SET roles = '{user,admin}' WHERE user_id = $1", ids["root"])
    headers = {name: bearer((await exchange.login(f"{name}@example.com"))["accessToken"]) for name in ids}
    return (ids["alice"], headers["alice"]), (ids["bob"], headers["bob"]), headers["root"]


def entry(number: int, event: BusinessEvent, day: int, time: str = "12:00:00.000") -> Entry:
    at = f"2026-03-{day:02d}T{time}Z"
    return Entry(event.topic, f"1-{number}", number, 0, at, "1", msgspec.json.encode(event))


def trade(
    day: int, buyer: int, seller: int, price: str, quantity: str, taker_side: str, time: str = "12:00:00.000"
) -> TradeExecuted:
    parties = (str(buyer), str(seller), taker_side)
    return TradeExecuted(1, NAME, 1, 2, price, quantity, *parties, "0.2", "0.5", "0.7", f"2026-03-{day:02d}T{time}Z")


def booked(
    user_id: int, kind: str, amount: str, instrument_id: str | None = NAME, reserved: str = "0"
) -> BusinessEvent:
    return LedgerEntryCreated(str(user_id), instrument_id, "USDT", amount, reserved, "0", kind, "TRADE", "1")


def story(alice: int, bob: int) -> list[Entry]:
    """Four days in March, of which the third is quiet."""
    forced = AutoDeleveraged(str(bob), NAME, "0.5", "90", "BUY", 9, str(alice), "2026-03-04T01:00:00.000Z")
    happened = [
        # The last and the first millisecond of a day.
        (trade(1, alice, bob, "100", "2", "BUY", "23:59:59.999"), 2),
        (trade(2, bob, alice, "110", "0.5", "SELL", "00:00:00.000"), 2),
        (trade(2, alice, 77, "105.5", "1", "SELL"), 2),
        (forced, 4),
        (booked(alice, "FEE", "-0.5"), 1),
        (booked(alice, "FEE", "-0.5"), 2),
        (booked(alice, "REALIZED_PNL", "5"), 2),
        (booked(alice, "FUNDING", "-1", reserved="-2"), 2),
        (booked(alice, "LIQUIDATION_FEE", "-4"), 4),
        (booked(alice, "LIQUIDATION_SURPLUS", "-1"), 4),
        (booked(alice, "INSURANCE_FUND", "3"), 4),
        (booked(alice, "MARGIN", "-7", reserved="7"), 4),
        (booked(alice, "DEPOSIT", "1000", None), 4),
        (booked(alice, "FUNDING", "0.25", ETH.instrument_id), 2),
        (booked(bob, "REALIZED_PNL", "-5"), 2),
        (LiquidationTriggered("31", str(alice), NAME, "MARGIN", 501), 2),
        (LiquidationTriggered("32", str(bob), NAME, "MARGIN", 502), 4),
        (LiquidationTriggered("31", str(alice), NAME, "MARGIN", 503), 4),
    ]
    return [entry(number, event, day) for number, (event, day) in enumerate(happened)]


async def tell(pool: Pool, entries: list[Entry]) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await count(conn, entries)


async def ask(exchange: Exchange, headers: Headers, report: str, **query: Any) -> dict[str, Any]:
    answer = await exchange.client.get(f"/api/reports/{report}", headers=headers, params=DAYS | query)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


async def items(exchange: Exchange, headers: Headers, report: str, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await ask(exchange, headers, report, **query))["items"]
    return found


async def test_users_see_their_own_days(exchange: Exchange, pool: Pool, people: Any) -> None:
    (alice, hers), (bob, his), _ = people
    await tell(pool, story(alice, bob))
    pnl = await items(exchange, hers, "pnl")
    assert [(row["day"], row["instrumentId"], row["net"]) for row in pnl] == [
        ("2026-03-04", NAME, "-2"),
        ("2026-03-02", NAME, "1.5"),
        ("2026-03-02", ETH.instrument_id, "0.25"),
        ("2026-03-01", NAME, "-0.5"),
    ]
    assert pnl[0] == {
        "day": "2026-03-04",
        "instrumentId": NAME,
        "asset": "USDT",
        "realizedPnl": "0",
        "fees": "0",
        "funding": "0",
        "liquidation": "-5",
        "insurance": "3",
        "net": "-2",
    }
    assert (pnl[1]["realizedPnl"], pnl[1]["fees"], pnl[1]["funding"]) == ("5", "-0.5", "-3")
    assert await items(exchange, hers, "volume", instrumentId=NAME, to="2026-03-02") == [
        {
            "day": "2026-03-02",
            "instrumentId": NAME,
            "makerVolume": "105.5",
            "takerVolume": "55",
            "volume": "160.5",
            "makerTrades": 1,
            "takerTrades": 1,
        },
        {
            "day": "2026-03-01",
            "instrumentId": NAME,
            "makerVolume": "0",
            "takerVolume": "200",
            "volume": "200",
            "makerTrades": 0,
            "takerTrades": 1,
        },
    ]
    fees = await items(exchange, his, "fees", to="2026-03-02")
    assert [(row["makerFees"], row["takerFees"], row["fees"]) for row in fees] == [("0.2", "0", "0.2")] * 2
    assert [row["liquidationId"] for row in await items(exchange, hers, "liquidations")] == [503, 501]
    [his_liquidation] = await items(exchange, his, "liquidations")
    assert his_liquidation == {
        "liquidationId": 502,
        "userId": str(bob),
        "instrumentId": NAME,
        "positionId": "32",
        "reason": "MARGIN",
        "triggeredAt": "2026-03-04T12:00:00.000Z",
    }


async def test_operators_see_anybody_and_all_together(exchange: Exchange, pool: Pool, people: Any) -> None:
    (alice, hers), (bob, _), root = people
    await tell(pool, story(alice, bob))
    for report in REPORTS[:-1]:
        assert await items(exchange, root, report, userId=alice) == await items(exchange, hers, report)
    second = (await items(exchange, root, "volume", **{"from": "2026-03-02", "to": "2026-03-02"}))[0]
    assert (second["makerVolume"], second["takerVolume"], second["volume"]) == ("160.5", "160.5", "321")
    assert [row["net"] for row in await items(exchange, root, "pnl", instrumentId=NAME)] == ["-2", "-3.5", "-0.5"]
    assert [row["userId"] for row in await items(exchange, root, "liquidations")] == [str(alice), str(bob), str(alice)]


async def test_nobody_else_sees_them(exchange: Exchange, pool: Pool, people: Any) -> None:
    (alice, _), (bob, his), _ = people
    await tell(pool, story(alice, bob))
    for report in REPORTS:
        assert (await exchange.client.get(f"/api/reports/{report}")).status_code == 401
    for report in REPORTS[:-1]:
        answer = await exchange.client.get(f"/api/reports/{report}", headers=his, params={"userId": str(alice)})
        assert (answer.status_code, answer.json()["code"]) == (403, "FORBIDDEN")


async def test_open_interest_stands_until_it_changes(exchange: Exchange, pool: Pool, people: Any) -> None:
    (alice, hers), (bob, _), _ = people
    await tell(pool, story(alice, bob))
    # 2 long; on the second day alice sells a half to bob and buys one of 77; then bob is deleveraged against alice.
    assert [(row["day"], row["openInterest"]) for row in await items(exchange, hers, "open-interest")] == [
        ("2026-03-04", "2"),
        ("2026-03-03", "2.5"),
        ("2026-03-02", "2.5"),
        ("2026-03-01", "2"),
    ]
    assert await items(exchange, hers, "open-interest", **{"from": "2026-02-01", "to": "2026-02-28"}) == []
    today = datetime.now(UTC).date()
    [now] = await items(exchange, hers, "open-interest", **{"from": str(today), "to": str(date(today.year + 1, 1, 1))})
    assert (now["day"], now["openInterest"], now["isClosed"]) == (str(today), "2", False)


async def test_long_reports_come_in_parts(exchange: Exchange, pool: Pool, people: Any) -> None:
    (alice, _), (bob, _), root = people
    await tell(pool, story(alice, bob))
    for report in REPORTS:
        whole = await items(exchange, root, report)
        parts: list[Any] = []
        cursor: dict[str, str] = {}
        while True:
            page = await ask(exchange, root, report, limit=1, **cursor)
            parts += page["items"]
            if page["nextCursor"] is None:
                break
            cursor = {"cursor": page["nextCursor"]}
        assert parts == whole
        assert len(whole) >= 3


async def test_what_makes_no_sense_is_refused(exchange: Exchange, people: Any) -> None:
    (_, hers), _, _ = people
    queries: list[dict[str, str]] = [
        {"from": "2026-03-02", "to": "2026-03-01"},
        {"from": "2025-03-02", "to": "2026-03-03"},
        {"from": "yesterday"},
        {"to": "9999-12-31"},
        {"to": "0001-01-01"},
        {"cursor": "0001-01-01_X"},
        {"to": "2026-02-30"},
        {"limit": "0"},
        {"limit": "501"},
        {"cursor": "x"},
        {"instrumentId": "x" * 65},
    ]
    for report, query in itertools.product(REPORTS, queries):
        answer = await exchange.client.get(f"/api/reports/{report}", headers=hers, params=query)
        assert (answer.status_code, answer.json()["code"]) == (422, "VALIDATION_FAILED"), (report, query, answer.text)


async def test_the_extremes_of_the_calendar_are_no_error(exchange: Exchange, people: Any) -> None:
    (_, hers), _, _ = people
    for to in ("1970-01-01", "9999-12-30"):
        for report in REPORTS:
            answer = await exchange.client.get(f"/api/reports/{report}", headers=hers, params={"to": to})
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("seed", range(5))
async def test_events_count_the_same_in_any_order_and_in_batches_of_any_size(pool: Pool, seed: int) -> None:
    entries, dice = story(1, 2), random.Random(seed)
    await tell(pool, entries)
    expected = await read_model(pool)
    await pool.execute(
        "TRUNCATE reporting.trade_days, reporting.open_interest_days, reporting.pnl_days, reporting.liquidations"
    )
    dice.shuffle(entries)
    while entries:
        size = dice.randint(1, 5)
        await tell(pool, entries[:size])
        entries = entries[size:]
    assert await read_model(pool) == expected
