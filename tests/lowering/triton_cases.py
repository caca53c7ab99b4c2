"""Attentions for the Triton kernels: inputs in shuffled pages, the answer in fp64, and what plain PyTorch errs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvpass.ir import Attention, Read, Step
from kvpass.kernels.reference import attention, visible
from kvpass.kernels.text import parse
from kvpass.lowering.triton import Strides, load, source
from kvpass.lowering.triton_config import Config
from tests.lowering.cases import scattered

CPU = torch.device("cpu")
ULPS = 4  # of the largest value: below that nothing is told apart
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCORES = {
    "plain": "score",
    "cap": "20*tanh(score/20)",
    "alibi": "score - 2**(-(h + 1)/2) * (i - j)",
    "alibi read": "score + slopes(b, h, i, j) * (j - i)",
    "bias": "score + bias(b, h, i, j)",
    "batch": "score * weight(b, h, i, j) + weight(b, h, i, j)**2",
    "steps": "score + Piecewise((1.5, i - j < 7), (-0.25*floor((i - j)/8), True))",
    "gaussian": "score + exp(-Abs(i - j)/5)",
}
MASKS = {
    "causal": "j <= i",
    "window": "(j <= i) & (j > i - 70)",
    "chunks": "(j <= i) & Eq(floor(j/48), floor(i/48))",
    "sinks": "(j < 4) & (j <= i) | (j <= i) & (j > i - 40)",
    "padding": "(j <= i) & Ne(pad(b, j), 0)",
    "strided": "(j <= i) & Eq(Mod(i - j, 3), 0)",
    "documents": "(j <= i) & Eq(document(b, j), document(b, i))",
    "by head": "(j <= i) & (j >= i - 9*h)",
    "none": "True",
    "nothing": "False",
}
READS = {
    "slopes": Read("slopes", torch.float32, "h"),
    "bias": Read("bias", torch.float16, "hij"),
    "weight": Read("weight", torch.bfloat16, "bj"),
    "pad": Read("pad", torch.bool, ""),
    "document": Read("document", torch.int64, ""),
    "sink": Read("sink", torch.float32, "h"),
}


@dataclass(frozen=True)
class Case:
    """One launch. `start` rows are cached and `new` ones follow; sizes as in `Attention`."""

    step: Step = Step.DECODE
    dtype: str = "fp32"
    sizes: tuple[int, int] = (64, 64)
    group: int = 3
    kv_heads: int = 2
    new: int = 1
    start: int = 65
    page: int = 16
    batch: int = 2
    score: str = "plain"
    mask: str = "causal"
    sink: bool = False
    empty_is_nan: bool = False
    by_row: bool = False
    two_tables: bool = False
    dense: str = ""
    """Which of ``keys values`` are in one table instead of in pages."""
    config: Config | None = None

    def spec(self, dtype: torch.dtype) -> Attention:
        head, value = self.sizes
        found = parse(
            f"attention heads={self.group * self.kv_heads} kv_heads={self.kv_heads} head_size={head} "
            f"value_size={value} dtype=float32 scale={head**-0.5}\n"
            f"  score = {SCORES[self.score]}\n  support = {MASKS[self.mask]}"
        )
        words = f"{found.score} {found.support}" + " sink(" * self.sink
        reads = tuple(read for name, read in READS.items() if f"{name}(" in words)
        sink = "sink" if self.sink else None
        page = None if self.dense == "keys values" else self.page
        return replace(
            found, page_size=page, dtype=dtype, step=self.step, reads=reads, sink=sink, empty_is_nan=self.empty_is_nan
        )

    def __str__(self) -> str:
        return " ".join(
            f"{k}={getattr(self, k)}" for k, f in self.__dataclass_fields__.items() if getattr(self, k) != f.default
        )


@dataclass(frozen=True)
class Data:
    """Dense operands in fp64 that the dtype holds exactly, and what the spec reads, by name."""

    query: Tensor
    key: Tensor
    value: Tensor
    loads: dict[str, Tensor]


def data(case: Case) -> Data:
    torch.manual_seed(case.start + 7 * case.new)
    heads, rows, (head, value) = case.group * case.kv_heads, case.start + case.new, case.sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(DTYPES[case.dtype]).double()

    pad = torch.rand(case.batch, rows) > 0.3
    pad[0, : rows // 2] = False  # the first rows of the first sequence see no key
    loads = {
        "slopes": torch.rand(heads),
        "bias": torch.randn(heads, case.new, rows).half(),
        "weight": torch.rand(case.batch, rows).bfloat16(),
        "pad": pad,
        "document": (torch.rand(case.batch, rows) > 0.9).cumsum(1),
        "sink": torch.randn(heads),
    }
    return Data(
        normal(case.batch, heads, case.new, head),
        normal(case.batch, case.kv_heads, rows, head),
        normal(case.batch, case.kv_heads, rows, value),
        {read.name: loads[read.name] for read in case.spec(torch.float64).reads},
    )


def reference(case: Case, of: Data, dtype: torch.dtype) -> Tensor:
    """The definition, in some dtype."""
    spec = case.spec(dtype)
    loads = {read.name: _spread(read.axes, of.loads[read.name]) for read in spec.reads if read.axes}
    if dtype is torch.float64:
        loads = {name: load.double() for name, load in loads.items()}
    leaves = {name: load for name, load in of.loads.items() if name not in loads}
    rows = case.start + case.new
    mask = visible(spec.support, CPU, spec.heads, case.start, rows, tuple(leaves), tuple(leaves.values()))
    operands = (x.to(dtype) for x in (of.query, of.key, of.value))
    return attention(spec, *operands, mask, case.start, tuple(loads), tuple(loads.values()))


def _spread(axes: str, load: Tensor) -> Tensor:
    """With the axes of a score, ``[B, H, N, S]``."""
    for axis, letter in enumerate("bhij"):
        if letter not in axes:
            load = load.unsqueeze(axis)
    return load


def pools(case: Case, of: Data) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys, values and their tables. Pages stand in random order, and what no row fills is NaN."""
    rows = case.start + case.new
    pages = -(-rows // case.page)
    tables = [torch.randperm(case.batch * pages + 1)[1:].view(case.batch, pages).int() for _ in range(2)]
    tables = tables if case.two_tables else tables[:1] * 2
    made: list[Tensor] = []
    used: list[Tensor | None] = []
    for name, dense, table in zip(("keys", "values"), (of.key, of.value), tables, strict=True):
        used.append(None if name in case.dense else table)
        if name in case.dense:  # as a transposed projection leaves them, with rows behind them that are not there
            poisoned = torch.full((case.batch, rows + 3, case.kv_heads, dense.shape[3]), float("nan"))
            poisoned[:, :rows] = dense.transpose(1, 2)
            made.append(poisoned.to(DTYPES[case.dtype]).transpose(1, 2))
            continue
        pool = scattered(dense.to(DTYPES[case.dtype]), table, case.batch * pages + 1, case.page)
        if case.by_row:
            pool = pool.permute(1, 2, 0, 3).flatten(2)
        made.append(pool.contiguous())
    return made[0], made[1], used[0], used[1]


def generated(case: Case, of: Data, change: Callable[[str], str] = str) -> Tensor:
    """What the kernel of the case computes, with a change to its source."""
    dtype = DTYPES[case.dtype]
    spec = case.spec(dtype)
    strides: list[Strides | None] = [None, None]
    if case.by_row:
        strides = [Strides.by_row(case.page, case.kv_heads, size) for size in case.sizes]
    for k, name in enumerate(("keys", "values")):
        if name in case.dense:
            strides[k] = Strides.dense(case.kv_heads * case.sizes[k])
    module = load(change(source(spec, "sm_90", *strides, case.config)))
    # The last axis is dense, the others as a transposed projection leaves them.
    query = of.query.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    reads = tuple(of.loads[read.name] for read in spec.reads)
    out: Tensor = module.attention(query, *pools(case, of), case.start, case.start + case.new, reads)
    return out


def problem(case: Case, change: Callable[[str], str] = str) -> str | None:
    """What is wrong with the kernel of a case: nothing, where it errs at most twice as much as plain PyTorch."""
    of = data(case)
    exact, plain = reference(case, of, torch.float64), reference(case, of, DTYPES[case.dtype]).double()
    got = generated(case, of, change).double()
    if not torch.equal(got.isnan(), exact.isnan()):
        return f"{int((got.isnan() != exact.isnan()).sum())} entries are NaN in one and not in the other"
    floor = ULPS * torch.finfo(DTYPES[case.dtype]).eps * float(exact.nan_to_num().abs().max())
    allowed = max(floor, 2 * float((plain - exact).nan_to_num().abs().max()))
    error = float((got - exact).nan_to_num().abs().max())
    return None if error <= allowed else f"an error of {error:.2e}, where {allowed:.2e} is allowed"


SIZES = ((16, 16), (40, 40), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
SMALL = Config(32, 32, 2, 2, programs=24, least_tiles=1)  # many splits, and blocks that do not hold all queries
LARGE = Config(64, 64, 4, 3, programs=8, least_tiles=1)


def grid(dtype: str) -> Iterator[Case]:
    """One axis at a time around a case, and the pairs that matter: masks and scores against several new rows."""
    base = Case(dtype=dtype)
    one = replace(base, kv_heads=1)
    for sizes in SIZES:
        yield replace(base, sizes=sizes, start=70)
    for group in (1, 5, 8):
        yield replace(base, group=group, new=2)
    for start in (0, 1, 63, 64, 200):
        yield replace(base, start=start)
        yield replace(one, start=start, new=17, config=SMALL)
    for page in (1, 10, 32, 48, 64, 128, 256):
        yield replace(base, page=page, start=150, new=2, by_row=page in (10, 64), two_tables=page in (32, 48, 64))
    yield replace(base, page=16, start=150, two_tables=True, by_row=True)
    for dense in ("keys values", "keys", "values"):
        yield replace(base, dense=dense, start=150, new=2, sizes=(80, 48))
        yield replace(one, dense=dense, step=Step.PREFILL, start=65, new=40, batch=2, mask="padding")
    for mask in MASKS:
        yield replace(base, mask=mask, new=2, start=199, config=SMALL)
        yield replace(one, mask=mask, new=40, start=65, batch=1, config=LARGE, empty_is_nan=mask == "padding")
    for score in SCORES:
        yield replace(base, score=score, start=150, new=2, mask="window", config=SMALL)
    yield replace(base, sink=True, mask="window", start=200, config=SMALL)
    yield replace(base, sink=True, mask="padding", start=30, new=17)
    yield replace(base, sink=True, mask="padding", empty_is_nan=True, score="bias", start=30, new=3, config=SMALL)
    warm = replace(one, step=Step.PREFILL, new=64, start=65, config=LARGE)
    for sizes in SIZES:
        yield replace(warm, sizes=sizes, new=40, start=0, config=None)
    for group in (1, 5, 8):
        yield replace(warm, kv_heads=2, group=group, page=64)
    for start, new in ((0, 1), (0, 64), (1, 17), (64, 65), (200, 2)):
        yield replace(warm, start=start, new=new, config=SMALL)
    for page in (10, 32, 128):
        yield replace(warm, kv_heads=2, page=page, two_tables=page == 32, by_row=page == 10)
    for mask in MASKS:
        yield replace(warm, mask=mask, config=SMALL, sink=mask == "sinks", empty_is_nan=mask == "padding")
    for score in SCORES:
        yield replace(warm, kv_heads=2, score=score, mask="window")


def drawn(dtypes: tuple[str, ...]) -> st.SearchStrategy[Case]:
    """Everything at once."""
    return st.builds(
        Case,
        step=st.sampled_from((Step.DECODE, Step.PREFILL)),
        dtype=st.sampled_from(dtypes),
        sizes=st.sampled_from((*SIZES[:5], (24, 56), (33, 17))),
        group=st.integers(1, 9),
        kv_heads=st.integers(1, 3),
        new=st.integers(1, 40),
        start=st.integers(0, 150),
        page=st.sampled_from((1, 7, 8, 16, 32, 64, 96)),
        batch=st.integers(1, 2),
        score=st.sampled_from(sorted(SCORES)),
        mask=st.sampled_from(sorted(MASKS)),
        sink=st.booleans(),
        empty_is_nan=st.booleans(),
        by_row=st.booleans(),
        two_tables=st.booleans(),
        dense=st.sampled_from(("", "keys", "values", "keys values")),
        config=st.sampled_from((None, SMALL)),
    )
