"""Who calls: addresses, passwords, access tokens, sessions, signed requests, and the vault of their secrets."""
