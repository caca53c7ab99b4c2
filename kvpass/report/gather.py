"""From the record of a compilation to a report of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import sympy
import torch
from torch import fx

from kvpass import errors
from kvpass.analysis.facts import Fact, Kind, index
from kvpass.analysis.sweep import Analyzed, source_of, sym
from kvpass.ir import SCORE, Attention, Captured, I, Input, J, Role
from kvpass.kernels.text import text
from kvpass.report.formula import Leaf, Leaves, causality, formula
from kvpass.report.names import Sizes, display_names, growing, leaves, letters, short
from kvpass.report.parts import (
    AttentionReport,
    GraphReport,
    InputReport,
    LatentReport,
    OutputReport,
    Record,
    RefusalReport,
    SlotReport,
    StepReport,
    incremental_of,
)
from kvpass.report.reading import op_name, readings, unrecognised
from kvpass.transforms.latent import weighed
from kvpass.transforms.plan import Plan
from kvpass.transforms.recognise import Recognised, recognise
from kvpass.transforms.rewrite import Incremental

aten = torch.ops.aten
_CONTEXT = "its keys are context: no row of the sequence is among them"
_ROW_LAYOUT = (aten.reshape.default, aten.movedim.int)  # what lays out the rows that were read


def graph_report(record: Record) -> GraphReport:
    """Everything that a report says of one graph."""
    incremental = incremental_of(record)
    if incremental is not None:
        return replace(_rewritten(incremental), compiled=step_reports(record))
    refusal = record.refusal or getattr(record.program, "refusal", None)
    refusals = (refusal_report(refusal),) if refusal is not None else ()
    if record.captured is None:
        return GraphReport(False, refusals)
    captured = record.captured
    return GraphReport(
        False,
        refusals,
        input_reports(captured),
        tensors=len(captured.constants),
        batch=Sizes(captured).text(captured.batch),
    )


def refusal_report(refusal: errors.Refusal) -> RefusalReport:
    return RefusalReport(**refusal.to_dict())


def step_reports(record: Record) -> tuple[StepReport, ...]:
    """The compiled steps that there are by now."""
    steps = getattr(record.program, "steps", None)
    out = []
    for regime, tape, reason in [] if steps is None else steps.describe():
        if tape is None:
            out.append(StepReport(regime, reason=reason))
        else:
            written = dict.fromkeys(str(getattr(host.target, "__name__", host.target)) for host in tape.hosts)
            out.append(StepReport(regime, tape.instructions, tape.functions, tuple(written)))
    return tuple(out)


def _rewritten(incremental: Incremental) -> GraphReport:
    plan, analyzed = incremental.plan, incremental.plan.analyzed
    found, missed = recognise(analyzed)
    outputs = output_reports(analyzed)
    return GraphReport(
        proven=True,
        inputs=input_reports(analyzed.captured, analyzed.taken),
        outputs=outputs,
        attention=attention_reports(incremental, found.values()),
        unrecognised=unrecognised(analyzed, missed),
        readings=readings(analyzed, found, missed),
        slots=slot_reports(incremental),
        tail=_tail(plan),
        hints=(*_own_cache(analyzed), *_unread(incremental)),
        prefixes=_prefixes(incremental),
        tensors=len(analyzed.captured.constants),
        batch=Sizes(analyzed.captured).text(analyzed.captured.batch),
    )


# -- inputs and outputs ---------------------------------------------------------------------------------------------


def _tail(plan: Plan) -> int | str:
    """How many of the last rows are computed in every call."""
    return int(plan.tail) if plan.tail.is_Integer else Sizes(plan.analyzed.captured).text(plan.tail)


def input_reports(captured: Captured, taken: Collection[str] = ()) -> tuple[InputReport, ...]:
    """Every argument that is neither a weight nor a size."""
    nodes = {node.name: node for node in captured.module.graph.nodes if node.op == "placeholder"}
    names, sizes = display_names(captured), Sizes(captured)
    out = []
    for given in captured.of(Role.SEQUENCE, Role.FORM, Role.CONTEXT):
        value = nodes[given.name].meta["val"]
        shape = sizes.shape(sym(size) for size in value.shape)
        form = given.entries.value if given.name in taken and given.entries is not None else _form(given)
        role = _role(captured, given, nodes[given.name])
        out.append(InputReport(names[given.name], role, shape, short(value.dtype), form))
    return tuple(out)


def _role(captured: Captured, given: Input, node: fx.Node) -> str:
    if given.index >= captured.arguments:
        return "rows"
    apart = captured.aligned is not None and given.role is Role.CONTEXT and not node.users
    return "rowwise" if apart else given.role.value


def _form(given: Input) -> str:
    """The closed form of a mask that the caller passes, over ``i`` and ``j``."""
    if given.form is None:
        return ""
    return formula(given.form.xreplace({index(0): I, index(1): J}))


def output_reports(analyzed: Analyzed) -> tuple[OutputReport, ...]:
    sizes, known = Sizes(analyzed.captured), leaves(analyzed)
    out = []
    for node in analyzed.outputs:
        if isinstance(node, fx.Node) and node in analyzed.steps:
            fact = analyzed.fact(node)
            valid = formula(fact.valid.xreplace(letters(fact)), known)
            out.append(OutputReport(node.name, sizes.shape(fact.shape()), short(fact.dtype), _rows(fact), valid))
    return tuple(out)


def _rows(fact: Fact) -> str:
    if growing(fact):
        return "all"
    seq = [atom for atom in fact.atoms if atom.kind is Kind.SEQ]
    return f"last {seq[0].size}" if seq else "none"


# -- attention and slots --------------------------------------------------------------------------------------------


def lowerings(incremental: Incremental) -> dict[str, str]:
    """By the captured node that holds an attention's result, what computes it in the incremental graph."""
    out: dict[str, str] = {}
    for node in incremental.module.graph.nodes:
        static = getattr(node.target, "static", None)
        if static and isinstance(static[0], Attention):
            name, origin = str(getattr(node.target, "lowering", "reference")), incremental.origin.get(node.name, "")
            out[origin] = f"{out[origin]}, over latents {name}" if origin in out else name
    return out


