"""An exchange in memory, for whoever wants to try what any set of traders can do to it."""
