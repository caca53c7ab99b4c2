"""A compiled program: match, pin, run, commit.

State lives in the cache; a program is the incremental graph and the knowledge of how to call it. A call that cannot be
served from the cache runs the captured model as it was written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from kvpass import errors
from kvpass.analysis.buffers import holds_only
from kvpass.analysis.facts import index
from kvpass.analysis.identity import identities
from kvpass.analysis.sweep import sym
from kvpass.cache import Cache, Lease, SlotSpec, SlotTable
from kvpass.forked import Locked
from kvpass.ir import Captured, Input, Role, is_dense
from kvpass.kernels.reference import evaluate
from kvpass.runtime.keys import Keys
from kvpass.runtime.lent import Lender
from kvpass.runtime.remembered import Remembered, storage_of
from kvpass.runtime.steps import Steps
from kvpass.runtime.weights import Weights
from kvpass.transforms.branch import lazily
from kvpass.transforms.hoist import Hoisted, hoist
from kvpass.transforms.plan import Plan
from kvpass.transforms.rewrite import Incremental

log = logging.getLogger("kvpass")
Outputs = tuple[Any, ...]


@dataclass(frozen=True)
class Bound:
    """An incremental graph with its slots named for one set of weights.

    Attributes:
        dense: outputs that the model itself returns without holes, which a slice of stored rows has.
        masks: inputs whose `Entries` the proof uses: to be looked at in every call.
    """

    incremental: Incremental
    keys: Keys
    weights: Weights
    table: SlotTable
    lenders: Mapping[int, Lender]
    dense: frozenset[int]
    masks: tuple[Input, ...]
    module: fx.GraphModule
    hoisted: Hoisted | None
    remembered: Remembered
    steps: Steps

    def with_rows_of_context(self, given: Sequence[Any]) -> Sequence[Any]:
        """The arguments of a call, and what the context brings for each row."""
        made = self.incremental.plan.analyzed.captured.aligned
        if made is None:
            return given
        return [*given, *self.remembered.get(self.keys.beside(given), lambda: _without_gradients(made, given), given)]

    def run(self, args: Sequence[Any], lease: Lease, context: bytes, rows: Sequence[bytes]) -> Outputs:
        """One call; the outputs are the caller's."""
        ahead: Outputs = ()
        if self.hoisted is not None:
            part = self.hoisted.context
            ahead = self.remembered.get(self.keys.hoisting(args), lambda: _without_gradients(part, args), args)
        given = [*args, *_cache_arguments(lease), *ahead]
        outputs = self.steps.run(given, lease.start, lease.length, lease.batch, self.weights)
        if outputs is None:
            outputs = _without_gradients(self.module, given)
        kept = {storage_of(value) for value in (*lease.pools, *ahead) if isinstance(value, torch.Tensor)}
        owned = list(outputs)
        for k, value in enumerate(outputs):
            if isinstance(value, torch.Tensor) and storage_of(value) in kept:  # read in place
                lender = self.lenders.get(k)
                owned[k] = value.clone() if lender is None else lender.lend(value, context, rows[0])
            if k in self.dense:
                owned[k] = owned[k].contiguous()
        return tuple(owned)


def _lenders(plan: Plan) -> dict[int, Lender]:
    """One for each output that grows at its end. (Pages of one sequence only are read in place.)"""
    if plan.analyzed.captured.lead != 0:  # rows of the text may stand behind a prefix
        return {}
    slots = [plan.slot_of(n) if isinstance(n, fx.Node) else None for n in plan.analyzed.outputs]
    return {
        k: Lender(slot.row)
        for k, slot in enumerate(slots)
        if slot is not None and not slot.before and slot.node.meta["val"].device.type == "cpu"
    }


def _dense(plan: Plan) -> frozenset[int]:
    outputs = {k: n.meta["val"] for k, n in enumerate(plan.analyzed.outputs) if isinstance(n, fx.Node)}
    tensors = {k: value for k, value in outputs.items() if isinstance(value, torch.Tensor)}
    return frozenset(k for k, x in tensors.items() if is_dense([*map(sym, x.shape)], [*map(sym, x.stride())]))


