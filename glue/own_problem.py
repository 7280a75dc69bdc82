"""What is to be predicted, found from the labels: classes, several classes of one text, or a score.

Which of these, and which classes there are, is found in the training rows, or without training in the model; the other rows
have to fit.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from own_labels import Labels
from text_lines import quoted
from transformers import PreTrainedConfig


logger = logging.getLogger(__name__)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# What is predicted of a text, in words.
_PREDICTED = {SINGLE: "one of", MULTI: "any number of", REGRESSION: "a score,"}

# More different whole numbers than these may be scores; they are not taken for classes unless that is said.
_MANY_CLASSES = 20
# What may stand between several labels of one text.
_MARKS = ("|", ";", ",")
# How pandas and others write that there is nothing.
_MISSING = ("", "nan", "none", "null", "na", "n/a", "<na>")


@dataclass(frozen=True)
class Problem:
    """What is predicted.

    Args:
        type: by transformers' name, as in a configuration.
        names: of the classes, or one name of the score.
    """

    type: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_PREDICTED[self.type]} {', '.join(self.names)}"


def find_problem(labels: Labels, given: str | None = None) -> Problem:
    """What the labels of the training rows say is to be predicted.

    Args:
        labels: of the training rows.
        given: the type, if it is known.

    Raises:
        ValueError: a row has no label; the labels fit no type or not the given one, or more than one; or there is one class.
    """
    for index, value in enumerate(labels.values):
        if value is None:
            raise labels.refuse(index, "a label", "Give it one, or remove that row.")
    several = [isinstance(value, tuple) for value in labels.values]
    kind = given or (MULTI if any(several) else SINGLE if labels.names else _one_of(labels))
    if kind == REGRESSION:
        return _regression(labels)
    if (kind == MULTI) != all(several) or (kind == MULTI) != any(several):
        index = several.index(kind != MULTI)
        raise labels.refuse(
            index,
            "a list of labels" if kind == MULTI else "one label",
            "Labels of one text are a JSON list, a field with --label_delimiter between them, or several columns of 0 and 1.",
        )
    counts = Counter(word for value in labels.values for word in (value if kind == MULTI else (value,)))
    names = labels.names or tuple(sorted(counts, key=_order))
    _check_classes(labels, names, counts, kind, given)
    if kind == SINGLE and given is None:
        _warn_of_joined(labels, names)
    return Problem(kind, names)


def _one_of(labels: Labels) -> str:
    """Classes or a score: words are classes, numbers with a fraction a score."""
    words = set(labels.values)
    numbers = [_number(word) for word in words if _number(word) is not None]
    fractions = any(number % 1 for number in numbers)
    odd = [word for word in words if _number(word) is None]
    if numbers and odd and (fractions or all(word.lower() in _MISSING for word in odd)):
        index = next(index for index, word in enumerate(labels.values) if _number(word) is None)
        raise labels.refuse(
            index, "a number as in other rows", "Correct or remove that row, or choose another --problem_type."
        )
    if odd:
        return SINGLE
    if fractions:
        return REGRESSION
    if all(re.fullmatch(r"[+-]?[0-9]+", word) for word in words) and len(words) <= _MANY_CLASSES:
        return SINGLE
    raise ValueError(
        f"{labels.table.name}: expected labels that are words, a few whole numbers, or numbers with a fraction, got "
        f"{len(words)} numbers in column {labels.column!r}, {quoted(sorted(words, key=_order)[:5])} among them, which can be "
        f"classes or a score. Add --problem_type {SINGLE} or {REGRESSION}."
    )


def _number(word: str) -> float | None:
    """The number that a word spells in decimal digits."""
    return float(word) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", word) else None


def _order(word: str) -> tuple:
    number = _number(word)
    return (0, number, word) if number is not None else (1, word.casefold(), word)


def _regression(labels: Labels) -> Problem:
    scores = set(scores_of(labels))
    if len(scores) == 1:
        raise ValueError(
            f"{labels.table.name}: expected scores that differ, got {scores.pop():g} in column {labels.column!r} of all "
            f"{len(labels.values)} rows. There is nothing to learn: choose another column with --label_column_name."
        )
    return Problem(REGRESSION, (labels.column,))


def scores_of(labels: Labels) -> list[float]:
    """The labels as numbers.

    Raises:
        ValueError: one is no finite number.
    """
    scores = []
    for index, value in enumerate(labels.values):
        number = _number(value) if isinstance(value, str) else None
        if number is None or not math.isfinite(number):
            raise labels.refuse(index, "a number", "Correct or remove that row.")
        scores.append(number)
    return scores


def _check_classes(labels: Labels, names: tuple[str, ...], counts: Counter, kind: str, given: str | None) -> None:
    rows, name = len(labels.values), labels.table.name
    if len(names) < 2:
        raise ValueError(
            f"{name}: expected at least two classes in column {labels.column!r}, got {quoted(names) or 'none'} in all {rows} "
            "rows. There is nothing to tell apart: choose another column with --label_column_name."
        )
    if given is None and labels.names is None and rows >= _MANY_CLASSES and len(names) > rows / 2:
        raise ValueError(
            f"{name}: expected classes with several rows each in column {labels.column!r}, got {len(names)} different labels in "
            f"{rows} rows, {quoted(names[:3])} among them. Choose the column with --label_column_name, or add --problem_type "
            f"{kind} if it is right."
        )
    alike = [group for group in _groups(names) if len(group) > 1]
    if alike:
        logger.warning("%s: %s are taken for different classes.", name, " and ".join(map(quoted, alike)))
    if missing := [each for each in names if each.lower() in _MISSING]:
        logger.warning("%s: %s is taken for a class. Are labels missing there?", name, quoted(missing))
    if unused := [each for each in names if not counts[each]]:
        logger.warning("%s: no row has the label %s, of which nothing can be learned.", name, quoted(unused))


def _warn_of_joined(labels: Labels, names: tuple[str, ...]) -> None:
    """Warn of labels that look like several: what stands between a mark recurs, alone or in other labels."""
    for mark in _MARKS:
        joined = [name for name in names if mark in name]
        pieces = {piece.strip() for name in names for piece in name.split(mark)}
        if joined and len(pieces) < len(names):
            logger.warning(
                "%s: labels with %r in them, %s for instance, are taken for classes of their own, %d of %d. If they are several labels of "
                "one text, add --label_delimiter %r.",
                labels.table.name,
                mark,
                quoted(joined[:3]),
                len(joined),
                len(names),
                mark,
            )


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Names that differ in case and blanks only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.casefold().split()), []).append(name)
    return list(groups.values())


def problem_of_model(config: PreTrainedConfig, given: str | None = None) -> Problem:
    """What a trained model predicts: where nothing is to be trained, its configuration says it."""
    kind = given or config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
    return Problem(kind, names_of(config))


def names_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Of a model's outputs, in their order."""
    return tuple(config.id2label[index] for index in sorted(config.id2label))


