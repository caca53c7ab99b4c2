"""Repeated layers: what is learnt of one step holds for every step that is alike.

A step is a function of its op, the facts of its operands, its other arguments, and the sizes and types of its results.
Layers that are built alike are alike in all of these, so a rule runs once for each *kind* of step and not once a layer.
A step whose facts speak of its own node (the place where a property was lost, or a value without a closed form) is the
only one of its kind: a name must not stand for another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from kvpass.analysis.facts import Fact, leaf_name

if TYPE_CHECKING:
    from kvpass.analysis.sweep import Step

_PLAIN = (int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, sympy.Basic)


class Repeats:
    """The steps of one graph, by what they are a function of.

    Attributes:
        kinds: of each node, the number of its kind.
    """

    def __init__(self) -> None:
        self.kinds: dict[fx.Node, int] = {}
        self._steps: dict[Hashable, tuple[int, Step]] = {}
        self._facts: dict[Fact, Fact] = {}

    def shared(self, fact: Fact) -> Fact:
        """The first fact that is equal to this one."""
        return self._facts.setdefault(fact, fact)

    def step(self, node: fx.Node, key: Any, operands: Sequence[fx.Node], compute: Callable[[], Step]) -> Step:
        """The step of a node: that of its kind, on its own operands."""
        key = comparable(key)
        kind, step = self._steps.get(key, (len(self.kinds), None))  # a number that no kind has yet
        if step is None:
            step = compute()
            step = replace(step, facts=tuple(map(self.shared, step.facts)))
            if not any(speaks_of(fact, node.name) for fact in step.facts):
                self._steps[key] = kind, step
        self.kinds[node] = kind
        return replace(step, operands=tuple(operands) if step.links else ())


def speaks_of(fact: Fact, node: str) -> bool:
    """True where a fact names this node: as a cause, or as the function that stands for its entries."""
    causes = [fact.together, *(cause for _, cause in fact.tainted())]
    if any(cause is not None and cause.node == node for cause in causes):
        return True
    values = (value for value in (fact.expr, fact.support, fact.valid) if value is not None)
    return any(leaf.func.__name__ == leaf_name(node) for value in values for leaf in value.atoms(AppliedUndef))


def comparable(value: Any) -> Hashable:
    """An argument such that equal ones mean the same: 1, 1.0, -0.0 and True are four arguments.

    Facts go by identity, since equal ones are one object; so does what is not known to be comparable.
    """
    if isinstance(value, (list, tuple)):
        return type(value), *map(comparable, value)
    if isinstance(value, dict):
        return dict, *map(comparable, value.items())
    if isinstance(value, slice):
        return slice, *map(comparable, (value.start, value.stop, value.step))
    if isinstance(value, (float, complex)):
        return type(value), repr(value)
    return (type(value), value) if isinstance(value, _PLAIN) else (type(value), id(value))
