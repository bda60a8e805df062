"""Commands to the engine for tests: short to write, or random but the same for the same seed."""

import random
from typing import Any

from domain.matching import AnyCommand, Cancel, CancelAll, New, Side

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
