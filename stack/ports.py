"""TCP ports of 127.0.0.1 and others, chosen now for servers that listen a little later.

Exchanges that start at the same time on one machine must not choose the same ports: one would find its figures' port
taken, or talk to the other one's Temporal. So whoever chooses a port claims it: his process holds the UDP port of the
same number, which no server of ours uses, and of which the system lets go when the process ends, however it ends.
"""

import atexit
import contextlib
import secrets
import socket

# Below those that the system gives to connections (from 32,768 on): one of them may be taken before a server listens.
FREE_PORT_MIN, FREE_PORTS = 20_000, 12_000

_claims = contextlib.ExitStack()
atexit.register(_claims.close)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    while True:
        port = FREE_PORT_MIN + secrets.randbelow(FREE_PORTS)
        with contextlib.suppress(OSError):
            _bound("127.0.0.1", port, socket.SOCK_STREAM).close()
            return port


def claim(host: str, *ports: int) -> None:
    """Keep these ports for this process until it ends.

    Raises OSError, and keeps none of them, when one is claimed by another or could not be listened on.
    """
    with contextlib.ExitStack() as held:
        for port in ports:
            held.enter_context(_bound(host, port, socket.SOCK_DGRAM))
            _bound(host, port, socket.SOCK_STREAM).close()
        _claims.push(held.pop_all())


def _bound(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    family, _, protocol, _, address = socket.getaddrinfo(host, port, type=kind)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        if kind is socket.SOCK_STREAM:
            # Connections of a server that has just ended do not keep the next one from listening.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
