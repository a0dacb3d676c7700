"""The HTTP server: the protocol, its checks and the playground."""
