"""The market process: engine events in, public market data and mark prices out."""

import asyncio
import logging
import signal
from collections.abc import Mapping
from datetime import timedelta

from redis.asyncio import Redis

from activities.matching.instruments import read_instruments
from clients import open_redis
from domain.instruments import Instrument, choose
from market.checkpoints import Checkpointer, restore_markets
from market.feed import EngineFeed
from market.funding import FundingRates
from market.health import market_checks
from market.index_sources import choose_index
from market.kline_feed import KlineFeed
from market.marks import MarkPrices, last_index_prices
from market.publisher import publish_changes
from settings import Settings
from storage.db import Pool, open_pool
from storage.leadership import MARKET_LOCKS
from storage.market_keys import HELD_PRICE_CHANNEL
from storage.pubsub import Subscriber
from storage.territory import Claims, run_territory
from telemetry.endpoint import endpoint

log = logging.getLogger(__name__)


async def main(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises SystemExit when the index source is not available."""
    try:
        choose_index(settings, [], {})
    except (ValueError, OSError) as error:
        raise SystemExit(f"The index source cannot be used: {error}") from None
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with (
        open_redis(settings) as redis,
        await open_pool(settings.require_database_url(), name="market") as pool,
        endpoint(settings.metrics_host, settings.metrics_port, market_checks(pool, redis)),
    ):
        await serve(pool, redis, settings, stop)


async def serve(pool: Pool, redis: Redis, settings: Settings, stop: asyncio.Event) -> None:
    """Publish the market until `stop`: of the instruments `settings` prefer, and of those nobody publishes."""
    known = await read_instruments(pool)
    preferred = [instrument.instrument_id for instrument in choose(known, settings.market_instruments)]
    locks = {name: MARKET_LOCKS + instrument.number for name, instrument in known.items()}

    async def lead(names: frozenset[str]) -> None:
        await _publish_market(pool, redis, settings, {name: known[name] for name in known if name in names})

    await run_territory(pool, Claims(locks, preferred, settings.market_takeover_seconds), stop, lead)


async def _publish_market(pool: Pool, redis: Redis, settings: Settings, instruments: Mapping[str, Instrument]) -> None:
    markets = await restore_markets(pool, instruments.values())
    checkpointer = Checkpointer(pool, markets)
    changed = asyncio.Event()
    changed.set()
    feed = EngineFeed(pool, markets, changed)
    await feed.catch_up()
    log.info("The market stands at %s", {name: market.seq for name, market in markets.items()})
    last_prices = await last_index_prices(pool, list(markets))
    index = choose_index(settings, [market.instrument for market in markets.values()], last_prices)
    funding_interval = timedelta(seconds=settings.funding_interval_seconds)
    klines = KlineFeed(pool, redis, list(instruments))
    funding = FundingRates(pool, markets, funding_interval)
    marks = MarkPrices(pool, redis, markets, index, funding_interval, changed)

    def receive(channel: str, payload: bytes) -> None:
        if channel == HELD_PRICE_CHANNEL:
            marks.nudge()
        else:
            feed.on_hint(payload)

    subscribed: set[str] = set()

    def republish_on_reconnect(channel: str) -> None:
        # The server may have restarted empty, or forgotten what it was sent last.
        if channel in subscribed:
            for market in markets.values():
                market.break_chains()
            klines.break_chains()
            changed.set()
        subscribed.add(channel)

    channels = [HELD_PRICE_CHANNEL, *(f"engine:{instrument_id}" for instrument_id in markets)]
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Subscriber(redis, channels, receive, republish_on_reconnect).run())
            tasks.create_task(feed.follow_log())
            tasks.create_task(index.run())
            tasks.create_task(marks.run(settings.mark_price_interval_seconds))
            tasks.create_task(funding.run())
            tasks.create_task(klines.run())
            tasks.create_task(publish_changes(redis, markets.values(), changed))
            tasks.create_task(checkpointer.run())
    except asyncio.CancelledError:
        # Told to stop, or no longer leading; after a defect the markets may be half way through an event.
        await checkpointer.finish()
        raise
