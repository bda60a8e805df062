"""`python -m bench.flash FILE...`: replay message files of the public matching-engine benchmark through the matcher.

Prints for each file the SHA-256 of the report stream and the rate. `docs/conformance.md` says where such files come
from and how that workload's rules are mapped to ours. Prices are ticks, quantities lots.
"""

import argparse
import hashlib
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from domain.instruments import SHIPPED
from domain.matching import AnyCommand, AnyEvent, Cancel, Cancelled, Expired, New, Rejected, Side, Trade
from engine.matcher import Matcher

Apply = Callable[[AnyCommand], list[AnyEvent]]
# What one message asks for: a command, and for a modify the one to follow if the first had an effect.
Steps = tuple[AnyCommand, New | None]

HEADER = struct.Struct("<QII")  # magic, version, number of records
RECORD = struct.Struct("<BBBBIQQqq")  # the fields of `Message`
MAGIC, VERSION = 0x4D4542575F303031, 1
NEW, CANCEL, MODIFY = 0, 1, 2
SIDES: tuple[Side, Side] = ("BUY", "SELL")
# Messages are decoded, applied and reported in runs of this many, about as the engine takes them from its log.
RUN_MESSAGES = 1_000


class Message(NamedTuple):
    """One record of a message file. `sequence` counts messages from 0; `side` is 0 to buy, 1 to sell."""

    kind: int
    side: int
    ioc: int
    padding: int
    quantity: int
    sequence: int
    order_id: int
    price: int
    reserved: int


@dataclass
class Replay:
    """The outcome of one file: the hash of its report stream, and the time spent in the matcher alone."""

    report_hash: str
    messages: int
    reports: int
    seconds: float


def read_messages(data: bytes) -> Iterator[Message]:
    """The records of a message file. Raises ValueError if it is not one, or is not whole."""
    magic, version, count = HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION) or len(data) != HEADER.size + count * RECORD.size:
        raise ValueError(
            f"Expected a whole message file of version {VERSION}, was {len(data)} bytes from {data[:16]!r}"
        )
    return map(Message._make, RECORD.iter_unpack(memoryview(data)[HEADER.size :]))


def write_messages(messages: list[Message]) -> bytes:
    """The bytes of a message file."""
    return HEADER.pack(MAGIC, VERSION, len(messages)) + b"".join(RECORD.pack(*message) for message in messages)


def replay(data: bytes, apply: Apply) -> Replay:
    """Apply every message of a file in order. Raises ValueError at a message that the workload's rules leave open."""
    messages = read_messages(data)
    digest = hashlib.sha256()
    message_count = report_count = 0
    seconds = 0.0
    while run := list(islice(messages, RUN_MESSAGES)):
        steps = [steps_of(message) for message in run]
        begin = time.perf_counter()
        outcomes = apply_all(apply, steps)
        seconds += time.perf_counter() - begin
        lines = [line for message, events in zip(run, outcomes, strict=True) for line in reports(message, events)]
        if report_count:
            digest.update(b"\n")
        digest.update("\n".join(lines).encode())
        message_count += len(run)
        report_count += len(lines)
    return Replay(digest.hexdigest(), message_count, report_count, seconds)


def steps_of(message: Message) -> Steps:
    """A message in our commands. Every order is a user of its own: that workload has no users and no self-trades."""
    at, order_id = message.sequence, message.order_id
    if message.kind == NEW:
        return _new(message), None
    cancel = Cancel(at=at, order_id=order_id, user_id=order_id)
    if message.kind == CANCEL:
        return cancel, None
    if message.kind == MODIFY:
        return cancel, _new(message)
    raise ValueError(f"Expected a new order, a cancel or a modify, was {message}")


def apply_all(apply: Apply, steps: Iterable[Steps]) -> list[list[AnyEvent]]:
    """The events of every message. This, and nothing else, is timed."""
    outcomes = []
    for command, reinsert in steps:
        events = apply(command)
        if reinsert is not None and events:
            events += apply(reinsert)
        outcomes.append(events)
    return outcomes


def reports(message: Message, events: list[AnyEvent]) -> list[str]:
    """The canonical lines of one message: acknowledgement, trades in order of matching, end of a remainder."""
    _, side, _, _, quantity, sequence, order_id, price, _ = message
    if message.kind == CANCEL:
        return [_cancelled(sequence, event) for event in events if type(event) is Cancelled] or [
            f"4,{sequence},{order_id}"
        ]
    if not events:
        if message.kind == MODIFY:
            return [f"5,{sequence},{order_id}"]
        raise ValueError(f"Expected a new order id, was one in the book: {message}")
    trades, ends = [], []
    for event in events:
        if type(event) is Trade:
            trades.append(f"1,{sequence},{event.price},{event.quantity},{event.maker_order_id},{event.taker_order_id}")
        elif type(event) is Expired:
            ends.append(_cancelled(sequence, event))
        elif type(event) is Rejected:
            raise ValueError(f"Expected a valid order, was {message}: {event.reason}")
    if message.kind == MODIFY:
        return [*trades, f"3,{sequence},{side},{order_id},{price},{quantity}"]
    return [f"0,{sequence},{side},{order_id},{price},{quantity}", *trades, *ends]


def _new(message: Message) -> New:
    return New(
        at=message.sequence,
        order_id=message.order_id,
        user_id=message.order_id,
        side=SIDES[message.side],
        type="LIMIT",
        time_in_force="IOC" if message.ioc else "GTC",
        price=message.price,
        quantity=message.quantity,
    )


def _cancelled(sequence: int, event: Cancelled | Expired) -> str:
    return f"2,{sequence},{SIDES.index(event.side)},{event.order_id},{event.price}"


def published_hashes(path: Path) -> dict[str, str]:
    """Hash by name (without its ending) from lines of `<SHA-256>  <name>`."""
    pairs = (line.split() for line in path.read_text().splitlines() if line.strip())
    return {Path(name).stem: report_hash for report_hash, name in pairs}


def main() -> None:
    """Entry. Ends with 1 if an expected hash is not met."""
    parser = argparse.ArgumentParser(prog="python -m bench.flash", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="message files")
    parser.add_argument("--expected", type=Path, help="file of '<SHA-256>  <name>' lines; a name is a FILE's stem")
    arguments = parser.parse_args()
    expected = published_hashes(arguments.expected) if arguments.expected else None
    differing = 0
    for path in arguments.files:
        result = replay(path.read_bytes(), Matcher(SHIPPED[0]).apply)
        verdict = ""
        if expected is not None:
            wanted = expected.get(path.stem, "")
            differing += wanted != result.report_hash
            verdict = "equal" if wanted == result.report_hash else "DIFFERENT" if wanted else "NOT IN THE LIST"
        rate = result.messages / result.seconds
        print(f"{result.report_hash}  {path.stem}  {result.messages:,} messages  {rate:,.0f}/s  {verdict}", flush=True)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
