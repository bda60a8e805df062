"""Matching engines of others that install from PyPI, each driven with the same commands as ours."""

from collections.abc import Callable

from domain.matching import AnyCommand, New

# Orders that fill the book, commands to time, and the trades expected of them; operations per second.
Peer = Callable[[list[New], list[AnyCommand], int], float]
PEERS: dict[str, Peer] = {}
