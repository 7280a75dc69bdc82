"""The benchmark behind the cost model: what it measures on real ranks, what it makes of it, and what the page shows."""

from __future__ import annotations

import json
import sys
from math import inf

import bench_processes
import pytest
import rank_scaling
from cost_model import Link, Machine

from tests.division import divided
from tests.ranks import Forked


TINY = "--ranks 2 --layers 1 --hidden 32 --batch 2 --seq 8 --rounds 2 --steps 1 --repetitions 2".split()


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rank_scaling.py", *arguments])
    rank_scaling.main()


# ---- Measuring ----


@pytest.mark.distributed
@pytest.mark.parametrize("how", divided(["forked", "started"], whole=["started"]))
def test_two_ranks_give_every_figure(how, tmp_path, monkeypatch, capsys):
    if how == "forked":
        monkeypatch.setattr(bench_processes.subprocess, "Popen", Forked)
    run(monkeypatch, *TINY, "--output_dir", str(tmp_path))
    said = capsys.readouterr().out
    measured = json.loads((tmp_path / "rank_scaling.json").read_text())
    (world,) = measured["worlds"]
    points = world["collectives"]
    assert [(point["kind"], point["bytes"]) for point in points] == [
        (kind, size) for kind in rank_scaling.KINDS for size in rank_scaling.BYTES
    ]
    for kind in rank_scaling.KINDS:
        seconds = [point["seconds"] for point in points if point["kind"] == kind]
        assert 0 < seconds[0] < seconds[-1], "a message of 16 MB takes longer than one of 4 KB"
    steps = world["steps"]
    assert list(steps) == list(rank_scaling.LAYOUTS)
    assert all(len(point["seconds"]) == 2 and min(point["seconds"]) > 0 for point in steps.values())
    weights = world["alone"]["weights"]
    # What was counted is what the model says, where all is even.
    machine = rank_scaling.fit(measured)
    for method, units in (("sam_replicas", 2), ("sampa", 1), ("sampa_sharded", 1)):
        assert steps[method]["bytes_sent"] == pytest.approx(4 * weights * units, rel=1e-2)
        assert rank_scaling.predicted(world, machine, method)[1] == 4 * weights * units
    run(monkeypatch, "--from_json", str(tmp_path / "rank_scaling.json"))
    assert capsys.readouterr().out == said and [line for line in said.splitlines() if not line] == [""] * 2


# ---- What is made of it ----

LINKS = {kind: Link(1e-3 * (1 + i), 1e9 / (1 + i)) for i, kind in enumerate(rank_scaling.KINDS)}


@pytest.fixture
def measured() -> dict:
    """Of a machine of two cores that does as the model says, but for steps of AdamW, which take twice as long."""
    return {"cores": 2, "worlds": [world(n) for n in (2, 4, 8)]}


def world(processes: int) -> dict:
    machine = Machine(LINKS, cores=2)
    made = {
        "processes": processes,
        "collectives": [
            {"kind": kind, "bytes": size, "seconds": machine.seconds(rank_scaling.operation(kind, size, processes))}
            for kind in rank_scaling.KINDS
            for size in rank_scaling.BYTES
        ],
        "alone": {"seconds": 0.11, "update_seconds": 0.01, "weights": 2**20},
    }
    steps = {method: rank_scaling.predicted(made, machine, method) for method in rank_scaling.LAYOUTS}
    made["steps"] = {
        method: {
            "seconds": [seconds * (2 if method == "adamw_ddp" else 1)] * 3,
            "bytes_sent": None if method == "adamw_ddp" else sent,
        }
        for method, (seconds, sent) in steps.items()
    }
    return made


def test_links_are_found_again_and_errors_are_told(measured):
    machine = rank_scaling.fit(measured)
    for kind, link in LINKS.items():
        found = machine.links[kind]
        assert (found.latency, found.bandwidth) == (pytest.approx(link.latency), pytest.approx(link.bandwidth))
    lines = rank_scaling.fit_table(measured, machine).splitlines()
    assert lines[2].startswith("| swap | 1000 | 1.00 | +0% | +0% to +0% | 5.2, 5.2 | 10.4, 10.4 | 20.8, 20.8 |")
    lines = rank_scaling.steps_table(measured, machine).splitlines()
    assert [line.split(" | ")[4] for line in lines[2:]] == ["-50%", "+0%", "+0%", "+0%"] * 3
    steps = measured["worlds"][0]["steps"]
    for method, ratio in (("sam_replicas", 0.9), ("sampa", 0.8)):
        steps[method]["seconds"] = [seconds / ratio for seconds in steps[method]["seconds"]]
    head, _, *errors = rank_scaling.errors_table(measured, machine).splitlines()
    assert head == "| ranks | AdamW, DDP | SAM, replicas | SAMPa | SAMPa sharded | median |"
    assert errors == [
        "| 2 | -50% | -10% | -20% | +0% | -15% |",
        "| 4 | -50% | +0% | +0% | +0% | +0% |",
        "| 8 | -50% | +0% | +0% | +0% | +0% |",
    ]
    # 100 ms of passes, 10 of update, and 4 MiB over a link of 0.2 GB/s with a latency of two hops.
    assert lines[2].split(" | ")[3] == f"{100 + 10 + 2 * 5 + 4.194304 / 0.2:.0f}"


def test_more_ranks_than_cores_share_them():
    machine = Machine({kind: Link(0, inf) for kind in rank_scaling.KINDS}, cores=2)
    for n, seconds in ((2, 0.11), (4, 0.22), (8, 0.44)):
        assert rank_scaling.predicted(world(n), machine, "adamw_ddp")[0] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2", "3"], "--ranks expects even numbers of processes, which make pairs, got 3"),
        (["--hidden", "100"], "--hidden expects a multiple of 32"),
    ],
)
def test_wrong_settings_are_refused(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
