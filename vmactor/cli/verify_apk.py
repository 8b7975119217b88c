"""``vmactor verify-apk``: who signed an APK, and whether its idsig is right."""

import argparse
import hashlib
import os
from contextlib import ExitStack
from functools import partial
from typing import Any

from vmactor.cli.apk_files import idsig_record, opened, shown_path
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import GOOD, paint, shown, to_json, wants_colour
from vmactor.cli.progress import with_progress
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.images.apk_verify import VerifiedApk, verify_apk


def run(args: argparse.Namespace) -> ExitCode:
    """Verify them."""
    return run_to_the_end(partial(_run, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    with ExitStack() as owned:
        apk_fd = owned.enter_context(opened(args.apk))
        idsig_fd = None if args.idsig is None else owned.enter_context(opened(args.idsig))
        size = os.fstat(apk_fd).st_size
        verified = await with_progress(
            "verifying", size if idsig_fd is None else 2 * size, partial(verify_apk, apk_fd, idsig_fd)
        )
    record = {"apk": shown_path(args.apk)} | describe(verified)
    text = to_json(record) if args.json else for_people(record, colour=wants_colour(STDOUT))
    await Writer(STDOUT).write(text.encode(errors="backslashreplace"))
    return ExitCode.OK


def describe(verified: VerifiedApk) -> dict[str, Any]:
    """What was verified, as JSON has it; keys and certificates by their digests, as is usual."""
    return {
        "scheme": "v3",
        "algorithm": verified.algorithm.name,
        "digest": verified.digest.hex(),
        "certificate_sha256": hashlib.sha256(verified.certificate).hexdigest(),
        "public_key_sha256": hashlib.sha256(verified.public_key).hexdigest(),
        "public_key": verified.public_key.hex(),
        "idsig": None if verified.idsig is None else idsig_record(verified.idsig),
    }


def for_people(record: dict[str, Any], *, colour: bool = False) -> str:
    """The same as lines."""
    verified = paint("verified", GOOD, on=colour)
    lines = [
        f"{shown(record['apk'])}: {verified}, signed with {record['algorithm']} (v3)",
        f"  certificate  SHA-256 {record['certificate_sha256']}",
        f"  public key   SHA-256 {record['public_key_sha256']}",
        f"  content      {record['digest']}",
    ]
    if idsig := record["idsig"]:
        how = f"signed with {idsig['algorithm']} (v4)" if idsig["signed"] else "not signed, as for a VM"
        lines += [f"idsig: {verified}, {how}", f"  root hash    {idsig['root_hash']}"]
    return "".join(f"{line}\n" for line in lines)
