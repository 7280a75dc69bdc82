"""The model of a script's command line, by the flags that transformers' own examples have for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass
class ModelArguments:
    """Which model to start from, and how it is had from the Hub. A script's subclass may give a default and more fields."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(
        metadata={
            "help": "Model on the Hub or in a folder. A folder with a config.json and without weights is trained from scratch."
        }
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration on the Hub or in a folder, if it is not the model's own."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model's repository on the Hub."}
    )
    token: str | None = field(
        default=None,
        metadata={
            "help": "Token for private models on the Hub. Others see it in the list of processes: `hf auth login`, or HF_TOKEN "
            "in the environment, hide it."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code of the model's repository may run on this machine."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Give the model a new head if its own is for other classes than those of the data."},
    )

    def check_folders(self) -> None:
        """See that what is named as a folder is there, for else the Hub is asked for it, which knows of no such name.

        Raises:
            ValueError: it is not there, or the model is a file.
        """
        if Path(self.model_name_or_path).is_file():
            raise ValueError(
                f"--model_name_or_path: expected a folder or a model of the Hub, got {self.model_name_or_path!r}, which is a file. Name "
                "the folder that holds the model."
            )
        for option, name in vars(self).items():
            if option.endswith(("_name", "_name_or_path")) and name and _is_path(name) and not Path(name).exists():
                raise ValueError(
                    f"--{option}: expected a folder or a model of the Hub, got {name!r}, which is no folder in {Path.cwd()}. Correct "
                    "it, or for a model of the Hub give its OWNER/NAME, and start where no folder is called like its owner."
                )

    def hub_arguments(self) -> dict[str, Any]:
        """Keyword arguments for every ``from_pretrained`` of the model's repository: configuration, tokenizer, weights."""
        return {
            "revision": self.model_revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "trust_remote_code": self.trust_remote_code,
        }


def _is_path(name: str) -> bool:
    """Whether it can be no name on the Hub, NAME or OWNER/NAME, or begins with a folder that there is."""
    first, *others = name.split("/")
    return (
        len(others) > 1 or name.startswith((".", "~")) or "\\" in name or (len(others) == 1 and Path(first).is_dir())
    )
