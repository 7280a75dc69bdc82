"""The images of one run: which split is for what, how many of each, and what is odd about their classes."""

import logging
import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from image_data import LabelledImages, draw, paths_of, sorted_names
from image_sources import Source
from vit_arguments import DataArguments


logger = logging.getLogger(__name__)

_WHAT_TO_SCORE = (
    "Hold some of the training images out with --train_val_split 0.1, name a folder with --validation_dir, or leave "
    "scoring out with --do_eval false"
)
# What images are for, and what a class that has none lacks.
_PURPOSES = {
    "train": ("train on", "nothing is learned of them"),
    "evaluation": ("score", "the score says nothing of them"),
}


class ImageTask(NamedTuple):
    """Images to train on, to score and to predict, as far as a run wants them, with labels that count the same names.

    Attributes:
        label_names: Of the classes, in the order of the labels; empty where no image has a label.
        scored: What the source calls the split that is scored.
        remarks: What a model card has to say of the choice.
    """

    train: LabelledImages | None
    evaluation: LabelledImages | None
    test: LabelledImages | None
    label_names: list[str]
    scored: str | None
    remarks: list[str]

    def with_labels(self, ids: Sequence[int]) -> "ImageTask":
        """The task with the label ``ids[i]`` in the place of ``i``."""
        parts = [data and _renumbered(data, ids) for data in (self.train, self.evaluation, self.test)]
        return ImageTask(*parts, *self[len(parts) :])


def load_image_task(
    source: Source, args: DataArguments, *, train: bool = True, evaluate: bool = True, predict: bool = False
) -> ImageTask:
    """The images that a run wants, and no others.

    Scored are the validation images; where there are none, the test images, which is said.

    Raises:
        FileNotFoundError: Files of a split are missing.
        ValueError: There are none of the images that are wanted, or they cannot be used; the message says why.
    """
    wanted = {
        "train": "train" if train else None,
        "evaluation": _scored(source, train) if evaluate else None,
        "test": "test" if predict else None,
    }
    wanted = {part: split for part, split in wanted.items() if split is not None}
    for split in wanted.values():
        _check_split(source, split)
    read = {split: source.read(split) for split in dict.fromkeys(wanted.values())}
    names = _common_names(source, {split: own for split, (_, own) in read.items()})

    places = {name: place for place, name in enumerate(names)}
    whole = {
        part: _renumbered(read[split][0], [places[name] for name in read[split][1]]) for part, split in wanted.items()
    }
    for part, split in wanted.items():
        _check_images(source, split, whole[part], needs_labels=part != "test")
    limits = {"train": args.max_train_samples, "evaluation": args.max_eval_samples, "test": args.max_predict_samples}
    parts = {part: draw(data, limits[part]) for part, data in whole.items()}

    called = {part: source.splits[split] for part, split in wanted.items()}
    _warn_of_spellings(names)
    _warn_of_missing_classes(called, parts, names)
    if train and evaluate:
        _warn_of_shared_files(parts["train"], parts["evaluation"])
    remarks = _remarks(called, whole, parts)
    if train and wanted.get("evaluation") == "test":
        remarks.append("there were no validation images: the test images were scored while it was trained")
    return ImageTask(*(parts.get(part) for part in limits), names, called.get("evaluation"), remarks)


def _remarks(called: dict[str, str], whole: dict[str, LabelledImages], parts: dict[str, LabelledImages]) -> list[str]:
    """What a limit left of the splits."""
    return [
        f"of {len(whole[part].images)} images of {called[part]}, {len(parts[part].images)} were drawn at random to {purpose}"
        for part, (purpose, _) in _PURPOSES.items()
        if part in parts and len(parts[part].images) < len(whole[part].images)
    ]


