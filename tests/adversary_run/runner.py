"""Runs the program: rounds of a time in which marks move and one in which they stand, each judged when all is quiet."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

from tests.adversary_run import witness
from tests.adversary_run.actions import Bank, Colluder, Log
from tests.adversary_run.ballast import MONEY, Ballast
from tests.adversary_run.chaos import Chaos
from tests.adversary_run.findings import Finding
from tests.adversary_run.laws import Laws
from tests.adversary_run.quiet import UnquietError, quiet
from tests.exchange import BTC, MARKS, SOL, Exchange, Trader

# What the exchange of a run is started with.
FUND = 60_000
SETTINGS = {"funding_interval_seconds": 15, "insurance_fund_seed": FUND}
# Deposits at the start: some can lose all at once, some can carry a market.
SCALES = (500, 3_000, 15_000, 60_000, 60_000)
# Of each colluder, in each of the two parts of a round.
ACTIONS = 16
MOVES = 8
SHOWN = 60


@dataclass
class Report:
    """How a run went. `first_lines`: what had been done last when the first law was found broken."""

    seed: int
    rounds: int = 0
    actions: int = 0
    opened: int = 0
    draws: int = 0
    liquidations: int = 0
    deleveragings: int = 0
    findings: list[Finding] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    first_lines: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every law held, and nothing failed."""
        return not self.findings and not self.faults

    def __str__(self) -> str:
        figures = (
            f"seed {self.seed}: {self.rounds} rounds, {self.actions} actions, {self.opened} fills that opened,"
            f" {self.liquidations} liquidations, {self.deleveragings} deleveragings, {self.draws} draws on the fund"
        )
        answers = ", ".join(f"{code} {count}" for code, count in sorted(self.answers.items(), key=lambda a: -a[1]))
        broken = [f"BROKEN {finding}" for finding in self.findings] + [f"FAULT {fault}" for fault in self.faults]
        last = ["the last actions before the first of these:", *self.first_lines] if broken else []
        return "\n".join([figures, f"answers: {answers}", *broken, *last])


async def run(
    exchange: Exchange, admin: Trader, seed: int, seconds: float, say: Callable[[str], None] = print
) -> Report:
    """Let colluders loose on an exchange started with SETTINGS, for so long and two rounds at least."""
    say(f"adversaries: seed {seed}")
    await witness.install(exchange.pool)
    log = Log()
    chaos = Chaos(admin.session, {name: Decimal(MARKS[name]) for name in (BTC, SOL)}, log)
    bank = Bank(admin.session, log)
    scales = [*SCALES, MONEY, MONEY]
    traders = await asyncio.gather(*(exchange.trader(admin) for _ in scales))
    for number, (trader, scale) in enumerate(zip(traders, scales, strict=True)):
        colluder = Colluder(f"c{number}", trader.session, trader.user_id, bank, chaos.marks, log, scale)
        await bank.transfer("deposits", colluder, Decimal(scale))
        if number < len(SCALES):
            bank.colluders.append(colluder)
            colluder.chance = random.Random(f"{seed}:{colluder.name}")
            await colluder.prepare()
    ballast = Ballast(traders[-2].session, traders[-1].session, log)
    await ballast.prepare()
    laws = Laws({int(trader.user_id) for trader in traders}, Decimal(FUND))
    report = Report(seed)
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    try:
        while clock() < end or report.rounds < 2:
            await ballast.fill_up(chaos.marks)
            await _round(exchange, chaos, bank, laws, report, log)
            say(f"round {report.rounds}: {log.done} actions, {laws.opened} opened, {len(report.findings)} findings")
    except UnquietError as unquiet:
        _note(report, log, [Finding("liveness", "the exchange does not come to rest", str(unquiet))])
    report.actions, report.opened, report.draws = log.done, laws.opened, laws.draws
    report.faults, report.answers = log.faults, log.answers
    report.liquidations = await exchange.pool.fetchval("SELECT count(*) FROM risk.liquidation_queue")
    report.deleveragings = await exchange.pool.fetchval("SELECT count(*) FROM matching.deleveragings")
    return report


async def _round(exchange: Exchange, chaos: Chaos, bank: Bank, laws: Laws, report: Report, log: Log) -> None:
    _reseed(chaos, bank, f"{report.seed}:{report.rounds}:moving")
    every = ACTIONS * len(SCALES) // (MOVES * 2)
    await asyncio.gather(_act(bank, log), chaos.move(MOVES, every))
    await _judge(exchange, chaos, bank, laws, report, log, mark_stood=False)
    _reseed(chaos, bank, f"{report.seed}:{report.rounds}:standing")
    await asyncio.gather(_act(bank, log), chaos.halt(every))
    await _judge(exchange, chaos, bank, laws, report, log, mark_stood=True)
    report.rounds += 1


def _reseed(chaos: Chaos, bank: Bank, name: str) -> None:
    """So that what one does hangs on no other's choices, nor on how long a former part took."""
    chaos.chance = random.Random(f"{name}:operator")
    for colluder in bank.colluders:
        colluder.chance = random.Random(f"{name}:{colluder.name}")


async def _act(bank: Bank, log: Log) -> None:
    log.is_over = False
    await asyncio.gather(*(colluder.act(ACTIONS) for colluder in bank.colluders))
    # Whoever waits for others to get on waits for nobody any more.
    log.finish()


async def _judge(
    exchange: Exchange, chaos: Chaos, bank: Bank, laws: Laws, report: Report, log: Log, *, mark_stood: bool
) -> None:
    async with quiet(exchange.pool, chaos.marks) as conn:
        _note(report, log, await laws.broken(conn, bank.given, mark_stood=mark_stood))


def _note(report: Report, log: Log, found: list[Finding], say: Callable[[str], None] = print) -> None:
    # What stays broken is said once.
    new = [finding for finding in found if finding not in report.findings]
    if new and not report.findings:
        report.first_lines = log.lines[-SHOWN:]
    report.findings += new
    for finding in new:
        say(f"BROKEN {finding}")
