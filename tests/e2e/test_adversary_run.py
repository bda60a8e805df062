"""Colluding accounts against the running exchange, for a short time; `python -m tests.adversary_run` runs longer."""

import os

import pytest

from tests.adversary_run.runner import SETTINGS as OF_THE_RUN
from tests.adversary_run.runner import run
from tests.exchange import Exchange, Trader

SETTINGS = OF_THE_RUN
SEED = int(os.environ.get("EXCHANGE_ADVERSARY_SEED", "1"))
SECONDS = float(os.environ.get("EXCHANGE_ADVERSARY_SECONDS", "40"))


@pytest.mark.timeout(SECONDS + 240)
async def test_no_law_breaks_whatever_colluders_and_marks_do(exchange: Exchange, admin: Trader) -> None:
    report = await run(exchange, admin, SEED, SECONDS)
    assert report.ok, report
    # A run in which nothing happens proves nothing.
    assert min(report.actions, report.opened) > 20, report
