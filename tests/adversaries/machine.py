"""What any set of traders may do, at random: four accounts, perhaps of one person, with little money, any leverage."""

from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from domain.order_entry import OrderRequest
from tests.adversaries.accounts import BTC, ETH, INSTRUMENTS
from tests.adversaries.exchange import opposite
from tests.adversaries.laws import check
from tests.adversaries.liquidations import House
from tests.adversaries.orders import AmendRequest

USERS = st.integers(1, 4)
NAMES = st.sampled_from([BTC.instrument_id, BTC.instrument_id, ETH.instrument_id])
SIDES = st.sampled_from(["BUY", "SELL"])
KINDS = st.sampled_from(["LIMIT", "LIMIT", "LIMIT", "MARKET", "STOP_LIMIT", "STOP_MARKET", "TAKE_PROFIT_MARKET"])
# In thousandths of the mark: near it more often than far from it.
OFFSETS = st.one_of(st.integers(-8, 8), st.integers(-55, 55))
# Of BTC; of ETH it is twenty times as much.
QUANTITIES = st.sampled_from(["0.001", "0.1", "1", "3"])
BOUNDS = {BTC.instrument_id: (Decimal(5_000), Decimal(200_000)), ETH.instrument_id: (Decimal(250), Decimal(10_000))}
SIZES = {BTC.instrument_id: 1, ETH.instrument_id: 20}
ORDERS = st.tuples(NAMES, SIDES, KINDS, QUANTITIES, OFFSETS, OFFSETS, st.booleans())


