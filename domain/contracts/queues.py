"""Task queues, one per kind of load. The api process hosts a worker on ORDERS so that sagas start eagerly there."""

ORDERS_QUEUE = "orders"
SETTLEMENT_QUEUE = "settlement"
LIQUIDATION_QUEUE = "liquidation"
OPERATIONS_QUEUE = "operations"
