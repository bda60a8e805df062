"""The market process is ready while somebody looks after every mark price; a frozen index is not its fault."""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import pytest

from domain.mark_price import MARK_AGE_MAX
from market.health import market_checks
from telemetry.health import NotReadyError

NAME = "BTC-USDT-PERP"
OLD = MARK_AGE_MAX + timedelta(seconds=5)


class OneInstrument:
    """A pool whose only table has one instrument."""

    async def fetch(self, statement: str) -> list[tuple[str]]:
        return [(NAME,)]


class OneMark:
    """A Redis that holds a mark price document, or none."""

    def __init__(self, age: timedelta | None, *, is_frozen: bool = False) -> None:
        self._age = age
        self._is_frozen = is_frozen

    async def ping(self) -> bool:
        return True

    async def mget(self, keys: list[str]) -> list[bytes | None]:
        if self._age is None:
            return [None for _ in keys]
        made = datetime.now(UTC) - self._age
        document = {"markPrice": "60000", "calculatedAt": made, "isFrozen": self._is_frozen}
        return [msgspec.json.encode(document) for _ in keys]


async def check(redis: OneMark) -> None:
    await market_checks(cast(Any, OneInstrument()), cast(Any, redis))["marks"]()


@pytest.mark.parametrize(
    "redis",
    [OneMark(timedelta()), OneMark(timedelta(), is_frozen=True), OneMark(OLD, is_frozen=True)],
    ids=["fresh", "fresh and frozen", "old and frozen"],
)
async def test_marks_that_are_looked_after_are_well(redis: OneMark) -> None:
    await check(redis)


@pytest.mark.parametrize("redis", [OneMark(OLD), OneMark(None)], ids=["old", "none"])
async def test_a_mark_that_is_old_or_missing_is_named(redis: OneMark) -> None:
    with pytest.raises(NotReadyError, match=NAME):
        await check(redis)
