"""The orders service: orders from their entry to their end, and the sagas that carry them."""
