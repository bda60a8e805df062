"""Three spot exchanges on one local HTTP server, as Binance, Coinbase and Kraken answer, and as they fail."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiohttp import web

NAMES = ("binance", "coinbase", "kraken")
# Kraken's own names of what everyone else calls by other ones.
KRAKEN_PAIRS = {"BTC": "XBTUSDT", "ETH": "ETHUSDT", "SOL": "SOLUSDT"}
PRICES = {"BTC": "60000", "ETH": "3000", "SOL": "150"}

Answer = Callable[[], web.Response]


@dataclass
class SpotExchange:
    """What one of them says: a trade now at each of `prices`, unless `answer` stands in for it or `hangs` is set."""

    name: str
    prices: dict[str, str] = field(default_factory=lambda: dict(PRICES))
    quantity: str = "0.5"
    age_seconds: float = 0.0
    answer: Answer | None = None
    hangs: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[str] = field(default_factory=list)
    # What it answers in place of its list of markets.
    markets_answer: Answer | None = None
    quote: str = "USDT"

    async def respond(self, path: str, query: dict[str, str]) -> web.Response:
        self.requests.append(path)
        if self.hangs:
            await self.released.wait()
        is_list = path.endswith(("exchangeInfo", "AssetPairs", "market/products"))
        substitute = self.markets_answer if is_list else self.answer
        if substitute is not None:
            return substitute()
        return web.json_response(getattr(self, f"_{self.name}")(path, query))

    def _traded_ms(self) -> int:
        return round((datetime.now(UTC).timestamp() - self.age_seconds) * 1000)

    def _binance(self, path: str, query: dict[str, str]) -> object:
        if path == "/api/v3/exchangeInfo":
            return {"timezone": "UTC", "symbols": [_binance_symbol(base, self.quote) for base in self.prices]}
        assert path == "/api/v3/aggTrades", path
        price = self.prices[query["symbol"].removesuffix(self.quote)]
        at = self._traded_ms()
        return [{"a": 1, "p": price, "q": self.quantity, "f": 1, "l": 1, "T": at, "m": True, "M": True}]

    def _coinbase(self, path: str, query: dict[str, str]) -> object:
        if path == "/api/v3/brokerage/market/products":
            bases = [] if query.get("product_type") == "FUTURE" else self.prices
            return {"products": [_coinbase_product(base, self.quote) for base in bases], "num_products": len(bases)}
        product = path.removeprefix("/api/v3/brokerage/market/products/").removesuffix("/ticker")
        price = self.prices[product.removesuffix(f"-{self.quote}")]
        at = datetime.fromtimestamp(self._traded_ms() / 1000, UTC).isoformat().replace("+00:00", "Z")
        trade = {
            "trade_id": "9",
            "product_id": product,
            "price": price,
            "size": self.quantity,
            "time": at,
            "side": "BUY",
        }
        return {"trades": [trade], "best_bid": price, "best_ask": price}

    def _kraken(self, path: str, query: dict[str, str]) -> object:
        if path == "/0/public/AssetPairs":
            return {"error": [], "result": {KRAKEN_PAIRS[base]: _kraken_pair(base) for base in self.prices}}
        assert path == "/0/public/Trades", path
        base = next(base for base, pair in KRAKEN_PAIRS.items() if pair == query["pair"])
        trade = [self.prices[base], self.quantity, self._traded_ms() / 1000, "b", "l", "", 77]
        return {"error": [], "result": {query["pair"]: [trade], "last": "1688671969993150842"}}


@dataclass
class SpotExchanges:
    """All three, by name, and the setting that leads to them."""

    url: str
    by_name: dict[str, SpotExchange]

    def urls(self, *names: str) -> str:
        """The value of EXCHANGE_INDEX_URLS for these, or for all."""
        return ",".join(f"{name}={self.url}/{name}" for name in names or self.by_name)

    def __getitem__(self, name: str) -> SpotExchange:
        return self.by_name[name]


@asynccontextmanager
async def running_spot_exchanges() -> AsyncIterator[SpotExchanges]:
    """The exchanges, each below its name."""
    by_name = {name: SpotExchange(name) for name in NAMES}

    async def respond(request: web.Request) -> web.Response:
        exchange = by_name[request.match_info["name"]]
        return await exchange.respond("/" + request.match_info["path"], dict(request.query))

    app = web.Application()
    app.router.add_get("/{name}/{path:.*}", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield SpotExchanges(f"http://{host}:{port}", by_name)
    finally:
        for exchange in by_name.values():
            exchange.released.set()
        await runner.cleanup()


def status(code: int, text: str = "{}") -> Answer:
    """An HTTP error."""
    return lambda: web.Response(status=code, text=text, content_type="application/json")


def text(body: str) -> Answer:
    """A successful answer with this body."""
    return lambda: web.Response(text=body, content_type="application/json")


def document(body: object) -> Answer:
    """A successful answer with this JSON document."""
    return text(json.dumps(body))


def _binance_symbol(base: str, quote: str) -> dict[str, object]:
    return {
        "symbol": f"{base}{quote}",
        "status": "TRADING",
        "baseAsset": base,
        "baseAssetPrecision": 8,
        "quoteAsset": quote,
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "orderTypes": ["LIMIT", "MARKET"],
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": True,
        "filters": [
            {"filterType": "PRICE_FILTER", "minPrice": "0.01", "maxPrice": "1000000.00", "tickSize": "0.01"},
            {"filterType": "LOT_SIZE", "minQty": "0.00001", "maxQty": "9000.00", "stepSize": "0.00001"},
        ],
        "permissions": [],
        "permissionSets": [["SPOT", "MARGIN"]],
    }


def _coinbase_product(base: str, quote: str) -> dict[str, object]:
    return {
        "product_id": f"{base}-{quote}",
        "price": "1",
        "base_increment": "0.00000001",
        "quote_increment": "0.01",
        "quote_min_size": "1",
        "quote_max_size": "10000000",
        "base_min_size": "0.00000001",
        "base_max_size": "3400",
        "is_disabled": False,
        "status": "online",
        "trading_disabled": False,
        "product_type": "SPOT",
        "quote_currency_id": quote,
        "base_currency_id": base,
        "alias": "",
        "alias_to": [],
    }


def _kraken_pair(base: str) -> dict[str, object]:
    return {
        "altname": KRAKEN_PAIRS[base],
        "wsname": f"{KRAKEN_PAIRS[base][:3]}/USDT",
        "aclass_base": "currency",
        "base": "XXBT" if base == "BTC" else base,
        "aclass_quote": "currency",
        "quote": "USDT",
        "cost_decimals": 5,
        "pair_decimals": 1,
        "lot_decimals": 8,
        "lot_multiplier": 1,
        "leverage_buy": [2, 3],
        "leverage_sell": [2, 3],
        "fees": [[0, 0.26]],
        "fees_maker": [[0, 0.16]],
        "ordermin": "0.0001",
        "costmin": "0.5",
        "tick_size": "0.1",
        "status": "online",
    }
