"""Every spelling of attention is the same attention: in plain PyTorch, and to the compiler."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import kvpass
from kvpass.frontend.api import recording
from tests.models import Config
from tests.models.attention import SCORED
from tests.models.config import MASK_SOURCES, POSITIONS, Mask, MaskFrom, Position
from tests.models.masks import closed_form, in_graph, table
from tests.models.tolerances import tolerance
from tests.property.fast import compiled
from tests.property.history import run_history
from tests.property.oracle import compare
from tests.spellings import CAUSAL_ONLY, NEG_INF, PADDABLE, PER_HEAD, SPELLINGS, products

STEPS = ["fresh_7", "grow_1", "grow_1", "grow_9", "grow_1", "branch", "grow_2"]
LAYERS = 4  # spellings that one model has


def packed(masked: bool) -> list[str]:
    """All spellings of a causal mask, or those of any mask whose own part the mask is, several to a model."""
    names = [n for n in SPELLINGS if not masked or (n not in CAUSAL_ONLY and not hasattr(products, n))]
    return ["+".join(names[k : k + LAYERS]) for k in range(0, len(names), LAYERS)]


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Attention from its definition, one number at a time in the order of the formula, in float64."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = allowed.expand(q.shape[0], q.shape[1], *allowed.shape[-2:])[b, h, i].nonzero().flatten()
        scores = scale * (k[b, h // group, keys].double() @ q[b, h, i].double())
        out[b, h, i] = torch.softmax(scores, 0) @ v[b, h // group, keys].double()
    return out.to(q.dtype)


def draw(heads: int, kv_heads: int, rows: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads + kv_heads)
    q = torch.randn(2, heads, rows, 6, generator=generator)
    k = torch.randn(2, kv_heads, rows, 6, generator=generator)
    return q, k, torch.randn(2, kv_heads, rows, 5, generator=generator)


@pytest.mark.parametrize("mask", ["causal", "sliding", "chunked"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_attention(name: str, heads: int, kv_heads: int, mask: Mask) -> None:
    if name in CAUSAL_ONLY and mask != "causal":
        return
    q, k, v = draw(heads, kv_heads)
    allowed = table(Config(mask=mask, width=3), q.shape[2])
    compare(SPELLINGS[name](q, k, v, allowed, 0.4), reference(q, k, v, allowed, 0.4))


@pytest.mark.parametrize("name", sorted(PADDABLE))
def test_spelling_takes_a_mask_per_text(name: str) -> None:
    q, k, v = draw(4, 2)
    padding = torch.arange(11) >= torch.tensor([[0], [4]])
    allowed = table(Config(), 11) & padding[:, None, None, :]
    got, want = SPELLINGS[name](q, k, v, allowed, 0.4), reference(q, k, v, allowed, 0.4)
    assert got.isfinite().all()
    compare(got.transpose(1, 2)[padding], want.transpose(1, 2)[padding])


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_scored_spellings_agree(biased: bool, cap: float | None) -> None:
    q, k, v = draw(4, 2)
    bias = torch.randn(4, 11, 11, generator=torch.Generator().manual_seed(1)) if biased else None
    answers = [f(q, k, v, table(Config(), 11), 0.4, bias, cap) for f in SCORED.values()]
    for answer in answers[1:]:
        compare(answer, answers[0])
    if not biased and cap is None:
        compare(answers[0], reference(q, k, v, table(Config(), 11), 0.4))


@pytest.mark.parametrize("source", ["arange", "tril", "triu", "cumsum"])
@pytest.mark.parametrize("mask", ["causal", "sliding", "chunked"])
def test_masks_in_the_graph_are_the_closed_form(mask: Mask, source: MaskFrom) -> None:
    for width in (1, 2, 3, 7):
        config = Config(mask=mask, mask_from=source, width=width)
        got = in_graph(config, 13, torch.device("cpu"))
        want = [[bool(closed_form(config, torch.tensor(i), torch.tensor(j))) for j in range(13)] for i in range(13)]
        assert got.tolist() == want


# --- through the compiler --------------------------------------------------------------------------------------------


def proven_and_exact(config: Config) -> kvpass.Report:
    """Compile once, take the steps, and return the report of that compilation."""
    with recording() as found:
        run_history(config, compiled, STEPS)
    report = kvpass.Report.of(found)
    assert report.proven, f"build({config!r})\n{report}"
    assert not report.refusals
    return report


def recognised(report: kvpass.Report, config: Config) -> None:
    """Every layer's attention was seen, and what `explain` prints of its mask is the mask, at any length."""
    attentions = sum(config.heads if name in PER_HEAD else 1 for name in config.spellings)
    assert len(report.attention) == attentions, str(report)
    assert not report.unrecognised, str(report)
    assert {attention.lowering[:3] for attention in report.attention} == {"C++"}, str(report)
    i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
    for text in {attention.mask for attention in report.attention}:
        assert torch.equal(eval(text, {"__builtins__": {}}, {"i": i, "j": j}), closed_form(config, i, j)), text


