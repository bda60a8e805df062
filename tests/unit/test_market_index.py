"""The simulated index: the walk, what an operator holds, and recordings."""

import gzip
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from domain.instruments import SHIPPED
from market.replay import read_recording
from market.simulated_index import SimulatedIndex

BTC, ETH, SOL = (instrument.instrument_id for instrument in SHIPPED)
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def read(index: SimulatedIndex, held: Mapping[str, Decimal], seconds: float = 0) -> dict[str, Decimal]:
    prices = {}
    for name, reading in index.read(NOW + timedelta(seconds=seconds), held).items():
        assert reading.price is not None
        prices[name] = reading.price
    return prices


def walk(index: SimulatedIndex, steps: int) -> list[dict[str, Decimal]]:
    return [read(index, {}) for _ in range(steps)]


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
    assert [read(index, {BTC: held})[BTC] for _ in range(5)] == [held] * 5
    assert abs(read(index, {})[BTC] - held) < 10


def test_a_new_run_goes_on_from_the_last_prices() -> None:
    index = SimulatedIndex(SHIPPED, {BTC: Decimal(71_000)}, seed=1)
    prices = read(index, {})
    assert abs(prices[BTC] - 71_000) < 10
    assert abs(prices[ETH] - 3_000) < 1


LINES = """{"at": "2024-08-08T00:00:10Z", "instrumentId": "BTC-USDT-PERP", "price": "55000.123"}
{"at": "2024-08-08T00:00:12Z", "instrumentId": "ETH-USDT-PERP", "price": "2400"}

{"at": "2024-08-08T02:00:15.500+02:00", "instrumentId": "BTC-USDT-PERP", "price": 55001}
{"at": "2024-08-08T00:00:20Z", "instrumentId": "BTC-USDT-PERP", "price": "55002"}
"""


@pytest.fixture(params=["prices.jsonl", "prices.jsonl.gz"])
def recording_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    file = tmp_path / str(request.param)
    file.write_bytes(gzip.compress(LINES.encode()) if file.suffix == ".gz" else LINES.encode())
    return file


def test_a_recording_is_played_by_its_own_time_over_and_over(recording_file: Path) -> None:
    index = SimulatedIndex(SHIPPED, {}, 1, read_recording(recording_file))
    played = [(read(index, {}, second)[BTC], read(index, {}, second)[ETH]) for second in (0, 5, 5.5, 9.9, 10, 15.5)]
    btc = [Decimal(price) for price in ("55000.123", "55000.123", "55001", "55001", "55000.123", "55001")]
    assert played == [(price, Decimal(2400)) for price in btc]


def test_an_instrument_without_recording_walks_and_a_held_one_is_held(recording_file: Path) -> None:
    index = SimulatedIndex(SHIPPED, {}, 1, read_recording(recording_file))
    assert read(index, {BTC: Decimal(7)})[BTC] == 7
    assert len({read(index, {})[SOL] for _ in range(20)}) > 1


def test_a_recording_of_one_moment_stands(tmp_path: Path) -> None:
    file = tmp_path / "one"
    file.write_text(LINES.splitlines()[0])
    index = SimulatedIndex(SHIPPED, {}, 1, read_recording(file))
    assert [read(index, {}, second)[BTC] for second in (0, 1, 100)] == [Decimal("55000.123")] * 3


@pytest.mark.parametrize(
    "line",
    [
        "rubbish",
        '{"at": "2024-08-08T00:00:10Z", "instrumentId": "BTC-USDT-PERP"}',
        '{"at": "2024-08-08T00:00:10", "instrumentId": "BTC-USDT-PERP", "price": "1"}',
        '{"at": "2024-08-08T00:00:10Z", "instrumentId": "BTC-USDT-PERP", "price": "0"}',
        '{"at": "2024-08-08T00:00:10Z", "instrumentId": "BTC-USDT-PERP", "price": "NaN"}',
    ],
)
def test_a_wrong_line_of_a_recording_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prices"
    file.write_text(LINES + line)
    with pytest.raises(ValueError, match="prices:6: "):
        read_recording(file)


def test_an_empty_recording_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prices"
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prices"):
        read_recording(file)
