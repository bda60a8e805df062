"""Rows of the ledger's tables; their fields carry the names of the columns."""

from decimal import Decimal
from typing import NamedTuple


class JournalRow(NamedTuple):
    """What names a journal, and exists once."""

    reference_type: str
    reference_id: str


class EntryRow(NamedTuple):
    """A row of a journal: of a user, with the balance after it, or of a system account, without."""

    reference_type: str
    reference_id: str
    entry_type: str
    account: str
    user_id: int | None
    asset: str
    instrument_id: str | None
    delta_available: Decimal
    delta_reserved: Decimal
    balance_after: Decimal | None


class BalanceRow(NamedTuple):
    """What a user has of an asset."""

    user_id: int
    asset: str
    available: Decimal
    reserved: Decimal


class HoldRow(NamedTuple):
    """What is held of a user's balance for one instrument."""

    user_id: int
    instrument_id: str
    asset: str
    order_margin: Decimal
    position_margin: Decimal
    order_short: Decimal
    margin_version: int


class SystemRow(NamedTuple):
    """What one of the exchange's own accounts has of an asset, or how much it changes by."""

    account: str
    asset: str
    balance: Decimal
