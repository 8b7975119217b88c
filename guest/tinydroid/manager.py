"""tinydroid's manager: what Microdroid's does, done for real in a guest of some 20 MB.

The agent (``agent.c``) starts it once the machine is set up, and powers off when it ends. It verifies the
payload that the host brought, compares it with what this instance saw before, runs it, and reports. README.md
tells what is as in Microdroid and what is not.
"""

import json
import os
import sys
from typing import Any, Final

import vmactor_guest  # type: ignore[import-not-found, unused-ignore]  # beside this file in the guest
from apk import Apk, Idsig, VerifiedFile, read_idsig
from disks import MAX_EXTRA_APKS, Device, Instance, Metadata, find, open_store, read_metadata
from failures import BadConfig, Changed, Failure, NotVerified

ABI: Final = "x86_64"
APK_ROOT: Final = "/mnt/apk"
EXTRA_ROOT: Final = "/mnt/extra-apk"
STORE_ROOT: Final = "/mnt/encryptedstore"
FAILURE_PORT: Final = "/dev/ttyS1"
LOG: Final = "/dev/hvc2"
DEBUGGABLE: Final = "/debuggable"
"""In the initrd for debug level FULL only."""
MAX_CONFIG: Final = 1 << 20
NO_HOST: Final = "MICRODROID_FAILED_TO_CONNECT_TO_VIRTUALIZATION_SERVICE"
CONNECT_SECONDS: Final = 10.0
FAILURE_PIECE: Final = 16
"""Bytes written to the failure port at once, as in the reference."""


def say(text: str) -> None:
    """Tell the console, where somebody may look."""
    if os.path.exists(DEBUGGABLE):
        sys.stdout.write(f"tinydroid: {text}\n")
        sys.stdout.flush()


def main() -> int:
    """Run the payload; what is wrong with it is told to the host."""
    os.umask(0o022)
    if os.path.exists(DEBUGGABLE):
        with open("/proc/sys/kernel/printk", "w") as level:
            level.write("4")  # what "quiet" would leave
    with vmactor_guest.Host(timeout=CONNECT_SECONDS) as host:
        try:
            try:
                run(host)
            except vmactor_guest.HostError:
                raise
            except Exception as error:  # also what nobody thought of has to reach the host
                failure = error if isinstance(error, Failure) else Failure(f"{type(error).__name__}: {error}")
                say(f"{type(failure).__name__}: {failure}")
                host.notify_error(failure.code, str(failure))
                to_failure_port(failure.port_text)
        except vmactor_guest.Unreachable as error:
            say(str(error))
            to_failure_port(NO_HOST)
        except vmactor_guest.Refused as error:
            say(str(error))
    return 0


def to_failure_port(text: str) -> None:
    """Write why the guest ends, in pieces."""
    data = " ".join(text.splitlines()).encode()
    port = os.open(FAILURE_PORT, os.O_WRONLY | os.O_NOCTTY)
    for at in range(0, len(data), FAILURE_PIECE):
        os.write(port, data[at : at + FAILURE_PIECE])
    os.close(port)


def run(host: Any) -> None:
    """Verify, compare, unpack, run.

    Raises:
        Failure: It did not come to that, or a signal ended the payload.
    """
    metadata = read_metadata(_device("payload-metadata", wait=True))
    instance = Instance(Device(_found("vm-instance"), writable=True))
    record = instance.load()

    apk, idsig = verify(*metadata.apk)
    identity: dict[str, Any] = {"apk": _identity(idsig), "apexes": metadata.apexes, "extra_apks": []}
    known = record is not None and record["identity"]["apk"] == identity["apk"]
    if record is not None and not known:
        raise Changed("the APK is not the one of this instance's first boot")
    if not known:
        apk.verify_signature(idsig)
    config = read_config(apk, metadata)
    extras = []
    for number in range(config["extra_apks"]):
        extra, extra_idsig = verify(f"extra-apk-{number}", f"extra-idsig-{number}")
        extras.append((extra, extra_idsig))
        identity["extra_apks"].append(_identity(extra_idsig))
    if record is None:
        for extra, extra_idsig in extras:
            extra.verify_signature(extra_idsig)
        record = {"identity": identity, "secret": os.urandom(32).hex()}
        instance.store(record)
        say("a new instance")
    elif record["identity"] != identity:
        raise Changed("what goes with the APK is not what it was at this instance's first boot")
    else:
        say("a known instance")

    command = unpack(apk, APK_ROOT, config["task"])
    for number, (extra, _) in enumerate(extras):
        unpack(extra, f"{EXTRA_ROOT}/{number}", None)
    environment = {"TINYDROID_INSTANCE_SECRET": record["secret"], "TINYDROID_APK": APK_ROOT}
    if (store := find("encryptedstore")) is not None:
        mount_store(store, bytes.fromhex(record["secret"]))
        environment["TINYDROID_ENCRYPTED_STORE"] = STORE_ROOT
    try:
        launch(host, command, environment)
    finally:
        if store is not None:
            _program("/bin/mount", STORE_ROOT)


def _found(label: str, *, wait: bool = False) -> str:
    path = find(label, wait=wait)
    if path is None:
        raise Failure(f"there is no partition {label!r}")
    return path


