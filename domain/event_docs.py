"""`docs/events.md`, made from the catalogue: `python -m domain.event_docs > docs/events.md`.

The classes say what an event means and which fields it has; here stand who writes it, who acts on it, what the fields
mean, and an example of each as a running exchange wrote it. A test holds the page, and these tables, to the classes.
"""

from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec

from domain.events import CATALOGUE, SCHEMA_VERSION, USER_PUSH_TOPIC, BusinessEvent


class Described(NamedTuple):
    """Who writes an event and who acts on it; `example` is its JSON."""

    emitted_by: str
    acted_on_by: str
    example: str


REPORTS = "The reports read the stream"
DEPTH = "The depth of the market process, through the engine's log"
NOBODY = "Nobody inside the exchange"

DESCRIBED: dict[str, Described] = {
    "AuthSessionRevoked": Described(
        "auth: logout, password change, lock, a refresh token used twice",
        "The gateway and the sockets, at once, over the Redis channel `auth:revoked`",
        '{"sessionId":"83f2892a-0877-4dd2-bf48-5e26da380286","userId":"1010","reason":"LOGOUT"}',
    ),
    "OrderSubmitted": Described(
        "orders: intake",
        "Risk: the next step of the placement saga is `risk.check_orders`",
        '{"orderId":5,"userId":"1007","instrumentId":"BTC-USDT-PERP","side":"SELL","type":"LIMIT","price":"60000",'
        '"quantity":"0.1"}',
    ),
    "MarginPreCheckPassed": Described(
        "risk: `risk.check_orders`",
        "Ledger: the next step of the saga is `ledger.freeze_funds`",
        '{"orderId":5,"requiredMargin":"603"}',
    ),
    "MarginPreCheckFailed": Described(
        "risk: `risk.check_orders`",
        "Orders: `orders.accept` ends the order as FAILED",
        '{"orderId":10,"reason":"INSUFFICIENT_MARGIN"}',
    ),
    "FundsFrozen": Described(
        "ledger: `ledger.freeze_funds`",
        "Orders: the next step of the saga is `orders.accept`",
        '{"orderId":5,"userId":"1007","asset":"USDT","amount":"603"}',
    ),
    "FundsFrozenFailed": Described(
        "ledger: `ledger.freeze_funds`",
        "Risk: `risk.release_orders` takes the order out of the exposure; it is checked once more, then FAILED",
        '{"orderId":27,"userId":"1016","asset":"USDT","reason":"INSUFFICIENT_FUNDS"}',
    ),
    "FundsUnfrozen": Described(
        "ledger: `ledger.settle`, `ledger.unfreeze_funds`",
        NOBODY,
        '{"orderId":1,"userId":"1001","asset":"USDT","amount":"301.35523"}',
    ),
    "OrderCreated": Described(
        "orders: `orders.accept`; liquidation: `risk.submit_liquidation`",
        "Engine: the command NEW, written in the same transaction",
        '{"orderId":5,"userId":"1007","instrumentId":"BTC-USDT-PERP","side":"SELL","type":"LIMIT","price":"60000",'
        '"quantity":"0.1","isLiquidation":false}',
    ),
    "OrderCancelRequested": Described(
        "orders: `orders.request_cancels`, `orders.cancel_uncovered`, the sweeper, liquidation",
        "Engine: the command CANCEL, written in the same transaction",
        '{"orderId":5}',
    ),
    "OrderAmendRequested": Described(
        "orders: `orders.accept`",
        "Engine: the command AMEND, written in the same transaction",
        '{"orderId":11,"amendmentId":12,"price":"2991","quantity":null}',
    ),
    "OrderPlaced": Described(
        "engine",
        f"{DEPTH}; orders: `orders.apply_events`",
        '{"orderId":5,"instrumentId":"BTC-USDT-PERP","side":"SELL","price":"60000","quantity":"0.1"}',
    ),
    "OrderFilled": Described(
        "engine",
        "Orders: `orders.apply_events`",
        '{"orderId":2,"instrumentId":"BTC-USDT-PERP","userId":"1002"}',
    ),
    "OrderCancelled": Described(
        "engine",
        f"{DEPTH}; settlement: `risk.apply_events`, `ledger.settle` (gives the money back), `orders.apply_events`",
        '{"orderId":5,"instrumentId":"BTC-USDT-PERP","userId":"1007","status":"CANCELLED","reason":"USER_REQUEST",'
        '"remainingQuantity":"0.06"}',
    ),
    "OrderRejected": Described(
        "engine",
        "Settlement: `risk.apply_events`, `ledger.settle` (gives the money back), `orders.apply_events`",
        '{"orderId":13,"instrumentId":"ETH-USDT-PERP","userId":"1010","reason":"POST_ONLY_WOULD_CROSS"}',
    ),
    "OrderAmended": Described(
        "engine: an amendment, or a reduce-only order that became larger than the position",
        f"{DEPTH}; settlement: `risk.apply_events`, `ledger.settle`, `orders.apply_events`",
        '{"orderId":11,"instrumentId":"ETH-USDT-PERP","userId":"1009","side":"BUY","price":"2991","quantity":"2",'
        '"reason":"USER_REQUEST"}',
    ),
    "OrderAmendRejected": Described(
        "engine",
        "Settlement: `risk.apply_events`, `ledger.settle` (gives back what the amendment held), `orders.apply_events`",
        '{"orderId":16,"instrumentId":"ETH-USDT-PERP","userId":"1009","amendmentId":17,'
        '"reason":"POST_ONLY_WOULD_CROSS"}',
    ),
    "OrderTriggered": Described(
        "engine",
        NOBODY,
        '{"orderId":18,"instrumentId":"ETH-USDT-PERP","userId":"1010"}',
    ),
    "InstrumentStateChanged": Described(
        "engine, after an operator's halt, cancel-only or resume",
        NOBODY,
        '{"instrumentId":"ETH-USDT-PERP","state":"HALTED"}',
    ),
    "TradeExecuted": Described(
        "engine",
        "Settlement: `positions.apply_trades`, `risk.apply_events`, `ledger.settle`, `orders.apply_events`; market:"
        f" trades, tickers, klines, through the engine's log. {REPORTS}",
        '{"tradeId":8193,"instrumentId":"BTC-USDT-PERP","buyOrderId":7,"sellOrderId":5,"price":"60000",'
        '"quantity":"0.04","buyerUserId":"1008","sellerUserId":"1007","takerSide":"BUY","makerFee":"0.48",'
        '"takerFee":"1.2","fee":"1.68","executedAt":"2026-12-01T04:25:58.157Z"}',
    ),
    "LedgerEntryCreated": Described(
        "ledger: every step that books on a user",
        f"Positions: `positions.confirm`, `positions.confirm_funding`, which read the ledger's views. {REPORTS}",
        '{"userId":"1007","instrumentId":"BTC-USDT-PERP","asset":"USDT","deltaAvailable":"-0.48","deltaReserved":"0",'
        '"balanceAfter":"9396.52","entryType":"FEE","referenceType":"TRADE","referenceId":"8193"}',
    ),
    "InsuranceFundRequired": Described(
        "ledger: `ledger.settle`, `ledger.settle_funding`",
        f"{NOBODY}: the same transaction draws on the fund",
        '{"userId":"1018","instrumentId":"SOL-USDT-PERP","asset":"USDT","amount":"26.74"}',
    ),
    "PositionUpdated": Described(
        "positions: `positions.confirm`, `positions.adopt_margin`, `positions.confirm_funding`; the risk monitor",
        f"{NOBODY}: the risk monitor reads the position's row",
        '{"userId":"1007","instrumentId":"BTC-USDT-PERP","side":"SHORT","quantity":"0.04","entryPrice":"60000",'
        '"markPrice":"60000","unrealizedPnl":"0","liquidationPrice":"65671.64179104"}',
    ),
    "PositionClosed": Described(
        "positions: `positions.confirm`",
        NOBODY,
        '{"userId":"1011","instrumentId":"SOL-USDT-PERP","realizedPnl":"-1500"}',
    ),
    "MarkPriceUpdated": Described(
        "market, every `EXCHANGE_MARK_PRICE_INTERVAL_SECONDS`",
        "Risk monitor and order intake, which read the same figures in Redis; engine: the command MARK_PRICE",
        '{"instrumentId":"BTC-USDT-PERP","indexPrice":"59998.4","markPrice":"59998.4","fairPrice":"59998.4",'
        '"premiumIndex":"0","fundingBasis":"0","calculatedAt":"2026-12-01T04:23:09.326Z","source":"simulated",'
        '"isFrozen":false,"frozenSince":null}',
    ),
    "FundingRateUpdated": Described(
        "market, every `EXCHANGE_FUNDING_INTERVAL_SECONDS`",
        "Ledger: `ledger.open_funding` reads the same row of `market.v_funding_rates`",
        '{"instrumentId":"BTC-USDT-PERP","rate":"0.000000208333","effectiveAt":"2026-12-01T04:24:00.000Z",'
        '"source":"simulated"}',
    ),
    "KlineClosed": Described(
        "market",
        f"{NOBODY}: clients hear of it on the channel `kline` of `/ws/market`",
        '{"instrumentId":"SOL-USDT-PERP","period":"1m","open":"150","high":"150","low":"134.8","close":"134.8",'
        '"volume":"300","timestamp":"2026-12-01T04:30:00.000Z"}',
    ),
    "RiskUpdate": Described(
        "positions: with every PositionUpdated; the risk monitor: warning, takeover, end of a liquidation",
        f"{NOBODY}: a liquidation is started by its row in `risk.liquidation_queue`",
        '{"userId":"1007","instrumentId":"BTC-USDT-PERP","marginRatio":"0.1","liquidationPrice":"65671.64179104",'
        '"status":"OPEN"}',
    ),
    "LiquidationTriggered": Described(
        "risk monitor",
        f"The risk monitor starts `LiquidationWorkflow`, by the row of the same transaction. {REPORTS}",
        '{"positionId":"7","userId":"1011","instrumentId":"SOL-USDT-PERP","reason":"MARGIN_RATIO","liquidationId":1}',
    ),
    "AutoDeleveraged": Described(
        "positions: `positions.apply_trades`",
        REPORTS,
        '{"userId":"1012","instrumentId":"SOL-USDT-PERP","quantity":"100","price":"135","side":"BUY","tradeId":7171,'
        '"bankruptUserId":"1011","executedAt":"2026-12-01T04:27:30.692Z"}',
    ),
}

