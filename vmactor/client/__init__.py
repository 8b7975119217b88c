"""A daemon's service, for programs in other processes and of other users (docs/client.md).

A program moves from embedding to the daemon by writing ``connect(path)`` in place of
``VirtualizationService()``.
"""

from vmactor.client.machine import VirtualMachine
from vmactor.client.service import VirtualizationService, connect

__all__ = ["VirtualMachine", "VirtualizationService", "connect"]
