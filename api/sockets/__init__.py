"""What WebSocket endpoints are built on: the protocol, one connected client, and the feeds that fill it."""
