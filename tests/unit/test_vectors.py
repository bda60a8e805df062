"""Published worked examples of other exchanges, where their formula is ours: the same figures come out.

The examples lie beside the checkout, not in it (they quote other people's pages).
"""

import json
from collections.abc import Callable
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from domain.exposure import Exposure
from domain.funding import funding_payment
from domain.funding_rate import bounded, funding_rate
from domain.index_price import clamp_to_median, weighted_average
from domain.liquidation import Holding, deleverage_score
from domain.margin import (
    Tier,
    bankruptcy_price,
    initial_margin,
    liquidation_price,
    maintenance_margin,
    open_loss,
    unrealized_pnl,
)
from domain.mark_price import funding_basis, impact_notional, mark_price, premium_index
from domain.money import AMOUNT_STEP, ZERO, round_up
from domain.positions import Position, apply_fill
from domain.wallet import Wallet, liquidation_fee, settle

FILE = Path(__file__).parents[3] / "shared" / "vectors.json"
if not FILE.exists():
    pytest.skip(
        "The published examples (shared/vectors.json) are not beside this checkout",
        allow_module_level=True,
    )
VECTORS: list[dict[str, Any]] = json.loads(FILE.read_text())

Inputs = dict[str, Any]
Figures = dict[str, Decimal | list[Decimal]]


def one_tier(rate: Decimal, cumulative: Decimal = ZERO) -> list[Tier]:
    return [Tier(ZERO, rate, cumulative, 1)]


def found(price: Decimal | None) -> Decimal:
    assert price is not None
    return price


def liquidation_dydx(given: Inputs) -> Figures:
    size, entry, margin = Decimal(given["size"]), Decimal(given["entry_price"]), Decimal(given["equity"])
    notional = abs(size) * entry
    price = found(liquidation_price(size, notional, margin, one_tier(Decimal(given["mmf"]))))
    return {"liquidation_price": price, "equity_at_liquidation": margin + unrealized_pnl(size, notional, price)}


def liquidation_hyperliquid(given: Inputs) -> Figures:
    size = given["side"] * Decimal(given["position_size"])
    rate = 1 / Decimal(given["maintenance_leverage"])
    notional = abs(size) * Decimal(given["price"])
    return {
        "liquidation_price": found(liquidation_price(size, notional, Decimal(given["isolated_margin"]), one_tier(rate)))
    }


def liquidation_binance(given: Inputs) -> Figures:
    """In cross margin, what other positions leave of the wallet is this one's margin."""
    margin = Decimal(given["wallet_balance"])
    if other := given.get("other_position"):
        size, mark = Decimal(other["size"]), Decimal(other["mark_price"])
        tiers = one_tier(Decimal(other["mmr"]), Decimal(other["maintenance_amount_cum"]))
        margin -= maintenance_margin(size * mark, tiers)
        margin += unrealized_pnl(size, size * Decimal(other["entry_price"]), mark)
    size = given["side"] * Decimal(given["size"])
    tiers = one_tier(Decimal(given["mmr"]), Decimal(given["maintenance_amount_cum"]))
    return {
        "liquidation_price": found(liquidation_price(size, abs(size) * Decimal(given["entry_price"]), margin, tiers))
    }


def bankruptcy_isolated(given: Inputs) -> Figures:
    entry = Decimal(given["entry_price"])
    return {"bankruptcy_price": found(bankruptcy_price(Decimal(1), entry, initial_margin(entry, given["leverage"])))}


def bankruptcy_cross(given: Inputs) -> Figures:
    size, entry = Decimal(given["size"]), Decimal(given["entry_price"])
    margin = Decimal(given["position_margin"]) + Decimal(given["wallet_balance"])
    return {"bankruptcy_price": found(bankruptcy_price(size, size * entry, margin))}


def bankruptcy_quote(given: Inputs) -> Figures:
    size, notional = Decimal(given["position"]), Decimal(given["position"]) * Decimal(given["oracle_price"])
    return {
        "bankruptcy_quote_delta": size
        * found(bankruptcy_price(size, notional, notional + Decimal(given["quote_balance"])))
    }


