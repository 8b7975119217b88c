"""The command line's grammar. Imports nothing heavy, so that ``--version`` and ``--help`` come at once."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from vmactor import __version__
from vmactor.cli.exit_codes import MEANINGS

VMMS = ("auto", "crosvm", "qemu", "simulated")
RESTARTS = ("on-failure", "always")
CPU_TOPOLOGIES = ("one_cpu", "match_host")
GUEST_RELEASES = ("android13", "explicit-codes")
PARTITION_TYPES = ("raw", "instance", "encryptedstore")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Understand a command line; exits where it cannot be.

    ``argparse`` would take whatever follows ``--restart`` for its value, the configuration too.
    """
    words = list(args)
    for place, word in enumerate(args):
        if word == "--":
            break
        if word == "--restart" and not {*args[place + 1 : place + 2]} & {*RESTARTS}:
            words[place] = f"--restart={RESTARTS[0]}"
    return build().parse_args(words)


def build() -> argparse.ArgumentParser:
    """The parser of everything; ``command`` of its result names a module of this package."""
    parser = argparse.ArgumentParser(
        prog="vmactor",
        description="Run virtual machines, and look at those that run.",
        epilog=f"Exit status: {_exit_codes()}. More: docs/cli.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vmactor {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_run_app(commands)
    _add_run_microdroid(commands)
    _add_connect(commands)
    _add_list(commands)
    _add_events(commands)
    _add_console(commands)
    _add_stop(commands)
    _add_suspend(commands)
    _add_top(commands)
    _add_info(commands)
    _add_serve(commands)
    _add_load(commands)
    _add_demo(commands)
    _add_create_partition(commands)
    _add_create_composite(commands)
    _add_image(commands)
    _add_create_idsig(commands)
    _add_verify_apk(commands)
    return parser


_Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for its type


def _add(commands: "_Commands[argparse.ArgumentParser]", name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )


def _add_run(commands: "_Commands[argparse.ArgumentParser]") -> None:
    run = _add(commands, "run", "run a VM to its end, and print what happens to it")
    run.add_argument("config", metavar="CONFIG.json", type=Path, help="the VM's configuration")
    run.add_argument("--name", help="the VM's name (default: the configuration's)")
    _add_vmm(run)
    run.add_argument(
        "--cpu-topology", choices=CPU_TOPOLOGIES, help="how many virtual CPUs (default: the configuration's)"
    )
    run.add_argument(
        "--memory", metavar="MIB", type=_positive_int, help="memory in MiB (default: the configuration's)"
    )
    _add_output(run)
    run.add_argument(
        "--hangup-timeout",
        metavar="S",
        type=_positive_seconds,
        help="kill the VM if its payload has not reported its start after S seconds (default: wait for ever)",
    )
    run.add_argument(
        "--restart",
        nargs="?",
        choices=RESTARTS,
        const="on-failure",
        help="start the VM again when it has ended, on failure (also without a value) or always; up to 3 "
        "times within 60 s, after 1, 2 and 4 s (default: never)",
    )
    _add_guest_reports(run)
    run.add_argument(
        "--keep",
        action="store_true",
        help="let a daemon run it, where it goes on when this command ends, also by Ctrl-C",
    )
    run.add_argument(
        "--detach", action="store_true", help="with --keep: print its CID and end as soon as its VMM runs"
    )
    _add_socket(
        run, "let the daemon at this socket run it (default with --keep: $VMACTOR_SOCKET, else the usual one)"
    )
    _add_state_dir(run)
    _add_json(run, "print events as JSON, one object a line")


def _add_run_app(commands: "_Commands[argparse.ArgumentParser]") -> None:
    run = _add(commands, "run-app", "run a payload from an APK, in a guest that verifies it")
    run.add_argument("apk", metavar="APK", type=Path, help="an APK that is signed with scheme v3")
    run.add_argument("idsig", metavar="IDSIG", type=Path, help="its idsig file; made or updated")
    run.add_argument("instance", metavar="INSTANCE", type=Path, help="its instance image; made if missing")
    run.add_argument(
        "--config-path", metavar="PATH", help="the payload's configuration in the APK; this or the next"
    )
    run.add_argument(
        "--payload-binary-name",
        "--payload_path",
        metavar="NAME",
        help="the payload's binary in the APK, without a directory",
    )
    run.add_argument(
        "--extra-idsig",
        metavar="PATH",
        type=Path,
        action="append",
        default=[],
        help="idsig file of an extra APK that the configuration names, made or updated; repeatable, in order",
    )
    _add_app_options(run, debug="none")


def _add_run_microdroid(commands: "_Commands[argparse.ArgumentParser]") -> None:
    run = _add(commands, "run-microdroid", "run the platform's guest with a payload that does nothing")
    run.add_argument(
        "--work-dir",
        metavar="DIR",
        type=Path,
        help="where idsig and instance image are; made if missing (default: one that is removed at the end)",
    )
    _add_app_options(run, debug="full")


def _add_app_options(run: argparse.ArgumentParser, *, debug: str) -> None:
    run.add_argument("--name", default="VmRunApp", help="the VM's name (default: VmRunApp)")
    _add_platform(run)
    run.add_argument("--storage", metavar="PATH", type=Path, help="encrypted store; made if missing")
    run.add_argument(
        "--storage-size",
        metavar="SIZE",
        type=_size,
        default=10 << 20,
        help="of a new one (default: 10485760)",
    )
    run.add_argument(
        "--debug", choices=("none", "full"), default=debug, help=f"how much can be seen (default: {debug})"
    )
    run.add_argument("-p", "--protected", action="store_true", help="protect the VM from its host")
    run.add_argument(
        "-m", "--mem", metavar="MIB", type=_positive_int, help="memory in MiB (default: the guest's own)"
    )
    run.add_argument(
        "--cpu-topology",
        choices=CPU_TOPOLOGIES,
        default="one_cpu",
        help="how many virtual CPUs (default: one_cpu)",
    )
    run.add_argument(
        "--task-profiles", metavar="NAME", action="append", default=[], help="task profile; repeatable"
    )
    _add_output(run)
    _add_guest_reports(run)
    _add_vmm(run)
    _add_state_dir(run)
    _add_json(run, "print events as JSON, one object a line")


def _add_connect(commands: "_Commands[argparse.ArgumentParser]") -> None:
    connect = _add(
        commands, "connect", "join standard input and output to a vsock port of a running VM of this user"
    )
    connect.add_argument("cid", metavar="CID", type=_positive_int, help="which VM; 'vmactor list' shows them")
    connect.add_argument("port", metavar="PORT", type=_port, help="vsock port in the guest, 1024 or above")
    connect.add_argument(
        "--quit-after",
        metavar="S",
        type=_seconds,
        help="once standard input has ended, stop after S seconds in which the guest sent nothing (default: "
        "wait until the guest closes)",
    )
    _add_state_dir(connect)


def _add_list(commands: "_Commands[argparse.ArgumentParser]") -> None:
    listing = _add(commands, "list", "list the VMs of this user on this host, whoever manages them")
    _add_socket(listing, "instead, list the VMs of the daemon at this socket")
    _add_state_dir(listing)
    _add_json(listing, "print JSON, one VM a line")


def _add_events(commands: "_Commands[argparse.ArgumentParser]") -> None:
    events = _add(commands, "events", "print what happened to a daemon's VMs, as far back as it knows")
    events.add_argument("vm", metavar="VM", nargs="?", help="only of this VM that lives: its CID or its name")
    events.add_argument(
        "-f", "--follow", action="store_true", help="go on with what happens; without --since, from now"
    )
    events.add_argument(
        "--since",
        metavar="CURSOR",
        type=_cursor,
        help="begin after this event: the 'seq' of the last one seen",
    )
    _add_socket(events)
    _add_json(events, "print events as JSON, one object a line")


def _add_console(commands: "_Commands[argparse.ArgumentParser]") -> None:
    console = _add(commands, "console", "follow what the guest of a daemon's VM writes to its console")
    _add_vm(console)
    console.add_argument(
        "--raw",
        action="store_true",
        help="write what the guest writes, byte by byte; a terminal would do what the guest tells it",
    )
    _add_socket(console)


def _add_stop(commands: "_Commands[argparse.ArgumentParser]") -> None:
    stop = _add(commands, "stop", "end a daemon's VM, and wait until nothing of it is left")
    _add_vm(stop)
    stop.add_argument(
        "--graceful",
        metavar="SECONDS",
        type=_positive_seconds,
        help="give the guest so long to shut down before the VMM is told to end, and then killed (default: "
        "kill it at once)",
    )
    _add_socket(stop)
    _add_json(stop, "print one JSON object that says what ended it")


def _add_suspend(commands: "_Commands[argparse.ArgumentParser]") -> None:
    for name, text in (("suspend", "pause the virtual CPUs of"), ("resume", "let the virtual CPUs run of")):
        command = _add(commands, name, f"{text} a daemon's VM")
        _add_vm(command)
        _add_socket(command)


def _add_top(commands: "_Commands[argparse.ArgumentParser]") -> None:
    _add_socket(_add(commands, "top", "show a daemon's VMs live, on a terminal"))


def _add_platform(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--platform",
        metavar="DIR",
        type=Path,
        default=Path("/apex"),
        help="the tree with the parts of guests for apps (default: /apex)",
    )


def _add_info(commands: "_Commands[argparse.ArgumentParser]") -> None:
    info = _add(commands, "info", "tell what this host can do for VMs, what is chosen, and how to get more")
    info.add_argument(
        "--tree",
        nargs="?",
        type=_positive_int,
        const=0,
        metavar="CID",
        help="instead, tell what this user's managers do now: who lives, restarts, mailboxes, errors; of "
        "all VMs, or of one",
    )
    _add_platform(info)
    _add_state_dir(info)
    _add_vmm(info)
    _add_json(info, "print one JSON object")


def _add_serve(commands: "_Commands[argparse.ArgumentParser]") -> None:
    serve = _add(commands, "serve", "run VMs for all who ask by a unix socket, until SIGTERM or SIGINT")
    serve.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="a TOML file with options, over which those of the command line count (docs/operation.md)",
    )
    serve.add_argument(
        "--socket",
        metavar="PATH",
        type=Path,
        help="where to listen (default: vmactor.sock in $RUNTIME_DIRECTORY, else in /run/vmactor for root, "
        "else in $XDG_RUNTIME_DIR/vmactor)",
    )
    serve.add_argument(
        "--policy",
        metavar="FILE",
        type=Path,
        help="which user may do what (default: root and this user everything, all others nothing)",
    )
    serve.add_argument(
        "--tombstones",
        metavar="DIR",
        type=Path,
        help="keep what guests report of crashes inside them there (default: they cannot report them)",
    )
    _add_vmm(serve)
    _add_platform(serve)
    _add_state_dir(serve)
    serve.set_defaults(vmm=None, platform=None)  # then the configuration says


