"""The guests' build: archive, kernel and modules, from made-up input; the agent as an ordinary program."""

import gzip
import lzma
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tools.build_guest import Archive, BuildError, elf_kernel, module_order

ELF = b"\x7fELF" + bytes(range(256)) * 40


def entries(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Mode, content and device numbers of a newc archive's entries, read as the kernel does, in order."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        _, mode, _, _, _, _, size, _, _, major, minor, name_size, _ = numbers
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[start : start + size], (major, minor))
        at = (start + size + 3) & ~3


def bzimage(payload: bytes) -> bytes:
    """The parts of a bzImage that say where its payload is: 64 bytes after two set-up sectors."""
    image = bytearray(3 * 512 + 64)
    image[0x1F1] = 2
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 64, len(payload))
    return bytes(image) + payload + b"what follows is not part of it"


def test_an_archive_holds_what_was_added_with_parents_before_children() -> None:
    archive = Archive()
    archive.console()
    archive.file("a/b/c.txt", b"12345", 0o600)
    archive.file("a/b/c.txt", b"a second file of that name is left out")
    archive.file("a/empty", b"")
    found = entries(archive.to_bytes())
    assert list(found) == ["dev", "dev/console", "a", "a/b", "a/b/c.txt", "a/empty"]
    assert found["a/b/c.txt"] == (stat.S_IFREG | 0o600, b"12345", (0, 0))
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert stat.S_ISDIR(found["a/b"][0])


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(gzip.compress(ELF), id="gzip"),
        pytest.param(lzma.compress(ELF) + struct.pack("<I", len(ELF)), id="xz"),
    ],
)
def test_the_elf_kernel_is_taken_out_of_a_bzimage(payload: bytes) -> None:
    assert elf_kernel(bzimage(payload)) == ELF


def test_what_is_not_a_kernel_is_refused() -> None:
    with pytest.raises(BuildError, match="not an x86 bzImage"):
        elf_kernel(bytes(4096))
    with pytest.raises(BuildError, match=r"unknown compression.*6a756e6b"):
        elf_kernel(bzimage(b"junk" * 10))
    with pytest.raises(BuildError, match="not an ELF"):
        elf_kernel(bzimage(gzip.compress(b"text")))


def test_modules_come_after_all_that_they_depend_on(tmp_path: Path) -> None:
    needs = {
        "ring": "",
        "bus": "ring",
        "pci_dev": "",
        "pci": "ring,bus,pci_dev",
        "panic-pci": "",
        "unused": "ring",
    }
    for name, depends in needs.items():
        (tmp_path / f"{name}.ko").write_bytes(
            b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
        )
    order = [path.stem for path in module_order(tmp_path, ["pci", "panic_pci", "bus"])]
    assert order == ["ring", "bus", "pci_dev", "pci", "panic-pci"]
    with pytest.raises(BuildError, match="no module absent"):
        module_order(tmp_path, ["absent"])


@pytest.fixture
def agent(guest_dir: Path, tmp_path: Path) -> Path:
    """The agent out of the built guest, as a program of this machine."""
    path = tmp_path / "agent"
    path.write_bytes(entries((guest_dir / "initrd.cpio").read_bytes())["init"][1])
    path.chmod(0o755)
    return path


def test_the_agent_takes_its_steps_in_turn_and_goes_on_after_a_failure(agent: Path, tmp_path: Path) -> None:
    note = tmp_path / "note"
    script = f"echo one  two; nonsense;write {note} a b;read {note};exec {agent} print;raw 0g;print end"
    done = subprocess.run([agent, script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines() == [
        "vmactor-agent: echo: ok one  two",
        "vmactor-agent: nonsense: error unknown step nonsense",
        "vmactor-agent: read: ok a b",
        "",
        "vmactor-agent: exec: ok 0",
        "vmactor-agent: raw: error raw takes an even number of hexadecimal digits",
        "end",
    ]


@pytest.mark.parametrize("step", ["poweroff", "reboot", "panic", "watchdog"])
def test_the_agent_never_stops_a_machine_that_it_did_not_start(agent: Path, step: str) -> None:
    done = subprocess.run([agent, step], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"vmactor-agent: {step}: error only the guest's first process stops the machine\n"
