"""Real engine processes for tests, forked from a server that has everything imported: fifty start in seconds."""

import asyncio
import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import uvloop

from engine.main import serve
from settings import Settings

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.engine_process"])


def _main(settings: Settings, log: Path) -> None:
    logging.basicConfig(filename=log, level="INFO", format="%(process)d %(levelname)s %(name)s %(message)s")
    uvloop.run(serve(settings))


@contextmanager
def engine_process(settings: Settings, log: Path) -> Iterator[ForkServerProcess]:
    """A running engine that appends to `log`; killed at the end if it has not ended by then."""
    process = _context.Process(target=_main, args=(settings, log))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


async def stop(process: ForkServerProcess, seconds: float = 15) -> None:
    """End it in good order."""
    process.terminate()
    await asyncio.to_thread(process.join, seconds)
    assert process.exitcode == 0, f"Expected a clean end, was {process.exitcode}"
