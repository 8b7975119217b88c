"""Every error that vmactor raises on purpose: one flat tree, grouped by who is at fault.

::

    VmactorError
     +- IllegalArgumentError          the caller: a value that can never be right
     +- SecurityError                 the caller: not allowed to do this
     |   +- UnsafeImageError          a disk image that would make a VMM open other files
     +- IllegalStateError             the caller: right call, wrong moment
     |   +- InvalidPayloadTransitionError   the guest: payload states only move forward
     |   +- ActorDiedError            the actor ended before it answered
     |   +- MailboxFullError          more work than the actor accepts without waiting
     |   +- SlowSubscriberError       a subscriber that was to be disconnected when it gets too slow, and did
     |   +- NotConnectedError         there is no daemon at a socket, or the connection to it has ended
     +- UnsupportedOperationError     this VMM, host or version cannot do it
     +- DeadlineExceededError         no answer in time; the actor or VMM may be stuck
     |   +- NotStoppedError           the VM is still there after all that was done to end it
     +- ServiceSpecificError          the host, the VMM or we ourselves: carries a number (always -1 so far)
         +- StartFailedError          the VMM did not come up; carries the cause
         +- VmmError                  the VMM refused a request or answered nonsense
         +- ImageError                an image could not be made, or is broken
         |   +- ApkError              an APK or idsig is not as it should be; says which check failed
         +- LabelError                the label of a file does not allow to give it to a VM
         +- VsockError                no such listener in the guest, helper gone, guest not up yet
         +- ResourceExhaustedError    out of CIDs, descriptors, processes, space; names the limit
             +- CapacityExceededError   the same, foreseen: a VM was not accepted, or not started

``kind`` is the reference's name (binder exception codes in ``CODES``), stable for clients in any language.
A message says what to do next; causes are chained (``raise ... from``), and unlike in the reference a failed
start tells its cause in the message (docs/differences.md).
"""

import errno
from typing import ClassVar, Final

CODES: Final = {
    "SECURITY": -1,
    "BAD_PARCELABLE": -2,
    "ILLEGAL_ARGUMENT": -3,
    "NULL_POINTER": -4,
    "ILLEGAL_STATE": -5,
    "UNSUPPORTED_OPERATION": -7,
    "SERVICE_SPECIFIC": -8,
    "TRANSACTION_FAILED": -129,
}
"""Binder exception codes of the reference's error kinds (reference: error model)."""


class VmactorError(Exception):
    """Base of all deliberate errors.

    Attributes:
        kind: The reference's name of the error kind, e.g. ``ILLEGAL_STATE``.
    """

    kind: ClassVar[str] = "TRANSACTION_FAILED"

    @property
    def code(self) -> int:
        """The binder exception code of ``kind``."""
        return CODES[self.kind]

    @property
    def message(self) -> str:
        """The text alone, without the class name."""
        return str(self)

    def about(self, what: str) -> "VmactorError":
        """The same error, which says at its beginning what it is about."""
        return type(self)(f"{what}: {self}")


class IllegalArgumentError(VmactorError):
    """A value that can never be right; correct the call."""

    kind = "ILLEGAL_ARGUMENT"


class SecurityError(VmactorError):
    """The caller may not do this."""

    kind = "SECURITY"


class UnsafeImageError(SecurityError):
    """A disk image that a guest may have changed into another format, or that names other files."""


class IllegalStateError(VmactorError):
    """The call is right, the moment is not."""

    kind = "ILLEGAL_STATE"


class InvalidPayloadTransitionError(IllegalStateError):
    """A guest tried to move its payload's state sideways or back."""


class ActorDiedError(IllegalStateError):
    """The actor ended before it answered; the request may or may not have had an effect."""


class MailboxFullError(IllegalStateError):
    """The mailbox has no room; try again, or use the form that waits."""


class SlowSubscriberError(IllegalStateError):
    """A subscription was ended because its reader was too slow, as it had asked for.

    Attributes:
        waiting: How many events waited to be read; they could still be read.
        after: The number of the last one of them, to subscribe again after.
    """

    def __init__(self, message: str, *, waiting: int, after: int) -> None:
        super().__init__(message)
        self.waiting = waiting
        self.after = after


