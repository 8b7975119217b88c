"""The service: creates VMs, knows those that live, and ends them all when it ends.

One per program is enough; several, also of several processes, share CIDs and directories through the state
directory. It is an async context manager; each VM is a child of its supervisor. A VM's failure is its own.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio
import anyio.from_thread
from anyio.abc import TaskStatus

from vmactor import leftovers
from vmactor.actors.admission import Admission, AdmissionPolicy, need_of
from vmactor.actors.boots import BootQueue
from vmactor.actors.file_workers import FileWorkers
from vmactor.actors.guest_binder import GuestBinder
from vmactor.actors.handle import VirtualMachine
from vmactor.actors.inspection import Inspection
from vmactor.actors.keeper import Adoption, Keeper
from vmactor.actors.keeping import Inheritance, KeptVm
from vmactor.actors.monitor import RunSpec, Sinks
from vmactor.actors.place import Place, Places
from vmactor.actors.records import Records
from vmactor.actors.restart_policy import RestartPolicy
from vmactor.actors.service_view import ServiceView
from vmactor.actors.stop_ladder import StopLadder
from vmactor.actors.tombstone_receiver import PORT as TOMBSTONE_PORT
from vmactor.actors.tombstone_receiver import ClosableListener, SharedPort, TombstoneReceiver
from vmactor.actors.vm import VmActor, VmContext
from vmactor.app_config import AppConfig
from vmactor.config import Descriptor, RawConfig, duplicated
from vmactor.drains import Drains
from vmactor.errors import (
    IllegalArgumentError,
    IllegalStateError,
    NotStoppedError,
    ResourceExhaustedError,
    SecurityError,
    VmactorError,
)
from vmactor.host import HostFacts, probe
from vmactor.images.disks import lock_formats
from vmactor.images.idsig import IdsigResult, create_or_update_idsig_file
from vmactor.images.partition import initialize_writable_partition
from vmactor.limits import HostLimits
from vmactor.log import get_logger
from vmactor.messages import (
    CpuTopology,
    Created,
    CreationFailed,
    Event,
    PartitionType,
    PayloadState,
    Requester,
    StopRung,
    VirtualMachineState,
    VmInfo,
)
from vmactor.microdroid.payload_config import apexes_for_record
from vmactor.microdroid.platform import Platform
from vmactor.microdroid.translate import to_raw_config
from vmactor.net.networks import Connection, Networks
from vmactor.net.plan import NetworkPolicy, kernel_parameters
from vmactor.platform_version import Version
from vmactor.process import is_caller
from vmactor.security.permissions import Method
from vmactor.security.policy import Policy
from vmactor.state_dir import StateDirectory, default_path
from vmactor.tombstones import TombstoneStore
from vmactor.vmm.select import Selection, select
from vmactor.vsock import listen_on_kernel

HANGUP_SECONDS: Final = 30.0
HANGUP_SECONDS_EMULATED: Final = 300.0
"""How long a payload has to report its start where the guest is emulated or nested."""
VM_SHUTDOWN_SECONDS: Final = 30.0
MAX_ERROR_TEXT: Final = 4096
"""Characters of an error that are told in an event."""

logger = get_logger()


class VirtualizationService(ServiceView):
    """Creates and owns VMs, embedded in this program.

    Args:
        vmm: ``auto``, ``qemu`` or another driver's name; or a selection that was made already.
        state_directory: Shared by all managers of this user; default ``/run/vmactor`` for root, else
            ``$XDG_RUNTIME_DIR/vmactor``.
        facts: What the host can do; probed if not given.
        platform: Where Microdroid is, for app configurations (docs/apps.md).
        policy: What other users may do, and which files VMs may have (docs/security.md).
        tombstones: Where guests' tombstones are kept, which a Microdroid sends when something in it crashes:
            a directory, made if missing, which outlives the service. Without one they are not received.
        admission: How many VMs are accepted, and how many boot at the same time (docs/limits.md).
        networks: How VMs with a network are connected to the host (docs/networking.md).
        keeps: Whether VMs may be created that outlive this service. There is one such service for a state
            directory at a time. It adopts what the one before kept, and its event stream goes on where that
            one's ended, after a ``ManagerRestarted``.

    What crashed managers left in the state directory is ended in the background after entering;
    ``Reaped`` and ``Orphaned`` tell (docs/crash.md).

    Leaving its ``async with`` block kills every VM, all at once, and waits until nothing of them is left; but
    VMs that are kept, and have been started, live on.
    """

    def __init__(
        self,
        *,
        vmm: str | Selection = "auto",
        state_directory: str | os.PathLike[str] | None = None,
        facts: HostFacts | None = None,
        tombstones: str | os.PathLike[str] | TombstoneStore | None = None,
        platform: Platform | None = None,
        policy: Policy | None = None,
        admission: AdmissionPolicy | None = None,
        networks: NetworkPolicy | None = None,
        keeps: bool = False,
    ) -> None:
        super().__init__(policy or Policy(), self._write_down)
        self._vmm = vmm
        self._state_path = Path(state_directory) if state_directory is not None else None
        self._facts = facts
        self._platform = platform or Platform()
        self._drains = Drains()
        self._workers = FileWorkers()
        self._open = False
        self._entered: AsyncExitStack
        self._state: StateDirectory
        self._selection: Selection
        self._places: Places
        self._tombstones = tombstones
        self._tombstone_port: SharedPort | None = None
        self._records: Records
        self._admission_policy = admission or AdmissionPolicy()
        self._admission: Admission
        self._network_policy = networks or NetworkPolicy()
        self._networks: Networks
        self._keeps = keeps
        self._keeper: Keeper | None = None
        self._draining = False

    def __repr__(self) -> str:
        return f"<VirtualizationService {'open' if self._open else 'closed'} vms={len(self._actors)}>"

    async def __aenter__(self) -> Self:
        if self._facts is None:
            self._facts = await anyio.to_thread.run_sync(probe)
        self._selection = select(self._vmm, self._facts) if isinstance(self._vmm, str) else self._vmm
        if self._tombstones is not None and not isinstance(self._tombstones, TombstoneStore):
            self._tombstones = TombstoneStore(self._tombstones)
        async with AsyncExitStack() as entered:  # who is cancelled in here leaves nothing behind either
            entered.callback(self.bus.close)
            self._state = StateDirectory(self._state_path or default_path())
            entered.callback(self._state.close)
            self._places = Places(self._state, self._selection, self._facts, self._vsock_peer)
            self._networks = Networks(self._network_policy, self._state.path)
            self._records = Records(self._state, {"vsock": self._selection.vsock})
            self._admission = Admission(self._admission_policy, HostLimits(self._state.path).read)
            self._boots = BootQueue(
                self._admission_policy.boots(self._facts.cpus, emulated=self._selection.driver.emulated)
            )
            if self._keeps:
                self._keeper = await Keeper.open(self._state, self.bus, entered)
            await entered.enter_async_context(self._supervisor)
            if self._tombstones is not None and self._selection.vsock == "kernel":
                self._tombstone_port = SharedPort(partial(listen_on_kernel, TOMBSTONE_PORT))
                await self._supervisor.start("tombstone-port", self._tombstone_port.run)
            await self._supervisor.start("sampler", self._sampler.run)
            await self._supervisor.start("inspection", Inspection(self._state.managers, self.tree).run)
            await self._supervisor.start("records", self._records.run)
            await self._supervisor.start("drains", self._drains.run)
            left = leftovers.find(self._state)
            if self._keeper is not None:
                await self._supervisor.start("journal", self._keeper.run)
                self._keeper.begin()
                await self._keeper.adopt(left, self._adoption(self._facts))
                left = leftovers.find(self._state)
            if left or self._keeps or self._networks.were_used:
                await self._supervisor.start("reaper", partial(self._reap, left))
            self._entered = entered.pop_all()
        self._open = True
        return self

    async def _reap(self, cids: list[int], *, task_status: TaskStatus[None]) -> None:
        """End what crashed managers left, while new VMs can be created already."""
        task_status.started()
        try:
            await leftovers.reap(
                self._state, cids, self.bus.publish, keeper=self._keeps, disconnect=self._networks.clear
            )
            if self._networks.were_used:
                await self._networks.clear()
        except (OSError, VmactorError) as error:  # no descriptor, say: the next manager will try again
            logger.error("cannot clear away what a crashed manager left", error=str(error))
            return
        if self._keeper is not None:
            self._keeper.account_for_lost(self._actors.__contains__)

    def _write_down(self, event: Event) -> None:
        if self._keeper is not None:
            self._keeper.write(event)

    def _adoption(self, facts: HostFacts) -> Adoption:
        lent = self._places, self._admission, self._boots, self._drains
        return Adoption(*lent, facts, self._start_adopted)

    async def _start_adopted(
        self, spec: RunSpec, place: Place, owned: ExitStack, inheritance: Inheritance
    ) -> VirtualMachine:
        vm = inheritance.vm
        if vm.info.network:
            names = tuple(link.name for link in vm.info.network)
            spec = replace(spec, connection=Connection(self._networks, place.cid, names))
        return await self._start_actor(
            spec,
            vm.info,
            place,
            owned,
            hangup_timeout=vm.hangup_timeout,
            restart=None,
            created=Created(),
            binder=None,
            kept=vm,
            inheritance=inheritance,
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._open = False
        return await self._entered.__aexit__(kind, value, trace)

    @property
    def selection(self) -> Selection:
        """Which VMM and vsock transport new VMs get, and why."""
        return self._selection

    @property
    def policy(self) -> Policy:
        """What users may do."""
        return self._policy

    def change_policy(self, policy: Policy) -> None:
        """Let users do from now on what another policy says; their VMs stay theirs."""
        self._policy = policy

    async def create_vm(
        self,
        config: RawConfig | AppConfig,
        *,
        console: int | None = None,
        log: int | None = None,
        ramdump: int | None = None,
        hangup_detection: bool | None = None,
        hangup_timeout: float | None = None,
        restart: RestartPolicy | None = None,
        requester: Requester | None = None,
        guest_binder: GuestBinder | None = None,
        keep: bool = False,
    ) -> VirtualMachine:
        """Create a VM; it does not run yet.

        Args:
            config: What to run. Its descriptors are duplicated; the caller's stay the caller's.
            console: Descriptor that the guest's console is copied to (up to 64 MiB), duplicated as well. Of a
                debuggable app's VM without one, its lines go to the log.
            log: The same for the guest's log (hvc2).
            ramdump: The same for a crash dump (hvc1, up to 4 GiB).
            hangup_detection: Kill the VM if its payload does not report its start in time; without it, that
                is so for app configurations.
            hangup_timeout: Seconds for that; default 30, or 300 where the guest is emulated or nested.
            restart: Start the VM again by these rules when a run ends that nobody stopped; never if None.
            requester: The user whose rights the VM's processes have; default this process's user. Another
                one takes root, and that user must be allowed what the VMM needs (``/dev/kvm``, reading the
                kernel's file).
            guest_binder: For guests that report by RPC Binder and are newer than Android 16: which methods
                they know; the default suits all before (docs/guest-rpc.md).
            keep: Whether the VM, once started, outlives its handle, this service and a crash of it
                (docs/crash.md); only of a service that ``keeps``. Files that its output is copied to, and its
                restart policy, end with the service that it was created by.

        Returns:
            The handle that keeps the VM alive.

        Raises:
            IllegalArgumentError: The configuration can never work, or needs another platform version.
            UnsupportedOperationError: The VMM cannot do what the configuration asks for.
            ApkError: The payload's configuration cannot be read out of the APK.
            UnsafeImageError: A guest may have changed a disk's format, or a disk names other files.
            ImageError: A disk is broken, cannot be read, or is not of the format that it was said to be.
            CapacityExceededError: The host has no room for it; nothing was begun.
            ResourceExhaustedError: No CID, descriptor or space.
            ServiceSpecificError: Five CIDs in a row had no RPC server to be had.
            IllegalStateError: The service is not open, is about to end, or keeps no VMs.
            SecurityError: The requester lacks a permission; or is another than this process's user, and this
                is not root.
            LabelError: The SELinux label of a file does not allow to give it to a VM.
        """
        self._check_open()
        if self._draining:
            raise IllegalStateError("the service is about to end and takes no more VMs: ask the next one")
        if keep and not self._keeps:
            raise IllegalStateError("this service keeps no VMs: open it with keeps=True, or leave out keep")
        facts = self._facts if config.cpu_topology is CpuTopology.MATCH_HOST else None
        wanted = Created(
            uid=os.getuid() if requester is None else requester.uid,
            protected=config.protected_vm,
            config_type=type(config).__name__,
            cpus=facts.cpus if facts is not None else 1,
            memory_mib=config.memory_mib or 0,
            apexes=await self._apexes(config, requester),
        )
        try:
            return await self._create(
                config,
                wanted,
                console=console,
                log=log,
                ramdump=ramdump,
                hangup_detection=hangup_detection,
                hangup_timeout=hangup_timeout,
                restart=restart,
                requester=requester,
                guest_binder=guest_binder,
                keep=keep,
            )
        except VmactorError as error:
            self._tell_failure(config, wanted, error)
            raise

    async def _apexes(self, config: RawConfig | AppConfig, requester: Requester | None) -> str:
        if isinstance(config, RawConfig) or config.config_path is None:
            return ""
        return await anyio.to_thread.run_sync(
            apexes_for_record, config, limiter=self._workers.of(requester).files
        )

    def _tell_failure(self, config: RawConfig | AppConfig, wanted: Created, error: VmactorError) -> None:
        failed = CreationFailed(
            error=error.kind,
            code=error.code,
            message=error.message[:MAX_ERROR_TEXT],
            uid=wanted.uid,
            protected=wanted.protected,
            config_type=wanted.config_type,
            cpus=wanted.cpus,
            memory_mib=wanted.memory_mib,
            apexes=wanted.apexes,
            name=config.name,
            driver=self._selection.driver.name,
            time=datetime.now(UTC),
            monotonic=anyio.current_time(),
        )
        self.bus.publish(failed)

    async def _create(
        self,
        config: RawConfig | AppConfig,
        wanted: Created,
        *,
        console: int | None,
        log: int | None,
        ramdump: int | None,
        hangup_detection: bool | None,
        hangup_timeout: float | None,
        restart: RestartPolicy | None,
        requester: Requester | None,
        guest_binder: GuestBinder | None,
        keep: bool,
    ) -> VirtualMachine:
        self._policy.permissions.check(requester, Method.CREATE_VM, config)
        if requester is not None and not is_caller(requester) and os.geteuid() != 0:
            raise SecurityError("only root can run a VM for another user: leave the requester out")
        driver = self._selection.driver
        if isinstance(config, AppConfig):
            config.validate()
        else:
            self._check(config)
        if config.network:
            await self._networks.check()
        watched = isinstance(config, AppConfig) if hangup_detection is None else hangup_detection
        if hangup_timeout is not None and not hangup_timeout > 0:
            raise IllegalArgumentError("the hang-up timeout must be more than 0 seconds")
        if hangup_timeout is not None and not watched:
            raise IllegalArgumentError("a hang-up timeout is of no use without hangup_detection=True")
        timeout = hangup_timeout or (HANGUP_SECONDS_EMULATED if driver.emulated else HANGUP_SECONDS)
        with ExitStack() as owned:
            claim = owned.enter_context(ExitStack())  # given back last, when our descriptors are free again
            own = config.duplicate()
            owned.callback(own.close)
            # Checked on our duplicates: nobody can exchange these between the check and the use.
            own.check_descriptors()
            if isinstance(own, AppConfig) or own.disks or own.protected_vm:
                workers = self._workers.of(requester).files
                files = await anyio.to_thread.run_sync(self._prepare, own, owned, limiter=workers)
            else:
                files = own
            sinks_used = sum(fd is not None for fd in (console, log, ramdump))
            need = need_of(files, driver, self._selection.vsock, sinks_used)
            reservation = self._admission.reserve(need)
            claim.callback(reservation.release)
            sinks = Sinks(
                console=_duplicate(console, "console", owned),
                log=_duplicate(log, "log", owned),
                ramdump=_duplicate(ramdump, "ramdump", owned),
                to_log=isinstance(config, AppConfig) and config.debuggable,
            )
            place = await self._places.find(claim, requester, keep=keep)
            files, connection = self._connect(files, place)
            spec = RunSpec(
                config.name,
                place.cid,
                files,
                driver,
                place.directory,
                sinks,
                place.vhost_fd,
                place.helper,
                place.spawner,
                partial(self._places.renew, place),
                self._boots,
                reservation,
                self._drains,
                keep,
                connection,
                lambda: self._workers.of(requester).files,
            )
            info = VmInfo(
                cid=place.cid,
                name=config.name,
                generation=0,
                state=VirtualMachineState.NOT_STARTED,
                payload=PayloadState.STARTING,
                driver=driver.name,
                suspended=False,
                pid=None,
                protected=config.protected_vm,
                directory=str(place.directory),
                requester_uid=os.getuid() if requester is None else requester.uid,
                requester_pid=requester.pid if requester and requester.pid else os.getpid(),
                created=datetime.now(UTC),
                kept=keep,
                network=() if connection is None else tuple(link.told for link in connection.links),
            )
            hangup = timeout if watched else None
            kept = KeptVm(
                info=info,
                memory_mib=files.memory_mib,
                vsock=self._selection.vsock,
                need=tuple(need),
                to_log=sinks.to_log,
                hangup_timeout=hangup,
                requester=requester,
            )
            return await self._start_actor(
                spec,
                info,
                place,
                owned,
                hangup_timeout=hangup,
                restart=restart,
                created=wanted,
                binder=guest_binder,
                kept=kept if keep else None,
            )

    def open_vm(self, cid: int) -> VirtualMachine:
        """Another handle on a VM that lives; it goes without the VM's going, unlike its creator's.

        Raises:
            IllegalArgumentError: There is no such VM.
            IllegalStateError: The service is not open.
        """
        self._check_open()
        if (actor := self._actors.get(cid)) is None:
            raise IllegalArgumentError(f"no VM of this service has the CID {cid}")
        return VirtualMachine(actor, self.bus, holds=False)

    async def shutdown_vms(
        self, ladder: StopLadder | None = None
    ) -> dict[int, StopRung | NotStoppedError | None]:
        """Shut down the VMs that live, all at once; each has the whole ladder's time for itself.

        Leaving the service kills VMs; call this before, to leave it gently. VMs that are created meanwhile
        are left alone.

        Args:
            ladder: As for ``VirtualMachine.shutdown``, which this does for every VM.

        Returns:
            By CID, what ended it, or the error.
        """
        return await self._shut_down(self._actors, ladder)

    async def drain(self, ladder: StopLadder | None = None) -> dict[int, StopRung | NotStoppedError | None]:
        """Get ready to end: take no more VMs, and shut down those that are not kept.

        Args:
            ladder: As for ``shutdown_vms``, and so is what is returned.
        """
        self._draining = True
        passing = {cid: actor for cid, actor in self._actors.items() if not actor.keeps}
        return await self._shut_down(passing, ladder)

    async def _shut_down(
        self, actors: Mapping[int, VmActor], ladder: StopLadder | None
    ) -> dict[int, StopRung | NotStoppedError | None]:
        ends: dict[int, StopRung | NotStoppedError | None] = {}

        async def shut_down(cid: int, actor: VmActor) -> None:
            try:
                ends[cid] = await actor.shut_down(ladder or StopLadder())
            except NotStoppedError as error:
                ends[cid] = error

        async with anyio.create_task_group() as climbers:
            for cid, actor in sorted(actors.items()):
                climbers.start_soon(shut_down, cid, actor)
        return ends

    async def initialize_writable_partition(
        self,
        image: Descriptor,
        size: int,
        partition_type: PartitionType | int = PartitionType.RAW,
        *,
        requester: Requester | None = None,
    ) -> int:
        """Turn a file into an empty QCOW2 image for a guest to write to; see ``images.partition``.

        Work is done in a thread, on a duplicate of the descriptor. It is short and always done to its end,
        also if the caller is cancelled.

        Args:
            image: A regular file, open for reading and writing. What is in it is lost.
            size: Of the guest's disk in bytes, up to 16 TiB; rounded up to a multiple of 4,096.
            partition_type: What the disk begins with.
            requester: Who asks for it; None for this process itself.

        Returns:
            The size of the guest's disk.

        Raises:
            SecurityError: The requester lacks a permission.
            IllegalArgumentError: The size is negative, or the descriptor is not open.
            ImageError: It cannot be done; the file is as it was, or empty.
            ResourceExhaustedError: No descriptor or no space; the same.
            IllegalStateError: The service is not open.
        """
        self._check_open()
        self._policy.permissions.check(requester, Method.INITIALIZE_WRITABLE_PARTITION)
        with duplicated("partition image", image) as fd:
            return await anyio.to_thread.run_sync(
                initialize_writable_partition,
                fd,
                size,
                partition_type,
                limiter=self._workers.of(requester).files,
            )

    async def create_or_update_idsig_file(
        self, apk: Descriptor, idsig: Descriptor, *, requester: Requester | None = None
    ) -> IdsigResult:
        """Make the idsig file of an APK, unless it is up to date; see ``images.idsig``.

        Work is done in a thread and, for a large APK, in processes, on duplicates of the descriptors; no more
        than ``HASHERS`` of a user at a time, others wait. It takes about half a second for each GiB. When the
        caller is cancelled, it ends within a second, the file as it was before or as it was to be.

        Args:
            apk: A signed APK, a regular file open for reading.
            idsig: A regular file open for writing, and for reading if it may be up to date already.
            requester: Who asks for it; None for this process itself.

        Returns:
            What the file says now, and whether it was written.

        Raises:
            SecurityError: The requester lacks a permission.
            ApkError: The APK or the file is not as it has to be (texts are the reference's). The file is as
                it was; only an I/O error while it is written leaves it empty.
            IllegalArgumentError: One of them is not open.
            ResourceExhaustedError: No descriptor or no space; the same.
            IllegalStateError: The service is not open.
        """
        self._check_open()
        self._policy.permissions.check(requester, Method.CREATE_OR_UPDATE_IDSIG_FILE)
        with duplicated("APK", apk) as apk_fd, duplicated("idsig", idsig) as idsig_fd:
            return await anyio.to_thread.run_sync(
                create_or_update_idsig_file,
                apk_fd,
                idsig_fd,
                lambda _done: anyio.from_thread.check_cancelled(),
                limiter=self._workers.of(requester).hashing,
            )

    async def _start_actor(
        self,
        spec: RunSpec,
        info: VmInfo,
        place: Place,
        owned: ExitStack,
        *,
        hangup_timeout: float | None,
        restart: RestartPolicy | None,
        binder: GuestBinder | None,
        created: Created,
        kept: KeptVm | None = None,
        inheritance: Inheritance | None = None,
    ) -> VirtualMachine:
        resources = owned.pop_all()

        def clear() -> None:
            self._records.forget(place.cid)
            self._places.clear(place.cid)

        def give_back() -> None:
            if (gone := self._actors.pop(place.cid, None)) is not None:
                self._vmm_timeouts += gone.vmm_timeouts
            self._records.forget(place.cid)
            resources.close()

        def abandon() -> None:
            logger.error("a process survived its VM; the VM's directory and CID are kept", cid=place.cid)
            self._places.keep(place.cid)
            self._records.flush(place.cid)
            give_back()

        def let_go() -> None:
            self._places.let_go(place.cid)
            give_back()

        context = VmContext(
            bus=self.bus,
            transport=place.transport,
            listener=place.listener,
            record=self._records.tell,
            clear=clear,
            give_back=give_back,
            abandon=abandon,
            let_go=let_go,
            binder=binder,
            tombstones=self._tombstone_receiver(spec.name, place),
        )
        actor = VmActor(
            spec, info, context, hangup_timeout, restart, created=created, kept=kept, inheritance=inheritance
        )
        self._actors[place.cid] = actor
        try:
            if inheritance is None:  # that comes before the service is open
                self._check_open()  # it may have ended while we looked for a place
            await self._supervisor.start(
                f"vm-{place.cid}",
                actor.run,
                ask_to_stop=actor.detach,
                shutdown=VM_SHUTDOWN_SECONDS,
                details=actor.details,
            )
        except BaseException:
            # An actor that ran has done all this itself, and it does no harm twice.
            try:
                with anyio.CancelScope(shield=True):
                    await place.listener.aclose()
            finally:
                give_back()
            raise
        return VirtualMachine(actor, self.bus)

    def _tombstone_receiver(self, name: str, place: Place) -> TombstoneReceiver | None:
        if not isinstance(self._tombstones, TombstoneStore):
            return None
        listen: Callable[[], ClosableListener]
        if self._tombstone_port is not None:
            listen = partial(self._tombstone_port.listen, place.cid)
        else:
            listen = partial(place.transport.listen, TOMBSTONE_PORT)
        return TombstoneReceiver(self._tombstones, listen, name, place.cid)

    def _check_open(self) -> None:
        if not self._open:
            raise IllegalStateError("the service is closed: use it inside its 'async with' block")

    def _check(self, config: RawConfig) -> None:
        config.validate()
        config.check_platform(Version.parse(self._selection.driver.platform_version))
        self._selection.driver.validate(config)

    def _connect(self, config: RawConfig, place: Place) -> tuple[RawConfig, Connection | None]:
        """A VM's place in the network, and its configuration with what tells its guest of it."""
        if not config.network:
            return config, None
        links = self._networks.plan(config.network, place.cid)
        told = kernel_parameters(links)
        if told and config.kernel is not None:
            config = replace(config, params=f"{config.params} {told}" if config.params else told)
            self._check(config)
        names = tuple(link.name for link in links)
        return config, Connection(self._networks, place.cid, names, links, place.spawner.ledger)

    def _prepare(self, config: RawConfig | AppConfig, owned: ExitStack) -> RawConfig:
        """Look at a VM's files, in a thread: what an app's VM is made of, and what each disk is."""
        app = isinstance(config, AppConfig)
        if isinstance(config, AppConfig):
            raw = to_raw_config(config, self._platform)
            owned.callback(raw.close)
            config.close()  # the raw one has duplicates of what it uses
            self._check(raw)
            raw.check_descriptors()
            config = raw
        self._policy.labels.check(config, app=app)
        return lock_formats(config)

    def _vsock_peer(self, cid: int) -> int | None:
        actor = self._actors.get(cid)
        return actor.vsock_peer if actor is not None else None


def _duplicate(fd: int | None, what: str, owned: ExitStack) -> int | None:
    if fd is None:
        return None
    try:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise IllegalArgumentError(f"the {what} descriptor is not open for writing")
        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except (ValueError, OverflowError) as error:  # what no descriptor can be
        raise IllegalArgumentError(f"the {what} descriptor is not open") from error
    except OSError as error:
        if error.errno == errno.EBADF:
            raise IllegalArgumentError(f"the {what} descriptor is not open") from error
        raise ResourceExhaustedError(f"no descriptor for the {what}: {error}; raise 'ulimit -n'") from error
    owned.callback(os.close, copy)
    return copy
