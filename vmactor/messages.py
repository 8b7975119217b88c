"""The words: enums, guest reports, events and records, all typed and immutable.

Pure data. Numbers and names are the reference's (Android VirtualizationService, AIDL interfaces of February
2023) where it has them. Nothing here does I/O, so a client in another process can import it alone.
"""

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, IntEnum, StrEnum
from typing import Any, ClassVar, Final

from vmactor.errors import IllegalArgumentError
from vmactor.request import Request

# -- Enums -----------------------------------------------------------------------------------------


class CpuTopology(IntEnum):
    """How many virtual CPUs a VM gets."""

    ONE_CPU = 0
    MATCH_HOST = 1


class DebugLevel(IntEnum):
    """How much of an app's VM can be looked into."""

    NONE = 0
    FULL = 1


class PartitionType(IntEnum):
    """What a writable partition is initialised as."""

    RAW = 0
    ANDROID_VM_INSTANCE = 1
    ENCRYPTEDSTORE = 2


class ImageKind(StrEnum):
    """What an image file is, as a VMM's prober would see it."""

    RAW = "raw"
    QCOW2 = "qcow2"
    COMPOSITE = "composite"
    ANDROID_SPARSE = "android-sparse"
    ZSTD = "zstd"


class MemoryTrimLevel(IntEnum):
    """How much memory the guest is asked to give back."""

    TRIM_MEMORY_RUNNING_CRITICAL = 0
    TRIM_MEMORY_RUNNING_LOW = 1
    TRIM_MEMORY_RUNNING_MODERATE = 2


class VirtualMachineState(IntEnum):
    """A VM's public state; 5 is unused in the reference."""

    NOT_STARTED = 0
    STARTING = 1
    STARTED = 2
    READY = 3
    FINISHED = 4
    DEAD = 6


class ErrorCode(IntEnum):
    """What a guest says went wrong with its payload."""

    UNKNOWN = 0
    PAYLOAD_VERIFICATION_FAILED = 1
    PAYLOAD_CHANGED = 2
    PAYLOAD_CONFIG_INVALID = 3


class DeathReason(IntEnum):
    """Why a VM ended."""

    INFRASTRUCTURE_ERROR = 0
    KILLED = 1
    UNKNOWN = 2
    SHUTDOWN = 3
    START_FAILED = 4
    REBOOT = 5
    CRASH = 6
    PVM_FIRMWARE_PUBLIC_KEY_MISMATCH = 7
    PVM_FIRMWARE_INSTANCE_IMAGE_CHANGED = 8
    BOOTLOADER_PUBLIC_KEY_MISMATCH = 9
    BOOTLOADER_INSTANCE_IMAGE_CHANGED = 10
    MICRODROID_FAILED_TO_CONNECT_TO_VIRTUALIZATION_SERVICE = 11
    MICRODROID_PAYLOAD_HAS_CHANGED = 12
    MICRODROID_PAYLOAD_VERIFICATION_FAILED = 13
    MICRODROID_INVALID_PAYLOAD_CONFIG = 14
    MICRODROID_UNKNOWN_RUNTIME_ERROR = 15
    HANGUP = 16
    WATCHDOG_REBOOT = 17


FAILURE_TEXTS: Final = frozenset(DeathReason(number) for number in range(7, 17))
"""The reasons that a failure text can name (a text equal to the member's name, before any ``|``)."""


def death_reason_of_text(text: str) -> DeathReason | None:
    """The reason that a failure-pipe text names, or None.

    The part before the first ``|`` must match exactly, as in the reference: no trimming.
    """
    name = text.partition("|")[0]
    reason = DeathReason.__members__.get(name)
    return reason if reason in FAILURE_TEXTS else None


class PayloadState(IntEnum):
    """How far a VM's payload has come; only ever moves to a greater value."""

    STARTING = 0
    STARTED = 1
    READY = 2
    FINISHED = 3
    HANGUP = 4


class StopRung(IntEnum):
    """How a VM is made to end, the gentlest way first; see ``StopLadder``."""

    POWER_BUTTON = 0
    """The guest is told to shut down."""
    EXIT_REQUEST = 1
    """The VMM is told to end in order. To the guest, the power fails."""
    KILL = 2
    """The VMM is killed."""


