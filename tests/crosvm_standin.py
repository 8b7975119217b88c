"""A stand-in for crosvm: takes its command line and serves its control socket, without a VM.

It is neither crosvm nor the simulated VMM; the tests of the crosvm driver spawn it in crosvm's place. It
follows the published behaviour of crosvm's parser and control socket, strictly: an option that a build of its
age has not, or a bad value, ends it with 35; what crosvm finds out later ends it with 1; a request that
crosvm would not understand is never answered.

What it plays stands in the "kernel": a JSON object. ``write`` (role -> text) goes to serial devices first;
``before`` (seconds, or "never") delays the first accept; ``exit`` ends it with that code at once, ``signal``
by that signal; ``replies`` (request -> raw text, or null for silence) replaces answers; ``close`` names
requests at which it hangs up. Every packet that it got is appended to the file ``record``.

Run as ``crosvm_standin.py AGE ARGUMENTS...``; AGE is 2023 or 2026.
"""

import fcntl
import json
import os
import re
import select
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

SWITCHES = {"disable-sandbox", "no-balloon", "balloon-page-reporting", "no-usb", "protected-vm", "no-rng"}
OPTIONS = {"bios", "cid", "cpus", "initrd", "mem", "socket", "vhost-vsock-fd", "vhost-vsock-device"}
REPEATABLE = {"block", "disk", "params", "rwdisk", "serial"}
BY_AGE: dict[int, tuple[set[str], set[str], set[str]]] = {
    2023: (set(), {"swiotlb", "cfg", "vhost-user-vsock", "vhost-user-gpu"}, set()),
    2026: ({"suspended"}, {"name", "vsock"}, {"vhost-user"}),
}
SHORT = {"i": "initrd", "p": "params", "m": "mem", "c": "cpus", "b": "block", "d": "disk", "s": "socket"}
COMMANDS = ("create_qcow2", "resume", "run", "stop", "suspend", "version")


def invalid(why: str) -> NoReturn:
    """An argument error: status 35."""
    print(f"arg parsing failed: {why}", file=sys.stderr)
    sys.exit(35)


def failed(why: str) -> NoReturn:
    """An error out of crosvm: status 1."""
    print(f"[2026-01-01T00:00:00.0+00:00 ERROR crosvm] exiting with error 1: {why}", file=sys.stderr)
    sys.exit(1)


# -- The command line --------------------------------------------------------------------------------


def split(arguments: list[str]) -> list[str]:
    """crosvm's rewriting, before it knows what is a value."""
    words: list[str] = []
    for argument in arguments:
        if len(argument) > 1 and argument.startswith("-") and "=" in argument:
            words += argument.split("=", 1)
        else:
            words.append("--help" if argument == "-h" else argument)
    return words


def parse(words: list[str], age: int) -> tuple[dict[str, list[str]], list[str]]:
    switches, once, many = (a | b for a, b in zip((SWITCHES, OPTIONS, REPEATABLE), BY_AGE[age], strict=True))
    given: dict[str, list[str]] = {}
    positional: list[str] = []
    left = iter(words)
    for word in left:
        if not word.startswith("-") or word == "-":
            positional.append(word)
            continue
        name = word[2:] if word.startswith("--") else SHORT.get(word[1:], word)
        if name in switches:
            value = ""
        elif name in once | many:
            value = next(left, "")
        else:
            invalid(f"unrecognized argument: {word}")
        if name in given and name in once:
            invalid(f"duplicate {name}")
        given.setdefault(name, []).append(value)
    if len(positional) > 1:
        invalid("too many arguments")
    return given, positional


def number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        invalid(f"not a number: {text}")


