"""Why kvpass runs a graph unrewritten: one class per reason, each with a stable code.

A refusal is not a failure. The captured graph still runs as it was written; the refusal records which node
stood in the way of the proof, where the user wrote it, and what would make it provable.

    KV1xx  the graph could not be looked at         KV3xx  it was rewritten and then found wrong or too large
    KV2xx  the proof did not go through             KV4xx  the user asked for something malformed
"""

from __future__ import annotations

from typing import ClassVar, Self


class KvpassError(Exception):
    """Base of every error that kvpass raises on purpose."""

    code: ClassVar[str] = "KV000"


class Refusal(KvpassError):
    """A graph stays unrewritten, and why.

    Args:
        node: name of the FX node at which the proof stopped, or ``""``.
        source: the user's source line, ``file:line in function: code``, or ``""``.
        **fields: values for the class's ``template``.
    """

    code: ClassVar[str] = "KV000"
    template: ClassVar[str] = "{detail}"
    hint: ClassVar[str] = ""

    def __init__(self, *, node: str = "", source: str = "", **fields: object) -> None:
        self.node, self.source, self.fields = node, source, fields
        self.message = self.template.format(**fields)
        super().__init__(self.message)

    def at(self, node: str, source: str) -> Refusal:
        """Fill in the place, unless an inner frame has named a nearer one; returns self."""
        self.node = self.node or node
        self.source = self.source or source
        return self

    def kept(self) -> Self:
        """The refusal for whoever keeps it: without the frames that it came through, which hold Dynamo's graph and
        the model's tensors.
        """
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)

    def __str__(self) -> str:
        place = f"\n    at {self.source}" if self.source else ""
        node = f" [node {self.node}]" if self.node else ""
        hint = f"\n    hint: {self.hint}" if self.hint else ""
        return f"{self.code} {type(self).__name__}: {self.message}{node}{place}{hint}"

    def to_dict(self) -> dict[str, str]:
        """``code, reason, message, node, source, hint`` as plain strings."""
        return {
            "code": self.code,
            "reason": type(self).__name__,
            "message": self.message,
            "node": self.node,
            "source": self.source,
            "hint": self.hint,
        }


class StaticLength(Refusal):
    code = "KV101"
    template = "the graph was captured for one fixed length, so {detail}"
    hint = (
        "the next call with another length is captured with a symbolic one (kvpass.compile does so from the first), "
        "unless the model makes a Python number of it: ops over all rows, cumsum for one, in place of a loop over them"
    )


class SingleRow(Refusal):
    code = "KV102"
    template = "the graph was captured for a sequence of one row, which proves nothing about longer ones"
    hint = "no action is needed: a longer sequence is captured separately"


class NeedsGradients(Refusal):
    code = "KV103"
    template = "the call needs gradients, which flow through every earlier row"
    hint = "call the model under torch.no_grad() or torch.inference_mode()"


class GraphBreak(Refusal):
    code = "KV104"
    template = "Dynamo split the model into several graphs: {detail}"
    hint = "remove the graph break; torch.compile(..., fullgraph=True) names it"


class UnsupportedDevice(Refusal):
    code = "KV105"
    template = "tensors live on {detail}; one graph must live on one device, a CPU or a CUDA/HIP GPU"
    hint = "move the model and its inputs to one device"


class NoSequence(Refusal):
    code = "KV106"
    template = "no input has a sequence axis: {detail}"
    hint = "an input needs an axis whose length changes from call to call"


class Mutation(Refusal):
    code = "KV107"
    template = "the graph writes into its own input {detail}"
    hint = "return the new value instead of writing it into an argument or a buffer"


class AmbiguousAxes(Refusal):
    code = "KV108"
    template = "{detail}"
    hint = "call once with a batch size that differs from the sequence length"


class CaptureFailed(Refusal):
    code = "KV109"
    template = "the functional graph could not be captured: {detail}"
    hint = "report it; the model runs as it was written"


class Defect(Refusal):
    code = "KV110"
    template = "kvpass failed on this graph: {detail}"
    hint = "this is a defect of kvpass; please report it with the model"


class Autocast(Refusal):
    code = "KV111"
    template = "{detail}: in which precision it runs is not known"
    hint = "call model.to(dtype) instead, or leave this op to autocast(enabled=False)"


class UnknownOp(Refusal):
    code = "KV201"
    template = "no transfer rule for {detail}, so nothing is known of which rows its result depends on"
    hint = "ARCHITECTURE.md says how to add a rule; or spell the operation with ops that have one"


class DependsOnFuture(Refusal):
    code = "KV202"
    template = "{detail}"
    hint = "row i may read rows j <= i only: mask the others with j <= i before the normaliser"


class DependsOnLength(Refusal):
    code = "KV203"
    template = "{detail}"
    hint = "an earlier row must not change when the text grows: count positions from the start, not from the end"


class MixesBatch(Refusal):
    code = "KV204"
    template = "{detail}"
    hint = "each sequence of the batch must be computed by itself"


class Randomness(Refusal):
    code = "KV205"
    template = "{detail} draws random numbers, so a cached row would not be the row of another call"
    hint = "model.eval() turns dropout off"


class EmptyRow(Refusal):
    code = "KV206"
    template = "{detail}"
    hint = "fill with -inf, or let every row keep at least one key (its own)"


class UnsupportedShape(Refusal):
    code = "KV207"
    template = "{detail}"
    hint = "keep the sequence axis whole: merge it with the batch if need be, do not split it"


class NotIncremental(Refusal):
    code = "KV208"
    template = "{detail}"
    hint = "row-wise values that later rows read must have one sequence axis and be the result of the model's own ops"


class NothingStored(Refusal):
    code = "KV209"
    template = "no row of an output needs what an earlier row computed: there is nothing to keep"
    hint = "no action is needed; if the model has attention, check that its inputs are the ones that grow"


class VerifyMismatch(Refusal):
    code = "KV301"
    template = "the rewritten graph disagreed with the captured one on the real weights: {detail}"
    hint = "this is a defect of kvpass; please report it with the output of kvpass.explain"


class CapacityTooSmall(Refusal):
    code = "KV302"
    template = "{detail}"
    hint = "give kvpass.Cache a larger capacity, or send shorter sequences"


class NumberChanged(Refusal):
    code = "KV303"
    template = "{detail}"
    hint = "a number that changes from call to call belongs in a tensor; dynamic=None lets Dynamo guard a fixed one"


class OtherEntries(Refusal):
    code = "KV304"
    template = "{detail}"
    hint = "the proof takes this input for a mask, by what it held at first: pass the same numbers, or truth values"


class OptionError(KvpassError, ValueError):
    """An option of the backend that does not exist or has a malformed value."""

    code = "KV401"


class InputError(KvpassError, ValueError):
    """An argument of a public function that cannot be what the caller meant."""

    code = "KV402"


REFUSALS: tuple[type[Refusal], ...] = (
    StaticLength,
    SingleRow,
    NeedsGradients,
    GraphBreak,
    UnsupportedDevice,
    NoSequence,
    Mutation,
    AmbiguousAxes,
    CaptureFailed,
    Defect,
    Autocast,
    UnknownOp,
    DependsOnFuture,
    DependsOnLength,
    MixesBatch,
    Randomness,
    EmptyRow,
    UnsupportedShape,
    NotIncremental,
    NothingStored,
    VerifyMismatch,
    CapacityTooSmall,
    NumberChanged,
    OtherEntries,
)
