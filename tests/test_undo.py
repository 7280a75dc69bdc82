"""What is remembered is put back, in place; nothing else is touched."""

from __future__ import annotations

import logging
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_sampa.state.undo import Remembered


class Plain:
    """An object with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Slotted:
    """An object without a ``__dict__``; one of its names is mangled."""

    __slots__ = ("__hidden", "count", "values")

    def hide(self, value):
        self.__hidden = value

    @property
    def hidden(self):
        return self.__hidden


class BothSlottedAndNot(Slotted):
    pass


# ---- Containers: the same objects, with the same content ----


def test_dicts_lose_what_was_added_and_get_back_what_was_taken_in_their_order():
    inner = [1, 2]
    values = {"first": 1, "second": inner, "third": None}
    remembered = Remembered(values)
    del values["first"]
    values["added"] = 3
    values["second"] = "other"
    inner.append(3)
    remembered.put_back()
    assert list(values.items()) == [("first", 1), ("second", [1, 2]), ("third", None)]
    assert values["second"] is inner


@pytest.mark.parametrize(
    "make",
    [lambda: defaultdict(list, a=1), lambda: OrderedDict(a=1, b=2), lambda: Counter("aab"), lambda: {1: "a"}],
    ids=["defaultdict", "OrderedDict", "Counter", "dict"],
)
def test_every_kind_of_dict_stays_of_its_kind(make):
    values, expected = make(), make()
    remembered = Remembered(values)
    values["new"] = 7
    if isinstance(values, OrderedDict):
        values.move_to_end("a")
    remembered.put_back()
    assert values == expected and list(values) == list(expected) and type(values) is type(expected)
    if isinstance(values, defaultdict):
        assert values["missing"] == [] and values.default_factory is list


def test_a_dict_whose_methods_refuse_is_put_back_too():
    """transformers' outputs allow neither update nor deletion, and set an attribute for every key."""
    output = SequenceClassifierOutput(loss=torch.ones(1), logits=torch.zeros(2))
    loss = output.loss
    remembered = Remembered(output)
    output["loss"] = torch.zeros(1)
    output.logits += 1
    remembered.put_back()
    assert output.loss is loss and output["loss"] is loss
    assert output.logits.tolist() == [0.0, 0.0]


def test_a_dict_that_did_not_change_is_not_touched():
    """Other threads may be reading it."""

    class Watched(dict):
        pass

    values = Watched(a=torch.ones(1))
    iterator = iter(values)
    Remembered(values).put_back()
    assert next(iterator) == "a"  # would raise, had the dict been emptied and filled


def test_lists_deques_sets_and_tuples():
    pair = namedtuple("Pair", "left right")([1], {2})
    values, kept, seen = [3, [4]], deque([1, 2, 3], maxlen=3), {1, "a"}
    inner = values[1]
    remembered = Remembered(Plain(values=values, kept=kept, seen=seen, pair=pair))
    values[:] = [inner]
    inner.clear()
    kept.append(4)
    seen ^= {1, 2}
    pair.left.append(2)
    pair.right.clear()
    remembered.put_back()
    assert values == [3, [4]] and values[1] is inner
    assert list(kept) == [1, 2, 3] and kept.maxlen == 3
    assert seen == {1, "a"}
    assert pair == ([1], {2})


# ---- Objects ----