# -- Commands: what a client has a VM's actor do; all are asked, none has a result ---------------------


@dataclass(frozen=True, slots=True)
class Start(Request[None]):
    """Boot the VM. Answered when the VMM runs."""


@dataclass(frozen=True, slots=True)
class Stop(Request[None]):
    """End the VM. Answered when it is dead and cleared away; refused as soon as the VMM refuses.

    Attributes:
        rung: How.
    """

    rung: StopRung = StopRung.KILL


@dataclass(frozen=True, slots=True)
class Release(Request[None]):
    """Nobody holds the VM any more: kill it if it runs, and end the actor."""


@dataclass(frozen=True, slots=True)
class Suspend(Request[None]):
    """Pause the virtual CPUs."""


@dataclass(frozen=True, slots=True)
class Resume(Request[None]):
    """Let the virtual CPUs run."""


@dataclass(frozen=True, slots=True)
class TrimMemory(Request[None]):
    """Ask the guest for memory."""

    level: MemoryTrimLevel


Control = Suspend | Resume | TrimMemory


# -- What a guest reports --------------------------------------------------------------------------

MAX_GUEST_TEXT: Final = 4096
"""Longest error message accepted from a guest, in characters; longer ones are refused."""


@dataclass(frozen=True, slots=True)
class NotifyPayloadStarted:
    """The payload is about to run."""


@dataclass(frozen=True, slots=True)
class NotifyPayloadReady:
    """The payload can serve."""


