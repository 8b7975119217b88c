"""A message that has a reply: the word that the runtime and the messages share."""

from typing import Generic, TypeVar

R_co = TypeVar("R_co", covariant=True)


class Request(Generic[R_co]):
    """Base of messages that have a reply of type ``R_co``."""

    __slots__ = ()
