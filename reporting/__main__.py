"""`python -m reporting rebuild`: make the reports' read model anew, while the exchange runs or not."""

import argparse
import asyncio
import logging

from clients import open_redis
from reporting.build import Build, TrimmedStreamError, rebuild, restart_from_streams
from settings import Settings, get_settings
from storage.db import open_pool


async def run(settings: Settings, *, from_streams: bool) -> Build:
    """Rebuild from the tables, or leave it to the running worker to read all streams again."""
    pool = await open_pool(settings.require_database_url(), size_max=1, name="reporting")
    async with open_redis(settings) as redis, pool.acquire() as conn:
        return await (restart_from_streams if from_streams else rebuild)(conn, redis)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="python -m reporting", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("rebuild", help="from the tables of the services, in one transaction")
    command.add_argument(
        "--from-streams", action="store_true", help="empty it, the worker then reads the streams from their beginning"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        build = asyncio.run(run(get_settings(), from_streams=arguments.from_streams))
    except TrimmedStreamError as error:
        parser.exit(1, f"Not possible: {error}; rebuild without --from-streams\n")
    print(f"Reports are build {build.generation}, with all events up to message {build.watermark}")


if __name__ == "__main__":
    main()
