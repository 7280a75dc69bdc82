"""Modules at which two halves meet: blocks of a model as a whole, or the frozen linear layers in them, whose weights are read once for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..state import stood_in
from .halves import Halves
from .joining import Unlike, join, parted, parted_call, rejoined
from .own import Randomness
from .twins import Twins


# With fewer rows a product may add up in another order than in that of both halves; there is little to read twice then.
FEWEST_ROWS = 8


class Meetings:
    """Lets the blocks and the frozen linear layers of some modules be computed once for two halves.

    Args:
        halves: which meet.
        twins: the trained weights of each.
        random: what dropout of each draws from.
        modules: the model, and what else has a part in the loss.

    Attributes:
        linears: the frozen linear layers, and
        blocks: the modules around them that are the same many times over.
        at_blocks: whether blocks are computed as a whole.
        failed: whether the passes of this step are of no use.
    """

    def __init__(self, halves: Halves, twins: Twins, random: Randomness, modules: Iterable[nn.Module]):
        self.halves, self.twins, self._random = halves, twins, random
        everything = list({id(each): each for root in modules for each in root.modules()}.values())
        holders = {id(each) for each in twins.holders}
        frozen = [each for each in everything if _is_linear(each) and not each.weight.requires_grad]
        self.linears = [each for each in frozen if id(each) not in holders]  # their biases may be trained
        self.blocks = _blocks_of(everything, frozen)
        self._trained = _with_a_forward(everything, holders)
        self.at_blocks, self.failed = bool(self.blocks), False
        # Makes autograd follow what has no other input with a gradient.
        self.anchor = torch.zeros((), requires_grad=True)
        self._sizes: tuple[int, int] | None = None  # of the halves, while a block is computed for both
        self._open = ExitStack()

    def open(self) -> None:
        """From here on these modules meet, within a half."""
        for block in self.blocks:
            meet = partial(self._meet, block, block.forward, _JoinedBlock)
            self._stand_in(block, "forward", partial(self._of_block, block.forward, meet))
        for linear in self.linears:
            self._stand_in(linear, "forward", partial(self._meet, linear, linear.forward, _JoinedRows))
        for module in self._trained:
            self._stand_in(module, "forward", partial(self._with_own_weights, module.forward))
        for name, chance in (("dropout", _chance_of_dropout), ("scaled_dot_product_attention", _chance_of_attention)):
            own = getattr(functional, name)
            self._stand_in(functional, name, partial(self._by_chance, chance, own))

    def _stand_in(self, owner: Any, name: str, other: Callable) -> None:
        self._open.enter_context(stood_in(owner, name, other))

    def close(self) -> None:
        """Leave the modules as they were."""
        self._open.close()

    def _of_block(self, own: Callable, meet: Callable, *args: Any, **kwargs: Any) -> Any:
        return meet(*args, **kwargs) if self.at_blocks else own(*args, **kwargs)

    def _meet(self, module: nn.Module, own: Callable, kind: type[_Joined], *args: Any, **kwargs: Any) -> Any:
        """What `module` returns, computed with the other half where that is possible."""
        found = None
        if self.halves.current is not None and kind.fits(args, kwargs):
            found = self.halves.meet(module, (args, kwargs), partial(self._both, own, kind))
        return own(*args, **kwargs) if found is None else found()

    def _both(self, own: Callable, kind: type[_Joined], one: Any, other: Any) -> tuple[Callable, Callable] | None:
        try:
            joined = kind(self, own, one, other)
        except Unlike:
            return None
        return partial(joined.returned, 0), partial(joined.returned, 1)

    @contextmanager
    def parted(self, sizes: tuple[int, int]) -> Iterator[None]:
        """Within the block a joint batch has the trained weights of its halves, and in dropout what each draws for itself."""
        self._sizes = sizes
        try:
            yield
        finally:
            self._sizes = None

    def _with_own_weights(self, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """What a module with trained weights returns for each half, on its own ones, joined."""
        if self._sizes is None:
            return own(*args, **kwargs)
        # Of all modules: some read the weights of others.
        return self._each_half(lambda half, other: self.twins.enter(other), self.halves.running, own, args, kwargs)

    def _by_chance(self, chance: Callable, own: Callable, *args: Any, **kwargs: Any) -> Any:
        """What dropout returns for each half, as it draws for itself."""
        if self._sizes is None or not chance(*args, **kwargs):
            return own(*args, **kwargs)
        return self._each_half(self._random.pass_dice, self.halves.running, own, args, kwargs)

    def _each_half(
        self, change: Callable[[int, int], None], now: int, own: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """The parts of both halves, `now` being the one in whose thread this is; `change` lets the other one have what is its own."""
        sizes, self._sizes = self._sizes, None
        other, calls = 1 - now, parted_call(args, kwargs, sizes)

        def of(half: int) -> Any:
            own_args, own_kwargs = calls[half]
            return own(*own_args, **own_kwargs)

        found = {now: of(now)}
        change(now, other)
        try:
            found[other] = of(other)
        finally:
            change(other, now)
            self._sizes = sizes
        return rejoined([found[0], found[1]])


class _Joined:
    """One call of a module for both halves, and the graph of it, which the graphs of the halves do not see.

    Each half goes on with its part of what came out. In backward the halves meet here again.
    """

    def __init__(self, meetings: Meetings, own: Callable, one: tuple, other: tuple):
        self.meetings = meetings
        calls = [tree_flatten(call) for call in (one, other)]
        self._inputs: list[list[Tensor]] = []  # of each half, what gets a gradient
        self._grads: list[list[Tensor | None]] = []
        inside = []
        for leaves, spec in calls:
            inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            grads: list[Tensor | None] = [None] * len(inputs)
            places = iter(range(len(inputs)))
            replaced = [
                _Entrance.apply(meetings.anchor, leaf.detach(), grads, next(places))
                if isinstance(leaf, Tensor) and leaf.requires_grad
                else leaf
                for leaf in leaves
            ]
            self._inputs.append(inputs)
            self._grads.append(grads)
            inside.append(tree_unflatten(replaced, spec))
        # What is kept for this graph is not for the hooks of the half that happens to compute.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            outputs = self.compute(own, *inside)
        flat = [tree_flatten(each) for each in outputs]
        if any(not isinstance(leaf, Tensor | type(None)) for leaves, _ in flat for leaf in leaves):
            raise Unlike
        self._specs = [spec for _, spec in flat]
        self._outputs = [leaves for leaves, _ in flat]

    @staticmethod
    def fits(args: tuple, kwargs: dict) -> bool:
        """Whether calls like this one can be joined."""
        raise NotImplementedError

    def compute(self, own: Callable, one: tuple, other: tuple) -> tuple[Any, Any]:
        """What the module returns to each half. Raises Unlike."""
        raise NotImplementedError

    def returned(self, half: int) -> Any:
        """What the module returns to this half, in this half's graph."""
        leaves = [leaf for leaf in self._outputs[half] if leaf is not None]
        graph = any(leaf.requires_grad for leaf in leaves)
        if graph:
            leaves = _Exit.apply(self, half, self.meetings.anchor, *self._inputs[half])
        self._inputs[half] = []
        found = iter(leaves)
        return tree_unflatten(
            [None if leaf is None else next(found) for leaf in self._outputs[half]], self._specs[half]
        )

    def backward(self, half: int, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of this half's inputs, given those of what it was given."""
        if self.meetings.halves.meet((self, "backward"), grads, self._backward) is None:
            # The other half does not come here: nothing that is left can be right for both.
            self.meetings.failed = True
            return [None for _ in self._grads[half]]
        return self._grads[half]

    def _backward(self, one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> tuple[bool, bool]:
        outputs = [leaf for leaves in self._outputs for leaf in leaves if leaf is not None]
        pairs = [(out, grad) for out, grad in zip(outputs, [*one, *other], strict=True) if grad is not None]
        pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        self._outputs = []
        return True, True


class _JoinedBlock(_Joined):
    """A block of a model, with its attention; its first argument has the batch as its first dimension."""

    @staticmethod
    def fits(args: tuple, kwargs: dict) -> bool:
        first = args[0] if args else kwargs.get("hidden_states")
        return isinstance(first, Tensor) and first.ndim > 1

    def compute(self, own: Callable, one: tuple, other: tuple) -> tuple[Any, Any]:
        firsts = [args[0] if args else kwargs["hidden_states"] for args, kwargs in (one, other)]
        sizes = (len(firsts[0]), len(firsts[1]))
        args, kwargs = join(one, other, sizes)
        with self.meetings.parted(sizes):
            found = own(*args, **kwargs)
        return parted(found, sizes)


class _JoinedRows(_Joined):
    """A frozen layer that does to every row the same: the halves may have different numbers of them."""

    @staticmethod
    def fits(args: tuple, kwargs: dict) -> bool:
        x = args[0] if len(args) == 1 and not kwargs else None
        return isinstance(x, Tensor) and x.ndim > 1 and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0

    def compute(self, own: Callable, one: tuple, other: tuple) -> tuple[Any, Any]:
        (((x,), _), ((z,), _)) = one, other
        if x.dtype != z.dtype or x.shape[-1] != z.shape[-1]:
            raise Unlike
        rows = [each.reshape(-1, each.shape[-1]) for each in (x, z)]
        y = own(torch.cat(rows))
        parts = y.split([len(each) for each in rows])
        return tuple(each.view(*of.shape[:-1], -1) for each, of in zip(parts, (x, z), strict=True))


class _Entrance(torch.autograd.Function):
    """Of a half's tensor into the graph for both: its gradient is put down, and goes no further."""

    @staticmethod
    def forward(ctx, anchor: Tensor, tensor: Tensor, grads: list, place: int) -> Tensor:
        ctx.grads, ctx.place = grads, place
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        ctx.grads[ctx.place] = grad
        return None, None, None, None


class _Exit(torch.autograd.Function):
    """Of this half's part out of the graph for both."""

    @staticmethod
    def forward(ctx, joined: _Joined, half: int, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.joined, ctx.half = joined, half
        ctx.set_materialize_grads(False)
        return tuple(leaf.detach() for leaf in joined._outputs[half] if leaf is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.joined.backward(ctx.half, grads)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


# ---- Chances ----


def _chance_of_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and p > 0


def _chance_of_attention(query, key, value, attn_mask=None, dropout_p: float = 0.0, *args: Any, **kwargs: Any) -> bool:
    return dropout_p > 0


# ---- Which modules ----


def _is_linear(module: nn.Module) -> bool:
    """Also of quantized ones, and of GPT-2's, whose weight is the other way round."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    linear = any(kind.startswith("Linear") or kind == "Conv1D" for kind in kinds)
    return linear and not list(module.children()) and getattr(module, "weight", None) is not None


def _blocks_of(everything: Iterable[nn.Module], frozen: Sequence[nn.Module]) -> list[nn.Module]:
    """Elements of lists of modules of one class, with `frozen` layers in them; the outermost ones."""
    wanted, inside, blocks = {id(each) for each in frozen}, set(), []
    for module in everything:
        if not isinstance(module, nn.ModuleList) or id(module) in inside or len({type(each) for each in module}) != 1:
            continue
        if all(any(id(part) in wanted for part in block.modules()) and id(block) not in wanted for block in module):
            blocks += list(module)
            inside |= {id(part) for part in module.modules()}
    return blocks


def _with_a_forward(everything: Iterable[nn.Module], holders: set[int]) -> list[nn.Module]:
    """The modules that are called where trained weights are used; of a list or dict of weights that is the module it is in."""
    found = []
    for module in everything:
        lists = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)
        around = [each for each in module.children() if isinstance(each, nn.ParameterDict | nn.ParameterList)]
        own = id(module) in holders and not isinstance(module, lists)
        if own or any(id(each) in holders for each in around):
            found.append(module)
    return found
