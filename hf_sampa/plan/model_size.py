"""How large a model is: its weights, what FSDP2 gathers of them at once, and the shape that its activations follow from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..fsdp import layers_to_name


NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kmbt]?)", re.IGNORECASE)
SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# What configurations call the width of a layer's feed-forward part; 4 times the hidden size where they say nothing.
WIDTHS = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner")
# Heads of pretraining, which fine-tuning replaces.
OF_PRETRAINING = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Shape:
    """A stack of equal transformer layers.

    Attributes:
        layers: how many there are.
        hidden: numbers per token between them.
        heads: of attention.
        width: numbers per token inside of the feed-forward part.
        gated: whether that part multiplies two of them, as SwiGLU does.
        dropout: whether layers drop anything.
        matrix: whether attention keeps a matrix of tokens by tokens for every head, as the `eager` one does.
        vocabulary: numbers per token that a language model puts out; 0 for others.
        tokens: per sample, where the model settles it, as one of pictures does.
        longest: tokens that a sample can have; None where it is not limited, or not said.
    """

    layers: int
    hidden: int
    heads: int
    width: int
    gated: bool
    dropout: bool
    matrix: bool
    vocabulary: int
    tokens: int | None
    longest: int | None


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model.

    Attributes:
        name: as it was given.
        kind: its class; None where only a number of weights is known.
        weights: how many there are, tied ones once.
        largest: weights of the largest parameter; None where that is not known.
        units: weights of each part that FSDP2 gathers by itself; None where that is not known.
        shape: None where activations cannot be estimated.
        layers: classes that plain Trainer has to be told to gather by themselves; None where it need not.
    """

    name: str
    kind: str | None
    weights: int
    largest: int | None
    units: tuple[int, ...] | None
    shape: Shape | None
    layers: list[str] | None

    @property
    def root(self) -> int:
        """Weights in none of the units."""
        return self.weights - sum(self.units or ())


def model_size(name: str) -> ModelSize:
    """That of a folder, a model on the Hub, or a number of weights, as 7e9, 7B or 350M.

    Raises:
        ValueError: it is none of them, or a model of unknown code.
    """
    if Path(name).is_dir():
        return size_of(_without_weights(name), name)
    if number := as_number(name):
        return ModelSize(name, None, number, None, None, None, None)
    # Without a network it takes long to learn that the Hub cannot be asked.
    if name[:1].isdigit() and "/" not in name:
        raise _not_a_model(name, "no number above 0 of weights, and no folder")
    if name.startswith((".", "/")) or name.count("/") > 1:
        raise _not_a_model(name, "there is no such folder")
    return size_of(_without_weights(name), name)


def as_number(text: str) -> int | None:
    """What 7e9, 7B and 350M stand for; None for anything else."""
    found = NUMBER.fullmatch(text)
    return round(float(found[1]) * SCALES[found[2].lower()]) if found else None


def size_of(model: PreTrainedModel, name: str) -> ModelSize:
    """That of a model, which may be on the meta device."""
    largest = max(param.numel() for param in model.parameters())
    return ModelSize(
        name, type(model).__name__, _count(model), largest, _units(model), _shape(model), layers_to_name(model)
    )


def _without_weights(name: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name)
        kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        with torch.device("meta"):
            return kind(config) if kind else AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise _not_a_model(name, next(iter(str(error).splitlines()), type(error).__name__)) from error


def _not_a_model(name: str, why: str) -> ValueError:
    return ValueError(
        f"expected a folder with the config.json of a model that transformers knows, such a model's name on the Hub, or a number "
        f"of weights, as 7e9, 7B or 350M; got {name!r} ({why})"
    )


def _count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _units(model: PreTrainedModel) -> tuple[int, ...]:
    """As accelerate makes them: of the modules that the model wants in one piece, each outermost one."""
    whole = set(model._no_split_modules or ())
    found, waiting = [], [*model.children()]
    while waiting:
        module = waiting.pop()
        if type(module).__name__ in whole:
            found.append(_count(module))
        else:
            waiting += module.children()
    return tuple(found)


def _shape(model: PreTrainedModel) -> Shape | None:
    """None for what is no stack of equal layers of attention and a dense feed-forward part."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return None
    layers, hidden, heads = (
        getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not all(isinstance(each, int) for each in (layers, hidden, heads)):
        return None
    layer = _layer(model, layers)
    width = next((value for name in WIDTHS if isinstance(value := getattr(config, name, None), int)), 4 * hidden)
    matrices = _matrices(layer, hidden, width) if layer else 0
    if matrices not in (2, 3):
        return None
    vision = getattr(config, "patch_size", None) is not None
    tokens = _patches(config) if vision else None
    if vision and tokens is None:
        return None
    head = None if type(model).__name__.endswith(OF_PRETRAINING) else model.get_output_embeddings()
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        width=width,
        gated=matrices == 3,
        dropout=any(isinstance(each, nn.Dropout) and each.p > 0 for each in layer.modules()),
        matrix=config._attn_implementation == "eager",
        vocabulary=0 if head is None else head.weight.shape[0],
        tokens=tokens,
        longest=getattr(config, "max_position_embeddings", None),
    )


def _layer(model: nn.Module, layers: int) -> nn.Module | None:
    """One of the equal layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and len({*map(_count, module)}) == 1:
            return module[0]
    return None


def _matrices(layer: nn.Module, hidden: int, width: int) -> float:
    """How many of the size hidden x width it has; two of them may be one."""
    wide = [{hidden, width}, {hidden, 2 * width}]
    return sum(param.numel() for param in layer.parameters() if {*param.shape} in wide) / (hidden * width)


def _patches(config: Any) -> int | None:
    """Tokens of a picture, with the one that stands for all."""
    size, patch = getattr(config, "image_size", None), config.patch_size
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else None
