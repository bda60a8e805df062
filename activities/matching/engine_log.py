"""Reading the engine's event log. A range never changes once written, so the last few are kept decoded."""

from collections import OrderedDict

from domain.matching import AnyEvent, decode_event
from domain.sagas import EventRange
from storage.db import Connection

RANGES_KEPT = 8
SequencedEvent = tuple[int, AnyEvent]


class EngineLog:
    """The five settlement steps of one range read it from Postgres once per process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[EventRange, list[SequencedEvent]] = OrderedDict()

    async def read(self, conn: Connection, events: EventRange) -> list[SequencedEvent]:
        """The events of the range with their sequence numbers, in order."""
        if events in self._kept:
            return self._kept[events]
        rows = await conn.fetch(
            "SELECT seq, payload FROM matching.v_events"
            " WHERE instrument_id = $1 AND seq > $2 AND seq <= $3 ORDER BY seq",
            events.instrument_id,
            events.after_seq,
            events.to_seq,
        )
        if len(rows) != events.to_seq - events.after_seq:
            raise RuntimeError(f"Expected {events.to_seq - events.after_seq} events in {events}, was {len(rows)}")
        decoded = [(row[0], decode_event(row[1])) for row in rows]
        self._kept[events] = decoded
        while len(self._kept) > RANGES_KEPT:
            self._kept.popitem(last=False)
        return decoded
