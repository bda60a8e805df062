"""What can go wrong with a call."""

from typing import Any

import httpx
import msgspec

from client.models import Order


class ExchangeError(Exception):
    """Base of what this package raises."""


class UnavailableError(ExchangeError):
    """The exchange cannot be reached, or closed a socket for good; the message says why."""


class Refused(ExchangeError):  # noqa: N818 - it is an answer rather than a fault
    """The exchange said no. `code` is stable (its OpenAPI document lists all), `members` the rest."""

    def __init__(self, status: int, code: str, detail: str, members: dict[str, Any]) -> None:
        super().__init__(f"{code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.members = members

    @property
    def work(self) -> dict[str, Any] | None:
        """What may be done instead of waiting (`client.work`), with RATE_LIMITED at a sign-in."""
        return self.members.get("work")

    @property
    def order(self) -> Order | None:
        """The first order of the same client order id, with DUPLICATE_CLIENT_ORDER_ID."""
        order = self.members.get("order")
        return None if order is None else msgspec.convert(order, Order)


def refused(answer: httpx.Response) -> Refused:
    """What an answer that is no success says; one that is no problem document counts as its status."""
    try:
        document = msgspec.json.decode(answer.content)
    except msgspec.DecodeError:
        document = None
    return refused_document(document if isinstance(document, dict) else {}, answer.status_code)


def refused_document(document: dict[str, Any], status: int) -> Refused:
    """The same for a problem document."""
    code, detail = document.get("code", f"HTTP_{status}"), document.get("detail", "")
    return Refused(document.get("status", status), str(code), str(detail), document)
