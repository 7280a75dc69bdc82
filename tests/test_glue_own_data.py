"""Files of one's own, `glue/own_*.py`: what is read and what is refused, and what is found in columns of text and labels."""

import csv
import json
import math

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from own_columns import check_texts, find_columns
from own_files import read_file
from own_labels import Labels, read_labels, spelled_as
from own_metric import decide, find_metrics, make_compute_metrics, score_names
from own_predictions import write_predictions
from own_problem import MULTI, REGRESSION, SINGLE, Problem, encode, find_problem, warn_of_unscored
from own_tables import Table, table_of
from sklearn.metrics import f1_score
from transformers import EvalPrediction


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(table):
    return [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]


# Files


GOOD = {
    "plain": ("a.csv", "text,label\nx,a\n", [("x", "a")]),
    "mark": ("a.csv", "\ufefftext,label\nx,a\n", [("x", "a")]),
    "carriage returns": ("a.csv", "text,label\r\nx,a\r\ny,b\r\n", [("x", "a"), ("y", "b")]),
    "no last line end": ("a.CSV", "text,label\nx,a", [("x", "a")]),
    "empty lines": ("a.csv", "text,label\n\nx,a\n\n", [("x", "a")]),
    "blanks around names": ("a.csv", " text , label \nx,a\n", [("x", "a")]),
    "quotes": ("a.csv", 'text,label\n"he said ""no"", twice",a\n', [('he said "no", twice', "a")]),
    "lines in a field": ("a.csv", 'text,label\n"one\ntwo",a\n', [("one\ntwo", "a")]),
    "words for nothing": ("a.csv", "text,label\nNA,None\n", [("NA", "None")]),
    "breaks that are none": ("a.csv", "text,label\na\u2028b\x0b,a\n", [("a\u2028b\x0b", "a")]),
    "long": ("a.csv", f"text,label\n{'x' * 200_000},a\n", [("x" * 200_000, "a")]),
    "tabs": ("a.tsv", "text\tlabel\nx, y\ta\n", [("x, y", "a")]),
    "quoted tabs": ("a.tsv", 'text\tlabel\n"x\ty"\ta\n', [("x\ty", "a")]),
    "lines of objects": ("a.jsonl", '{"text": "x", "label": "a"}\n\n{"label": 1}\n', [("x", "a"), (None, 1)]),
    "an array": ("a.json", '[{"text": "x", "label": ["a", "b"]}]', [("x", ["a", "b"])]),
    "lines in .json": ("a.json", '{"text": "x", "label": 1.5}\n', [("x", 1.5)]),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_a_file_is_read_as_it_stands(case, tmp_path):
    name, content, rows = GOOD[case]
    table = read_file(write(tmp_path / name, content))
    assert rows_of(table) == [{"text": text, "label": label} for text, label in rows]
    assert len(table) == len(rows) and table.names == ("text", "label")


BAD = {
    "empty": ("a.csv", "", "line 1: expected the names of the columns, got an empty line. Add a first row of names."),
    "no rows": ("a.csv", "text,label\n", "expected at least one row, got none. Use another file."),
    "no JSON rows": ("a.jsonl", "\n", "expected at least one row, got none. Use another file."),
    "NUL": ("a.csv", "text,label\nx\0,a\n", "line 2: expected text, got a NUL character."),
    "latin-1": ("a.csv", b"text,label\nx,a\nna\xefve,a\n", "line 3: expected UTF-8, got other bytes"),
    "latin-1 JSON": ("a.jsonl", b'{"text": "na\xefve"}\n', "line 1: expected UTF-8, got other bytes"),
    "too many fields": ("a.csv", "text,label\nhello, world,a\n", "line 2: expected 2 fields (text, label), got 3. A field that holds ',' has to be in double quotes: repair or remove that row."),
    "too few fields": ("a.csv", "text,label\nx\n", "line 2: expected 2 fields (text, label), got 1."),
    "a row after a long one": ("a.csv", 'text,label\n"a\nb",a\nx\n', "line 4: expected 2 fields"),
    "a quote without end": ("a.csv", 'text,label\nx,a\n"y,b\nz,c\n', "line 3: expected a row of fields with ',' between them, but unexpected end of data in the row that begins there."),
    "text after a quote": ("a.csv", 'text,label\n"x" y,b\n', "line 2: expected a row of fields with ',' between them, but"),
    "quotes over tabs": ("a.tsv", 'text\tlabel\n"x\ta\ny"\tb\n', "line 2: a double quote begins a field that goes on to line 3, over tabs. If quotes are characters like any other in this file, add --quotes false."),
    "semicolons": ("a.csv", "text;label\nx;a\n", "line 1: expected the names of several columns with ',' between them, got 'text;label'. Is ';' between them? Add --delimiter ';'."),
    "a workbook": ("a.xlsx", b"PK", "expected a name that ends in .csv, .tsv, .json, .jsonl, .ndjson, got '.xlsx'."),
    "no ending": ("a", "text,label\n", "got 'no ending'."),
    "half an object": ("a.jsonl", '{"text": "x"}\n{"text":\n', "line 2: expected one JSON object in every line (or in .json one array of them), but Expecting value at character 10. Repair it."),
    "a key twice": ("a.jsonl", '{"text": "x", "label": "a", "label": "b"}\n', "line 1: expected one JSON object in every line (or in .json one array of them), but the key 'label' is there twice. Repair it."),
    "no object": ("a.jsonl", "[1, 2]\n", "line 1: expected a JSON object with the columns as keys, got [1, 2]. Write one object for every row."),
    "an array of none": ("a.json", '[{"text": "x"}, 3]', "row 1: expected a JSON object with the columns as keys, got 3."),
    "empty objects": ("a.jsonl", "{}\n", "expected JSON objects with the columns as keys, got empty ones."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_read_in_full_is_refused(case, tmp_path):
    name, content, message = BAD[case]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}") and message in str(caught.value)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"a.csv: expected a CSV, TSV or JSON lines file, but there is none. Give"
    ):
        read_file(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"but .*/ is none. Give the path of a file."):
        read_file(tmp_path)


def test_options_say_what_an_ending_does_not(tmp_path):
    path = write(tmp_path / "a.txt", 'text;label\n"x;a\ny";b\n')
    assert rows_of(read_file(path, ";", quotes=False))[0] == {"text": '"x', "label": "a"}
    limit = csv.field_size_limit()
    assert len(read_file(write(path, 'text;label\n"x;1";a\n'), ";")) == 1
    assert csv.field_size_limit() == limit


# Columns


def table(*names, rows=1):
    return Table("a.csv", names, {name: ["x"] * rows for name in names})


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("text", "label"), (("text",), ("label",))),
        (("Label", "ID", "Sentence"), (("Sentence",), ("Label",))),
        (("premise", "hypothesis", "label", "idx"), (("premise", "hypothesis"), ("label",))),
        (("index", "question", "sentence", "label"), (("question", "sentence"), ("label",))),
        (("title", "text", "category"), (("text",), ("category",))),
        (("what they wrote", "sentiment"), (("what they wrote",), ("sentiment",))),
        (("review", "kind"), (("review",), ("kind",))),
        (("text",), (("text",), ())),
    ],
)
def test_columns_are_known_by_their_usual_names(names, found):
    assert find_columns(table(*names), None, None) == found


