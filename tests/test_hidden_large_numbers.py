"""More models that were answered wrongly once: masks of finite numbers, and numbers that a tensor does not hold.

As in `tests.test_hidden_faults`, whose histories are used: a model may be refused; its answers may not differ.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, glu, pad, scaled_dot_product_attention, softplus

import kvpass
from tests.coverage.base import DEPTH, SIZE, VOCAB, Decoder, build, grid
from tests.property.oracle import check_same
from tests.test_coverage import texts
from tests.test_hidden_faults import kinds, lengths


class OfHeads(Decoder):
    """A softmax over the heads of scores that are very negative in all of them: none of the weights vanishes."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        e = (q @ k.mT).masked_fill(j > i, -1e9)
        weights = {
            "softmax": lambda: e.softmax(1),
            "by hand": lambda: (e - e.amax(1, True)).exp() / (e - e.amax(1, True)).exp().sum(1, True),
            "logsumexp": lambda: (e - e.logsumexp(1, True)).exp(),
            "log_softmax": lambda: e.log_softmax(1).exp(),
        }[self.how]()
        return self.merge(weights @ v, layer)


class Undone(Decoder):
    """What is added to a finite mask is made of one, and undoes it."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Parameter(torch.tensor([[-0.8, -0.6], [0.3, -1.4]]))
        self.factor, self.factors = nn.Parameter(torch.tensor(-2.0)), nn.Parameter(torch.tensor([-2.0, -3.0]))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score = q @ k.mT * DEPTH**-0.5
        e = score.masked_fill(j > i, -1e9)
        weights = {
            "heads": lambda: (e + torch.einsum("bhij,gh->bgij", e, self.talk)).softmax(-1),
            "layers": lambda: (e + self.factor * (score * 0.5).masked_fill(j > i, -1e9)).softmax(-1),
            "factors": lambda: (e + self.factors[:, None, None] * e).softmax(-1),
            "mean": lambda: (e - e.mean(1, True)).sigmoid(),
            "sorted": lambda: (e - e.sort(1).values).exp() * 0.1,
            "abs": lambda: (e + e.abs()).softmax(-1),
            "neg": lambda: (e + (-e) + score).softmax(-1),
            "square": lambda: (score.masked_fill(j > i, -1e4) + e.clamp(min=-1e4) ** 2 * 1e-3).softmax(-1),
            "other fill": lambda: (e + score.abs().masked_fill(j > i, 1e9)).softmax(-1),
            "value": lambda: (e + torch.addcmul(score * 0, score, score, value=1e9)).softmax(-1),
            "baddbmm": lambda: (e + torch.baddbmm(score[:, 0], q[:, 0], k[:, 0].mT, alpha=-1e9)[:, None]).softmax(-1),
            "softplus": lambda: softplus(score.masked_fill(j > i, -1e4), threshold=-1e6) * 1e-4,
        }[self.how]()
        return self.merge(weights @ v, layer)


class Numbers(Decoder):
    """A mask by numbers that the tensor does not hold, or at another place of a table."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(64))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score, later, table = q @ k.mT * DEPTH**-0.5, j > i, self.table.long()
        half = torch.zeros_like(i).masked_fill(i >= 0, 0.5)
        between = torch.arange(0.5, x.shape[1], dtype=torch.int64)[None]
        score = {
            "cut": lambda: score.masked_fill(later | (i - j > table[3:4]), -torch.inf),
            "first": lambda: score.masked_fill(j > i - table[:1], -torch.inf),
            "made": lambda: score.masked_fill(j > i - torch.arange(5)[:1], -torch.inf),
            "steps": lambda: score.masked_fill(j > i + 61 - table[-5::2][0], -torch.inf),
            "int32": lambda: score + (later.long() * -(2**32)).to(torch.int32),
            "products": lambda: score + later.int() * -(2**16) * (2**16),
            "int64": lambda: score + later.long() * -(2**62) * 4,
            "power": lambda: score - (later.int() * 2) ** 32,
            "filled": lambda: score.masked_fill(j > i + 1 - 2 * half, -torch.inf),
            "true": lambda: score.masked_fill(later & ~torch.full((len(i),), 0.5, dtype=torch.bool), -torch.inf),
            "range": lambda: score.masked_fill(between >= i + 1.5, -torch.inf),
        }[self.how]()
        return self.merge(score.softmax(-1) @ v, layer)


