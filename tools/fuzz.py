#!/usr/bin/env python3
"""Fuzz what reads files and messages of strangers, guided by coverage (atheris, on libFuzzer).

    python -m tools.fuzz SECONDS [TARGET...]

Each target gets that many seconds, in a process of its own, with a corpus in ``build/fuzz/TARGET`` that grows
from run to run. Anything but a typed error is a finding, and so is an input that takes 10 s or 512 MiB: its
bytes are kept beside the corpus, and the status is 1. A finding becomes a test before it is mended.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / "build" / "fuzz"
INSTRUMENTED: Final = ["vmactor.binder", "vmactor.images", "vmactor.microdroid", "vmactor.strict_json"]
"""Packages whose branches count as coverage."""
SECONDS: Final = 60
MAX_BYTES: Final = 1 << 16
MAX_ERROR: Final = 2000


class Target(NamedTuple):
    """A parser to be fuzzed.

    Attributes:
        make: Imports what is needed, so that it is instrumented, and returns what takes the input. That may
            raise ``VmactorError``.
        seeds: Inputs to begin with.
    """

    make: Callable[[], Callable[[bytes], None]]
    seeds: Callable[[], list[bytes]]


def through_a_file(parse: Callable[[int], object]) -> Callable[[bytes], None]:
    """Turn a parser of descriptors into one of bytes; one file in memory is used for all inputs."""
    fd = os.memfd_create("fuzz")

    def run(data: bytes) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        parse(fd)

    return run


# -- Targets -----------------------------------------------------------------------------------------


def _qcow2() -> Callable[[bytes], None]:
    from vmactor.images import qcow2  # noqa: PLC0415

    read = through_a_file(qcow2.read)
    return lambda data: read(qcow2.MAGIC + data[4:])


def _qcow2_seeds() -> list[bytes]:
    from tests.images import extension, qcow2_header  # noqa: PLC0415
    from vmactor.images.qcow2 import new_image  # noqa: PLC0415

    small = {"cluster_bits": 9, "l1_offset": 512, "refcounts_offset": 1024, "size": 1 << 15}
    names = extension(0x44415441, b"data") + extension(0xE2792ACA, b"raw")
    made = bytearray(MAX_BYTES)
    for offset, data in new_image(10 << 20).pieces:
        made[offset : offset + len(data)] = data[: max(0, MAX_BYTES - offset)]
    return [
        qcow2_header(**small)[:2048],
        qcow2_header(names, **small, backing_offset=200, backing_length=4)[:2048],
        qcow2_header(**small, snapshots=1, snapshots_offset=1536)[:4096],
        bytes(made[:MAX_BYTES]),
    ]


def _sparse() -> Callable[[bytes], None]:
    from vmactor.images import android_sparse  # noqa: PLC0415

    read = through_a_file(android_sparse.virtual_size)
    return lambda data: read(android_sparse.MAGIC + data[4:])


def _sparse_seeds() -> list[bytes]:
    import struct  # noqa: PLC0415

    chunks = [(0xCAC1, 1, bytes(16)), (0xCAC2, 2, b"abcd"), (0xCAC3, 1, b""), (0xCAC4, 0, b"1234")]
    body = b"".join(
        struct.pack("<HHII", kind, 0, blocks, 12 + len(data)) + data for kind, blocks, data in chunks
    )
    return [struct.pack("<IHHHHIIII", 0xED26FF3A, 1, 0, 28, 12, 16, 4, len(chunks), 0) + body]


def _kinds() -> Callable[[bytes], None]:
    from vmactor.config import DiskImage, RawConfig  # noqa: PLC0415
    from vmactor.images.disks import lock_formats  # noqa: PLC0415
    from vmactor.images.kinds import inspect  # noqa: PLC0415

    def both(fd: int) -> None:
        config = RawConfig(name="vm", kernel=fd, disks=[DiskImage(fd)])
        assert lock_formats(config).disks[0].format == inspect(fd).kind

    return through_a_file(both)


def _kinds_seeds() -> list[bytes]:
    return [
        *_qcow2_seeds(),
        *_sparse_seeds(),
        b"composite_disk\x1d",
        b"\x28\xb5\x2f\xfd",
        b"\x5a\x2a\x4d\x18",
    ]


def _apk() -> Callable[[bytes], None]:
    from vmactor.images.apk_verify import verify_apk  # noqa: PLC0415
    from vmactor.images.idsig import create_or_update_idsig_file  # noqa: PLC0415

    idsig = os.memfd_create("idsig")

    def both(fd: int) -> None:
        create_or_update_idsig_file(fd, idsig)
        verify_apk(fd, idsig)

    return through_a_file(both)


def _apk_seeds() -> list[bytes]:
    import tempfile  # noqa: PLC0415

    from tests.apks import KEY, apk_with, signed_data, signer, unsigned, with_block  # noqa: PLC0415
    from vmactor.images.apk import V3_BLOCK_ID  # noqa: PLC0415

    data = signed_data([(0x0421, b"digest"), (0x0201, b"other")], certificates=[b"certificate"])
    value = signer(data, [(0x0421, b"signature"), (0x0201, b"none")], public_key=KEY)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name, "apk")
        paths = (
            apk_with(place.with_suffix(".1"), b"content"),
            unsigned(place.with_suffix(".2"), b"content", comment=b"comment"),
            with_block(unsigned(place.with_suffix(".3"), b"a", b"b"), (7, b"seven"), (V3_BLOCK_ID, value)),
        )
        return [path.read_bytes() for path in paths]


def _apk_v3() -> Callable[[bytes], None]:
    from vmactor.images.apk_v3 import find_signer  # noqa: PLC0415

    def parse(data: bytes) -> None:
        signer = find_signer(data)
        signer.signed_data.digest_for(signer.strongest()[0])

    return parse


def _apk_v3_seeds() -> list[bytes]:
    from tests.apks import KEY, signed_data, signer, v3_block  # noqa: PLC0415

    one = signer(signed_data([(0x0201, bytes(32))]), [(0x0201, b"none")], public_key=KEY)
    data = signed_data([(0x0104, b"digest")], certificates=[b"certificate", b"another"])
    two = signer(data, [(0x0301, b"dsa"), (0x0104, b"signature")], public_key=KEY, sdks=(24, 31))
    return [v3_block(one), v3_block(two, one)]


def _idsig() -> Callable[[bytes], None]:
    from vmactor.images.idsig import read_idsig  # noqa: PLC0415

    return through_a_file(read_idsig)


def _idsig_seeds() -> list[bytes]:
    from vmactor.images.idsig import Idsig  # noqa: PLC0415

    plain = Idsig(b"r" * 32, b"d" * 32, 0x0201, 4)
    signed = Idsig(b"r" * 32, b"d" * 64, 0x0104, 0, b"salt", b"certificate", b"data", b"key", b"signature")
    return [plain.header() + b"tree", signed.header()]


def _composite() -> Callable[[bytes], None]:
    from vmactor.images.composite import MAGIC, read_specification, write_specification  # noqa: PLC0415

    def run(data: bytes) -> None:
        specification = read_specification(MAGIC + data)
        assert sum(specification.lengths()) == specification.size
        assert read_specification(write_specification(specification)) == specification

    return run


def _composite_seeds() -> list[bytes]:
    from vmactor.images.composite import MAGIC, Extent, Specification, write_specification  # noqa: PLC0415

    extents = (Extent("/t/h", 0), Extent("/t/p", 20480, writable=True), Extent("f", 28672, file_offset=512))
    return [write_specification(Specification(extents, 49152))[len(MAGIC) :], b"\x08\x02\x18\x01"]


def _gpt() -> Callable[[bytes], None]:
    import zlib  # noqa: PLC0415

    from vmactor.images import gpt  # noqa: PLC0415

    def run(data: bytes) -> None:
        # With the checksums that a hostile writer would compute; else nothing behind them were ever reached.
        disk = bytearray(data.ljust(2048, b"\0"))
        disk[512:520] = b"EFI PART"
        start, number, size = (int.from_bytes(disk[at : at + 4], "little") for at in (584, 592, 596))
        entries = disk[start * 512 : start * 512 + number * size]
        disk[600:604] = zlib.crc32(entries).to_bytes(4, "little")
        disk[528:532] = bytes(4)
        header = disk[512 : 512 + int.from_bytes(disk[524:528], "little")]
        disk[528:532] = zlib.crc32(header).to_bytes(4, "little")
        table = gpt.read(lambda offset, size: bytes(disk[offset : offset + size]))
        assert table is not None
        assert all(entry.size > 0 for entry in table.entries)

    return run


def _gpt_seeds() -> list[bytes]:
    from vmactor.images.composite import Part, plan  # noqa: PLC0415

    return [plan([Part(f"part-{number}", 4096) for number in range(count)]).header for count in (1, 128)]


def _apk_entry() -> Callable[[bytes], None]:
    from vmactor.images.apk_entry import read_entry  # noqa: PLC0415
    from vmactor.microdroid.payload_config import parse_payload_config  # noqa: PLC0415

    def parse(fd: int) -> None:
        data = read_entry(fd, "a", 4096)
        assert len(data) <= 4096
        parse_payload_config(data)

    return through_a_file(parse)


def _apk_entry_seeds() -> list[bytes]:
    import io  # noqa: PLC0415
    import zipfile  # noqa: PLC0415

    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("b", b"other")
            archive.writestr("a", _payload_config_seeds()[0])
        seeds.append(file.getvalue())
    return seeds


def _payload_config() -> Callable[[bytes], None]:
    from vmactor.microdroid.payload_config import parse_payload_config  # noqa: PLC0415

    def parse(data: bytes) -> None:
        parse_payload_config(data)

    return parse


def _payload_config_seeds() -> list[bytes]:
    return [
        b'{"version":1,"os":{"name":"microdroid"},"task":{"type":"executable","command":"/apex/x"},"apexes":'
        b'[{"name":"{CLASSPATH}"}],"extra_apks":[{"path":"/a"}],"prefer_staged":true,"enable_authfs":false,'
        b'"export_tombstones":null}',
        b'{"task": null, "x": [[1e9, -7, "\\ud800"]]}',
    ]


def _apex_list() -> Callable[[bytes], None]:
    from vmactor.microdroid.apexes import parse_apex_info_list, select_apexes  # noqa: PLC0415

    def parse(data: bytes) -> None:
        select_apexes(parse_apex_info_list(data), ["{CLASSPATH}"], debuggable=True)

    return parse


def _apex_list_seeds() -> list[bytes]:
    from tests.app_files import apex_entry, apex_list  # noqa: PLC0415

    return [
        apex_list(apex_entry("a"), apex_entry("com.android.adbd", versionCode=9)),
        apex_list("<apex-info><moduleName>b</moduleName><isActive>1</isActive></apex-info>"),
        b'<!DOCTYPE l [<!ENTITY a "b">]><l>&a;</l>',
    ]


def _binder() -> Callable[[bytes], None]:
    from vmactor.actors.guest_binder import INTERFACES  # noqa: PLC0415
    from vmactor.binder import server, wire  # noqa: PLC0415

    ping = wire.Transaction(wire.ROOT, server.BuiltIn.PING)
    root = wire.Transaction(wire.NO_ADDRESS, wire.Special.GET_ROOT)
    header = wire.ConnectionHeader(1, incoming=False, fd_mode=0, session_id=None)

    def begin(sessions: server.Sessions, first: wire.ConnectionHeader) -> server.Session | None:
        session = sessions.accept(first).session
        if session is not None and first is header:
            session.receive(root)
        return session

    def talk(session: server.Session, data: bytes) -> None:
        decoder = wire.MessageDecoder(session.version)
        for at in range(0, len(data), 1 + data[0] * 8):
            decoder.feed(data[at : at + 1 + data[0] * 8])
            while (message := decoder.next()) is not None:
                outcome = session.receive(message)
                while isinstance(outcome, server.Call):
                    assert len(outcome.arguments) == len(outcome.method.parameters)
                    session.finish(outcome, None)
                    outcome = session.next_held() if outcome.transaction.oneway else None
                assert len(session._held) <= session.limits.held_calls  # noqa: SLF001
                assert session._held_bytes <= session.limits.held_bytes  # noqa: SLF001

    def run(data: bytes) -> None:
        if not data:
            return
        limits = server.Limits(version=data[0] & 1, max_threads=2)
        sessions = server.Sessions(INTERFACES["explicit-codes" if data[0] & 2 else "android13"], limits)
        other = begin(sessions, header)
        assert other is not None
        session = None
        try:
            if data[0] & 4:
                handshake = wire.HandshakeDecoder()
                handshake.feed(data[1:])
                first = handshake.next()
                if isinstance(first, wire.ConnectionHeader):
                    session = begin(sessions, first)
                    handshake.next()
                data = data[:1] + handshake.rest()
            else:
                session = begin(sessions, header)
            if session is not None and len(data) > 1:
                talk(session, data[1:])
        except (wire.ProtocolError, server.SessionEnded):
            pass
        if session is not None:
            sessions.leave(session)
        answer = other.receive(ping)  # another guest, which works undisturbed
        assert answer == wire.DecStrong(wire.ROOT, 1).encode() + wire.Reply(0).encode(other.version)

    return run


def _binder_seeds() -> list[bytes]:
    from vmactor.actors.guest_binder import DESCRIPTOR  # noqa: PLC0415
    from vmactor.binder.parcel import Parcel  # noqa: PLC0415
    from vmactor.binder.wire import (  # noqa: PLC0415
        CONNECTION_INIT,
        FLAG_ONEWAY,
        NO_ADDRESS,
        ROOT,
        ConnectionHeader,
        DecStrong,
        Transaction,
    )

    token = Parcel().string(DESCRIPTOR).to_bytes()
    error = token + Parcel().int32(2).string("text \U0001f600").to_bytes()
    calls = [Transaction(NO_ADDRESS, code) for code in range(4)]
    calls += [Transaction(ROOT, 1, parcel=token), Transaction(ROOT, 4, parcel=error)]
    calls += [Transaction(ROOT, 2, FLAG_ONEWAY, number, token) for number in (1, 0)]
    calls += [Transaction(ROOT, int.from_bytes(name, "big")) for name in (b"_NTF", b"_EXT", b"_PID")]
    stream = b"".join(call.encode() for call in calls) + DecStrong(ROOT, 1).encode()
    first = ConnectionHeader(1, incoming=False, fd_mode=0, session_id=None).encode() + CONNECTION_INIT
    return [b"\x00\xff" + stream, b"\x03\x01" + stream, b"\x05" + first + stream]


TARGETS: Final[Mapping[str, Target]] = {
    "qcow2": Target(_qcow2, _qcow2_seeds),
    "android-sparse": Target(_sparse, _sparse_seeds),
    "kinds": Target(_kinds, _kinds_seeds),
    "apk": Target(_apk, _apk_seeds),
    "apk-v3": Target(_apk_v3, _apk_v3_seeds),
    "idsig": Target(_idsig, _idsig_seeds),
    "composite": Target(_composite, _composite_seeds),
    "gpt": Target(_gpt, _gpt_seeds),
    "apk-entry": Target(_apk_entry, _apk_entry_seeds),
    "payload-config": Target(_payload_config, _payload_config_seeds),
    "apex-list": Target(_apex_list, _apex_list_seeds),
    "rpc-binder": Target(_binder, _binder_seeds),
}


# -- Running -----------------------------------------------------------------------------------------


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris  # noqa: PLC0415

    with atheris.instrument_imports(include=INSTRUMENTED):
        parse = TARGETS[name].make()
    from vmactor.errors import VmactorError  # noqa: PLC0415

    def once(data: bytes) -> None:
        try:
            parse(data)
        except VmactorError as error:
            if len(str(error)) > MAX_ERROR:
                raise ValueError("an error longer than anybody reads") from error

    corpus = BUILD / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "max_len": MAX_BYTES,
        "timeout": 10,
        "rss_limit_mb": 512,
        "artifact_prefix": f"{BUILD / name}/",
        "print_final_stats": 1,
        "verbosity": 0,
    }
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)], once)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the targets one after the other."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--one"]:
        fuzz(arguments[1], int(arguments[2]))
    seconds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else SECONDS
    if unknown := set(arguments) - set(TARGETS):
        sys.exit(f"fuzz: no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    failed = []
    for name in arguments or TARGETS:
        print(f"fuzz: {name}, {seconds} s", flush=True)
        command = [sys.executable, "-m", "tools.fuzz", "--one", name, str(seconds)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"fuzz: findings in {', '.join(failed)}; see above and {BUILD.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
