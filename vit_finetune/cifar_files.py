"""CIFAR-10 and CIFAR-100 from the folders of their "python version" (https://www.cs.toronto.edu/~kriz/cifar.html).

Those folders hold pickles, and a pickle can name any function of any installed package and have it called. These are
read with a table of stand-ins for the few things that the official files name, and everything else is refused. No numpy
object is rebuilt by the pickle either: the pixels are taken from the bytes it holds. Before any of it is built, the file
is looked through for sizes that it cannot hold: some bytes of a pickle can ask for a table of gigabytes.
"""

import functools
import pickle
import pickletools
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CifarLayout:
    """Where one of the two datasets keeps what: file names, and the keys inside them."""

    folder: str
    train: str  # glob pattern: CIFAR-10 spreads its training images over data_batch_1 to data_batch_5
    test: str
    names: str
    labels_key: bytes
    names_key: bytes
    num_classes: int


CIFAR_LAYOUTS = {
    "cifar10": CifarLayout(
        "cifar-10-batches-py", "data_batch_[1-5]", "test_batch", "batches.meta", b"labels", b"label_names", 10
    ),
    "cifar100": CifarLayout("cifar-100-python", "train", "test", "meta", b"fine_labels", b"fine_label_names", 100),
}

# The largest official file, the training images of CIFAR-100, has 156 MB.
_LARGEST_FILE = 1 << 30


class _Found(reprlib.Repr):
    """What a message shows of what a file held, however much that is."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 2

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write out integers of thousands of digits.
        return super().repr_int(value, level) if abs(value) < 1 << 63 else "an integer of more than 64 bits"


_shown = _Found().repr


def find_cifar(data_dir: str | Path) -> str | None:
    """Which of the two datasets the folder holds, or a part of, by the names of its files; None for neither."""
    for dataset, layout in CIFAR_LAYOUTS.items():
        folder = _official_folder(layout, data_dir)
        if any(path.is_file() for name in (layout.train, layout.test, layout.names) for path in folder.glob(name)):
            return dataset
    return None


def _official_folder(layout: CifarLayout, data_dir: str | Path) -> Path:
    within = Path(data_dir) / layout.folder
    return within if within.is_dir() else Path(data_dir)


def read_cifar_folder(
    dataset: str, data_dir: str | Path, splits: Sequence[str] = ("train", "test")
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Read whatever training files there are, in order of their names, and the test file.

    Args:
        dataset: ``"cifar10"`` or ``"cifar100"`` (its 100 fine labels).
        data_dir: The official folder (``cifar-10-batches-py``, ``cifar-100-python``), or the folder that holds it.
        splits: Which of the two to read; the files of the other one need not be there.

    Returns:
        ``{"train": (images, labels), "test": (images, labels)}`` with images ``(n, 32, 32, 3)`` uint8 (height, width,
        red-green-blue) and labels ``(n,)`` int64, and the names of the classes.

    Raises:
        FileNotFoundError: A file of the official layout is missing.
        ValueError: A file holds something else than CIFAR images or the names of their classes, is damaged, or names
            what only a harmful file would name.
    """
    layout = CIFAR_LAYOUTS[dataset]
    folder = _official_folder(layout, data_dir)
    train_files = sorted(folder.glob(layout.train))
    files = {"train": [path.name for path in train_files] or [layout.train], "test": [layout.test]}
    expected = [name for split in splits for name in files[split]] + [layout.names]
    # Opening a pipe would wait for its other end.
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The {dataset} folder holds the files {layout.train}, {layout.test} and {layout.names}, but {folder} lacks "
            f"{', '.join(missing)}. Unpack the official python version "
            f"there (it makes a folder {layout.folder}), or leave --data_dir out to load it from the Hub."
        )
    label_names = _read_names(folder / layout.names, layout)
    read = {}
    for split in splits:
        images, labels = zip(*(_read_batch(folder / name, layout) for name in files[split]), strict=True)
        read[split] = (np.concatenate(images), np.concatenate(labels))
    return read, label_names


class _DType:
    """Stand-in for the numpy dtype of the pixels: checks that it is uint8 and keeps nothing."""

    def __init__(self, name: str | bytes, align: int, copy: int):
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of type {name!r} instead of 'u1'")

    def __setstate__(self, state: tuple):
        """Byte order and alignment: single bytes have none."""