def insurance(given: Inputs) -> Figures:
    deposit, size, entry = Decimal(given["deposit"]), Decimal(given["position"]), Decimal(given["entry"])
    pnl = apply_fill(Position(size, size * entry), -size, Decimal(given["fill_price"])).realized_pnl
    settled = settle(Wallet(position_margin=deposit), pnl, ZERO, ZERO)
    return {"pnl_at_fill": pnl, "insurance_fund_pays": settled.insurance}


def deleverage(given: Inputs) -> Figures:
    bankrupt = given["bankrupt"]
    size, deposit = Decimal(bankrupt["position"]), Decimal(bankrupt["deposit"])
    notional = abs(size) * Decimal(bankrupt["entry"])
    price = found(bankruptcy_price(size, notional, deposit))
    loser = apply_fill(Position(size, notional), -size, price).realized_pnl
    winner = apply_fill(Position(-size, notional), size, price).realized_pnl
    return {"bankruptcy_price": price, "winner_realised": winner, "bankrupt_equity_after": deposit + loser}


def impact(given: Inputs) -> Figures:
    return {"impact_notional": impact_notional(Decimal(given["imf"]), Decimal(given["numerator"]))}


def rate_damped(given: Inputs) -> Figures:
    """Some state the premium, one the impact bid that it comes from; none has a cap as low as ours."""
    interest = Decimal(given["interest"])
    if "premium_avg" in given:
        hours = timedelta(hours=given["interval_h"])
        return {"rate": funding_rate(Decimal(given["premium_avg"]), hours, Decimal(1), interest)}
    premium = premium_index(Decimal(given["impact_bid"]), Decimal(given["oracle"]))
    return {"premium": premium, "rate_8h": funding_rate(premium, timedelta(hours=8), Decimal(1), interest)}


def rate_capped(given: Inputs) -> Figures:
    """Premium and cap are ours; their rate has neither interest nor damper, and goes on from a rounded premium."""
    premium = premium_index(Decimal(given["perp"]), Decimal(given["index"])).quantize(Decimal("0.0001"))
    rate = premium / given["realisation_hours"]
    return {"uncapped_per_hour": rate, "rate_per_hour": bounded(rate, Decimal(given["cap_per_hour"]))}


def mark_with_basis(given: Inputs) -> Decimal:
    rate = Decimal(given.get("last_funding_rate") or given["funding_rate"])
    left = timedelta(hours=float(given["time_until_funding_h"]))
    interval = timedelta(hours=given.get("period_h") or given["interval_h"])
    return mark_price(Decimal(given["index"]), ZERO, funding_basis(rate, left, interval))


def maintenance_progressive(given: Inputs) -> Figures:
    tiers: list[Tier] = []
    for floor, _, rate in given["tiers"]:
        charged = maintenance_margin(Decimal(floor), tiers) if tiers else ZERO
        tiers.append(Tier(Decimal(floor), Decimal(rate), floor * Decimal(rate) - charged, 1))
    value = Decimal(given["position_value"])
    margin = maintenance_margin(value, tiers)
    return {"maintenance_margin": margin, "mmr_effective": margin / value}


def maintenance_amount(given: Inputs) -> Figures:
    floor, rate = Decimal(given["bracket_floor"]), Decimal(given["mmr_n"])
    below = Tier(ZERO, Decimal(given["mmr_prev"]), Decimal(given["amount_prev"]), 1)
    amount = floor * rate - maintenance_margin(floor, [below])
    tiers = [below, Tier(floor, rate, amount, 1)]
    return {"maintenance_amount": amount, "maintenance_margin_at_500000": maintenance_margin(Decimal(500_000), tiers)}


def pnl_unrealized(given: Inputs) -> Figures:
    return {
        "upnl": [
            unrealized_pnl(
                Decimal(held["qty"]) * (1 if held["side"] == "long" else -1),
                Decimal(held["qty"]) * Decimal(held["entry"]),
                Decimal(held["mark"]),
            )
            for held in given["positions"]
        ]
    }


