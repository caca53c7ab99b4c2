"""What a row is known by: the bytes of every sequence input at that row, and the digest of everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from kvpass.analysis.sweep import ancestry, sym
from kvpass.ir import Captured, Input, Role
from kvpass.transforms.plan import Plan


class Keys:
    """How to take keys from the arguments of a captured graph.

    Args:
        plan: what is stored. Rows that all others may depend on, the first ones of a sequence, are in each row's key;
            where a row may depend on the contexts of the other sequences of its batch, so are they, and its place.
    """

    def __init__(self, captured: Captured, plan: Plan | None = None) -> None:
        by_name = {i.name: i for i in captured.inputs}
        self.ahead = [(by_name[prefix.input], prefix.offset) for prefix in (() if plan is None else plan.ahead)]
        self.together = plan is not None and plan.analyzed.together
        self.sequences = captured.of(Role.SEQUENCE)
        self.contexts = captured.of(Role.CONTEXT)
        behind = captured.module.graph.nodes if plan is None else ancestry(*(slot.node for slot in plan.slots))
        read = {node.name for node in behind}
        self._contexts_of_rows = [i for i in self.contexts if i.name in read]
        # Of a hoisted value's key, what is not in `context`.
        self._hoisted = [i for i in self.contexts if i.batch_axis is not None or i.name not in read]
        head = [(i.role.value, i.batch_axis is not None) for i in (*self.sequences, *self.contexts)]
        self.signature = repr((head, [i.name in read for i in self.contexts])).encode()
        self.numbers = _free_numbers(captured, captured.module.graph.nodes)
        self._of_rows = _free_numbers(captured, behind)
        self._beside = [i.index for i in captured.of(Role.CONTEXT, Role.SYMBOL)]
        first = self.sequences[0]
        self._first, self._axis = first.index, first.seq_axes[0]
        self._lead = captured.lead
        values = {n.name: n.meta["val"] for n in captured.module.graph.nodes if n.op == "placeholder"}
        sizes = {sym(values[i.name]): i.index for i in captured.of(Role.SYMBOL)}
        self._tail = sympy.S.One if plan is None else plan.tail
        self._sizes = {size: sizes[size] for size in (captured.lead + self._tail).free_symbols}

    def length(self, args: Sequence[Any]) -> int:
        """``S`` of a call."""
        return int(args[self._first].shape[self._axis])

    def lead(self, args: Sequence[Any]) -> int:
        """How many entries stand before the rows of the text; they have keys as well."""
        return self._number(self._lead, args)

    def last(self, args: Sequence[Any]) -> int:
        """How many of the last rows have to be computed in any case."""
        return self._number(self._tail, args)

    def _number(self, expr: sympy.Expr, args: Sequence[Any]) -> int:
        if expr.is_Integer:
            return int(expr)
        return int(expr.xreplace({size: sympy.Integer(args[k]) for size, k in self._sizes.items()}))

    def batch(self, args: Sequence[Any]) -> int:
        """``B`` of a call: the largest batch axis among its inputs."""
        axes = [(i.index, i.batch_axis) for i in self.sequences if i.batch_axis is not None]
        return max((int(args[k].shape[axis]) for k, axis in axes), default=1)

    def rows(self, args: Sequence[Any]) -> tuple[list[bytes], int]:
        """For each sequence of the batch the bytes of all its rows, and how many bytes a row has.

        What stands before the rows has no bytes of its own: it depends on the context, which is in the key.
        """
        batch, length, lead = self.batch(args), self.length(args), self.lead(args)
        tables = [_table(args[i.index], i, batch, length) for i in self.sequences]
        if lead:
            tables = [np.concatenate([np.zeros((batch, lead, t.shape[2]), np.uint8), t], axis=1) for t in tables]
            length += lead
        if self.together:
            tables.append(_place(self.hoisting(args), batch, length))
        for given in () if self.together else self._contexts_of_rows:
            if given.batch_axis is not None:
                tables.append(_own_context(args[given.index].movedim(given.batch_axis, 0), batch, length))
        table = tables[0] if len(tables) == 1 else np.concatenate(tables, axis=2)
        if self.ahead:
            table = np.concatenate([table, self._prefixes(args, table, lead)], axis=2)
        return [row.tobytes() for row in table], table.shape[2]

    def _prefixes(self, args: Sequence[Any], table: np.ndarray, lead: int) -> np.ndarray:
        """The digest of each sequence's own prefix, as far as there is text, at each of its rows."""
        batch, length, _ = table.shape
        ends = np.zeros(batch, np.int64)
        for given, offset in self.ahead:
            numbers = args[given.index].detach().cpu().reshape(-1).to(torch.int64).numpy()
            ends = np.maximum(ends, np.broadcast_to(numbers, batch) + offset)
        held = [text[: lead + max(int(end), 0)] for text, end in zip(table, ends, strict=True)]
        digests = [hashlib.sha256(len(rows).to_bytes(8, "big") + rows.tobytes()).digest() for rows in held]
        each = np.frombuffer(b"".join(digests), np.uint8).reshape(batch, 1, 32)
        return np.broadcast_to(each, (batch, length, 32))

    def context(self, args: Sequence[Any]) -> bytes:
        """Digest of what the whole batch shares, and rows that are stored are made of."""
        digest = hashlib.sha256(self.signature + f"{self.lead(args)}".encode())
        for given in self._contexts_of_rows:
            if given.batch_axis is None:
                digest.update(tensor_bytes(args[given.index]))
        for symbol, k in self._of_rows:
            digest.update(f"{symbol}={args[k]};".encode())
        for given in self.sequences:
            value = args[given.index]
            width = [n for k, n in enumerate(value.shape) if k not in given.seq_axes and k != given.batch_axis]
            digest.update(f"{value.dtype}{width}".encode())
        return digest.digest()

    def hoisting(self, args: Sequence[Any]) -> bytes:
        """Digest of all that a hoisted value can depend on, each sequence's own context included."""
        digest = hashlib.sha256(self.context(args))
        digest.update(self.batch(args).to_bytes(8, "big"))
        for symbol, k in self.numbers:
            digest.update(f"{symbol}={args[k]};".encode())
        for given in self._hoisted:
            digest.update(tensor_bytes(args[given.index]))
        return digest.digest()

    def beside(self, args: Sequence[Any]) -> bytes:
        """Digest of all but the text: of what is made of the context for each row."""
        digest = hashlib.sha256(b"beside")
        for k in self._beside:
            digest.update(tensor_bytes(args[k]))
        return digest.digest()


