"""Comparisons: what their files may say, which runs follow, what is done of them when, and what is said in the end."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import run_glue
import torch
import yaml
from make_sample import make_tiny_bert
from safetensors.torch import load_file, save_file
from scipy import stats

from hf_sampa.compare import choosing, command, config, figures, landscape, pictures
from hf_sampa.compare.carry_out import Executor, alone, slots
from hf_sampa.compare.holding import HELD, held
from hf_sampa.compare.runs import choosing as choosing_runs
from hf_sampa.compare.runs import scored, timed


ROOT = Path(__file__).parents[1]
STUB = (sys.executable, "-S", str(Path(__file__).with_name("compare_stub.py")))
GIVEN = {
    "script": "script.py",
    "arguments": {"num_train_epochs": 2, "learning_rate": 0},
    "metric": "accuracy",
    "tasks": {"A": {"task_name": "a"}, "B": {"task_name": "b"}},
    "methods": {"AdamW": {"method": "adamw"}, "SAM": {"method": "sam"}, "SAMPa": {"method": "sampa"}},
    "seeds": [1, 2, 3],
}
CHOOSE = {
    "arguments": {"train_val_split": 0.2},
    "seeds": [7],
    "values": {
        "AdamW": {"learning_rate": [0.01, 0.03, 0.02]},
        "SAM": {"rho": [0.01, 0.05, 0.1]},
        "SAMPa": {"rho": [0.01], "lmbda": [0, 0.1, 0.2]},
    },
}


def written(folder: Path, **changes) -> Path:
    (folder / "script.py").touch()
    file = folder / "few.yaml"
    file.write_text(yaml.safe_dump({**GIVEN, **changes}, sort_keys=False))
    return file


# ---- What a file may say ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, r"seeds: expected whole numbers from 0 up, each once, got \[\]"),
        ({"seeds": [1, 1]}, "each once, got"),
        ({"script": "other.py"}, "script: expected the path of a script, from the folder of this file, got 'other.py'"),
        ({"sedes": [1]}, "the file: expected only script, .*, got 'sedes'. Leave it out"),
        ({"metric": {"A": "accuracy"}}, "metric: expected one name, or one for each of A, B"),
        ({"tasks": {"A/B": {}}}, "tasks: expected names that can be those of folders, got 'A/B'"),
        ({"arguments": {"seed": 1}}, "arguments: expected arguments that no comparison sets itself, got 'seed'"),
        ({"arguments": {"rho": [1, 2]}}, "arguments: rho: expected one value, .* Several values belong under choose"),
        ({"launch": "gpu_3"}, "launch: expected one of cpu_2_processes, .*, got 'gpu_3'"),
        ({"equal_time": "SAM"}, "equal_time: expected a section time beside it"),
        ({"equal_time": "AdamW", "time": {"steps": 3}}, "equal_time: expected one of SAM, SAMPa, got 'AdamW'"),
        ({"time": {"steps": 0}}, "time: steps: expected a whole number of at least 1, got 0"),
        ({"methods": {"SAM": {"task_name": "b"}}}, "tasks: A: expected arguments that the method SAM has not, got 'task_name'"),
        (
            {"choose": {**CHOOSE, "values": {**CHOOSE["values"], "AdamW": {"learning_rate": [0.1]}}}},
            "choose: values: expected as many combinations for every method, got .*'AdamW': 1, 'SAM': 3.*finds more by chance",
        ),
        (
            {"choose": {**CHOOSE, "values": {"SAM": {"rho": [1]}}}},
            "choose: values: expected values for each of AdamW, SAM, SAMPa",
        ),
        ({"choose": {**CHOOSE, "arguments": {}}}, "choose: arguments: expected those with which .* held out, got {}"),
        ({"choose": {**CHOOSE, "arguments": {"method": "adamw"}}}, "choose: arguments: .* no other place, got 'method'"),
        ({"choose": {**CHOOSE, "values": dict.fromkeys(CHOOSE["values"], {"task_name": ["a", "b"]})}}, "no other place, got 'task_name'"),
        ({"choose": {**CHOOSE, "values": dict.fromkeys(CHOOSE["values"], {"x": []})}}, r"AdamW: x: expected values, each once, got \[\]"),
        ({"choose": {**CHOOSE, "values": dict.fromkeys(CHOOSE["values"], {"x": [1, 1]})}}, "x: expected values, each once"),
        ({"choose": {}}, "choose: arguments: expected a value, got None"),
        ({"arguments": {}, "choose": CHOOSE}, "choose: values: SAM: expected learning_rate, which is chosen for AdamW, .* got None"),
        ({"choose": {**CHOOSE, "arguments": {"validation_dir": None}}}, "choose: arguments: expected those with which"),
        ({"time": []}, r"time: expected names with values, got \[\]"),
        ({"seeds": [[1]]}, "seeds: expected whole numbers"),
        ({"launch": ["x"]}, r"launch: expected one of .*, got \['x'\]"),
        ({"metric": ""}, "metric: expected one name"),
        ({"better": "most"}, "better: expected more or less, got 'most'"),
        ({"tasks": {"A": []}}, r"tasks: A: expected arguments of the script by name, got \[\]"),
        ({"tasks": {"A": {}, "B": {}}}, "tasks: expected something else under every name, got 'A and B'"),
        ({"methods": {"AdamW": {"x": 1}, "SAM": {"x": 1}}}, "methods: expected something else under every name"),
        ({"methods": {"..": {}}}, "methods: expected names that can be those of folders, got '..'"),
        ({"methods": {"_x": {}}}, "names that can be those of folders"),
        ({"methods": {"$x$": {}}}, "names that can be those of folders"),
        ({"methods": {"a" * 101: {}}}, "names that can be those of folders"),
        ({"methods": {"a\tb": {}}}, "names that can be those of folders"),
        ({"arguments": {1: 2}}, "arguments: expected names of arguments, got 1"),
        ({"equal_time": "SAM", "time": {}, "arguments": {}}, "equal_time: expected num_train_epochs among the arguments of A"),
        ({"equal_time": "SAM", "time": {}, "methods": {**GIVEN["methods"], "AdamW, time of SAM": {}}}, "got 'AdamW, time of SAM'"),
        ({"landscape": {"points": 6}}, "landscape: points: expected a multiple of 4, got 6"),
        ({"landscape": {}, "methods": {"AdamW": {}}}, "landscape: expected two methods"),
        ({"prepare": [""]}, "prepare: expected commands, got ''"),
        ({"prepare": ["python 'x"]}, "prepare: expected commands"),
        ({"paper": "x"}, "paper: expected names with values, got 'x'"),
        ({"paper": {"rows": {"SAM": {"C": 1}}}}, "paper: SAM: expected what was reported by task, of A, B"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_run_or_would_not_be_fair_is_refused(tmp_path, changes, words):
    file = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        config.read(file)


def test_no_yaml(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: [")
    with pytest.raises(ValueError, match="expected YAML, got something else"):
        config.read(file)
    file.write_text("seeds: [1]\nmethods: {A: {}, A: {x: 1}}\n")
    with pytest.raises(ValueError, match="expected YAML, got something else: 'A' is there twice"):
        config.read(file)
    file.write_text("words")
    with pytest.raises(ValueError, match="the file: expected names with values, got 'words'"):
        config.read(file)


def test_the_files_of_the_project_can_be_read():
    """And what the help shows of such a file."""
    root = Path(__file__).parents[1]
    for folder in ("glue", "vit_finetune", "benchmarks/evidence"):
        for file in root.glob(f"{folder}/*.yaml"):
            assert config.read(file).script.is_file()
    shown = config.__doc__.split("code-block:: yaml")[1]
    of_page = re.search(r"```yaml\n(.*?)```", (root / "docs" / "comparing.md").read_text(), re.DOTALL)[1]
    for text in (shown, of_page):
        assert config._Reader(root / "glue" / "shown.yaml").comparison(yaml.safe_load(text)).first == "AdamW"


# ---- Which runs follow ----


def test_every_method_has_the_same_seeds_and_no_other_arguments(tmp_path):
    comparison = config.read(written(tmp_path))
    chosen = choosing.settings(comparison, [], tmp_path)
    runs = list(scored(comparison, chosen, {}))
    assert len(runs) == 2 * 3 * 3
    assert [run.seed for run in runs] == [1] * 6 + [2] * 6 + [3] * 6
    for run in runs:
        assert run.arguments == {
            **GIVEN["arguments"],
            **GIVEN["tasks"][run.task],
            **GIVEN["methods"][run.method],
        }
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)


def test_files_of_one_name_have_folders_of_their_own(tmp_path):
    """The project has two that are called quick.yaml."""
    for folder in ("glue", "vit"):
        (tmp_path / folder).mkdir()
    names = [config.read(written(tmp_path / folder)).name for folder in ("glue", "vit")]
    assert names == ["glue/few", "vit/few"]


def test_an_argument_of_all_runs_can_be_left_out_where_settings_are_chosen(tmp_path):
    """As the folder of validation images, where they are held out of the training images instead."""
    choose = {**CHOOSE, "arguments": {"num_train_epochs": None, "train_val_split": 0.2}}
    comparison = config.read(written(tmp_path, choose=choose))
    for run in choosing_runs(comparison):
        assert "num_train_epochs" not in run.arguments and run.arguments["train_val_split"] == 0.2
    assert config.as_text(comparison.choose.arguments) == "--train_val_split 0.2"
    with pytest.raises(ValueError, match="arguments: num_train_epochs: expected one value, got None"):
        config.read(written(tmp_path, arguments={"num_train_epochs": None}))


def test_other_arguments_are_another_run(tmp_path):
    first = next(scored(config.read(written(tmp_path)), {("A", "AdamW"): {}}, {}))
    again = next(scored(config.read(written(tmp_path)), {("A", "AdamW"): {}}, {}))
    other = next(scored(config.read(written(tmp_path, arguments={"num_train_epochs": 3})), {("A", "AdamW"): {}}, {}))
    assert first.folder(tmp_path) == again.folder(tmp_path) != other.folder(tmp_path)


def test_chosen_by_the_mean_over_the_seeds(tmp_path):
    """Never by what is scored later; of a loss the smallest."""
    comparison = config.read(written(tmp_path, choose={**CHOOSE, "seeds": [7, 8]}))
    runs = list(choosing_runs(comparison))
    assert len(runs) == 2 * 3 * 3 * 2
    assert all(run.arguments["train_val_split"] == 0.2 for run in runs)
    for run in runs:
        # The middle value is the best one, but for B with SAM, of whose first value one run is missing.
        value = list(run.values.values())[-1]
        good = value in (0.03, 0.05, 0.1) and not (run.method == "SAM" and value == 0.1)
        run.folder(tmp_path).mkdir(parents=True)
        if (run.task, run.method, value, run.seed) != ("B", "SAM", 0.05, 8):
            score = 0.6 + 0.1 * good + (run.seed == 8) * 0.3
            run.write(tmp_path, "result.json", {"metrics": {"eval_accuracy": score}})
    chosen = choosing.settings(comparison, runs, tmp_path)
    assert chosen["A", "AdamW"] == chosen["B", "AdamW"] == {"learning_rate": 0.03}
    assert chosen["A", "SAM"] == {"rho": 0.05}
    assert chosen["B", "SAM"] == {"rho": 0.01}  # the first of two that are equal
    assert chosen["A", "SAMPa"] == {"rho": 0.01, "lmbda": 0.1}


@pytest.mark.parametrize(
    ("metric", "better", "less"),
    [("eval_loss", None, True), ("accuracy", None, False), ("wer", None, True), ("error_rate", None, True)]
    + [("loss", "more", False), ("distance", "less", True)],
)
def test_which_score_is_the_better_one(tmp_path, metric, better, less):
    assert config.read(written(tmp_path, metric=metric, better=better)).is_less_better("A") == less


def test_a_choice_at_an_end_of_what_was_tried_is_named(tmp_path, stubbed):
    methods = {"AdamW": {"method": "adamw", "nan_at": 0.03}, "SAM": {"method": "sam", "nan_at": 0.05}}
    values = {"AdamW": {"learning_rate": [0.03, 0.02, 0.01]}, "SAM": {"rho": [0.05, 0.1, 0.2]}}
    stubbed(written(tmp_path, methods=methods, choose={**CHOOSE, "values": values}, seeds=[1]))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| AdamW | --learning_rate 0.02 | --learning_rate 0.02 |" in report  # between the two others
    assert "beyond which a better value may lie: rho 0.05 (SAM, A); rho 0.05 (SAM, B).\n" in report


def test_a_score_that_is_no_number_is_not_the_best(tmp_path, stubbed):
    methods = {"AdamW": {"method": "adamw", "nan_at": 0.03}}
    choose = {**CHOOSE, "values": {"AdamW": {"learning_rate": [0.03, 0.02, 0.01]}}}
    stubbed(written(tmp_path, methods=methods, choose=choose, seeds=[1]))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| AdamW | --learning_rate 0.02 | --learning_rate 0.02 |" in report
    assert "2 of these 6 runs have no score, and their combinations were left out" in report


def test_a_score_that_is_no_number_is_left_out_of_the_means(tmp_path, stubbed):
    stubbed(written(tmp_path, tasks={"A": {"nan_at": 2}}))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| SAM | 50.2 ± 1.3 (0.1; 2 of 3 seeds) |" in report
    assert "| SAM | +0.0 (+0.0 to +0.0; 2 of 3 seeds) |" in report


def test_the_first_method_gets_the_epochs_that_take_the_time_of_another(tmp_path):
    arguments = {"num_train_epochs": 2, "diagnostics_steps": 10}
    comparison = config.read(written(tmp_path, arguments=arguments, time={"steps": 5, "rounds": 3}, equal_time="SAM"))
    seconds = {"AdamW": [1.0, 2.0, 4.0], "SAM": [2.0, 3.0, 10.0], "SAMPa": [1.0, 2.2, 4.4]}
    assert choosing.ratios(seconds, "AdamW") == pytest.approx({"AdamW": 1, "SAM": 2, "SAMPa": 1.1})
    rounds = list(timed(comparison, {}))
    longer = choosing.longer(comparison, rounds, seconds, tmp_path)
    assert longer == {"AdamW, time of SAM": 2.0}
    # What has been said is kept, as long as the same is timed: the runs that follow from it would be others.
    slower = {**seconds, "SAM": [9.0, 9.0, 9.0]}
    assert choosing.longer(comparison, rounds, slower, tmp_path) == longer
    assert choosing.longer(comparison, rounds[:2], slower, tmp_path) == {"AdamW, time of SAM": 4.5}
    runs = [
        run for run in scored(comparison, choosing.settings(comparison, [], tmp_path), longer) if run.method in longer
    ]
    assert [run.arguments["num_train_epochs"] for run in runs] == [4] * 6
    assert all(run.arguments["method"] == "adamw" for run in runs)
    assert [[run.method for run in each] for each in rounds] == [["AdamW", "SAM", "SAMPa"]] * 3
    assert {run.launch for each in rounds for run in each} == {"cpu_2_processes"}
    assert all("diagnostics_steps" not in run.arguments for each in rounds for run in each)


# ---- What is said ----


def test_means_have_the_interval_of_student():
    found = figures.mean([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert found.interval == pytest.approx((low, high))
    assert found.deviation == pytest.approx(1.5275, abs=1e-4)
    assert figures.mean([3.0]).half != figures.mean([3.0]).half  # nan


def test_differences_are_of_equal_seeds():
    found = figures.difference({1: 0.9, 2: 0.7, 4: 0.1}, {1: 0.8, 2: 0.5, 3: 0.2})
    assert (found.value, found.count) == (pytest.approx(0.15), 2)
    assert figures.difference({1: 0.5}, {2: 0.5}) is None


def test_over_tasks_by_the_signed_rank_test():
    found = figures.over_tasks([0.1, 0.2, 0.3, 0.4, 0.5, -0.05])
    assert found.tasks == 6
    assert found.probability == pytest.approx(2 * 2 / 2**6)
    assert figures.over_tasks([1.0, 2.0, 3.0]).probability == pytest.approx(figures.smallest_probability(3))
    assert figures.over_tasks([0.0, 0.0]).probability == 1
    assert figures.over_tasks([0.1]) is None


def test_equal_gains_and_losses_are_no_difference():
    """In floating point their sum is 4e-17."""
    own, first = ({seed: k / 277 for seed, k in enumerate(each)} for each in ((194, 241, 182), (192, 242, 183)))
    found = figures.difference(own, first)
    assert found.value == 0 and found.deviation > 0
    assert figures.over_tasks([found.value, 0.01, 0.02, 0.03, 0.04]).probability == pytest.approx(0.125)
    # And equal ones have one rank.
    assert figures.over_tasks([0.3, 0.1 + 0.2, -0.1, 0.5]).probability == stats.wilcoxon([0.3, 0.3, -0.1, 0.5]).pvalue


# ---- Carried out ----


def test_a_search_finds_again_what_it_found(tmp_path, stubbed):
    """By ranges: all methods have as many trials, and a second call runs nothing."""
    ranges = {"low": 0.001, "high": 0.1, "log": True}
    choose = {
        "arguments": {"train_val_split": 0.2},
        "seeds": [7, 8],
        "trials": 4,
        "values": {
            "AdamW": {"learning_rate": ranges},
            "SAM": {"rho": {"low": 0, "high": 1}},
            "SAMPa": {"rho": ranges},
        },
    }
    file = written(tmp_path, choose=choose, tasks={"A": {}}, seeds=[1])
    stubbed(file, "--search", "4")
    of_choosing = [call for call in calls(tmp_path / "out") if "train_val_split" in call]
    assert len(of_choosing) == 3 * 4 * 2
    rates = {float(call["learning_rate"]) for call in of_choosing if call["method"] == "adamw"}
    assert len(rates) == 4 and all(0.001 <= rate <= 0.1 for rate in rates)
    scored_with = [call for call in calls(tmp_path / "out") if "train_val_split" not in call]
    # The stub's score grows with the learning rate.
    assert float(next(c for c in scored_with if c["method"] == "adamw")["learning_rate"]) == max(rates)
    assert "Of 4 trials for every method" in (tmp_path / "out" / "report.md").read_text()
    before = len(calls(tmp_path / "out"))
    stubbed(written(tmp_path, choose={**choose, "trials": 4}, tasks={"A": {}}, seeds=[1]))
    assert len(calls(tmp_path / "out")) == before


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([1, 2], r"rho: expected a range, as trials are to be searched in, got \[1, 2\]"),
        ({"low": 1, "high": 1}, "rho: expected low below high, and above 0 with log"),
        ({"low": 0, "high": 1, "log": True}, "rho: expected low below high, and above 0 with log"),
        ({"low": "1e-3", "high": 1}, "rho: expected low and high as numbers, .*Write 1.0e-3, and not 1e-3"),
        ({"low": 0, "high": float("inf")}, "rho: expected low and high as numbers"),
        ({"low": 0, "high": 1, "log": "no"}, "rho: log: expected true or false, got 'no'"),
    ],
)
def test_ranges_that_are_none(tmp_path, ranges, words):
    methods = {"SAM": {"method": "sam"}}
    choose = {"arguments": {"x": 1}, "seeds": [1], "trials": 2, "values": {"SAM": {"rho": ranges}}}
    with pytest.raises(ValueError, match=words):
        config.read(written(tmp_path, methods=methods, choose=choose))


@pytest.fixture
def stubbed(monkeypatch):
    """Comparisons in this process whose runs are the stub's."""
    monkeypatch.setattr(command, "Executor", lambda script, root: Executor(script, root, STUB))

    def run(file: Path, *words: str) -> None:
        command.main([str(file), "--output_dir", str(file.parent / "out"), *words])

    return run


