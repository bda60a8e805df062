"""A message file of our own making in the format of the public benchmark: the same bytes for the same seed.

`python -m tests.conformance.messages FILE` writes it.
"""

import random
import sys
from pathlib import Path

from bench.flash import CANCEL, MODIFY, NEW, Message, write_messages

SEED, COUNT = 20_240_611, 5_000
MID_TICKS = 30_000


def message_file(seed: int = SEED, count: int = COUNT) -> bytes:
    """The bytes of a file of `count` messages about one price: every kind, ids that are gone and ids used again."""
    dice = random.Random(seed)
    messages: list[Message] = []
    order_id = 0
    for sequence in range(count):
        kind = dice.choices((NEW, CANCEL, MODIFY), weights=(50, 35, 15))[0]
        # Mostly orders that may still be there; now and then one long gone or never seen.
        meant = max(1, order_id - dice.randrange(30)) if dice.random() < 0.95 else dice.randrange(1, 2 * order_id + 2)
        if kind == NEW:
            order_id += 1
            meant = order_id
        messages.append(_message(dice, kind, sequence, meant))
    return write_messages(messages)


def _message(dice: random.Random, kind: int, sequence: int, order_id: int) -> Message:
    # Odd orders sell and even ones buy, whatever is done to them later. The prices of the sides overlap by a few ticks.
    side = order_id % 2
    distance = dice.randrange(-3, 12)
    return Message(
        kind=kind,
        side=side,
        ioc=int(kind == NEW and dice.random() < 0.15),
        padding=0,
        quantity=dice.randrange(1, 101),
        sequence=sequence,
        order_id=order_id,
        price=MID_TICKS + distance if side else MID_TICKS - distance,
        reserved=0,
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(message_file())
