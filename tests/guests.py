"""Help for tests with real guests: boot one with a script, talk to its agent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from vmactor import Event, VirtualizationService, VirtualMachine, load_config
from vmactor.security.permissions import Grant, Permission, Permissions
from vmactor.security.policy import Policy

AGENT_PORT = 5000
BOOT_SECONDS = 90
"""Far more than a guest takes; a test that reaches it has failed."""


async def create(
    service: VirtualizationService, guest: Path, script: str, *, config: str = "vm.json", **options: Any
) -> VirtualMachine:
    """Create a VM whose agent takes the steps of ``script``."""
    with load_config(guest / config, name="test") as loaded:
        scripted = replace(loaded, params=f'{loaded.params} vmactor.script="{script}"')
        return await service.create_vm(scripted, **options)


@asynccontextmanager
async def booted(
    service: VirtualizationService, guest: Path, script: str = "started;ready;serve", **options: Any
) -> AsyncIterator[VirtualMachine]:
    """A VM whose payload is ready."""
    async with await create(service, guest, script, **options) as vm:
        with vm.events() as events:
            await vm.start()
            await until(events, "payload_ready")
        yield vm


def allowing(user: int) -> Policy:
    """A policy by which another user may have VMs."""
    granted = Grant(frozenset({user}))
    needed = (Permission.MANAGE_VIRTUAL_MACHINE, Permission.USE_CUSTOM_VIRTUAL_MACHINE)
    return Policy(Permissions(dict.fromkeys(needed, granted)))


SILENT_SCRIPT = "serve;dial 7001 up"
"""The agent reports nothing by itself, but calls the host when it takes steps."""


async def start_silent(vm: VirtualMachine) -> None:
    """Start a VM with ``SILENT_SCRIPT``; returns when its agent takes steps.

    The guest dials, rather than we until somebody answers: vhost-device-vsock 0.3.0 may lose the thread that
    serves the guest if it is dialled while the guest's driver comes up.
    """
    async with vm.listen_vsock(7001) as listener:
        await vm.start()
        with anyio.fail_after(BOOT_SECONDS):
            async with await listener.accept() as stream:
                await stream.receive()
                await stream.send(b"go on\n")


async def until(events: AsyncIterator[Event], kind: str) -> Event:
    """The next event of a kind."""
    with anyio.fail_after(BOOT_SECONDS):
        async for event in events:
            if event.kind == kind:
                return event
    raise AssertionError(f"the stream ended without {kind}")


async def history(vm: VirtualMachine) -> list[Event]:
    """Start a VM and collect its events to the end."""
    with vm.events() as events:
        await vm.start()
        with anyio.fail_after(BOOT_SECONDS):
            return [event async for event in events]


async def agent(vm: VirtualMachine, step: str) -> str:
    """Have the guest's agent take a step; returns its answer."""
    with anyio.fail_after(30):
        async with await vm.connect_vsock(AGENT_PORT) as stream:
            await stream.send(step.encode() + b"\n")
            answer = await BufferedByteReceiveStream(stream).receive_until(b"\n", 8192)
    return answer.decode(errors="replace")


async def parting(vm: VirtualMachine, step: str) -> None:
    """Have the agent take a step after which it may not be able to answer."""
    stream = await vm.connect_vsock(AGENT_PORT)
    async with stream:
        await stream.send(step.encode() + b"\n")
        with anyio.move_on_after(30):
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                await stream.receive()
