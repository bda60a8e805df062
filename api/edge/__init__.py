"""What every request passes before its endpoint: the server, its protocol, the gateway, counting, caching."""