def margin_one_way(given: Inputs) -> Figures:
    quantity, leverage = Decimal(given["position"]), given["leverage"]
    position = quantity * Decimal(given["mark_price"])
    state = Exposure(leverage, quantity, abs(position))
    for size, price in given["bids"]:
        state = state.with_order("BUY", Decimal(size), Decimal(price))
    for size, price in given["asks"]:
        state = state.with_order("SELL", Decimal(size), Decimal(price))
    return {"margin_requirement": initial_margin(abs(position), leverage) + state.order_margin(ZERO)}


def open_losses(given: Inputs) -> Figures:
    """Printed truncated to 2 decimals; ours is exact."""
    price, quantity, mark = (Decimal(given[name]) for name in ("order_price", "qty", "mark_price"))
    margin = initial_margin(price * quantity, given["leverage"])
    short = open_loss("SELL", quantity, price, mark)
    return {
        "initial_margin": margin.quantize(Decimal("0.01"), ROUND_FLOOR),
        "open_loss_long": open_loss("BUY", quantity, price, mark),
        "open_loss_short": short,
        "cost_short": (margin + short).quantize(Decimal("0.01"), ROUND_FLOOR),
    }


def margin_with_fee(given: Inputs) -> Figures:
    """We reserve the fee of opening only; that of closing is paid from what closing releases."""
    order = Exposure(given["leverage"]).with_order("BUY", Decimal(given["qty"]), Decimal(given["price"]))
    margin = order.order_margin(ZERO)
    return {"initial_margin": margin, "open_fee": order.order_margin(Decimal(given["taker"])) - margin}


def fees(given: Inputs) -> Figures:
    def fee(ppm: int) -> Decimal:
        return round_up(Decimal(given["fill_quote_quantums"]) * ppm / 10**6 * AMOUNT_STEP) / AMOUNT_STEP

    return {"taker_fee": fee(given["taker_ppm"]), "maker_fee": fee(given["maker_ppm"])}


def funding(given: Inputs) -> Figures:
    quantity, mark = Decimal(given["position"]), Decimal(given["mark_price"])
    assert given["side"] == "long"
    return {"position_value": quantity * mark, "long_pays": -funding_payment(quantity, mark, Decimal(given["rate"]))}


def funding_rounding(given: Inputs) -> Figures:
    return {
        "usdc_quantums": [
            funding_payment(-Decimal(ppm) / given["divisor"], AMOUNT_STEP, Decimal(1)) / AMOUNT_STEP
            for ppm in given["net_settlement_ppm"]
        ]
    }


def index_capped(given: Inputs) -> Figures:
    prices = [Decimal(price) for _, price, _ in given["sources"]]
    middle = median(prices)
    capped = [clamp_to_median(price, middle, Decimal(given["cap"])) for price in prices]
    index = weighted_average(capped, [Decimal(weight) for *_, weight in given["sources"]])
    return {"median": middle, "capped": capped, "index": index}


def index_outlier(given: Inputs) -> Figures:
    cap = Decimal(given["cap"])
    if "median" in given:
        middle = Decimal(given["median"])
        return {"value_used": clamp_to_median(middle * (1 + Decimal(given["source_deviation"])), middle, cap)}
    prices = [Decimal(price) for price in given["sources"]]
    used = [clamp_to_median(price, median(prices), cap) for price in prices]
    weights = [Fraction(weight) for weight in given["weights"]]
    relative = [Decimal(int(weight / min(weights))) for weight in weights]
    return {"used": used, "index": weighted_average(used, relative)}


def fund_delta(given: Inputs) -> Figures:
    """dYdX leaves the bankrupt what is beyond the fee; of an isolated position of ours the fund gets that, too."""
    left = Decimal(given["fill_quote"]) - Decimal(given["bankruptcy_quote"])
    rate = Decimal(given["max_liquidation_fee_rate"])
    return {"insurance_fund_delta": liquidation_fee(Decimal(given["fill_quote"]), left, rate)}


def adl_bitmex(given: Inputs) -> Figures:
    entry, mark = Decimal(given["entry"]), Decimal(given["mark"])
    holding = Holding(Decimal(1), entry, entry - Decimal(given["bankruptcy"]))
    return {"effective_leverage": mark / holding.equity(mark), "score": deleverage_score(holding, mark)}


