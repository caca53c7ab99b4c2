"""Each reason for a refusal: what it means, code that brings it, and what to do. `docs/refusals.md` is made of it.

`test_reasons.py` runs every piece and holds the page to what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass


@dataclass(frozen=True)
class Reason:
    """One code.

    Attributes:
        means: one sentence. ``do``: what makes the model provable, or that nothing is to be done.
        example: the code that is shown; what it is given is found by its parameters (`test_reasons.provoke`).
        calls: arguments after the tokens, one tuple for each call.
        rows, batch: of the tokens.
        fault: what a test breaks, where no model is known that brings the reason.
    """

    code: str
    means: str
    do: str
    example: Callable[..., Any]
    calls: tuple[tuple[Any, ...], ...] = ((),)
    rows: int = 10
    batch: int = 2
    fault: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def same(x: Tensor) -> Tensor:
    return x


def loop_over_the_rows(x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = 0.9 * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


def graph_break(x: Tensor) -> Tensor:
    print("a graph break")
    return x


def mapped_in_half_precision(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.vmap(lambda text: text @ text.mT)(x).tril() @ x
    return y.float()


def two_sequences(x: Tensor, cube: Tensor) -> Tensor:
    return x + cube[0, 0, 0]  # [S, S, S]


class CountsItsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x


def gradient(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: (y * y.cumsum(1)).sum())(x)


def bessel(x: Tensor) -> Tensor:
    return torch.special.bessel_j0(x)


def sees_the_next_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    return sdpa(q, k, v, attn_mask=j <= i + 1)


def scaled_by_the_length(x: Tensor) -> Tensor:
    return x / x.shape[1]


def mean_over_the_batch(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def dropout_in_eval(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.1, training=True)


def no_key_for_the_first_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    return (q @ k.mT).masked_fill(j >= i, -1e9).softmax(-1) @ v


def halves_of_the_text(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).cumsum(1).flatten(1, 2)


def powers_of_a_triangle(x: Tensor) -> Tensor:
    near = (x @ x.mT).tril()
    return near @ near @ x


def no_attention(ids: Tensor) -> Tensor:
    return nn.functional.one_hot(ids, 16).float()[:, -1:] * 2


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def padded_by_a_number(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = q @ k.mT + (1 - kept[:, None, None]) * -1e9
    return scores.masked_fill(later, -1e9).softmax(-1) @ v


def misspelled_option() -> None:
    kvpass.compile(nn.Linear(2, 2), cahce=None)


def unknown_architecture() -> None:
    from kvpass.report.kernels import architectures

    architectures("sm_1000")


REASONS = (
    Reason(
        "KV101",
        "The graph that Dynamo made holds for one length only.",
        "On the first call of `torch.compile` nothing: the second length brings a symbolic one, and `kvpass.compile` "
        "has it from the first. Where a line is named, the model makes a Python number of the length: a loop over "
        "rows, "
        "`math.log(x.shape[1])`, `int(..)`. Write it as ops over all rows (`cumsum`, `cumprod`, a masked product).",
        loop_over_the_rows,
    ),
    Reason(
        "KV102",
        "The text has one row; at that length a model without any mask looks causal.",
        "Nothing: a longer text is captured by itself.",
        same,
        rows=1,
    ),
    Reason(
        "KV103",
        "The call wants gradients, which flow through the rows that would be cached.",
        "Call the model under `torch.no_grad()` or `torch.inference_mode()`.",
        same,
        options={"grad": True},
    ),
    Reason(
        "KV104",
        "Dynamo split the model into several graphs, and a proof needs the whole model.",
        "Remove the break; `torch.compile(model, fullgraph=True)` names it. Recurrent layers (`nn.LSTM`, `nn.GRU`) are "
        "breaks.",
        graph_break,
    ),
    Reason(
        "KV105",
        "Weights and inputs are not on one device, or on one that has no kernels.",
        "Move the model and its inputs to one CPU or GPU.",
        same,
        options={"device": "meta"},
    ),
    Reason(
        "KV106",
        "No input has one sequence axis by which rows could be told apart.",
        "Pass tokens `[B, S]` or embeddings `[B, S, D]`; a tensor of three sequence axes is no table of rows.",
        two_sequences,
        calls=((torch.zeros(10, 10, 10),),),
    ),
    Reason(
        "KV107",
        "The graph writes into its own argument or buffer: a second call would not be a function of its inputs.",
        "Return the new value, or keep the counter outside of `forward`.",
        CountsItsCalls,
    ),
    Reason(
        "KV108",
        "The batch had the length of the text when the graph was captured: the two axes look alike.",
        "Nothing: the next call of another shape is captured anew.",
        same,
        batch=10,
    ),
    Reason(
        "KV109",
        "PyTorch itself could not trace the graph to ATen ops.",
        "Report it; the model runs as it was written.",
        gradient,
    ),
    Reason(
        "KV110",
        "kvpass raised an error of its own. The model runs as it was written.",
        "Report it with the model: this is a defect.",
        same,
        fault="incrementalise",
    ),
    Reason(
        "KV111",
        "Autocast is on, and what it does to an op cannot be seen by running that op alone (inside of `vmap`, in "
        "`flex_attention`). Of all other ops it is seen, and written out.",
        "Use `model.to(torch.bfloat16)`, or `autocast(enabled=False)` around that op.",
        mapped_in_half_precision,
    ),
    Reason(
        "KV201",
        "The graph has an op that no transfer rule speaks of, so nothing is known of which rows its result depends on.",
        "Spell it with ops that have a rule, or add one: "
        "[ARCHITECTURE.md](../ARCHITECTURE.md#how-to-add-a-transfer-rule) says how, mostly in under ten "
        "lines. Losses (`labels=`) are such ops: leave labels out where you generate.",
        bessel,
    ),
    Reason(
        "KV202",
        "A row that would be kept depends on a later row. Bidirectional attention, windows that look ahead, and "
        "`mean`, `norm`, `softmax`, `sort`, `topk`, `flip`, `roll` or a Fourier transform over the rows are such.",
        "Mask what is later with `j <= i` *before* the normaliser, with -inf. A prefix whose rows see each other is "
        "provable where its length is an argument for each sequence (`j < prefix[:, None, None]`, `prefix` `[B]`). "
        "After the last layer, where nothing is kept, a mean over the rows is served as it is.",
        sees_the_next_row,
    ),
    Reason(
        "KV203",
        "A row that would be kept changes with the *number* of rows: a scale by the length, positions counted from the "
        "end, a rotary base that grows with the text (dynamic NTK beyond its switch).",
        "Count from the start: `log(position)` in place of `log(length)`, a fixed base, positions `0, 1, ..`.",
        scaled_by_the_length,
    ),
    Reason(
        "KV204",
        "One text of a batch changes the answer for another: statistics of the batch, or a value that stands at a "
        "place in the batch.",
        "Compute each sequence by itself. Batch normalisation with known statistics (`eval()`) is provable.",
        mean_over_the_batch,
    ),
    Reason(
        "KV205",
        "A row that would be kept is drawn by chance: the row of another call is another one.",
        "`model.eval()` turns dropout off; pass noise as an argument.",
        dropout_in_eval,
    ),
    Reason(
        "KV206",
        "A row keeps no key, and its fill is finite: its weights become a mean over *all* rows, later ones included.",
        "Fill with -inf, or let each row see itself. Rows that only padding empties are no reason: they mean nothing "
        "in any implementation, and no other row may read them.",
        no_key_for_the_first_row,
    ),
    Reason(
        "KV207",
        "A view splits the sequence axis, or two slices of it are combined in an order that is not known.",
        "Keep the axis whole: merge it with the batch if need be, and say chunks by a mask (`i // n == j // n`).",
        halves_of_the_text,
    ),
    Reason(
        "KV208",
        "What would have to be kept is no table of one row for each position: pairs of rows that later rows read.",
        "Let later rows read values `[B, S, ..]`; products of two matrices of pairs have no rows to keep.",
        powers_of_a_triangle,
    ),
    Reason(
        "KV209",
        "No row of an output needs an earlier one, so that there is nothing to keep.",
        "Nothing; if the model has attention, check which inputs grow.",
        no_attention,
    ),
    Reason(
        "KV301",
        "The rewritten graph gave another answer than the captured one, on the real weights; it is not used.",
        "Report it with the output of `kvpass explain`: this is a defect.",
        same,
        fault="append",
    ),
    Reason(
        "KV302",
        "The cache is too small for this text. The call is answered by the model as it was written.",
        "Give `kvpass.Cache` more bytes.",
        same,
        options={"capacity": 1024},
    ),
    Reason(
        "KV303",
        "A Python number changed that the graph was captured with (only with `dynamic=True`). The call is answered by "
        "the model as it was written.",
        "Pass the number as a tensor, or leave `dynamic` out: Dynamo then guards it.",
        scaled,
        calls=((0.5,), (0.25,)),
    ),
    Reason(
        "KV304",
        "A mask that the caller passes holds other numbers than in the first call, where they were zeros and ones, or "
        "zeros and very negative numbers. The call is answered by the model as it was written.",
        "Pass the same numbers, or a mask of truth values.",
        padded_by_a_number,
        calls=((torch.ones(2, 10, dtype=torch.long),), (torch.full((2, 10), 2),)),
    ),
    Reason(
        "KV401",
        "An option does not exist, or its value is malformed. This one is raised, not reported.",
        "The message names the nearest option.",
        misspelled_option,
    ),
    Reason(
        "KV402",
        "An argument of a function or of the command line cannot be what was meant. This one is raised, not reported.",
        "The message says what there is.",
        unknown_architecture,
    ),
)