def test_attributes_are_removed_restored_and_looked_into():
    inner = Plain(count=1, states=[torch.ones(2)])
    outer = Plain(inner=inner, name="outer")
    remembered = Remembered(outer)
    inner.count += 1
    inner.states[0].zero_()
    inner.states.append("new")
    outer.inner, outer.added = Plain(), True
    del outer.name
    remembered.put_back()
    assert outer.inner is inner and outer.name == "outer" and not hasattr(outer, "added")
    assert inner.count == 1 and len(inner.states) == 1 and inner.states[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", [Slotted, BothSlottedAndNot])
def test_slots_are_attributes_too(kind):
    value = kind()
    value.values = [1]
    value.hide(5)
    remembered = Remembered(value)
    value.values.append(2)
    value.count = 3
    value.hide(6)
    if kind is BothSlottedAndNot:
        value.more = 1
    remembered.put_back()
    assert value.values == [1] and value.hidden == 5
    assert not hasattr(value, "count") and not hasattr(value, "more")


def test_what_holds_itself_ends():
    ring = [1]
    ring.append(ring)
    itself = Plain(ring=ring)
    itself.me = itself
    remembered = Remembered(itself)
    ring.clear()
    remembered.put_back()
    assert ring[0] == 1 and ring[1] is ring


def test_a_long_chain_needs_no_recursion():
    last = chain = Plain(next=None)
    for _ in range(10_000):
        chain = Plain(next=chain)
    remembered = Remembered(chain)
    last.next = "changed"
    remembered.put_back()
    assert last.next is None


# ---- Tensors and arrays ----


def test_tensors_keep_their_identity_and_stay_shared():
    shared = torch.arange(3.0)
    value = Plain(one=shared, other={"same": shared})
    remembered = Remembered(value)
    value.one = value.one + 1  # another tensor in one of the places
    shared.mul_(10)
    remembered.put_back()
    assert value.one is shared and value.other["same"] is shared
    assert shared.tolist() == [0.0, 1.0, 2.0]


def test_views_of_one_memory_stay_views():
    flat = torch.arange(4.0)
    value = [flat, flat[:2]]
    remembered = Remembered(value)
    flat.fill_(7)
    remembered.put_back()
    assert flat.tolist() == [0.0, 1.0, 2.0, 3.0] and value[1].tolist() == [0.0, 1.0]
    flat[0] = 5.0
    assert value[1][0] == 5.0


@pytest.mark.parametrize("replace", [lambda p: torch.zeros(2, 3), lambda p: torch.zeros(7), lambda p: p.data.t()])
def test_memory_that_was_replaced_comes_back(replace):
    param = nn.Parameter(torch.arange(6.0).view(2, 3))
    pointer, expected = param.data_ptr(), param.detach().clone()
    remembered = Remembered([param])
    param.data = replace(param)
    param.data.fill_(-1)
    remembered.put_back()
    assert param.data_ptr() == pointer and param.requires_grad and param.stride() == (3, 1)
    assert torch.equal(param, expected)


TENSORS = {
    "expanded": lambda: torch.tensor([1.0, 2.0]).expand(3, 2),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "whole numbers": lambda: torch.tensor([1, 2]),
    "empty": lambda: torch.empty(0, 3),
    "one number": lambda: torch.tensor(2.0),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "of a graph": lambda: torch.ones(2, requires_grad=True) * 3,
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_layout(name):
    tensor, expected = TENSORS[name](), TENSORS[name]()
    remembered = Remembered([tensor])
    with torch.no_grad():
        tensor.untyped_storage().fill_(0) if name == "expanded" else tensor.mul_(0)
    remembered.put_back()
    assert torch.equal(tensor.to_dense(), expected.to_dense())


def test_a_tensor_made_of_others_is_put_back_by_way_of_them():
    """As quantized optimizer state is, which allows no copies of itself."""
    one, other = torch.ones(2), torch.zeros(2)
    both = TwoTensor(one, other)
    remembered = Remembered([both])
    assert {id(each) for each in remembered.found(torch.Tensor)} == {id(both), id(one), id(other)}
    one.zero_()
    both.b = torch.ones(2)
    remembered.put_back()
    assert both.a is one and both.b is other and one.tolist() == [1.0, 1.0]


def test_autograd_takes_no_notice_of_what_is_put_back():
    weight = torch.ones(2, requires_grad=True)
    factor = torch.full((2,), 3.0)
    product = (weight * factor).sum()
    Remembered([weight, factor]).put_back()
    product.backward()  # would raise, had putting back counted as a change
    assert weight.grad.tolist() == [3.0, 3.0]


def test_attributes_of_tensors_are_remembered():
    tensor = torch.ones(1)
    tensor.steps = [1]
    remembered = Remembered([tensor])
    tensor.steps.append(2)
    tensor.added = True
    remembered.put_back()
    assert tensor.steps == [1] and not hasattr(tensor, "added")


def test_arrays():
    numbers, items = np.arange(3), np.array([[1], None], dtype=object)
    inner = items[0]
    fixed = np.ones(1)
    fixed.flags.writeable = False
    remembered = Remembered([numbers, items, fixed])
    numbers += 1
    items[0].append(2)
    items[1] = "new"
    remembered.put_back()
    assert numbers.tolist() == [0, 1, 2]
    assert items[0] is inner and inner == [1] and items[1] is None


# ---- Generators ----

GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(2, generator=g).tolist()),
    "torch, global": (lambda: torch.default_generator, lambda g: torch.rand(2).tolist()),
    "python": (lambda: random.Random(1), lambda g: [g.random(), g.gauss(0, 1)]),
    "python, global": (lambda: random._inst, lambda g: [random.random()]),
    "numpy": (lambda: np.random.default_rng(1), lambda g: g.random(2).tolist()),
    "numpy, old": (lambda: np.random.RandomState(1), lambda g: [g.randn()]),
    "numpy, global": (lambda: np.random.mtrand._rand, lambda g: [np.random.rand()]),
    "numpy, bits": (lambda: np.random.MT19937(1), lambda g: [int(g.random_raw())]),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_draw_again_what_they_drew(name):
    make, draw = GENERATORS[name]
    generator = make()
    remembered = Remembered(Plain(generator=generator))
    drawn = draw(generator)
    remembered.put_back()
    assert draw(generator) == drawn


def test_a_generator_without_state_is_no_hindrance():
    Remembered(random.SystemRandom()).put_back()


# ---- What is left alone ----


def test_models_code_and_logs_are_left_alone():
    module, log = nn.Linear(1, 1), logging.getLogger("a log of this test")

    def function():
        pass

    function.calls = []
    remembered = Remembered(Plain(module=module, log=log, function=function, kind=Plain))
    with torch.no_grad():
        module.weight.fill_(5)
    log.disabled = True
    function.calls.append(1)
    remembered.put_back()
    assert module.weight.item() == 5 and log.disabled and function.calls == [1]
    assert remembered.found(torch.Tensor) == []


def test_what_the_caller_leaves_out_is_not_looked_into():
    large, small = torch.ones(3), torch.ones(2)
    value = {"large": large, "small": small}
    remembered = Remembered(value, leave=lambda each: each is large)
    large.zero_()
    small.zero_()
    value["large"] = None
    remembered.put_back()
    assert value["large"] is large and large.sum() == 0 and small.sum() == 2
    assert [each is small for each in remembered.found(torch.Tensor)] == [True]


def test_it_can_be_put_back_more_than_once_and_after_an_error():
    value = Plain(count=0, tensor=torch.zeros(1))
    remembered = Remembered(value)
    for _ in range(2):
        with pytest.raises(KeyError):
            try:
                value.count += 1
                value.tensor.add_(1)
                raise KeyError("inside")
            finally:
                remembered.put_back()
        assert value.count == 0 and value.tensor.item() == 0
