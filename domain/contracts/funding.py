"""Names and messages of the workflow that settles funding."""

from dataclasses import dataclass
from datetime import UTC, datetime

FUNDING_SETTLEMENT = "FundingSettlementWorkflow"
OPEN_FUNDING = "ledger.open_funding"
LAST_COMMAND = "matching.last_command"
EVENTS_OF = "matching.events_of"
FIX_FUNDING_POSITIONS = "positions.fix_funding_positions"
SETTLE_FUNDING = "ledger.settle_funding"
CONFIRM_FUNDING = "positions.confirm_funding"
CLOSE_FUNDING = "ledger.close_funding"
FUNDING_UNCOVERED = "ledger.funding_uncovered"
FUNDING_PAGE = 5_000


@dataclass(frozen=True)
class FundingRun:
    """The settlement of one instrument at one funding time (ISO-8601 with offset)."""

    instrument_id: str
    funding_time: str

    @property
    def time(self) -> datetime:
        """The funding time, in UTC."""
        return datetime.fromisoformat(self.funding_time).astimezone(UTC)

    @property
    def reference(self) -> str:
        """Begins the names of the run's journals: instrument and time, without colons, as these separate the parts."""
        return f"{self.instrument_id}:{self.time:%Y%m%dT%H%M%S.%fZ}"


@dataclass(frozen=True)
class FundingInput:
    """What a run is started with. Without a time it settles for the time that its schedule meant it to start at."""

    instrument_id: str
    funding_time: str | None = None


@dataclass(frozen=True)
class LogPosition:
    """A place in an instrument's log: a command, or the last event that commands up to it led to."""

    instrument_id: str
    seq: int


@dataclass(frozen=True)
class FundingSnapshot:
    """Positions at the funding time; all events up to `event_seq` have to be applied for them to be known."""

    run: FundingRun
    event_seq: int


@dataclass(frozen=True)
class FundingPage:
    """The next FUNDING_PAGE positions of a run, by user id."""

    run: FundingRun
    after_user_id: int


@dataclass(frozen=True)
class FundingTotals:
    """What a run came to, in quote: `paid` by users and, of it, `insurance` by the fund; `received` by users."""

    positions: int
    paid: str
    received: str
    insurance: str
