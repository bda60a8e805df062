"""`python -m tests.adversary_run --seed N --minutes M`: a long run against an exchange of its own."""

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

import asyncpg

from stack import servers
from tests.adversary_run.runner import SETTINGS, Report, run
from tests.exchange import running_exchange
from tests.servers import migrate, running

DATABASE = "adversaries"


async def main(seed: int, minutes: float, logs: Path | None) -> Report:
    """Start everything in a folder that is gone afterwards, and run; the logs of the processes are kept in `logs`."""
    with tempfile.TemporaryDirectory(prefix="adversaries-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        server = servers.postgres(folder, {"fsync": "off", "synchronous_commit": "off"})
        async with running([server], folder):
            connection = await asyncpg.connect(server.endpoint.url)
            await connection.execute(f"CREATE DATABASE {DATABASE}")
            await connection.close()
            url = server.endpoint.url.replace("/postgres?", f"/{DATABASE}?", 1)
            migrate(url)
            async with running_exchange(url, folder, **SETTINGS) as exchange:
                try:
                    return await run(exchange, await exchange.admin(), seed, minutes * 60)
                finally:
                    if logs is not None:
                        _keep_logs(folder, logs)


def _keep_logs(folder: Path, logs: Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, logs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.adversary_run", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--logs", type=Path, help="where to keep what the processes have logged")
    options = parser.parse_args()
    report = asyncio.run(main(options.seed, options.minutes, options.logs))
    print(report)
    sys.exit(0 if report.ok else 1)
