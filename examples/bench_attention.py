"""Generated attention on a CPU beside PyTorch's, and beside the machine: one run, interleaved, medians, ratios.

    python examples/bench_attention.py [--quick] [--json FILE] [--png FILE]

Every contender has keys and values of its own, so that none finds what another one has just read in a cache. The limit
is a loop of vector loads over as many bytes. A bar that is missed is printed as missed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpass.cache.pools import Pool, SlotSpec
from kvpass.ir import Attention, Layout
from kvpass.kernels.text import parse
from kvpass.lowering import build, cpu
from kvpass.lowering.cpu import Rows
from kvpass.runtime import huge

READ = r"""
#include <cstdint>
typedef float V __attribute__((vector_size(32)));
// Sums all vectors, each of them PRODUCTS times, multiplied.
template <int PRODUCTS>
float pass(const float* from, int64_t count, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    const V* at = reinterpret_cast<const V*>(from + count / threads * part);
    V sum[8] = {}, factor[8];
    for (int x = 0; x < 8; ++x) factor[x] = V{} + float(x + threads);
    for (int64_t k = 0; k + 4 <= count / threads / 8; k += 4)
      for (int x = 0; x < 4; ++x) {
        V v = at[k + x];
        if (PRODUCTS == 0) sum[x] += v;
#pragma GCC unroll 8
        for (int p = 0; p < PRODUCTS; ++p) sum[(x * PRODUCTS + p) % 8] += v * factor[p];
      }
    for (int x = 0; x < 8; ++x) total += sum[x][0] + sum[x][7];
  }
  return total;
}
#define PASS(n) \
  extern "C" __attribute__((visibility("default"))) float pass_##n(const float* from, int64_t count, int threads) { \
    return pass<n>(from, count, threads); \
  }