@pytest.mark.parametrize(
    ("names", "texts", "label", "message"),
    [
        (("a", "b"), None, None, "--text_column_names: expected one or two columns of text, since their names do not say it: a.csv has the columns 'a', 'b'. Add --text_column_names with a name (two with a comma between them)."),
        (("text", "sentence", "label"), None, None, "--text_column_names: expected to be told which columns are meant"),
        (("text", "class", "score"), None, None, "--label_column_name: expected to be told which columns are meant"),
        (("text", "label", "Label"), None, None, "--label_column_name: expected to be told which columns are meant"),
        (("text", "label"), "txt", None, "--text_column_names: expected 'txt' among the columns of a.csv, but 'txt' is not in 'text', 'label'."),
        (("text", "label"), None, "kind", "--label_column_name: expected 'kind' among the columns"),
        (("a", "b", "c", "label"), "a,b,c", None, "--text_column_names: expected one or two columns, got 'a', 'b', 'c'. Join"),
        (("text", "label", "label"), None, None, "a.csv: expected one column 'label', got it 2 times. Rename the others."),
        (("text", "text", "label"), "text", None, "a.csv: expected one column 'text', got it 2 times. Rename the others."),
        (("label", "kind"), "label", "kind", "--text_column_names: expected a name other than 'label', which Trainer takes"),
        (("text", "label"), "text", "text", "--label_column_name: expected another column than the text, got 'text' for both."),
    ],
)  # fmt: skip
def test_columns_that_can_be_several_are_to_be_named(names, texts, label, message):
    with pytest.raises(ValueError) as caught:
        find_columns(table(*names), texts, label)
    assert message in str(caught.value)


