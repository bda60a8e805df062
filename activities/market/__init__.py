"""The market service's prices, as the other services read them."""
