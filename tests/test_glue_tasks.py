"""`glue/tasks.py` and `glue/glue_tsv.py`: the table of tasks, and the official files with their quirks and faults."""

import logging
import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value
from glue_data import check_labels
from glue_tsv import read_glue_file, read_glue_folder
from tasks import TASKS


MNLI_TEXT = ["promptID", "pairID", "genre"] + [f"sentence{i}_{p}" for p in ("binary_parse", "parse") for i in (1, 2)]
STSB_HEAD = [
    "index",
    "genre",
    "filename",
    "year",
    "old_index",
    "source1",
    "source2",
    "sentence1",
    "sentence2",
    "score",
]

# For every task and file in official form: the header row (None: there is none), and rows with what is to be read.
FILES = {
    ("cola", "train.tsv"): (
        None,
        [
            (["gj04", "1", "", "Our friends won't buy this analysis."], {"sentence": "Our friends won't buy this analysis.", "label": 1}),
            (["gj04", "0", "*", 'They drank the "pub.'], {"sentence": 'They drank the "pub.', "label": 0}),
        ],
    ),
    ("sst2", "train.tsv"): (
        ["sentence", "label"],
        [
            (["hide new secretions from the parental units ", "0"], {"sentence": "hide new secretions from the parental units ", "label": 0}),
            (['" charming ', "1"], {"sentence": '" charming ', "label": 1}),
        ],
    ),
    ("mrpc", "train.tsv"): (
        ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        [
            (["1", "7", "8", 'He said " no .', "He said no ."], {"sentence1": 'He said " no .', "sentence2": "He said no .", "label": 1}),
            (["0", "7", "9", "One\u2028line .", '" Two .'], {"sentence1": "One\u2028line .", "sentence2": '" Two .', "label": 0}),
        ],
    ),
    ("stsb", "train.tsv"): (
        STSB_HEAD,
        [
            (["0", "main-captions", "MSRvid", "2012test", "1", "none", "none", "A plane.", "A jet.", "5.000"], {"sentence1": "A plane.", "sentence2": "A jet.", "label": 5.0}),
            (["1", "main-captions", "MSRvid", "2012test", "4", "none", "none", "A man.", "A fish.", "0"], {"sentence1": "A man.", "sentence2": "A fish.", "label": 0.0}),
        ],
    ),
    ("qqp", "train.tsv"): (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        [
            (["1", "2", "3", "Why?", "Why not?", "0"], {"question1": "Why?", "question2": "Why not?", "label": 0}),
            (["2", "3", "4", "Who?", "", "1"], {"question1": "Who?", "question2": "", "label": 1}),
        ],
    ),
    ("mnli", "train.tsv"): (
        ["index", *MNLI_TEXT, "sentence1", "sentence2", "label1", "gold_label"],
        [
            (["0", *"abcdefg", "P.", "H.", "neutral", "neutral"], {"premise": "P.", "hypothesis": "H.", "label": 1}),
            (["1", *"abcdefg", "P.", "I.", "entailment", "entailment"], {"premise": "P.", "hypothesis": "I.", "label": 0}),
        ],
    ),
    ("mnli", "dev_matched.tsv"): (
        ["index", *MNLI_TEXT, "sentence1", "sentence2", *(f"label{i}" for i in range(1, 6)), "gold_label"],
        [(["0", *"abcdefg", "P.", "H.", *["neutral"] * 5, "contradiction"], {"premise": "P.", "hypothesis": "H.", "label": 2})],
    ),
    ("qnli", "train.tsv"): (
        ["index", "question", "sentence", "label"],
        [
            (["0", "When?", 'In "1870.', "entailment"], {"question": "When?", "sentence": 'In "1870.', "label": 0}),
            (["1", "Who?", "Nobody.", "not_entailment"], {"question": "Who?", "sentence": "Nobody.", "label": 1}),
        ],
    ),
    ("rte", "train.tsv"): (
        ["index", "sentence1", "sentence2", "label"],
        [
            (["0", "It rains.", "It is wet.", "entailment"], {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}),
            (["1", "It rains.", "It is dry.", "not_entailment"], {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1}),
        ],
    ),
    ("wnli", "train.tsv"): (
        ["index", "sentence1", "sentence2", "label"],
        [
            (["0", "I stuck a pin in it.", "The carrot.", "1"], {"sentence1": "I stuck a pin in it.", "sentence2": "The carrot.", "label": 1}),
            (["1", "I stuck it.", "The pin.", "0"], {"sentence1": "I stuck it.", "sentence2": "The pin.", "label": 0}),
        ],
    ),
}  # fmt: skip


