"""The methods of the protocol, one function each (docs/protocol.md).

A handler checks its parameters, which costs no task, then gives its result or an awaitable of it. It must not
ask which event loop it runs in before it is awaited.
"""

import dataclasses
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal, TypeVar, cast

import anyio

from vmactor import __version__
from vmactor.actors.guest_binder import GuestBinder
from vmactor.actors.handle import CONNECT_SECONDS, CONTROL_SECONDS, START_SECONDS, STOP_SECONDS
from vmactor.actors.restart_policy import RestartPolicy
from vmactor.actors.stop_ladder import StopLadder
from vmactor.app_config import AppConfig
from vmactor.config import RawConfig
from vmactor.daemon.session import Handler, Session
from vmactor.daemon.vms import OwnedVm
from vmactor.errors import IllegalArgumentError, NotStoppedError, SecurityError, UnsupportedOperationError
from vmactor.messages import MAX_GUEST_TEXT, MemoryTrimLevel, PartitionType, StopRung
from vmactor.protocol import CAPABILITIES, VERSION, errors
from vmactor.protocol.options import (
    CreateOptions,
    HelloOptions,
    LadderOptions,
    RestartOptions,
    SubscribeOptions,
    WaitOptions,
)
from vmactor.protocol.values import camel, config_from_wire, from_wire, to_wire
from vmactor.restarts import Backoff, RestartLimit
from vmactor.rpc.connection import Reply
from vmactor.rpc.files import Attached, ReceivedFile
from vmactor.rpc.framing import SERVER

DIRECTIONS: Final = ("guest_to_host", "host_to_guest")

T = TypeVar("T")
Reader = Callable[[Session, Any], Any]
_MISSING: Final = object()


# -- The service -------------------------------------------------------------------------------------


def hello(session: Session, options: HelloOptions) -> dict[str, Any]:
    if options.version != VERSION:
        raise UnsupportedOperationError(
            f"version {options.version} of the protocol is not spoken here; version {VERSION} is"
        )
    limits = {camel(name): getattr(SERVER, name) for name in ("message_bytes", "outstanding", "nesting")}
    return {
        "version": VERSION,
        "capabilities": list(CAPABILITIES),
        "limits": limits | session.user.quotas.on_wire(),
        "service": __version__,
        "uid": session.user.uid,
    }


def info(session: Session) -> dict[str, Any]:
    selection = session.service.selection
    return {
        "service": __version__,
        "version": VERSION,
        "driver": selection.driver.name,
        "platformVersion": selection.driver.platform_version,
        "emulated": selection.driver.emulated,
        "vsock": selection.vsock,
        "reasons": list(selection.reasons),
        "vms": sum(session.sees(vm.requester_uid) for vm in session.service.list_vms()),
        "pid": os.getpid(),
        "uid": os.geteuid(),
    }


def list_vms(session: Session) -> list[Any]:
    return [to_wire(vm) for vm in session.service.list_vms() if session.sees(vm.requester_uid)]


def create_vm(
    session: Session, config: RawConfig | AppConfig, options: CreateOptions
) -> Awaitable[dict[str, Any]]:
    if options.keep:
        session.user.check_keep()
    session.check_handles()
    restart = None if options.restart is None else _restart(options.restart)
    binder = None
    if options.guest_binder is not None:
        binder = GuestBinder(**cast("Any", dataclasses.asdict(options.guest_binder)))
    counted = session.vms.reserve(session.user, config.memory_mib)
    return _create(session, config, options, restart=restart, binder=binder, counted=counted)


async def _create(
    session: Session,
    config: RawConfig | AppConfig,
    options: CreateOptions,
    *,
    restart: RestartPolicy | None,
    binder: GuestBinder | None,
    counted: int,
) -> dict[str, Any]:
    try:
        vm = await session.service.create_vm(
            config,
            console=_fd(options.console),
            log=_fd(options.log),
            ramdump=_fd(options.ramdump),
            hangup_detection=options.hangup_detection,
            hangup_timeout=options.hangup_timeout,
            restart=restart,
            guest_binder=binder,
            requester=session.requester,
            keep=options.keep,
        )
    except BaseException:
        session.user.remove_vm(counted)
        raise
    owned = session.vms.add(vm, session.user, kept=options.keep, counted=counted)
    return session.give_handle(owned, created=True)


def _restart(options: RestartOptions) -> RestartPolicy:
    backoff = options.backoff
    return RestartPolicy(
        when=options.when,
        limit=RestartLimit(options.limit.count, options.limit.seconds),
        backoff=Backoff(initial=backoff.initial, maximum=backoff.maximum, stable=backoff.stable),
    )


