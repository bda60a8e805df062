"""What a person sees of a run: a live table on a terminal, otherwise a line every few seconds; the summary."""

import asyncio
from collections.abc import Sequence
from decimal import Decimal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from demo.messages import Steps
from demo.session import Outcome
from demo.tally import Latencies, Market, Tally
from demo.traders import INSTRUMENT

LIVE_SECONDS = 0.25
LINE_SECONDS = 5.0

Rows = Sequence[tuple[str, str]]


async def show(console: Console, tally: Tally, steps: Steps) -> None:
    """Show `tally` until cancelled."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(LINE_SECONDS)
            console.print(line(tally, steps), soft_wrap=True, highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(_table(rows(tally, steps)), refresh=True)
            await asyncio.sleep(LIVE_SECONDS)


def show_summary(console: Console, tally: Tally, steps: Steps, outcome: Outcome) -> None:
    """The end of a run."""
    console.print(_table([*rows(tally, steps), *comparison(tally, steps), *_audit(outcome)]))


def line(tally: Tally, steps: Steps) -> str:
    """Where a run stands, in one line."""
    return f"{tally.seconds:6.1f} s  " + "  ".join(f"{name}: {text}" for name, text in rows(tally, steps)[1:])


def rows(tally: Tally, steps: Steps) -> Rows:
    """Where a run stands."""
    refusals = ", ".join(f"{reason} {count}" for reason, count in tally.refusals.most_common()) or "none"
    return [
        ("played", f"{tally.seconds:.1f} s in {tally.turns} turns"),
        ("orders", f"{tally.quotes + tally.takers} (quotes {tally.quotes}, takers {tally.takers})"),
        ("quotes", f"{tally.open_quotes} open, {tally.amended} levels amended, {tally.cancels} cancelled"),
        ("fills", f"{tally.trades} trades"),
        ("rejected", refusals),
        ("answer", _latency(tally.answered)),
        ("order to book", _latency(tally.placed)),
        ("order to fill", _latency(tally.filled)),
        ("spread", f"{_spread(tally.ours, steps)} (replayed {_spread(tally.theirs, steps)})"),
        ("last price", f"{_price(tally.ours.last, steps)} (replayed {_price(tally.theirs.last, steps)})"),
        ("volume", f"{_volume(tally.ours, steps)} (replayed {_volume(tally.theirs, steps)})"),
    ]


def comparison(tally: Tally, steps: Steps) -> Rows:
    """How far the exchange is from the market that was replayed."""
    missing = f"{(tally.theirs.volume - tally.ours.volume) * steps.lot:f} missing"
    return [("price difference", _price_difference(tally)), ("volume ratio", f"{_ratio(tally)} ({missing})")]


def _audit(outcome: Outcome) -> Rows:
    checks = outcome.audit.checks
    failing = [(check.name, f"FAILED: {check.detail}") for check in checks if not check.ok]
    verdict = f"OK, {len(checks)} checks" if outcome.is_clean else f"FAILED, {len(failing)} of {len(checks)} checks"
    left = [("still open", f"{outcome.open_orders} orders")] if outcome.open_orders else []
    return [*left, ("audit", verdict), *failing]


def _price_difference(tally: Tally) -> str:
    ours, theirs = tally.ours.last, tally.theirs.last
    if ours is None or theirs is None:
        return "unknown: nothing traded"
    ticks = ours - theirs
    return f"{ticks:+d} ticks, {Decimal(10_000 * ticks) / theirs:+.2f} bp"


def _ratio(tally: Tally) -> str:
    if not tally.theirs.volume:
        return "unknown: nothing traded in the replayed market"
    return f"{Decimal(tally.ours.volume) / tally.theirs.volume:.4f}"


def _table(content: Rows) -> Table:
    table = Table(title=f"demo on {INSTRUMENT}", show_header=False)
    for name, text in content:
        table.add_row(name, text)
    return table


def _latency(latencies: Latencies) -> str:
    found = latencies.milliseconds()
    if not found:
        return "none yet"
    return "p50 {:.0f}  p90 {:.0f}  p99 {:.0f}  max {:.0f} ms".format(*found)


def _price(ticks: int | None, steps: Steps) -> str:
    return "none" if ticks is None else f"{ticks * steps.tick:f}"


def _spread(market: Market, steps: Steps) -> str:
    return _price(market.spread, steps)


def _volume(market: Market, steps: Steps) -> str:
    return f"{market.volume * steps.lot:f}"