class Program(Locked):
    """What `torch.compile` calls.

    Args:
        captured: the functional graph.
        incremental: its rewriting.
        plain: the model as it was written.
        rebuild: makes the rewriting anew, for constants whose contents the proof had used.
        tiers, compare: of `Steps`.
    """

    def __init__(
        self,
        captured: Captured,
        incremental: Incremental,
        plain: Callable[..., Any],
        cache: Cache,
        rebuild: Callable[[Captured], Incremental],
        tiers: str = "auto",
        compare: bool = True,
    ) -> None:
        super().__init__()
        self.captured, self.plain, self.cache, self._rebuild = captured, plain, cache, rebuild
        self._tiers, self._compare = tiers, compare
        self._places = [i.index for i in captured.of(Role.CONSTANT)]
        self._names = [i.name for i in captured.of(Role.CONSTANT)]
        self._forms = captured.of(Role.FORM)
        self._warned: set[str] = set()
        self.refusal: errors.Refusal | None = None
        self._check: Callable[[Sequence[Any]], bool] | None = None
        self._bound: Bound | None = None
        self._bound = self._bind(incremental, Weights(captured.constants))

    @property
    def incremental(self) -> Incremental | None:
        return None if self._bound is None else self._bound.incremental

    @property
    def hoisted(self) -> Hoisted | None:
        """What is computed once per context; None where nothing is."""
        return None if self._bound is None else self._bound.hoisted

    @property
    def remembered(self) -> Remembered | None:
        """What is kept of it, for the weights as they are now."""
        return None if self._bound is None else self._bound.remembered

    @property
    def steps(self) -> Steps | None:
        """The compiled steps."""
        return None if self._bound is None else self._bound.steps

    @property
    def checked(self) -> bool:
        """Whether nothing has to be compared any more before the cache serves a call."""
        return self._check is None

    def check_first(self, check: Callable[[Sequence[Any]], bool]) -> None:
        """Serve nothing from the cache before ``check`` has returned True for the arguments of a call."""
        self._check = check

    def __call__(self, *given: Any) -> Outputs:
        if not self._numbers_hold(given) or not self._forms_hold(given):
            return self._plainly(given)
        if self._check is not None and not (self._entries_hold(self._bound, given) and self._passes(given)):
            return self._plainly(given)
        bound = self._current(given)
        if bound is None or not self._entries_hold(bound, given):
            return self._plainly(given)
        args = bound.with_rows_of_context(given)
        rows, width = bound.keys.rows(args)
        length = bound.keys.length(args) + bound.keys.lead(args)
        limit = length - bound.keys.last(args)
        if limit < 0:
            return self._plainly(args)
        context = bound.keys.context(args)
        lease = self.cache.begin(bound.table, rows, width, context, limit=limit)
        if not lease.stored:
            self._warn("capacity", str(errors.CapacityTooSmall(detail=lease.reason)))
            return self._plainly(args)
        with lease:
            return bound.run(args, lease, context, rows)

    def _plainly(self, args: Sequence[Any]) -> Outputs:
        return tuple(self.plain(*args))

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning("%s", text)

    def _passes(self, args: Sequence[Any]) -> bool:
        with self._lock:
            if self._check is None:
                return True
            try:
                if self._check(args):
                    self._check = None
            except errors.Refusal as refusal:
                self._refuse(refusal)
                self._check = None
            return self._check is None

    def _refuse(self, refusal: errors.Refusal) -> None:
        self.refusal, self._bound = refusal.kept(), None
        log.warning("%s", refusal)

    # -- weights -------------------------------------------------------------------------------------------------

    def _current(self, args: Sequence[Any]) -> Bound | None:
        """The binding to the weights as they are now."""
        tensors = tuple(args[k] for k in self._places)
        bound = self._bound
        if bound is not None and bound.weights.same(tensors):
            return bound
        with self._lock:
            bound = self._bound
            if bound is None or bound.weights.same(tensors):
                return bound
            self._bound = self._rebind(bound, dict(zip(self._names, tensors, strict=True)))
            return self._bound

    def _rebind(self, old: Bound, constants: dict[str, torch.Tensor]) -> Bound | None:
        weights = Weights(constants)
        facts = {node.name: step.fact for node, step in old.incremental.plan.analyzed.steps.items()}
        changed = weights.changed(old.weights)
        # A single number may have become what a mask is filled with.
        if not any(facts[name].expr is not None or constants[name].numel() == 1 for name in changed):
            return self._bind(old.incremental, weights)
        captured = replace(self.captured, constants=constants)
        try:
            return self._bind(self._rebuild(captured), weights)
        except errors.Refusal as refusal:
            self._refuse(refusal)
            return None

    def _bind(self, incremental: Incremental, weights: Weights) -> Bound:
        if weights.unwatched:
            self._warn("unwatched", _unwatched(weights))
        plan = incremental.plan
        names = identities(plan.analyzed, weights.digests)
        slots = [
            SlotSpec(names[s.node], s.before, s.after, s.dtype, s.node.meta["val"].device, s.name) for s in plan.slots
        ]
        # A tenth of the cache's bytes beside it: an encoder's results for a few inputs.
        remembered = Remembered(self.cache.stats().bytes_capacity // 10)
        keys, table, hoisted = (
            Keys(self.captured, plan),
            self.cache.register(slots),
            hoist(incremental),
        )
        old = self._bound
        if old is not None and old.incremental is incremental:
            steps, hoisted = old.steps, old.hoisted
        else:
            module = lazily(incremental.module if hoisted is None else hoisted.step)
            steps = Steps(self.captured, module, len(plan.slots), self._tiers, self._compare)
        masks = tuple(i for i in self.captured.inputs if i.name in plan.analyzed.taken)
        lenders, dense = _lenders(plan), _dense(plan)
        return Bound(incremental, keys, weights, table, lenders, dense, masks, steps.module, hoisted, remembered, steps)

    def _numbers_hold(self, args: Sequence[Any]) -> bool:
        """Python numbers that Dynamo passes as tensors must still be what they were in the captured graph."""
        for k, number in self.captured.scalars.items():
            now = args[k].item()
            if now != number:
                source = self.captured.inputs[k].source
                detail = (
                    f"{source} is {now} where the graph was captured with {number}: the call runs without the cache"
                )
                self._warn(source, str(errors.NumberChanged(detail=detail)))
                return False
        return True

    def _forms_hold(self, args: Sequence[Any]) -> bool:
        """Masks that the caller passes must still be what was proved of them."""
        for given in self._forms:
            if not form_holds(args[given.index], given.form):
                self._warn(given.name, f"{given.source} is no longer {given.form}: the call runs without the cache")
                return False
        return True

    def _entries_hold(self, bound: Bound | None, args: Sequence[Any]) -> bool:
        """Masks that the caller passes hold the numbers that the proof takes them to hold."""
        for given in () if bound is None else bound.masks:
            if given.entries is not None and not holds_only(args[given.index], given.entries):
                detail = f"{given.source} holds more than {given.entries.value}: the call runs without the cache"
                self._warn(given.name, str(errors.OtherEntries(detail=detail)))
                return False
        return True


def _unwatched(weights: Weights) -> str:
    held = dict(zip(weights.names, weights.tensors, strict=True))
    size = sum(held[name].nbytes for name in weights.unwatched) / 2**20
    return (
        f"{len(weights.unwatched)} weights ({size:.0f} MiB, the first is {weights.unwatched[0]}) are read in every "
        "call to notice changes: their memory is not torch's own, or another tensor or an array shares it. "
        "A clone of them, or dropping the other, makes that unnecessary"
    )


def form_holds(mask: torch.Tensor, form: Any) -> bool:
    """True where ``[.., S, S]`` tensors are the closed form, over ``x0`` and ``x1``, in every entry."""
    size = mask.shape[-1]
    symbols = {
        index(0): torch.arange(size, device=mask.device).unsqueeze(1),
        index(1): torch.arange(size, device=mask.device).unsqueeze(0),
    }
    value = torch.as_tensor(evaluate(form, symbols, {}), device=mask.device)
    return bool(torch.equal(value.to(mask.dtype).expand(mask.shape), mask))


def run(incremental: Incremental, args: Sequence[Any], lease: Lease) -> Outputs:
    """One call of the whole incremental graph on the pages of a lease; outputs may be views of its pools."""
    return _without_gradients(incremental.module, [*args, *_cache_arguments(lease)])


def _cache_arguments(lease: Lease) -> list[Any]:
    return [lease.length, lease.start, *lease.arguments()]


def _without_gradients(module: fx.GraphModule, args: Sequence[Any]) -> Outputs:
    with torch.no_grad():
        outputs: Outputs = module.forward(*args)
    return outputs