# By field, where it means the same in every event …
FIELDS: dict[str, str] = {
    "amendment_id": "from the same numbers as orders",
    "amount": "in `asset`",
    "asset": "for example USDT",
    "balance_after": "what the user has available afterwards, in `asset`",
    "bankrupt_user_id": "whose position was closed in this way",
    "buy_order_id": "",
    "buyer_user_id": "",
    "calculated_at": "",
    "close": "the last price",
    "delta_available": "what the user's available money changes by, in `asset`",
    "delta_reserved": "what the user's reserved money changes by, in `asset`",
    "effective_at": "the end of the interval",
    "entry_price": "average, quote per base; null when flat",
    "entry_type": (
        "DEPOSIT, WITHDRAWAL, ORDER_MARGIN, MARGIN, FEE, REALIZED_PNL, FUNDING, INSURANCE_FUND, SHORTFALL,"
        " LIQUIDATION_FEE or LIQUIDATION_SURPLUS"
    ),
    "executed_at": "",
    "fair_price": "middle of what it costs to buy and to sell a fixed amount in the book, quote per base",
    "fee": "of both sides together, in quote",
    "frozen_since": "since when there has been no usable index; null when there is one",
    "funding_basis": "the part of the funding rate that is still to be paid until the next funding time, a fraction",
    "high": "",
    "index_price": "quote per base",
    "instrument_id": "",
    "is_frozen": "true: no usable index, this is the last mark price before",
    "is_liquidation": "true: placed by a liquidation",
    "liquidation_id": "of `risk.liquidation_queue`",
    "liquidation_price": "quote per base; null when flat, and of a cross position, which depends on the whole account",
    "low": "",
    "maker_fee": "in quote",
    "margin_ratio": "equity as a fraction of the position's value at the mark; null as `liquidationPrice`",
    "mark_price": "quote per base; null while there is none",
    "open": "the first price",
    "order_id": "",
    "period": "1m, 5m, 15m, 1h, 4h or 1d",
    "position_id": "",
    "premium_index": "(fair price less index price) by index price, a fraction",
    "price": "quote per base",
    "quantity": "in base",
    "rate": "what longs pay shorts for the interval (below zero: get), as a fraction of the position's value",
    "realized_pnl": "what the user has realised in the instrument so far, funding included, trading fees not; in quote",
    "reason": "why: a code, which the order's `failureReason` repeats",
    "reference_id": "with `referenceType`, names the journal",
    "reference_type": (
        "DEPOSIT, WITHDRAWAL, ORDERS, ORDERS_RELEASED, TRADE, LIQUIDATION, SETTLEMENT, MARGIN_CHANGE, CROSS_MARGIN,"
        " FUNDING_FEE or INSURANCE_FUND"
    ),
    "remaining_quantity": "what was not filled, in base",
    "required_margin": "by how much the margin that the user's orders require grows, in quote",
    "sell_order_id": "",
    "seller_user_id": "",
    "session_id": "",
    "side": "BUY or SELL",
    "source": "`simulated`, or where the index comes from",
    "state": "TRADING, CANCEL_ONLY or HALTED",
    "status": "",
    "taker_fee": "in quote",
    "taker_side": "BUY or SELL: the side of the order that came later",
    "timestamp": "when the kline opens",
    "trade_id": "unique in the whole exchange; rises in an instrument",
    "type": "LIMIT, MARKET, STOP_MARKET, STOP_LIMIT, TAKE_PROFIT_MARKET or TAKE_PROFIT_LIMIT",
    "unrealized_pnl": "profit (below zero: loss) at the mark price, in quote; null while there is none",
    "user_id": "",
    "volume": "in base",
}

