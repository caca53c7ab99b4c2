"""What the compiler itself costs over the number of layers: CPU time of each pass, and memory beside the graph's.

    python examples/bench_pass.py --model llama --layers 1 6 30 60 120 --json out/pass.json

Timed are Dynamo's capture, tracing to ATen, and the passes of `kvpass.frontend.pipeline`; not the compilation of
kernels. Every run of the passes has a fresh copy of the captured graph, and the figures are medians; capture and
tracing are timed once. Afterwards come the checks that the project holds itself to; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from kvpass.analysis.sweep import Analyzed, analyze
from kvpass.demo import progress, waiting
from kvpass.frontend.capture import capture, copied
from kvpass.frontend.export import traced, value_of
from kvpass.huggingface import import_transformers
from kvpass.ir import Captured
from kvpass.lowering import ops
from kvpass.lowering.choose import lower, prepare
from kvpass.transforms.normalise import normalise
from kvpass.transforms.plan import plan
from kvpass.transforms.recognise import recognise
from kvpass.transforms.rewrite import rewrite

LAYERS = (1, 6, 30, 60, 120)
STAGES = ("normalise", "analyze", "plan", "recognise", "rewrite")


@dataclass(frozen=True)
class Point:
    """Medians at one number of layers.

    Attributes:
        nodes, kinds: of the normalised graph, and how many of its steps differ.
        dynamo, tracing: CPU seconds of Dynamo until it has a graph, and of that graph to ATen.
        seconds: of each pass, in CPU time.
        graph, peak: bytes that the graph holds which PyTorch traces, and that the passes need at most. (Not counted are
            tracers and graphs of Dynamo's that it still refers to, six times as much. Where layers are traced once,
            their values are one object: the graph that the passes get holds a quarter.)
    """

    layers: int
    nodes: int
    kinds: int
    dynamo: float
    tracing: float
    seconds: dict[str, float]
    graph: int
    peak: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def ours(self) -> float:
        return self.tracing + self.total


@dataclass(frozen=True)
class Check:
    """A promise, what was measured, and whether it holds."""

    promise: str
    measured: str
    holds: bool


# -- models ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer that makes its own mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (w(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Plain(nn.Module):
    """A decoder as one writes it by hand."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(64, 32), nn.Embedding(128, 32)
        self.blocks = nn.Sequential(*(Block(32, 4) for _ in range(layers)))
        self.out = nn.Linear(32, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.out(self.blocks(x))


def llama(layers: int) -> Callable[[Tensor], Tensor]:
    """transformers' Llama with the heads of SmolLM2-135M, 9 over 3, and few channels."""
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=36, intermediate_size=48, head_dim=4, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return lambda ids: model(ids, use_cache=False).logits


MODELS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {"llama": llama, "plain": lambda n: Plain(n).eval()}


@dataclass(frozen=True)
class Traced:
    """A captured graph, what it took, in CPU seconds, and the bytes of the one that PyTorch makes of the whole."""

    captured: Captured
    dynamo: float
    tracing: float
    graph: int


def traced_of(model: Callable[[Tensor], Tensor]) -> Traced:
    """The graph of a model of ids [B, S], both symbolic."""
    found: list[Traced] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        dynamo = time.process_time() - begun
        captured = capture(gm, inputs)
        tracing = time.process_time() - begun - dynamo
        whole = traced(gm, [value_of(n) for n in gm.graph.find_nodes(op="placeholder")])
        found.append(Traced(captured, dynamo, tracing, held(copied(whole))))
        return gm.forward

    ids = torch.randint(0, 64, (3, 11))
    for axis in range(2):
        torch._dynamo.maybe_mark_dynamic(ids, axis)
    torch._dynamo.reset()
    begun = time.process_time()
    with torch.no_grad():
        torch.compile(model, backend=backend)(ids)
    torch._dynamo.reset()
    (one,) = found
    return one


# -- what they cost -------------------------------------------------------------------------------------------------


def passes(captured: Captured) -> tuple[dict[str, float], Analyzed]:
    """CPU seconds of each pass, in the order of the pipeline."""
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[..., Any], *args: Any) -> Any:
        before = time.process_time()
        made = function(*args)
        seconds[stage] = time.process_time() - before
        return made

    timed("normalise", normalise, captured)
    analyzed = timed("analyze", analyze, captured)
    cut = timed("plan", plan, analyzed)
    attentions, _ = timed("recognise", recognise, analyzed)
    prepare((match.spec, node.meta["val"].device) for node, match in attentions.items())
    timed("rewrite", rewrite, cut, ops, attentions, lower)
    return seconds, analyzed


