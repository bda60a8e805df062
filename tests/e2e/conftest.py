"""One exchange per module: its processes take seconds to start. A module's SETTINGS are its exchange's."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.conftest import COPY_OF_TEMPLATE
from tests.exchange import Exchange, Trader, running_exchange


@pytest.fixture(scope="module")
async def exchange(
    postgres_url: str,
    numbers: Iterator[int],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Exchange]:
    name = f"exchange_{next(numbers)}"
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f"CREATE DATABASE {name} {COPY_OF_TEMPLATE}")
    folder: Path = tmp_path_factory.mktemp("exchange")
    url = postgres_url.replace("/postgres?", f"/{name}?", 1)
    async with running_exchange(url, folder, **getattr(request.module, "SETTINGS", {})) as exchange:
        yield exchange
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


@pytest.fixture(scope="module")
async def admin(exchange: Exchange) -> Trader:
    return await exchange.admin()
