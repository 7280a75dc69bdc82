"""The demo as a person starts it, with one epoch per run, and what it measures."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import demo
import demo_runs
import digits_vit
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from tests.division import divided
from tests.ranks import Ran, run_script


DEMO = Path(demo.__file__)
ROW = re.compile(r"(BERT|ViT).*?(AdamW|SAMPa|SAM)\s+([\d.]+)%\s+(-?[\d.]+)\s+([\d.]+)\s+([\d.]+)\s")


def started(*arguments: str) -> subprocess.CompletedProcess:
    """The demo as a person starts it."""
    return subprocess.run([sys.executable, DEMO, *arguments], capture_output=True, text=True, timeout=280)


def forked(folder: Path, command: list[str], cwd: Path, env: dict[str, str], stderr) -> Ran:
    """What its `accelerate launch` starts, without the launcher."""
    script = command.index(str(demo.RUNS))
    prepare = partial(os.chdir, cwd)
    runs = run_script(*command[script:], processes=2, folder=folder, environment=env, prepare=prepare)
    stderr.writelines(run.stderr for run in runs)
    return max(runs, key=lambda run: abs(run.returncode))


@pytest.mark.distributed
@pytest.mark.parametrize("how", divided(["forked", "started"], whole=["started"]))
def test_demo_prints_one_table_and_writes_one_picture(how, tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--output_dir", str(tmp_path / "demo")]
    if how == "started":
        done = started(*arguments)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        monkeypatch.setattr(demo.subprocess, "run", partial(forked, tmp_path / "ranks"))
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
        demo.main()
        said = capsys.readouterr().out
    rows = ROW.findall(said)
    assert [row[:2] for row in rows] == [
        (model, name) for model in ("BERT", "ViT") for name in ("AdamW", "SAM", "SAMPa")
    ]
    for model, method, accuracy, sharpness, seconds, ratio in rows:
        assert 0 <= float(accuracy) <= 100 and float(seconds) > 0 and float(ratio) > 0, (model, method)
        # The loss rises along its own gradient, unless the step is far too long for the linear term to matter.
        assert 0 < float(sharpness) < 1, (model, method)
    assert [float(row[5]) for row in rows if row[1] == "AdamW"] == [1.0, 1.0]
    picture = imread(tmp_path / "demo" / "demo.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20
    assert "demo.png" in said


def test_demo_leaves_a_folder_alone_that_is_not_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2
    expected = f"expected a new folder or that of an earlier demo, but {tmp_path} holds something else"
    assert expected in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.distributed
def test_demo_shows_the_log_of_a_run_that_fails(tmp_path, monkeypatch):
    broken = tmp_path / "demo_runs.py"
    broken.write_text("raise RuntimeError('the disk is full')\n")
    monkeypatch.setattr(demo, "RUNS", broken)
    with pytest.raises(SystemExit, match="(?s)the disk is full.*Expected all runs to end well, but .* gave 1") as stop:
        demo.train(tmp_path, quick=True)
    assert str(broken) in str(stop.value)


class HalfSquaredNorm(nn.Module):
    """f(x) = ||x||^2 / 2, whose gradient is x."""

    def __init__(self, start: torch.Tensor):
        super().__init__()
        self.x = nn.Parameter(start)

    def forward(self):
        return type("Output", (), {"loss": self.x.square().sum() / 2})


def test_sharpness_is_the_rise_of_the_loss_along_its_gradient():
    start = torch.tensor([3.0, 4.0])
    # f(x + rho x / ||x||) - f(x) = rho ||x|| + rho^2 / 2
    assert demo_runs.sharpness(HalfSquaredNorm(start), {}, rho=0.1) == pytest.approx(0.1 * 5 + 0.005, rel=1e-5)


def test_digits_are_split_and_mislabelled_as_the_table_says():
    train_rows, test_rows = digits_vit.load_rows()
    assert (len(train_rows), len(test_rows)) == (1000, 797)
    images = torch.stack([row["pixel_values"] for row in train_rows])
    assert images.shape == (1000, 1, 8, 8) and images.min() == -1 and images.max() == 1
    digits = digits_vit.load_digits()
    true_labels = {image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}

    def share_wrong(rows):
        stored = [((row["pixel_values"][0].double() + 1) * 8).numpy().tobytes() for row in rows]
        wrong = [true_labels[key] != row["labels"] for key, row in zip(stored, rows, strict=True)]
        return sum(wrong) / len(wrong)

    assert share_wrong(train_rows) == pytest.approx(0.4, abs=1e-9)
    assert share_wrong(test_rows) == 0
