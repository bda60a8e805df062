"""Halting an instrument while others write to its log."""

import asyncio

from activities.matching.steps import append_commands, change_state
from domain.matching import CancelAll
from storage.db import Pool
from tests.exchange import BTC
from tests.waiting import until

COMMAND = CancelAll(at=1, user_id=1)


async def halt(pool: Pool) -> bool:
    async with pool.acquire() as conn, conn.transaction():
        return await change_state(conn, BTC, "HALTED", 2)


async def test_a_halt_and_a_transaction_that_appends_twice_do_not_wait_for_each_other(pool: Pool) -> None:
    async def waits() -> bool:
        return bool(
            await pool.fetchval(
                "SELECT EXISTS (SELECT FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock')"
            )
        )

    async with pool.acquire() as conn, conn.transaction():
        await append_commands(conn, {BTC: [COMMAND]})
        halting = asyncio.create_task(halt(pool))
        await until(waits, 10, "the halt to wait for the log")
        await append_commands(conn, {BTC: [COMMAND]})
    assert await halting
    kinds = await pool.fetch("SELECT payload ->> 'kind' FROM matching.commands ORDER BY seq")
    assert [row[0] for row in kinds] == ["CANCEL_ALL", "CANCEL_ALL", "SET_STATE"]
    assert await pool.fetchval("SELECT state FROM matching.instruments WHERE instrument_id = $1", BTC) == "HALTED"
