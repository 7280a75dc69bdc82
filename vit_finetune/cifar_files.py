"""CIFAR-10 and CIFAR-100 from the folders of their "python version" (https://www.cs.toronto.edu/~kriz/cifar.html).

Those folders hold pickles, and a pickle can name any function of any installed package and have it called. These are
read with a table of stand-ins for the few things that the official files name, and everything else is refused. No numpy
object is rebuilt by the pickle either: the pixels are taken from the bytes it holds.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CifarLayout:
    """Where one of the two datasets keeps what: file names, and the keys inside them."""

    folder: str
    train: str  # glob pattern: CIFAR-10 spreads its training images over data_batch_1, data_batch_2, ...
    test: str
    names: str
    labels_key: bytes
    names_key: bytes


CIFAR_LAYOUTS = {
    "cifar10": CifarLayout(
        "cifar-10-batches-py", "data_batch_*", "test_batch", "batches.meta", b"labels", b"label_names"
    ),
    "cifar100": CifarLayout("cifar-100-python", "train", "test", "meta", b"fine_labels", b"fine_label_names"),
}


def read_cifar_folder(
    dataset: str, data_dir: str | Path
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Read whatever training files there are, in order of their names, and the test file.

    Args:
        dataset: ``"cifar10"`` or ``"cifar100"`` (its 100 fine labels).
        data_dir: The official folder (``cifar-10-batches-py``, ``cifar-100-python``), or the folder that holds it.

    Returns:
        ``{"train": (images, labels), "test": (images, labels)}`` with images ``(n, 32, 32, 3)`` uint8 (height, width,
        red-green-blue) and labels ``(n,)`` int64, and the names of the classes.

    Raises:
        FileNotFoundError: A file of the official layout is missing.
        ValueError: A file holds something else than CIFAR images, or names what only a harmful file would name.
    """
    layout = CIFAR_LAYOUTS[dataset]
    folder = Path(data_dir)
    if (folder / layout.folder).is_dir():
        folder = folder / layout.folder
    train_files = sorted(folder.glob(layout.train))
    missing = [name for name in (layout.test, layout.names) if not (folder / name).is_file()]
    if missing or not train_files:
        raise FileNotFoundError(
            f"The {dataset} folder holds {layout.train}, {layout.test} and {layout.names}, but {folder} lacks "
            f"{', '.join(missing if train_files else [layout.train, *missing])}. Unpack the official python version "
            f"there (it makes a folder {layout.folder}), or leave --data_dir out to load it from the Hub."
        )
    label_names = _read_names(folder / layout.names, layout.names_key)
    train = [_read_batch(path, layout.labels_key, len(label_names)) for path in train_files]
    images, labels = zip(*train, strict=True)
    test = _read_batch(folder / layout.test, layout.labels_key, len(label_names))
    return {"train": (np.concatenate(images), np.concatenate(labels)), "test": test}, label_names


class _DType:
    """Stand-in for the numpy dtype of the pixels: checks that it is uint8 and keeps nothing."""

    def __init__(self, name: str | bytes, align: int, copy: int):
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of type {name!r} instead of 'u1'")

    def __setstate__(self, state: tuple):
        """Byte order and alignment: single bytes have none."""


class _Array:
    """Stand-in for the numpy array of the pixels: a view of the bytes that the pickle holds."""

    values: np.ndarray

    def __setstate__(self, state: tuple):
        _version, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, _DType):
            raise pickle.UnpicklingError("an array without a type")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(subtype: type, shape: tuple, typecode: bytes) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes with pickle protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r} instead of 'latin1'")
    return text.encode("latin1")


class _CifarUnpickler(pickle.Unpickler):
    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # numpy 2
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name}, which no CIFAR file needs and which might do harm")
        return self.allowed[module, name]


def _unpickle(path: Path, *keys: bytes) -> list[Any]:
    """Values of `keys` in the dictionary that the file holds."""
    try:
        with path.open("rb") as file:
            contents = _CifarUnpickler(file, encoding="bytes").load()
    # What the documentation of pickle names for files that are cut off or damaged.
    except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was not read: expected a file of the official python version of CIFAR, found {error}. "
            "Fetch it again from https://www.cs.toronto.edu/~kriz/cifar.html."
        ) from error
    found = list(contents) if isinstance(contents, dict) else type(contents).__name__
    if not isinstance(contents, dict) or not set(keys) <= contents.keys():
        raise ValueError(f"{path}: expected a dictionary with the keys {list(keys)}, got {found}.")
    return [contents[key] for key in keys]


def _read_names(path: Path, key: bytes) -> list[str]:
    (names,) = _unpickle(path, key)
    return [name.decode("ascii") for name in names]


def _read_batch(path: Path, labels_key: bytes, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(n, 32, 32, 3)`` uint8 and labels ``(n,)`` int64 of one file."""
    pixels, labels = _unpickle(path, b"data", labels_key)
    shape = pixels.values.shape if isinstance(pixels, _Array) else type(pixels).__name__
    if shape != (len(labels), 3 * 32 * 32):
        raise ValueError(
            f"{path}: expected {len(labels)} rows of 3072 pixel values, one for each label, got {shape}. "
            "Fetch the file again."
        )
    for index, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise ValueError(
                f"{path}: expected labels from 0 to {num_classes - 1}, got {label!r} for image {index}. "
                "Is this the folder of the other CIFAR dataset?"
            )
    # A row holds 1024 red values, then green, then blue, each a 32 x 32 image row by row.
    images = pixels.values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, dtype=np.int64)
