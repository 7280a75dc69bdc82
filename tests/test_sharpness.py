"""The picture of sharpness: what it measures, and that its smallest run ends well. Figures are those of a run by hand."""

from __future__ import annotations

import pytest
import sharpness
import torch
from matplotlib.image import imread
from torch import nn
from torch.nn.utils import parameters_to_vector


class Quadratic(nn.Module):
    """f(x) = 3 x_0^2 + x_1^2 / 2, whose Hessian has the eigenvalues 6 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2))

    def forward(self) -> dict[str, torch.Tensor]:
        return {"loss": 3 * self.x[0] ** 2 + self.x[1] ** 2 / 2}


def test_the_sharpest_direction_of_a_quadratic():
    model = Quadratic()
    eigenvalue, direction = sharpness.sharpest_direction(model, {})
    assert eigenvalue == pytest.approx(6)
    torch.testing.assert_close(direction.abs(), torch.tensor([1.0, 0.0]))
    distances = torch.linspace(-1, 1, 5)
    found = sharpness.rises(model, {}, direction, distances)
    torch.testing.assert_close(torch.tensor(found), 3 * distances**2)
    assert parameters_to_vector(model.parameters()).tolist() == [0, 0]


def test_the_smallest_run(tmp_path, capsys):
    results = sharpness.main(["--seeds", "1", "--epochs", "1", "--output_dir", str(tmp_path)])
    assert list(results) == [None, 0.1, 0.3]
    train_batch, test_batch = sharpness.load()
    assert (len(train_batch["labels"]), len(test_batch["labels"])) == (1000, 797)
    for runs in results.values():
        (run,) = runs
        assert 0.5 < run["accuracy"] < 1 and 0 < run["loss"] < 2.3
        distances = sharpness.DISTANCES["sharpest"]
        middle = len(distances) // 2
        assert run["sharpest"][middle] == run["random"][middle] == pytest.approx(0, abs=1e-6)
        # To second order the mean of both sides rises by r^2 / 2 times the curvature.
        near = (run["sharpest"][middle - 2] + run["sharpest"][middle + 2]) / 2
        assert near == pytest.approx(
            run["eigenvalue"] * distances[middle + 2].item() ** 2 / 2, rel=0.5
        )  # ReLU has kinks
        assert run["sharpest"][-1] >= run["sharpest"][0]
    assert len({run["loss"] for (run,) in results.values()}) == 3, "three trainings, not one"
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[1:4]] == ["AdamW", "SAMPa, rho 0.1", "SAMPa, rho 0.3"]
    assert imread(tmp_path / "sharpness.png").std() > 0.01


def test_the_run_is_repeatable():
    train_batch, _ = sharpness.load()
    one, other = (sharpness.train(0.1, 0, 0.2, train_batch) for _ in range(2))
    assert torch.equal(parameters_to_vector(one.parameters()), parameters_to_vector(other.parameters()))


def test_help_and_wrong_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sharpness.main(["--help"])
    assert stop.value.code == 0 and "with matplotlib" in capsys.readouterr().out
    for wrong in ("--seeds", "--epochs"):
        with pytest.raises(SystemExit) as stop:
            sharpness.main([wrong, "0"])
        assert stop.value.code == 2 and f"{wrong} expects a number above 0, got 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
