"""Whole lives of simulated VMs in which the Nth call of a kind fails; run by ``test_exhaustion.py``.

``faults.so`` is preloaded. For every kind and every N until a life needs no Nth call: create, start, ready,
stop, with that one call failing. Prints a line of JSON for every failed call: what came of it, and what was
wrong with that.
"""

import ctypes
import errno
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import anyio
import structlog

from tests.residue import children, descriptors, threads
from tests.simulated_peer import script
from vmactor import (
    RawConfig,
    ResourceExhaustedError,
    StartFailedError,
    VirtualizationService,
    VirtualMachine,
    VirtualMachineState,
    VmactorError,
)
from vmactor.actors.admission import AdmissionPolicy
from vmactor.messages import Died

FAULTS = {
    "open": (errno.EMFILE, errno.ENFILE),
    "create": (errno.ENOSPC,),
    "mkdir": (errno.ENOSPC,),
    "write": (errno.ENOSPC,),
    "pwrite": (errno.ENOSPC,),
    "rename": (errno.ENOSPC,),
    "lock": (errno.ENOLCK,),
    "dup": (errno.EMFILE,),
    "dup3": (errno.EMFILE,),
    "pipe": (errno.EMFILE, errno.ENFILE),
    "socket": (errno.EMFILE, errno.ENOBUFS),
    "bind": (errno.ENOSPC, errno.ENOMEM),
    "listen": (errno.ENOBUFS,),
    "connect": (errno.ENOMEM,),
    "accept": (errno.EMFILE, errno.ENOMEM),
    "epoll": (errno.EMFILE,),
    "epoll_ctl": (errno.ENOSPC, errno.ENOMEM),
    "memfd": (errno.EMFILE,),
    "opendir": (errno.EMFILE,),
    "pidfd": (errno.EMFILE, errno.ENOMEM),
    "thread": (errno.EAGAIN,),
    "fork": (errno.EAGAIN, errno.ENOMEM),
    "execve": (errno.ENOMEM, errno.EAGAIN),
}
"""What may fail, and how."""
ADVICE = ("ulimit", "make room", "sysctl", "memory", "processes")
"""One of these is in every error that a fault leads to."""
LIMIT = 20.0

faults = ctypes.CDLL(None)


class Sweep:
    """One service with a VM that nothing may disturb."""

    def __init__(self, service: VirtualizationService, config: RawConfig, state: Path) -> None:
        self.service = service
        self.config = config
        self.state = state
        self.sink = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)

    def now(self) -> dict[str, Any]:
        """All that a life could leave."""
        cids = self.service._state.cids
        return {
            "children": {pid: name.split()[0] for pid, name in children().items()},
            "descriptors": {fd: name for fd, name in descriptors().items() if "AnyIO" not in name},
            "threads": threads(),
            "files": sorted(str(path.relative_to(self.state)) for path in (self.state / "vm").rglob("*")),
            "cids": sorted(cids._held),
            "vms": [info.cid for info in self.service.list_vms()],
            "boots": (self.service._boots.waiting, self.service._boots._free),
            "promised": self.service._admission.promised if self.service._admission_policy.checked else None,
        }

    async def life(self) -> str:
        """One VM from its creation to its end; what came of it."""
        vm: VirtualMachine | None = None
        try:
            vm = await self.service.create_vm(self.config, console=self.sink)
            with vm.events() as events:
                await vm.start()
                async for event in events:
                    if isinstance(event, Died) or event.kind == "payload_ready":
                        break
                await vm.stop()
                died = await vm.wait()
            assert died is not None
            return f"lived, {died.reason.name}"
        finally:
            if vm is not None:
                await vm.aclose()

    async def one(self, kind: str, nth: int, number: int) -> dict[str, Any] | None:
        """A life with a fault in it; None if there was no such call."""
        before = self.now()
        wrong: list[str] = []
        began = anyio.current_time()
        faults.fault_arm(kind.encode(), nth, number)
        try:
            with anyio.fail_after(LIMIT):
                outcome = await self.life()
        except VmactorError as error:
            outcome = f"{type(error).__name__}: {error}"
            if not any(word in str(error) for word in ADVICE):
                wrong.append("the error does not say what to do")
            if not isinstance(error, ResourceExhaustedError | StartFailedError):
                wrong.append("the error is of another type")
        except BaseException as error:
            outcome = f"{error!r}"
            wrong.append("no typed error")
            traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            count = faults.fault_disarm()
        if count < nth:
            return None
        if "INFRASTRUCTURE_ERROR" in outcome or "internal error" in outcome:
            wrong.append("it was taken for a fault of ours")
        for _ in range(50):
            after = self.now()
            if after == before:
                break
            await anyio.sleep(0.01)
        wrong += [
            f"{what}: {_beyond(before[what], after[what])} -> {_beyond(after[what], before[what])}"
            for what in before
            if before[what] != after[what]
        ]
        try:
            async with await self.service.create_vm(self.config):
                pass
        except Exception as error:
            wrong.append(f"the next creation failed: {error!r}")
        seconds = round(anyio.current_time() - began, 1)  # for people who look for slow ones
        found = {"seconds": seconds, "kind": kind, "errno": errno.errorcode[number], "nth": nth}
        return found | {"outcome": outcome, "wrong": wrong}


def _beyond(one: Any, other: Any) -> Any:
    """What is in one and not in the other."""
    if isinstance(one, dict):
        return {key: value for key, value in one.items() if other.get(key) != value}
    return [item for item in one if item not in other] if isinstance(one, list) else one


async def say(vm: VirtualMachine, step: str) -> str:
    """Have the guest do a step."""
    with anyio.fail_after(LIMIT):
        stream = await vm.connect_vsock(5000)
        async with stream:
            await stream.send(f"{step}\n".encode())
            return (await stream.receive()).decode().strip()


async def main(directory: Path, kinds: list[str]) -> None:
    with (directory / "kernel").open("w+b") as kernel:
        config = RawConfig(name="swept", kernel=kernel, params=script("started", "ready", "sleep 60000"))
        other = RawConfig(name="bystander", kernel=kernel, params=script("started", "serve"))
        policy = AdmissionPolicy(checked=False)
        async with VirtualizationService(
            vmm="simulated", state_directory=directory / "state", admission=policy
        ) as service:
            bystander = await service.create_vm(other)
            with bystander.events() as events:
                await bystander.start()
                while (await anext(events)).kind != "payload_started":
                    pass
                sweep = Sweep(service, config, directory / "state")
                await sweep.life()  # what is made at the first use is there now
                await anyio.sleep(0.1)
                for kind in kinds:
                    for number in FAULTS[kind]:
                        nth = 1
                        while found := await sweep.one(kind, nth, number):
                            if await say(bystander, f"echo {nth}") != f"ok {nth}":
                                found["wrong"].append("the other VM does not answer")
                            print(json.dumps(found), flush=True)
                            nth += 1
                assert bystander.state is VirtualMachineState.STARTED
                assert await say(bystander, "ready") == "ok"
                assert (await anext(events)).kind == "payload_ready"
    print(json.dumps({"done": True}), flush=True)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    anyio.run(main, Path(sys.argv[1]), sys.argv[3:] or list(FAULTS), backend=sys.argv[2])
    os._exit(0)
