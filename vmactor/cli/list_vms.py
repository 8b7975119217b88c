"""``vmactor list``: the VMs of this user on this host, whoever manages them."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final

import anyio

from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import BAD, FAINT, GOOD, ODD, shown, table, to_json
from vmactor.cli.records import Record, find
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.client import connect
from vmactor.usage import measure

COLUMNS: Final = ("CID", "NAME", "STATE", "PAYLOAD", "DRIVER", "CPU", "MEMORY", "VMM", "MANAGER", "AGE")
ORPHANED: Final = "orphaned"
"""Shown for a VM whose manager is gone: nobody will end it, and its VMM may still run."""

_COLOURS: Final = {"READY": GOOD, "FINISHED": GOOD, "DEAD": FAINT, ORPHANED: BAD, "suspended": ODD}


def run(args: argparse.Namespace) -> ExitCode:
    """Print the list."""
    return run_to_the_end(partial(_run, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    if args.socket is None:
        _path, records = find(args.state_dir)
    else:
        async with connect(args.socket) as service:
            records = [info.as_dict() | {"alive": True} for info in service.list_vms()]
    # Reading the memory maps of many processes takes a while.
    records = await anyio.to_thread.run_sync(partial(list, map(with_usage, records)))
    writer = Writer(STDOUT)
    if args.json:
        text = "".join(to_json(record) for record in records)
    else:
        now = datetime.now(UTC)
        rows = [row(record, now) for record in records]
        text = table(COLUMNS, rows, STDOUT, _COLOURS) if rows else "no VMs\n"
    await writer.write(text.encode(errors="backslashreplace"))
    return ExitCode.OK


def with_usage(record: Record) -> Record:
    """A record, with what its VMM uses now if that can be seen: fields as in the event ``usage``."""
    pid = record.get("pid")
    used = measure(pid) if record.get("alive") and type(pid) is int and pid > 0 else None
    if used is None:
        return record
    memory = {"rss_vm_kib": used.memory.guest_kib, "rss_vmm_kib": used.memory.total_kib}
    return record | {"cpu_time_ms": used.cpu.total_ms, **memory}


def row(record: Record, now: datetime) -> Sequence[str]:
    """A record as cells; it is another process's word, so anything may be in it or missing."""
    state = str(record.get("state", "?"))
    if not record.get("alive"):
        state = ORPHANED
    elif record.get("suspended") is True:
        state = "suspended"
    cells = [
        record.get("cid"),
        record.get("name"),
        state,
        record.get("payload"),
        record.get("driver"),
        seconds(record.get("cpu_time_ms")),
        mebibytes(record.get("rss_vmm_kib")),
        record.get("pid"),
        record.get("requester_pid"),
        age(record.get("created"), now),
    ]
    return ["-" if cell is None else shown(str(cell), limit=80) for cell in cells]


def seconds(milliseconds: object) -> str:
    """Processor time for people; ``-`` if that cannot be told."""
    return f"{milliseconds / 1000:.1f}s" if type(milliseconds) is int else "-"


def mebibytes(kib: object) -> str:
    """Memory for people; ``-`` if that cannot be told."""
    return f"{kib / 1024:.0f} MiB" if type(kib) is int else "-"


def age(since: object, now: datetime) -> str:
    """How long ago, in the two units that matter; ``-`` if that cannot be told."""
    try:
        seconds = int((now - datetime.fromisoformat(str(since))).total_seconds())
    except (ValueError, TypeError):
        return "-"
    return duration(seconds)


def duration(seconds: int) -> str:
    """Seconds in the two units that matter."""
    minutes, seconds = divmod(max(seconds, 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
