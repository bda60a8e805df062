"""The Python client against the real exchange."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from websockets.asyncio.client import ClientConnection

from client import (
    Account,
    ApiKey,
    NewOrder,
    Order,
    Refused,
    Session,
    Topic,
    books,
    market_messages,
    sign_in,
    user_messages,
)
from client.models import AmendedOrder, Fill, Permission, Ticker
from client.session import Login
from client.streams import Chain
from clients import connect_temporal
from domain.contracts.margin import MARGIN_CHANGE
from tests.exchange import BTC, PASSWORD, Exchange, Trader
from tests.servers import ROOT
from tests.waiting import until

D = Decimal
T = TypeVar("T")


@pytest.fixture
async def alice(exchange: Exchange, admin: Trader) -> AsyncIterator[Trader]:
    """A trader with money; leaves no open orders."""
    alice = await exchange.trader(admin, "100000")
    yield alice
    await alice.session.cancel_all()
    await exchange.until_settled()


def limit(side: str, quantity: str, price: str, **terms: object) -> NewOrder:
    values = {"instrument_id": BTC, "side": side, "type": "LIMIT", "quantity": D(quantity), "price": D(price)}
    return NewOrder(**values | terms)  # type: ignore[arg-type]  # the tests' own shorthand


async def first(messages: AsyncIterator[T]) -> T:
    async with asyncio.timeout(10):
        return await anext(messages)


async def listed(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


async def test_an_order_lives_its_life(exchange: Exchange, admin: Trader, alice: Trader) -> None:
    bob = await exchange.trader(admin, "100000")
    placed = await alice.session.place(limit("SELL", "0.1", "60000"), wait=True)
    assert (placed.status, placed.price, placed.quantity, placed.is_final) == ("PLACED", D(60000), D("0.1"), False)
    amended = await alice.session.amend(placed.order_id, quantity=D("0.2"), wait=True)
    assert isinstance(amended, AmendedOrder)
    assert (amended.amendment_status, amended.quantity) == ("AMENDED", D("0.2"))
    bought = await bob.session.place(
        NewOrder(instrument_id=BTC, side="BUY", type="MARKET", quantity=D("0.05")), wait=True
    )
    assert (bought.status, bought.average_price) == ("FILLED", D(60000))
    await exchange.until_settled()
    (fill,) = await listed(bob.session.fills(BTC))
    assert (fill.order_id, fill.role, fill.fee) == (bought.order_id, "TAKER", D("1.5"))
    (position,) = await bob.session.positions()
    assert (position.quantity, position.entry_price) == (D("0.05"), D(60000))
    (balance,) = await bob.session.balances()
    assert balance.total == balance.available + balance.reserved
    assert {entry.asset for entry in await listed(bob.session.entries())} == {"USDT"}
    await alice.session.cancel(placed.order_id)
    await exchange.until_settled()
    ended = await alice.session.order(placed.order_id)
    assert (ended.status, ended.filled_quantity, ended.is_final) == ("CANCELLED", D("0.05"), True)


async def test_margin_is_asked_for_and_changed(exchange: Exchange, admin: Trader, alice: Trader) -> None:
    bob = await exchange.trader(admin, "100000")
    check = await bob.session.pre_check(BTC, "BUY", D("0.1"), D(60000))
    assert check.allowed
    assert check.required_margin > 600
    await bob.session.set_leverage(BTC, 20)
    temporal = await connect_temporal(exchange.settings)

    async def is_found() -> bool:
        query = f"WorkflowType = '{MARGIN_CHANGE}' AND UserId = '{bob.user_id}' AND InstrumentId = '{BTC}'"
        return (await temporal.count_workflows(query)).count == 1

    await until(is_found, 10, "the change to be found by whom it is about")
    await alice.session.place(limit("SELL", "0.1", "60000"), wait=True)
    await bob.session.place(limit("BUY", "0.1", "60000"), wait=True)
    await exchange.until_settled()
    (before,) = await bob.session.positions()
    after = await bob.session.add_margin(BTC, D(100))
    assert (after.leverage, after.margin - before.margin) == (20, D(100))
    with pytest.raises(Refused) as refusal:
        await bob.session.set_margin_mode(BTC, "CROSS")
    assert refusal.value.code == "MARGIN_MODE_NOT_CHANGEABLE"


async def test_a_batch_answers_each_order_and_a_repeated_one_with_the_first(alice: Trader) -> None:
    named = limit("BUY", "0.01", "50000", client_order_id="mine")
    placed, off_tick = await alice.session.place_all([named, limit("BUY", "0.01", "50000.05")])
    assert isinstance(placed, Order)
    assert isinstance(off_tick, Refused)
    assert (off_tick.code, off_tick.status) == ("PRICE_NOT_ON_TICK", 400)
    (again,) = await alice.session.place_all([named])
    assert isinstance(again, Refused)
    assert again.order is not None
    assert again.order.order_id == placed.order_id
    with pytest.raises(Refused) as refusal:
        await alice.session.place(named)
    assert refusal.value.code == "DUPLICATE_CLIENT_ORDER_ID"


async def test_lists_are_read_to_their_end(alice: Trader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.exchange.PAGE_ITEMS", 2)
    answers = await alice.session.place_all([limit("BUY", "0.001", str(50000 + number)) for number in range(5)])
    ids = [answer.order_id for answer in answers if isinstance(answer, Order)]
    assert [order.order_id for order in await listed(alice.session.orders(instrument_id=BTC))] == ids[::-1]


async def test_an_access_token_that_is_no_longer_good_is_refreshed_once_for_all_calls(
    exchange: Exchange, alice: Trader, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = alice.session.caller
    assert isinstance(login, Login)
    good, refreshes = login._tokens, []
    login._tokens = type(good)(**{name: getattr(good, name) for name in good.__struct_fields__} | {"access_token": "x"})
    real_call = exchange.api.call

    async def counting_call(method: str, path: str, *arguments: object, **options: object) -> object:
        refreshes.append(path.endswith("/refresh"))
        return await real_call(method, path, *arguments, **options)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(exchange.api, "call", counting_call)
    await asyncio.gather(*(alice.session.me() for _ in range(5)))
    assert sum(refreshes) == 1
    assert login._tokens.session_id == good.session_id


async def test_a_session_that_was_ended_elsewhere_is_replaced(exchange: Exchange, alice: Trader) -> None:
    me = await alice.session.me()
    session = await sign_in(exchange.api, me.email, PASSWORD)
    await session.logout()
    assert await session.me() == me


async def test_market_data_is_typed(exchange: Exchange, alice: Trader) -> None:
    await alice.session.place(limit("SELL", "0.3", "60000"), wait=True)
    assert BTC in [instrument.instrument_id for instrument in await exchange.api.instruments()]

    async def is_shown() -> bool:
        ticker: Ticker = await exchange.api.ticker(BTC)
        return ticker.best_ask == D(60000)

    await until(is_shown, 10, "the ticker")
    assert (await exchange.api.depth(BTC)).asks[0] == (D(60000), D("0.3"))
    assert (await exchange.api.mark_price(BTC)).mark_price == D(60000)
    assert all(kline.low <= kline.high for kline in await exchange.api.klines(BTC, "1m"))
    assert all(trade.quantity > 0 for trade in await exchange.api.trades(BTC))
    assert await listed(exchange.api.funding_rates(BTC)) == []
    with pytest.raises(Refused) as refusal:
        await exchange.api.ticker("NOT-THERE")
    assert (refusal.value.status, refusal.value.code) == (404, "INSTRUMENT_NOT_FOUND")


async def test_a_local_book_follows_the_exchange_also_over_a_gap(
    exchange: Exchange, alice: Trader, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriptions = 0
    real_send, real_follows = ClientConnection.send, Chain.follows
    messages = 0

    async def counting_send(self: ClientConnection, *arguments: object) -> None:
        nonlocal subscriptions
        subscriptions += 1
        await real_send(self, *arguments)  # type: ignore[arg-type]  # passed on as they are

    def losing_follows(self: Chain, message: object) -> bool:
        nonlocal messages
        messages += 1
        # The second update is lost on the way.
        return messages != 3 and real_follows(self, message)  # type: ignore[arg-type]  # passed on as it is

    monkeypatch.setattr(ClientConnection, "send", counting_send)
    monkeypatch.setattr(Chain, "follows", losing_follows)
    async for book in books(exchange.api, BTC):
        depth = await exchange.api.depth(BTC)
        if book.seq == depth.seq:
            assert (sorted(book.bids.items(), reverse=True), sorted(book.asks.items())) == (depth.bids, depth.asks)
        if subscriptions == 2 and book.seq == depth.seq:
            break
        await alice.session.place(limit("BUY", "0.01", str(50000 + messages)), wait=True)
    assert book.best_bid is not None


async def test_a_users_events_arrive_typed(exchange: Exchange, admin: Trader, alice: Trader) -> None:
    bob = await exchange.trader(admin, "100000")
    messages = user_messages(bob.session)
    assert (await first(messages)).channel == "auth"
    await alice.session.place(limit("SELL", "0.01", "60000"), wait=True)
    bought = await bob.session.place(limit("BUY", "0.01", "60000"), wait=True)
    fills: list[Fill] = []
    orders: list[Order] = []
    async with asyncio.timeout(10):
        while not (fills and orders and orders[-1].is_final):
            message = await anext(messages)
            if message.channel == "order":
                orders.append(message.as_order())
            elif message.channel == "fill":
                fills.append(message.as_fill())
    assert {order.order_id for order in orders} == {fills[0].order_id} == {bought.order_id}


async def test_streams_outlive_the_end_of_an_api_process(exchange: Exchange, alice: Trader) -> None:
    exchange.api.patience = 30.0
    market = market_messages(exchange.api, [Topic("trades", BTC), Topic("kline", BTC, "1m")])
    own = user_messages(alice.session)
    assert {(await first(market)).type, (await first(market)).type} == {"snapshot"}
    assert (await first(own)).channel == "auth"
    exchange.kill("api")
    exchange.start("api")
    await exchange.until_ready()
    try:
        async with asyncio.timeout(30):
            assert (await anext(market)).type == "snapshot"
            assert (await anext(own)).channel == "auth"
    finally:
        exchange.api.patience = 0.0


async def with_key(exchange: Exchange, session: Session, algorithm: str, permissions: list[Permission]) -> Account:
    """The account of a session for a program with a new API key."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    if algorithm == "ED25519":
        made = await session.create_api_key("bot", permissions, public_key=public)
        assert made.secret is None
        return Account(exchange.api, ApiKey(made.key_id, private.sign))
    made = await session.create_api_key("bot", permissions)
    assert made.secret is not None
    return Account(exchange.api, ApiKey.with_secret(made.key_id, made.secret))