def _add_demo(commands: "_Commands[argparse.ArgumentParser]") -> None:
    demo = _add(commands, "demo", "boot the small guest of this project and show the whole life of a VM")
    demo.add_argument(
        "--app",
        action="store_true",
        help="show the two boots of an app instead: a payload from a signed APK, which the guest verifies",
    )
    demo.add_argument(
        "--guest",
        metavar="DIR",
        type=Path,
        help="where 'make guest' put the guest (default: $VMACTOR_GUEST, else build/guest; with --app "
        "$VMACTOR_TINYDROID, else build/tinydroid)",
    )
    _add_vmm(demo)
    _add_state_dir(demo)
    _add_json(demo, "print events as JSON, one object a line")


class _ScenarioValue(argparse.Action):
    """Keeps what was given of a scenario apart from what was not, which the file may say."""

    def __call__(
        self, _parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, _option: Any = None
    ) -> None:
        """Take a value in."""
        namespace.values = getattr(namespace, "values", {}) | {self.dest: value}


def _add_load(commands: "_Commands[argparse.ArgumentParser]") -> None:
    load = _add(commands, "load", "run many VMs on this host, and tell how it bore them")
    load.set_defaults(values={})
    load.add_argument(
        "words", nargs="*", metavar="compare A.json B.json", help="instead, compare the results of two loads"
    )
    load.add_argument(
        "--scenario", metavar="FILE.toml", type=Path, help="values that the options do not give"
    )
    for name, kind, text in (
        ("vms", int, "how many VMs in all (default: 100)"),
        ("vmm", str, "simulated, qemu or crosvm (default: simulated)"),
        ("arrivals", str, "closed, fixed or poisson (default: closed)"),
        ("clients", int, "with closed: how many VMs come or go at a time (default: 16)"),
        ("rate", float, "with fixed and poisson: VMs a second (default: 20)"),
        ("ramp", float, "seconds over which the rate grows, or the clients begin (default: 0)"),
        ("lifetime", str, "hold, constant, uniform or exponential (default: hold)"),
        ("mean-lifetime", float, "seconds (default: 1)"),
        ("hold", float, "seconds for which nothing is done once all have come (default: 5)"),
        ("crash", float, "share of VMs whose kernel panics (default: 0)"),
        ("hang", float, "share whose payload never starts (default: 0)"),
        ("error", float, "share whose guest reports an error (default: 0)"),
        ("killed", float, "share whose VMM is killed (default: 0)"),
        ("hangup-timeout", float, "seconds after which a payload counts as hung (default: 30)"),
        ("ready-timeout", float, "seconds after which a VM counts as failed (default: 60)"),
        ("seed", int, "of all that is random (default: 0)"),
    ):
        load.add_argument(
            f"--{name}", metavar="X", type=kind, action=_ScenarioValue, default=argparse.SUPPRESS, help=text
        )
    load.add_argument(
        "--guest",
        metavar="DIR",
        type=Path,
        default=Path("build/guest"),
        help="real guests (default: build/guest)",
    )
    load.add_argument("--json", metavar="FILE", help="write the result there; - is standard output")
    load.add_argument("--html", metavar="FILE", type=Path, help="write a page with plots there")
    _add_state_dir(load)


