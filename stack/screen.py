"""What the operator sees: on a terminal a live table, elsewhere one plain line for each change."""

import sys
import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stack.supervision import Status

_STYLES = {"running": "green", "starting": "yellow", "stopping": "yellow", "stopped": "dim"}


class Screen:
    """The one place the stack writes to."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._last: dict[str, Status] = {}
        self._pids: dict[str, int] = {}
        self._restarts: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line, above the table."""
        self._console.print(Text(text))
        sys.stdout.flush()

    def show(self, statuses: Sequence[Status]) -> None:
        """Shows how the processes are."""
        for status in statuses:
            self._note(status)
        if self._live is not None:
            self._live.update(self._table(statuses), refresh=True)

    def _note(self, status: Status) -> None:
        last = self._last.get(status.name)
        if last is not None and status.pid and self._pids.get(status.name, status.pid) != status.pid:
            self._restarts[status.name] = self._restarts.get(status.name, 0) + 1
        self._last[status.name] = status
        if status.pid:
            self._pids[status.name] = status.pid
        changed = last is None or (last.state, last.pid) != (status.state, status.pid)
        if changed and self._live is None and status.state != "stopped":
            self.say(_line(status, self._restarts.get(status.name, 0)))

    def _table(self, statuses: Sequence[Status]) -> Table:
        table = Table(box=None, header_style="bold")
        table.add_column("process")
        table.add_column("pid", justify="right")
        table.add_column("state")
        table.add_column("restarts", justify="right")
        table.add_column("uptime", justify="right")
        for status in statuses:
            table.add_row(
                status.name,
                str(status.pid or ""),
                Text(status.state, style=_STYLES.get(status.state, "red")),
                str(self._restarts.get(status.name, 0)),
                _uptime(status),
            )
        return table


def _line(status: Status, restarts: int) -> str:
    pid = f" pid {status.pid}" if status.pid else ""
    again = f" restarts {restarts}" if restarts else ""
    why = f": {status.detail}" if status.state in {"backoff", "exited", "fatal"} else ""
    return f"{status.name:<9} {status.state}{pid}{again}{why}"


def _uptime(status: Status) -> str:
    if status.pid == 0:
        return ""
    seconds = max(0, int(time.time()) - status.since)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
