"""The graph of a decode step as instructions over buffers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kvpass.ir import Layout, by_name
from kvpass.lowering import cpu, ops
from kvpass.lowering.tape import products
from kvpass.lowering.tape.rules import RULES, Access, Writing
from kvpass.lowering.tape.trace import Operand, Traced, Untraceable, expr_of, is_tensor, memory
from kvpass.lowering.tape.words import TYPES, NoWords, Value, Words

aten = torch.ops.aten
_THREADS = 0  # the place of the number of threads among the numbers of a call
_PRODUCT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Buffer:
    """Memory of one or more values.

    Attributes:
        tensor: where it is for ever; None for what a call makes or brings.
        argument: its place among the arguments of a call; ``given`` what that is.
        address: of a function.
        made: what it holds, where the tape or an op makes it; ``host`` where an op of PyTorch's does.
        slot: which piece of scratch memory it is in.
    """

    tensor: Tensor | None = None
    argument: int | None = None
    given: Value | None = None
    address: int | None = None
    made: Value | None = None
    host: bool = False
    slot: int | None = None
    kept: bool = False


@dataclass
class Instruction:
    """A function of the tape's, with buffers and places of numbers.

    Attributes:
        by_rows: whether it can go through some of the rows at a time.
        across: the buffers of which it reads other rows as well.
    """

    text: str
    buffers: list[int]
    numbers: list[int] = field(default_factory=list)
    by_rows: bool = False
    across: frozenset[int] = frozenset()


@dataclass
class Host:
    """An op that runs as it is written, between two stretches of the tape."""

    target: Callable[..., Any]
    args: Any
    kwargs: Any
    out: Any
    buffers: list[int] = field(default_factory=list)


@dataclass
class Product:
    """Matrices of one type that multiply the same rows."""

    x: Value
    kind: torch.dtype
    rows: sympy.Expr
    matrices: list[tuple[Value, Value | None, Value, bool]]
    scratch: int


class _Factors(NamedTuple):
    """Rows, a matrix as it stands in memory, a bias, and whether the matrix has its outputs first."""

    x: Value
    weight: Value
    bias: Value | None
    turned: bool


class Planner:
    """From a graph to instructions.

    Args:
        rows: the number of new rows, where they are many: products are PyTorch's then, and what treats each row for
            itself is made so that it can go through some rows at a time.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        traced: Traced,
        operands: Sequence[Operand],
        rows: sympy.Symbol | None = None,
    ) -> None:
        self.symbols = list(traced.symbols.values())
        places = {symbol: k + 1 for k, symbol in enumerate(self.symbols)}
        self.words, self.by_rows = Words(places), None if rows is None else Words(places, traced.symbols[rows])
        self.buffers: list[Buffer] = []
        self.steps: list[Instruction | Host | Product] = []
        self.values: dict[fx.Node, Any] = {}
        self.by_memory: dict[int, int] = {}
        self.by_address: dict[int, int] = {}
        self.groups: dict[Any, Product] = {}
        self.copies: dict[Value, Value] = {}
        self.widened: dict[int, tuple[Value, Value]] = {}  # by buffer: bytes, and the floats that nobody has read yet
        placeholders = iter(enumerate(operands))
        for node in module.graph.nodes:
            fake = traced.values.get(node)
            if node.op == "placeholder":
                self._placeholder(node, fake, *next(placeholders))
            elif node.op == "get_attr":
                tensor = operator.attrgetter(str(node.target))(module)
                self.values[node] = self._value(fake, self._add(Buffer(tensor=tensor)))
            elif node.op == "call_function":
                self._call(node, fake)
            else:
                self.outputs = fx.map_arg(node.args[0], self.values.__getitem__)
                self._read(self.outputs)
        for leaf in pytree.tree_leaves(self.outputs, is_leaf=is_value):
            if isinstance(leaf, Value):
                self.buffers[leaf.buffer].kept = True

    # -- values --------------------------------------------------------------------------------------------------

    def _add(self, buffer: Buffer) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def _value(self, fake: Any, buffer: int | None = None) -> Value:
        if buffer is not None:
            self.by_memory[memory(fake)] = buffer
        where = self.by_memory[memory(fake)]
        shape, strides = (tuple(map(expr_of, given)) for given in (fake.shape, fake.stride()))
        return Value(where, fake.dtype, shape, strides, expr_of(fake.storage_offset()))

    def _placeholder(self, node: fx.Node, fake: Any, k: int, operand: Operand) -> None:
        if operand.number is not None:
            self.values[node] = expr_of(fake)
        else:
            buffer = Buffer(tensor=operand.fixed, argument=k)
            self.values[node] = buffer.given = self._value(fake, self._add(buffer))

    def _number(self, fake: Any) -> Any:
        if isinstance(fake, torch.SymInt):
            return expr_of(fake)
        if isinstance(fake, (torch.SymFloat, torch.SymBool)):
            raise Untraceable("a number that is made of sizes")
        return fake

    def _call(self, node: fx.Node, fake: Any) -> None:
        leaves = pytree.tree_leaves(fake)
        if not any(is_tensor(leaf) for leaf in leaves):
            self.values[node] = pytree.tree_map(self._number, fake)
            return
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise Untraceable(f"{node.target} writes into an operand")
        given: Any = fx.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        args, kwargs = given
        if node.target is ops.append:
            self._read(args)
            pool, rows, place, before = args
            self._append(pool, rows, place, before)
            self.values[node] = pool
        elif all(memory(leaf) in self.by_memory for leaf in leaves if is_tensor(leaf)):
            self.values[node] = pytree.tree_map(lambda x: self._value(x) if is_tensor(x) else self._number(x), fake)
        else:
            mark = len(self.steps), len(self.buffers), dict(self.by_memory), dict(self.widened)
            try:
                self.values[node] = self._written(node.target, args, kwargs, fake)
            except NoWords:
                del self.steps[mark[0] :], self.buffers[mark[1] :]
                self.by_memory, self.widened = mark[2:]
                self._read(given)
                self.copies = {k: v for k, v in self.copies.items() if v.buffer < mark[1]}
                self.values[node] = self._hosted(node.target, args, kwargs, fake)

    def _hosted(self, target: Any, args: Any, kwargs: Any, fake: Any) -> Any:
        def value(x: Any) -> Any:
            if not is_tensor(x):
                return self._number(x)
            if memory(x) not in self.by_memory:
                made = self._value(x, self._add(Buffer(host=True)))
                self.buffers[made.buffer].made = made
            return self._value(x)

        out = pytree.tree_map(value, fake)
        buffers = [v.buffer for v in pytree.tree_leaves((args, kwargs, out), is_leaf=is_value) if is_value(v)]
        self.steps.append(Host(target, args, kwargs, out, buffers))
        return out

    def _made(self, fake: Any) -> Value:
        made = self._value(fake, self._add(Buffer()))
        self.buffers[made.buffer].made = made
        return made

    def _scratch(self, shape: tuple[sympy.Expr, ...], dtype: torch.dtype) -> Value:
        strides = tuple(sympy.Mul(*shape[k + 1 :]) for k in range(len(shape)))
        made = Value(self._add(Buffer()), dtype, shape, strides)
        self.buffers[made.buffer].made = made
        return made

    def _dense(self, x: Value) -> Value:
        """The value itself, or a copy without holes."""
        if x.dense and x.offset == 0:
            return x
        if x not in self.copies:
            self.copies[x] = copy = self._scratch(x.sizes, x.dtype)
            self._emit(RULES[aten.clone.default], {"self": x}, copy)
        return self.copies[x]

    def _widens(self, target: Any, given: Mapping[str, Any], fake: Any) -> Value | None:
        """A constant matrix of bytes as floats, which are made where something else than a product reads them."""
        x = given.get("self")
        if target is not aten._to_copy.default or not isinstance(x, Value) or x.dtype is not torch.int8:
            return None
        strides = tuple(map(expr_of, fake.stride()))
        if fake.dtype not in _PRODUCT_TYPES or len(x.sizes) != 2 or x.strides != strides:
            return None
        if self.buffers[x.buffer].tensor is None:
            return None
        out = self._value(fake, self._add(Buffer()))
        self.widened[out.buffer] = x, out
        return out

    def _read(self, what: Any) -> None:
        """Make what these are views of."""
        for leaf in pytree.tree_leaves(what, is_leaf=is_value):
            if isinstance(leaf, Value) and leaf.buffer in self.widened:
                x, out = self.widened.pop(leaf.buffer)
                self.buffers[out.buffer].made = out
                self._emit(RULES[aten._to_copy.default], {"self": x}, out)

    def _stored(self, weight: Value) -> Value:
        """A matrix as it stands in memory, with bytes where its floats are not needed."""
        if weight.buffer not in self.widened:
            return weight
        x, _ = self.widened[weight.buffer]
        return Value(x.buffer, x.dtype, weight.sizes, weight.strides, weight.offset + x.offset)

    # -- instructions --------------------------------------------------------------------------------------------

    def _written(self, target: Any, args: Any, kwargs: Any, fake: Any) -> Any:
        if hasattr(target, "lowering"):
            self._read(args)
            query, keys, values, start, rows, reads = args
            return self._attention(target, query, keys, values, start, rows, reads, fake)
        if target is ops.linear:
            target = aten.linear.default
        if not is_tensor(fake) or not hasattr(target, "_schema"):
            raise NoWords("several results")
        given = by_name(target, args, kwargs)
        product = self._few if self.by_rows is None else self._many
        found = product(target, given, fake) or self._widens(target, given, fake)
        if found is not None:
            return found
        self._read(given)
        made = RULES.get(target)
        if made is None:
            raise NoWords(f"{target}")
        out = self._made(fake)
        self._emit(made, given, out)
        return out

    def _emit(self, made: Callable[[Writing], str], given: Mapping[str, Any], out: Value) -> None:
        if out.dtype not in TYPES:
            raise NoWords(f"{out.dtype}")
        if self.by_rows is not None:
            writing = Writing(self.by_rows, dict(given), out)
            text = _text(writing, made(writing))
            if writing.by_rows and writing.stored and all(map(self._in_its_row, writing.stored)):
                own = {v.buffer for v in writing.operands} & {access.value.buffer for access in writing.read}
                own -= {access.value.buffer for access in writing.read if not self._in_its_row(access)}
                across = frozenset(v.buffer for v in writing.operands) - own
                self.steps.append(Instruction(text, _buffers(writing), by_rows=True, across=across))
                return
            if out.count.has(self.by_rows.rows):
                raise NoWords("many rows that are not treated each for itself")
        writing = Writing(self.words, dict(given), out)
        text = _text(writing, made(writing))
        self.steps.append(Instruction(text, _buffers(writing)))

    def _rows(self, made: Value) -> tuple[sympy.Expr, dict[tuple[sympy.Expr, sympy.Expr], None]] | None:
        """How far apart the rows of a buffer are, and size and stride of what is farther apart still; None where rows
        do not stand each for itself.
        """
        axis = None if self.by_rows is None else self.by_rows.row(made.sizes)
        if axis is None or not (step := made.strides[axis]).is_Integer:
            return None
        others = [pair for k, pair in enumerate(zip(made.sizes, made.strides, strict=True)) if k != axis]
        return step, dict.fromkeys(
            (size, stride) for size, stride in others if size != 1 and not (stride.is_Integer and stride < step)
        )

    def _in_its_row(self, access: Access) -> bool:
        """Whether an entry is of that row of a buffer: between where the row begins and where the next one does."""
        value, made = access.value, self.buffers[access.value.buffer].made
        if made is None or made.dtype is not value.dtype or (rows := self._rows(made)) is None:
            return False
        step, outside = rows
        walked, end = sympy.S.Zero, value.offset
        for size, stride, at in zip(value.sizes, value.strides, access.index, strict=True):
            if at == access.row:
                walked += stride
            elif (size, stride) not in outside:
                end += (size - 1) * stride
        return bool(walked == step and value.offset.is_Integer and end.is_Integer and value.offset >= 0 and end < step)

    def rows_at(self, made: Value) -> Any:
        """The same for two values of which each row stands at the same bytes."""
        rows = self._rows(made)
        if rows is None:
            return made
        (step, outside), item = rows, made.dtype.itemsize
        return step * item, frozenset((size, sympy.expand(stride * item)) for size, stride in outside)

    def _append(self, pool: Value, rows: Value, place: Value, before: int) -> None:
        head, tail = rows.sizes[:before], rows.sizes[before + 1 :]
        to = Value(pool.buffer, pool.dtype, (*head, *tail), (*pool.strides[:before], *pool.strides[before + 2 :]))
        words, step = self.by_rows or self.words, pool.strides[before + 1]
        if words.row(rows.sizes) != before:
            words = self.words
        if rows.dtype != pool.dtype or pool.dtype not in TYPES:
            raise Untraceable("rows of another type than their pool")

        def body(index: list[str]) -> str:
            at = [*index[:before], *index[before + 1 :]]
            row = words.at(rows, index)
            return f"out[p1[{index[before]}] * {words.size(step)} + {words.at(to, at)}] = p0[{row}];"

        kind = TYPES[pool.dtype]
        text = (
            f"  const {kind}* p0 = static_cast<const {kind}*>(base[a[0]]);\n"
            f"  const int64_t* p1 = static_cast<const int64_t*>(base[a[1]]);\n"
            f"  {kind}* __restrict out = static_cast<{kind}*>(base[a[2]]);\n"
            f"  {words.loops(rows.sizes, body)}\n"
        )
        index = tuple(f"i{k}" for k in range(len(rows.sizes)))
        own = words is self.by_rows and self._in_its_row(Access(rows, index, index[before]))
        across = frozenset() if own else frozenset([rows.buffer])
        buffers = [rows.buffer, place.buffer, pool.buffer]
        self.steps.append(Instruction(text, buffers, by_rows=words is self.by_rows, across=across))

    def _factors(self, target: Any, given: dict[str, Any], fake: Any) -> _Factors | None:
        """The operands of a product with a matrix, where it is one."""
        if target is aten.linear.default:
            x, weight, bias, turned = given["input"], given["weight"], given.get("bias"), True
        elif target is aten.addmm.default and given["alpha"] == given["beta"] == 1:
            x, weight, bias, turned = given["mat1"], given["mat2"], given["self"], False
        elif target in (aten.mm.default, aten.matmul.default):
            x, weight, bias, turned = given["self"], given.get("mat2", given.get("other")), None, False
        else:
            return None
        if len(weight.sizes) != 2 or not x.sizes or fake.dtype not in _PRODUCT_TYPES:
            return None
        if any(v is not None and v.dtype != fake.dtype for v in (x, weight, bias)):
            return None
        if bias is not None and (bias.sizes != (weight.sizes[not turned],) or bias.strides != (1,)):
            return None
        self._read((x, bias))
        weight = self._stored(weight)
        if self.buffers[weight.buffer].tensor is None:
            return None
        return _Factors(x, weight, bias, turned)

    def _few(self, target: Any, given: dict[str, Any], fake: Any) -> Value | None:
        """A product of few rows, by the kernel that streams the matrix."""
        factors = self._factors(target, given, fake)
        if factors is None:
            return None
        x, weight, bias, turned = factors
        width = x.sizes[-1]
        strides = weight.strides if turned else weight.strides[::-1]  # of outputs, of inputs
        if strides[1] == 1:
            crossed = False
        elif strides[0] == 1:
            crossed = True
        else:
            return None
        if bias is not None and self.buffers[bias.buffer].tensor is None:
            return None
        x, out = self._dense(x), self._result(fake)
        rows = sympy.Mul(*x.sizes[:-1])
        group = self.groups.get((x, weight.dtype))
        if group is None:
            scratch = self._scratch((rows * width,), torch.float32)
            group = self.groups[x, weight.dtype] = Product(x, weight.dtype, rows, [], scratch.buffer)
            self.steps.append(group)
        group.matrices.append((weight, bias, out, crossed))
        return out

    def _many(self, target: Any, given: dict[str, Any], fake: Any) -> Value | None:
        """A product of many rows, into memory of the tape's."""
        factors = self._factors(target, given, fake)
        if factors is None:
            return None
        x, weight, bias, turned = factors
        x, out = self._dense(x), self._result(fake)
        flat = [
            Value(v.buffer, v.dtype, (sympy.Mul(*v.sizes[:-1]), v.sizes[-1]), (v.sizes[-1], sympy.S.One))
            for v in (x, out)
        ]
        if turned:
            weight = Value(weight.buffer, weight.dtype, weight.sizes[::-1], weight.strides[::-1], weight.offset)
        args = (flat[0], weight, bias, flat[1])
        self.steps.append(Host(products.multiply, args, {}, (), [v.buffer for v in args if v is not None]))
        return out

    def _result(self, fake: Any) -> Value:
        out = self._made(fake)
        if not out.dense:
            raise NoWords("a result with holes")
        return out

    def product(self, group: Product) -> Instruction:
        """The instruction of matrices that multiply the same rows."""
        w, places, matrices = self.words, _Places(self.words), []
        x, width = places.of(group.x), w.size(group.x.sizes[-1])
        kernel = self._function(products.kernel(group.x.dtype, group.kind))
        scratch, function = places.buffer(group.scratch), places.buffer(kernel)
        for weight, bias, out, crossed in group.matrices:
            features = w.size(out.sizes[-1])
            row = next((stride for stride in weight.strides if stride != 1), group.x.sizes[-1])
            where = [places.of(weight), "nullptr" if bias is None else places.of(bias), places.buffer(out.buffer)]
            matrices.append(f"    {{{', '.join(where)}, {features}, {features}, {w.size(row)}, {int(crossed)}}},\n")
        text = (
            f"  const Matrix matrices[] = {{\n{''.join(matrices)}  }};\n"
            f"  reinterpret_cast<Linear>({function})({x}, {width}, {w.size(group.rows)}, {width}, matrices,\n"
            f"    {len(matrices)}, s[{_THREADS}], static_cast<float*>({scratch}));\n"
        )
        return Instruction(text, places.buffers)

    def _function(self, address: int) -> int:
        if address not in self.by_address:
            self.by_address[address] = self._add(Buffer(address=address))
        return self.by_address[address]

    def _attention(
        self, target: Any, query: Value, keys: Any, values: Any, start: Any, rows: Any, reads: Any, fake: Any
    ) -> Value:
        (spec,), made, w = target.static, cpu.kernel(target.static[0]), self.words
        query = query if query.strides[3] == 1 else self._dense(query)
        reads = [self._dense(read) for read in reads]
        places = _Places(w)
        decode, prefill = (places.buffer(self._function(x)) for x in (made.decode_address, made.prefill_address))
        (k, k_page), (v, v_page) = (
            self._pool(places, given, layout, spec.dtype.itemsize)
            for given, layout in zip((keys, values), target.layouts, strict=True)
        )
        read = [f"{{{places.of(x)}, {{{', '.join(map(w.size, x.strides))}}}}}" for x in reads] or ["{}"]
        out = self._made(fake)
        batch, _, new, _ = query.sizes
        numbers = ", ".join(map(w.size, (batch, new, start, rows)))
        strides = ", ".join(map(w.size, (*query.strides[:3], *out.strides[:3])))
        tiles = [cpu.tile(math.gcd(a, b)) for a in (k_page, 0) for b in (v_page, 0)]
        text = (
            f"  const Pool k = {k};\n  const Pool v = {v};\n"
            f"  const int64_t tile = k.size ? v.size ? {tiles[0]} : {tiles[1]} : v.size ? {tiles[2]} : {tiles[3]};\n"
            f"  const Call<{len(read)}> call{{{places.of(query)}, {places.buffer(out.buffer)}, {numbers},\n"
            f"    s[{_THREADS}], tile, {strides}, k, v, {{{', '.join(read)}}}}};\n"
            f"  const bool few = {w.size(new)} * {spec.group} <= {cpu.MOST_DECODED};\n"
            f"  if (reinterpret_cast<Attention>(few ? {decode} : {prefill})(&call)) return NO_MEMORY;\n"
        )
        self.steps.append(Instruction(places.named(text), places.buffers, places.numbers))
        return out

    def _pool(self, places: _Places, given: Any, layout: Layout | None, item: int) -> tuple[str, int]:
        """Keys or values in C++, and how many rows a page has."""
        w = self.words
        if layout is None:
            x: Value = given[0] if given[0].strides[3] == 1 else self._dense(given[0])
            batch, head, row, _ = map(w.size, x.strides)
            return f"{{{places.of(x)}, nullptr, {batch}, {head}, 0, {row}, 0, 0}}", 0
        pool, table, run = given
        (page, step), size = pool.strides[layout.before : layout.before + 2], int(pool.sizes[layout.before + 1])
        apart = layout.factor * pool.strides[layout.before - 1] if layout.outside else layout.factor
        where = f"{places.buffer(pool.buffer)}, {places.buffer(table.buffer)}"
        which = f"{places.number(run)}, {places.number(table.sizes[1])}"
        return f"paged({where}, {which}, {apart}, {page}, {step}, {size}, {item})", size


