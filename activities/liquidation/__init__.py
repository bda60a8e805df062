"""Liquidations, as the risk service runs them."""