def write_tsv(path, *rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(row) + end for row in rows).encode())
    return path


def write_official(path, task_name, name="train.tsv", end="\n"):
    header, rows = FILES[task_name, name]
    return write_tsv(path, *([header] if header else []), *(fields for fields, _ in rows), end=end)


# The table


def test_there_are_nine_tasks_with_the_settings_of_the_paper():
    assert list(TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    common = {
        "batch_size": 32,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "lmbda": 0.1,
    }
    for task in TASKS.values():
        epochs_and_rho = {
            "num_train_epochs": 5 if task.name in ("mrpc", "wnli") else 3,
            "rho": {"cola": 0.01, "rte": 0.005, "stsb": 0.005}.get(task.name, 0.05),
        }
        assert task.paper_settings == common | epochs_and_rho


def test_labels_and_metrics_are_those_of_the_benchmark():
    assert {name: task.labels for name, task in TASKS.items()} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "stsb": (),
        "qqp": ("not_duplicate", "duplicate"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "wnli": ("not_entailment", "entailment"),
    }
    special = {
        "cola": ("matthews_correlation",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearmanr"),
    }
    assert {name: task.metrics for name, task in TASKS.items()} == dict.fromkeys(TASKS, ("accuracy",)) | special


# Files in order


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(("task_name", "name"), FILES)
def test_official_files_are_read_under_the_names_of_the_hub(tmp_path, task_name, name, end):
    task = TASKS[task_name]
    dataset = read_glue_file(write_official(tmp_path / name, task_name, name, end), task)
    assert dataset.to_list() == [row for _, row in FILES[task_name, name][1]]
    label = Value("float32") if task_name == "stsb" else ClassLabel(names=list(task.labels))
    assert dataset.features == {**dict.fromkeys(task.text_columns, Value("string")), "label": label}


def test_a_folder_gives_the_splits_of_the_hub(tmp_path):
    for name in ("train.tsv", "dev_matched.tsv"):
        write_official(tmp_path / name, "mnli", name)
    write_official(tmp_path / "dev_mismatched.tsv", "mnli", "dev_matched.tsv")
    data = read_glue_folder(tmp_path, TASKS["mnli"])
    assert data.num_rows == {"train": 2, "validation_matched": 1, "validation_mismatched": 1}


def test_empty_lines_hold_no_row(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\nfine\t1\n\n\n")
    assert read_glue_file(path, TASKS["sst2"]).to_list() == [{"sentence": "fine", "label": 1}]


def test_rows_of_qqp_that_a_line_break_cut_are_left_out_and_counted(tmp_path, caplog):
    header, rows = FILES["qqp", "train.tsv"]
    path = write_tsv(
        tmp_path / "train.tsv",
        header,
        rows[0][0],
        ["8", "9", "10", "Was he real?", "Was"],
        ["he real?", "0"],
        rows[1][0],
    )
    with caplog.at_level(logging.WARNING):
        assert read_glue_file(path, TASKS["qqp"]).to_list() == [row for _, row in rows]
    assert (
        f"{path}: left out 2 rows with fewer than 6 fields (a line break inside a question; first at line 3)."
        in caplog.text
    )


# Files with a fault. Each message says where, what was expected, what came and what to do.


def refusal(path, task_name):
    with pytest.raises(ValueError) as caught:
        read_glue_file(path, TASKS[task_name])
    return str(caught.value)


@pytest.mark.parametrize("fields", [["7", "Only one sentence", "entailment"], ["7", "a", "b", "entailment", "more"]])
def test_a_wrong_number_of_fields_is_refused(tmp_path, fields):
    header, rows = FILES["rte", "train.tsv"]
    path = write_tsv(tmp_path / "dev.tsv", header, rows[0][0], fields)
    assert refusal(path, "rte") == (
        f"{path}, line 3: expected 4 tab-separated fields (index, sentence1, sentence2, label), got {len(fields)}. "
        "Repair or remove that line."
    )


def test_only_rows_that_are_too_short_are_left_out_of_qqp(tmp_path):
    header, rows = FILES["qqp", "train.tsv"]
    path = write_tsv(tmp_path / "dev.tsv", header, rows[0][0], [*rows[1][0], "1"])
    assert f"{path}, line 3: expected 6 tab-separated fields" in refusal(path, "qqp")


def test_the_line_is_that_of_the_file_in_cola_too(tmp_path):
    path = write_tsv(tmp_path / "train.tsv", ["gj04", "1", "", "Fine."], ["gj04", "1", "Short."])
    assert refusal(path, "cola").startswith(
        f"{path}, line 2: expected 4 tab-separated fields (source, label, star, sentence), got 3."
    )


def test_a_missing_column_is_refused(tmp_path):
    path = write_tsv(tmp_path / "dev.tsv", ["sentence", "target"], ["fine", "1"])
    assert refusal(path, "sst2") == (
        f"{path}, line 1: expected a header row of sst2 with the columns 'sentence', 'label', but 'label' is not in "
        "'sentence', 'target'. Use the official file, or another --task_name."
    )


@pytest.mark.parametrize(
    ("task_name", "label", "labels"),
    [
        ("rte", "0", "'entailment', 'not_entailment'"),
        ("wnli", "entailment", "'0', '1'"),
        ("mnli", "-", "'entailment', 'neutral', 'contradiction'"),
        ("cola", "2", "'0', '1'"),
    ],
)
def test_a_label_outside_the_tasks_is_refused(tmp_path, task_name, label, labels):
    task = TASKS[task_name]
    header, rows = FILES[task_name, "train.tsv"]
    fields = list(rows[0][0])
    fields[(header or task.tsv_header).index(task.tsv_label)] = label
    path = write_tsv(tmp_path / "train.tsv", *([header] if header else []), fields)
    assert refusal(path, task_name) == (
        f"{path}, line {2 if header else 1}: expected one of the labels of {task_name}, {labels}, in column "
        f"{task.tsv_label!r}, got {label!r}. Correct or remove that line."
    )


@pytest.mark.parametrize("score", ["high", "5.1", "-0.5", "nan", ""])
def test_a_score_that_is_none_is_refused(tmp_path, score):
    path = write_tsv(tmp_path / "dev.tsv", STSB_HEAD, [*"abcdefghi", score])
    assert refusal(path, "stsb") == (
        f"{path}, line 2: expected a score from 0 to 5 in column 'score', got {score!r}. Correct or remove that line."
    )


def test_other_bytes_than_utf8_are_refused(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_bytes(b"sentence\tlabel\n" + b"fine\t1\n" * 3 + "na\u00efve\t1\n".encode("latin-1"))
    assert refusal(path, "sst2").startswith(f"{path}, line 5: expected UTF-8, got other bytes (invalid")


def test_a_field_beyond_all_measure_is_refused(tmp_path):
    path = write_tsv(tmp_path / "dev.tsv", ["sentence", "label"], ["fine", "1"], ["x" * 200_000, "1"])
    assert re.match(rf"{re.escape(str(path))}, line 3: expected a row .*field limit", refusal(path, "sst2"))


@pytest.mark.parametrize("text", ["sentence\tlabel\n", "sentence\tlabel\n\n"])
def test_a_file_without_rows_is_refused(tmp_path, text):
    path = tmp_path / "dev.tsv"
    path.write_text(text)
    assert refusal(path, "sst2") == f"{path}: expected at least one row of sst2, got none. Use the official file."


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("")
    assert refusal(path, "sst2") == f"{path}: expected rows of sst2, got an empty file. Use the official file."


def test_a_missing_file_is_named(tmp_path):
    write_official(tmp_path / "train.tsv", "mnli")
    with pytest.raises(FileNotFoundError) as caught:
        read_glue_folder(tmp_path, TASKS["mnli"])
    assert str(caught.value) == (
        f"{tmp_path}: expected a folder with the official files of mnli (train.tsv, dev_matched.tsv, "
        "dev_mismatched.tsv), but dev_matched.tsv, dev_mismatched.tsv is not there (found: train.tsv). Give --data_dir "
        "the folder of this one task."
    )


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rte \(train.tsv, dev.tsv\), but .* \(found: no such folder\)"):
        read_glue_folder(tmp_path / "RTE", TASKS["rte"])


# Files of something else, and odd ones


@pytest.mark.parametrize("task_name", TASKS)
def test_the_folder_of_another_task_is_named_as_that_tasks(task_name, tmp_path):
    for name in TASKS[task_name].files.values():
        write_official(tmp_path / name, task_name, name if (task_name, name) in FILES else "train.tsv")
    if task_name == "mnli":
        write_official(tmp_path / "dev_mismatched.tsv", "mnli", "dev_matched.tsv")
    for other in TASKS.values():
        if other.name != task_name:
            with pytest.raises(ValueError) as caught:
                read_glue_folder(tmp_path, other)
            assert str(caught.value) == (
                f"{tmp_path}: expected the files of {other.name}, got those of {task_name}. Give --task_name {task_name}, "
                f"or --data_dir the folder of {other.name}."
            )


def test_a_damaged_folder_of_the_task_is_not_taken_for_anothers(tmp_path):
    write_official(tmp_path / "train.tsv", "rte")
    with pytest.raises(FileNotFoundError, match="but dev.tsv is not there"):
        read_glue_folder(tmp_path, TASKS["rte"])


def numbered(path, *rows):
    return write_tsv(path, ["index", "sentence1", "sentence2"], *rows)


def test_a_file_to_predict_has_numbered_rows_without_labels(tmp_path):
    path = numbered(tmp_path / "test.tsv", ["4", "a", "b"], ["2", "c", "d"])
    rows = [{"sentence1": "a", "sentence2": "b", "idx": 4}, {"sentence1": "c", "sentence2": "d", "idx": 2}]
    assert read_glue_file(path, TASKS["rte"], labelled=False).to_list() == rows
    # Files of CoLA have no header row, but for this one.
    path = write_tsv(tmp_path / "test.tsv", ["index", "sentence"], ["0", "Fine."])
    assert read_glue_file(path, TASKS["cola"], labelled=False).to_list() == [{"sentence": "Fine.", "idx": 0}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["x", "a", "b"]], "line 2: expected the number of the row in column 'index', got 'x'. Use"),
        ([["1", "a", "b"], ["1", "c", "d"]], "line 3: expected another number in every row, got 1 as in line 2. Use"),
        ([["1", "a"]], "line 2: expected 3 tab-separated fields"),
    ],
)
def test_rows_to_predict_without_a_number_of_their_own_are_refused(rows, message, tmp_path):
    path = numbered(tmp_path / "test.tsv", *rows)
    with pytest.raises(ValueError) as caught:
        read_glue_file(path, TASKS["rte"], labelled=False)
    assert f"{path}, {message}" in str(caught.value)


def test_no_row_to_predict_is_left_out_of_qqp(tmp_path):
    path = write_tsv(tmp_path / "test.tsv", ["id", "question1", "question2"], ["0", "Why?", "How?"], ["1", "Why"])
    with pytest.raises(ValueError, match="line 3: expected 3 tab-separated fields"):
        read_glue_file(path, TASKS["qqp"], labelled=False)


@pytest.mark.parametrize(
    ("texts", "warned"),
    [(['"He said ""no"" ."', "He said no ."], True), (['"one"', '"two"', "three"], True), (['"one"', '" two', "three"], False)],
)  # fmt: skip
def test_quotes_of_a_spreadsheet_are_kept_but_warned_of(texts, warned, tmp_path, caplog):
    path = write_tsv(tmp_path / "dev.tsv", ["sentence", "label"], *([text, "1"] for text in texts))
    assert read_glue_file(path, TASKS["sst2"])["sentence"] == texts
    assert (f"of {len(texts)} texts are in double quotes" in caplog.text) == warned


@pytest.mark.parametrize("column", ["sentence", "label"])
def test_a_column_twice_is_refused(column, tmp_path):
    path = write_tsv(tmp_path / "dev.tsv", ["sentence", "label", column], ["fine", "1", "0"])
    assert f"but {column!r} is in 'sentence', 'label', {column!r} more than once" in refusal(path, "sst2")


def test_labels_that_are_all_the_same_are_warned_of(caplog):
    rows = {"sentence": ["a", "b"], "label": [1, 1]}
    check_labels(DatasetDict(train=Dataset.from_dict(rows, features=TASKS["sst2"].features)), TASKS["sst2"])
    assert "train of sst2: all of its 2 rows have the label positive, so that nothing" in caplog.text


def test_scores_that_are_all_the_same_are_no_dev_set(caplog):
    rows = Dataset.from_dict(
        {"sentence1": "ab", "sentence2": "cd", "label": [2.5, 2.5]}, features=TASKS["stsb"].features
    )
    check_labels(DatasetDict(train=rows), TASKS["stsb"])
    assert "all of its 2 rows have the label 2.5" in caplog.text
    with pytest.raises(
        ValueError, match="validation of stsb: expected scores that differ, got 2.5 in all of its 2 rows"
    ):
        check_labels(DatasetDict(validation=rows), TASKS["stsb"])
