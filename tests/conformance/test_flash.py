"""The replay of the public benchmark's messages: the same report stream from the engine and from the slow book."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from bench.flash import (
    CANCEL,
    MODIFY,
    NEW,
    Message,
    apply_all,
    read_messages,
    replay,
    reports,
    steps_of,
    write_messages,
)
from domain.instruments import SHIPPED
from engine.matcher import Matcher
from tests.conformance.messages import message_file
from tests.reference_book import ReferenceMatcher

# Of the file and of its report stream, the latter from the reference book.
FILE_HASH = "42bb68b642d093ca08681aedd38679bddc83bf4f36b5aad4652cf2a01ab50094"
REPORT_HASH = "c31b53bd70a195093598b1b40fabdd04a4ff073122eddd081d0605e27aa6b567"


def stream(messages: list[Message]) -> list[str]:
    outcomes = apply_all(Matcher(SHIPPED[0]).apply, map(steps_of, messages))
    return [line for message, events in zip(messages, outcomes, strict=True) for line in reports(message, events)]


def new(sequence: int, order_id: int, side: int, quantity: int, price: int, ioc: int = 0) -> Message:
    return Message(NEW, side, ioc, 0, quantity, sequence, order_id, price, 0)


def test_the_message_file_is_the_same_on_every_machine() -> None:
    assert hashlib.sha256(message_file()).hexdigest() == FILE_HASH


def test_the_reference_book_gives_the_committed_hash() -> None:
    assert replay(message_file(), ReferenceMatcher(SHIPPED[0]).apply).report_hash == REPORT_HASH


def test_the_command_line_replays_through_the_engine_to_the_committed_hash(tmp_path: Path) -> None:
    file, expected = tmp_path / "own.bin", tmp_path / "hashes.txt"
    file.write_bytes(message_file())
    expected.write_text(f"{REPORT_HASH}  own.txt\n")
    command = [sys.executable, "-m", "bench.flash", "--expected", str(expected), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{REPORT_HASH}  own  5,000 messages")
    assert done.stdout.rstrip().endswith("equal")

    expected.write_text(f"{'0' * 64}  own.txt\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("DIFFERENT")


def test_the_message_file_has_every_kind_of_report_in_number() -> None:
    lines = stream(list(read_messages(message_file())))
    for kind in "012345":
        assert sum(line.startswith(kind) for line in lines) > 50, kind


def test_a_modify_loses_its_place_and_may_trade() -> None:
    messages = [
        new(0, 1, 0, 10, 100),
        new(1, 2, 0, 10, 100),
        Message(MODIFY, 0, 0, 0, 10, 2, 1, 100, 0),
        new(3, 3, 1, 10, 100, ioc=1),
        new(4, 4, 1, 5, 103),
        Message(MODIFY, 0, 0, 0, 7, 5, 1, 104, 0),
    ]
    assert stream(messages) == [
        "0,0,0,1,100,10",
        "0,1,0,2,100,10",
        "3,2,0,1,100,10",
        "0,3,1,3,100,10",
        "1,3,100,10,2,3",
        "0,4,1,4,103,5",
        "1,5,103,5,4,1",
        "3,5,0,1,104,7",
    ]


def test_the_rest_of_an_ioc_order_is_cancelled_and_what_is_gone_is_refused() -> None:
    messages = [
        new(0, 1, 1, 4, 100),
        new(1, 2, 0, 9, 101, ioc=1),
        Message(CANCEL, 0, 0, 0, 0, 2, 1, 0, 0),
        Message(MODIFY, 0, 0, 0, 5, 3, 2, 101, 0),
    ]
    assert stream(messages) == ["0,0,1,1,100,4", "0,1,0,2,101,9", "1,1,100,4,1,2", "2,1,0,2,101", "4,2,1", "5,3,2"]


def test_messages_that_the_workload_leaves_open_are_refused() -> None:
    with pytest.raises(ValueError, match="was one in the book"):
        stream([new(0, 1, 0, 10, 100), new(1, 1, 0, 10, 99)])
    with pytest.raises(ValueError, match="INVALID_ORDER"):
        stream([new(0, 1, 0, 0, 100)])
    with pytest.raises(ValueError, match="was Message"):
        stream([Message(3, 0, 0, 0, 1, 0, 1, 100, 0)])


def test_a_file_that_is_cut_short_or_another_is_refused() -> None:
    data = write_messages([new(0, 1, 0, 10, 100)])
    for wrong in (data[:-1], b"x" + data[1:], data + data[16:]):
        with pytest.raises(ValueError, match="whole message file"):
            read_messages(wrong)
