"""What the engine and the reference book have in common, and a machine of Hypothesis that runs them side by side."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec import structs

from domain.instruments import SHIPPED
from domain.matching import AnyCommand, New, SetState, TradingState, decode_event, encode
from engine.book import Order
from engine.matcher import Matcher
from tests.engine_commands import AT
from tests.engine_strategies import COMMANDS
from tests.reference_book import ReferenceMatcher
from tests.reference_guards import MILLION
from tests.reference_orders import Live


def as_told(order: Order | Live) -> tuple[New, int, int, int]:
    """An order's terms apart from price and quantity, its price, what was filled and what is open."""
    filled = order.filled if isinstance(order, Live) else order.new.quantity - order.remaining
    return structs.replace(order.new, price=0, quantity=0), order.price, filled, order.remaining


def assert_same_book(matcher: Matcher, reference: ReferenceMatcher) -> None:
    book = matcher.book
    for side in (book.bids, book.asks):
        fast = [as_told(order) for order in book.resting(side)]
        assert fast == [as_told(order) for order in reference.queue(side.name)]
        assert book.depth(side) == reference.depth(side.name)
    assert [as_told(order) for order in matcher.stops.orders.values()] == [
        as_told(order) for order in reference.waiting
    ]
    accounts = book.accounts
    assert {user: account.position for user, account in accounts.items() if account.position} == {
        user: lots for user, lots in reference.positions.items() if lots
    }
    assert (matcher.event_seq, matcher.state) == (reference.event_seq, reference.state)
    assert_same_guards(matcher, reference)


def assert_same_guards(matcher: Matcher, reference: ReferenceMatcher) -> None:
    """The same is believed to be behind every position."""
    for user_id, account in matcher.book.accounts.items():
        holder = reference.guards.holders[user_id]
        money = account.backing if account.position < 0 else -account.backing
        assert (account.leverage, account.cross, account.fill_seq) == (holder.leverage, holder.cross, holder.filled_seq)
        assert money == holder.money * MILLION
        assert account.cover == holder.cover * MILLION
        if account.leverage:
            assert {"BUY": account.bids_backed, "SELL": account.asks_backed} == holder.backed


def assert_sound(matcher: Matcher) -> None:
    """Never crossed, nothing negative, every sum and every index right, no reduce-only order beyond the position."""
    book = matcher.book
    if book.bids.best is not None and book.asks.best is not None:
        assert book.bids.best.price < book.asks.best.price
    for side in (book.bids, book.asks):
        assert sorted(side.heap) == sorted(level.key for level in side.levels.values() if level.queued)
        live = sorted((level for level in side.levels.values() if level.lots), key=lambda level: level.key)
        assert list(side) == live
        assert side.best is (live[0] if live else None)
        assert all(price == level.price and level.key == side.sign * price for price, level in side.levels.items())
        assert all(level.queued for level in live)
        for level in side.levels.values():
            assert level.lots == sum(order.remaining for order in level)
            assert all(order.remaining >= 0 for order in level.queue)
            assert level.gone == sum(not order.remaining for order in level.queue)
    resting = {order.new.order_id: order for side in (book.bids, book.asks) for order in book.resting(side)}
    assert book.orders == resting
    resting_of = {user: account.orders for user, account in book.accounts.items()}
    for users, orders in ((resting_of, book.orders), (matcher.stops.users, matcher.stops.orders)):
        assert {key: order for own in users.values() for key, order in own.items()} == orders
        assert all({order.new.user_id for order in own.values()} <= {user} for user, own in users.items())
    assert all(matcher.stops.users.values())
    assert not resting.keys() & matcher.stops.orders.keys()
    assert_reducing(matcher)


def assert_reducing(matcher: Matcher) -> None:
    reductions = matcher.reductions
    reducing = {key: order for key, order in matcher.book.orders.items() if order.new.reduce_only}
    assert {key: order for user in reductions.users.values() for key, order in user.orders.items()} == reducing
    for user_id, reducers in reductions.users.items():
        assert {(order.new.user_id, order.new.side) for order in reducers.orders.values()} == {(user_id, reducers.side)}
        assert reducers.lots == sum(order.remaining for order in reducers.orders.values())
        assert 0 < reducers.lots <= reductions.reducible(user_id, reducers.side)


class Agreement(RuleBasedStateMachine):
    """The engine and the reference book side by side, and a second engine that lives from dump to dump."""

    def __init__(self) -> None:
        super().__init__()
        self.matcher, self.loaded = Matcher(SHIPPED[0]), Matcher(SHIPPED[0])
        self.reference = ReferenceMatcher(SHIPPED[0])

    @rule(command=COMMANDS)
    def apply(self, command: AnyCommand) -> None:
        events = self.matcher.apply(command)
        assert events == self.reference.apply(command)
        assert self.loaded.apply(command) == events
        assert [decode_event(encode(event)) for event in events] == events

    @rule(state=st.sampled_from(["TRADING", "TRADING", "TRADING", "CANCEL_ONLY", "HALTED"]))
    def trading_is_open_or_not(self, state: TradingState) -> None:
        self.apply(SetState(at=AT, state=state))

    @rule()
    def dump_and_load(self) -> None:
        self.loaded = Matcher.load(SHIPPED[0], self.loaded.dump())
        assert self.loaded.dump() == self.matcher.dump()

    @invariant()
    def same_book(self) -> None:
        assert_same_book(self.matcher, self.reference)
        assert_sound(self.matcher)
        assert_sound(self.loaded)
