"""What the makers have to do so that their quotes show the replayed book."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from demo.book import ReplayedBook
from demo.messages import Side

# A level of the book: side and price in ticks.
Level = tuple[Side, int]


@dataclass(frozen=True, slots=True)
class Quote:
    """A maker's order in the book with the `lots` that are left of it; `leaving` when its cancellation is under way."""

    client_id: str
    side: Side
    price: int
    lots: int
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class NewQuote:
    """An order for a maker to place."""

    side: Side
    price: int
    lots: int


@dataclass(frozen=True, slots=True)
class Refresh:
    """Orders to cancel (by client id) and to place, at once; `amended` levels keep their price and change their size.

    A quote that would meet one of our own that is still there is not placed but `deferred` to the next refresh.
    """

    cancels: tuple[str, ...]
    places: tuple[NewQuote, ...]
    amended: int
    deferred: int


def target_levels(book: ReplayedBook, count: int, wanted: Mapping[Side, int]) -> dict[Level, int]:
    """Lots per level that the makers should show: the best `count` of each side, none while the book is not known.

    What takers still want to buy or sell comes on top of the best opposite level: in the replayed market a level was
    filled up again and again between two of our looks at it.
    """
    if not book.ready:
        return {}
    target: dict[Level, int] = {("BUY", price): lots for price, lots in book.bids(count)}
    target |= {("SELL", price): lots for price, lots in book.asks(count)}
    target["BUY", book.best_bid] += wanted["SELL"]
    target["SELL", book.best_ask] += wanted["BUY"]
    return target


def plan_refresh(quotes: Iterable[Quote], target: Mapping[Level, int], actions_max: int) -> Refresh:
    """The way from `quotes` (oldest first) to `target`, at most `actions_max` orders of it.

    What shows no level of the target goes first, then what is nearest to the other side. A level that grows gets one
    more order. One that shrinks loses its newest orders and gets one for what is then missing: the oldest keep their
    place in the queue.
    """
    present = list(quotes)
    shown: defaultdict[Level, list[Quote]] = defaultdict(list)
    for quote in present:
        if not quote.leaving:
            shown[quote.side, quote.price].append(quote)
    cancels: list[Quote] = []
    places: list[NewQuote] = []
    amended = 0
    for level in {**shown, **target}:
        wanted = target.get(level, 0)
        excess, missing = _adjust(shown.get(level, []), wanted)
        cancels += excess
        places += [NewQuote(*level, missing)] if missing else []
        amended += bool(wanted and level in shown and (excess or missing))
    centre = _centre(target)
    cancels.sort(key=lambda quote: ((quote.side, quote.price) in target, _distance(quote, centre)))
    places.sort(key=lambda quote: _distance(quote, centre))
    apart = [quote for quote in places if not _meets(quote, present)]
    cancels = cancels[:actions_max]
    return Refresh(
        tuple(quote.client_id for quote in cancels),
        tuple(apart[: actions_max - len(cancels)]),
        amended,
        len(places) - len(apart),
    )


def _adjust(quotes: Iterable[Quote], wanted: int) -> tuple[list[Quote], int]:
    """The quotes of a level that have to go, and the lots that are missing then."""
    missing = wanted
    excess: list[Quote] = []
    for quote in quotes:
        if excess or quote.lots > missing:
            excess.append(quote)
        else:
            missing -= quote.lots
    return excess, missing


def _centre(target: Mapping[Level, int]) -> int:
    """Twice the middle price in ticks; 0 without a target."""
    bids = [price for side, price in target if side == "BUY"]
    asks = [price for side, price in target if side == "SELL"]
    return max(bids) + min(asks) if bids and asks else 0


def _distance(quote: Quote | NewQuote, centre: int) -> int:
    """Half ticks from the middle; negative for a quote on the other side's ground."""
    return centre - 2 * quote.price if quote.side == "BUY" else 2 * quote.price - centre


def _meets(new: NewQuote, present: Iterable[Quote]) -> bool:
    if new.side == "BUY":
        return any(quote.side == "SELL" and quote.price <= new.price for quote in present)
    return any(quote.side == "BUY" and quote.price >= new.price for quote in present)
