"""Names in Redis of what the market process publishes; the api process reads them."""

from domain.periods import PERIODS_MS

# An operator's wish to hold the index of an instrument at a price: a key with the price, and a nudge to look at it.
HELD_PRICE_CHANNEL = "market:admin-price"

CHANNELS = ("depth", "trades", "tickers")


def kline_channel(period: str) -> str:
    """Klines are a channel a period."""
    return f"kline:{period}"


KLINE_CHANNELS = tuple(map(kline_channel, PERIODS_MS))


def snapshot_key(channel: str, instrument_id: str) -> str:
    """The key of a channel's snapshot message."""
    return f"market:{'ticker' if channel == 'tickers' else channel}:{instrument_id}"


def update_channel(channel: str, instrument_id: str) -> str:
    """The pub/sub channel of a channel's update messages."""
    return f"ws:{channel}:{instrument_id}"


def mark_key(instrument_id: str) -> str:
    """The key of the latest mark price document."""
    return f"market:mark:{instrument_id}"


def held_price_key(instrument_id: str) -> str:
    """The key of the price at which an operator holds the index; absent when the index moves by itself."""
    return f"{HELD_PRICE_CHANNEL}:{instrument_id}"
