"""What may be shown of settings that anybody can read later: numbers, and words that are known; everything else is hidden.

A secret has no form that could be told from others, so that nothing is looked for: a value is shown where its type can hold no
secret, or where the setting is one of `TEXTS` and the value looks like the names and paths that people make. Names and looks of
secrets (`is_secret`) only take away from that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import cache
from numbers import Number
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch


HIDDEN = "HIDDEN"
# Settings whose text is a name or a path, of transformers, its examples, the scripts here, and peft.
TEXTS = frozenset(
    (
        "output_dir run_name project hub_model_id resume_from_checkpoint log_level log_level_replica report_to debug "
        "metric_for_best_model label_names length_column_name include_for_metrics include_num_input_tokens_seen "
        "optim_target_modules torch_compile_backend torch_compile_mode train_sampling_strategy ddp_backend "
        "dataloader_multiprocessing_context method variant "
        "model_name_or_path config_name tokenizer_name data_dir dataset_name dataset_config_name task_name "
        "model_revision dataset_revision cache_dir image_processor_name train_dir validation_dir test_dir "
        "train_file validation_file test_file text_column_names metric_name problem_type delimiter label_delimiter "
        "image_column_name label_column_name train_split_name validation_split_name test_split_name "
        "target_modules exclude_modules target_parameters modules_to_save layers_pattern task_type bias init_lora_weights"
    ).split()
)
# Settings whose text is ``name=value,name=value``.
PAIRS = frozenset(("optim_args", "variant_args"))
# Besides text, None, switches and members of an Enum, which a class has written down.
NUMBERS = (Number, torch.Tensor, torch.dtype)

_SPELLED = {
    bool: re.compile(r"true|false|yes|no|[tfyn01]", re.IGNORECASE),
    int: re.compile(r"[+-]?\d{1,20}"),
    float: re.compile(
        r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:e[+-]?\d{1,3})?|[+-]?(?:inf|nan)", re.IGNORECASE
    ),
    NoneType: re.compile(r"none", re.IGNORECASE),
}
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:|~[^\\/]*)?[\\/](?:.*[\\/])?([^\\/]+)[\\/]*")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# An apostrophe within a word, as in it's.csv.
_PLAIN = re.compile(r"(?!-)(?:[\w ./\\,*|()\[\]&-]|(?<=\w)'(?=\w)){1,200}")
# A second number but for a time, a long number, letters of which no word is made.
_UNSPOKEN = re.compile(
    r"\d+(?!T)[^\W\d]+\d|\d{16}|[A-Z]{8}|(?i:[bcdfghjklmnpqrstvwxz]{5}|[aeiouy]{4})|[A-Z]{2}\d*[a-z]\d|\d[A-Z]{2}"
)
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)

# Names of secrets, and what makes a token or key one of a tokenizer or a data set.
_SECRET = re.compile(
    r"(?<![a-z])(?:secrets?|pass(?:word|wd|phrase|code)?|pwd|credentials?|auth|authorization|cookies?)(?![a-z])"
    r"|api_?(?:keys?|tokens?)(?![a-z])|(?<![a-z])keys?$|token\d*$|(?:access|auth|hub|hf)_?tokens$"
)
_NO_SECRET = re.compile(
    r"(?:pad|eos|bos|unk|sep|cls|mask|start|end|special|max|min|text|sentence|label|image|audio|sort|group|column|input)\d*"
    r"_(?:token|key)s?$"
)
# Tokens by the beginnings that vendors give them, parts of URLs, and headers.
_SECRET_LOOK = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf|api_org|gh[a-z]|npm|gsk|r8|dop_v1)_[A-Za-z0-9]{16,}|(?:github_pat|dckr_pat|pypi)[_-][\w-]{16,}"
    r"|gl(?:pat|dt|rt|cbt|ptt|ft|soat|imt|agent|wt|oas)-[\w-]{16,}|(?:xox[a-z]|xapp)-[\w-]{8,}|[sprw]k_(?:live|test)_\w{8,}"
    r"|sk-[\w-]{16,}|A(?:3T|KIA|SIA|GPA|IDA|ROA|BIA|CCA)[A-Z0-9]{12,}|AIza[\w-]{30,}|ya29\.|eyJ[\w-]{8,}|-----BEGIN)"
    r"|://[^/\s]*@|[?&](?i:sig|sv|key|x-amz-\w+|\w*token)="
    r"|(?i:bearer\s|(?:\bx-[a-z-]{0,40}(?:key|token)|authorization|cookie)\s*:)"
    r"|(?:^|[\"'?&_,;{(\s])(?i:token|pass(?:word|wd|phrase)?|pwd|secret|(?:api|access)_?key)[\"']?\s*[:=]"
)


def is_secret(name: str, value: Any = "") -> bool:
    """Whether a setting has the name of a secret, or a value that looks like one."""
    plain = re.sub(r"[-.]+", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()).strip("_")
    named = _SECRET.search(plain) and not _NO_SECRET.search(plain)
    return bool(named or (isinstance(value, str) and _SECRET_LOOK.search(value)))


def types_of(*classes: type) -> dict[str, Any]:
    """Types of the fields that dataclasses declare, by name; of one with choices, a `Literal` of these."""
    found: dict[str, Any] = {}
    for each in classes:
        hints = _hints(each)
        for field in dataclasses.fields(each):
            choices = field.metadata.get("choices")
            found[field.name] = Literal[tuple(choices)] if choices else hints.get(field.name)
    return found


@cache
def _hints(declaring: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in reversed(declaring.__mro__):
        # Of annotations that cannot be read here, as of a class within a function that names others there, nothing is known.
        with suppress(AttributeError, NameError, TypeError):
            found |= get_type_hints(each)
    return found


def shown(name: str, value: Any, declared: Any = None) -> Any:
    """`value` of the setting `name`, as far as it can hold no secret.

    Args:
        name: of an option or a field.
        value: as the setting has it, or as a command line spells it.
        declared: its type, if a class declares it.

    Returns:
        The value; `HIDDEN` in its place, or in place of the folder of a path that is not relative, which may name a person.
    """
    if is_harmless(name, value, declared):
        return value
    if isinstance(value, str) and (path := _ABSOLUTE.fullmatch(value)) and is_harmless(name, path[1]):
        return f"{HIDDEN}/{path[1]}"
    return HIDDEN


def is_harmless(name: str, value: Any, declared: Any = None) -> bool:
    """Whether `value` of the setting `name`, declared as such a type, can hold no secret."""
    if isinstance(value, bool | NoneType | Enum):
        return True
    if is_secret(name, value):
        return False
    if isinstance(value, str):
        # A single character, as a delimiter, can hold no secret.
        known = (name in TEXTS and (len(value) == 1 or is_plain(value))) or (name in PAIRS and _are_pairs(value))
        return known or _spells(value, declared)
    if isinstance(value, Mapping):
        return all(_is_name(key) and is_harmless(key, each) for key, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(is_harmless(name, each, declared) for each in value)
    return isinstance(value, NUMBERS)


def is_plain(text: str) -> bool:
    """Whether `text` looks like a name, a list of names or a relative path, of words and numbers that people make."""
    if not _PLAIN.fullmatch(text) or _ABSOLUTE.fullmatch(text) or _UUID.search(text) or is_secret("", text):
        return False
    return all(map(_is_word, re.findall(r"[^\W_]+", text)))


def masked(text: str) -> str:
    """`text` with checksums in place of what looks like tokens, by which it can still be compared with another."""

    def checksum(found: re.Match) -> str:
        word = found[0]
        spoken = _SPELLED[float].fullmatch(word) or word.isalpha() or all(map(_is_word, re.findall(r"[^\W_]+", word)))
        return word if spoken and not is_secret("", word) else hashlib.sha256(word.encode()).hexdigest()[:8]

    return re.sub(r"[^\s,=()'\"\[\]]+", checksum, text)


def _is_word(text: str) -> bool:
    """Whether letters and digits in a row are words that can be spoken, and a number, as what is drawn at random is not."""
    words = re.findall(r"\d+|[A-Z]?[^\W\dA-Z]+|[A-Z]+", text)
    return len(text) < 12 or (7 * len(words) <= 2 * len(text) <= 72 and not _UNSPOKEN.search(text))


def takes_several(declared: Any) -> bool:
    """Whether an option of this type takes several words."""
    return list in (declared, get_origin(declared), *map(get_origin, get_args(declared)))


def _spells(word: str, declared: Any) -> bool:
    """Whether `word` spells a value of the type `declared`, as far as that is none of text."""
    origin, parts = get_origin(declared), get_args(declared)
    if origin is Literal:
        return word in map(str, parts)
    if origin in (Union, UnionType, list):
        return any(_spells(word, each) for each in parts)
    if dict in (origin, declared):
        return _is_harmless_json(word)
    if isinstance(declared, type) and issubclass(declared, Enum):
        return word in [str(each.value) for each in declared]
    return declared in _SPELLED and _SPELLED[declared].fullmatch(word) is not None


def _is_harmless_json(word: str) -> bool:
    try:
        found = json.loads(word)
        return isinstance(found, dict) and is_harmless("", found)
    except (RecursionError, ValueError):
        return False


def _are_pairs(text: str) -> bool:
    pairs = [pair.partition("=") for pair in text.split(",")]
    return all(
        _is_name(name.strip()) and equals and any(kind.fullmatch(value.strip()) for kind in _SPELLED.values())
        for name, equals, value in pairs
    )


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and _NAME.fullmatch(text) is not None and is_plain(text) and not is_secret(text)
