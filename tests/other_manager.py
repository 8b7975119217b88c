"""Another manager of the same state directory: a real process, told by lines what to do.

Commands: ``claim`` (answers the CID), ``release CID``, ``vm`` (claims, makes the directory and a record,
answers the CID), ``record CID TIMES`` (rewrites a record, answers when done), ``freeze`` (stops itself while
it has the counter locked), ``fork`` (answers the number of a forked child, which lives until standard input
ends), ``leave WHAT`` (has a VM with shells for processes, in the state WHAT of ``LEAVE``; answers the CID),
``reap`` (ends what others left; answers how many).
"""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

import anyio

from vmactor.ledger import Ledger, Spawner
from vmactor.leftovers import find, reap
from vmactor.messages import Event, Requester
from vmactor.process import Process
from vmactor.state_dir import StateDirectory


class OtherManager:
    """Its process, for tests: ``with OtherManager(directory) as other: other.ask("claim")``."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.other_manager", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            text=True,
        )
        assert self._answer() == "open"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> int:
        self.tell(command)
        return int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def freeze(self) -> None:
        """Stop it while it has the counter locked; returns when it is stopped."""
        self.tell("freeze")
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> int:
        """Let it go on; returns the CID that it was about to claim."""
        self.process.send_signal(signal.SIGCONT)
        return int(self._answer())

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()


async def main(directory: Path) -> None:

    with StateDirectory(directory) as state:
        print("open", flush=True)
        for line in sys.stdin:
            command, *arguments = line.split(maxsplit=2)
            match command:
                case "claim":
                    print(await state.cids.claim(), flush=True)
                case "release":
                    state.cids.release(int(arguments[0]))
                case "vm":
                    cid = await state.cids.claim()
                    state.make_vm_directory(cid)
                    state.write_record(cid, {"cid": cid, "pid": os.getpid()})
                    print(cid, flush=True)
                case "record":
                    for number in range(int(arguments[1])):
                        text = "x" * (20_000 if number % 2 else 1)
                        state.write_record(int(arguments[0]), {"cid": int(arguments[0]), "text": text})
                    print(arguments[1], flush=True)
                case "leave":
                    print(await LEAVE[arguments[0]](state), flush=True)
                case "reap":
                    events: list[Event] = []
                    await reap(state, find(state), events.append)
                    print(len(events), flush=True)
                case "freeze":
                    state.cids._usable = freeze
                    print(await state.cids.claim(), flush=True)
                case "fork":
                    child = os.fork()
                    if child == 0:
                        sys.stdin.read()
                        os._exit(0)
                    print(child, flush=True)


WRITER = """
exec 3> "/proc/self/fd/$1" 4> "/proc/self/fd/$2"
printf 'PANIC|why' >&3; printf 'last line' >&4; printf 'odd option' >&2
read -r line < go  # from a pipe that the test opens
printf ' and more' >&4 && : > went
exec sleep 600
"""


class Left:
    """One VM of this manager, whose VMM and helper are shells."""

    def __init__(self, cid: int, directory: Path, ledger: Ledger, requester: Requester | None = None) -> None:
        self.cid = cid
        self.directory = directory
        self.ledger = ledger
        self.spawn = Spawner(ledger, requester)

    @classmethod
    async def make(cls, state: StateDirectory, requester: Requester | None = None) -> Self:
        cid = await state.cids.claim()
        left = cls(cid, *state.make_vm_directory(cid), requester)
        state.write_record(cid, {"cid": cid, "name": f"vm-{cid}", "driver": "shell", "generation": 1})
        return left

    def helper(self) -> Process:
        return self.spawn("vsock helper", ["sleep", "600"], cwd=self.directory)

    def vmm(self) -> Process:
        """A VMM that has written to all its channels."""
        pipes = {name: os.pipe() for name in ("failure", "console", "stderr")}
        writes = {name: pipe[1] for name, pipe in pipes.items()}
        numbers = [str(writes["failure"]), str(writes["console"])]
        os.mkfifo(self.directory / "go")
        process = self.spawn(
            "VMM",
            ["sh", "-c", WRITER, "sh", *numbers],
            pass_fds=tuple(writes.values()),
            stderr=writes["stderr"],
            cwd=self.directory,
            readers={name: pipe[0] for name, pipe in pipes.items()},
        )
        select.select([pipes["stderr"][0]], [], [])  # written last
        return process


async def created(state: StateDirectory) -> int:
    return (await Left.make(state)).cid


async def intended(state: StateDirectory) -> int:
    left = await Left.make(state)
    left.helper()
    left.ledger.intend("VMM", os.geteuid(), {})
    return left.cid


async def spawning(state: StateDirectory) -> int:
    left = await Left.make(state)
    left.helper()
    left.ledger.complete = lambda number, process: None  # type: ignore[method-assign]
    left.vmm()
    return left.cid


async def running(state: StateDirectory) -> int:
    left = await Left.make(state)
    left.helper()
    left.vmm()
    return left.cid


async def stopped(state: StateDirectory) -> int:
    left = await Left.make(state)
    left.vmm().send_signal(signal.SIGSTOP)
    return left.cid


async def dying(state: StateDirectory) -> int:
    left = await Left.make(state)
    left.helper()
    vmm = left.vmm()
    vmm.kill()
    await vmm.wait()
    return left.cid


async def cleared(state: StateDirectory) -> int:
    left = await Left.make(state)
    vmm = left.vmm()
    vmm.kill()
    await vmm.wait()
    (left.directory / "record.json").unlink()
    return left.cid


async def empty(state: StateDirectory) -> int:
    left = await Left.make(state)
    for path in left.directory.iterdir():
        path.unlink()
    return left.cid


async def sleeps(process: Process) -> None:
    """Wait until a process has become ``sleep``, environment and all, which comes after the name."""
    proc = Path(f"/proc/{process.pid}")
    while (proc / "comm").read_text() != "sleep\n" or not (proc / "environ").read_bytes():
        await anyio.sleep(0.01)


async def wrapped(state: StateDirectory) -> int:
    """A VMM that is begun by a script: what runs later is not what ran at first."""
    left = await Left.make(state)
    process = left.spawn("VMM", ["sh", "-c", "while [ ! -e go ]; do sleep 0.02; done; exec sleep 600"],
                         cwd=left.directory)  # fmt: skip
    (left.directory / "go").write_text("\n")
    await sleeps(process)
    return left.cid


async def with_children(state: StateDirectory) -> int:
    left = await Left.make(state)
    process = left.spawn("VMM", ["sh", "-c", "sleep 600 & : > up; wait"], cwd=left.directory)
    while not (left.directory / "up").exists():
        assert process.status is None
        await anyio.sleep(0.01)
    return left.cid


async def foreign(state: StateDirectory) -> int:
    left = await Left.make(state, Requester(4242, 4242))
    process = left.spawn("VMM", ["sleep", "600"])
    await sleeps(process)
    return left.cid


LEAVE = {
    state.__name__: state
    for state in (
        created, intended, spawning, running, stopped, dying, cleared, empty, wrapped, with_children, foreign,
    )
}  # fmt: skip


def freeze(_cid: int) -> bool:
    os.kill(os.getpid(), signal.SIGSTOP)
    return True


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]))
