"""The positions service: who holds what."""
