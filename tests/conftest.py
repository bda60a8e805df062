"""Fixtures shared by all tests: real Postgres, Valkey and Temporal, started once per run when a test asks for them."""

import itertools
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis.asyncio import Redis
from temporalio.client import Client

from clients import open_redis
from settings import Settings
from stack import servers
from stack.ports import free_port
from storage.db import Pool, open_pool
from tests.servers import migrate, running

# Made when the server starts, because a namespace made later is only usable seconds after.
NAMESPACES = [f"test-{number}" for number in range(240)]
# A test's data dies with the run: durability would only cost time.
POSTGRES_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "128MB",
    "max_wal_size": "256MB",
}
# Every test has a database of its own, five hundred files: making them takes a disk up to thirty times as long.
MEMORY = Path("/dev/shm")
MEMORY_BYTES_MIN = 4 << 30
TEMPLATE = "template_exchange"
# Copied file by file: by way of the write-ahead log, as is the default, it takes three times as long.
COPY_OF_TEMPLATE = f"TEMPLATE {TEMPLATE} STRATEGY FILE_COPY"


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def database_folder(server_folder: Path) -> Iterator[Path]:
    """In memory, where there is any; what runs that were killed have left there is removed."""
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < MEMORY_BYTES_MIN:
        yield server_folder
        return
    of_all_runs = MEMORY / f"exchange-tests-{os.getuid()}"
    of_all_runs.mkdir(exist_ok=True)
    for left in of_all_runs.iterdir():
        if int(left.name) == os.getpid() or not psutil.pid_exists(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)
    folder = of_all_runs / str(os.getpid())
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
async def postgres_url(database_folder: Path, server_folder: Path) -> AsyncIterator[str]:
    """A running Postgres with one migrated database, the template of every test's own."""
    server = servers.postgres(database_folder, POSTGRES_SETTINGS)
    async with running([server], server_folder):
        connection = await asyncpg.connect(server.endpoint.url)
        await connection.execute(f"CREATE DATABASE {TEMPLATE}")
        migrate(_with_database(server.endpoint.url, TEMPLATE))
        await connection.close()
        yield server.endpoint.url


@pytest.fixture(scope="session")
async def valkey_url(server_folder: Path) -> AsyncIterator[str]:
    server = servers.valkey(server_folder)
    async with running([server], server_folder):
        yield server.endpoint.url


@pytest.fixture(scope="session")
async def temporal_address(server_folder: Path) -> AsyncIterator[str]:
    server = servers.temporal(None, free_port(), None, NAMESPACES)
    async with running([server], server_folder):
        yield server.endpoint.url


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    """0, 1, 2, … over the whole run: names for what a test must not share."""
    return itertools.count()


@pytest.fixture
async def database_url(postgres_url: str, numbers: Iterator[int]) -> AsyncIterator[str]:
    """A database of the test's own, migrated and empty but for the seeded rows."""
    name = f"exchange_{next(numbers)}"
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f"CREATE DATABASE {name} {COPY_OF_TEMPLATE}")
    yield _with_database(postgres_url, name)
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    opened = await open_pool(database_url)
    yield opened
    opened.terminate()


@pytest.fixture
async def redis_url(valkey_url: str) -> str:
    """The test run's Valkey, empty."""
    async with Redis.from_url(valkey_url) as client:
        await client.flushall()
    return valkey_url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with open_redis(Settings(redis_url=redis_url)) as client:
        yield client


@pytest.fixture(scope="session")
def namespaces() -> Iterator[str]:
    return iter(NAMESPACES)


@pytest.fixture
async def temporal(temporal_address: str, namespaces: Iterator[str]) -> Client:
    """A client in a namespace of the test's own, with the exchange's search attributes."""
    return await Client.connect(temporal_address, namespace=next(namespaces))


@pytest.fixture
async def short_history(tmp_path: Path) -> AsyncIterator[Client]:
    """A client of a Temporal of the test's own that suggests to continue as new very soon."""
    server = servers.temporal(None, free_port(), None, ["short"])
    option = ["--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=60"]
    server = replace(server, process=replace(server.process, command=[*server.process.command, *option]))
    async with running([server], tmp_path):
        yield await Client.connect(server.endpoint.url, namespace="short")


@pytest.fixture
def settings(database_url: str, redis_url: str, temporal: Client, tmp_path: Path) -> Settings:
    """Settings that point to this test's database, Valkey and namespace."""
    return Settings(
        database_url=database_url,
        redis_url=redis_url,
        temporal_address=temporal.service_client.config.target_host,
        temporal_namespace=temporal.namespace,
        state_dir=tmp_path,
    )


def _with_database(url: str, name: str) -> str:
    return url.replace("/postgres?", f"/{name}?", 1)
