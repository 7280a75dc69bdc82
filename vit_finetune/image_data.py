"""Labelled images as arrays, and as the data sets that a trainer reads; which of them are taken.

Images are kept as they are stored (an array of bytes, files, or an undecoded column of `datasets`), and read and
transformed when an item is asked for. A plain torch dataset does that: putting the 50 000 arrays of CIFAR into a `datasets.Dataset`
would mean to encode each as PNG first (0.7 ms per image, measured) and to decode it again in every epoch (0.2 ms).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from image_files import StoredImages, naming, to_rgb
from PIL import Image
from sklearn.model_selection import train_test_split


class LabelledImages(NamedTuple):
    """``n`` images, each a PIL image or an array that Pillow takes, ``(height, width[, 3])`` uint8 say, and their labels.

    Labels are ``(n,)`` int64, or None for images to be predicted of which no class is known.
    """

    images: Sequence[Any]
    labels: np.ndarray | None

    def take(self, positions: np.ndarray) -> "LabelledImages":
        """The images at `positions`, still read when they are asked for."""
        labels = None if self.labels is None else self.labels[positions]
        return LabelledImages(torch.utils.data.Subset(self.images, positions.tolist()), labels)


def names_of(images: Sequence[Any]) -> list[str]:
    """What each image is called: the path of its file in the folder of its split, or its number in its data set, from 0."""
    if isinstance(images, torch.utils.data.Subset):
        names = names_of(images.dataset)
        return [names[position] for position in images.indices]
    return images.names() if isinstance(images, StoredImages) else [str(index) for index in range(len(images))]


def paths_of(images: Sequence[Any]) -> list[str]:
    """Paths of the images' files; none for images that have no files of their own."""
    if isinstance(images, torch.utils.data.Subset):
        paths = paths_of(images.dataset)
        return [paths[position] for position in images.indices] if paths else []
    return images.paths if isinstance(images, StoredImages) else []


def sorted_names(names: Iterable[str]) -> list[str]:
    """Each name once: in the order of their numbers if they are numbers, otherwise of their letters."""
    found = sorted(set(names))
    return sorted(found, key=int) if all(name.isascii() and name.isdecimal() for name in found) else found


# Which images are taken is drawn with a seed of its own: whatever the run's seed is, the same are scored, and a later run
# scores none that this one trained on.
_DRAW = 0


def draw(data: LabelledImages, limit: int | None) -> LabelledImages:
    """At most `limit` images, drawn without replacement and kept in their order: folders are in the order of the classes."""
    if limit is None or limit >= len(data.images):
        return data
    return data.take(np.sort(np.random.default_rng(_DRAW).permutation(len(data.images))[:limit]))


def hold_out(data: LabelledImages, share: float, names: Sequence[str]) -> tuple[LabelledImages, LabelledImages]:
    """Training images and those held out for evaluation, of each class the same share.

    Args:
        data: All of them.
        share: How many are held out.
        names: Of the classes.

    Raises:
        ValueError: There are too few images to have every class on both sides.
    """
    count, (labels, counts) = round(share * len(data.images)), np.unique(data.labels, return_counts=True)
    if single := [names[label] for label in labels[counts == 1]]:
        raise ValueError(
            f"--train_val_split {share:g}: expected at least two images of every class, one for each side, got one of "
            f"{', '.join(map(repr, single[:10]))}. Add images of it or take it out, or name a --validation_dir."
        )
    if min(count, len(data.images) - count) < len(counts):
        raise ValueError(
            f"--train_val_split {share:g}: expected at least {len(counts)} of the {len(data.images)} images on both sides, one of "
            f"every class, got {count} to hold out. Give a {'larger' if count < len(counts) else 'smaller'} share or more images, or "
            "name a --validation_dir."
        )
    rest, held_out = train_test_split(
        np.arange(len(data.images)), test_size=count, random_state=_DRAW, stratify=data.labels
    )
    return data.take(np.sort(rest)), data.take(np.sort(held_out))


class ImageDataset(torch.utils.data.Dataset):
    """Map-style dataset whose items are ``{"pixel_values": (3, height, width), "labels": int}``, or without labels.

    Raises:
        ValueError: There is not one label per image; or (on access) an image cannot be read, which the message names.
    """

    def __init__(self, data: LabelledImages, transform: Callable[[Image.Image], torch.Tensor]):
        if data.labels is not None and len(data.images) != len(data.labels):
            raise ValueError(
                f"Expected one label per image, got {len(data.images)} images and {len(data.labels)} labels."
            )
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.data.images[index]
        with naming(f"image {index}"):
            image = to_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        item = {"pixel_values": self.transform(image)}
        return item if self.data.labels is None else item | {"labels": int(self.data.labels[index])}
