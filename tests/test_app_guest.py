"""Apps end to end: signed APKs in a real guest that does what Microdroid's manager does.

Each boot costs seconds, so these tests run on one event loop, and some are stories of more than one boot.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.cli_process import Cli, cli, rows, until
from vmactor import (
    AppConfig,
    DeathReason,
    DebugLevel,
    Died,
    ErrorCode,
    Event,
    PartitionType,
    PayloadError,
    PayloadFinished,
    Platform,
    VirtualizationService,
    open_extra_apks,
)

__all__ = ["cli"]

pytestmark = pytest.mark.guest

BOOT_SECONDS = 120
PAYLOAD_PORT = 5001
GOOD = ["started", "payload_started", "payload_ready", "payload_finished", "died"]


class App:
    """An app's files, and boots of it in a guest."""

    def __init__(self, tinydroid: Path, work: Path, files: ExitStack) -> None:
        self.tinydroid = tinydroid
        self._work = work
        self._files = files

    def open(self, path: Path, flags: int = os.O_RDONLY) -> int:
        """A descriptor that lasts as long as the test."""
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._files.callback(os.close, fd)
        return fd

    def service(self) -> VirtualizationService:
        """A service on the built platform."""
        platform = Platform(self.tinydroid / "apex")
        return VirtualizationService(state_directory=self._work / "state", platform=platform)

    async def idsig(self, service: VirtualizationService, apk: int) -> int:
        """An idsig file of an APK."""
        idsig = self.open(self._work / f"{apk}.idsig", os.O_RDWR | os.O_CREAT)
        await service.create_or_update_idsig_file(apk, idsig)
        return idsig

    async def config(self, service: VirtualizationService, apk: Path, **fields: object) -> AppConfig:
        """A configuration with an instance image of its own."""
        apk_fd = self.open(apk)
        instance = self.open(self._work / "instance.img", os.O_RDWR | os.O_CREAT)
        await service.initialize_writable_partition(instance, 1 << 20, PartitionType.ANDROID_VM_INSTANCE)
        idsig = await self.idsig(service, apk_fd)
        payload = {} if "config_path" in fields else {"payload_binary_name": "hello.so"}
        words: dict[str, object] = {"name": "app", "apk": apk_fd, "idsig": idsig, "instance_image": instance}
        return AppConfig(**(words | payload | fields))  # type: ignore[arg-type]

    async def boot(
        self, service: VirtualizationService, config: AppConfig, last_line: str = "finish 0"
    ) -> tuple[list[Event], str, str]:
        """One life: its events, what the payload said, the console."""
        console = self._work / "console"
        events: list[Event] = []
        said = ""
        with anyio.fail_after(BOOT_SECONDS), console.open("wb") as sink:
            async with await service.create_vm(config, console=sink.fileno()) as vm:
                with vm.events() as stream:
                    await vm.start()
                    async for event in stream:
                        events.append(event)
                        if event.kind == "payload_ready":
                            async with await vm.connect_vsock(PAYLOAD_PORT) as payload:
                                await payload.send(b"hello\n")
                                said = (await payload.receive()).decode()
                                await payload.send(f"{last_line}\n".encode())
        return events, said, console.read_text()


@pytest.fixture
def app(tinydroid_dir: Path, short_dir: Path) -> Iterator[App]:
    """The example."""
    with ExitStack() as files:
        yield App(tinydroid_dir, short_dir, files)


def refusal(events: list[Event]) -> tuple[ErrorCode, str, DeathReason]:
    """What was wrong with a payload that never started."""
    assert [event.kind for event in events] == ["started", "error", "died"]
    error, died = events[1:]
    assert isinstance(error, PayloadError)
    assert isinstance(died, Died)
    return error.error_code, error.message, died.reason


def flipped(apk: Path, target: Path, marker: bytes) -> Path:
    """A copy of an APK with one bit changed, at the marker."""
    data = bytearray(apk.read_bytes())
    data[data.index(marker)] ^= 1
    target.write_bytes(data)
    return target


def test_the_demo_boots_an_app_twice_and_its_data_survive(cli: Cli, tinydroid_dir: Path) -> None:
    code, out, err = cli.run("demo", "--app", "--json", "--guest", tinydroid_dir)
    events = rows(out)
    assert (code, err) == (0, "")
    life = ["created", *GOOD[:3], "vsock_message", *GOOD[3:]]
    assert [event["event"] for event in events] == [*life, *life]
    first, second = (event["text"] for event in events if event["event"] == "vsock_message")
    assert first.startswith("hello from the example payload; boot 1 of instance ")
    assert second == first.replace("boot 1", "boot 2")


