"""The generated market, and the measuring of markets."""

from itertools import islice, takewhile

import pytest

from demo.book import ReplayedBook
from demo.calibrate import measure
from demo.generator import BTCUSDT_20240808, LEVELS, SHARES, Calibration, generate, quantile
from demo.messages import Diff, Message, Trade

SECONDS = 345
# Volume of the recording in lots, in the same time.
RECORDED_VOLUME = 2_429_366


def generated(seed: int) -> list[Message]:
    return list(takewhile(lambda message: message.at <= SECONDS * 10**9, generate(BTCUSDT_20240808, seed)))


@pytest.fixture(scope="module")
def market() -> list[Message]:
    return generated(1)


@pytest.fixture(scope="module")
def measured(market: list[Message]) -> Calibration:
    return measure(market)


def test_the_same_seed_gives_the_same_market_and_another_seed_another_one(market: list[Message]) -> None:
    assert generated(1) == market
    assert list(islice(generate(BTCUSDT_20240808, 2), 1000)) != market[:1000]


def test_messages_are_in_order_of_time_and_updates_follow_each_other(market: list[Message]) -> None:
    times = [message.at for message in market]
    assert times == sorted(times)
    assert len([message for message in market if isinstance(message, Diff)]) == SECONDS * 10


def test_the_generated_book_never_crosses_and_keeps_its_levels(market: list[Message]) -> None:
    book = ReplayedBook()
    for message in market:
        book.apply(message)
        assert book.ready
        assert len(book.bids(LEVELS + 1)) == len(book.asks(LEVELS + 1)) == LEVELS


@pytest.mark.parametrize(
    "name", ["orders_per_step", "order_lots", "move_ticks", "best_lots", "level_lots", "gap_ticks"]
)
def test_generated_distributions_are_near_the_recorded_ones(measured: Calibration, name: str) -> None:
    recorded, found = getattr(BTCUSDT_20240808, name), getattr(measured, name)
    # Median, 75 % and 90 %: what lies further out is seldom and varies with the seed.
    for place in (3, 4, 5):
        assert found[place] == pytest.approx(recorded[place], rel=0.3, abs=1)


def test_generated_shares_are_near_the_recorded_ones(measured: Calibration) -> None:
    assert measured.moving_steps == pytest.approx(BTCUSDT_20240808.moving_steps, rel=0.15)
    assert measured.changing_levels == pytest.approx(BTCUSDT_20240808.changing_levels, rel=0.15)
    assert measured.spread_ticks[3] == BTCUSDT_20240808.spread_ticks[3] == 1


def test_the_generated_volume_is_near_the_recorded_one() -> None:
    volumes = [sum(m.lots for m in generated(seed) if isinstance(m, Trade)) for seed in range(4)]
    assert sum(volumes) / len(volumes) == pytest.approx(RECORDED_VOLUME, rel=0.2)


def test_quantiles_are_met_at_their_shares_and_rise_in_between() -> None:
    values = tuple(float(place * place) for place in range(len(SHARES)))
    assert [quantile(values, share) for share in SHARES] == pytest.approx(values)
    between = [quantile(values, number / 1000) for number in range(1001)]
    assert between == sorted(between)