@dataclass(frozen=True, slots=True)
class NotifyPayloadFinished:
    """The payload has ended."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class NotifyError:
    """The payload could not be run."""

    error_code: ErrorCode
    message: str


GuestReport = NotifyPayloadStarted | NotifyPayloadReady | NotifyPayloadFinished | NotifyError


class UnknownMethodError(IllegalArgumentError):
    """A guest called a method that does not exist."""


def _int32(value: object, what: str) -> int:
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise IllegalArgumentError(f"{what} must be a 32-bit signed integer")
    return value


def decode_guest_report(method: object, params: object) -> GuestReport:
    """Turn an untrusted method name and parameter list into a report.

    Args:
        method: What came in the method's place; text or UTF-8 bytes are accepted.
        params: What came in the parameters' place; must be a list.

    Raises:
        UnknownMethodError: There is no such method.
        IllegalArgumentError: Wrong number, type or range of parameters; the message says which.
    """
    if isinstance(method, bytes):
        try:
            method = method.decode()
        except UnicodeDecodeError:
            raise UnknownMethodError("the method name is not UTF-8") from None
    if not isinstance(method, str):
        raise IllegalArgumentError("the method name must be text")
    if not isinstance(params, list):
        raise IllegalArgumentError("parameters must be an array")
    arity = {"notifyPayloadStarted": 0, "notifyPayloadReady": 0, "notifyPayloadFinished": 1, "notifyError": 2}
    if method not in arity:
        raise UnknownMethodError(f"unknown method {method[:64]!r}; there are: {', '.join(arity)}")
    if len(params) != arity[method]:
        raise IllegalArgumentError(f"{method} takes {arity[method]} parameters, not {len(params)}")
    match method:
        case "notifyPayloadStarted":
            return NotifyPayloadStarted()
        case "notifyPayloadReady":
            return NotifyPayloadReady()
        case "notifyPayloadFinished":
            return NotifyPayloadFinished(_int32(params[0], "exitCode"))
    number, message = _int32(params[0], "errorCode"), params[1]
    if isinstance(message, bytes):
        message = message.decode(errors="replace")
    if not isinstance(message, str) or len(message) > MAX_GUEST_TEXT:
        raise IllegalArgumentError(f"message must be text of at most {MAX_GUEST_TEXT} characters")
    try:
        return NotifyError(ErrorCode(number), message)
    except ValueError:
        return NotifyError(ErrorCode.UNKNOWN, f"(error code {number}) {message}"[:MAX_GUEST_TEXT])


# -- Events ----------------------------------------------------------------------------------------


UNSTAMPED: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a VM.

    The header's defaults mean "not stamped yet": the VM's actor fills in who and when, the bus the ``seq``.

    Attributes:
        seq: Counts up by one per event of a bus, from 1.
        previous: The ``seq`` of the event or gap before this one in the stream that it was read from; in the
            stream's first, 0, or the number that the stream was to begin after. Not part of what happened,
            so events of different streams are equal all the same.
        cid: The VM's context identifier.
        generation: Which run of the VM this belongs to; 0 before the first start.
        name: The VM's name as its creator gave it.
        driver: The VMM driver's name; ``simulated`` is never hidden.
        uid: The user that asked for the VM; 0 where there is no VM, or nobody knows.
        time: Wall-clock time, UTC.
        monotonic: The event loop's clock, in seconds; for differences only.
    """

    kind: ClassVar[str] = "event"
    seq: int = 0
    previous: int = field(default=0, compare=False)
    cid: int = 0
    generation: int = 0
    name: str = ""
    driver: str = ""
    uid: int = 0
    time: datetime = UNSTAMPED
    monotonic: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form: ``event`` is the kind, enums are names, time is RFC 3339 in UTC."""
        row: dict[str, Any] = {"event": self.kind}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, Enum):
                value = value.name
            elif isinstance(value, datetime):
                value = value.isoformat(timespec="microseconds").replace("+00:00", "Z")
            row[spec.name] = value
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Created(Event):
    """The VM exists and can be started.

    Attributes:
        protected: Whether a protected VM was asked for.
        config_type: ``RawConfig`` or ``AppConfig``.
        cpus: Virtual processors.
        memory_mib: Memory as configured; 0 if that was left to the VMM or to the guest's configuration.
        apexes: The APEXes that an app's payload asks for, joined by colons, or that they cannot be read.
    """

    kind = "created"
    protected: bool = False
    config_type: str = "RawConfig"
    cpus: int = 1
    memory_mib: int = 0
    apexes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationFailed(Event):
    """A VM was asked for, and is not to be had. There is none, so the CID is 0.

    Attributes:
        error: The error's kind, as in the reference.
        code: The kind's binder exception code.
        message: The error's text.
        protected: As in ``created``, with what follows.
        config_type: The same.
        cpus: The same.
        memory_mib: The same.
        apexes: The same.
    """

    kind = "creation_failed"
    error: str
    code: int
    message: str
    protected: bool = False
    config_type: str = "RawConfig"
    cpus: int = 1
    memory_mib: int = 0
    apexes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """The VMM runs.

    Attributes:
        pid: Its process.
        elapsed: Seconds since the start was asked for.
    """

    kind = "started"
    pid: int = 0
    elapsed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadStarted(Event):
    """The guest said that its payload is about to run.

    Attributes:
        elapsed: Seconds since the start was asked for (the reference's boot time).
    """

    kind = "payload_started"
    elapsed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadReady(Event):
    """The guest said that its payload can serve."""

    kind = "payload_ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadFinished(Event):
    """The guest said that its payload has ended."""

    kind = "payload_finished"
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadError(Event):
    """The guest said that its payload could not run."""

    kind = "error"
    error_code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HungUp(Event):
    """No payload start was reported in time; the VM is being killed."""

    kind = "hung_up"
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspended(Event):
    """The virtual CPUs are paused."""

    kind = "suspended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """The virtual CPUs run again."""

    kind = "resumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockMessage(Event):
    """A line of text crossed vsock; published by ``vmactor demo``.

    Attributes:
        direction: ``guest_to_host`` or ``host_to_guest``.
        port: The vsock port listened on.
        text: What was said, not escaped.
    """

    kind = "vsock_message"
    direction: str
    port: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone(Event):
    """The guest sent a report of a crash inside it, which is kept as a file.

    Attributes:
        path: The file; it was written by the guest, so be careful with what is in it.
        size: Its bytes.
        truncated: Whether it is not all, because the guest ended or took too long, or it was too much.
    """

    kind = "tombstone"
    path: str = ""
    size: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Died(Event):
    """A run of the VM has ended: exactly once per generation, and its last event.

    Attributes:
        reason: Why.
        final: Whether this is the VM's end too; else it is started again, in the next generation.
        exit_code: The VMM's exit status, if it exited and we were the one to learn it.
        signal: The signal that ended the VMM, if one did.
        failure: What the guest wrote to the failure port, cut to a bound.
        detail: What we know beyond the reason, for people (VMM's last words, cause of a failed start).
        console_tail: The end of the guest's console, cut to a bound.
        console_dropped: Console bytes that were not kept because a bound was reached.
        elapsed: Seconds from start to death.
        guest_time_ms: Processor time that ran the guest, as far as the kernel can tell (0 where the guest is
            emulated, or nobody knows).
        cpu_time_ms: All processor time of the VMM, the guest's included.
        rss_vm_kib: The most resident memory of the guest that was measured; 0 if it never was.
        rss_vmm_kib: The same for all of the VMM, the guest included.
        stopped_by: If somebody was stopping the VM: the last way that was tried before it ended. None if it
            ended by itself, was killed from outside, or had no VMM when it was stopped.
        stop_elapsed: Seconds since somebody first asked for the VM's end; None if nobody did.
        adopted: Whether another manager had started it. Then its exit status is nobody's here to learn:
            ``exit_code`` and ``signal`` are None, and the reason is known by other witnesses or not at all.
    """

    kind = "died"
    reason: DeathReason
    final: bool = True
    exit_code: int | None = None
    signal: int | None = None
    failure: str = ""
    detail: str = ""
    console_tail: str = ""
    console_dropped: int = 0
    elapsed: float = 0.0
    guest_time_ms: int = 0
    cpu_time_ms: int = 0
    rss_vm_kib: int = 0
    rss_vmm_kib: int = 0
    stopped_by: StopRung | None = None
    stop_elapsed: float | None = None
    adopted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSampled(Event):
    """What a VM uses of its host; only for those who asked for this kind by name, and only while they do.

    It has no number of its own: ``seq`` is that of the last event before it. Fields are those of ``died``,
    but memory is what is resident now. ``balloon_kib`` is what the balloon was told to take from the guest.
    """

    kind = "usage"
    guest_time_ms: int = 0
    cpu_time_ms: int = 0
    rss_vm_kib: int = 0
    rss_vmm_kib: int = 0
    balloon_kib: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarting(Event):
    """The VM will be started again; the first event of its next generation.

    Attributes:
        delay: Seconds until then.
        restarts: How often it was started again, this time included.
    """

    kind = "restarting"
    delay: float = 0.0
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartsExhausted(Event):
    """The VM ended too often to be started again; its final ``died`` comes next.

    Attributes:
        restarts: How often it was started again.
        failures: Ends within the period, this one included: one more than are borne.
        period: Seconds.
    """

    kind = "gave_up"
    restarts: int = 0
    failures: int = 0
    period: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed(Event):
    """The VM was given back without ever having been started; there was no run, so nothing died."""

    kind = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped(Event):
    """A VM that a crashed manager had left behind was ended, its directory removed and its CID freed.

    Its ``died`` was never published. The generation is the last one that its manager recorded.

    Attributes:
        ended: The processes that still lived, for people; empty if all had ended before.
        failure: What was in the failure channel.
        detail: What is known beyond that: processes that had ended before, the VMM's last words.
        console_tail: The end of what was in the console's channel.
    """

    kind = "reaped"
    ended: tuple[str, ...] = ()
    failure: str = ""
    detail: str = ""
    console_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphaned(Event):
    """A VM that a crashed manager had left behind was kept as it is, because not all of it is known.

    Attributes:
        detail: Why.
        directory: What to remove when its processes were seen to; its CID is not used until then.
    """

    kind = "orphaned"
    detail: str = ""
    directory: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted(Event):
    """A VM that was to be kept goes on under this manager; its own was killed, or ended and left it alive.

    Everything that its manager knew and told of its state is in here: a last event that the crash cut off is
    not made up for.

    Attributes:
        pid: The VMM's process.
        state: The VM's public state.
        payload: How far its payload had come.
        suspended: Whether the virtual CPUs are paused.
    """

    kind = "adopted"
    pid: int = 0
    state: VirtualMachineState = VirtualMachineState.STARTING
    payload: PayloadState = PayloadState.STARTING
    suspended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerRestarted(Event):
    """The stream goes on under another manager. It is of no VM, so its header names none.

    Events that come next tell what became of each VM that lived: ``adopted``, or one that ends it.

    Attributes:
        pid: The manager.
        clean: Whether the one before had ended in order.
        lost: Whether events may be missing before this one, since the host went down or a file was damaged;
            its number is far above the last one known then.
    """

    kind = "manager_restarted"
    pid: int = 0
    clean: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap(Event):
    """This subscriber was too slow and missed events; ``seq`` is that of the last one missed."""

    kind = "gap"
    missed: int


def is_end(event: Event) -> bool:
    """Whether an event is the last one of its VM."""
    return isinstance(event, Removed) or (isinstance(event, Died) and event.final)


# -- Records ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BalloonStats:
    """What a guest says of its memory, in bytes; None where it did not say.

    Attributes:
        balloon_actual: The balloon's size: memory taken from the guest.
        total_memory: All memory as the guest sees it.
        free_memory: Memory that nothing uses.
        available_memory: Memory that could be given to new work.
    """

    balloon_actual: int
    total_memory: int | None = None
    free_memory: int | None = None
    available_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Requester:
    """A user on whose behalf a VM runs: its VMM and its helpers have these rights and no others.

    Attributes:
        uid: The user.
        gid: Its primary group.
        groups: Its other groups.
        pid: The process that asks, for people; None for this one.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    pid: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        numbers = (self.uid, self.gid, *self.groups)
        if not all(type(number) is int and 0 <= number < 2**32 - 1 for number in numbers):
            raise IllegalArgumentError(f"a user or group is a number of 0 to {2**32 - 2}: {self}")


@dataclass(frozen=True, slots=True)
class VirtualMachineDebugInfo:
    """The reference's debug record of a VM."""

    cid: int
    temporary_directory: str
    requester_uid: int
    requester_pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLink:
    """A network interface of a VM.

    Attributes:
        name: Of the tap on the host.
        mac: The guest's.
        bridge: Whose port the tap is; None for a routed one.
        address: The guest's with its prefix length; None where the guest finds its own.
    """

    name: str
    mac: str
    bridge: str | None
    address: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmInfo:
    """A VM at one moment, as its actor published it.

    Attributes:
        cid: Context identifier.
        name: As its creator gave it.
        generation: Number of the current or last run, or of the one that is waited for; 0 if never started.
        state: Public state.
        payload: Payload state, independent of the VM's.
        driver: VMM driver.
        suspended: Whether the virtual CPUs are paused.
        pid: The VMM's process, if one runs.
        protected: Whether a protected VM was asked for.
        directory: The VM's private directory.
        requester_uid: User that asked for the VM.
        requester_pid: Process that asked for the VM.
        created: When it was created, UTC.
        started: When its start was asked for, UTC.
        died: How its last run ended, if one has; its terminal event, if it is dead.
        restarts: How often it was started again by itself.
        restart_due: When it will be started again, UTC, while it waits for that.
        queued: Whether its start waits until fewer VMs are booting.
        kept: Whether it outlives its manager.
        network: Its network interfaces.
    """

    cid: int
    name: str
    generation: int
    state: VirtualMachineState
    payload: PayloadState
    driver: str
    suspended: bool
    pid: int | None
    protected: bool
    directory: str
    requester_uid: int
    requester_pid: int
    created: datetime
    started: datetime | None = None
    died: Died | None = field(default=None, compare=False)
    restarts: int = 0
    restart_due: datetime | None = None
    queued: bool = False
    kept: bool = False
    network: tuple[NetworkLink, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, as other processes and ``--json`` see it; without ``died``, which is an event."""
        row = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        del row["died"]
        row["network"] = [dataclasses.asdict(link) for link in self.network]
        row |= {"state": self.state.name, "payload": self.payload.name}
        return row | {key: value.isoformat() for key, value in row.items() if isinstance(value, datetime)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Event):
    """The present, as the first event of a stream that asked for it; everything after it follows.

    It is of no VM, so its header names none; ``seq`` is that of the last event before it. A VM's state may be
    ahead of its events: those that tell of it come next.

    Attributes:
        vms: The VMs that live, of those that the subscriber asked for, by CID.
    """

    kind = "snapshot"
    vms: tuple[VmInfo, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; see ``Event.as_dict``."""
        # Not super(): a dataclass with slots is another class than the one that this method was written in.
        return Event.as_dict(self) | {"vms": [vm.as_dict() for vm in self.vms]}
