"""The laws of `docs/solvency.md`, asked of the exchange in memory after every step."""

from domain.money import ZERO
from engine.guards import ONE
from tests.adversaries.accounts import UNITS
from tests.adversaries.liquidations import House


def the_fund_pays_only_for_the_market(house: House) -> None:
    """Law 1: only a liquidation draws, and no more than the position was worth below zero."""
    for draw in house.draws:
        assert draw.amount <= draw.justified, draw
    house.draws.clear()


def money_comes_from_nothing(house: House) -> None:
    """Law 2: whatever the mark is, all equity, fees and the fund together are what was paid in."""
    held = house.fees + house.fund + house.dust - house.shortfall
    for account in house.accounts.values():
        held += account.available
        for name, stake in account.stakes.items():
            held += stake.order_margin + stake.equity(house.marks[name])
    assert held == house.paid_in


def every_fill_that_opened_is_covered(house: House) -> None:
    """Law 3, and law 7: what opened had its initial margin, and a live mark if it took."""
    for opened in house.opened:
        assert opened.margin >= opened.initial, opened
        assert opened.equity >= opened.maintenance, opened
        assert opened.is_taker_live, opened
    house.opened.clear()


def nobody_puts_a_loss_out_of_reach(house: House) -> None:
    """Law 4: what a cross loss or funding stands on does not leave."""
    assert all(free >= ZERO for free in house.left), house.left
    house.left.clear()


def nobody_is_below_zero(house: House) -> None:
    """Law 5, and that no order rests whose money is gone."""
    assert house.fund >= ZERO
    for account in house.accounts.values():
        assert min(account.available, account.owed) >= ZERO
        for stake in account.stakes.values():
            assert min(stake.order_margin, stake.position_margin) >= ZERO
            assert stake.order_short <= ZERO


def the_engine_never_believes_in_more_than_there_is(house: House) -> None:
    """Law 3: neither of the margin of a position, nor of that and what else stands behind it in a cross account."""
    for user_id, account in house.accounts.items():
        for name, stake in account.stakes.items():
            known = house.venues[name].matcher.book.accounts[user_id]
            assert known.position * house.venues[name].instrument.lot_size == stake.quantity
            if not stake.quantity:
                continue
            backing, entry = known.backing * UNITS[name] / ONE, stake.position.entry_notional
            believed = entry - backing if stake.quantity > 0 else backing - entry
            assert believed <= stake.position_margin
            if known.cross:
                cover = known.cover * UNITS[name] / ONE
                assert believed + cover <= stake.position_margin + account.cover(name, house.marks)


LAWS = (
    the_fund_pays_only_for_the_market,
    money_comes_from_nothing,
    every_fill_that_opened_is_covered,
    nobody_puts_a_loss_out_of_reach,
    nobody_is_below_zero,
    the_engine_never_believes_in_more_than_there_is,
)


def check(house: House) -> None:
    """All laws."""
    for law in LAWS:
        law(house)
