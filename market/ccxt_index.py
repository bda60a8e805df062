"""The index from spot exchanges, through the `ccxt` library: their latest trades, polled side by side.

Every market of every exchange has a task of its own, which keeps the last good quote; reading the index looks at what
is there and waits for nobody. Prices are decimals all the way: ccxt is told to make its numbers with `Decimal`, from
the text the exchange sent.
"""

import asyncio
import importlib
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

from domain.clock import from_ms
from domain.index_price import (
    SOURCES_MIN,
    IndexPrice,
    InsanePriceError,
    Quote,
    Source,
    SpotTrade,
    index_price,
    is_sane,
    vwap,
)
from domain.instruments import Instrument
from settings import Settings
from storage.waiting import pause, wait_for_event

log = logging.getLogger(__name__)

# When more than this is traded within the smoothing window, the latest of it speaks for the rest (parsing takes 1 ms).
TRADES_MAX = 100
# After failures the wait doubles up to this multiple: an exchange that bans for too many requests wants its rest.
BACKOFF_MAX = 16
# The list of all markets is read once and is large.
LOAD_SECONDS_MAX = 60.0
# The currency of settlement first; dollars where an exchange does not trade it.
QUOTES_OTHERWISE = ("USD",)
LOGGED_MAX = 300


class CcxtIndex:
    """The index of `instruments` from the exchanges, weights and addresses of `settings`. Raises ValueError."""

    label = "ccxt"
    can_be_held = False

    def __init__(self, instruments: Sequence[Instrument], settings: Settings) -> None:
        self._instruments = instruments
        self._poll_seconds = settings.index_poll_seconds
        self._timeout_seconds = settings.index_timeout_seconds
        self._stale_after = timedelta(seconds=settings.index_stale_seconds)
        self._window = timedelta(seconds=settings.index_vwap_seconds)
        weights = read_weights(settings.index_exchanges)
        self._urls = read_urls(settings.index_urls, weights.keys())
        self._classes = {name: _exchange_class(name) for name in weights}
        self._sources = {
            i.instrument_id: {name: Source(name, weight, None) for name, weight in weights.items()} for i in instruments
        }
        self._warm = asyncio.Event()

    async def run(self) -> None:
        """Poll all exchanges until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._classes:
                tasks.create_task(self._follow_exchange(name))

    async def warm_up(self) -> None:
        """Wait for the first quotes of every instrument, no longer than after which they would be stale."""
        await wait_for_event(self._warm, self._stale_after.total_seconds())

    def read(self, now: datetime, held: Mapping[str, Decimal]) -> dict[str, IndexPrice]:
        """The index of every instrument from the quotes there are."""
        assert not held, f"Expected no held prices, was {held}"
        return {
            name: index_price(list(sources.values()), now, self._stale_after) for name, sources in self._sources.items()
        }

    async def _follow_exchange(self, name: str) -> None:
        exchange = self._open(name)
        try:
            symbols = await self._find_symbols(exchange)
            async with asyncio.TaskGroup() as tasks:
                for instrument in self._instruments:
                    tasks.create_task(self._follow_market(exchange, instrument, symbols.get(instrument.instrument_id)))
        finally:
            await exchange.close()

    def _open(self, name: str) -> Any:
        exchange = self._classes[name]({"number": Decimal, "timeout": round(LOAD_SECONDS_MAX * 1000)})
        # Spot markets only, and nothing of their currencies: that would take keys, or many more requests.
        exchange.has["fetchCurrencies"] = False
        if isinstance(exchange.options.get("fetchMarkets"), dict):
            exchange.options["fetchMarkets"]["types"] = ["spot"]
        if name in self._urls:
            exchange.urls["api"] = _moved(exchange.urls["api"], self._urls[name])
        return exchange

    async def _find_symbols(self, exchange: Any) -> dict[str, str]:
        """What the exchange calls the spot markets of our instruments, as soon as it tells."""
        failures = 0
        while True:
            try:
                markets = await exchange.load_markets(failures > 0)
                symbols = {i.instrument_id: symbol for i in self._instruments if (symbol := _spot_symbol(markets, i))}
                # A list with none of them is no list: ccxt takes much for an empty one.
                if not symbols:
                    raise LookupError("no spot market for any instrument")
            # ccxt raises its own errors for what it foresees, and whatever its parsers trip over for the rest.
            except Exception as error:
                failures += 1
                for instrument in self._instruments:
                    self._failed(instrument, exchange.id, error)
                await pause(self._pause(failures))
            else:
                exchange.timeout = round(self._timeout_seconds * 1000)
                return symbols

    async def _follow_market(self, exchange: Any, instrument: Instrument, symbol: str | None) -> None:
        if symbol is None:
            self._failed(instrument, exchange.id, LookupError(f"no spot market for {instrument.base_asset}"))
            return
        failures = 0
        while True:
            try:
                trades = await exchange.fetch_trades(symbol, None, TRADES_MAX)
                self._quoted(instrument, exchange.id, self._quote(trades, datetime.now(UTC)))
                failures = 0
            # As above.
            except Exception as error:
                failures += 1
                self._failed(instrument, exchange.id, error)
            await pause(self._pause(failures))

    def _pause(self, failures: int) -> float:
        return self._poll_seconds * min(1 << failures, BACKOFF_MAX)

    def _quote(self, rows: Sequence[Mapping[str, Any]], now: datetime) -> Quote:
        trades = sorted((_trade(row) for row in rows), key=lambda trade: trade.at)
        if not trades:
            raise LookupError("no trades")
        return Quote(vwap(trades, now, self._window), trades[-1].at, now)

    def _quoted(self, instrument: Instrument, name: str, quote: Quote) -> None:
        sources = self._sources[instrument.instrument_id]
        if sources[name].error is not None:
            log.info("%s answers again for %s", name, instrument.instrument_id)
        sources[name] = replace(sources[name], quote=quote, error=None)
        self._warm_if_ready()

    def _failed(self, instrument: Instrument, name: str, error: Exception) -> None:
        source = self._sources[instrument.instrument_id][name]
        if source.error is None:
            log.warning("%s fails for %s: %s", name, instrument.instrument_id, repr(error)[:LOGGED_MAX])
        # One request that failed does not make the last answer wrong: it counts until it is stale. An insane one does.
        quote = None if isinstance(error, InsanePriceError) else source.quote
        self._sources[instrument.instrument_id][name] = replace(source, quote=quote, error=type(error).__name__)

    def _warm_if_ready(self) -> None:
        quoted = (sum(source.quote is not None for source in sources.values()) for sources in self._sources.values())
        if all(count >= SOURCES_MIN for count in quoted):
            self._warm.set()


def read_weights(text: str) -> dict[str, Decimal]:
    """`binance:1,kraken:0.5` as weights by exchange; without a number it is 1. Raises ValueError."""
    weights: dict[str, Decimal] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, number = item.partition(":")
        try:
            weight = Decimal(number or 1)
        except InvalidOperation:
            weight = Decimal(0)
        if not is_sane(weight) or name in weights:
            raise ValueError(f"EXCHANGE_INDEX_EXCHANGES: expected exchanges with positive weights, was {item!r}")
        weights[name] = weight
    if len(weights) < SOURCES_MIN:
        raise ValueError(f"EXCHANGE_INDEX_EXCHANGES: expected at least {SOURCES_MIN} exchanges, was {text!r}")
    return weights


def read_urls(text: str, exchanges: Collection[str]) -> dict[str, str]:
    """`binance=https://proxy.example/binance,…` as addresses by exchange. Raises ValueError."""
    urls: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, url = item.partition("=")
        if name not in exchanges or not re.match(r"https?://[^/]", url):
            raise ValueError(f"EXCHANGE_INDEX_URLS: expected exchange=http(s)://…, was {item!r}")
        urls[name] = url.rstrip("/")
    return urls


def _exchange_class(name: str) -> Any:
    # Only the modules of the exchanges in use are imported, and the type checker is spared all of them.
    if not re.fullmatch(r"[a-z0-9]+", name):
        raise ValueError(f"EXCHANGE_INDEX_EXCHANGES: ccxt knows no exchange {name!r}")
    try:
        return getattr(importlib.import_module(f"ccxt.async_support.{name}"), name)
    except (ImportError, AttributeError):
        raise ValueError(f"EXCHANGE_INDEX_EXCHANGES: ccxt knows no exchange {name!r}") from None


def _moved(urls: Any, base: str) -> Any:
    """All addresses in ccxt's nested table of them, at another host."""
    if isinstance(urls, dict):
        return {name: _moved(url, base) for name, url in urls.items()}
    return re.sub(r"^https?://[^/]+", base, urls) if isinstance(urls, str) else urls


def _spot_symbol(markets: Mapping[str, Any], instrument: Instrument) -> str | None:
    for quote in (instrument.quote_asset, *QUOTES_OTHERWISE):
        symbol = f"{instrument.base_asset}/{quote}"
        if markets.get(symbol, {}).get("spot"):
            return symbol
    return None


def _trade(row: Mapping[str, Any]) -> SpotTrade:
    price, quantity, at_ms = row["price"], row["amount"], row["timestamp"]
    if not (isinstance(price, Decimal) and isinstance(quantity, Decimal) and isinstance(at_ms, int)):
        raise ValueError(f"Expected price, amount and time of a trade, was {row['info']!r}")
    return SpotTrade(price, quantity, from_ms(at_ms))
