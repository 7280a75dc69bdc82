"""Labelled images of the Hub, or of any data set that `datasets` loads: one column of images and one of their classes."""

from pathlib import Path

import datasets
import numpy as np
from image_data import LabelledImages, sorted_names
from image_files import StoredImages
from vit_arguments import VALIDATION, DataArguments


# Repository, column of the images, column of the labels.
CIFAR_ON_THE_HUB = {
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
}


class HubImages:
    """A data set of the Hub, by the names that `args` give, or have, for its splits and columns.

    Raises:
        ValueError: There is no such split or column, or it is not clear which one is meant.
    """

    def __init__(self, args: DataArguments, token: str | None = None, cache_dir: str | None = None):
        self.repository, image, label = CIFAR_ON_THE_HUB.get(args.dataset, (args.dataset_name, None, None))
        self.name = args.dataset or args.dataset_name
        self.max_pixels = args.max_image_pixels
        self.card = {"dataset": self.name, "dataset_tags": self.repository, "dataset_args": args.dataset_config_name}
        try:
            self.data = datasets.load_dataset(
                self.repository,
                args.dataset_config_name,
                revision=args.dataset_revision,
                token=token,
                cache_dir=cache_dir,
            )
        # Of a configuration that is not there, for instance.
        except ValueError as error:
            raise ValueError(f"--dataset_name {self.repository} was not loaded: {error}") from error
        self.splits = self._splits(args)
        first = self.data[next(iter(self.splits.values()))]
        if first.builder_name == "imagefolder" and Path(self.repository).is_dir():
            raise ValueError(
                f"--dataset_name: expected a data set on the Hub or a folder of its files, got {self.repository}, a folder "
                "of images. Name it with --data_dir or --train_dir: links and odd names are read there, too."
            )
        self.image = self._column(first, "image", args.image_column_name or image, (datasets.Image,), ("image", "img"))
        self.label = self._column(
            first, "label", args.label_column_name or label, (datasets.ClassLabel,), ("label", "labels", "class")
        )

    def read(self, split: str) -> tuple[LabelledImages, list[str]]:
        """Images and labels of a split, and the names of the classes; labels of "test" are None if all are missing."""
        name = self.splits[split]
        data = self.data[name]
        # Undecoded, so that an image that cannot be read has a name.
        try:
            undecoded = data.cast_column(self.image, datasets.Image(decode=False))[self.image]
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"--image_column_name: expected a column of images, got {self.image!r} of {data.features[self.image]}. Name "
                f"another one of {', '.join(data.features)}."
            ) from error
        images = StoredImages(undecoded, name, self.max_pixels)
        # A column is decoded entry by entry on access: right for images, 8 seconds for the labels of CIFAR.
        labels = data[self.label][:]
        if split == "test" and all(label in (None, -1) for label in labels):
            return LabelledImages(images, None), []
        feature = data.features[self.label]
        if isinstance(feature, datasets.ClassLabel):
            _check_numbers(labels, name, len(feature.names))
            return LabelledImages(images, np.array(labels, dtype=np.int64)), feature.names
        classes = _as_names(labels, name, self.label, feature)
        names = sorted_names(classes)
        positions = {each: position for position, each in enumerate(names)}
        return LabelledImages(images, np.array([positions[each] for each in classes], dtype=np.int64)), names

    def _splits(self, args: DataArguments) -> dict[str, str]:
        given = {
            "train": args.train_split_name,
            "validation": args.validation_split_name,
            "test": args.test_split_name,
        }
        found = {}
        for split, name in given.items():
            usual = VALIDATION if split == "validation" else (split,)
            names = [name] if name is not None else [each for each in usual if each in self.data]
            if name is not None and name not in self.data:
                raise ValueError(
                    f"--{split}_split_name: expected one of {', '.join(self.data)}, the splits of {self.repository}, got {name}."
                )
            if len(names) > 1:
                raise ValueError(
                    f"{self.repository}: expected one split of validation images, got {' and '.join(names)}. Name the one "
                    "that is meant with --validation_split_name."
                )
            if names:
                found[split] = names[0]
        if not found:
            raise ValueError(
                f"{self.repository}: expected a split called train, validation or test, got {', '.join(self.data)}. Name "
                "them with --train_split_name, --validation_split_name and --test_split_name."
            )
        return found

    def _column(
        self, data: datasets.Dataset, what: str, given: str | None, kinds: tuple[type, ...], usual: tuple[str, ...]
    ) -> str:
        """Name of the column that is `given`, or of the only one of a kind, or of the one with a usual name."""
        if given is not None and given in data.features:
            return given
        of_kind = [name for name, feature in data.features.items() if isinstance(feature, kinds)]
        found = of_kind or [name for name in usual if name in data.features]
        if given is None and len(found) == 1:
            return found[0]
        raise ValueError(
            f"--{what}_column_name: expected one of the columns of {self.repository}, {', '.join(data.features)}, got "
            f"{given or ('several that it may be' if found else 'none that it may be')}. Name the column of the {what}s."
        )


def _check_numbers(labels: list[int | None], split: str, count: int) -> None:
    for index, label in enumerate(labels):
        if label is None or not 0 <= label < count:
            raise ValueError(f"Expected labels from 0 to {count - 1}, got {label} for image {index} of {split}.")


def _as_names(labels: list, split: str, column: str, feature: object) -> list[str]:
    """Texts and whole numbers as the names of classes."""
    for index, label in enumerate(labels):
        if not isinstance(label, str | int) or (isinstance(label, str) and not label.strip()):
            raise ValueError(
                f"Expected a text or a whole number for the class of every image, got {label!r} for image {index} of {split}, "
                f"in the column {column!r} of {feature}. Name another one with --label_column_name, or mend it."
            )
    return [str(label) for label in labels]
