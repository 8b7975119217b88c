"""What both sides of the socket share: names, and how configurations, records, events and errors look there.

docs/protocol.md is the description for others; the two change together.
"""

from typing import Final

VERSION: Final = 1
"""Goes up when something is taken away or changes its meaning; additions do not count."""
CAPABILITIES: Final = ("descriptors", "keep", "subscribe")