def command_line(file: Path, out: Path, *words: str) -> list[str]:
    """Of a process of its own whose runs are the stub's."""
    program = (
        "import sys; from hf_sampa.compare import command; from hf_sampa.compare.carry_out import Executor\n"
        f"command.Executor = lambda script, root: Executor(script, root, {STUB!r})\n"
        "command.main(sys.argv[1:])"
    )
    return [sys.executable, "-c", program, str(file), "--output_dir", str(out), *words]


def calls(folder: Path) -> list[dict]:
    lines = [line for file in folder.rglob("calls.txt") for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_from_the_file_to_the_report(tmp_path, stubbed, capsys):
    file = written(tmp_path, choose=CHOOSE, time={"steps": 5, "rounds": 2}, equal_time="SAM")
    stubbed(file, "--jobs", "2")
    out = tmp_path / "out"
    with (out / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["phase"] for row in rows] == ["choose"] * 18 + ["time"] * 6 + ["score"] * 24
    adamw = [row for row in rows if (row["phase"], row["task"], row["method"]) == ("score", "A", "AdamW")]
    assert [float(row["score"]) for row in adamw] == pytest.approx([0.531, 0.532, 0.533])
    assert {row["values"] for row in adamw} == {"--learning_rate 0.03"}
    report = (out / "report.md").read_text()
    assert report.strip() in capsys.readouterr().out
    assert "| AdamW | 53.2 ± 0.2 (0.1) | 53.2 ± 0.2 (0.1) | 53.2 |" in report
    assert "| SAM | -3.0 (-3.0 to -3.0) | -3.0 (-3.0 to -3.0) | -3.0; better on 0 of 2; p 0.5 |" in report
    assert "| SAM | 2 | 2 - 2 | 2.00 |" in report
    assert "AdamW, time of SAM | --method adamw" not in report
    assert "as AdamW, with 2 times its epochs" in report
    # The page has its pictures in it, and asks for nothing.
    page = (out / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == len(list(out.glob("*.png"))) == 5
    assert all(base64.b64decode(each).startswith(b"\x89PNG") for each in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)

    from datasets import Dataset

    table = Dataset.from_parquet(str(out / "results.parquet"), cache_dir=tmp_path / "cache")
    assert table["score"] == [float(row["score"]) if row["score"] else None for row in rows]
    assert all((row["score"] == "") == (row["phase"] == "time") for row in rows)
    assert table["course"][-1][0] == pytest.approx([1, table["score"][-1] - 0.1])

    # Called again it runs nothing.
    before = len(calls(out))
    stubbed(file)
    assert len(calls(out)) == before == len(rows)


def test_methods_are_told_apart_by_colour_and_mark():
    look = pictures.Look([f"method {i}" for i in range(20)])
    assert len({(own["color"], own["marker"]) for own in map(look.of, look.methods)}) == 20


@pytest.mark.parametrize(("tasks", "longest"), [(1, 8), (1, 30), (1, 60), (4, 30)])
def test_a_legend_stays_within_the_picture(tmp_path, monkeypatch, tasks, longest):
    figures_made = []
    plain = pictures._panels
    monkeypatch.setattr(
        pictures, "_panels", lambda *given, **more: figures_made.append(made := plain(*given, **more)) or made
    )
    look = pictures.Look([f"method {i} ".ljust(longest, "x") for i in range(9)])
    runs = {method: [[(1, 0.1 * i), (2, 0.2 * i)]] for i, method in enumerate(look.methods)}
    pictures.courses({f"task {i}": runs for i in range(tasks)}, look, "accuracy, %", tmp_path / "courses.png")
    (figure, _), (legend,) = figures_made[0], figures_made[0][0].legends
    box = legend.get_window_extent()
    assert [each.get_text() for each in legend.get_texts()] == look.methods
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, stubbed, capsys):
    methods = {**GIVEN["methods"], "SAM": {"method": "sam", "fail": 1}}
    file = written(tmp_path, methods=methods, seeds=[4])
    with pytest.raises(
        SystemExit, match="2 runs failed; the report names them. Called again, this command tries them"
    ):
        stubbed(file)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "FAILED (1): score, A, SAM, seed 4" in report and "boom: expected a better day" in report
    assert "| SAMPa | 50.4 |" in report
    assert (
        "| method | arguments |\n| --- | --- |" in report
        and "| method | A | B | mean of tasks |\n| --- | ---: | ---: | ---: |" in report
    )
    assert "boom" in capsys.readouterr().err
    stubbed(file)
    assert "failed" not in (tmp_path / "out" / "report.md").read_text()
    assert [call["method"] for call in calls(tmp_path / "out")].count("sam") == 4
    assert [call["method"] for call in calls(tmp_path / "out")].count("adamw") == 2


def test_means_of_fewer_seeds_say_so(tmp_path, stubbed):
    stubbed(written(tmp_path, seeds=[4]))
    stubbed(written(tmp_path, seeds=[4, 5, 6]), "--report")
    assert (
        "| SAMPa | 50.4 (1 of 3 seeds) | 50.4 (1 of 3 seeds) | 50.4 |" in (tmp_path / "out" / "report.md").read_text()
    )
    stubbed(written(tmp_path, seeds=[4, 5, 6]))
    assert "seeds)" not in (tmp_path / "out" / "report.md").read_text()


def test_settings_are_told_as_soon_as_they_are_chosen(tmp_path, stubbed):
    stubbed(written(tmp_path, choose=CHOOSE, seeds=[1]))
    stubbed(written(tmp_path, choose=CHOOSE, seeds=[2]), "--report")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "No run that is scored is done." in report
    assert "| AdamW | --learning_rate 0.03 | --learning_rate 0.03 |" in report


def test_a_score_that_is_not_there_is_named(tmp_path, stubbed, capsys):
    file = written(tmp_path, metric="f1", seeds=[1], tasks={"A": {}}, methods={"AdamW": {"method": "adamw"}})
    with pytest.raises(SystemExit):
        stubbed(file)
    assert "metric: expected one of accuracy, loss, got f1" in capsys.readouterr().err
    # Corrected, nothing is trained once more.
    stubbed(written(tmp_path, seeds=[1], tasks={"A": {}}, methods={"AdamW": {"method": "adamw"}}))
    assert len(calls(tmp_path / "out")) == 1 and "| AdamW | 50.1 |" in (tmp_path / "out" / "report.md").read_text()


def test_a_script_without_scores_is_told_after_one_run(tmp_path, stubbed, capsys):
    with pytest.raises(SystemExit):
        stubbed(written(tmp_path, arguments={"silent": 1}), "--jobs", "1")
    assert "expected one of those that the script computes, which are none, got accuracy" in capsys.readouterr().err
    assert len(calls(tmp_path / "out")) == 1


def test_another_metric_is_not_the_old_one_under_a_new_name(tmp_path, stubbed):
    stubbed(written(tmp_path, seeds=[1]))
    stubbed(written(tmp_path, seeds=[1], metric="loss"))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Loss (less is better)" in report and "| SAM | 0.1000 | 0.1000 | 0.1000 |" in report
    assert len(calls(tmp_path / "out")) == 6


def test_another_script_has_runs_of_its_own(tmp_path, stubbed):
    stubbed(written(tmp_path, seeds=[1]))
    (tmp_path / "other.py").touch()
    stubbed(written(tmp_path, seeds=[1], script="other.py"))
    assert len(calls(tmp_path / "out")) == 12


def test_a_folder_is_one_comparison_s(tmp_path, stubbed, capsys):
    stubbed(written(tmp_path, seeds=[1]))
    (tmp_path / "b").mkdir()
    with pytest.raises(SystemExit):
        command.main([str(written(tmp_path / "b")), "--output_dir", str(tmp_path / "out")])
    assert re.search(
        r"--output_dir: expected a folder for .*b/few.yaml, but .*out has the runs of", capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        command.main([str(written(tmp_path)), "--output_dir", str(tmp_path / "typo"), "--report"])
    assert "--report: expected the folder of a comparison" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_methods_that_differ_in_their_updates_are_named(tmp_path, stubbed):
    stubbed(
        written(tmp_path, seeds=[1], methods={"AdamW": {"method": "adamw"}, "SAM": {"method": "sam", "batch_size": 8}})
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert "**The methods differ in batch_size**" in report and "same number of updates" not in report


def test_scores_of_several_kinds_have_no_mean(tmp_path, stubbed):
    stubbed(written(tmp_path, seeds=[1], metric={"A": "accuracy", "B": "loss"}))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| method | A | B |\n" in report and "mean of tasks" not in report
    assert "better on 0 of 2 |" in report and "; p " not in report


def test_differences_of_losses_have_one_sign(tmp_path, stubbed):
    tasks = {"A": {"learning_rate": 0}, "B": {"learning_rate": 0.1}}
    methods = {"AdamW": {"method": "adamw"}, "SAM": {"method": "sam", "loss": 0.05}}
    stubbed(written(tmp_path, tasks=tasks, methods=methods, metric="loss", seeds=[1, 2]))
    assert "-0.0500; better on 2 of 2" in (tmp_path / "out" / "report.md").read_text()


def test_a_report_names_what_failed_before_and_every_commit(tmp_path, stubbed):
    methods = {"AdamW": {"method": "adamw"}, "SAM": {"method": "sam", "fail": 9}}
    file = written(tmp_path, methods=methods, tasks={"A": {}}, seeds=[1, 2])
    with pytest.raises(SystemExit):
        stubbed(file)
    result = next((tmp_path / "out").rglob("seed-2-*/result.json"))
    result.write_text(json.dumps({**json.loads(result.read_text()), "commit": "0123abc"}))
    with pytest.raises(SystemExit):
        stubbed(file, "--report")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "FAILED (1): score, A, SAM, seed 1" in report
    assert "Commit 0123abc, Python" in report and report.count("\nCommit ") == 2


def test_a_wrong_argument_is_told_once(tmp_path, stubbed, capsys):
    file = written(tmp_path, arguments={"fail": 1, "say": "error: unrecognized arguments: --lerning_rate"})
    with pytest.raises(SystemExit):
        stubbed(file, "--jobs", "1")
    said = capsys.readouterr().err
    assert "script.py takes no such argument" in said and "--lerning_rate" in said
    assert len(calls(tmp_path / "out")) == 1


def test_a_damaged_result_is_named(tmp_path, stubbed, capsys):
    file = written(tmp_path, seeds=[1], tasks={"A": {}})
    stubbed(file)
    result = next((tmp_path / "out").rglob("result.json"))
    result.write_text(result.read_text()[:30])
    with pytest.raises(SystemExit):
        stubbed(file)
    assert f"{result}: expected what was written there, got something else" in capsys.readouterr().err


def test_two_calls_at_once_run_everything_once(tmp_path):
    prepared = tmp_path / "prepared.txt"
    prepare = [f"""{sys.executable} -c 'open("{prepared}", "a").write("once")'"""]
    file = written(tmp_path, arguments={"brief": 0.3}, tasks={"A": {}}, prepare=prepare)
    both = [subprocess.Popen(command_line(file, tmp_path / "out", "--jobs", "1"), cwd=ROOT) for _ in range(2)]
    assert [each.wait(240) for each in both] == [0, 0]
    assert len(calls(tmp_path / "out")) == 9
    assert prepared.read_text() == "once"


@pytest.mark.parametrize(("name", "words"), [(HELD, ["--report"]), (".prepare.held", [])])
def test_calls_at_once_take_turns_at_what_is_of_all_runs(tmp_path, stubbed, name, words):
    file, said = written(tmp_path, seeds=[1], tasks={"A": {}}, prepare=["python -c 0"]), tmp_path / "said.txt"
    stubbed(file)
    until = time.monotonic() + 240
    with said.open("w") as stderr, held(tmp_path / "out" / name):
        another = subprocess.Popen(command_line(file, tmp_path / "out", *words), cwd=ROOT, stderr=stderr)
        while "is at it; waiting" not in said.read_text() and time.monotonic() < until:
            assert another.poll() is None
            time.sleep(0.05)
    assert another.wait(240) == 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_call_that_waits_for_another_one_can_be_ended(tmp_path):
    file = written(tmp_path, seeds=[1], tasks={"A": {"sleep": 60}}, methods={"AdamW": {"method": "adamw"}})
    out, said = tmp_path / "out", tmp_path / "said.txt"
    with subprocess.Popen(command_line(file, out), cwd=ROOT) as first, said.open("w") as stderr:
        until = time.monotonic() + 240
        while not list(out.rglob("checkpoint-1")) and time.monotonic() < until:
            time.sleep(0.05)
        with subprocess.Popen(command_line(file, out), cwd=ROOT, stderr=stderr) as second:
            while "is at it; waiting" not in said.read_text() and time.monotonic() < until:
                time.sleep(0.05)
            begun = time.monotonic()
            second.terminate()
            assert second.wait(30) == 128 + signal.SIGTERM and time.monotonic() - begun < 20
        first.terminate()


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path, stubbed):
    """It could never be resumed from."""
    file = written(
        tmp_path, seeds=[1], tasks={"A": {"torn": 1, "sleep": 0.1, "fail": 1}}, methods={"AdamW": {"method": "adamw"}}
    )
    with pytest.raises(SystemExit):
        stubbed(file)
    output = next((tmp_path / "out").rglob("output"))
    (output / "checkpoint-1").mkdir()
    stubbed(file)
    assert [call.get("resume_from_checkpoint") for call in calls(tmp_path / "out")] == [None, None]


def test_preparations_are_those_of_a_folder(tmp_path, stubbed, monkeypatch, capsys):
    file = written(tmp_path, seeds=[1], prepare=["python -c \"open('made', 'a').write('x')\""])
    for folder in ("one", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        stubbed(file)
    assert [(tmp_path / folder / "made").read_text() for folder in ("one", "two")] == ["x", "x"]
    for line, words in (
        ("python -c 1/0", "got exit code 1 of: python -c 1/0. It was called in"),
        ("nosuch", "can be started"),
    ):
        with pytest.raises(SystemExit):
            stubbed(written(tmp_path, seeds=[1], prepare=[line]))
        assert words in capsys.readouterr().err


def test_without_a_landscape_there_is_a_report(tmp_path, stubbed):
    with pytest.raises(SystemExit, match="1 run failed"):
        stubbed(written(tmp_path, seeds=[1], landscape={}))
    report = (tmp_path / "out" / "report.md").read_text()
    assert re.search("landscape: expected losses of trained models from .*script.py, got exit code 1", report)
    assert "AttributeError" in report and "| SAM | 50.1 |" in report


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_it_continues_from_the_checkpoints(tmp_path, number):
    file = written(tmp_path, seeds=[1, 2], tasks={"A": {"sleep": 600}}, methods={"AdamW": {"method": "adamw"}})
    out = tmp_path / "out"
    words = command_line(file, out, "--jobs", "2")
    # What a shell starts in the background ignores SIGINT, and so does all that it starts.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, stderr=subprocess.PIPE, cwd=ROOT, preexec_fn=heard) as process:
        until = time.monotonic() + 240
        while len(list(out.rglob("checkpoint-1"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) != 0
    # Killed, it cannot end its runs: they hold their folders, for which the next call waits.
    assert len(_stubs(out)) == (2 if number == signal.SIGKILL else 0)
    said = tmp_path / "said.txt"
    with said.open("w") as stderr, subprocess.Popen(words, stderr=stderr, cwd=ROOT) as again:
        while _stubs(out) and "another call is at it" not in said.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        for stub in _stubs(out):
            os.kill(stub, signal.SIGKILL)
        assert again.wait(120) == 0, said.read_text()
    assert ("another call is at it" in said.read_text()) == (number == signal.SIGKILL)
    assert [call.get("resume_from_checkpoint") for call in calls(out)] == [None, "true"] * 2
    assert len(list(out.rglob("result.json"))) == 2 and not list(out.rglob("checkpoint-*"))


def _stubs(out: Path) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (each / "cmdline").read_text().split("\0")
            if words[: len(STUB)] == list(STUB) and any(word.startswith(str(out)) for word in words):
                found.append(int(each.name))
    return found


def test_as_many_at_a_time_as_there_are_places(tmp_path):
    assert [each["OMP_NUM_THREADS"] for each in slots(2)] == [str(max(1, len(os.sched_getaffinity(0)) // 2))] * 2


def test_a_run_that_is_timed_has_all_devices_and_its_launcher_s_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in slots()] == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in slots()] == ["2", "3", "6", "7"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in slots(processes=2)] == ["2,3", "6,7"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in slots(3, processes=2)] == ["2,3", "6,7", "2,3"]
    (environment,) = alone()
    assert environment.keys().isdisjoint({"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"})


def test_help_answers(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "continues where it was" in said and "equal_time: SAMPa" in said


def test_what_a_command_line_says_wrong_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path / "none.yaml")])
    assert stop.value.code == 2 and "none.yaml" in capsys.readouterr().err


# ---- Around the weights ----


def test_directions_have_the_lengths_of_the_filters():
    own = {"w": torch.tensor([[3.0, 4.0], [0.0, 2.0]]), "b": torch.ones(2), "ids": torch.arange(2)}
    one, other = landscape.random_directions(own, 2)
    assert one.keys() == {"w"}
    assert one["w"].norm(dim=1).tolist() == pytest.approx([5, 2])
    assert not torch.equal(one["w"], other["w"])
    again, _ = landscape.random_directions({**own, "w": 2 * own["w"]}, 2)
    torch.testing.assert_close(again["w"], 2 * one["w"])
    assert torch.equal(landscape.mixed(own, {**own, "b": torch.zeros(2)}, 0.25)["b"], torch.full((2,), 0.75))


def test_losses_between_and_around(tmp_path):
    weights = {"A": torch.tensor([[1.0, 0.0]]), "B": torch.tensor([[0.0, 1.0]])}
    for method, w in weights.items():
        (tmp_path / method).mkdir()
        save_file({"w": w}, tmp_path / method / "model.safetensors")
    job = {"folders": {method: str(tmp_path / method) for method in weights}, "points": 8, "directions": 2}
    said = []
    found = landscape.losses(job, lambda weights, folder: weights["w"].square().sum().item(), said.append)
    assert len(said) == landscape.count_losses(job) == 9 + 2 * 2 * 9
    # An interrupted one goes on: what is known is not computed again.
    more = []
    again = landscape.losses(
        {**job, "known": said[:30]}, lambda weights, folder: weights["w"].square().sum().item(), more.append
    )
    assert again == found and more == said[30:]
    assert found["methods"] == ["A", "B"]
    assert found["way"][2] == 0 and found["way"][6] == 1 and found["distances"][4] == 0
    assert found["between"][2] == found["between"][6] == 1 and found["between"][4] == pytest.approx(0.5)
    for lines in found["around"].values():
        assert len(lines) == 2 and all(line[4] == pytest.approx(1) for line in lines)
        # |x + d| and |x - d| of a direction as long as x.
        assert all(line[0] + line[8] == pytest.approx(4) for line in lines)


def test_losses_go_on_where_they_were_interrupted(tmp_path):
    """And what the script says is in a file of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "def main(argv):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a+') as calls:\n"
        "        calls.write('x')\n"
        "    print('many words')\n"
        "    if os.path.getsize(calls.name) == 7:\n"
        "        sys.exit('killed')\n"
        "    return {'eval_loss': os.path.getsize(calls.name)}\n"
    )
    for method in "AB":
        (tmp_path / method).mkdir()
        save_file({"w": torch.ones(2, 2)}, tmp_path / method / "model.safetensors")
    folders = {method: str(tmp_path / method) for method in "AB"}
    job = {"script": str(script), "arguments": {}, "folders": folders, "points": 4, "directions": 1}
    with pytest.raises(RuntimeError, match="got exit code 1; the end of .*landscape.log:\n(.*\n)*    killed"):
        landscape._computed(job, "of", tmp_path)
    found = landscape._computed(job, "of", tmp_path)
    assert found["between"] == [1, 2, 3, 4, 5] and found["around"] == {
        "A": [[6, 8, 9, 10, 11]],
        "B": [[12, 13, 14, 15, 16]],
    }
    assert "many words" in (tmp_path / "landscape.log").read_text() and not (tmp_path / "landscape.jsonl").exists()


def test_a_script_scores_moved_weights(tmp_path):
    """The real one, at its own weights and at others."""
    root = Path(__file__).parents[1]
    make_tiny_bert(tmp_path / "bert")
    arguments = {"task_name": "sst2", "data_dir": root / "glue" / "sample", "max_eval_samples": 40, "use_cpu": True}
    trained = {
        "model_name_or_path": tmp_path / "bert",
        "max_train_samples": 40,
        "num_train_epochs": 1,
        "save_strategy": "no",
    }
    metrics = run_glue.main(config.as_words({**arguments, **trained, "output_dir": tmp_path / "A", "method": "adamw"}))
    loss_at = landscape.script_at(root / "glue" / "run_glue.py", {**arguments, "do_train": False})
    weights = load_file(tmp_path / "A" / "model.safetensors")
    assert loss_at(weights, tmp_path / "A") == pytest.approx(metrics["eval_loss"], rel=1e-6)
    moved = landscape.moved(weights, next(landscape.random_directions(weights, 1)), 1.0)
    assert loss_at(moved, tmp_path / "A") != pytest.approx(metrics["eval_loss"], rel=1e-3)