class _Array:
    """Stand-in for the numpy array of the pixels: a view of the bytes that the pickle holds."""

    values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple):
        _version, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, _DType):
            raise pickle.UnpicklingError("an array without a type")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")
        # numpy takes a negative size for one that it is to find out.
        if self.values.shape != shape:
            raise pickle.UnpicklingError("an array of a negative size")


def _reconstruct(subtype: type, shape: tuple, typecode: bytes) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes with pickle protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r} instead of 'latin1'")
    return text.encode("latin1")


class _CifarUnpickler(pickle.Unpickler):
    def __init__(self, raw: bytes):
        super().__init__(BytesIO(raw), encoding="bytes")
        self.allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # numpy 2
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _DType,
            # A text that is encoded again and again must not take memory again.
            ("_codecs", "encode"): functools.cache(_encode),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name}, which no CIFAR file needs and which might do harm")
        return self.allowed[module, name]


def _check_sizes(raw: bytes) -> None:
    """Refuse a pickle that would make Python's unpickler fill the memory or overrun its stack."""
    count = nested = 0
    for opcode, argument, _position in pickletools.genops(raw):
        count += 1
        if "PUT" in opcode.name and argument > count:
            raise pickle.UnpicklingError(f"place {argument} in a table that has {count} at most")
        # Tuples in tuples are hashed by recursion, without a limit. Written by Python 3, a file has one for each name.
        nested += "TUPLE" in opcode.name
        if nested > 100_000:
            raise pickle.UnpicklingError("more than 100000 tuples")


def _unpickle(path: Path, *keys: bytes) -> list[Any]:
    """Values of `keys` in the dictionary that the file holds."""
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path}: expected at most {_LARGEST_FILE} bytes, got {path.stat().st_size}. Fetch it again.")
    raw = path.read_bytes()
    try:
        _check_sizes(raw)
        contents = _CifarUnpickler(raw).load()
    # What the documentation of pickle names for files that are cut off or damaged, and sizes that no memory has.
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path} was not read: expected a file of the official python version of CIFAR, found "
            f"{str(error)[:200] or type(error).__name__}. Fetch it again from https://www.cs.toronto.edu/~kriz/cifar.html."
        ) from error
    found = _shown(list(contents)) if isinstance(contents, dict) else type(contents).__name__
    if not isinstance(contents, dict) or not set(keys) <= contents.keys():
        raise ValueError(f"{path}: expected a dictionary with the keys {list(keys)}, got {found}.")
    return [contents[key] for key in keys]


def _read_names(path: Path, layout: CifarLayout) -> list[str]:
    def is_name(value: Any) -> bool:
        return isinstance(value, bytes) and value.isascii() and bool(value.strip())

    (names,) = _unpickle(path, layout.names_key)
    wrong = [name for name in names if not is_name(name)] if isinstance(names, list) else [names]
    if wrong:
        raise ValueError(f"{path}: expected a list of names in ASCII, got {_shown(wrong[0])}. Fetch the file again.")
    if len(names) != layout.num_classes or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: expected {layout.num_classes} different names of classes, got {len(names)}, {len(set(names))} of "
            "them different. Fetch the file again."
        )
    return [name.decode("ascii") for name in names]


def _read_batch(path: Path, layout: CifarLayout) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(n, 32, 32, 3)`` uint8 and labels ``(n,)`` int64 of one file."""
    pixels, labels = _unpickle(path, b"data", layout.labels_key)
    if not isinstance(labels, list) or not labels:
        raise ValueError(f"{path}: expected a list of labels, got {_shown(labels)}. Fetch the file again.")
    shape = pixels.values.shape if isinstance(pixels, _Array) else type(pixels).__name__
    if shape != (len(labels), 3 * 32 * 32):
        raise ValueError(
            f"{path}: expected {len(labels)} rows of 3072 pixel values, one for each label, got {shape}. "
            "Fetch the file again."
        )
    for index, label in enumerate(labels):
        # Not isinstance: True is an int.
        if type(label) is not int or not 0 <= label < layout.num_classes:
            raise ValueError(
                f"{path}: expected labels from 0 to {layout.num_classes - 1}, got {_shown(label)} for image {index}. "
                "Is this the folder of the other CIFAR dataset?"
            )
    # A row holds 1024 red values, then green, then blue, each a 32 x 32 image row by row.
    images = pixels.values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, dtype=np.int64)