def several(spelling: str, **kwargs: Any) -> Config:
    names = spelling.split("+")
    return Config(spelling=spelling, layers=len(names), heads=4, kv_heads=2, head_size=6, mlp="none", **kwargs)


@pytest.mark.parametrize("spelling", packed(masked=False))
def test_spelling_is_proven_and_exact(spelling: str) -> None:
    config = several(spelling)
    recognised(proven_and_exact(config), config)


@pytest.mark.parametrize("spelling", packed(masked=True))
def test_spelling_of_a_window_is_proven_and_exact(spelling: str) -> None:
    config = several(spelling, mask="sliding", width=3)
    recognised(proven_and_exact(config), config)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize(("position", "cap"), [("alibi", None), ("rotary_half", 3.0), ("alibi", 3.0)])
def test_scored_spelling_is_proven_and_exact(name: str, position: Position, cap: float | None) -> None:
    config = Config(spelling=name, position=position, soft_cap=cap, heads=4, kv_heads=2)
    proven_and_exact(config)


@pytest.mark.parametrize("mask_from", [source for source in MASK_SOURCES if source != "argument"])
@pytest.mark.parametrize("mask", ["causal", "sliding", "chunked"])
def test_mask_is_proven_and_exact(mask: Mask, mask_from: MaskFrom) -> None:
    config = Config(mask=mask, mask_from=mask_from, width=3, layers=1)
    recognised(proven_and_exact(config), config)


@pytest.mark.parametrize(("mask", "text"), [("causal", "j <= i"), ("sliding", "(j <= i) & (j > i - 3)")])
def test_masks_are_printed_as_people_write_them(mask: Mask, text: str) -> None:
    report = proven_and_exact(Config(mask=mask, width=3))
    assert {attention.mask for attention in report.attention} == {text}


@pytest.mark.parametrize("position", POSITIONS)
def test_position_is_proven_and_exact(position: Position) -> None:
    spelling = "scored_masked_fill" if position == "alibi" else "sdpa_bool_mask"
    config = Config(position=position, spelling=spelling)
    proven_and_exact(config)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_heads_are_stored_before_they_are_repeated(heads: int, kv_heads: int) -> None:
    """The cost of a row is the theoretical minimum: keys and values of the key heads, and nothing else."""
    config = Config(heads=heads, kv_heads=kv_heads, head_size=6, output="last")
    report = proven_and_exact(config)
    assert report.bytes_per_row == 2 * config.layers * kv_heads * config.head_size * config.torch_dtype.itemsize


def test_tolerances_are_below_one_key() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert 0 < tolerance(dtype).atol < 0.1
    assert tolerance(torch.long).atol == 0


def exact_while_it_grows(model: nn.Module, ids: Tensor, **limit: float) -> None:
    fast = torch.compile(model, backend="kvpass")
    with torch.no_grad():
        for rows in (7, 8, 30, 40):
            torch.testing.assert_close(fast(ids[:, :rows]), model(ids[:, :rows]), **limit)


