"""`python -m stack` (`make run`): the whole exchange in the foreground until Ctrl-C or SIGTERM."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from settings import Settings, complaint, revealed
from stack.bring_up import bring_up
from stack.ports import claim
from stack.processes import make_plan, service_environment
from stack.screen import Screen
from stack.servers import StackError
from stack.state import (
    StateFolder,
    keep_admin_password,
    keep_api_key_secrets,
    keep_internal_token,
    keep_jwt_key,
    open_state_folder,
)
from stack.supervision import RPC_ERRORS, Supervisor, start_supervisor

WATCH_SECONDS = 0.25
OPEN_FILES = 65_536


def main() -> int:
    """Runs until told to stop: 0 after a clean stop, 1 with one line on stderr when something is in the way."""
    # Whatever we and our children write is for this user only.
    os.umask(0o077)
    try:
        asyncio.run(_run(Settings()))
    except StackError as error:
        return _complain(str(error))
    except ValidationError as error:
        return _complain(complaint(error))
    return 0


def _complain(line: str) -> int:
    print(f"exchange: {line}", file=sys.stderr)
    return 1


async def _run(settings: Settings) -> None:
    try:
        claim(settings.api_host, settings.api_port)
    except OSError as error:
        address = f"{settings.api_host}:{settings.api_port}"
        advice = "Set EXCHANGE_API_HOST or EXCHANGE_API_PORT"
        raise StackError(f"The API cannot listen on {address}: {error.strerror}. {advice}") from None
    _allow_open_files()
    stop = _stop_on_signals()
    screen = Screen()
    state = open_state_folder(settings.state_dir)
    password = _admin_password(settings, state, screen)
    token = revealed(settings.internal_token) or keep_internal_token(state)
    key = settings.jwt_private_key_file or keep_jwt_key(state)
    secrets_file = settings.api_key_secrets_file or keep_api_key_secrets(state)
    plan = make_plan(settings, state)
    environment = service_environment(settings, state, plan, token, key, secrets_file)
    supervisor = await start_supervisor(state, plan.processes, environment)
    with screen:
        try:
            await _until(
                stop,
                bring_up(
                    settings, state, plan, supervisor, environment | {"EXCHANGE_ADMIN_PASSWORD": password}, screen
                ),
                _watch(supervisor, screen),
            )
        finally:
            screen.say("stopping")
            await supervisor.stop()
    screen.say("stopped")


async def _until(stop: asyncio.Event, *parts: Coroutine[None, None, None]) -> None:
    """Runs the parts until `stop` is set. Raises what a part raises; one that returns has done its part."""
    work: asyncio.Future[Any] = asyncio.gather(*parts)
    told: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    await asyncio.wait([work, told], return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        told.cancel()
        await work
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work


async def _watch(supervisor: Supervisor, screen: Screen) -> None:
    while supervisor.is_alive():
        # It answers nothing while it is on its way out, which the loop's condition then notices.
        with suppress(*RPC_ERRORS):
            screen.show(supervisor.statuses())
        await asyncio.sleep(WATCH_SECONDS)
    raise StackError("supervisord has ended, and everything with it")


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


def _admin_password(settings: Settings, state: StateFolder, screen: Screen) -> str:
    given = revealed(settings.admin_password)
    if given:
        return given
    password, is_new = keep_admin_password(state)
    if is_new:
        screen.say(
            f"admin account: {settings.admin_email}  password: {password}  (kept in {state.path}, not shown again)"
        )
    return password


def _allow_open_files() -> None:
    """Many sockets are open in an exchange; the usual limit of 1024 is for old programs, ours and the servers cope."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
