"""The services users and auth: accounts, credentials, sessions and API keys."""