@pytest.mark.parametrize("algorithm", ["HMAC_SHA256", "ED25519"])
async def test_a_program_with_a_key_trades_as_its_user(exchange: Exchange, alice: Trader, algorithm: str) -> None:
    bot = await with_key(exchange, alice.session, algorithm, ["READ", "TRADE"])
    messages = user_messages(bot)
    assert (await first(messages)).data == {"userId": alice.user_id}
    placed = await bot.place(limit("BUY", "0.01", "50000"), wait=True)
    await exchange.until_settled()
    assert await alice.session.order(placed.order_id) == await bot.order(placed.order_id)
    assert [order.order_id async for order in bot.orders(instrument_id=BTC, status="PLACED")] == [placed.order_id]
    # Equal calls of the same millisecond are calls of their own.
    assert len({str(balances) for balances in await asyncio.gather(*(bot.balances() for _ in range(10)))}) == 1
    assert await bot.cancel_all() == [placed.order_id]
    message = await first(messages)
    while not (message.channel == "order" and message.as_order().is_final):
        message = await first(messages)
    assert message.as_order().order_id == placed.order_id


async def refusal_of(call: Awaitable[object]) -> tuple[int, str]:
    with pytest.raises(Refused) as refusal:
        await call
    return refusal.value.status, refusal.value.code


