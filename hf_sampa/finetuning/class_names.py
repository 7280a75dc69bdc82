"""Which of a model's outputs is which class of the data: decided by name, so that a trained head keeps its meaning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ClassNames:
    """The classes of a model, and where those of the data are among them.

    Args:
        names: of the model's outputs, in their order.
        ids: for each class of the data, in the data's order, the model's output; map labels by it: ``ids[label]``.
        new_head: whether the model's own head is not for these classes, so that a new one is to be trained.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    new_head: bool

    def config_entries(self) -> dict[str, dict]:
        """`id2label` and `label2id` for a configuration, from which it takes the number of labels, too."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }


def class_names(
    config: PreTrainedConfig, names: Sequence[str], *, new_head: bool = False, ignore_mismatched_sizes: bool = False
) -> ClassNames:
    """Which id has which name, given the data's classes and the configuration of the model as it was given.

    If the model has the same names, in whatever order and case, its own order and spelling stay, and the data's labels are to be
    mapped. If it has none (LABEL_0, LABEL_1, ...), they are taken to be in the data's order. A regression has one name, and
    goes with every model of one output.

    Args:
        config: as it was loaded, before names were put into it.
        names: of the data's classes in the order of their labels; one name for a regression.
        new_head: whether the model has no trained head, as one from random weights.
        ignore_mismatched_sizes: whether a model for other classes gets a new head; as on the command line.

    Raises:
        ValueError: the model is for other classes, and `ignore_mismatched_sizes` is off; or the data name a class twice.
    """
    names = tuple(names)
    if len(set(names)) < len(names):
        raise ValueError(
            f"classes: expected a name for each, got {listed(names)}. Rename one of two that are the same."
        )
    own = tuple(config.id2label[index] for index in sorted(config.id2label))
    in_order = tuple(range(len(names)))
    if new_head or not has_names(config):
        return ClassNames(names, in_order, new_head or len(own) != len(names))
    if len(own) == len(names) == 1:
        return ClassNames(own, (0,), False)
    found = same_names(own, names)
    if found is not None and len(own) == len(names):
        return ClassNames(own, tuple(own.index(found[name]) for name in names), False)
    if ignore_mismatched_sizes:
        return ClassNames(names, in_order, True)
    raise ValueError(
        f"--model_name_or_path: expected a model for the {len(names)} classes of the data, {listed(names)}, or one without a "
        f"head, got one for {len(own)}: {listed(own)}. Add --ignore_mismatched_sizes to train a new head in the place of its "
        "own, or give a model of these classes."
    )


def same_names(own: Collection[str], names: Collection[str]) -> dict[str, str] | None:
    """For each of `names` the one of `own` that is the same, or if not all are there, the same but for its case.

    None where one is not there, or where only their case tells two apart. No name is twice in `names`.
    """
    for spelled in (str, str.casefold):
        theirs = {spelled(name): name for name in own}
        wanted = {name: spelled(name) for name in names}
        one_to_one = len(theirs) == len(set(own)) and len(set(wanted.values())) == len(names)
        if one_to_one and theirs.keys() >= set(wanted.values()):
            return {name: theirs[word] for name, word in wanted.items()}
    return None


def check_trained(classes: ClassNames, names: Collection[str], model: str) -> None:
    """See that a model which is not to be trained has been.

    Args:
        classes: the model's.
        names: of the data's classes, as far as they are known.
        model: how a message calls the model.

    Raises:
        ValueError: its head is new.
    """
    if classes.new_head:
        raise ValueError(
            f"--do_train false: expected a model that is trained for {listed(names) or 'the classes of the data'}, got {model}, "
            "whose head is new: its scores and predictions would be random. Give --model_name_or_path a trained one."
        )


def has_names(config: PreTrainedConfig) -> bool:
    """Whether its classes have names of their own, and not LABEL_0, LABEL_1, ..., which transformers gives them."""
    return list(config.id2label.values()) != [f"LABEL_{index}" for index in range(len(config.id2label))]


def listed(names: Collection[Any], most: int = 10) -> str:
    """`names`, the first of them where there are many."""
    shown = ", ".join(map(str, islice(names, most)))
    return shown if len(names) <= most else f"{shown}, ... ({len(names) - most} more)"
