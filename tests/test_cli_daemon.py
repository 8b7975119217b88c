"""The command line with a daemon: real processes, and a real guest."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli_process import SECONDS, Cli, cli, rows, until, write_config
from tests.simulated_peer import script

__all__ = ["cli"]
"""A fixture is named by its parameters only."""

EXAMPLES = Path(__file__).parent.parent / "examples" / "clients"
NODE_MODULES = Path(__file__).parent.parent / "build" / "node" / "node_modules"


@contextmanager
def serving(cli: Cli, *options: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A daemon, told to end afterwards; then no VM of it is left, and it said nothing bad."""
    path = cli.state_dir / "daemon.sock"
    with cli.spawn("serve", "--socket", path, *options) as daemon:
        assert daemon.stderr is not None
        assert any(b"listening on" in line for line in daemon.stderr)
        cli.socket = path
        try:
            yield daemon
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.send_signal(signal.SIGTERM)
            cli.socket = None
        assert daemon.wait(SECONDS) == 0


def simulated(directory: Path, *steps: str, name: str = "sim") -> Path:
    (directory / "kernel").touch()
    path = directory / "sim.json"
    config = {"name": name, "kernel": "kernel", "params": script(*steps), "platform_version": "~1.0"}
    path.write_text(json.dumps(config))
    return path


def test_a_kept_vm_is_run_seen_paused_and_stopped_by_one_command_each(cli: Cli, tmp_path: Path) -> None:
    config = simulated(tmp_path, "print hello [1mthere", "started", "ready", "serve")
    with serving(cli, "--vmm", "simulated"):
        code, out, err = cli.run("run", config, "--keep", "--detach")
        assert (code, err) == (0, "")
        cid = out.strip()
        assert cid.isdigit()
        (row,) = rows(cli.run("list", "--json")[1])
        assert (str(row["cid"]), row["name"], row["driver"]) == (cid, "sim", "simulated")
        assert row["rss_vmm_kib"] > 0
        with cli.spawn("events", "sim", "--follow", "--since", "0", "--json") as following:
            until(following.stdout, "payload_ready")
            assert cli.run("suspend", "sim") == (0, "", "")
            assert rows(cli.run("list", "--json")[1])[0]["suspended"] is True
            assert cli.run("resume", cid) == (0, "", "")
            until(following.stdout, "resumed")
            with cli.spawn("console", cid) as console:
                assert console.stdout is not None
                assert console.stdout.readline() == b"hello [1mthere\n"
                code, out, err = cli.run("stop", cid, "--graceful", "20", "--json")
                assert (code, json.loads(out)) == (0, {"cid": int(cid), "stopped_by": "POWER_BUTTON"}), err
                assert console.wait(SECONDS) == 0
            died = until(following.stdout, "died")
            assert died["stopped_by"] == "POWER_BUTTON"
            following.send_signal(signal.SIGINT)
        assert cli.run("list") == (0, "no VMs\n", "")
        code, out, err = cli.run("events", "--since", str(died["seq"] - 1), "--json")
        assert [row["event"] for row in rows(out)] == ["died"]
        code, out, err = cli.run("stop", cid)
        assert code == 1
        assert f'has no VM "{cid}"' in err


def test_a_vm_that_is_not_kept_ends_with_its_command(cli: Cli, tmp_path: Path) -> None:
    config = simulated(tmp_path, "started", "ready", "serve")
    with serving(cli, "--vmm", "simulated"):
        with cli.spawn("run", config, "--json") as running:
            until(running.stdout, "payload_ready")
            running.kill()
        with cli.spawn("events", "--follow", "--since", "0", "--json") as following:
            assert until(following.stdout, "died")["reason"] == "KILLED"
            following.send_signal(signal.SIGTERM)


def test_a_command_that_only_watched_leaves_a_kept_vm_alone(cli: Cli, tmp_path: Path) -> None:
    config = simulated(tmp_path, "started", "ready", "serve")
    with serving(cli, "--vmm", "simulated"):
        with cli.spawn("run", config, "--keep", "--json") as running:
            cid = until(running.stdout, "payload_ready")["cid"]
            running.send_signal(signal.SIGINT)
            assert running.wait(SECONDS) == 130
        assert [row["cid"] for row in rows(cli.run("list", "--json")[1])] == [cid]
        code, out, err = cli.run("stop", str(cid))
        assert (code, out, err) == (0, f"CID {cid}: it was killed\n", "")


