"""The service for processes that do not trust each other, over a unix socket (docs/protocol.md)."""
