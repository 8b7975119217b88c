"""crosvm itself, where there is one: that it takes our command lines, and is as the stand-in has it.

No guest has to come up for that; where KVM can be opened at all, the control socket is asked.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from vmactor.config import DiskImage, Partition, RawConfig
from vmactor.host import Crosvm, probe
from vmactor.images.partition import initialize_writable_partition
from vmactor.messages import CpuTopology, DeathReason
from vmactor.vhost_device_vsock import VhostDeviceVsock
from vmactor.vmm import crosvm
from vmactor.vmm.crosvm_vmm import CrosvmVmm
from vmactor.vmm.driver import Channels, KernelVsock, Launch, VhostUserVsock

ARCH = os.uname().machine


@pytest.fixture
def build() -> Crosvm:
    found = probe().crosvm
    if not found.usable:
        pytest.skip(f"no crosvm to ask: {found.found}")
    return found


@pytest.fixture
def launch(short_dir: Path) -> Iterator[Launch]:
    """A launch with everything in it, but for a kernel that is one."""
    with ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        (short_dir / "image").write_bytes(b"\0" * 4096)
        image = stack.enter_context((short_dir / "image").open("r+b"))
        vsock, backend = socket.socketpair()
        stack.enter_context(vsock)
        backend.close()  # crosvm would wait for one that says nothing
        config = RawConfig(
            name="vm",
            kernel=image,
            initrd=image,
            params="-a=b console=hvc0",
            disks=[DiskImage(image), DiskImage(image, writable=True)],
            memory_mib=128,
            cpu_topology=CpuTopology.MATCH_HOST,
        )
        stderr = stack.enter_context((short_dir / "stderr").open("wb", buffering=0)).fileno()
        channels = Channels(null, null, null, null, stderr)
        yield Launch("vm", 2048, config, VhostUserVsock(vsock.fileno()), channels, short_dir)


async def status(vmm: CrosvmVmm) -> int | None:
    try:
        with anyio.fail_after(30):
            return (await vmm.wait()).status.code
    finally:
        await vmm.aclose()


@pytest.mark.parametrize("kind", ["kernel vsock", "helper", "protected", "bootloader"])
@pytest.mark.anyio
async def test_it_understands_our_command_lines(build: Crosvm, launch: Launch, kind: str) -> None:
    config = launch.config
    if kind == "kernel vsock":
        launch = replace(launch, vsock=KernelVsock(launch.vsock.fd))
    if kind == "protected":
        config = replace(config, protected_vm=True)
    if kind == "bootloader":
        config = replace(config, kernel=None, initrd=None, bootloader=config.kernel)
    code = await status(crosvm.start(build, ARCH, 2, replace(launch, config=config)))
    said = (launch.directory / "stderr").read_text()
    assert code == 1, said  # what is no kernel cannot be run; 35 would be an argument
    assert "arg parsing" not in said


@pytest.mark.anyio
async def test_an_option_that_a_build_has_not_ends_it_with_35(build: Crosvm, launch: Launch) -> None:
    other = replace(build, options=build.options - {"vsock", "vhost-user"} | {"cid", "vhost-vsock-fd"})
    wrong = replace(other, options=other.options - {"block"})
    line = crosvm.command_line(wrong, ARCH, 2, replace(launch, vsock=KernelVsock(launch.vsock.fd)), 3)
    process = await anyio.run_process([*line, "--no-such-option"], check=False)
    assert process.returncode == 35
    assert b"no-such-option" in process.stderr


K = "KERNEL"
LINES = [
    *(["--nope", K], [K, K], [], ["-h"], ["--mem"], ["--params", "-x=1", K], ["--no-usb", "--no-usb", K]),
    *(["--mem", "x", K], ["--mem", "0x80", K], ["--mem", "1", "--mem", "1", K], ["--bios", K, K]),
    *(["--block", "path=/a,ro=maybe", K], ["--block", "path=/a,no=1", K], ["--block", "ro=true", K]),
    *(["--block", "", K], ["--serial=type=wrong,num=1", K], ["--serial", "type=file,num=1", K]),
    *(["--serial", "type=sink,num=5", K], ["--serial", "type=sink,num=1", "--serial", "type=sink,num=1", K]),
    *(["--cid", "5", "--vsock", "6", K], ["--vsock", "cid=x", K], ["--vhost-vsock-fd", "x", K]),
    *(["--vhost-user", "type=bogus,socket=/x", K], ["--no-balloon", "--balloon-page-reporting", K]),
    *(["--cfg", "x", K], ["--cpus", "0", K], ["--vhost-user", "type=vsock", K], ["--name", "a", K]),
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_the_stand_in_takes_and_refuses_what_crosvm_does(build: Crosvm, line: list[str]) -> None:
    standin = [sys.executable, "-I", str(Path(__file__).with_name("crosvm_standin.py")), "2026"]
    with tempfile.TemporaryFile() as kernel:
        kernel.write(b'{"exit": 1}')
        kernel.flush()
        words = [f"/proc/self/fd/{kernel.fileno()}" if word == K else word for word in line]
        codes = [
            subprocess.run(
                [*program, "--extended-status", "run", "--disable-sandbox", *words],
                check=False,
                capture_output=True,
                pass_fds=[kernel.fileno()],
                timeout=30,
            ).returncode
            for program in ([str(build.path)], standin)
        ]
    assert codes[0] == codes[1]


def disks(build: Crosvm, launch: Launch, stack: ExitStack) -> list[DiskImage]:
    """A disk of every kind that the build reads; crosvm opens them all before it runs."""
    raw = stack.enter_context((launch.directory / "raw").open("w+b"))
    raw.truncate(1 << 20)
    found = [DiskImage(raw, True), DiskImage(raw)]
    if "create_qcow2" in build.commands:
        image = stack.enter_context((launch.directory / "qcow2").open("w+b"))
        initialize_writable_partition(image.fileno(), 8 << 20)
        found.append(DiskImage(image, True, format="qcow2"))
        if "create_composite" in build.commands:
            parts = [Partition("raw", raw, True), Partition("qcow2", image, True, format="qcow2")]
            found.append(DiskImage(writable=True, partitions=parts))
    return found


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm here")
@pytest.mark.anyio
async def test_it_runs_answers_and_ends_as_the_driver_expects(
    build: Crosvm, launch: Launch, guest_dir: Path
) -> None:
    path = probe().vhost_device_vsock.path
    assert path is not None
    helper = VhostDeviceVsock.spawn(path, 2048, launch.directory)
    with ExitStack() as stack:
        try:
            vsock = await helper.connect()
            stack.callback(os.close, vsock)
            kernel = stack.enter_context((guest_dir / "vmlinux").open("rb"))
            config = RawConfig(name="vm", kernel=kernel, memory_mib=128, disks=disks(build, launch, stack))
            crosvm.validate(build, config)
            vmm = crosvm.start(build, ARCH, 1, replace(launch, config=config, vsock=VhostUserVsock(vsock)))
            try:
                await vmm.wait_running()
                assert await vmm.balloon_stats() is None  # so early, no driver is active
                if ARCH == "x86_64":
                    await vmm.request_shutdown()
                await vmm.request_exit()
                with anyio.move_on_after(10):  # a KVM may not let go of a virtual CPU
                    assert (await vmm.wait()).reason is DeathReason.SHUTDOWN
            finally:
                await vmm.aclose()
        finally:
            await helper.aclose()