def kernels_of(incremental: Incremental) -> dict[str, str]:
    """By the name of what computes them, the text of each distinct attention: its source, or what is to be computed."""
    out = {}
    for node in incremental.module.graph.nodes:
        static = getattr(node.target, "static", None)
        if static and isinstance(static[0], Attention):
            source = getattr(node.target, "source", None)
            said = text(static[0])
            out[str(getattr(node.target, "lowering", said))] = source or f"{said}  (computed by the reference)\n"
    return out


def attention_reports(incremental: Incremental, found: Iterable[Recognised]) -> tuple[AttentionReport, ...]:
    analyzed, lowered = incremental.plan.analyzed, lowerings(incremental)
    known, names = leaves(analyzed), display_names(analyzed.captured)
    return tuple(
        replace(
            _attention(analyzed, match, lowered.get(match.out.name, "as written"), known | loads(match, names)),
            latent=_latent(incremental, match),
        )
        for match in found
    )


def _latent(incremental: Incremental, match: Recognised) -> LatentReport | None:
    chosen = incremental.latents.get(match.out)
    found = chosen or weighed(incremental.plan.analyzed, match)
    if found is None:
        return None
    return LatentReport(
        stored=chosen is not None,
        size=found.rank + found.shared,
        latent_bytes=found.stored.bytes,
        latent_operations=found.stored.operations,
        bytes=found.expanded.bytes,
        operations=found.expanded.operations,
        turn=found.turn,
    )