async def test_a_key_is_listed_and_does_what_it_is_for_until_it_is_revoked(exchange: Exchange, alice: Trader) -> None:
    reader = await with_key(exchange, alice.session, "HMAC_SHA256", ["READ"])
    trader = await with_key(exchange, alice.session, "HMAC_SHA256", ["TRADE"])
    listed_keys = await alice.session.api_keys()
    assert [key.permissions for key in listed_keys] == [["TRADE"], ["READ"]]
    for forbidden in (reader.cancel_all(), trader.balances(), first(user_messages(trader))):
        assert await refusal_of(forbidden) == (403, "FORBIDDEN")
    messages = user_messages(reader)
    assert (await first(messages)).channel == "auth"
    await alice.session.revoke_api_key(listed_keys[1].key_id)
    for ended in (first(messages), first(user_messages(reader)), reader.me()):
        assert await refusal_of(ended) == (401, "UNAUTHENTICATED")
    assert [key.key_id for key in await alice.session.api_keys()] == [listed_keys[0].key_id]


async def test_a_programs_stream_outlives_the_end_of_an_api_process(exchange: Exchange, alice: Trader) -> None:
    exchange.api.patience = 30.0
    messages = user_messages(await with_key(exchange, alice.session, "ED25519", ["READ"]))
    assert (await first(messages)).channel == "auth"
    exchange.kill("api")
    exchange.start("api")
    await exchange.until_ready()
    try:
        async with asyncio.timeout(30):
            assert (await anext(messages)).channel == "auth"
    finally:
        exchange.api.patience = 0.0


