"""The observer's figures are those of the tables, and what must not stay so is alerted once."""

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.core import Metric
from redis.asyncio import Redis

from domain.clock import iso
from monitors.observer import SETTLEMENT_SECONDS_MAX, Watch, observe
from storage.db import Pool
from storage.market_keys import mark_key

BTC = "BTC-USDT-PERP"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def value(figures: list[Metric], name: str, *labels: str) -> float:
    """The one sample of this name and these label values."""
    found = [
        sample.value
        for metric in figures
        for sample in metric.samples
        if sample.name == name and tuple(sample.labels.values()) == labels
    ]
    assert len(found) == 1, f"Expected one {name} {labels}, was {found}"
    return found[0]


async def look(pool: Pool, redis: Redis, watch: Watch | None = None, now: datetime = NOW) -> list[Metric]:
    async with pool.acquire() as conn:
        return await observe(conn, redis, watch or Watch(), now)


def alerts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "alerts"]


async def test_an_exchange_at_rest_is_behind_with_nothing(pool: Pool, redis: Redis) -> None:
    figures = await look(pool, redis)
    assert value(figures, "exchange_engine_lag_commands", BTC) == 0
    assert value(figures, "exchange_settlement_lag_events", BTC) == 0
    assert value(figures, "exchange_engine_owned", BTC) == 0
    assert value(figures, "exchange_outbox_messages") == 0
    assert value(figures, "exchange_open_sagas", "PLACE", "0-5s") == 0
    assert value(figures, "exchange_liquidations_open", "PENDING") == 0
    assert value(figures, "exchange_registrations_open", "FAILED") == 0


async def test_what_waits_is_counted_by_kind_and_age(pool: Pool, redis: Redis) -> None:
    await pool.execute(
        "INSERT INTO orders.sagas (saga_id, workflow_id, kind, order_ids, created_at, done) VALUES"
        " ('a', 'a', 'PLACE', '{1}', now() - interval '2 minutes', FALSE),"
        " ('b', 'b', 'PLACE', '{2}', now(), FALSE), ('c', 'c', 'CANCEL', '{3}', now() - interval '1 hour', TRUE)"
    )
    await pool.execute(
        "INSERT INTO outbox.messages (topic, name, payload, created_at)"
        " VALUES ('t', 'n', '', now() - interval '9 seconds')"
    )
    figures = await look(pool, redis)
    assert value(figures, "exchange_open_sagas", "PLACE", "1-10m") == 1
    assert value(figures, "exchange_open_sagas", "PLACE", "0-5s") == 1
    assert value(figures, "exchange_open_sagas_oldest_seconds", "PLACE") == pytest.approx(120, abs=20)
    assert value(figures, "exchange_open_sagas_oldest_seconds", "CANCEL") == 0
    assert value(figures, "exchange_outbox_oldest_seconds") == pytest.approx(9, abs=5)


async def test_settlement_that_does_not_move_is_alerted_once_and_again_after_it_moved(
    pool: Pool, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    watch, late = Watch(), timedelta(seconds=SETTLEMENT_SECONDS_MAX + 1)
    await pool.execute("UPDATE matching.cursors SET event_seq = 10 WHERE instrument_id = $1", BTC)
    with caplog.at_level(logging.ERROR, logger="alerts"):
        assert value(await look(pool, redis, watch), "exchange_settlement_stalled_seconds", BTC) == 0
        assert alerts(caplog) == []
        for now in (NOW + late, NOW + 2 * late):
            stalled = value(await look(pool, redis, watch, now), "exchange_settlement_stalled_seconds", BTC)
            assert stalled == (now - NOW).total_seconds()
        expected = f"ALERT {BTC}: settlement is 10 events behind and does not move"
        assert alerts(caplog) == [expected]
        await pool.execute(
            "INSERT INTO matching.consumers (instrument_id, consumer, acked_seq) VALUES ($1, 'settlement', 4)", BTC
        )
        figures = await look(pool, redis, watch, NOW + 3 * late)
        assert value(figures, "exchange_settlement_lag_events", BTC) == 6
        assert value(figures, "exchange_settlement_stalled_seconds", BTC) == 0
        await look(pool, redis, watch, NOW + 4 * late)
        assert alerts(caplog) == [expected, f"ALERT {BTC}: settlement is 6 events behind and does not move"]


async def test_the_reports_are_behind_by_what_they_have_not_counted(pool: Pool, redis: Redis) -> None:
    lags = ("exchange_reporting_lag_events", "exchange_reporting_lag_seconds")
    at = int(NOW.timestamp() * 1000)
    for seconds_ago in (90, 60, 30):
        await redis.xadd("matching.trade", {"id": "1-0"}, id=f"{at - seconds_ago * 1000}-0")
    await redis.xadd("ledger.entry", {"id": "1-0"}, id=f"{at - 1000}-0")

    async def shown(topic: str) -> list[float]:
        figures = await look(pool, redis)
        return [value(figures, name, topic) for name in lags]

    # Before the reports are made for the first time, nothing is known.
    assert not [name for metric in await look(pool, redis) if metric.name in lags for name in metric.samples]
    await pool.execute(
        "INSERT INTO reporting.stream_positions (topic, entry_id, entries) VALUES"
        " ('matching.trade', '0-0', 0), ('ledger.entry', $1, 1), ('not.there', '0-0', 0)",
        f"{at - 1000}-0",
    )
    assert await shown("matching.trade") == [3, 90]
    assert await shown("ledger.entry") == [0, 0]
    assert await shown("not.there") == [0, 0]
    await pool.execute(
        "UPDATE reporting.stream_positions SET entry_id = $1, entries = 2 WHERE topic = 'matching.trade'",
        f"{at - 60_000}-0",
    )
    assert await shown("matching.trade") == [1, 30]
    # What was read and is no longer there does not count.
    await redis.xtrim("matching.trade", maxlen=1, approximate=False)
    assert await shown("matching.trade") == [1, 30]


@pytest.mark.parametrize(
    ("age", "is_frozen", "shown", "alerted"), [(1, False, 0, 0), (1, True, 1, 0), (60, False, 1, 1), (60, True, 1, 0)]
)
async def test_a_mark_price_that_is_not_made_is_alerted_unless_the_market_said_that_it_is_frozen(
    pool: Pool,
    redis: Redis,
    caplog: pytest.LogCaptureFixture,
    age: int,
    is_frozen: bool,
    shown: int,
    alerted: int,
) -> None:
    document = {"calculatedAt": iso(NOW - timedelta(seconds=age)), "isFrozen": is_frozen, "markPrice": "1"}
    await redis.set(mark_key(BTC), json.dumps(document))
    with caplog.at_level(logging.ERROR, logger="alerts"):
        figures = await look(pool, redis)
    assert value(figures, "exchange_index_frozen", BTC) == shown
    assert value(figures, "exchange_mark_price_age_seconds", BTC) == age
    assert len(alerts(caplog)) == alerted
