"""What a trainer's own code keeps on the trainer while a loss is computed: counts, sums, lists of metrics.

A step computes the loss of an update batch several times, at other weights. Kept is what the pass leaves behind whose loss is
reported; the traces of all others are undone, and the other role of a pair is given what that pass left. So they are counted
once per update batch, on one process as on two, and go on after a resume where they were.
"""

from __future__ import annotations

import ast
import inspect
import marshal
import sys
import textwrap
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, EnumMeta
from functools import cache, reduce
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import Exchange
from .fingerprints import fingerprint
from .modules import other_modules
from .undo import ATOMS, UNSET, Remembered, slots_of


# What holds more than so many values when a run begins is taken for data, and not looked at again.
MOST_VALUES = 10_000
PLAIN = (type(None), bool, int, float, complex, str, bytes)
FEW_NUMBERS = 256  # of modules, that are looked at in every step
NUMBERS = (bool, int, float)
# What a defaultdict that a pass made may be made with again.
FACTORIES = {kind.__name__: kind for kind in (list, dict, set, int, float)}
# Objects of these packages, and of Python's own, are not looked into: they are theirs, and may be large.
FOREIGN = {"torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "huggingface_hub", "hf_sampa"}
PACKAGES = frozenset(FOREIGN)  # nor are objects that are made of a class of theirs
FOREIGN |= sys.stdlib_module_names - {"__main__"}
OF_EVERY_MODULE = vars(nn.Module()).keys()


class Rehearsal:
    """What some passes do to attributes, each of which begins with what there was and what the first one made.

    Attributes:
        raw: what there was before, by name, followed or not, and
        there: digests of what is followed of it.
        made: names of what the first pass made. None of it stays where no part of it is left alone.
        left_alone: of what no other pass changed of that.
        moved: names of what was there and was changed, or was made by the first pass.
        lost: names of what was there and became something that is not followed.
    """

    def __init__(self):
        self.raw: dict[str, Any] = {}
        self.there: dict[str, bytes] = {}
        self.made: set[str] = set()
        self.left_alone: set[str] = set()
        self.moved: set[str] = set()
        self.lost: set[str] = set()
        self._first: dict[str, bytes] | None = None

    def note(self, now: dict[str, bytes]) -> None:
        """Take up the digests after a pass."""
        if self._first is None:
            self._first = now
            self.made = self.left_alone = self.moved = now.keys() - self.there.keys()
        self.left_alone = {name for name in self.left_alone if now.get(name) == self._first[name]}
        self.made = self.made if self.left_alone else set()
        self.moved |= {name for name in now.keys() & self.there.keys() if now[name] != self.there[name]}


class Collected:
    """The attributes of a trainer, of its classes, state and arguments, that their author's code may change during a pass.

    Followed are numbers, texts, tensors, lists, dicts and the like of them, and attributes of the author's own small objects.
    What belongs to the loop is left alone.

    Args:
        owner: the trainer.
        package: attributes that classes of these packages set are the loop's.
        exchange: connects the processes.

    Attributes:
        changed: names of those that passes have changed.
    """

    def __init__(self, owner: Any, package: tuple[str, ...], exchange: Exchange):
        self.owner, self.exchange, self._package = owner, exchange, package
        self._left_of: dict[type, frozenset[str]] = {}
        self._rehearsal: Rehearsal | None = None  # in progress
        self._own_modules: dict[str, nn.Module] | None = None
        self._few = True
        self.changed: set[str] = set()
        self._too_large: set[str] = set()
        self._too_large = {name for name, value in self._values().items() if _size(value) > MOST_VALUES}

    def _holders(self) -> dict[str, Any]:
        """Where attributes are kept, by what their names begin with: the trainer, what the loop gives it, its author's classes."""
        of_loop = {f"{name}.": getattr(self.owner, name, None) for name in ("state", "args", "control")}
        own = [kind for kind in type(self.owner).__mro__ if not self._is_of_loop(kind)]
        return {
            "": self.owner,
            **{prefix: holder for prefix, holder in of_loop.items() if holder is not None},
            **{f"{kind.__module__}.{kind.__qualname__}.": kind for kind in own},
        }

    def _modules(self) -> dict[str, nn.Module]:
        """Modules that the author wrote, by what the names of their attributes begin with; looked up anew in a rehearsal only."""
        if self._own_modules is None or self._rehearsal:
            model = getattr(self.owner, "model", None)
            roots = {"model": model, **other_modules(self.owner, model)} if isinstance(model, nn.Module) else {}
            self._own_modules = {
                f"{root} {path}.": module
                for root, each in roots.items()
                for path, module in each.named_modules()
                if not _is_foreign(type(module))
            }
            self._few = sum(len(_numbers_of(module)) for module in self._own_modules.values()) <= FEW_NUMBERS
        return self._own_modules

    def _numbers_of_modules(self) -> dict[str, Any]:
        """By name; of many, outside of a rehearsal, those that its passes have changed."""
        found = {
            f"{prefix}{name}": value
            for prefix, module in self._modules().items()
            for name, value in _numbers_of(module).items()
        }
        few = self._few or self._rehearsal
        return {name: value for name, value in found.items() if few or name in self.changed}

    def _is_of_loop(self, kind: type) -> bool:
        return kind is object or kind.__module__.startswith(self._package)

    def _left(self, holder: Any) -> frozenset[str]:
        """Names of attributes that are the loop's. What it is told by `control` is the author's."""
        if holder is getattr(self.owner, "control", None):
            return frozenset()
        kind = type(holder)
        if kind not in self._left_of:
            of_loop = [each for each in kind.__mro__ if each is not object and self._is_of_loop(each)]
            self._left_of[kind] = frozenset().union(*map(_attributes_of, of_loop))
        return self._left_of[kind]

    def _raw(self) -> dict[str, Any]:
        """All attributes by name, but for the loop's; of modules, what may be a number."""
        found = {}
        for prefix, holder in self._holders().items():
            left = self._left(holder)
            found |= {
                f"{prefix}{name}": value
                for name, value in vars(holder).items()
                if name not in left and not _is_special(name)
            }
        for prefix, module in self._modules().items():
            found |= {f"{prefix}{name}": value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
        return found

    def _values(self, large: bool = False) -> dict[str, Any]:
        """What is followed of them. None is, as long as nothing else was seen in its place, not there yet."""
        numbers = self._numbers_of_modules()
        return numbers | {
            name: value
            for name, value in self._raw().items()
            if " " not in name
            and _is_followed(value)
            and (value is not None or name in self.changed)
            and (large or name not in self._too_large)
        }

    def _set(self, values: dict[str, Any], gone: Iterable[str] = ()) -> None:
        holders = self._holders() | self._modules()
        for name in gone:
            prefix, own = _cut(name, holders)
            delattr(holders[prefix], own)
        for name, value in values.items():
            prefix, own = _cut(name, holders)
            if vars(holders[prefix]).get(own, UNSET) is not value:
                setattr(holders[prefix], own, value)

    @contextmanager
    def aside(self, of_modules: bool = True) -> Iterator[None]:
        """Around a pass that does not count; what it does to numbers `of_modules` is undone, or stays."""
        raw, before = self._raw(), self._values()
        roots = [vars(value) if isinstance(value, nn.Module) else value for value in before.values()]
        remembered = Remembered(*roots, leave=_is_left)
        try:
            yield
        finally:
            kept, made, rehearsal = before, set(), self._rehearsal
            if rehearsal:
                rehearsal.note(self._digests())
                now = self._raw()
                rehearsal.lost |= {
                    name for name in before if now.get(name) is not None and not self._follows(name, now[name])
                }
                made, raw = rehearsal.made, rehearsal.raw
                kept = {name: before[name] for name in before.keys() & (rehearsal.there.keys() | made)}
            remembered.put_back()
            new = self._values().keys() - kept.keys() - made
            if not of_modules:
                now = self._numbers_of_modules()
                self.changed |= {name for name in now if now[name] != before.get(name)}
                kept = {name: value for name, value in kept.items() if " " not in name}
                new = {name for name in new if " " not in name}
            self._set(kept | {name: raw[name] for name in new & raw.keys()}, gone=new - raw.keys())

    def remembered(self, known: bool = False) -> Callable[[], None]:
        """What brings everything back to what it is now; or only what passes are `known` to change."""

        def values() -> dict[str, Any]:
            found = self._values() if self.changed or not known else {}
            return {name: value for name, value in found.items() if not known or name in self.changed}

        before = values()
        roots = [vars(value) if isinstance(value, nn.Module) else value for value in before.values()]
        remembered = Remembered(*roots, leave=_is_left)

        def put_back() -> None:
            remembered.put_back()
            self._set(before, gone=values().keys() - before.keys())

        return put_back

    @staticmethod
    def _follows(name: str, value: Any) -> bool:
        return type(value) in NUMBERS if " " in name else _is_followed(value)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Around passes at the start, of which the first may make something that stays, if the others leave a part of it alone.

        So weights that somebody remembers in the first pass are those that the run begins with, while counts begin at nothing.
        And large tensors that passes change are followed from then on: they are no data.

        Raises ValueError where a pass puts something that cannot be followed in the place of what is.
        """
        values = self._values(large=True)
        large = {name for name in self._too_large & values.keys() if _size(values[name], of_tensor=1) <= MOST_VALUES}
        self._too_large -= large
        self._rehearsal = Rehearsal()
        self._rehearsal.raw, self._rehearsal.there = self._raw(), self._digests()
        try:
            yield
        finally:
            ended, self._rehearsal = self._rehearsal, None
            values = self._values()
            large |= {name for name in ended.left_alone & values.keys() if _size(values[name]) > MOST_VALUES}
            moved = ended.moved - ended.left_alone
            self._too_large |= large - moved
            self.changed |= (ended.made & values.keys()) | {name for name in moved if " " in name}
        if ended.lost:
            name = min(ended.lost)
            raise ValueError(
                f"Expected {name!r} to stay what it is, a {type(ended.raw[name]).__name__}, but a pass made something of it that "
                "cannot be followed from pass to pass. Keep a plain number there (.item(), float()), or register a buffer."
            )

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around the pass that counts."""
        before = self._digests()
        yield
        after = self._digests()
        self.changed |= {name for name in before.keys() | after.keys() if after.get(name) != before.get(name)}

    def _digests(self) -> dict[str, bytes]:
        return {name: marshal.dumps(_picture(value, _as_digest), 2) for name, value in self._values().items()}

    def digest(self) -> int:
        """Equal on two processes where what is followed is."""
        return fingerprint([[name, digest] for name, digest in sorted(self._digests().items())])

    # ---- Between processes, and in checkpoints ----

    def state_dict(self, saved: bool = False) -> dict[str, Any]:
        """What passes have changed, as plain values and tensors; what the loop is told by `control` is not `saved`."""
        values = self._values(large=True)
        names = {name for name in self.changed & values.keys() if not (saved and name.startswith("control."))}
        names -= set() if saved else self._too_large  # never change again
        pictures = {name: _picture(values[name], _as_tensor) for name in sorted(names)}
        return {name: ("left", each) if name in self._too_large else each for name, each in pictures.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make everything what it was where `state_dict` was taken."""
        self.changed |= state.keys()
        values = self._values(large=True)
        self._too_large |= {name for name, (kind, *_) in state.items() if kind == "left"}
        pictures = {name: each[1] if name in self._too_large else each for name, each in state.items()}
        self._set({name: _painted(picture, values.get(name)) for name, picture in pictures.items()})


def _cut(name: str, holders: Iterable[str]) -> tuple[str, str]:
    """What the name of a holder begins with, and the attribute's, which may have dots in it."""
    prefix = max((each for each in holders if name.startswith(each)), key=len)
    return prefix, name.removeprefix(prefix)


def _numbers_of(module: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(module).items() if type(value) in NUMBERS and name not in OF_EVERY_MODULE
    }


# ---- What is followed ----


@cache
def _attributes_of(kind: type) -> frozenset[str]:
    """Names of the attributes that a class declares, or that its methods set on ``self``."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    declared = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    return declared | frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in FOREIGN


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_followed(value: Any) -> bool:
    return not _is_left(value)


def _is_left(value: Any) -> bool:
    """Whether a value is not looked into: others' objects, code, models, and what is trained, whose memory is lent during a pass."""
    if isinstance(value, Tensor):
        return isinstance(value, nn.Parameter) or (value.requires_grad and value.is_leaf)
    plain = type(value) in ATOMS or isinstance(value, np.ndarray | np.generic | dict | list | tuple | deque | set)
    if plain or isinstance(value, nn.Module):
        return not plain and not _attributes(value)
    return _is_others(type(value))


def _is_others(kind: type) -> bool:
    """Of Python's own classes and of others' packages, or made of a class of theirs: a dataset, a trainer."""
    return _is_foreign(kind) or any(each.__module__.partition(".")[0] in PACKAGES for each in kind.__mro__)


def _attributes(value: Any) -> dict[str, Any]:
    """Of an object of the author's own, or of a metric of torchmetrics; none of any other."""
    if isinstance(value, nn.Module):
        is_metric = isinstance(getattr(value, "_defaults", None), dict) and hasattr(value, "_update_count")
        names = [*value._defaults, "_update_count", "_computed"] if is_metric else []
        return {name: getattr(value, name) for name in names}
    if _is_others(type(value)):
        return {}
    found: dict[str, Any] = {}
    with suppress(AttributeError):  # not by getattr, which may be the author's own
        found |= object.__getattribute__(value, "__dict__")
    for slot in slots_of(type(value)):
        with suppress(AttributeError):  # not set yet
            found[slot.__name__] = slot.__get__(value)
    return found


def _size(value: Any, of_tensor: int | None = None) -> int:
    """Of how many numbers and texts a value is made, a tensor of `of_tensor`, if given; no exact count above `MOST_VALUES`."""
    size, waiting, seen = 0, [value], set()
    while waiting and size <= MOST_VALUES:
        each = waiting.pop()
        numel = each.numel() if isinstance(each, Tensor) else each.size if isinstance(each, np.ndarray) else 1
        size += min(numel, of_tensor or numel)
        if id(each) not in seen:
            seen.add(id(each))
            parts = _parts(each)
            size += len(parts) if len(parts) > MOST_VALUES else 0
            waiting += parts if len(parts) <= MOST_VALUES else []
    return size


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | deque | set):
        return list(value)
    return [] if isinstance(value, Tensor | np.ndarray) else list(_attributes(value).values())


# ---- Pictures: what a value holds, as tuples that can be compared, sent and saved ----


def _as_digest(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return str(tensor.dtype), list(tensor.shape), blake2b(content).digest()


def _as_tensor(tensor: Tensor) -> Any:
    return tensor.detach().cpu().clone()


def _picture(value: Any, of_tensor: Any, inside: set[int] | None = None) -> tuple:
    """``(kind, content)``; nothing but its kind of what cannot be followed, and of what is met a second time."""
    if type(value) in PLAIN:
        return "value", value
    if isinstance(value, Enum):
        return "enum", [*_class_of(value), value.name]
    if isinstance(value, np.generic):
        return ("value", value.item()) if type(value.item()) in PLAIN else ("other",)
    if isinstance(value, np.ndarray) and value.dtype != object:
        if value.dtype.kind in "biufc" and value.dtype.isnative and value.dtype != np.longdouble:
            return "array", of_tensor(torch.from_numpy(np.array(value, copy=True)))
        return ("other",) if value.dtype.names else ("bytes", [value.dtype.str, list(value.shape), value.tobytes()])
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not (value.is_nested or value.is_meta or _is_left(value))
        return ("tensor", of_tensor(value.resolve_conj().resolve_neg())) if plain else ("other",)
    inside = set() if inside is None else inside
    if id(value) in inside:
        return ("other",)
    if not isinstance(value, tuple):
        inside.add(id(value))
    if isinstance(value, dict):
        pairs = value.items()
        kind = "counter" if isinstance(value, Counter) else "dict"
        if isinstance(value, defaultdict):
            kind = f"dict {getattr(value.default_factory, '__name__', None)}"
        return kind, [[_picture(k, of_tensor, inside), _picture(v, of_tensor, inside)] for k, v in pairs]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "named", [*_class_of(value), [_picture(each, of_tensor, inside) for each in value]]
    if isinstance(value, list | tuple | deque):
        kind = "tuple" if isinstance(value, tuple) else f"deque {value.maxlen}" if isinstance(value, deque) else "list"
        return kind, [_picture(each, of_tensor, inside) for each in value]
    if isinstance(value, set):
        return "set", sorted((_picture(each, of_tensor, inside) for each in value), key=repr)
    if attributes := _attributes(value):
        parts = [[name, _picture(each, of_tensor, inside)] for name, each in sorted(attributes.items())]
        return "object", [*_class_of(value), parts]
    return ("other",)


def _class_of(value: Any) -> tuple[str, str]:
    return type(value).__module__, type(value).__qualname__


def _find_class(module: str, name: str) -> type | None:
    """None for a class that cannot be found by its name."""
    return reduce(lambda holder, part: getattr(holder, part, None), name.split("."), sys.modules.get(module))


def _painted(picture: tuple, value: Any, make: Any = None) -> Any:
    """The value that `picture` is of: `value` itself, changed, where it is of that kind, or a new one.

    `make` makes an empty one where there is none, as a defaultdict knows it.
    """
    kind, *rest = picture
    if kind == "other":
        return value
    (content,) = rest
    if kind == "value":
        return content
    if kind in ("tensor", "array"):
        return _painted_tensor(content, value, kind)
    if kind == "bytes":
        dtype, shape, memory = content
        return np.frombuffer(memory, dtype=dtype).reshape(shape).copy()
    if kind == "enum":
        *of_class, name = content
        found = _find_class(*of_class) or type(value)
        return found[name] if isinstance(found, EnumMeta) else value
    if value is None and make is not None:
        value = make()
    if kind.startswith(("dict", "counter")):
        factory = FACTORIES.get(kind.removeprefix("dict "))
        value = (
            value
            if isinstance(value, dict)
            else Counter()
            if kind == "counter"
            else defaultdict(factory)
            if factory
            else {}
        )
        before = dict(value)
        value.clear()
        make = getattr(value, "default_factory", None)
        for key, each in content:
            key = _painted(key, None)
            value[key] = _painted(each, before.get(key), make)
        return value
    if kind in ("object", "named"):
        *of_class, parts = content
        made = type(value) if list(_class_of(value)) == of_class else _find_class(*of_class)
        if made is None:
            return value
        if kind == "named":
            return made(*(_painted(each, None) for each in parts))
        if type(value) is not made:
            value = object.__new__(made)  # made in a pass of another process
        for name, each in parts:  # of frozen ones, too
            object.__setattr__(value, name, _painted(each, getattr(value, name, None)))
        return value
    return _painted_sequence(content, value, kind)


def _painted_tensor(content: Tensor, value: Any, kind: str) -> Any:
    if kind == "array":
        return content.numpy()
    same = isinstance(value, Tensor) and (value.shape, value.dtype) == (content.shape, content.dtype)
    if same and 0 not in value.stride():  # an expanded one cannot be written to
        with torch.no_grad():
            return value.copy_(content)
    return content.to(value.device) if isinstance(value, Tensor) else content.clone()


def _painted_sequence(content: Iterable[tuple], value: Any, kind: str) -> Any:
    before = list(value) if isinstance(value, list | tuple | deque) else []
    before += [None] * (len(content) - len(before))
    items = [_painted(each, old) for each, old in zip(content, before, strict=False)]
    if kind == "tuple":
        return tuple(items)
    if kind == "set":
        value = value if isinstance(value, set) else set()
        value.clear()
        value.update(items)
        return value
    if not isinstance(value, list | deque):
        most = kind.removeprefix("deque ")
        value = [] if kind == "list" else deque(maxlen=None if most == "None" else int(most))
    value.clear()
    value.extend(items)
    return value
