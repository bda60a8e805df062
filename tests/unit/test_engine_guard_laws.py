"""Guards of fills: the engine and the reference book agree, whatever backs the positions and wherever the mark is."""

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis.stateful import rule

from domain.instruments import SHIPPED
from domain.matching import AnyCommand, AnyEvent, Cancelled, CancelReplace, Expired, New, Rejected, Trade, encode
from engine.book import Account
from engine.matcher import Matcher
from tests.engine_agreement import Agreement, assert_same_book, assert_sound
from tests.engine_strategies import GUARDED_COMMANDS
from tests.guarded_commands import guarded_commands
from tests.reference_book import ReferenceMatcher


class GuardedAgreement(Agreement):
    """With users who have terms, beside those who have none."""

    @rule(command=GUARDED_COMMANDS)
    def apply_guarded(self, command: AnyCommand) -> None:
        self.apply(command)

    @rule(command=GUARDED_COMMANDS)
    def apply_guarded_too(self, command: AnyCommand) -> None:
        self.apply(command)


TestGuardedAgreement = GuardedAgreement.TestCase
TestGuardedAgreement.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(40))
def test_the_engine_and_the_reference_book_agree_where_fills_are_guarded(seed: int) -> None:
    instrument = SHIPPED[seed % len(SHIPPED)]
    matcher, reference = Matcher(instrument), ReferenceMatcher(instrument)
    for command in guarded_commands(400, seed):
        assert matcher.apply(command) == reference.apply(command)
        assert_same_book(matcher, reference)
    assert_sound(matcher)


def test_guarded_logs_have_every_kind_of_event_about_guards() -> None:
    ended: set[tuple[str, str]] = set()
    trades: set[str] = set()
    backed: set[str] = set()
    for seed in range(40):
        matcher = Matcher(SHIPPED[0])
        for command in guarded_commands(400, seed):
            accounts = matcher.book.accounts
            crosses = {user_id: account.cross for user_id, account in accounts.items() if account.leverage}
            lots = {user_id: account.position for user_id, account in accounts.items()}
            backed |= {kind for account in accounts.values() if account.leverage for kind in kinds_of_backing(account)}
            events = matcher.apply(command)
            ended |= {(type(e).__name__, e.reason) for e in events if isinstance(e, Cancelled | Expired | Rejected)}
            for event in events[:2]:
                if isinstance(event, Trade):
                    trades |= kinds_of(event, lots, crosses)
    assert ended >= {
        ("Cancelled", "MARGIN_AT_MARK"),
        ("Expired", "MARGIN_AT_MARK"),
        ("Expired", "MARK_PRICE_UNAVAILABLE"),
        ("Rejected", "MARK_PRICE_UNAVAILABLE"),
        ("Expired", "FOK_NOT_FILLABLE"),
        ("Expired", "PROTECTION_PRICE"),
    }
    sides = [(whose, mode, way) for whose in ("taker", "maker") for mode in (True, False) for way in ("long", "short")]
    assert trades >= {f"{whose} {mode} {way} {what}" for whose, mode, way in sides for what in ("closes", "flips")}
    assert trades >= {"taker open loss", "maker open loss", "reduce-only", "basis"}
    assert backed == {f"{side} {what} backed" for side in ("bids", "asks") for what in ("not", "partly", "fully")}


def kinds_of_backing(account: Account) -> set[str]:
    """Of which sides the orders may open, and how much of that."""
    kinds = set()
    for side, lots, backed, closing in (
        ("bids", account.bids, account.bids_backed, -account.position),
        ("asks", account.asks, account.asks_backed, account.position),
    ):
        opening = lots - max(0, closing)
        if opening > 0:
            kinds.add(f"{side} {'fully' if backed == opening else 'partly' if backed else 'not'} backed")
    return kinds


def kinds_of(trade: Trade, lots: dict[int, int], crosses: dict[int, bool]) -> set[str]:
    """What a trade, the first after `lots` were held, is an instance of; `crosses` has who is guarded, and how."""
    kinds = set()
    bought = trade.quantity if trade.taker_side == "BUY" else -trade.quantity
    for whose, user_id, change in (
        ("taker", trade.taker_user_id, bought),
        ("maker", trade.maker_user_id, -bought),
    ):
        held = lots.get(user_id, 0)
        if user_id in crosses and held * change < 0:
            what = "flips" if abs(change) > abs(held) else "closes"
            kinds.add(f"{whose} {crosses[user_id]} {'long' if held > 0 else 'short'} {what}")
    facts = {
        "taker open loss": trade.taker_open_loss > 0,
        "maker open loss": trade.maker_open_loss > 0,
        "reduce-only": trade.taker_leverage > 0 and trade.taker_reduce_only,
        "basis": trade.maker_basis > 0 and trade.maker_leverage > 0,
    }
    return kinds | {name for name, is_so in facts.items() if is_so}


@pytest.mark.parametrize("seed", range(20))
def test_a_matcher_loaded_from_a_dump_goes_on_with_the_same_guards(seed: int) -> None:
    whole, loaded = Matcher(SHIPPED[0]), Matcher(SHIPPED[0])
    for number, command in enumerate(guarded_commands(400, seed)):
        if number % 7 == 0:
            assert loaded.dump() == whole.dump()
            loaded = Matcher.load(SHIPPED[0], loaded.dump())
        assert list(map(encode, loaded.apply(command))) == list(map(encode, whole.apply(command)))
    assert loaded.dump() == whole.dump()


@pytest.mark.parametrize("seed", range(60))
def test_a_guarded_fill_or_kill_order_is_filled_or_does_not_trade(seed: int) -> None:
    matcher = Matcher(SHIPPED[0])
    orders: dict[int, New] = {}
    for command in guarded_commands(400, seed):
        new = command if isinstance(command, New) else command.order if isinstance(command, CancelReplace) else None
        if new and new.order_id not in matcher.book.orders and new.order_id not in matcher.stops.orders:
            orders[new.order_id] = new
        for order_id, lots in lots_left(matcher.apply(command)).items():
            assert not lots or orders[order_id].time_in_force != "FOK"


def lots_left(events: list[AnyEvent]) -> dict[int, int]:
    """By taker, how many lots its last trade left open."""
    left: dict[int, int] = defaultdict(int)
    for event in events:
        if isinstance(event, Trade):
            left[event.taker_order_id] = event.taker_remaining
    return left