class Emptied(Decoder):
    """Rows that keep no key by what the model knows, which is no padding: they are means over all rows."""

    how = ""
    layers = 2

    def __init__(self) -> None:
        super().__init__()
        i, j = torch.arange(64)[:, None], torch.arange(64)
        self.register_buffer("keep", (j < i) & ((i - j) % 2 == 1))
        self.register_buffer("low", torch.where(self.keep, 0.0, -1e9))
        self.register_buffer("tokens", torch.arange(VOCAB) < 3)
        self.gate = nn.Linear(SIZE, 1)

    def forward(self, ids: Tensor, *more: Any) -> Any:
        return super().forward(ids, ids)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        rows, score = len(i), q @ k.mT * DEPTH**-0.5
        if layer < self.layers - 1 and self.how not in ("sdpa", "softmax"):
            return super().mix(x, layer)
        weights = {
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, attn_mask=self.low[:rows, :rows]),
            "softmax": lambda: self.low[:rows, :rows].softmax(-1) @ v,
            "buffer": lambda: score.masked_fill(~self.keep[:rows, :rows], -1e9).softmax(-1) @ v,
            "table": lambda: score.masked_fill((j > i) | ~self.tokens[more[0]][:, None, None], -1e9).softmax(-1) @ v,
            "gate": lambda: score.masked_fill((j > i) | (self.gate(x).mT[:, None] < 0), -1e9).softmax(-1) @ v,
        }[self.how]()
        return self.merge(weights, layer)


class Suppressed(Decoder):
    """Tokens that nobody is to attend to, by a table of very negative numbers, beside a causal mask of such."""

    layers = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("penalty", torch.where(torch.arange(VOCAB) < 20, -1e9, 0.0))

    def forward(self, ids: Tensor, *more: Any) -> Any:
        return super().forward(ids, ids)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score = q @ k.mT * DEPTH**-0.5 + self.penalty[more[0]][:, None, None] + torch.where(j > i, -1e9, 0.0)
        return self.merge(score.softmax(-1) @ v, layer)


class Convolved(Decoder):
    """Rows are taken away before a convolution that pads with zeros itself."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.five = nn.Conv1d(SIZE, SIZE, 2, padding=2), nn.Conv1d(SIZE, SIZE, 5, padding=1)
        self.three = nn.Conv1d(SIZE, SIZE, 3, padding=1)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        rows, y = x.shape[1], x.mT
        y = {
            "first": lambda: self.two(pad(y, (-1, 1)))[..., :rows],
            "last": lambda: self.five(pad(y, (3, -1))),
            "twice": lambda: self.three(pad(pad(y, (2, -2), value=3.0), (1, -1))),
        }[self.how]()
        return super().mix(x + y.mT, layer)


class Sorted(Decoder):
    """Rows in the order of their experts, put back by what is no inverse of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SIZE, 3)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        x = x + super().mix(x, layer)
        flat = x.reshape(-1, SIZE)
        order = self.gate(flat).argmax(-1).argsort()
        return torch.tanh(flat[order] * 1.5)[order.argsort(descending=True)].view(x.shape)


CASES = [
    *kinds(OfHeads, "softmax", "by hand", "logsumexp", "log_softmax"),
    *kinds(
        Undone, "heads", "layers", "factors", "mean", "sorted", "abs", "neg", "square", "other fill", "value",
        "baddbmm", "softplus"
    ),
    *kinds(
        Numbers, "cut", "first", "made", "steps", "int32", "products", "int64", "power", "filled", "range",
        "true"
    ),
    *kinds(Emptied, "sdpa", "softmax", "buffer", "table", "gate"),
    *kinds(Suppressed, ""),
    *kinds(Convolved, "first", "last", "twice"),
    *kinds(Sorted, ""),
]  # fmt: skip


