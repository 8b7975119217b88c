"""``vmactor demo --app``: an app's payload in a guest that verifies it, booted twice.

The guest is tinydroid, the APK the example of ``make guest``; guest/tinydroid/README.md describes both.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import anyio

from vmactor import (
    AppConfig,
    DeadlineExceededError,
    DebugLevel,
    Died,
    Event,
    IllegalArgumentError,
    IllegalStateError,
    PartitionType,
    PayloadReady,
    Platform,
    VirtualizationService,
    VirtualMachine,
)
from vmactor.cli.apk_files import opened
from vmactor.cli.exit_codes import ExitCode, exit_code
from vmactor.cli.lifetime import Life
from vmactor.cli.output import EventPrinter, show_progress, shown

PAYLOAD: Final = "hello.so"
PAYLOAD_PORT: Final = 5001
"""Where the payload answers lines."""
ANSWER_SECONDS: Final = 15.0
MAX_ANSWER: Final = 1024
PARTITION_SIZE: Final = 10 << 20
_ADVICE: Final = "look at the guest's console with 'vmactor run-app --debug full --console FILE'"


def guest_directory(guest: Path | None) -> Path:
    """Where tinydroid is.

    Raises:
        IllegalArgumentError: It has not been built.
    """
    directory = guest or Path(os.environ.get("VMACTOR_TINYDROID") or "build/tinydroid")
    if not (directory / "example.apk").is_file():
        raise IllegalArgumentError(
            f"there is no tinydroid in {directory}: run 'make guest' in the source checkout, or name the "
            "directory with --guest"
        )
    return directory


async def tell(args: argparse.Namespace) -> ExitCode:
    """Tell the story of two boots.

    Returns:
        The status of the last life that was begun.
    """
    directory = guest_directory(args.guest)
    printer = EventPrinter(json=args.json)
    platform = Platform(directory / "apex")
    service = VirtualizationService(vmm=args.vmm, state_directory=args.state_dir, platform=platform)
    with ExitStack() as files:
        async with service:
            config = await _config(service, directory, files)
            await printer.say(printer.bold("An app's payload, in a guest that verifies it"))
            await printer.say()
            await printer.say(f"APK: {shown(str(directory / 'example.apk'))}, with its idsig: a Merkle tree.")
            for title in "First boot: a new instance", "Second boot: the instance and its data are known":
                await printer.say()
                await printer.say(printer.bold(title))
                await printer.say("  seconds  event")
                seen = await _boot(service, config, printer)
                if (code := exit_code(seen)) is not ExitCode.OK:
                    return code
        return code


async def _config(service: VirtualizationService, directory: Path, files: ExitStack) -> AppConfig:
    work = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="vmactor-demo-")))
    apk = files.enter_context(opened(directory / "example.apk"))
    new = os.O_RDWR | os.O_CREAT
    idsig = files.enter_context(opened(work / "idsig", new))
    instance = files.enter_context(opened(work / "instance.img", new))
    storage = files.enter_context(opened(work / "storage.img", new))
    await service.create_or_update_idsig_file(apk, idsig)
    for image, kind in (
        (instance, PartitionType.ANDROID_VM_INSTANCE),
        (storage, PartitionType.ENCRYPTEDSTORE),
    ):
        await service.initialize_writable_partition(image, PARTITION_SIZE, kind)
    return AppConfig(
        name="app",
        apk=apk,
        idsig=idsig,
        instance_image=instance,
        encrypted_storage_image=storage,
        payload_binary_name=PAYLOAD,
        debug_level=DebugLevel.FULL,
    )


async def _boot(service: VirtualizationService, config: AppConfig, printer: EventPrinter) -> Sequence[Event]:
    """One life: boot, a word from the payload, the end of both."""
    with service.subscribe() as events:
        vm = await service.create_vm(config)
        life = Life(vm, events, printer)
        async with life:
            async with anyio.create_task_group() as waiting:
                if not printer.json:
                    waiting.start_soon(show_progress, "the guest boots")
                await life.start()
                ready = await life.until(PayloadReady)
                waiting.cancel_scope.cancel()
            if ready:
                await _talk(vm, life)
            with anyio.move_on_after(ANSWER_SECONDS):
                await life.until(Died)
    return life.seen


async def _talk(vm: VirtualMachine, life: Life) -> None:
    """A line each way, then the end of the payload.

    Raises:
        DeadlineExceededError: The payload was silent.
        IllegalStateError: It hung up.
    """
    try:
        with anyio.fail_after(ANSWER_SECONDS):
            await _converse(vm, life)
    except TimeoutError as error:
        raise DeadlineExceededError(
            f"the payload did not answer within {ANSWER_SECONDS:g} s; {_ADVICE}"
        ) from error
    except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
        raise IllegalStateError(f"the payload hung up; {_ADVICE}") from error


async def _converse(vm: VirtualMachine, life: Life) -> None:
    async with await vm.connect_vsock(PAYLOAD_PORT) as stream:
        await stream.send(b"hello\n")
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < MAX_ANSWER:
            answer += await stream.receive(MAX_ANSWER)
        await vm.publish_message("guest_to_host", PAYLOAD_PORT, answer.decode(errors="replace").strip())
        await life.pending()
        await stream.send(b"finish 0\n")
