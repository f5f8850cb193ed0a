"""The HTTP API's requests and responses."""
