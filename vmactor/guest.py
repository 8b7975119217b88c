"""Report a payload's life from inside a VM to vmactor: one file for Python 3.8 or later, nothing else needed.

Copy it into an image. As a program::

    python3 guest.py run -- COMMAND ARGS...   started, the command, then finished with its exit code
    python3 guest.py started | ready | finished CODE | error CODE TEXT

Before the subcommand: ``--timeout SECONDS`` is the deadline of each report (30), and ``--address PATH``, or
``VMACTOR_GUEST_RPC`` in the environment, is a unix socket to dial instead of the host, for tests. With
``--protocol binder`` it speaks RPC Binder, as Microdroid does; for that, the folder ``vmactor/binder`` has to
lie beside this file. Exit codes: ``run`` gives the command's own, 128 + N if signal N killed it, 126 or 127
if it could not be started; 2 usage; 69 the host was not reached in time; 70 the host refused. As a module::

    with Host() as host:
        host.notify_payload_started()

The host is dialled on vsock, CID 2, at the port that equals the VM's own CID. The wire format is
MessagePack-RPC; the project's docs/guest-rpc.md describes it for other languages.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

VMADDR_CID_HOST = 2
VMADDR_CID_ANY = 0xFFFFFFFF
IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9

ADDRESS_VARIABLE = "VMACTOR_GUEST_RPC"
TIMEOUT = 30.0
MAX_ANSWER = 64 * 1024
MAX_TEXT = 4096
MAX_NESTING = 16

BINDER_INTERFACE = "android.system.virtualmachineservice.IVirtualMachineService"
BINDER_CODES = {
    "notifyPayloadStarted": 1,
    "notifyPayloadReady": 2,
    "notifyPayloadFinished": 3,
    "notifyError": 4,
}

UNKNOWN_ERROR = 0
ILLEGAL_STATE = -5

EXIT_USAGE = 2
EXIT_UNREACHABLE = 69
EXIT_REFUSED = 70


class HostError(Exception):
    """Anything that went wrong between us and the host."""


class Refused(HostError):  # noqa: N818
    """The host understood the report and refused it.

    Attributes:
        code: Why, as a number: -5 the payload's state cannot move there, -3 a bad argument.
        message: Why, in words.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"the host refused ({code}): {message}")
        self.code = code
        self.message = message


class Unreachable(HostError):  # noqa: N818
    """No answer before the deadline; whether the report arrived is not known."""


# -- MessagePack, as much as is needed --------------------------------------------------------------


def pack(value: object) -> bytes:
    """MessagePack bytes of None, a bool, an integer of 64 bits, text, bytes, or a list of these."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return _pack_int(value)
    if isinstance(value, str):
        data = value.encode("utf-8", "replace")
        short = bytes([0xA0 | len(data)]) if len(data) < 32 else None
        return (short or _pack_length(len(data), {0xD9: "B", 0xDA: ">H", 0xDB: ">I"})) + data
    if isinstance(value, bytes):
        return _pack_length(len(value), {0xC4: "B", 0xC5: ">H", 0xC6: ">I"}) + value
    if isinstance(value, list):
        short = bytes([0x90 | len(value)]) if len(value) < 16 else None
        return (short or _pack_length(len(value), {0xDC: ">H", 0xDD: ">I"})) + b"".join(map(pack, value))
    raise TypeError(f"cannot pack {type(value).__name__}")


def _pack_int(value: int) -> bytes:
    if -32 <= value < 128:
        return bytes([value & 0xFF])
    if value >= 0:
        return _pack_length(value, {0xCC: "B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"})
    for code, form in {0xD0: "b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}.items():
        if value >= -1 << (8 * struct.calcsize(form) - 1):
            return bytes([code]) + struct.pack(form, value)
    raise OverflowError("an integer of more than 64 bits")


def _pack_length(length: int, forms: dict[int, str]) -> bytes:
    """The shortest of the forms that can hold the number."""
    for code, form in forms.items():
        if length < 1 << 8 * struct.calcsize(form):
            return bytes([code]) + struct.pack(form, length)
    raise OverflowError("too great for MessagePack")


_SCALARS = dict(enumerate((">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), 0xCA))
_LENGTHS = {
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class Incomplete(Exception):  # noqa: N818
    """More bytes are needed."""


class Unpacker:
    """Reads values from bytes: ``Incomplete`` if they end too soon, ``ValueError`` if they are none.

    Nesting is bounded, and no declared length is believed before its bytes are there. Extension types are
    refused: the host sends none.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.offset = 0

    def value(self, depth: int = 0) -> object:
        """The next value."""
        if depth > MAX_NESTING:
            raise ValueError("nested too deeply")
        code = self._take(1)[0]
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _SCALARS:
            return self._number(_SCALARS[code])
        if code < 0x90:
            return self._items("map", code & 15, depth)
        if code < 0xC0:
            return (
                self._items("array", code & 15, depth)
                if code < 0xA0
                else self._items("str", code & 31, depth)
            )
        if code not in _LENGTHS:
            raise ValueError(f"not expected from a host: 0x{code:02x}")
        kind, form = _LENGTHS[code]
        return self._items(kind, int(self._number(form)), depth)

    def _items(self, kind: str, length: int, depth: int) -> object:
        if kind == "bin":
            return self._take(length)
        if kind == "str":
            return self._take(length).decode("utf-8", "replace")
        if kind == "array":
            return [self.value(depth + 1) for _ in range(length)]
        pairs = [(self.value(depth + 1), self.value(depth + 1)) for _ in range(length)]
        if not all(isinstance(key, (str, int, float, bytes)) for key, _ in pairs):
            raise ValueError("a map's key is neither text nor a number")
        return dict(pairs)

    def _take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self._data):
            raise Incomplete
        taken, self.offset = self._data[self.offset : end], end
        return taken

    def _number(self, form: str) -> float:
        number: float = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number


