"""``vmactor info``: what this host can do for VMs, what is chosen, and how to get more."""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio.to_thread

from vmactor import __version__
from vmactor.actors.admission import Admission, AdmissionPolicy, need_of
from vmactor.cli import tree
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import BAD, GOOD, brackets, paint, shown, to_json, wants_colour
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.config import RawConfig
from vmactor.errors import VmactorError
from vmactor.host import Finding, HostFacts, probe
from vmactor.limits import HostLimits
from vmactor.microdroid.platform import DEFAULT_ROOT, Platform
from vmactor.vmm.select import Selection, select

ROOM_MIB: Final = 256
"""Of which VMs it is told how many more there is room for."""


def run(args: argparse.Namespace) -> ExitCode:
    """Print what was found."""
    work = _run if args.tree is None else tree.run
    return run_to_the_end(partial(work, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    facts = await anyio.to_thread.run_sync(probe)
    found = describe(facts, args.vmm, args.platform)
    text = to_json(found) if args.json else for_people(found, colour=wants_colour(STDOUT))
    await Writer(STDOUT).write(text.encode(errors="backslashreplace"))
    return ExitCode.OK


def describe(facts: HostFacts, vmm: str, platform: Path = DEFAULT_ROOT) -> dict[str, Any]:
    """Everything in JSON-ready form: host and platform, each thing looked for, and the choice for ``vmm``.

    ``selected`` is None where VMs cannot run; ``error`` then says why and what to do.
    """
    findings = {
        field.name: _finding(value)
        for field in dataclasses.fields(facts)
        if isinstance(value := getattr(facts, field.name), Finding)
    }
    row: dict[str, Any] = {
        "version": __version__,
        "arch": facts.arch,
        "cpus": facts.cpus,
        "nested": facts.nested,
        "findings": findings,
        "platform": {"root": str(platform), "guests": Platform(platform).guests()},
        "wanted": vmm,
        "selected": None,
        "room": None,
        "error": None,
    }
    try:
        selection = select(vmm, facts)
    except VmactorError as error:
        row["error"] = str(error)
    else:
        row["selected"] = {
            "driver": selection.driver.name,
            "platform_version": selection.driver.platform_version,
            "emulated": selection.driver.emulated,
            "vsock": selection.vsock,
            "reasons": list(selection.reasons),
        }
        row["room"] = _room(selection)
    return row


def _room(selection: Selection) -> dict[str, Any]:
    """For how many more VMs there is room, and what to set for more."""
    driver = selection.driver
    need = need_of(RawConfig(name="any", kernel=0, memory_mib=ROOM_MIB), driver, selection.vsock, 0)
    admission = Admission(AdmissionPolicy(), HostLimits(Path("/run")).read)
    count, limit = admission.room(need)
    return {
        "vms": count,
        "memory_mib": ROOM_MIB,
        "limit": limit.name if limit is not None else None,
        "advice": limit.advice if limit is not None else None,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {key: _plain(value) for key, value in dataclasses.asdict(finding).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return value if value is None or isinstance(value, bool) else str(value)


def for_people(found: dict[str, Any], *, colour: bool = False) -> str:
    """The same as lines; what was found is escaped where it was found."""
    lines = [
        f"vmactor {found['version']} on {shown(found['arch'])}, {found['cpus']} CPUs"
        f"{', itself a VM' if found['nested'] else ''}",
        "",
    ]
    for name, finding in found["findings"].items():
        word = paint(
            f"{'yes' if finding['usable'] else 'no':<4}", GOOD if finding["usable"] else BAD, on=colour
        )
        lines.append(f"{name.replace('_', '-'):<19} {word} {brackets(finding['found'])}")
        if finding["advice"]:
            lines.append(f"{'':<24} to have it: {brackets(finding['advice'])}")
    guests, root = found["platform"]["guests"], shown(found["platform"]["root"])
    word = paint(f"{'yes' if guests else 'no':<4}", GOOD if guests else BAD, on=colour)
    names = ", ".join(shown(name) for name in guests)
    where = f"{names} in {root}" if guests else f"no guest for apps in {root}"
    lines.append(f"{'platform':<19} {word} {where}")
    if not guests:
        lines.append(f"{'':<24} to have it: give its directory with --platform")
    lines.append("")
    selected = found["selected"]
    if selected is None:
        lines += [f"No VM can run with --vmm {found['wanted']}.", f"  {brackets(found['error'])}"]
    else:
        pace = "emulated" if selected["emulated"] else "with hardware virtualization"
        lines.append(
            f"--vmm {found['wanted']} picks {selected['driver']} ({pace}; platform version "
            f"{shown(selected['platform_version'])}) with {selected['vsock']} vsock:"
        )
        lines += [f"  - {brackets(reason)}" for reason in selected["reasons"]]
        room = found["room"]
        lines.append(
            f"There is room for {room['vms']} more VMs of {room['memory_mib']} MiB in one program; "
            f"the next limit is {brackets(room['limit'])}:"
        )
        lines.append(f"  to have more: {brackets(room['advice'])}")
    return "".join(f"{line}\n" for line in lines)
