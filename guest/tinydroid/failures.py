"""Why a payload is not run: what the host is told, and what is written to the failure port."""

from typing import ClassVar


class Failure(Exception):  # noqa: N818 - it ends the guest, and is told to the host under other names
    """Anything that no other class says.

    Attributes:
        code: For ``notifyError``.
        reason: For the failure port; the host makes a death reason of it.
    """

    code: ClassVar[int] = 0
    reason: ClassVar[str] = "MICRODROID_UNKNOWN_RUNTIME_ERROR"

    @property
    def port_text(self) -> str:
        """What goes to the failure port; details stand behind a bar, where the reference has them."""
        return f"{self.reason}|{self}" if type(self) is Failure else self.reason


class NotVerified(Failure):
    """An APK, or what vouches for it, is not what it should be."""

    code = 1
    reason = "MICRODROID_PAYLOAD_VERIFICATION_FAILED"


class Changed(Failure):
    """The payload is not the one that this instance was made for."""

    code = 2
    reason = "MICRODROID_PAYLOAD_HAS_CHANGED"


class BadConfig(Failure):
    """The payload's configuration cannot be used."""

    code = 3
    reason = "MICRODROID_INVALID_PAYLOAD_CONFIG"
