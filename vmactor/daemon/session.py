"""One client's connection: its handles, its subscriptions, and what its end means for its VMs."""

import secrets
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Final, cast

from vmactor.actors.service import VirtualizationService
from vmactor.bus import Overflow, Subscription
from vmactor.daemon.users import User
from vmactor.daemon.vms import OwnedVm, Vms
from vmactor.errors import IllegalArgumentError, ResourceExhaustedError, UnsupportedOperationError
from vmactor.messages import Event, Requester, Snapshot
from vmactor.protocol import errors
from vmactor.protocol.options import SubscribeOptions
from vmactor.protocol.values import event_kinds, to_wire
from vmactor.rpc.connection import Connection
from vmactor.security.permissions import Method, Permissions

MAX_HANDLES: Final = 4096
"""Handles on one connection: one keeps what is known of a VM, also of a dead one."""

Handler = Callable[["Session", list[Any]], Any]


class Session:
    """What a client has on one connection.

    Args:
        service: What it talks to.
        vms: Those of all users.
        user: Whose the connection is.
        requester: The process that connected, with its rights.
        permissions: What users may do.
        methods: What can be called, by name.

    Attributes:
        connection: Set before it runs.
        sees_all: Whether he may see others' VMs.
    """

    connection: Connection

    def __init__(
        self,
        service: VirtualizationService,
        vms: Vms,
        *,
        user: User,
        requester: Requester,
        permissions: Permissions,
        methods: dict[str, Handler],
    ) -> None:
        self.service = service
        self.vms = vms
        self.user = user
        self.requester = requester
        self.sees_all = permissions.allow(requester, Method.DEBUG_LIST_VMS)
        self._methods = methods
        self._handles: dict[str, OwnedVm] = {}
        self._created: set[OwnedVm] = set()
        self._subscriptions: dict[int, Subscription[Event]] = {}
        self._next = 1

    # -- For the connection --------------------------------------------------------------------------

    def request(self, method: str, params: list[Any]) -> Any:
        """Do what is asked, or begin to."""
        handler = self._methods.get(method)
        if handler is None:
            raise UnsupportedOperationError(
                f"there is no method {method[:60]!r}; there are: {', '.join(self._methods)}"
            )
        return handler(self, params)

    def notification(self, method: str, params: list[Any]) -> None:
        """Nothing that a client tells is of interest so far."""

    def describe(self, error: Exception) -> list[Any]:
        """An error as it is on the wire."""
        return errors.to_wire(error)

    def revive(self, error: Any) -> Exception:
        """What a client answers: nothing was asked of it."""
        return errors.from_wire(error)

    def end(self) -> list[OwnedVm]:
        """The connection has ended; gives the VMs that are to end with it."""
        for number in tuple(self._subscriptions):
            self.unsubscribe(number)
        self._handles.clear()
        doomed = [owned for owned in self._created if not owned.kept]
        self._created.clear()
        return doomed

    # -- Handles -------------------------------------------------------------------------------------

    def owned(self, handle: Any) -> OwnedVm:
        """The VM of a handle. Raises IllegalArgumentError."""
        owned = self._handles.get(handle) if type(handle) is str else None
        if owned is None:
            raise IllegalArgumentError("no VM has this handle on this connection; openVm gives one by CID")
        return owned

    def check_handles(self) -> None:
        """Raise ResourceExhaustedError if there can be no more handles."""
        if len(self._handles) >= MAX_HANDLES:
            raise ResourceExhaustedError(
                f"this connection has {MAX_HANDLES} handles; give some up with closeVm"
            )

    def give_handle(self, owned: OwnedVm, *, created: bool) -> dict[str, Any]:
        """Make a handle on a VM; the answer that tells of it."""
        handle = secrets.token_urlsafe(16)
        self._handles[handle] = owned
        if created:
            self._created.add(owned)
        return {"vm": handle, "info": to_wire(owned.vm.info)}

    def close_handle(self, handle: str) -> OwnedVm | None:
        """Give a handle up; gives the VM if it is to end with that."""
        owned = self._handles.pop(handle)
        if owned not in self._created:
            return None
        self._created.discard(owned)
        return None if owned.kept else owned

    def sees(self, uid: int) -> bool:
        """Whether this client may see the VMs of a user."""
        return self.sees_all or uid == self.user.uid

    # -- Subscriptions ---------------------------------------------------------------------------------

    def subscribe(self, options: SubscribeOptions) -> int:
        """Send events from now on, after the answer; gives the subscription's number.

        Raises:
            IllegalArgumentError: There is no such kind, or was no such event.
            ResourceExhaustedError: The user has as many as he may.
        """
        known = cast("dict[str, Hashable]", event_kinds())
        own = self.user.uid
        if unknown := set(options.kinds or ()) - known.keys():
            raise IllegalArgumentError(
                f"kinds: there is no {min(unknown)[:60]!r}; there are: {', '.join(sorted(known))}"
            )
        self.user.subscribe()
        try:
            subscription = self.service.subscribe(
                None if self.sees_all else lambda event: event.uid == own,
                cids=options.cids,
                kinds=None if options.kinds is None else [known[kind] for kind in options.kinds],
                capacity=options.capacity,
                overflow=Overflow[options.overflow.name],
                patience=options.patience,
                late=options.late,
                snapshot=options.snapshot,
                after=options.after,
                until_end=options.until_end,
            )
        except BaseException:
            self.user.subscriptions -= 1
            raise
        number, self._next = self._next, self._next + 1
        self._subscriptions[number] = subscription
        self.connection.start_soon(self._send_events, number, subscription)
        return number

    def unsubscribe(self, number: int) -> None:
        """Send nothing more of a subscription. Raises IllegalArgumentError if there is none of the number."""
        subscription = self._subscriptions.pop(number, None)
        if subscription is None:
            raise IllegalArgumentError(f"there is no subscription {number} on this connection")
        self.user.subscriptions -= 1
        subscription.close()

    async def _send_events(self, number: int, subscription: Subscription[Event]) -> None:
        failed = None
        try:
            async for event in subscription:
                if number not in self._subscriptions:
                    return
                self.connection.notify("event", number, to_wire(self._visible(event)))
                await self.connection.drained()
        except Exception as error:
            failed = errors.to_wire(error)
        if self._subscriptions.pop(number, None) is not None:
            self.user.subscriptions -= 1
            self.connection.notify("subscriptionEnd", number, failed)

    def _visible(self, event: Event) -> Event:
        if self.sees_all or not isinstance(event, Snapshot):
            return event
        return replace(event, vms=tuple(info for info in event.vms if info.requester_uid == self.user.uid))
