"""How a user's money in one asset divides into available, order margin and position margin."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal

from domain.margin import initial_margin
from domain.money import AMOUNT_STEP, ZERO, round_down, round_up

# What a liquidation costs beside the trading fees, as a fraction of the notional it closes.
LIQUIDATION_FEE_RATE = Decimal("0.005")


@dataclass(frozen=True, slots=True)
class Wallet:
    """A user's balance as one instrument sees it.

    `order_margin` and `position_margin` are held for this instrument (part of `reserved`). `order_short` is what the
    orders require beyond `order_margin`: above 0 when a loss has used up the money, below 0 when settlement freed
    margin that a freeze still on its way will then not have to hold.
    """

    available: Decimal = ZERO
    order_margin: Decimal = ZERO
    position_margin: Decimal = ZERO
    order_short: Decimal = ZERO

    @property
    def reserved(self) -> Decimal:
        """What is held for this instrument."""
        return self.order_margin + self.position_margin


@dataclass(frozen=True, slots=True)
class Settled:
    """A wallet after settlement, what the insurance fund had to add to keep it from going negative, and what the fund
    got from a liquidation: its fee, and what was left of an isolated position's margin (`surplus`). `margin_short` is
    what the position should have got and there was not: its fills count on it. All >= 0."""

    wallet: Wallet
    insurance: Decimal = ZERO
    liquidation_fee: Decimal = ZERO
    surplus: Decimal = ZERO
    margin_short: Decimal = ZERO


@dataclass(frozen=True, slots=True)
class BookedFill:
    """What the wallet has to know of a fill: the position before and after it (signed, base), its price, the leverage
    that new parts of the position are backed at, profit realised and trading fee (quote), and whether it was forced.
    `open_loss` is what backs new parts beyond that (quote per base): what they lost at once against the mark.
    """

    before: Decimal
    after: Decimal
    price: Decimal
    leverage: int
    realized_pnl: Decimal
    fee: Decimal
    is_liquidation: bool = False
    is_cross: bool = False
    open_loss: Decimal = ZERO

    def opening_margin(self, quantity: Decimal) -> Decimal:
        """What backs `quantity` that it opened: notional / leverage, and the open loss. A sale below the mark has its
        initial margin at the mark."""
        price = self.price + self.open_loss if self.after < self.before else self.price
        return initial_margin(quantity * price, self.leverage) + round_up(quantity * self.open_loss)

    @property
    def cash(self) -> Decimal:
        """Profit less trading fee."""
        return self.realized_pnl - self.fee

    @property
    def closed_notional(self) -> Decimal:
        """Quote value, at the fill's price, of what it closed."""
        closed = abs(self.before) if self.before * self.after < 0 else max(ZERO, abs(self.before) - abs(self.after))
        return closed * self.price


def freeze(wallet: Wallet, amount: Decimal) -> Wallet | None:
    """Require `amount` more (>= 0) for orders and hold it, less what was freed in advance.

    None when available does not cover it, and nothing changes.
    """
    held = max(ZERO, amount + min(wallet.order_short, ZERO))
    if held > wallet.available:
        return None
    return replace(
        wallet,
        available=wallet.available - held,
        order_margin=wallet.order_margin + held,
        order_short=wallet.order_short + amount - held,
    )


def settle(wallet: Wallet, cash: Decimal, position_margin: Decimal, order_margin_delta: Decimal) -> Settled:
    """Pay `cash` (profit less fees, either sign) and divide what there is anew.

    First the position gets `position_margin`, then open orders get what they required before plus
    `order_margin_delta`, the rest is available. What cannot be held for orders is kept as `order_short` (their
    cancellation follows); what is missing altogether the insurance fund pays.
    """
    required = wallet.order_margin + wallet.order_short + order_margin_delta
    total = wallet.available + wallet.order_margin + wallet.position_margin + cash
    insurance = max(ZERO, -total)
    total += insurance
    held_position = min(position_margin, total)
    held_orders = max(ZERO, min(required, total - held_position))
    return Settled(
        Wallet(total - held_position - held_orders, held_orders, held_position, required - held_orders),
        insurance,
        margin_short=position_margin - held_position,
    )


def settle_within(wallet: Wallet, free: Decimal, position_margin: Decimal, order_margin_delta: Decimal) -> Wallet:
    """Divide what there is anew (see `settle`), of which no more than `free` (>= 0) of what is available is touched."""
    aside = max(ZERO, wallet.available - free)
    moved = settle(replace(wallet, available=wallet.available - aside), ZERO, position_margin, order_margin_delta)
    return replace(moved.wallet, available=moved.wallet.available + aside)


def keep_back(wallet: Wallet, held_before: Decimal, stands: Decimal) -> Wallet:
    """Give back of what orders hold more than `held_before`, as far as `stands` (>= 0) is not left available.

    What is given back is `order_short`: those orders are cancelled for it.
    """
    back = min(max(ZERO, stands - wallet.available), max(ZERO, wallet.order_margin - held_before))
    return replace(
        wallet,
        available=wallet.available + back,
        order_margin=wallet.order_margin - back,
        order_short=wallet.order_short + back,
    )


