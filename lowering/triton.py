"""`ir.Attention` as Triton: `kernels/triton/decode.py`, `prefill.py` and `append.py` with the facts of one shape."""

from __future__ import annotations

import hashlib
import json
import linecache
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvpass import kernels
from kvpass.ir import SCORE, Attention, Step
from kvpass.kernels.text import text
from kvpass.kernels.walk import Target, walk
from kvpass.lowering.bounds import Range, ranges
from kvpass.lowering.specialise import specialise
from kvpass.lowering.triton_config import Config, config, padded
from kvpass.lowering.triton_target import Host, Triton
from kvpass.lowering.words import refuse

FOLDER = Path(next(iter(kernels.__path__))) / "triton"
LARGEST_HEAD = 512


@dataclass(frozen=True)
class Strides:
    """Where the rows of a pool stand, in elements; the entries of a row of one head are dense.

    Attributes:
        head: from one head to the next; None where it is known only at run time: the stride of the pool's first axis.
        page, row: from one page, and from one row of it, to the next; no page where all rows of a head are one table
            ``[B, K, S, D]``, whose heads and sequences have strides of their own.
    """

    head: int | None
    page: int | None
    row: int

    @staticmethod
    def by_head(page_size: int, size: int) -> Strides:
        """A pool ``[K, pages, page_size, D]``."""
        return Strides(None, page_size * size, size)

    @staticmethod
    def by_row(page_size: int, heads: int, size: int) -> Strides:
        """A pool ``[pages, page_size, K * D]``."""
        return Strides(size, page_size * heads * size, heads * size)

    @staticmethod
    def dense(row: int) -> Strides:
        """Keys or values that are not in pages."""
        return Strides(None, None, row)


def source(
    spec: Attention,
    arch: str = "sm_90",
    keys: Strides | None = None,
    values: Strides | None = None,
    how: Config | None = None,
) -> str:
    """The standalone module of a shape: its `attention` launches the kernels.

    Args:
        keys, values: of the pools; where it is not given, by head, or dense if the spec has no pages.
        how: instead of what the table of configurations says.

    Raises:
        NotImplementedError: an element type, a score, a mask or a step that Triton has no words for; the message says
            which.
    """
    _check(spec)
    keys = keys or _usual(spec.page_size, spec.head_size)
    values = values or _usual(spec.page_size, spec.value_size)
    paged = keys.page is not None and values.page is not None
    how = how or config(spec if paged else replace(spec, page_size=None), arch)
    page = spec.page_size or how.block_n
    cut = vars(how) | {"block_n": _constant(how.block_n), "options": f"OPTIONS = {json.dumps(how.options)}\n"}
    facts = cut | _shape(spec, page, keys, values) | _words(spec)
    _, mark, tiles = (FOLDER / "tiles.py").read_text().partition("# ---- the shape")
    facts["tiles"] = specialise(mark + tiles, facts, "#")
    facts["about"] = "".join(f"# {line}\n" for line in text(spec).splitlines())
    if spec.step is Step.DECODE:
        return _module("decode", facts)
    return _module("prefill", facts | {"block_m": _constant(how.block_m)})


def append_source(page_size: int, size: int, layout: Strides) -> str:
    """The standalone module that writes rows of `size` elements a head into a pool."""
    facts = {
        "about": f"# append page_size={page_size} size={size}\n",
        "block": _constant(16),
        "page_size": _constant(page_size),
        "size": _constant(size),
        "size_pad": _constant(padded(size)),
        "page": _constant(layout.page),
        "row": _constant(layout.row),
        "head": layout.head,
    }
    return _module("append", facts)


def _module(kernel: str, facts: Mapping[str, Any]) -> str:
    made = specialise((FOLDER / f"{kernel}.py").read_text(), facts, "#")
    return re.sub(r"^# fmt: \w+\n|  # fmt: skip$", "", made, flags=re.MULTILINE)


