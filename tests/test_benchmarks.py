"""The step-time benchmark: what it reports, on a tiny model. How fast anything is, is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import step_time


SCRIPT = Path(step_time.__file__)
TINY = "--layers 1 --hidden 32 --batch 2 --seq 8 --rounds 2 --steps 2".split()


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=280)


@pytest.mark.distributed
def test_tiny_model_gives_every_figure(tmp_path):
    done = run(*TINY, "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["settings"] == {"layers": 1, "hidden": 32, "batch": 2, "seq": 8, "rounds": 2, "steps": 2}
    assert list(result["methods"]) == ["adamw", "sam", "sampa"]
    for figures in result["methods"].values():
        assert len(figures["rounds"]) == 2 and min(figures["rounds"]) > 0
        assert figures["peak_bytes_per_process"] > 100e6  # torch alone takes more
    sent = {method: figures["bytes_sent_per_step_and_process"] for method, figures in result["methods"].items()}
    # One gradient in fp32; the independent processes exchange nothing.
    assert sent == {"adamw": 0, "sam": 0, "sampa": 4 * result["parameters"]}
    assert "SAMPa / AdamW" in done.stdout and "SAM / SAMPa" in done.stdout


def test_ratios_are_medians_over_neighbouring_rounds():
    def rounds(*seconds):
        return [{"seconds_per_step": s, "peak_bytes": 1.0, "bytes_per_step": 4.0, "parameters": 1.0} for s in seconds]

    # The machine slows down fourfold in the middle: the ratios do not show it.
    result = step_time.summarise(
        {"adamw": rounds(1.0, 4.0, 1.0), "sam": rounds(2.0, 8.0, 2.2), "sampa": rounds(1.1, 4.4, 1.1)}
    )
    assert result["sampa_over_adamw"] == pytest.approx(1.1)
    assert result["sam_over_adamw"] == pytest.approx(2.0)
    assert result["sam_over_sampa"] == pytest.approx(2.0 / 1.1)
    assert result["methods"]["sam"]["seconds_per_step"] == pytest.approx(2.2)


def test_help_answers():
    done = run("--help")
    assert done.returncode == 0 and "--rounds" in done.stdout and "two independent processes" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "100"], "--hidden expects a multiple of 32, the size of an attention head, got 100"),
        (["--rounds", "0"], "--rounds expects a whole number of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_a_process_that_fails_shows_its_log(tmp_path, monkeypatch):
    broken = tmp_path / "worker.py"
    broken.write_text("raise RuntimeError('out of memory')\n")
    monkeypatch.setattr(step_time, "WORKER", broken)
    with pytest.raises(SystemExit, match="(?s)A process of AdamW .*ended early.*log of process 0.*out of memory"):
        step_time.measure({"rounds": 1, "steps": 1})
