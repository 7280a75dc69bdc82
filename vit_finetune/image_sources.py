"""Where labelled images come from: the official CIFAR files, folders of images, the Hub.

A source says which splits it has before it reads one, so that nothing is read that is not needed.
"""

from functools import cached_property
from pathlib import Path
from typing import Protocol

from cifar_files import read_cifar_folder
from hub_images import HubImages
from image_data import LabelledImages, hold_out
from image_folders import TABLE, read_split_folder
from vit_arguments import VALIDATION, DataArguments


class Source(Protocol):
    """Labelled images in splits.

    Attributes:
        splits: Of "train", "validation" and "test" those there are, with the source's own name for each.
        name: For people.
        card: What a model card says of the data, by the names of `CardFacts`.
    """

    splits: dict[str, str]
    name: str
    card: dict[str, str | None]

    def read(self, split: str) -> tuple[LabelledImages, list[str]]:
        """Images and labels of a split, and the names of the classes in the order of the labels.

        Labels of "test" may be None.
        """
        ...


def open_source(args: DataArguments, token: str | None = None, cache_dir: str | None = None) -> Source:
    """The source that `args` name.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: It is not clear which of several folders or columns is meant.
    """
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        raise FileNotFoundError(f"--data_dir: expected a folder, but {args.data_dir} is none.")
    if args.dataset == "imagefolder":
        source = ImageFolders(args)
    elif args.data_dir is not None:
        source = CifarFolder(args)
    else:
        source = HubImages(args, token, cache_dir)
    return source if args.train_val_split is None else HeldOut(source, args.train_val_split)


class HeldOut:
    """A source without validation images, of whose training images a share is held out for validation.

    Raises:
        ValueError: The source has validation images, or no training images; or (on reading) too few of some class to share.
    """

    def __init__(self, source: Source, share: float):
        if "validation" in source.splits:
            raise ValueError(
                f"--train_val_split holds validation images out of the training images: expected {source.name} to have none "
                f"of its own, but it has {source.splits['validation']!r}. Leave --train_val_split out to score those."
            )
        if "train" not in source.splits:
            raise ValueError(
                f"--train_val_split holds validation images out of the training images: expected some in {source.name}, got "
                f"{' and '.join(source.splits.values())} alone. Name them with --train_dir, or leave --train_val_split out."
            )
        self.source, self.share, self.name, self.card = source, share, source.name, source.card
        self.splits = source.splits | {"validation": f"{source.splits['train']}, {100 * share:g}% held out"}

    def read(self, split: str) -> tuple[LabelledImages, list[str]]:
        if split not in ("train", "validation"):
            return self.source.read(split)
        data, names = self._shared
        return data[split == "validation"], names

    @cached_property
    def _shared(self) -> tuple[tuple[LabelledImages, LabelledImages], list[str]]:
        data, names = self.source.read("train")
        return hold_out(data, self.share, names), names


class CifarFolder:
    """The official files of CIFAR-10 or CIFAR-100, which have no validation split."""

    splits = {"train": "train", "test": "test"}

    def __init__(self, args: DataArguments):
        self.dataset, self.folder = args.dataset, args.data_dir
        self.name = f"the local folder {Path(args.data_dir).resolve().name} in the format of {args.dataset}"
        self.card = {"dataset": self.name}

    def read(self, split: str) -> tuple[LabelledImages, list[str]]:
        files, names = read_cifar_folder(self.dataset, self.folder, [split])
        return LabelledImages(*files[split]), names


class ImageFolders:
    """One folder for each split, in ``--data_dir`` or named one by one."""

    def __init__(self, args: DataArguments):
        named = {"train": args.train_dir, "validation": args.validation_dir, "test": args.test_dir}
        self.args, self.folders = args, {}
        for split, folder in named.items():
            if folder is not None:
                if not Path(folder).is_dir():
                    raise FileNotFoundError(f"--{split}_dir: expected a folder, but {folder} is none.")
                _check_no_splits(f"--{split}_dir", Path(folder))
                self.folders[split] = Path(folder)
            elif args.data_dir is not None and (found := _folder_of(split, Path(args.data_dir))):
                self.folders[split] = found
        if not self.folders:
            raise FileNotFoundError(
                f"An image folder holds train/ and validation/ or test/, each with one folder of images per class, but "
                f"{args.data_dir} holds {str(sorted(path.name for path in Path(args.data_dir).iterdir()))[:200]}. Name the "
                "folders one by one: --train_dir, --validation_dir (or --train_val_split 0.1), --test_dir."
            )
        self.splits = {split: folder.name for split, folder in self.folders.items()}
        whole = [args.data_dir] if args.data_dir is not None else self.folders.values()
        names = list(dict.fromkeys(Path(folder).resolve().name for folder in whole))
        self.name = f"the local folder{'s' if len(names) > 1 else ''} {' and '.join(names)}"
        self.card = {"dataset": self.name}

    def read(self, split: str) -> tuple[LabelledImages, list[str]]:
        folder = self.folders[split]
        data, names = read_split_folder(
            folder, folder.name, self.args.max_image_pixels, self.args.label_column_name, needs_labels=split != "test"
        )
        empty = sorted(set(range(len(names))) - set(data.labels)) if split == "train" else []
        if split == "train" and (len(names) < 2 or empty):
            raise ValueError(
                f"Expected at least two folders of images in {folder}, one per class and none of them empty, or two classes "
                f"in its metadata.csv, got {len(names)}{f', of which {names[empty[0]]!r} is empty' if empty else ''}."
            )
        return data, names


def _check_no_splits(option: str, folder: Path) -> None:
    """Raise ValueError for a folder of splits in the place of one, whose names would be taken for those of classes."""
    within = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    # With a table it is clear what the classes are.
    if len(within) > 1 and {"train", "test", *VALIDATION}.issuperset(within) and not (folder / TABLE).is_file():
        raise ValueError(
            f"{option}: expected a folder with images, in one folder per class or with a {TABLE}, got {folder} with "
            f"{', '.join(within)}. Name it with --data_dir, or one of its folders here."
        )


def _folder_of(split: str, folder: Path) -> Path | None:
    names = VALIDATION if split == "validation" else (split,)
    found = [folder / name for name in names if (folder / name).is_dir() or (folder / name).is_symlink()]
    if len(found) > 1:
        raise ValueError(
            f"{folder}: expected one folder of validation images, got {' and '.join(path.name for path in found)}. Name "
            "the one that is meant with --validation_dir."
        )
    if found and not found[0].is_dir():
        raise FileNotFoundError(f"{found[0]}: expected a folder, got a link to nothing or to a file. Mend the link.")
    return found[0] if found else None
