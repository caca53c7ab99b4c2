"""Whole decode steps beside their peers and beside the machine: one run, interleaved, medians, ratios.

    python examples/bench_steps.py [--model smollm2] [--batch 1] [--llama PYTHON] [--openvino PYTHON] [--static]
                                   [--cold] [--json FILE] [--png FILE]

A step reads the weights and the cached rows once; the limit is a loop of vector loads over as many bytes. Peers run as
processes of their own with the same weights in float32: `--llama` names a Python that has ``llama-cpp-python``,
`--openvino` one that has ``optimum-intel``; `--static` adds transformers' StaticCache with a step compiled by
Inductor, a minute for each length, and `--cold` the first calls of new processes. A peer that is not asked for is
named, a bar that is missed is printed as missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_attention import Bench
from bench_decode import machine, text_ids
from peers import Peer, first_call, float_gguf
from torch import Tensor

import kvpass
from kvpass import demos
from kvpass.demo import dynamic_cache
from kvpass.huggingface import DECODE_KWARGS
from kvpass.progress import waiting

MOST_ROWS = 16384  # of all sequences together, unless lengths are given: prompts of more take minutes for each way
SMALL_PAGES = "read, 4 KiB pages"
IN_A_ROW = 4  # tokens that `generate` makes of a batch in one turn
BARS = {
    "llama.cpp": {128: 1.0, 4096: 1.25},
    "DynamicCache": 2.3,
    "StaticCache": 1.3,
    "OpenVINO": 0.0,
    "limit": 0.85,
    SMALL_PAGES: 0.0,
    "session": 0.0,
    "kvpass": 0.0,
}
PEERS = {"llama_cpp": "llama.cpp", "openvino": "OpenVINO", "static_cache": "StaticCache"}


@dataclass
class Point:
    """Medians at one length, in milliseconds a token; ratios are those of `kvpass.generate`.

    Attributes:
        ms: ``kvpass`` is the transparent loop, of growing ids.
        limit: of a read of all weights and cached rows in huge pages, as kvpass has them; in pages of 4 KiB, as torch
            allocates memory, the read stands beside the ways.
        ready: seconds until a peer could answer, where it compiles.
        tokens_agree: all ways chose the same tokens, the peers' processes aside.
    """

    model: str
    batch: int
    rows: int
    ms: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0
    ready: dict[str, float] = field(default_factory=dict)
    tokens_agree: bool = True

    def checks(self) -> list[tuple[str, float, float]]:
        """What was promised, what was measured and the bar."""
        ours, out = self.ms["generate"], []
        for name, bar in BARS.items():
            if isinstance(bar, dict):
                bar = bar.get(self.rows, 0.0)
            other = self.limit if name == "limit" else self.ms.get(name)
            if other is not None:
                out.append((name, other / ours, bar))
        return out


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def cached_bytes(config: Any, rows: int) -> int:
    """Of keys and values in float32 that a step after so many rows reads; a layer with a window reads that."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    read = sum(min(rows, config.sliding_window) if kind == "sliding_attention" else rows for kind in kinds)
    return int(2 * read * config.num_key_value_heads * config.head_dim * 4)


@torch.no_grad()
def measure(name: str, model: Any, fast: Any, ids: Tensor, steps: int, peers: list[Peer], bench: Bench) -> Point:
    """Steps of every way in turn, after the prompt ``ids`` [B, T]."""
    batch, rows = ids.shape
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    read = (weights + batch * cached_bytes(model.config, rows)) // 4096 * 4096
    limit, small_pages = bench.limit(read, huge_pages=True), bench.limit(read)
    theirs = dynamic_cache(model)
    texts = dict.fromkeys(("session", "kvpass", "DynamicCache"), ids)
    session = kvpass.open(fast, ids, logits_to_keep=1)
    next_of: dict[str, Callable[[], Tensor]] = {
        "kvpass": lambda: fast(texts["kvpass"], **DECODE_KWARGS).logits[:, -1].argmax(-1, keepdim=True),
        "session": lambda: session.extend(texts["session"][:, -1:])[:, -1].argmax(-1, keepdim=True),
        "DynamicCache": lambda: theirs(texts["DynamicCache"])[:, -1].argmax(-1, keepdim=True),
    }
    first = session.logits[:, -1].argmax(-1, keepdim=True)
    for way in texts:
        if way != "session":
            next_of[way]()
        texts[way] = torch.cat([ids, first], 1)
    grown, stream = texts["kvpass"], kvpass.stream(fast, texts["kvpass"][0], steps)  # `generate`, token by token
    tokens = [peer.ask(ids.tolist())[1] for peer in peers]
    names = [PEERS[peer.name] for peer in peers]
    seconds: dict[str, list[float]] = {way: [] for way in (*texts, *names, "read", SMALL_PAGES, "generate")}
    for step in range(steps):
        seconds["read"].append(timed(limit)[0])
        seconds[SMALL_PAGES].append(timed(small_pages)[0])
        if batch == 1:
            taken, token = timed(lambda: next(stream))
            seconds["generate"].append(taken)
            grown = torch.cat([grown, torch.tensor([[token]])], 1)
        elif step % IN_A_ROW == 0:
            taken, grown = timed(lambda: kvpass.generate(fast, texts["kvpass"], IN_A_ROW))
            seconds["generate"].append(taken / IN_A_ROW)
        for way, run in next_of.items():
            taken, new = timed(run)
            seconds[way].append(taken)
            texts[way] = torch.cat([texts[way], new], 1)
        for k, peer in enumerate(peers):
            taken, tokens[k] = peer.ask([[token] for token in tokens[k]])
            seconds[names[k]].append(taken)
            time.sleep(0.05)  # its threads look for work for a while
    point = Point(name, batch, rows)
    point.ready = {PEERS[peer.name]: peer.about["ready_s"] for peer in peers if "ready_s" in peer.about}
    for way, times in seconds.items():
        if times and way != "read":
            point.ms[way] = statistics.median(times) * 1e3
    point.limit = statistics.median(seconds["read"]) * 1e3
    same = all(torch.equal(text, texts["kvpass"]) for text in texts.values())
    point.tokens_agree = same and torch.equal(
        grown[:, : texts["kvpass"].shape[1]], texts["kvpass"][:, : grown.shape[1]]
    )
    return point


