"""vmactor: virtual machines as supervised actors."""

__version__ = "0.1.0"
