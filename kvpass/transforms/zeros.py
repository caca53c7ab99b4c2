"""Terms that are zero whatever the weights hold: left out of the sums that they are added to.

A mask of ones and zeros on the taps of a convolution (`conv1d(x, weight * mask)`) takes away those that look ahead. The
facts know the products that are zero; where they are gone, nothing reads the rows ahead.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from kvpass.analysis.facts import Fact, Fill
from kvpass.analysis.sweep import Analyzed, arguments, sym
from kvpass.transforms.spell import replace

aten = torch.ops.aten


def without_zeros(analyzed: Analyzed) -> bool:
    """Rewrite the graph in place; true where something went, and is to be analysed again."""
    module = analyzed.captured.module
    found = [node for node in module.graph.nodes if node.target is aten.add.Tensor and _one_is_zero(analyzed, node)]
    for node in found:
        terms = arguments(node)
        kept = terms[1] if _is_zero(analyzed, terms[0]) else terms[0]
        replace(node, kept)
    if found:
        module.graph.eliminate_dead_code()
        module.recompile()
    return bool(found)


def _one_is_zero(analyzed: Analyzed, node: fx.Node) -> bool:
    """True of a sum of two tensors of its own type and shape, one of which is zero everywhere."""
    terms = arguments(node)
    if node.kwargs or len(terms) != 2 or not all(term in analyzed.steps for term in terms):  # numbers have no fact
        return False
    values = [of.meta["val"] for of in (node, *terms)]
    alike = len({(value.dtype, *map(sym, value.shape)) for value in values}) == 1
    return alike and any(_is_zero(analyzed, term) for term in terms)


def _is_zero(analyzed: Analyzed, term: fx.Node) -> bool:
    fact: Fact = analyzed.fact(term)
    return fact.fill is Fill.ZERO and fact.support == sympy.false