class Biased(nn.Module):
    """SDPA with a mask that holds a bias and a fill."""

    def __init__(self, fill: float, slopes: bool) -> None:
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(32, 50)
        self.fill, self.slopes = fill, slopes

    def forward(self, ids: Tensor) -> Tensor:
        batch, rows = ids.shape
        q, k, v = (x.view(batch, rows, 4, 8).transpose(1, 2) for x in self.qkv(self.embedding(ids)).chunk(3, -1))
        i, j, h = torch.arange(rows)[:, None], torch.arange(rows)[None, :], torch.arange(4)[:, None, None]
        bias = (j - i) * (2.0 ** -(h + 1.0) if self.slopes else 0.25)
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(j > i, self.fill))
        return self.head(y.transpose(1, 2).reshape(batch, rows, 32))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("fill", "slopes"), [(NEG_INF, True), (-1e9, False)])
def test_keys_that_a_bias_masks_are_not_visited(fill: float, slopes: bool) -> None:
    torch.manual_seed(0)
    model, ids = Biased(fill, slopes).eval(), torch.randint(50, (2, 40))
    exact_while_it_grows(model, ids)
    (attention,) = kvpass.explain(model, ids).attention
    assert attention.mask == "j <= i"
    assert ("[h, i, j]" in attention.score) == slopes  # a closed form is computed, anything else is read


class Sinks(nn.Module):
    """A learned score without a value joins the softmax of each row, as the last or the first column."""

    def __init__(self, how: str, fill: float, width: int) -> None:
        super().__init__()
        self.embedding, self.q, self.kv = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head, self.sinks = nn.Linear(32, 50), nn.Parameter(2 * torch.randn(4))
        self.how, self.fill, self.width = how, fill, width

    def forward(self, ids: Tensor) -> Tensor:
        batch, rows = ids.shape
        x = self.embedding(ids)
        q = self.q(x).view(batch, rows, 4, 8).transpose(1, 2)
        k, v = (y.view(batch, rows, 2, 8).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        i, j = torch.arange(rows)[:, None], torch.arange(rows)[None, :]
        seen = j < i if self.how == "strict" else (j <= i) & (j > i - self.width)
        scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, self.fill)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(batch, -1, rows, -1)
        if self.how == "first":
            y = torch.cat([sinks, scores], -1).softmax(-1)[..., 1:] @ v
        else:
            joined = torch.cat([scores, sinks], -1)
            weights = (joined - joined.max(-1, keepdim=True).values).softmax(-1)
            y = torch.dropout(weights[..., :-1], 0.1, False) @ v
            y = y + weights[..., -1:] if self.how == "read" else y
        return self.head(y.transpose(1, 2).reshape(batch, rows, 32))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "width", "fill", "dtype"),
    [
        ("last", 6, -3e38, torch.float32),
        ("first", 40, NEG_INF, torch.bfloat16),
        ("strict", 40, NEG_INF, torch.float32),
        ("strict", 40, -3e38, torch.float32),
    ],
)
def test_learned_sinks(how: str, width: int, fill: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, ids = Sinks(how, fill, width).eval().to(dtype), torch.randint(50, (2, 40))
    exact_while_it_grows(model, ids, **tolerance(dtype)._asdict())
    report = kvpass.explain(model, ids)
    assert report.proven == (how != "strict" or fill == NEG_INF)  # a finite fill empties the first row
    assert all(a.score.endswith("a sink of each head") and a.lowering[:3] == "C++" for a in report.attention)
    assert len(report.attention) == report.proven


def test_a_sink_that_is_read_is_a_column_like_any_other() -> None:
    report = kvpass.explain(Sinks("read", NEG_INF, 40).eval(), torch.randint(50, (2, 40)))
    assert not report.proven
    assert not report.attention
