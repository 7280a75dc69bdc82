"""Command line of run_vit.py: images, model, and the training arguments with the paper's settings as defaults."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from image_files import MAX_PIXELS
from transformers import HfArgumentParser, SchedulerType

from hf_sampa.finetuning import FineTuningArguments, parse_arguments


USAGE = r"""accelerate launch --config_file accelerate_configs/gpu_2.yaml \
           vit_finetune/run_vit.py --dataset cifar10 --output_dir FOLDER [options]
   or: python vit_finetune/run_vit.py --dataset cifar10 --output_dir FOLDER [options]"""
DESCRIPTION = """Fine-tune a ViT on CIFAR-10, CIFAR-100 or a folder of images with SAMPa (or --method sam, adamw), save it,
and score it on the test images. The first command starts a SAMPa pair of two processes (without GPUs:
cpu_2_processes.yaml), the second one process, with the same numbers in about twice the time. More commands are at the
top of vit_finetune/run_vit.py."""
SOURCES = """The SAMPa paper (arXiv 2410.10683) gives for ViT-B/16, in section 5.3: AdamW, gradients clipped at a global
norm of 1, 10 epochs, a peak learning rate of 1e-4. For the rest it refers to its CIFAR experiments in section 5.1, which
are about convolutional networks under SGD. What is taken over from there is marked "section 5.1" above."""

# Section 5.1 trains SAM with rho 0.05 on CIFAR-10 and SAMPa-0.2 with twice SAM's radius.
DEFAULT_RHO = {"adamw": 0.0, "sam": 0.05, "sampa": 0.1}


@dataclass
class DataArguments:
    """Which images, and what is done to them and their labels.

    Raises:
        ValueError: `max_image_pixels` is not positive.
    """

    _argument_group_name: ClassVar[str] = "data"

    dataset: Literal["cifar10", "cifar100", "imagefolder"] = field(
        default="cifar10", metadata={"help": "Images to train on."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Official folder of the python version (cifar-10-batches-py, cifar-100-python) or the folder it is "
            "in; for imagefolder the folder with train/<class>/ and test/<class>/ or validation/<class>/, where "
            "everything is an image (16 bits are scaled, transparency shows white). Without it, CIFAR comes from the "
            "Hub (uoft-cs/cifar10, uoft-cs/cifar100)."
        },
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
            "help": "Crop the training images at random after padding them with 4 pixels, and mirror half of them. Turn "
            "it off where a mirror image means something else, as with digits."
        },
    )
    max_image_pixels: int = field(
        default=MAX_PIXELS,
        metadata={
            "help": "How many pixels an image of a folder or of the Hub may have. A larger one is refused, by name and "
            "before it is decoded: a file of some kilobytes can hold one that fills the memory. Default: Pillow's limit."
        },
    )

    def __post_init__(self):
        if self.max_image_pixels < 1:
            raise ValueError(f"--max_image_pixels: expected a positive number, got {self.max_image_pixels}.")


@dataclass
class ModelArguments:
    """Which model to start from.

    Raises:
        ValueError: A setting would have no effect, or the patches do not fill the image.
    """

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={
            "help": "ViT on the Hub, or a folder: of a saved model, or of a config.json alone, whose model then starts "
            "from random weights."
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Start from random weights, in the shape of the four settings below."}
    )
    image_size: int = field(default=32, metadata={"help": "With --from_scratch: input height and width, in pixels."})
    patch_size: int = field(default=4, metadata={"help": "With --from_scratch: patch height and width, in pixels."})
    hidden_size: int = field(
        default=128, metadata={"help": "With --from_scratch: width of the model; one attention head for every 64."}
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "With --from_scratch: number of layers."})

    @property
    def finetuned_from(self) -> str | None:
        """Name of the checkpoint that training starts from, for the model card."""
        return None if self.from_scratch else self.model_name_or_path

    def __post_init__(self):
        changed = {item.name for item in fields(self) if getattr(self, item.name) != item.default} - {"from_scratch"}
        if self.from_scratch and "model_name_or_path" in changed:
            raise ValueError(
                f"--from_scratch starts from random weights and --model_name_or_path from {self.model_name_or_path}: "
                "expected one of the two."
            )
        if not self.from_scratch and changed - {"model_name_or_path"}:
            raise ValueError(
                f"{', '.join(f'--{name}' for name in sorted(changed - {'model_name_or_path'}))} would have no effect: "
                f"{self.model_name_or_path} has its own shape. Add --from_scratch to start a new model."
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


def make_parser() -> HfArgumentParser:
    """Parser with the defaults for SAMPa; `parse_args` puts in the method's rho."""
    return HfArgumentParser(
        (ModelArguments, DataArguments, ViTTrainingArguments), usage=USAGE, description=DESCRIPTION, epilog=SOURCES
    )


def parse_args(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, ViTTrainingArguments]:
    """Read the command line. The default of ``--rho`` is that of the ``--method`` it names; an explicit one wins.

    Raises:
        FileExistsError: the run would write into an `output_dir` that is not empty.
    """
    parser = make_parser()
    parser.set_defaults(rho=DEFAULT_RHO[parser.parse_known_args(argv)[0].method])
    return parse_arguments(parser, argv)
