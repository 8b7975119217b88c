"""MessagePack-RPC with descriptors over a unix socket; both sides of it. Knows no VM."""
