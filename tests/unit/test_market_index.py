"""The simulated index."""

from decimal import Decimal

from domain.instruments import SHIPPED
from market.index_price import SimulatedIndex

BTC, ETH, SOL = (instrument.instrument_id for instrument in SHIPPED)


def walk(index: SimulatedIndex, steps: int) -> list[dict[str, Decimal]]:
    return [index.step({}) for _ in range(steps)]


def test_the_same_seed_gives_the_same_walk_and_another_seed_another() -> None:
    first = walk(SimulatedIndex(SHIPPED, {}, seed=1), 20)
    assert first == walk(SimulatedIndex(SHIPPED, {}, seed=1), 20)
    assert first != walk(SimulatedIndex(SHIPPED, {}, seed=2), 20)


def test_every_step_is_small_and_on_the_tick() -> None:
    before = {BTC: Decimal(60_000), ETH: Decimal(3_000), SOL: Decimal(150)}
    for prices in walk(SimulatedIndex(SHIPPED, {}, seed=3), 500):
        for instrument in SHIPPED:
            price, last = prices[instrument.instrument_id], before[instrument.instrument_id]
            assert price % instrument.tick_size == 0
            assert abs(price - last) <= last / 10_000 + instrument.tick_size
        before = prices


def test_a_held_price_stands_and_the_walk_goes_on_from_it_when_released() -> None:
    index = SimulatedIndex(SHIPPED, {}, seed=1)
    held = Decimal("43210.123")
    assert [index.step({BTC: held})[BTC] for _ in range(5)] == [held] * 5
    assert abs(index.step({})[BTC] - held) < 10


def test_a_new_run_goes_on_from_the_last_prices() -> None:
    index = SimulatedIndex(SHIPPED, {BTC: Decimal(71_000)}, seed=1)
    prices = index.step({})
    assert abs(prices[BTC] - 71_000) < 10
    assert abs(prices[ETH] - 3_000) < 1
