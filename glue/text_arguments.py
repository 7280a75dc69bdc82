"""Arguments of both text scripts: the model with its tokenizer, and what becomes of the texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_sampa.finetuning import ModelArguments


@dataclass
class TextModelArguments(ModelArguments):
    """`ModelArguments` of an encoder with a tokenizer."""

    model_name_or_path: str = field(
        default="bert-base-uncased",
        metadata={"help": "Encoder on the Hub or in a folder. A folder without weights is trained from scratch."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer on the Hub or in a folder, if it is not the model's own."}
    )


@dataclass(kw_only=True)
class TextArguments:
    """What becomes of the texts, for the data arguments of a script to build on.

    Raises:
        ValueError: a number is not positive, or a share not between 0 and 1.
    """

    max_length: int = field(
        default=128,
        metadata={
            "help": "Longest input in tokens; longer ones are truncated. The model may allow less, with a warning."
        },
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every input to max_length, and not to the longest of its batch: inputs of one shape."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of each dev set."})
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Predict the first so many of each test set."}
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training rows, between 0 and 1, to score on and not to train on, in the place of a dev set: of each "
            "class the same share, and the same rows whatever --seed is."
        },
    )
    label_noise: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training labels, in [0, 1), replaced by another class (symmetric noise, Table 7 of the SAMPa "
            "paper): of n rows that are trained on, round(share * n) get a wrong label, the same ones the same labels whatever --seed "
            "is. Rows that are scored keep theirs."
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"--{name}: expected a positive number, got {number}. Leave it out for no limit.")
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise ValueError(
                f"--train_val_split: expected a share between 0 and 1, got {self.train_val_split:g}. 0.1 takes a tenth of the rows."
            )
