"""Closed forms of tensors whose content is known: masks, triangles, position tables.

A registered triangle is a function of its indices that happens to be stored. The content is compared with the candidate
once, in full; what matches is replaced by the formula, what does not stays a leaf function, at most with the triangle
outside which it is constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import sympy
import torch

from kvpass.analysis.expressions import Value, boolean, constant
from kvpass.analysis.facts import NEGATIVE, Fill, index
from kvpass.ir import Entries

_MAX_ENTRIES = 1 << 26
_MOST_VALUES = 4  # runs of equal entries along the offsets of a band; the first row of the other forms has two


def closed_form(tensor: torch.Tensor, leaf: Callable[[], Value]) -> Value | None:
    """The entries of a tensor as an expression over ``index(k)``, one ``k`` per axis of more than one entry.

    Args:
        tensor: any shape; of more than two axes (beside those of size one) only a triangle in the last two is seen.
        leaf: makes the leaf function of this tensor, used where only part of the content has a formula.
    """
    axes = [k for k, size in enumerate(tensor.shape) if size != 1]
    if tensor.numel() == 0 or tensor.numel() > _MAX_ENTRIES or tensor.is_complex() or not 1 <= len(axes) <= 4:
        return None
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:  # which PyTorch cannot compare
        return None
    flat = tensor.detach().reshape([tensor.shape[k] for k in axes])
    if len(axes) > 1 and not _first_row_fits(flat[(0,) * (len(axes) - 1)]):
        return None
    flat = flat.cpu()
    if len(axes) == 1:
        form = _ramp(flat, index(0))
    else:
        form = (_bands(flat) or _chunks(flat) if len(axes) == 2 else None) or _triangle(flat, leaf)
    form = form if form is not None else _taps(flat)
    return form if form is None or tensor.dtype is not torch.bool else boolean(form)


def entries_of(tensor: torch.Tensor) -> Entries | None:
    """What a tensor with an entry for each row may be taken for, by what it holds now.

    Floats are one of each row, ``[B, S]`` and not all zero, or as they are added to scores, ``[B, 1, 1, S]``.
    """
    if not tensor.is_floating_point():
        return Entries.FLAGS if holds_only(tensor, Entries.FLAGS) else None
    added = tensor.dim() == 4 and tensor.shape[1] == tensor.shape[2] == 1
    if not added and (tensor.dim() != 2 or not bool(tensor.any())):
        return None
    kinds = (Entries.MASK,) if added else (Entries.FLAGS, Entries.MASK)
    return next((kind for kind in kinds if holds_only(tensor, kind)), None)


def holds_only(tensor: torch.Tensor, entries: Entries) -> bool:
    """Whether these are all entries of a tensor of numbers."""
    if tensor.is_complex() or tensor.dtype is torch.bool or not tensor.numel():
        return False
    other = tensor == 1 if entries is Entries.FLAGS else tensor <= NEGATIVE
    return bool(((tensor == 0) | other).all())


def _first_row_fits(row: torch.Tensor) -> bool:
    """False of a row that no formula below begins with: of a weight, nothing else is read."""
    return int((row[1:] != row[:-1]).sum()) < _MOST_VALUES


def _ramp(row: torch.Tensor, x: sympy.Symbol) -> Value | None:
    """``first + step * x`` for integer tables (positions)."""
    if row.dtype is torch.bool or row.is_floating_point() or len(row) < 2:
        return None
    first, step = int(row[0]), int(row[1]) - int(row[0])
    expected = first + step * torch.arange(len(row))
    return sympy.Integer(first) + step * x if torch.equal(row.long(), expected) else None


def _taps(m: torch.Tensor) -> Value | None:
    """Ones and zeros, both, which change a few times along the last axis and along no other: taps of a convolution."""
    row = m[(0,) * (m.dim() - 1)]
    starts = _runs(row)
    if not 1 < len(starts) < _MOST_VALUES or not bool(((row == 0) | (row == 1)).all()):
        return None
    if not torch.equal(m, row.expand_as(m)):
        return None
    pieces = [(_value(row[k]), index(m.dim() - 1) < end) for k, end in itertools.pairwise(starts)]
    return sympy.Piecewise(*pieces, (_value(row[starts[-1]]), True))


def _runs(row: torch.Tensor) -> list[int]:
    """Where runs of equal entries begin, of those of which there are more than a formula has, so many."""
    return [0] + [int(k) + 1 for k in torch.nonzero(row[1:] != row[:-1]).flatten()[:_MOST_VALUES]]


def _value(entry: torch.Tensor) -> Value | None:
    return constant(float(entry)) if entry.dtype.is_floating_point else constant(int(entry))


def _bands(m: torch.Tensor) -> Value | None:
    """A function of ``j - i`` that takes few values: triangles, bands, windows."""
    rows, cols = m.shape
    by_offset = torch.cat([m[:, 0].flip(0), m[0, 1:]])  # offsets -(rows-1) .. cols-1
    starts = _runs(by_offset)
    if len(starts) > _MOST_VALUES:
        return None
    i, j = torch.arange(rows).unsqueeze(1), torch.arange(cols)
    if not torch.equal(m, by_offset[(j - i) + rows - 1]):
        return None
    offset = index(1) - index(0)
    values = [_value(by_offset[k]) for k in starts]
    if any(v is None for v in values):
        return None
    pieces = [(v, sympy.Le(offset, starts[k + 1] - rows)) for k, v in enumerate(values[:-1])]
    return sympy.Piecewise(*pieces, (values[-1], True)) if pieces else values[0]


def _chunks(m: torch.Tensor) -> Value | None:
    """Causal within blocks of ``c`` rows: ``j <= i and i // c == j // c``."""
    rows, cols = m.shape
    inside, outside = m[0, 0], m[0, -1]
    if rows != cols or bool(inside == outside):
        return None
    other = torch.nonzero(m[:, 0] != inside).flatten()
    if len(other) == 0:
        return None
    c = int(other[0])
    i, j = torch.arange(rows).unsqueeze(1), torch.arange(cols)
    if not torch.equal(m == inside, (j <= i) & (i // c == j // c)) or not bool(((m == inside) | (m == outside)).all()):
        return None
    x, y = index(0), index(1)
    kept = sympy.And(sympy.Le(y, x), sympy.Eq(sympy.floor(x / c), sympy.floor(y / c)))
    return sympy.Piecewise((_value(inside), kept), (_value(outside), True))


def _triangle(m: torch.Tensor, leaf: Callable[[], Value]) -> Value | None:
    """Anything on and below the diagonal, one fill above it, in each matrix of the last two axes."""
    *_, rows, cols = m.shape
    if rows != cols:
        return None
    above = m[..., torch.triu(torch.ones(rows, cols, dtype=torch.bool), 1)].flatten()
    fill = _value(above[0])
    if fill is None or not bool((above == above[0]).all()) or (Fill.of(fill) is None and fill != 1):
        return None
    below = m.tril()
    if m.dtype is not torch.bool and bool((below.abs() >= -NEGATIVE).any()):
        return None  # another mask, in which rows may be empty
    return sympy.Piecewise((leaf(), sympy.Le(index(m.dim() - 1), index(m.dim() - 2))), (fill, True))