# … and where it means something else, or more.
FIELDS_OF: dict[tuple[str, str], str] = {
    ("AuthSessionRevoked", "reason"): "LOGOUT, REVOKED_BY_USER, PASSWORD_CHANGED, LOCKED or REFRESH_TOKEN_REUSED",
    ("OrderSubmitted", "price"): "the limit, quote per base; null of an order without one",
    ("OrderCreated", "price"): "the limit, quote per base; null of an order without one",
    ("OrderAmendRequested", "price"): "the new limit, quote per base; null: as it is",
    ("OrderAmendRequested", "quantity"): "the new quantity in base, what is filled included; null: as it is",
    ("MarginPreCheckPassed", "order_id"): "of the order or the amendment",
    ("MarginPreCheckFailed", "order_id"): "of the order or the amendment",
    ("FundsFrozen", "order_id"): "of the order or the amendment",
    ("FundsFrozenFailed", "order_id"): "of the order or the amendment",
    ("FundsUnfrozen", "order_id"): "of the order or the amendment",
    ("OrderCancelled", "status"): "CANCELLED (asked for) or EXPIRED (by its own terms, or for want of margin)",
    ("OrderAmended", "quantity"): "what is open of it now, in base",
    ("OrderAmendRejected", "reason"): "why: a code, which the amendment's `amendmentFailureReason` repeats",
    ("OrderAmended", "reason"): "USER_REQUEST or REDUCE_ONLY",
    ("PositionUpdated", "side"): "LONG or SHORT; null when flat",
    ("PositionUpdated", "quantity"): "in base, 0 when flat",
    ("MarkPriceUpdated", "mark_price"): "quote per base",
    ("InsuranceFundRequired", "amount"): "what is missing, in `asset`; the fund pays what it has of it",
    ("RiskUpdate", "status"): "OPEN, WARNING, LIQUIDATION_PENDING or CLOSED",
    ("LiquidationTriggered", "reason"): "MARGIN_RATIO (isolated) or ACCOUNT_EQUITY (cross)",
    ("AutoDeleveraged", "side"): "BUY or SELL: what the deleveraged user did",
    ("AutoDeleveraged", "price"): "the bankruptcy price, rounded to a tick; quote per base",
}