@torch.no_grad()
def prefill(model: Any, fast: Any, cache: kvpass.Cache, ids: Tensor, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of a whole prompt: the plain model, and kvpass with nothing cached, compiled as it is from the
    second prompt of a process on.
    """
    seconds: dict[str, list[float]] = {"plain": [], "kvpass": []}
    for rows in (50, 51):
        cache.clear()
        fast(ids[:, :rows].contiguous(), **DECODE_KWARGS)
    kvpass.wait(fast)
    for _ in range(rounds):
        cache.clear()
        for way, call in (("plain", model), ("kvpass", fast)):
            start = time.perf_counter()
            call(ids, **DECODE_KWARGS)
            seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(times) * 1e3 for way, times in seconds.items()}


def say(point: Point) -> None:
    print(f"\n{point.model}, batch {point.batch}, {point.rows} rows: generate {point.ms['generate']:.2f} ms a token")
    for name, ratio, bar in point.checks():
        other = point.limit if name == "limit" else point.ms[name]
        verdict = "" if bar == 0 else "ok" if ratio >= bar else "MISSED"
        shown = f"{ratio:.0%} of the read limit" if name == "limit" else f"{ratio:.2f} x {name}"
        print(f"  {other:8.2f} ms  {shown:32s} {f'(bar {bar:.2f})' if bar else '':12s} {verdict}")
    print(f"  tokens {'agree' if point.tokens_agree else 'DIFFER'}", flush=True)


def draw(points: list[Point], path: Path) -> None:
    """Milliseconds a step over the length, one panel for each model and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((p.model, p.batch) for p in points))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    styles = {
        "generate": "#1f5fa8", "llama.cpp": "#b0452c", "OpenVINO": "#7b4fa3", "StaticCache": "#2f7d4f",
        "DynamicCache": "#6b7280", "limit": "#9aa0a6",
    }  # fmt: skip
    for axis, (name, batch) in zip(axes[0], panels, strict=True):
        mine = [p for p in points if (p.model, p.batch) == (name, batch)]
        for way, colour in styles.items():
            label = {"limit": "read limit", "generate": "kvpass"}.get(way, way)
            pairs = [(p.rows, p.limit if way == "limit" else p.ms.get(way)) for p in mine]
            known = [(rows, ms) for rows, ms in pairs if ms is not None]
            if known:
                axis.plot(
                    *zip(*known, strict=True), color=colour, marker=None if way == "limit" else "o", lw=2,
                    ls="--" if way == "limit" else "-", label=label,
                )  # fmt: skip
        axis.set(xscale="log", xlabel="rows of context", ylabel="ms a step", ylim=(0, None))
        axis.set_xticks([p.rows for p in mine], [str(p.rows) for p in mine])
        axis.minorticks_off()
        axis.set_title(f"{name}, batch {batch}", loc="left", fontsize=10)
        axis.grid(True, color="#e3e5e8", lw=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {text: line for axis in axes[0] for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["smollm2", "gemma3"], default=["smollm2", "gemma3"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rows", type=int, nargs="+", help="default 128, 1,024, 4,096, for SmolLM2 8,192 too")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of each way (default 24)")
    parser.add_argument("--llama", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--openvino", metavar="PYTHON", help="a Python with optimum-intel")
    parser.add_argument("--static", action="store_true", help="StaticCache with a compiled step, too")
    parser.add_argument("--cold", action="store_true", help="first calls of new processes, too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    return parser.parse_args()


def peers_of(name: str, model: Any, args: argparse.Namespace, folder: Path) -> list[tuple[str, str, object]]:
    """Kind, Python and weights of those that can be had."""
    found: list[tuple[str, str, object]] = []
    if args.llama:
        float_gguf(name, folder / "float32.gguf")
        found.append(("llama_cpp", args.llama, folder / "float32.gguf"))
    if args.openvino:
        model.save_pretrained(folder / "model")
        found.append(("openvino", args.openvino, folder / "model"))
    asked = {"llama_cpp": args.llama, "openvino": args.openvino, "static_cache": args.static}
    for kind in asked:
        if not asked[kind]:
            print(f"{name}: {PEERS[kind]} is not measured", flush=True)
    return found


def run(name: str, args: argparse.Namespace, bench: Bench, points: list[Point], prompts: dict[str, Any]) -> None:
    lengths = args.rows or [128, 1024, 4096, *[8192] * (name == "smollm2")]
    with waiting(f"loading {name}"):
        model, tokenizer = demos.load(name)
    cache = kvpass.Cache("4GiB")
    fast = torch.compile(model, backend="kvpass", options={"cache": cache})
    text = text_ids(tokenizer, max(lengths) + 600)
    room = args.steps + 2 * IN_A_ROW
    with tempfile.TemporaryDirectory() as folder:
        with waiting("weights for the peers"):
            others = peers_of(name, model, args, Path(folder))
        for batch in args.batch:
            ids = torch.cat([text[:, 37 * k : 37 * k + max(lengths)] for k in range(batch)])
            with waiting("compiling"), torch.no_grad():
                for rows in (40, 41, 42, 43):
                    fast(ids[:, :rows].contiguous(), **DECODE_KWARGS)
                    kvpass.wait(fast)
            with contextlib.ExitStack() as stack:
                peers = [stack.enter_context(Peer(*peer, max(lengths) + room, batch)) for peer in others]
                for rows in lengths:
                    if args.rows is None and batch * rows > MOST_ROWS:
                        continue
                    cache.clear()
                    with contextlib.ExitStack() as mine:
                        now = list(peers)
                        if args.static:
                            static = Peer("static_cache", sys.executable, name, rows + room, batch)
                            now.append(mine.enter_context(static))
                        prompt = ids[:, :rows].contiguous()
                        point = measure(name, model, fast, prompt, args.steps, now, bench)
                    points.append(point)
                    say(point)
        if 1024 in lengths:
            prompts[name] = prefill(model, fast, cache, text[:, :1024].contiguous())
            ratio = prompts[name]["plain"] / prompts[name]["kvpass"]
            print(f"\n{name}: a prompt of 1,024 rows {prompts[name]['kvpass']:.0f} ms, {ratio:.2f} x the plain model's")


def cold(name: str, points: list[Point]) -> dict[str, dict[str, float]]:
    """First calls of new processes, in seconds: the plain model, kvpass without and with kernels on disk."""
    ids = list(range(100, 140))
    with tempfile.TemporaryDirectory() as folder:
        ways = {"plain": "plain", "kvpass, nothing on disk": "kvpass", "kvpass again": "kvpass"}
        found = {title: first_call(name, way, ids, Path(folder)) for title, way in ways.items()}
    plain, fresh = found["plain"], found["kvpass, nothing on disk"]
    print(f"\n{name}, new processes, seconds after the weights are loaded:")
    for title, at in found.items():
        compiled = f", compiled steps {at['compiled']:.1f}" if "compiled" in at else ""
        ratio = (at["load"] + at["first"]) / (plain["load"] + plain["first"])
        print(f"  {title:24s} first token {at['first']:.1f} ({ratio:.2f} x from the start of the process){compiled}")
    for point in points:
        if point.model == name and "StaticCache" in point.ready:
            theirs = point.ready["StaticCache"]
            share = f"kvpass takes {fresh['compiled'] / theirs:.2f} of it"
            print(f"  StaticCache at {point.rows} rows, batch {point.batch}: {theirs:.0f} to compile, {share}")
    return found


def main() -> int:
    args = parse()
    bench, points, prompts, starts = Bench(0.1), list[Point](), dict[str, Any](), dict[str, Any]()
    print(machine())
    for name in args.model:
        run(name, args, bench, points, prompts)
        if args.cold:
            starts[name] = cold(name, points)
    held = [ratio >= bar for point in points for _, ratio, bar in point.checks() if bar]
    print(f"\n{sum(held)} of {len(held)} bars held")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine(), "points": [asdict(p) for p in points], "prompts": prompts, "cold": starts}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    if args.png:
        draw(points, args.png)
    return 0 if all(point.tokens_agree for point in points) else 1


if __name__ == "__main__":
    sys.exit(main())
