"""Colluding accounts against a running exchange: a seeded random program, and the laws of docs/solvency.md in SQL.

The laws read the raw tables, and what a witness in the database wrote down; they use none of the exchange's own rules.
"""