PASS(0) PASS(1) PASS(4) PASS(8)
"""
POOL = Layout(before=1, outside=True, factor=1)
PAGE = 64


@dataclass(frozen=True)
class Row:
    """One comparison. Ratios are times: of SDPA over ours, of the read limit over ours.

    Attributes:
        of_products: the time of a loop that reads as many bytes, in order, and multiplies as often, over ours. It has
            no softmax, no sums across vectors and no pages: where it is far from the read limit, so is any attention.
    """

    name: str
    threads: int
    ours_us: float
    against: str
    ratio: float
    bar: float
    limit_gb_s: float = 0.0
    of_limit: float = 0.0
    of_products: float = 0.0
    limit_bar: float = 0.0

    @property
    def held(self) -> bool:
        return self.ratio >= self.bar and self.of_limit >= self.limit_bar


def spec(heads: int, kv_heads: int, size: int, dtype: str, support: str = "j <= i", score: str = "score") -> Attention:
    return parse(
        f"attention heads={heads} kv_heads={kv_heads} head_size={size} value_size={size} dtype={dtype} "
        f"scale={size**-0.5!r}\nread slope: float32[h]\nread bias: float32[h, i, j]\n"
        f"score = {score}\nsupport = {support}"
    )


def plain(given: Attention) -> Attention:
    """Without the reads that its score does not name."""
    return replace(given, reads=tuple(r for r in given.reads if r.name in str(given.score)))


def _pool(rows: Tensor) -> Tensor:
    """`[K, pages, PAGE, D]`, in memory as the cache has it."""
    heads, pages, _, size = rows.shape
    pool = Pool(SlotSpec(bytes(32), (heads,), (size,), rows.dtype, rows.device, "rows"), PAGE)
    pool.grow(pages, pages)
    pool.tensor.copy_(rows)
    return pool.tensor


def medians(contenders: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median times, in seconds; the contenders take turns."""
    for run in contenders:
        run()
    times: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, taken in zip(contenders, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


class Bench:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        library = ctypes.CDLL(str(build.shared_library(READ)))
        self._passes = {products: library[f"pass_{products}"] for products in (0, 1, 4, 8)}
        for loop in self._passes.values():
            loop.argtypes, loop.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_float
        self.rows: list[Row] = []

    def limit(self, size: int, products: int = 0, huge_pages: bool = False) -> Callable[[], object]:
        """Reads ``size`` bytes, as torch allocates them or in huge pages; each 32 of them are multiplied by
        ``products`` vectors.
        """
        memory, loop = torch.ones(size // 4), self._passes[products]
        if huge_pages:
            huge.settle([memory])
        return lambda: loop(memory.data_ptr(), memory.numel(), torch.get_num_threads())

    def add(self, row: Row) -> None:
        self.rows.append(row)
        limit = f"{row.of_limit:4.0%} of {row.limit_gb_s:4.1f} GB/s (bar {row.limit_bar:.0%})" if row.limit_gb_s else ""
        limit += f", {row.of_products:4.0%} with products" if row.limit_gb_s else ""
        print(
            f"{row.name:44s} {row.threads} thr {row.ours_us:9.0f} us  {row.ratio:6.2f} x {row.against} "
            f"(bar {row.bar:.2f})  {limit:53s} {'ok' if row.held else 'MISSED'}",
            flush=True,
        )

    def decode(self, heads: int, kv_heads: int, size: int, dtype: str, keys: int, bar: float, limit_bar: float) -> None:
        """One new row over pages in random order, against SDPA on dense keys, and against our own dense run."""
        given = plain(spec(heads, kv_heads, size, dtype))
        kernel, threads = cpu.kernel(given), torch.get_num_threads()
        query = torch.randn(1, 1, heads, size).to(given.dtype).transpose(1, 2)
        k, v = ([torch.randn(1, kv_heads, keys, size).to(given.dtype) for _ in range(3)] for _ in range(2))
        table = torch.randperm(keys // PAGE).int().view(1, -1)
        pools = [_pool(x.view(kv_heads, -1, PAGE, size)) for x in (k[1], v[1])]
        paged = [Rows.paged(POOL, pool, table, -1) for pool in pools]
        size_read = 2 * k[0].numel() * k[0].element_size()
        products = heads // kv_heads * (4 // given.dtype.itemsize)
        limit, multiplied, dense, ours, sdpa = medians(
            [
                self.limit(size_read),
                self.limit(size_read, products),
                lambda: kernel(query, Rows.dense(k[0]), Rows.dense(v[0]), keys - 1, keys),
                lambda: kernel(query, paged[0], paged[1], keys - 1, keys),
                lambda: F.scaled_dot_product_attention(query, k[2], v[2], enable_gqa=heads > kv_heads),
            ],
            self.seconds,
        )
        name = f"decode {heads}/{kv_heads} D {size} {dtype} {keys} keys"
        speed = size_read / limit / 1e9
        self.add(
            Row(name, threads, ours * 1e6, "SDPA", sdpa / ours, bar, speed, limit / ours, multiplied / ours, limit_bar)
        )
        self.add(Row(f"  pages against dense, {keys} keys", threads, ours * 1e6, "dense", dense / ours, 1 / 1.08))

    def window(self) -> None:
        given = plain(spec(32, 8, 128, "float32", "(j <= i) & (j > i - 1024)"))
        kernel = cpu.kernel(given)
        query = torch.randn(1, 1, 32, 128).transpose(1, 2)
        long = [torch.randn(1, 8, 32768, 128) for _ in range(2)]
        short = [torch.randn(1, 8, 1024, 128) for _ in range(2)]
        ours, only = medians(
            [
                lambda: kernel(query, Rows.dense(long[0]), Rows.dense(long[1]), 32767, 32768),
                lambda: kernel(query, Rows.dense(short[0]), Rows.dense(short[1]), 1023, 1024),
            ],
            self.seconds,
        )
        name = "window of 1,024 at 32,768 keys"
        self.add(Row(name, torch.get_num_threads(), ours * 1e6, "1,024 keys", only / ours, 1 / 1.2))

    def prefill(self, cached: int, dtype: str) -> None:
        given = plain(spec(32, 8, 128, dtype))
        kernel, rows = cpu.kernel(given), cached + 512
        query = torch.randn(1, 512, 32, 128).to(given.dtype).transpose(1, 2)
        k, v = (torch.randn(1, 8, rows, 128).to(given.dtype) for _ in range(2))
        mask = torch.ones(512, rows, dtype=torch.bool).tril(cached)

        def sdpa() -> Tensor:
            if cached == 0:
                return F.scaled_dot_product_attention(query, k, v, is_causal=True, enable_gqa=True)
            return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)

        ours, theirs = medians(
            [lambda: kernel(query, Rows.dense(k), Rows.dense(v), cached, rows), sdpa], self.seconds * 2
        )
        flops = 4 * 32 * 128 * 512 * (cached + 256.5)
        name = f"prefill 512 on {cached} {dtype} ({flops / ours / 1e9:.0f} GFLOP/s)"
        self.add(Row(name, torch.get_num_threads(), ours * 1e6, "SDPA", theirs / ours, 1.0))

    def scores(self) -> None:
        keys = 8192
        query = torch.randn(1, 1, 32, 128).transpose(1, 2)
        kinds = {
            "plain": ("score", []),
            "ALiBi": ("score + slope(b, h, i, j)*(j - i)", [torch.randn(32)]),
            "soft cap": ("30*tanh(score/30)", []),
            "relative bias": ("score + bias(b, h, i, j)", [torch.randn(32, 1, keys)]),
        }
        runs: list[Callable[[], object]] = []
        for score, reads in kinds.values():
            kernel = cpu.kernel(plain(spec(32, 8, 128, "float32", score=score)))
            k, v = (torch.randn(1, 8, keys, 128) for _ in range(2))
            runs.append(
                lambda kernel=kernel, k=k, v=v, reads=reads: kernel(  # type: ignore[misc]
                    query, Rows.dense(k), Rows.dense(v), keys - 1, keys, reads
                )
            )
        base, *others = medians(runs, self.seconds)
        for name, taken in zip(list(kinds)[1:], others, strict=True):
            self.add(Row(name, torch.get_num_threads(), taken * 1e6, "plain", base / taken, 1 / 1.3))

    def overhead(self) -> None:
        """A call over one key: what is left is not work."""
        kernel = cpu.kernel(plain(spec(9, 3, 64, "float32")))
        query, k = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 1, 64)

        def hundred() -> None:
            for _ in range(100):
                kernel(query, Rows.dense(k), Rows.dense(k), 0, 1)

        (taken,) = medians([hundred], self.seconds)
        self.add(Row("one call over one key", torch.get_num_threads(), taken * 1e4, "25 us", 25e-4 / taken, 1.0))


def draw(rows: list[Row], path: Path) -> None:
    """Share of the read limit by number of keys, and the ratio to SDPA."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    kinds = sorted({row.name.rsplit(" ", 2)[0] for row in rows if row.limit_gb_s})
    for color, kind in enumerate(kinds):
        for threads, line in ((1, "-"), (2, "--")):
            mine = [row for row in rows if row.name.startswith(kind) and row.limit_gb_s and row.threads == threads]
            keys = [int(row.name.split()[-2]) for row in mine]
            label = f"{kind.removeprefix('decode ')}, {threads} thr"
            left.plot(keys, [row.of_limit for row in mine], line, marker="o", color=f"C{color}", label=label)
            right.plot(keys, [row.ratio for row in mine], line, marker="o", color=f"C{color}", label=label)
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set_title("decode: share of the read limit")
    right.set_title("decode: times faster than SDPA")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("keys")
        axis.grid(alpha=0.3)
    left.set_ylim(0, 1.3)
    left.legend(fontsize=7, handlelength=4)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, and fewer keys")
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    parser.add_argument("--png", type=Path, help="draw them")
    options = parser.parse_args()
    bench = Bench(0.3 if options.quick else 3.0)
    most = torch.get_num_threads()
    for threads in sorted({1, min(2, most)}):
        torch.set_num_threads(threads)
        bench.overhead()
        for keys in (2048, 8192) if options.quick else (2048, 8192, 32768):
            bench.decode(32, 8, 128, "float32", keys, 4.0, 0.80)
            bench.decode(32, 8, 128, "bfloat16", keys, 25.0, 0.75)
            bench.decode(8, 8, 64, "float32", keys, 1.3, 0.0)
        bench.window()
        bench.scores()
        for cached in (0, 4096):
            bench.prefill(cached, "float32")
    print(f"{sum(row.held for row in bench.rows)} of {len(bench.rows)} bars held")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in bench.rows], indent=1))
    if options.png:
        draw(bench.rows, options.png)


if __name__ == "__main__":
    main()