def compiled(model: nn.Module, cache: kvpass.Cache | None = None) -> Any:
    torch._dynamo.reset()
    return kvpass.compile(model, cache=cache or kvpass.Cache("8MiB", page_size=4), verify=False, tiers="eager")


@pytest.mark.parametrize(("kind", "how"), CASES, ids=lambda x: x.__name__ if isinstance(x, type) else x)
@torch.no_grad()
def test_answers_are_right(kind: type[Decoder], how: str) -> None:
    model = build(kind)
    model.how = how  # type: ignore[assignment]
    fast = compiled(model)
    for ids in lengths():
        check_same(fast, model, [ids])


class FromTheEnd(Decoder):
    """ALiBi that counts from the last row, in half precision: a bias is rounded by how long the text is."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        back = torch.arange(len(i)) - (len(i) - 1)
        bias = back * torch.tensor([0.5, 0.25])[:, None, None]
        if self.how == "sdpa":
            mask = bias.masked_fill(j > i, -torch.inf).to(q.dtype)
            return self.merge(scaled_dot_product_attention(q, k, v, attn_mask=mask), layer)
        score = q @ k.mT * DEPTH**-0.5 + (bias.bfloat16() if self.how == "bias" else bias.to(q.dtype))
        return self.merge(score.masked_fill(j > i, -torch.inf).softmax(-1).to(v.dtype) @ v, layer)


@pytest.mark.parametrize("how", ["sdpa", "sum", "bias"])
@torch.no_grad()
def test_a_bias_that_counts_from_the_end_is_rounded_by_the_length(how: str) -> None:
    model = build(FromTheEnd)
    model.how = how  # type: ignore[assignment]
    model = model if how == "bias" else model.bfloat16()
    fast, ids = compiled(model), texts(600)
    for rows in (9, 10, 400, 600):
        check_same(fast, model, [ids[:, :rows]])


class From(Decoder):
    """Positions from a number on that the caller passes."""

    how = ""

    def forward(self, ids: Tensor, first: int) -> Any:  # type: ignore[override]
        return super().forward(ids, first)

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        place = torch.arange(x.shape[1])
        place = place.int() + more[0] if self.how == "int32" else (place + more[0]).float()
        score = (q @ k.mT * DEPTH**-0.5).masked_fill(place[None] > place[:, None], -torch.inf)
        return self.merge(score.softmax(-1) @ v, layer)


@pytest.mark.parametrize(("how", "far"), [("float", 2**27), ("int32", 2**31 - 5)])
@torch.no_grad()
def test_a_number_of_the_call_may_be_of_any_size(how: str, far: int) -> None:
    model = build(From)
    model.how = how  # type: ignore[assignment]
    fast = compiled(model)
    for first in (3, 4, 5, far):
        for ids in lengths():
            check_same(fast, model, [ids, first])


class Times(Decoder):
    """Times of the call, one for each row, that make scores larger than a mask of finite numbers."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.slopes, self.one = nn.Parameter(torch.tensor([1.5, 0.7])), nn.Linear(1, 2)
        self.register_buffer("still", torch.zeros(1))

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        i, j = grid(x)
        score, later, t = q @ k.mT * DEPTH**-0.5, j > i, more[0]
        masked, low = score.masked_fill(later, -1e9), torch.where(later, -1e9, 0.0)
        gap, slopes = (t[:, None] - t[:, :, None])[:, None].float(), self.slopes[:, None, None]
        t = t.float()
        place, times = torch.stack((t, t * 0.5, t - 1), -1)[:, None], t[:, None, :, None].expand_as(q)
        score = {
            "slopes": lambda: masked + gap * slopes,
            "einsum": lambda: masked + torch.einsum("bij,h->bhij", gap[:, 0], self.slopes),
            "linear": lambda: masked + self.one(gap[:, 0, :, :, None]).movedim(-1, 1),
            "mean": lambda: masked + (gap - gap.mean(1, True) * 0.5) * slopes,
            "kept": lambda: (score - t.abs()[:, None, None] * 1e2).masked_fill(later, -1e9),
            "places": lambda: masked + place @ place.mT,
            "baddbmm": lambda: (
                score + torch.baddbmm(low.expand(len(x), -1, -1), t[:, :, None], t[:, None] * self.slopes[0])[:, None]
            ),
            "squares": lambda: masked + ((t - t[:, :1])[:, None, None] * slopes) ** 2,
            "sums": lambda: masked + more[0].cumsum(-1).float()[:, None, None] * slopes,
            "sdpa": lambda: low + gap * slopes,
            "triangle": lambda: masked + (torch.ones_like(low).tril() @ t[..., None]).mT[:, None] * slopes,
            "bounds": lambda: masked + t.clamp(0, 1e12)[:, None, None] * slopes,
            "means": lambda: masked + (masked[:, 0].softmax(-1) @ t[..., None]).mT[:, None] * slopes,
            "glu": lambda: masked + glu(torch.stack((t, t), -1)).mT[:, None] * slopes,
            "attended": lambda: masked + scaled_dot_product_attention(q, k, times, is_causal=True)[..., :1].mT,
            "statistics": lambda: masked + batch_norm(t[:, None], self.still, self.still + 1)[:, None] * slopes,
        }[self.how]()
        if self.how == "sdpa":
            return self.merge(scaled_dot_product_attention(q, k, v, attn_mask=score), layer)
        return self.merge(score.softmax(-1) @ v, layer)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=["integers", "floats"])