def _add_create_partition(commands: "_Commands[argparse.ArgumentParser]") -> None:
    create = _add(commands, "create-partition", "make a new file that a guest can write to, a QCOW2 image")
    create.add_argument("path", metavar="PATH", type=Path, help="the file; it must not exist yet")
    create.add_argument(
        "size",
        metavar="SIZE",
        type=_size,
        help="of the guest's disk in bytes, or with K, M, G or T (powers of 1024); up to 16T",
    )
    create.add_argument(
        "-t",
        "--type",
        choices=PARTITION_TYPES,
        default="raw",
        help="what it begins with: nothing (default), or the mark of an instance image or encrypted store",
    )
    _add_json(create, "print one JSON object")


def _add_create_composite(commands: "_Commands[argparse.ArgumentParser]") -> None:
    create = _add(commands, "create-composite", "make a disk for crosvm out of several files")
    create.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="the disk; neither it nor OUT.header, OUT.footer and OUT.filler may exist yet",
    )
    create.add_argument(
        "partitions",
        metavar="LABEL:PATH[:writable][:GUID]",
        type=_partition,
        nargs="+",
        help="a partition; neither its label nor its path can have a colon",
    )
    _add_json(create, "print one JSON object")


def _add_image(commands: "_Commands[argparse.ArgumentParser]") -> None:
    image = _add(commands, "image", "look at image files")
    actions = image.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    info = _add(actions, "info", "tell what an image is, and how large the disk in it")
    info.add_argument("file", metavar="FILE", type=Path, help="a regular file or a block device")
    _add_json(info, "print one JSON object")