# -- The host ---------------------------------------------------------------------------------------


def own_cid() -> int:
    """This VM's CID, asked of the vsock driver; OSError while there is none."""
    import fcntl  # noqa: PLC0415 - not needed with a unix socket

    device = os.open("/dev/vsock", os.O_RDONLY)
    try:
        answer = fcntl.ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4))
    finally:
        os.close(device)
    cid: int = struct.unpack("=I", answer)[0]
    if cid == VMADDR_CID_ANY:
        raise OSError("the vsock device has no CID yet")
    return cid


class Host:
    """The host's RPC server; connects at the first report.

    A connection that the host has closed (it closes idle ones) is made anew. If one is lost between a report
    and its answer, the report is sent again on a new one; if the host then says that the payload's state
    cannot move there, the first one had arrived, and that is success.

    Args:
        address: Path of a unix socket to dial instead of the host; ``VMACTOR_GUEST_RPC`` if None.
        timeout: Deadline of each report in seconds, dialling included.

    Every report raises ``Refused``, or ``Unreachable`` at the deadline; either way the next one may be tried.
    Not for use from several threads at once.
    """

    def __init__(self, address: str | None = None, timeout: float = TIMEOUT) -> None:
        self.address = address or os.environ.get(ADDRESS_VARIABLE)
        self.timeout = timeout
        self._sock: socket.socket | None = None
        self._msgid = 0

    def __enter__(self) -> Host:  # noqa: PYI034 - typing.Self is younger than Python 3.8
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def notify_payload_started(self) -> None:
        """The payload is about to run."""
        self._call("notifyPayloadStarted")

    def notify_payload_ready(self) -> None:
        """The payload can serve."""
        self._call("notifyPayloadReady")

    def notify_payload_finished(self, exit_code: int) -> None:
        """The payload has ended with this exit code."""
        self._call("notifyPayloadFinished", exit_code)

    def notify_error(self, error_code: int, message: str) -> None:
        """The payload could not be run: 0 unknown, 1 not verified, 2 changed, 3 configuration invalid.

        A message of more than 4096 characters is cut.
        """
        self._call("notifyError", error_code, message[:MAX_TEXT])

    def _call(self, method: str, *params: object) -> None:
        deadline = time.monotonic() + self.timeout
        self._msgid = (self._msgid + 1) & 0xFFFFFFFF
        in_doubt = False
        pause = 0.01
        while True:
            try:
                sock = self._connected(deadline)
                error = self._exchange(sock, method, params, deadline)
                break
            except (OSError, ValueError) as failure:
                in_doubt = in_doubt or self._sock is not None
                self.close()
                if time.monotonic() + pause >= deadline:
                    text = f"{method}: no answer in {self.timeout:g} s: {failure}"
                    raise Unreachable(text) from failure
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if error is not None and not (in_doubt and error.code == ILLEGAL_STATE):
            raise error

    def _connected(self, deadline: float) -> socket.socket:
        if self._sock is not None:
            self._sock.setblocking(False)
            try:
                self._sock.recv(1)
            except BlockingIOError:
                return self._sock  # alive, and silent as it should be
            except OSError:
                pass
            self.close()  # ended, or an answer to a report that was given up
        address = self.address or (VMADDR_CID_HOST, own_cid())
        sock = socket.socket(socket.AF_UNIX if self.address else socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.settimeout(_left(deadline))
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        return sock

    def _exchange(
        self, sock: socket.socket, method: str, params: tuple[object, ...], deadline: float
    ) -> Refused | None:
        sock.settimeout(_left(deadline))
        sock.sendall(pack([0, self._msgid, method, list(params)]))
        data = b""
        while True:
            try:
                message = Unpacker(data).value()
                break
            except Incomplete:
                if len(data) > MAX_ANSWER:
                    raise ValueError("an answer without end") from None
            sock.settimeout(_left(deadline))
            piece = sock.recv(4096)
            if not piece:
                raise OSError("the host closed the connection")
            data += piece
        if not (isinstance(message, list) and len(message) == 4 and message[:2] == [1, self._msgid]):
            raise ValueError("not an answer to our request")
        error = message[2]
        if error is None:
            return None
        if isinstance(error, list) and len(error) >= 2 and isinstance(error[0], int):
            return Refused(error[0], str(error[1]))
        return Refused(UNKNOWN_ERROR, str(error))


class BinderHost(Host):
    """The same host, spoken to by RPC Binder: one session a connection."""

    def __init__(self, address: str | None = None, timeout: float = TIMEOUT) -> None:
        super().__init__(address, timeout)
        try:
            from binder import client  # type: ignore[import-not-found] # noqa: PLC0415 - beside the file, in guests
        except ImportError:
            from vmactor.binder import client  # noqa: PLC0415
        self._library = client
        self._session: tuple[socket.socket, client.Client] | None = None

    def _exchange(
        self, sock: socket.socket, method: str, params: tuple[object, ...], deadline: float
    ) -> Refused | None:
        library = self._library
        sock.settimeout(_left(deadline))
        try:
            if self._session is None or self._session[0] is not sock:
                self._session = None
                self._session = sock, library.Client(sock, BINDER_INTERFACE)
            arguments = library.Parcel()
            for param in params:
                arguments.string(param) if isinstance(param, str) else arguments.int32(param)
            self._session[1].call(BINDER_CODES[method], arguments)
        except library.RemoteError as error:
            return Refused(error.code, error.message)
        except library.TransactionError as error:
            return Refused(UNKNOWN_ERROR, str(error))
        except library.ProtocolError as error:
            raise ValueError(str(error)) from error
        return None


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)  # 0 would mean non-blocking


