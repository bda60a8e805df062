"""The matching service as the other services see it: commands, events, instruments."""