def return_margin(wallet: Wallet, before: Wallet, stands: Decimal) -> Wallet:
    """Give back what fills took of the available money that there was `before` for more margin of the position, as far
    as `stands` (>= 0) is not left available.

    A sale far above the price at which its margin is held takes more of it; without that it is backed as its order was.
    """
    grown = wallet.position_margin - before.position_margin
    back = max(ZERO, min(stands - wallet.available, before.available - wallet.available, grown))
    return replace(wallet, available=wallet.available + back, position_margin=wallet.position_margin - back)


def margin_after(margin: Decimal, fill: BookedFill) -> Decimal:
    """What backs a position after a fill, when `margin` did before it.

    Opening adds `BookedFill.opening_margin`; reducing releases the closed share (rounded down, the rest stays).
    """
    before, after = abs(fill.before), abs(fill.after)
    if fill.before * fill.after < 0:
        return fill.opening_margin(after)
    if after >= before:
        return margin + fill.opening_margin(after - before)
    return ZERO if not after else margin - round_down(margin * (before - after) / before)


def liquidation_fee(closed_notional: Decimal, left: Decimal, rate: Decimal = LIQUIDATION_FEE_RATE) -> Decimal:
    """The insurance fund's fee for closing `closed_notional`, rounded up, but no more than is `left` of the margin.

    Source of the rule: dYdX v4, insurance fund delta of a liquidation.
    """
    return min(round_up(closed_notional * rate), max(ZERO, left))


def liquidate(wallet: Wallet, fill: BookedFill) -> Settled:
    """Book a liquidation's fill on an isolated position: of its margin, the closed part's share bears the result.

    What is left of that share stays with the position while there is one, and goes to the insurance fund when there is
    none; what is missing the fund pays. The rest of the margin is not touched (but for rounding), so that the rest of
    the position does not become bankrupt at a price at which the whole was not; nor is the user's other money.
    """
    kept = margin_after(wallet.position_margin, fill)
    left = wallet.position_margin - kept + fill.cash
    if -AMOUNT_STEP <= left < ZERO:
        # No more than rounding: the shares of margin and entry notional are rounded each by itself.
        kept, left = (kept - AMOUNT_STEP, ZERO) if kept else (kept, left)
    if left <= ZERO:
        return Settled(replace(wallet, position_margin=kept), insurance=-left)
    fee = liquidation_fee(fill.closed_notional, left)
    if fill.after:
        return Settled(replace(wallet, position_margin=kept + left - fee), liquidation_fee=fee)
    return Settled(replace(wallet, position_margin=ZERO), liquidation_fee=fee, surplus=left - fee)


def leave_to_user(settled: Settled, amount: Decimal) -> Settled:
    """Leave up to `amount` (>= 0) of what the fund got from a liquidation available to its user: of what was left of
    the margin first, then of the fee."""
    surplus = min(amount, settled.surplus)
    fee = min(amount - surplus, settled.liquidation_fee)
    return replace(
        settled,
        wallet=replace(settled.wallet, available=settled.wallet.available + surplus + fee),
        liquidation_fee=settled.liquidation_fee - fee,
        surplus=settled.surplus - surplus,
    )


def settle_fills(wallet: Wallet, fills: Iterable[BookedFill], order_margin_delta: Decimal) -> Settled:
    """Book fills in their order, then divide anew (see `settle`).

    A liquidation of a cross position is like any other fill, all of the user's money stands behind it, but for its fee,
    which is taken from what is left of the closed part's share of that money.
    """
    cash, position_margin = ZERO, wallet.position_margin
    insurance = fee = surplus = short = ZERO
    for fill in fills:
        if fill.is_liquidation and not fill.is_cross:
            # What came before has had its effect when the liquidation comes.
            settled = settle(wallet, cash, position_margin, ZERO)
            forced = liquidate(settled.wallet, fill)
            wallet, cash, position_margin = forced.wallet, ZERO, forced.wallet.position_margin
            insurance += settled.insurance + forced.insurance
            fee += forced.liquidation_fee
            surplus += forced.surplus
            short += settled.margin_short
            continue
        before = wallet.available + wallet.order_margin + wallet.position_margin + cash
        cash += fill.cash
        position_margin = margin_after(position_margin, fill)
        if fill.is_liquidation:
            # No more than the closed part's share leaves: the next fills of the same order need the rest.
            share = before if not fill.after else round_down(before * (1 - fill.after / fill.before))
            charged = liquidation_fee(fill.closed_notional, share + fill.cash)
            cash -= charged
            fee += charged
    settled = settle(wallet, cash, position_margin, order_margin_delta)
    return Settled(settled.wallet, insurance + settled.insurance, fee, surplus, short + settled.margin_short)
