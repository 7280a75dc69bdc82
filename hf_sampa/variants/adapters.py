"""Adapters: what linear layers with LoRA add to their output in a pass, so that the merged weights are perturbed, of which most are frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .parts import Moment, Part


OWN = "auxiliary_adapters"  # what a trainer calls the module of `Adapters.own`: names of its parameters begin with it


class Adapters(Part):
    """Layers with adapters compute what they are.

    Attributes:
        adds: whether they add something; the model needs LoRA adapters then.
    """

    adds: ClassVar[bool] = False

    def __init__(self):
        self.layers: dict[str, nn.Module] = {}
        self._active: dict[str, list[str]] = {}  # adapters by layer, when the run began

    def own(self, model: nn.Module, seed: int) -> nn.Module | None:
        """New weights of its own, which the base optimizer is to hold beside those of `model`; None: it has none."""

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        if self.adds:
            self.layers = adapted_layers(model)
            self._active = {name: list(each.active_adapters) for name, each in self.layers.items()}

    def begin(self, rho: float) -> None:
        """Before a step: weights of its own may be brought to where they are to be."""

    @contextmanager
    def adding(self, rho: float, now: Moment) -> Iterator[None]:
        """Within the block, of the passes of a step, layers with adapters add what `__call__` says. Nothing is left on the model."""
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hook = layer.register_forward_hook(partial(self._add, name, rho, now), with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def _add(
        self,
        name: str,
        rho: float,
        now: Moment,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        # A pass of the model without its adapters, or with those of a reference, as TRL's DPOTrainer takes one, is not of what is trained.
        if layer.disable_adapters or list(layer.active_adapters) != self._active[name]:
            return output
        x = inputs[0] if inputs else named["x"]
        return output + self(name, x, output.dtype, rho, now)

    def __call__(self, name: str, x: Tensor, dtype: torch.dtype, rho: float, now: Moment) -> Tensor:
        """What the layer of this name adds to its output ``(..., out)``, in `dtype`, for its input ``(..., in)``."""
        raise NotImplementedError


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of `model` with active LoRA adapters, as peft makes them, by name.

    Raises ValueError where there are none, or some of another kind, of which nobody would know what to add.
    """
    layers = (
        (name, each) for name, each in model.named_modules() if hasattr(each, "lora_A") and hasattr(each, "base_layer")
    )
    found = {name: each for name, each in layers if any(active in each.lora_A for active in each.active_adapters)}
    if not found:
        raise ValueError(
            "variant: expected a model with LoRA adapters, which this variant is about, got none that is active. Make it by peft's "
            "get_peft_model(model, LoraConfig(...)), or take another variant."
        )
    for name, each in found.items():
        if problem := _problem(each):
            raise ValueError(
                f"variant: expected LoRA adapters on linear layers, got {name!r}, {problem}. Change that, leave it out of "
                "target_modules, or take another variant."
            )
    return found


