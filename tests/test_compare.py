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
from pathlib import Path

import pytest
import yaml
from scipy import stats

from hf_sampa.compare import choosing, command, config, figures
from hf_sampa.compare.carry_out import Executor, slots
from hf_sampa.compare.runs import choosing as choosing_runs
from hf_sampa.compare.runs import scored, timed


STUB = (sys.executable, "-S", str(Path(__file__).with_name("compare_stub.py")))
GIVEN = {
    "script": "script.py",
    "arguments": {"num_train_epochs": 2},
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
    file.write_text("words")
    with pytest.raises(ValueError, match="the file: expected names with values, got 'words'"):
        config.read(file)


def test_the_files_of_the_project_can_be_read():
    """And what the help shows of such a file."""
    root = Path(__file__).parents[1]
    for file in [*root.glob("glue/*.yaml"), *root.glob("vit_finetune/*.yaml")]:
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
            "num_train_epochs": 2,
            **GIVEN["tasks"][run.task],
            **GIVEN["methods"][run.method],
        }
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)


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
        folder = run.write(tmp_path)
        if (run.task, run.method, value, run.seed) != ("B", "SAM", 0.05, 8):
            (folder / "result.json").write_text(json.dumps({"score": 0.6 + 0.1 * good + (run.seed == 8) * 0.3}))
    chosen = choosing.settings(comparison, runs, tmp_path)
    assert chosen["A", "AdamW"] == chosen["B", "AdamW"] == {"learning_rate": 0.03}
    assert chosen["A", "SAM"] == {"rho": 0.05}
    assert chosen["B", "SAM"] == {"rho": 0.01}  # the first of two that are equal
    assert chosen["A", "SAMPa"] == {"rho": 0.01, "lmbda": 0.1}
    assert choosing.is_less_better("eval_loss") and not choosing.is_less_better("accuracy")


def test_the_first_method_gets_the_epochs_that_take_the_time_of_another(tmp_path):
    comparison = config.read(written(tmp_path, time={"steps": 5, "rounds": 3}, equal_time="SAM"))
    seconds = {"AdamW": [1.0, 2.0, 4.0], "SAM": [2.0, 3.0, 10.0], "SAMPa": [1.0, 2.2, 4.4]}
    assert choosing.ratios(seconds, "AdamW") == pytest.approx({"AdamW": 1, "SAM": 2, "SAMPa": 1.1})
    longer = choosing.longer(comparison, seconds, tmp_path)
    assert longer == {"AdamW, time of SAM": 2.0}
    # What has been said is kept: the runs that follow from it would be others.
    assert choosing.longer(comparison, {**seconds, "SAM": [9.0, 9.0, 9.0]}, tmp_path) == longer
    runs = [
        run for run in scored(comparison, choosing.settings(comparison, [], tmp_path), longer) if run.method in longer
    ]
    assert [run.arguments["num_train_epochs"] for run in runs] == [4] * 6
    assert all(run.arguments["method"] == "adamw" for run in runs)
    rounds = list(timed(comparison, {}))
    assert [[run.method for run in each] for each in rounds] == [["AdamW", "SAM", "SAMPa"]] * 3
    assert {run.launch for each in rounds for run in each} == {"cpu_2_processes"}


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
    assert (found.better, found.tasks) == (5, 6)
    assert found.probability == pytest.approx(2 * 2 / 2**6)
    assert figures.over_tasks([1.0, 2.0, 3.0]).probability == pytest.approx(figures.smallest_probability(3))
    assert figures.over_tasks([0.0, 0.0]).probability == 1
    assert figures.over_tasks([0.1]) is None


# ---- Carried out ----


@pytest.fixture
def stubbed(monkeypatch):
    """Comparisons in this process whose runs are the stub's."""
    monkeypatch.setattr(command, "Executor", lambda script, root: Executor(script, root, STUB))

    def run(file: Path, *words: str) -> None:
        command.main([str(file), "--output_dir", str(file.parent / "out"), *words])

    return run


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
    assert table["score"] == pytest.approx([float(row["score"]) for row in rows])
    assert table["course"][-1][0] == pytest.approx([1, table["score"][-1] - 0.1])

    # Called again it runs nothing.
    before = len(calls(out))
    stubbed(file)
    assert len(calls(out)) == before == len(rows)


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
    assert "boom" in capsys.readouterr().err
    stubbed(file)
    assert "failed" not in (tmp_path / "out" / "report.md").read_text()
    assert [call["method"] for call in calls(tmp_path / "out")].count("sam") == 4
    assert [call["method"] for call in calls(tmp_path / "out")].count("adamw") == 2


def test_a_score_that_is_not_there_is_named(tmp_path, stubbed):
    file = written(tmp_path, metric="f1", seeds=[1], tasks={"A": {}}, methods={"AdamW": {"method": "adamw"}})
    with pytest.raises(SystemExit):
        stubbed(file)
    assert "metric: expected one of accuracy, loss, got f1" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_it_continues_from_the_checkpoints(tmp_path, number):
    file = written(tmp_path, seeds=[1, 2], tasks={"A": {"sleep": 600}}, methods={"AdamW": {"method": "adamw"}})
    out = tmp_path / "out"
    program = (
        "import sys; from hf_sampa.compare import command; from hf_sampa.compare.carry_out import Executor\n"
        f"command.Executor = lambda script, root: Executor(script, root, {STUB!r})\n"
        "command.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", program, str(file), "--output_dir", str(out), "--jobs", "2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        until = time.monotonic() + 240
        while len(list(out.rglob("checkpoint-1"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) != 0
    # Killed, it cannot end its runs: they hold their folders, for which the next call waits.
    assert len(_stubs(out)) == (2 if number == signal.SIGKILL else 0)
    said = tmp_path / "said.txt"
    with said.open("w") as stderr, subprocess.Popen(words, stderr=stderr, cwd=Path(__file__).parents[1]) as again:
        while _stubs(out) and "an earlier call is at it still" not in said.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        for stub in _stubs(out):
            os.kill(stub, signal.SIGKILL)
        assert again.wait(120) == 0, said.read_text()
    assert ("an earlier call is at it still" in said.read_text()) == (number == signal.SIGKILL)
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


def test_help_answers(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "continues where it was" in said and "equal_time: SAMPa" in said


def test_what_a_command_line_says_wrong_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([str(tmp_path / "none.yaml")])
    assert stop.value.code == 2 and "none.yaml" in capsys.readouterr().err
