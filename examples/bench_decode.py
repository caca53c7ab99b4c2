"""Decode speed of SmolLM2 over the length of the text: without a cache, with DynamicCache, with kvpass.

    python examples/bench_decode.py --json out/bench.json --png docs/bench.png

The three take their steps in turn, so that other load slows all alike; the figures are medians. Afterwards come the
checks that the project holds itself to; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kvpass
from kvpass import demos
from kvpass.demo import Track, difference, dynamic_cache, plain, progress, waiting, warm_up
from kvpass.huggingface import DECODE_KWARGS

LENGTHS = (128, 256, 512, 1024, 2048)
NAMES = {"plain": "no cache", "dynamic": "DynamicCache", "kvpass": "kvpass"}


@dataclass(frozen=True)
class Point:
    """Medians at one length: rows of context, tokens per second of each way, and whether the tokens agreed."""

    rows: int
    rates: dict[str, float]
    equal: bool

    def ratio(self, other: str) -> float:
        return self.rates["kvpass"] / self.rates[other]


@dataclass(frozen=True)
class Check:
    """A promise, what was measured, and whether it holds."""

    promise: str
    measured: str
    holds: bool


def text_ids(tokenizer: Any, rows: int) -> Tensor:
    """``rows`` tokens [1, rows] of English that is at hand: this project's licence, repeated if need be."""
    text = (Path(__file__).resolve().parents[1] / "LICENSE").read_text()
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    return head(ids.repeat(1, rows // ids.shape[1] + 1), rows)


def head(ids: Tensor, rows: int, start: int = 0) -> Tensor:
    """``rows`` ids [1, rows] from ``start`` on, contiguous as a decode loop's ids are."""
    return ids[:, start : start + rows].contiguous()


def measure(model: nn.Module, fast: Callable[..., Any], cache: kvpass.Cache, prompt: Tensor, steps: int) -> Point:
    """Time ``steps`` tokens of each way after ``prompt`` [1, T]; without a cache at most 5, since they take long."""
    cache.clear()
    kwargs = dict(DECODE_KWARGS)
    tracks = {
        "plain": Track("without a cache", plain(model, kwargs)),
        "dynamic": Track("DynamicCache", dynamic_cache(model)),
        "kvpass": Track("kvpass", plain(fast, kwargs)),
    }
    for step in range(steps + 1):  # the first token of each pays for the prompt
        for name, track in tracks.items():
            if name != "plain" or step <= 5:
                track.step(prompt)
    rates = {name: 1 / statistics.median(track.seconds[1:]) for name, track in tracks.items()}
    short = len(tracks["plain"].tokens)
    heads = [Track(track.name, track.forward, track.tokens[:short]) for track in tracks.values()]
    equal = difference(heads) is None and tracks["dynamic"].tokens == tracks["kvpass"].tokens
    return Point(prompt.shape[1], rates, equal)


def bytes_per_row(model: Any, ids: Tensor) -> Check:
    config = model.config
    least = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    found = kvpass.explain(model, ids, **DECODE_KWARGS).bytes_per_row
    return Check(
        "bytes per token = 2 x layers x kv heads x head size x element size", f"{found} against {least}", found == least
    )


def shared_prefix(fast: Callable[..., Any], cache: kvpass.Cache, ids: Tensor) -> Check:
    """32 prompts that share 512 rows and go on differently for 5 to 12 rows."""
    cache.clear()
    before = cache.stats().rows_computed
    own = [5 + number % 8 for number in range(32)]
    for number, rows in enumerate(own):
        tail = torch.arange(rows).unsqueeze(0) + 100 * (number + 1)
        fast(torch.cat([head(ids, 512), tail], dim=1), **DECODE_KWARGS)
    computed, least = cache.stats().rows_computed - before, 512 + sum(own)
    return Check(
        "32 prompts sharing 512 rows compute 512 + their own", f"{computed} against {least}", computed == least
    )


def flat_memory(fast: Callable[..., Any], cache: kvpass.Cache, ids: Tensor, calls: int) -> Check:
    """Peak resident memory after a tenth of the calls and after all: texts that grow row by row, then a new one."""
    cache.clear()
    peaks = []
    with progress() as bar:
        task = bar.add_task("memory", total=calls)
        for call in range(calls):
            start, rows = call // 50, 20 + call % 50
            fast(head(ids, rows, start), **DECODE_KWARGS)
            bar.update(task, completed=call + 1)
            if call + 1 in (calls // 10, calls):
                peaks.append(peak_bytes())
    growth = peaks[1] / peaks[0] - 1
    told = f"{peaks[0] / 2**20:.0f} MiB after {calls // 10}, {peaks[1] / 2**20:.0f} MiB after {calls}"
    return Check(f"peak memory does not grow over {calls} calls (1 % is noise)", told, growth < 0.01)


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def speed_checks(points: list[Point]) -> list[Check]:
    by_rows = {point.rows: point for point in points}
    unequal = [point.rows for point in points if not point.equal]
    told = f"not at {unequal} rows" if unequal else f"at {len(points)} lengths"
    checks = [Check("the tokens of all three ways are equal", told, not unequal)]
    for rows, other, least in ((512, "plain", 10.0), (128, "dynamic", 1.0), (1024, "dynamic", 1.0)):
        if rows in by_rows:
            ratio = by_rows[rows].ratio(other)
            checks.append(
                Check(f"at {rows} rows at least {least:g} times {NAMES[other]}", f"{ratio:.2f} times", ratio >= least)
            )
    return checks


HEADING = """\
| rows of context | no cache | DynamicCache | kvpass | against no cache | against DynamicCache |
| ---: | ---: | ---: | ---: | ---: | ---: |"""


def line(point: Point) -> str:
    """A point as a line of a Markdown table under `HEADING`."""
    rates = " | ".join(f"{point.rates[name]:.2f}" for name in NAMES)
    return f"| {point.rows} | {rates} | {point.ratio('plain'):.1f} x | {point.ratio('dynamic'):.2f} x |"


def draw(points: list[Point], title: str, path: Path) -> None:
    """Tokens per second over the length, both axes logarithmic, each line named at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    rows = [point.rows for point in points]
    styles = {"plain": ("#b0452c", "s"), "dynamic": ("#6b7280", "^"), "kvpass": ("#1f5fa8", "o")}
    for name, (colour, marker) in styles.items():
        axes.plot(rows, [p.rates[name] for p in points], color=colour, marker=marker, lw=2, ms=5.5, label=NAMES[name])
    for point in points:
        axes.annotate(
            f"{point.ratio('plain'):.0f}x" if point.ratio("plain") >= 10 else f"{point.ratio('plain'):.1f}x",
            (point.rows, point.rates["kvpass"]), xytext=(0, 9), textcoords="offset points",
            ha="center", fontsize=9, color="#1f5fa8",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="rows of context", ylabel="tokens per second", xticks=rows)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.16)
    axes.grid(True, which="major", color="#d9dce1", lw=0.7)
    axes.grid(True, which="minor", axis="y", color="#eceef1", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    axes.set_title(title, loc="left", fontsize=10.5)
    figure.text(0.995, 0.005, "Nx: kvpass against no cache", ha="right", va="bottom", fontsize=8, color="#1f5fa8")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="ROWS")
    parser.add_argument("--steps", type=int, default=24, help="tokens timed with a cache (default 24)")
    parser.add_argument("--calls", type=int, default=1000, help="calls of the memory check (default 1000; 0: none)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    args = parse()
    with waiting("loading"):
        model, tokenizer = demos.load("smollm2")
    ids = text_ids(tokenizer, max(*args.lengths, 600))
    cache = kvpass.Cache(capacity="512MiB")
    fast = torch.compile(model, backend="kvpass", options={"cache": cache})
    with waiting("compiling"):
        warm_up(plain(fast, dict(DECODE_KWARGS)), head(ids, 40))
    print(f"SmolLM2-135M, float32, batch 1, tokens/s; {machine()}\n\n{HEADING}", flush=True)
    points = []
    for rows in sorted(args.lengths):
        with waiting(f"{rows} rows"):
            points.append(measure(model, fast, cache, head(ids, rows), args.steps))
        print(line(points[-1]), flush=True)
    checks = [*speed_checks(points), shared_prefix(fast, cache, ids)]
    if args.calls >= 10:
        checks.append(flat_memory(fast, cache, ids, args.calls))
    checks.append(bytes_per_row(model, head(ids, 40)))
    print("\n" + "\n".join(f"{'ok  ' if c.holds else 'FAIL'} {c.promise}: {c.measured}" for c in checks))
    write(points, checks, args)
    return 0 if all(check.holds for check in checks) else 1


def write(points: list[Point], checks: list[Check], args: argparse.Namespace) -> None:
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine(), "points": [asdict(p) for p in points], "checks": [asdict(c) for c in checks]}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    if args.png:
        draw(points, f"SmolLM2-135M, float32, batch 1, CPU ({os.cpu_count()} cores)", args.png)


if __name__ == "__main__":
    sys.exit(main())
