"""The shared fixtures keep tests apart from each other."""

from redis.asyncio import Redis
from temporalio.client import Client
from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes

from settings import Settings
from storage.db import Pool


async def test_every_test_has_a_migrated_database(pool: Pool) -> None:
    assert await pool.fetchval("SELECT count(*) FROM matching.commands") == 0


async def test_a_database_ends_with_its_test(pool: Pool) -> None:
    databases = await pool.fetchval("SELECT count(*) FROM pg_database WHERE datname LIKE 'exchange_%'")
    assert databases == 1


async def test_redis_is_written(redis: Redis) -> None:
    await redis.set("left", "over")
    assert await redis.get("left") == b"over"


async def test_redis_is_empty_again(redis: Redis) -> None:
    assert await redis.dbsize() == 0


async def test_a_namespace_takes_our_search_attributes_at_once(temporal: Client, settings: Settings) -> None:
    attributes = TypedSearchAttributes(
        [
            SearchAttributePair(SearchAttributeKey.for_int("OrderId"), 7),
            SearchAttributePair(SearchAttributeKey.for_keyword_list("OrderIds"), ["7", "8"]),
            SearchAttributePair(SearchAttributeKey.for_keyword("UserId"), "u"),
            SearchAttributePair(SearchAttributeKey.for_keyword("InstrumentId"), "BTC-USDT-PERP"),
        ]
    )
    assert settings.temporal_namespace == temporal.namespace
    handle = await temporal.start_workflow("Any", id="any", task_queue="any", search_attributes=attributes)
    assert (await handle.describe()).typed_search_attributes[SearchAttributeKey.for_int("OrderId")] == 7


async def test_another_test_has_another_namespace(temporal: Client) -> None:
    assert [execution.id async for execution in temporal.list_workflows()] == []