def _scored(source: Source, train: bool) -> str:
    """The split to score. Says which, where it might be another one."""
    splits = source.splits
    if "validation" in splits:
        if "test" in splits:
            logger.info("Of %s, %s is scored, and not %s.", source.name, splits["validation"], splits["test"])
        return "validation"
    if "test" not in splits:
        raise ValueError(
            f"Expected images to score in {source.name}, got {' and '.join(splits.values())} alone. {_WHAT_TO_SCORE}."
        )
    if train:
        logger.warning(
            "%s has no validation images: its %s images are scored. A choice made by these scores makes them look better "
            "than they are: --train_val_split 0.1 keeps the test images for the end.",
            source.name,
            splits["test"],
        )
    return "test"


# Which images a part of the run needs, and how to do without it.
_NEEDS = {
    "train": ("--do_train needs training images", "leave training out with --do_train false"),
    "test": ("--do_predict needs test images", "leave --do_predict out"),
}


def _check_split(source: Source, split: str) -> None:
    if split not in source.splits:
        needed, without = _NEEDS[split]
        raise ValueError(
            f"{needed}: expected some in {source.name}, got {' and '.join(source.splits.values())} alone. Name them with "
            f"--{split}_dir (on the Hub with --{split}_split_name), or {without}."
        )


def _common_names(source: Source, names: dict[str, list[str]]) -> list[str]:
    """Names of the classes of all splits; with training images, of theirs."""
    if "train" not in names:
        first = next(iter(names.values()), [])
        return first if all(own == first for own in names.values()) else sorted_names(sum(names.values(), []))
    learned = names["train"]
    if len(learned) < 2:
        raise ValueError(f"Expected at least two classes in {source.name}, got {learned}.")
    for split, own in names.items():
        unknown = sorted(set(own) - set(learned))
        if unknown:
            near = [name for name in learned if _spelling(name) == _spelling(unknown[0])]
            raise ValueError(
                f"Expected images of the classes of {source.splits['train']} in {source.splits[split]}, got a class "
                f"{unknown[0]!r}, of which nothing is learned. "
                + (f"Is it {near[0]!r}? " if near else "")
                + "Rename or remove it"
                + (", or name it with --test_dir if its classes are not known." if split == "test" else ".")
            )
    return learned


def _check_images(source: Source, split: str, data: LabelledImages, needs_labels: bool) -> None:
    if not len(data.images):
        raise ValueError(f"Expected images of the classes in {source.splits[split]} of {source.name}, got none.")
    if needs_labels and data.labels is None:
        raise ValueError(
            f"Expected images of known classes in {source.splits[split]} of {source.name}, to score them, got images alone. "
            f"{_WHAT_TO_SCORE}."
        )


def _renumbered(data: LabelledImages, ids: Sequence[int]) -> LabelledImages:
    return data if data.labels is None else data._replace(labels=np.array(ids, dtype=np.int64)[data.labels])


def _spelling(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _warn_of_spellings(names: list[str]) -> None:
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_spelling(name), name)
        if other != name:
            logger.warning(
                "The classes %r and %r differ in capitals, spaces or the coding of letters alone, and are taken for two. "
                "Rename one of them if they are one.",
                other,
                name,
            )


def _warn_of_missing_classes(called: dict[str, str], parts: dict[str, LabelledImages], names: list[str]) -> None:
    for part, (_, loss) in _PURPOSES.items():
        if part not in parts:
            continue
        missing = np.flatnonzero(np.bincount(parts[part].labels, minlength=len(names)) == 0)
        if len(missing):
            logger.warning(
                "%d of %d classes have no %s image, %r for instance: %s.",
                len(missing),
                len(names),
                called[part],
                names[missing[0]],
                loss,
            )


def _warn_of_shared_files(train: LabelledImages, evaluation: LabelledImages) -> None:
    learned = {os.path.realpath(path) for path in paths_of(train.images)}
    shared = [path for path in paths_of(evaluation.images) if os.path.realpath(path) in learned]
    if shared:
        logger.warning(
            "%d of %d images that are scored are training images, too, %r for instance: their score is of what was learned "
            "by heart. Give them files of their own.",
            len(shared),
            len(evaluation.images),
            shared[0],
        )
