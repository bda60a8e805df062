"""Commands to the engine about users whose fills are guarded: random, but the same for the same seed.

Prices are near 1000 ticks, at which the leverages, bases, losses, covers and margins here are now enough and now not.
"""

import random
from functools import partial

from domain.matching import (
    Amend,
    AnyCommand,
    Cancel,
    CancelAll,
    CancelReplace,
    Deleverage,
    MarkPrice,
    MoveMargin,
    New,
    SetCover,
    SetState,
    SetTerms,
    Side,
)
from tests.engine_commands import AT, STOP_TYPES

MILLION = 1_000_000
PRICE = 1000
LEVERAGES = (2, 3, 7, 10, 25, 50, 100)
MAINTENANCES = (0, 4_000, 10_000, 25_000, 60_000, 400_000)
# Milliseconds from command to command: a mark that is not told again is soon too old.
PACE_MS = 300
TAKER_FEE = 500


def guarded_commands(count: int, seed: int) -> list[AnyCommand]:
    """A log of `count` commands of every kind, by users with terms, most of them, and some without."""
    dice = random.Random(seed)
    started: list[AnyCommand] = [_mark(dice, AT)]
    started += [_terms(dice, AT) for _ in range(3)]
    return started + [_command(dice, number) for number in range(1, count - len(started) + 1)]


def _command(dice: random.Random, number: int) -> AnyCommand:
    at = AT + PACE_MS * number
    kind = dice.random()
    if kind < 0.17:
        return _mark(dice, at)
    if kind < 0.27:
        return _what_backs(dice, at, number)
    if kind < 0.42:
        return _change(dice, at, number)
    if kind < 0.45:
        return _circumstance(dice, at)
    return guarded_order(dice, at, dice.choice([number] * 9 + [_recent(dice, number)]))


def guarded_order(dice: random.Random, at: int, order_id: int) -> New:
    """An order of any kind; limit and stop-limit orders hold open loss, stop-market orders are protected."""
    side: Side = dice.choice(("BUY", "SELL"))
    stops = dice.random() < 0.2
    order_type = dice.choice(STOP_TYPES) if stops else dice.choice(("LIMIT", "LIMIT", "LIMIT", "LIMIT", "MARKET"))
    price, has_limit, quantity = price_near(dice), "LIMIT" in order_type, dice.randint(1, 20)
    return New(
        at=at,
        order_id=order_id,
        user_id=user_of(order_id),
        side=side,
        type=order_type,
        time_in_force=dice.choice(("GTC",) * 5 + ("IOC", "FOK", "FOK")),
        price=price,
        quantity=quantity,
        stp_mode=dice.choice(("EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH")),
        liquidation=dice.random() < 0.05,
        post_only=has_limit and dice.random() < 0.05,
        reduce_only=dice.random() < 0.25,
        stop_price=price_near(dice) if stops else 0,
        working_type=dice.choice(("MARK", "MARK", "LAST")),
        basis=basis_near(dice, price),
        loss=_loss(dice) if has_limit else 0,
        protection=dice.choice((0, 3_333, 20_000, 50_000)) if stops and not has_limit else 0,
        backed=backed_of(dice, quantity),
    )


def _mark(dice: random.Random, at: int) -> MarkPrice:
    price = PRICE + dice.randint(-25, 25) if dice.random() < 0.98 else dice.randint(-1, 0)
    return MarkPrice(
        at=at, price=price, ceiling=dice.choice((0, price, price + 1, price + 1)), frozen=dice.random() < 0.1
    )


def _what_backs(dice: random.Random, at: int, number: int) -> AnyCommand:
    user_id, after_seq = dice.randint(1, 5), dice.choice((0, dice.randint(0, 3 * number), 10**9))
    kind = dice.random()
    if kind < 0.35:
        return _terms(dice, at)
    if kind < 0.7:
        return SetCover(at=at, user_id=user_id, cover=_money(dice, 1_500), after_seq=after_seq)
    return MoveMargin(at=at, user_id=user_id, amount=_money(dice, 300), after_seq=after_seq)


def _terms(dice: random.Random, at: int) -> SetTerms:
    # Often a price at which the position is worth just the fee, or a little less.
    whole = price_near(dice) * (MILLION - dice.choice((1, -1)) * TAKER_FEE) + dice.choice((0, 0, 1, -1))
    return SetTerms(
        at=at,
        user_id=dice.randint(1, 4),
        leverage=dice.choice(LEVERAGES),
        maintenance=dice.choice(MAINTENANCES),
        cross=dice.random() < 0.5,
        bankruptcy=dice.choice((0, whole, whole)),
    )


def _change(dice: random.Random, at: int, number: int) -> AnyCommand:
    recent = _recent(dice, number)
    kind, user_id = dice.random(), user_of(recent) if dice.random() < 0.95 else dice.randint(1, 4)
    if kind < 0.15:
        return Cancel(at=at, order_id=recent, user_id=user_id)
    if kind < 0.18:
        return CancelAll(at=at, user_id=user_id)
    if kind < 0.35:
        return CancelReplace(at=at, cancel_order_id=recent, order=guarded_order(dice, at, number))
    price, quantity = dice.choice((None, price_near(dice))), dice.choice((None, dice.randint(1, 20)))
    amend = partial(Amend, at=at, order_id=recent, user_id=user_id, price=price, quantity=quantity, amendment_id=number)
    return amend(basis=basis_near(dice, price or PRICE), loss=_loss(dice), backed=backed_of(dice, quantity or 5))


def _circumstance(dice: random.Random, at: int) -> AnyCommand:
    if dice.random() < 0.5:
        return Deleverage(
            at=at,
            user_id=dice.randint(1, 4),
            side=dice.choice(("BUY", "SELL")),
            price=price_near(dice),
            quantity=dice.randint(1, 30),
            counterparties=dice.sample(range(1, 6), dice.randint(1, 5)),
        )
    return SetState(at=at, state=dice.choice(("TRADING",) * 12 + ("CANCEL_ONLY", "HALTED")))


def user_of(order_id: int) -> int:
    """Who sends the order of this id: an amendment or cancel can know."""
    return order_id % 4 + 1


def price_near(dice: random.Random) -> int:
    """Near 1000: mostly so near that orders meet."""
    return PRICE + round(dice.gauss(0, 12))


def basis_near(dice: random.Random, price: int) -> int:
    """The price at which initial margin is held: none of its own, the order's, or one that binds."""
    return dice.choice((0, 0, price, price + dice.randint(-4, 20)))


def backed_of(dice: random.Random, quantity: int) -> int:
    """For how many lots there is initial margin: all, as most often and left out, none, a part, or all, in a number."""
    return dice.choice((-1, -1, -1, 0, dice.randint(0, quantity), quantity))


def _loss(dice: random.Random) -> int:
    return dice.choice((0, 0, 1, 5, dice.randint(0, 40)))


def _money(dice: random.Random, most: int) -> int:
    """Millionths of a tick times a lot; around zero, and not even whole lots' worth."""
    return round(dice.gauss(0, most) * MILLION) + dice.randint(-3, 3)


def _recent(dice: random.Random, number: int) -> int:
    return dice.randint(max(1, number - 25), number)
