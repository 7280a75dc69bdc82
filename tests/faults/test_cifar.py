"""Damaged and hostile CIFAR files: read exactly, or one sentence that names the file; nothing of them is ever run."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import re
import resource
import struct
import tarfile

import numpy as np
import pytest
from cifar_files import read_cifar_folder

from tests.faults.no_files import INSTEAD_OF_A_FILE


RECONSTRUCT = np.empty(0).__reduce__()[0]  # numpy's own, which is in another place in numpy 1 than in numpy 2


def dumped(contents, protocol=2):
    return pickle.dumps(contents, protocol)


def batch(n=3, **changed):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3072), dtype=np.uint8)
    contents = {b"data": pixels, b"labels": list(range(n)), **{key.encode(): value for key, value in changed.items()}}
    return {key: value for key, value in contents.items() if value is not ...}


NAMES = [b"class%d" % index for index in range(10)]
GOOD = dumped(batch())


def with_data(*state, raw=bytes(3 * 3072), dtype="u1"):
    """A batch whose array has been given another state: (shape, is in column order)."""

    class Array:
        def __reduce__(self):
            return RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, state[0], np.dtype(dtype), *state[1:], raw)

    return dumped(batch(data=Array()))


class Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def nested(depth):
    """A dictionary with one tuple of tuples of tuples as its key: hashing it would overrun the stack."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


def again_and_again(size, times):
    """One text, to be encoded anew each time."""
    text = b"X" + struct.pack("<I", size) + b"a" * size + b"q\0"
    call = b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R"
    return b"\x80\x02" + text + b"0](" + call * times + b"e."


def doubled(levels):
    """A label of lists that hold the one before twice: written out, it would fill any message."""
    return functools.reduce(lambda inner, _: [inner, inner], range(levels), ["x" * 100])


