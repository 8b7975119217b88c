"""``vmactor load``: scenarios, what a run of simulated VMs tells, its page, and comparisons."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli_process import Cli, cli, write_config
from vmactor.errors import IllegalArgumentError
from vmactor.load.compare import compare
from vmactor.load.latencies import Latencies
from vmactor.load.scenario import Arrivals, Fate, Lifetimes, Scenario, parse_toml, plan

__all__ = ["cli"]
"""A fixture is named by its parameters only."""

SHARES = st.floats(0, 0.25)
SCENARIOS = st.builds(
    Scenario,
    vms=st.integers(1, 200),
    arrivals=st.sampled_from(Arrivals),
    lifetime=st.sampled_from(Lifetimes),
    rate=st.floats(0.1, 1000),
    ramp=st.floats(0, 100),
    crash=SHARES,
    hang=SHARES,
    error=SHARES,
    killed=SHARES,
    seed=st.integers(0, 2**63 - 1),
)


# -- Scenarios ---------------------------------------------------------------------------------------


@given(scenario=SCENARIOS)
def test_the_same_scenario_gives_the_same_lives(scenario: Scenario) -> None:
    lives = list(plan(scenario))
    assert lives == list(plan(scenario))
    assert [life.number for life in lives] == list(range(scenario.vms))
    if scenario.arrivals is not Arrivals.CLOSED:
        arrivals = [life.arrival or 0.0 for life in lives]
        assert arrivals == sorted(arrivals)
    again = Scenario.from_mapping(json.loads(json.dumps(scenario.as_dict())))
    assert list(plan(again)) == lives


def test_another_seed_gives_other_lives() -> None:
    one, other = (Scenario(crash=0.5, seed=seed) for seed in (1, 2))
    assert [life.fate for life in plan(one)] != [life.fate for life in plan(other)]


def test_shares_and_rates_come_out_as_they_were_asked_for() -> None:
    scenario = Scenario(
        vms=20_000, arrivals=Arrivals.POISSON, rate=50, crash=0.1, killed=0.2, lifetime=Lifetimes.EXPONENTIAL
    )
    lives = list(plan(scenario))
    assert sum(life.fate is Fate.CRASH for life in lives) / 20_000 == pytest.approx(0.1, abs=0.01)
    assert sum(life.fate is Fate.KILLED for life in lives) / 20_000 == pytest.approx(0.2, abs=0.01)
    assert lives[-1].arrival == pytest.approx(400, rel=0.05)
    assert math.fsum(life.lifetime or 0 for life in lives) / 20_000 == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"vms": 0}, "vms is 0"),
        ({"vms": True}, "vms is True"),
        ({"rate": "fast"}, "rate is 'fast'"),
        ({"arrivals": "sometimes"}, "arrivals is 'sometimes'"),
        ({"crash": 0.6, "killed": 0.6}, "more than 1 together"),
        ({"colour": 1}, "no 'colour'"),
        ({"hold": float("nan")}, "hold is nan"),
    ],
)
def test_what_can_never_be_run_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(IllegalArgumentError, match=says):
        Scenario.from_mapping(values)


def test_a_file_that_is_no_toml_is_refused() -> None:
    with pytest.raises(IllegalArgumentError, match="no TOML"):
        parse_toml("vms = [")


# -- Latencies ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([50.0, 90.0, 99.0, 99.9, 100.0]))
def test_a_percentile_is_the_least_value_that_such_a_share_does_not_exceed(
    values: list[float], percent: float
) -> None:
    latencies = Latencies()
    for value in values:
        latencies.record(value)
    found = latencies.percentile(percent)
    assert found in values
    share = sum(value <= found for value in values) / len(values)
    assert share >= percent / 100 - 1e-12
    smaller = [value for value in values if value < found]
    assert not smaller or sum(value <= max(smaller) for value in values) / len(values) < percent / 100


def test_of_nothing_there_is_no_percentile() -> None:
    assert Latencies().summary() == dict.fromkeys(("p50", "p90", "p99", "p999", "max", "mean")) | {"count": 0}


# -- Runs --------------------------------------------------------------------------------------------


def test_a_load_of_all_fates_is_run_told_and_drawn(cli: Cli, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text('vms = 1\ncrash = 0.2\nhang = 0.1\nerror = 0.2\nkilled = 0.2\narrivals = "poisson"\n')
    out, html = tmp_path / "result.json", tmp_path / "result.html"
    code, text, err = cli.run(
        *("load", "--scenario", scenario, "--vms", "40", "--rate", "40", "--hold", "1"),
        *("--hangup-timeout", "1", "--json", out, "--html", html),
    )
    assert (code, err) == (0, "")
    assert "40 VMs in" in text
    result = json.loads(out.read_text())
    assert result["scenario"]["vms"] == 40
    assert (result["vms"], result["failed"], result["failures"], result["events_lost"]) == (40, 0, [], 0)
    assert sum(result["went_as_planned"].values()) == 40
    assert set(result["went_as_planned"]) == {"well", "crash", "hang", "error", "killed"}
    assert result["events_published"] >= 40 * 4
    assert 0 < result["peak_ready"] <= 40
    assert result["manager_rss_bytes_per_vm"] is not None
    assert result["manager_cpu_fraction_idle"] is not None
    for kind in ("create", "start_to_ready", "stop", "report_to_subscriber"):
        latency = result["latency_seconds"][kind]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p999"] <= latency["max"]
    drawn = html.read_text()
    pictures = re.findall(r"<svg.*?</svg>", drawn)
    assert len(pictures) == 4
    for picture in pictures:
        ET.fromstring(picture)
    assert not re.search(r"(src|href)=", drawn), "nothing is loaded from elsewhere"

    code, text, err = cli.run("load", "compare", out, out, "--json", "-")
    assert code == 0, err
    assert json.loads(text)["peak_ready"]["ratio"] == 1


@pytest.mark.guest
def test_real_guests_bear_a_load_too(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    write_config(tmp_path, guest_dir, "x")
    code, text, err = cli.run(
        *("load", "--vmm", "qemu", "--guest", guest_dir, "--vms", "2", "--clients", "2"),
        *("--hold", "0.2", "--json", "-"),
    )
    assert code == 0, text + err
    result = json.loads(text)
    assert (result["peak_ready"], result["failed"]) == (2, 0)


@pytest.mark.parametrize("words", [["compare"], ["compare", "a"], ["fly"]])
def test_other_words_are_refused(cli: Cli, words: list[str]) -> None:
    code, _out, err = cli.run("load", *words)
    assert code == 2
    assert "vmactor load compare A.json B.json" in err


def test_what_is_no_result_cannot_be_compared(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{}")
    code, _out, err = cli.run("load", "compare", tmp_path / "a", tmp_path / "a")
    assert code == 1
    assert "no result of 'vmactor load --json'" in err
    with pytest.raises(IllegalArgumentError):
        compare({}, {})