def test_columns_are_taken_as_they_are_named():
    assert find_columns(table("a", "b", "c"), "a, b", "c") == (("a", "b"), ("c",))
    assert find_columns(table("a, b", "c"), "a, b", "c") == (("a, b",), ("c",))
    assert find_columns(table("text", "x", "y"), None, "x,y") == (("text",), ("x", "y"))


@pytest.mark.parametrize("value", [None, 5, ["x"]])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError) as caught:
        check_texts(Table("a.jsonl", ("text",), {"text": ["x", value]}, [1, 4]), ["text"])
    assert str(caught.value) == (
        f"a.jsonl, line 4: expected text in column 'text', got {value!r}. Repair or remove that row, or choose another column "
        "with --text_column_names."
    )


def test_odd_texts_are_warned_of(caplog):
    check_texts(Table("a.csv", ("text",), {"text": ["x", " ", ""]}, [2, 3, 4]), ["text"])
    assert "a.csv: 2 of 3 rows have no text in column 'text' (the first: a.csv, line 3)." in caplog.text
    check_texts(Table("a.csv", ("text",), {"text": ["1", "2.5"]}, [2, 3]), ["text"])
    assert "a.csv: all texts in column 'text' are numbers. Is it the right column?" in caplog.text
    with pytest.raises(
        ValueError, match="a.csv: expected text in column 'text', but it is empty in all 2 rows. Choose"
    ):
        check_texts(Table("a.csv", ("text",), {"text": ["", " "]}, [2, 3]), ["text"])


# Labels


def labels_of(values, delimiter=None):
    return read_labels(Table("a.csv", ("label",), {"label": values}), ["label"], delimiter)