def _device(label: str, *, wait: bool = False) -> Device:
    return Device(_found(label, wait=wait))


def _identity(idsig: Idsig) -> dict[str, str]:
    return {"root_hash": idsig.root.hex(), "apk_digest": idsig.apk_digest.hex()}


def verify(apk_label: str, idsig_label: str) -> tuple[Apk, Idsig]:
    """An APK whose blocks are checked, and the idsig that they are checked against.

    Raises:
        NotVerified: What was read so far does not go together.
    """
    device, idsig = _device(apk_label), read_idsig(_device(idsig_label).read)
    apk = Apk(VerifiedFile(device.read, device.size, idsig))
    say(f"{apk_label}: {len(apk.entries)} files, root hash {idsig.root.hex()}")
    return apk, idsig


# -- Configuration ------------------------------------------------------------------------------------


def read_config(apk: Apk, metadata: Metadata) -> dict[str, Any]:
    """The payload's configuration: its task, and how many extra APKs it has.

    Raises:
        BadConfig: It is none, or has no task.
    """
    if metadata.binary_name is not None:
        task = "microdroid_launcher", metadata.binary_name
        return {"task": task, "extra_apks": metadata.extra_apks}
    path = metadata.config_path or ""
    entry = apk.entries.get(path.removeprefix(f"{APK_ROOT}/"))
    if entry is None or entry.size > MAX_CONFIG:
        raise BadConfig(f"the APK has no configuration {path!r}, or a very long one")
    try:
        config = json.loads(apk.content(entry).decode())
        task = config.get("task")
        if task is not None:
            task = task.get("type", "executable"), task["command"]
        extras = config.get("extra_apks", [])
        if not isinstance(extras, list) or len(extras) > MAX_EXTRA_APKS:
            raise TypeError("extra_apks is not a list, or a very long one")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise BadConfig(f"the configuration {path!r} cannot be used: {error!r}") from error
    if task is None:
        raise BadConfig("No task in VM config")
    return {"task": task, "extra_apks": len(extras)}


# -- Unpacking and running ----------------------------------------------------------------------------


def unpack(apk: Apk, root: str, task: tuple[str, str] | None) -> str:
    """Unpack an APK into memory, where Microdroid mounts it; returns the program to run.

    Raises:
        Failure: The task's program is not there.
        NotVerified: A file is damaged.
    """
    for name, entry in apk.entries.items():
        if name.endswith("/"):
            continue
        path, data = f"{root}/{name}", apk.content(entry)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
        except OSError as error:  # one name is another's directory, or too long
            raise NotVerified(f"{name!r} in the APK cannot be unpacked: {error.strerror}") from error
        if name.startswith("lib/"):
            os.chmod(path, 0o755)
    if task is None:
        return ""
    kind, command = task
    program = command if kind == "executable" else f"{root}/lib/{ABI}/{command}"
    if not os.path.isfile(program):
        raise Failure(f"Unable to access {program}")
    return program


def launch(host: Any, program: str, environment: dict[str, str]) -> None:
    """Run the payload to its end and report.

    It stands for the shared library that Microdroid would load: a static program, which writes ``ready`` to
    the descriptor in ``TINYDROID_READY_FD`` instead of calling a function.

    Raises:
        Failure: It could not be run, or a signal ended it.
    """
    read, write = os.pipe()  # close-on-exec; the child's end is duplicated without that
    output = os.open(LOG if os.path.exists(DEBUGGABLE) else "/dev/null", os.O_WRONLY | os.O_NOCTTY)
    nothing = os.open("/dev/null", os.O_RDONLY)
    environment |= {"TINYDROID_READY_FD": "3", "PATH": "/bin"}
    places = [(os.POSIX_SPAWN_DUP2, *pair) for pair in ((nothing, 0), (output, 1), (output, 2), (write, 3))]
    host.notify_payload_started()
    try:
        child = os.posix_spawn(program, [program], environment, file_actions=places)
    except OSError as error:
        raise Failure(f"Failed to run payload: {error.strerror}") from error
    os.close(write)
    say(f"runs {program}")
    heard = b""
    while data := os.read(read, 64):
        if b"ready\n" not in heard and b"ready\n" in (heard := heard[-8:] + data):
            host.notify_payload_ready()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Failure(f"Failed to run payload: killed by signal {os.WTERMSIG(status)}")
    say(f"the payload has finished with {os.WEXITSTATUS(status)}")
    host.notify_payload_finished(os.WEXITSTATUS(status))


def mount_store(device: str, secret: bytes) -> None:
    """Mount the encrypted store, formatting it first where it is new.

    Raises:
        Failure: It cannot be formatted or mounted; with another instance's key it looks like noise.
    """
    mapped, new = open_store(device, secret)
    if new:
        say("formats the encrypted store")
        _program("/bin/mke2fs", "-q", "-t", "ext4", "-E", "nodiscard,lazy_itable_init=0", mapped)
    os.makedirs(STORE_ROOT)
    _program("/bin/mount", "ext4", mapped, STORE_ROOT)


def _program(*words: str) -> None:
    if status := os.spawnv(os.P_WAIT, words[0], words):
        raise Failure(f"{words[0]} failed ({status})")


if __name__ == "__main__":
    sys.exit(main())
