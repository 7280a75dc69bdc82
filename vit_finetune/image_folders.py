"""Folders of images: which image is of which class.

Of each split there is one folder, whose images lie

- in one folder per class: ``train/<class>/<image>``; or
- anywhere in it, and its ``metadata.csv`` has their paths and classes, as in the image folders of `datasets`; or,
- if nothing has to be known of their classes, side by side.

Names that begin with a dot are hidden, and passed over. Everything else is taken for a class or an image: what is neither
comes out when it is read. `datasets` itself leaves out, without a word, classes that are links or begin with "__", files
whose names it does not know, and all labels where one image lies deeper.
"""

import csv
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from image_data import LabelledImages, sorted_names
from image_files import StoredImages


logger = logging.getLogger(__name__)

TABLE = "metadata.csv"
FILE_COLUMN = "file_name"
LABEL_COLUMN = "label"


def read_split_folder(
    folder: Path, split: str, max_pixels: int, label_column: str | None = None, needs_labels: bool = True
) -> tuple[LabelledImages, list[str]]:
    """Images of one split, their labels, and the names of their classes in the order of the labels.

    Args:
        folder: Of this split.
        split: What it is called, for messages.
        max_pixels: How many pixels an image may have.
        label_column: Of ``metadata.csv``; "label" where that is None.
        needs_labels: Whether images of which no class is known are refused; otherwise their labels are None.

    Raises:
        ValueError: The folder holds something else, or nothing; or the header of an image shows that it cannot be read.
    """
    if (folder / TABLE).is_file():
        paths, classes, names = _read_table(folder, label_column, needs_labels)
    elif not needs_labels and not any(path.is_dir() for path in _visible(folder)):
        paths, classes, names = [str(path) for path in _visible(folder)], None, []
    elif label_column is not None:
        raise ValueError(
            f"--label_column_name {label_column}: expected a {TABLE} with this column in {folder}, got none. Put it there, or "
            "leave the option out, where folders tell the classes."
        )
    else:
        by_class = _images_by_class(folder)
        paths = [path for images in by_class.values() for path in images]
        classes = [name for name, images in by_class.items() for _ in images]
        names = sorted_names(by_class)
    images = StoredImages(paths, split, max_pixels, folder)
    images.check()
    if classes is None:
        return LabelledImages(images, None), names
    positions = {name: position for position, name in enumerate(names)}
    return LabelledImages(images, np.array([positions[name] for name in classes], dtype=np.int64)), names


def _images_by_class(folder: Path) -> dict[str, list[str]]:
    """Paths of the images in ``folder/<class>/<image>``, by class, both in order of their names."""
    classes = {}
    for path in _visible(folder):
        if not path.is_dir():
            found = "a link to nothing" if path.is_symlink() and not path.exists() else "a file"
            raise ValueError(
                f"{str(path)!r}: expected folders only in {folder}, one of images for each class, got {found}. Move or "
                "remove it."
            )
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{str(path)!r}: expected the name of a class in UTF-8, got other bytes. Rename it."
            ) from error
        classes[path.name] = [str(image) for image in _visible(path)]
    return classes


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_table(
    folder: Path, label_column: str | None, needs_labels: bool
) -> tuple[list[str], list[str] | None, list[str]]:
    """Paths, classes, and the names of the classes, as ``metadata.csv`` has them."""
    path = folder / TABLE
    lines: dict[str, int] = {}
    classes = []
    column = label_column or LABEL_COLUMN
    for line, row in _rows(path, (FILE_COLUMN, column) if needs_labels else (FILE_COLUMN,)):
        name = os.path.normpath(row[FILE_COLUMN])
        if not os.path.isfile(folder / name):
            raise ValueError(
                f"{path}, line {line}: expected the path of an image in {folder}, got {row[FILE_COLUMN]!r}, where no file "
                "is. Put it there, or remove the line."
            )
        if name in lines:
            raise ValueError(
                f"{path}, line {line}: expected every image once, got {row[FILE_COLUMN]!r} a second time, after line "
                f"{lines[name]}. Remove one of the two."
            )
        lines[name] = line
        if column in row:
            classes.append(row[column])
    if not lines:
        raise ValueError(f"{path}: expected a row for every image, got none. Add them, or remove the file.")
    _warn_of_images_without_a_row(folder, lines)
    return [str(folder / name) for name in lines], classes or None, sorted_names(classes)


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row with its line number from 1; all fields are there, and none that is needed is empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _check_header(path, header, needed)
            for fields in reader:
                if fields:
                    _check_fields(path, reader.line_num, header, fields, needed)
                    yield reader.line_num, dict(zip(header, fields, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got other bytes ({error}). Save it as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: expected a row of fields between commas, but {error}. Repair the line."
        ) from error


def _check_header(path: Path, header: list[str], needed: tuple[str, ...]) -> None:
    wrong = [name for name in needed if header.count(name) != 1]
    wrong += [name for name in dict.fromkeys(header) if header.count(name) > 1 and name not in needed]
    if wrong:
        raise ValueError(
            f"{path}, line 1: expected the columns {' and '.join(map(repr, needed))}, between commas and each once, got "
            f"{', '.join(map(repr, header)) or 'none'}. Name the columns so, or the one of the classes with "
            "--label_column_name."
        )


def _check_fields(path: Path, line: int, header: list[str], fields: list[str], needed: tuple[str, ...]) -> None:
    if len(fields) != len(header):
        raise ValueError(
            f"{path}, line {line}: expected {len(header)} fields ({', '.join(header)}), got {len(fields)}. Repair the line, "
            "with double quotes around fields that hold a comma."
        )
    row = dict(zip(header, fields, strict=True))
    for name in needed:
        # "nan" is what a table with gaps becomes when pandas writes it.
        if not row[name].strip() or row[name].strip().lower() == "nan" or "\0" in row[name]:
            raise ValueError(
                f"{path}, line {line}: expected {'a path' if name == FILE_COLUMN else 'the name of a class'} in the column "
                f"{name!r}, got {row[name]!r}. Fill it in, or remove the line."
            )


def _warn_of_images_without_a_row(folder: Path, named: dict[str, int]) -> None:
    found = (
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _folders, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    )
    others = sorted(set(found) - named.keys() - {TABLE})
    if others:
        logger.warning(
            "%s: has no row for %d files in its folder, %r for instance: they are not used.",
            folder / TABLE,
            len(others),
            others[0],
        )
