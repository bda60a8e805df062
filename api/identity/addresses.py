"""Where a connection comes from. Behind proxies that are trusted (EXCHANGE_TRUSTED_PROXIES) it is what they say."""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.types import Scope

Address = IPv4Address | IPv6Address


def client_address(scope: Scope) -> Address | None:
    """The address of the peer of a request or socket; None when it has none."""
    client = scope.get("client")
    return _parsed(client[0]) if client else None


@lru_cache(10_000)
def network_of(address: Address | None) -> str:
    """What counts as one place: an IPv4 address, or a /64 of IPv6, of which whoever has one address has all."""
    return str(ip_network((address, 64), strict=False)) if isinstance(address, IPv6Address) else str(address)


@lru_cache(10_000)
def _parsed(host: str) -> Address | None:
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None
