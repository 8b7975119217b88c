"""The runtime alone: an actor, a supervisor and a bus, and no virtual machine.

Run it with ``python examples/runtime.py`` or ``python examples/runtime.py trio``.
"""

import sys
from contextlib import closing
from dataclasses import dataclass, replace

import anyio
from anyio.abc import TaskStatus

from vmactor.bus import Bus, Subscription
from vmactor.errors import ActorDiedError
from vmactor.mailbox import Mailbox
from vmactor.request import Request
from vmactor.supervisor import Supervisor


@dataclass(frozen=True)
class Deposit(Request[int]):
    """Put money in; the reply is the new balance."""

    amount: int


@dataclass(frozen=True)
class Stop:
    """End by yourself."""


@dataclass(frozen=True)
class Changed:
    """An event: the balance is another one. With ``missed``, it stands for events that were lost."""

    balance: int
    seq: int = 0
    missed: int = 0


class Account:
    """An actor: one task, one mailbox, and a balance that only the task changes."""

    def __init__(self, bus: Bus[Changed]) -> None:
        self.mailbox: Mailbox[Deposit | Stop] = Mailbox("account")
        self._bus = bus
        self._balance = 0

    def ask_to_stop(self) -> None:
        """Overtakes the deposits that wait."""
        self.mailbox.control(Stop())

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """The actor's task. However it ends, whoever waits for an answer is told."""
        with closing(self.mailbox):
            task_status.started()
            while True:
                envelope = await self.mailbox.receive()
                match envelope.message:
                    case Stop():
                        return
                    case Deposit(amount) if amount <= 0:
                        self.mailbox.refuse(envelope.reply, ValueError("deposit more than 0"))
                    case Deposit(amount):
                        self._balance += amount
                        self._bus.publish(Changed(self._balance))
                        self.mailbox.answer(envelope.reply, self._balance)


async def report(events: Subscription[Changed]) -> None:
    """A subscriber; slow or quick, it holds up nobody."""
    async for event in events:
        text = f"{event.missed} missed" if event.missed else f"balance {event.balance}"
        print(f"event {event.seq}: {text}")


async def main() -> None:
    """Start, ask, stop."""
    bus: Bus[Changed] = Bus(
        stamp=lambda event, seq: replace(event, seq=seq),
        gap=lambda last, missed: replace(last, missed=missed),
    )
    account = Account(bus)
    async with anyio.create_task_group() as tg:
        tg.start_soon(report, bus.subscribe())
        async with Supervisor("bank") as bank:
            await bank.start("account", account.run, ask_to_stop=account.ask_to_stop)
            print("reply:", await account.mailbox.ask(Deposit(40), timeout=1))
            print("reply:", await account.mailbox.ask(Deposit(2), timeout=1))
            try:
                await account.mailbox.ask(Deposit(-1), timeout=1)
            except ValueError as error:
                print("refused:", error)
        bus.close()  # the report ends when it has read what there is
    try:
        await account.mailbox.tell(Deposit(1))
    except ActorDiedError as error:
        print("too late:", error)


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