class NotConnectedError(IllegalStateError):
    """No daemon answers at a socket, or the connection has ended; what was asked for may have been done."""


class UnsupportedOperationError(VmactorError):
    """This VMM, host or version cannot do it."""

    kind = "UNSUPPORTED_OPERATION"


class DeadlineExceededError(VmactorError):
    """No answer before the deadline; a late answer is discarded."""

    kind = "TRANSACTION_FAILED"


class NotStoppedError(DeadlineExceededError):
    """A VM is still there after all that was to be done to end it, and all the time given for it."""


class ServiceSpecificError(VmactorError):
    """A failure of the host, the VMM or vmactor itself.

    Attributes:
        number: The service-specific integer; the reference uses only -1.
    """

    kind = "SERVICE_SPECIFIC"
    number: ClassVar[int] = -1


class StartFailedError(ServiceSpecificError):
    """The VMM did not come up; the message holds the cause. The VM is dead afterwards."""


class VmmError(ServiceSpecificError):
    """The VMM refused a request, or answered something that is not an answer. The VM lives on."""


class ImageError(ServiceSpecificError):
    """An image, idsig or the like could not be made, or is broken; the message says what to do."""


class ApkError(ImageError):
    """An APK or its idsig is not as it should be.

    Attributes:
        reason: What is wrong, in the reference's words and form where it has some.
        text: Its first line.
        causes: The causes below that, the nearest first.
        advice: What to do; it ends the message.
    """

    def __init__(self, text: str, *causes: str, advice: str) -> None:
        chain = "\n    ".join(
            causes if len(causes) == 1 else [f"{number}: {cause}" for number, cause in enumerate(causes)]
        )
        self.text = text
        self.causes = causes
        self.advice = advice
        self.reason = f"{text}\n\nCaused by:\n    {chain}" if causes else text
        super().__init__(f"{self.reason}; {advice}")

    def about(self, what: str) -> "ApkError":
        """The same error, as the cause of another."""
        return ApkError(what, self.text, *self.causes, advice=self.advice)


class LabelError(ServiceSpecificError):
    """The SELinux label of a file does not allow to give it to a VM; the kind is the reference's."""


class VsockError(ServiceSpecificError):
    """A vsock connection could not be made. The VM lives on."""


class ResourceExhaustedError(ServiceSpecificError):
    """The host ran out of something; the message names the limit and what to set."""


class CapacityExceededError(ResourceExhaustedError):
    """The host has no room for one more VM; nothing was begun, and it may be tried again later.

    Attributes:
        resource: What there is too little of, e.g. ``DESCRIPTORS`` (names of ``vmactor.limits.Resource``).
        limit: How much there can be.
        used: What is taken of it, or promised to VMs.
        needed: What the VM needs beside that; 0 at a start, where it was promised already.
        advice: What to set or do; it ends the message.
    """

    def __init__(
        self, message: str, *, resource: str, limit: int, used: int, needed: int, advice: str
    ) -> None:
        super().__init__(message)
        self.resource = resource
        self.limit = limit
        self.used = used
        self.needed = needed
        self.advice = advice


def hint(error: OSError) -> str:
    """What to do about an error of the system; empty where the error says it all."""
    match error.errno:
        case errno.EMFILE:
            return "; raise this process's limit of open files (ulimit -n, LimitNOFILE=)"
        case errno.ENFILE:
            return "; raise the host's limit of open files (sysctl fs.file-max)"
        case errno.EAGAIN | errno.ENOMEM | errno.ENOBUFS:
            return (
                "; the limit of processes or memory is reached: stop some, or raise it (ulimit -u, TasksMax=)"
            )
        case errno.ENOSPC | errno.EDQUOT:
            return "; make room there"
        case errno.ENOLCK:
            return "; the limit of locks or memory is reached: stop some programs, or raise it (ulimit -x)"
    return ""