def _attention(analyzed: Analyzed, match: Recognised, lowering: str, known: Leaves) -> AttentionReport:
    spec = match.spec
    scale, score = rescaled(spec)
    keys = analyzed.fact(match.key.node)
    context = all(keys.atoms[k].kind is not Kind.SEQ for k in match.key.row)
    return AttentionReport(
        mask=formula(spec.support, known),
        proof=_CONTEXT if context else causality(spec.support, known),
        score=formula(score, known) + (", beside a sink of each head" if spec.sink else ""),
        lowering=lowering,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_size=spec.head_size,
        value_size=spec.value_size,
        dtype=short(spec.dtype),
        scale=scale,
        node=match.out.name,
        source=source_of(match.out),
    )


def rescaled(spec: Attention) -> tuple[float, sympy.Expr]:
    """A constant factor of the product belongs to the scale: ``0.35 * score + bias`` is ``score + bias``."""
    for term in sympy.Add.make_args(spec.score):
        factor, rest = term.as_coeff_Mul()
        if rest == SCORE:
            return spec.scale * float(factor), spec.score - term + SCORE
    return spec.scale, spec.score


def loads(match: Recognised, names: Mapping[str, str]) -> dict[str, Leaf]:
    """What the score of an attention reads, with the indices that matter."""
    return {
        load.name: Leaf(names.get(load.node.name, load.node.name), letters=tuple(dict.fromkeys(load.axes)))
        for load in match.loads
        if load.axes is not None
    }


def slot_reports(incremental: Incremental) -> tuple[SlotReport, ...]:
    """The stored values. One counts as an output only where nothing but the caller reads all its rows."""
    serving = _serving(incremental)
    return tuple(
        SlotReport(
            slot.name,
            slot.shape,
            short(slot.dtype),
            slot.bytes_per_row,
            slot.is_output and f"pool_{k}" not in serving,
            source_of(slot.node),
        )
        for k, slot in enumerate(incremental.plan.slots)
    )


def _serving(incremental: Incremental) -> set[str]:
    """The pools whose rows some op of the graph reads, beside the output."""
    pools: dict[fx.Node, str] = {}
    out = set()
    for node in incremental.module.graph.nodes:
        if node.op == "placeholder" and node.name.startswith("pool_"):
            pools[node] = node.name
        held = next((pools[n] for n in node.all_input_nodes if n in pools), "")
        if held and (op_name(node) in ("append", "read") or node.target in _ROW_LAYOUT):
            pools[node] = held
        elif held and node.op != "output":
            out.add(held)
    return out


def _prefixes(incremental: Incremental) -> tuple[str, ...]:
    """Where the prefixes end that other rows depend on, though some of their rows come later."""
    names = display_names(incremental.plan.analyzed.captured)
    return tuple(names[p.input] + (f" + {p.offset}" if p.offset else "") for p in incremental.plan.ahead)


def _own_cache(analyzed: Analyzed) -> tuple[str, ...]:
    """A model that returns its own cache has outputs ``[B, heads, S, D]`` for keys and values beside the logits."""
    outputs = [analyzed.fact(n) for n in analyzed.outputs if isinstance(n, fx.Node) and n in analyzed.steps]
    tables = [f for f in outputs if len(f.dims) == 4 and growing(f) and growing(f)[0] in f.flat(2)]
    if len(tables) < 2 or len(tables) == len(outputs):
        return ()
    return (
        f"{len(tables)} of {len(outputs)} outputs look like the model's own cache of keys and values; "
        "pass use_cache=False to save the copies",
    )


def _unread(incremental: Incremental) -> tuple[str, ...]:
    """Slots whose pool the graph never touches: somebody asked for their rows in front of the cut."""
    slots = incremental.plan.slots
    used = {node.name for node in incremental.module.graph.nodes if node.op == "placeholder" and node.users}
    idle = [slot.name for k, slot in enumerate(slots) if f"pool_{k}" not in used]
    if not idle:
        return ()
    which = ", ".join(idle[:3]) + (", .." if len(idle) > 3 else "")
    which = ", ".join(idle[:3]) + (", .." if len(idle) > 3 else "")
    return (
        f"{len(idle)} of {len(slots)} slots are never read ({which}): what they should hold "
        "is computed again for all rows in every call; the answer is the same, the time is not",
    )
