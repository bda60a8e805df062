"""`python -m demo` where it cannot run, and what it shows where it can."""

import os
import subprocess
import sys
from decimal import Decimal

import pytest

from demo.messages import Steps
from demo.screen import comparison, line
from demo.tally import Market, Tally
from stack.ports import free_port
from tests.servers import ROOT

STEPS = Steps(Decimal("0.1"), Decimal("0.001"))


def demo(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EXCHANGE_")}
    command = [sys.executable, "-m", "demo", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment | settings, capture_output=True, text=True, check=False, timeout=30
    )


def test_without_an_exchange_it_says_how_to_start_one() -> None:
    outcome = demo("--url", f"http://127.0.0.1:{free_port()}")
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "make run" in outcome.stderr


@pytest.mark.parametrize("arguments", [["--speed", "0"], ["--speed", "nan"], ["--seconds", "-1"], ["--levels", "0"]])
def test_impossible_options_are_refused(arguments: list[str]) -> None:
    outcome = demo(*arguments)
    assert outcome.returncode == 2
    assert arguments[0] in outcome.stderr.splitlines()[-1]


def test_an_impossible_setting_is_named_in_one_line() -> None:
    outcome = demo(EXCHANGE_API_PORT="0")
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "EXCHANGE_API_PORT: " in outcome.stderr


def test_the_comparison_is_in_ticks_basis_points_and_as_a_ratio() -> None:
    tally = Tally(ours=Market(last=100_100, volume=750), theirs=Market(last=100_000, volume=1000))
    assert dict(comparison(tally, STEPS)) == {
        "price difference": "+100 ticks, +10.00 bp",
        "volume ratio": "0.7500 (0.250 missing)",
    }


def test_before_anything_traded_the_numbers_are_unknown() -> None:
    assert all("unknown" in text for _, text in comparison(Tally(), STEPS))
    assert "answer: none yet" in line(Tally(), STEPS)
