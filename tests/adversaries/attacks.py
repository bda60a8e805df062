"""What was tried before, and what is right: two accounts of one person, one poor and one rich, in every mirror image.

Each attack is a function of a `Scene`; the laws are asked after each of its moves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from domain.matching import OrderType, Side
from domain.order_entry import OrderRequest
from tests.adversaries.accounts import BTC, ETH, INSTRUMENTS
from tests.adversaries.exchange import opposite
from tests.adversaries.laws import check
from tests.adversaries.liquidations import House
from tests.adversaries.orders import AmendRequest

POOR, RICH = 1, 2
BITCOIN, ETHER = BTC.instrument_id, ETH.instrument_id


@dataclass
class Scene:
    """`side` is the poor one's in the first trade; all distances are told as for BUY, in thousandths of the mark, and
    turned round for SELL."""

    side: Side
    cross: bool
    house: House = field(default_factory=House)

    def __post_init__(self) -> None:
        self.anew()

    def anew(self, fund: int = 1_000_000) -> None:
        """An exchange where nothing has happened."""
        self.house = House(Decimal(fund))

    def begin(self, money: int, leverage: int, *names: str) -> None:
        """Money for the poor one; the rich one has enough."""
        self.house.deposit(POOR, Decimal(money))
        self.house.deposit(RICH, Decimal(10_000_000))
        for name in names or (BITCOIN,):
            self.house.set_mode(POOR, name, cross=self.cross)
            self.house.lever(POOR, name, leverage)

    def price(self, distance: float, name: str = BITCOIN) -> Decimal:
        """So far from the mark: above it for BUY."""
        sign = 1 if self.side == "BUY" else -1
        exact = self.house.marks[name] * (1 + sign * Decimal(str(distance)) / 1000)
        return exact.quantize(INSTRUMENTS[name].tick_size)

    def order(
        self, kind: OrderType, quantity: str, distance: float | None = None, name: str = BITCOIN, **terms: Any
    ) -> OrderRequest:
        """An order of the poor one's first side."""
        price = None if distance is None else self.price(distance, name)
        terms.setdefault("side", self.side)
        return OrderRequest(name, terms.pop("side"), kind, Decimal(quantity), price, **terms)

    def poor(self, *requests: OrderRequest | AmendRequest) -> list[str]:
        """The poor one sends a batch."""
        answers = self.house.submit(POOR, requests)
        check(self.house)
        return answers

    def rich(self, quantity: str, distance: float, name: str = BITCOIN, *, same: bool = False) -> None:
        """The rich one quotes the other side of the first trade, or the same."""
        side = self.side if same else opposite(self.side)
        self.house.place(RICH, self.order("LIMIT", quantity, distance, name, side=side))
        check(self.house)

    def open(self, quantity: str, name: str = BITCOIN) -> None:
        """The poor one opens at the mark."""
        self.rich(quantity, 0, name)
        assert self.poor(self.order("LIMIT", quantity, 0, name)) == [""]
        assert self.house.accounts[POOR].stakes[name].quantity

    def close(self, kind: OrderType, quantity: str, distance: float | None = None, name: str = BITCOIN) -> list[str]:
        """The poor one sells what was bought."""
        return self.poor(self.closing(kind, quantity, distance, name))

    def closing(self, kind: OrderType, quantity: str, distance: float | None, name: str = BITCOIN) -> OrderRequest:
        """The order that does that; it only reduces."""
        return self.order(kind, quantity, distance, name, side=opposite(self.side), reduce_only=True)

    def mark(self, distance: float, name: str = BITCOIN, *, frozen: bool = False) -> None:
        """The mark moves: below 0 against the poor one."""
        sign = 1 if self.side == "BUY" else -1
        mark = self.house.marks[name] * (1 + sign * Decimal(str(distance)) / 1000)
        self.house.say_mark(name, mark, frozen=frozen)
        check(self.house)

    def watch(self) -> None:
        """The monitor of risk looks."""
        self.house.watch()
        check(self.house)

    def position(self, name: str = BITCOIN) -> Decimal:
        """The poor one's."""
        return self.house.accounts[POOR].stakes[name].quantity


Attack = Callable[[Scene], None]


def far_limit(scene: Scene) -> None:
    """A1: buy far beyond the mark, be liquidated, and let the other one win."""
    scene.begin(40_000, 100)
    scene.rich("4", -0.2, same=True)
    scene.rich("1", 48)
    scene.poor(scene.order("LIMIT", "1", 48))
    scene.watch()
    scene.house.place(RICH, scene.order("LIMIT", "1", 0.2))
    scene.watch()