class Adversaries(RuleBasedStateMachine):
    """Every rule is something that somebody may do, or that may happen; after each the laws are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.house = House()

    @initialize(
        amounts=st.lists(st.sampled_from([500, 2_000, 40_000]), min_size=4, max_size=4),
        crossed=st.sets(st.tuples(USERS, NAMES), max_size=6),
    )
    def deposit(self, amounts: list[int], crossed: set[tuple[int, str]]) -> None:
        for user_id, amount in enumerate(amounts, 1):
            self.house.deposit(user_id, Decimal(amount))
        for user_id, name in crossed:
            self.house.set_mode(user_id, name, cross=True)

    @rule(name=NAMES, offset=st.integers(-80, 80), hundredths=st.integers(0, 9), frozen=st.integers(0, 9))
    def move_mark(self, name: str, offset: int, hundredths: int, frozen: int) -> None:
        low, high = BOUNDS[name]
        mark = max(low, min(high, self.house.marks[name] * (1000 + offset) / 1000)).quantize(Decimal(1))
        self.house.say_mark(name, mark + hundredths * Decimal("0.01"), frozen=not frozen)

    @rule(name=NAMES, seconds=st.sampled_from([1, 5, 11]))
    def wait(self, name: str, seconds: int) -> None:
        """Time goes by, and one mark is told again."""
        self.house.time += seconds * 1000
        self.house.say_mark(name, self.house.marks[name])

    @rule(user=USERS, order=ORDERS, terms=st.sampled_from(["GTC", "IOC", "FOK"]))
    def place(self, user: int, order: tuple[Any, ...], terms: Any) -> None:
        self.house.place(user, self.request(*(*order, terms)))

    @rule(
        users=st.permutations([1, 2, 3, 4]),
        name=NAMES,
        side=SIDES,
        quantity=QUANTITIES,
        offset=OFFSETS,
        reduce_only=st.tuples(st.booleans(), st.booleans()),
    )
    def meet(
        self, users: list[int], name: str, side: Any, quantity: str, offset: int, reduce_only: tuple[bool, bool]
    ) -> None:
        """Two of them trade, at a price of their own."""
        for user, its, reduces in zip(users, (side, opposite(side)), reduce_only, strict=False):
            self.house.place(user, self.request(name, its, "LIMIT", quantity, offset, 0, reduces))

    @rule(
        users=st.permutations([1, 2, 3, 4]),
        name=NAMES,
        side=SIDES,
        leverage=st.sampled_from([10, 50, 100]),
        move=OFFSETS,
    )
    def bet(self, users: list[int], name: str, side: Any, leverage: int, move: int) -> None:
        """Two open what the money of one allows, and the mark goes on."""
        poor, rich = sorted(users[:2], key=lambda user: self.house.accounts[user].available)
        self.house.lever(poor, name, leverage)
        for quantity in ("3", "1", "0.3", "0.1", "0.01"):
            if not self.house.place(poor, self.request(name, side, "LIMIT", quantity)):
                self.house.place(rich, self.request(name, opposite(side), "MARKET", quantity))
                break
        self.move_mark(name, move, 0, 1)

    @rule(user=USERS, orders=st.lists(ORDERS, min_size=2, max_size=3), back=st.integers(0, 6), offset=OFFSETS)
    def batch(self, user: int, orders: list[tuple[Any, ...]], back: int, offset: int) -> None:
        """Orders and an amendment, all judged before any is matched."""
        requests: list[OrderRequest | AmendRequest] = [self.request(*order) for order in orders]
        name = orders[0][0]
        requests.insert(1, AmendRequest(name, self.house.order_id - back, self.at(name, offset)))
        self.house.submit(user, requests)

    @rule(
        name=NAMES,
        back=st.integers(0, 8),
        offset=st.one_of(st.none(), OFFSETS),
        quantity=st.one_of(st.none(), QUANTITIES),
    )
    def amend(self, name: str, back: int, offset: int | None, quantity: str | None) -> None:
        order = self.house.venues[name].orders.get(self.house.order_id - back)
        if order is not None:
            price = None if offset is None else self.at(name, offset)
            size = None if quantity is None else self.size(name, quantity)
            self.house.submit(order.user_id, [AmendRequest(name, order.order_id, price, size)])

    @rule(user=USERS, name=NAMES, back=st.integers(0, 10))
    def cancel(self, user: int, name: str, back: int) -> None:
        self.house.cancel(user, name, self.house.order_id - back)

    @rule(user=USERS, name=NAMES, amount=st.sampled_from([-5_000, -300, -10, 10, 300, 5_000]))
    def move_margin(self, user: int, name: str, amount: int) -> None:
        self.house.move_margin(user, name, Decimal(amount))

    @rule(user=USERS, name=NAMES, leverage=st.sampled_from([1, 3, 10, 50, 100]))
    def lever(self, user: int, name: str, leverage: int) -> None:
        self.house.lever(user, name, leverage)

    @rule(user=USERS, name=NAMES, cross=st.booleans())
    def set_mode(self, user: int, name: str, cross: bool) -> None:
        self.house.set_mode(user, name, cross=cross)

    @rule(user=USERS, percent=st.sampled_from([1, 50, 99, 100]))
    def withdraw(self, user: int, percent: int) -> None:
        amount = (self.house.accounts[user].available * percent / 100).quantize(Decimal("0.01"))
        if amount:
            self.house.withdraw(user, amount)

    @rule(name=NAMES, state=st.sampled_from(["HALTED", "TRADING", "TRADING", "TRADING"]))
    def set_state(self, name: str, state: Any) -> None:
        self.house.set_state(name, state)

    @rule()
    def watch(self) -> None:
        """The monitor of risk looks at the marks."""
        self.house.watch()

    @rule(name=NAMES, rate=st.sampled_from(["-0.0075", "-0.0001", "0.0001", "0.0075"]))
    def funding_time(self, name: str, rate: str) -> None:
        self.house.funding_time(name, Decimal(rate))

    @rule()
    def collect(self) -> None:
        self.house.collect()

    @invariant()
    def the_laws_hold(self) -> None:
        check(self.house)

    def request(
        self,
        name: str,
        side: Any,
        kind: Any,
        quantity: str,
        offset: int = 0,
        stop_offset: int = 0,
        reduce_only: bool = False,
        terms: Any = "GTC",
    ) -> OrderRequest:
        stop = self.at(name, stop_offset) if kind not in ("LIMIT", "MARKET") else None
        return OrderRequest(
            name,
            side,
            kind,
            self.size(name, quantity),
            self.at(name, offset, stop) if kind.endswith("LIMIT") else None,
            time_in_force=terms,
            stp_mode="EXPIRE_MAKER",
            reduce_only=reduce_only,
            stop_price=stop,
        )

    def size(self, name: str, quantity: str) -> Decimal:
        return Decimal(quantity) * SIZES[name]

    def at(self, name: str, offset: int, reference: Decimal | None = None) -> Decimal:
        """A price so many thousandths from the mark, or from another price."""
        return ((reference or self.house.marks[name]) * (1000 + offset) / 1000).quantize(INSTRUMENTS[name].tick_size)
