"""The risk service: what users may do with their money, and what is kept back for it."""