class _Places:
    """The operands of an instruction: buffers, and behind them numbers that are another one's in another layer."""

    def __init__(self, words: Words) -> None:
        self.words, self.buffers, self.numbers = words, list[int](), list[int]()

    def buffer(self, buffer: int) -> str:
        self.buffers.append(buffer)
        return f"base[a[{len(self.buffers) - 1}]]"

    def of(self, value: Value) -> str:
        """The address of its first entry."""
        base = self.buffer(value.buffer)
        return base if value.offset == 0 else f"moved({base}, {self.words.size(value.offset * value.dtype.itemsize)})"

    def number(self, symbol: sympy.Symbol) -> str:
        self.numbers.append(self.words.places[symbol])
        return f"s[a[@{len(self.numbers) - 1}]]"

    def named(self, text: str) -> str:
        """A text in which numbers know that they stand behind the buffers."""
        for k in range(len(self.numbers)):
            text = text.replace(f"a[@{k}]", f"a[{len(self.buffers) + k}]")
        return text


def is_value(x: Any) -> bool:
    return isinstance(x, Value)


def _text(writing: Writing, body: str) -> str:
    """A function's text: its operands by name, then what a rule says."""
    out, last = TYPES[writing.out.dtype], len(writing.operands)
    lines = [
        f"const {TYPES[x.dtype]}* p{k} = static_cast<const {TYPES[x.dtype]}*>(base[a[{k}]]);"
        for k, x in enumerate(writing.operands)
    ]
    lines.append(f"{out}* __restrict out = static_cast<{out}*>(base[a[{last}]]);")
    return "".join(f"  {line}\n" for line in (*lines, body))


def _buffers(writing: Writing) -> list[int]:
    return [*(x.buffer for x in writing.operands), writing.out.buffer]
