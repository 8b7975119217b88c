"""Taps, bridges, NAT and rate limits on a real kernel, with real guests, in a network namespace."""

import errno
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.guests import agent, until
from vmactor import (
    DeathReason,
    Died,
    IllegalArgumentError,
    IllegalStateError,
    NetworkInterface,
    NetworkMode,
    NetworkPolicy,
    UnsupportedOperationError,
    VirtualizationService,
    VirtualMachine,
    VmactorError,
    load_config,
)
from vmactor.cid import FIRST
from vmactor.ledger import Ledger, read_ledger
from vmactor.net import links
from vmactor.net.networks import Connection, Networks

pytestmark = [pytest.mark.anyio, pytest.mark.netns]

HOST = "10.88.0.1"


def ip(*words: str) -> str:
    """Run iproute2, which knows nothing of us."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def table() -> list[dict[str, Any]]:
    """The link table as iproute2 sees it."""
    found: list[dict[str, Any]] = json.loads(ip("-json", "-details", "link"))
    return found


def names() -> set[str]:
    return {link["ifname"] for link in table()}


@pytest.fixture(autouse=True)
def links_unchanged() -> Iterator[None]:
    """No test may change which interfaces there are."""
    ip("link", "set", "lo", "up")
    before = names()
    yield
    assert names() == before


def connection(networks: Networks, *interfaces: NetworkInterface, cid: int = FIRST) -> Connection:
    planned = networks.plan(interfaces or (NetworkInterface(),), cid)
    return Connection(networks, cid, tuple(link.name for link in planned), planned)


@contextmanager
def closing(fds: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


# -- Without guests --------------------------------------------------------------------------------


async def test_200_taps_come_and_go_and_the_link_table_is_as_before(tmp_path: Path) -> None:
    networks = Networks(NetworkPolicy(), tmp_path)
    before = table()
    for number in range(200):
        one = connection(networks, cid=FIRST + number)
        with closing(await one.attach()):
            assert set(one.names) | {"vmactor0"} <= names()
        await one.detach()
    assert table() == before


async def test_a_tap_is_what_was_asked_for(tmp_path: Path) -> None:
    networks = Networks(NetworkPolicy(), tmp_path)
    asked = NetworkInterface(name="mine", mtu=1280, isolated=True, to_guest_kbit=8000)
    one = connection(networks, asked)
    with closing(await one.attach()):
        (tap,) = (link for link in table() if link["ifname"] == "mine")
        assert (tap["mtu"], tap["master"]) == (1280, "vmactor0")
        assert tap["linkinfo"]["info_data"]["vnet_hdr"]
        assert not tap["linkinfo"]["info_data"]["persist"]
        assert tap["linkinfo"]["info_slave_data"]["isolated"]
        shaped = subprocess.run(
            ["tc", "qdisc", "show", "dev", "mine"], capture_output=True, text=True, check=True
        )
        assert "tbf" in shaped.stdout
        assert "rate 8Mbit" in shaped.stdout
    await one.detach()


async def test_the_ledger_names_a_tap_before_it_exists(tmp_path: Path) -> None:
    networks = Networks(NetworkPolicy(), tmp_path)
    planned = networks.plan((NetworkInterface(), NetworkInterface(name="lo", address="10.88.0.9/16")), FIRST)
    ledger = Ledger.create(tmp_path, FIRST)
    expected = tuple(link.name for link in planned)
    with pytest.raises(IllegalStateError, match="cannot make the tap lo: there is an interface of that name"):
        await Connection(networks, FIRST, expected, planned, ledger).attach()
    assert read_ledger(tmp_path, FIRST).links == expected


async def test_what_vmactor_did_not_make_is_never_touched(tmp_path: Path) -> None:
    networks = Networks(NetworkPolicy(), tmp_path)
    ip("link", "add", "vmactor0", "type", "bridge")
    ip("tuntap", "add", "theirs", "mode", "tap")
    try:
        before = table()
        with pytest.raises(IllegalStateError, match="which this service did not make"):
            await connection(networks).attach()
        with pytest.raises(IllegalStateError, match="there is an interface of that name"):
            await connection(networks, NetworkInterface(name="theirs")).attach()
        await networks.clear(("theirs", "vmactor0", "lo"))
        assert table() == before
    finally:
        ip("link", "del", "vmactor0")
        ip("link", "del", "theirs")


async def test_a_bridge_of_the_host_gets_a_port_and_stays(tmp_path: Path) -> None:
    networks = Networks(NetworkPolicy(), tmp_path)
    ip("link", "add", "br7", "type", "bridge")
    try:
        one = connection(networks, NetworkInterface(bridge="br7"))
        with closing(await one.attach()):
            (tap,) = (link for link in table() if link["ifname"] == one.names[0])
            assert tap["master"] == "br7"
            assert "vmactor0" not in names()
        await one.detach()
        assert one.names[0] not in names()
        assert "br7" in names()
    finally:
        ip("link", "del", "br7")


async def test_a_bridge_that_is_none_and_a_kernel_without_policing_are_typed_errors(tmp_path: Path) -> None:
    networks = Networks(NetworkPolicy(), tmp_path)
    for asked in (NetworkInterface(bridge="nothing"), NetworkInterface(bridge="lo")):
        with pytest.raises(IllegalArgumentError, match="there is no bridge"):
            await connection(networks, asked).attach()
    limited = connection(networks, NetworkInterface(from_guest_kbit=8000))
    try:
        fds = await limited.attach()
    except UnsupportedOperationError as error:
        assert "police" in str(error)  # noqa: PT017 - some kernels have it
    else:
        with closing(fds):
            pass
    await limited.detach()


async def test_nat_without_forwarding_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    networks = Networks(NetworkPolicy(nat=True), tmp_path)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
    with pytest.raises(UnsupportedOperationError, match="ip_forward"):
        await connection(networks).attach()
    assert (
        "vmactor"
        not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    )


async def test_the_bridge_goes_with_its_last_port_and_what_a_crash_left_of_it_is_swept(
    tmp_path: Path,
) -> None:
    networks = Networks(NetworkPolicy(), tmp_path)
    first, second = connection(networks), connection(networks, cid=FIRST + 1)
    with closing(await first.attach()):
        with closing(await second.attach()):
            pass
        await second.detach()
        assert "vmactor0" in names()
    assert first.names[0] not in names()  # with its last descriptor
    assert "vmactor0" in names()  # nobody told it
    other = Networks(NetworkPolicy(), tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    await other.clear()
    assert "vmactor0" in names()
    assert networks.were_used
    await Networks(NetworkPolicy(), tmp_path).clear()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EPERM, "UNSUPPORTED_OPERATION"),
        (errno.EXFULL, "SERVICE_SPECIFIC"),
        (errno.EBUSY, "SERVICE_SPECIFIC"),
        (errno.EEXIST, "ILLEGAL_STATE"),
        (errno.ENODEV, "ILLEGAL_ARGUMENT"),
        (errno.EIO, "SERVICE_SPECIFIC"),
    ],
)
def test_what_the_kernel_refuses_is_a_typed_error(number: int, kind: str) -> None:
    with pytest.raises(VmactorError, match="to do it: ") as caught, links.telling("to do it"):
        raise OSError(number, os.strerror(number))
    assert caught.value.kind == kind


# -- With guests -----------------------------------------------------------------------------------


async def guest_with(
    service: VirtualizationService,
    guest_dir: Path,
    *network: NetworkInterface,
    script: str = "tcp-echo 7;started;ready;serve",
) -> VirtualMachine:
    with load_config(guest_dir / "vm.json", name="test") as loaded:
        params = f'{loaded.params} vmactor.script="{script}"'
        return await service.create_vm(
            replace(loaded, params=params, network=network or (NetworkInterface(),))
        )


async def booted_with(
    service: VirtualizationService, guest_dir: Path, *network: NetworkInterface
) -> VirtualMachine:
    vm = await guest_with(service, guest_dir, *network)
    with vm.events() as events:
        await vm.start()
        await until(events, "payload_ready")
    return vm


def address_of(vm: VirtualMachine) -> str:
    address = vm.info.network[0].address
    assert address is not None
    return str(ipaddress.IPv4Interface(address).ip)


def echoed(address: str) -> bytes:
    with socket.create_connection((address, 7), timeout=10) as peer:
        peer.sendall(b"hello")
        return peer.recv(5, socket.MSG_WAITALL)


SERVER = """
import socket, sys
server = socket.create_server(("0.0.0.0", 7))
print("listening", flush=True)
while True:
    peer, address = server.accept()
    peer.recv(100)
    peer.sendall(address[0].ljust(9)[:9].encode())
    peer.close()
