"""Traders at work on a running exchange, through its public API only: a recorded or generated market is replayed."""
