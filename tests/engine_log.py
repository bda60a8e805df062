"""What the engine wrote, compared with what a straight run of the same commands leads to."""

from collections.abc import Sequence

from activities.matching.steps import append_commands
from domain.instruments import SHIPPED, Instrument
from domain.matching import AnyCommand, Trade, decode_event, encode
from engine.matcher import Matcher
from storage.db import Pool
from tests.waiting import until

BTC = SHIPPED[0]


async def append(pool: Pool, commands: Sequence[AnyCommand], instrument: Instrument = BTC) -> None:
    """Commands into the log, as an accepted order puts them there."""
    async with pool.acquire() as conn, conn.transaction():
        await append_commands(conn, {instrument.instrument_id: commands})


async def until_matched(pool: Pool, command_seq: int, seconds: float = 10, instrument: Instrument = BTC) -> None:
    """Until the engine has committed what `command_seq` led to."""
    query = "SELECT command_seq FROM matching.cursors WHERE instrument_id = $1"

    async def matched() -> bool:
        return bool(await pool.fetchval(query, instrument.instrument_id) >= command_seq)

    await until(matched, seconds, f"command {command_seq} of {instrument.instrument_id}")


async def owner_of(pool: Pool, instrument: Instrument = BTC) -> str | None:
    """Who holds, or held last, the lease of the instrument; None when it was released."""
    query = "SELECT owner FROM matching.cursors WHERE instrument_id = $1"
    owner: str | None = await pool.fetchval(query, instrument.instrument_id)
    return owner


async def assert_log_is(pool: Pool, commands: Sequence[AnyCommand], instrument: Instrument = BTC) -> Matcher:
    """The event log, the tape and the cursor are what these commands lead to: gapless, once each, byte for byte.

    Answers the matcher of the straight run.
    """
    matcher = Matcher(instrument)
    expected = [
        (command_seq, encode(event).decode())
        for command_seq, command in enumerate(commands, 1)
        for event in matcher.apply(command)
    ]
    instrument_id = instrument.instrument_id
    rows = await pool.fetch(
        "SELECT seq, command_seq, payload FROM matching.events WHERE instrument_id = $1 ORDER BY seq", instrument_id
    )
    assert [tuple(row) for row in rows] == [(seq, *event) for seq, event in enumerate(expected, 1)]
    tape = await pool.fetch(
        "SELECT trade_id, seq FROM matching.trade_tickers WHERE instrument_id = $1 ORDER BY trade_id", instrument_id
    )
    trades = [(seq, decode_event(payload)) for seq, (_, payload) in enumerate(expected, 1)]
    assert [tuple(row) for row in tape] == [(event.trade_id, seq) for seq, event in trades if isinstance(event, Trade)]
    cursor = await pool.fetchrow(
        "SELECT command_seq, event_seq FROM matching.cursors WHERE instrument_id = $1", instrument_id
    )
    assert cursor is not None
    assert tuple(cursor) == (len(commands), len(expected))
    return matcher
