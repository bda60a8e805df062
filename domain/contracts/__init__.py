"""Contracts of the sagas, which workflows, activities and starters share: one module per workflow.

Messages are dataclasses, one in, one out; ids travel, rows hold the data. Names and fields are in saved histories: a
field may be added with a default, nothing else may change. `queues` and `search` say where workflows run and how they
are found.
"""
