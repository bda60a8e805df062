"""Reading a recorded market."""

import gzip
from decimal import Decimal
from pathlib import Path

import pytest

from demo.messages import BestQuotes, Diff, RecordingError, Snapshot, Steps, Trade, parse_line, read_recording

STEPS = Steps(Decimal("0.1"), Decimal("0.001"))
SNAPSHOT = b'7 {"lastUpdateId":40,"E":1,"T":1,"bids":[["100.10","2.500"]],"asks":[["100.20","0.001"]]}'
DIFF = (
    b'8 {"stream":"btcusdt@depth@0ms","data":{"e":"depthUpdate","E":1,"T":1,"s":"BTCUSDT","U":41,"u":43,"pu":39,'
    b'"b":[["100.10","0.000"]],"a":[]}}'
)
TRADE = (
    b'9 {"stream":"btcusdt@trade","data":{"e":"trade","E":1,"T":5,"s":"BTCUSDT","t":6,"p":"100.20","q":"0.250",'
    b'"X":"%b","m":%b}}'
)
BEST = (
    b'10 {"stream":"btcusdt@bookTicker","data":{"e":"bookTicker","u":44,"s":"BTCUSDT","b":"100.10","B":"1.000",'
    b'"a":"100.30","A":"2.000","T":1,"E":1}}'
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SNAPSHOT, Snapshot(7, 40, ((1001, 2500),), ((1002, 1),))),
        (DIFF, Diff(8, 39, 43, ((1001, 0),), ())),
        (TRADE % (b"MARKET", b"true"), Trade(9, 5, "SELL", 1002, 250)),
        (TRADE % (b"MARKET", b"false"), Trade(9, 5, "BUY", 1002, 250)),
        (TRADE % (b"INSURANCE_FUND", b"false"), None),
        (BEST, BestQuotes(10, 44, (1001, 1000), (1003, 2000))),
    ],
)
def test_each_kind_of_line_becomes_its_message_in_ticks_and_lots(line: bytes, message: object) -> None:
    assert parse_line(line, STEPS) == message


@pytest.mark.parametrize("is_gzipped", [True, False])
def test_recordings_are_read_gzipped_or_plain(tmp_path: Path, *, is_gzipped: bool) -> None:
    content = b"\n".join([SNAPSHOT, DIFF, TRADE % (b"NA", b"true"), BEST, b""])
    path = tmp_path / "recording"
    path.write_bytes(gzip.compress(content) if is_gzipped else content)
    assert [message.at for message in read_recording(path, STEPS)] == [7, 8, 10]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (SNAPSHOT.replace(b"100.10", b"100.15"), "Expected a price in steps of 0.1, was 100.15"),
        (SNAPSHOT.replace(b"0.001", b"0.0015"), "Expected a quantity in steps of 0.001, was 0.0015"),
        (b"hello", "Expected nanoseconds"),
        (b'9 {"data":{"e":"kline"}}', "kline"),
        (b"9 {", "truncated"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "recording"
    path.write_bytes(SNAPSHOT + b"\n" + line + b"\n")
    with pytest.raises(RecordingError, match=f"recording, line 2: .*{complaint}"):
        list(read_recording(path, STEPS))


def test_a_file_that_ends_early_or_is_missing_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_bytes(gzip.compress(SNAPSHOT * 100)[:-12])
    for unreadable in (path, tmp_path / "missing"):
        with pytest.raises(RecordingError, match=r"cannot be read: [^\n]+$"):
            list(read_recording(unreadable, STEPS))
