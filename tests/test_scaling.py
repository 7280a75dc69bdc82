"""The scaling benchmark: which points it measures, and what it makes of them. The measure itself is test_step_time's."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scaling
import step_time
from matplotlib.image import imread
from step_phases import PHASES


SECONDS = {"adamw": 1.0, "sam": 2.0, "sampa": 1.1}


class AnswersAtOnce:
    """Takes the place of two processes; every round but one is as slow as `SECONDS` says."""

    asked: list[tuple[str, int, int, str]] = []

    def __init__(self, worker, settings, stack, *, processes, together):
        self.settings, self.together, self.rounds = settings, together, 0

    def ask(self, line):
        method, layers, seq = (self.settings[name] for name in ("method", "layers", "seq"))
        self.asked.append((method, layers, seq, line))
        self.rounds += 1
        noise = 1.5 if (method, self.rounds) == ("sampa", 2) else 1.0
        return [
            {
                "seconds_per_step": SECONDS[method] * noise,
                "peak_bytes": 1,
                "bytes_per_step": 0,
                "parameters": 10**6,
                "milliseconds": dict.fromkeys(PHASES, 1.0),
            }
        ] * 2

    def tell(self, line): ...


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    scaling.main()


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys) -> tuple[Path, str, str]:
    """Folder, output and errors of a run on a grid of five points."""
    monkeypatch.setattr(step_time, "Group", AnswersAtOnce)
    monkeypatch.setattr(AnswersAtOnce, "asked", [])
    run(monkeypatch, "--output_dir", str(tmp_path / "new"), "--rounds", "3")
    return tmp_path / "new", *capsys.readouterr()


def test_both_lines_are_measured_and_their_crossing_once(measured):
    grid = [(2, 128), (6, 128), (12, 128), (6, 8), (6, 32)]
    rounds = ["go"] * 4 + ["profile"]
    assert AnswersAtOnce.asked == [
        (method, *point, line) for point in grid for line in rounds for method in ("adamw", "sam", "sampa")
    ]


def test_table_and_json_have_medians_and_ranges(measured):
    folder, output, errors = measured
    result = json.loads((folder / "scaling.json").read_text())
    assert result["settings"] == {"hidden": 384, "batch": 32, "rounds": 3, "steps": 2, "bf16": False}
    assert len(result["points"]) == 5
    for point in result["points"]:
        # The second answer is the first round that counts.
        assert point["sampa_over_adamw"] == pytest.approx([1.65, 1.1, 1.1])
        assert point["seconds_per_step"] == pytest.approx(SECONDS)
    assert output.count("1.10 (1.10 - 1.65)    2.00 (2.00 - 2.00)    1.82 (1.21 - 1.82)") == 5
    assert "two processes with one CPU thread each" in output.replace("\n", " ")
    assert "75/75" in errors  # the bar reaches its end


def test_picture_shows_the_points_and_is_drawn_again_from_the_figures(measured, tmp_path, monkeypatch):
    folder, _, _ = measured
    picture = imread(folder / "scaling.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 1000
    colors = np.unique((255 * picture[..., :3]).round().astype(int).reshape(-1, 3), axis=0).tolist()
    for color in scaling.COLORS.values():
        assert [int(color[i : i + 2], 16) for i in (1, 3, 5)] in colors
    asked = len(AnswersAtOnce.asked)
    run(monkeypatch, "--from_json", str(folder / "scaling.json"), "--output_dir", str(tmp_path / "again"))
    assert len(AnswersAtOnce.asked) == asked
    np.testing.assert_array_equal(imread(tmp_path / "again" / "scaling.png"), picture)
    assert not (tmp_path / "again" / "scaling.json").exists()


def test_one_point_is_a_grid():
    assert scaling.make_grid([4], [16]) == [{"layers": 4, "seq": 16}]
    assert scaling.make_grid([4, 2, 4], [16]) == [{"layers": 2, "seq": 16}, {"layers": 4, "seq": 16}]


def test_help_answers(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--help")
    assert stop.value.code == 0 and "longer sequences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0", "2"], "--layers expects a whole number of at least 1, got 0"),
        (["--seq", "8", "600"], "--seq expects at most 512 tokens, the places that BERT has, got 600"),
        (["--hidden", "100"], "--hidden expects a multiple of 32, the size of an attention head, got 100"),
        (["--from_json", "no.json"], "--from_json expects the scaling.json of an earlier run, but no.json is no file"),
    ],
)
def test_wrong_settings_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
