"""Engine events into the markets: hints from Redis as they happen, the log for the start and for every gap."""

import asyncio
from collections.abc import Mapping

import msgspec

from domain.matching import AnyEvent, decode_event
from market.instrument_market import InstrumentMarket, SequenceGapError
from storage.db import Pool
from storage.waiting import wait_for_event

PAGE_EVENTS_MAX = 10_000
# A hint is delivered at most once: within this time a lost one is noticed from the log itself.
POLL_SECONDS = 0.5

_POSITIONS = "SELECT instrument_id, event_seq FROM matching.v_cursors"
_PAGE = "SELECT seq, payload FROM matching.v_events WHERE instrument_id = $1 AND seq > $2 ORDER BY seq LIMIT $3"


class EngineHint(msgspec.Struct, rename="camel"):
    """What the engine publishes after its transaction: the events themselves."""

    instrument_id: str
    first_seq: int
    last_seq: int
    events: list[AnyEvent]


_decode_hint = msgspec.json.Decoder(EngineHint).decode


class EngineFeed:
    """Keeps `markets` up to date with the engine; sets `changed` whenever one moved."""

    def __init__(self, pool: Pool, markets: Mapping[str, InstrumentMarket], changed: asyncio.Event) -> None:
        self._pool = pool
        self._markets = markets
        self._changed = changed
        self._behind = asyncio.Event()

    def on_hint(self, payload: bytes) -> None:
        """Apply a published batch, or note that something before it is missing."""
        hint = _decode_hint(payload)
        try:
            self._markets[hint.instrument_id].apply(hint.first_seq, hint.events)
        except SequenceGapError:
            self._behind.set()
        else:
            self._changed.set()

    async def follow_log(self) -> None:
        """Read what the hints did not bring, until cancelled."""
        while True:
            await wait_for_event(self._behind, POLL_SECONDS)
            self._behind.clear()
            await self.catch_up()

    async def catch_up(self) -> None:
        """Apply everything that stands in the log, page by page."""
        for row in await self._pool.fetch(_POSITIONS):
            market = self._markets.get(row["instrument_id"])
            while market is not None and market.seq < row["event_seq"]:
                await self._apply_page(market)

    async def _apply_page(self, market: InstrumentMarket) -> None:
        rows = await self._pool.fetch(_PAGE, market.instrument.instrument_id, market.seq, PAGE_EVENTS_MAX)
        first, last = rows[0]["seq"], rows[-1]["seq"]
        assert last - first == len(rows) - 1, f"Expected a gapless log, was {len(rows)} events from {first} to {last}"
        market.apply(first, [decode_event(row["payload"]) for row in rows])
        self._changed.set()