def test_a_changed_apk_is_refused_by_the_instance_of_the_first_one(app: App) -> None:
    """The first boot also has a configuration in the APK, an extra APK, and nothing to be seen of it."""

    async def story() -> None:
        async with app.service() as service:
            path = "assets/extra.json"
            extras = open_extra_apks(app.open(app.tinydroid / "example.apk"), path, app._files)
            config = await app.config(
                service,
                app.tinydroid / "example.apk",
                config_path=path,
                extra_apks=extras,
                extra_idsigs=[await app.idsig(service, extras[0])],
            )
            events, said, console = await app.boot(service, config, "finish 3")
            assert [event.kind for event in events] == GOOD
            finished = events[3]
            assert isinstance(finished, PayloadFinished)
            assert finished.exit_code == 3
            assert said.endswith("; hello from an extra APK\n")
            assert console == ""

            changed = app.open(app.tinydroid / "changed.apk")
            later = replace(
                config,
                apk=changed,
                idsig=await app.idsig(service, changed),
                debug_level=DebugLevel.FULL,
            )
            events, _, console = await app.boot(service, later)
            assert refusal(events) == (
                ErrorCode.PAYLOAD_CHANGED,
                "the APK is not the one of this instance's first boot",
                DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED,
            )
            assert "tinydroid: Changed: the APK is not the one" in console

    anyio.run(story)


def test_a_byte_that_is_not_the_one_of_the_idsig_is_found(app: App, tmp_path: Path) -> None:
    async def story() -> None:
        async with app.service() as service:
            apk = app.tinydroid / "example.apk"
            bad = flipped(apk, tmp_path / "bad.apk", b"hello from the example payload")
            config = replace(await app.config(service, apk), apk=app.open(bad))
            code, message, reason = refusal((await app.boot(service, config))[0])
        assert code is ErrorCode.PAYLOAD_VERIFICATION_FAILED
        assert message == "block 0 of the APK has a wrong hash"
        assert reason is DeathReason.MICRODROID_PAYLOAD_VERIFICATION_FAILED

    anyio.run(story)


def test_a_payload_that_dies_of_a_signal_is_an_error(app: App) -> None:
    async def story() -> None:
        async with app.service() as service:
            config = await app.config(service, app.tinydroid / "example.apk")
            events, _, _ = await app.boot(service, config, "abort")
        assert [event.kind for event in events] == [*GOOD[:3], "error", "died"]
        error, died = events[3:]
        assert isinstance(error, PayloadError)
        assert (error.error_code, error.message) == (
            ErrorCode.UNKNOWN,
            "Failed to run payload: killed by signal 6",
        )
        assert isinstance(died, Died)
        assert died.reason is DeathReason.MICRODROID_UNKNOWN_RUNTIME_ERROR

    anyio.run(story)


REFUSED = [
    pytest.param(
        ["--payload-binary-name", "absent.so"],
        "UNKNOWN",
        "Unable to access /mnt/apk/lib/x86_64/absent.so",
        "MICRODROID_UNKNOWN_RUNTIME_ERROR",
        id="no-such-payload",
    ),
    pytest.param(
        ["--config-path", "assets/no_task.json"],
        "PAYLOAD_CONFIG_INVALID",
        "No task in VM config",
        "MICRODROID_INVALID_PAYLOAD_CONFIG",
        id="no-task",
    ),
    pytest.param(
        ["--payload-binary-name", "hello.so"],
        "PAYLOAD_VERIFICATION_FAILED",
        "the APK's content is not what was signed",
        "MICRODROID_PAYLOAD_VERIFICATION_FAILED",
        id="changed-after-signing",
    ),
]


@pytest.mark.parametrize(("payload", "kind", "message", "reason"), REFUSED)
def test_run_app_tells_why_a_payload_was_not_run(
    cli: Cli, tinydroid_dir: Path, tmp_path: Path, payload: list[str], kind: str, message: str, reason: str
) -> None:
    apk = tmp_path / "app.apk"
    shutil.copyfile(tinydroid_dir / "example.apk", apk)
    if kind == "PAYLOAD_VERIFICATION_FAILED":  # with an idsig that was made afterwards: the signature tells
        flipped(apk, apk, b"hello from the example payload")
    files = [tmp_path / name for name in ("app.idsig", "instance.img")]
    code, out, err = cli.run("run-app", apk, *files, *payload, "--json", "--platform", tinydroid_dir / "apex")
    events = rows(out)
    assert (code, err) == (11, "")
    assert [event["event"] for event in events] == ["created", "started", "error", "died"]
    assert (events[2]["error_code"], events[2]["message"], events[3]["reason"]) == (kind, message, reason)
    assert all(path.stat().st_size for path in files)


def test_run_microdroid_runs_until_it_is_ended_and_leaves_its_directory(
    cli: Cli, tinydroid_dir: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    options = ("--json", "--platform", tinydroid_dir / "apex", "--work-dir", work)
    with cli.spawn("run-microdroid", *options) as process:
        until(process.stdout, "payload_ready")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=BOOT_SECONDS)
    assert process.returncode == 130
    assert rows(out.decode())[-1]["event"] == "died"
    assert sorted(path.name for path in work.iterdir()) == ["apk.idsig", "instance.img"]
    assert b"EmptyPayloadApp.apk\n" in err