def encode(labels: Labels, problem: Problem, ids: Sequence[int]) -> list[int] | list[float] | list[list[float]]:
    """Labels as the model takes them: ids of classes, scores, or for each class 1 or 0.

    Args:
        labels: of any split.
        problem: what is predicted.
        ids: the model's output for each of the problem's classes.

    Raises:
        ValueError: a label is none of the problem's, or there is none; or labels of one text are told for some classes alone.
    """
    if problem.type == REGRESSION:
        return scores_of(labels)
    if problem.type == MULTI:
        _check_told(labels, problem)
    places = dict(zip(problem.names, ids, strict=True))
    expected = f"one of the classes that the model is trained for, {quoted(problem.names)},"
    encoded: list[Any] = []
    for index, value in enumerate(labels.values):
        words = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) != (problem.type == MULTI) or not all(word in places for word in words):
            raise labels.refuse(index, expected, "Correct or remove that row, or train on rows of that class.")
        found = [places[word] for word in words]
        encoded.append([float(place in found) for place in range(len(ids))] if problem.type == MULTI else found[0])
    return encoded


def _check_told(labels: Labels, problem: Problem) -> None:
    """Raise ValueError if the data do not say of every class whether a text has it: what is unknown is not 0."""
    untold = [name for name in problem.names if labels.names is not None and name not in labels.names]
    if untold:
        raise ValueError(
            f"{labels.table.name}: expected 0 or 1 for every class that the model is trained for, {quoted(problem.names)}, got "
            f"{quoted(labels.names)} alone, so that nobody knows which rows have {quoted(untold)}. Add what is missing, and name "
            "all columns with --label_column_name."
        )


def warn_of_unscored(labels: Labels, problem: Problem) -> None:
    """Warn of classes that no row has: no score says whether they are found, and a mean over the classes counts them as 0."""
    if problem.type == REGRESSION:
        return
    found = labels.words
    if unscored := [name for name in problem.names if name not in found]:
        logger.warning(
            "%s: no row has the label %s: no score says how well it is found, and means over the classes, as f1_macro, count it "
            "as 0%s.",
            labels.table.name,
            quoted(unscored),
            "" if problem.type == MULTI else " where it is predicted",
        )
