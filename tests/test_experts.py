"""Mixtures of experts, in the ways that libraries write them: proven, cached and equal; and what only looks like one.

Tokens that are sorted by their expert stand among those of all texts. Each way here puts them back where they were;
each fault lets a token see what stands beside it, or shifts the groups.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, scaled_dot_product_attention, silu

import kvpass
from kvpass.frontend.api import recording
from kvpass.kernels import ops
from tests.property.oracle import compare

VOCAB, SIZE, INNER, EXPERTS, EACH = 29, 16, 24, 4, 2


@torch.library.custom_op("kvpass_tests::product_in_groups", mutates_args=())
def product_in_groups(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Another library's: a product for each group, `rows[T, I]`, `weight[E, I, O]`, `ends[E]`."""
    pieces = torch.tensor_split(rows, ends.cpu().long()[:-1])
    return torch.cat([piece @ matrix for piece, matrix in zip(pieces, weight, strict=True)])


@product_in_groups.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("kvpass_tests::centred_groups", mutates_args=())
def centred_groups(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Looks like a product in groups, and takes the mean of each group away."""
    pieces = torch.tensor_split(rows, ends.cpu().long()[:-1])
    return torch.cat([(x - x.mean(0)) @ w if len(x) else x @ w for x, w in zip(pieces, weight, strict=True)])


@centred_groups.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


class Mixture(nn.Module):
    """Attention, and a mixture of experts in one of the ways below."""

    def __init__(self, way: Way, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.way = way
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(VOCAB, SIZE)
            self.qkv = nn.Linear(SIZE, 3 * SIZE)
            self.router = nn.Linear(SIZE, EXPERTS)
            self.up = nn.Parameter(torch.randn(EXPERTS, SIZE, 2 * INNER) / 4)
            self.up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
            self.down = nn.Parameter(torch.randn(EXPERTS, INNER, SIZE) / 4)
            self.head = nn.Linear(SIZE, VOCAB)
        self.to(dtype).eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(2, (6, SIZE // 2)).transpose(1, 2).chunk(3, 1)
        x = x + scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        flat = x.reshape(-1, SIZE)
        weights, experts = self.router(flat).softmax(-1).topk(EACH, -1)
        return self.head(x + self.way(self, flat, weights, experts).view(x.shape))

    def gated(self, rows: Tensor) -> Tensor:
        gate, value = rows.chunk(2, -1)
        return silu(gate) * value


Way = Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]


# --- with a sort --------------------------------------------------------------------------------------------------


def ends_of(experts: Tensor) -> Tensor:
    return torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)


def through(m: Mixture, rows: Tensor, experts: Tensor, product: Callable[..., Tensor] = product_in_groups) -> Tensor:
    """The experts on sorted rows."""
    ends = ends_of(experts)
    inner = product(rows, m.up, ends) + m.up_bias[experts]
    return product(m.gated(inner), m.down, ends)


def arranged(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Put back by an order that counts up in the places of the sort; summed along an axis of their own."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts) * weights.flatten()[order][:, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return y[inverse].view(-1, EACH, SIZE).sum(1)


def argsorted_twice(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    y = through(m, x[order // EACH], flat[order])
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def added_where_it_came_from(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    sorted_experts, order = experts.flatten().sort()
    token = torch.div(order, EACH, rounding_mode="floor")
    y = through(m, x[token], sorted_experts) * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token, y)


def written_where_it_came_from(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    sorted_experts, order = experts.flatten().sort(stable=True)
    out = x.new_empty(order.shape[0], SIZE)
    out[order] = through(m, x[order // EACH], sorted_experts)
    return (out.view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def normalised_between(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Row by row there may be anything between the products: norms, joins, reshapes, sums over other axes."""
    sorted_experts, order = experts.flatten().sort()
    rows = nn.functional.layer_norm(x[order // EACH], (SIZE,))
    y = through(m, rows, sorted_experts).view(-1, 2, SIZE // 2).softmax(-1).flatten(1)
    y = torch.cat([y[:, 1:], y[:, :1]], 1) * weights.flatten()[order].unsqueeze(-1)
    inverse = order.argsort()
    return y[inverse].view(-1, EACH, SIZE).sum(1)


def one_expert(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Counted between two equal bounds."""
    weights, experts = m.router(x)[:, :1].sigmoid().topk(1, -1)
    sorted_experts, order = experts.flatten().sort()
    ends = torch.histc(sorted_experts.float(), 1, 0, 0).cumsum(0, dtype=torch.int32)
    y = product_in_groups(x[order], m.up[:1], ends) * weights.flatten()[order][:, None]
    return product_in_groups(m.gated(y), m.down[:1], ends)[order.argsort()]


# --- without --------------------------------------------------------------------------------------------------------


def dense(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Every expert on every row, times a weight that is zero where it was not chosen."""
    share = (one_hot(experts, EXPERTS) * weights[..., None]).sum(1).to(x.dtype)
    out = torch.zeros_like(x)
    for k in range(EXPERTS):
        out = out + share[:, k, None] * (m.gated(x @ m.up[k] + m.up_bias[k]) @ m.down[k])
    return out


def scattered_weights(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """All rows once for each expert."""
    share = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, experts, weights)
    rows = x.repeat(EXPERTS, 1).view(EXPERTS, -1, SIZE)
    y = torch.bmm(m.gated(torch.bmm(rows, m.up) + m.up_bias[:, None]), m.down)
    return (y * share.t()[..., None]).sum(0)


def weights_of_each_row(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    flat = experts.flatten()
    rows = x[:, None].expand(-1, EACH, -1).reshape(-1, 1, SIZE)
    y = torch.bmm(m.gated(torch.bmm(rows, m.up[flat]) + m.up_bias[flat][:, None]), m.down[flat])
    return (y.view(-1, EACH, SIZE) * weights[..., None]).sum(1)


SORTED = (
    arranged,
    argsorted_twice,
    added_where_it_came_from,
    written_where_it_came_from,
    normalised_between,
    one_expert,
)
WAYS = (*SORTED, dense, scattered_weights, weights_of_each_row)


def texts(rows: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, rows), generator=torch.Generator().manual_seed(seed))


def histories(fast: Callable[[Tensor], Tensor], model: Mixture) -> None:
    """Grow, branch, another batch."""
    for ids in (*(texts(30)[:, :rows] for rows in (7, 8, 9, 20)), texts(30, seed=1)[:, :9], texts(11, batch=3)):
        compare(fast(ids), model(ids))


@pytest.fixture(autouse=True)
def no_gradients() -> None:
    torch._dynamo.reset()


def reported(model: Mixture, ids: Tensor) -> kvpass.Report:
    fast = kvpass.compile(model, cache=kvpass.Cache(capacity="16MiB", page_size=4, poison=True))
    with recording() as found, torch.no_grad():
        fast(ids)
        histories(fast, model)
    return kvpass.Report.of(found)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_is_proven_and_equal(way: Way) -> None:
    report = reported(Mixture(way), texts(7))
    assert report.proven, str(report)
    assert len(report.attention) >= 1


def test_the_product_in_groups_of_aten() -> None:
    """It takes bf16 alone where a graph is compiled."""

    def way(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        sorted_experts, order = experts.flatten().sort()
        y = through(m, x[order // EACH], sorted_experts, lambda rows, w, ends: torch._grouped_mm(rows, w, offs=ends))
        return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)

    report = reported(Mixture(way, torch.bfloat16), texts(7))
    assert report.proven, str(report)


def test_a_matrix_is_not_copied_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sorted ways and the gathered weights run as products in groups."""
    seen: list[tuple[int, ...]] = []

    def experts(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return ops.experts(x, weight, ids)

    monkeypatch.setattr("kvpass.lowering.ops.experts", experts)
    for way in (arranged, weights_of_each_row):
        seen.clear()
        torch._dynamo.reset()
        model = Mixture(way)
        fast = kvpass.compile(model, cache=kvpass.Cache(capacity="16MiB"), verify=False)
        with torch.no_grad():
            fast(texts(12))
            seen.clear()
            compare(fast(texts(13)[:, :13]), model(texts(13)[:, :13]))
        assert [shape[1:] for shape in seen] == [(1, SIZE), (1, INNER)]


@pytest.mark.parametrize("shape", [(1, 3, 4), (7, 1, 5), (5, 2, 3)])
def test_experts_are_products(shape: tuple[int, int, int]) -> None:
    rows, many, inner = shape
    x, weight = torch.randn(rows, many, inner), torch.randn(6, inner, 2)
    ids = torch.randint(0, 6, (rows,))
    compare(ops.experts(x, weight, ids), torch.bmm(x, weight[ids]))


# --- what only looks like one ---------------------------------------------------------------------------------------


def descending(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The groups stand in the other order than their ends."""
    sorted_experts, order = experts.flatten().sort(descending=True)
    y = through(m, x[order // EACH], sorted_experts)
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def shifted_groups(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Numbers below zero stand first and are not counted: every other row falls into a group that depends on them."""
    sorted_experts, order = (experts.flatten() - 1).sort()
    y = through(m, x[order // EACH], sorted_experts)
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def ends_by_other_bounds(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Two experts share a group: row by row, but not what sorting by expert says."""
    sorted_experts, order = experts.flatten().sort()
    ends = torch.histc(sorted_experts.float(), EXPERTS, 0, 2 * EXPERTS).cumsum(0, dtype=torch.int32)
    y = product_in_groups(m.gated(product_in_groups(x[order // EACH], m.up, ends)), m.down, ends)
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def ends_of_something_else(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The first choice of each token, counted twice."""
    order = experts.flatten().argsort()
    ends = ends_of(experts[:, :1].expand(-1, EACH).flatten()[order])
    y = product_in_groups(m.gated(product_in_groups(x[order // EACH], m.up, ends)), m.down, ends)
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def limited(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Sorted rows from the seventh on are dropped: which these are depends on all of them."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts)
    y = torch.cat([y[:6], torch.zeros_like(y[6:])])
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def running(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """A sum along the sorted rows."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts).cumsum(0) / 8
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def beside_the_first(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Each sorted row without the first of them."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts)
    y = y - y[:1]
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def neighbours(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Each sorted row plus the one before it."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts)
    y = y + torch.cat([y[:1] * 0, y[:-1]])
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def centred(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """An operator with the signature of a product in groups that is none."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts, centred_groups)
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def not_put_back(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts)
    return (y.view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def put_back_elsewhere(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Through the order instead of its inverse."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts)
    return (y[order].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def wrong_row(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """``order % each`` instead of ``order // each``."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order % EACH], sorted_experts) * weights.flatten()[order].unsqueeze(-1)
    return (y[order.argsort()].view(-1, EACH, SIZE) * weights[..., None]).sum(1)


def beside_its_place(m: Mixture, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """A sorted row meets the unsorted one that stands where it stands now."""
    sorted_experts, order = experts.flatten().sort()
    y = through(m, x[order // EACH], sorted_experts) * weights.flatten()[:, None]
    return y[order.argsort()].view(-1, EACH, SIZE).sum(1)


FAULTS = (
    descending,
    shifted_groups,
    ends_of_something_else,
    limited,
    running,
    beside_the_first,
    neighbours,
    centred,
    not_put_back,
    put_back_elsewhere,
    wrong_row,
    beside_its_place,
)


@pytest.mark.parametrize("way", FAULTS, ids=lambda way: way.__name__)
def test_what_is_not_row_by_row_is_refused(way: Way) -> None:
    model, ids = Mixture(way), texts(12)
    with torch.no_grad():
        want = model(ids)
        moved = [(model(ids[:, :rows]) - want[:, :rows]).abs().max() for rows in range(1, 12)]
        report = kvpass.explain(model, ids)
        fast = kvpass.compile(model, cache=kvpass.Cache(capacity="16MiB", page_size=4, poison=True))
        for rows in (7, 8, 9, 12):
            compare(fast(ids[:, :rows]), model(ids[:, :rows]))
    assert max(moved) > 1e-3, "the fault shows in no answer"
    assert not report.proven
    assert report.refusals[0].code in {"KV201", "KV202", "KV203", "KV204", "KV205", "KV207"}, str(report)


def test_groups_that_are_not_the_experts() -> None:
    """Without `verify`: no row sees a later one, so that the proof alone would let it pass."""
    model = Mixture(ends_by_other_bounds)
    fast = kvpass.compile(model, cache=kvpass.Cache(capacity="16MiB", page_size=4), verify=False)
    with torch.no_grad():
        histories(fast, model)