NOT_READ = "was not read: expected a file of the official python version of CIFAR, found "
# Content of data_batch_1, and words of the message.
BATCHES = {
    "empty": (b"", NOT_READ),
    "zeros": (bytes(5000), NOT_READ),
    "half": (GOOD[: len(GOOD) // 2], NOT_READ),
    "without its end": (GOOD[:-1], NOT_READ),
    "gzip": (gzip.compress(GOOD), NOT_READ),
    "a page": (b"<!DOCTYPE html><html>", NOT_READ),
    "the binary version": (bytes([3]) + bytes(3072), NOT_READ),
    "an archive": (tarfile.TarInfo("data_batch_1").tobuf() + GOOD, NOT_READ),
    "a number": (dumped(3), "expected a dictionary with the keys .*, got int"),
    "a list": (dumped([3]), "expected a dictionary with the keys .*, got list"),
    "an empty dictionary": (dumped({}), r"expected a dictionary with the keys .*, got \[\]"),
    "many keys": (dumped({b"%d" % each: 0 for each in range(10_000)}), r"expected a dictionary .* b'5', \.\.\.\]"),
    "an endless key": (dumped({1 << 100_000: 0}), r"got \[an integer of more than 64 bits\]"),
    "other keys": (dumped(batch(labels=..., fine_labels=[0])), "expected a dictionary with the keys"),
    "labels: text": (dumped(batch(labels="012")), "expected a list of labels, got '012'"),
    "labels: bytes": (dumped(batch(labels=b"\0\1\2")), "expected a list of labels, got "),
    "labels: None": (dumped(batch(labels=None)), "expected a list of labels, got None"),
    "labels: a number": (dumped(batch(labels=3)), "expected a list of labels, got 3"),
    "labels: a tuple": (dumped(batch(labels=(0, 1, 2))), r"expected a list of labels, got \(0, 1, 2\)"),
    "labels: a dictionary": (dumped(batch(labels={0: 1})), "expected a list of labels, got {0: 1}"),
    "labels: an array": (dumped(batch(labels=np.arange(3, dtype=np.uint8))), "expected a list of labels, got <"),
    "labels: none": (dumped(batch(0), 4), r"expected a list of labels, got \[\]"),
    "labels: too few": (dumped(batch(labels=[0, 1])), r"expected 2 rows of 3072 .* got \(3, 3072\)"),
    "labels: too many": (dumped(batch(labels=[0] * 10_000)), r"expected 10000 rows of 3072 .* got \(3, 3072\)"),
    "label: None": (dumped(batch(labels=[0, None, 1])), "labels from 0 to 9, got None for image 1"),
    "label: text": (dumped(batch(labels=[0, "1", 1])), "labels from 0 to 9, got '1' for image 1"),
    "label: a float": (dumped(batch(labels=[0, 1.0, 1])), r"labels from 0 to 9, got 1\.0 for image 1"),
    "label: no number": (dumped(batch(labels=[0, float("nan"), 1])), "labels from 0 to 9, got nan for image 1"),
    "label: True": (dumped(batch(labels=[0, True, 1])), "labels from 0 to 9, got True for image 1"),
    "label: negative": (dumped(batch(labels=[0, -1, 1])), "labels from 0 to 9, got -1 for image 1"),
    "label: ten": (dumped(batch(labels=[0, 10, 1])), "labels from 0 to 9, got 10 for image 1"),
    "label: endless": (dumped(batch(labels=[0, 1 << 10**6, 1])), "got an integer of more than 64 bits for image 1"),
    "label: a long text": (dumped(batch(labels=[0, "x" * 10**6, 1])), r"got 'x+\.\.\.x+' for image 1"),
    "label: doubled": (dumped(batch(labels=[0, doubled(60), 1])), r"got \[\[\[\.\.\.\], \[\.\.\.\]\], \[\[\.\.\.\], \[\.\.\.\]\]\] for image 1"),
    "data: None": (dumped(batch(data=None)), "expected 3 rows of 3072 .* got NoneType"),
    "data: bytes": (dumped(batch(data=bytes(9216))), "expected 3 rows of 3072 .* got bytes"),
    "data: lists": (dumped(batch(data=[[0] * 3072] * 3)), "expected 3 rows of 3072 .* got list"),
    "data: flat": (dumped(batch(data=np.zeros(9216, np.uint8))), r"expected 3 rows of 3072 .* got \(9216,\)"),
    "data: on its side": (dumped(batch(data=np.zeros((3072, 3), np.uint8))), r"got \(3072, 3\)"),
    "data: images": (dumped(batch(data=np.zeros((3, 32, 32, 3), np.uint8))), r"got \(3, 32, 32, 3\)"),
    "data: never filled": (dumped(batch(data=Call(RECONSTRUCT, np.ndarray, (0,), b"b"))), r"got \(0,\)"),
    **{
        f"data: {kind}": (dumped(batch(data=np.zeros((3, 3072), kind))), f"{NOT_READ}an array of type")
        for kind in ("int8", "uint16", "int64", "float32", "float64", "bool", "complex64", "S1")
    },
    "data: more than there is": (with_data((10**12, 3072), False), NOT_READ),
    "data: beyond counting": (with_data((10**30, 3072), False), NOT_READ),
    "data: a negative size": (with_data((-5, 3072), False), NOT_READ),
    "data: a size of text": (with_data(("3", 3072), False), NOT_READ),
    "data: bytes of None": (with_data((3, 3072), False, raw=None), NOT_READ),
    "data: too few bytes": (with_data((3, 3072), False, raw=bytes(9215)), NOT_READ),
    "a size of 10**12, 8 bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b".", NOT_READ),
    "a frame of 10**12": (b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b"N.", NOT_READ),
    "a text of 4 GB": (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".", NOT_READ),
    "a number of 2 GB": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", NOT_READ),
    "place 2**31 in a table": (b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".", f"{NOT_READ}place 2147483647 in a table"),
    "place 10**15 in a table": (b"\x80\x02Np1" + b"0" * 15 + b"\n.", f"{NOT_READ}place 1{'0' * 15} in a table"),
    "tuples in tuples": (nested(3_000_000), f"{NOT_READ}more than 100000 tuples"),
    "a text encoded ten thousand times": (again_and_again(10**6, 10_000), "expected a dictionary .*, got list"),
    "an endless name": (b"c" + b"x" * 10**6 + b"\ny\n.", rf"{NOT_READ}x+\. Fetch"),
    "a program": (dumped(batch(data=Call(os.system, "touch ran"))), "which no CIFAR file needs"),
    "a program, protocol 0": (b"cos\nsystem\n(S'touch ran'\ntR.", r"os\.system, which no CIFAR file needs"),
    "a program, by instance": (b"(S'touch ran'\nios\nsystem\n.", r"os\.system, which no CIFAR file needs"),
    "a program, protocol 4": (dumped(Call(eval, "open('ran', 'w')"), 4), r"builtins\.eval, which no CIFAR file needs"),
    "a way round": (b"\x80\x04cnumpy\nndarray.__init_subclass__\n.", "which no CIFAR file needs"),
    "a stored object": (b"Pran\n.", NOT_READ),
    "an extension": (b"\x80\x02\x82\x01.", NOT_READ),
}  # fmt: skip

# Content of batches.meta, and words of the message.
META = {
    "empty": (b"", NOT_READ),
    "other keys": (dumped({b"fine_label_names": NAMES}), "expected a dictionary with the keys"),
    "one too few": (dumped({b"label_names": NAMES[:9]}), "expected 10 different names of classes, got 9, 9 of them different"),
    "one too many": (dumped({b"label_names": [*NAMES, b"x"]}), "expected 10 different names of classes, got 11"),
    "none": (dumped({b"label_names": []}), "expected 10 different names of classes, got 0"),
    "one twice": (dumped({b"label_names": [*NAMES[:9], NAMES[0]]}), "expected 10 different names of classes, got 10, 9 of"),
    "None": (dumped({b"label_names": None}), "expected a list of names in ASCII, got None"),
    "a text": (dumped({b"label_names": "abcdefghij"}), "expected a list of names in ASCII, got 'abcdefghij'"),
    "bytes": (dumped({b"label_names": b"abcdefghij"}), "expected a list of names in ASCII, got "),
    "a dictionary": (dumped({b"label_names": dict.fromkeys(NAMES)}), "expected a list of names in ASCII, got {"),
    "texts": (dumped({b"label_names": [name.decode() for name in NAMES]}), "expected a list of names in ASCII, got 'class0'"),
    "numbers": (dumped({b"label_names": list(range(10))}), "expected a list of names in ASCII, got 0"),
    "a name that is None": (dumped({b"label_names": [*NAMES[:9], None]}), "expected a list of names in ASCII, got None"),
    "an empty name": (dumped({b"label_names": [*NAMES[:9], b" "]}), "expected a list of names in ASCII, got b' '"),
    "not ASCII": (dumped({b"label_names": [*NAMES[:9], b"\xff"]}), "expected a list of names in ASCII, got b'.xff'"),
    "an endless name": (dumped({b"label_names": [*NAMES[:9], b"\xff" * 10**6]}), "expected a list of names in ASCII"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # Where a program of a pickle would leave its file.
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(GOOD)
    (folder / "batches.meta").write_bytes(dumped({b"label_names": NAMES}))
    return folder


def is_refused(folder, name, message):
    """None, or what came instead of a short ValueError that begins with the file."""
    try:
        read_cifar_folder("cifar10", folder)
    except ValueError as error:
        begins_right = re.match(rf"{re.escape(str(folder / name))}:? .*{message}", str(error), re.S)
        return None if begins_right and len(str(error)) < 600 + len(str(folder)) else str(error)[:500]
    return "read"


@pytest.fixture
def little_memory():
    """An attempt to take gigabytes fails, instead of taking the machine with it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("name", "cases"), [("data_batch_1", BATCHES), ("test_batch", BATCHES), ("batches.meta", META)]
)
def test_files_that_are_none_are_refused_by_name(folder, name, cases, figure):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = {}
    for case, (content, message) in cases.items():
        (folder / name).write_bytes(content)
        if (found := is_refused(folder, name, message)) is not None:
            wrong[case] = found
    figure("CIFAR files", len(cases), len(cases) - len(wrong))
    assert wrong == {}
    assert not (folder.parent / "ran").exists(), "something of a file was run"
    # KiB; the largest of these files has 4 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_a_file_beyond_all_measure_is_not_read(folder):
    with (folder / "test_batch").open("r+b") as file:
        file.truncate(50 << 30)
    with pytest.raises(ValueError, match=r"test_batch: expected at most 1073741824 bytes, got 53687091200\. Fetch"):
        read_cifar_folder("cifar10", folder)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_what_is_no_file_is_named_and_not_opened(folder, name, figure):
    right = 0
    for make in INSTEAD_OF_A_FILE.values():
        path = folder / name
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(FileNotFoundError, match=rf"holds the files .* lacks {name}\. Unpack"):
            read_cifar_folder("cifar10", folder)
        path.rmdir() if path.is_dir() else path.unlink()
        right += 1
    figure("CIFAR: no files", len(INSTEAD_OF_A_FILE), right)


def test_copies_beside_the_official_files_are_no_training_images(folder):
    for name in ("data_batch_1.bak", "data_batch_1 (1)", "data_batch_6", "data_batch_"):
        (folder / name).write_bytes(GOOD)
    (images, labels) = read_cifar_folder("cifar10", folder)[0]["train"]
    assert images.shape == (3, 32, 32, 3) and labels.tolist() == [0, 1, 2]


def test_archives_in_place_of_the_folder_are_named(folder):
    for name, content in (("x.tar.gz", gzip.compress(b"x" * 100)), ("x.tar", bytes(10240)), ("x", b"")):
        (folder.parent / name).write_bytes(content)
        with pytest.raises(FileNotFoundError, match=f"The cifar10 folder holds the files .* but .*{name} lacks"):
            read_cifar_folder("cifar10", folder.parent / name)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("tries", [300, pytest.param(20_000, marks=pytest.mark.whole)])
def test_flipped_bits_end_in_images_or_in_one_sentence(folder, tries, figure):
    """In the pickle around the pixels; a flip among the pixels cannot be seen."""
    generator = np.random.default_rng(0)
    path = folder / "data_batch_1"
    content = dumped(batch(1, labels=[3], filenames=[b"a.png"]))
    at = content.index(b"\x08_codecs") if b"\x08_codecs" in content else 0
    around = [*range(at, min(at + 200, len(content))), *range(len(content) - 120, len(content)), *range(60)]
    right = 0
    for _ in range(tries):
        damaged = bytearray(content)
        damaged[generator.choice(around)] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            images, labels = read_cifar_folder("cifar10", folder)[0]["train"]
            right += images.shape == (1, 32, 32, 3) and images.dtype == np.uint8 and 0 <= labels[0] <= 9
        except ValueError as error:
            right += str(error).startswith(str(path))
    figure("CIFAR: flipped bits", tries, right)
    assert right == tries


def test_what_python_2_and_3_wrote_is_read_exactly(folder):
    buffer = io.BytesIO()
    pickle.dump(batch(), buffer, 4)
    for content in (GOOD, buffer.getvalue()):
        (folder / "data_batch_1").write_bytes(content)
        images, labels = read_cifar_folder("cifar10", folder)[0]["train"]
        assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(3, 3072), batch()[b"data"])
        assert labels.tolist() == [0, 1, 2]
