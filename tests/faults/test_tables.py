"""Damaged and hostile TSV files: read as they are, or one sentence with the file and the line."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pytest
from glue_tsv import read_glue_file, read_glue_folder
from own_files import read_file
from tasks import TASKS

from tests.faults.no_files import INSTEAD_OF_A_FILE


SST2 = b"sentence\tlabel\n"
STSB = b"index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"


def row_of_stsb(score):
    return STSB + b"0\tg\tf\ty\to\ts\ts\ta\tb\t" + score + b"\n"


# Task, content of the file, and what is to come: rows, or words of the message.
CASES = {
    "empty": ("sst2", b"", "expected rows of sst2, got an empty file"),
    "empty, no header": ("cola", b"", "expected rows of cola, got an empty file"),
    "a mark alone": ("sst2", b"\xef\xbb\xbf", "line 1: expected a header row of sst2.*not in an empty line"),
    "header alone": ("sst2", SST2, "expected at least one row of sst2, got none"),
    "a line break alone": ("sst2", b"\n", "line 1: expected a header row of sst2.*not in an empty line"),
    "NUL in a text": ("sst2", SST2 + b"a\0b\t1\n", "line 2: expected text, got a NUL"),
    "a block of NUL at the end": ("sst2", SST2 + b"a\t1\n" + b"\0" * 512, "line 3: expected text, got a NUL"),
    "NUL alone": ("sst2", b"\0" * 10_000_000, "line 1: expected text, got a NUL"),
    "UTF-16 with a mark": ("sst2", (SST2 + b"a\t1\n").decode().encode("utf-16"), "line 1: expected UTF-8"),
    "UTF-16 without": ("sst2", (SST2 + b"a\t1\n").decode().encode("utf-16-le"), "line 1: expected text, got a NUL"),
    "UTF-32": ("sst2", (SST2 + b"a\t1\n").decode().encode("utf-32"), "line 1: expected UTF-8"),
    "latin-1": ("sst2", SST2 + b"a\t1\nna\xefve\t1\n", "line 3: expected UTF-8, got other bytes"),
    "overlong": ("sst2", SST2 + b"\xc0\x80\t1\n", "line 2: expected UTF-8"),
    "half of a pair": ("sst2", SST2 + b"\xed\xa0\x80\t1\n", "line 2: expected UTF-8"),
    "cut in a character": ("sst2", SST2 + b"a\t1\nb\xc3", "line 3: expected UTF-8.*unexpected end"),
    "UTF-8 with a mark": ("sst2", b"\xef\xbb\xbf" + SST2 + b"a\t1\n", [{"sentence": "a", "label": 1}]),
    "two marks": ("sst2", b"\xef\xbb\xbf" * 2 + SST2 + b"a\t1\n", "'sentence' is not in '.ufeffsentence'"),
    "gzip": ("sst2", gzip.compress(b"a" * 50_000_000, 1), "line 1: expected UTF-8"),
    "zip": ("sst2", b"PK\x03\x04\xff\xfe", "line 1: expected UTF-8"),
    "a long line": ("sst2", SST2 + b"a " * 2_000_000 + b"\t1\n", "line 2: .*got a line of 1048576 characters or more"),
    "a long field": ("sst2", SST2 + b"a" * 131_073 + b"\t1\n", "line 2: expected a row.*field limit"),
    "a thousand tabs": ("sst2", SST2 + b"\t" * 1_000_000 + b"\n", "line 2: expected 2 tab-sep.*got 1000001"),
    "a thousand columns": ("sst2", b"x\t" * 100_000 + SST2 + b"a\n", r"line 2: expected 100002 .*x, x, .*\.\.\.\), got 1\."),
    "a header of something else": ("sst2", b"x" * 100_000 + b"\n", r"line 1: expected a header row.*xxx\.{4} Use"),
    "a column twice": ("sst2", b"sentence\t" + SST2 + b"a\tb\t1\n", "'sentence' is in .* more than once"),
    "another column twice": ("rte", b"x\tx\tsentence1\tsentence2\tlabel\n1\t2\ta\tb\tentailment\n", [{"sentence1": "a", "sentence2": "b", "label": 0}]),
    "columns in another order": ("sst2", b"label\tsentence\n1\ta\n", [{"sentence": "a", "label": 1}]),
    "a row too short": ("sst2", SST2 + b"a\n", "line 2: expected 2 tab-separated fields"),
    "a label of another kind": ("sst2", SST2 + b"a\tpositive\n", "line 2: expected one of the labels.*got 'positive'"),
    "a label with a blank": ("sst2", SST2 + b"a\t 1\n", "got ' 1'"),
    "a label in other digits": ("sst2", SST2 + "a\t\uff11\n".encode(), "expected one of the labels of sst2"),
    "no label": ("sst2", SST2 + b"a\t\n", "got ''"),
    "an endless label": ("sst2", SST2 + b"a\t" + b"1" * 100_000 + b"\n", r"got '1+\.\.\.\."),
    "a score": ("stsb", row_of_stsb(b"4.750"), [{"sentence1": "a", "sentence2": "b", "label": 4.75}]),
    "an endless score": ("stsb", row_of_stsb(b"9" * 100_000), r"line 2: expected a score from 0 to 5.*got '9+\.\.\.\."),
    **{
        f"score {score.decode()}": ("stsb", row_of_stsb(score), "line 2: expected a score from 0 to 5")
        for score in (b"nan", b"inf", b"1e400", b"0_4", b" 4", "\uff14".encode(), b"4e0", b"-0.1", b"0x4", b"5.01")
    },
    "carriage returns": ("sst2", b"sentence\tlabel\ra\t1\rb\t0\r", [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]),
    "breaks that are none": ("sst2", SST2 + "a\u2028\x0b\x1c\x85b\t1\n".encode(), [{"sentence": "a\u2028\x0b\x1c\x85b", "label": 1}]),
    "a formula": ("sst2", SST2 + b"=cmd|' /C calc'!A0\t1\n", [{"sentence": "=cmd|' /C calc'!A0", "label": 1}]),
    "every row broken": ("qqp", b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + b"1\t2\n" * 100, "at least one row of qqp, got none"),
}  # fmt: skip


def outcome(path, task_name):
    """The rows, or the text of a ValueError; anything else is not caught."""
    try:
        return read_glue_file(path, TASKS[task_name]).to_list()
    except ValueError as error:
        return str(error)


def as_it_should_be(found, wanted, path):
    if isinstance(wanted, list):
        return found == wanted
    # The message begins with the file, and is bounded however large the file is.
    return (
        isinstance(found, str) and found.startswith(str(path)) and len(found) < 900 and re.search(wanted, found, re.S)
    )


def test_tables(tmp_path, figure):
    path = tmp_path / "train.tsv"
    wrong = {}
    for name, (task_name, content, wanted) in CASES.items():
        path.write_bytes(content)
        found = outcome(path, task_name)
        if not as_it_should_be(found, wanted, path):
            wrong[name] = found
    figure("TSV files", len(CASES), len(CASES) - len(wrong))
    assert wrong == {}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["train.tsv", "dev.tsv"])
def test_what_is_no_file_is_named_and_not_opened(tmp_path, name, figure):
    right = 0
    for number, (kind, make) in enumerate(INSTEAD_OF_A_FILE.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for each in {"train.tsv", "dev.tsv"} - {name}:
            (folder / each).write_bytes(SST2 + b"a\t1\n")
        make(folder / name)
        mark = f"{name}/" if kind == "a folder" else rf"{name} \(no file\)"
        with pytest.raises(FileNotFoundError, match=rf"but {name} is not there \(found: .*{mark}"):
            read_glue_folder(folder, TASKS["sst2"])
        right += 1
    figure("TSV: no files", len(INSTEAD_OF_A_FILE), right)


@pytest.mark.timeout(30)
def test_what_is_no_file_of_ones_own_is_named_and_not_opened(tmp_path, figure):
    for number, make in enumerate(INSTEAD_OF_A_FILE.values()):
        path = tmp_path / f"{number}.csv"
        make(path)
        with pytest.raises(FileNotFoundError, match=f"{number}.csv: expected a CSV, TSV or JSON lines file, but "):
            read_file(path)
    figure("own tables: no files", len(INSTEAD_OF_A_FILE), len(INSTEAD_OF_A_FILE))


def test_a_folder_of_many_files_makes_no_long_message(tmp_path):
    for number in range(300):
        (tmp_path / f"{number}.tsv").touch()
    with pytest.raises(FileNotFoundError, match=r"found: 0\.tsv, .*\.\.\.\)") as caught:
        read_glue_folder(tmp_path, TASKS["sst2"])
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def flip(content, generator):
    damaged = bytearray(content)
    damaged[generator.integers(len(content))] ^= 1 << generator.integers(8)
    return bytes(damaged)


@pytest.mark.parametrize("tries", [200, pytest.param(2000, marks=pytest.mark.whole)])
def test_flipped_bits_end_in_rows_or_in_one_sentence(tmp_path, tries, figure):
    """A flip within a text cannot be seen; whatever comes is rows with labels of the task, or a ValueError that names the file."""
    generator = np.random.default_rng(0)
    content = SST2 + b"".join(b"sentence %d of some words\t%d\n" % (i, i % 2) for i in range(20))
    path = tmp_path / "train.tsv"
    right = 0
    for _ in range(tries):
        path.write_bytes(flip(content, generator))
        found = outcome(path, "sst2")
        right += found.startswith(str(path)) if isinstance(found, str) else {row["label"] for row in found} <= {0, 1}
    figure("TSV: flipped bits", tries, right)
    assert right == tries


OWN = {
    "a.csv": "text,label\n" + "".join(f'"sentence {i}, ""quoted""",{"ab"[i % 2]}\n' for i in range(20)),
    "a.tsv": "text\tlabel\n" + "".join(f"sentence {i}\t{'ab'[i % 2]}\n" for i in range(20)),
    "a.jsonl": "".join(f'{{"text": "sentence {i}", "label": {i % 2}}}\n' for i in range(20)),
    "a.json": "[" + ",".join(f'{{"text": "sentence {i}", "label": {i % 2}}}' for i in range(20)) + "]",
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("tries", [200, pytest.param(2000, marks=pytest.mark.whole)])
def test_flipped_bits_in_files_of_ones_own(tmp_path, name, tries, figure):
    """As above: as many values in every column, or a ValueError that names the file."""
    generator = np.random.default_rng(0)
    path = tmp_path / name
    right = 0
    for _ in range(tries):
        path.write_bytes(flip(OWN[name].encode(), generator))
        try:
            table = read_file(path)
            right += {len(values) for values in table.columns.values()} == {len(table)}
        except ValueError as error:
            right += str(error).startswith(str(path)) and len(str(error)) < 900 + len(str(path))
    figure(f"own tables: flipped bits, {name}", tries, right)
    assert right == tries


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.csv", b"\0" * 10_000_000, "line 1: expected text, got a NUL"),
        ("a.csv", ("text,label\n" + "x" * 2_000_000 + ",a\n").encode(), "line 2: .*got a line of 1048576 characters"),
        ("a.csv", ('text,label\n"' + "x\n" * 1_000_000).encode(), "line 2: expected a row of fields"),
        ("a.csv", b"x," * 100_000 + b"\n", "expected at least one row"),
        ("a.csv", "text,label\nx,a\n".encode("utf-16"), "line 1: expected UTF-8"),
        ("a.jsonl", gzip.compress(b"a" * 50_000_000, 1), "line 1: expected UTF-8"),
        ("a.json", b"[" * 100_000, "maximum recursion depth"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "maximum recursion depth"),
        ("a.jsonl", b'{"label": ' + b"1" * 10_000 + b"}", "digits"),
    ],
)
def test_hostile_files_of_ones_own(tmp_path, name, content, wanted):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){wanted}") as caught:
        read_file(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 900 + len(str(path))