def python_of(document: str) -> list[str]:
    """The Python examples of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


async def said_by(code: str) -> list[str]:
    """The lines that a program prints, which must end well."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            said, complaints = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert (child.returncode, complaints) == (0, b"")
    return said.decode().splitlines()


async def test_the_examples_of_the_readme_place_an_order_each(exchange: Exchange, tmp_path: Path) -> None:
    password_file = tmp_path / "admin-password"
    password_file.write_text(PASSWORD + "\n", encoding="utf-8")
    first_order, bot = (
        code.replace("http://127.0.0.1:8000", exchange.url).replace(".exchange/admin-password", str(password_file))
        for code in python_of("README.md")
    )
    order, book = await said_by(first_order)
    placed = re.fullmatch(r"\d+ PLACED (\S+)", order)
    assert placed is not None, order
    assert re.fullmatch(r"best bid \S+ best ask \S+", book), book
    messages = await said_by(bot)
    assert messages[0].startswith("auth ")
    assert messages[-1].startswith("order ")
    assert "'status': 'PLACED'" in messages[-1]
    await exchange.until_settled()


async def test_the_signature_of_the_document_is_right(exchange: Exchange, alice: Trader) -> None:
    example: dict[str, Any] = {}
    (code,) = python_of("docs/identity.md")
    exec(code, example)
    made = await alice.session.create_api_key("bot", ["READ"])
    target = "/api/orders?limit=10"
    headers = example["signed"](made.key_id, made.secret, "GET", target)
    assert (await exchange.client.get(target, headers=headers)).status_code == 200
    headers = example["signed"](made.key_id, made.secret, "GET", "/api/orders")
    assert (await exchange.client.get(target, headers=headers)).status_code == 401