def far_limit_without_money(scene: Scene) -> None:
    """A1, A2: the same with 1,000, as a limit, in a batch, as an amendment, as a stop, behind a bait."""
    scene.begin(1_000, 100)
    scene.rich("1", 48)
    assert scene.poor(scene.order("LIMIT", "1", 48)) == ["INSUFFICIENT_MARGIN"]
    scene.poor(scene.order("LIMIT", "0.1", 48), scene.order("LIMIT", "1", 48), scene.order("LIMIT", "0.5", 48))
    scene.poor(scene.order("STOP_LIMIT", "1", 48, stop_price=scene.price(0)))
    scene.rich("0.001", 0)
    scene.poor(scene.order("MARKET", "1"))
    scene.watch()


def amended_far(scene: Scene) -> None:
    """A2: a limit at the mark that becomes one far beyond it, or a larger one."""
    scene.begin(1_000, 100)
    scene.poor(scene.order("LIMIT", "0.5", -1))
    order_id = scene.house.order_id
    scene.rich("3", 40)
    scene.poor(AmendRequest(BITCOIN, order_id, scene.price(40)))
    scene.poor(AmendRequest(BITCOIN, order_id, None, Decimal(3)))
    scene.poor(AmendRequest(BITCOIN, order_id, scene.price(40), Decimal(3)))
    scene.rich("3", -1)
    scene.poor(AmendRequest(BITCOIN, order_id, scene.price(0), Decimal("1.4")))
    scene.watch()


def amended_to_all_the_money(scene: Scene) -> None:
    """An amendment needs nearly all there is, and trades at once, while an order of the same batch wants it, too."""
    scene.begin(1_000, 100)
    scene.poor(scene.order("LIMIT", "0.1", -1))
    order_id = scene.house.order_id
    scene.rich("3", 0)
    scene.poor(AmendRequest(BITCOIN, order_id, scene.price(0), Decimal("1.5")), scene.order("LIMIT", "1.4", 0))
    scene.poor(scene.order("LIMIT", "1.4", 0), scene.order("LIMIT", "1.4", 0))


def close_far(scene: Scene) -> None:
    """A3: sell to the other one far below the price at which one is empty."""
    for distance in (-11, -48):
        scene.anew()
        scene.begin(1_000, 100)
        scene.open("1")
        scene.rich("1", distance, same=True)
        for kind, price in (("LIMIT", distance), ("MARKET", None)):
            scene.close(kind, "1", price)  # type: ignore[arg-type]
            scene.poor(scene.order(kind, "1", price, side=opposite(scene.side)))  # type: ignore[arg-type]
        scene.mark(-4)
        scene.close("MARKET", "1")


def beyond_the_fund(scene: Scene) -> None:
    """A4: a loss larger than the fund; nobody takes it from the book."""
    scene.anew(fund=100)
    scene.begin(2_000, 100)
    scene.open("2")
    scene.mark(-40)
    scene.watch()
    assert not scene.position()
    assert scene.house.shortfall == 0


def stops_of_the_moment(scene: Scene) -> None:
    """A5, A7, A11: stops go by the mark, not by quotes; one that is jumped over sells like a market order."""
    scene.begin(40_000, 2)
    scene.open("1")
    stop = scene.house.marks[BITCOIN] + Decimal("-0.2" if scene.side == "BUY" else "0.2")
    side = opposite(scene.side)
    scene.poor(scene.order("STOP_MARKET", "1", side=side, reduce_only=True, stop_price=stop))
    scene.house.say_mark(BITCOIN, stop + Decimal("0.05" if scene.side == "BUY" else "-0.05"))
    assert scene.position()
    scene.rich("1", -90, same=True)
    scene.mark(-80)
    assert not scene.position() or scene.cross


def run_from_funding(scene: Scene) -> None:
    """A8: close at the funding time and take all away before it is collected."""
    scene.begin(3_000, 100, BITCOIN, ETHER)
    scene.open("4")
    fund = scene.house.fund
    scene.house.funding_time(BITCOIN, Decimal("0.0075" if scene.side == "BUY" else "-0.0075"))
    scene.rich("4", 0, same=True)
    scene.close("MARKET", "4")
    scene.rich("20", 0, ETHER)
    money = scene.house.accounts[POOR].available
    refusal = scene.house.withdraw(POOR, money)
    check(scene.house)
    assert refusal == "INSUFFICIENT_FUNDS"
    scene.poor(scene.order("LIMIT", "20", 0, ETHER))
    scene.house.move_margin(POOR, ETHER, money - 700)
    check(scene.house)
    scene.house.collect()
    check(scene.house)
    assert scene.house.fund == fund


