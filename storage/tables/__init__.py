"""Every table, one Postgres schema and one module per service. Alembic derives its migrations from here.

A service reads and writes its own schema only; what others may read is published as a view `v_…`
(see `storage/views.py`). Tables whose rows are updated leave room in their pages, so that an update stays there.
"""

from storage.tables import auth, ledger, market, matching, orders, outbox, positions, reporting, risk, users
from storage.tables.common import SCHEMAS, metadata

__all__ = [
    "SCHEMAS",
    "auth",
    "ledger",
    "market",
    "matching",
    "metadata",
    "orders",
    "outbox",
    "positions",
    "reporting",
    "risk",
    "users",
]