def _fd(file: ReceivedFile | None) -> int | None:
    return None if file is None else file.fileno()


async def initialize_writable_partition(
    session: Session, image: ReceivedFile, size: int, kind: PartitionType
) -> int:
    return await session.service.initialize_writable_partition(image, size, kind, requester=session.requester)


async def create_or_update_idsig_file(session: Session, apk: ReceivedFile, idsig: ReceivedFile) -> Any:
    return to_wire(await session.service.create_or_update_idsig_file(apk, idsig, requester=session.requester))


def debug_list_vms(session: Session) -> list[Any]:
    return [to_wire(vm) for vm in session.service.debug_list_vms(requester=session.requester)]


def dump(session: Session) -> str:
    return session.service.dump(requester=session.requester)


def tree(session: Session) -> Any:
    if not session.user.privileged:
        raise SecurityError("only root and the daemon's own user may see the supervisors")
    return to_wire(session.service.tree())


async def shutdown_vms(session: Session, options: LadderOptions | None) -> dict[str, Any]:
    ladder = _ladder(options)
    ends: dict[str, Any] = {}

    async def shut_down(owned: OwnedVm) -> None:
        cid = str(owned.vm.cid)
        try:
            ends[cid] = {"rung": _rung(await owned.vm.shutdown(ladder))}
        except NotStoppedError as error:
            ends[cid] = {"error": errors.to_wire(error)}

    async with anyio.create_task_group() as climbers:
        for owned in session.vms.of(session.user):
            climbers.start_soon(shut_down, owned)
    return ends


async def subscribe(session: Session, options: SubscribeOptions) -> int:
    return session.subscribe(options)


def unsubscribe(session: Session, number: int) -> None:
    session.unsubscribe(number)


# -- A VM --------------------------------------------------------------------------------------------


def open_vm(session: Session, cid: int) -> dict[str, Any]:
    session.check_handles()
    owned = session.vms.find(cid, session.user)
    if owned is None:
        raise IllegalArgumentError(f"you have no VM with CID {cid}; listVms tells which there are")
    return session.give_handle(owned, created=False)


def close_vm(session: Session, handle: Any) -> Awaitable[None] | None:
    session.owned(handle)
    doomed = session.close_handle(handle)
    return None if doomed is None else doomed.vm.aclose()


def get_state(_session: Session, owned: OwnedVm) -> str:
    return owned.vm.state.name


def get_info(_session: Session, owned: OwnedVm) -> Any:
    return to_wire(owned.vm.info)


async def start(_session: Session, owned: OwnedVm, options: WaitOptions) -> None:
    await owned.vm.start(timeout=_seconds(options, START_SECONDS))


async def stop(_session: Session, owned: OwnedVm, options: WaitOptions) -> None:
    await owned.vm.stop(timeout=_seconds(options, STOP_SECONDS))


async def shutdown(_session: Session, owned: OwnedVm, options: LadderOptions | None) -> str | None:
    return _rung(await owned.vm.shutdown(_ladder(options)))


async def suspend(_session: Session, owned: OwnedVm, options: WaitOptions) -> None:
    await owned.vm.suspend(timeout=_seconds(options, CONTROL_SECONDS))


async def resume(_session: Session, owned: OwnedVm, options: WaitOptions) -> None:
    await owned.vm.resume(timeout=_seconds(options, CONTROL_SECONDS))


async def on_trim_memory(
    _session: Session, owned: OwnedVm, level: MemoryTrimLevel, options: WaitOptions
) -> None:
    await owned.vm.on_trim_memory(level, timeout=_seconds(options, CONTROL_SECONDS))


async def usage(_session: Session, owned: OwnedVm) -> Any:
    return to_wire(await owned.vm.usage())


def guest_calls(_session: Session, owned: OwnedVm) -> dict[str, Any]:
    counters = owned.vm.guest_calls
    row = {camel(field.name): getattr(counters, field.name) for field in dataclasses.fields(counters)}
    closed = {reason.value: count for reason, count in counters.closed.items()}
    return row | {"closed": closed, "protocols": dict(counters.protocols)}


async def connect_vsock(_session: Session, owned: OwnedVm, port: int, options: WaitOptions) -> Reply:
    stream = await owned.vm.connect_vsock(port, timeout=_seconds(options, CONNECT_SECONDS))
    attached = Attached(stream.detach())
    return Reply(attached, [attached])


async def console(_session: Session, owned: OwnedVm) -> Reply:
    attached = Attached((await owned.vm.console()).detach())
    return Reply(attached, [attached])


