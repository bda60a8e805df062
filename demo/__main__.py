"""`python -m demo` (`make demo ARGS="…"`): replays a market on a running exchange.

Exit status: 0, 1 when the audit is not clean or nothing traded, 2 when it could not run.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

import client
from demo.generator import BTCUSDT_20240808, generate
from demo.messages import Message, RecordingError, Steps, read_recording
from demo.screen import show, show_summary
from demo.session import DemoError, Pace, Session, read_steps
from demo.tally import Tally
from settings import Settings, complaint, revealed

RECORDING = Path(__file__).resolve().parents[2] / "shared" / "data" / "btcusdt_20240808.gz"
EXPECTED = (DemoError, RecordingError, client.ExchangeError)
# For so long a restart of the exchange is waited for.
PATIENCE_SECONDS = 30.0
# A generated market has no end of its own: this is how long the recording is.
GENERATED_SECONDS = 345.0


def main() -> int:
    """Run and show how it ended."""
    try:
        settings = Settings()
        return asyncio.run(_run(_options(settings), settings))
    except ValidationError as error:
        return _complain(complaint(error))
    except EXPECTED as error:
        return _complain(str(error))
    except ExceptionGroup as group:
        # Of tasks that fail together the first one says what was wrong.
        expected, others = group.split(EXPECTED)
        if others is not None or expected is None:
            raise
        return _complain(str(_first(expected)))


async def _run(options: argparse.Namespace, settings: Settings) -> int:
    console, tally, stop = Console(), Tally(), _stop_on_signals()
    exchange = client.Exchange(
        options.url, patience=PATIENCE_SECONDS, on_busy=lambda code: tally.refusals.update([code])
    )
    try:
        await _require_ready(exchange)
        operator = await _sign_in_operator(exchange, settings)
        steps = await read_steps(exchange)
        messages, source, seconds = _market(options, steps)
        session = Session(exchange, operator, steps, messages, tally)
        console.print(f"Replaying {source} at speed {options.speed:g} on {exchange.url}", soft_wrap=True)
        showing = asyncio.create_task(show(console, tally, steps))
        try:
            outcome = await session.run(Pace(options.speed, seconds, options.levels), stop)
        finally:
            showing.cancel()
            await asyncio.wait([showing])
    finally:
        await exchange.close()
    show_summary(console, tally, steps, outcome)
    return 0 if outcome.is_clean and tally.trades else 1


async def _require_ready(exchange: client.Exchange) -> None:
    hint = f"No exchange is ready at {exchange.url}: start it with `make run`, or name another with --url"
    try:
        if not await exchange.is_ready():
            raise DemoError(hint)
    except client.UnavailableError as error:
        raise DemoError(f"{hint} ({error})") from None


async def _sign_in_operator(exchange: client.Exchange, settings: Settings) -> client.Operator:
    email = settings.admin_email
    try:
        session = await client.sign_in(exchange, email, _admin_password(settings))
    except client.Refused as refusal:
        raise DemoError(
            f"{email} cannot sign in ({refusal}): set EXCHANGE_ADMIN_EMAIL and EXCHANGE_ADMIN_PASSWORD, or"
            " EXCHANGE_STATE_DIR to the folder of the running exchange"
        ) from None
    return session.operator()


def _admin_password(settings: Settings) -> str:
    path = settings.state_dir / "admin-password"
    try:
        return revealed(settings.admin_password) or path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise DemoError(
            f"No admin password: {path} cannot be read ({error.strerror}); set EXCHANGE_ADMIN_PASSWORD, or"
            " EXCHANGE_STATE_DIR to the folder of the running exchange"
        ) from None


def _market(options: argparse.Namespace, steps: Steps) -> tuple[Iterator[Message], str, float]:
    """The messages, what they are, and how many of their seconds to play (0: all)."""
    path: Path | None = options.data or (RECORDING if options.seed is None and RECORDING.exists() else None)
    if path is not None:
        return read_recording(path, steps), str(path), options.seconds
    seed = options.seed or 0
    return generate(BTCUSDT_20240808, seed), f"a generated market (seed {seed})", options.seconds or GENERATED_SECONDS


def _options(settings: Settings) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description="Replay a market on a running exchange.")
    parser.add_argument("--url", default=f"http://127.0.0.1:{settings.api_port}", help="the exchange (%(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="a recording (the shared one where there is one)")
    source.add_argument("--seed", type=int, help="generate a market (what happens without a recording, with seed 0)")
    parser.add_argument("--speed", type=_positive, default=1.0, help="recorded seconds per second (%(default)s)")
    parser.add_argument("--seconds", type=_not_negative, default=60.0, help="to play, recorded; 0: all (%(default)s)")
    parser.add_argument("--levels", type=int, choices=range(1, 51), default=10, metavar="1..50", help="per side (10)")
    return parser.parse_args()


def _positive(text: str) -> float:
    number = _not_negative(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more, and finite")
    return number


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _first(group: ExceptionGroup[Exception]) -> Exception:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def _complain(text: str) -> int:
    print(f"demo: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
