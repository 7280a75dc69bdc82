"""The step-time benchmark: what it reports, on a tiny model. How fast anything is, is not tested."""

import json
import sys

import bench_processes
import pytest
import step_time
from bench_trainer import make_trainer
from step_phases import PHASES, milliseconds_by_phase
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer
from tests.division import divided
from tests.ranks import Forked


TINY = "--layers 1 --hidden 32 --batch 2 --seq 8 --rounds 2 --steps 2".split()


def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments])
    step_time.main()


@pytest.mark.distributed
@pytest.mark.parametrize("how", divided(["forked", "started"], whole=["started"]))
def test_tiny_model_gives_every_figure(how, tmp_path, monkeypatch, capsys):
    if how == "forked":
        monkeypatch.setattr(bench_processes.subprocess, "Popen", Forked)
    main(monkeypatch, *TINY, "--ddp", "--json", str(tmp_path / "figures.json"))
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "figures.json").read_text())
    sizes = {"layers": 1, "hidden": 32, "batch": 2, "seq": 8, "rounds": 2, "steps": 2}
    assert result["settings"] == {**sizes, "bf16": False}
    assert list(result["methods"]) == ["adamw", "adamw_ddp", "sam", "sam_replicas", "sampa"]
    for figures in result["methods"].values():
        assert len(figures["rounds"]) == 2 and min(figures["rounds"]) > 0
        assert figures["peak_bytes_per_process"] > 100e6  # torch alone takes more
    processes = {method: figures["processes"] for method, figures in result["methods"].items()}
    sent = {method: [process["bytes_sent_per_step"] for process in processes[method]] for method in processes}
    # One gradient in fp32; the independent processes exchange nothing.
    one_gradient = pytest.approx(4 * result["parameters"], rel=1e-3)  # parameters begin at multiples of 64 bytes
    two_gradients = pytest.approx(8 * result["parameters"], rel=1e-3)
    assert {method: sent[method] for method in ("adamw", "adamw_ddp", "sam", "sampa")} == {
        "adamw": [0, 0],
        "adamw_ddp": [None, None],
        "sam": [0, 0],
        "sampa": [one_gradient] * 2,
    }
    # Both of its gradients are averaged over the replicas.
    assert sent["sam_replicas"] == [two_gradients] * 2
    ratios = ("sampa_over_adamw", "sam_over_sampa", "sampa_over_adamw_ddp", "sam_replicas_over_sampa")
    names = ("SAMPa / AdamW", "SAM / SAMPa", "SAMPa / AdamW, DDP", "SAM, replicas / SAMPa")
    assert "    ".join(f"{name} {result[r]:.2f}" for name, r in zip(names, ratios, strict=True)) in said
    assert said.count("not counted") == 2
    check_phases(processes)


def check_phases(processes: dict[str, list[dict]]) -> None:
    """Every label was found in the profiles, where it belongs, and none of them in another's time."""
    always = {"data", "forward and backward", "base step"}
    expected = {
        "adamw": always,
        "adamw_ddp": always,
        "sam": always | {"displace", "exposed exchange"},  # SAM tells its losses by the same small gather
        "sam_replicas": always | {"displace", "exposed exchange", "check"},
        "sampa": always | {"displace", "exposed exchange", "combine", "check"},
    }
    for method, by_rank in processes.items():
        for process in by_rank:
            spent = process["milliseconds"]
            assert list(spent) == list(PHASES)
            assert {phase for phase in PHASES if spent[phase] > 0} - {"rest"} == expected[method], method
            # The labels' intervals are disjoint and within the time of the clock.
            assert 0 < spent["rest"] < sum(spent.values())