def keys(text: str, first: str, allowed: dict[str, str], required: str = "") -> dict[str, str]:
    """A key=value list; ``allowed`` maps each key to a pattern of its values."""
    found: dict[str, str] = {}
    for i, item in enumerate(text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = (first, key) if i == 0 and key not in allowed else (key, "true")
        if key not in allowed or key in found or not re.fullmatch(allowed[key], value):
            invalid(f"bad key or value: {item}")
        found[key] = value
    if required and required not in found:
        invalid(f"missing {required}")
    return found


BOOL, NUMBER, WORD = "true|false", "[0-9]+", r"""[^][,"']+"""
BLOCK = {"path": WORD, "ro": BOOL, "root": BOOL, "sparse": BOOL, "id": ".{1,20}"}
SERIAL = {
    "type": "sink|stdout|syslog|file|unix|unix-stream",
    "hardware": "serial|virtio-console|debugcon",
    "num": "[1-9]",
    "path": WORD,
    "input": WORD,
    "console": BOOL,
    "earlycon": BOOL,
    "stdin": BOOL,
}
VSOCK = {"cid": NUMBER, "device": WORD, "max-queue-sizes": ".*"}
VHOST_USER = {
    "type": "net|block|vsock|console|fs",
    "socket": WORD,
    "max-queue-size": NUMBER,
    "pci-address": WORD,
}


def inherited(path: str, what: str) -> int:
    """The descriptor that a path stands for; it must be open, and not close-on-exec."""
    found = re.fullmatch("/proc/self/fd/([0-9]+)", path)
    if not found:
        failed(f"{what}: the stand-in takes descriptors only, not {path}")
    fd = int(found.group(1))
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError as error:
        failed(f"{what}: {error}")
    if flags & fcntl.FD_CLOEXEC:
        failed(f"{what}: Bad file descriptor (os error 9)")
    return fd


def check(given: dict[str, list[str]], positional: list[str], age: int) -> tuple[Any, dict[str, int], int]:
    """What crosvm checks; returns the plan, the serial roles' descriptors and the listener."""
    for name in ("mem", "cpus", "cid", "swiotlb", "vhost-vsock-fd"):
        for text in given.get(name, []):
            number(text)
    block = BLOCK | ({"lock": BOOL} if age == 2026 else {})
    disks = [keys(text, "path", block, "path")["path"] for text in given.get("block", [])]
    serials = [keys(text, "type", SERIAL) for text in given.get("serial", [])]
    vsocks = [keys(text, "cid", VSOCK, "cid") for text in given.get("vsock", [])]
    users = [keys(text, "type", VHOST_USER, "socket") for text in given.get("vhost-user", [])]
    if bool(positional) == ("bios" in given):
        failed("exactly one of a kernel and a BIOS is needed")
    if "cid" in given and vsocks:
        failed("--cid and --vsock are mutually exclusive")
    if "no-balloon" in given and "balloon-page-reporting" in given:
        failed("no balloon to report pages with")
    for path in (*disks, *given.get("disk", []), *given.get("rwdisk", []), *given.get("initrd", [])):
        inherited(path, "disk or initrd")
    for device in vsocks:
        inherited(device.get("device", "/dev/vhost-vsock"), "vsock")
    for text in given.get("vhost-vsock-fd", []):
        inherited(f"/proc/self/fd/{text}", "vsock")
    for user in users:
        if not stat.S_ISSOCK(os.fstat(inherited(user["socket"], "vhost-user")).st_mode):
            failed("vhost-user: not a socket")
    roles: dict[str, int] = {}
    seen = set()
    for serial in serials:
        place = (serial.get("hardware", "serial"), serial.get("num", "1"))
        if place[0] == "serial" and int(place[1]) > 4:
            invalid("Serial port num must be 4 or less")
        if place in seen:
            failed(f"serial device {place} given twice")
        seen.add(place)
        if serial.get("type") == "file":
            roles["-".join(place)] = inherited(serial["path"], "serial")
    kernel = inherited((positional or given["bios"])[0], "kernel")
    plan = json.loads(os.pread(kernel, 1 << 20, 0) or b"{}")
    params = " ".join(["panic=-1", *given.get("params", [])])
    if len(params) > 2047 or re.search("[^ -~]", params):
        failed("the guest's command line is too long, or not ASCII")
    # Used in place: close-on-exec would not be looked at, but then it would not be here.
    listener = int(given["socket"][0].rpartition("/")[2])
    return plan, roles, listener


# -- The control socket ------------------------------------------------------------------------------

UNITS = {
    2023: {"Exit", "Suspend", "Resume", "Powerbtn", "Sleepbtn", "MakeRT"},
    2026: {
        "Exit",
        "SuspendVcpus",
        "ResumeVcpus",
        "SuspendVm",
        "ResumeVm",
        "Powerbtn",
        "Sleepbtn",
        "MakeRT",
        "VcpuPidTid",
    },
}
STATS = {
    **dict.fromkeys(
        ("swap_in", "swap_out", "major_faults", "minor_faults", "disk_caches", "unevictable_memory")
    ),
    **dict.fromkeys(("hugetlb_allocations", "hugetlb_failures", "shared_memory")),
    "free_memory": 100 << 20,
    "total_memory": 240 << 20,
    "available_memory": 150 << 20,
}


class Guest:
    """What the requests change."""

    def __init__(self, age: int, balloon: bool) -> None:
        self.age, self.balloon, self.actual = age, balloon, 0

    def understand(self, text: bytes) -> str | None:
        """The request's name if crosvm would understand it."""
        try:
            request = json.loads(text)
        except ValueError:
            return None
        if isinstance(request, dict) and len(request) == 1 and next(iter(request.values())) is None:
            request = next(iter(request))
        if isinstance(request, str):
            return request if request in UNITS[self.age] else None
        if not isinstance(request, dict) or len(request) != 1 or "BalloonCommand" not in request:
            return None
        command = request["BalloonCommand"]
        if command == "Stats":
            return "Stats"
        adjust = command.get("Adjust") if isinstance(command, dict) else None
        if not isinstance(adjust, dict) or type(adjust.get("num_bytes")) is not int:
            return None
        if self.age == 2026 and type(adjust.get("wait_for_success")) is not bool:
            return None
        self.wanted = adjust["num_bytes"]
        return "Adjust"

    def answer(self, name: str) -> Any:
        if name == "Stats":
            return (
                {"BalloonStats": {"stats": STATS, "balloon_actual": self.actual}}
                if self.balloon
                else {"Err": 95}
            )
        if name == "Adjust":
            if not self.balloon:
                return {"Err": 95}
            self.actual = self.wanted & ~4095
        if name == "VcpuPidTid":
            return {"VcpuPidTidResponse": {"pid_tid_map": {"0": [os.getpid(), os.getpid()]}}}
        return "Ok"


def serve(listener: socket.socket, guest: Guest, plan: Any) -> NoReturn:
    """One request at a time, of any number of connections."""
    connections: dict[int, socket.socket] = {}
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == listener.fileno():
                connection = listener.accept()[0]
                connections[connection.fileno()] = connection
                poller.register(connection, select.POLLIN)
                continue
            packet = connections[fd].recv(1 << 16)
            name = guest.understand(packet) if packet else None
            if packet and "record" in plan:
                with Path(plan["record"]).open("ab") as record:
                    record.write(packet + b"\n")
            if not packet or name in plan.get("close", ()):
                poller.unregister(fd)
                connections.pop(fd).close()
                continue
            if name is None:
                print(f"failed to recv VmRequest: {packet!r}", file=sys.stderr)
                continue
            replies = plan.get("replies", {})
            reply = (
                replies[name] if name in replies else json.dumps(guest.answer(name), separators=(",", ":"))
            )
            if reply is not None:
                connections[fd].send(reply.encode())
            if name == "Exit":
                sys.exit(0)


def main() -> NoReturn:
    """Be crosvm."""
    age, *arguments = sys.argv[1:]
    words = split(arguments)
    top = set()
    while words and words[0].startswith("--"):
        option = words.pop(0)
        if option == "--log-level":
            words.pop(0)
        elif option == "--help":
            words.insert(0, "help")
            break
        elif option not in {"--extended-status", "--no-syslog"}:
            invalid(f"unrecognized argument: {option}")
        top.add(option)
    command = words.pop(0) if words else invalid("no command")
    if command == "version":
        print("crosvm 0.1.0-standin")
        sys.exit(0)
    if command == "help":
        print("Usage: crosvm\n\nCommands:")
        print("\n".join(f"  {name:<17} something" for name in COMMANDS))
        sys.exit(0)
    if command != "run":
        invalid(f"unknown command {command}")
    if "--help" in words:
        names = set().union(SWITCHES, OPTIONS, REPEATABLE, *BY_AGE[int(age)])
        print("Usage: crosvm run\n\nOptions:")
        print("\n".join(f"  --{name:<15} something" for name in sorted(names)))
        sys.exit(0)
    given, positional = parse(words, int(age))
    plan, roles, fd = check(given, positional, int(age))
    listener = socket.socket(fileno=fd)
    if listener.type != socket.SOCK_SEQPACKET or not listener.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        failed("the control socket does not listen for packets")
    for role, text in plan.get("write", {}).items():
        os.write(roles[role], text.encode())
    if plan.get("before") == "never":
        signal.pause()
    if "signal" in plan:
        os.kill(os.getpid(), plan["signal"])
    code = plan.get("exit")
    if code is not None:
        # As crosvm masks it without --extended-status.
        sys.exit(0 if code in {32, 33, 34, 36} and "--extended-status" not in top else code)
    time.sleep(plan.get("before", 0))
    serve(listener, Guest(int(age), "no-balloon" not in given), plan)


if __name__ == "__main__":
    main()