def publish_message(
    _session: Session, owned: OwnedVm, direction: str, port: int, text: str
) -> Awaitable[None]:
    if direction not in DIRECTIONS:
        raise IllegalArgumentError(f"direction must be one of {', '.join(DIRECTIONS)}")
    if not 0 <= port < 2**32:
        raise IllegalArgumentError("port must be 0 to 4294967295")
    if len(text) > MAX_GUEST_TEXT:
        raise IllegalArgumentError(f"text must be of {MAX_GUEST_TEXT} characters at most")
    return owned.vm.publish_message(cast("Literal['guest_to_host']", direction), port, text)


async def wait(_session: Session, owned: OwnedVm) -> Any:
    return to_wire(await owned.vm.wait())


def _seconds(options: WaitOptions, default: float) -> float:
    return default if options.timeout is None else options.timeout


def _ladder(options: LadderOptions | None) -> StopLadder:
    return StopLadder() if options is None else StopLadder(**dataclasses.asdict(options))


def _rung(rung: StopRung | None) -> str | None:
    return None if rung is None else rung.name


# -- Parameters --------------------------------------------------------------------------------------


def _a(kind: type, what: str) -> Reader:
    return lambda _session, value: from_wire(kind, value, what)


def _vm(session: Session, value: Any) -> OwnedVm:
    return session.owned(value)


def _as_it_is(_session: Session, value: Any) -> Any:
    return value


def _config(_session: Session, value: Any) -> RawConfig | AppConfig:
    return config_from_wire(value)


def _file(what: str) -> Reader:
    def read(_session: Session, value: Any) -> ReceivedFile:
        if not isinstance(value, ReceivedFile):
            raise IllegalArgumentError(f"{what} must be a descriptor that came with the message")
        return value

    return read


def _method(
    work: Callable[..., Any], *readers: Reader, options: type | None = None, default: Any = _MISSING
) -> Handler:
    """A handler that reads its parameters first, the last of which may be a map of options or left out."""
    needed = len(readers)
    most = needed + (options is not None)
    if options is not None and default is _MISSING:
        default = options()

    def handle(session: Session, params: list[Any]) -> Any:
        if not needed <= len(params) <= most:
            takes = f"{needed}" if needed == most else f"{needed} or {most}"
            raise IllegalArgumentError(f"takes {takes} parameters, not {len(params)}")
        read = [reader(session, value) for reader, value in zip(readers, params, strict=False)]
        if options is not None:
            given = params[needed] if len(params) > needed else None
            read.append(default if given is None else from_wire(options, given, "options"))
        return work(session, *read)

    return handle


_waits: Final = partial(_method, options=WaitOptions)
_ladders: Final = partial(_method, options=LadderOptions, default=None)

METHODS: Final[dict[str, Handler]] = {
    "hello": _method(hello, options=HelloOptions),
    "info": _method(info),
    "listVms": _method(list_vms),
    "createVm": _method(create_vm, _config, options=CreateOptions),
    "openVm": _method(open_vm, _a(int, "cid")),
    "closeVm": _method(close_vm, _as_it_is),
    "getState": _method(get_state, _vm),
    "getInfo": _method(get_info, _vm),
    "start": _waits(start, _vm),
    "stop": _waits(stop, _vm),
    "shutdown": _ladders(shutdown, _vm),
    "suspend": _waits(suspend, _vm),
    "resume": _waits(resume, _vm),
    "onTrimMemory": _waits(on_trim_memory, _vm, _a(MemoryTrimLevel, "level")),
    "usage": _method(usage, _vm),
    "guestCalls": _method(guest_calls, _vm),
    "connectVsock": _waits(connect_vsock, _vm, _a(int, "port")),
    "console": _method(console, _vm),
    "publishMessage": _method(publish_message, _vm, _a(str, "direction"), _a(int, "port"), _a(str, "text")),
    "wait": _method(wait, _vm),
    "shutdownVms": _ladders(shutdown_vms),
    "initializeWritablePartition": _method(
        initialize_writable_partition, _file("image"), _a(int, "size"), _a(PartitionType, "type")
    ),
    "createOrUpdateIdsigFile": _method(create_or_update_idsig_file, _file("apk"), _file("idsig")),
    "debugListVms": _method(debug_list_vms),
    "dump": _method(dump),
    "tree": _method(tree),
    "subscribe": _method(subscribe, options=SubscribeOptions),
    "unsubscribe": _method(unsubscribe, _a(int, "subscription")),
}
"""What can be called, by its name on the wire."""
