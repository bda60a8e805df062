"""What became of orders, as the processes that know announce it on Redis: hints, the tables hold the truth."""

import asyncio
from typing import Any

import msgspec
from redis.asyncio import Redis

from activities.orders.outcomes import OrderChange, fold_events
from activities.orders.steps import VERDICTS_CHANNEL
from domain.instruments import Instrument
from domain.matching import AnyEvent
from domain.sagas import Verdict
from storage.pubsub import Subscriber

ENGINE_CHANNELS = "engine:*"


class EngineMessage(msgspec.Struct, rename="camel"):
    """What the engine publishes after each commit."""

    instrument_id: str
    first_seq: int
    events: list[AnyEvent]


class SagaMessage(msgspec.Struct, rename="camel"):
    """What the last step of a placement publishes."""

    saga_id: str
    verdict: Verdict


_decode_engine = msgspec.json.Decoder(EngineMessage).decode
_decode_saga = msgspec.json.Decoder(SagaMessage).decode


class Verdicts:
    """Waiting for sagas to end, and for the engine's first word on orders."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._sagas: dict[str, asyncio.Future[Verdict]] = {}
        self._orders: dict[int, asyncio.Future[OrderChange]] = {}
        self._instruments: dict[str, Instrument] = {}

    def know(self, instruments: dict[str, Instrument]) -> None:
        """The instruments whose ticks and lots events are in."""
        self._instruments = instruments

    def saga(self, saga_id: str) -> asyncio.Future[Verdict]:
        """Will hold the verdict of a placement. Give it back to `forget_saga`."""
        return self._sagas.setdefault(saga_id, asyncio.get_running_loop().create_future())

    def forget_saga(self, saga_id: str) -> None:
        """No longer waiting."""
        self._sagas.pop(saga_id, None)

    def order(self, order_id: int) -> asyncio.Future[OrderChange]:
        """Will hold what the engine first did with the order: rest, trade, end. Give it back to `forget_order`."""
        return self._orders.setdefault(order_id, asyncio.get_running_loop().create_future())

    def forget_order(self, order_id: int) -> None:
        """No longer waiting."""
        self._orders.pop(order_id, None)

    async def listen(self) -> None:
        """Listen for ever, reconnecting; cancel to stop."""
        await Subscriber(self._redis, [VERDICTS_CHANNEL], self._hear, patterns=[ENGINE_CHANNELS]).run()

    def _hear(self, channel: str, payload: bytes) -> None:
        if channel == VERDICTS_CHANNEL and self._sagas:
            saga = _decode_saga(payload)
            _resolve(self._sagas.get(saga.saga_id), saga.verdict)
            for refusal in saga.verdict.refused:
                _resolve(self._orders.get(refusal.order_id), OrderChange(final_status="FAILED", reason=refusal.reason))
        elif channel != VERDICTS_CHANNEL and self._orders:
            engine = _decode_engine(payload)
            instrument = self._instruments.get(engine.instrument_id)
            if instrument is None:
                return
            for order_id, change in fold_events(enumerate(engine.events), instrument).items():
                _resolve(self._orders.get(order_id), change)


def _resolve(future: "asyncio.Future[Any] | None", value: object) -> None:
    if future is not None and not future.done():
        future.set_result(value)