@pytest.mark.parametrize(
    "how",
    [
        "slopes",
        "einsum",
        "linear",
        "mean",
        "kept",
        "places",
        "baddbmm",
        "squares",
        "sums",
        "sdpa",
        "triangle",
        "bounds",
        "means",
        "glu",
        "attended",
        "statistics",
    ],
)
@torch.no_grad()
def test_times_that_undo_a_mask(how: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = build(Times)
    model.how = how  # type: ignore[assignment]
    fast = compiled(model)
    for ids in lengths():
        times = (torch.arange(ids.shape[1]) * 10**8 + 7).expand(len(ids), -1).to(dtype)
        check_same(fast, model, [ids, times])
    assert "numbers of any size (L['more'][0])" in caplog.text


class Documents(Decoder):
    """Texts by where positions start anew, and positions that wrap within one."""

    how = ""

    def mix(self, x: Tensor, layer: int, *more: Any) -> Tensor:
        q, k, v = self.project(x, layer)
        if self.how == "made":
            place = (torch.arange(x.shape[1], dtype=torch.int32) + (2**31 - 5))[None]
            text = (place.diff(dim=-1, prepend=place[:, :1] - 1) != 1).cumsum(-1)
        else:
            place = more[0].to(torch.int32) * 2**10 * 2**10
            text = (place.diff(dim=-1, prepend=place[:, :1] - 2**20) != 2**20).cumsum(-1)
        seen = (text[:, None] == text[:, :, None]) & (place[:, None] <= place[:, :, None])
        return self.merge((q @ k.mT).masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v, layer)


@pytest.mark.parametrize("how", ["made", "passed"])
@torch.no_grad()
def test_positions_that_wrap(how: str) -> None:
    model = build(Documents)
    model.how = how  # type: ignore[assignment]
    fast = compiled(model)
    for ids in lengths():
        place = (2040 + torch.arange(ids.shape[1])).expand(len(ids), -1).contiguous()
        check_same(fast, model, [ids, *([] if how == "made" else [place])])


class Rounded(Decoder):
    """A number is added and taken off again, which is nothing but for the rounding."""

    far = 0.0

    def enter(self, ids: Tensor, *more: Any) -> Tensor:
        place = torch.arange(ids.shape[1]).float() * 0.37
        return super().enter(ids) + ((place + self.far) - self.far if self.far else place)[:, None]


@torch.no_grad()
def test_two_models_whose_values_are_one_but_for_the_rounding() -> None:
    cache = kvpass.Cache("8MiB", page_size=4)
    for far in (0.0, 1e9):
        model = build(Rounded)
        model.far = far  # type: ignore[assignment]
        fast = compiled(model, cache)
        for ids in lengths():
            check_same(fast, model, [ids])
