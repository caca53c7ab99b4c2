"""The order of the heads: query head ``h`` reads key head ``h // G``, in whatever order the axes of the graph stand.

An order is a list of atoms of one value, those that the keys have first. It is carried from value to value by the
links of the ops between them. An atom that is taken apart on the way has no link; its parts keep their order as long as
no op moves axes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from kvpass.analysis.facts import Fact, Kind
from kvpass.transforms.sides import NotRecognised

Places = Sequence[int | None]


def heads_of(fact: Fact, others: Container[int | None]) -> list[int]:
    """The free atoms of a value, without rows and depth."""
    return [k for k, atom in enumerate(fact.atoms) if atom.kind is Kind.FREE and atom.size != 1 and k not in others]


def keys_first(heads: Sequence[int], owned: Container[int | None]) -> list[int]:
    """The head atoms of a product, those that the keys have as well first."""
    return sorted(heads, key=lambda k: k not in owned)


def carried(order: Sequence[int], places: Places, moved: bool, there: Sequence[int]) -> list[int]:
    """The same order over the head atoms ``there`` of another value.

    Args:
        places: for each atom, the atom there that it became; None where it was taken apart.
        moved: axes were moved on the way.

    Raises:
        NotRecognised: it cannot be told.
    """
    found = [place for place in (places[k] for k in order) if place is not None]
    if len(found) == len(order):
        if set(found) != set(there):
            raise NotRecognised("heads that the product of queries and keys does not have")
        return found
    if moved or list(order) != sorted(order):
        raise NotRecognised("heads that are taken apart and moved")
    return list(there)


def arranged(heads: Sequence[int], places: Places, order: Sequence[int]) -> list[int]:
    """The head atoms of an operand in the order of the result's.

    Raises:
        NotRecognised: it cannot be told.
    """
    placed = {k: place for k in heads if (place := places[k]) is not None}
    if len(placed) == len(heads) and set(placed.values()) <= set(order):
        return sorted(heads, key=lambda k: order.index(placed[k]))
    if list(order) != sorted(order):
        raise NotRecognised("heads that are taken apart in another order")
    return list(heads)