def held(module: fx.GraphModule) -> int:
    """Bytes of Python objects that the nodes of a graph hold: arguments, values, names and where they come from.

    Neither weights are counted nor what all graphs share.
    """
    shared = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.MethodType)
    apart = (*shared, torch._ops.OpOverload, torch._ops.OpOverloadPacket, ShapeEnv, FakeTensorMode, nn.Module)
    seen: set[int] = set()
    todo, total = [list(module.graph.nodes)], 0
    while todo:
        here: Any = todo.pop()
        if id(here) not in seen and not isinstance(here, apart):
            seen.add(id(here))
            total += sys.getsizeof(here)
            todo += gc.get_referents(here)
    return total


def peak_of(captured: Captured) -> int:
    """Bytes that the passes need at most, beside the graph that they get."""
    tracemalloc.start()
    passes(captured)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(model: Callable[[Tensor], Tensor], layers: int, repeats: int) -> Point:
    found = traced_of(model)
    captured = lambda: replace(found.captured, module=copied(found.captured.module))  # noqa: E731
    runs = []
    for _ in range(repeats):
        copy = captured()
        gc.collect()  # what the capture left behind is not the passes' to sweep up
        runs.append(passes(copy))
    analyzed = runs[-1][1]
    seconds = {stage: statistics.median(run[stage] for run, _ in runs) for stage in STAGES}
    nodes, kinds = len(analyzed.captured.module.graph.nodes), len(set(analyzed.kinds.values()))
    return Point(layers, nodes, kinds, found.dynamo, found.tracing, seconds, found.graph, peak_of(captured()))


def checks_of(points: list[Point]) -> list[Check]:
    by_layers = {point.layers: point for point in points}
    checks = []
    if 30 in by_layers:
        total = by_layers[30].total
        checks.append(Check("30 layers take at most 2 s", f"{total:.2f} s", total <= 2))
    if {30, 120} <= set(by_layers):
        each = [by_layers[n].total / n * 1e3 for n in (30, 120)]
        checks.append(
            Check("a layer of 120 takes at most 1.5 times one of 30", "{1:.1f} ms against {0:.1f}".format(*each),
                  each[1] <= 1.5 * each[0])
        )  # fmt: skip
        grown = (by_layers[120].ours - by_layers[30].ours) / 90 * 1e3
        checks.append(Check("a layer more takes at most 50 ms, tracing included", f"{grown:.1f} ms", grown <= 50))
    worst = max(points, key=lambda point: point.peak / point.graph)
    ratio = worst.peak / worst.graph
    checks.append(Check("memory of at most twice the captured graph's", f"{ratio:.2f} times", ratio <= 2))
    deep = [point.kinds for point in points if point.layers > 1]
    checks.append(Check("more layers, no more kinds of steps", ", ".join(map(str, deep)), len(set(deep)) <= 1))
    return checks


HEADING = f"""\
| layers | nodes | kinds | dynamo | tracing | {" | ".join(STAGES)} | passes | a layer | memory |
| ---: | ---: | ---: | ---: | ---: | {" | ".join("---:" for _ in STAGES)} | ---: | ---: | ---: |"""


def line(point: Point) -> str:
    """A point as a line of a Markdown table under `HEADING`: milliseconds, and memory in parts of the graph's."""
    times = " | ".join(f"{x * 1e3:.0f}" for x in (point.dynamo, point.tracing, *point.seconds.values()))
    total, each = point.total * 1e3, point.total / point.layers * 1e3
    memory = f"{point.peak / 1e6:.1f} of {point.graph / 1e6:.1f} MB"
    return f"| {point.layers} | {point.nodes} | {point.kinds} | {times} | {total:.0f} | {each:.1f} | {memory} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), metavar="N")
    parser.add_argument("--repeats", type=int, default=5, help="runs of the passes for each median (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(1)
    with waiting("warming up"):
        measure(MODELS[args.model](1), 1, 1)  # imports, and what libraries cache by process
    print(f"{args.model}, milliseconds of CPU time; {platform.machine()}, torch {torch.__version__}\n\n{HEADING}")
    points = []
    with progress() as bar:
        task = bar.add_task("layers", total=sum(args.layers))
        for layers in sorted(args.layers):
            points.append(measure(MODELS[args.model](layers), layers, args.repeats))
            bar.update(task, advance=layers)
            print(line(points[-1]), flush=True)
    checks = checks_of(points)
    print("\n" + "\n".join(f"{'ok  ' if c.holds else 'FAIL'} {c.promise}: {c.measured}" for c in checks))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"model": args.model, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
        entries = {"points": [asdict(p) for p in points], "checks": [asdict(c) for c in checks]}
        args.json.write_text(json.dumps(data | entries, indent=2) + "\n")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
