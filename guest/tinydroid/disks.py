"""The guest's disks: partitions by label, the payload's metadata, the instance image, the encrypted store."""

import fcntl
import json
import os
import struct
import time
from _sha512 import sha512
from typing import Any, Final, NamedTuple

from failures import BadConfig, Failure

WAIT_SECONDS: Final = 10.0
SECTOR: Final = 512
MAX_METADATA: Final = 1 << 20
INSTANCE_MAGIC: Final = b"Android-VM-instance"
STORE_MAGIC: Final = b"UNFORMATTED-STORAGE"
OWN_PARTITION: Final = bytes.fromhex("6a0f1f6e3c5d4b7c9d2e7a1b5f804c21")
"""The UUID of this guest's partition in an instance image; Microdroid's is another, and sealed."""
MAX_EXTRA_APKS: Final = 60
MAX_RECORD: Final = 64 << 10


def find(label: str, *, wait: bool = False) -> str | None:
    """The block device of a GPT partition, which may need a moment to be there."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        for name in os.listdir("/sys/class/block"):
            with open(f"/sys/class/block/{name}/uevent") as uevent:
                words = dict(line.rstrip().split("=", 1) for line in uevent if "=" in line)
            if words.get("PARTNAME") == label:
                return f"/dev/{words['DEVNAME']}"
        if not wait or time.monotonic() > deadline:
            return None
        time.sleep(0.05)


class Device:
    """An open block device, or a file of a test."""

    def __init__(self, path: str, *, writable: bool = False) -> None:
        self.path = path
        self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            Failure: There are not so many.
        """
        data = b""
        while len(data) < size and (piece := os.pread(self._fd, size - len(data), offset + len(data))):
            data += piece
        if len(data) < size:
            raise Failure(f"{self.path} ends too early")
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write, and wait until it is on the disk."""
        while data:
            written = os.pwrite(self._fd, data, offset)
            offset, data = offset + written, data[written:]
        os.fsync(self._fd)


# -- Metadata -----------------------------------------------------------------------------------------


class Metadata(NamedTuple):
    """What the host says of the payload.

    Attributes:
        apexes: Name, partition, time of the last update and whether it is a factory's, as JSON has them.
        apk: The labels of the APK's partition and its idsig's.
        config_path: Where the configuration is, if there is one.
        binary_name: What to run, if there is none.
        extra_apks: How many there are beside a binary name.
    """

    apexes: list[list[Any]]
    apk: tuple[str, str]
    config_path: str | None
    binary_name: str | None
    extra_apks: int


def read_metadata(device: Device) -> Metadata:
    """Read the metadata partition: a length, then protobuf.

    Raises:
        BadConfig: It is no such thing.
    """
    (size,) = struct.unpack(">I", device.read(0, 4))
    if size > min(MAX_METADATA, device.size - 4):
        raise BadConfig(f"the metadata claims {size} bytes")
    try:
        fields = _fields(device.read(4, size))
        apexes = []
        for apex in (dict(_fields(value)) for number, value in fields if number == 2):
            name, partition = apex.get(1, b"").decode(), apex.get(2, b"").decode()
            apexes.append([name, partition, apex.get(5, 0), bool(apex.get(6, 0))])
        words = dict(fields)
        apk = dict(_fields(words[3]))
        labels = apk[2].decode(), apk[3].decode()
        path = words[4].decode() if 4 in words else None
        payload = dict(_fields(words.get(5, b"")))
        binary = payload.get(1, b"").decode() if 5 in words else None
        extra_apks = min(payload.get(2, 0), MAX_EXTRA_APKS)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadConfig(f"the metadata is damaged: {error!r}") from error
    return Metadata(apexes, labels, path, binary, extra_apks)


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """Numbers and values of a protobuf message: integers and bytes."""
    found: list[tuple[int, Any]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 64:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number has more than 64 bits")

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            found.append((tag >> 3, varint()))
        elif tag & 7 == 2:
            length = varint()
            if length > len(data) - at:
                raise ValueError("a field ends too early")
            found.append((tag >> 3, data[at : at + length]))
            at += length
        else:
            raise ValueError(f"wire type {tag & 7}")
    return found


# -- Instance image -----------------------------------------------------------------------------------


class Instance:
    """The instance image: a header, then partitions, of which one is this guest's.

    Its content is a JSON object. It is not sealed: this guest has no secret that the host does not know.

    Raises:
        Failure: It is no instance image.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        header = device.read(0, SECTOR)
        if header[:19] != INSTANCE_MAGIC or header[19:21] != b"\1\0":
            raise Failure("the instance image has not the mark of one, or not version 1")
        self._at = SECTOR
        while self._at + SECTOR <= device.size:
            header = device.read(self._at, SECTOR)
            uuid, (self._size,) = header[:16], struct.unpack("<Q", header[16:24])
            if uuid in {bytes(16), OWN_PARTITION}:
                self._exists = uuid == OWN_PARTITION
                return
            self._at += SECTOR + -(-self._size // SECTOR) * SECTOR
        raise Failure("the instance image is full")

    def load(self) -> dict[str, Any] | None:
        """What was stored, or None on the first boot.

        Raises:
            Failure: It cannot be read.
        """
        if not self._exists:
            return None
        if self._size > MAX_RECORD:
            raise Failure("the record in the instance image is too large")
        try:
            record: dict[str, Any] = json.loads(self._device.read(self._at + SECTOR, self._size))
            bytes.fromhex(record["secret"])
        except (ValueError, TypeError, KeyError) as error:
            raise Failure(f"the record in the instance image is damaged: {error}") from error
        return record

    def store(self, record: dict[str, Any]) -> None:
        """Store what is to be found by the next boot; the header comes last, and makes it valid."""
        data = json.dumps(record).encode()
        self._device.write(self._at + SECTOR, data + bytes(-len(data) % SECTOR))
        header = OWN_PARTITION + struct.pack("<Q", len(data))
        self._device.write(self._at, header + bytes(SECTOR - len(header)))
        self._size, self._exists = len(data), True


# -- Encrypted store ----------------------------------------------------------------------------------

_DM_HEADER: Final = struct.Struct("<3I I I I i I I I Q 128s 129s 7x")
_DM_NAME: Final = b"encryptedstore"
_DM_CREATE, _DM_SUSPEND, _DM_LOAD = 3, 6, 9


def open_store(path: str, secret: bytes) -> tuple[str, bool]:
    """Put dm-crypt over the store, with a key of the instance.

    Returns:
        The device to mount, and whether it has to be formatted first.
    """
    device = Device(path, writable=True)
    new = device.read(0, len(STORE_MAGIC)) == STORE_MAGIC
    key = sha512(b"encryptedstore" + secret).hexdigest()
    _device_mapper(_DM_CREATE)
    words = f"aes-xts-plain64 {key} 0 {path} 0".encode()
    words += bytes(8 - len(words) % 8)
    target = struct.pack("<QQiI16s", 0, device.size // SECTOR, 0, 0, b"crypt") + words
    _device_mapper(_DM_LOAD, target, targets=1)
    _device_mapper(_DM_SUSPEND)  # without its flag, this resumes: the table takes effect
    if new:
        device.write(0, bytes(len(STORE_MAGIC)))
    return "/dev/dm-0", new


def _device_mapper(command: int, target: bytes = b"", targets: int = 0) -> None:
    size = _DM_HEADER.size + len(target)
    header = _DM_HEADER.pack(4, 0, 0, size, _DM_HEADER.size, targets, 0, 0, 0, 0, 0, _DM_NAME, b"")
    number = 3 << 30 | _DM_HEADER.size << 16 | 0xFD << 8 | command
    control = os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, number, bytearray(header + target))
    except OSError as error:
        raise Failure(f"The device mapper refuses command {command}: {error.strerror}") from error
    finally:
        os.close(control)
