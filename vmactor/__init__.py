"""vmactor: virtual machines as supervised actors, for asyncio and trio programs.

::

    async with VirtualizationService() as service:
        with load_config("vm.json") as config:
            vm = await service.create_vm(config)
        async with vm:
            await vm.start()
            print(await vm.wait())

Everything that users need is here; modules below are details. Each is imported when
a name of it is first used: the command line must not wait for what it does not need.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vmactor.actors.admission import AdmissionPolicy
    from vmactor.actors.guest_binder import GuestBinder
    from vmactor.actors.handle import VirtualMachine
    from vmactor.actors.restart_policy import RestartPolicy
    from vmactor.actors.service import VirtualizationService
    from vmactor.actors.stop_ladder import StopLadder
    from vmactor.app_config import AppConfig
    from vmactor.bus import Overflow, Subscription
    from vmactor.client.service import connect
    from vmactor.config import DiskImage, Partition, RawConfig
    from vmactor.config_file import load_config
    from vmactor.errors import (
        ActorDiedError,
        ApkError,
        CapacityExceededError,
        DeadlineExceededError,
        IllegalArgumentError,
        IllegalStateError,
        ImageError,
        InvalidPayloadTransitionError,
        LabelError,
        MailboxFullError,
        NotConnectedError,
        NotStoppedError,
        ResourceExhaustedError,
        SecurityError,
        ServiceSpecificError,
        SlowSubscriberError,
        StartFailedError,
        UnsafeImageError,
        UnsupportedOperationError,
        VmactorError,
        VmmError,
        VsockError,
    )
    from vmactor.images.idsig import Idsig, IdsigResult
    from vmactor.messages import (
        Adopted,
        CpuTopology,
        Created,
        CreationFailed,
        DeathReason,
        DebugLevel,
        Died,
        ErrorCode,
        Event,
        Gap,
        HungUp,
        ImageKind,
        ManagerRestarted,
        MemoryTrimLevel,
        NetworkLink,
        Orphaned,
        PartitionType,
        PayloadError,
        PayloadFinished,
        PayloadReady,
        PayloadStarted,
        PayloadState,
        Reaped,
        Removed,
        Requester,
        Restarting,
        RestartsExhausted,
        Resumed,
        Snapshot,
        Started,
        StopRung,
        Suspended,
        Tombstone,
        UsageSampled,
        VirtualMachineDebugInfo,
        VirtualMachineState,
        VmInfo,
        VsockMessage,
    )
    from vmactor.microdroid.apexes import StagedApex
    from vmactor.microdroid.extra_apks import open_extra_apks
    from vmactor.microdroid.platform import Platform
    from vmactor.net.plan import NetworkPolicy
    from vmactor.network_config import NetworkInterface, NetworkMode
    from vmactor.restarts import Backoff, Restart, RestartLimit
    from vmactor.security.labels import LabelCheck, LabelRules
    from vmactor.security.permissions import Grant, Permission, Permissions
    from vmactor.security.policy import Policy, load_policy
    from vmactor.tombstones import TombstoneLimits, TombstoneStore
    from vmactor.usage import CpuTime, Memory, Usage
    from vmactor.vsock import VsockAttribute, VsockListener, VsockStream

__version__ = "0.1.0"

__all__ = [
    "ActorDiedError",
    "AdmissionPolicy",
    "Adopted",
    "ApkError",
    "AppConfig",
    "Backoff",
    "CapacityExceededError",
    "CpuTime",
    "CpuTopology",
    "Created",
    "CreationFailed",
    "DeadlineExceededError",
    "DeathReason",
    "DebugLevel",
    "Died",
    "DiskImage",
    "ErrorCode",
    "Event",
    "Gap",
    "Grant",
    "GuestBinder",
    "HungUp",
    "Idsig",
    "IdsigResult",
    "IllegalArgumentError",
    "IllegalStateError",
    "ImageError",
    "ImageKind",
    "InvalidPayloadTransitionError",
    "LabelCheck",
    "LabelError",
    "LabelRules",
    "MailboxFullError",
    "ManagerRestarted",
    "Memory",
    "MemoryTrimLevel",
    "NetworkInterface",
    "NetworkLink",
    "NetworkMode",
    "NetworkPolicy",
    "NotConnectedError",
    "NotStoppedError",
    "Orphaned",
    "Overflow",
    "Partition",
    "PartitionType",
    "PayloadError",
    "PayloadFinished",
    "PayloadReady",
    "PayloadStarted",
    "PayloadState",
    "Permission",
    "Permissions",
    "Platform",
    "Policy",
    "RawConfig",
    "Reaped",
    "Removed",
    "Requester",
    "ResourceExhaustedError",
    "Restart",
    "RestartLimit",
    "RestartPolicy",
    "Restarting",
    "RestartsExhausted",
    "Resumed",
    "SecurityError",
    "ServiceSpecificError",
    "SlowSubscriberError",
    "Snapshot",
    "StagedApex",
    "StartFailedError",
    "Started",
    "StopLadder",
    "StopRung",
    "Subscription",
    "Suspended",
    "Tombstone",
    "TombstoneLimits",
    "TombstoneStore",
    "UnsafeImageError",
    "UnsupportedOperationError",
    "Usage",
    "UsageSampled",
    "VirtualMachine",
    "VirtualMachineDebugInfo",
    "VirtualMachineState",
    "VirtualizationService",
    "VmInfo",
    "VmactorError",
    "VmmError",
    "VsockAttribute",
    "VsockError",
    "VsockListener",
    "VsockMessage",
    "VsockStream",
    "connect",
    "load_config",
    "load_policy",
    "open_extra_apks",
]

_HOMES: Final = {
    "actors.admission": "AdmissionPolicy",
    "actors.guest_binder": "GuestBinder",
    "actors.handle": "VirtualMachine",
    "actors.restart_policy": "RestartPolicy",
    "actors.service": "VirtualizationService",
    "actors.stop_ladder": "StopLadder",
    "app_config": "AppConfig",
    "bus": "Overflow Subscription",
    "client.service": "connect",
    "config": "DiskImage Partition RawConfig",
    "config_file": "load_config",
    "errors": (
        "ActorDiedError ApkError CapacityExceededError DeadlineExceededError IllegalArgumentError "
        "IllegalStateError ImageError InvalidPayloadTransitionError LabelError MailboxFullError "
        "NotConnectedError NotStoppedError ResourceExhaustedError SecurityError ServiceSpecificError "
        "SlowSubscriberError StartFailedError UnsafeImageError UnsupportedOperationError VmactorError "
        "VmmError VsockError"
    ),
    "images.idsig": "Idsig IdsigResult",
    "messages": (
        "Adopted CpuTopology Created CreationFailed DeathReason DebugLevel Died ErrorCode Event Gap HungUp "
        "ImageKind ManagerRestarted MemoryTrimLevel NetworkLink Orphaned PartitionType PayloadError "
        "PayloadFinished PayloadReady PayloadStarted PayloadState Reaped Removed Requester Restarting "
        "RestartsExhausted Resumed Snapshot Started StopRung Suspended Tombstone UsageSampled "
        "VirtualMachineDebugInfo VirtualMachineState VmInfo VsockMessage"
    ),
    "microdroid.apexes": "StagedApex",
    "microdroid.extra_apks": "open_extra_apks",
    "microdroid.platform": "Platform",
    "net.plan": "NetworkPolicy",
    "network_config": "NetworkInterface NetworkMode",
    "restarts": "Backoff Restart RestartLimit",
    "security.labels": "LabelCheck LabelRules",
    "security.permissions": "Grant Permission Permissions",
    "security.policy": "Policy load_policy",
    "tombstones": "TombstoneLimits TombstoneStore",
    "usage": "CpuTime Memory Usage",
    "vsock": "VsockAttribute VsockListener VsockStream",
}
"""Which module a name comes from, as the imports above say for type checkers."""

_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if (home := _HOME_OF.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