OURS: dict[str, Callable[[Inputs], Figures]] = {
    "liquidation_price.isolated.linear": liquidation_dydx,
    "liquidation_price.isolated.linear.hyperliquid_form": liquidation_hyperliquid,
    "liquidation_price.cross.linear.tiered": liquidation_binance,
    "liquidation_price.isolated.linear.tiered": liquidation_binance,
    "bankruptcy_price.isolated.linear": bankruptcy_isolated,
    "bankruptcy_price.cross.linear": bankruptcy_cross,
    "bankruptcy_price.quote_delta.linear": bankruptcy_quote,
    "insurance_fund.contribution": insurance,
    "deleverage.close_price": deleverage,
    "insurance_fund.liquidation_fee": fund_delta,
    "adl.score.bitmex": adl_bitmex,
    "funding.impact_notional": impact,
    "funding.rate.clamp": rate_damped,
    "funding.rate.interval_scaling": rate_damped,
    "funding.rate.cap": rate_capped,
    "mark_price.price1": lambda given: {"price1": mark_with_basis(given)},
    "mark_price.fair_price": lambda given: {"mark_price": mark_with_basis(given)},
    "index_price.capped_median": index_capped,
    "index_price.outlier_cap": index_outlier,
    "maintenance_margin.tiered.progressive": maintenance_progressive,
    "maintenance_margin.tier_amount": maintenance_amount,
    "pnl.linear.unrealised": pnl_unrealized,
    "order_margin.one_way": margin_one_way,
    "order_margin.open_loss": open_losses,
    "order_margin.with_fees": margin_with_fee,
    "rounding.fees": fees,
    "funding.payment.linear": funding,
    "rounding.funding_settlement": funding_rounding,
}
# Figures of an entry that our rule does not have.
NOT_COMPUTED = {
    "maintenance_margin.tiered.progressive": {"equivalent"},
    "order_margin.with_fees": {"close_fee", "order_cost"},
}
NOT_OURS = {
    "liquidation_price.cross.inverse": "linear contracts only",
    "liquidation_price.isolated.inverse": "linear contracts only",
    "bankruptcy_price.isolated.inverse": "linear contracts only",
    "funding.payment.inverse": "linear contracts only",
    "pnl.inverse": "linear contracts only",
    "rounding.inverse_cost": "linear contracts only",
    "order_margin.with_fees.inverse": "linear contracts only",
    "rounding.bankruptcy_price": "prices of margin are unrounded; amounts have 8 decimals, not 6",
    "liquidation.order_limit_price(fillable)": "dYdX: our liquidation orders are bounded by the protection band",
    "liquidation.partial.size_to_cover_shortage": "Drift: large positions of ours are reduced tier by tier",
    "socialised_loss.per_unit": "losses are deleveraged, not socialised",
    "funding.rate.damper_deadband": "Deribit: our rate has the clamp instead",
    "mark_price.clamp_to_book_and_index": "Deribit's old rule",
    "mark_price.median_of_three": "Hyperliquid: our mark is index and premium",
    "margin.linear_in_size": "Deribit: ours has tiers",
    "adl.score.binance": "ours is BitMEX's: profit times effective leverage",
    "adl.score.hyperliquid": "ours is BitMEX's: profit times effective leverage",
    "price_validity": "Hyperliquid: ours are multiples of a tick",
}


def test_every_topic_is_tested_or_listed_as_not_ours() -> None:
    topics = {vector["topic"] for vector in VECTORS}
    assert topics == OURS.keys() | NOT_OURS.keys()
    assert not OURS.keys() & NOT_OURS.keys()


@pytest.mark.parametrize(
    "index", [pytest.param(i, id=f"{i}-{v['topic']}") for i, v in enumerate(VECTORS) if v["topic"] in OURS]
)
def test_the_published_figures_come_out(index: int) -> None:
    topic, expected = VECTORS[index]["topic"], VECTORS[index]["expected"]
    figures = OURS[topic](VECTORS[index]["inputs"])
    assert figures.keys() == expected.keys() - NOT_COMPUTED.get(topic, set())
    for name, figure in figures.items():
        printed = expected[name]
        if isinstance(figure, list):
            assert figure == [Decimal(number) for number in printed]
        else:
            # As many decimals as the source prints.
            assert figure.quantize(Decimal(printed)) == Decimal(printed), name