# Strings in JSON that are not text, by the field's name.
_DECIMAL_NAMES = """
    amount balance_after close delta_available delta_reserved entry_price fair_price fee funding_basis high index_price
    liquidation_price low maker_fee margin_ratio mark_price open premium_index price quantity rate realized_pnl
    remaining_quantity required_margin taker_fee unrealized_pnl volume
"""
_DECIMALS = frozenset(_DECIMAL_NAMES.split())
_TIMES = frozenset({"calculated_at", "effective_at", "executed_at", "frozen_since", "timestamp"})

_HEAD = f"""\
# Events

<!-- Made by `python -m domain.event_docs > docs/events.md`: change domain/events.py and domain/event_docs.py. -->

A service writes an event to the table `outbox.messages` in the transaction that makes it true. The relay, in the
worker, sends it from there to the Redis Stream that has the name of its topic: in order, and at least once. An entry of
a stream has these fields:

| field | |
|---|---|
| `id` | `{{message}}-{{line}}`, the same when the entry is sent again: drop what you have seen |
| `event` | the name of the event |
| `time` | when its transaction wrote it, ISO-8601 UTC |
| `version` | {SCHEMA_VERSION}; raised when a field goes, or gets another name or meaning; not when one is added |
| `data` | the event, as JSON |

A stream keeps about its newest 100,000 entries. Whoever needs older ones reads the tables.

**Who acts on an event** inside the exchange does not wait for the stream, unless it says so: sagas go from step to step
in Temporal, the engine and settlement read numbered logs in Postgres, and the streams are for the reports and for
everybody outside. The reason is in `docs/specification.md`.

Types: a *decimal* is a decimal number in a JSON string, a *time* an ISO-8601 UTC time with milliseconds in a string.
Ids of users, positions and sessions are strings, those of orders, trades and liquidations numbers. Base and quote are
those of the instrument: BTC and USDT in BTC-USDT-PERP.

What a user's sockets get travels on `{USER_PUSH_TOPIC}`, which keeps about 2,000 entries named `UserPush`: lists of
`{{"userId","channel","data"}}` (`docs/websocket.md`).
"""


