"""Labelled images for the ViT task: where they come from, how labels are corrupted, how images become pixel values.

Images are kept as they are stored (an array of bytes, files, or an undecoded column of `datasets`), and read and
transformed when an item is asked for. A plain torch dataset does that: putting the 50 000 arrays of CIFAR into a `datasets.Dataset`
would mean to encode each as PNG first (0.7 ms per image, measured) and to decode it again in every epoch (0.2 ms).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from cifar_files import read_cifar_folder
from image_files import MAX_PIXELS, StoredImages, images_by_class, naming, to_rgb
from PIL import Image, ImageOps
from transformers import BaseImageProcessor


# Repository on the Hub, column of the images, column of the labels.
HUB_COLUMNS = {
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
}


class LabelledImages(NamedTuple):
    """``n`` images, each a PIL image or an array that Pillow takes, ``(height, width[, 3])`` uint8 say, and their labels ``(n,)`` int64."""

    images: Sequence[Any]
    labels: np.ndarray


class ImageTask(NamedTuple):
    """Training and test images of one task, and the names of its classes in the order of the labels."""

    train: LabelledImages
    test: LabelledImages
    label_names: list[str]


def load_image_task(dataset: str, data_dir: str | None = None, max_pixels: int = MAX_PIXELS) -> ImageTask:
    """Load a task from the Hub, from the official CIFAR folders or from a folder of images.

    Args:
        dataset: ``"cifar10"``, ``"cifar100"`` or ``"imagefolder"``.
        data_dir: For CIFAR the official folder or the one that holds it, `None` to load from the Hub. For an image
            folder the folder with ``train/<class>/<image>`` and ``test/<class>/<image>`` (or ``validation/...``).
        max_pixels: How many pixels an image may have.

    Raises:
        FileNotFoundError: `data_dir`, or a part of it, is missing.
        ValueError: What is there is no such task, or the header of an image in a folder shows that it cannot be read.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"--data_dir: expected a folder, but {data_dir} is none.")
    if dataset == "imagefolder":
        if data_dir is None:
            raise ValueError("--dataset imagefolder reads a folder: name it with --data_dir.")
        return _load_image_folder(Path(data_dir), max_pixels)
    if data_dir is not None:
        files, label_names = read_cifar_folder(dataset, data_dir)
        return ImageTask(LabelledImages(*files["train"]), LabelledImages(*files["test"]), label_names)
    repository, image_column, label_column = HUB_COLUMNS[dataset]
    hub = datasets.load_dataset(repository)
    train, test = (_labelled(hub[split], split, image_column, label_column, max_pixels) for split in ("train", "test"))
    return ImageTask(train, test, hub["train"].features[label_column].names)