# -- The program ------------------------------------------------------------------------------------


def run(host: Host, command: list[str]) -> int:
    """Report started, run the command, report how it ended; the exit code to leave with.

    As in the reference, a payload that cannot be announced is not run, and one that a signal killed is an
    error, not an exit code.
    """
    import signal  # noqa: PLC0415 - slow to import under emulation, and only needed here

    host.notify_payload_started()
    python_ignores = [signal.SIGPIPE, signal.SIGXFSZ]
    try:
        pid = os.posix_spawnp(command[0], command, os.environ, setsigdef=python_ignores)
    except OSError as error:
        host.notify_error(UNKNOWN_ERROR, f"Failed to run payload: {error}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    while True:
        try:
            status = os.waitpid(pid, 0)[1]
            break
        except KeyboardInterrupt:
            continue  # the payload got it too, and how it ends is what we are here to report
    if os.WIFSIGNALED(status):
        host.notify_error(UNKNOWN_ERROR, "Failed to run payload")
        return 128 + os.WTERMSIG(status)
    host.notify_payload_finished(os.WEXITSTATUS(status))
    return os.WEXITSTATUS(status)


def main(arguments: list[str]) -> int:
    """The program; ``arguments`` without its name."""
    address, timeout, kind = None, TIMEOUT, Host
    try:
        while arguments[0] in ("--address", "--timeout", "--protocol"):
            if arguments[0] == "--address":
                address = arguments[1]
            elif arguments[0] == "--timeout":
                timeout = float(arguments[1])
            else:
                kind = {"messagepack": Host, "binder": BinderHost}[arguments[1]]
            arguments = arguments[2:]
        method, params = _action(*arguments)
    except (LookupError, TypeError, ValueError):
        sys.stderr.write(__doc__)
        return EXIT_USAGE
    try:
        with kind(address, timeout) as host:
            if method == "run":
                return run(host, arguments[2:])
            getattr(host, method)(*params)
    except HostError as error:
        sys.stderr.write(f"guest.py: {error}\n")
        return EXIT_REFUSED if isinstance(error, Refused) else EXIT_UNREACHABLE
    return 0


def _action(name: str, *rest: str) -> tuple[str, list[str | int]]:
    """What to call and with what; an error of the arguments' number or type if that cannot be told."""
    if name == "run" and rest[0] == "--" and rest[1:]:
        return "run", []
    if name in ("started", "ready") and not rest:
        return f"notify_payload_{name}", []
    if name == "finished":
        (code,) = rest
        return "notify_payload_finished", [int(code)]
    if name == "error":
        code, text = rest
        return "notify_error", [int(code), text]
    raise ValueError(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
