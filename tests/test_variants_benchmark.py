"""The comparison of variants: what it runs, what it keeps, and what it makes of it."""

from __future__ import annotations

import json

import pytest
import variants
from matplotlib.image import imread

from hf_sampa.variants import VARIANTS


QUICK = ["--only", "vasso", "ksam", "--epochs", "1", "--seeds", "1", "--rhos", "1"]


@pytest.mark.whole
@pytest.mark.distributed
def test_a_quick_comparison_is_finished_and_not_run_again(tmp_path, capsys, monkeypatch):
    command = [*QUICK, "--output_dir", str(tmp_path)]
    rows = variants.main(command)
    by_case = {(row["variant"], row["method"]): row for row in rows}
    assert by_case.keys() == {("adamw", "adamw"), ("vasso", "sam"), ("vasso", "sampa"), ("ksam", "sam")}
    assert by_case["adamw", "adamw"]["time"] == pytest.approx(1)
    assert by_case["vasso", "sam"]["passes"] == 2
    assert by_case["vasso", "sam"]["held"] == pytest.approx(5, abs=0.1)
    assert by_case["vasso", "sampa"]["passes"] == pytest.approx(2, abs=0.1)
    assert by_case["ksam", "sam"]["passes"] == pytest.approx(2 * 16 / 64, abs=0.1)
    assert by_case["ksam", "sam"]["forwards"] == 1
    assert all(0.05 < row["accuracy"][0] < 1 for row in rows)
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 5
    assert imread(tmp_path / "variants.png").std() > 0.01
    assert json.loads((tmp_path / "variants.json").read_text())[0]["accuracy"][0] == rows[0]["accuracy"][0]

    monkeypatch.setattr(variants.subprocess, "run", lambda *_, **__: pytest.fail("measured once more"))
    monkeypatch.setattr(variants, "write", lambda file, _: None if file.name == "variants.json" else pytest.fail(file))
    assert [row["accuracy"][0] for row in variants.main(command)] == [row["accuracy"][0] for row in rows]


def test_jobs():
    jobs = variants.make_jobs(list(VARIANTS), [1, 2], 3, 10)
    names = {(job["method"], job["variant"]) for job in jobs}
    assert names == {("adamw", "adamw")} | {(m, name) for name, v in VARIANTS.items() for m in v.timings}
    # AdamW, SAF and MESA do not perturb, so that there is no rho to search for.
    assert len(jobs) == 3 * 3 + 6 * (len(names) - 3)
    assert len({variants.file_of(job, variants.Path()) for job in jobs}) == len(jobs)


def test_the_radius_is_chosen_on_validation_and_scored_on_test():
    common = {"variant": "sam", "method": "sam", "seconds_per_step": 0.2, "passes": 2, "forwards": 0, "held": 5.0}
    results = [{**common, "variant": "adamw", "method": "adamw", "rho": 0.0, "validation": 0.1, "test": 0.2}]
    results[0]["seconds_per_step"] = 0.1
    results += [{**common, "rho": 0.05, "validation": 0.5, "test": value} for value in (0.90, 0.94)]
    results += [{**common, "rho": 0.10, "validation": 0.6, "test": value} for value in (0.70, 0.74)]
    row = variants.summarize(results, {})[0]
    assert (row["rho"], row["accuracy"][0], row["default"][0]) == (0.10, pytest.approx(0.72), pytest.approx(0.92))
    # Two values 0.04 apart: t(0.975, 1) = 12.706, standard deviation 0.0283.
    assert row["accuracy"][1] == pytest.approx(12.706 * 0.02828 / 2**0.5, rel=1e-3)
    assert row["time"] == pytest.approx(2)
