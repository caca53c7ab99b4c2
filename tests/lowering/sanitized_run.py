"""Generated C++ under AddressSanitizer and UndefinedBehaviorSanitizer, whose libraries have to be loaded first::

    LD_PRELOAD="libasan.so libubsan.so" KVPASS_CXXFLAGS="-O1 -fsanitize=address,undefined" \\
        python -m tests.lowering.sanitized_run masks plants

Words: names of `GROUPS`, and ``plants``, kernels with a fault, each of which has to be found. A case is printed before
it runs, since a fault ends the process.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from kvpass.ir import Attention, Layout, Read
from kvpass.kernels.text import text
from kvpass.lowering import cpp, cpu
from kvpass.lowering.cpu import Rows
from tests.lowering.cases import MASKS, POOL, SCORES, Inputs, Shape, attention
from tests.lowering.test_cpp import FLOATS, HEADS, SIZES

Cases = Iterator[tuple[Attention, Shape]]


@dataclass(frozen=True)
class Plant:
    """A fault in the source of the kernels, and a word of what has to be said about it."""

    old: str
    new: str
    said: str

    def missed(self, folder: Path) -> str | None:
        source, said = folder / "attention.cpp", folder / "said"
        right = cpp.SOURCE.read_text()
        if self.old not in right:
            raise ValueError(f"the source has no {self.old!r}")
        source.write_text(right.replace(self.old, self.new))
        child = os.fork()
        if not child:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
            cpp.SOURCE = source
            try:
                check(attention(2, 2, 16), Shape(new=1, cached=65))
            finally:
                traceback.print_exc()
                os._exit(0)
        os.waitpid(child, 0)
        return None if self.said in said.read_text() else f"{self.said} was missed: {said.read_text()}"


_DENSE, _PAGED = "base + j * row", "(j % size) * row"
PLANTS = (
    Plant(_DENSE, "base + (j + 1) * row", "heap-buffer-overflow"),
    Plant(_PAGED, "(j % size + 1) * row", "use-after-poison"),
    Plant(_DENSE, "base + (j + int(size) * 2147483647 - 2147483647) * row", "signed integer overflow"),
)


def one_shape() -> Cases:
    spec = attention(6, 2, 40, dtype=torch.bfloat16, mask="window", score="soft_cap")
    for new, cached in ((1, 0), (1, 1000), (2, 63), (17, 65)):
        yield spec, Shape(new=new, cached=cached)


def sizes(dtype: torch.dtype) -> Cases:
    for size, (new, cached) in product(SIZES, ((1, 0), (1, 64), (2, 130), (17, 63))):
        head, value = size if isinstance(size, tuple) else (size, size)
        yield attention(6, 2, head, value, dtype), Shape(new=new, cached=cached)


def groups() -> Cases:
    for dtype, heads, (new, cached) in product(FLOATS[:2], HEADS, ((1, 200), (2, 65), (64, 1))):
        yield attention(*heads, dtype=dtype), Shape(new=new, cached=cached)


def rows() -> Cases:
    for dtype, new, cached in product(FLOATS, (1, 2, 5, 17, 64, 257), (0, 1, 63, 64, 65, 1000)):
        yield attention(dtype=dtype), Shape(new=new, cached=cached)


def masks() -> Cases:
    some = [*((mask, False) for mask in MASKS), ("padding", True), ("strict", True), ("none", True)]
    for (mask, nan), new, cached in product(some, (1, 3, 70), (0, 65, 200)):
        yield attention(mask=mask, empty_is_nan=nan), Shape(new=new, cached=cached)


def scores() -> Cases:
    for score, mask, new in product(SCORES, ("causal", "padding"), (1, 40)):
        yield attention(score=score, mask=mask), Shape(new=new, cached=70)
    for score, dtype, new in product(("soft_cap", "alibi", "bias"), FLOATS[1:], (1, 40)):
        yield attention(dtype=dtype, score=score), Shape(new=new, cached=70)


def pages() -> Cases:
    for page_size, new in product((1, 3, 16, 24, 128), (1, 33)):
        yield attention(), Shape(new=new, cached=150, page_size=page_size)


def shares() -> Cases:
    """Keys of one head that two threads share."""
    for kv_heads, cached in ((1, 3000), (3, 700), (5, 65)):
        yield attention(2 * kv_heads, kv_heads), Shape(batch=1, cached=cached)


def sinks() -> Cases:
    read = Read("sink", torch.float32, "h")
    for mask, dtype, new, cached in product(("causal", "none"), FLOATS, (1, 40), (0, 65, 1000)):
        yield attention(mask=mask, dtype=dtype, reads=(read,), sink="sink"), Shape(new=new, cached=cached)


GROUPS: dict[str, Callable[[], Cases]] = {
    **{f.__name__: f for f in (one_shape, groups, rows, masks, scores, pages, shares, sinks)},
    **{f"sizes_{cpp.ELEMENTS[dtype]}": partial(sizes, dtype) for dtype in FLOATS},
}


def poison(pool: Tensor) -> None:
    """From here on every access to a row that nothing fills is an error."""
    size = pool.shape[-1] * pool.element_size()
    for row in pool.isnan().all(-1).flatten().nonzero().flatten().tolist():
        _poison(pool.data_ptr() + row * size, size)


def dense(_: Inputs, x: Tensor) -> Rows:
    """One table for each head, which nothing follows in its allocation."""
    return Rows.dense(x)


def paged(inputs: Inputs, x: Tensor) -> Rows:
    """Pages in random order; rows that belong to no sequence are poisoned."""
    pool, table = inputs.pages(x)
    poison(pool)
    return Rows.paged(POOL, pool, table, -1)


def side_by_side(inputs: Inputs, x: Tensor) -> Rows:
    """The same with the heads of a row beside each other."""
    pool, table = inputs.pages(x)
    pool = pool.permute(1, 2, 0, 3).contiguous()
    poison(pool)
    return Rows.paged(Layout(0, False, pool.shape[-1]), pool, table, -1)


def check(spec: Attention, shape: Shape) -> None:
    """Accesses and arithmetic only: what is rounded differs from the kernels that users get."""
    inputs = Inputs(spec, shape)
    run = cpu.kernel(spec)
    for threads, place in product((1, 2), (dense, paged, side_by_side)):
        torch.set_num_threads(threads)
        key, value = place(inputs, inputs.key), place(inputs, inputs.value)
        run(inputs.query, key, value, shape.cached, shape.rows, inputs.reads)


def check_group(name: str) -> None:
    count = 0
    for spec, shape in GROUPS[name]():
        print(text(spec), shape, flush=True)
        check(spec, shape)
        count += 1
    print(f"{count} cases of {name}, no fault")


def check_plants() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for plant in PLANTS:
            if missed := plant.missed(Path(folder)):
                sys.exit(missed)
    print(f"{len(PLANTS)} faults found")


if __name__ == "__main__":
    os.environ.pop("LD_PRELOAD", None)  # the compiler is quicker without
    _poison = ctypes.CDLL(None).__asan_poison_memory_region
    _poison.argtypes, _poison.restype = (ctypes.c_void_p, ctypes.c_size_t), None
    if "plants" in sys.argv:  # first: a process with a second thread must not fork
        check_plants()
    for word in sys.argv[1:]:
        if word != "plants":
            check_group(word)
