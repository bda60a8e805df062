"""How many lots of a user's orders may open a position: those for which the ledger holds initial margin.

An order that can only reduce a position holds none, however it came to that: it may have been one when it was checked,
or the position may have grown since. If something else closes the position first, that order would open one with
nothing behind it. So for each side of an account the engine keeps what is *backed*: an order adds what its check held
margin for (`New.backed`), what opens uses it up, and it is never more than what the open orders of the side could open
now, since risk gives the rest back. Orders that only reduce do not count: they never open.

Lots. Only of users with terms (`engine.guards`).
"""

from collections.abc import Iterable

from domain.matching import Amended, AnyEvent, Cancelled, Expired, New, Rejected, Side
from engine.book import Account, Order


def admit(account: Account, new: New) -> None:
    """An order comes in: its lots are open, and those count that it has margin for."""
    if new.reduce_only:
        return
    _add(account, new.side, new.quantity, new.quantity if new.backed < 0 else new.backed)


def filled(account: Account, bought: int, *, reduces: bool) -> None:
    """`bought` lots (below 0: sold) of an order were filled; the position has them already."""
    position = account.position
    if bought > 0 and not reduces:
        account.bids -= bought
        account.bids_backed -= max(0, min(bought, position))
    elif bought < 0 and not reduces:
        account.asks += bought
        account.asks_backed -= max(0, min(-bought, -position))
    _clamp(account)


def fold(account: Account, event: AnyEvent, backed: int) -> None:
    """What an event that is no trade says of the user's open lots. `backed`: how many lots more an amended order has
    margin for; below 0, all."""
    if isinstance(event, Cancelled | Expired | Rejected):
        if not event.reduce_only:
            _add(account, event.side, -event.quantity, 0)
    elif isinstance(event, Amended) and not event.reduce_only:
        more = event.quantity - event.old_quantity
        _add(account, event.side, more, max(0, more) if backed < 0 else backed)


def begin(account: Account, orders: Iterable[Order]) -> None:
    """Count what is open of a user who had no terms so far; all of it is taken to be backed."""
    account.bids = account.asks = account.bids_backed = account.asks_backed = 0
    for order in orders:
        if not order.new.reduce_only:
            _add(account, order.new.side, order.remaining, order.remaining)


def backed(account: Account, side: Side) -> int:
    """How many lots of one side may open."""
    return account.bids_backed if side == "BUY" else account.asks_backed


def fully_backed(account: Account, side: Side, *, may_shrink: bool) -> bool:
    """Whether every order of one side may open what it could; `may_shrink`: also if the position is gone by then."""
    if side == "BUY":
        return account.bids_backed >= account.bids - (0 if may_shrink else max(0, -account.position))
    return account.asks_backed >= account.asks - (0 if may_shrink else max(0, account.position))


def _add(account: Account, side: Side, lots: int, more_backed: int) -> None:
    if side == "BUY":
        account.bids += lots
        account.bids_backed += more_backed
    else:
        account.asks += lots
        account.asks_backed += more_backed
    _clamp(account)


def _clamp(account: Account) -> None:
    position = account.position
    account.bids_backed = max(0, min(account.bids_backed, account.bids - max(0, -position)))
    account.asks_backed = max(0, min(account.asks_backed, account.asks - max(0, position)))