def hide_behind_a_halt(scene: Scene) -> None:
    """A9: a position that stands still does not keep the others from being liquidated."""
    scene.begin(2_000, 100, BITCOIN, ETHER)
    scene.open("1")
    scene.open("0.1", ETHER)
    scene.house.set_state(ETHER, "HALTED")
    scene.house.say_mark(ETHER, scene.house.marks[ETHER], frozen=True)
    scene.rich("3", -30.5, same=True)
    scene.mark(-30)
    scene.watch()
    assert not scene.position()


def wait_below(scene: Scene) -> None:
    """A10: the other one's bid far below is all there is, while the position still has equity at the mark."""
    scene.begin(2_530, 100)
    scene.open("4")
    scene.rich("4", -48, same=True)
    fund = scene.house.fund
    scene.mark(-6.5)
    scene.watch()
    assert scene.house.fund >= fund


def without_a_mark(scene: Scene) -> None:
    """A12: nothing opens without a live mark, also no stop; closing goes on."""
    scene.begin(10_000, 10)
    scene.open("0.1")
    scene.poor(scene.order("STOP_MARKET", "0.1", stop_price=scene.price(5)))
    scene.rich("1", 6)
    scene.mark(5.5, frozen=True)
    before = scene.position()
    assert scene.poor(scene.order("LIMIT", "0.1", 6)) == ["MARK_PRICE_UNAVAILABLE"]
    scene.house.say_mark(BITCOIN, scene.house.marks[BITCOIN])
    scene.rich("0.1", -1, same=True)
    scene.house.time += 14_000
    assert scene.poor(scene.order("LIMIT", "0.1", 6)) == ["MARK_PRICE_UNAVAILABLE"]
    assert scene.position() == before
    scene.close("MARKET", "0.1")
    assert not scene.position()


def sell_what_waited(scene: Scene) -> None:
    """A take-profit far from the mark, due at once or jumped over, is backed where it trades and not where it waits."""
    scene.begin(326, 100)
    stop = scene.price(480)
    scene.rich("1", 0)
    scene.poor(scene.order("TAKE_PROFIT_MARKET", "1", stop_price=stop))
    # Now one that waits, while the mark jumps to where its margin is just not enough for what is bid.
    scene.anew()
    scene.begin(641, 100)
    scene.poor(scene.order("TAKE_PROFIT_MARKET", "1", stop_price=scene.price(-1)))
    scene.rich("1", -47.8)
    scene.mark(-53)


def lose_more_than_its_own(scene: Scene) -> None:
    """One position loses more than its margin and what is available; another one's margin pays, and not the fund."""
    scene.begin(4_000, 100)
    scene.house.set_mode(POOR, ETHER, cross=scene.cross)
    scene.open("10", ETHER)
    scene.open("1")
    scene.mark(-30)
    scene.rich("1", 0, same=True)
    fund = scene.house.fund
    scene.close("MARKET", "1")
    scene.watch()
    assert scene.house.fund >= fund


def pay_with_a_profit_on_paper(scene: Scene) -> None:
    """Two positions that hedge each other: closing the one that loses costs more than there is money, while the other
    one keeps its profit."""
    kinds: tuple[OrderType, ...] = ("MARKET", "LIMIT")
    for kind in kinds:
        scene.anew()
        scene.begin(1_500, 100, BITCOIN, ETHER)
        scene.open("1")
        scene.rich("20", 0, ETHER, same=True)
        assert scene.poor(scene.order("LIMIT", "20", 0, ETHER, side=opposite(scene.side))) == [""]
        for _ in range(8):
            for name in (BITCOIN, ETHER):
                scene.house.say_mark(name, scene.price(-5, name))
        scene.rich("1", 0, same=True)
        fund = scene.house.fund
        scene.close(kind, "1", None if kind == "MARKET" else 0)
        assert scene.house.fund >= fund
        scene.watch()


def count_money_twice(scene: Scene) -> None:
    """Two positions are closed at a loss that the account has once."""
    scene.begin(1_500, 100, BITCOIN, ETHER)
    scene.open("1")
    scene.open("10", ETHER)
    scene.mark(-8)
    scene.mark(-8, ETHER)
    for distance in (-4, -6, -48):
        scene.rich("1", distance, same=True)
        scene.rich("10", distance, ETHER, same=True)
        scene.poor(*(scene.closing("MARKET", q, None, name) for q, name in (("1", BITCOIN), ("10", ETHER))))
        scene.close("LIMIT", "1", distance)
        scene.close("LIMIT", "10", distance, ETHER)