def _free_numbers(captured: Captured, among: Iterable[fx.Node]) -> list[tuple[str, int]]:
    """Symbolic numbers that the caller passes and that these values may depend on, by the symbol that identities speak
    of.

    Neither the length of the sequence nor the size of the batch, nor a number that is only the stride of an input:
    where the bytes of a tensor lie does not change what it says.
    """
    nodes = {n.name: n for n in captured.module.graph.nodes if n.op == "placeholder"}
    read = set(captured.seq.free_symbols) | set(sympy.sympify(captured.batch).free_symbols)
    seen: set[sympy.Symbol] = set()
    for node in among:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor):
                seen.update(s for size in value.shape for s in sym(size).free_symbols)
            elif node.op != "placeholder" or node.users:
                seen.update(sym(value).free_symbols if isinstance(value, (torch.SymInt, torch.SymFloat)) else ())
    symbols = {i.index: sym(nodes[i.name].meta["val"]) for i in captured.of(Role.SYMBOL)}
    return sorted((str(symbol), k) for k, symbol in symbols.items() if (symbol.free_symbols & seen) - read)


def tensor_bytes(value: Any) -> bytes:
    """Dtype, shape and contents of a tensor, or the text of a number."""
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    plain = value.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return f"{plain.dtype}{tuple(plain.shape)}".encode() + data


def _table(tensor: torch.Tensor, given: Input, batch: int, length: int) -> np.ndarray:
    """uint8 ``[B, S, width]`` of one sequence input."""
    plain = tensor.detach()
    axis = given.seq_axes[0]
    if given.batch_axis is None and plain.dim() == axis + 1 and plain.numel() == length:
        plain = plain.reshape(1, length)
    elif given.batch_axis is None:
        plain = plain.movedim(axis, 0).reshape(1, length, -1)
    elif axis != 1:
        plain = plain.movedim(axis, 1)
    flat = plain.cpu().contiguous().reshape(-1)  # what an axis of size one has for a stride is open
    table = flat.view(torch.uint8).numpy().reshape(plain.shape[0], length, -1)
    return table if table.shape[0] == batch else np.broadcast_to(table, (batch, *table.shape[1:]))


def _own_context(value: torch.Tensor, batch: int, length: int) -> np.ndarray:
    """The digest of each sequence's own part of a context, at each of its rows."""
    digests = [np.frombuffer(hashlib.sha256(tensor_bytes(part)).digest(), np.uint8) for part in value]
    return np.broadcast_to(np.stack(digests)[:, None, :], (batch, length, 32))


def _place(contexts: bytes, batch: int, length: int) -> np.ndarray:
    """The digest of all contexts, of the size of the batch and of the place in it, at each row."""
    names = [hashlib.sha256(b"together" + contexts + place.to_bytes(8, "big")).digest() for place in range(batch)]
    return np.broadcast_to(np.stack([np.frombuffer(n, np.uint8) for n in names])[:, None, :], (batch, length, 32))
