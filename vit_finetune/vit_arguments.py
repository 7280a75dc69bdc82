"""Command line of run_vit.py: images, model, and the training arguments with the paper's settings as defaults."""

from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from cifar_files import CIFAR_LAYOUTS, find_cifar
from image_files import MAX_PIXELS
from transformers import SchedulerType

from hf_sampa.finetuning import (
    FineTuningArguments,
    FineTuningParser,
    ModelArguments,
    is_without_weights,
    parse_arguments,
)


USAGE = r"""python -m hf_sampa launch vit_finetune/run_vit.py --dataset cifar10 --output_dir FOLDER [options]
   or: python vit_finetune/run_vit.py --dataset cifar10 --output_dir FOLDER [options]"""
DESCRIPTION = """Fine-tune a ViT, or any other image classifier, on CIFAR-10, CIFAR-100, a data set on the Hub or images of your own
(--train_dir pictures --train_val_split 0.1), with SAMPa (or --method sam, adamw), save it, and score it on images that it
was not trained on. The first command starts a SAMPa pair of two processes, the second
one process, with the same numbers in about twice the time (bit for bit with
OMP_NUM_THREADS=1, which the first command sets). More commands are at the top of vit_finetune/run_vit.py."""
SOURCES = """The SAMPa paper (arXiv 2410.10683) gives for ViT-B/16, in section 5.3: AdamW, gradients clipped at a global
norm of 1, 10 epochs, a peak learning rate of 1e-4. For the rest it refers to its CIFAR experiments in section 5.1, which
are about convolutional networks under SGD. What is taken over from there is marked "section 5.1" above."""

# Section 5.1 trains SAM with rho 0.05 on CIFAR-10 and SAMPa-0.2 with twice SAM's radius.
DEFAULT_RHO = {"adamw": 0.0, "sam": 0.05, "sampa": 0.1}


# What the validation images are called, on the Hub and in folders.
VALIDATION = ("validation", "val", "valid", "dev")

# Settings of a data set that is named by --dataset_name.
OF_THE_HUB = (
    *("dataset_config_name", "dataset_revision", "image_column_name"),
    *("train_split_name", "validation_split_name", "test_split_name"),
)


@dataclass
class DataArguments:
    """Which images, and what is done to them and their labels.

    Attributes:
        dataset: "imagefolder" for folders of images; None for a `dataset_name`.

    Raises:
        ValueError: Two settings contradict one another, one would have no effect, or a number is out of range.
    """

    _argument_group_name: ClassVar[str] = "data"

    dataset: Literal["cifar10", "cifar100", "imagefolder"] | None = field(
        default=None,
        metadata={
            "help": "Images to train on: a CIFAR data set, from the Hub or from its official files in --data_dir, or folders of "
            "images. Default: what --data_dir holds; imagefolder with --train_dir, --validation_dir or --test_dir; "
            "otherwise cifar10."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Any image data set on the Hub, or a folder of its files, in place of --dataset."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of its repository. Default: its main branch."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Its column of images. Default: the only one."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Its column of classes, or the one in the metadata.csv of a folder. Default: on the Hub the only one of "
            "classes, in a metadata.csv 'label'."
        },
    )
    train_split_name: str | None = field(default=None, metadata={"help": "Its split to train on. Default: train."})
    validation_split_name: str | None = field(
        default=None,
        metadata={"help": f"Its split to score. Default: {', '.join(VALIDATION[:-1])} or {VALIDATION[-1]}."},
    )
    test_split_name: str | None = field(default=None, metadata={"help": "Its split to predict. Default: test."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with train/, validation/ (or val/) and test/, of which those that a run needs have to be there. "
            "In each lie folders of images, one per class, or images and a metadata.csv with the columns file_name and "
            "label. Everything in the folder of a class is an image (16 bits are scaled, transparency shows white). For "
            "CIFAR the official folder of the python version (cifar-10-batches-py, cifar-100-python) or the folder it is in."
        },
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images, in place of the one in --data_dir."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder of images to score, in place of the one in --data_dir."}
    )
    test_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images to predict with --do_predict, in place of the one in --data_dir. If their classes are "
            "not known, they lie in it side by side."
        },
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training images, between 0 and 1, to hold out and score where there are no validation images: "
            "of each class the same share, and the same images whatever --seed is. Without it, the test images are scored "
            "then."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images, drawn at random, the same whatever --seed is."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Score so many images, drawn in the same way."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Predict so many images, drawn in the same way."}
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training labels, in [0, 1), replaced by another class drawn with --seed (symmetric "
            "noise, Table 7). There, with a convolutional network, rho is 0.1 for SAM and SAMPa alike, and 0.01 at a "
            "share of 0.8."
        },
    )
    augment: bool = field(
        default=True,
        metadata={
            "help": "Crop the training images at random, and mirror half of them. Turn it off where a mirror image means "
            "something else, as with digits."
        },
    )
    crop: Literal["padded", "resized"] | None = field(
        default=None,
        metadata={
            "help": "With --augment: padded moves an image by up to 4 of its pixels, over a black frame; resized takes a window "
            "of 8 to 100 %% of its area. Default: padded for CIFAR, resized for all others."
        },
    )
    max_image_pixels: int = field(
        default=MAX_PIXELS,
        metadata={
            "help": "How many pixels an image of a folder or of the Hub may have. A larger one is refused, by name and "
            "before it is decoded: a file of some kilobytes can hold one that fills the memory."
        },
    )

    def __post_init__(self):
        folders = self._given("train_dir", "validation_dir", "test_dir")
        if self.dataset_name is not None:
            self._refuse("--dataset_name", self._given("dataset", "data_dir") + folders)
        else:
            self.dataset = self.dataset or self._found_in(folders)
            without_effect = self._given(*OF_THE_HUB)
            if self.dataset != "imagefolder":
                without_effect += folders + self._given("label_column_name")
            self._refuse(f"--dataset {self.dataset}", without_effect)
        if self.dataset == "imagefolder" and not folders and self.data_dir is None:
            raise ValueError(
                "--dataset imagefolder reads a folder: name it with --data_dir, or its parts with --train_dir."
            )
        if self.crop is not None and not self.augment:
            raise ValueError(f"--crop {self.crop} would have no effect with --no_augment: expected one of the two.")
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split: expected a share between 0 and 1, got {self.train_val_split}.")
        for name in self._given("max_image_pixels", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected a positive number, got {getattr(self, name)}.")

    @property
    def crop_in_force(self) -> str | None:
        """How training images are cropped; None where they are not."""
        usual = "padded" if self.dataset in CIFAR_LAYOUTS else "resized"
        return (self.crop or usual) if self.augment else None

    def _found_in(self, folders: list[str]) -> str:
        """The data set where none is named."""
        if folders:
            return "imagefolder"
        return "cifar10" if self.data_dir is None else find_cifar(self.data_dir) or "imagefolder"

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]

    def _refuse(self, beside: str, given: list[str]) -> None:
        if given:
            raise ValueError(
                f"{', '.join(f'--{name} {getattr(self, name)}' for name in given)} would have no effect with {beside}. Leave "
                "out what is not meant."
            )


