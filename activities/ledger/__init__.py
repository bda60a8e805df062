"""The ledger service: every movement of money, double entry."""
