"""Models whose texts stand in columns, ``[S, B]``: the layout of `torch.nn` where nobody says ``batch_first``."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.frontend.api import recording
from tests.property.oracle import check_same

VOCAB, SIZE, HEADS = 50, 32, 4
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


class Positions(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        place, table = torch.arange(64).unsqueeze(1), torch.zeros(64, 1, SIZE)
        rate = torch.exp(torch.arange(0, SIZE, 2) * (-math.log(10000.0) / SIZE))
        table[:, 0, 0::2], table[:, 0, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.size(0)]


class LanguageModel(nn.Module):
    """As in PyTorch's own lesson on language models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places, self.head = nn.Embedding(VOCAB, SIZE), Positions(), nn.Linear(SIZE, VOCAB)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS, 48, 0.2), 2)
        for weight in self.encoder.parameters():
            nn.init.normal_(weight, std=0.2)

    def forward(self, src: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        x = self.places(self.embed(src) * math.sqrt(SIZE))
        if mask is None:
            mask = nn.Transformer.generate_square_subsequent_mask(len(src))
        return self.head(self.encoder(x, mask, padding))


class Translator(nn.Module):
    """As in the one on translation: masks of both texts come from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places, self.head = nn.Embedding(VOCAB, SIZE), Positions(), nn.Linear(SIZE, VOCAB)
        self.transformer = nn.Transformer(SIZE, HEADS, 2, 2, 48)
        for weight in self.transformer.parameters():
            nn.init.normal_(weight, std=0.2)

    def forward(self, src: Tensor, tgt: Tensor, tgt_mask: Tensor, src_padding: Tensor) -> Tensor:
        x, y = (self.places(self.embed(ids)) for ids in (src, tgt))
        y = self.transformer(x, y, None, tgt_mask, None, src_padding, None, src_padding)
        return self.head(y)


def histories() -> list[Tensor]:
    ids = torch.randint(0, VOCAB, (24, 5), generator=torch.Generator().manual_seed(0))
    branch = ids.clone()
    branch[4] = (branch[4] + 1) % VOCAB
    grown = [ids[:9, :3], ids[:10, :3], ids[:14, :3], ids[:6, :3], branch[:12, :3], ids[:15, :3]]
    return [*grown, ids[:16, [2, 0, 1]], ids[:16, :4], ids[:17, 1:3], ids[:18, 1:3]]


@pytest.mark.parametrize("tiers", ["eager", "compiled"])
@pytest.mark.parametrize("mask", ["built", "passed", "padded"])
@torch.no_grad()
def test_language_model(mask: str, tiers: str) -> None:
    torch._dynamo.reset()
    model, cache = LanguageModel().eval(), kvpass.Cache("8MiB", page_size=4, poison=True)
    fast = torch.compile(model, backend="kvpass", options={"cache": cache, "tiers": tiers})
    work = []
    with recording() as found:
        for ids in histories():
            args: list[Any] = [ids]
            if mask != "built":
                args.append(nn.Transformer.generate_square_subsequent_mask(len(ids)))
            if mask == "padded":  # behind the texts: every row sees its own key
                args.append(torch.zeros(ids.shape[1], len(ids)).masked_fill(torch.arange(len(ids)) > 10, -torch.inf))
                args[-1][0] = 0.0
            before = cache.stats().rows_computed
            check_same(fast, model, args)
            work.append(cache.stats().rows_computed - before)
    report = kvpass.Report.of(found)
    assert {refusal.code for refusal in report.refusals} <= {"KV101"}, str(report)  # the first call has one length
    assert not report.unrecognised, str(report)
    assert all(attention.lowering[:3] == "C++" for attention in report.attention), str(report)
    assert work[2] == 3 * 4
    assert work[6] == 3 * (5 if mask == "padded" else 1)  # the texts have changed places, and the padding has not
    assert work[9] == 2


@pytest.mark.parametrize("tiers", ["eager", "compiled"])
@torch.no_grad()
def test_translator(tiers: str) -> None:
    torch._dynamo.reset()
    model, cache = Translator().eval(), kvpass.Cache("8MiB", page_size=4, poison=True)
    fast = torch.compile(model, backend="kvpass", options={"cache": cache, "tiers": tiers})
    source = torch.randint(0, VOCAB, (7, 5), generator=torch.Generator().manual_seed(1))
    padding = torch.arange(7) >= torch.tensor([[7], [5], [7], [4], [6]])
    work = []
    with recording() as found:
        for other in (False, True):
            for ids in histories():
                columns = torch.arange(ids.shape[1])
                src = source[:, columns].flip(0) if other else source[:, columns]
                causal = nn.Transformer.generate_square_subsequent_mask(len(ids))
                before = cache.stats().rows_computed
                check_same(fast, model, [src, ids, causal, padding[columns]])
                work.append(cache.stats().rows_computed - before)
    report = kvpass.Report.of(found)
    assert {refusal.code for refusal in report.refusals} <= {"KV101"}, str(report)
    assert not report.unrecognised, str(report)
    assert work[2] == 3 * 4
    assert work[12] == 3 * 4
    assert work[19] == 2


def test_explained() -> None:
    torch._dynamo.reset()
    report = kvpass.explain(LanguageModel().eval(), histories()[0])
    assert report.proven, str(report)
    assert report.parts[0].inputs[0].shape.startswith("[S, ")
