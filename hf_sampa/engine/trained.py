"""What is trained: the parameters that the base optimizer holds, under names that are the same in every run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..distributed import is_spread, plain_name


class Trained:
    """The base optimizer's parameters that want a gradient: the model's first, in its order, then others.

    Others are weights of a loss, for example, as `sentence_transformers` has them. They are named by where the trainer keeps
    them, ``loss.classifier.weight``, or by their place in the optimizer. Trainer clips the model's parameters only.

    Args:
        optimizer: the base optimizer.
        model: what is trained.
        others: modules that the trainer holds besides the model, by the trainer's names for them.

    Attributes:
        names: one for each of
        params: the parameters.
        of_model: how many of them are the model's.

    Raises:
        ValueError: a trainable parameter of the model is not in the optimizer, or nothing is trained.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, others: Mapping[str, nn.Module] | None = None):
        held = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        of_model = {plain_name(name): param for name, param in model.named_parameters() if param.requires_grad}
        _refuse_left_out({name: param for name, param in of_model.items() if id(param) not in held}, len(of_model))
        known = {id(param) for param in of_model.values()}
        foreign: dict[str, Parameter] = {}
        for name, param in [*_named(others or {}), *_places(optimizer)]:
            if id(param) in held and id(param) not in known:
                known.add(id(param))
                foreign[name] = param
        self.names = [*of_model, *(name if name not in of_model else f"{name} (optimizer)" for name in foreign)]
        self.params: list[Parameter] = [*of_model.values(), *foreign.values()]
        self.of_model = len(of_model)

    def at(self, params: Sequence[Parameter]) -> Trained:
        """The same, with other `params` in their place."""
        other = copy.copy(self)
        other.params = list(params)
        return other

    @property
    def named(self) -> dict[str, Parameter]:
        """The parameters by name."""
        return dict(zip(self.names, self.params, strict=True))


def _named(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Parameter]]:
    for prefix, module in modules.items():
        for name, param in module.named_parameters():
            yield f"{prefix}.{name}", param


def _places(optimizer: Optimizer) -> Iterator[tuple[str, Parameter]]:
    for i, group in enumerate(optimizer.param_groups):
        for j, param in enumerate(group["params"]):
            yield f"optimizer.{i}.{j}", param


def _refuse_left_out(left: Mapping[str, Parameter], count: int) -> None:
    if left:
        advice = (
            "Of a bias that two modules share fsdp=True makes two, as accelerate shards one of them by itself. Leave fsdp out, "
            "and shard the model before the trainer gets it, within `with args.world_of_role():`, by fully_shard(model)."
            if any(is_spread(param) for param in left.values())
            else "Freeze them with requires_grad_(False), or give them to the optimizer. A trainer that trained before keeps its "
            "optimizer: to train layers that were frozen then, set trainer.optimizer = trainer.lr_scheduler = None before train()."
        )
        raise ValueError(
            f"Expected an optimizer that holds every trainable parameter of the model, but {len(left)} of {count} are not in "
            f"it, the first being {next(iter(left))!r}: they would be perturbed, and never updated. {advice}"
        )
    if not count:
        raise ValueError(
            "Expected at least one trainable parameter, but requires_grad is False for all of the model's. Unfreeze "
            "some before training."
        )