"""


@contextmanager
def world_outside() -> Iterator[None]:
    """Another network namespace, 192.0.2.2, that tells who dials it; it knows no way back to guests."""
    server = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        server.stdout.readline()
        ip("link", "add", "out0", "type", "veth", "peer", "name", "out1", "netns", str(server.pid))
        ip("addr", "add", "192.0.2.1/24", "dev", "out0")
        ip("link", "set", "out0", "up")
        inside = ["nsenter", "--net", "--target", str(server.pid), "ip"]
        subprocess.run([*inside, "addr", "add", "192.0.2.2/24", "dev", "out1"], check=True)
        subprocess.run([*inside, "link", "set", "out1", "up"], check=True)
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        yield
    finally:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
        subprocess.run(["ip", "link", "del", "out0"], check=False, capture_output=True)
        server.kill()
        server.communicate()


@pytest.mark.guest
@pytest.mark.netns("trio")
async def test_guests_reach_each_other_the_host_and_the_world_but_not_when_isolated(
    short_dir: Path, guest_dir: Path
) -> None:
    isolated = NetworkInterface(isolated=True)
    async with VirtualizationService(
        vmm="qemu", state_directory=short_dir / "state", networks=NetworkPolicy(nat=True)
    ) as service:
        with world_outside():
            one = await booted_with(service, guest_dir, isolated, NetworkInterface(mode=NetworkMode.ROUTED))
            two = await booted_with(service, guest_dir)
            three = await booted_with(service, guest_dir, isolated)
            async with one, two, three:
                assert await anyio.to_thread.run_sync(echoed, address_of(one)) == b"hello"
                routed = str(ipaddress.IPv4Interface(one.info.network[1].address or "").ip)
                assert await anyio.to_thread.run_sync(echoed, routed) == b"hello"
                assert await agent(one, f"tcp {address_of(two)} 7 greetings") == "ok greetings"
                assert await agent(two, f"tcp {address_of(one)} 7 greetings") == "ok greetings"
                assert (await agent(one, f"tcp {address_of(three)} 7 greetings")).startswith("error connect")
                assert await agent(two, "tcp 192.0.2.2 7 who am I?") == "ok 192.0.2.1"
                mac = (await agent(two, "read /sys/class/net/eth0/address")).split("|")[0]
                assert mac == f"ok {two.info.network[0].mac}"
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert "vmactor" not in tables


@pytest.mark.guest
@pytest.mark.netns("asyncio")
async def test_taps_are_gone_after_a_stop_and_after_a_kill_of_the_vmm(
    short_dir: Path, guest_dir: Path
) -> None:
    async with VirtualizationService(vmm="qemu", state_directory=short_dir / "state") as service:
        before = names()
        async with await guest_with(service, guest_dir, script="started;ready;serve") as vm:
            assert names() == before  # a VM that does not run has none
            await vm.start()
            assert {vm.info.network[0].name, "vmactor0"} <= names()
            await vm.stop()
            assert names() == before
        async with await guest_with(service, guest_dir, script="started;ready;serve") as vm:
            await vm.start()
            assert vm.info.pid is not None
            assert {vm.info.network[0].name, "vmactor0"} <= names()
            os.kill(vm.info.pid, signal.SIGKILL)
            died = await vm.wait()
            assert isinstance(died, Died)
            assert died.reason is DeathReason.KILLED
            assert names() == before


@pytest.mark.guest
@pytest.mark.netns("asyncio")
async def test_a_vm_whose_network_is_refused_dies_with_the_cause_and_nothing_is_left(
    short_dir: Path, guest_dir: Path
) -> None:
    async with VirtualizationService(vmm="qemu", state_directory=short_dir / "state") as service:
        with load_config(guest_dir / "vm.json", name="test") as loaded:
            config = replace(
                loaded, network=(NetworkInterface(), NetworkInterface(name="lo", address="10.88.0.9/16"))
            )
            async with await service.create_vm(config) as vm:
                with vm.events() as events, pytest.raises(VmactorError, match="the tap lo"):
                    await vm.start()
                died = [event async for event in events][-1]
                assert isinstance(died, Died)
                assert died.reason is DeathReason.START_FAILED


MANAGER = """
import sys, anyio
from dataclasses import replace
from vmactor import VirtualizationService, load_config
async def main():
    async with VirtualizationService(vmm="qemu", state_directory=sys.argv[1]) as service:
        with load_config(sys.argv[2], name="test") as loaded:
            vm = await service.create_vm(replace(loaded, network=True))
        async with vm:
            await vm.start()
            print(vm.info.network[0].name, flush=True)
            await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.mark.guest
@pytest.mark.netns("asyncio")
async def test_what_a_killed_manager_left_of_networks_is_gone_when_the_next_one_is_done(
    short_dir: Path, guest_dir: Path
) -> None:
    before = names()
    state = short_dir / "state"
    command = [sys.executable, "-c", MANAGER, str(state), str(guest_dir / "vm.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as manager:
        assert manager.stdout is not None
        tap = manager.stdout.readline().strip()
        manager.kill()
    assert {tap, "vmactor0"} <= names()  # the VMM lives on, with its tap
    async with VirtualizationService(vmm="qemu", state_directory=state) as service:
        with service.subscribe(after=0) as events:
            await until(events, "reaped")
        with anyio.fail_after(60):
            while names() != before:
                await anyio.sleep(0.02)
