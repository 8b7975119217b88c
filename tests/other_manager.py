"""Another manager of the same state directory: a real process, told by lines what to do.

Commands: ``claim`` (answers the CID), ``release CID``, ``vm`` (claims, makes the directory and a record,
answers the CID), ``record CID TIMES`` (rewrites a record, answers when done), ``freeze`` (stops itself while
it has the counter locked), ``fork`` (answers the number of a forked child, which lives until standard input
ends).
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

import anyio

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
                case "freeze":
                    state.cids._usable = freeze
                    print(await state.cids.claim(), flush=True)
                case "fork":
                    child = os.fork()
                    if child == 0:
                        sys.stdin.read()
                        os._exit(0)
                    print(child, flush=True)


def freeze(_cid: int) -> bool:
    os.kill(os.getpid(), signal.SIGSTOP)
    return True


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]))