def test_phases_are_taken_apart_and_add_up():
    intervals = [
        ("SAMPa.data", 0, 1000),
        ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 100, 900),
        ("SAMPa.gradient", 2000, 8000),
        ("SAMPa.exchange", 3000, 3500),  # waits for room to send, during backward
        ("SAMPa.exchange", 7000, 8000),
        ("SAMPa.exchange", 8000, 8600),  # begins where the one before ends
        ("Optimizer.step#AdamW.step", 9000, 9800),
        ("aten::mm", 2100, 2900),
    ]
    spent = milliseconds_by_phase(reversed(intervals), total=6.0, steps=2)
    assert spent == pytest.approx(
        {
            "data": 0.5,
            "displace": 0.0,
            "forward and backward": (6.0 - 0.5 - 1.0) / 2,
            "exposed exchange": (0.5 + 1.0 + 0.6) / 2,
            "combine": 0.0,
            "check": 0.0,
            "base step": 0.4,
            "rest": 6.0 - 0.5 - 2.25 - 1.05 - 0.4,
        }
    )
    assert sum(spent.values()) == pytest.approx(6.0)


def reports(*seconds: float, peaks: tuple[int, int] = (1, 1)) -> list[list[dict]]:
    """By round and rank, as workers tell them; the last round is the profiled one."""
    milliseconds = dict.fromkeys(PHASES, 1.0)
    return [
        [
            {"seconds_per_step": s, "peak_bytes": peak, "bytes_per_step": 4.0, "parameters": 1}
            | ({"milliseconds": milliseconds} if i + 1 == len(seconds) else {})
            for peak in peaks
        ]
        for i, s in enumerate(seconds)
    ]


def test_ratios_are_medians_over_neighbouring_rounds():
    # The machine slows down fourfold in the middle: the ratios do not show it. The profiled round, 9.0, does not count.
    result = step_time.summarise(
        {
            "adamw": reports(1.0, 4.0, 1.0, 9.0),
            "sam": reports(2.0, 8.0, 2.2, 9.0),
            "sampa": reports(1.1, 4.4, 1.1, 9.0, peaks=(5, 7)),
            "sampa_sharded": reports(1.2, 4.8, 1.3, 9.0),
        }
    )
    assert result["sampa_over_adamw"] == pytest.approx(1.1)
    assert result["sam_over_adamw"] == pytest.approx(2.0)
    assert result["sam_over_sampa"] == pytest.approx(2.0 / 1.1)
    assert result["ratios_by_round"]["sam_over_adamw"] == pytest.approx([2.0, 2.0, 2.2])
    assert result["methods"]["sam"]["seconds_per_step"] == pytest.approx(2.2)
    assert result["methods"]["sampa"]["peak_bytes_per_process"] == 7
    table = step_time.format_table({**step_time.SIZES, "bf16": False}, result)
    assert "SAMPa sharded  2, one pair          1.300      1.20" in table
    assert table.count("PERTURBED") == table.count("LOOKAHEAD") == 2


@pytest.mark.parametrize("method", bench_processes.METHODS)
def test_workers_train_what_the_tables_name(method):
    sizes = {"layers": 1, "hidden": 32, "batch": 2, "seq": 8, "max_steps": 3}
    trainer = make_trainer(method, TrainerCallback(), **sizes, bf16=True, use_cpu=True)
    args = trainer.args
    assert isinstance(trainer, SAMPaTrainer) == (not method.startswith("adamw"))
    assert getattr(args, "method", "adamw") == method.split("_")[0]
    assert getattr(args, "shard_optimizer", False) == (method == "sampa_sharded")
    # What Trainer takes by default, and what the phases' label of the base step belongs to.
    assert args.optim == "adamw_torch_fused" and args.bf16
    assert len(trainer.train_dataset) == 2 * (3 + 1)


def test_help_answers(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--rounds" in said and "two independent processes" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "100"], "--hidden expects a multiple of 32, the size of an attention head, got 100"),
        (["--rounds", "0"], "--rounds expects a whole number of at least 1, got 0"),
        (["--seq", "513"], "--seq expects at most 512 tokens, the places that BERT has, got 513"),
    ],
)
def test_wrong_settings_are_refused(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_process_that_fails_shows_its_log(tmp_path, monkeypatch):
    broken = tmp_path / "worker.py"
    broken.write_text("raise RuntimeError('out of memory')\n")
    monkeypatch.setattr(step_time, "WORKER", broken)
    with pytest.raises(SystemExit, match="(?s)A process of AdamW .*ended early.*log of process 0.*out of memory"):
        step_time.measure({"rounds": 1, "steps": 1})