def test_the_status_of_a_run_at_a_daemon_is_that_of_the_payload(cli: Cli, tmp_path: Path) -> None:
    config = simulated(tmp_path, "started", "ready", "finished 3", "poweroff")
    with serving(cli, "--vmm", "simulated"):
        code, out, _err = cli.run("run", config, "--json")
        assert code == 10
        assert [row["event"] for row in rows(out)] == [
            *("created", "started", "payload_started", "payload_ready", "payload_finished", "died")
        ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--detach"], "--detach leaves the VM with a daemon: say --keep, too"),
        (["--keep", "--vmm", "qemu"], "--vmm: that is the daemon's to say"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    cli: Cli, tmp_path: Path, options: list[str], says: str
) -> None:
    cli.socket = tmp_path / "none"
    code, out, err = cli.run("run", simulated(tmp_path, "ready"), *options)
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.parametrize("command", [["list"], ["events"], ["stop", "5"], ["suspend", "5"], ["console", "5"]])
def test_without_a_daemon_commands_say_what_to_start(cli: Cli, tmp_path: Path, command: list[str]) -> None:
    cli.socket = tmp_path / "none"
    code, out, err = cli.run(*command)
    assert (code, out) == (1, "")
    assert f"there is no daemon at {tmp_path}/none" in err
    assert "start 'vmactor serve'" in err


def test_names_that_are_not_unique_are_refused_with_the_cids(cli: Cli, tmp_path: Path) -> None:
    config = simulated(tmp_path, "started", "ready", "serve")
    with serving(cli, "--vmm", "simulated"):
        cids = [cli.run("run", config, "--keep", "--detach")[1].strip() for _ in range(2)]
        code, _out, err = cli.run("stop", "sim")
        assert code == 1
        assert f"name one by its CID ({', '.join(cids)})" in err
        for cid in cids:
            assert cli.run("stop", cid)[0] == 0


@pytest.mark.guest
def test_a_real_guest_is_kept_followed_and_shut_down(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, guest_dir, "print the guest is up;started;ready;serve")
    with serving(cli, "--vmm", "qemu"):
        code, out, err = cli.run("run", config, "--keep", "--detach", "--json")
        assert code == 0, err
        cid = str(json.loads(out)["cid"])
        with cli.spawn("events", "--follow", "--since", "0", "--json") as following:
            until(following.stdout, "payload_ready")
            with cli.spawn("console", "scripted") as console:
                assert console.stdout is not None
                assert any(b"the guest is up" in line for line in console.stdout)
                console.send_signal(signal.SIGINT)
            for command in ("suspend", "resume"):
                assert cli.run(command, cid) == (0, "", "")
            code, out, err = cli.run("stop", "scripted", "--graceful", "60", "--json")
            assert json.loads(out)["stopped_by"] == "POWER_BUTTON", err
            until(following.stdout, "died")
            following.send_signal(signal.SIGINT)


# -- Clients in other languages -----------------------------------------------------------------------


CLIENTS = {
    "JavaScript": ["node", "vmactor.mjs"],
    "Perl": ["perl", "vmactor.pl"],
}


@pytest.mark.parametrize("language", CLIENTS)
def test_an_example_in_another_language_lists_and_stops_vms(cli: Cli, tmp_path: Path, language: str) -> None:
    config = simulated(tmp_path, "started", "ready", "serve")
    shutil.copy(EXAMPLES / CLIENTS[language][1], tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)  # where Node.js looks
    with serving(cli, "--vmm", "simulated"):
        cid = cli.run("run", config, "--keep", "--detach")[1].strip()

        def client(*args: str) -> "subprocess.CompletedProcess[str]":
            return subprocess.run(
                [*CLIENTS[language], str(cli.socket), *args],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
                cwd=tmp_path,
            )

        listed = client("list")
        assert listed.returncode == 0, listed.stderr
        assert listed.stdout.split()[:2] == [cid, "sim"]
        stopped = client("stop", cid)
        assert (stopped.returncode, stopped.stdout) == (0, f"{cid} stopped\n"), stopped.stderr
        assert client("list").stdout == ""
        wrong = client("stop", cid)
        assert wrong.returncode != 0
        assert f"you have no VM with CID {cid}" in wrong.stderr