def _problem(layer: nn.Module) -> str | None:
    """Why nobody would know what a layer with adapters computes."""
    base = layer.get_base_layer()
    if not (isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D") or len(layer.lora_embedding_A):
        return f"a {type(base).__name__}"
    if not all(isinstance(each, nn.Linear) for each in layer.lora_A.values()) or hasattr(layer, "parameter_name"):
        return f"whose adapter is a {type(layer).__module__}.{type(layer).__name__}"
    if layer.merged or layer.disable_adapters:
        return f"whose adapters are {'merged' if layer.merged else 'disabled'}"
    return None


class RandomMergedWeights(Adapters):
    """The merged weights are perturbed at random (Flat-LoRA, Li et al. 2025, eq. 6 and 7): in row i of W' = W + s B A of n columns by

    N(0, sigma^2 ||W'_i||^2 / n), one draw a step; sigma is rho times (1 - cos(pi t / T)) / 2.

    Nothing is held of it but the rows' lengths: backward draws the same once more.
    """

    adds = True

    def __init__(self):
        super().__init__()
        self._lengths: tuple[int, dict[str, Tensor]] = (-1, {})  # of a step

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        super().bind(model, names, params)
        for name, layer in self.layers.items():
            if any(layer.use_dora.values()):
                raise ValueError(
                    f"variant: expected adapters that are added to the weights, but {name!r} has DoRA, which scales them, too. Set "
                    "use_dora=False, or take another variant."
                )

    def begin(self, rho: float) -> None:
        self._lengths = (-1, {})

    def __call__(self, name: str, x: Tensor, dtype: torch.dtype, rho: float, now: Moment) -> Tensor:
        sigma = rho * (1 - math.cos(math.pi * now.step / max(1, now.max_steps))) / 2
        lengths = self._row_lengths(name, now)
        scale = lengths * (sigma / math.sqrt(x.shape[-1]))
        return _Noise.apply(x.to(dtype), scale, partial(now.generator, f"merged weights of {name}", x.device))

    def _row_lengths(self, name: str, now: Moment) -> Tensor:
        """||W'_i||, ``(out,)``, at the x_t of this step."""
        if self._lengths[0] != now.step:
            self._lengths = now.step, {}
        known = self._lengths[1]
        if name not in known:
            known[name] = _merged(self.layers[name]).norm(dim=1)
        return known[name]


class _Noise(torch.autograd.Function):
    """x E^T, where E ``(out, in)`` is normal, its rows by `scale`; E is drawn anew in backward."""

    @staticmethod
    def forward(ctx, x, scale, generator):
        ctx.save_for_backward(scale)
        ctx.generator, ctx.columns = generator, x.shape[-1]
        return F.linear(x, _noise(generator, scale, ctx.columns).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return grad @ _noise(ctx.generator, scale, ctx.columns).to(grad.dtype), None, None


def _noise(generator, scale: Tensor, columns: int) -> Tensor:
    drawn = torch.randn(len(scale), columns, generator=generator(), device=scale.device)
    return drawn.mul_(scale[:, None])


@torch.no_grad()
def _merged(layer: nn.Module) -> Tensor:
    """W' = W + s B A ``(out, in)``, in single precision; of a quantized W what it stands for."""
    base = layer.get_base_layer()
    weight = _dequantized(base).float()
    weight = weight if isinstance(base, nn.Linear) else weight.T
    for adapter in layer.active_adapters:  # which are those of `_add`
        if adapter in layer.lora_A:
            product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
            weight = torch.add(weight, product, alpha=layer.scaling[adapter])
    return weight


def _dequantized(linear: nn.Module) -> Tensor:
    from peft.utils import integrations  # a model with adapters has it

    if integrations.get_bnb_param_type(linear.weight):
        # Of a module on a CPU the call for modules makes another weight, with which bitsandbytes' 8 bits do not go on.
        return integrations.dequantize_bnb_weight(linear.weight, getattr(linear, "state", None))
    return integrations.dequantize_module_weight(linear)


class Adversary(Adapters):
    """Every layer has a second, auxiliary adapter, which ascends while the first one descends (Bi-LoRA, Liu et al. 2025, eq. 7 to 10).

    Its product B_2 A_2, without LoRA's scaling, is the perturbation. Over all layers it is rho long at most: what is longer
    before a step is made so. The base optimizer holds A_2 and B_2, in the group of the adapters.

    Args:
        rank: of the product, at least 1.
    """

    adds = True

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}  # A_2 and B_2 by layer

    def own(self, model: nn.Module, seed: int) -> nn.Module:
        dice = torch.Generator().manual_seed(seed)
        return nn.ModuleDict(
            {_key(name): _Pair(layer, self.rank, dice) for name, layer in adapted_layers(model).items()}
        )

    def bind(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        super().bind(model, names, params)
        known = dict(zip(names, params, strict=True))
        if not any(name.startswith(OWN) for name in names):
            raise ValueError(
                f"variant: expected an optimizer that holds the auxiliary adapters, got one that {type(self).__name__} gave none to. Let the "
                "trainer make it, or give it to the trainer before train()."
            )
        self._weights = {
            name: tuple(known[f"{OWN}.{_key(name)}.{each}"] for each in ("A", "B")) for name in self.layers
        }

    @torch.no_grad()
    def begin(self, rho: float) -> None:
        # ||B A||_F^2 = <B^T B, A A^T>, which are small.
        squares = [((b.T @ b).double() * (a @ a.T).double()).sum() for a, b in self._weights.values()]
        norm = torch.stack(squares).sum().clamp_(min=0).sqrt()
        if rho == 0:  # as a callback may begin with; nothing is added then, and the weights wait
            return
        factor = torch.where(norm > rho, (rho / norm).sqrt(), 1.0)
        for pair in self._weights.values():
            for each in pair:
                each.mul_(factor.to(each.dtype))

    def __call__(self, name: str, x: Tensor, dtype: torch.dtype, rho: float, now: Moment) -> Tensor:
        a, b = (_Reversed.apply(each) for each in self._weights[name])
        added = F.linear(F.linear(x.to(a.dtype), a), b).to(dtype)
        return added if rho else added * 0.0


class _Reversed(torch.autograd.Function):
    """A weight whose gradient is that of -f, so that the base optimizer's step ascends."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def _key(name: str) -> str:
    """For a ModuleDict, whose keys have no dots, and are no names of its methods."""
    return "|" + name.replace(".", "|")


class _Pair(nn.Module):
    """A_2 ``(rank, in)`` and B_2 ``(out, rank)``, as peft begins with them: B_2 is 0."""

    def __init__(self, layer: nn.Module, rank: int, dice: torch.Generator):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=dice)