def page() -> str:
    """The whole page."""
    topics = [f"| [{name}](#{name.lower()}) | `{kind.topic}` | {_meaning(kind)} |" for name, kind in CATALOGUE.items()]
    listed = "\n".join(["| event | topic | |", "|---|---|---|", *topics])
    return "\n".join([_HEAD, listed, "", *map(_section, CATALOGUE.values())])


def meaning_of(event: str, field: str) -> str:
    """What a field of an event means. Raises KeyError when nobody has said."""
    return FIELDS_OF.get((event, field), FIELDS[field])


def _meaning(kind: type[BusinessEvent]) -> str:
    return " ".join((kind.__doc__ or "").split())


def _section(kind: type[BusinessEvent]) -> str:
    name = kind.__name__
    told = DESCRIBED[name]
    return f"""\
## {name}

{_meaning(kind)}

- Topic: `{kind.topic}`
- Written by: {told.emitted_by}
- Acted on by: {told.acted_on_by}

| field | type | |
|---|---|---|
{_rows(kind)}

```json
{told.example}
```
"""


def _rows(kind: type[BusinessEvent]) -> str:
    hints = get_type_hints(kind)
    return "\n".join(
        f"| `{field.encode_name}` | {_type(field.name, hints[field.name])} | {meaning_of(kind.__name__, field.name)} |"
        for field in msgspec.structs.fields(kind)
    )


def _type(field: str, annotation: Any) -> str:
    """A field's type in the page's words; amounts and times are strings in JSON."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    word = {int: "number", bool: "boolean", str: "string"}[kinds[0]]
    if kinds == [str]:
        word = "decimal" if field in _DECIMALS else "time" if field in _TIMES else word
    return f"{word} or null" if NoneType in get_args(annotation) else word


if __name__ == "__main__":
    print(page(), end="")