def _load_image_folder(folder: Path, max_pixels: int) -> ImageTask:
    # Not by the "imagefolder" of datasets: it leaves out, without a word, classes that are links or begin with "__",
    # files whose names it does not know, and all labels where one image lies deeper.
    tests = [name for name in ("test", "validation") if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        raise FileNotFoundError(
            f"An image folder holds train/ and test/ (or validation/), each with one folder of images per class, but "
            f"{folder} holds {str(sorted(path.name for path in folder.iterdir()))[:200]}."
        )
    train, test = images_by_class(folder / "train"), images_by_class(folder / tests[0])
    empty = [name for name, images in train.items() if not images]
    if len(train) < 2 or empty:
        raise ValueError(
            f"Expected at least two folders of images in {folder / 'train'}, one per class and none of them empty, got "
            f"{len(train)}{f', of which {empty[0]!r} is empty' if empty else ''}."
        )
    unknown = sorted(test.keys() - train.keys())
    if unknown or not any(test.values()):
        raise ValueError(
            f"Expected images of the classes of {folder / 'train'} in {folder / tests[0]}, got "
            f"{f'a class {unknown[0]!r}, of which nothing is learned' if unknown else 'none'}."
        )
    label_names = list(train)

    def labelled(images: dict[str, list[str]], split: str) -> LabelledImages:
        stored = StoredImages([path for paths in images.values() for path in paths], split, max_pixels)
        stored.check()
        labels = np.repeat([label_names.index(name) for name in images], [len(paths) for paths in images.values()])
        return LabelledImages(stored, labels.astype(np.int64))

    return ImageTask(labelled(train, "train"), labelled(test, tests[0]), label_names)


def _labelled(
    data: datasets.Dataset, split: str, image_column: str, label_column: str, max_pixels: int
) -> LabelledImages:
    names = data.features[label_column].names
    # A column is decoded entry by entry on access: right for images, 8 seconds for the labels of CIFAR.
    labels = data[label_column][:]
    for index, label in enumerate(labels):
        if label is None or not 0 <= label < len(names):
            raise ValueError(f"Expected labels from 0 to {len(names) - 1}, got {label} for image {index} of {split}.")
    # Undecoded, so that an image that cannot be read has a name.
    undecoded = data.cast_column(image_column, datasets.Image(decode=False))[image_column]
    return LabelledImages(StoredImages(undecoded, split, max_pixels), np.array(labels, dtype=np.int64))


def corrupt_labels(labels: np.ndarray, share: float, num_classes: int, seed: int) -> np.ndarray:
    """Symmetric label noise (SAMPa paper, section 5.4 and Table 7).

    ``round(share * n)`` labels, drawn without replacement, are each replaced by one drawn uniformly from the *other*
    classes, so that exactly this share is wrong afterwards. Where a draw may return the true label, as in some papers, a
    share of 0.4 leaves 0.36 of CIFAR-10's labels wrong.

    Args:
        labels: True labels ``(n,)``, n > 0, from 0 to `num_classes` - 1. Left as they are.
        share: Share of labels to corrupt, in [0, 1).
        num_classes: Number of classes, at least 2.
        seed: Which labels are corrupted, and how, depends on this and on nothing else.

    Raises:
        ValueError: `share` or a label is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"--label_noise: expected a share of the training labels in [0, 1), got {share}.")
    low, high = np.min(labels), np.max(labels)
    if low < 0 or high >= num_classes:
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}, got {low} to {high}.")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    corrupted = np.array(labels)
    # A shift by 1 to C - 1 classes, round the circle of labels, reaches every other class with the same probability.
    shifts = generator.integers(1, num_classes, size=len(chosen))
    corrupted[chosen] = (corrupted[chosen] + shifts) % num_classes
    return corrupted


def random_crop(image: Image.Image, padding: int = 4) -> Image.Image:
    """Pad with `padding` black pixels on every side, then cut the image's own size out at a random place."""
    left, top = torch.randint(2 * padding + 1, (2,)).tolist()
    padded = ImageOps.expand(image, border=padding)
    return padded.crop((left, top, left + image.width, top + image.height))


def random_flip(image: Image.Image) -> Image.Image:
    """Mirror left and right with probability 1/2."""
    return ImageOps.mirror(image) if torch.rand(()) < 0.5 else image


class ImageTransform:
    """RGB image to pixel values ``(3, height, width)`` float32, as the model's image processor resizes and normalises them.

    With `augment` the image is cropped and flipped first, at the resolution it has: 4 pixels of 32 are an eighth of a
    CIFAR image, 4 of 224 would be next to nothing. The draws come from torch's global generator.
    """

    def __init__(self, image_processor: BaseImageProcessor, *, augment: bool):
        self.image_processor = image_processor
        self.augment = augment

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if self.augment:
            image = random_flip(random_crop(image))
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]


class ImageDataset(torch.utils.data.Dataset):
    """Map-style dataset whose items are ``{"pixel_values": (3, height, width), "labels": int}``.

    Raises:
        ValueError: There is not one label per image; or (on access) an image cannot be read, which the message names.
    """

    def __init__(self, data: LabelledImages, transform: Callable[[Image.Image], torch.Tensor]):
        if len(data.images) != len(data.labels):
            raise ValueError(
                f"Expected one label per image, got {len(data.images)} images and {len(data.labels)} labels."
            )
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.data.images[index]
        with naming(f"image {index}"):
            image = to_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        return {"pixel_values": self.transform(image), "labels": int(self.data.labels[index])}