def take_the_cover_away(scene: Scene) -> None:
    """What covers a cross loss is taken out, put behind another position, or lost, before the position is closed."""
    for away in ("withdraw", "margin", "lose"):
        scene.anew()
        scene.begin(1_100, 100, BITCOIN)
        scene.open("1")
        if away == "lose":
            scene.house.set_mode(POOR, ETHER, cross=scene.cross)
            scene.house.lever(POOR, ETHER, 100)
            scene.open("3", ETHER)
            scene.mark(-40, ETHER)
        scene.rich("1", -10.5, same=True)
        scene.mark(-8)
        money = scene.house.accounts[POOR].available
        if away == "withdraw":
            scene.house.withdraw(POOR, money)
            scene.house.withdraw(POOR, money / 4)
        if away == "margin":
            scene.rich("3", 0, ETHER)
            scene.poor(scene.order("LIMIT", "0.02", 0, ETHER))
            scene.house.move_margin(POOR, ETHER, money - 20)
        check(scene.house)
        scene.close("MARKET", "1")
        scene.close("LIMIT", "1", -2.5)


def sell_what_stands_for_a_loss(scene: Scene) -> None:
    """A cross loss stands on what is available; a sale far above the mark would take that for its own position."""
    scene.begin(4_200, 100)
    scene.house.lever(POOR, ETHER, 1)
    scene.open("1")
    scene.mark(-5)
    scene.house.place(RICH, OrderRequest(ETHER, "BUY", "LIMIT", Decimal("1.08"), Decimal(3_225)))
    scene.poor(OrderRequest(ETHER, "SELL", "LIMIT", Decimal("1.08"), Decimal(3_000)))
    assert scene.position(ETHER) < 0
    scene.watch()


def drained_by_leverage(scene: Scene) -> None:
    """All the margin at 1 ×, then a leverage that takes nearly all of it away; and more of the same, far away."""
    scene.begin(100_000, 1)
    scene.open("1")
    scene.house.lever(POOR, BITCOIN, 100)
    check(scene.house)
    scene.house.move_margin(POOR, BITCOIN, Decimal(-10))
    scene.house.withdraw(POOR, scene.house.accounts[POOR].available - 700)
    check(scene.house)
    scene.rich("1", 48)
    scene.poor(scene.order("MARKET", "1"))
    scene.rich("2", -48, same=True)
    scene.close("MARKET", "1")
    scene.close("LIMIT", "1", -48)


def add_to_what_is_due(scene: Scene) -> None:
    """A position below its maintenance margin does not grow, however well the new part is backed."""
    scene.begin(1_000, 100)
    scene.open("1")
    scene.mark(-5.4)
    scene.rich("0.001", 0)
    scene.poor(scene.order("LIMIT", "0.001", 0))
    scene.watch()


def turn_round(scene: Scene) -> None:
    """Close at a loss and open the other way with one order: the new position has a margin of its own, or is none."""
    for money in (750, 1_400, 2_000):
        scene.anew()
        scene.begin(money, 100 if money < 1_000 else 50)
        scene.open("1")
        scene.mark(-8.4 if money > 1_000 else -5)
        scene.rich("2", 0, same=True)
        scene.poor(scene.order("LIMIT", "2", 0, side=opposite(scene.side)))
        scene.rich("2", 18)
        scene.poor(scene.order("LIMIT", "1", 10, reduce_only=True))
        scene.poor(scene.order("LIMIT", "1", 18, reduce_only=True))
        scene.watch()


def turn_round_after_another(scene: Scene) -> None:
    """Two orders that only reduce, one of them on paper only, and one taker who sweeps both; or the second is left
    behind by other closings."""
    for first in ("reduce_only", "plain", "larger"):
        scene.anew()
        scene.begin(700, 100)
        scene.open("1")
        scene.mark(-4)
        away = opposite(scene.side)
        scene.poor(scene.order("LIMIT", "1", 2, side=away))
        if first == "larger":
            scene.rich("0.1", 0)
            scene.poor(scene.order("LIMIT", "0.1", 0))
        scene.poor(scene.order("LIMIT", "1", 1.5, side=away, reduce_only=first == "reduce_only"))
        scene.rich("2.5", 3, same=True)
        scene.mark(1)
        scene.rich("2", 12)
        scene.poor(scene.order("LIMIT", "1", 12, reduce_only=True))
        scene.watch()


ATTACKS: tuple[Attack, ...] = (
    far_limit,
    far_limit_without_money,
    amended_far,
    amended_to_all_the_money,
    close_far,
    beyond_the_fund,
    stops_of_the_moment,
    run_from_funding,
    hide_behind_a_halt,
    wait_below,
    without_a_mark,
    sell_what_waited,
    lose_more_than_its_own,
    pay_with_a_profit_on_paper,
    count_money_twice,
    take_the_cover_away,
    sell_what_stands_for_a_loss,
    drained_by_leverage,
    add_to_what_is_due,
    turn_round,
    turn_round_after_another,
)
SCENES: tuple[tuple[Side, bool], ...] = (("BUY", False), ("SELL", False), ("BUY", True), ("SELL", True))