# Settings of a new model.
SHAPE = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")


@dataclass
class ViTModelArguments(ModelArguments):
    """Which model to start from.

    Raises:
        ValueError: A setting would have no effect, or the patches do not fill the image.
    """

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={
            "help": "Image classifier on the Hub or in a folder, a ViT or any other. One in a folder with a config.json and "
            "without weights starts from random weights."
        },
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor on the Hub or in a folder, if it is not the model's own."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Start a ViT from random weights, in the shape of the four settings below."}
    )
    image_size: int = field(default=32, metadata={"help": "With --from_scratch: input height and width, in pixels."})
    patch_size: int = field(default=4, metadata={"help": "With --from_scratch: patch height and width, in pixels."})
    hidden_size: int = field(
        default=128, metadata={"help": "With --from_scratch: width of the model; one attention head for every 64."}
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "With --from_scratch: number of layers."})

    @property
    def random_weights(self) -> bool:
        """Whether training starts from random weights, for want of others."""
        return self.from_scratch or is_without_weights(self.model_name_or_path)

    def __post_init__(self):
        changed = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        others = [name for name in changed if name not in (*SHAPE, "from_scratch")]
        shape = [name for name in changed if name in SHAPE]
        if self.from_scratch and others:
            raise ValueError(
                f"--from_scratch starts from random weights and --{others[0]} from {getattr(self, others[0])}: expected one "
                "of the two."
            )
        if not self.from_scratch and shape:
            raise ValueError(
                f"{', '.join(f'--{name}' for name in sorted(shape))} would have no effect: {self.model_name_or_path} has its "
                "own shape. Add --from_scratch to start a new model."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"--image_size: expected a multiple of --patch_size {self.patch_size}, got {self.image_size}."
            )


@dataclass
class ViTTrainingArguments(FineTuningArguments):
    """`FineTuningArguments` with the paper's settings for ViT-B/16 as defaults."""

    rho: float = field(
        default=DEFAULT_RHO["sampa"],
        metadata={
            "help": "rho >= 0, radius of the perturbation. Left open by the paper for ViT: 0.05 for sam and 0.1 for "
            "sampa are its CIFAR-10 values (section 5.1), where SAMPa's is twice SAM's."
        },
    )
    batch_size: int = field(
        default=128,
        metadata={
            "help": "Images per update, over all processes and micro-batches; the two processes of a SAMPa pair count "
            "once. Section 5.1."
        },
    )
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per device for evaluation."})
    learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Peak learning rate of AdamW. Whether it warms up (--warmup_steps) is left open."},
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Learning rate schedule. Section 5.1."}
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the training images."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Global norm at which gradients are clipped."})
    label_smoothing_factor: float = field(
        default=0.1, metadata={"help": "Share of each target spread over all classes. Section 5.1."}
    )
    weight_decay: float = field(
        default=5e-4,
        metadata={"help": "Weight decay of AdamW. Section 5.1, where it is SGD's: the paper leaves it open."},
    )


def make_parser() -> FineTuningParser:
    """Parser with the defaults for SAMPa; `parse_args` puts in the method's rho."""
    return FineTuningParser(
        (ViTModelArguments, DataArguments, ViTTrainingArguments), usage=USAGE, description=DESCRIPTION, epilog=SOURCES
    )


def parse_args(argv: list[str] | None = None) -> tuple[ViTModelArguments, DataArguments, ViTTrainingArguments]:
    """Read the command line. The default of ``--rho`` is that of the ``--method`` it names; an explicit one wins.

    Raises:
        FileExistsError: the run would write into an `output_dir` that is not empty.
    """
    return parse_arguments(make_parser(), argv, defaults=_defaults)


def _defaults(given: Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"rho": DEFAULT_RHO[given.method]}
    # Not always: it is shown on cards, and decides nothing else.
    if given.early_stopping_patience is not None:
        found["metric_for_best_model"] = "accuracy"
    return found