PROBLEMS = {
    "words": (["b", "a ", "b"], SINGLE, ("a", "b")),
    "numbers of classes in their order": (["10", "9", "2"], SINGLE, ("2", "9", "10")),
    "numbers in JSON": ([1, 0, 1], SINGLE, ("0", "1")),
    "true and false": ([True, False], SINGLE, ("false", "true")),
    "numbers and words": (["1", "2", "other"], SINGLE, ("1", "2", "other")),
    "a score": (["1", "2.5"], REGRESSION, ("label",)),
    "a score in JSON": ([1, 2.5, -3e-5], REGRESSION, ("label",)),
    "lists": ([["b"], ["a", "b"], []], MULTI, ("a", "b")),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_predicted_is_found_from_the_labels(case):
    values, kind, names = PROBLEMS[case]
    assert find_problem(labels_of(values)) == Problem(kind, names)


def test_what_is_predicted_is_told_in_words():
    assert str(Problem(SINGLE, ("a", "b"))) == "one of a, b"
    assert str(Problem(MULTI, ("a", "b"))) == "any number of a, b"
    assert str(Problem(REGRESSION, ("stars",))) == "a score, stars"


def test_what_is_predicted_can_be_said():
    assert find_problem(labels_of(["1", "2", "3"]), REGRESSION) == Problem(REGRESSION, ("label",))
    assert find_problem(labels_of([str(n) for n in range(50)]), SINGLE).names == tuple(str(n) for n in range(50))
    assert find_problem(labels_of(["1.0", "2.0"]), SINGLE).names == ("1.0", "2.0")
    assert find_problem(labels_of(["a|b", "c", ""], "|")) == Problem(MULTI, ("a", "b", "c"))


REFUSED = {
    "no label": (["a", " ", "b"], None, "a.csv, row 1: expected a label in column 'label', got nothing. Give it one, or"),
    "one class": (["a", "a"], None, "a.csv: expected at least two classes in column 'label', got 'a' in all 2 rows."),
    "one score": (["2.5", "2.5"], None, "a.csv: expected scores that differ, got 2.5 in column 'label' of all 2 rows."),
    "a score that is none": (["1.5", "nan"], None, "a.csv, row 1: expected a number as in other rows in column 'label', got 'nan'."),
    "a word among scores": (["1.5", "2", "high"], None, "row 2: expected a number as in other rows in column 'label', got 'high'."),
    "a class that is missing": (["1", "2", "None"], None, "row 2: expected a number as in other rows in column 'label', got 'None'."),
    "NaN in JSON": ([1.5, math.nan], None, "row 1: expected a number as in other rows in column 'label', got 'nan'."),
    "infinity": (["1.5", "inf"], REGRESSION, "row 1: expected a number in column 'label', got 'inf'. Correct or remove"),
    "beyond all numbers": (["1.5", "1e999"], REGRESSION, "row 1: expected a number in column 'label', got '1e999'."),
    "no score": (["a", "b"], REGRESSION, "row 0: expected a number in column 'label', got 'a'."),
    "whole numbers with a point": (["1.0", "2.0"], None, "got 2 numbers in column 'label', '1.0', '2.0' among them, which can be classes or a score. Add --problem_type single_label_classification or regression."),
    "many whole numbers": ([str(n) for n in range(30)], None, "got 30 numbers in column 'label', '0', '1', '2', '3', '4' among"),
    "a name for every row": ([f"id{n}" for n in range(30)], None, "a.csv: expected classes with several rows each in column 'label', got 30 different labels in 30 rows, 'id0', 'id1', 'id10' among them."),
    "a list among words": (["a", ["b"]], None, "row 0: expected a list of labels in column 'label', got 'a'."),
    "a list where there is one": ([["a"], ["b"]], SINGLE, "row 0: expected one label in column 'label', got ('a',)."),
    "something else": ([{"a": 1}], None, "a.csv, row 0: expected a label in column 'label': words, a number or a list of words, got {'a': 1}."),
    "a list of lists": ([[["a"]]], None, "row 0: expected a label in column 'label': words"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_mean_nothing_or_two_things_are_refused(case):
    values, kind, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        find_problem(labels_of(values), kind)
    assert message in str(caught.value)


def test_odd_classes_are_warned_of(caplog):
    find_problem(labels_of(["Good", "good", "bad", "nan"]))
    assert "a.csv: 'Good', 'good' are taken for different classes." in caplog.text
    assert "a.csv: 'nan' is taken for a class. Are labels missing there?" in caplog.text


def test_columns_of_0_and_1_are_labels_of_these_names():
    columns = {"toxic": ["1", "0", "1"], "rude": ["0", "0", "1"]}
    labels = read_labels(Table("a.csv", tuple(columns), columns), ["toxic", "rude"])
    assert labels.values == [("toxic",), (), ("toxic", "rude")]
    assert find_problem(labels) == Problem(MULTI, ("toxic", "rude"))
    with pytest.raises(ValueError, match="row 1: expected 0 or 1 in column 'rude', one of several labels, got '2'."):
        read_labels(Table("a.csv", ("toxic", "rude"), {"toxic": ["1", "0"], "rude": ["0", "2"]}), ["toxic", "rude"])


def test_names_of_a_hub_data_set_keep_their_order(caplog):
    features = Features(text=Value("string"), label=ClassLabel(names=["zero", "one", "never"]))
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    labels = read_labels(table_of(rows, "user/data, split 'test'"), ["label"])
    assert labels.values == ["one", "zero", None] and labels.names == ("zero", "one", "never")
    labels = read_labels(table_of(rows.take(2), "user/data"), ["label"])
    assert find_problem(labels) == Problem(SINGLE, ("zero", "one", "never"))
    assert "user/data: no row has the label 'never', of which nothing can be learned." in caplog.text
    features = Features(label=Sequence(ClassLabel(names=["x", "y"])))
    labels = read_labels(table_of(Dataset.from_dict({"label": [[1], [0, 1]]}, features=features), "m"), ["label"])
    assert labels.values == [("y",), ("x", "y")] and find_problem(labels) == Problem(MULTI, ("x", "y"))


def test_labels_are_encoded_as_the_model_takes_them():
    assert encode(labels_of(["b", "a"]), Problem(SINGLE, ("a", "b")), (1, 0)) == [0, 1]
    several = encode(labels_of([["b"], ["a", "c"], []]), Problem(MULTI, ("a", "b", "c")), (2, 0, 1))
    assert several == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    assert encode(labels_of(["1", "-2.5"]), Problem(REGRESSION, ("label",)), (0,)) == [1.0, -2.5]


def test_a_class_that_was_not_trained_is_refused_and_one_that_is_not_scored_warned_of(caplog):
    problem = Problem(SINGLE, ("a", "b"))
    with pytest.raises(ValueError) as caught:
        encode(labels_of(["a", "B"]), problem, (0, 1))
    assert str(caught.value) == (
        "a.csv, row 1: expected one of the classes that the model is trained for, 'a', 'b', in column 'label', got 'B'. "
        "Correct or remove that row, or train on rows of that class."
    )
    with pytest.raises(ValueError, match="row 1: expected one of the classes .* got nothing."):
        encode(labels_of(["a", ""]), problem, (0, 1))
    warn_of_unscored(labels_of(["a", "a"]), problem)
    said = "a.csv: no row has the label 'b': no score says how well it is found, and means over the classes, as f1_macro, count it as 0"
    assert f"{said} where it is predicted.\n" in caplog.text
    warn_of_unscored(labels_of([["a"], []]), Problem(MULTI, ("a", "b")))
    assert f"{said}.\n" in caplog.text


def test_a_class_that_no_row_has_is_0_in_a_mean_over_the_classes():
    """What the warning says, of classes "a" and "b" of which no row has the second."""

    def f1_macro(kind, logits, labels):
        compute = make_compute_metrics(kind, find_metrics(kind, "f1_macro"))
        return compute(EvalPrediction(predictions=np.array(logits), label_ids=np.array(labels)))["f1_macro"]

    assert f1_macro(SINGLE, [[1.0, 0.0], [1.0, 0.0]], [0, 0]) == 1
    assert f1_macro(SINGLE, [[1.0, 0.0], [0.0, 1.0]], [0, 0]) == (2 / 3 + 0) / 2
    assert f1_macro(MULTI, [[1.0, -1.0], [1.0, -1.0]], [[1.0, 0.0], [1.0, 0.0]]) == (1 + 0) / 2


def test_several_labels_are_told_of_every_class_of_the_model():
    def labels_in(**columns):
        return spelled_as(read_labels(Table("a.csv", tuple(columns), columns), list(columns)), ["a", "b", "c"])

    problem = Problem(MULTI, ("a", "b", "c"))
    assert encode(labels_in(B=["1", "0"], a=["0", "0"], C=["0", "0"]), problem, (0, 1, 2)) == [[0, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError) as caught:
        encode(labels_in(a=["1", "0"], B=["0", "1"]), problem, (0, 1, 2))
    assert str(caught.value) == (
        "a.csv: expected 0 or 1 for every class that the model is trained for, 'a', 'b', 'c', got 'a', 'b' alone, so that nobody "
        "knows which rows have 'c'. Add what is missing, and name all columns with --label_column_name."
    )
    assert encode(spelled_as(labels_of([["a"], []]), problem.names), problem, (0, 1, 2)) == [[1, 0, 0], [0, 0, 0]]


def test_labels_that_only_their_case_tells_apart_are_not_mixed_up():
    assert spelled_as(labels_of(["us", "US"]), ["US", "us"]).values == ["us", "US"]
    for values, names in ((["US", "us"], ["us", "them"]), (["Us", "us"], ["US", "us"])):
        assert spelled_as(labels_of(values), names).values == values, "left to be refused, as they stand"


def test_numbers_are_no_names_of_classes(caplog):
    assert spelled_as(labels_of(["1", "0"]), ["LABEL_0", "LABEL_1"]).values == ["LABEL_1", "LABEL_0"]
    assert "the labels '0', '1' are taken for the model's outputs in their order, 'LABEL_0', 'LABEL_1'." in caplog.text
    with pytest.raises(ValueError) as caught:
        spelled_as(labels_of([1, 2]), ["1 star", "2 stars", "3 stars"])
    assert str(caught.value) == (
        "a.csv: expected the names of the model's classes, '1 star', '2 stars', '3 stars', in column 'label', got the numbers "
        "'1', '2', which may count them from 0, from 1, or in another order. Write the name of its class in the place of each."
    )


def test_labels_take_the_spelling_of_the_model(caplog):
    assert spelled_as(labels_of(["negative", "Positive"]), ["NEGATIVE", "POSITIVE"]).values == ["NEGATIVE", "POSITIVE"]
    assert spelled_as(labels_of([["a"], []]), ["A", "B"]).values == [("A",), ()]
    assert caplog.text == ""
    assert spelled_as(labels_of(["x", "0"]), ["A", "B"]).values == ["x", "0"], "left to be refused, as they stand"


@pytest.mark.parametrize("mark", ["|", ";", ","])
def test_labels_that_look_like_several_are_warned_of(mark, caplog):
    joined = f"rude{mark}odd"
    found = find_problem(labels_of(["rude", "odd", joined, "fine"]))
    assert found.type == SINGLE and len(found.names) == 4
    assert caplog.messages == [
        f"a.csv: labels with '{mark}' in them, '{joined}' for instance, are taken for classes of their own, 1 of 4. If they are several "
        f"labels of one text, add --label_delimiter '{mark}'."
    ]
    caplog.clear()
    find_problem(labels_of([f"Lyon{mark} France", f"Rome{mark} Italy", "Oslo"]))
    find_problem(labels_of(["rude", "odd", joined, "fine"]), SINGLE)
    assert caplog.messages == []


# Scores and predictions


def test_metrics_have_their_textbook_values():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0], [3.0, 0.0, 1.0]])
    labels = np.array([0, 1, 1, 2])
    names = "accuracy,f1_macro,balanced_accuracy"
    scores = make_compute_metrics(SINGLE, find_metrics(SINGLE, names))(EvalPrediction(logits, labels))
    # Of the classes: precision 1/2, 1, 0 and recall 1, 1/2, 0.
    assert scores == pytest.approx({"accuracy": 0.5, "f1_macro": (2 / 3 + 2 / 3 + 0) / 3, "balanced_accuracy": 0.5})
    several = EvalPrediction(np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    scores = make_compute_metrics(MULTI, find_metrics(MULTI, None))(several)
    assert scores == pytest.approx({"f1_micro": 4 / 5, "f1_macro": (2 / 3 + 1) / 2})
    of_scores = EvalPrediction(np.array([[1.0], [3.0], [2.0]]), np.array([1.0, 2.0, 3.0]))
    scores = make_compute_metrics(REGRESSION, find_metrics(REGRESSION, None))(of_scores)
    assert scores == pytest.approx({"mse": 2 / 3, "pearson": 0.5})


def test_a_metric_of_evaluate_is_taken_from_a_folder(tmp_path):
    folder = tmp_path / "share_right"
    folder.mkdir()
    write(
        folder / "share_right.py",
        """import datasets
import evaluate
class ShareRight(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {"share_right": sum(p == r for p, r in zip(predictions, references)) / len(references)}
""",
    )
    metrics = find_metrics(SINGLE, f"f1_micro,{folder}", str(tmp_path / "cache"))
    predicted = EvalPrediction(np.eye(2), np.array([0, 0]))
    expected = {"f1_micro": f1_score([0, 0], [0, 1], average="micro"), "share_right": 0.5}
    assert make_compute_metrics(SINGLE, metrics)(predicted) == expected
    assert score_names(SINGLE, metrics, [0, 0]) == list(expected)


def test_a_metric_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"--metric_name: expected mse, pearson, mae, .* got 'no such folder/x'. Give one"
    ):
        find_metrics(REGRESSION, "mse,no such folder/x")


def test_predictions_are_written_with_their_probabilities(tmp_path):
    def written(*args):
        with write_predictions(tmp_path / "out", *args).open(newline="") as file:
            return list(csv.reader(file))

    logits = np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    header = ["index", "prediction", "probability_no, never", "probability_yes"]
    assert written(logits, SINGLE, ["no, never", "yes"]) == [
        header,
        ["0", "yes", "0.250000", "0.750000"],
        ["1", "no, never", "0.900000", "0.100000"],
    ]
    rows = written(np.array([[0.0, 5.0], [1.0, 1.0], [-1.0, -1.0]]), MULTI, ["a", "b"])
    assert [row[1] for row in rows] == ["prediction", "b", "a|b", ""] and rows[2][2] == f"{1 / (1 + math.exp(-1)):.6f}"
    assert written(np.array([[0.125]]), REGRESSION, ["score"]) == [["index", "prediction"], ["0", "0.125"]]


def test_outputs_that_are_no_numbers_are_no_predictions(tmp_path):
    with pytest.raises(ValueError, match="Expected numbers from the model, got NaN for 1 of 1 examples."):
        write_predictions(tmp_path, np.array([[np.nan, 0.0]]), SINGLE, ["a", "b"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="got NaN for 1 of 2 examples"):
        decide(np.array([[1.0], [np.nan]]), REGRESSION)


def test_json_of_pandas_by_columns_is_refused(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"text": {"0": "x"}, "label": {"0": "a"}}))
    with pytest.raises(ValueError, match=r"a.json, line 1: expected text in column 'text', got \{'0': 'x'\}."):
        check_texts(read_file(path), ["text"])


def test_labels_of_a_row_are_named_by_what_the_table_calls_it():
    labels = Labels(Table("a.csv", ("label",), {"label": [None]}, [7]), "label", [None])
    assert (
        str(labels.refuse(0, "a label", "Give it one."))
        == "a.csv, line 7: expected a label in column 'label', got nothing. Give it one."
    )