def load(source: str) -> types.ModuleType:
    """The module that a source says. Triton reads the text of a kernel again, from `linecache`."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    module = types.ModuleType(f"kvpass_triton_{digest}")
    module.__file__ = f"<{module.__name__}>"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def _usual(page: int | None, size: int) -> Strides:
    return Strides.dense(size) if page is None else Strides.by_head(page, size)


def _check(spec: Attention) -> None:
    if spec.step is Step.ANY:
        raise NotImplementedError("a step that is neither decode nor prefill")
    refuse(spec, LARGEST_HEAD)


def _shape(spec: Attention, page: int, keys: Strides, values: Strides) -> dict[str, Any]:
    sizes = {
        "kv_heads": spec.kv_heads,
        "group": spec.group,
        "head_size": spec.head_size,
        "head_pad": padded(spec.head_size),
        "part": min(32, padded(spec.head_size)) if spec.dtype is torch.float32 else padded(spec.head_size),
        "value_size": spec.value_size,
        "value_pad": padded(spec.value_size),
        "key_paged": keys.page is not None,
        "value_paged": values.page is not None,
        "page_size": page,
        "key_page": keys.page or keys.row,
        "key_row": keys.row,
        "value_page": values.page or values.row,
        "value_row": values.row,
        "scale": repr(float(spec.scale)),
        # A score that shrinks where the product grows has its maximum elsewhere.
        "plain_score": spec.score == SCORE and spec.scale > 0,
        "empty": 'float("nan")' if spec.empty_is_nan else "0.0",
    }
    return {name: _constant(value) for name, value in sizes.items()} | {
        "key_head": keys.head,
        "value_head": values.head,
    }


def _words(spec: Attention) -> dict[str, Any]:
    """What is printed: the score, the mask, and the ends of the keys that it lets through."""
    if not spec.score.has(SCORE):
        raise NotImplementedError("a score that does not depend on queries and keys")
    target, found = Triton(spec), ranges(spec.support)
    words = {
        "score": _function("score", "score, b, h, i, j, start, reads", _print(spec.score, target)),
        "visible": _function("visible", "b, h, i, j, start, reads", _print(spec.support, target)),
        "sink": _function("sink", "h, reads", target.sink()),
        "ranges": _ranges(found),
        "ranges_count": _constant(len(found)),
    }
    printed = "".join(words.values())
    return words | {"uses_floor": "floor_" in printed, "uses_tanh": "hyperbolic(" in printed}


def _constant(value: Any) -> str:
    return f"tl.constexpr({value})"


def _print(expr: Any, target: Target[str]) -> str:
    return walk(expr, target)


def _function(name: str, arguments: str, body: str) -> str:
    return f"@triton.jit\ndef {name}({arguments}):\n    return {body}\n\n\n"


def _ranges(found: tuple[Range, ...]) -> str:
    """`reach` on the device and `spans` on the host."""
    low, high = Triton(None, "i0"), Triton(None, "i1")
    cases, spans = [], []
    for k, r in enumerate(found):
        clear = f"{_print(r.low, high)}, {_end(r, low)}" if r.exact else "0, 0"
        cases.append(f"    if RANGE == {k}:\n        return {_print(r.low, low)}, {_end(r, high)}, {clear}\n")
        spans.append(f"({_print(r.low, Host(None, 'i0'))}, {_end(r, Host(None, 'i1'))})")
    return (
        "@triton.jit\ndef reach(RANGE: tl.constexpr, i0, i1, rows):\n"
        '    """Rows i0 .. i1 see no key outside the first two ends, and all see every key inside the other two."""\n'
        f"{''.join(cases)}    return 0, 0, 0, 0\n\n\n"
        "def spans(i0: int, i1: int, rows: int) -> tuple[tuple[int, int], ...]:\n"
        '    """The first two ends of all ranges, on the host."""\n'
        f"    return ({''.join(f'{span}, ' for span in spans)})\n\n\n"
    )


def _end(r: Range, target: Target[str]) -> str:
    return "rows" if r.high is None else _print(r.high, target)
