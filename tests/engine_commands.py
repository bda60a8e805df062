"""Commands to the engine for tests: short to write, or random but the same for the same seed."""

import random
from typing import Any

from domain.matching import (
    Amend,
    AnyCommand,
    Cancel,
    CancelAll,
    CancelReplace,
    Deleverage,
    MarkPrice,
    New,
    OrderType,
    SetState,
    Side,
)

STOP_TYPES: list[OrderType] = ["STOP_LIMIT", "STOP_MARKET", "TAKE_PROFIT_LIMIT", "TAKE_PROFIT_MARKET"]
AT = 1_700_000_000_000


def new(order_id: int, side: Side, price: int, quantity: int, **terms: Any) -> New:
    """A LIMIT GTC order of user `order_id` (everybody is somebody else), unless `terms` say otherwise."""
    defaults: dict[str, Any] = {"at": AT, "user_id": order_id, "type": "LIMIT", "time_in_force": "GTC"}
    return New(order_id=order_id, side=side, price=price, quantity=quantity, **(defaults | terms))


def random_commands(count: int, seed: int) -> list[AnyCommand]:
    """A log of `count` commands with crossing orders of every kind and cancels around one price."""
    dice = random.Random(seed)
    return [_random_command(dice, order_id) for order_id in range(1, count + 1)]


def _random_command(dice: random.Random, order_id: int) -> AnyCommand:
    at, user_id = AT + order_id, dice.randint(1, 6)
    kind = dice.random()
    if kind < 0.2:
        return Cancel(at=at, order_id=dice.randint(max(1, order_id - 30), order_id), user_id=user_id)
    if kind < 0.22:
        return CancelAll(at=at, user_id=user_id)
    return New(
        at=at,
        order_id=order_id,
        user_id=user_id,
        side=dice.choice(["BUY", "SELL"]),
        type=dice.choice(["LIMIT", "LIMIT", "LIMIT", "MARKET"]),
        time_in_force=dice.choice(["GTC", "GTC", "GTC", "IOC", "FOK"]),
        price=600_000 + dice.randint(-10, 10),
        quantity=dice.randint(1, 20),
        stp_mode=dice.choice(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]),
        liquidation=dice.random() < 0.1,
    )


def any_commands(count: int, seed: int) -> list[AnyCommand]:
    """A log of `count` commands of every kind, a few of them malformed: stops, reduce-only, amendments, states."""
    dice = random.Random(seed)
    return [_any_command(dice, order_id) for order_id in range(1, count + 1)]


def _any_command(dice: random.Random, order_id: int) -> AnyCommand:
    if dice.random() < 0.3:
        return _any_change(dice, order_id)
    if dice.random() < 0.14:
        return _any_circumstance(dice, AT + order_id)
    return _any_new(dice, dice.choice([order_id] * 9 + [_recent(dice, order_id)]))


def _any_change(dice: random.Random, order_id: int) -> AnyCommand:
    recent = _recent(dice, order_id)
    at, user_id = AT + order_id, _user_of(recent) if dice.random() < 0.95 else dice.randint(1, 4)
    kind = dice.random()
    if kind < 0.3:
        return Cancel(at=at, order_id=recent, user_id=user_id)
    if kind < 0.33:
        return CancelAll(at=at, user_id=user_id)
    if kind < 0.5:
        return CancelReplace(at=at, cancel_order_id=recent, order=_any_new(dice, order_id))
    price, quantity = dice.choice([None, _price(dice)]), dice.choice([None, dice.randint(1, 20), dice.randint(-1, 3)])
    amendment_id = dice.choice([0, order_id])
    return Amend(at=at, order_id=recent, user_id=user_id, price=price, quantity=quantity, amendment_id=amendment_id)


def _any_circumstance(dice: random.Random, at: int) -> AnyCommand:
    if dice.random() < 0.5:
        return MarkPrice(at=at, price=_price(dice))
    if dice.random() < 0.3:
        return Deleverage(
            at=at,
            user_id=dice.randint(1, 4),
            side=dice.choice(["BUY", "SELL"]),
            price=_price(dice),
            quantity=dice.randint(-1, 30),
            counterparties=dice.sample(range(1, 6), dice.randint(0, 5)),
        )
    if dice.random() < 0.9:
        return SetState(at=at, state="TRADING")
    return SetState(at=at, state=dice.choice(["CANCEL_ONLY", "HALTED"]))


def _any_new(dice: random.Random, order_id: int) -> New:
    return New(
        at=AT + order_id,
        order_id=order_id,
        user_id=_user_of(order_id),
        side=dice.choice(["BUY", "SELL"]),
        type=dice.choice(["LIMIT", "LIMIT", "LIMIT", "MARKET"]) if dice.random() < 0.7 else dice.choice(STOP_TYPES),
        time_in_force=dice.choice(["GTC", "GTC", "GTC", "GTC", "IOC", "FOK"]),
        price=_price(dice),
        quantity=dice.randint(0, 20) if dice.random() < 0.1 else dice.randint(1, 20),
        stp_mode=dice.choice(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]),
        liquidation=dice.random() < 0.1,
        post_only=dice.random() < 0.1,
        reduce_only=dice.random() < 0.35,
        stop_price=dice.choice([0, *[_price(dice)] * 9]),
        working_type=dice.choice(["MARK", "LAST"]),
    )


def _recent(dice: random.Random, order_id: int) -> int:
    return dice.randint(max(1, order_id - 25), order_id)


def _user_of(order_id: int) -> int:
    return order_id % 4 + 1


def _price(dice: random.Random) -> int:
    return 100 + dice.randint(-8, 8) if dice.random() < 0.98 else dice.randint(-1, 0)