def _add_create_idsig(commands: "_Commands[argparse.ArgumentParser]") -> None:
    create = _add(commands, "create-idsig", "make the idsig file of an APK, unless it is up to date")
    create.add_argument("apk", metavar="APK", type=Path, help="an APK that is signed with scheme v3")
    create.add_argument("idsig", metavar="IDSIG", type=Path, help="the file to make or to update")
    _add_json(create, "print one JSON object")


def _add_verify_apk(commands: "_Commands[argparse.ArgumentParser]") -> None:
    verify = _add(commands, "verify-apk", "verify the v3 signature of an APK, and its idsig")
    verify.add_argument("apk", metavar="APK", type=Path, help="the APK")
    verify.add_argument(
        "idsig", metavar="IDSIG", type=Path, nargs="?", help="its idsig file, signed (v4) or not"
    )
    _add_json(verify, "print one JSON object")


def _add_output(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--console", metavar="FILE", help="copy the guest's console to a file; '-' is standard output"
    )
    run.add_argument("--log", metavar="FILE", help="copy the guest's log (hvc2) to a file; '-' likewise")


def _add_vmm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vmm", choices=VMMS, default="auto", help="which VMM (default: auto)")


def _add_guest_reports(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--tombstones",
        metavar="DIR",
        type=Path,
        help="keep what the guest reports of crashes inside it there (default: it cannot report them)",
    )
    run.add_argument(
        "--guest-release",
        choices=GUEST_RELEASES,
        default=GUEST_RELEASES[0],
        help="which methods a guest knows that reports by RPC Binder: android13 until Android 16, "
        "explicit-codes after it (default: %(default)s)",
    )


def _add_vm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vm", metavar="VM", help="its CID or its name")


def _add_socket(
    parser: argparse.ArgumentParser,
    text: str = "the daemon's socket (default: $VMACTOR_SOCKET, else the usual one)",
) -> None:
    parser.add_argument("--socket", metavar="PATH", type=Path, help=text)


def _add_state_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        help="what this user's managers share (default: /run/vmactor for root, else "
        "$XDG_RUNTIME_DIR/vmactor)",
    )


def _add_json(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--json", action="store_true", help=text)


def _exit_codes() -> str:
    return "; ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items())


# -- Types; argparse puts the option's name in front of what they say ---------------------------------


def _positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _cursor(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not the number of an event")
    return int(text)


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in _UNITS else (text, "")
    # Longer numbers are refused here because Python takes its time to read them.
    if not number.isascii() or not number.isdigit() or len(number) > 20:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size; write 10485760 or 10M")
    return int(number) * _UNITS.get(unit, 1)


def _partition(text: str) -> tuple[str, Path, bool, UUID | None]:
    label, path, mode, guid = [*text.split(":"), "", "", ""][:4]
    if not label or not path or mode not in {"", "writable"} or text.count(":") > 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form LABEL:PATH[:writable][:GUID]")
    try:
        return label, Path(path), bool(mode), UUID(guid) if guid else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{guid!r} is not a GUID") from None


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a vsock port")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _positive_seconds(text: str) -> float:
    if not (seconds := _seconds(text)):
        raise argparse.ArgumentTypeError("has to be more than 0 seconds")
    return seconds
