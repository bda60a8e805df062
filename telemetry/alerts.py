"""What an operator must hear of: a line `ALERT …` in the log, and a counter that Prometheus watches."""

import logging

from telemetry.metrics import ALERTS

log = logging.getLogger("alerts")

AUDIT_FAILED = "AUDIT_FAILED"
ENGINE_LEASE_LOST = "ENGINE_LEASE_LOST"
ENGINE_STOPPED = "ENGINE_STOPPED"
INDEX_FROZEN = "INDEX_FROZEN"
INSURANCE_SHORTFALL = "INSURANCE_SHORTFALL"
MONITOR_FAILED = "MONITOR_FAILED"
NO_MARKET_DATA = "NO_MARKET_DATA"
REGISTRATION_FAILED = "REGISTRATION_FAILED"
SETTLEMENT_LAG = "SETTLEMENT_LAG"
STREAM_GAP = "STREAM_GAP"

NAMES = (
    AUDIT_FAILED,
    ENGINE_LEASE_LOST,
    ENGINE_STOPPED,
    INDEX_FROZEN,
    INSURANCE_SHORTFALL,
    MONITOR_FAILED,
    NO_MARKET_DATA,
    REGISTRATION_FAILED,
    SETTLEMENT_LAG,
    STREAM_GAP,
)

# Prometheus sees an increase only of a counter that it has seen before.
for _name in NAMES:
    ALERTS.labels(_name)


def alert(name: str, message: str, *args: object) -> None:
    """Raise the alert `name`, one of NAMES; `message` and `args` as for logging."""
    assert name in NAMES, f"Expected one of {NAMES}, was {name}"
    ALERTS.labels(name).inc()
    log.error(f"ALERT {message}", *args, extra={"alert": name})
