"""Commands to the engine as Hypothesis strategies: few ids, users and prices, so that much happens between them."""

from hypothesis import strategies as st

from domain.matching import (
    Amend,
    Cancel,
    CancelAll,
    CancelReplace,
    Deleverage,
    MarkPrice,
    MoveMargin,
    New,
    SetCover,
    SetTerms,
)
from tests.engine_commands import AT, STOP_TYPES

# Few ids, users and prices: collisions, self-trades and duplicates are then frequent.
ORDER_IDS = st.integers(1, 40)
USERS = st.integers(1, 4)
PRICES = st.one_of(st.integers(97, 103), st.integers(97, 103), st.integers(97, 103), st.integers(-1, 0))
NEW_ORDERS = st.builds(
    New,
    at=st.integers(AT, AT + 9),
    order_id=ORDER_IDS,
    user_id=USERS,
    side=st.sampled_from(["BUY", "SELL"]),
    type=st.sampled_from(["LIMIT", "LIMIT", "LIMIT", "LIMIT", "MARKET", *STOP_TYPES]),
    time_in_force=st.sampled_from(["GTC", "GTC", "GTC", "GTC", "IOC", "FOK"]),
    price=PRICES,
    quantity=st.integers(0, 12),
    stp_mode=st.sampled_from(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]),
    liquidation=st.booleans(),
    post_only=st.sampled_from([False, False, False, True]),
    reduce_only=st.sampled_from([False, False, True]),
    stop_price=PRICES,
    working_type=st.sampled_from(["MARK", "LAST"]),
)
CHANGES = st.one_of(
    st.builds(Cancel, at=st.just(AT), order_id=ORDER_IDS, user_id=USERS),
    st.builds(CancelAll, at=st.just(AT), user_id=USERS),
    st.builds(
        Amend,
        at=st.just(AT),
        order_id=ORDER_IDS,
        user_id=USERS,
        price=st.none() | PRICES,
        quantity=st.none() | st.integers(-1, 12),
        amendment_id=st.integers(0, 2),
    ),
    st.builds(CancelReplace, at=st.just(AT), cancel_order_id=ORDER_IDS, order=NEW_ORDERS),
    st.builds(MarkPrice, at=st.just(AT), price=PRICES),
    st.builds(
        Deleverage,
        at=st.just(AT),
        user_id=USERS,
        side=st.sampled_from(["BUY", "SELL"]),
        price=PRICES,
        quantity=st.integers(-1, 20),
        counterparties=st.lists(USERS, max_size=5),
    ),
)
COMMANDS = st.one_of(NEW_ORDERS, NEW_ORDERS, CHANGES)

# The same with guards. At these prices a tick is 1 %: maintenance margin is some ticks, and so is what is held.
MILLION = 1_000_000
GUARDED_USERS = st.integers(1, 3)
# The last of them is after the end of every mark.
TIMES = st.sampled_from([AT, AT, AT, AT + 10_000, AT + 20_001])
BASES = st.sampled_from([0, 0, 99, 101, 104])
LOSSES = st.sampled_from([0, 0, 1, 2, 5])
# Millionths of a tick times a lot: of no position, of one lot, of some, and a little beside whole ticks.
MONEY = st.builds(lambda ticks, beside: ticks * MILLION + beside, st.integers(-60, 60), st.sampled_from([0, 0, 1, -1]))
# Of up to twelve lots: all, none, some.
BACKED = st.sampled_from([-1, -1, 0, 2, 5, 12])
AFTER_SEQS = st.sampled_from([0, 5, 20, 10**6])
GUARDED_ORDERS = st.builds(
    New,
    at=TIMES,
    order_id=ORDER_IDS,
    user_id=USERS,
    side=st.sampled_from(["BUY", "SELL"]),
    type=st.sampled_from(["LIMIT", "LIMIT", "LIMIT", "STOP_LIMIT", "TAKE_PROFIT_LIMIT"]),
    time_in_force=st.sampled_from(["GTC", "GTC", "GTC", "IOC", "FOK"]),
    price=st.integers(97, 103),
    quantity=st.integers(1, 12),
    stp_mode=st.sampled_from(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]),
    reduce_only=st.sampled_from([False, False, True]),
    stop_price=st.integers(98, 102),
    basis=BASES,
    loss=LOSSES,
    backed=BACKED,
)
PROTECTED_ORDERS = st.builds(
    New,
    at=TIMES,
    order_id=ORDER_IDS,
    user_id=USERS,
    side=st.sampled_from(["BUY", "SELL"]),
    type=st.sampled_from(["STOP_MARKET", "TAKE_PROFIT_MARKET", "MARKET"]),
    time_in_force=st.sampled_from(["IOC", "FOK"]),
    price=st.integers(97, 103),
    quantity=st.integers(1, 12),
    stp_mode=st.sampled_from(["EXPIRE_TAKER", "EXPIRE_MAKER", "EXPIRE_BOTH"]),
    reduce_only=st.booleans(),
    stop_price=st.integers(98, 102),
    basis=BASES,
    protection=st.sampled_from([0, 1, 12_345, 50_000]),
    backed=BACKED,
)
GUARDS = st.one_of(
    st.builds(
        SetTerms,
        at=st.just(AT),
        user_id=GUARDED_USERS,
        leverage=st.sampled_from([1, 2, 3, 10, 30, 100]),
        maintenance=st.sampled_from([0, 5_000, 20_000, 50_000, 400_000]),
        cross=st.booleans(),
        # Often where a whole price less the fee, or with it, is worth just nothing.
        bankruptcy=st.builds(
            lambda price, fee: price * (MILLION + fee), st.integers(94, 106), st.sampled_from([0, 500, -500])
        ),
    ),
    st.builds(SetCover, at=st.just(AT), user_id=USERS, cover=MONEY, after_seq=AFTER_SEQS),
    st.builds(MoveMargin, at=st.just(AT), user_id=USERS, amount=MONEY, after_seq=AFTER_SEQS),
    st.builds(
        MarkPrice,
        at=st.sampled_from([AT, AT, AT + 10_001]),
        price=st.integers(97, 103),
        frozen=st.sampled_from([False, False, False, True]),
    ),
    st.builds(
        lambda price: MarkPrice(at=AT, price=price, ceiling=price + 1),
        st.integers(97, 102),
    ),
    st.builds(
        Amend,
        at=TIMES,
        order_id=ORDER_IDS,
        user_id=USERS,
        price=st.none() | st.integers(97, 103),
        quantity=st.none() | st.integers(1, 12),
        basis=BASES,
        loss=LOSSES,
        backed=BACKED,
    ),
    st.builds(CancelReplace, at=TIMES, cancel_order_id=ORDER_IDS, order=GUARDED_ORDERS),
)
GUARDED_COMMANDS = st.one_of(GUARDED_ORDERS, GUARDED_ORDERS, PROTECTED_ORDERS, GUARDS, GUARDS)
