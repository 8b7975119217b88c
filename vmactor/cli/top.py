"""``vmactor top``: a live view of the VMs of a daemon; a subscriber like any other."""

import argparse
from collections.abc import Awaitable, Callable, Hashable
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, cast

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Header, RichLog

from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.guest_text import Lines
from vmactor.cli.lifetime import report
from vmactor.cli.output import describe
from vmactor.cli.top_model import COLUMNS, Model
from vmactor.client import VirtualizationService, VirtualMachine, connect
from vmactor.errors import VmactorError
from vmactor.messages import Event, VirtualMachineState
from vmactor.protocol.values import event_kinds

REFRESH_SECONDS: Final = 1.0
_COLOURS: Final = {"READY": "green", "FINISHED": "green", "DEAD": "bright_black", "suspended": "yellow"}
_STATE: Final = COLUMNS.index("STATE")


def run(args: argparse.Namespace) -> ExitCode:
    """Show it until it is quit."""
    app = Top(connect(args.socket))
    app.run()
    if app.failure is not None:
        return report(app.failure)
    return ExitCode.OK


class Top(App[None]):
    """The table of VMs.

    Args:
        service: The daemon; entered and left here.

    Attributes:
        model: What is shown.
        failure: Why the view ended, if it was not quit.
    """

    TITLE = "vmactor top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        ("s", "stop", "Stop"),
        ("k", "kill", "Kill"),
        ("z", "suspend", "Suspend/resume"),
        ("e", "events", "Events"),
        ("c", "console", "Console"),
        ("q", "quit", "Quit"),
    ]

    def __init__(self, service: VirtualizationService) -> None:
        super().__init__()
        self.model = Model()
        self.failure: Exception | None = None
        self._service = service

    def compose(self) -> ComposeResult:
        """The screen's parts."""
        yield Header()
        yield DataTable(cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        """Begin."""
        self._vms.add_columns(*((column, column) for column in COLUMNS))
        self.run_worker(self._watch(), exit_on_error=False)
        self.set_interval(REFRESH_SECONDS, self.show_rows)

    @property
    def _vms(self) -> "DataTable[Text]":
        return self.screen_stack[0].query_one(DataTable)

    async def _watch(self) -> None:
        try:
            kinds = cast("dict[str, Hashable]", event_kinds())  # all of them, so those that must be asked for
            async with self._service:
                with self._service.subscribe(kinds=kinds.values(), snapshot=True) as events:
                    async for event in events:
                        self.model.feed(event)
                        self.show_rows()
                        if isinstance(self.screen, EventsScreen):
                            self.screen.feed(event)
        except (VmactorError, OSError, ExceptionGroup) as error:
            self.failure = error
        self.exit()

    def show_rows(self) -> None:
        """Bring the table up to date, cell by cell, so that the cursor stays where it is."""
        table, cells = self._vms, self.model.cells(datetime.now(UTC))
        known = {row.value: row for row in table.rows}
        for key in known.keys() - {str(cid) for cid in cells}:
            table.remove_row(known[key])
        for cid, texts in cells.items():
            row = [
                Text(text, _COLOURS.get(text, "") if at == _STATE else "") for at, text in enumerate(texts)
            ]
            if str(cid) not in known:
                table.add_row(*row, key=str(cid))
                continue
            for column, cell in zip(COLUMNS, row, strict=True):
                if table.get_cell(str(cid), column) != cell:
                    table.update_cell(str(cid), column, cell, update_width=True)
        alive = sum(row.info.state is not VirtualMachineState.DEAD for row in self.model.rows.values())
        missed = f", {self.model.missed} events missed" if self.model.missed else ""
        self.sub_title = f"{alive} VMs{missed}"

    def _chosen(self) -> int | None:
        table = self._vms
        if not table.row_count:
            return None
        key = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        return None if key is None else int(key)

    def _act(self, what: Callable[[VirtualMachine], Awaitable[Any]]) -> None:
        """Do something with the chosen VM; an error is shown and changes nothing."""
        if (cid := self._chosen()) is None:
            return

        async def act() -> None:
            try:
                await what(await self._service.open_vm(cid))
            except VmactorError as error:
                self.notify(str(error), severity="error", markup=False)

        self.run_worker(act())

    def action_stop(self) -> None:
        """End the chosen VM gently."""
        self._act(lambda vm: vm.shutdown())

    def action_kill(self) -> None:
        """Kill the chosen VM."""
        self._act(lambda vm: vm.stop())

    def action_suspend(self) -> None:
        """Pause the chosen VM, or let it go on."""
        cid = self._chosen()
        if cid is not None and self.model.rows[cid].info.suspended:
            self._act(lambda vm: vm.resume())
        else:
            self._act(lambda vm: vm.suspend())

    def action_events(self) -> None:
        """Follow the events of the chosen VM."""
        if (cid := self._chosen()) is not None and self.screen is self.screen_stack[0]:
            self.push_screen(EventsScreen(cid, list(self.model.rows[cid].events)))

    def action_console(self) -> None:
        """Follow the console of the chosen VM."""
        if self.screen is self.screen_stack[0]:
            self._act(self._show_console)

    async def _show_console(self, vm: VirtualMachine) -> None:
        screen = LogScreen(f"console of {vm.cid}")
        await self.push_screen(screen)
        lines = Lines()
        async with await vm.console() as console:
            async for data in console:
                for line in lines.feed(data):
                    screen.write(line.rstrip("\n"))


class LogScreen(Screen[None]):
    """Lines that grow."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "app.pop_screen", "Back")]

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def compose(self) -> ComposeResult:
        """The screen's parts."""
        yield Header()
        yield RichLog(max_lines=10_000)
        yield Footer()

    def write(self, line: str) -> None:
        """One more line, as it is."""
        self.query_one(RichLog).write(Text(line))


class EventsScreen(LogScreen):
    """One VM's events, those that are known and those that come."""

    def __init__(self, cid: int, events: list[Event]) -> None:
        super().__init__(f"events of {cid}")
        self._cid = cid
        self._known = events

    def on_mount(self) -> None:
        """Show what is known already."""
        for event in self._known:
            self.feed(event)

    def feed(self, event: Event) -> None:
        """Show an event, if it is of this VM."""
        if event.cid == self._cid:
            self.write(f"{event.time:%H:%M:%S}  {event.kind:<16}  {describe(event)[0]}")
